"""Writes small, valid DICOM files for virtual hospitals: projection images, ultrasound, CT and MR series.

Everything written is a function of the arguments: no clock, no random UID, no version of a
library. The same call gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    MRImageStorage,
    UltrasoundImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from common.errors import DataError

Modality = Literal["CR", "DX", "US", "CT", "MR"]
Numbering = Literal["forward", "reversed", "shuffled"]
FloatArray = npt.NDArray[np.float64]

_SOP_CLASS = {
    "CR": ComputedRadiographyImageStorage,
    "DX": DigitalXRayImageStorageForPresentation,
    "US": UltrasoundImageStorage,
    "CT": CTImageStorage,
    "MR": MRImageStorage,
}
_IMPLEMENTATION = generate_uid(entropy_srcs=["fedicom", "dicom writer", "1"])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What took the images."""

    modality: Modality
    manufacturer: str = "Fedicom"
    model: str = "Virtual"
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2"
    bits_stored: int = 16
    """Of 8 allocated up to 8, else of 16. Projection images and ultrasound only; series always use 16."""
    numbering: Numbering = "forward"
    """How Instance Number, and with it the order of the files, follows the slices of a series."""
    original: bool = True
    """False marks the pixels as derived from another image, and CT values as no Hounsfield units."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whom a study is of. Nobody: identifiers are synthetic or come from a public data set."""

    patient_id: str
    entropy: tuple[str, ...]
    """What makes the UIDs of this patient unique: data set, seed, ..."""
    study: int = 1
    sex: Literal["F", "M", ""] = ""
    body_part: str = "CHEST"
    made_from: str = "synthetic, shows no person"
    """De-identification Method (0012,0063)."""

    def uid(self, *parts: object) -> str:
        return str(generate_uid(entropy_srcs=[*self.entropy, self.patient_id, *map(str, parts)]))

    @property
    def accession(self) -> str:
        """Accession Number: the patient and the number of the study, at most 16 characters (VR SH)."""
        text = f"{self.patient_id}.{self.study}"
        return text if len(text) <= 16 else self.uid("accession", self.study)[-16:]


def write_image(
    file: Path,
    values_YX: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
    machine: Machine,
    subject: Subject,
    *,
    number: int = 1,
    spacing_mm: tuple[float, float] | None = None,
) -> None:
    """Writes one 2D image (CR, DX or US), a series of its own.

    Args:
        values_YX: Unsigned values as displayed, bright is bright; MONOCHROME1 machines store them inverted.
        number: Distinguishes images of the same study.
        spacing_mm: Distance of (row, column) centres at the detector, Imager Pixel Spacing; DX needs it.

    Raises:
        DataError: Values do not fit the machine's Bits Stored, or DX without spacing.

    Source: DICOM PS3.3 A.2 (CR), A.26 (DX), A.6 (US).
    """
    bits, top = machine.bits_stored, 2**machine.bits_stored - 1
    if values_YX.ndim != 2 or values_YX.dtype.kind != "u" or (values_YX.size and int(values_YX.max()) > top):
        raise DataError(f"cannot write this image: expected 2D unsigned values up to {top} for {bits} bits stored")
    if machine.modality == "DX" and spacing_mm is None:
        raise DataError("DX images need the pixel spacing; give spacing_mm or write them as CR")
    inverse = machine.photometric == "MONOCHROME1"
    kind: type[np.generic] = np.uint8 if bits <= 8 else np.uint16
    stored = (top - values_YX if inverse else values_YX).astype(kind)
    dataset = _common(machine, subject, series=number)
    _pixels(dataset, stored.shape, machine.photometric, 8 if bits <= 8 else 16, bits, signed=False)
    dataset.ImageType = ["ORIGINAL" if machine.original else "DERIVED", "PRIMARY"]
    dataset.InstanceNumber = number
    if spacing_mm is not None:
        dataset.ImagerPixelSpacing = [format_number_as_ds(float(step)) for step in spacing_mm]
    if machine.modality == "US":
        dataset.UltrasoundColorDataPresent, dataset.PatientOrientation = 0, ""
    else:
        dataset.ViewPosition = "PA" if subject.body_part == "CHEST" else ""
        dataset.PatientOrientation = ["L", "F"]
    if machine.modality == "DX":
        _radiograph(dataset, inverse, chest=subject.body_part == "CHEST")
        # Spans every stored value, so applying it changes nothing.
        dataset.WindowCenter, dataset.WindowWidth = str(2 ** (bits - 1)), str(2**bits)
    dataset.SOPInstanceUID = subject.uid("instance", subject.study, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_file(_encode(dataset), _pixel_element(stored)))


def write_series(
    folder: Path,
    stored_ZYX: npt.NDArray[np.int16] | npt.NDArray[np.uint16],
    affine: FloatArray,
    machine: Machine,
    subject: Subject,
    *,
    slope: str = "1",
    intercept: str = "0",
) -> int:
    """Writes one CT or MR series, a file for each slice, named by Instance Number.

    Args:
        stored_ZYX: Stored values; value = stored * slope + intercept.
        affine: (slice, row, column, 1) -> mm, LPS; orthogonal axes.
        slope, intercept: As written, VR DS: at most 16 characters.

    Returns:
        Number of files.

    Raises:
        DataError: The axes are not orthogonal, or an axis has no length.

    Source: DICOM PS3.3 C.7.6.2.1.1 (image plane), A.3 (CT), A.4 (MR).
    """
    kind = np.dtype(stored_ZYX.dtype)
    if stored_ZYX.ndim != 3 or kind.kind not in "iu" or kind.itemsize != 2:
        raise DataError(f"cannot write this series: expected 3D 16-bit integers, got {stored_ZYX.ndim}D {kind}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all(spacing > 0):
        raise DataError("cannot write this series: an axis of its affine has no length")
    slice_axis, row_axis, column_axis = (affine[:3, :3] / spacing).T
    normal = np.cross(column_axis, row_axis)
    if abs(row_axis @ column_axis) > 1e-4 or abs(abs(normal @ slice_axis) - 1) > 1e-4:
        raise DataError("cannot write this series: DICOM slices need orthogonal axes; resample the volume first")

    dataset = _common(machine, subject, series=1)
    _pixels(dataset, stored_ZYX.shape[1:], "MONOCHROME2", 16, 16, signed=kind.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.ImageOrientationPatient = _decimals(np.concatenate([column_axis, row_axis]))
    dataset.PixelSpacing = _decimals(spacing[1:])
    dataset.SliceThickness = format_number_as_ds(float(spacing[0]))
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = subject.uid("frame", subject.study)
    dataset.PositionReferenceIndicator = ""
    dataset.AcquisitionNumber = 1
    origin = "ORIGINAL" if machine.original else "DERIVED"
    if machine.modality == "CT":
        dataset.ImageType = [origin, "PRIMARY", "AXIAL"]
        dataset.RescaleType = "HU" if machine.original else "US"
        dataset.KVP = "120" if machine.original else ""
    else:
        dataset.ImageType = [origin, "PRIMARY", "M"]
        dataset.SpacingBetweenSlices = dataset.SliceThickness
        dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "NONE", ""
        dataset.MRAcquisitionType = "3D"
        dataset.EchoTime = dataset.RepetitionTime = dataset.EchoTrainLength = ""
    template = _encode(dataset)

    folder.mkdir(parents=True, exist_ok=True)
    little = stored_ZYX.astype(kind.newbyteorder("<"), copy=False)
    for index, number in enumerate(_numbers(len(little), machine.numbering, subject)):
        changed = Dataset()
        changed.SOPInstanceUID = subject.uid("instance", subject.study, index)
        changed.InstanceNumber = int(number)
        changed.ImagePositionPatient = _decimals((affine @ np.array([index, 0.0, 0.0, 1.0]))[:3])
        name = f"{number:04d}.dcm"
        (folder / name).write_bytes(_file({**template, **_encode(changed)}, _pixel_element(little[index])))
    return len(little)


def axial(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> FloatArray:
    """Affine of a volume of which only (slice, row, column) spacing is known, for `write_series`.

    Slices go up (+z), rows to the back (+y), columns to the patient's left (+x); centred on the origin.
    """
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def quantise(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int16] | npt.NDArray[np.uint16], str, str]:
    """Stored 16-bit integers, slope and intercept (VR DS) for any finite volume.

    Integers that fit are kept exactly with slope 1. Others are spread over all 65,536
    levels; the error is at most half a level.

    Raises:
        DataError: A value is not finite.
    """
    if not np.all(np.isfinite(values)):
        raise DataError("a volume holds values that are not finite; repair it before it is imported")
    low, high = float(values.min()), float(values.max())
    if np.array_equal(values, np.rint(values)):
        if low >= -(2**15) and high < 2**15:
            return values.astype(np.int16), "1", "0"
        if low >= 0 and high < 2**16:
            return values.astype(np.uint16), "1", "0"
    # Divided by what will be read back, which has 16 characters and not 17 digits; rounding may not push the top over.
    intercept = format_number_as_ds(low)
    if float(intercept) >= high:
        return np.zeros(values.shape, dtype=np.uint16), "1", intercept
    slope = format_number_as_ds((high - float(intercept)) / 65535 * (1 + 1e-9))
    levels = np.rint((values.astype(np.float64) - float(intercept)) / float(slope))
    return np.clip(levels, 0, 65535).astype(np.uint16), slope, intercept


def _common(machine: Machine, subject: Subject, *, series: int) -> Dataset:
    """The modules that every object has: patient, study, series, equipment, SOP common."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = _SOP_CLASS[machine.modality]
    dataset.StudyDate = dataset.StudyTime = ""
    dataset.AccessionNumber = subject.accession
    dataset.Modality = machine.modality
    dataset.Manufacturer, dataset.ManufacturerModelName = machine.manufacturer, machine.model
    dataset.ReferringPhysicianName = ""
    dataset.PatientName = dataset.PatientID = subject.patient_id
    dataset.PatientBirthDate, dataset.PatientSex = "", subject.sex
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = subject.made_from
    dataset.BodyPartExamined = subject.body_part
    if not subject.body_part and machine.modality != "DX":  # DX has Image Laterality in its place
        dataset.Laterality = ""
    dataset.StudyInstanceUID = subject.uid("study", subject.study)
    dataset.SeriesInstanceUID = subject.uid("series", subject.study, series)
    dataset.StudyID, dataset.SeriesNumber = str(subject.study), series
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    return dataset


def _pixels(
    dataset: Dataset, shape_YX: tuple[int, ...], photometric: str, allocated: int, bits: int, *, signed: bool
) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.Rows, dataset.Columns = shape_YX
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, bits, bits - 1
    dataset.PixelRepresentation = int(signed)


def _radiograph(dataset: Dataset, inverse: bool, *, chest: bool) -> None:
    """What DX asks for beyond CR (PS3.3 C.8.11.1 to C.8.11.5)."""
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", 1 if inverse else -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    dataset.DetectorType, dataset.ImageLaterality, dataset.PositionerType = "DIRECT", "U", ""
    dataset.AcquisitionContextSequence = DicomSequence([])
    dataset.AnatomicRegionSequence = _codes("816094009", "Chest") if chest else DicomSequence([])
    if chest:
        dataset.ViewCodeSequence = _codes("399348003", "postero-anterior")


def _codes(value: str, meaning: str) -> DicomSequence:
    """One code of SNOMED CT."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "SCT", meaning
    return DicomSequence([code])


def _decimals(numbers: FloatArray) -> list[str]:
    # + 0.0: no "-0.0" in a header.
    return [format_number_as_ds(float(number) + 0.0) for number in numbers]


def _numbers(count: int, numbering: Numbering, subject: Subject) -> npt.NDArray[np.int64]:
    numbers = np.arange(1, count + 1)
    if numbering == "reversed":
        return numbers[::-1]
    if numbering == "shuffled":
        # The digits of a UID are a hash: the shuffle is the series' own, and the same in every run.
        return np.random.default_rng(int(subject.uid("order", subject.study)[-15:])).permutation(numbers)
    return numbers


def _encode(dataset: Dataset) -> dict[int, bytes]:
    """Every element as Explicit VR Little Endian bytes, by tag: a series encodes what its slices share once."""
    return {int(element.tag): _element(element) for element in dataset}


def _element(element: DataElement) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_data_element(buffer, element, encodings=["utf8"])
    return buffer.getvalue()


def _pixel_element(stored_YX: npt.NDArray[Any]) -> dict[int, bytes]:
    raw = np.ascontiguousarray(stored_YX).tobytes()
    raw += b"\0" * (len(raw) % 2)
    vr = b"OB" if stored_YX.dtype.itemsize == 1 else b"OW"
    return {0x7FE00010: b"\xe0\x7f\x10\x00" + vr + b"\0\0" + len(raw).to_bytes(4, "little") + raw}


def _file(elements: Mapping[int, bytes], pixels: Mapping[int, bytes]) -> bytes:
    """A DICOM file (PS3.10, 7.1) of encoded elements."""
    # The value of a UI element follows its 8 bytes of tag, VR and length.
    meta = b"".join(
        _element(DataElement(Tag(tag), vr, value))
        for tag, vr, value in (
            (0x00020001, "OB", b"\x00\x01"),
            (0x00020002, "UI", elements[0x00080016][8:].rstrip(b"\0").decode()),
            (0x00020003, "UI", elements[0x00080018][8:].rstrip(b"\0").decode()),
            (0x00020010, "UI", ExplicitVRLittleEndian),
            (0x00020012, "UI", _IMPLEMENTATION),
        )
    )
    length = _element(DataElement(Tag(0x00020000), "UL", len(meta)))
    every = {**elements, **pixels}
    return b"".join((b"\0" * 128, b"DICM", length, meta, *(every[tag] for tag in sorted(every))))
