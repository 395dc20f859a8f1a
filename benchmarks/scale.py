"""Many tiny sites: what a visit costs beside its training, and how memory grows with the number of sites.

    python benchmarks/scale.py --sites 100 1000 10000 --out runs/bench/scale.json

20 made-up images of 28 x 28 a site, a small CNN, 3 rounds, a tenth of the sites asked in each; then all are asked for
the closing evaluation. Sites are opened when they are asked, with key, log and folder of their own; their images are
made then. In turns with raw_loop.py, which does the same SGD steps for the same sites and has neither hellos nor
evaluations; the run fails when the two ends differ in one bit. Each run is a process of its own. Then the CPU time of
what grows with the number of parameters and with the number of images; docs/scaling.md is written from both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import Run, cohort, in_turns, machine, measured, moments, own_peak_mb, spread, tell
from raw_loop import made

IMAGES, SIZE, ROUNDS = 20, 28, 3
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Every number of sites in processes of their own, or, called by itself, one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--sites", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--repeats", type=int, default=3, help="up to 1,000 sites; more are measured once")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--curves", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(Path(arguments.one[0]), int(arguments.one[1]))))
        return
    if arguments.curves:
        print(json.dumps(curves()))
        return
    with tempfile.TemporaryDirectory(prefix="fedicom-scale-") as folder:  # removed when all is measured: ext4 is slow
        rows = [_row(Path(folder), count, arguments.repeats) for count in arguments.sites]  # just after many files went
    grown = measured([sys.executable, __file__, "--curves"]).says
    tell({"machine": machine(), "rows": rows, **grown}, arguments.out)


def ways(root: Path, sites: int) -> dict[str, Callable[[], Run]]:
    """The same work by the raw loop and by Fedicom; `prepare` comes first."""
    return {
        "raw": partial(measured, [sys.executable, str(HERE / "raw_loop.py"), str(root), "small", "1"]),
        "fedicom": partial(measured, [sys.executable, __file__, "--one", str(root), str(sites)]),
    }


def _row(folder: Path, sites: int, repeats: int) -> dict[str, Any]:
    root = folder / str(sites)
    asked = prepare(root, sites)
    runs = in_turns(ways(root, sites), repeats if sites <= 1000 else 1, warm=False)
    if len(digests := {run.says["digest"] for part in runs.values() for run in part}) != 1:
        sys.exit(f"{sites} sites: the final weights differ: {sorted(digests)}")

    def told(key: str) -> dict[str, float]:
        return spread([run.says[key] for run in runs["fedicom"]])

    later = {name: [float(np.median(run.says["rounds_s"][1:])) for run in part] for name, part in runs.items()}
    return {
        "sites": sites,
        "asked": asked,
        "wall_s": {name: spread([run.wall_s for run in part]) for name, part in runs.items()},
        "training_ms": spread([1e3 * seconds / asked for seconds in later["raw"]]),
        "beside_ms": spread([1e3 * (a - b) / asked for a, b in zip(later["fedicom"], later["raw"], strict=True)]),
        **{key: told(key) for key in ("hello_ms", "closing_ms", "open_ms", "beside_cpu_ms", "training_cpu_ms")},
        "peak_mb": {name: spread([run.says["peak_mb"] for run in part]) for name, part in runs.items()},
    }


def names_of(sites: int) -> tuple[str, ...]:
    """What the sites are called."""
    return tuple(f"s{number:05d}" for number in range(sites))


def recipe_of(sites: int) -> Any:
    """What they train."""
    from common.config import Evaluation, Federation, ModelConfig, Preprocessing, Recipe, Training

    return Recipe(
        name="scale",
        rounds=ROUNDS,
        data=Preprocessing(size=(SIZE, SIZE)),
        model=ModelConfig(family="monai", name="resnet10", width=0.141, stem="small"),
        training=Training(optimizer="sgd", schedule="constant", lr=0.01, weight_decay=0.0, batch_size=10),
        federation=Federation(sites=sites, quorum=max(1, sites // 20), fraction=0.1),
        evaluation=Evaluation(validation_fraction=0.0, test_fraction=0.0),
    )


def prepare(root: Path, sites: int) -> int:
    """Writes what the raw loop and pfl need to do the same work; returns how many sites a round asks."""
    from client.train import seed_of
    from common.models import build, get_weights
    from server.rounds import drawn

    root.mkdir(parents=True, exist_ok=True)
    recipe, names = recipe_of(sites), names_of(sites)
    asked = [sorted(drawn(dict.fromkeys(names), recipe, number)) for number in range(1, ROUNDS + 1)]  # type: ignore[arg-type]
    training = recipe.training
    job = {
        "sites": [],
        "asked": asked,
        "images": IMAGES,
        "rounds": ROUNDS,
        "lr": training.lr,
        "momentum": training.momentum,
        "batch_size": training.batch_size,
        "seeds": {
            f"{number}/{name}": seed_of("train", recipe, number, name)
            for number, these in enumerate(asked, 1)
            for name in these
        },
    }
    (root / "job.json").write_text(json.dumps(job))
    np.savez(root / "small.npz", **get_weights(build(recipe)))  # type: ignore[arg-type]
    return len(asked[0])


class Made(Mapping[str, Any]):
    """Cohorts that are made when they are asked for, and not kept."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Any:
        return cohort(*made(name, IMAGES, SIZE))

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


def run(root: Path, sites: int) -> dict[str, Any]:
    """One federation of so many sites, through the simulation's own sites, grid and coordinator."""
    import torch

    from client import site as site_module
    from client.train import train
    from common.compute import compute_with
    from common.config import Settings, Simulation
    from common.models import build
    from common.storage import private_folder
    from simulations import run as simulation

    names, recipe = names_of(sites), recipe_of(sites)
    images = Clock(Made(names).__getitem__)

    class Counted(Made):
        def __getitem__(self, name: str) -> Any:
            return images(name)

    compute_with(1)
    build(recipe)  # the import of its library is no cost of a visit
    training, opening, logs = Clock(train), Clock(site_module.Site), Clock(simulation._audit)
    site_module.__dict__["train"] = training
    simulation.__dict__["Site"] = opening
    simulation.__dict__["_audit"] = logs
    folder = private_folder(Path(tempfile.mkdtemp(prefix="run-", dir=root)))
    settings = Settings(recipe=recipe, simulation=Simulation(device="cpu", threads=1), out=str(folder))
    audit, show = simulation._audit(folder, "server"), moments()
    began, busy = time.perf_counter(), time.process_time()
    cpu = torch.device("cpu")
    federated, _ = simulation._federate(settings, folder, names, Counted(names), audit, cpu, show)
    cpu_s = time.process_time() - busy
    questions = training.calls + 2 * sites  # all are asked who they are, and for the closing evaluation
    begin, *rounds, end = show.ends
    making_s = images.spent_s / images.calls  # of a site's images, which is the benchmark's own
    return {
        "rounds_s": [b - a for a, b in zip([begin, *rounds[:-1]], rounds, strict=True)],
        "hello_ms": 1e3 * ((begin - began) / sites - making_s),
        "closing_ms": 1e3 * ((end - rounds[-1]) / sites - making_s),
        "open_ms": 1e3 * (opening.spent_s + logs.spent_s) / opening.calls,
        "training_cpu_ms": 1e3 * training.cpu_s / training.calls,
        "beside_cpu_ms": 1e3 * (cpu_s - training.cpu_s - images.cpu_s) / questions,
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

    from client.train import train
    from common.models import build, get_weights

    targets_N = (np.arange(count) % 2).astype(np.int64)
    x_N = np.random.default_rng(0).normal(size=(count, 1, SIZE, SIZE)).astype(np.float32)
    site, model = cohort(x_N, targets_N), build(recipe)
    weights, cpu = get_weights(model), torch.device("cpu")
    work_ms = _cpu_ms(lambda: train(model, weights, site, recipe, round_=1, site="a", device=cpu), repeats=2)
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
