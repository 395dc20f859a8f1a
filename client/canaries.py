"""An empirical lower bound of epsilon from one training with the real engine.

Many made-up patients, canaries, are each put into the training or left out by the toss of a coin. The gradient of a
canary is one coordinate of a parameter that nobody else uses, the worst case of differential privacy: an attacker who
sees every released gradient guesses the coins as well as anybody can. So many right guesses would be impossible below
some epsilon; that one is the bound. Above the accountant's epsilon it proves that the promise is broken.

Source: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run" (NeurIPS), theorem 5.2;
white-box Dirac canaries of Nasr et al. 2023 (USENIX Security).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import nn

from client import train as work
from client.cohort import Cohort
from client.dp import Sampling
from client.dp.bookkeeping import Loss
from client.mechanism import Planned
from common.accounting import Event, epsilon_pld
from common.config import Recipe
from common.errors import PrivacyError
from common.models import build
from common.privacy_audit import Bound
from common.samples import Samples

CONFIDENCE = 0.95
_MARK = 12_345.0
"""First voxel of a canary; the second holds its number."""
_FILLERS = 16
"""Ordinary patients in the training beside the canaries."""
_PARTS = (2, 4, 10, 50)
"""Guess about the top and the bottom m / part of the scores; the best of these thresholds counts (Bonferroni)."""


def one_run(
    recipe: Recipe,
    plan: Planned,
    *,
    canaries: int = 1000,
    steps: int | None = None,
    device: torch.device | None = None,
    seed: int | None = None,
) -> Bound:
    """Trains once with canaries and bounds epsilon from below.

    Args:
        recipe: With privacy; its network, engine, draws, clip norm and noise are used.
        plan: Rate and noise of the site that is audited.
        canaries: More of them find more, and take longer.
        steps: Noised steps; None: as many as the whole run has. The accountant's bound is of the same steps.
        seed: Of the coins and the made-up images; None: of the operating system.

    Raises:
        PrivacyError: The engine refused, or there is no canary.
    """
    if canaries < max(_PARTS):
        raise PrivacyError(f"canaries: got {canaries}, expected at least {max(_PARTS)}")
    delta = recipe.privacy.delta
    assert delta is not None
    device = device or torch.device("cpu")
    steps = min(steps or plan.sampling.steps * recipe.rounds, plan.sampling.steps * recipe.rounds)
    rng = np.random.default_rng(seed)
    inside = rng.random(canaries) < 0.5
    score = _train(recipe, plan, inside, steps, device, rng)
    lower, guesses, right = lower_bound(score, inside, delta)
    event = Event(noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling.rate, steps=steps)
    return Bound(
        canaries=canaries, steps=steps, guesses=guesses, right=right, lower=lower,
        upper=epsilon_pld([event], delta), delta=delta, confidence=CONFIDENCE,
    )  # fmt: skip


def lower_bound(score: npt.NDArray[np.float64], inside: npt.NDArray[np.bool_], delta: float) -> tuple[float, int, int]:
    """Epsilon is at least the first number, with `CONFIDENCE`.

    Args:
        score: One a canary; higher says "was in the training".
        inside: The coins.

    Returns:
        The bound, and of the threshold that gave it: guesses, right guesses.
    """
    order, count = np.argsort(score, kind="stable"), len(score)
    best = (0.0, 0, 0)
    for part in _PARTS:
        k = count // part
        right = int(inside[order[-k:]].sum() + (~inside[order[:k]]).sum())
        found = _epsilon(count, 2 * k, right, delta, (1 - CONFIDENCE) / len(_PARTS))
        best = max(best, (found, 2 * k, right))
    return best


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Chance of so many right guesses under (epsilon, delta)-differential privacy, or more than that.

    Source: Steinke et al. 2023, appendix D.
    """
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, q))
    found = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    alpha = float((found / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + 2 * canaries * delta * alpha)


def _epsilon(canaries: int, guesses: int, right: int, delta: float, level: float) -> float:
    def rejected(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) < level

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high) and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


class _WithCanaries(nn.Module):
    """The recipe's network; a canary goes past it into one weight of its own.

    Output: (B, classes + 2): logits, the canary's weight (0 for patients), whether it is a canary.
    """

    def __init__(self, network: nn.Module, canaries: int) -> None:
        super().__init__()
        self.network = network
        self.canary = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.canary.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = x.flatten(1)
        marked = head[:, :1] == _MARK
        numbers = torch.arange(self.canary.in_features, device=x.device)
        mine = ((head[:, 1:2] == numbers) & marked).to(x.dtype)
        quiet = torch.where(marked.view(-1, *[1] * (x.ndim - 1)), torch.zeros_like(x), x)
        return torch.cat([self.network(quiet), self.canary(mine), marked.to(x.dtype)], dim=1)


def _loss(loss_B: Loss, scale: float) -> Loss:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.where(output[:, -1] > 0, scale * output[:, -2], loss_B(output[:, :-2], target))

    return loss


def _train(
    recipe: Recipe, plan: Planned, inside: npt.NDArray[np.bool_], steps: int, device: torch.device,
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """One training; returns each canary's log likelihood ratio of in against out, given all released gradients."""
    model = _WithCanaries(build(recipe), len(inside)).to(device).train()
    clip, batch = recipe.privacy.clip_norm, recipe.training.batch_size
    cohort, fillers = _cohort(recipe, inside, rng)
    numbers = np.concatenate([np.full(_FILLERS, -1), np.flatnonzero(inside)])
    private = work.Private(
        sampling=Sampling(rate=plan.sampling.rate, steps=steps), noise_multiplier=plan.noise_multiplier,
        noise=work.site_noise(recipe, 1, "audit"),
    )  # fmt: skip
    # far above the clip norm, which may adapt: only what the engine's clip lets through counts
    engine = work.private_gradient(model, _loss(work.record_loss(recipe), 1e4 * clip), recipe, private)
    score = np.zeros(len(inside))
    rate, sigma = plan.sampling.rate, plan.gradient_noise(recipe)
    for rows in work.private_batches(cohort, private, rng, recipe.privacy.views):
        x = np.zeros((len(rows), *fillers.shape[1:]), np.float32)  # made anew: all canaries' images would be gigabytes
        flat, canary = x.reshape(len(rows), -1), numbers[rows]  # of the first a view
        flat[canary >= 0, 0], flat[canary >= 0, 1] = _MARK, canary[canary >= 0]
        x[canary < 0] = fillers[rows[canary < 0]]
        target = torch.from_numpy(np.ascontiguousarray(cohort.samples.targets_N[rows]))
        clip = engine.clip_norm
        engine.step(torch.from_numpy(x).to(device), target.to(device))
        grad = model.canary.weight.grad
        assert grad is not None
        released = grad[0].double().cpu().numpy() * (batch / clip)
        # drawn with chance `rate`, then one clip norm more: Gaussians of mean 1 and 0
        ratio = (released - 0.5) / sigma**2
        score += np.logaddexp(math.log1p(-rate), math.log(rate) + ratio) if rate < 1 else ratio
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=recipe.training.lr)
    return score


def _cohort(
    recipe: Recipe, inside: npt.NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Cohort, npt.NDArray[np.float32]]:
    """Some patients, then the canaries that the coin put in, an image each; and the images of those patients."""
    count, outputs = _FILLERS + int(inside.sum()), recipe.task.outputs
    shape = (1, *recipe.data.size)
    class_N = np.arange(count) % outputs
    multilabel = recipe.task.kind == "multilabel"
    targets_N = np.eye(outputs, dtype=np.float32)[class_N] if multilabel else class_N.astype(np.int64)
    names = tuple(f"p{n}" for n in range(count))
    nothing = np.broadcast_to(np.float32(0), (count, *shape))
    samples = Samples(nothing, targets_N, np.arange(count), names, {}, "")
    cohort = Cohort(samples, np.full(count, "train"), "", {}, outputs)
    fillers: npt.NDArray[np.float32] = rng.standard_normal((_FILLERS, *shape), dtype=np.float32)
    return cohort, fillers
