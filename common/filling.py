"""The pass over a labelled DICOM folder that fills a cache of `common.samples`."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import Preprocessing, Task
from common.errors import DataError
from common.imaging import Progress, Refused
from common.imaging.fastread import Catalogue
from common.imaging.index import Index
from common.imaging.parallel import expect
from common.labels import Label
from common.preparing import Made, Workshop, identifier, jobs_for, prepared_units, unit_of
from common.printable import number_of
from common.pseudonyms import pseudonym
from common.samples import index_file, maker, read_index, targets_of
from common.shard import Form, seal_text, widened, write_rows
from common.storage import commit, write_whole

_SHOWN_ROWS = 5


def index_of(images: Path, cache: Path) -> Index:
    """What `fedicom data index` left in `cache`, or else one that is not kept."""
    return Index.find(images, cache) or Index(images)


@dataclass
class Preparation:
    """The one pass over a folder that fills the cache."""

    index: Index
    table_path: Path
    labels: Mapping[str, Label]
    task: Task
    data: Preprocessing
    key: bytes
    form: Form
    wanted: bytes
    jobs: int | None
    _outside: list[Refused] = field(default_factory=list)
    """Files and folders that belong to no series."""

    def write(self, place: Path, fingerprint: str, progress: Progress | None) -> None:
        """Writes samples and index; the index comes last and makes them count."""
        part = place / "samples.tmp"
        workshop = Workshop(place, self.form, read_index(place, self.form))
        try:
            made = self._collect(workshop, progress)
            self._check(made)
            rows = sorted((row for each in made for row in each.rows if row.at is not None), key=lambda row: row.name)
            digest = hashlib.sha256()
            with part.open("wb") as out:
                for plain in write_rows(out, self.form, len(rows), map(workshop.read, rows)):
                    digest.update(widened(plain, self.form))
                out.flush()
                os.fsync(out.fileno())
            by_name = {pseudonym(self.key, "label", each): label for each, label in self.labels.items()}
            labels = [by_name[row.label] for row in rows]
            targets_N = targets_of([label.target for label in labels], self.task)
            digest.update(targets_N.tobytes())
            patients = sorted({row.patient for row in rows})
            place_of = {patient: at for at, patient in enumerate(patients)}
            slot_of = {row.name: at for at, row in enumerate(rows)}
            index = {
                "fingerprint": fingerprint,
                "file": f"{digest.hexdigest()[:32]}{self.form.suffix}",
                "bytes": part.stat().st_size,
                "digest": digest.hexdigest(),
                "targets": targets_N.tolist(),
                "patient": [place_of[row.patient] for row in rows],
                "patients": patients,
                "subgroups": {
                    name: [label.subgroups[at] for label in labels] for at, name in enumerate(self.task.subgroups)
                },
                "refused": self._refused(made),
                "corrected": dict(sorted(Counter(word for row in rows for word in row.corrections).items())),
                "units": [each.placed(slot_of).plain() for each in made if each.lasting],
            }
            commit(part, place / str(index["file"]))
            _write_index(place, index, self.form)
            workshop.forget()
            _clear(place, keep=(index_file(place, self.form).name, str(index["file"])))
        except OSError:  # the disk is full, most likely: what was finished shall not keep it so
            workshop.forget()
            raise
        finally:
            workshop.close()
            part.unlink(missing_ok=True)

    def _collect(self, workshop: Workshop, progress: Progress | None) -> list[Made]:
        """What became of every series, in this run or an earlier one."""
        total = 0

        def headers(done: int, files: int) -> None:
            nonlocal total
            total = 2 * files
            if progress is not None:
                progress(done, total)

        expect(prepared_units.__module__)
        self.index.refresh(headers, jobs=self.jobs)
        refused = list(self.index.refused())
        self._outside = [each for each in refused if each.path != self.table_path]
        done = total // 2 + len(refused) - len(self.index.outside)
        made_by = (self.wanted.decode(), maker())
        catalogue = Catalogue(self.index)
        units = [
            unit_of(series, self.task, self.key, self.labels, catalogue.shared_ids, made_by) for series in catalogue
        ]
        made = {unit.name: found for unit in units if (found := workshop.known(unit.name)) is not None}
        todo = [unit for unit in units if unit.name not in made]
        done += sum(unit.files for unit in units if unit.name in made)
        if progress is not None:
            progress(done, total)
        jobs = jobs_for(todo) if self.jobs is None else self.jobs
        for unit, outcome in prepared_units(todo, catalogue, self.task, self.data, jobs):
            made[unit.name] = workshop.keep(unit, outcome, self.task, self.key)
            done += unit.files
            if progress is not None:
                progress(done, total)
        return [made[unit.name] for unit in units]

    def _refused(self, made: Sequence[Made]) -> dict[str, int]:
        counts = Counter(str(refused.code) for refused in self._outside)
        for each in made:
            counts.update(each.refused)
            for row in each.rows:
                if row.code is not None:
                    counts[row.code] += row.files
        return dict(sorted(counts.items()))

    def _check(self, made: Sequence[Made]) -> None:
        refused = self._refused(made)
        rows = [row for each in made for row in each.rows]
        why = next((f"; first: {row.why}" for row in rows if row.why), "")
        key, counts = self.task.key, f"files refused: {refused or 'none'}{why}"
        if not rows and not refused:
            raise DataError("the folder holds no files beside labels.csv; expected DICOM images")
        if not rows:
            raise DataError(f"no file of the folder is a DICOM image that can be used; {counts}")
        seen = {row.label for row in rows}
        lost = sorted(
            label.row
            for identifier, label in self.labels.items()
            if pseudonym(self.key, "label", identifier) not in seen
        )
        if len(lost) == len(self.labels):
            raise DataError(
                f"the labels match nothing: {len(self.labels)} rows of labels.csv, {len(rows)} images, none with the "
                f"same {key}; check that task.key={key} is what the first column holds{self._zeros(lost)}; {counts}"
            )
        if lost:
            raise DataError(
                f"labels.csv row {lost[0]}: no image has this {key}; {_rows(lost)} of {len(self.labels)}; "
                f"add the images or remove the rows{self._zeros(lost)}; {counts}"
            )
        patients: dict[str, set[str]] = {}
        for row in rows:
            if row.code not in ("no_patient", "shared_patient"):
                patients.setdefault(row.label, set()).add(row.patient)
        several = sorted(
            label.row
            for identifier, label in self.labels.items()
            if len(patients.get(pseudonym(self.key, "label", identifier), ())) > 1
        )
        if several:
            raise DataError(
                f"labels.csv row {several[0]}: images of more than one patient have this {key}, expected one patient; "
                f"{_rows(several)}; label by patient or series, correct the images or remove the rows; {counts}"
            )
        if all(row.at is None for row in rows):
            raise DataError(f"none of {len(rows)} images can be used for a {self.task.dimensions}D task; {counts}")

    def _zeros(self, lost: Sequence[int]) -> str:
        """What to do where rows differ from images by leading zeros alone; not done here: 7 may be another than 007."""
        images = {identifier(entry.header, self.task) for entries in self.index.series() for entry in entries}
        shorter = {name.lstrip("0") for name in images if name.startswith("0")}
        gone = set(lost)
        rows = sum(label.row in gone and name.lstrip("0") in shorter for name, label in self.labels.items())
        if not rows:
            return ""
        return (
            f"; {rows} of these rows have an image but for zeros in front, which spreadsheets drop: make the first "
            "column text, and put them back"
        )


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN_ROWS])) + (", ..." if len(numbers) > _SHOWN_ROWS else "")
    return f"{number_of(len(numbers), 'such row')} ({shown})"


def _write_index(place: Path, index: Mapping[str, Any], form: Form) -> None:
    text = json.dumps(index).encode()
    write_whole(index_file(place, form), text if form.secret is None else seal_text(text, form.secret))


def _clear(place: Path, keep: Sequence[str]) -> None:
    """Removes what a killed or outdated preparation left; readers keep the files they have mapped."""
    for path in place.iterdir():
        if path.name not in (*keep, ".lock"):
            path.unlink()
