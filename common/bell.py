"""A file that tells another process of this machine that something has come: nobody has to ask again and again.

Whoever waits looks at the file's time a hundred times a second, which costs next to nothing, and asks what it asks from
time to time all the same: a bell that is lost costs time, never a message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.01


class Bell:
    """A bell; any process that may write the file rings it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def mark(self) -> str:
        """Changes whenever it is rung, 16 hexadecimal digits; take it before looking for what it announces."""
        try:
            return f"{self._path.stat().st_mtime_ns:016x}"
        except OSError:
            return "0" * 16

    @property
    def there(self) -> bool:
        """Whether somebody has ever rung it."""
        return self._path.exists()

    def ring(self) -> None:
        """Wakes who waits; a full disk costs time only."""
        now = time.time_ns()
        with suppress(OSError):
            try:
                os.utime(self._path, ns=(now, now))
            except FileNotFoundError:
                self._path.touch(mode=0o600)
                os.utime(self._path, ns=(now, now))

    def wait(self, mark: str, timeout_s: float, sleep: Callable[[float], object] = time.sleep) -> bool:
        """Returns when it was rung after `mark` was taken, or after `timeout_s`: whether it was rung.

        Args:
            sleep: May return something true to end the wait, as `threading.Event.wait` does.
        """
        end = time.monotonic() + timeout_s
        while self.mark == mark:
            left = end - time.monotonic()
            if left <= 0 or sleep(min(LOOK_S, left)):
                return False
        return True
