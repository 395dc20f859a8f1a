"""Gantry tilt: slices that were stacked askew, resampled to a straight stack."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_TILT_DEG = 45.0
"""No gantry tilts by more than 30 degrees."""


def straightened_shape(affine: NDArray[np.float64], shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Slices, rows and columns of the straight stack, which holds every tilted slice as a whole."""
    slices, rows, columns = shape
    down, right = np.ceil(np.abs((slices - 1) * _shear(affine))).astype(int)
    return slices, rows + int(down), columns + int(right)


def straighten(
    values_ZYX: NDArray[np.float32], affine: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Shifts every slice within its plane, by linear interpolation, until the stack is upright.

    Args:
        values_ZYX: Evenly spaced parallel slices.
        affine: Theirs, with a first column that is not along the normal.

    Returns:
        The values on a grid with larger planes, where nothing was measured the smallest value; and its affine, with
        the first column along the normal. Pixels, and so HU, keep their place in the patient.
    """
    shear, shape = _shear(affine), straightened_shape(affine, values_ZYX.shape)
    corner = np.floor(np.minimum(0.0, (len(values_ZYX) - 1) * shear))  # (row, column) of the new first pixel
    fill = values_ZYX.min()
    made_ZYX = np.empty(shape, dtype=np.float32)
    for z, values_YX in enumerate(values_ZYX):
        down, right = z * shear - corner
        made_ZYX[z] = _shifted(_shifted(values_YX, down, shape[1], fill).T, right, shape[2], fill).T
    made = affine.copy()
    made[:3, 0] -= affine[:3, 1:3] @ shear
    made[:3, 3] += affine[:3, 1:3] @ corner
    return made_ZYX, made


def _shear(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, columns) by which each slice is shifted against the one before."""
    plane = affine[:3, 1:3]
    return np.asarray(np.linalg.lstsq(plane, affine[:3, 0], rcond=None)[0], dtype=np.float64)


def _shifted(values: NDArray[np.float32], by: float, length: int, fill: np.float32) -> NDArray[np.float32]:
    """The lines of `values`, `by` lines further down in an array of `length` lines."""
    whole = int(np.floor(by + 1e-6))
    part = np.float32(max(0.0, by - whole))
    made = np.full((length, values.shape[1]), fill, dtype=np.float32)
    end = min(length, whole + len(values))
    made[whole:end] = values[: end - whole]
    if part > 1e-6:
        above = np.full_like(made, fill)
        end = min(length, whole + 1 + len(values))
        above[whole + 1 : end] = values[: end - whole - 1]
        made += part * (above - made)
    return made
