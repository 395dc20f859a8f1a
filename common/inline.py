"""Small objects of a message go with it, in one call.

Flower cuts every message into objects, each named by its SHA-256, and moves each with a call of its own: three for the
smallest one, on each of its four legs. Between our two ends the small ones travel in a field of the calls for messages
that Flower's own have not. Protobuf keeps unknown fields, and whoever does not look for them finds what he expects.
Who pulls says so by the same field if he does: either end may be one without this, and what did not go along is moved
by Flower as ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

MOST_BYTES = 1 << 20
"""Of all objects in one call; weights that travel in messages are larger, and go as Flower has it."""
_MOST = 10_000
"""Objects that are looked at; an honest call has three a message."""
_FIELD = 90_001
_BYTES = 2
"""Protobuf's wire type of what has a length."""

Look = Callable[[str], bytes | None]
"""Content by id; None or nothing for what is not at hand."""


def add(call: Any, look: Look) -> set[str]:
    """Puts what `look` has of the messages of a call, or of its answer, into it; up to `MOST_BYTES`.

    Returns:
        Ids of what it was.
    """
    room, added = MOST_BYTES, set[str]()
    for key in dict.fromkeys(_ids(call.message_object_trees)):
        content = look(key)
        if not content:
            continue
        room -= len(content)
        if room < 0:
            break
        call.MergeFromString(_field(content))
        added.add(key)
    return added


def read(call: Any) -> dict[str, bytes]:
    """The objects that came with a call or its answer, by id."""
    # The id is computed, never read: an object cannot pass for another one.
    return {hashlib.sha256(content).hexdigest(): content for content in _fields(call)}


def asking(request: Any) -> Any:
    """The request for messages, which says now that it is of one who reads what comes along."""
    request.MergeFromString(_field(b""))
    return request


def whole(tree: Any, came: Container[str]) -> bool:
    """Whether all objects of a message came along."""
    return all(key in came for key in _ids([tree]))


def pushing(push: Callable[[Any], Any], look: Look) -> Callable[[Any], Any]:
    """A client's `PushMessages` whose calls have the objects with them."""

    def push_messages(request: Any) -> Any:
        add(request, look)
        return push(request)

    return push_messages


def inside(messages: Iterable[Any], nested: Callable[[Any], Mapping[str, Any]]) -> Look:
    """Looks into messages that are about to be pushed.

    Args:
        nested: Flower's `get_all_nested_objects`; asked when the first object is, as Flower knows all ids by then.
    """
    found: dict[str, Any] = {}

    def look(key: str) -> bytes | None:
        if not found:
            for message in messages:
                found.update(nested(message))
        return found[key].deflate() if key in found else None

    return look


def install(handlers: Any, *, once: bool) -> None:
    """Has a server of Flower's take and give messages with their objects.

    A message and what came with it are stored in one transaction: nobody sees it by half. What is stored is not asked
    for in the answer.

    Args:
        handlers: Module with Flower's `push_messages` and `pull_messages`, of its Fleet or its Runtime API.
        once: It gives a message out once, whether it arrives or not, as a SuperLink does: what went whole, to one who
            asked for that, is deleted at once, and nobody needs to confirm it.
    """
    push, pull = handlers.push_messages, handlers.pull_messages

    def push_messages(request: Any, state: Any, *others: Any, **named: Any) -> Any:
        with getattr(state, "session", nullcontext)():
            answer = push(request, state, *others, **named)
            missing = list(answer.objects_to_push)
            run_id = request.messages_list[0].metadata.run_id if missing else 0
            came = read(request)
            del answer.objects_to_push[:]
            answer.objects_to_push.extend(
                key
                for key in missing
                if key not in came or not state.store_object(run_id, answer.session_id, key, came[key])
            )
        return answer

    def pull_messages(request: Any, state: Any, *others: Any, **named: Any) -> Any:
        with getattr(state, "session", nullcontext)():
            answer = pull(request, state, *others, **named)
            if answer.messages_list and _fields(request):
                run_id = answer.messages_list[0].metadata.run_id
                added = add(answer, lambda key: state.get_object(run_id, key))
                for tree in answer.message_object_trees:
                    if once and whole(tree, added):
                        state.object_store.delete(tree.object_id)
        return answer

    handlers.push_messages, handlers.pull_messages = push_messages, pull_messages


def _ids(trees: Iterable[Any]) -> Iterator[str]:
    for tree in trees:
        yield tree.object_id
        yield from _ids(tree.children)


def _fields(call: Any) -> list[bytes]:
    fields = (field for field in islice(UnknownFieldSet(call), _MOST) if field.field_number == _FIELD)
    return [field.data for field in fields if field.wire_type == _BYTES]


def _field(content: bytes) -> bytes:
    return _varint(_FIELD << 3 | _BYTES) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
