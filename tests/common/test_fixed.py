"""Fixed point modulo 2^32: sums come back to half a step, and what does not fit is refused, never wrapped."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.config import Federation
from common.errors import SecureAggregationError
from common.fixed import RANGE, FixedPoint, Residues, fewest, secure_objection
from common.weights import Weights

SHAPES = {"a": (2, 3), "b": (), "c": (4,)}


def weights(flat) -> Weights:
    flat = np.asarray(flat, np.float32)
    return Weights({"a": flat[:6].reshape(2, 3), "b": flat[6].reshape(()), "c": flat[7:11]})


@given(
    st.integers(3, 100), st.floats(0.01, 400), st.integers(1, 5000),
    st.lists(
        st.tuples(arrays(np.float32, 11, elements=st.floats(-0.28125, 0.28125, width=32)), st.floats(0, 1)),
        min_size=1, max_size=5,
    ),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_mean_by_weight_comes_back_to_half_a_step(sites, limit, most, given_):
    point = FixedPoint(sites=sites, limit=limit, max_weight=most)
    deltas = [(weights(flat * np.float32(limit)), max(1, round(share * most))) for flat, share in given_][:sites]
    words = sum(point.encode(delta, weight) for delta, weight in deltas)
    mean, total = point.decode(words, len(deltas), SHAPES)
    assert total == sum(weight for _, weight in deltas)
    half = len(deltas) * 2.0**-point.bits / 2 / total
    for name, found in mean.items():
        true = sum(delta[name].astype(np.float64) * weight for delta, weight in deltas) / total
        assert (np.abs(found - true) <= half + np.abs(true) * 2.0**-23).all()


@given(st.integers(3, 1000), st.floats(1e-3, 1e6), st.integers(1, 10_000))
@settings(max_examples=100, deadline=None)
def test_all_sites_at_the_limit_at_once_do_not_wrap_and_one_more_bit_would(sites, limit, most):
    point = FixedPoint(sites=sites, limit=limit, max_weight=most)
    assert sites * point._bound(point.bits) <= RANGE
    assert point.bits == 40 or sites * most * limit * 2.0 ** (point.bits + 2) > RANGE


def test_a_thousand_sites_whose_numbers_are_rounded_up_do_not_wrap():
    # With 10 places each sends 2147484, rounded up from 2147483.5; a thousand of them are 353 above 2^31 - 1.
    point = FixedPoint(sites=1000, limit=2147483.5 / 2**10)
    assert point.bits == 9
    words = point.encode(weights([point.limit, *[0.0] * 10]), 1)  # of exactly the limit
    assert int(words[0]) == point._bound(9) == 1073742
    mean, _ = point.decode(words * np.uint32(1000), 1000, SHAPES)
    assert mean["a"][0, 0] == pytest.approx(point.limit, abs=2.0**-10)


def test_the_steps_can_be_worked_out_by_hand():
    # 5 sites of norm up to 100: 2^31 / 500 = 4.29 million = 2^22.03 steps in 1
    point = FixedPoint(sites=5, limit=100.0)
    assert point.bits == 22
    assert point.encode(weights([0.25, -0.25, *[0] * 9]), 1).tolist() == [1 << 20, 2**32 - (1 << 20), *[0] * 9, 1]
    assert point.objection() is None


def test_a_range_too_small_for_useful_steps_is_refused_with_the_numbers():
    point = FixedPoint(sites=5, limit=1e4)
    assert point.objection() == (
        "is 10000: sums of 5 numbers up to that size leave steps of 2.3e-05 in 32 bits, 9.5e-07 is the coarsest "
        "allowed; say at most 409"
    )
    assert FixedPoint(sites=5, limit=409.0).objection() is None
    assert "more than 32 bits hold" in (FixedPoint(sites=300, limit=1.0, max_weight=1 << 23).objection() or "")


@pytest.mark.parametrize(
    ("flat", "weight", "why"),
    [
        ([101.0, *[0.0] * 10], 1, "norm 101"),
        ([40.0] * 11, 1, "norm 132.7"),  # each number would fit: 40 * sqrt(11)
        ([np.nan, *[0.0] * 10], 1, "norm nan"),
        ([-np.inf, *[0.0] * 10], 1, "norm inf"),
        ([0.0] * 11, 0, "weight"),
        ([0.0] * 11, 8, "weight is above 7"),
    ],
)
def test_an_update_out_of_range_is_refused_and_never_wraps(flat, weight, why):
    with pytest.raises(SecureAggregationError, match=why):
        FixedPoint(sites=5, limit=100.0, max_weight=7).encode(weights(flat), weight)


def test_a_sum_that_honest_sites_cannot_give_is_refused():
    point = FixedPoint(sites=3, limit=1.0)
    words = 2 * point.encode(weights([0.5, *[0.0] * 10]), 1)
    with pytest.raises(SecureAggregationError, match="weight is 2, impossible for 3 sites"):
        point.decode(words, 3, SHAPES)
    with pytest.raises(SecureAggregationError, match="weight is 2, impossible for 1 sites"):
        point.decode(words, 1, SHAPES)
    with pytest.raises(SecureAggregationError, match="12 words, expected 2"):
        point.decode(words, 2, {"b": ()})
    noise = np.random.default_rng(0).integers(0, 2**32, 12, np.uint32)
    noise[-1] = 2
    with pytest.raises(SecureAggregationError, match="outside of its range"):
        point.decode(noise, 2, SHAPES)


def test_more_than_two_thirds_are_the_fewest():
    assert {sites: fewest(sites) for sites in (3, 4, 5, 6, 10, 100)} == {3: 3, 4: 3, 5: 4, 6: 5, 10: 7, 100: 67}


def federation(**fields) -> Federation:
    return Federation(**{"sites": 4, "quorum": 3, "max_update_norm": 100.0} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sites": 3},
        {"sites": 1000, "quorum": 667, "max_update_norm": 2.0},
        {"strategy": "fedadam"},
        {"site_weights": "patients", "max_patients": 50},
    ],
    ids=str,
)
def test_what_fits_into_a_secure_sum_is_not_objected_to(fields):
    assert secure_objection(federation(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"sites": 2, "quorum": 2}, "needs 3 to 1000"),
        ({"sites": 1001, "quorum": 900, "max_update_norm": 1.0}, "needs 3 to 1000"),
        ({"strategy": "fedmedian"}, "looks at single updates"),
        ({"compression": "bfloat16"}, "rounds single updates"),
        ({"fraction": 0.9}, "a secure sum is over all sites"),
        ({"quorum": 2}, "it is at least 3"),
        ({"site_weights": "patients"}, "federation.max_patients is needed"),
        ({"max_update_norm": 512.0}, "federation.max_update_norm is 512: .* at most 511"),
    ],
    ids=str,
)
def test_what_does_not_fit_into_a_secure_sum_is_named(fields, why):
    assert re.search(why, secure_objection(federation(**fields)) or "")


def test_a_recipes_largest_weight_is_that_of_patients_and_one_where_sites_count_alike():
    assert FixedPoint.of(federation(site_weights="patients", max_patients=50)).max_weight == 50
    assert FixedPoint.of(federation(site_weights="equal", max_patients=50)).max_weight == 1


def test_residues_are_flat_words_that_nobody_changes():
    words = Residues(np.arange(3, dtype=np.uint32))
    assert (len(words), words.nbytes) == (3, 12)
    assert words == Residues(np.arange(3, dtype="<u4"))
    assert words != Residues(np.arange(4, dtype="<u4"))
    with pytest.raises(ValueError, match="read-only"):
        words.words[0] = 1
    for odd in (np.zeros((1, 1), np.uint32), np.zeros(3, np.int32), np.zeros(3, np.uint64)):
        with pytest.raises(ValueError, match="flat array of uint32"):
            Residues(odd)
