"""Updates in fewer bytes: what is rounded, by how much, and that packing loses nothing more."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import compression
from common.compression import FORMS, holds, nbytes, packed, quantised, unpacked
from common.errors import ExchangeError
from common.weights import Weights

SMALL = ("bfloat16", "int8")
SHAPE = st.lists(st.integers(0, 40), max_size=3)


@st.composite
def weights(draw) -> Weights:
    """Arrays of any shape over the whole range of float32, denormal numbers and zeros among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = {}
    for name, shape in draw(st.dictionaries(st.sampled_from("abcd"), SHAPE, max_size=3)).items():
        spread = draw(st.sampled_from([0, 1, 40]))  # of the exponents in one array
        wide = rng.standard_normal(shape) * 2.0 ** (draw(st.integers(-149, 127)) + spread * rng.standard_normal(shape))
        largest = float(np.finfo(np.float32).max)
        found[name] = np.asarray(np.clip(np.where(rng.random(shape) < 0.9, wide, 0), -largest, largest), np.float32)
    return Weights(found)


@given(weights(), st.sampled_from(FORMS))
@settings(max_examples=150, deadline=None)
def test_what_was_rounded_once_is_packed_unpacked_and_rounded_again_without_a_change_of_a_bit(value, form):
    small = quantised(value, form)
    assert holds(small, form)
    data = packed(small, form)
    assert len(data) == nbytes(value.shapes, form)
    assert unpacked(data, value.shapes, form) == small == quantised(small, form)


@given(weights())
@settings(max_examples=100, deadline=None)
def test_a_bfloat16_is_that_of_torch_and_the_largest_one_where_torch_has_infinity(value):
    small = quantised(value, "bfloat16")
    for name, array in value.items():
        if array.ndim < 2:
            continue
        expected = torch.from_numpy(array.copy()).bfloat16().float().numpy()
        largest = float(torch.finfo(torch.bfloat16).max)
        assert np.array_equal(small[name], np.clip(expected, -largest, largest))


@given(weights())
@settings(max_examples=40, deadline=None)
def test_an_int8_is_off_by_half_its_unit_which_is_below_a_127th_of_the_blocks_largest(value):
    small = quantised(value, "int8")
    for name, array in value.items():
        if array.ndim < 2:
            continue
        # float64: all of these are exact, or so far from a bound that rounding does not bring them over it
        for start in range(0, array.size, 256):
            part = array.ravel()[start : start + 256].astype(np.float64)
            got = small[name].ravel()[start : start + 256].astype(np.float64)
            peak = np.abs(part).max()
            k = next(k for k in range(-126, 122) if peak <= 127 * 2.0**k or k == 121)
            assert np.array_equal(got / 2.0**k, np.rint(got / 2.0**k))
            assert (np.abs(got) <= 127 * 2.0**k).all()
            top = np.minimum(np.abs(part), 127 * 2.0**121)
            assert (np.abs(np.abs(got) - top) <= 2.0**k / 2).all()
            assert k == -126 or 2.0**k / 2 < peak / 127


def test_numbers_checked_by_hand():
    # 1.27 <= 127 * 2^-6 = 1.984, 127 * 2^-7 = 0.992: units of 1/64, and 1.27 is 81.28 of them
    value = Weights({"w": np.array([[1.27, -0.5, 0.007, 0.0]], np.float32)})
    assert quantised(value, "int8")["w"].tolist() == [[81 / 64, -0.5, 0.0, 0.0]]
    assert packed(quantised(value, "int8"), "int8") == bytes([256 - 6, 81, 256 - 32, 0, 0])
    # eight digits: 1.27 * 2^7 = 162.56, 0.007 * 2^15 = 229.4
    assert quantised(value, "bfloat16")["w"].tolist() == [[163 / 2**7, -0.5, 229 / 2**15, 0.0]]


def test_vectors_and_numbers_travel_as_they_are():
    value = Weights({"v": np.array([1 / 3, 1e-42], np.float32), "s": np.array(1 / 3, np.float32)})
    for form in SMALL:
        assert quantised(value, form) == value
        assert packed(value, form) == packed(value, "none")


def test_a_small_array_shares_no_unit_with_a_large_one():
    value = Weights({"large": np.full((2, 2), 100, np.float32), "small": np.full((1, 1), 1e-4, np.float32)})
    assert quantised(value, "int8")["small"].item() == pytest.approx(1e-4, rel=1 / 127)


def test_a_resnet_takes_half_and_a_little_over_a_quarter():
    shapes = {"w": (512, 256, 3, 3), "b": (512,)}  # 1,179,648 numbers are 4,608 blocks; 512 more are 2,048 bytes
    assert [nbytes(shapes, form) for form in FORMS] == [4_720_640, 2_361_344, 1_186_304]


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_rounded(form, bad):
    with pytest.raises(ExchangeError, match="NaN or infinity"):
        quantised(Weights({"w": np.array([[1, bad]], np.float32)}), form)


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("number", [1 / 3, 3e38])
def test_what_was_not_rounded_is_not_packed(form, number):
    value = Weights({"w": np.array([[1, number]], np.float32)})
    assert not holds(value, form)
    with pytest.raises(ExchangeError, match=f"sent as {form}; quantise it first"):
        packed(value, form)


def test_no_form_rounds_nothing_and_bfloat16_packs_what_is_not_finite_as_it_is():
    value = Weights({"w": np.array([[math.inf, -math.inf, math.nan, 1]], np.float32)})
    assert quantised(value, "none") is value
    assert packed(value, "bfloat16") == bytes([0x80, 0x7F, 0x80, 0xFF, 0xC0, 0x7F, 0x80, 0x3F])


@pytest.mark.parametrize(("form", "other"), [("bfloat16", "int8"), ("int8", "bfloat16")])
def test_what_was_rounded_to_one_form_and_is_of_another_too_is_packed_as_that(form, other):
    value = Weights({"w": np.array([[1, -0.5, 0]], np.float32)})
    small = quantised(value, form)
    assert holds(small, other)
    assert packed(small, other) == packed(value, other)


def test_a_number_of_eight_digits_is_none_of_int8_though_it_was_rounded():
    assert not holds(quantised(Weights({"w": np.array([[1, 1 / 3]], np.float32)}), "bfloat16"), "int8")


def test_int8_has_one_zero_and_no_infinity():
    for number in (-0.0, math.inf, math.nan):
        assert not holds(Weights({"w": np.full((1, 2), number, np.float32)}), "int8")
    assert quantised(Weights({"w": np.full((1, 1), -0.0, np.float32)}), "int8")["w"].tobytes() == bytes(4)


SHAPES = {"w": (2, 3), "v": (2,), "big": (1, 300)}


@given(st.sampled_from(FORMS), st.data())
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_or_the_only_ones_of_what_they_mean(form, data):
    blocks = bytes(data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 127, 128, 129, 130, 192, 255]), max_size=9)))
    given_ = (blocks * 1300)[: nbytes(SHAPES, form)] if blocks else bytes(nbytes(SHAPES, form))
    try:
        value = unpacked(given_, SHAPES, form)
    except ExchangeError:
        assert form == "int8"
    else:
        assert packed(value, form) == given_


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [-1, 1, 4])
def test_a_byte_more_or_less_is_refused(form, change):
    size = nbytes(SHAPES, form)
    with pytest.raises(ExchangeError, match=rf"{size + change} bytes came, expected {size} of {form}"):
        unpacked(bytes(size + change), SHAPES, form)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes([0, 64, 0]), None),
        (bytes([0, 256 - 64, 63]), None),
        (bytes([130, 1, 0]), None),  # k is -126: the least
        (bytes([130, 0, 0]), None),
        (bytes([121, 127, 0]), None),
        (bytes([129, 64, 0]), "none of its form"),  # k is -127
        (bytes([122, 64, 0]), "none of its form"),  # 64 * 2^122 is no float32
        (bytes([0, 128, 0]), "none of its form"),  # q is -128
        (bytes([0, 63, 256 - 63]), "smaller power of two"),
        (bytes([0, 0, 0]), "smaller power of two"),  # zeros have the least k
    ],
)
def test_an_int8_block_has_one_k(data, why):
    if why is None:
        assert packed(unpacked(data, {"w": (1, 2)}, "int8"), "int8") == data
    else:
        with pytest.raises(ExchangeError, match=why):
            unpacked(data, {"w": (1, 2)}, "int8")


def test_chunks_do_not_show(monkeypatch):
    value = Weights({"w": np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)})
    found = []
    for blocks in (1, 3, 256):
        monkeypatch.setattr(compression, "_CHUNK", blocks * 256)
        small = quantised(value, "int8")
        found.append(packed(small, "int8"))
        assert unpacked(found[-1], value.shapes, "int8") == small
    assert found[0] == found[1] == found[2]
