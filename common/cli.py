"""What all verbs have in common, and those that need neither side: `predict`, `version`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import imports
from common.printable import number_of
from common.storage import named_file

SETTINGS_HELP = """Settings are name=value, with the names of the YAML files in configs/, for example
  recipe=pneumonia_xray rounds=10 privacy.epsilon=8 federation.sites=5
All fields: docs/configuration.md. `fedicom recipe show name=value ...` prints the recipe that they make."""


def run_verb(
    prog: str, verbs: Mapping[str, tuple[str, str, str]], words: Sequence[str], description: str, more_help: str = ""
) -> int:
    """Runs the verb that the first word names; `--help`, and a word that is none, end the program.

    Args:
        verbs: Word to module, function and help. Only the module of the word that is given is imported.
    """
    width = max(map(len, verbs)) + 2
    listed = "\n".join(f"  {verb:<{width}}{says}" for verb, (_, _, says) in verbs.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"verbs:\n{listed}\n\n{more_help}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=verbs, metavar="verb", help=f"what to do; `{prog} verb --help` says more")
    module, function, _ = verbs[parser.parse_args(words[:1]).verb]
    return int(imports.call(f"{module}:{function}", words[1:]))


def add_by(parser: argparse.ArgumentParser) -> None:
    """Who it is that acts."""
    parser.add_argument("--by", default="", metavar="NAME", help="who does this, for the log (default: the login name)")


def settings_of(words: Sequence[str], prog: str, description: str, more_help: str = "") -> list[str]:
    """Hydra's name=value words, of a verb that takes nothing else; `--help` and words with dashes end the program."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"{SETTINGS_HELP}\n\n{more_help}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="name=value", help="fields of the run, see below")
    found, dashed = parser.parse_known_args(words)
    if dashed:
        name, _, value = dashed[0].lstrip("-").partition("=")
        after = words[words.index(dashed[0]) + 1 :]
        value = value or (after[0] if after and "=" not in after[0] and not after[0].startswith("-") else "VALUE")
        parser.error(f"{dashed[0]}: settings are written without dashes: {name}={value}")
    return list(found.settings)


def predict_verb(words: Sequence[str]) -> int:
    """`fedicom predict`: one row of probabilities for every image of a folder."""
    parser = argparse.ArgumentParser(
        prog="fedicom predict",
        description="Run an exported model over a DICOM folder, with the preprocessing that the file carries.",
    )
    parser.add_argument("model", type=named_file, help="model.onnx of a run")
    parser.add_argument("dicom", type=Path, metavar="DICOM_DIR", help="images in any folders below it")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("predictions.csv"),
        help="table to write; it names patients (default: %(default)s)",
    )
    parser.add_argument(
        "--sr",
        type=Path,
        metavar="DIR",
        help="also write a DICOM Structured Report for each image into this new folder",
    )
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
            reports=arguments.sr,
            progress=lambda ready, total: bar.update(task, completed=ready, total=total),
        )
    positive = "" if done.positive is None else f", {done.positive} at or above the operating point"
    console.print(
        f"{number_of(done.samples, 'image')} of {number_of(done.patients, 'patient')}{positive}: {done.path}",
        highlight=False,
    )
    if done.nameless:
        console.print(
            f"  {number_of(done.nameless, 'image')} without a readable Patient ID, of nobody knows how many patients: "
            "their rows say study, series and instance",
            highlight=False,
        )
    if arguments.sr is not None:
        console.print(f"{number_of(done.reports, 'structured report')}, unverified: {arguments.sr}", highlight=False)
    for code, files in sorted(done.refused.items()):
        console.print(f"  {number_of(files, 'file')} not used: {code}", highlight=False)
    if done.refused:
        console.print(f"  why, file by file: {done.refused_path}", highlight=False)
    return 0


def version_verb(words: Sequence[str]) -> int:
    """`fedicom version`."""
    from importlib.metadata import version

    argparse.ArgumentParser(prog="fedicom version", description="Print the version.").parse_args(words)
    print(f"fedicom {version('fedicom')}")  # noqa: T201
    return 0
