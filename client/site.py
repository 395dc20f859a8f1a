"""One hospital in a federation: what it allows, does, answers, spends and writes down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.cohort import SPLITS, Cohort, Split
from client.compression import Remainders
from client.dp import check_delta
from client.ledger import Kind, Ledger, Reservation
from client.noised_scores import histogram, noised, scores
from client.outbox import Outbox
from client.policy import check_budget, objections, score_event, scores_spent, told, visit_event
from client.secure import Sums, noise_norm
from client.train import Private, Trained, Trainer, site_noise, train
from common.accounting import Event, epsilon_pld
from common.config import Recipe
from common.deployment import Policy
from common.errors import ConfigError, DataError, DivergedError, FedicomError, PrivacyError, SecureAggregationError
from common.exchange import (
    Agreement,
    Answer,
    Ask,
    Code,
    Gathering,
    Hello,
    MaskedUpdate,
    Masking,
    Question,
    Refusal,
    RoundPlan,
    Scores,
    Spent,
    Survivors,
    Update,
)
from common.inference import logits
from common.installed import package_versions
from common.journal import Log
from common.metrics import probabilities, score
from common.models import set_weights
from common.scattering import ScatteringClassifier
from common.storage import Flush, to_disk
from common.weights import Weights

if TYPE_CHECKING:
    from client.parallel import Team

log = logging.getLogger(__name__)

_ROUND_BOOTSTRAPS = 100
"""Resamples behind the intervals of every round's scores; the closing evaluation takes the recipe's own number."""


class _ClosedError(PrivacyError):
    """Work was asked for outside the policy's hours."""


class _WithdrawnError(ConfigError):
    """The approval went while the work was done."""


class Site:
    """Holds the approved recipe, the cohort, the ledger and the log of one hospital; answers round plans."""

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        cohort: Cohort,
        model: Callable[[], nn.Module],
        *,
        folder: Path,
        audit: Log,
        ledger: Ledger | None,
        device: torch.device,
        devices: Sequence[torch.device] = (),
        policy: Policy,
        keep: bool = False,
        sums: Sums | None = None,
        now: Callable[[], datetime] = datetime.now,
        turn: AbstractContextManager[object] = nullcontext(),
        trainer: Trainer | None = None,
        flush: Flush = to_disk,
        started: str = "",
        stands: Callable[[str], bool] = lambda recipe_id: True,
    ) -> None:
        """Wires a site.

        Args:
            recipe: The one recipe that is approved here.
            model: Gives the recipe's network; its weights are overwritten at every visit.
            folder: The site's own state; replies wait here until the coordinator has them.
            ledger: The cohort's privacy ledger; None only for a recipe without privacy.
            devices: Several that train together, `device` first; empty: that one alone.
            policy: What this site allows, whatever the recipe says.
            keep: Keep every reply until the next one, so that a question asked again after a crash costs no second
                training. Under privacy and secure aggregation this is always so.
            sums: This site's secure sums; None where no recipe asks for one.
            now: The local time, for the opening hours.
            turn: Held while the model is in use, where sites share one; the bookkeeping of a visit is outside.
            trainer: Trains in the place of this site alone, and takes the turn itself; None: this site, alone.
            flush: Has a kept reply last before it is paid for; see `common.storage`.
            started: The manifest with which this process wrote the start of this very site into its log before.
            stands: Whether a recipe is still approved: asked once more before the log says that something leaves.
        """
        self.name, self.recipe, self.cohort, self.policy = name, recipe, cohort, policy
        self.audit, self.ledger, self.device, self._devices = audit, ledger, device, devices
        self._secure, self._sums = recipe.privacy.secure_aggregation, sums
        self._model, self._now, self._turn, self._trainer, self._stands = model, now, turn, trainer, stands
        self._keep = keep or recipe.privacy.active or self._secure
        self._outbox = Outbox(folder / "outbox", flush)
        self._remainders = Remainders(folder / "remainders", recipe.federation.compression, flush)
        if started != cohort.manifest:
            patients = {split: self._cell(cohort.patients(split)) for split in SPLITS}
            audit.append(
                "site started", recipe_id=recipe.id, manifest=cohort.manifest, patients=patients,
                counts_rounded=policy.counts == "coarse", versions=dict(package_versions()),
            )  # fmt: skip

    def hello(self, question: Question) -> Hello | Refusal:
        """Who this is, for the coordinator's list, or why it would not work on the recipe."""
        try:
            self._agree(question.recipe_id)
        except FedicomError as error:
            return self._refuse(question.recipe_id, 1, _side(error), str(error))
        try:
            if self.recipe.privacy.active:
                check_budget(self.recipe, self.cohort.patients("train"), self.policy, self._budget)
        except FedicomError as error:
            self.audit.append("budget refused", round=1, recipe_id=self.recipe.id, why=str(error)[:500])
            return self._refuse(question.recipe_id, 1, _code(error), str(error))
        if question.audit_head:
            self.audit.append("question received", recipe_id=question.recipe_id, server_head=question.audit_head)
        return Hello(
            site=self.name,
            recipe_id=self.recipe.id,
            versions=package_versions(),
            patients={split: self._count(self.cohort.patients(split)) for split in SPLITS},
            manifest=self.cohort.manifest,
            audit_head=self.audit.head,
            counts_rounded=self.policy.counts == "coarse",
        )

    def misunderstood(self, why: str) -> Refusal:
        """The answer to a message that is none of ours; nothing is run for it."""
        head = self.audit.append("message refused", why=why[:500])
        return Refusal(
            site=self.name, recipe_id=self.recipe.id, round=1, code="message", why=why[:500], audit_head=head
        )  # fmt: skip

    def visit(self, plan: RoundPlan) -> Update | Refusal:
        """Does what the plan asks, or says why not. Never raises, for an error's text may quote data."""
        try:
            self._permit(plan)
        except FedicomError as error:
            return self._refuse(plan.recipe_id, plan.round, _side(error), str(error))
        try:
            stored = self._stored(plan)
            if stored is not None:
                return stored
            self._open()
            self.audit.append(
                "plan received", recipe_id=plan.recipe_id, round=plan.round, work=plan.work,
                weights=plan.weights.digest, server_head=plan.audit_head,
            )  # fmt: skip
            return self._train(plan) if plan.work == "train" else self._evaluate(plan)
        except _WithdrawnError as error:
            return self._refuse(plan.recipe_id, plan.round, _code(error), str(error), kind="recipe refused")
        except FedicomError as error:
            return self._refuse(plan.recipe_id, plan.round, _code(error), str(error))
        except Exception as error:
            # Its text may quote data or paths: only the kind leaves, the rest stays in the local log.
            log.exception("round %d failed at site %s", plan.round, self.name)
            return self._refuse(
                plan.recipe_id, plan.round, "training", f"{type(error).__name__} at the site; see its own log"
            )

    def step(self, ask: Ask) -> Answer | Refusal:
        """Takes a step of a secure sum, or says why not. Never raises, as `visit`."""
        try:
            self._agree(ask.recipe_id)
            return self._step(ask)
        except FedicomError as error:
            return self._refuse(ask.recipe_id, ask.round, "message", str(error))
        except Exception as error:
            log.exception("a step of the sum of round %d failed at site %s", ask.round, self.name)
            why = f"{type(error).__name__} at the site; see its own log"
            return self._refuse(ask.recipe_id, ask.round, "message", why)

    def _permit(self, plan: RoundPlan) -> None:
        self._agree(plan.recipe_id)
        last = self.recipe.rounds if plan.work == "train" else self.recipe.rounds + 1
        if plan.round > last:
            raise ConfigError(f"round {plan.round} is past the last of the recipe, {last}")

    def _agree(self, recipe_id: str) -> None:
        recipe = self.recipe
        if recipe_id != recipe.id:
            raise ConfigError(f"recipe {recipe_id[:12]} is not approved here; approved is {recipe.id[:12]}")
        patients = self.cohort.patients("train")
        if found := objections(recipe, self.policy, patients):
            raise PrivacyError("; ".join(found))
        if recipe.privacy.delta is not None:
            check_delta(recipe.privacy.delta, patients)
        if self._secure and self._sums is None:
            raise PrivacyError("the recipe demands secure aggregation, for which this site has no keys")

    def _open(self) -> None:
        """Asked before work begins; a kept reply may leave at any hour."""
        if not self.policy.open_at(self._now().time()):
            raise _ClosedError(f"this site works at {', '.join(self.policy.hours)} only (hours); ask again then")

    def _team(self) -> Team | None:
        """The processes that share the training, kept from visit to visit."""
        if len(self._devices) < 2:
            return None
        from client.parallel import team_of

        return team_of(self.recipe, self._devices, self.policy.gpu_memory_fraction)

    def _trained(self, plan: RoundPlan, private: Private | None) -> Trained:
        if self._trainer is not None:
            return self._trainer(plan.weights, self.cohort, round_=plan.round, site=self.name, private=private)
        with self._turn:
            return train(
                self._model(), plan.weights, self.cohort, self.recipe, round_=plan.round, site=self.name,
                device=self.device, private=private, team=self._team(),
            )  # fmt: skip

    def _train(self, plan: RoundPlan) -> Update:
        private, reserved = self._reserve(plan) if self.recipe.privacy.active else (None, None)
        try:
            with self._turn:
                validation = self._scores(plan.weights, "validation", _ROUND_BOOTSTRAPS)
            trained = self._trained(plan, private)
            if self._secure:
                self.recipe.fixed_point.check(trained.delta, self._weight)
        except Exception as error:
            if reserved is not None:
                # An answer that tells of the noise that was drawn, or of a prediction, is paid for, or it could be had
                # again and again. Any other (a card that is full, mostly) tells nothing of them, and costs nothing.
                tells = isinstance(error, DivergedError | SecureAggregationError)
                self._budget.settle(reserved, reserved.event.steps if tells else 0)
            raise
        spent = self._spent(trained.clip_norm) if reserved is not None else None
        update = Update(
            site=self.name,
            recipe_id=plan.recipe_id,
            round=plan.round,
            base=plan.weights.digest,
            delta=self._remainders.rounded(plan, trained.delta),
            compression=self.recipe.federation.compression,
            weight=float(self._weight),
            steps=trained.steps,
            train_loss=trained.loss,
            validation=validation,
            spent=spent,
        )
        # First kept, then settled, then sent: a crash at any point costs no second training and no second epsilon.
        path = self._store(plan, update, reserved) if self._keep else None
        if reserved is not None:
            assert path is not None
            self._settle(path, reserved, trained.steps)
        return self._sent("update sent", update)

    def _sent(self, kind: str, update: Update, **facts: Any) -> Update:
        """Writes down that the update leaves; it carries the log's head from then on.

        For a secure sum the update stays, and what leaves is all else, with new keys.
        """
        self._check_stands(update.recipe_id)
        if self._sums is not None and self._secure:
            offer, norm = self._sums.offer(self.recipe, update), update.delta.norm
            head = self.audit.append("update kept", **_facts(update), **self._ledger_fact(), **facts)
            kept = replace(update, delta=Weights({}), weight=1.0, steps=0, train_loss=None)
            return replace(kept, norm=norm, offer=offer, audit_head=head, ledger_head=self._ledger_head)
        head = self.audit.append(
            kind, digest=update.delta.digest, bytes=update.nbytes, compression=update.compression, **_facts(update),
            **self._ledger_fact(), **facts,
        )  # fmt: skip
        return replace(update, audit_head=head, ledger_head=self._ledger_head)

    def _check_stands(self, recipe_id: str) -> None:
        if not self._stands(recipe_id):
            raise _WithdrawnError("the approval was withdrawn meanwhile")

    def _step(self, ask: Ask) -> Answer:
        assert self._sums is not None
        match ask:
            case Gathering():
                dealing = self._sums.deal(ask)
                head = self.audit.append(
                    "sum joined", recipe_id=ask.recipe_id, round=ask.round, session=dealing.session,
                    sites=sorted(ask.offers),
                )  # fmt: skip
                return replace(dealing, audit_head=head)
            case Masking():
                kept = self._outbox.find(ask.recipe_id, ask.round, ask.base)
                if kept is None:
                    raise SecureAggregationError(f"this site has no update of round {ask.round} to be summed")
                update = kept.update
                masked = self._sums.mask(ask, self.recipe, update)
                head = self.audit.append(
                    "update sent again" if masked.again else "update sent",
                    digest=masked.values.digest, bytes=masked.values.nbytes, session=ask.session, **_facts(update),
                    **self._ledger_fact(),
                )  # fmt: skip
                return MaskedUpdate(
                    site=self.name, recipe_id=ask.recipe_id, round=ask.round, session=ask.session,
                    values=masked.values, audit_head=head,
                )  # fmt: skip
            case Survivors():
                return Agreement(
                    site=self.name, recipe_id=ask.recipe_id, round=ask.round, session=ask.session,
                    signature=self._sums.agree(ask), audit_head=self.audit.head,
                )  # fmt: skip
            case _:
                shares = self._sums.open(ask)
                head = self.audit.append(
                    "sum opened", recipe_id=ask.recipe_id, round=ask.round, session=ask.session,
                    sites=sorted(shares.seeds), left=sorted(shares.keys),
                )  # fmt: skip
                return replace(shares, audit_head=head)

    def _evaluate(self, plan: RoundPlan) -> Update:
        measure = self._noised_scores if self.policy.metrics == "noised" else self._exact_scores
        validation, test, reserved = measure(plan)
        update = Update(
            site=self.name,
            recipe_id=plan.recipe_id,
            round=plan.round,
            base=plan.weights.digest,
            delta=Weights({}),
            weight=1.0,
            steps=0,
            validation=validation,
            test=test,
            spent=self._spent(self._clip_norm(plan)),
            scores_spent=scores_spent(self.ledger, self.recipe, self.policy),
        )
        if reserved is not None:
            self._settle(self._store(plan, update, reserved), reserved, reserved.event.steps)
        return self._measured(update)

    def _measured(self, update: Update) -> Update:
        """Writes down that an evaluation leaves: nothing is trained any more."""
        self._check_stands(update.recipe_id)
        self._remainders.forget(update.recipe_id)
        head = self.audit.append(
            "evaluation sent", round=update.round, weights=update.base, scores=_told(update.validation, update.test),
            **self._ledger_fact(),
        )  # fmt: skip
        return replace(update, audit_head=head, ledger_head=self._ledger_head)

    def _exact_scores(self, plan: RoundPlan) -> tuple[Scores | None, Scores | None, None]:
        bootstraps = self.recipe.evaluation.bootstraps
        # One for each model that its rounds can end with, and one for a crash.
        if self.recipe.privacy.active and not self._outbox.counted(plan.recipe_id, self.recipe.rounds + 1):
            log.warning("no scores leave: they were told more often than recipe %s has rounds", plan.recipe_id[:12])
            return None, None, None
        with self._turn:
            validation = self._scores(plan.weights, "validation", bootstraps)
            test = self._scores(plan.weights, "test", bootstraps)
        return validation, test, None

    def _noised_scores(self, plan: RoundPlan) -> tuple[Scores | None, Scores | None, Reservation | None]:
        """Scores out of noised histograms, or none where they cannot be paid; see `client.noised_scores`."""
        event = score_event(self.policy)
        try:
            if any(
                entry.settled and (entry.recipe_id, entry.kind) == (plan.recipe_id, "scores")
                for entry in self._budget.entries()
            ):
                raise PrivacyError("the noised scores of this recipe were told once already")
            reserved = self._pay(plan, event, kind="scores")
        except PrivacyError as error:
            log.info("no scores leave: %s", error)
            return None, None, None
        noise = site_noise(self.recipe, plan.round, f"{self.name} scores")
        found = []
        for split in ("validation", "test"):
            with self._turn:
                counts = self._counted(plan.weights, split)
            release = noised(counts, event.noise_multiplier, noise)
            made = scores(
                release, event.noise_multiplier, self.recipe.task, min_cell=self._min_cell,
                confidence=self.recipe.evaluation.confidence, seed=self.recipe.seed,
            )  # fmt: skip
            found.append(Scores(patients=made.patients, values=dict(made.values), noised=True))
        return found[0], found[1], reserved

    # Privacy

    @property
    def _budget(self) -> Ledger:
        if self.ledger is None:
            raise PrivacyError(
                "the recipe demands differential privacy, but this site has no ledger; nothing is trained"
            )
        return self.ledger

    def _reserve(self, plan: RoundPlan) -> tuple[Private, Reservation]:
        recipe = self.recipe
        drawn, event = visit_event(recipe, self.cohort.patients("train"), self.policy)
        if self._secure:
            norm = noise_norm(recipe, event.noise_multiplier, drawn.steps, plan.weights.size)
            limit = recipe.fixed_point.limit
            if norm > limit:
                raise ConfigError(
                    f"the noise of a round alone may move the model by {norm:.3g}, and a secure sum takes updates up "
                    f"to federation.max_update_norm {limit:g}; nothing was trained: lower training.lr or raise it"
                )
        reserved = self._pay(plan, event)
        noise = site_noise(recipe, plan.round, self.name)
        private = Private(
            sampling=drawn, noise_multiplier=event.noise_multiplier, noise=noise, clip_norm=self._clip_norm(plan)
        )  # fmt: skip
        return private, reserved

    def _pay(self, plan: RoundPlan, event: Event, *, kind: Kind = "updates") -> Reservation:
        """Reserves, if the ledger is as new as the coordinator remembers it, and writes that down."""
        recipe = self.recipe
        known = [plan.ledger_heads.get(self.name, "")]
        try:
            reserved = self._budget.reserve(
                recipe.id, round=plan.round, base=plan.weights.digest, event=event, kind=kind, known=known,
                visits=recipe.rounds,
            )  # fmt: skip
        except PrivacyError as error:
            self.audit.append("budget refused", round=plan.round, recipe_id=recipe.id, why=str(error))
            raise
        self.audit.append(
            "budget reserved", round=plan.round, recipe_id=recipe.id, noise_multiplier=event.noise_multiplier,
            sampling_rate=event.sampling_rate, steps=event.steps, epsilon=reserved.epsilon, delta=self.policy.delta,
            ledger_head=self._budget.head, **({} if kind == "updates" else {"releases": kind}),
        )  # fmt: skip
        return reserved

    def _settle(self, kept: Path, reserved: Reservation, steps: int) -> None:
        try:
            self._budget.settle(reserved, steps)
        except PrivacyError:
            kept.unlink(missing_ok=True)  # nobody has paid for these very bytes: they shall never leave
            raise

    def _clip_norm(self, plan: RoundPlan) -> float | None:
        """Where an adaptive clip norm stood after the last round, which the kept reply tells; None for a fixed one."""
        if self.recipe.privacy.clip_quantile is None:
            return None
        told = (update.spent.clip_norm for update in self._outbox.newest(plan.recipe_id) if update.spent is not None)
        return next(told, None)

    def _spent(self, clip_norm: float | None) -> Spent | None:
        privacy = self.recipe.privacy
        if not privacy.active:
            return None
        events = self._budget.events(self.recipe.id, "updates")
        if not events:  # every round was refused here
            return None
        assert privacy.delta is not None
        return Spent(
            epsilon=epsilon_pld(events, privacy.delta),
            delta=privacy.delta,
            noise_multiplier=events[-1].noise_multiplier,
            clip_norm=clip_norm or privacy.clip_norm,
            sampling_rate=events[-1].sampling_rate,
            steps=sum(event.steps for event in events),
        )

    @property
    def _ledger_head(self) -> str:
        return self.ledger.head if self.ledger is not None else ""

    def _ledger_fact(self) -> dict[str, str]:
        """For the log, which remembers the newest ledger."""
        return {"ledger_head": self._ledger_head} if self.ledger is not None else {}

    # Replies are kept until the next one: asked again, the same update goes out.

    def _stored(self, plan: RoundPlan) -> Update | None:
        kept = self._outbox.find(plan.recipe_id, plan.round, plan.weights.digest, plan.work)
        if kept is None:
            return None
        number, update = kept.reservation, kept.update
        # A crash came between keeping and settling: left open, a later training could take the reservation over.
        if number:
            reserved = self._budget.pending(number, plan.recipe_id, round=plan.round, base=update.base)
            if reserved is not None:
                self._settle(kept.path, reserved, update.steps if plan.work == "train" else reserved.event.steps)
        if plan.work == "evaluate":
            return self._measured(update)
        # With a head of now: the coordinator has seen later ones than the kept one, as if the log had been rewritten.
        return self._sent("update sent again", update, server_head=plan.audit_head)

    def _store(self, plan: RoundPlan, update: Update, reserved: Reservation | None) -> Path:
        return self._outbox.keep(plan, update, reserved.number if reserved is not None else 0)

    # Scores and refusals

    def _scores(self, weights: Weights, split: Split, bootstraps: int) -> Scores | None:
        """Exact ones."""
        if self.policy.metrics != "bounded":
            return None
        if (patients := self.cohort.patients(split)) < self._min_cell:
            return Scores(patients=0, values={})
        indices, samples = self.cohort.indices(split), self.cohort.samples
        result = score(
            samples.targets_N[indices], self._probabilities(weights, indices), samples.patient_N[indices],
            self.recipe.task, replace(self.recipe.evaluation, bootstraps=bootstraps, min_cell=self._min_cell),
            seed=self.recipe.seed,
        )  # fmt: skip
        return Scores(patients=self._count(patients), values=dict(result.values))

    def _counted(self, weights: Weights, split: Split) -> npt.NDArray[np.float64]:
        indices, samples = self.cohort.indices(split), self.cohort.samples
        probability_NC = self._probabilities(weights, indices)
        return histogram(samples.targets_N[indices], probability_NC, samples.patient_N[indices], self.recipe.task)

    def _probabilities(self, weights: Weights, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        task = self.recipe.task
        if not len(indices):
            return np.zeros((0, task.outputs), np.float32)
        model = self._model()
        set_weights(model, weights)
        x_N = self.cohort.scattered if isinstance(model, ScatteringClassifier) else self.cohort.samples.x_N
        return probabilities(logits(model, x_N, indices, device=self.device), task.kind)

    @property
    def _weight(self) -> int:
        return self.cohort.patients("train") if self.recipe.federation.site_weights == "patients" else 1

    @property
    def _min_cell(self) -> int:
        return max(self.policy.min_cell, self.recipe.evaluation.min_cell)

    def _cell(self, patients: int) -> int:
        if patients < self._min_cell or self.policy.counts == "none":
            return 0
        return told(patients, self.policy)

    def _count(self, patients: int) -> int:
        """What the coordinator is told; nothing where the weight of the site goes under masks."""
        masked = self._secure and self.recipe.federation.site_weights == "patients"
        return 0 if masked else self._cell(patients)

    def _refuse(self, recipe_id: str, round_: int, code: Code, why: str, *, kind: str = "plan refused") -> Refusal:
        why = why[:500]
        try:
            head = self.audit.append(kind, round=round_, recipe_id=recipe_id, code=code, why=why)
        except FedicomError:  # a full disk, or a log that does not hold: the coordinator shall still hear why
            log.exception("the refusal could not be logged")
            head = ""
        return Refusal(site=self.name, recipe_id=recipe_id, round=round_, code=code, why=why, audit_head=head)


def _facts(update: Update) -> dict[str, Any]:
    """What the log says of an update, wherever it goes."""
    spent = update.spent
    return {
        "recipe_id": update.recipe_id,
        "round": update.round,
        "norm": update.delta.norm,
        "clip_norm": spent.clip_norm if spent else None,
        "noise_multiplier": spent.noise_multiplier if spent else None,
        "epsilon": spent.epsilon if spent else None,
        "delta": spent.delta if spent else None,
        "scores": _told(update.validation),
    }


def _told(*scores: Scores | None) -> bool:
    """Whether a score leaves with this reply."""
    return any(found is not None and found.values for found in scores)


def _side(error: FedicomError) -> Code:
    """Whether the recipe or this site's policy forbids what was asked."""
    return "recipe" if isinstance(error, ConfigError) else "policy"


def _code(error: FedicomError) -> Code:
    kinds: tuple[tuple[type, Code], ...] = (
        (_ClosedError, "policy"), (ConfigError, "recipe"), (PrivacyError, "budget"), (DataError, "data"),
    )  # fmt: skip
    return next((code for kind, code in kinds if isinstance(error, kind)), "training")
