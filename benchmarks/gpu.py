"""What needs a GPU: a training step against the plain PyTorch step, and a private step against a plain one.

    python benchmarks/gpu.py --out runs/bench/gpu.json     # some minutes on one card
    python benchmarks/gpu.py --device cpu --small          # the same code on a CPU, only to see that it runs

Fedicom's step is that of a whole visit (`client.train.train`, with everything that it does to a batch): a long visit
less a short one, over the steps between them. The plain one is a loop of the same length over the same images in
memory: pinned batches, channels last, bfloat16 autocast, SGD; beside it the same with `torch.compile`. Private: the
same network with group norm, Poisson batches of the same size on average, clipped for each patient and noised.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import cohort, machine, ratio, spread, tell

SHORT, LONG = 4, 24
"""Steps of the two visits."""


def main() -> None:
    """Measures both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small images and batches")
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    import torch

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --small shows that the code runs, and no more")
    flat, deep = ((32, 32), (16, 16, 16)) if arguments.small else ((224, 224), (96, 96, 96))
    cases = {
        f"ResNet-18, {flat[0]} pixels": ("timm", flat, 8 if arguments.small else 64),
        f"3D ResNet-18, {deep[0]} voxels": ("monai", deep, 4 if arguments.small else 8),
    }
    rows = {name: _row(*case, device, arguments.turns) for name, case in cases.items()}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no card"
    tell({"machine": machine(), "card": card, "rows": rows}, arguments.out)


def _row(family: Any, size: tuple[int, ...], batch: int, device: Any, turns: int) -> dict[str, Any]:
    from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Task, Training

    recipe = Recipe(
        name="gpu",
        task=Task(dimensions=len(size)),  # type: ignore[arg-type]
        data=Preprocessing(size=size),
        model=ModelConfig(family=family, name="resnet18", dimensions=len(size)),  # type: ignore[arg-type]
        training=Training(
            optimizer="sgd", lr=1e-3, weight_decay=0.0, batch_size=batch,
            precision="bfloat16" if device.type == "cuda" else "float32",  # torch's 3D kernels for CPUs give NaN
            memory_format="channels_last",
        ),
    )  # fmt: skip
    private = replace(
        recipe, privacy=Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5, physical_batch=batch)
    )
    ways = {
        "plain": _plain(recipe, device),
        "compiled": _plain(recipe, device, compiled=True),
        "fedicom": _ours(recipe, device),
        "plain, group norm": _plain(private, device),
        "private": _ours(private, device),
    }
    step_s: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):  # the first one warms up
        for name, way in ways.items():
            short, long = way(SHORT), way(LONG)
            if turn:
                step_s[name].append((long - short) / (LONG - SHORT))
    return {
        "batch": batch,
        "step_ms": {name: spread([1e3 * value for value in values]) for name, values in step_s.items()},
        "against_plain": ratio(step_s["fedicom"], step_s["plain"]),
        "against_compiled": ratio(step_s["fedicom"], step_s["compiled"]),
        "private_against_plain": ratio(step_s["private"], step_s["plain, group norm"]),
    }


def _images(recipe: Any) -> tuple[Any, Any]:
    count = 4 * recipe.training.batch_size
    x_N = np.random.default_rng(0).standard_normal((count, 1, *recipe.data.size), np.float32)
    return x_N, (np.arange(count) % 2).astype(np.int64)


def _ours(recipe: Any, device: Any) -> Callable[[int], float]:
    """Seconds of a visit of so many steps."""
    from client.dp import os_noise
    from client.dp.rules import Sampling
    from client.train import Private, train
    from common.models import build, get_weights

    x_N, y_N = _images(recipe)
    site, model = cohort(x_N, y_N), build(recipe)
    weights, batch = get_weights(model), recipe.training.batch_size

    def visit(steps: int) -> float:
        longer = replace(recipe, training=replace(recipe.training, local_epochs=steps * batch / len(x_N)))
        private = None
        if recipe.privacy.active:
            private = Private(
                sampling=Sampling(rate=batch / len(x_N), steps=steps), noise_multiplier=1.0, noise=os_noise()
            )
        began = time.perf_counter()
        # Its end waits for the device: the weights come back to the processor.
        done = train(model, weights, site, longer, round_=1, site="a", device=device, private=private)
        assert done.steps == steps
        return time.perf_counter() - began

    return visit


def _plain(recipe: Any, device: Any, *, compiled: bool = False) -> Callable[[int], float]:
    """Seconds of so many steps of a plain loop."""
    import torch
    from torch.nn.functional import cross_entropy

    from common.models import build

    x_N, y_N = _images(recipe)
    order: Any = torch.channels_last if len(recipe.data.size) == 2 else torch.channels_last_3d
    model: Any = build(recipe).to(device, memory_format=order)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    called, batch, pin = torch.compile(model) if compiled else model, recipe.training.batch_size, device.type == "cuda"
    move = partial(torch.Tensor.to, device=device, non_blocking=True)

    def loop(steps: int) -> float:
        began = time.perf_counter()
        for step in range(steps):
            at = step * batch % len(x_N)
            x_B, y_B = torch.from_numpy(x_N[at : at + batch]), torch.from_numpy(y_N[at : at + batch])
            x_B, y_B = (move(part.pin_memory() if pin else part) for part in (x_B, y_B))
            optimiser.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=pin):
                logits = called(x_B.to(memory_format=order))
            cross_entropy(logits.float(), y_B).backward()
            optimiser.step()
        if pin:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return loop


if __name__ == "__main__":
    main()
