"""What the logs of a federation tell a compliance officer, put in order; `common/audit_page.py` draws it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.chain import CLOCK, CONTINUED, KEY, STARTED, TOLERANCE_S, Event
from common.errors import PrivacyError
from common.lineage import Approval, Lineage, LineageError, Run, approvals, lineage, runs
from common.logs import Check, Log, Role, State, as_map, as_number, check_logs, state_of
from common.printable import number_of
from common.storage import write_whole

FORMAT = "fedicom audit report 1"

REFUSALS = (
    "recipe refused",
    "plan refused",
    "budget refused",
    "message refused",
    "round failed",
    "run failed",
    "operator action refused",
)
PEOPLE = ("recipe signed", "recipe approved", "approval withdrawn", "operator action", "model released")
MEMBERS = (STARTED, KEY, "registry in force", "node added", "node revoked")
RUNNING = (
    "server started", "server stopped", "node started", "node stopped", "site started", "run started", "run resumed",
    "training ended", "run concluded", "end vouched for", "run stopped", "configuration", "code", CLOCK, CONTINUED,
)  # fmt: skip
TOLD = (
    "question received", "plan received", "budget reserved", "update kept", "sum joined", "update sent",
    "update sent again", "sum opened", "evaluation sent",
    "sites present", "sites joined", "round aggregated", "evaluation received", "central evaluation", "model exported",
    "privacy audited",
)  # fmt: skip
"""Kinds that the tables of the runs are made of."""


_UNTOLD = "not in the coordinator's log"
_MOST_RELEASES = 16
"""Of noised scores of one recipe at one site, which has one."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """An event, or a part of one."""

    time: str
    log: str
    number: int
    kind: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A log at a glance."""

    name: str
    file: str
    role: Role
    parts: int
    events: int
    """Good ones."""
    first: str
    last: str
    """Times, of the good events."""
    key: str
    key_known: bool


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One thing that left a site."""

    site: str
    told_by: str
    """The log that says so: the site's own, or, where that is not there, the coordinator's."""
    time: str
    round: int
    what: str
    """update, update (sent again) or evaluation."""
    digest: str
    bytes: int | None
    norm: float | None
    clip_norm: float | None
    noise_multiplier: float | None
    epsilon: float | None
    scores: str
    """yes, no, or that the log does not say."""
    fate: str
    """What the coordinator's log says became of it."""


@dataclass(frozen=True, kw_only=True)
class SiteLine:
    """One site in the work on one recipe."""

    name: str
    log: bool
    patients: Mapping[str, int]
    """By split; 0: not told, for it is too small, by the site's policy, or as a weight under masks."""
    counts_rounded: bool
    """Whether the site rounds them down."""
    manifests: tuple[str, ...]
    versions: Mapping[str, str]
    approvals: tuple[Approval, ...]
    """Those that stand at the end of the log."""
    epsilon: float | None
    """Of the updates."""
    delta: float | None
    scores_epsilon: float | None
    """Of scores that the site noised, beside `epsilon`; None where its log tells of none."""
    updates: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Story:
    """All that was done with one recipe."""

    recipe_id: str
    name: str
    """As whoever signed or approved it wrote it down; empty where nobody did."""
    recipe: Mapping[str, Any]
    """Its content, if it was at hand."""
    coordinator: str
    """Public key that signed it, as the logs have it."""
    first: str
    last: str
    rounds: int
    """Aggregated, and not undone by a restart."""
    concluded: bool
    sites: tuple[SiteLine, ...]
    sent: tuple[Sent, ...]
    lineages: tuple[Lineage, ...]
    """Of every exported file whose links all hold."""
    broken: tuple[str, ...]
    """Exported files whose lineage does not hold, and why."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """The whole report."""

    state: State
    tolerance_s: float
    logs: tuple[LogLine, ...]
    checks: tuple[Check, ...]
    stories: tuple[Story, ...]
    refusals: tuple[Line, ...]
    people: tuple[Line, ...]
    members: tuple[Line, ...]
    running: tuple[Line, ...]
    other: tuple[Line, ...]
    """Events of kinds that this version does not know."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Sites that took part and whose own logs are not there."""
        return tuple(sorted({site.name for story in self.stories for site in story.sites if not site.log}))

    @property
    def untold(self) -> tuple[str, ...]:
        """What left by the sites' own logs and the coordinator's, which is there, says nothing of."""
        counts = Counter(item.site for story in self.stories for item in story.sent if item.fate == _UNTOLD)
        return tuple(f"{number_of(count, 'message')} of {site}" for site, count in sorted(counts.items()))

    @property
    def json(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()


def account(
    logs: Sequence[Log], recipes: Mapping[str, Mapping[str, Any]], *, tolerance_s: float = TOLERANCE_S
) -> Account:
    """Reads the logs' events into tables. Of a log that does not hold only the events ahead of its fault are used.

    Args:
        logs: From `read_logs`.
        recipes: Contents of recipes by id, as far as they are known; their hash was checked.
    """
    checks = check_logs(logs, tolerance_s=tolerance_s)
    ids = dict.fromkeys(
        str(recipe_id)
        for log in logs
        for event in log.events
        if event.kind in ("run started", "run resumed", "plan received", "site started")
        and (recipe_id := event.facts.get("recipe_id"))
    )

    def lines(kinds: Iterable[str]) -> tuple[Line, ...]:
        wanted = set(kinds)
        return _lines((log, event) for log in logs for event in log.events if event.kind in wanted)

    known = {*REFUSALS, *PEOPLE, *MEMBERS, *RUNNING, *TOLD}
    return Account(
        state=state_of(checks),
        tolerance_s=tolerance_s,
        logs=tuple(map(_log_line, logs)),
        checks=checks,
        stories=tuple(_story(recipe_id, logs, recipes, tolerance_s) for recipe_id in ids),
        refusals=tuple(sorted((*lines(REFUSALS), *_refused(logs)), key=_when)),
        people=lines(PEOPLE),
        members=lines(MEMBERS),
        running=lines(RUNNING),
        other=lines({event.kind for log in logs for event in log.events} - known),
    )


def write_account(told: Account, path: Path) -> Path:
    """Writes the page to `path` and the same as JSON beside it; returns the JSON's path.

    Raises:
        StorageError: The disk is full or not writable.
    """
    from common.audit_page import page

    beside = path.with_suffix(".json")
    write_whole(beside, told.json)
    write_whole(path, page(told).encode(errors="replace"))
    return beside


def _when(line: Line) -> tuple[str, str, int]:
    return line.time, line.log, line.number


def _lines(events: Iterable[tuple[Log, Event]]) -> tuple[Line, ...]:
    found = [Line(time=event.time, log=log.name, number=event.number, kind=event.kind, facts=event.facts)
             for log, event in events]  # fmt: skip
    return tuple(sorted(found, key=_when))


def _refused(logs: Sequence[Log]) -> list[Line]:
    """What the coordinator did not admit, round by round."""
    return [
        Line(
            time=event.time, log=log.name, number=event.number, kind="reply not admitted",
            facts={"round": event.facts.get("round"), "site": site, "why": why},
        )
        for log in logs
        if log.coordinator
        for event in log.events
        for site, why in as_map(event.facts.get("refused")).items()
    ]  # fmt: skip


def _log_line(log: Log) -> LogLine:
    times = [event.time for event in log.events]
    return LogLine(
        name=log.name,
        file=log.path.name,
        role=log.role,
        parts=log.parts,
        events=len(log.events),
        first=times[0] if times else "",
        last=times[-1] if times else "",
        key=log.key,
        key_known=log.key_known,
    )


def _story(recipe_id: str, logs: Sequence[Log], recipes: Mapping[str, Mapping[str, Any]], tolerance_s: float) -> Story:
    found = [run for log in logs if log.coordinator for run in runs(log) if run.recipe_id == recipe_id]
    own = [log for log in logs if log.role == "site"]
    sent = [item for log in own for item in _sent(log, recipe_id, found)]
    there = {log.name for log in own}
    sent += [item for run in found for item in _told_by_coordinator(run, there)]
    times = sorted(
        [event.time for run in found for event in run.events]
        + [event.time for log in own for event in log.events if event.facts.get("recipe_id") == recipe_id]
        + [item.time for item in sent]
    )
    lineages, broken = [], []
    for run in found:
        for export in run.exports:
            try:
                lineages.append(lineage(run, export, logs, tolerance_s=tolerance_s))
            except LineageError as error:
                broken.append(f"{export.facts.get('file')}: {error}")
    signed = [
        (str(event.facts.get("coordinator") or log.key), str(event.facts.get("name") or ""))
        for kind in ("recipe approved", "recipe signed")  # a site names the key; for the coordinator it is its own
        for log in logs
        for event in log.events
        if event.kind == kind and event.facts.get("recipe_id") == recipe_id
    ]
    told = [as_map(event.facts.get("sites")) for run in found for event in run.events]
    names = sorted({item.site for item in sent} | {name for row in told for name in row} | {
        log.name for log in own for event in log.events
        if event.kind == "site started" and event.facts.get("recipe_id") == recipe_id
    })  # fmt: skip
    return Story(
        recipe_id=recipe_id,
        name=next((name for _, name in signed if name), ""),
        recipe=recipes.get(recipe_id, {}),
        coordinator=next((key for key, _ in signed), ""),
        first=times[0] if times else "",
        last=times[-1] if times else "",
        rounds=sum(len(run.rounds) for run in found),
        concluded=any(event.kind == "run concluded" for run in found for event in run.events),
        sites=tuple(_site_line(name, recipe_id, logs, told, sent) for name in names),
        sent=tuple(sorted(sent, key=lambda item: (item.time, item.site))),
        lineages=tuple(lineages),
        broken=tuple(broken),
    )


def _sent(log: Log, recipe_id: str, found: Sequence[Run]) -> list[Sent]:
    sent: list[Sent] = []
    plan: Mapping[str, Any] = {}
    for event in log.events:
        facts = event.facts
        if event.kind == "plan received":
            plan = facts
        again = event.kind == "update sent again" and facts.get("recipe_id") == recipe_id
        fresh = event.kind in ("update sent", "evaluation sent") and plan.get("recipe_id") == recipe_id
        if not (again or fresh):
            continue
        sent.append(
            Sent(
                site=log.name,
                told_by=log.name,
                time=event.time,
                round=_whole(facts.get("round")) or 0,
                what={"update sent": "update", "update sent again": "update (sent again)"}.get(
                    event.kind, "evaluation"
                ),
                digest=str(facts.get("digest") or ""),
                bytes=_whole(facts.get("bytes")),
                norm=as_number(facts.get("norm")),
                clip_norm=as_number(facts.get("clip_norm")),
                noise_multiplier=as_number(facts.get("noise_multiplier")),
                epsilon=as_number(facts.get("epsilon")),
                scores=_scores(facts.get("scores")),
                fate=_fate(log.name, facts, found),
            )
        )
    return sent


def _told_by_coordinator(run: Run, there: set[str]) -> list[Sent]:
    """What left the sites whose own logs are not there."""
    return [
        Sent(
            site=site,
            told_by="server",
            time=event.time,
            round=_whole(event.facts.get("round")) or 0,
            what="update" if event.kind == "round aggregated" else "evaluation",
            digest=str(said.get("digest") or "") if event.kind == "round aggregated" else "",
            bytes=None,
            norm=as_number(said.get("norm")) if event.kind == "round aggregated" else None,
            clip_norm=None,
            noise_multiplier=None,
            epsilon=as_number(said.get("epsilon")),
            scores=_scores(said.get("scores")),
            fate="admitted",
        )
        for event in run.events
        if event.kind in ("round aggregated", "evaluation received")
        for site, said in ((name, as_map(said)) for name, said in as_map(event.facts.get("admitted")).items())
        if site not in there
    ]


def _fate(site: str, facts: Mapping[str, Any], found: Sequence[Run]) -> str:
    if not found:
        return ""
    why = ""
    for run in found:
        for event in run.events:
            if event.facts.get("round") != facts.get("round"):
                continue
            said = as_map(as_map(event.facts.get("admitted")).get(site))
            if said and (facts.get("digest") in (None, said.get("digest"))):
                return "admitted"
            why = str(as_map(event.facts.get("refused")).get(site) or why)
    return f"not admitted: {why}" if why else _UNTOLD


def _site_line(
    name: str, recipe_id: str, logs: Sequence[Log], told: Sequence[Mapping[str, Any]], sent: Sequence[Sent]
) -> SiteLine:
    log = next((log for log in logs if log.name == name), None)
    starts = [
        event.facts
        for event in (log.events if log is not None else ())
        if event.kind == "site started" and event.facts.get("recipe_id") == recipe_id
    ] or [as_map(row[name]) for row in told if name in row]
    # That of the update's own epsilon; logs of before it was noted there have the ledger's.
    deltas = [
        event.facts["delta"]
        for kinds in (("budget reserved",), ("update sent", "update sent again"))
        for event in (log.events if log is not None else ())
        if event.kind in kinds and event.facts.get("recipe_id") == recipe_id and event.facts.get("delta")
    ]
    mine = [item for item in sent if item.site == name]
    spent = [item.epsilon for item in mine if item.epsilon is not None]
    updates = [item for item in mine if item.what.startswith("update")]
    last = starts[-1] if starts else {}
    return SiteLine(
        name=name,
        log=log is not None,
        patients={split: count for split, count in as_map(last.get("patients")).items() if _whole(count) is not None},
        counts_rounded=last.get("counts_rounded") is True,
        manifests=tuple(dict.fromkeys(str(start.get("manifest")) for start in starts if start.get("manifest"))),
        versions={package: str(version) for package, version in as_map(last.get("versions")).items()},
        approvals=approvals(name, log.events, recipe_id) if log is not None else (),
        epsilon=max(spent, default=None),
        delta=as_number(deltas[-1]) if deltas else None,
        scores_epsilon=_scores_epsilon(log.events, recipe_id) if log is not None else None,
        updates=len(updates),
        bytes=sum(item.bytes or 0 for item in updates),
    )


def _scores_epsilon(events: Sequence[Event], recipe_id: str) -> float | None:
    """What a site's log says that noised scores of a recipe cost, by the account of this version.

    The event's own epsilon is that of all that the site has ever released.
    """
    from common.accounting import LOWEST_NOISE, epsilon_pld
    from common.accounting import Event as Noised

    # Asked again after a crash, a release is not paid for again.
    paid: dict[tuple[object, object, Noised], float] = {}
    base: object = None
    try:
        for event in events:
            facts = event.facts
            if event.kind == "plan received":
                base = facts.get("weights")
                continue
            if (event.kind, facts.get("releases"), facts.get("recipe_id")) != ("budget reserved", "scores", recipe_id):
                continue
            noise, rate, steps = (facts[name] for name in ("noise_multiplier", "sampling_rate", "steps"))
            noised = Noised(noise_multiplier=noise, sampling_rate=rate, steps=steps)
            if rate != 1 or noise < LOWEST_NOISE or len(paid) == _MOST_RELEASES:
                return None  # no site tells such scores, and to count what it says may take the machine for hours
            paid[str(base), str(facts.get("round")), noised] = float(facts["delta"])
        return as_number(epsilon_pld([noised for *_, noised in paid], max(paid.values()))) if paid else None
    except (PrivacyError, KeyError, TypeError, ValueError, OverflowError):  # facts are signed, but not by us
        return None


def _scores(said: object) -> str:
    if said is None:
        return "not told"
    return "yes" if said else "no"


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and as_number(value) is not None else None
