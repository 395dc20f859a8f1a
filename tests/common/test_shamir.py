"""Any `threshold` shares give the secret back, fewer fit every secret."""

from __future__ import annotations

import os
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.shamir import PRIME, join, split

SECRET = st.binary(min_size=32, max_size=32)


def test_the_modulus_is_prime():
    # Miller and Rabin, 64 bases: a composite number passes with a chance below 4^-64.
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    rng = random.Random(0)
    for _ in range(64):
        power = pow(rng.randrange(2, PRIME - 1), odd, PRIME)
        powers = [pow(power, 1 << square, PRIME) for square in range(twos)]
        assert power == 1 or PRIME - 1 in powers


@given(SECRET, st.integers(1, 9), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_threshold_of_the_shares_give_the_secret(secret, threshold, more, rng):
    shares = split(secret, threshold + more, threshold, os.urandom)
    held = rng.sample(range(1, threshold + more + 1), threshold)
    assert join({x: shares[x - 1] for x in held}) == secret


def test_all_choices_of_three_of_five_agree():
    shares = split(b"\xff" * 32, 5, 3, os.urandom)
    assert {join({x: shares[x - 1] for x in held}) for held in combinations(range(1, 6), 3)} == {b"\xff" * 32}


@given(SECRET, SECRET)
@settings(max_examples=30, deadline=None)
def test_two_shares_of_three_fit_every_other_secret_equally_well(secret, other):
    # A line through (0, other) and the first share is a polynomial as likely as the true one. So of threshold 3, two
    # shares and any secret at 0 lie on exactly one parabola: they rule out nothing.
    shares = [int.from_bytes(share, "little") for share in split(secret, 3, 3, os.urandom)]
    third = join({1: _bytes(shares[0]), 2: _bytes(shares[1]), 3: _bytes(_at_three(other, *shares[:2]))})
    assert third == other


def _at_three(secret: bytes, one: int, two: int) -> int:
    # The parabola through 0, 1 and 2, at 3: f(0) - 3 f(1) + 3 f(2), by finite differences.
    return (int.from_bytes(secret, "little") - 3 * one + 3 * two) % PRIME


def _bytes(value: int) -> bytes:
    return value.to_bytes(33, "little")


def test_a_line_can_be_checked_by_hand():
    # secret 5, slope 7: shares 12, 19, 26; 2 * 12 - 19 = 5
    shares = split(_bytes(5)[:32], 3, 2, lambda size: (7).to_bytes(size, "little"))
    assert [int.from_bytes(share, "little") for share in shares] == [12, 19, 26]
    assert join({1: shares[0], 2: shares[1]}) == _bytes(5)[:32]


def test_a_changed_share_gives_another_secret_and_too_few_do_as_well():
    shares = split(bytes(32), 4, 3, os.urandom)
    wrong = {1: shares[0], 2: shares[1], 3: _bytes((int.from_bytes(shares[2], "little") + 1) % PRIME)}
    assert join(wrong) != bytes(32)
    assert join({1: shares[0], 2: shares[1]}) != bytes(32)


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), _bytes(PRIME), b"\xff" * 33])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="out of range"):
        join({1: bytes(33), 2: share})


@pytest.mark.parametrize("holder", [0, -1, PRIME])  # PRIME is 0 once more, where the secret itself lies
def test_what_is_no_holder_is_refused_also_beside_one_that_is(holder):
    for shares in ({holder: bytes(33)}, {1: bytes(33), holder: bytes(33)}):
        with pytest.raises(ValueError, match="out of range"):
            join(shares)


def test_shares_of_a_value_that_32_bytes_do_not_hold_have_no_secret():
    # Threshold 1: every share is the value itself. The prime is 297 above 2^256, and a dealer may share out any of it.
    assert join({1: _bytes(2**256 - 1)}) == b"\xff" * 32
    for value in (2**256, PRIME - 1):
        assert join({1: _bytes(value)}) is None


def test_every_coefficient_is_drawn_from_48_bytes():
    sizes: list[int] = []
    split(bytes(32), 5, 4, lambda size: sizes.append(size) or os.urandom(size))
    assert sizes == [48] * 3


@pytest.mark.parametrize(("size", "holders", "threshold"), [(31, 3, 2), (32, 3, 4), (32, 3, 0)])
def test_what_cannot_be_shared_is_refused(size, holders, threshold):
    with pytest.raises(ValueError, match="holders"):
        split(bytes(size), holders, threshold, os.urandom)
