"""The time, as records have it."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now(timespec: str = "seconds") -> str:
    """This moment, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=timespec)
