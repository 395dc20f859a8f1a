"""What each use of a trainable parameter says about its gradient: one rule a torch function.

A rule runs the function and, in its backward pass, books what the gradient of each record is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Signature, signature
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from client.dp import layers


class NoRuleError(Exception):
    """A trainable parameter is used in a way that book-keeping does not know."""


@dataclass(frozen=True)
class Factors:
    """What each gradient is multiplied by; rows are None when all of them count."""

    patients: torch.Tensor
    rows: torch.Tensor | None
    """Patients with a finite gradient."""
    views: int

    def of_patients(self, values_P: torch.Tensor) -> torch.Tensor:
        return values_P if self.rows is None else values_P[self.rows]

    def of_records(self, values_B: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return values_B
        by_patient = values_B.view(-1, self.views, *values_B.shape[1:])
        return by_patient[self.rows].flatten(0, 1)

    def scale(self, values_B: torch.Tensor) -> torch.Tensor:
        """The counted records, each times its patient's factor."""
        factors_B = self.patients.repeat_interleave(self.views) if self.views > 1 else self.patients
        return self.of_records(values_B) * factors_B.view(-1, *[1] * (values_B.dim() - 1))


Contraction = Callable[[Factors], torch.Tensor]
"""Sum over the patients of factor x gradient."""


class Book(Protocol):
    """Where the rules write."""

    views: int
    records: int

    def names(self, value: Any) -> list[str]:
        """Of the trainable parameters that stand in a value."""

    def plain(self, *values: Any) -> None:
        """Raises NoRuleError when one of these is a trainable parameter: it stands where no rule expects it."""

    def claim(self, tensor: torch.Tensor | None) -> int | None:
        """Index of a trainable parameter (None for anything else), which may be used only once."""

    def batched(self, *tensors: torch.Tensor) -> None:
        """Raises NoRuleError unless the first axis is the record."""

    def keep(self, index: int | None, gradients: torch.Tensor) -> None:
        """Books the gradients of the records, or of the patients, in the order of the parameter's elements."""

    def defer(self, index: int, squares_P: torch.Tensor, contract: Contraction) -> None:
        """Books the squared norms and how to form the sum once the factors are known."""


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, shape: layers.Shape, indices: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.book, ctx.shape, ctx.indices = book, shape, indices
        ctx.save_for_backward(x, weight)
        return shape.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        book, shape, (index_w, index_b) = ctx.book, ctx.shape, ctx.indices
        book.keep(index_b, _over_positions(gy))
        if index_w is not None:
            gradients_P, squares_P = layers.convolution_gradients(x, gy, weight, shape, views=book.views)
            if gradients_P is not None:
                book.keep(index_w, gradients_P)
            else:
                assert squares_P is not None

                def contract(factors: Factors) -> torch.Tensor:
                    gradient: torch.Tensor = shape.weight_gradient(factors.of_records(x), factors.scale(gy), weight)
                    return gradient

                book.defer(index_w, squares_P, contract)
        gx = shape.input_gradient(x, gy, weight) if ctx.needs_input_grad[3] else None
        return None, None, None, gx, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, indices: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.book, ctx.indices = book, indices
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        book, (index_w, index_b) = ctx.book, ctx.indices
        patients = len(x) // book.views  # the views of a patient are further positions
        x_PTD, gy_PTQ = x.reshape(patients, -1, x.shape[-1]), gy.reshape(patients, -1, gy.shape[-1])
        book.keep(index_b, gy_PTQ.sum(1))
        if index_w is not None:
            gradients_P, squares_P = layers.linear_gradients(x_PTD, gy_PTQ)
            if gradients_P is not None:
                book.keep(index_w, gradients_P)
            else:
                assert squares_P is not None

                def contract(factors: Factors) -> torch.Tensor:
                    scaled = factors.of_patients(gy_PTQ) * factors.patients[:, None, None]
                    return torch.mm(scaled.flatten(0, 1).T, factors.of_patients(x_PTD).flatten(0, 1))

                book.defer(index_w, squares_P, contract)
        return None, None, gy @ weight if ctx.needs_input_grad[2] else None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, index: int, ids: Any, ignored: Any, weight: Any) -> Any:
        ctx.book, ctx.index, ctx.ignored, ctx.rows = book, index, ignored, len(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        book, rows = ctx.book, ctx.rows
        patients = len(ids) // book.views
        ids_PT, gy_PTD = ids.reshape(patients, -1), gy.reshape(patients, -1, gy.shape[-1])
        if ctx.ignored is not None:
            gy_PTD = gy_PTD * (ids_PT != ctx.ignored).unsqueeze(2)
        # Positions of one record that hold the same row add up; sums of squares only of rows that occur.
        same_PTT = (ids_PT.unsqueeze(2) == ids_PT.unsqueeze(1)).to(gy.dtype)
        squares_P = layers.inner(same_PTT, torch.bmm(gy_PTD, gy_PTD.transpose(1, 2)))

        def contract(factors: Factors) -> torch.Tensor:
            scaled = factors.of_patients(gy_PTD) * factors.patients[:, None, None]
            total = gy.new_zeros(rows, gy.shape[-1])
            return total.index_add_(0, factors.of_patients(ids_PT).flatten(), scaled.flatten(0, 1))

        book.defer(ctx.index, squares_P, contract)
        return None, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, indices: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
        x = x.contiguous(memory_format=memory_format(x))
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.book, ctx.indices, ctx.sizes = book, indices, sizes
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        book, (index_w, index_b), (_, channels, _, groups) = ctx.book, ctx.indices, ctx.sizes
        gy = gy.contiguous(memory_format=memory_format(x))
        bias_BC = _over_positions(gy)
        if index_w is not None:
            each = channels // groups
            mean_BC, rstd_BC = (v.view(len(x), groups).repeat_interleave(each, 1) for v in (mean, rstd))
            book.keep(index_w, (_over_positions(gy * x) - mean_BC * bias_BC) * rstd_BC)
        book.keep(index_b, bias_BC)
        gx = None
        if ctx.needs_input_grad[2]:
            gx = torch.ops.aten.native_group_norm_backward(gy, x, mean, rstd, weight, *ctx.sizes, [True, False, False])[
                0
            ]
        return None, None, gx, None, None, None, None


class _FixedNorm(torch.autograd.Function):
    """Batch norm in evaluation: scale and shift by channel over fixed statistics."""

    @staticmethod
    def forward(ctx: Any, book: Book, indices: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
        each = (1, -1, *[1] * (x.dim() - 2))
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        ctx.book, ctx.indices, ctx.each = book, indices, each
        ctx.save_for_backward(x if indices[0] is not None else None, mean, rstd, scale)
        return x * scale.view(each) + shift.view(each)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, mean, rstd, scale = ctx.saved_tensors
        book, (index_w, index_b) = ctx.book, ctx.indices
        bias_BC = _over_positions(gy)
        if index_w is not None:
            book.keep(index_w, (_over_positions(gy * x) - mean * bias_BC) * rstd)
        book.keep(index_b, bias_BC)
        gx = gy * scale.view(ctx.each) if ctx.needs_input_grad[2] else None
        return None, None, gx, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, indices: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.book, ctx.indices, ctx.shape = book, indices, shape
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        book, (index_w, index_b) = ctx.book, ctx.indices
        size = torch.Size(ctx.shape).numel()
        if index_w is not None:
            book.keep(index_w, (gy * ((x - mean) * rstd)).reshape(len(x), -1, size).sum(1))
        book.keep(index_b, gy.reshape(len(x), -1, size).sum(1))
        gx = None
        if ctx.needs_input_grad[2]:
            gx = torch.ops.aten.native_layer_norm_backward(
                gy, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return None, None, gx, None, None, None, None


class _Elementwise(torch.autograd.Function):
    """x * p and x + p with a parameter that is broadcast over the records."""

    @staticmethod
    def forward(ctx: Any, book: Book, index: int, multiply: bool, x: Any, parameter: Any) -> Any:
        ctx.book, ctx.index, ctx.multiply = book, index, multiply
        ctx.save_for_backward(x if multiply else None, parameter)
        return x * parameter if multiply else x + parameter

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, parameter = ctx.saved_tensors
        ctx.book.keep(ctx.index, _sum_to(gy * x if ctx.multiply else gy, parameter.shape))
        gx = None
        if ctx.needs_input_grad[3]:
            gx = gy * parameter if ctx.multiply else gy
        return None, None, None, gx, None


class _Expand(torch.autograd.Function):
    """A parameter repeated for every record (a class token)."""

    @staticmethod
    def forward(ctx: Any, book: Book, index: int, sizes: Any, parameter: Any) -> Any:
        ctx.book, ctx.index, ctx.shape = book, index, parameter.shape
        return parameter.expand(sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        ctx.book.keep(ctx.index, _sum_to(gy, ctx.shape))
        return None, None, None, None


def _over_positions(values_BC: torch.Tensor) -> torch.Tensor:
    """Sum over all axes after the channel, whatever the memory format."""
    return values_BC.sum(tuple(range(2, values_BC.dim()))) if values_BC.dim() > 2 else values_BC


def _sum_to(gradients_B: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undoes the broadcast of a parameter of this shape, but for the first axis, the record."""
    rest = gradients_B.shape[1:]
    own = (1,) * (len(rest) - len(shape)) + tuple(shape[max(0, len(shape) - len(rest)) :])
    repeated = [1 + axis for axis, (n, m) in enumerate(zip(rest, own, strict=True)) if m == 1 and n != 1]
    return gradients_B.sum(repeated) if repeated else gradients_B


def _run(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _convolution(
    book: Book,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    book.plain(input)
    if input.dim() != weight.dim():
        raise NoRuleError("a convolution without a batch axis has no rule")
    book.batched(input)
    shape = layers.Shape.of(weight, stride, padding, dilation, groups)
    if shape is None:  # `same` with an even kernel pads one side more
        input = F.pad(input, layers.same_padding(weight, dilation))
        shape = layers.Shape.of(weight, stride, 0, dilation, groups)
        assert shape is not None
    return _run(_Convolution, book, shape, (book.claim(weight), book.claim(bias)), input, weight, bias)


def _linear(book: Book, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    book.plain(input)
    book.batched(input)
    return _run(_Linear, book, (book.claim(weight), book.claim(bias)), input, weight, bias)


def _group_norm(
    book: Book,
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    book.plain(input)
    book.batched(input)
    return _run(_GroupNorm, book, (book.claim(weight), book.claim(bias)), input, num_groups, weight, bias, eps)


def _instance_norm(
    book: Book,
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not use_input_stats:
        return _batch_norm(book, input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None:
        raise NoRuleError("an instance norm that keeps statistics")
    if input.dim() < 3:
        raise NoRuleError("an instance norm without a batch axis")
    return _group_norm(book, input, input.shape[1], weight, bias, eps)


def _embedding(
    book: Book,
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    book.plain(input)
    book.batched(input)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NoRuleError("an embedding with max_norm, scale_grad_by_freq or sparse")
    ignored = None if padding_idx is None else padding_idx % len(weight)
    return _run(_Embedding, book, book.claim(weight), input, ignored, weight)


def _batch_norm(
    book: Book,
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    book.plain(input)
    book.batched(input)
    if training or running_mean is None or running_var is None:
        raise NoRuleError("a batch norm over the batch mixes its records")
    indices = (book.claim(weight), book.claim(bias))
    return _run(_FixedNorm, book, indices, input, running_mean, (running_var + eps).rsqrt(), weight, bias)


def _layer_norm(
    book: Book,
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    book.plain(input)
    book.batched(input)
    if input.dim() <= len(normalized_shape):
        raise NoRuleError("a layer norm without a batch axis has no rule")
    indices = (book.claim(weight), book.claim(bias))
    return _run(_LayerNorm, book, indices, input, list(normalized_shape), weight, bias, eps)


def _elementwise(multiply: bool) -> Callable[..., Any]:
    def rule(book: Book, a: Any, b: Any) -> Any:
        x, parameter = (b, a) if book.names(a) else (a, b)
        book.plain(x)
        # The result must have the record as its first axis, which the parameter does not have.
        broadcast = isinstance(x, torch.Tensor) and (
            parameter.dim() < x.dim() or (parameter.dim() == x.dim() and parameter.shape[0] == 1)
        )
        fits = (
            all(m in (1, n) for n, m in zip(reversed(x.shape), reversed(parameter.shape), strict=False))
            if broadcast
            else False
        )
        if not fits:
            raise NoRuleError(f"{book.names(parameter)[0]!r} meets something that is no batch of records")
        book.batched(x)
        index = book.claim(parameter)
        assert index is not None
        return _run(_Elementwise, book, index, multiply, x, parameter)

    return rule


def _expand(book: Book, parameter: torch.Tensor, *sizes: Any) -> Any:
    wanted = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
    if not wanted or wanted[0] != book.records or (len(wanted) == parameter.dim() and parameter.shape[0] != 1):
        raise NoRuleError(f"expand of {book.names(parameter)[0]!r} that is not for every record")
    index = book.claim(parameter)
    assert index is not None
    return _run(_Expand, book, index, wanted, parameter)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    F.linear: _linear,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((torch.Tensor.mul, torch.mul), _elementwise(True)),
    **dict.fromkeys((torch.Tensor.add, torch.add), _elementwise(False)),
    torch.Tensor.expand: _expand,
}
RULES: dict[Any, tuple[Callable[..., Any], Signature]] = {
    function: (rule, signature(rule)) for function, rule in _FUNCTIONS.items()
}
SAME_ORDER = frozenset(
    (torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.unsqueeze, torch.Tensor.squeeze, torch.Tensor.flatten)
)
"""Views of a parameter with its elements in the same order."""


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Of these values: channels last where the tensor is laid out so."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format
