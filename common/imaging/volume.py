"""A folder of DICOM becomes volumes and images, and every other file is refused by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, FedicomError
from common.imaging.frames import as_slices, read_frames
from common.imaging.header import CONVERTED, Header, scan
from common.imaging.layout import MAX_FILE_BYTES
from common.imaging.pixels import decode, decode_frames, fill_padding
from common.imaging.refusal import Refusal, RefusalCode, Refused, quiet
from common.imaging.series import Stack, files_below, stacks
from common.imaging.tilt import MAX_TILT_DEG, straighten, straightened_shape

Progress = Callable[[int, int], None]
T = TypeVar("T")


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
    frames: tuple[int, ...] = ()
    """Of a multi-frame file: which of its frames, from 1 on, in the order of the slices."""
    corrections: tuple[str, ...] = ()
    """What was done to the values beyond reading them, in words for a log."""
    issuer: str = field(default="", repr=False)
    """Who gave the Patient ID (0010,0021); mostly empty."""


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


def read_folder(path: Path, *, correct_tilt: bool = False) -> FolderReading:
    """Reads all of a folder into memory; `iterate_folder` says how.

    Raises:
        DataError: There is no such folder.
    """
    items = list(iterate_folder(path, correct_tilt=correct_tilt))
    return FolderReading(
        tuple(item for item in items if isinstance(item, Volume)),
        tuple(item for item in items if isinstance(item, Image)),
        tuple(item for item in items if isinstance(item, Refused)),
    )


def iterate_folder(
    path: Path, progress: Progress | None = None, *, correct_tilt: bool = False
) -> Iterator[Volume | Image | Refused]:
    """Reads a folder of DICOM files, one volume or image in memory at a time.

    Headers of all files come first, then series by series in the order of their first file's relative path, so the
    order is the same wherever the folder lies. Refused are: what is no image, what is damaged, and whole series that
    do not make an even stack. Of byte-identical copies the first is used and the others are refused as copies.
    Cross-sectional series of a single slice are refused: nothing tells a remnant of a broken transfer or a
    monitoring image from a wanted one.

    Args:
        path: A folder; links to files are followed, links to folders are not.
        progress: Called with (done, total), two steps a file: header, then pixels.
        correct_tilt: Resample series that were taken with a tilted gantry; otherwise they are refused.

    Yields:
        `Volume`, `Image` or `Refused`; every file of the tree in exactly one, except that each stack of a multi-frame
        file is a volume.

    Raises:
        DataError: There is no such folder, or the process that decodes compressed files cannot be started.
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
        used: set[Path] = set()
        for item in _read_series(series, copies, correct_tilt):
            files = {item.path} if isinstance(item, Refused) else set(item.source.files)
            advance(len(files - used))  # the stacks of one multi-frame file share it
            used |= files
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


def _read_series(
    series: Sequence[Header], copies: dict[Path, Refused], correct_tilt: bool
) -> Iterator[Volume | Image | Refused]:
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
                yield from _attempt(partial(_multiframe, correct_tilt=correct_tilt), header)
            continue
        yield refused
        lost |= header.kind == "slice" and header.sop_uid not in whole  # a damaged copy of a good file is no loss
    if lost:  # the lost slice may be the last one, which no gap would show
        yield from _refuse(slices, RefusalCode.INCOMPLETE, "Another file of this series cannot be used.")
        return
    for item in stacks(slices, tilted=correct_tilt):
        if isinstance(item, Stack):
            yield from _stacked(item)
        else:
            header, code, why = item
            yield Refused(header.path, code, why)


def _refuse(headers: Sequence[Header], code: RefusalCode, why: str) -> Iterator[Refused]:
    for header in headers:
        yield Refused(header.path, code, why)


def _attempt(build: Callable[[Header], Iterator[T]], header: Header) -> Iterator[T | Refused]:
    """What is built, or the refusal of its file: no file may stop the reading of the others."""
    items = build(header)
    while True:
        try:
            with quiet():
                item = next(items)
        except StopIteration:
            return
        except FedicomError:  # no fault of the file
            raise
        except Refusal as refusal:
            code, why = refusal.code, refusal.why
        except MemoryError:
            code, why = RefusalCode.TOO_LARGE, "The image does not fit into memory."
        except OSError:
            code, why = RefusalCode.UNREADABLE, "The file cannot be read; check its permissions and the disk."
        except Exception:  # whatever a damaged file makes the parser raise
            code, why = RefusalCode.CORRUPT, "The file is damaged and cannot be decoded; transfer it again."
        else:
            yield item
            continue
        yield Refused(header.path, code, why)
        return


def source_of(headers: Sequence[Header], *, frames: tuple[int, ...] = (), corrections: tuple[str, ...] = ()) -> Source:
    """Where an image comes from, given the headers of its files."""
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
        frames=frames,
        corrections=corrections,
        issuer=first.issuer,
    )


def _image(header: Header) -> Iterator[Image]:
    values_YX, padding_YX = decode(header.path, projection=True)
    fill_padding(values_YX, padding_YX)
    spacing_mm = header.spacing_mm
    yield Image(values_YX, (spacing_mm[0], spacing_mm[1]) if spacing_mm else None, source_of([header]))


def _slice(header: Header) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_] | None]]:
    yield decode(header.path, projection=False)


def _stacked(stack: Stack) -> Iterator[Volume | Refused]:
    headers = stack.headers
    shape = (len(headers), *headers[0].shape)
    try:
        _check_size(stack, shape)
    except Refusal as refusal:
        yield from _refuse(headers, refusal.code, refusal.why)
        return
    values_ZYX = np.empty(shape, dtype=np.float32)
    padding_ZYX: NDArray[np.bool_] | None = None
    broken: dict[int, Refused] = {}
    for z, header in enumerate(headers):
        for read in _attempt(_slice, header):
            if isinstance(read, Refused):
                broken[z] = read
                continue
            values_ZYX[z], padding_YX = read
            if padding_YX is not None:
                if padding_ZYX is None:
                    padding_ZYX = np.zeros(shape, dtype=np.bool_)
                padding_ZYX[z] = padding_YX
    if broken:
        yield from broken.values()
        whole = [header for z, header in enumerate(headers) if z not in broken]
        yield from _refuse(whole, RefusalCode.INCOMPLETE, "Another file of this series cannot be used.")
        return
    try:  # the smallest value of the whole volume: slices must not differ in what stands for nothing
        fill_padding(values_ZYX, padding_ZYX)
    except Refusal as refusal:
        yield from _refuse(headers, refusal.code, refusal.why)
        return
    yield _volume(values_ZYX, stack, headers)


def _volume(
    values_ZYX: NDArray[np.float32], stack: Stack, headers: Sequence[Header], frames: tuple[int, ...] = ()
) -> Volume:
    affine = stack.affine
    corrections: tuple[str, ...] = ()
    if stack.tilt_deg:
        values_ZYX, affine = straighten(values_ZYX, affine)
        corrections = (f"gantry tilt of {stack.tilt_deg:.1f} degrees resampled",)
    return Volume(values_ZYX, affine, source_of(headers, frames=frames, corrections=corrections))


def _check_size(stack: Stack, shape: tuple[int, int, int]) -> None:
    if stack.tilt_deg > MAX_TILT_DEG:
        raise Refusal(RefusalCode.TILT, f"The slices are tilted by {stack.tilt_deg:.0f} degrees, which no gantry does.")
    if stack.tilt_deg:
        shape = straightened_shape(stack.affine, shape)
    if 4 * int(np.prod(shape, dtype=np.int64)) > MAX_FILE_BYTES:
        raise Refusal(RefusalCode.TOO_LARGE, "The volume would take more than 4 GiB of memory.")


def _multiframe(header: Header, *, correct_tilt: bool) -> Iterator[Volume]:
    """The stacks of a multi-frame file; all of them, or none.

    Its frames pass the same gate as single-frame slices; of such some may be missing where it was made of them.
    highdicom's own `get_volume` would give the same geometry, but it leaves the bits above Bits Stored in the values
    (0.28.2).
    """
    found = read_frames(header.path)
    divided = []
    whole = header.sop_class not in CONVERTED
    for item in stacks(as_slices(header, found.frames), whole=whole, tilted=correct_tilt):
        if not isinstance(item, Stack):
            raise Refusal(item[1], item[2])
        divided.append(item)
    orders = [[int(frame.sop_uid) for frame in stack.headers] for stack in divided]
    for stack, order in zip(divided, orders, strict=True):
        _check_size(stack, (len(order), *header.shape))
        if (
            len(divided) > 1
        ):  # twice, because they do not fit into memory together, and none is used before all are right
            decode_frames(header.path, order, found, header.modality)
    for stack, order in zip(divided, orders, strict=True):
        values_ZYX = decode_frames(header.path, order, found, header.modality)
        numbers = tuple(frame + 1 for frame in order) if len(divided) > 1 else ()
        yield _volume(values_ZYX, stack, [header], numbers)
