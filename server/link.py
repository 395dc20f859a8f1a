"""The coordinator's end of Flower: its SuperLink as a child process, who may connect, and one run at a time on it.

Flower's SuperLink lets everybody who reaches it list, start and stop runs, and shut nodes out: on loopback, every user
of the machine. Ours answers such calls to those alone who hold a key; `main` runs it.

Everything of Flower that is not public API is used here and in `client/link.py` alone; `tests/test_flower_contract.py`
fails when Flower changes it.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from common import inline
from common.bell import Bell
from common.blobs import PIECE_BYTES
from common.chain import TOLERANCE_S
from common.deployment import ServerHome
from common.errors import ExchangeError, FedicomError, StorageError
from common.registry import Registry
from common.storage import full, locked, private_folder, write_whole
from common.supervise import Child
from server.link_layers import Key, Layer, Locked, key_of, seldom

log = logging.getLogger(__name__)

T = TypeVar("T")

_HOST = "127.0.0.1"
_PATIENCE_S = 90.0
"""How long a call waits for a SuperLink that is being started again; a run's token dies after 60 s without a sign."""
_BEAT_S = 10.0
_TASK_S = 30.0
_LOOK_S = 0.5
"""Between two looks for replies when no bell is heard."""
_MAX_OBJECTS = 100_000
_SPARE_BYTES = 16 << 20
_PUSHES = 3
_KEY_OPTION = "--superexec-auth-secret-file"

# What Flower wants to see of an app. There is no code in it, and nobody looks for the two names: each side runs what
# it has installed.
_BUNDLE = b"""[project]
name = "fedicom"
version = "1.0.0"
description = "No code: each side runs what it has installed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedicom"

[tool.flwr.app.components]
serverapp = "none:none"
clientapp = "none:none"
"""


def superlink_child(home: ServerHome, port: int) -> Child:
    """The SuperLink as a child process: loopback only, TLS, registered nodes only, no app code in it."""
    folder = private_folder(home.superlink)
    command = [
        *(sys.executable, "-m", "server.link"),
        *("--host", _HOST, "--port", str(port)),
        *("--ssl-certfile", str(home.superlink_certificate), "--ssl-keyfile", str(home.superlink_key)),
        *("--ssl-ca-certfile", str(home.ca)),
        *("--isolation", "process", _KEY_OPTION, str(home.superexec_secret)),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--database", str(folder / "state.db")),
    ]
    environment = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return Child(name="superlink", command=command, environment=environment, longest_pause_s=5.0)


def wait_until_up(home: ServerHome, port: int, timeout_s: float) -> None:
    """Returns when the SuperLink answers.

    Raises:
        ExchangeError: It does not within `timeout_s`.
    """
    with _control(home, port) as control:
        _Patient(timeout_s).invoke(lambda: control.ListNodes(ListNodesRequest()))


def register_nodes(home: ServerHome, port: int, registry: Registry) -> tuple[str, ...]:
    """Lets exactly the members of the registry connect; call it again when the registry changed.

    A node that is no member any more is refused at its next call.

    Returns:
        What changed: names of sites that were added, and of nodes that were shut out.

    Raises:
        ExchangeError: The SuperLink does not answer or will not.
    """
    members = {member.node: name for name, member in registry.members.items()}
    changed = []
    with _control(home, port) as control:
        call = _Patient(_PATIENCE_S).invoke
        known: dict[str, NodeInfo] = {}
        for node in _registered(call(lambda: control.ListNodes(ListNodesRequest())).nodes_info):
            known[_openssh(node.public_key)] = node
        for key in sorted(set(known) - set(members)):
            call(control.UnregisterNode, UnregisterNodeRequest(node_id=known[key].node_id))
            changed.append(known[key].name or key[-12:])
        for key in sorted(set(members) - set(known), key=members.__getitem__):
            request = RegisterNodeRequest(public_key=_pem(key), name=members[key])
            try:
                call(control.RegisterNode, request)
            except ExchangeError as error:
                # Flower keeps the keys of nodes that it shut out, and takes none of them again.
                log.error("node key of site %s was not accepted, give it a new one: %s", members[key], error)
                continue
            changed.append(members[key])
    return tuple(changed)


def online(home: ServerHome, port: int) -> Mapping[int, str]:
    """Nodes that are connected: node id -> OpenSSH public key, as in `registry.Member.node`.

    Raises:
        ExchangeError: The SuperLink does not answer.
    """
    with _control(home, port) as control:
        nodes = _Patient(1.0).invoke(lambda: control.ListNodes(ListNodesRequest())).nodes_info
        return {node.node_id: _openssh(node.public_key) for node in nodes if node.status == NodeStatus.ONLINE}


def stop_runs(home: ServerHome, port: int) -> int:
    """Ends what crashed processes left behind and frees its storage; call it before the first run of a process begins.

    Returns:
        How many runs were ended.

    Raises:
        ExchangeError: The SuperLink does not answer.
    """
    stopped = 0
    with _control(home, port) as control:
        call = _Patient(_PATIENCE_S).invoke
        for run_id, run in call(control.ListRuns, ListRunsRequest(limit=1000)).run_dict.items():
            if run.status.status != Status.FINISHED:
                with suppress(ExchangeError):  # it ended by itself meanwhile
                    call(control.StopRun, StopRunRequest(run_id=run_id))
                    stopped += 1
    return stopped


@contextmanager
def open_grid(home: ServerHome, port: int, *, name: str) -> Iterator[Grid]:
    """A Grid on a run of its own; the run ends with the block, so that none stays behind.

    Args:
        name: Of the run. One that a killed process began under this name is ended first: sites that wait for the rest
            of its messages would do so until Flower gives it up, 60 s later.

    Raises:
        ExchangeError: The SuperLink does not answer. Inside the block every call of the Grid raises it when the
            SuperLink was away for too long: Flower fails a run whose process it did not hear for 60 s, and only a new
            run goes on from there.
        StorageError: The SuperLink's disk is full; inside the block as well.
    """
    address, certificate = f"{_HOST}:{port}", _certificate(home)
    with _control(home, port) as control:
        token, run_id = _begin(home, control, address, certificate, name)
        grid = _RunGrid(home, address, certificate, token)
        client = grid.client
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(client, stop), name="run heartbeat", daemon=True)
        status, details = SubStatus.FAILED, f"{name}: ended early"
        try:
            given = client.PullTaskInput(PullTaskInputRequest())
            # Flower's Message takes run and sender from here.
            TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run_id
            TaskIdentity.node_id = given.context.node_id
            grid.set_run(run_from_proto(given.run))
            beat.start()
            yield grid
            status, details = SubStatus.COMPLETED, name
        except BaseException as error:
            details = f"{name}: {type(error).__name__}"
            raise
        finally:
            stop.set()
            grid.patience.for_s = 2.0
            with suppress(ExchangeError):  # it is gone: Flower fails the run by itself
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
                # This frees the messages of a finished run. The connection was idle for long, and may be closed.
                grid.patience.invoke(control.ListRuns, ListRunsRequest(run_id=run_id))
            if beat.is_alive():
                beat.join(timeout=5.0)
            grid.close()


class _RunGrid(HttpGrid):
    """Flower's Grid, except that no call ends this process, and that a reply is taken as it arrives.

    Flower's own `pull_messages` sleeps inside one call, for a second and then longer, until the last piece of a reply
    is there: one slow or dead site would hold up all others, for up to two hours.
    """

    def __init__(self, home: ServerHome, address: str, certificate: bytes, token: str) -> None:
        super().__init__(address, False, certificate, token=token)
        self._sent, self._answered, self._mark = Bell(home.sent_bell), Bell(home.answered_bell), ""
        self.patience, self._key, self._disk = _Patient(_PATIENCE_S, home.superlink), Key(home), home.superlink
        self._retry_invoker = self.patience  # type: ignore[assignment]  # Flower calls nothing but `invoke`
        self._arriving: dict[str, _Arriving] = {}
        self._forgotten: set[str] = set()
        self._largest = 0
        """Bytes of the largest message sent and what travels beside it: no honest reply has more than twice that."""

    def _connect(self) -> None:
        super()._connect()
        assert self._client is not None
        self._client._interceptors = (*self._client._interceptors, self._key)

    @property
    def client(self) -> RuntimeHttpClient:
        return self._runtime_client

    def presence(self) -> Mapping[int, tuple[str, str]]:
        """Connected nodes: the site whose key it is, and a mark.

        The mark changes whenever a node connects anew, and with that has forgotten what it was asked.
        """
        return {node.node_id: (node.name, node.last_activated_at) for node in self.get_nodes()}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's own."""
        sent = list(messages)
        arrays = [
            array for message in sent[:1] for part in message.content.array_records.values() for array in part.values()
        ]
        records = [message.content.config_records for message in sent[:1]]
        beside = sum(_number(found["message"].get("bytes")) for found in records if "message" in found)
        self._largest = max(self._largest, sum(len(array.data) for array in arrays) + beside)
        client: Any = self.client
        client.PushMessages = inline.pushing(
            partial(RuntimeHttpClient.PushMessages, client), inline.inside(sent, get_all_nested_objects)
        )
        for _ in range(_PUSHES):
            # A SuperLink that was killed may have kept a piece and not said so, and then refuses it: what is pushed
            # again has the same ids, and only what is missing goes out.
            with suppress(ObjectPushError):
                ids = super().push_messages(sent)
                self._sent.ring()
                return ids
        raise _LinkError(f"the SuperLink took a message in none of {_PUSHES} attempts; see its log")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are here as a whole; call again for those that are still on their way.

        A node sends one reply after the other: of two that are here by half, the older one is refused.
        """
        self._mark = self._answered.mark
        coming = {reply.asked for reply in self._arriving.values()}
        if wanted := sorted({*message_ids, *self._forgotten} - coming):
            found = self.client.PullMessages(inline.asking(PullAppMessagesRequest(message_ids=wanted)))
            came_along = inline.read(found)
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                key, data = head.metadata.message_id, head.metadata
                objects = [part.object_id for part in iterate_object_tree(tree)]
                at_hand = {part: came_along[part] for part in objects if part in came_along}
                self._arriving[key] = _Arriving(data.reply_to_message_id, data.src_node_id, objects, at_hand)
        came: list[Message] = []
        half: dict[int, str] = {}
        for key, reply in list(self._arriving.items()):
            if reply.asked in self._forgotten:
                self._forgotten.discard(reply.asked)
                self._refused(key, "late")
            elif (message := self._taken(key)) is not None:
                came.append(message)
            else:
                if (older := half.get(reply.node)) is not None:
                    came.append(self._refused(older, "half a reply"))
                half[reply.node] = key
        return came

    def forget(self, message_ids: Iterable[str]) -> None:
        """What answers these is thrown away when it comes: nobody else would free the SuperLink of it."""
        self._forgotten |= set(message_ids)

    def wait(self, pause_s: float) -> None:
        """Returns when a site may have answered since the last `pull_messages`, or after a while.

        Args:
            pause_s: The while, where the gateway does not tell.

        Raises:
            StorageError: Nothing that a site sends finds room: each would send it again and again, and none would tell.
        """
        if full(self._disk, PIECE_BYTES):
            raise StorageError("answers find no room: the disk is full; free space on it and run again")
        if self._answered.there:
            self._answered.wait(self._mark, max(pause_s, _LOOK_S))
        else:
            time.sleep(pause_s)

    def _taken(self, key: str) -> Message | None:
        reply, run_id = self._arriving[key], self.run.run_id
        pull = make_pull_object_fn_protobuf(self.client.PullObject, self.node, run_id)
        try:
            if len(reply.objects) > _MAX_OBJECTS:
                raise ExchangeError(f"a reply in {len(reply.objects)} pieces")
            for part in reply.objects[len(reply.contents) :]:
                reply.contents[part] = reply.at_hand.get(part) or pull(part)
                reply.size += len(reply.contents[part])
                if reply.size > 2 * self._largest + _SPARE_BYTES:
                    raise ExchangeError(f"a reply of more than {reply.size} bytes to a plan of {self._largest}")
            message = inflate_object_from_contents(key, reply.contents)
            if not isinstance(message, Message):
                raise ExchangeError("a reply that is no message")
            message.metadata.__dict__["_message_id"] = key
        except ObjectUnavailableError:
            return None
        except _LinkError:
            raise
        except Exception as error:  # what a site sends must not stop the coordinator, whatever it is
            return self._refused(key, type(error).__name__)
        self._free(key)
        return message

    def _refused(self, key: str, why: str) -> Message:
        asked = self._arriving[key].asked
        self._free(key)
        return _unavailable(self.run.run_id, self.node.node_id, asked, why)

    def _free(self, key: str) -> None:
        """Ends a reply, here and at the SuperLink, which would keep what it has of it until the run ends."""
        reply = self._arriving[key]
        if set(reply.objects) - reply.at_hand.keys():  # of one that came whole the SuperLink has nothing left
            self.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=key)
            )
        del self._arriving[key]


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


@dataclass
class _Arriving:
    asked: str
    """Id of the message that this one answers."""
    node: int
    objects: list[str]
    at_hand: dict[str, bytes]
    """Those that came with the message."""
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0


class _LinkError(ExchangeError):
    """The SuperLink does not answer, or will not."""


class _Patient:
    """Tries a call again while the SuperLink is away.

    Flower's own ends the whole process when a call is refused, and tries for ever when nobody answers.
    """

    def __init__(self, for_s: float, folder: Path | None = None) -> None:
        """
        Args:
            folder: Of the SuperLink's database: when its disk is full there is nothing to wait for.
        """
        self.for_s, self._folder = for_s, folder

    def invoke(self, target: Callable[..., T], *args: Any, **named: Any) -> T:
        end, pause_s = time.monotonic() + self.for_s, 0.1
        while True:
            try:
                return target(*args, **named)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (500, 502, 503, 504):
                    raise _LinkError(f"the SuperLink refused a call: {_said(error.response)}") from None
                why = f"HTTP status {error.response.status_code}"
                if self._folder is not None and full(self._folder):
                    raise StorageError(
                        "the SuperLink could keep nothing more: its disk is full; free space on it and run again"
                    ) from None
            except httpx.TransportError as error:
                why = type(error).__name__
            if time.monotonic() >= end:
                raise _LinkError(
                    f"the SuperLink did not answer within {self.for_s:g} s ({why}); see its log, and go on with "
                    "`fedicom server resume` when it runs"
                )
            time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
            pause_s = min(2 * pause_s, 2.0)


def _said(response: httpx.Response) -> str:
    if response.status_code == 401:
        return "not authenticated: the run has ended, as it does after 60 s without a sign of life; start it again"
    error = FlowerError.from_json(response.text)
    return f"{error.message} (code {error.code})" if error is not None else f"HTTP status {response.status_code}"


@contextmanager
def _control(home: ServerHome, port: int) -> Iterator[ControlHttpClient]:
    with ControlHttpClient.from_server_address(
        f"{_HOST}:{port}", insecure=False, root_certificates=_certificate(home), interceptors=[Key(home)]
    ) as client:
        yield client


def _certificate(home: ServerHome) -> bytes:
    # A proxy of the environment is for the outside world, and a coordinator calls nobody there; httpx would send the
    # calls to this machine to it as well.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    return home.ca.read_bytes()


def _begin(
    home: ServerHome, control: ControlHttpClient, address: str, certificate: bytes, name: str
) -> tuple[str, int]:
    """Starts a run and takes its task: (token, run id)."""
    begun = private_folder(home.superlink / "begun") / name
    earlier = begun.read_text() if begun.exists() else ""
    content, _ = build_fab_from_files({"pyproject.toml": _BUNDLE})
    bundle = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    call, method = _Patient(_PATIENCE_S).invoke, "/flwr.proto.Runtime/AcquireTask"
    if earlier.isdecimal():
        with suppress(ExchangeError):  # it has ended
            call(control.StopRun, StopRunRequest(run_id=int(earlier)))
    with (
        locked(private_folder(home.superlink)),  # two runs that begin together would take each other's task
        RuntimeHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=certificate,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=home.superexec_secret.read_bytes(), protected_methods=frozenset({method})
                ),
                Key(home),
            ],
        ) as executor,
    ):
        run_id = call(control.StartRun, StartRunRequest(fab=bundle)).run_id
        if not run_id:
            raise _LinkError("the SuperLink started no run; see its log")
        write_whole(begun, str(run_id).encode())
        end = time.monotonic() + _TASK_S
        while time.monotonic() < end:
            got = call(executor.AcquireTask, AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if not got.HasField("task"):
                time.sleep(0.1)
            elif got.task.run_id == run_id:
                return got.token, run_id
            else:  # of a process that died between start and taking
                with suppress(ExchangeError):
                    call(control.StopRun, StopRunRequest(run_id=got.task.run_id))
    raise _LinkError(f"the SuperLink gave no task for a run within {_TASK_S:g} s; see its log")


def _beat(client: RuntimeHttpClient, stop: threading.Event) -> None:
    # Not Flower's sender: that one interrupts the whole process when the run is gone.
    while not stop.is_set():
        with suppress(FedicomError, httpx.HTTPError):
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        stop.wait(_BEAT_S)


def _unavailable(run_id: int, node: int, asked: str, why: str) -> Message:
    """The error that Flower's own Grid makes of a reply that cannot be read."""
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=node,
        dst_node_id=node,
        reply_to_message_id=asked,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    return make_message(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=why))


def _registered(nodes: Iterable[NodeInfo]) -> list[NodeInfo]:
    return [node for node in nodes if node.status != NodeStatus.UNREGISTERED]


def _pem(openssh: str) -> bytes:
    return load_ssh_public_key(openssh.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _openssh(pem: bytes) -> str:
    return load_pem_public_key(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


# Who may call the SuperLink


def main() -> None:
    """Runs Flower's SuperLink in this process, with the options of `flower-superlink`, behind its key.

    There each call passes nine layers, and writes to the database what has expired. Here it passes the layers of its
    own API, what has expired is looked for once a second, and small objects go with their message. A node's clock may
    be ahead by as much as behind.
    """
    extensions: Any = importlib.import_module("flwr.superlink.extensions")
    program: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    layers: Any = importlib.import_module("flwr.superlink.main")
    state: Any = importlib.import_module("flwr.supercore.corestate.sql_corestate").SqlCoreState
    middleware: Any = importlib.import_module("starlette.middleware").Middleware
    clocks: Any = importlib.import_module("flwr.superlink.routers.fleet.node_auth")
    # As wrong as gateway, logs and preflight let a clock be; Flower itself takes 5 s ahead, and 305 s behind.
    clocks.SYSTEM_TIME_TOLERANCE, clocks.TIMESTAMP_TOLERANCE = TOLERANCE_S, 5.0
    key = key_of(Path(sys.argv[sys.argv.index(_KEY_OPTION) + 1]))
    extensions.get_middleware = lambda: (middleware(Locked, key=key),)  # the outermost: nothing is read before it
    stack = layers._get_middleware
    layers._get_middleware = lambda: [middleware(Layer, part=part) for part in stack()]
    for api in ("fleet.fleet_handlers", "runtime.runtime_handlers"):
        inline.install(importlib.import_module(f"flwr.superlink.servicer.{api}"), once=True)
    state._cleanup_expired_task_tokens = seldom(state._cleanup_expired_task_tokens)
    program.flower_superlink()


if __name__ == "__main__":
    main()
