"""Clipped gradient sums in one forward and one backward pass, for every parameter whose use has a rule.

While the model runs, every torch function that takes a trainable parameter is replaced by one whose
backward pass books what the parameter's gradient is made of (its input and the gradient of its output)
instead of forming it. From that come the per-sample norms, then the clipped sum. Nothing in the model is
touched, there are no hooks, and in-place operations are harmless. A use without a rule, or a second use
of a parameter, raises `NoRuleError`; the caller then takes `torch.func`.

Source: Bu et al. 2023 (ICML), book-keeping; Bu et al. 2022 (NeurIPS), mixed ghost clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from client.dp.uses import RULES, SAME_ORDER, Contraction, Factors, NoRuleError
from common.errors import PrivacyError

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""(model output, targets) -> losses, shape (B,)."""


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
    book = _Book(trainable(model), len(x_B), views)
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

    def __init__(self, parameters: Mapping[str, nn.Parameter], records: int, views: int) -> None:
        super().__init__()
        self._names, self._parameters = list(parameters), list(parameters.values())
        self.records, self.views = records, views
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
        if func in RULES:
            rule, known = RULES[func]
            try:
                bound = known.bind(self, *args, **kwargs)
            except TypeError:
                raise NoRuleError(f"{func.__name__} of {self._names[used[0]]!r} with these arguments") from None
            return rule(*bound.args, **bound.kwargs)
        result = func(*args, **kwargs)  # shapes, types and devices may be asked for freely
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.requires_grad and id(value) not in self._tracked:
                if func not in SAME_ORDER:
                    raise NoRuleError(f"{getattr(func, '__name__', func)} of {self._names[used[0]]!r}")
                self._tracked[id(value)] = (value, used[0])
        return result

    def _parameters_in(self, value: Any) -> list[int]:
        if isinstance(value, torch.Tensor):
            found = self._tracked.get(id(value))
            return [] if found is None else [found[1]]
        if isinstance(value, (tuple, list)):
            return [index for part in value for index in self._parameters_in(part)]
        return []

    def names(self, value: Any) -> list[str]:
        return [self._names[index] for index in self._parameters_in(value)]

    def plain(self, *values: Any) -> None:
        """Raises NoRuleError when one of these is a trainable parameter: it stands where no rule expects it."""
        for index in (index for value in values for index in self._parameters_in(value)):
            raise NoRuleError(f"{self._names[index]!r} stands where an input is expected")

    def claim(self, tensor: torch.Tensor | None) -> int | None:
        """Index of a trainable parameter (None for anything else), which may be used only once.

        The squared norm of a sum of two uses is not the sum of their squares.
        """
        found = self._parameters_in(tensor)
        if not found:
            return None
        if found[0] in self._claimed:
            raise NoRuleError(f"{self._names[found[0]]!r} is used more than once")
        self._claimed.add(found[0])
        return found[0]

    def batched(self, *tensors: torch.Tensor) -> None:
        """Raises NoRuleError unless the first axis is the record."""
        for tensor in tensors:
            if not tensor.dim() or tensor.shape[0] != self.records:
                raise NoRuleError(f"a layer sees shape {tuple(tensor.shape)} for {self.records} records")

    def keep(self, index: int | None, gradients: torch.Tensor) -> None:
        """Books the gradients of the records, or of the patients, in the order of the parameter's elements."""
        if index is None:
            return
        patients = self.records // self.views
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
