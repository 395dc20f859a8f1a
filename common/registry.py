"""Who belongs to a federation: names and public keys, signed by its authority.

The same file lies in every kit. The coordinator reads from it which nodes may connect and whose signatures
updates must carry; a site reads whose recipes and plans it may follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Self

from annotated_types import Ge, Len
from pydantic import ConfigDict, StringConstraints, model_validator
from pydantic.dataclasses import dataclass

from common.config import validate_json
from common.errors import ConfigError
from common.exchange import NAME_PATTERN
from common.identity import Signer, signed_by
from common.storage import storing, write_whole

FORMAT = "fedicom registry 1"
COORDINATOR = "coordinator"
"""Name of the coordinator among `retired`; no site has it."""
_STRICT = ConfigDict(extra="forbid")
_MAX_BYTES = 16 << 20

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Ed25519, hexadecimal."""
NodeKey = Annotated[str, StringConstraints(pattern=r"^ecdsa-sha2-nistp(256|384) [A-Za-z0-9+/=]{100,400}$")]
"""OpenSSH public key of a Flower node, without comment."""
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
"""UTC, ISO 8601."""
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,200}$")]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Member:
    """A site."""

    signing: PublicKey
    """Signs the site's updates, approvals and log."""
    node: NodeKey
    """Opens the connection."""
    since: Time
    revoked: Time | None = None
    why: Line = ""
    """Of the revocation."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Registry:
    """All public keys of a federation at one moment."""

    federation: Name
    version: Annotated[int, Ge(1)]
    """Grows with every change; an older registry never replaces a newer one."""
    issued: Time
    authority: PublicKey
    coordinator: PublicKey
    sites: Annotated[Mapping[Name, Member], Len(0, 10_000)]
    auditors: tuple[Name, ...] = ()
    retired: Mapping[Name, tuple[PublicKey, ...]] = field(default_factory=dict)
    """Earlier signing keys by site name, and of `coordinator`: old logs stay verifiable."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if COORDINATOR in self.sites:
            raise ValueError("no site may be called coordinator")
        owners: dict[str, str] = {self.authority: "the authority"}
        held = [(self.coordinator, COORDINATOR)]
        held += [(key, name) for name, member in self.sites.items() for key in (member.signing, member.node)]
        # A key that was given up may come back to nobody: whoever holds it could sign as its new owner.
        held += [(key, f"{name} (retired)") for name, keys in self.retired.items() for key in keys]
        for key, name in held:
            if key in owners:
                raise ValueError(f"{owners[key]} and {name} hold the same key; every key has one owner")
            owners[key] = name
        return self

    @property
    def members(self) -> dict[str, Member]:
        """The sites that may take part: all that are not revoked."""
        return {name: member for name, member in sorted(self.sites.items()) if member.revoked is None}

    def signed(self, authority: Signer) -> bytes:
        """The signed file.

        Raises:
            ConfigError: The signer is not this federation's authority.
        """
        if authority.public != self.authority:
            raise ConfigError(
                f"the registry belongs to authority {self.authority[:12]}, the key given is {authority.public[:12]}"
            )
        plain = {"format": FORMAT, "registry": asdict(self), "signature": authority.sign(_signed_bytes(self))}
        return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()

    def write(self, path: Path, authority: Signer) -> None:
        """Signs and writes the file whole.

        Raises:
            ConfigError: The signer is not this federation's authority.
            StorageError: The disk is full or the folder cannot be written.
        """
        write_whole(path, self.signed(authority))
        path.chmod(0o644)


def read_registry(path: Path, authority: str) -> Registry:
    """Reads a registry after checking every field and the authority's signature.

    Raises:
        ConfigError: It is not signed by this authority, or a field is not allowed.
        StorageError: The file cannot be read.
    """
    with storing(path.name):
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_BYTES else b""
    return parse_registry(data, authority, path.name)


def parse_registry(data: bytes, authority: str, name: str = "registry.json") -> Registry:
    """`read_registry` of bytes that came from elsewhere; `name` is for the errors.

    Raises:
        ConfigError: It is not signed by this authority, or a field is not allowed.
    """
    try:
        plain = json.loads(data)
        form, body, signature = plain["format"], json.dumps(plain["registry"]), plain["signature"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{name} is no registry; install the one of `fedicom provision` again") from None
    if form != FORMAT or len(plain) != 3:
        raise ConfigError(f"{name} has another format, expected {FORMAT!r}; update the older side")
    registry = validate_json(Registry, body)
    if registry.authority != authority or not (
        isinstance(signature, str) and signed_by(authority, _signed_bytes(registry), signature)
    ):
        raise ConfigError(
            f"{name} is not signed by authority {authority[:12]}; it was changed or belongs to another federation"
        )
    return registry


def _signed_bytes(registry: Registry) -> bytes:
    text = json.dumps(asdict(registry), sort_keys=True, separators=(",", ":"))
    return f"{FORMAT}\n{text}".encode()
