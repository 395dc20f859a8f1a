"""The supervisor of a site: both processes are kept alive, one node runs in a folder, everything ends when asked."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client import node as module
from client.machine import Card, connected
from client.node import RUNNER, SUPERNODE, changes, check_user, end, families, only_one, running, start
from common.deployment import SiteHome, read_status
from common.errors import ConfigError, StorageError
from common.prometheus import exposition
from common.supervise import Child, free_port
from server.gateway_rules import RegistryKeys
from tests.client.conftest import House

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
DUMMIES = {
    SUPERNODE: lambda home, port: Child(name=SUPERNODE, command=SLEEP),
    RUNNER: lambda home, port: Child(name=RUNNER, command=SLEEP),
}


@pytest.fixture(autouse=True)
def _root_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Running:
    """A node with dummy children, in a thread of this process."""

    def __init__(self, house: House, wait: Callable[..., Any], children: Any = DUMMIES) -> None:
        self.home, self.lines, self._wait = house.home, list[tuple[str, str]](), wait
        self.stop_event = threading.Event()

        def work() -> None:
            start(
                self.home, lambda *line: self.lines.append(line), stop=self.stop_event,
                children=children,
            )  # fmt: skip

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def child(self, name: str, but: int | None = None) -> int:
        def found() -> int | None:
            pid = (read_status(self.home.status_file) or {}).get("children", {}).get(name)
            return pid if pid != but else None

        return int(self._wait(found, f"child {name}"))

    def stop(self) -> None:
        self.stop_event.set()
        self.thread.join(30)
        assert not self.thread.is_alive()

    @property
    def told(self) -> str:
        return "\n".join(line for line, _ in self.lines)


@pytest.fixture
def node(house: House, wait: Callable[..., Any]) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def run(**given: Any) -> Running:
        made.append(Running(house, wait, **given))
        return made[-1]

    yield run
    for each in made:
        each.stop()


def test_a_supernode_that_is_killed_is_started_again_alone(node: Callable[..., Running]) -> None:
    running_node = node()
    supernode, runner = running_node.child(SUPERNODE), running_node.child(RUNNER)
    os.kill(supernode, signal.SIGKILL)
    again = running_node.child(SUPERNODE, but=supernode)
    assert again != supernode
    assert running_node.child(RUNNER) == runner
    assert "The supernode ended with code -9, again in 0.5 s; why stands in run/logs/supernode.log" in running_node.told


def test_a_runner_that_is_killed_is_started_again_and_the_supernode_with_it(node: Callable[..., Running]) -> None:
    running_node = node()
    supernode, runner = running_node.child(SUPERNODE), running_node.child(RUNNER)
    os.kill(runner, signal.SIGKILL)
    assert running_node.child(RUNNER, but=runner) != runner
    # What the SuperNode waits for died with the runner.
    assert running_node.child(SUPERNODE, but=supernode) != supernode
    assert not alive(supernode)


def test_a_node_that_the_coordinator_does_not_take_says_so_and_why_until_it_does(
    node: Callable[..., Running],
    house: House,
    wait: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Flower's SuperNode ends when it is refused, again and again, and says nothing of the reason."""
    from dataclasses import replace

    from client.words import status_shown
    from common.identity import Signer
    from tests.client.test_preflight import embedded

    monkeypatch.setattr(module, "_DOUBT_S", 0.5)
    first, newer = house.home.registry_file.read_bytes(), tmp_path / "registry.json"
    old, authority = house.home.registry, Signer.load(house.kits / "authority" / "authority.key")
    gone = replace(old.sites["north"], revoked=old.issued, why="left")
    replace(old, version=2, sites={**old.sites, "north": gone}).write(newer, authority)
    ends = [sys.executable, "-c", "pass"]
    children = {**DUMMIES, SUPERNODE: lambda home, port: Child(name=SUPERNODE, command=ends)}

    def status(refused: bool) -> dict[str, Any] | None:
        found = read_status(house.home.status_file) or {}
        return found if str(found.get("trouble")).startswith("key:") == refused and "trouble" in found else None

    with embedded(house, registry=newer) as gateway:
        running_node = node(children=children)
        found = wait(lambda: status(True), "the refusal")
        assert (found["state"], found["connected"]) == ("refused", False)
        assert found["trouble"].startswith("key: the gateway refuses this node's key (401")
        wait(lambda: "ask the coordinator for this site's newest kit" in running_node.told or None, "the line")
        console = Console(record=True, width=200)
        console.print(status_shown(found))
        assert "the coordinator does not take this node" in console.export_text()
        newer.write_bytes(first)
        gateway._allowed = RegistryKeys(newer, house.home.authority)  # type: ignore[assignment]
        assert wait(lambda: status(False), "the end of the refusal")["state"] != "refused"


def test_a_gateway_without_a_coordinator_behind_it_is_told_though_the_connection_is_open(
    node: Callable[..., Running], house: House, wait: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.words import status_shown
    from common.bell import Bell
    from tests.client.test_preflight import embedded

    monkeypatch.setattr(module, "_DOUBT_S", 0.5)
    monkeypatch.setattr(module, "connected", lambda supernode, port: True)
    asked = list[float]()
    look = module.failure

    def status(troubled: bool) -> dict[str, Any] | None:
        found = read_status(house.home.status_file) or {}
        return found if bool(found.get("trouble")) == troubled and "trouble" in found else None

    with embedded(house):
        monkeypatch.setattr(module, "failure", lambda home: None)  # the SuperNode may start after the first status
        running_node = node()
        wait(lambda: (status(False) or {}).get("connected"), "the connection")
        time.sleep(1)  # what was asked before it is answered
        monkeypatch.setattr(module, "failure", lambda home: (asked.append(time.monotonic()), look(home))[1])
        time.sleep(1.5)
        assert asked == []  # nobody asks the gateway while messages are looked for and the answers come
        Bell(house.home.unanswered_bell).ring()
        found = wait(lambda: status(True), "the trouble")
        assert found["connected"]
        assert found["state"] not in ("refused", "failed")
        assert found["trouble"].startswith("coordinator: the gateway is there, but not the SuperLink behind it (502)")
        console = Console(record=True, width=200)
        console.print(status_shown(found))
        assert "to the gateway, but not to the coordinator" in console.export_text()
        monkeypatch.setattr(module, "failure", lambda home: None)
        wait(lambda: status(False), "the end of the trouble")
        wait(lambda: "The coordinator answers again" in running_node.told or None, "the line")


def test_a_look_for_messages_that_fails_rings_the_supervisors_bell(tmp_path: Path) -> None:
    import httpx
    from flwr.proto.fleet_pb2 import PullMessagesRequest

    from client.link import _watch_pulls
    from common.bell import Bell

    class Fleet:
        def PullMessages(self, request: object) -> object:
            raise httpx.ConnectError("refused")

    bell = Bell(tmp_path / "bell")
    _watch_pulls(Fleet, bell)
    assert not bell.there
    with pytest.raises(httpx.ConnectError):
        Fleet().PullMessages(PullMessagesRequest())
    assert bell.there


def test_keys_that_were_exchanged_start_both_again(node: Callable[..., Running], house: House) -> None:
    running_node = node()
    before = running_node.child(SUPERNODE), running_node.child(RUNNER)
    key = house.home.node_key.read_bytes()
    house.home.node_key.unlink()
    house.home.node_key.write_bytes(key)
    assert running_node.child(SUPERNODE, but=before[0])
    assert running_node.child(RUNNER, but=before[1])
    assert "Keys or certificates have changed" in running_node.told


def test_a_stop_ends_both_and_says_so_in_the_status(node: Callable[..., Running]) -> None:
    running_node = node()
    pids = running_node.child(SUPERNODE), running_node.child(RUNNER)
    running_node.stop()
    assert not any(map(alive, pids))
    status = read_status(running_node.home.status_file) or {}
    assert (status["state"], status["children"]) == ("stopped", {SUPERNODE: None, RUNNER: None})
    assert running_node.told.splitlines()[-2:] == ["Stopping", "Stopped"]


def test_one_node_runs_in_a_folder_and_the_next_may_when_it_has_ended(node: Callable[..., Running]) -> None:
    running_node = node()
    running_node.child(RUNNER)
    home = running_node.home
    assert running(home) == os.getpid()
    with pytest.raises(ConfigError, match=rf"runs in this home already \(process {os.getpid()}\)"), only_one(home):
        pass
    running_node.stop()
    assert running(home) is None
    assert end(home) is False
    with only_one(home):
        pass


def test_what_the_runner_writes_is_shown_and_that_of_an_earlier_one_is_not(
    node: Callable[..., Running], wait: Callable[..., Any]
) -> None:
    running_node = node()
    home, runner = running_node.home, running_node.child(RUNNER)
    home.runner_file.write_text(json.dumps({"pid": 1, "state": "ready", "updates": 7}))
    time.sleep(1.2)
    assert "updates" not in (read_status(home.status_file) or {})
    home.runner_file.write_text(json.dumps({"pid": runner, "state": "ready", "updates": 7}))
    status = wait(lambda: (found := read_status(home.status_file) or {}).get("updates") and found, "the report")
    assert (status["state"], status["updates"], status["pid"]) == ("ready", 7, os.getpid())
    assert status["children"][RUNNER] == runner
    wait(lambda: "Ready; waiting for the coordinator" in running_node.told, "the word to the console")


PROGRAM = """
import sys
from pathlib import Path
from client.node import start
from common.deployment import SiteHome
from common.supervise import Child
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = {name: (lambda home, port, name=name: Child(name=name, command=sleep)) for name in ("supernode", "runner")}
raise SystemExit(start(SiteHome(Path(sys.argv[1])), lambda *line: print(line[0], flush=True), children=children))
"""


@pytest.fixture
def process(house: House, wait: Callable[..., Any]) -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """A node in a process of its own, and the ids of its children."""
    command = [sys.executable, "-c", PROGRAM, str(house.home.path)]
    made = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def children() -> dict[str, int] | None:
        found = (read_status(house.home.status_file) or {}).get("children", {})
        return found if found and all(found.values()) else None

    yield made, wait(children, "the children")
    made.kill()
    made.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_node_and_both_children(
    process: tuple[subprocess.Popen[str], dict[str, int]], number: signal.Signals
) -> None:
    node_process, children = process
    node_process.send_signal(number)
    assert node_process.wait(15) == 0
    assert not any(map(alive, children.values()))


def test_stop_finds_the_node_of_the_folder_and_ends_it(
    process: tuple[subprocess.Popen[str], dict[str, int]], house: House
) -> None:
    node_process, children = process
    threading.Thread(target=node_process.wait, daemon=True).start()  # else it stays a zombie, which holds nothing
    assert running(house.home) == node_process.pid
    assert end(house.home) is True
    assert not any(map(alive, children.values()))


def test_no_child_outlives_a_node_that_was_killed_and_the_folder_is_free(
    process: tuple[subprocess.Popen[str], dict[str, int]], house: House, wait: Callable[..., Any]
) -> None:
    node_process, children = process
    node_process.kill()
    node_process.wait()
    wait(lambda: not any(map(alive, children.values())) or None, "the end of the children")
    with only_one(house.home):
        pass


# Before anything is started


def test_root_is_refused_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    monkeypatch.delenv("FEDICOM_ALLOW_ROOT", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="--allow-root"):
        start(house.home, lambda *line: None, children=DUMMIES)
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")
    check_user()
    monkeypatch.delenv("FEDICOM_ALLOW_ROOT")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_user()


@pytest.mark.parametrize("file", ["keys/signing.key", "keys/node.key", "keys/cohort.key", "trust/registry.json"])
def test_a_missing_file_is_told_before_anything_is_started(house: House, file: str) -> None:
    (house.home.path / file).unlink()
    with pytest.raises(ConfigError, match=file):
        start(house.home, lambda *line: None, children=DUMMIES)
    assert not house.home.status_file.exists()


@pytest.mark.parametrize("name", ["signing_key", "node_key", "cohort_key", "superexec_secret"])
def test_a_key_that_others_may_read_is_told_before_anything_is_started(house: House, name: str) -> None:
    path = getattr(house.home, name)
    path.chmod(0o644)
    with pytest.raises(StorageError, match=rf"{path.name} has mode 644, expected 600; run chmod 600 on it"):
        start(house.home, lambda *line: None, children=DUMMIES)
    assert not house.home.status_file.exists()


def test_a_certificate_that_cannot_be_checked_is_told_at_the_start(node: Callable[..., Running], house: House) -> None:
    house.home.ca.write_text("no certificate")
    running_node = node()
    running_node.child(RUNNER)
    assert any("ca.crt" in line and style == "yellow" for line, style in running_node.lines)


def test_the_children_are_the_supernode_and_our_runner_without_a_secret_in_their_commands(house: House) -> None:
    supernode, runner = module._supernode(house.home, 4711), module._runner(house.home, 4711)
    assert (supernode.name, runner.name) == (SUPERNODE, RUNNER)
    assert "4711" in supernode.command
    assert runner.command[1:] == ["-m", "client.runner", "--home", str(house.home.path), "--port", "4711"]
    assert runner.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    words = " ".join([*supernode.command, *runner.command])
    for path in house.home.keys.iterdir():
        assert path.read_bytes().hex() not in words
        assert path.read_bytes().decode(errors="replace") not in words


# What is shown


STATUS: dict[str, Any] = {
    "site": "north", "state": "working", "doing": "training", "round": 2, "updates": 1, "evaluations": 0, "refusals": 1,
    "bytes_sent": 5_000_000, "busy_s": 12.5, "last_visit_s": 4.0, "last_contact": "2026-01-05T12:00:00+00:00",
    "recipe": {"id": "a" * 64, "name": "tiny", "rounds": 3}, "epsilon": {"spent": 2.0, "cap": 8.0, "delta": 1e-5},
    "children": {SUPERNODE: 10, RUNNER: None},
}  # fmt: skip


def test_a_node_that_was_never_asked_anything_has_waited_since_its_start() -> None:
    name = 'fedicom_site_last_contact_timestamp_seconds{site="north"}'
    started = {"started": "2026-01-05T12:00:00+00:00"}
    assert f"{name} 1767614400.0" in exposition(families(STATUS | started | {"last_contact": None})).decode()
    unknown = {key: value for key, value in STATUS.items() if key != "last_contact"}  # the runner has said nothing yet
    assert name not in exposition(families(unknown | started)).decode()


def test_the_metrics_tell_processes_work_budget_and_gpu() -> None:
    card = Card(number=0, name="H", driver="1", used=2 << 30, total=8 << 30, utilisation=0.25)
    lines = exposition(families(STATUS, (card,))).decode().splitlines()
    for line in (
        'fedicom_site_up{site="north",process="supernode"} 1',
        'fedicom_site_up{site="north",process="runner"} 0',
        'fedicom_site_updates_total{site="north"} 1',
        'fedicom_site_sent_bytes_total{site="north"} 5000000',
        'fedicom_site_refusals_total{site="north"} 1',
        'fedicom_site_epsilon_spent{site="north"} 2.0',
        'fedicom_site_epsilon_left{site="north"} 6.0',
        'fedicom_site_last_visit_seconds{site="north"} 4.0',
        'fedicom_site_round{site="north"} 2',
        'fedicom_site_last_contact_timestamp_seconds{site="north"} 1767614400.0',
        'fedicom_site_gpu_utilisation_ratio{site="north",gpu="0"} 0.25',
        f'fedicom_site_gpu_memory_used_bytes{{site="north",gpu="0"}} {2 << 30}',
    ):
        assert line in lines


def test_metrics_that_are_not_known_are_left_out() -> None:
    text = exposition(families({"site": "north", "children": {RUNNER: None}})).decode()
    assert "epsilon" not in text
    assert "gpu" not in text
    assert 'fedicom_site_up{site="north",process="runner"} 0' in text
    own = {**STATUS, "gpu_memory": {"used": 5, "total": 9}}
    assert 'fedicom_site_gpu_memory_used_bytes{site="north"} 5' in exposition(families(own)).decode()


def test_a_running_node_shows_its_metrics_on_loopback(house: House, node: Callable[..., Running]) -> None:
    port = free_port()
    house.configure(metrics_port=port)
    running_node = node()
    running_node.child(RUNNER)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    assert b'fedicom_site_up{site="north",process="runner"} 1' in connection.getresponse().read()
    connection.close()


def said(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [line for line, _ in changes(before, now)]


def test_each_change_is_one_line_and_nothing_is_said_twice() -> None:
    ready = {**STATUS, "state": "ready", "doing": "idle"}
    assert said({}, ready) == ["Ready; waiting for the coordinator"]
    assert said(ready, ready) == []
    assert said(ready, STATUS) == ["tiny, round 2 of 3: training"]
    after = {**ready, "updates": 2, "bytes_sent": 5_900_000, "last_visit_s": 7.0}
    assert said(STATUS, after) == ["tiny, round 2: update sent after 7 s, 0.9 MB, epsilon 2.00 of 8 spent"]
    anew = {**ready, "updates": 3, "recipe": None, "round": None}  # its count is that of the log
    assert said(after, anew) == []
    closing = {**STATUS, "doing": "evaluating", "round": 4}
    assert said(ready, closing) == ["tiny, closing evaluation: evaluating"]
    refusal = {"time": "1", "recipe_id": "b", "code": "recipe", "why": "not approved", "here": ""}
    assert said(ready, {**ready, "last_refusal": refusal}) == ["Refused: not approved"]
    assert said({**ready, "last_refusal": refusal}, {**ready, "last_refusal": {**refusal, "time": "2"}}) == []
    hidden = {**refusal, "why": "no cohort", "here": "labels.csv row 3"}
    assert said(ready, {**ready, "last_refusal": hidden}) == ["Refused: no cohort (labels.csv row 3)"]
    there, away = {**ready, "connected": True, "gateway": "g:1"}, {**ready, "connected": False, "gateway": "g:1"}
    assert said(ready, there) == ["Connected to g:1"]
    assert said(there, away) == ["No connection to g:1; trying until there is one"]
    assert said({}, {"connected": False, "gateway": "g:1"}) == []  # nobody has tried yet
    failed = {**ready, "state": "failed", "error": "the log is broken"}
    assert said(ready, failed) == ["The runner cannot work: the log is broken"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_connection_is_seen_while_it_is_open_and_only_to_that_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connected(os.getpid(), port) is False
        with socket.create_connection(("127.0.0.1", port)) as line:
            assert connected(os.getpid(), port) is True
            assert connected(os.getpid(), line.getsockname()[1]) is False  # its own end is no other port
        assert connected(os.getpid(), port) is False
    assert connected(2**22 + 1, port) is None


def test_a_home_of_nobody_has_no_node(tmp_path: Path) -> None:
    assert running(SiteHome(tmp_path)) is None
