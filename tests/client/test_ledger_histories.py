"""Random histories of several processes on one ledger, with crashes and errors at every write.

The model knows one thing: which updates left the house, and with how many noised steps each. Whatever happened in
between, the file must account for all of them, and never for more than the cap.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from client import ledger as module
from client.ledger import Entry, Ledger, Reservation, SitePolicy
from common.accounting import Event
from common.errors import PrivacyError, StorageError
from common.storage import write_whole

COHORT = "n"
POLICY = SitePolicy(epsilon=30.0, delta=1e-5, min_noise_multiplier=0.5, max_steps=10)
EVENTS = (
    Event(noise_multiplier=1.0, sampling_rate=0.5, steps=4),
    Event(noise_multiplier=1.0, sampling_rate=0.5, steps=9),
    Event(noise_multiplier=2.0, sampling_rate=1.0, steps=5),
)
CALLS = ("write", "fsync", "ftruncate", "replace")


class Crash(BaseException):
    """The process dies here."""


def cost(events: Iterable[Event], delta: float = 0) -> float:
    """In place of epsilon, for speed: exact, additive, and growing with steps and rate as epsilon does."""
    return sum(event.steps * event.sampling_rate / event.noise_multiplier**2 for event in events)


@dataclass
class Disk:
    """The system calls that write; the one that `fails_in` counts down to does half its work, then fails or dies."""

    fails_in: int | None = None
    error: BaseException | None = None
    partly: float = 0.5
    real: dict[str, Callable[..., Any]] = field(default_factory=lambda: {name: getattr(os, name) for name in CALLS})

    def call(self, name: str, *words: Any) -> Any:
        if self.fails_in is None:
            return self.real[name](*words)
        self.fails_in -= 1
        if self.fails_in >= 0:
            return self.real[name](*words)
        assert self.error is not None
        if name == "write":
            fd, data = words
            self.real["write"](fd, data[: int(self.partly * len(data))])
        elif self.partly > 0.5:  # done, and yet it was not heard that it was
            self.real[name](*words)
        raise self.error

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, lambda *words, name=name: self.call(name, *words))

    def remove(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)


faults = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 8), st.sampled_from(["die", "full", "broken"]), st.sampled_from([0.0, 0.4, 1.0])),
)


class Histories(RuleBasedStateMachine):
    """Two processes of one site, its outbox, an old copy of its ledger, and a clock that goes where it likes."""

    training = Bundle("training")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path, self.copy = self.folder / "ledger.jsonl", self.folder / "copy"
        self.disk = Disk()
        self.disk.install()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "epsilon_pld", cost)
        self.time = 1_700_000_000.0
        self.patch.setattr(module.time, "time", lambda: self.time)
        self.made = 0
        self.sent: dict[str, tuple[int, Event]] = {}  # update -> its reservation and the steps behind it
        self.anchor = ""  # head that the coordinator was told last
        self.old = False  # whether an old copy lies in the ledger's place

    def teardown(self) -> None:
        self.disk.remove()
        self.patch.undo()
        shutil.rmtree(self.folder)

    def ledger(self) -> Ledger:
        found = Ledger(self.path, COHORT, POLICY)
        found.repair()
        return found

    def faulty(self, fault: tuple[int, str, float] | None, work: Callable[[], Any]) -> Any:
        """What the work gives, or None when it failed or died."""
        if fault is not None:
            number = errno.ENOSPC if fault[1] == "full" else errno.EIO
            self.disk.error = Crash() if fault[1] == "die" else OSError(number, os.strerror(number))
            self.disk.fails_in, self.disk.partly = fault[0], fault[2]
        try:
            return work()
        except (PrivacyError, StorageError, Crash):
            return None
        finally:
            self.disk.fails_in = None

    def kept(self, recipe: str, number: int) -> Path:
        return self.folder / f"{recipe}-{number}.json"

    @rule(target=training, recipe=st.sampled_from("ab"), number=st.integers(1, 3), event=st.sampled_from(EVENTS),
          fault=faults)  # fmt: skip
    def ask(self, recipe: str, number: int, event: Event, fault: tuple[int, str, float] | None) -> Any:
        """A plan comes: what is kept is settled and sent again, else the visit is reserved and training begins."""

        def visit() -> Any:
            ledger, kept = self.ledger(), self.kept(recipe, number)
            if kept.exists():
                update = json.loads(kept.read_text())
                pending = ledger.pending(update["number"], recipe, round=number, base="w")
                if pending is not None:
                    self.settle(ledger, pending, update)
                else:
                    self.send(update)
                return None
            reserved = ledger.reserve(recipe, round=number, base="w", event=event, known=[self.anchor])
            assert not self.old or ledger.holds(self.anchor)
            return reserved

        reserved = self.faulty(fault, visit)
        return multiple() if reserved is None else reserved

    @rule(reserved=consumes(training), share=st.floats(0, 1), fault=faults)
    def finish(self, reserved: Reservation, share: float, fault: tuple[int, str, float] | None) -> None:
        """Training ends: keep, settle, send, as `Site.visit` does."""
        self.made += 1
        steps = round(share * reserved.event.steps)
        plain = {"name": f"update {self.made}", "number": reserved.number, "steps": steps}
        update = plain | {"noise": reserved.event.noise_multiplier, "rate": reserved.event.sampling_rate}

        def end() -> None:
            write_whole(self.kept(reserved.recipe_id, reserved.round), json.dumps(update).encode())
            self.settle(self.ledger(), reserved, update)

        self.faulty(fault, end)

    def settle(self, ledger: Ledger, reserved: Reservation, update: dict[str, Any]) -> None:
        try:
            ledger.settle(reserved, min(update["steps"], reserved.event.steps))
        except PrivacyError:
            self.kept(reserved.recipe_id, reserved.round).unlink(missing_ok=True)
            raise
        self.send(update)
        self.anchor = ledger.head

    def send(self, update: dict[str, Any]) -> None:
        event = Event(noise_multiplier=update["noise"], sampling_rate=update["rate"], steps=update["steps"])
        self.sent[update["name"]] = (update["number"], event)

    @rule(reserved=consumes(training))
    def die_while_training(self, reserved: Reservation) -> None:
        """Nothing left; the reservation stays."""

    @rule(recipe=st.sampled_from("ab"), number=st.integers(1, 3))
    def lose_the_outbox(self, recipe: str, number: int) -> None:
        self.kept(recipe, number).unlink(missing_ok=True)

    @rule(seconds=st.floats(-1e9, 1e9))
    def set_the_clock(self, seconds: float) -> None:
        self.time += seconds

    @rule()
    def copy_the_ledger(self) -> None:
        if self.path.exists() and not self.old:
            shutil.copy(self.path, self.copy)

    @rule(recipe=st.sampled_from("ab"), number=st.integers(1, 3), event=st.sampled_from(EVENTS))
    def put_the_old_copy_back_for_a_while(self, recipe: str, number: int, event: Event) -> None:
        """Whatever was told of the newer ledger is missed, and nothing is reserved on the old one."""
        if not self.copy.exists() or not self.anchor:
            return
        newest = self.path.read_bytes()
        shutil.copy(self.copy, self.path)
        if not self.ledger().holds(self.anchor):
            with pytest.raises(PrivacyError, match="older than others remember"):
                self.ledger().reserve(recipe, round=number, base="w", event=event, known=[self.anchor])
        self.path.write_bytes(newest)

    def entries(self) -> tuple[Entry, ...]:
        return self.ledger().entries()

    @invariant()
    def never_more_is_spent_than_the_cap(self) -> None:
        assert cost(entry.event for entry in self.entries()) <= POLICY.epsilon

    @invariant()
    def every_update_that_left_is_paid_and_by_a_reservation_of_its_own(self) -> None:
        paid = {entry.number: entry for entry in self.entries()}
        for number, event in self.sent.values():
            assert paid[number].event == event
            assert paid[number].settled
        assert max(Counter(number for number, _ in self.sent.values()).values(), default=0) <= 1

    @invariant()
    def the_last_head_that_was_told_is_still_there(self) -> None:
        assert self.ledger().holds(self.anchor)


Histories.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestHistories = Histories.TestCase
