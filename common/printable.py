"""Words for a terminal and for pages: those of others made safe, and counts."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with a space for all that would move the cursor, colour, hide or turn around what stands there."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def number_of(count: int, noun: str) -> str:
    """A count with its noun: 1 log, 1,234 logs, 2 studies."""
    many = noun.removesuffix("y") + "ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else many}"
