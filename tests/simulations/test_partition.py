"""Partitioners: nobody twice, nobody lost, and the skew that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from simulations.partition import ByColumn, Dirichlet, Iid, Partition, Quantity


def _labels(counts: tuple[int, ...]) -> list[str]:
    return [str(one) for one, count in enumerate(counts) for _ in range(count)]


PARTITIONS = st.one_of(
    st.builds(Iid, seed=st.integers(0, 99)),
    st.builds(Quantity, power=st.floats(0, 3), seed=st.integers(0, 99)),
    st.builds(lambda alpha, seed: Dirichlet(alpha, seed, 1, 0), st.floats(0.5, 100), st.integers(0, 99)),
    st.just(ByColumn("ward")),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PARTITIONS, st.integers(1, 6), st.tuples(st.integers(6, 60), st.integers(6, 60)))
def test_every_patient_goes_to_one_site_and_no_site_stays_empty(
    partition: Partition, sites: int, counts: tuple[int, int]
) -> None:
    labels = _labels(counts)
    wards = {"ward": [f"ward {index % 6}" for index in range(len(labels))]}

    sites_P = partition.assign(labels, wards, sites)

    assert sites_P.shape == (len(labels),)
    assert sites_P.dtype == np.int64
    assert sorted(set(sites_P.tolist())) == list(range(sites))
    assert np.array_equal(sites_P, partition.assign(labels, wards, sites))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 8), st.integers(0, 5))
def test_iid_sizes_differ_by_at_most_one(extra: int, sites: int, seed: int) -> None:
    sizes = np.bincount(Iid(seed).assign(["a"] * (sites + extra), {}, sites), minlength=sites)
    assert sizes.max() - sizes.min() <= 1


def test_iid_keeps_the_mix_of_classes_within_chance() -> None:
    labels = np.array(_labels((2000, 2000)))
    sites_P = Iid(seed=3).assign(labels.tolist(), {}, 4)
    for site in range(4):
        # 1000 draws: standard deviation .016 and below, so .06 is four of them
        assert abs((labels[sites_P == site] == "1").mean() - 0.5) < 0.06


def test_quantity_shares_are_met_exactly() -> None:  # 100 patients in shares 5 : 3 : 2
    sizes = np.bincount(Quantity(shares=(5, 3, 2), seed=1).assign(["a"] * 100, {}, 3))
    assert sizes.tolist() == [50, 30, 20]


def test_quantity_power_one_halves_the_second_site() -> None:  # 1 + 1/2 + 1/3 = 11/6, so 66, 33, 22 of 121
    sizes = np.bincount(Quantity(power=1, seed=1).assign(["a"] * 121, {}, 3))
    assert sizes.tolist() == [66, 33, 22]


def test_a_tiny_share_still_gets_one_patient() -> None:
    sizes = np.bincount(Quantity(shares=(1e9, 1), seed=0).assign(["a"] * 10, {}, 2))
    assert sizes.tolist() == [9, 1]


def test_dirichlet_meets_its_minima() -> None:
    labels = np.array(_labels((120, 60)))
    for seed in range(10):
        sites_P = Dirichlet(alpha=0.5, seed=seed, min_patients=12, min_per_class=3).assign(labels.tolist(), {}, 5)
        for site in range(5):
            mine = labels[sites_P == site]
            assert len(mine) >= 12
            assert min((mine == "0").sum(), (mine == "1").sum()) >= 3


def test_a_smaller_alpha_skews_more() -> None:
    labels = np.array(_labels((500, 500)))

    def skew(alpha: float) -> float:
        spread = []
        for seed in range(8):
            sites_P = Dirichlet(alpha, seed, min_patients=2, min_per_class=0).assign(labels.tolist(), {}, 4)
            spread.append(np.std([(labels[sites_P == site] == "1").mean() for site in range(4)]))
        return float(np.mean(spread))

    assert skew(0.3) > 2 * skew(3.0) > 2 * skew(100.0)


def test_another_seed_deals_other_patients() -> None:
    labels = _labels((40, 40))
    for kind in (Iid, lambda seed: Quantity(seed=seed), lambda seed: Dirichlet(seed=seed)):
        assert not np.array_equal(kind(0).assign(labels, {}, 3), kind(1).assign(labels, {}, 3))


def test_a_column_value_is_never_divided_and_the_load_is_balanced() -> None:
    wards = ["a"] * 6 + ["b"] * 3 + ["c"] * 2 + ["d"]  # a alone at the first site; b, c, d at the second
    sites_P = ByColumn("ward").assign(["x"] * 12, {"ward": wards}, 2)
    assert sites_P.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize(
    ("partition", "sites", "error", "words"),
    [
        (Iid(), 11, DataError, "10 patients cannot fill 11 sites"),
        (Iid(), 0, ConfigError, "at least 1"),
        (Quantity(shares=(1, 2)), 3, ConfigError, "expected 3 positive numbers"),
        (Quantity(shares=(1, -2, 1)), 3, ConfigError, "expected 3 positive numbers"),
        (Dirichlet(alpha=0), 2, ConfigError, "alpha"),
        (Dirichlet(min_patients=6), 2, DataError, "raise alpha"),
        (ByColumn("ward"), 2, DataError, "1 different values"),
        (ByColumn("wing"), 2, ConfigError, "expected one of ward"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(
    partition: Partition, sites: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        partition.assign(["a"] * 10, {"ward": ["w"] * 10}, sites)


def test_the_most_frequent_value_is_placed_first() -> None:
    # c (2 patients) to the first site, a and b (1 each) to the other; by name it would be a and c, and b alone
    values = ["a", "b", "c", "c"]
    assert ByColumn("scanner").assign(["x"] * 4, {"scanner": values}, 2).tolist() == [1, 1, 0, 0]


def test_dirichlet_does_not_deal_the_patients_of_a_class_out_in_their_order() -> None:
    sites_P = Dirichlet(alpha=100.0).assign(["a"] * 20 + ["b"] * 20, {}, 2)
    assert (np.diff(sites_P[:20]) < 0).any(), "the first site's would all come before the second's"
