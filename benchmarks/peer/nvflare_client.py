"""What NVFLARE runs at each site, copied to where it likes: raw_loop.py's training."""

import json
import sys
import time
from pathlib import Path

import nvflare.client as flare
import torch


def main() -> None:
    folder, kind, benchmarks, marks = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    sys.path.insert(0, benchmarks)
    from raw_loop import Trainer

    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    flare.init()
    site = flare.get_site_name()
    train = Trainer(folder, kind, job)
    while flare.is_running():
        given = flare.receive()
        if given is None:
            break
        _mark(marks)
        weights = {name: value.numpy() if hasattr(value, "numpy") else value for name, value in given.params.items()}
        change = train(weights, site, int(given.current_round) + 1)
        trained = {n: torch.as_tensor(value + change[n] if n in change else value) for n, value in weights.items()}
        flare.send(flare.FLModel(params=trained, metrics={"accuracy": 0.0}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
        _mark(marks)


def _mark(file: Path) -> None:
    with file.open("a") as out:
        out.write(f"{time.time()}\n")


main()
