"""The result of a privacy audit, bound to what was audited; what a release asks of it.

The tests themselves live where the mechanism lives (`client.mechanism`, `client.canaries`); the coordinator, who may
not import a client, reads their outcome here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from common.config import Fraction, Recipe, Text, validate_json
from common.errors import ConfigError
from common.exchange import Digest, MaybeDigest
from common.installed import code_hashes
from common.storage import storing, write_whole

FILE = "privacy_audit.json"
FALSE_ALARM = 1e-3
"""Chance that an honest mechanism fails any of the statistical checks of one audit."""
_ROOMS = ("common", "client", "torch")
"""Whose hashes an audit is bound to: what the mechanism is made of. `server` reads the result and adds no noise."""
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Check:
    """One self-test of the mechanism."""

    name: Text
    passed: bool
    found: Annotated[str, Len(0, 400)]
    """What was measured, in words."""
    expected: Annotated[str, Len(0, 400)]
    false_alarm: Fraction = 0.0
    """Chance that an honest mechanism fails here; 0 for what is exact."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Bound:
    """What one audited training says about epsilon (Steinke, Nasr and Jagielski 2023)."""

    canaries: Annotated[int, Ge(1)]
    """Patients who exist in the audit alone, each in the training or not by the toss of a coin."""
    steps: Annotated[int, Ge(1)]
    guesses: Annotated[int, Ge(0)]
    """About how many canaries the attacker said in or out; of the best threshold."""
    right: Annotated[int, Ge(0)]
    lower: Annotated[float, Ge(0)]
    """Epsilon is at least this, with `confidence`."""
    upper: Annotated[float, Ge(0)]
    """Epsilon of the same steps by the accountant (PLD)."""
    delta: Annotated[float, Gt(0), Lt(1)]
    confidence: Annotated[float, Gt(0.5), Lt(1)] = 0.95

    @property
    def passed(self) -> bool:
        """The accountant was not caught promising too much."""
        return self.lower <= self.upper


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PrivacyAudit:
    """All checks of one recipe on one installation, and the model they are meant for."""

    recipe_id: Digest
    recipe: Text
    """Its name."""
    code: Mapping[str, Annotated[str, Len(0, 200)]]
    """Room or package to the hash of what was audited."""
    weights: MaybeDigest = ""
    """Digest of the audited run's final weights; empty when a recipe was audited and no run."""
    made: Annotated[str, Len(0, 40)]
    """ISO 8601."""
    device: Annotated[str, Len(0, 100)]
    patients: Mapping[str, Annotated[int, Ge(1), Le(10**9)]]
    """Site to the training patients that its sampling was tested with."""
    checks: tuple[Check, ...]
    bound: Bound | None = None

    @property
    def passed(self) -> bool:
        """Something was checked, and nothing failed."""
        bounded = self.bound is None or self.bound.passed
        return bool(self.checks) and bounded and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of what did not hold."""
        names = tuple(check.name for check in self.checks if not check.passed)
        return names if self.bound is None or self.bound.passed else (*names, "one-run audit")

    def write(self, path: Path) -> None:
        """Raises StorageError when the file cannot be written."""
        write_whole(path, (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode())


def read_privacy_audit(path: Path) -> PrivacyAudit:
    """Reads what `PrivacyAudit.write` wrote.

    Raises:
        ConfigError: It is no audit of this version.
        StorageError: The file cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"there is no privacy audit {path}; make one with `fedicom privacy audit`")
    with storing(path.name):
        text = path.read_bytes()
    return validate_json(PrivacyAudit, text)


def audited_code() -> Mapping[str, str]:
    """Hashes of the installed code that a privacy audit is about."""
    found = code_hashes()
    return {name: found[name] for name in _ROOMS if name in found}


def unfit(audit: PrivacyAudit | None, recipe: Recipe, weights: str) -> str | None:
    """Why a model must not be released on this audit; None when it may.

    Args:
        audit: None: there is none.
        recipe: What the model was trained by.
        weights: Digest of the model's weights.
    """
    if audit is None:
        return "there is no privacy audit of it" if recipe.privacy.active else "it was trained without privacy"
    if audit.recipe_id != recipe.id:
        return f"the privacy audit is of recipe {audit.recipe_id[:12]}, the model of {recipe.id[:12]}"
    if not audit.weights:
        return "the privacy audit is of the recipe alone; audit the run, so that it is bound to this model"
    if audit.weights != weights:
        return f"the privacy audit is of model {audit.weights[:12]}, not of {weights[:12]}"
    installed = audited_code()
    if other := sorted(name for name in {*installed, *audit.code} if installed.get(name) != audit.code.get(name)):
        return f"the privacy audit tested other code than is installed here (different: {', '.join(other)})"
    if not audit.passed:
        return f"its privacy audit failed: {', '.join(audit.failed) or 'nothing was checked'}"
    return None


def told(audit: PrivacyAudit | None, why: str | None) -> Mapping[str, Any]:
    """JSON for the model's metadata.

    Args:
        why: Of `unfit`; None: the audit holds.

    Returns:
        `status` is `passed` or `unaudited`; then why, or the figures.
    """
    if why is not None or audit is None:
        return {"status": "unaudited", "why": why or "there is no privacy audit of it"}
    plain: dict[str, Any] = {"status": "passed", "made": audit.made, "checks": len(audit.checks)}
    if audit.bound is not None:
        plain |= {
            "epsilon_at_least": round(audit.bound.lower, 4), "epsilon_at_most": round(audit.bound.upper, 4),
            "steps": audit.bound.steps, "confidence": audit.bound.confidence,
        }  # fmt: skip
    return plain
