"""The work of raw_loop.py through NVFLARE's FedAvg recipe and simulator: `nvflare_sim.py FOLDER MODEL OUT THREADS`."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv
from raw_loop import MODELS, ResNet


def main() -> None:
    folder, kind, out, threads = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3], int(sys.argv[4])
    job = json.loads((folder / "job.json").read_text())
    start = np.load(folder / f"{kind}.npz")
    network = ResNet(**MODELS[kind])
    network.load_state_dict({name: torch.from_numpy(start[name]) for name in start.files}, strict=False)
    first = folder / f"{kind}-first.pt"
    torch.save({"model": network.state_dict()}, first)
    work = Path(tempfile.mkdtemp(prefix="nvflare-"))
    marks = work / "marks.txt"
    try:
        recipe = FedAvgRecipe(
            name="bench",
            model={"class_path": "raw_loop.ResNet", "args": MODELS[kind]},
            initial_ckpt=str(first),
            min_clients=len(job["sites"]),
            num_rounds=job["rounds"],
            train_script=str(HERE / "nvflare_client.py"),
            train_args=f"{folder} {kind} {HERE.parent} {marks}",
            server_expected_format=ExchangeFormat.PYTORCH,
            aggregation_weights=dict.fromkeys(job["sites"], 1.0),
        )
        recipe.execute(SimEnv(clients=job["sites"], num_threads=threads, workspace_root=str(work)))
        if out != "-":
            found = next(path for path in work.rglob("*.pt") if "best" not in path.name.lower())
            saved = torch.load(found, map_location="cpu", weights_only=False)
            weights = saved.get("model", saved)
            np.savez(out, **{name: torch.as_tensor(value).numpy() for name, value in weights.items()})
        times = sorted(float(line) for line in marks.read_text().split())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    each = 2 * len(job["sites"])  # every site marks the begin and the end of its work
    rounds = [times[each * number : each * (number + 1)] for number in range(job["rounds"])]
    begins = [*(round_[0] for round_ in rounds), times[-1]]
    print(json.dumps({"rounds_s": list(np.diff(begins))}))


main()
