"""A labelled DICOM folder becomes prepared samples in one memory-mapped file, which a second run opens as it is."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.config import Preprocessing, Task, as_plain
from common.errors import ConfigError, DataError
from common.imaging import Image, Progress, Refused, Source, Volume, iterate_folder, prepare
from common.labels import Label, need_two_classes, read_labels
from common.storage import commit, locked, private_folder, storing, write_whole

_MIN_KEY_BYTES = 16
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Samples:
    """Prepared images or volumes with their labels, in an order that says nothing about names or paths."""

    x_N: npt.NDArray[np.float32]
    """(N, 1, *size), memory-mapped and read-only."""
    targets_N: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """(N,) class index; multi-label: (N, classes) of 0 and 1, float32."""
    patient_N: npt.NDArray[np.int64]
    """(N,) index into `patients`."""
    patients: tuple[str, ...]
    """Pseudonyms, sorted."""
    subgroups: Mapping[str, tuple[str, ...]]
    """Column of `task.subgroups` -> one value a sample."""
    digest: str
    """SHA-256 over the bytes of `x_N` and of `targets_N`."""


@dataclass(frozen=True)
class Prepared:
    """What a folder gave."""

    samples: Samples
    refused: Mapping[str, int]
    """Reason code -> number of files that were not used."""


def prepare_folder(
    folder: Path, task: Task, data: Preprocessing, *, cache: Path, key: bytes, progress: Progress | None = None
) -> Prepared:
    """Reads, labels and prepares every image of a folder, or opens what an earlier call left in `cache`.

    One item is held in memory at a time. The cache is patient data: mode 0700, replaced as soon as a
    file, a label, the key, the task, the preprocessing or the code that made it differs.

    Args:
        folder: Holds labels.csv, and the DICOM files in `dicom/` or directly.
        task: Which classes, and which identifier labels.csv goes by.
        data: Declares the preprocessing; its augmentation plays no part here.
        cache: Folder of this site for prepared samples; must lie outside the images.
        key: Secret of the site, at least 16 bytes; makes the pseudonyms.
        progress: Told (steps done, steps in all); two steps a file.

    Returns:
        Samples sorted by keyed pseudonym, and the count of unused files by reason: the codes of
        `common.imaging` and no_label, no_patient, wrong_dimensions, other_modality,
        not_preparable, not_finite.

    Raises:
        DataError: No images, no labels, a label row without image or in conflict, one class only.
        StorageError: The cache could not be written; nothing half-written is left.
    """
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(
            f"the site key has {len(key)} bytes, expected at least {_MIN_KEY_BYTES}; shorter keys can be guessed"
        )
    if not folder.is_dir():
        raise DataError("the data folder does not exist; expected a folder with labels.csv and DICOM files")
    images = folder / "dicom" if (folder / "dicom").is_dir() else folder
    if cache.resolve().is_relative_to(images.resolve()):
        raise ConfigError("the cache lies inside the folder of images; choose a folder beside it")
    table_path = folder / "labels.csv"
    if not table_path.is_file():
        raise DataError(f"the folder has no labels.csv; expected one with the first column {task.key!r}")
    with storing("labels.csv"):
        table = table_path.read_bytes()

    wanted = json.dumps(_plain(task, data), sort_keys=True).encode()
    place = private_folder(private_folder(cache) / hashlib.sha256(wanted).hexdigest()[:16])
    with locked(place):
        before = _fingerprint(images, table_path, table, wanted, key)
        found = _open(place, before, task, data)
        if found is None:
            labels = read_labels(table, task)
            with storing("the prepared samples"):
                _clear(place, keep=())
                _Preparation(images, table_path, labels, task, data, key).write(place, before, progress)
            if _fingerprint(images, table_path, table, wanted, key) != before:
                raise DataError("the images changed while they were read; wait until they are complete and run again")
            found = _open(place, before, task, data)
    assert found is not None, "what was just written can be read"
    need_two_classes(_as_labels(found.samples), task, "the folder (images with their labels)")
    return found


def pseudonym(key: bytes, *words: str) -> str:
    """HMAC-SHA256 of the words under the site's key, hexadecimal."""
    # JSON keeps ("a", "b|c") and ("a|b", "c") apart.
    return hmac.new(key, json.dumps(words).encode(), "sha256").hexdigest()


@dataclass(frozen=True)
class _Row:
    name: str
    patient: str
    label: Label


@dataclass
class _Preparation:
    """The one pass over a folder that fills an empty cache."""

    images: Path
    table_path: Path
    labels: Mapping[str, Label]
    task: Task
    data: Preprocessing
    key: bytes

    def write(self, place: Path, fingerprint: str, progress: Progress | None) -> None:
        """Writes samples and index; the index comes last and makes them count."""
        raw, part = place / "rows.tmp", place / "samples.tmp"
        try:
            with raw.open("wb") as out:
                rows, refused = self._collect(out, progress)
            row_bytes = 4 * int(np.prod(self.data.size))
            order = sorted(range(len(rows)), key=lambda i: rows[i].name)
            digest = hashlib.sha256()
            # Written, never mapped: on a full disk a mapped page kills the process instead of raising.
            with raw.open("rb") as source, part.open("wb") as out:
                shape = (len(rows), 1, *self.data.size)
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(out, header)
                for i in order:
                    source.seek(i * row_bytes)
                    block = source.read(row_bytes)
                    digest.update(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
            rows = [rows[i] for i in order]
            targets_N = _targets([row.label.target for row in rows], self.task)
            digest.update(targets_N.tobytes())
            patients = sorted({row.patient for row in rows})
            place_of = {patient: at for at, patient in enumerate(patients)}
            index = {
                "fingerprint": fingerprint,
                "file": f"{digest.hexdigest()[:32]}.npy",
                "bytes": part.stat().st_size,
                "digest": digest.hexdigest(),
                "targets": targets_N.tolist(),
                "patient": [place_of[row.patient] for row in rows],
                "patients": patients,
                "subgroups": {
                    name: [row.label.subgroups[at] for row in rows] for at, name in enumerate(self.task.subgroups)
                },
                "refused": dict(sorted(refused.items())),
            }
            commit(part, place / str(index["file"]))
            write_whole(place / "index.json", json.dumps(index).encode())
            _clear(place, keep=("index.json", str(index["file"])))
        finally:
            raw.unlink(missing_ok=True)
            part.unlink(missing_ok=True)

    def _collect(self, out: BinaryIO, progress: Progress | None) -> tuple[list[_Row], Counter[str]]:
        rows: list[_Row] = []
        seen: set[str] = set()
        refused: Counter[str] = Counter()
        items = 0
        why = ""
        for item in iterate_folder(self.images, progress):
            if isinstance(item, Refused):
                if item.path != self.table_path:
                    refused[str(item.code)] += 1
                continue
            items += 1
            source = item.source
            identifier = _identifier(source, self.task)
            label = self.labels.get(identifier)
            if label is not None:
                seen.add(identifier)
            name = pseudonym(
                self.key, "sample", source.patient_id, source.study_uid, source.series_uid, *source.sop_uids
            )
            code = self._refusal(item, label)
            if code is None:
                try:
                    values = np.ascontiguousarray(prepare(item, self.data), dtype="<f4")
                except DataError as error:
                    code, why = "not_preparable", why or f"; first: {error}"
                else:
                    code = None if np.isfinite(values).all() else "not_finite"
            if code is not None or label is None:
                refused[code or "no_label"] += len(source.files)
                continue
            assert values.shape == (1, *self.data.size), f"prepare gave {values.shape}"
            out.write(values.tobytes())
            rows.append(_Row(name, pseudonym(self.key, "patient", source.patient_id.strip())[:16], label))
        self._check(len(rows), items, seen, refused, why)
        return rows, refused

    def _refusal(self, item: Volume | Image, label: Label | None) -> str | None:
        if isinstance(item, Volume) != (self.task.dimensions == 3):
            return "wrong_dimensions"
        if self.data.modalities and item.source.modality not in self.data.modalities:
            return "other_modality"
        if not item.source.patient_id.strip():
            return "no_patient"  # would merge strangers into one patient: one split, one privacy unit
        return "no_label" if label is None else None

    def _check(self, used: int, items: int, seen: set[str], refused: Mapping[str, int], why: str) -> None:
        key, counts = self.task.key, f"files refused: {dict(refused) or 'none'}{why}"
        if not items and not refused:
            raise DataError("the folder holds no files beside labels.csv; expected DICOM images")
        if not items:
            raise DataError(f"no file of the folder is a DICOM image that can be used; {counts}")
        if not seen:
            raise DataError(
                f"the labels match nothing: {len(self.labels)} rows of labels.csv, {items} images, none with the same "
                f"{key}; check that task.key={key} is what the first column holds; {counts}"
            )
        lost = sorted(label.row for identifier, label in self.labels.items() if identifier not in seen)
        if lost:
            shown = ", ".join(map(str, lost[:_SHOWN_ROWS])) + (", ..." if len(lost) > _SHOWN_ROWS else "")
            raise DataError(
                f"labels.csv row {lost[0]}: no image has this {key}; {len(lost)} such rows ({shown}) of "
                f"{len(self.labels)}; add the images or remove the rows; {counts}"
            )
        if not used:
            raise DataError(f"none of {items} images can be used for a {self.task.dimensions}D task; {counts}")


def _identifier(source: Source, task: Task) -> str:
    found: str = {
        "patient": source.patient_id,
        "study": source.study_uid,
        "accession": source.accession,
        "series": source.series_uid,
    }[task.key]
    return found.strip()


def _open(place: Path, fingerprint: str, task: Task, data: Preprocessing) -> Prepared | None:
    """The cache, where it is whole and was made of just this; None otherwise."""
    try:
        index = json.loads((place / "index.json").read_bytes())
        if index["fingerprint"] != fingerprint:
            return None
        path = place / index["file"]
        if path.stat().st_size != index["bytes"]:
            return None
        x_N = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if x_N.dtype != np.float32 or x_N.shape != (len(index["targets"]), 1, *data.size):
        return None
    patient_N = np.array(index["patient"], np.int64)
    patient_N.setflags(write=False)
    targets_N = _targets(index["targets"], task)
    targets_N.setflags(write=False)
    samples = Samples(
        x_N=x_N,
        targets_N=targets_N,
        patient_N=patient_N,
        patients=tuple(index["patients"]),
        subgroups={name: tuple(values) for name, values in index["subgroups"].items()},
        digest=index["digest"],
    )
    return Prepared(samples, index["refused"])


def _targets(targets: Sequence[int | tuple[int, ...]], task: Task) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    if task.kind == "multilabel":
        return np.array(targets, np.float32)
    return np.array(targets, np.int64)


def _as_labels(samples: Samples) -> Iterator[int | tuple[int, ...]]:
    for target in samples.targets_N.tolist():
        yield tuple(map(int, target)) if isinstance(target, list) else int(target)


def _plain(task: Task, data: Preprocessing) -> dict[str, Any]:
    plain = as_plain(data)
    del plain["augmentation"]  # drawn anew at every step of training
    return {"task": as_plain(task), "data": plain}


def _fingerprint(images: Path, table_path: Path, table: bytes, wanted: bytes, key: bytes) -> str:
    """Keyed hash of all that decides the samples, from file names, sizes and times: no image is opened."""
    digest = hmac.new(key, digestmod="sha256")
    for part in (wanted, hashlib.sha256(table).digest(), _maker().encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    files = []
    labels_csv = os.path.relpath(table_path, images)
    with storing("the folder of images"):
        for parent, _, names in os.walk(images):
            for name in names:
                path = os.path.join(parent, name)  # noqa: PTH118  a Path each would double the time
                relative = os.path.relpath(path, images)
                if relative != labels_csv:
                    found = os.stat(path) if os.path.exists(path) else os.lstat(path)  # noqa: PTH110, PTH116
                    files.append((relative, found.st_size, found.st_mtime_ns))
    files.sort()
    digest.update(json.dumps(files).encode())
    return digest.hexdigest()


@memoised
def _maker() -> str:
    """The code that turns DICOM into samples; other code may give other pixels."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*(here / "imaging").rglob("*.py"), here / "samples.py", here / "labels.py"]):
        digest.update(path.read_bytes())
    libraries = [f"{name} {version(name)}" for name in ("pydicom", "highdicom", "monai", "torch", "numpy")]
    return " ".join([digest.hexdigest(), *libraries])


def _clear(place: Path, keep: Sequence[str]) -> None:
    """Removes what a killed or outdated preparation left; readers keep the files they have mapped."""
    for path in place.iterdir():
        if path.name not in (*keep, ".lock"):
            path.unlink()
