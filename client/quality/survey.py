"""One look at every image of a folder: what the report and the comparison of cohorts are made of.

Identifiers become pseudonyms before anything leaves this file; what is kept of an image is a few hundred numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from client.quality.hashes import perceptual_hash, pixel_digest
from client.quality.remembered import Remembered, array_of, facts_of, plain_array, plain_facts, positions
from client.quality.suspects import features
from client.quality.table import Table
from client.quality.writing import letters
from common.cache import images_folder
from common.config import Preprocessing, Task
from common.errors import DataError
from common.imaging import Progress, RefusalCode, Refused, Source, Volume, prepare
from common.imaging.facts import Facts, read_facts, vendor_of
from common.imaging.fastread import Catalogue, Series, read_series
from common.imaging.index import Index
from common.imaging.overview import MODALITIES
from common.imaging.parallel import Lost, cores, expect, series_limit_s, spread
from common.imaging.volume import source_of
from common.preparing import identifier
from common.pseudonyms import patient_pseudonym, pseudonym, sample_pseudonym
from common.samples import files_below
from common.storage import storing

MIN_PATIENTS = 5
"""Free text of headers, such as the model of a machine, is shown only when this many patients share it: whatever
somebody typed about one patient is not."""
LEVELS = 64
"""Steps of the prepared intensities."""
_SHOWN = 12
_LONGEST = 40
_WORTH_WORKERS = 64


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image or volume, under pseudonyms."""

    name: str
    patient: str
    """As in the cohort: 16 hexadecimal digits."""
    study: str
    series: str
    unit: str
    """Of the row of the label table."""
    target: int | tuple[int, ...] | None
    """None: it has no label."""
    dimensions: int
    modality: str
    vendor: str
    model: str
    spacing_mm: tuple[float, ...]
    """(row, column), with (slice, ...) first for a volume; () is unknown."""
    size: tuple[int, ...]
    facts: Facts
    digest: str
    """Keyed hash of the decoded pixels."""
    blank: bool
    """All pixels are equal."""
    letters: int | None
    """On the fullest line of the margins; None: not examined."""
    files: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a folder holds."""

    pictures: tuple[Picture, ...]
    """Sorted by name."""
    hashes_N2: npt.NDArray[np.uint64]
    features: tuple[npt.NDArray[np.float16], ...]
    """Of each picture; those of images and of volumes differ in length."""
    levels_NB: npt.NDArray[np.float32]
    """Share of the prepared pixels in each of `LEVELS` equal steps of [0, 1]; the last holds 1 as well. 0 where there
    is no preprocessing for them."""
    refused: Mapping[str, int]
    """Code -> files."""
    rows_without_image: int = 0
    files: int = 0


@dataclass(frozen=True)
class _Work:
    series: Series
    data: tuple[Preprocessing, ...]


@dataclass(frozen=True)
class _Seen:
    """What a worker says about one image."""

    source: Source
    facts: Facts
    dimensions: int
    spacing_mm: tuple[float, ...]
    size: tuple[int, ...]
    digest: str
    blank: bool
    letters: int | None
    hash_2: npt.NDArray[np.uint64]
    features: npt.NDArray[np.float16]
    levels_B: npt.NDArray[np.float32] | None


def survey(
    folder: Path,
    table: Table | None,
    *,
    cache: Path,
    key: bytes,
    data: tuple[Preprocessing, ...] = (),
    progress: Progress | None = None,
    jobs: int | None = None,
    secret: bytes | None = None,
) -> Survey:
    """Reads every image of the folder once; one series a process is in memory. What was seen before is not read again.

    Args:
        folder: Holds the DICOM files in `dicom/` or directly.
        table: Its labels; None: nobody has one.
        cache: The site's folder for patient data, where the index is kept.
        key: The site's secret; makes the pseudonyms.
        data: Preprocessing after which intensities are counted, one for each number of dimensions; others are not.
        progress: Told (steps done, steps in all).
        jobs: Processes; None: one for each core where it is worth it.
        secret: Of the site's cache, where that is encrypted.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    everything, refused, shared, total = _everything(folder, cache, key, data, progress, jobs, secret)
    seen = []
    for each in everything:
        patient = each.source.patient_id.strip()
        if patient and patient not in shared:
            seen.append(each)
        else:  # strangers would become one patient
            refused["shared_patient" if patient else "no_patient"] += len(each.source.files)
    if not seen:
        raise DataError(f"the folder holds no usable image; files refused: {dict(+refused) or 'none'}")
    return _collected(seen, table, key, dict(sorted((+refused).items())), total)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a pseudonym stands for; it names a patient, and is for the screen of the site alone."""

    kind: Literal["image", "patient", "study", "series", "row"]
    files: tuple[Path, ...]
    frames: tuple[int, ...] = ()


def where(
    folder: Path,
    name: str,
    *,
    cache: Path,
    key: bytes,
    progress: Progress | None = None,
    jobs: int | None = None,
    secret: bytes | None = None,
) -> tuple[Found, ...]:
    """The images behind a pseudonym of a report, or its first digits: of an image, patient, study, series or row.

    Raises:
        DataError: As `survey`.
    """
    seen, *_ = _everything(folder, cache, key, (), progress, jobs, secret)
    found = []
    for each in seen:
        source = each.source
        given = (source.patient_id, source.study_uid, source.series_uid, source.accession)
        names: tuple[tuple[Literal["image", "patient", "study", "series", "row"], str], ...] = (
            ("image", sample_pseudonym(key, source)),
            ("patient", patient_pseudonym(key, source.patient_id)),
            ("study", pseudonym(key, "study", source.study_uid)),
            ("series", pseudonym(key, "series", source.series_uid)),
            *(("row", pseudonym(key, "label", identifier.strip())) for identifier in given if identifier.strip()),
        )
        kind = next((kind for kind, known in names if known.startswith(name.lower())), None)
        if kind is not None:
            found.append(Found(kind=kind, files=source.files, frames=source.frames))
    return tuple(found)


def _everything(
    folder: Path,
    cache: Path,
    key: bytes,
    data: tuple[Preprocessing, ...],
    progress: Progress | None,
    jobs: int | None,
    secret: bytes | None,
) -> tuple[list[_Seen], Counter[str], frozenset[str], int]:
    """What is seen of all images; code -> files that are refused; Patient IDs of several issuers; and the number of
    files."""
    if not folder.is_dir():
        raise DataError("the data folder does not exist; expected a folder of DICOM files")
    images = images_folder(folder)
    seen: list[_Seen] = []
    with Index(images, cache) as index, Remembered(cache, images, data, key, secret) as memory:
        expect(look.__module__)
        total = index.refresh(progress, jobs=jobs).files
        refused = Counter(str(each.code) for each in index.refused() if each.path.suffix.lower() != ".csv")
        done = 0

        def more(files: int) -> None:
            nonlocal done
            done += files
            if progress is not None:
                progress(min(done, total), total)

        catalogue = Catalogue(index)
        fresh = []
        for uid, series in zip(catalogue.uids, catalogue, strict=True):
            kept = memory.find(memory.name_of(series))
            if kept is None:
                fresh.append(uid)
                continue
            seen += [_recalled(plain, series) for plain in kept["seen"]]
            refused.update(kept["refused"])
            more(len(series.entries))
        for series, found in _looked(fresh, lambda uid: _Work(catalogue.series(uid), data), jobs):
            more(len(series.entries))
            if isinstance(found, Lost):
                code = RefusalCode.TOO_SLOW if found.how == "stalled" else RefusalCode.CORRUPT
                refused[str(code)] += len(series.entries)
                continue
            seen += found[0]
            refused.update(found[1])
            plain = {"seen": [_plain(one, series) for one in found[0]], "refused": found[1]}
            memory.keep(memory.name_of(series), plain)
        return seen, refused, catalogue.shared_ids, total


def _plain(seen: _Seen, series: Series) -> dict[str, Any]:
    """What is kept of an image; whose it is, its files say."""
    return {
        "files": positions(series, seen.source.files),
        "frames": seen.source.frames,
        "corrections": seen.source.corrections,
        "facts": plain_facts(seen.facts),
        "dimensions": seen.dimensions,
        "spacing_mm": seen.spacing_mm,
        "size": seen.size,
        "digest": seen.digest,
        "blank": seen.blank,
        "letters": seen.letters,
        "hash_2": plain_array(seen.hash_2),
        "features": plain_array(seen.features),
        "levels_B": plain_array(seen.levels_B),
    }


def _recalled(plain: Mapping[str, Any], series: Series) -> _Seen:
    headers = [series.entries[at].header for at in plain["files"]]
    hash_2, features_F = array_of(plain["hash_2"]), array_of(plain["features"])
    assert hash_2 is not None
    assert features_F is not None
    return _Seen(
        source=source_of(headers, frames=tuple(plain["frames"]), corrections=tuple(plain["corrections"])),
        facts=facts_of(plain["facts"]),
        dimensions=plain["dimensions"],
        spacing_mm=tuple(plain["spacing_mm"]),
        size=tuple(plain["size"]),
        digest=plain["digest"],
        blank=plain["blank"],
        letters=plain["letters"],
        hash_2=hash_2,
        features=features_F,
        levels_B=array_of(plain["levels_B"]),
    )


def fingerprint(folder: Path, table: bytes, key: bytes) -> str:
    """Keyed hash of the labels and of names, sizes and times of all image files: what a report is about."""
    with storing("the folder of images"):
        files = files_below(os.fspath(images_folder(folder)))
        found = sorted(each for each in files if Path(each[0]).suffix.lower() != ".csv")
    plain = json.dumps([hashlib.sha256(table).hexdigest(), found])
    return hmac.new(key, plain.encode(), "sha256").hexdigest()


def _looked(
    uids: Sequence[str], load: Callable[[str], _Work], jobs: int | None
) -> Iterator[tuple[Series, tuple[list[_Seen], dict[str, int]] | Lost]]:
    jobs = (cores() if len(uids) >= _WORTH_WORKERS else 1) if jobs is None else jobs
    if jobs == 1:
        yield from ((work.series, look(work)) for work in map(load, uids))
        return
    for place, found in spread(look, uids, load=load, jobs=jobs, limit_s=_limit_s, at_once=8):
        yield load(uids[place]).series, found


def _limit_s(work: _Work) -> float:
    entries = work.series.entries
    return series_limit_s(len(entries), sum(entry.mark.size for entry in entries if entry.mark is not None))


def look(work: _Work) -> tuple[list[_Seen], dict[str, int]]:
    """Everything that one series gives; in a worker, or in this process."""
    refused: Counter[str] = Counter()
    seen = []
    for item in read_series(work.series):
        if isinstance(item, Refused):
            refused[str(item.code)] += 1
            continue
        values = item.values_ZYX if isinstance(item, Volume) else item.values_YX
        levels_B = None
        data = next((each for each in work.data if len(each.size) == values.ndim), None)
        if data is not None:
            try:
                levels_B = _levels(prepare(item, data), data)
            except DataError:
                refused["not_preparable"] += len(item.source.files)
                continue
        blank = bool(values.min() == values.max())
        seen.append(
            _Seen(
                source=item.source,
                facts=read_facts(item.source.files[0]),
                dimensions=values.ndim,
                spacing_mm=tuple(float(step) for step in item.spacing_mm or ()),
                size=values.shape,
                digest=pixel_digest(values),
                blank=blank,
                letters=_letters(values),
                hash_2=perceptual_hash(values),
                features=features(values),
                levels_B=levels_B,
            )
        )
    return seen, dict(refused)


def _letters(values: npt.NDArray[np.float32]) -> int | None:
    """Of a volume: on its first, middle and last slice."""
    if values.ndim == 2:
        return letters(values)
    found = [letters(values[at]) for at in sorted({0, len(values) // 2, len(values) - 1})]
    return None if found[0] is None else max(each or 0 for each in found)


def _levels(prepared: npt.NDArray[np.float32], data: Preprocessing) -> npt.NDArray[np.float32]:
    """(LEVELS,): shares of the pixels, in the units of before `mean` and `std`."""
    scaled = np.clip(prepared * data.std + data.mean, 0, 1)
    counts = np.bincount(np.minimum((scaled.ravel() * LEVELS).astype(int), LEVELS - 1), minlength=LEVELS)
    shares: npt.NDArray[np.float32] = (counts / counts.sum()).astype(np.float32)
    return shares


def _collected(
    seen: Sequence[_Seen], table: Table | None, key: bytes, refused: Mapping[str, int], files: int
) -> Survey:
    shown = _Shown(seen, key)
    labels = table.labels if table is not None else {}
    task = table.task if table is not None else Task()
    made = []
    met = set()
    for each in seen:
        source = each.source
        named = identifier(source, task)
        label = labels.get(named)
        if label is not None:
            met.add(named)
        picture = Picture(
            name=sample_pseudonym(key, source),
            patient=patient_pseudonym(key, source.patient_id),
            study=pseudonym(key, "study", source.study_uid)[:_SHOWN],
            series=pseudonym(key, "series", source.series_uid)[:_SHOWN],
            unit=unit_pseudonym(key, named),
            target=None if label is None else label.target,
            dimensions=each.dimensions,
            modality=source.modality if source.modality in MODALITIES else "other",
            vendor=shown.vendor(source),
            model=shown.model(source),
            spacing_mm=each.spacing_mm,
            size=each.size,
            facts=each.facts,
            digest=hmac.new(key, each.digest.encode(), "sha256").hexdigest(),
            blank=each.blank,
            letters=each.letters,
            files=len(source.files),
        )
        made.append((picture, each))
    made.sort(key=lambda both: both[0].name)
    levels = [each.levels_B for _, each in made]
    return Survey(
        pictures=tuple(picture for picture, _ in made),
        hashes_N2=np.stack([each.hash_2 for _, each in made]),
        features=tuple(each.features for _, each in made),
        levels_NB=np.stack([np.zeros(LEVELS, np.float32) if each is None else each for each in levels]),
        refused=refused,
        rows_without_image=len(labels) - len(met),
        files=files,
    )


def between(found: Survey, first: date | None, last: date | None) -> Survey:
    """The images whose Study Date lies between these days, both included; those without one are left out.

    Raises:
        DataError: There is none.
    """
    rows = [
        row
        for row, picture in enumerate(found.pictures)
        if picture.facts.studied is not None
        and (first is None or first <= picture.facts.studied)
        and (last is None or picture.facts.studied <= last)
    ]
    if not rows:
        raise DataError("no image of the folder has a Study Date in this time; choose other days")
    return replace(
        found,
        pictures=tuple(found.pictures[row] for row in rows),
        hashes_N2=found.hashes_N2[rows],
        features=tuple(found.features[row] for row in rows),
        levels_NB=found.levels_NB[rows],
    )


def unit_pseudonym(key: bytes, identifier: str) -> str:
    """Of a row of the label table."""
    return pseudonym(key, "label", identifier)[:_SHOWN]


class _Shown:
    """Which free text of the headers may be shown."""

    def __init__(self, seen: Sequence[_Seen], key: bytes) -> None:
        self._key = key
        self._patients: dict[tuple[str, str], set[str]] = {}
        for each in seen:
            for kind, text in (("vendor", each.source.manufacturer), ("model", each.source.model_name)):
                self._patients.setdefault((kind, text.strip()), set()).add(each.source.patient_id.strip())

    def vendor(self, source: Source) -> str:
        return vendor_of(source.manufacturer) or self._text("vendor", source.manufacturer)

    def model(self, source: Source) -> str:
        return self._text("model", source.model_name)

    def _text(self, kind: str, text: str) -> str:
        text = text.strip()
        if not text:
            return "unknown"
        plain = text.isprintable() and len(text) <= _LONGEST and "^" not in text
        if plain and len(self._patients[kind, text]) >= MIN_PATIENTS:
            return text
        return f"other {pseudonym(self._key, kind, text)[:4]}"
