"""A folder of DICOM becomes volumes and images, and every other file is refused by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.errors import DataError
from common.imaging.pixels import MAX_FILE_BYTES, Refusal, RefusalCode, decode, decode_frames, fill_padding, quiet
from common.imaging.series import Header, Refused, Stack, files_below, numbers, scan, stacks

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """Where pixels came from. Identifiers stay at the site and out of every printed form."""

    patient_id: str = field(repr=False)
    """Patient ID (0010,0020); empty where the file has none."""
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    accession: str = field(repr=False)
    sop_uids: tuple[str, ...] = field(repr=False)
    """In the order of the slices."""
    modality: str
    manufacturer: str
    model_name: str
    files: tuple[Path, ...] = field(repr=False)
    """In the order of `sop_uids`."""


@dataclass(frozen=True)
class Volume:
    """A stack of parallel, evenly spaced slices."""

    values_ZYX: NDArray[np.float32] = field(repr=False)
    """Hounsfield units for CT; otherwise the units of the Modality LUT."""
    affine: NDArray[np.float64]
    """4 x 4, (slice, row, column, 1) -> mm, LPS."""
    source: Source

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbours along (slice, row, column)."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


@dataclass(frozen=True)
class Image:
    """A single picture: radiograph, mammogram, ultrasound frame."""

    values_YX: NDArray[np.float32] = field(repr=False)
    """Larger is brighter."""
    spacing_mm: tuple[float, float] | None
    """(row, column): Pixel Spacing, else Imager Pixel Spacing (at the detector), else None."""
    source: Source


@dataclass(frozen=True)
class FolderReading:
    """All of a folder; every file of it is in exactly one volume, image or refusal."""

    volumes: tuple[Volume, ...]
    images: tuple[Image, ...]
    refused: tuple[Refused, ...]


def read_folder(path: Path) -> FolderReading:
    """Reads all of a folder into memory; `iterate_folder` says how.

    Raises:
        DataError: There is no such folder.
    """
    items = list(iterate_folder(path))
    return FolderReading(
        tuple(item for item in items if isinstance(item, Volume)),
        tuple(item for item in items if isinstance(item, Image)),
        tuple(item for item in items if isinstance(item, Refused)),
    )


def iterate_folder(path: Path, progress: Progress | None = None) -> Iterator[Volume | Image | Refused]:
    """Reads a folder of DICOM files, one volume or image in memory at a time.

    Headers of all files come first, then series by series in the order of their first file's relative path, so the
    order is the same wherever the folder lies. Refused are: what is no image, what is damaged, and whole series that
    do not make an even stack. Of byte-identical copies the first is used and the others are refused as copies.
    Cross-sectional series of a single slice are refused: nothing tells a remnant of a broken transfer or a
    monitoring image from a wanted one.

    Args:
        path: A folder; links to files are followed, links to folders are not.
        progress: Called with (done, total), two steps a file: header, then pixels.

    Yields:
        `Volume`, `Image` or `Refused`; every file of the tree exactly once.

    Raises:
        DataError: There is no such folder.
    """
    if not path.is_dir():
        raise DataError("the folder of DICOM files does not exist or is no folder; give the path of a folder")
    found = list(files_below(path))
    done, total = 0, 2 * len(found)

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done, total)

    by_series: dict[str, list[Header]] = {}
    for file in found:
        result = file if isinstance(file, Refused) else scan(file)
        if isinstance(result, Refused):
            advance(2)
            yield result
        else:
            by_series.setdefault(result.series_uid, []).append(result)
            advance(1)
    copies = _copies(header for series in by_series.values() for header in series)
    for series in by_series.values():
        for item in _read_series(series, copies):
            advance(1 if isinstance(item, Refused) else len(item.source.files))
            yield item


def _copies(headers: Iterator[Header]) -> dict[Path, Refused]:
    """Files that carry the SOP Instance UID of another file: copies, or a conflict."""
    by_uid: dict[str, list[Header]] = {}
    for header in headers:
        if header.problem is None:
            by_uid.setdefault(header.sop_uid, []).append(header)
    refused: dict[Path, Refused] = {}
    for same in by_uid.values():
        if len(same) == 1:
            continue
        if len({_digest(header.path) for header in same}) == 1:
            for header in same[1:]:
                refused[header.path] = Refused(
                    header.path, RefusalCode.COPY, "A byte-identical copy of a file that is used."
                )
        else:
            for header in same:
                refused[header.path] = Refused(
                    header.path,
                    RefusalCode.CONFLICT,
                    "Two different files claim to be the same image (SOP Instance UID); keep the right one.",
                )
    return refused


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return os.fsencode(path)  # equal to nothing


def _read_series(series: Sequence[Header], copies: dict[Path, Refused]) -> Iterator[Volume | Image | Refused]:
    if len({(header.patient_id, header.study_uid) for header in series}) > 1:
        why = "One series holds files of several patients or studies; its identifiers are not to be trusted."
        yield from _refuse(series, RefusalCode.MIXED_PATIENTS, why)
        return
    slices: list[Header] = []
    lost = False
    whole = {header.sop_uid for header in series if header.problem is None and header.path not in copies}
    for header in series:
        if header.path in copies:
            refused = copies[header.path]
        elif header.problem is not None:
            refused = Refused(header.path, *header.problem)
        else:
            if header.kind == "slice":
                slices.append(header)
            elif header.kind == "projection":
                yield from _attempt(_image, header)
            else:
                yield from _attempt(_multiframe, header)
            continue
        yield refused
        lost |= header.kind == "slice" and header.sop_uid not in whole  # a damaged copy of a good file is no loss
    if lost:  # the lost slice may be the last one, which no gap would show
        yield from _refuse(slices, RefusalCode.INCOMPLETE, "Another file of this series cannot be used.")
        return
    for item in stacks(slices):
        if isinstance(item, Stack):
            yield from _stacked(item)
        else:
            header, code, why = item
            yield Refused(header.path, code, why)


def _refuse(headers: Sequence[Header], code: RefusalCode, why: str) -> Iterator[Refused]:
    for header in headers:
        yield Refused(header.path, code, why)


def _attempt(build: Callable[[Header], Volume | Image], header: Header) -> Iterator[Volume | Image | Refused]:
    """The built item, or the refusal of its file: no file may stop the reading of the others."""
    try:
        with quiet():
            item: Volume | Image | Refused = build(header)
    except Refusal as refusal:
        item = Refused(header.path, refusal.code, refusal.why)
    except MemoryError:
        item = Refused(header.path, RefusalCode.TOO_LARGE, "The image does not fit into memory.")
    except Exception:  # whatever a damaged file makes the parser raise
        item = Refused(
            header.path, RefusalCode.CORRUPT, "The file is damaged and cannot be decoded; transfer it again."
        )
    yield item


def _load(header: Header) -> Dataset:
    return pydicom.dcmread(header.path, force=True)


def _source(headers: Sequence[Header]) -> Source:
    first = headers[0]
    return Source(
        patient_id=first.patient_id,
        study_uid=first.study_uid,
        series_uid=first.series_uid,
        accession=first.accession,
        sop_uids=tuple(header.sop_uid for header in headers),
        modality=first.modality,
        manufacturer=first.manufacturer,
        model_name=first.model_name,
        files=tuple(header.path for header in headers),
    )


def _image(header: Header) -> Image:
    dataset = _load(header)
    values_YX, padding_YX = decode(dataset, projection=True)
    fill_padding(values_YX, padding_YX)
    return Image(values_YX, _projection_spacing(dataset), _source([header]))


def _projection_spacing(dataset: Dataset) -> tuple[float, float] | None:
    """Pixel Spacing, else Imager Pixel Spacing, else that of a scanned film (PS3.3 10.7.1.3)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value: Any = dataset.get(keyword)
        if value is None or isinstance(value, str) or len(value) != 2:
            continue
        row, column = float(value[0]), float(value[1])
        if np.isfinite([row, column]).all() and min(row, column) > 0:
            return row, column
    return None


def _stacked(stack: Stack) -> Iterator[Volume | Refused]:
    headers = stack.headers
    shape = (len(headers), *headers[0].shape)
    if 4 * int(np.prod(shape, dtype=np.int64)) > MAX_FILE_BYTES:
        yield from _refuse(headers, RefusalCode.TOO_LARGE, "The volume would take more than 4 GiB of memory.")
        return
    values_ZYX = np.empty(shape, dtype=np.float32)
    padding_ZYX: NDArray[np.bool_] | None = None
    broken: dict[int, Refused] = {}
    for z, header in enumerate(headers):

        def slice_into(header: Header, z: int = z) -> Image:
            nonlocal padding_ZYX
            values_ZYX[z], padding_YX = decode(_load(header), projection=False)
            if padding_YX is not None:
                if padding_ZYX is None:
                    padding_ZYX = np.zeros(shape, dtype=np.bool_)
                padding_ZYX[z] = padding_YX
            return Image(values_ZYX[z], None, _source([header]))

        for item in _attempt(slice_into, header):
            if isinstance(item, Refused):
                broken[z] = item
    if broken:
        yield from broken.values()
        whole = [header for z, header in enumerate(headers) if z not in broken]
        yield from _refuse(whole, RefusalCode.INCOMPLETE, "Another file of this series cannot be used.")
        return
    # the smallest value of the whole volume: slices must not differ in what stands for nothing
    fill_padding(values_ZYX, padding_ZYX)
    yield Volume(values_ZYX, stack.affine, _source(headers))


def _multiframe(header: Header) -> Volume:
    """An enhanced multi-frame file that holds exactly one stack.

    Its frames pass the same gate as single-frame slices. highdicom's own `get_volume` would give the same geometry,
    but it leaves the bits above Bits Stored in the values (0.28.2).

    Source: DICOM PS3.3 C.7.6.16.2.
    """
    dataset = _load(header)
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) != int(dataset.NumberOfFrames):
        raise Refusal(RefusalCode.MISSING_GEOMETRY, "The file does not say where its frames lie in the patient.")

    def group(frame: Dataset, keyword: str) -> Dataset:
        items = frame.get(keyword) or shared.get(keyword) or [Dataset()]
        return cast("Dataset", items[0])

    frames = [
        replace(
            header,
            sop_uid=str(index),
            position_mm=numbers(group(frame, "PlanePositionSequence"), "ImagePositionPatient"),
            orientation=numbers(group(frame, "PlaneOrientationSequence"), "ImageOrientationPatient"),
            spacing_mm=numbers(group(frame, "PixelMeasuresSequence"), "PixelSpacing"),
        )
        for index, frame in enumerate(per_frame)
    ]
    found = list(stacks(frames))
    if len(found) != 1 or not isinstance(found[0], Stack):
        for item in found:
            if not isinstance(item, Stack):
                raise Refusal(item[1], item[2])
        raise Refusal(RefusalCode.NOT_ONE_STACK, "The file holds several stacks; only files of one stack are used.")
    order = [int(frame.sop_uid) for frame in found[0].headers]
    values_ZYX, padding_ZYX = decode_frames(
        dataset, order, [group(frame, "PixelValueTransformationSequence") for frame in per_frame]
    )
    fill_padding(values_ZYX, padding_ZYX)
    return Volume(values_ZYX, found[0].affine, _source([header]))
