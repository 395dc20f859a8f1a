"""Clipped gradient sums in one forward and one backward pass, for every parameter whose use has a rule.

While the model runs, every torch function that takes a trainable parameter is replaced by one whose
backward pass books what the parameter's gradient is made of (its input and the gradient of its output)
instead of forming it. From that come the per-sample norms, then the clipped sum. Nothing in the model is
touched, there are no hooks, and in-place operations are harmless. A use without a rule, or a second use
of a parameter, raises `NoRuleError`; the caller then takes `torch.func`. What is made of parameters alone (a
standardised weight) may stand where a parameter may (`client.dp.book.Use`).

Source: Bu et al. 2023 (ICML), book-keeping; Bu et al. 2022 (NeurIPS), mixed ghost clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from client.dp.book import Contraction, Factors, NoRuleError, Use
from client.dp.layers import squared_norms
from client.dp.uses import RULES, SAME_ORDER
from common.errors import PrivacyError

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""(model output, targets) -> losses, shape (B,)."""


def clipped_sum(
    model: nn.Module,
    loss_B: Loss,
    x_B: torch.Tensor,
    target_B: torch.Tensor,
    clip_norm: float,
    views: int = 1,
    low: torch.dtype | None = None,
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
        low: What layers may compute in (bfloat16); norms of gradients and sums have the parameters' type. None: no
            autocast.

    Returns:
        Sums in the order of `trainable(model)`, and the norms before the clip (P,). A patient with a norm that is not
        finite is in none of the sums.

    Raises:
        NoRuleError: Take another way; nothing was changed.
        PrivacyError: The loss is not one number a record.
    """
    book = Book(trainable(model), len(x_B), views, low)
    with book:
        with torch.autocast(x_B.device.type, dtype=low, enabled=low is not None):
            output = model(x_B)
        if low is not None and isinstance(output, torch.Tensor):
            output = output.to(x_B.dtype)
        losses = per_record(loss_B(output, target_B), len(x_B))
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


class Book(TorchFunctionMode):
    """What one forward and backward pass says about the gradients of each patient; the rules write into it.

    `low` is what convolutions and linear layers compute in; None: their input's type.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], records: int, views: int, low: torch.dtype | None
    ) -> None:
        super().__init__()
        self._names, self._parameters = list(parameters), list(parameters.values())
        self.records, self.views, self.low = records, views, low
        self._tracked = {id(p): _Tracked(p, (i,), made=False) for i, p in enumerate(self._parameters)}
        self._claimed: set[int] = set()
        self._squares_P = self._parameters[0].new_zeros(records // views)
        self._contractions: list[tuple[Use | int, Contraction]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [index for value in (*args, *kwargs.values()) for index in self._parameters_in(value)]
        if not found:
            return func(*args, **kwargs)
        used = tuple(dict.fromkeys(found))
        if func in RULES:
            rule, known = RULES[func]
            try:
                bound = known.bind(self, *args, **kwargs)
                return rule(*bound.args, **bound.kwargs)
            except (NoRuleError, TypeError) as missing:
                if not self._alone(args, kwargs):
                    if isinstance(missing, NoRuleError):
                        raise
                    what = f"{func.__name__} of {self._names[used[0]]!r} with these arguments"
                    raise NoRuleError(what) from missing
        made = func not in SAME_ORDER or any(self._is_made(value) for value in args)
        if made:  # its Jacobian is applied to single gradients and to their sum: both in full precision
            with torch.autocast(self._parameters[0].device.type, enabled=False):
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.requires_grad and id(value) not in self._tracked:
                if not self._alone(args, kwargs) or value.dtype != self._parameters[used[0]].dtype:
                    raise NoRuleError(f"{getattr(func, '__name__', func)} of {self._names[used[0]]!r}")
                self._tracked[id(value)] = _Tracked(value, used, made)
        return result

    def _parameters_in(self, value: Any) -> tuple[int, ...]:
        """Of which parameters a value is made."""
        if isinstance(value, torch.Tensor):
            found = self._tracked.get(id(value))
            return () if found is None else found.parameters
        if isinstance(value, (tuple, list)):
            return tuple(index for part in value for index in self._parameters_in(part))
        return ()

    def _is_made(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self._tracked and self._tracked[id(value)].made

    def _alone(self, args: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether all tensors among the arguments are made of parameters: no record can be in the result."""
        return all(id(tensor) in self._tracked for tensor in _tensors((*args, *kwargs.values())))

    def names(self, value: Any) -> list[str]:
        """Of the trainable parameters that stand in a value."""
        return [self._names[index] for index in self._parameters_in(value)]

    def plain(self, *values: Any) -> None:
        """Raises NoRuleError when one of these is a trainable parameter: it stands where no rule expects it."""
        for index in (index for value in values for index in self._parameters_in(value)):
            raise NoRuleError(f"{self._names[index]!r} stands where an input is expected")

    def claim(self, tensor: torch.Tensor | None) -> Use | None:
        """What a trainable parameter, or a weight made of some, is used as (None for anything else); only once each.

        The squared norm of a sum of two uses is not the sum of their squares.
        """
        if tensor is None or not (parameters := self._parameters_in(tensor)):
            return None
        for index in parameters:
            if index in self._claimed:
                raise NoRuleError(f"{self._names[index]!r} is used more than once")
        self._claimed.update(parameters)
        return Use(tensor, {i: self._parameters[i] for i in parameters}, made=self._is_made(tensor))

    def batched(self, *tensors: torch.Tensor) -> None:
        """Raises NoRuleError unless the first axis is the record."""
        for tensor in tensors:
            if not tensor.dim() or tensor.shape[0] != self.records:
                raise NoRuleError(f"a layer sees shape {tuple(tensor.shape)} for {self.records} records")

    def keep(self, use: Use | None, gradients: torch.Tensor) -> None:
        """Books the gradients of the records, or of the patients, in the order of the weight's elements."""
        if use is None:
            return
        patients = self.records // self.views
        if len(gradients) > patients:
            gradients = gradients.unflatten(0, (patients, -1)).sum(1)
        for index, gradients_P in use.parts(gradients):
            self._book(index, squared_norms(gradients_P), _weighted_sum(gradients_P))

    def defer(self, use: Use, squares_P: torch.Tensor, contract: Contraction) -> None:
        """Books the squared norms and how to form the sum once the factors are known."""
        self._book(use, squares_P, contract)

    def _book(self, use: Use | int, squares_P: torch.Tensor, contract: Contraction) -> None:
        self._squares_P = self._squares_P + squares_P
        self._contractions.append((use, contract))

    def close(self, clip_norm: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The clipped sums, and the norms."""
        factors = clip_factors(self._squares_P, clip_norm, self.views)
        sums: dict[int, torch.Tensor] = {}
        while self._contractions:
            use, contract = self._contractions.pop()  # popped: frees its tensors
            if len(factors.patients):
                total = contract(factors)
                sums.update([(use, total)] if isinstance(use, int) else use.sums(total))
        filled = (
            sums[index].view(parameter.shape) if index in sums else torch.zeros_like(parameter)
            for index, parameter in enumerate(self._parameters)
        )  # fmt: skip
        return list(filled), self._squares_P.sqrt()


class _Tracked(NamedTuple):
    """A parameter, or what is made of some."""

    tensor: torch.Tensor  # held: its id is its key and must not be used again
    parameters: tuple[int, ...]
    made: bool
    """False for a parameter, and for its elements in the same order."""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _weighted_sum(gradients_P: torch.Tensor) -> Contraction:
    flat_P = gradients_P.reshape(len(gradients_P), -1)
    return lambda factors: torch.mv(factors.of_patients(flat_P).T, factors.patients)


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
