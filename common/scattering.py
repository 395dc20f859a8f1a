"""Fixed features that are learnt from nobody's patients: the wavelet scattering of an image or a volume.

Oriented Morlet wavelets at two scales, the modulus of what they find, and a local mean: maps of how much there is of
each direction and scale in each place. The filters follow from formulas, so under differential privacy all of the
budget goes into the few numbers that are trained on top; with few patients that beats every network that must
learn its filters through the noise.

Source: Bruna and Mallat 2013 (scattering); Tramer and Boneh 2021, "Differentially private learning needs better
features" (why, and the group norm before the linear layer).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import nn

_SCALES = 2
_SIGMA = 0.8
"""Voxels: half the width of the smallest wavelet's envelope; twice that at the second scale."""
_ORIENTATIONS = 8
"""In 2D, over half a turn."""
_FLOOR = 1e-12
"""Under the root of the modulus, whose slope at zero is infinite; nothing is trained below it, but exports differ."""


class Scattering(nn.Module):
    """(B, 1, *size) -> (B, `channels`, *size / 4), without a parameter and without a buffer that is exchanged.

    Channels: the local mean; each scale and direction; in 2D also each direction of the second scale in what each of
    the first has found. In 3D the first order alone: the second takes several times as long.
    """

    def __init__(self, dimensions: int) -> None:
        """Computes the filters.

        Args:
            dimensions: 2 (8 directions) or 3 (6: through the corners of an icosahedron).
        """
        super().__init__()
        self.dimensions = dimensions
        axes = _directions(dimensions)
        self.second_order = dimensions == 2
        for scale in range(_SCALES):
            self.register_buffer(f"wavelets{scale}", _wavelets(scale, axes, dimensions), persistent=False)
        low = _gaussian(_SIGMA * 2 ** (_SCALES - 1), dimensions)
        self.register_buffer("low", low, persistent=False)
        second = (len(axes) ** 2,) if self.second_order else ()
        self.kinds: tuple[int, ...] = (1, *(len(axes),) * _SCALES, *second)
        """Channels of each kind, in their order: the local mean, each scale, the second order."""
        self.channels = sum(self.kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The features; float32 in and out."""
        fine = self._modulus(x, 0)
        coarse = self._modulus(x, 1)
        maps = [self._mean(x, 4), self._mean(fine, 4), self._mean(coarse, 2)]
        if self.second_order:
            maps.append(self._mean(self._modulus(fine, 1), 2))
        return torch.cat(maps, dim=1)

    def _modulus(self, x: torch.Tensor, scale: int) -> torch.Tensor:
        """(B, C, ...) -> (B, C x directions, ... / stride): every second place is enough for the wider wavelet."""
        both = self._filtered(x, self.get_buffer(f"wavelets{scale}"), 2**scale)
        real, imaginary = both.unflatten(1, (x.shape[1], 2, -1)).unbind(2)
        return torch.sqrt(real.square() + imaginary.square() + _FLOOR).flatten(1, 2)

    def _mean(self, x: torch.Tensor, stride: int) -> torch.Tensor:
        """The weighted mean around every fourth voxel of the image."""
        low = self.get_buffer("low")
        if stride == 2:  # on the coarser grid the same width is half as many steps
            every = torch.arange(low.shape[-1] // 2 % 2, low.shape[-1], 2, device=low.device)
            for axis in range(2, 2 + self.dimensions):
                low = low.index_select(axis, every)
            low = low / low.sum()
        return self._filtered(x, low, stride)

    def _filtered(self, x: torch.Tensor, filters: torch.Tensor, stride: int) -> torch.Tensor:
        """Each channel with each filter: (B, C, ...) -> (B, C x filters, ... / stride)."""
        convolve: Callable[..., torch.Tensor] = functional.conv2d if self.dimensions == 2 else functional.conv3d
        reach = filters.shape[-1] // 2
        alone = x.flatten(0, 1).unsqueeze(1)
        padded = functional.pad(alone, (reach,) * (2 * self.dimensions), mode="replicate")
        found: torch.Tensor = convolve(padded, filters, stride=stride)
        return torch.flatten(found.unflatten(0, x.shape[:2]), 1, 2)


def scattered(x_N: npt.NDArray[np.float32], batch: int = 64) -> npt.NDArray[np.float32]:
    """The features of samples (N, 1, *size), in memory."""
    features = Scattering(x_N[:1].ndim - 2)
    with torch.inference_mode():
        parts = [
            features(torch.from_numpy(np.array(x_N[np.arange(at, min(at + batch, len(x_N)))]))).numpy()
            for at in range(0, len(x_N), batch)
        ]
    return np.concatenate(parts)


class _NormByKind(nn.Module):
    """Each kind of map to mean 0 and variance 1 over a sample, so that no kind drowns another; without parameters."""

    def __init__(self, kinds: tuple[int, ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([functional.group_norm(part, 1) for part in x.split(self.kinds, dim=1)], dim=1)


class ScatteringClassifier(nn.Module):
    """Scattering, a norm over each sample without parameters, and what is trained."""

    def __init__(
        self,
        size: Sequence[int],
        outputs: int,
        *,
        hidden: int,
        norm: Literal["all", "kind", "channel"],
        dropout: float,
    ) -> None:
        """Makes the layers.

        Args:
            size: Of the image.
            hidden: Channels of the two convolutions before the linear layer; 0 for the linear layer alone.
            norm: What the first norm takes together: all channels; those of a kind, which forgets how much one kind is
                against another; each alone, which forgets how strong a direction is too and keeps where it is.
        """
        super().__init__()
        dimensions = len(size)
        features = Scattering(dimensions)
        places = [math.ceil(edge / 4) for edge in size]
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        groups = features.channels if norm == "channel" else 1
        layers: list[nn.Module] = [
            _NormByKind(features.kinds) if norm == "kind" else nn.GroupNorm(groups, features.channels, affine=False)
        ]
        width = features.channels
        if hidden:
            pool = nn.AvgPool2d if dimensions == 2 else nn.AvgPool3d
            for _ in range(2):
                layers += [
                    convolution(width, hidden, 3, padding=1, bias=False),
                    nn.GroupNorm(max(1, hidden // 4), hidden),
                    nn.ReLU(),
                ]
                width = hidden
            layers.append(pool(2, ceil_mode=False))
            places = [max(1, edge // 2) for edge in places]
        layers += [nn.Flatten(), nn.Dropout(dropout)]
        self.features = features
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(width * math.prod(places), outputs)
        self.scale = 1.0
        if not hidden:
            # Features of about unit length, so that a clip norm near one is near the gradient, and the bias as small as
            # one feature: at its own length it would fill half of each clipped gradient, and it ranks nobody. From
            # zero, for what random weights say of an image outlasts the few steps that a small site can pay for.
            self.scale = self.fc.in_features**-0.5
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, of images or of their features where somebody has them already."""
        maps = x if x.shape[1] == self.features.channels else self.features(x)
        logits: torch.Tensor = self.fc(self.body(maps)) * self.scale
        return logits


def _directions(dimensions: int) -> torch.Tensor:
    """(directions, dimensions) unit vectors, one of each opposite pair."""
    if dimensions == 2:
        angle = torch.arange(_ORIENTATIONS, dtype=torch.float64) * math.pi / _ORIENTATIONS
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0.0, 1.0, sign * golden) for sign in (1, -1)]
    turned = [tuple(corner[(axis + turn) % 3] for axis in range(3)) for corner in corners for turn in range(3)]
    vectors = torch.tensor(turned, dtype=torch.float64)
    return vectors / vectors.square().sum(dim=1, keepdim=True).sqrt()


def _wavelets(scale: int, directions: torch.Tensor, dimensions: int) -> torch.Tensor:
    """(2 x directions, 1, ...): real parts, then imaginary ones; each sums to zero."""
    sigma, frequency = _SIGMA * 2**scale, 3 * math.pi / 4 / 2**scale
    slant = 0.5 if dimensions == 2 else 0.6
    grid = _grid(math.ceil(3 * sigma), dimensions)
    real, imaginary = [], []
    for direction in directions:
        along = grid @ direction
        across = grid.square().sum(-1) - along.square()
        envelope = torch.exp(-(along.square() + slant**2 * across) / (2 * sigma**2))
        wave = envelope * torch.cos(frequency * along)
        real.append((wave - envelope * wave.sum() / envelope.sum()) / envelope.sum())
        imaginary.append(envelope * torch.sin(frequency * along) / envelope.sum())
    return torch.stack([*real, *imaginary]).unsqueeze(1).float()


def _gaussian(sigma: float, dimensions: int) -> torch.Tensor:
    """(1, 1, ...) that sums to one."""
    weight = torch.exp(-_grid(math.ceil(3 * sigma), dimensions).square().sum(-1) / (2 * sigma**2))
    return (weight / weight.sum())[None, None].float()


def _grid(reach: int, dimensions: int) -> torch.Tensor:
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return torch.stack(torch.meshgrid(*itertools.repeat(axis, dimensions), indexing="ij"), dim=-1)
