"""The closed list of what may cross between a site and the coordinator. Nothing else leaves a site.

Every type is frozen and holds numbers, hashes and short codes only: no identifier, no path,
no pixel. `docs/what-leaves-the-site.md` is generated from this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from common.weights import Weights

WIRE_VERSION = 1
"""Raised when a message changes meaning; a site refuses a newer one."""


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """Coordinator to site: what is asked in one visit."""

    recipe_id: str
    """SHA-256 of the recipe's canonical JSON; the recipe itself lies approved at the site."""
    round: int
    """1 for the first round; `rounds + 1` for the closing evaluation."""
    work: Literal["train", "evaluate"]
    weights: Weights
    """The global model before this round."""
    audit_head: str = ""
    """Head of the coordinator's audit chain, recorded by the site."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Site to coordinator: bounded results of the incoming global model on a split of the site.

    Every value lies in [0, 1] except `loss`, which is capped at 100.
    Nothing is given when the split has fewer patients than `evaluation.min_cell`.
    """

    patients: int
    values: Mapping[str, float]
    """Names from `common.metrics.SCALARS`, with `_low` and `_high` for interval ends."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Site to coordinator: the privacy cost so far, as the site's ledger has it."""

    epsilon: float
    delta: float
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    steps: int
    """Noised steps so far, over all rounds."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Site to coordinator: who is there, asked once before the first round."""

    site: str
    versions: Mapping[str, str]
    """Package name to version, for the packages that change numbers."""
    patients: Mapping[str, int]
    """Split name to number of patients; cells below `evaluation.min_cell` are given as 0."""
    manifest: str
    """SHA-256 of the cohort's manifest."""
    audit_head: str = ""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Site to coordinator: the change that local training made, clipped and noised under privacy."""

    site: str
    recipe_id: str
    round: int
    base: str
    """Digest of the weights that training started from."""
    delta: Weights
    """Trained minus incoming weights; zeros for `evaluate` work are left out (an empty record)."""
    weight: float
    """Share in weighted averages: training patients, or 1."""
    steps: int
    train_loss: float | None
    """Mean loss of the round; absent under privacy, where it would leak."""
    validation: Scores | None = None
    """Of the incoming model, on the site's validation patients."""
    test: Scores | None = None
    """Of the final model, on the site's test patients; only for `evaluate` work."""
    spent: Spent | None = None
    audit_head: str = ""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Site to coordinator: the site will not do this, and why, in words without patient data."""

    site: str
    recipe_id: str
    round: int
    code: Literal["recipe", "version", "budget", "policy", "data", "training", "message"]
    why: str
    audit_head: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Coordinator's own record of silence or a broken reply; never crosses the wire."""

    site: str
    round: int
    why: str


Reply = Update | Refusal | Failure

__all__ = [
    "WIRE_VERSION",
    "Failure",
    "Hello",
    "Refusal",
    "Reply",
    "RoundPlan",
    "Scores",
    "Spent",
    "Update",
]
