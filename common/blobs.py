"""Large arrays beside the messages, in pieces, and what both sides agree on about them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Protocol

PIECE_BYTES = 4 << 20
"""Size of the pieces; the last one of an array is shorter."""
BESIDE_BYTES = 1 << 18
"""Smaller arrays stay in the message: the calls for a piece would cost more than they bring."""
DIGEST = re.compile(r"[0-9a-f]{64}")
"""Also the name of a piece: `names`."""
TICKET = re.compile(r"[0-9a-f]{32}")
PATH = "/v1/blobs/"
"""Of the gateway: with `ticket`, what this site has sent (GET); with `ticket/name`, one piece (GET, PUT)."""

BELL_PATH = "/v1/bell/"
"""Of the gateway: with a mark of 16 hexadecimal digits (GET), answered with another one as soon as the coordinator has
sent something, and after `BELL_S` with the same."""
BELL_S = 25.0
MARK = re.compile(r"[0-9a-f]{16}")


class Blobs(Protocol):
    """Where the pieces of one round lie, as one side sees it."""

    @property
    def ticket(self) -> str:
        """Names the round: 32 random hexadecimal digits."""

    @property
    def most_bytes(self) -> int:
        """Longest array that is taken from the other side."""

    def put(self, name: str, piece: memoryview) -> None:
        """Keeps these bytes for the other side under this name."""

    def get(self, name: str, piece: memoryview) -> None:
        """Fills `piece` with the other side's bytes of this name; what came is checked by the caller."""


Open = Callable[[str], Blobs]
"""Finds the round of a ticket."""


def signed_request(method: str, path: str, timestamp: str) -> bytes:
    """What a node signs with its key to make one request beside Flower's; the path of a piece names its content.

    A signature of Flower's own, which is one over a time alone, is none of these, and none of these is one of Flower's.
    """
    return f"fedicom request\n{method}\n{path}\n{timestamp}".encode()


def names(digest: str, nbytes: int) -> list[str]:
    """The names of the pieces of an array: they follow from its digest, so what has this name is always the same.

    Args:
        digest: Of the numbers; with the name of their form where their bytes are no float32.
    """
    count = -(-nbytes // PIECE_BYTES)
    return [hashlib.sha256(f"{digest} {number}".encode()).hexdigest() for number in range(count)]


def pieces(data: memoryview) -> list[memoryview]:
    """The pieces of an array, in order."""
    return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
