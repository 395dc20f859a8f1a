"""What federation is compared with makes as many passes over the images as the federated model has behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.cohort import Cohort
from client.train import Trained
from common.config import Federation, ModelConfig, Preprocessing, Privacy, Recipe, Training
from common.metrics import Metrics
from common.samples import Samples
from common.weights import Weights
from simulations import baselines as module
from simulations.baselines import baselines

RECIPE = Recipe(
    name="compared", rounds=8, data=Preprocessing(size=(8, 8)), federation=Federation(sites=3, quorum=1),
    training=Training(batch_size=5, local_epochs=0.5, warmup_rounds=1),
    model=ModelConfig(family="monai", name="resnet10", width=0.0625, stem="small"),
)  # fmt: skip


def cohort(train: int) -> Cohort:
    x_N, names = np.zeros((train, 1, 8, 8), np.float32), tuple(map(str, range(train)))
    samples = Samples(x_N, np.arange(train) % 2, np.arange(train), names, {}, "")
    return Cohort(samples, np.repeat(["train"], train), "a" * 64, {}, 2)


COHORTS = {"north": cohort(10), "south": cohort(20), "west": cohort(30)}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Training]:
    """Training that costs nothing; what each was told to do, by name."""
    told: dict[str, Training] = {}

    def fake(model: object, start: Weights, cohort: Cohort, recipe: Recipe, *, site: str, **_: Any) -> Trained:
        told[site] = recipe.training
        return Trained(delta=start.zeros(), steps=1, loss=None)

    monkeypatch.setattr(module, "train", fake)
    monkeypatch.setattr(module, "central", lambda *_, **__: type("Found", (), {"metrics": Metrics(patients=9)}))
    return told


def compared(rounds: dict[str, int], **parts: Any) -> Any:
    return baselines(RECIPE, COHORTS, rounds, COHORTS["north"].samples, torch.device("cpu"), **parts)


def test_with_all_sites_in_all_rounds_each_makes_all_planned_passes(trained: dict[str, Training]) -> None:
    compared(dict.fromkeys(COHORTS, 8))
    assert {name: one.local_epochs for name, one in trained.items()} == dict.fromkeys([*COHORTS, "pooled"], 4.0)
    assert {one.warmup_rounds for one in trained.values()} == {1 / 8}


def test_a_site_makes_the_passes_of_its_own_rounds_and_the_pooled_data_their_mean(trained: dict[str, Training]) -> None:
    found = compared({"north": 2, "south": 5})
    # half a pass a round; pooled (2 * 10 + 5 * 20 + 0 * 30) / 60 = 2 rounds
    assert {name: one.local_epochs for name, one in trained.items()} == {"north": 1.0, "south": 2.5, "pooled": 1.0}
    assert list(found.alone) == ["north", "south"], "west gave nothing, so there is nothing to compare it with"


def test_half_passes_that_are_whole_steps_are_made_again_as_they_were(trained: dict[str, Training]) -> None:
    # Of batches of 5: 4 images are one step a round, a whole pass; 15 images are 3 steps a pass, half of which is 2;
    # 20 are 4, half of which is 2.
    sites = {"small": cohort(4), "odd": cohort(15), "even": cohort(20)}
    baselines(RECIPE, sites, dict.fromkeys(sites, 3), sites["even"].samples, torch.device("cpu"))
    found = {name: one.local_epochs for name, one in trained.items()}
    assert found == pytest.approx(
        {"small": 3, "odd": 3 * 2 / 3, "even": 3 / 2, "pooled": (3 * 4 + 2 * 15 + 1.5 * 20) / 39}
    )


def test_private_steps_are_counted_as_the_passes_that_they_make(trained: dict[str, Training]) -> None:
    private = replace(RECIPE, privacy=Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-5))
    sites = {"small": cohort(4), "odd": cohort(15)}
    baselines(private, sites, dict.fromkeys(sites, 3), sites["odd"].samples, torch.device("cpu"))
    # All 4 patients in the one step of each round; a third of 15 in each of 2.
    assert (trained["small"].local_epochs, trained["odd"].local_epochs) == pytest.approx((3, 3 * 2 / 3))


def test_of_a_model_with_no_round_behind_it_there_is_no_baseline(trained: dict[str, Training]) -> None:
    found = compared({})
    assert (found.centralised, found.alone, trained) == (None, {}, {})


def test_no_network_is_built_for_a_question_that_privacy_does_not_ask(
    trained: dict[str, Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(module, "mixes", lambda model: bool(asked.append(model)))
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-3)
    for recipe, times in ((RECIPE, 1), (replace(RECIPE, privacy=privacy), 0)):
        asked.clear()
        baselines(recipe, COHORTS, dict.fromkeys(COHORTS, 8), COHORTS["north"].samples, torch.device("cpu"))
        assert len(asked) == times
