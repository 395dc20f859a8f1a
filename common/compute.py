"""What a process that trains asks of its C library and of torch."""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

# Of glibc's malloc.h; sizes in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_PAUSE_HARD = 2  # of OpenMP 5
_LARGEST = 32 << 20
"""glibc takes no more: half of a heap."""


def compute_with(threads: int | None) -> None:
    """Has torch use so many threads, and this process use its memory again; call it before the first thread starts.

    In every thread but the first one glibc gives freed memory back to the system at once, so each step of a training
    gets its gradients as pages of zeros that the system has to make: a tenth of the step on a CPU. One heap for all
    threads, which keeps up to 64 MiB that are free.

    Args:
        threads: None or 0: as many as torch chooses.
    """
    if threads:
        torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, 2 * _LARGEST)):
            mallopt(option, value)


def device_of(wanted: str) -> torch.device | None:
    """What `auto`, `cuda` or `cpu` stands for here; None where a GPU is demanded and torch sees none.

    A GPU has its number: torch takes one without it for most things, but not to bound its memory.
    """
    seen = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not seen:
        return None
    return torch.device("cuda", 0) if seen else torch.device("cpu")


def may_fork() -> bool:
    """Whether a fork of this process can do all that it can do; ends the threads that torch computes with.

    A lock that another thread holds is never freed in the fork, and the threads of an OpenMP pool, which the fork
    would wait for at its next large operation, are not there. A new pool comes by itself, here and there. On macOS the
    system's own libraries start threads.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return False
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split(maxsplit=5)[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    try:
        return not any(ctypes.CDLL(pool).omp_pause_resource_all(_PAUSE_HARD) for pool in pools)
    except (AttributeError, OSError):  # before OpenMP 5
        return False


@functools.cache
def fused(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser with its steps fused: one pass over parameters and moments, a third of AdamW's time on a CPU.

    The same numbers with any count of threads. Gradients may lie in memory in another way than their parameters
    (channels last), which torch's own fused steps take for other numbers without a word. And torch's compiler stays
    away: torch's own optimisers import it with their first parameters, and call it at every step, only to be left
    alone by it, half a second and 60 MB in each process.
    """
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad")}
    inner = inspect.unwrap(kind.step)

    @torch.no_grad()
    def step(self: torch.optim.Optimizer) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is not None and grad.stride() != parameter.stride():
                    parameter.grad = torch.empty_like(parameter).copy_(grad)
        inner(self)

    return functools.partial(type(kind.__name__, (kind,), {**plain, "step": step}), fused=True)
