"""Each rule of a hospital's policy, alone: what it forbids, what it lets through, and how it is named."""

from __future__ import annotations

from dataclasses import replace
from datetime import time
from typing import Any

import pytest

import client.policy as policy_module
from client.ledger import Ledger
from client.policy import ledger_policy, objections, score_event, told, visit_event
from common.accounting import Event, epsilon_pld
from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Task
from common.deployment import Policy
from common.errors import PrivacyError

PRIVATE = Privacy(mechanism="dp_sgd", epsilon=4.0, delta=1e-5)
RECIPE = Recipe(
    name="r", rounds=20, privacy=PRIVATE, model=ModelConfig(name="resnet18"),
    data=Preprocessing(modalities=("CR", "DX")), task=Task(),
)  # fmt: skip
WEIGHTED = replace(RECIPE, privacy=Privacy(), federation=replace(RECIPE.federation, site_weights="patients"))
FREE = Policy(require_privacy=False, epsilon=100.0, delta=1e-3, min_patients=1, counts="exact")


def test_a_policy_that_allows_everything_objects_to_nothing() -> None:
    assert objections(RECIPE, FREE, 30) == ()


@pytest.mark.parametrize(
    ("rule", "recipe", "forbids", "allows"),
    [
        ("require_privacy", replace(RECIPE, privacy=Privacy()), True, False),
        ("require_secure_aggregation", RECIPE, True, False),
        ("seeded_noise", replace(RECIPE, privacy=replace(PRIVATE, unsafe_seeded_noise=True)), False, True),
        (
            "min_noise_multiplier",
            replace(RECIPE, privacy=replace(PRIVATE, epsilon=None, noise_multiplier=0.9)),
            0.91,
            0.9,
        ),
        ("epsilon", RECIPE, 3.9, 4.0),
        ("delta", RECIPE, 9e-6, 1e-5),
        ("max_rounds", RECIPE, 19, 20),
        ("models", RECIPE, ("timm/resnet50", "monai/resnet18"), ("timm/resnet50", "timm/resnet18")),
        ("tasks", RECIPE, ("multiclass",), ("multilabel", "binary")),
        ("modalities", RECIPE, ("CR",), ("CR", "DX", "MR")),
        ("modalities", replace(RECIPE, data=Preprocessing()), ("CR",), ()),
        ("min_patients", RECIPE, 31, 30),
        ("counts", WEIGHTED, "coarse", "exact"),
    ],
)
def test_each_rule_forbids_alone_and_is_named(rule: str, recipe: Recipe, forbids: Any, allows: Any) -> None:
    (found,) = objections(recipe, replace(FREE, **{rule: forbids}), 30)
    assert f"({rule})" in found
    assert objections(recipe, replace(FREE, **{rule: allows}), 30) == ()


def test_what_a_recipe_protects_is_not_objected_to() -> None:
    assert objections(RECIPE, replace(FREE, require_privacy=True), 30) == ()
    federation = replace(WEIGHTED.federation, sites=3, quorum=3, max_patients=30, max_update_norm=10)
    masked = replace(WEIGHTED, federation=federation, privacy=Privacy(secure_aggregation=True))
    assert objections(masked, replace(FREE, require_secure_aggregation=True, counts="coarse"), 30) == ()


def test_every_rule_that_is_broken_is_told_at_once() -> None:
    policy = replace(FREE, epsilon=1.0, max_rounds=5, models=("timm/vit",), min_patients=100)
    assert len(objections(RECIPE, policy, 30)) == 4


def test_a_site_that_would_weigh_more_than_the_recipe_lets_it_says_so_before_it_trains() -> None:
    for most, objected in ((29, True), (30, False), (None, False)):
        recipe = replace(WEIGHTED, federation=replace(WEIGHTED.federation, max_patients=most))
        assert any("federation.max_patients" in why for why in objections(recipe, FREE, 30)) is objected
        equal = replace(recipe, federation=replace(recipe.federation, site_weights="equal"))
        assert objections(equal, FREE, 30) == ()


def test_the_number_of_patients_is_asked_only_where_it_is_known_and_never_told() -> None:
    policy = replace(FREE, min_patients=100)
    assert objections(RECIPE, policy) == ()
    (found,) = objections(RECIPE, policy, 37)
    assert "37" not in found


@pytest.mark.parametrize(
    ("rule", "event"),
    [
        ({"min_noise_multiplier": 1.1}, Event(noise_multiplier=1.0, sampling_rate=0.1, steps=10)),
        ({"max_sampling_rate": 0.09}, Event(noise_multiplier=1.0, sampling_rate=0.1, steps=10)),
        ({"max_steps": 9}, Event(noise_multiplier=1.0, sampling_rate=0.1, steps=10)),
        ({"epsilon": 0.1}, Event(noise_multiplier=1.0, sampling_rate=0.1, steps=10)),
    ],
)
def test_the_ledger_holds_the_rules_that_depend_on_the_sites_own_numbers(tmp_path, rule: Any, event: Event) -> None:
    def reserve(policy: Policy) -> None:
        ledger = Ledger(tmp_path / "ledger.jsonl", "north", ledger_policy(policy))
        ledger.reserve("a" * 64, round=1, base="b" * 64, event=event)

    with pytest.raises(PrivacyError):
        reserve(replace(FREE, **rule))
    reserve(FREE)


def test_hours_may_pass_midnight_and_the_end_does_not_belong_to_them() -> None:
    night = replace(FREE, hours=("19:00-06:00", "12:00-13:00"))
    opens = {time(18, 59): False, time(19): True, time(23, 59): True, time(0): True, time(5, 59): True, time(6): False}
    opens |= {time(11, 59): False, time(12): True, time(12, 59): True, time(13): False}
    assert {moment: night.open_at(moment) for moment in opens} == opens
    assert all(FREE.open_at(time(hour)) for hour in range(24))


def test_coarse_counts_round_down_by_at_most_a_quarter() -> None:
    coarse = replace(FREE, counts="coarse")
    assert [told(n, coarse) for n in (0, 9, 10, 11, 12, 99, 100, 124, 308, 1309, 10**6)] == [
        0, 9, 10, 10, 12, 80, 100, 120, 250, 1200, 10**6
    ]  # fmt: skip
    assert [told(n, FREE) for n in (11, 308)] == [11, 308]
    assert [told(n, replace(FREE, counts="none")) for n in (11, 308)] == [10, 250]  # the sampling rate tells it
    for n in range(10, 3000):
        assert 0.75 * n < told(n, coarse) <= n


def test_more_steps_than_an_account_is_made_of_are_refused_before_any_is_made(monkeypatch) -> None:
    monkeypatch.setattr(policy_module, "solve_noise", lambda *_: 1.0)
    many = replace(RECIPE, rounds=50_000, training=replace(RECIPE.training, batch_size=10, local_epochs=2.0))
    assert visit_event(many, 100, FREE)[1].steps == 20  # ten batches, twice: a million in all rounds
    with pytest.raises(PrivacyError, match=r"1,000,020 noised steps .* more than 1,000,000: fewer rounds"):
        visit_event(replace(many, rounds=50_001), 100, FREE)


def test_the_scores_of_a_recipe_cost_what_the_policy_gives_them() -> None:
    policy = replace(FREE, scores_epsilon=2.0, delta=1e-5)
    assert 1.99 <= epsilon_pld([score_event(policy)], 1e-5) <= 2.0
