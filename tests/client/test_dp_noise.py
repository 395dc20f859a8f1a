"""Noise against its distribution, ChaCha20 against RFC 8439, sampling against the binomial."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from client.dp import Noise, keystream_noise, os_noise, poisson_patients, sampling, seeded_noise
from client.dp.noise import keystream
from client.dp.rules import check_delta
from common.errors import PrivacyError

FALSE_ALARM = 1e-7

SOURCES = pytest.mark.parametrize(
    "noise", [os_noise(), keystream_noise(), seeded_noise(3)], ids=["os", "keystream", "seeded"]
)


@SOURCES
def test_noise_is_standard_normal_and_independent_from_one_number_to_the_next(noise: Noise) -> None:
    count = 400_000
    values = noise.normal(torch.empty(count)).numpy().astype(np.float64)
    assert stats.kstest(values, "norm").pvalue > FALSE_ALARM
    # count * variance is chi-squared with count degrees of freedom
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count) / count
    assert low < np.mean(values**2) < high
    limit = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(count)
    assert abs(values.mean()) < limit
    for lag in (1, 2, 624, 1 << 17):
        assert abs(np.mean(values[:-lag] * values[lag:])) < limit * math.sqrt(count / (count - lag))


@SOURCES
def test_uniform_numbers_are_uniform_and_below_one(noise: Noise) -> None:
    values = noise.uniform(300_000)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM


@SOURCES
def test_noise_takes_the_shape_and_type_of_its_model_and_never_repeats(noise: Noise) -> None:
    like = torch.empty(3, 4, 5, dtype=torch.float64)
    first, second = noise.normal(like), noise.normal(like)
    assert (first.shape, first.dtype) == (like.shape, like.dtype)
    assert not (first == second).any()
    assert noise.normal(torch.empty(0)).shape == (0,)
    assert noise.normal(torch.empty(())).isfinite()


@pytest.mark.parametrize("noise", [os_noise(), keystream_noise()], ids=["os", "keystream"])
def test_no_number_comes_twice_in_one_long_call(noise: Noise) -> None:
    # More than two blocks of 2^17 numbers of 53 bits: two are equal by chance once in a quarter of a million runs.
    assert len(np.unique(noise.uniform((1 << 18) + 5))) == (1 << 18) + 5


def test_two_secret_sources_differ_and_only_seeded_noise_repeats() -> None:
    like = torch.empty(100)
    for secret in (os_noise, keystream_noise):
        assert secret().secret
        assert not (secret().normal(like) == secret().normal(like)).any()
        assert not (secret().uniform(100) == secret().uniform(100)).any()
    assert not seeded_noise(5).secret
    assert torch.equal(seeded_noise(5).normal(like), seeded_noise(5).normal(like))
    assert not (seeded_noise(5).normal(like) == seeded_noise(6).normal(like)).any()


def test_the_state_of_os_noise_holds_far_more_than_the_32_bits_that_a_seed_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The reason: two seeds that differ above bit 31 are the same to torch.
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1 + 2**32)
    assert torch.equal(torch.randn(9, generator=a), torch.randn(9, generator=b))
    drawn: list[int] = []
    real = os.urandom
    monkeypatch.setattr("client.dp.noise.os.urandom", lambda size: drawn.append(size) or real(size))
    os_noise().normal(torch.empty(1))
    assert sum(drawn) == 4 * 624


def test_a_torch_that_keeps_its_state_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if what is written to the state changed nothing: the words that a seed of 0 gives are those that are drawn.
    state = torch.Generator().manual_seed(0).get_state().numpy()[24 : 24 + 8 * 624]
    same = state.view("<u8").astype("<u4").tobytes()
    monkeypatch.setattr("client.dp.noise.os.urandom", lambda size: same[:size])
    with pytest.raises(PrivacyError, match="the noise would be guessable"):
        os_noise().normal(torch.empty(1))


def test_the_keystream_is_that_of_rfc_8439() -> None:
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter zero
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert keystream(bytes(32), 32).hex() == expected


def test_every_patient_is_drawn_independently_with_the_rate() -> None:
    noise, count, rate, draws = keystream_noise(), 50, 0.2, 4000
    taken = np.zeros(count)
    sizes = []
    for _ in range(draws):
        patients = poisson_patients(count, rate, noise)
        assert patients.dtype == np.int64
        taken[patients] += 1
        sizes.append(len(patients))
    low, high = stats.binom.ppf([FALSE_ALARM / count, 1 - FALSE_ALARM / count], draws, rate)
    assert low <= taken.min() <= taken.max() <= high
    # The batch size is binomial, not fixed: variance 50 * 0.2 * 0.8 = 8
    variance = np.var(sizes)
    assert 6.5 < variance < 9.7


def test_rate_one_draws_everyone_and_rate_zero_nobody() -> None:
    assert poisson_patients(7, 1.0, os_noise()).tolist() == list(range(7))
    assert poisson_patients(7, 0.0, os_noise()).tolist() == []


@pytest.mark.parametrize(
    ("patients", "batch", "epochs", "rate", "steps"),
    [
        (500, 32, 20, 0.064, 313),  # 20 * 15.625 = 312.5, up
        (30, 10, 3, 1 / 3, 9),  # no step too many through rounding
        (10, 32, 2, 1.0, 2),  # a small site takes everyone
        (1, 32, 2, 1.0, 2),
        (1000, 10, 0.001, 0.01, 1),
    ],
)
def test_a_round_has_the_steps_that_its_epochs_ask_for(
    patients: int, batch: int, epochs: float, rate: float, steps: int
) -> None:
    plan = sampling(patients, batch, epochs)
    assert plan.rate == pytest.approx(rate)
    assert plan.steps == steps


def test_no_patients_and_a_delta_of_one_in_the_patients_are_refused() -> None:
    with pytest.raises(PrivacyError, match="no training patients"):
        sampling(0, 32, 1)
    check_delta(1e-3, 500)
    for delta, patients in ((1e-3, 1000), (1.0, 0), (0.0, 500), (-1e-3, 500)):
        with pytest.raises(PrivacyError, match="delta"):
            check_delta(delta, patients)


def test_the_last_numbers_of_the_grid_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = keystream_noise()
    for value, share in ((0.0, 2.0**-54), (1 - 2.0**-53, 1 - 2.0**-53)):
        monkeypatch.setattr(type(noise), "uniform", lambda self, count, value=value: np.full(count, value))
        found = noise.normal(torch.empty(3, dtype=torch.float64)).numpy()
        assert found == pytest.approx(stats.norm.ppf(share))  # -8.3 and 8.2
