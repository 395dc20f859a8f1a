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
from typing import Literal, TypeVar

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
_BFLOAT16_MOST = np.uint32(0x7F7F_0000)
_CHUNK = 256 * _BLOCK
"""Numbers at a time, so that temporary copies stay in the cache."""

N = TypeVar("N", np.float32, np.int8)
Bytes = npt.NDArray[np.uint8]
Shapes = Mapping[str, Sequence[int]]


def rounds(shape: Sequence[int]) -> bool:
    """Whether an array of this shape is rounded at all; vectors are not."""
    return len(shape) > 1


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
    whole, found = room(weights.shapes)
    for name, array in weights.items():
        if rounds(array.shape):
            _nearest(array.ravel(), form, found[name].reshape(-1))
        else:
            found[name][...] = array
    return Weights.filled(whole, found)


def holds(weights: Weights, form: Form) -> bool:
    """Whether every number is one that `form` holds exactly; also of infinite ones and NaN in bfloat16, as in none."""
    if form == "none":
        return True
    parts = (part for array in weights.values() if rounds(array.shape) for part in _parts(array.ravel()))
    if form == "bfloat16":
        return not any((part.view(np.uint32) & np.uint32(0xFFFF)).any() for part in parts)
    return all(np.isfinite(part).all() and _same_bits(_rounded(part), part) for part in parts)


def nbytes(shapes: Shapes, form: Form) -> int:
    """How many bytes weights of these shapes take on the wire."""
    return sum(_array_bytes(math.prod(shape), _form_of(shape, form)) for shape in shapes.values())


def packed(weights: Weights, form: Form) -> memoryview:
    """The bytes of weights that `form` holds, one array after the other; `none` copies nothing that lies so already.

    Raises:
        ExchangeError: `form` does not hold them: they were not quantised.
    """
    if form == "none":
        return weights.flat
    if not holds(weights, form):
        raise ExchangeError(f"an update of float32 numbers was to be sent as {form}; quantise it first")
    return memoryview(b"".join(_packed(array, _form_of(array.shape, form)) for array in weights.values()))


def unpacked(data: bytes | memoryview, shapes: Shapes, form: Form) -> Weights:
    """Inverse of `packed`: every string of bytes is refused but the one that `packed` gives for the result.

    `none` copies nothing.

    Raises:
        ExchangeError: It has another length, or an int8 block has a q or k that `quantised` never gives.
    """
    expected = nbytes(shapes, form)
    if len(data) != expected:
        raise ExchangeError(f"an update of {len(data)} bytes came, expected {expected} of {form}")
    if form == "none":
        return Weights.filled(*room(shapes, np.frombuffer(data, "<f4")))
    whole, found = room(shapes)
    raw, start = np.frombuffer(data, np.uint8), 0
    for array in found.values():
        own = _form_of(array.shape, form)
        end = start + _array_bytes(array.size, own)
        _unpack(raw[start:end], own, array.reshape(-1))
        start = end
    return Weights.filled(whole, found)


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


def _nearest(flat: Array, form: Form, out: Array) -> None:
    start = 0
    for part in _parts(flat):
        out[start : start + part.size] = _bfloat16(part) if form == "bfloat16" else _rounded(part)
        start += part.size


def _packed(array: Array, form: Form) -> bytes | memoryview:
    flat = array.ravel()
    if form == "none":
        return np.ascontiguousarray(flat, "<f4").data
    if form == "bfloat16":
        return np.ascontiguousarray(np.asarray(flat, "<f4").view("<u2")[1::2]).data
    halves = [_blocks(part) for part in _parts(flat)]
    return b"".join(half.tobytes() for side in zip(*halves, strict=True) for half in side)


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
        q, k = q_N[start : start + _CHUNK], k_B[start // _BLOCK : (start + _CHUNK) // _BLOCK]
        if not ((_peaks(q) >= 64) | (k == _LEAST)).all():
            raise ExchangeError("an int8 update holds a block that a smaller power of two would hold")
        np.multiply(q, _powers(k, q.size), out=out[start : start + _CHUNK])


def _bfloat16(part: Array) -> Array:
    bits = part.view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    size = ((bits & np.uint32(0x7FFF_FFFF)) + up) & np.uint32(0xFFFF_0000)
    found: Array = ((bits & np.uint32(0x8000_0000)) | np.minimum(size, _BFLOAT16_MOST)).view(np.float32)
    return found


def _blocks(part: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """k of each block, and q of each number."""
    fraction, exponent = np.frexp(np.minimum(_peaks(part), _LARGEST))
    k = exponent - 7 + (fraction > np.float32(127 / 128))  # 64 <= 128 * fraction < 128
    k = np.where(fraction > 0, np.maximum(k, _LEAST), _LEAST)
    q = np.rint(np.clip(part, -_LARGEST, _LARGEST) * _powers(-k, part.size))
    return k.astype(np.int8), q.astype(np.int8)


def _rounded(part: Array) -> Array:
    k, q = _blocks(part)
    found: Array = q * _powers(k, part.size)
    return found


def _peaks(part: npt.NDArray[N]) -> npt.NDArray[N]:
    """Largest size in each block."""
    found: npt.NDArray[N] = np.maximum.reduceat(np.abs(part), np.arange(0, part.size, _BLOCK))
    return found


def _same_bits(left: Array, right: Array) -> bool:
    return bool((left.view(np.uint32) == right.view(np.uint32)).all())  # -0.0 has no int8


def _powers(k: npt.NDArray[np.signedinteger], size: int) -> Array:
    """2^k of its block for each number; exact."""
    return np.repeat(np.ldexp(np.float32(1), k.astype(np.int32)), _BLOCK)[:size]
