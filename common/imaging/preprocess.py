"""From a volume or image to the model's input, and random changes of inputs in training.

`prepare` is the only way into a model: training, central evaluation and prediction with an exported file share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nibabel import orientations
from numpy.typing import NDArray
from torch.nn import functional

from common.config import Augmentation, Preprocessing
from common.errors import ConfigError, DataError
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


@dataclass
class Augmenter:
    """Random changes of prepared batches: with `probability` each sample is moved and its intensities changed.

    One batched resampling instead of MONAI's transforms, which work sample by sample: 32 images of 28 x 28 took
    RandAffine and RandFlip 27 ms on one CPU core and take this 2 ms, and MONAI's draws go through global state
    unless each transform is seeded by hand. No global generator is read or advanced; the draws, noise included, are
    made on the CPU, so a GPU gets the same ones.
    """

    settings: Augmentation
    seed: int
    background: float = 0.0
    """Value of black after normalisation: what comes into view from outside."""
    voxel: tuple[float, ...] | None = None
    """Relative voxel edges along the axes; None: equal. Rotations are rigid in these units."""
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def __call__(self, x_BC: torch.Tensor) -> torch.Tensor:
        """Changed copies of (B, C, *size), on the same device; the input is left as it is."""
        a, batch, size = self.settings, len(x_BC), tuple(x_BC.shape[2:])
        # all is drawn whatever is switched on, so that one setting does not change the draws of another
        hit_BK = self._random.uniform(size=(batch, 7)) < a.probability
        draw_BK = self._random.uniform(-1, 1, size=(batch, 6 + len(size)))
        noise_seed = int(self._random.integers(2**63))
        x_BC = self._moved(x_BC, _matrices(a, hit_BK, draw_BK, size, self.voxel))
        wide = (batch, *[1] * (x_BC.ndim - 1))

        def per_sample(values_B: NDArray[np.float64]) -> torch.Tensor:
            return torch.from_numpy(values_B).to(x_BC).view(wide)

        if a.intensity_scale or a.intensity_shift:
            scale_B = 1 + a.intensity_scale * hit_BK[:, 4] * draw_BK[:, 0]
            x_BC = x_BC * per_sample(scale_B) + per_sample(a.intensity_shift * hit_BK[:, 5] * draw_BK[:, 1])
        if a.noise_std:
            generator = torch.Generator().manual_seed(noise_seed)  # on the CPU: the same noise on every device
            noise = torch.randn(x_BC.shape, generator=generator).to(x_BC)
            x_BC = x_BC + noise * per_sample(a.noise_std * hit_BK[:, 6].astype(np.float64))
        return x_BC

    def _moved(self, x_BC: torch.Tensor, theta_B: NDArray[np.float64]) -> torch.Tensor:
        still = np.eye(*theta_B.shape[1:])
        rows = np.flatnonzero((theta_B != still).any(axis=(1, 2)))
        x_BC = x_BC.clone()
        if rows.size:
            index = torch.from_numpy(rows).to(x_BC.device)
            # outside the picture is black, which is not 0 after normalisation
            x = x_BC[index] - self.background
            grid = functional.affine_grid(torch.from_numpy(theta_B[rows]).to(x), list(x.shape), align_corners=False)
            x_BC[index] = functional.grid_sample(x, grid, padding_mode="zeros", align_corners=False) + self.background
        return x_BC


def _matrices(
    a: Augmentation,
    hit_BK: NDArray[np.bool_],
    draw_BK: NDArray[np.float64],
    size: tuple[int, ...],
    voxel: tuple[float, ...] | None,
) -> NDArray[np.float64]:
    """Output to input coordinates (B, axes, axes + 1) as torch wants them: column first, each axis [-1, 1]."""
    axes = len(size)
    extent = np.array(size[::-1]) * np.array(voxel[::-1] if voxel else [1.0] * axes)
    linear_B = np.tile(np.eye(axes), (len(hit_BK), 1, 1))
    # the first angle turns in the plane of (column, row)
    for k, (i, j) in enumerate([(0, 1)] if axes == 2 else [(0, 1), (0, 2), (1, 2)]):
        angle_B = np.radians(a.rotate_deg) * hit_BK[:, 2] * draw_BK[:, 3 + k]
        turn_B = np.tile(np.eye(axes), (len(hit_BK), 1, 1))
        turn_B[:, i, i] = turn_B[:, j, j] = np.cos(angle_B)
        turn_B[:, i, j], turn_B[:, j, i] = -np.sin(angle_B), np.sin(angle_B)
        linear_B = linear_B @ turn_B
    linear_B = linear_B / (1 + a.zoom_fraction * hit_BK[:, 3] * draw_BK[:, 2])[:, None, None]
    linear_B[hit_BK[:, 0] & a.flip_left_right, :, 0] *= -1
    linear_B[hit_BK[:, 1] & a.flip_up_down, :, 1] *= -1
    # rigid in millimetres, not in units of each axis
    linear_B = linear_B * extent[None, None, :] / extent[None, :, None]
    shift_B = 2 * a.shift_fraction * hit_BK[:, 3:4] * draw_BK[:, 6:]
    return np.concatenate([linear_B, shift_B[:, :, None]], axis=2)


def augmentation(data: Preprocessing, laterality_sensitive: bool, *, seed: int = 0) -> Augmenter | None:
    """The recipe's random changes of training batches, or None if it has none.

    Raises:
        ConfigError: A left-right flip where sides matter, or where the column axis need not run left-right.
    """
    a = data.augmentation
    if not a.active:
        return None
    if a.flip_left_right and laterality_sensitive:
        raise ConfigError(
            "data.augmentation.flip_left_right is true but the task is laterality_sensitive; turn one off"
        )
    if a.flip_left_right and len(data.size) == 3 and data.orientation == "source":
        raise ConfigError("data.augmentation.flip_left_right needs data.orientation=LPS or RAS for volumes, got source")
    return Augmenter(a, seed, background=(0.0 - data.mean) / data.std, voxel=data.spacing_mm)
