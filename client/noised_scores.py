"""Scores that carry noise of their own: histograms of the predictions, noised once, and all else computed from them.

Every patient gives one prediction, whatever the number of images. For each class that is told from the rest it falls
into one cell of (is of the class, bin of the predicted probability), with bins that are fixed for everybody. So adding
or removing one patient changes one cell by one for each class: the L2 sensitivity is the root of the number of such
classes. Gaussian noise of that times the noise multiplier makes it one release of the Gaussian mechanism, rate 1,
which the ledger pays for like a step. What follows (AUROC, its interval, the count) sees the noised cells alone,
and so costs nothing more.

Source: Dwork and Roth 2014 (post-processing, the Gaussian mechanism); Balle and Wang 2018 (its exact epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from client.dp import Noise
from common.config import Task

EDGES: npt.NDArray[np.float64] = 1 / (1 + np.exp(-np.arange(-3.0, 4.0)))
"""Between the 8 bins: steps of 1 in log odds; one half is an edge. More would resolve more and hold more noise."""
BINS = len(EDGES) + 1
_DRAWS = 500

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class NoisedScores:
    """What may leave."""

    patients: int
    values: Mapping[str, float]
    """`auroc`, `auroc_low`, `auroc_high`; for binary and multi-label tasks also `recall`, `specificity`,
    `balanced_accuracy` at one half, for binary ones `accuracy`. Absent where too few are left."""


def histogram(
    targets: npt.NDArray[np.generic],
    probabilities_NC: npt.NDArray[np.floating],
    patient_N: npt.NDArray[np.integer],
    task: Task,
) -> Floats:
    """Counts (K, 2, `BINS`): class told from the rest, whether the patient is of it, bin of its probability.

    K is 1 for a binary task, else the number of classes. Of a patient with several samples the first one counts.
    """
    _, first_P = np.unique(patient_N, return_index=True)
    p_PC = np.asarray(probabilities_NC, dtype=np.float64)[first_P]
    target_P = np.asarray(targets)[first_P]
    if task.kind == "multilabel":
        truth_PK = target_P > 0.5
    else:
        truth_PK = target_P.astype(np.int64)[:, None] == np.arange(task.outputs)
    if task.kind == "binary":
        truth_PK, p_PC = truth_PK[:, 1:], p_PC[:, 1:]
    counts = np.zeros((p_PC.shape[1], 2, BINS))
    # A probability that is no number has a place as well: the bound holds for every model.
    bin_PK = np.searchsorted(EDGES, np.nan_to_num(p_PC, nan=0.0), side="right")
    for k in range(counts.shape[0]):
        np.add.at(counts[k], (truth_PK[:, k].astype(int), bin_PK[:, k]), 1.0)
    return counts


def noised(counts_K2B: Floats, noise_multiplier: float, noise: Noise) -> Floats:
    """The release: every cell with Gaussian noise, then rounded to whole patients, which reveals no more."""
    scale = noise_multiplier * math.sqrt(len(counts_K2B))
    drawn = noise.normal(torch.zeros(counts_K2B.shape, dtype=torch.float64)).numpy()
    rounded: Floats = np.round(counts_K2B + scale * drawn)
    return rounded


def scores(
    noised_K2B: Floats, noise_multiplier: float, task: Task, *, min_cell: int, confidence: float, seed: int
) -> NoisedScores:
    """Results out of a noised histogram alone.

    Cells may be negative and are used as they are, which keeps sums free of bias. The interval of AUROC comes from
    histograms that are drawn again, with as many patients and as much noise.

    Args:
        noise_multiplier: Of the release; public.
        min_cell: Fewer patients than this, as noised, with and without the class: nothing is said of it.
        confidence: Level of the interval, as of `common.metrics.score`.
        seed: Of the interval; public, as it sees what is public alone.
    """
    K = len(noised_K2B)
    patients = max(0, round(float(noised_K2B.sum()) / K))
    totals_K2 = noised_K2B.sum(axis=2)
    usable = [k for k in range(K) if min(totals_K2[k]) >= max(1, min_cell)]
    if patients < max(1, min_cell) or not usable:
        return NoisedScores(patients=patients if patients >= min_cell else 0, values={})
    cells = noised_K2B[usable]
    values = {"auroc": float(np.mean([_auroc(cell[None])[0] for cell in cells]))}
    drawn = _redrawn(cells, noise_multiplier * math.sqrt(K), np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    values["auroc_low"], values["auroc_high"] = (float(v) for v in np.quantile(drawn, (tail, 1 - tail)))
    if task.kind != "multiclass":
        half = BINS // 2
        recall = _share(cells[:, 1, half:].sum(1), cells[:, 1].sum(1))
        specificity = _share(cells[:, 0, :half].sum(1), cells[:, 0].sum(1))
        values |= {"recall": recall, "specificity": specificity, "balanced_accuracy": (recall + specificity) / 2}
    if task.kind == "binary":
        (cell,) = cells
        values["accuracy"] = _share(cell[1, half:].sum() + cell[0, :half].sum(), cell.sum())
    return NoisedScores(patients=patients, values={name: min(max(v, 0.0), 1.0) for name, v in values.items()})


def _auroc(cells_R2B: Floats) -> Floats:
    """(R,) AUROC in [0, 1] of R histograms; equal bins count half."""
    without, of = cells_R2B[:, 0], cells_R2B[:, 1]
    below = np.cumsum(without, axis=1) - without / 2
    pairs = of.sum(1) * without.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (of * below).sum(1) / pairs
    return np.clip(np.where((of.sum(1) > 0) & (without.sum(1) > 0), area, 0.5), 0.0, 1.0)


def _redrawn(cells_K2B: Floats, scale: float, rng: np.random.Generator) -> Floats:
    """(_DRAWS,) mean AUROC of histograms like these: patients drawn from their clipped shares, noise drawn anew."""
    aurocs = np.zeros(_DRAWS)
    for cell in cells_K2B:
        share = np.clip(cell, 0, None)
        again = np.empty((_DRAWS, 2, BINS))
        for row in (0, 1):
            count = max(1, round(float(cell[row].sum())))
            again[:, row] = rng.multinomial(count, share[row] / share[row].sum(), size=_DRAWS)
        aurocs += _auroc(again + rng.normal(0, scale, again.shape)) / len(cells_K2B)
    # Clipping moves mass into empty bins, and so towards one half: centred again on the estimate.
    estimate = float(np.mean([_auroc(cell[None])[0] for cell in cells_K2B]))
    return np.clip(aurocs - float(np.median(aurocs)) + estimate, 0.0, 1.0)


def _share(part: Floats | float, whole: Floats | float) -> float:
    return float(np.mean(np.asarray(part) / np.maximum(np.asarray(whole), 1.0)))
