"""Per-sample weight gradients, or their squared norms alone, of convolutions and linear layers.

For one record, with u_t the input that output position t sees and g_t the gradient there, the weight's
gradient is the sum over t of g_t u_t^T. It is formed for every record where that is small, else only its
squared norm is taken, the sum over s, t of <u_s, u_t> <g_s, g_t> (Gram norm). Which one is decided by a
count of operations and bytes from the shapes, never by timing: equal runs must take equal ways.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

_KEPT_BYTES = 64 << 20  # of one layer's gradients, all records; more is never kept
_FREE_BYTES = 16 << 20  # of them that may be kept whatever else the layer holds
_PART_BYTES = 8 << 20  # gradients, unfolded inputs or Gram matrices of as many records at once as fit a cache
_ROW = 1 << 12  # squares that are summed one after the other


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


Squares = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(gradients (P, *shape), `_rounding` (P,)) -> squared norms (P,), never below the truth."""


def squared_norms(gradients_P: torch.Tensor) -> torch.Tensor:
    """Squared norm for each patient, without a copy of the squares."""
    rows = gradients_P.flatten(2) if gradients_P.dim() > 2 else gradients_P.reshape(len(gradients_P), 1, -1)
    # The norms of short rows first: one sum over 10^6 float32 squares loses the small ones.
    norms = torch.cat([torch.linalg.vector_norm(part, dim=2) for part in rows.split(_ROW, dim=2)], dim=1)
    return norms.square().sum(1)


def _squares(gradients_P: torch.Tensor, rounding_P: torch.Tensor) -> torch.Tensor:
    return squared_norms(gradients_P) + rounding_P


def _rounding(x: torch.Tensor, gy: torch.Tensor, patients: int, taps: int, dtype: torch.dtype) -> torch.Tensor:
    """Squared, far more than a patient's gradient here and the patient's share of the sum can differ by.

    Both add the same g_t u_t^T, in another order. They may cancel, here more than there, and then rounding is all that
    is left: some units in the last place of the sum over t of |g_t| |u_t|, not of what it came to. That is at most
    |g| |u|, and each number of x is in at most `taps` of the u_t.
    """
    x_P, gy_P = (
        torch.linalg.vector_norm(v.unflatten(0, (patients, -1)), dim=tuple(range(1, v.dim() + 1)), dtype=dtype)
        for v in (x, gy)
    )
    lengths_P: torch.Tensor = 256 * torch.finfo(dtype).eps * math.sqrt(taps) * x_P * gy_P
    return lengths_P.square()


def convolution_gradients(
    x: torch.Tensor,
    gy: torch.Tensor,
    weight: torch.Tensor,
    shape: Shape,
    *,
    views: int = 1,
    method: str | None = None,
    squares: Squares | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of a convolution's weight for every patient, or only their squared norms.

    Args:
        x: Input, (B, C, ...); each `views` records are one patient, whose gradient is the sum over them.
        gy: Gradient of the output, (B, Q, ...); like `x` it may be less precise than the weight, which has the type
            of the result.
        weight: (Q, C / groups, ...).
        shape: Of the convolution.
        method: One of `loop`, `grouped`, `unfold`, `gram` (of one view only), `norms`; None takes the cheapest.
        squares: What makes squared norms of gradients, when the weight is made of parameters; then not by `gram`.

    Returns:
        Either gradients (B / views, *weight.shape) and None, or None and squared norms (B / views,).
    """
    method = method or convolution_method(x, gy, weight, shape, views, gram=squares is None)
    if method == "gram":
        return None, _gram_squares(x, gy, shape, weight.dtype)
    patients = len(x) // views
    ways: dict[str, Callable[..., torch.Tensor]] = {"grouped": _grouped, "unfold": _unfolded, "loop": _one_by_one}
    way = ways.get(method, _grouped if shape.groups > 1 else _one_by_one)
    size = weight.numel()
    if method == "unfold":
        size = max(size, views * x[0].numel() * math.prod(shape.kernel))
    parts = (
        (part, way(x[records].to(weight.dtype), gy[records].to(weight.dtype), weight, shape, views))
        for part, records in _parts(patients, views, size * weight.element_size())
    )
    if method == "norms":
        rounding_P = _rounding(x, gy, patients, math.prod(shape.kernel), weight.dtype)
        return None, torch.cat([(squares or _squares)(gradients, rounding_P[part]) for part, gradients in parts])
    kept: torch.Tensor | None = None
    for part, gradients in parts:
        if len(gradients) == patients:
            return gradients, None
        kept = gradients.new_empty((patients, *weight.shape)) if kept is None else kept
        kept[part] = gradients
    return kept, None


def _parts(patients: int, views: int, each: int) -> Iterator[tuple[slice, slice]]:
    """Patients, and their records, of which each takes so many bytes, in portions that fit a cache."""
    at_once = max(1, _PART_BYTES // each)
    for start in range(0, patients, at_once):
        stop = min(start + at_once, patients)
        yield slice(start, stop), slice(start * views, stop * views)


def contraction(x: torch.Tensor, gy: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, shape: Shape) -> Any:
    """Sum over the records of factor x gradient, in portions: a scaled copy of all gradients would cost memory."""
    each = (x[0].numel() + gy[0].numel()) * weight.element_size() // 4 or 1  # four times as much a portion
    total: torch.Tensor | None = None
    for part, _ in _parts(len(x), 1, each):
        scaled = gy[part].to(weight.dtype) * factors[part].view(-1, *[1] * (gy.dim() - 1))
        gradient = shape.weight_gradient(x[part].to(weight.dtype), scaled, weight)
        total = gradient if total is None else total.add_(gradient)
    return total


def convolution_method(
    x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, views: int = 1, *, gram: bool = True
) -> str:
    """The cheapest way by a count of operations, bytes and calls, among those that do not cost memory.

    Gradients are kept where they are not much larger than input and output gradient, which a second pass for the sum
    would have to hold instead.
    """
    machine = _CPU if x.device.type == "cpu" else _GPU
    records, positions = len(x), gy[0, 0].numel()
    flops = 2.0 * records * positions * weight.numel()  # of one pass that forms the gradients
    item = weight.element_size()
    patients = records // views
    kept = float(patients * weight.numel() * item)
    phases = math.prod(min(s, k) for s, k in zip(shape.stride, shape.kernel, strict=True))
    padded = math.prod(
        (n + 2 * p) / s for n, p, s in zip(x.shape[2:], shape.padding, shape.stride, strict=True)
    )  # positions of a phase
    squares = records * shape.groups * (2.0 * phases * padded**2 * x.shape[1] + 2.0 * positions**2 * gy.shape[1])
    taps = [max(1, k // s) for k, s in zip(shape.kernel, shape.stride, strict=True)]
    passes = 3 + 2 * sum(k for k in taps if k > 1)
    moved = records * shape.groups * item * (phases * passes * padded**2 + 3.0 * positions**2)
    unfolded = float(records * x.shape[1] * math.prod(shape.kernel) * positions * item)
    costs = {
        # these two need a second pass for the sum
        "gram": flops + squares / shape.groups + machine.byte * moved + 10 * phases * machine.call,
        "norms": 2.4 * flops + machine.byte * kept + machine.call * patients,
    }
    if views > 1 or not gram:  # the Gram matrix grows with the square of the views
        del costs["gram"]
    if kept <= min(_KEPT_BYTES, max(_FREE_BYTES, 1.5 * item * (x.numel() + gy.numel()))):
        # 1.4: one record at a time uses the kernels less well
        costs["loop"] = 1.4 * flops + 3 * machine.byte * kept + machine.call * patients
        costs["unfold"] = flops + machine.byte * (3 * kept + 4 * unfolded) + 10 * machine.call
        if shape.groups > 1 or weight.shape[1] > 4:
            costs["grouped"] = flops + 6 * machine.byte * kept + machine.call
    return min(costs, key=lambda name: costs[name])


def linear_gradients(
    x_PTD: torch.Tensor, gy_PTQ: torch.Tensor, *, method: str | None = None, squares: Squares | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same for a linear layer applied at T positions of every patient; methods `kept`, `gram` and `norms`.

    Both arguments have the type of the result.
    """
    patients, positions, inputs = x_PTD.shape
    outputs = gy_PTQ.shape[2]
    item = x_PTD.element_size()
    if method is None:
        machine = _CPU if x_PTD.device.type == "cpu" else _GPU
        kept = patients * inputs * outputs * item
        fits = kept <= min(_KEPT_BYTES, max(_FREE_BYTES, 1.5 * item * (x_PTD.numel() + gy_PTQ.numel())))
        gram = 2 * patients * positions**2 * (inputs + outputs) + 3 * machine.byte * patients * positions**2 * item
        gram += 2 * patients * positions * inputs * outputs
        direct = 2 * patients * positions * inputs * outputs + 3 * machine.byte * kept
        if squares is not None:
            method = "kept" if fits else "norms"
        else:
            method = "gram" if positions == 1 or gram < direct or not fits else "kept"
    if method == "kept":
        return torch.bmm(gy_PTQ.transpose(1, 2), x_PTD), None
    if method == "norms":
        each, rounding_P = inputs * outputs * item, _rounding(x_PTD, gy_PTQ, patients, 1, x_PTD.dtype)
        return None, torch.cat(
            [
                (squares or _squares)(torch.bmm(gy_PTQ[part].transpose(1, 2), x_PTD[part]), rounding_P[part])
                for part, _ in _parts(patients, 1, each)
            ]
        )
    if positions == 1:
        return None, x_PTD.square().sum((1, 2)) * gy_PTQ.square().sum((1, 2))
    return None, torch.cat(
        [
            inner(
                torch.bmm(x_PTD[part], x_PTD[part].transpose(1, 2)),
                torch.bmm(gy_PTQ[part], gy_PTQ[part].transpose(1, 2)),
            )
            for part, _ in _parts(patients, 1, positions**2 * item)
        ]
    )


def inner(inputs_BTT: torch.Tensor, outputs_BTT: torch.Tensor) -> torch.Tensor:
    """Squared norms from two Gram matrices, never below the truth.

    Terms of both signs may cancel, and a norm that rounding made too small would let a gradient pass
    above the bound; so the largest error that rounding can make is added: a few units of the last place
    of (sum over t of |u_t| |g_t|)^2.
    """
    squares = (inputs_BTT * outputs_BTT).sum((1, 2))
    lengths = (inputs_BTT.diagonal(dim1=1, dim2=2) * outputs_BTT.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
    return squares.clamp_min(0) + 16 * torch.finfo(squares.dtype).eps * lengths.square()


def _gram_squares(x: torch.Tensor, gy: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    groups = shape.groups
    x, gy = (v.reshape(len(v) * groups, -1, *v.shape[2:]) for v in (x, gy))
    padded = math.prod(
        (n + 2 * p) / s for n, p, s in zip(x.shape[2:], shape.padding, shape.stride, strict=True)
    )  # positions of a phase
    each = math.ceil(padded**2) * dtype.itemsize
    parts = [_gram_part(x[part].to(dtype), gy[part].to(dtype), shape) for part, _ in _parts(len(x), 1, each)]
    return torch.cat(parts).view(-1, groups).sum(1)


def _gram_part(x: torch.Tensor, gy: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The Gram matrix of the unfolded input is a separable sum of shifted blocks of the input's: no unfold is built.

    <u_s, u_t> is the sum over the kernel's taps j of <x at s * stride + j * dilation, x at t * stride + j * dilation>.
    Both places have the same rest by the stride, so each rest (phase) of the input needs a Gram matrix of its own only.
    """
    sizes = gy.shape[2:]
    strided = any(stride > 1 for stride in shape.stride)
    if strided:
        x = F.pad(x, [n for p in reversed(shape.padding) for n in (p, p)])
    total: torch.Tensor | None = None
    for phase in itertools.product(*map(range, shape.stride)):
        shifts = [
            [tap * d // s for tap in range(k) if tap * d % s == rest]
            for rest, k, s, d in zip(phase, shape.kernel, shape.stride, shape.dilation, strict=True)
        ]
        if not all(shifts):
            continue
        places: list[Any] = [slice(rest, None, s) for rest, s in zip(phase, shape.stride, strict=True)]
        part = x[(..., *places)]
        gram = _shifted_gram(part, sizes, shifts, (0,) * len(sizes) if strided else shape.padding)
        total = gram if total is None else total.add_(gram)
    assert total is not None
    gy_BQT = gy.flatten(2)
    return inner(total, torch.bmm(gy_BQT.transpose(1, 2), gy_BQT))


def _shifted_gram(
    x: torch.Tensor, sizes: Sequence[int], shifts: Sequence[Sequence[int]], padding: Sequence[int]
) -> torch.Tensor:
    """Sum over the shifts of the Gram matrices of what lies there, (B, positions, positions)."""
    dims, x_BCT = len(sizes), x.flatten(2)
    gram = torch.bmm(x_BCT.transpose(1, 2), x_BCT).view(-1, *x.shape[2:], *x.shape[2:])
    if any(padding):
        gram = F.pad(gram, [n for p in reversed((*padding, *padding)) for n in (p, p)])
    for axis, size in enumerate(sizes):
        if list(shifts[axis]) == [0] and gram.shape[1 + axis] == size:
            continue
        total: torch.Tensor | None = None
        for shift in shifts[axis]:
            block = gram.narrow(1 + axis, shift, size).narrow(1 + dims + axis, shift, size)
            total = block.clone() if total is None else total.add_(block)
        assert total is not None
        gram = total
    return gram.reshape(len(x), math.prod(sizes), -1)


def _one_by_one(x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, views: int) -> torch.Tensor:
    gradients = x.new_empty((len(x) // views, *weight.shape))
    for i in range(len(gradients)):
        records = slice(i * views, (i + 1) * views)
        gradients[i] = shape.weight_gradient(x[records], gy[records], weight)
    return gradients


def _grouped(x: torch.Tensor, gy: torch.Tensor, weight: torch.Tensor, shape: Shape, views: int) -> torch.Tensor:
    """Every patient a group of its own in one convolution over the views."""
    patients = len(x) // views
    many = weight.new_empty((patients * len(weight), *weight.shape[1:]))  # for its shape: the values do not matter
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
