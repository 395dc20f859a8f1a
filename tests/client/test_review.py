"""What a recipe would do here, in words: every number is counted or computed from this site's own, and adds up."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from client import review as module
from client.cohort import Cohort
from client.ledger import Ledger
from client.policy import ledger_policy, score_event
from client.review import Review, review, right_guesses
from common.accounting import Event, epsilon_pld
from common.compression import nbytes
from common.config import Evaluation, Federation, Preprocessing, Privacy, Recipe, Task
from common.deployment import Policy, SiteConfig
from common.epsilon import rounded_down, rounded_up
from common.errors import PrivacyError
from common.identity import Signer
from common.models import build, get_weights
from common.samples import Samples
from common.signed import sign_recipe
from tests.client.conftest import PLAIN, recipe_of

NOISY = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5)


def cohort_of(train: int = 40, validation: int = 8, test: int = 3, refused: dict[str, int] | None = None) -> Cohort:
    """Every patient has two images; every second patient a nodule."""
    patients = train + validation + test
    patient_N = np.repeat(np.arange(patients), 2)
    x_N = np.zeros((2 * patients, 1, 16, 16), np.float32)
    names = tuple(f"SECRET-{n}" for n in range(patients))
    samples = Samples(x_N, (patient_N % 2).astype(np.int64), patient_N, names, {}, "")
    split = np.repeat(["train", "validation", "test"], [train, validation, test])
    return Cohort(samples, split, "a" * 64, refused or {})


def reviewed(recipe: Recipe, cohort: Cohort | None = None, *, ledger: Ledger | None = None, **policy: Any) -> Review:
    rules = Policy(**({"min_patients": 10} | policy))
    config = SiteConfig(site="north", federation="trial", gateway="gateway.example.org:8443", policy=rules)
    return review(sign_recipe(recipe, Signer.temporary()), config, cohort, ledger)


def lines_of(found: Review) -> list[str]:
    return [line for section in found.sections for line in (section.title, *section.lines, "")]


def text(found: Review) -> str:
    return "\n".join(lines_of(found))


def ledger_of(folder: Path, policy: Policy) -> Ledger:
    return Ledger(folder / "ledger.jsonl", "north", ledger_policy(policy))


def test_it_says_task_network_rounds_and_hash_in_words() -> None:
    recipe = recipe_of(rounds=7, data=Preprocessing(size=(16, 16), modalities=("CR", "DX")))
    said = text(reviewed(recipe))
    for words in (
        "tell 'nodule' from 'no nodule', from images (CR, DX), each brought to 16 x 16 pixels",
        "monai/resnet10",
        "7 rounds. In each, this site goes through its training patients once, 12 patients a step.",
        recipe.id,
        "the recipe brings no code",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Task(kind="multiclass", classes=("a", "b", "c")), "tell apart 'a', 'b', 'c'"),
        (Task(kind="multilabel", classes=("a", "b")), "say of each of 'a', 'b' whether it is there"),
    ],
)
def test_every_kind_of_task_has_its_sentence(task: Task, words: str) -> None:
    assert words in text(reviewed(recipe_of(task=task)))


def test_patients_and_images_are_counted_by_split_and_class_and_unused_files_by_reason() -> None:
    found = reviewed(recipe_of(), cohort_of(refused={"no_label": 2, "encrypted": 1}))
    even = {"no nodule": 20, "nodule": 20}
    assert found.plain["patients"]["train"] == {"patients": 40, "samples": 80, "classes": even}
    assert found.plain["patients"]["test"] == {"patients": 3, "samples": 6, "classes": {"no nodule": 2, "nodule": 1}}
    assert found.plain["refused_files"] == {"no_label": 2, "encrypted": 1}
    said = text(found)
    assert "40 patients with 80 images to train on (patients: no nodule 20, nodule 20)" in said
    assert "3 files of the folder not used: encrypted 1, no_label 2" in said
    assert "SECRET" not in said + json.dumps(found.plain)


@pytest.mark.parametrize("error", [OverflowError, MemoryError])
def test_a_cost_that_nobody_can_compute_speaks_against_the_recipe(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "accounts", fail)  # as at noise .3 and 10,000 rounds: 63 GiB
    found = reviewed(recipe_of(privacy=Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5)), cohort_of())
    assert [why for why in found.objections if "what it costs cannot be computed here" in why]
    assert "it could not be computed" in text(found)


def test_no_word_of_a_recipe_moves_the_cursor_of_who_reviews_it() -> None:
    evil = "x\x1b[2J\x9b31m\u202e\n"  # clears the screen, turns red, turns the line around
    recipe = Recipe(
        name="tiny",
        description=evil,
        task=Task(classes=("clear", "ill\x9b2J"), subgroups=(evil,)),
        data=Preprocessing(modalities=(evil,)),
        model=replace(recipe_of().model, name=evil),
    )
    found = reviewed(recipe, models=("monai/resnet10",), modalities=("MR",))
    assert len([line for line in lines_of(found) if line.startswith("NO: ")]) >= 3
    assert all(line.isprintable() for line in lines_of(found))


def test_the_bytes_are_those_of_the_networks_exchanged_weights() -> None:
    recipe = recipe_of(rounds=5)
    size = get_weights(build(recipe)).nbytes
    leaves = reviewed(recipe).plain["leaves"]
    assert (leaves["numbers"], leaves["update_bytes"], leaves["all_updates_bytes"]) == (size // 4, size, 5 * size)


def test_a_compressed_recipe_says_so_and_counts_the_bytes_that_travel() -> None:
    recipe = recipe_of(federation=Federation(compression="int8"))
    found, weights = reviewed(recipe), get_weights(build(recipe))
    assert found.plain["leaves"]["compression"] == "int8"
    assert found.plain["leaves"]["update_bytes"] == nbytes(weights.shapes, "int8") < weights.nbytes / 3.5
    assert "rounded to int8; what that leaves out stays here" in text(found)


@pytest.mark.parametrize(
    ("policy", "recipe", "expected"),
    [
        ({}, recipe_of(), {"validation": True, "test": False}),  # three test patients are below five
        ({"metrics": "none"}, recipe_of(), {"validation": False, "test": False}),
        ({"min_cell": 3}, recipe_of(evaluation=Evaluation(min_cell=3)), {"validation": True, "test": True}),
        ({"min_cell": 3}, recipe_of(), {"validation": True, "test": False}),  # the recipe's own cell is larger
        ({"min_cell": 9}, recipe_of(), {"validation": False, "test": False}),
        ({}, recipe_of(evaluation=Evaluation(validation_fraction=0)), {"validation": False, "test": False}),
    ],
)
def test_scores_leave_only_where_policy_and_cells_allow(policy: Any, recipe: Recipe, expected: Any) -> None:
    assert reviewed(recipe, cohort_of(), **policy).plain["leaves"]["scores"] == expected


def test_privacy_is_computed_for_this_sites_own_patients(tmp_path: Path) -> None:
    # 40 patients in batches of 12: rate 0.3, 4 steps a round, 12 in three rounds.
    policy = Policy(epsilon=12.0, delta=1e-6)
    ledger = ledger_of(tmp_path, policy)
    before = Event(noise_multiplier=2.0, sampling_rate=0.5, steps=10)
    ledger.reserve("f" * 64, round=1, base="e" * 64, event=before)
    recipe = recipe_of(privacy=NOISY)
    found = reviewed(recipe, cohort_of(), ledger=ledger, epsilon=12.0, delta=1e-6)
    own = Event(noise_multiplier=1.0, sampling_rate=0.3, steps=12)
    cost = found.plain["privacy"]
    assert (cost["noise_multiplier"], cost["sampling_rate"], cost["steps"]) == (1.0, 0.3, 4)
    assert cost["epsilon"] == epsilon_pld([own], 1e-5)
    assert cost["spent"] == epsilon_pld([before], 1e-6)
    assert cost["after"] == epsilon_pld([before, own], 1e-6)
    assert cost["left"] == 12.0 - cost["after"]
    assert f"epsilon {rounded_up(cost['after'])}, {rounded_down(cost['left'])} would remain" in text(found)
    assert (cost["paid_rounds"], cost["affordable_rounds"]) == (0, 3)


def test_a_recipe_over_the_cap_is_told_to_the_round_at_which_the_ledger_refuses(tmp_path: Path) -> None:
    recipe = recipe_of(privacy=NOISY, rounds=50)
    policy = Policy(epsilon=12.0, delta=1e-5)
    found = reviewed(recipe, cohort_of(), ledger=ledger_of(tmp_path, policy), epsilon=12.0)
    affordable = found.plain["privacy"]["affordable_rounds"]
    (why,) = found.objections
    assert f"refuse after {affordable} rounds of 50" in why
    ledger, event = ledger_of(tmp_path, policy), Event(noise_multiplier=1.0, sampling_rate=0.3, steps=4)
    assert affordable > 1
    for round_ in range(affordable):
        ledger.reserve(recipe.id, round=round_ + 1, base="e" * 64, event=event)
    with pytest.raises(PrivacyError, match="its cap is 12"):
        ledger.reserve(recipe.id, round=affordable + 1, base="e" * 64, event=event)


def test_rounds_that_were_paid_are_not_paid_again(tmp_path: Path) -> None:
    recipe, policy = recipe_of(privacy=NOISY), Policy(delta=1e-5)
    ledger = ledger_of(tmp_path, policy)
    new = reviewed(recipe, cohort_of(), ledger=ledger).plain["privacy"]
    event = Event(noise_multiplier=1.0, sampling_rate=0.3, steps=4)
    ledger.settle(ledger.reserve(recipe.id, round=1, base="e" * 64, event=event), 4)
    later = reviewed(recipe, cohort_of(), ledger=ledger).plain["privacy"]
    assert (later["paid_rounds"], later["after"]) == (1, new["after"])
    assert later["spent"] > 0


def test_noised_scores_are_part_of_what_a_recipe_costs_and_once_paid_not_any_more(tmp_path: Path) -> None:
    rules: dict[str, Any] = {"metrics": "noised", "scores_epsilon": 1.0, "epsilon": 12.0, "delta": 1e-5}
    recipe, policy = recipe_of(privacy=NOISY, rounds=1), Policy(**rules)
    ledger, own = ledger_of(tmp_path, policy), Event(noise_multiplier=1.0, sampling_rate=0.3, steps=4)
    new = reviewed(recipe, cohort_of(), ledger=ledger, **rules).plain["privacy"]
    assert new["after"] == epsilon_pld([own, score_event(policy)], 1e-5) > epsilon_pld([own], 1e-5)
    ledger.reserve(recipe.id, round=1, base="e" * 64, event=own)
    ledger.reserve(recipe.id, round=2, base="d" * 64, event=score_event(policy), kind="scores")
    later = reviewed(recipe, cohort_of(), ledger=ledger, **rules).plain["privacy"]
    assert later["after"] == later["spent"] == new["after"]


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"require_privacy": True}, ""),
        ({"min_noise_multiplier": 1.5}, "min_noise_multiplier"),
        ({"max_sampling_rate": 0.2}, "sampling rate"),
        ({"max_steps": 3}, "steps of one visit"),
        ({"min_patients": 41}, "min_patients"),
        ({"delta": 1e-6}, "(delta)"),
        ({"models": ("timm/resnet18",)}, "(models)"),
        ({"require_secure_aggregation": True}, "(require_secure_aggregation)"),
    ],
)
def test_what_the_policy_says_against_it_is_said(rules: dict[str, Any], named: str) -> None:
    found = reviewed(recipe_of(privacy=NOISY), cohort_of(), **rules)
    assert any(named in why for why in found.objections) == bool(named)
    assert ("NO: " in text(found)) == bool(named)
    assert ("Nothing in it speaks against" in text(found)) != bool(named)


def test_a_delta_of_one_over_the_patients_is_an_objection() -> None:
    recipe = recipe_of(privacy=replace(NOISY, delta=0.0099))
    many = reviewed(recipe, cohort_of(train=102), delta=0.0099)
    assert any("1 / (training patients" in why for why in many.objections)
    assert reviewed(recipe, cohort_of(train=100), delta=0.0099).objections == ()


def test_without_privacy_it_says_so_loudly() -> None:
    found = reviewed(recipe_of(privacy=PLAIN), cohort_of(), require_privacy=False)
    assert "WITHOUT noise" in text(found)
    assert "None is promised" in text(found)
    assert found.plain["privacy"] is None
    assert "exact number of training patients" not in text(found)
    weighted = recipe_of(privacy=PLAIN, federation=Federation(site_weights="patients"))
    assert "exact number of training patients" in text(reviewed(weighted, cohort_of(), require_privacy=False))


def test_secure_aggregation_says_who_sees_what() -> None:
    federation = Federation(sites=4, quorum=3, max_update_norm=100.0, site_weights="patients", max_patients=500)
    secure = recipe_of(privacy=Privacy(secure_aggregation=True), federation=federation)
    said = text(reviewed(secure, cohort_of(), require_privacy=False))
    assert "WITHOUT noise" in said
    assert "the coordinator reads the sum over all sites alone" in said
    assert "The coordinator is not told them" in said
    assert "exact number of training patients" not in said
    assert "mean training loss" not in said


def test_patients_that_were_not_counted_are_not_guessed() -> None:
    found = reviewed(recipe_of())
    assert (found.plain["patients"], found.plain["privacy"]) == (None, None)
    assert "Not counted" in text(found)
    assert "depends on the number of patients" in text(found)


def test_the_coordinators_words_cannot_move_the_cursor() -> None:
    task = Task(classes=("no", "yes"))
    said = text(reviewed(recipe_of(description="fine\x1b[2J\x1b]0;owned\x07 words\n" + "x" * 9000, task=task)))
    assert "\x1b" not in said
    assert "\x07" not in said
    assert len(max(said.splitlines(), key=len)) < 700
    assert "fine" in said


def test_a_network_that_cannot_be_built_here_is_an_objection() -> None:
    recipe = recipe_of()
    found = reviewed(replace(recipe, model=replace(recipe.model, name="resnet11")))
    assert any("cannot be built here" in why for why in found.objections)
    assert found.plain["leaves"]["numbers"] is None


def test_who_decides_reads_that_epsilon_covers_the_updates_and_not_the_exact_scores() -> None:
    said = text(reviewed(recipe_of(privacy=NOISY), cohort_of()))
    assert "such as AUROC: yes, exact: no noise, and no epsilon, covers them, and they tell how many" in said
    assert "sees all updates, guesses whether that patient took part" in said
    assert "all that leaves" not in said


def test_right_guesses_are_those_of_the_best_test() -> None:
    # One step with everybody and noise s: two Gaussians one apart, total variation 2 Phi(1 / 2s) - 1.
    for noise, steps in ((1.0, 1), (2.0, 4), (0.7, 1)):
        exact = NormalDist().cdf(math.sqrt(steps) / (2 * noise))
        event = Event(noise_multiplier=noise, sampling_rate=1.0, steps=steps)
        assert exact <= right_guesses(event) + 1e-9
        assert right_guesses(event) == pytest.approx(exact, abs=1e-4)
    assert right_guesses(Event(noise_multiplier=0.0, sampling_rate=0.1, steps=1)) == 1.0
    rare = right_guesses(Event(noise_multiplier=1.0, sampling_rate=0.1, steps=1))
    # A tenth of the time the patient is in: a tenth of the variation.
    assert rare == pytest.approx(0.5 + 0.1 * (NormalDist().cdf(0.5) - 0.5), abs=1e-4)


def test_reading_and_approving_need_no_torch_before_the_model_is_sized() -> None:
    code = "import client.review, client.approvals, client.cli, client.node, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
