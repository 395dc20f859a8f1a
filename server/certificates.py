"""X.509 certificates of a federation: its own authority, and TLS servers under it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, StorageError

LOOPBACK = ("localhost", "127.0.0.1")
_AUTHORITY_DAYS = 3650
_CLOCKS_DIFFER = timedelta(hours=1)
"""A hospital's clock that runs behind shall not refuse a certificate of today."""
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class CertificateAuthority:
    """Signs certificates for the hosts that its own certificate permits, and for no others."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self._certificate = key, certificate

    @classmethod
    def new(cls, federation: str, hosts: Sequence[str]) -> CertificateAuthority:
        """An authority on P-256 for ten years.

        Its name constraints permit `hosts` and the loopback names alone: whoever steals its key, or a hospital that
        puts its certificate into a system's store, opens no other name to it.

        Raises:
            ConfigError: A host is neither a DNS name nor an IP address.
        """
        names = _general_names((*hosts, *LOOPBACK))
        permitted: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_network(entry.value)) if isinstance(entry, x509.IPAddress) else entry
            for entry in names
        ]
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, _of_itself(key, _name("Fedicom authority", federation), x509.NameConstraints(permitted, None)))

    def renewed(self) -> CertificateAuthority:
        """The same authority, key, name and permitted hosts, for ten years from now.

        What it signed before holds against the new certificate, and what it signs from now on against the old one
        while that lasts: a chain is built by name and key.
        """
        return CertificateAuthority(self._key, _of_itself(self._key, self._certificate.subject, self._constraints))

    @classmethod
    def load(cls, key: bytes, certificate: bytes) -> CertificateAuthority:
        """From `ca.key` and `ca.crt`.

        Raises:
            StorageError: They cannot be read, or do not belong together.
        """
        try:
            private = load_pem_private_key(key, None)
            loaded = x509.load_pem_x509_certificate(certificate)
        except (ValueError, TypeError):
            raise StorageError("ca.key or ca.crt cannot be read; restore the authority's folder") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
            raise StorageError("ca.key is not the key of ca.crt; restore the authority's folder")
        return cls(private, loaded)

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, not encrypted."""
        return _key_pem(self._key)

    @property
    def certificate_pem(self) -> bytes:
        return self._certificate.public_bytes(Encoding.PEM)

    def server(self, subject: str, federation: str, hosts: Sequence[str], days: int) -> tuple[bytes, bytes]:
        """A TLS server's certificate and its key on P-256, both PEM.

        Raises:
            ConfigError: A host is neither a DNS name nor an IP address, or one that this authority may not sign for.
        """
        names = _general_names(hosts)
        self._permits(names)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC).replace(microsecond=0)
        ends = min(now + timedelta(days=days), self._certificate.not_valid_after_utc)
        if ends <= now:
            raise ConfigError(
                "the authority's certificate has run out; `fedicom provision rotate authority` renews it, and this one"
            )
        builder = (
            x509.CertificateBuilder(
                self._certificate.subject, _name(subject, federation), key.public_key(), x509.random_serial_number()
            )
            .not_valid_before(now - _CLOCKS_DIFFER)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM), _key_pem(key)

    @property
    def _constraints(self) -> x509.NameConstraints:
        return self._certificate.extensions.get_extension_for_class(x509.NameConstraints).value

    def _permits(self, names: Sequence[x509.GeneralName]) -> None:
        permitted = self._constraints.permitted_subtrees or []
        domains = [entry.value for entry in permitted if isinstance(entry, x509.DNSName)]
        networks = [entry.value for entry in permitted if isinstance(entry, x509.IPAddress)]
        for name in names:
            if isinstance(name, x509.DNSName):
                good = any(name.value == domain or name.value.endswith(f".{domain}") for domain in domains)
            else:
                good = any(name.value in network for network in networks)  # type: ignore[operator]
            if not good:
                raise ConfigError(
                    f"{name.value} is none of the hosts that this federation's authority may sign for "
                    f"({', '.join(map(str, (*domains, *networks)))}); they are fixed when a federation is provisioned"
                )


def _of_itself(key: ec.EllipticCurvePrivateKey, name: x509.Name, constraints: x509.NameConstraints) -> x509.Certificate:
    """An authority's own certificate."""
    now = datetime.now(UTC).replace(microsecond=0)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(constraints, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """DNS names and addresses as what they are; a client looks for an address among the addresses alone.

    Raises:
        ConfigError: One is neither.
    """
    found: list[x509.GeneralName] = []
    for host in dict.fromkeys(host.lower() for host in hosts):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
            continue
        except ValueError:
            labels = host.split(".")
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
            raise ConfigError(
                f"{host!r} is neither a DNS name nor an IP address; expected for example fl.example.org, and the port "
                "in its own field"
            )
        found.append(x509.DNSName(host))
    return found


def _name(common: str, organisation: str) -> x509.Name:
    # With a space in the common name no client takes it for a host.
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
