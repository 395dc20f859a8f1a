"""The coordinator's only open port: TLS 1.3, known nodes, Flower's fleet routes, weights, and nothing else.

Flower's SuperLink serves its Control and Runtime APIs on the same port as the Fleet API, without authentication, and
reads bodies without a limit. So it listens on loopback alone and this stands in front of it. A request is parsed,
judged before its body is read, and written anew for the SuperLink: only listed headers pass, on a connection of
its own, so nothing that a peer sends can be taken for a second request. Weights are answered here, out of the folder
of `server.blobs`, under the same keys and limits.

What Flower's nodes do with a refusal decides the status (flwr 1.41, `supercore/retry/http_retry.py`): after 502, 503,
504 or a broken connection they come back; 401 ends the node, 403 its run, and any other status the task at hand. A
node over its limits therefore gets 503, and one that is too slow a broken connection.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import itertools
import json
import logging
import logging.handlers
import resource
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import h11

from common.bell import Bell
from common.blobs import BELL_PATH, PATH
from common.clock import utc_now
from common.config import validate_json
from common.errors import ConfigError, FedicomError
from common.storage import storing, to_system, write_whole
from server.blobs import Shelf
from server.gateway_beside import Beside, Entry, Listeners, Refused, Requests, log
from server.gateway_rules import (
    ANSWERS,
    BELL_ROUTE,
    BLOB_ROUTE,
    FLEET_ROUTES,
    KEY,
    REQUEST_HEADERS,
    RESPONSE_HEADERS,
    SIGNATURE,
    TIMESTAMP,
    Answers,
    Buckets,
    Connections,
    GatewayConfig,
    GatewayLimits,
    GatewayStats,
    RegistryKeys,
    flower_header,
    less,
    let_go,
    network,
    server_tls,
    stamp,
    unlike,
    upstream_tls,
)

__all__ = ["Gateway", "GatewayConfig", "GatewayLimits", "GatewayStats", "RegistryKeys", "flower_header", "serve"]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
_CHUNK_BYTES = 1 << 16
_LINGER_S, _LINGER_BYTES = 1.0, 1 << 18
_ACCEPTS = 64
"""Connections that are taken in one turn of the loop."""
_RESET, _NO_RESET = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
"""Of SO_LINGER."""
_STATS_EVERY_S = 5.0
_REPEAT_S = 60.0


class Gateway:
    """A gateway; it runs in a thread of its own between `start` and `stop`, or in this one with `run`."""

    def __init__(self, config: GatewayConfig, allowed: Callable[[], Mapping[str, str]] | None = None) -> None:
        """`allowed` gives `flwr-public-key` -> site at every request; without it the registry file is asked.

        Raises:
            ConfigError: A certificate or key cannot be used.
        """
        limits = config.limits
        self.config, self.limits, self.stats = config, limits, GatewayStats()
        self.requests = Requests(self.stats)
        self.port = config.listen_port
        self.stopping = False
        self.idle: set[asyncio.Task[Any]] = set()
        """Connections in the handshake or between requests: a stop ends them at once."""
        self.nodes: Counter[str] = Counter()
        """Connections by key."""
        self.node_requests = Buckets(limits.requests_per_s_per_node, limits.request_burst_per_node)
        self.turns = defaultdict[bytes, asyncio.Semaphore](partial(asyncio.Semaphore, limits.requests_at_once_per_node))
        """At the SuperLink, by key."""
        self.answers = Answers(limits.answer_bytes)
        self.refusals = Buckets(limits.refusals_per_s_per_address, limits.refusal_burst_per_address)
        self.shelf = Shelf(config.blobs) if config.blobs is not None else None
        self.listeners = Listeners(Bell(config.sent_bell)) if config.sent_bell is not None else None
        self.answered = Bell(config.answered_bell) if config.answered_bell is not None else None
        self._allowed = allowed or RegistryKeys(config.registry, config.authority)
        self._said: dict[str, float] = {}
        self._tls_stamp = (stamp(config.certificate), stamp(config.key))
        self._tls = server_tls(config)
        self._upstream_tls = upstream_tls(config)
        self.connections = Connections(limits)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._saving = threading.Lock()

    def start(self) -> Gateway:
        """Listens when it returns; `port` is the real one.

        Raises:
            OSError: The address is taken.
        """
        ready: Future[None] = Future()

        def work() -> None:
            try:
                asyncio.run(self.run(ready))
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)

        self._thread = threading.Thread(target=work, name="gateway", daemon=True)
        self._thread.start()
        ready.result()
        return self

    def stop(self) -> None:
        """Refuses new connections, gives requests under way `stop_s`, and returns when all is closed."""
        if self._thread is not None and self._loop is not None:
            with suppress(RuntimeError):  # its loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    async def run(self, ready: Future[None] | None = None) -> None:
        """Serves until `stop`, SIGTERM or SIGINT; the signals are taken in the main thread only."""
        host, port = self.config.listen_host, self.config.listen_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
        listener.setblocking(False)
        self._loop, self.port = asyncio.get_running_loop(), listener.getsockname()[1]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._stop.set)
        stop = asyncio.create_task(self._stop.wait())
        helpers = [asyncio.create_task(self._accept(listener)), asyncio.create_task(self._write_stats())]
        if self.listeners is not None:
            helpers.append(asyncio.create_task(self.listeners.watch()))
        if ready is not None:
            ready.set_result(None)
        self.say(f"listening on port {self.port}", logging.INFO)
        try:
            await asyncio.wait([stop, *helpers], return_when=asyncio.FIRST_COMPLETED)
            for helper in helpers:
                if helper.done():
                    helper.result()  # neither ends but by a defect, which must not stay silent
        finally:
            self.stopping = True
            listener.close()
            for task in (stop, *helpers, *self.idle):
                task.cancel()
            if tasks := self.connections.all():
                await asyncio.wait(tasks, timeout=self.limits.stop_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(stop, *helpers, *tasks, return_exceptions=True)
            self._save_stats()
            self.requests.tell()

    def keys(self) -> Mapping[str, str]:
        """Who is allowed now.

        Raises:
            Refused: 503: nobody, for it cannot be known.
        """
        try:
            return self._allowed()
        except Exception as error:  # whatever is wrong: fail closed, and nodes come back when it is repaired
            self.say(f"nobody is let in: {error}")
            raise Refused(503, "registry unreadable") from None

    def say(self, message: str, level: int = logging.ERROR) -> None:
        """Logs what is no request; the same message once a minute."""
        now = time.monotonic()
        if now - self._said.get(message, -_REPEAT_S) >= _REPEAT_S:
            self._said = {text: at for text, at in self._said.items() if now - at < _REPEAT_S} | {message: now}
            log.log(level, json.dumps({"time": utc_now("milliseconds"), "message": message}))

    async def upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection to the SuperLink; none is ever shared by two requests.

        Raises:
            Refused: 502: it does not answer, or is not the one that the authority certified.
        """
        config = self.config
        try:
            async with asyncio.timeout(self.limits.connect_s):
                return await asyncio.open_connection(
                    config.upstream_host, config.upstream_port, ssl=self._upstream_tls,
                    server_hostname=config.upstream_name, limit=_CHUNK_BYTES,
                )  # fmt: skip
        except ssl.SSLError as error:
            self.say(f"the SuperLink's TLS was refused: {error.reason}; check its certificate and `upstream_ca`")
            raise Refused(502, "upstream certificate") from None
        except OSError:  # TimeoutError as well
            raise Refused(502, "upstream down") from None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in itertools.count(1):
            if number % _ACCEPTS == 0:
                await asyncio.sleep(0)  # `sock_accept` lets nobody else have a turn while one more waits
            try:
                sock, name = await loop.sock_accept(listener)
            except OSError as error:  # out of file handles, mostly
                self.say(f"no connection can be taken: {error.strerror}")
                await asyncio.sleep(0.1)
                continue
            address = network(name[0])
            # Until the handshake is done a close is a reset: Flower's nodes retry that, but give up after a TLS error.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            if not self._room(address):
                sock.close()
                continue
            # asyncio does this for sockets that it accepts itself; without it an answer may wait 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._connection(sock, address))
            self.connections.add(task, address)
            self.stats.connection(+1)
            self.idle.add(task)
            task.add_done_callback(partial(self._closed, sock))

    def _room(self, address: str) -> bool:
        """Whether one more connection is taken; where there is no room, a stranger has to go for it."""
        if (why := self.connections.full(address)) is None:
            return True
        self.stats.refused(why)
        if (stranger := self.connections.to_go(address)) is None:
            return False
        stranger.cancel()
        return True

    def _closed(self, sock: socket.socket, task: asyncio.Task[Any]) -> None:
        sock.close()  # of one that had to go before its first turn
        self.connections.remove(task)
        self.idle.discard(task)
        self.stats.connection(-1)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stats.refused("internal")
            self.say(f"a connection ended with {type(error).__name__}; please report it")

    async def _connection(self, sock: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=self._current_tls(),
                ssl_handshake_timeout=self.limits.handshake_s, ssl_shutdown_timeout=_LINGER_S,
            )  # fmt: skip
        except OSError as error:  # ssl.SSLError and timeouts are of this family
            self.stats.refused("handshake")
            let_go(error)
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_RESET)
        transport.set_write_buffer_limits(high=4 * _CHUNK_BYTES)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        conversation = _Conversation(self, address, reader, writer)
        try:
            await conversation.run()
        except asyncio.CancelledError:
            if not self.stopping:  # it made room for another one: there is no time for a farewell
                transport.abort()
            raise
        finally:
            conversation.release()
            writer.close()
            with suppress(OSError):
                async with asyncio.timeout(2 * _LINGER_S):
                    await writer.wait_closed()
            transport.abort()
            let_go(reader.exception())

    def _current_tls(self) -> ssl.SSLContext:
        now = (stamp(self.config.certificate), stamp(self.config.key))
        if now != self._tls_stamp:
            self._tls_stamp = now
            try:
                self._tls = server_tls(self.config)
            except ConfigError as error:  # half of a new pair is there, or none: go on with the old one
                self.say(str(error))
        return self._tls

    async def _write_stats(self) -> None:
        while True:
            await asyncio.to_thread(self._save_stats)
            self.requests.tell()
            await asyncio.sleep(_STATS_EVERY_S)

    def _save_stats(self) -> None:
        if self.config.stats is not None:
            plain = {"time": utc_now("milliseconds"), "port": self.port, **self.stats.snapshot()}
            try:
                with self._saving:
                    write_whole(self.config.stats, (json.dumps(plain) + "\n").encode(), to_system)
            except FedicomError as error:  # a full disk must not close the door
                self.say(str(error))


class _Conversation(Beside):
    """One connection after its handshake: request after request, until one is refused or the peer is silent."""

    def __init__(
        self, gateway: Gateway, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._gateway, self._limits, self._address = gateway, gateway.limits, address
        self._reader, self._writer = reader, writer
        self._http = self._fresh()
        self._node: str | None = None
        self._served = 0

    async def run(self) -> None:
        """Returns when the connection is to be closed."""
        while not self._gateway.stopping and await self._turn():
            self._served += 1
            if self._beyond is None:
                self._http.start_next_cycle()
            else:
                self._http, rest, self._beyond = self._fresh(), self._beyond, None
                if rest:
                    self._http.receive_data(rest)

    def _fresh(self) -> h11.Connection:
        return h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes)

    def release(self) -> None:
        """Gives the connection back to its node's share."""
        if self._node is not None:
            less(self._gateway.nodes, self._node)
            self._node = None

    async def _turn(self) -> bool:
        """Answers one request; whether another may follow."""
        entry = Entry(self._address, began=time.monotonic())
        task = asyncio.current_task()
        assert task is not None
        try:
            self._gateway.idle.add(task)
            request = await self._head()
            self._gateway.idle.discard(task)
            if request is None:
                return False
            entry.began = time.monotonic()
            fields = self._admit(request, entry)
            self._gateway.connections.know(task)
            if entry.route == PATH:
                await self._blob(request, fields, entry)
            elif entry.route == BELL_PATH:
                await self._listen(request, entry, task)
            else:
                async with self._gateway.turns[fields[KEY]]:
                    await self._relay(request, fields, entry)
                if self._gateway.answered is not None and entry.route in ANSWERS and entry.status == 200:
                    self._gateway.answered.ring()
        except Refused as refused:
            await self._refuse(refused, entry)
        finally:
            if self._node is not None:
                given = entry.sent if entry.status == 200 else 0  # an error has a body as well, and is no question
                self._gateway.answers.note(self._node, entry.route, entry.received, given)
            if entry.status:
                self._gateway.requests.note(entry)
        whole = self._http.their_state is h11.DONE or self._beyond is not None
        return self._http.our_state is h11.DONE and whole

    async def _head(self) -> h11.Request | None:
        """The next request's line and headers, or None if the peer left."""
        begun = not self._served
        try:
            async with asyncio.timeout(self._limits.header_s if begun else self._limits.idle_s) as deadline:
                while (event := self._next_event()) is h11.NEED_DATA:
                    data = await self._reader.read(_CHUNK_BYTES)
                    if data and not begun:
                        begun = True
                        deadline.reschedule(asyncio.get_running_loop().time() + self._limits.header_s)
                    self._http.receive_data(data)
        except TimeoutError:
            if begun:
                raise Refused(408, "slow headers", answer=False) from None
            return None
        except OSError:
            return None
        return event if isinstance(event, h11.Request) else None

    def _admit(self, request: h11.Request, entry: Entry) -> dict[bytes, bytes]:
        """Judges a request by its head alone.

        Returns:
            Its headers; those that pass on stood there once.

        Raises:
            Refused: It goes no further.
        """
        method, target = request.method.decode("ascii"), request.target.decode("ascii")
        entry.method = method if method in _METHODS else "-"
        blob = BLOB_ROUTE.fullmatch(target)
        if blob is not None and (method == "GET" or (method == "PUT" and blob[2])):
            entry.route = PATH
        elif method == "GET" and self._gateway.listeners is not None and BELL_ROUTE.fullmatch(target):
            entry.route = BELL_PATH
        elif (method, target) in FLEET_ROUTES:  # the raw target: no decoding, no query, no dot segments
            entry.route = target
        else:
            raise Refused(404, "route")
        if sum(len(name) + len(value) + 4 for name, value in request.headers) > self._limits.header_bytes:
            raise Refused(431, "header size")
        fields: dict[bytes, bytes] = {}
        for name, value in request.headers:
            if name in fields and name in REQUEST_HEADERS:
                raise Refused(400, "header twice")
            fields[name] = value
        if b"upgrade" in fields or {b"transfer-encoding", b"content-length"} <= fields.keys():
            raise Refused(400, "framing")
        key = fields.get(KEY, b"").decode("latin-1")
        site = self._gateway.keys().get(key)
        if site is None:
            raise Refused(401, "unknown key" if key else "no key")
        signed = (method, target) if entry.route in (PATH, BELL_PATH) else None
        if wrong := unlike(key, fields.get(TIMESTAMP, b""), fields.get(SIGNATURE, b""), signed):
            raise Refused(401, wrong)
        entry.site = site
        if not self._gateway.node_requests.take(key):
            raise Refused(503, "requests of the node")
        if not self._gateway.answers.room(key, entry.route):
            raise Refused(413, "answer size")
        if self._node != key:
            self.release()
            if self._gateway.nodes[key] >= self._limits.connections_per_node:
                raise Refused(503, "connections of the node")
            self._gateway.nodes[key] += 1
            self._node = key
        if int(fields.get(b"content-length", b"0")) > self._limits.body_bytes:
            raise Refused(413, "body size")
        return fields

    async def _relay(self, request: h11.Request, fields: Mapping[bytes, bytes], entry: Entry) -> None:
        """Passes the request to the SuperLink and its answer back, piece by piece."""
        names = (*REQUEST_HEADERS, b"content-length", b"transfer-encoding")
        headers = [(name, fields[name]) for name in names if name in fields]
        headers += [(b"host", self._gateway.config.upstream_name.encode()), (b"connection", b"close")]
        first: tuple[h11.Event, ...] = (h11.Request(method=request.method, target=request.target, headers=headers),)
        reader, writer = await self._gateway.upstream()
        try:
            upstream = h11.Connection(h11.CLIENT)
            if self._http.they_are_waiting_for_100_continue:
                self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            # The head leaves with what comes first of the body: who answers a head alone, with an error, closes a line
            # that is still written to, and a reset takes the answer with it.
            async for data in self._body(entry):
                await self._ask(upstream, writer, *first, h11.Data(data=data))
                first = ()
            await self._ask(upstream, writer, *first, h11.EndOfMessage())
            async with asyncio.timeout(self._limits.response_s):
                await self._response(upstream, reader, entry)
        except TimeoutError:
            raise Refused(504, "slow response", answer=not entry.status) from None
        except (OSError, h11.RemoteProtocolError):
            raise Refused(502, "upstream broke", answer=not entry.status) from None
        finally:
            writer.transport.abort()

    async def _ask(self, upstream: h11.Connection, writer: asyncio.StreamWriter, *events: h11.Event) -> None:
        writer.write(b"".join(upstream.send(event) or b"" for event in events))
        async with asyncio.timeout(self._limits.response_s):
            await writer.drain()

    async def _response(self, upstream: h11.Connection, reader: asyncio.StreamReader, entry: Entry) -> None:
        """Never holds more of the answer than a few pieces."""
        while True:
            while (event := upstream.next_event()) is h11.NEED_DATA:
                upstream.receive_data(await reader.read(_CHUNK_BYTES))
            if isinstance(event, h11.Response):
                entry.status = event.status_code
                headers = [(name, value) for name, value in event.headers if name in RESPONSE_HEADERS]
                if self._gateway.stopping:
                    headers.append((b"connection", b"close"))
                self._send(h11.Response(status_code=event.status_code, headers=headers, reason=b""))
            elif isinstance(event, h11.Data):
                self._send(h11.Data(data=event.data))
                entry.sent += len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._send(h11.EndOfMessage())
            try:
                await self._writer.drain()
            except OSError:
                raise Refused(499, "gone", answer=False) from None
            if isinstance(event, h11.EndOfMessage):
                return

    async def _refuse(self, refused: Refused, entry: Entry) -> None:
        entry.counted = entry.site == "-" and not self._gateway.refusals.take(self._address)
        status = 429 if entry.counted and refused.status != 503 else refused.status  # 503: a member may be meant
        entry.status, entry.refused = entry.status or status, refused.why
        if not refused.answer or self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._writer.transport.abort()
            return
        # The date lets a site's preflight compare clocks.
        headers = [(b"date", formatdate(usegmt=True).encode()), (b"content-length", b"0"), (b"connection", b"close")]
        left = 0 if self._http.they_are_waiting_for_100_continue else _LINGER_BYTES
        self._send(h11.Response(status_code=status, headers=headers, reason=b""))
        self._send(h11.EndOfMessage())
        # A close with unread bytes resets the line and may take the answer with it: discard a little, briefly.
        with suppress(OSError, h11.RemoteProtocolError):
            async with asyncio.timeout(_LINGER_S):
                while left > 0 and self._http.their_state is h11.SEND_BODY:
                    if self._http.next_event() is h11.NEED_DATA:
                        data = await self._reader.read(_CHUNK_BYTES)
                        left -= len(data)
                        self._http.receive_data(data)


def serve(config: GatewayConfig) -> None:
    """Runs a gateway until SIGTERM or SIGINT; requests under way are given `stop_s`.

    Raises:
        ConfigError: A certificate cannot be used, the address is taken, or too few files may be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each connection may have one to the SuperLink, and those of strangers who make room end a little later.
    need = 3 * config.limits.connections + 64
    if hard != resource.RLIM_INFINITY and hard < need:
        raise ConfigError(f"{hard} files may be open, {need} are needed; raise `ulimit -n` or lower `connections`")
    if soft != resource.RLIM_INFINITY and soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    handler: logging.Handler = logging.StreamHandler()
    if config.access_log is not None:
        with storing(config.access_log.name):
            handler = logging.handlers.WatchedFileHandler(config.access_log)  # logrotate may move the file away
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        asyncio.run(Gateway(config).run())
    except OSError as error:
        where = f"{config.listen_host} port {config.listen_port}"
        raise ConfigError(f"the gateway cannot listen on {where}: {error.strerror}; {_advice(error)}") from None


def _advice(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "stop what is there"
        case errno.EACCES | errno.EPERM:
            return (
                "a port below 1024 needs CAP_NET_BIND_SERVICE; give that, or choose another `port` in server.yaml and "
                "have the one that sites call forwarded to it"
            )
        case _:
            return "`listen` in server.yaml is an address of this machine, or 0.0.0.0 for all"


def main() -> None:
    """`python -m server.gateway --config FILE`."""
    parser = argparse.ArgumentParser(prog="python -m server.gateway", description="The coordinator's gateway.")
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the fields of GatewayConfig")
    path = parser.parse_args().config
    try:
        with storing(path.name):
            text = path.read_bytes()
        serve(validate_json(GatewayConfig, text))
    except FedicomError as error:
        raise SystemExit(f"fedicom: {error}") from None


if __name__ == "__main__":
    main()
