"""The privacy audit passes the engine as it is, and catches four engines that were broken on purpose."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from client import canaries, mechanism
from client import train as work
from client.canaries import lower_bound, one_run, p_value
from client.cohort import Cohort
from client.dp import bookkeeping, engine, seeded_noise
from client.dp import noise as noise_module
from client.mechanism import planned, self_tests
from client.privacy_audit import privacy_audit
from common.accounting import Event, epsilon_pld
from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Training
from common.errors import PrivacyError
from common.models import build
from common.privacy_audit import FALSE_ALARM, PrivacyAudit

SITES = {"north": 40}


def recipe_of(**parts: object) -> Recipe:
    given = {
        "name": "tiny",
        "rounds": 3,
        "data": Preprocessing(size=(12, 12)),
        "model": ModelConfig(family="monai", name="resnet10", width=0.0625, stem="small"),
        "training": Training(batch_size=10),
        "privacy": Privacy(mechanism="dp_sgd", epsilon=6.0, delta=1e-4),
    }
    return Recipe(**(given | parts))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's randomness repeats, so that no run of these tests is the one in a thousand."""
    monkeypatch.setattr(noise_module.os, "urandom", random.Random(5).randbytes)


def failed(recipe: Recipe | None = None, **parts: object) -> set[str]:
    checks = self_tests(recipe or recipe_of(**parts), SITES)
    return {check.name.partition(",")[0] for check in checks if not check.passed}


def blind_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the engine's own tests of the first step away: the audit must not rely on them."""
    monkeypatch.setattr(engine.PrivateGradient, "self_test", lambda self, x_B, target_B: None)


# The honest one


def test_the_engine_as_it_is_passes_every_check() -> None:
    checks = self_tests(recipe_of(), {"north": 40, "south": 25, "west": 8})  # west takes everyone in every step
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 3 * 5 - 1 + 8
    assert sum(check.false_alarm for check in checks) <= FALSE_ALARM


@pytest.mark.parametrize(
    "parts",
    [
        {"privacy": Privacy(mechanism="dp_sgd", noise_multiplier=1.1, delta=1e-4, secure_rng=True, clip_norm=0.3)},
        {"model": ModelConfig(family="monai", name="resnet10", width=0.0625, stem="small", dropout=0.3)},
        {"privacy": Privacy(mechanism="dp_sgd", epsilon=6.0, delta=1e-4, views=3)},
        {"privacy": Privacy(mechanism="dp_sgd", epsilon=6.0, delta=1e-4, clip_quantile=0.5)},
    ],
    ids=["keystream", "dropout", "views", "adaptive clip norm"],
)
def test_other_noise_dropout_views_and_an_adaptive_clip_norm_pass_too(parts: dict[str, object]) -> None:
    assert failed(**parts) == set()


def test_the_account_is_counted_forwards_by_three_accountants() -> None:
    (check,) = [check for check in self_tests(recipe_of(), SITES) if check.name == "account, north"]
    plan = planned(recipe_of(), 40)
    assert plan.sampling.rate == 0.25
    epsilon = epsilon_pld(
        [Event(noise_multiplier=plan.noise_multiplier, sampling_rate=0.25, steps=3 * plan.sampling.steps)], 1e-4
    )
    assert check.found.startswith(f"epsilon {epsilon:.3f} by PLD")


# Four broken ones


def test_noise_divided_by_the_root_of_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.PrivateGradient._release

    def release(self: engine.PrivateGradient, sums: list[torch.Tensor]) -> None:
        accounted = self.noise_multiplier
        self.noise_multiplier = accounted / math.sqrt(self.expected_batch)
        honest(self, sums)
        self.noise_multiplier = accounted

    monkeypatch.setattr(engine.PrivateGradient, "_release", release)
    assert "noise" in failed(), "the engine's own test refuses"
    blind_engine(monkeypatch)
    assert failed() == {"noise variance", "noise is Gaussian"}


def test_an_engine_that_does_not_clip_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(squares_P: torch.Tensor, clip_norm: float, views: int = 1) -> bookkeeping.Factors:
        return bookkeeping.Factors(torch.ones_like(squares_P), None, views)

    for module in (bookkeeping, engine):
        monkeypatch.setattr(module, "clip_factors", factors)
    assert "clipped sums" in failed(), "the engine's own test refuses"
    blind_engine(monkeypatch)
    assert {"sensitivity to one patient", "clipped sums against a loop over patients"} <= failed()


def test_a_voxel_that_is_no_number_and_passes_the_clip_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(squares_P: torch.Tensor, clip_norm: float, views: int = 1) -> bookkeeping.Factors:
        below = clip_norm * (1 - 64 * torch.finfo(squares_P.dtype).eps)
        return bookkeeping.Factors((below / squares_P.sqrt()).clamp(max=1.0), None, views)

    for module in (bookkeeping, engine):
        monkeypatch.setattr(module, "clip_factors", factors)
    assert failed() == {"sensitivity to one patient"}


def test_less_noise_than_the_epsilon_of_the_recipe_needs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = mechanism.solved
    monkeypatch.setattr(mechanism, "solved", lambda *words: 0.97 * honest(*words))
    assert failed() == {"account"}  # the noise is what is planned, and the plan costs too much


def test_a_step_more_than_is_accounted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = work.private_batches

    def one_more(*words: Any, **more: Any) -> Iterator[Any]:
        for index in honest(*words, **more):
            yield index
        yield index

    monkeypatch.setattr(work, "private_batches", one_more)
    assert "number of steps" in failed()


def test_noise_from_a_seed_that_the_server_knows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_the_recipe(recipe: Recipe, round_: int, site: str) -> object:
        source = seeded_noise(work.seed_of("noise", recipe, round_, site))
        source.secret = True  # type: ignore[misc] - and it lies
        return source

    monkeypatch.setattr(work, "site_noise", from_the_recipe)
    assert {"noise is secret and fresh", "draws are secret"} <= failed()


def test_a_stream_of_images_that_a_server_could_repeat_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(work.Course):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.dropout_seed = work.seed_of("train", given[2], named["round_"], named["site"])

    monkeypatch.setattr(work, "Course", Known)
    assert failed() == {"images and their changes are secret"}


def test_noise_from_the_global_generator_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = noise_module._TorchNoise.normal
    monkeypatch.setattr(
        noise_module._TorchNoise,
        "normal",
        lambda self, like: torch.randn(like.shape) if self.secret else honest(self, like),
    )
    blind_engine(monkeypatch)
    assert "noise is secret and fresh" in failed()


def test_a_recipe_with_seeded_noise_does_not_pass() -> None:
    privacy = Privacy(mechanism="dp_sgd", epsilon=6.0, delta=1e-4, unsafe_seeded_noise=True)
    assert "noise is secret and fresh" in failed(privacy=privacy)


def test_drawing_images_instead_of_patients_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def images(cohort: Cohort, private: work.Private, rng: np.random.Generator, views: int) -> Iterator[np.ndarray]:
        indices = cohort.indices("train")
        for _ in range(private.sampling.steps):
            yield indices[private.noise.uniform(len(indices)) < private.sampling.rate]

    monkeypatch.setattr(work, "private_batches", images)
    assert failed() == {"one draw a patient", "sampling rate", "independent draws"}


# And some more


def test_batches_of_fixed_size_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(cohort: Cohort, private: work.Private, rng: np.random.Generator, views: int) -> Iterator[np.ndarray]:
        patient_N = cohort.samples.patient_N
        first = np.searchsorted(patient_N, np.arange(patient_N.max() + 1))
        count = round(len(first) * private.sampling.rate)
        for _ in range(private.sampling.steps):
            yield first[np.sort(np.argsort(private.noise.uniform(len(first)))[:count])]

    monkeypatch.setattr(work, "private_batches", fixed)
    assert failed() == {"independent draws"}


def test_dividing_by_the_number_that_was_drawn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.PrivateGradient.step

    def step(self: engine.PrivateGradient, x_B: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
        public = self.expected_batch
        self.expected_batch = max(1, len(x_B))
        norms = honest(self, x_B, target_B)
        self.expected_batch = public
        return norms

    monkeypatch.setattr(engine.PrivateGradient, "step", step)
    assert {"fixed denominator", "noise variance"} <= failed()


def test_one_parameter_without_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.PrivateGradient._release

    def release(self: engine.PrivateGradient, sums: list[torch.Tensor]) -> None:
        kept = sums[-1].clone()  # the bias of the head: 2 numbers of 20,000
        honest(self, sums)
        list(bookkeeping.trainable(self.model).values())[-1].grad = kept / self.expected_batch

    monkeypatch.setattr(engine.PrivateGradient, "_release", release)
    blind_engine(monkeypatch)
    assert failed() == {"noise variance"}


def test_too_little_noise_on_the_count_of_an_adaptive_clip_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_COUNT_NOISE", 1.0)
    privacy = Privacy(mechanism="dp_sgd", epsilon=6.0, delta=1e-4, clip_quantile=0.5)
    # the engine gives the gradient more noise for it, which is not what was accounted either
    assert failed(privacy=privacy) == {"noise variance", "noise of the clip norm's count", "noise is Gaussian"}


def test_without_privacy_there_is_nothing_to_audit() -> None:
    with pytest.raises(PrivacyError, match="no mechanism to audit"):
        self_tests(recipe_of(privacy=Privacy()), SITES)
    with pytest.raises(PrivacyError, match="no site"):
        self_tests(recipe_of(), {})


def test_the_audit_leaves_the_global_generators_where_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    self_tests(recipe_of(), SITES)
    assert torch.equal(torch.rand(1), expected)


# The one-run audit


def test_the_p_value_is_the_binomial_tail_and_what_delta_may_add() -> None:
    # epsilon = ln 3: each guess is right with chance 3 / 4 at most
    assert p_value(100, 40, 36, math.log(3), 0.0) == pytest.approx(stats.binom.sf(35, 40, 0.75))
    # Two guesses, both right, of 3/4 each: 9/16. Fewer by one come with 6/16, by one or two with 7/16, half of which is
    # less: 6/16 it is, times 2 x 10 canaries x delta.
    assert p_value(10, 2, 2, math.log(3), 1e-3) == pytest.approx(9 / 16 + 20 * 1e-3 * 6 / 16)
    assert p_value(100, 40, 0, 1.0, 1e-3) == 1.0


def test_perfect_guesses_are_bounded_by_their_number() -> None:
    inside = np.arange(1000) % 2 == 0
    score = np.where(inside, 1.0, 0.0) + np.linspace(0, 0.1, 1000)
    lower, guesses, right = lower_bound(score, inside, 0.0)
    assert (guesses, right) == (1000, 1000)
    # q ** 1000 = 0.05 / 4 with q = 1 / (1 + exp(-epsilon))
    q = (0.05 / 4) ** (1 / 1000)
    assert lower == pytest.approx(math.log(q / (1 - q)), rel=1e-6)


def test_a_bound_below_one_is_found_too() -> None:
    found = canaries._epsilon(1000, 1000, 600, 0.0, 0.0125)
    assert 0 < found < math.log(0.6 / 0.4)  # what they would be right of on average
    assert p_value(1000, 1000, 600, found, 0.0) == pytest.approx(0.0125)


def test_coins_that_nobody_can_see_give_no_bound() -> None:
    rng = np.random.default_rng(0)
    bounds = [lower_bound(rng.normal(size=500), rng.random(500) < 0.5, 1e-5)[0] for _ in range(200)]
    assert np.mean(np.array(bounds) > 0) <= 0.05


def test_the_honest_engine_stays_below_its_account_and_the_audit_sees_something() -> None:
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=0.8, delta=1e-4)
    recipe = recipe_of(privacy=privacy)
    bound = one_run(recipe, planned(recipe, 20), canaries=300, steps=12, seed=1)
    assert 0.5 < bound.lower < bound.upper
    assert bound.passed
    assert bound.steps == 6, "no more than the whole run has"


def test_training_with_a_tenth_of_the_noise_breaks_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.PrivateGradient._release

    def release(self: engine.PrivateGradient, sums: list[torch.Tensor]) -> None:
        accounted = self.noise_multiplier
        self.noise_multiplier = accounted / 10
        honest(self, sums)
        self.noise_multiplier = accounted

    monkeypatch.setattr(engine.PrivateGradient, "_release", release)
    monkeypatch.setattr(engine.PrivateGradient, "_test_noise", lambda self: None)
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=3.0, delta=1e-4)
    recipe = recipe_of(privacy=privacy)
    bound = one_run(recipe, planned(recipe, 20), canaries=300, seed=1)
    assert bound.lower > bound.upper
    assert not bound.passed


def test_canaries_touch_the_network_as_little_as_noise_does() -> None:
    recipe = recipe_of()
    model = canaries._WithCanaries(build(recipe).eval(), 60)
    x = torch.zeros(2, 1, 12, 12)
    x[0].flatten()[:2] = torch.tensor([canaries._MARK, 7.0])
    out = model(x)
    assert out.shape == (2, 4)
    assert out[:, -1].tolist() == [1.0, 0.0]
    loss = canaries._loss(work.record_loss(recipe), 5.0)(out, torch.tensor([0, 1]))
    loss[0].backward()
    assert model.canary.weight.grad is not None
    assert model.canary.weight.grad.nonzero().tolist() == [[0, 7]]
    assert all(not p.grad.any() for p in model.network.parameters() if p.grad is not None)


# The result


def test_an_audit_says_what_was_audited_and_how_it_went() -> None:
    recipe = recipe_of()
    found = privacy_audit(recipe, SITES, weights="ab" * 32, canaries=60, steps=3, seed=0)
    assert found.passed
    assert (found.recipe_id, found.weights, found.patients) == (recipe.id, "ab" * 32, SITES)
    assert set(found.code) == {"common", "client", "torch"}
    assert not replace(found, checks=()).passed, "nothing to check is a refusal, not a pass"
    bound = found.bound
    assert bound is not None
    broken = replace(found, bound=replace(bound, lower=bound.upper + 1))
    assert not broken.passed
    assert broken.failed == ("one-run audit",)


def test_a_mechanism_that_refuses_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, x_B: torch.Tensor, target_B: torch.Tensor) -> None:
        raise PrivacyError("no")

    monkeypatch.setattr(engine.PrivateGradient, "step", refuse)
    found = privacy_audit(recipe_of(), SITES, canaries=60, steps=3, seed=0)
    assert isinstance(found, PrivacyAudit)
    assert not found.passed
    assert {"clipped sums", "noise", "secrecy", "one-run audit"} <= set(found.failed)


def test_images_take_no_memory_in_the_sampling_test() -> None:
    cohort = mechanism._made_up(recipe_of(), 1000)
    assert cohort.samples.x_N.strides[0] == 0
    assert cohort.patients("train") == 1000
    assert len(cohort.samples.patient_N) == 1000 / 4 * (1 + 2 + 4 + 8)
