"""`fedicom site start`: keeps the SuperNode and our runner alive, and shows what they do.

gateway <--- TLS 1.3 --- SuperNode <--- loopback --- runner (our code, model, data)
                             \\______ this process ______/
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from client.access import MEMBER, failure
from client.machine import Card, Line, cards, connected
from client.reach import COORDINATOR, proxy_address, proxy_of, split_address
from common.bell import Bell
from common.clock import utc_now
from common.deployment import SiteHome, read_status
from common.enrolment import warnings
from common.epsilon import rounded_up
from common.errors import ConfigError, FedicomError
from common.identity import read_private
from common.prometheus import Family, serve_metrics
from common.storage import held_alone, private_folder, storing, to_system, write_whole
from common.supervise import Child, Supervisor, free_port, stop_on_signal

SUPERNODE, RUNNER = "supernode", "runner"
FRESH_S = 60.0
"""A status that is older was left by a node that does not run any more."""
_POLL_S, _BEAT_S, _DAY_S = 0.5, 5.0, 86_400.0
_GRACE_S = 6.0
"""Each of two children: together less than the 15 s after which a stop must be done."""
_AGAIN_S = 600.0
"""So long nothing is said of a child that ends again and again."""
_CARDS_S = 10.0
_AWAY_S = 45.0
"""Without a connection for so long, the gateway counts as away; in a long visit the SuperNode calls every 30 s."""
_DOUBT_S = 30.0
"""Between two questions to the gateway what is wrong, while there is no connection or answer, or the SuperNode ends."""
_LOOK_S = 5.0
"""So long a connection that was seen is not looked for again: the system walks all of its connections each time."""

Say = Callable[[str, str], None]
"""Told (line, style): one line for each change; style "" or "yellow"."""
ChildOf = Callable[[SiteHome, int], Child]


def start(
    home: SiteHome,
    say: Say,
    *,
    stop: Event | None = None,
    children: Mapping[str, ChildOf] | None = None,
) -> int:
    """Runs the node until SIGTERM or SIGINT, then ends both children within 15 seconds.

    Args:
        say: Told every change.
        stop: Ends it, instead of the signals.
        children: What to keep alive, by name, in place of the SuperNode and the runner; for tests.

    Raises:
        ConfigError: The user is root, a node runs already, or the site's own files do not hold.
    """
    check_user()
    private_folder(home.run)
    with only_one(home):
        stop = stop if stop is not None else stop_on_signal()
        node = _Node(home, say, children or {SUPERNODE: _supernode, RUNNER: _runner})
        try:
            node.run(stop)
        finally:
            node.end()
    return 0


def check_user() -> None:
    """Refuses to run as root: nothing that a node does needs it.

    Raises:
        ConfigError: The user is root.
    """
    if os.geteuid() == 0 and os.environ.get("FEDICOM_ALLOW_ROOT") != "1":
        raise ConfigError(
            "the node was started as root, and needs no right of root; start it as a user of its own, or say "
            "--allow-root (FEDICOM_ALLOW_ROOT=1) where root is nobody outside, as in a rootless container"
        )


@contextmanager
def only_one(home: SiteHome) -> Iterator[None]:
    """Holds the home against a second node; the system frees it when this process ends, however it ends.

    Raises:
        ConfigError: A node runs in this home.
    """

    def busy() -> ConfigError:
        return ConfigError(
            f"a node runs in this home already (process {running(home) or 'unknown'}); `fedicom site status` shows "
            "it, `fedicom site stop` ends it"
        )

    with held_alone(_lock_file(home), "the lock of the node", busy) as handle:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield


def running(home: SiteHome) -> int | None:
    """Process id of the node that runs in this home; None when there is none."""
    path = _lock_file(home)
    if not path.exists():
        return None
    with storing("the lock of the node"), path.open() as file:  # to read alone: the disk may be read-only by now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdecimal() else None
        return None


def end(home: SiteHome, timeout_s: float = 20.0) -> bool:
    """Asks the node of this home to end, and waits for it.

    Returns:
        Whether there was one.

    Raises:
        FedicomError: It did not end in time, or belongs to another user.
    """
    pid = running(home)
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise FedicomError(f"the node is process {pid} of another user; stop it as that user") from None
    until = time.monotonic() + timeout_s
    while running(home) == pid:
        if time.monotonic() > until:
            raise FedicomError(f"the node, process {pid}, did not end within {timeout_s:g} s; look at its logs in run/")
        time.sleep(0.1)
    return True


class _Node:
    def __init__(self, home: SiteHome, say: Say, children: Mapping[str, ChildOf]) -> None:
        self._home, self._say, self._children_of = home, say, children
        self._config = home.config
        _need(home)
        self._port = self._config.node_port or free_port()
        self._heard: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._supervisor = Supervisor(home.run / "logs", lambda name, what: self._heard.put((name, what)))
        self._started, self._written = utc_now(), 0.0
        self._keys = self._fingerprint()
        self._runners: set[int] = set()
        self._connected_at: float | None = None
        self._shown: dict[str, Any] = {}
        self._silent_until: dict[str, float] = {}
        self._cards: tuple[float, tuple[Card, ...]] = (-_CARDS_S, ())
        self._status: dict[str, Any] = {}
        self._metrics: Callable[[], None] = lambda: None
        self._warnings: tuple[str, ...] = ()
        self._doubt, self._doubted = False, -_DOUBT_S
        self._unanswered = Bell(home.unanswered_bell)
        self._mark = self._unanswered.mark
        self._asking: Thread | None = None
        self._failure: Line | None = None

    def run(self, stop: Event) -> None:
        config, home = self._config, self._home
        if config.metrics_port is not None:
            self._metrics = serve_metrics(config.metrics_port, self.families)
        self._say(f"Site {config.site} of {config.federation}; calls {config.gateway} and nothing else", "")
        warned = -_DAY_S
        for name in self._children_of:
            self._launch(name)
        while True:
            if time.monotonic() - warned >= _DAY_S:
                warned = time.monotonic()
                self._warnings = warnings(home)
                for line in self._warnings:
                    self._say(line, "yellow")
            self._hear()
            if (keys := self._fingerprint()) != self._keys:
                self._keys = keys
                warned = -_DAY_S
                self._say("Keys or certificates have changed; starting again with the new ones", "")
                for name in self._children_of:
                    self._launch(name)
            self._ask()
            self._tell()
            if stop.wait(_POLL_S):
                return

    def end(self) -> None:
        """Ends the children and says so in the status."""
        self._say("Stopping", "")
        self._supervisor.stop_all(_GRACE_S)
        self._metrics()
        self._status |= {"state": "stopped", "children": dict.fromkeys(self._children_of), "updated": utc_now()}
        self._write()
        self._say("Stopped", "")

    def _launch(self, name: str) -> None:
        self._supervisor.stop(name, _GRACE_S / 2)
        self._supervisor.start(self._children_of[name](self._home, self._port))

    def _hear(self) -> None:
        """What became of the children since the last look."""
        again = False
        while True:
            try:
                name, what = self._heard.get_nowait()
            except queue.Empty:
                break
            if not what.startswith("ended"):
                continue
            again = again or name == RUNNER
            self._doubt = self._doubt or name == SUPERNODE
            now = time.monotonic()
            if now >= self._silent_until.get(name, 0.0):
                self._silent_until[name] = now + _AGAIN_S
                self._say(f"The {name} {what}; why stands in run/logs/{name}.log", "yellow")
        if again and SUPERNODE in self._children_of:
            # What it waits for died with the runner: see `client/link.py`.
            self._launch(SUPERNODE)

    def _ask(self) -> None:
        """Has the gateway asked what is wrong, where something seems to be; an answer may take a minute."""
        now = time.monotonic()
        if (mark := self._unanswered.mark) != self._mark:
            self._doubt, self._mark = True, mark
        if self._doubt and now - self._doubted >= _DOUBT_S and not (self._asking and self._asking.is_alive()):
            self._doubt, self._doubted = False, now
            self._asking = Thread(target=self._learn, name="asks the gateway", daemon=True)
            self._asking.start()

    def _learn(self) -> None:
        self._failure = failure(self._home)
        self._doubt = self._doubt or self._failure is not None

    # What is shown

    def _tell(self) -> None:
        children = dict(self._supervisor.children)
        report = self._report(children.get(RUNNER))
        state = report.pop("state", "starting")
        if children.get(RUNNER) is None and state != "failed":
            state = "restarting"
        connected, failed = self._connected(children.get(SUPERNODE)), self._failure
        self._doubt = self._doubt or connected is False
        if failed is not None:
            # A refusal is an open connection as well; where the gateway has nobody to ask, it is reached all the same.
            connected = connected if failed.what == COORDINATOR else False
            state = "refused" if failed.what in MEMBER and state != "failed" else state
        status = {
            **report,
            "site": self._config.site,
            "federation": self._config.federation,
            "gateway": self._config.gateway,
            "state": state,
            "connected": connected,
            "trouble": f"{failed.what}: {failed.says}; {failed.fix}" if failed is not None else None,
            "pid": os.getpid(),
            "children": children,
            "started": self._started,
        }
        changed = {key: value for key, value in status.items() if key != "updated"} != {
            key: value for key, value in self._status.items() if key != "updated"
        }
        if changed or time.monotonic() - self._written >= _BEAT_S:
            self._status = {**status, "updated": utc_now()}
            self._write()
        if changed:
            for line, style in changes(self._shown, status):
                self._say(line, style)
            self._shown = status

    def _connected(self, supernode: int | None) -> bool | None:
        """Whether the SuperNode has the gateway at the other end; None where this cannot be told."""
        now, config = time.monotonic(), self._config
        if self._connected_at is not None and now - self._connected_at < _LOOK_S:
            return True
        proxy = proxy_of(config, os.environ)
        there = (
            connected(supernode, (proxy_address(proxy) if proxy else split_address(config.gateway))[1])
            if supernode is not None
            else False
        )
        if there is None:
            return None
        if there:
            self._connected_at = now
        return self._connected_at is not None and now - self._connected_at < _AWAY_S

    def _report(self, runner: int | None) -> dict[str, Any]:
        """What the runner, or the one before it, wrote; empty when that was none of ours."""
        if runner is not None:
            self._runners.add(runner)
        try:
            report = read_status(self._home.runner_file) or {}
        except FedicomError:
            return {}
        if report.pop("pid", None) not in self._runners:
            return {}
        report.pop("started", None)
        return report

    def _write(self) -> None:
        self._written = time.monotonic()
        try:
            write_whole(self._home.status_file, json.dumps(self._status, indent=1).encode(), to_system)
        except FedicomError as error:  # a full disk costs the display, not the work
            if "disk" not in self._silent_until:
                self._say(str(error), "yellow")
                self._silent_until["disk"] = time.monotonic()

    def _fingerprint(self) -> tuple[object, ...]:
        home, found = self._home, list[object]()
        for path in (home.signing_key, home.node_key, home.ca):
            try:
                stat = path.stat()
                found.append((stat.st_ino, stat.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)

    def families(self) -> list[Family]:
        """The numbers for Prometheus."""
        now = time.monotonic()
        if now - self._cards[0] >= _CARDS_S:
            self._cards = now, cards()
        told = {"disk_free": shutil.disk_usage(self._home.path).free, "warnings": len(self._warnings)}
        return families({**self._status, **told}, self._cards[1])


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a person wants to hear of a new status: (line, style)."""
    if now.get("state") == "failed" and now.get("error") != before.get("error"):
        yield f"The runner cannot work: {now.get('error')}", "yellow"
    if now.get("state") == "ready" and before.get("state") not in ("ready", "working"):
        yield "Ready; waiting for the coordinator", ""
    if now.get("connected") != before.get("connected") and now.get("connected") is not None:
        if now["connected"]:
            yield f"Connected to {now.get('gateway')}", ""
        elif before:
            yield f"No connection to {now.get('gateway')}; trying until there is one", "yellow"
    if now.get("trouble") and not before.get("trouble"):
        yield str(now["trouble"]), "yellow"
    elif before.get("trouble") and not now.get("trouble") and before.get("connected") and now.get("connected"):
        yield "The coordinator answers again", ""
    recipe = now.get("recipe") or {}
    doing = (now.get("doing"), now.get("round"), recipe.get("id"))
    if doing != (before.get("doing"), before.get("round"), (before.get("recipe") or {}).get("id")):
        if now.get("doing") in ("training", "evaluating"):
            rounds = recipe.get("rounds")
            which = f"round {now.get('round')} of {rounds}" if now.get("doing") == "training" else "closing evaluation"
            yield f"{recipe.get('name')}, {which}: {now.get('doing')}", ""
        elif now.get("doing") == "reading images":
            yield f"{recipe.get('name')}: reading the images", ""
    # Without a recipe it is a runner that was started anew, and has counted in the log.
    if recipe and int(now.get("updates") or 0) > int(before.get("updates") or 0) and "updates" in before:
        sent = int(now.get("bytes_sent") or 0) - int(before.get("bytes_sent") or 0)
        epsilon = now.get("epsilon")
        spent = f", epsilon {rounded_up(epsilon['spent'])} of {epsilon['cap']:g} spent" if epsilon else ""
        took = f" after {now['last_visit_s']:.0f} s" if now.get("last_visit_s") is not None else ""
        yield f"{recipe.get('name')}, round {now.get('round')}: update sent{took}, {sent / 1e6:.1f} MB{spent}", ""
    refusal = now.get("last_refusal")
    if refusal and refusal != before.get("last_refusal"):
        told = {key: refusal.get(key) for key in ("recipe_id", "code", "why")}
        earlier = before.get("last_refusal") or {}
        if told != {key: earlier.get(key) for key in told}:
            here = f" ({refusal['here']})" if refusal.get("here") and refusal["here"] != refusal["why"] else ""
            yield f"Refused: {refusal['why']}{here}", "yellow"


def families(status: Mapping[str, Any], graphics: tuple[Card, ...] = ()) -> list[Family]:
    """A node's status as metrics."""
    site = {"site": str(status.get("site", ""))}
    children = status.get("children") or {}
    epsilon = status.get("epsilon") or {}

    def one(name: str, what: str, kind: Any, value: float | None) -> Family:
        return Family(name=name, help=what, kind=kind, samples=[] if value is None else [(site, value)])

    spent, cap = epsilon.get("spent"), epsilon.get("cap")
    left = None if spent is None or cap is None else max(0.0, cap - spent)
    # A site that was never asked anything has waited since its start; without a runner's word nothing is known.
    contact = status.get("last_contact") or (status.get("started") if "last_contact" in status else None)
    return [
        Family(
            name="fedicom_site_up", help="1 while a process of the node runs.", kind="gauge",
            samples=[({**site, "process": name}, int(pid is not None)) for name, pid in children.items()],
        ),
        one("fedicom_site_connected", "1 while the gateway is at the other end.", "gauge",
            None if status.get("connected") is None else int(status["connected"])),
        one("fedicom_site_updates_total", "Updates sent.", "counter", status.get("updates")),
        one("fedicom_site_evaluations_total", "Evaluations sent.", "counter", status.get("evaluations")),
        one("fedicom_site_refusals_total", "Messages refused.", "counter", status.get("refusals")),
        one("fedicom_site_sent_bytes_total", "Bytes of the updates sent.", "counter", status.get("bytes_sent")),
        one("fedicom_site_busy_seconds_total", "Time spent on visits since the start.", "counter",
            status.get("busy_s")),
        one("fedicom_site_last_visit_seconds", "Duration of the last visit.", "gauge", status.get("last_visit_s")),
        one("fedicom_site_round", "Round that was worked on last.", "gauge", status.get("round")),
        one("fedicom_site_last_contact_timestamp_seconds",
            "When the coordinator's last message came; before the first one, when the node started.", "gauge",
            None if contact is None else datetime.fromisoformat(contact).timestamp()),
        one("fedicom_site_epsilon_spent", "Epsilon spent on the cohort.", "gauge", spent),
        one("fedicom_site_epsilon_cap", "Most epsilon that the policy allows.", "gauge", cap),
        one("fedicom_site_epsilon_left", "Epsilon that is left.", "gauge", left),
        one("fedicom_site_warnings", "What the node warns of: certificates that run out.", "gauge",
            status.get("warnings")),
        one("fedicom_site_disk_free_bytes", "Free on the disk of the site's folder.", "gauge", status.get("disk_free")),
        Family(
            name="fedicom_site_gpu_utilisation_ratio", help="Share of the time that the GPU works.", kind="gauge",
            samples=[({**site, "gpu": str(card.number)}, card.utilisation) for card in graphics
                     if card.utilisation is not None],
        ),
        Family(
            name="fedicom_site_gpu_memory_used_bytes", help="GPU memory in use.", kind="gauge",
            samples=[({**site, "gpu": str(card.number)}, card.used) for card in graphics]
            or [(site, value["used"]) for value in [status.get("gpu_memory")] if value],
        ),
        Family(
            name="fedicom_site_gpu_memory_bytes", help="GPU memory.", kind="gauge",
            samples=[({**site, "gpu": str(card.number)}, card.total) for card in graphics]
            or [(site, value["total"]) for value in [status.get("gpu_memory")] if value],
        ),
    ]  # fmt: skip


def _supernode(home: SiteHome, port: int) -> Child:
    from client.link import supernode_child

    return supernode_child(home, port)


def _runner(home: SiteHome, port: int) -> Child:
    return Child(
        name=RUNNER,
        command=[sys.executable, "-m", "client.runner", "--home", str(home.path), "--port", str(port)],
        environment={
            "FLWR_HOME": str(private_folder(home.supernode)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        },
    )


def _need(home: SiteHome) -> None:
    """What would let every start fail is told now, in words."""
    home.registry  # noqa: B018 - it is checked when it is read
    proxy_of(home.config, os.environ)
    for path, what in (
        (home.signing_key, "the site's signing key"),
        (home.node_key, "the key of its Flower node"),
        (home.cohort_key, "the key of its pseudonyms"),
        (home.superexec_secret, "the secret between Flower's process and ours"),
        (home.ca, "the certificate of the federation's authority"),
    ):
        if not path.is_file():
            raise ConfigError(f"{what} is missing ({path.relative_to(home.path)}); unpack the site's kit again")
        if path != home.ca:
            read_private(path, what)


def _lock_file(home: SiteHome) -> Path:
    return home.run / "node.lock"
