"""The same federation through the peers: Flower's Ray simulation, NVFLARE's simulator, pfl.

    make bench-peers
    python benchmarks/peers.py --only pfl --models small --repeats 1

Eight sites with 200 images, five rounds, as in simulation.py. Every peer trains with the very code of raw_loop.py (same
network, same first weights, same batches in the same order), so that only its own machinery differs; its final
parameters are held against the raw loop's. Each peer has an environment of its own in runs/peers/; whole processes, in
turns, from start to end. Then the many tiny sites of scale.py through pfl.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, Run, in_turns, machine, measured, ratio, spread, tell
from scale import prepare as prepare_tiny
from scale import ways as tiny_ways
from simulation import MODELS, prepare

PEERS = {
    "flower": ("flwr[simulation]==1.41.0", "flower_ray.py", ("2",)),
    "nvflare": ("nvflare==2.9.0", "nvflare_sim.py", ("2",)),
    "pfl": ("pfl==0.6.0", "pfl_sim.py", ()),
}
NAMES = {"flower": "Flower 1.41, Ray, 2 actors", "nvflare": "NVFLARE 2.9 simulator, 2 threads", "pfl": "pfl 0.6"}
ONCE = ("nvflare",)
"""Minutes a run: measured once, by the run whose parameters are held against the raw loop's."""
TORCH = "torch==2.13.0"
ENVIRONMENTS = ROOT / "runs" / "peers"
HERE = Path(__file__).resolve().parent
_FAR = 1e-2
"""Largest distance of a peer's final parameters from the raw loop's, over the way that they went. A site left out of
one round is 5e-2 away; peers that send whole weights, and so round them once a visit, up to 3.4e-3: the raw loop itself
ends 1e-6 to 5e-4 away when the first layer begins one rounding beside."""


def main() -> None:
    """Installs what is missing, runs all in turns, and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "peers.json", help="JSON file")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", nargs="*", type=int, default=[1000, 10000], help="numbers of tiny sites, for pfl")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pythons = {name: environment(name) for name in arguments.only}
    with tempfile.TemporaryDirectory(prefix="fedicom-peers-") as folder:
        root = Path(folder)
        prepare(root)
        rows = [_row(root, model, pythons, arguments.repeats) for model in arguments.models]
        counts = arguments.tiny if "pfl" in pythons else []
        tiny = [_tiny(root / f"tiny-{count}", count, pythons["pfl"], arguments.repeats) for count in counts]
    tell({"machine": machine(), "names": NAMES, "rows": rows, "tiny": tiny}, arguments.out)


def environment(name: str) -> Path:
    """The Python of a peer's own environment, made where it is missing."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", TORCH, PEERS[name][0]]
        subprocess.run([str(python), *words], check=True)
        (folder / ".ready").touch()
    return python


def _row(root: Path, model: str, pythons: dict[str, Path], repeats: int) -> dict[str, Any]:
    measured([sys.executable, str(HERE / "raw_loop.py"), str(root), model, "1", str(root / f"{model}-end.npz")])
    ways: dict[str, Any] = {
        f"raw, {count}": partial(measured, [sys.executable, str(HERE / "raw_loop.py"), str(root), model, str(count)])
        for count in (1, 2)
    }
    for count in (1, 2):
        words = [sys.executable, str(HERE / "simulation.py"), "--one", str(root), model, str(count)]
        ways[f"fedicom, {count}"] = partial(measured, words)
    first: dict[str, Run] = {}
    for name, python in pythons.items():
        _, script, more = PEERS[name]
        words = [str(python), str(HERE / "peer" / script), str(root), model]
        ways[name] = partial(_quiet, [*words, "-", *more])
        first[name] = _quiet([*words, str(root / f"{name}.npz"), *more])
    away = {name: _away(root, model, name) for name in pythons}  # before an hour is spent on other work
    runs = in_turns({name: way for name, way in ways.items() if name not in ONCE}, repeats, warm=False)
    runs |= {name: [run] for name, run in first.items() if name in ONCE}
    return {
        "model": model,
        "wall_s": {name: spread([run.wall_s for run in part]) for name, part in runs.items()},
        "rounds_s": {name: spread([sum(run.says["rounds_s"]) for run in part]) for name, part in runs.items()},
        "later_round_s": {
            name: spread([float(np.median(run.says["rounds_s"][1:])) for run in part]) for name, part in runs.items()
        },
        "slower_than_fedicom": {
            name: {
                str(count): ratio(
                    [run.wall_s for run in runs[name]],
                    [run.wall_s for run in runs[f"fedicom, {count}"][: len(runs[name])]],
                )
                for count in (1, 2)
            }
            for name in pythons
        },
        "away": away,
    }


def _tiny(root: Path, sites: int, python: Path, repeats: int) -> dict[str, Any]:
    asked = prepare_tiny(root, sites)
    words = [str(python), str(HERE / "peer" / PEERS["pfl"][1]), str(root), "small"]
    ways: dict[str, Callable[[], Run]] = {**tiny_ways(root, sites), "pfl": partial(_quiet, [*words, "-"])}
    measured([sys.executable, str(HERE / "raw_loop.py"), str(root), "small", "1", str(root / "small-end.npz")])
    _quiet([*words, str(root / "pfl.npz")])
    runs = in_turns(ways, repeats if sites <= 1000 else 1, warm=False)
    later = {name: [float(np.median(run.says["rounds_s"][1:])) for run in part] for name, part in runs.items()}
    return {
        "sites": sites,
        "asked": asked,
        "wall_s": {name: spread([run.wall_s for run in part]) for name, part in runs.items()},
        "visit_ms": {name: spread([1e3 * value / asked for value in part]) for name, part in later.items()},
        "slower_than_fedicom": ratio(later["pfl"], later["fedicom"]),
        "away": _away(root, "small", "pfl"),
    }


def _quiet(words: list[str]) -> Run:
    return measured(words, environment={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HOME": os.environ["HOME"]})


def _away(root: Path, model: str, name: str) -> float:
    """How far a peer ended from the raw loop, over how far that went; parameters only.

    Raises:
        SystemExit: Too far: it did other work.
    """
    ends = np.load(root / f"{model}-end.npz")
    found, start = np.load(root / f"{name}.npz"), np.load(root / f"{model}.npz")
    keys = [key for key in found.files if key in start.files and "running" not in key]
    off = sum(float(((found[key] - ends[key]) ** 2).sum()) for key in keys)
    went = sum(float(((ends[key] - start[key]) ** 2).sum()) for key in keys)
    away = float((off / went) ** 0.5)
    if not keys or not away < _FAR:
        sys.exit(f"{name}, {model}: its parameters are {away:.1e} of the way from the raw loop's: it did other work")
    return away


if __name__ == "__main__":
    main()
