"""Weight standardisation: every output channel of a convolution has weights of mean 0 and one length.

The weight that convolves is (w - mean) / sqrt(variance + eps) / sqrt(n) over the n input elements of each output
channel, so that it keeps the variance of what comes in (Qiao et al. 2019; the scale of Brock et al. 2021). What is
trained and exchanged is w, under its old name; `fold` writes the standardised weights into the plain network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.errors import ConfigError

_EPS = 1e-6


def standardise(model: nn.Module) -> None:
    """Standardises each convolution over more than one input element, in place; others are left alone.

    Raises:
        ConfigError: The network has no convolution of the kind, or one of a class of its own that this does not know.
    """
    found = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd) or module.weight[0].numel() == 1:
            continue
        if (kind := _STANDARDISED.get(type(module))) is None:
            raise ConfigError(
                f"model.norm: layer {name!r} is a {type(module).__name__}, which group_ws cannot standardise; use "
                "norm=group, or another network"
            )
        module.__class__ = kind  # the names of the state stay
        found += 1
    if not found:
        raise ConfigError("model.norm: group_ws finds no convolution in this network; use norm=group")


def fold(model: nn.Module) -> None:
    """Writes the weights that convolve in place of those that were trained: the network is of plain classes again."""
    for module in model.modules():
        if isinstance(module, _Standardised):
            weight: Any = module.weight
            with torch.no_grad():
                weight.copy_(standardised(weight))
            module.__class__ = type(module).__bases__[1]


def standardised(weight: torch.Tensor) -> torch.Tensor:
    """The weight that convolves, from the one that is trained, (Q, C / groups, ...)."""
    axes = tuple(range(1, weight.ndim))
    variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
    scale: float = weight[0].numel() ** -0.5
    return (weight - mean) * torch.rsqrt(variance + _EPS) * scale


class _Standardised:
    """Marks a layer; the plain class is the second base."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(input, standardised(weight), bias)  # type: ignore[misc, no-any-return]


class _Conv1d(_Standardised, nn.Conv1d):
    pass


class _Conv2d(_Standardised, nn.Conv2d):
    pass


class _Conv3d(_Standardised, nn.Conv3d):
    pass


_STANDARDISED: dict[type, type] = {nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}
