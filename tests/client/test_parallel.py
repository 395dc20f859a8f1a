"""Two processes on CPUs (gloo) train as one does: same draws, one noise, patients clipped where they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from client import parallel
from client.dp import Sampling, seeded_noise
from client.parallel import Team, dismiss, team_of
from client.train import Private, Trained, train
from common.config import Augmentation, Preprocessing, Privacy, Recipe, Training
from common.errors import ConfigError, TrainingError
from common.models import build, get_weights
from tests.client.test_train import CPU, cohort_of, flat, recipe_of

TWO = (CPU, CPU)
TRAINING = Training(optimizer="adamw", lr=0.01, batch_size=5, local_epochs=2.0, class_weights="balanced")
NOISY = Preprocessing(size=(16, 16), augmentation=Augmentation(rotate_deg=10.0))


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    dismiss()


def go(recipe: Recipe, team: Team | None, private: Private | None = None) -> Trained:
    return train(
        build(recipe), get_weights(build(recipe)), cohort_of(13, images=2), recipe, round_=2, site="north", device=CPU,
        private=private, team=team,
    )  # fmt: skip


def same(a: Trained, b: Trained) -> None:
    one, two = flat(a.delta), flat(b.delta)
    assert np.linalg.norm(one) > 0.01
    assert np.linalg.norm(one - two) < 1e-3 * np.linalg.norm(one)
    assert a.steps == b.steps


def test_a_plain_round_is_that_of_one_process() -> None:
    recipe = recipe_of(TRAINING, data=NOISY)
    one, two = go(recipe, None), go(recipe, team_of(recipe, TWO))
    same(one, two)
    assert one.loss == pytest.approx(two.loss, rel=1e-4)


def private_recipe(**terms: object) -> Recipe:
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=0.3, delta=1e-5, clip_norm=0.5, **terms)  # type: ignore[arg-type]
    return recipe_of(replace(TRAINING, optimizer="sgd", lr=0.2, momentum=0.0, class_weights=None), privacy=privacy)


@pytest.mark.parametrize("terms", [{"views": 2}, {"clip_quantile": 0.5, "physical_batch": 2}])
def test_a_private_round_is_that_of_one_process_with_one_noise(terms: dict[str, object]) -> None:
    recipe = private_recipe(**terms)

    def private() -> Private:  # the same noise for both
        return Private(sampling=Sampling(rate=0.5, steps=4), noise_multiplier=0.3, noise=seeded_noise(7))

    one, two = go(recipe, None, private()), go(recipe, team_of(recipe, TWO), private())
    same(one, two)
    assert one.clip_norm == pytest.approx(two.clip_norm, rel=1e-4)
    if "clip_quantile" in terms:
        assert two.clip_norm != 0.5


def test_the_noise_of_a_step_with_nobody_is_added_once() -> None:
    recipe = private_recipe()
    nobody = Private(sampling=Sampling(rate=0.0, steps=30), noise_multiplier=0.3, noise=seeded_noise(7))
    moved = flat(go(recipe, team_of(recipe, TWO), nobody).delta)
    # sgd, 30 steps of a rate that is a cosine: the squares add up
    rates = [rate_at(recipe, step) for step in range(30)]
    expected = 0.3 * 0.5 / 5 * np.sqrt(sum(rate**2 for rate in rates))
    assert moved.std() == pytest.approx(expected, rel=0.05)


def rate_at(recipe: Recipe, step: int) -> float:
    from client.train import rate

    return recipe.training.lr * rate(recipe.training, (1 + step / 30) / recipe.rounds, recipe.rounds)


def test_a_process_that_was_killed_is_told_and_the_next_round_has_a_new_team() -> None:
    recipe = recipe_of(TRAINING)
    team = team_of(recipe, TWO)
    pid = team._processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    team._processes[0].join()
    with pytest.raises(TrainingError, match="another process ended"):
        go(recipe, team)
    assert team_of(recipe, TWO) is not team
    same(go(recipe, None), go(recipe, team_of(recipe, TWO)))


def test_batch_norm_is_refused_by_what_to_do() -> None:
    recipe = recipe_of(TRAINING, norm="batch")
    with pytest.raises(ConfigError, match=r"model\.norm=group"):
        go(recipe, object())  # type: ignore[arg-type]  # it is refused before the team is asked


def test_the_team_of_another_recipe_ends() -> None:
    first = team_of(recipe_of(TRAINING), TWO)
    processes = list(first._processes)
    assert all(process.is_alive() for process in processes)
    team_of(recipe_of(replace(TRAINING, lr=0.02)), TWO)
    assert not any(process.is_alive() for process in processes)
    assert len(parallel._TEAM) == 1
    assert not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 2
