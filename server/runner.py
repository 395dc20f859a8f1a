"""One run as a process: `python -m server.runner --home DIR --run NAME`.

Killed at any moment and started again, it goes on from the last checkpoint and asks the same round once more; sites
answer from what they have stored. How it ends says whether it is started again: `FINISHED`, `STOPPED` and
`FAILED` are for good, every other code is not.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common.compute import device_of
from common.config import Recipe
from common.deployment import ServerHome, read_status
from common.errors import ConfigError, DataError, ExchangeError, FedicomError, QuorumError, StorageError
from common.exchange import Answer, Ask, Failure, Hello, Refusal, Reply, RoundPlan
from common.identity import Signer, read_private
from common.installed import package_versions
from common.journal import Log, SharedLog, TaggedLog, own_events
from common.samples import Samples, prepare_folder
from common.shard import read_secret
from common.signed import read_recipe
from common.vault import Secret
from server.blobs import Store
from server.conclude import Circumstances, conclude
from server.coordinator import Federated, coordinate, ledger_heads_in
from server.rounds import Transport
from server.runs import Order, Run, RunStatus
from server.secure import Take

log = logging.getLogger(__name__)

FINISHED, STOPPED, FAILED, AGAIN = 0, 3, 4, 1
_PAUSE_S = (5.0, 300.0)
"""Before sites that were too few are asked again: the first pause, and the longest."""
_ADVICE = "`fedicom server resume` when the sites are back, or `fedicom server conclude` with the model as it is"
_LONGEST = 4000
"""Characters of a reason; with many sites they may be many."""

Watch = Callable[[str, str, str], None]
Connect = Callable[[ServerHome, str, Watch], AbstractContextManager[Transport]]
"""(home, run, watch) -> the way to the sites, for as long as the block lasts."""


class Stopped(BaseException):
    """Somebody wants this process to end. Raised wherever the run is just then: it may be killed anywhere anyway."""


@contextmanager
def over_flower(home: ServerHome, run: str, watch: Watch) -> Iterator[Transport]:
    """The way to the sites through the SuperLink that `fedicom server start` keeps."""
    from server.app import FlowerTransport
    from server.link import open_grid

    signer = Signer.load(home.signing_key)
    store = Store(home.blobs, run) if home.config.blobs else None
    with open_grid(home, _superlink_port(home), name=run) as grid:
        yield FlowerTransport(grid, signer=signer, keys=_Members(home), watch=watch, store=store)


def _superlink_port(home: ServerHome) -> int:
    port = (read_status(home.control_file) or {}).get("superlink_port")
    if not isinstance(port, int):
        raise ExchangeError("the coordinator does not run; start it with `fedicom server start`")
    return port


def run(
    home: ServerHome, name: str, *, connect: Connect = over_flower, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Finishes a run, or says why not; all that it comes to is in the run's `status.json`.

    Args:
        connect: Opens the way to the sites; called again after every failure of it.

    Returns:
        `FINISHED`, `STOPPED`, `FAILED` (a restart would change nothing), or `AGAIN`.

    Raises:
        FedicomError: Before anything could begin: no such run, another process works on it, the home is damaged.
    """
    found = Run(home, name)
    order = found.order
    try:
        with found.alone():
            if found.status.get("state") == "finished":
                return FINISHED
            registry = home.registry
            signed = read_recipe(found.recipe_file, None)
            recipe = signed.recipe
            if signed.coordinator not in (registry.coordinator, *registry.retired.get("coordinator", ())):
                raise ConfigError(
                    f"run {name}: the recipe is signed by key {signed.coordinator[:12]}, which is not ours"
                )
            if recipe.id != order.recipe_id:
                raise ConfigError(f"run {name}: recipe.json holds another recipe than the one that was ordered")
            audit = TaggedLog(SharedLog(home.audit_file, Signer.load(home.signing_key)), name)
            status = RunStatus(found, recipe, tuple(registry.members))
            return _told(status, audit, lambda: _work(home, found, order, recipe, connect, status, audit, sleep))
    except ConfigError as error:  # before there was a `RunStatus` that could tell it
        with suppress(StorageError):
            found.settle(state="failed", eta_s=None, error=str(error)[:_LONGEST])
        raise


def _told(status: RunStatus, audit: Log, work: Callable[[], Mapping[str, Any]]) -> int:
    """Does the work and writes down how it ended."""
    try:
        summary = work()
    except (Stopped, KeyboardInterrupt):
        status.change(state="stopped", eta_s=None)
        with suppress(FedicomError):
            audit.append("run stopped", round=status.plain["round"])
        return STOPPED
    except (QuorumError, ExchangeError) as error:
        return _failed(status, audit, f"{error}. Nothing is lost: {_ADVICE}")
    except FedicomError as error:
        return _failed(status, audit, str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _failed(status, audit, "the disk is full; free space on it, then `fedicom server resume`")
        # Its text may hold anything: the log of this process has it.
        log.exception("run %s", status.plain["run"])
        status.change(state="waiting", error=f"{type(error).__name__} in the coordinator's process; started again")
        return AGAIN
    status.change(state="finished", eta_s=0, error=None, summary=summary)
    return FINISHED


def _failed(status: RunStatus, audit: Log, why: str) -> int:
    log.error("%s", why)
    why = why[:_LONGEST]
    status.change(state="failed", eta_s=None, error=why)
    with suppress(FedicomError):  # a full disk is the very reason, perhaps
        audit.append("run failed", round=status.plain["round"], why=why)
    return FAILED


def _work(
    home: ServerHome, found: Run, order: Order, recipe: Recipe, connect: Connect, status: RunStatus, audit: Log,
    sleep: Callable[[float], None],
) -> Mapping[str, Any]:  # fmt: skip
    config = home.config
    device = _device(config.device)
    key = Secret.key_file(Path(home.path / config.checkpoint_key)) if config.checkpoint_key is not None else None
    # Before the first round: a test set that cannot be read is better known now than after a week of training.
    tested = config.test_data_of(recipe.name)
    test = _test_set(home, home.path / tested, recipe) if tested is not None else None

    # The head first: it opens the log, which mends what a full disk left of its last line.
    past = own_events(home.audit_file, home.signing_key) if audit.head else ()
    ledger_heads = ledger_heads_in(past)

    def train(transport: Transport) -> Federated:
        told = _Told(transport, status)
        return coordinate(
            recipe, told, found.path, audit=audit, resume=True, end=order.wanted == "concluded", key=key,
            ledger_heads=ledger_heads, on_round=status.round_done,
        )  # fmt: skip

    federated = _with_patience(order, found, connect, status, train, sleep)
    status.change(state="concluding", eta_s=None, error=None)
    started = str(status.plain["started"])
    conclusion = conclude(
        federated, recipe, found.path, test=test, device=device, audit=audit, int8=config.int8,
        circumstances=Circumstances(
            started=started,
            wall_s=(datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            versions=package_versions(),
        ),
    )  # fmt: skip
    _farewell(found, recipe, connect, status.watch, audit)
    return conclusion.summary


def _farewell(found: Run, recipe: Recipe, connect: Connect, watch: Watch, audit: Log) -> None:
    """Tells every site that is there the head after the run's last event: from now on their logs vouch for it."""
    try:
        with connect(found.home, found.name, watch) as transport:
            heard = transport.joined(recipe, audit.head)
    except ExchangeError as error:
        log.warning("no site was told how the log ends: %s", error)
        return
    if heads := {site: hello.audit_head for site, hello in heard.items() if hello.audit_head}:
        audit.append("end vouched for", heads=heads)


def _with_patience(
    order: Order,
    found: Run,
    connect: Connect,
    status: RunStatus,
    train: Callable[[Transport], Federated],
    sleep: Callable[[float], None],
) -> Federated:
    """Asks again while too few sites answer or the SuperLink is away, on a new connection each time."""
    waited, pause_s, round_ = 0.0, _PAUSE_S[0], -1
    while True:
        began = time.monotonic()
        try:
            with connect(found.home, found.name, status.watch) as transport:
                return train(transport)
        except (QuorumError, ExchangeError) as error:
            if status.plain["round"] != round_:  # a round was finished meanwhile: patience begins anew
                waited, pause_s, round_ = 0.0, _PAUSE_S[0], status.plain["round"]
            else:
                waited += time.monotonic() - began
            if waited + pause_s > order.patience_s:
                raise
            log.warning("%s; again in %g s", error, pause_s)
            status.change(state="waiting", eta_s=None, error=f"{str(error)[:_LONGEST]}. Asked again in {pause_s:g} s")
            sleep(pause_s)
            waited, pause_s = waited + pause_s, min(2 * pause_s, _PAUSE_S[1])


class _Told:
    """A transport that tells what the run is doing."""

    def __init__(self, transport: Transport, status: RunStatus) -> None:
        self._transport, self._status = transport, status

    def hello(
        self, recipe: Recipe, audit_head: str, before: Collection[str] = (), *, quorum: int | None = None
    ) -> Mapping[str, Hello]:
        self._status.change(state="waiting")
        return self._transport.hello(recipe, audit_head, before, quorum=quorum)

    def joined(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        return self._transport.joined(recipe, audit_head)

    def ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float) -> Iterable[Reply]:
        state = "training" if plan.work == "train" else "evaluating"
        self._status.change(state=state, round_began=time.time(), error=None)
        return self._transport.ask(plan, sites, timeout_s)

    def step(self, asks: Mapping[str, Ask], timeout_s: float, take: Take) -> Mapping[str, Answer | Refusal | Failure]:
        return self._transport.step(asks, timeout_s, take)


class _Members:
    """Signing keys of the registry's members, read again when the file changes."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._stamp: tuple[int, ...] = ()
        self._keys: Mapping[str, str] = {}

    def __call__(self) -> Mapping[str, str]:
        with _reading_registry():
            stat = self._home.registry_file.stat()
        stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if stamp != self._stamp:
            self._keys = {name: member.signing for name, member in self._home.registry.members.items()}
            self._stamp = stamp
        return self._keys


@contextmanager
def _reading_registry() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise StorageError("the registry is gone; install it again with `fedicom server registry install`") from None


def _test_set(home: ServerHome, folder: Path, recipe: Recipe) -> Samples:
    """The coordinator's own images; pseudonyms are made with a key of this house."""
    key = hashlib.sha256(b"fedicom central set\n" + read_private(home.signing_key, "a signing key")).digest()
    kept = home.config.cache
    try:
        return prepare_folder(
            folder, recipe.task, recipe.data, cache=home.cache / "central", key=key, storage=kept.storage,
            secret=read_secret(kept.key, home.path),
        ).samples  # fmt: skip
    except DataError as error:
        raise DataError(f"server.yaml: test_data: {error}") from None


def _device(wanted: str) -> torch.device:
    device = device_of(wanted)
    if device is None:
        raise ConfigError("server.yaml: device is cuda, but torch sees no GPU; say auto or cpu")
    return device


def _stop(number: int, frame: object) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # once is enough: what follows ends within seconds
    raise Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until the run ends, SIGTERM comes, or something breaks."""
    parser = argparse.ArgumentParser(prog="python -m server.runner", description="One run of the coordinator.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    for name in ("alembic", "flwr", "httpcore", "httpx"):  # a line for every call, several a second
        logging.getLogger(name).setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        return run(ServerHome(arguments.home), arguments.run)
    except Stopped:
        return STOPPED
    except FedicomError as error:
        log.error("%s", error)
        return FAILED if isinstance(error, ConfigError) else AGAIN


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)  # threads of libraries shall not keep a process that has ended its work
