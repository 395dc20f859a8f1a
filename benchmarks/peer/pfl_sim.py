"""The work of raw_loop.py through pfl's FederatedAveraging and SimulatedBackend: `pfl_sim.py FOLDER MODEL OUT`.

pfl exchanges parameters alone, so the statistics of batch norms stay those of the site that was trained last.
"""

import json
import sys
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from measure import own_peak_mb
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from raw_loop import MODELS, ResNet, asked_in, batches, images
from torch.nn import functional

folder, kind, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
job = json.loads((folder / "job.json").read_text())
at_round = 1


class Network(ResNet):
    """With what pfl asks of a network."""

    def loss(self, x, y):
        self.train()
        return functional.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x, y):
        return {}


class Ordered(Dataset):
    """Gives the batches of the raw loop, in its order."""

    def iter(self, batch_size):
        x_N, y_N = self.raw_data
        for index_B in batches(job, self.user_id, at_round, len(x_N)):
            yield torch.from_numpy(x_N[index_B]), torch.from_numpy(y_N[index_B])


class Clock(TrainingProcessCallback):
    """When each round ended."""

    ends: list[float] = []

    def on_train_begin(self, *, model):
        self.ends.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        global at_round
        at_round += 1
        self.ends.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    images_of, asked = images(folder, job), asked_in(job)
    sites = chain(*asked, asked[0])  # pfl looks one ahead
    users = FederatedDataset(lambda site: Ordered(raw_data=images_of(site), user_id=site), lambda: next(sites))
    start = np.load(folder / f"{kind}.npz")
    network = Network(**MODELS[kind])
    network.load_state_dict({name: torch.from_numpy(start[name]) for name in start.files}, strict=False)
    model = PyTorchModel(
        network,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=job["momentum"], fused=True),
        torch.optim.SGD(network.parameters(), lr=1.0),
    )
    count = len(asked[0])
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=job["rounds"], evaluation_frequency=10**6, train_cohort_size=count, val_cohort_size=0
        ),
        SimulatedBackend(training_data=users, val_data=None),
        model,
        NNTrainHyperParams(local_learning_rate=job["lr"], local_num_epochs=1, local_batch_size=job["batch_size"]),
        NNEvalHyperParams(local_batch_size=256),
        callbacks=[Clock()],
    )
    if out != "-":
        np.savez(out, **{name: value.detach().numpy() for name, value in network.named_parameters()})
    print(json.dumps({"rounds_s": list(np.diff(Clock.ends)), "peak_mb": own_peak_mb()}))


main()
