"""Which part of a network is trained over a backbone that stays as its weights file has it.

`head`: the classification layer. `norm_bias`: also every bias and every scale of a norm (Ben Zaken et al. 2022,
BitFit). `lora`: also a low-rank addition to the weight of every linear layer and ungrouped convolution, whose
first factor is random, fixed and the same at every site, and whose second starts at zero and is trained
(Sun et al. 2024, FFA-LoRA): the mean of the sites' second factors is then the mean of their additions, and noise
enters in one factor only. What is frozen neither crosses the wire nor needs noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from common.config import ModelConfig
from common.errors import ConfigError


def adapt(model: nn.Module, config: ModelConfig, heads: tuple[str, ...]) -> None:
    """Freezes what `model.trainable` does not name, in place; draws from torch's CPU generator for `lora`.

    Args:
        heads: Prefixes of the classification layer's names, each with its dot.

    Raises:
        ConfigError: The network has nothing of the kind.
    """
    if not heads:
        raise ConfigError(
            f"model.trainable: this network has no classification layer to train, got {config.trainable}; use all"
        )
    for name, value in model.named_parameters():
        kept = name.startswith(heads) or (config.trainable == "norm_bias" and value.ndim == 1)
        value.requires_grad_(value.requires_grad and kept)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not f"{name}.".startswith(heads):
            # A frozen batch norm in training mode would still learn the statistics of private images.
            module.train = MethodType(_stay_in_evaluation, module)  # type: ignore[method-assign]
            module.train()
    if config.trainable == "lora":
        _add_low_rank(model, config.lora_rank, heads)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module's running statistics are frozen and therefore stay where they are."""
    return "train" in vars(module)


def merge(model: nn.Module) -> None:
    """Adds every low-rank product to its weight, in place: the network is of its plain classes again."""
    for module in _adapted(model):
        with torch.no_grad():
            addition = module.lora_up.flatten(1) @ module.lora_down.flatten(1)
            module.weight.add_(addition.view_as(module.weight))
        del module.lora_up, module.lora_down
        module.__class__ = type(module).__bases__[1]


def _add_low_rank(model: nn.Module, rank: int, heads: tuple[str, ...]) -> None:
    for name, module in list(model.named_modules()):
        kind = _WITH_LOW_RANK.get(type(module))
        if kind is None or f"{name}.".startswith(heads) or getattr(module, "groups", 1) > 1:
            continue
        weight: torch.Tensor = module.weight
        inputs = weight[0].numel()
        if rank >= min(len(weight), inputs):  # the addition would be larger than the layer
            continue
        down = torch.randn(rank, *weight.shape[1:]) / math.sqrt(inputs)
        module.lora_down = nn.Parameter(down, requires_grad=False)
        module.lora_up = nn.Parameter(torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2)))
        module.__class__ = kind
    if not any(True for _ in _adapted(model)):
        raise ConfigError(
            f"model.lora_rank: {rank} is too large for every layer of this network; choose a smaller one, or another "
            "model.trainable"
        )


def _adapted(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, _LowRank))


class _LowRank:
    """Marks a layer with a low-rank addition; the plain class is the second base."""


class _Linear(_LowRank, nn.Linear):
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + functional.linear(functional.linear(input, self.lora_down), self.lora_up)


class _Convolution(_LowRank):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        low = layer._conv_forward(input, layer.lora_down, None)
        up = (functional.conv1d, functional.conv2d, functional.conv3d)[input.ndim - 3]
        return super().forward(input) + up(low, layer.lora_up)  # type: ignore[no-any-return, misc]


class _Conv1d(_Convolution, nn.Conv1d):
    pass


class _Conv2d(_Convolution, nn.Conv2d):
    pass


class _Conv3d(_Convolution, nn.Conv3d):
    pass


_WITH_LOW_RANK: dict[type, type] = {
    nn.Linear: _Linear, nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d
}  # fmt: skip


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
