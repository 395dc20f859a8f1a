"""Sealed files: they open with their secret alone, and never with one bit changed."""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from common import vault
from common.errors import ConfigError, StorageError
from common.vault import Secret, new_key_file, new_passphrase, seal, seal_stream, unseal, unseal_stream

HEADER, CHUNK, TAG = 52, 1 << 16, 16
WORDS = "correct horse battery staple"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Secret:
    return new_key_file(tmp_path_factory.mktemp("vault") / "a.key")


@pytest.fixture(scope="module")
def three(key: Secret) -> bytes:
    """Two full chunks and one byte."""
    return seal(bytes(2 * CHUNK) + b"x", key)


def parts(sealed: bytes) -> list[bytes]:
    body = sealed[HEADER:]
    return [sealed[:HEADER], *(body[at : at + CHUNK + TAG] for at in range(0, len(body), CHUNK + TAG))]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_what_was_sealed_comes_back_and_grows_by_52_bytes_and_16_a_chunk(key, size):
    data = os.urandom(size)
    sealed = seal(data, key)
    assert len(sealed) == size + 52 + 16 * max(1, -(-size // CHUNK))
    assert unseal(sealed, key) == data
    assert size < 16 or data[:16] not in sealed


def test_the_same_data_is_sealed_differently_each_time(key):
    assert seal(b"weights", key)[16:] != seal(b"weights", key)[16:]


def test_a_passphrase_opens_what_it_sealed_and_another_does_not():
    sealed = seal(b"kit", Secret.passphrase(WORDS))
    assert unseal(sealed, Secret.passphrase(WORDS.encode() + b"\n")) == b"kit"
    with pytest.raises(StorageError, match="wrong passphrase"):
        unseal(sealed, Secret.passphrase(WORDS + "!"))


def test_the_format_is_what_its_description_says():
    """Opened with hashlib's scrypt and an HKDF written out (RFC 5869), not with ours."""
    sealed = seal(b"kit", Secret.passphrase(WORDS))
    magic, kind, log2_n, r, p, salt = struct.unpack(">16sBBBB32s", sealed[:HEADER])
    assert (magic, kind, log2_n, r, p) == (b"fedicom vault 1\n", 2, 17, 8, 1)
    stretched = hashlib.scrypt(WORDS.encode(), salt=salt, n=2**17, r=8, p=1, maxmem=2**28, dklen=32)
    middle = hmac.digest(salt, stretched, "sha256")
    file_key = hmac.digest(middle, sealed[:HEADER] + b"\x01", "sha256")
    nonce = bytes(11) + b"\x01"  # chunk 0, and the last one
    assert AESGCM(file_key).decrypt(nonce, sealed[HEADER:], sealed[:HEADER]) == b"kit"


def test_no_changed_byte_opens(key):
    sealed = seal(b"a few weights", key)
    for place in range(len(sealed)):
        with pytest.raises(StorageError):
            unseal(sealed[:place] + bytes([sealed[place] ^ 0x10]) + sealed[place + 1 :], key)


@pytest.mark.parametrize("end", [0, 10, HEADER, HEADER + 5, HEADER + CHUNK + TAG, HEADER + 2 * (CHUNK + TAG), -1])
def test_a_file_that_was_cut_does_not_open_not_even_between_two_chunks(key, three, end):
    with pytest.raises(StorageError):
        unseal(three[:end], key)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2), (0, 1, 1, 2), (2,), (0, 1, 2, 2), (1, 2)])
def test_chunks_that_were_swapped_dropped_or_doubled_do_not_open(key, three, order):
    header, *chunks = parts(three)
    assert len(chunks) == 3
    with pytest.raises(StorageError):
        unseal(header + b"".join(chunks[place] for place in order), key)


def test_what_is_appended_does_not_open(key, three):
    for tail in (b"x", bytes(TAG), bytes(CHUNK + TAG)):
        with pytest.raises(StorageError):
            unseal(three + tail, key)


def test_a_chunk_of_another_file_under_the_same_key_does_not_open(key):
    one, other = seal(bytes(10), key), seal(bytes(10), key)
    with pytest.raises(StorageError):
        unseal(one[:HEADER] + other[HEADER:], key)


def test_a_header_that_asks_for_too_much_memory_is_refused_before_any_work():
    sealed = bytearray(seal(b"", Secret.passphrase(WORDS)))
    for cost in ((31, 8, 1), (20, 8, 1), (17, 255, 1), (17, 8, 255), (13, 8, 1)):
        sealed[17:20] = bytes(cost)
        with pytest.raises(StorageError, match="another way of opening"):
            unseal(bytes(sealed), Secret.passphrase(WORDS))


def test_a_key_file_does_not_open_what_a_passphrase_sealed_and_says_which_is_wanted(key):
    with pytest.raises(StorageError, match="sealed with a passphrase"):
        unseal(seal(b"", Secret.passphrase(WORDS)), key)
    with pytest.raises(StorageError, match="sealed with a key file"):
        unseal(seal(b"", key), Secret.passphrase(WORDS))


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_and_never_crash(data, magic):
    secret = Secret(1, bytes(32))
    with pytest.raises(StorageError):
        unseal((vault.MAGIC if magic else b"") + data, secret)


def test_a_stream_that_gives_little_at_a_time_is_sealed_and_opened_as_a_whole(key):
    class Drip(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 1000))

    data, sealed, out = os.urandom(CHUNK + 77), io.BytesIO(), io.BytesIO()
    seal_stream(Drip(data), sealed, key)
    assert unseal(sealed.getvalue(), key) == data
    unseal_stream(Drip(sealed.getvalue()), out, key)
    assert out.getvalue() == data


def test_a_key_file_is_private_random_and_never_overwritten(tmp_path):
    path = tmp_path / "checkpoint.key"
    new_key_file(path)
    first = path.read_bytes()
    assert len(first) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="not overwritten"):
        new_key_file(path)
    assert path.read_bytes() == first
    new_key_file(tmp_path / "other.key")
    assert (tmp_path / "other.key").read_bytes() != first


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_or_passphrase_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "secret"
    path.write_bytes(bytes(32))
    path.chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        Secret.key_file(path)
    with pytest.raises(StorageError, match="chmod 600"):
        Secret.passphrase_from(file=path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_file_of_another_size_is_refused(tmp_path, size):
    path = tmp_path / "secret"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(StorageError, match=f"has {size} bytes, expected 32"):
        Secret.key_file(path)


def test_a_passphrase_comes_from_a_file_or_a_named_variable_and_the_end_of_line_is_not_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "words"
    path.write_text(WORDS + "\r\n")
    path.chmod(0o600)
    monkeypatch.setenv("KIT_WORDS", WORDS)
    assert Secret.passphrase_from(file=path)._material == WORDS.encode()
    assert Secret.passphrase_from(variable="KIT_WORDS")._material == WORDS.encode()


def test_without_a_terminal_a_file_or_a_variable_there_is_no_passphrase(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match="nobody is there to type"):
        Secret.passphrase_from()
    monkeypatch.delenv("KIT_WORDS", raising=False)
    with pytest.raises(ConfigError, match="KIT_WORDS is empty"):
        Secret.passphrase_from(variable="KIT_WORDS")


def test_at_a_terminal_it_is_asked_for_without_showing(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("getpass.getpass", lambda prompt: WORDS)
    assert Secret.passphrase_from()._material == WORDS.encode()


@pytest.mark.parametrize("words", ["", "short", "elevenchars", b"\xff" * 20])
def test_a_short_or_unreadable_passphrase_is_refused(words):
    with pytest.raises(ConfigError):
        Secret.passphrase(words)


def test_a_letter_typed_as_one_or_as_two_code_points_is_the_same_passphrase():
    assert Secret.passphrase("Mu\u0308nchen 1234")._material == Secret.passphrase("M\u00fcnchen 1234")._material


def test_a_secret_shows_itself_in_no_text(key):
    secret = Secret.passphrase(WORDS)
    assert repr(secret) == str(secret) == "Secret(passphrase)"
    assert repr(key) == "Secret(key file)"


def test_made_passphrases_differ_are_long_enough_and_easy_to_say():
    made = {new_passphrase() for _ in range(50)}
    assert len(made) == 50
    for words in made:
        assert len(words.replace("-", "")) == 25  # 5 bits each
        assert not set("01IO") & set(words)
        Secret.passphrase(words)
