"""`fedicom site selftest`: a site tests the privacy mechanism that is installed on its own machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from client.cli import add_recipe, signed_recipe, site_home, site_parser

_PATIENTS = 300


def selftest_verb(words: Sequence[str]) -> int:
    """`fedicom site selftest`: exit 1 when a test fails."""
    parser = site_parser(
        "selftest",
        "Test what would train a recipe here, on the device of site.yaml: size and secrecy of the noise, "
        "the clip, the draws, the account. No image is read, nothing is sent and no budget is spent. Exit code 1 when "
        "a test fails.",
    )
    add_recipe(parser)
    parser.add_argument(
        "--patients", type=int, default=_PATIENTS, metavar="N", help="training patients here (default: %(default)s)"
    )
    parser.add_argument(
        "--canaries", type=int, default=0, metavar="M", help="also a one-run audit with M canaries (default: none)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result, for the coordinator")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(words)
    from client.machine import devices_of
    from client.privacy_audit import privacy_audit
    from client.privacy_table import show_audit

    home = site_home(arguments.home)
    recipe = signed_recipe(home, arguments.recipe).recipe
    found = privacy_audit(
        recipe, {home.config.site: arguments.patients}, canaries=arguments.canaries, steps=60,
        device=devices_of(home.config)[0],
    )  # fmt: skip
    if arguments.out is not None:
        found.write(arguments.out)
    if arguments.json:
        print(json.dumps(asdict(found), indent=1, sort_keys=True))  # noqa: T201
    else:
        show_audit(found, Console())
    return 0 if found.passed else 1
