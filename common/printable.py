"""Words of others, made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with a space for all that would move the cursor, colour, hide or turn around what stands there."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
