"""The coordinator's side of a secure sum: five short steps with the sites, and one mean comes out.

Whoever is silent or does not keep to the protocol is left out as long as enough sites stay; with fewer, the sum is
given up and nothing of it is used. docs/secure-aggregation.md has the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from common.config import Recipe
from common.errors import SecureAggregationError
from common.exchange import (
    Agreement,
    Answer,
    Ask,
    Dealing,
    Failure,
    Gathering,
    MaskedUpdate,
    Masking,
    Opening,
    Refusal,
    RoundPlan,
    Shares,
    Survivors,
    Update,
)
from common.fixed import Residues
from common.secagg import Aggregator, Subject
from common.weights import Weights

A = TypeVar("A", Dealing, MaskedUpdate, Agreement, Shares)
Take = Callable[[Answer], Answer]
"""Told each answer as it comes; gives back what is worth keeping of it."""
_NOTHING = Residues(np.empty(0, np.uint32))


class Steps(Protocol):
    """The part of `server.rounds.Transport` that a sum needs."""

    def step(self, asks: Mapping[str, Ask], timeout_s: float, take: Take) -> Mapping[str, Answer | Refusal | Failure]:
        """Asks each site its own; one reply for each, silence is a `Failure`."""


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """What the coordinator learns of a round's updates."""

    mean: Weights
    """By the sites' weights."""
    weight: int
    """Sum of the weights."""
    session: str
    masked: Mapping[str, str]
    """Site to digest of the masked update that it sent, of all that are in the sum."""
    left: Mapping[str, str]
    """Sites that left or did not keep to the protocol, and why; some may have done so after their update came."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Site to the newest head of its audit chain."""


def secure_sum(plan: RoundPlan, recipe: Recipe, ready: Mapping[str, Update], transport: Steps) -> SecureSum:
    """Sums the updates that these sites have ready, and sees none of them.

    Raises:
        SecureAggregationError: Too few sites kept to the protocol, or the sum is not one that honest sites give; the
            message says who left and why.
    """
    return _Sum(plan, recipe, ready, transport).run()


def _emptied(answer: Answer) -> Answer:
    """The answer without its masked update, which is in the sum."""
    return replace(answer, values=_NOTHING) if isinstance(answer, MaskedUpdate) else answer


class _Sum:
    def __init__(self, plan: RoundPlan, recipe: Recipe, ready: Mapping[str, Update], transport: Steps) -> None:
        self._plan, self._recipe, self._transport = plan, recipe, transport
        self._left: dict[str, str] = {}
        self._heads: dict[str, str] = {}
        offers = {site: update.offer for site, update in sorted(ready.items()) if update.offer is not None}
        self._base = plan.weights.digest
        self._aggregator = Aggregator(
            Subject(recipe_id=plan.recipe_id, round=plan.round, base=self._base),
            offers,
            threshold=recipe.federation.quorum,
            numbers=plan.weights.size + 1,
        )

    def run(self) -> SecureSum:
        try:
            self._run()
            words = self._aggregator.total()
            mean, weight = self._recipe.fixed_point.decode(
                words, len(self._aggregator.masked), self._plan.weights.shapes
            )
        except SecureAggregationError as error:
            raise SecureAggregationError(
                "; ".join((str(error), *(f"{name}: {why}" for name, why in self._left.items())))
            ) from None
        return SecureSum(
            mean=mean,
            weight=weight,
            session=self._aggregator.session,
            masked=dict(self._aggregator.masked),
            left=dict(self._left),
            heads=self._heads,
        )

    def _run(self) -> None:
        sum_, plan, base = self._aggregator, self._plan, self._base
        gathering = Gathering(recipe_id=plan.recipe_id, round=plan.round, base=base, offers=sum_.offers)
        self._step(
            dict.fromkeys(sum_.offers, gathering), Dealing,
            lambda answer: sum_.deal(answer.site, answer.session, answer.seed, answer.boxes),
        )  # fmt: skip
        masking = {
            site: Masking(recipe_id=plan.recipe_id, round=plan.round, base=base, session=sum_.session, boxes=boxes)
            for site, boxes in sum_.boxes().items()
        }
        self._step(masking, MaskedUpdate, lambda answer: sum_.add(answer.site, answer.session, answer.values))
        self._enough(sum_.masked, "masked updates have come")
        survivors = Survivors(
            recipe_id=plan.recipe_id, round=plan.round, base=base, session=sum_.session, masked=sum_.masked
        )
        self._step(
            dict.fromkeys(sum_.masked, survivors), Agreement,
            lambda answer: sum_.sign(answer.site, answer.session, answer.signature),
        )  # fmt: skip
        self._enough(sum_.signatures, "sites have signed the list")
        opening = Opening(
            recipe_id=plan.recipe_id,
            round=plan.round,
            base=base,
            session=sum_.session,
            masked=sum_.masked,
            signatures=sum_.signatures,
        )
        self._step(
            dict.fromkeys(sum_.masked, opening), Shares,
            lambda answer: sum_.open(answer.site, answer.session, answer.seeds, answer.keys),
        )  # fmt: skip

    def _step(self, asks: Mapping[str, Ask], kind: type[A], use: Callable[[A], None]) -> None:
        """Asks, and uses each good answer as it comes, so that no two masked updates are held."""

        def take(answer: Answer) -> Answer:
            if not isinstance(answer, kind) or (answer.recipe_id, answer.round) != (
                self._plan.recipe_id, self._plan.round,
            ):  # fmt: skip
                self._left.setdefault(answer.site, f"the answer is no {kind.__name__} of this round")
                return answer
            if answer.audit_head:
                self._heads[answer.site] = answer.audit_head
            try:
                use(answer)
            except SecureAggregationError as error:
                self._left.setdefault(answer.site, str(error))
            return _emptied(answer)

        for site, reply in self._transport.step(asks, self._recipe.federation.timeout_s, take).items():
            if isinstance(reply, Refusal):
                self._left.setdefault(site, f"site refused ({reply.code}): {reply.why}")
            elif isinstance(reply, Failure):
                self._left.setdefault(site, reply.why)

    def _enough(self, found: Mapping[str, str], what: str) -> None:
        least = self._recipe.federation.quorum
        if len(found) < least:
            raise SecureAggregationError(f"{len(found)} {what}, expected at least {least}")
