"""What a site's ledger tells its own people: epsilon by recipe, and a drawing of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from client.approvals import Approvals
from client.ledger import Entry, remembered
from client.policy import ledger_of
from common.accounting import accounts, epsilon_pld
from common.chain import GENESIS
from common.deployment import SiteHome
from common.errors import ConfigError
from common.journal import own_events
from common.storage import storing

_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 40
"""Drawn at most: each costs an epsilon of its own."""


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
    """Noised steps of training."""
    epsilon: float
    """Of the updates, as if nothing else had been trained on these patients."""
    scores_epsilon: float
    """Of the noised scores alone; 0 where none left."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The account of the cohort, at the policy's delta."""

    cap: float
    delta: float
    spent: float
    """Everything together, open reservations in full."""
    prv: float
    rdp: float
    """The same by the accountants that cross-check."""
    reserved: float
    """How much of it would not be there without the open ones."""
    recipes: tuple[RecipeCost, ...]
    visits: tuple[Entry, ...]
    trouble: str
    """As of `trouble`: more was spent than is told here. Else empty."""

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
            "spent_prv": self.prv,
            "spent_rdp": self.rdp,
            "reserved": self.reserved,
            "left": self.left,
            "trouble": self.trouble or None,
            "recipes": [asdict(row) for row in self.recipes],
        }


def budget(home: SiteHome) -> Budget:
    """Reads the ledger of a site.

    Raises:
        AuditError: The log, which remembers the newest ledger, does not hold.
        ConfigError: The configuration does not hold.
        StorageError: The ledger cannot be read or trusted.
    """
    policy = home.config.policy
    visits: tuple[Entry, ...] = ()
    if home.ledger_file.exists():
        visits = ledger_of(home).entries()
    names = {approval.recipe_id: approval.signed.recipe.name for approval in Approvals(home).all()}
    recipes = []
    for recipe_id in dict.fromkeys(visit.recipe_id for visit in visits):
        own = [visit for visit in visits if visit.recipe_id == recipe_id and visit.kind == "updates"]
        told = [visit for visit in visits if visit.recipe_id == recipe_id and visit.kind == "scores"]
        recipes.append(
            RecipeCost(
                recipe_id=recipe_id,
                name=names.get(recipe_id, ""),
                visits=len(own),
                open=sum(not visit.settled for visit in (*own, *told)),
                steps=sum(visit.event.steps for visit in own),
                epsilon=epsilon_pld([visit.event for visit in own], policy.delta),
                scores_epsilon=epsilon_pld([visit.event for visit in told], policy.delta),
            )
        )
    together = accounts([visit.event for visit in visits], policy.delta)
    spent = together.pld
    ended = epsilon_pld([visit.event for visit in visits if visit.settled], policy.delta)
    return Budget(
        cap=policy.epsilon, delta=policy.delta, spent=spent, prv=together.prv, rdp=together.rdp,
        reserved=spent - ended, recipes=tuple(recipes),
        visits=visits, trouble=trouble(home),
    )  # fmt: skip


def trouble(home: SiteHome) -> str:
    """How the ledger is less than the site's log remembers of it; empty when it is all there.

    Raises:
        AuditError: The log does not hold.
        StorageError: Log or ledger cannot be read or trusted.
    """
    head = remembered(own_events(home.audit_file, home.signing_key))
    if head == GENESIS:
        return ""
    if not home.ledger_file.exists():
        return "the privacy ledger is missing, which this site's log remembers"
    return "" if ledger_of(home).holds(head) else "the privacy ledger is older than this site's log remembers"


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
    order = {row.recipe_id: at for at, row in enumerate(found.recipes)}
    begin, drawn = 0, set[str]()
    for recipe_id, stretch in groupby(visit.recipe_id for visit in found.visits):
        end, row = begin + sum(1 for _ in stretch), found.recipes[order[recipe_id]]
        label = None if recipe_id in drawn else row.name or recipe_id[:12]
        color = PALETTE[order[recipe_id] % len(PALETTE)]
        axes.axvspan(begin, end, color=color, alpha=0.12, lw=0, label=label)
        drawn.add(recipe_id)
        begin = end
    waiting = [at for at, visit in enumerate(found.visits) if not visit.settled]
    for at in waiting:
        label = "reserved, not ended" if at == waiting[0] else None
        axes.axvspan(at, at + 1, fill=False, hatch="///", edgecolor=MUTED, lw=0, label=label)
    # reserved before the visit begins, so its whole span stands at what it leaves spent
    axes.step(ends, spent, where="pre", color=INK, lw=1.8, label="spent")
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
