"""Whether the coordinator takes this node: what its gateway, and the SuperLink behind that, answer it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from client.blobs import LostError, Remote
from client.machine import Line
from client.reach import COORDINATOR, NOTHING_BEHIND, REFUSALS, gateway
from common.deployment import SiteHome
from common.errors import FedicomError

MEMBER = ("clock", "key")
"""Checks that fail where the gateway is reached, and refuses this node."""


def access(home: SiteHome) -> Iterator[Line]:
    """The way to the gateway, and what is said to this node there."""
    reached = True
    for line in gateway(home):
        reached = reached and line.level != "FAIL"
        yield line
    if reached:
        yield from _member(home)


def failure(home: SiteHome) -> Line | None:
    """What keeps this node from the coordinator, if anything does; the refusal of its key before what leads there."""
    try:
        found = [line for line in access(home) if line.level == "FAIL" or line.what == COORDINATOR]
    except (FedicomError, OSError) as error:
        found = [Line(level="FAIL", what="gateway", says=str(error), fix="run `fedicom site preflight`")]
    return min(found, key=lambda line: line.level != "FAIL", default=None)


def _member(home: SiteHome) -> Iterator[Line]:
    """Whether the coordinator knows this node's key; the certificate alone says nothing about that."""
    remote = Remote(home, threading.Event())
    try:
        stranger, node = remote.statuses()
        behind = remote.behind() if node == 404 else None
    except LostError as error:
        yield Line(
            level="FAIL", what="key", says=str(error),
            fix="run preflight again; if it stays so, ask the people of the network, or of the proxy",
        )  # fmt: skip
        return
    if node in REFUSALS:
        yield Line(
            level="FAIL", what="key",
            says=f"the gateway refuses this node's key ({node}, expected 404): the site was revoked, another kit has "
            "taken this one's place, or the clock is wrong",
            fix="set the clock if it is told above; else ask the coordinator for this site's newest kit, and "
            "`fedicom site join` it",
        )  # fmt: skip
    elif node != 404:
        yield Line(
            level="warn", what="key", says=f"could not be tried: the gateway answered {node}, expected 404",
            fix="ask the coordinator whether the server runs, and run preflight again",
        )  # fmt: skip
    elif stranger not in REFUSALS:
        yield Line(
            level="warn", what="key", says=f"could not be tried: the gateway answers a stranger as it does members "
            f"({stranger})", fix="look at `fedicom site status` whether the coordinator is reached",
        )  # fmt: skip
    else:
        yield Line(level="ok", what="key", says="the coordinator knows this node's key")
    if behind in NOTHING_BEHIND:
        yield Line(
            level="warn", what=COORDINATOR, says=f"the gateway is there, but not the SuperLink behind it ({behind})",
            fix="ask the coordinator what `fedicom server status` says; the node waits for it",
        )  # fmt: skip
