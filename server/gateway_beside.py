"""What the gateway answers itself, beside Flower's calls: weights out of the folder of `server.blobs`, and the bell.

And what it writes down of a request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11

from common.bell import LOOK_S, Bell
from common.blobs import BELL_S
from common.clock import utc_now
from server.blobs import Writing
from server.gateway_rules import BELL_ROUTE, BLOB_ROUTE, GatewayLimits, GatewayStats

if TYPE_CHECKING:
    from server.gateway import Gateway

log = logging.getLogger("fedicom.gateway")

_BODY_BYTES = 1 << 19
_BLOCK_BYTES = 1 << 20
"""Of weights: what is read from, or written to the disk at a time, outside the loop."""
_BLOCK_PARTS = 1000
"""The system takes no more than 1,024."""


class Refused(Exception):  # noqa: N818 - the outcome of a request, not an error of ours
    """Ends a connection; with `answer=False` it breaks off without a response."""

    def __init__(self, status: int, why: str, *, answer: bool = True) -> None:
        super().__init__(why)
        self.status, self.why, self.answer = status, why, answer


@dataclass
class Entry:
    """A request as it will stand in the log."""

    address: str
    method: str = "-"
    route: str = "-"
    site: str = "-"
    status: int = 0
    """0: no request came."""
    received: int = 0
    waited_s: float = 0.0
    """For the body."""
    sent: int = 0
    refused: str | None = None
    counted: bool = False
    """Only: a stranger's beyond their rate."""
    began: float = 0.0


class Requests:
    """A line for each request, but for a stranger's beyond their rate: those are counted, or each would cost a line."""

    def __init__(self, stats: GatewayStats) -> None:
        self._stats, self._untold = stats, 0

    def note(self, entry: Entry) -> None:
        """Counts and logs a request."""
        self._stats.request(entry.site, entry.status, entry.received, entry.sent)
        line = {
            "time": utc_now("milliseconds"), "site": entry.site, "address": entry.address, "method": entry.method,
            "route": entry.route, "status": entry.status, "bytes_in": entry.received, "bytes_out": entry.sent,
            "seconds": round(time.monotonic() - entry.began, 4),
        }  # fmt: skip
        if entry.refused is not None:
            self._stats.refused(entry.refused)
            line["refused"] = entry.refused
        if entry.counted:
            self._untold += 1
        else:
            log.info(json.dumps(line))

    def tell(self) -> None:
        """Logs how many were counted alone since the last call."""
        if self._untold:
            message = f"{self._untold} more requests without a member's credentials were refused"
            log.warning(json.dumps({"time": utc_now("milliseconds"), "message": message}))
            self._untold = 0


class Listeners:
    """The nodes that wait for the bell; one look at it does for all of them."""

    def __init__(self, bell: Bell) -> None:
        self._bell, self.count, self._rung = bell, 0, asyncio.Event()

    async def wait(self, mark: str) -> str:
        """Waits until the coordinator has sent something after `mark` was taken, or for `BELL_S`; the mark by then."""
        self.count += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(BELL_S):
                    while (now := self._bell.mark) == mark:
                        await self._rung.wait()
                    return now
        finally:
            self.count -= 1
        return mark

    async def watch(self) -> None:
        """Looks at the bell while somebody waits; never ends."""
        last = ""
        while True:
            await asyncio.sleep(LOOK_S if self.count else 5 * LOOK_S)
            if self.count and (mark := self._bell.mark) != last:
                last = mark
                self._rung.set()
                self._rung = asyncio.Event()


class Beside:
    """The part of a connection that reads bodies, and answers requests for weights and for the bell."""

    _gateway: Gateway
    _limits: GatewayLimits
    _http: h11.Connection
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _beyond: bytes | None = None
    """What came after a body that was taken past h11."""

    def _send(self, event: h11.Event) -> None:
        self._writer.write(self._http.send(event) or b"")

    def _next_event(self) -> Any:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, "malformed") from None

    async def _body(self, entry: Entry) -> AsyncIterator[bytes]:
        """The request's body; its bytes, and the time that the peer takes for them, are limited."""
        while True:
            while (event := self._next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._more(entry))
            if not isinstance(event, h11.Data):
                return
            entry.received += len(event.data)
            if entry.received > self._limits.body_bytes:
                raise Refused(413, "body size")
            yield bytes(event.data)

    async def _plain_body(self, size: int, entry: Entry) -> AsyncIterator[bytes]:
        """`_body` of a known length, past h11, on whose way each byte would be copied three times."""
        data, _ = self._http.trailing_data
        while True:
            part = data[: size - entry.received]
            entry.received += len(part)
            yield part
            if entry.received == size:
                self._beyond = data[len(part) :]
                return
            data = await self._more(entry)

    async def _more(self, entry: Entry) -> bytes:
        """What comes next of a body."""
        limits, loop = self._limits, asyncio.get_running_loop()
        allowed_s = min(limits.body_s, limits.body_grace_s + entry.received / limits.body_bytes_per_s)
        began = loop.time()
        try:
            async with asyncio.timeout(allowed_s - entry.waited_s):
                data = await self._reader.read(_BODY_BYTES)
        except TimeoutError:
            raise Refused(408, "slow body", answer=False) from None
        except OSError:
            data = b""
        if not data:
            raise Refused(499, "gone", answer=False)
        entry.waited_s += loop.time() - began
        return data

    async def _blob(self, request: h11.Request, fields: Mapping[bytes, bytes], entry: Entry) -> None:
        """Answers a request for weights."""
        shelf, found = self._gateway.shelf, BLOB_ROUTE.fullmatch(request.target.decode("ascii"))
        if shelf is None:  # said to members alone: by this a site's preflight sees that it is one
            raise Refused(404, "no such round")
        assert found is not None
        ticket, name = found.groups()
        if request.method == b"PUT":
            if b"content-length" not in fields:
                raise Refused(411, "no length")
            size = int(fields[b"content-length"])
            with shelf.writing(ticket, entry.site, name, size) as room:
                await self._receive(room, size, entry)
            await self._say(200, entry)
            return
        async for _ in self._body(entry):
            raise Refused(400, "body")
        if name is None:
            if (held := shelf.held(ticket, entry.site)) is None:
                raise Refused(404, "no such round")
            await self._say(200, entry, json.dumps(held).encode())
        elif (path := shelf.readable(ticket, entry.site, name)) is None:
            raise Refused(404, "no such weights")
        else:
            await self._give(path, entry)

    async def _listen(self, request: h11.Request, entry: Entry, task: asyncio.Task[Any]) -> None:
        """Answers when the coordinator has sent something; a stop of the gateway does not wait for that."""
        listeners, found = self._gateway.listeners, BELL_ROUTE.fullmatch(request.target.decode("ascii"))
        assert listeners is not None
        assert found is not None
        async for _ in self._body(entry):
            raise Refused(400, "body")
        self._gateway.idle.add(task)
        mark = await listeners.wait(found[1])
        self._gateway.idle.discard(task)
        await self._say(200, entry, mark.encode())

    async def _receive(self, room: Writing | int, size: int, entry: Entry) -> None:
        """Takes a piece, which gets its name when it is whole: the run alone can tell whether it is the right one."""
        if self._http.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        if isinstance(room, int):
            async for _ in self._body(entry):
                pass  # a node, or nginx for it, that is cut off while it sends would come again
            if room != 200:  # it is here already
                raise Refused(room, {404: "no such round", 503: "weights under way"}.get(room, "weights size"))
            return
        block, kept = list[bytes](), 0
        try:
            with room.part.open("xb", buffering=0) as file:
                async for data in self._plain_body(size, entry):
                    block.append(data)
                    full = entry.received - kept >= _BLOCK_BYTES or len(block) == _BLOCK_PARTS
                    if full or entry.received == size:
                        await asyncio.to_thread(_keep, os.dup(file.fileno()), block)
                        block, kept = [], entry.received
            room.done()
        except OSError as error:  # a full disk, mostly, or the round has ended
            self._gateway.say(f"weights cannot be written: {error.strerror}")
            raise Refused(503, "disk") from None

    async def _give(self, path: Path, entry: Entry) -> None:
        try:
            with path.open("rb", buffering=0) as file:
                size = path.stat().st_size
                self._begin(200, entry, size)
                async with asyncio.timeout(self._limits.response_s):
                    while entry.sent < size:
                        data = await asyncio.to_thread(file.read, _BLOCK_BYTES)
                        if not data:
                            raise Refused(502, "weights cut short", answer=False)
                        self._send(h11.Data(data=data))
                        entry.sent += len(data)
                        await self._writer.drain()
                self._send(h11.EndOfMessage())
                await self._writer.drain()
        except TimeoutError:
            raise Refused(504, "slow response", answer=False) from None
        except OSError:
            gone = not entry.status
            raise Refused(404 if gone else 499, "no such weights" if gone else "gone", answer=gone) from None

    async def _say(self, status: int, entry: Entry, text: bytes = b"") -> None:
        self._begin(status, entry, len(text))
        if text:
            self._send(h11.Data(data=text))
            entry.sent = len(text)
        self._send(h11.EndOfMessage())
        with suppress(OSError):
            await self._writer.drain()

    def _begin(self, status: int, entry: Entry, size: int) -> None:
        headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(size).encode())]
        if self._gateway.stopping:
            headers.append((b"connection", b"close"))
        self._send(h11.Response(status_code=status, headers=headers, reason=b""))
        entry.status = status


def _keep(file: int, block: list[bytes]) -> None:
    # A number of its own, closed here: a gateway that stops closes the other one meanwhile, and the next file gets it.
    try:
        done = os.writev(file, block)
        rest = memoryview(b"".join(block)[done:]) if done < sum(map(len, block)) else memoryview(b"")
        while rest:  # a disk that is nearly full takes a part, and says so at the next attempt
            rest = rest[os.write(file, rest) :]
    finally:
        os.close(file)
