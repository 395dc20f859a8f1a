"""Keeps child processes alive: starts them, starts them again with growing pauses, ends them together."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import StorageError
from common.storage import private_folder, to_system, write_whole

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STEADY_S = 0.5, 60.0, 60.0
_MAX_LOG_BYTES, _LOOK_S = 16 << 20, 5.0
"""A log that is longer at a look begins anew; its last bytes before that stay beside it, as `.log.1`."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Child:
    """A program that shall run."""

    name: str
    """Names its log file."""
    command: Sequence[str]
    """No secret may stand in it: every user of the machine can read it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to our own environment."""
    restart: bool = True
    """Start it again when it ends; False is for work that comes to an end."""
    longest_pause_s: float = _LONGEST_PAUSE_S


class Supervisor:
    """Runs children until `stop`; each has a log file of its own and dies with this process."""

    def __init__(self, folder: Path, on_event: Callable[[str, str], None] = lambda name, what: None) -> None:
        """Takes a folder for the log files.

        Args:
            on_event: Told (name, "started" | "ended with code N, again in X s" | "ended" | "stopped").
        """
        self._folder, self._on_event = private_folder(folder), on_event
        self._children: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def start(self, child: Child) -> None:
        """Starts a child and keeps it; one of the same name is stopped first."""
        self.stop(child.name)
        with self._lock:
            self._children[child.name] = _Kept(child, self._folder / f"{child.name}.log", self._on_event)

    def stop(self, name: str, grace_s: float = 10.0) -> None:
        """Ends one child: asked first, killed after `grace_s`; nothing happens when there is none."""
        with self._lock:
            kept = self._children.pop(name, None)
        if kept is not None:
            kept.stop(grace_s)

    def stop_all(self, grace_s: float = 10.0) -> None:
        """Ends all children, the last one first."""
        with self._lock:
            names = list(self._children)
        for name in reversed(names):
            self.stop(name, grace_s)

    @property
    def children(self) -> Mapping[str, int | None]:
        """Name -> process id, None while the child is between two starts or has ended."""
        with self._lock:
            return {name: kept.pid for name, kept in self._children.items()}

    def ended(self, name: str) -> int | None:
        """Exit code of a child that is not started again; None while it runs."""
        with self._lock:
            kept = self._children.get(name)
        return kept.code if kept is not None else None


def stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set from now on; the second SIGINT ends the process in its usual way."""
    stop = threading.Event()

    def asked(number: int, frame: object) -> None:
        # From a thread: a handler runs in the middle of whatever the main thread does, even of this event's own wait.
        threading.Thread(target=stop.set, daemon=True).start()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    return stop


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lasting_port() -> int:
    """A port of loopback that nobody listens on, and that no outgoing connection is given while nobody does."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class _Kept:
    def __init__(self, child: Child, log_file: Path, on_event: Callable[[str, str], None]) -> None:
        self._child, self._log_file, self._on_event = child, log_file, on_event
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.code: int | None = None
        self._thread = threading.Thread(target=self._keep, name=f"keeps {child.name}", daemon=True)
        self._thread.start()
        threading.Thread(target=self._shorten, name=f"shortens {child.name}.log", daemon=True).start()

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def stop(self, grace_s: float) -> None:
        self._stopping.set()
        with self._lock:  # no start can come between
            process = self._process
        if process is not None and process.poll() is None:
            _signal(process, signal.SIGTERM)
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
        if process is not None:
            _signal(process, signal.SIGKILL)  # what it may have started itself
        self._thread.join()
        self._on_event(self._child.name, "stopped")

    def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = self._spawn()
            if self._process is None:
                code = 127
            else:
                self._on_event(self._child.name, "started")
                code = self._process.wait()
                _signal(self._process, signal.SIGKILL)
            if self._stopping.is_set():
                return
            if not self._child.restart:
                self.code = code
                self._on_event(self._child.name, f"ended with code {code}")
                return
            pause_s = _FIRST_PAUSE_S if time.monotonic() - began > _STEADY_S else pause_s
            self._on_event(self._child.name, f"ended with code {code}, again in {pause_s:g} s")
            if self._stopping.wait(pause_s):
                return
            pause_s = min(2 * pause_s, self._child.longest_pause_s)

    def _shorten(self) -> None:
        """Bounds the log while the child writes it, for what is in it may be a stranger's doing."""
        while True:
            with suppress(OSError):  # not there yet
                if self._log_file.stat().st_size > _MAX_LOG_BYTES:
                    with suppress(StorageError), self._log_file.open("rb") as log_:  # no room for it: it goes
                        log_.seek(-_MAX_LOG_BYTES, os.SEEK_END)
                        write_whole(self._log_file.with_suffix(".log.1"), log_.read(_MAX_LOG_BYTES), to_system)
                    # The child has the file open, so it keeps its name; lines of this very moment may be lost.
                    os.truncate(self._log_file, 0)
            if self._stopping.wait(_LOOK_S):
                return

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        try:
            handle = os.open(self._log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                return subprocess.Popen(  # noqa: S603 - our own commands, no shell
                    self._child.command,
                    stdin=subprocess.DEVNULL,
                    stdout=handle,
                    stderr=handle,
                    env={**os.environ, **self._child.environment},
                    start_new_session=True,
                    umask=0o077,  # others' programs write files as well
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
            finally:
                os.close(handle)
        except OSError as error:
            log.error("%s cannot be started: %s", self._child.name, error.strerror)
            return None


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    # kill -9 of the supervisor leaves no orphan that would hold ports and files of the next one
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
