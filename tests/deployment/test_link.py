"""Flower's real SuperLink and SuperNodes on loopback, with TLS and node keys, and our runner behind them.

The gateway is left out; everything else is as deployed. A toy node stands for the hospital.
"""

from __future__ import annotations

import base64
import os
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, ObjectUnavailableError
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient

from client.link import _connected, _Given, _pause_s, _receiving, _sure, objection, supernode_child
from common import wire
from common.config import Federation, Recipe
from common.deployment import FederationPlan, ServerHome, SiteHome
from common.errors import ExchangeError
from common.exchange import Question, Refusal, RoundPlan, Update
from common.identity import NodeKey, Signer
from common.registry import read_registry
from common.supervise import Child, Supervisor
from common.weights import Weights
from server import link
from server.app import FlowerTransport
from server.gateway_rules import flower_header
from server.link_layers import KEY_HEADER
from server.provision import provision, revoke
from simulations.rehearsal import edit

_LONG_S = 300.0
"""Nothing takes so long, on the busiest machine; what does has failed."""
SITES = ("east", "north")
RECIPE = Recipe(name="toy", federation=Federation(sites=2, quorum=2, timeout_s=_LONG_S, offline_s=_LONG_S))
QUESTION = Question(recipe_id=RECIPE.id)
DEAD_PROXY = "http://127.0.0.1:9"

# A module of its own, for it is another program. Files in its home tell it what to do, and it notes what it did.
TOY = """
import sys, threading, time
from pathlib import Path
import numpy as np
from client.app import client_app
from client.link import serve
from common.deployment import SiteHome
from common.exchange import Hello, Refusal, Update
from common.identity import Signer
from common.registry import read_registry
from common.weights import Weights

home, port = SiteHome(Path(sys.argv[1])), int(sys.argv[2])
name = home.config.site

def note(what):
    with (home.path / "notes").open("a") as out:
        out.write(what + "\\n")

class Toy:
    def hello(self, question):
        note("hello")
        return Hello(site=name, recipe_id=question.recipe_id, versions={}, patients={}, manifest="0" * 64)

    def visit(self, plan):
        note(f"visit {plan.round}")
        if (home.path / "raise").exists():
            raise ValueError("SECRET")
        while (home.path / "busy").exists():
            time.sleep(0.05)
        delta = Weights({key: np.full(shape, plan.round, np.float32) for key, shape in plan.weights.shapes.items()})
        if (home.path / "huge").exists():
            delta = Weights({"w": np.arange(5_000_000, dtype=np.float32)})
        return Update(site=name, recipe_id=plan.recipe_id, round=plan.round, base=plan.weights.digest, delta=delta,
                      weight=1.0, steps=1)

    def misunderstood(self, why):
        note("misunderstood: " + why)
        return Refusal(site=name, recipe_id="0" * 64, round=1, code="message", why=why)

signer = Signer.load_or_create(home.signing_key)
serve(
    client_app(lambda context: Toy(), coordinator=lambda: home.registry.coordinator, signer=signer), home, port,
    on_state=lambda state: note("state " + state), stop=threading.Event(), refused=lambda why: note("refused: " + why),
)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def eventually(true: Callable[[], Any], timeout_s: float = _LONG_S) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
    return found


@dataclass
class Running:
    """A federation of real processes."""

    server: ServerHome
    sites: dict[str, SiteHome]
    authority: Path
    port: int
    supervisor: Supervisor
    children: dict[str, Child] = field(default_factory=dict)

    def start(self, site: str) -> None:
        """A SuperNode and a runner; the SuperNode is started anew whenever the runner ended."""
        port, home = free_port(), self.sites[site]
        node = supernode_child(home, port)
        environment = {"HTTPS_PROXY": "", **node.environment}
        self.children[site] = Child(name=f"node-{site}", command=node.command, environment=environment)
        runner = [sys.executable, str(self.authority / "toy.py"), str(home.path), str(port)]
        self.supervisor.start(self.children[site])
        self.supervisor.start(Child(name=f"runner-{site}", command=runner, environment={"HTTP_PROXY": DEAD_PROXY}))

    def on_event(self, name: str, what: str) -> None:
        if name.startswith("runner-") and what.startswith("ended"):
            self.supervisor.start(self.children[name.removeprefix("runner-")])

    def pid(self, name: str) -> int:
        """The process of a child, which may just be ending by itself and come back."""
        return int(eventually(lambda: self.supervisor.children[name]))

    def kill(self, name: str) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid(name), signal.SIGKILL)

    def notes(self, site: str) -> list[str]:
        file = self.sites[site].path / "notes"
        return file.read_text().splitlines() if file.exists() else []

    def said(self, site: str, what: str) -> int:
        return self.notes(site).count(what)

    def keys(self) -> dict[str, str]:
        return {name: member.signing for name, member in self.server.registry.members.items()}

    def transport(self, grid, signer: Signer | None = None) -> FlowerTransport:
        return FlowerTransport(grid, signer=signer or Signer.load_or_create(self.server.signing_key), keys=self.keys)

    def online(self) -> set[str]:
        names = {member.node: name for name, member in self.server.registry.sites.items()}
        return {names[key] for key in link.online(self.server, self.port).values()}


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that knows CONNECT and nothing else."""

    allow_reuse_address = daemon_threads = True
    asked: list[str]
    loses = False
    """Break a connection off, in place of handing on what came back to a request."""
    lost = 0


class Tunnel(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode().split()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append(f"{method} {target}")
        host, port = target.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as there:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self.copy, args=(there, self.connection, True), daemon=True)
            back.start()
            self.copy(self.connection, there, False)

    def copy(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if back and self.server.loses:
                    self.server.lost += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), Tunnel) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def running(tmp_path_factory, proxy) -> Iterator[Running]:
    out, port = tmp_path_factory.mktemp("federation") / "kits", free_port()
    provision(FederationPlan(name="toy", host="127.0.0.1", port=port, sites=(*SITES, "west")), out)
    sites = {site: SiteHome(out / site) for site in (*SITES, "west")}
    edit(sites["north"].path / "site.yaml", proxy=f"http://127.0.0.1:{proxy.server_address[1]}")
    (out / "authority" / "toy.py").write_text(TOY)
    patch = pytest.MonkeyPatch()
    patch.setenv("FLWR_HOME", str(out / "flwr"))
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name in ("NO_PROXY", "no_proxy"):
        patch.setenv(name, "localhost")
    patch.setenv("HTTPS_PROXY", DEAD_PROXY)  # the coordinator's own calls stay on this machine all the same
    events: list[Callable[[str, str], None]] = []
    supervisor = Supervisor(out / "logs", lambda name, what: [event(name, what) for event in events])
    made = Running(ServerHome(out / "coordinator"), sites, out / "authority", port, supervisor)
    events.append(made.on_event)
    try:
        supervisor.start(link.superlink_child(made.server, port))
        link.wait_until_up(made.server, port, _LONG_S)
        assert link.register_nodes(made.server, port, made.server.registry) == ("east", "north", "west")
        for site in SITES:
            made.start(site)
        yield made
    finally:
        supervisor.stop_all()
        patch.undo()


@pytest.fixture
def grid(running) -> Iterator[Any]:
    with link.open_grid(running.server, running.port, name="test") as grid:
        yield grid


def plan(round_: int) -> RoundPlan:
    weights = Weights({"w": np.arange(3_000_000, dtype=np.float32)})  # 12 MB: Flower sends it in three pieces
    return RoundPlan(recipe_id=RECIPE.id, round=round_, work="train", weights=weights)


def is_update(reply: object, round_: int) -> bool:
    return isinstance(reply, Update) and reply.round == round_ and reply.delta["w"][-1] == round_


def ask_while_busy(running: Running, transport: FlowerTransport, site: str, round_: int) -> Future[Any]:
    """A round that is under way: the site works on it until its file `busy` goes."""
    (running.sites[site].path / "busy").touch()
    before = running.said(site, f"visit {round_}")
    pool = ThreadPoolExecutor(1)
    asking = pool.submit(lambda: sorted(transport.ask(plan(round_), SITES, _LONG_S), key=lambda reply: reply.site))
    pool.shutdown(wait=False)
    eventually(lambda: running.said(site, f"visit {round_}") > before)
    return asking


def finish(running: Running, site: str, asking: Future[Any], round_: int) -> None:
    (running.sites[site].path / "busy").unlink()
    assert all(is_update(reply, round_) for reply in asking.result(_LONG_S))


def test_two_sites_say_hello_and_two_rounds_go_through_over_tls_one_of_them_through_a_proxy(running, grid, proxy):
    transport = running.transport(grid)
    with pytest.MonkeyPatch.context() as patch:
        for call in ("PushObject", "PullObject", "ConfirmMessageReceived"):  # the objects of a small message go with it
            patch.setattr(RuntimeHttpClient, call, None)
        assert sorted(transport.hello(RECIPE, "")) == list(SITES)
    assert running.online() == set(SITES)
    for round_ in (1, 2):
        replies = sorted(transport.ask(plan(round_), SITES, _LONG_S), key=lambda reply: reply.site)
        assert [reply.site for reply in replies] == list(SITES)
        assert all(is_update(reply, round_) for reply in replies)
    for site in SITES:
        assert [note for note in running.notes(site) if not note.startswith("state")] == ["hello", "visit 1", "visit 2"]
    assert set(proxy.asked) == {f"CONNECT 127.0.0.1:{running.port}"}


def test_no_secret_stands_in_a_command_line(running):
    for child in (link.superlink_child(running.server, running.port), *running.children.values()):
        home = running.server if child.name == "superlink" else running.sites[child.name.removeprefix("node-")]
        words = " ".join([*child.command, *child.environment.values()])
        for secret in home.keys.iterdir():
            text = secret.read_bytes()
            assert text.hex() not in words
            assert text.decode(errors="replace").strip() not in words


@pytest.mark.parametrize("key", [None, b"", b"0" * 64, "the secret itself"])
def test_a_user_of_the_coordinators_machine_without_its_key_can_neither_list_nor_start_nor_stop(running, grid, key):
    if key == "the secret itself":
        key = running.server.superexec_secret.read_bytes().hex().encode()
    headers = {} if key is None else {KEY_HEADER: key}
    tls = ssl.create_default_context(cafile=str(running.server.ca))
    with httpx.Client(base_url=f"https://127.0.0.1:{running.port}", verify=tls, headers=headers) as stranger:
        paths = [
            f"/v1/control/{name}" for name in ("list-runs", "start-run", "stop-run", "list-nodes", "unregister-node")
        ]
        for path in (
            *paths,
            "/v1/runtime/get-nodes",
            "/v1/runtime/acquire-task",
            "/health",
            "/docs",
            "/openapi.json",
            "/",
        ):
            for method in ("GET", "POST"):
                answer = stranger.request(method, path, content=b"")
                assert (answer.status_code, answer.content) == (403, b"")
        for path in ("//v1/control/list-runs", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs"):
            assert stranger.post(path, content=b"").status_code in (403, 404)
    assert running.online() == set(SITES)  # who has the key may


def test_who_may_connect_is_what_the_registry_says_and_a_revoked_node_is_shut_out_at_its_next_call(running):
    server, port, logs = running.server, running.port, running.authority.parent / "logs"
    assert link.register_nodes(server, port, server.registry) == ()
    running.start("west")
    eventually(lambda: "west" in running.online())
    revoke(running.authority, "west", "test")
    newer = read_registry(running.authority / "registry.json", server.authority)
    try:
        assert link.register_nodes(server, port, newer) == ("west",)
        assert link.register_nodes(server, port, newer) == ()
        eventually(lambda: '/v1/fleet/pull-messages HTTP/1.1" 401' in (logs / "superlink.log").read_text())
        running.kill("node-west")
        eventually(lambda: "[code: 2004]" in (logs / "node-west.log").read_text())  # it came back, and was not let in
        assert running.online() == set(SITES)
    finally:
        running.supervisor.stop("node-west")
        running.supervisor.stop("runner-west")


@pytest.mark.parametrize(("off_s", "status"), [(0, 200), (240, 200), (-240, 200), (330, 401), (-330, 401)])
def test_the_superlink_takes_a_clock_that_is_five_minutes_ahead_as_one_that_is_behind(running, off_s, status):
    """As the gateway, the logs and `fedicom site preflight` do; Flower itself would take five seconds ahead."""
    home = running.sites["north"]
    wanted = NodeKey.load(home.node_key)
    (node,) = (node for node, key in link.online(running.server, running.port).items() if key == wanted.public)
    at = (datetime.now(UTC) + timedelta(seconds=off_s)).isoformat()
    headers = {
        "flwr-public-key": flower_header(wanted.public),
        "flwr-timestamp": at,
        "flwr-signature": base64.b64encode(bytes.fromhex(wanted.sign(at.encode()))).decode(),
        "content-type": "application/protobuf",
    }
    beat = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0).SerializeToString()
    with httpx.Client(verify=ssl.create_default_context(cafile=str(home.ca))) as client:
        url = f"https://127.0.0.1:{running.port}/v1/fleet/send-node-heartbeat"
        assert client.post(url, headers=headers, content=beat).status_code == status


def send(
    running: Running, grid: Any, kind: str, value: Question | RoundPlan, signer: Signer | None = None
) -> list[Message]:
    """What both sites answer to one message."""
    record = wire.encode(value, signer or Signer.load_or_create(running.server.signing_key))
    names = set(grid.push_messages([Message(record, node, kind, ttl=_LONG_S) for node in grid.get_node_ids()]))
    assert len(names) == len(SITES)
    replies: list[Message] = []

    def all_there() -> bool:
        replies.extend(grid.pull_messages(names - {reply.metadata.reply_to_message_id for reply in replies}))
        return len(replies) == len(names)

    eventually(all_there)
    return replies


@pytest.mark.parametrize("kind", ["query.hello", "train.other", "evaluate.x", "system"])
def test_a_message_of_another_type_is_refused_and_runs_nothing(running, grid, kind):
    before = {site: len(running.notes(site)) for site in SITES}
    for reply in send(running, grid, kind, QUESTION):
        assert (reply.error.code, reply.error.reason) == (6, "ExchangeError")
    for site in SITES:
        new = [note for note in running.notes(site)[before[site] :] if not note.startswith("state")]
        assert new == [f"refused: a message of type '{kind}'; this site answers query, train, evaluate"]


def test_a_message_that_another_key_signed_is_refused_by_the_app(running, grid):
    before = {site: running.said(site, "hello") for site in SITES}
    for reply in send(running, grid, "query", QUESTION, Signer.temporary()):
        assert wire.decode(reply.content, Refusal).why.startswith("the message is not signed by key")
    assert {site: running.said(site, "hello") for site in SITES} == before


@pytest.mark.parametrize("what", ["code", "configuration"])
def test_a_run_that_brings_code_or_configuration_is_refused_and_runs_nothing(running, monkeypatch, tmp_path, what):
    touched = tmp_path / "touched"
    evil = f"import pathlib\npathlib.Path({str(touched)!r}).touch()\n".encode()
    build = link.build_fab_from_files
    if what == "code":
        monkeypatch.setattr(link, "build_fab_from_files", lambda files: build({**files, "none.py": evil}))
    else:
        monkeypatch.setattr(link, "_BUNDLE", link._BUNDLE + b"\n[tool.flwr.app.config]\nepsilon = 100.0\n")
    before = {site: len(running.notes(site)) for site in SITES}
    with link.open_grid(running.server, running.port, name="evil") as grid:
        for reply in send(running, grid, "query", QUESTION):
            assert (reply.error.code, reply.error.reason) == (6, "ExchangeError")
    for site in SITES:
        (note,) = [note for note in running.notes(site)[before[site] :] if not note.startswith("state")]
        assert note.startswith("refused: a run with")
        assert what.removesuffix("uration") in note
    assert not touched.exists()


def test_an_error_at_a_site_carries_its_type_and_nothing_else(running, grid):
    for site in SITES:
        (running.sites[site].path / "raise").touch()
    try:
        replies = send(running, grid, "train", plan(3))
    finally:
        for site in SITES:
            (running.sites[site].path / "raise").unlink()
    assert [(reply.error.code, reply.error.reason) for reply in replies] == [(2, "ValueError")] * 2


def test_a_reply_far_larger_than_the_plan_is_not_taken_into_memory(running, grid):
    (running.sites["north"].path / "huge").touch()
    small = replace(plan(7), weights=Weights({"w": np.zeros(5, np.float32)}))
    try:
        replies = send(running, grid, "train", small)
    finally:
        (running.sites["north"].path / "huge").unlink()
    (bad,) = (reply.error for reply in replies if reply.has_error())
    (good,) = (wire.decode(reply.content, Update) for reply in replies if reply.has_content())
    assert (bad.code, bad.reason) == (3, "ExchangeError")
    assert good.site == "east"


def test_a_runner_that_is_killed_while_it_works_is_asked_again(running, grid):
    transport = running.transport(grid)
    transport.hello(RECIPE, "")
    asking = ask_while_busy(running, transport, "east", 4)
    running.kill("runner-east")
    finish(running, "east", asking, 4)
    assert running.said("east", "visit 4") == 2


def test_a_supernode_that_is_killed_while_its_site_works_is_back_and_asked_again(running, grid):
    transport = running.transport(grid)
    transport.hello(RECIPE, "")
    asking = ask_while_busy(running, transport, "north", 5)
    running.kill("node-north")
    finish(running, "north", asking, 5)
    assert running.said("north", "visit 5") == 2


def test_a_superlink_that_is_killed_is_back_and_the_round_goes_on_without_a_second_visit(running, grid):
    transport = running.transport(grid)
    transport.hello(RECIPE, "")
    asking = ask_while_busy(running, transport, "east", 6)
    before = running.pid("superlink")
    running.kill("superlink")
    eventually(lambda: running.supervisor.children["superlink"] not in (None, before))
    link.wait_until_up(running.server, running.port, _LONG_S)
    finish(running, "east", asking, 6)
    assert running.said("east", "visit 6") == 1


def test_a_question_that_is_lost_on_its_way_to_a_site_is_asked_again(running, grid, proxy):
    transport = running.transport(grid)
    transport.hello(RECIPE, "")
    node = running.pid("node-north")
    os.kill(node, signal.SIGSTOP)
    time.sleep(0.5)  # a look that was on its way is answered: there is nothing
    try:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(lambda: list(transport.ask(plan(8), SITES, _LONG_S)))
            eventually(lambda: running.said("east", "visit 8"))  # so north's question is out as well
            proxy.loses, lost = True, proxy.lost
            os.kill(node, signal.SIGCONT)
            eventually(lambda: proxy.lost > lost)
            proxy.loses = False
            assert all(is_update(reply, 8) for reply in asking.result(_LONG_S))
    finally:
        proxy.loses = False
        with suppress(ProcessLookupError):  # it may have ended, to connect anew
            os.kill(node, signal.SIGCONT)
    assert running.said("north", "visit 8") == 1


def test_a_run_that_begins_again_frees_the_sites_that_wait_for_the_rest_of_a_killed_ones_message(running, monkeypatch):
    killed = link.open_grid(running.server, running.port, name="killed")
    with monkeypatch.context() as patch:
        patch.setattr("common.inline.MOST_BYTES", 0)
        patch.setattr("flwr.superlink.grid.http_grid.push_objects", lambda *words, **named: None)
        grid = killed.__enter__()
        nodes = list(grid.get_node_ids())
        record = wire.encode(QUESTION, Signer.load_or_create(running.server.signing_key))
        grid.push_messages([Message(record, node, "query", ttl=_LONG_S) for node in nodes])
    logs = [running.authority.parent / "logs" / f"node-{site}.log" for site in SITES]
    eventually(lambda: all(log.read_text().count("Receiving") > log.read_text().count("Sending") for log in logs))
    try:
        with link.open_grid(running.server, running.port, name="killed") as grid:
            assert sorted(running.transport(grid).hello(RECIPE, "")) == list(SITES)
    finally:
        killed.__exit__(None, None, None)


def test_what_a_killed_coordinator_left_behind_is_stopped_and_in_nobodys_way(running):
    server, port = running.server, running.port
    with link._control(server, port) as control:
        content, _ = link.build_fab_from_files({"pyproject.toml": link._BUNDLE})
        bundle = link.fab_to_proto(link.Fab(link.hashlib.sha256(content).hexdigest(), content, {}))
        control.StartRun(StartRunRequest(fab=bundle))  # killed before it took its task
        # killed with its task; ends the other
        link._begin(server, control, f"127.0.0.1:{port}", link._certificate(server), "killed")
    with link.open_grid(server, port, name="next") as grid:
        assert sorted(running.transport(grid).hello(RECIPE, "")) == list(SITES)
    assert link.stop_runs(server, port) == 1
    assert link.stop_runs(server, port) == 0


def test_a_coordinator_without_a_superlink_says_so(running):
    with pytest.raises(ExchangeError, match=r"did not answer within 0\.2 s \(ConnectError\)"):
        link.wait_until_up(running.server, free_port(), 0.2)


def test_what_a_supernode_would_lose_without_a_word_ends_it_for_one_that_connects_anew_is_asked_again():
    def failing(error: BaseException) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    with pytest.raises(SystemExit):
        _sure(failing(ObjectPushError("a", 1, "b")))()
    with pytest.raises(ObjectUnavailableError):  # it is still on its way
        _sure(failing(ObjectUnavailableError("a")))()
    with pytest.raises(RunNotRunningException):
        _sure(failing(RunNotRunningException()))()
    with pytest.raises(ExchangeError, match="the run has ended"):
        _sure(failing(RunNotRunningException()), ExchangeError("the run has ended"))()
    with pytest.raises(SystemExit):
        _sure(failing(RunNotRunningException()), SystemExit(1))()
    assert _sure(lambda word: word * 2)("a") == "aa"


def test_a_supernode_connects_anew_after_a_look_that_failed_once_there_is_no_message():
    failed, found, anew = threading.Event(), ["message", None, None], list[int]()
    look = _receiving(lambda: found.pop(0), failed, lambda: anew.append(1))
    failed.set()
    assert (look(), anew) == ("message", [])  # that one is answered first
    assert (look(), look(), anew) == (None, None, [1])


def test_a_run_that_ends_under_a_message_ends_the_supernode_only_once_the_runner_may_have_it(tmp_path):
    def over(*_: object) -> None:
        raise RunNotRunningException

    @contextmanager
    def connection(*_: object) -> Iterator[tuple[object, ...]]:
        yield (7, over, over, over, over, over, over, over)

    key = ec.generate_private_key(ec.SECP384R1())
    given = ("127.0.0.1:1", True, None, (key, key.public_key()))
    with contextmanager(_connected)(connection, tmp_path, threading.Event(), _Given(), *given) as calls:
        *_, pull_object, push_object, confirm = calls
        with pytest.raises(ExchangeError):  # Flower drops message and task, and so does the runner
            pull_object(1, "a")
        with pytest.raises(SystemExit):  # what the runner answers would go out in place of the next answer
            confirm(1, "a")
        with pytest.raises(RunNotRunningException):
            push_object(1, "a", "b", b"")


@pytest.mark.parametrize(("idle_s", "pause_s"), [(0, 0.1), (5, 0.1), (50, 1.0), (150, 3.0), (1e6, 3.0)])
def test_an_idle_supernode_asks_less_and_less_often(idle_s, pause_s):
    assert _pause_s(idle_s, 0.1, 3.0) == pytest.approx(pause_s)


def test_a_bundle_is_read_and_never_unpacked():
    thin, _ = link.build_fab_from_files({"pyproject.toml": link._BUNDLE})
    assert objection("train", {}, thin) is None
    assert "cannot be read" in str(objection("train", {}, b"no archive"))
    assert "cannot be read" in str(objection("train", {}, thin[:100]))
    assert "configuration" in str(objection("train", {"a": 1}, thin))
    assert "\x1b" not in str(objection("\x1b[2J" * 50, {}, thin))
