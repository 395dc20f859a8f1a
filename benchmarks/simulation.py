"""A simulated federation against the raw loop that does the same SGD steps: whole processes, rounds, memory.

    python benchmarks/simulation.py --out runs/bench/simulation.json

8 hospitals with 200 images of 28 x 28 each as DICOM, batches of 32, one epoch a round, 5 rounds of federated averaging
with a small CNN (98 thousand parameters) and a ResNet-18 (11 million). `raw_loop.py` does the same steps without
Fedicom; the run fails when the two ends differ in one bit. Fedicom is `simulations.run.simulate` as the command line
calls it, over hospitals whose images were prepared before (reading them is not in the raw loop either), without what
follows the last round (central evaluation, ONNX export and report), whose time is given in a line of its own. Messages,
checks, signed logs, a durable checkpoint after every round and the closing visit are in it.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import Run, in_turns, machine, measured, own_peak_mb, ratio, spread, tell

SITES, IMAGES, SIZE, ROUNDS = 8, 200, 28, 5
MODELS = ("small", "resnet18")
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measures everything, or, called by itself, runs one federation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        atexit.register(gc.freeze)  # as `fedicom` does
        folder, model, workers, *rest = arguments.one
        print(json.dumps(federation(Path(folder), model, int(workers), conclusion="conclude" in rest)))
        return
    root = Path(tempfile.mkdtemp(prefix="fedicom-simulation-"))
    try:
        found = measure(root, arguments.models, arguments.workers, arguments.repeats)
    finally:
        shutil.rmtree(root)
    tell(found, arguments.out)


def measure(root: Path, models: list[str], workers: list[int], repeats: int) -> dict[str, Any]:
    """Every model with every number of workers, in turns with the raw loop of as many processes."""
    prepare(root)
    rows = []
    for model in models:
        for count in workers:

            def raw(tree: bool = False, model: str = model, count: int = count) -> Run:
                return measured(
                    [sys.executable, str(HERE / "raw_loop.py"), str(root), model, str(count)], whole_tree=tree
                )

            def ours(tree: bool = False, model: str = model, count: int = count) -> Run:
                return measured([sys.executable, __file__, "--one", str(root), model, str(count)], whole_tree=tree)

            runs = in_turns({"raw": raw, "fedicom": ours}, repeats)
            digests = {run.says["digest"] for part in runs.values() for run in part}
            if len(digests) != 1:
                sys.exit(f"{model}, {count} workers: the final weights differ: {sorted(digests)}")
            peak = {name: way(tree=True).peak_mb for name, way in (("raw", raw), ("fedicom", ours))}
            rows.append(_row(model, count, runs, peak))
    concluded = measured([sys.executable, __file__, "--one", str(root), models[0], "1", "conclude"])
    start = [measured([sys.executable, "-c", "import torch; print('{}')"]).wall_s for _ in range(3)]
    return {
        "machine": machine(),
        "import_torch_s": spread(start),
        "conclusion_s": concluded.says["conclusion_s"],
        "rows": rows,
    }


def _row(model: str, workers: int, runs: dict[str, list[Run]], peak: dict[str, float]) -> dict[str, Any]:
    def total(run: Run) -> float:
        return float(sum(run.says["rounds_s"]))

    def later(run: Run) -> float:
        return float(np.median(run.says["rounds_s"][1:]))

    row: dict[str, Any] = {"model": model, "workers": workers, "digest": runs["raw"][0].says["digest"]}
    for what, of in (("wall_s", lambda run: run.wall_s), ("rounds_s", total), ("later_round_s", later)):
        values = {name: [of(run) for run in part] for name, part in runs.items()}
        row[what] = {name: spread(part) for name, part in values.items()}
        row[what]["ratio"] = ratio(values["fedicom"], values["raw"])
    row["start_s"] = {name: spread([run.wall_s - total(run) for run in part]) for name, part in runs.items()}
    row["peak_mb"] = {**peak, "ratio": peak["fedicom"] / peak["raw"]}
    return row


def prepare(root: Path) -> None:
    """Hospitals of random images, their prepared samples as arrays for the raw loop, and the first weights."""
    from client.cohort import open_cohort
    from client.train import seed_of
    from common.models import build, get_weights
    from simulations.hospitals import import_medmnist
    from simulations.partition import Iid
    from simulations.run import _site_key, site_folders

    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", SITES * IMAGES), ("val", 2), ("test", 2)):
        splits[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
        noise = rng.normal(100, 40, (count, SIZE, SIZE)) + 30 * splits[f"{split}_labels"][:, :, None]
        splits[f"{split}_images"] = noise.clip(0, 255).astype(np.uint8)
    # `val` goes to the hospitals as well: 200 each, and two of them one more, which the raw loop gets too
    np.savez(root / "benchmark.npz", **splits)  # type: ignore[arg-type]
    import_medmnist(
        root / "benchmark.npz", root / "hospitals", SITES, Iid(), modality="CR", dimensions=2,
        classes=("negative", "positive"),
    )  # fmt: skip
    settings = settings_of(root, "small", 1)
    recipe = settings.recipe
    names = site_folders(root / "hospitals", recipe)
    for name in names:
        cohort = open_cohort(
            root / "hospitals" / name, recipe, cache=root / "hospitals" / "cache" / name, key=_site_key(name)
        )
        chosen = cohort.indices("train")
        np.savez(root / f"{name}.npz", x=cohort.samples.x_N[chosen], y=cohort.samples.targets_N[chosen])
    for model in MODELS:
        np.savez(root / f"{model}.npz", **get_weights(build(settings_of(root, model, 1).recipe)))  # type: ignore[arg-type]
    job = {
        "sites": list(names),
        "rounds": ROUNDS,
        "lr": recipe.training.lr,
        "momentum": recipe.training.momentum,
        "batch_size": recipe.training.batch_size,
        "seeds": {
            f"{round_}/{name}": seed_of("train", recipe, round_, name)
            for round_ in range(1, ROUNDS + 1)
            for name in names
        },
    }
    (root / "job.json").write_text(json.dumps(job))


def settings_of(root: Path, model: str, workers: int) -> Any:
    """What `fedicom simulate` would be told."""
    from common.config import load_settings

    network = {
        "small": ["model.family=monai", "model.name=resnet10", "model.width=0.141", "model.stem=small"],
        "resnet18": ["model.family=timm", "model.name=resnet18", "model.width=1", "model.stem=default"],
    }[model]
    return load_settings(
        [
            "recipe=pneumonia_xray_plain", f"name=benchmark_{model}", f"rounds={ROUNDS}", "privacy=none", *network,
            f"data.size=[{SIZE},{SIZE}]", "data.augmentation.probability=0", "task.classes=[negative,positive]",
            "training.optimizer=sgd", "training.lr=0.01", "training.momentum=0.9", "training.weight_decay=0",
            "training.schedule=constant", "training.warmup_rounds=0", "training.batch_size=32",
            "training.local_epochs=1", f"federation.sites={SITES}", f"federation.quorum={SITES}",
            "federation.strategy=fedavg", "federation.site_weights=equal", "evaluation.validation_fraction=0",
            "evaluation.test_fraction=0", f"simulation.hospitals={root / 'hospitals'}", "simulation.device=cpu",
            "simulation.threads=1", f"simulation.workers={workers}", f"out={root / 'run'}", "overwrite=true",
            "task.laterality_sensitive=true", "task.subgroups=[]",
        ]
    )  # fmt: skip


def federation(root: Path, model: str, workers: int, *, conclusion: bool) -> dict[str, Any]:
    """One simulation in this process; times of its rounds as the coordinator saw them."""
    began = time.perf_counter()
    settings = settings_of(root, model, workers)
    settings = replace(settings, out=str(root / f"run-{model}-{workers}"))
    from common.imports import importing

    with importing():  # as `fedicom` does
        from server import conclude as conclusion_module
        from simulations import run
        from simulations.run import Silent

    concluded: list[float] = []
    whole = conclusion_module.conclude

    def conclude(federated: Any, *words: Any, **more: Any) -> Any:
        at = time.perf_counter()
        if conclusion:
            whole(federated, *words, **more)
        concluded.append(time.perf_counter() - at)
        return federated

    run.__dict__["conclude"] = conclude

    class Clock(Silent):
        rounds: list[tuple[str, float]]

        def round(self, state: Any, report: Any) -> None:
            self.rounds.append((report.work, time.perf_counter()))

        def step(self, what: str, done: int, total: int) -> None:
            if what == "Training" and not self.rounds:
                self.rounds.append(("begin", time.perf_counter()))

    clock = Clock()
    clock.rounds = []
    federated: Any = run.simulate(settings, clock)
    ends = [at for work, at in clock.rounds if work in ("begin", "train")]
    return {
        "digest": federated.state.weights.digest,
        "ready_s": ends[0] - began,
        "rounds_s": list(np.diff(ends)),
        "conclusion_s": concluded[0],
        "peak_mb": own_peak_mb(),
    }


if __name__ == "__main__":
    main()
