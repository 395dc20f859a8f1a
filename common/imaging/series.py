"""Which files of a folder are images, and which of them make one stack.

Accept or refuse, never guess: a file whose place in a volume is not certain is refused, with a
sentence that the person who exported it understands.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pydicom
from highdicom.spatial import get_volume_positions
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble

from common.imaging.pixels import Refusal, RefusalCode, check_declared_size, quiet

SPACING_RTOL = 0.01
"""Largest deviation of a slice distance from the mean one, relative."""
ORIENTATION_TOL = 1e-4
"""1 - cosine between two directions that count as the same; scanners write jitter of 1e-6."""
MAX_DRIFT = 0.1
"""Largest distance between a slice and the place its index gives it, in slice distances."""
MIN_SPACING_MM = 1e-3
"""Slices closer than this are two images of one place."""
MAX_INFLATED_BYTES = 2**28

Kind = Literal["slice", "multiframe", "projection"]

_KINDS: dict[str, Kind] = {
    uid.CTImageStorage: "slice",
    uid.MRImageStorage: "slice",
    uid.PositronEmissionTomographyImageStorage: "slice",
    uid.EnhancedCTImageStorage: "multiframe",
    uid.EnhancedMRImageStorage: "multiframe",
    uid.EnhancedPETImageStorage: "multiframe",
    uid.LegacyConvertedEnhancedCTImageStorage: "multiframe",
    uid.LegacyConvertedEnhancedMRImageStorage: "multiframe",
    uid.LegacyConvertedEnhancedPETImageStorage: "multiframe",
    uid.ComputedRadiographyImageStorage: "projection",
    uid.DigitalXRayImageStorageForPresentation: "projection",
    uid.DigitalXRayImageStorageForProcessing: "projection",
    uid.DigitalMammographyXRayImageStorageForPresentation: "projection",
    uid.DigitalMammographyXRayImageStorageForProcessing: "projection",
    uid.DigitalIntraOralXRayImageStorageForPresentation: "projection",
    uid.DigitalIntraOralXRayImageStorageForProcessing: "projection",
    uid.XRayAngiographicImageStorage: "projection",
    uid.XRayRadiofluoroscopicImageStorage: "projection",
    uid.UltrasoundImageStorage: "projection",
}

_REFUSED_CLASSES: tuple[tuple[str, RefusalCode, str], ...] = (
    ("Media Storage Directory", RefusalCode.DICOMDIR, "the table of contents of an exported medium, not an image"),
    ("Secondary Capture", RefusalCode.SECONDARY_CAPTURE, "a screenshot or scan, not an acquired image"),
    ("Segmentation", RefusalCode.SEGMENTATION, "a segmentation of other images, not an image"),
    ("Encapsulated", RefusalCode.DOCUMENT, "a document packed into DICOM, not an image"),
    ("RT ", RefusalCode.RADIOTHERAPY, "a radiotherapy object, not an image"),
    (" SR ", RefusalCode.REPORT, "a report, not an image"),
    ("Key Object", RefusalCode.REPORT, "a list of marked images, not an image"),
    ("Presentation State", RefusalCode.REPORT, "display settings of other images, not an image"),
    ("Multi-frame", RefusalCode.CINE, "a film of many frames; only single images and stacks are used"),
)

_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "AccessionNumber",
    "Modality", "Manufacturer", "ManufacturerModelName", "ImageType", "BurnedInAnnotation", "FrameOfReferenceUID",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "AcquisitionNumber", "EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue",
    "DiffusionGradientOrientation", "InversionTime", "TriggerTime", "NominalPercentageOfCardiacPhase",
    "FrameReferenceTime", "KVP", "ConvolutionKernel", "AcquisitionTime",
]  # fmt: skip

# What tells repeated acquisitions of the same slices apart, from the most to the least deliberate;
# Acquisition Time comes last because it also differs from slice to slice
_REPEATS = (
    "AcquisitionNumber", "EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue",
    "DiffusionGradientOrientation", "InversionTime", "TriggerTime", "NominalPercentageOfCardiacPhase",
    "FrameReferenceTime", "KVP", "ConvolutionKernel", "AcquisitionTime",
)  # fmt: skip


@dataclass(frozen=True)
class Refused:
    """A file that is not used, and why. Stays at the site: the path may name a patient."""

    path: Path = field(repr=False)
    code: RefusalCode
    why: str
    """One sentence for the person who exported the file; without names or identifiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the assembler needs to know of a file before its pixels are read."""

    path: Path = field(repr=False)
    kind: Kind
    sop_class: str
    sop_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    accession: str = field(repr=False)
    modality: str
    manufacturer: str
    model_name: str
    image_type: tuple[str, ...]
    frame_of_reference: str = field(repr=False)
    shape: tuple[int, int]
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    repeats: tuple[str, ...]
    problem: tuple[RefusalCode, str] | None = None
    """Why the pixels cannot be used; the other slices of the series must know that one is lost."""


@dataclass(frozen=True)
class Stack:
    """Slices in order, and where they lie."""

    headers: tuple[Header, ...]
    affine: NDArray[np.float64]
    """4 x 4, (slice, row, column, 1) -> mm, LPS."""


def files_below(folder: Path) -> Iterator[Path | Refused]:
    """Every file below `folder`, sorted by relative path; what cannot be entered is refused, not skipped."""
    found: list[Path | Refused] = []

    def blocked(error: OSError) -> None:
        path = Path(error.filename or folder)
        found.append(Refused(path, RefusalCode.UNREADABLE, "This folder cannot be opened; check its permissions."))

    for where, folders, names in os.walk(folder, onerror=blocked):
        for name in folders:
            path = Path(where, name)
            if path.is_symlink():
                why = "This is a link to a folder; links to folders are not followed."
                found.append(Refused(path, RefusalCode.UNREADABLE, why))
        found.extend(Path(where, name) for name in names)

    def relative(item: Path | Refused) -> tuple[str, ...]:
        return (item.path if isinstance(item, Refused) else item).relative_to(folder).parts

    yield from sorted(found, key=relative)


def scan(path: Path) -> Header | Refused:
    """Reads one file's header; never raises for what is in the file."""
    try:
        with quiet():
            return _scan(path)
    except Refusal as refusal:
        return Refused(path, refusal.code, refusal.why)
    except Exception as error:  # whatever a hostile header makes the parser raise
        # without a number it is pydicom's own; EINVAL: the header made it seek before the start
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            return Refused(path, RefusalCode.UNREADABLE, "The file cannot be read; check its permissions and the disk.")
        return Refused(path, RefusalCode.CORRUPT, "The DICOM header is damaged and cannot be read.")


def _scan(path: Path) -> Header:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise Refusal(RefusalCode.UNREADABLE, "This is a device or a pipe, not a file.")
    with path.open("rb") as file:
        if not _is_dicom(file, status.st_size):
            raise Refusal(RefusalCode.NOT_DICOM, "This is not a DICOM file.")
        _check_inflated_size(file)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
        left = status.st_size - file.tell()
    sop_class = uid.UID(_text(dataset, "SOPClassUID") or str(dataset.file_meta.get("MediaStorageSOPClassUID", "")))
    kind = _kind(sop_class, dataset)
    problem = None
    try:
        check_declared_size(dataset, left, deflated=_syntax(dataset) == uid.DeflatedExplicitVRLittleEndian)
    except Refusal as refusal:
        problem = refusal.code, refusal.why
    header = Header(
        path=path,
        kind=kind,
        sop_class=sop_class,
        sop_uid=_text(dataset, "SOPInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        patient_id=_text(dataset, "PatientID"),
        accession=_text(dataset, "AccessionNumber"),
        modality=_text(dataset, "Modality"),
        manufacturer=_text(dataset, "Manufacturer"),
        model_name=_text(dataset, "ManufacturerModelName"),
        image_type=_image_type(dataset),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        shape=(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
        position_mm=numbers(dataset, "ImagePositionPatient"),
        orientation=numbers(dataset, "ImageOrientationPatient"),
        spacing_mm=numbers(dataset, "PixelSpacing"),
        repeats=tuple(_text(dataset, keyword) for keyword in _REPEATS),
        problem=problem,
    )
    if not (header.sop_uid and header.series_uid and header.study_uid):
        raise Refusal(
            RefusalCode.MISSING_HEADER,
            "The study, series or image has no identifier (UID), so it cannot be told which images belong together.",
        )
    return header


def _kind(sop_class: uid.UID, dataset: Dataset) -> Kind:
    """Images that are used; everything else is refused by its name."""
    if not sop_class:
        why = "The header does not say what kind of object this is (SOP Class), so it is not used."
        raise Refusal(RefusalCode.MISSING_HEADER, why)
    kind = _KINDS.get(sop_class)
    if kind is None:
        for part, code, what in _REFUSED_CLASSES:
            if part in sop_class.name:
                raise Refusal(code, f"{sop_class.name}: {what}.")
        known = sop_class.name if sop_class.name != sop_class else "An object of an unknown kind"
        raise Refusal(RefusalCode.UNSUPPORTED_CLASS, f"{known}: this kind of object is not used.")
    image_type = _image_type(dataset)
    if "LOCALIZER" in image_type or "SCOUT" in image_type:
        raise Refusal(RefusalCode.LOCALIZER, "This is a localizer (scout) image, made for planning only.")
    if "MOSAIC" in image_type:
        raise Refusal(
            RefusalCode.MOSAIC,
            "This is a Siemens mosaic: many slices tiled into one picture, without the position of each slice.",
        )
    if "SCREEN SAVE" in image_type:
        raise Refusal(RefusalCode.SECONDARY_CAPTURE, "This is a picture of the scanner's screen, not an image.")
    if _text(dataset, "BurnedInAnnotation").upper() == "YES":
        raise Refusal(
            RefusalCode.BURNED_IN_TEXT,
            "The header says that text is burned into the image; it may name the patient and mislead the model.",
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    if kind != "multiframe" and frames != 1:
        raise Refusal(RefusalCode.CINE, f"A film of {frames} frames; only single images and stacks are used.")
    return kind


def stacks(series: Sequence[Header]) -> Iterator[Stack | tuple[Header, RefusalCode, str]]:
    """Divides the single-frame slices of one Series Instance UID into stacks.

    Slices differ first by what can never be stacked (frame of reference, image type, size, orientation), then,
    only if the positions alone do not make one stack, by what tells repeats apart (acquisition, echo, time,
    b-value ...). Instance Number is not used: it may restart or run backwards.

    Yields:
        A stack, or a slice with the code and sentence of its refusal; each slice exactly once.

    Source: DICOM PS3.3 C.7.6.2.1.1.
    """
    for group in _alike(series):
        try:
            with quiet():
                divided = _divide(group)
        except Refusal as refusal:
            for header in group:
                yield header, refusal.code, refusal.why
        except Exception:  # numbers that no scanner writes
            for header in group:
                yield header, RefusalCode.MISSING_GEOMETRY, "The positions of the slices make no sense."
        else:
            yield from divided


def _alike(series: Sequence[Header]) -> Iterator[list[Header]]:
    groups: dict[tuple[object, ...], list[tuple[NDArray[np.float64], list[Header]]]] = {}
    for header in series:
        key = (header.sop_class, header.frame_of_reference, header.image_type, header.shape)
        clusters = groups.setdefault(key, [])
        known = len(header.orientation) == 6 and np.isfinite(header.orientation).all()
        axes = np.array(header.orientation if known else np.zeros(6)).reshape(2, 3)
        for reference, members in clusters:  # not rounded: jitter must not straddle a rounding border
            same = np.sum(axes * reference, axis=1) >= 1 - ORIENTATION_TOL
            if same.all() or not (axes.any() or reference.any()):
                members.append(header)
                break
        else:
            clusters.append((axes, [header]))
    for clusters in groups.values():
        for _, members in clusters:
            yield members


def _divide(group: list[Header]) -> list[Stack]:
    try:
        return [_stack(group)]
    except Refusal as refusal:
        # a gap stays a gap: two interleaved passes, one slice lost, could pass as two half as dense volumes
        if refusal.code in (RefusalCode.MISSING_GEOMETRY, RefusalCode.SINGLE_SLICE, RefusalCode.GAP):
            raise
        whole = refusal
    everything = tuple(range(len(_REPEATS) - 1))
    for chosen in [*((index,) for index in range(len(_REPEATS))), everything]:
        parts: dict[tuple[str, ...], list[Header]] = {}
        for header in group:
            parts.setdefault(tuple(header.repeats[index] for index in chosen), []).append(header)
        if len(parts) == 1:
            continue
        try:
            divided = [_stack(part) for part in parts.values()]
        except Refusal:
            continue
        if _repeated(divided):
            return divided
    raise whole


def _repeated(divided: Sequence[Stack]) -> bool:
    """Stacks that cover the same part of the patient; pieces one behind the other may hide a lost slice between."""
    normal = np.cross(divided[0].affine[:3, 2], divided[0].affine[:3, 1])
    first = [float(stack.affine[:3, 3] @ normal) for stack in divided]
    last = [
        a + (len(stack.headers) - 1) * float(stack.affine[:3, 0] @ normal)
        for a, stack in zip(first, divided, strict=True)
    ]
    return max(first) < min(last)


def _stack(group: Sequence[Header]) -> Stack:
    """Orders slices by position and proves that they fill a regular grid.

    Raises:
        Refusal: They do not; the code says whether slices are single, doubled, missing, sheared or uneven.
    """
    rows, columns = _axes(group)
    if len(group) == 1:
        raise Refusal(
            RefusalCode.SINGLE_SLICE,
            "A single cross-sectional slice: part of an incomplete transfer or a monitoring image, not a volume.",
        )
    position_N3 = np.array([header.position_mm for header in group], dtype=np.float64)
    spacing_N2 = np.array([header.spacing_mm for header in group], dtype=np.float64)
    if not np.allclose(spacing_N2, spacing_N2[0], rtol=1e-3, atol=0):
        raise Refusal(RefusalCode.MIXED_SPACING, "The slices of this series have different pixel spacings.")
    normal = np.cross(columns, rows)
    order = np.argsort(position_N3 @ normal, kind="stable")
    step_mm = np.diff(position_N3[order] @ normal)
    if (step_mm < MIN_SPACING_MM).any():
        doubled = int((step_mm < MIN_SPACING_MM).sum())
        raise Refusal(
            RefusalCode.DUPLICATE,
            f"{doubled} of {len(group)} slices share their place with another one, and the header does not say why.",
        )
    distance_mm, index = get_volume_positions(
        image_positions=position_N3.tolist(),
        image_orientation=[*columns, *rows],
        rtol=SPACING_RTOL,
        index_convention="RD",
    )
    if distance_mm is None or index is None:
        raise _irregular(position_N3[order], step_mm, normal)
    first, last = position_N3[order[0]], position_N3[order[-1]]
    step = (last - first) / (len(group) - 1)
    expected_N3 = first + np.arange(len(group))[:, None] * step
    if np.linalg.norm(position_N3[order] - expected_N3, axis=1).max() > MAX_DRIFT * np.linalg.norm(step):
        raise Refusal(RefusalCode.MIXED_SPACING, "The distance between the slices drifts along the series.")
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = rows * spacing_N2[0, 0]
    affine[:3, 2] = columns * spacing_N2[0, 1]
    affine[:3, 3] = first
    return Stack(tuple(group[i] for i in order), affine)


def _axes(group: Sequence[Header]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors of growing row index and of growing column index, LPS."""
    for header in group:
        numbers = np.array([*header.position_mm, *header.orientation, *header.spacing_mm], dtype=np.float64)
        lengths = (len(header.position_mm), len(header.orientation), len(header.spacing_mm))
        if lengths != (3, 6, 2) or not np.isfinite(numbers).all() or min(header.spacing_mm) <= 0:
            raise Refusal(
                RefusalCode.MISSING_GEOMETRY,
                "The position, orientation or pixel spacing of a slice is missing or no number.",
            )
    columns, rows = np.array(group[0].orientation, dtype=np.float64).reshape(2, 3)
    lengths_2 = np.linalg.norm([columns, rows], axis=1)
    if np.abs(lengths_2 - 1).max() > 1e-3 or abs(columns @ rows) > 1e-3:
        raise Refusal(RefusalCode.MISSING_GEOMETRY, "The orientation of the slices is no pair of perpendicular axes.")
    columns = columns / np.linalg.norm(columns)
    rows = rows - (rows @ columns) * columns
    return rows / np.linalg.norm(rows), columns


def _irregular(position_N3: NDArray[np.float64], step_mm: NDArray[np.float64], normal: NDArray[np.float64]) -> Refusal:
    """Names what keeps ordered slices from being a grid."""
    usual_mm = float(np.median(step_mm))
    in_slices = step_mm / usual_mm
    if np.allclose(step_mm, step_mm.mean(), rtol=SPACING_RTOL, atol=0):
        span = position_N3[-1] - position_N3[0]
        cosine = min(1.0, float(span @ normal / np.linalg.norm(span)))
        return Refusal(
            RefusalCode.TILT,
            f"The slices are stacked at {np.degrees(np.arccos(cosine)):.1f} degrees to their normal "
            "(gantry tilt); tilted series are not used.",
        )
    if np.allclose(in_slices, np.round(in_slices), rtol=0, atol=2 * SPACING_RTOL):
        missing = int(np.round(in_slices).sum() - len(in_slices))
        return Refusal(RefusalCode.GAP, f"{missing} slice(s) inside this series are missing; export it again.")
    return Refusal(
        RefusalCode.MIXED_SPACING,
        f"The distance between the slices varies from {step_mm.min():.2f} to {step_mm.max():.2f} mm.",
    )


def _is_dicom(file: BinaryIO, size: int) -> bool:
    """True for the DICM mark, and for content without preamble that starts like a data set (PS3.10 C.7.1)."""
    head = file.read(144)
    file.seek(0)
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16:
        return False
    group, element = head[0:2], int.from_bytes(head[2:4], "little")
    if group == b"\x00\x08":  # explicit VR big endian
        return head[4:6].isalpha() and head[4:6].isupper()
    if group not in (b"\x02\x00", b"\x08\x00") or element > 0x2000:
        return False
    return (head[4:6].isalpha() and head[4:6].isupper()) or int.from_bytes(head[4:8], "little") < min(size, 1024)


def _check_inflated_size(file: BinaryIO) -> None:
    """Refuses a deflated data set that would unpack to gigabytes (pydicom unpacks it in one go)."""
    if uid.DeflatedExplicitVRLittleEndian.encode() in file.read(4096):
        file.seek(0)
        read_preamble(file, force=True)
        read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag.group != 2)
        unpack, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while block := unpack.unconsumed_tail or file.read(2**16):
            total += len(unpack.decompress(block, 2**20))
            if total > MAX_INFLATED_BYTES:
                raise Refusal(RefusalCode.TOO_LARGE, "The compressed file would unpack to more than 256 MiB.")
    file.seek(0)


def _syntax(dataset: Dataset) -> str:
    return str(dataset.file_meta.get("TransferSyntaxUID", ""))


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip().strip("\0")


def _image_type(dataset: Dataset) -> tuple[str, ...]:
    value: Any = dataset.get("ImageType") or ()
    return tuple(part.strip().upper() for part in ([value] if isinstance(value, str) else value))


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """The numbers of a multi-valued element; () if it is absent or a single value."""
    value: Any = dataset.get(keyword)
    if value is None or isinstance(value, str):
        return ()
    return tuple(float(number) for number in value)
