"""Two logs that remember each other, changed in every way: `fedicom audit verify` names the first bad event."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedicom
from common.audit import AuditError, AuditLog, verify, verify_against
from common.chain import digest_of, line_of
from common.identity import Signer
from common.registry import Member, Registry

SIGNERS = {name: Signer.temporary() for name in ("server", "north", "authority")}
Rows = list[bytes]


class Clock:
    """Ticks a minute at every event."""

    def __init__(self, wrong: timedelta = timedelta()) -> None:
        self.now, self.wrong = datetime(2026, 3, 1, 12, tzinfo=UTC), wrong

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now + self.wrong


def pair(folder: Path, **clocks: Callable[[], datetime]) -> None:
    """server 0 started, 1 sites present, 2-4 rounds; north 0 started, then a plan and an update for each round."""
    clock = Clock()
    server = AuditLog(folder / "server.jsonl", SIGNERS["server"], clock=clocks.get("server", clock))
    north = AuditLog(folder / "north.jsonl", SIGNERS["north"], clock=clocks.get("north", clock))
    server.append("sites present", heads={"north": north.head})
    for number in (1, 2, 3):
        north.append("plan received", round=number, server_head=server.head)
        north.append("update sent", round=number, digest=f"{number:064x}")
        server.append("round aggregated", round=number, heads={"north": north.head})


def registry(folder: Path) -> Path:
    time, path = "2026-03-01T00:00:00+00:00", folder / "registry.json"
    Registry(
        federation="chest", version=1, issued=time, authority=SIGNERS["authority"].public,
        coordinator=SIGNERS["server"].public,
        sites={"north": Member(
            signing=SIGNERS["north"].public, node="ecdsa-sha2-nistp256 " + "A" * 120, since=time,
        )},
    ).write(path, SIGNERS["authority"])  # fmt: skip
    return path


def resigned(rows: Rows, side: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Rows:
    """Changes events and makes numbers, hashes and signatures fit again, as the log's owner can."""
    done, before = [], "0" * 64
    for number, row in enumerate(change([json.loads(line) for line in rows])):
        body = {"number": number, "time": row["time"], "kind": row["kind"], "facts": row["facts"], "before": before}
        before = digest_of(body)
        done.append(line_of({**body, "hash": before, "signature": SIGNERS[side].sign(bytes.fromhex(before))}) + b"\n")
    return done


def flipped(rows: Rows, number: int, field: bytes) -> Rows:
    place = rows[number].index(field) + len(field) + 3
    changed = bytearray(rows[number])
    changed[place] ^= 1
    return [*rows[:number], bytes(changed), *rows[number + 1 :]]


def earlier(row: dict[str, Any], hours: int) -> dict[str, Any]:
    moment = datetime.fromisoformat(row["time"]) - timedelta(hours=hours)
    return row | {"time": moment.isoformat(timespec="milliseconds")}


WAYS: dict[str, tuple[Callable[[Rows, str], Rows], str, int | None]] = {
    "a flipped bit of a fact": (lambda rows, _: flipped(rows, 3, b'"facts"'), "", 3),
    "a flipped bit of a hash": (lambda rows, _: flipped(rows, 3, b'"hash"'), "", 3),
    "a flipped bit of a signature": (lambda rows, _: flipped(rows, 3, b'"signature"'), "foreign key", 3),
    "a dropped event": (lambda rows, _: rows[:2] + rows[3:], "missing", 2),
    "the first event dropped": (lambda rows, _: rows[1:], "missing", 0),
    "two events exchanged": (lambda rows, _: [*rows[:2], rows[3], rows[2], *rows[4:]], "reordered", 2),
    "an event doubled": (lambda rows, _: [*rows[:3], rows[2], *rows[3:]], "doubled", 3),
    "half a line at the end": (lambda rows, _: [*rows[:-1], rows[-1][:50]], "torn", None),
    "new facts, and all hashes made to fit, without the key": (
        lambda rows, _: resigned(rows, "authority", lambda all_: all_), "foreign key", 0,
    ),
    "back-dated with the owner's key": (
        lambda rows, side: resigned(rows, side, lambda all_: [*all_[:3], earlier(all_[3], 2), *all_[4:]]),
        "back-dated", 3,
    ),
}  # fmt: skip


def check(folder: Path, log: str, capsys: pytest.CaptureFixture[str], *more: object) -> tuple[int, dict[str, Any]]:
    """What `fedicom audit verify` says of a log, against the other one and with public keys alone."""
    other = {"north": "server", "server": "north"}[log]
    words = [folder / f"{log}.jsonl", "--against", folder / f"{other}.jsonl", "--registry", registry(folder), *more]
    code = fedicom.main(["audit", "verify", "--json", *map(str, words)])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("side", ["server", "north"])
def test_untouched_logs_of_both_sides_hold(tmp_path, side, capsys):
    pair(tmp_path)
    code, said = check(tmp_path, side, capsys)
    assert (code, said["verified"], said["name"]) == (0, True, side)
    assert said["events"] == {"server": 5, "north": 7}[side]
    assert [(row["log"], row["heads"]) for row in said["against"]] == (
        [("north", 4), ("server", 3)] if side == "north" else [("server", 3), ("north", 4)]
    )


@pytest.mark.parametrize("side", ["server", "north"])
@pytest.mark.parametrize("way", WAYS)
def test_every_change_of_a_log_is_found_and_the_first_bad_event_named(tmp_path, side, way, capsys):
    pair(tmp_path)
    path = tmp_path / f"{side}.jsonl"
    tamper, fault, number = WAYS[way]
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(tamper(rows, side)))
    code, said = check(tmp_path, side, capsys)
    bad = said["first_bad"]
    assert (code, said["verified"]) == (1, False)
    assert (bad["log"], bad["number"]) == (path.name, len(rows) - 1 if number is None else number)
    assert bad["fault"] == fault or (not fault and bad["fault"] in ("changed", "unreadable", "unchained"))
    assert bad["why"]
    if fault in ("doubled", "back-dated"):
        assert bad["kind"] == json.loads(rows[2 if fault == "doubled" else 3])["kind"]


@pytest.mark.parametrize(("side", "cut"), [("north", 1), ("north", 2), ("north", 6), ("server", 2), ("server", 4)])
def test_events_cut_off_at_the_end_are_found_by_the_other_side_alone(tmp_path, side, cut, capsys):
    pair(tmp_path)
    path = tmp_path / f"{side}.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:-cut]))
    key = SIGNERS[side].public
    assert fedicom.main(["audit", "verify", str(path), "--key", key]) == 0
    assert "found with --against only" in capsys.readouterr().out
    code, said = check(tmp_path, side, capsys)
    assert (code, said["first_bad"]["fault"]) == (1, "cut or rewritten")
    # the head that is missing was remembered, so the first event that nobody vouches for is at or before the cut
    assert said["first_bad"]["number"] <= len(rows) - cut


@pytest.mark.parametrize(
    ("side", "number", "named"), [("north", 4, 3), ("north", 0, 0), ("north", 6, 5), ("server", 2, 2), ("server", 1, 0)]
)
def test_a_log_written_anew_by_its_owner_is_found_by_the_other_side_alone(tmp_path, side, number, named, capsys):
    pair(tmp_path)
    path = tmp_path / f"{side}.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)

    def change(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"facts": {**row["facts"], "more": 1}} if at == number else row for at, row in enumerate(events)]

    path.write_bytes(b"".join(resigned(rows, side, change)))
    assert len(verify(path, SIGNERS[side].public)) == len(rows)
    code, said = check(tmp_path, side, capsys)
    assert (code, said["first_bad"]["fault"], said["first_bad"]["number"]) == (1, "cut or rewritten", named)


def test_an_event_that_no_later_head_vouches_for_can_still_be_changed_and_the_command_says_which(tmp_path, capsys):
    pair(tmp_path)
    path = tmp_path / "server.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(resigned(rows, "server", lambda all_: [*all_[:4], all_[4] | {"kind": "round failed"}])))
    code, said = check(tmp_path, "server", capsys)
    assert (code, said["against"][0]["vouched"], said["events"]) == (0, 3, 5)
    fedicom.main(["audit", "verify", str(path), "--against", str(tmp_path / "north.jsonl")])
    assert "it does not vouch for the last event\n" in capsys.readouterr().out


@pytest.mark.parametrize(("hours", "number"), [(-1, 1), (1, 0)])
def test_a_site_whose_times_contradict_the_other_sides_is_named(tmp_path, hours, number, capsys):
    pair(tmp_path, north=Clock(timedelta(hours=hours)))
    code, said = check(tmp_path, "north", capsys)
    assert (code, said["first_bad"]["fault"]) == (1, "time contradicted")
    assert (said["first_bad"]["log"], said["first_bad"]["number"]) == ("north.jsonl", number)
    assert check(tmp_path, "north", capsys, "--tolerance", 4000)[0] == 0


@pytest.mark.parametrize("again", [2, 1], ids=["the same head", "an older one"])
def test_the_first_event_that_remembers_a_head_bounds_all_that_stood_before_it(tmp_path, again):
    # North's clock is 20 minutes fast; what the server noted again half an hour later, a late answer, excuses nothing.
    clock = Clock()
    server = AuditLog(tmp_path / "server.jsonl", SIGNERS["server"], clock=clock)
    north = AuditLog(tmp_path / "north.jsonl", SIGNERS["north"], clock=lambda: clock() + timedelta(minutes=20))
    heads = [north.head, north.append("question received"), north.append("question received")]
    server.append("sites present", heads={"north": heads[2]})
    clock.now += timedelta(minutes=30)
    server.append("sites joined", heads={"north": heads[again]})
    with pytest.raises(AuditError, match="was written before event 1 of the other side") as caught:
        verify_against(verify(tmp_path / "north.jsonl"), verify(tmp_path / "server.jsonl"), name="north")
    assert (caught.value.fault, caught.value.number) == ("time contradicted", 0)


def test_a_coordinator_whose_time_is_before_a_head_that_it_holds_is_named(tmp_path):
    pair(tmp_path, server=Clock(timedelta(hours=-1)))
    server, north = (verify(tmp_path / f"{side}.jsonl", SIGNERS[side].public) for side in ("server", "north"))
    with pytest.raises(AuditError, match="was written after event 0 of the other side") as caught:
        verify_against(server, north)
    assert (caught.value.fault, caught.value.number) == ("time contradicted", 1)


@pytest.mark.parametrize("late", ["an older head", "a head of nobody", "no head"])
def test_a_head_that_is_remembered_late_loosens_no_bound(tmp_path, late):
    # North remembers what the server wrote at 13:00, so 12:52 is 8 minutes too early, whatever it remembers then. Its
    # owner signed that time: it is 4 minutes before the event ahead of it, which its own chain allows.
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    hers, his = (iter([noon + timedelta(minutes=at) for at in minutes]) for minutes in ((0, 0, 60), (0, 56, 56)))
    server = AuditLog(tmp_path / "server.jsonl", SIGNERS["server"], clock=lambda: next(hers))
    north = AuditLog(tmp_path / "north.jsonl", SIGNERS["north"], clock=lambda: next(his))
    first = server.append("sites present", heads={"north": north.head})
    north.append("plan received", server_head=server.append("round aggregated"))
    heads: dict[str, object] = {"an older head": first, "a head of nobody": "f" * 64, "no head": ["f"]}
    north.append("plan received", server_head=heads[late])
    path = tmp_path / "north.jsonl"

    def dated(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*events[:2], events[2] | {"time": events[2]["time"].replace("12:56", "12:52")}]

    path.write_bytes(b"".join(resigned(path.read_bytes().splitlines(keepends=True), "north", dated)))
    with pytest.raises(AuditError, match="was written after event 2 of the other side") as caught:
        verify_against(verify(path, SIGNERS["north"].public), verify(tmp_path / "server.jsonl"), name="north")
    assert (caught.value.fault, caught.value.number) == ("time contradicted", 2)


@pytest.mark.parametrize("side", ["server", "north"])
@pytest.mark.parametrize("year", ["0001", "9999"])
def test_a_time_at_an_end_of_the_calendar_is_a_bad_event_and_no_traceback(tmp_path, side, year, capsys):
    # an hour before the year 1, or after 9999, is no time that Python can hold
    pair(tmp_path)
    path = tmp_path / f"{side}.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)

    def change(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"time": f"{year}-01-01T00:00:00.000+00:00"} for row in events]

    path.write_bytes(b"".join(resigned(rows, side, change)))
    code, said = check(tmp_path, side, capsys)
    assert (code, said["first_bad"]["fault"], said["first_bad"]["number"]) == (1, "unreadable", 0)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "1e300"])
def test_a_tolerance_that_is_no_number_of_seconds_is_refused(tmp_path, seconds, capsys):
    pair(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        fedicom.main(["audit", "verify", str(tmp_path / "north.jsonl"), "--tolerance", seconds])
    assert "expected 0 to 1e+09 seconds" in capsys.readouterr().err


def test_a_clock_set_back_for_one_update_is_told_by_the_log_and_contradicted_by_the_other_side(tmp_path, capsys):
    clock = Clock()

    class SetBack(Clock):
        """Gives update 2 a time of the day before."""

        calls = 0

        def __call__(self) -> datetime:
            self.calls += 1
            return clock() - timedelta(hours=24 if self.calls == 5 else 0)

    pair(tmp_path, server=clock, north=SetBack())
    events = verify(tmp_path / "north.jsonl", SIGNERS["north"].public)
    assert [event.kind for event in events[3:6]] == ["plan received", "clock moved back", "update sent"]
    code, said = check(tmp_path, "north", capsys)
    assert (code, said["first_bad"]["fault"], said["first_bad"]["number"]) == (1, "time contradicted", 4)


def test_a_change_of_the_other_log_is_named_as_the_other_logs(tmp_path, capsys):
    pair(tmp_path)
    path = tmp_path / "server.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":3'))
    code, said = check(tmp_path, "north", capsys)
    assert (code, said["first_bad"]["log"], said["first_bad"]["number"]) == (1, "server.jsonl", 3)


def test_a_log_under_any_file_name_is_known_by_its_key_or_by_what_is_remembered_of_it(tmp_path, capsys):
    pair(tmp_path)
    for name in ("server", "north"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / f"copy-of-{name}.jsonl")
    words = [
        "audit",
        "verify",
        str(tmp_path / "copy-of-north.jsonl"),
        "--against",
        str(tmp_path / "copy-of-server.jsonl"),
    ]
    assert fedicom.main(words) == 0
    assert "remembers 4 heads" in capsys.readouterr().out
    assert fedicom.main([*words, "--registry", str(registry(tmp_path)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "north"


def test_a_key_that_is_not_in_the_registry_is_refused(tmp_path, capsys):
    pair(tmp_path)
    AuditLog(tmp_path / "east.jsonl", Signer.temporary()).append("plan received")
    code = fedicom.main(["audit", "verify", str(tmp_path / "east.jsonl"), "--registry", str(registry(tmp_path))])
    assert code == 1
    assert "east.jsonl, event 0: not signed by the expected key" in capsys.readouterr().err


def test_a_registry_of_another_authority_is_refused_and_one_taken_at_its_word_is_said(tmp_path, capsys):
    pair(tmp_path)
    path = registry(tmp_path)
    words = ["audit", "verify", str(tmp_path / "north.jsonl"), "--registry", str(path)]
    assert fedicom.main(words) == 0
    assert "give --authority" in capsys.readouterr().out
    (tmp_path / "authority.pub").write_text(SIGNERS["authority"].public + "\n")
    assert fedicom.main(words) == 0
    assert "--authority" not in capsys.readouterr().out
    for wrong in (SIGNERS["north"].public, "zz"):
        assert fedicom.main([*words, "--authority", wrong]) == 2
        assert "another federation" in capsys.readouterr().err


def test_two_logs_of_one_side_check_nothing(tmp_path, capsys):
    pair(tmp_path)
    AuditLog(tmp_path / "east.jsonl", Signer.temporary()).append("plan received", server_head="ab" * 32)
    for other in ("east", "north"):
        assert fedicom.main(["audit", "verify", *(str(tmp_path / f"{name}.jsonl") for name in ("north",)), "--against",
                             str(tmp_path / f"{other}.jsonl")]) != 0  # fmt: skip
        assert len(capsys.readouterr().err.splitlines()) == 1
