"""Which hospital a patient goes to. Every partitioner is a value with a seed; patients are never divided.

    assign(labels, columns, sites) -> site index of every patient

`labels` holds one class name for each patient, `columns` further values of the label table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, DataError

CENTRAL = "central"
"""The folder of the patients who are dealt out to nobody: the coordinator's test set."""

SiteIndex = npt.NDArray[np.int64]


class Partition(Protocol):
    """Sends every patient to exactly one site."""

    def assign(self, labels: Sequence[str], columns: Mapping[str, Sequence[str]], sites: int) -> SiteIndex:
        """Returns (patients,) int64 in [0, sites); every site gets at least one patient.

        Raises:
            DataError: The patients cannot fill that many sites.
        """
        ...


@dataclass(frozen=True)
class Iid:
    """Equal shares at random; sizes differ by at most one."""

    seed: int = 0

    def assign(self, labels: Sequence[str], columns: Mapping[str, Sequence[str]], sites: int) -> SiteIndex:
        return Quantity(shares=(1.0,) * sites, seed=self.seed).assign(labels, columns, sites)


@dataclass(frozen=True)
class Quantity:
    """Sites of different size with the same mix of classes: site k gets a share in proportion to (k + 1) ** -power."""

    power: float = 1.0
    shares: tuple[float, ...] | None = None
    """Instead of `power`: one positive number for each site, in any unit."""
    seed: int = 0

    def assign(self, labels: Sequence[str], columns: Mapping[str, Sequence[str]], sites: int) -> SiteIndex:
        _enough(len(labels), sites)
        shares = self.shares or tuple((k + 1.0) ** -self.power for k in range(sites))
        if len(shares) != sites or not all(0 < share < float("inf") for share in shares):
            raise ConfigError(f"shares: expected {sites} positive numbers, one for each site, got {len(shares)}")
        sizes = 1 + _apportion(np.array(shares), len(labels) - sites, floor=1)
        shuffled = np.random.default_rng(self.seed).permutation(len(labels))
        sites_P = np.empty(len(labels), dtype=np.int64)
        sites_P[shuffled] = np.repeat(np.arange(sites), sizes)
        return sites_P


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: the patients of each class are dealt out by shares drawn from Dirichlet(alpha).

    Drawn again until every site has `min_patients`, and `min_per_class` of each class, so
    that it can hold out validation and test patients.

    Source: Hsu, Qi, Brown 2019 (arXiv 1909.06335); minimum as in Li et al. 2022 (NIID-Bench).
    """

    alpha: float = 0.5
    seed: int = 0
    min_patients: int = 10
    min_per_class: int = 3

    def assign(self, labels: Sequence[str], columns: Mapping[str, Sequence[str]], sites: int) -> SiteIndex:
        _enough(len(labels), sites)
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"alpha: got {self.alpha}; expected a positive number (small is skewed)")
        rng = np.random.default_rng(self.seed)
        classes, class_P = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        totals = np.bincount(class_P, minlength=len(classes))
        for _ in range(_DRAWS):
            shares = rng.dirichlet(np.full(sites, self.alpha), size=len(classes))
            # A tiny alpha underflows to shares that are not numbers.
            if not np.all(np.isfinite(shares)):
                continue
            counts = np.stack([_apportion(share, int(total)) for share, total in zip(shares, totals, strict=True)])
            if counts.sum(axis=0).min() >= max(1, self.min_patients) and counts.min() >= self.min_per_class:
                break
        else:
            raise DataError(
                f"no draw out of {_DRAWS} gave each of {sites} sites {self.min_patients} patients and "
                f"{self.min_per_class} of each class; got {len(labels)} patients in {len(classes)} classes; "
                "raise alpha, or lower the number of sites or min_patients"
            )
        sites_P = np.empty(len(labels), dtype=np.int64)
        for one, count in enumerate(counts):
            members = rng.permutation(np.flatnonzero(class_P == one))
            sites_P[members] = np.repeat(np.arange(sites), count)
        return sites_P


@dataclass(frozen=True)
class ByColumn:
    """Patients with the same value in a column stay together; each value goes to one site.

    The most frequent value is placed first, always at the site with the fewest patients.
    """

    column: str

    def assign(self, labels: Sequence[str], columns: Mapping[str, Sequence[str]], sites: int) -> SiteIndex:
        if self.column not in columns:
            raise ConfigError(f"column {self.column!r} is not there; expected one of {', '.join(columns) or '(none)'}")
        values = columns[self.column]
        counts = Counter(values)
        if len(counts) < sites:
            raise DataError(f"column {self.column!r} has {len(counts)} different values, too few for {sites} sites")
        filled = [0] * sites
        site_of: dict[str, int] = {}
        for value, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            site_of[value] = filled.index(min(filled))
            filled[site_of[value]] += count
        return np.array([site_of[value] for value in values], dtype=np.int64)


_DRAWS = 5_000


def _enough(patients: int, sites: int) -> None:
    if sites < 1:
        raise ConfigError(f"sites: got {sites}; expected at least 1")
    if patients < sites:
        raise DataError(f"{patients} patients cannot fill {sites} sites; every site needs at least one")


def _apportion(shares: npt.NDArray[np.float64], total: int, floor: int = 0) -> npt.NDArray[np.int64]:
    """Whole numbers that add up to `total`, in proportion to `shares` (largest remainders).

    With `floor`, every part has already been given that many, and gets only what its share
    is above it.
    """
    ideal = shares / shares.sum() * (total + floor * len(shares))
    ideal = np.maximum(ideal - floor, 0)
    ideal = ideal / ideal.sum() * total if ideal.sum() > 0 else np.full(len(shares), total / len(shares))
    parts: npt.NDArray[np.int64] = np.floor(ideal).astype(np.int64)
    order = np.argsort(-(ideal - parts), kind="stable")
    parts[order[: total - int(parts.sum())]] += 1
    return parts
