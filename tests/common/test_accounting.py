"""Epsilon against published tables, exact formulas and the accountants of others."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from common import accounting
from common.accounting import Event, accounts, epsilon_pld, epsilon_prv, epsilon_rdp, merge, solve_noise
from common.errors import PrivacyError


def event(noise: float, rate: float, steps: int) -> Event:
    return Event(noise_multiplier=noise, sampling_rate=rate, steps=steps)


@pytest.mark.parametrize(
    ("rate", "steps", "noise", "rdp", "prv", "pld"),
    [
        # 500 patients, batch 32: a loader of 16 batches, 20 epochs
        (1 / 16, 320, 1.0, 8.44, 7.64, 7.63),
        # 2000 patients, batch 256: a loader of 8 batches, 30 epochs
        (1 / 8, 240, 2.0, 5.20, 4.78, 4.77),
    ],
)
def test_the_three_accountants_give_the_known_table(
    rate: float, steps: int, noise: float, rdp: float, prv: float, pld: float
) -> None:
    events = [event(noise, rate, steps)]
    assert epsilon_rdp(events, 1e-5) == pytest.approx(rdp, abs=0.006)
    assert epsilon_prv(events, 1e-5) == pytest.approx(prv, abs=0.006)
    assert epsilon_pld(events, 1e-5) == pytest.approx(pld, abs=0.006)


def test_much_noise_brings_no_warning_of_somebody_elses_before_a_persons_eyes(recwarn: pytest.WarningsRecorder) -> None:
    # the demo's smallest site: the best of the orders that are tried is the largest, 512
    assert 2.0 < epsilon_rdp([event(12.65, 1.0, 40)], 1e-5) < 2.3
    assert 1.9 < epsilon_prv([event(12.65, 1.0, 40)], 1e-5) < 2.1
    assert [str(warned.message) for warned in recwarn] == []


@pytest.mark.parametrize(
    ("noise", "epochs", "published"),
    [
        (1.3, 20, 1.34),  # moments accountant on MNIST: Bu et al. 2020 (Harvard Data Science Review), figure 4
        (0.7, 70, 8.68),  # the same figure
        (1.12, 60, 2.95),  # Opacus, documentation of compute_dp_sgd_privacy, before the conversion of Balle et al.
    ],
)
def test_the_published_moments_accountants_are_above_ours_and_not_by_much(
    noise: float, epochs: int, published: float
) -> None:
    """Batches of 256 of 60,000 at delta 1e-5. RDP's present conversion is tighter than the one of then, PLD again."""
    found = accounts([event(noise, 256 / 60000, round(epochs * 60000 / 256))], 1e-5)
    assert found.pld < found.rdp < published < 1.35 * found.pld


@settings(max_examples=6, deadline=None)
@given(st.floats(0.7, 4.0), st.one_of(st.floats(0.01, 0.5), st.just(1.0)), st.integers(20, 300))
def test_prv_agrees_and_rdp_bounds_wherever_one_looks(noise: float, rate: float, steps: int) -> None:
    found = accounts([event(noise, rate, steps)], 1e-5)
    assert found.pld == pytest.approx(found.prv, rel=0.01, abs=0.021)  # PRV's own error is 0.01, at both ends
    assert found.rdp > found.pld


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Exact epsilon of one Gaussian release (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta)

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 20), (10.0, 100), (30.0, 7), (300.0, 1)])
def test_without_sampling_epsilon_is_the_exact_one_of_the_gaussian(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(noise / math.sqrt(steps), 1e-5)
    got = epsilon_pld([event(noise, 1.0, steps)], 1e-5)
    assert exact <= got <= exact * 1.001


def test_rounds_times_epochs_cost_what_one_accountant_over_all_steps_says() -> None:
    rounds, epochs, patients, batch = 10, 3, 400, 40
    steps = epochs * patients // batch
    federated = [event(1.1, batch / patients, steps) for _ in range(rounds)]
    one = [event(1.1, batch / patients, rounds * steps)]
    assert epsilon_pld(federated, 1e-5) == epsilon_pld(one, 1e-5)
    # A fresh accountant each round would have reported far less.
    assert epsilon_pld(federated[:1], 1e-5) < 0.5 * epsilon_pld(federated, 1e-5)


def test_equal_events_merge_and_the_order_does_not_matter() -> None:
    a, b = event(1.0, 0.1, 5), event(2.0, 0.1, 7)
    assert merge([b, a, a, event(3.0, 0.5, 0)]) == (event(1.0, 0.1, 10), b)
    assert epsilon_pld([a, b, a], 1e-5) == epsilon_pld([b, a, a], 1e-5)


def test_the_bound_composes_different_events_as_prv_does() -> None:
    events = [event(1.0, 0.05, 100), event(1.5, 0.1, 50), event(4.0, 1.0, 3)]
    assert epsilon_pld(events, 1e-5) <= epsilon_prv(events, 1e-5) <= epsilon_pld(events, 1e-5) + 0.03
    assert epsilon_pld(events, 1e-5) < epsilon_rdp(events, 1e-5)


def test_the_step_that_int_of_one_over_q_loses_costs_epsilon() -> None:
    assert epsilon_pld([event(1.0, 0.1, 2)], 1e-5) > 1.05 * epsilon_pld([event(1.0, 0.1, 1)], 1e-5)
    rate = 32 / 500  # 1 / rate = 15.6
    run, accounted = 20 * math.ceil(1 / rate), 20 * int(1 / rate)
    assert epsilon_pld([event(1.0, rate, run)], 1e-5) > 1.02 * epsilon_pld([event(1.0, rate, accounted)], 1e-5)


noises = st.floats(0.6, 8.0)
rates = st.one_of(st.floats(0.005, 0.6), st.just(1.0))
counts = st.integers(1, 400)
GRID = 1.002  # two grids may round by this much differently


@settings(max_examples=8, deadline=None)
@given(noises, rates, counts, st.floats(1.1, 3.0), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta(
    noise: float, rate: float, steps: int, factor: float, delta: float
) -> None:
    base = epsilon_pld([event(noise, rate, steps)], delta)
    assert epsilon_pld([event(noise, rate, steps + math.ceil(steps * (factor - 1)))], delta) * GRID + 1e-9 >= base
    assert epsilon_pld([event(noise, min(1.0, rate * factor), steps)], delta) * GRID + 1e-9 >= base
    assert epsilon_pld([event(noise * factor, rate, steps)], delta) <= base * GRID + 1e-9
    assert epsilon_pld([event(noise, rate, steps)], delta * factor) <= base * GRID + 1e-9
    assert base <= epsilon_rdp([event(noise, rate, steps)], delta) * GRID + 1e-9


@settings(max_examples=12, deadline=None)
@given(st.floats(0.3, 20.0), rates, counts)
def test_solved_noise_keeps_the_budget_and_wastes_little(epsilon: float, rate: float, steps: int) -> None:
    noise = solve_noise(epsilon, 1e-5, rate, steps)
    assert 0.995 * epsilon <= epsilon_pld([event(noise, rate, steps)], 1e-5) <= epsilon


def test_noise_for_a_small_site_that_takes_everyone_each_step_is_that_of_one_gaussian() -> None:
    noise = solve_noise(8.0, 1e-5, 1.0, 100)
    # Exact: one Gaussian of noise / sqrt(100) at epsilon 8
    assert gaussian_epsilon(noise / 10, 1e-5) == pytest.approx(8, rel=0.006)


def test_no_budget_is_so_large_that_less_noise_than_the_lowest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "LOWEST_NOISE", 0.5)
    assert solve_noise(40.0, 1e-5, 1.0, 1) == 1 / 1.5  # the next would be 0.44


def test_steps_without_noise_have_no_privacy_and_no_steps_cost_nothing() -> None:
    assert epsilon_pld([event(0.0, 0.1, 1), event(5.0, 0.1, 10)], 1e-5) == math.inf
    assert epsilon_rdp([event(0.0, 0.1, 1)], 1e-5) == math.inf
    mixed = accounts([event(0.0, 0.1, 1), event(5.0, 0.1, 10)], 1e-5)
    assert (mixed.pld, mixed.prv, mixed.rdp) == (math.inf, math.inf, math.inf)
    with pytest.raises(PrivacyError, match="without noise"):
        epsilon_prv([event(0.0, 0.1, 1)], 1e-5)
    for epsilon in (epsilon_pld, epsilon_prv, epsilon_rdp):
        assert epsilon([], 1e-5) == epsilon([event(0.0, 0.1, 0)], 1e-5) == 0


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, -1),
        (1.0, 0.1, 1.5),
        (1.0, 0.1, True),
    ],
)
def test_numbers_outside_their_range_are_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(PrivacyError, match="expected"):
        event(noise, rate, steps)


def test_a_budget_that_no_noise_reaches_is_refused() -> None:
    for delta in (0.0, 1.0):
        with pytest.raises(PrivacyError, match="delta"):
            solve_noise(1.0, delta, 0.1, 10)
    for epsilon in (0.0, math.nan, math.inf):
        with pytest.raises(PrivacyError, match="epsilon"):
            solve_noise(epsilon, 1e-5, 0.1, 10)
    with pytest.raises(PrivacyError, match="at least 1"):
        solve_noise(1.0, 1e-5, 0.1, 0)
    with pytest.raises(PrivacyError, match="reaches epsilon"):
        solve_noise(1e-9, 1e-12, 1.0, 10**9)


def test_of_many_threads_that_ask_the_same_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    real = accounting._epsilon_at

    def slow(*words: Any) -> float:
        calls.append(words[2])
        time.sleep(0.05)
        return real(*words)

    monkeypatch.setattr(accounting, "_epsilon_at", slow)
    events = [Event(noise_multiplier=1.2345, sampling_rate=0.123, steps=7)]
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: epsilon_pld(events, 1e-4), range(8)))
    assert len(found) == 1
    assert calls
    assert len(calls) == len(set(calls))  # each grid once
