"""A process beside this one in which files are taken apart that could harm it: it may be killed, this one may not.

Decoders are C code that has never seen the end of the damage a file can have: they crash, hang and ask for gigabytes.
So compressed pixels and long headers are read in a second process, under a limit of CPU time and of memory that follows
from the size of the file. It stays alive from file to file; what comes back is JSON and raw bytes, never an object.
The second process forks a third that does the work, so that what crashed is replaced in milliseconds, and so that
a decoder that met damage never touches another file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from common.errors import DataError
from common.imaging.refusal import Refusal, RefusalCode

CPU_S = 2.0
"""A small file may take so long; larger ones in proportion, see `Limits`."""
FRAMES_S, FRAMES_BYTES = 60.0, 2**30
"""What a file says of its frames may take so much beside, however many they are."""
WALL_RATIO = 15
"""Seconds on the clock for each second of CPU time: the machine may be busy."""
SPARE_BYTES = 2**26
"""Memory that the smallest file may take."""
_START_S = 120.0
_MOST_HEAD_BYTES = 2**27
_LENGTHS = 4, 8

_CRASHED = "The file makes its decoder crash; it is damaged, transfer it again."
_DAMAGED = "The file is damaged and cannot be decoded; transfer it again."
_MEMORY = "The file takes more memory than a file of its size may."
_SLOW = "The file takes longer to decode than a file of its size may."

Json = dict[str, Any]
Job = Callable[..., Iterator[tuple[Json, bytes | memoryview]]]


class Limits(NamedTuple):
    """What one file may cost."""

    cpu_s: float
    memory_bytes: int
    part_bytes: int
    """Largest piece of raw bytes that may come back."""

    @classmethod
    def header(cls, file_bytes: int, frames: int = 0) -> Limits:
        """For a header; pydicom reads more than 8 MB of one in a second.

        Args:
            frames: How many it declares. For what it says of each, pydicom takes 1 to 5 ms and 40 KB; a file that lies
                gets no more than its bytes could hold.
        """
        frames_s = min(frames / 100, file_bytes / 2**18, FRAMES_S)
        frames_bytes = min(frames * 2**16, file_bytes * 2**5, FRAMES_BYTES)
        return cls(CPU_S + frames_s + file_bytes / 2**23, SPARE_BYTES + 4 * file_bytes + frames_bytes, 0)

    @classmethod
    def pixels(cls, file_bytes: int, decoded_bytes: int, frame_bytes: int) -> Limits:
        """For compressed pixels; JPEG 2000, the slowest, decodes 6 MB a second, and blank pixels 20 MB."""
        cpu_s = CPU_S + file_bytes / 2**21 + decoded_bytes / 50e6
        return cls(cpu_s, SPARE_BYTES + 2 * file_bytes + 8 * frame_bytes, frame_bytes)


# --- this process


def ask(job: str, limits: Limits, **arguments: Any) -> Iterator[tuple[Json, memoryview]]:
    """Has one of `_jobs` done in the worker.

    Yields:
        What the job yields: a head, and raw bytes.

    Raises:
        Refusal: The job says so, or it crashed, or it went beyond its limits.
        DataError: No worker can be started: no fault of the file.
    """
    for again in (True, False):
        worker = getattr(_here, "worker", None)
        if worker is None or worker.owner != os.getpid():  # a forked process must not speak into its parent's pipes
            worker = _here.worker = _Worker.start()
        try:
            yield from worker.ask({"job": job, "arguments": arguments, "limits": limits}, limits)
        except _Killed:
            if not again or worker.answered:
                raise Refusal(RefusalCode.TOO_LARGE, _MEMORY) from None
        else:
            return
        finally:
            if not worker.in_step:  # the caller left, or the pipe holds half an answer
                worker.stop()
                _here.worker = None


_here = threading.local()


class _Killed(Exception):  # noqa: N818
    """By the system, short of memory, or by a person: no fault of the file, perhaps."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    owner: int = field(default_factory=os.getpid)
    in_step: bool = True
    """Between two jobs: nothing is left in the pipes."""
    answered: bool = False

    @classmethod
    def start(cls) -> _Worker:
        code = "import sys; sys.path.insert(0, sys.argv[1]); from common.imaging.worker import serve; serve()"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        why = "the process that decodes DICOM files did not start; check the limits of memory and processes"
        try:
            process = subprocess.Popen(  # noqa: S603  this very file
                # -P: nothing is imported from the folder that the user happens to be in
                [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # codecs print there, and may quote what they read
                bufsize=0,
                start_new_session=True,  # one group to kill, and no Ctrl-C of ours
                env={**os.environ, **threads},
            )
        except OSError:
            raise DataError(why) from None
        with contextlib.suppress(AttributeError, OSError):  # Linux: fewer turns between the processes for a slice
            assert process.stdout is not None
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 2**20)
        worker = cls(process)
        weakref.finalize(worker, _stop, process, worker.owner)
        try:
            worker._part(time.monotonic() + _START_S, 0)
        except Refusal:
            worker.stop()
            raise DataError(why) from None
        return worker

    def stop(self) -> None:
        _stop(self.process, self.owner)

    def ask(self, request: Mapping[str, Any], limits: Limits) -> Iterator[tuple[Json, memoryview]]:
        deadline = time.monotonic() + WALL_RATIO * limits.cpu_s
        self.in_step = self.answered = False
        assert self.process.stdin is not None
        try:
            _write(self.process.stdin.fileno(), json.dumps(request).encode())
        except OSError:
            raise Refusal(RefusalCode.CORRUPT, _CRASHED) from None
        taken = False
        while True:
            head, raw = self._part(deadline, limits.part_bytes)
            if "taken" in head:
                taken = True
                continue
            if "died" in head and not taken:
                raise _Killed  # before it had the request: what the next one does with that is not known
            if "died" in head:
                self.in_step = True
                if head["died"] == signal.SIGPROF:
                    raise Refusal(RefusalCode.TOO_SLOW, _SLOW)
                if head["died"] == signal.SIGKILL:
                    raise _Killed
                raise Refusal(RefusalCode.CORRUPT, _CRASHED)
            if "refused" in head:
                self.in_step = True
                raise Refusal(RefusalCode(head["refused"]), str(head["why"]))
            if "end" in head:
                self.in_step = True
                return
            self.answered = True
            yield head, raw

    def _part(self, deadline: float, most_bytes: int) -> tuple[Json, memoryview]:
        lengths = self._read(sum(_LENGTHS), deadline)
        head_bytes, raw_bytes = (int.from_bytes(part, "little") for part in (lengths[:4], lengths[4:]))
        if head_bytes > _MOST_HEAD_BYTES or raw_bytes > most_bytes:
            raise Refusal(RefusalCode.CORRUPT, _CRASHED)  # no decoder of ours says such a thing
        try:
            head = json.loads(bytes(self._read(head_bytes, deadline)))
        except ValueError:
            head = None
        if not isinstance(head, dict):
            raise Refusal(RefusalCode.CORRUPT, _CRASHED)
        return head, self._read(raw_bytes, deadline)

    def _read(self, count: int, deadline: float) -> memoryview:
        view, at = memoryview(bytearray(count)), 0
        assert self.process.stdout is not None
        pipe = self.process.stdout
        ready = select.poll()  # select knows only the first 1024 descriptors
        ready.register(pipe, select.POLLIN)
        while at < count:
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise Refusal(RefusalCode.TOO_SLOW, _SLOW)
            got = pipe.readinto(view[at:])  # type: ignore[attr-defined]
            if not got:
                raise Refusal(RefusalCode.CORRUPT, _CRASHED)
            at += got
        return view


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():  # a forked copy of this process: the worker is not its own
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


# --- the other process


def serve() -> None:
    """What the second process does until the first one is gone."""
    jobs = _jobs()  # imported before the fork, which then costs nothing
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # patients' images do not belong into a core dump
        resource.setrlimit(limit, (0, 0))
    _say({"ready": True})
    while True:
        pid = os.fork()
        if pid == 0:
            _work(jobs)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if ended == _CLOSED:
            return
        if ended != _DAMAGE:
            _say({"died": -ended})


_CLOSED, _DAMAGE = 0, 64


def _jobs() -> dict[str, Job]:
    from common.imaging import codecs, facts, frames, header, single

    return {
        "unpack": codecs.unpack,
        "scan": header.scan_job,
        "frames": frames.frames_job,
        "single": single.single_job,
        "voltage": facts.voltage_job,
    }


def _work(jobs: Mapping[str, Job]) -> NoReturn:
    while True:
        request = _receive(sys.stdin.buffer)
        if request is None:
            os._exit(_CLOSED)
        _say({"taken": True})
        limits = Limits(*request["limits"])
        damaged = True
        end: Json = {"end": True}
        _bound(limits)
        try:
            for head, raw in jobs[request["job"]](**request["arguments"]):
                left_s, _ = signal.setitimer(signal.ITIMER_PROF, 0)  # killed in here, half an answer would remain
                _say(head, raw)
                signal.setitimer(signal.ITIMER_PROF, max(left_s, 1e-3))
            damaged = False
        except Refusal as refusal:
            end = {"refused": refusal.code, "why": refusal.why}
        except MemoryError:
            end = {"refused": RefusalCode.TOO_LARGE, "why": _MEMORY}
        except Exception:
            end = {"refused": RefusalCode.CORRUPT, "why": _DAMAGED}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _bound_memory(None)
        _say(end)
        if damaged:
            os._exit(_DAMAGE)


def _bound(limits: Limits) -> None:
    """From here on the process dies at its limit of CPU time, and gets no memory beyond the other one."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _bound_memory(limits.memory_bytes)
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)


def _bound_memory(more_bytes: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard
    if more_bytes is not None:
        with contextlib.suppress(OSError):  # only Linux says how much there is now
            pages = int(Path("/proc/self/statm").read_bytes().split()[0])
            soft = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _say(head: Json, raw: bytes | memoryview = b"") -> None:
    text = json.dumps(head).encode()
    raw = memoryview(raw).cast("B")
    lengths = b"".join(len(part).to_bytes(size, "little") for part, size in zip((text, raw), _LENGTHS, strict=True))
    for part in (lengths + text, raw):
        _write_all(1, part)


def _write(pipe: int, text: bytes) -> None:
    _write_all(pipe, len(text).to_bytes(4, "little") + text)


def _write_all(pipe: int, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while view:
        view = view[os.write(pipe, view) :]


def _receive(pipe: BinaryIO) -> Json | None:
    """The next request, unbuffered: what a buffer had read ahead would die with this process."""
    raw = pipe.raw  # type: ignore[attr-defined]

    def exactly(count: int) -> bytes:
        found = b""
        while len(found) < count and (part := raw.read(count - len(found))):
            found += part
        return found

    length = exactly(4)
    if len(length) < 4:
        return None
    found: Json = json.loads(exactly(int.from_bytes(length, "little")))
    return found
