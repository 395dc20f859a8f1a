from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common.compute import without_compiler

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


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}), (torch.optim.AdamW, {})]
)
def test_an_optimiser_without_the_compiler_takes_torchs_own_steps_to_the_bit(kind, options):
    def weights(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
        groups = [{"params": [model[0].weight], "lr": 0.3}, {"params": [model[0].bias, *model[2].parameters()]}]
        optimiser = make(groups, lr=0.1, **options)
        for _ in range(4):
            optimiser.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            model(torch.randn(6, 5)).square().mean().backward()
            optimiser.step()
        assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
        return [p.detach().clone() for p in model.parameters()]

    begun = weights(lambda groups, lr, **_: torch.optim.SGD(groups, lr=0.0))
    theirs, ours = weights(kind), weights(without_compiler(kind))
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(begun, ours, strict=True))
    assert isinstance(without_compiler(kind)([nn.Parameter(torch.ones(1))]), kind)


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
