"""One audit log for several processes of one house: the resident node and the person who approves a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from common.audit import AuditLog
from common.chain import Event, parts, verify
from common.identity import Signer


class Log(Protocol):
    """Where events are written."""

    @property
    def head(self) -> str:
        """Hash of the last event that is known here."""

    def append(self, kind: str, **facts: Any) -> str:
        """Writes one event and returns the new head; it is on disk when this returns."""


class SharedLog:
    """An audit log that is opened, and so verified, when it is first needed."""

    def __init__(self, path: Path, signer: Signer) -> None:
        """Names the log; nothing is read or made yet."""
        self._path, self._signer = path, signer
        self._log: AuditLog | None = None

    @property
    def head(self) -> str:
        """Hash of the last event that is known here; it may grow under the hands of another process.

        Raises:
            AuditError: What lies there is broken or signed by another key.
            StorageError: It cannot be read or written.
        """
        return self._opened.head

    def append(self, kind: str, **facts: Any) -> str:
        """As `AuditLog.append`.

        Raises:
            AuditError: The log is broken, was cut, or was exchanged for another.
            StorageError: The disk is full or not writable; the log holds all it held.
        """
        return self._opened.append(kind, **facts)

    @property
    def _opened(self) -> AuditLog:
        if self._log is None:
            self._log = AuditLog(self._path, self._signer)
        return self._log


def own_events(path: Path, signing_key: Path) -> tuple[Event, ...]:
    """Every event of a house's own log, checked under its key as it is now; none where the log is not begun.

    Raises:
        AuditError: The log does not hold.
        StorageError: Log or key cannot be read.
    """
    return verify(path, Signer.load(signing_key).public) if path.exists() or parts(path) else ()


class TaggedLog:
    """The coordinator's log, each event with the run that it is of: several runs share it."""

    def __init__(self, log: Log, run: str) -> None:
        """Writes into `log`; `run` is the name of the run's folder."""
        self._log, self._run = log, run

    @property
    def head(self) -> str:
        """As `SharedLog.head`."""
        return self._log.head

    def append(self, kind: str, **facts: Any) -> str:
        """As `SharedLog.append`."""
        return self._log.append(kind, run=self._run, **facts)
