"""Ed25519 keys that sign audit events and recipes (RFC 8032)."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from common.errors import StorageError
from common.storage import private_folder, storing, write_whole


class Signer:
    """A private key; only signatures and the public half come out of it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """Reads the key of this file, or makes one there with mode 0600.

        Raises:
            StorageError: The file is readable by others, or is no key.
        """
        if not path.exists():
            private_folder(path.parent)
            key = Ed25519PrivateKey.generate()
            write_whole(path, key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
            path.chmod(0o600)
            return cls(key)
        with storing("a signing key"):
            mode, data = path.stat().st_mode & 0o777, path.read_bytes()
        if mode & 0o077:
            raise StorageError(f"signing key {path.name} has mode {mode:o}, expected 600; run chmod 600 on it")
        if len(data) != 32:
            raise StorageError(f"signing key {path.name} has {len(data)} bytes, expected 32; restore it from a backup")
        return cls(Ed25519PrivateKey.from_private_bytes(data))

    @classmethod
    def temporary(cls) -> Signer:
        """A key that is never stored."""
        return cls(Ed25519PrivateKey.from_private_bytes(os.urandom(32)))

    @property
    def public(self) -> str:
        """The public key, 64 hexadecimal digits."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, data: bytes) -> str:
        """The signature of `data`, 128 hexadecimal digits."""
        return self._key.sign(data).hex()


def signed_by(public: str, data: bytes, signature: str) -> bool:
    """Whether `signature` is that of `data` under the public key; junk is False, never an error."""
    try:
        raw = bytes.fromhex(signature)
        if raw.hex() != signature:
            return False  # fromhex also takes spaces and capitals: one signature would have many spellings
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(raw, data)
    except (InvalidSignature, ValueError):
        return False
    return True
