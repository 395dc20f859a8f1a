"""A run on disk: what was ordered of it, how it stands, and that one process alone works on it."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from common.clock import utc_now
from common.config import validate_json
from common.deployment import Name, ServerHome, read_status
from common.errors import ConfigError, FedicomError, StorageError
from common.exchange import NAME_PATTERN, Digest
from common.storage import held_alone, private_folder, storing, to_disk, to_system, write_whole

if TYPE_CHECKING:
    from common.config import Recipe
    from server.rounds import RoundReport, ServerState

log = logging.getLogger(__name__)

State = Literal["waiting", "training", "evaluating", "concluding", "finished", "failed", "stopped"]
Patience = Annotated[float, Ge(0), Le(365 * 86400)]

PATIENCE_S = 2 * 86400.0
"""A hospital that works at night only is a day away; two of them let somebody notice."""
_ETA_ROUNDS = 3
"""Rounds whose mean time the estimate goes by."""
_SILENT = ("late", "offline", "failed")
_MAX_ROWS = 10_000
"""Sites in a status file; a node may call itself anything."""


class NoRunError(ConfigError):
    """No run of this name."""


class BusyError(FedicomError):
    """Another process works on the run."""


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Order:
    """`run.json`: what an operator wants of a run."""

    run: Name
    recipe_id: Digest
    wanted: Literal["running", "concluded", "stopped"]
    """concluded: train no more, and make the model of what there is."""
    submitted: str
    """UTC, ISO 8601."""
    by: str
    """Name of the token that submitted it."""
    patience_s: Patience = PATIENCE_S
    """How long a round is asked again while too few sites answer."""


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    home: ServerHome
    name: str

    @property
    def path(self) -> Path:
        return self.home.runs / self.name

    @property
    def recipe_file(self) -> Path:
        """The signed recipe."""
        return self.path / "recipe.json"

    @property
    def order_file(self) -> Path:
        return self.path / "run.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def order(self) -> Order:
        """What was ordered.

        Raises:
            NoRunError: There is no such run.
            ConfigError: Its file is damaged.
        """
        if not re.fullmatch(NAME_PATTERN, self.name) or not self.order_file.is_file():
            names = ", ".join(run_names(self.home)[-8:]) or "none yet"
            raise NoRunError(f"there is no run {self.name[:64]!a}; runs: {names}")
        with storing("run.json"):
            text = self.order_file.read_bytes()
        order = validate_json(Order, text)
        if order.run != self.name:
            raise ConfigError(f"the folder of run {self.name} holds run {order.run}; name it so again")
        return order

    def write_order(self, order: Order) -> None:
        """Writes `run.json`; from then on the run is there."""
        write_whole(self.order_file, _text(asdict(order)))

    @property
    def status(self) -> dict[str, Any]:
        """How the run stands; empty before it began, and when the file is damaged: the next change writes it anew."""
        try:
            return read_status(self.status_file) or {}
        except FedicomError:
            return {}

    @property
    def active(self) -> bool:
        """Whether a process should work on it."""
        return self.order.wanted != "stopped" and self.status.get("state") not in ("finished", "failed")

    def settle(self, **changes: Any) -> bool:
        """Changes the status while no process works on the run; False, and nothing is done, while one does.

        Raises:
            StorageError: The disk is full or not writable.
        """
        try:
            with self.alone():
                now = utc_now()
                write_whole(self.status_file, _text({"run": self.name, **self.status, **changes, "updated": now}))
        except BusyError:
            return False
        return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps every other process out; the system frees it when this one ends, however it ends.

        Raises:
            BusyError: Another one is at work.
        """

        def busy() -> BusyError:
            return BusyError(f"another process works on run {self.name}; wait until it has ended")

        with held_alone(private_folder(self.path) / ".lock", "the folder of the run", busy):
            yield


def run_names(home: ServerHome) -> tuple[str, ...]:
    """All runs, sorted by when they were submitted."""
    if not home.runs.is_dir():
        return ()
    found = [path for path in home.runs.glob("*/run.json") if re.fullmatch(NAME_PATTERN, path.parent.name)]

    def submitted(path: Path) -> str:
        try:
            return str(json.loads(path.read_bytes())["submitted"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    return tuple(path.parent.name for path in sorted(found, key=lambda path: (submitted(path), path.parent.name)))


NOT_YET = "has not come yet"
"""Why a site is offline at the start of a run's process, which then asks who is there."""


class RunStatus:
    """`status.json`, written whole at every change by the process that works on the run."""

    def __init__(self, run: Run, recipe: Recipe, members: Sequence[str]) -> None:
        """Goes on from the file that is there."""
        self._run, self._asked = run, dict[str, float]()
        earlier = run.status
        sites = earlier.get("sites")
        known: Mapping[str, Any] = sites if isinstance(sites, dict) else {}
        self.plain: dict[str, Any] = {
            "run": run.name,
            "recipe": recipe.name,
            "recipe_id": recipe.id,
            "state": "waiting",
            "round": earlier.get("round", 0),
            "rounds": recipe.rounds,
            "started": earlier.get("started") or utc_now(),
            "eta_s": None,
            "last_round": earlier.get("last_round"),
            "round_began": None,
            "admitted": earlier.get("admitted", 0),
            "refused": earlier.get("refused", 0),
            "sites": {
                name: {**_SITE, **known.get(name, {})}
                for name in sorted({*members, *known})
                if re.fullmatch(NAME_PATTERN, name)  # "node 5" is another one next time
            },
            "error": None,
            "summary": None,
        }
        for site in self.plain["sites"].values():
            site["state"], site["why"] = "offline", NOT_YET
        self.change()

    def change(self, **changes: Any) -> None:
        """Writes these fields; a full disk is logged and does not stop the run: what must not be lost tells it.

        Only another state of the run outlives a power cut; the rest is there to be looked at.
        """
        flush = to_disk if "state" in changes and changes["state"] != self.plain["state"] else to_system
        self.plain |= changes
        self.plain["updated"] = utc_now()
        try:
            write_whole(self._run.status_file, _text(self.plain), flush)
        except StorageError as error:
            log.error("status.json: %s", error)

    def watch(self, site: str, state: str, why: str) -> None:
        """What became of a site just now, as the transport tells it."""
        if state == "asked":
            self._asked[site] = time.monotonic()
        facts: dict[str, Any] = {"state": state, "why": "" if state in ("online", "asked", "answered") else why[:500]}
        if state in ("online", "answered", "refused"):
            facts["last_seen"] = utc_now()
        if state == "answered" and site in self._asked:
            facts["seconds"] = round(time.monotonic() - self._asked.pop(site), 1)
        self._site(site, facts)
        self.change()

    def round_done(self, state: ServerState, report: RoundReport) -> None:
        """A round is over."""
        number = state.round  # the closing evaluation has a number, and is no round to whoever looks
        for name, done in report.accepted.items():
            epsilon = done.spent.epsilon if done.spent is not None else None
            self._site(name, {"state": "answered", "why": "", "round": number, "epsilon": epsilon})
        for name, why in report.refused.items():
            told = self.plain["sites"].get(name, {}).get("state")
            self._site(name, {"state": told if told in _SILENT else "refused", "why": why[:500]})
        history = state.history
        lately = [done.seconds for done in history[-_ETA_ROUNDS:]]
        left = self.plain["rounds"] - state.round + 1  # the closing evaluation is a round as well
        self.change(
            round=state.round,
            eta_s=None if state.done else round(left * sum(lately) / len(lately), 1),
            last_round={
                "round": report.round,
                "work": report.work,
                "seconds": report.seconds,
                "validation": report.validation,
                "accepted": len(report.accepted),
                "refused": len(report.refused),
            },
            admitted=sum(len(done.accepted) for done in history),
            refused=sum(len(done.refused) for done in history),
            error=None,
        )

    def _site(self, name: str, facts: Mapping[str, Any]) -> None:
        sites = self.plain["sites"]
        if name in sites or len(sites) < _MAX_ROWS:
            sites[name] = {**_SITE, **sites.get(name, {}), **facts}


_SITE: Mapping[str, Any] = {
    "state": "offline", "why": "", "round": None, "seconds": None, "epsilon": None, "last_seen": None,
}  # fmt: skip


def _text(plain: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(plain), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a reader would stumble over the whole file because of one number."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
