"""Whether a reply may change the model. Everything unexpected is a refusal with its reason."""

from __future__ import annotations

from common.accounting import LOWEST_NOISE
from common.compression import Form, holds
from common.config import Recipe
from common.epsilon import rounded_up
from common.exchange import Failure, Hello, Refusal, Reply, RoundPlan, Update
from common.weights import Weights


def refusal(reply: Reply, plan: RoundPlan, recipe: Recipe, hello: Hello) -> str | None:
    """Why `reply` is not admitted to the round of `plan`, or None when it is.

    Checked: recipe, round, base weights, names, shapes, finiteness, compression, norm, declared weight
    and the privacy account that the recipe demands.

    Args:
        hello: What the site said of itself when it came: no update weighs more than the patients that it then had.
    """
    if isinstance(reply, Failure):
        return reply.why
    if isinstance(reply, Refusal):
        return f"site refused ({reply.code}): {reply.why}"
    return _identity(reply, plan) or _content(reply, plan, recipe, hello) or _account(reply, recipe)


def _identity(update: Update, plan: RoundPlan) -> str | None:
    if update.recipe_id != plan.recipe_id:
        return f"update of recipe {update.recipe_id[:12]}, expected {plan.recipe_id[:12]}"
    if update.round != plan.round:
        return f"update of round {update.round}, expected {plan.round}"
    if update.base != plan.weights.digest:
        return f"trained from weights {update.base[:12]}, expected {plan.weights.digest[:12]}"
    return None


def _content(update: Update, plan: RoundPlan, recipe: Recipe, hello: Hello) -> str | None:
    if plan.work == "evaluate":
        return f"evaluation came with {len(update.delta)} arrays, expected none" if len(update.delta) else None
    if recipe.privacy.secure_aggregation:
        return _ready(update, recipe)
    if update.offer is not None or update.norm is not None:
        return "the update is kept for a secure sum, which this recipe has not"
    got, expected = update.delta.shapes, plan.weights.shapes
    if got != expected:
        odd = sorted(name for name in {**got, **expected} if got.get(name) != expected.get(name))
        return f"names or shapes differ from the model's in {len(odd)} arrays"
    if not update.delta.finite:
        return "update holds NaN or infinity"
    if why := _form(update, recipe.federation.compression):
        return why
    norm, limit = update.delta.norm, recipe.federation.max_update_norm
    if norm > limit:
        return f"update norm {norm:.4g} exceeds federation.max_update_norm {limit:.4g}"
    if recipe.federation.site_weights == "equal" and update.weight != 1.0:
        return f"declared weight {update.weight:g}, expected 1 (federation.site_weights is equal)"
    if recipe.federation.site_weights == "patients" and update.weight != (patients := hello.patients.get("train", 0)):
        return f"declared weight {update.weight:g}, but the site came with {patients} training patients"
    most = recipe.federation.max_patients
    if most is not None and update.weight > most:
        return f"declared weight {update.weight:g} is above federation.max_patients {most}"
    if update.steps < 1:
        return "no training step was made"
    return None


def _form(update: Update, expected: Form) -> str | None:
    if update.compression != expected:
        return f"update sent with compression {update.compression}, expected {expected} (federation.compression)"
    # What was read from bytes is of its form; what was handed over in one process need not be.
    return None if holds(update.delta, expected) else f"update holds numbers that are not of {expected}"


def _ready(update: Update, recipe: Recipe) -> str | None:
    if len(update.delta):
        return "the update came in the open, expected one that is kept for the secure sum"
    if update.offer is None or update.norm is None:
        return "the update came without keys for the secure sum, or without its norm"
    if update.norm > (limit := recipe.federation.max_update_norm):
        return f"update norm {update.norm:.4g} exceeds federation.max_update_norm {limit:.4g}"
    if update.weight != 1.0 or update.steps or update.train_loss is not None:
        return "weight, steps or loss of a single site came along, which secure aggregation hides"
    return None


def sum_refusal(mean: Weights, recipe: Recipe) -> str | None:
    """Why a secure sum's mean may not change the model, or None when it may.

    All that can be seen of a sum: with every honest update within `federation.max_update_norm`, so is their mean.
    """
    if not mean.finite:
        return "the mean of the secure sum holds NaN or infinity"
    norm, limit = mean.norm, recipe.federation.max_update_norm
    if norm > limit * (1 + 1e-3):  # every number is rounded
        return f"the mean of the secure sum has norm {norm:.4g}, above federation.max_update_norm {limit:.4g}"
    return None


def _account(update: Update, recipe: Recipe) -> str | None:
    privacy = recipe.privacy
    noised = any(told is not None and told.noised for told in (update.validation, update.test))
    if noised and update.scores_spent is None:
        return "the scores are noised, and what that cost is not said"
    if not privacy.active:
        return None if update.spent is None else "a privacy account came along, and the recipe trains without privacy"
    spent = update.spent
    if spent is None:
        return "the recipe demands differential privacy, the update has no privacy account"
    if privacy.epsilon is not None and spent.epsilon > privacy.epsilon:
        return f"epsilon {rounded_up(spent.epsilon)} is above the recipe's {privacy.epsilon:.4g}"
    if spent.delta != privacy.delta:
        return f"epsilon is given at delta {spent.delta:g}, expected {privacy.delta:g}"
    noise = privacy.noise_multiplier
    clipped = privacy.clip_quantile is not None or spent.clip_norm == privacy.clip_norm
    if not clipped or spent.noise_multiplier < (noise or LOWEST_NOISE):
        return (
            f"clipped at {spent.clip_norm:g} with noise {spent.noise_multiplier:g}, expected {privacy.clip_norm:g} and "
            f"{'some noise' if noise is None else f'{noise:g}'}"
        )
    if update.train_loss is not None:
        return "the mean training loss came along, which leaks under privacy"
    return None
