"""Ed25519 keys: where they lie, what they sign."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StorageError
from common.identity import Signer, signed_by

# RFC 8032, section 7.1, test 3
SECRET = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
SIGNATURE = (
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "a.key"
    path.write_bytes(bytes.fromhex(SECRET))
    path.chmod(0o600)
    return path


def test_a_key_signs_as_in_rfc_8032(key):
    signer = Signer.load_or_create(key)
    assert signer.public == PUBLIC
    assert signer.sign(b"\xaf\x82") == SIGNATURE
    assert signed_by(PUBLIC, b"\xaf\x82", SIGNATURE)


def test_a_new_key_is_kept_for_its_owner_alone_and_read_back(tmp_path):
    path = tmp_path / "keys" / "north.key"
    made = Signer.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Signer.load_or_create(path).public == made.public


def test_two_keys_differ(tmp_path):
    assert Signer.load_or_create(tmp_path / "a").public != Signer.load_or_create(tmp_path / "b").public
    assert Signer.temporary().public != Signer.temporary().public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o610])
def test_a_key_that_others_may_read_is_refused_with_what_to_do(key, mode):
    key.chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        Signer.load_or_create(key)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_the_wrong_length_is_refused(tmp_path, size):
    path = tmp_path / "a.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(StorageError, match=f"has {size} bytes, expected 32"):
        Signer.load_or_create(path)


def test_the_key_shows_in_no_text(key):
    assert SECRET not in repr(Signer.load_or_create(key)).lower()


@given(st.binary(max_size=20), st.integers(0, 511))
@settings(max_examples=40, deadline=None)
def test_no_changed_bit_of_a_signature_is_accepted(data, bit):
    signer = Signer.temporary()
    raw = bytearray.fromhex(signer.sign(data))
    raw[bit // 8] ^= 1 << bit % 8
    assert not signed_by(signer.public, data, raw.hex())
    assert not signed_by(signer.public, data + b"x", signer.sign(data))


@given(st.text(max_size=130), st.text(max_size=70))
@settings(max_examples=60, deadline=None)
def test_junk_is_never_a_signature_and_never_an_error(signature, public):
    assert not signed_by(PUBLIC, b"\xaf\x82", signature)
    assert not signed_by(public, b"\xaf\x82", SIGNATURE)


@pytest.mark.parametrize("spelling", [SIGNATURE.upper(), " " + SIGNATURE, SIGNATURE[:2] + " " + SIGNATURE[2:]])
def test_a_signature_has_one_spelling(spelling):
    assert not signed_by(PUBLIC, b"\xaf\x82", spelling)
