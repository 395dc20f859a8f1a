"""Files that are encrypted at rest: AES-256-GCM under a passphrase or a key file.

A sealed file is a header and chunks of 64 KiB. The nonce of a chunk is its number and whether it is the last
one (the STREAM construction), and the header is authenticated with every chunk: a file that was cut, put
together anew, lengthened or changed in any bit does not open. Every file has a key of its own, derived
from the secret and 32 random bytes of the header, so a nonce never meets the same key twice.

Source: Hoang, Reyhanitabar, Rogaway, Vizar, "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance", 2015; RFC 7914 (scrypt); RFC 5869 (HKDF).
"""

from __future__ import annotations

import getpass
import io
import os
import secrets
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from common.errors import ConfigError, StorageError
from common.identity import read_private
from common.storage import storing, write_whole

MAGIC = b"fedicom vault 1\n"
KEY_BYTES = 32
MIN_PASSPHRASE = 12
"""Characters; scrypt makes guessing slow, not impossible."""

_HEADER = struct.Struct(">16sBBBB32s")  # magic, kind, log2 n, r, p, salt
_KEY_FILE, _PASSPHRASE = 1, 2
_LOG2_N, _R, _P = 17, 8, 1  # 128 MiB and about 0.4 s
_MOST_LOG2_N = 19  # what a stranger's header may ask of us: 512 MiB
_CHUNK, _TAG = 1 << 16, 16
_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # nothing that sounds or looks like another


class Secret:
    """What opens a sealed file; it shows itself in no text."""

    def __init__(self, kind: int, material: bytes) -> None:
        self._kind, self._material = kind, material

    @classmethod
    def passphrase(cls, words: str | bytes) -> Secret:
        """A passphrase that a person chose.

        Raises:
            ConfigError: It is shorter than 12 characters, or no text.
        """
        try:
            text = words.decode() if isinstance(words, bytes) else words
        except UnicodeDecodeError:
            raise ConfigError("the passphrase is not text in UTF-8; write it anew, or use a key file") from None
        # the same word typed on two keyboards is the same passphrase
        text = unicodedata.normalize("NFC", text.rstrip("\r\n"))
        if len(text) < MIN_PASSPHRASE:
            raise ConfigError(
                f"the passphrase has {len(text)} characters, expected at least {MIN_PASSPHRASE}; take a longer one"
            )
        return cls(_PASSPHRASE, text.encode("utf-8", "surrogatepass"))

    @classmethod
    def key_file(cls, path: Path) -> Secret:
        """A file of 32 random bytes, mode 0600, as `new_key_file` makes it.

        Raises:
            StorageError: It is missing, readable by others, or has another size.
        """
        data = read_private(path, "a key file")
        if len(data) != KEY_BYTES:
            raise StorageError(f"key file {path.name} has {len(data)} bytes, expected {KEY_BYTES}; restore it")
        return cls(_KEY_FILE, data)

    @classmethod
    def passphrase_from(cls, *, file: Path | None = None, variable: str | None = None) -> Secret:
        """A passphrase from a file (0600), from an environment variable, or else asked for at the terminal.

        It is never an argument of a command: every user of a machine can read those.

        Args:
            variable: Name of the environment variable.

        Raises:
            ConfigError: There is none, or it is too short.
            StorageError: The file cannot be read, or others can read it.
        """
        if file is not None:
            return cls.passphrase(read_private(file, "a passphrase file"))
        if variable is not None:
            if not (words := os.environ.get(variable, "")):
                raise ConfigError(f"environment variable {variable} is empty; put the passphrase there, or name a file")
            return cls.passphrase(words)
        if not sys.stdin.isatty():
            raise ConfigError("nobody is there to type the passphrase; name a file or an environment variable with it")
        return cls.passphrase(getpass.getpass("Passphrase: "))

    def __repr__(self) -> str:
        return f"Secret({'key file' if self._kind == _KEY_FILE else 'passphrase'})"

    def _file_key(self, header: bytes) -> bytes:
        """The key of the file with this header; the header was read with `_read_header`."""
        _, kind, log2_n, r, p, salt = _HEADER.unpack(header)
        if kind != self._kind:
            wanted = "a key file" if kind == _KEY_FILE else "a passphrase"
            raise StorageError(f"this file was sealed with {wanted}; give that one")
        material = self._material
        if kind == _PASSPHRASE:
            material = Scrypt(salt=salt, length=KEY_BYTES, n=1 << log2_n, r=r, p=p).derive(material)
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=header).derive(material)

    def _new_header(self) -> bytes:
        cost = (_LOG2_N, _R, _P) if self._kind == _PASSPHRASE else (0, 0, 0)
        return _HEADER.pack(MAGIC, self._kind, *cost, os.urandom(32))


def new_passphrase() -> str:
    """Twenty-five random letters and digits in groups of five, easy to say on the telephone: 125 bits."""
    return "-".join("".join(secrets.choice(_ALPHABET) for _ in range(5)) for _ in range(5))


def new_key_file(path: Path) -> Secret:
    """Makes a key file, mode 0600; one that is there stays.

    Raises:
        StorageError: The file exists, or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path.name} exists; what it sealed opens with no other key, so it is not overwritten")
    write_whole(path, os.urandom(KEY_BYTES))
    return Secret.key_file(path)


def is_sealed(data: bytes) -> bool:
    """Whether these bytes begin like a sealed file."""
    return data.startswith(MAGIC)


def seal(data: bytes, secret: Secret) -> bytes:
    """The sealed form: 52 bytes of header, and 16 for every 64 KiB of `data`."""
    out = io.BytesIO()
    seal_stream(io.BytesIO(data), out, secret)
    return out.getvalue()


def unseal(data: bytes, secret: Secret) -> bytes:
    """What was sealed.

    Raises:
        StorageError: Wrong passphrase or key, or not one bit as it was sealed.
    """
    out = io.BytesIO()
    unseal_stream(io.BytesIO(data), out, secret)
    return out.getvalue()


def seal_stream(source: BinaryIO, target: BinaryIO, secret: Secret) -> None:
    """Seals a file of any size, in chunks."""
    header = secret._new_header()
    cipher = AESGCM(secret._file_key(header))
    target.write(header)
    for nonce, chunk in _chunks(source, _CHUNK):
        target.write(cipher.encrypt(nonce, chunk, header))


def unseal_stream(source: BinaryIO, target: BinaryIO, secret: Secret) -> None:
    """Opens a sealed file, in chunks.

    Raises:
        StorageError: As `unseal`. Whatever was written to `target` before must not be used.
    """
    header = _read_header(source)
    cipher = AESGCM(secret._file_key(header))
    for number, (nonce, chunk) in enumerate(_chunks(source, _CHUNK + _TAG)):
        try:
            target.write(cipher.decrypt(nonce, chunk, header))
        except (InvalidTag, ValueError):  # ValueError: fewer bytes than a tag
            if number:
                raise StorageError("the sealed file was cut or changed after it was made; get it again") from None
            raise StorageError(
                "the sealed file cannot be opened: wrong passphrase or key, or the file was changed; try the "
                "passphrase again, then get the file again"
            ) from None


def _read_header(source: BinaryIO) -> bytes:
    header = source.read(_HEADER.size)
    if len(header) != _HEADER.size or not header.startswith(MAGIC):
        raise StorageError("this is no sealed file of Fedicom; get the file again")
    _, kind, log2_n, r, p, _ = _HEADER.unpack(header)
    cost = (log2_n, r, p)
    if kind == _KEY_FILE and cost == (0, 0, 0):
        return header
    if kind == _PASSPHRASE and 14 <= log2_n <= _MOST_LOG2_N and (r, p) == (_R, _P):
        return header
    raise StorageError("the sealed file asks for another way of opening than this version has; update Fedicom")


def _chunks(source: BinaryIO, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(nonce, chunk); the nonce is 11 bytes of number and one that is 1 for the last chunk. At least one chunk."""
    number, chunk = 0, _read_fully(source, size)
    while True:
        following = _read_fully(source, size) if len(chunk) == size else b""
        yield number.to_bytes(11, "big") + bytes([not following]), chunk
        if not following:
            return
        number, chunk = number + 1, following


def _read_fully(source: BinaryIO, size: int) -> bytes:
    """So many bytes, fewer only at the end: a pipe gives what it has."""
    with storing("a sealed file"):
        parts, missing = [], size
        while missing and (part := source.read(missing)):
            parts.append(part)
            missing -= len(part)
    return b"".join(parts)
