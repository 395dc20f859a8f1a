"""The time, as records have it."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """This moment to the second, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
