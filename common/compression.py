"""Updates in fewer bytes: bfloat16, or eight bits a number, of everything but vectors.

A quantised update is still float32 `Weights`, of values that the small form holds exactly: whoever hashes, checks, adds
or logs it needs to know nothing of this. Packing is then lossless, and happens on the wire alone (`common.wire`).

Vectors (biases, scales of norms, running statistics) travel as they are, as in PowerSGD (Vogels et al. 2019): they are
few, and a rounded change could turn a running variance negative. Of all else

- `bfloat16` keeps the upper half of each float32, rounded to nearest, ties to even: 8 significant bits.
- `int8` shares one power of two 2^k among up to 256 neighbours of an array: each number becomes q * 2^k with q from
  -127 to 127, and k is the smallest that reaches the largest of them. One byte for k comes before every array's q.

No step in k is lost: with m the largest |number| of a block, the smallest k with m <= 127 * 2^k has m > 63.5 * 2^k, so
the largest |q| is 64 or more after rounding. From the rounded numbers the same k is found again, for 2^(k - 1) would
need a q of 128; so quantising twice changes nothing, and the packer finds the very k and q. Blocks of zeros have the
least k, -126, below which nothing is told apart: all numbers are normal or 0, whatever a CPU does with others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import ExchangeError
from common.weights import Array, Weights, room

Form = Literal["none", "bfloat16", "int8"]
FORMS: tuple[Form, ...] = ("none", "bfloat16", "int8")

_BLOCK = 256
"""Numbers that share a power of two: its byte adds 0.4 %."""
_LEAST, _MOST = -126, 121
"""Of k: 2^-126 is the least normal float32, and 127 * 2^122 none any more."""
_LARGEST = np.float32(127 * 2.0**_MOST)
_BFLOAT16_MOST = float(np.uint32(0x7F7F_0000).view(np.float32))
_CHUNK = 256 * _BLOCK
"""Numbers at a time, so that temporary copies stay in the cache."""

Bytes = npt.NDArray[np.uint8]
Shapes = Mapping[str, Sequence[int]]


def rounds(shape: Sequence[int]) -> bool:
    """Whether an array of this shape is rounded at all; vectors are not."""
    return len(shape) > 1


class _Small(Weights):
    """Weights that a form holds, and their bytes in it: made once, where they are rounded or read."""

    __slots__ = ("data", "form")
    data: memoryview
    form: Form


def quantised(weights: Weights, form: Form) -> Weights:
    """The nearest weights that `form` holds; `weights` themselves for `none`.

    Off by half a unit at most: 2^-9 of a number in bfloat16, less than 1/127 of its block's largest in int8. A number
    above the largest of a form becomes that.

    Raises:
        ExchangeError: A number is NaN or infinite.
    """
    if form == "none":
        return weights
    if not weights.finite:
        raise ExchangeError(f"the update holds NaN or infinity, which has no {form}; lower training.lr")
    return _small(weights, form)


def holds(weights: Weights, form: Form) -> bool:
    """Whether every number is one that `form` holds exactly; also of infinite ones and NaN in bfloat16, as in none."""
    if form == "none" or (isinstance(weights, _Small) and weights.form == form):
        return True
    parts = (part for array in weights.values() if rounds(array.shape) for part in _parts(array.ravel()))
    if form == "bfloat16":
        return not any((part.view(np.uint32) & np.uint32(0xFFFF)).any() for part in parts)
    return all(np.isfinite(part).all() and _same_bits(_times(*_blocks(part), part.size), part) for part in parts)


def nbytes(shapes: Shapes, form: Form) -> int:
    """How many bytes weights of these shapes take on the wire."""
    return sum(_array_bytes(math.prod(shape), _form_of(shape, form)) for shape in shapes.values())


def packed(weights: Weights, form: Form) -> memoryview:
    """The bytes of weights that `form` holds, one array after the other; nothing is copied that lies so already.

    Raises:
        ExchangeError: `form` does not hold them: they were not quantised.
    """
    if form == "none":
        return weights.flat
    if not holds(weights, form):
        raise ExchangeError(f"an update of float32 numbers was to be sent as {form}; quantise it first")
    if isinstance(weights, _Small) and weights.form == form:
        return weights.data
    return _small(weights, form).data


def unpacked(data: bytes | memoryview, shapes: Shapes, form: Form) -> Weights:
    """Inverse of `packed`: every string of bytes is refused but the one that `packed` gives for the result.

    `none` copies nothing; the others keep `data` beside the numbers.

    Raises:
        ExchangeError: It has another length, or an int8 block has a q or k that `quantised` never gives.
    """
    expected = nbytes(shapes, form)
    if len(data) != expected:
        raise ExchangeError(f"an update of {len(data)} bytes came, expected {expected} of {form}")
    if form == "none":
        return Weights.filled(*room(shapes, np.frombuffer(data, "<f4")))
    whole, found = room(shapes)
    for own, raw, array in _pieces(np.frombuffer(data, np.uint8), found, form):
        _unpack(raw, own, array.reshape(-1))
    return _known(whole, found, memoryview(data), form)


def _small(weights: Weights, form: Form) -> _Small:
    """Each number to the nearest of `form`, which leaves those alone that it holds, NaN and infinity among them."""
    whole, found = room(weights.shapes)
    data = np.empty(nbytes(weights.shapes, form), np.uint8)
    over = math.isfinite(weights.norm) and weights.norm > _BFLOAT16_MOST  # else no number can be
    for (own, raw, out), array in zip(_pieces(data, found, form), weights.values(), strict=True):
        match own:
            case "none":
                out[...] = array
                raw.view("<f4")[...] = array.ravel()
            case "bfloat16":
                _to_bfloat16(np.clip(array, -_BFLOAT16_MOST, _BFLOAT16_MOST) if over else array, out, raw.view("<u2"))
            case "int8":
                _to_int8(array.ravel(), out.reshape(-1), raw.view(np.int8))
    return _known(whole, found, data.data, form)


def _known(whole: Array, arrays: dict[str, Array], data: memoryview, form: Form) -> _Small:
    made = _Small.filled(whole, arrays)
    made.data, made.form = data.toreadonly(), form
    return made


def _pieces(data: Bytes, arrays: Mapping[str, Array], form: Form) -> Iterator[tuple[Form, Bytes, Array]]:
    """Each array with its form and its bytes of the whole."""
    start = 0
    for array in arrays.values():
        own = _form_of(array.shape, form)
        end = start + _array_bytes(array.size, own)
        yield own, data[start:end], array
        start = end


def _form_of(shape: Sequence[int], form: Form) -> Form:
    return form if rounds(shape) else "none"


def _array_bytes(size: int, form: Form) -> int:
    match form:
        case "none":
            return 4 * size
        case "bfloat16":
            return 2 * size
        case "int8":
            return size + -(-size // _BLOCK)


def _parts(flat: Array) -> Iterator[Array]:
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


def _to_bfloat16(array: Array, out: Array, halves: npt.NDArray[np.uint16]) -> None:
    bits, start = np.empty(min(array.size, _CHUNK), np.uint32), 0
    for part, to in zip(_parts(array.ravel()), _parts(out.reshape(-1)), strict=True):
        raw, end = part.view(np.uint32), start + part.size
        up = np.right_shift(raw, 16, out=bits[: part.size])
        up &= np.uint32(1)  # a tie goes to the even one
        up += np.uint32(0x7FFF)
        up += raw
        np.bitwise_and(up, np.uint32(0xFFFF_0000), out=to.view(np.uint32))
        up >>= np.uint32(16)
        halves[start:end] = up
        start = end


def _to_int8(flat: Array, out: Array, raw: npt.NDArray[np.int8]) -> None:
    """All k come before all q."""
    blocks = raw.size - flat.size
    ks, qs, start = raw[:blocks], raw[blocks:], 0
    for part in _parts(flat):
        end = start + part.size
        k, q = _blocks(part)
        ks[start // _BLOCK :][: k.size] = k
        qs[start:end] = q.reshape(-1)[: part.size]
        out[start:end] = _times(k, q, part.size)
        start = end


def _unpack(raw: Bytes, form: Form, out: Array) -> None:
    size = out.size
    if form == "none":
        out[...] = raw.view("<f4")
        return
    if form == "bfloat16":
        np.left_shift(raw.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)
        return
    signed, blocks = raw.view(np.int8), raw.size - size
    k_B, q_N = signed[:blocks], signed[blocks:]
    if (k_B < _LEAST).any() or (k_B > _MOST).any() or (q_N < -127).any():
        raise ExchangeError("an int8 update holds a number that is none of its form")
    for start in range(0, size, _CHUNK):
        part, k = q_N[start : start + _CHUNK], k_B[start // _BLOCK : (start + _CHUNK) // _BLOCK]
        q = _rows(part.astype(np.float32))
        if not ((_peaks(q) >= 64) | (k == _LEAST)).all():
            raise ExchangeError("an int8 update holds a block that a smaller power of two would hold")
        out[start : start + _CHUNK] = _times(k.astype(np.int32), q, part.size)


def _blocks(part: Array) -> tuple[npt.NDArray[np.int32], Array]:
    """k of each block, and how many 2^k each number is, in rows."""
    rows = _rows(part)
    peaks = _peaks(rows)
    fraction, exponent = np.frexp(np.minimum(peaks, _LARGEST))
    k = exponent - 7 + (fraction > np.float32(127 / 128))  # 64 <= 128 * fraction < 128
    k = np.where(fraction > 0, np.maximum(k, _LEAST), _LEAST)
    q = rows * np.ldexp(np.float32(1), -k)[:, None]
    np.rint(q, out=q)
    if (peaks > _LARGEST).any():
        np.clip(q, -127, 127, out=q)
    q += np.float32(0)  # -0.0 has no int8
    return k, q


def _times(k: npt.NDArray[np.int32], q: Array, size: int) -> Array:
    """Inverse of `_blocks` for so many numbers, exact, in the memory of `q`."""
    q *= np.ldexp(np.float32(1), k)[:, None]
    return q.reshape(-1)[:size]


def _rows(part: Array) -> Array:
    """A row a block, the last filled up with zeros."""
    if rest := -part.size % _BLOCK:
        part = np.concatenate([part, np.zeros(rest, np.float32)])
    return part.reshape(-1, _BLOCK)


def _peaks(rows: Array) -> Array:
    """Largest size in each block."""
    found: Array = np.abs(rows).max(axis=1, initial=0)
    return found


def _same_bits(left: Array, right: Array) -> bool:
    return bool((left.view(np.uint32) == right.view(np.uint32)).all())  # -0.0 has no int8
