"""The privacy audit of one recipe on this installation: self-tests of the mechanism, then a training with canaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from client.canaries import one_run
from client.mechanism import planned, self_tests
from common.clock import utc_now
from common.config import Recipe
from common.errors import PrivacyError
from common.privacy_audit import Check, PrivacyAudit, audited_code

QUICK_CANARIES, QUICK_STEPS = 300, 20
"""Seconds with a small network: what a simulation does at its end."""


def privacy_audit(
    recipe: Recipe,
    patients: Mapping[str, int],
    *,
    weights: str = "",
    canaries: int = 1000,
    steps: int | None = None,
    device: torch.device | None = None,
    seed: int | None = None,
    show: Callable[[str], None] = lambda what: None,
) -> PrivacyAudit:
    """Runs all of it; what fails is in the result, not an error.

    Args:
        recipe: With privacy.
        patients: Site to its number of training patients.
        weights: Digest of the model that is to be released on this audit; empty: of none.
        canaries: For the one-run audit; 0 leaves it out.
        steps: Noised steps of the one-run audit; None: as many as the whole run has.
        seed: Of coins and made-up images; None: coins of the operating system, and the same images each time.
        show: Told what begins.

    Raises:
        PrivacyError: The recipe has no privacy, or there is no site.
    """
    plans = {name: planned(recipe, count) for name, count in patients.items()}
    show("Testing the mechanism")
    checks = self_tests(recipe, patients, device=device, seed=0 if seed is None else seed)
    bound = None
    if canaries:
        show("Training with canaries")
        plan = min(plans.values(), key=lambda each: each.noise_multiplier)
        try:
            bound = one_run(recipe, plan, canaries=canaries, steps=steps, device=device, seed=seed)
        except PrivacyError as error:
            failed = Check(name="one-run audit", passed=False, found=str(error)[:400], expected="a training")
            checks = (*checks, failed)
    return PrivacyAudit(
        recipe_id=recipe.id,
        recipe=recipe.name,
        code=audited_code(),
        weights=weights,
        made=utc_now(),
        device=str(device or "cpu"),
        patients=dict(patients),
        checks=checks,
        bound=bound,
    )
