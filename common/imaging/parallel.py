"""Work on many files in processes that can be killed: a file that stalls or kills its worker loses only itself."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_GRACE_S = 3.0
"""How long beyond its limit a worker may stay silent before it is killed."""
_START_S = 120.0
"""A worker imports this project before it can answer; on a busy machine that takes a while."""
_SEND_S = 0.2
"""A worker that has finished items tells so at least this often."""

Loss = Literal["stalled", "crashed"]


@dataclass(frozen=True)
class Lost:
    """What comes back for an item whose worker did not survive it."""

    how: Loss


class OutOfTime(BaseException):
    """Raised inside the work when an item has had its time; no `except Exception` of a parser swallows it."""


_expected: dict[str, None] = {}


def expect(module: str) -> None:
    """Has a module imported once, in the server that workers are forked from, and not once in every worker.

    The server starts with the first workers of this process and never imports anything after that.
    """
    _expected.setdefault(module)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts Python code with `OutOfTime`; main thread only."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def series_limit_s(files: int, held_bytes: int) -> float:
    """Seconds that reading a series may take before its worker is given up; one file may hold a whole series."""
    return 120.0 + 5.0 * max(files, held_bytes / 2**20)


def spread(
    work: Callable[[T], R],
    items: Sequence[Any],
    *,
    load: Callable[[Any], T] | None = None,
    jobs: int,
    limit_s: Callable[[T], float] | float,
    at_once: int = 1,
    memory_bytes: int | None = None,
) -> Iterator[tuple[int, R | Lost]]:
    """Does the work on every item, in `jobs` processes, in no particular order.

    A worker that crashes, or is silent for longer than the limit of an item, is replaced; the item it was at comes
    back as `Lost`, and all others are done. Nothing is started before the first result is asked for, and closing
    the iterator ends the workers.

    Args:
        work: Importable by name. It is interrupted by `OutOfTime` at the limit, and killed when that does not help.
        items: What can be sent between processes.
        load: Makes of an item what is sent in its place, when it is handed out: all together would fill the memory.
        jobs: Number of processes.
        limit_s: Seconds that an item may take, or what says so for each one.
        at_once: Items handed over together; more for small ones.
        memory_bytes: What a worker may allocate beyond what it starts with; None: no limit.

    Yields:
        (place in `items`, result).
    """
    crew = _Crew(work, items, load, limit_s, at_once, memory_bytes)
    try:
        yield from crew.run(min(jobs, len(items)))
    finally:
        crew.end()


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    places: deque[int] = field(default_factory=deque)
    """What it has been handed and has not answered yet, in order."""
    limit_s: float = 0.0
    """Of the one of `places` that may take longest."""
    ready: bool = False
    heard: float = field(default_factory=time.monotonic)


@dataclass
class _Crew(Generic[T, R]):
    work: Callable[[T], R]
    items: Sequence[Any]
    load: Callable[[Any], T] | None
    limit_s: Callable[[T], float] | float
    at_once: int
    memory_bytes: int | None
    workers: list[_Worker] = field(default_factory=list)
    alone: deque[int] = field(default_factory=deque)
    """What a lost worker left behind: handed out one by one, so that the next loss has one culprit."""
    given: int = 0

    def run(self, jobs: int) -> Iterator[tuple[int, R | Lost]]:
        context = get_context("forkserver")
        _expected.setdefault(self.work.__module__)
        context.set_forkserver_preload([__name__, *_expected])
        for _ in range(jobs):
            self._hire(context)
        while any(worker.places for worker in self.workers):
            for pipe in wait([worker.pipe for worker in self.workers], timeout=0.1):
                worker = next(worker for worker in self.workers if worker.pipe is pipe)
                try:
                    results = worker.pipe.recv()
                except (EOFError, OSError):
                    yield from self._replace(context, worker, "crashed")
                    continue
                worker.ready, worker.heard = True, time.monotonic()
                for result in results:
                    yield worker.places.popleft(), result
                if not worker.places:
                    self._hand(worker)
            for worker in tuple(self.workers):
                if worker.places and time.monotonic() - worker.heard > self._patience_s(worker):
                    yield from self._replace(context, worker, "stalled")

    def _patience_s(self, worker: _Worker) -> float:
        if not worker.ready:
            return _START_S
        # it tells what is finished before it begins anything when it has been silent for `_SEND_S`
        return worker.limit_s + _SEND_S + _GRACE_S

    def _hire(self, context: ForkServerContext) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.work, self.limit_s, self.memory_bytes), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        self._hand(worker)

    def _hand(self, worker: _Worker) -> None:
        if self.alone:
            places = [self.alone.popleft()]
        else:
            places = list(range(self.given, min(self.given + self.at_once, len(self.items))))
            self.given += len(places)
        if not places:
            return
        items: list[T] = [self.items[place] if self.load is None else self.load(self.items[place]) for place in places]
        worker.places.extend(places)
        worker.limit_s = max(_seconds(self.limit_s, item) for item in items)
        worker.heard = time.monotonic()
        with suppress(OSError):  # it has died: the next wait tells
            worker.pipe.send(items)

    def _replace(self, context: ForkServerContext, worker: _Worker, how: Loss) -> Iterator[tuple[int, Lost]]:
        left = list(worker.places)
        self.workers.remove(worker)
        _kill(worker)
        if not worker.ready:  # no file can be the reason
            raise RuntimeError("the processes that read files did not start")
        if len(left) == 1:
            yield left[0], Lost(how)
        else:
            self.alone.extend(left)
        if self.alone or self.given < len(self.items):
            self._hire(context)

    def end(self) -> None:
        for worker in self.workers:
            _kill(worker)


def _seconds(limit_s: Callable[[T], float] | float, item: T) -> float:
    return limit_s(item) if callable(limit_s) else limit_s


def _kill(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()
    worker.process.close()


def _serve(
    pipe: Connection,
    work: Callable[[Any], Any],
    limit_s: Callable[[Any], float] | float,
    memory_bytes: int | None,
) -> None:
    """The life of a worker: takes lists of items, sends lists of results, ends when the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if memory_bytes is not None:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_bytes, most))
    with suppress(EOFError, OSError):
        pipe.send([])
        while True:
            done: list[Any] = []
            sent = time.monotonic()
            for item in pipe.recv():
                if time.monotonic() - sent > _SEND_S:
                    pipe.send(done)
                    done, sent = [], time.monotonic()
                try:
                    with time_limit(_seconds(limit_s, item)):
                        result: Any = work(item)
                except OutOfTime:
                    result = Lost("stalled")
                except Exception:  # a traceback would show paths and values
                    result = Lost("crashed")
                done.append(result)
            pipe.send(done)
