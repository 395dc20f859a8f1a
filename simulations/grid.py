"""Flower's Grid without a network: the deployed ClientApp is called in this process, or in worker processes.

Workers get and give bytes over pipes; no message is pickled. A site always lives in the same
worker, so its ledger and log have one owner.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

log = logging.getLogger(__name__)

_FIRST_NODE = 1000
_CLIENT_FAILED = 2
"""Flower's own error code for a ClientApp that raised."""

Progress = Callable[[str], None]


class InProcessGrid(Grid):
    """Sites one after another in this process, or side by side in workers."""

    def __init__(
        self,
        sites: Sequence[str],
        app: ClientApp | None,
        *,
        workers: Sequence[Worker] = (),
        done: Progress | None = None,
    ) -> None:
        """Gives every site a node id.

        Args:
            app: Called in this process; None when there are workers.
            workers: Each takes every n-th site.
            done: Told the site's name after each of its answers.
        """
        self._sites = {_FIRST_NODE + number: site for number, site in enumerate(sites)}
        self._app, self._workers, self._done = app, list(workers), done
        self._run = Run.create_empty(run_id=1)
        self._contexts = {node: context(site, node) for node, site in self._sites.items()}
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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Has all sites answer, and returns when they have.

        A message's `ttl` is the time that its site gets, for sites of one worker wait for each other; a worker that
        takes longer is ended. Without workers nothing can end a site.
        """
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = uuid4().hex
        for message, reply in self._answers(asked):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The answers of all sites; the time for each is its message's `ttl`."""
        return self.pull_messages(self.push_messages(messages))

    def _answers(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Message]]:
        if not self._workers:
            for message in messages:
                yield message, self._local(message)
                self._tell(message)
            return

        def serve(worker: Worker) -> list[tuple[Message, Message]]:
            answers = []
            for message in messages:
                if self._worker(message) is worker:
                    site = self._sites[message.metadata.dst_node_id]
                    answers.append((message, worker.ask(message, site, message.metadata.ttl)))
                    self._tell(message)
            return answers

        with ThreadPoolExecutor(len(self._workers)) as pool:
            try:
                for answers in pool.map(serve, self._workers):
                    yield from answers
            except BaseException:  # Ctrl-C: the pool waits for its threads, and they for the workers
                for worker in self._workers:
                    worker.stop(for_good=True)
                raise

    def _worker(self, message: Message) -> Worker:
        return self._workers[(message.metadata.dst_node_id - _FIRST_NODE) % len(self._workers)]

    def _local(self, message: Message) -> Message:
        assert self._app is not None
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as the real runtimes: an error reply, never a raise
            log.exception("a site failed")
            return Message(Error(code=_CLIENT_FAILED, reason=type(error).__name__), reply_to=message)

    def _tell(self, message: Message) -> None:
        if self._done is not None:
            with self._telling:
                self._done(self._sites[message.metadata.dst_node_id])


class Worker:
    """A process that runs the ClientApp of some sites; started again when it died."""

    def __init__(self, make_app: Callable[[str], ClientApp], settings: str) -> None:
        """Keeps what a process needs; the process starts with the first question.

        Args:
            make_app: A module-level function, called once in the worker with `settings`.
            settings: Text, so that nothing but a text crosses into the new process.
        """
        self._make_app, self._settings = make_app, settings
        self._process: SpawnProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._ended = False

    def ask(self, message: Message, site: str, timeout_s: float | None = None) -> Message:
        """The worker's answer, or an error message when its process died or took too long."""
        try:
            pipe = self._ready()
            pipe.send_bytes(f"{message.metadata.message_type}\n{site}".encode())
            pipe.send_bytes(wire.to_bytes(message.content))
            if not pipe.poll(timeout_s):
                self.stop()
                return _failed(message, f"no answer within {timeout_s:g} s")
            answer = pipe.recv_bytes()
        except (EOFError, OSError):
            self.stop()
            return _failed(message, "worker process died")
        return Message(wire.from_bytes(answer), reply_to=message) if answer else _failed(message, "the site failed")

    def stop(self, *, for_good: bool = False) -> None:
        """Kills the process, which all that a site does must survive anyway; safe to call twice and from any thread.

        Args:
            for_good: No later question starts another process.
        """
        self._ended = self._ended or for_good
        process, pipe = self._process, self._pipe
        self._pipe = self._process = None
        if process is not None:
            process.kill()
            process.join()
        if pipe is not None:
            pipe.close()

    def _ready(self) -> Connection[Any, Any]:
        if self._ended:
            raise OSError("the simulation was stopped")
        if self._pipe is None or self._process is None or not self._process.is_alive():
            self.stop()
            spawn = multiprocessing.get_context("spawn")
            pipe, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, self._make_app, self._settings), daemon=True)
            # Ctrl-C reaches every process of the terminal. The worker inherits this mask: its parent ends it.
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


def _serve(pipe: Connection[Any, Any], make_app: Callable[[str], ClientApp], settings: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    become_node(1)
    app = make_app(settings)
    contexts: dict[str, Context] = {}
    while True:
        try:
            kind, site = pipe.recv_bytes().decode().split("\n", 1)
            content = wire.from_bytes(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        node = contexts.setdefault(site, context(site, _FIRST_NODE))
        try:
            answer = wire.to_bytes(app(Message(content, _FIRST_NODE, kind), node).content)
        except Exception:
            log.exception("site %s failed", site)
            answer = b""  # the grid turns it into an error reply
        with suppress(OSError):  # nobody listens any more; the next read ends the loop
            pipe.send_bytes(answer)


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
