"""What a site asks the gateway for beside Flower's messages: weights, and whether there is a message.

Only outgoing calls, to the same address, under the same authority and node key. What a call for weights did not bring
is asked again, for as long as something moves.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from client.reach import proxy_login, proxy_of, tls
from common.blobs import BELL_PATH, DIGEST, MARK, PATH, TICKET, signed_request
from common.deployment import SiteHome
from common.errors import FedicomError
from common.identity import NodeKey

log = logging.getLogger(__name__)

_STALLED_S = 900.0
"""Longest that weights may stand still."""
_PAUSE_S = (0.1, 5.0)
_CALL_S = 60.0
"""Longest that a call may stand still."""
_SILENT_S = 10.0
"""Before a gateway that does not ring is asked for it again."""
_BLOCK_BYTES = 1 << 20
"""Of an answer that is read at a time."""
_SENT_BYTES = 1 << 18
"""Of a body that is handed to the system at a time, and that may wait there unsent: a piece takes longer than a call
may stand still where the line is slow, or is shared by many sites."""
_ANY_CALL = "/v1/fleet/get-run"
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class LostError(FedicomError):
    """Weights could not be fetched or sent. No refusal: the coordinator may ask again."""


class Remote:
    """The gateway's weights, as this site may read and write them."""

    def __init__(self, home: SiteHome, stop: threading.Event) -> None:
        """Opens no connection yet.

        Args:
            stop: Ends a wait.

        Raises:
            ConfigError: site.yaml does not hold.
            StorageError: The node's key or the authority's certificate cannot be read.
        """
        config = home.config
        self._key, self._stop = NodeKey.load(home.node_key), stop
        self._public = b64encode(self._key.pem).decode()
        self._url, self._pool = f"https://{config.gateway}", _pool(proxy_of(config, os.environ), tls(home.ca))

    def round(self, ticket: str) -> RemoteRound:
        """One round's weights, as `common.blobs.Blobs`."""
        return RemoteRound(self, ticket)

    def call(self, method: str, path: str, content: memoryview | None = None, into: memoryview | None = None) -> bytes:
        """One request that is made again until it is answered.

        Args:
            into: Filled with the answer, which must have this length; else the answer is returned.

        Raises:
            LostError: It is refused, nothing moved for too long, or the node is to stop.
        """
        end, pause_s = time.monotonic() + _STALLED_S, _PAUSE_S[0]
        while True:
            try:
                return self.once(method, path, content, into)
            except _AgainError as error:
                why = str(error)
            except HTTPError as error:
                why = type(error).__name__
            if time.monotonic() > end:
                raise LostError(f"the gateway did not take or give weights for {_STALLED_S:g} s ({why})")
            log.info("weights: %s; again in %.1f s", why, pause_s)
            if self._stop.wait(pause_s):
                raise LostError("the node stops")
            pause_s = min(2 * pause_s, _PAUSE_S[1])

    def once(self, method: str, path: str, content: memoryview | None = None, into: memoryview | None = None) -> bytes:
        """One request.

        Raises:
            LostError: It is refused.
            HTTPError: There was no whole answer.
        """
        headers, body = self._signed(method, path), None
        if content is not None:
            headers["content-length"] = str(len(content))
            body = (content[at : at + _SENT_BYTES] for at in range(0, len(content), _SENT_BYTES))
        answer = self._answer(method, path, headers, body)
        try:
            if answer.status in _AGAIN:
                raise _AgainError(f"status {answer.status}")
            if answer.status != 200:
                raise LostError(_refusal(answer.status))
            if into is None:
                return answer.read()
            at = 0
            while data := answer.read(_BLOCK_BYTES):
                if at + len(data) > len(into):
                    raise LostError("the gateway gave more bytes than the coordinator announced")
                into[at : at + len(data)] = data
                at += len(data)
            if at != len(into):
                raise LostError("the gateway gave fewer bytes than the coordinator announced")
            return b""
        finally:
            answer.close()  # of a connection whose answer was read to its end, nothing but the answer

    def statuses(self) -> tuple[int, int]:
        """What the gateway answers a stranger, and what it answers this node, who ask for a round that never was.

        A member gets 404.

        Raises:
            LostError: There was no answer.
        """
        path = f"{PATH}{'0' * 32}"
        found = []
        for headers in ({}, self._signed("GET", path)):
            try:
                answer = self._answer("GET", path, headers)
            except HTTPError as error:
                raise LostError(f"the gateway did not answer a signed request ({type(error).__name__})") from None
            found.append(answer.status)
            answer.close()
        return found[0], found[1]

    def behind(self) -> int:
        """What the SuperLink behind the gateway answers to a call of Flower's that names no node, and changes nothing.

        Raises:
            LostError: There was no answer.
        """
        try:
            answer = self._answer("POST", _ANY_CALL, self._signed())
        except HTTPError as error:
            raise LostError(f"the gateway did not answer for the SuperLink ({type(error).__name__})") from None
        answer.close()
        return answer.status

    def _signed(self, method: str = "", path: str = "") -> dict[str, str]:
        """Headers of a request for weights, or, without a path, of one of Flower's calls."""
        timestamp = datetime.now(UTC).isoformat()
        data = signed_request(method, path, timestamp) if path else timestamp.encode()
        signature = bytes.fromhex(self._key.sign(data))
        return {
            "flwr-public-key": self._public,
            "flwr-timestamp": timestamp,
            "flwr-signature": b64encode(signature).decode(),
        }

    def _answer(
        self, method: str, path: str, headers: Mapping[str, str], body: Iterable[memoryview] | None = None
    ) -> BaseHTTPResponse:
        return self._pool.urlopen(
            method, self._url + path, body=body, headers=headers, preload_content=False, decode_content=False,
            redirect=False,
        )  # fmt: skip


class _AgainError(LostError):
    """The gateway asks to come again."""


class Doorbell:
    """Lets a node wait for the coordinator's next message instead of asking every other moment."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._mark, self._again_at = remote, "0" * 16, 0.0

    def wait(self) -> bool:
        """Returns when there may be a message, within half a minute; False at once where no gateway rings."""
        if time.monotonic() < self._again_at:
            return False
        try:
            mark = self._remote.once("GET", BELL_PATH + self._mark).decode("ascii")
            if not MARK.fullmatch(mark):
                raise LostError("no mark")
        except (LostError, HTTPError, UnicodeDecodeError):
            self._again_at = time.monotonic() + _SILENT_S
            return False
        self._mark = mark
        return True


class RemoteRound:
    """One round's weights at the gateway."""

    most_bytes = 1 << 33
    """As many as a message may name; the coordinator signs for it."""

    def __init__(self, remote: Remote, ticket: str) -> None:
        """Nothing is asked yet; `ticket` is the coordinator's word."""
        if not TICKET.fullmatch(ticket):
            raise LostError("the ticket of a round is no word of 32 hexadecimal digits")
        self._remote, self.ticket = remote, ticket
        self._held: frozenset[str] | None = None

    def put(self, name: str, piece: memoryview) -> None:
        """Sends a piece, unless an earlier attempt has."""
        if self._held is None:
            self._held = self._list()
        if name not in self._held:
            self._remote.call("PUT", f"{PATH}{self.ticket}/{name}", content=piece)

    def get(self, name: str, piece: memoryview) -> None:
        """Fetches a piece of the model."""
        self._remote.call("GET", f"{PATH}{self.ticket}/{name}", into=piece)

    def _list(self) -> frozenset[str]:
        try:
            told = json.loads(self._remote.call("GET", f"{PATH}{self.ticket}"))
        except ValueError:
            told = None
        if not isinstance(told, list):
            raise LostError("the gateway does not say what it has")
        return frozenset(each for each in told if isinstance(each, str) and DIGEST.fullmatch(each))


def _pool(proxy: str | None, context: ssl.SSLContext) -> PoolManager:
    # Of large answers httpx passes on every 16 KiB alone, ten times the cost of the bytes themselves.
    options = [*HTTPConnection.default_socket_options, (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _SENT_BYTES)]
    given: dict[str, Any] = {"ssl_context": context, "retries": False, "timeout": _CALL_S, "socket_options": options}
    made: PoolManager
    if proxy is None:
        made = PoolManager(**given)
    else:
        # not by urllib3's `make_headers`, which knows no name or password beyond Latin-1
        login = {"proxy-authorization": word} if (word := proxy_login(proxy)) else {}
        made = ProxyManager(proxy, proxy_headers=login, **given)
    made.pool_classes_by_scheme = {"http": HTTPConnectionPool, "https": _Lines}
    return made


class _Line(HTTPSConnection):
    def send(self, data: Any) -> None:
        try:
            super().send(data)
        except ssl.SSLEOFError:
            # A gateway that refuses a body unread answers and closes; after this error urllib3 looks for the answer.
            raise BrokenPipeError from None


class _Lines(HTTPSConnectionPool):
    ConnectionCls = _Line


def _refusal(status: int) -> str:
    if status == 404:
        return "the coordinator asks this site for no weights any more: the round has ended, or begun anew"
    if status == 401:
        return "the gateway does not know this node's key, or the clocks differ"
    return f"the gateway refused weights (status {status})"
