"""What a site has spent of its patients' privacy: a file that only grows, checked before anything is trained.

One file a cohort, one line an entry, each holding the SHA-256 of the line before. A visit is *reserved* before
its first noised step and *settled* after its last one, before the reply leaves the house:

    reservation = ledger.reserve(recipe_id, round=3, base=plan.weights.digest, event=event)
    ...                                             # train
    ledger.settle(reservation, steps_really_run)    # now, and only now, the reply may leave

A crash in between released nothing, so the same request again takes over the open reservation instead of
paying twice. Nothing else gives a reservation back: one that nobody settles stays spent in full.

The chain shows a changed or missing line, but not that lines are missing at the end. So the audit log and the
coordinator remember `head`, and what they remember is asked at the start (`holds`) and again, under the same lock,
before a reservation (`reserve(known=...)`).

Everything composes one after the other, over recipes and kinds of release: the splits of two recipes may divide the
patients differently, so that nobody counts on a patient being in one of them alone. Time plays no part: entries
count by their order in the chain, and the clock's reading in each is a note for people.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common import chain
from common.accounting import Event, epsilon_pld
from common.epsilon import rounded_up
from common.errors import PrivacyError, StorageError
from common.storage import Flush, flush_folder, to_disk

Kind = Literal["updates", "scores"]
"""What is paid for: noised steps of training, or noised histograms of scores."""
OLD_COPY = (
    "the privacy ledger is older than others remember it: lines were lost, or an old copy was put back; nothing "
    "private is trained until the newest ledger is back in its place"
)

_VERSION = 1
_GENESIS = "0" * 64


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What a site allows, whatever a recipe proposes.

    Raises:
        PrivacyError: A limit is outside its range.
    """

    epsilon: float
    """Most that all recipes together may spend on this cohort, at `delta`."""
    delta: float
    """Below one over the number of patients."""
    min_noise_multiplier: float = 0.3
    max_sampling_rate: float = 1.0
    max_steps: int = 100_000
    """In one visit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise PrivacyError(f"policy epsilon: got {self.epsilon}, expected a finite number above 0")
        if not 0 < self.delta < 1:
            raise PrivacyError(f"policy delta: got {self.delta}, expected a number in (0, 1)")
        if not self.min_noise_multiplier > 0:
            raise PrivacyError(f"policy min_noise_multiplier: got {self.min_noise_multiplier}, expected above 0")

    def check(self, event: Event, kind: Kind = "updates") -> None:
        """Raises PrivacyError when the event is outside the limits that do not depend on what was spent.

        The limits on noise, rate and steps are about training: a histogram of scores is one release over everybody,
        with noise of the site's own choice.
        """
        if kind == "scores":
            return
        for name, got, allowed, ok in (
            ("noise multiplier", event.noise_multiplier, self.min_noise_multiplier, "at least"),
            ("sampling rate", event.sampling_rate, self.max_sampling_rate, "at most"),
            ("steps of one visit", event.steps, self.max_steps, "at most"),
            ("steps of one visit", event.steps, 1, "at least"),
        ):
            if not (got >= allowed if ok == "at least" else got <= allowed):
                raise PrivacyError(
                    f"{name}: got {got:g}, this site allows {ok} {allowed:g}; change the recipe or the site's policy"
                )


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """The right to run some noised steps, already counted as spent."""

    number: int
    """Of the entry in the ledger."""
    recipe_id: str
    round: int
    base: str
    """Digest of the weights that the visit starts from."""
    event: Event
    epsilon: float
    """Of everything spent on the cohort with this, at the policy's delta."""


@dataclass(frozen=True)
class Entry:
    """A reservation as the file has it."""

    number: int
    recipe_id: str
    round: int
    base: str
    event: Event
    settled: bool
    kind: Kind = "updates"

    def is_open(self, recipe_id: str, round_: int, base: str) -> bool:
        return not self.settled and (self.recipe_id, self.round, self.base) == (recipe_id, round_, base)

    def reservation(self, epsilon: float) -> Reservation:
        return Reservation(
            number=self.number, recipe_id=self.recipe_id, round=self.round, base=self.base, event=self.event,
            epsilon=epsilon,
        )  # fmt: skip


def remembered(events: Iterable[chain.Event]) -> str:
    """The newest head of the ledger that a site's log holds; zeros where it holds none."""
    heads = [str(event.facts["ledger_head"]) for event in events if event.facts.get("ledger_head")]
    return heads[-1] if heads else _GENESIS


class Ledger:
    """The privacy account of one cohort, safe for several processes at once.

    Every call reads and checks the whole file again under a lock.
    """

    def __init__(self, path: Path, cohort: str, policy: SitePolicy, flush: Flush = to_disk) -> None:
        """Opens the account; the file appears with the first reservation.

        Args:
            path: The file; on a local disk, for locks and syncs on network file systems may lie.
            cohort: What names the set of patients, for example the hash of its manifest; an account of
                another cohort is refused.
            policy: The site's limits.
            flush: Has every entry last before the caller hears of it; see `common.storage`.
        """
        self._path, self._cohort, self._policy, self._flush = path, cohort, policy, flush

    def reserve(
        self,
        recipe_id: str,
        *,
        round: int,
        base: str,
        event: Event,
        kind: Kind = "updates",
        known: Iterable[str] = (),
        visits: int | None = None,
    ) -> Reservation:
        """Counts a visit as spent, before it happens.

        The same request (recipe, round, base, event, kind) takes over an open reservation of its own; after
        `settle` it is a new visit with new noise, and paid for.

        Args:
            kind: What is released; everything composes, whatever it is.
            known: Heads that others remember of this ledger (the audit log, the coordinator); "" is none.
            visits: Most that the recipe may have of this kind, those that cost nothing left out; None: any number. Its
                rounds are what the site approved: beyond them somebody asks a round again, from other weights.

        Raises:
            PrivacyError: The site's policy or its budget forbids it, or a known head is not in the ledger; nothing
                was written.
            StorageError: The ledger cannot be read, trusted or written.
        """
        self._policy.check(event, kind)
        with self._locked() as (fd, lines):
            if not all(_holds(lines, head) for head in known):
                raise PrivacyError(OLD_COPY)
            entries = _entries(lines)
            events = [entry.event for entry in entries]
            for entry in entries:
                if entry.event == event and entry.kind == kind and entry.is_open(recipe_id, round, base):
                    return entry.reservation(epsilon_pld(events, self._policy.delta))
            same = [entry for entry in entries if (entry.recipe_id, entry.kind) == (recipe_id, kind)]
            if visits is not None and sum(entry.event.steps > 0 for entry in same) >= visits:
                raise PrivacyError(
                    f"this site has paid for all {visits} rounds of recipe {recipe_id[:12]} already; to train it once "
                    "more, sign it with another seed and have it approved"
                )
            projected = epsilon_pld([*events, event], self._policy.delta)
            if not projected <= self._policy.epsilon:
                raise PrivacyError(
                    f"round {round} of recipe {recipe_id[:12]} would bring this site to epsilon "
                    f"{rounded_up(projected)}, its cap is {self._policy.epsilon:g} at delta {self._policy.delta:g}, "
                    f"spent so far {rounded_up(epsilon_pld(events, self._policy.delta))}; ask for less, or the site "
                    "raises its cap"
                )
            if not lines:
                self._append(fd, lines, kind="open", version=_VERSION, cohort=self._cohort)
            number = len(lines)
            self._append(
                fd, lines, kind="reserve", number=number, recipe_id=recipe_id, round=round, base=base,
                noise_multiplier=event.noise_multiplier, sampling_rate=event.sampling_rate, steps=event.steps,
                **({} if kind == "updates" else {"releases": kind}),
            )  # fmt: skip
            return Reservation(
                number=number, recipe_id=recipe_id, round=round, base=base, event=event, epsilon=projected
            )

    def pending(self, number: int, recipe_id: str, *, round: int, base: str) -> Reservation | None:
        """The reservation of that number, if it is of this visit and still open.

        For a reply that was kept on disk, then a crash, then the same question: settle it before the kept
        reply leaves, else the reservation stays open and a second training could take it over for nothing. By its
        number, for one visit may have several: its terms change with the number of patients.

        Raises:
            StorageError: The ledger cannot be read or trusted.
        """
        entries = self.entries()
        epsilon = epsilon_pld([entry.event for entry in entries], self._policy.delta)
        found = [entry for entry in entries if entry.number == number and entry.is_open(recipe_id, round, base)]
        return found[0].reservation(epsilon) if found else None

    def settle(self, reservation: Reservation, steps: int) -> float:
        """Closes a visit with the steps that were really run; call it before the reply leaves.

        Args:
            reservation: From `reserve`.
            steps: Noised steps run, empty batches included; at most those reserved.

        Returns:
            Epsilon spent on the cohort, at the policy's delta.

        Raises:
            PrivacyError: More steps than reserved, or the reservation is closed already (another process
                answered this visit): the reply must not leave.
            StorageError: The ledger cannot be read, trusted or written: the reply must not leave.
        """
        with self._locked() as (fd, lines):
            found = {entry.number: entry for entry in _entries(lines)}.get(reservation.number)
            if found is None or (found.recipe_id, found.round) != (reservation.recipe_id, reservation.round):
                raise PrivacyError(
                    f"this ledger has no reservation {reservation.number} for round {reservation.round}; the reply "
                    "must not leave: reserve again and train again"
                )
            if found.settled:
                raise PrivacyError(
                    f"reservation {reservation.number} for round {reservation.round} is settled already, so this visit "
                    "was answered before; the reply must not leave"
                )
            if not 0 <= steps <= found.event.steps:
                raise PrivacyError(
                    f"ran {steps} noised steps, reserved were {found.event.steps}; the reply must not leave"
                )
            self._append(fd, lines, kind="settle", number=reservation.number, steps=int(steps))
            return epsilon_pld([entry.event for entry in _entries(lines)], self._policy.delta)

    def spent(self, delta: float | None = None) -> float:
        """Epsilon of all steps of all recipes on this cohort, open reservations in full.

        Args:
            delta: In (0, 1); the policy's when left out.

        Raises:
            StorageError: The ledger cannot be read or trusted.
        """
        return epsilon_pld(self.events(), self._policy.delta if delta is None else delta)

    def entries(self) -> tuple[Entry, ...]:
        """Every reservation in its order, with the steps that were really run where it is settled.

        Raises:
            StorageError: The ledger cannot be read or trusted.
        """
        with self._locked() as (_, lines):
            return tuple(_entries(lines))

    def events(self, recipe_id: str | None = None, kind: Kind | None = None) -> tuple[Event, ...]:
        """What was spent, visit by visit, of one recipe or of all, on one kind of release or on all.

        Raises:
            StorageError: The ledger cannot be read or trusted.
        """
        return tuple(
            entry.event
            for entry in self.entries()
            if recipe_id in (None, entry.recipe_id) and kind in (None, entry.kind)
        )

    @property
    def head(self) -> str:
        """Hash of the last line, to be anchored where this file's owner cannot rewrite it; zeros when empty."""
        with self._locked() as (_, lines):
            return str(lines[-1]["hash"]) if lines else _GENESIS

    def holds(self, head: str) -> bool:
        """Whether a head that was anchored earlier is still part of the ledger; False means lines were cut off."""
        with self._locked() as (_, lines):
            return _holds(lines, head)

    def repair(self) -> int:
        """Drops a last line that a crash left incomplete; nothing was trained or sent under it.

        Returns:
            Bytes dropped; 0 when the ledger is whole.

        Raises:
            StorageError: Something else is wrong; then nothing was changed.
        """
        with self._locked(incomplete_ok=True) as (fd, _):
            text = _read(fd)
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                os.ftruncate(fd, whole)
                os.fsync(fd)
            return len(text) - whole

    @contextmanager
    def _locked(self, *, incomplete_ok: bool = False) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The file under an exclusive lock, and its checked lines."""
        fd = -1
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not os.fstat(fd).st_size:  # also when a crash came right after the file was made
                flush_folder(self._path.parent, self._flush)
            yield fd, self._checked(_read(fd), incomplete_ok)
        except OSError as error:
            raise StorageError(
                f"the privacy ledger cannot be read or written: {error.strerror}; nothing may be trained until it can "
                "(check the disk and the rights of its folder)"
            ) from None
        finally:
            if fd >= 0:
                os.close(fd)  # also unlocks

    def _checked(self, text: bytes, incomplete_ok: bool) -> list[dict[str, Any]]:
        raw = text.split(b"\n")
        if raw.pop() and not incomplete_ok:
            raise StorageError(
                "the last line of the privacy ledger is incomplete: a crash cut it off while it was written, before "
                "anything was trained under it; `Ledger.repair` drops that line alone"
            )
        lines: list[dict[str, Any]] = []
        head = _GENESIS
        for number, content in enumerate(raw):
            try:
                line = json.loads(content)
                claimed = line.pop("hash")
                good = hashlib.sha256(_canonical(line)).hexdigest() == claimed and line["previous"] == head
            except (ValueError, KeyError, TypeError, AttributeError):
                good = False
            if not good:
                raise StorageError(
                    f"the privacy ledger is broken at line {number + 1}: it was changed, or lines are missing before "
                    "it; nothing may be trained on this cohort until the file is restored from a backup"
                )
            head = line["hash"] = claimed
            lines.append(line)
        if lines and (lines[0]["kind"], lines[0].get("version")) != ("open", _VERSION):
            raise StorageError(
                f"the privacy ledger has version {lines[0].get('version')}, expected {_VERSION}; use the Fedicom that "
                "wrote it or a newer one"
            )
        if lines and lines[0]["cohort"] != self._cohort:
            raise StorageError(
                f"the privacy ledger belongs to cohort {lines[0]['cohort'][:12]}, expected {self._cohort[:12]}; give "
                "every cohort a ledger of its own and never start a new one for the same patients"
            )
        return lines

    def _append(self, fd: int, lines: list[dict[str, Any]], **entry: Any) -> None:
        """Writes one line to the disk, or nothing."""
        line = {**entry, "previous": lines[-1]["hash"] if lines else _GENESIS, "time": int(time.time())}
        line["hash"] = hashlib.sha256(_canonical(line)).hexdigest()
        size = os.fstat(fd).st_size
        text = _canonical(line) + b"\n"
        try:
            if os.write(fd, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._flush(fd)
        except OSError:
            os.ftruncate(fd, size)  # nothing half-written
            raise
        lines.append(line)


def _holds(lines: Sequence[dict[str, Any]], head: str) -> bool:
    return head in ("", _GENESIS) or any(line["hash"] == head for line in lines)


def _entries(lines: Sequence[dict[str, Any]]) -> list[Entry]:
    entries: dict[int, Entry] = {}
    for line in lines:
        number = line.get("number")
        if line["kind"] == "reserve":
            event = Event(
                noise_multiplier=line["noise_multiplier"], sampling_rate=line["sampling_rate"], steps=line["steps"]
            )
            entries[line["number"]] = Entry(
                line["number"], line["recipe_id"], line["round"], line["base"], event, settled=False,
                kind=line.get("releases", "updates"),
            )  # fmt: skip
        elif line["kind"] == "settle" and number in entries:
            entry = entries[number]
            steps = min(entry.event.steps, line["steps"])
            entries[number] = replace(entry, event=replace(entry.event, steps=steps), settled=True)
    return list(entries.values())


def _canonical(line: dict[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _read(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    text = os.pread(fd, size, 0)
    if len(text) != size:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return text
