"""Per-sample weight gradients, or their squared norms alone, of convolutions and linear layers.

For one record, with u_t the input that output position t sees and g_t the gradient there, the weight's
gradient is the sum over t of g_t u_t^T. It is formed for every record where that is small, else only its
squared norm is taken, the sum over s, t of <u_s, u_t> <g_s, g_t> (Gram norm). Which one is decided by a
count of operations and bytes from the shapes, never by timing: equal runs must take equal ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

_KEPT_BYTES = 64 << 20  # of one layer's gradients, all records; more is never kept
_GROUPED_BYTES = 32 << 20  # one grouped convolution for all records thrashes the cache beyond this
_GRAM_BYTES = 8 << 20  # Gram matrices of as many records at once as fit a cache


@dataclass(frozen=True)
class _Machine:
    """Cost of moving a byte and of a call, in floating-point operations."""

    byte: float
    call: float


# CPU: 60 GFLOP/s, 10 GB/s and 30 us a call, measured on one core with AVX-512; what counts are the ratios.
_CPU = _Machine(byte=6.0, call=2e6)
# GPU: 15 TFLOP/s, 2 TB/s and 10 us a launch; not measured here.
_GPU = _Machine(byte=7.5, call=1.5e8)


@dataclass(frozen=True)
class Shape:
    """The fixed numbers of a convolution of any dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Shape | None:
        """From the arguments of `torch.nn.functional.conv*d`; None where the padding is not symmetric."""
        kernel = tuple(weight.shape[2:])
        stride, dilation = _each(stride, kernel), _each(dilation, kernel)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):
                return None
            padding = [t // 2 for t in total]
        return cls(kernel, stride, _each(padding, kernel), dilation, groups)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.convolution(x, weight, bias, *self._numbers(self.groups))

    def input_gradient(self, x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gx: torch.Tensor = self._backward(gy, x, weight, self.groups, [True, False, False])[0]
        return gx

    def weight_gradient(
        self, x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, *, groups: int | None = None
    ) -> torch.Tensor:
        """Summed over the records."""
        gradient: torch.Tensor = self._backward(gy, x, weight, groups or self.groups, [False, True, False])[1]
        return gradient

    def _backward(self, gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, groups: int, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(gy, x, weight, None, *self._numbers(groups), mask)

    def _numbers(self, groups: int) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.kernel), groups


def same_padding(weight: torch.Tensor, dilation: Any) -> list[int]:
    """For `torch.nn.functional.pad`, what padding='same' means: the odd one goes to the end, as in torch."""
    kernel = tuple(weight.shape[2:])
    total = [d * (k - 1) for d, k in zip(_each(dilation, kernel), kernel, strict=True)]
    return [n for t in reversed(total) for n in (t // 2, t - t // 2)]


def convolution_gradients(
    x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, *, views: int = 1, method: str | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of a convolution's weight for every patient, or only their squared norms.

    Args:
        x: Input, (B, C, ...); each `views` records are one patient, whose gradient is the sum over them.
        gy: Gradient of the output, (B, Q, ...).
        weight: (Q, C / groups, ...).
        shape: Of the convolution.
        method: One of `loop`, `grouped`, `unfold`, `gram` (of one view only), `norms`; None takes the cheapest.

    Returns:
        Either gradients (B / views, *weight.shape) and None, or None and squared norms (B / views,).
    """
    method = method or convolution_method(x, gy, weight, shape, views)
    if method == "gram":
        return None, _gram_squares(x, gy, shape)
    if method == "grouped":
        return _grouped(x, gy, weight, shape, views), None
    if method == "unfold":
        return _unfolded(x, gy, weight, shape, views), None
    one_by_one = (
        shape.weight_gradient(x[i : i + views], gy[i : i + views], weight) for i in range(0, len(x), views)
    )  # fmt: skip
    if method == "norms":
        return None, torch.stack([gradient.square().sum() for gradient in one_by_one])
    gradients = x.new_empty((len(x) // views, *weight.shape))
    for i, gradient in enumerate(one_by_one):
        gradients[i] = gradient
    return gradients, None


def convolution_method(x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, views: int = 1) -> str:
    """The cheapest way by a count of operations, bytes and calls."""
    machine = _CPU if x.device.type == "cpu" else _GPU
    records, positions = len(x), gy[0, 0].numel()
    flops = 2.0 * records * positions * weight.numel()  # of one pass that forms the gradients
    item = x.element_size()
    patients = records // views
    kept = float(patients * weight.numel() * item)
    padded = math.prod(n + 2 * p for n, p in zip(x.shape[2:], shape.padding, strict=True))
    squares = records * shape.groups * (2.0 * x[0, 0].numel() ** 2 * x.shape[1] + 2.0 * positions**2 * gy.shape[1])
    passes = 3 + 2 * sum(k for k in shape.kernel if k > 1)
    moved = records * shape.groups * item * (passes * float(padded) ** 2 + 3.0 * positions**2)
    unfolded = float(records * x.shape[1] * math.prod(shape.kernel) * positions * item)
    costs = {
        # these two need a second pass for the sum
        "gram": flops + squares / shape.groups + machine.byte * moved + 10 * machine.call,
        "norms": 2.4 * flops + machine.byte * kept + machine.call * patients,
    }
    if views > 1:  # the Gram matrix grows with the square of the views
        del costs["gram"]
    if kept <= _KEPT_BYTES:
        # 1.4: one record at a time uses the kernels less well
        costs["loop"] = 1.4 * flops + 3 * machine.byte * kept + machine.call * patients
        if unfolded <= _KEPT_BYTES:
            costs["unfold"] = flops + machine.byte * (3 * kept + 4 * unfolded) + 10 * machine.call
    if kept <= _GROUPED_BYTES and (shape.groups > 1 or weight.shape[1] > 4):
        costs["grouped"] = flops + 6 * machine.byte * kept + machine.call
    return min(costs, key=lambda name: costs[name])


def linear_gradients(
    x_BTD: torch.Tensor, gy_BTP: torch.Tensor, *, method: str | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same for a linear layer applied at T positions of every record; methods `kept` and `gram`."""
    records, positions, inputs = x_BTD.shape
    outputs = gy_BTP.shape[2]
    if method is None:
        machine = _CPU if x_BTD.device.type == "cpu" else _GPU
        item = x_BTD.element_size()
        kept = records * inputs * outputs * item
        gram = 2 * records * positions**2 * (inputs + outputs) + 3 * machine.byte * records * positions**2 * item
        gram += 2 * records * positions * inputs * outputs
        direct = 2 * records * positions * inputs * outputs + 3 * machine.byte * kept
        method = "gram" if positions == 1 or gram < direct or kept > _KEPT_BYTES else "kept"
    if method == "kept":
        return torch.bmm(gy_BTP.transpose(1, 2), x_BTD), None
    if positions == 1:
        return None, x_BTD.square().sum((1, 2)) * gy_BTP.square().sum((1, 2))
    return None, inner(torch.bmm(x_BTD, x_BTD.transpose(1, 2)), torch.bmm(gy_BTP, gy_BTP.transpose(1, 2)))


def inner(inputs_BTT: torch.Tensor, outputs_BTT: torch.Tensor) -> torch.Tensor:
    """Squared norms from two Gram matrices, never below the truth.

    Terms of both signs may cancel, and a norm that rounding made too small would let a gradient pass
    above the bound; so the largest error that rounding can make is added: a few units of the last place
    of (sum over t of |u_t| |g_t|)^2.
    """
    squares = (inputs_BTT * outputs_BTT).sum((1, 2))
    lengths = (inputs_BTT.diagonal(dim1=1, dim2=2) * outputs_BTT.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
    return squares.clamp_min(0) + 16 * torch.finfo(squares.dtype).eps * lengths.square()


def _gram_squares(x: torch.Tensor, gy: torch.Tensor, shape: Shape) -> torch.Tensor:
    groups = shape.groups
    x, gy = (v.reshape(len(v) * groups, -1, *v.shape[2:]) for v in (x, gy))
    padded = math.prod(n + 2 * p for n, p in zip(x.shape[2:], shape.padding, strict=True))
    at_once = max(1, _GRAM_BYTES // (padded**2 * x.element_size()))
    parts = [
        _gram_part(x[start : start + at_once], gy[start : start + at_once], shape)
        for start in range(0, len(x), at_once)
    ]
    return torch.cat(parts).view(-1, groups).sum(1)


def _gram_part(x: torch.Tensor, gy: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The Gram matrix of the unfolded input is a separable sum of shifted blocks of the input's: no unfold is built.

    <u_s, u_t> is the sum over the kernel's taps j of <x at s * stride + j * dilation, x at t * stride + j * dilation>.
    """
    dims, sizes = len(shape.kernel), x.shape[2:]
    x_BCT = x.flatten(2)
    gram = torch.bmm(x_BCT.transpose(1, 2), x_BCT).view(-1, *sizes, *sizes)
    if any(shape.padding):
        gram = F.pad(gram, [n for p in reversed(shape.padding * 2) for n in (p, p)])
    for axis in range(dims):
        kernel, stride, dilation = shape.kernel[axis], shape.stride[axis], shape.dilation[axis]
        if kernel == stride == 1:
            continue
        span = stride * (gy.shape[2 + axis] - 1) + 1
        total: torch.Tensor | None = None
        for tap in range(kernel):
            block = gram.narrow(1 + axis, tap * dilation, span).narrow(1 + dims + axis, tap * dilation, span)
            if stride > 1:
                every = [slice(None)] * gram.dim()
                every[1 + axis] = every[1 + dims + axis] = slice(None, None, stride)
                block = block[tuple(every)]
            total = block.clone() if total is None else total.add_(block)
        assert total is not None
        gram = total
    gy_BPT = gy.flatten(2)
    positions = gy_BPT.shape[2]
    return inner(gram.reshape(-1, positions, positions), torch.bmm(gy_BPT.transpose(1, 2), gy_BPT))


def _grouped(x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, views: int) -> torch.Tensor:
    """Every patient a group of its own in one convolution over the views."""
    patients = len(x) // views
    many = weight.repeat(patients, *[1] * (weight.dim() - 1))
    wide = [v.unflatten(0, (patients, views)).transpose(0, 1).reshape(views, -1, *v.shape[2:]) for v in (x, gy)]
    return shape.weight_gradient(wide[0], wide[1], many, groups=patients * shape.groups).view(patients, *weight.shape)


def _unfolded(x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, views: int) -> torch.Tensor:
    """The sum of outer products as one matrix product a record (and group)."""
    dims, groups = len(shape.kernel), shape.groups
    x = F.pad(x, [n for p in reversed(shape.padding) for n in (p, p)])
    for axis, (kernel, stride, dilation) in enumerate(zip(shape.kernel, shape.stride, shape.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    for axis, size in enumerate(gy.shape[2:]):  # positions that the stride leaves over
        x = x.narrow(2 + axis, 0, size)
    places, taps = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    channels_first = x.permute(0, 1, *taps, *places)
    u_BDT = channels_first.reshape(len(x) * groups, -1, gy[0, 0].numel())
    gy_BPT = gy.reshape(len(gy) * groups, -1, u_BDT.shape[2])
    gradients = torch.bmm(gy_BPT, u_BDT.transpose(1, 2)).view(len(x), *weight.shape)
    return gradients if views == 1 else gradients.unflatten(0, (-1, views)).sum(1)


def _each(value: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * len(kernel) if len(values) == 1 else values
