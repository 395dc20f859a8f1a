"""Named float32 arrays that can be added, scaled and hashed: a model's exchanged state, or the change of it."""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
_CHUNK = 1 << 13
"""Numbers at a time, so that their float64 copies stay in the cache. And below the 10,000 from which OpenBLAS shares a
product among threads, which wait for each other by spinning: beside busy cores that takes longer than the product."""


class Weights(Mapping[str, Array]):
    """An immutable vector of named arrays, in the order of the model's state.

    Two weights can be added or subtracted when names and shapes are equal; anything else
    is a `ValueError`, never a broadcast.
    """

    __slots__ = ("__weakref__", "_arrays", "_digest", "_norm", "_shapes", "whole")

    whole: Array
    """All numbers, array after array; cannot be written."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Copies the arrays; where they are computed anew, `room` and `filled` save that.

        Raises:
            ValueError: An array is not of a floating type (integer counters are not exchanged).
        """
        for name, array in arrays.items():
            if not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"{name}: got {array.dtype}, expected a floating type")
        whole, held = room({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            np.copyto(held[name], array, casting="same_kind")
        self._hold(whole, held)

    @classmethod
    def filled(cls, whole: Array, arrays: dict[str, Array]) -> Self:
        """What `room` gave, once it is written; later writes to it are forbidden."""
        made = cls.__new__(cls)
        made._hold(whole, arrays)
        return made

    def _hold(self, whole: Array, arrays: dict[str, Array]) -> None:
        whole.flags.writeable = False
        for array in arrays.values():
            array.flags.writeable = False
        self.whole, self._arrays = whole, arrays
        self._shapes = {name: array.shape for name, array in arrays.items()}
        self._digest: str | None = None
        self._norm: float | None = None

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Weights({len(self)} arrays, {self.size} numbers, {self.digest[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self.shapes == other.shapes and self.digest == other.digest

    __hash__ = None  # type: ignore[assignment]  # compared by content, used as no key

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def size(self) -> int:
        """How many numbers in all."""
        return self.whole.size

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    def flat(self) -> memoryview:
        """The bytes of `whole`, little-endian."""
        return np.asarray(self.whole, "<f4").data.cast("B") if self.size else memoryview(b"")

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and little-endian float32 bytes, in order of name."""
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    def digest_is(self, digest: str) -> None:
        """Takes a digest that was computed over these very numbers before, in another process of this program."""
        self._digest = digest

    def _hash(self) -> str:
        state = hashlib.sha256()
        for name in sorted(self._arrays):
            array = self._arrays[name]
            state.update(f"{name}\0{','.join(map(str, array.shape))}\0".encode())
            state.update(np.asarray(array, "<f4").data)
        return state.hexdigest()

    @property
    def norm(self) -> float:
        """L2 norm over all numbers; infinite or NaN when one of them is."""
        if self._norm is None:
            with np.errstate(over="ignore", invalid="ignore"):
                self._norm = math.sqrt(_square_sum(self.whole))
        return self._norm

    @property
    def finite(self) -> bool:
        """Whether no number is infinite or NaN: their squares cannot leave float64, so the norm tells."""
        return math.isfinite(self.norm)

    def __add__(self, other: Weights) -> Weights:
        return self._made(partial(np.add, self.whole, self._numbers_of(other)))

    def __sub__(self, other: Weights) -> Weights:
        return self._made(partial(np.subtract, self.whole, self._numbers_of(other)))

    def __mul__(self, factor: float) -> Weights:
        return self._made(partial(np.multiply, self.whole, np.float32(factor)))

    __rmul__ = __mul__

    def zeros(self) -> Weights:
        """Zeros of the same names and shapes."""
        return self._made(lambda out: out.fill(0))

    def ordered(self, names: Iterable[str]) -> Weights:
        """The same arrays in the order of all these names; copied only where that is another one."""
        wanted = list(names)
        return self if wanted == list(self._arrays) else Weights({name: self._arrays[name] for name in wanted})

    def _numbers_of(self, other: Weights) -> Array:
        if self._shapes != other._shapes:
            both = {**self._shapes, **other._shapes}
            odd = [name for name in both if self._shapes.get(name) != other._shapes.get(name)]
            raise ValueError(f"weights differ in names or shapes, first at {sorted(odd)[:3]}")
        return other.ordered(self).whole

    def _made(self, write: Callable[..., object]) -> Weights:
        whole, arrays = room(self._shapes)
        write(out=whole)
        return Weights.filled(whole, arrays)


def room(shapes: Mapping[str, Sequence[int]], whole: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """Numbers to be written, all of them and cut into arrays of these shapes, for `Weights.filled`.

    Args:
        whole: Where they lie; None: in new memory.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    whole = _block(sum(sizes)) if whole is None else whole
    made, start = dict[str, Array](), 0
    for (name, shape), size in zip(shapes.items(), sizes, strict=True):
        made[name] = whole[start : start + size].reshape(shape)
        start += size
    return whole, made


def safetensors(
    arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> tuple[bytes | memoryview, ...]:
    """The parts of a safetensors file; the library's own `save` copies every number twice on its way."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, array in arrays.items():
        head[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    numbers = (np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data for array in arrays.values())
    return len(text).to_bytes(8, "little"), text, *numbers


_MAPPED = (32 << 20) // 4
"""Numbers from which a C library gives freed memory back to the system whatever one asks of it."""
_free: deque[Array] = deque(maxlen=2)
"""Large blocks that nothing refers to any more; appended to and popped from by any thread."""


def _block(size: int) -> Array:
    """One array; a large one is used again when it, and all that was cut from it, is gone.

    The system makes the pages of new memory: 7 to 100 ms for 45 MB, as often as not more than what is written there.
    """
    if size < _MAPPED:
        return np.empty(size, np.float32)
    store = _stored(size)
    whole = np.frombuffer(memoryview(store), np.float32)  # type: ignore[arg-type]
    # What is cut from an array that does not own its memory keeps that array, so this comes after the last of it.
    weakref.finalize(whole, _free.append, store).atexit = False
    return whole


def _stored(size: int) -> Array:
    with suppress(IndexError):
        while (store := _free.popleft()).size != size:
            pass  # it is of another model, and goes
        return store
    return np.empty(size, np.float32)


def _square_sum(flat: Array) -> float:
    total = 0.0
    for start in range(0, flat.size, _CHUNK):
        # float64: 10^7 float32 squares lose the small ones, and 10^20 has none
        wide = flat[start : start + _CHUNK].astype(np.float64)
        total += float(wide @ wide)
    return total
