"""What a file says about itself before its pixels are read, in bounded time and memory whatever it says.

This process lets the parser read so little of a file that no content can cost more than a moment. What
needs more, the header of a large multi-frame file or an attack, is read by the same code in the worker.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.tag import BaseTag, Tag

from common.imaging import worker
from common.imaging.layout import FLOAT_PIXEL_DATA, LAYOUT_TAGS, PIXEL_DATA, UNDEFINED, Element, Layout, layout_of
from common.imaging.refusal import Refusal, RefusalCode, Refused, quiet

_VALUE_BYTES, _HEADER_BYTES, _READS = 2**18, 2**20, 2**14
"""What this process reads of one value (a lookup table has 128 KiB), of one header, and in how many pieces: the worst
content that passes takes pydicom less than a second and 50 MiB."""
_OF_FRAMES = 0x52009229
"""From here on a header is about frames (functional groups), of which there may be thousands."""
_LONG_HEADER_BYTES = 2**26
"""What a deflated header may unpack to in the worker."""

PHYSICAL = ("CT", "PT")
"""Modalities whose values have a unit: without a rescale they are not known."""

Kind = Literal["slice", "multiframe", "projection"]

KINDS: dict[str, Kind] = {
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
    uid.NuclearMedicineImageStorage: "projection",  # or "multiframe", where it is a reconstruction
}

CONVERTED = (
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
)
"""Files that somebody made of a series of slices, of which some may have been lost before."""

_MODALITIES: dict[str, str] = {
    sop_class: modality
    for modality, classes in {
        "CT": (uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage),
        "MR": (uid.MRImageStorage, uid.EnhancedMRImageStorage, uid.LegacyConvertedEnhancedMRImageStorage),
        "PT": (
            uid.PositronEmissionTomographyImageStorage,
            uid.EnhancedPETImageStorage,
            uid.LegacyConvertedEnhancedPETImageStorage,
        ),
    }.items()
    for sop_class in classes
}
"""The one modality that the standard allows a SOP class."""

_NO_HOUNSFIELD = ("OD", "HU_MOD", "MGML", "PCT", "Z_EFF", "ED", "EDW")
"""Terms that the standard defines for Rescale Type; other words may say anything and are not repeated."""

_REFUSED_CLASSES: tuple[tuple[str, RefusalCode, str], ...] = (
    ("Media Storage Directory", RefusalCode.DICOMDIR, "the table of contents of an exported medium, not an image"),
    ("Secondary Capture", RefusalCode.SECONDARY_CAPTURE, "a screenshot or scan, not an acquired image"),
    ("Segmentation", RefusalCode.SEGMENTATION, "a segmentation of other images, not an image"),
    ("Encapsulated", RefusalCode.DOCUMENT, "a document packed into DICOM, not an image"),
    ("Waveform", RefusalCode.DOCUMENT, "a curve over time, such as an ECG, not an image"),
    ("RT ", RefusalCode.RADIOTHERAPY, "a radiotherapy object, not an image"),
    (" SR ", RefusalCode.REPORT, "a report, not an image"),
    ("Key Object", RefusalCode.REPORT, "a list of marked images, not an image"),
    ("Presentation State", RefusalCode.REPORT, "display settings of other images, not an image"),
    ("Multi-frame", RefusalCode.CINE, "a film of many frames; only single images and stacks are used"),
)

REPEATS = (
    "AcquisitionNumber", "EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "TemporalPositionIndex",
    "DiffusionBValue", "DiffusionGradientOrientation", "InversionTime", "TriggerTime",
    "NominalPercentageOfCardiacPhase", "FrameReferenceTime", "KVP", "ConvolutionKernel", "SequenceName",
    0x0019100C, 0x00431039, 0x20011003,  # the b-value of older Siemens, GE and Philips scanners
    "AcquisitionTime",
)  # fmt: skip
"""What tells repeated acquisitions of the same slices apart, from the most to the least deliberate;
Acquisition Time comes last because it also differs from slice to slice."""

TAGS: tuple[int, ...] = tuple(
    tag if isinstance(tag, int) else int(Tag(tag))
    for tag in (
        "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "IssuerOfPatientID",
        "AccessionNumber",
        "Modality", "Manufacturer", "ManufacturerModelName", "ImageType", "BurnedInAnnotation", "FrameOfReferenceUID",
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing",
        "NominalScannedPixelSpacing", "SliceThickness", "SpacingBetweenSlices", "Units", "RescaleType",
        "ModalityLUTSequence",
        "ConcatenationUID", "InConcatenationTotalNumber", *LAYOUT_TAGS, *REPEATS,
    )
)  # fmt: skip
"""Everything that `scan` looks at."""


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
    issuer: str = field(repr=False)
    """Who gave the Patient ID (0010,0021); mostly empty."""
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
    """(row, column); of a projection the first of Pixel Spacing, Imager Pixel Spacing and that of a scanned film."""
    repeats: tuple[str, ...]
    """In the order of `REPEATS`."""
    thickness_mm: float = 0.0
    """Slice Thickness; 0: unknown."""
    between_mm: float = 0.0
    """Spacing Between Slices; 0: unknown."""
    units: str = ""
    """Units of PET; of CT HU, or US (unspecified); of MONOCHROME1 slices that are inverted also in which range."""
    problem: tuple[RefusalCode, str] | None = None
    """Why the pixels cannot be used; the other slices of the series must know that one is lost."""


def scan(path: Path) -> Header | Refused:
    """Reads one file's header; never raises for what is in the file."""
    return scan_layout(path)[0]


def scan_layout(path: Path) -> tuple[Header | Refused, Layout | None]:
    """As `scan`, and how the pixels are stored; None where they cannot be used, or the worker read the header."""
    try:
        with quiet():
            return _scan(path)
    except Overrun:
        return _scan_in_worker(path), None
    except Refusal as refusal:
        return Refused(path, refusal.code, refusal.why), None
    except Exception as error:  # whatever a hostile header makes the parser raise
        # without a number it is pydicom's own; EINVAL: the header made it seek before the start
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            why = "The file cannot be read; check its permissions and the disk."
            return Refused(path, RefusalCode.UNREADABLE, why), None
        return Refused(path, RefusalCode.CORRUPT, "The DICOM header is damaged and cannot be read."), None


def _scan_in_worker(path: Path) -> Header | Refused:
    try:
        ((head, _),) = worker.ask("scan", limits_of(path), path=os.fspath(path))
    except Refusal as refusal:
        return Refused(path, refusal.code, refusal.why)
    except (OSError, ValueError):
        return Refused(path, RefusalCode.CORRUPT, "The DICOM header is damaged and cannot be read.")
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in head.items()}
    if plain["problem"] is not None:
        plain["problem"] = RefusalCode(plain["problem"][0]), plain["problem"][1]
    return Header(path=path, **plain)


def limits_of(path: Path) -> worker.Limits:
    """What reading the whole header may cost in the worker; never raises for what is in the file."""
    try:
        with quiet():
            dataset, _ = read_header(path, tags_of("NumberOfFrames"), frames=False)
            frames = max(0, int(dataset.get("NumberOfFrames") or 0))
    except Exception:  # the worker will say what is wrong with it
        frames = 0
    return worker.Limits.header(path.stat().st_size, frames)


def scan_job(path: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """In the worker: `scan` without a bound of its own."""
    with quiet():
        header, _ = _scan(Path(path), bounded=False)
    yield {each.name: getattr(header, each.name) for each in fields(header) if each.name != "path"}, b""


def _scan(path: Path, *, bounded: bool = True) -> tuple[Header, Layout | None]:
    dataset, element = read_header(path, TAGS, bounded=bounded)
    sop_class = _sop_class(dataset)
    kind = _kind(sop_class, dataset)
    modality = modality_of(dataset)
    units, layout, problem = "", None, None
    try:
        units = unit_of(dataset, modality)
        layout = layout_of(dataset, element)
        if kind == "slice" and layout.photometric == "MONOCHROME1" and modality not in PHYSICAL:
            units += f" from {layout.stored_range} upside down"  # turned about other ends they are no stack
    except Refusal as refusal:
        problem = refusal.code, refusal.why
    header = Header(
        path=path,
        kind=kind,
        sop_class=sop_class,
        sop_uid=text(dataset, "SOPInstanceUID"),
        series_uid=text(dataset, "SeriesInstanceUID"),
        study_uid=text(dataset, "StudyInstanceUID"),
        patient_id=identifier(dataset, "PatientID"),
        issuer=text(dataset, "IssuerOfPatientID"),
        accession=identifier(dataset, "AccessionNumber"),
        modality=modality,
        manufacturer=text(dataset, "Manufacturer"),
        model_name=text(dataset, "ManufacturerModelName"),
        image_type=_image_type(dataset),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
        shape=(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)),
        position_mm=numbers(dataset, "ImagePositionPatient"),
        orientation=numbers(dataset, "ImageOrientationPatient"),
        spacing_mm=_projection_spacing(dataset) if kind == "projection" else numbers(dataset, "PixelSpacing"),
        repeats=repeats_of(dataset),
        thickness_mm=length_mm(dataset, "SliceThickness"),
        between_mm=length_mm(dataset, "SpacingBetweenSlices"),
        units=units,
        problem=problem,
    )
    if not (header.sop_uid and header.series_uid and header.study_uid):
        raise Refusal(
            RefusalCode.MISSING_HEADER,
            "The study, series or image has no identifier (UID), so it cannot be told which images belong together.",
        )
    return header, layout


def _sop_class(dataset: Dataset) -> uid.UID:
    return uid.UID(text(dataset, "SOPClassUID") or str(dataset.file_meta.get("MediaStorageSOPClassUID", "")))


def modality_of(dataset: Dataset) -> str:
    """Modality (0008,0060); where it is missing or OT, which says nothing, that of the SOP class.

    Source: DICOM PS3.3 C.7.3.1.1.1, C.8.2.1 and C.8.3.1 (the classes ask for CT and MR), A.21 (for PT).
    """
    stated = text(dataset, "Modality")
    return stated if stated not in ("", "OT") else _MODALITIES.get(_sop_class(dataset), stated)


def repeats_of(dataset: Dataset) -> tuple[str, ...]:
    """What the header of a slice says of each of `REPEATS`."""
    return tuple(text(dataset, name) if isinstance(name, str) else raw(dataset, name) for name in REPEATS)


def has_frames(dataset: Dataset) -> bool:
    """Whether spacing, exposure and the like stand with the frames (PS3.3 C.7.6.16), and not for themselves."""
    return KINDS.get(_sop_class(dataset)) == "multiframe"


def unit_of(dataset: Dataset, modality: str) -> str:
    """What the values are in the end: Units of PET; Rescale Type of CT, which are Hounsfield units unless said.

    Where a table takes the place of the rescale, its Modality LUT Type tells. Unspecified (US) passes: scanners write
    it on plain CT, and derived images carry it.

    Raises:
        Refusal: A CT of something else: a map of iodine in mg/ml, of an atomic number or an electron density.

    Source: DICOM PS3.3 C.8.2.1 (required where it is not HU), C.11.1.1.2.
    """
    if modality != "CT":
        return text(dataset, "Units")
    table = dataset.get("ModalityLUTSequence")
    stated = (text(table[0], "ModalityLUTType") or "US" if table else text(dataset, "RescaleType") or "HU").upper()
    if stated not in ("HU", "US"):
        known = f" but {stated}" if stated in _NO_HOUNSFIELD else ""
        where = "Modality LUT Type" if table else "Rescale Type"
        why = f"The values of this CT are no Hounsfield units{known} ({where}); send the images it was made from."
        raise Refusal(RefusalCode.OTHER_UNITS, why)
    return stated


def _kind(sop_class: uid.UID, dataset: Dataset) -> Kind:
    """Images that are used; everything else is refused by its name."""
    if not sop_class:
        why = "The header does not say what kind of object this is (SOP Class), so it is not used."
        raise Refusal(RefusalCode.MISSING_HEADER, why)
    kind = KINDS.get(sop_class)
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
    if text(dataset, "BurnedInAnnotation").upper() == "YES":
        raise Refusal(
            RefusalCode.BURNED_IN_TEXT,
            "The header says that text is burned into the image; it may name the patient and mislead the model.",
        )
    pieces = int(dataset.get("InConcatenationTotalNumber") or 0)
    if pieces > 1 or (text(dataset, "ConcatenationUID") and pieces != 1):
        raise Refusal(
            RefusalCode.PART_OF_A_FILE, "The sender cut a multi-frame file into pieces (concatenation); send it whole."
        )
    if sop_class == uid.NuclearMedicineImageStorage and image_type[2:3] == ("RECON TOMO",):
        return "multiframe"
    frames = int(dataset.get("NumberOfFrames") or 1)
    if kind != "multiframe" and frames != 1:
        raise Refusal(RefusalCode.CINE, f"A film of {frames} frames; only single images and stacks are used.")
    return kind


# --- the parser, on a short leash


class Overrun(Exception):  # noqa: N818
    """The header is longer than this process reads."""


class _Leash:
    """A file of which only so much can be read, and never more than there is whatever length is declared."""

    def __init__(self, file: BinaryIO, size: int, *, bounded: bool) -> None:
        self._file, self._size, self._bounded = file, size, bounded
        self._at = self._read = self._reads = 0
        self._overrun = False

    def __enter__(self) -> None:
        """Around the parsing: the parser may swallow `Overrun`, or turn it into an error of its own."""

    def __exit__(self, *_: object) -> None:
        if self._overrun:
            raise Overrun from None

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if count < 0 else min(count, left)
        self._reads += 1
        self._read += count
        if self._bounded and (count > _VALUE_BYTES or self._read > _HEADER_BYTES or self._reads > _READS):
            self._overrun = True
            raise Overrun
        found = self._file.read(count)
        self._at += len(found)
        return found

    def seek(self, to: int, whence: int = 0) -> int:
        self._at = self._file.seek(to, whence)
        return self._at

    def tell(self) -> int:
        return self._at


class _Stop:
    """Ends the parsing at the pixels, and keeps where they are."""

    def __init__(self, file: _Leash, size: int, *, deflated: bool = False, frames: bool = True) -> None:
        self._file, self._size, self._deflated, self._frames = file, size, deflated, frames
        self.element: Element | None = None

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag < 0x7FE00000:
            return not self._frames and tag >= _OF_FRAMES
        if tag == PIXEL_DATA or tag in FLOAT_PIXEL_DATA:
            start = self._file.tell()
            left = self._size if self._deflated else max(0, self._size - start)
            self.element = Element(start, length, left, vr not in ("OB", "UN"), floating=tag != PIXEL_DATA)
        return self.element is not None


def read_header(
    path: Path, tags: Collection[int] | None, *, bounded: bool = True, frames: bool = True
) -> tuple[Dataset, Element | None]:
    """The elements before the pixels, and where those are.

    Args:
        tags: Elements to keep; None keeps all.
        bounded: Read no more than is safe in this process.
        frames: False: read what stands before the functional groups alone, and not where the pixels are.

    Raises:
        Refusal: No file, or no DICOM.
        Overrun: More would have to be read.
        Exception: Whatever a damaged header makes the parser raise.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise Refusal(RefusalCode.UNREADABLE, "This is a device or a pipe, not a file.")
    wanted = cast("list[BaseTag | int] | None", None if tags is None else list(tags))
    with path.open("rb") as file:
        if not _is_dicom(file, status.st_size):
            raise Refusal(RefusalCode.NOT_DICOM, "This is not a DICOM file.")
        meta = inflatable_meta(file) if uid.DeflatedExplicitVRLittleEndian.encode() in file.read(4096) else None
        if meta is not None:
            return _read_deflated(file, status.st_size, meta, wanted, bounded=bounded, frames=frames)
        file.seek(0)
        leash = _Leash(file, status.st_size, bounded=bounded)
        stop = _Stop(leash, status.st_size, frames=frames)
        with leash:
            dataset = read_partial(cast("BinaryIO", leash), stop, force=True, specific_tags=wanted)
        if dataset.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
            # the parser unpacked it behind our back, and places are no longer those of the file
            raise Refusal(RefusalCode.CORRUPT, "The file meta information is longer than it may be.")
        return dataset, _with_next(file, stop.element, big_endian=dataset.original_encoding[1] is False)


def _with_next(file: BinaryIO, element: Element | None, *, big_endian: bool) -> Element | None:
    """The pixels, and what comes behind them."""
    if element is None or element.length == UNDEFINED or element.length >= element.left:
        return element
    file.seek(element.start + element.length)
    tag = file.read(4)
    order: Literal["big", "little"] = "big" if big_endian else "little"
    return replace(element, after=int.from_bytes(tag[:2], order) << 16 | int.from_bytes(tag[2:], order))


def _read_deflated(
    file: BinaryIO, size: int, meta: FileMetaDataset, wanted: list[BaseTag | int] | None, *, bounded: bool, frames: bool
) -> tuple[Dataset, Element | None]:
    """As `read_header`. pydicom itself would unpack all of the file, however much that is."""
    most = _HEADER_BYTES if bounded else _LONG_HEADER_BYTES
    unpacked = b"".join(inflate(file, most))
    leash = _Leash(io.BytesIO(unpacked), len(unpacked), bounded=bounded)
    stop = _Stop(leash, size, deflated=True, frames=frames)
    with leash:
        dataset = read_dataset(
            cast("BinaryIO", leash), is_implicit_VR=False, is_little_endian=True, stop_when=stop, specific_tags=wanted
        )
    if stop.element is None and len(unpacked) == most:
        if bounded:
            raise Overrun
        raise Refusal(RefusalCode.TOO_LARGE, "The compressed header would unpack to more than 64 MiB.")
    dataset.file_meta = meta
    return dataset, stop.element


def inflatable_meta(file: BinaryIO) -> FileMetaDataset | None:
    """File meta of a deflated file, which is left where the compressed part begins; None for other files."""
    file.seek(0)
    read_preamble(file, force=True)
    leash = _Leash(file, 2**16, bounded=False)
    leash.seek(file.tell())
    meta = read_dataset(
        cast("BinaryIO", leash), is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag.group != 2
    )
    if str(meta.get("TransferSyntaxUID", "")) != uid.DeflatedExplicitVRLittleEndian:
        return None
    return FileMetaDataset(meta)


def inflate(file: BinaryIO, most: int) -> Iterator[bytes]:
    """What the rest of the file unpacks to, up to `most` bytes, in blocks of at most 1 MiB."""
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    while most > 0 and not unpack.eof:
        block = unpack.unconsumed_tail or file.read(2**16)
        part = unpack.decompress(block, min(most, 2**20))
        if not block and not part:
            return
        most -= len(part)
        if part:
            yield part


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


# --- values


def text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip().strip("\0")


def identifier(dataset: Dataset, keyword: str) -> str:
    """As `text`; empty where a character is not of the Specific Character Set, for two of them would look alike."""
    found = text(dataset, keyword).replace("\x1b$)A", "")  # ISO 2022 IR 58, whose escape pydicom 3.0 leaves there
    return "" if "\N{REPLACEMENT CHARACTER}" in found else found


def raw(dataset: Dataset, tag: int) -> str:
    """A private element as it lies in the file: enough to tell two of them apart."""
    if tag not in dataset:
        return ""
    value = dataset.get_item(tag).value
    return value.hex() if isinstance(value, bytes) else str(value)


def _image_type(dataset: Dataset) -> tuple[str, ...]:
    value: Any = dataset.get("ImageType") or ()
    return tuple(part.strip().upper() for part in ([value] if isinstance(value, str) else value))


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """The numbers of a multi-valued element; () if it is absent or a single value."""
    value: Any = dataset.get(keyword)
    if value is None or isinstance(value, (str, float, int)):
        return ()
    return tuple(float(number) for number in value)


def length_mm(dataset: Dataset, keyword: str) -> float:
    """A single length; 0 if it is absent or no number."""
    try:
        value = float(dataset.get(keyword) or 0)
    except (TypeError, ValueError):
        return 0.0
    return abs(value) if np.isfinite(value) else 0.0


def _projection_spacing(dataset: Dataset) -> tuple[float, ...]:
    """Pixel Spacing, else Imager Pixel Spacing, else that of a scanned film (PS3.3 10.7.1.3); () if unknown."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = numbers(dataset, keyword)
        if len(value) == 2 and np.isfinite(value).all() and min(value) > 0:
            return value
    return ()


def tags_of(*keywords: str) -> tuple[int, ...]:
    """Numbers of the elements."""
    found = (tag_for_keyword(keyword) for keyword in keywords)
    return tuple(tag for tag in found if tag is not None)
