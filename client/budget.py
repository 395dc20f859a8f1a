"""What a site's ledger and log tell its own people: epsilon by recipe, a drawing of it, events in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from client.approvals import Approvals
from client.ledger import Ledger
from client.policy import ledger_policy
from common.accounting import Event, epsilon_pld
from common.chain import Event as Logged
from common.deployment import SiteHome
from common.errors import ConfigError
from common.storage import storing

_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 40
"""Drawn at most: each costs an epsilon of its own."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One reservation of the ledger."""

    recipe_id: str
    round: int
    event: Event
    settled: bool


@dataclass(frozen=True, kw_only=True)
class RecipeCost:
    """What one recipe cost."""

    recipe_id: str
    name: str
    """Empty when its approval is gone."""
    visits: int
    open: int
    """Visits that were reserved and did not end; they count in full."""
    steps: int
    epsilon: float
    """As if nothing else had been trained on these patients."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The account of the cohort, at the policy's delta."""

    cap: float
    delta: float
    spent: float
    """Everything together, open reservations in full."""
    reserved: float
    """How much of it would not be there without the open ones."""
    recipes: tuple[RecipeCost, ...]
    visits: tuple[Visit, ...]

    @property
    def left(self) -> float:
        return max(0.0, self.cap - self.spent)

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "cap": self.cap,
            "delta": self.delta,
            "spent": self.spent,
            "reserved": self.reserved,
            "left": self.left,
            "recipes": [asdict(row) for row in self.recipes],
        }


def budget(home: SiteHome) -> Budget:
    """Reads the ledger of a site.

    Raises:
        ConfigError: The configuration does not hold.
        StorageError: The ledger cannot be read or trusted.
    """
    config = home.config
    policy = config.policy
    visits: tuple[Visit, ...] = ()
    if home.ledger_file.exists():
        # Opened first: it checks chain and owner.
        Ledger(home.ledger_file, config.site, ledger_policy(policy)).events()
        visits = _visits(home.ledger_file)
    names = {approval.recipe_id: approval.signed.recipe.name for approval in Approvals(home).all()}
    recipes = []
    for recipe_id in dict.fromkeys(visit.recipe_id for visit in visits):
        own = [visit for visit in visits if visit.recipe_id == recipe_id]
        recipes.append(
            RecipeCost(
                recipe_id=recipe_id,
                name=names.get(recipe_id, ""),
                visits=len(own),
                open=sum(not visit.settled for visit in own),
                steps=sum(visit.event.steps for visit in own),
                epsilon=epsilon_pld([visit.event for visit in own], policy.delta),
            )
        )
    spent = epsilon_pld([visit.event for visit in visits], policy.delta)
    ended = epsilon_pld([visit.event for visit in visits if visit.settled], policy.delta)
    return Budget(
        cap=policy.epsilon, delta=policy.delta, spent=spent, reserved=spent - ended, recipes=tuple(recipes),
        visits=visits,
    )  # fmt: skip


def draw(home: SiteHome, found: Budget, path: Path) -> None:
    """Draws how the spent epsilon grew, visit by visit, below its cap.

    Raises:
        ConfigError: The file's ending is not one that can be drawn.
        StorageError: The file cannot be written.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--plot: got {path.name}; expected a name that ends with {', '.join(_FORMATS)}")
    from matplotlib.figure import Figure

    from common.style import CARD, GRID, INK, MUTED, PALETTE

    count = len(found.visits)
    ends = sorted({0, count, *(round(count * step / _POINTS) for step in range(_POINTS))})
    spent = [epsilon_pld([visit.event for visit in found.visits[:end]], found.delta) for end in ends]
    figure = Figure(figsize=(7.5, 4), layout="constrained", facecolor=CARD)
    axes = figure.add_subplot()
    starts = [0, *accumulate(row.visits for row in found.recipes)]
    if [row.recipe_id for row in found.recipes for _ in range(row.visits)] == [v.recipe_id for v in found.visits]:
        for at, row in enumerate(found.recipes):  # one after the other: each has its stretch
            label = row.name or row.recipe_id[:12]
            axes.axvspan(starts[at], starts[at + 1], color=PALETTE[at % len(PALETTE)], alpha=0.12, lw=0, label=label)
    axes.step(ends, spent, where="post", color=INK, lw=1.8, label="spent")
    axes.axhline(found.cap, color=PALETTE[1], lw=1.2, ls="--", label=f"cap {found.cap:g}")
    axes.set_xlabel("visits", color=MUTED)
    axes.set_ylabel(f"epsilon at delta {found.delta:g}", color=MUTED)
    axes.set_title(f"Privacy budget of {home.config.site}", color=INK, loc="left")
    axes.set_xlim(0, max(count, 1))
    axes.set_ylim(0, 1.1 * max(found.cap, *spent))
    axes.grid(color=GRID, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    with storing(path.name):
        figure.savefig(path, dpi=150)


def _visits(path: Path) -> tuple[Visit, ...]:
    """The reservations of a ledger that was checked, in their order, with the steps that were really run."""
    with storing("the privacy ledger"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    settled = {line["number"]: int(line["steps"]) for line in lines if line["kind"] == "settle"}
    return tuple(
        Visit(
            recipe_id=line["recipe_id"],
            round=line["round"],
            event=Event(
                noise_multiplier=line["noise_multiplier"],
                sampling_rate=line["sampling_rate"],
                steps=min(line["steps"], settled.get(line["number"], line["steps"])),
            ),
            settled=line["number"] in settled,
        )
        for line in lines
        if line["kind"] == "reserve"
    )


# Events


def in_words(event: Logged) -> str:
    """One line about an event of a site's log."""
    facts: Mapping[str, Any] = event.facts
    told = _WORDS.get(event.kind)
    if told is None:
        rest = ", ".join(f"{name} {_short(value)}" for name, value in facts.items())
        return _plain(f"{event.kind}{': ' if rest else ''}{rest}")
    values = {name: _short(value) for name, value in facts.items()}
    epsilon = facts.get("epsilon")
    values["spent"] = f", epsilon {epsilon:.2f}" if isinstance(epsilon, float) else ""
    size = facts.get("bytes")
    values["size"] = f"{size / 1e6:.1f} MB" if isinstance(size, int) else "unknown size"
    values["patients_train"] = str((facts.get("patients") or {}).get("train", "?"))
    return _plain(told.format_map(_Missing(values)))


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
    "site started": "Opened the images for recipe {recipe_id}: {patients_train} patients to train on",
    "question received": "The coordinator asked about recipe {recipe_id}",
    "plan received": "The coordinator asked for round {round} of recipe {recipe_id} ({work})",
    "budget reserved": "Reserved {steps} noised steps for round {round}{spent} in all",
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


def _plain(text: str) -> str:
    # Words of others stand in some events: they shall not move the cursor of a terminal.
    return "".join(letter if letter.isprintable() else " " for letter in text)
