"""`fedicom site`: what the people of a hospital do at their node."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from common.cli import add_by, run_verb
from common.deployment import SiteHome, read_status
from common.epsilon import rounded_down, rounded_up
from common.errors import ConfigError, DataError, FedicomError
from common.printable import number_of, printable

# The rooms behind some of these verbs take seconds to import (torch, Flower): the others shall answer at once.
if TYPE_CHECKING:
    from client.budget import Budget
    from client.cohort import Cohort
    from client.ledger import Ledger
    from common.imaging import Progress as Told
    from common.signed import SignedRecipe

_VERBS = {
    "unpack": ("client.init", "unpack_verb", "open the sealed kit that the coordinator sent"),
    "init": ("client.init", "init_verb", "or: make this site's own keys, and send only public ones"),
    "join": ("client.init", "join_verb", "take a newer kit or registry of the coordinator"),
    "preflight": ("client.cli", "preflight_verb", "check machine, keys, network and images; says what to mend"),
    "review": ("client.cli", "review_verb", "read what a recipe would do here, on which patients, at what epsilon"),
    "approve": ("client.cli", "approve_verb", "allow a recipe; before this, nothing of it runs"),
    "selftest": ("client.selftest", "selftest_verb", "test this machine's privacy mechanism with a recipe"),
    "withdraw": ("client.cli", "withdraw_verb", "end an approval; counts from the next message on"),
    "approvals": ("client.cli", "approvals_verb", "list the recipes that are allowed here"),
    "start": ("client.cli", "start_verb", "run the node until it is stopped; outgoing connections only"),
    "stop": ("client.cli", "stop_verb", "end the node of this folder"),
    "status": ("client.cli", "status_verb", "what the node does now, and what it did last"),
    "budget": ("client.cli", "budget_verb", "epsilon spent, reserved and left, by recipe"),
    "log": ("client.cli", "log_verb", "the last events of this site's signed log, in words"),
}
_EPILOG = """first day, with the kit from the coordinator:
  fedicom site unpack north.kit /var/lib/fedicom/site    (then edit site.yaml there)
  fedicom site preflight --home /var/lib/fedicom/site
  fedicom site review recipe.json --home /var/lib/fedicom/site
  fedicom site approve recipe.json --home /var/lib/fedicom/site
  fedicom site start --home /var/lib/fedicom/site

--home may be left out inside the site's folder, or when FEDICOM_HOME names it. docs/site.md is the handbook."""
_LEAST_PREFIX = 6


def site_verb(words: Sequence[str]) -> int:
    """`fedicom site`: the first word says what to do."""
    does = "A hospital's node: it trains here, on what was approved here, and calls its coordinator alone."
    return run_verb("fedicom site", _VERBS, words, does, _EPILOG)


# Before the start


def preflight_verb(words: Sequence[str]) -> int:
    """`fedicom site preflight`: exit 1 when a check fails."""
    parser = site_parser(
        "preflight",
        "Check everything that may keep this node from working: user, kit, certificates, keys, versions, GPU, disk, "
        "log, approvals, budget, images and labels, name server, proxy, gateway, clock, and that nothing but the "
        "gateway can be reached. Each line says what is so and, where something is wrong, what to do. Exit code 1 "
        "when a line says FAIL.",
    )
    parser.add_argument("--no-images", action="store_true", help="do not read the images, which may take long")
    parser.add_argument(
        "--no-probe", action="store_true", help="do not try whether other addresses than the gateway can be reached"
    )
    parser.add_argument("--json", action="store_true", help="one JSON array instead of lines")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    from client.preflight import preflight

    colour = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    found = []
    with _reading(console, shown=not arguments.json) as told:
        for line in preflight(home, images=not arguments.no_images, probe=not arguments.no_probe, progress=told):
            found.append(line)
            if not arguments.json:
                text = Text.assemble((f"{line.level:<5}", colour[line.level]), f"{line.what:<14}", printable(line.says))
                if line.fix:
                    text.append(f"\n{'':<19}-> {printable(line.fix)}", style="bold" if line.level == "FAIL" else "")
                console.print(text, soft_wrap=True)
    failed = sum(line.level == "FAIL" for line in found)
    if arguments.json:
        print(json.dumps([vars(line) for line in found], indent=1))  # noqa: T201
    else:
        warned = sum(line.level == "warn" for line in found)
        verdict = "This node can work." if not failed else f"{number_of(failed, 'check')} failed; mend them first."
        console.print(f"{verdict} {number_of(len(found), 'check')}, {number_of(warned, 'warning')}.", highlight=False)
    return 1 if failed else 0


def review_verb(words: Sequence[str]) -> int:
    """`fedicom site review`: what a recipe would do here."""
    parser = site_parser(
        "review",
        "Read a recipe before anybody says yes: what would be trained, on which of this site's patients (counted "
        "here, by reading the images), what would leave, what it would cost of the privacy budget, and what this "
        "site's policy says to it. Nothing is approved and nothing is sent.",
    )
    add_recipe(parser)
    parser.add_argument("--no-count", action="store_true", help="do not read the images; patients stay uncounted")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    signed = signed_recipe(home, arguments.recipe)
    config, trouble = home.config, ""
    cohort: Cohort | None = None
    if not arguments.no_count and config.data is not None:
        from client.cohort import site_cohort

        with _reading(console, shown=not arguments.json) as told:
            try:
                cohort = site_cohort(home, signed.recipe, told, decide=False)
            except DataError as error:
                trouble = str(error)
    from client.budget import trouble as trouble_of_ledger
    from client.review import review

    found, less = review(signed, config, cohort, _ledger(home)), trouble_of_ledger(home)
    if arguments.json:
        errors = {"data_error": trouble or None, "ledger_error": less or None}
        print(json.dumps({**found.plain, **errors}, indent=1))  # noqa: T201
        return 0
    for section in found.sections:
        console.print(section.title, style="bold", highlight=False, markup=False)
        for line in section.lines:
            style = "bold red" if line.startswith("NO: ") else None
            console.print(Padding(Text(line, style or ""), (0, 0, 0, 2)))
        console.print()
    if trouble:
        why = f"The patients could not be counted: {printable(trouble)}"
        console.print(why, style="yellow", highlight=False, markup=False)
    if less:
        _say(console, f"More was spent than stands above: {less}. Put the newest back first.", "bold red")
    return 0


def approve_verb(words: Sequence[str]) -> int:
    """`fedicom site approve`: allows a recipe."""
    parser = site_parser(
        "approve",
        "Allow a recipe at this site. It must be signed by the coordinator whose key this site has, and this site's "
        "policy must not speak against it. The decision, and who made it, is signed and written to the log. A running "
        "node knows of it at the next message.",
    )
    add_recipe(parser)
    add_by(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask once more")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    from client.approvals import Approvals

    signed = signed_recipe(home, arguments.recipe)
    recipe = signed.recipe
    _say(console, f"Recipe {recipe.name}, {number_of(recipe.rounds, 'round')}, {recipe.privacy.promise}")
    _say(console, f"Hash {recipe.id}")
    if sys.stdin.isatty() and sys.stdout.isatty() and not arguments.yes:
        answer = console.input("`fedicom site review` tells all that it does. Allow it here? Type yes: ")
        if answer.strip().lower() != "yes":
            _say(console, "Nothing was approved.")
            return 1
    approval = Approvals(home).approve(signed, by=_who(arguments), log=_log(home))
    _say(console, f"Approved by {approval.by}. `fedicom site withdraw {recipe.id[:12]}` takes it back.")
    return 0


def withdraw_verb(words: Sequence[str]) -> int:
    """`fedicom site withdraw`: ends an approval."""
    parser = site_parser(
        "withdraw",
        "End an approval. A running node refuses the recipe from the next message on; an update that is being made "
        "is not sent any more. What was spent of the privacy budget stays spent.",
    )
    add_recipe(parser)
    add_by(parser)
    arguments = parser.parse_args(words)
    home = site_home(arguments.home)
    from client.approvals import Approvals

    recipe_id = _identify(home, arguments.recipe)
    Approvals(home).withdraw(recipe_id, by=_who(arguments), log=_log(home))
    _say(Console(), f"Recipe {recipe_id[:12]} is not approved here any more.")
    return 0


def approvals_verb(words: Sequence[str]) -> int:
    """`fedicom site approvals`: lists what is allowed."""
    parser = site_parser("approvals", "List the recipes that are allowed here, by whom and since when.")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    from client.approvals import Approvals

    approvals = Approvals(home)
    rows: list[dict[str, Any]] = []
    for recipe_id in approvals.ids():
        try:
            approval = approvals.find(recipe_id)
        except FedicomError as error:
            rows.append({"recipe_id": recipe_id, "holds": False, "why": str(error)})
            continue
        if approval is not None:
            recipe = approval.signed.recipe
            told = {"name": recipe.name, "rounds": recipe.rounds, "privacy": recipe.privacy.promise}
            rows.append({"recipe_id": recipe_id, "holds": True, **told, "by": approval.by, "time": approval.time})
    if arguments.json:
        print(json.dumps(rows, indent=1))  # noqa: T201
        return 0
    if not rows:
        _say(console, "No recipe is approved here; the node refuses all of them.")
        return 0
    table = Table("recipe", "name", "rounds", "privacy", "by", "since")
    for row in rows:
        if row["holds"]:
            cells = (
                row["recipe_id"][:12],
                row["name"],
                str(row["rounds"]),
                row["privacy"],
                row["by"],
                row["time"][:10],
            )
            table.add_row(*map(Text, cells))
    if table.row_count:
        console.print(table)
    for row in rows:
        if not row["holds"]:
            _say(console, row["why"], "yellow")
    return 0


# While it runs


def start_verb(words: Sequence[str]) -> int:
    """`fedicom site start`: runs until it is stopped."""
    parser = site_parser(
        "start",
        "Run the node in the foreground, until Ctrl-C, SIGTERM or `fedicom site stop`. It keeps two processes alive, "
        "Flower's SuperNode, which holds the connection to the gateway, and our runner, which trains; both are "
        "started again when they end, and every outage is waited out. It opens no port to the outside. One node runs "
        "in a folder.",
    )
    parser.add_argument(
        "--allow-root",
        action="store_true",
        help="run although the user is root (also FEDICOM_ALLOW_ROOT=1): for containers where that means nothing",
    )
    arguments = parser.parse_args(words)
    from client.node import check_user, start

    if arguments.allow_root:
        os.environ["FEDICOM_ALLOW_ROOT"] = "1"  # for the processes that the node starts as well
    check_user()
    home, console = site_home(arguments.home), Console()

    def say(line: str, style: str) -> None:
        text = Text.assemble((f"{datetime.now():%Y-%m-%d %H:%M:%S}  ", "dim"), (line, style))
        console.print(text, soft_wrap=True)

    return start(home, say)


def stop_verb(words: Sequence[str]) -> int:
    """`fedicom site stop`: ends the node."""
    parser = site_parser(
        "stop",
        "End the node of this folder. An update that is being made is made again, or sent, after the next start.",
    )
    arguments = parser.parse_args(words)
    from client.node import end

    _say(Console(), "The node has ended." if end(site_home(arguments.home)) else "No node runs in this folder.")
    return 0


def status_verb(words: Sequence[str]) -> int:
    """`fedicom site status`: exit 1 when no node runs or it cannot work."""
    parser = site_parser(
        "status",
        "Show what the node does now and what it did last. Exit code 0 while the node runs, 1 when it does not, "
        "cannot work, or is not taken by the coordinator: good for monitoring.",
    )
    parser.add_argument("--watch", action="store_true", help="keep showing it until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    from client.words import status_shown

    if arguments.watch:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(status_shown(_status(home)), refresh=True)
                time.sleep(1)
    status = _status(home)
    if arguments.json:
        print(json.dumps(status, indent=1))  # noqa: T201
    else:
        console.print(status_shown(status))
    return 0 if status["state"] not in ("stopped", "failed", "silent", "refused") else 1


def _status(home: SiteHome) -> dict[str, Any]:
    """The node's own word, when it is fresh."""
    from client.node import FRESH_S, running

    config = home.config
    status = read_status(home.status_file) or {}
    fixed = {"site": config.site, "federation": config.federation, "gateway": config.gateway}
    updated = datetime.fromisoformat(str(status.get("updated", "1970-01-01T00:00:00+00:00")))
    old = abs((datetime.now(UTC) - updated).total_seconds()) > FRESH_S  # of the future: the clock went back since
    if old:  # also none, or one that says stopped: a full disk may have kept a node that runs from ever saying so
        status["state"] = "stopped" if running(home) is None else "silent"
    return {**status, **fixed}


# What was spent, and what happened


def budget_verb(words: Sequence[str]) -> int:
    """`fedicom site budget`: what was spent of the patients' privacy."""
    parser = site_parser(
        "budget",
        "Show what was spent of the privacy of this site's patients, over all recipes, restarts and years: epsilon "
        "spent, reserved by visits that did not end, and left under the cap of the policy. Epsilons of recipes do not "
        "add up exactly: together they cost a little less than their sum. Exit code 1 when the ledger is not the "
        "newest that the site's log remembers.",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (.png, .svg or .pdf)")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    from client.budget import budget, draw

    found = budget(home)
    if arguments.plot is not None:
        draw(home, found, arguments.plot)
    if arguments.json:
        print(json.dumps(found.plain, indent=1))  # noqa: T201
        return 1 if found.trouble else 0
    table = Table(title=f"Privacy budget at delta {found.delta:g}", title_justify="left")
    for column in ("recipe", "visits", "steps", "open", "epsilon alone", "of scores"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in found.recipes:
        name = f"{row.name} {row.recipe_id[:12]}" if row.name else row.recipe_id[:12]
        told = rounded_up(row.scores_epsilon) if row.scores_epsilon else "-"
        table.add_row(
            Text(name), str(row.visits), f"{row.steps:,}", str(row.open or "-"), rounded_up(row.epsilon), told
        )
    if found.recipes:
        console.print(table)
    reserved = (
        f", of which {rounded_up(found.reserved)} is reserved by visits that did not end" if found.reserved else ""
    )
    console.print(_bar(found, min(console.width, 72)))
    _say(
        console,
        f"Spent: epsilon {rounded_up(found.spent)} of {found.cap:g}{reserved}. Left: {rounded_down(found.left)}.",
    )
    prv, rdp = rounded_up(found.prv), rounded_up(found.rdp)
    _say(console, f"PLD counts. As cross-checks: PRV {prv}, RDP {rdp} (an older, looser bound).")
    if arguments.plot is not None:
        _say(console, f"Drawn to {arguments.plot}")
    if found.trouble:
        says = f"This is not all: {found.trouble}. Put the newest back; until then nothing private is trained."
        _say(console, says, "bold red")
        return 1
    return 0


def _bar(found: Budget, width: int) -> Text:
    """Spent, reserved and left under the cap; letters, so that it reads without colours too."""
    reserved = min(round(width * found.reserved / found.cap), width)
    spent = min(round(width * found.spent / found.cap), width) - reserved
    left = width - spent - reserved
    return Text.assemble(("█" * spent, "red"), ("▒" * reserved, "yellow"), ("·" * left, "green"))


def log_verb(words: Sequence[str]) -> int:
    """`fedicom site log`: the last events, in words."""
    parser = site_parser(
        "log",
        "Show the last events of this site's signed log, in words. The whole log is checked first: numbers, hashes, "
        "signatures, times. `fedicom audit` holds it against the coordinator's.",
    )
    parser.add_argument(
        "-n", "--number", type=int, default=20, metavar="N", help="how many events; 0: all (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as they stand in the log")
    arguments = parser.parse_args(words)
    home, console = site_home(arguments.home), Console()
    from client.words import in_words
    from common.journal import own_events

    events = own_events(home.audit_file, home.signing_key)
    if not events:
        _say(console, "The log is not begun yet.")
    for event in events[-arguments.number :] if arguments.number > 0 else events:
        if arguments.json:
            print(json.dumps({"time": event.time, "kind": event.kind, "facts": event.facts}))  # noqa: T201
        else:
            text = Text.assemble((f"{event.time[:19].replace('T', ' ')} UTC  ", "dim"), in_words(event))
            console.print(text, soft_wrap=True)
    return 0


# Shared by the verbs


def site_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """For a verb that works in a site's folder."""
    parser = argparse.ArgumentParser(prog=f"fedicom site {verb}", description=description)
    parser.add_argument(
        "--home",
        metavar="DIR",
        type=Path,
        default=Path(os.environ.get("FEDICOM_HOME", ".")),
        help="this site's folder (default: FEDICOM_HOME, else the current folder)",
    )
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """As `signed_recipe` finds it."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help=f"file of `fedicom recipe sign`; or, of an approved one, the first {_LEAST_PREFIX} or more letters of its "
        "hash",
    )


def site_home(folder: Path) -> SiteHome:
    """Raises ConfigError when the folder is not a site's."""
    home = SiteHome(folder)
    if not (home.path / "site.yaml").is_file():
        raise ConfigError(f"{folder} is no site's folder: it holds no site.yaml; say --home DIR or set FEDICOM_HOME")
    return home


def _who(arguments: argparse.Namespace) -> str:
    from common.enrolment import login

    return str(arguments.by or login())


def _log(home: SiteHome) -> Any:
    from common.identity import Signer
    from common.journal import SharedLog

    return SharedLog(home.audit_file, Signer.load(home.signing_key))


def _ledger(home: SiteHome) -> Ledger | None:
    """The account as it is; None before the first visit, when there is nothing to read."""
    if not home.ledger_file.exists():
        return None
    from client.policy import ledger_of

    return ledger_of(home)


def signed_recipe(home: SiteHome, named: str) -> SignedRecipe:
    """A recipe from a file, or an approved one by the beginning of its hash."""
    from client.approvals import Approvals
    from common.signed import read_recipe

    if Path(named).is_file():
        return read_recipe(Path(named), home.registry.coordinator)
    approval = Approvals(home).find(_identify(home, named))
    if approval is None:
        raise ConfigError(f"there is no file {named}, and no approved recipe of that hash")
    return approval.signed


def _identify(home: SiteHome, named: str) -> str:
    from client.approvals import Approvals
    from common.signed import read_recipe

    if Path(named).is_file():
        return read_recipe(Path(named), None).recipe.id
    known = {*Approvals(home).ids(), *Approvals(home).withdrawing()}
    found = [recipe_id for recipe_id in sorted(known) if recipe_id.startswith(named.lower())]
    if not re.fullmatch(rf"[0-9a-fA-F]{{{_LEAST_PREFIX},64}}", named) or not found:
        raise ConfigError(
            f"there is no file {named}, and no approved recipe of that hash; `fedicom site approvals` lists them"
        )
    if len(found) > 1:
        raise ConfigError(f"{named} is the beginning of {len(found)} approved recipes; give more letters")
    return found[0]


@contextmanager
def _reading(console: Console, *, shown: bool) -> Iterator[Told]:
    """A bar for the time that images are read; nothing in a pipe."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True, disable=not (shown and console.is_terminal),
    )  # fmt: skip
    task = bar.add_task("Reading images", total=None, visible=False)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(printable(line), style=style, highlight=False, markup=False, soft_wrap=True)
