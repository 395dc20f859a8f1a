"""Three small sites with made-up patients, in this process."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import numpy as np
import torch

from client.app import client_app
from client.cohort import Cohort
from client.ledger import Ledger
from client.policy import ledger_policy
from client.site import Site
from common.audit import AuditLog
from common.config import Recipe
from common.deployment import Policy
from common.identity import Signer
from common.models import build
from common.samples import Samples
from server import runner
from server.conclude import Conclusion
from simulations.grid import InProcessGrid
from tests.server.house import SITES

_TURN = threading.Lock()
"""One model serves all sites, and the grid asks several at once."""


def grid(folder: Path, recipe: Recipe) -> InProcessGrid:
    """The sites of this folder as a new process would open them: what they have stored is there."""
    site = functools.cache(lambda name: _site(folder / name, name, recipe))
    return InProcessGrid(SITES, client_app(lambda context: site(str(context.node_config["site"]))))


def no_conclusion(patch) -> None:
    """Leaves out what comes after the last round: evaluation and export take most of the time."""
    patch.setattr(
        runner,
        "conclude",
        lambda federated, *_, **__: Conclusion(
            report=None, exported=None, summary={"weight_digest": federated.state.weights.digest}
        ),
    )


def _site(folder: Path, name: str, recipe: Recipe) -> Site:
    policy = Policy(epsilon=1e6, delta=1e-3, min_patients=1, min_cell=3, seeded_noise=True)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "ledger.jsonl", name, ledger_policy(policy))
    ledger.repair()
    return Site(
        name, recipe, _cohort(name), lambda: _model(recipe), folder=folder,
        audit=AuditLog(folder / "audit.jsonl", Signer.load_or_create(folder / "keys" / "own.key")),
        ledger=ledger, device=torch.device("cpu"), policy=policy, keep=True,
        turn=_TURN,
    )  # fmt: skip


@functools.cache
def _model(recipe: Recipe) -> torch.nn.Module:
    return build(recipe)  # one for all sites of all tests: every visit overwrites all that is exchanged


def _cohort(name: str, train: int = 8, validation: int = 6, test: int = 4) -> Cohort:
    count = train + validation + test
    rng = np.random.default_rng(list(name.encode()))
    targets_N = (np.arange(count) % 2).astype(np.int64)
    x_N = (rng.normal(size=(count, 1, 8, 8)) + targets_N[:, None, None, None]).astype(np.float32)
    samples = Samples(x_N, targets_N, np.arange(count), tuple(f"{n:04d}" for n in range(count)), {}, "")
    return Cohort(samples, np.repeat(["train", "validation", "test"], [train, validation, test]), "a" * 64, {})
