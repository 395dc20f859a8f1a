"""Noised steps become an epsilon.

The epsilon of record comes from privacy loss distributions (PLD, `dp-accounting`); PRV and RDP
(Opacus) are cross-checks that no decision rests on. All three are for the Poisson-subsampled
Gaussian mechanism under adding or removing one patient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, wraps
from threading import RLock
from typing import Any, ParamSpec, cast

import numpy as np

from common.errors import PrivacyError

_INTERVALS = (1e-2, 2.5e-3, 6.25e-4, 1.5625e-4, 3.90625e-5, 1e-5)
# Connect-the-dots discretisation errs by the square of the interval: when a fourfold finer grid
# changes epsilon by less than this share, what is left is about a fifteenth of it.
_SETTLED = 1e-3
_FINEST_POINTS = 4e6  # of a composed distribution; beyond it the last (larger) epsilon stands
LOWEST_NOISE, _HIGHEST_NOISE = 0.05, 1e6
"""Of the noise multipliers that are considered for a budget."""


_P = ParamSpec("_P")


def _once(maxsize: int) -> Callable[[Callable[_P, float]], Callable[_P, float]]:
    """`lru_cache` for what takes long: of many threads that ask the same, one computes and the others wait for it."""

    def wrap(function: Callable[_P, float]) -> Callable[_P, float]:
        kept, door = cast("Callable[_P, float]", lru_cache(maxsize)(function)), RLock()

        @wraps(function)
        def asked(*words: _P.args, **more: _P.kwargs) -> float:
            with door:
                return kept(*words, **more)

        return asked

    return wrap


@dataclass(frozen=True, kw_only=True)
class Event:
    """Equal noised steps: each took every patient with `sampling_rate` and added Gaussian noise to the sum.

    Raises:
        PrivacyError: A number is outside its range.
    """

    noise_multiplier: float
    """Standard deviation of the noise over the clip norm; 0 means no privacy."""
    sampling_rate: float
    """Chance of each patient to be in a step, independently; in (0, 1]."""
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(f"noise multiplier: got {self.noise_multiplier}, expected a finite number of at least 0")
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"sampling rate: got {self.sampling_rate}, expected a number in (0, 1]")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise PrivacyError(f"steps: got {self.steps!r}, expected a whole number of at least 0")


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events of equal noise and rate become one, in a fixed order; empty ones go.

    Composition does not depend on the order, and fifty distinct events cost fifty times one.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (float(event.noise_multiplier), float(event.sampling_rate))
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(
        Event(noise_multiplier=noise, sampling_rate=rate, steps=count)
        for (noise, rate), count in sorted(steps.items())
        if count
    )


def epsilon_pld(events: Iterable[Event], delta: float) -> float:
    """The epsilon of record of all these steps together.

    An upper bound at every grid: mass is rounded towards more loss, and truncated tails count
    as infinite loss. The grid is refined until epsilon settles, so it is about 0.01 % above the
    exact value; between two nearly equal requests that much may also be lost in monotony.

    Args:
        events: Any number, in any order.
        delta: In (0, 1); below one over the number of patients to mean anything.

    Returns:
        Epsilon; 0 for no steps, infinite when a step had no noise.

    Source: Doroshenko et al. 2022, Connect the Dots (PoPETs).
    """
    return _epsilon_pld(merge(events), _checked(delta))


def epsilon_prv(events: Iterable[Event], delta: float) -> float:
    """Cross-check: upper end of the PRV accountant (Gopi et al. 2021), error 0.01.

    Raises:
        PrivacyError: An event has no noise.
    """
    return _epsilon_prv(merge(events), _checked(delta))


def epsilon_rdp(events: Iterable[Event], delta: float) -> float:
    """Cross-check: Renyi accountant (Mironov et al. 2019) with the conversion of Balle et al. 2020; looser."""
    return _epsilon_rdp(merge(events), _checked(delta))


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """One cost by three accountants, at one delta."""

    pld: float
    """The epsilon of record."""
    prv: float
    """Upper end of another numerical accountant: within 1 % of `pld`, or 0.02 below epsilon 2."""
    rdp: float
    """An older, looser bound: never below `pld`, by rounding; commonly 5 to 20 % above."""


def accounts(events: Iterable[Event], delta: float) -> Accounts:
    """The epsilon of record with its cross-checks beside it; infinite for steps without noise."""
    merged = merge(events)
    noisy = all(event.noise_multiplier > 0 for event in merged)
    return Accounts(
        pld=epsilon_pld(merged, delta),
        prv=epsilon_prv(merged, delta) if noisy else math.inf,
        rdp=epsilon_rdp(merged, delta),
    )


def solve_noise(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier found for a budget.

    Args:
        epsilon: Budget of all the steps together, above 0.
        delta: In (0, 1).
        sampling_rate: In (0, 1].
        steps: All noised steps of the run, over all rounds.

    Returns:
        A multiplier whose `epsilon_pld` lies between 0.995 `epsilon` and `epsilon` (below that only at the
        lowest noise that is considered).

    Raises:
        PrivacyError: An argument is outside its range, or no noise reaches the budget.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon: got {epsilon}, expected a finite number above 0")
    # The event checks rate and steps.
    events = merge([Event(noise_multiplier=1.0, sampling_rate=sampling_rate, steps=steps)])
    if not events:
        raise PrivacyError("steps: got 0, expected at least 1: without steps there is no noise to solve for")
    return _solve_noise(float(epsilon), _checked(delta), float(sampling_rate), steps)


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta: got {delta}, expected a number in (0, 1)")
    return float(delta)


@_once(maxsize=1024)
def _epsilon_pld(events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return 0.0
    if events[0].noise_multiplier == 0:
        return math.inf
    best = math.inf
    for interval in _INTERVALS:
        epsilon = _epsilon_at(events, delta, interval)
        before, best = best, min(best, epsilon)
        if math.isfinite(before) and before - epsilon <= _SETTLED * best:
            break
        if math.isfinite(best) and 4 * best / interval > _FINEST_POINTS:
            break
    return best


def _epsilon_at(events: tuple[Event, ...], delta: float, interval: float) -> float:
    # Imported here: it takes a second, and most of Fedicom's commands need none of it.
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = pld.identity(value_discretization_interval=interval)
    for event in events:
        if event.sampling_rate == 1:  # Gaussians compose exactly
            one = pld.from_gaussian_mechanism(
                event.noise_multiplier / math.sqrt(event.steps), value_discretization_interval=interval
            )
        else:
            one = _step(event.noise_multiplier, event.sampling_rate, interval)
            one = one.self_compose(event.steps) if event.steps > 1 else one
        total = total.compose(one)
    return max(0.0, float(total.get_epsilon_for_delta(delta)))


@lru_cache(maxsize=32)
def _step(noise_multiplier: float, sampling_rate: float, interval: float) -> Any:
    """The distribution of one step: every round of a run composes the same ones, of all studies of a site's ledger.

    With fewer places than studies times intervals none would be there when it is asked for again. One takes 13 MB
    (noise 1, the finest interval), mostly less.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_rate
    )


@lru_cache(maxsize=256)
def _epsilon_prv(events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return 0.0
    if events[0].noise_multiplier == 0:
        raise PrivacyError("the PRV accountant has no answer for steps without noise: their epsilon is infinite")
    from opacus.accountants import PRVAccountant

    _without_advice()  # its domain comes from RDP
    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events]
    with np.errstate(divide="ignore"):  # the log of 1 - q at q = 1, which Opacus then masks
        return float(accountant.get_epsilon(delta, eps_error=0.01))


def _without_advice() -> None:
    # With much noise RDP's best order is the largest one: the bound holds, a little loosely.
    warnings.filterwarnings("ignore", "Optimal order is the largest alpha")


@lru_cache(maxsize=256)
def _epsilon_rdp(events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return 0.0
    if events[0].noise_multiplier == 0:
        return math.inf
    from opacus.accountants import RDPAccountant

    _without_advice()
    accountant = RDPAccountant()
    accountant.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events]
    orders = [*RDPAccountant.DEFAULT_ALPHAS, 64, 96, 128, 192, 256, 512]
    return float(accountant.get_epsilon(delta, alphas=orders))


@_once(maxsize=256)
def _solve_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    def cost(noise: float) -> float:
        """Log of the share of the budget that this noise spends; falls with the noise."""
        event = Event(noise_multiplier=noise, sampling_rate=rate, steps=steps)
        # 1e-12: epsilon reaches exactly 0 at very large noise
        return math.log(max(epsilon_pld([event], delta), 1e-12) / epsilon)

    # Bracket from above: little noise makes wide distributions, which are slow.
    high = max(1.0, rate * math.sqrt(steps) / epsilon)
    while (cost_high := cost(high)) > 0:
        high *= 2
        if high > _HIGHEST_NOISE:
            raise PrivacyError(
                f"no noise multiplier up to {_HIGHEST_NOISE:g} reaches epsilon {epsilon:g} at delta {delta:g} with "
                f"{steps} steps at rate {rate:g}; take fewer steps, smaller batches or a larger epsilon"
            )
    low, cost_low = high, cost_high
    while cost_low <= 0:
        high, cost_high = low, cost_low
        low = low / 1.5
        if low < LOWEST_NOISE:
            return high
        cost_low = cost(low)
    aim = math.log(0.9975)
    while cost_high < math.log(0.995):
        # Log epsilon is nearly linear in log noise, so the chord lands close; never hug an end.
        share = min(max((cost_low - aim) / (cost_low - cost_high), 0.02), 0.98)
        middle = low * (high / low) ** share
        if not low < middle < high or high / low < 1 + 1e-9:
            break
        cost_middle = cost(middle)
        if cost_middle > 0:
            low, cost_low = middle, cost_middle
        else:
            high, cost_high = middle, cost_middle
    return high
