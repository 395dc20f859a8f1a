"""Flower's Grid without a network: the deployed ClientApp is called in this process, or in worker processes.

Workers get and give bytes over pipes; nothing is pickled. A site always lives in the same
worker, so its ledger and log have one owner.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
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
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = uuid4().hex
        for message, reply in self._answers(asked):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answers(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Message]]:
        if not self._workers:
            for message in messages:
                yield message, self._local(message)
                self._tell(message)
            return

        def serve(worker: Worker) -> list[tuple[Message, Message]]:
            mine = [m for m in messages if self._worker(m) is worker]
            answers = []
            for message in mine:
                answers.append((message, worker.ask(message, self._sites[message.metadata.dst_node_id])))
                self._tell(message)
            return answers

        with ThreadPoolExecutor(len(self._workers)) as pool:
            for answers in pool.map(serve, self._workers):
                yield from answers

    def _worker(self, message: Message) -> Worker:
        return self._workers[(message.metadata.dst_node_id - _FIRST_NODE) % len(self._workers)]

    def _local(self, message: Message) -> Message:
        assert self._app is not None
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as the real runtimes: an error reply, never a raise
            return Message(Error(code=_CLIENT_FAILED, reason=type(error).__name__), reply_to=message)

    def _tell(self, message: Message) -> None:
        if self._done is not None:
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

    def ask(self, message: Message, site: str) -> Message:
        """The worker's answer, or an error message when its process died."""
        try:
            pipe = self._ready()
            pipe.send_bytes(f"{message.metadata.message_type}\n{site}".encode())
            pipe.send_bytes(wire.to_bytes(message.content))
            answer = pipe.recv_bytes()
        except (EOFError, OSError):
            self.stop()
            return Message(Error(code=_CLIENT_FAILED, reason="worker process died"), reply_to=message)
        if not answer:
            return Message(Error(code=_CLIENT_FAILED, reason="the site failed"), reply_to=message)
        return Message(wire.from_bytes(answer), reply_to=message)

    def stop(self) -> None:
        """Ends the process; safe to call twice."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(timeout=5)
            if self._process.is_alive():
                self._process.terminate()
        self._pipe = self._process = None

    def _ready(self) -> Connection[Any, Any]:
        if self._pipe is None or self._process is None or not self._process.is_alive():
            self.stop()
            spawn = multiprocessing.get_context("spawn")
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs, self._make_app, self._settings), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe


def _serve(pipe: Connection[Any, Any], make_app: Callable[[str], ClientApp], settings: str) -> None:
    become_node(1)
    app = make_app(settings)
    parent = os.getppid()
    contexts: dict[str, Context] = {}
    while os.getppid() == parent:
        try:
            kind, site = pipe.recv_bytes().decode().split("\n", 1)
            content = wire.from_bytes(pipe.recv_bytes())
        except EOFError:
            return
        node = contexts.setdefault(site, context(site, _FIRST_NODE))
        try:
            reply = app(Message(content, _FIRST_NODE, kind), node)
            pipe.send_bytes(wire.to_bytes(reply.content))
        except Exception:  # the grid turns an empty answer into an error reply
            pipe.send_bytes(b"")


def context(site: str, node: int) -> Context:
    """The Flower context of a simulated node; `node_config` names the site."""
    return Context(run_id=1, node_id=node, node_config={"site": site}, state=RecordDict(), run_config={})


def become_node(node: int) -> None:
    """Says who this process is in Flower's eyes; `Message(...)` reads it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, node
