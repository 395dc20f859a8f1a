"""How two cohorts, or one cohort at two times, differ: on fixed bins, with a chance of error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from client.quality.bins import VERSION, bin_names, bins_hash, bins_of
from client.quality.report import LOCAL_ONLY
from client.quality.survey import LEVELS, Survey
from common.errors import DataError
from common.printable import number_of

Floats = npt.NDArray[np.float64]

FEATURES = ("intensity", "spacing_mm", "slice_mm", "age", "sex", "class", "vendor", "modality", "kvp")
TITLES: Mapping[str, str] = {
    "intensity": "intensity after preparation", "spacing_mm": "spacing of rows, mm", "slice_mm": "slice distance, mm",
    "age": "age, years", "sex": "sex", "class": "class", "vendor": "vendor", "modality": "modality",
    "kvp": "peak kilovoltage",
}  # fmt: skip
SMOOTHING = 0.5
"""Patients added to every bin before KL is taken, which is infinite where a bin is empty on one side alone."""
PERMUTATIONS = 4999
ALPHA = 0.01
"""A difference is said to be one when its p-value, corrected for the number of features, is below this."""


@dataclass(frozen=True, kw_only=True)
class FeatureDrift:
    """One feature."""

    feature: str
    bins: tuple[str, ...]
    patients_a: tuple[int | None, ...]
    """Patients with an image in the bin; None: more than none, and fewer than the smallest cell. Empty for
    intensity, where every patient is in nearly every bin."""
    patients_b: tuple[int | None, ...]
    kl_ab: float
    """Kullback-Leibler divergence of A from B, bits, smoothed by half a patient a bin."""
    kl_ba: float
    js: float
    """Jensen-Shannon divergence, bits: 0 for equal distributions, 1 for those that share no bin."""
    p: float
    """Share of random divisions of all patients in two that differ at least as much."""
    p_corrected: float
    """For the number of features (Holm 1979)."""
    says: str


@dataclass(frozen=True, kw_only=True)
class Drift:
    """All features."""

    notice: str = LOCAL_ONLY
    bins_version: int = VERSION
    bins_sha256: str
    patients_a: int
    patients_b: int
    min_cell: int
    features: tuple[FeatureDrift, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(a: Survey, b: Survey, *, classes: Sequence[str] = (), min_cell: int = 5, seed: int = 0) -> Drift:
    """Compares two cohorts feature by feature.

    Every patient weighs the same, however many images they have. Patients are what is exchanged between the two sides
    to see what chance gives; somebody who is in both counts as two.

    Args:
        classes: Of the labels of both; empty: labels are not compared.
        min_cell: Smallest number of patients that is shown for a bin.
        seed: Of the permutations.

    Raises:
        DataError: A side has fewer than `min_cell` patients.

    Source: Lin 1991 (Jensen-Shannon); Phipson and Smyth 2010 (p-values of permutations).
    """
    sizes = [len({picture.patient for picture in side.pictures}) for side in (a, b)]
    if min(sizes) < min_cell:
        raise DataError(
            f"the two sides have {sizes[0]} and {number_of(sizes[1], 'patient')}; at least {min_cell} each are "
            "needed to compare"
        )
    found = []
    for feature in FEATURES:
        names = bin_names(feature, classes)
        masses = _masses(a, feature, len(names)), _masses(b, feature, len(names))
        if feature == "class" and not classes:
            continue
        if any(not len(side) for side in masses) or _nothing_known(feature, masses):
            continue
        found.append(_compared(feature, names, *masses, min_cell=min_cell, seed=seed))
    corrected = _holm([each.p for each in found])
    features = tuple(
        replace(each, p_corrected=p, says=_sentence(each, p, min_cell))
        for each, p in zip(found, corrected, strict=True)
    )
    return Drift(
        bins_sha256=bins_hash(classes), patients_a=sizes[0], patients_b=sizes[1], min_cell=min_cell, features=features
    )


def _masses(side: Survey, feature: str, bins: int) -> Floats:
    """(patients, bins): how each patient's images spread over the bins; rows sum to 1."""
    patients, place_N = np.unique([picture.patient for picture in side.pictures], return_inverse=True)
    mass_NB = np.zeros((len(side.pictures), bins))
    if feature == "intensity":
        mass_NB[:] = side.levels_NB
    else:
        for row, picture in enumerate(side.pictures):
            for at in bins_of(feature, picture):
                mass_NB[row, at] += 1
    of_PB = np.zeros((len(patients), bins))
    np.add.at(of_PB, place_N, mass_NB)
    sums = of_PB.sum(axis=1, keepdims=True)
    whole: Floats = of_PB[sums[:, 0] > 0] / sums[sums[:, 0] > 0]
    return whole


def _nothing_known(feature: str, masses: Sequence[Floats]) -> bool:
    """Whether no side says anything: the last bin is `unknown`."""
    named = feature not in ("intensity", "class", "modality")
    return named and all(bool((side[:, :-1] == 0).all()) for side in masses)


def _compared(
    feature: str, names: Sequence[str], a_PB: Floats, b_PB: Floats, *, min_cell: int, seed: int
) -> FeatureDrift:
    mean_a, mean_b = a_PB.mean(axis=0), b_PB.mean(axis=0)
    js = float(jensen_shannon(mean_a, mean_b))
    every_PB = np.concatenate([a_PB, b_PB])
    total_B = every_PB.sum(axis=0)
    rng, reached = np.random.default_rng(seed), 0
    for _ in range(PERMUTATIONS):
        chosen = rng.permutation(len(every_PB))[: len(a_PB)]
        sum_B = every_PB[chosen].sum(axis=0)
        drawn = jensen_shannon(sum_B / len(a_PB), (total_B - sum_B) / len(b_PB))
        reached += bool(drawn >= js - 1e-12)
    counts = [() if feature == "intensity" else _counts(side, min_cell) for side in (a_PB, b_PB)]
    return FeatureDrift(
        feature=feature,
        bins=tuple(names),
        patients_a=counts[0],
        patients_b=counts[1],
        kl_ab=float(kullback_leibler(mean_a * len(a_PB), mean_b * len(b_PB))),
        kl_ba=float(kullback_leibler(mean_b * len(b_PB), mean_a * len(a_PB))),
        js=js,
        p=(1 + reached) / (1 + PERMUTATIONS),
        p_corrected=1.0,
        says=_most_moved(feature, names, mean_a, mean_b, *counts),
    )


def jensen_shannon(p_B: Floats, q_B: Floats) -> float:
    """In bits."""
    middle = (p_B + q_B) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(each > 0, each * np.log2(each / middle), 0.0).sum() for each in (p_B, q_B)]
    return max(0.0, float(sum(parts) / 2))


def kullback_leibler(a_B: Floats, b_B: Floats) -> float:
    """In bits, of two histograms of patients, with `SMOOTHING` added to every bin that is used on either side."""
    used = (a_B > 0) | (b_B > 0)
    p, q = a_B[used] + SMOOTHING, b_B[used] + SMOOTHING
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log2(p / q)).sum())


def _counts(side_PB: Floats, min_cell: int) -> tuple[int | None, ...]:
    counts = (side_PB > 0).sum(axis=0).tolist()
    return tuple(count if count == 0 or count >= min_cell else None for count in counts)


def _most_moved(
    feature: str, names: Sequence[str], a_B: Floats, b_B: Floats, count_a: Sequence[int | None],
    count_b: Sequence[int | None],
) -> str:  # fmt: skip
    """The largest change of a share, among bins that may be shown."""
    if feature == "intensity":
        levels = (np.arange(LEVELS) + 0.5) / LEVELS
        return f"the mean intensity goes from {levels @ a_B:.3f} to {levels @ b_B:.3f} of the range"
    shown = [at for at in range(len(names)) if None not in (count_a[at], count_b[at])]
    if not shown:
        return ""
    at = max(shown, key=lambda at: abs(a_B[at] - b_B[at]))
    if abs(a_B[at] - b_B[at]) < 0.005:
        return ""
    return f"{names[at]!r} goes from {a_B[at]:.0%} to {b_B[at]:.0%} of the patients"


def _sentence(each: FeatureDrift, p: float, min_cell: int) -> str:
    title = TITLES[each.feature]
    title = f"{title[0].upper()}{title[1:]}"
    if p >= ALPHA:
        return f"{title}: no difference that these patients could show (JS {each.js:.3f} bits, p {p:.2g})."
    size = "slightly" if each.js < 0.02 else "clearly" if each.js < 0.2 else "strongly"
    why = each.says or f"in bins of fewer than {min_cell} patients, which are not shown"
    return f"{title}: differs {size} (JS {each.js:.3f} bits, p {p:.2g}); {why}."


def _holm(p: Sequence[float]) -> list[float]:
    order = sorted(range(len(p)), key=lambda at: p[at])
    corrected, highest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[at]))
        corrected[at] = highest
    return corrected
