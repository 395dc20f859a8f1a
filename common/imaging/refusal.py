"""Why a file is not used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np


class RefusalCode(StrEnum):
    """Why a file is not used; the codes may be counted and reported, they say nothing about a patient."""

    NOT_DICOM = "not_dicom"
    UNREADABLE = "unreadable"
    DICOMDIR = "dicomdir"
    REPORT = "report"
    DOCUMENT = "document"
    RADIOTHERAPY = "radiotherapy"
    SEGMENTATION = "segmentation"
    SECONDARY_CAPTURE = "secondary_capture"
    LOCALIZER = "localizer"
    MOSAIC = "mosaic"
    CINE = "cine"
    BURNED_IN_TEXT = "burned_in_text"
    UNSUPPORTED_CLASS = "unsupported_class"
    UNSUPPORTED_PIXELS = "unsupported_pixels"
    OTHER_UNITS = "other_units"
    MISSING_HEADER = "missing_header"
    MISSING_GEOMETRY = "missing_geometry"
    MISSING_PIXELS = "missing_pixels"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    COPY = "copy"
    CONFLICT = "conflict"
    INCOMPLETE = "incomplete"
    SINGLE_SLICE = "single_slice"
    DUPLICATE = "duplicate"
    GAP = "gap"
    TILT = "tilt"
    MIXED_SPACING = "mixed_spacing"
    MIXED_SLICES = "mixed_slices"
    MIXED_PATIENTS = "mixed_patients"
    PART_OF_A_FILE = "part_of_a_file"


MEANINGS: dict[str, tuple[str, str]] = {
    "not_dicom": ("no DICOM file", "nothing to do"),
    "unreadable": ("the system does not let it be read, or it is a pipe or a link to a folder", "permissions, disk"),
    "dicomdir": ("the table of contents of a medium", "nothing to do"),
    "report": ("structured report, key objects, presentation state", "nothing to do"),
    "document": ("a document packed into DICOM, or a curve such as an ECG", "nothing to do"),
    "radiotherapy": ("plan, dose, structure set", "nothing to do"),
    "segmentation": ("a segmentation of other images", "nothing to do"),
    "secondary_capture": ("a screenshot or scan", "export the original"),
    "localizer": ("a scout image for planning", "nothing to do"),
    "mosaic": ("Siemens mosaic: slices tiled into one picture", "export as single slices or enhanced"),
    "cine": ("a film of many frames", "not supported"),
    "burned_in_text": ("the header says that text is in the pixels", "export without overlay"),
    "unsupported_class": ("another kind of object", "not supported"),
    "unsupported_pixels": (
        "pixel format or compression that is not read (bits, floating point, samples, colour slices)",
        "export in another format",
    ),
    "other_units": ("a CT whose values are no Hounsfield units (Rescale Type), such as a map of iodine", "send the CT"),
    "missing_header": ("no SOP class, identifiers or size, or (CT, PET) no rescale", "export again"),
    "missing_geometry": ("position, orientation or spacing is missing or senseless", "export again, with geometry"),
    "missing_pixels": ("a header without pixels", "transfer again"),
    "truncated": ("shorter than its header says", "transfer again"),
    "corrupt": ("cannot be decoded, contradicts itself, or makes its decoder crash", "transfer again"),
    "too_large": (
        "declares more pixels than it can hold or than is sensible, or takes too much memory",
        "export again",
    ),
    "too_slow": ("takes longer to decode than a file of its size may", "export again"),
    "copy": ("byte-identical to a file that is used", "nothing to do"),
    "conflict": ("different files claim to be the same image (SOP Instance UID)", "keep the right one"),
    "incomplete": (
        "another file of the series cannot be used, or a repeat has fewer slices than the others",
        "repair that one",
    ),
    "single_slice": ("one cross-sectional slice alone", "export the whole series"),
    "duplicate": ("slices share a place, and nothing says why", "separate the acquisitions"),
    "gap": ("slices inside the series are missing, or may be", "export again"),
    "tilt": ("gantry tilt: slices are sheared against their normal", "data.correct_tilt=true"),
    "mixed_spacing": ("distances or pixel spacings differ within the series", "not supported"),
    "mixed_slices": ("slices of one stack differ in size or kind", "separate them, or export again"),
    "mixed_patients": ("one series with several patients or studies", "repair the identifiers"),
    "part_of_a_file": ("a piece of a multi-frame file that the sender cut (concatenation)", "send it whole"),
}
"""Code -> what it means, and what helps; the table of docs/data.md."""


@dataclass(frozen=True)
class Refused:
    """A file that is not used, and why. Stays at the site: the path may name a patient."""

    path: Path = field(repr=False)
    code: RefusalCode
    why: str
    """One sentence for the person who exported the file; without names or identifiers."""


class Refusal(Exception):  # noqa: N818  a verdict on a file, caught at the room's border
    """Inside the imaging room: why the file or series at hand is not used. Becomes `Refused` at its border."""

    def __init__(self, code: RefusalCode, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the readers' warnings: they quote values of the header, and a refusal says all that is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.errstate(all="ignore"):
            yield
