"""A provisioned coordinator, with processes that do nothing or with small sites."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from common.config import Evaluation, Federation, ModelConfig, Preprocessing, Privacy, Recipe, Task, Training
from common.deployment import ServerHome
from common.identity import Signer
from common.registry import Registry
from common.signed import SignedRecipe, read_recipe, sign_recipe
from common.supervise import Child
from server.api import Api
from server.control import Control, Parts
from server.runs import Order, Run, utc_now

SITES = ("east", "north", "west")
SEEDED = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-3, unsafe_seeded_noise=True)
RECIPE = Recipe(
    name="tiny",
    rounds=2,
    task=Task(classes=("no nodule", "nodule")),
    data=Preprocessing(size=(8, 8)),
    model=ModelConfig(family="monai", name="resnet10", width=0.125, stem="small"),
    training=Training(batch_size=8, local_epochs=1.0, lr=3e-3),
    federation=Federation(sites=3, quorum=2, timeout_s=20.0),
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

    def connect(self, folder: str = "sites", change=lambda transport: transport):
        """The runner's way to the sites of this folder."""
        from server.app import FlowerTransport
        from tests.server.small_sites import grid

        @contextmanager
        def connect(home, run, watch):
            recipe = read_recipe(Run(home, run).recipe_file, None).recipe
            # closed: what ends this process ends its sites, and none works on beside those that are opened next
            with closing(grid(self.kits / folder, recipe)) as sites:
                yield change(FlowerTransport(sites, watch=watch))

        return connect

    def reservations(self, folder: str = "sites") -> dict[str, int]:
        """Visits that each site's ledger has paid for."""
        lines = {name: (self.kits / folder / name / "ledger.jsonl").read_text().splitlines() for name in SITES}
        return {name: sum(json.loads(line)["kind"] == "reserve" for line in rows) for name, rows in lines.items()}


def unpacked(kits: Path, folder: Path) -> House:
    """A house of its own, out of the kits."""
    shutil.copytree(kits, folder)
    (folder / "coordinator" / "server.yaml").write_text("federation: trial\nlisten: 127.0.0.1\ndevice: cpu\n")
    return House(folder)


# The coordinator's supervisor, over processes that do nothing

_STUB = """
trap 'exit 3' TERM
echo $$ >> "$1/starts"
while :; do
  if [ -f "$1/exit" ]; then code=$(cat "$1/exit"); rm "$1/exit"; exit "$code"; fi
  sleep 0.05 & wait $!
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
        self.until(lambda: (status := self.control.status)["registry"] and not status["down"])
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
