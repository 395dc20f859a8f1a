"""Signed recipes: one changed field, and no site trains it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import load_recipe, recipe_from_json
from common.errors import ConfigError, StorageError
from common.identity import Signer
from common.signed import FORMAT, SignedRecipe, parse_recipe, read_recipe, sign_recipe

COORDINATOR = Signer.from_bytes(bytes(range(32)))
SIGNED = sign_recipe(load_recipe(["recipe=phantom_2d", "rounds=7"]), COORDINATOR)
PLAIN = json.loads(SIGNED.text)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values that hold no others."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def at(plain: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        plain = plain[key]
    return plain


def put(path: tuple[Any, ...], value: Any) -> str:
    changed = copy.deepcopy(PLAIN)
    at(changed, path[:-1])[path[-1]] = value
    return json.dumps(changed)


LEAVES = list(leaves(PLAIN))


def other(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [value + 1, value * 0.5, -value - 1]
    if isinstance(value, str) and value:
        return [value + "x", value[:-1], value.upper() if value.upper() != value else value.lower() + "y"]
    return [1, "x", [1]]


def test_a_signed_recipe_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "recipe.json"
    SIGNED.write(path)
    assert read_recipe(path, COORDINATOR.public) == SIGNED
    assert read_recipe(path, None) == SIGNED


@pytest.mark.parametrize("trusted", [COORDINATOR.public, None], ids=["pinned", "as the file says"])
def test_every_changed_field_is_found(trusted):
    assert len(LEAVES) > 50
    for path in LEAVES:
        for value in other(at(PLAIN, path)):
            if value == at(PLAIN, path):  # half of nothing
                continue
            with pytest.raises(ConfigError):
                parse_recipe(put(path, value), trusted)


def test_every_removed_field_is_found():
    for path in [("format",), ("id",), ("coordinator",), ("signature",), ("recipe",), ("recipe", "rounds")]:
        changed = copy.deepcopy(PLAIN)
        del at(changed, path[:-1])[path[-1]]
        with pytest.raises(ConfigError):
            parse_recipe(json.dumps(changed), COORDINATOR.public)


@pytest.mark.parametrize(
    "path", [("code",), ("recipe", "code"), ("recipe", "training", "code"), ("recipe", "a(b"), ("recipe", "[")]
)
def test_every_added_field_is_found(path):
    with pytest.raises(ConfigError):
        parse_recipe(put(path, "import os"), COORDINATOR.public)


def test_a_changed_recipe_with_the_right_id_lacks_the_signature():
    changed = recipe_from_json(json.dumps({**PLAIN["recipe"], "rounds": PLAIN["recipe"]["rounds"] + 1}))
    forged = SignedRecipe(changed, COORDINATOR.public, SIGNED.signature)
    with pytest.raises(ConfigError, match="signature under the recipe does not hold"):
        parse_recipe(forged.text, COORDINATOR.public)


def test_a_recipe_of_another_coordinator_is_refused_with_both_keys():
    stranger = Signer.temporary()
    text = sign_recipe(SIGNED.recipe, stranger).text
    assert parse_recipe(text, None).coordinator == stranger.public
    with pytest.raises(ConfigError, match=f"signed by key {stranger.public[:12]}, .* {COORDINATOR.public[:12]}"):
        parse_recipe(text, COORDINATOR.public)


def test_a_signature_under_something_else_is_none_under_a_recipe():
    for purpose in (b"", b"fedicom registry 1\n", b"fedicom kit 1\n"):
        text = put(("signature",), COORDINATOR.sign(purpose + SIGNED.recipe.canonical))
        with pytest.raises(ConfigError, match="signature under the recipe does not hold"):
            parse_recipe(text, COORDINATOR.public)


def test_an_error_does_not_pass_on_what_moves_the_cursor_of_a_terminal():
    for field in ("id", "coordinator"):
        with pytest.raises(ConfigError) as error:
            parse_recipe(put((field,), "\x1b[2J\x07 \u202e"), COORDINATOR.public)
        assert str(error.value).isprintable()
    with pytest.raises(ConfigError) as error:
        parse_recipe(put(("recipe", "\x1b[2J"), 0), COORDINATOR.public)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**PLAIN, "recipe": 0}).replace('"recipe": 0', '"recipe": ' + "[" * 400 + "]" * 400).encode(),
        json.dumps({**PLAIN, "recipe": None}).encode(),
        json.dumps({**PLAIN, "format": []}).encode(),
        json.dumps({**PLAIN, "coordinator": None}).encode(),
        json.dumps({**PLAIN, "signature": None}).encode(),
    ],
)
@pytest.mark.parametrize("trusted", [COORDINATOR.public, None])
def test_junk_is_refused_and_never_crashes(junk, trusted):
    with pytest.raises(ConfigError):
        parse_recipe(junk, trusted)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(data):
    with pytest.raises(ConfigError):
        parse_recipe(data, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(LEAVES), JSON)
@settings(max_examples=150, deadline=None)
def test_any_value_in_any_place_is_refused_unless_it_is_the_same(path, value):
    try:
        read = parse_recipe(put(path, value), None)
    except ConfigError:
        return
    assert read == SIGNED
    assert value == at(PLAIN, path)


@given(st.integers(0, len(SIGNED.text) - 1), st.characters())
@settings(max_examples=150, deadline=None)
def test_any_changed_letter_is_refused_unless_it_changes_nothing(place, letter):
    text = SIGNED.text[:place] + letter + SIGNED.text[place + 1 :]
    with suppress(ConfigError):
        assert parse_recipe(text, COORDINATOR.public) == SIGNED


def test_a_file_that_is_not_there_empty_or_too_large_is_an_error_of_ours(tmp_path):
    with pytest.raises(StorageError):
        read_recipe(tmp_path / "recipe.json", None)
    path = tmp_path / "recipe.json"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="has 0 bytes"):
        read_recipe(path, None)
    path.write_bytes(SIGNED.text.encode() + b" " * (1 << 20))
    with pytest.raises(ConfigError, match="expected a signed recipe of at most"):
        read_recipe(path, None)


def test_the_format_is_part_of_the_file():
    assert PLAIN["format"] == FORMAT
