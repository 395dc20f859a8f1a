"""The lookup tables of a header: Modality LUT, VOI LUT and the colours of a palette."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.imaging.refusal import Refusal, RefusalCode

TABLE_BYTES = 2**17
"""The largest table has 65,536 entries of two bytes."""
_AT_ONCE = 2**20
"""Values that are looked up at a time: their places take eight bytes each."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A table from whole numbers to whole numbers."""

    entries_N: NDArray[np.unsignedinteger[Any]]
    first: int
    """What the first entry stands for."""
    bits: int
    """Of an entry."""

    @property
    def limits(self) -> tuple[float, float]:
        """What an entry may be."""
        return 0.0, float((1 << self.bits) - 1)

    def __call__(self, values: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
        """The entries of the values, rounded; what lies outside the table takes its first or last entry."""
        found = np.empty(values.size, self.entries_N.dtype)
        flat = values.reshape(-1)
        for at in range(0, values.size, _AT_ONCE):
            part = flat[at : at + _AT_ONCE]
            # never in the type of values or entries, which hold no difference of the two
            wide = part.astype(np.int64) if part.dtype.kind in "iu" else np.rint(part)
            place = np.clip(wide - self.first, 0, len(self.entries_N) - 1).astype(np.int64)
            found[at : at + _AT_ONCE] = self.entries_N[place]
        return found.reshape(values.shape)


def lookup(item: Dataset, name: str, inputs: tuple[float, float], *, signed: bool) -> Lookup:
    """Reads a table.

    The first value mapped is two bytes, signed or not. The file says which in explicit VR; in implicit VR it goes by
    what the table is applied to. Where only the other reading meets any value that can occur, that one is meant.

    Args:
        item: Holds the elements.
        name: What their keywords begin with, for example LUT.
        inputs: Smallest and largest value that may be looked up.
        signed: Whether the standard has the first value mapped signed.

    Raises:
        Refusal: The table is missing, contradicts itself or covers no value that can occur.

    Source: DICOM PS3.3 C.7.6.3.1.5, C.7.6.3.1.6, C.11.1.1, C.11.2.1.1.
    """
    implicit, little = item.original_encoding
    about = _words(item, f"{name}Descriptor", little=little is not False)
    if len(about) != 6:
        raise Refusal(RefusalCode.CORRUPT, "A lookup table does not say how many entries of how many bits it has.")
    count, pattern, bits = (int(word) for word in np.frombuffer(about, "<u2"))
    count = count or 2**16
    if not 8 <= bits <= 16:
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, f"Lookup tables with entries of {bits} bits are not supported.")
    data = _words(item, f"{name}Data", little=little is not False)
    if len(data) == 2 * count:
        entries_N = np.frombuffer(data, "<u2")
    elif len(data) == count + count % 2:  # the byte that makes the length even carries nothing
        entries_N, bits = np.frombuffer(data, np.uint8, count), 8
    else:
        raise Refusal(
            RefusalCode.CORRUPT,
            f"A lookup table has {len(data):,} bytes, which are not {count:,} entries; export again.",
        )
    if int(entries_N.max()) >= 1 << bits:
        raise Refusal(RefusalCode.CORRUPT, f"A lookup table has entries of more than the {bits} bits that it declares.")
    vr = item[f"{name}Descriptor"].VR
    if not implicit and vr in ("US", "SS"):
        signed = vr == "SS"
    return Lookup(entries_N, _first(pattern, count, inputs, signed=signed), bits)


def _first(pattern: int, count: int, inputs: tuple[float, float], *, signed: bool) -> int:
    if pattern < 2**15:
        return pattern
    for first in sorted((pattern, pattern - 2**16), reverse=not signed):
        if first <= inputs[1] and inputs[0] < first + count:
            return first
    raise Refusal(RefusalCode.CORRUPT, "A lookup table covers no value that the image can hold; export again.")


def _words(item: Dataset, keyword: str, *, little: bool) -> bytes:
    """Bytes of an element of two-byte words, the lower byte first."""
    if keyword not in item:
        return b""
    element = item[keyword]
    value: Any = element.value
    if isinstance(value, bytes):
        swapped = not little and element.VR != "OB" and len(value) % 2 == 0
        return np.frombuffer(value, ">u2").astype("<u2").tobytes() if swapped else value
    whole = [] if value is None else [value] if isinstance(value, int) else list(cast("list[int]", value))
    return np.array([word & 0xFFFF for word in whole], "<u2").tobytes()
