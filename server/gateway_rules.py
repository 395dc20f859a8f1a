"""What the gateway lets through: routes, headers, limits, keys. No connection is opened here."""

from __future__ import annotations

import ipaddress
import re
import ssl
import threading
import time
from asyncio import Task
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from common import blobs
from common.chain import TOLERANCE_S
from common.deployment import Host, Port
from common.errors import ConfigError, FedicomError
from common.registry import PublicKey, read_registry

FLEET_ROUTES = frozenset(
    ("POST", f"/v1/fleet/{call}")
    for call in (
        *("register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat"),
        *("pull-messages", "push-messages", "get-run", "get-fab"),
        *("push-object", "pull-object", "confirm-message-received"),
    )
)
"""Method and path of all that passes; a test holds it equal to the routes of the installed Flower."""
BLOB_ROUTE = re.compile(rf"{blobs.PATH}({blobs.TICKET.pattern})(?:/({blobs.DIGEST.pattern}))?")
"""Path of what the gateway answers itself: GET and PUT with a name, GET without."""
BELL_ROUTE = re.compile(rf"{blobs.BELL_PATH}({blobs.MARK.pattern})")
"""Path of what the gateway answers itself as soon as the coordinator has sent something (GET)."""
QUESTIONS = "/v1/fleet/pull-messages"
"""The call that brings a question: each once, and an empty body while there is none."""
ANSWERS = frozenset(("/v1/fleet/push-messages", "/v1/fleet/push-object"))
"""Calls that bring an answer, or a piece of it."""
KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
"""Flower's node authentication: base64 of the PEM public key, ISO 8601, base64 of ECDSA-SHA256 over the timestamp."""
REQUEST_HEADERS = (
    *(b"content-type", b"accept", KEY, TIMESTAMP, SIGNATURE),
    *(b"flwr-package-name", b"flwr-package-version", b"flwr-component-name"),
)
"""All that reaches the SuperLink of a request's headers, beside its length."""
RESPONSE_HEADERS = (
    *(b"content-type", b"content-length", b"retry-after", b"www-authenticate"),
    b"flwr-version-incompatibility-message",
)
"""All that reaches a node of a response's headers."""

CLOCK = "clock"
"""Why a request was refused that a member has signed at another time than this machine's."""

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
_BUCKETS = 10_000

Seconds = Annotated[float, Gt(0)]
Rate = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GatewayLimits:
    """What one peer, one node and all together may take."""

    body_bytes: Count = 16 << 20
    """Largest body of a request; Flower sends arrays in pieces of 5 MiB."""
    header_bytes: Annotated[int, Ge(1024)] = 16 << 10
    """Largest request line and headers together."""
    handshake_s: Seconds = 10.0
    """For TLS."""
    header_s: Seconds = 10.0
    """From the handshake, or the first byte of a later request, to the end of the headers."""
    body_s: Seconds = 300.0
    """Longest that a whole body is waited for."""
    body_grace_s: Seconds = 15.0
    """So long a body may lag behind `body_bytes_per_s`."""
    body_bytes_per_s: Rate = 8192.0
    """Slowest body."""
    idle_s: Seconds = 75.0
    """Between two requests of a connection."""
    connect_s: Seconds = 5.0
    """To reach the SuperLink."""
    response_s: Seconds = 300.0
    """From the end of a request to the last byte of its response at the node."""
    stop_s: Seconds = 5.0
    """That requests under way are given at a stop."""
    connections: Count = 512
    """Of everybody together."""
    connections_per_address: Count = 64
    """An IPv6 network of 64 bits counts as one address."""
    connections_per_node: Count = 32
    """That one member has open."""
    requests_per_s_per_node: Rate = 50.0
    """That one member may keep up; beyond them it is told to wait."""
    request_burst_per_node: Count = 200
    """Requests of a member at once before that rate holds."""
    requests_at_once_per_node: Count = 4
    """At the SuperLink; more wait here, so that other nodes' come in between. The embedded gateway alone holds it."""
    answer_bytes: Count = 4 << 30
    """What a node may push through Flower from one question to the next; with `blobs: false` it has to hold an update
    a few times. Weights beside the messages have a limit of their own."""
    refusals_per_s_per_address: Rate = 1.0
    """Requests without a known node's credentials; more are answered 429 whatever they ask, and counted, not logged."""
    refusal_burst_per_address: Count = 20
    """Such requests at once before that rate holds."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GatewayConfig:
    """Addresses and files of a gateway; as JSON the argument of `python -m server.gateway --config`."""

    listen_host: Host
    listen_port: Annotated[int, Ge(0), Le(65535)]
    """0 takes a free one."""
    certificate: Path
    """PEM, with its chain; read again when it changes, as `key` is."""
    key: Path
    upstream_host: Host = "127.0.0.1"
    """The SuperLink."""
    upstream_port: Port
    upstream_name: Host = "localhost"
    """Name in the SuperLink's certificate."""
    upstream_ca: Path
    registry: Path
    """Signed registry: whose nodes may connect; read again when it changes."""
    authority: PublicKey
    """Whose signature the registry must carry."""
    blobs: Path | None = None
    """Folder with the weights on their way (`server.blobs`); null serves none."""
    sent_bell: Path | None = None
    """Rung when the coordinator has sent something; null: nodes have to ask from time to time."""
    answered_bell: Path | None = None
    """Rung here when a node has answered."""
    blobs_port: Port | None = None
    """nginx only: port of the embedded gateway on `upstream_host`, which serves both; null passes none on."""
    blobs_name: Host = "localhost"
    """nginx only: name in the embedded gateway's certificate."""
    limits: GatewayLimits = GatewayLimits()
    access_log: Path | None = None
    """JSON Lines, one a request, for logrotate to keep short; null writes them to standard error."""
    stats: Path | None = None
    """JSON of the counters, written every five seconds."""


def flower_header(openssh: str) -> str:
    """What Flower's node sends in `flwr-public-key` for this OpenSSH public key: base64 of its PEM.

    Raises:
        ConfigError: It is no NIST elliptic-curve key.
    """
    try:
        key = load_ssh_public_key(openssh.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{openssh[:24]!r}... is no node key; expected a line `ecdsa-sha2-nistp256 AAAA...`")
    return b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()


class RegistryKeys:
    """The allowed keys out of a signed registry file: header value -> site. Read again when the file changes."""

    def __init__(self, path: Path, authority: str) -> None:
        self._path, self._authority = path, authority
        self._stamp: object = ()
        self._version = 0
        self._keys: Mapping[str, str] | FedicomError = {}

    def __call__(self) -> Mapping[str, str]:
        """Members that are not revoked.

        Raises:
            FedicomError: The file is missing, not signed by the authority, or older than one read before.
        """
        if (now := stamp(self._path)) != self._stamp:
            self._stamp = now  # taken before the file is read: a change in between is seen next time
            try:
                self._keys = self._read()
            except FedicomError as error:
                self._keys = error
        if isinstance(self._keys, FedicomError):
            raise self._keys
        return self._keys

    def _read(self) -> Mapping[str, str]:
        registry = read_registry(self._path, self._authority)
        if registry.version < self._version:
            raise ConfigError(
                f"{self._path.name} has version {registry.version}, version {self._version} was in force before; "
                f"install the newest, or revoked nodes would come back"
            )
        self._version = registry.version
        return {flower_header(member.node): name for name, member in registry.members.items()}


def unlike(header: str, timestamp: bytes, signature: bytes, blob: tuple[str, str] | None = None) -> str:
    """What speaks against a peer that names this key: "signature" or "clock"; empty when it has signed with it lately.

    The public key alone is known to every site. Of the clock only who holds the key is believed.

    Args:
        blob: Method and path of a request for weights, which the signature must be over as well.
    """
    try:
        age_s = (datetime.now(UTC) - datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
        signed = blobs.signed_request(*blob, timestamp.decode("ascii")) if blob else timestamp
        _public_key(header).verify(b64decode(signature, validate=True), signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, TypeError, OverflowError):
        return "signature"
    return CLOCK if abs(age_s) > TOLERANCE_S else ""


@lru_cache(maxsize=4096)
def _public_key(header: str) -> ec.EllipticCurvePublicKey:
    key = load_pem_public_key(b64decode(header, validate=True))
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError("no elliptic-curve key")
    return key


class GatewayStats:
    """Counters since the start; safe to read from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._received: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._open = 0

    def request(self, site: str, status: int, received: int, sent: int) -> None:
        """Counts an answered request; `site` is "-" for peers without credentials, bytes are those of bodies."""
        with self._lock:
            self._requests[site, status] += 1
            self._received[site] += received
            self._sent[site] += sent

    def refused(self, why: str) -> None:
        """Counts a refused request or connection."""
        with self._lock:
            self._refused[why] += 1

    def connection(self, change: int) -> None:
        """+1 for one opened, -1 for one closed."""
        with self._lock:
            self._open += change

    def snapshot(self) -> dict[str, Any]:
        """All of it, as JSON takes it.

        Returns:
            `requests` {site: {status: n}}, `bytes_in` and `bytes_out` {site: n}, `refused` {reason: n} and
            `open_connections`.
        """
        with self._lock:
            requests: dict[str, dict[str, int]] = {}
            for (site, status), count in sorted(self._requests.items()):
                requests.setdefault(site, {})[str(status)] = count
            return {
                "requests": requests,
                "bytes_in": dict(self._received),
                "bytes_out": dict(self._sent),
                "refused": dict(self._refused),
                "open_connections": self._open,
            }


class Buckets:
    """Token buckets by key: `rate` a second, `burst` at once."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> bool:
        """Whether one more is allowed now; if so it is counted."""
        now = time.monotonic()
        if key not in self._levels and len(self._levels) >= _BUCKETS:
            self._levels = {name: at for name, at in self._levels.items() if self._level(at, now) < self._burst}
            if len(self._levels) >= _BUCKETS:
                return False  # no memory for newcomers while so many are busy
        level = self._level(self._levels.get(key, (self._burst, now)), now)
        allowed = level >= 1
        self._levels[key] = (level - allowed, now)
        return allowed

    def _level(self, at: tuple[float, float], now: float) -> float:
        return min(self._burst, at[0] + (now - at[1]) * self._rate)


class Answers:
    """How much each node has pushed since it was last given a question."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._pushed = most_bytes, Counter[str]()

    def room(self, key: str, route: str) -> bool:
        """Whether the node may make this call; one that has begun may pass the limit by its body."""
        return route not in ANSWERS or self._pushed[key] < self._most

    def note(self, key: str, route: str, received: int, sent: int) -> None:
        """Counts the bodies of a call that has ended."""
        if route in ANSWERS:
            self._pushed[key] += received
        elif route == QUESTIONS and sent:
            del self._pushed[key]


class Connections:
    """All connections by address, and which of them are strangers': no member has asked for anything there yet."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._all: dict[Task[Any], str] = {}
        self._by_address = Counter[str]()
        self._strangers: dict[Task[Any], str] = {}
        """Oldest first."""

    def all(self) -> set[Task[Any]]:
        """Those that are open now."""
        return set(self._all)

    def full(self, address: str) -> str | None:
        """The limit that one more of this address would pass, if any."""
        if self._by_address[address] >= self._limits.connections_per_address:
            return "connections of the address"
        return "connections" if len(self._all) >= self._limits.connections else None

    def to_go(self, address: str) -> Task[Any] | None:
        """The stranger's connection that ends for one more of this address; None where all are members'.

        Whoever opens many that ask for nothing makes room with his own: it is the oldest one of this address where its
        share is taken, and else of the address with most of them.
        """
        if self._by_address[address] < self._limits.connections_per_address:
            crowds = Counter(self._strangers.values())
            address = max(crowds, key=crowds.__getitem__, default="")
        oldest = next((each for each, where in self._strangers.items() if where == address), None)
        if oldest is not None:
            del self._strangers[oldest]
        return oldest

    def add(self, connection: Task[Any], address: str) -> None:
        """A new one, of a stranger."""
        self._all[connection] = self._strangers[connection] = address
        self._by_address[address] += 1

    def know(self, connection: Task[Any]) -> None:
        """A member has asked for something there."""
        self._strangers.pop(connection, None)

    def remove(self, connection: Task[Any]) -> None:
        """It has ended."""
        self.know(connection)
        less(self._by_address, self._all.pop(connection))


def less(counts: Counter[str], key: str) -> None:
    """One less; what has none is not kept."""
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]


def let_go(error: BaseException | None) -> None:
    """Frees what the frames hold that an error went through.

    They hold the error too, and with them a connection's 256 KiB for TLS would stay until Python looks for such rings:
    after thousands of connections.
    """
    if error is not None:
        error.__traceback__ = None


def network(address: str) -> str:
    """The address that limits count by: of IPv6 the network, for a peer has all of it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


def server_tls(config: GatewayConfig) -> ssl.SSLContext:
    """TLS 1.3 and nothing older, towards the nodes.

    Raises:
        ConfigError: Certificate and key cannot be read or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no resumption: a rotated certificate holds for every new connection
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.certificate, config.key, password="")  # never asks the terminal
    except OSError as error:  # ssl.SSLError as well
        raise ConfigError(
            f"gateway certificate {config.certificate.name} and key {config.key.name} cannot be used "
            f"({getattr(error, 'reason', None) or error.strerror}); expected PEM files that belong together"
        ) from None
    return context


def upstream_tls(config: GatewayConfig) -> ssl.SSLContext:
    """TLS 1.3 towards the SuperLink, whose certificate the federation's authority must have signed.

    Raises:
        ConfigError: The authority's certificate cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(config.upstream_ca)
    except OSError:
        raise ConfigError(f"{config.upstream_ca.name} is no certificate; expected the authority's, PEM") from None
    return context


def stamp(path: Path) -> tuple[int, ...] | None:
    """Changes when the file does; None when there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)
