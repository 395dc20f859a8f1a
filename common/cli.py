"""The verbs that need neither side: `recipe`, `predict`, `audit`, `version`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

SETTINGS_HELP = """settings are name=value, with the names of the YAML files in configs/, for example
  recipe=pneumonia_xray rounds=10 privacy.epsilon=8 federation.sites=5"""


def settings_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that takes Hydra's name=value words."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=SETTINGS_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="name=value")
    return parser


def recipe_verb(words: Sequence[str]) -> int:
    """`fedicom recipe show`: prints the composed recipe and its id."""
    parser = argparse.ArgumentParser(prog="fedicom recipe", description="Look at a recipe before it runs.")
    parser.add_argument("verb", choices=("show",), help="print the composed recipe and its id")
    parser.parse_args(words[:1])
    settings = settings_parser("fedicom recipe show", "Print the composed recipe and its id.")
    overrides = settings.parse_args(words[1:]).settings
    import yaml

    from common.config import as_plain, load_recipe

    recipe = load_recipe(overrides)
    print(yaml.safe_dump(as_plain(recipe), sort_keys=False, allow_unicode=True), end="")  # noqa: T201
    print(f"# id {recipe.id}")  # noqa: T201
    return 0


def predict_verb(words: Sequence[str]) -> int:
    """`fedicom predict`: one row of probabilities for every image of a folder."""
    parser = argparse.ArgumentParser(
        prog="fedicom predict",
        description="Run an exported model over a DICOM folder, with the preprocessing that the file carries.",
    )
    parser.add_argument("model", type=Path, help="model.onnx of a run")
    parser.add_argument("dicom", type=Path, metavar="DICOM_DIR")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), help="table to write; it names patients")
    arguments = parser.parse_args(words)
    from rich.console import Console
    from rich.progress import Progress

    from common.predict import predict

    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("Reading and predicting", total=None)
        done = predict(
            arguments.model,
            arguments.dicom,
            arguments.out,
            progress=lambda ready, total: bar.update(task, completed=ready, total=total),
        )
    positive = "" if done.positive is None else f", {done.positive} at or above the operating point"
    console.print(f"{done.samples} images of {done.patients} patients{positive}: {done.path}", highlight=False)
    for code, files in sorted(done.refused.items()):
        console.print(f"  {files} files not used: {code}", highlight=False)
    if done.refused:
        console.print(f"  why, file by file: {done.refused_path}", highlight=False)
    return 0


def audit_verb(words: Sequence[str]) -> int:
    """`fedicom audit verify`: checks a log, alone or against the other side's."""
    parser = argparse.ArgumentParser(prog="fedicom audit", description="Check the signed logs of a run, offline.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verify")
    verify = verbs.add_parser("verify", help="every event: numbers, hashes, chain, signatures")
    verify.add_argument("log", type=Path, help="for example audit/north.jsonl")
    verify.add_argument("--key", help="public key of the log's owner, 64 hexadecimal digits")
    verify.add_argument("--against", type=Path, help="the other side's log, which remembers heads of this one")
    arguments = parser.parse_args(words)
    from common.audit import verify as verify_log
    from common.audit import verify_against

    events = verify_log(arguments.log, arguments.key)
    lines = [f"{arguments.log.name}: {len(events)} events, chain and signatures hold"]
    if arguments.against is not None:
        name = "" if arguments.log.stem == "server" else arguments.log.stem
        found = verify_against(events, verify_log(arguments.against), name=name)
        lines.append(f"{arguments.against.name} remembers {found} heads of it, all of them there and in order")
    if arguments.key is None:
        lines.append("The key was taken from the log itself: give --key to check who signed it.")
    print("\n".join(lines))  # noqa: T201
    return 0


def version_verb(words: Sequence[str]) -> int:
    """`fedicom version`."""
    from importlib.metadata import version

    argparse.ArgumentParser(prog="fedicom version", description="Print the version.").parse_args(words)
    print(f"fedicom {version('fedicom')}")  # noqa: T201
    return 0
