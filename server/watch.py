"""What a coordinator's people have to know of before it hurts: what runs out, what ran out, whose clock is wrong."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import suppress

from common.chain import TOLERANCE_S
from common.clock import utc_now
from common.deployment import ServerHome, read_status
from common.enrolment import warnings
from common.errors import FedicomError
from common.identity import expiring
from server.gateway_rules import CLOCK, stamp


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
        self._clocks()  # what an earlier gateway has counted is over
        # The gateway takes up a new pair of its own by itself.
        self._files = {
            "superlink": (home.superlink_certificate, home.superlink_key, home.ca),
            "gateway": (home.ca,),
        }
        self._in_use = {name: [stamp(path) for path in paths] for name, paths in self._files.items()}

    def look(self) -> None:
        """Reads certificates and the gateway's counters."""
        self.warnings = (*warnings(self._home), *self._clocks())
        self.expired = self._expired()

    def renewed(self) -> tuple[str, ...]:
        """Processes with an older certificate than the folder has, each told once; none while a pair is half there."""
        home, now = self._home, {name: [stamp(path) for path in paths] for name, paths in self._files.items()}
        found = tuple(name for name in now if now[name] != self._in_use[name])
        if found:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(home.superlink_certificate, home.superlink_key, password="")  # asks nobody
                context.load_verify_locations(home.ca)
            except OSError:  # ssl.SSLError as well: what runs goes on with what it has
                return ()
            self._in_use = now
        return found

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
