"""What a header says about machine, exposure and person, beyond what the assembler of volumes needs.

For a site's own quality report. Identifiers are not read here, and free text comes back as it was typed: whoever
shows it decides what may be shown.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydicom.dataset import Dataset

from common.imaging import worker
from common.imaging.header import has_frames, limits_of, modality_of, numbers, read_header, tags_of, text
from common.imaging.refusal import Refusal, quiet

VENDORS = (
    "Agfa", "Bruker", "Canon", "Carestream", "Elekta", "Esaote", "Fedicom", "Fujifilm", "GE", "Hitachi", "Hologic",
    "Kodak", "Konica", "Lorad", "Mindray", "Neusoft", "Philips", "Planmeca", "Samsung", "Shimadzu", "Siemens", "Sirona",
    "Sonosite", "Toshiba", "United Imaging", "Varian", "Ziehm",
)  # fmt: skip
"""Names that are shown; whatever else somebody typed into Manufacturer may be the name of a person."""
_EVERY = (
    "PatientID", "PatientSex", "PatientAge", "StudyDate", "Modality", "Manufacturer", "ManufacturerModelName",
    "BodyPartExamined", "BurnedInAnnotation",
)  # fmt: skip
_SPACING = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_BY_MODALITY: dict[str, tuple[str, ...]] = {
    "CR": ("KVP", "ViewPosition"),
    "DX": ("KVP", "ViewPosition"),
    "MG": ("KVP", "ViewPosition", "ImageLaterality"),
    "CT": ("KVP", "ConvolutionKernel", "SliceThickness"),
    "MR": ("MagneticFieldStrength", "EchoTime", "RepetitionTime", "SliceThickness"),
}
SPACING = "PixelSpacing"
"""In `Facts.missing` it stands for all elements that may hold the spacing."""

_TAGS = tags_of(
    *_EVERY,
    *_SPACING,
    "PatientBirthDate",
    "SOPClassUID",
    *dict.fromkeys(tag for tags in _BY_MODALITY.values() for tag in tags),
)  # fmt: skip
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_EXPOSURE = (
    "CTXRayDetailsSequence", "UnassignedSharedConvertedAttributesSequence",
    "UnassignedPerFrameConvertedAttributesSequence",
)  # fmt: skip
_AGE = re.compile(r"^(\d{3})([DWMY])$")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_OLDEST = 120


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one file."""

    kvp: float | None = None
    """Peak kilovoltage; of frames, where it is the same for all."""
    studied: date | None = None
    sex: Literal["F", "M", "O", ""] = ""
    age_years: float | None = None
    """Patient's Age, else from birth to study."""
    body_part: str = field(default="", repr=False)
    burned_in: Literal["yes", "no", "unsaid"] = "unsaid"
    """Burned In Annotation (0028,0301)."""
    missing: tuple[str, ...] = ()
    """Keywords of elements that are absent or empty and should be there for this modality."""
    expected: tuple[str, ...] = ()
    """Keywords that were looked for."""


def read_facts(path: Path) -> Facts:
    """Reads one header; what is not there or makes no sense is unknown, and nothing is raised for it."""
    try:
        with quiet():
            dataset, _ = read_header(path, _TAGS, frames=False)
            found = _facts(dataset)
            if has_frames(dataset) and modality_of(dataset) == "CT":
                with suppress(Refusal):
                    ((said, _),) = worker.ask("voltage", limits_of(path), path=os.fspath(path))
                    return replace(found, kvp=said["kvp"] or found.kvp)
            return found
    except Exception:  # whatever a damaged header makes the parser raise; the reader refuses such files by name
        return Facts()


def voltage_job(path: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """In the worker: the one voltage that stands with the frames, None where there are several."""
    with quiet():
        dataset, _ = read_header(Path(path), tags_of(*_GROUPS), bounded=False)
        found = {
            _positive(text(details, "KVP"))
            for keyword in _GROUPS
            for groups in dataset.get(keyword) or []
            for sequence in _EXPOSURE
            for details in groups.get(sequence) or []
            if "KVP" in details
        }
    yield {"kvp": found.pop() if len(found) == 1 else None}, b""


def vendor_of(manufacturer: str) -> str | None:
    """The name by which a manufacturer is commonly known; None for one that is not in `VENDORS`."""
    words = manufacturer.lower().replace("_", " ")
    for name in VENDORS:
        if words == name.lower() or words.startswith((name.lower() + " ", name.lower() + ",")):
            return name
    return None


def _facts(dataset: Dataset) -> Facts:
    modality = text(dataset, "Modality").upper()
    in_frames = has_frames(dataset)
    expected = (*_EVERY, *(() if in_frames else _BY_MODALITY.get(modality, ())), SPACING)
    missing = [keyword for keyword in expected if keyword != SPACING and not text(dataset, keyword)]
    # frames without spacing are no volume, and it is volumes that are looked at
    if not in_frames and not any(len(numbers(dataset, keyword)) == 2 for keyword in _SPACING):
        missing.append(SPACING)
    studied, born = _date(text(dataset, "StudyDate")), _date(text(dataset, "PatientBirthDate"))
    age = _age(text(dataset, "PatientAge"))
    if age is None and studied is not None and born is not None:
        years = (studied - born).days / 365.25
        age = years if 0 <= years <= _OLDEST else None
    if age is not None and "PatientAge" in missing:
        missing.remove("PatientAge")
    sex = text(dataset, "PatientSex").upper()
    said = text(dataset, "BurnedInAnnotation").upper()
    return Facts(
        kvp=_positive(text(dataset, "KVP")),
        studied=studied,
        sex=sex if sex in ("F", "M", "O") else "",  # type: ignore[arg-type]
        age_years=age,
        body_part=text(dataset, "BodyPartExamined"),
        burned_in="yes" if said == "YES" else "no" if said == "NO" else "unsaid",
        missing=tuple(missing),
        expected=expected,
    )


def _date(value: str) -> date | None:
    """VR DA: YYYYMMDD."""
    try:
        return date(int(value[:4]), int(value[4:6]), int(value[6:8])) if re.fullmatch(r"\d{8}", value) else None
    except ValueError:
        return None


def _age(value: str) -> float | None:
    """VR AS: three digits and D, W, M or Y; in years."""
    match = _AGE.match(value.upper())
    if match is None:
        return None
    years = int(match[1]) * _YEARS[match[2]]
    return years if years <= _OLDEST else None


def _positive(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None
