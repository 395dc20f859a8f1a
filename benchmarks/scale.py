"""Many tiny sites: what a visit costs beside its training, and how memory grows with the number of sites.

    python benchmarks/scale.py --sites 100 1000 --out runs/bench/scale.json

20 made-up images of 28 x 28 a site, a small CNN, 3 rounds, a tenth of the sites asked in each; then all are asked for
the closing evaluation. Sites are opened when they are asked, with key, log and folder of their own; their images are
made then. Each number of sites runs in a process of its own. Then the CPU time of what grows with the number of
parameters and with the number of images; docs/scaling.md is written from both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, measured, own_peak_mb, tell

IMAGES, SIZE, ROUNDS = 20, 28, 3


def main() -> None:
    """Every number of sites in a process of its own, or, called by itself, one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--sites", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--curves", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one)))
        return
    if arguments.curves:
        print(json.dumps(curves()))
        return
    rows = [measured([sys.executable, __file__, "--one", str(count)]) for count in arguments.sites]
    grown = measured([sys.executable, __file__, "--curves"]).says
    found = {"machine": machine(), "rows": [{**row.says, "wall_s": row.wall_s} for row in rows], **grown}
    tell(found, arguments.out)


class Made(Mapping[str, Any]):
    """Cohorts that are made when they are asked for, and not kept."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Any:
        from client.cohort import Cohort
        from common.samples import Samples

        rng = np.random.default_rng(list(name.encode()))
        targets_N = (np.arange(IMAGES) % 2).astype(np.int64)
        x_N = (rng.normal(size=(IMAGES, 1, SIZE, SIZE)) + targets_N[:, None, None, None]).astype(np.float32)
        samples = Samples(x_N, targets_N, np.arange(IMAGES), tuple(f"{n:04d}" for n in range(IMAGES)), {}, "")
        return Cohort(samples, np.repeat("train", IMAGES), "a" * 64, {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Clock:
    """Adds up the time inside a function, on the wall and of its thread's CPU, however many threads call it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.spent_s, self.cpu_s, self.calls = function, 0.0, 0.0, 0

    def __call__(self, *words: Any, **more: Any) -> Any:
        began, busy = time.perf_counter(), time.thread_time()
        try:
            return self._function(*words, **more)
        finally:
            self.spent_s += time.perf_counter() - began
            self.cpu_s += time.thread_time() - busy
            self.calls += 1


def run(sites: int) -> dict[str, Any]:
    """One federation of so many sites, through the simulation's own sites, grid and coordinator."""
    import torch

    from client import site as site_module
    from client.train import train
    from common.config import Evaluation, Federation, ModelConfig, Preprocessing, Recipe, Settings, Simulation, Training
    from common.models import build
    from common.storage import private_folder
    from simulations import run as simulation

    names = tuple(f"s{number:05d}" for number in range(sites))
    recipe = Recipe(
        name="scale",
        rounds=ROUNDS,
        data=Preprocessing(size=(SIZE, SIZE)),
        model=ModelConfig(family="monai", name="resnet10", width=0.141, stem="small"),
        training=Training(optimizer="sgd", schedule="constant", lr=0.01, weight_decay=0.0, batch_size=10),
        federation=Federation(sites=sites, quorum=max(1, sites // 20), fraction=0.1),
        evaluation=Evaluation(validation_fraction=0.0, test_fraction=0.0),
    )
    made = Clock(Made(names).__getitem__)

    class Counted(Made):
        def __getitem__(self, name: str) -> Any:
            return made(name)

    out = Path(tempfile.mkdtemp(prefix="fedicom-scale-"))
    settings = Settings(recipe=recipe, simulation=Simulation(device="cpu", threads=1), out=str(out / "run"))
    torch.set_num_threads(1)
    build(recipe)  # the import of its library is no cost of a visit
    training, opening, logs = Clock(train), Clock(site_module.Site), Clock(simulation._audit)
    site_module.__dict__["train"] = training
    simulation.__dict__["Site"] = opening
    simulation.__dict__["_audit"] = logs
    try:
        folder = private_folder(Path(settings.out or ""))
        audit = simulation._audit(folder, "server")
        began, busy = time.perf_counter(), time.process_time()
        cpu = torch.device("cpu")
        federated = simulation._federate(settings, folder, names, Counted(names), audit, cpu, simulation.Silent())
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - busy
    finally:
        shutil.rmtree(out)
    visits = training.calls + 2 * sites  # all are asked who they are, and for the closing evaluation
    opening_s = opening.spent_s + logs.spent_s
    beside_s = cpu_s - training.cpu_s - made.cpu_s
    return {
        "sites": sites,
        "asked": len(federated.state.history[0].accepted),
        "rounds_s": wall_s,
        "training_ms": 1e3 * training.spent_s / training.calls,
        "open_ms": 1e3 * opening_s / opening.calls,
        "training_cpu_ms": 1e3 * training.cpu_s / training.calls,
        "beside_cpu_ms": 1e3 * beside_s / visits,
        "opened": opening.calls,
        "visit_ms": 1e3 * (wall_s - training.spent_s - opening_s - made.spent_s) / visits,
        "peak_mb": own_peak_mb(),
        "digest": federated.state.weights.digest,
    }


def curves() -> dict[str, Any]:
    """CPU milliseconds by the size of the model, and by the number of images."""
    import torch

    from common.config import ModelConfig, Preprocessing, Recipe, Training
    from common.models import build, get_weights

    torch.set_num_threads(1)

    def recipe(width: float) -> Recipe:
        return Recipe(
            name="scale",
            data=Preprocessing(size=(SIZE, SIZE)),
            model=ModelConfig(family="monai", name="resnet10", width=width, stem="small"),
            training=Training(optimizer="sgd", lr=0.01, weight_decay=0.0, batch_size=32),
        )

    by_size = [_by_size(get_weights(build(recipe(width)))) for width in (0.141, 0.45, 1.0)]
    return {"by_parameters": by_size, "by_images": [_by_images(recipe(0.141), count) for count in (20, 200, 2000)]}


def _by_size(weights: Any) -> dict[str, float]:
    from common.config import Federation
    from common.exchange import Update
    from common.weights import Weights
    from server.aggregate import Gathering

    def fresh() -> Any:
        return Weights(dict(weights))  # digest and norm are computed once for each

    update = Update(
        site="a", recipe_id="a" * 64, round=1, base="b" * 64, delta=weights, weight=2.0, steps=1, train_loss=0.1
    )
    gathering = Gathering(Federation(sites=3), ["0", "a", "b"])
    gathering.take("0", update)
    return {
        "parameters": weights.size,
        "digest_ms": _cpu_ms(lambda: fresh().digest),
        "norm_and_check_ms": _cpu_ms(lambda: (fresh().norm, weights.finite)),
        "fold_ms": _cpu_ms(lambda: gathering._add(update)),
    }


def _by_images(recipe: Any, count: int) -> dict[str, float]:
    import torch

    from client.cohort import Cohort
    from client.train import train
    from common.models import build, get_weights
    from common.samples import Samples

    targets_N = (np.arange(count) % 2).astype(np.int64)
    x_N = np.random.default_rng(0).normal(size=(count, 1, SIZE, SIZE)).astype(np.float32)
    samples = Samples(x_N, targets_N, np.arange(count), tuple(f"{n:04d}" for n in range(count)), {}, "")
    cohort, model = Cohort(samples, np.repeat("train", count), "a" * 64, {}), build(recipe)
    weights, cpu = get_weights(model), torch.device("cpu")
    work_ms = _cpu_ms(lambda: train(model, weights, cohort, recipe, round_=1, site="a", device=cpu), repeats=2)
    return {"images": count, "epoch_ms": work_ms}


def _cpu_ms(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    spent = []
    for _ in range(repeats):
        began = time.thread_time()
        work()
        spent.append(1e3 * (time.thread_time() - began))
    return min(spent)


if __name__ == "__main__":
    main()
