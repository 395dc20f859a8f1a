"""A provisioned coordinator, and the sites of its federation in this process."""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.app import client_app
from client.cohort import Cohort
from client.ledger import Ledger
from client.policy import ledger_policy
from client.site import Site
from common.audit import AuditLog
from common.config import Evaluation, Federation, ModelConfig, Preprocessing, Privacy, Recipe, Task, Training
from common.deployment import FederationPlan, Policy, ServerHome
from common.identity import Signer
from common.models import build
from common.registry import Registry
from common.samples import Samples
from common.signed import SignedRecipe, read_recipe, sign_recipe
from common.supervise import Child
from server import runner
from server.api import Api
from server.app import FlowerTransport
from server.conclude import Conclusion
from server.control import Control, Parts
from server.provision import provision
from server.runs import Order, Run, utc_now
from simulations.grid import InProcessGrid

SITES = ("east", "north", "west")
SEEDED = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-3, unsafe_seeded_noise=True)
RECIPE = Recipe(
    name="tiny",
    rounds=2,
    task=Task(classes=("no nodule", "nodule")),
    data=Preprocessing(size=(8, 8)),
    model=ModelConfig(family="monai", name="resnet10", width=0.125, stem="small"),
    training=Training(batch_size=8, local_epochs=1.0, lr=3e-3),
    federation=Federation(sites=3, quorum=2, timeout_s=2.0),
    evaluation=Evaluation(bootstraps=100, min_cell=3),
    privacy=SEEDED,
)


@dataclass
class House:
    """The coordinator's folder, and the folders of three sites that live in this process."""

    kits: Path

    @property
    def home(self) -> ServerHome:
        return ServerHome(self.kits / "coordinator")

    @property
    def signer(self) -> Signer:
        return Signer.load(self.home.signing_key)

    def signed(self, recipe: Recipe = RECIPE, **federation: Any) -> SignedRecipe:
        """The recipe under the coordinator's signature."""
        return sign_recipe(replace(recipe, federation=replace(recipe.federation, **federation)), self.signer)

    def order(self, name: str, signed: SignedRecipe | None = None, **changes: Any) -> Run:
        """A run as the control process leaves it for the runner."""
        signed, run = signed or self.signed(), Run(self.home, name)
        run.path.mkdir(parents=True, exist_ok=True)
        signed.write(run.recipe_file)
        facts = {"run": name, "recipe_id": signed.recipe.id, "wanted": "running", "submitted": utc_now(), "by": "olga"}
        run.write_order(Order(**(facts | changes)))
        return run

    def sites(self, folder: str = "sites", recipe: Recipe = RECIPE) -> InProcessGrid:
        """A grid over the sites as a new process would open them: what they have stored is there."""
        site = functools.cache(lambda name: _site(self.kits / folder / name, name, recipe))
        return InProcessGrid(SITES, client_app(lambda context: site(str(context.node_config["site"]))))

    def connect(self, folder: str = "sites", change=lambda transport: transport):
        """The runner's way to these sites."""

        @contextmanager
        def connect(home, run, watch):
            recipe = read_recipe(Run(home, run).recipe_file, None).recipe
            yield change(FlowerTransport(self.sites(folder, recipe), watch=watch))

        return connect

    def reservations(self, folder: str = "sites") -> dict[str, int]:
        """Visits that each site's ledger has paid for."""
        lines = {name: (self.kits / folder / name / "ledger.jsonl").read_text().splitlines() for name in SITES}
        return {name: sum(json.loads(line)["kind"] == "reserve" for line in rows) for name, rows in lines.items()}


def _site(folder: Path, name: str, recipe: Recipe) -> Site:
    policy = Policy(epsilon=1e6, delta=1e-3, min_patients=1, min_cell=3, seeded_noise=True)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "ledger.jsonl", name, ledger_policy(policy))
    ledger.repair()
    return Site(
        name, recipe, _cohort(name), lambda: _model(recipe), folder=folder,
        audit=AuditLog(folder / "audit.jsonl", Signer.load_or_create(folder / "keys" / "own.key")),
        ledger=ledger, device=torch.device("cpu"), policy=policy, keep=True,
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


@pytest.fixture(scope="session")
def kits(tmp_path_factory) -> Path:
    """Kits as they are handed out; `house` copies them."""
    out = tmp_path_factory.mktemp("provisioned") / "kits"
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=SITES, auditors=("maria",)), out)
    return out


def unpacked(kits: Path, folder: Path) -> House:
    shutil.copytree(kits, folder)
    (folder / "coordinator" / "server.yaml").write_text("federation: trial\nlisten: 127.0.0.1\ndevice: cpu\n")
    return House(folder)


@pytest.fixture
def house(tmp_path, kits) -> House:
    return unpacked(kits, tmp_path / "kits")


@pytest.fixture(scope="session")
def quiet_house(tmp_path_factory, kits) -> House:
    """A house in which run `quiet` has finished, and nothing disturbed it; nobody may change it."""
    house = unpacked(kits, tmp_path_factory.mktemp("quiet") / "kits")
    house.order("quiet")
    with pytest.MonkeyPatch.context() as patch:
        no_conclusion(patch)
        assert runner.run(house.home, "quiet", connect=house.connect()) == runner.FINISHED
    return house


@pytest.fixture
def no_export(monkeypatch) -> None:
    """Leaves out what comes after the last round: evaluation and export take most of the time."""
    no_conclusion(monkeypatch)


def no_conclusion(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        runner,
        "conclude",
        lambda federated, *_, **__: Conclusion(
            report=None, exported=None, summary={"weight_digest": federated.state.weights.digest}
        ),
    )


# The coordinator's supervisor, over processes that do nothing

_STUB = """
trap 'exit 3' TERM
echo $$ >> "$1/starts"
while :; do
  if [ -f "$1/exit" ]; then code=$(cat "$1/exit"); rm "$1/exit"; exit "$code"; fi
  sleep 0.02 & wait $!
done
"""


def stub(name: str, folder: Path, script: str = _STUB) -> Child:
    """A process that runs until it is ended, or until its folder holds a file `exit` with a code."""
    folder.mkdir(parents=True, exist_ok=True)
    restart = not name.startswith("run-")
    return Child(name=name, command=["/bin/sh", "-c", script, name, str(folder)], restart=restart)


@dataclass
class Running:
    """A coordinator that serves in a thread of this process."""

    house: House
    script: str = _STUB
    registered: list[Registry] = field(default_factory=list)
    online: list[str] = field(default_factory=list)
    """Sites that are connected."""
    cleared: int = 0

    def __enter__(self) -> Running:
        home = self.house.home
        self.control = Control(home, self._parts())
        self.api = Api(self.control, None)
        self.api.start()
        self._thread = threading.Thread(target=self.control.serve, args=(self.api.port,))
        self._thread.start()
        self.until(lambda: self.control.status["registry"])
        return self

    def __exit__(self, *_: object) -> None:
        self.control.stop()
        self._thread.join()
        self.api.stop()

    def _parts(self) -> Parts:
        home = self.house.home

        def register(home: ServerHome, port: int, registry: Registry) -> tuple[str, ...]:
            self.registered.append(registry)
            return ()

        def stop_runs(home: ServerHome, port: int) -> int:
            self.cleared += 1
            return 0

        return Parts(
            superlink=lambda home, port: stub("superlink", home.superlink),
            gateway=lambda home, port: stub("gateway", home.run / "gateway"),
            runner=lambda home, name: stub(f"run-{name}", Run(home, name).path, self.script),
            wait_until_up=lambda home, port, timeout_s: None,
            register=register,
            stop_runs=stop_runs,
            online=lambda _, port: {number: home.registry.sites[site].node for number, site in enumerate(self.online)},
        )

    def until(self, found: Callable[[], object], seconds: float = 30.0) -> Any:
        """Waits for something true."""
        end = time.monotonic() + seconds
        while not (result := found()):
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.01)
        return result

    def starts(self, run: str) -> list[int]:
        """Process ids that worked on a run, in order."""
        path = Run(self.house.home, run).path / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def end(self, run: str, code: int, **status: Any) -> None:
        """Lets a run's process end, after it said how the run stands."""
        found = Run(self.house.home, run)
        if status:
            assert found.settle(**status)
        (found.path / "exit.new").write_text(str(code))
        (found.path / "exit.new").rename(found.path / "exit")

    def ask(
        self, method: str, path: str, body: bytes | None = None, token: str | None = "operator", **headers: str
    ) -> tuple[int, Any]:
        """Status and answer, from JSON where it is JSON; `token` is a role, or the token itself."""
        connection = HTTPConnection("127.0.0.1", self.api.port, timeout=20)
        if token is not None:
            headers["Authorization"] = f"Bearer {self.token(token)}"
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, json.loads(data) if answer.headers["Content-Type"] == "application/json" else data

    def token(self, role: str) -> str:
        """The token of the kit for this role."""
        files = {
            "operator": self.house.home.operator_token,
            "auditor": self.house.kits / "auditor-maria" / "auditor.token",
        }
        return files[role].read_text().strip() if role in files else role


@pytest.fixture
def running(house) -> Iterator[Running]:
    with Running(house) as made:
        yield made
