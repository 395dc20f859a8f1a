"""Weights beside the messages: a run's folder, the gateway in front of it, and a site that fetches and sends."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from urllib3.exceptions import HTTPError

from client import blobs as client_blobs
from client.blobs import Doorbell, LostError, Remote
from common import wire
from common.bell import Bell
from common.blobs import PIECE_BYTES
from common.compression import quantised
from common.deployment import FederationPlan, ServerHome, SiteHome
from common.errors import ExchangeError, StorageError
from common.exchange import Update
from common.identity import Signer
from common.supervise import free_port
from common.weights import Weights
from server.blobs import Round, Shelf, Store, clear
from server.gateway import Gateway, GatewayConfig, RegistryKeys
from server.provision import provision
from tests.deployment.relay import BadLine

SITES = ("north", "south")
PIECE = b"weights" * 1000
NAME = hashlib.sha256(PIECE).hexdigest()


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(shelf: Shelf, ticket: str, site: str, data: bytes) -> int | None:
    """As the gateway does it; the status of a refusal, None when it is written."""
    with shelf.writing(ticket, site, name_of(data), len(data)) as room:
        if isinstance(room, int):
            return room
        room.part.write_bytes(data)
        room.done()
    return None


# The folder


def test_a_site_reads_the_model_of_a_round_that_it_is_asked_in_and_nobody_reads_anothers_answer(tmp_path):
    shelf = Shelf(tmp_path)
    with Store(tmp_path, "run").round(("north",), 100) as round_:
        round_.put(NAME, memoryview(PIECE))
        found = shelf.readable(round_.ticket, "north", NAME)
        assert found is not None
        assert found.read_bytes() == PIECE
        assert shelf.readable(round_.ticket, "south", NAME) is None
        assert write(shelf, round_.ticket, "south", PIECE) == 404
        assert write(shelf, round_.ticket, "north", b"mine") is None
        assert shelf.held(round_.ticket, "north") == [name_of(b"mine")]
        assert shelf.held(round_.ticket, "south") is None
        assert shelf.readable(round_.ticket, "north", name_of(b"mine")) is None
    assert shelf.readable(round_.ticket, "north", NAME) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ticket", ["..", ".", "", "0" * 31, "0" * 33, "../" * 10 + "aa", "0" * 31 + "\n", "A" * 32])
def test_no_ticket_leads_out_of_the_folder(tmp_path, ticket):
    shelf = Shelf(tmp_path / "blobs")
    assert shelf.readable(ticket, "north", NAME) is None
    assert shelf.held(ticket, "north") is None
    assert write(shelf, ticket, "north", PIECE) == 404


@pytest.mark.parametrize("name", ["..", "round.json", NAME[:-1], NAME + "0", NAME.upper(), "../round.json"])
def test_a_piece_has_a_name_of_64_hexadecimal_digits(tmp_path, name):
    with Store(tmp_path, "run").round(SITES, 100) as round_:
        assert Shelf(tmp_path).readable(round_.ticket, "north", name) is None
        with Shelf(tmp_path).writing(round_.ticket, "north", name, 5) as room:
            assert room == 404


def test_a_site_writes_twice_the_model_and_a_mebibyte_and_not_a_byte_more(tmp_path):
    shelf = Shelf(tmp_path)
    with Store(tmp_path, "run").round(SITES, 1_000_000) as round_:  # 2,000,000 + 1,048,576 = 3,048,576
        assert write(shelf, round_.ticket, "north", b"a" * 3_000_000) is None
        assert write(shelf, round_.ticket, "north", b"b" * 48_577) == 413
        assert write(shelf, round_.ticket, "north", b"b" * 48_576) is None
        assert write(shelf, round_.ticket, "north", b"c") == 413
        assert write(shelf, round_.ticket, "north", b"b" * 48_576) == 200  # it is here already
        assert write(shelf, round_.ticket, "south", b"c") is None


def test_pieces_that_are_written_at_the_same_time_share_the_room(tmp_path):
    shelf = Shelf(tmp_path)
    with (
        Store(tmp_path, "run").round(SITES, 0) as round_,  # 1,048,576
        shelf.writing(round_.ticket, "north", name_of(b"1"), 1_000_000) as one,
        shelf.writing(round_.ticket, "north", name_of(b"2"), 1_000_000) as two,
    ):
        assert not isinstance(one, int)
        assert two == 503  # it may come again: the other one may be of a line that is dead


def test_many_tiny_pieces_are_too_many(tmp_path):
    shelf = Shelf(tmp_path)
    with Store(tmp_path, "run").round(SITES, 10_000_000) as round_:  # 21,048,576 bytes: 5 whole pieces, and 16
        wanted = [None] * 21 + [413] * 2
        assert [write(shelf, round_.ticket, "north", bytes([number])) for number in range(23)] == wanted


def test_a_piece_is_no_longer_than_agreed(tmp_path):
    with Store(tmp_path, "run").round(SITES, 4 * PIECE_BYTES) as round_:
        with Shelf(tmp_path).writing(round_.ticket, "north", NAME, PIECE_BYTES + 1) as room:
            assert room == 413
        with Shelf(tmp_path).writing(round_.ticket, "north", NAME, 0) as room:
            assert room == 413


def test_half_a_piece_has_no_name(tmp_path):
    shelf = Shelf(tmp_path)
    with Store(tmp_path, "run").round(SITES, 100) as round_:
        with shelf.writing(round_.ticket, "north", NAME, len(PIECE)) as room:
            assert not isinstance(room, int)
            room.part.write_bytes(PIECE[:10])  # and there the line is cut
        assert shelf.held(round_.ticket, "north") == []
        assert list((tmp_path / round_.ticket / "from" / "north").iterdir()) == []


def test_a_run_that_comes_back_removes_what_it_left_and_nothing_of_others(tmp_path):
    killed = [Store(tmp_path, run).round(SITES, 100) for run in ("mine", "theirs")]  # their blocks never end
    for each in killed:
        each.__enter__()
    assert len(list(tmp_path.iterdir())) == 2
    Store(tmp_path, "mine")
    (left,) = tmp_path.iterdir()
    assert '"theirs"' in (left / "round.json").read_text()
    for half in (f"mine.{'0' * 32}", f"mine.theirs.{'0' * 32}"):  # killed while one was made, or removed
        (tmp_path / half / "model").mkdir(parents=True)
    Store(tmp_path, "mine")
    assert {path.name for path in tmp_path.iterdir()} == {left.name, f"mine.theirs.{'0' * 32}"}
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_was_not_sent_or_has_another_length_is_said_to_be_missing(tmp_path):
    with Store(tmp_path, "run").round(SITES, 100) as round_:
        write(Shelf(tmp_path), round_.ticket, "north", PIECE)
        got = memoryview(bytearray(len(PIECE)))
        round_.answers("north").get(NAME, got)
        assert bytes(got) == PIECE
        for site, size in (("south", len(PIECE)), ("north", len(PIECE) - 1), ("north", len(PIECE) + 1)):
            with pytest.raises(ExchangeError, match=f"site {site} announced weights that it has not sent"):
                round_.answers(site).get(NAME, memoryview(bytearray(size)))


def test_a_round_that_ends_while_its_pieces_are_counted_is_no_error(tmp_path, monkeypatch):
    shelf, listed = Shelf(tmp_path), os.scandir
    with Store(tmp_path, "run").round(("north",), 100) as round_:
        assert write(shelf, round_.ticket, "north", PIECE) is None

        def ends(path: Path) -> list[os.DirEntry[str]]:
            found = list(listed(path))
            monkeypatch.undo()
            shutil.rmtree(round_.folder)
            return found

        monkeypatch.setattr("server.blobs.os.scandir", ends)
        with shelf.writing(round_.ticket, "north", name_of(b"more"), 4) as room:
            assert not isinstance(room, int)
            with pytest.raises(FileNotFoundError):  # the gateway answers 503, and 404 when the site comes again
                room.part.open("xb")
        assert write(shelf, round_.ticket, "north", b"more") == 404


def test_what_is_being_written_when_a_round_ends_goes_with_it(tmp_path):
    shelf, round_ = Shelf(tmp_path), Store(tmp_path, "run").round(SITES, 100)
    with shelf.writing(round_.__enter__().ticket, "north", NAME, len(PIECE)) as room:
        assert not isinstance(room, int)
        with room.part.open("xb") as file:
            round_.__exit__(None, None, None)
            file.write(PIECE)
        with pytest.raises(FileNotFoundError):
            room.done()
    assert list(tmp_path.iterdir()) == []


# Over the gateway


@dataclass
class Deployed:
    """A coordinator's folder, a gateway before it, and the folders of two sites."""

    kits: Path
    port: int
    gateway: Gateway | None = None
    answered: int = 0
    """Requests of north that the gateway that was closed last had answered."""

    @property
    def server(self) -> ServerHome:
        return ServerHome(self.kits / "coordinator")

    def open(self, allowed: Callable[[], Mapping[str, str]] | None = None) -> Gateway:
        self.close()
        home = self.server
        self.gateway = Gateway(
            GatewayConfig(
                listen_host="127.0.0.1", listen_port=self.port, certificate=home.gateway_certificate,
                key=home.gateway_key, upstream_port=1, upstream_ca=home.ca, registry=home.registry_file,
                authority=home.authority, blobs=home.blobs, sent_bell=home.sent_bell,
            ),
            allowed,
        ).start()  # fmt: skip
        return self.gateway

    def close(self) -> None:
        if self.gateway is not None:
            self.gateway.stop()
            self.answered = sum(self.gateway.stats.snapshot()["requests"].get("north", {}).values())
            self.gateway = None

    def remote(self, site: str = "north", stop: threading.Event | None = None) -> Remote:
        return Remote(SiteHome(self.kits / site), stop or threading.Event())


@pytest.fixture(scope="module")
def kits(tmp_path_factory) -> tuple[Path, int]:
    out, port = tmp_path_factory.mktemp("kits") / "out", free_port()
    provision(FederationPlan(name="trial", host="127.0.0.1", port=port, sites=SITES), out)
    return out, port


@pytest.fixture
def deployed(kits) -> Iterator[Deployed]:
    made = Deployed(*kits)
    made.server.run.mkdir(exist_ok=True)
    made.open()
    yield made
    made.close()
    clear(made.server.blobs)


@pytest.fixture
def round_(deployed) -> Iterator[Round]:
    with Store(deployed.server.blobs, "run").round(SITES, len(PIECE)) as made:
        made.put(NAME, memoryview(PIECE))
        yield made


def test_a_site_fetches_the_model_and_the_run_takes_its_answer(deployed, round_):
    at_site = deployed.remote().round(round_.ticket)
    got = memoryview(bytearray(len(PIECE)))
    at_site.get(NAME, got)
    assert bytes(got) == PIECE
    answer = bytes(range(256)) * 20
    at_site.put(name_of(answer), memoryview(answer))
    taken = memoryview(bytearray(len(answer)))
    round_.answers("north").get(name_of(answer), taken)
    assert bytes(taken) == answer


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_rounded_update_goes_through_the_gateway_in_its_small_form(deployed, form):
    model = Weights({"w": np.random.default_rng(0).standard_normal((600, 1000)).astype(np.float32)})
    sent = Update(
        site="north", recipe_id="a" * 64, round=1, base=model.digest, delta=quantised(model, form), weight=1.0, steps=1,
        compression=form,
    )  # fmt: skip
    with Store(deployed.server.blobs, "run").round(SITES, model.nbytes) as round_:
        signer = Signer.temporary()
        record = wire.encode(sent, signer, deployed.remote().round(round_.ticket))
        files = (round_.folder / "from" / "north").iterdir()
        assert sum(path.stat().st_size for path in files) == sent.nbytes < 0.51 * model.nbytes
        came = wire.from_bytes(wire.to_bytes(record))
        wire.check_signature(came, signer.public)
        got = wire.decode(came, Update, lambda ticket: round_.answers("north"))
    assert got == sent
    assert got.delta.digest == sent.delta.digest


def test_after_a_crash_a_site_sends_only_what_is_missing(deployed, round_, monkeypatch):
    parts = [bytes([number]) * 1000 for number in range(4)]
    first = deployed.remote().round(round_.ticket)
    for part in parts[:3]:
        first.put(name_of(part), memoryview(part))
    remote, asked = deployed.remote(), list[str]()  # another process: it remembers nothing
    once = remote.once
    monkeypatch.setattr(remote, "once", lambda method, *others: asked.append(method) or once(method, *others))
    again = remote.round(round_.ticket)
    for part in parts:
        again.put(name_of(part), memoryview(part))
    assert asked == ["GET", "PUT"]  # the list, and the fourth piece


def test_while_the_gateway_is_away_a_site_waits_and_goes_on(deployed, round_):
    deployed.close()
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            if len(waits) == 3:
                deployed.open()
            return False

    got = memoryview(bytearray(len(PIECE)))
    deployed.remote(stop=Stop()).round(round_.ticket).get(NAME, got)
    assert bytes(got) == PIECE
    assert waits == [0.1, 0.2, 0.4]


def test_a_piece_may_take_longer_than_a_call_may_stand_still(deployed, monkeypatch):
    monkeypatch.setattr(client_blobs, "_CALL_S", 1.5)
    monkeypatch.setattr(client_blobs, "_STALLED_S", 5.0)
    line, remote = BadLine(deployed.port, delay_s=0, bytes_per_s=1 << 20, loss=0), deployed.remote()
    remote._url = f"https://127.0.0.1:{line.port}"
    piece = bytes(PIECE_BYTES)  # 4 MiB at 1 MiB/s: 4 s
    with closing(line), Store(deployed.server.blobs, "run").round(SITES, PIECE_BYTES) as round_:
        remote.round(round_.ticket).put(name_of(piece), memoryview(piece))
        round_.answers("north").get(name_of(piece), memoryview(bytearray(PIECE_BYTES)))


@pytest.mark.parametrize("nbytes", [100, PIECE_BYTES])
def test_a_node_that_is_known_no_more_hears_so_also_while_it_sends(deployed, nbytes):
    allowed = dict(RegistryKeys(deployed.server.registry_file, deployed.server.authority)())
    deployed.open(lambda: allowed)
    with Store(deployed.server.blobs, "run").round(SITES, nbytes) as round_:
        at_site, piece = deployed.remote().round(round_.ticket), bytes(nbytes)
        at_site.put(name_of(b"a"), memoryview(b"a"))
        allowed.clear()
        with pytest.raises(LostError, match="does not know this node's key"):
            at_site.put(name_of(piece), memoryview(piece))


def test_a_proxy_is_told_name_and_password_in_any_letters():
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        told = list[bytes]()

        def listen() -> None:
            line, _ = proxy.accept()
            with line:
                told.append(line.recv(4096))

        listener = threading.Thread(target=listen)
        listener.start()
        url = f"http://m%C3%BCller:%E2%82%AC@127.0.0.1:{proxy.getsockname()[1]}"
        pool = client_blobs._pool(url, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        with pytest.raises(HTTPError):
            pool.urlopen("GET", "https://gateway.example:8443/")
        listener.join(20)
    assert told[0].startswith(b"CONNECT gateway.example:8443 ")
    login = re.search(rb"(?i)\r\nproxy-authorization: basic ([^\r]+)", told[0])
    assert login is not None
    assert base64.b64decode(login[1]).decode() == "müller:€"


def test_a_round_that_is_over_is_told_at_once(deployed, round_):
    with pytest.raises(LostError, match="asks this site for no weights any more"):
        deployed.remote().round("0" * 32).get(NAME, memoryview(bytearray(3)))


@pytest.mark.parametrize(("size", "word"), [(len(PIECE) - 1, "more"), (len(PIECE) + 1, "fewer")])
def test_more_or_fewer_bytes_than_announced_are_refused(deployed, round_, size, word):
    with pytest.raises(LostError, match=f"{word} bytes than the coordinator announced"):
        deployed.remote().round(round_.ticket).get(NAME, memoryview(bytearray(size)))


def test_a_node_that_stops_does_not_wait(deployed, round_):
    deployed.close()
    stop = threading.Event()
    stop.set()
    with pytest.raises(LostError, match="the node stops"):
        deployed.remote(stop=stop).round(round_.ticket).get(NAME, memoryview(bytearray(3)))


def test_what_does_not_move_for_a_quarter_of_an_hour_is_given_up(deployed, round_, monkeypatch):
    deployed.close()
    monkeypatch.setattr(client_blobs, "_STALLED_S", -1.0)
    with pytest.raises(LostError, match="did not take or give weights"):
        deployed.remote().round(round_.ticket).get(NAME, memoryview(bytearray(3)))


def test_a_ticket_is_32_hexadecimal_digits():
    for word in ("", "x" * 32, "../../../etc", "0" * 31, "0" * 33):
        with pytest.raises(LostError, match="32 hexadecimal digits"):
            client_blobs.RemoteRound(None, word)  # type: ignore[arg-type]  # it is not asked


def test_a_node_key_of_junk_is_told_in_words(kits, tmp_path):
    shutil.copytree(kits[0] / "north", tmp_path / "north")
    home = SiteHome(tmp_path / "north")
    home.node_key.write_bytes(b"junk")
    with pytest.raises(StorageError, match=r"node key node\.key is not in OpenSSH format"):
        Remote(home, threading.Event())


def test_a_bell_that_rang_before_is_heard_at_once_and_one_that_rings_later_too(deployed):
    bell = Bell(deployed.server.sent_bell)
    bell.ring()
    door = Doorbell(deployed.remote())
    assert door.wait()  # of before
    heard = threading.Event()
    listener = threading.Thread(target=lambda: door.wait() and heard.set())
    listener.start()
    assert not heard.wait(0.1)
    bell.ring()
    listener.join(20)
    assert heard.is_set()


def test_where_no_gateway_rings_a_node_is_told_at_once_and_asks_no_more_for_a_while(deployed):
    deployed.close()
    door = Doorbell(deployed.remote())
    assert not door.wait()
    deployed.open()
    assert not door.wait()
    deployed.close()
    assert deployed.answered == 0


def test_a_bell_wakes_who_took_its_mark_before_and_nobody_twice(tmp_path):
    bell = Bell(tmp_path / "bell")
    mark = bell.mark
    assert not bell.there
    assert not bell.wait(mark, 0)
    bell.ring()
    assert bell.there
    assert bell.wait(mark, 20)
    assert not bell.wait(bell.mark, 0)
