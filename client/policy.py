"""Whether a hospital's policy lets a recipe run: the same questions at review, at approval and at every visit."""

from __future__ import annotations

from client.ledger import SitePolicy
from common.config import Recipe
from common.deployment import Policy


def objections(recipe: Recipe, policy: Policy, patients: int | None = None) -> tuple[str, ...]:
    """Why the policy forbids this recipe, one sentence each; empty when it does not.

    The budget is not asked here: the ledger knows what was spent.

    Args:
        patients: Training patients of the site, where they have been counted.
    """
    task, privacy, found = recipe.task, recipe.privacy, []
    if not privacy.active and policy.require_privacy:
        found.append("the recipe trains without differential privacy, the policy requires it (require_privacy)")
    if privacy.unsafe_seeded_noise and not policy.seeded_noise:
        found.append("privacy.unsafe_seeded_noise is for simulations; this site does not train with it (seeded_noise)")
    if privacy.noise_multiplier is not None and privacy.noise_multiplier < policy.min_noise_multiplier:
        found.append(
            f"noise multiplier {privacy.noise_multiplier:g}, the policy allows at least "
            f"{policy.min_noise_multiplier:g} (min_noise_multiplier)"
        )
    if privacy.epsilon is not None and privacy.epsilon > policy.epsilon:
        found.append(
            f"the recipe may spend epsilon {privacy.epsilon:g}, the policy allows {policy.epsilon:g} (epsilon)"
        )
    if privacy.delta is not None and privacy.delta > policy.delta:
        found.append(f"delta {privacy.delta:g}, the policy allows at most {policy.delta:g} (delta)")
    if recipe.rounds > policy.max_rounds:
        found.append(f"{recipe.rounds} rounds, the policy allows {policy.max_rounds} (max_rounds)")
    network = f"{recipe.model.family}/{recipe.model.name}"
    if policy.models and network not in policy.models:
        found.append(f"network {network}, the policy allows {', '.join(policy.models)} (models)")
    if policy.tasks and task.kind not in policy.tasks:
        found.append(f"a {task.kind} task, the policy allows {', '.join(policy.tasks)} (tasks)")
    if policy.modalities and not recipe.data.modalities:
        found.append(f"the recipe names no modality, the policy allows {', '.join(policy.modalities)} (modalities)")
    if policy.modalities and (odd := [name for name in recipe.data.modalities if name not in policy.modalities]):
        found.append(f"modality {odd[0]}, the policy allows {', '.join(policy.modalities)} (modalities)")
    if patients is not None and patients < policy.min_patients:
        # Not how many: the sentence goes to the coordinator.
        found.append(f"fewer training patients than the policy's {policy.min_patients} (min_patients)")
    return tuple(found)


def ledger_policy(policy: Policy) -> SitePolicy:
    """The part of the policy that the ledger enforces."""
    return SitePolicy(
        epsilon=policy.epsilon,
        delta=policy.delta,
        min_noise_multiplier=policy.min_noise_multiplier,
        max_sampling_rate=policy.max_sampling_rate,
        max_steps=policy.max_steps,
    )
