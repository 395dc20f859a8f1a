"""Flower's Grid without a network: the deployed ClientApp is called in this process, or in worker processes.

In this process a message is handed over as it is. Workers get and give bytes over pipes; no message is pickled, and one
for many sites goes to a worker once. A site always lives in the same worker, so its ledger and log have one owner.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common import wire
from common.compute import may_fork
from common.exchange import RoundPlan, Update
from common.imports import call
from common.weights import Weights

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from simulations.abreast import Abreast

log = logging.getLogger(__name__)

_FIRST_NODE = 1000
_CLIENT_FAILED = 2
"""Flower's own error code for a ClientApp that raised."""

_WHERE = "; simulation.log in the folder of the run says why"
_STOP_S = 0.2

_MOST_BYTES = 1 << 30
"""That are read at once."""
_SERVE = "simulations.grid:_serve"
_NO_MESSAGE = b"\n0\n", memoryview(b"")

Progress = Callable[[str], None]


class InProcessGrid(Grid):
    """Sites one after another in this process, or side by side in workers.

    Nothing is serialised in this process. With `ahead=2` one visit's bookkeeping (hashes, logs on disk) goes on while
    the next site trains.
    """

    def __init__(
        self,
        sites: Sequence[str],
        app: ClientApp | None,
        *,
        workers: Sequence[Worker] = (),
        done: Progress | None = None,
        ahead: int = 1,
        abreast: Abreast | None = None,
    ) -> None:
        """Gives every site a node id.

        Args:
            app: Called in this process; None when there are workers.
            workers: Each takes every n-th site.
            done: Told the site's name after each of its answers.
            ahead: Visits under way at once in this process, each in a thread of its own. Above 1 only where sites that
                share a model take turns with it (`client.site.Site`'s `turn`): else they train on each other's weights.
            abreast: What trains sites together; told who begins a visit and who ends one. Then as many are under way.
        """
        self._ahead, self._abreast = abreast.width if abreast is not None else ahead, abreast
        self._sites = {_FIRST_NODE + number: site for number, site in enumerate(sites)}
        self._app, self._workers, self._done = app, list(workers), done
        self._run = Run.create_empty(run_id=1)
        self._contexts: dict[int, Context] = {}
        self._letters: list[queue.SimpleQueue[Message | None]] = []
        """One box for each worker, or one for all sites."""
        self._threads: list[threading.Thread] = []
        self._answers: queue.SimpleQueue[tuple[str, Message | BaseException]] = queue.SimpleQueue()
        self._under_way: set[str] = set()
        self._replies: dict[str, Message] = {}
        self._telling = threading.Lock()
        become_node(1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._sites)

    def presence(self) -> Mapping[int, tuple[str, str]]:
        """Every node, its site and a mark that never changes, as `server.link` tells it; a failure then has a name."""
        return {node: (site, "") for node, site in self._sites.items()}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Has the sites begin.

        A message's `ttl` is the time that its site gets, for sites of one worker wait for each other; a worker that
        takes longer is ended. Without workers nothing can end a site.
        """
        self._begin()
        ids, messages = [], list(messages)
        if self._abreast is not None:
            self._abreast.expect([self._sites[message.metadata.dst_node_id] for message in messages])
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            ids.append(message.metadata.message_id)
            self._under_way.add(message.metadata.message_id)
            box = (message.metadata.dst_node_id - _FIRST_NODE) % len(self._letters)
            self._letters[box].put(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Waits until one of these is answered at least, and gives what there is."""
        wanted = set(message_ids)
        found = [self._replies.pop(key) for key in wanted & self._replies.keys()]
        try:
            while (not found and not wanted.isdisjoint(self._under_way)) or not self._answers.empty():
                key, reply = self._answers.get()
                self._under_way.discard(key)
                if isinstance(reply, BaseException):
                    raise reply
                if key in wanted:
                    found.append(reply)
                else:
                    self._replies[key] = reply
        except BaseException:  # a signal reaches this thread alone
            self.close()
            raise
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The answers of all sites; the time for each is its message's `ttl`."""
        ids = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(ids):
            replies += self.pull_messages(ids)
        return replies

    def _begin(self) -> None:
        if self._threads:
            return
        if self._workers:
            self._letters = [queue.SimpleQueue() for _ in self._workers]
            answers: list[Callable[[Message], Message]] = [partial(self._asked, worker) for worker in self._workers]
        else:
            self._letters = [queue.SimpleQueue()]
            answers = [self._local] * self._ahead
        for number, answer in enumerate(answers):
            box = self._letters[number % len(self._letters)]
            # A daemon: at the end of the process it waits for a letter, and nobody waits for it.
            self._threads.append(threading.Thread(target=self._serve, args=(box, answer), daemon=True))
        for thread in self._threads:
            thread.start()

    def _serve(self, box: queue.SimpleQueue[Message | None], answer: Callable[[Message], Message]) -> None:
        with suppress(_StoppedError):
            while (message := box.get()) is not None:
                self._answers.put((message.metadata.message_id, self._ended(message, answer)))
                del message  # while it waits for the next letter, it holds no model

    def _ended(self, message: Message, answer: Callable[[Message], Message]) -> Message | BaseException:
        """The answer, or what ends the whole run (Ctrl-C): raised again where the answer is waited for."""
        site = self._sites[message.metadata.dst_node_id]
        try:
            reply = answer(message)
            if self._done is not None:
                with self._telling:
                    self._done(site)
        except _StoppedError:
            raise
        except BaseException as end:
            return end
        finally:
            if self._abreast is not None:
                self._abreast.left(site)
        return reply

    def close(self) -> None:
        """Stops what is under way, and returns when nothing is any more; safe to call twice."""
        for worker in self._workers:
            worker.stop(for_good=True)
        for box in self._letters:
            with suppress(queue.Empty):
                while True:
                    box.get_nowait()
            for _ in self._threads:
                box.put(None)
        for thread in self._threads:
            thread.join(_STOP_S)
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            for thread in alive:  # all of them: one may wait for what another holds
                # Training looks at no flag: this exception is raised there between two of its operations.
                stopped = ctypes.py_object(_StoppedError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), stopped)
            for thread in alive:
                thread.join(_STOP_S)
        self._threads = []

    def _asked(self, worker: Worker, message: Message) -> Message:
        return worker.ask(message, self._sites[message.metadata.dst_node_id], message.metadata.ttl)

    def _local(self, message: Message) -> Message:
        assert self._app is not None
        node = message.metadata.dst_node_id
        try:
            return self._app(message, self._contexts.setdefault(node, context(self._sites[node], node)))
        except Exception as error:  # as the real runtimes: an error reply, never a raise
            log.exception("a site failed")
            return _failed(message, f"{type(error).__name__}{_WHERE}")


class _StoppedError(BaseException):
    """Raised inside a site's visit when the simulation ends before it; no `except Exception` takes it for a failure."""


class Worker:
    """A process that runs the ClientApp of some sites; started again when it died."""

    def __init__(self, make_app: Callable[[str], ClientApp], settings: str, *, fork: bool = False) -> None:
        """Keeps what a process needs; it starts with `begin`, or with the first question.

        Args:
            make_app: A module-level function, called once in the worker with `settings`.
            settings: Text, so that nothing else has to cross into a new process.
            fork: `begin` forks this process, where it may: the worker then imports nothing again, and shares the memory
                of all that was imported.
        """
        self._fork = fork
        self._make_app, self._settings = f"{make_app.__module__}:{make_app.__qualname__}", settings
        self._process: BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._told: RecordDict | None = None
        """The last message that the process was given."""
        self._ended = False

    def begin(self) -> None:
        """Starts the process now, and waits for nothing; else the first question does."""
        with suppress(OSError):  # the first question will meet it again
            self._ready(fork=self._fork and may_fork())

    def ask(self, message: Message, site: str, timeout_s: float | None = None) -> Message:
        """The worker's answer, or an error message when its process died or took too long."""
        try:
            pipe = self._ready()
            known, self._told = message.content is self._told, message.content
            pipe.send_bytes("\n".join((message.metadata.message_type, site, "as before" * known)).encode())
            if not known:
                _give(pipe, *_parts(message.content))
            if not pipe.poll(timeout_s):
                self.stop()
                return _failed(message, f"no answer within {timeout_s:g} s")
            answer = _take(pipe)
        except (EOFError, OSError):
            self.stop()
            return _failed(message, "worker process died")
        return _failed(message, f"the site failed{_WHERE}") if answer is None else Message(answer, reply_to=message)

    def stop(self, *, for_good: bool = False) -> None:
        """Kills the process, which all that a site does must survive anyway; safe to call twice and from any thread.

        Args:
            for_good: No later question starts another process.
        """
        self._ended = self._ended or for_good
        process, pipe = self._process, self._pipe
        self._pipe = self._process = self._told = None
        if process is not None:
            process.kill()
            process.join()
        if pipe is not None:
            pipe.close()

    def _ready(self, *, fork: bool = False) -> Connection[Any, Any]:
        if self._ended:
            raise OSError("the simulation was stopped")
        if self._pipe is None or self._process is None or not self._process.is_alive():
            self.stop()
            new = multiprocessing.get_context("fork") if fork else multiprocessing.get_context("spawn")
            pipe, theirs = new.Pipe()
            process = new.Process(target=call, args=(_SERVE, theirs, self._make_app, self._settings), daemon=True)
            # Ctrl-C reaches every process of the terminal. The worker inherits this mask: its parent ends it.
            if not fork:
                resource_tracker.ensure_running()  # by itself it would start under the mask, and lift it
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._pipe, self._process = pipe, process
            return pipe
        return self._pipe


def _failed(message: Message, why: str) -> Message:
    return Message(Error(code=_CLIENT_FAILED, reason=why), reply_to=message)


def _serve(pipe: Connection[Any, Any], make_app: str, settings: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    become_node(1)
    app = call(make_app, settings)
    contexts: dict[str, Context] = {}
    content = None
    while True:
        try:
            kind, site, known = pipe.recv_bytes().decode().split("\n")
            if not known:
                if content is not None:
                    wire.let_go(content)  # before there is room for the next one
                content = _take(pipe)
        except (EOFError, OSError):
            return
        assert content is not None
        node = contexts.setdefault(site, context(site, _FIRST_NODE))
        try:
            answer = app(Message(content, _FIRST_NODE, kind), node).content
            head, data = _parts(answer)
            wire.let_go(answer)
        except Exception:
            log.exception("site %s failed", site)
            head, data = _NO_MESSAGE  # the grid turns it into an error reply
        with suppress(OSError):  # nobody listens any more; the next read ends the loop
            _give(pipe, head, data)
        del data


def _parts(message: RecordDict) -> tuple[bytes, memoryview]:
    """A message of this program, its head with the digest of its weights."""
    value = wire.decode_any(message)
    weights = _weights(value)
    head, data = wire.to_parts(value)
    digest = weights.digest if weights is not None else ""
    return b"\n".join((digest.encode(), str(len(data)).encode(), head)), data


def _give(pipe: Connection[Any, Any], head: bytes, data: memoryview) -> None:
    pipe.send_bytes(head)
    with socket.socket(fileno=os.dup(pipe.fileno())) as line:
        line.sendall(data)


def _take(pipe: Connection[Any, Any]) -> RecordDict | None:
    """What `_give` gave, None for no message.

    Numbers that one process of the program has hashed are not hashed in the other one again.
    The connection's own way reads a model in hundreds of parts, asks for room for the rest of it at each, and copies
    it twice.
    """
    digest, told, head = pipe.recv_bytes().split(b"\n", 2)
    size, parts = int(told), []
    with socket.socket(fileno=os.dup(pipe.fileno())) as line:
        while size:
            parts.append(line.recv(min(size, _MOST_BYTES), socket.MSG_WAITALL))
            if not parts[-1]:
                raise EOFError
            size -= len(parts[-1])
    if not head:
        return None
    record = wire.from_parts(head, parts[0] if len(parts) == 1 else b"".join(parts))
    value = wire.decode_any(record)
    wire.let_go(record)
    weights = _weights(value)
    if weights is not None:
        weights.digest_is(digest.decode())
    return wire.hand(value)


def _weights(value: object) -> Weights | None:
    return value.weights if isinstance(value, RoundPlan) else value.delta if isinstance(value, Update) else None


def _end_with_parent() -> None:
    """An orphan that went on training would write to the same ledgers and logs as the run that is resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def context(site: str, node: int) -> Context:
    """The Flower context of a simulated node; `node_config` names the site."""
    return Context(run_id=1, node_id=node, node_config={"site": site}, state=RecordDict(), run_config={})


def become_node(node: int) -> None:
    """Says who this process is in Flower's eyes; `Message(...)` reads it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, node
