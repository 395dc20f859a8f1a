"""Noised scores: what one patient can change, what is released, and how good it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm
from sklearn.metrics import roc_auc_score

from client.dp import keystream_noise, seeded_noise
from client.noised_scores import BINS, EDGES, _redrawn, histogram, noised, scores
from common.accounting import Event, epsilon_pld
from common.config import Task

BINARY = Task()
THREE = Task(kind="multiclass", classes=("a", "b", "c"))
MANY = Task(kind="multilabel", classes=("a", "b", "c", "d"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([BINARY, THREE, MANY]), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_one_patient_changes_one_cell_by_one_for_each_class(task: Task, samples: int, seed: int) -> None:
    """The sensitivity in L2 is sqrt(K), with any number of images a patient, and even where a model gives NaN."""
    rng = np.random.default_rng(seed)
    p_NC = rng.uniform(size=(samples, task.outputs))
    p_NC[rng.random(p_NC.shape) < 0.1] = rng.choice([0.0, 1.0, np.nan])
    shape = (samples, task.outputs) if task.kind == "multilabel" else (samples,)
    targets = rng.integers(0, 2 if task.kind == "multilabel" else task.outputs, shape)
    patient_N = rng.integers(0, 6, samples)
    whole = histogram(targets, p_NC, patient_N, task)
    K = 1 if task.kind == "binary" else task.outputs
    assert whole.shape == (K, 2, BINS)
    assert whole.sum() == K * len(np.unique(patient_N))
    for patient in np.unique(patient_N):
        rest = patient_N != patient
        difference = whole - histogram(targets[rest], p_NC[rest], patient_N[rest], task)
        assert np.linalg.norm(difference) == pytest.approx(math.sqrt(K))
        assert (difference.sum(axis=(1, 2)) == 1).all()


@pytest.mark.parametrize("task", [BINARY, THREE])
def test_the_noise_has_the_deviation_that_is_paid_for(task: Task) -> None:
    K = 1 if task.kind == "binary" else task.outputs
    found = np.concatenate([noised(np.zeros((K, 2, BINS)), 3.0, keystream_noise()).ravel() for _ in range(100)])
    scale = 3.0 * math.sqrt(K)
    assert np.array_equal(found, np.round(found))
    # Uniform jitter undoes the rounding closely enough at this scale.
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, len(found))
    assert kstest(found + jitter, norm(scale=math.hypot(scale, math.sqrt(1 / 6))).cdf).pvalue > 1e-3


def test_without_noise_the_scores_are_those_of_scikit_learn_on_the_bins() -> None:
    rng = np.random.default_rng(0)
    target_N = rng.integers(0, 2, 400)
    p_N = 1 / (1 + np.exp(-rng.normal(1.5 * target_N - 0.7, 1.0)))
    counts = histogram(target_N, np.stack([1 - p_N, p_N], 1), np.arange(400), BINARY)
    made = scores(counts, 1e-9, BINARY, min_cell=5, confidence=0.95, seed=0)
    binned_N = np.searchsorted(EDGES, p_N, side="right")
    assert made.patients == 400
    assert made.values["auroc"] == pytest.approx(roc_auc_score(target_N, binned_N))
    assert made.values["auroc"] == pytest.approx(roc_auc_score(target_N, p_N), abs=0.03)
    assert made.values["recall"] == pytest.approx(np.mean(p_N[target_N == 1] >= 0.5))
    assert made.values["specificity"] == pytest.approx(np.mean(p_N[target_N == 0] < 0.5))
    assert made.values["accuracy"] == pytest.approx(np.mean((p_N >= 0.5) == target_N))


@pytest.mark.parametrize(("patients", "off_by"), [(100, 0.2), (400, 0.06), (2000, 0.03)])
def test_auroc_at_epsilon_one_is_as_good_as_the_page_says(patients: int, off_by: float) -> None:
    """Noise 5.3: epsilon 1 at delta 1e-5 for two histograms. Root mean square error over 200 drawings of the noise."""
    assert epsilon_pld([Event(noise_multiplier=5.3, sampling_rate=1.0, steps=2)], 1e-5) <= 1.0
    rng, noise = np.random.default_rng(1), seeded_noise(1)
    target_N = (np.arange(patients) % 3 == 0).astype(int)
    p_N = 1 / (1 + np.exp(-rng.normal(2 * target_N - 1, 1.0)))
    counts = histogram(target_N, np.stack([1 - p_N, p_N], 1), np.arange(patients), BINARY)
    exact = roc_auc_score(target_N, p_N)
    errors, inside = [], 0
    for trial in range(200):
        made = scores(noised(counts, 5.3, noise), 5.3, BINARY, min_cell=5, confidence=0.95, seed=trial)
        if "auroc" in made.values:
            errors.append(made.values["auroc"] - exact)
            inside += made.values["auroc_low"] <= exact <= made.values["auroc_high"]
    assert len(errors) > 180
    assert np.sqrt(np.mean(np.square(errors))) < off_by
    assert abs(np.mean(errors)) < off_by / 2
    assert inside / len(errors) > 0.8  # binning costs .01, which the interval does not hold


def test_the_interval_is_that_of_the_level_asked_for() -> None:
    cells = np.array([[[40.0, 60, 50, 30, 10, 5, 3, 2], [2, 3, 5, 10, 20, 30, 40, 30]]])
    drawn = _redrawn(cells, 5.3, np.random.default_rng(0))
    for confidence, ends in ((0.8, (0.1, 0.9)), (0.95, (0.025, 0.975)), (0.99, (0.005, 0.995))):
        values = scores(cells, 5.3, BINARY, min_cell=5, confidence=confidence, seed=0).values
        assert (values["auroc_low"], values["auroc_high"]) == pytest.approx(tuple(np.quantile(drawn, ends)))


def test_the_interval_of_several_classes_has_the_noise_of_all_of_them() -> None:
    cell = np.array([[40.0, 60, 50, 30, 10, 5, 3, 2], [2, 3, 5, 10, 20, 30, 40, 30]])
    cells = np.stack([cell, cell, cell])
    drawn = _redrawn(cells, 5.3 * math.sqrt(3), np.random.default_rng(0))
    values = scores(cells, 5.3, THREE, min_cell=5, confidence=0.8, seed=0).values
    assert (values["auroc_low"], values["auroc_high"]) == pytest.approx(tuple(np.quantile(drawn, (0.1, 0.9))))


def test_the_interval_counts_that_other_patients_would_have_come() -> None:
    """In two bins AUROC is 1/2 + (a - b) / 2 for shares a and b of 50 patients each: deviation sqrt(2 / 200) / 2."""
    cells = np.zeros((1, 2, BINS))
    cells[0, :, 3:5] = 25
    assert _redrawn(cells, 0.0, np.random.default_rng(0)).std() == pytest.approx(0.05, rel=0.1)


def told(*classes: tuple[int, int, int, int]) -> np.ndarray:
    """For each class: patients of it, and not of it, below and above one half; in the outermost bins."""
    cells = np.zeros((len(classes), 2, BINS))
    for k, (of_below, of_above, without_below, without_above) in enumerate(classes):
        cells[k, 1, [0, -1]], cells[k, 0, [0, -1]] = (of_below, of_above), (without_below, without_above)
    return cells


def test_several_classes_are_one_group_of_patients_and_their_means() -> None:
    first, second = (2, 6, 12, 8), (5, 5, 18, 0)
    # AUROC: pairs in the right order, equal ones by half: (6 * 12 + (2 * 12 + 6 * 8) / 2) / (8 * 20), and so on.
    auroc = np.mean([(72 + 36) / 160, (90 + 45) / 180])
    made = scores(told(first, second, first), 1e-9, THREE, min_cell=5, confidence=0.95, seed=0)
    assert made.patients == 28
    assert set(made.values) == {"auroc", "auroc_low", "auroc_high"}  # one half means nothing among three classes
    assert made.values["auroc"] == pytest.approx((2 * 0.675 + 0.75) / 3)
    made = scores(told(first, second, first, second), 1e-9, MANY, min_cell=5, confidence=0.95, seed=0)
    assert made.patients == 28
    assert set(made.values) == {"auroc", "auroc_low", "auroc_high", "recall", "specificity", "balanced_accuracy"}
    assert made.values["auroc"] == pytest.approx(auroc)
    assert made.values["recall"] == pytest.approx((0.75 + 0.5) / 2)
    assert made.values["specificity"] == pytest.approx((0.6 + 1.0) / 2)
    assert made.values["balanced_accuracy"] == pytest.approx((0.625 + 0.8) / 2)


@pytest.mark.parametrize(("min_cell", "auroc"), [(4, (0.75 + 56 / 96 + 0.75) / 3), (5, 0.75), (10, 0.75)])
def test_a_class_with_fewer_patients_than_allowed_is_left_out(min_cell: int, auroc: float) -> None:
    few, many = (0, 4, 4, 20), (5, 5, 18, 0)  # AUROC (4 * 4 + 4 * 20 / 2) / (4 * 24) and .75
    made = scores(told(many, few, many), 1e-9, THREE, min_cell=min_cell, confidence=0.95, seed=0)
    assert made.values["auroc"] == pytest.approx(auroc)


@pytest.mark.parametrize(("min_cell", "patients"), [(27, 28), (28, 28), (29, 0)])
def test_the_number_of_patients_is_told_from_the_smallest_cell_on(min_cell: int, patients: int) -> None:
    made = scores(told((2, 6, 12, 8)), 1e-9, BINARY, min_cell=min_cell, confidence=0.95, seed=0)
    assert (made.patients, dict(made.values)) == (patients, {})


def test_too_few_patients_as_noised_say_nothing() -> None:
    assert dict(scores(np.zeros((1, 2, BINS)), 1.0, BINARY, min_cell=5, confidence=0.95, seed=0).values) == {}
    few = np.zeros((1, 2, BINS))
    few[0, 0, :6] = 5.0  # thirty without, none with
    made = scores(few, 1.0, BINARY, min_cell=5, confidence=0.95, seed=0)
    assert (made.patients, dict(made.values)) == (30, {})
    assert scores(few - 5, 1.0, BINARY, min_cell=5, confidence=0.95, seed=0).patients == 0


def test_empty_splits_are_noised_like_any_other() -> None:
    empty = histogram(np.zeros(0, np.int64), np.zeros((0, 2)), np.zeros(0, np.int64), BINARY)
    assert empty.shape == (1, 2, BINS)
    assert noised(empty, 5.0, seeded_noise(0)).any()
    assert torch.is_tensor(seeded_noise(0).normal(torch.zeros(1)))
