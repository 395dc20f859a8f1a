"""Which files of a folder make one stack, and where its slices lie.

Accept or refuse, never guess: a file whose place in a volume is not certain is refused, with a
sentence that the person who exported it understands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.imaging.header import Header
from common.imaging.refusal import Refusal, RefusalCode, Refused, quiet

SPACING_RTOL = 0.01
"""Largest deviation of a slice distance from the mean one, relative."""
ORIENTATION_TOL = 1e-4
"""1 - cosine between two directions that count as the same; scanners write jitter of 1e-6."""
MAX_DRIFT = 0.1
"""Largest distance between a slice and the place its index gives it, in slice distances."""
MIN_SPACING_MM = 1e-3
"""Slices closer than this are two images of one place."""
_MOST_STATIONS = 32


@dataclass(frozen=True)
class Stack:
    """Slices in order, and where they lie."""

    headers: tuple[Header, ...]
    affine: NDArray[np.float64]
    """4 x 4, (slice, row, column, 1) -> mm, LPS."""
    tilt_deg: float = 0.0
    """Angle between the direction of stacking and the normal of the slices."""


def files_below(folder: Path) -> Iterator[Path | Refused]:
    """Every file below `folder`, sorted by relative path; what cannot be entered is refused, not skipped."""
    found: list[Path | Refused] = []

    def blocked(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename or folder))
        why = "This folder cannot be opened; check its permissions and the length of its path."
        found.append(Refused(path, RefusalCode.UNREADABLE, why))

    for where, folders, names in os.walk(folder, onerror=blocked):
        for name in folders:
            path = Path(where, name)
            if os.path.islink(path):  # noqa: PTH114  Path.is_symlink raises where the path is too long
                why = "This is a link to a folder; links to folders are not followed."
                found.append(Refused(path, RefusalCode.UNREADABLE, why))
        found.extend(Path(where, name) for name in names)

    def relative(item: Path | Refused) -> tuple[str, ...]:
        return (item.path if isinstance(item, Refused) else item).relative_to(folder).parts

    yield from sorted(found, key=relative)


Verdict = Stack | tuple[Header, RefusalCode, str]


def stacks(series: Sequence[Header], *, whole: bool = False, tilted: bool = False) -> Iterator[Verdict]:
    """Divides the slices of one Series Instance UID into stacks.

    Slices differ first by what can never be stacked (frame of reference, orientation, image type, size), then,
    only if the positions alone do not make one stack, by the line on which they lie (stations beside each other) and
    by what tells repeats apart (acquisition, echo, time, b-value ...). Instance Number is not used: it may restart or
    run backwards.

    Args:
        series: The slices.
        whole: Nothing can be missing, because all slices lie in one file.
        tilted: Accept slices that are sheared against their normal.

    Yields:
        A stack, or a slice with the code and sentence of its refusal; each slice exactly once.

    Source: DICOM PS3.3 C.7.6.2.1.1.
    """
    for parallel in _parallel(series):
        groups: dict[tuple[object, ...], list[Header]] = {}
        for header in parallel:
            groups.setdefault((header.image_type, header.shape, header.units), []).append(header)
        if len(groups) > 1 and _one_line(parallel):
            why = "The slices of one stack differ in size or kind; the stack is not complete without the others."
            yield from ((header, RefusalCode.MIXED_SLICES, why) for header in parallel)
            continue
        for group in groups.values():
            try:
                with quiet():
                    verdicts = _divide(group, whole=whole, tilted=tilted)
            except Refusal as refusal:
                yield from ((header, refusal.code, refusal.why) for header in group)
            except Exception:  # numbers that no scanner writes
                why = "The positions of the slices make no sense."
                yield from ((header, RefusalCode.MISSING_GEOMETRY, why) for header in group)
            else:
                yield from verdicts


def _parallel(series: Sequence[Header]) -> Iterator[list[Header]]:
    """Slices of one orientation in one frame of reference."""
    groups: dict[tuple[object, ...], list[Header]] = {}
    for header in series:
        groups.setdefault((header.sop_class, header.frame_of_reference), []).append(header)
    for group in groups.values():
        oriented = [_oriented(header) for header in group]
        columns_N3, rows_N3 = np.array(oriented).reshape(-1, 2, 3).swapaxes(0, 1).copy()
        unknown_N = np.array([not any(axes) for axes in oriented])
        left_N = np.ones(len(group), dtype=np.bool_)
        for place in range(len(group)):
            if not left_N[place]:
                continue
            # not rounded: jitter must not straddle a rounding border; with all others at once: the frames of one small
            # file may have thousands of orientations
            columns_same_N = columns_N3 @ columns_N3[place] >= 1 - ORIENTATION_TOL
            rows_same_N = rows_N3 @ rows_N3[place] >= 1 - ORIENTATION_TOL
            same_N: NDArray[np.bool_] = (columns_same_N & rows_same_N) | (unknown_N & unknown_N[place])
            same_N[place] = True
            same_N &= left_N
            left_N &= ~same_N
            yield [group[index] for index in np.flatnonzero(same_N)]


def _oriented(header: Header) -> tuple[float, ...]:
    """Image Orientation; zeros where it is not known."""
    known = len(header.orientation) == 6 and np.isfinite(header.orientation).all()
    return header.orientation if known else (0.0,) * 6


def _one_line(group: Sequence[Header]) -> bool:
    """Whether slices of different kinds, taken together, fill one regular grid: then they are one acquisition."""
    alike = [replace(header, spacing_mm=group[0].spacing_mm) for header in group]
    try:
        with quiet():
            _stack(alike, tilted=True)
    except Exception:
        return False
    return True


def _divide(group: Sequence[Header], *, whole: bool, tilted: bool) -> list[Verdict]:
    """One stack, or several where the header says what divides them."""
    try:
        return [_stack(group, whole=whole, tilted=tilted)]
    except Refusal as refusal:
        # a gap stays a gap: two interleaved passes, one slice lost, could pass as two half as dense volumes
        final = {RefusalCode.MISSING_GEOMETRY, RefusalCode.SINGLE_SLICE, RefusalCode.TILT}
        if refusal.code in final | (set() if whole else {RefusalCode.GAP}):
            raise
        why = refusal
    for parts in _divisions(group):
        divided: list[Stack] = []
        try:
            for part in sorted(parts, key=len, reverse=True):
                divided.append(_stack(part, whole=whole, tilted=tilted))
        except Refusal as refusal:
            if refusal.code == RefusalCode.TILT or (divided and refusal.code == RefusalCode.GAP):
                why = refusal  # closer to the truth: the parts are right, and one of them is not
            continue
        if whole:
            return list(divided)
        verdicts = _covering(divided)
        if verdicts is not None:
            return verdicts
    raise why


def _divisions(group: Sequence[Header]) -> Iterator[list[list[Header]]]:
    """Ways to divide slices that do not make one stack, the most deliberate first."""
    lines = _lines(group)
    if len(lines) > 1:
        yield lines
    columns = list(zip(*(header.repeats for header in group), strict=True))
    telling = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    most = [index for index in telling if index < len(columns) - 1]
    seen: set[tuple[int, ...]] = set()
    for chosen in [*((index,) for index in telling), *combinations(most, 2), tuple(most)]:
        parts: dict[tuple[str, ...], list[Header]] = {}
        for header in group:
            parts.setdefault(tuple(header.repeats[index] for index in chosen), []).append(header)
        numbered = {key: number for number, key in enumerate(parts)}
        way = tuple(numbered[tuple(header.repeats[index] for index in chosen)] for header in group)
        if len(parts) > 1 and way not in seen and min(map(len, parts.values())) > 1:
            seen.add(way)
            yield list(parts.values())


def _lines(group: Sequence[Header]) -> list[list[Header]]:
    """Slices whose corners lie on one line along the normal; stations beside each other lie on several."""
    rows, columns = _axes(group)
    found: list[tuple[NDArray[np.float64], list[Header]]] = []
    for header in group:
        corner = np.array([rows, columns]) @ np.array(header.position_mm)
        for other, members in found:
            if np.abs(corner - other).max() < 0.1 * min(header.spacing_mm):
                members.append(header)
                break
        else:
            found.append((corner, [header]))
        if len(found) > _MOST_STATIONS:  # drifting corners
            return []
    return [members for _, members in found]


def _covering(divided: Sequence[Stack]) -> list[Verdict] | None:
    """Whether the stacks, one beside or over the other, leave no place where a lost slice could hide.

    Repeats cover the same part of the patient; one that covers less was aborted, or lost slices at its end, and is
    refused. Stations overlap with the next one. None for pieces one behind the other: a slice between may be lost.
    """
    normal = np.cross(divided[0].affine[:3, 2], divided[0].affine[:3, 1])
    normal /= np.linalg.norm(normal)
    spans = []
    for stack in divided:
        start, step = float(stack.affine[:3, 3] @ normal), float(stack.affine[:3, 0] @ normal)
        spans.append((start, start + (len(stack.headers) - 1) * step, step))
    reached = min(spans)[1]
    for start, end, _ in sorted(spans):
        if start > reached:
            return None
        reached = max(reached, end)
    verdicts: list[Verdict] = []
    for stack, (start, end, step) in zip(divided, spans, strict=True):
        shorter = any(
            low < start + step / 2 and end < high + step / 2 and high - low > end - start + step / 2
            for low, high, other in spans
            if abs(other - step) <= SPACING_RTOL * step
        )
        if shorter:
            why = "This repeat of the stack has fewer slices than another one; it was aborted or is not complete."
            verdicts.extend((header, RefusalCode.INCOMPLETE, why) for header in stack.headers)
        else:
            verdicts.append(stack)
    return verdicts


def _stack(group: Sequence[Header], *, whole: bool = True, tilted: bool = False) -> Stack:
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
    position_N3 = position_N3[order]
    step_mm = np.diff(position_N3 @ normal)
    if (step_mm < MIN_SPACING_MM).any():
        doubled = int((step_mm < MIN_SPACING_MM).sum())
        raise Refusal(
            RefusalCode.DUPLICATE,
            f"{doubled} of {len(group)} slices share their place with another one, and the header does not say why.",
        )
    step = (position_N3[-1] - position_N3[0]) / (len(group) - 1)
    cosine = min(1.0, float(step @ normal / np.linalg.norm(step)))
    from highdicom.spatial import get_volume_positions  # a quarter of a second, which a site of radiographs saves

    distance_mm, index = get_volume_positions(
        image_positions=position_N3.tolist(),
        image_orientation=[*columns, *rows],
        rtol=SPACING_RTOL,
        index_convention="RD",
    )
    tilt_deg = 0.0
    if distance_mm is None or index is None:
        if not np.allclose(step_mm, step_mm.mean(), rtol=SPACING_RTOL, atol=0):
            raise _irregular(step_mm)
        tilt_deg = float(np.degrees(np.arccos(cosine)))
    expected_N3 = position_N3[0] + np.arange(len(group))[:, None] * step
    if np.linalg.norm(position_N3 - expected_N3, axis=1).max() > MAX_DRIFT * np.linalg.norm(step):
        raise Refusal(RefusalCode.MIXED_SPACING, "The slices do not lie on one line, or their distance drifts.")
    if tilt_deg and not tilted:
        raise Refusal(
            RefusalCode.TILT,
            f"The slices are stacked at {tilt_deg:.1f} degrees to their normal (gantry tilt); set data.correct_tilt "
            "to have such series resampled.",
        )
    if not whole:
        _check_thinned(group, float(step_mm.mean()))
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = rows * spacing_N2[0, 0]
    affine[:3, 2] = columns * spacing_N2[0, 1]
    affine[:3, 3] = position_N3[0]
    return Stack(tuple(group[i] for i in order), affine, tilt_deg)


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


def _irregular(step_mm: NDArray[np.float64]) -> Refusal:
    """Names what keeps ordered slices from being a grid."""
    in_slices = step_mm / float(np.median(step_mm))
    missing = int(np.round(in_slices).sum() - len(in_slices))
    if missing > 0 and np.allclose(in_slices, np.round(in_slices), rtol=0, atol=2 * SPACING_RTOL):
        return Refusal(RefusalCode.GAP, f"{missing} slice(s) inside this series are missing; export it again.")
    return Refusal(
        RefusalCode.MIXED_SPACING,
        f"The distance between the slices varies from {step_mm.min():.2f} to {step_mm.max():.2f} mm.",
    )


def _check_thinned(group: Sequence[Header], distance_mm: float) -> None:
    """Refuses even distances that are even only because slices are missing everywhere.

    A stack of every second slice is as even as the whole one, and two slices always are; the header may know better.
    """
    between_mm = group[0].between_mm
    in_slices = distance_mm / between_mm if between_mm else 1.0
    if round(in_slices) > 1 and abs(in_slices - round(in_slices)) < 2 * SPACING_RTOL * in_slices:
        raise Refusal(
            RefusalCode.GAP,
            f"The slices are {round(in_slices)} times as far apart as the header says; the ones between are missing.",
        )
    if len(group) == 2 and not (
        abs(in_slices - 1) < 2 * SPACING_RTOL if between_mm else distance_mm < 1.5 * group[0].thickness_mm
    ):
        raise Refusal(
            RefusalCode.GAP,
            f"Two slices alone, {distance_mm:.2f} mm apart, and the header does not say that none is missing between.",
        )
