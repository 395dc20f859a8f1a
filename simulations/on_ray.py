"""The same apps on a Ray cluster, through Flower's simulation engine: for who outgrows one machine.

Any actor may serve any site: what a site keeps (ledger, audit log, kept replies) lies in the run's folder, which all
machines of the cluster must see, and is locked while it is written.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.config import Settings, Simulation, as_plain
from common.errors import ConfigError
from server.app import State, Watch, server_app
from server.rounds import Transport

PARTITION = "partition-id"
"""By which Flower's engine tells its nodes apart."""
_QUIET = ("flwr", "ray")
_STARTS = 3

log = logging.getLogger(__name__)


def check(settings: Settings) -> None:
    """
    Raises:
        ConfigError: Ray is not installed, or the recipe needs what it cannot give.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "simulation.backend=ray: Ray is not installed; say `pip install ray==2.55.1`, or leave the "
            "backend at process"
        )
    if settings.recipe.privacy.secure_aggregation:
        raise ConfigError(
            "simulation.backend=ray with privacy.secure_aggregation=true: between the steps of a secure sum a site "
            "keeps secrets in memory alone, and on Ray the next step may reach another process; use backend=process"
        )


def federate(
    main: Callable[[Transport], None],
    make_app: Callable[[str], ClientApp],
    settings: Settings,
    out: Path,
    names: Sequence[str],
    *,
    done: Callable[[str], None],
    watch: Watch,
) -> None:
    """Runs a whole federation; returns when `main` has.

    Args:
        main: The coordinator's work, in a thread of this process.
        make_app: A module-level function, called once in every actor with the settings as JSON.
        out: Folder of the run.
        names: Of the sites, in the order of Flower's partitions.
        done: Told the site's name after each of its answers.
        watch: As for `FlowerTransport`.

    Raises:
        FedicomError: Whatever `main` raised.
    """
    from flwr.simulation import run_simulation

    failed: list[BaseException] = []

    def guarded(transport: Transport) -> None:
        try:
            main(transport)
        except BaseException as error:
            failed.append(error)

    def told(site: str, state: State, why: str) -> None:
        watch(site, state, why)
        if state == "answered":
            done(site)

    chosen = settings.simulation
    _connect(chosen)
    gpus = 1.0 / chosen.workers if chosen.device != "cpu" and torch.cuda.is_available() else 0.0
    text = json.dumps(as_plain(_absolute(settings, out)))
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    run_simulation(
        server_app=server_app(guarded, watch=told),
        client_app=_app(make_app, text, tuple(names)),
        num_supernodes=len(names),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
            "init_args": {},
        },
    )
    if failed:
        raise failed[0]


def _connect(chosen: Simulation) -> None:
    """To the cluster that is named, or to one of this machine alone that ends with the run.

    Raises:
        ConfigError: There is none, or none could be started.
    """
    import ray

    if chosen.ray_address is not None:
        try:
            ray.init(address=chosen.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"simulation.ray_address: no Ray cluster answers at {chosen.ray_address} ({str(error)[:120]}); start "
                "one with `ray start --head`, or leave the address out"
            ) from None
        return
    for _ in range(_STARTS):  # a raylet that is not up within 15 s, as on a busy machine, ends itself
        try:
            ray.init(
                num_cpus=chosen.workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # Ray raises plain ones
            log.warning("Ray did not start: %s", error)
            ray.shutdown()
        else:
            return
    raise ConfigError(
        f"simulation.backend=ray: Ray did not start in {_STARTS} attempts (its own log is under /tmp/ray); is the "
        "machine very busy? Try again, or use backend=process"
    )


def _absolute(settings: Settings, out: Path) -> Settings:
    """For a process in another working folder."""
    hospitals = settings.simulation.hospitals
    simulation = replace(settings.simulation, hospitals=hospitals and str(Path(hospitals).resolve()))
    return replace(settings, simulation=simulation, out=str(out.resolve()))


def _app(make_app: Callable[[str], ClientApp], settings_json: str, names: tuple[str, ...]) -> ClientApp:
    """An app that can be sent to an actor: it holds text, and finds the real app where it runs."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        context.node_config["site"] = names[int(context.node_config[PARTITION])]
        return made(make_app, settings_json)(message, context)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


@functools.cache
def made(make_app: Callable[[str], ClientApp], settings_json: str) -> ClientApp:
    """The one app of this process."""
    return make_app(settings_json)
