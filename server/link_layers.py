"""Who may call the SuperLink, and what a call costs there: layers around Flower's own (`server.link` puts them on)."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from common.deployment import ServerHome

KEY_HEADER = "fedicom-superlink"
NODES = "/v1/fleet/"
"""What nodes call; the SuperLink checks their own signatures."""
APIS = {"Control": "/v1/control/", "Runtime": "/v1/runtime/", "NodeAuth": NODES, "Fleet": NODES}
"""Flower's layers that are for some calls only, by how their names begin."""
_CLEAN_S = 1.0


class Locked:
    """Lets a call pass that a node makes, or that carries the key."""

    def __init__(self, app: Callable[..., Awaitable[None]], key: bytes) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Callable[..., Awaitable[None]]) -> None:
        given = dict(scope.get("headers", ())).get(KEY_HEADER.encode(), b"")
        named = scope["type"] == "http" and scope["path"].startswith(NODES)
        if named or scope["type"] == "lifespan" or hmac.compare_digest(given, self._key):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


class Layer:
    """One of Flower's layers, for the calls of its API: it would hand all others on as well, at the price of a task."""

    def __init__(self, app: Callable[..., Awaitable[None]], part: Any) -> None:
        self._app, self._layer = app, part.cls(app, *part.args, **part.kwargs)
        self._api = next((api for begin, api in APIS.items() if part.cls.__name__.startswith(begin)), "")

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        others = scope["type"] == "http" and not scope["path"].startswith(self._api)
        await (self._app if others else self._layer)(scope, receive, send)


def seldom(clean: Callable[[Any], None]) -> Callable[[Any], None]:
    """A method that does its work at most once in `_CLEAN_S`: a task is given up after 60 s without a sign."""
    due = 0.0

    def now_and_then(state: Any) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _CLEAN_S
            clean(state)

    return now_and_then


class Key:
    """Puts the key on a call."""

    def __init__(self, home: ServerHome) -> None:
        self._key = key_of(home.superexec_secret).decode()

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers[KEY_HEADER] = self._key
        return call_next(context)


def key_of(secret: Path) -> bytes:
    """What calls carry, made of the coordinator's secret."""
    # Not the secret itself: with that one signs Flower's own calls.
    return hmac.new(secret.read_bytes(), b"fedicom superlink", hashlib.sha256).hexdigest().encode()
