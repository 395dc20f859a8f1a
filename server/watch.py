"""What a coordinator's people have to know of before it hurts: what runs out, what ran out, whose clock is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from common.chain import TOLERANCE_S
from common.deployment import ServerHome, read_status
from common.enrolment import warnings
from common.errors import FedicomError
from common.identity import expiring
from server.gateway_rules import CLOCK
from server.runs import utc_now


class Watch:
    """How things stood at the last `look`."""

    def __init__(self, home: ServerHome) -> None:
        """Looks at nothing yet."""
        self._home = home
        self.warnings: tuple[str, ...] = ()
        self.expired: Mapping[str, str] = {}
        """Processes whose certificate opens nothing any more, or not yet, and why."""
        self._refused = 0
        """Requests that the gateway has refused for their clock."""

    def look(self) -> None:
        """Reads certificates and the gateway's counters."""
        self.warnings = (*warnings(self._home), *self._clocks())
        self.expired = self._expired()

    def _expired(self) -> dict[str, str]:
        found = {}
        for name, path in (
            ("gateway", self._home.gateway_certificate),
            ("superlink", self._home.superlink_certificate),
        ):
            with suppress(FedicomError):  # a file that cannot be read is in the warnings
                if sentence := expiring(path, days=0):
                    found[name] = sentence
        return found

    def _clocks(self) -> tuple[str, ...]:
        """A sentence while members are refused for their clock, who else would only seem to be away."""
        before = self._refused
        with suppress(FedicomError):
            counters = (read_status(self._home.gateway_stats) or {}).get("refused") or {}
            self._refused = int(counters.get(CLOCK, 0))
        if self._refused in (0, before):
            return ()
        here = f"{utc_now()[:16].replace('T', ' ')} UTC"
        return (
            f"requests of members are refused, for they were signed more than {TOLERANCE_S / 60:.0f} minutes before or "
            f"after {here}: if that is not the time now, set this machine's clock; else a site's is wrong, and its own "
            "`fedicom site status` says so",
        )
