"""What a model says of an image, as a DICOM Structured Report beside it: template TID 1500 (PS3.16), unverified.

A report names the patient as the image does and belongs to its study. Classes are coded in a scheme of our own,
99FEDICOM, whose meanings are the names of the recipe.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import highdicom as hd
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import Dataset
from pydicom.sr.codedict import codes

from common.errors import DataError
from common.imaging.header import Overrun, identifier, read_header, tags_of
from common.imaging.refusal import Refusal
from common.imaging.volume import Source

_SCHEME = "99FEDICOM"
_SERIES_NUMBER = 9900
_LONGEST = 64
"""Characters of a coded meaning and of most of a header (value representation LO)."""
_DESCRIPTION = "AI result, research only, not verified"
_COPIED = (
    "PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_TAGS = tags_of(*_COPIED, "SpecificCharacterSet", "SOPClassUID")


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Which model speaks."""

    name: str
    version: str
    weights: str
    """Digest of its weights, hexadecimal."""
    parameters: tuple[str, ...] = ()
    """Sentences for whoever reads the report."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What it says of one image or volume."""

    probabilities: tuple[tuple[str, float], ...]
    """(class, probability from 0 to 1), in the order of the recipe."""
    predicted: tuple[str, ...]
    above: bool | None = None
    """Whether the operating point is reached; None where there is none."""


def structured_report(source: Source, said: Said, algorithm: Algorithm, *, number: int) -> Dataset:
    """The report about one image or volume, ready to be saved; its identifiers are new each time.

    Args:
        source: Its first file is opened for the patient and the study.
        number: Of the report in its series (all reports of an algorithm on a study), from 1 on.

    Raises:
        DataError: The image's own header makes no valid report.
    """
    try:
        header, _ = read_header(source.files[0], _TAGS, frames=False)
        with warnings.catch_warnings():
            # Of a value that the standard does not allow pydicom would only say so, with the value.
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("error", "Invalid value")
            return _document(source, header, said, algorithm, number)
    except (Refusal, Overrun, OSError):
        raise DataError("its file cannot be read any more") from None
    except Exception as error:  # whatever a library makes of a header that is not as the standard asks
        raise DataError(f"its header makes no valid report ({type(error).__name__})") from None


def _document(source: Source, header: Dataset, said: Said, algorithm: Algorithm, number: int) -> Dataset:
    evidence = _evidence(source, header)
    images = [
        sr.SourceImageForMeasurementGroup(item.SOPClassUID, item.SOPInstanceUID, list(source.frames) or None)
        for item in evidence
    ]
    return sr.ComprehensiveSR(
        evidence=evidence,
        content=_content(said, algorithm, images)[0],
        series_instance_uid=_uid("series", algorithm.weights, source.study_uid),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=number,
        manufacturer="Fedicom",
        manufacturer_model_name=algorithm.name[:_LONGEST],
        software_versions=algorithm.version[:_LONGEST],
        series_description=_DESCRIPTION,
        specific_character_set="ISO_IR 192",
        coding_schemes=[CodingSchemeIdentificationItem(_SCHEME, name="Fedicom: classes of recipes")],
        is_complete=True,
    )


def _evidence(source: Source, header: Dataset) -> list[Dataset]:
    """The images that the report is about, of their headers what it repeats."""
    found = []
    for uid in source.sop_uids:
        item = Dataset()
        item.SOPClassUID, item.SOPInstanceUID = header.SOPClassUID, uid
        item.StudyInstanceUID, item.SeriesInstanceUID = source.study_uid, source.series_uid
        for keyword in _COPIED:
            setattr(item, keyword, _valid(keyword, identifier(header, keyword)))
        found.append(item)
    return found


def _valid(keyword: str, value: str) -> str | None:
    """The value, or none where the standard would not have it."""
    formats = {"PatientBirthDate": ("%Y%m%d",), "StudyDate": ("%Y%m%d",), "StudyTime": ("%H%M%S.%f", "%H%M%S", "%H%M")}
    if keyword == "PatientSex":
        return value if value in ("M", "F", "O") else None
    if keyword in formats:
        return value if any(_reads(value, form) for form in formats[keyword]) else None
    return value or None


def _reads(value: str, form: str) -> bool:
    try:
        dt.datetime.strptime(value, form)
    except ValueError:
        return False
    return True


def _content(said: Said, algorithm: Algorithm, images: Sequence[Any]) -> sr.MeasurementReport:
    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_uid("model", algorithm.weights), name=algorithm.name[:_LONGEST], manufacturer_name="Fedicom"
        ),
    )
    which = {name: number for number, (name, _) in enumerate(said.probabilities)}
    findings = [
        sr.QualitativeEvaluation(_coded("predicted", "Predicted class"), _coded(f"class-{which[name]}", name))
        for name in said.predicted
    ]
    if said.above is not None:
        reached = codes.SCT.Yes if said.above else codes.SCT.No
        name = _coded("operating-point", "At or above the operating point")
        findings.append(sr.QualitativeEvaluation(name, reached))
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=hd.UID(), identifier=algorithm.name[:_LONGEST]),
        algorithm_id=sr.AlgorithmIdentification(
            algorithm.name, f"weights {algorithm.weights}", list(algorithm.parameters) or None
        ),
        measurements=[
            sr.Measurement(
                _coded(f"probability-{number}", f"Probability of {name}"), round(value, 7), codes.UCUM.NoUnits
            )
            for number, (name, value) in enumerate(said.probabilities)
        ],
        qualitative_evaluations=findings,
        source_images=images,
    )
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device),
        procedure_reported=sr.CodedConcept("363679005", "SCT", "Imaging procedure"),
        imaging_measurements=[group],
        title=codes.DCM.ImagingMeasurementReport,
    )


def _coded(value: str, meaning: str) -> sr.CodedConcept:
    return sr.CodedConcept(value, _SCHEME, meaning[:_LONGEST])


def _uid(*parts: str) -> str:
    """An identifier that follows from these parts (PS3.5, B.2)."""
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return cast(str, hd.UID(f"2.25.{int.from_bytes(digest[:16], 'big')}"))
