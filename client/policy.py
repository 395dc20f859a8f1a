"""Whether a hospital's policy lets a recipe run: the same questions at review, at approval and at every visit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from client.ledger import Ledger, SitePolicy
from common.accounting import Event, epsilon_pld, solve_noise
from common.config import Recipe
from common.deployment import Policy, SiteHome
from common.epsilon import rounded_up
from common.errors import PrivacyError
from common.exchange import ScoresSpent

# The engine beside the rules needs torch, which takes seconds to import.
if TYPE_CHECKING:
    from client.dp import Sampling

_MOST_STEPS = 1_000_000
"""Of a recipe at one site: its account takes half a minute then, and grows with the steps."""
_BANDS = (10, 12, 16, 20, 25, 32, 40, 50, 63, 80)
"""ISO 3's preferred numbers, R10, as whole ones: steps of about a quarter."""
SCORE_RELEASES = 2
"""Noised histograms of a closing evaluation: validation and test patients, counted one after the other."""


def objections(recipe: Recipe, policy: Policy, patients: int | None = None) -> tuple[str, ...]:
    """Why the policy forbids this recipe, one sentence each; empty when it does not.

    The budget is not asked here: the ledger knows what was spent.

    Args:
        patients: Training patients of the site, where they have been counted.
    """
    task, privacy, found = recipe.task, recipe.privacy, []
    if not privacy.active and policy.require_privacy:
        found.append("the recipe trains without differential privacy, the policy requires it (require_privacy)")
    if not privacy.secure_aggregation and policy.require_secure_aggregation:
        found.append(
            "the recipe shows the coordinator this site's own update, the policy requires secure aggregation "
            "(require_secure_aggregation)"
        )
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
    masked = privacy.secure_aggregation
    if recipe.federation.site_weights == "patients" and policy.counts != "exact" and not masked:
        found.append(
            f"the recipe weights sites by exact numbers of patients, the policy tells them {policy.counts} (counts)"
        )
    most = recipe.federation.max_patients if recipe.federation.site_weights == "patients" else None
    if patients is not None and most is not None and patients > most:
        found.append(f"more training patients than the recipe's {most} (federation.max_patients)")
    if patients is not None and patients < policy.min_patients:
        # Not how many: the sentence goes to the coordinator.
        found.append(f"fewer training patients than the policy's {policy.min_patients} (min_patients)")
    return tuple(found)


def told(patients: int, policy: Policy) -> int:
    """The number of patients as the policy lets others know it, in a greeting or by the sampling rate."""
    if policy.counts == "exact" or patients < _BANDS[0]:
        return patients
    power = int(10 ** (len(str(patients)) - 2))
    return max(band for band in _BANDS if band * power <= patients) * power


def visit_event(recipe: Recipe, patients: int, policy: Policy) -> tuple[Sampling, Event]:
    """How one visit draws its patients, and what the ledger pays for it.

    With coarse counts everything here is a function of the rounded number. The rounded one is never larger, so the
    rate is at least batch / patients, and it is the rate that is run and accounted.

    Raises:
        PrivacyError: No noise reaches the budget, there is no patient, or there are more steps than anybody trains.
    """
    from client.dp.rules import sampling

    training = recipe.training
    drawn = sampling(told(patients, policy), training.batch_size, training.local_epochs)
    if (steps := drawn.steps * recipe.rounds) > _MOST_STEPS:
        raise PrivacyError(
            f"the recipe plans {steps:,} noised steps at this site, and no account is made of more than "
            f"{_MOST_STEPS:,}: fewer rounds or epochs, or larger batches"
        )
    return drawn, Event(noise_multiplier=solved(recipe, drawn), sampling_rate=drawn.rate, steps=drawn.steps)


def solved(recipe: Recipe, drawn: Sampling) -> float:
    """The recipe's noise multiplier, or the least with which all its rounds stay within its epsilon.

    Raises:
        PrivacyError: No noise does.
    """
    privacy = recipe.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    return solve_noise(privacy.epsilon, privacy.delta, drawn.rate, drawn.steps * recipe.rounds)


def score_event(policy: Policy) -> Event:
    """What noised scores of a closing evaluation cost: everybody is in every histogram."""
    noise = solve_noise(policy.scores_epsilon, policy.delta, 1.0, SCORE_RELEASES)
    return Event(noise_multiplier=noise, sampling_rate=1.0, steps=SCORE_RELEASES)


def scores_spent(ledger: Ledger | None, recipe: Recipe, policy: Policy) -> ScoresSpent | None:
    """What noised scores of this recipe have cost so far, for the coordinator; None where none were paid.

    Raises:
        StorageError: The ledger cannot be read or trusted.
    """
    events = ledger.events(recipe.id, "scores") if ledger is not None else ()
    return ScoresSpent(epsilon=epsilon_pld(events, policy.delta), delta=policy.delta) if events else None


def check_budget(recipe: Recipe, patients: int, policy: Policy, ledger: Ledger) -> None:
    """Asked before the first visit of a recipe: would all its rounds, and its noised scores, stay below the cap?

    A recipe that has begun is not asked again here: each of its visits is, by the ledger.

    Raises:
        PrivacyError: The policy forbids a visit, or all of them together pass the cap; names the projected epsilon.
        StorageError: The ledger cannot be read or trusted.
    """
    if ledger.events(recipe.id):
        return
    _, event = visit_event(recipe, patients, policy)
    ledger_policy(policy).check(event)
    past = ledger.events()
    planned = [Event(noise_multiplier=event.noise_multiplier, sampling_rate=event.sampling_rate,
                     steps=event.steps * recipe.rounds)]  # fmt: skip
    if policy.metrics == "noised":
        planned.append(score_event(policy))
    projected = epsilon_pld([*past, *planned], policy.delta)
    if not projected <= policy.epsilon:
        raise PrivacyError(
            f"all {recipe.rounds} rounds{' and the noised scores' if policy.metrics == 'noised' else ''} would bring "
            f"this site to epsilon {rounded_up(projected)}, its cap is {policy.epsilon:g} at delta {policy.delta:g}, "
            f"spent so far {rounded_up(epsilon_pld(past, policy.delta))}; ask for less, or the site raises its cap"
        )


def ledger_of(home: SiteHome) -> Ledger:
    """The account of a site. Named by the site: one for all recipes on its patients.

    Raises:
        ConfigError: The configuration does not hold.
    """
    config = home.config
    return Ledger(home.ledger_file, config.site, ledger_policy(config.policy))


def ledger_policy(policy: Policy) -> SitePolicy:
    """The part of the policy that the ledger enforces."""
    return SitePolicy(
        epsilon=policy.epsilon,
        delta=policy.delta,
        min_noise_multiplier=policy.min_noise_multiplier,
        max_sampling_rate=policy.max_sampling_rate,
        max_steps=policy.max_steps,
    )
