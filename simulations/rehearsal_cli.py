"""`fedicom rehearse`: a deployed federation on this machine, with a failure on the way."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import Phantom
from common.epsilon import rounded_up
from common.errors import ConfigError
from simulations.rehearsal import Plan, Rehearsal, end_as_with_ctrl_c

_MARK = ".rehearsal"


def rehearse_verb(words: Sequence[str]) -> int:
    """`fedicom rehearse`: provisions, starts, trains, kills and restarts a site, verifies, stops."""
    parser = argparse.ArgumentParser(
        prog="fedicom rehearse",
        description="Run a deployed federation on this machine: gateway, SuperLink, coordinator and hospital nodes as "
        "real processes with TLS and node authentication on loopback. One site is killed on the way and comes back; at "
        "the end every log is verified against the other side's. All processes are stopped.",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/federation"),
        help="folder of everything; an earlier rehearsal there is REMOVED (default: %(default)s)",
    )
    parser.add_argument("--sites", type=int, default=3, metavar="N", help="hospitals (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of training (default: %(default)s)")
    arguments = parser.parse_args(words)
    console = Console()
    began = time.monotonic()
    out: Path = arguments.out
    if out.exists():
        if not out.is_dir() or (not (out / _MARK).exists() and any(out.iterdir())):
            raise ConfigError(f"--out: {out} is, or holds, something else than a rehearsal; choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()
    plan = Plan(
        count=arguments.sites,
        quorum=arguments.sites,
        recipe=(
            "recipe=phantom_2d",
            f"rounds={arguments.rounds}",
            "training.local_epochs=1",
            "federation.timeout_s=300",
        ),
        phantom=Phantom(patients=120, central_patients=120, size=64),
    )

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s[/dim]  {line}", highlight=False, soft_wrap=True)

    rehearsal = Rehearsal(out, plan)
    end_as_with_ctrl_c()
    try:
        say(f"Drawing the patients of {plan.count} hospitals as DICOM")
        rehearsal.hospitals()
        say("Making keys, certificates and kits")
        rehearsal.provision()
        say("The coordinator signs the recipe, every hospital reads and approves it")
        rehearsal.approve()
        say("Starting SuperLink and gateway")
        rehearsal.start("server")
        for name in plan.sites:
            say(f"Starting hospital {name}")
            rehearsal.start(name)
        rehearsal.run()
        _train(rehearsal, say, victim=plan.sites[-1])
        status = rehearsal.wait_finished()
        say("Training has ended; verifying every log against the other side's")
        for log, result in rehearsal.verify():
            say(f"  {log}: {result.splitlines()[0]}")
    finally:
        say("Stopping every process")
        rehearsal.stop()
    _table(status, console)
    folder = rehearsal.server.runs / status["run"]
    console.print(f"Report, model and logs: {folder}", highlight=False, soft_wrap=True)
    console.print(f"Took {time.monotonic() - began:.0f} s.", highlight=False)
    return 0


def _train(rehearsal: Rehearsal, say: Any, victim: str) -> None:
    half = max(1, int(rehearsal.plan.recipe[1].partition("=")[2]) // 2)
    shown = 0
    while shown < half:
        rehearsal.wait_round(shown + 1)
        shown = int(rehearsal.status().get("round") or shown + 1)
        say(f"Round {shown} is done")
    say(f"kill -9 of hospital {victim}, in the middle of a round")
    rehearsal.kill(victim)
    time.sleep(3)
    say(f"Hospital {victim} starts again")
    rehearsal.start(victim)


def _table(status: dict[str, Any], console: Console) -> None:
    table = Table(title="The federation", title_justify="left")
    for column in ("", "state", "rounds", "epsilon"):
        table.add_column(column, justify="left" if not column else "right")
    for name, site in sorted(status["sites"].items()):
        epsilon = site.get("epsilon")
        table.add_row(name, site["state"], str(site.get("round") or ""), "" if epsilon is None else rounded_up(epsilon))
    console.print(table)
    summary = status.get("summary") or {}
    found = summary.get("global") or {}
    if found.get("auroc") is not None:
        console.print(f"Global model on the coordinator's test set: AUROC {found['auroc']:.3f}", highlight=False)
