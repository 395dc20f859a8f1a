"""What preflight finds: each fault is named with what to do, and a whole site has none."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from client.approvals import Approvals
from client.ledger import Ledger
from client.link import supernode_child
from client.machine import Line, parse_cards, unlike_lock
from client.node import start
from client.policy import ledger_policy
from client.preflight import preflight
from client.reach import ask_gateway, proxy_of, split_address
from common.accounting import Event
from common.errors import ConfigError
from common.supervise import free_port
from server.gateway import Gateway, GatewayConfig
from tests.client.conftest import House, recipe_of
from tests.pretend_gpu import pretending


def run(house: House, **given: Any) -> list[Line]:
    return list(preflight(house.home, **({"probe": False} | given)))


def of(lines: list[Line], what: str) -> list[Line]:
    return [line for line in lines if line.what == what]


def one(lines: list[Line], what: str, level: str) -> Line:
    (found,) = [line for line in of(lines, what) if line.level == level]
    return found


@contextmanager
def embedded(house: House, **given: Any) -> Iterator[Gateway]:
    """The embedded gateway under the kit's certificate, with nothing behind it; the site calls it."""
    keys, trust = house.kits / "coordinator" / "keys", house.kits / "coordinator" / "trust"
    wanted = {
        "listen_host": "127.0.0.1", "listen_port": 0, "certificate": keys / "gateway.crt", "key": keys / "gateway.key",
        "upstream_port": free_port(), "upstream_ca": trust / "ca.crt", "registry": trust / "registry.json",
        "authority": house.home.authority,
    }  # fmt: skip
    made = Gateway(GatewayConfig(**(wanted | given))).start()
    house.configure(gateway=f"127.0.0.1:{made.port}")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def gateway(house: House) -> Iterator[Gateway]:
    with embedded(house) as made:
        yield made


class Peer:
    """A server with the kit's certificate, or a proxy without one, that gives a fixed answer."""

    def __init__(
        self, house: House, answer: str, *, tls: bool = True, newest: bool = True, name: str = "gateway"
    ) -> None:
        keys = house.kits / "coordinator" / "keys"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if self._context is not None:
            self._context.load_cert_chain(keys / f"{name}.crt", keys / f"{name}.key")
            if not newest:
                self._context.maximum_version = ssl.TLSVersion.TLSv1_2
        self._answer, self.heard, self.forward_to = answer, list[bytes](), 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        if tls and name == "gateway":
            house.configure(gateway=f"127.0.0.1:{self.port}")

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(plain,), daemon=True).start()

    def _handle(self, plain: socket.socket) -> None:
        with suppress(OSError), closing(plain):
            line = self._context.wrap_socket(plain, server_side=True) if self._context else plain
            with closing(line):
                self.heard.append(line.recv(4096))
                line.sendall(self._answer.encode())
                if self.forward_to:
                    self._forward(line)

    def _forward(self, line: socket.socket) -> None:
        with closing(socket.create_connection(("127.0.0.1", self.forward_to))) as other:
            back = threading.Thread(target=_copy, args=(other, line), daemon=True)
            back.start()
            _copy(line, other)
            back.join()

    def stop(self) -> None:
        self._socket.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def peer(house: House) -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def start(answer: str = "HTTP/1.1 401 \r\n\r\n", **given: Any) -> Peer:
        made.append(Peer(house, answer, **given))
        return made[-1]

    yield start
    for each in made:
        each.stop()


def approve(house: House, **parts: Any) -> str:
    return Approvals(house.home).approve(house.sign(recipe_of(**parts)), by="Dr Roe", log=house.log).recipe_id


# All is well


def test_a_whole_site_at_a_running_gateway_has_no_failure(
    house: House, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")
    recipe_id = approve(house)
    lines = run(house)
    assert [line for line in lines if line.level == "FAIL"] == []
    assert {line.what for line in lines} == {
        "user", "configuration", "kit", "certificates", "keys", "packages", "GPU", "disk", "log", "approval", "budget",
        "images", "DNS", "gateway", "clock", "key", "coordinator",
    }  # fmt: skip
    said = [line.says for line in of(lines, "gateway")]
    assert said == [
        f"TLSv1.3 with 127.0.0.1:{gateway.port}, signed by the federation's authority",
        "refuses a stranger (401)",
    ]
    assert recipe_id[:12] in one(lines, "approval", "ok").says
    assert "34 to train on" in one(lines, "images", "ok").says
    assert all(line.fix for line in lines if line.level != "ok")


# The site's own files


def test_a_changed_file_of_the_kit_and_an_open_key_are_named(house: House) -> None:
    (house.home.ca).write_bytes(house.home.ca.read_bytes() + b"\n")
    house.home.node_key.chmod(0o644)
    lines = run(house, images=False)
    failed = {(line.what, line.says) for line in lines if line.level == "FAIL"}
    assert ("kit", "trust/ca.crt was changed") in failed
    assert ("keys", "keys/node.key has mode 644") in failed
    assert ("kit", "keys/node.key has mode 644, expected 600") in failed


def test_a_configuration_that_does_not_hold_fails_and_the_other_checks_go_on(house: House) -> None:
    house.configure(threads="many")
    lines = run(house, images=False)
    assert "threads" in one(lines, "configuration", "FAIL").says
    assert one(lines, "kit", "ok")
    assert one(lines, "keys", "ok")


def test_a_registry_of_the_future_tells_of_a_wrong_clock(house: House) -> None:
    from dataclasses import replace

    from common.identity import Signer

    registry, authority = house.home.registry, Signer.load(house.kits / "authority" / "authority.key")
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat(timespec="seconds")
    replace(registry, version=2, issued=later).write(house.home.registry_file, authority)
    line = one(run(house, images=False), "clock", "FAIL")
    assert "clock is before" in line.says
    assert "else the authority's was ahead" in line.fix


def test_a_missing_cohort_key_is_told_to_be_restored_and_not_made(house: House) -> None:
    house.home.cohort_key.unlink()
    line = next(line for line in of(run(house, images=False), "keys") if "cohort.key" in line.says)
    assert line.level == "FAIL"
    assert "restore it from a backup" in line.fix


def test_approvals_that_do_not_hold_and_policies_that_object_fail(house: House) -> None:
    assert one(run(house, images=False), "approval", "warn").says.startswith("no recipe is approved")
    good, bad = approve(house), approve(house, seed=1)
    path = house.home.approved / f"{bad}.json"
    path.write_text(path.read_text().replace("Dr Roe", "Dr Doe"))
    house.policy(max_rounds=2)
    lines = run(house, images=False)
    assert bad[:12] in one(lines, "approval", "FAIL").says
    assert f"fedicom site withdraw {bad[:12]}" in one(lines, "approval", "FAIL").fix
    assert good[:12] in one(lines, "approval", "ok").says
    assert "(max_rounds)" in one(lines, "policy", "FAIL").says


@pytest.mark.parametrize("broken", ["site.yaml", "registry", "signing key"])
def test_a_sound_approval_is_not_to_be_withdrawn_for_what_is_wrong_around_it(house: House, broken: str) -> None:
    approve(house)
    match broken:
        case "site.yaml":
            house.configure(threads="many")
        case "registry":
            house.home.registry_file.unlink()
        case _:
            house.home.signing_key.chmod(0o644)
    line = one(run(house, images=False), "approval", "FAIL")
    assert line.fix == "mend this first, and run preflight again"
    assert "the approval of" not in line.says


def test_too_few_patients_for_the_policy_are_found_by_counting(house: House) -> None:
    approve(house)
    house.policy(min_patients=35)  # the images hold 34
    assert "(min_patients)" in one(run(house), "policy", "FAIL").says
    assert of(run(house, images=False), "policy") == []


def test_a_log_that_was_changed_fails(house: House) -> None:
    approve(house)
    path = house.home.audit_file
    path.write_text(path.read_text().replace("Dr Roe", "Dr Doe"))
    assert "changed" in one(run(house, images=False), "log", "FAIL").says


def test_a_spent_budget_and_an_old_ledger_fail(house: House) -> None:
    home = house.home
    ledger = Ledger(home.ledger_file, "north", ledger_policy(home.config.policy))
    assert one(run(house, images=False), "budget", "ok").says == "epsilon 8, nothing spent"
    event = Event(noise_multiplier=1.0, sampling_rate=0.3, steps=4)
    ledger.reserve("a" * 64, round=1, base="b" * 64, event=event)
    assert "spent" in one(run(house, images=False), "budget", "ok").says
    old = home.ledger_file.read_bytes()
    ledger.reserve("a" * 64, round=2, base="b" * 64, event=event)
    house.log.append("budget reserved", ledger_head=ledger.head)
    home.ledger_file.write_bytes(old)
    assert "older than" in one(run(house, images=False), "budget", "FAIL").says
    house.policy(epsilon=0.5)
    lines = of(run(house, images=False), "budget")
    assert [line.level for line in lines] == ["FAIL", "FAIL"]


def test_a_ledger_without_its_last_settlement_and_one_that_is_gone_fail_as_they_do_in_the_node(house: House) -> None:
    home = house.home
    ledger = Ledger(home.ledger_file, "north", ledger_policy(home.config.policy))
    event = Event(noise_multiplier=1.0, sampling_rate=0.3, steps=4)
    reserved = ledger.reserve("a" * 64, round=1, base="b" * 64, event=event)
    house.log.append("budget reserved", ledger_head=ledger.head)
    old = home.ledger_file.read_bytes()
    ledger.settle(reserved, 4)
    house.log.append("update sent", ledger_head=ledger.head)
    assert one(run(house, images=False), "budget", "ok")
    home.ledger_file.write_bytes(old)
    assert "older than" in one(run(house, images=False), "budget", "FAIL").says
    home.ledger_file.unlink()
    (line,) = of(run(house, images=False), "budget")
    assert (line.level, "is missing" in line.says) == ("FAIL", True)


# Images


def test_images_and_labels_are_looked_at_for_every_approved_recipe(house: House, tmp_path: Path) -> None:
    approve(house)
    house.configure(data=None)
    assert one(run(house), "images", "FAIL").fix == "set data in site.yaml"
    shutil.copytree(house.images, tmp_path / "data")
    house.configure(data=str(tmp_path / "data"))
    for number in range(30):
        (tmp_path / "data" / "dicom" / f"note-{number}.txt").write_text("no image")
    line = one(run(house), "images", "warn")
    assert "30 files not used" in line.says
    (tmp_path / "data" / "labels.csv").write_text("patient,label\n")
    assert "no rows" in one(run(house), "images", "FAIL").says
    (tmp_path / "data" / "labels.csv").unlink()
    assert "no labels.csv" in one(run(house), "images", "FAIL").says


# Machine


def test_the_versions_are_held_against_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# made by a tool\nnumpy=={version('numpy')}\nflwr==0.0.1\nruff==0.0.1\nno-such-tool==1\n")
    found = list(unlike_lock(lock))
    assert [text.split(",")[0].split()[0] for text in found] == ["flwr", "ruff"]
    lock.write_text("pydicom==1\n")
    assert list(unlike_lock(lock)) == [f"pydicom {version('pydicom')}, expected ==1"]


def test_without_a_lock_the_distributions_own_bounds_count(tmp_path: Path) -> None:
    assert list(unlike_lock(tmp_path / "none.lock")) == []


def test_the_drivers_words_become_cards() -> None:
    text = "0, NVIDIA H100 80GB HBM3, 570.86.15, 1024, 81559, 37\n1, Old, 390, 10, 2000, [N/A]\nno devices\n"
    first, second = parse_cards(text)
    assert (first.name, first.driver, first.used, first.utilisation) == (
        "NVIDIA H100 80GB HBM3", "570.86.15", 1 << 30, 0.37,
    )  # fmt: skip
    assert (second.number, second.total, second.utilisation) == (1, 2000 << 20, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_demanded_and_not_there_fails(house: House) -> None:
    house.configure(device="cuda")
    assert "none that torch can use" in one(run(house, images=False), "GPU", "FAIL").says
    house.configure(device="auto")
    assert "CPU core" in one(run(house, images=False), "GPU", "ok").says


def test_a_gpu_that_torch_sees_and_cannot_compute_on_fails(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.configure(device="auto")
    with pretending():
        assert "computes on GPU 0" in one(run(house, images=False), "GPU", "ok").says
        conv2d = torch.nn.functional.conv2d
        monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, weight: conv2d(x, weight * 2))
        assert "28224 in place of 14112" in one(run(house, images=False), "GPU", "FAIL").says

        def none(*_: object) -> torch.Tensor:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")

        monkeypatch.setattr(torch.nn.functional, "conv2d", none)
        line = one(run(house, images=False), "GPU", "FAIL")
        assert line.says.endswith(
            "cannot compute on it: CUDA error: no kernel image is available for execution on the device"
        )
        assert "device: cpu" in line.fix
        house.configure(devices=[0, 1])
        assert "names GPU 1, but torch sees 1" in one(run(house, images=False), "GPU", "FAIL").says
        house.configure(device="cpu")
        assert one(run(house, images=False), "GPU", "ok").says == "not used: device is cpu in site.yaml"


# Network


def test_a_gateway_that_is_away_and_a_name_without_address_say_what_to_do(house: House) -> None:
    house.configure(gateway=f"127.0.0.1:{free_port()}")
    line = one(run(house, images=False), "gateway", "FAIL")
    assert "cannot be reached" in line.says
    assert "firewall" in line.fix
    house.configure(gateway="no-such-host.invalid:8443")
    assert "has no address" in one(run(house, images=False), "DNS", "FAIL").says
    house.configure(gateway="gateway..example.org:8443")
    assert "has no address" in one(run(house, images=False), "DNS", "FAIL").says


def test_a_certificate_of_another_authority_fails_as_somebody_between(house: House, gateway: Gateway) -> None:
    from server.certificates import CertificateAuthority

    other = CertificateAuthority.new("elsewhere", ("127.0.0.1",))
    house.home.ca.write_bytes(other.certificate_pem)
    line = one(run(house, images=False), "gateway", "FAIL")
    assert "does not hold" in line.says
    assert "somebody may stand between" in line.fix


@pytest.mark.parametrize(
    ("names", "life_s", "says", "fix"),
    [
        (("127.0.0.1",), 1, "expired", "provision rotate gateway"),
        (("localhost",), 86_400, "IP address mismatch", "the name that it is reached by"),
    ],
)
def test_a_certificate_that_ran_out_or_is_of_another_name_accuses_nobody(
    house: House, tmp_path: Path, names: tuple[str, ...], life_s: int, says: str, fix: str
) -> None:
    from server.certificates import CertificateAuthority

    authority = house.kits / "authority"
    ca = CertificateAuthority.load((authority / "ca.key").read_bytes(), (authority / "ca.crt").read_bytes())
    made = ca.server("gateway", "trial", names, life_s / 86_400)
    for path, data in zip(("gateway.crt", "gateway.key"), made, strict=True):
        (tmp_path / path).write_bytes(data)
    time.sleep(1.2 if life_s == 1 else 0)
    with embedded(house, certificate=tmp_path / "gateway.crt", key=tmp_path / "gateway.key"):
        line = one(run(house, images=False), "gateway", "FAIL")
    assert says in line.says
    assert fix in line.fix
    assert "somebody" not in line.fix


def test_when_the_authority_itself_ran_out_its_kit_is_asked_for(
    house: House, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.certificates import CertificateAuthority

    monkeypatch.setattr("server.certificates._AUTHORITY_DAYS", -1 / 48)  # half an hour ago
    key, certificate = ((house.kits / "authority" / name).read_bytes() for name in ("ca.key", "ca.crt"))
    house.home.ca.write_bytes(CertificateAuthority.load(key, certificate).renewed().certificate_pem)
    lines = run(house, images=False)
    for what in ("certificates", "gateway"):
        assert "`fedicom provision rotate authority`" in one(lines, what, "FAIL").fix


def test_an_older_tls_fails(house: House, peer: Callable[..., Peer]) -> None:
    peer(newest=False)
    assert "no TLS 1.3" in one(run(house, images=False), "gateway", "FAIL").says


@pytest.mark.parametrize(
    ("status", "what", "level"),
    [
        (200, "gateway", "FAIL"), (404, "gateway", "FAIL"), (401, "gateway", "ok"), (403, "gateway", "ok"),
        (429, "gateway", "ok"), (503, "coordinator", "warn"),
    ],
)  # fmt: skip
def test_a_stranger_must_be_refused(
    house: House, peer: Callable[..., Peer], status: int, what: str, level: str
) -> None:
    made = peer(f"HTTP/1.1 {status} \r\n\r\n")
    lines = of(run(house, images=False), what)
    assert lines[-1].level == level
    assert f"({status})" in lines[-1].says or level == "FAIL"
    assert b"flwr-" not in made.heard[0]  # no key, no signature


@pytest.mark.parametrize(
    ("off", "level"),
    [(0, "ok"), (60, "warn"), (-60, "warn"), (400, "FAIL"), (-400, "FAIL"), (None, "warn")],
)
def test_the_clock_is_held_against_the_gateways(
    house: House, peer: Callable[..., Peer], off: int | None, level: str
) -> None:
    theirs = datetime.now(UTC) + timedelta(seconds=off or 0)
    date = "" if off is None else f"Date: {format_datetime(theirs, usegmt=True)}\r\n"
    peer(f"HTTP/1.1 401 \r\n{date}\r\n")
    (line,) = of(run(house, images=False), "clock")
    assert line.level == level
    if off is not None and level != "ok":
        assert ("behind" if off > 0 else "ahead of") in line.says


def test_the_gateway_is_reached_through_the_proxy_that_is_configured(house: House, peer: Callable[..., Peer]) -> None:
    gateway = peer("HTTP/1.1 401 \r\n\r\n")
    proxy = peer("HTTP/1.1 200 Connection established\r\n\r\n", tls=False)
    proxy.forward_to = gateway.port
    house.configure(proxy=f"http://user:p%40ss@127.0.0.1:{proxy.port}")
    lines = run(house, images=False)
    assert f"127.0.0.1:{proxy.port} is used" in one(lines, "proxy", "ok").says
    assert f"through the proxy 127.0.0.1:{proxy.port}" in of(lines, "gateway")[0].says
    assert proxy.heard[0].startswith(f"CONNECT 127.0.0.1:{gateway.port} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in proxy.heard[0]  # user:p@ss
    assert all("p%40ss" not in line.says + line.fix for line in lines)


def test_a_proxy_that_refuses_is_told(house: House, peer: Callable[..., Peer]) -> None:
    peer()
    proxy = peer("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", tls=False)
    house.configure(proxy=f"http://127.0.0.1:{proxy.port}")
    assert "the proxy answered 407" in one(run(house, images=False), "gateway", "FAIL").says


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ({"https_proxy": "p:1", "HTTPS_PROXY": "q:1"}, "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "example.org"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "localhost, .example.org"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.org"}, "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "ample.org,gateway.example,,."}, "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "gateway.example.org:443"}, "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "gateway.example.org:8443"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "Gateway.Example.ORG"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.org", "no_proxy": "example.org"}, None),
        ({"ALL_PROXY": "socks5://p:1", "HTTP_PROXY": "http://p:1"}, None),  # of HTTPS_PROXY alone the page speaks
    ],
)
def test_the_proxy_of_the_environment_counts_unless_the_host_is_excepted(
    house: House, environment: dict[str, str], expected: str | None
) -> None:
    house.configure(gateway="gateway.example.org:8443")
    assert proxy_of(house.home.config, environment) == expected


@pytest.mark.parametrize(
    ("gateway", "without", "spared"),
    [
        ("10.1.2.3:8443", "10.0.0.0/8", True),
        ("10.1.2.3:8443", "2.3", False),
        ("10.1.2.3:8443", "10.1.2.3", True),
        ("[2001:db8::1]:8443", "2001:db8::/32", True),
        ("[2001:db8::1]:8443", "[2001:db8::1]:8443", True),
        ("[2001:db8::1]:8443", "10.0.0.0/8", False),
        ("127.0.0.1:8443", "", True),  # a rehearsal
        ("localhost:8443", "", True),
    ],
)
def test_addresses_and_networks_are_excepted_and_this_machine_always(
    house: House, gateway: str, without: str, spared: bool
) -> None:
    house.configure(gateway=gateway)
    found = proxy_of(house.home.config, {"HTTPS_PROXY": "http://p:1", "NO_PROXY": without})
    assert found == (None if spared else "http://p:1")


@pytest.mark.parametrize(
    "proxy", ["socks5://p:1", "http://", "ftp://p:1", "http://p:8O80", "p:99999", "http://[::1", "http://me:pass@p:no"]
)
def test_a_proxy_that_is_none_of_http_is_refused_before_anything_is_started(
    house: House, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")
    house.configure(gateway="gateway.example.org:8443", proxy=proxy)
    told = one(run(house, images=False), "gateway", "FAIL").says
    assert "expected http://HOST:PORT" in told
    assert "pass" not in told
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        start(house.home, lambda line, style: None)
    house.configure(proxy="p:1")
    assert proxy_of(house.home.config, {}) == "http://p:1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTPS_PROXY": "http://p:1"},
        {"HTTPS_PROXY": "http://p:1", "no_proxy": "gateway.example.org:8443"},
        {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "ample.org"},
        {"https_proxy": "http://p:1", "ALL_PROXY": "socks5://p:1"},
        {"ALL_PROXY": "http://p:1"},
        {"ALL_PROXY": "socks5://p:1"},
        {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8,.example.org"},
    ],
)
def test_messages_take_the_way_of_the_weights_whatever_the_environment_says(
    house: House, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    house.configure(gateway="gateway.example.org:8443")
    weights = proxy_of(house.home.config, os.environ)
    for name, value in supernode_child(house.home, 1).environment.items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:  # as the SuperNode has one
        pool = client._transport_for_url(httpx.URL("https://gateway.example.org:8443/"))._pool  # type: ignore[attr-defined]
    assert getattr(pool, "_proxy_url", None) is None if weights is None else pool._proxy_url.host == b"p"
    assert proxy_of(house.home.config, os.environ) == weights  # and so its bell


def test_what_else_can_be_reached_is_a_warning(house: House) -> None:
    host, port = split_address(house.home.config.gateway)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        open_port = server.getsockname()[1]
        others = (("127.0.0.1", open_port), ("127.0.0.1", free_port()), (host, port))
        line = one(run(house, images=False, probe=True, others=others), "elsewhere", "warn")
        assert f"also reaches 127.0.0.1:{open_port}" in line.says
        assert f"127.0.0.1:{port} alone" in line.fix
    line = one(run(house, images=False, probe=True, others=others), "elsewhere", "ok")
    assert "none of 2 other addresses" in line.says


def test_addresses_may_be_names_numbers_and_brackets() -> None:
    assert split_address("host.org:1") == ("host.org", 1)
    assert split_address("[2001:db8::1]:8443") == ("2001:db8::1", 8443)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("wrong", ["", "revoked", "another node key", "a clock a day ahead"])
def test_a_node_whose_key_the_coordinator_does_not_take_fails(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool, wrong: str
) -> None:
    from dataclasses import replace

    from client import blobs
    from common.identity import NodeKey, Signer

    registry, trust = tmp_path / "registry.json", house.kits / "coordinator" / "trust"
    shutil.copy(trust / "registry.json", registry)
    if wrong == "revoked":
        old, authority = house.home.registry, Signer.load(house.kits / "authority" / "authority.key")
        gone = replace(old.sites["north"], revoked=old.issued, why="left")
        replace(old, version=2, sites={**old.sites, "north": gone}).write(registry, authority)
    elif wrong == "another node key":
        house.home.node_key.write_bytes(NodeKey.new().private)
    elif wrong:

        class Ahead(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + timedelta(days=1)

        monkeypatch.setattr(blobs, "datetime", Ahead)
    with embedded(house, registry=registry, blobs=tmp_path / "blobs" if weights else None):
        (line,) = of(run(house, images=False), "key")
    if not wrong:
        assert (line.level, line.says) == ("ok", "the coordinator knows this node's key")
        return
    assert line.level == "FAIL"
    assert "refuses this node's key (401, expected 404)" in line.says
    assert "newest kit" in line.fix


@pytest.mark.parametrize(
    ("status", "level", "says"),
    [
        (404, "warn", "answers a stranger as it does members"),  # an nginx without a gateway behind it
        (502, "warn", "answered 502, expected 404"),
        (429, "FAIL", "refuses this node's key (429"),
    ],
)
def test_a_gateway_that_cannot_tell_whether_it_knows_the_key_is_no_pass(
    house: House, peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch, status: int, level: str, says: str
) -> None:
    from client import access

    monkeypatch.setattr(access, "gateway", lambda home: iter(()))
    peer(f"HTTP/1.1 {status} \r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    (line,) = of(run(house, images=False), "key")
    assert line.level == level
    assert says in line.says


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "not the SuperLink behind it (502)"),  # nobody listens there
        ("", "not the SuperLink behind it (502)"),  # it breaks off
        ("HTTP/1.1 401 \r\nContent-Length: 0\r\n\r\n", None),  # as Flower's own does, for no node is named
    ],
)
def test_a_superlink_that_is_away_behind_a_gateway_that_answers_is_told(
    house: House, peer: Callable[..., Peer], answer: str | None, says: str | None
) -> None:
    superlink = peer(answer, name="superlink") if answer is not None else None
    with embedded(house, upstream_port=superlink.port if superlink else free_port()):
        lines = run(house, images=False)
    assert one(lines, "key", "ok")
    if says:
        line = one(lines, "coordinator", "warn")
        assert says in line.says
        assert "`fedicom server status`" in line.fix
    else:
        assert of(lines, "coordinator") == []
    if superlink:
        assert superlink.heard[0].startswith(b"POST /v1/fleet/get-run ")


def test_an_answer_that_is_no_http_is_an_error(house: House, peer: Callable[..., Peer]) -> None:
    made = peer("SSH-2.0-OpenSSH\r\n\r\n")
    with pytest.raises(OSError, match="no HTTP"):
        ask_gateway("127.0.0.1", made.port, house.home.ca, None)
