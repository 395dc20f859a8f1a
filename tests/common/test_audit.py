"""A log that was tampered with is found out, and the first wrong event is named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import signal
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.audit import GENESIS, AuditError, AuditLog, verify, verify_against
from common.chain import digest_of, line_of
from common.errors import StorageError
from common.identity import Signer

KEY = Signer.temporary()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit" / "north.jsonl"
    written = AuditLog(path, KEY)
    for number in range(1, 5):
        written.append("update sent", round=number, norm=1 / number, why="größer", head=None)
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def first_bad(path: Path, key: str | None = KEY.public) -> int:
    with pytest.raises(AuditError) as caught:
        verify(path, key)
    found = re.search(r"event (\d+)", str(caught.value))
    assert found, str(caught.value)
    return int(found[1])


def test_an_untouched_log_verifies_and_gives_its_events(log):
    events = verify(log, KEY.public)
    assert [event.number for event in events] == [0, 1, 2, 3, 4]
    assert events[0].before == GENESIS
    assert events[2].facts["why"] == "größer"
    assert verify(log) == events


def test_every_flipped_byte_is_named_with_its_event(log):
    whole = log.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for place in range(0, len(whole), 17):
        for mask in (0x20, 0x01):
            changed = bytearray(whole)
            changed[place] ^= mask
            log.write_bytes(bytes(changed))
            event = sum(end < place for end in ends)
            if place == len(whole) - 1:
                with pytest.raises(AuditError, match="cut short"):
                    verify(log, KEY.public)
            else:
                assert first_bad(log) == event, (place, mask)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_byte_anywhere_is_found(log, data):
    whole = log.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    changed = log.with_name("changed.jsonl")
    changed.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
    with pytest.raises(AuditError):
        verify(changed, KEY.public)


@pytest.mark.parametrize(
    ("tamper", "bad"),
    [
        (lambda rows: rows[1:], 0),
        (lambda rows: rows[:2] + rows[3:], 2),
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], 1),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 3),
        (lambda rows: [*rows, rows[0]], 5),
        (lambda rows: [*rows[:2], b"\n", *rows[2:]], 2),
        (lambda rows: [*rows[:2], b"[]\n", *rows[2:]], 2),
        (lambda rows: [*rows[:2], b"[1]\n", *rows[2:]], 2),
        (lambda rows: [*rows[:2], b"5\n", *rows[2:]], 2),
        (lambda rows: [b"true\n", *rows], 0),
        (lambda rows: [*rows[:2], rows[2].replace(b'"number":2', b'"number":"2"'), *rows[3:]], 2),
        (lambda rows: [rows[0], rows[1].replace(b'"number":1', b'"number":true'), *rows[2:]], 1),
        (lambda rows: [*rows[:2], line_of(json.loads(rows[2]) | {"facts": ["a"]}) + b"\n", *rows[3:]], 2),
        (lambda rows: [*rows[:2], b"[" * 100_000 + b"\n", *rows[2:]], 2),
        (lambda rows: [*rows[:2], rows[2].replace(b'"kind"', b' "kind"'), *rows[3:]], 2),
        (lambda rows: [*rows[:2], rows[2].replace(b'"facts"', b'"facts":{"round":9},"facts"', 1), *rows[3:]], 2),
        (lambda rows: [*rows[:2], rows[2].replace(b'{"before"', b'{"aside":1,"before"', 1), *rows[3:]], 2),
    ],
    ids=[
        "dropped first",
        "dropped",
        "reordered",
        "doubled",
        "appended",
        "blank",
        "list",
        "filled list",
        "number",
        "first a word",
        "number as text",
        "number as truth",
        "facts as list",
        "deep",
        "space",
        "twice",
        "new",
    ],
)
def test_dropped_reordered_doubled_or_respelt_events_are_named(log, tamper, bad):
    log.write_bytes(b"".join(tamper(lines(log))))
    assert first_bad(log) == bad


def rewritten(path: Path, number: int, signer: Signer | None, **changes) -> None:
    """Changes an event and all hashes after it, as somebody would who knows the format."""
    rows, before = [], None
    for place, line in enumerate(lines(path)):
        row = json.loads(line)
        body = {key: row[key] for key in ("number", "time", "kind", "facts", "before")}
        if place == number:
            body |= changes
        body["before"] = before if before is not None else body["before"]
        digest = digest_of(body)
        signature = signer.sign(bytes.fromhex(digest)) if signer is not None else row["signature"]
        rows.append(line_of({**body, "hash": digest, "signature": signature}) + b"\n")
        before = digest
    path.write_bytes(b"".join(rows))


@pytest.mark.parametrize("change", [{"time": 5}, {"time": None}, {"kind": 5}], ids=str)
def test_a_signed_field_that_is_no_text_is_a_bad_event(log, change):
    rewritten(log, 2, KEY, **change)
    assert first_bad(log) == 2


def test_new_facts_with_new_hashes_but_no_key_are_named(log):
    rewritten(log, 2, None, facts={"round": 99})
    assert first_bad(log) == 2
    assert first_bad(log, None) == 2


def test_an_event_that_its_owner_signed_anew_alone_is_named_by_the_one_that_followed_it(log):
    rows = lines(log)
    rewritten(log, 2, KEY, facts={"round": 99})
    log.write_bytes(b"".join([*rows[:2], lines(log)[2], *rows[3:]]))
    with pytest.raises(AuditError, match="does not follow the event before it") as caught:
        verify(log, KEY.public)
    assert (caught.value.fault, caught.value.number) == ("unchained", 3)


def test_the_name_of_a_log_and_each_of_its_lines_last_before_the_caller_hears_of_them(tmp_path):
    path, lasting = tmp_path / "north.jsonl", []

    def flush(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        lasting.append(
            sorted(file.name for file in tmp_path.glob("*.jsonl")) if folder else path.read_bytes().count(b"\n")
        )

    written = AuditLog(path, KEY, rotate_bytes=1, flush=flush)
    assert lasting == [1, ["north.jsonl"]]
    written.append("in a new file")
    renamed, both = ["north.0001.jsonl"], ["north.0001.jsonl", "north.jsonl"]
    assert lasting[2:] == [renamed, 1, both, 2]  # log continued, the event itself
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.jsonl")} == {0o600}


def test_a_log_written_anew_with_a_foreign_key_is_named(log):
    thief = Signer.temporary()
    rewritten(log, 2, thief, facts={"round": 99})
    assert first_bad(log) == 0
    assert first_bad(log, None) == 0  # the first event still names the owner
    rewritten(log, 0, thief, facts={"public_key": thief.public})
    assert len(verify(log)) == 5  # consistent in itself ...
    assert first_bad(log) == 0  # ... but not the owner's


@pytest.mark.parametrize("key", ["", "zz", "00" * 32, "ab"])
def test_junk_as_key_verifies_nothing(log, key):
    assert first_bad(log, key) == 0


def test_an_empty_log_proves_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(AuditError) as caught:
        verify(tmp_path / "empty.jsonl")
    assert str(caught.value) == "empty.jsonl: no event; an empty log proves nothing"
    assert (caught.value.number, caught.value.kind) == (None, None)


def test_a_log_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        verify(tmp_path / "absent.jsonl")


def test_a_torn_last_line_is_dropped_and_the_chain_goes_on(log):
    whole = log.read_bytes()
    log.write_bytes(whole + lines(log)[-1][:40])
    with pytest.raises(AuditError, match="cut short"):
        verify(log, KEY.public)
    AuditLog(log, KEY).append("after the crash")
    events = verify(log, KEY.public)
    assert [event.kind for event in events[4:]] == ["update sent", "after the crash"]
    assert log.read_bytes().startswith(whole)


def test_a_resumed_log_keeps_the_chain(log):
    before = verify(log)[-1].hash
    again = AuditLog(log, KEY)
    assert again.head == before
    head = again.append("resumed")
    assert again.head == head == verify(log, KEY.public)[-1].hash


def test_a_tampered_log_is_not_opened_for_writing(log):
    log.write_bytes(b"".join(lines(log)[1:]))
    with pytest.raises(AuditError, match="event 0"):
        AuditLog(log, KEY)


def test_a_log_of_another_key_is_not_continued(log):
    with pytest.raises(AuditError, match="not signed by the expected key"):
        AuditLog(log, Signer.temporary())


def test_two_writers_of_one_log_go_on_where_the_other_ended(log):
    one, two = AuditLog(log, KEY), AuditLog(log, KEY)
    one.append("first")
    two.append("second")
    assert one.head == verify(log)[-2].hash
    one.append("third")
    assert [event.kind for event in verify(log, KEY.public)[5:]] == ["first", "second", "third"]


def test_a_full_disk_leaves_the_log_whole_and_writable_later(log):
    written = AuditLog(log, KEY)
    whole = log.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))  # a hundred bytes are left on this "disk"
    try:
        with pytest.raises(StorageError):
            written.append("too much")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert log.read_bytes() == whole
    written.append("space again")
    assert [event.kind for event in verify(log, KEY.public)][-1] == "space again"


def test_text_that_is_no_unicode_can_be_logged(log):
    AuditLog(log, KEY).append("odd", why="file \udcff")
    assert verify(log, KEY.public)[-1].facts["why"] == "file \udcff"


def pair(folder: Path) -> tuple[Path, Path]:
    """A coordinator and a site that anchor each other's heads over three rounds."""
    server, site = AuditLog(folder / "server.jsonl", KEY), AuditLog(folder / "north.jsonl", KEY)
    server.append("sites present", heads={"north": site.head})
    for number in range(1, 4):
        site.append("plan received", round=number, server_head=server.head)
        site.append("update sent", round=number)
        server.append("round aggregated", round=number, heads={"north": site.head})
    return folder / "server.jsonl", folder / "north.jsonl"


def test_both_sides_find_their_heads_in_the_other_log(tmp_path):
    server, site = map(verify, pair(tmp_path))
    assert verify_against(site, server, name="north") == 4
    assert verify_against(server, site) == 3


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_log_cut_at_the_end_is_found_only_by_the_other_side(tmp_path, cut):
    server, site = pair(tmp_path)
    site.write_bytes(b"".join(lines(site)[:-cut]))
    short = verify(site, KEY.public)  # whole in itself
    with pytest.raises(AuditError, match="which this log has not"):
        verify_against(short, verify(server), name="north")


def test_a_coordinators_log_cut_or_written_anew_by_its_own_key_is_found_by_the_site(tmp_path):
    server, site = pair(tmp_path)
    anchors = verify(site)
    whole = server.read_bytes()
    server.write_bytes(b"".join(lines(server)[:2]))
    with pytest.raises(AuditError, match=r"event 3 of the other side .* it was cut, this event is missing$") as caught:
        verify_against(verify(server, KEY.public), anchors)
    assert (caught.value.number, caught.value.kind) == (2, None)
    server.write_bytes(whole)
    rewritten(server, 1, KEY, facts={"heads": {}})
    with pytest.raises(AuditError, match=r"event 1 of .* written anew from here on \(kind: log started\)$") as caught:
        verify_against(verify(server, KEY.public), anchors)
    assert (caught.value.number, caught.value.kind) == (0, "log started")


def late_answer(folder: Path) -> tuple[Path, Path]:
    """As `pair`, and a question between rounds 2 and 3 whose answer is noted after round 3: event 5 of the site's."""
    server, site = AuditLog(folder / "server.jsonl", KEY), AuditLog(folder / "north.jsonl", KEY)
    server.append("sites present", heads={"north": site.head})
    late = ""
    for number in range(1, 4):
        if number == 3:
            late = site.append("question received", server_head=server.head)
        site.append("plan received", round=number, server_head=server.head)
        site.append("update sent", round=number)
        server.append("round aggregated", round=number, heads={"north": site.head})
    server.append("sites joined", heads={"north": late})
    return folder / "server.jsonl", folder / "north.jsonl"


def test_an_answer_that_is_noted_late_is_no_fault_of_either_log(tmp_path):
    server, site = map(verify, late_answer(tmp_path))
    assert [event.facts["heads"]["north"] for event in server[1:]] == [site[at].hash for at in (0, 2, 4, 7, 5)]
    assert verify_against(site, server, name="north") == 5
    assert verify_against(server, site) == 4


@pytest.mark.parametrize("keep", range(1, 8))
def test_with_a_late_answer_a_log_that_was_cut_anywhere_is_still_found(tmp_path, keep):
    server, site = late_answer(tmp_path)
    site.write_bytes(b"".join(lines(site)[:keep]))
    with pytest.raises(AuditError, match="which this log has not") as caught:
        verify_against(verify(site, KEY.public), verify(server), name="north")
    vouched = max(at for at in (0, 2, 4) if at < keep)  # the head of event 7 misses before that of 5 is looked for
    assert (caught.value.fault, caught.value.number) == ("cut or rewritten", vouched + 1)


@pytest.mark.parametrize("number", range(8))
def test_with_a_late_answer_an_event_that_was_written_anew_is_still_found(tmp_path, number):
    server, site = late_answer(tmp_path)
    rewritten(site, number, KEY, kind="another")
    with pytest.raises(AuditError, match="which this log has not") as caught:
        verify_against(verify(site, KEY.public), verify(server), name="north")
    assert caught.value.fault == "cut or rewritten"
    assert caught.value.number is not None
    assert caught.value.number <= number


def test_with_a_late_answer_newest_events_that_were_replaced_are_still_found(tmp_path):
    server, site = late_answer(tmp_path)
    site.write_bytes(b"".join(lines(site)[:6]))  # up to the older head, which was remembered last
    log = AuditLog(site, KEY)
    log.append("plan received", round=3)
    log.append("update sent", round=3, digest="another")
    with pytest.raises(AuditError, match="event 4 of the other side remembers head"):
        verify_against(verify(site, KEY.public), verify(server), name="north")


@pytest.mark.parametrize("heads", [None, {}, [], "north", {"south": "ab"}, 5])
def test_a_log_without_anchors_checks_nothing_and_says_so(tmp_path, heads):
    _, site = pair(tmp_path)
    AuditLog(tmp_path / "other.jsonl", KEY).append("round", heads=heads)
    with pytest.raises(AuditError, match="nothing was checked"):
        verify_against(verify(site), verify(tmp_path / "other.jsonl"), name="north")


@pytest.mark.parametrize("head", [5, ["a"], "f" * 64])
def test_an_anchor_that_is_no_head_of_the_log_is_refused(tmp_path, head):
    _, site = pair(tmp_path)
    AuditLog(tmp_path / "other.jsonl", KEY).append("round", heads={"north": head})
    with pytest.raises(AuditError, match="which this log has not"):
        verify_against(verify(site), verify(tmp_path / "other.jsonl"), name="north")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_signed_number_that_json_has_not_is_a_bad_event(log, word):
    # The owner hashes and signs any text that it likes.
    body = f'"before":"{AuditLog(log, KEY).head}","facts":{{"epsilon":{word}}}'
    tail = '"kind":"update sent","number":5,'
    time = '"time":"2999-01-01T00:00:00.000+00:00"'
    digest = hashlib.sha256(f"{{{body},{tail}{time}}}".encode()).hexdigest()
    signature = KEY.sign(bytes.fromhex(digest))
    with log.open("a") as file:
        file.write(f'{{{body},"hash":"{digest}",{tail}"signature":"{signature}",{time}}}\n')
    with pytest.raises(AuditError, match="event 5: not JSON \\(which has no NaN and no infinity\\)"):
        verify(log)


def test_a_number_that_json_has_not_is_not_written_and_the_log_goes_on(log):
    writer, before = AuditLog(log, KEY), log.read_bytes()
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            writer.append("update sent", epsilon=number)
    assert log.read_bytes() == before
    writer.append("update sent", epsilon=1.5)
    assert verify(log)[-1].facts == {"epsilon": 1.5}
