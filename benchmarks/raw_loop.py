"""The limit: federated averaging as a plain PyTorch script, with nothing of Fedicom in it.

The same network, the same first weights, the same batches in the same order, the same SGD steps, the same mean: so the
final weights are Fedicom's, bit for bit, and `benchmarks/simulation.py` holds the two digests against each other.
What is not in it: messages, checks, logs, checkpoints, reports.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import own_peak_mb
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """The basic block of He et al. 2016, with the names of timm and MONAI."""

    def __init__(self, inside: int, outside: int, stride: int, shortcut_bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=shortcut_bias), nn.BatchNorm2d(outside)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    """`blocks` basic blocks a stage; stem 3 (MONAI's small one, no pooling) or 7."""

    def __init__(self, width: int, blocks: int, stem: int, shortcut_bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, stem, 1 if stem == 3 else 2, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stem = stem
        inside = width
        for stage in range(4):
            outside = width << stage
            made = [
                Block(inside if not block else outside, outside, 2 if stage and not block else 1, shortcut_bias)
                for block in range(blocks)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            inside = outside
        self.fc = nn.Linear(inside, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.stem == 7:
            x = functional.max_pool2d(x, 3, 2, 1)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


MODELS = {
    "small": {"width": 9, "blocks": 1, "stem": 3, "shortcut_bias": True},
    "resnet18": {"width": 64, "blocks": 2, "stem": 7, "shortcut_bias": False},
}


def main() -> None:
    """`raw_loop.py FOLDER MODEL PROCESSES [OUT]`: prints digest and times as JSON; OUT gets the final weights."""
    began = time.perf_counter()
    folder, kind, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    start = np.load(folder / f"{kind}.npz")
    weights = {name: start[name] for name in start.files}
    sites = job["sites"]
    asked = asked_in(job)
    rounds_s: list[float] = []
    if processes == 1:
        train = Trainer(folder, kind, job)
        ready = time.perf_counter()
        for round_, these in enumerate(asked, 1):
            at = time.perf_counter()
            weights = mean(weights, [train(weights, site, round_) for site in these])
            rounds_s.append(time.perf_counter() - at)
    else:
        spawn = multiprocessing.get_context("spawn")
        pipes = []
        for number in range(processes):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, folder, kind, job, sites[number::processes])
            spawn.Process(target=serve, args=arguments, daemon=True).start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        ready = time.perf_counter()
        for round_ in range(1, job["rounds"] + 1):
            at = time.perf_counter()
            for pipe in pipes:
                pipe.send((weights, round_))
            places = {pipe: iter(range(number, len(sites), processes)) for number, pipe in enumerate(pipes)}
            answers: list[Any] = [None] * len(sites)
            for _ in sites:
                # Whichever has one: a worker whose answer is larger than the pipe waits until somebody reads it.
                ready_one: Any = wait(pipes)[0]
                answers[next(places[ready_one])] = ready_one.recv()
            weights = mean(weights, answers)
            rounds_s.append(time.perf_counter() - at)
    if len(sys.argv) > 4:
        np.savez(sys.argv[4], **weights)
    print(
        json.dumps(
            {
                "digest": digest(weights),
                "ready_s": ready - began,
                "rounds_s": rounds_s,
                "peak_mb": own_peak_mb(),
            }
        )
    )


def serve(pipe: Any, folder: Path, kind: str, job: dict[str, Any], sites: list[str]) -> None:
    """One worker of the two-process loop."""
    torch.set_num_threads(1)
    train = Trainer(folder, kind, job)
    pipe.send("ready")
    while True:
        try:
            weights, round_ = pipe.recv()
        except EOFError:
            return
        for site in sites:
            pipe.send(train(weights, site, round_))


class Trainer:
    """One network for all sites, and their images in memory; tiny sites make them when they are asked."""

    def __init__(self, folder: Path, kind: str, job: dict[str, Any]) -> None:
        self.model = ResNet(**MODELS[kind])  # type: ignore[arg-type]
        self.job = job
        self.images_of = images(folder, job)
        state = self.model.state_dict()
        self.exchanged = {name: value for name, value in state.items() if value.is_floating_point()}

    def __call__(self, weights: dict[str, np.ndarray[Any, Any]], site: str, round_: int) -> dict[str, Any]:
        """One epoch of SGD at one site; the change of the weights."""
        job, (x_N, y_N) = self.job, self.images_of(site)
        with torch.no_grad():
            for name, value in self.exchanged.items():
                value.copy_(torch.tensor(weights[name]))
        self.model.train()
        optimiser = torch.optim.SGD(self.model.parameters(), lr=job["lr"], momentum=job["momentum"], fused=True)
        for index_B in batches(job, site, round_, len(x_N)):
            optimiser.zero_grad()
            logits = self.model(torch.from_numpy(x_N[index_B]))
            functional.cross_entropy(logits, torch.from_numpy(y_N[index_B])).backward()
            optimiser.step()
        return {name: value.numpy() - weights[name] for name, value in self.exchanged.items()}


def asked_in(job: dict[str, Any]) -> list[list[str]]:
    """The sites of each round."""
    return job.get("asked") or [job["sites"]] * job["rounds"]


def images(folder: Path, job: dict[str, Any]) -> Callable[[str], tuple[Any, Any]]:
    """Gives the images and kinds of a site: of its file, read now, or made when it is asked for."""
    if "images" in job:
        return lambda site: made(site, job["images"])
    parts = {site: np.load(folder / f"{site}.npz") for site in job["sites"]}
    return {site: (part["x"], part["y"]) for site, part in parts.items()}.__getitem__


def made(site: str, count: int, size: int = 28) -> tuple[Any, Any]:
    """Images (count, 1, size, size) of two kinds, the same for the same name, and their kinds."""
    rng = np.random.default_rng(list(site.encode()))
    y_N = (np.arange(count) % 2).astype(np.int64)
    return (rng.normal(size=(count, 1, size, size)) + y_N[:, None, None, None]).astype(np.float32), y_N


def batches(job: dict[str, Any], site: str, round_: int, count: int) -> list[np.ndarray[Any, Any]]:
    """Which of the site's images make each batch of a round."""
    rng = np.random.default_rng(job["seeds"][f"{round_}/{site}"])
    rng.integers(2**63), rng.integers(2**63)  # Fedicom's seeds of augmentation and dropout, unused here
    return np.array_split(rng.permutation(np.arange(count)), math.ceil(count / job["batch_size"]))


def mean(weights: dict[str, Any], changes: list[dict[str, Any]]) -> dict[str, Any]:
    """The weights moved by the mean change of all sites, added in their order."""
    moved = {}
    for name, value in weights.items():
        total = changes[0][name].copy()
        for change in changes[1:]:
            total += change[name]
        total /= len(changes)
        moved[name] = value + total
    return moved


def digest(weights: dict[str, Any]) -> str:
    """SHA-256 over names, shapes and little-endian float32 bytes, in order of name."""
    state = hashlib.sha256()
    for name in sorted(weights):
        shape = ",".join(map(str, weights[name].shape))
        state.update(f"{name}\0{shape}\0".encode())
        state.update(np.ascontiguousarray(weights[name], dtype="<f4").tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    main()
