"""A deployed hospital's end of the federation: asks what is approved, keeps model and data loaded, answers.

Approval, policy and budget are looked up at every message, so what a person changes while the node runs counts at once.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal, TypeVar

import torch

from client.approvals import Approval, Approvals
from client.cohort import Cohort, site_cohort
from client.ledger import Ledger, remembered
from client.machine import devices_of
from client.parallel import dismiss
from client.policy import ledger_policy
from client.quality.gate import QualityError, require_quality
from client.secure import Sums
from client.site import Site
from common.chain import GENESIS, Event, parts, verify
from common.clock import utc_now
from common.compute import compute_with
from common.config import Recipe
from common.deployment import Policy, SiteConfig, SiteHome
from common.errors import ConfigError, DataError, FedicomError, PrivacyError, StorageError
from common.exchange import (
    Agreement,
    Answer,
    Ask,
    Code,
    Dealing,
    Hello,
    MaskedUpdate,
    Question,
    Refusal,
    RoundPlan,
    Shares,
    Update,
)
from common.identity import Signer
from common.installed import code_hashes, package_versions
from common.journal import Log, SharedLog
from common.lineage import approvals as standing_approvals
from common.models import WeightsFileError, build
from common.storage import drop_unfinished, private_folder, storing

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Hello | Update | Dealing | MaskedUpdate | Agreement | Shares)
Doing = Literal["idle", "reading images", "training", "evaluating"]

_NO_RECIPE = "0" * 64
_PROGRESS_S = 1.0
_AT_ONCE, _PER_S = 10_000.0, 2.0
"""Events of the log: so many as fast as they come, then so many a second, about 100 MB a day."""
_SAID, _SAID_S = 100, 3600.0
# A coordinator asks every half minute whether a recipe is approved meanwhile; the log need not grow by that.
_HEARD = frozenset({"question received", "plan received", "plan refused", "recipe refused"})
"""Events of the log that a message of the coordinator leaves."""
_SEE = "its people see why with `fedicom site status`"


@dataclass(frozen=True, kw_only=True)
class State:
    """What the site's own people are shown; nothing of it is sent."""

    doing: Doing = "idle"
    recipe: Mapping[str, Any] | None = None
    """`id`, `name` and `rounds` of the recipe that was worked on last."""
    round: int | None = None
    progress: tuple[int, int] | None = None
    """Steps done and steps in all, while images are read."""
    last_contact: str | None = None
    """When the coordinator's last message came; UTC, ISO 8601."""
    last_visit_s: float | None = None
    busy_s: float = 0.0
    """Seconds of all visits since the start."""
    last_refusal: Mapping[str, str] | None = None
    """`time`, `recipe_id`, `code`, `why` as the coordinator was told, and `here`, which it was not."""
    epsilon: Mapping[str, float] | None = None
    """`spent`, `cap` and `delta` of the cohort; None before anything was trained privately."""
    updates: int = 0
    """Sent since the log began; the next three as well."""
    evaluations: int = 0
    bytes_sent: int = 0
    refusals: int = 0


class _Hushed:
    """The site's log, which nobody fills by asking: a refusal that is given again and again stands once an hour, and
    where events come faster than a federation makes them, the answer waits until its event may be written."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._room, self._then = _AT_ONCE, time.monotonic()
        self._said: OrderedDict[str, float] = OrderedDict()
        """Refusals that were logged, the latest last, and until when they are not logged again."""

    @property
    def head(self) -> str:
        return self._log.head

    def append(self, kind: str, **facts: Any) -> str:
        if not kind.endswith(" refused"):
            return self._paced(kind, facts)
        said = json.dumps([kind, facts], sort_keys=True)
        if time.monotonic() < self._said.get(said, 0.0):
            return self._log.head
        head = self._paced(kind, facts)
        self._said[said] = time.monotonic() + _SAID_S
        self._said.move_to_end(said)
        while len(self._said) > _SAID:
            self._said.popitem(last=False)
        return head

    def _paced(self, kind: str, facts: Mapping[str, Any]) -> str:
        now = time.monotonic()
        self._room, self._then = min(_AT_ONCE, self._room + (now - self._then) * _PER_S), now
        if self._room < 1:
            time.sleep((1 - self._room) / _PER_S)
        self._room -= 1
        return self._log.append(kind, **facts)


class Resident:
    """Answers messages for a site until it is stopped; implements `client.app.Node`."""

    def __init__(
        self,
        home: SiteHome,
        *,
        on_change: Callable[[State], None] = lambda state: None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Names the site's folder.

        Args:
            on_change: Told the state whenever it changes, from the thread that answers.
            now: The local time, for the opening hours.

        Raises:
            ConfigError: The configuration does not hold.
            StorageError: The signing key cannot be read.
        """
        self._home, self._on_change, self._now = home, on_change, now
        self._name = home.config.site
        self._signer = Signer.load(home.signing_key)
        self._audit_file = home.audit_file
        self._log: Log = _Hushed(SharedLog(self._audit_file, self._signer))
        self._approvals = Approvals(home)
        # Outlives the site of one recipe: two recipes may have sums under way side by side.
        self._sums = Sums(self._name, home.state / "sums", self._signer, self._members)
        self._configuration = ""
        self._ledger_head = GENESIS
        self._site: Site | None = None
        self._loaded: tuple[object, ...] = ()
        self.state = State()

    # From the first message to the last

    def start(self) -> None:
        """Reads the log, looks whether the ledger is the one that the log remembers, and writes that the node runs.

        Raises:
            AuditError: The log does not hold.
            ConfigError: The configuration does not hold.
            StorageError: The log or the ledger cannot be read, trusted or written.
        """
        with storing("what a stop in the middle of a write left"):
            for folder in ("outbox", "remainders", "sums"):
                drop_unfinished(self._home.state / folder, below=True)
        events = self._events()
        self._ledger_head = remembered(events)
        config = self._configured()
        self._log.append("node started", configuration=self._configuration, versions=dict(package_versions()))
        self._log.append("code", packages=dict(code_hashes()))
        self._set(**_counted(events))
        if self._ledger_head != GENESIS or self._home.ledger_file.exists():
            ledger = self._ledger(config.policy)
            if why := self._cut(ledger):
                self._log.append("budget refused", why=why)
                self._show_refusal(_NO_RECIPE, "budget", why)
            else:
                self._account(ledger, config.policy)

    def stop(self, why: str = "") -> None:
        """Writes that the node ends.

        Raises:
            StorageError: The log cannot be written.
        """
        self._log.append("node stopped", why=why)

    # What the coordinator may ask

    def hello(self, question: Question) -> Hello | Refusal:
        """Who this is, or why it will not work on that recipe; the first time for a recipe its images are read."""

        def greet(site: Site) -> Hello | Refusal:
            if site.ledger is not None and (why := self._cut(site.ledger)):
                return self._refuse(question.recipe_id, 1, "budget", why, kind="budget refused")
            return site.hello(question)

        return self._answer(question.recipe_id, 1, greet)

    def visit(self, plan: RoundPlan) -> Update | Refusal:
        """Does what the plan asks, or says why not."""

        def work(site: Site) -> Update | Refusal:
            doing: Doing = "training" if plan.work == "train" else "evaluating"
            self._set(doing=doing, round=plan.round)
            return self._visit(site, plan)

        began = time.monotonic()
        reply = self._answer(plan.recipe_id, plan.round, work)
        seconds = time.monotonic() - began
        self._set(last_visit_s=seconds, busy_s=self.state.busy_s + seconds)
        return reply

    def step(self, ask: Ask) -> Answer | Refusal:
        """Takes a step of a secure sum, or says why not."""

        def work(site: Site) -> Answer | Refusal:
            answer = site.step(ask)
            if isinstance(answer, MaskedUpdate):
                self._set(updates=self.state.updates + 1, bytes_sent=self.state.bytes_sent + answer.values.nbytes)
            return answer

        reply = self._answer(ask.recipe_id, ask.round, work)
        assert not isinstance(reply, Hello | Update)
        return reply

    def misunderstood(self, why: str) -> Refusal:
        """The answer to a message that is none of ours, or was refused unread; nothing is run for it."""
        recipe = self.state.recipe
        return self._refuse(str(recipe["id"]) if recipe else _NO_RECIPE, 1, "message", why, kind="message refused")

    # How it is answered

    def _answer(self, recipe_id: str, round_: int, ask: Callable[[Site], T | Refusal]) -> T | Refusal:
        reply: T | Refusal
        refusals = self.state.refusals
        self._set(last_contact=utc_now())
        try:
            site = self._permitted(recipe_id, round_)
            reply = ask(site) if isinstance(site, Site) else site
        except FedicomError as error:
            reply = self._refuse(recipe_id, round_, "training", "the site could not answer; " + _SEE, error)
        except Exception as error:
            log.exception("no answer to a message about recipe %s", recipe_id[:12])
            why = f"{type(error).__name__} at the site; see its own log"
            reply = self._refuse(recipe_id, round_, "training", why, error)
        if isinstance(reply, Refusal) and self.state.refusals == refusals:  # the site's own
            self._show_refusal(recipe_id, reply.code, reply.why)
        self._set(doing="idle", progress=None)
        return reply

    def _permitted(self, recipe_id: str, round_: int) -> Site | Refusal:
        """The site, opened for this recipe under today's policy."""
        try:
            config = self._configured()
        except FedicomError as error:
            # The text quotes site.yaml, which is nobody's business.
            why = "this site's configuration does not hold at the moment; " + _SEE
            return self._refuse(recipe_id, round_, "policy", why, error)
        try:
            approval = self._approvals.find(recipe_id)
        except ConfigError as error:
            return self._refuse(recipe_id, round_, "recipe", str(error), error)
        if approval is None:
            if self._loaded[:1] == (recipe_id,):
                self._unload()
            return self._refuse(recipe_id, round_, "recipe", f"recipe {recipe_id[:12]} is not approved at this site")
        recipe = approval.signed.recipe
        self._set(recipe={"id": recipe.id, "name": recipe.name, "rounds": recipe.rounds})
        try:
            return self._opened(approval, config)
        except WeightsFileError as error:
            why = "the file of first weights that the recipe names is not here, or is another one; " + _SEE
            return self._refuse(recipe_id, round_, "recipe", why, error)
        except QualityError as error:
            why = "the data of this site does not keep the site's own limits; " + _SEE
            return self._refuse(recipe_id, round_, "data", why, error)
        except DataError as error:
            # Its numbers may be about fewer patients than may be told.
            why = "the images and labels of this site make no cohort for this recipe; " + _SEE
            return self._refuse(recipe_id, round_, "data", why, error)
        except StorageError as error:
            why = "this site cannot read its images, or not keep what it prepares; " + _SEE
            return self._refuse(recipe_id, round_, "data", why, error)
        except (ConfigError, PrivacyError) as error:
            return self._refuse(recipe_id, round_, "recipe", str(error), error)

    def _visit(self, site: Site, plan: RoundPlan) -> Update | Refusal:
        paid = plan.work == "train" or site.policy.metrics == "noised"
        if site.ledger is not None and paid and (why := self._cut(site.ledger)):
            return self._refuse(plan.recipe_id, plan.round, "budget", why, kind="budget refused")
        reply = site.visit(plan)
        if site.ledger is not None and paid:
            self._ledger_head = site.ledger.head
            self._account(site.ledger, site.policy)
        if isinstance(reply, Refusal):
            return reply
        self._set(
            updates=self.state.updates + (len(reply.delta) > 0),  # a secure sum's goes later, in a step
            evaluations=self.state.evaluations + (plan.work == "evaluate"),
            bytes_sent=self.state.bytes_sent + reply.nbytes,
        )
        return reply

    def _stands(self, recipe_id: str) -> bool:
        if self._approvals.find(recipe_id) is not None:
            return True
        self._approvals.forget(recipe_id)  # the work of which this is the end may have kept something since
        return False

    # What is kept loaded

    def _opened(self, approval: Approval, config: SiteConfig) -> Site:
        recipe, policy = approval.signed.recipe, config.policy
        # Approving a recipe anew reads its data anew.
        report = self._report_mark(recipe, config) if config.quality is not None else None
        wanted = (
            recipe.id, approval.time, config.data, config.device, config.devices, config.threads, config.cache,
            config.quality, report,
        )  # fmt: skip
        if self._site is None or self._loaded != wanted:
            self._unload()
            self._site = self._build(recipe, config)
            self._loaded = wanted
        device = self._site.device
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(policy.gpu_memory_fraction, device)
        self._site.policy = policy
        self._site.ledger = self._account_of(recipe, policy)
        return self._site

    def _build(self, recipe: Recipe, config: SiteConfig) -> Site:
        if not standing_approvals(self._name, self._events(), recipe.id):
            raise ConfigError(
                f"the log of this site does not say that recipe {recipe.id[:12]} is approved, or says that this was "
                "withdrawn; approve it anew"
            )
        devices = devices_of(config)
        compute_with(config.threads)
        model = functools.cache(lambda: build(recipe))
        model()  # what cannot be built is told before hours are spent on reading
        return Site(
            self._name,
            recipe,
            self._cohort(recipe, config),
            model,
            folder=private_folder(self._home.state),
            audit=self._log,
            ledger=self._account_of(recipe, config.policy),
            device=devices[0],
            devices=devices,
            policy=config.policy,
            keep=True,
            sums=self._sums,
            now=self._now,
            stands=self._stands,
        )

    def _cohort(self, recipe: Recipe, config: SiteConfig) -> Cohort:
        shown = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if done == total or time.monotonic() - shown > _PROGRESS_S:
                shown = time.monotonic()
                self._set(progress=(done, total))

        self._set(doing="reading images")
        if config.quality is not None:
            require_quality(self._home, config.quality, recipe.name)
        try:
            return site_cohort(self._home, recipe, progress)
        except ConfigError as error:  # of this site's folders, not of the recipe
            raise DataError(str(error)) from None

    def _report_mark(self, recipe: Recipe, config: SiteConfig) -> tuple[int, int] | None:
        """Tells a newer quality report from the one that was looked at."""
        path = self._home.quality_file(self._home.path / config.data_of(recipe.name))
        with storing("the quality report"):
            if not path.exists():
                return None
            status = path.stat()
        return status.st_mtime_ns, status.st_ino

    def _unload(self) -> None:
        if self._site is None:
            return
        self._site, self._loaded = None, ()
        dismiss()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _account_of(self, recipe: Recipe, policy: Policy) -> Ledger | None:
        return self._ledger(policy) if recipe.privacy.active or policy.metrics == "noised" else None

    def _ledger(self, policy: Policy) -> Ledger:
        private_folder(self._home.state)
        # Named by the site: one account for all recipes on its patients, whatever becomes of the cohort's files.
        return Ledger(self._home.ledger_file, self._name, ledger_policy(policy))

    def _cut(self, ledger: Ledger) -> str:
        """What is wrong when the ledger is not the one that was written to last; empty when it is."""
        try:
            ledger.repair()
            if ledger.holds(self._ledger_head):
                return ""
        except StorageError as error:
            return str(error)
        return (
            "the privacy ledger is older than this site's log remembers: lines were lost, or an old copy was put back; "
            "nothing private is trained until the newest ledger is back in its place"
        )

    def _members(self) -> Mapping[str, str]:
        return {name: member.signing for name, member in self._home.registry.members.items()}

    # What is written down

    def _configured(self) -> SiteConfig:
        config = self._home.config
        if config.site != self._name:
            raise ConfigError(f"site.yaml names site {config.site}, the node was started as {self._name}; restart it")
        digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
        if digest != self._configuration:
            self._log.append("configuration", sha256=digest, policy=asdict(config.policy))
            self._configuration = digest
        return config

    def _events(self) -> tuple[Event, ...]:
        path = self._audit_file
        return verify(path, self._signer.public) if path.exists() or parts(path) else ()

    def _account(self, ledger: Ledger, policy: Policy) -> None:
        self._set(epsilon={"spent": ledger.spent(), "cap": policy.epsilon, "delta": policy.delta})

    def _refuse(
        self,
        recipe_id: str,
        round_: int,
        code: Code,
        why: str,
        error: Exception | None = None,
        *,
        kind: str = "recipe refused",
    ) -> Refusal:
        why = why[:500]
        if error is not None:
            log.warning("recipe %s, round %d refused: %s", recipe_id[:12], round_, error)
        facts: dict[str, Any] = {"why": why}
        if kind != "message refused":
            facts |= {"recipe_id": recipe_id, "round": round_}
        if kind == "recipe refused":
            facts["code"] = code
        try:
            head = self._log.append(kind, **facts)
        except FedicomError:  # a full disk, or a log that does not hold: the coordinator shall still hear why
            log.exception("the refusal could not be logged")
            head = ""
        self._show_refusal(recipe_id, code, why, here=str(error or ""))
        return Refusal(site=self._name, recipe_id=recipe_id, round=round_, code=code, why=why, audit_head=head)

    def _show_refusal(self, recipe_id: str, code: str, why: str, *, here: str = "") -> None:
        told = {"time": utc_now(), "recipe_id": recipe_id, "code": code, "why": why, "here": here}
        self._set(last_refusal=told, refusals=self.state.refusals + 1)

    def _set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self._on_change(self.state)


def _counted(events: tuple[Event, ...]) -> dict[str, Any]:
    """What has left, what was refused and when the coordinator was heard last, as the log has it."""
    sent = [event for event in events if event.kind in ("update sent", "update sent again")]
    size = {event.facts.get("digest"): int(event.facts.get("bytes") or 0) for event in sent if "bytes" in event.facts}
    refused = ("plan refused", "recipe refused", "message refused")
    heard = [event.time for event in events if event.kind in _HEARD]
    return {
        "last_contact": heard[-1] if heard else None,
        "updates": len(sent),
        "bytes_sent": sum(size.get(event.facts.get("digest"), 0) for event in sent),
        "evaluations": sum(event.kind == "evaluation sent" for event in events),
        "refusals": sum(event.kind in refused for event in events),
    }
