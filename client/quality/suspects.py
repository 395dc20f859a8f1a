"""Labels that the images themselves speak against, and maps of the images: simple features, no network.

What this can and cannot do is said in docs/quality.md: small pictures and a linear classifier see coarse differences
alone. A suspect is a reason to look, never a reason to change a label without looking.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.quality.hashes import shrunk

Floats = npt.NDArray[np.float64]

THUMBNAIL = {2: 16, 3: 8}
"""Pixels along each axis of the small picture."""
_QUANTILES = np.linspace(0.05, 0.95, 10)
_COMPONENTS = 32
_FOLDS, _REPEATS = 5, 3
_LEAST_PATIENTS = 10
"""Of each class, before predictions are worth anything."""
_USUAL = 0.25
"""Quantile of a class's own probabilities. Of labels that were flipped in 5 % of 1,304 chest X-rays, a quartile finds
82 % and 2.4 % of the others, the mean of the original method 69 % and 1.8 %, no threshold 98 % and 7.8 %."""
_LEAST_AUROC = 0.65
"""Below this the features cannot tell the classes apart, and naming suspects would be guessing."""
_MOST_POINTS = 1500
"""In the maps; t-SNE of more takes minutes."""


def features(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """A small picture, scaled from the 1st to the 99th percentile of the image, and ten quantiles of it."""
    sparse = values[tuple(slice(None, None, max(1, length // 256)) for length in values.shape)]
    low, high = np.percentile(sparse, (1, 99))
    scale = float(high - low) or 1.0
    small = shrunk(values, (THUMBNAIL[values.ndim],) * values.ndim)
    parts = [np.clip((small.ravel() - low) / scale, -1, 2), (np.quantile(sparse, _QUANTILES) - low) / scale]
    return np.concatenate(parts).astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Labels that cross-validated predictions speak against."""

    examined: int
    """Labels (rows of the table) that have images."""
    auroc: float | None = None
    """Of the held-out predictions, mean over classes; how far this list can be trusted."""
    why_not: str = ""
    """Why nothing was examined or named; empty when it was."""
    named: tuple[tuple[int, int, float], ...] = ()
    """(place in the given items, predicted class, its probability), the most certain first."""


def find_suspects(
    features_NF: npt.NDArray[np.floating],
    target_N: npt.NDArray[np.int64],
    unit_N: npt.NDArray[np.int64],
    patient_N: npt.NDArray[np.int64],
    classes: int,
) -> Suspects:
    """Confident learning on simple features.

    Every patient's images are predicted by a model that has not seen this patient. A label is suspect when another
    class is more probable than the given one, and at least as probable as it is for three quarters of the labels of
    that other class.

    Args:
        features_NF: Of each image.
        target_N: Class of each image.
        unit_N: Which images share a label; their probabilities are averaged.
        patient_N: Whose image it is.
        classes: Number of classes.

    Returns:
        Suspects by unit.

    Source: Northcutt, Jiang and Chuang 2021, "Confident learning": the off-diagonal of the confident joint, with a
    quartile in place of the mean as the threshold of a class.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    units = np.unique(unit_N)
    present = [len(np.unique(patient_N[target_N == each])) for each in range(classes)]
    scarce = [count for count in present if count < _LEAST_PATIENTS]
    if scarce:
        return Suspects(
            examined=len(units),
            why_not=f"not examined: {len(scarce)} of {classes} classes have fewer than {_LEAST_PATIENTS} patients",
        )
    x_NF = np.asarray(features_NF, np.float64)
    p_NC = np.zeros((len(x_NF), classes))
    for train, test in (
        both
        for repeat in range(_REPEATS)
        for both in StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=repeat).split(x_NF, target_N, patient_N)
    ):
        size = min(_COMPONENTS, x_NF.shape[1], len(train) - 1)
        model = make_pipeline(
            StandardScaler(),
            PCA(size, svd_solver="full" if len(train) < 5000 else "randomized", random_state=0),
            LogisticRegression(C=0.01, max_iter=500, class_weight="balanced"),
        )
        model.fit(x_NF[train], target_N[train])
        p_NC[np.ix_(test, model[-1].classes_)] += model.predict_proba(x_NF[test]) / _REPEATS
    place_N = np.searchsorted(units, unit_N)
    count_U = np.bincount(place_N)
    p_UC = np.stack([np.bincount(place_N, p_NC[:, each]) / count_U for each in range(classes)], axis=1)
    target_U = np.zeros(len(units), np.int64)
    target_U[place_N] = target_N
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [roc_auc_score(target_U == each, p_UC[:, each]) for each in range(classes)]
    auroc = float(np.mean(scores))
    if not auroc >= _LEAST_AUROC:
        return Suspects(
            examined=len(units), auroc=auroc,
            why_not=f"none named: held-out AUROC {auroc:.2f} is below {_LEAST_AUROC}, so these simple features cannot "
            "tell the classes apart",
        )  # fmt: skip
    usual_C = np.array([np.quantile(p_UC[target_U == each, each], _USUAL) for each in range(classes)])
    sure_UC = np.where(p_UC >= usual_C, p_UC, -1.0)
    best_U = sure_UC.argmax(axis=1)
    rows = np.arange(len(units))
    wrong = (sure_UC[rows, best_U] > 0) & (best_U != target_U) & (p_UC[rows, best_U] > p_UC[rows, target_U])
    ranked = sorted(np.flatnonzero(wrong).tolist(), key=lambda row: (-p_UC[row, best_U[row]], row))
    named = tuple((int(units[row]), int(best_U[row]), float(p_UC[row, best_U[row]])) for row in ranked)
    return Suspects(examined=len(units), auroc=auroc, named=named)


@dataclass(frozen=True, kw_only=True)
class Map:
    """The images as points in a plane."""

    rows: tuple[int, ...]
    """Which images are shown."""
    pca: Floats
    """(points, 2)."""
    tsne: Floats | None
    """(points, 2); None below 20 images."""
    explained: tuple[float, float]
    """Share of the variance along the two axes of `pca`."""


def make_map(features_NF: npt.NDArray[np.floating], names: Sequence[str]) -> Map | None:
    """PCA and t-SNE of the features; of many images, those that come first by pseudonym. None below 5 images."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = sorted(sorted(range(len(names)), key=lambda row: names[row])[:_MOST_POINTS])
    if len(rows) < 5:
        return None
    x_NF = np.asarray(features_NF, np.float64)[rows]
    x_NF = (x_NF - x_NF.mean(axis=0)) / (x_NF.std(axis=0) + 1e-6)
    model = PCA(min(_COMPONENTS, len(rows) - 1, x_NF.shape[1]), random_state=0)
    reduced = model.fit_transform(x_NF)
    tsne = None
    if len(rows) >= 20:
        perplexity = min(30.0, (len(rows) - 1) / 4)
        tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced).astype(np.float64)
    first, second = (float(share) for share in model.explained_variance_ratio_[:2])
    return Map(rows=tuple(rows), pca=reduced[:, :2], tsne=tsne, explained=(first, second))
