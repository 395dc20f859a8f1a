"""The resident runner: `python -m client.runner --home DIR --port N`, kept alive by `fedicom site start`.

It takes the messages from the SuperNode on loopback, has them answered by the installed code, and writes what it does
into `run/runner.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from client.app import client_app
from client.blobs import Remote
from client.link import serve
from client.resident import Resident, State
from common.clock import utc_now
from common.deployment import SiteHome
from common.errors import ExchangeError, FedicomError
from common.identity import Signer
from common.installed import package_versions
from common.storage import private_folder, to_system, write_whole
from common.supervise import stop_on_signal

log = logging.getLogger(__name__)

_BEAT_S = 10.0
_GRACE_S = 3.0
"""A visit under way is left at a stop: its reply is kept or its reservation is, so nothing is paid twice."""


class Report:
    """Keeps `run/runner.json` at what is so now."""

    def __init__(self, home: SiteHome) -> None:
        self._file, self._lock = private_folder(home.run) and home.runner_file, threading.Lock()
        self._fixed = {
            "pid": os.getpid(),
            "started": utc_now(),
            "versions": dict(package_versions()),
        }
        # No state before the log was read: zeros would be taken for counts, and what follows for something just done.
        self._link, self._state, self._error = "waiting", dict[str, Any](), ""

    def link(self, state: str) -> None:
        """Whether the SuperNode is there: waiting, ready or working."""
        self._link = state
        self.write()

    def state(self, state: State) -> None:
        """What is being done."""
        self._state = asdict(state)
        self.write()

    def failed(self, why: str) -> None:
        """Why the runner cannot work."""
        self._link, self._error = "failed", why
        self.write()

    def stopped(self) -> None:
        self._link = "stopped"
        self.write()

    def write(self) -> None:
        """Writes the file whole; a full disk costs the display, not the work, and so does a power cut."""
        told = {
            **self._fixed,
            **self._state,
            "state": self._link,
            "error": self._error,
            "gpu_memory": gpu_memory(),
            "updated": utc_now(),
        }
        try:
            with self._lock:
                write_whole(self._file, json.dumps(told, indent=1).encode(), to_system)
        except FedicomError as error:
            log.warning("%s", error)


class Coordinator:
    """The coordinator's public key, read again when the registry changes."""

    def __init__(self, home: SiteHome) -> None:
        self._home, self._seen, self._key = home, (0, 0, 0), ""

    def __call__(self) -> str:
        """The key that every message must be signed by.

        Raises:
            ExchangeError: The registry is missing or does not hold, so nobody can be trusted.
        """
        try:
            stat = self._home.registry_file.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen != self._seen:
                self._key = self._home.registry.coordinator
                self._seen = seen
        except (OSError, FedicomError) as error:
            self._seen = (0, 0, 0)
            log.error("no message is answered: %s", error)
            raise ExchangeError("this site's registry cannot be read, so it trusts nobody; ask its people") from None
        return self._key


def run(home: SiteHome, port: int, stop: threading.Event) -> None:
    """Answers messages until `stop` is set.

    Raises:
        FedicomError: The site's own files do not hold; nothing was answered.
    """
    report = Report(home)
    try:
        report.write()
        signer = Signer.load(home.signing_key)
        resident = Resident(home, on_change=report.state)
        resident.start()
    except FedicomError as error:
        report.failed(str(error))
        raise
    done = threading.Event()
    threading.Thread(target=_beat, args=(report, done), name="status", daemon=True).start()
    threading.Thread(target=_leave, args=(resident, report, stop, done), name="stop", daemon=True).start()
    remote = Remote(home, stop)
    app = client_app(lambda context: resident, coordinator=Coordinator(home), signer=signer, blobs=remote.round)
    try:
        serve(app, home, port, on_state=report.link, stop=stop, refused=resident.misunderstood)
    finally:
        done.set()
        report.stopped()
        resident.stop("asked to" if stop.is_set() else "failed")


def main(words: Sequence[str] | None = None) -> int:
    """The process; SIGTERM and SIGINT end it."""
    parser = argparse.ArgumentParser(prog="python -m client.runner", description="A site's resident runner.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True, help="loopback port of the SuperNode")
    arguments = parser.parse_args(words)
    # force: Flower and MONAI leave handlers of their own
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every look would fill the log
    try:
        run(SiteHome(arguments.home), arguments.port, stop_on_signal())
    except FedicomError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def gpu_memory() -> dict[str, int] | None:
    """Bytes in use and in all of the GPU that a visit runs on; None while none is used."""
    if not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"used": total - free, "total": total}


def _beat(report: Report, done: threading.Event) -> None:
    while not done.wait(_BEAT_S):
        report.write()


def _leave(resident: Resident, report: Report, stop: threading.Event, done: threading.Event) -> None:
    """Ends the process when a stop finds it in the middle of a visit."""
    stop.wait()
    if done.wait(_GRACE_S):
        return
    try:
        resident.stop("in the middle of a visit")
        report.stopped()
    finally:
        os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
