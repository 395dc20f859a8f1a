from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common.compute import fused

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "4"}  # not that of the tests

# Page faults of a thread that allocates, fills and frees 24 MB (6,000 pages) a hundred times.
FAULTS = """
import ctypes, resource, sys, threading, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which a system with much free memory gives a few at once
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
    kept = faults("keep")
    assert kept[0] < 40_000  # of 600,000 pages: once, and what torch needs for itself
    assert kept[1] == 2


# Threads of a pool, a fork, and an operation that wants the pool in both; the fork is killed if it waits for ever,
# soon where it is known that it does. Who was told not to fork does not.
FORK = """
import os, signal, sys, threading, torch
from common.compute import may_fork
torch.set_num_threads(2)
x = torch.ones(1 << 20)
(x + 1).sum()
if "thread" in sys.argv:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
asked = "asked" in sys.argv
if asked:
    print(allowed := may_fork())
    if not allowed:
        sys.exit()
pid = os.fork()
if not pid:
    signal.alarm(5 if asked else 2)
    os._exit(int((x + 1).sum() != 2 << 20))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int((x + 1).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="may_fork says no")
def test_a_fork_that_was_asked_for_computes_in_threads_and_so_does_who_was_forked():
    def said(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", FORK, *words], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert said("asked") == ["True", "0", str(2 << 20)]
    assert said()[0] == str(-signal.SIGALRM)  # what would come of it
    assert said("asked", "thread") == ["False"]


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(("kind", "options"), [(SGD, {"momentum": 0.9, "weight_decay": 1e-3}), (ADAMW, {})])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fused_optimiser_takes_torchs_own_steps(kind, options, layout):
    def weights(make, layout=torch.contiguous_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(memory_format=layout)
        groups = [{"params": [model[0].weight], "lr": 0.3}, {"params": [model[0].bias, *model[2].parameters()]}]
        optimiser = make(groups, lr=0.1, **options)
        for _ in range(4):
            optimiser.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            found = torch.autograd.grad(model(torch.randn(2, 3, 8, 8)).square().mean(), list(model.parameters()))
            for parameter, grad in zip(model.parameters(), found, strict=True):
                parameter.grad = grad.contiguous()  # as the private engine gives it, whatever the parameter's layout
            optimiser.step()
        assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
        return torch.cat([p.detach().contiguous().flatten() for p in model.parameters()])

    begun = weights(lambda groups, lr, **_: SGD(groups, lr=0.0))
    theirs, torchs_fused = weights(kind), weights(functools.partial(kind, fused=True))
    ours = weights(fused(kind), layout)
    assert (ours - begun).norm() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if layout == torch.contiguous_format:
        assert torch.equal(ours, torchs_fused)
    assert isinstance(fused(kind)([nn.Parameter(torch.ones(1))]), kind)


TRAINING = """
import sys, numpy as np, torch
from client.cohort import Cohort
from client.train import train
from common.config import *
from common.models import build, get_weights
from common.samples import Samples
samples = Samples(np.ones((4, 1, 32, 32), np.float32), np.array([0, 1, 0, 1]), np.arange(4), tuple("abcd"), {}, "")
cohort = Cohort(samples, np.full(4, "train"), "", {}, 2)
for optimizer, family, name in (("sgd", "timm", "resnet18"), ("adamw", "monai", "resnet10")):
    recipe = Recipe(
        name="x", data=Preprocessing(size=(32, 32)), model=ModelConfig(family=family, name=name),
        training=Training(optimizer=optimizer),
    )
    model = build(recipe)
    train(model, get_weights(model), cohort, recipe, round_=1, site="a", device=torch.device("cpu"))
print([name for name in ("torch._dynamo", "sympy", "huggingface_hub", "requests") if name in sys.modules])
from torchvision.ops.roi_align import is_compile_supported
import torch._dynamo.utils
assert is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
assert torch._dynamo.utils.__file__ and torch.compiler.disable.__module__ == "torch.compiler"
"""


def test_a_site_trains_without_torchs_compiler_and_without_what_downloads():
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
