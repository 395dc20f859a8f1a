"""Exchange types to and from Flower records: one JSON text and one flat array a message, both bounded.

A message holds nothing that is executed or unpickled. Whatever bytes arrive, the answer is
an exchange type or an `ExchangeError`.

Between two houses large weights, masked ones too, do not travel in the message but beside it, in pieces
(`common.blobs`): the message has their digest, which the receiver computes anew, and the signature under the message is
one over it. So whoever carries the pieces can withhold them, and nothing else.

An update may be in a smaller form (`common.compression`), which its field `compression` names; whoever decodes it gets
float32, and digests are over that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from common.blobs import BESIDE_BYTES, DIGEST, TICKET, Blobs, Open, names, pieces
from common.compression import FORMS, Form, nbytes, packed, unpacked
from common.errors import ExchangeError
from common.exchange import (
    WIRE_VERSION,
    Agreement,
    Answer,
    Ask,
    Box,
    Dealing,
    Gathering,
    Hello,
    MaskedUpdate,
    Masking,
    Offer,
    Opening,
    Question,
    Refusal,
    RoundPlan,
    Scores,
    ScoresSpent,
    Shares,
    Spent,
    Survivors,
    Update,
)
from common.fixed import Residues
from common.identity import Signer, signed_by
from common.weights import Weights

T = TypeVar("T")
Numbers = TypeVar("Numbers", Weights, Residues)

Request = Question | RoundPlan | Ask
Reply = Hello | Update | Refusal | Answer

_KINDS: dict[str, type] = {
    "question": Question, "plan": RoundPlan, "hello": Hello, "update": Update, "refusal": Refusal,
    "gathering": Gathering, "dealing": Dealing, "masking": Masking, "masked": MaskedUpdate,
    "survivors": Survivors, "agreement": Agreement, "opening": Opening, "shares": Shares,
}  # fmt: skip
_HINTS = {kind: get_type_hints(kind) for kind in _KINDS.values()}
_PARTS: dict[str, type] = {
    "validation": Scores, "test": Scores, "spent": Spent, "scores_spent": ScoresSpent, "offer": Offer,
}  # fmt: skip
_MAPS: dict[str, type] = {"offers": Offer, "boxes": Box}
"""Fields that map names to a part."""
_MAX_BODY_BYTES = 4 << 20
_MAX_ARRAYS = 20_000
_MAX_NUMBERS = 1 << 31
_MASKED = "fedicom.flat.u4"
_LAID: dict[Form, str] = {"none": "fedicom.flat.f4", "bfloat16": "fedicom.packed.bf16", "int8": "fedicom.packed.i8"}
"""How the bytes of weights lie in a message's one flat array."""
_DTYPES = {_LAID["none"]: "float32", _LAID["bfloat16"]: "uint8", _LAID["int8"]: "uint8", _MASKED: "uint32"}
_BESIDE = ("ticket", "bytes", "digest")
"""Fields of a message whose weights travel beside it; the ask for a masked update has the ticket alone."""
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_./-]{1,200}")


def encode(value: Request | Reply, signer: Signer | None = None, blobs: Blobs | None = None) -> RecordDict:
    """One record of JSON and, where the type carries weights, one flat little-endian array of float32 or uint32.

    Args:
        signer: Puts its signature to the whole message; None where both ends are one process.
        blobs: Takes a large array, which the message then only names, or is where a site shall put its masked update;
            None leaves it in the message.

    Raises:
        ExchangeError: The weights are not of the form that the value names.
        FedicomError: `blobs` did not take it.
    """
    message, name, laid, data = _split(value)
    record = RecordDict()
    if blobs is not None and len(data) >= BESIDE_BYTES:
        digest = getattr(value, name).digest
        for piece_name, piece in zip(_names(digest, laid, len(data)), pieces(data), strict=True):
            blobs.put(piece_name, piece)
        message |= {"ticket": blobs.ticket, "bytes": len(data), "digest": digest}
    elif blobs is not None and isinstance(value, Masking):
        message["ticket"] = blobs.ticket
    elif name:
        record["weights"] = ArrayRecord({name: _array(bytes(data), laid)})
    # Not a record of its own: each costs Flower a call on every leg of the way.
    record["message"] = ConfigRecord(message)
    if signer is not None:
        record.config_records["message"]["signature"] = signer.sign(_signed_bytes(record))
    return record


def _split(value: Request | Reply) -> tuple[dict[str, Any], str, str, memoryview]:
    """The fields of the message, and its one array: name, how it lies, bytes; the names are empty where it has none."""
    kind = next(name for name, cls in _KINDS.items() if type(value) is cls)
    body: dict[str, Any] = {}
    array = ("", "", memoryview(b""))
    for name in _HINTS[type(value)]:
        part = getattr(value, name)
        if isinstance(part, Weights):
            form = _form(value)
            body[name] = {key: list(shape) for key, shape in part.shapes.items()}
            array = (name, _LAID[form], packed(part, form))
        elif isinstance(part, Residues):
            body[name] = len(part)
            array = (name, _MASKED, memoryview(part.words.tobytes()))
        else:
            body[name] = _plain(part)
    return {"kind": kind, "version": WIRE_VERSION, "body": json.dumps(body)}, *array


def _form(value: Request | Reply) -> Form:
    return value.compression if isinstance(value, Update) else "none"


class _Handed(RecordDict):
    """A message that never leaves this process: the value itself, not its bytes."""

    def __init__(self, value: Request | Reply) -> None:
        super().__init__()
        self.value: Request | Reply | None = value
        self.data: bytes | None = None
        """As bytes, once somebody wanted them: a plan goes to many sites."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Into another process it goes as bytes, and comes out as any message from outside."""
        return from_bytes, (to_bytes(self),)


def hand(value: Request | Reply) -> RecordDict:
    """A message between two sides of one process; `decode` gives the very same object, `to_bytes` encodes it.

    Nothing that arrives from outside can be of this kind: Flower makes plain records of bytes.
    """
    return _Handed(value)


def let_go(record: RecordDict) -> None:
    """Empties a message that was read: records sit in reference cycles, which would keep a model's weights for long."""
    for arrays in record.array_records.values():
        arrays.clear()
    if isinstance(record, _Handed):
        record.value = record.data = None


def check_signature(record: RecordDict, public: str) -> None:
    """Holds the whole message against a public key.

    Raises:
        ExchangeError: It is unsigned, signed by another key, or was changed on its way.
    """
    try:
        signature = record.config_records["message"]["signature"]
        signed = _signed_bytes(record)
    except (KeyError, TypeError, AttributeError):
        raise ExchangeError("the message is not signed") from None
    if not isinstance(signature, str) or not signed_by(public, signed, signature):
        raise ExchangeError(f"the message is not signed by key {public[:12]}, or was changed on its way")


def ticket(record: RecordDict) -> str | None:
    """The round whose blobs a message names; None when its array is in it, or it has none."""
    found = record.config_records.get("message", ConfigRecord()).get("ticket")
    return found if isinstance(found, str) and TICKET.fullmatch(found) else None


def decode(record: RecordDict, kind: type[T], blobs: Open | None = None) -> T:
    """The message in `record`, when it is a `kind`.

    Args:
        blobs: Where an array that travels beside the message is taken from; check the signature first. None refuses
            such a message.

    Raises:
        ExchangeError: It is another kind, of a newer version, or breaks a bound; nothing of the content is quoted.
            Or a piece does not come, or is not the one that was announced.
    """
    value = _decode(record, (kind,), blobs)
    assert isinstance(value, kind)
    return value


def decode_request(record: RecordDict, blobs: Open | None = None) -> Request:
    """What a coordinator asks.

    Raises:
        ExchangeError: As `decode`.
    """
    value = _decode(record, get_args(Request), blobs)
    assert isinstance(value, Request)
    return value


def decode_reply(record: RecordDict, blobs: Open | None = None) -> Reply:
    """A site's answer to a question, a plan or a step of a secure sum.

    Raises:
        ExchangeError: As `decode`.
    """
    value = _decode(record, get_args(Reply), blobs)
    assert isinstance(value, Reply)
    return value


def to_bytes(record: RecordDict) -> bytes:
    """A record as bytes, for another process of this machine."""
    if isinstance(record, _Handed) and record.value is not None:
        record.data = record.data or b"".join(to_parts(record))
        return record.data
    return b"".join(to_parts(record))


def to_parts(what: RecordDict | Request | Reply) -> tuple[bytes, memoryview]:
    """The bytes of a message in two parts, head and weights, without a copy of the weights in between."""
    if isinstance(what, _Handed) and what.value is not None:
        what = what.value
    if not isinstance(what, RecordDict):
        message, name, laid, data = _split(what)
        return _head(message, name, laid), data
    arrays = what.array_records.get("weights", ArrayRecord())
    name, array = next(iter(arrays.items()), ("", None))
    laid, found = (array.stype, array.data) if array is not None else ("", b"")
    return _head(what.config_records["message"], name, laid), memoryview(found)


def _head(message: Mapping[str, Any], name: str, laid: str) -> bytes:
    text = json.dumps({**message, "array": name, "laid": laid}).encode()
    return len(text).to_bytes(8, "little") + text


def from_bytes(data: bytes) -> RecordDict:
    """Inverse of `to_bytes`.

    Raises:
        ExchangeError: These bytes were not made by `to_bytes`, or were cut short.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    return from_parts(data[:end], data[end:])


def from_parts(head: bytes, data: bytes) -> RecordDict:
    """Inverse of `to_parts`.

    Raises:
        ExchangeError: As `from_bytes`.
    """
    try:
        message = json.loads(head[8:])
        name, laid = message.pop("array"), message.pop("laid")
        record = RecordDict({"message": ConfigRecord(message)})
        if name:
            record["weights"] = ArrayRecord({name: _array(data, laid)})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ExchangeError("these bytes are no message") from None
    return record


def decode_any(record: RecordDict) -> Request | Reply:
    """The message in `record`, whatever kind it is.

    Raises:
        ExchangeError: As `decode`.
    """
    found = _decode(record, tuple(_KINDS.values()), None)
    assert isinstance(found, Request | Reply)
    return found


def _decode(record: RecordDict, kinds: tuple[type, ...], blobs: Open | None) -> object:
    if isinstance(record, _Handed):  # it was checked when it was made, as every exchange type is
        if type(record.value) not in kinds:
            raise ExchangeError(f"expected {' or '.join(k.__name__ for k in kinds)}, got another kind of message")
        return record.value
    try:
        message = record.config_records["message"]
        kind, version, text = message["kind"], message["version"], message["body"]
    except KeyError:
        raise ExchangeError("message without the fields kind, version and body") from None
    if type(version) is not int or version != WIRE_VERSION:
        newer = "a newer" if type(version) is int and version > WIRE_VERSION else "another"
        raise ExchangeError(
            f"message of {newer} version; this installation speaks {WIRE_VERSION}, update the older side"
        )
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or cls not in kinds:
        raise ExchangeError(f"expected {' or '.join(k.__name__ for k in kinds)}, got another kind of message")
    hints = set(_HINTS[cls].values())
    arrays = bool({Weights, Residues} & hints)
    beside = blobs is not None and arrays and "ticket" in message
    place = blobs is not None and cls is Masking and "ticket" in message
    expected = {"message", "weights"} if arrays and not beside else {"message"}
    fields_ = {"kind", "version", "body", *(_BESIDE if beside else _BESIDE[:1] if place else ())}
    if set(record) != expected or set(message) - {"signature"} != fields_:
        raise ExchangeError(f"{cls.__name__} with other records than {' and '.join(sorted(expected))}")
    if not isinstance(text, str) or len(text) > _MAX_BODY_BYTES:
        raise ExchangeError(f"message body is not a text below {_MAX_BODY_BYTES} characters")
    try:
        body = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise ExchangeError("message body is not JSON") from None
    if not isinstance(body, dict):
        raise ExchangeError("message body is not a JSON object")
    form = body.get("compression") if cls is Update else "none"
    if form not in FORMS:  # of any JSON type
        raise ExchangeError(f"{cls.__name__} with fields out of bounds: compression")
    try:
        for name, hint in _HINTS[cls].items():
            if hint is Weights:
                body[name] = _weights(record, name, body.get(name), form, blobs)
            elif hint is Residues:
                body[name] = _residues(record, name, body.get(name), blobs)
            elif name in _PARTS and isinstance(body.get(name), dict):
                body[name] = _PARTS[name](**body[name])
            elif name in _MAPS and isinstance(body.get(name), dict):
                body[name] = {key: _MAPS[name](**part) for key, part in body[name].items()}
        return cls(**body)
    except TypeError:
        raise ExchangeError(f"{cls.__name__} with fields that are no names") from None
    except ValidationError as error:
        wrong = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
        known = {field.name for kind in (cls, *_PARTS.values(), *_MAPS.values()) for field in fields(kind)}
        where = sorted(wrong & known) + ["a field that it has not"] * bool(wrong - known)
        raise ExchangeError(f"{cls.__name__} with fields out of bounds: {', '.join(where)}") from None


def _signed_bytes(record: RecordDict) -> bytes:
    # Hashes of the two long parts, between words of fixed length: no two messages give the same bytes.
    message = record.config_records["message"]
    digest = hashlib.sha256()
    for name, array in record.array_records.get("weights", ArrayRecord()).items():
        digest.update(name.encode() + b"\n")
        digest.update(array.data)
    parts = [message["kind"], message["version"], hashlib.sha256(str(message["body"]).encode()).hexdigest()]
    title = "fedicom message"
    if any(name in message for name in _BESIDE):
        title += " with blobs"
        told = json.dumps({name: message[name] for name in _BESIDE if name in message}, sort_keys=True)
        parts.append(hashlib.sha256(told.encode()).hexdigest())
    return "\n".join((title, *map(str, parts), digest.hexdigest())).encode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice: two readers could see two messages")
    return found


def _names(digest: str, laid: str, size: int) -> list[str]:
    """The names of the pieces: other bytes of the same numbers have others."""
    return names(digest if laid == _LAID["none"] else f"{digest} {laid}", size)


def _gathered(record: RecordDict, name: str, laid: str, size: int, open_: Open) -> memoryview:
    """The bytes that the message announces; whether they are the right ones is not checked here."""
    told, place = record.config_records["message"], ticket(record)
    digest = told["digest"]
    if place is None or told["bytes"] != size or not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        raise ExchangeError(f"{name}: expected a ticket, and a digest of {size} bytes beside the message")
    blobs = open_(place)
    if size > blobs.most_bytes:  # before there is room for them
        raise ExchangeError(f"{name}: {size} bytes beside the message, at most {blobs.most_bytes} are taken")
    data = np.empty(size, np.uint8).data
    for piece_name, piece in zip(_names(digest, laid, size), pieces(data), strict=True):
        blobs.get(piece_name, piece)
    return data


def _array(data: bytes, laid: str) -> Array:
    # Given as bytes: Flower's own ndarray path writes an .npy copy of each array.
    dtype = _DTYPES[laid]
    return Array(dtype=dtype, shape=(len(data) // np.dtype(dtype).itemsize,), stype=laid, data=data)


def _weights(record: RecordDict, name: str, shapes: object, form: Form, blobs: Open | None) -> Weights:
    if not isinstance(shapes, dict) or len(shapes) > _MAX_ARRAYS:
        raise ExchangeError(f"{name}: expected at most {_MAX_ARRAYS} shapes")
    if not all(_ARRAY_NAME.fullmatch(key) for key in shapes):
        raise ExchangeError(f"{name}: the name of an array is not one of a model's state")
    sizes = []
    for shape in shapes.values():
        if (
            not isinstance(shape, list)
            or len(shape) > 8
            or not all(type(n) is int and 0 <= n <= 1 << 28 for n in shape)
        ):
            raise ExchangeError(f"{name}: a shape is not a short list of sizes")
        sizes.append(math.prod(shape))
    total = sum(sizes)
    if total > _MAX_NUMBERS:
        raise ExchangeError(f"{name}: {total} numbers, at most {_MAX_NUMBERS} are read")
    message, size = record.config_records["message"], nbytes(shapes, form)
    if blobs is None or "ticket" not in message:
        return unpacked(_bytes(record, name, size, _LAID[form]), shapes, form)
    return _announced(record, name, unpacked(_gathered(record, name, _LAID[form], size, blobs), shapes, form))


def _residues(record: RecordDict, name: str, size: object, blobs: Open | None) -> Residues:
    if type(size) is not int or not 0 <= size <= _MAX_NUMBERS:
        raise ExchangeError(f"{name}: expected how many numbers there are, at most {_MAX_NUMBERS}")
    if blobs is None or "ticket" not in record.config_records["message"]:
        return Residues(np.frombuffer(_bytes(record, name, 4 * size, _MASKED), dtype="<u4"))
    data = _gathered(record, name, _MASKED, 4 * size, blobs)
    return _announced(record, name, Residues(np.frombuffer(data, dtype="<u4")))


def _announced(record: RecordDict, name: str, came: Numbers) -> Numbers:
    if came.digest != record.config_records["message"]["digest"]:
        raise ExchangeError(f"{name}: what came beside the message is not what it announced")
    return came


def _bytes(record: RecordDict, name: str, size: int, laid: str) -> bytes:
    arrays = record.array_records.get("weights", ArrayRecord())
    if set(arrays) != {name}:
        raise ExchangeError(f"{name}: expected one array of this name in the message")
    data, given = arrays[name].data, (arrays[name].dtype, arrays[name].stype)
    if given != (_DTYPES[laid], laid) or not isinstance(data, bytes) or len(data) != size:
        raise ExchangeError(f"{name}: expected {size} bytes of {laid}")
    return data


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    return value
