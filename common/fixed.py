"""Fixed point modulo 2^32: how an update becomes whole numbers whose sum over all sites cannot wrap."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.errors import SecureAggregationError
from common.weights import Weights, room

if TYPE_CHECKING:
    from common.config import Federation

Words = npt.NDArray[np.uint32]

RANGE = 2**31 - 1
"""Largest size of a sum: beyond it a positive number would read as a negative one."""
COARSEST = 2.0**-20
"""A recipe is refused when 32 bits would leave coarser steps."""
_MEANS = ("fedavg", "fedprox", "fedadam", "fedyogi", "fedavgm")
"""Strategies that need no more than the mean of the updates."""
_MOST_BITS = 40
_CHUNK = 1 << 18
"""Numbers converted at once: 2 MiB in float64."""


class Residues:
    """A flat vector of whole numbers modulo 2^32, as it crosses the wire; immutable."""

    __slots__ = ("_digest", "words")

    def __init__(self, words: npt.NDArray[np.unsignedinteger]) -> None:
        """Copies nothing that is already a flat uint32 array; later writes to it are forbidden.

        Raises:
            ValueError: It is not flat, or not of 32-bit words.
        """
        if words.ndim != 1 or words.dtype.newbyteorder("=") != np.uint32:
            raise ValueError(f"got {words.dtype} of {words.ndim} axes, expected a flat array of uint32")
        self.words: Words = np.ascontiguousarray(words, dtype="<u4").view()
        self.words.flags.writeable = False
        self._digest = ""

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Residues) and self.digest == other.digest

    __hash__ = None  # type: ignore[assignment]  # compared by content, used as no key

    def __repr__(self) -> str:
        return f"Residues({len(self)} words, {self.digest[:12]})"

    @property
    def nbytes(self) -> int:
        return 4 * len(self.words)

    @property
    def digest(self) -> str:
        """SHA-256 of the little-endian words."""
        if not self._digest:
            self._digest = hashlib.sha256(self.words.data).hexdigest()
        return self._digest


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """A number times its site's weight as a multiple of 2^-`bits`, modulo 2^32.

    `bits` is the most for which the sum over all sites stays in range, whatever they send. The mean that comes out is
    off by at most 2^-bits / 2 times the number of summed sites over their weight, and a rounding to float32.
    """

    sites: int
    """Most that are ever summed."""
    limit: float
    """Largest L2 norm of one update, hence of each number in it."""
    max_weight: int = 1
    """Largest weight of a site."""

    @classmethod
    def of(cls, federation: Federation) -> FixedPoint:
        """That of a recipe."""
        weighted = federation.site_weights == "patients" and federation.max_patients
        return cls(sites=federation.sites, limit=federation.max_update_norm, max_weight=weighted or 1)

    @property
    def bits(self) -> int:
        """Binary places behind the point; negative when not even whole numbers fit."""
        bits = min(_MOST_BITS, math.floor(math.log2(RANGE / (self.sites * self.max_weight * self.limit))))
        return bits if self.sites * self._bound(bits) <= RANGE else bits - 1

    def objection(self) -> str | None:
        """Why the range of 32 bits is too small, with the numbers; None when it is not."""
        if self.sites * self.max_weight > RANGE:
            return f"{self.sites} sites of weight {self.max_weight} each sum to more than 32 bits hold"
        step = self.sites * self.limit / RANGE  # of a site of full weight
        if step <= COARSEST:
            return None
        return (
            f"is {self.limit:g}: sums of {self.sites} numbers up to that size leave steps of {step:.2g} in 32 bits, "
            f"{COARSEST:.2g} is the coarsest allowed; say at most {math.floor(RANGE * COARSEST / self.sites)}"
        )

    def encode(self, delta: Weights, weight: int) -> Words:
        """The words of an update: each number times the weight, then the weight itself.

        Raises:
            SecureAggregationError: The update is not finite, its norm is above the limit, or the weight is not in
                1..`max_weight`. Nothing is cut off and nothing wraps.
        """
        self.check(delta, weight)
        bits, words = self.bits, np.empty(delta.size + 1, "<u4")
        scale, bound = weight * 2.0**bits, self._bound(bits)
        for start in range(0, delta.size, _CHUNK):
            part = np.rint(delta.whole[start : start + _CHUNK].astype(np.float64) * scale).astype(np.int64)
            if int(np.abs(part).max()) > bound:
                raise SecureAggregationError("a number of the update does not fit into the fixed point")
            words[start : start + part.size] = part.astype(np.uint32)
        words[-1] = weight
        return words

    def check(self, delta: Weights, weight: int) -> None:
        """`encode` without the work.

        Raises:
            SecureAggregationError: As there.
        """
        norm = delta.norm
        if not norm <= self.limit:
            raise SecureAggregationError(
                f"the update has norm {norm:.4g}, and federation.max_update_norm is {self.limit:g}: larger numbers "
                "would wrap in the secure sum; the coordinator lowers training.lr or raises the limit"
            )
        if not 1 <= weight <= self.max_weight:
            raise SecureAggregationError(
                f"this site's weight is above {self.max_weight}, the recipe's federation.max_patients"
            )

    def decode(self, words: Words, count: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Weights, int]:
        """The mean over `count` sites by weight, and the sum of their weights.

        Raises:
            SecureAggregationError: A sum is of a size that so many honest updates cannot give.
        """
        size = sum(math.prod(shape) for shape in shapes.values())
        if len(words) != size + 1:
            raise SecureAggregationError(f"the secure sum has {len(words)} words, expected {size + 1}")
        weight, bound = int(words[-1]), count * self._bound(self.bits)
        if not count <= weight <= count * self.max_weight:
            raise SecureAggregationError(f"the secure sum's weight is {weight}, impossible for {count} sites")
        (whole, arrays), scale = room(shapes), 2.0**-self.bits / weight
        for start in range(0, size, _CHUNK):
            part = words[start : min(start + _CHUNK, size)].astype(np.uint32).view(np.int32)
            wide = part.astype(np.int64)
            if int(np.abs(wide).max()) > bound:
                raise SecureAggregationError(
                    f"the secure sum of {count} sites has a number outside of its range: some site sent what is "
                    "no masked update"
                )
            whole[start : start + part.size] = wide * scale
        return Weights.filled(whole, arrays), weight

    def _bound(self, bits: int) -> int:
        """Largest size of one site's whole number."""
        return math.ceil(self.max_weight * self.limit * 2.0**bits)


def fewest(sites: int) -> int:
    """Least quorum of a secure sum over so many sites: more than two thirds of them."""
    return 2 * sites // 3 + 1


def secure_objection(federation: Federation) -> str | None:
    """Why the updates of such a federation cannot go into a secure sum; None when they can."""
    sites, least = federation.sites, fewest(federation.sites)
    if not 3 <= sites <= 1000:
        return f"federation.sites is {sites}; secure aggregation needs 3 to 1000 (of two sites each knows the other's)"
    if federation.strategy not in _MEANS:
        return (
            f"federation.strategy={federation.strategy} looks at single updates, which secure aggregation hides; say "
            f"one of {', '.join(_MEANS)}, or privacy.secure_aggregation=false"
        )
    if federation.compression != "none":
        return (
            f"federation.compression={federation.compression} rounds single updates, but secure aggregation sums fixed "
            "point numbers of 4 bytes under masks; say federation.compression=none, or privacy.secure_aggregation=false"
        )
    if federation.fraction < 1:
        return "federation.fraction is below 1; a secure sum is over all sites, say federation.fraction=1"
    if federation.quorum < least:
        return (
            f"federation.quorum is {federation.quorum}; with secure aggregation over {sites} sites it is at least "
            f"{least}, more than two thirds: it is also how many sites can open a sum"
        )
    if federation.site_weights == "patients" and federation.max_patients is None:
        return (
            "federation.max_patients is needed with site_weights=patients under secure aggregation: it sets the range"
        )
    objection = FixedPoint.of(federation).objection()
    return f"federation.max_update_norm {objection}" if objection else None
