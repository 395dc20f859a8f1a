"""The registry: one changed field, and nobody believes it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import validate_json
from common.errors import ConfigError, FedicomError, StorageError
from common.identity import NodeKey, Signer
from common.registry import FORMAT, Member, Registry, _signed_bytes, parse_registry, read_registry

AUTHORITY = Signer.from_bytes(bytes(range(32)))
COORDINATOR, NORTH, SOUTH, OLD = (Signer.from_bytes(bytes([n]) * 32).public for n in (1, 2, 3, 4))
WHEN = "2026-01-02T03:04:05+00:00"
REGISTRY = Registry(
    federation="chest",
    version=3,
    issued=WHEN,
    authority=AUTHORITY.public,
    coordinator=COORDINATOR,
    sites={  # in no order: the file has them in that of their names, and the signature is under the same
        "south": Member(signing=SOUTH, node=NodeKey.new().public, since=WHEN, revoked=WHEN, why="left the study"),
        "north": Member(signing=NORTH, node=NodeKey.new().public, since=WHEN),
    },
    auditors=("anna",),
    retired={"north": (OLD,)},
)
FILE = REGISTRY.signed(AUTHORITY)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values that hold no others."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def put(plain: Any, path: tuple[Any, ...], value: Any) -> bytes:
    changed = copy.deepcopy(plain)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(changed).encode()


def at(plain: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        plain = plain[key]
    return plain


PLAIN = json.loads(FILE)
LEAVES = list(leaves(PLAIN))


def other(value: Any) -> list[Any]:
    """Values of the same kind that are allowed in some field, and others that are not."""
    if isinstance(value, int):
        return [value + 1, value - 1]
    if value is None:
        return [WHEN]
    if isinstance(value, str) and value:
        last = "1" if value[-1] == "0" else "0"
        return [value[:-1] + last, value[:-1], value + "a", "", value.upper() if value != value.upper() else "x"]
    return ["x"]


def test_a_registry_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "registry.json"
    REGISTRY.write(path, AUTHORITY)
    assert read_registry(path, AUTHORITY.public) == REGISTRY
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_members_are_those_that_are_not_revoked():
    assert list(REGISTRY.members) == ["north"]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_every_changed_field_is_found(path):
    for value in other(at(PLAIN, path)):
        with pytest.raises(ConfigError):
            parse_registry(put(PLAIN, path, value), AUTHORITY.public)


def test_the_fields_that_are_tampered_with_are_all_there_are():
    assert len(LEAVES) == 2 + 5 + 2 * 5 + 1 + 1  # format, signature; five; two members; auditor; retired key


@pytest.mark.parametrize(
    "path",
    [
        ("registry", "sites", "north"),
        ("registry", "sites", "south"),
        ("registry", "sites"),
        ("registry", "auditors"),
        ("registry", "retired"),
        ("registry", "sites", "south", "revoked"),
        ("registry", "sites", "south", "why"),
        ("registry", "version"),
        ("registry", "authority"),
        ("registry",),
        ("signature",),
        ("format",),
    ],
)
def test_every_removed_field_is_found(path):
    changed = copy.deepcopy(PLAIN)
    del at(changed, path[:-1])[path[-1]]
    with pytest.raises(ConfigError):
        parse_registry(json.dumps(changed).encode(), AUTHORITY.public)


@pytest.mark.parametrize("path", [("note",), ("registry", "note"), ("registry", "a(b")])
def test_every_added_field_is_found(path):
    with pytest.raises(ConfigError):
        parse_registry(put(PLAIN, path, "x"), AUTHORITY.public)


def test_an_added_site_is_found():
    stranger = {"signing": Signer.temporary().public, "node": NodeKey.new().public, "since": WHEN}
    with pytest.raises(ConfigError, match="not signed by authority"):
        parse_registry(put(PLAIN, ("registry", "sites", "west"), stranger), AUTHORITY.public)


def test_a_registry_of_another_authority_is_refused_even_if_well_signed():
    forger = Signer.temporary()
    forged = replace(REGISTRY, authority=forger.public).signed(forger)
    assert parse_registry(forged, forger.public).authority == forger.public
    with pytest.raises(ConfigError, match="not signed by authority"):
        parse_registry(forged, AUTHORITY.public)


def test_a_registry_that_names_another_authority_than_its_signers_is_refused():
    foreign = replace(REGISTRY, authority=Signer.temporary().public)
    forged = {**PLAIN, "registry": asdict(foreign), "signature": AUTHORITY.sign(_signed_bytes(foreign))}
    for trusted in (AUTHORITY.public, foreign.authority):
        with pytest.raises(ConfigError, match="not signed by authority"):
            parse_registry(json.dumps(forged).encode(), trusted)


def test_only_the_authority_signs_its_registry(tmp_path):
    with pytest.raises(ConfigError, match="belongs to authority"):
        REGISTRY.write(tmp_path / "registry.json", Signer.temporary())
    assert list(tmp_path.iterdir()) == []


def test_a_signature_under_something_else_is_none_under_a_registry():
    body = json.dumps(asdict(REGISTRY), sort_keys=True, separators=(",", ":"))
    for purpose in ("", "fedicom recipe 1\n", "fedicom kit 1\n"):
        signature = AUTHORITY.sign(f"{purpose}{body}".encode())
        with pytest.raises(ConfigError, match="not signed"):
            parse_registry(put(PLAIN, ("signature",), signature), AUTHORITY.public)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"coordinator": NORTH}, "coordinator and north hold the same key"),
        ({"coordinator": AUTHORITY.public}, "the authority and coordinator hold the same key"),
        ({"coordinator": OLD}, r"coordinator and north \(retired\) hold the same key"),
        ({"retired": {"north": (NORTH,)}}, r"north and north \(retired\) hold the same key"),
        ({"sites": {**REGISTRY.sites, "west": REGISTRY.sites["north"]}}, "north and west hold the same key"),
        ({"sites": {"coordinator": REGISTRY.sites["north"]}}, "no site may be called coordinator"),
    ],
)
def test_no_key_has_two_owners(changes, says):
    with pytest.raises(ValidationError, match=says):
        replace(REGISTRY, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 0),
        ("version", True),
        ("version", "3"),
        ("issued", "2026-01-02T03:04:05"),
        ("issued", "2026-01-02T03:04:05+00:00\n"),
        ("federation", "../x"),
        ("federation", "x\n"),
        ("authority", AUTHORITY.public.upper()),
        ("auditors", ["a b"]),
        ("sites", {"a/b": asdict(REGISTRY.sites["north"])}),
        ("sites", []),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_even_if_it_were_signed(field, value):
    with pytest.raises(ConfigError):
        validate_json(Registry, json.dumps({**PLAIN["registry"], field: value}))


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "' + FORMAT.encode() + b'", "signature": "", "registry": ' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"format": "' + FORMAT.encode() + b'", "signature": "", "registry": NaN}',
        b'{"format": "' + FORMAT.encode() + b'", "signature": "", "registry": 1' + b"0" * 5000 + b"}",
        b'{"format": "' + FORMAT.encode() + b'", "signature": 7, "registry": {"federation": "\\ud800"}}',
        b'{"format": [], "signature": {}, "registry": {}}',
    ],
)
def test_junk_is_refused_and_never_crashes(junk):
    with pytest.raises(ConfigError):
        parse_registry(junk, AUTHORITY.public)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(data):
    with pytest.raises(ConfigError):
        parse_registry(data, AUTHORITY.public)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(LEAVES), JSON)
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_place_is_refused_unless_it_is_the_same(path, value):
    try:
        read = parse_registry(put(PLAIN, path, value), AUTHORITY.public)
    except ConfigError:
        return
    assert read == REGISTRY
    assert value == at(PLAIN, path)


@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_is_refused_unless_it_changes_nothing(place, mask):
    data = FILE[:place] + bytes([FILE[place] ^ mask]) + FILE[place + 1 :]
    with suppress(ConfigError):
        assert parse_registry(data, AUTHORITY.public) == REGISTRY  # a space for a line's end, for example


def test_a_file_that_is_not_there_or_too_large_is_an_error_of_ours(tmp_path: Path):
    with pytest.raises(StorageError):
        read_registry(tmp_path / "registry.json", AUTHORITY.public)
    with pytest.raises(FedicomError):
        read_registry(tmp_path, AUTHORITY.public)
    path = tmp_path / "registry.json"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ConfigError, match="is no registry"):
        read_registry(path, AUTHORITY.public)
