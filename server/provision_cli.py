"""`fedicom provision`: keys, certificates and kits of a federation."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.cli import add_by
from common.storage import named_file, named_path, named_place
from common.vault import Secret

_EPILOG = """verbs:
  fedicom provision PLAN --out DIR [--encrypt]         make a federation: authority, and a kit for everybody
  fedicom provision --example                          print a federation.yaml to edit
  fedicom provision add SITE [--public FILE]           a new site; with --public, under keys that it made itself
  fedicom provision revoke SITE --why TEXT             end a site's membership
  fedicom provision rotate WHO [--public FILE]         new keys for a site or the coordinator; new certificates for
                                                       the gateway, or the authority itself
  fedicom provision list                               who takes part, and what runs out
on the coordinator's server:
  fedicom provision registry FILE --home DIR           take a newer registry
  fedicom provision install KIT --home DIR             take renewed keys or certificates
  fedicom provision token NAME --role ROLE --home DIR  a token for an operator or an auditor; --remove takes it away
  fedicom provision key FILE                           make a key file that encrypts checkpoints

The first group works in the authority's folder (--authority DIR), which belongs on a machine without network.
docs/provisioning.md tells the whole story."""


def provision_verb(words: Sequence[str]) -> int:
    """`fedicom provision`: the first word is a verb, or the plan of a new federation."""
    if words and words[0] in _VERBS:
        return _VERBS[words[0]](words[1:])
    parser = argparse.ArgumentParser(
        prog="fedicom provision",
        description="Make keys, certificates and kits for a federation, and keep them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", type=named_file, metavar="PLAN", help="federation.yaml: who takes part")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--example", action="store_true", help="print a federation.yaml to edit")
    _sealing(parser)
    add_by(parser)
    arguments = parser.parse_args(words)
    if arguments.example:
        from server.kit_contents import EXAMPLE

        print(EXAMPLE, end="")  # noqa: T201
        return 0
    if arguments.plan is None or arguments.out is None:
        parser.error("a plan and --out are needed; --example prints a plan to edit")
    from common.deployment import FederationPlan, read_yaml
    from server.provision import provision

    plan = read_yaml(arguments.plan, FederationPlan)
    secret = _passphrase(arguments)
    _say(provision(plan, arguments.out, encrypt=arguments.encrypt, passphrase=secret, by=arguments.by))
    return 0


def _add(words: Sequence[str]) -> int:
    parser = _in_authority("add", "Add a site, or take a revoked one back under new keys.")
    parser.add_argument("site", help="its name")
    _kit(parser)
    arguments = parser.parse_args(words)
    from server.provision import add

    _say(add(arguments.authority, arguments.site, **_kit_of(arguments)))
    return 0


def _rotate(words: Sequence[str]) -> int:
    parser = _in_authority(
        "rotate",
        "New keys for a site or the coordinator, which retires the old ones; new certificates for the gateway; or a "
        "new certificate for the authority itself, under the key that it has, with a kit for everybody.",
    )
    parser.add_argument("who", metavar="WHO", help="a site's name, coordinator, gateway, or authority")
    _kit(parser)
    arguments = parser.parse_args(words)
    from server.provision import rotate

    _say(rotate(arguments.authority, arguments.who, **_kit_of(arguments)))
    return 0


def _revoke(words: Sequence[str]) -> int:
    parser = _in_authority("revoke", "End a site's membership; it is refused at its next call.")
    parser.add_argument("site", help="its name")
    parser.add_argument("--why", required=True, metavar="TEXT", help="one line; no patient's name")
    arguments = parser.parse_args(words)
    from server.provision import revoke

    _say(revoke(arguments.authority, arguments.site, arguments.why, by=arguments.by))
    return 0


def _list(words: Sequence[str]) -> int:
    arguments = _in_authority("list", "Who takes part, under which keys, and what runs out.").parse_args(words)
    from server.provision import members

    _say(members(arguments.authority))
    return 0


def _registry(words: Sequence[str]) -> int:
    parser = _at_home("registry", "Take a newer registry; an older one is refused.")
    parser.add_argument("file", type=named_file, metavar="FILE", help="registry.json of the authority's folder")
    arguments = parser.parse_args(words)
    from common.deployment import ServerHome
    from common.enrolment import install_registry

    registry = install_registry(ServerHome(arguments.home), arguments.file, by=arguments.by)
    _say((f"registry of version {registry.version}, sites that take part: {len(registry.members)}",))
    return 0


def _install(words: Sequence[str]) -> int:
    parser = _at_home("install", "Take renewed keys or certificates, and hand the audit log over to a new key.")
    parser.add_argument("kit", type=Path, metavar="KIT", help="folder, or sealed file NAME.kit")
    _passphrase_words(parser)
    arguments = parser.parse_args(words)
    from common.deployment import ServerHome
    from common.enrolment import install_kit
    from common.kit import read_folder, read_sealed

    named_path(arguments.kit)
    secret = Secret.passphrase_from
    files = (
        read_folder(arguments.kit)
        if arguments.kit.is_dir()
        else read_sealed(arguments.kit, secret(file=arguments.passphrase_file, variable=arguments.passphrase_env))
    )
    _say(install_kit(ServerHome(arguments.home), files, by=arguments.by))
    return 0


def _token(words: Sequence[str]) -> int:
    parser = _at_home("token", "Give a person a token, or take it away. An auditor reads; an operator runs and stops.")
    parser.add_argument("name", help="the person's name; it stands in the log")
    parser.add_argument("--role", required=True, choices=("operator", "auditor"), help="what the token allows")
    parser.add_argument("--remove", action="store_true", help="take the token away")
    arguments = parser.parse_args(words)
    from common.deployment import ServerHome
    from server.tokens import install_token, remove_token

    home = ServerHome(arguments.home)
    if arguments.remove:
        remove_token(home, arguments.role, arguments.name, by=arguments.by)
        _say((f"{arguments.role} {arguments.name} has no token any more",))
    else:
        place = install_token(home, arguments.role, arguments.name, by=arguments.by)
        _say((f"give keys/{place.name} to {arguments.name} and delete it here; only its SHA-256 is kept",))
    return 0


def _key(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fedicom provision key",
        description="Make a key file, 32 random bytes, mode 600, that encrypts checkpoints.",
    )
    parser.add_argument("file", type=named_place, metavar="FILE", help="file to make")
    arguments = parser.parse_args(words)
    from common.vault import new_key_file

    new_key_file(arguments.file)
    _say((f"name it in server.yaml (checkpoint_key: {arguments.file.name}) and keep a copy in a safe place",))
    return 0


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "add": _add,
    "revoke": _revoke,
    "rotate": _rotate,
    "list": _list,
    "registry": _registry,
    "install": _install,
    "token": _token,
    "key": _key,
}


def _in_authority(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fedicom provision {verb}", description=description)
    parser.add_argument(
        "--authority",
        type=_authority,
        default="." if Path("authority.key").is_file() else "kits/authority",
        metavar="DIR",
        help="the authority's folder (default: the current folder if it is one, else kits/authority)",
    )
    add_by(parser)
    return parser


def _authority(text: str) -> Path:
    path = Path(text)
    # By its name from outside: kits are laid beside the folder, and the parent of `.` is `.` again.
    return path if path != Path() else Path("..") / Path.cwd().name


def _at_home(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fedicom provision {verb}", description=description)
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("FEDICOM_HOME", ".")),
        metavar="DIR",
        help="the coordinator's folder (default: FEDICOM_HOME, else the current folder)",
    )
    add_by(parser)
    return parser


def _kit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--public", type=named_file, metavar="FILE", help="public.json that the site made and sent")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the kit (default: where the authority's lies)"
    )
    _sealing(parser)


def _kit_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "public": arguments.public,
        "out": arguments.out,
        "encrypt": arguments.encrypt,
        "passphrase": _passphrase(arguments),
        "by": arguments.by,
    }


def _sealing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encrypt",
        action="store_true",
        help="write sealed files NAME.kit instead of folders, each under a passphrase of its own, kept in the "
        "authority's folder; or under yours:",
    )
    _passphrase_words(parser)


def _passphrase_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--passphrase-file", type=named_file, metavar="FILE", help="file with the passphrase, mode 0600"
    )
    parser.add_argument("--passphrase-env", metavar="NAME", help="environment variable with the passphrase")


def _passphrase(arguments: argparse.Namespace) -> Secret | None:
    if arguments.passphrase_file is None and arguments.passphrase_env is None:
        return None
    return Secret.passphrase_from(file=arguments.passphrase_file, variable=arguments.passphrase_env)


def _say(lines: Sequence[str]) -> None:
    print("\n".join(lines))  # noqa: T201
