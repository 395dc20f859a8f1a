"""Many small sites: training them abreast, in one vectorised pass, against one after another.

    python benchmarks/abreast.py --out runs/bench/abreast.json
    python benchmarks/abreast.py --device cuda --out runs/bench/abreast_gpu.json

Whole federations through the simulation's own sites, grid and coordinator, in processes of their own and in turns; all
sites are asked in each round, and a round has everything: messages, checks, signed logs, a checkpoint. Told are a later
round, how far the two ends lie apart (over the way that the weights went), and what the simulation itself measured when
it chose: where it finds that a pass does not win, it trains one after another, whatever was asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import cohort, in_turns, machine, measured, moments, own_peak_mb, ratio, spread, tell
from raw_loop import made

SITES, SIZE, ROUNDS, WIDTH = 64, 28, 4, 32
CASES = ("small CNN", "scattering, private", "scattering and convolutions, private")
_FAR = 1e-3
"""Largest distance of the two ends, over the way that the weights went."""


def main() -> None:
    """Every case in processes of their own, or, called by itself, one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case, abreast, device, ends = arguments.one
        print(json.dumps(run(case, int(abreast), device, Path(ends))))
        return
    with tempfile.TemporaryDirectory(prefix="fedicom-abreast-") as folder:
        rows = [_row(Path(folder), case, arguments.device, arguments.repeats) for case in arguments.only]
    tell(
        {"machine": machine(), "device": arguments.device, "sites": SITES, "width": WIDTH, "rows": rows}, arguments.out
    )


def _row(folder: Path, case: str, device: str, repeats: int) -> dict[str, Any]:
    ends = {name: folder / f"{name}.npz" for name in ("one", "abreast")}
    ways = {
        name: partial(measured, [sys.executable, __file__, "--one", case, str(width), device, str(ends[name])])
        for name, width in (("one", 1), ("abreast", WIDTH))
    }
    runs = in_turns(ways, repeats, warm=False)
    later = {name: [float(np.median(run.says["rounds_s"][1:])) for run in part] for name, part in runs.items()}
    one, other = np.load(ends["one"]), np.load(ends["abreast"])
    off = sum(float(((other[key] - one[key]) ** 2).sum()) for key in one.files if not key.startswith("start/"))
    went = sum(
        float(((one[key] - one["start/" + key]) ** 2).sum()) for key in one.files if not key.startswith("start/")
    )
    away = (off / went) ** 0.5
    if not away < _FAR:
        sys.exit(f"{case}: the two ends are {away:.1e} of the way apart")
    return {
        "case": case,
        "visit_ms": {name: spread([1e3 * value / SITES for value in part]) for name, part in later.items()},
        "faster": ratio(later["one"], later["abreast"]),
        "pass_faster": spread([run.says["faster"] for run in runs["abreast"]]),
        "peak_mb": {name: spread([run.says["peak_mb"] for run in part]) for name, part in runs.items()},
        "away": away,
    }


def recipe_of(case: str) -> Any:
    """What a case trains: 40 images a site, a patient each."""
    from common.config import Evaluation, Federation, ModelConfig, Preprocessing, Privacy, Recipe, Training

    common = {
        "name": "abreast",
        "rounds": ROUNDS,
        "data": Preprocessing(size=(SIZE, SIZE)),
        "federation": Federation(sites=SITES, quorum=SITES),
        "evaluation": Evaluation(validation_fraction=0.0, test_fraction=0.0),
    }
    if case == "small CNN":
        model = ModelConfig(family="monai", name="resnet10", width=0.141, stem="small")
        return Recipe(**common, model=model, training=Training(optimizer="sgd", lr=0.01, batch_size=10))  # type: ignore[arg-type]
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=2.0, delta=1e-3, unsafe_seeded_noise=True)
    name = "linear" if case == "scattering, private" else "convolutions"
    training = Training(optimizer="sgd", lr=0.5 if name == "linear" else 0.05, batch_size=16, local_epochs=4)
    return Recipe(**common, model=ModelConfig(family="scattering", name=name), training=training, privacy=privacy)  # type: ignore[arg-type]


def run(case: str, abreast: int, device: str, ends: Path) -> dict[str, Any]:
    """One federation, and where it ended."""
    import torch

    from common.compute import compute_with
    from common.config import Settings, Simulation
    from common.models import build, get_weights
    from common.storage import private_folder
    from simulations import run as simulation

    recipe = recipe_of(case)
    names = tuple(f"s{number:03d}" for number in range(SITES))
    cohorts = {name: cohort(*made(name, 40, SIZE)) for name in names}
    compute_with(1)
    start = get_weights(build(recipe))

    folder = private_folder(Path(tempfile.mkdtemp(prefix="run-", dir=ends.parent)))
    settings = Settings(
        recipe=recipe, simulation=Simulation(device=device, threads=1, abreast=abreast), out=str(folder)  # type: ignore[arg-type]
    )  # fmt: skip
    audit, show = simulation._audit(folder, "server"), moments()
    federated, _ = simulation._federate(settings, folder, names, cohorts, audit, torch.device(device), show)
    weights = federated.state.weights
    np.savez(ends, **weights, **{"start/" + name: value for name, value in start.items()})  # type: ignore[arg-type]
    chosen = folder / "abreast.json"
    told = json.loads(chosen.read_text()) if chosen.exists() else {}
    return {
        "rounds_s": list(np.diff(show.ends[: ROUNDS + 1])),
        "faster": told.get(str(WIDTH), [0.0])[0],
        "peak_mb": own_peak_mb(),
        "digest": weights.digest,
    }


if __name__ == "__main__":
    main()
