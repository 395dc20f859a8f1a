"""Text that is burned into the pixels: it may name the patient, and a model may learn to read it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from client.quality.hashes import shrunk

MIN_EDGE = 128
"""Smaller images are not examined: a letter would have three pixels."""
MIN_LETTERS = 4
"""Letters on one line that make a suspect; a side marker (R, L) is one or two."""
_MAX_EDGE = 1024
_MARGIN = 0.22
"""Share of the height at top and bottom in which text is looked for."""
_CONTRAST = 0.25
"""Of a stroke against what is around it, in units of the image's range."""
_LEAST_HEIGHT = 5
"""Of a letter, pixels."""


class _Box(NamedTuple):
    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


def letters(values_YX: npt.NDArray[np.float32]) -> int | None:
    """How many letter-like marks stand on the fullest line of the margins at top and bottom; None: image too small.

    Letter-like are thin, high-contrast marks, bright or dark, of similar height, next to each other.
    """
    if min(values_YX.shape) < MIN_EDGE:
        return None
    scale = max(1.0, max(values_YX.shape) / _MAX_EDGE)
    image = values_YX.astype(np.float32)
    if scale > 1:
        image = shrunk(image, tuple(round(length / scale) for length in image.shape))
    low, high = np.percentile(image, (0.1, 99.9))
    if high <= low:
        return 0
    image = np.clip((image - low) / (high - low), 0, 1)
    margin = round(_MARGIN * len(image))
    most = 0
    for strip in (image[:margin], image[-margin:]):
        for sign in (strip, 1 - strip):
            most = max(most, _fullest_line(_boxes(sign)))
    return most


def _boxes(strip: npt.NDArray[np.float32]) -> list[_Box]:
    """Bright marks that are thin: they vanish when opened by a square wider than a stroke."""
    height = len(strip)
    wide = max(5, round(0.05 * height) | 1)
    hat = strip - ndimage.grey_opening(strip, size=(wide, wide))
    marks, count = ndimage.label(hat > _CONTRAST, structure=np.ones((3, 3)))
    if not count:
        return []
    boxes = []
    filled = np.bincount(marks.ravel(), minlength=count + 1)[1:]
    for area, slices in zip(filled.tolist(), ndimage.find_objects(marks), strict=True):
        rows, columns = slices
        box = _Box(rows.start, rows.stop, columns.start, columns.stop)
        narrow = box.width < 0.4 * box.height  # I, l and 1 fill their box
        if not _LEAST_HEIGHT <= box.height <= 0.4 * height or box.width > 1.6 * box.height:
            continue
        if narrow or area < 0.9 * box.height * box.width:
            boxes.append(box)
    return boxes


def _fullest_line(boxes: list[_Box]) -> int:
    """The largest number of boxes of similar height on one base line, each near the one before it."""
    most = 0
    rest = sorted(boxes, key=lambda box: box.left)
    used: set[int] = set()
    for first, box in enumerate(rest):
        if first in used:
            continue
        line, last = 1, box
        for at in range(first + 1, len(rest)):
            other = rest[at]
            if other.left - last.right > 2.0 * last.height:
                if other.left - last.right > 8 * last.height:
                    break
                continue
            similar = 0.6 <= other.height / last.height <= 1.67
            level = abs(other.bottom - last.bottom) <= 0.3 * last.height
            if similar and level and other.left >= last.right - 0.3 * last.width:
                line, last = line + 1, other
                used.add(at)
        most = max(most, line)
    return most
