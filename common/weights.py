"""Named float32 arrays that can be added, scaled and hashed: a model's exchanged state, or the change of it."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

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

    __slots__ = ("__weakref__", "_arrays", "_digest", "_norm")

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Copies nothing that is already a contiguous float32 array; later writes to `arrays` are forbidden.

        Raises:
            ValueError: An array is not of a floating type (integer counters are not exchanged).
        """
        held: dict[str, Array] = {}
        for name, array in arrays.items():
            if not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"{name}: got {array.dtype}, expected a floating type")
            value = np.asarray(array, dtype=np.float32, order="C").view()
            value.flags.writeable = False
            held[name] = value
        self._arrays = held
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self._arrays.items()}

    @property
    def size(self) -> int:
        """How many numbers in all."""
        return sum(array.size for array in self._arrays.values())

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    def flat(self) -> memoryview:
        """The bytes of all arrays, little-endian float32, one after the other; copied only where they do not lie so."""
        arrays = [np.asarray(array, dtype="<f4") for array in self._arrays.values()]
        whole = arrays[0].base if arrays else None
        if isinstance(whole, np.ndarray) and whole.flags.c_contiguous and whole.nbytes == self.nbytes > 0:
            at = whole.ctypes.data
            for array in arrays:
                if array.base is not whole or array.ctypes.data != at:
                    break
                at += array.nbytes
            else:
                return whole.data.cast("B")
        return memoryview(b"".join(array.ravel().data for array in arrays))

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
            state.update(np.ascontiguousarray(array, dtype="<f4").data)
        return state.hexdigest()

    @property
    def norm(self) -> float:
        """L2 norm over all numbers; infinite or NaN when one of them is."""
        if self._norm is None:
            with np.errstate(over="ignore", invalid="ignore"):
                self._norm = math.sqrt(sum(_square_sum(array) for array in self._arrays.values()))
        return self._norm

    @property
    def finite(self) -> bool:
        """Whether no number is infinite or NaN: their squares cannot leave float64, so the norm tells."""
        return math.isfinite(self.norm)

    def __add__(self, other: Weights) -> Weights:
        self._same(other)
        return self._made(lambda name, array, out: np.add(array, other[name], out=out))

    def __sub__(self, other: Weights) -> Weights:
        self._same(other)
        return self._made(lambda name, array, out: np.subtract(array, other[name], out=out))

    def __mul__(self, factor: float) -> Weights:
        return self._made(lambda name, array, out: np.multiply(array, np.float32(factor), out=out))

    __rmul__ = __mul__

    def zeros(self) -> Weights:
        """Zeros of the same names and shapes."""
        return Weights({name: np.zeros_like(array) for name, array in self._arrays.items()})

    def _made(self, write: Callable[[str, Array, Array], object]) -> Weights:
        made = room(self.shapes)
        for name, array in self._arrays.items():
            write(name, array, made[name])
        return Weights(made)

    def _same(self, other: Weights) -> None:
        if self.shapes != other.shapes:
            odd = [name for name in {**self.shapes, **other.shapes} if self.shapes.get(name) != other.shapes.get(name)]
            raise ValueError(f"weights differ in names or shapes, first at {sorted(odd)[:3]}")


def room(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays to be written, which lie one after the other (`Weights.flat`)."""
    whole, start = _block(sum(map(math.prod, shapes.values()))), 0
    made: dict[str, Array] = {}
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        made[name] = whole[start:end].reshape(shape)
        start = end
    return made


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


def _square_sum(array: Array) -> float:
    flat, total = array.ravel(), 0.0
    for start in range(0, flat.size, _CHUNK):
        # float64: 10^7 float32 squares lose the small ones, and 10^20 has none
        wide = flat[start : start + _CHUNK].astype(np.float64)
        total += float(wide @ wide)
    return total
