"""Smoothing, resampling, resizing, cropping and padding of an image, one axis after the other.

Each of these steps treats every axis by itself, so whatever a recipe asks for is one sparse matrix an axis, made once.
A volume goes through slice by slice and nothing of its size is allocated. The results are MONAI's `GaussianSmooth`,
`Spacing`, `Resize` and `ResizeWithPadOrCrop` (a test compares them); its convolutions hold 24 times the volume. scipy
multiplies sparse matrices in one thread and one order, so the bits do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import erf

Matrix: TypeAlias = Any
"""scipy.sparse.csr_array (out, in)."""

_SAME_MM = 1e-3
"""Spacings that differ by less are equal, as in MONAI."""
_SAME_RATIO = 1e-3
_LEAST_SIGMA = 0.1
_TAIL = 4.0


@dataclass(frozen=True)
class Grid:
    """How the voxels of an image lie, and how those of the result shall lie, axis by axis."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    ratio: tuple[float, ...] | None = None
    """Wanted spacing over the image's; None: the image's stays."""
    same: tuple[bool, ...] = ()
    """Axes whose spacing is the wanted one already."""
    fit: str = "resize"
    """resize, or crop_pad."""

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        size: Sequence[int],
        spacing_mm: Sequence[float],
        wanted_mm: Sequence[float] | None,
        fit: str,
    ) -> Grid:
        """With spacings along the axes; `wanted_mm` None keeps them."""
        ratio = None if wanted_mm is None else np.asarray(wanted_mm) / np.asarray(spacing_mm)
        if ratio is None or np.allclose(ratio, 1, rtol=_SAME_RATIO):
            return cls(tuple(shape), tuple(size), fit=fit)
        same = np.abs(np.asarray(wanted_mm) - np.asarray(spacing_mm)) <= _SAME_MM
        return cls(tuple(shape), tuple(size), tuple(map(float, ratio)), tuple(map(bool, same)), fit)

    @property
    def between(self) -> tuple[int, ...]:
        """Voxels after the change of spacing."""
        if self.ratio is None:
            return self.shape
        return tuple(
            count if same else int(np.round((count - 1) / ratio + 1))
            for count, ratio, same in zip(self.shape, self.ratio, self.same, strict=True)
        )

    def matrices(self) -> list[Matrix | None]:
        """One for each axis; None leaves the axis as it is. Images that lie alike share them."""
        return list(_matrices(self))

    def _made(self) -> list[Matrix | None]:
        between = self.between
        first: list[Matrix | None] = [None] * len(self.shape)
        if self.ratio is not None:
            sigmas = widths(self.ratio)
            for axis, (count, ratio, same) in enumerate(zip(self.shape, self.ratio, self.same, strict=True)):
                matrix = None if same else _interpolating(count, np.arange(between[axis], dtype=np.float64) * ratio)
                first[axis] = _smoothed(matrix, count, sigmas[axis])
        if between == self.size:
            return first
        sigmas = widths([n / m for n, m in zip(between, self.size, strict=True)])
        return [
            _after(self._fitting(between[axis], self.size[axis], sigmas[axis]), first[axis])
            for axis in range(len(self.shape))
        ]

    def _fitting(self, count: int, size: int, sigma: float) -> Matrix | None:
        if self.fit == "crop_pad":
            if count == size:
                return None
            at = np.arange(size) + (count // 2 - size // 2 if count > size else -((size - count) // 2))
            inside = (at >= 0) & (at < count)
            rows = np.flatnonzero(inside)
            return sparse.csr_array((np.ones(len(rows)), (rows, at[inside])), shape=(size, count))
        # torch's align_corners=False: pixels are areas
        middle = (np.arange(size, dtype=np.float64) + 0.5) * (count / size) - 0.5
        return _smoothed(None if count == size else _interpolating(count, middle), count, sigma)


@lru_cache(maxsize=32)
def _matrices(grid: Grid) -> tuple[Matrix | None, ...]:
    return tuple(grid._made())


def widths(ratio: Sequence[float]) -> NDArray[np.float64]:
    """Standard deviations in voxels of the low-pass before sampling `ratio` times coarser, as scikit-image has them."""
    sigmas = np.maximum((np.asarray(ratio, float) - 1) / 2, 0)
    return sigmas if sigmas.max() >= _LEAST_SIGMA else np.zeros_like(sigmas)


def through(
    values: NDArray[np.float32], matrices: Sequence[Matrix | None], change: Callable[[Any], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The image after `change`, and then each axis through its matrix.

    Args:
        values: Two or three axes.
        matrices: Of each axis.
        change: What happens to the values first; called for one slice of a volume at a time.
    """
    ready = [None if each is None else each.astype(np.float32) for each in matrices]
    if values.ndim == 2:
        return _plane(change(values), ready[0], ready[1])
    out: NDArray[np.float32] | None = None
    for z, slice_YX in enumerate(values):
        made = _plane(change(slice_YX), ready[1], ready[2])
        if out is None:
            out = np.empty((len(values), *made.shape), np.float32)
        out[z] = made
    assert out is not None
    if ready[0] is None:
        return out
    found: NDArray[np.float32] = (ready[0] @ out.reshape(len(out), -1)).reshape(-1, *out.shape[1:])
    return found


def _plane(plane: NDArray[np.float32], rows: Matrix | None, columns: Matrix | None) -> NDArray[np.float32]:
    if rows is not None:
        plane = rows @ plane
    if columns is not None:
        plane = (columns @ np.ascontiguousarray(plane.T)).T
    return plane


def _interpolating(count: int, at: NDArray[np.float64]) -> Matrix:
    """Linear interpolation at these places; beyond the border stands its value."""
    at = np.clip(at, 0, count - 1)
    low = np.minimum(np.floor(at).astype(int), max(count - 2, 0))
    part = at - low
    rows = np.arange(len(at))
    high = np.minimum(low + 1, count - 1)
    return sparse.csr_array(
        (np.concatenate([1 - part, part]), (np.concatenate([rows, rows]), np.concatenate([low, high]))),
        shape=(len(at), count),
    )


def _smoothed(matrix: Matrix | None, count: int, sigma: float) -> Matrix | None:
    """A Gaussian before `matrix`; the image is surrounded by zeros."""
    if sigma == 0:
        return matrix
    # In float32, as MONAI has it: a spacing of 0.4 mm out of a tipped affine matrix ends a Gaussian where 0.4 mm does.
    tail = int(max(float(np.float32(sigma)) * _TAIL, 0.5) + 0.5)
    x, t = np.arange(-tail, tail + 1), np.sqrt(0.5) / sigma
    taps = np.maximum(0.5 * (erf(t * (x + 0.5)) - erf(t * (x - 0.5))), 0)
    near = np.abs(x) < count
    gauss = sparse.diags_array(list(taps[near]), offsets=list(x[near]), shape=(count, count), format="csr")
    return _after(matrix, gauss)


def _after(second: Matrix | None, first: Matrix | None) -> Matrix | None:
    if second is None or first is None:
        return first if second is None else second
    return second @ first
