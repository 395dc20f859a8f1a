"""Whatever bytes arrive, the answer is an exchange type or an `ExchangeError` that quotes nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common import wire
from common.blobs import names
from common.compression import FORMS, quantised
from common.errors import ExchangeError
from common.exchange import (
    WIRE_VERSION,
    Agreement,
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
    Shares,
    Spent,
    Survivors,
    Update,
)
from common.fixed import Residues
from common.identity import Signer
from common.metrics import SCALARS
from common.weights import Weights

DIGEST = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", fullmatch=True)
WEIGHTS = st.dictionaries(
    st.from_regex(r"[a-z0-9_]{1,6}(\.[a-z]{1,6})?", fullmatch=True),
    st.lists(st.integers(0, 3), max_size=3),
    max_size=4,
).flatmap(
    lambda shapes: st.integers(0, 2**32).map(
        lambda seed: Weights(
            {key: np.random.default_rng(seed).standard_normal(shape, np.float32) for key, shape in shapes.items()}
        )
    )
)
SCORES = st.builds(
    Scores,
    patients=st.integers(0, 10**9),
    values=st.dictionaries(
        st.sampled_from([f"{name}{end}" for name in SCALARS for end in ("", "_low", "_high")]),
        st.floats(0, 1),
        max_size=5,
    ),
)
SPENT = st.builds(
    Spent,
    epsilon=st.floats(0, 1e6),
    delta=st.floats(1e-12, 1),
    noise_multiplier=st.floats(0, 100),
    clip_norm=st.floats(1e-6, 100),
    sampling_rate=st.floats(1e-6, 1),
    steps=st.integers(0, 10**9),
)
HEAD = st.one_of(st.just(""), DIGEST)
ROUND = st.integers(1, 1_000_000)
PLAN = st.builds(
    RoundPlan, recipe_id=DIGEST, round=ROUND, work=st.sampled_from(["train", "evaluate"]), weights=WEIGHTS,
    audit_head=HEAD,
)  # fmt: skip
SIGNATURE = st.from_regex(r"[0-9a-f]{128}", fullmatch=True)
SHARE = st.from_regex(r"[0-9a-f]{66}", fullmatch=True)
OFFER = st.builds(Offer, mask_key=DIGEST, share_key=DIGEST, signature=SIGNATURE)
BOX = st.builds(
    Box, sealed=st.from_regex(r"[0-9a-f]{164}", fullmatch=True), seed_share=DIGEST, key_share=DIGEST
)  # fmt: skip


def named(kind, least=3):
    return st.dictionaries(NAME, kind, min_size=least, max_size=4)


ABOUT = {"recipe_id": DIGEST, "round": ROUND}
SECURE = st.one_of(
    st.builds(Gathering, **ABOUT, base=DIGEST, offers=named(OFFER)),
    st.builds(Dealing, **ABOUT, site=NAME, session=DIGEST, seed=DIGEST, boxes=named(BOX), audit_head=HEAD),
    st.builds(Masking, **ABOUT, base=DIGEST, session=DIGEST, boxes=named(BOX)),
    st.builds(
        MaskedUpdate, **ABOUT, site=NAME, session=DIGEST, audit_head=HEAD,
        values=st.binary(max_size=40).map(lambda data: Residues(np.frombuffer(data[: len(data) & ~3], "<u4"))),
    ),
    st.builds(Survivors, **ABOUT, base=DIGEST, session=DIGEST, masked=named(DIGEST)),
    st.builds(Agreement, **ABOUT, site=NAME, session=DIGEST, signature=SIGNATURE, audit_head=HEAD),
    st.builds(Opening, **ABOUT, base=DIGEST, session=DIGEST, masked=named(DIGEST), signatures=named(SIGNATURE)),
    st.builds(Shares, **ABOUT, site=NAME, session=DIGEST, seeds=named(SHARE, 0), keys=named(SHARE, 0), audit_head=HEAD),
)  # fmt: skip
UPDATE = st.builds(
    Update, site=NAME, recipe_id=DIGEST, round=ROUND, base=DIGEST, delta=WEIGHTS, weight=st.floats(1e-6, 1e9),
    steps=st.integers(0, 10**6), train_loss=st.one_of(st.none(), st.floats(0, 1e6)),
    validation=st.one_of(st.none(), SCORES), test=st.one_of(st.none(), SCORES), spent=st.one_of(st.none(), SPENT),
    norm=st.one_of(st.none(), st.floats(0, 1e6)), offer=st.one_of(st.none(), OFFER), audit_head=HEAD,
).flatmap(
    lambda plain: st.sampled_from(FORMS).map(
        lambda form: replace(plain, delta=quantised(plain.delta, form), compression=form)
    )
)  # fmt: skip
HELLO = st.builds(
    Hello, site=NAME, recipe_id=DIGEST,
    versions=st.dictionaries(NAME, st.text("0123456789.+cpu", max_size=40), max_size=3),
    patients=st.fixed_dictionaries({"train": st.integers(0, 10**9)}), manifest=DIGEST, audit_head=HEAD,
)  # fmt: skip
REFUSAL = st.builds(
    Refusal, site=NAME, recipe_id=DIGEST, round=ROUND, code=st.sampled_from(["recipe", "budget", "data"]),
    why=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=500), audit_head=HEAD,
)  # fmt: skip

QUESTION = st.builds(Question, recipe_id=DIGEST, audit_head=HEAD)


def update(**changes) -> Update:
    values = {
        "site": "north", "recipe_id": "a" * 64, "round": 2, "base": "b" * 64,
        "delta": Weights({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}),
        "weight": 1.0, "steps": 3, "validation": Scores(patients=9, values={"auroc": 0.5}),
        "spent": Spent(epsilon=1, delta=1e-5, noise_multiplier=1, clip_norm=1, sampling_rate=0.1, steps=3),
    }  # fmt: skip
    return Update(**(values | changes))


def mutilated(*, body=None, kind="update", version=WIRE_VERSION, array=None, drop=()) -> RecordDict:
    """The record of `update()` with some of it replaced."""
    record = wire.encode(update())
    text = record.config_records["message"]["body"] if body is None else body
    message = {"kind": kind, "version": version, "body": text}
    parts = {"message": ConfigRecord({key: value for key, value in message.items() if key not in drop})}
    if "weights" not in drop:
        parts["weights"] = ArrayRecord({"delta": array}) if array is not None else record["weights"]
    return RecordDict(parts)


def body(**changes) -> str:
    plain = json.loads(wire.encode(update()).config_records["message"]["body"])
    return json.dumps(plain | changes)


def flat(data=bytes(28), shape=(7,), stype="fedicom.flat.f4", dtype="float32") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


@given(st.one_of(QUESTION, PLAN, UPDATE, HELLO, REFUSAL, SECURE))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_encoded_decodes_to_the_same_value_also_through_bytes(value):
    record = wire.encode(value)
    assert wire.decode(record, type(value)) == value
    assert wire.decode(wire.from_bytes(wire.to_bytes(record)), type(value)) == value


@given(UPDATE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_parts_of_an_update_are_its_bytes(value):
    assert b"".join(wire.to_parts(value)) == wire.to_bytes(wire.encode(value))


def masked(**changes) -> RecordDict:
    """The record of a masked update with some of it replaced."""
    plain = {"site": "north", "recipe_id": "a" * 64, "round": 1, "session": "b" * 64, "values": 2, "audit_head": ""}
    array = changes.pop("array", flat(bytes(8), (2,), "fedicom.flat.u4", "uint32"))
    text = json.dumps(plain | changes)
    message = {"kind": "masked", "version": WIRE_VERSION, "body": text}
    return RecordDict({"message": ConfigRecord(message), "weights": ArrayRecord({"values": array})})


def test_a_masked_update_is_words_of_the_length_that_it_says():
    assert len(wire.decode_reply(masked()).values) == 2
    for wrong in (
        masked(values=3), masked(values=-1), masked(values=True), masked(values=2.0), masked(values=None),
        masked(values=1 << 40), masked(array=flat(bytes(8), (2,))), masked(values={"w": [2]}),
        masked(array=flat(bytes(7), (2,), "fedicom.flat.u4", "uint32")),
        masked(array=flat(bytes(8), (2,), "fedicom.flat.u4", "float32")),
    ):  # fmt: skip
        with pytest.raises(ExchangeError):
            wire.decode_reply(wrong)
    with pytest.raises(ExchangeError, match="expected Question"):
        wire.decode_request(masked())


def test_boxes_and_offers_are_read_with_their_own_bounds():
    box = Box(sealed="0" * 164, seed_share="a" * 64, key_share="b" * 64)
    masking = Masking(recipe_id="a" * 64, round=1, base="b" * 64, session="c" * 64, boxes=dict.fromkeys("xyz", box))
    record = wire.encode(masking)
    assert wire.decode_request(record) == masking
    text = record.config_records["message"]["body"]
    for old, new in (("0" * 164, "0" * 162), ("key_share", "patient"), ('"z"', '"z z"'), ("c" * 64, "C" * 64)):
        wrong = text.replace(old, new)
        assert wrong != text
        record["message"] = ConfigRecord({"kind": "masking", "version": WIRE_VERSION, "body": wrong})
        with pytest.raises(ExchangeError, match=r"Masking|fields"):
            wire.decode_request(record)
    for odd in (None, 5, "xyz", ["x", "y", "z"], {"x": 5, "y": None, "z": []}):
        wrong = json.dumps(json.loads(text) | {"boxes": odd})
        record["message"] = ConfigRecord({"kind": "masking", "version": WIRE_VERSION, "body": wrong})
        with pytest.raises(ExchangeError, match=r"Masking with fields"):
            wire.decode_request(record)


def test_weights_keep_their_order_and_bits():
    sent = Weights(
        {"z": np.array([np.nextafter(np.float32(1), np.float32(2))], np.float32), "a": np.zeros((), np.float32)}
    )
    got = wire.decode_reply(wire.encode(update(delta=sent))).delta
    assert list(got) == ["z", "a"]
    assert got.digest == sent.digest


def test_no_array_is_serialised_twice():
    record = wire.encode(update(delta=Weights({f"w{n}": np.zeros(1000, np.float32) for n in range(10)})))
    assert len(wire.to_bytes(record)) < 40_000 + 2_000


SECRET = "Mustermann"


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"message": ArrayRecord({"a": flat()})}),
        mutilated(drop=("kind",)),
        mutilated(drop=("version",)),
        mutilated(drop=("body",)),
        mutilated(drop=("weights",)),
        mutilated(version=WIRE_VERSION + 1),
        mutilated(version=0),
        mutilated(version=True),
        mutilated(version=float(WIRE_VERSION)),
        mutilated(version=SECRET),
        mutilated(version=[1]),
        mutilated(kind="plan"),
        mutilated(kind="hello"),
        mutilated(kind=SECRET),
        mutilated(kind=["update"]),
        mutilated(body=b"{}"),
        mutilated(body=body().encode()),
        mutilated(body=""),
        mutilated(body="{"),
        mutilated(body="[]"),
        mutilated(body="null"),
        mutilated(body="{}"),
        mutilated(body="[" * 200_000),
        mutilated(body='{"site":' * 5_000),
        mutilated(body="1" * 10_000),
        mutilated(body=body() + " " * (4 << 20)),  # good JSON, and too much of it
        mutilated(body=body()[:-1] + ', "site": "south"}'),
        mutilated(body=body()[:-1] + ', "delta": {"w": [2, 3], "b": [1]}}'),
        mutilated(body=body(patient=SECRET)),
        mutilated(body=body(**{SECRET: 1})),
        mutilated(body=body(site=SECRET + " Max")),
        mutilated(body=body(site="north\n")),
        mutilated(body=body(site=None)),
        mutilated(body=body(site="\ud800")),
        mutilated(body=body(recipe_id="A" * 64)),
        mutilated(body=body(base="b" * 63)),
        mutilated(body=body(round=0)),
        mutilated(body=body(round=True)),
        mutilated(body=body(round=2.0)),
        mutilated(body=body(round="2")),
        mutilated(body=body(round=10**30)),
        mutilated(body=body(weight=0)),
        mutilated(body=body(weight=-1)),
        mutilated(body=body(weight=float("nan"))),
        mutilated(body=body(weight=float("inf"))),
        mutilated(body=body(steps=-1)),
        mutilated(body=body(train_loss=float("nan"))),
        mutilated(body=body(validation=[1])),
        mutilated(body=body(validation={"patients": 9, "values": {"auroc": float("nan")}})),
        mutilated(body=body(validation={"patients": 9, "values": {"auroc": 1e9}})),
        mutilated(body=body(validation={"patients": 9, "values": {SECRET: 0.5}})),
        mutilated(body=body(validation={"patients": 9, "values": {f"s{n}": 0.5 for n in range(65)}})),
        mutilated(body=body(validation={"patients": 9, "values": {}, SECRET: 1})),
        mutilated(body=body(spent={"epsilon": 1})),
        mutilated(body=body(spent={"epsilon": float("inf")})),
        mutilated(body=body(spent=SECRET)),
        mutilated(body=body(audit_head="zz")),
        mutilated(body=body(compression=SECRET)),
        mutilated(body=body(compression=SECRET, delta={"b": [7]})),  # nothing that would be rounded
        mutilated(body=body(compression=None)),
        mutilated(body=body(compression=["int8"])),
        mutilated(body=body(compression="int8")),  # its bytes are float32
        mutilated(body=body(compression="bfloat16"), array=flat(bytes(28), (28,), "fedicom.packed.bf16", "uint8")),
        mutilated(body=body(compression="int8"), array=flat(bytes(11), (11,), "fedicom.packed.i8", "uint8")),
        mutilated(array=flat(bytes(28), (28,), "fedicom.packed.i8", "uint8")),
        mutilated(body=body(delta=None)),
        mutilated(body=body(delta=[[2, 3]])),
        mutilated(body=body(delta="w")),
        mutilated(body=body(delta=["w"])),
        mutilated(body=body(delta={"w": 6})),
        mutilated(body=body(delta={"w": {}, "b": [6]})),
        mutilated(body=body(delta={"w": "", "b": [6]})),
        mutilated(body=body(delta={"w": [-2, -3], "b": [1]})),
        mutilated(body=body(delta={"w": [2.0, 3], "b": [1]})),
        mutilated(body=body(delta={"w": [True, 3], "b": [1]})),
        mutilated(body=body(delta={"w": [1 << 40], "b": [1]})),
        mutilated(body=body(delta={"w": [1 << 28] * 8})),
        mutilated(body=body(delta={"w": [7, *[1] * 8]})),
        mutilated(body=body(delta={"w": [2, 3]})),
        mutilated(body=body(delta={"w": [7]})[:-1] + "}", array=flat(bytes(24))),
        mutilated(body=body(delta={f"{SECRET} Max": [7]})),
        mutilated(body=body(delta={"\ud800": [7]})),
        mutilated(body=body(delta={"w": [7], **{f"x{n}": [0] for n in range(20_000)}})),
        mutilated(array=flat(bytes(27))),
        mutilated(array=flat(bytes(32))),
        mutilated(array=flat(b"")),
        mutilated(array=flat(dtype="float64")),
        mutilated(array=flat(dtype=SECRET)),
        mutilated(array=flat(stype="numpy.ndarray")),
        mutilated(array=Array(np.zeros(7, np.float32))),
        RecordDict({**mutilated(), "more": ArrayRecord({"delta": flat()})}),
        RecordDict({**mutilated(), "more": ConfigRecord({"patient": SECRET})}),
        RecordDict({**mutilated(), "weights": ArrayRecord({"delta": flat(), SECRET: flat()})}),
        RecordDict({**mutilated(), "weights": ArrayRecord({SECRET: flat()})}),
        RecordDict({**mutilated(), "weights": ConfigRecord({"delta": 1})}),
        RecordDict({**mutilated(), "message": ConfigRecord({**mutilated()["message"], "patient": SECRET})}),
    ],
)
def test_a_mutilated_message_is_an_exchange_error_that_quotes_nothing(record):
    with pytest.raises(ExchangeError) as caught:
        wire.decode_reply(record)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_message_without_weights_may_not_carry_arrays():
    refusal = Refusal(site="north", recipe_id="a" * 64, round=1, code="data", why="no")
    record = wire.encode(refusal)
    record["weights"] = ArrayRecord({"delta": flat()})
    with pytest.raises(ExchangeError, match="other records"):
        wire.decode_reply(record)


def test_a_newer_version_says_so():
    with pytest.raises(ExchangeError, match=f"newer version; this installation speaks {WIRE_VERSION}"):
        wire.decode_reply(mutilated(version=WIRE_VERSION + 1))


def test_the_array_stays_one_view_of_the_bytes_that_came():
    got = wire.decode_reply(mutilated()).delta
    assert not got["w"].flags.owndata
    assert not got["w"].flags.writeable


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
FIELDS = ["site", "recipe_id", "round", "base", "delta", "weight", "steps", "train_loss", "validation", "test", "spent"]


def only_exchange_errors(record: RecordDict) -> None:
    with suppress(ExchangeError):
        assert isinstance(wire.decode_reply(record), Update | Refusal)


@given(st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), JSON, max_size=3))
@settings(max_examples=80, deadline=None)
def test_any_json_in_any_field_gives_a_value_or_an_exchange_error(changes):
    only_exchange_errors(mutilated(body=body(**changes)))


@given(st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_any_text_as_body_gives_an_exchange_error(text):
    with pytest.raises(ExchangeError):
        wire.decode_reply(mutilated(body=text))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_byte_of_the_body_may_be_wrong(data):
    text = body()
    place = data.draw(st.integers(0, len(text) - 1))
    only_exchange_errors(mutilated(body=text[:place] + data.draw(st.characters()) + text[place + 1 :]))


@given(
    st.binary(max_size=64), st.lists(st.integers(-9, 9), max_size=3), st.sampled_from(["fedicom.flat.f4", "", "x"]),
    st.sampled_from(["float32", "float64", "int8", ""]), st.lists(st.integers(-3, 9), max_size=4),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_array_gives_a_value_or_an_exchange_error(data, shape, stype, dtype, declared):
    only_exchange_errors(mutilated(body=body(delta={"w": declared}), array=flat(data, tuple(shape), stype, dtype)))


@given(st.binary(max_size=80))
@settings(max_examples=50, deadline=None)
def test_any_bytes_on_the_pipe_give_a_value_or_an_exchange_error(data):
    with pytest.raises(ExchangeError):
        wire.decode_reply(wire.from_bytes(data))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_bytes_cut_or_changed_on_disk_give_a_value_or_an_exchange_error(data):
    whole = bytearray(wire.to_bytes(wire.encode(update())))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ExchangeError):
        assert isinstance(wire.decode_reply(wire.from_bytes(bytes(whole))), Update)


def test_the_question_who_is_there_is_no_plan():
    with pytest.raises(ExchangeError):
        wire.decode(wire.encode(Question(recipe_id="a" * 64)), RoundPlan)


SIGNER, STRANGER = Signer.temporary(), Signer.temporary()


@given(st.one_of(QUESTION, PLAN, UPDATE, HELLO, REFUSAL))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_signed_message_holds_under_its_key_alone_also_through_bytes(value):
    record = wire.encode(value, SIGNER)
    for same in (record, wire.from_bytes(wire.to_bytes(record))):
        wire.check_signature(same, SIGNER.public)
        assert wire.decode(same, type(value)) == value
        with pytest.raises(ExchangeError, match="not signed by key"):
            wire.check_signature(same, STRANGER.public)


def test_an_unsigned_message_is_no_signed_one():
    with pytest.raises(ExchangeError, match="not signed"):
        wire.check_signature(wire.encode(update()), SIGNER.public)
    with pytest.raises(ExchangeError, match="not signed"):
        wire.check_signature(RecordDict(), SIGNER.public)


@pytest.mark.parametrize("signature", [5, 0.5, b"a" * 64, "", "z" * 128, [1, 2], ["a" * 128]])
def test_a_signature_that_is_none_is_an_exchange_error(signature):
    record = wire.encode(update())
    record.config_records["message"]["signature"] = signature
    with pytest.raises(ExchangeError, match="not signed by key"):
        wire.check_signature(record, SIGNER.public)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_part_of_a_signed_message_can_be_changed(data):
    record = wire.encode(update(), SIGNER)
    message = dict(record["message"])
    part = data.draw(st.sampled_from(["kind", "version", "body", "signature", "weights", "name", "dropped"]))
    weights = bytearray(record["weights"]["delta"].data)
    name = "delta"
    if part == "version":
        message["version"] += 1
    elif part == "weights":
        weights[data.draw(st.integers(0, len(weights) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif part == "name":
        name = "weights"
    elif part != "dropped":
        at = data.draw(st.integers(0, len(message[part]) - 1))
        message[part] = message[part][:at] + chr(ord(message[part][at]) ^ 1) + message[part][at + 1 :]
    parts = {"message": ConfigRecord(message)}
    if part != "dropped":
        parts["weights"] = ArrayRecord({name: flat(bytes(weights), (len(weights) // 4,))})
    with pytest.raises(ExchangeError):
        wire.check_signature(RecordDict(parts), SIGNER.public)


@pytest.mark.parametrize("why", ["\x1b[2J", "\x00", "\x9b31m", "x" * 501, "\ud800"])
def test_a_reason_cannot_carry_terminal_commands_or_pages(why):
    message = wire.encode(Refusal(site="north", recipe_id="a" * 64, round=1, code="data", why=""))["message"]
    told = json.dumps(json.loads(message["body"]) | {"why": why})
    with pytest.raises(ExchangeError, match="out of bounds: why"):
        wire.decode_reply(RecordDict({"message": ConfigRecord({**message, "body": told})}))


# A message that stays in one process


def test_a_handed_value_is_itself_and_its_bytes_are_those_of_the_encoded_one():
    value = update()
    assert wire.decode(wire.hand(value), Update) is value
    assert wire.to_bytes(wire.hand(value)) == wire.to_bytes(wire.encode(value))


def test_a_handed_value_passes_no_check_of_signatures_and_no_wrong_kind():
    with pytest.raises(ExchangeError, match="not signed"):
        wire.check_signature(wire.hand(update()), Signer.temporary().public)
    with pytest.raises(ExchangeError, match="expected RoundPlan"):
        wire.decode(wire.hand(update()), RoundPlan)


def test_what_was_let_go_holds_no_weights():
    record = wire.hand(update())
    wire.let_go(record)
    with pytest.raises(ExchangeError):
        wire.decode(record, Update)


# An array that travels beside its message


class Heap:
    """Pieces of one round, in memory."""

    ticket, most_bytes = "1f" * 16, 8_000_000

    def __init__(self) -> None:
        self.pieces: dict[str, bytes] = {}
        self.asked = 0

    def put(self, name: str, piece: memoryview) -> None:
        self.pieces[name] = bytes(piece)

    def get(self, name: str, piece: memoryview) -> None:
        self.asked += 1
        found = self.pieces[name]
        piece[: len(found)] = found[: len(piece)]

    def open(self, ticket: str) -> Heap:
        assert ticket == self.ticket
        return self


# 2,000,000 numbers are 8,000,000 bytes: one whole piece of 4 MiB and one of 3,805,696
LARGE = Weights({"w": np.arange(2_000_000, dtype=np.float32)})


def test_a_large_array_travels_beside_its_signed_message():
    heap, sent = Heap(), update(delta=LARGE)
    record = wire.encode(sent, SIGNER, heap)
    assert sorted(len(piece) for piece in heap.pieces.values()) == [3_805_696, 4_194_304]
    assert len(wire.to_bytes(record)) < 2_000
    assert not record.array_records
    wire.check_signature(record, SIGNER.public)
    assert wire.ticket(record) == heap.ticket
    assert wire.decode(record, Update, heap.open) == sent


SQUARE = Weights({"w": np.random.default_rng(0).standard_normal((1000, 2000)).astype(np.float32)})


@pytest.mark.parametrize(("form", "size"), [("bfloat16", 4_000_000), ("int8", 2_007_813)])
def test_a_small_form_travels_beside_its_message_under_the_digest_of_its_float32_numbers(form, size):
    heap, sent = Heap(), update(delta=quantised(SQUARE, form), compression=form)
    record = wire.encode(sent, SIGNER, heap)
    assert sum(map(len, heap.pieces.values())) == record.config_records["message"]["bytes"] == sent.nbytes == size
    assert record.config_records["message"]["digest"] == sent.delta.digest
    assert wire.decode(record, Update, heap.open) == sent
    plain = Heap()
    wire.encode(replace(sent, compression="none"), SIGNER, plain)
    assert not plain.pieces.keys() & heap.pieces.keys()  # other bytes have other names


@pytest.mark.parametrize(("form", "other"), [("bfloat16", "int8"), ("int8", "bfloat16"), ("int8", "none")])
def test_bytes_of_one_form_are_not_read_as_another(form, other):
    heap = Heap()
    record = wire.encode(update(delta=quantised(SQUARE, form), compression=form), None, heap)
    message = record.config_records["message"]
    told = json.dumps(json.loads(message["body"]) | {"compression": other})
    with pytest.raises(ExchangeError, match="expected a ticket, and a digest of"):
        wire.decode_reply(RecordDict({"message": ConfigRecord({**message, "body": told})}), heap.open)
    assert heap.asked == 0


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_an_update_that_was_not_rounded_is_not_sent_as_if_it_were(form):
    with pytest.raises(ExchangeError, match="quantise it first"):
        wire.encode(update(delta=SQUARE, compression=form))


def test_a_small_array_stays_in_its_message():
    heap = Heap()
    record = wire.encode(update(), SIGNER, heap)
    assert heap.pieces == {}
    assert wire.ticket(record) is None
    assert wire.decode(record, Update, heap.open) == update()
    assert len(wire.decode(masked(), MaskedUpdate, heap.open).values) == 2


def test_a_large_array_stays_in_its_message_where_nothing_takes_it():
    record = wire.encode(update(delta=LARGE), SIGNER)
    assert wire.ticket(record) is None
    assert wire.decode(record, Update) == update(delta=LARGE)


def test_an_array_beside_its_message_is_refused_where_none_is_expected():
    with pytest.raises(ExchangeError, match="other records"):
        wire.decode(wire.encode(update(delta=LARGE), SIGNER, Heap()), Update)


@pytest.mark.parametrize("at", [0, 1])
def test_a_piece_with_one_flipped_bit_is_refused(at):
    heap = Heap()
    record = wire.encode(update(delta=LARGE), SIGNER, heap)
    name = names(LARGE.digest, LARGE.nbytes)[at]
    heap.pieces[name] = bytes([heap.pieces[name][0] ^ 1]) + heap.pieces[name][1:]
    with pytest.raises(ExchangeError, match="what came beside the message is not what it announced"):
        wire.decode(record, Update, heap.open)


def test_pieces_in_each_others_place_are_refused():
    heap = Heap()
    record = wire.encode(update(delta=Weights({"w": np.arange(1 << 21, dtype=np.float32)})), SIGNER, heap)
    first, second = heap.pieces  # 4 MiB each
    heap.pieces = {first: heap.pieces[second], second: heap.pieces[first]}
    heap.most_bytes = 8 << 20
    with pytest.raises(ExchangeError, match="not what it announced"):
        wire.decode(record, Update, heap.open)


def test_weights_beside_a_message_that_are_cut_anew_are_refused():  # the same bytes, under other names
    heap, record = Heap(), wire.encode(update(delta=LARGE), SIGNER, Heap())
    wire.encode(update(delta=LARGE), SIGNER, heap)
    message = record.config_records["message"]
    message["body"] = str(message["body"]).replace('"w"', '"v"')
    with pytest.raises(ExchangeError, match="not what it announced"):
        wire.decode_reply(record, heap.open)


def test_more_bytes_than_the_round_allows_are_refused_before_there_is_room_for_them():
    heap, record = Heap(), wire.encode(update(delta=LARGE), SIGNER, Heap())
    heap.most_bytes = 7_999_999
    with pytest.raises(ExchangeError, match="8000000 bytes beside the message, at most 7999999 are taken"):
        wire.decode_reply(record, heap.open)
    assert heap.asked == 0


@pytest.mark.parametrize(
    "change",
    [
        {"ticket": "2e" * 16}, {"bytes": 8_000_004}, {"digest": "a" * 64}, {"digest": []}, {"ticket": None},
        {"digest": None}, {"bytes": None},
    ],
)  # fmt: skip
def test_no_word_about_an_array_beside_a_signed_message_can_be_changed(change):
    record = wire.encode(update(delta=LARGE), SIGNER, Heap())
    message = {**record.config_records["message"], **change}
    changed = RecordDict({"message": ConfigRecord({key: value for key, value in message.items() if value is not None})})
    with pytest.raises(ExchangeError, match=r"changed on its way|not signed"):
        wire.check_signature(changed, SIGNER.public)


@pytest.mark.parametrize(
    "change",
    [
        {"ticket": "../../../../etc/passwd"}, {"ticket": 5}, {"ticket": "1F" * 16}, {"bytes": 4}, {"bytes": "8000000"},
        {"bytes": 1 << 40}, {"bytes": True}, {"digest": "a" * 63}, {"digest": LARGE.digest.upper()}, {"digest": 5},
        {"digest": "../" * 22}, {"more": 1},
    ],
)  # fmt: skip
def test_words_about_an_array_that_do_not_hold_are_refused_before_a_byte_is_fetched(change):
    heap = Heap()
    message = {**wire.encode(update(delta=LARGE), None, heap).config_records["message"], **change}
    with pytest.raises(ExchangeError):
        wire.decode_reply(RecordDict({"message": ConfigRecord(message)}), heap.open)
    assert heap.asked == 0


# Under masks


WORDS = Residues(np.arange(2_000_000, dtype=np.uint32))
MASKED = MaskedUpdate(site="north", recipe_id="a" * 64, round=1, session="b" * 64, values=WORDS)
SEALED = Box(sealed="0" * 164, seed_share="a" * 64, key_share="b" * 64)
ASKED = Masking(
    recipe_id="a" * 64, round=1, base="c" * 64, session="b" * 64, boxes=dict.fromkeys(("east", "south", "west"), SEALED)
)


def test_a_masked_update_travels_beside_its_signed_message_as_weights_do():
    heap = Heap()
    record = wire.encode(MASKED, SIGNER, heap)
    assert sorted(len(piece) for piece in heap.pieces.values()) == [3_805_696, 4_194_304]
    assert not record.array_records
    wire.check_signature(record, SIGNER.public)
    assert wire.decode(record, MaskedUpdate, heap.open) == MASKED
    assert b"".join(heap.pieces.values()) == WORDS.words.tobytes()
    plain = Heap()
    wire.encode(update(delta=Weights({"w": WORDS.words.view(np.float32)})), SIGNER, plain)
    assert not plain.pieces.keys() & heap.pieces.keys()  # the same bytes as other numbers have other names
    with pytest.raises(ExchangeError, match="other records"):
        wire.decode(record, MaskedUpdate)
    name = next(iter(heap.pieces))
    heap.pieces[name] = bytes([heap.pieces[name][0] ^ 1]) + heap.pieces[name][1:]
    with pytest.raises(ExchangeError, match="values: what came beside the message is not what it announced"):
        wire.decode(record, MaskedUpdate, heap.open)


@pytest.mark.parametrize("change", [{"bytes": 4}, {"digest": "A" * 64}, {"ticket": 5}, {"more": 1}])
def test_words_about_a_masked_update_that_do_not_hold_are_refused_before_a_byte_is_fetched(change):
    heap = Heap()
    message = {**wire.encode(MASKED, None, heap).config_records["message"], **change}
    with pytest.raises(ExchangeError):
        wire.decode_reply(RecordDict({"message": ConfigRecord(message)}), heap.open)
    assert heap.asked == 0


def test_who_asks_for_a_masked_update_says_under_signature_where_it_shall_lie():
    heap = Heap()
    record = wire.encode(ASKED, SIGNER, heap)
    wire.check_signature(record, SIGNER.public)
    assert (wire.ticket(record), heap.pieces) == (heap.ticket, {})
    assert wire.decode_request(record, heap.open) == ASKED
    assert wire.ticket(wire.encode(ASKED, SIGNER)) is None
    assert wire.decode_request(wire.encode(ASKED, SIGNER), heap.open) == ASKED
    with pytest.raises(ExchangeError, match="other records"):  # a site that sends nothing beside its messages
        wire.decode_request(record)
    for change in ({"ticket": "2e" * 16}, {"ticket": None}):
        message = {key: value for key, value in {**record.config_records["message"], **change}.items() if value}
        with pytest.raises(ExchangeError, match="changed on its way"):
            wire.check_signature(RecordDict({"message": ConfigRecord(message)}), SIGNER.public)
    more = {**record.config_records["message"], "bytes": 4, "digest": "a" * 64}
    with pytest.raises(ExchangeError, match="other records"):
        wire.decode_request(RecordDict({"message": ConfigRecord(more)}), heap.open)


@pytest.mark.parametrize(
    "values", [{"auroc": 100.0}, {"accuracy_high": 1.5}, {"brier": 2.0}, {"jones": 0.5}, {"loss_mean": 0.5}]
)
def test_scores_of_other_names_or_above_one_are_neither_made_nor_taken(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Scores(patients=9, values=values)
    body = json.loads(wire.encode(update()).config_records["message"]["body"])
    body["validation"]["values"] = values
    with pytest.raises(ExchangeError, match="Update with fields out of bounds: values"):
        wire.decode(mutilated(body=json.dumps(body)), Update)
