"""What a PACS sends, at the border of this room: questions as DICOM, answers as text, a received file examined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from common.imaging.header import Overrun, identifier, read_header, text
from common.imaging.layout import COMPRESSED, UNCOMPRESSED, UNDEFINED, Element, layout_of, native_syntax
from common.imaging.refusal import Refusal, RefusalCode, quiet

SYNTAXES: tuple[str, ...] = tuple(str(each) for each in (*COMPRESSED, *UNCOMPRESSED) if each != uid.ExplicitVRBigEndian)
"""Transfer syntaxes that are taken as they are; big endian is retired, and a PACS sends it as little endian."""

_RADIOGRAPHS = (
    uid.ComputedRadiographyImageStorage, uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
)  # fmt: skip
_FLUOROSCOPY = uid.XRayAngiographicImageStorage, uid.XRayRadiofluoroscopicImageStorage
_CLASSES: dict[str, tuple[str, ...]] = {
    "CT": (uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage),
    "MR": (uid.MRImageStorage, uid.EnhancedMRImageStorage, uid.LegacyConvertedEnhancedMRImageStorage),
    "PT": (
        uid.PositronEmissionTomographyImageStorage, uid.EnhancedPETImageStorage,
        uid.LegacyConvertedEnhancedPETImageStorage,
    ),
    "NM": (uid.NuclearMedicineImageStorage,),
    "CR": _RADIOGRAPHS,
    "DX": _RADIOGRAPHS,
    "MG": (
        uid.DigitalMammographyXRayImageStorageForPresentation, uid.DigitalMammographyXRayImageStorageForProcessing,
        uid.BreastTomosynthesisImageStorage, *_RADIOGRAPHS,
    ),
    "IO": (uid.DigitalIntraOralXRayImageStorageForPresentation, uid.DigitalIntraOralXRayImageStorageForProcessing),
    "XA": _FLUOROSCOPY,
    "RF": _FLUOROSCOPY,
    "US": (uid.UltrasoundImageStorage, uid.UltrasoundMultiFrameImageStorage),
}  # fmt: skip
"""Modality of a series -> what may be in it; a test holds that all that is read is here."""

_CUT = "The file is cut off; transfer it again."


@dataclass(frozen=True, kw_only=True)
class Received:
    """A whole DICOM file, and whose it is."""

    sop_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    accession: str = field(repr=False)
    syntax: str


def examine(path: Path) -> Received:
    """Checks that a file is DICOM and holds all the bytes that its header declares; nothing is decoded.

    Raises:
        Refusal: It is not, or does not.
    """
    try:
        with quiet():
            try:
                dataset, element = read_header(path, None)
            except Overrun:  # a long header: the file is no longer than what was received, and so is its cost
                dataset, element = read_header(path, None, bounded=False)
            if element is not None:
                _check_pixels(path, dataset, element)
            else:
                _check_end(path, dataset)
            return Received(
                sop_uid=text(dataset, "SOPInstanceUID"),
                series_uid=text(dataset, "SeriesInstanceUID"),
                study_uid=text(dataset, "StudyInstanceUID"),
                patient_id=identifier(dataset, "PatientID"),
                accession=identifier(dataset, "AccessionNumber"),
                syntax=native_syntax(dataset),
            )
    except Refusal:
        raise
    except (Exception, RecursionError):  # the parser fails in many ways, and its words may quote the header
        raise Refusal(RefusalCode.CORRUPT, "The header is damaged; transfer it again.") from None


def _check_pixels(path: Path, dataset: Dataset, element: Element) -> None:
    try:
        layout_of(dataset, element)
    except Refusal as refusal:
        # what cannot be trained on may still be pulled; what is cut off may not
        if refusal.code in (RefusalCode.TRUNCATED, RefusalCode.CORRUPT, RefusalCode.MISSING_PIXELS):
            raise
    if element.length == UNDEFINED:
        with path.open("rb") as file:
            _check_fragments(file, element.start)
    elif element.length > element.left and native_syntax(dataset) != uid.DeflatedExplicitVRLittleEndian:
        raise Refusal(RefusalCode.TRUNCATED, _CUT)


def _check_end(path: Path, dataset: Dataset) -> None:
    """Of a file without pixels: an image has some, and the last element ends where the file does."""
    sop_class = text(dataset, "SOPClassUID") or str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if "Image Storage" in uid.UID(sop_class).name:
        raise Refusal(RefusalCode.TRUNCATED, _CUT)
    last: object = dataset.get_item(max(dataset.keys())) if len(dataset) else None
    deflated = native_syntax(dataset) == uid.DeflatedExplicitVRLittleEndian
    if isinstance(last, RawDataElement) and not deflated and last.value_tell + last.length != path.stat().st_size:
        raise Refusal(RefusalCode.TRUNCATED, _CUT)


def _check_fragments(file: BinaryIO, start: int) -> None:
    """Compressed pixels end with a delimiter (PS3.5 A.4)."""
    file.seek(start)
    while len(item := file.read(8)) == 8:
        if item[:4] == b"\xfe\xff\xdd\xe0":
            return
        if item[:4] != b"\xfe\xff\x00\xe0":
            raise Refusal(RefusalCode.CORRUPT, "The compressed pixels are not divided as DICOM wants it.")
        file.seek(int.from_bytes(item[4:], "little"), 1)
    raise Refusal(RefusalCode.TRUNCATED, _CUT)


def question(level: str, keys: Mapping[str, str | Iterable[str]]) -> Dataset:
    """The identifier of a C-FIND or C-GET; an empty key asks for the value (PS3.4 C.4)."""
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value if isinstance(value, str) else list(value))
    return asked


def answered(found: Dataset) -> dict[str, list[str]]:
    """Keyword -> values, as text; sequences and what cannot be read are left out."""
    plain: dict[str, list[str]] = {}
    with quiet():
        for tag in found.keys():  # noqa: SIM118  iterating the dataset itself would parse every value
            try:
                element = found[tag]
                value: Any = element.value
                if element.keyword and element.VR != "SQ":
                    values = value if isinstance(value, MultiValue | list) else [value]
                    plain[element.keyword] = [str(each).strip("\0 ") for each in values if each not in (None, "")]
            except Exception:  # noqa: S112  one bad value of a stranger's answer
                continue
    return plain


def image_classes(modality: str) -> tuple[str, ...]:
    """SOP classes that a series may hold, where a PACS does not say what each object is.

    Those that are read, and of the others what machines put into the same series: it is used only when all of it is
    here. A modality that does not tell the class (OT, or none) may be any of them.
    """
    found = _CLASSES.get(modality) or tuple(dict.fromkeys(each for classes in _CLASSES.values() for each in classes))
    return (*map(str, found), str(uid.SecondaryCaptureImageStorage))


def is_storage_class(text_: str) -> bool:
    """Whether this is the UID of a storage SOP class of the standard."""
    return "Storage" in uid.UID(text_).name
