"""From a volume or image to the model's input.

`prepare` is the only way into a model: training, central evaluation and prediction with an exported file share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from common.config import Preprocessing
from common.errors import DataError
from common.imaging.resample import Grid, through
from common.imaging.volume import Image, Volume

MAX_VOXELS = 2**29
"""After resampling: 2 GiB, an 800 mm cube at 1 mm."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def prepare(item: Volume | Image, data: Preprocessing) -> NDArray[np.float32]:
    """Brings a volume or image into the recipe's intensity, orientation, spacing and size.

    Intensity comes first, on the values as acquired: clipping before interpolation keeps metal and padding from
    bleeding into their surroundings, and percentiles do not depend on the grid. Percentiles are over all pixels,
    where padding counts as the smallest value. A constant image becomes 0 everywhere. Shrinking is preceded by
    Gaussian smoothing, so that fine structure does not alias.

    Args:
        item: A volume for three sizes, an image for two.
        data: The recipe's preprocessing.

    Returns:
        float32 (1, *data.size); volumes as (1, slice, row, column) along `data.orientation`.

    Raises:
        DataError: The dimensions differ from the recipe's, a spacing is asked for and the image has none, or the
            resampled grid would not fit into memory.
    """
    if isinstance(item, Volume):
        values, affine = item.values_ZYX, _LPS_TO_RAS @ item.affine
    else:
        values, affine = item.values_YX, np.diag([*(item.spacing_mm or (1.0, 1.0)), 1.0, 1.0])
    if values.ndim != len(data.size):
        raise DataError(
            f"a {values.ndim}D {type(item).__name__.lower()} cannot become an input of size {data.size}; "
            f"choose a recipe with task.dimensions={values.ndim}"
        )
    if data.spacing_mm is not None and isinstance(item, Image) and item.spacing_mm is None:
        raise DataError(
            f"the recipe resamples to {data.spacing_mm} mm but the image has no pixel spacing; "
            "set data.spacing_mm=null or leave the image out"
        )
    order, flipped = tuple(range(values.ndim)), (False,) * values.ndim
    spacing_mm = np.linalg.norm(affine[: values.ndim, : values.ndim], axis=0)
    if isinstance(item, Volume) and data.orientation != "source":
        order, flipped = _turn(affine, data.orientation)
    shape, size = values.shape, [data.size[axis] for axis in order]
    wanted_mm = None if data.spacing_mm is None else [data.spacing_mm[axis] for axis in order]
    if wanted_mm is not None:
        voxels = float(np.prod(np.array(shape) * spacing_mm / np.array(wanted_mm)))
        if voxels > MAX_VOXELS:  # a header may claim voxels of a metre
            raise DataError(f"resampling to {data.spacing_mm} mm would make {voxels:.3g} voxels; check the spacing")
    matrices = Grid.of(shape, size, spacing_mm.tolist(), wanted_mm, data.fit).matrices()
    # backwards before the matrix, which may not treat both ends alike
    turned = np.flip(values, tuple(axis for axis, back in enumerate(flipped) if back))
    x = through(turned, matrices, _scaling(values, data)).transpose(np.argsort(order))
    return np.ascontiguousarray(((x - data.mean) / data.std)[None], dtype=np.float32)


def _turn(affine: NDArray[np.float64], wanted: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Which axis of the wanted orientation each axis becomes, and whether it runs backwards there.

    Args:
        affine: (slice, row, column) -> mm, RAS.
        wanted: Direction of growing (column, row, slice).
    """
    found = orientations.ornt_transform(  # type: ignore[no-untyped-call]
        orientations.io_orientation(affine),  # type: ignore[no-untyped-call]
        orientations.axcodes2ornt(tuple(wanted[::-1]), labels=_LABELS),  # type: ignore[no-untyped-call]
    )
    return tuple(int(axis) for axis in found[:, 0]), tuple(bool(sign < 0) for sign in found[:, 1])


def _scaling(values: NDArray[np.float32], data: Preprocessing) -> Callable[[Any], NDArray[np.float32]]:
    """What brings values into [0, 1]."""
    low, high = data.low, data.high
    if data.intensity == "percentile":
        low, high = (float(v) for v in np.percentile(values, [low, high]))
        if low >= high:
            low, high = float(values.min()), float(values.max())

    def scaled(part: NDArray[np.float32]) -> NDArray[np.float32]:
        if low >= high:
            return np.zeros(part.shape, np.float32)
        made = np.subtract(part, np.float32(low), dtype=np.float32)
        made /= np.float32(high - low)
        return np.clip(made, 0, 1, out=made)

    return scaled
