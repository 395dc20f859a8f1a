"""What a site says it spent, held against the terms that it told; and what a lying site can do with such terms."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from common.accounting import Event, epsilon_prv, epsilon_rdp
from common.exchange import Spent
from server.accounts import cross_checks

SPENT = Spent(epsilon=1.0, delta=1e-5, noise_multiplier=2.0, clip_norm=1.0, sampling_rate=0.1, steps=100)


def test_a_sites_terms_are_counted_once_more_by_two_accountants() -> None:
    event = [Event(noise_multiplier=2.0, sampling_rate=0.1, steps=100)]
    found = cross_checks(SPENT)
    assert found is not None
    assert (found.prv, found.rdp) == (epsilon_prv(event, 1e-5), epsilon_rdp(event, 1e-5))


@pytest.mark.parametrize(
    "terms",
    [
        {"noise_multiplier": 0.3, "sampling_rate": 0.99, "steps": 100_000},  # the grids of PLD and PRV: 921 GiB
        {"noise_multiplier": 1.0, "sampling_rate": 1e-9, "steps": 1_000_000_000},
        {"noise_multiplier": 0.05, "sampling_rate": 0.5, "steps": 1_000_000_000},
    ],
)
def test_terms_that_no_training_has_cost_the_coordinator_neither_time_nor_memory(terms) -> None:
    found = cross_checks(replace(SPENT, **terms))
    assert found is not None
    assert found.prv is None
    assert found.rdp > 0


@pytest.mark.parametrize(
    "terms",
    [
        {"epsilon": 1e308}, {"noise_multiplier": 1e300}, {"sampling_rate": 1e-300},
        {"steps": 10**10}, {"steps": 10**400},
    ],
)  # fmt: skip
def test_numbers_that_no_account_has_are_not_read(terms) -> None:
    with pytest.raises(ValidationError):
        replace(SPENT, **terms)
