"""Who is who: Ed25519 keys that sign (RFC 8032), EC keys of Flower nodes, X.509 certificates."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from common.errors import ConfigError, StorageError
from common.storage import Flush, private_folder, storing, to_disk, write_whole

_NODE_CURVES = (ec.SECP256R1, ec.SECP384R1)
_MAX_BYTES = 1 << 20


class Signer:
    """A private key; only signatures and the public half come out of it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load_or_create(cls, path: Path, flush: Flush = to_disk) -> Signer:
        """Reads the key of this file, or makes one there with mode 0600.

        Raises:
            StorageError: The file is readable by others, or is no key.
        """
        if path.exists():
            return cls.load(path)
        private_folder(path.parent)
        key = new_signing_key()
        write_whole(path, key, flush)
        return cls.from_bytes(key)

    @classmethod
    def load(cls, path: Path) -> Signer:
        """Reads the key of this file.

        Raises:
            StorageError: The file is missing, readable by others, or no key.
        """
        return cls.from_bytes(read_private(path, "a signing key"), path.name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "") -> Signer:
        """The key of these 32 bytes.

        Raises:
            StorageError: They are not 32.
        """
        if len(data) != 32:
            raise StorageError(
                f"signing key{' ' * bool(name)}{name} has {len(data)} bytes, expected 32; restore it from a backup"
            )
        return cls(Ed25519PrivateKey.from_private_bytes(data))

    @classmethod
    def temporary(cls) -> Signer:
        """A key that is never stored."""
        return cls.from_bytes(new_signing_key())

    @property
    def public(self) -> str:
        """The public key, 64 hexadecimal digits."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, data: bytes) -> str:
        """The signature of `data`, 128 hexadecimal digits."""
        return self._key.sign(data).hex()


def new_signing_key() -> bytes:
    """An Ed25519 private key: 32 bytes."""
    return os.urandom(32)


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a file that nobody but its owner may read.

    Raises:
        StorageError: It is missing, or readable by others.
    """
    with storing(what):
        mode, data = path.stat().st_mode & 0o777, path.read_bytes()
    if mode & 0o077:
        raise StorageError(f"{what.split(' ', 1)[-1]} {path.name} has mode {mode:o}, expected 600; run chmod 600 on it")
    return data


def signed_by(public: str, data: bytes, signature: str) -> bool:
    """Whether `signature` is that of `data` under the public key; junk is False, never an error."""
    try:
        raw, key = bytes.fromhex(signature), bytes.fromhex(public)
        if raw.hex() != signature or key.hex() != public:
            return False  # fromhex also takes spaces and capitals: one signature would have many spellings
        Ed25519PublicKey.from_public_bytes(key).verify(raw, data)
    except (InvalidSignature, ValueError):
        return False
    return True


class NodeKey:
    """The key with which a Flower node opens its connection: NIST P-256, OpenSSH format, as Flower asks for it."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def new(cls) -> NodeKey:
        """A new key on P-256."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Reads the key of this file.

        Raises:
            StorageError: The file is missing, readable by others, or no such key.
        """
        return cls.from_bytes(read_private(path, "a node key"), path.name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "") -> NodeKey:
        """The key in these bytes.

        Raises:
            StorageError: They are no OpenSSH key without passphrase on P-256 or P-384.
        """
        try:
            key = load_ssh_private_key(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, _NODE_CURVES):
            raise StorageError(
                f"node key{' ' * bool(name)}{name} is not in OpenSSH format on P-256 or P-384; restore it from a backup"
            )
        return cls(key)

    @property
    def private(self) -> bytes:
        """What the key file holds."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())

    @property
    def public(self) -> str:
        """`ecdsa-sha2-nistp256 AAAA...`, without comment, as the registry has it."""
        return self._key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    @property
    def pem(self) -> bytes:
        """The public key in PEM form, as Flower's calls have it."""
        return self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, data: bytes) -> str:
        """ECDSA signature of `data` with SHA-256, DER in hexadecimal."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256())).hex()


def node_signed_by(public: str, data: bytes, signature: str) -> bool:
    """Whether `signature` is that of `data` under a node's public key; junk is False, never an error."""
    try:
        key = load_ssh_public_key(public.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _NODE_CURVES):
            return False
        key.verify(bytes.fromhex(signature), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Certificate:
    """What people ask of an X.509 certificate."""

    subject: str
    """Common name."""
    names: tuple[str, ...]
    """DNS names and IP addresses that it is for (subject alternative name)."""
    begins: datetime
    ends: datetime
    fingerprint: str
    """SHA-256 of its DER form, 64 hexadecimal digits."""

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """The first certificate of a PEM file.

        Raises:
            ConfigError: The file holds none.
            StorageError: The file cannot be read.
        """
        with storing(path.name):
            data = path.read_bytes()[:_MAX_BYTES]
        return cls.parse(data, path.name)

    @classmethod
    def parse(cls, data: bytes, name: str = "the file") -> Certificate:
        """The first certificate in these bytes, PEM.

        Raises:
            ConfigError: There is none.
        """
        try:
            certificate = x509.load_pem_x509_certificate(data)
            named = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
            try:
                of = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
                names = (
                    *of.get_values_for_type(x509.DNSName),
                    *map(str, of.get_values_for_type(x509.IPAddress)),
                )
            except x509.ExtensionNotFound:
                names = ()
            return cls(
                str(named[0].value) if named else "",
                names,
                certificate.not_valid_before_utc,
                certificate.not_valid_after_utc,
                certificate.fingerprint(hashes.SHA256()).hex(),
            )
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension):
            raise ConfigError(f"{name} holds no certificate in PEM form; take it from the kit again") from None


AUTHORITY_ENDS = "the coordinator renews it with `fedicom provision rotate authority` and sends each site a kit to join"
"""What `expiring` says of an authority's own certificate."""


def expiring(
    path: Path,
    days: float = 30,
    now: datetime | None = None,
    then: str = "the coordinator renews it with `fedicom provision rotate gateway`",
) -> str | None:
    """A sentence when the certificate of this file ends within so many days, has ended or has not begun; else None.

    Args:
        then: What is to be done.

    Raises:
        ConfigError: The file holds no certificate.
        StorageError: The file cannot be read.
    """
    certificate, now = Certificate.load(path), now or datetime.now(UTC)
    ends = f"{certificate.ends:%Y-%m-%d %H:%M} UTC"
    if now < certificate.begins:
        return f"{path.name} is valid only from {certificate.begins:%Y-%m-%d %H:%M} UTC; check this machine's clock"
    if now >= certificate.ends:
        return f"{path.name} ran out on {ends}; {then}"
    if certificate.ends - now < timedelta(days=days):
        return f"{path.name} runs out on {ends}, in {(certificate.ends - now).days} days; {then}"
    return None
