"""Every reason for which a reply may not change the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common import wire
from common.compression import FORMS, quantised
from common.config import Federation, Privacy, Recipe
from common.exchange import Failure, Hello, Refusal, RoundPlan, Scores, ScoresSpent, Spent, Update
from common.weights import Weights
from server import admit

MODEL = Weights({"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)})
OPEN = Recipe(name="open", federation=Federation(max_update_norm=10))
PRIVATE = replace(OPEN, name="private", privacy=Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5, clip_norm=0.5))
NOISY = replace(PRIVATE, privacy=Privacy(mechanism="dp_sgd", noise_multiplier=1.5, delta=1e-5, clip_norm=0.5))
COUNTED = replace(OPEN, federation=replace(OPEN.federation, site_weights="patients"))
SPENT = Spent(epsilon=8, delta=1e-5, noise_multiplier=1.5, clip_norm=0.5, sampling_rate=0.1, steps=3)


HELLO = Hello(
    site="north",
    recipe_id=OPEN.id,
    versions={},
    patients={"train": 57, "validation": 12, "test": 0},
    manifest="d" * 64,
)


def refusal(reply, plan, recipe, hello=HELLO) -> str | None:
    return admit.refusal(reply, plan, recipe, hello)


def plan(recipe: Recipe, work="train") -> RoundPlan:
    return RoundPlan(recipe_id=recipe.id, round=3, work=work, weights=MODEL)


def update(recipe: Recipe, **changes) -> Update:
    values = {
        "site": "north", "recipe_id": recipe.id, "round": 3, "base": MODEL.digest, "weight": 1.0, "steps": 4,
        "delta": Weights({"w": np.full((2, 2), 3, np.float32), "b": np.array([4, 0], np.float32)}),
        "spent": SPENT if recipe.privacy.active else None,
    }  # fmt: skip
    return Update(**(values | changes))


@pytest.mark.parametrize(
    ("most", "why"), [(None, None), (57, None), (56, "declared weight 57 is above federation.max_patients 56")]
)
def test_no_site_weighs_more_than_the_recipe_lets_it_whatever_it_claims(most, why):
    recipe = replace(COUNTED, federation=replace(COUNTED.federation, max_patients=most))
    assert refusal(update(recipe, weight=57.0), plan(recipe), recipe) == why


@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_a_privacy_account_of_a_training_without_privacy_is_refused(work):
    told = {"delta": Weights({}), "steps": 0} if work == "evaluate" else {}
    # At delta 1 no accountant gives an answer, and the summary of the run asked two of them.
    why = refusal(update(OPEN, spent=replace(SPENT, delta=1.0), **told), plan(OPEN, work), OPEN)
    assert why == "a privacy account came along, and the recipe trains without privacy"


def test_noised_scores_without_their_price_are_refused():
    recipe, noised = OPEN, Scores(patients=20, values={"auroc": 0.8}, noised=True)
    closing = {"delta": Weights({}), "steps": 0, "test": noised}
    free, paid = (update(recipe, **closing, scores_spent=spent) for spent in (None, ScoresSpent(epsilon=1, delta=1e-5)))
    assert refusal(free, plan(recipe, "evaluate"), recipe) == "the scores are noised, and what that cost is not said"
    assert refusal(paid, plan(recipe, "evaluate"), recipe) is None


def delta(**arrays) -> Weights:
    return Weights({name: np.asarray(value, np.float32) for name, value in arrays.items()})


@pytest.mark.parametrize(
    ("recipe", "weight"), [(OPEN, 1.0), (PRIVATE, 1.0), (NOISY, 1.0), (COUNTED, 57.0)], ids=lambda item: str(item)[:20]
)
def test_a_proper_update_is_admitted(recipe, weight):
    assert refusal(update(recipe, weight=weight), plan(recipe), recipe) is None


THIRDS = Weights({"w": np.full((2, 2), 1 / 3, np.float32), "b": np.full(2, 1 / 3, np.float32)})


@pytest.mark.parametrize("form", FORMS)
def test_an_update_is_of_the_form_that_the_recipe_demands(form):
    recipe = replace(OPEN, federation=replace(OPEN.federation, compression=form))
    for sent in FORMS:
        came = update(recipe, delta=quantised(THIRDS, sent), compression=sent)
        why = f"update sent with compression {sent}, expected {form} (federation.compression)"
        assert refusal(came, plan(recipe), recipe) == (None if sent == form else why)
    if form != "none":
        lie = update(recipe, delta=THIRDS, compression=form)
        assert refusal(lie, plan(recipe), recipe) == f"update holds numbers that are not of {form}"


def test_what_is_not_finite_is_refused_in_bfloat16_too():
    recipe = replace(OPEN, federation=replace(OPEN.federation, compression="bfloat16"))
    came = update(recipe, delta=delta(w=[[0, np.inf], [0, 0]], b=[0, 0]), compression="bfloat16")
    there = wire.decode_reply(wire.encode(came))
    assert refusal(there, plan(recipe), recipe) == "update holds NaN or infinity"


def test_order_of_names_is_no_reason():
    turned = Weights({"b": np.zeros(2, np.float32), "w": np.zeros((2, 2), np.float32)})
    assert refusal(update(OPEN, delta=turned), plan(OPEN), OPEN) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recipe_id": "f" * 64}, "update of recipe ffffffffffff"),
        ({"round": 2}, "update of round 2, expected 3"),
        ({"round": 4}, "update of round 4, expected 3"),
        ({"base": "e" * 64}, "trained from weights eeeeeeeeeeee"),
        ({"delta": delta(w=np.zeros((2, 2)))}, "names or shapes differ from the model's in 1 arrays"),
        ({"delta": delta(w=np.zeros((2, 2)), b=[0, 0], c=[0])}, "names or shapes differ from the model's in 1"),
        ({"delta": delta(w=np.zeros((2, 2)), v=[0, 0])}, "names or shapes differ from the model's in 2"),
        ({"delta": delta(w=np.zeros(4), b=[0, 0])}, "names or shapes differ from the model's in 1"),
        ({"delta": delta(w=np.zeros((1, 2)), b=[0, 0])}, "names or shapes differ from the model's in 1"),
        ({"delta": delta()}, "names or shapes differ from the model's in 2"),
        ({"delta": delta(w=[[0, np.nan], [0, 0]], b=[0, 0])}, "NaN or infinity"),
        ({"delta": delta(w=[[0, 0], [0, 0]], b=[0, -np.inf])}, "NaN or infinity"),
        # 4 * 5 ** 2 + 1 = 101
        ({"delta": delta(w=[[5, 5], [5, 5]], b=[1, 0])}, "norm 10.05 exceeds federation.max_update_norm 10"),
        ({"delta": delta(w=[[3e38] * 2] * 2, b=[0, 0])}, "norm 6e+38 exceeds"),
        ({"weight": 2.0}, "declared weight 2, expected 1"),
        ({"steps": 0}, "no training step"),
    ],
)
def test_each_wrong_content_is_refused_with_its_reason(changes, why):
    assert why in (refusal(update(OPEN, **changes), plan(OPEN), OPEN) or "")


def test_a_norm_at_the_limit_and_a_single_step_are_admitted():
    reply = update(OPEN, delta=delta(w=[[5, 5], [5, 5]], b=[0, 0]), steps=1)
    assert refusal(reply, plan(OPEN), OPEN) is None  # sqrt(100)


def test_patient_counts_as_weights_only_where_the_recipe_asks():
    assert refusal(update(COUNTED, weight=57.0), plan(COUNTED), COUNTED) is None
    assert refusal(update(OPEN, weight=57.0), plan(OPEN), OPEN) is not None


@pytest.mark.parametrize(
    ("patients", "weight", "why"),
    [
        ({"train": 57}, 58.0, "declared weight 58, but the site came with 57 training patients"),
        ({"train": 57}, 1.0, "declared weight 1, but the site came with 57 training patients"),
        ({"train": 57}, 1e9, "declared weight 1e+09, but the site came with 57 training patients"),
        # a count below the minimum cell is told as 0: such a site cannot be weighed by its patients
        ({"train": 0}, 4.0, "declared weight 4, but the site came with 0 training patients"),
        ({}, 4.0, "declared weight 4, but the site came with 0 training patients"),
        # what counts are the training patients, not those of another split
        ({"train": 57, "test": 99}, 99.0, "declared weight 99, but the site came with 57 training patients"),
    ],
)
def test_an_update_that_weighs_other_than_the_sites_own_count_is_refused(patients, weight, why):
    hello = replace(HELLO, patients=patients)
    assert refusal(update(COUNTED, weight=weight), plan(COUNTED), COUNTED, hello) == why


@pytest.mark.parametrize("work", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("spent", "why"),
    [
        (None, "has no privacy account"),
        (replace(SPENT, epsilon=8.01), "epsilon 8.01 is above the recipe's 8"),
        (replace(SPENT, delta=1e-3), "at delta 0.001, expected 1e-05"),
        (replace(SPENT, clip_norm=5), "clipped at 5"),
        (replace(SPENT, noise_multiplier=0), "noise 0, expected 0.5 and some noise"),
        (replace(SPENT, noise_multiplier=1e-300), "noise 1e-300, expected 0.5 and some noise"),
        (replace(SPENT, noise_multiplier=0.049), "noise 0.049, expected 0.5 and some noise"),
    ],
)
def test_each_wrong_privacy_account_is_refused(spent, why, work):
    arrays = {"delta": Weights({}), "steps": 0} if work == "evaluate" else {}
    got = refusal(update(PRIVATE, spent=spent, **arrays), plan(PRIVATE, work), PRIVATE)
    assert why in (got or "")


def test_an_adaptive_clip_norm_may_stand_anywhere():
    recipe = replace(PRIVATE, privacy=replace(PRIVATE.privacy, clip_quantile=0.5))
    assert refusal(update(recipe, spent=replace(SPENT, clip_norm=5)), plan(recipe), recipe) is None


def test_less_noise_than_the_recipe_fixes_is_refused():
    less = replace(SPENT, noise_multiplier=1.49)
    assert "noise 1.49, expected 0.5 and 1.5" in (refusal(update(NOISY, spent=less), plan(NOISY), NOISY) or "")
    more = replace(SPENT, noise_multiplier=1.6)
    assert refusal(update(NOISY, spent=more), plan(NOISY), NOISY) is None


def test_a_training_loss_is_refused_under_privacy_alone():
    assert "leaks" in (refusal(update(PRIVATE, train_loss=0.1), plan(PRIVATE), PRIVATE) or "")
    assert refusal(update(OPEN, train_loss=0.1), plan(OPEN), OPEN) is None


def test_an_evaluation_brings_scores_and_no_arrays():
    scored = {"steps": 0, "test": Scores(patients=9, values={"auroc": 0.7})}
    asked = plan(OPEN, "evaluate")
    assert refusal(update(OPEN, delta=Weights({}), **scored), asked, OPEN) is None
    assert "came with 2 arrays" in (refusal(update(OPEN, **scored), asked, OPEN) or "")


def test_silence_and_refusal_keep_their_own_words():
    asked = plan(OPEN)
    assert refusal(Failure(site="north", round=3, why="no reply within 5 s"), asked, OPEN) == "no reply within 5 s"
    said = Refusal(site="north", recipe_id=OPEN.id, round=3, code="budget", why="epsilon would pass the cap")
    assert refusal(said, asked, OPEN) == "site refused (budget): epsilon would pass the cap"
