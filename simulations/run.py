"""A whole federation on one machine, out of the deployed coordinator and sites."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from client.app import client_app
from client.cohort import Cohort, open_cohort
from client.ledger import Ledger, SitePolicy
from client.site import Limits, Site, package_versions
from common.audit import AuditLog
from common.config import Recipe, Settings, as_plain, recipe_from_json, settings_from_json
from common.errors import ConfigError, DataError, StorageError
from common.identity import Signer
from common.models import build
from common.samples import Samples, prepare_folder
from common.storage import private_folder, write_whole
from server.app import server_app
from server.conclude import Circumstances, Conclusion, conclude
from server.coordinator import Federated, coordinate
from server.rounds import RoundReport, ServerState, Transport
from simulations.baselines import baselines
from simulations.grid import InProcessGrid, Worker
from simulations.hospitals import CENTRAL
from simulations.phantoms import make_phantoms

_OWN = ("audit", "checkpoints", "keys", "sites", "tensorboard")
_OWN_FILES = ("report.html", "model.onnx", "model.ts.pt", "model_card.md", "summary.json", "run.json")
_NO_CAP = 1e6


class Show(Protocol):
    """Where progress is shown."""

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` pieces of `what` are finished."""

    def round(self, state: ServerState, report: RoundReport) -> None:
        """A round is safely on disk."""


class Silent:
    """Shows nothing."""

    def step(self, what: str, done: int, total: int) -> None: ...

    def round(self, state: ServerState, report: RoundReport) -> None: ...


def simulate(settings: Settings, show: Show | None = None) -> Conclusion:
    """Runs the recipe over virtual hospitals and writes everything into `settings.out`.

    Killed at any moment and called again with `resume=True`, it ends with the same weights: without
    privacy and with seeded noise to the bit.

    Raises:
        ConfigError: The folder of the run or of the hospitals does not fit the settings.
        DataError: A hospital's folder is no cohort; the message begins with its name.
        QuorumError: Too many sites failed.
        StorageError: The disk is full; resume goes on from the last round.
    """
    began, started = time.monotonic(), datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    show = show or Silent()
    recipe, out = settings.recipe, run_folder(settings)
    device = _device(settings)
    torch.set_num_threads(_threads(settings))
    _open_run(settings, out)
    hospitals = _hospitals(settings, out, show)
    names = site_folders(hospitals, recipe)
    cohorts = {name: _cohort(settings, out, name, show) for name in names}
    test = _central(settings, out, hospitals, show)
    audit = _audit(out, "server")
    federated = _federate(settings, out, names, cohorts, audit, device, show)
    compared = None
    if settings.baselines:
        if test is None:
            raise ConfigError(f"baselines=true compares on a central test set, but there is no folder {CENTRAL}/")
        finished: list[str] = []

        def trained(name: str) -> None:
            finished.append(name)
            show.step("Baselines", len(finished), len(names) + 1)

        compared = baselines(recipe, cohorts, test, device, trained)
    show.step("Evaluating and exporting", 0, 1)
    circumstances = Circumstances(
        started=started,
        wall_s=time.monotonic() - began,
        device=_device_name(device),
        versions=package_versions(),
        baselines=compared,
        refused_files={name: cohort.refused for name, cohort in cohorts.items()},
        notes=("The baselines were trained without privacy.",) if compared and recipe.privacy.active else (),
    )
    conclusion = conclude(
        federated, recipe, out, test=test, device=device, circumstances=circumstances, audit=audit,
        torchscript=settings.torchscript,
    )  # fmt: skip
    show.step("Evaluating and exporting", 1, 1)
    return conclusion


def run_folder(settings: Settings) -> Path:
    """Where the run writes."""
    return Path(settings.out) if settings.out is not None else Path("runs") / settings.recipe.name


def site_folders(hospitals: Path, recipe: Recipe) -> tuple[str, ...]:
    """Names of the hospitals in a folder, sorted: every folder with a labels.csv but the central one.

    Raises:
        ConfigError: There is none, or not as many as `federation.sites`.
    """
    if not hospitals.is_dir():
        raise ConfigError(f"simulation.hospitals: {hospitals} is no folder; make one with `fedicom hospitals`")
    names = tuple(sorted(path.parent.name for path in hospitals.glob("*/labels.csv") if path.parent.name != CENTRAL))
    if not names:
        raise ConfigError(
            f"simulation.hospitals: {hospitals} holds no hospital; expected one folder each with labels.csv and dicom/"
        )
    if len(names) != recipe.federation.sites:
        raise ConfigError(
            f"federation.sites is {recipe.federation.sites}, but {hospitals} holds {len(names)} hospitals "
            f"({', '.join(names[:8])}); say federation.sites={len(names)}"
        )
    return names


def worker_app(settings_json: str) -> ClientApp:
    """The ClientApp of a worker process, made from the settings alone."""
    settings = settings_from_json(settings_json)
    torch.set_num_threads(_threads(settings))
    return client_app(_sites(settings, run_folder(settings), {}, _device(settings)))


def _federate(
    settings: Settings,
    out: Path,
    names: tuple[str, ...],
    cohorts: Mapping[str, Cohort],
    audit: AuditLog,
    device: torch.device,
    show: Show,
) -> Federated:
    recipe = settings.recipe
    result: list[Federated] = []
    # one hello each, one visit each a round, one closing evaluation each
    counter = _Counter(show, len(names) * (recipe.rounds + 2))

    def main(transport: Transport) -> None:
        def on_round(state: ServerState, report: RoundReport) -> None:
            counter.at_least((report.round + 1) * len(names))
            show.round(state, report)

        result.append(coordinate(recipe, transport, out, audit=audit, resume=settings.resume, on_round=on_round))

    with _workers(settings) as workers:
        app = None if workers else client_app(_sites(settings, out, cohorts, device))
        grid = InProcessGrid(names, app, workers=workers, done=lambda name: counter.at_least(counter.done + 1))
        server_app(main)(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    counter.at_least(counter.total)
    return result[0]


class _Counter:
    def __init__(self, show: Show, total: int) -> None:
        self._show, self.total, self.done = show, total, 0
        show.step("Training", 0, total)

    def at_least(self, done: int) -> None:
        self.done = min(max(self.done, done), self.total)
        self._show.step("Training", self.done, self.total)


@contextmanager
def _workers(settings: Settings) -> Iterator[list[Worker]]:
    count = settings.simulation.workers
    text = json.dumps(as_plain(settings))
    workers = [Worker(worker_app, text) for _ in range(count)] if count > 1 else []
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def _sites(
    settings: Settings, out: Path, cohorts: Mapping[str, Cohort], device: torch.device
) -> Callable[[Context], Site]:
    recipe = settings.recipe

    @functools.cache
    def model() -> nn.Module:
        return build(recipe)  # one for all sites of this process: every visit overwrites all that is exchanged

    @functools.cache
    def site(name: str) -> Site:
        folder = private_folder(out / "sites" / name)
        return Site(
            name,
            recipe,
            cohorts.get(name) or _cohort(settings, out, name, Silent()),
            model,
            folder=folder,
            audit=_audit(out, name),
            ledger=_ledger(recipe, folder, name),
            device=device,
            limits=Limits(seeded_noise=True),
        )

    return lambda context: site(str(context.node_config["site"]))


def _ledger(recipe: Recipe, folder: Path, name: str) -> Ledger | None:
    privacy = recipe.privacy
    if not privacy.active:
        return None
    assert privacy.delta is not None
    policy = SitePolicy(epsilon=privacy.epsilon or _NO_CAP, delta=privacy.delta)
    ledger = Ledger(folder / "ledger.jsonl", name, policy)
    ledger.repair()
    return ledger


def _audit(out: Path, side: str) -> AuditLog:
    return AuditLog(out / "audit" / f"{side}.jsonl", Signer.load_or_create(out / "keys" / f"{side}.key"))


def _open_run(settings: Settings, out: Path) -> None:
    """Makes the run's folder, or takes it up again, or removes the run in it when that was asked for."""
    record = out / "run.json"
    try:
        earlier = json.loads(record.read_text()) if record.exists() else None
    except (OSError, ValueError):
        raise StorageError(f"{record} cannot be read; choose another out, or overwrite=true to start again") from None
    if earlier is None and out.exists() and any(out.iterdir()) and not settings.resume:
        mine = {*_OWN, *_OWN_FILES, "hospitals"}
        if foreign := [path.name for path in out.iterdir() if path.name not in mine and not path.name.startswith(".")]:
            raise ConfigError(f"out: {out} holds other files ({sorted(foreign)[0]}); choose an empty folder")
    if earlier is not None and settings.resume and earlier["recipe_id"] != settings.recipe.id:
        before = as_plain(recipe_from_json(json.dumps(earlier["recipe"])))
        changed = _changed(before, as_plain(settings.recipe))
        raise ConfigError(
            f"resume: {out} holds a run of another recipe (different: {', '.join(changed)}); "
            "give the same settings, or another out"
        )
    if earlier is not None and not settings.resume:
        if not settings.overwrite:
            raise ConfigError(
                f"out: {out} holds a run of recipe {earlier['recipe_id'][:12]} already; say resume=true to go on with "
                "it, overwrite=true to remove it and start again, or out=... for another folder"
            )
        for name in _OWN:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in _OWN_FILES:
            (out / name).unlink(missing_ok=True)
    private_folder(out)
    body = {"recipe_id": settings.recipe.id, "recipe": as_plain(settings.recipe)}
    write_whole(record, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode())


def _changed(before: object, now: object, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [where for key in keys for where in _changed(before.get(key), now.get(key), f"{path}.{key}".strip("."))]
    return [] if before == now else [path]


def _hospitals(settings: Settings, out: Path, show: Show) -> Path:
    simulation = settings.simulation
    if simulation.hospitals is not None:
        return Path(simulation.hospitals)
    if simulation.phantom.dimensions != settings.recipe.task.dimensions:
        raise ConfigError(
            f"simulation.phantom.dimensions is {simulation.phantom.dimensions}, but the task has "
            f"{settings.recipe.task.dimensions}; say simulation=phantom_{settings.recipe.task.dimensions}d, or "
            "simulation.hospitals=FOLDER for images of your own"
        )
    make_phantoms(
        out / "hospitals",
        simulation.phantom,
        settings.recipe.federation.sites,
        lambda done, total: show.step("Making phantom hospitals", done, total),
    )
    return out / "hospitals"


def _cohort(settings: Settings, out: Path, name: str, show: Show) -> Cohort:
    folder = _folder(settings, out)
    try:
        return open_cohort(
            folder / name,
            settings.recipe,
            cache=folder / "cache" / name,
            key=_site_key(name),
            progress=lambda done, total: show.step(f"Reading {name}", done, total),
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _central(settings: Settings, out: Path, hospitals: Path, show: Show) -> Samples | None:
    folder, recipe = hospitals / CENTRAL, settings.recipe
    if not folder.is_dir():
        return None
    try:
        return prepare_folder(
            folder, recipe.task, recipe.data, cache=hospitals / "cache" / CENTRAL, key=_site_key(CENTRAL),
            progress=lambda done, total: show.step(f"Reading {CENTRAL}", done, total),
        ).samples  # fmt: skip
    except DataError as error:
        raise DataError(f"{CENTRAL}: {error}") from None


def _folder(settings: Settings, out: Path) -> Path:
    chosen = settings.simulation.hospitals
    return Path(chosen) if chosen is not None else out / "hospitals"


def _site_key(name: str) -> bytes:
    # Public, so that simulations repeat; a deployed site has a secret one.
    return hashlib.sha256(f"simulated site {name}".encode()).digest()


def _device(settings: Settings) -> torch.device:
    wanted = settings.simulation.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("simulation.device is cuda, but torch sees no GPU; say simulation.device=auto or cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def _threads(settings: Settings) -> int:
    return settings.simulation.threads or max(1, (os.cpu_count() or 1) // settings.simulation.workers)
