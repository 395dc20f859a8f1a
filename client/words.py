"""What a node does and did, in words for its own people: its status, and the events of its log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.chain import Event
from common.epsilon import rounded_down, rounded_up
from common.printable import number_of, printable

_STATES = {
    "starting": "starting",
    "waiting": "waiting for Flower's SuperNode on this machine",
    "ready": "ready, waiting for the coordinator",
    "working": "working",
    "refused": "the coordinator does not take this node",
    "restarting": "its runner is being started again",
    "failed": "cannot work",
    "silent": "runs, but has written no status for long: is the disk full? Else it hangs; start it anew",
    "stopped": "not running; start it with `fedicom site start`",
}


def status_shown(status: Mapping[str, Any]) -> RenderableType:
    """A node's status, for a terminal."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def row(name: str, value: object, style: str = "") -> None:
        table.add_row(name, Text(printable(str(value)), style))

    state = str(status.get("state"))
    bad = state in ("failed", "stopped", "silent", "restarting", "refused")
    row("site", f"{status.get('site')} of {status.get('federation')}, gateway {status.get('gateway')}")
    waits = state == "ready" and status.get("trouble")
    row("state", _STATES.get(state, state), "yellow" if bad or waits else "green")
    if status.get("connected") is not None and state not in ("stopped", "silent"):
        reached = "to the gateway, but not to the coordinator" if status.get("trouble") else "to the gateway"
        row(
            "connection",
            reached if status["connected"] else "none; trying until there is one",
            "green" if status["connected"] and not status.get("trouble") else "yellow",
        )
    if status.get("error") and state in ("failed", "restarting"):
        row("why", status["error"], "yellow")
    if status.get("trouble") and state not in ("stopped", "silent"):
        row("trouble", status["trouble"], "yellow")
    recipe, doing = status.get("recipe"), status.get("doing")
    if recipe:
        row("recipe", f"{recipe['name']} ({recipe['id'][:12]})")
        if status.get("round"):
            closing = status["round"] > recipe["rounds"]
            which = "closing evaluation" if closing else f"{status['round']} of {recipe['rounds']}"
            row("round", which + (f", {doing}" if doing != "idle" else ""))
    if status.get("progress"):
        done, total = status["progress"]
        row("images", f"read {done} of {total} steps")
    epsilon = status.get("epsilon")
    if epsilon:
        left = max(0.0, epsilon["cap"] - epsilon["spent"])
        row(
            "epsilon",
            f"{rounded_up(epsilon['spent'])} of {epsilon['cap']:g} spent, {rounded_down(left)} left "
            f"(delta {epsilon['delta']:g})",
        )
    if status.get("updates") is not None:
        sent = f"{number_of(status['updates'], 'update')}, {status['bytes_sent'] / 1e6:.1f} MB"
        row("sent", f"{sent}; {number_of(status['evaluations'], 'evaluation')}")
    row("last contact", _ago(status.get("last_contact")))
    refusal = status.get("last_refusal")
    if refusal:
        row("last refusal", f"{_ago(refusal['time'])}: {refusal['why']}", "yellow")
        if refusal.get("here") and refusal["here"] != refusal["why"]:
            row("", f"only told here: {refusal['here']}", "yellow")
    if status.get("children"):
        parts = [f"{name} {pid if pid is not None else 'not running'}" for name, pid in status["children"].items()]
        row("processes", f"node {status.get('pid')}, {', '.join(parts)}" if state != "stopped" else "none")
    if status.get("updated"):
        row("as of", _ago(status["updated"]))
    return Group(table)


def in_words(event: Event) -> str:
    """One line about an event of a site's log."""
    facts: Mapping[str, Any] = event.facts
    told = _WORDS.get(event.kind)
    if told is None:
        rest = ", ".join(f"{name} {_short(value)}" for name, value in facts.items())
        return printable(f"{event.kind}{': ' if rest else ''}{rest}")
    values = {name: _short(value) for name, value in facts.items()}
    epsilon = facts.get("epsilon")
    values["spent"] = f", epsilon {rounded_up(epsilon)}" if isinstance(epsilon, float) else ""
    size = facts.get("bytes")
    values["size"] = f"{size / 1e6:.1f} MB" if isinstance(size, int) else "unknown size"
    train = (facts.get("patients") or {}).get("train", "?")  # as the coordinator is told them: 0 is no number
    values["patients_train"] = f"{train or 'not told'}{' (rounded down)' * bool(train and facts.get('counts_rounded'))}"
    return printable(told.format_map(_Missing(values)))


_WORDS = {
    "log started": "This log was begun",
    "log continued": "The log goes on in a new file",
    "clock moved back": "This machine's clock was moved back from {from} to {to}",
    "key rotated": "The site's signing key was exchanged",
    "operator action": "{who}: {action}",
    "recipe approved": "{by} approved recipe {name} {recipe_id}",
    "approval withdrawn": "{by} withdrew the approval of recipe {recipe_id}",
    "recipe refused": "Refused recipe {recipe_id} ({code}): {why}",
    "plan refused": "Refused round {round} of recipe {recipe_id} ({code}): {why}",
    "budget refused": "Refused for the privacy budget: {why}",
    "message refused": "Refused a message: {why}",
    "node started": "The node was started",
    "node stopped": "The node was stopped ({why})",
    "configuration": "The configuration is {sha256}",
    "code": "The installed code was written down",
    "site started": "Opened the images for recipe {recipe_id}; patients to train on, as told: {patients_train}",
    "question received": "The coordinator asked about recipe {recipe_id}",
    "plan received": "The coordinator asked for round {round} of recipe {recipe_id} ({work})",
    "budget reserved": "Reserved {steps} noised steps for round {round}{spent} in all",
    "update kept": "Trained for round {round} and kept the update for a secure sum{spent}",
    "sum joined": "Shared secrets out for the secure sum of round {round}",
    "sum opened": "Gave the shares that open the secure sum of round {round}",
    "update sent": "Sent the update of round {round}, {size}{spent}",
    "update sent again": "Sent the update of round {round} again; nothing was trained or paid anew",
    "evaluation sent": "Sent the evaluation of round {round}",
}


class _Missing(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "?"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if is_hash else text if len(text) <= 300 else f"{text[:300]}..."


def _ago(moment: str | None) -> str:
    if moment is None:
        return "none yet"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{moment[:19].replace('T', ' ')} UTC, {seconds / size:.0f} {unit} ago"
    return f"{moment[:19].replace('T', ' ')} UTC, {max(0, seconds):.0f} s ago"
