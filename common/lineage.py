"""From a model back to its data: run, rounds, sites and data manifests that a model file came from, link by link."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.chain import TOLERANCE_S, Event
from common.errors import FedicomError
from common.logs import Check, Log, State, as_map, as_number, check_logs, first_bad, state_of
from common.printable import number_of
from common.storage import storing

if TYPE_CHECKING:
    from common.onnx_model import Description

T = TypeVar("T")

_BEGINS = ("run started", "run resumed")
_SENT = ("update sent", "update sent again")


class LineageError(FedicomError):
    """A link between a model and the data that it was trained on is missing or broken."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the coordinator's log tells of one run of a recipe."""

    recipe_id: str
    events: tuple[Event, ...]

    @property
    def rounds(self) -> tuple[Event, ...]:
        """The aggregations that stand: after a crash the rounds behind the last checkpoint were done again."""
        standing: list[Event] = []
        for event in self.events:
            if event.kind in _BEGINS:
                last = event.facts.get("round")
                standing = [done for done in standing if isinstance(last, int) and _fact(done, "round", int) <= last]
            elif event.kind == "round aggregated":
                standing.append(event)
        return tuple(standing)

    @property
    def exports(self) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.kind == "model exported")


def runs(log: Log) -> tuple[Run, ...]:
    """The runs of a coordinator's log, oldest first.

    A deployed coordinator's events name their run, for several share its log; in a simulation's
    log every "run started" begins one.
    """
    found: dict[str, tuple[str, list[Event]]] = {}
    untold = 0
    for event in log.events:
        name = event.facts.get("run")
        if not isinstance(name, str):
            untold += event.kind == "run started" or (event.kind == "run resumed" and not untold)
            name = f"{untold}"
        if event.kind in _BEGINS and name not in found:
            found[name] = (str(event.facts.get("recipe_id")), [])
        if name in found:
            found[name][1].append(event)
    return tuple(Run(recipe_id=recipe_id, events=tuple(events)) for recipe_id, events in found.values())


# Lineage


@dataclass(frozen=True, kw_only=True)
class RoundLink:
    """One aggregation between the first weights and the exported ones."""

    round: int
    time: str
    before: str
    after: str
    admitted: Mapping[str, str]
    """Site to digest of its update."""
    epsilon: Mapping[str, float | None]
    """Site to what it had spent with it."""


@dataclass(frozen=True, kw_only=True)
class Approval:
    """That a site's officer allowed a recipe."""

    site: str
    time: str
    by: str
    coordinator: str
    """Public key that the recipe was signed with."""


@dataclass(frozen=True, kw_only=True)
class SiteLink:
    """What one site put into the model."""

    name: str
    log: bool
    """Whether its own log was there; if not, the coordinator's word is all there is."""
    rounds: tuple[int, ...]
    manifests: tuple[str, ...]
    """SHA-256 of its cohort's manifest; more than one if its data changed on the way."""
    patients: Mapping[str, int]
    """By split, as the site tells them."""
    counts_rounded: bool
    """Whether the site rounds them down."""
    versions: Mapping[str, str]
    code: Mapping[str, str]
    epsilon: float | None
    approvals: tuple[Approval, ...]


def counted(patients: Mapping[str, object], rounded: bool) -> str:
    """A site's numbers of patients by split, as it tells them."""
    splits = (split for split in ("train", "validation", "test") if split in patients)
    told = [f"{split} {patients[split] or 'not told'}" for split in splits]
    return (", ".join(told) or "not told") + " (rounded down)" * (rounded and any(patients.values()))


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A model, link by link back to the data manifests; every link was checked."""

    file: str
    sha256: str
    weights: str
    exported: str
    """When."""
    recipe_id: str
    rounds: tuple[RoundLink, ...]
    sites: Mapping[str, SiteLink]
    epsilon: float | None
    """Highest that any site of the run has spent."""
    code: Mapping[str, str]
    """Of the coordinator."""
    early_stopped: bool
    """The weights are those of an earlier round than the last."""
    state: State
    """Of the logs."""
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """As the model file has it; its hash is `recipe_id`. Empty without the file."""


def trace(model: Path, logs: Sequence[Log], *, tolerance_s: float = TOLERANCE_S) -> Lineage:
    """The lineage of a model file, from its SHA-256 and, of an ONNX file, what it says of itself.

    Raises:
        ModelFileError: It is no model that Fedicom exported.
        LineageError: A log does not hold, or a link is missing; says which.
        StorageError: The file cannot be read.
    """
    from common.onnx_model import OnnxModel

    with storing("the model file"):
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
    log = _coordinators(logs)
    for run in runs(log):
        for export in run.exports:
            if export.facts.get("sha256") == digest:
                found = lineage(run, export, logs, tolerance_s=tolerance_s)
                if found.file.endswith(".onnx"):
                    return _with_file(found, OnnxModel(model, gpu=False).description)
                bare = "what the recipe is: a TorchScript file carries no description; trace the model.onnx beside it"
                checked = (*found.checked, "SHA-256 of the file is that of the logs")
                return replace(found, checked=checked, not_checked=(*found.not_checked, bare))
    raise LineageError(
        f"{log.path.name} holds no export of a file with SHA-256 {digest[:12]}; the file was changed after its "
        "export, or these are the logs of another run"
    )


def lineage(run: Run, export: Event, logs: Sequence[Log], *, tolerance_s: float = TOLERANCE_S) -> Lineage:
    """Follows one "model exported" event back to the data.

    Raises:
        LineageError: A log does not hold, or a link is missing; says which.
    """
    checks = check_logs(logs, tolerance_s=tolerance_s)
    if (bad := first_bad(checks)) is not None:
        raise LineageError(f"the logs do not hold, so nothing can be traced in them: {bad.why}")
    log = _coordinators(logs)
    before = Run(recipe_id=run.recipe_id, events=tuple(event for event in run.events if event.number < export.number))
    links, early = _rounds(before, _fact(export, "weights", str))
    sites = {item.name: item for item in logs if item.role == "site"}
    names = sorted({site for link in links for site in link.admitted})
    found = {name: _site(name, before, links, sites.get(name)) for name in names}
    spent = _epsilons(before)
    absent = [name for name in names if name not in sites]
    updates = sum(len(link.admitted) for link in links)
    seen = updates - sum(name in absent for link in links for name in link.admitted)
    state = state_of(checks)
    return Lineage(
        file=str(export.facts.get("file", "")),
        sha256=_fact(export, "sha256", str),
        weights=_fact(export, "weights", str),
        exported=export.time,
        recipe_id=run.recipe_id,
        rounds=links,
        sites=found,
        epsilon=max(spent.values(), default=None),
        code=_code(log.events, export.number),
        early_stopped=early,
        state=state,
        checked=(
            f"{number_of(len(logs), 'log')} checked"
            + (", those of both sides against each other" if state == "verified" else ""),
            f"the exported weights are those after round {links[-1].round}",
            f"{number_of(len(links), 'round')}, each from the weights that the one before it gave",
            f"{seen} of {updates} admitted updates stand in the logs of the sites that sent them",
        ),
        not_checked=(
            *unvouched(logs, checks),
            *(f"what {name} says: its log is not there" for name in absent),
            *(() if all(item.key_known for item in logs) else ("who signed the logs: no keys were given",)),
            "how the first weights were made: build them from the recipe and compare their digest",
        ),
    )


def unvouched(logs: Sequence[Log], checks: Sequence[Check]) -> list[str]:
    """Which events each side could still write anew alone, in logs that hold."""
    found = []
    for log in (log for log in logs if log.role != "authority"):
        last = max(
            (check.vouched for check in checks if check.log == log.name and check.vouched is not None), default=-1
        )
        if last < log.events[-1].number:
            which = f"events of {log.path.name} after event {last}" if last >= 0 else f"all events of {log.path.name}"
            found.append(f"{which}: no other log remembers a head that follows them")
    return found


def _with_file(found: Lineage, file: Description) -> Lineage:
    """The lineage of an export and what the file says must be one story."""
    for what, said, logged in (
        ("weights", file.weight_digest, found.weights),
        ("recipe", file.recipe_id, found.recipe_id),
    ):
        if said != logged:
            raise LineageError(f"the file says {what} {said[:12]}, the logs say {logged[:12]}")
    epsilon = file.privacy.get("epsilon") if file.privacy.get("mechanism") != "none" else None
    if epsilon != found.epsilon:
        raise LineageError(f"the file says epsilon {epsilon}, the highest in the logs is {found.epsilon}")
    recipe = json.loads(file.recipe)
    stopping = recipe.get("federation", {}).get("early_stopping", {}).get("patience_rounds", 0)
    if found.early_stopped and not stopping:
        raise LineageError("the exported weights are not those of the last round, and the recipe has no early stopping")
    checked = (*found.checked, "SHA-256, weights, recipe and epsilon of the file are those of the logs")
    return replace(found, recipe=recipe, checked=checked)


def _coordinators(logs: Sequence[Log]) -> Log:
    for log in logs:
        if log.coordinator:
            return log
    raise LineageError("the coordinator's log is not there; without it no export can be found")


def _rounds(run: Run, weights: str) -> tuple[tuple[RoundLink, ...], bool]:
    """The aggregations up to the exported weights, and whether early stopping went back to them."""
    links = [
        RoundLink(
            round=_fact(event, "round", int),
            time=event.time,
            before=_fact(event, "before", str),
            after=_fact(event, "after", str),
            admitted={site: str(as_map(said).get("digest")) for site, said in _fact(event, "admitted", dict).items()},
            epsilon={site: as_map(said).get("epsilon") for site, said in _fact(event, "admitted", dict).items()},
        )
        for event in run.rounds
    ]
    if not links:
        raise LineageError("no round was aggregated before the export; the model was trained on nothing")
    for place, link in enumerate(links, start=1):
        if link.round != place:
            raise LineageError(f"the aggregation of round {place} is missing; round {link.round} comes in its place")
        if place > 1 and link.before != links[place - 2].after:
            raise LineageError(
                f"round {place} began with weights {link.before[:12]}, but round {place - 1} gave "
                f"{links[place - 2].after[:12]}"
            )
    last = run.rounds[-1].number
    # An operator who ends the training before its last round takes the moving average then, where there is one.
    ends = (event for event in run.events if event.kind == "training ended" and event.number > last)
    last_weights = {str(event.facts.get("before")): str(event.facts.get("after")) for event in ends}
    if weights in (links[-1].after, last_weights.get(links[-1].after)):
        return tuple(links), False
    # Early stopping evaluates the better, earlier weights once more, after the last round.
    again = any(
        event.kind == "evaluation received" and event.number > last and event.facts.get("after") == weights
        for event in run.events
    )
    if again and links[0].before == weights:
        raise LineageError(
            "early stopping took the weights from before the first round, which scored best; the model was trained on "
            "nothing"
        )
    for place, link in enumerate(links, start=1):
        if again and link.after == weights:
            return tuple(links[:place]), True
    raise LineageError(
        f"the exported weights {weights[:12]} are not the output of the last aggregation, round {links[-1].round}, "
        f"which gave {links[-1].after[:12]}"
    )


def _site(name: str, run: Run, links: Sequence[RoundLink], log: Log | None) -> SiteLink:
    mine = [link for link in links if name in link.admitted]
    manifests: dict[str, None] = {}
    started: Event | None = None
    allowed: tuple[Approval, ...] = ()
    for link in mine:
        told = _told(name, run, link.round)
        if log is not None:
            sent = _sent(name, log, run.recipe_id, link)
            started = _started(name, log, run.recipe_id, sent)
            allowed = _approved(name, log, run.recipe_id, sent)
            if sent.facts.get("epsilon") != link.epsilon.get(name):
                raise LineageError(
                    f"round {link.round}: {name} sent epsilon {sent.facts.get('epsilon')}, the coordinator's log says "
                    f"{link.epsilon.get(name)}"
                )
            manifest = _fact(started, "manifest", str)
            if told is not None and told.get("manifest") != manifest:
                raise LineageError(
                    f"round {link.round}: {name} trained on manifest {manifest[:12]}, the coordinator's log says "
                    f"{str(told.get('manifest'))[:12]}"
                )
        elif told is not None:
            manifest = str(told.get("manifest"))
        else:
            raise LineageError(f"round {link.round}: no log says on which data {name} trained")
        manifests[manifest] = None
    told = _told(name, run, mine[-1].round) or {}
    last = started.facts if started is not None else told
    return SiteLink(
        name=name,
        log=log is not None,
        rounds=tuple(link.round for link in mine),
        manifests=tuple(manifests),
        patients=as_map(last.get("patients")),
        counts_rounded=last.get("counts_rounded") is True,
        versions=as_map(last.get("versions")),
        code=_code(log.events, started.number + 1) if log is not None and started is not None else {},
        epsilon=_epsilons(run).get(name),
        approvals=allowed,
    )


def _told(name: str, run: Run, round_: int) -> Mapping[str, Any] | None:
    """What the coordinator wrote down of a site, last before it aggregated this round."""
    told: Mapping[str, Any] | None = None
    end = next(event.number for event in run.rounds if event.facts["round"] == round_)
    for event in run.events:
        if event.number < end:
            told = as_map(event.facts.get("sites")).get(name) or told
    return None if told is None else as_map(told)


def _sent(name: str, log: Log, recipe_id: str, link: RoundLink) -> Event:
    digest = link.admitted[name]
    found: list[Event] = []
    plan: Event | None = None
    for event in log.events:
        if event.kind == "plan received":
            plan = event
        elif event.kind in _SENT and event.facts.get("digest") == digest and event.facts.get("round") == link.round:
            facts = plan.facts if plan is not None else {}
            # sent again after a restart it has no plan of its own; the first sending has
            if (facts.get("recipe_id"), facts.get("round"), facts.get("weights")) == (
                recipe_id, link.round, link.before,
            ):  # fmt: skip
                found.append(event)
    if found:
        # With seeded noise two runs of a recipe send equal updates; what was spent by then tells them apart.
        return next((event for event in found if event.facts.get("epsilon") == link.epsilon.get(name)), found[0])
    raise LineageError(
        f"round {link.round}: the coordinator admitted update {digest[:12]} of {name}, but the log of {name} holds no "
        f"such update for a plan of recipe {recipe_id[:12]} with weights {link.before[:12]}"
    )


def _started(name: str, log: Log, recipe_id: str, sent: Event) -> Event:
    for event in reversed(log.events[: sent.number]):
        if event.kind == "site started" and event.facts.get("recipe_id") == recipe_id:
            return event
    raise LineageError(f"the log of {name} does not say with which data recipe {recipe_id[:12]} was started")


def approvals(name: str, events: Sequence[Event], recipe_id: str) -> tuple[Approval, ...]:
    """Who allowed a recipe at a site, as it stands after these events of the site's log."""
    standing: list[Approval] = []
    for event in events:
        facts = event.facts
        if facts.get("recipe_id") != recipe_id:
            continue
        if event.kind == "recipe approved":
            by, key = str(facts.get("by", "")), str(facts.get("coordinator", ""))
            standing.append(Approval(site=name, time=event.time, by=by, coordinator=key))
        elif event.kind == "approval withdrawn":
            standing.clear()
    return tuple(standing)


def _approved(name: str, log: Log, recipe_id: str, sent: Event) -> tuple[Approval, ...]:
    """Who had allowed the recipe when this update was sent; a deployed node must have asked somebody."""
    before = log.events[: sent.number]
    standing = approvals(name, before, recipe_id)
    if not standing and any(event.kind == "node started" for event in before):
        raise LineageError(
            f"round {sent.facts.get('round')}: {name} trained recipe {recipe_id[:12]}, and its log holds no approval "
            "that stood then"
        )
    return standing


def _epsilons(run: Run) -> dict[str, float]:
    """Site to epsilon as it reported it last."""
    found: dict[str, float] = {}
    standing = {event.number for event in run.rounds}
    for event in run.events:
        if event.number in standing or event.kind == "evaluation received":
            for site, said in _fact(event, "admitted", dict).items():
                if (epsilon := as_number(as_map(said).get("epsilon"))) is not None:
                    found[site] = epsilon
    return found


def _code(events: Sequence[Event], end: int) -> Mapping[str, str]:
    """Package hashes as the log has them last before event `end`."""
    for event in reversed(events[:end]):
        if event.kind == "code":
            return {name: str(value) for name, value in as_map(event.facts.get("packages")).items()}
    return {}


# Facts are signed, but not by us: what is not there, or of another type, is a link that is missing.


def _fact(event: Event, key: str, kind: type[T]) -> T:
    value = event.facts.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise LineageError(f"event {event.number} ({event.kind}) does not say its {key}")
    return value
