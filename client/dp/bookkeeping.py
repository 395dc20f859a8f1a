"""Clipped gradient sums in one forward and one backward pass, for every parameter whose use has a rule.

While the model runs, every torch function that takes a trainable parameter is replaced by one whose
backward pass books what the parameter's gradient is made of (its input and the gradient of its output)
instead of forming it. From that come the per-sample norms, then the clipped sum. Nothing in the model is
touched, there are no hooks, and in-place operations are harmless. A use without a rule, or a second use
of a parameter, raises `NoRuleError`; the caller then takes `torch.func`.

Source: Bu et al. 2023 (ICML), book-keeping; Bu et al. 2022 (NeurIPS), mixed ghost clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature, signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from client.dp import layers
from common.errors import PrivacyError

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""(model output, targets) -> losses, shape (B,)."""


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


class NoRuleError(Exception):
    """A trainable parameter is used in a way that book-keeping does not know."""


def clipped_sum(
    model: nn.Module, loss_B: Loss, x_B: torch.Tensor, target_B: torch.Tensor, clip_norm: float, views: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sum over the patients of their gradients, each scaled down to `clip_norm`.

    A patient's gradient is the mean over its `views` records.

    Args:
        model: No record may influence another one's output.
        loss_B: One loss a record.
        x_B: (B, ...), B = P x views, at least 1; the records of a patient lie together.
        target_B: (B, ...).
        clip_norm: Above 0.
        views: Records of each patient.

    Returns:
        Sums in the order of `trainable(model)`, and the norms before the clip (P,). A patient with a norm that is not
        finite is in none of the sums.

    Raises:
        NoRuleError: Take another way; nothing was changed.
        PrivacyError: The loss is not one number a record.
    """
    book = _Book(trainable(model).values(), len(x_B), views)
    with book:
        losses = per_record(loss_B(model(x_B), target_B), len(x_B))
    with _full_precision(x_B.device):
        torch.autograd.backward(losses.sum() / views)
        with torch.no_grad():  # what was booked belongs to a graph, the sums must not
            return book.close(clip_norm)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, in the model's order, each once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def per_record(losses: torch.Tensor, records: int) -> torch.Tensor:
    """The losses, when there is one for each record.

    Raises:
        PrivacyError: There is not, as with a mean over the batch.
    """
    if losses.shape != (records,):
        raise PrivacyError(
            f"the loss has shape {tuple(losses.shape)}, expected ({records},): one number a record; "
            "use reduction='none' and let no record look at another"
        )
    return losses


def clip_factors(squares_P: torch.Tensor, clip_norm: float, views: int = 1) -> Factors:
    """Factors in (0, 1] that bring every gradient to at most `clip_norm`, for the patients with a finite norm.

    The factor is a hair (64 roundings) below the exact one, so that rounding cannot lift a clipped
    gradient above the bound.
    """
    finite = torch.isfinite(squares_P)
    rows = None if bool(finite.all()) else finite.nonzero().squeeze(1)
    norms = (squares_P if rows is None else squares_P[rows]).sqrt()
    below = clip_norm * (1 - 64 * torch.finfo(norms.dtype).eps)
    return Factors((below / norms).clamp(max=1.0), rows, views)


class _Book(TorchFunctionMode):
    """What one forward and backward pass says about the gradients of each patient."""

    def __init__(self, parameters: Iterable[nn.Parameter], records: int, views: int) -> None:
        super().__init__()
        self._parameters = list(parameters)
        self._records, self.views = records, views
        # The tensor is held too: its id is its key and must not be used again.
        self._tracked: dict[int, tuple[torch.Tensor, int]] = {id(p): (p, i) for i, p in enumerate(self._parameters)}
        self._claimed: set[int] = set()
        self._squares_P = self._parameters[0].new_zeros(records // views)
        self._contractions: dict[int, Contraction] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [index for value in (*args, *kwargs.values()) for index in self._parameters_in(value)]
        if not used:
            return func(*args, **kwargs)
        if func in _RULES:
            rule, known = _RULES[func]
            try:
                bound = known.bind(self, *args, **kwargs)
            except TypeError:
                raise NoRuleError(f"{func.__name__} with these arguments has no rule") from None
            return rule(*bound.args, **bound.kwargs)
        result = func(*args, **kwargs)  # shapes, types and devices may be asked for freely
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.requires_grad and id(value) not in self._tracked:
                if func not in _SAME_ORDER:
                    raise NoRuleError(f"{getattr(func, '__name__', func)} of a trainable parameter has no rule")
                self._tracked[id(value)] = (value, used[0])
        return result

    def _parameters_in(self, value: Any) -> list[int]:
        if isinstance(value, torch.Tensor):
            found = self._tracked.get(id(value))
            return [] if found is None else [found[1]]
        if isinstance(value, (tuple, list)):
            return [index for part in value for index in self._parameters_in(part)]
        return []

    def plain(self, *values: Any) -> None:
        """Raises NoRuleError when one of these is a trainable parameter: it stands where no rule expects it."""
        if any(self._parameters_in(value) for value in values):
            raise NoRuleError("a trainable parameter stands where an input is expected")

    def claim(self, tensor: torch.Tensor | None) -> int | None:
        """Index of a trainable parameter (None for anything else), which may be used only once.

        The squared norm of a sum of two uses is not the sum of their squares.
        """
        found = self._parameters_in(tensor)
        if not found:
            return None
        if found[0] in self._claimed:
            raise NoRuleError("a trainable parameter is used more than once")
        self._claimed.add(found[0])
        return found[0]

    def batched(self, *tensors: torch.Tensor) -> None:
        """Raises NoRuleError unless the first axis is the record."""
        for tensor in tensors:
            if not tensor.dim() or tensor.shape[0] != self._records:
                raise NoRuleError(f"a layer sees shape {tuple(tensor.shape)} for {self._records} records")

    def keep(self, index: int | None, gradients: torch.Tensor) -> None:
        """Books the gradients of the records, or of the patients, in the order of the parameter's elements."""
        if index is None:
            return
        patients = self._records // self.views
        flat = gradients.reshape(patients, len(gradients) // patients, -1)
        flat_P = flat.sum(1) if flat.shape[1] > 1 else flat.squeeze(1)
        self.defer(
            index,
            flat_P.square().sum(1),
            lambda factors: torch.mv(factors.of_patients(flat_P).T, factors.patients),
        )

    def defer(self, index: int, squares_P: torch.Tensor, contract: Contraction) -> None:
        """Books the squared norms and how to form the sum once the factors are known."""
        self._squares_P = self._squares_P + squares_P
        self._contractions[index] = contract

    def close(self, clip_norm: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        factors = clip_factors(self._squares_P, clip_norm, self.views)
        sums = []
        for index, parameter in enumerate(self._parameters):
            contract = self._contractions.pop(index, None)  # popped: frees its tensors
            if contract is None or not len(factors.patients):
                sums.append(torch.zeros_like(parameter))
            else:
                sums.append(contract(factors).view(parameter.shape))
        return sums, self._squares_P.sqrt()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: _Book, shape: layers.Shape, indices: Any, x: Any, weight: Any, bias: Any) -> Any:
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
    def forward(ctx: Any, book: _Book, indices: Any, x: Any, weight: Any, bias: Any) -> Any:
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


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, book: _Book, indices: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
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
    def forward(ctx: Any, book: _Book, indices: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
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
    def forward(ctx: Any, book: _Book, indices: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
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
    def forward(ctx: Any, book: _Book, index: int, multiply: bool, x: Any, parameter: Any) -> Any:
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
    def forward(ctx: Any, book: _Book, index: int, sizes: Any, parameter: Any) -> Any:
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
    book: _Book,
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
    if shape is None:
        raise NoRuleError(f"padding {padding!r} of an even kernel has no rule")
    return _run(_Convolution, book, shape, (book.claim(weight), book.claim(bias)), input, weight, bias)


def _linear(book: _Book, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    book.plain(input)
    book.batched(input)
    return _run(_Linear, book, (book.claim(weight), book.claim(bias)), input, weight, bias)


def _group_norm(
    book: _Book,
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    book.plain(input)
    book.batched(input)
    return _run(_GroupNorm, book, (book.claim(weight), book.claim(bias)), input, num_groups, weight, bias, eps)


def _batch_norm(
    book: _Book,
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
    book: _Book,
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
    def rule(book: _Book, a: Any, b: Any) -> Any:
        x, parameter = (b, a) if book._parameters_in(a) else (a, b)
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
            raise NoRuleError("a trainable parameter meets something that is no batch of records")
        book.batched(x)
        index = book.claim(parameter)
        assert index is not None
        return _run(_Elementwise, book, index, multiply, x, parameter)

    return rule


def _expand(book: _Book, parameter: torch.Tensor, *sizes: Any) -> Any:
    wanted = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
    if not wanted or wanted[0] != book._records or (len(wanted) == parameter.dim() and parameter.shape[0] != 1):
        raise NoRuleError("expand of a trainable parameter that is not for every record")
    index = book.claim(parameter)
    assert index is not None
    return _run(_Expand, book, index, wanted, parameter)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    F.linear: _linear,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((torch.Tensor.mul, torch.mul), _elementwise(True)),
    **dict.fromkeys((torch.Tensor.add, torch.add), _elementwise(False)),
    torch.Tensor.expand: _expand,
}
_RULES: dict[Any, tuple[Callable[..., Any], Signature]] = {
    function: (rule, signature(rule)) for function, rule in _FUNCTIONS.items()
}
_SAME_ORDER = frozenset(
    (torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.unsqueeze, torch.Tensor.squeeze, torch.Tensor.flatten)
)
"""Views of a parameter with its elements in the same order."""


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 on a GPU: a norm that falls below the truth would let a gradient pass above the bound."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Of these values: channels last where the tensor is laid out so."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format
