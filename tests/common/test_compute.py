from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "4"}  # not that of the tests

# Page faults of a thread that allocates, fills and frees 24 MB (6,000 pages) a hundred times.
FAULTS = """
import resource, sys, threading, torch
from common.compute import compute_with
if "keep" in sys.argv:
    compute_with(threads=2)
def work():
    for _ in range(100):
        parts = [torch.ones(1 << 20) for _ in range(6)]
        del parts
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
thread = threading.Thread(target=work)
thread.start(); thread.join()
print(faults() - before, torch.get_num_threads())
"""


def faults(*words: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *words], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return [int(part) for part in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_thread_gets_its_freed_memory_again_without_asking_the_system():
    plain, kept = faults(), faults("keep")
    assert plain[0] > 100_000  # each round anew
    assert kept[0] < 40_000  # once, and what torch needs for itself
    assert kept[1] == 2
