"""A whole federation on one machine, out of the deployed coordinator and sites."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from client.app import client_app
from client.cohort import Cohort, fractions, frozen_fractions, open_cohort
from client.ledger import Ledger
from client.policy import ledger_policy
from client.secure import Sums
from client.site import Site
from common.audit import AuditLog
from common.compute import compute_with, device_of
from common.config import Recipe, Settings, as_plain, settings_from_json
from common.deployment import Policy
from common.errors import ConfigError, DataError
from common.exchange import NAME_PATTERN, Answer, Ask, Failure, Hello, Refusal, Reply, RoundPlan
from common.identity import Signer
from common.installed import package_versions
from common.models import build
from common.privacy_audit import PrivacyAudit
from common.samples import Samples, prepare_folder
from common.shard import Storage, read_secret
from common.storage import Flush, all_to_disk, storing, to_disk, to_system
from server.app import State, server_app
from server.conclude import Circumstances, Conclusion, conclude
from server.coordinator import Federated, coordinate
from server.report import Baselines
from server.rounds import RoundReport, ServerState, Transport, behind
from server.secure import Take
from simulations import on_ray
from simulations.baselines import baselines
from simulations.folder import (
    LogFile,
    alone_in,
    check_folder,
    earlier_record,
    log_file,
    record_of,
    run_folder,
    take_folder,
)
from simulations.grid import InProcessGrid, Worker
from simulations.overlap import overlap
from simulations.partition import CENTRAL

if TYPE_CHECKING:
    from simulations.abreast import Abreast

_NO_CAP = 1e6
_AHEAD, _LARGE = 2, 1_000_000
"""Visits under way in one process, one training, the other hashing, from so many numbers on; of smaller models the
bookkeeping is Python's, which would only take turns with the training."""
_OPEN = 256
"""Sites held open at once; one that was closed is opened again from its files."""
_LOGS = 4096
"""Logs held open at once, a few kB each; one that was closed is checked again."""
_CORES = torch.get_num_threads()
"""Torch's own count before anybody sets another: it knows OMP_NUM_THREADS and the cores of this process."""


class Show(Protocol):
    """Where progress is shown."""

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` pieces of `what` are finished."""

    def round(self, state: ServerState, report: RoundReport) -> None:
        """A round is over."""

    def absent(self, site: str, why: str) -> None:
        """A site takes no part in the rounds."""


class Silent:
    """Shows nothing."""

    def step(self, what: str, done: int, total: int) -> None: ...
    def round(self, state: ServerState, report: RoundReport) -> None: ...
    def absent(self, site: str, why: str) -> None: ...


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
    if settings.simulation.backend == "ray":
        on_ray.check(settings)
    if settings.simulation.abreast > 1 and (settings.simulation.workers > 1 or settings.simulation.backend == "ray"):
        raise ConfigError(
            f"simulation.abreast is {settings.simulation.abreast}, which trains sites together in one process; say "
            "simulation.workers=1 and simulation.backend=process, or simulation.abreast=1"
        )
    check_folder(settings, out)
    with _workers(settings, device) as workers, alone_in(out), log_file(out):
        compute_with(_threads(settings))
        if not workers:
            _network(recipe)  # now: what cannot be built is told before an hour of reading
        hospitals = _hospitals(settings, out, show)
        names = site_folders(hospitals, recipe)
        divided = _divided_before(settings, out, names)
        cohorts = {name: _cohort(settings, out, name, show) for name in names}
        test = _central(settings, hospitals, show)
        take_folder(settings, out)
        audit = _audit(out, "server")
        federated, absent = _federate(settings, out, names, cohorts, audit, device, show, workers)
        compared = _compare(settings, cohorts, behind(federated.state), test, device, show)
        show.step("Evaluating and exporting", 0, 1)
        circumstances = Circumstances(
            started=started,
            wall_s=time.monotonic() - began,
            device=_device_name(device),
            versions=package_versions(),
            baselines=compared,
            refused_files={name: cohort.refused for name, cohort in cohorts.items()},
            notes=(
                *(("The baselines were trained without privacy.",) if compared and recipe.privacy.active else ()),
                *divided,
                *overlap(hospitals, names),
                *_left_out(names, federated, absent),
            ),
        )
        conclusion = conclude(
            federated, recipe, out, test=test, device=device, circumstances=circumstances, audit=audit,
            torchscript=settings.torchscript, int8=settings.int8,
            prove=lambda weights: _prove(recipe, cohorts, weights, device, show),
        )  # fmt: skip
        show.step("Evaluating and exporting", 1, 1)
    return conclusion


def site_folders(hospitals: Path, recipe: Recipe) -> tuple[str, ...]:
    """Names of the hospitals in a folder, sorted: every folder with a labels.csv but the central one.

    Raises:
        ConfigError: There is none, or not as many as `federation.sites`, or a folder's name is no site name.
    """
    if not hospitals.is_dir():
        raise ConfigError(f"simulation.hospitals: {hospitals} is no folder; make one with `fedicom hospitals`")
    names = tuple(sorted(path.parent.name for path in hospitals.glob("*/labels.csv") if path.parent.name != CENTRAL))
    bare = sorted(path.parent.name for path in hospitals.glob("*/dicom") if not (path.parent / "labels.csv").exists())
    lacking = f"; {', '.join(bare[:8])}: no labels.csv beside dicom/, add it" if bare else ""
    if not names:
        raise ConfigError(
            f"simulation.hospitals: {hospitals} holds no hospital; expected one folder each with labels.csv and "
            f"dicom/{lacking}"
        )
    if odd := [name for name in names if name == "server" or not re.fullmatch(NAME_PATTERN, name)]:
        raise ConfigError(
            f"simulation.hospitals: {odd[0]!r} is no name for a site; expected letters, digits, dots, dashes and "
            "underscores, at most 63, and not 'server'; rename the folder"
        )
    if len(names) != recipe.federation.sites:
        raise ConfigError(
            f"federation.sites is {recipe.federation.sites}, but {hospitals} holds {len(names)} "
            f"hospital{'s' * (len(names) != 1)} ({', '.join(names[:8])}){lacking}; or say "
            f"federation.sites={len(names)}"
        )
    return names


def worker_app(settings_json: str) -> ClientApp:
    """The ClientApp of a worker process, made from the settings alone."""
    settings = settings_from_json(settings_json)
    out = run_folder(settings)
    logging.getLogger().addHandler(LogFile(out))
    compute_with(_threads(settings))
    # The model now: while the coordinator builds its own, not when the first round waits for it.
    site_of = _sites(settings, out, {}, _device(settings), _network(settings.recipe))
    return client_app(lambda context: site_of(str(context.node_config["site"])))


_network = functools.lru_cache(maxsize=1)(build)
"""Gives what a run trains; built before anything is read, and before a worker is forked."""


def _federate(
    settings: Settings,
    out: Path,
    names: tuple[str, ...],
    cohorts: Mapping[str, Cohort],
    audit: AuditLog,
    device: torch.device,
    show: Show,
    workers: Sequence[Worker] = (),
) -> tuple[Federated, Mapping[str, str]]:
    """The finished federation, and why some of the sites took no part in it."""
    result: list[Federated] = []
    shown = _Shown(show, settings.recipe.rounds, out, names)

    def main(transport: Transport) -> None:
        shown.transport = transport
        end = settings.resume == "conclude"
        result.append(
            coordinate(
                settings.recipe, shown, out, audit=audit, resume=bool(settings.resume), end=end, on_round=show.round
            )
        )  # fmt: skip

    if settings.simulation.backend == "ray":
        on_ray.federate(main, worker_app, settings, out, names, done=shown.answered, watch=shown.watch)
        return result[0], shown.absent
    app, ahead, abreast = None, 1, None
    if not workers:
        model = _network(settings.recipe)
        _network.cache_clear()  # a run trains a network of its own
        ahead = _AHEAD if sum(value.numel() for value in model.parameters()) >= _LARGE else 1
        abreast = _abreast(settings, model, device, out)
        site_of = _sites(settings, out, cohorts, device, model, abreast)
        for name in names[:_OPEN]:
            site_of(name)  # now: what is wrong with a site's own files is told in its own words, not as silence
        app = client_app(lambda context: site_of(str(context.node_config["site"])))
    with closing(InProcessGrid(names, app, workers=workers, done=shown.answered, ahead=ahead, abreast=abreast)) as grid:
        server_app(main, watch=shown.watch)(
            grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        )
    return result[0], shown.absent


def _left_out(names: Sequence[str], federated: Federated, absent: Mapping[str, str]) -> tuple[str, ...]:
    """Notes on the sites that said no hello, now or in the part of the run that was resumed."""
    notes = []
    for name in names:
        when = " after the run was resumed" if name in federated.hellos else ""
        if name in absent:
            notes.append(f"{name} took no part{when}: {absent[name]}")
        elif name not in federated.hellos:
            notes.append(f"{name} took no part.")
    return tuple(notes)


class _Shown:
    """A transport that shows how far the federation is, also when it was resumed or stops early.

    What the sites wrote for a round is on the disk when the round's answers are all given."""

    transport: Transport

    def __init__(self, show: Show, rounds: int, out: Path, names: Sequence[str]) -> None:
        self._show, self._rounds, self._out, self._names = show, rounds, out, names
        self._whys: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        """Sites that said no hello, and why."""
        self._what, self._done, self._total, self._quiet = "Calling the sites", 0, 0, False

    def hello(
        self, recipe: Recipe, audit_head: str, before: Collection[str] = (), *, quorum: int | None = None
    ) -> Mapping[str, Hello]:
        self._total = recipe.federation.sites
        self._show.step(self._what, 0, self._total)
        found = self.transport.hello(recipe, audit_head, before, quorum=quorum)
        all_to_disk(self._out)
        unknown = "it gave no answer; simulation.log may say why"
        self.absent = {name: self._whys.get(name, unknown) for name in self._names if name not in found}
        for site, why in self.absent.items():
            self._show.absent(site, why)
        return found

    def watch(self, site: str, state: State, why: str) -> None:
        """Told by the transport what becomes of every site."""
        if state in ("refused", "failed"):
            self._whys[site] = why

    def joined(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        return self.transport.joined(recipe, audit_head)

    def ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float) -> Iterable[Reply]:
        before = self._done if self._what == "Training" else 0
        self._what, self._done = "Training", max(before, (plan.round - 1) * len(sites))
        # one visit each a round, and one for the closing evaluation, which early stopping brings forward
        self._total = (self._rounds + 1) * len(sites) if plan.work == "train" else self._done + len(sites)
        self._show.step(self._what, self._done, self._total)
        yield from self.transport.ask(plan, sites, timeout_s)
        # The sites flush nothing themselves: a kill takes nothing from them, and the coordinator's checkpoint, which
        # counts on their logs and ledgers, is not written before these are as safe from a power cut as it will be.
        all_to_disk(self._out)

    def step(self, asks: Mapping[str, Ask], timeout_s: float, take: Take) -> Mapping[str, Answer | Refusal | Failure]:
        self._quiet = True  # of a round, training is what takes time
        try:
            found = self.transport.step(asks, timeout_s, take)
        finally:
            self._quiet = False
        all_to_disk(self._out)
        return found

    def answered(self, site: str) -> None:
        if self._quiet:
            return
        self._done += 1
        self._show.step(self._what, self._done, self._total)


def _compare(
    settings: Settings,
    cohorts: Mapping[str, Cohort],
    rounds: Mapping[str, int],
    test: Samples | None,
    device: torch.device,
    show: Show,
) -> Baselines | None:
    if not settings.baselines or test is None:
        return None
    alone = settings.baselines != "centralised"
    total = len(rounds) * alone + 1
    finished: list[str] = []

    def trained(name: str) -> None:
        finished.append(name)
        show.step("Baselines", len(finished), total)

    show.step("Baselines", 0, total)
    return baselines(settings.recipe, cohorts, rounds, test, device, alone=alone, done=trained)


def _prove(
    recipe: Recipe, cohorts: Mapping[str, Cohort], weights: str, device: torch.device, show: Show
) -> PrivacyAudit:
    """A short audit of what has just trained, for the largest and the smallest site."""
    # Only now: its statistics take half a second to import, and most of a run needs none.
    from client.privacy_audit import QUICK_CANARIES, QUICK_STEPS, privacy_audit

    show.step("Auditing the privacy mechanism", 0, 1)
    counts = {name: cohort.patients("train") for name, cohort in cohorts.items()}
    chosen = {min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])}
    sites = {name: counts[name] for name in sorted(chosen)}
    found = privacy_audit(recipe, sites, weights=weights, device=device, canaries=QUICK_CANARIES, steps=QUICK_STEPS)
    show.step("Auditing the privacy mechanism", 1, 1)
    return found


@contextmanager
def _workers(settings: Settings, device: torch.device) -> Iterator[list[Worker]]:
    """The processes that train; begun first, while this one has no threads, locks or data that they must not share."""
    simulation, workers = settings.simulation, []
    if simulation.workers > 1 and simulation.backend != "ray":
        text, fork = json.dumps(as_plain(settings)), device.type == "cpu"  # CUDA does not outlive a fork
        workers = [Worker(worker_app, text, fork=fork) for _ in range(simulation.workers)]
        compute_with(1)
        _network(settings.recipe)  # imported and built once for all
    try:
        for worker in workers:
            worker.begin()
        _network.cache_clear()
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def _abreast(settings: Settings, model: nn.Module, device: torch.device, out: Path) -> Abreast | None:
    if settings.simulation.abreast == 1:
        return None
    from simulations.abreast import Abreast

    return Abreast(model, settings.recipe, device, width=settings.simulation.abreast, out=out)


def _sites(
    settings: Settings,
    out: Path,
    cohorts: Mapping[str, Cohort],
    device: torch.device,
    model: nn.Module,
    abreast: Abreast | None = None,
) -> Callable[[str], Site]:
    """Finds a site by its name. All share the model: every visit overwrites all of it that is exchanged."""
    recipe, door = settings.recipe, threading.Lock()
    turn = abreast.turn if abreast is not None else threading.Lock()
    policy = _policy(recipe, settings.simulation.metrics)
    log_of = functools.lru_cache(maxsize=_LOGS)(lambda name: _audit(out, name, to_system))
    started: dict[str, str] = {}

    # A secure sum has steps, and what a site keeps between them is in its memory.
    @functools.lru_cache(maxsize=None if recipe.privacy.secure_aggregation else _OPEN)
    def opened(name: str) -> Site:
        folder = out / "sites" / name  # made by whatever is kept there
        site = Site(
            name,
            recipe,
            cohorts.get(name) or _cohort(settings, out, name, Silent()),
            lambda: model,
            folder=folder,
            audit=log_of(name),
            ledger=_ledger(settings, folder, name),
            device=device,
            policy=policy,
            sums=_sums(out, name, folder) if recipe.privacy.secure_aggregation else None,
            turn=turn,
            trainer=abreast.train if abreast is not None else None,
            flush=to_system,  # until the round is over, see `_Shown.ask`
            started=started.get(name, ""),
        )
        started[name] = site.cohort.manifest
        return site

    def site(name: str) -> Site:
        with door:  # two visits are under way, and one site is opened once
            return opened(name)

    return site


def _sums(out: Path, name: str, folder: Path) -> Sums:
    """The site's secure sums; the key of each site is made when it is first asked for, by whoever comes first."""

    def keys() -> Mapping[str, str]:
        return {path.stem: Signer.load(path).public for path in (out / "keys").glob("*.key") if path.stem != "server"}

    return Sums(name, folder / "sums", Signer.load_or_create(out / "keys" / f"{name}.key"), keys)


def _ledger(settings: Settings, folder: Path, name: str) -> Ledger | None:
    recipe, metrics = settings.recipe, settings.simulation.metrics
    if not (recipe.privacy.active or metrics == "noised"):
        return None
    ledger = Ledger(folder / "ledger.jsonl", name, ledger_policy(_policy(recipe, metrics)), to_system)
    ledger.repair()
    return ledger


def _policy(recipe: Recipe, metrics: Literal["bounded", "noised", "none"]) -> Policy:
    """A simulated site allows what its recipe asks, and the noised scores where they are wanted, and no more."""
    privacy = recipe.privacy
    return Policy(
        require_privacy=False,
        epsilon=(privacy.epsilon or _NO_CAP) + (Policy.scores_epsilon if metrics == "noised" else 0),
        delta=privacy.delta or Policy.delta,
        max_rounds=recipe.rounds,
        min_patients=1,
        min_cell=recipe.evaluation.min_cell,
        metrics=metrics,
        counts="coarse" if metrics == "noised" and recipe.federation.site_weights == "equal" else "exact",
        seeded_noise=True,
    )


def _audit(out: Path, side: str, flush: Flush = to_disk) -> AuditLog:
    signer = Signer.load_or_create(out / "keys" / f"{side}.key", flush)
    return AuditLog(out / "audit" / f"{side}.jsonl", signer, flush=flush)


def _hospitals(settings: Settings, out: Path, show: Show) -> Path:
    simulation = settings.simulation
    if simulation.hospitals is not None:
        if settings.baselines and not (Path(simulation.hospitals) / CENTRAL).is_dir():
            raise ConfigError(
                f"baselines=true compares on a central test set, but {simulation.hospitals} holds no folder {CENTRAL}/"
            )
        return Path(simulation.hospitals)
    from simulations.hospitals import source_of  # DICOM is written for these alone
    from simulations.phantoms import CLASSES, make_phantoms

    recipe = settings.recipe
    if recipe.task.classes != CLASSES:
        raise ConfigError(
            f"simulation.hospitals: missing; recipe {recipe.name} tells {' from '.join(recipe.task.classes)}, "
            "which the phantoms do not have; make hospitals of your data with `fedicom hospitals import` and give "
            "their folder"
        )
    if simulation.phantom.dimensions != recipe.task.dimensions:
        raise ConfigError(
            f"simulation.phantom.dimensions is {simulation.phantom.dimensions}, but the task has "
            f"{recipe.task.dimensions}; say simulation=phantom_{recipe.task.dimensions}d, or "
            "simulation.hospitals=FOLDER for images of your own"
        )
    earlier, made = earlier_record(out) or {}, source_of(out / "hospitals") or {}
    # Only what is drawn again: somebody's own hospitals may lie there.
    drawn = made.get("kind") == "phantom"
    if settings.overwrite and drawn and earlier.get("simulation") != record_of(settings)["simulation"]:
        with storing("the earlier hospitals"):
            shutil.rmtree(out / "hospitals")
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
            **_kept(settings),
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _divided_before(settings: Settings, out: Path, names: Sequence[str]) -> tuple[str, ...]:
    """A note where an earlier run over these hospitals has decided who is held out, and with other shares."""
    cache, wanted = _folder(settings, out) / "cache", fractions(settings.recipe.evaluation)
    before = {name: frozen_fractions(cache / name, _site_key(name)) for name in names}
    odd = {name: found for name, found in before.items() if found is not None and found != wanted}
    if not odd:
        return ()
    name, found = next(iter(odd.items()))
    return (
        f"evaluation.validation_fraction {wanted['validation']:g} and test_fraction {wanted['test']:g} hold for new "
        f"patients only at {', '.join(odd)}: an earlier run over these hospitals divided them (at {name} "
        f"by {found['validation']:g} and {found['test']:g}). For another division copy the folder without its cache/.",
    )


def _central(settings: Settings, hospitals: Path, show: Show) -> Samples | None:
    folder, recipe = hospitals / CENTRAL, settings.recipe
    if not folder.is_dir():
        return None
    try:
        return prepare_folder(
            folder, recipe.task, recipe.data, cache=hospitals / "cache" / CENTRAL, key=_site_key(CENTRAL),
            progress=lambda done, total: show.step(f"Reading {CENTRAL}", done, total), **_kept(settings),
        ).samples  # fmt: skip
    except DataError as error:
        raise DataError(f"{CENTRAL}: {error}") from None


class _Kept(TypedDict):
    storage: Storage
    secret: bytes | None


def _kept(settings: Settings) -> _Kept:
    chosen = settings.simulation.cache
    return {"storage": chosen.storage, "secret": read_secret(chosen.key)}


def _folder(settings: Settings, out: Path) -> Path:
    chosen = settings.simulation.hospitals
    return Path(chosen) if chosen is not None else out / "hospitals"


def _site_key(name: str) -> bytes:
    # Public, so that simulations repeat; a deployed site has a secret one.
    return hashlib.sha256(f"simulated site {name}".encode()).digest()


def _device(settings: Settings) -> torch.device:
    device = device_of(settings.simulation.device)
    if device is None:
        raise ConfigError("simulation.device is cuda, but torch sees no GPU; say simulation.device=auto or cpu")
    return device


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {_CORES} {'core' if _CORES == 1 else 'cores'}"
    )


def _threads(settings: Settings) -> int:
    return settings.simulation.threads or max(1, _CORES // settings.simulation.workers)
