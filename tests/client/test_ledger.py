"""The ledger: refuse before, count a crash as spent, notice every change of the file."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import stat
from dataclasses import replace
from multiprocessing.synchronize import Event as SyncEvent
from pathlib import Path

import pytest

from client.ledger import Kind, Ledger, Reservation, SitePolicy
from common.accounting import Event, epsilon_pld
from common.errors import PrivacyError, StorageError

COHORT = "c" * 64
POLICY = SitePolicy(epsilon=8.0, delta=1e-5, min_noise_multiplier=0.5, max_sampling_rate=0.5, max_steps=1000)
EVENT = Event(noise_multiplier=1.0, sampling_rate=0.1, steps=20)


def make(folder: Path, policy: SitePolicy = POLICY) -> Ledger:
    return Ledger(folder / "ledger.jsonl", COHORT, policy)


def test_epsilon_is_that_of_all_recipes_and_rounds_together(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    assert (ledger.spent(), ledger.head) == (0, "0" * 64)
    for recipe, number in (("a", 1), ("a", 2), ("b", 1)):
        last = ledger.reserve(recipe, round=number, base="w", event=EVENT)
        ledger.settle(last, 20)
    together = epsilon_pld([Event(noise_multiplier=1.0, sampling_rate=0.1, steps=60)], 1e-5)
    assert make(tmp_path).spent() == last.epsilon == together
    assert ledger.spent(1e-7) == epsilon_pld([Event(noise_multiplier=1.0, sampling_rate=0.1, steps=60)], 1e-7)
    assert ledger.events("a") == (EVENT, EVENT)


def test_a_visit_beyond_the_cap_is_refused_before_it_starts_and_writes_nothing(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    for number in range(6):
        ledger.settle(ledger.reserve("a", round=number, base="w", event=EVENT), 20)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(PrivacyError, match=r"epsilon 8\.\d+, its cap is 8 at delta 1e-05, spent so far 7\.\d+"):
        ledger.reserve("a", round=6, base="w", event=EVENT)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert ledger.spent() == epsilon_pld([Event(noise_multiplier=1.0, sampling_rate=0.1, steps=120)], 1e-5) <= 8
    ledger.reserve("a", round=6, base="w", event=Event(noise_multiplier=1.0, sampling_rate=0.1, steps=1))


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (Event(noise_multiplier=0.4, sampling_rate=0.1, steps=1), "noise multiplier: got 0.4, this site allows at lea"),
        (Event(noise_multiplier=1.0, sampling_rate=0.6, steps=1), "sampling rate: got 0.6, this site allows at most"),
        (Event(noise_multiplier=50.0, sampling_rate=0.1, steps=1001), "steps of one visit: got 1001"),
        (Event(noise_multiplier=50.0, sampling_rate=0.1, steps=0), "steps of one visit: got 0"),
    ],
)  # fmt: skip
def test_what_the_policy_forbids_is_refused_whatever_was_spent(tmp_path: Path, event: Event, why: str) -> None:
    with pytest.raises(PrivacyError, match=why):
        make(tmp_path).reserve("a", round=1, base="w", event=event)


def test_a_visit_at_every_limit_is_allowed(tmp_path: Path) -> None:
    event = Event(noise_multiplier=200.0, sampling_rate=0.5, steps=1000)
    cap = epsilon_pld([event], 1e-5)
    assert cap < 1
    ledger = make(tmp_path, replace(POLICY, epsilon=cap, min_noise_multiplier=200.0))
    assert ledger.reserve("a", round=1, base="w", event=event).epsilon == cap


def test_a_recipe_has_its_number_of_visits_of_each_kind_those_that_cost_nothing_left_out(tmp_path: Path) -> None:
    ledger = make(tmp_path)

    def ask(recipe: str = "a", kind: Kind = "updates") -> Reservation:
        return ledger.reserve(recipe, round=1, base="w", event=replace(EVENT, steps=1), kind=kind, visits=2)

    for steps in (0, 1, 1):
        ledger.settle(ask(), steps)
    with pytest.raises(PrivacyError, match="has paid for all 2 rounds of recipe a already"):
        ask()
    ask(kind="scores")
    ask("b")


def test_a_crash_counts_as_spent_and_the_retry_of_the_same_visit_pays_once(tmp_path: Path) -> None:
    first = make(tmp_path).reserve("a", round=1, base="w", event=EVENT)
    crashed = make(tmp_path)
    assert crashed.spent() == first.epsilon > 0
    assert crashed.reserve("a", round=1, base="w", event=EVENT) == first
    assert crashed.spent() == first.epsilon
    # Any difference is another visit.
    assert crashed.reserve("a", round=1, base="other", event=EVENT).number != first.number
    assert crashed.reserve("a", round=2, base="w", event=EVENT).number != first.number
    assert crashed.reserve("b", round=1, base="w", event=EVENT).number != first.number
    assert len(crashed.events()) == 4


def test_an_open_visit_is_taken_over_by_none_that_costs_something_else(tmp_path: Path) -> None:
    # After a crash the site may have more patients, or be asked for scores: that was not paid for.
    ledger = make(tmp_path, replace(POLICY, epsilon=30.0))
    first = ledger.reserve("a", round=1, base="w", event=EVENT)
    more = ledger.reserve("a", round=1, base="w", event=replace(EVENT, steps=21))
    scores = ledger.reserve("a", round=1, base="w", event=EVENT, kind="scores")
    assert len({first.number, more.number, scores.number}) == 3
    assert sum(event.steps for event in ledger.events()) == 20 + 21 + 20
    assert ledger.spent() == scores.epsilon > more.epsilon > first.epsilon


def test_a_reservation_of_a_ledger_that_was_exchanged_meanwhile_settles_no_other(tmp_path: Path) -> None:
    mine = make(tmp_path / "a").reserve("a", round=1, base="w", event=EVENT)
    for number, (recipe, round_) in enumerate((("b", 1), ("a", 2))):  # their first entries have the same number
        other = make(tmp_path / f"{number}")
        assert other.reserve(recipe, round=round_, base="w", event=EVENT).number == mine.number
        with pytest.raises(PrivacyError, match="has no reservation"):
            other.settle(mine, 1)
        assert other.events() == (EVENT,)


def test_the_name_of_a_new_ledger_and_each_of_its_lines_last_before_the_caller_hears_of_them(tmp_path: Path) -> None:
    path, lasting = tmp_path / "ledger.jsonl", []

    def flush(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        lasting.append("its name" if folder else path.read_bytes().count(b"\n"))

    ledger = Ledger(path, COHORT, POLICY, flush)
    reservation = ledger.reserve("a", round=1, base="w", event=EVENT)
    assert lasting == ["its name", 1, 2]  # open, reserve
    ledger.settle(reservation, 20)
    assert lasting == ["its name", 1, 2, 3]


def test_after_the_reply_left_the_same_visit_is_paid_again(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    first = ledger.reserve("a", round=1, base="w", event=EVENT)
    ledger.settle(first, 20)
    again = ledger.reserve("a", round=1, base="w", event=EVENT)
    assert again.number != first.number
    assert again.epsilon > first.epsilon


def test_an_open_visit_can_be_found_and_closed_after_a_restart(tmp_path: Path) -> None:
    first = make(tmp_path).reserve("a", round=1, base="w", event=EVENT)
    ledger = make(tmp_path)
    assert ledger.pending(first.number, "a", round=1, base="w") == first
    assert ledger.pending(first.number, "a", round=1, base="v") is None
    assert ledger.pending(first.number + 1, "a", round=1, base="w") is None
    ledger.settle(first, 20)
    assert ledger.pending(first.number, "a", round=1, base="w") is None


def test_settling_only_lowers_and_only_once(tmp_path: Path) -> None:
    ledger = make(tmp_path)
    reservation = ledger.reserve("a", round=1, base="w", event=EVENT)
    with pytest.raises(PrivacyError, match="ran 21 noised steps, reserved were 20"):
        ledger.settle(reservation, 21)
    with pytest.raises(PrivacyError, match="ran -1"):
        ledger.settle(reservation, -1)
    epsilon = ledger.settle(reservation, 5)
    assert epsilon == ledger.spent() == epsilon_pld([Event(noise_multiplier=1.0, sampling_rate=0.1, steps=5)], 1e-5)
    with pytest.raises(PrivacyError, match="settled already"):
        ledger.settle(reservation, 5)
    assert ledger.events() == (Event(noise_multiplier=1.0, sampling_rate=0.1, steps=5),)


def test_a_reservation_of_another_ledger_cannot_be_settled(tmp_path: Path) -> None:
    foreign = make(tmp_path / "a").reserve("a", round=1, base="w", event=EVENT)
    with pytest.raises(PrivacyError, match="has no reservation"):
        make(tmp_path / "b").settle(foreign, 20)


def filled(folder: Path) -> Path:
    ledger = make(folder)
    for number in (1, 2):
        ledger.settle(ledger.reserve("a", round=number, base="w", event=EVENT), 20 - number)
    ledger.reserve("a", round=3, base="w", event=EVENT)
    return folder / "ledger.jsonl"


def test_every_prefix_of_the_file_is_either_an_earlier_state_or_an_error(tmp_path: Path) -> None:
    """A crash at any byte of any write: never less is spent than the lines that were complete."""
    path = filled(tmp_path)
    text = path.read_bytes()
    spent = {}
    for size in range(len(text) + 1):
        path.write_bytes(text[:size])
        if size == 0 or text[size - 1 : size] == b"\n":
            spent[text[:size].count(b"\n")] = [event.steps for event in make(tmp_path).events()]
        elif size % 7 == 0:  # a sample of the bytes within a line
            with pytest.raises(StorageError, match="incomplete"):
                make(tmp_path).reserve("a", round=9, base="w", event=EVENT)
            whole = text[:size].rfind(b"\n") + 1
            assert make(tmp_path).repair() == size - whole
            assert path.read_bytes() == text[:whole]
    # lines: open, reserve 20, settle 19, reserve 20, settle 18, reserve 20
    assert spent == {0: [], 1: [], 2: [20], 3: [19], 4: [19, 20], 5: [19, 18], 6: [19, 18, 20]}


def test_any_changed_byte_any_missing_or_swapped_line_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path)
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    damaged = [
        text.replace(b'"steps":20', b'"steps":10', 1),
        text.replace(b'"steps":20', b'"steps": 20', 1).replace(b'"kind"', b'"kinD"', 1),
        b"".join(lines[:2] + lines[3:]),
        b"".join([lines[0], lines[3], lines[2], lines[1], *lines[4:]]),
        b"".join(lines[1:]),
        b"not json\n" + text,
        b"[]\n",
    ]
    for index in range(0, len(text) - 1, 37):
        if text[index : index + 1] != b"\n":
            damaged.append(text[:index] + bytes([text[index] ^ 1]) + text[index + 1 :])
    for content in damaged:
        path.write_bytes(content)
        for act in (make(tmp_path).spent, make(tmp_path).repair):
            with pytest.raises(StorageError, match="broken at line"):
                act()
        assert path.read_bytes() == content


def test_an_anchored_head_tells_when_lines_were_cut_off_the_end(tmp_path: Path) -> None:
    path = filled(tmp_path)
    ledger = make(tmp_path)
    anchored = ledger.head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert not ledger.holds(anchored)
    assert ledger.holds(ledger.head)
    ledger.reserve("a", round=4, base="w", event=EVENT)
    assert not ledger.holds(anchored)


def test_the_ledger_of_other_patients_and_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with pytest.raises(StorageError, match="belongs to cohort cccccccccccc, expected dddddddddddd"):
        Ledger(path, "d" * 64, POLICY).spent()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("client.ledger._VERSION", 2)
    with pytest.raises(StorageError, match="version 1, expected 2"):
        make(tmp_path).spent()
    monkey.undo()


def test_a_full_disk_leaves_the_ledger_whole_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path)
    before = path.read_bytes()
    real = os.write

    def short(fd: int, text: bytes) -> int:
        return real(fd, text[: len(text) // 2])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, broken in (("write", short), ("fsync", full)):
        with monkeypatch.context() as context:
            context.setattr(f"client.ledger.os.{name}", broken)
            with pytest.raises(StorageError, match="No space left"):
                make(tmp_path).reserve("b", round=1, base="w", event=EVENT)
        assert path.read_bytes() == before
    make(tmp_path).reserve("b", round=1, base="w", event=EVENT)


def test_a_ledger_that_cannot_be_read_or_not_whole_is_not_taken_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path)
    with pytest.raises(StorageError, match="cannot be read or written: Is a directory"):
        Ledger(tmp_path, COHORT, POLICY).spent()
    first = path.read_bytes().index(b"\n") + 1
    monkeypatch.setattr("client.ledger.os.pread", lambda *_: path.read_bytes()[:first])  # the disk gives but a part
    with pytest.raises(StorageError, match="cannot be read or written: Input/output error"):
        make(tmp_path).spent()


def test_the_file_is_for_its_owner_alone_and_holds_one_canonical_object_a_line(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    for line in path.read_text().splitlines():
        assert line == json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"))


def _spend(path: Path, begin: SyncEvent) -> None:
    begin.wait(60)
    Ledger(path, COHORT, POLICY).reserve("b", round=1, base="w", event=EVENT)


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path, context = tmp_path / "ledger.jsonl", multiprocessing.get_context("fork")
    begin = context.Event()
    other = context.Process(target=_spend, args=(path, begin))
    other.start()

    def flush(_: int) -> None:
        begin.set()  # now, in the middle of an entry
        other.join(0.05)
        assert other.is_alive()

    Ledger(path, COHORT, POLICY, flush).reserve("a", round=1, base="w", event=EVENT)
    other.join(60)
    assert other.exitcode == 0
    ledger = make(tmp_path)
    assert (ledger.events("a"), ledger.events("b")) == ((EVENT,), (EVENT,))
    assert ledger.spent() == epsilon_pld([replace(EVENT, steps=40)], 1e-5)


def test_only_one_of_two_processes_may_answer_the_same_visit(tmp_path: Path) -> None:
    one, two = make(tmp_path), make(tmp_path)
    first = one.reserve("a", round=1, base="w", event=EVENT)
    second = two.reserve("a", round=1, base="w", event=EVENT)
    one.settle(first, 20)
    with pytest.raises(PrivacyError, match="the reply must not leave"):
        two.settle(second, 20)


@pytest.mark.parametrize(
    ("epsilon", "delta", "noise"),
    [(0.0, 1e-5, 0.5), (math.inf, 1e-5, 0.5), (8.0, 1.0, 0.5), (8.0, 0.0, 0.5), (8.0, 1e-5, 0.0)],
)
def test_a_policy_that_limits_nothing_is_refused(epsilon: float, delta: float, noise: float) -> None:
    with pytest.raises(PrivacyError, match="policy"):
        SitePolicy(epsilon=epsilon, delta=delta, min_noise_multiplier=noise)


def test_a_head_that_others_remember_must_be_in_the_ledger_before_anything_is_reserved(tmp_path: Path) -> None:
    path = filled(tmp_path)
    older = path.read_bytes()
    ledger = make(tmp_path)
    ledger.settle(ledger.reserve("a", round=3, base="w", event=EVENT, known=[ledger.head, ""]), 20)
    anchored = ledger.head
    path.write_bytes(older)
    for known in ([anchored], ["", ledger.head, anchored]):
        with pytest.raises(PrivacyError, match="older than others remember it"):
            ledger.reserve("a", round=4, base="w", event=EVENT, known=known)
    assert path.read_bytes() == older
    ledger.reserve("a", round=4, base="w", event=EVENT, known=["0" * 64, ledger.head])  # zeros: the empty one's
    path.unlink()  # a new ledger for the same patients is caught as well
    with pytest.raises(PrivacyError, match="older than others remember it"):
        make(tmp_path).reserve("a", round=4, base="w", event=EVENT, known=[anchored])


def test_scores_and_updates_are_one_account_and_are_told_apart(tmp_path: Path) -> None:
    ledger, wide = make(tmp_path), Event(noise_multiplier=4.0, sampling_rate=1.0, steps=2)
    update = ledger.reserve("a", round=1, base="w", event=EVENT)
    # rate 1 is against this policy for training, and the way of a histogram
    scores = ledger.reserve("a", round=1, base="w", event=wide, kind="scores")
    assert scores.number != update.number
    assert (ledger.events("a", "updates"), ledger.events("a", "scores")) == ((EVENT,), (wide,))
    assert ledger.spent() == scores.epsilon == epsilon_pld([EVENT, wide], 1e-5) > update.epsilon
    assert ledger.reserve("a", round=1, base="w", event=wide, kind="scores") == scores


@pytest.mark.parametrize("clock", [-1e9, 0.0, 1.0, 4e9])
def test_the_clock_plays_no_part_in_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float) -> None:
    filled(tmp_path)
    before = make(tmp_path).spent()
    monkeypatch.setattr("client.ledger.time.time", lambda: clock)
    after = make(tmp_path).reserve("b", round=1, base="w", event=EVENT)
    assert after.epsilon > before
    assert make(tmp_path).spent() == after.epsilon
