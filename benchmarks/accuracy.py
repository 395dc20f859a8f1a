"""What federation and privacy cost in accuracy, on real images: a table and a JSON file.

    python benchmarks/accuracy.py DATA_FOLDER --out runs/accuracy --seeds 0 1 2 --jobs 2
    python benchmarks/accuracy.py DATA_FOLDER --epsilons 8 3 1 --only breast_ultrasound

DATA_FOLDER holds the MedMNIST files (pneumoniamnist*.npz, breastmnist.npz, adrenalmnist3d.npz). Each becomes DICOM at
five hospitals (Dirichlet 0.5, one partition for all seeds); the seeds change initial weights, order of the samples and
augmentation; sites alone are trained with the first seed only. A run
whose summary.json is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DATASETS = {
    "pneumonia_xray": "pneumoniamnist*.npz",
    "breast_ultrasound": "breastmnist.npz",
    "adrenal_ct": "adrenalmnist3d.npz",
}
NAMES = {
    "pneumonia_xray": "PneumoniaMNIST (2D)",
    "breast_ultrasound": "BreastMNIST (2D)",
    "adrenal_ct": "AdrenalMNIST3D (3D)",
}
PARTITION = ("--sites", "5", "--partition", "dirichlet", "--alpha", "0.5", "--seed", "0")


def main() -> None:
    """Imports, runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--epsilons", nargs="*", default=["none", "8", "3", "1"], help="none is the recipe without")
    parser.add_argument("--only", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    arguments = parser.parse_args()
    for name in arguments.only:
        _import(name, arguments.data, arguments.out)
    jobs = [(name, kind, seed) for seed in arguments.seeds for name in arguments.only for kind in arguments.epsilons]
    first = [job for job in jobs if job[1:] == (arguments.epsilons[0], arguments.seeds[0])]  # prepares the cache once
    for batch in (first, [job for job in jobs if job not in first]):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda job: _run(job, arguments.out, arguments.seeds[0]), batch))
    rows = {name: _row(name, arguments.epsilons, arguments.seeds, arguments.out) for name in arguments.only}
    (arguments.out / "accuracy.json").write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n")
    print(table(rows))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean over seeds, and standard deviation where there are several."""
    epsilons = list(dict.fromkeys(epsilon for row in rows.values() for epsilon in row["federated"]))
    columns = ["centralised", *(f"federated, epsilon {epsilon}" for epsilon in epsilons), "best single site"]
    lines = [f"| data as DICOM, 5 sites, Dirichlet 0.5 | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, row in rows.items():
        found = [row["centralised"], *(row["federated"].get(epsilon, []) for epsilon in epsilons), row["best_single"]]
        lines.append(f"| {NAMES[name]}, test AUROC | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def _import(name: str, data: Path, out: Path) -> None:
    found = sorted(data.glob(DATASETS[name]))
    if not found:
        sys.exit(f"{data} holds no {DATASETS[name]}; see docs/results.md for where the files come from")
    _fedicom("hospitals", "import", str(found[0]), str(out / "hospitals" / name), *PARTITION, log=None)


def _run(job: tuple[str, str, int], out: Path, first_seed: int) -> None:
    name, kind, seed = job
    folder = out / f"{name}-{kind}-{seed}"
    if (folder / "summary.json").exists():
        return
    recipe = f"{name}_plain" if kind == "none" else name
    baselines = "false" if kind != "none" else "true" if seed == first_seed else "centralised"
    budget = () if kind == "none" else (f"privacy.epsilon={kind}",)
    again = "resume=true" if (folder / "run.json").exists() else "resume=false"
    folder.parent.mkdir(parents=True, exist_ok=True)
    _fedicom(
        "simulate", f"recipe={recipe}", f"seed={seed}", f"simulation.hospitals={out / 'hospitals' / name}",
        f"out={folder}", f"baselines={baselines}", "simulation.threads=1", again, *budget,
        log=out / f"{folder.name}.log",
    )  # fmt: skip


def _row(name: str, epsilons: list[str], seeds: list[int], out: Path) -> dict[str, Any]:
    runs = {
        epsilon: [json.loads((out / f"{name}-{epsilon}-{seed}" / "summary.json").read_text()) for seed in seeds]
        for epsilon in epsilons
    }
    plain = runs.get("none", [])
    return {
        "seeds": seeds,
        "recipe_ids": {epsilon: [run["recipe_id"] for run in found] for epsilon, found in runs.items()},
        "centralised": [run["baselines"]["centralised"]["auroc"] for run in plain],
        "federated": {epsilon: [run["global"]["auroc"] for run in found] for epsilon, found in runs.items()},
        "best_single": [max(site["auroc"] for site in plain[0]["baselines"]["alone"].values())] if plain else [],
        "epsilon": {
            epsilon: [max(site["epsilon"] for site in run["sites"].values()) for run in found]
            for epsilon, found in runs.items()
            if epsilon != "none"
        },
        "wall_s": {epsilon: [run["wall_s"] for run in found] for epsilon, found in runs.items()},
    }


def _fedicom(*words: str, log: Path | None) -> None:
    command = [sys.executable, "-m", "fedicom", *words]
    done = subprocess.run(command, capture_output=log is not None, text=True, check=False)
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}; see {log}")


if __name__ == "__main__":
    main()
