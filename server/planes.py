"""A 3D network written as 2D convolutions over its planes, for the exported file.

onnxruntime has fast kernels for 2D convolutions on CPUs (blocked layout; 8-bit products), and none of them for 3D. A
3D convolution with k planes is a 2D convolution with k times the input channels: k neighbouring planes beside each
other. A volume (N, C, D, H, W) therefore travels as its planes (N * D, C, H, W); what a layer does to each number or to
each plane by itself stays as it is, and what needs the whole volume gets it whole.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

_EACH_NUMBER = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Dropout, nn.Identity)


def in_planes(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """The network in planes, or the network itself where it is not 3D or does something planes cannot follow.

    Args:
        network: In evaluation mode; it is copied.
        example: (2, C, D, H, W). Depths are fixed to those it meets; both ways must agree on it.
    """
    if not any(isinstance(layer, nn.Conv3d) for layer in network.modules()):
        return network
    planes = _Planes(copy.deepcopy(network))
    with torch.no_grad():
        try:
            depths, expected = _met(planes.network, example)
            _change(planes.network, depths)
            same = torch.allclose(planes(example), expected, rtol=1e-4, atol=1e-4)
        except (RuntimeError, ValueError, IndexError):  # shapes that do not meet, in whatever words the layer has
            return network
    return planes if same else network


class _Planes(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(_planes(x))
        return result


class _Conv(nn.Module):
    """A convolution over k planes at once."""

    planes_K: torch.Tensor

    def __init__(self, conv: nn.Conv3d, depth: int) -> None:
        super().__init__()
        out, into, self.k, *size = conv.weight.shape
        (step, *self.stride), (gap, *self.dilation) = conv.stride, conv.dilation
        assert not isinstance(conv.padding, str)
        self.pad, *self.padding = conv.padding
        self.depth = depth
        self.depth_out = (depth + 2 * self.pad - gap * (self.k - 1) - 1) // step + 1
        self.weight = nn.Parameter(conv.weight.transpose(1, 2).reshape(out, self.k * into, *size).contiguous())
        self.bias = conv.bias
        starts = step * torch.arange(self.depth_out)
        self.register_buffer("planes_K", (starts[:, None] + gap * torch.arange(self.k)).flatten())
        self.all = self.k == 1 and self.depth_out == depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels, height, width = x.shape[1:]
        if not self.all:
            x = x.reshape(-1, self.depth, channels, height, width)
            if self.pad:
                x = functional.pad(x, (0, 0, 0, 0, 0, 0, self.pad, self.pad))
            x = x.index_select(1, self.planes_K).reshape(-1, self.k * channels, height, width)
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class _MaxPool(nn.Module):
    """The largest number of each plane's neighbourhood, then of neighbouring planes."""

    def __init__(self, pool: nn.MaxPool3d, depth: int) -> None:
        super().__init__()
        (self.k, *size), (self.step, *stride), (self.pad, *padding) = (
            (given,) * 3 if isinstance(given, int) else given for given in (pool.kernel_size, pool.stride, pool.padding)
        )
        self.pool = nn.MaxPool2d(tuple(size), tuple(stride), tuple(padding))
        self.depth = depth
        self.last = (depth + 2 * self.pad - self.k) // self.step * self.step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(x)
        channels, height, width = x.shape[1:]
        x = x.reshape(-1, self.depth, channels, height, width)
        if self.pad:
            x = functional.pad(x, (0, 0, 0, 0, 0, 0, self.pad, self.pad), value=float("-inf"))
        best = x[:, : self.last + 1 : self.step]
        for i in range(1, self.k):
            best = torch.maximum(best, x[:, i : i + self.last + 1 : self.step])
        return best.reshape(-1, channels, height, width)


class _Whole(nn.Module):
    """A layer that sees its volume as it was."""

    def __init__(self, layer: nn.Module, depth: int) -> None:
        super().__init__()
        self.layer, self.depth = layer, depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        volume = x.reshape(-1, self.depth, *x.shape[1:]).transpose(1, 2)
        result: torch.Tensor = self.layer(volume)
        return _planes(result) if result.dim() == 5 else result


def _planes(volume: torch.Tensor) -> torch.Tensor:
    return volume.transpose(1, 2).reshape(-1, volume.shape[1], *volume.shape[3:])


def _met(network: nn.Module, example: torch.Tensor) -> tuple[dict[nn.Module, int], torch.Tensor]:
    """How deep the volume is that each layer is given, and what the network gives.

    Layers that are given something else are left out.
    """
    depths: dict[nn.Module, int] = {}

    def note(layer: nn.Module, given: tuple[torch.Tensor, ...], _: object) -> None:
        if given and isinstance(given[0], torch.Tensor) and given[0].dim() == 5:
            depth = given[0].shape[2]
            if depths.setdefault(layer, depth) != depth:
                raise ValueError("a layer that is used at two depths")

    leaves = (layer for layer in network.modules() if not [*layer.children()] and not isinstance(layer, _EACH_NUMBER))
    hooks = [layer.register_forward_hook(note) for layer in leaves]
    try:
        result: torch.Tensor = network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return depths, result


def _change(network: nn.Module, depths: dict[nn.Module, int]) -> None:
    for name, layer in network.named_children():
        if layer in depths:
            setattr(network, name, _changed(layer, depths[layer]))
        else:
            _change(layer, depths)


def _changed(layer: nn.Module, depth: int) -> nn.Module:
    if isinstance(layer, nn.BatchNorm3d):
        flat = nn.BatchNorm2d(layer.num_features, layer.eps, affine=layer.affine)
        flat.load_state_dict(layer.state_dict())
        return flat.eval()
    if isinstance(layer, nn.Conv3d) and layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same":
        return _Conv(layer, depth)
    if isinstance(layer, nn.MaxPool3d) and layer.dilation == 1 and not (layer.ceil_mode or layer.return_indices):
        return _MaxPool(layer, depth)
    return _Whole(layer, depth)
