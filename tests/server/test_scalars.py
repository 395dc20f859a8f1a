"""TensorBoard scalars, read back with TensorBoard's own accumulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import StorageError
from common.exchange import Scores
from server.report import RoundLine
from server.scalars import Scalars


def line(number: int, value: float = 0.5) -> RoundLine:
    return RoundLine(
        round=number,
        mean_validation=value,
        validation={
            "north": Scores(patients=12, values={"auroc": value, "loss": 0.25}),
            "south": Scores(patients=0, values={}),
        },
        accepted=("north",),
        refused={"south": "timeout"},
        update_norms={"north": 2.0},
        epsilon={"north": 0.125 * number},
        seconds=1.5,
    )


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def tags(folder: Path) -> set[str]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


def test_every_number_of_a_round_is_a_scalar(tmp_path: Path) -> None:
    with Scalars(tmp_path) as scalars:
        scalars.write(line(1))
        scalars.write(line(2, 0.75))
    assert tags(tmp_path) == {
        "federation/mean_validation",
        "federation/accepted_sites",
        "federation/refused_sites",
        "federation/seconds",
        "validation_auroc/north",
        "validation_loss/north",
        "update_norm/north",
        "epsilon/north",
    }
    assert read(tmp_path, "validation_auroc/north") == [(1, 0.5), (2, 0.75)]
    assert read(tmp_path, "epsilon/north") == [(1, 0.125), (2, 0.25)]
    assert read(tmp_path, "federation/refused_sites") == [(1, 1.0), (2, 1.0)]


def test_a_round_is_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path)
    scalars.write(line(1))
    assert read(tmp_path, "federation/seconds") == [(1, 1.5)]
    scalars.close()


def test_a_resumed_run_continues_the_curve(tmp_path: Path) -> None:
    for number in (1, 2, 3):  # a new process each round
        with Scalars(tmp_path) as scalars:
            scalars.write(line(number, number / 8))
    assert read(tmp_path, "federation/mean_validation") == [(1, 0.125), (2, 0.25), (3, 0.375)]


def test_a_round_written_again_replaces_itself_and_what_followed(tmp_path: Path) -> None:
    with Scalars(tmp_path) as scalars:
        for number in (1, 2, 3):
            scalars.write(line(number, 0.25))
    with Scalars(tmp_path) as scalars:
        scalars.write(line(2, 0.75))
    assert read(tmp_path, "federation/mean_validation") == [(1, 0.25), (2, 0.75)]


def test_half_a_record_left_by_a_killed_process_loses_that_round_only(tmp_path: Path) -> None:
    with Scalars(tmp_path) as scalars:
        scalars.write(line(1, 0.25))
        scalars.write(line(2, 0.25))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    with Scalars(tmp_path) as scalars:
        scalars.write(line(2, 0.5))
        scalars.write(line(3, 0.75))
    assert read(tmp_path, "federation/mean_validation") == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_opening_and_closing_without_a_round_writes_nothing(tmp_path: Path) -> None:
    Scalars(tmp_path / "tensorboard").close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="TensorBoard"):
        Scalars(tmp_path / "taken").write(line(1))
