"""What `fedicom server start` does: keeps SuperLink, gateway and a process a run; lets in whom the registry names."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.clock import utc_now
from common.config import validate_json
from common.deployment import ServerConfig, ServerHome
from common.errors import ConfigError, ExchangeError, FedicomError, StorageError
from common.exchange import NAME_PATTERN
from common.identity import Signer
from common.installed import code_hashes
from common.journal import SharedLog
from common.registry import Registry, parse_registry, read_registry
from common.signed import parse_recipe
from common.storage import full, held_alone, private_folder, storing, to_system, write_whole
from common.supervise import Child, Supervisor, free_port
from server.blobs import clear
from server.runs import PATIENCE_S, Order, Run, run_names
from server.watch import Watch

log = logging.getLogger(__name__)

VERSION = version("fedicom")
_TICK_S = 0.3
_LOOK_S = 5.0
"""Between two looks at who is connected."""
_STEADY_S, _LONGEST_PAUSE_S = 60.0, 60.0
_STALE_S, _SILENT_S = 15.0, 120.0
"""Without one successful look at the nodes: who is connected is told as of the last one; nobody is taken for it."""
_WARNINGS_S = 60.0
_DONE, _STOPPED, _FAILED = 0, 3, 4
"""Exit codes of `server.runner` after which it is not started again."""
_GRACE_S = {"run": 8.0, "gateway": 3.0, "superlink": 3.0}
"""To end by themselves: together they stay below the 15 s in which all must be over."""


class ConflictError(FedicomError):
    """What was asked does not fit how the run stands."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a coordinator is put together from; a test puts plain processes in its place."""

    superlink: Callable[[ServerHome, int], Child]
    gateway: Callable[[ServerHome, int], Child]
    runner: Callable[[ServerHome, str], Child]
    wait_until_up: Callable[[ServerHome, int, float], None]
    register: Callable[[ServerHome, int, Registry], tuple[str, ...]]
    stop_runs: Callable[[ServerHome, int], int]
    online: Callable[[ServerHome, int], Mapping[int, str]]


def deployed() -> Parts:
    """The real ones."""
    from server import link

    return Parts(
        superlink=link.superlink_child,
        gateway=gateway_child,
        runner=runner_child,
        wait_until_up=link.wait_until_up,
        register=link.register_nodes,
        stop_runs=link.stop_runs,
        online=link.online,
    )


def gateway_child(home: ServerHome, superlink_port: int) -> Child:
    """The gateway as a child process; its configuration is written anew.

    Raises:
        ConfigError: `gateway` in server.yaml names an unknown limit, or one out of bounds.
    """
    from server.gateway_rules import GatewayConfig, GatewayLimits

    config = home.config
    try:
        limits = validate_json(GatewayLimits, json.dumps(dict(config.gateway)))
    except ConfigError as error:
        raise ConfigError("\n".join(f"server.yaml: gateway.{line}" for line in str(error).splitlines())) from None
    wanted = GatewayConfig(
        listen_host=config.listen,
        listen_port=config.port,
        certificate=home.gateway_certificate,
        key=home.gateway_key,
        upstream_port=superlink_port,
        upstream_ca=home.ca,
        registry=home.registry_file,
        authority=home.authority,
        blobs=home.blobs if config.blobs else None,
        sent_bell=home.sent_bell,
        answered_bell=home.answered_bell,
        limits=limits,
        stats=home.gateway_stats,
    )
    write_whole(home.gateway_config, (json.dumps(asdict(wanted), default=str, indent=1) + "\n").encode())
    command = [sys.executable, "-m", "server.gateway", "--config", str(home.gateway_config)]
    return Child(name="gateway", command=command, longest_pause_s=5.0)


def runner_child(home: ServerHome, name: str) -> Child:
    """A run as a child process; whether it is started again is decided by how it ends."""
    command = [sys.executable, "-m", "server.runner", "--home", str(home.path), "--run", name]
    return Child(name=_child(name), command=command, restart=False)


@dataclass
class _Work:
    """A run that shall get on."""

    due: float = 0.0
    pause_s: float = 1.0
    began: float = 0.0
    starts: int = 0


@dataclass
class _Seen:
    """What was learned of the nodes."""

    registry: Registry | None = None
    stamp: tuple[int, ...] = ()
    online: tuple[str, ...] = ()
    looked_at: float = -_LOOK_S
    renewed_at: float = -math.inf
    """When the SuperLink was last ended for a new certificate."""
    trouble: str = ""
    events: dict[str, str] = field(default_factory=dict)


class Control:
    """The coordinator of one home: `serve` until `stop` is called; everything may be called from any thread."""

    def __init__(self, home: ServerHome, parts: Parts) -> None:
        """Reads and checks the home; nothing is started.

        Raises:
            FedicomError: Something of the home is missing or does not fit.
        """
        self.home, self._parts = home, parts
        self.config: ServerConfig = home.config
        registry = home.registry
        signer = Signer.load(home.signing_key)
        if signer.public != registry.coordinator:
            raise ConfigError(
                f"the registry names coordinator key {registry.coordinator[:12]}, keys/signing.key is "
                f"{signer.public[:12]}; install the newest kit with `fedicom provision install`"
            )
        if registry.federation != self.config.federation:
            raise ConfigError(
                f"server.yaml is of federation {self.config.federation}, the registry of {registry.federation}"
            )
        self.audit = SharedLog(home.audit_file, signer)
        self.superlink_port = self.config.superlink_port or free_port()
        self.state = "starting"
        self.started = utc_now()
        self._stop, self._ready = threading.Event(), threading.Event()
        self._lock = threading.RLock()
        self._working: dict[str, _Work] = {}
        self._untold: dict[str, dict[str, Any]] = {}
        """Changes of a status that a full disk did not take."""
        self._seen = _Seen()
        self._supervisor = Supervisor(private_folder(home.run / "logs"), self._event)
        self._watch = Watch(home)
        self._warned_at = -_WARNINGS_S
        self._written = b""

    # The whole

    def serve(self, control_port: int) -> None:
        """Starts everything and keeps it until `stop`; then ends everything, within 15 s.

        Args:
            control_port: Of the HTTP interface, for the file that tells commands where it is.

        Raises:
            ConfigError: server.yaml does not fit the gateway.
            StorageError: The disk is full or not writable.
        """
        configuration = hashlib.sha256((self.home.path / "server.yaml").read_bytes()).hexdigest()
        registry = self.home.registry.version
        self.audit.append("server started", version=VERSION, configuration=configuration, registry=registry)
        self.audit.append("code", packages=dict(code_hashes()))
        ports = {"port": control_port, "superlink_port": self.superlink_port, "pid": os.getpid()}
        write_whole(self.home.control_file, (json.dumps(ports) + "\n").encode())
        try:
            self._write_status()
            clear(self.home.blobs)
            self._supervisor.start(self._parts.superlink(self.home, self.superlink_port))
            self._supervisor.start(self._parts.gateway(self.home, self.superlink_port))
            for name in run_names(self.home):
                with suppress(FedicomError):
                    if Run(self.home, name).active:
                        self._working[name] = _Work()
            nodes = threading.Thread(target=self._keep_nodes, name="nodes", daemon=True)
            nodes.start()
            self.state = "running"
            while not self._stop.wait(_TICK_S):
                try:
                    self._tick()
                except Exception:  # whatever it is: the sites' way in must not close because of it
                    log.exception("the coordinator")
        finally:
            self.state = "stopping"
            self._end()
            with suppress(FedicomError):
                self.audit.append("server stopped")
            self.home.control_file.unlink(missing_ok=True)
            self.state = "stopped"
            self._write_status()

    def stop(self) -> None:
        """Makes `serve` return soon; safe in a signal handler."""
        # From a thread: a handler runs in the middle of whatever the main thread does, even of this event's own wait,
        # whose lock it would then wait for.
        threading.Thread(target=self._stop.set, daemon=True).start()

    def _end(self) -> None:
        self._stop.set()
        names = list(self._supervisor.children)
        runners = [name for name in names if name not in ("superlink", "gateway")]
        ends = [threading.Thread(target=self._supervisor.stop, args=(name, _GRACE_S["run"])) for name in runners]
        for end in ends:
            end.start()
        for end in ends:
            end.join()
        for name in ("gateway", "superlink"):
            self._supervisor.stop(name, _GRACE_S[name])
        for child in runners:
            with suppress(StorageError):
                self._unless_over(Run(self.home, child.removeprefix("run-")), state="stopped", eta_s=None)

    def _tick(self) -> None:
        with self._lock:
            for name in list(self._working):
                if Run(self.home, name).order_file.exists():
                    self._keep_run(name, self._working[name])
                else:  # somebody has removed its folder, and no command could reach it any more
                    del self._working[name]
                    self._supervisor.stop(_child(name), _GRACE_S["run"])
            for name, changes in list(self._untold.items()):
                with suppress(StorageError):
                    Run(self.home, name).settle(**changes)
                    del self._untold[name]
        if time.monotonic() - self._warned_at >= _WARNINGS_S:
            self._warned_at = time.monotonic()
            self._watch.look()
            for name in self._watch.renewed():
                # As after a crash: sites wait and come back, and runs ask again what was lost with it.
                log.info("%s starts anew with the new certificate", name)
                self._seen.renewed_at = time.monotonic()
                self._supervisor.stop(name, _GRACE_S[name])
                self._supervisor.start(getattr(self._parts, name)(self.home, self.superlink_port))
        self._write_status()

    def _event(self, name: str, what: str) -> None:
        log.info("%s %s", name, what)
        self._seen.events[name] = f"{what} ({utc_now()})"

    def _write_status(self) -> None:
        plain = self.status
        text = json.dumps({**plain, "updated": None}, sort_keys=True).encode()
        if text != self._written:
            try:
                write_whole(self.home.status_file, (json.dumps(plain, indent=1) + "\n").encode(), to_system)
                self._written = text
            except StorageError as error:
                log.error("status.json: %s", error)

    @property
    def status(self) -> dict[str, Any]:
        """How the coordinator stands, as `run/status.json` has it."""
        seen, children = self._seen, dict(self._supervisor.children)
        registry = seen.registry
        unheard_s = time.monotonic() - seen.looked_at if self._ready.is_set() else 0.0
        silent = unheard_s > _SILENT_S
        down = {name: seen.events.get(name, "not started yet") for name, pid in children.items() if pid is None}
        with self._lock:
            active = sorted(self._working)
        return {
            "state": self.state,
            "federation": self.config.federation,
            "version": VERSION,
            "pid": os.getpid(),
            "started": self.started,
            "updated": utc_now(),
            "port": self.config.port,
            "children": children,
            "down": {**self._watch.expired, **down},
            "registry": {"version": registry.version, "sites": list(registry.members)} if registry else None,
            "online": [] if silent else list(seen.online),
            "stale": unheard_s > _STALE_S,
            "silent": silent,
            "trouble": seen.trouble,
            "warnings": list(self._watch.warnings),
            "active": active,
        }

    # Nodes

    def _keep_nodes(self) -> None:
        """Registers who the registry names, whenever that changes; waits for the SuperLink, which may be restarted."""
        while not self._stop.is_set():
            try:
                self._look_at_nodes()
                if self._seen.trouble:
                    log.info("over: %s", self._seen.trouble)
                self._seen.trouble = ""
            except FedicomError as error:
                renewed = self._seen.looked_at < self._seen.renewed_at
                trouble = str(error)
                if isinstance(error, ExchangeError) and (renewed or not self._ready.is_set()):
                    why = "starts anew with its new certificate, and " if renewed else ""
                    trouble = f"the SuperLink {why}does not answer yet; see run/logs/superlink.log"
                if self._seen.trouble != trouble:
                    log.warning("%s", trouble)
                self._seen.trouble = trouble
            except Exception as error:
                log.exception("nodes")
                self._seen.trouble = f"{type(error).__name__} while nodes were looked after; see the log"
            self._stop.wait(1.0)

    def _look_at_nodes(self) -> None:
        if not self._ready.is_set():
            self._parts.wait_until_up(self.home, self.superlink_port, 5.0)
        with storing("the registry"):
            stat = self.home.registry_file.stat()
        stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if stamp != self._seen.stamp or self._seen.registry is None:
            with storing("the registry"):
                data = self.home.registry_file.read_bytes()
            self._take(data)
            self._seen.stamp = stamp
        if not self._ready.is_set():
            self._parts.stop_runs(self.home, self.superlink_port)
            self._ready.set()
            log.info("ready: the SuperLink answers, sites can call port %d", self.config.port)
        if time.monotonic() - self._seen.looked_at >= _LOOK_S:
            members = {member.node: name for name, member in self.home.registry.members.items()}
            keys = self._parts.online(self.home, self.superlink_port).values()
            self._seen.online = tuple(sorted(members[key] for key in keys if key in members))
            self._seen.looked_at = time.monotonic()

    def _take(self, data: bytes) -> None:
        """Brings a registry into force, and writes down what it changed."""
        new, old = parse_registry(data, self.home.authority, self.home.registry_file.name), self._in_force()
        if old is not None and new.version < old.version:
            raise ConfigError(
                f"the registry has version {new.version}, version {old.version} was in force before: an older one "
                "would bring back keys that were revoked; install the newest"
            )
        self._parts.register(self.home, self.superlink_port, new)
        if new != old:
            for kind, facts in changes(old, new):
                self.audit.append(kind, **facts, registry=new.version)
            write_whole(self._in_force_file, data)
        self._seen.registry = new

    @property
    def _in_force_file(self) -> Path:
        return self.home.run / "registry-in-force.json"

    def _in_force(self) -> Registry | None:
        if not self._in_force_file.exists():
            return None
        try:
            return read_registry(self._in_force_file, self.home.authority)
        except ConfigError as error:
            raise ConfigError(f"{error}. Or make sure that trust/registry.json is the newest, and remove it") from None

    # Runs

    def submit(self, data: bytes, name: str | None = None, *, by: str, patience_s: float | None = None) -> str:
        """Puts a signed recipe to work; gives the name of the run.

        Raises:
            ConfigError: It is not signed by this coordinator, or nobody could ever satisfy it.
            ConflictError: The name is taken, or the recipe is at work already.
            StorageError: The disk is full or not writable.
        """
        registry = self.home.registry
        recipe = (signed := parse_recipe(data, registry.coordinator)).recipe
        wanted = name or recipe.name
        if not re.fullmatch(NAME_PATTERN, wanted):
            raise ConfigError(
                f"{wanted[:80]!a} is no name for a run; expected letters, digits, `_`, `.` and `-`, at most 63: "
                "give the run one with --name"
            )
        if recipe.federation.quorum > (members := len(registry.members)):
            raise ConfigError(
                f"the recipe needs {recipe.federation.quorum} sites (federation.quorum), the registry has {members}; "
                "add sites with `fedicom provision add`, or sign the recipe with a smaller quorum"
            )
        order = Order(
            run=wanted, recipe_id=recipe.id, wanted="running", submitted=utc_now("milliseconds"), by=by,
            patience_s=PATIENCE_S if patience_s is None else patience_s,
        )  # fmt: skip
        with self._lock:
            run = Run(self.home, wanted)
            if run.order_file.exists():
                raise ConflictError(f"there is a run {wanted} already; give this one another name (--name)")
            self._no_other_works_on(recipe.id)
            private_folder(run.path)
            signed.write(run.recipe_file)
            waiting = {"recipe": recipe.name, "recipe_id": recipe.id, "round": 0, "rounds": recipe.rounds, "sites": {}}
            run.settle(state="waiting", started=order.submitted, error=None, summary=None, eta_s=None, **waiting)
            run.write_order(order)
            self._working[wanted] = _Work()
        return wanted

    def stop_run(self, name: str) -> None:
        """Ends the work on a run, or gives up one that failed, which else asks for somebody; what it has done stays.

        Raises:
            ConfigError: There is no such run.
            ConflictError: Nobody works on it, and it did not fail.
            StorageError: The disk is full or not writable.
        """
        run = Run(self.home, name)
        with self._lock:
            order, state = run.order, self.run_status(name).get("state", "new")
            if name not in self._working and state != "failed":
                raise ConflictError(f"run {name} is not at work: it is {state}")
            run.write_order(replace(order, wanted="stopped"))
            if self._working.pop(name, None) is None:
                run.settle(state="stopped")
                self._untold.pop(name, None)
                return
        self._supervisor.stop(_child(name), _GRACE_S["run"])
        self._unless_over(run, state="stopped", eta_s=None)

    def resume_run(self, name: str) -> None:
        """Goes on with a run that was stopped or failed.

        Raises:
            ConfigError: There is no such run.
            ConflictError: It is at work, or finished, or another run works on its recipe.
            StorageError: The disk is full or not writable.
        """
        run = Run(self.home, name)
        with self._lock:
            order, state = run.order, self.run_status(name).get("state")
            if name in self._working:
                raise ConflictError(f"run {name} is at work already ({state})")
            if state == "finished":
                raise ConflictError(
                    f"run {name} is finished; run its recipe under a new name (a private one signed with "
                    "another seed, for sites pay for its rounds once)"
                )
            self._no_other_works_on(order.recipe_id)
            run.write_order(replace(order, wanted="running"))
            self._untold.pop(name, None)
            run.settle(state="waiting", error=None)
            self._working[name] = _Work()

    def conclude_run(self, name: str) -> None:
        """Ends the training of a run where it stands, also one at work, and makes the model of what there is.

        Raises:
            ConfigError: There is no such run.
            ConflictError: It is finished, no round is behind it, or another run works on its recipe.
            StorageError: The disk is full or not writable.
        """
        run = Run(self.home, name)
        with self._lock:
            order, status = run.order, self.run_status(name)
            if status.get("state") == "finished":
                raise ConflictError(f"run {name} is finished; its model is in runs/{name}")
            if not status.get("round"):
                raise ConflictError(
                    f"run {name} has no round behind it, so there is no model to conclude with; `fedicom server stop "
                    f"{name}` ends it"
                )
            if name not in self._working:
                self._no_other_works_on(order.recipe_id)
            run.write_order(replace(order, wanted="concluded"))
            # At work all the while, to whoever follows it or would run its recipe too; but nothing is started yet.
            self._working[name] = _Work(due=math.inf)
            self._untold.pop(name, None)
        self._supervisor.stop(_child(name), _GRACE_S["run"])
        with self._lock:
            if run.order.wanted != "concluded":  # somebody has stopped it meanwhile
                return
            self._working.pop(name, None)
            if run.status.get("state") == "finished":  # it had its model before it could be ended
                return
            run.settle(state="waiting", error=None)
            self._working[name] = _Work()

    def _no_other_works_on(self, recipe_id: str) -> None:
        for other in self._working:
            found = Run(self.home, other)
            # One that has finished asks nobody any more, though its process may need another moment to end.
            if found.active and found.order.recipe_id == recipe_id:
                raise ConflictError(f"run {other} works on this recipe already; sites would be asked twice")

    def run_status(self, name: str) -> dict[str, Any]:
        """How a run stands.

        Raises:
            ConfigError: There is no such run.
        """
        run = Run(self.home, name)
        order = run.order
        facts = {"by": order.by, "submitted": order.submitted, "wanted": order.wanted, "at_work": name in self._working}
        return {"run": name, **run.status, **facts, **self._untold.get(name, {})}

    def run_statuses(self) -> list[dict[str, Any]]:
        """All runs, oldest first."""
        found = []
        for name in run_names(self.home):
            try:
                found.append(self.run_status(name))
            except FedicomError as error:
                found.append({"run": name, "state": "failed", "error": str(error)})
        return found

    def _keep_run(self, name: str, work: _Work) -> None:
        child, now = _child(name), time.monotonic()
        if child not in self._supervisor.children:
            if self._ready.is_set() and now >= work.due:
                work.began, work.starts = now, work.starts + 1
                self._supervisor.start(self._parts.runner(self.home, name))
            return
        code = self._supervisor.ended(child)
        if code is None:
            return
        self._supervisor.stop(child)
        if code in (_DONE, _STOPPED, _FAILED):
            del self._working[name]
            if code == _FAILED and Run(self.home, name).status.get("state") != "failed":
                why = (
                    "the disk is full; free space on it, then `fedicom server resume`"
                    if full(self.home.path)
                    else f"the run cannot go on and could not say why: is the disk full? See run/logs/{child}.log"
                )
                self._untold[name] = {"state": "failed", "error": why, "eta_s": None}
            return
        work.pause_s = 1.0 if now - work.began > _STEADY_S else work.pause_s
        work.due, work.pause_s = now + work.pause_s, min(2 * work.pause_s, _LONGEST_PAUSE_S)

    def _unless_over(self, run: Run, **changes: Any) -> None:
        """Changes a status that its own process, killed perhaps, could not bring up to date."""
        if run.status.get("state") not in ("finished", "failed"):
            run.settle(**changes)


def changes(old: Registry | None, new: Registry) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a new registry brings, as events of the log: (kind, facts)."""
    if old is None:
        yield "registry in force", {"sites": list(new.members)}
        return
    before, after = old.members, new.members
    for name in sorted(before.keys() - after.keys()):
        gone = new.sites.get(name)
        yield "node revoked", {"site": name, "why": gone.why if gone is not None else "no more in the registry"}
    for name in sorted(after.keys() - before.keys()):
        yield "node added", {"site": name, "public_key": after[name].signing}
    for name in sorted(before.keys() & after.keys()):
        which = [key for key in ("signing", "node") if getattr(before[name], key) != getattr(after[name], key)]
        if which:
            yield "key rotated", {"site": name, "which": which, "public_key": after[name].signing}
    if old.coordinator != new.coordinator:
        yield "key rotated", {"site": "coordinator", "which": ["signing"], "public_key": new.coordinator}


@contextmanager
def alone(home: ServerHome) -> Iterator[None]:
    """Keeps a second coordinator out of the home.

    Raises:
        ConfigError: One runs.
    """

    def busy() -> ConfigError:
        return ConfigError(f"a coordinator runs in {home.path.name} already; `fedicom server status` shows it")

    with held_alone(private_folder(home.run) / ".lock", "the folder of the coordinator", busy):
        yield


def _child(run: str) -> str:
    return f"run-{run}"
