"""The logs of a federation as an auditor has them: whose each one is, and whether they hold together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.chain import TOLERANCE_S, AuditError, Event, Fault, anchors, parts, verify_against, walk
from common.errors import ConfigError
from common.storage import storing

if TYPE_CHECKING:
    from common.registry import Registry

COORDINATOR, AUTHORITY = "server", "authority"
"""What the logs of the coordinator and of the federation's authority are called beside those of the sites."""

Role = Literal["coordinator", "site", "authority"]

_LARGEST = 1e300
_KINDS: Mapping[str, Role] = {
    "server started": "coordinator", "run started": "coordinator", "run resumed": "coordinator",
    "sites present": "coordinator", "round aggregated": "coordinator",
    "node started": "site", "site started": "site", "question received": "site", "plan received": "site",
    "update sent": "site",
}  # fmt: skip
"""Kinds that one side alone writes, by which its log is known."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The public keys that an auditor trusts, earlier ones included."""

    authority: frozenset[str]
    coordinator: frozenset[str]
    sites: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, registry: Registry) -> Keys:
        """All keys that the members of a federation have or had."""
        retired = registry.retired
        return cls(
            authority=frozenset({registry.authority}),
            coordinator=frozenset({registry.coordinator, *retired.get("coordinator", ())}),
            sites={
                name: frozenset({member.signing, *retired.get(name, ())}) for name, member in registry.sites.items()
            },
        )

    def owner(self, key: str) -> tuple[str, Role, frozenset[str]] | None:
        """Whose key it is, and all keys of that party."""
        if key in self.coordinator:
            return COORDINATOR, "coordinator", self.coordinator
        if key in self.authority:
            return AUTHORITY, "authority", self.authority
        return next(((name, "site", keys) for name, keys in self.sites.items() if key in keys), None)


@dataclass(frozen=True, kw_only=True)
class Log:
    """A log as it was read."""

    path: Path
    name: str
    """Of the site, `COORDINATOR` or `AUTHORITY`."""
    role: Role
    events: tuple[Event, ...]
    """All of them, or those ahead of the first bad one."""
    wrong: AuditError | None
    """Why it does not hold by itself."""
    parts: int
    """Files before the current one."""
    key_known: bool
    """Signed by a key that was given, not only by the one that the log names itself."""

    @property
    def coordinator(self) -> bool:
        return self.role == "coordinator"

    @property
    def key(self) -> str:
        """Public key that the first event names."""
        return str(self.events[0].facts.get("public_key", "")) if self.events else ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A log by itself (`against` is None), or held against what another log remembers of it."""

    log: str
    against: str | None
    holds: bool
    anchors: int = 0
    """Heads of it that the other log remembers; 0 while it holds: there was nothing to check."""
    vouched: int | None = None
    """Number of the last event that one of these heads vouches for."""
    why: str = ""
    fault: Fault | None = None
    number: int | None = None
    """Of the first bad event."""
    kind: str | None = None


State = Literal["verified", "alone", "broken"]


def read_logs(where: Iterable[Path], keys: Keys | None = None, *, tolerance_s: float = TOLERANCE_S) -> tuple[Log, ...]:
    """Reads logs and finds out whose they are; one that does not hold comes with the events ahead of its fault.

    Args:
        where: Files, or folders that hold logs themselves or in `audit/`; the folder of one run stands for the log of
            the coordinator that ran it. One that is named twice is read once.
        keys: Without them each log is held against the key that it names itself.

    Returns:
        The coordinator's first, then the others by name.

    Raises:
        ConfigError: There is no log, in one of the folders perhaps, or two are of one owner.
        StorageError: A file cannot be read.
    """
    # A run's folder stands for its coordinator's log, which may be given as well.
    files = {os.path.realpath(path): path for place in where for path in log_files(place)}
    logs = [_read(path, keys, tolerance_s) for path in files.values()]
    if not logs:
        raise ConfigError("there is no log; give files like audit/north.jsonl, or the folder that holds them")
    logs = _named(_one_coordinator(logs))
    logs.sort(key=lambda log: (not log.coordinator, log.name))
    for one, two in pairwise(logs):
        if one.name == two.name:
            raise ConfigError(
                f"{one.path.name} and {two.path.name} are both logs of {one.name}; give one log of each side"
            )
    return tuple(logs)


def check_logs(logs: Sequence[Log], *, tolerance_s: float = TOLERANCE_S) -> tuple[Check, ...]:
    """Each log by itself, then each against what the other side remembers of it; broken ones are held against none."""
    checks = [
        Check(log=log.name, against=None, holds=True) if log.wrong is None else _failed(log, None, log.wrong)
        for log in logs
    ]
    whole = [log for log in logs if log.wrong is None]
    for log in whole:
        for other in whole:
            if {log.role, other.role} == {"coordinator", "site"}:
                try:
                    checks.append(check_pair(log, other, tolerance_s))
                except AuditError as error:
                    checks.append(_failed(log, other.name, error))
    return tuple(checks)


def check_pair(log: Log, other: Log, tolerance_s: float = TOLERANCE_S, *, needed: bool = False) -> Check:
    """Holds a log against what one of the other side remembers of it.

    Raises:
        AuditError: It does not hold; or, if that is `needed`, the other log remembers nothing of it.
    """
    name = "" if log.coordinator else log.name
    try:
        found = verify_against(log.events, other.events, name=name, log=log.path.name, tolerance_s=tolerance_s)
    except AuditError as error:
        if error.fault != "not anchored" or needed:
            raise
        return Check(log=log.name, against=other.name, holds=True, why=error.says)
    remembered = {head for _, head in anchors(other.events, name) if isinstance(head, str)}
    vouched = max(event.number for event in log.events if event.hash in remembered)
    return Check(log=log.name, against=other.name, holds=True, anchors=found, vouched=vouched)


def state_of(checks: Sequence[Check]) -> State:
    """broken: something is wrong; verified: another log vouches for each; alone: for at least one, none does.

    The authority's log is the one that nobody else remembers; it does not count.
    """
    if not all(check.holds for check in checks):
        return "broken"
    logs = {check.log for check in checks} - {AUTHORITY}
    return "verified" if logs and {check.log for check in checks if check.anchors} >= logs else "alone"


def first_bad(checks: Iterable[Check]) -> Check | None:
    """The first check that does not hold."""
    return next((check for check in checks if not check.holds), None)


def log_files(place: Path) -> list[Path]:
    """The logs of a folder, without their earlier parts; a file stands for itself.

    Raises:
        ConfigError: The folder holds none.
        StorageError: It cannot be read.
    """
    if not place.is_dir():
        return [place]
    with storing("the folder of the logs"):
        ran = [place.resolve().parents[1] / "audit"] if place.resolve().parent.name == "runs" else []
        for folder in (place / "audit", place, *ran):
            names = {re.sub(r"\.\d{4,}(?=\.jsonl$)", "", path.name) for path in folder.glob("*.jsonl")}
            if names:
                return [folder / name for name in sorted(names)]
    raise ConfigError(f"{place.name} holds no log; give files like audit/north.jsonl, or the folder that holds them")


def _read(path: Path, keys: Keys | None, tolerance_s: float) -> Log:
    owner, allowed = None, None
    if keys is not None:
        with suppress(AuditError):  # told below, of the same event
            owner = keys.owner(str(next(walk(path)).facts.get("public_key")))
        allowed = owner[2] if owner is not None else frozenset()
    events: list[Event] = []
    wrong, earlier = None, 0
    try:
        earlier = len(parts(path))
        for event in walk(path, allowed, tolerance_s=tolerance_s):
            events.append(event)  # one by one, to keep those ahead of a fault
    except AuditError as error:
        wrong = error
    name, role = owner[:2] if owner is not None else _role(path, events)
    log = Log(
        path=path,
        name=name,
        role=role,
        events=tuple(events),
        wrong=wrong,
        parts=earlier,
        key_known=owner is not None,
    )
    strange = next((event for event in events if _KINDS.get(event.kind, role) != role), None)
    return log if strange is None else _ends(log, strange, f"the log is that of a {role}")


def _role(path: Path, events: Sequence[Event]) -> tuple[str, Role]:
    """Whose log it is, by what is in it first; a site's name is found later."""
    if any(event.facts.get("action") == "federation provisioned" for event in events[:2]):
        return AUTHORITY, "authority"
    role = next((_KINDS[event.kind] for event in events if event.kind in _KINDS), None)
    if role == "coordinator" or (role is None and path.stem == COORDINATOR):
        return COORDINATOR, "coordinator"
    return "", "site"


def _ends(log: Log, strange: Event, whose: str) -> Log:
    """The log as one that does not hold from this event on."""
    says = f"only a {_KINDS[strange.kind]} writes this, and {whose}"
    wrong = AuditError(says, "foreign kind", log=log.path.name, number=strange.number, kind=strange.kind)
    return replace(log, events=log.events[: strange.number], wrong=wrong)


def _one_coordinator(logs: Sequence[Log]) -> Sequence[Log]:
    """Of several logs that pass for the coordinator's the one whose key is known, or that the others remember, or that
    the auditor calls so; the rest are those of sites, and do not hold. All as they are, where that cannot be told."""
    claims = [log for log in logs if log.coordinator]
    if len(claims) < 2:
        return logs
    heads = {head for log in logs if not log.coordinator for event in log.events for head in event.heads}
    remembered = {log.path: any(event.hash in heads for event in log.events) for log in claims}

    def rank(log: Log) -> tuple[bool, bool, bool]:
        return log.key_known, remembered[log.path], log.path.stem == COORDINATOR

    one, *rest = sorted(claims, key=rank, reverse=True)
    # Copies of a log, or those of two federations, are no offence.
    if any(_same(log, one) or rank(log) == rank(one) or remembered[log.path] > one.key_known for log in rest):
        return logs
    return [_no_coordinator(log, one) if log in rest else log for log in logs]


def _no_coordinator(log: Log, one: Log) -> Log:
    log = replace(log, name="", role="site")
    strange = next((event for event in log.events if event.kind in _KINDS), None)
    return log if strange is None else _ends(log, strange, f"{one.path.name} is the log of the coordinator")


def _same(one: Log, other: Log) -> bool:
    """Whether both are the same chain, as far as it goes."""
    return one.events[:1] == other.events[:1]


def _named(logs: Sequence[Log]) -> list[Log]:
    """Sites by what the coordinator remembers, for a file may have any name; else by the file."""
    heads = [as_map(event.facts.get("heads")) for log in logs if log.coordinator for event in log.events]

    def name(log: Log) -> str:
        own = {event.hash for event in log.events}
        names = [name for row in heads for name, head in row.items() if isinstance(head, str) and head in own]
        return max(sorted(set(names)), key=names.count) if names else log.path.stem

    named = [log if log.name else replace(log, name=name(log)) for log in logs]
    # Two chains of one name: the coordinator's memory is false, which shows when each is held against it by its file.
    return [
        replace(log, name=log.path.stem)
        if not (log.coordinator or log.key_known) and any(log.name == one.name and not _same(log, one) for one in named)
        else log
        for log in named
    ]


def _failed(log: Log, against: str | None, error: AuditError) -> Check:
    return Check(
        log=log.name, against=against, holds=False, why=str(error), fault=error.fault, number=error.number,
        kind=error.kind,
    )  # fmt: skip


def as_map(value: object) -> Mapping[str, Any]:
    """The mapping that a fact should be; empty where it is something else."""
    return value if isinstance(value, Mapping) else {}


def as_number(value: object) -> float | None:
    """The number that a fact should be; None where it is something else, or beyond what can be computed with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value)
