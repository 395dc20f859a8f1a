"""What every benchmark needs: whole processes measured from outside, in turns, and the spread beside the median."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PSS_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process from its start to its end."""

    wall_s: float
    cpu_s: float
    """Of the process and of all that it started and waited for."""
    peak_mb: float
    """Largest resident memory of the process; with `whole_tree` the largest sum over it and its children, pages that
    they share counted once."""
    says: dict[str, Any] = field(default_factory=dict)
    """The JSON on its last line."""


def tell(found: Mapping[str, Any], out: Path | None) -> None:
    """Prints what was found as JSON, and writes it to `out` when there is one."""
    text = json.dumps(found, indent=1) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    print(text)


def measured(command: Sequence[str], *, whole_tree: bool = False, environment: Mapping[str, str] | None = None) -> Run:
    """Runs a command and takes the JSON of its last line.

    Raises:
        SystemExit: It failed; its own words are shown.
    """
    began, before = time.perf_counter(), _children_cpu_s()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
    ) as process:  # fmt: skip
        watch = _Memory(process.pid) if whole_tree else None
        out, err = process.communicate()
        wall_s = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{err[-2000:]}")
    says = json.loads(out.strip().splitlines()[-1])
    peak = watch.stop() if watch is not None else float(says.get("peak_mb", 0.0))
    return Run(wall_s=wall_s, cpu_s=_children_cpu_s() - before, peak_mb=peak, says=says)


def in_turns(ways: Mapping[str, Callable[[], Run]], repeats: int, *, warm: bool = True) -> dict[str, list[Run]]:
    """Every way `repeats` times, one after another in turns, so that a slow minute of the machine meets all of them."""
    if warm:
        for way in ways.values():
            way()
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(way())
    return runs


def timed(work: Callable[[], object], *, repeats: int, at_least_s: float = 0.0) -> list[float]:
    """Seconds of one call, `repeats` times after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        calls, began = 0, time.perf_counter()
        while not calls or time.perf_counter() - began < at_least_s:
            work()
            calls += 1
        seconds.append((time.perf_counter() - began) / calls)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, each pair of one turn: median, smallest and largest."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def own_peak_mb() -> float:
    """Largest resident memory of this process so far; getrusage would begin with that of who started it."""
    told = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(told.split()[0]) / 1024


def cohort(x_N: Any, y_N: Any) -> Any:
    """A site's cohort of these images (n, 1, *size), each of a patient of its own, all for training."""
    import numpy as np

    from client.cohort import Cohort
    from common.samples import Samples

    n = len(x_N)
    samples = Samples(x_N, y_N, np.arange(n), tuple(f"{number:04d}" for number in range(n)), {}, "")
    return Cohort(samples, np.repeat("train", n), "a" * 64, {})


def moments() -> Any:
    """What a simulation shows, as `ends`: when training began, and when each round was over (`time.perf_counter`)."""
    from simulations.run import Silent

    class Moments(Silent):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def step(self, what: str, done: int, total: int) -> None:
            if what == "Training" and not self.ends:
                self.ends.append(time.perf_counter())

        def round(self, state: Any, report: Any) -> None:
            self.ends.append(time.perf_counter())

    return Moments()


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        **{name: version(name) for name in ("torch", "flwr", "numpy", "onnxruntime")},
    }


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


class _Memory:
    """Watches a process and its children."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._over = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._over.wait(_PSS_S):
            self._peak = max(self._peak, sum(_pss_mb(pid) for pid in _tree(self._pid)))


def _tree(root: int) -> list[int]:
    found, open_ = [], [root]
    while open_:
        pid = open_.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                open_ += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _pss_mb(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return 0.0
