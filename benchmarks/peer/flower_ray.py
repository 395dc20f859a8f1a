"""The work of raw_loop.py through Flower's own FedAvg and its Ray simulation: `flower_ray.py FOLDER MODEL OUT CPUS`."""

import json
import os
import sys
import time
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

HERE = str(Path(__file__).resolve().parent)
folder, kind, out, cpus = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3], int(sys.argv[4])
job = json.loads((folder / "job.json").read_text())

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    sys.path.insert(0, HERE)
    from one_trainer import trainer

    weights = {name: array.numpy() for name, array in message.content["arrays"].items()}
    site = job["sites"][int(context.node_config["partition-id"])]
    change = trainer(folder, kind)(weights, site, int(message.content["config"]["server-round"]))
    trained = {name: weights[name] + change[name] for name in weights}
    content = {
        "arrays": ArrayRecord({n: torch.from_numpy(v) for n, v in trained.items()}),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(RecordDict(content), reply_to=message)


ends: list[float] = []
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    start = np.load(folder / f"{kind}.npz")
    arrays = ArrayRecord({name: torch.from_numpy(start[name]) for name in start.files})
    count = len(job["sites"])

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        ends.append(time.perf_counter())
        return MetricRecord({"round": round_})

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    found = strategy.start(
        grid=grid, initial_arrays=arrays, num_rounds=job["rounds"], train_config=ConfigRecord(), evaluate_fn=evaluate
    )
    if out != "-":
        np.savez(out, **{name: array.numpy() for name, array in found.arrays.items()})


if __name__ == "__main__":
    run_simulation(
        server,
        app,
        num_supernodes=len(job["sites"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cpus, "log_to_driver": False, "include_dashboard": False},
        },
    )
    print(json.dumps({"rounds_s": list(np.diff(ends))}))
