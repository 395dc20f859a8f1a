"""Append-only logs that neither side can rewrite alone: hash-chained, signed JSON Lines.

Every event carries the hash of the one before it and an Ed25519 signature. Each round both
sides write down the head of the other's chain, so a chain that was cut or written anew no
longer holds the head that the other side remembers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import FedicomError
from common.identity import Signer, signed_by
from common.storage import private_folder, storing

GENESIS = "0" * 64


class AuditError(FedicomError):
    """A log that is not what its chain, its signatures or the other side say."""


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


class AuditLog:
    """The log of one side, open for appending."""

    def __init__(self, path: Path, signer: Signer) -> None:
        """Opens or starts a log; an existing one is verified first.

        A last line that a crash cut short was never acknowledged to anybody and is removed.

        Raises:
            AuditError: What lies there is broken or signed by another key.
        """
        self._path, self._signer = path, signer
        private_folder(path.parent)
        _drop_torn_line(path)
        events = verify(path, signer.public) if path.exists() and path.stat().st_size else ()
        self._number = len(events)
        self._head = events[-1].hash if events else GENESIS
        with storing("the audit log"):
            self._bytes = path.stat().st_size if path.exists() else 0
        if not events:
            self.append("log started", public_key=signer.public)

    @property
    def head(self) -> str:
        """Hash of the last event."""
        return self._head

    def append(self, kind: str, **facts: Any) -> str:
        """Writes one event and returns the new head; it is on disk when this returns.

        Args:
            kind: What happened, for example "update sent".
            facts: JSON values; counts, hashes and pseudonyms only.

        Raises:
            StorageError: The disk is full or not writable; the log is as it was.
            AuditError: Somebody else wrote to the file meanwhile.
        """
        body = {
            "number": self._number,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            "facts": facts,
            "before": self._head,
        }
        digest = _digest(body)
        line = _line({**body, "hash": digest, "signature": self._signer.sign(bytes.fromhex(digest))}) + b"\n"
        with storing("the audit log"), self._path.open("ab", buffering=0) as file:
            if file.tell() != self._bytes:
                raise AuditError(
                    f"{self._path.name} has {file.tell()} bytes, expected {self._bytes}: it was cut, or another "
                    "process writes it as well; stop one of the two"
                )
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._bytes)  # half a line would break the chain for the events to come
                raise
        self._number += 1
        self._head = digest
        self._bytes += len(line)
        return digest


def verify(path: Path, public_key: str | None = None) -> tuple[Event, ...]:
    """Every event of a log, after checking numbers, hashes, chain and signatures.

    Args:
        public_key: Whose signatures are expected; None takes the key that the first event names,
            which shows that the log is consistent but not who wrote it.

    Raises:
        AuditError: Names the first event that is wrong, and how.
        StorageError: The file cannot be read.
    """
    before, events = GENESIS, []
    for number, row in enumerate(_rows(path)):
        where = f"{path.name}, event {number}"
        try:
            event = Event(**row)
        except TypeError:
            raise AuditError(f"{where}: fields are {sorted(row)[:8]}, not those of an event") from None
        if event.number != number:
            raise AuditError(f"{where}: carries number {event.number}; events are missing, doubled or reordered")
        if event.before != before:
            raise AuditError(f"{where}: does not follow the event before it; something was changed or removed")
        body = {key: row[key] for key in ("number", "time", "kind", "facts", "before")}
        if event.hash != _digest(body):
            raise AuditError(f"{where}: content does not match its hash; it was changed")
        if public_key is None and number == 0:
            public_key = str(event.facts.get("public_key", ""))
        if not signed_by(public_key or "", bytes.fromhex(event.hash), event.signature):
            raise AuditError(f"{where}: not signed by the expected key")
        before = event.hash
        events.append(event)
    if not events:
        raise AuditError(f"{path.name}: no event; an empty log proves nothing")
    return tuple(events)


def verify_against(events: Sequence[Event], other: Sequence[Event], *, name: str = "") -> int:
    """Checks that every head of this log that the other side wrote down is still in it, in order.

    Args:
        events: A verified log.
        other: The verified log of the other side.
        name: Site whose anchors to look at in the coordinator's log; "" for the coordinator's own in a site's log.

    Returns:
        Number of anchors that were found.

    Raises:
        AuditError: An anchored head is missing (the log was cut or rewritten), out of order, or there is no anchor.
    """
    position = {event.hash: event.number for event in events}
    last, found = -1, 0
    for event in other:
        heads = event.facts.get("heads")
        head = (heads.get(name) if isinstance(heads, dict) else None) if name else event.facts.get("server_head")
        if not head:
            continue
        if not isinstance(head, str) or head not in position:
            raise AuditError(
                f"event {event.number} of the other side remembers head {str(head)[:12]}, which this log has not: "
                "it was cut or written anew"
            )
        if position[head] < last:
            raise AuditError(f"event {event.number} of the other side remembers an older head than the one before it")
        last, found = position[head], found + 1
    if not found:
        raise AuditError("the other side remembers no head of this log; nothing was checked")
    return found


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_line(body)).hexdigest()


def _line(row: Mapping[str, Any]) -> bytes:
    # The one spelling of an event: sorted names, no spaces, ASCII.
    return json.dumps(row, sort_keys=True, separators=(",", ":")).encode()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with storing("the audit log"):
        lines = path.read_bytes().split(b"\n")
    if lines.pop():
        raise AuditError(f"{path.name}: the last line is cut short")
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise AuditError(f"{path.name}, event {number}: not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("facts"), dict):
            raise AuditError(f"{path.name}, event {number}: not an event")
        if not all(isinstance(row.get(key), str) for key in ("time", "kind", "before", "hash", "signature")):
            raise AuditError(f"{path.name}, event {number}: a field is not text")
        if _line(row) != line:
            raise AuditError(f"{path.name}, event {number}: not spelt as it was written; it was changed")
        yield row


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with storing("the audit log"), path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
            os.fsync(file.fileno())
