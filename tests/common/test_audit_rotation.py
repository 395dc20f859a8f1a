"""A log in several files, through crashes, clocks that are moved, new keys and other processes, stays one chain."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import common.audit
from common.audit import AuditError, AuditLog, verify, verify_against
from common.chain import CLOCK, CONTINUED, KEY, digest_of, handover, line_of
from common.errors import StorageError
from common.identity import Signer

ROOT = Path(common.audit.__file__).parents[1]
OWN = Signer.temporary()
SMALL = 1500
"""Bytes: three or four events a file."""


def files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*.jsonl")) + [path] * path.exists()


def kinds(path: Path) -> list[str]:
    return [event.kind for event in verify(path, OWN.public)]


def own(path: Path) -> list[str]:
    """What was appended, without what the log itself adds."""
    return [kind for kind in kinds(path) if kind not in ("log started", CONTINUED, CLOCK)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit" / "north.jsonl"
    written = AuditLog(path, OWN, rotate_bytes=SMALL)
    for number in range(12):
        written.append(f"event {number}", round=number)
    return path


def fault(path: Path, key: object = OWN.public, **options) -> tuple[str, str, int | None]:
    with pytest.raises(AuditError) as caught:
        verify(path, key, **options)  # type: ignore[arg-type]
    return caught.value.fault, caught.value.log, caught.value.number


# Parts


def test_opening_a_log_reads_no_folder_for_it_may_lie_beside_thousands(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*words: object) -> None:
        raise AssertionError("the folder was listed")

    monkeypatch.setattr(Path, "iterdir", listed)
    monkeypatch.setattr(os, "listdir", listed)
    again, new = AuditLog(log, OWN, rotate_bytes=SMALL), AuditLog(log.with_name("south.jsonl"), OWN)
    assert again.head != new.head


def test_a_log_whose_current_file_is_gone_is_opened_only_with_all_its_parts(log: Path) -> None:
    first, *_ = files(log)
    log.unlink()
    first.unlink()
    with pytest.raises(AuditError, match="part 1 is missing"):
        AuditLog(log, OWN)


def test_a_log_over_its_limit_goes_on_in_a_new_file_and_stays_one_chain(log):
    there = files(log)
    assert [path.name for path in there] == [
        "north.0001.jsonl", "north.0002.jsonl", "north.0003.jsonl", "north.jsonl"
    ]  # fmt: skip
    assert own(log) == [f"event {number}" for number in range(12)]
    for place, path in enumerate(there[1:], start=1):
        first = json.loads(path.read_bytes().splitlines()[0])
        before = json.loads(there[place - 1].read_bytes().splitlines()[-1])
        assert first["kind"] == CONTINUED
        assert first["facts"] == {
            "part": place, "events": before["number"] + 1, "head": before["hash"], "public_key": OWN.public
        }  # fmt: skip
        assert first["before"] == before["hash"]


def test_a_log_that_its_writer_rotates_while_it_is_read_is_read_whole(log, monkeypatch):
    writer, parts, read = AuditLog(log, OWN, rotate_bytes=SMALL), len(files(log)), Path.read_bytes

    def late(path: Path) -> bytes:
        while len(files(log)) == parts:  # after the look into the folder, before the first byte is read
            writer.append("late")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    found = verify(log, OWN.public)
    assert found[-1].hash == writer.head
    assert [event.number for event in found] == list(range(len(found)))


def test_a_log_whose_current_file_has_just_become_a_part_is_read_whole(log, monkeypatch):
    before, read, newest = verify(log, OWN.public), Path.read_bytes, log.with_name(f"north.{len(files(log)):04d}.jsonl")

    def late(path: Path) -> bytes:
        if path == log and log.exists():
            log.rename(newest)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    assert verify(log, OWN.public) == before
    assert [newest.exists(), log.exists()] == [True, False]


def test_a_rotated_log_is_opened_again_and_goes_on(log):
    head = verify(log)[-1].hash
    again = AuditLog(log, OWN, rotate_bytes=SMALL)
    assert again.head == head
    again.append("later")
    assert own(log)[-2:] == ["event 11", "later"]


@pytest.mark.parametrize("gone", ["north.0001.jsonl", "north.0002.jsonl", "north.0003.jsonl"])
def test_a_missing_part_is_named_by_verify_and_stops_the_writer(log, gone):
    log.with_name(gone).unlink()
    assert fault(log)[0] == "part missing"
    with pytest.raises(AuditError, match="missing"):
        AuditLog(log, OWN)


def test_exchanged_parts_are_found(log):
    one, two, spare = (log.with_name(f"north.{name}.jsonl") for name in ("0001", "0002", "spare"))
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert fault(log)[:2] == ("part missing", "north.0001.jsonl")


def test_a_part_of_an_older_copy_in_place_of_the_newest_is_found_when_the_log_is_opened(log):
    older = log.with_name("north.0002.jsonl").read_bytes()
    log.with_name("north.0003.jsonl").write_bytes(older)
    with pytest.raises(AuditError, match=r"does not go on where north\.0003\.jsonl ends"):
        AuditLog(log, OWN)
    assert fault(log)[:2] == ("part missing", "north.0003.jsonl")


def test_a_part_of_another_log_of_as_many_events_is_found_when_the_log_is_opened(log, tmp_path):
    other = AuditLog(tmp_path / "other" / log.name, OWN, rotate_bytes=SMALL)
    for number in range(12):
        other.append(f"other {number}", round=number)
    newest = files(log)[-2]
    foreign = tmp_path / "other" / newest.name
    assert len(foreign.read_bytes().splitlines()) == len(newest.read_bytes().splitlines())
    shutil.copy(foreign, newest)
    with pytest.raises(AuditError, match=f"does not go on where {newest.name} ends"):
        AuditLog(log, OWN)


def test_a_change_inside_an_earlier_part_is_found_by_verify_and_does_not_cost_time_at_every_start(log):
    part = log.with_name("north.0001.jsonl")
    part.write_bytes(part.read_bytes().replace(b'"round":1', b'"round":7'))
    assert fault(log) == ("changed", "north.0001.jsonl", 2)
    AuditLog(log, OWN).append("goes on")  # as its docstring says


def test_newest_files_that_are_cut_off_are_found_by_the_other_side_alone(log, tmp_path):
    other = AuditLog(tmp_path / "server.jsonl", OWN)
    events = verify(log)
    files(log)[-1].unlink()
    files(log)[-1].unlink()
    short = verify(log, OWN.public)
    for place in (len(short) - 1, -1):
        other.append("round", heads={"north": events[place].hash})
    with pytest.raises(AuditError, match="it was cut, this event is missing") as caught:
        verify_against(short, verify(tmp_path / "server.jsonl"), name="north")
    assert caught.value.number == len(short)


@pytest.mark.parametrize("name", ["north.0001.jsonl", "north.0002.jsonl"])
def test_a_part_is_not_taken_for_a_log(log, name):
    with pytest.raises(AuditError, match=r"part of north\.jsonl; give that file"):
        verify(log.with_name(name))
    with pytest.raises(AuditError, match="give that file"):
        AuditLog(log.with_name(name), OWN)


# Crashes


class Killed(BaseException):
    """Stands for a process that ends here: nothing of it runs any more."""


def steps(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Ends the process before the `at`-th step that touches the disk; returns how many there were."""
    count = 0

    def counted(real):
        def step(*arguments, **options):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return real(*arguments, **options)

        return step

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "open", counted(os.open))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    return lambda: count


def test_a_crash_at_any_step_of_a_rotation_loses_nothing(tmp_path, monkeypatch):
    for at in range(1, 200):
        path = tmp_path / str(at) / "north.jsonl"
        written = AuditLog(path, OWN, rotate_bytes=SMALL)
        acknowledged = []
        while path.stat().st_size < SMALL:
            written.append(f"event {len(acknowledged)}")
            acknowledged.append(f"event {len(acknowledged)}")
        with monkeypatch.context() as patch:
            count = steps(patch, at)
            try:
                written.append("rotates")
                acknowledged.append("rotates")
            except Killed:
                pass
        again = AuditLog(path, OWN, rotate_bytes=SMALL)
        again.append("after the crash")
        # an event that was on disk but not acknowledged may be there as well
        assert own(path) in ([*acknowledged, "after the crash"], [*acknowledged, "rotates", "after the crash"]), at
        assert len(files(path)) == 2
        if count() < at:
            break
    assert at > 8  # lock, rename, sync of the folder, open, sync of file and folder, and again for the event


def test_a_crash_in_the_first_line_of_a_new_file_loses_nothing(log):
    whole = own(log)
    number = len(files(log))
    log.rename(log.with_name(f"north.{number:04d}.jsonl"))
    log.write_bytes(b'{"before":"ab')  # torn: the process ended while it wrote "log continued"
    AuditLog(log, OWN).append("after the crash")
    assert own(log) == [*whole, "after the crash"]


def test_a_process_killed_at_random_moments_loses_no_acknowledged_event(tmp_path):
    path, key = tmp_path / "north.jsonl", tmp_path / "north.key"
    Signer.load_or_create(key)
    code = (
        "import sys; from pathlib import Path; from common.audit import AuditLog; from common.identity import Signer\n"
        "log = AuditLog(Path(sys.argv[1]), Signer.load_or_create(Path(sys.argv[2])), rotate_bytes=900)\n"
        "while True:\n    print(log.append('event'), flush=True)\n"
    )
    acknowledged: list[str] = []
    for life in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(key)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(7 + 4 * life):
            acknowledged.append(child.stdout.readline().strip())
        child.kill()
        acknowledged += [line.strip() for line in child.stdout if line.endswith("\n")]
        child.wait()
    hashes = [event.hash for event in verify(path, Signer.load_or_create(key).public)]
    assert len(acknowledged) > 40
    assert [digest for digest in hashes if digest in set(acknowledged)] == acknowledged
    assert len(files(path)) > 10


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else limits[0], limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_in_the_middle_of_a_rotation_loses_nothing(tmp_path, small_disk):
    path = tmp_path / "north.jsonl"
    written = AuditLog(path, OWN, rotate_bytes=400)
    written.append("event 0")
    small_disk(100)  # the rename is done, the new file has no place for its first line
    for _ in range(2):
        with pytest.raises(StorageError):
            written.append("no space")
    small_disk(0)
    written.append("space again")
    assert own(path) == ["event 0", "space again"]


# Several processes


def test_several_processes_write_one_log(tmp_path):
    path, key = tmp_path / "north.jsonl", tmp_path / "north.key"
    Signer.load_or_create(key)
    code = (
        "import sys; from pathlib import Path; from common.audit import AuditLog; from common.identity import Signer\n"
        "log = AuditLog(Path(sys.argv[1]), Signer.load_or_create(Path(sys.argv[2])), rotate_bytes=3000)\n"
        "for number in range(25): log.append('event', by=sys.argv[3], number=number)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), str(key), name], cwd=ROOT) for name in "abc"]
    assert [child.wait() for child in children] == [0, 0, 0]
    events = [event.facts for event in verify(path) if event.kind == "event"]
    for name in "abc":
        assert [facts["number"] for facts in events if facts["by"] == name] == list(range(25))
    assert len(files(path)) > 3


def test_a_writer_finds_what_others_wrote_across_a_rotation(tmp_path):
    path = tmp_path / "north.jsonl"
    one, two = (AuditLog(path, OWN, rotate_bytes=SMALL) for _ in range(2))
    for number in range(9):
        one.append(f"event {number}")
    two.append("late")
    assert own(path) == [*(f"event {number}" for number in range(9)), "late"]


@pytest.mark.parametrize("how", ["cut", "older copy", "another log"])
def test_a_log_that_is_cut_or_exchanged_behind_its_writer_is_not_continued(log, how):
    written = AuditLog(log, OWN)
    older = log.read_bytes()
    written.append("later")
    if how == "cut":
        log.write_bytes(older)
    elif how == "older copy":
        log.unlink()
        log.write_bytes(older)
    else:
        shutil.rmtree(log.parent)
        AuditLog(log, OWN).append("of somebody else")
    for _ in range(2):
        with pytest.raises(AuditError, match="an older copy was put in its place"):
            written.append("on top")
    assert "on top" not in kinds(log)


def test_a_log_that_is_deleted_behind_its_writer_is_not_begun_anew(log):
    written = AuditLog(log, OWN)
    shutil.rmtree(log.parent)
    for _ in range(2):
        with pytest.raises(StorageError):
            written.append("first")


# Clocks


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, **by: float) -> None:
        self.now += timedelta(**by)


def dated(path: Path, number: int, moment: datetime, **changes) -> None:
    """Writes a log anew from this event on, with the real key, as its owner could."""
    rows, before = [], None
    for place, line in enumerate(path.read_bytes().splitlines()):
        row = json.loads(line)
        body = {key: row[key] for key in ("number", "time", "kind", "facts", "before")}
        if place == number:
            body |= {"time": moment.isoformat(timespec="milliseconds"), **changes}
        body["before"] = before or body["before"]
        before = digest_of(body)
        rows.append(line_of({**body, "hash": before, "signature": OWN.sign(bytes.fromhex(before))}) + b"\n")
    path.write_bytes(b"".join(rows))


@pytest.fixture
def timed(tmp_path: Path) -> tuple[Path, Clock]:
    path, clock = tmp_path / "north.jsonl", Clock()
    written = AuditLog(path, OWN, clock=clock)
    for number in range(1, 5):
        clock.move(minutes=10)
        written.append(f"event {number}")
    return path, clock


def test_a_clock_that_moves_back_gets_an_event_with_both_times_and_the_log_holds(timed):
    path, clock = timed
    clock.move(hours=-3)
    written = AuditLog(path, OWN, clock=clock)
    written.append("after")
    clock.move(milliseconds=-1)
    written.append("a little")
    events = verify(path, OWN.public, tolerance_s=0)
    assert [event.kind for event in events[5:]] == [CLOCK, "after", CLOCK, "a little"]
    assert events[5].facts == {"from": "2026-03-01T12:40:00.000+00:00", "to": "2026-03-01T09:40:00.000+00:00"}
    assert events[5].time == "2026-03-01T09:40:00.000+00:00"


def test_a_clock_that_moves_back_over_a_rotation_is_told_in_the_new_file(tmp_path):
    path, clock = tmp_path / "north.jsonl", Clock()
    written = AuditLog(path, OWN, rotate_bytes=100, clock=clock)
    clock.move(hours=-1)
    written.append("event")
    assert [event.kind for event in verify(path, OWN.public, tolerance_s=0)] == [
        "log started", CONTINUED, CLOCK, "event"
    ]  # fmt: skip


def test_a_back_dated_event_is_named_though_its_owner_signed_it(timed):
    path, clock = timed
    dated(path, 3, clock.now - timedelta(hours=2))
    assert fault(path) == ("back-dated", path.name, 3)


def test_a_false_event_of_a_clock_that_moved_back_does_not_excuse_a_date(timed):
    path, clock = timed
    moment = clock.now - timedelta(hours=2)
    for facts in ({}, {"from": "2026-03-01T12:10:00.000+00:00", "to": moment.isoformat(timespec="milliseconds")}):
        dated(path, 3, moment, kind=CLOCK, facts=facts)
        assert fault(path) == ("back-dated", path.name, 3)


def test_small_differences_of_a_clock_are_within_the_tolerance_and_do_not_add_up(timed):
    path, _ = timed
    at_20 = datetime(2026, 3, 1, 12, 20, tzinfo=UTC)
    dated(path, 3, at_20 - timedelta(minutes=4))
    assert len(verify(path, OWN.public)) == 5
    assert fault(path, tolerance_s=60) == ("back-dated", path.name, 3)
    dated(path, 4, at_20 - timedelta(minutes=8))  # four minutes before event 3, eight before event 2
    assert fault(path) == ("back-dated", path.name, 4)


@pytest.mark.parametrize("time", ["", "yesterday", "2026-03-01T12:00:00", "2026-03-01T12:00:00+02:00", "2026-03-01"])
def test_a_time_that_is_not_utc_is_unreadable(timed, time):
    path, clock = timed
    dated(path, 2, clock.now, time=time)
    assert fault(path) == ("unreadable", path.name, 2)


# Keys


@pytest.fixture
def handed(tmp_path: Path) -> tuple[Path, Signer]:
    path, new = tmp_path / "north.jsonl", Signer.temporary()
    written = AuditLog(path, OWN)
    written.append("under the old key")
    written.hand_over(new)
    written.append("under the new key")
    return path, new


def test_a_log_goes_on_under_a_new_key_that_agreed(handed):
    path, new = handed
    assert [event.kind for event in verify(path, new.public)] == [
        "log started", "under the old key", KEY, "under the new key"
    ]  # fmt: skip
    assert len(verify(path)) == len(verify(path, {OWN.public, new.public})) == 4
    AuditLog(path, new).append("opened again")
    with pytest.raises(AuditError, match="not signed by the expected key"):
        AuditLog(path, OWN)


def test_a_hand_over_is_named_where_only_the_old_key_is_expected(handed):
    path, new = handed
    assert fault(path, OWN.public) == ("foreign key", path.name, 2)
    assert fault(path, {OWN.public}) == ("foreign key", path.name, 2)
    assert fault(path, {new.public}) == ("foreign key", path.name, 0)
    assert fault(path, Signer.temporary().public) == ("foreign key", path.name, 0)


def test_a_key_that_handed_the_log_over_again_is_not_the_one_that_signs_it_now(handed):
    path, second = handed
    third = Signer.temporary()
    AuditLog(path, second).hand_over(third)
    assert len(verify(path, third.public)) == len(verify(path, {OWN.public, second.public, third.public})) == 5
    assert fault(path, second.public) == ("foreign key", path.name, 0)


def test_a_hand_over_that_could_not_be_written_leaves_the_log_with_the_old_key(handed, monkeypatch):
    path, second = handed
    written = AuditLog(path, second)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(written, "_flush", full)
    with pytest.raises(StorageError):
        written.hand_over(Signer.temporary())
    monkeypatch.undo()
    written.append("still under it")
    assert verify(path, second.public)[-1].kind == "still under it"


def test_a_key_cannot_be_brought_in_without_its_owner(tmp_path):
    """Whoever stole the old key cannot make a log that ends under the owner's new one."""
    path, new = tmp_path / "north.jsonl", Signer.temporary()
    for proof in ("", "00" * 64, new.sign(handover("ab" * 32)), OWN.sign(handover("ab" * 32))):
        path.unlink(missing_ok=True)
        AuditLog(path, OWN).append(KEY, public_key=new.public, proof=proof)
        for key in (new.public, None):
            assert fault(path, key) == ("foreign key", path.name, 1)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [("plan received", {"proof": ""}), (KEY, {"of": {"proof": ""}})],
    ids=["no hand-over", "no proof"],
)
def test_a_stranger_who_writes_the_expected_key_down_is_not_taken_for_its_owner(tmp_path, kind, facts):
    AuditLog(tmp_path / "north.jsonl", Signer.temporary()).append(kind, public_key=OWN.public, **facts)
    assert fault(tmp_path / "north.jsonl") == ("foreign key", "north.jsonl", 0)


def test_the_coordinator_may_note_a_sites_new_key_without_giving_its_log_away(tmp_path):
    path = tmp_path / "server.jsonl"
    written = AuditLog(path, OWN)
    written.append(KEY, site="north", public_key=Signer.temporary().public)
    written.append("still ours")
    assert len(verify(path, OWN.public)) == 3
