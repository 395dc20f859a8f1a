"""Where the frames of a multi-frame file lie in the patient, and what tells those apart that share a place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from common.imaging import worker
from common.imaging.header import (
    PHYSICAL,
    Header,
    length_mm,
    limits_of,
    modality_of,
    numbers,
    read_header,
    repeats_of,
    tags_of,
    text,
    unit_of,
)  # fmt: skip
from common.imaging.layout import LAYOUT_TAGS, Layout, layout_of
from common.imaging.refusal import Refusal, RefusalCode, quiet

_TAGS = tags_of(
    *LAYOUT_TAGS, "Modality", "SOPClassUID", "ImageType", "DimensionIndexSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "RescaleSlope", "RescaleIntercept", "PixelSpacing", "SpacingBetweenSlices",
    "SliceThickness", "FrameIncrementPointer", "SliceVector", "DetectorInformationSequence",
)  # fmt: skip

_PLACES = tags_of(
    "InStackPositionNumber", "ImagePositionPatient", "ImagePositionVolume", "SliceLocation", "InstanceNumber"
)  # fmt: skip
"""Dimensions that say where a frame lies, or merely count; all others tell frames of one place apart."""

_REPEATS = (
    ("FrameContentSequence", "StackID"),
    ("FrameContentSequence", "TemporalPositionIndex"),
    ("FrameContentSequence", "FrameAcquisitionNumber"),
    ("MREchoSequence", "EffectiveEchoTime"),
    ("MRDiffusionSequence", "DiffusionBValue"),
    ("MRDiffusionSequence", "DiffusionDirectionality"),
    ("MRModifierSequence", "InversionTimes"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase"),
    ("TemporalPositionSequence", "TemporalPositionTimeOffset"),
    ("CTXRayDetailsSequence", "KVP"),
    ("CTReconstructionSequence", "ConvolutionKernel"),
    ("MRVelocityEncodingSequence", "VelocityEncodingDirection"),
    ("MRArterialSpinLabelingSequence", "ASLContext"),
    ("FrameContentSequence", "FrameReferenceDateTime"),
)
_CONVERTED = "UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence"
"""What a converted series says as its slices said it (PS3.3 C.7.6.16.2.25 and 26)."""
_FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame; the fields mean what those of `Header` mean."""

    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    image_type: tuple[str, ...]
    repeats: tuple[str, ...]
    units: str
    slope: float
    intercept: float
    thickness_mm: float = 0.0
    between_mm: float = 0.0


@dataclass(frozen=True, slots=True)
class MultiFrame:
    """The header of a multi-frame file."""

    layout: Layout
    frames: tuple[Frame, ...]
    """In the order of the file."""


def read_frames(path: Path) -> MultiFrame:
    """Reads the header of a multi-frame file.

    Raises:
        Refusal: The file does not say where its frames lie, or holds less than it declares.
    """
    ((head, _),) = worker.ask("frames", limits_of(path), path=os.fspath(path))

    def tuples(plain: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}

    return MultiFrame(
        layout=Layout.of_plain(head["layout"]),
        frames=tuple(Frame(**tuples(frame)) for frame in head["frames"]),
    )


def as_slices(header: Header, frames: Sequence[Frame]) -> list[Header]:
    """The frames as if each had come in a file of its own; `sop_uid` is the number of the frame."""
    return [
        replace(
            header,
            sop_uid=str(number),
            position_mm=frame.position_mm,
            orientation=frame.orientation,
            spacing_mm=frame.spacing_mm,
            image_type=frame.image_type,
            repeats=frame.repeats,
            units=frame.units,
            thickness_mm=frame.thickness_mm,
            between_mm=frame.between_mm,
        )
        for number, frame in enumerate(frames)
    ]


def frames_job(path: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """In the worker: reads the whole header, which may have megabytes."""
    with quiet():
        dataset, element = read_header(Path(path), _TAGS, bounded=False)
        layout = layout_of(dataset, element)
        modality = modality_of(dataset)
        if dataset.get("SOPClassUID") == uid.NuclearMedicineImageStorage:
            frames = _reconstruction(dataset, modality)
        else:
            frames = _enhanced(dataset, modality)
    yield {"layout": asdict(layout), "frames": [asdict(frame) for frame in frames]}, b""


def _enhanced(dataset: Dataset, modality: str) -> list[Frame]:
    """Source: DICOM PS3.3 C.7.6.16.2 and C.7.6.17 (dimensions)."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) != int(dataset.get("NumberOfFrames") or 1):
        raise Refusal(RefusalCode.MISSING_GEOMETRY, "The file does not say where its frames lie in the patient.")
    pointers = [int(each.get("DimensionIndexPointer") or 0) for each in dataset.get("DimensionIndexSequence") or []]
    telling = [place for place, pointer in enumerate(pointers) if pointer not in _PLACES]
    frames = []
    for groups in per_frame:

        def group(keyword: str, groups: Dataset = groups) -> Dataset:
            items = groups.get(keyword) or shared.get(keyword) or [Dataset()]
            return cast("Dataset", items[0])

        index: Any = group("FrameContentSequence").get("DimensionIndexValues")
        indices = [] if index is None else [index] if isinstance(index, int) else list(index)
        dimensions = [str(indices[place]) if place < len(indices) else "" for place in telling]
        direction = group("MRDiffusionSequence").get("DiffusionGradientDirectionSequence") or [Dataset()]
        meaning, measures = group("PixelValueTransformationSequence"), group("PixelMeasuresSequence")
        slope, intercept = rescale(meaning, modality)
        own, common = (group(keyword) for keyword in _CONVERTED)
        *deliberate, time = repeats_of(own)
        frames.append(
            Frame(
                position_mm=numbers(group("PlanePositionSequence"), "ImagePositionPatient"),
                orientation=numbers(group("PlaneOrientationSequence"), "ImageOrientationPatient"),
                spacing_mm=numbers(measures, "PixelSpacing"),
                image_type=_frame_type(group, dataset),
                repeats=(
                    *dimensions,
                    text(direction[0], "DiffusionGradientOrientation"),
                    *(text(group(sequence), keyword) for sequence, keyword in _REPEATS),
                    *deliberate,
                    text(group("FrameContentSequence"), "FrameAcquisitionDateTime") or time,
                ),
                units=unit_of(meaning, modality) or text(own, "Units"),
                slope=slope,
                intercept=intercept,
                thickness_mm=length_mm(measures, "SliceThickness"),
                between_mm=next(  # that of the slices first: a converter may have measured its own
                    (mm for each in (own, common, measures) if (mm := length_mm(each, "SpacingBetweenSlices"))), 0.0
                ),
            )
        )
    return frames


def _frame_type(group: Any, dataset: Dataset) -> tuple[str, ...]:
    for keyword in _FRAME_TYPES:
        value = group(keyword).get("FrameType")
        if value:
            found = (str(value),) if isinstance(value, str) else tuple(str(part) for part in value)
            if "LOCALIZER" in found:
                raise Refusal(RefusalCode.LOCALIZER, "This is a localizer (scout) image, made for planning only.")
            return *found, text(group(keyword), "ComplexImageComponent")
    return tuple(str(part) for part in dataset.get("ImageType") or ())


def _reconstruction(dataset: Dataset, modality: str) -> list[Frame]:
    """A tomographic reconstruction of nuclear medicine: the first slice has a position, the others follow it.

    Source: DICOM PS3.3 C.8.4.8, C.8.4.15: a positive Spacing Between Slices stacks along row x column.
    """
    vector: Any = dataset.get("SliceVector")
    numbers_N = [int(number) for number in ([vector] if isinstance(vector, int) else vector or [])]
    detectors = dataset.get("DetectorInformationSequence") or []
    step_mm = _number(dataset, "SpacingBetweenSlices") or 0.0
    pointer: Any = dataset.get("FrameIncrementPointer")
    pointers = [] if pointer is None else [pointer] if isinstance(pointer, int) else list(pointer)
    count = int(dataset.get("NumberOfFrames") or 1)
    if len(detectors) != 1 or step_mm == 0 or len(numbers_N) != count or pointers != list(tags_of("SliceVector")):
        raise Refusal(
            RefusalCode.MISSING_GEOMETRY, "The reconstruction does not say where its slices lie in the patient."
        )
    first = numbers(detectors[0], "ImagePositionPatient")
    orientation = numbers(detectors[0], "ImageOrientationPatient")
    if len(first) != 3 or len(orientation) != 6:
        raise Refusal(
            RefusalCode.MISSING_GEOMETRY, "The reconstruction does not say where its first slice lies in the patient."
        )
    normal = np.cross(orientation[:3], orientation[3:])
    spacing_mm = numbers(dataset, "PixelSpacing")
    image_type = tuple(str(part) for part in dataset.get("ImageType") or ())
    slope, intercept = rescale(dataset, modality)
    return [
        Frame(
            position_mm=tuple(float(mm) for mm in first + (number - 1) * step_mm * normal),
            orientation=orientation,
            spacing_mm=spacing_mm,
            image_type=image_type,
            repeats=("",),
            units="",
            slope=slope,
            intercept=intercept,
        )
        for number in numbers_N
    ]


def rescale(dataset: Dataset, modality: str) -> tuple[float, float]:
    """Slope and intercept, 1 and 0 where a modality without a physical unit has none.

    Raises:
        Refusal: One stands without the other, or CT or PET has none: its stored values are no Hounsfield units and no
            activity, and a slice among others would be off by a thousand. Or they are no numbers.

    Source: DICOM PS3.3 C.8.2.1 and C.8.9.4 (required), C.11.1.
    """
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope is not None and intercept is not None:
        if slope == 0 or not np.isfinite([slope, intercept]).all():
            raise Refusal(RefusalCode.CORRUPT, "The rescale slope or intercept is zero or no number.")
        return slope, intercept
    if slope is None and intercept is None and modality not in PHYSICAL:
        return 1.0, 0.0
    why = "The header lacks Rescale Slope or Intercept, without which the pixel values mean nothing; export again."
    raise Refusal(RefusalCode.MISSING_HEADER, why)


def _number(dataset: Dataset, keyword: str) -> float | None:
    value = dataset.get(keyword)
    return None if value is None or value == "" else float(value)
