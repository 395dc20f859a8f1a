"""Was this patient in the training? Asked of the global model, and of one site's update.

Many small federations are trained, each on a random half of the same patients, with the `train` that sites run.
Every one is the target once, all others are the attacker's shadow models.

Source: Yeom et al. 2018 (loss threshold); Carlini et al. 2022, "Membership Inference Attacks From First Principles"
(LiRA, online, with one variance for all patients as they advise for few shadow models).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from client import train as work
from client.cohort import Cohort
from client.mechanism import planned
from common.config import Recipe
from common.inference import logits
from common.metrics import probabilities
from common.models import build, get_weights, set_weights
from common.samples import Samples
from common.weights import Weights

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Success:
    """How well members are told from others."""

    auroc: float
    auroc_sd: float
    """Standard deviation over the targets."""
    tpr: float
    """Members found at a false-positive rate of 0.1 %; 0.001 is guessing."""
    tpr_low: float
    tpr_high: float
    """95 % interval (Clopper and Pearson), as if the targets were independent."""
    negatives: int
    """Decisions about non-members; fewer than 1,000 cannot show 0.1 %."""

    @property
    def area(self) -> str:
        """The AUC as it is shown."""
        return f"{self.auroc:.3f} ± {self.auroc_sd:.3f}"

    @property
    def rate(self) -> str:
        """Members found, as it is shown."""
        return f"{100 * self.tpr:.2f} % ({100 * self.tpr_low:.2f}-{100 * self.tpr_high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """The attacks on one recipe."""

    lira: Success
    threshold: Success
    update: Success
    """LiRA on the first site's last update, put on the model it started from: its patients against who is nowhere."""
    update_threshold: Success
    """The loss threshold on the same."""
    utility: tuple[float, ...]
    """Test AUROC of every federation."""
    noise_multiplier: float | None
    """None without privacy."""


def attack(
    recipe: Recipe,
    pool: Samples,
    test: Samples,
    *,
    models: int,
    sites: int,
    seed: int = 0,
    network: Callable[[], nn.Module] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Attacked:
    """Trains the federations and attacks each of them.

    Args:
        recipe: A binary task; each round's updates are averaged with equal weights.
        pool: Half of these are in each training; one sample each.
        test: For the utility; nobody trains on them.
        models: Federations; each is a target once and a shadow model for the others.
        sites: Into how many the members are dealt.
        seed: Of who is in and who is where. The noise of a private recipe is secret and has none.
        network: Gives the network, with the same first weights at every call; None: the recipe's.
    """
    rng = np.random.default_rng(seed)
    count = len(pool.x_N)
    model, utility = build(recipe) if network is None else network(), []
    start = get_weights(model)
    inside, of_first = np.zeros((models, count), bool), np.zeros((models, count), bool)
    sure, sure_first = np.zeros((models, count)), np.zeros((models, count))
    for at in range(models):
        members = rng.permutation(count)[: count // 2]
        inside[at, members] = True
        shares = np.array_split(members, sites)
        of_first[at, shares[0]] = True
        weights, of_site = _federation(recipe, pool, shares, model, start, seed + at)
        sure[at] = _confidence(model, weights, pool)
        sure_first[at] = _confidence(model, of_site, pool)
        set_weights(model, weights)
        p_NC = probabilities(logits(model, test.x_N, np.arange(len(test.x_N)), device=CPU), recipe.task.kind)
        utility.append(float(roc_auc_score(test.targets_N, p_NC[:, 1])))
        done(at + 1)
    patients = len(np.array_split(np.arange(count // 2), sites)[0])
    return Attacked(
        lira=success(lira(sure, inside, ~inside), inside),
        threshold=success(sure, inside),
        # members of the other sites are left out: one site's update is about its own patients
        update=success(lira(sure_first, of_first, ~inside), of_first, of_first | ~inside),
        update_threshold=success(sure_first, of_first, of_first | ~inside),
        utility=tuple(utility),
        noise_multiplier=planned(recipe, patients).noise_multiplier if recipe.privacy.active else None,
    )


def lira(sure: Floats, inside: Flags, outside: Flags) -> Floats:
    """Log likelihood ratio of "was in the training" for every model and patient.

    Args:
        sure: (models, patients): log-odds of the true class; nearly normal for one patient over models.
        inside: (models, patients): who was in which training.
        outside: Who was not; a patient may be neither.

    Returns:
        (models, patients); each model's scores come from the other models alone.
    """
    score = np.zeros_like(sure)
    for target in range(len(sure)):
        others = np.arange(len(sure)) != target
        value, means, spreads = sure[others], [], []
        for chosen in (inside[others], outside[others]):
            count = chosen.sum(0)
            total = np.where(chosen, value, 0).sum(0)
            mean = np.where(count > 0, total / np.maximum(count, 1), value.mean(0))
            off = np.where(chosen, (value - mean) ** 2, 0)
            means.append(mean)
            spreads.append(math.sqrt(off.sum() / max(int(np.maximum(count - 1, 0).sum()), 1)) + 1e-12)
        score[target] = stats.norm.logpdf(sure[target], means[0], spreads[0])
        score[target] -= stats.norm.logpdf(sure[target], means[1], spreads[1])
    return score


def success(score: Floats, inside: Flags, chosen: Flags | None = None) -> Success:
    """Counts over all targets together; `chosen` leaves decisions out."""
    chosen = np.ones_like(inside) if chosen is None else chosen
    each = [roc_auc_score(inside[m][chosen[m]], score[m][chosen[m]]) for m in range(len(score))]
    flat, truth = score[chosen], inside[chosen]
    others = np.sort(flat[~truth])[::-1]
    bar = others[int(0.001 * len(others))]  # so many of them may lie above
    found, members = int((flat[truth] > bar).sum()), int(truth.sum())
    low, high = stats.binomtest(found, members).proportion_ci(0.95, method="exact")
    return Success(
        auroc=float(roc_auc_score(truth, flat)), auroc_sd=float(np.std(each, ddof=1)) if len(each) > 1 else 0.0,
        tpr=found / members, tpr_low=float(low), tpr_high=float(high), negatives=len(others),
    )  # fmt: skip


def _federation(
    recipe: Recipe, pool: Samples, shares: list[npt.NDArray[np.int64]], model: nn.Module, start: Weights, seed: int
) -> tuple[Weights, Weights]:
    """Final weights, and those of the first site after its last update. FedAvg over the sites' own `train`."""
    recipe = replace(recipe, seed=recipe.seed + seed)  # other batches for every federation; `start` is the same
    cohorts = {f"site{n}": _cohort(pool, np.sort(share)) for n, share in enumerate(shares)}
    weights = of_site = start
    for round_ in range(1, recipe.rounds + 1):
        deltas = []
        for name, cohort in cohorts.items():
            private = None
            if recipe.privacy.active:
                plan = planned(recipe, cohort.patients("train"))
                private = work.Private(
                    sampling=plan.sampling, noise_multiplier=plan.noise_multiplier,
                    noise=work.site_noise(recipe, round_, name),
                )  # fmt: skip
            done = work.train(
                model, weights, cohort, recipe, round_=round_, site=name, device=CPU, private=private
            )  # fmt: skip
            deltas.append(done.delta)
        of_site, total = weights + deltas[0], deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        weights = weights + total * (1 / len(deltas))
    return weights, of_site


def _cohort(pool: Samples, index: npt.NDArray[np.int64]) -> Cohort:
    samples = Samples(
        x_N=pool.x_N[index], targets_N=pool.targets_N[index], patient_N=np.arange(len(index)),
        patients=tuple(f"p{n}" for n in index), subgroups={}, digest="",
    )  # fmt: skip
    return Cohort(samples, np.full(len(index), "train"), "", {}, 2)


def _confidence(model: nn.Module, weights: Weights, pool: Samples) -> Floats:
    """Log-odds of the true class."""
    set_weights(model, weights)
    raw = logits(model, pool.x_N, np.arange(len(pool.x_N)), device=CPU).astype(np.float64)
    sign = np.where(pool.targets_N == 1, 1.0, -1.0)
    odds: Floats = sign * (raw[:, 1] - raw[:, 0])
    return odds
