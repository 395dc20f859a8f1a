"""Append-only logs that neither side can rewrite alone: hash-chained, signed JSON Lines.

Every event carries the hash of the one before it and an Ed25519 signature. Each round both
sides write down the head of the other's chain, so a chain that was cut or written anew no
longer holds the head that the other side remembers. `common/chain.py` says what a log must be;
here it is written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.chain import (
    CLOCK,
    CONTINUED,
    GENESIS,
    KEY,
    STARTED,
    AuditError,
    Chain,
    Event,
    digest_of,
    first_parts,
    handover,
    line_of,
    part,
    parts,
    text_of,
    verify,
    verify_against,
)
from common.identity import Signer
from common.storage import Flush, commit, flush_folder, held_alone, private, private_folder, storing, to_disk

__all__ = ["GENESIS", "AuditError", "AuditLog", "Event", "verify", "verify_against"]

ROTATE_BYTES = 2 << 20
"""About 3,500 events: a log of any age opens within a second or two."""


class _Stamp(NamedTuple):
    """Which file it is, and how long; None stands for none."""

    device: int
    inode: int
    size: int


class AuditLog:
    """The log of one side, open for appending; safe for several processes that share the key."""

    def __init__(
        self,
        path: Path,
        signer: Signer,
        *,
        rotate_bytes: int = ROTATE_BYTES,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        flush: Flush = to_disk,
    ) -> None:
        """Opens or starts a log.

        Checked now: every event of the current file (number, chain, hash, signature, time), that all earlier parts are
        there, and that the newest of them ends where the current file begins. What is inside the earlier parts is
        checked by `verify` alone. Checked again whenever another process wrote to the log.

        A last line that a crash cut short was never acknowledged to anybody and is removed.

        Args:
            rotate_bytes: A file of at least so many bytes is closed before the next event.
            clock: Gives the time, with its zone.
            flush: Has every event last before it is acknowledged; see `common.storage`.

        Raises:
            AuditError: What lies there is broken or signed by another key.
            StorageError: It cannot be read or written.
        """
        self._path, self._signer, self._rotate_bytes, self._clock = path, signer, rotate_bytes, clock
        self._flush, self._lock = flush, path.with_name(f".{path.name}.lock")
        private_folder(path.parent)
        new = not self._lock.exists()  # nobody ever wrote without it
        with self._alone():
            self._chain, self._seen, _ = self._open(new)
            if not self._chain.number:
                self._write(STARTED, {"public_key": signer.public}, self._now())

    @property
    def head(self) -> str:
        """Hash of the last event that this object has seen."""
        return self._chain.head

    def append(self, kind: str, **facts: Any) -> str:
        """Writes one event and returns the new head; it is flushed when this returns.

        If the clock shows less than at the last event, an event "clock moved back" goes ahead of it.

        Args:
            kind: What happened, for example "update sent"; docs/audit.md lists them.
            facts: JSON values; counts, hashes and pseudonyms only.

        Raises:
            StorageError: The disk is full or not writable; the log holds all it held.
            AuditError: The log was cut, or exchanged for another.
        """
        return self._append(kind, lambda head: facts)

    def hand_over(self, signer: Signer) -> str:
        """Goes on under a new key and returns the new head.

        The event is signed with the old key and holds the new one's agreement, so that neither key can be brought
        in without its owner. Keep the old key until this returns.
        """

        def facts(head: str) -> Mapping[str, Any]:
            agreed = signer.sign(handover(head))
            return {"previous_key": self._signer.public, "public_key": signer.public, "proof": agreed}

        head = self._append(KEY, facts)
        self._signer = signer
        return head

    def _append(self, kind: str, facts: Callable[[str], Mapping[str, Any]]) -> str:
        with self._alone():
            if self._stamp() != self._seen:
                self._catch_up()
            if self._seen is not None and self._seen.size >= self._rotate_bytes:
                self._rotate()
            now, latest = self._now(), self._chain.latest
            back = latest is not None and now < latest
            if self._seen is None or not self._seen.size:
                # The first event of a file is this one; of a clock that moved back the next one tells.
                self._write(CONTINUED, self._continued(), latest if back and latest is not None else now)
            if back and latest is not None:
                self._write(CLOCK, {"from": text_of(latest), "to": text_of(now)}, now)
            self._write(kind, facts(self._chain.head), now)
            return self._chain.head

    def _continued(self) -> Mapping[str, Any]:
        chain = self._chain
        return {
            "part": len(parts(self._path)),
            "events": chain.number,
            "head": chain.head,
            "public_key": self._signer.public,
        }

    def _write(self, kind: str, facts: Mapping[str, Any], now: datetime) -> None:
        chain, size = self._chain, self._seen.size if self._seen is not None else 0
        body = {"number": chain.number, "time": text_of(now), "kind": kind, "facts": facts, "before": chain.head}
        digest = digest_of(body)
        line = line_of({**body, "hash": digest, "signature": self._signer.sign(bytes.fromhex(digest))}) + b"\n"
        with storing("the audit log"), open(self._path, "ab", buffering=0, opener=private) as file:
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._flush(file.fileno())
                if not size:
                    flush_folder(self._path.parent, self._flush)
            except OSError:
                file.truncate(size)  # half a line would break the chain for the events to come
                raise
        self._seen = self._stamp()
        chain.step(kind, now, digest)

    def _rotate(self) -> None:
        # A crash before or after this one step loses nothing: without a current file the newest part is continued.
        with storing("the audit log"):
            commit(self._path, part(self._path, len(parts(self._path)) + 1), self._flush)
        self._seen = None

    def _catch_up(self) -> None:
        """Takes in what another process wrote; it must go on from what is known here."""
        known = self._chain
        chain, seen, hashes = self._open()
        if known.head not in hashes and known.head not in {event.hash for event in verify(self._path)}:
            raise AuditError(
                "is gone from the log: it was cut, or an older copy was put in its place; put the newest copy back",
                "cut or rewritten", log=self._path.name, number=known.number - 1,
            )  # fmt: skip
        self._chain, self._seen = chain, seen

    def _open(self, new: bool = False) -> tuple[Chain, _Stamp | None, set[str]]:
        """Where the log stands, from its current file, and the hashes that were read there."""
        path = self._path
        before = first_parts(path) if new or path.exists() else parts(path)
        with storing("the audit log"):
            _drop_torn_line(path)
            data = path.read_bytes() if path.exists() else b""
            file = path
            if not data and before:  # a crash, or a full disk, in the middle of a rotation
                *earlier, file = before
                before, data = tuple(earlier), file.read_bytes()
        chain = Chain()
        chain.resume(data, file.name, before)
        hashes = {event.hash for event in chain.read(data, file.name)}
        if hashes and chain.key != self._signer.public:
            raise AuditError(
                f"not signed by the expected key: it ends under {chain.key[:12]}, this side's is "
                f"{self._signer.public[:12]}; give the log's own key, or another file",
                "foreign key", log=file.name,
            )  # fmt: skip
        return chain, self._stamp(), hashes

    def _now(self) -> datetime:
        now = self._clock().astimezone(UTC)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)

    def _stamp(self) -> _Stamp | None:
        with storing("the audit log"):
            try:
                found = self._path.stat()
            except FileNotFoundError:
                return None
        return _Stamp(found.st_dev, found.st_ino, found.st_size)

    def _alone(self) -> AbstractContextManager[int]:
        # A lock of its own: the folder's may be held for as long as a run takes.
        return held_alone(self._lock, "the audit log")


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
            os.fsync(file.fileno())
