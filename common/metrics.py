"""How good predictions are, with confidence intervals from resampled patients.

Every statistic is written once, for many weightings of the same samples at a time: the
estimate weighs each sample 1, and a bootstrap resample weighs it by how often its patient was
drawn. Samples are sorted once, so a thousand resamples cost a few cumulative sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.config import Evaluation, Task
from common.errors import DataError, DivergedError

Floats = npt.NDArray[np.float64]
Truths = npt.NDArray[np.bool_]

SCALARS = (
    "auroc",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "recall",
    "specificity",
    "sensitivity_at_specificity",
    "ece",
    "brier",
    "loss",
)
"""Names in `Metrics.values`; all lie in [0, 1] but `loss`, which ends at 100."""

BINS = 15
MAX_LOSS = 100.0
_ROC_POINTS = 200
_OF_ALL = frozenset({"accuracy", "brier", "loss"})
"""Means over the samples, whatever their class."""
_CHUNK = 2_000_000  # samples x resamples held at once: 16 MB an array


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Results on one set of samples.

    Nothing but `suppressed` is given when there are fewer patients than `evaluation.min_cell`.
    A value that is not defined, such as AUROC where one class is absent, is not in `values`.
    """

    patients: int = 0
    suppressed: bool = False
    values: Mapping[str, float] = field(default_factory=dict)
    """`SCALARS`, and for each but `ece` `<name>_low` and `<name>_high`, the ends of its confidence interval. One
    patient has none, and where a class has one patient only, nothing has that is measured by class."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Samples: row the true class, column the most probable one; empty for multi-label tasks."""
    roc: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Class to at most 200 points (false positive rate, true positive rate), from (0, 0) to (1, 1).

    Binary tasks: of the positive class alone. A class without both kinds of samples is absent.
    """
    bins: tuple[tuple[float, float, int], ...] = ()
    """Reliability: (mean prediction, observed frequency, samples) in 15 equal steps of [0, 1]; empty: (centre, 0, 0).

    Binary and multi-label: of the positive probability; multi-class: of the most probable class.
    """
    threshold: float | None = None
    """Binary tasks: positive at or above it. Reaches `evaluation.specificity` on these samples; None if none does."""
    operating_point: tuple[float, float] | None = None
    """(False positive rate, true positive rate) at `threshold`."""


def score(
    targets: npt.NDArray[np.generic],
    probabilities_NC: npt.NDArray[np.floating],
    patient_N: npt.NDArray[np.integer],
    task: Task,
    evaluation: Evaluation,
    *,
    seed: int,
) -> Metrics:
    """All metrics with percentile intervals from `evaluation.bootstraps` resamples of patients.

    A drawn patient brings all of their samples. `auroc`, `auprc`, `f1`, `recall`, `specificity` and
    `sensitivity_at_specificity` are those of the positive class, and means over one class against
    the rest for multi-class and multi-label tasks, over the classes for which they are defined. Decisions
    take the most probable class, for multi-label above one half. `accuracy` of multi-label tasks is the
    mean over classes. `brier` of multi-class tasks is half the sum over classes, so that it ends at 1.

    Args:
        targets: Class numbers (N,), for multi-label tasks 0 or 1 in (N, classes).
        probabilities_NC: (N, classes), as `probabilities` gives them.
        patient_N: Which samples belong together; any integers.
        task: Its kind and classes.
        evaluation: Resamples, confidence, specificity and the smallest cell.
        seed: Of the resamples; equal seeds give equal intervals.

    Returns:
        Suppressed metrics for fewer patients than `evaluation.min_cell`.

    Raises:
        DataError: Targets, probabilities and patients do not fit together or the task.
        DivergedError: A probability is not finite.

    Source: AUROC and average precision as in scikit-learn; ECE of Guo et al. 2017; patient (cluster)
    bootstrap of Field and Welsh 2007.
    """
    p_NC = np.asarray(probabilities_NC, dtype=np.float64)
    _check(targets, p_NC, patient_N, task)
    unique, member_N = np.unique(patient_N, return_inverse=True)
    patients = len(unique)
    if patients < max(1, evaluation.min_cell):
        return Metrics(suppressed=True)
    samples = _Samples.of(targets, p_NC, task, evaluation.specificity)
    estimate = samples.statistics(np.ones((1, len(p_NC))))
    resampled = _resample(samples, member_N, patients, evaluation.bootstraps, np.random.default_rng(seed))
    tail = (1 - evaluation.confidence) / 2
    # Resampled, one patient is always the same: the interval would have no width, or leave that class's part out.
    # Of ece resampling makes more: its interval would often lie above the estimate.
    every = frozenset(SCALARS) - {"ece"}
    vary = frozenset() if patients == 1 else _OF_ALL if samples.lone_class(member_N) else every
    values: dict[str, float] = {}
    for name in SCALARS:
        value = float(estimate[name][0])
        if math.isnan(value):
            continue
        # Sums of fractions may pass the end of the scale by a rounding.
        values[name] = min(max(value, 0.0), MAX_LOSS if name == "loss" else 1.0)
        if name not in vary:
            continue
        defined = resampled[name][~np.isnan(resampled[name])]
        if 2 * len(defined) >= evaluation.bootstraps:
            low, high = np.quantile(defined, (tail, 1 - tail))
            values[f"{name}_low"], values[f"{name}_high"] = float(low), float(high)
    threshold, point = samples.operating_point(evaluation.specificity) if task.kind == "binary" else (None, None)
    names = task.classes[1:] if task.kind == "binary" else task.classes
    return Metrics(
        patients=patients,
        values=values,
        confusion=samples.confusion(),
        roc={name: points for name, ranking in zip(names, samples.rankings, strict=True) if (points := ranking.roc())},
        bins=samples.reliability(),
        threshold=threshold,
        operating_point=point,
    )


def by_subgroup(
    targets: npt.NDArray[np.generic],
    probabilities_NC: npt.NDArray[np.floating],
    patient_N: npt.NDArray[np.integer],
    values_N: Sequence[str],
    task: Task,
    evaluation: Evaluation,
    *,
    seed: int,
) -> dict[str, Metrics]:
    """`score` for each value of a subgroup column, in sorted order; small cells are suppressed.

    One suppressed cell beside its total can still be counted by subtraction: show no totals next
    to it, or widen the groups.
    """
    column_N = np.asarray(values_N, dtype=str)
    if len(column_N) != len(patient_N):
        raise DataError(f"subgroup column has {len(column_N)} values for {len(patient_N)} samples")
    return {
        str(value): score(
            targets[column_N == value],
            probabilities_NC[column_N == value],
            patient_N[column_N == value],
            task,
            evaluation,
            seed=seed,
        )
        for value in np.unique(column_N)
    }


def probabilities(logits_NC: npt.NDArray[np.floating], kind: str) -> npt.NDArray[np.float32]:
    """Softmax over classes, or for `multilabel` a sigmoid for each."""
    from scipy.special import expit, softmax  # 14 MB, and no training needs it

    raw = np.asarray(logits_NC, dtype=np.float64)
    result: Floats = expit(raw) if kind == "multilabel" else softmax(raw, axis=1)
    return result.astype(np.float32)


def _check(targets: npt.NDArray[np.generic], p_NC: Floats, patient_N: npt.NDArray[np.integer], task: Task) -> None:
    count = len(patient_N)
    wanted = (count, task.outputs) if task.kind == "multilabel" else (count,)
    if p_NC.shape != (count, task.outputs) or targets.shape != wanted:
        raise DataError(
            f"predictions do not fit: probabilities {p_NC.shape}, targets {targets.shape}, "
            f"expected {(count, task.outputs)} and {wanted} for {count} samples of {task.kind}"
        )
    if not np.isfinite(p_NC).all():
        raise DivergedError("a predicted probability is not finite: the model diverged; lower training.lr")
    if p_NC.size and (p_NC.min() < -1e-6 or p_NC.max() > 1 + 1e-6):
        raise DataError(f"probabilities lie in [{p_NC.min():.3g}, {p_NC.max():.3g}]; expected [0, 1], got logits?")
    top = 2 if task.kind == "multilabel" else task.outputs
    if count and not np.isin(targets, np.arange(top)).all():
        raise DataError(f"targets hold values other than 0 to {top - 1}")


@dataclass(frozen=True)
class _Ranking:
    """One class against the rest, sorted from the most to the least probable; equal scores form one step."""

    order_N: npt.NDArray[np.intp]
    positive_N: Floats  # sorted
    ends_T: npt.NDArray[np.intp]  # last sample of each step
    scores_T: Floats

    @staticmethod
    def of(positive_N: Truths, score_N: Floats) -> _Ranking:
        order = np.argsort(-score_N, kind="stable")
        sorted_scores = score_N[order]
        ends = np.append(np.flatnonzero(np.diff(sorted_scores)), len(order) - 1)
        return _Ranking(order, positive_N[order].astype(np.float64), ends, sorted_scores[ends])

    def counts(self, weight_BN: Floats) -> tuple[Floats, Floats]:
        """Weight of true and of false positives (B, T) when everything down to each step is called positive."""
        sorted_BN = weight_BN[:, self.order_N]
        true_BN = np.cumsum(sorted_BN * self.positive_N, axis=1)
        all_BN = np.cumsum(sorted_BN, axis=1)
        return true_BN[:, self.ends_T], (all_BN - true_BN)[:, self.ends_T]

    def areas(self, weight_BN: Floats, specificity: float) -> tuple[Floats, Floats, Floats]:
        """AUROC, average precision and sensitivity at the specificity (B,); NaN where a class is absent."""
        true_BT, false_BT = self.counts(weight_BN)
        positives, negatives = true_BT[:, -1], false_BT[:, -1]
        step_true = np.diff(true_BT, prepend=0, axis=1)
        step_false = np.diff(false_BT, prepend=0, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Half a step up: of a positive and a negative with equal scores, half is ranked right.
            auroc = (step_false * (true_BT - step_true / 2)).sum(1) / (positives * negatives)
            precision = np.where(true_BT > 0, true_BT / (true_BT + false_BT), 0)
            auprc = (step_true * precision).sum(1) / positives
            reached = np.where(false_BT <= _allowed(negatives, specificity)[:, None], true_BT, 0).max(1) / positives
        for values in (auroc, auprc, reached):
            values[(positives == 0) | (negatives == 0)] = np.nan
        return auroc, auprc, reached

    def rates(self) -> tuple[Floats, Floats] | None:
        """False and true positive rate (T,) of the samples as they are."""
        true_BT, false_BT = self.counts(np.ones((1, len(self.order_N))))
        if true_BT[0, -1] == 0 or false_BT[0, -1] == 0:
            return None
        return false_BT[0] / false_BT[0, -1], true_BT[0] / true_BT[0, -1]

    def roc(self) -> tuple[tuple[float, float], ...]:
        rates = self.rates()
        if rates is None:
            return ()
        x, y = (np.concatenate(([0.0], rate)) for rate in rates)
        kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _ROC_POINTS)).round().astype(int))
        return tuple(zip(x[kept].tolist(), y[kept].tolist(), strict=True))


@dataclass(frozen=True)
class _Samples:
    """What the statistics need of each sample, computed once. K: classes that are told from the rest."""

    kind: str
    truth_NK: Truths
    called_NK: Truths
    rankings: tuple[_Ranking, ...]
    specificity: float
    confidence_NL: Floats
    """L reliability curves in one: 1, or for multi-label the classes."""
    hit_NL: Truths
    brier_N: Floats
    loss_N: Floats
    pair_N: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None
    """True and called class; None for multi-label."""
    classes: int

    @staticmethod
    def of(targets: npt.NDArray[np.generic], p_NC: Floats, task: Task, specificity: float) -> _Samples:
        classes = task.outputs
        # Logarithms of a probability of 0 stop where the loss is capped.
        log_p_NC = np.log(np.maximum(p_NC, math.exp(-MAX_LOSS)))
        if task.kind == "multilabel":
            truth = np.asarray(targets) > 0.5
            called = p_NC > 0.5
            log_q_NC = np.log(np.maximum(1 - p_NC, math.exp(-MAX_LOSS)))
            loss = -np.where(truth, log_p_NC, log_q_NC).mean(1)
            brier = ((p_NC - truth) ** 2).mean(1)
            confidence, hit, pair = p_NC, truth, None
        else:
            target_N = np.asarray(targets).astype(np.int64)
            call_N = p_NC.argmax(1)
            one_hot = target_N[:, None] == np.arange(classes)
            loss = -log_p_NC[np.arange(len(target_N)), target_N]
            brier = ((p_NC - one_hot) ** 2).sum(1) / 2
            pair = (target_N, call_N.astype(np.int64))
            first = 1 if task.kind == "binary" else 0
            truth = one_hot[:, first:]
            called = (call_N[:, None] == np.arange(classes))[:, first:]
            if task.kind == "binary":
                confidence, hit = p_NC[:, 1:], truth
            else:
                confidence, hit = p_NC.max(1, keepdims=True), (call_N == target_N)[:, None]
        score_NK = p_NC[:, 1:] if task.kind == "binary" else p_NC
        rankings = tuple(_Ranking.of(truth[:, k], score_NK[:, k]) for k in range(truth.shape[1]))
        return _Samples(
            task.kind, truth, called, rankings, specificity, confidence, hit, brier, loss, pair, classes
        )  # fmt: skip

    def statistics(self, weight_BN: Floats) -> dict[str, Floats]:
        """Every one of `SCALARS` (B,) under each weighting of the samples; NaN where it is not defined."""
        total_B = weight_BN.sum(1)
        truth, called = self.truth_NK, self.called_NK
        tp, fp, fn, tn = (
            weight_BN @ cell.astype(np.float64)
            for cell in (truth & called, ~truth & called, truth & ~called, ~truth & ~called)
        )
        recall_BK, specificity_BK = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
        if self.kind == "multiclass":
            balanced_B = _mean(recall_BK)
        else:
            balanced_B = _mean(_mean(np.stack([recall_BK, specificity_BK]), axis=0))
        if self.pair_N is None:
            accuracy_B = ((tp + tn) / total_B[:, None]).mean(1)
        else:
            accuracy_B = weight_BN @ (self.pair_N[0] == self.pair_N[1]).astype(np.float64) / total_B
        areas = np.stack([ranking.areas(weight_BN, self.specificity) for ranking in self.rankings])
        auroc_B, auprc_B, sensitivity_B = (_mean(areas[:, which].T) for which in range(3))
        return {
            "auroc": auroc_B,
            "auprc": auprc_B,
            "accuracy": accuracy_B,
            "balanced_accuracy": balanced_B,
            "f1": _mean(_ratio(2 * tp, 2 * tp + fp + fn)),
            "recall": _mean(recall_BK),
            "specificity": _mean(specificity_BK),
            "sensitivity_at_specificity": sensitivity_B,
            "ece": self._calibration_error(weight_BN) / total_B,
            "brier": weight_BN @ self.brier_N / total_B,
            "loss": weight_BN @ self.loss_N / total_B,
        }

    def _calibration_error(self, weight_BN: Floats) -> Floats:
        """Sum over bins of |predicted - observed|, mean over the reliability curves."""
        errors = []
        for confidence_N, hit_N in zip(self.confidence_NL.T, self.hit_NL.T, strict=True):
            gap_NB = np.zeros((len(hit_N), BINS))
            gap_NB[np.arange(len(hit_N)), _bin(confidence_N)] = confidence_N - hit_N
            errors.append(np.abs(weight_BN @ gap_NB).sum(1))
        mean: Floats = np.mean(errors, axis=0)
        return mean

    def lone_class(self, member_N: npt.NDArray[np.intp]) -> bool:
        """Whether all samples with a class, or all without it, are one patient's."""
        kinds = (of for truth_N in self.truth_NK.T for of in (truth_N, ~truth_N))
        return any(len(np.unique(member_N[of_N])) == 1 for of_N in kinds)

    def confusion(self) -> tuple[tuple[int, ...], ...]:
        if self.pair_N is None:
            return ()
        counts = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(counts, self.pair_N, 1)
        return tuple(tuple(row) for row in counts.tolist())

    def reliability(self) -> tuple[tuple[float, float, int], ...]:
        confidence, hit = self.confidence_NL.ravel(), self.hit_NL.ravel()
        bin_N = _bin(confidence)
        count = np.bincount(bin_N, minlength=BINS)
        predicted = np.bincount(bin_N, confidence, BINS)
        observed = np.bincount(bin_N, hit.astype(np.float64), BINS)
        return tuple(
            (predicted[b] / n, observed[b] / n, n) if n else ((b + 0.5) / BINS, 0.0, 0)
            for b, n in enumerate(count.tolist())
        )

    def operating_point(self, specificity: float) -> tuple[float | None, tuple[float, float] | None]:
        """The threshold with the most true positives at the specificity, halfway to the next lower score.

        Halfway, because another runtime's rounding must not move the samples that decided it.
        """
        ranking = self.rankings[0]
        rates = ranking.rates()
        if rates is None:
            return None, None
        within = np.flatnonzero(rates[0] <= _allowed(np.ones(1), specificity))
        if not len(within):
            return None, None
        last = int(within[-1])
        below = float(ranking.scores_T[last + 1]) if last + 1 < len(ranking.scores_T) else 0.0
        threshold = (float(ranking.scores_T[last]) + below) / 2
        return threshold, (float(rates[0][last]), float(rates[1][last]))


def _resample(
    samples: _Samples, member_N: npt.NDArray[np.intp], patients: int, bootstraps: int, rng: np.random.Generator
) -> dict[str, Floats]:
    parts: list[dict[str, Floats]] = []
    size = max(1, _CHUNK // len(member_N))
    share = np.full(patients, 1 / patients)
    for start in range(0, bootstraps, size):
        drawn_BP = rng.multinomial(patients, share, size=min(size, bootstraps - start))
        parts.append(samples.statistics(drawn_BP[:, member_N].astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in SCALARS}


def _allowed(negatives: Floats, specificity: float) -> Floats:
    return (1 - specificity) * negatives + 1e-9  # 1 - 0.95 is a little above 0.05, or below


def _bin(confidence_N: Floats) -> npt.NDArray[np.intp]:
    return np.clip((confidence_N * BINS).astype(np.intp), 0, BINS - 1)


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _mean(values: Floats, axis: int = -1) -> Floats:
    """Mean over the defined values; NaN where there is none."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis), defined.sum(axis).astype(np.float64))
