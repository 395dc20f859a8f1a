"""The vector space of named arrays."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common import weights as weights_module
from common.weights import Weights

SHAPES = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}(\.[a-z]{1,4})?", fullmatch=True),
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=3),
    min_size=1,
    max_size=4,
)
FINITE = st.floats(-1e3, 1e3, width=32)


def three(draw_shapes: dict[str, tuple[int, ...]]) -> st.SearchStrategy[tuple[Weights, Weights, Weights]]:
    one = st.fixed_dictionaries(
        {name: hnp.arrays(np.float32, shape, elements=FINITE) for name, shape in draw_shapes.items()}
    ).map(Weights)
    return st.tuples(one, one, one)


THREE = SHAPES.flatmap(three)


def close(left: Weights, right: Weights, tolerance: float = 1e-3) -> bool:
    return all(np.allclose(left[name], right[name], rtol=1e-5, atol=tolerance) for name in left)


@given(THREE)
@settings(max_examples=40, deadline=None)
def test_addition_is_associative_up_to_rounding_and_commutative_to_the_bit(abc):
    a, b, c = abc
    assert close((a + b) + c, a + (b + c))
    assert (a + b).digest == (b + a).digest


@given(THREE)
@settings(max_examples=40, deadline=None)
def test_subtraction_undoes_addition_and_scaling_distributes(abc):
    a, b, _ = abc
    assert close((a + b) - b, a)
    assert close((a + b) * 3.0, a * 3.0 + 3.0 * b, 1e-2)
    assert a - a.zeros() == a  # to the bit; -0.0 + 0.0 would be 0.0


@given(THREE)
@settings(max_examples=30, deadline=None)
def test_the_norm_is_that_of_the_concatenated_vector(abc):
    a = abc[0]
    whole = np.concatenate([array.ravel().astype(np.float64) for array in a.values()])
    assert math.isclose(a.norm, float(np.linalg.norm(whole)), rel_tol=1e-12, abs_tol=1e-12)


@given(THREE, st.randoms())
@settings(max_examples=30, deadline=None)
def test_the_digest_ignores_the_order_of_insertion(abc, random):
    a = abc[0]
    names = list(a)
    random.shuffle(names)
    assert Weights({name: a[name] for name in names}).digest == a.digest


@given(THREE, st.data())
@settings(max_examples=30, deadline=None)
def test_the_digest_changes_with_any_bit_any_name_and_any_shape(abc, data):
    a = abc[0]
    name = data.draw(st.sampled_from(sorted(a)))
    flipped = bytearray(a[name].tobytes())
    bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    other = np.frombuffer(bytes(flipped), np.float32).reshape(a[name].shape)
    assert Weights({**a, name: other}).digest != a.digest
    assert Weights({("z" + key if key == name else key): value for key, value in a.items()}).digest != a.digest
    assert Weights({**a, name: a[name].reshape(1, *a[name].shape)}).digest != a.digest


def test_the_digest_is_the_sha256_of_names_shapes_and_little_endian_numbers():
    import hashlib
    import struct

    expected = hashlib.sha256(b"a\0\0" + struct.pack("<f", 1.5) + b"b\x002,1\0" + struct.pack("<2f", -2, 3)).hexdigest()
    assert Weights({"b": np.array([[-2], [3]], np.float32), "a": np.array(1.5, np.float32)}).digest == expected


def test_byte_order_and_memory_layout_of_the_source_do_not_matter():
    plain = Weights({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    turned = Weights({"w": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))})
    assert turned == plain


@pytest.mark.parametrize(
    "other",
    [
        {"w": np.zeros(3, np.float32)},
        {"w": np.zeros((1, 2), np.float32)},
        {"w": np.zeros(1, np.float32)},
        {"v": np.zeros(2, np.float32)},
        {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)},
        {},
    ],
)
def test_other_names_or_shapes_are_never_broadcast(other):
    one, two = Weights({"w": np.ones(2, np.float32)}), Weights(other)
    for left, right in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="names or shapes"):
            left + right
        with pytest.raises(ValueError, match="names or shapes"):
            left - right


def test_arrays_meet_by_name_whatever_their_order():
    one = Weights({"a": np.array([1, 2], np.float32), "b": np.array([[3]], np.float32)})
    other = Weights({"b": np.array([[30]], np.float32), "a": np.array([10, 20], np.float32)})
    assert {name: array.tolist() for name, array in (one + other).items()} == {"a": [11.0, 22.0], "b": [[33.0]]}
    assert {name: array.tolist() for name, array in (other - one).items()} == {"b": [[27.0]], "a": [9.0, 18.0]}
    assert one.whole.tolist() == [1.0, 2.0, 3.0]
    assert other.ordered(one).whole.tolist() == [10.0, 20.0, 30.0]
    assert one.ordered(one) is one


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.complex64])
def test_only_floating_types_are_held(kind):
    with pytest.raises(ValueError, match="expected a floating type"):
        Weights({"counter": np.zeros(1, kind)})


def test_held_arrays_cannot_be_written():
    weights = Weights({"w": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="read-only"):
        weights["w"][0] = 5
    with pytest.raises(ValueError, match="read-only"):
        weights.whole[0] = 5
    with pytest.raises(TypeError):
        weights["w"] = np.zeros(2, np.float32)  # type: ignore[index]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_shows(bad):
    weights = Weights({"a": np.ones(3, np.float32), "b": np.array([1, bad], np.float32)})
    assert not weights.finite
    assert not math.isfinite(weights.norm)


def test_large_numbers_do_not_overflow_the_norm():
    assert math.isclose(Weights({"a": np.full(4, 1e30, np.float32)}).norm, 2e30, rel_tol=1e-6)


def test_the_empty_vector_is_neutral():
    empty = Weights({})
    assert (empty.size, empty.nbytes, empty.norm, empty.finite) == (0, 0, 0.0, True)
    assert empty + empty == empty


@given(THREE, st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_flat_bytes_are_those_of_the_arrays_in_their_order_whatever_they_are_made_of(abc, random):
    total = abc[0] + abc[1]
    names = random.sample(list(total), random.randint(0, len(total)))
    for some in (abc[0], total, Weights({name: total[name] for name in names})):
        assert some.flat == b"".join(array.tobytes() for array in some.values())


def test_the_flat_bytes_of_a_sum_are_no_copy_and_those_of_some_other_selection_are():
    whole = Weights({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}) * 2.0
    assert all(np.shares_memory(np.frombuffer(whole.flat, np.float32), array) for array in whole.values())
    part = Weights({"b": whole["b"], "a": whole["a"]})
    assert part.flat == whole["b"].tobytes() + whole["a"].tobytes()
    assert not np.shares_memory(np.frombuffer(part.flat, np.float32), whole["a"])


def test_a_large_block_is_used_again_when_all_that_was_cut_from_it_is_gone_and_never_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights_module, "_MAPPED", 100)
    monkeypatch.setattr(weights_module, "_free", deque(maxlen=2))
    one = Weights({"a": np.arange(90, dtype=np.float32), "b": np.ones((4, 5), np.float32)})

    def place(weights: Weights) -> int:
        return weights["a"].ctypes.data

    first, second = one + one, one * 3.0
    assert place(first) != place(second)
    part, wire = second["b"][1:3], memoryview(first.flat)
    places = [place(first), place(second)]
    del first, second
    third = one - one
    assert place(third) not in places  # a row of one and the bytes of the other are still in use
    assert part.tolist() == [[3.0] * 5] * 2
    assert np.frombuffer(wire, np.float32)[1:90].tolist() == [2.0 * n for n in range(1, 90)]
    del part
    assert place(one + one) == places[1]
    fourth = one + one
    del wire
    fifth = one * 2.0
    assert [place(fourth), place(fifth)] == [places[1], places[0]]
    assert fourth.digest == fifth.digest == (one * 2.0).digest
    small = Weights({"a": np.ones(3, np.float32)}) * 2.0
    assert small["a"].tolist() == [2.0] * 3
    del third, fourth, fifth
    other = Weights({"a": np.ones(200, np.float32)}) * 2.0  # of another size: what is kept for the former goes
    assert {store.size for store in weights_module._free} <= {200}
    assert float(other["a"].sum()) == 400.0
