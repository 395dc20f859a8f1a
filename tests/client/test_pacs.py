"""Pulling from a PACS, without one: parsing, patience, journal, settings, and a server that misbehaves on purpose."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from client.dicomweb import DicomWeb, boundary_of, parts
from client.pacs import _label_keys, pull, pull_verb
from client.pacs_source import Asked, Busy, FoundInstance, Pace, PacsError, Patience, WebPacs, read_pacs
from client.pacs_store import Store
from common.errors import ConfigError, DataError, StorageError
from common.imaging import read_folder
from common.imaging.received import examine
from common.imaging.refusal import Refusal
from tests.common.test_imaging_hostile import dataset

KEY = bytes(32)
STUDY, SERIES = "1.2.3.1", "1.2.3.2"
ASKED = Asked(modalities=("CT",), since=date(2026, 1, 1), until=date(2026, 12, 31))


def encoded(number: int) -> bytes:
    made = dataset(
        np.frombuffer(bytes([number] * 128), "<u2").reshape(8, 8), f"1.2.3.3.{number}", StudyInstanceUID=STUDY,
        SeriesInstanceUID=SERIES, PatientID="MRN", BitsStored=12, HighBit=11,
    )  # fmt: skip
    out = BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


def multipart(bodies: list[bytes], *, ended: bool = True) -> bytes:
    head = b"Content-Type: application/dicom\r\n\r\n"
    return b"".join(b"--edge\r\n" + head + body + b"\r\n" for body in bodies) + b"--edge--\r\n" * ended


# --- parsing


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 10_000])
@pytest.mark.parametrize("before", [b"", b"\r\n", b"a preamble\r\n"])
def test_parts_are_the_same_however_the_answer_is_cut_into_pieces(size, before):
    bodies = [b"first", b"", b"\r\n--edg", b"x" * 300 + b"\r\n", b"--edge"]
    data = before + multipart(bodies)
    chunks = iter([data[at : at + size] for at in range(0, len(data), size)])
    assert [b"".join(part) for part in parts(chunks, b"edge")] == bodies


@pytest.mark.parametrize("left", range(1, 60, 3))
def test_an_answer_that_ends_before_its_closing_boundary_is_cut_off(left):
    data = multipart([b"first", b"second"])
    data = data[: len(data) - 4 - left]  # without "--\r\n" it may go on
    with pytest.raises(Busy, match="cut off"):
        [b"".join(part) for part in parts(iter([data]), b"edge")]


def test_boundaries_are_read_with_and_without_quotes():
    kind = 'multipart/related; type="application/dicom"; '
    assert boundary_of(kind + "boundary=a-b") == boundary_of(kind + 'boundary="a-b"') == b"a-b"
    for wrong in ("application/json", "multipart/related", "text/html; boundary=x"):
        with pytest.raises(PacsError):
            boundary_of(wrong)


# --- patience and pace


def test_waits_double_up_to_the_most_and_the_pacs_may_ask_for_more():
    waits: list[float] = []
    patience = Patience(8, 1.0, most_s=10.0, sleep=waits.append)
    for failed, wait_s in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (50, 10.0)):
        patience.pause(failed)
        assert wait_s / 2 <= waits[-1] <= wait_s
    patience.pause(1, 7.0)
    assert waits[-1] == 7.0
    patience.pause(1, 1e9)
    assert waits[-1] == 10.0


def test_patience_ends_after_so_many_tries_and_says_that_nothing_is_lost():
    calls = []

    def work() -> None:
        calls.append(1)
        raise Busy("HTTP 503")

    with pytest.raises(PacsError, match="HTTP 503; tried 3 times in a row; what was pulled is kept"):
        Patience(3, 1.0, sleep=lambda _: None)(work)
    assert len(calls) == 3


def test_a_stream_is_held_to_its_rate_and_does_not_save_up_idle_time():
    now = [0.0]
    pace = Pace(100.0, clock=lambda: now[0])
    assert pace.spend(50) == 0.5
    now[0] = 0.5
    assert pace.spend(100) == 1.0
    now[0] = 100.0  # idle
    assert pace.spend(100) == 1.0
    assert Pace(None).spend(10**12) == 0.0


def test_what_the_pacs_gives_beyond_the_question_is_left_out():
    assert ASKED.holds("20260101", ["CT", "SR"])
    assert ASKED.holds("", [])
    assert not ASKED.holds("20251231", ["CT"])
    assert not ASKED.holds("20260101", ["MR"])


# --- settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "dicomweb", "url": "http://pacs/dicom-web"}, "unsafe_no_tls"),
        ({"kind": "dicomweb", "url": "https://u:p4ss@pacs/dicom-web"}, "no password"),
        ({"kind": "dicomweb", "url": "https://pacs", "user_file": "a", "token_file": "b"}, "exclude"),
        ({"kind": "dicomweb", "url": "https://pacs", "certificate": "a"}, "belong together"),
        ({"kind": "dicomweb", "url": "https://pacs", "password": "p4ss"}, "password"),
        ({"kind": "dimse", "host": "pacs"}, "called_ae"),
        ({"kind": "dimse", "host": "pacs", "called_ae": "SEVENTEEN LETTERS"}, "called_ae"),
        ({"kind": "cmove", "host": "pacs"}, "kind"),
    ],
)
def test_wrong_settings_are_refused_with_the_field(tmp_path, settings, says):
    (tmp_path / "pacs.yaml").write_text(json.dumps({"pacs": {"main": settings}}))
    with pytest.raises(ConfigError) as error:
        read_pacs(tmp_path / "pacs.yaml")
    assert says in str(error.value)
    assert "p4ss" not in str(error.value)


def test_settings_that_are_given_twice_or_in_another_encoding_are_refused(tmp_path):
    path = tmp_path / "pacs.yaml"
    path.write_text("pacs:\n  main: {kind: dimse}\n  main: {kind: dicomweb}\n")
    with pytest.raises(ConfigError, match=r"^pacs\.yaml, line 3: 'main' is given twice"):
        read_pacs(path)
    path.write_bytes("pacs: {main: {kind: dicomweb, ca: /data/Schlüssel}}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^pacs\.yaml is not UTF-8 text"):
        read_pacs(path)


def verb(home: Path, *more: str) -> int:
    words = ["--pacs", "main", "--modality", "CT", "--since", "2026-01-01", "--out", str(home / "out")]
    return pull_verb([*words, "--config", str(home / "pacs.yaml"), *more])


@pytest.mark.parametrize(
    ("mode", "text", "says"),
    [
        (0o644, "u:p", "chmod 600"),
        (0o600, "u", "name:password"),
        (0o600, "u:p\nx", "single line"),
        (0o600, "", "single"),
    ],
)
def test_a_password_that_others_can_read_or_nobody_can_use_is_refused(tmp_path, mode, text, says):
    (tmp_path / "user").write_text(text)
    (tmp_path / "user").chmod(mode)
    settings = {"kind": "dicomweb", "url": "https://127.0.0.1:1", "user_file": "user"}
    (tmp_path / "pacs.yaml").write_text(json.dumps({"pacs": {"main": settings}}))
    with pytest.raises((ConfigError, StorageError), match=says):
        verb(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pacs", "other"], "has no PACS 'other'; it has: main"),
        (["--since", "yesterday"], "--since is no date"),
        (["--until", "2025-12-31"], "before --since"),
        (["--modality", "C*"], "--modality"),
        (["--body-part", "CHE*"], "--body-part"),
        (["--limit", "0"], "--limit"),
        (["--rate", "nan"], "--rate"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_asked(tmp_path, words, says):
    (tmp_path / "pacs.yaml").write_text('{"pacs": {"main": {"kind": "dicomweb", "url": "https://127.0.0.1:1"}}}')
    with pytest.raises(ConfigError) as error:
        verb(tmp_path, *words)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["*", "A?1", "A\\B", "12345678901234567"])
def test_an_accession_number_that_would_ask_for_more_is_refused_and_not_shown(tmp_path, line):
    (tmp_path / "pacs.yaml").write_text('{"pacs": {"main": {"kind": "dicomweb", "url": "https://127.0.0.1:1"}}}')
    (tmp_path / "numbers").write_text(f"A1\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as error:
        verb(tmp_path, "--accessions", str(tmp_path / "numbers"))
    assert f" {line}" not in str(error.value)


# --- files and the journal


def test_rows_of_the_label_table_have_the_numbers_that_a_spreadsheet_shows(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("accession,label\nA1,sick\n\n,\nA3,well\n")
    assert _label_keys(table) == ("accession", [(2, "A1"), (5, "A3")])
    table.write_text("accession;label\nA1;sick\n")
    with pytest.raises(DataError, match="separate the columns by commas"):
        _label_keys(table)


def store(folder: Path, key: bytes = KEY) -> Store:
    return Store(folder, key, Pace(None))


def wanted(*numbers: int) -> list[FoundInstance]:
    return [FoundInstance(f"1.2.3.3.{number}", str(CTImageStorage)) for number in numbers]


def noted(opened: Store) -> int:
    return opened._journal.execute("SELECT COUNT(*) FROM done").fetchone()[0]


def test_only_what_was_asked_for_and_is_whole_gets_a_name(tmp_path):
    opened = store(tmp_path / "out")
    with opened.taking(STUDY, SERIES, wanted(1, 2)) as take:
        take([encoded(1)])
        take([encoded(1)])  # once more
        take([encoded(3)])  # not asked for
        take([encoded(2)[:-1]])  # cut off
        take([b"junk"])
        take([])
        take([encoded(2)[:200], encoded(2)[200:]])
    assert (opened.fetched, opened.bad, noted(opened)) == (2, 5, 2)
    assert opened.missing(STUDY, SERIES, wanted(1, 2, 3)) == wanted(3)
    files = sorted((tmp_path / "out").rglob("*.dcm"))
    assert sorted(path.read_bytes() for path in files) == sorted([encoded(1), encoded(2)])
    assert all("1.2.3" not in str(path.relative_to(tmp_path)) and path.stat().st_mode & 0o077 == 0 for path in files)
    opened.close()


def test_a_file_whose_row_was_lost_is_taken_over_and_a_row_whose_file_was_lost_is_not_believed(tmp_path):
    opened = store(tmp_path / "out")
    with opened.taking(STUDY, SERIES, wanted(1, 2)) as take:
        take([encoded(1)])
        take([encoded(2)])
    opened._journal.execute("DELETE FROM done")
    assert opened.missing(STUDY, SERIES, wanted(1, 2)) == []
    assert noted(opened) == 2
    next(iter((tmp_path / "out").rglob("*.dcm"))).unlink()
    assert len(opened.missing(STUDY, SERIES, wanted(1, 2))) == 1
    (tmp_path / "out" / "pull" / "left.part").write_bytes(b"half")
    opened.close()
    store(tmp_path / "out").close()
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_folder_is_for_one_pull_at_a_time_and_for_one_key(tmp_path):
    opened = store(tmp_path / "out")
    with pytest.raises(StorageError, match="another pull is at work"):
        store(tmp_path / "out")
    opened.close()
    with pytest.raises(StorageError, match="another key"):
        store(tmp_path / "out", bytes([1] * 32))
    store(tmp_path / "out").close()


@pytest.mark.parametrize("cut", [1, 100, 128, 140, 400])
def test_a_file_without_its_end_is_not_whole(tmp_path, cut):
    (tmp_path / "a").write_bytes(encoded(1))
    assert examine(tmp_path / "a").sop_uid == "1.2.3.3.1"
    (tmp_path / "a").write_bytes(encoded(1)[:-cut])
    with pytest.raises(Refusal):
        examine(tmp_path / "a")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.dcm")}


def test_a_series_enters_the_data_folder_whole_and_leaves_it_when_the_pacs_has_more_of_it(tmp_path):
    out = tmp_path / "out"
    opened = store(out)
    with opened.taking(STUDY, SERIES, wanted(1, 2)) as take:
        take([encoded(1)])
        take([encoded(2)])
    assert (len(names(out / "dicom")), len(names(out / "pull" / "partial"))) == (0, 2)
    assert (opened.waiting(), list(opened.rows())) == (1, [])
    opened.release(STUDY, SERIES)
    assert (len(names(out / "dicom")), len(names(out / "pull" / "partial"))) == (2, 0)
    assert (opened.waiting(), len(list(opened.rows()))) == (0, 1)
    with opened.taking(STUDY, SERIES, opened.missing(STUDY, SERIES, wanted(1, 2, 3))) as take:
        assert names(out / "dicom") == set()
        take([encoded(3)])
    assert names(out / "dicom") == set()
    assert opened.missing(STUDY, SERIES, wanted(1, 2, 3)) == []
    opened.release(STUDY, SERIES)
    assert len(names(out / "dicom")) == 3
    opened.release(STUDY, SERIES)  # once more
    assert (len(names(out / "dicom")), opened.waiting()) == (3, 0)
    opened.close()


def test_a_series_that_was_brought_back_by_hand_counts_and_what_waited_of_it_does_not(tmp_path):
    opened = store(tmp_path / "out")
    for numbers in ((1, 2), (3,)):
        with opened.taking(STUDY, SERIES, wanted(*numbers)) as take:
            for number in numbers:
                take([encoded(number)])
        waiting = opened._series(opened.partial, STUDY, SERIES)
        if numbers == (1, 2):
            waiting.rename(tmp_path / "copy")
    here = opened._series(opened.images, STUDY, SERIES)
    here.parent.mkdir()
    (tmp_path / "copy").rename(here)
    assert opened.missing(STUDY, SERIES, wanted(1, 2)) == []
    assert opened.missing(STUDY, SERIES, wanted(1, 2, 3)) == wanted(3)
    opened.hold(STUDY, SERIES)
    assert (len(names(waiting)), here.exists()) == (2, False)
    opened.close()


def test_a_series_of_which_nothing_came_does_not_wait(tmp_path):
    opened = store(tmp_path / "out")
    with opened.taking(STUDY, SERIES, wanted(1)):
        pass
    assert opened.waiting() == 0
    assert list((tmp_path / "out" / "pull" / "partial").iterdir()) == []
    opened.close()


# --- a server that misbehaves as Orthanc cannot


class Server:
    """HTTP on loopback; `answer` gives (status, headers, body) for a path, its parameters and how often it came."""

    def __init__(self, answer: Callable[[str, dict[str, str], int], tuple[int, dict[str, str], bytes]]) -> None:
        self.calls: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                split = urlsplit(self.path)
                outer.calls.append(split.path)
                asked = {name: values[0] for name, values in parse_qs(split.query).items()}
                status, headers, body = answer(split.path, asked, outer.calls.count(split.path))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def source(self, waits: list[float], **settings: Any) -> tuple[DicomWeb, Patience]:
        url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        patience = Patience(3, 0.001, sleep=waits.append)
        return DicomWeb(WebPacs(kind="dicomweb", url=url, unsafe_no_tls=True, **settings), Path(), patience), patience


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Any) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


FILES = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=edge'}


def found(**values: str) -> dict[str, Any]:
    return {tag.lstrip("t"): {"vr": "UI", "Value": [value]} for tag, value in values.items()}


def listing(path: str, asked: dict[str, str], numbers: range) -> list[dict[str, Any]]:
    rows = {
        "/studies": [found(t0020000D=STUDY, t00080061="CT")],
        f"/studies/{STUDY}/series": [found(t0020000E=SERIES, t00080060="CT")],
        f"/studies/{STUDY}/series/{SERIES}/instances": [found(t00080018=f"1.2.3.3.{number}") for number in numbers],
    }[path]
    return rows[int(asked["offset"]) :][: int(asked["limit"])]


def json_answer(rows: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
    return (200, {}, json.dumps(rows).encode()) if rows else (204, {}, b"")


def run(server: Server, folder: Path, **settings: Any) -> tuple[Any, Store, list[float]]:
    waits: list[float] = []
    source, patience = server.source(waits, **settings)
    opened = store(folder)
    try:
        return pull(source, opened, ASKED, patience, lambda *_: None), opened, waits
    finally:
        source.close()
        opened.close()


def test_a_damaged_instance_is_asked_for_again_alone_and_listed_when_it_stays_damaged(serve, tmp_path):
    series = f"/studies/{STUDY}/series/{SERIES}"

    def answer(path: str, asked: dict[str, str], call: int) -> tuple[int, dict[str, str], bytes]:
        if path == series:
            return 200, FILES, multipart([encoded(1), encoded(2)[:-9], encoded(3)[:-9]])
        if path == f"{series}/instances/1.2.3.3.2":
            return 200, FILES, multipart([encoded(2)])
        if path == f"{series}/instances/1.2.3.3.3":
            return 200, FILES, multipart([encoded(4)])  # another image
        return json_answer(listing(path, asked, range(1, 4)))

    server = serve(answer)
    pulled, opened, _ = run(server, tmp_path / "out")
    assert (opened.fetched, pulled.refused, pulled.vanished) == (2, 1, 0)
    assert pulled.problems == [(STUDY, SERIES, "1 instances not delivered whole")]
    assert server.calls.count(f"{series}/instances/1.2.3.3.1") == 0
    assert server.calls.count(f"{series}/instances/1.2.3.3.3") <= 4


def test_an_answer_that_breaks_off_is_gone_on_with_where_it_broke(serve, tmp_path):
    series = f"/studies/{STUDY}/series/{SERIES}"

    def answer(path: str, asked: dict[str, str], call: int) -> tuple[int, dict[str, str], bytes]:
        if path == series:
            return 200, {**FILES, "Content-Length": "9999"}, multipart([encoded(1), encoded(2)[:-9]], ended=False)
        if path.startswith(f"{series}/instances/"):
            return 200, FILES, multipart([encoded(int(path[-1]))])
        return json_answer(listing(path, asked, range(1, 4)))

    server = serve(answer)
    pulled, opened, _ = run(server, tmp_path / "out", timeout_s=2.0)
    assert (opened.fetched, pulled.refused) == (3, 0)
    asked_again = [path[-1] for path in server.calls if path.startswith(f"{series}/instances/")]
    assert asked_again == ["2", "3"]


def ct(number: int) -> bytes:
    """A slice of a volume that is a valid one however many slices are left out at its end."""
    made = dcmread(BytesIO(encoded(number)))
    made.PixelSpacing, made.SliceThickness = [1.0, 1.0], 2.0
    made.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    made.ImagePositionPatient = [0.0, 0.0, 2.0 * number]
    made.RescaleSlope, made.RescaleIntercept, made.InstanceNumber = 1, -1024, number
    out = BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize("how", ["not delivered", "broken off", "vanished"])
def test_a_volume_without_its_last_slices_is_not_trained_from_until_they_come(serve, tmp_path, how):
    series, out = f"/studies/{STUDY}/series/{SERIES}", tmp_path / "out"
    slices, short, seen = [ct(number) for number in range(10)], True, set()

    def answer(path: str, asked: dict[str, str], call: int) -> tuple[int, dict[str, str], bytes]:
        seen.update(names(out / "dicom"))
        if path == series:
            return 200, FILES, multipart(slices[:7])
        if path.startswith(f"{series}/instances/"):
            if short:
                return {"not delivered": 200, "broken off": 503, "vanished": 404}[how], FILES, multipart([])
            return 200, FILES, multipart([slices[int(path.rsplit(".", 1)[1])]])
        return json_answer(listing(path, asked, range(10)))

    server = serve(answer)
    if how == "broken off":
        with pytest.raises(PacsError, match="what was pulled is kept"):
            run(server, out)
    else:
        pulled, _, _ = run(server, out)
        assert (pulled.refused, pulled.vanished) == ((3, 0) if how == "not delivered" else (0, 1))
    assert read_folder(out / "dicom").volumes == ()
    cut_short = read_folder(out / "pull" / "partial").volumes
    assert [volume.values_ZYX.shape for volume in cut_short] == [(7, 8, 8)]  # nothing else would notice
    short = False
    server.calls.clear()
    _, opened, _ = run(server, out)
    assert opened.fetched == 3
    assert series not in server.calls
    assert [volume.values_ZYX.shape for volume in read_folder(out / "dicom").volumes] == [(10, 8, 8)]
    assert list((out / "pull" / "partial").iterdir()) == []
    assert seen == set()


def test_a_series_that_an_earlier_version_left_half_is_taken_out_and_comes_back_whole(serve, tmp_path):
    series, out = f"/studies/{STUDY}/series/{SERIES}", tmp_path / "out"
    opened = store(out)
    with opened.taking(STUDY, SERIES, wanted(1, 2)) as take:
        take([encoded(1)])
        take([encoded(2)])
    opened.release(STUDY, SERIES)
    opened.close()
    during = []

    def answer(path: str, asked: dict[str, str], call: int) -> tuple[int, dict[str, str], bytes]:
        if path.startswith(f"{series}/instances/"):
            during.append(len(names(out / "dicom")))
            return 200, FILES, multipart([encoded(int(path[-1]))])
        return json_answer(listing(path, asked, range(1, 4)))

    pulled, opened, _ = run(serve(answer), out)
    assert (pulled.already, opened.fetched, during) == (2, 1, [0])
    assert len(names(out / "dicom")) == 3


def test_too_many_requests_is_waited_for_as_long_as_the_pacs_says(serve, tmp_path):
    def answer(path: str, asked: dict[str, str], call: int) -> tuple[int, dict[str, str], bytes]:
        if path == "/studies" and call == 1:
            return 429, {"Retry-After": "17"}, b""
        if path == f"/studies/{STUDY}/series/{SERIES}":
            return (503, {}, b"") if call == 1 else (200, FILES, multipart([encoded(1)]))
        if "/instances/" in path:
            return 200, FILES, multipart([encoded(1)])
        return json_answer(listing(path, asked, range(1, 2)))

    _, opened, waits = run(serve(answer), tmp_path / "out")
    assert opened.fetched == 1
    assert waits[0] == 17.0
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("status", "headers", "body", "says"),
    [
        (401, {}, b"", "refuses us (HTTP 401)"),
        (302, {"Location": "http://127.0.0.1:1/"}, b"", "sends us elsewhere (HTTP 302)"),
        (400, {}, b"", "does not understand the request (HTTP 400)"),
        (200, {}, b"<html>", "something else than DICOM JSON"),
        (200, {}, b'[{"0020000D": {"vr": "UI", "Value": ["../../x"]}}]', "without a valid UID"),
    ],
)
def test_what_patience_cannot_mend_ends_the_pull_at_once(serve, tmp_path, status, headers, body, says):
    server = serve(lambda path, asked, call: (status, headers, body if asked["offset"] == "0" else b"[]"))
    with pytest.raises(PacsError) as error:
        run(server, tmp_path / "out")
    assert says in str(error.value)
    assert len(server.calls) <= 2


def studies(numbers: range) -> list[dict[str, Any]]:
    return [found(t0020000D=f"1.2.{number}", t00080061="CT") for number in numbers]


def test_all_pages_are_read_also_from_a_server_that_gives_less_than_asked_for(serve):
    def answer(path: str, asked: dict[str, str], call: int) -> tuple[int, dict[str, str], bytes]:
        start = int(asked["offset"])
        return json_answer(studies(range(1, 24))[start : start + min(5, int(asked["limit"]))])

    source, _ = serve(answer).source([], page=10)
    assert source.studies(ASKED) == [f"1.2.{number}" for number in range(1, 24)]


def test_a_server_without_paging_is_read_when_its_answer_is_whole_and_refused_when_it_may_be_cut(serve):
    source, _ = serve(lambda *_: json_answer(studies(range(1, 6)))).source([], page=10)
    assert len(source.studies(ASKED)) == 5
    source, _ = serve(lambda *_: json_answer(studies(range(1, 11)))).source([], page=10)
    with pytest.raises(PacsError, match="every page"):
        source.studies(ASKED)
