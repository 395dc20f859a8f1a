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
