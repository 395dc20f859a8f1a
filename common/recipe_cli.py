"""`fedicom recipe`: look at a recipe, put the coordinator's name to it, check a signed one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from common.cli import SETTINGS_HELP, add_by, settings_of
from common.errors import ConfigError
from common.storage import named_file, named_place


def recipe_verb(words: Sequence[str]) -> int:
    """`fedicom recipe show|sign|verify`."""
    parser = argparse.ArgumentParser(prog="fedicom recipe", description="Look at, sign and verify recipes.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{show,sign,verify}", help="what to do")
    for name, (_, says) in _VERBS.items():
        verbs.add_parser(name, help=says, add_help=False)
    verb = parser.parse_args(words[:1]).verb
    return _VERBS[verb][0](words[1:])


def _show(words: Sequence[str]) -> int:
    overrides = settings_of(words, "fedicom recipe show", "Print the composed recipe and its id.")
    import yaml

    from common.config import as_plain, load_recipe

    recipe = load_recipe(overrides)
    print(yaml.safe_dump(as_plain(recipe), sort_keys=False, allow_unicode=True), end="")  # noqa: T201
    print(f"# id {recipe.id}")  # noqa: T201
    return 0


def _sign(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fedicom recipe sign",
        description="Compose a recipe and sign it with the coordinator's key. Sites approve exactly this file.",
        epilog=SETTINGS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="name=value", help="fields of the recipe, see below")
    parser.add_argument(
        "--home",
        type=Path,
        metavar="DIR",
        help="the coordinator's folder (default: FEDICOM_HOME, else the current folder)",
    )
    parser.add_argument("--out", type=named_place, metavar="FILE", help="file to write (default: NAME.recipe.json)")
    add_by(parser)
    arguments = parser.parse_intermixed_args(words)
    from common.config import load_recipe
    from common.deployment import ServerHome, home_folder
    from common.enrolment import login
    from common.identity import Signer
    from common.journal import SharedLog
    from common.signed import sign_recipe

    home = ServerHome(home_folder(arguments.home, "server.yaml"))
    recipe = load_recipe(arguments.settings)
    signer = Signer.load(home.signing_key)
    if signer.public != home.registry.coordinator:
        raise ConfigError(
            f"keys/signing.key is {signer.public[:12]}, the registry names coordinator key "
            f"{home.registry.coordinator[:12]}: no site would take the recipe; install the newest kit"
        )
    signed = sign_recipe(recipe, signer)
    out = arguments.out or Path(f"{recipe.name}.recipe.json")
    # Written down first: a signature that nobody knows of must not be in the world.
    SharedLog(home.audit_file, signer).append(
        "recipe signed", recipe_id=recipe.id, name=recipe.name, who=arguments.by or login()
    )
    signed.write(out)
    _say(f"{out}: recipe {recipe.name}, id {recipe.id}", f"signed by coordinator {signer.public}")
    return 0


def _verify(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fedicom recipe verify", description="Check the content, the id and the signature of a signed recipe."
    )
    parser.add_argument("file", type=named_file, metavar="FILE", help="file of `fedicom recipe sign`")
    trusted = parser.add_mutually_exclusive_group()
    trusted.add_argument("--home", type=Path, metavar="DIR", help="folder whose registry names the coordinator's key")
    trusted.add_argument("--key", metavar="HEX", help="the coordinator's public key, 64 hexadecimal digits")
    arguments = parser.parse_args(words)
    from common.signed import read_recipe

    key = arguments.key or _coordinator(arguments.home)
    signed = read_recipe(arguments.file, key)
    _say(
        f"{arguments.file.name}: recipe {signed.recipe.name}, id {signed.recipe.id}",
        f"signed by coordinator {signed.coordinator}; content and signature hold",
    )
    if key is None:
        _say("The key was taken from the file itself: give --home or --key to check whose it is.")
    return 0


def _coordinator(home: Path | None) -> str | None:
    from common.deployment import ServerHome, home_folder

    try:
        folder = home_folder(home, "server.yaml", "site.yaml")
    except ConfigError:
        if home is not None:
            raise
        return None
    return ServerHome(folder).registry.coordinator


def _say(*lines: str) -> None:
    for line in lines:
        print(line)  # noqa: T201


_VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "show": (_show, "print the composed recipe and its id"),
    "sign": (_sign, "compose a recipe and sign it with the coordinator's key"),
    "verify": (_verify, "check the content, the id and the signature of a signed recipe"),
}
