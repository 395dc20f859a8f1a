"""Parts of a round against the least that they could cost: aggregation, checkpoint, input, inference, the command line.

    python benchmarks/parts.py --out runs/bench/parts.json

Each number is a ratio of two things in one process, taken in turns; the range over the turns is given. One thread, so
that it says the same on a machine whose other cores are busy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measure import ROOT, machine, ratio, spread, tell

NUMBERS = 11_200_000
"""Of a ResNet-18: 45 MB."""


def main() -> None:
    """Measures every part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="fedicom-parts-"))
    try:
        found = {"machine": machine(), **{name: PARTS[name](root, arguments.turns) for name in arguments.only}}
    finally:
        shutil.rmtree(root)
    tell(found, arguments.out)


def turns(ways: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of each way, `count` times in turns, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def aggregation(root: Path, count: int) -> dict[str, Any]:
    """100 sites x 45 MB into one mean: folded as they come, against one `add_` in place a site."""
    from common.config import Federation
    from common.exchange import Update
    from common.weights import Weights
    from server.aggregate import Gathering

    rng = np.random.default_rng(0)
    shapes = {"a": (512, 512, 9), "b": (512, 256, 9), "c": (NUMBERS - 512 * 512 * 9 - 512 * 256 * 9,)}
    deltas = [
        Weights({name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}) for _ in range(2)
    ]
    federation, sites = Federation(sites=100), [f"s{number:03d}" for number in range(100)]

    def update(number: int) -> Update:
        return Update(
            site=sites[number],
            recipe_id="a" * 64,
            round=1,
            base="b" * 64,
            delta=deltas[number % 2],
            weight=1.0,
            steps=1,
        )

    def folded() -> Weights:
        gathering = Gathering(federation, sites)
        for number in range(100):
            gathering.take(sites[number], update(number))
        return gathering.step({}, round_=1, buffers=frozenset())[0]

    tensors = [{name: torch.from_numpy(np.array(array)) for name, array in delta.items()} for delta in deltas]

    def one_pass() -> dict[str, torch.Tensor]:
        total = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for number in range(100):
            for name, value in tensors[number % 2].items():
                total[name].add_(value, alpha=0.01)
        return total

    tracemalloc.start()
    folded()
    peak = tracemalloc.get_traced_memory()[1] / (4 * NUMBERS)
    tracemalloc.stop()
    seconds = turns({"folded": folded, "one pass": one_pass}, count)
    return {
        "sites": 100,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": ratio(seconds["folded"], seconds["one pass"]),
        "peak_models": peak,
        "note": "peak: models beside the update in hand",
    }


def checkpointing(root: Path, count: int) -> dict[str, Any]:
    """A durable checkpoint of 45 MB against write and fsync of the same bytes."""
    from common.weights import Weights
    from server import checkpoint
    from server.rounds import ServerState

    weights = Weights({"w": np.random.default_rng(0).standard_normal(NUMBERS, np.float32)})
    state = ServerState(recipe_id="a" * 64, round=1, weights=weights)
    assert weights.digest  # known from the round already
    data = np.random.default_rng(1).bytes(4 * NUMBERS)
    number = 0

    def ours() -> None:
        nonlocal number
        number += 1
        checkpoint.write(replace(state, round=number), root / "checkpoints")

    def plain() -> None:
        path = root / "plain"
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    seconds = turns({"checkpoint": ours, "write and fsync": plain}, count)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": ratio(seconds["checkpoint"], seconds["write and fsync"]),
    }


def inputs(root: Path, count: int) -> dict[str, Any]:
    """Training steps that draw their batch as a site does, against steps on a batch that is there already."""
    from torch import nn

    rng = np.random.default_rng(0)
    path = root / "samples.npy"
    np.save(path, rng.standard_normal((1600, 1, 28, 28), np.float32))
    x_N, y_N = np.load(path, mmap_mode="r"), rng.integers(0, 2, 1600)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 25), nn.ReLU(), nn.Linear(25, 2),
    )  # fmt: skip
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    ready = torch.from_numpy(np.array(x_N[:32])), torch.from_numpy(y_N[:32])

    def step(x_B: torch.Tensor, y_B: torch.Tensor) -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x_B), y_B).backward()
        optimiser.step()

    def preloaded() -> None:
        for _ in range(50):
            step(*ready)

    def drawn() -> None:
        order = np.random.default_rng(1).permutation(1600)
        for part in np.array_split(order, 50):
            step(torch.from_numpy(np.ascontiguousarray(x_N[part])), torch.from_numpy(np.ascontiguousarray(y_N[part])))

    seconds = turns({"drawn": drawn, "preloaded": preloaded}, count)
    return {
        "images_per_s": {name: spread([1600 / value for value in values]) for name, values in seconds.items()},
        "ratio": ratio(seconds["preloaded"], seconds["drawn"]),
    }


def inference(root: Path, count: int) -> dict[str, Any]:
    """The exported ONNX file on one thread against torch eager and torch.compile."""
    import onnxruntime

    from common.config import ModelConfig, Preprocessing, Recipe, Task
    from common.models import build, get_weights
    from server.export import export_onnx
    from server.quantise import quantised

    cases = {
        "2D ResNet-18, 224 px, batch 8": (
            Recipe(name="flat", data=Preprocessing(size=(224, 224)), model=ModelConfig(name="resnet18")),
            (8, 1, 224, 224),
        ),
        "3D ResNet-18, 64 voxels, batch 2": (
            Recipe(
                name="deep",
                task=Task(dimensions=3),
                data=Preprocessing(size=(64, 64, 64)),
                model=ModelConfig(family="monai", name="resnet18", dimensions=3),
            ),
            (2, 1, 64, 64, 64),
        ),
    }
    rows = {}
    for name, (recipe, shape) in cases.items():
        model = build(recipe).eval()
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        file = root / f"{recipe.name}.onnx"
        export_onnx(model, recipe, get_weights(model), file, reference_x=x)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        small = onnxruntime.InferenceSession(
            quantised(file, (x[:1] for _ in range(8))), options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: x}
        given = torch.from_numpy(x)
        model = build(recipe).eval()
        ways: dict[str, Callable[[], object]] = {
            "onnxruntime": partial(session.run, None, feed),
            "onnxruntime, int8": partial(small.run, None, feed),
            "torch eager": partial(model, given),
        }
        why = ""
        try:
            compiled = torch.compile(model)
            with torch.inference_mode():
                compiled(given)
            ways["torch.compile"] = partial(compiled, given)
        except Exception as error:  # no compiler on this machine
            why = f"torch.compile: {type(error).__name__}"
        with torch.inference_mode():
            seconds = turns(ways, count)
        rows[name] = {
            "seconds": {way: spread(values) for way, values in seconds.items()},
            "speed_against_eager": ratio(seconds["torch eager"], seconds["onnxruntime"]),
            "int8_against_float32": ratio(seconds["onnxruntime"], seconds["onnxruntime, int8"]),
            **(
                {"speed_against_compile": ratio(seconds["torch.compile"], seconds["onnxruntime"])}
                if "torch.compile" in seconds
                else {"left_out": why}
            ),
        }
    return rows


def command_line(root: Path, count: int) -> dict[str, Any]:
    """`fedicom --help` against `python -c pass`."""

    def run(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)

    seconds = turns({"help": run("-m", "fedicom", "--help"), "pass": run("-c", "pass")}, max(count, 10))
    apart = [a - b for a, b in zip(seconds["help"], seconds["pass"], strict=True)]
    return {"seconds": {name: spread(values) for name, values in seconds.items()}, "difference_s": spread(apart)}


def start(root: Path, count: int) -> dict[str, Any]:
    """Importing the simulation against importing torch."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)

    seconds = turns({"simulation": run("import simulations.run"), "torch": run("import torch")}, count)
    apart = [a - b for a, b in zip(seconds["simulation"], seconds["torch"], strict=True)]
    return {"seconds": {name: spread(values) for name, values in seconds.items()}, "difference_s": spread(apart)}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "help": command_line,
    "start": start,
    "aggregation": aggregation,
    "checkpoint": checkpointing,
    "input": inputs,
    "inference": inference,
}

if __name__ == "__main__":
    main()
