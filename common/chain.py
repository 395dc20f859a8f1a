"""What an audit log must be, alone and beside the other side's; the first event that is not is named.

A log is JSON Lines. Every event holds the hash of the one before it and an Ed25519 signature. A
file that passed its limit was renamed to `north.0001.jsonl`, the next one to `north.0002.jsonl`,
and the log goes on in `north.jsonl`: one chain through all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from common.errors import FedicomError
from common.identity import signed_by
from common.storage import storing

GENESIS = "0" * 64
TOLERANCE_S = 300.0
"""How far two clocks, or one clock and itself, may disagree before a time counts as false."""

STARTED, CONTINUED, CLOCK, KEY = "log started", "log continued", "clock moved back", "key rotated"
"""The kinds that the chain itself needs."""

Fault = Literal[
    "unreadable", "changed", "missing", "reordered", "doubled", "unchained", "foreign key", "torn", "part missing",
    "empty", "back-dated", "cut or rewritten", "not anchored", "time contradicted", "foreign kind",
]  # fmt: skip


class AuditError(FedicomError):
    """A log that is not what its chain, its signatures, its times or the other side say."""

    def __init__(
        self, says: str, fault: Fault, *, log: str = "", number: int | None = None, kind: str | None = None
    ) -> None:
        """
        Args:
            log: File of the first bad event.
            number: Its place in the chain, from 0.
            kind: What it calls itself; None where nothing readable stands there.
        """
        where = f"{log}, event {number}: " if number is not None else f"{log}: " if log else ""
        # ascii: the words of a file that was tampered with must not move the cursor of a terminal
        self.kind = None if kind is None else ascii(kind)[1:-1][:60]
        super().__init__(f"{where}{says}" + (f" (kind: {self.kind})" if kind is not None else ""))
        self.says, self.fault, self.log, self.number = says, fault, log, number


@dataclass(frozen=True)
class Event:
    """One line of a log."""

    number: int
    time: str
    """UTC, ISO 8601. The order is given by the chain; clocks may be wrong."""
    kind: str
    facts: Mapping[str, Any]
    before: str
    """Hash of the event before it."""
    hash: str
    signature: str

    @property
    def moment(self) -> datetime:
        return datetime.fromisoformat(self.time)

    @property
    def heads(self) -> list[str]:
        """Heads of other logs that it writes down."""
        many = self.facts.get("heads")
        found = [self.facts.get("server_head"), *(many.values() if isinstance(many, dict) else ())]
        return [head for head in found if isinstance(head, str) and head]


def verify(
    path: Path, public_key: str | Collection[str] | None = None, *, tolerance_s: float = TOLERANCE_S
) -> tuple[Event, ...]:
    """Every event of a log, after checking numbers, hashes, chain, signatures and times.

    Args:
        path: The current file; its earlier parts are found beside it.
        public_key: Whose signatures are expected. One key: it signs the log now, and earlier ones must have handed
            over to it. Several: all that the owner ever had; no other may occur. None takes the key that the first
            event names, which shows that the log is consistent but not who wrote it.
        tolerance_s: An event may be so much earlier than one ahead of it, if none between them says that the clock
            moved back.

    Raises:
        AuditError: Names the first event that is wrong, and how.
        StorageError: A file cannot be read.
    """
    return tuple(walk(path, public_key, tolerance_s=tolerance_s))


def walk(
    path: Path, public_key: str | Collection[str] | None = None, *, tolerance_s: float = TOLERANCE_S
) -> Iterator[Event]:
    """`verify`, event by event: what was given before the error is good."""
    contents = _read(path)
    chain = Chain(_expected(public_key, contents.values()), tolerance_s)
    for place, (file, data) in enumerate(contents.items()):
        chain.must_continue(data, file.name, place)
        yield from chain.read(data, file.name)
    if not chain.number:
        raise AuditError("no event; an empty log proves nothing", "empty", log=path.name)


def anchors(other: Iterable[Event], name: str) -> Iterator[tuple[Event, object]]:
    """The heads of one log that the other side wrote down, each with the event that holds it.

    Args:
        name: Site whose heads to look at in the coordinator's log; "" for the coordinator's own in a site's log.
    """
    for event in other:
        heads = event.facts.get("heads")
        head = (heads.get(name) if isinstance(heads, dict) else None) if name else event.facts.get("server_head")
        if head:
            yield event, head


def verify_against(
    events: Sequence[Event],
    other: Sequence[Event],
    *,
    name: str = "",
    log: str = "",
    tolerance_s: float = TOLERANCE_S,
) -> int:
    """Checks that every head of this log that the other side wrote down is still in it, and in time.

    A head in an event of the other side shows that this log had it by then; a head of the other side in an
    event of this log shows that this one came after. So the other side's clock bounds the times from both ends.
    In which order heads were written down shows nothing: an answer may be late. What matters of it the hashes hold,
    for no event can remember one that came after it.

    Args:
        events: A verified log.
        other: The verified log of the other side.
        name: As in `anchors`.
        log: What errors call this log.
        tolerance_s: How far the two clocks may disagree.

    Returns:
        Number of anchors that were found.

    Raises:
        AuditError: An anchored head is missing (the log was cut or rewritten), a time contradicts the other side's,
            or there is no anchor. Where a head is missing, the number is that of the first event that no head
            remembered before it vouches for: it, or one up to the missing head, is what was changed.
    """
    position = {event.hash: place for place, event in enumerate(events)}
    by: list[Event | None] = [None] * len(events)
    last, found = -1, 0
    for event, head in anchors(other, name):
        place = position.get(head) if isinstance(head, str) else None
        if place is None:
            first = events[last + 1] if last + 1 < len(events) else None
            raise AuditError(
                f"event {event.number} of the other side remembers head {str(head)[:12]}, which this log has not: "
                + ("it was cut, this event is missing" if first is None else "it was cut or written anew from here on"),
                "cut or rewritten", log=log, number=last + 1, kind=first.kind if first else None,
            )  # fmt: skip
        by[place] = by[place] or event
        last, found = max(last, place), found + 1
    if not found:
        raise AuditError("the other side remembers no head of this log; nothing was checked", "not anchored", log=log)
    _check_times(events, other, by, log, timedelta(seconds=tolerance_s))
    return found


def _check_times(
    events: Sequence[Event], other: Sequence[Event], by: list[Event | None], log: str, tolerance: timedelta
) -> None:
    """Holds every time against the other side's.

    Args:
        by: For each event the first one of the other side that remembers it, if any.
    """
    soonest: Event | None = None
    for place in reversed(range(len(events))):  # whatever stands before a remembered event was there as well
        own = by[place]
        soonest = own if own is not None and (soonest is None or own.moment < soonest.moment) else soonest
        by[place] = soonest
    theirs = {event.hash: event for event in other}
    after: Event | None = None
    for event, before in zip(events, by, strict=True):
        for head in event.heads:
            seen = theirs.get(head)
            after = seen if seen is not None and (after is None or seen.moment > after.moment) else after
        bound, side = None, ""
        if after is not None and event.moment < after.moment - tolerance:
            bound, side = after, "after"
        elif before is not None and event.moment > before.moment + tolerance:
            bound, side = before, "before"
        if bound is not None:
            raise AuditError(
                f"its time {event.time} cannot be: it was written {side} event {bound.number} of the other side, "
                f"at {bound.time} there; the time is false, or one of the clocks was wrong",
                "time contradicted", log=log, number=event.number, kind=event.kind,
            )  # fmt: skip


class Chain:
    """Where a log stands, and whether an event may follow."""

    def __init__(self, keys: Collection[str] | None = None, tolerance_s: float = TOLERANCE_S) -> None:
        """
        Args:
            keys: The only ones that may sign; None for the one that the first event names, and its successors.
        """
        self._keys, self._tolerance = keys, timedelta(seconds=tolerance_s)
        self.number, self.head, self.key = 0, GENESIS, ""
        self.latest: datetime | None = None
        """Latest time so far, since an event last said that the clock moved back."""

    def step(self, kind: str, moment: datetime, digest: str) -> None:
        """Moves on over an event that is good."""
        if self.latest is None or moment > self.latest or kind == CLOCK:
            self.latest = moment
        self.number, self.head = self.number + 1, digest

    def resume(self, data: bytes, file: str, before: Sequence[Path]) -> None:
        """Takes the place that the first event of a file claims, if the part before it ends there.

        Raises:
            AuditError: It does not.
        """
        self.must_continue(data, file, len(before))
        if not before:
            return
        with storing("the audit log"):
            end = _loose(before[-1].read_bytes().rstrip(b"\n").rpartition(b"\n")[2])
        first = _loose(data.partition(b"\n")[0])
        number, head = end.get("number"), end.get("hash")
        if type(number) is not int or (first.get("number"), first.get("before")) != (number + 1, head):
            raise AuditError(
                f"does not go on where {before[-1].name} ends; one of the two files was changed or exchanged",
                "unchained", log=file,
            )  # fmt: skip
        self.number, self.head = number + 1, str(head)

    def must_continue(self, data: bytes, file: str, before: int) -> None:
        """Refuses a file that says itself that another part belongs before it; `before` is how many there are."""
        first = _loose(data.partition(b"\n")[0])
        facts = first.get("facts") if first.get("kind") == CONTINUED else None
        named = facts.get("part") if isinstance(facts, dict) else None
        if isinstance(named, int) and named != before:
            raise AuditError(
                f"goes on from part {named}, but {before} are before it; a part is missing or in another's place",
                "part missing", log=file, number=self.number,
            )  # fmt: skip

    def read(self, data: bytes, file: str) -> Iterator[Event]:
        """The events of these lines, each checked before it is given.

        Raises:
            AuditError: Names the first that is wrong.
        """
        lines = data.split(b"\n")
        torn = lines.pop()
        for place, line in enumerate(lines):
            row = self._row(line, file)
            if row["number"] != self.number:
                raise self._misplaced(row, file, lines[place + 1 :])
            yield self._admit(row, file)
        if torn:
            raise AuditError("the last line is cut short", "torn", log=file, number=self.number)

    def _row(self, line: bytes, file: str) -> dict[str, Any]:
        row = _loose(line)
        if not row:
            says = "not JSON (which has no NaN and no infinity), or no event"
        elif set(row) != _FIELDS:
            says = f"fields are {sorted(row)[:8]}, not those of an event"
        elif not isinstance(row["facts"], dict) or type(row["number"]) is not int:
            says = "not an event"
        elif not all(isinstance(row[key], str) for key in ("time", "kind", "before", "hash", "signature")):
            says = "a field is not text"
        elif line_of(row) != line:
            says = "not spelt as it was written; it was changed"
        else:
            return row
        raise AuditError(says, "unreadable", log=file, number=self.number)

    def _misplaced(self, row: Mapping[str, Any], file: str, rest: Sequence[bytes]) -> AuditError:
        got = row["number"]
        fault: Fault
        if got < self.number:
            fault, says = "doubled", f"carries number {got}, which was there before"
        elif any(_loose(line).get("number") == self.number for line in rest):
            fault, says = "reordered", f"carries number {got}; the event that belongs here comes later"
        else:
            fault, says = "missing", f"is missing; the next event there carries number {got}"
        return AuditError(says, fault, log=file, number=self.number, kind=row["kind"])

    def _admit(self, row: Mapping[str, Any], file: str) -> Event:
        event = Event(**row)

        def wrong(fault: Fault, says: str) -> AuditError:
            return AuditError(says, fault, log=file, number=self.number, kind=event.kind)

        if event.before != self.head:
            raise wrong("unchained", "does not follow the event before it; something was changed or removed")
        if event.hash != digest_of({key: row[key] for key in ("number", "time", "kind", "facts", "before")}):
            raise wrong("changed", "content does not match its hash; it was changed")
        try:
            moment = event.moment
        except ValueError:
            moment = datetime.min  # without a zone
        # The years at both ends of the calendar have no room for a tolerance.
        if moment.utcoffset() != timedelta(0) or not 1970 <= moment.year < 9000:
            raise wrong("unreadable", "its time is not ISO 8601 in UTC, of a year from 1970 to 8999")
        self.key = self.key or str(event.facts.get("public_key", ""))
        allowed = self._keys is None or self.key in self._keys
        if not allowed or not signed_by(self.key, bytes.fromhex(event.hash), event.signature):
            raise wrong("foreign key", "not signed by the expected key")
        if why := self._false_time(event, moment):
            raise wrong("back-dated", why)
        if event.kind == KEY and "proof" in event.facts:
            key = str(event.facts.get("public_key"))
            if not signed_by(key, handover(self.head), str(event.facts["proof"])):
                raise wrong("foreign key", "hands the log over to a key that did not agree")
            if self._keys is not None and key not in self._keys:
                raise wrong("foreign key", f"hands the log over to key {key[:12]}, which is not an expected one")
            self.key = key
        self.step(event.kind, moment, event.hash)
        return event

    def _false_time(self, event: Event, moment: datetime) -> str | None:
        if self.latest is None:
            return None
        if event.kind == CLOCK:
            if (event.facts.get("from"), event.facts.get("to")) == (text_of(self.latest), event.time):
                return None
            return f"says that the clock moved back, but not from {text_of(self.latest)} to its own time"
        if moment >= self.latest - self._tolerance:
            return None
        back_s = (self.latest - moment).total_seconds()
        return (
            f"its time {event.time} is {back_s:.0f} s before that of an event ahead of it, and none says that the "
            "clock moved back; it was back-dated"
        )


_FIELDS = {"number", "time", "kind", "facts", "before", "hash", "signature"}


def _expected(public_key: str | Collection[str] | None, contents: Iterable[bytes]) -> Collection[str] | None:
    """The keys that may sign; None for all that the first one, hand-over by hand-over, led to."""
    if not isinstance(public_key, str):
        return public_key
    rows = (_loose(line) for data in contents for line in data.split(b"\n") if b'"proof"' in line)
    named = [
        row["facts"].get("public_key")
        for row in rows
        if row.get("kind") == KEY and isinstance(row.get("facts"), dict) and "proof" in row["facts"]
    ]
    # Each hand-over is checked on the way, so the last one named here is the key that signs now.
    return None if named and named[-1] == public_key else {public_key}


def parts(path: Path) -> tuple[Path, ...]:
    """The earlier parts of a log, oldest first.

    Raises:
        AuditError: One is missing, or the file is itself a part by its name.
    """
    _no_part(path)
    pattern = re.compile(re.escape(path.stem) + r"\.(\d{4,})" + re.escape(path.suffix))
    with storing("the audit log"):
        files = list(path.parent.iterdir()) if path.parent.is_dir() else []
    numbers = sorted(int(found[1]) for file in files if (found := pattern.fullmatch(file.name)))
    for place, number in enumerate(numbers, start=1):
        if number != place:
            raise AuditError(
                f"part {place} is missing; put {part(path, place).name} back beside it", "part missing", log=path.name
            )
    return tuple(part(path, number) for number in numbers)


def first_parts(path: Path) -> tuple[Path, ...]:
    """The earlier parts of a log up to the first that is missing, without a look at the rest of a folder of thousands.

    The current file says itself how many belong before it.

    Raises:
        AuditError: The file is itself a part by its name.
    """
    _no_part(path)
    found: list[Path] = []
    while (following := part(path, len(found) + 1)).exists():
        found.append(following)
    return tuple(found)


def _no_part(path: Path) -> None:
    if re.search(r"\.\d{4,}$", path.stem):
        raise AuditError(
            f"by its name it is a part of {path.stem.rpartition('.')[0]}{path.suffix}; give that file",
            "part missing", log=path.name,
        )  # fmt: skip


def _read(path: Path) -> dict[Path, bytes]:
    """The parts of a log and what they hold, in order; its writer may rename the current one meanwhile."""
    while True:
        files = _files(path)
        with storing("the audit log"):
            try:
                contents = {file: file.read_bytes() for file in files}
            except FileNotFoundError:
                if files == _files(path):
                    raise
                continue
        if files == _files(path):
            return contents


def _files(path: Path) -> tuple[Path, ...]:
    earlier = parts(path)
    return (*earlier, path) if path.exists() or not earlier else earlier  # a crash in a rotation leaves parts alone


def part(path: Path, number: int) -> Path:
    """Name of an earlier part, from 1."""
    return path.with_name(f"{path.stem}.{number:04d}{path.suffix}")


def handover(head: str) -> bytes:
    """What a new key signs to take over a log that stands at this head."""
    # The purpose comes first: a signature under an event can never pass for one under a hand-over.
    return f"fedicom audit hand-over\n{head}".encode()


def text_of(moment: datetime) -> str:
    """A time as events have it."""
    return moment.isoformat(timespec="milliseconds")


def digest_of(body: Mapping[str, Any]) -> str:
    """An event's hash: of all of it but hash and signature."""
    return hashlib.sha256(line_of(body)).hexdigest()


def line_of(row: Mapping[str, Any]) -> bytes:
    """The one spelling of an event: sorted names, no spaces, ASCII.

    Raises:
        ValueError: A number is NaN or infinite, which JSON has not.
    """
    return json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number that JSON has not")
    return number


def _loose(line: bytes) -> dict[str, Any]:
    """A line as it claims to be, unchecked; empty if it is no JSON object, or holds what is no number."""
    try:
        row = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
