"""A federation from the first hello to the last round, kept on disk so that a crash loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.chain import Event
from common.config import Recipe
from common.errors import QuorumError, StorageError
from common.exchange import Hello
from common.journal import Log
from common.models import buffers, build, get_weights
from common.storage import private_folder, write_whole
from common.vault import Secret
from server import checkpoint, rounds
from server.report import RoundLine
from server.rounds import RoundReport, ServerState, Transport
from server.scalars import Scalars

OnRound = Callable[[ServerState, RoundReport], None]

_KNOWN = TypeAdapter(dict[str, Hello])
_KNOWN_FILE = "sites.json"


@dataclass(frozen=True, kw_only=True)
class Federated:
    """A finished federation."""

    state: ServerState
    hellos: Mapping[str, Hello]
    """Of every site that ever came, as it introduced itself last; sorted by name."""


def coordinate(
    recipe: Recipe,
    transport: Transport,
    out: Path,
    *,
    audit: Log,
    resume: bool = False,
    end: bool = False,
    key: Secret | None = None,
    ledger_heads: Mapping[str, str] = MappingProxyType({}),
    on_round: OnRound = lambda state, report: None,
) -> Federated:
    """Runs, or finishes, the recipe's rounds with the sites behind `transport`.

    After every round TensorBoard, the audit log and the checkpoint are written, in this order:
    a crash in between repeats the round, whose answers the sites still have. Where a site that is asked for a round
    once more gives the same answer and pays nothing, the checkpoint is written while the next round is under way, and
    a crash repeats two.

    Args:
        out: Gets `checkpoints/` and `tensorboard/`.
        resume: Go on from the newest checkpoint, if there is one. When all rounds are behind it, no site is asked.
        end: Train no more: what the newest checkpoint holds is the final model. Whoever is there measures it, and
            nobody has to be.
        key: Encrypts the checkpoints.
        ledger_heads: What earlier runs saw of the sites' privacy ledgers, see `ledger_heads_in`.
        on_round: Called after every round.

    Raises:
        QuorumError: Too few sites, or too few admitted updates; resume goes on from the round before.
        StorageError: The disk is full; resume goes on from the last round on disk. Or `out` holds checkpoints
            and `resume` is false, or the training shall end and no round is on disk.
    """
    checkpoints = out / "checkpoints"
    if not resume and checkpoint.exists(checkpoints):
        raise StorageError("the folder of the run holds checkpoints already; say resume=true, or choose another out")
    model = build(recipe)
    state = checkpoint.load(checkpoints, recipe.id, key) if resume else None
    audit.append("run resumed" if state else "run started", recipe_id=recipe.id, round=state.round if state else 0)
    state = state or rounds.start(recipe, get_weights(model))
    file = checkpoints / _KNOWN_FILE
    known = _read_known(file) if state.round else {}
    hellos: dict[str, Hello] = {}
    if end and not state.done:
        state = _ended(state, audit)

    def here(kind: str, found: Mapping[str, Hello]) -> None:
        audit.append(kind, **_presence(found))
        hellos.update(found)
        known.update(found)
        _write_known(file, known)

    if not (state.done and known):
        before = state.history[-1].accepted if state.history else _read_known(file) if resume else ()
        quorum = 0 if state.ended else None
        here("sites present", transport.hello(recipe, audit.head, tuple(before), quorum=quorum))

    def sites() -> Mapping[str, Hello]:
        if new := transport.joined(recipe, audit.head):
            here("sites joined", new)
        return hellos

    with Scalars(out / "tensorboard") as scalars, ThreadPoolExecutor(1, "checkpoint") as writer:
        running = rounds.run(
            state, recipe, transport, sites, buffers=buffers(model), audit_head=lambda: audit.head,
            ledger_heads=ledger_heads,
        )  # fmt: skip
        try:
            saved: Future[Path] | None = None
            for state, report in running:
                scalars.write(round_line(report))
                _record(audit, report)
                if saved is not None:
                    saved.result()
                saved = writer.submit(checkpoint.write, state, checkpoints, key)
                if state.done or not _repeats(recipe):
                    saved.result()
                on_round(state, report)
        except QuorumError as error:
            audit.append("round failed", round=state.round + 1, why=str(error))
            raise
    return Federated(state=state, hellos=dict(sorted(known.items())))


def _ended(state: ServerState, audit: Log) -> ServerState:
    if not state.round:
        raise StorageError(
            "no round of this run is on disk, so there is no model to conclude with; resume it, and let a round end"
        )
    before, state = state.weights.digest, rounds.ended(state)
    audit.append(
        "training ended", recipe_id=state.recipe_id, round=state.round, before=before, after=state.weights.digest
    )
    return state


def ledger_heads_in(events: Iterable[Event]) -> dict[str, str]:
    """Site to the head of its privacy ledger that the coordinator's log holds last, over all runs."""
    found: dict[str, str] = {}
    for event in events:
        heads = event.facts.get("ledgers")
        if isinstance(heads, dict):
            found |= {str(site): str(head) for site, head in heads.items()}
    return found


def round_line(report: RoundReport) -> RoundLine:
    """The round as the report and TensorBoard show it."""
    accepted = report.accepted if report.work == "train" else {}
    return RoundLine(
        round=report.round,
        mean_validation=report.validation,
        validation={site: done.validation for site, done in report.accepted.items() if done.validation is not None},
        train_loss={site: done.train_loss for site, done in accepted.items() if done.train_loss is not None},
        accepted=tuple(accepted),
        refused=report.refused,
        update_norms={site: done.update_norm for site, done in accepted.items()},
        epsilon={site: done.spent.epsilon for site, done in accepted.items() if done.spent is not None},
        seconds=report.seconds,
    )


def _repeats(recipe: Recipe) -> bool:
    """Whether a site that has answered a later round already gives its answer to this one once more, for nothing."""
    # A private answer is paid for; of what rounding left over, a site keeps what the last round and its own need.
    privacy = recipe.privacy
    return not (privacy.active or privacy.secure_aggregation or recipe.federation.compression != "none")


def _presence(hellos: Mapping[str, Hello]) -> dict[str, Any]:
    return {
        "sites": {
            name: {
                "manifest": hello.manifest,
                "versions": dict(hello.versions),
                "patients": dict(hello.patients),
                "counts_rounded": hello.counts_rounded,
            }
            for name, hello in sorted(hellos.items())
        },
        "heads": {name: hello.audit_head for name, hello in sorted(hellos.items())},
    }


def _write_known(path: Path, hellos: dict[str, Hello]) -> None:
    private_folder(path.parent)
    write_whole(path, _KNOWN.dump_json(hellos))


def _read_known(path: Path) -> dict[str, Hello]:
    """Who has taken part so far; empty when it cannot be told, and the sites that are there must do."""
    try:
        return _KNOWN.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def _record(audit: Log, report: RoundReport) -> None:
    audit.append(
        "round aggregated" if report.work == "train" else "evaluation received",
        round=report.round,
        before=report.before,
        after=report.after,
        admitted={
            site: {"digest": done.update_digest, "norm": done.update_norm, "epsilon": _epsilon(done)}
            for site, done in report.accepted.items()
        },
        refused=dict(report.refused),
        heads=dict(report.heads),
        **({"session": report.session} if report.session else {}),
        ledgers={site: done.ledger_head for site, done in report.accepted.items() if done.ledger_head},
    )


def _epsilon(done: rounds.SiteRound) -> float | None:
    return done.spent.epsilon if done.spent is not None else None
