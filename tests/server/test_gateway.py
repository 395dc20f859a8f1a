"""The one open port: the same questions to the embedded gateway and to nginx with the rendered configuration."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import gc
import hashlib
import ipaddress
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest, PullTaskInputRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.bell import Bell
from common.errors import ConfigError, FedicomError
from common.identity import Signer
from common.registry import Member, Registry
from server import gateway_beside, gateway_rules
from server.blobs import Round, Store, Writing
from server.gateway import Gateway, GatewayConfig, GatewayLimits, RegistryKeys, flower_header
from server.gateway_nginx import nginx_config, write_nginx

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
PULL, PUSH, OTHER = "/v1/fleet/pull-object", "/v1/fleet/push-object", "/v1/fleet/get-run"
QUESTIONS = "/v1/fleet/pull-messages"
MIB = 1 << 20
BIG = random.Random(0).randbytes(12 * MIB)
NOW = dt.datetime.now(dt.UTC)

KINDS = [
    "embedded",
    pytest.param("nginx", marks=pytest.mark.skipif(NGINX is None, reason="no nginx binary is installed here")),
]


# --- keys and certificates -----------------------------------------------------------------------------------------


@dataclass
class Authority:
    """A federation's authority that signs certificates into a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of the test")])
        self.ca = self.folder / "ca.crt"
        self.ca.write_bytes(self._sign(self.name, self.key.public_key(), ca=True).public_bytes(Encoding.PEM))

    def certificate(self, name: str, host: str = "localhost") -> tuple[Path, Path]:
        """Certificate and key of a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        for path, data in (
            (certificate, self._sign(subject, key.public_key(), ca=False, host=host).public_bytes(Encoding.PEM)),
            (private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
        ):
            part = path.with_suffix(".part")
            part.write_bytes(data)
            part.replace(path)
        return certificate, private

    def _sign(self, subject: x509.Name, key: Any, *, ca: bool, host: str = "localhost") -> x509.Certificate:
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - dt.timedelta(minutes=5))
            .not_valid_after(NOW + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if ca:
            usage = [position in (5, 6) for position in range(9)]  # certificates and revocation lists
            builder = builder.add_extension(x509.KeyUsage(*usage), critical=True)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@dataclass
class NodeKey:
    """A hospital's node key."""

    private: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def openssh(self) -> str:
        return self.private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    @property
    def header(self) -> str:
        return flower_header(self.openssh)

    def headers(self, signer: NodeKey | None = None, at: dt.datetime | None = None) -> dict[str, str]:
        """What a node sends with a call."""
        timestamp = (at or dt.datetime.now(dt.UTC)).isoformat()
        signature = (signer or self).private.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": self.header,
            "flwr-timestamp": timestamp,
            "flwr-signature": base64.b64encode(signature).decode(),
            "content-type": "application/x-protobuf",
        }

    def beside(self, method: str, path: str, signer: NodeKey | None = None, word: str = "request") -> dict[str, str]:
        """What a node sends with a request for weights."""
        timestamp = dt.datetime.now(dt.UTC).isoformat()
        text = f"fedicom {word}\n{method}\n{path}\n{timestamp}"
        signature = (signer or self).private.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": self.header,
            "flwr-timestamp": timestamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }


@dataclass
class Sites:
    """A registry file, with north and south in it."""

    path: Path
    authority: Signer = field(default_factory=Signer.temporary)
    keys: dict[str, NodeKey] = field(default_factory=lambda: {"north": NodeKey(), "south": NodeKey()})
    version: int = 0

    def write(self, *revoked: str) -> None:
        self.version += 1
        time_ = NOW.isoformat(timespec="seconds")
        members = {
            name: Member(
                signing=hashlib.sha256(name.encode()).hexdigest(),
                node=key.openssh,
                since=time_,
                revoked=time_ if name in revoked else None,
            )
            for name, key in self.keys.items()
        }
        Registry(
            federation="test", version=self.version, issued=time_, authority=self.authority.public,
            coordinator="b" * 64, sites=members,
        ).write(self.path, self.authority)  # fmt: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("pki"))
    made.certificate("gateway")
    made.certificate("superlink")
    return made


# --- what stands behind the gateway --------------------------------------------------------------------------------


@dataclass
class Seen:
    """A request that came through."""

    line: str
    headers: dict[str, str]
    bytes_: int
    digest: str


class Upstream(ThreadingHTTPServer):
    """A small TLS server in the SuperLink's place: 12 MB at pull-object, else the digest of what was sent."""

    daemon_threads = True

    def __init__(self, authority: Authority, certificate: str = "superlink") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.folder / f"{certificate}.crt", authority.folder / f"{certificate}.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.seen: list[Seen] = []
        self.begun = 0
        self.sent = 0
        self.chunked = False
        self.repeat = 1
        self.hold = threading.Event()
        self.hold.set()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a cut request is what some tests are about

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self.shutdown()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if len(data) != int(self.headers.get("Content-Length", 0)):
                raise ConnectionError("half a body")
            return data
        parts = []
        while True:
            if not (line := self.rfile.readline()):
                raise ConnectionError("half a body")
            size = int(line, 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if size == 0:
                return b"".join(parts)

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self.server.begun += 1
        data = self.body()
        digest = hashlib.sha256(data).hexdigest()
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.requestline, headers, len(data), digest))
        self.server.hold.wait(30)
        answer = BIG if self.path == PULL else digest.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("X-Internal", "not for nodes")
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(answer) * self.server.repeat))
        self.end_headers()
        for _ in range(self.server.repeat):
            for start in range(0, len(answer), 1 << 16):
                part = answer[start : start + (1 << 16)]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if self.server.chunked else part)
                self.server.sent += len(part)
        if self.server.chunked:
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def upstream(authority) -> Iterator[Upstream]:
    with Upstream(authority) as server:
        yield server


# --- the gateways --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Waits for something that must come; the tests' only clock, and it passes no judgement."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@dataclass
class Door:
    """A running gateway of one kind or the other."""

    kind: str
    config: GatewayConfig
    sites: Sites
    folder: Path
    gateway: Gateway | None = None
    process: subprocess.Popen[bytes] | None = None
    behind: Gateway | None = None
    """nginx only: the embedded gateway that serves weights and the bell."""

    @property
    def port(self) -> int:
        return self.gateway.port if self.gateway else self.config.listen_port

    def start(self) -> Door:
        if self.kind == "embedded":
            self.gateway = Gateway(self.config).start()
            return self
        if self.config.blobs is not None:
            self.behind = Gateway(replace(self.config, listen_port=0)).start()
            self.config = replace(self.config, blobs_port=self.behind.port)
        conf = write_nginx(self.config, self.folder / "nginx")
        command = [str(NGINX), "-p", str(conf.parent), "-c", str(conf), "-g", "user root;" if os.geteuid() == 0 else ""]
        with (self.folder / "nginx.err").open("wb") as err:
            self.process = subprocess.Popen(command, stderr=err)
        until(lambda: self._listens() or self.process.poll() is not None)
        assert self.process.poll() is None, (self.folder / "nginx.err").read_text()
        return self

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def _workers(self) -> set[str]:
        pid = self.process.pid
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def revoke(self, site: str) -> None:
        self.sites.write(site)
        if self.process:
            before = self._workers()
            write_nginx(self.config, self.folder / "nginx")
            self.process.send_signal(signal.SIGHUP)
            until(lambda: (now := self._workers()) and not now & before)

    def stop(self) -> None:
        if self.gateway:
            self.gateway.stop()
        if self.process:
            self.process.terminate()
            self.process.wait(10)
        if self.behind:
            self.behind.stop()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.config.access_log.read_text().splitlines()]

    def connect(self, source: str = "127.0.0.1", version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.config.upstream_ca))
        if version is not None:
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = version
        sock = socket.create_connection(("127.0.0.1", self.port), 20, source_address=(source, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(sock, server_hostname="localhost")

    def client(self, site: str | NodeKey | None = "north", **more: Any) -> httpx.Client:
        key = self.sites.keys[site] if isinstance(site, str) else site
        context = ssl.create_default_context(cafile=str(self.config.upstream_ca))
        return httpx.Client(
            base_url=f"https://localhost:{self.port}", verify=context, trust_env=False, timeout=30,
            headers=key.headers() if key else {}, **more,
        )  # fmt: skip

    def call(self, path: str = OTHER, body: bytes = b"ping", site: str | NodeKey | None = "north") -> httpx.Response:
        """One request on a connection of its own."""
        with self.client(site) as client:
            return client.post(path, content=body)

    def raw(self, data: bytes, source: str = "127.0.0.1") -> bytes:
        """Sends bytes and returns all that comes until the gateway closes."""
        with self.connect(source) as sock:
            try:
                sock.sendall(data)
                return rest(sock)
            except (ConnectionError, ssl.SSLError):
                return b""


def rest(sock: ssl.SSLSocket) -> bytes:
    parts = []
    try:
        while data := sock.recv(1 << 16):
            parts.append(data)
    except (ConnectionError, ssl.SSLError):
        pass  # broken off: what came before it counts
    return b"".join(parts)


def first(sock: ssl.SSLSocket) -> bytes:
    """All that the gateway says before it waits for us to go."""
    answer = b""
    while b"\r\n\r\n" not in answer and (data := sock.recv(1 << 16)):
        answer += data
    return answer


def status(answer: bytes) -> int | None:
    """Of a raw answer; None when there was none."""
    return int(answer.split(b" ", 2)[1]) if answer else None


def head(path: str = OTHER, headers: dict[str, str] | None = None, line: str | None = None) -> bytes:
    lines = [line or f"POST {path} HTTP/1.1", "host: localhost", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    return "\r\n".join([*lines, "", ""]).encode()


LOOSE = GatewayLimits(refusals_per_s_per_address=1000.0, refusal_burst_per_address=1000, stop_s=2.0)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def open_door(tmp_path, authority, request) -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []
    log = logging.getLogger("fedicom.gateway")
    before = log.level

    def make(kind: str, upstream_port: int, limits: GatewayLimits = LOOSE, **more: Any) -> Door:
        folder = tmp_path / f"door{len(doors)}"
        folder.mkdir()
        sites = Sites(folder / "registry.json")
        sites.write()
        config = GatewayConfig(
            listen_host="127.0.0.1", listen_port=0 if kind == "embedded" else free_port(),
            certificate=authority.folder / "gateway.crt", key=authority.folder / "gateway.key",
            upstream_port=upstream_port, upstream_ca=authority.ca, registry=sites.path,
            authority=sites.authority.public, limits=limits, access_log=folder / "access.log",
        )  # fmt: skip
        doors.append(Door(kind, replace(config, **more), sites, folder))
        if kind == "embedded":
            handler = logging.FileHandler(folder / "access.log")
            log.addHandler(handler)
            log.setLevel(logging.INFO)
            request.addfinalizer(lambda: (log.removeHandler(handler), handler.close()))
        return doors[-1].start()

    yield make
    for door in doors:
        door.stop()
    log.setLevel(before)


@pytest.fixture
def door(kind, open_door, upstream) -> Door:
    return open_door(kind, upstream.port)


# --- what passes ---------------------------------------------------------------------------------------------------


def test_the_routes_that_pass_are_those_of_the_installed_flower():
    flowers = {(method, route.path) for route in fleet_router.routes for method in route.methods}
    assert flowers == gateway_rules.FLEET_ROUTES


def test_the_header_of_an_openssh_key_is_what_flowers_node_sends():
    node = NodeKey()
    sent = base64.b64encode(public_key_to_bytes(node.private.public_key())).decode()
    assert flower_header(node.openssh) == sent
    assert flower_header(node.openssh + " a comment") == sent
    names = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    assert names == (gateway_rules.KEY.decode(), gateway_rules.SIGNATURE.decode())


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp256 AAAA", "-----BEGIN PUBLIC KEY-----"])
def test_what_is_no_node_key_has_no_header(line):
    with pytest.raises(ConfigError, match="is no node key"):
        flower_header(line)


def test_every_fleet_call_passes_and_carries_only_the_listed_headers(door, upstream):
    more = {"flwr-task-token": "t", "cookie": "c", "x-forwarded-for": "10.0.0.1", "flwr-component-name": "SuperNode"}
    with door.client() as client:
        for method, path in sorted(gateway_rules.FLEET_ROUTES):
            answer = client.request(method, path, content=b"ping", headers=more)
            assert answer.status_code == 200, path
            assert answer.content == (BIG if path == PULL else hashlib.sha256(b"ping").hexdigest().encode())
            assert answer.headers["content-type"] == "application/x-protobuf"
    assert [seen.line.split()[1] for seen in upstream.seen] == sorted(path for _, path in gateway_rules.FLEET_ROUTES)
    for seen in upstream.seen:
        assert seen.headers["flwr-public-key"] == door.sites.keys["north"].header
        assert seen.headers["flwr-component-name"] == "SuperNode"
        allowed = {name.decode() for name in gateway_rules.REQUEST_HEADERS} | {"host", "connection", "content-length"}
        assert set(seen.headers) <= allowed


def test_flowers_own_client_sends_no_header_that_is_lost(door, upstream):
    node = door.sites.keys["north"]
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(node.private, node.private.public_key()),
    ]
    sent: list[set[str]] = []

    class Recorder:
        def intercept(self, context: Any, call_next: Any) -> Any:
            sent.append({name.lower() for name in context.request.headers})
            return call_next(context)

    client = FleetHttpClient.from_server_address(
        f"localhost:{door.port}", False, door.config.upstream_ca.read_bytes(), [*interceptors, Recorder()]
    )
    with client, pytest.raises(ValueError, match="Invalid protobuf"):  # our upstream's answer is a digest
        client.PullMessages(PullMessagesRequest())
    transport = {"host", "connection", "content-length", "accept-encoding", "user-agent"}
    assert sent[0] - transport == set(upstream.seen[0].headers) - transport


@pytest.mark.parametrize("chunked", [False, True])
def test_twelve_megabytes_are_the_same_bytes_on_both_ways(door, upstream, chunked):
    upstream.chunked = chunked
    with door.client() as client:
        parts = (BIG[start : start + 100_000] for start in range(0, len(BIG), 100_000))
        assert client.post(PUSH, content=parts if chunked else BIG).status_code == 200
        assert client.post(PULL, content=b"").content == BIG
    assert upstream.seen[0].bytes_ == 12 * MIB
    assert upstream.seen[0].digest == hashlib.sha256(BIG).hexdigest()


def test_an_answer_that_nobody_reads_is_not_collected_in_the_gateway(door, upstream):
    upstream.repeat = 10  # 120 MB
    with door.connect() as sock:
        sock.sendall(head(PULL, door.sites.keys["north"].headers() | {"content-length": "0"}))
        sent = -1
        while sent != upstream.sent or not sent:  # until it stands still
            sent = upstream.sent
            time.sleep(0.5)
    assert sent < 40 * MIB


# --- who and what does not pass ------------------------------------------------------------------------------------


def test_tls_1_2_is_refused(door):
    with door.connect() as sock:
        assert sock.version() == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        door.connect(version=ssl.TLSVersion.TLSv1_2)


def test_plain_http_gets_nothing_of_the_superlink(door, upstream):
    with socket.create_connection(("127.0.0.1", door.port), 20) as sock:
        sock.sendall(head(headers=door.sites.keys["north"].headers() | {"content-length": "0"}))
        try:
            answer = sock.recv(1 << 16)
        except ConnectionError:
            answer = b""
    assert status(answer) in (None, 400)
    assert upstream.seen == []


TRICKS = [
    f"{method} {OTHER} HTTP/1.1"
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "post", "POSTX")
] + [
    f"POST {target} HTTP/1.1"
    for target in (
        *("/", "/v1/fleet", "/v1/fleet/", "/v1/fleet/unknown", "/v1/control/list-nodes", "/v1/runtime/acquire-task"),
        *("/docs", "/health", "/openapi.json", "/v1/fleet/../control/list-nodes", "/v1/control/../fleet/get-run"),
        *("//v1/fleet/get-run", "/v1//fleet/get-run", "/v1/fleet//get-run", "/v1/fleet/get-run/"),
        "/v1/./fleet/get-run",
        *("/v1/fleet/%2e%2e/control/list-nodes", "/v1/fleet/..%2fcontrol/list-nodes", "/v1/fleet/get%2drun"),
        *("/v1/fleet/get-run?a=b", "/v1/fleet/get-run#a", "/v1/fleet/get-run;a=b", "/v1/fleet/..;/control/list-nodes"),
        *("/V1/fleet/get-run", "/v1/fleet/GET-RUN", "/v1/fleet/get-run%00", "/v1/fleet/get-run%0d%0a", "*"),
        *("/-/404", "/-/401", "\\v1\\fleet\\get-run", "/v1/fleet/get-run HTTP/1.1 x", "v1/fleet/get-run"),
        *("https://localhost/v1/fleet/get-run", "http://localhost/v1/control/list-nodes", "localhost:443"),
    )
]  # fmt: skip


def test_only_the_exact_request_lines_of_fleet_calls_pass_even_with_a_nodes_credentials(door, upstream):
    credentials = door.sites.keys["north"].headers() | {"content-length": "0"}
    for line in TRICKS:
        answer = door.raw(head(line=line, headers=credentials))
        assert status(answer) in (400, 404, 405, None), line
        assert answer == b"" or answer.endswith(b"\r\n\r\n"), f"{line}: {answer!r}"
    assert upstream.seen == []
    assert door.call().status_code == 200


SMUGGLING = [
    {"content-length": "4", "transfer-encoding": "chunked"},
    {"transfer-encoding": "chunked", "content-length": "4"},
    {"transfer-encoding": "xchunked"},
    {"transfer-encoding": "chunked, identity"},
    {"content-length": "4\r\ncontent-length: 5"},
    {"content-length": "+4"},
    {"content-length": "-1"},
    {"content-length": "4,5"},
    {"content-length": "9" * 30},
    {"content-length": "0", "connection": "upgrade", "upgrade": "websocket"},
    {"content-length": "0", "connection": "upgrade", "upgrade": "h2c", "http2-settings": "AAMAAABk"},
    {"content-length": "0", "no colon\r\nx": "y"},
    {"content-length": "0", "space ": "y"},
    {"content-length": "0", "nul\0": "y"},
]


def test_ambiguous_lengths_and_upgrades_are_refused(door, upstream):
    for more in SMUGGLING:
        answer = door.raw(head(headers=door.sites.keys["north"].headers() | more) + b"4\r\nping\r\n0\r\n\r\n")
        assert status(answer) in (400, 404, 413, 501, None), more
        assert b"200 OK" not in answer, more
    assert upstream.seen == []


def test_a_request_hidden_in_anothers_body_stays_a_body(door, upstream):
    hidden = head(line="POST /v1/control/list-nodes HTTP/1.1", headers={"content-length": "0"})
    credentials = door.sites.keys["north"].headers()
    first = head(headers=credentials | {"content-length": str(len(hidden))}) + hidden
    answer = door.raw(first + head(headers=credentials | {"content-length": "0", "connection": "close"}))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert [(seen.line.split()[1], seen.bytes_) for seen in upstream.seen] == [(OTHER, len(hidden)), (OTHER, 0)]


def test_a_second_request_on_the_line_is_judged_like_the_first(door, upstream):
    first = head(headers=door.sites.keys["north"].headers() | {"content-length": "4"}) + b"ping"
    answer = door.raw(first + head(headers={"content-length": "4"}) + b"ping")
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"401"]
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("key", ["none", "unknown", "empty", "not base64", "other case", "two keys"])
def test_without_a_members_key_no_body_is_read(door, upstream, key):
    north = door.sites.keys["north"]
    headers = north.headers() | {"content-length": str(8 * MIB)}
    if key == "none":
        del headers["flwr-public-key"]
    elif key == "two keys":
        headers = {"flwr-public-key": NodeKey().header, "FLWR-PUBLIC-KEY": north.header, **headers}
        headers = {name: headers[name] for name in headers if name != "flwr-public-key"} | {
            "Flwr-Public-Key": NodeKey().header
        }
    else:
        headers["flwr-public-key"] = {
            "unknown": NodeKey().header, "empty": "", "not base64": "***", "other case": north.header.swapcase()
        }[key]  # fmt: skip
    if key == "two keys":  # whichever counts, the SuperLink never sees the other
        door.raw(head(headers=headers | {"content-length": "4", "connection": "close"}) + b"ping")
        assert [seen.headers["flwr-public-key"] for seen in upstream.seen] in ([], [north.header])
        return
    with door.connect() as sock:
        sock.sendall(head(headers=headers | {"expect": "100-continue"}))
        answer = first(sock)
    assert status(answer) == 401  # no "100 Continue" came before it
    assert answer.endswith(b"\r\n\r\n")
    assert upstream.seen == []


def test_expect_continue_is_answered_for_a_node(door, upstream):
    headers = door.sites.keys["north"].headers() | {"content-length": "4", "connection": "close"}
    with door.connect() as sock:
        sock.sendall(head(headers=headers | {"expect": "100-continue"}))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 100")
        sock.sendall(b"ping")
        assert status(rest(sock)) == 200


def test_a_refused_answer_names_no_version_and_has_no_body(door):
    answer = door.raw(head("/v1/control/list-nodes", {"content-length": "0"}))
    assert status(answer) == 404
    assert not re.search(rb"\d\.\d+\.\d+|uvicorn|h11|Python", answer)
    assert answer.endswith(b"\r\n\r\n")


def test_a_revoked_node_is_refused_at_its_next_call(door, upstream):
    with door.client("north") as north, door.client("south") as south:
        assert [north.post(OTHER).status_code, south.post(OTHER).status_code] == [200, 200]
        door.revoke("north")
        assert [north.post(OTHER).status_code, south.post(OTHER).status_code] == [401, 200]
    assert len(upstream.seen) == 3


# --- limits --------------------------------------------------------------------------------------------------------


def test_a_body_at_the_limit_passes_and_one_byte_more_is_cut(kind, open_door, upstream):
    door = open_door(kind, upstream.port, replace(LOOSE, body_bytes=MIB))
    assert door.call(PUSH, BIG[:MIB]).status_code == 200
    headers = door.sites.keys["north"].headers()
    with door.connect() as sock:
        sock.sendall(head(PUSH, headers | {"content-length": str(MIB + 1)}))
        assert status(first(sock)) == 413  # no byte of the body was sent
    with door.connect() as sock:
        sock.sendall(head(PUSH, headers | {"transfer-encoding": "chunked"}))
        try:
            for _ in range(64):
                sock.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        except OSError:
            pass
        assert status(rest(sock)) in (413, None)
    assert [seen.bytes_ for seen in upstream.seen] == [MIB]


def test_endless_headers_are_cut(kind, open_door, upstream):
    door = open_door(kind, upstream.port, replace(LOOSE, header_bytes=4096))
    credentials = door.sites.keys["north"].headers() | {"content-length": "0"}
    for more in ({"x": "y" * 5000}, {f"x{number}": "y" * 100 for number in range(100)}):
        answer = door.raw(head(headers=credentials | more))
        assert status(answer) in (400, 431, 494, None)
        assert answer == b"" or answer.endswith(b"\r\n\r\n")
    assert status(door.raw(head("/" + "a" * 9000, credentials))) in (400, 404, 414, 431, None)
    assert upstream.seen == []


def test_slow_headers_and_slow_bodies_are_cut_while_others_are_served(kind, open_door, upstream):
    door = open_door(kind, upstream.port, replace(LOOSE, header_s=0.5, body_grace_s=0.5))
    headers = door.sites.keys["north"].headers() | {"content-length": "1000"}
    with door.connect() as silent, door.connect() as slow_head, door.connect() as slow_body:
        slow_head.sendall(head(headers=headers)[:50])
        slow_body.sendall(head(headers=headers) + b"half")
        assert door.call(site="south").status_code == 200
        for sock in (silent, slow_head, slow_body):
            assert status(rest(sock)) in (408, None)
    assert len(upstream.seen) == 1


def test_a_line_without_requests_is_closed(kind, open_door, upstream):
    door = open_door(kind, upstream.port, replace(LOOSE, idle_s=0.3))
    with door.connect() as sock:
        sock.sendall(head(headers=door.sites.keys["north"].headers() | {"content-length": "0"}))
        assert rest(sock).count(b"HTTP/1.1 200") == 1


def under_way(door: Door, source: str = "127.0.0.1", site: str = "north") -> ssl.SSLSocket:
    """A connection with half a request."""
    sock = door.connect(source)
    sock.sendall(head(headers=door.sites.keys[site].headers() | {"content-length": "4", "connection": "close"}) + b"pi")
    return sock


def finish(sock: ssl.SSLSocket) -> int | None:
    with sock:
        sock.sendall(b"ng")
        return status(rest(sock))


def tried(door: Door, source: str = "127.0.0.1", site: str = "north") -> int | None:
    """The status of a request, None if the connection is not even taken."""
    try:
        return finish(under_way(door, source, site))
    except OSError:
        return None


@pytest.mark.parametrize("limit", ["connections", "connections_per_address", "connections_per_node"])
def test_connections_beyond_a_limit_are_refused_while_others_are_served(kind, open_door, upstream, limit):
    door = open_door(kind, upstream.port, replace(LOOSE, **{limit: 3}))
    own = limit != "connections"
    held = [under_way(door, "127.0.0.1" if own else f"127.0.0.{2 + number}") for number in range(3)]
    until(lambda: tried(door) in (503, None))
    if limit == "connections_per_address":
        assert tried(door, "127.0.0.2", "south") == 200
    if limit == "connections_per_node":
        assert tried(door, site="south") == 200
    assert [finish(sock) for sock in held] == [200, 200, 200]
    until(lambda: tried(door) == 200)


def test_requests_beyond_a_nodes_rate_are_put_off_and_others_are_served(kind, open_door, upstream):
    door = open_door(kind, upstream.port, replace(LOOSE, requests_per_s_per_node=0.02, request_burst_per_node=3))
    with door.client("north") as north:
        answers = [north.post(OTHER).status_code for _ in range(6)]
    assert answers[:3] == [200, 200, 200]
    assert answers[-1] == 503  # what Flower's nodes try again
    assert door.call(site="south").status_code == 200


def test_of_one_nodes_requests_a_few_are_at_the_superlink_and_anothers_comes_in_between(open_door, upstream):
    door = open_door("embedded", upstream.port, replace(LOOSE, requests_at_once_per_node=2))
    upstream.hold.clear()
    greedy = [under_way(door) for _ in range(6)]
    for sock in greedy:
        sock.sendall(b"ng")
    until(lambda: len(upstream.seen) == 2)
    other = under_way(door, site="south")
    other.sendall(b"ng")
    until(lambda: len(upstream.seen) == 3)
    time.sleep(0.2)
    keys = [seen.headers["flwr-public-key"] for seen in upstream.seen]
    assert keys == [door.sites.keys[site].header for site in ("north", "north", "south")]
    upstream.hold.set()  # the others have waited, and lost nothing
    for sock in (*greedy, other):
        with sock:
            assert status(rest(sock)) == 200
    assert len(upstream.seen) == 7


def test_strangers_beyond_their_rate_get_429_and_nodes_of_the_address_are_served(kind, open_door, upstream):
    strict = replace(LOOSE, refusals_per_s_per_address=0.02, refusal_burst_per_address=3)
    door = open_door(kind, upstream.port, strict)
    answers = [door.call(site=None).status_code for _ in range(6)]
    assert answers[:3] == [401, 401, 401]
    assert answers[-1] == 429
    assert door.call("/docs", site=None).status_code == 429
    assert door.call().status_code == 200


# --- the other side ------------------------------------------------------------------------------------------------


def test_a_head_alone_is_not_sent_on(open_door, upstream):
    # Flower answers some at once, with an error, and closes; the body that came later then took the answer with it
    door = open_door("embedded", upstream.port)
    with door.connect() as sock:
        given = {"content-length": "4", "connection": "close"}
        sock.sendall(head(headers=door.sites.keys["north"].headers() | given))
        time.sleep(0.3)
        assert upstream.begun == 0
        sock.sendall(b"ping")
        assert status(rest(sock)) == 200
    assert upstream.begun == 1


def test_without_a_superlink_nodes_are_told_to_come_back(kind, open_door):
    door = open_door(kind, free_port())
    answer = door.call()
    assert (answer.status_code, answer.content) == (502, b"")


def test_a_superlink_that_the_authority_did_not_certify_gets_no_request(kind, open_door, tmp_path):
    stranger = Authority(tmp_path / "stranger")
    stranger.certificate("superlink")
    with Upstream(stranger) as upstream:
        assert open_door(kind, upstream.port).call().status_code == 502
        assert upstream.seen == []


def test_a_superlink_with_a_certificate_for_another_name_gets_no_request(kind, open_door, tmp_path, authority):
    authority.certificate("elsewhere", host="elsewhere")
    with Upstream(authority, "elsewhere") as upstream:
        assert open_door(kind, upstream.port).call().status_code == 502
        assert upstream.seen == []


def test_a_superlink_that_hangs_gives_504(kind, open_door, upstream):
    upstream.hold.clear()
    assert open_door(kind, upstream.port, replace(LOOSE, response_s=0.5)).call().status_code == 504


# --- what is written down ------------------------------------------------------------------------------------------


def test_the_access_log_has_one_line_a_request_without_bodies_and_keys(door):
    door.call(PUSH, b"secret weights")
    door.call("/v1/control/list-nodes\u00e9", site=None)
    until(lambda: sum("route" in line for line in door.log()) == 2)
    first, second = (line for line in door.log() if "route" in line)
    assert {"time", "site", "address", "method", "route", "status", "bytes_in", "bytes_out", "seconds"} <= set(first)
    assert [first[name] for name in ("site", "address", "method", "route", "status")] == [
        "north", "127.0.0.1", "POST", PUSH, 200
    ]  # fmt: skip
    assert first["bytes_in"] >= len(b"secret weights")
    assert first["bytes_out"] == 64
    assert [second[name] for name in ("site", "route", "status")] == ["-", "-", 404]
    text = door.config.access_log.read_text()
    assert "secret" not in text
    assert "control" not in text
    assert door.sites.keys["north"].header[:40] not in text


def test_requests_of_strangers_beyond_their_rate_cost_no_line_each(kind, open_door, upstream):
    strict = replace(LOOSE, refusals_per_s_per_address=0.02, refusal_burst_per_address=3)
    door = open_door(kind, upstream.port, strict)
    answers = [door.call(site=None).status_code for _ in range(30)]
    door.call()
    until(lambda: any(line.get("site") == "north" for line in door.log()))
    door.stop()
    lines = door.log()
    assert sum(line.get("status") in (401, 429) for line in lines) == answers.count(401) < 10
    if door.gateway:
        told = [
            int(words[0]) for line in lines if (words := line.get("message", "").split())[1:3] == ["more", "requests"]
        ]
        assert sum(told) == answers.count(429)
        assert door.gateway.stats.snapshot()["requests"]["-"]["429"] == answers.count(429)


# --- what only the embedded gateway does ---------------------------------------------------------------------------


def test_strangers_who_ask_nothing_cost_no_line_each_beyond_their_rate(open_door, upstream):
    strict = replace(LOOSE, header_s=0.3, refusals_per_s_per_address=0.001, refusal_burst_per_address=3)
    door = open_door("embedded", upstream.port, strict)
    for sock in [door.connect() for _ in range(8)]:
        with sock:
            assert rest(sock) == b""
    door.stop()
    lines = door.log()
    assert [line["status"] for line in lines if "status" in line] == [408, 408, 408]
    assert [line["message"].split()[0] for line in lines if "more requests" in line.get("message", "")] == ["5"]
    assert door.gateway.stats.snapshot()["refused"] == {"slow headers": 8}


@pytest.mark.parametrize("case", ["a coding that is unknown", "no registry"])
def test_no_kind_of_a_strangers_request_costs_a_line_each(open_door, upstream, case):
    strict = replace(LOOSE, refusals_per_s_per_address=0.001, refusal_burst_per_address=3)
    door = open_door("embedded", upstream.port, strict)
    headers, first, more = {"transfer-encoding": "unknown"}, 501, 429
    if case == "no registry":
        door.sites.path.unlink()
        headers, first, more = {"content-length": "0"}, 503, 503  # a member that is not known just now comes again
    answers = [status(door.raw(head(headers=headers))) for _ in range(8)]
    assert answers == [first] * 3 + [more] * 5
    door.stop()
    assert [line["status"] for line in door.log() if "status" in line] == [first] * 3


@pytest.fixture
def embedded(open_door, upstream) -> Door:
    return open_door("embedded", upstream.port)


def test_what_a_node_pushes_from_one_question_to_the_next_is_limited_and_others_are_served(open_door, upstream):
    door = open_door("embedded", upstream.port, replace(LOOSE, answer_bytes=1000))
    assert [door.call(PUSH, bytes(400)).status_code for _ in range(4)] == [
        200,
        200,
        200,
        413,
    ]  # 1200 have begun below it
    assert door.call("/v1/fleet/push-messages").status_code == 413
    assert door.call(OTHER, bytes(400)).status_code == 200  # what stores nothing
    assert door.call(PUSH, bytes(400), site="south").status_code == 200
    assert door.gateway.stats.snapshot()["refused"] == {"answer size": 2}
    upstream.repeat = 0  # an empty answer: there is no question
    assert door.call(QUESTIONS).content == b""
    assert door.call(PUSH, bytes(400)).status_code == 413
    upstream.repeat = 1
    assert door.call(QUESTIONS).content
    assert door.call(PUSH, bytes(400)).status_code == 200


def test_another_sites_public_key_without_its_signature_opens_nothing(embedded, upstream):
    north, south = embedded.sites.keys["north"], embedded.sites.keys["south"]
    hour = dt.timedelta(hours=1)
    forged = [
        north.headers(signer=south),
        north.headers() | {"flwr-signature": ""},
        north.headers() | {"flwr-timestamp": "yesterday"},
        north.headers() | {"flwr-timestamp": dt.datetime.now().isoformat()},
        north.headers(at=NOW - hour),
        north.headers(at=NOW + hour),
    ]
    for headers in forged:
        answer = embedded.raw(head(headers=headers | {"content-length": "1000", "expect": "100-continue"}))
        assert status(answer) == 401
    assert upstream.seen == []
    refused = embedded.gateway.stats.snapshot()["refused"]
    # The clock is blamed where the key's holder signed; else anybody could tell the coordinator that its own is wrong.
    assert refused == {"signature": 4, "clock": 2}


def cut(sock: ssl.SSLSocket, piece: bytes) -> bool:
    """Sends a piece every ten milliseconds; whether the gateway breaks off within twenty seconds."""
    try:
        for _ in range(2000):
            sock.sendall(piece)
            time.sleep(0.01)
    except OSError:
        return True
    return False


def test_a_body_that_trickles_is_cut_though_it_never_pauses(open_door, upstream):
    limits = replace(LOOSE, body_grace_s=0.3, body_bytes_per_s=1e6)
    door = open_door("embedded", upstream.port, limits)
    with door.connect() as sock:
        sock.sendall(head(headers=door.sites.keys["north"].headers() | {"content-length": str(MIB)}))
        assert cut(sock, b"x")
    assert upstream.seen == []


def test_a_whole_body_has_a_deadline_however_fast_its_pieces(open_door, upstream):
    limits = replace(LOOSE, body_s=0.5, body_grace_s=60.0)
    door = open_door("embedded", upstream.port, limits)
    with door.connect() as sock:
        sock.sendall(head(headers=door.sites.keys["north"].headers() | {"content-length": str(10 * MIB)}))
        assert cut(sock, bytes(1000))
    assert upstream.seen == []


def silent(door: Door, source: str, *, handshake: bool) -> socket.socket:
    """A stranger's connection on which nothing is asked."""
    if handshake:
        return door.connect(source)
    return socket.create_connection(("127.0.0.1", door.port), 20, source_address=(source, 0))


def has_ended(sock: socket.socket) -> bool:
    sock.settimeout(0.2)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("handshake", [False, True])
def test_strangers_who_take_all_connections_and_ask_nothing_lock_no_member_out(open_door, upstream, handshake):
    door = open_door("embedded", upstream.port, replace(LOOSE, connections=6, header_s=60.0, handshake_s=60.0))
    member = under_way(door, "127.0.0.5")
    one = silent(door, "127.0.0.2", handshake=handshake)
    many = [silent(door, "127.0.0.3", handshake=handshake) for _ in range(4)]
    until(lambda: door.gateway.stats.snapshot()["open_connections"] == 6)
    for _ in range(3):
        assert tried(door, "127.0.0.4", "south") == 200
        until(lambda: door.gateway.stats.snapshot()["open_connections"] < 6)
        many.append(silent(door, "127.0.0.3", handshake=handshake))
        until(lambda: door.gateway.stats.snapshot()["open_connections"] == 6)
    # the oldest of the address that has most of them had to go, and nobody else
    assert [has_ended(sock) for sock in many] == [True] * 3 + [False] * 4
    assert not has_ended(one)
    assert finish(member) == 200
    assert door.gateway.stats.snapshot()["refused"] == {"connections": 3}
    for sock in (one, *many):
        sock.close()


def test_strangers_of_a_members_address_who_ask_nothing_do_not_lock_it_out(open_door, upstream):
    strict = replace(LOOSE, connections_per_address=3, header_s=60.0, handshake_s=60.0)
    door = open_door("embedded", upstream.port, strict)
    with silent(door, "127.0.0.2", handshake=False) as elsewhere:
        many = [silent(door, "127.0.0.1", handshake=bool(number % 2)) for number in range(3)]
        until(lambda: door.gateway.stats.snapshot()["open_connections"] == 4)
        assert door.call().status_code == 200
        assert [has_ended(sock) for sock in (*many, elsewhere)] == [True, False, False, False]
        assert door.gateway.stats.snapshot()["refused"] == {"connections of the address": 1}
    for sock in many:
        sock.close()


def test_a_connection_for_which_no_member_has_room_is_reset_before_the_handshake(open_door, upstream):
    door = open_door("embedded", upstream.port, replace(LOOSE, connections_per_address=3))
    members = [under_way(door) for _ in range(3)]
    with pytest.raises(httpx.ConnectError) as refused:
        door.call()
    # Flower's nodes give up after an error that speaks of these
    assert not any(word in str(refused.value).lower() for word in ("certificate", "ssl", "tls"))
    assert door.gateway.stats.snapshot()["refused"] == {"connections of the address": 1}
    assert [finish(sock) for sock in members] == [200, 200, 200]


def test_a_handshake_that_takes_too_long_ends_with_a_reset(open_door, upstream):
    """An end without one is a TLS error to Flower's nodes, after which they do not come back."""
    door = open_door("embedded", upstream.port, replace(LOOSE, handshake_s=0.2))
    with silent(door, "127.0.0.1", handshake=False) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)


def asks_and_leaves(door: Door) -> None:
    with silent(door, "127.0.0.1", handshake=True) as sock:
        sock.sendall(head())
        sock.recv(1000)


def talks_no_tls(door: Door) -> None:
    with silent(door, "127.0.0.1", handshake=False) as sock, suppress(ConnectionResetError):
        sock.sendall(b"hello")
        sock.recv(1000)


@pytest.mark.parametrize(
    "visit",
    [
        lambda door: silent(door, "127.0.0.1", handshake=False).close(),
        lambda door: silent(door, "127.0.0.1", handshake=True).close(),
        talks_no_tls,
        asks_and_leaves,
        lambda door: tried(door),
    ],
    ids=["leaves", "handshake", "no TLS", "refused", "member"],
)
def test_what_a_connection_took_is_free_when_it_has_ended(open_door, upstream, visit):
    """256 KiB for TLS each: strangers who come again and again would fill the memory before Python looks for rings."""
    door = open_door("embedded", upstream.port)

    def connections() -> int:
        return sum(isinstance(each, SSLProtocol) for each in gc.get_objects())

    visit(door)
    gc.collect()
    gc.disable()
    try:
        before = connections()
        for _ in range(5):
            visit(door)
        until(lambda: connections() <= before)
    finally:
        gc.enable()


@pytest.mark.parametrize("defect", ["missing", "half", "not signed", "older", "raises"])
def test_while_the_registry_cannot_be_trusted_nobody_is_let_in(embedded, upstream, defect):
    path, first = embedded.sites.path, embedded.sites.path.read_bytes()
    embedded.sites.write()
    newest = path.read_bytes()
    assert embedded.call().status_code == 200
    if defect == "missing":
        path.unlink()
    elif defect == "raises":
        path.unlink()
        path.mkdir()
    else:
        other = newest.replace(b'"version": 2', b'"version": 3')
        path.write_bytes({"half": newest[:99], "not signed": other, "older": first}[defect])
    answer = embedded.call()
    assert (answer.status_code, len(upstream.seen)) == (503, 1)
    assert any("nobody is let in" in line.get("message", "") for line in embedded.log())
    if defect == "raises":
        path.rmdir()
    path.write_bytes(newest)
    assert embedded.call().status_code == 200


def test_a_callable_may_stand_for_the_registry(embedded, upstream):
    allowed = {embedded.sites.keys["north"].header: "north"}
    gateway = Gateway(embedded.config, lambda: allowed).start()
    door = replace(embedded, gateway=gateway)
    try:
        assert [door.call(site=site).status_code for site in ("north", "south")] == [200, 401]
        allowed.clear()
        assert door.call().status_code == 401
    finally:
        gateway.stop()


def test_a_rotated_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(open_door, upstream, tmp_path):
    rotating = Authority(tmp_path / "rotating")
    certificate, key = rotating.certificate("gateway")
    door = open_door("embedded", upstream.port, certificate=certificate, key=key)

    def shown() -> bytes:
        context = ssl.create_default_context(cafile=str(rotating.ca))
        with socket.create_connection(("127.0.0.1", door.port), 20) as sock:
            return context.wrap_socket(sock, server_hostname="localhost").getpeercert(binary_form=True)

    before = shown()
    rotating.certificate("gateway")
    after = shown()
    assert before != after
    key.write_text("half a key")
    assert shown() == after
    assert any("belong together" in line.get("message", "") for line in door.log())


def test_a_stop_lets_requests_under_way_end_and_takes_no_others(embedded, upstream):
    upstream.hold.clear()
    answers: list[bytes] = []
    with embedded.connect() as idle, embedded.connect() as busy:
        busy.sendall(head(headers=embedded.sites.keys["north"].headers() | {"content-length": "4"}) + b"ping")
        until(lambda: len(upstream.seen) == 1)
        stopping = threading.Thread(target=embedded.gateway.stop)
        stopping.start()
        assert rest(idle) == b""
        upstream.hold.set()
        answers.append(rest(busy))
        stopping.join()
    assert status(answers[0]) == 200
    with pytest.raises(ConnectionRefusedError):
        embedded.connect()
    assert embedded.gateway.stats.snapshot()["open_connections"] == 0


def test_the_counters_hold_who_did_what(embedded):
    with embedded.client("north") as north:
        for _ in range(3):
            north.post(OTHER, content=b"ping")
    embedded.call("/docs", site="south")
    until(lambda: embedded.gateway.stats.snapshot()["open_connections"] == 0)
    assert embedded.gateway.stats.snapshot() == {
        "requests": {"-": {"404": 1}, "north": {"200": 3}},
        "bytes_in": {"north": 12, "-": 0},
        "bytes_out": {"north": 3 * 64, "-": 0},
        "refused": {"route": 1},
        "open_connections": 0,
    }


def test_junk_reaches_nobody_and_harms_nobody(embedded, upstream):
    """Mutations of a good request, and noise, from a fixed seed."""
    rng = random.Random(7)
    good = head(headers=embedded.sites.keys["north"].headers() | {"content-length": "4"}) + b"ping"
    for number in range(60):
        data = bytearray(good if number % 3 else rng.randbytes(400))
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(good.partition(b"content-type")[0]))  # line and credentials
            data[place : place + rng.randrange(2)] = rng.randbytes(rng.randrange(1, 3))
        with embedded.connect() as sock, suppress(OSError):
            sock.sendall(bytes(data) + b"\r\n\r\n")
            sock.settimeout(0.1)
            rest(sock)
    for seen in upstream.seen:  # some mutations leave a good request
        assert seen.line == f"POST {OTHER} HTTP/1.1"
        assert seen.headers["flwr-public-key"] == embedded.sites.keys["north"].header
    assert len(upstream.seen) < 20
    refused = embedded.gateway.stats.snapshot()["refused"]
    assert "internal" not in refused
    assert embedded.call().status_code == 200


def test_the_command_serves_until_sigterm_and_leaves_its_counters(open_door, upstream):
    door = open_door("embedded", upstream.port)
    stats = door.folder / "stats.json"
    config = replace(door.config, stats=stats, access_log=door.folder / "command.log")
    file = door.folder / "gateway.json"
    file.write_text(json.dumps(asdict(config), default=str))
    process = subprocess.Popen([sys.executable, "-m", "server.gateway", "--config", str(file)], cwd=ROOT)
    try:
        until(lambda: stats.exists() or process.poll() is not None)
        port = json.loads(stats.read_text())["port"]
        with httpx.Client(
            verify=ssl.create_default_context(cafile=str(door.config.upstream_ca)), trust_env=False
        ) as client:
            answer = client.post(f"https://localhost:{port}{OTHER}", headers=door.sites.keys["north"].headers())
            assert answer.status_code == 200
            process.terminate()
            assert process.wait(10) == 0
    finally:
        process.kill()
    assert json.loads(stats.read_text())["requests"] == {"north": {"200": 1}}
    lines = [json.loads(line) for line in config.access_log.read_text().splitlines()]
    assert [line["status"] for line in lines if "status" in line] == [200]


def test_a_wrong_configuration_is_one_sentence(tmp_path):
    file = tmp_path / "gateway.json"
    file.write_text('{"listen_host": "127.0.0.1", "porrt": 1}')
    done = subprocess.run(
        [sys.executable, "-m", "server.gateway", "--config", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "porrt" in done.stderr
    assert "Traceback" not in done.stderr


# --- nginx ---------------------------------------------------------------------------------------------------------


def test_the_nginx_configuration_takes_no_text_that_could_be_a_directive(open_door, upstream):
    config = open_door("embedded", upstream.port).config
    assert "ssl_protocols TLSv1.3;" in nginx_config(config)
    assert "${" not in nginx_config(config)
    with pytest.raises(ConfigError, match="cannot stand in nginx's configuration"):
        nginx_config(replace(config, access_log=Path("/tmp/a; return 200")))


def test_nginx_is_given_no_keys_out_of_a_registry_that_does_not_hold(tmp_path, open_door, upstream):
    config = open_door("embedded", upstream.port).config
    config.registry.write_text("{}")
    with pytest.raises(FedicomError):
        write_nginx(config, tmp_path / "nginx")
    assert not (tmp_path / "nginx").exists()


def test_an_older_registry_is_refused_after_a_newer_one(tmp_path):
    sites = Sites(tmp_path / "registry.json")
    sites.write()
    first = sites.path.read_bytes()
    keys = RegistryKeys(sites.path, sites.authority.public)
    assert sorted(keys().values()) == ["north", "south"]
    sites.write("north")
    assert sorted(keys().values()) == ["south"]
    sites.path.write_bytes(first)
    with pytest.raises(ConfigError, match="version 1, version 2 was in force before"):
        keys()


# --- in front of the real SuperLink --------------------------------------------------------------------------------


@dataclass
class SuperLink:
    """A running flower-superlink on loopback."""

    port: int
    ca: Path

    def client(self, kind: Any, port: int, *interceptors: Any) -> Any:
        """One of Flower's own clients that holds the authority's certificate, as everybody may."""
        return kind.from_server_address(f"localhost:{port}", False, self.ca.read_bytes(), list(interceptors))


@pytest.fixture(scope="module")
def superlink(authority, tmp_path_factory) -> Iterator[SuperLink]:
    home = tmp_path_factory.mktemp("superlink")
    port = free_port()
    command = [
        Path(sys.executable).parent / "flower-superlink", "--host", "127.0.0.1", "--port", str(port),
        "--ssl-certfile", authority.folder / "superlink.crt", "--ssl-keyfile", authority.folder / "superlink.key",
        "--ssl-ca-certfile", authority.ca, "--enable-supernode-auth", "--isolation", "process",
    ]  # fmt: skip
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"
    }  # fmt: skip
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, (home / "log").read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        until(answers, seconds=120)
        yield SuperLink(port, authority.ca)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


class TestInFrontOfARealSuperLink:
    @pytest.fixture
    def door(self, kind, open_door, superlink) -> Door:
        return open_door(kind, superlink.port)

    def fleet(self, superlink: SuperLink, port: int, key: NodeKey, signer: NodeKey | None = None) -> FleetHttpClient:
        private = (signer or key).private
        return superlink.client(
            FleetHttpClient, port, RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, key.private.public_key()),
        )  # fmt: skip

    def register(self, superlink: SuperLink, key: NodeKey) -> int:
        with superlink.client(ControlHttpClient, superlink.port) as control:
            public = public_key_to_bytes(key.private.public_key())
            return int(control.RegisterNode(RegisterNodeRequest(public_key=public)).node_id)

    def test_a_peer_with_the_authoritys_certificate_alone_can_do_nothing(self, door, superlink):
        calls = [
            (ControlHttpClient, "ListNodes", ListNodesRequest()),
            (ControlHttpClient, "ListRuns", ListRunsRequest()),
            (ControlHttpClient, "StartRun", StartRunRequest()),
            (ControlHttpClient, "StopRun", StopRunRequest(run_id=1)),
            (ControlHttpClient, "RegisterNode", RegisterNodeRequest(public_key=b"k")),
            (RuntimeHttpClient, "AcquireTask", AcquireTaskRequest()),
            (RuntimeHttpClient, "PullTaskInput", PullTaskInputRequest()),
            (RuntimeHttpClient, "GetNodes", GetNodesRequest()),
            (FleetHttpClient, "ActivateNode", ActivateNodeRequest(heartbeat_interval=30)),
            (FleetHttpClient, "PullMessages", PullMessagesRequest(node=Node(node_id=1))),
            (FleetHttpClient, "PushMessages", PushMessagesRequest(node=Node(node_id=1))),
        ]
        for kind, name, request in calls:
            with superlink.client(kind, door.port) as client, pytest.raises(httpx.HTTPStatusError) as refused:
                getattr(client, name)(request)
            assert refused.value.response.status_code == (401 if kind is FleetHttpClient else 404), name
            assert refused.value.response.content == b""
        # The same calls open the SuperLink itself: what is refused above is refused by the gateway.
        with superlink.client(ControlHttpClient, superlink.port) as control:
            control.ListNodes(ListNodesRequest())
            control.ListRuns(ListRunsRequest())

    def test_a_node_of_both_lists_works_and_is_out_at_once_when_revoked(self, door, superlink):
        key = door.sites.keys["north"]
        node_id = self.register(superlink, key)
        public = public_key_to_bytes(key.private.public_key())
        with self.fleet(superlink, door.port, key) as client:
            answer = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
            assert answer.node_id == node_id
            node = Node(node_id=node_id)
            assert client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=30)).success
            assert not client.PullMessages(PullMessagesRequest(node=node)).messages_list
            door.revoke("north")
            with pytest.raises(httpx.HTTPStatusError) as refused:
                client.PullMessages(PullMessagesRequest(node=node))
            assert refused.value.response.status_code == 401

    def test_a_member_that_the_superlink_does_not_know_is_refused_there(self, door, superlink):
        key = door.sites.keys["south"]
        public = public_key_to_bytes(key.private.public_key())
        answers = []
        for port in (door.port, superlink.port):
            with self.fleet(superlink, port, key) as client, pytest.raises(httpx.HTTPStatusError) as refused:
                client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
            answers.append((refused.value.response.status_code, refused.value.response.json()["code"]))
        assert answers[0] == answers[1]  # Flower's own error comes back whole

    def test_an_error_that_answers_a_nodes_look_for_a_question_is_none(self, open_door, superlink):
        door = open_door("embedded", superlink.port, replace(LOOSE, answer_bytes=1000))
        door.call(PUSH, bytes(1000))
        assert door.call(PUSH).status_code == 413
        answer = door.call(QUESTIONS, b"no message")  # Flower answers with its error as JSON
        assert answer.status_code >= 400
        assert answer.content
        assert door.call(PUSH).status_code == 413

    def test_another_sites_public_key_without_its_private_half_is_refused(self, door, superlink):
        north, south = door.sites.keys["north"], door.sites.keys["south"]
        public = public_key_to_bytes(north.private.public_key())
        client = self.fleet(superlink, door.port, north, signer=south)
        with client, pytest.raises(httpx.HTTPStatusError) as refused:
            client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
        assert refused.value.response.status_code == 401


# --- weights and the bell ------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """A door with a round behind it, in which north is asked, and a piece of the model."""

    door: Door
    round_: Round
    piece: bytes = random.Random(1).randbytes(3_000_000)

    @property
    def name(self) -> str:
        return hashlib.sha256(self.piece).hexdigest()

    def path(self, piece: bytes | str = "") -> str:
        name = hashlib.sha256(piece).hexdigest() if isinstance(piece, bytes) else piece
        return f"/v1/blobs/{self.round_.ticket}/{name}" if name else f"/v1/blobs/{self.round_.ticket}"

    def ask(self, method: str, path: str, site: str = "north", body: bytes | None = None, **headers) -> httpx.Response:
        signed = self.door.sites.keys[site].beside(method, path)
        with self.door.client(None) as client:
            return client.request(method, path, content=body, headers=signed | headers)


@pytest.fixture
def weights(kind, open_door, upstream, tmp_path) -> Iterator[Weights]:
    bell = tmp_path / "sent.bell"
    door = open_door(kind, upstream.port, blobs=tmp_path / "blobs", sent_bell=bell)
    with Store(tmp_path / "blobs", "run").round(("north",), 3_000_000) as round_:
        made = Weights(door, round_)
        round_.put(made.name, memoryview(made.piece))
        yield made


def test_a_site_that_is_asked_reads_the_model_and_another_member_does_not(weights, upstream):
    assert weights.ask("GET", weights.path(weights.name)).content == weights.piece
    assert weights.ask("GET", weights.path(weights.name), "south").status_code == 404
    assert weights.ask("PUT", weights.path(b"mine"), "south", b"mine").status_code == 404
    assert weights.ask("GET", weights.path(), "south").status_code == 404
    assert upstream.seen == []  # none of it is Flower's


def test_a_site_writes_a_piece_under_its_name_and_sees_what_it_has_written(weights):
    assert weights.ask("GET", weights.path()).json() == []
    for _ in range(2):  # asked again after a crash, it does no harm
        assert weights.ask("PUT", weights.path(weights.piece), body=weights.piece).status_code == 200
    assert weights.ask("GET", weights.path()).json() == [weights.name]
    got = memoryview(bytearray(3_000_000))
    weights.round_.answers("north").get(weights.name, got)
    assert bytes(got) == weights.piece


def test_too_many_bytes_are_refused_and_not_kept(weights):
    long = bytes(4 * MIB + 1)
    assert weights.ask("PUT", weights.path(long), body=long).status_code == 413
    assert weights.ask("PUT", weights.path(b""), body=b"").status_code == 413
    for number, wanted in enumerate((200, 413)):  # 2 * 3,000,000 + 1,048,576 bytes in all
        piece = bytes([number]) * 4_000_000
        assert weights.ask("PUT", weights.path(piece), body=piece).status_code == wanted
    assert len(weights.ask("GET", weights.path()).json()) == 1


def test_a_piece_that_was_cut_is_not_there_and_can_be_sent_again(weights):
    path = weights.path(weights.piece)
    headers = weights.door.sites.keys["north"].beside("PUT", path) | {"content-length": "3000000"}
    with weights.door.connect() as sock:
        sock.sendall(head(line=f"PUT {path} HTTP/1.1", headers=headers) + weights.piece[:1_000_000])
    assert weights.ask("GET", weights.path()).json() == []
    assert weights.ask("PUT", path, body=weights.piece).status_code == 200


def test_a_piece_for_which_there_is_room_but_for_those_under_way_is_put_off_and_not_refused(weights):
    """A line that died unseen in the middle of a piece: the site sends it anew, on another one."""
    path = weights.path(weights.piece)
    headers = weights.door.sites.keys["north"].beside("PUT", path) | {"content-length": "3000000"}
    dead = [weights.door.connect() for _ in range(2)]
    for sock in dead:  # 2 * 3,000,000 of the 2 * 3,000,000 + 1,048,576 bytes
        sock.sendall(head(line=f"PUT {path} HTTP/1.1", headers=headers) + weights.piece[:1_000_000])
    coming = weights.round_.folder / "from" / "north"
    until(lambda: len(list(coming.iterdir())) == 2 or weights.door.kind == "nginx")  # which first reads all of a body
    answer = weights.ask("PUT", path, body=weights.piece)
    assert answer.status_code == (200 if weights.door.kind == "nginx" else 503)  # a site comes again after 503
    for sock in dead:
        sock.close()
    until(lambda: weights.ask("PUT", path, body=weights.piece).status_code == 200)


@pytest.mark.parametrize("cut", [1, 700, 1_500_000])
def test_requests_that_come_together_with_a_piece_are_each_answered(weights, cut):
    """The bytes of a piece go past the parser: nothing of the next request may go with them, and none may stay."""
    north, data = weights.door.sites.keys["north"], b""
    pieces = [weights.piece, b"x", weights.piece[:2_000]]
    for method, piece in (*(("PUT", piece) for piece in pieces), ("GET", None), ("PUT", b"y"), ("GET", None)):
        path = weights.path(piece) if piece is not None else weights.path()
        length = {"content-length": str(len(piece or b""))} if method == "PUT" else {}
        line = f"{method} {path} HTTP/1.1"
        data += head(line=line, headers=north.beside(method, path) | length) + (piece or b"")
    path = weights.path(weights.name)
    data += head(line=f"GET {path} HTTP/1.1", headers=north.beside("GET", path) | {"connection": "close"})
    with weights.door.connect() as sock:
        sock.sendall(data[:cut])
        time.sleep(0.05)
        sock.sendall(data[cut:])
        answer = rest(sock)
    assert answer.count(b"HTTP/1.1 200") == 7
    names = [sorted(hashlib.sha256(piece).hexdigest() for piece in some) for some in (pieces, [*pieces, b"y"])]
    assert [json.dumps(each).encode() in answer for each in names] == [True, True]
    assert answer.endswith(weights.piece)
    for piece in (*pieces, b"y"):
        got = memoryview(bytearray(len(piece)))
        weights.round_.answers("north").get(hashlib.sha256(piece).hexdigest(), got)
        assert bytes(got) == piece


def test_a_piece_that_comes_byte_by_byte_is_whole(weights):
    piece = random.Random(2).randbytes(3_000)
    path = weights.path(piece)
    signed = weights.door.sites.keys["north"].beside("PUT", path)
    with weights.door.connect() as sock:
        sock.sendall(head(line=f"PUT {path} HTTP/1.1", headers=signed | {"content-length": "3000"}))
        for at in range(3_000):
            sock.sendall(piece[at : at + 1])
        assert sock.recv(1 << 12).startswith(b"HTTP/1.1 200")
    got = memoryview(bytearray(3_000))
    weights.round_.answers("north").get(hashlib.sha256(piece).hexdigest(), got)
    assert bytes(got) == piece


def test_what_a_hung_disk_takes_after_a_stop_goes_into_no_other_file(tmp_path, monkeypatch):
    hung, freed, done = threading.Event(), threading.Event(), threading.Event()

    class Peer(gateway_beside.Beside):
        _http = SimpleNamespace(they_are_waiting_for_100_continue=False)  # type: ignore[assignment]

        async def _plain_body(self, size, entry):
            entry.received = size
            yield b"0123456789"

    def writev(file, block):
        hung.set()
        freed.wait(10)
        return os.write(file, block[0][:2])

    def write(file, rest, write=os.write):
        written = write(file, rest)
        if hung.is_set() and freed.is_set() and len(rest) > 2:
            done.set()
        return written

    monkeypatch.setattr(gateway_beside.os, "writev", writev)
    monkeypatch.setattr(gateway_beside.os, "write", write)

    async def stop_meanwhile():
        room = Writing(tmp_path / "part", tmp_path / "piece")
        task = asyncio.create_task(Peer()._receive(room, 10, gateway_beside.Entry("north")))
        await asyncio.to_thread(hung.wait, 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with (tmp_path / "log").open("wb", buffering=0):  # the next file that the gateway opens
            freed.set()
            await asyncio.to_thread(done.wait, 10)

    asyncio.run(stop_meanwhile())
    assert (tmp_path / "log").read_bytes() == b""
    assert (tmp_path / "part").read_bytes() == b"0123456789"


def test_a_disk_that_takes_a_part_at_a_time_gets_all_of_a_piece(tmp_path, monkeypatch):
    write, writev = os.write, os.writev
    monkeypatch.setattr(os, "writev", lambda file, block: writev(file, [b"".join(block)[:5]]))
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    with (tmp_path / "piece").open("wb", buffering=0) as file:
        gateway_beside._keep(os.dup(file.fileno()), [b"0123", b"456", b"789"])
    assert (tmp_path / "piece").read_bytes() == b"0123456789"


def test_a_signature_is_good_for_one_method_and_path_and_flowers_own_for_none(weights):
    north, path, other = weights.door.sites.keys["north"], weights.path(weights.name), weights.path()
    wrong = [
        north.headers(),
        north.beside("PUT", path),
        north.beside("GET", other),
        north.beside("GET", path, word="message"),
        north.beside("GET", path, signer=weights.door.sites.keys["south"]),
        {**north.beside("GET", path), "flwr-public-key": NodeKey().header},
    ]
    with weights.door.client(None) as client:
        for headers in wrong:
            assert client.get(path, headers=headers).status_code == 401
        assert client.get(path, headers=north.beside("GET", path)).status_code == 200


def test_a_signature_for_weights_is_none_for_flower(embedded_weights, upstream):
    north = embedded_weights.door.sites.keys["north"]
    with embedded_weights.door.client(None) as client:
        assert client.post(OTHER, content=b"", headers=north.beside("POST", OTHER)).status_code == 401
    assert upstream.seen == []


def test_only_the_exact_request_lines_for_weights_pass(weights, upstream):
    ticket, name = weights.round_.ticket, weights.name
    lines = [
        *(("POST", weights.path(name)), ("DELETE", weights.path(name)), ("HEAD", weights.path(name))),
        *(("PUT", weights.path()), ("GET", weights.path() + "/"), ("GET", weights.path(name) + "/")),
        *(("GET", weights.path(name) + "?a=b"), ("GET", f"/v1/blobs/{ticket}/../{ticket}/{name}")),
        *(("GET", f"/v1/blobs//{ticket}/{name}"), ("GET", f"/v1/blobs/{ticket}/{name.upper()}")),
        *(("GET", f"/v1/blobs/{ticket}/round.json"), ("GET", "/v1/bell/"), ("POST", "/v1/bell/" + "0" * 16)),
    ]
    for method, path in lines:
        signed = weights.door.sites.keys["north"].beside(method, path)
        signed |= {"content-length": "0", "connection": "close"}
        answer = weights.door.raw(head(line=f"{method} {path} HTTP/1.1", headers=signed))
        assert status(answer) in (400, 404, 405), (method, path, answer)
    assert upstream.seen == []


def test_a_revoked_site_reads_and_writes_no_weights(weights):
    assert weights.ask("GET", weights.path(weights.name)).status_code == 200
    weights.door.revoke("north")
    assert weights.ask("GET", weights.path(weights.name)).status_code == 401
    assert weights.ask("PUT", weights.path(b"mine"), body=b"mine").status_code == 401
    assert list((weights.round_.folder / "from" / "north").iterdir()) == []


def test_the_bell_answers_when_the_coordinator_has_sent_something(weights):
    bell = Bell(weights.door.config.sent_bell)
    bell.ring()
    first_mark = weights.ask("GET", "/v1/bell/" + "0" * 16).text
    assert first_mark == bell.mark
    answers: list[str] = []
    listener = threading.Thread(target=lambda: answers.append(weights.ask("GET", "/v1/bell/" + first_mark).text))
    listener.start()
    listener.join(0.2)
    assert answers == []
    bell.ring()
    listener.join(20)
    assert answers == [bell.mark] != [first_mark]


def test_without_a_folder_for_weights_there_are_none(door, upstream):
    key, path = door.sites.keys["north"], f"/v1/blobs/{'0' * 32}/{'0' * 64}"
    with door.client(None) as client:
        assert client.get(path, headers=key.beside("GET", path)).status_code == 404
        bell = "/v1/bell/" + "0" * 16
        assert client.get(bell, headers=key.beside("GET", bell)).status_code == 404
    assert upstream.seen == []


def test_a_gateway_without_weights_tells_members_alone_that_there_are_none(open_door, upstream):
    door, path = open_door("embedded", upstream.port), f"/v1/blobs/{'0' * 32}"
    with door.client(None) as client:
        assert client.get(path).status_code == 401
        assert client.get(path, headers=door.sites.keys["north"].beside("GET", path)).status_code == 404


@pytest.fixture
def embedded_weights(open_door, upstream, tmp_path) -> Iterator[Weights]:
    door = open_door("embedded", upstream.port, blobs=tmp_path / "blobs", sent_bell=tmp_path / "sent.bell")
    with Store(tmp_path / "blobs", "run").round(("north",), 3_000_000) as round_:
        made = Weights(door, round_)
        round_.put(made.name, memoryview(made.piece))
        yield made


def test_an_answer_from_a_node_rings_the_runs(open_door, upstream, tmp_path):
    bell = Bell(tmp_path / "answered.bell")
    door = open_door("embedded", upstream.port, answered_bell=tmp_path / "answered.bell")
    door.call(OTHER)
    assert not bell.there
    door.call(PUSH)
    until(lambda: bell.there)


def test_a_stop_does_not_wait_for_who_listens_to_the_bell(embedded_weights):
    path = "/v1/bell/" + Bell(embedded_weights.door.config.sent_bell).mark
    signed = embedded_weights.door.sites.keys["north"].beside("GET", path)
    with embedded_weights.door.connect() as sock:
        sock.sendall(head(line=f"GET {path} HTTP/1.1", headers=signed))
        gateway = embedded_weights.door.gateway
        until(lambda: gateway.listeners.count == 1)
        gateway.limits = replace(gateway.limits, stop_s=1000.0)
        gateway.stop()
        assert rest(sock) == b""
