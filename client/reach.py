"""What a node's machine can reach: the gateway, under TLS 1.3 and the federation's own authority, and nothing else."""

from __future__ import annotations

import os
import re
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import unquote, urlsplit

from client.machine import Line
from common.chain import TOLERANCE_S
from common.deployment import SiteConfig, SiteHome
from common.errors import ConfigError
from common.identity import AUTHORITY_ENDS, expiring

_CONNECT_S, _PROBE_S = 10.0, 2.0
_CLOCK_WARN_S = 30.0
_DATES = (9, 10)
"""OpenSSL's codes for a certificate that is not valid yet, and for one that has expired."""
_NAMES = (62, 64)
"""For one of another host name, or of another address."""
_ROUTE = "/v1/fleet/pull-messages"
REFUSALS = (401, 403, 429)
"""What the gateway answers those whose key it does not know."""
NOTHING_BEHIND = (502, 503, 504)
"""What a gateway answers that has no SuperLink to ask."""
COORDINATOR = "coordinator"
"""What a line is about that says so: nobody at the site can mend it."""
_OTHER_PORTS = (22, 80, 443, 8000, 8080, 9091, 9092, 9093)
"""Of the gateway's host: shells, web servers, and Flower's own ports."""
_OTHER_HOSTS = (("1.1.1.1", 443), ("8.8.8.8", 53), ("9.9.9.9", 853))
"""Well-known public addresses; a connection is opened and closed, nothing is sent."""


def gateway(home: SiteHome) -> Iterator[Line]:
    """Name, proxy, TLS, refusal of strangers, clock: in this order, as far as it goes."""
    config = home.config
    host, port = split_address(config.gateway)
    proxy = proxy_of(config, os.environ)
    via = f" through the proxy {_shown(proxy)}" if proxy else ""
    first = proxy_address(proxy) if proxy else (host, port)
    try:
        addresses = sorted({str(row[4][0]) for row in socket.getaddrinfo(*first, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):  # the second of a name with an empty part, or a very long one
        what = "the proxy" if proxy else "the gateway"
        yield Line(
            level="FAIL",
            what="DNS",
            says=f"{first[0]} has no address",
            fix=f"check the name of {what} in site.yaml and this machine's name server, or enter it in /etc/hosts",
        )
        return
    if proxy and urlsplit(proxy).scheme != "http":
        yield Line(
            level="warn", what="proxy", says=f"{_shown(proxy)} is spoken to in {urlsplit(proxy).scheme}, which cannot "
            "be checked here", fix="look at `fedicom site status` whether the coordinator is reached",
        )  # fmt: skip
        return
    yield Line(level="ok", what="DNS", says=f"{first[0]} is {', '.join(addresses[:3])}")
    if proxy:
        yield Line(level="ok", what="proxy", says=f"{_shown(proxy)} is used for the gateway")
    try:
        line, status, date = ask_gateway(host, port, home.ca, proxy)
    except OSError as error:
        yield _unreached(error, config.gateway, via, home.ca)
        return
    yield Line(level="ok", what="gateway", says=f"{line}{via}")
    yield _refusal(status)
    yield _clock(date)


def _unreached(error: OSError, address: str, via: str, ca: Path) -> Line:
    if isinstance(error, ssl.SSLCertVerificationError):
        says = f"its certificate does not hold against this federation's authority ({error.verify_message})"
        fix = "if the network inspects TLS, exempt the gateway; else ask the coordinator: somebody may stand between"
        if error.verify_code in _DATES:
            fix = (
                f"look whether {datetime.now(UTC):%Y-%m-%d %H:%M} UTC is right, and set this machine's clock; else ask "
                "the coordinator, who renews it with `fedicom provision rotate gateway`"
            )
            if ended := expiring(ca, 0, then=AUTHORITY_ENDS):  # then a new one of the gateway's would not help
                fix = f"{fix}. {ended}"
        elif error.verify_code in _NAMES:
            fix = f"gateway in site.yaml is {address}: ask the coordinator for the name that it is reached by"
    elif isinstance(error, ssl.SSLError):
        says = f"no TLS 1.3 with {address}{via} ({error.reason})"
        fix = "check the port; a firewall that inspects TLS must let this connection through unopened"
    else:
        says = f"{address} cannot be reached{via} ({error.strerror or type(error).__name__})"
        fix = f"open the firewall for outgoing TCP to {address}, or name the proxy in site.yaml"
    return Line(level="FAIL", what="gateway", says=says, fix=fix)


def _refusal(status: int) -> Line:
    if status in REFUSALS:
        return Line(level="ok", what="gateway", says=f"refuses a stranger ({status})")
    if status in NOTHING_BEHIND:
        return Line(
            level="warn", what=COORDINATOR, says=f"the gateway is there, but nothing behind it ({status})",
            fix="ask the coordinator whether the server runs; the node waits for it",
        )  # fmt: skip
    return Line(
        level="FAIL", what="gateway", says=f"answered a stranger with {status}, expected a refusal (401 or 403)",
        fix="tell the coordinator: this is no Fedicom gateway, or one that is open",
    )  # fmt: skip


def _clock(date: str | None) -> Line:
    try:
        theirs = parsedate_to_datetime(date or "")
        off_s = (datetime.now(UTC) - theirs.astimezone(UTC)).total_seconds()
    except ValueError:
        return Line(
            level="warn", what="clock", says="could not be compared: the gateway tells no time",
            fix="see that this machine keeps time with NTP or chrony",
        )  # fmt: skip
    says = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the gateway's"
    if abs(off_s) > TOLERANCE_S:
        fix = "set the clock, and keep it right with NTP or chrony: the logs of both sides would contradict each other"
        return Line(level="FAIL", what="clock", says=says, fix=fix)
    if abs(off_s) > _CLOCK_WARN_S:
        return Line(level="warn", what="clock", says=says, fix="keep it right with NTP or chrony")
    return Line(level="ok", what="clock", says="agrees with the gateway's")


def ask_gateway(host: str, port: int, ca: Path, proxy: str | None) -> tuple[str, int, str | None]:
    """One request without credentials.

    Returns:
        What the connection is, the status of the answer, and its Date header.

    Raises:
        OSError: There is no connection, or no TLS 1.3 under this authority (`ssl.SSLError`).
    """
    with closing(_connect(host, port, proxy)) as plain, tls(ca).wrap_socket(plain, server_hostname=host) as line:
        request = f"POST {_ROUTE} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        line.sendall(request.encode())
        status, headers = _answer(line)
        return f"{line.version()} with {host}:{port}, signed by the federation's authority", status, headers.get("date")


def tls(ca: Path) -> ssl.SSLContext:
    """How a node speaks with the gateway: TLS 1.3, under the federation's own authority alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca)
    return context


def _connect(host: str, port: int, proxy: str | None) -> socket.socket:
    if proxy is None:
        return socket.create_connection((host, port), timeout=_CONNECT_S)
    line = socket.create_connection(proxy_address(proxy), timeout=_CONNECT_S)
    try:
        login = f"Proxy-Authorization: {word}\r\n" if (word := proxy_login(proxy)) else ""
        line.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n{login}\r\n".encode())
        status, _ = _answer(line)
        if status != 200:
            raise ConnectionRefusedError(None, f"the proxy answered {status}")
    except BaseException:
        line.close()
        raise
    return line


def _answer(line: socket.socket) -> tuple[int, Mapping[str, str]]:
    """Status and headers of an HTTP answer, names in small letters."""
    data = b""
    while b"\r\n\r\n" not in data and len(data) < 1 << 16:
        got = line.recv(4096)
        if not got:
            break
        data += got
    first, *rows = data.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    match = re.match(r"HTTP/1\.[01] (\d{3})", first)
    if match is None:
        raise ConnectionError(None, "the answer is no HTTP")
    headers = (row.partition(":") for row in rows)
    return int(match[1]), {name.strip().lower(): value.strip() for name, _, value in headers}


def elsewhere(config: SiteConfig, others: Sequence[tuple[str, int]] | None) -> Iterator[Line]:
    """Whether anything but the gateway can be reached; a warning where it can, for laptops are no hospitals.

    Args:
        others: Addresses to try; None takes a handful of well-known ones and other ports of the gateway's host.
    """
    host, port = split_address(config.gateway)
    proxy = proxy_of(config, os.environ)
    if others is None:
        others = (*((host, other) for other in _OTHER_PORTS), *_OTHER_HOSTS)
    allowed = {(host, port), proxy_address(proxy) if proxy else None}
    wanted = [place for place in others if place not in allowed]
    with ThreadPoolExecutor(max_workers=8) as pool:
        reached = [place for place, open_ in zip(wanted, pool.map(_open, wanted), strict=True) if open_]
    if not reached:
        yield Line(level="ok", what="elsewhere", says=f"none of {len(wanted)} other addresses can be reached")
        return
    yield Line(
        level="warn",
        what="elsewhere",
        says=f"this machine also reaches {', '.join(f'{name}:{other}' for name, other in reached)}",
        fix=f"the node needs {config.gateway} alone: let the firewall allow no more than that",
    )


def _open(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_PROBE_S).close()
    except (OSError, UnicodeError):
        return False
    return True


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 address may stand in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def proxy_of(config: SiteConfig, environment: Mapping[str, str]) -> str | None:
    """The proxy that every connection to the gateway takes, as a URL; None for a direct one.

    Raises:
        ConfigError: It is no HTTP proxy.
    """
    proxy = config.proxy
    if proxy is None:
        proxy = environment.get("https_proxy") or environment.get("HTTPS_PROXY")
        without = (environment.get("no_proxy") or environment.get("NO_PROXY") or "").replace(" ", "").lower()
        here = ("localhost", "127.0.0.0/8", "::1")  # of this machine no proxy knows the way back
        if any(_excepted(*split_address(config.gateway.lower()), name) for name in (*here, *without.split(","))):
            return None
    if not proxy:
        return None
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        good = urlsplit(url).scheme.lower() in ("http", "https") and proxy_address(url)[0] != ""
    except ValueError:  # its port is no number, or none that there is
        good = False
    if not good:  # not shown: it may hold a password
        raise ConfigError(
            "the proxy is none that can be used, expected http://HOST:PORT or https://HOST:PORT; set proxy in site.yaml"
        )
    return url


def _excepted(host: str, port: int, name: str) -> bool:
    """Whether an entry of NO_PROXY means this place: `*`, an address, a network, or a name and what is below it."""
    name = name.removesuffix(f":{port}").lstrip(".")
    if name == "*":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return bool(name) and f".{host}".endswith(f".{name}")
    try:
        return address in ip_network(name.strip("[]"), strict=False)
    except ValueError:
        return False


def proxy_address(proxy: str) -> tuple[str, int]:
    """Host and port of a proxy's URL."""
    url = urlsplit(proxy)
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def proxy_login(proxy: str) -> str:
    """What is said to a proxy whose URL has a name and a password, in UTF-8; empty for others."""
    url = urlsplit(proxy)
    word = b64encode(f"{unquote(url.username or '')}:{unquote(url.password or '')}".encode()).decode()
    return f"Basic {word}" if url.username else ""


def _shown(proxy: str) -> str:
    """host:port, without the password that the URL may hold."""
    host, port = proxy_address(proxy)
    return f"{host}:{port}"
