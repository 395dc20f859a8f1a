"""TensorBoard scalars of every round and site, written so that a killed and resumed run shows one curve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from common.storage import storing
from server.report import RoundLine

_GLOB = "events.out.tfevents.*.fedicom"


class Scalars:
    """Event files of one run, one file a start.

    A round that was written before, because the process died between these files and its
    checkpoint, replaces the older copy and everything after it: TensorBoard is told where
    the run restarted and drops the rest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._last = max((step for step in _steps(folder)), default=-1)

    def write(self, line: RoundLine) -> None:
        """Appends one round and flushes it.

        Tags are `federation/<what>` and `<what>/<site>`; the step is the round. Validation tags
        describe the model that came into the round.

        Raises:
            StorageError: The file could not be written.
        """
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if line.round <= self._last:
            self._append(step=line.round, session_log=SessionLog(status=SessionLog.START))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line)]
        self._append(step=line.round, summary=Summary(value=values))
        self._last = line.round

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with storing("TensorBoard scalars"):
            if self._file is None:
                self._file = self._create()
                RecordWriter(self._file).write(
                    Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
                )
            RecordWriter(self._file).write(Event(wall_time=time.time(), **what).SerializeToString())
            self._file.flush()

    def _create(self) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files in the order of their names, and two starts may share a second: a number counts up.
        # A killed start may have left half a record at the end of its file, so nothing is ever appended to it.
        return (self._folder / f"events.out.tfevents.{_starts(self._folder):010d}.fedicom").open("xb")


def scalars(line: RoundLine) -> Iterator[tuple[str, float]]:
    """Tag and value of everything in a round that is a number."""
    if line.mean_validation is not None:
        yield "federation/mean_validation", line.mean_validation
    yield "federation/accepted_sites", len(line.accepted)
    yield "federation/refused_sites", len(line.refused)
    yield "federation/seconds", line.seconds
    for site, scores in sorted(line.validation.items()):
        for name, value in sorted(scores.values.items()):
            yield f"validation_{name}/{site}", value
    for what, by_site in (
        ("train_loss", line.train_loss), ("update_norm", line.update_norms), ("epsilon", line.epsilon),
    ):  # fmt: skip
        for site, value in sorted(by_site.items()):
            yield f"{what}/{site}", value


def _starts(folder: Path) -> int:
    return 1 + max((int(file.name.split(".")[3]) for file in folder.glob(_GLOB)), default=0)


def _steps(folder: Path) -> Iterator[int]:
    """Steps of the summaries already on disk; half a record at the end of a file is passed over."""
    files = sorted(folder.glob(_GLOB))
    if not files:
        return
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for file in files:
        for event in EventFileLoader(str(file)).Load():
            if event.HasField("summary"):
                yield event.step
