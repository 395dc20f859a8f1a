"""A site's end of Flower: its SuperNode as a child process, and the loop that hands messages to the installed app.

Everything of Flower that is not public API is used here and in `server/link.py` alone; `tests/test_flower_contract.py`
fails when Flower changes it.

The SuperNode holds the connection for messages, and runs no app code. The runner takes each message from it over
loopback, and fetches and sends large weights itself (`client/blobs.py`). What Flower does when one of them dies, and
who mends it:

- The runner dies while it works: the SuperNode waits for its reply until the task's token expires, 60 s, and then sends
  an error. Did the runner die while it handed the reply over, the SuperNode waits for the missing pieces for ever. So
  whoever supervises both starts the SuperNode again whenever the runner ended.
- The SuperNode dies: the runner ends what it does, cannot deliver it, and goes on with the next one; the site has kept
  the reply, and the coordinator asks again. Flower refuses a SuperNode that comes back within 60 s (code 2004), because
  the SuperLink still counts the dead one as connected; `main` takes the dead one off first.
- The SuperLink or the gateway is away: the SuperNode tries for ever, with pauses of up to 20 s. The SuperLink counts a
  message as delivered when it begins to answer, and the coordinator's question is lost with an answer that breaks off.
  So a SuperNode that has nothing to do after a call failed connects anew: who does so is asked again.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

from client.blobs import Doorbell, Remote
from client.reach import proxy_of
from common import inline, wire
from common.bell import Bell
from common.deployment import SiteHome
from common.errors import ExchangeError
from common.storage import private_folder, write_whole
from common.supervise import Child

log = logging.getLogger(__name__)

T = TypeVar("T")

_HOST = "127.0.0.1"
_POLL_S = (0.05, 0.2)
_LONGEST_PAUSE_S = 5.0
_BEAT_S = 10.0
_STALLED_S = 900.0
"""Longest that a message may stand still on its way from the coordinator."""
_KINDS = (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE)
_BUNDLE_FILES = {"pyproject.toml", ".info/CONTENT"}
"""All that a bundle without code holds; the second is Flower's list of the first."""
_NODE_ID_FILE, _BELL_FILE, _REPLY_BELL_FILE = "node-id", "message.bell", "reply.bell"
_BELL_S, _REPLY_BELL_S = 2.0, 1.0
"""Between two looks for a message, or for the runner's reply, when no bell is heard."""
_HOME = "FEDICOM_SITE_HOME"
"""Of the SuperNode's environment: the site's folder."""

# The runner


def serve(
    app: ClientApp,
    home: SiteHome,
    port: int,
    *,
    on_state: Callable[[str], None],
    stop: threading.Event,
    refused: Callable[[str], object] = partial(log.warning, "message refused: %s"),
) -> None:
    """Takes messages from the SuperNode and has the installed app answer them, until `stop` is set.

    A bundle that a message comes with is neither unpacked nor imported; one with code, a message of another type and
    a run with configuration are refused, and run nothing. An error reply carries the error's type, never its text.

    Args:
        on_state: Told "waiting" (no SuperNode yet, or none any more), "ready" or "working", when it changes.
        refused: Told why a message was refused before the app saw it.

    Raises:
        StorageError: The secret that the SuperNode expects cannot be read.
    """
    _spare_loopback()
    tell = _on_change(on_state)
    bell, replied = Bell(home.supernode / _BELL_FILE), Bell(home.supernode / _REPLY_BELL_FILE)
    pause_s = _POLL_S[0]
    while not stop.is_set():
        try:
            with _executor(home, port) as executor:
                idle = time.monotonic()
                while not stop.is_set():
                    mark = bell.mark
                    got = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
                    pause_s = _POLL_S[0]
                    if not got.HasField("task"):
                        tell("ready")
                        longest_s = _BELL_S if bell.there else _pause_s(time.monotonic() - idle, *_POLL_S)
                        bell.wait(mark, longest_s, stop.wait)
                        continue
                    tell("working")
                    _work(app, port, got.token, refused, replied)
                    idle = time.monotonic()
        except (httpx.HTTPError, ObjectPullError, ObjectPushError, ExchangeError) as error:
            tell("waiting")
            log.info("the SuperNode is away (%s); trying again in %.1f s", type(error).__name__, pause_s)
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def objection(kind: str, run_config: Mapping[str, object], bundle: bytes) -> str | None:
    """Why a message is refused before the app sees it; None when it is not.

    Args:
        kind: Flower's message type.
        run_config: What the run would configure; ours configures nothing.
        bundle: The app bundle (FAB) that came with the run; its list of files is read, nothing is unpacked.
    """
    if kind not in _KINDS:
        return f"a message of type {kind[:40]!a}; this site answers {', '.join(_KINDS)}"
    if run_config:
        return f"a run with {len(run_config)} configuration values; what may be configured lies in the approved recipe"
    try:
        names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a run with a bundle that cannot be read"
    if extra := [name for name in names if name not in _BUNDLE_FILES]:
        return f"a run with code: its bundle holds {len(extra)} files beside pyproject.toml; code never travels"
    return None


def _work(app: ClientApp, port: int, token: str, refused: Callable[[str], object], replied: Bell) -> None:
    """Answers the message of one task.

    The output is pushed last, and only when the reply went out: a task that ended without a reply would let the
    SuperNode wait for one for ever, a task that merely falls silent is given up by it after 60 s.
    """
    key = RuntimeTokenHttpInterceptor(token)
    with _client(port, key, name="flwr-clientapp", retries=_Again()) as client, _beating(client):
        message, context, bundle = _pull(client)
        if why := objection(message.metadata.message_type, context.run_config, bundle):
            refused(why)
            error = Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=ExchangeError.__name__)
            reply = Message(error, reply_to=message)
        else:
            try:
                reply = app(message=message, context=context)
            except Exception as error:
                # Its text may quote data or paths: only the kind leaves, the rest stays in the local log.
                log.exception("the app failed")
                failed = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=type(error).__name__)
                reply = Message(failed, reply_to=message)
        _free(message)
        _push(client, reply, context)
        replied.ring()
        _free(reply)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))


def _pull(client: RuntimeHttpClient) -> tuple[Message, Context, bytes]:
    given = client.PullTaskInput(PullTaskInputRequest())
    context = context_from_proto(given.context)
    # Flower's Message takes run and sender from here.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, given.run.run_id, context.node_id
    end = time.monotonic() + _STALLED_S
    while not (found := client.PullMessages(inline.asking(PullAppMessagesRequest()))).messages_list:
        # The SuperNode makes the task before it has the message.
        if time.monotonic() > end:
            raise ExchangeError("a task without a message")
        time.sleep(_POLL_S[0])
    node, came = Node(node_id=context.node_id), inline.read(found)
    pull = _moving(make_pull_object_fn_protobuf(client.PullObject, node, context.run_id))
    message = pull_and_inflate_object_from_tree(
        found.message_object_trees[0],
        lambda key: came.get(key) or pull(key),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
        max_time=None,
        max_tries_per_object=None,
        initial_backoff=_POLL_S[0],
        backoff_cap=_POLL_S[1],
    )
    message.metadata.__dict__["_message_id"] = found.message_object_trees[0].object_id
    return message, context, given.fab.content


def _push(client: Any, reply: Message, context: Context) -> None:
    client.PushMessages = inline.pushing(client.PushMessages, inline.inside((reply,), get_all_nested_objects))
    push_message(client, reply, context)


def _moving(pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    last = time.monotonic()

    def pull_object(object_id: str) -> bytes:
        nonlocal last
        try:
            content = pull(object_id)
        except ObjectUnavailableError:
            if time.monotonic() - last > _STALLED_S:
                raise ObjectPullError(object_id, "it does not come") from None
            raise
        last = time.monotonic()
        return content

    return pull_object


def _free(message: Message) -> None:
    if message.has_content():
        wire.let_go(message.content)


@contextmanager
def _executor(home: SiteHome, port: int) -> Iterator[RuntimeHttpClient]:
    method = "/flwr.proto.Runtime/AcquireTask"
    key = SuperExecAuthHttpInterceptor(
        master_secret=home.superexec_secret.read_bytes(), protected_methods=frozenset({method})
    )
    with _client(port, key, name="SuperExec") as client:
        yield client


def _client(port: int, key: Any, *, name: str, retries: Any = None) -> RuntimeHttpClient:
    # Without Flower's retries: they end the whole process when a call is refused, and go on for ever when none answers.
    return RuntimeHttpClient.from_server_address(
        f"{_HOST}:{port}",
        insecure=True,  # plain HTTP on loopback, inside the site's own machine
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=name), key],
        retry_invoker=retries,
    )


class _Again:
    """Makes a call again when its connection broke: one that was idle while the app worked may have been closed."""

    def invoke(self, call: Callable[..., T], *words: Any, **named: Any) -> T:
        for pause_s in _POLL_S:
            try:
                return call(*words, **named)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                time.sleep(pause_s)
        return call(*words, **named)


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        # Not Flower's sender: that one interrupts the whole process when the task is gone.
        while not stop.wait(_BEAT_S):
            with suppress(httpx.HTTPError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    thread = threading.Thread(target=beat, name="task heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _on_change(on_state: Callable[[str], None]) -> Callable[[str], None]:
    last = ""

    def tell(state: str) -> None:
        nonlocal last
        if state != last:
            last = state
            on_state(state)

    return tell


def _spare_loopback() -> None:
    # A proxy of the environment is for the outside world; httpx, with which this process calls nobody but this machine,
    # would send those calls there as well.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


# The SuperNode


def supernode_child(home: SiteHome, port: int) -> Child:
    """The SuperNode as a child process: outbound to the gateway alone, one loopback port, no app code in it.

    Args:
        port: Loopback port between it and the runner.
    """
    folder, config = private_folder(home.supernode), home.config
    command = [
        *(sys.executable, "-m", "client.link"),
        *("--superlink", config.gateway, "--root-certificates", str(home.ca)),
        *("--auth-supernode-private-key", str(home.node_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(home.superexec_secret)),
        *("--host", _HOST, "--port", str(port)),
    ]
    environment = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment[_HOME] = str(home.path)
    # httpx, which the SuperNode calls with, has rules of its own about the environment, and looks at more of it than
    # ours do: messages would take another way than weights. Lower case goes before upper.
    if proxy := proxy_of(config, os.environ):
        told = {"https_proxy": proxy, "no_proxy": "", "all_proxy": ""}
    else:
        told = {"no_proxy": "*"}
    environment |= told | {name.upper(): value for name, value in told.items()}
    return Child(name="supernode", command=command, environment=environment, longest_pause_s=20.0)


def main() -> None:
    """Runs Flower's SuperNode in this process, with the options of `flower-supernode` and these habits changed.

    It asks often while there is work. It takes a dead predecessor off. It tries again when the other side is full or
    busy. Where it would lose a message or a reply, or live on without being able to do anything, it ends: its
    supervisor starts it again, and the coordinator asks a node again that connects anew.
    """
    loop: Any = importlib.import_module("flwr.supernode.start_client_internal")
    program: Any = importlib.import_module("flwr.supernode.cli.flower_supernode")
    retry: Any = importlib.import_module("flwr.supercore.retry.http_retry")
    # It sleeps 3 s between two looks for a message and 0.5 s between two looks for the runner's reply.
    home = SiteHome(Path(os.environ[_HOME]))
    loop.time = _Clock(Doorbell(Remote(home, threading.Event())), Bell(home.supernode / _REPLY_BELL_FILE))
    # It sleeps 1, 2, 4 ... s when the coordinator is still uploading a piece of the message it just announced.
    loop.pull_objects = partial(loop.pull_objects, initial_backoff=0.1, backoff_cap=1.0)
    # It gives up for good when a gateway has too many calls, or the coordinator's disk is full.
    retry._RETRYABLE_STATUS_CODES |= {408, 429, 500}
    inline.install(importlib.import_module("flwr.supernode.servicer.runtime.runtime_handlers"), once=False)
    fleet = importlib.import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    failed, given = _watch_pulls(fleet, Bell(home.unanswered_bell))
    loop._push_messages = _inlining(loop._push_messages, fleet)
    connect = partial(_connected, loop.http_request_response, home.supernode, failed, given)
    loop.http_request_response = contextmanager(connect)
    threading.excepthook = _end_with_thread
    code: object = 1
    try:
        program.flower_supernode()
    except SystemExit as end:
        code = end.code
    except BaseException:
        log.exception("the SuperNode failed")
    # Not sys.exit: its loopback server would keep a process alive that serves nobody.
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


class _Clock:
    """Stands for the module `time` in the SuperNode's loop."""

    def __init__(self, doorbell: Doorbell, replied: Bell) -> None:
        """
        Args:
            doorbell: The coordinator's, for a message.
            replied: The runner's, for its reply.
        """
        self._doorbell, self._idle, self._busy = doorbell, time.monotonic(), time.monotonic()
        self._replied, self._mark = replied, replied.mark

    def sleep(self, seconds: float) -> None:
        now = time.monotonic()
        if seconds < 1:  # it waits for the runner, whose work began when the loop was last idle
            self._idle = now
            if self._replied.there:
                self._replied.wait(self._mark, _REPLY_BELL_S)
            else:
                time.sleep(_pause_s(now - self._busy, 0.02, 0.1))
        else:
            pause_s = _pause_s(now - self._idle, 0.1, 3.0)
            if not self._doorbell.wait():
                time.sleep(min(seconds, pause_s))
            self._busy = time.monotonic()
        self._mark = self._replied.mark  # before the next look


def _pause_s(idle_s: float, shortest_s: float, longest_s: float) -> float:
    """A pause that costs at most a fiftieth of the time that nothing came."""
    return min(max(shortest_s, idle_s / 50), longest_s)


@dataclass
class _Given:
    """What came with the last message."""

    came: dict[str, bytes] = field(default_factory=dict)
    """Objects, by id."""
    whole: bool = False
    """All of them; the SuperLink has none of it left."""

    def pulled(self, pull: Callable[[int, str], bytes]) -> Callable[[int, str], bytes]:
        """Flower's call for an object, made where that did not come with its message."""
        return lambda run_id, key: self.came.get(key) or pull(run_id, key)

    def confirmed(self, confirm: Callable[[int, str], None]) -> Callable[[int, str], None]:
        """Flower's call when all objects are here, made where the SuperLink still keeps them."""
        return lambda run_id, key: None if self.whole else confirm(run_id, key)


def _watch_pulls(client: Any, unanswered: Bell) -> tuple[threading.Event, _Given]:
    """Has a client's class note, in what it gives, that a look for messages failed, and what came with a message.

    Args:
        unanswered: Rung at each that failed.
    """
    failed, given, pull = threading.Event(), _Given(), client.PullMessages

    def watched(self: Any, request: Any) -> Any:
        given.came, given.whole = {}, False
        try:
            answer = pull(self, inline.asking(request))
        except httpx.HTTPError:
            failed.set()
            unanswered.ring()
            raise
        given.came = inline.read(answer)
        given.whole = all(inline.whole(tree, given.came) for tree in answer.message_object_trees)
        return answer

    client.PullMessages = watched
    return failed, given


def _inlining(push: Callable[..., None], client: Any) -> Callable[..., None]:
    """Flower's `_push_messages`, with what it has in its store going with the message."""
    push_messages = client.PushMessages

    def pushing(*, object_store: Any, **others: Any) -> None:
        def push_whole(self: Any, request: Any) -> Any:
            inline.add(request, object_store.get)
            return push_messages(self, request)

        client.PushMessages = push_whole
        push(object_store=object_store, **others)

    return pushing


def _connected(
    connect: Callable[..., Any],
    folder: Path,
    failed: threading.Event,
    given: _Given,
    server_address: str,
    insecure: bool,
    root_certificates: bytes | str | None,
    authentication_keys: tuple[Any, Any],
    *others: Any,
) -> Iterator[Any]:
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    address = (server_address, insecure, root_certificates)
    file, bell = folder / _NODE_ID_FILE, Bell(folder / _BELL_FILE)
    keys: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(*authentication_keys),
    ]
    if file.exists() and file.read_text().isdecimal():
        # A predecessor that was killed still counts as connected for 60 s, and would keep this one out.
        with suppress(httpx.HTTPError), FleetHttpClient.from_server_address(*address, interceptors=keys) as fleet:
            fleet.DeactivateNode(DeactivateNodeRequest(node_id=int(file.read_text())))
    with connect(*address, authentication_keys, *others) as connection:
        node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
        write_whole(file, str(node_id).encode())
        again = ActivateNodeRequest(
            public_key=public_key_to_bytes(authentication_keys[1]), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )

        def connect_anew() -> None:
            log.info("a call failed, and a message may be lost with it: connecting anew")
            with FleetHttpClient.from_server_address(*address, interceptors=keys) as fleet:
                fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
                fleet.ActivateNode(again)

        yield (
            *(node_id, _receiving(receive, failed, _sure(connect_anew)), _sure(send), get_run, get_fab),
            *(given.pulled(_sure(pull_object, ExchangeError("the run has ended"))), _sure(push_object)),
            # All of the message is here, and the runner may be at work on it: Flower would send its answer in place
            # of the next message's, and that one with the message after it, or never.
            _then(bell.ring, given.confirmed(_sure(confirm, SystemExit(1)))),
        )


def _receiving(receive: Callable[[], T | None], failed: threading.Event, anew: Callable[[], None]) -> Callable[[], Any]:
    """Flower's look for a message, with `anew` called when there is none after looks that failed."""

    def look() -> T | None:
        found = receive()
        if found is None and failed.is_set():
            failed.clear()
            anew()
        return found

    return look


def _then(after: Callable[[], None], call: Callable[..., T]) -> Callable[..., T]:
    """A call that is followed by another one."""

    def both(*words: Any) -> T:
        result = call(*words)
        after()
        return result

    return both


def _sure(call: Callable[..., T], ended: BaseException | None = None) -> Callable[..., T]:
    """A call that ends this process where Flower would drop a message, or a reply, and tell nobody.

    Args:
        ended: Raised when the run ended meanwhile, in place of Flower's own exception: that one, on the way of a
            message, leaves a task behind for which no message comes, and the runner waiting for it. `SystemExit` where
            the runner has the message.
    """

    def sure(*words: Any) -> T:
        try:
            return call(*words)
        except RunNotRunningException:
            if ended is None:
                raise
            log.info("the run ended while a message of it was on its way")
            raise ended from None
        except ObjectUnavailableError:
            raise  # not yet
        except Exception as error:
            log.error("%s: connecting anew, so that the coordinator asks again", type(error).__name__)
            raise SystemExit(1) from None

    return sure


def _end_with_thread(failed: threading.ExceptHookArgs) -> None:
    # Without its heartbeat thread the SuperNode would count as away for ever, and not notice.
    threading.__excepthook__(failed)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
