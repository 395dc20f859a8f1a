"""The federation's loop: plan, ask, admit, aggregate. State in, new state out."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

from common.config import Recipe
from common.errors import QuorumError, SecureAggregationError
from common.exchange import Answer, Ask, Failure, Hello, Refusal, Reply, RoundPlan, Scores, ScoresSpent, Spent, Update
from common.weights import Weights
from server.admit import refusal, sum_refusal
from server.aggregate import Gathering, Memory
from server.secure import SecureSum, Take, secure_sum

METRIC = "auroc"
"""The validation score that early stopping watches."""
_SUMS = 3
"""Attempts at a secure sum, each with new keys, before the round is given up."""


@dataclass(frozen=True, kw_only=True)
class SiteRound:
    """What one admitted site reported in a round."""

    steps: int
    """Of training; 0 under secure aggregation, which tells neither steps nor weight (1)."""
    weight: float
    update_norm: float
    """Under secure aggregation as the site says."""
    train_loss: float | None
    validation: Scores | None
    test: Scores | None
    spent: Spent | None
    update_digest: str
    """Under secure aggregation of the masked update."""
    scores_spent: ScoresSpent | None = None
    ledger_head: str = ""
    """Of the site's privacy ledger after the visit; empty without privacy."""


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
    session: str = ""
    """Name of the round's secure sum; empty where each update was seen."""


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
    ended: bool = False
    """The operator ended the training where it stood: the closing evaluation takes whoever is there, and no quorum."""
    best: Weights | None = None
    """The weights with the best federated validation so far, when they are not the present ones; kept only with
    early stopping."""


class Transport(Protocol):
    """How plans reach sites: in this process, or over the network."""

    def hello(
        self, recipe: Recipe, audit_head: str, before: Collection[str] = (), *, quorum: int | None = None
    ) -> Mapping[str, Hello]:
        """Waits for the sites before the first round; who is there, by site name.

        Args:
            before: Sites that took part before this process began.
            quorum: How many are enough, now and in all that is asked later; None: `federation.quorum`.
        """

    def joined(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        """Sites that came since, asked between two rounds without waiting for anybody."""

    def ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float) -> Iterable[Reply]:
        """One reply for every site asked, as they come; silence is a `Failure`, never missing."""

    def step(self, asks: Mapping[str, Ask], timeout_s: float, take: Take) -> Mapping[str, Answer | Refusal | Failure]:
        """A step of a secure sum, each site its own; answers go to `take` as they come."""


def start(recipe: Recipe, weights: Weights) -> ServerState:
    """The state before the first round."""
    return ServerState(recipe_id=recipe.id, round=0, weights=weights)


def ended(state: ServerState) -> ServerState:
    """The state whose next step is the closing evaluation, whatever is left of the recipe's rounds.

    The final model is what it would have been had this been the recipe's last round.
    """
    return replace(state, ended=True, weights=state.weights if state.average is None else state.average)


def run(
    state: ServerState,
    recipe: Recipe,
    transport: Transport,
    sites: Callable[[], Mapping[str, Hello]],
    *,
    buffers: frozenset[str],
    audit_head: Callable[[], str] = str,
    ledger_heads: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Runs what is left of a federation and yields after every round; the caller saves, plots and prints.

    Args:
        sites: Who is asked; called before every round, for sites may join between two of them.
        buffers: Exchanged names that are running statistics, see `aggregate`.
        audit_head: Gives the head of the coordinator's audit chain, which goes out with every plan.
        ledger_heads: Heads of the sites' privacy ledgers as earlier runs saw them last; those of this run follow
            from the state.

    The last report is the closing evaluation: every site measures the final model on its test patients. With early
    stopping it is also the first measure of the last model; when an earlier one was better, that one is taken
    and evaluated once more.

    Raises:
        QuorumError: Fewer than `federation.quorum` replies were admitted; the last yielded state stands.
    """
    while not state.done:
        closing = state.ended or state.round >= recipe.rounds or _closed(state) or _should_stop(state, recipe)
        work: Literal["train", "evaluate"] = "evaluate" if closing else "train"
        asked = sites() if closing else drawn(sites(), recipe, state.round + 1)
        heads = {**ledger_heads, **remembered(state)}
        state, report = _step(state, recipe, transport, asked, work, buffers, audit_head(), heads)
        yield state, report


def drawn(sites: Mapping[str, Hello], recipe: Recipe, round_: int) -> Mapping[str, Hello]:
    """Who is asked to train in a round: `federation.fraction` of the sites, never fewer than the quorum, nor more than
    have room in a secure sum: an update that stays outside would have cost its site epsilon for nothing.

    The draw follows from recipe, round and names alone, so that a resumed run asks whom it would have asked.
    """
    federation, names = recipe.federation, sorted(sites)
    count = max(federation.quorum, math.ceil(federation.fraction * len(names) - 1e-9))  # .1 * 30 is above 3 in binary
    if recipe.privacy.secure_aggregation:
        count = min(count, federation.sites)
    if count >= len(names):
        return sites
    seed = hashlib.sha256(f"sites of round {round_}, seed {recipe.seed}".encode()).digest()
    chosen = np.random.default_rng(list(seed)).choice(len(names), count, replace=False)
    return {names[at]: sites[names[at]] for at in sorted(chosen)}


def remembered(state: ServerState) -> dict[str, str]:
    """Site to the head of its privacy ledger that it told last."""
    return {
        site: done.ledger_head
        for report in state.history
        for site, done in report.accepted.items()
        if done.ledger_head
    }  # fmt: skip


def taken(state: ServerState) -> int | None:
    """Rounds behind the final weights, where early stopping took earlier ones than those of the last round."""
    if sum(report.work == "evaluate" for report in state.history) < 2:
        return None
    return next(report.round for report in state.history if report.before == state.weights.digest) - 1


def behind(state: ServerState) -> dict[str, int]:
    """Site to the rounds in which it trained what is in the final weights; a site that gave nothing is not in it."""
    last = taken(state)
    counted = Counter(
        site
        for report in state.history
        if report.work == "train" and (last is None or report.round <= last)
        for site in report.accepted
    )
    return dict(sorted(counted.items()))


def _step(
    state: ServerState,
    recipe: Recipe,
    transport: Transport,
    sites: Mapping[str, Hello],
    work: Literal["train", "evaluate"],
    buffers: frozenset[str],
    audit_head: str,
    ledger_heads: Mapping[str, str],
) -> tuple[ServerState, RoundReport]:
    began = time.monotonic()
    plan = RoundPlan(
        recipe_id=state.recipe_id,
        round=state.round + 1,
        work=work,
        weights=state.weights,
        audit_head=audit_head,
        ledger_heads={site: head for site, head in ledger_heads.items() if site in sites},
    )
    secure = recipe.privacy.secure_aggregation and work == "train"
    failed: list[str] = []
    while True:
        came = _admitted(transport, plan, recipe, sites, 0 if state.ended else recipe.federation.quorum)
        if not secure:
            total = None
            break
        try:
            total = _summed(plan, recipe, came.updates, transport)
            break
        except SecureAggregationError as error:
            failed.append(str(error))
            if len(failed) == _SUMS:
                raise QuorumError(
                    f"round {plan.round}: no secure sum in {_SUMS} attempts; the model is as it was. "
                    + ". ".join(f"{number}: {why}" for number, why in enumerate(failed, 1))
                ) from None
    weights, memory, average = state.weights, state.memory, state.average
    accepted, refused, gathering = came.accepted, came.refused, came.gathering
    if total is not None:
        refused |= {site: "not in the secure sum" for site in accepted if site not in total.masked} | dict(total.left)
        accepted = {
            site: replace(told, update_digest=total.masked[site])
            for site, told in accepted.items()
            if site in total.masked
        }
        gathering = Gathering(recipe.federation, ["sum"])
        gathering.take("sum", _as_one(total, plan))
    if work == "train":
        step, memory = gathering.step(memory, round_=plan.round, buffers=buffers)
        weights = state.weights + step
        average = _average(average, weights, recipe.federation.ema_decay, plan.round)
        if average is not None and plan.round == recipe.rounds:
            weights = average
    report = RoundReport(
        round=plan.round,
        work=work,
        accepted=accepted,
        refused=refused,
        validation=_mean_score(accepted.values()),
        before=state.weights.digest,
        after=weights.digest,
        seconds=round(time.monotonic() - began, 3),
        heads=came.heads | (dict(total.heads) if total is not None else {}),
        session="" if total is None else total.session,
    )
    return _after(replace(state, average=average), recipe, report, weights, memory), report


@dataclass(frozen=True)
class _Admitted:
    """What became of a plan at all sites, in order of their names."""

    accepted: dict[str, SiteRound]
    refused: dict[str, str]
    heads: dict[str, str]
    updates: dict[str, Update]
    """Those accepted, without their weights, which are in `gathering`."""
    gathering: Gathering


def _admitted(
    transport: Transport, plan: RoundPlan, recipe: Recipe, sites: Mapping[str, Hello], quorum: int
) -> _Admitted:
    """Asks the sites, and takes in each reply as it comes: which may change the model, and why the others may not."""
    outcomes: dict[str, SiteRound | str] = {}
    heads: dict[str, str] = {}
    updates: dict[str, Update] = {}
    gathering = Gathering(recipe.federation, sites)
    for reply in transport.ask(plan, sorted(sites), recipe.federation.timeout_s):
        site = reply.site
        if site not in sites or site in outcomes:
            continue
        why = refusal(reply, plan, recipe, sites[site])
        if why is None and isinstance(reply, Update):
            outcomes[site], updates[site] = _site_round(reply), replace(reply, delta=Weights({}))
            gathering.take(site, reply)
        else:
            outcomes[site] = why or "not an update"
            gathering.take(site, None)
        if head := getattr(reply, "audit_head", ""):
            heads[site] = head
        del reply  # while the next one is waited for, its weights are in the sum alone
    for site in sites.keys() - outcomes.keys():
        outcomes[site] = "no reply"
        gathering.take(site, None)
    accepted = {site: told for site, told in sorted(outcomes.items()) if isinstance(told, SiteRound)}
    refused = {site: why for site, why in sorted(outcomes.items()) if isinstance(why, str)}
    if len(accepted) < quorum:
        raise QuorumError(
            f"round {plan.round}: {len(accepted)} of {len(sites)} replies accepted, quorum is {quorum}; the model is "
            f"as it was. Refused: {refused}"
        )
    return _Admitted(accepted, refused, heads, {site: updates[site] for site in accepted}, gathering)


def _summed(plan: RoundPlan, recipe: Recipe, accepted: Mapping[str, Update], transport: Transport) -> SecureSum:
    total = secure_sum(plan, recipe, accepted, transport)
    if why := sum_refusal(total.mean, recipe):
        raise SecureAggregationError(why)
    return total


def _as_one(total: SecureSum, plan: RoundPlan) -> Update:
    """The mean of all as if one site had sent it: every strategy that is allowed takes a mean first."""
    return Update(
        site="sum", recipe_id=plan.recipe_id, round=plan.round, base=plan.weights.digest, delta=total.mean,
        weight=1.0, steps=1,
    )  # fmt: skip


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


def _mean_score(updates: Iterable[SiteRound]) -> float | None:
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
        update_norm=update.delta.norm if update.norm is None else update.norm,
        train_loss=update.train_loss,
        validation=update.validation,
        test=update.test,
        spent=update.spent,
        scores_spent=update.scores_spent,
        update_digest=update.delta.digest,
        ledger_head=update.ledger_head,
    )
