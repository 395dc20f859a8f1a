"""What a recipe would do at this hospital, in words for the people who must decide on it.

Everything is counted and computed here, from the recipe, the policy, this site's own patients and its ledger; nothing
is asked of the coordinator and nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from client.ledger import Ledger
from client.policy import ledger_policy, objections, score_event, visit_event
from common.accounting import Accounts, Event, accounts, epsilon_pld
from common.compression import nbytes
from common.config import Recipe
from common.deployment import Policy, SiteConfig
from common.epsilon import rounded_down, rounded_up
from common.errors import FedicomError, PrivacyError
from common.printable import number_of, printable
from common.signed import SignedRecipe

# The model's size needs torch, and the cohort the imaging room: both take seconds to import.
if TYPE_CHECKING:
    from client.cohort import Cohort, Split

_INTERVAL = 1e-3
"""Of the grid of privacy losses; rounding on it only ever adds."""
_TOLD = {
    "exact": "the patients of each group",
    "coarse": "the patients of each group, rounded down by up to a quarter (counts)",
    "none": "none of them (counts)",
}
_SPLITS = {"train": "to train on", "validation": "to watch the training with", "test": "for the closing evaluation"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it, one sentence or row each."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Review:
    """What to know before saying yes."""

    sections: tuple[Section, ...]
    objections: tuple[str, ...]
    """Why this site would not run it as things stand; empty when nothing speaks against it."""
    plain: Mapping[str, Any]
    """The same as JSON types."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a private recipe takes from the budget of this cohort."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    """Noised steps of one visit."""
    epsilon: Accounts
    """Of all rounds, at the recipe's delta, by three accountants; the first counts."""
    right_guesses: float
    """Share of right guesses whether a patient took part, at most; 0.5 is a coin."""
    spent: float
    """By everything so far, at the policy's delta."""
    paid_rounds: int
    """Visits of this recipe that are in the ledger already."""
    after: float
    """By everything, when all rounds are done, at the policy's delta."""
    affordable: int
    """Rounds that still fit under the cap, at most those that are left."""


def review(signed: SignedRecipe, config: SiteConfig, cohort: Cohort | None, ledger: Ledger | None) -> Review:
    """Puts together what the recipe would do here.

    Args:
        signed: Checked by `common.signed.parse_recipe` against the coordinator's pinned key.
        config: The site's own.
        cohort: Its patients under this recipe; None where they have not been counted.
        ledger: The cohort's account; None where none is at hand, and then nothing is said to be left.

    Raises:
        StorageError: The ledger cannot be read or trusted.
    """
    recipe, policy = signed.recipe, config.policy
    patients = cohort.patients("train") if cohort is not None else None
    found = list(objections(recipe, policy, patients))
    numbers, size, trouble = _size(recipe)
    cost = None
    if recipe.privacy.active and patients is not None:
        try:
            cost, why = _cost(recipe, policy, patients, ledger)
        except (ArithmeticError, MemoryError):  # of numbers that no training has
            why = ["what it costs cannot be computed here: too little noise for so many steps"]
        trouble += why
    found += trouble
    sections = (
        _head(signed),
        _work(recipe, numbers),
        _patients(recipe, policy, cohort),
        _leaves(recipe, policy, cohort, size),
        _privacy(recipe, policy, cost, counted=cohort is not None),
        _verdict(found),
    )
    plain = {
        "recipe": {"id": recipe.id, "name": recipe.name, "coordinator": signed.coordinator},
        "objections": found,
        "training": {
            "task": recipe.task.kind,
            "classes": list(recipe.task.classes),
            "network": _network(recipe),
            "rounds": recipe.rounds,
            "local_epochs": recipe.training.local_epochs,
            "batch_size": recipe.training.batch_size,
        },
        "patients": _counts(recipe, cohort),
        "refused_files": dict(cohort.refused) if cohort is not None else None,
        "leaves": {
            "numbers": numbers,
            "update_bytes": size,
            "all_updates_bytes": None if size is None else size * recipe.rounds,
            "compression": recipe.federation.compression,
            "noised": recipe.privacy.active,
            "scores": {split: why is None for split, why in _scores(recipe, policy, cohort).items()},
            "smallest_cell": _cell(recipe, policy),
        },
        "privacy": None if cost is None else _cost_plain(recipe, policy, cost),
    }
    return Review(sections=sections, objections=tuple(found), plain=plain)


def _head(signed: SignedRecipe) -> Section:
    recipe = signed.recipe
    lines = [
        f"Hash: {recipe.id}",
        f"Signed by the coordinator's key {signed.coordinator[:16]}, the one that this site trusts.",
    ]
    if recipe.description:
        lines.append(f"The coordinator says: {_printable(recipe.description)}")
    return Section(title=f"Recipe {recipe.name}", lines=tuple(lines))


def _work(recipe: Recipe, numbers: int | None) -> Section:
    task, data, training = recipe.task, recipe.data, recipe.training
    classes = [_printable(name) for name in task.classes]
    what = {
        "binary": f"tell {classes[-1]!r} from {classes[0]!r}",
        "multiclass": f"tell apart {', '.join(map(repr, classes))}",
        "multilabel": f"say of each of {', '.join(map(repr, classes))} whether it is there",
    }[task.kind]
    of = "volumes" if task.dimensions == 3 else "images"
    modality = f" ({', '.join(map(_printable, data.modalities))})" if data.modalities else " of any modality"
    size = " x ".join(map(str, data.size))
    trained = "of a size that could not be computed" if numbers is None else f"with {numbers:,} numbers to train"
    return Section(
        title="What would be trained",
        lines=(
            f"A network learns to {what}, from {of}{modality}, each brought to {size} "
            f"{'voxels' if task.dimensions == 3 else 'pixels'}.",
            f"The network is {_printable(_network(recipe))}, {trained}.",
            f"{number_of(recipe.rounds, 'round')}. In each, this site goes through its training patients "
            f"{_times(training.local_epochs)}, {training.batch_size} patients a step.",
            "The program that trains is the one installed here; the recipe brings no code.",
        ),
    )


def _patients(recipe: Recipe, policy: Policy, cohort: Cohort | None) -> Section:
    if cohort is None:
        return Section(
            title="On which of your patients",
            lines=("Not counted. Give the data folder in site.yaml (data), and run the review again.",),
        )
    lines = []
    of = "volume" if recipe.task.dimensions == 3 else "image"
    for split, counts in (_counts(recipe, cohort) or {}).items():
        classes = ", ".join(f"{_printable(name)} {count}" for name, count in counts["classes"].items())
        lines.append(
            f"{number_of(counts['patients'], 'patient')} with {number_of(counts['samples'], of)} {_SPLITS[split]} "
            f"(patients: {classes})"
        )
    if cohort.refused:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(cohort.refused.items()))
        lines.append(f"{number_of(sum(cohort.refused.values()), 'file')} of the folder not used: {codes}")
    else:
        lines.append("Every file of the folder is used.")
    if recipe.privacy.secure_aggregation and recipe.federation.site_weights == "patients":
        lines.append("These numbers were counted here. The coordinator is not told them.")
    else:
        cell = _cell(recipe, policy)
        lines.append(
            f"These numbers were counted here. The coordinator is told {_TOLD[policy.counts]}"
            + ("." if policy.counts == "none" else f", and 0 where they are fewer than {cell}.")
        )
    return Section(title="On which of your patients", lines=tuple(lines))


def _leaves(recipe: Recipe, policy: Policy, cohort: Cohort | None, update_bytes: int | None) -> Section:
    size = "of unknown size" if update_bytes is None else _bytes(update_bytes)
    if recipe.federation.compression != "none":
        size += f" (rounded to {recipe.federation.compression}; what that leaves out stays here until the next round)"
    noised = (
        "clipped and noised, see privacy below"
        if recipe.privacy.active
        else "WITHOUT noise: parts of the images that it was trained on may be computed back from it"
    )
    scores, secure = _scores(recipe, policy, cohort), recipe.privacy.secure_aggregation
    exact = "yes, exact: no noise, and no epsilon, covers them, and they tell how many images they are of"
    if secure:
        noised += "; under masks, so that the coordinator reads the sum over all sites alone (secure aggregation)"
    lines = [
        "Once: this site's name, the patients of each group as above, versions of the programs, hash of the data.",
        f"In each round: one update of the network, {size}, {noised}.",
    ]
    if policy.metrics == "noised":
        lines.append(
            "After the last round: AUROC and the like on the validation and test patients, out of noised histograms; "
            f"they cost epsilon {policy.scores_epsilon:g} at delta {policy.delta:g}, which is told with them "
            "(metrics, scores_epsilon)."
        )
    else:
        lines += [
            f"In each round: scores on the validation patients, such as AUROC: {scores['validation'] or exact}.",
            f"After the last round: scores on the test patients: {scores['test'] or exact}.",
        ]
    if recipe.privacy.active:
        lines.append("In each round: epsilon spent, noise, sampling rate, number of steps.")
    elif not secure:
        lines.append("In each round: the mean training loss and the number of steps.")
    if secure:
        lines.append("In each round: the size (norm) of the update, in the open; keys, and encrypted shares of them.")
    elif recipe.federation.site_weights == "patients":
        lines.append("In each round: the exact number of training patients, by which the update is weighted.")
    lines.append("With every message: hashes of the recipe, of the weights and of this site's log.")
    if update_bytes is not None:
        lines.append(f"All {number_of(recipe.rounds, 'update')} together: {_bytes(update_bytes * recipe.rounds)}.")
    lines.append("Never: images, names, identifiers, dates, or the label of a patient.")
    return Section(title="What leaves this house", lines=tuple(lines))


def _privacy(recipe: Recipe, policy: Policy, cost: Cost | None, *, counted: bool) -> Section:
    privacy = recipe.privacy
    if not privacy.active:
        return Section(
            title="Privacy",
            lines=("None is promised: the recipe trains without differential privacy, and nothing limits what the "
                   "updates tell of a single patient.",),
        )  # fmt: skip
    lines = [
        "Epsilon says how much the updates, and the model out of them, can depend on any one patient: 0 is not at all, "
        "and every training adds.",
        f"Each patient's share in a step is clipped to {privacy.clip_norm:g} before noise is added."
        + ("" if privacy.clip_quantile is None else " The bound then follows the patients, by a noised count."),
    ]
    if cost is None:
        asked = f"up to epsilon {privacy.epsilon:g}" if privacy.epsilon else f"noise {privacy.noise_multiplier:g}"
        why = "it could not be computed" if counted else "it depends on the number of patients, which were not counted"
        lines.append(f"The recipe asks for {asked} at delta {privacy.delta:g}; what that costs here: {why}.")
        return Section(title="Privacy", lines=tuple(lines))
    lines += [
        f"All {number_of(recipe.rounds, 'round')} would spend epsilon {rounded_up(cost.epsilon.pld)} at delta "
        f"{privacy.delta:g}, with noise {cost.noise_multiplier:.2f} on {number_of(cost.steps, 'step')} a round (PLD, "
        f"which counts; as cross-checks PRV {rounded_up(cost.epsilon.prv)}, RDP {rounded_up(cost.epsilon.rdp)}).",
        "In plain words: somebody who knows everything but one patient, and sees all updates, guesses whether that "
        f"patient took part. A coin is right 50 times of 100, the best guess {_right(cost.right_guesses)} of 100.",
        f"Spent on these patients so far: epsilon {rounded_up(cost.spent)} of at most {policy.epsilon:g} (delta "
        f"{policy.delta:g}).",
        f"After this recipe: epsilon {rounded_up(cost.after)}, "
        + (
            f"{rounded_down(policy.epsilon - cost.after)} would remain."
            if cost.after <= policy.epsilon
            else "over the cap."
        ),
    ]
    if cost.paid_rounds:
        lines.append(f"{number_of(cost.paid_rounds, 'visit')} of this recipe already stand in the ledger.")
    return Section(title="Privacy", lines=tuple(lines))


def _verdict(found: Sequence[str]) -> Section:
    lines = [f"NO: {printable(why)}" for why in found]
    if found:
        lines.append("While one of these holds, this site refuses the recipe, approved or not.")
    else:
        lines.append("Nothing in it speaks against this recipe. Nothing runs before `fedicom site approve`.")
    return Section(title="This site's policy", lines=tuple(lines))


def _size(recipe: Recipe) -> tuple[int | None, int | None, list[str]]:
    """How many numbers an update has, and bytes as it travels, or why the network cannot be built here."""
    from common.models import build, get_weights

    try:
        weights = get_weights(build(recipe))
        return weights.size, nbytes(weights.shapes, recipe.federation.compression), []
    except FedicomError as error:
        return None, None, [f"the network cannot be built here: {error}"]


def _cost(recipe: Recipe, policy: Policy, patients: int, ledger: Ledger | None) -> tuple[Cost | None, list[str]]:
    from client.dp.rules import check_delta

    privacy, rounds = recipe.privacy, recipe.rounds
    assert privacy.delta is not None
    found = []
    try:
        check_delta(privacy.delta, patients)
    except PrivacyError as error:
        found.append(str(error))
    try:
        drawn, visit = visit_event(recipe, patients, policy)
    except PrivacyError as error:
        return None, [*found, str(error)]
    noise = visit.noise_multiplier
    try:
        ledger_policy(policy).check(visit)
    except PrivacyError as error:
        found.append(str(error))
    past = ledger.events() if ledger is not None else ()
    paid = len(ledger.events(recipe.id, "updates")) if ledger is not None else 0
    told = ledger is not None and ledger.events(recipe.id, "scores")  # once, and then they are of the past
    scores = [score_event(policy)] if policy.metrics == "noised" and not told else []
    left = max(0, rounds - paid)

    def after(count: int) -> float:
        steps = drawn.steps * count
        rounds_left = Event(noise_multiplier=noise, sampling_rate=drawn.rate, steps=steps)
        return epsilon_pld([*past, rounds_left, *scores], policy.delta)

    whole = Event(noise_multiplier=noise, sampling_rate=drawn.rate, steps=drawn.steps * rounds)
    cost = Cost(
        noise_multiplier=noise,
        sampling_rate=drawn.rate,
        steps=drawn.steps,
        epsilon=accounts([whole], privacy.delta),
        right_guesses=right_guesses(whole),
        spent=epsilon_pld(past, policy.delta),
        paid_rounds=paid,
        after=after(left),
        affordable=left if after(left) <= policy.epsilon else _last_below(after, left, policy.epsilon),
    )
    if cost.affordable < left:
        found.append(
            f"the budget: all rounds would bring this site to epsilon {rounded_up(cost.after)}, its cap is "
            f"{policy.epsilon:g} (epsilon); it would refuse after {number_of(cost.affordable, 'round')} of {left}"
        )
    return cost, found


def _last_below(after: Any, rounds: int, cap: float) -> int:
    """The largest number of rounds whose epsilon is at most `cap`; `rounds` is known to be too many."""
    low, high = 0, rounds  # after(high) is over the cap
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if after(middle) <= cap else (low, middle)
    return low


def _cost_plain(recipe: Recipe, policy: Policy, cost: Cost) -> dict[str, Any]:
    return {
        "epsilon": cost.epsilon.pld,
        "epsilon_prv": cost.epsilon.prv,
        "epsilon_rdp": cost.epsilon.rdp,
        "right_guesses": cost.right_guesses,
        "delta": recipe.privacy.delta,
        "noise_multiplier": cost.noise_multiplier,
        "sampling_rate": cost.sampling_rate,
        "steps": cost.steps,
        "clip_norm": recipe.privacy.clip_norm,
        "cap": policy.epsilon,
        "cap_delta": policy.delta,
        "spent": cost.spent,
        "after": cost.after,
        "left": policy.epsilon - cost.after,
        "paid_rounds": cost.paid_rounds,
        "affordable_rounds": cost.affordable,
    }


def _counts(recipe: Recipe, cohort: Cohort | None) -> dict[str, Any] | None:
    if cohort is None:
        return None
    from client.cohort import SPLITS

    return {
        split: {
            "patients": cohort.patients(split),
            "samples": len(cohort.indices(split)),
            "classes": dict(zip(recipe.task.classes, cohort.class_counts(split).tolist(), strict=True)),
        }
        for split in SPLITS
    }


def _scores(recipe: Recipe, policy: Policy, cohort: Cohort | None) -> dict[str, str | None]:
    """Why no score of a split leaves; None where it does."""
    cell, found = _cell(recipe, policy), dict[str, str | None]()
    fractions: dict[Split, float] = {
        "validation": recipe.evaluation.validation_fraction, "test": recipe.evaluation.test_fraction
    }  # fmt: skip
    for split, fraction in fractions.items():
        why = None
        if policy.metrics == "none":
            why = "no, this site's policy keeps them (metrics)"
        elif not fraction:
            why = "no, the recipe asks for none"
        # Of noised scores, what is suppressed follows from the noised count.
        elif policy.metrics != "noised" and cohort is not None and cohort.patients(split) < cell:
            why = f"no, they are fewer than {cell}"
        found[split] = why
    return found


def _cell(recipe: Recipe, policy: Policy) -> int:
    return max(policy.min_cell, recipe.evaluation.min_cell)


def right_guesses(event: Event) -> float:
    """How often, at most, a guess is right whether a patient took part in these steps, at even chances.

    Half of one plus the total variation between what leaves with and without the patient, which is delta at epsilon
    0; an upper bound, as `common.accounting.epsilon_pld` is, and much tighter than what epsilon alone implies.

    Source: Wasserman and Zhou 2010 (tests and privacy); Doroshenko et al. 2022 (the distribution).
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    if event.noise_multiplier == 0:
        return 1.0
    if event.sampling_rate == 1:  # Gaussians compose exactly
        noise = event.noise_multiplier / math.sqrt(event.steps)
        total = pld.from_gaussian_mechanism(noise, value_discretization_interval=_INTERVAL)
    else:
        total = pld.from_gaussian_mechanism(
            event.noise_multiplier, value_discretization_interval=_INTERVAL, sampling_prob=event.sampling_rate
        ).self_compose(event.steps)
    return (1 + min(1.0, float(total.get_delta_for_epsilon(0.0)))) / 2


def _right(share: float) -> str:
    return f"{math.ceil(100 * share)}"  # rounded up: it is a promise


def _network(recipe: Recipe) -> str:
    return f"{recipe.model.family}/{recipe.model.name}"


def _printable(text: str) -> str:
    # The coordinator wrote it: it shall not fill the page either.
    shown = printable(text)
    return shown if len(shown) <= 500 else f"{shown[:500]}..."


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:g} times"
