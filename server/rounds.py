"""The federation's loop: plan, ask, admit, aggregate. State in, new state out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, Protocol

from common.config import Recipe
from common.errors import QuorumError
from common.exchange import Failure, Hello, Reply, RoundPlan, Scores, Spent, Update
from common.weights import Weights
from server.admit import refusal
from server.aggregate import Memory, aggregate

METRIC = "auroc"
"""The validation score that early stopping watches."""


@dataclass(frozen=True, kw_only=True)
class SiteRound:
    """What one admitted site reported in a round."""

    steps: int
    weight: float
    update_norm: float
    train_loss: float | None
    validation: Scores | None
    test: Scores | None
    spent: Spent | None
    update_digest: str


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One round, as the report, TensorBoard and the audit log show it."""

    round: int
    work: str
    accepted: Mapping[str, SiteRound]
    refused: Mapping[str, str]
    """Site to reason."""
    validation: float | None
    """Mean AUROC of the incoming model over the sites that gave one, unweighted."""
    before: str
    """Digest of the weights the round started from."""
    after: str
    seconds: float
    heads: Mapping[str, str] = field(default_factory=dict)
    """Site to the head of its audit chain, of refusals too."""


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that must survive a restart of the coordinator."""

    recipe_id: str
    round: int
    """Rounds behind us."""
    weights: Weights
    memory: Memory = field(default_factory=dict)
    history: tuple[RoundReport, ...] = ()
    done: bool = False
    """Training and the closing evaluation are behind us."""
    average: Weights | None = None
    """Exponential moving average of the global weights, with `federation.ema_decay`; it becomes the final model."""
    best: Weights | None = None
    """The weights with the best federated validation so far, when they are not the present ones; kept only with
    early stopping."""


class Transport(Protocol):
    """How plans reach sites: in this process, or over the network."""

    def hello(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        """Waits for the sites before the first round; who is there, by site name."""

    def joined(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        """Sites that came since, asked between two rounds without waiting for anybody."""

    def ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float) -> Sequence[Reply]:
        """One reply for every site asked; silence is a `Failure`, never missing."""


def start(recipe: Recipe, weights: Weights) -> ServerState:
    """The state before the first round."""
    return ServerState(recipe_id=recipe.id, round=0, weights=weights)


def run(
    state: ServerState,
    recipe: Recipe,
    transport: Transport,
    sites: Callable[[], Mapping[str, Hello]],
    *,
    buffers: frozenset[str],
    audit_head: Callable[[], str] = str,
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Runs what is left of a federation and yields after every round; the caller saves, plots and prints.

    Args:
        sites: Who is asked; called before every round, for sites may join between two of them.
        buffers: Exchanged names that are running statistics, see `aggregate`.
        audit_head: Gives the head of the coordinator's audit chain, which goes out with every plan.

    The last report is the closing evaluation: every site measures the final model on its test patients. With early
    stopping it is also the first measure of the last model; when an earlier one was better, that one is taken
    and evaluated once more.

    Raises:
        QuorumError: Fewer than `federation.quorum` replies were admitted; the last yielded state stands.
    """
    while not state.done:
        closing = state.round >= recipe.rounds or _closed(state) or _should_stop(state, recipe)
        work: Literal["train", "evaluate"] = "evaluate" if closing else "train"
        state, report = _step(state, recipe, transport, sites(), work, buffers, audit_head())
        yield state, report


def _step(
    state: ServerState,
    recipe: Recipe,
    transport: Transport,
    sites: Mapping[str, Hello],
    work: Literal["train", "evaluate"],
    buffers: frozenset[str],
    audit_head: str,
) -> tuple[ServerState, RoundReport]:
    began = time.monotonic()
    plan = RoundPlan(
        recipe_id=state.recipe_id,
        round=state.round + 1,
        work=work,
        weights=state.weights,
        audit_head=audit_head,
    )
    replies = {reply.site: reply for reply in transport.ask(plan, sorted(sites), recipe.federation.timeout_s)}
    accepted: dict[str, Update] = {}
    refused: dict[str, str] = {}
    for site in sorted(sites):
        reply = replies.get(site) or Failure(site=site, round=plan.round, why="no reply")
        why = refusal(reply, plan, recipe, sites[site])
        if why is None and isinstance(reply, Update):
            accepted[site] = reply
        else:
            refused[site] = why or "not an update"
    if len(accepted) < recipe.federation.quorum:
        raise QuorumError(
            f"round {plan.round}: {len(accepted)} of {len(sites)} replies accepted, quorum is "
            f"{recipe.federation.quorum}; the model is as it was. Refused: {refused}"
        )
    weights, memory, average = state.weights, state.memory, state.average
    if work == "train":
        step, memory = aggregate(list(accepted.values()), recipe.federation, memory, round_=plan.round, buffers=buffers)
        weights = state.weights + step
        average = _average(average, weights, recipe.federation.ema_decay, plan.round)
        if average is not None and plan.round == recipe.rounds:
            weights = average
    report = RoundReport(
        round=plan.round,
        work=work,
        accepted={site: _site_round(update) for site, update in accepted.items()},
        refused=refused,
        validation=_mean_score(accepted.values()),
        before=state.weights.digest,
        after=weights.digest,
        seconds=round(time.monotonic() - began, 3),
        heads={site: head for site, reply in replies.items() if (head := getattr(reply, "audit_head", ""))},
    )
    return _after(replace(state, average=average), recipe, report, weights, memory), report


def _average(before: Weights | None, weights: Weights, decay: float, round_: int) -> Weights | None:
    """The moving average after a round; None without one.

    The decay rises to its value, so that the first rounds are soon forgotten (as in De et al. 2022).
    """
    if not decay or before is None:
        return weights if decay else None
    decay = min(decay, (1 + round_) / (10 + round_))
    return before * decay + weights * (1 - decay)


def _after(state: ServerState, recipe: Recipe, report: RoundReport, weights: Weights, memory: Memory) -> ServerState:
    watching = recipe.federation.early_stopping.patience_rounds > 0
    # Every report measures the weights that its round started from.
    improved = report.validation is not None and report.validation > max(_measured(state), default=-1.0)
    after = replace(
        state,
        round=state.round + (report.work == "train"),
        weights=weights,
        memory=memory,
        history=(*state.history, report),
    )
    if report.work == "train":
        return replace(after, best=(state.weights if improved else state.best) if watching else None)
    if state.best is None or improved:
        return replace(after, best=None, done=True)
    return replace(after, weights=state.best, best=None)


def _closed(state: ServerState) -> bool:
    return bool(state.history) and state.history[-1].work == "evaluate"


def _measured(state: ServerState) -> list[float]:
    return [report.validation for report in state.history if report.validation is not None]


def _should_stop(state: ServerState, recipe: Recipe) -> bool:
    stopping, scores = recipe.federation.early_stopping, _measured(state)
    # Rounds in which no site gave a score say nothing, for or against.
    if not stopping.patience_rounds or len(scores) <= stopping.patience_rounds:
        return False
    before, lately = scores[: -stopping.patience_rounds], scores[-stopping.patience_rounds :]
    return max(lately) <= max(before) + stopping.min_improvement


def _mean_score(updates: Iterable[Update]) -> float | None:
    scores = [
        update.validation.values[METRIC]
        for update in updates
        if update.validation is not None and METRIC in update.validation.values
    ]
    return fmean(scores) if scores else None


def _site_round(update: Update) -> SiteRound:
    return SiteRound(
        steps=update.steps,
        weight=update.weight,
        update_norm=update.delta.norm,
        train_loss=update.train_loss,
        validation=update.validation,
        test=update.test,
        spent=update.spent,
        update_digest=update.delta.digest,
    )
