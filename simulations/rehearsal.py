"""A deployed federation on loopback: real processes, keys, TLS and node authentication, and failures on purpose.

Everything is done through the commands that people use; only the hospitals' images are drawn by the generator.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.config import Phantom
from common.deployment import ServerHome, SiteHome, read_status
from common.errors import FedicomError
from common.supervise import lasting_port
from simulations.hospitals import site_names
from simulations.phantoms import make_phantoms

RUN = "rehearsal"
_POLL_S = 0.25
_ENDS = (signal.SIGTERM, signal.SIGHUP)


class RehearsalError(FedicomError):
    """A command or a process of the rehearsal did not do what it should."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is rehearsed."""

    count: int = 3
    """Sites."""
    recipe: tuple[str, ...] = ("recipe=phantom_2d", "rounds=5")
    """Words of the recipe; the numbers of sites and the quorum are added."""
    quorum: int = 2
    phantom: Phantom = Phantom()
    policy: Mapping[str, Any] | None = None
    """Fields of every site's policy that differ from the standard one."""
    cohort_key: Callable[[str], bytes] | None = None
    """Gives every site the key of its pseudonyms and its split; None keeps the secret one of its kit."""
    environment: Mapping[str, str] | None = None
    """Of all processes."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(site_names(self.count)))


class Rehearsal:
    """The processes of one federation. Every process that it starts, it ends."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Names the folder; nothing is made before `provision`."""
        self.folder, self.plan = folder.resolve(), plan
        self.kits = self.folder / "kits"
        self.port = lasting_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def server(self) -> ServerHome:
        return ServerHome(self.kits / "coordinator")

    def site(self, name: str) -> SiteHome:
        """The folder of one hospital."""
        return SiteHome(self.kits / name)

    # Before the first process

    def hospitals(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Draws every hospital's patients, and the coordinator's test set."""
        make_phantoms(self.folder / "hospitals", self.plan.phantom, self.plan.count, progress)

    def provision(self) -> None:
        """Makes keys, certificates and kits, and edits each site's configuration as its people would."""
        federation = {"name": "rehearsal", "host": "127.0.0.1", "port": self.port, "sites": list(self.plan.sites)}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "federation.yaml").write_text(yaml.safe_dump({**federation, "auditors": ["auditor"]}))
        self.fedicom("provision", self.folder / "federation.yaml", "--out", self.kits)
        for name in self.plan.sites:
            home = self.site(name)
            edit(home.path / "site.yaml", data=str(self.folder / "hospitals" / name), policy=self.plan.policy or {})
            if self.plan.cohort_key is not None:
                home.cohort_key.write_bytes(self.plan.cohort_key(name))
        edit(
            self.server.path / "server.yaml",
            listen="127.0.0.1",
            port=self.port,
            test_data=str(self.folder / "hospitals" / "central"),
        )

    def approve(self, name: str = RUN, *changes: str) -> None:
        """The coordinator signs a recipe, every site approves it.

        Args:
            name: Of the recipe's file.
            changes: Words that come after those of the plan.
        """
        words = (*self.plan.recipe, f"federation.sites={self.plan.count}", f"federation.quorum={self.plan.quorum}")
        file = self.recipe_file(name)
        self.fedicom("recipe", "sign", *words, *changes, "--home", self.server.path, "--out", file)
        for site in self.plan.sites:
            self.fedicom("site", "approve", file, "--home", self.site(site).path, "--by", f"{site}-officer")

    def recipe_file(self, name: str = RUN) -> Path:
        """Where `approve` leaves the signed recipe."""
        return self.folder / f"{name}.json"

    # Processes

    def start(self, name: str) -> None:
        """Starts `server` or a site; it runs until `stop` or `kill`."""
        verb, home = ("server", self.server.path) if name == "server" else ("site", self.site(name).path)
        log_file = self.folder / "logs" / f"{name}.log"
        log_file.parent.mkdir(exist_ok=True)
        with log_file.open("ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 - our own commands, no shell
                [sys.executable, "-m", "fedicom", verb, "start", "--home", str(home)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """kill -9 of the supervisor of `server` or of a site; its children die with it."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def kill_child(self, name: str, child: str) -> int:
        """kill -9 of one process below a supervisor, which will start it again.

        Returns:
            The process id that was killed.
        """

        def killed() -> int | None:
            pid = self.child(name, child)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended by itself, and the status file is from before
                return None
            return pid

        pid: int = wait_for(killed, f"child {child} of {name}", 300)
        return pid

    def child(self, name: str, child: str) -> int:
        """Process id of a child of `server` or of a site, as its status file has it."""
        home = self.server if name == "server" else self.site(name)

        def found() -> int | None:
            status = read_status(home.status_file) or {}
            return (status.get("children") or {}).get(child)

        pid: int = wait_for(found, f"child {child} of {name}", 300)
        return pid

    def stop(self) -> None:
        """Ends everything that was started here, sites first."""
        for process in [*reversed(self._processes.values())]:
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def alive(self, name: str) -> bool:
        """Whether the supervisor runs."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    # The run

    def run(self, name: str = RUN, recipe: str = RUN) -> None:
        """Submits an approved recipe, as soon as the coordinator takes it; returns at once."""
        file = self.recipe_file(recipe)
        wait_for(lambda: self._ready() or None, "the coordinator", 300)
        self.fedicom("server", "run", file, "--name", name, "--detach", "--home", self.server.path)

    def status(self, name: str = RUN) -> dict[str, Any]:
        """Of a run, empty before it began."""
        return read_status(self.server.runs / name / "status.json") or {}

    def wait_round(self, number: int, name: str = RUN, timeout_s: float = 600) -> None:
        """Waits until `number` rounds are behind the run."""
        wait_for(lambda: self._reached(name, number) or None, f"round {number}", timeout_s)

    def wait_finished(self, name: str = RUN, timeout_s: float = 800) -> dict[str, Any]:
        """Waits for the end of the run.

        Raises:
            RehearsalError: It failed, or did not end in time.
        """

        def ended() -> dict[str, Any] | None:
            status = self.status(name)
            if status.get("state") == "failed":
                raise RehearsalError(f"the run failed: {status.get('error')}")
            return status if status.get("state") == "finished" else None

        status: dict[str, Any] = wait_for(ended, "the end of the run", timeout_s)
        return status

    def _ready(self) -> bool:
        status = read_status(self.server.status_file) or {}
        process = self._processes.get("server")
        return process is not None and status.get("pid") == process.pid and status.get("state") == "running"

    def _reached(self, name: str, number: int) -> bool:
        status = self.status(name)
        if status.get("state") == "failed":
            raise RehearsalError(f"the run failed: {status.get('error')}")
        return int(status.get("round") or 0) >= number or status.get("state") == "finished"

    def verify(self) -> Iterator[tuple[str, str]]:
        """Checks every log against the other side's, with the registry's public keys alone; yields (log, result)."""
        registry = self.server.registry_file
        for name in self.plan.sites:
            mine, theirs = self.site(name).audit_file, self.server.audit_file
            yield name, self.fedicom("audit", "verify", mine, "--against", theirs, "--registry", registry)
            yield (
                f"server against {name}",
                self.fedicom("audit", "verify", theirs, "--against", mine, "--registry", registry),
            )

    def fedicom(self, *words: object, timeout_s: float = 300) -> str:
        """One command, as a person would type it.

        Raises:
            RehearsalError: It did not end with 0; quotes what it said.
        """
        done = subprocess.run(  # noqa: S603 - our own commands, no shell
            [sys.executable, "-m", "fedicom", *map(str, words)],
            capture_output=True, text=True, env=self._environment(), timeout=timeout_s,
        )  # fmt: skip
        if done.returncode != 0:
            raise RehearsalError(
                f"fedicom {' '.join(map(str, words[:2]))}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def _environment(self) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": "1", "FEDICOM_ALLOW_ROOT": "1", **(self.plan.environment or {})}
        return {**os.environ, **own}


def end_as_with_ctrl_c() -> None:
    """From now on SIGTERM, and the end of the terminal, stop this process as Ctrl-C does: what it started ends first.

    Each is heard once: a second one would leave the processes that the first one was about to end.
    """

    def asked(number: int, frame: object) -> None:
        for each in _ENDS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in _ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, asked)


@contextmanager
def rehearsing(folder: Path, plan: Plan) -> Iterator[Rehearsal]:
    """A provisioned federation, with nothing approved yet, whose processes end with the block, however it ends."""
    rehearsal = Rehearsal(folder, plan)
    try:
        rehearsal.hospitals()
        rehearsal.provision()
        yield rehearsal
    finally:
        rehearsal.stop()


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a YAML file, those of mappings one by one; comments are lost."""
    plain = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        plain[name] = {**(plain.get(name) or {}), **value} if isinstance(value, Mapping) else value
    path.write_text(yaml.safe_dump(plain, sort_keys=False))


def wait_for(found: Callable[[], Any], what: str, timeout_s: float, poll_s: float = _POLL_S) -> Any:
    """The first result that is not None.

    Raises:
        RehearsalError: There was none in time.
    """
    end = time.monotonic() + timeout_s
    while (result := found()) is None:
        if time.monotonic() > end:
            raise RehearsalError(f"{what} did not come within {timeout_s:g} s")
        time.sleep(poll_s)
    return result
