"""`simulation.metrics=noised` from DICOM to the coordinator: what it is told of patients carries noise, and is paid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger, SitePolicy
from client.policy import told
from client.site import Site
from common.accounting import epsilon_pld
from common.audit import verify
from common.audit_report import account
from common.config import (
    Evaluation,
    Federation,
    ModelConfig,
    Phantom,
    Preprocessing,
    Privacy,
    Recipe,
    Settings,
    Simulation,
    Task,
    Training,
)
from common.epsilon import rounded_up
from common.exchange import Hello, ScoresSpent, Update
from common.logs import read_logs
from simulations import run
from simulations.run import simulate

SITES = ("north", "south")
# Seeded, so that the same splits are always large enough, as noised, to say something.
PRIVATE = Privacy(mechanism="dp_sgd", epsilon=4.0, delta=1e-3, unsafe_seeded_noise=True)
RECIPE = Recipe(
    name="noised", rounds=2, seed=1, task=Task(classes=("no nodule", "nodule")), data=Preprocessing(size=(16, 16)),
    model=ModelConfig(family="monai", name="resnet10", width=0.0625, stem="small"),
    training=Training(batch_size=8, lr=3e-3), privacy=PRIVATE, federation=Federation(sites=2, quorum=2),
    evaluation=Evaluation(bootstraps=100, min_cell=3, validation_fraction=0.25, test_fraction=0.3),
)  # fmt: skip


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Everything that a site says to the coordinator, by site; what comes after the last round is left out."""
    said: dict[str, list[Any]] = {name: [] for name in SITES}
    for question in ("hello", "visit"):

        def heard(self: Site, asked: Any, honest: Any = getattr(Site, question)) -> Any:
            said[self.name].append(honest(self, asked))
            return said[self.name][-1]

        monkeypatch.setattr(Site, question, heard)
    monkeypatch.setattr(run, "conclude", lambda federated, *_, **__: federated)
    return said


def settings_of(out: Path, recipe: Recipe = RECIPE) -> Settings:
    phantom = Phantom(patients=45, central_patients=8, size=24, seed=3)
    return Settings(
        recipe=recipe, simulation=Simulation(phantom=phantom, metrics="noised", device="cpu", threads=1), out=str(out)
    )


def test_scores_leave_noised_once_and_paid_and_no_exact_count_leaves_at_all(
    tmp_path: Path, replies: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: dict[str, dict[str, int]] = {}
    opened = Site.__init__

    def counted(self: Site, name: str, recipe: Recipe, cohort: Any, *rest: Any, **named: Any) -> None:
        exact[name] = {split: cohort.patients(split) for split in ("train", "validation", "test")}
        opened(self, name, recipe, cohort, *rest, **named)

    monkeypatch.setattr(Site, "__init__", counted)
    federated: Any = simulate(settings_of(tmp_path))
    policy = run._policy(RECIPE, "noised")
    measured = 0
    for name in SITES:
        hello, *rounds, closing = replies[name]
        assert isinstance(hello, Hello)
        rounded = {split: told(count, policy) for split, count in exact[name].items()}
        assert hello.patients == {split: count if count >= 3 else 0 for split, count in rounded.items()}
        assert len(rounds) == RECIPE.rounds
        for update in rounds:
            assert isinstance(update, Update)
            assert (update.validation, update.test, update.train_loss) == (None, None, None)
            assert update.spent is not None
            assert update.spent.sampling_rate == min(1.0, 8 / rounded["train"])
            assert update.scores_spent is None
        assert isinstance(closing, Update)
        for scores in (closing.validation, closing.test):
            assert scores is not None
            assert scores.noised
            measured += bool(scores.values)

        # The ledger paid for both splits, once; what the coordinator is told of it is what stands there.
        ledger = Ledger(tmp_path / "sites" / name / "ledger.jsonl", name, SitePolicy(epsilon=5.0, delta=1e-3))
        (event,) = ledger.events(RECIPE.id, "scores")
        assert (event.sampling_rate, event.steps) == (1.0, 2)
        paid = epsilon_pld([event], 1e-3)
        assert 0.98 <= paid <= policy.scores_epsilon == 1.0
        assert closing.spent is not None
        assert closing.scores_spent == ScoresSpent(epsilon=paid, delta=1e-3)
        assert closing.spent.epsilon <= 4.0 < ledger.spent() <= 5.0
        kinds = [event.facts.get("releases") for event in verify(tmp_path / "audit" / f"{name}.jsonl")
                 if event.kind == "budget reserved"]  # fmt: skip
        assert kinds == [None, None, "scores"]
    assert measured, "no split was large enough to say anything; choose another seed"
    assert any(told(count, policy) != count for counts in exact.values() for count in counts.values())

    # And nothing that the coordinator keeps has them.
    last = federated.state.history[-1].accepted
    assert {name: done.test.noised for name, done in last.items()} == dict.fromkeys(SITES, True)
    kept = json.loads((tmp_path / "checkpoints" / "sites.json").read_text())
    for name in SITES:
        assert kept[name]["patients"] == replies[name][0].patients
    (joined,) = [event for event in verify(tmp_path / "audit" / "server.jsonl") if "sites" in event.facts]
    assert {name: joined.facts["sites"][name]["patients"] for name in SITES} == {
        name: dict(replies[name][0].patients) for name in SITES
    }


def test_noised_scores_of_a_training_without_privacy_have_one_price_wherever_it_is_told(
    tmp_path: Path,
) -> None:
    recipe = replace(RECIPE, rounds=1, privacy=Privacy())
    done: Any = simulate(settings_of(tmp_path, recipe))
    prices = {}
    for name in SITES:
        ledger = Ledger(tmp_path / "sites" / name / "ledger.jsonl", name, SitePolicy(epsilon=5.0, delta=1e-5))
        prices[name] = epsilon_pld(ledger.events(recipe.id, "scores"), 1e-5)
        assert 0.98 <= prices[name] <= 1.0
    sites = json.loads((tmp_path / "summary.json").read_text())["sites"]
    assert {name: sites[name]["scores_epsilon"] for name in SITES} == prices
    assert [sites[name][key] for name in SITES for key in ("scores_delta", "epsilon")] == [1e-5, None] * 2
    assert done.report.noised_scores == max(prices.values())
    (story,) = account(read_logs([tmp_path]), {}).stories
    assert {site.name: site.scores_epsilon for site in story.sites} == prices
    told = f"Noised scores cost a hospital epsilon {rounded_up(max(prices.values()))} at most, at delta 1e-5"
    assert told in (tmp_path / "report.html").read_text()
    assert told in (tmp_path / "model_card.md").read_text()
