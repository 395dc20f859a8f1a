"""A site's answers: what it refuses, what it spends, what it keeps, and what never leaves."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import site as module
from client.app import client_app
from client.cohort import Cohort
from client.dp import sampling
from client.ledger import Ledger, Reservation
from client.policy import ledger_policy
from client.site import Site
from client.train import Trained
from common import wire
from common.accounting import Event, epsilon_pld
from common.audit import AuditLog, verify, verify_against
from common.config import Evaluation, Federation, ModelConfig, Preprocessing, Privacy, Recipe, Training
from common.deployment import Policy
from common.errors import DataError, DivergedError, StorageError, TrainingError
from common.exchange import WIRE_VERSION, Hello, Question, Refusal, RoundPlan, ScoresSpent, Update
from common.identity import Signer
from common.models import build, get_weights
from common.samples import Samples
from common.weights import Weights

FULL = Event(noise_multiplier=1.0, sampling_rate=1.0, steps=4)
"""Epsilon 7.6 at delta 1e-3."""
PRIVATE = Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-3)


def recipe_of(privacy: Privacy = PRIVATE, **parts: Any) -> Recipe:
    given = {
        "name": "tiny",
        "rounds": 3,
        "data": Preprocessing(size=(16, 16)),
        "model": ModelConfig(family="monai", name="resnet10", width=0.125, stem="small"),
        "training": Training(batch_size=5, local_epochs=2.0),
        "evaluation": Evaluation(bootstraps=100),
        "privacy": privacy,
    }
    return Recipe(**(given | parts))


def cohort_of(train: int = 20, validation: int = 8, test: int = 3) -> Cohort:
    count = train + validation + test
    x_N = np.random.default_rng(0).normal(size=(count, 1, 16, 16)).astype(np.float32)
    targets_N = (np.arange(count) % 2).astype(np.int64)
    names = tuple(f"SECRET-{n}" for n in range(count))
    samples = Samples(x_N, targets_N, np.arange(count), names, {}, "")
    return Cohort(samples, np.repeat(["train", "validation", "test"], [train, validation, test]), "a" * 64, {})


class House:
    """A site's folder, which outlives the process that opens it."""

    def __init__(self, folder: Path, recipe: Recipe | None = None, cohort: Cohort | None = None) -> None:
        self.folder, self.recipe, self.cohort = folder, recipe or recipe_of(), cohort or cohort_of()
        self.cap = self.recipe.privacy.epsilon or 100.0

    def open(self, *, keep: bool = False, now: Callable[[], datetime] = datetime.now, **policy: Any) -> Site:
        privacy = self.recipe.privacy
        delta = privacy.delta or 1e-3
        given = {
            "require_privacy": False, "epsilon": self.cap, "delta": delta, "min_patients": 1, "counts": "exact"
        }  # fmt: skip
        rules = Policy(**(given | policy))
        self.ledger = Ledger(self.folder / "ledger.jsonl", "n", ledger_policy(rules))
        self.ledger.repair()
        return Site(
            "north", self.recipe, self.cohort, functools.cache(lambda: build(self.recipe)), folder=self.folder,
            audit=AuditLog(self.log, Signer.load_or_create(self.folder / "keys" / "north.key")),
            ledger=self.ledger if privacy.active else None, device=torch.device("cpu"), policy=rules, keep=keep,
            now=now,
        )  # fmt: skip

    @property
    def log(self) -> Path:
        return self.folder / "audit" / "north.jsonl"

    def question(self, **parts: Any) -> Question:
        return Question(**({"recipe_id": self.recipe.id} | parts))

    def plan(self, round_: int = 1, work: str = "train", weights: Weights | None = None, **parts: Any) -> RoundPlan:
        given = {"recipe_id": self.recipe.id, "round": round_, "work": work}
        return RoundPlan(**(given | {"weights": weights or start(self.recipe)} | parts))

    def kinds(self) -> list[str]:
        return [event.kind for event in verify(self.log)]

    def steps(self, kind: Literal["updates", "scores"] = "updates") -> list[int]:
        """What each visit has paid for."""
        return [event.steps for event in self.ledger.events(self.recipe.id, kind)]

    def entries(self, kind: str) -> int:
        lines = (self.folder / "ledger.jsonl").read_text().splitlines()
        return sum(json.loads(line)["kind"] == kind for line in lines)


def start(recipe: Recipe) -> Weights:
    return get_weights(build(recipe))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RoundPlan]:
    """Training that costs nothing and never gives the same update twice."""
    calls: list[Any] = []

    def fake(model: object, weights: Weights, *_: object, private: Any = None, **__: object) -> Trained:
        calls.append(private)
        delta = weights.zeros() + Weights({name: np.full_like(a, len(calls)) for name, a in weights.items()})
        steps = private.sampling.steps if private else 1
        return Trained(delta=delta, steps=steps, loss=None if private else 0.5)

    monkeypatch.setattr(module, "train", fake)
    return calls


def refused(reply: object, code: str, house: House, kind: str = "plan refused") -> str:
    assert isinstance(reply, Refusal)
    assert reply.code == code
    last = verify(house.log)[-1]
    assert last.kind == kind
    assert last.hash == reply.audit_head
    return reply.why


def test_a_site_is_gone_when_nobody_refers_to_it(house: House) -> None:
    site = house.open()
    assert isinstance(site.visit(house.plan()), Update)
    gone = weakref.ref(site)
    gc.disable()  # a simulation makes a site a visit; what waits for the collector stays in memory by the hundred
    try:
        del site
        assert gone() is None
    finally:
        gc.enable()


# Privacy account


def test_epsilon_after_three_rounds_of_two_epochs_is_that_of_one_accountant_over_six_epochs(house: House) -> None:
    site, epsilons = house.open(), []
    for round_ in (1, 2, 3):
        update = site.visit(house.plan(round_))
        assert isinstance(update, Update)
        assert update.spent is not None
        epsilons.append(update.spent.epsilon)
    noise = update.spent.noise_multiplier
    six_epochs = sampling(20, 5, 6.0)
    assert (six_epochs.rate, six_epochs.steps, update.spent.steps) == (0.25, 24, 24)
    one = epsilon_pld([Event(noise_multiplier=noise, sampling_rate=0.25, steps=24)], 1e-3)
    assert epsilons[-1] == one
    assert epsilons == sorted(epsilons)
    assert one <= 8.0
    # Had each round an accountant of its own, a third of the steps would be claimed.
    assert epsilons[0] < 0.8 * one
    # Nothing is left for a fourth visit, whichever recipe asks.
    other = House(house.folder, replace(house.recipe, seed=1))
    why = refused(other.open().visit(other.plan()), "budget", other)
    assert "cap is 8" in why
    assert other.kinds()[-2:] == ["budget refused", "plan refused"]


def test_a_recipe_that_gives_the_noise_is_told_the_epsilon_of_that_noise(tmp_path: Path, trained: list[Any]) -> None:
    house = House(tmp_path, recipe_of(Privacy(mechanism="dp_sgd", noise_multiplier=1.5, delta=1e-3)))
    update = house.open().visit(house.plan())
    assert isinstance(update, Update)
    assert update.spent is not None
    expected = epsilon_pld([Event(noise_multiplier=1.5, sampling_rate=0.25, steps=8)], 1e-3)
    assert (update.spent.noise_multiplier, update.spent.epsilon) == (1.5, expected)
    assert trained[0].noise_multiplier == 1.5


def test_a_refused_budget_is_refused_before_anything_is_trained_or_scored(
    house: House, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = house.open()
    spent = house.ledger.reserve("f" * 64, round=1, base="e" * 64, event=FULL)  # by another recipe
    assert 7 < spent.epsilon <= 8
    monkeypatch.setattr(module, "score", lambda *_, **__: pytest.fail("scored"))
    assert "its cap is 8" in refused(site.visit(house.plan()), "budget", house)
    assert trained == []


def test_a_coordinator_cannot_have_more_of_a_recipe_than_its_rounds(house: House, trained: list[Any]) -> None:
    site, start_ = house.open(epsilon=100.0), start(house.recipe)  # the recipe is of epsilon 8
    others = [start_ + Weights({name: np.full_like(a, n) for name, a in start_.items()}) for n in range(4)]
    for weights in others[:3]:  # three rounds, or one from three weights
        assert isinstance(site.visit(house.plan(1, weights=weights)), Update)
    assert house.ledger.spent() <= 8
    why = refused(site.visit(house.plan(1, weights=others[3])), "budget", house)
    assert "paid for all 3 rounds" in why
    assert isinstance(site.visit(house.plan(1, weights=others[2])), Update)  # kept, and sent again
    assert (len(trained), house.entries("reserve")) == (3, 3)
    again = House(house.folder, replace(house.recipe, seed=1))
    assert isinstance(again.open(epsilon=100.0).visit(again.plan()), Update)


def test_a_visit_that_cost_nothing_is_none_of_a_recipes_rounds(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Trained:
        raise TrainingError("the card is full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", full)
        for _ in range(4):
            refused(house.open().visit(house.plan()), "training", house)
    for round_ in (1, 2, 3):
        assert isinstance(house.open().visit(house.plan(round_)), Update)


def test_a_private_recipe_without_a_ledger_is_refused(house: House, trained: list[Any]) -> None:
    site = house.open()
    site.ledger = None
    assert "no ledger" in refused(site.visit(house.plan()), "budget", house)
    assert trained == []


# Refusals


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"recipe_id": "f" * 64}, "recipe", "not approved here"),
        ({"round": 4}, "recipe", "past the last of the recipe, 3"),
        ({"round": 5, "work": "evaluate"}, "recipe", "past the last of the recipe, 4"),
    ],
)
def test_another_recipe_and_a_round_too_many_are_refused(
    house: House, trained: list[Any], change: dict[str, Any], code: str, word: str
) -> None:
    assert word in refused(house.open().visit(house.plan(**change)), code, house)
    assert trained == []
    assert not (house.folder / "ledger.jsonl").exists() or house.entries("reserve") == 0


def test_seeded_noise_and_a_delta_of_one_over_the_patients_are_against_the_sites_own_limits(
    tmp_path: Path, trained: list[Any]
) -> None:
    seeded = House(tmp_path / "a", recipe_of(replace(PRIVATE, unsafe_seeded_noise=True)))
    assert "for simulations" in refused(seeded.open().visit(seeded.plan()), "policy", seeded)
    assert isinstance(seeded.open(seeded_noise=True).visit(seeded.plan()), Update)
    many = House(tmp_path / "b", recipe_of(replace(PRIVATE, delta=0.0099)), cohort_of(train=102))
    why = refused(many.open().visit(many.plan()), "policy", many)
    assert "delta" in why
    assert "102" not in why  # the count is the site's own
    assert "0.0098" not in why
    few = House(tmp_path / "c", recipe_of(replace(PRIVATE, delta=0.0099)), cohort_of(train=100))
    assert isinstance(few.open().visit(few.plan()), Update)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("too few"), "data", "too few"),
        (StorageError("the disk is full"), "training", "the disk is full"),
        (TrainingError("not finite"), "training", "not finite"),
        (KeyError("SECRET-1"), "training", "KeyError at the site; see its own log"),
        (RuntimeError("/data/SECRET-1/a.dcm"), "training", "RuntimeError at the site; see its own log"),
        (MemoryError(), "training", "MemoryError at the site; see its own log"),
    ],
)
def test_an_error_is_a_refusal_and_a_foreign_text_never_leaves(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, told: str
) -> None:
    def fail(*_: object, **__: object) -> Trained:
        raise error

    monkeypatch.setattr(module, "train", fail)
    assert refused(house.open().visit(house.plan()), code, house) == told
    assert "SECRET" not in house.log.read_text()


def test_weights_that_are_not_the_models_are_refused_without_a_training(house: House, trained: list[Any]) -> None:
    strange = house.plan(weights=Weights({"a": np.ones(3, np.float32)}))
    assert "do not fit the model" in refused(house.open().visit(strange), "training", house)
    assert trained == []


def test_a_full_disk_is_still_told_although_it_cannot_be_logged(
    house: House, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = house.open()

    def full(*_: object, **__: object) -> str:
        raise StorageError("the audit log could not be written or read: No space left on device")

    monkeypatch.setattr(site.audit, "append", full)
    reply = site.visit(house.plan())
    assert isinstance(reply, Refusal)
    assert "No space left" in reply.why
    assert trained == []


# The kept reply


def test_the_same_plan_is_answered_by_the_same_update_without_training_or_epsilon(
    house: House, trained: list[Any]
) -> None:
    first = house.open().visit(house.plan())
    again = house.open().visit(house.plan())  # the site was started anew in between
    assert isinstance(first, Update)
    assert isinstance(again, Update)
    assert (again.delta, again.spent, again.validation) == (first.delta, first.spent, first.validation)
    assert len(trained) == 1
    assert (house.entries("reserve"), house.entries("settle")) == (1, 1)
    # Heads that the coordinator writes down in this order must lie in this order.
    order = [event.hash for event in verify(house.log)]
    assert order.index(first.audit_head) < order.index(again.audit_head)


def test_a_death_between_keeping_and_settling_costs_one_training_and_one_epsilon(
    house: House, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            house.open().visit(house.plan())
    assert (house.entries("reserve"), house.entries("settle")) == (1, 0)
    update = house.open().visit(house.plan())
    assert isinstance(update, Update)
    assert len(trained) == 1
    assert (house.entries("reserve"), house.entries("settle"), house.steps()) == (1, 1, [8])
    # The reply of the next round takes its place; asked for round 1 again, the site pays again or refuses.
    site = house.open()
    assert isinstance(site.visit(house.plan(2)), Update)
    site.visit(house.plan(1))
    assert house.entries("reserve") == 3


def test_a_death_while_training_takes_the_reservation_over(
    house: House, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            house.open().visit(house.plan())
    assert isinstance(house.open().visit(house.plan()), Update)
    assert (house.entries("reserve"), house.entries("settle")) == (1, 1)


def test_an_answer_that_tells_of_the_noise_is_paid_for_and_asked_again_is_paid_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object, **__: object) -> Trained:
        raise DivergedError("the trained weights are not finite")

    monkeypatch.setattr(module, "train", diverged)
    for times in (1, 2):
        refused(house.open().visit(house.plan()), "training", house)
        assert (house.entries("reserve"), house.entries("settle")) == (times, times)
        assert house.steps() == [8] * times  # 2 epochs of 20 patients, 5 at a time


def test_whether_a_prediction_is_finite_is_told_by_visits_that_are_paid_for_alone(
    tmp_path: Path, trained: list[Any]
) -> None:
    # Weights under which the images of all but one validation patient give a finite prediction.
    house = House(tmp_path)
    of_one = house.cohort.indices("validation")[0]
    house.cohort.samples.x_N[of_one] *= 1e6
    weights = start(house.recipe)
    weights = Weights({name: a * np.float32(1e15) if name == "conv1.weight" else a for name, a in weights.items()})
    site = house.open()
    for times in (1, 2, 3):
        assert "not finite" in refused(site.visit(house.plan(weights=weights)), "training", house)
        assert house.steps() == [8] * times
    assert "has paid for all 3 rounds" in refused(site.visit(house.plan(weights=weights)), "budget", house)
    house.cohort.samples.x_N[of_one] /= 1e6
    assert isinstance(House(tmp_path / "without").open().visit(house.plan(weights=weights)), Update)


def test_an_update_that_is_too_large_for_a_secure_sum_is_paid_for(tmp_path: Path, trained: list[Any]) -> None:
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-3, secure_aggregation=True)
    federation = Federation(sites=3, quorum=3, max_update_norm=100.0)  # what "training" gives is beyond
    training = Training(batch_size=5, local_epochs=2.0, optimizer="sgd", lr=1e-3)
    house = House(tmp_path, recipe_of(privacy, federation=federation, training=training))
    site = house.open(metrics="none")
    site._sums = object()  # type: ignore[assignment]
    for times in (1, 2):
        assert "the update has norm" in refused(site.visit(house.plan()), "training", house)
        assert (house.entries("reserve"), house.entries("settle")) == (times, times)
        assert house.steps() == [8] * times


def test_an_error_that_tells_of_no_noise_costs_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Trained:
        raise RuntimeError("the card is gone")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", broken)
        refused(house.open().visit(house.plan()), "training", house)
    assert (house.entries("reserve"), house.entries("settle")) == (1, 1)
    assert house.ledger.spent() == 0


def test_an_update_that_somebody_else_settled_never_leaves(
    house: House, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = house.open()
    real = site._store

    def race(plan: RoundPlan, update: Update, reserved: Reservation) -> Path:
        house.ledger.settle(reserved, update.steps)
        return real(plan, update, reserved)

    monkeypatch.setattr(site, "_store", race)
    assert "settled already" in refused(site.visit(house.plan()), "budget", house)
    assert list((house.folder / "outbox").glob("*.bin")) == []


def test_without_privacy_nothing_is_kept_and_the_loss_is_told(tmp_path: Path, trained: list[Any]) -> None:
    house = House(tmp_path, recipe_of(Privacy()))
    update = house.open().visit(house.plan())
    assert isinstance(update, Update)
    assert (update.train_loss, update.spent) == (0.5, None)
    assert list((tmp_path / "outbox").glob("*")) == []


# Scores


def test_small_cells_leave_as_nothing(house: House, trained: list[Any]) -> None:
    site = house.open()
    hello = site.hello(house.question())
    assert isinstance(hello, Hello)
    assert dict(hello.patients) == {"train": 20, "validation": 8, "test": 0}  # three test patients are below five
    update = site.visit(house.plan(4, "evaluate"))
    assert isinstance(update, Update)
    assert update.validation is not None
    assert update.validation.patients == 8
    assert 0 <= update.validation.values["auroc"] <= 1
    assert update.test is not None
    assert (update.test.patients, dict(update.test.values)) == (0, {})
    assert len(update.delta) == 0
    assert update.spent is None  # nothing was trained here


@pytest.mark.parametrize(("own", "recipes", "told"), [(8, 5, 8), (9, 5, 0), (5, 8, 8), (5, 9, 0)])
@pytest.mark.parametrize("metrics", ["bounded", "noised"])
def test_the_larger_of_the_sites_and_the_recipes_smallest_cell_counts(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch, metrics: str, own: int, recipes: int, told: int
) -> None:
    monkeypatch.setattr(module, "noised", lambda counts, *_: counts)  # so that the number is known
    house = House(tmp_path, recipe_of(evaluation=Evaluation(bootstraps=100, min_cell=recipes)))
    house.cap = 30.0
    site = house.open(min_cell=own, metrics=metrics)
    hello = site.hello(house.question())
    assert isinstance(hello, Hello)
    assert hello.patients["validation"] == told  # of eight
    update = site.visit(house.plan(4, "evaluate"))
    assert isinstance(update, Update)
    assert update.validation is not None
    assert update.validation.patients == told
    assert bool(update.validation.values) == (told > 0 and metrics == "bounded")  # four of each class are too few


def test_exact_scores_of_a_private_recipe_leave_once_more_than_it_has_rounds_whatever_the_weights(
    tmp_path: Path, trained: list[Any]
) -> None:
    weights, told = start(recipe_of()), []
    for _ in range(3):  # started again, a site counts on
        house = House(tmp_path)
        for _ in range(2):
            weights = weights + start(house.recipe)
            update = house.open().visit(house.plan(4, "evaluate", weights=weights))
            assert isinstance(update, Update)  # and no refusal: a run that ends early needs none
            told.append((update.validation is not None, update.test is not None))
    assert told == [(True, True)] * 4 + [(False, False)] * 2  # three rounds
    sent = [event.facts["scores"] for event in verify(house.log) if event.kind == "evaluation sent"]
    assert sent == [True] * 4 + [False] * 2
    update = house.open().visit(house.plan())
    assert isinstance(update, Update)
    assert update.validation is not None  # a visit that is paid for


def test_without_privacy_nothing_limits_how_often_scores_leave(tmp_path: Path, trained: list[Any]) -> None:
    house = House(tmp_path, recipe_of(Privacy()))
    updates = [house.open().visit(house.plan(4, "evaluate")) for _ in range(6)]
    assert all(isinstance(update, Update) and update.validation is not None for update in updates)


def test_a_site_may_send_no_scores_at_all(house: House, trained: list[Any]) -> None:
    site = house.open(metrics="none")
    for plan in (house.plan(), house.plan(4, "evaluate")):
        update = site.visit(plan)
        assert isinstance(update, Update)
        assert (update.validation, update.test) == (None, None)


def test_nothing_that_is_sent_or_logged_names_a_patient(house: House, trained: list[Any]) -> None:
    site = house.open()
    sent = [site.hello(house.question()), site.visit(house.plan()), site.visit(house.plan(round_=9))]
    text = b"".join(wire.to_bytes(wire.encode(value)) for value in sent) + house.log.read_bytes()
    assert b"SECRET" not in text
    assert str(house.folder).encode() not in text


# Messages


@pytest.fixture
def ask(house: House, trained: list[Any]) -> Callable[[RecordDict, str], Message]:
    from simulations.grid import become_node

    become_node(1)
    site = house.open()
    app = client_app(lambda _: site)
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    return lambda record, kind: app(Message(record, 7, kind), context)


def test_the_app_answers_who_it_is_and_does_what_a_plan_says(
    house: House, ask: Callable[[RecordDict, str], Message]
) -> None:
    assert wire.decode(ask(wire.encode(house.question()), "query").content, Hello).site == "north"
    assert isinstance(wire.decode_reply(ask(wire.encode(house.plan()), "train").content), Update)
    assert house.entries("settle") == 1


def test_unexpected_messages_are_refused_logged_and_change_nothing(
    house: House, trained: list[Any], ask: Callable[[RecordDict, str], Message]
) -> None:
    newer = wire.encode(house.plan())
    newer["message"] = ConfigRecord({**newer.config_records["message"], "version": WIRE_VERSION + 1})
    question = RecordDict({"message": ConfigRecord({"kind": "who", "version": WIRE_VERSION, "body": "{}"})})
    hello = wire.decode(ask(wire.encode(house.question()), "query").content, Hello)
    for record, kind in (
        (newer, "train"),
        (wire.encode(house.plan()), "evaluate"),  # a plan to train as a message to evaluate
        (wire.encode(house.plan(work="evaluate")), "train"),
        (wire.encode(hello), "train"),
        (RecordDict(), "train"),
        (question, "query"),
        (RecordDict(), "query"),
    ):
        reply = wire.decode_reply(ask(record, kind).content)
        refused(reply, "message", house, "message refused")
    assert trained == []
    assert not (house.folder / "ledger.jsonl").exists() or house.entries("reserve") == 0


def test_the_sites_log_holds_every_head_of_the_coordinator_that_it_was_told(
    house: House, trained: list[Any], tmp_path: Path
) -> None:
    server = AuditLog(tmp_path / "server" / "server.jsonl", Signer.temporary())
    site = house.open()
    for round_ in (1, 1, 2):  # round 1 is asked twice
        site.visit(house.plan(round_, audit_head=server.append("round planned", round=round_)))
    assert verify_against(verify(tmp_path / "server" / "server.jsonl"), verify(house.log)) == 3


# Policy and clock


def at(hour: int) -> Callable[[], datetime]:
    return lambda: datetime(2026, 1, 5, hour, 30)


def test_work_begins_in_the_opening_hours_alone_and_a_kept_reply_leaves_at_any(
    house: House, trained: list[Any]
) -> None:
    night = ("19:00-06:00",)
    for plan in (house.plan(), house.plan(4, "evaluate")):
        why = refused(house.open(now=at(12), hours=night).visit(plan), "policy", house)
        assert "19:00-06:00" in why
    assert trained == []
    assert isinstance(house.open(now=at(5), hours=night).visit(house.plan()), Update)
    assert isinstance(house.open(now=at(12), hours=night).visit(house.plan()), Update)
    assert len(trained) == 1
    assert (house.entries("reserve"), house.entries("settle")) == (1, 1)


def test_what_the_policy_forbids_is_neither_promised_nor_trained_nor_measured(house: House, trained: list[Any]) -> None:
    site = house.open(models=("timm/resnet18",))
    assert "(models)" in refused(site.hello(house.question()), "policy", house)
    assert "(models)" in refused(site.visit(house.plan()), "policy", house)
    assert "(models)" in refused(site.visit(house.plan(4, "evaluate")), "policy", house)
    assert trained == []
    site.policy = replace(site.policy, models=("monai/resnet10",))  # as the resident sets it at every message
    assert isinstance(site.hello(house.question()), Hello)
    assert isinstance(site.visit(house.plan()), Update)


def test_without_privacy_a_site_that_keeps_its_replies_trains_a_question_once(
    tmp_path: Path, trained: list[Any]
) -> None:
    house = House(tmp_path, recipe_of(Privacy()))
    first, again = (house.open(keep=True).visit(house.plan()) for _ in range(2))
    assert isinstance(first, Update)
    assert isinstance(again, Update)
    assert again.delta == first.delta
    assert len(trained) == 1


def test_the_replies_to_two_recipes_are_kept_side_by_side(house: House, trained: list[Any]) -> None:
    other = House(house.folder, recipe_of(seed=1))
    house.cap = other.cap = 100.0
    house.open().visit(house.plan())
    other.open().visit(other.plan())
    assert isinstance(house.open().visit(house.plan()), Update)
    assert len(trained) == 2
    house.open().visit(house.plan(2))  # takes the place of its own round 1 alone
    assert len(list((house.folder / "outbox").glob("*.bin"))) == 2


def test_a_kept_reply_that_cannot_be_read_is_trained_and_paid_anew(house: House, trained: list[Any]) -> None:
    house.open().visit(house.plan())
    (kept,) = (house.folder / "outbox").glob("*.bin")
    kept.write_bytes(b"of another version")
    assert isinstance(house.open().visit(house.plan()), Update)
    assert len(trained) == 2
    assert house.entries("reserve") == 2


@pytest.mark.parametrize(("metrics", "told"), [("bounded", True), ("none", False)])
def test_the_log_says_whether_scores_left(house: House, trained: list[Any], metrics: str, told: bool) -> None:
    site = house.open(metrics=metrics)
    site.visit(house.plan())
    site.visit(house.plan(4, "evaluate"))
    sent = [event for event in verify(house.log) if event.kind in ("update sent", "evaluation sent")]
    assert [event.facts["scores"] for event in sent] == [told, told]


def test_an_adaptive_clip_norm_goes_on_in_the_next_round_and_after_a_restart(tmp_path: Path) -> None:
    house = House(tmp_path, recipe_of(replace(PRIVATE, clip_quantile=0.5, clip_norm=1e-4)))
    first = house.open().visit(house.plan())
    assert isinstance(first, Update)
    assert first.spent is not None
    assert first.spent.clip_norm > 1e-4 * 1.02  # nobody is within so small a bound, so it rises
    second = house.open().visit(house.plan(2, weights=first.delta))
    assert isinstance(second, Update)
    assert second.spent is not None
    assert second.spent.clip_norm > first.spent.clip_norm * 1.02
    assert second.spent.noise_multiplier == first.spent.noise_multiplier  # what is accounted


def test_while_a_site_writes_its_log_and_its_hashes_the_next_one_has_the_model(
    house: House, trained: list[RoundPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, held = threading.Lock(), []
    site = house.open()
    site._turn = turn
    training, append, store = module.train, site.audit.append, site._store

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*words: Any, **more: Any) -> Any:
            held.append((name, turn.locked()))
            return function(*words, **more)

        return noted

    monkeypatch.setattr(module, "train", noting("train", training))
    monkeypatch.setattr(site.audit, "append", noting("log", append))
    monkeypatch.setattr(site, "_store", noting("store", store))
    assert isinstance(site.visit(house.plan()), Update)
    assert ("train", True) in held
    assert {locked for name, locked in held if name != "train"} == {False}
    assert not turn.locked()


# Anchors


def test_a_ledger_that_is_older_than_the_coordinator_remembers_trains_nothing(
    house: House, trained: list[Any], tmp_path: Path
) -> None:
    """A restored snapshot of the whole machine: log, outbox and ledger agree with each other."""
    snapshot = tmp_path / "snapshot"
    house.open().visit(house.plan())
    shutil.copytree(house.folder, snapshot, ignore=shutil.ignore_patterns("snapshot"))
    update = house.open().visit(house.plan(2))
    assert isinstance(update, Update)
    assert update.ledger_head == house.ledger.head != ""
    restored = House(snapshot, house.recipe)
    heads = {"north": update.ledger_head, "south": "f" * 64}
    why = refused(restored.open().visit(restored.plan(2, ledger_heads=heads)), "budget", restored)
    assert "older than others remember it" in why
    assert len(trained) == 2
    assert isinstance(house.open().visit(house.plan(3, ledger_heads=heads)), Update)


def test_the_log_remembers_the_ledgers_head_when_it_was_reserved_and_when_the_answer_left(
    house: House, trained: list[Any]
) -> None:
    house.cap = 20.0
    site = house.open(metrics="noised")
    site.visit(house.plan())
    site.visit(house.plan(4, "evaluate"))
    _, *hashes = [json.loads(line)["hash"] for line in (house.folder / "ledger.jsonl").read_text().splitlines()]
    told = [(event.kind, event.facts["ledger_head"]) for event in verify(house.log) if "ledger_head" in event.facts]
    kinds = ("budget reserved", "update sent", "budget reserved", "evaluation sent")
    assert told == list(zip(kinds, hashes, strict=True))  # reserve and settle, twice


class Died(BaseException):
    """The process ends at a system call."""


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_death_at_every_single_write_of_a_visit_costs_no_second_epsilon(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}
    house, calls = House(tmp_path / "house"), 0
    house.cap = 20.0
    start_of = (lambda: house.plan(1)) if what == "train" else (lambda: house.plan(4, "evaluate"))
    house.open(metrics="noised").visit(house.plan(3))  # folders, keys and first lines are there
    site = house.open(metrics="noised")
    for dies_in in range(60):
        folder = tmp_path / f"{dies_in}"
        shutil.copytree(house.folder, folder)
        copy = House(folder, house.recipe)
        copy.cap = house.cap
        site = copy.open(metrics="noised")
        left = [dies_in]

        def call(name: str, *words: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                if name == "write":
                    real[name](words[0], words[1][: len(words[1]) // 2])
                raise Died
            return real[name](*words)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, functools.partial(call, name))
            try:
                reply = site.visit(start_of())
            except Died:
                reply = None
        calls = dies_in - left[0]
        again = copy.open(metrics="noised").visit(start_of())
        assert isinstance(again, Update)
        assert reply is None or (reply.delta, reply.test) == (again.delta, again.test)
        lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["open", "reserve", "settle", "reserve", "settle"]
        shutil.rmtree(folder)
        if reply is not None:
            break
    assert calls >= (8 if what == "evaluate" else 9)  # as many as were tried in turn


# The budget of the whole recipe, at the greeting


def test_a_recipe_whose_rounds_together_pass_the_cap_is_refused_at_the_greeting_with_the_figure(
    house: House, trained: list[Any]
) -> None:
    site = house.open()
    house.ledger.settle(house.ledger.reserve("f" * 64, round=1, base="e" * 64, event=FULL), 1)  # by another recipe
    why = refused(site.hello(house.question()), "budget", house)
    assert re.search(r"all 3 rounds would bring this site to epsilon (8|9)\.\d+, its cap is 8", why)
    assert house.entries("reserve") == 1
    assert trained == []
    assert isinstance(house.open(epsilon=12.0).hello(house.question()), Hello)


def test_a_visit_outside_of_the_sites_limits_is_refused_at_the_greeting(house: House) -> None:
    # 20 patients in batches of 5, two epochs: rate 0.25, 8 steps
    for rule, why in (
        ({"max_sampling_rate": 0.24}, "sampling rate: got 0.25"),
        ({"max_steps": 7}, "steps of one visit"),
    ):
        assert why in refused(house.open(**rule).hello(house.question()), "budget", house)
    assert isinstance(house.open(max_sampling_rate=0.25, max_steps=8).hello(house.question()), Hello)


def test_the_noised_scores_are_part_of_what_is_projected(house: House) -> None:
    assert isinstance(house.open().hello(house.question()), Hello)
    why = refused(house.open(metrics="noised").hello(house.question()), "budget", house)
    assert "all 3 rounds and the noised scores" in why
    assert isinstance(house.open(metrics="noised", epsilon=9.0).hello(house.question()), Hello)


def test_a_recipe_that_has_begun_goes_on_as_far_as_its_budget_reaches(house: House, trained: list[Any]) -> None:
    house.open().visit(house.plan())
    house.ledger.reserve("f" * 64, round=1, base="e" * 64, event=replace(FULL, steps=1))
    assert isinstance(house.open().hello(house.question()), Hello)


# Noised scores, counts


def test_noised_scores_leave_once_after_the_last_round_and_are_paid(house: House, trained: list[Any]) -> None:
    house.cap = 20.0
    site = house.open(metrics="noised", scores_epsilon=4.0)
    for round_ in (1, 2, 3):
        update = site.visit(house.plan(round_))
        assert isinstance(update, Update)
        assert update.validation is None
    before = house.ledger.spent()
    first = site.visit(house.plan(4, "evaluate"))
    assert isinstance(first, Update)
    assert first.validation is not None
    assert first.test is not None
    assert first.validation.noised
    assert first.test.noised
    (event,) = house.ledger.events(house.recipe.id, "scores")
    assert 3.98 <= epsilon_pld([event], 1e-3) <= 4.0
    assert house.ledger.spent() > before
    assert first.spent is not None
    assert first.scores_spent == ScoresSpent(epsilon=epsilon_pld([event], 1e-3), delta=1e-3)
    assert first.spent.epsilon == update.spent.epsilon <= 8  # of the updates alone: what admission compares
    # Asked again, the same noised numbers; asked about another model, none.
    again = house.open(metrics="noised", scores_epsilon=4.0).visit(house.plan(4, "evaluate"))
    assert isinstance(again, Update)
    assert (again.validation, again.test) == (first.validation, first.test)
    other = site.visit(house.plan(4, "evaluate", weights=start(house.recipe) + start(house.recipe)))
    assert isinstance(other, Update)
    assert (other.validation, other.test) == (None, None)
    assert house.ledger.events(house.recipe.id, "scores") == (event,)


def test_a_death_between_keeping_and_settling_noised_scores_costs_them_once_and_in_full(
    house: House, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    noised, plan = {"metrics": "noised", "scores_epsilon": 4.0}, house.plan(4, "evaluate")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            house.open(**noised).visit(plan)
    for _ in range(2):
        update = house.open(**noised).visit(plan)
        assert isinstance(update, Update)
        assert update.validation is not None
        assert house.steps("scores") == [2]  # validation and test


def test_the_interval_of_noised_scores_has_the_level_of_the_recipe(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, honest = [], module.scores
    monkeypatch.setattr(module, "scores", lambda *a, **k: asked.append(k["confidence"]) or honest(*a, **k))
    recipe = recipe_of()
    house = House(tmp_path, replace(recipe, evaluation=replace(recipe.evaluation, confidence=0.8)))
    house.cap = 20.0
    assert isinstance(house.open(metrics="noised", scores_epsilon=4.0).visit(house.plan(4, "evaluate")), Update)
    assert asked == [0.8, 0.8]  # validation and test


def test_without_budget_for_scores_the_evaluation_says_nothing(house: House, trained: list[Any]) -> None:
    site = house.open(metrics="noised", scores_epsilon=6.0)
    house.ledger.reserve("f" * 64, round=1, base="e" * 64, event=FULL)
    update = site.visit(house.plan(4, "evaluate"))
    assert isinstance(update, Update)
    assert (update.validation, update.test) == (None, None)
    assert house.kinds()[-2:] == ["budget refused", "evaluation sent"]


def test_coarse_counts_are_all_that_rate_steps_and_noise_depend_on(tmp_path: Path, trained: list[Any]) -> None:
    told = []
    for patients in (20, 22, 24, 25):
        house = House(tmp_path / str(patients), cohort=cohort_of(train=patients))
        site = house.open(counts="coarse")
        hello, update = site.hello(house.question()), site.visit(house.plan())
        assert isinstance(hello, Hello)
        assert isinstance(update, Update)
        assert hello.counts_rounded
        told.append((hello.patients["train"], update.spent, update.steps))
    assert told[0] == told[1] == told[2]
    assert (told[0][0], told[3][0]) == (20, 25)
    assert told[3][1] != told[0][1]
    assert [event.facts["counts_rounded"] for event in verify(house.log) if event.kind == "site started"] == [True]
    exact = house.open(counts="exact").hello(house.question())
    assert isinstance(exact, Hello)
    assert (exact.patients["train"], exact.counts_rounded) == (25, False)
    assert dict(house.open(counts="none").hello(house.question()).patients) == {"train": 0, "validation": 0, "test": 0}
