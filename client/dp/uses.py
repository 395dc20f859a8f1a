"""What each use of a trainable parameter says about its gradient: one rule a torch function.

A rule runs the function and, in its backward pass, books what the gradient of each record is made of. Under autocast
convolutions and linear layers compute in the lower precision, norms in that of their parameters, and what is booked is
always of the parameters' type: products of what was computed, not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from client.dp import layers
from client.dp.book import Factors, NoRuleError, Use

if TYPE_CHECKING:
    from client.dp.bookkeeping import Book


def _value(use: Use | None, tensor: Any) -> Any:
    """What a function of its own computes with."""
    return tensor if use is None else use.weight


def _lowered(book: Book, *tensors: Any) -> Any:
    return tensors if book.low is None else tuple(None if t is None else t.to(book.low) for t in tensors)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, shape: layers.Shape, uses: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.book, ctx.shape, ctx.uses = book, shape, uses
        lowered = _lowered(book, weight, bias)
        ctx.save_for_backward(x, weight, lowered[0])
        return shape.forward(x, *lowered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight, lowered = ctx.saved_tensors
        book, shape, (use_w, use_b) = ctx.book, ctx.shape, ctx.uses
        book.keep(use_b, _over_positions(gy, weight.dtype))
        if use_w is not None:
            gradients_P, squares_P = layers.convolution_gradients(
                x, gy, weight, shape, views=book.views, squares=use_w.squares
            )
            if gradients_P is not None:
                book.keep(use_w, gradients_P)
            else:
                assert squares_P is not None

                def contract(factors: Factors) -> torch.Tensor:
                    x_B, gy_B = factors.of_records(x), factors.of_records(gy)
                    total: torch.Tensor = layers.contraction(x_B, gy_B, factors.records, weight, shape)
                    return total

                book.defer(use_w, squares_P, contract)
        gx = shape.input_gradient(x, gy, lowered) if ctx.needs_input_grad[3] else None
        return None, None, None, gx, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, uses: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.book, ctx.uses, ctx.dtype = book, uses, weight.dtype
        lowered = _lowered(book, weight, bias)
        ctx.save_for_backward(x, lowered[0])
        return F.linear(x, *lowered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        book, dtype, (use_w, use_b) = ctx.book, ctx.dtype, ctx.uses
        patients = len(x) // book.views  # the views of a patient are further positions
        x_PTD, gy_PTQ = x.reshape(patients, -1, x.shape[-1]), gy.reshape(patients, -1, gy.shape[-1])
        book.keep(use_b, gy_PTQ.sum(1, dtype=dtype))
        if use_w is not None:
            gradients_P, squares_P = layers.linear_gradients(x_PTD.to(dtype), gy_PTQ.to(dtype), squares=use_w.squares)
            if gradients_P is not None:
                book.keep(use_w, gradients_P)
            else:
                assert squares_P is not None

                def contract(factors: Factors) -> torch.Tensor:
                    scaled = factors.of_patients(gy_PTQ).to(dtype) * factors.patients[:, None, None]
                    return torch.mm(scaled.flatten(0, 1).T, factors.of_patients(x_PTD).flatten(0, 1).to(dtype))

                book.defer(use_w, squares_P, contract)
        return None, None, gy @ weight if ctx.needs_input_grad[2] else None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, use: Use, ids: Any, ignored: Any, weight: Any) -> Any:
        ctx.book, ctx.use, ctx.ignored, ctx.rows, ctx.dtype = book, use, ignored, len(weight), weight.dtype
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        book, rows = ctx.book, ctx.rows
        patients = len(ids) // book.views
        ids_PT, gy_PTD = ids.reshape(patients, -1), gy.reshape(patients, -1, gy.shape[-1]).to(ctx.dtype)
        if ctx.ignored is not None:
            gy_PTD = gy_PTD * (ids_PT != ctx.ignored).unsqueeze(2)
        # Positions of one record that hold the same row add up; sums of squares only of rows that occur.
        same_PTT = (ids_PT.unsqueeze(2) == ids_PT.unsqueeze(1)).to(gy_PTD.dtype)
        squares_P = layers.inner(same_PTT, torch.bmm(gy_PTD, gy_PTD.transpose(1, 2)))

        def contract(factors: Factors) -> torch.Tensor:
            scaled = factors.of_patients(gy_PTD) * factors.patients[:, None, None]
            total = gy_PTD.new_zeros(rows, gy.shape[-1])
            return total.index_add_(0, factors.of_patients(ids_PT).flatten(), scaled.flatten(0, 1))

        book.defer(ctx.use, squares_P, contract)
        return None, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, uses: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
        x = x.contiguous(memory_format=memory_format(x))
        dtype = _precise(x, weight, bias)
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        y, mean, rstd = torch.native_group_norm(x.to(dtype), weight, bias, *sizes, eps)
        ctx.book, ctx.uses, ctx.sizes = book, uses, sizes
        ctx.save_for_backward(x, weight, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        book, (use_w, use_b), (records, channels, positions, groups) = ctx.book, ctx.uses, ctx.sizes
        low, order = x.dtype, memory_format(x)
        x, gy = x.to(mean.dtype), gy.to(mean.dtype).contiguous(memory_format=order)
        mask = [ctx.needs_input_grad[2], use_w is not None, use_b is not None]
        if order == torch.contiguous_format:
            # As one record with the channels of all: the sums over its positions are then those of each record.
            sizes = (1, records * channels, positions, records * groups)
            given = (gy.view(1, -1, positions), x.view(1, -1, positions), mean.view(1, -1), rstd.view(1, -1))
            repeated = None if weight is None else weight.detach().repeat(records)
            gx, *gradients = torch.ops.aten.native_group_norm_backward(*given, repeated, *sizes, mask)
            for use, gradient in zip((use_w, use_b), gradients, strict=True):
                if use is not None:
                    book.keep(use, gradient.view(records, channels))
            gx = None if gx is None else gx.view(x.shape)
        else:
            bias_BC = _over_positions(gy, mean.dtype)
            if use_w is not None:
                each = channels // groups
                mean_BC, rstd_BC = (v.view(records, groups).repeat_interleave(each, 1) for v in (mean, rstd))
                book.keep(use_w, (_over_positions(gy * x, mean.dtype) - mean_BC * bias_BC) * rstd_BC)
            book.keep(use_b, bias_BC)
            gx = None
            if mask[0]:
                mask = [True, False, False]
                gx = torch.ops.aten.native_group_norm_backward(gy, x, mean, rstd, weight, *ctx.sizes, mask)[0]
        return None, None, None if gx is None else gx.to(low), None, None, None, None


class _FixedNorm(torch.autograd.Function):
    """Batch norm in evaluation: scale and shift by channel over fixed statistics."""

    @staticmethod
    def forward(ctx: Any, book: Book, uses: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
        each = (1, -1, *[1] * (x.dim() - 2))
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        ctx.book, ctx.uses, ctx.each, ctx.low = book, uses, each, x.dtype
        ctx.save_for_backward(x if uses[0] is not None else None, mean, rstd, scale)
        return (x * scale.view(each) + shift.view(each)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, mean, rstd, scale = ctx.saved_tensors
        book, (use_w, use_b) = ctx.book, ctx.uses
        bias_BC = _over_positions(gy, scale.dtype)
        if use_w is not None:
            book.keep(use_w, (_over_positions(gy.to(scale.dtype) * x, scale.dtype) - mean * bias_BC) * rstd)
        book.keep(use_b, bias_BC)
        gx = (gy * scale.view(ctx.each)).to(ctx.low) if ctx.needs_input_grad[2] else None
        return None, None, gx, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: Book, uses: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        y, mean, rstd = torch.native_layer_norm(x.to(_precise(x, weight, bias)), shape, weight, bias, eps)
        ctx.book, ctx.uses, ctx.shape = book, uses, shape
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        book, (use_w, use_b) = ctx.book, ctx.uses
        low = x.dtype
        x, gy = x.to(mean.dtype), gy.to(mean.dtype)
        size = torch.Size(ctx.shape).numel()
        if use_w is not None:
            book.keep(use_w, ((x - mean).mul_(rstd).mul_(gy)).reshape(len(x), -1, size).sum(1))
        book.keep(use_b, gy.reshape(len(x), -1, size).sum(1))
        gx = None
        if ctx.needs_input_grad[2]:
            gx = torch.ops.aten.native_layer_norm_backward(
                gy, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0].to(low)
        return None, None, gx, None, None, None, None


class _Elementwise(torch.autograd.Function):
    """x * p and x + p with a parameter that is broadcast over the records."""

    @staticmethod
    def forward(ctx: Any, book: Book, use: Use, multiply: bool, x: Any, parameter: Any) -> Any:
        ctx.book, ctx.use, ctx.multiply, ctx.low = book, use, multiply, x.dtype
        ctx.save_for_backward(x if multiply else None, parameter)
        return x * parameter if multiply else x + parameter

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, parameter = ctx.saved_tensors
        gy = gy.to(parameter.dtype)
        ctx.book.keep(ctx.use, _sum_to(gy * x if ctx.multiply else gy, parameter.shape))
        gx = None
        if ctx.needs_input_grad[3]:
            gx = (gy * parameter if ctx.multiply else gy).to(ctx.low)
        return None, None, None, gx, None


class _Expand(torch.autograd.Function):
    """A parameter repeated for every record (a class token)."""

    @staticmethod
    def forward(ctx: Any, book: Book, use: Use, sizes: Any, parameter: Any) -> Any:
        ctx.book, ctx.use, ctx.shape = book, use, parameter.shape
        return parameter.expand(sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        ctx.book.keep(ctx.use, _sum_to(gy, ctx.shape))
        return None, None, None, None


def _over_positions(values_BC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over all axes after the channel, whatever the memory format."""
    return values_BC.flatten(2).sum(2, dtype=dtype) if values_BC.dim() > 2 else values_BC.to(dtype)


def _precise(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype:
    """The parameters' type; without any, what norms of lower precision are computed in."""
    known = [p.dtype for p in parameters if p is not None]
    return known[0] if known else torch.promote_types(x.dtype, torch.float32)


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
    uses = book.claim(weight), book.claim(bias)
    (x,) = _lowered(book, input)
    return _run(_Convolution, book, shape, uses, x, _value(uses[0], weight), _value(uses[1], bias))


def _linear(book: Book, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    book.plain(input)
    book.batched(input)
    uses = book.claim(weight), book.claim(bias)
    (x,) = _lowered(book, input)
    return _run(_Linear, book, uses, x, _value(uses[0], weight), _value(uses[1], bias))


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
    uses = book.claim(weight), book.claim(bias)
    return _run(_GroupNorm, book, uses, input, num_groups, _value(uses[0], weight), _value(uses[1], bias), eps)


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
    use = book.claim(weight)
    if use is not None and use.made:  # the squares are those of the table's own gradient
        raise NoRuleError("an embedding whose table is made of parameters")
    return _run(_Embedding, book, use, input, ignored, _value(use, weight))


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
    uses = book.claim(weight), book.claim(bias)
    fixed = running_mean, (running_var + eps).rsqrt()
    return _run(_FixedNorm, book, uses, input, *fixed, _value(uses[0], weight), _value(uses[1], bias))


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
    uses = book.claim(weight), book.claim(bias)
    given = _value(uses[0], weight), _value(uses[1], bias)
    return _run(_LayerNorm, book, uses, input, list(normalized_shape), *given, eps)


def _elementwise(multiply: bool) -> Callable[..., Any]:
    def rule(book: Book, a: Any, b: Any) -> Any:
        x, parameter = (b, a) if book.names(a) else (a, b)
        book.plain(x)
        # The result must have the record as its first axis, which the parameter does not have.
        broadcast = isinstance(x, torch.Tensor) and (
            parameter.dim() < x.dim() or (parameter.dim() == x.dim() and parameter.shape[:1] == (1,))
        )
        if not broadcast or any(
            m not in (1, n) for n, m in zip(reversed(x.shape), reversed(parameter.shape), strict=False)
        ):
            raise NoRuleError(f"{book.names(parameter)[0]!r} meets something that is no batch of records")
        book.batched(x)
        use = book.claim(parameter)
        assert use is not None
        return _run(_Elementwise, book, use, multiply, x, use.weight)

    return rule


def _expand(book: Book, parameter: torch.Tensor, *sizes: Any) -> Any:
    wanted = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
    if not wanted or wanted[0] != book.records or (len(wanted) == parameter.dim() and parameter.shape[0] != 1):
        raise NoRuleError(f"expand of {book.names(parameter)[0]!r} that is not for every record")
    use = book.claim(parameter)
    assert use is not None
    return _run(_Expand, book, use, wanted, use.weight)


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
