"""One hospital in a federation: what it allows, does, answers, spends and writes down."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from client.cohort import SPLITS, Cohort, Split
from client.dp import Noise, check_delta, keystream_noise, os_noise, sampling, seeded_noise
from client.ledger import Ledger, Reservation
from client.train import Private, seed_of, train
from common import wire
from common.accounting import Event, solve_noise
from common.audit import AuditLog
from common.config import Recipe
from common.errors import ConfigError, DataError, FedicomError, PrivacyError, StorageError
from common.exchange import Hello, Refusal, RoundPlan, Scores, Spent, Update
from common.inference import logits
from common.metrics import probabilities, score
from common.models import set_weights
from common.storage import private_folder, write_whole
from common.weights import Weights

log = logging.getLogger(__name__)

_PACKAGES = ("fedicom", "flwr", "torch", "monai", "timm", "numpy", "pydicom")
_ROUND_BOOTSTRAPS = 100
"""Resamples behind the intervals of every round's scores; the closing evaluation takes the recipe's own number."""

Code = Literal["recipe", "version", "budget", "policy", "data", "training", "message"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this site lets a recipe do; the site's own, whatever a recipe says."""

    seeded_noise: bool = False
    """Allows `privacy.unsafe_seeded_noise`: simulation only."""
    metrics: Literal["bounded", "none"] = "bounded"
    """Whether scores leave: `bounded` gives those of cells of at least `evaluation.min_cell` patients."""


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
        audit: AuditLog,
        ledger: Ledger | None,
        device: torch.device,
        limits: Limits | None = None,
    ) -> None:
        """Wires a site.

        Args:
            recipe: The one recipe that is approved here.
            model: Gives the recipe's network; its weights are overwritten at every visit.
            folder: The site's own state; replies wait here until the coordinator has them.
            ledger: The cohort's privacy ledger; None only for a recipe without privacy.
        """
        self.name, self.recipe, self.cohort = name, recipe, cohort
        self.audit, self._ledger, self._device = audit, ledger, device
        self._model, self._limits = model, limits or Limits()
        self._outbox = private_folder(folder / "outbox")
        audit.append(
            "site started",
            recipe_id=recipe.id,
            manifest=cohort.manifest,
            patients={split: self._cell(cohort.patients(split)) for split in SPLITS},
            versions=dict(package_versions()),
        )

    def hello(self) -> Hello:
        """Who this is, for the coordinator's list."""
        return Hello(
            site=self.name,
            versions=package_versions(),
            patients={split: self._cell(self.cohort.patients(split)) for split in SPLITS},
            manifest=self.cohort.manifest,
            audit_head=self.audit.head,
        )

    def visit(self, plan: RoundPlan) -> Update | Refusal:
        """Does what the plan asks, or says why not. Never raises, for an error's text may quote data."""
        try:
            self._permit(plan)
        except FedicomError as error:
            return self._refuse(plan, "recipe" if isinstance(error, ConfigError) else "policy", str(error))
        try:
            stored = self._stored(plan)
            if stored is not None:
                return stored
            self.audit.append(
                "plan received",
                recipe_id=plan.recipe_id,
                round=plan.round,
                work=plan.work,
                weights=plan.weights.digest,
                server_head=plan.audit_head,
            )
            return self._train(plan) if plan.work == "train" else self._evaluate(plan)
        except FedicomError as error:
            return self._refuse(plan, _code(error), str(error))
        except Exception as error:
            # Its text may quote data or paths: only the kind leaves, the rest stays in the local log.
            log.exception("round %d failed at site %s", plan.round, self.name)
            return self._refuse(plan, "training", f"{type(error).__name__} at the site; see its own log")

    def _permit(self, plan: RoundPlan) -> None:
        recipe = self.recipe
        if plan.recipe_id != recipe.id:
            raise ConfigError(f"recipe {plan.recipe_id[:12]} is not approved here; approved is {recipe.id[:12]}")
        last = recipe.rounds if plan.work == "train" else recipe.rounds + 1
        if plan.round > last:
            raise ConfigError(f"round {plan.round} is past the last of the recipe, {last}")
        privacy = recipe.privacy
        if not privacy.active or plan.work != "train":
            return
        if privacy.unsafe_seeded_noise and not self._limits.seeded_noise:
            raise PrivacyError("privacy.unsafe_seeded_noise is for simulations; this site does not train with it")
        assert privacy.delta is not None
        check_delta(privacy.delta, self.cohort.patients("train"))

    def _train(self, plan: RoundPlan) -> Update:
        private, reserved = self._reserve(plan) if self.recipe.privacy.active else (None, None)
        validation = self._scores(plan.weights, "validation", _ROUND_BOOTSTRAPS)
        trained = train(
            self._model(),
            plan.weights,
            self.cohort,
            self.recipe,
            round_=plan.round,
            site=self.name,
            device=self._device,
            private=private,
        )
        spent = self._spent(reserved) if reserved is not None else None
        update = Update(
            site=self.name,
            recipe_id=plan.recipe_id,
            round=plan.round,
            base=plan.weights.digest,
            delta=trained.delta,
            weight=float(self.cohort.patients("train")) if self.recipe.federation.site_weights == "patients" else 1.0,
            steps=trained.steps,
            train_loss=trained.loss,
            validation=validation,
            spent=spent,
            audit_head=self.audit.append(
                "update sent",
                round=plan.round,
                digest=trained.delta.digest,
                bytes=trained.delta.nbytes,
                norm=trained.delta.norm,
                clip_norm=spent.clip_norm if spent else None,
                noise_multiplier=spent.noise_multiplier if spent else None,
                epsilon=spent.epsilon if spent else None,
            ),
        )
        if reserved is not None:
            # First kept, then settled, then sent: a crash at any point costs no second training and no second epsilon.
            self._store(plan, update)
            self._settle(plan, reserved, trained.steps)
        return update

    def _evaluate(self, plan: RoundPlan) -> Update:
        bootstraps = self.recipe.evaluation.bootstraps
        validation = self._scores(plan.weights, "validation", bootstraps)
        test = self._scores(plan.weights, "test", bootstraps)
        return Update(
            site=self.name,
            recipe_id=plan.recipe_id,
            round=plan.round,
            base=plan.weights.digest,
            delta=Weights({}),
            weight=1.0,
            steps=0,
            validation=validation,
            test=test,
            spent=self._spent(),
            audit_head=self.audit.append("evaluation sent", round=plan.round, weights=plan.weights.digest),
        )

    # Privacy

    @property
    def _budget(self) -> Ledger:
        if self._ledger is None:
            raise PrivacyError(
                "the recipe demands differential privacy, but this site has no ledger; nothing is trained"
            )
        return self._ledger

    def _reserve(self, plan: RoundPlan) -> tuple[Private, Reservation]:
        recipe, patients = self.recipe, self.cohort.patients("train")
        privacy, training = recipe.privacy, recipe.training
        assert privacy.delta is not None
        drawn = sampling(patients, training.batch_size, training.local_epochs)
        noise_multiplier = privacy.noise_multiplier
        if noise_multiplier is None:
            assert privacy.epsilon is not None
            noise_multiplier = solve_noise(privacy.epsilon, privacy.delta, drawn.rate, drawn.steps * recipe.rounds)
        event = Event(noise_multiplier=noise_multiplier, sampling_rate=drawn.rate, steps=drawn.steps)
        try:
            reserved = self._budget.reserve(recipe.id, round=plan.round, base=plan.weights.digest, event=event)
        except PrivacyError as error:
            self.audit.append("budget refused", round=plan.round, recipe_id=recipe.id, why=str(error))
            raise
        self.audit.append(
            "budget reserved",
            round=plan.round,
            recipe_id=recipe.id,
            noise_multiplier=noise_multiplier,
            sampling_rate=drawn.rate,
            steps=drawn.steps,
            epsilon=reserved.epsilon,
            delta=privacy.delta,
            ledger_head=self._budget.head,
        )
        return Private(sampling=drawn, noise_multiplier=noise_multiplier, noise=self._noise(plan.round)), reserved

    def _settle(self, plan: RoundPlan, reserved: Reservation, steps: int) -> None:
        try:
            self._budget.settle(reserved, steps)
        except PrivacyError:
            self._path(plan).unlink(missing_ok=True)  # nobody has paid for these very bytes: they shall never leave
            raise

    def _noise(self, round_: int) -> Noise:
        if self.recipe.privacy.unsafe_seeded_noise:
            return seeded_noise(seed_of("noise", self.recipe, round_, self.name))
        return keystream_noise() if self.recipe.privacy.secure_rng else os_noise()

    def _spent(self, reserved: Reservation | None = None) -> Spent | None:
        privacy = self.recipe.privacy
        if not privacy.active:
            return None
        events = self._budget.events(self.recipe.id)
        if not events:  # every round was refused here
            return None
        assert privacy.delta is not None
        last = reserved.event if reserved is not None else events[-1]
        return Spent(
            epsilon=reserved.epsilon if reserved is not None else self._budget.spent(),
            delta=privacy.delta,
            noise_multiplier=last.noise_multiplier,
            clip_norm=privacy.clip_norm,
            sampling_rate=last.sampling_rate,
            steps=sum(event.steps for event in events),
        )

    # Private replies, kept until the next one: asked again, the same update goes out.
    # Without privacy nothing is kept, for the same training gives the same update again.

    def _path(self, plan: RoundPlan) -> Path:
        return self._outbox / f"{plan.recipe_id[:16]}-{plan.round:06d}-{plan.weights.digest[:16]}.bin"

    def _stored(self, plan: RoundPlan) -> Update | None:
        path = self._path(plan)
        if plan.work != "train" or not path.exists():
            return None
        update = wire.decode(wire.from_bytes(path.read_bytes()), Update)
        if (update.recipe_id, update.round, update.base) != (plan.recipe_id, plan.round, plan.weights.digest):
            return None
        # A crash came between keeping and settling: left open, a later training could take the reservation over.
        if (reserved := self._budget.pending(plan.recipe_id, round=plan.round, base=update.base)) is not None:
            self._settle(plan, reserved, update.steps)
        head = self.audit.append(
            "update sent again", round=plan.round, digest=update.delta.digest, server_head=plan.audit_head
        )
        # The coordinator has seen later heads by now: an older one would look like a log that was rewritten.
        return replace(update, audit_head=head)

    def _store(self, plan: RoundPlan, update: Update) -> None:
        path = self._path(plan)
        write_whole(path, wire.to_bytes(wire.encode(update)))
        for old in self._outbox.glob("*.bin"):
            if old != path:
                old.unlink()

    # Scores and refusals

    def _scores(self, weights: Weights, split: Split, bootstraps: int) -> Scores | None:
        if self._limits.metrics == "none":
            return None
        indices = self.cohort.indices(split)
        evaluation = self.recipe.evaluation
        patients = self.cohort.patients(split)
        if patients < evaluation.min_cell:
            return Scores(patients=0, values={})
        model = self._model()
        set_weights(model, weights)
        samples, task = self.cohort.samples, self.recipe.task
        probability_NC = probabilities(logits(model, samples.x_N, indices, device=self._device), task.kind)
        result = score(
            samples.targets_N[indices],
            probability_NC,
            samples.patient_N[indices],
            task,
            replace(evaluation, bootstraps=bootstraps),
            seed=self.recipe.seed,
        )
        return Scores(patients=patients, values=dict(result.values))

    def _cell(self, patients: int) -> int:
        return patients if patients >= self.recipe.evaluation.min_cell else 0

    def _refuse(self, plan: RoundPlan, code: Code, why: str) -> Refusal:
        why = why[:500]
        try:
            head = self.audit.append("plan refused", round=plan.round, recipe_id=plan.recipe_id, code=code, why=why)
        except StorageError:  # a full disk: the coordinator shall still hear why
            head = self.audit.head
        return Refusal(site=self.name, recipe_id=plan.recipe_id, round=plan.round, code=code, why=why, audit_head=head)


def package_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that change numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _code(error: FedicomError) -> Code:
    match error:
        case ConfigError():
            return "recipe"
        case PrivacyError():
            return "budget"
        case DataError():
            return "data"
        case _:
            return "training"
