"""Random changes of prepared inputs in training; needs nothing that reads images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from common.config import Augmentation, Preprocessing
from common.errors import ConfigError


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
        ConfigError: `data.swaps_sides`.
    """
    a = data.augmentation
    if not a.active:
        return None
    if why := data.swaps_sides(laterality_sensitive):
        raise ConfigError(why)
    # Resizing leaves no voxel of `spacing_mm`: what it then measures is each image's own, and commonly about equal.
    voxel = data.spacing_mm if data.fit == "crop_pad" else None
    return Augmenter(a, seed, background=(0.0 - data.mean) / data.std, voxel=voxel)
