"""Each series of a folder becomes samples once; what is finished survives a kill and the next change of the folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.config import Preprocessing, Task
from common.errors import DataError, StorageError
from common.imaging import Image, RefusalCode, Refused, Source, Volume, prepare
from common.imaging.fastread import Catalogue, Series, read_series
from common.imaging.header import Header
from common.imaging.parallel import Lost, cores, series_limit_s, spread
from common.pseudonyms import patient_pseudonym, pseudonym, sample_pseudonym
from common.shard import Appender, Form, Rows

_WORTH_WORKERS_BYTES = 2**28
"""Smaller folders are prepared in this process: starting others takes longer."""
_WORKER_BYTES, _COPIES = 2**29, 3
"""What a process takes, and how many times a volume: itself, a copy for percentiles, or one made straight."""


def identifier(source: Source | Header, task: Task) -> str:
    """What labels.csv calls this image by."""
    found: str = {
        "patient": source.patient_id,
        "study": source.study_uid,
        "accession": source.accession,
        "series": source.series_uid,
    }[task.key]
    return found.strip()


@dataclass(frozen=True)
class Unit:
    """A series that is read and prepared as one."""

    name: str
    """Keyed hash of all that decides what becomes of it."""
    series_uid: str = field(repr=False)
    labelled: frozenset[str] = field(repr=False)
    """Identifiers of its images that have a label."""
    files: int
    bytes: int
    """Of its files."""
    volume_bytes: int
    """Of its pixels as float32."""
    shared_id: bool = False
    """Its Patient ID comes from another issuer elsewhere."""


@dataclass(frozen=True)
class Row:
    """What became of one volume or image; nothing in it names a patient."""

    name: str
    """Pseudonym of the sample: decides the order."""
    patient: str
    label: str
    """Pseudonym of what labels.csv calls it by."""
    files: int
    code: str | None = None
    """Why it is no sample."""
    why: str = ""
    at: int | None = None
    """Its place among the finished rows; None: it is no sample."""
    check: str = ""
    earlier: bool = False
    """It lies in the file of an earlier preparation."""
    corrections: tuple[str, ...] = ()
    """What was done to its values beyond reading and preparing them."""


@dataclass(frozen=True)
class Made:
    """What became of one unit."""

    unit: str
    rows: tuple[Row, ...]
    refused: Mapping[str, int] = field(default_factory=dict)
    """Code -> files that gave no volume or image."""
    lasting: bool = True
    """False: it is tried again when the folder is next prepared."""

    def placed(self, slot_of: Mapping[str, int]) -> Made:
        """With the places that the rows have in the finished file."""
        rows = (row if row.at is None else replace(row, at=slot_of[row.name], earlier=False) for row in self.rows)
        return replace(self, rows=tuple(rows))

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any], *, earlier: bool) -> Made:
        """What `plain` gave.

        Raises:
            TypeError, KeyError, AttributeError: It did not.
        """
        rows = tuple(
            replace(Row(**row), earlier=earlier, corrections=tuple(row["corrections"])) for row in plain["rows"]
        )
        return cls(str(plain["unit"]), rows, dict(plain["refused"]))


@dataclass(frozen=True)
class Item:
    """One volume or image on its way out of a worker."""

    source: Source
    code: str | None
    why: str
    values: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class Outcome:
    """All that came of one unit."""

    items: tuple[Item, ...]
    refused: Mapping[str, int]
    lasting: bool = True
    """False: another try may go better."""


def unit_of(
    series: Series,
    task: Task,
    key: bytes,
    labels: Container[str],
    shared_ids: Container[str],
    made_by: Sequence[str],
) -> Unit:
    """Names a series by all that decides its samples.

    Args:
        labels: Identifiers in labels.csv.
        shared_ids: Patient IDs that more than one issuer gave.
        made_by: The preprocessing, and the code that does it.
    """
    headers = [entry.header for entry in series.entries]
    labelled = frozenset(found for header in headers if (found := identifier(header, task)) in labels)
    files = sorted(
        (
            entry.header.sop_uid,
            str(series.copies[entry.header.path].code) if entry.header.path in series.copies else "",
            # without a mark the file may have changed unseen: what it gives is not found again
            *(map(str, entry.mark[1:3]) if entry.mark is not None else (os.urandom(8).hex(),)),
        )
        for entry in series.entries
    )
    uid = headers[0].series_uid
    shared_id = any(header.patient_id.strip() in shared_ids for header in headers)
    words = [json.dumps(files), json.dumps(sorted(labelled)), json.dumps(shared_id), *made_by, uid]
    size = sum(entry.mark.size for entry in series.entries if entry.mark is not None)
    pixels = sum(4 * header.shape[0] * header.shape[1] for header in headers)
    return Unit(pseudonym(key, "unit", *words), uid, labelled, len(files), size, max(2 * size, pixels), shared_id)


def jobs_for(units: Sequence[Unit]) -> int:
    """How many processes are worth starting, and fit into memory."""
    if sum(unit.bytes for unit in units) < _WORTH_WORKERS_BYTES:
        return 1
    one = _WORKER_BYTES + _COPIES * max(unit.volume_bytes for unit in units)
    return max(1, min(cores(), _free_bytes() // one))


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 2**34


def prepared_units(
    units: Sequence[Unit], catalogue: Catalogue, task: Task, data: Preprocessing, jobs: int
) -> Iterator[tuple[Unit, Outcome]]:
    """Reads and prepares series, in no particular order; one series a process is in memory."""

    def load(unit: Unit) -> _Work:
        return _Work(unit, catalogue.series(unit.series_uid), task, data)

    if jobs == 1 or len(units) < 2:
        for unit in units:
            yield unit, prepared(load(unit))
        return
    for place, found in spread(prepared, units, load=load, jobs=jobs, limit_s=_limit_s):
        unit = units[place]
        if isinstance(found, Lost):
            code = RefusalCode.TOO_SLOW if found.how == "stalled" else RefusalCode.CORRUPT
            found = Outcome((), {str(code): unit.files}, lasting=False)
        yield unit, found


@dataclass(frozen=True)
class _Work:
    unit: Unit
    series: Series
    task: Task
    data: Preprocessing


def _limit_s(work: _Work) -> float:
    return series_limit_s(work.unit.files, work.unit.bytes)


def prepared(work: _Work) -> Outcome:
    """Everything that one series gives; in a worker, or in this process."""
    refused: Counter[str] = Counter()
    items = []
    for item in read_series(work.series, correct_tilt=work.data.correct_tilt):
        if isinstance(item, Refused):
            refused[str(item.code)] += 1
            continue
        code, why, values = _not_a_sample(item, work), "", None
        if code is None:
            try:
                values = np.ascontiguousarray(prepare(item, work.data), dtype="<f4")
            except DataError as error:
                code, why = "not_preparable", str(error)
            else:
                assert values.shape == (1, *work.data.size), f"prepare gave {values.shape}"
                if not np.isfinite(values).all():
                    code, values = "not_finite", None
        items.append(Item(item.source, code, why, values))
    return Outcome(tuple(items), refused)


def _not_a_sample(item: Volume | Image, work: _Work) -> str | None:
    if isinstance(item, Volume) != (work.task.dimensions == 3):
        return "wrong_dimensions"
    if work.data.modalities and item.source.modality not in work.data.modalities:
        return "other_modality"
    if not item.source.patient_id.strip():
        return "no_patient"  # would merge strangers into one patient: one split, one privacy unit
    if work.unit.shared_id:
        return "shared_patient"  # for the same reason
    return None if identifier(item.source, work.task) in work.unit.labelled else "no_label"


class Workshop:
    """Finished rows of a preparation that is going on, and those of the one before it.

    Rows go to one file, and a line about each unit to another, after its rows; a row counts only if the line is whole
    and the row is what the line says. So a kill at any moment costs the unit at hand.
    """

    def __init__(self, place: Path, form: Form, earlier: Mapping[str, Any] | None) -> None:
        """Takes up what an earlier call left.

        Args:
            place: The folder.
            earlier: Index of the finished preparation that is there.
        """
        self._place, self._form = place, form
        self._lines = place / "units.part"
        self._known: dict[str, Made] = {}
        self._before: Rows | None = None
        if earlier is not None and earlier.get("units"):
            try:
                self._before = Rows(place / earlier["file"], form, len(earlier["targets"]))
                found = (Made.of(unit, earlier=True) for unit in earlier["units"])
                self._known = {made.unit: made for made in found}
            except (OSError, ValueError, TypeError, KeyError, AttributeError, StorageError):
                self._before, self._known = None, {}
        about = {"form": [list(form.shape), form.storage], "secret": self._check(b"")}
        lines = self._read_lines(about)
        if lines is None:
            self._lines.unlink(missing_ok=True)
            self._rows_path.unlink(missing_ok=True)
        self._rows = Appender(self._rows_path, form)
        count, whole = len(self._rows), 0
        for made in lines or ():
            at = [row.at for row in made.rows if row.at is not None]
            if at and max(at) >= count:
                break
            whole = max([whole, *(place + 1 for place in at)])
            self._known[made.unit] = made
        self._rows.truncate(whole)
        self._out: BinaryIO = self._lines.open("ab")
        if lines is None:
            self._say(about)

    @property
    def _rows_path(self) -> Path:
        return self._place / "rows.part"

    def known(self, unit: str) -> Made | None:
        """What an earlier call made of this very unit; None where nothing is left that can be trusted."""
        made = self._known.get(unit)
        if made is None:
            return None
        try:
            sound = all(row.at is None or self._check(self.read(row)) == row.check for row in made.rows)
        except (OSError, IndexError, StorageError):
            return None
        return made if sound else None

    def keep(self, unit: Unit, outcome: Outcome, task: Task, key: bytes) -> Made:
        """Writes what came of a unit."""
        rows = []
        for item in outcome.items:
            source = item.source
            row = Row(
                name=sample_pseudonym(key, source),
                patient=patient_pseudonym(key, source.patient_id),
                label=pseudonym(key, "label", identifier(source, task)),
                files=len(source.files),
                code=item.code,
                why=item.why,
                corrections=source.corrections,
            )
            if item.values is not None:
                plain = self._rows.append(item.values)
                row = replace(row, at=len(self._rows) - 1, check=self._check(plain))
            rows.append(row)
        made = Made(unit.name, tuple(rows), dict(outcome.refused), outcome.lasting)
        if outcome.lasting:
            self._say(made.plain())
        return made

    def read(self, row: Row) -> bytes:
        """The sample, as it is stored but not encrypted."""
        assert row.at is not None
        if not row.earlier:
            return self._rows.read(row.at)
        assert self._before is not None
        batch = np.empty((1, *self._form.shape), self._form.dtype)
        self._before.read_into(np.array([row.at]), batch)
        return batch.tobytes()

    def close(self) -> None:
        """Leaves the files for the next call."""
        for file in (self._out, self._rows):
            with suppress(OSError):  # of a full disk, again; half a line and half a row do not count
                file.close()

    def forget(self) -> None:
        """Removes the files."""
        self.close()
        self._lines.unlink(missing_ok=True)
        self._rows_path.unlink(missing_ok=True)

    def _check(self, plain: bytes) -> str:
        return hashlib.blake2b(plain, digest_size=8, key=self._form.secret or b"").hexdigest()

    def _say(self, plain: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(plain).encode() + b"\n")
        self._out.flush()

    def _read_lines(self, about: Mapping[str, Any]) -> list[Made] | None:
        """Units that were finished; None if the file is none of ours."""
        try:
            lines = self._lines.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        found = []
        try:
            if json.loads(lines[0]) != about:
                return None
            for line in lines[1:-1]:
                found.append(Made.of(json.loads(line), earlier=False))
        except (ValueError, TypeError, KeyError, AttributeError):
            if not found:
                return None
        # a line that was cut off must not stand before the next one
        whole = b"\n".join(lines[: len(found) + 1]) + b"\n"
        with self._lines.open("r+b") as file:
            file.truncate(len(whole))
        return found
