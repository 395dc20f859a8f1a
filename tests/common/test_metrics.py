"""Metrics against scikit-learn and against numbers that fit on the back of an envelope."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from common.config import Evaluation, Task
from common.errors import DataError, FedicomError
from common.metrics import SCALARS, by_subgroup, probabilities, score

BINARY = Task()
THREE = Task(kind="multiclass", classes=("a", "b", "c"))
LABELS = Task(kind="multilabel", classes=("a", "b", "c"))
QUICK = Evaluation(bootstraps=100, min_cell=1)


def two(positive_N) -> np.ndarray:
    positive = np.asarray(positive_N, dtype=np.float64)
    return np.stack([1 - positive, positive], axis=1)


def binary_sample(seed: int, count: int, digits: int = 2):
    """Overlapping scores, many of them equal."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    y[:2] = 0, 1
    return y, np.clip(rng.normal(0.4 + 0.2 * y, 0.2), 0, 1).round(digits)


@pytest.mark.parametrize(("seed", "count", "digits"), [(0, 624, 2), (1, 20, 1), (2, 200, 16), (3, 5, 1)])
def test_binary_metrics_equal_scikit_learn(seed, count, digits):
    y, p = binary_sample(seed, count, digits)
    called = p > 0.5
    expected = {
        "auroc": sk.roc_auc_score(y, p),
        "auprc": sk.average_precision_score(y, p),
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "f1": sk.f1_score(y, called),
        "recall": sk.recall_score(y, called),
        "specificity": sk.recall_score(y, called, pos_label=0),
        "brier": sk.brier_score_loss(y, p),
    }
    found = score(y, two(p), np.arange(count), BINARY, QUICK, seed=0)
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(found.confusion, sk.confusion_matrix(y, called))
    inside = np.clip(p, 1e-9, 1 - 1e-9)
    found = score(y, two(inside), np.arange(count), BINARY, QUICK, seed=0)
    assert found.values["loss"] == pytest.approx(sk.log_loss(y, inside), rel=1e-6)


def test_multiclass_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    p = rng.dirichlet(np.ones(3), 300) * 0.6 + 0.4 * np.eye(3)[y] * rng.random((300, 1))
    p /= p.sum(1, keepdims=True)
    called = p.argmax(1)
    expected = {
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "auprc": sk.average_precision_score(np.eye(3)[y], p, average="macro"),
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "f1": sk.f1_score(y, called, average="macro"),
        "recall": sk.recall_score(y, called, average="macro"),
        "brier": sk.brier_score_loss(y, p, scale_by_half=True),
        "loss": sk.log_loss(y, p),
    }
    found = score(y, p, np.arange(300), THREE, QUICK, seed=0)
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert np.array_equal(found.confusion, sk.confusion_matrix(y, called))
    assert set(found.roc) == {"a", "b", "c"}


def test_multilabel_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 3)) < (0.2, 0.5, 0.7)).astype(np.float32)
    p = np.clip(rng.normal(0.35 + 0.3 * y, 0.25), 0.001, 0.999)
    called = p > 0.5
    expected = {
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "auprc": sk.average_precision_score(y, p, average="macro"),
        "accuracy": (y == called).mean(),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(y[:, k], called[:, k]) for k in range(3)]),
        "f1": sk.f1_score(y, called, average="macro"),
        "recall": sk.recall_score(y, called, average="macro"),
        "brier": np.mean([sk.brier_score_loss(y[:, k], p[:, k]) for k in range(3)]),
        "loss": np.mean([sk.log_loss(y[:, k], p[:, k]) for k in range(3)]),
    }
    found = score(y, p, np.arange(200), LABELS, QUICK, seed=0)
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert found.confusion == ()


def test_intervals_equal_those_of_a_plain_loop_over_scikit_learn():
    y, p = binary_sample(4, 60)
    patient = np.arange(60) // 2  # two images a patient
    evaluation = Evaluation(bootstraps=200, confidence=0.9, min_cell=1)
    found = score(y, two(p), patient + 1000, BINARY, evaluation, seed=5).values
    drawn = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=200)
    loop = {"auroc": [], "auprc": [], "brier": [], "f1": []}
    for counts in drawn:
        rows = np.repeat(np.arange(60), counts[patient])
        loop["auroc"].append(sk.roc_auc_score(y[rows], p[rows]))
        loop["auprc"].append(sk.average_precision_score(y[rows], p[rows]))
        loop["brier"].append(sk.brier_score_loss(y[rows], p[rows]))
        loop["f1"].append(sk.f1_score(y[rows], p[rows] > 0.5))
    for name, values in loop.items():
        low, high = np.quantile(values, (0.05, 0.95))
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx((low, high), abs=1e-12)


def test_the_interval_of_an_accuracy_is_that_of_a_binomial():
    # 80 of 100 right: standard error sqrt(.8 * .2 / 100) = .04, so 95 % lie within .8 +- 1.96 * .04 = .722 to .878
    y = np.ones(100, dtype=int)
    p = np.where(np.arange(100) < 80, 0.9, 0.1)
    found = score(y, two(p), np.arange(100), BINARY, Evaluation(bootstraps=4000), seed=0).values
    assert found["accuracy"] == 0.8
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.722, 0.878), abs=0.012)


def test_images_of_one_patient_do_not_narrow_the_interval():
    y, p = binary_sample(6, 100)
    once = score(y, two(p), np.arange(100), BINARY, QUICK, seed=0)
    copied = score(np.repeat(y, 9), two(np.repeat(p, 9)), np.repeat(np.arange(100), 9), BINARY, QUICK, seed=0)
    assert copied.patients == once.patients == 100
    # Nine copies of every image say what one does; taken for 900 patients, the interval would be a third as wide.
    for name in ("auroc", "auroc_low", "auroc_high", "brier_low", "f1_high"):
        assert copied.values[name] == pytest.approx(once.values[name], abs=1e-12)


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    # Scores N(1, 1) against N(0, 1): the true AUROC is Phi(1 / sqrt 2) = .7602
    hits, rng = 0, np.random.default_rng(0)
    for seed in range(200):
        y = np.arange(80) % 2
        p = 1 / (1 + np.exp(-rng.normal(y, 1)))
        found = score(y, two(p), np.arange(80), BINARY, Evaluation(bootstraps=200, confidence=0.9), seed=seed).values
        hits += found["auroc_low"] <= 0.7602 <= found["auroc_high"]
    assert 0.82 <= hits / 200 <= 0.96  # 90 % +- 3 standard errors of 2.1 %, less the bootstrap's small-sample loss


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    y, p = binary_sample(0, 50)
    first, again, other = (score(y, two(p), np.arange(50), BINARY, QUICK, seed=seed).values for seed in (1, 1, 2))
    assert first == again
    assert first["auroc_low"] != other["auroc_low"]
    assert first["auroc"] == other["auroc"]


def test_one_class_alone_has_no_auroc_but_an_accuracy():
    found = score(np.zeros(10, int), two([0.1] * 8 + [0.9] * 2), np.arange(10), BINARY, QUICK, seed=0)
    assert {"auroc", "auprc", "recall", "sensitivity_at_specificity", "auroc_low"}.isdisjoint(found.values)
    assert found.values["accuracy"] == found.values["specificity"] == found.values["balanced_accuracy"] == 0.8
    assert {"ece", "brier", "loss"} <= set(found.values)
    assert all(math.isfinite(value) for value in found.values.values())
    assert (found.roc, found.threshold, found.operating_point) == ({}, None, None)


def test_the_ill_alone_have_a_recall_and_no_specificity():
    found = score(np.ones(10, int), two([0.1] * 3 + [0.9] * 7), np.arange(10), BINARY, QUICK, seed=0)
    assert {"auroc", "auprc", "specificity", "sensitivity_at_specificity"}.isdisjoint(found.values)
    assert found.values["recall"] == found.values["balanced_accuracy"] == 0.7


def test_labels_of_one_image_each_count_by_hand():
    # Finding b is in nobody: a half is not called, a certain error is, and costs 100 as in the other tasks.
    y, p = np.array([[1, 0], [0, 0]]), np.array([[0.9, 0.5], [0.1, 1.0]])
    task = Task(kind="multilabel", classes=("a", "b"))
    found = score(y, p, np.arange(2), task, QUICK, seed=0)
    expected = {
        "accuracy": (1 + 1 / 2) / 2,
        "f1": (1 + 0) / 2,
        "auroc": 1.0,  # of a alone
        "brier": ((0.01 + 0.25) / 2 + (0.01 + 1) / 2) / 2,
        "loss": ((-math.log(0.9) - math.log(0.5)) / 2 + (-math.log(0.9) + 100) / 2) / 2,
        "ece": ((0.1 + 0.1) / 2 + (0.5 + 1.0) / 2) / 2,
    }
    assert {name: found.values[name] for name in expected} == pytest.approx(expected)
    filled = {at: one for at, one in enumerate(found.bins) if one[2]}
    assert filled == {1: (0.1, 0, 1), 7: (0.5, 0, 1), 13: (0.9, 1, 1), 14: (1.0, 0, 1)}
    assert list(found.roc) == ["a"]


def test_an_absent_class_is_left_out_of_the_macro_mean():
    y = np.array([0, 0, 1, 1, 0, 1])
    p = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    found = score(y, p, np.arange(6), THREE, QUICK, seed=0)
    # One against the rest: class a ranks .8 .7 .6 above .5 .2 .1; class b ranks .8 .7 .4 above .3 .2 .1.
    assert found.values["auroc"] == 1.0
    assert found.values["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    # a: 3 right, 1 more called; b: 2 right, 1 missed; c: none there, none called
    assert found.values["f1"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert set(found.roc) == {"a", "b"}


def test_fewer_patients_than_the_smallest_cell_show_nothing():
    y, p = binary_sample(0, 40)
    four = np.arange(40) % 4  # forty images, four patients
    found = score(y, two(p), four, BINARY, Evaluation(min_cell=5), seed=0)
    assert found.suppressed
    assert (found.patients, dict(found.values), found.confusion, found.bins, found.threshold) == (0, {}, (), (), None)
    assert not score(y, two(p), np.arange(40) % 5, BINARY, Evaluation(min_cell=5), seed=0).suppressed
    assert score(y[:0], two(p)[:0], four[:0], BINARY, QUICK, seed=0).suppressed


def test_subgroups_are_scored_alone_and_the_small_one_is_suppressed():
    y, p = binary_sample(0, 60)
    column = ["F"] * 30 + ["M"] * 27 + ["?"] * 3
    found = by_subgroup(y, two(p), np.arange(60), column, BINARY, Evaluation(min_cell=5, bootstraps=100), seed=0)
    assert list(found) == ["?", "F", "M"]
    assert found["?"].suppressed
    assert found["M"].patients == 27
    assert found["F"].values["auroc"] == pytest.approx(sk.roc_auc_score(y[:30], p[:30]))
    with pytest.raises(DataError, match="2 values for 60 samples"):
        by_subgroup(y, two(p), np.arange(60), ["F", "M"], BINARY, QUICK, seed=0)


def test_calibration_error_by_hand():
    # Bin 13 of 15 holds three predictions of .9, of which two came true; bin 1 holds a .1 that did not.
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.9, 0.9, 0.1])
    found = score(y, two(p), np.arange(4), BINARY, QUICK, seed=0)
    assert found.values["ece"] == pytest.approx((0.9 - 2 / 3) * 3 / 4 + 0.1 / 4)
    filled = {at: found.bins[at] for at in range(15) if found.bins[at][2]}
    assert filled == {1: pytest.approx((0.1, 0.0, 1)), 13: pytest.approx((0.9, 2 / 3, 3))}
    assert len(found.bins) == 15
    # Resampled, every chance gap counts as an error: such an interval would lie above the estimate.
    assert {"ece_low", "ece_high"}.isdisjoint(found.values)
    # Multi-class: the most probable class, .6 and .8, of which the second is wrong.
    p = np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    found = score(np.array([0, 1]), p, np.arange(2), THREE, QUICK, seed=0)
    assert found.values["ece"] == pytest.approx((0.4 + 0.8) / 2)


def test_a_certain_error_costs_a_hundred_and_not_infinity():
    found = score(np.array([0, 1]), two([1.0, 1.0]), np.arange(2), BINARY, QUICK, seed=0)
    assert found.values["loss"] == pytest.approx(50)  # 100 and 0


def test_the_operating_point_is_the_lowest_threshold_at_the_wanted_specificity():
    # 20 healthy at .01 to .20, but one at .60; at 95 % one of the 20 may be called positive.
    healthy = [*np.arange(1, 20) / 100, 0.60]
    ill = [0.15, 0.50, 0.70, 0.90]
    y, p = np.array([0] * 20 + [1] * 4), np.array([*healthy, *ill])
    found = score(y, two(p), np.arange(24), BINARY, QUICK, seed=0)
    assert found.values["sensitivity_at_specificity"] == 0.75
    assert found.threshold == pytest.approx((0.50 + 0.19) / 2)  # halfway to the next lower score
    assert found.operating_point == pytest.approx((1 / 20, 3 / 4))
    assert ((p >= found.threshold) & (y == 1)).sum() == 3
    # No threshold reaches 97 % with true positives other than those above .60.
    strict = score(y, two(p), np.arange(24), BINARY, Evaluation(specificity=0.97, min_cell=1, bootstraps=100), seed=0)
    assert strict.values["sensitivity_at_specificity"] == 0.5
    assert strict.threshold == pytest.approx((0.70 + 0.60) / 2)


def test_no_threshold_is_given_where_the_specificity_cannot_be_reached():
    found = score(np.array([0, 1, 0, 1]), two([0.5] * 4), np.arange(4), BINARY, QUICK, seed=0)
    assert found.values["auroc"] == 0.5
    assert found.values["sensitivity_at_specificity"] == 0
    assert (found.threshold, found.operating_point) == (None, None)


@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.9, 0.95])
def test_sensitivity_at_a_specificity_is_the_best_point_of_scikit_learns_curve(specificity):
    y, p = binary_sample(8, 300)
    x, recall, _ = sk.roc_curve(y, p, drop_intermediate=False)
    evaluation = Evaluation(specificity=specificity, bootstraps=100)
    found = score(y, two(p), np.arange(300), BINARY, evaluation, seed=0).values
    assert found["sensitivity_at_specificity"] == pytest.approx(recall[x <= 1 - specificity + 1e-9].max())


def test_the_roc_curve_is_scikit_learns_thinned_to_two_hundred_points():
    y, p = binary_sample(7, 2000, 16)
    x, recall, _ = sk.roc_curve(y, p, drop_intermediate=False)
    found = score(y, two(p), np.arange(2000), BINARY, QUICK, seed=0).roc
    assert list(found) == ["positive"]
    points = found["positive"]
    assert (points[0], points[-1], len(points)) == ((0, 0), (1, 1), 200)
    curve = {(round(a, 9), round(b, 9)) for a, b in zip(x, recall, strict=True)}
    assert {(round(a, 9), round(b, 9)) for a, b in points} <= curve


def test_every_value_has_a_known_name_and_stays_on_its_scale():
    for seed in range(20):
        y, p = binary_sample(seed, 12, 1)
        for name, value in score(y, two(p), np.arange(12), BINARY, QUICK, seed=seed).values.items():
            assert name.removesuffix("_low").removesuffix("_high") in SCALARS
            assert 0 <= value <= (100 if name.startswith("loss") else 1), name


def test_what_does_not_fit_together_is_refused():
    y, p = binary_sample(0, 10)
    patients = np.arange(10)
    with pytest.raises(DataError, match=r"probabilities \(10, 2\), targets \(9,\)"):
        score(y[:9], two(p), patients, BINARY, QUICK, seed=0)
    with pytest.raises(DataError, match="got logits"):
        score(y, two(p) * 5, patients, BINARY, QUICK, seed=0)
    with pytest.raises(DataError, match="got logits"):
        score(y, two(p) - 0.1, patients, BINARY, QUICK, seed=0)
    with pytest.raises(DataError, match="other than 0 to 1"):
        score(y + 1, two(p), patients, BINARY, QUICK, seed=0)
    with pytest.raises(DataError, match="other than 0 to 1"):
        score(np.full((10, 3), 2), np.full((10, 3), 0.5), patients, LABELS, QUICK, seed=0)
    with pytest.raises(FedicomError, match="diverged"):
        score(y, two(np.where(p > 0.5, np.nan, p)), patients, BINARY, QUICK, seed=0)


def test_probabilities_are_softmax_or_sigmoids():
    z = np.array([[0.0, math.log(3)], [1000.0, -1000.0]], dtype=np.float32)
    assert probabilities(z, "binary") == pytest.approx(np.array([[0.25, 0.75], [1, 0]]))
    assert probabilities(z, "multilabel") == pytest.approx(np.array([[0.5, 0.75], [1, 0]]))
    assert probabilities(z, "multiclass").dtype == np.float32


def test_one_patient_has_no_interval_and_nor_has_a_class_with_one_patient():
    def ends(y, patients):
        p = np.linspace(0.1, 0.9, len(y))
        evaluation = Evaluation(min_cell=1, bootstraps=100)
        found = score(np.array(y), two(p), np.array(patients), BINARY, evaluation, seed=0).values
        assert "auroc" in found, "the result itself stays"
        return {name.removesuffix("_low") for name in found if name.endswith("_low")}

    assert ends([0, 1, 1], [7, 7, 7]) == set()
    assert ends([0, 0, 0, 1, 1], [1, 2, 3, 4, 4]) == {"accuracy", "brier", "loss"}
    assert ends([1, 1, 1, 0, 0], [1, 2, 3, 4, 4]) == {"accuracy", "brier", "loss"}
    assert ends([0, 0, 0, 1, 1], [1, 2, 3, 4, 5]) == set(SCALARS) - {"ece"}
