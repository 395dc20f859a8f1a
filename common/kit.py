"""Kits: the files of one party of a federation, with a manifest signed by the authority, sealed for the way if wanted.

A kit is a mapping from path to bytes until it lies in a folder. What was unpacked becomes the party's home; from
then on its people edit `site.yaml`, and everything else is expected to stay as it was signed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Len
from pydantic import ConfigDict, StringConstraints
from pydantic.dataclasses import dataclass

from common.config import validate_json
from common.errors import ConfigError, FedicomError, StorageError
from common.identity import NodeKey, Signer, signed_by
from common.registry import COORDINATOR, Name, PublicKey, Registry, Time, parse_registry, read_registry
from common.storage import flush_folder, private_folder, storing, write_whole
from common.vault import Secret, seal, unseal

MANIFEST = "kit.json"
AUTHORITY, REGISTRY = "trust/authority.pub", "trust/registry.json"
SIGNING, NODE, COHORT = "keys/signing.key", "keys/node.key", "keys/cohort.key"
FORMAT = "fedicom kit 1"

_EDITED = ("site.yaml", "server.yaml", "keys/tokens.json", "keys/operator.token")
"""Files that their owner changes."""
_KEPT = (COHORT, "keys/superexec.secret")
"""Secrets of a house: no kit takes the place of those that are there."""
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")
_LATER = re.compile(r"kit-(\d{1,9})\.json")
_MAX_FILES, _MAX_BYTES = 200, 16 << 20
_PARTIAL = ".partial"
_STRICT = ConfigDict(extra="forbid")

Files = Mapping[str, bytes]
"""Relative path, with slashes -> content."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Manifest:
    """What a kit holds, and for whom."""

    federation: Name
    owner: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]
    """A site, `coordinator`, or `auditor-<name>`."""
    version: Annotated[int, Ge(1)]
    """Of the registry inside."""
    made: Time
    authority: PublicKey
    files: Annotated[
        Mapping[str, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]],
        Len(1, _MAX_FILES),
    ]
    """Path -> SHA-256."""


def signed_kit(files: Files, registry: Registry, owner: str, made: str, authority: Signer) -> dict[str, bytes]:
    """These files with the authority's public key, the registry and the signed manifest.

    Args:
        files: The owner's own, without the folder `trust` except `trust/ca.crt`.
    """
    whole = {**files, AUTHORITY: f"{registry.authority}\n".encode(), REGISTRY: registry.signed(authority)}
    manifest = Manifest(
        federation=registry.federation,
        owner=owner,
        version=registry.version,
        made=made,
        authority=authority.public,
        files={path: hashlib.sha256(data).hexdigest() for path, data in sorted(whole.items())},
    )
    plain = {"format": FORMAT, "kit": asdict(manifest), "signature": authority.sign(_signed_bytes(manifest))}
    return {**whole, MANIFEST: (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()}


def opened(files: Files, authority: str | None = None) -> tuple[Manifest, Registry]:
    """Manifest and registry of a kit as it came, after checking every file.

    Args:
        authority: Public key that must have signed it; None takes the one that the kit names, which shows that it
            is whole but not from whom it is.

    Raises:
        ConfigError: Names the files that are missing, changed or not of the kit.
    """
    if MANIFEST not in files or AUTHORITY not in files:
        raise ConfigError(f"this is no kit: {MANIFEST} or {AUTHORITY} is missing; get it from the coordinator again")
    named = files[AUTHORITY].decode(errors="replace").strip()
    if authority is not None and named != authority:
        raise ConfigError(
            f"the kit is of authority {ascii(named)[1:13]}, expected {authority[:12]}: it belongs to another "
            "federation or was forged; ask the coordinator by telephone"
        )
    manifest = _manifest(files[MANIFEST], named, MANIFEST)
    wrong = [f"{path} {state}" for path in manifest.files if (state := _state(files.get(path), manifest.files[path]))]
    wrong += [f"{path} is not of the kit" for path in sorted(set(files) - set(manifest.files) - {MANIFEST})]
    if wrong:
        raise ConfigError(f"the kit was changed on its way: {'; '.join(wrong[:5])}; get it from the coordinator again")
    return manifest, parse_registry(files.get(REGISTRY, b""), named, REGISTRY)


def check_kit(home: Path) -> tuple[str, ...]:
    """What is wrong with the signed files of a home, one sentence each; empty when nothing is.

    `site.yaml` and `server.yaml` are there to be edited and may differ. A registry may be newer than the kit's.
    The site's own keys must be those that the registry names.
    """
    try:
        with storing(AUTHORITY):
            pinned = (home / AUTHORITY).read_text().strip()
        manifests = home_manifests(home, pinned)
    except (FedicomError, ValueError) as error:
        return (str(error),)
    if not manifests:
        return (f"{MANIFEST} is missing: nothing shows that the kit is whole; unpack it again",)
    newest = manifests[-1]
    found = []
    expected = dict(manifests[0].files)
    for later in manifests[1:]:  # of those only keys and certificates were put in, not their pages
        put_in = (path for path in later.files if path.startswith(("keys/", "trust/")) and path not in _KEPT)
        expected |= {path: later.files[path] for path in put_in}
    for path, digest in sorted(expected.items()):
        file = home / path
        data = _read(file)
        # keys that the registry names are compared with it below: a site may have made newer ones itself
        loose = path in (*_EDITED, REGISTRY, SIGNING, NODE)
        if state := ("is missing" if data is None else "") if loose else _state(data, digest):
            found.append(f"{path} {state}; unpack the kit again")
        if data is not None and _private(path) and (mode := file.stat().st_mode & 0o777) & 0o077:
            found.append(f"{path} has mode {mode:o}, expected 600; run chmod 600 on it")
    try:
        registry = read_registry(home / REGISTRY, pinned)
        if registry.version < newest.version:
            found.append(
                f"{REGISTRY} has version {registry.version}, the kit brought {newest.version}; install the newest one"
            )
        found += _foreign_keys(home, newest.owner, registry)
    except FedicomError as error:
        found.append(str(error))
    return tuple(found)


def home_manifests(home: Path, authority: str) -> tuple[Manifest, ...]:
    """The manifests of all kits that were put into a home, the newest last.

    Raises:
        ConfigError: One is not signed by the authority.
    """
    later = sorted((int(match[1]), path) for path in home.glob("kit-*.json") if (match := _LATER.fullmatch(path.name)))
    paths = [path for path in (home / MANIFEST, *(path for _, path in later)) if path.exists()]
    return tuple(_manifest(_read(path) or b"", authority, path.name) for path in paths)


def write_folder(files: Files, folder: Path) -> None:
    """Writes a kit as a folder: whole or not at all, 0700, private files 0600.

    Raises:
        StorageError: The folder holds something already, or cannot be written.
    """
    with new_folder(folder) as part:
        put(files, part)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all went well; what a crash left of an earlier try goes.

    A folder that is there and empty, the mount point of a volume for example, is filled in a folder inside it.

    Raises:
        StorageError: A folder of that name holds something already, or it cannot be made.
    """
    folder = folder.resolve()
    with storing(folder.name):
        there = folder.exists()
        held = (
            {entry.name for entry in folder.iterdir()} - {"lost+found"}
            if folder.is_dir()
            else ({""} if there else set())
        )
        if held:
            cut_off = "an earlier try was cut off there: empty it" if _PARTIAL in held else "choose another"
            raise StorageError(f"{folder.name} exists and is not empty; keys are never overwritten: {cut_off}")
        folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder / _PARTIAL if there else folder.parent / f".{folder.name}{_PARTIAL}"
    with storing(part.name):
        if part.exists():
            shutil.rmtree(part)
    private_folder(part)
    try:
        yield part
        with storing(folder.name):
            if there:
                folder.chmod(0o700)
                for entry in sorted(part.iterdir()):
                    entry.replace(folder / entry.name)
                flush_folder(folder)
            else:
                part.replace(folder)
                flush_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put(files: Files, folder: Path) -> None:
    """Writes these files into a folder, each one whole; those of the same names are replaced.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    for path, data in files.items():
        place = folder / path
        private_folder(place.parent)
        write_whole(place, data)  # 0600
        if not _private(path):
            place.chmod(0o644)


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a kit's folder.

    Raises:
        ConfigError: There are links, strange names, or more than a kit can hold.
        StorageError: A file cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder.name} is no folder; unpack the kit first (`fedicom site unpack`)")
    files: dict[str, bytes] = {}
    left = _MAX_BYTES
    for place in sorted(folder.rglob("*")):
        if place.is_dir() and not place.is_symlink():
            continue
        with storing(place.name):
            regular = place.is_file() and not place.is_symlink()
            size = place.lstat().st_size
        left -= size
        path = place.relative_to(folder).as_posix()
        if not regular or left < 0 or len(files) == _MAX_FILES or not _PATH.fullmatch(path):
            raise ConfigError(f"{folder.name} holds more than a kit, or a link; unpack the kit into an empty folder")
        with storing(place.name):
            files[path] = place.read_bytes()
    return files


def read_sealed(file: Path, secret: Secret) -> dict[str, bytes]:
    """The files of a sealed kit on disk.

    Raises:
        ConfigError: It holds something that is not of a kit.
        StorageError: It cannot be read; wrong passphrase, or changed on its way.
    """
    with storing(file.name):
        size = file.stat().st_size
        data = file.read_bytes() if size <= _MAX_BYTES else b""
    if size > _MAX_BYTES:
        raise ConfigError(f"{file.name} has {size} bytes, expected a kit of at most {_MAX_BYTES}; get the file again")
    return unpack(data, secret)


def pack(files: Files, secret: Secret) -> bytes:
    """A sealed archive of a kit."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, data in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o600 if _private(path) else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return seal(out.getvalue(), secret)


def unpack(sealed: bytes, secret: Secret) -> dict[str, bytes]:
    """The files of a sealed archive.

    Nothing is extracted by tarfile: plain files with plain names are read, and everything else (links, devices,
    absolute or climbing paths, two files of one name) is a refusal.

    Raises:
        StorageError: Wrong passphrase, or changed on its way.
        ConfigError: It holds something that is not of a kit.
    """
    data = unseal(sealed, secret)
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                plain = entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and 0 <= entry.size <= len(data)
                if not plain or not _PATH.fullmatch(entry.name) or entry.name in files or len(files) == _MAX_FILES:
                    raise ConfigError("the archive holds more than a kit may; get it from the coordinator again")
                content = archive.extractfile(entry)
                files[entry.name] = content.read() if content is not None else b""
    except (tarfile.TarError, EOFError, ValueError, OSError):
        raise ConfigError("what was sealed is no kit; get the file from the coordinator again") from None
    return files


def _manifest(data: bytes, authority: str, name: str) -> Manifest:
    try:
        plain = json.loads(data)
        form, body, signature = plain["format"], json.dumps(plain["kit"]), plain["signature"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{name} is no manifest of a kit; unpack the kit again") from None
    if form != FORMAT or len(plain) != 3:
        raise ConfigError(f"{name} has another format, expected {FORMAT!r}; update the older side")
    manifest = validate_json(Manifest, body)
    if manifest.authority != authority or not (
        isinstance(signature, str) and signed_by(authority, _signed_bytes(manifest), signature)
    ):
        raise ConfigError(f"{name} is not signed by authority {ascii(authority)[1:13]}; unpack the kit again")
    if odd := [path for path in manifest.files if not _PATH.fullmatch(path)]:
        raise ConfigError(f"{name} names {odd[0][:60]!a}, which can be no file of a kit; unpack the kit again")
    return manifest


def _signed_bytes(manifest: Manifest) -> bytes:
    text = json.dumps(asdict(manifest), sort_keys=True, separators=(",", ":"))
    return f"{FORMAT}\n{text}".encode()


def _state(data: bytes | None, digest: str) -> str:
    if data is None:
        return "is missing"
    return "" if hashlib.sha256(data).hexdigest() == digest else "was changed"


def _foreign_keys(home: Path, owner: str, registry: Registry) -> Iterator[str]:
    """Where the keys of a home are not those of the registry."""
    member = registry.sites.get(owner)
    if member is None and owner != COORDINATOR:
        if not owner.startswith("auditor-"):
            yield f"{owner} is not in the registry; ask the coordinator to add this site"
        return
    if member is not None and member.revoked is not None:
        yield f"{owner} was revoked on {member.revoked}; ask the coordinator"
        return
    try:
        if Signer.load(home / SIGNING).public != (member.signing if member is not None else registry.coordinator):
            yield f"{SIGNING} is not the key that the registry names for {owner}; join with the newest kit"
        if member is not None and NodeKey.load(home / NODE).public != member.node:
            yield f"{NODE} is not the key that the registry names for {owner}; join with the newest kit"
    except FedicomError as error:
        yield str(error)


def _private(path: str) -> bool:
    return path.startswith("keys/") or path.endswith((".key", ".token", ".kit", ".passphrase"))


def _read(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with storing(path.name):
        return path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
