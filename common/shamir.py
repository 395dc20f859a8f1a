"""Shamir's secret sharing (1979): any `threshold` of the shares give the secret, fewer say nothing about it.

Polynomials over the integers modulo the prime 2^256 + 297; a secret is any 32 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33
_DRAWN_BYTES = 48
"""Random bytes behind a coefficient: taken modulo the prime they are uniform up to 2^-127."""


def split(secret: bytes, holders: int, threshold: int, random: Callable[[int], bytes]) -> tuple[bytes, ...]:
    """The shares of holders 1, 2, ... of a secret of 32 bytes.

    Args:
        random: Gives so many secret random bytes.

    Raises:
        ValueError: The secret is not 32 bytes, or `threshold` is not in 1..`holders`.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ValueError(f"got {len(secret)} bytes for {threshold} of {holders} holders")
    coefficients = [int.from_bytes(secret, "little")]
    coefficients += [int.from_bytes(random(_DRAWN_BYTES), "little") % PRIME for _ in range(threshold - 1)]
    return tuple(_value(coefficients, x).to_bytes(SHARE_BYTES, "little") for x in range(1, holders + 1))


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret behind the shares of these holders; all of the given ones are used.

    With a wrong share among them, or fewer than the threshold, it is another value: hold it against something known.

    Returns:
        32 bytes, or None when no secret of 32 bytes has these shares.

    Raises:
        ValueError: A share is not 33 bytes below the prime, or a holder's number is not in 1..prime - 1.
    """
    values = [int.from_bytes(share, "little") for share in shares.values()]
    odd = any(len(share) != SHARE_BYTES for share in shares.values()) or any(value >= PRIME for value in values)
    if odd or not all(0 < x < PRIME for x in shares):
        raise ValueError("a share is out of range")
    factors = _at_zero(tuple(shares))
    secret = sum(factor * value for factor, value in zip(factors, values, strict=True)) % PRIME
    return secret.to_bytes(SECRET_BYTES, "little") if secret < 1 << 8 * SECRET_BYTES else None


def _value(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):  # Horner
        value = (value * x + coefficient) % PRIME
    return value


def _at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange's factors: the value at 0 is the sum of factor times value at each point."""
    factors = []
    for own in points:
        above = below = 1
        for other in points:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors
