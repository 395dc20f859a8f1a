"""A copy of an image without what tells who it is of: DICOM PS3.15 Annex E, Basic Application Level Confidentiality
Profile, and stricter.

The copy is built anew, not cleaned: what table E.1-1 (`confidentiality.py`) says is done, and of everything that the
table does not name only what `allowed.py` lists is taken over. Pixels are decoded and stored plainly, so that no
comment inside a compressed image survives. Then the bytes are read again and searched for what was removed.

Pixels are not cleaned: an image that may show text is refused. Faces in head images stay recognisable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydicom import dcmread, uid
from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence

from common.imaging.allowed import (
    APART,
    CHARACTERISTICS,
    CODED,
    CODES,
    DATES,
    EMPTIED,
    EMPTIED_IN_GROUPS,
    EMPTIED_IN_NUCLEAR,
    FILLED_IN_ENHANCED,
    FILLED_IN_PET,
    IMAGE_TYPES,
    NUMBER_GROUPS,
    NUMBERS,
    SEQUENCES,
    TABLES,
    TEXTS,
    is_meaning,
    is_word,
    meaning,
)
from common.imaging.confidentiality import EDITION, action
from common.imaging.header import REPEATS, Overrun, identifier, raw, read_header, text
from common.imaging.layout import Layout, layout_of
from common.imaging.pixels import stored_frames
from common.imaging.refusal import Refusal, RefusalCode, quiet
from common.pseudonyms import pseudonym

IMPLEMENTATION = "2.25.206137814904953617482516089731543062842"
_VERSION = "FEDICOM"
_CLASSES: dict[str, bool] = {
    uid.CTImageStorage: False,
    uid.EnhancedCTImageStorage: False,
    uid.MRImageStorage: False,
    uid.EnhancedMRImageStorage: False,
    uid.PositronEmissionTomographyImageStorage: False,
    uid.EnhancedPETImageStorage: False,
    uid.NuclearMedicineImageStorage: False,
    uid.ComputedRadiographyImageStorage: False,
    uid.DigitalXRayImageStorageForPresentation: False,
    uid.DigitalXRayImageStorageForProcessing: False,
    uid.DigitalMammographyXRayImageStorageForPresentation: False,
    uid.DigitalMammographyXRayImageStorageForProcessing: False,
    uid.DigitalIntraOralXRayImageStorageForPresentation: False,
    uid.DigitalIntraOralXRayImageStorageForProcessing: False,
    uid.XRayAngiographicImageStorage: True,
    uid.XRayRadiofluoroscopicImageStorage: True,
    uid.UltrasoundImageStorage: True,
}
"""SOP classes that are copied; True: their machines write names into the pixels, and the header must deny it."""
_FILLED: dict[str, frozenset[int]] = {
    uid.EnhancedCTImageStorage: FILLED_IN_ENHANCED,
    uid.EnhancedMRImageStorage: FILLED_IN_ENHANCED,
    uid.EnhancedPETImageStorage: FILLED_IN_ENHANCED,
    uid.PositronEmissionTomographyImageStorage: FILLED_IN_PET,
}
_NUCLEAR = {uid.PositronEmissionTomographyImageStorage, uid.NuclearMedicineImageStorage}

_DEPTH = 12
_LEAST_TEXT = 4
_LEAST_DIGITS = 7
"""Characters of a removed text, or number, from which on the bytes of the copy are searched for it."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DUMMIES = {
    "DA": "19000101", "TM": "000000", "DT": "19000101000000", "AS": "000Y", "DS": "0", "IS": "0",
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), "ANONYMIZED"),
}  # fmt: skip
_WHEN = {
    "DA": re.compile(r"\d{8}", re.ASCII),
    "TM": re.compile(r"\d{2,6}(\.\d{1,6})?", re.ASCII),
    "DT": re.compile(r"\d{8}\d{0,6}(\.\d{1,6})?([+-]\d{4})?", re.ASCII),
}
_META = {0x00020000, 0x00020001, 0x00020002, 0x00020003, 0x00020010, 0x00020012, 0x00020013}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the profile."""

    dates: Literal["remove", "keep", "shift"] = "remove"
    """`shift` moves all dates of a patient by the same secret number of days, and keeps times of day."""
    characteristics: bool = False
    """Keeps sex, age (90 and above as 90), size and weight."""


@dataclass(frozen=True)
class Copy:
    """A de-identified file."""

    name: str
    """patient/study/instance.dcm, of pseudonyms."""
    data: bytes
    issuer: str = field(default="", repr=False)
    """Who gave the Patient ID of the original; the copy does not hold it, and two of them mean two people."""


class Deidentifier:
    """Makes copies under one key: equal identifiers become equal pseudonyms, in every file and every run."""

    def __init__(self, key: bytes, options: Options = Options()) -> None:
        """Takes a secret of 32 bytes; who has it can link copies to patients."""
        self._key, self._options = key, options
        self._days, self._class = 0, ""

    def copy(self, path: Path) -> Copy:
        """The copy of one file, checked.

        Raises:
            Refusal: It is no image, may show text, cannot be decoded, or something that was removed is still there.
        """
        with quiet():
            try:
                return self._copy(path)
            except (Refusal, MemoryError):
                raise
            except (Exception, RecursionError):  # a parser's words may quote the header
                raise Refusal(RefusalCode.CORRUPT, "The header is damaged; transfer the file again.") from None

    def uid(self, original: str) -> str:
        """The UID that stands for another: 2.25 and 128 bits of HMAC-SHA256."""
        return f"2.25.{int(pseudonym(self._key, 'deidentified uid', original)[:32], 16)}"

    def _copy(self, path: Path) -> Copy:
        try:
            original, element = read_header(path, None)
        except Overrun:
            original, element = read_header(path, None, bounded=False)
        _need_clean(original)
        layout = layout_of(original, element)
        # those without an identifier must not become one patient
        who = identifier(original, "PatientID") or text(original, "StudyInstanceUID")
        patient = pseudonym(self._key, "deidentified patient", who)[:16]
        self._days = 1 + int(pseudonym(self._key, "days", who)[:8], 16) % 3650
        self._class = text(original, "SOPClassUID")
        made = self._cleaned(original, 0)
        made.PatientID = patient
        made.PatientName = ""
        measured = [raw(original, tag) for tag in REPEATS if isinstance(tag, int)]
        if any(measured):  # private b-values are removed, and the reader divides a series by them
            made.SequenceName = self._token(text(original, "SequenceName"), *measured)
        self._stamp(made, original)
        pixels = _with_pixels(made, path, layout)
        made.file_meta = FileMetaDataset()
        made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        made.file_meta.ImplementationClassUID = uid.UID(IMPLEMENTATION)
        made.file_meta.ImplementationVersionName = _VERSION  # else the library's
        out = BytesIO()
        made.save_as(out, enforce_file_format=True)
        data = out.getvalue()
        _verify(data, original, pixels)
        study, instance = (
            pseudonym(self._key, kind, text(original, keyword))[:16]
            for kind, keyword in (("study file", "StudyInstanceUID"), ("instance file", "SOPInstanceUID"))
        )
        issuer = text(original, "IssuerOfPatientID") if identifier(original, "PatientID") else ""
        return Copy(f"{patient}/{study}/{instance}.dcm", data, issuer)

    def _cleaned(self, original: Dataset, depth: int) -> Dataset:
        if depth > _DEPTH:
            raise Refusal(RefusalCode.CORRUPT, "The header is nested deeper than any image needs.")
        made = Dataset()
        for tag in original.keys():  # noqa: SIM118  iterating the dataset would parse what is dropped
            if tag.is_private or tag.element == 0 or tag.group in (0x0002, 0x7FE0) or not dictionary_has_tag(tag):
                continue
            element = original[tag]
            kept = self._kept(element, depth)
            if kept is not None:
                made.add(kept)
        return made

    def _kept(self, element: DataElement, depth: int) -> DataElement | None:
        """What becomes of one attribute, by its type in the object; None: it is removed."""
        kept, tag = self._value(element, depth), int(element.tag)
        if kept is None or kept.is_empty:
            if tag in _FILLED.get(self._class, ()) and not element.is_empty:
                return DataElement(tag, element.VR, _DUMMIES[element.VR])
            nuclear = self._class in _NUCLEAR and tag in EMPTIED_IN_NUCLEAR
            if tag in EMPTIED or (depth and tag in EMPTIED_IN_GROUPS) or nuclear:
                return DataElement(tag, element.VR, DicomSequence() if element.VR == "SQ" else "")
        return kept

    def _value(self, element: DataElement, depth: int) -> DataElement | None:
        tag, vr, code = element.tag, element.VR, action(element.tag)
        if int(tag) in CHARACTERISTICS and self._options.characteristics:
            return _characteristic(element)
        if int(tag) in DATES and self._options.dates != "remove":
            return self._when(element) or DataElement(tag, vr, "")
        if vr == "UI":
            # whatever the table says, a UID that is not one of the standard's own may be a patient's
            return None if code == "X" else self._uids(element)
        if code is not None:
            return _by_table(element, code)
        if vr == "SQ":
            if int(tag) in CODED:
                return self._coded(element, depth)
            if int(tag) not in SEQUENCES:
                return None
            items = [self._cleaned(item, depth + 1) for item in element.value]
            return DataElement(tag, "SQ", DicomSequence(items))
        return self._allowed(element)

    def _coded(self, element: DataElement, depth: int) -> DataElement | None:
        """Concepts of the standard, in its own words; None where one is of another vocabulary."""
        items = []
        for original in element.value:
            value, scheme = text(original, "CodeValue"), text(original, "CodingSchemeDesignator")
            known, item = meaning(value, scheme), self._cleaned(original, depth + 1)
            if known is None:
                return None
            items.append(_concept(item, value, scheme, known))
        return DataElement(element.tag, "SQ", DicomSequence(items))

    def _token(self, *words: str) -> str:
        """What stands for a text that is not to be shown, but must stay different from others."""
        return pseudonym(self._key, "deidentified text", *words)[:16]

    def _allowed(self, element: DataElement) -> DataElement | None:
        tag, vr = int(element.tag), element.VR
        values = _values(element)
        if vr in ("DS", "IS"):
            texts = [str(value).strip() for value in values]
            fine = element.tag.group in NUMBER_GROUPS and all(_NUMBER.fullmatch(value) for value in texts)
            return DataElement(tag, vr, texts) if fine else None
        if vr in NUMBERS:
            return DataElement(tag, vr, element.value) if element.tag.group in NUMBER_GROUPS else None
        if tag in TABLES:
            return DataElement(tag, vr, element.value) if vr == "OW" else None
        words = [str(value).strip() for value in values]
        if tag in IMAGE_TYPES:
            known = (word.upper() for word in words)  # as the reader compares them
            words = [w if not w or is_word(w, tag) else f"OTHER_{self._token(w)[:10].upper()}" for w in known]
            return DataElement(tag, "CS", words)
        if tag in CODES:
            return DataElement(tag, "CS", words) if all(is_word(word, tag) for word in words) else None
        pattern = TEXTS.get(tag)
        if tag in APART:
            plain = [pattern is not None and pattern.fullmatch(word) for word in words]
            words = [w if fine or not w else self._token(w) for w, fine in zip(words, plain, strict=True)]
            return DataElement(tag, vr, words)
        if pattern is not None:
            return DataElement(tag, vr, words if all(pattern.fullmatch(word) for word in words) else "")
        return None

    def _uids(self, element: DataElement) -> DataElement:
        values = [str(value) for value in _values(element)]
        replaced = [value if uid.UID(value).name != value else self.uid(value) for value in values if value]
        return DataElement(element.tag, "UI", replaced)

    def _when(self, element: DataElement) -> DataElement | None:
        values = [str(value).strip() for value in _values(element)]
        pattern = _WHEN.get(element.VR)
        if pattern is None or not all(pattern.fullmatch(value) for value in values):
            return None
        if self._options.dates == "shift" and element.VR != "TM":
            values = [_shifted(value[:8], self._days) + value[8:] for value in values]
        return DataElement(element.tag, element.VR, values)

    def _stamp(self, made: Dataset, original: Dataset) -> None:
        """Says in the file what was done (PS3.15 E.1.1, CID 7050)."""
        modified = {"remove": "REMOVED", "keep": "UNMODIFIED", "shift": "MODIFIED"}[self._options.dates]
        codes = [("113100", "Basic Application Confidentiality Profile")]
        if self._options.dates == "keep":
            codes.append(("113106", "Retain Longitudinal Temporal Information Full Dates Option"))
        if self._options.dates == "shift":
            codes.append(("113107", "Retain Longitudinal Temporal Information Modified Dates Option"))
        if self._options.characteristics:
            codes.append(("113108", "Retain Patient Characteristics Option"))
        items = [_concept(Dataset(), value, "DCM", says) for value, says in codes]
        made.PatientIdentityRemoved = "YES"
        made.DeidentificationMethod = [f"DICOM PS3.15 {EDITION} Annex E Basic Profile", "Fedicom allow list"]
        made.DeidentificationMethodCodeSequence = DicomSequence(items)
        made.LongitudinalTemporalInformationModified = modified
        if text(original, "BurnedInAnnotation") == "NO":
            made.BurnedInAnnotation = "NO"


def _concept(item: Dataset, value: str, scheme: str, says: str) -> Dataset:
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, says
    return item


def _need_clean(original: Dataset) -> None:
    """Refuses what may show a name in its pixels."""
    sop_class = text(original, "SOPClassUID")
    if sop_class not in _CLASSES:
        raise Refusal(RefusalCode.UNSUPPORTED_CLASS, "This is no image of a kind that is copied.")
    says = text(original, "BurnedInAnnotation").upper()
    film = text(original, "ConversionType").upper() not in ("", "SYN")
    kinds = text(original, "ImageType").upper()  # one value or several
    captured = any(word in kinds for word in ("SCREEN", "CAPTURE", "REPORT", "DOSE", "PATIENT"))
    if says == "YES" or (says != "NO" and (_CLASSES[sop_class] or film or captured)):
        raise Refusal(RefusalCode.BURNED_IN_TEXT, "The image shows or may show text, and pixels are not cleaned.")
    if text(original, "RecognizableVisualFeatures").upper() == "YES":
        raise Refusal(RefusalCode.BURNED_IN_TEXT, "The header says that a person can be recognised in the image.")


def _by_table(element: DataElement, code: str) -> DataElement | None:
    """Where the table leaves a choice by the type of the attribute: empty where empty is allowed, else removed."""
    if element.VR in ("SQ", "OB", "OW", "UN", "UR") or code in ("X", "X/D", "X/Z/U*", "U"):
        return None
    if code == "D":
        dummy = _DUMMIES.get(element.VR)
        return None if dummy is None else DataElement(element.tag, element.VR, dummy)
    return DataElement(element.tag, element.VR, None if element.VR in NUMBERS else "")


def _characteristic(element: DataElement) -> DataElement | None:
    value = str(element.value or "").strip()
    if element.keyword == "PatientSex":
        return DataElement(element.tag, "CS", value if value in ("M", "F", "O") else "")
    if element.keyword == "PatientAge":
        if not re.fullmatch(r"\d{3}[DWMY]", value, re.ASCII):
            return None
        return DataElement(element.tag, "AS", "090Y" if value[3] == "Y" and int(value[:3]) > 89 else value)
    return DataElement(element.tag, "DS", value) if _NUMBER.fullmatch(value) else None


def _shifted(day: str, days: int) -> str:
    return f"{date(int(day[:4]), int(day[4:6]), int(day[6:8])) - timedelta(days=days):%Y%m%d}"


def _values(element: DataElement) -> list[Any]:
    if element.value is None or element.value == "":
        return []
    return list(element.value) if isinstance(element.value, MultiValue | list) else [element.value]


def _with_pixels(made: Dataset, path: Path, layout: Layout) -> bytes:
    """Puts the decoded pixels into `made`; returns them."""
    kind = np.dtype(f"<{'i' if layout.signed else 'u'}{layout.allocated // 8}")
    frames = stored_frames(path, layout, range(layout.frames))
    # unused bits are cleared on the way: overlays were once kept there
    pixels = b"".join(np.ascontiguousarray(frame).astype(kind, copy=False).tobytes() for frame in frames)
    made.Rows, made.Columns, made.SamplesPerPixel = layout.rows, layout.columns, layout.samples
    made.BitsAllocated, made.BitsStored, made.HighBit = layout.allocated, layout.stored, layout.stored - 1
    made.PixelRepresentation = int(layout.signed)
    if layout.samples == 3:
        made.PhotometricInterpretation, made.PlanarConfiguration = "RGB", 0
    made.PixelData = pixels + b"\0" * (len(pixels) % 2)
    made["PixelData"].VR = "OW" if layout.allocated > 8 else "OB"
    return bytes(made.PixelData)


def _verify(data: bytes, original: Dataset, pixels: bytes) -> None:
    """Reads the copy again, and refuses it if it holds more than it may."""
    wrong = Refusal(RefusalCode.CONFLICT, "The copy would hold more than it may, so it was not made.")
    found = dcmread(BytesIO(data))
    meta = found.file_meta
    if data[:132] != b"\0" * 128 + b"DICM" or not {int(tag) for tag in meta.keys()} <= _META:  # noqa: SIM118
        raise wrong
    if meta.ImplementationVersionName != _VERSION:
        raise wrong
    if bytes(found.PixelData) != pixels:
        raise Refusal(RefusalCode.CONFLICT, "The pixels of the copy are not those of the original.")
    for element in _walk(found):
        if element.tag.is_private or element.VR == "UN" or element.tag.group & 0xFF01 in (0x5000, 0x6000):
            raise wrong
    kept = {
        str(value).strip().casefold() for element in _walk(found) for value in _values(element) if element.VR != "SQ"
    }
    # what stands before the pixels; these are numbers, in which four bytes may look like anything
    head = data[: data.rfind(pixels)].decode("latin-1").casefold()
    for removed in _texts(original):
        if removed not in kept and removed in head and not any(removed in word for word in kept):
            raise wrong
        if removed in kept and not _innocent(removed):
            raise wrong


def _innocent(word: str) -> bool:
    """A word of the vocabulary may stand in a removed attribute as well: CHEST in a description."""
    upper = word.upper()
    known = is_word(upper, 0) or upper == "ANONYMIZED" or any(each.fullmatch(upper) for each in TEXTS.values())
    return known or is_meaning(word)


def _walk(dataset: Dataset) -> Iterator[DataElement]:
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _walk(item)


def _texts(original: Dataset) -> Iterator[str]:
    """Texts of the original that the profile takes away, in small letters."""
    for element in _walk(original):
        code = action(element.tag)
        if element.VR in ("PN", "LO", "SH", "ST", "LT", "UT", "UC", "UI", "AE", "UR") and code is not None:
            for value in _values(element):
                word = str(value).strip().casefold()
                # short numbers stand anywhere
                least = _LEAST_TEXT if any(map(str.isalpha, word)) else _LEAST_DIGITS
                if len(word) >= least and not (element.VR == "UI" and uid.UID(str(value)).name != str(value)):
                    yield word
