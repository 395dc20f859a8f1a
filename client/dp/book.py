"""What stands in a book: the use of a parameter, and how its clipped sum is formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from client.dp.layers import Squares, squared_norms


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

    @property
    def records(self) -> torch.Tensor:
        """Of each counted record, its patient's."""
        return self.patients.repeat_interleave(self.views) if self.views > 1 else self.patients


Contraction = Callable[[Factors], torch.Tensor]
"""Sum over the patients of factor x gradient."""


class Use:
    """The one use of a trainable parameter, or of a weight that is made of parameters and nothing else.

    Such a weight (a standardised one, say) is the same function f of the parameters for all records. So the gradient of
    a record with respect to the parameters is J^T of its gradient with respect to the weight, J the Jacobian of f,
    which autograd applies to many at once.
    """

    def __init__(self, weight: torch.Tensor, parameters: dict[int, nn.Parameter], *, made: bool) -> None:
        self._weight, self._parameters = weight, parameters
        # A leaf of its own: the backward pass of the loss must not run through the graph of f and free it.
        self.weight = weight.detach().requires_grad_() if made else weight
        self.made = made

    @property
    def squares(self) -> Squares | None:
        """Squared norms of the parameters' gradients from the weight's; None where that is the gradient itself."""
        return self._squares if self.made else None

    def _squares(self, gradients_P: torch.Tensor, rounding_P: torch.Tensor) -> torch.Tensor:
        found = sum((squared_norms(g) for _, g in self.parts(gradients_P)), gradients_P.new_zeros(len(gradients_P)))
        # The sum is mapped once, after the contraction, and its rounding with it. 256: the stretch is that of all
        # directions together, of which rounding takes none alone.
        return found + self._stretch / 256 * rounding_P

    @cached_property
    def _stretch(self) -> torch.Tensor:
        """Most by which J^T lengthens a squared norm: the sum of its squares, as told by how it maps random signs.

        Gradients do not tell it: f may forget a whole one, and then what is left in the sum is rounding.
        """
        signs = torch.randint(2, self._weight.shape, generator=torch.Generator().manual_seed(0)).to(self._weight)
        mapped = self._back(2 * signs - 1, batched=False)
        return sum((g.square().sum() for _, g in mapped), signs.new_zeros(()))

    def parts(self, gradients_P: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Index of each parameter and its gradients (P, *shape), from the weight's (P, *weight.shape or flat)."""
        if not self.made:
            return [(index, gradients_P) for index in self._parameters]
        return self._back(gradients_P.reshape(-1, *self._weight.shape), batched=True)

    def sums(self, total: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """The same for one gradient, which is the sum of all."""
        if not self.made:
            return [(index, total) for index in self._parameters]
        return self._back(total.reshape(self._weight.shape), batched=False)

    def _back(self, gradient: torch.Tensor, *, batched: bool) -> list[tuple[int, torch.Tensor]]:
        found = torch.autograd.grad(
            self._weight, list(self._parameters.values()), gradient, retain_graph=True, allow_unused=True,
            is_grads_batched=batched,
        )  # fmt: skip
        return [(i, g) for i, g in zip(self._parameters, found, strict=True) if g is not None]
