"""How far two people who labelled the same images agree, beyond what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import DataError

Weighting: TypeAlias = Literal["none", "linear", "quadratic"]
WEIGHTINGS: tuple[Weighting, ...] = ("none", "linear", "quadratic")

WARN_BELOW = 0.8
_RESAMPLES = 1000
_TAIL = 0.025


@dataclass(frozen=True, kw_only=True)
class Kappa:
    """Cohen's kappa with the ends of its 95 % interval; None: not defined, as when both know one class only."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of two annotators."""

    annotators: tuple[str, str]
    """Columns of the label table."""
    items: int
    """Labelled by both."""
    same: int
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Row: the class that the first gave; column: the second."""
    kappa: Kappa
    linear: Kappa
    """Weighted: a difference of two classes counts twice that of one. For classes that have an order."""
    quadratic: Kappa
    """Weighted: a difference of two classes counts four times that of one."""


def agreement(
    names: tuple[str, str], first: Sequence[int], second: Sequence[int], patients: Sequence[str], classes: Sequence[str]
) -> Agreement:
    """Kappa of two annotators, with percentile intervals from 1,000 resamples of patients.

    Args:
        names: Of the annotators.
        first, second: Class index for each item.
        patients: Whose item it is; the items of a patient are drawn together.
        classes: In their order.

    Raises:
        DataError: The lengths differ, or there is no item.

    Source: Cohen 1960 and 1968; patient (cluster) bootstrap of Field and Welsh 2007.
    """
    if not first or not len(first) == len(second) == len(patients):
        raise DataError(
            f"agreement: got {len(first)}, {len(second)} and {len(patients)} items; expected as many, not 0"
        )
    count = len(classes)
    unique, of_N = np.unique(np.asarray(patients), return_inverse=True)
    cells_PK = np.zeros((len(unique), count * count))
    np.add.at(cells_PK, (of_N, np.asarray(first) * count + np.asarray(second)), 1)
    confusion = cells_PK.sum(axis=0).reshape(count, count)
    drawn_RP = np.random.default_rng(0).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), _RESAMPLES)
    resampled_RKK = (drawn_RP @ cells_PK).reshape(_RESAMPLES, count, count)

    def with_interval(weighting: Weighting) -> Kappa:
        value = float(kappa(confusion[None], weighting)[0])
        if np.isnan(value):
            return Kappa(value=None)
        several = kappa(resampled_RKK, weighting)
        several = several[~np.isnan(several)]
        if 2 * len(several) < _RESAMPLES:
            return Kappa(value=value)
        low, high = np.quantile(several, (_TAIL, 1 - _TAIL))
        return Kappa(value=value, low=float(low), high=float(high))

    return Agreement(
        annotators=names,
        items=len(first),
        same=int(np.trace(confusion)),
        classes=tuple(classes),
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
        kappa=with_interval("none"),
        linear=with_interval("linear"),
        quadratic=with_interval("quadratic"),
    )


def kappa(confusion_RKK: npt.NDArray[np.float64], weighting: Weighting) -> npt.NDArray[np.float64]:
    """(R,): 1 - observed / expected disagreement; nan where none could be expected."""
    count = confusion_RKK.shape[-1]
    apart = np.abs(np.subtract.outer(np.arange(count), np.arange(count))).astype(np.float64)
    weight = {"none": (apart > 0).astype(np.float64), "linear": apart, "quadratic": apart**2}[weighting]
    total = confusion_RKK.sum(axis=(1, 2))
    expected = np.einsum("ri,rj->rij", confusion_RKK.sum(axis=2), confusion_RKK.sum(axis=1)) / total[:, None, None]
    observed_R = (confusion_RKK * weight).sum(axis=(1, 2))
    expected_R = (expected * weight).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected_R > 0, 1 - observed_R / expected_R, np.nan)
