"""A hospital's first steps: its own keys, the coordinator's kit, and newer ones later.

`init_verb`, `join_verb` and `unpack_verb` are `fedicom site init|join|unpack`.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from client.cli import site_parser
from common import kit as kits
from common.cli import add_by
from common.deployment import SiteHome
from common.enrolment import (
    NEXT,
    PUBLIC_FILE,
    install_kit,
    install_registry,
    login,
    note,
    public_file,
    read_public,
    site_yaml,
)
from common.identity import NodeKey, Signer, new_signing_key
from common.printable import number_of
from common.storage import named_file, named_path
from common.vault import Secret


def site_init(home: Path, *, site: str, federation: str, gateway: str, policy: str = "standard", by: str = "") -> Path:
    """Makes a home with keys that nobody else has ever held.

    Args:
        gateway: host:port of the coordinator.
        policy: Name of a file in `configs/site/` to start from.

    Returns:
        `public.json`, to be sent to the coordinator.

    Raises:
        ConfigError: A name is not allowed, or there is no such policy.
        StorageError: The folder holds something already, or cannot be written.
    """
    config = site_yaml(site=site, federation=federation, gateway=gateway, policy=policy)
    signing, node = new_signing_key(), NodeKey.new()
    keys, public = public_file(Signer.from_bytes(signing), node, federation=federation, site=site)
    files = {
        "site.yaml": config,
        PUBLIC_FILE: public,
        kits.SIGNING: signing,
        kits.NODE: node.private,
        kits.COHORT: os.urandom(32),
        "keys/superexec.secret": secrets.token_hex(32).encode(),
    }
    with kits.new_folder(home) as part:
        kits.put(files, part)
        note(SiteHome(part), "keys made", by, public_key=keys.signing)
    return home / PUBLIC_FILE


def site_renew(home: SiteHome, *, by: str = "") -> Path:
    """Makes new signing and node keys beside those in use, which stay in use until the coordinator's next kit.

    Asked again before that kit has come, it takes the same new keys: those that were sent may be on their way.

    Returns:
        `public.json`, signed with the old key and the new ones, to be sent to the coordinator.

    Raises:
        StorageError: A key cannot be read or written.
    """
    config = home.config
    signing_file, node_file = home.keys / NEXT / "signing.key", home.keys / NEXT / "node.key"
    if not (signing_file.exists() and node_file.exists()):
        new = {f"keys/{NEXT}/signing.key": new_signing_key(), f"keys/{NEXT}/node.key": NodeKey.new().private}
        kits.put(new, home.path)
    keys, public = public_file(
        Signer.load(signing_file),
        NodeKey.load(node_file),
        federation=config.federation,
        site=config.site,
        previous=Signer.load(home.signing_key),
    )
    kits.put({PUBLIC_FILE: public}, home.path)
    note(home, "keys made", by, public_key=keys.signing)
    return home.path / PUBLIC_FILE


def unpack(file: Path, folder: Path, secret: Secret, *, authority: str | None = None) -> kits.Manifest:
    """Opens a sealed kit into a folder that is empty or not there yet.

    Args:
        authority: Public key of the authority, as the coordinator told it; None takes the kit's own.

    Raises:
        ConfigError: The kit was changed, or is not of this authority.
        StorageError: Wrong passphrase, or the folder holds something already.
    """
    files = kits.read_sealed(file, secret)
    manifest, _ = kits.opened(files, authority)
    kits.write_folder(files, folder)
    return manifest


def init_verb(words: Sequence[str]) -> int:
    """`fedicom site init`: makes the site's own keys, or new ones."""
    parser = site_parser(
        "init", "Make this site's own keys; only public.json leaves the house. Not needed with a complete kit."
    )
    parser.add_argument("site", nargs="?", help="this site's name, as agreed with the coordinator")
    parser.add_argument("--federation", metavar="NAME", help="name of the federation")
    parser.add_argument("--gateway", metavar="HOST:PORT", help="the coordinator's gateway")
    parser.add_argument(
        "--policy",
        default="standard",
        metavar="NAME",
        help="policy to start from: open, standard or strict (default: %(default)s)",
    )
    parser.add_argument("--renew", action="store_true", help="make new keys for a site that takes part already")
    add_by(parser)
    arguments = parser.parse_args(words)
    if arguments.renew:
        path = site_renew(SiteHome(arguments.home), by=arguments.by)
        then = "`fedicom site join KIT` puts the new keys into use; until then the old ones are"
    else:
        if not (arguments.site and arguments.federation and arguments.gateway):
            parser.error("the site's name, --federation and --gateway are needed")
        path = site_init(
            arguments.home,
            site=arguments.site,
            federation=arguments.federation,
            gateway=arguments.gateway,
            policy=arguments.policy,
            by=arguments.by,
        )
        then = "edit site.yaml, and run `fedicom site join KIT` when the coordinator's kit has come"
    print(  # noqa: T201
        f"send {path} to the coordinator; nothing in it is secret\n"
        f"read this key to the coordinator by telephone: {read_public(path).signing}\n{then}"
    )
    return 0


def join_verb(words: Sequence[str]) -> int:
    """`fedicom site join`: puts the coordinator's kit or a newer registry into this home."""
    parser = site_parser(
        "join",
        "Put an unpacked kit, a sealed one, or a newer registry.json into this home. Settings, the cohort "
        "key, the ledger and the logs stay.",
    )
    parser.add_argument("kit", type=Path, metavar="KIT", help="folder, sealed file NAME.kit, or registry.json")
    _authority(parser)
    _passphrase(parser)
    add_by(parser)
    arguments = parser.parse_args(words)
    home = SiteHome(arguments.home)
    by = arguments.by or login()
    named_path(arguments.kit)
    if arguments.kit.suffix == ".json":
        registry = install_registry(home, arguments.kit, by=by)
        done: Sequence[str] = (f"registry of version {registry.version}, {number_of(len(registry.members), 'site')}",)
    else:
        is_folder = arguments.kit.is_dir()
        files = kits.read_folder(arguments.kit) if is_folder else kits.read_sealed(arguments.kit, _secret(arguments))
        done = install_kit(home, files, authority=arguments.authority, by=by)
    print("\n".join(done))  # noqa: T201
    return 0


def unpack_verb(words: Sequence[str]) -> int:
    """`fedicom site unpack`: opens a sealed kit."""
    parser = argparse.ArgumentParser(
        prog="fedicom site unpack", description="Open a sealed kit; the folder becomes this site's home."
    )
    parser.add_argument("kit", type=named_file, metavar="FILE", help="NAME.kit, as the coordinator sent it")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    _authority(parser)
    _passphrase(parser)
    arguments = parser.parse_args(words)
    manifest = unpack(arguments.kit, arguments.folder, _secret(arguments), authority=arguments.authority)
    lines = [f"kit of {manifest.owner} in {manifest.federation}: every file is as the authority signed it"]
    if arguments.authority is None:
        lines.append(f"compare the authority's key with the coordinator by telephone: {manifest.authority}")
    lines.append(f"read {arguments.folder / 'README.md'} next")
    print("\n".join(lines))  # noqa: T201
    return 0


def _authority(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--authority", metavar="KEY", help="the authority's public key, as the coordinator read it out")


def _passphrase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passphrase-file", type=named_file, metavar="FILE", help="file with the passphrase, mode 600")
    parser.add_argument("--passphrase-env", metavar="NAME", help="environment variable with the passphrase")


def _secret(arguments: argparse.Namespace) -> Secret:
    return Secret.passphrase_from(file=arguments.passphrase_file, variable=arguments.passphrase_env)
