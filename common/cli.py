"""The verbs that need neither side: `predict`, `version`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.storage import named_file

SETTINGS_HELP = """settings are name=value, with the names of the YAML files in configs/, for example
  recipe=pneumonia_xray rounds=10 privacy.epsilon=8 federation.sites=5"""


def settings_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that takes Hydra's name=value words."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=SETTINGS_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="name=value")
    return parser


def predict_verb(words: Sequence[str]) -> int:
    """`fedicom predict`: one row of probabilities for every image of a folder."""
    parser = argparse.ArgumentParser(
        prog="fedicom predict",
        description="Run an exported model over a DICOM folder, with the preprocessing that the file carries.",
    )
    parser.add_argument("model", type=named_file, help="model.onnx of a run")
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


def version_verb(words: Sequence[str]) -> int:
    """`fedicom version`."""
    from importlib.metadata import version

    argparse.ArgumentParser(prog="fedicom version", description="Print the version.").parse_args(words)
    print(f"fedicom {version('fedicom')}")  # noqa: T201
    return 0
