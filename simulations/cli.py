"""What `fedicom simulate` and `fedicom hospitals` show on a terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from common.cli import settings_parser
from common.config import Phantom, load_settings
from common.errors import ConfigError
from server.conclude import Conclusion
from server.rounds import RoundReport, ServerState
from simulations import hospitals
from simulations.partition import ByColumn, Dirichlet, Iid, Partition, Quantity
from simulations.phantoms import make_phantoms
from simulations.run import run_folder, simulate


class Terminal:
    """Bars with the time left, and a line a round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def step(self, what: str, done: int, total: int) -> None:
        """Moves the bar of `what`."""
        if what not in self._tasks:
            self._tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self._tasks[what], completed=done, total=total)

    def round(self, state: ServerState, report: RoundReport) -> None:
        """Prints what a round brought."""
        name = f"round {report.round}" if report.work == "train" else "closing evaluation"
        score = f"mean validation AUROC {report.validation:.3f}" if report.validation is not None else "no validation"
        line = f"{name}: {len(report.accepted)} sites, {score}, {report.seconds:.1f} s"
        self._console.print(line, highlight=False)
        for site, why in report.refused.items():
            self._console.print(f"  {site} refused: {why}", style="yellow", highlight=False, markup=False)


def simulate_verb(words: Sequence[str]) -> int:
    """`fedicom simulate`: runs, then prints the table."""
    parser = settings_parser("fedicom simulate", "Train a whole federation of virtual hospitals on this machine.")
    settings = load_settings(parser.parse_args(words).settings)
    console = Console()
    recipe = settings.recipe
    privacy = recipe.privacy
    if not privacy.active:
        promise = "no differential privacy"
    elif privacy.epsilon is not None:
        promise = f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g}"
    else:
        promise = f"noise multiplier {privacy.noise_multiplier:g}, delta {privacy.delta:g}"
    console.print(f"Recipe [bold]{recipe.name}[/] {recipe.id[:12]}: {recipe.rounds} rounds, {promise}", highlight=False)
    terminal = Terminal(console)
    with terminal.progress:
        conclusion = simulate(settings, terminal)
    show_conclusion(conclusion, run_folder(settings), console)
    return 0


def show_conclusion(conclusion: Conclusion, out: Path, console: Console) -> None:
    """The short table at the end of a run: sites, the global model, what lies where."""
    summary = conclusion.summary
    table = Table(title="Final model", title_justify="left")
    for column in ("", "patients", "AUROC [95 % CI]", "epsilon", "delta"):
        table.add_column(column, justify="left" if not column else "right")
    for name, site in summary["sites"].items():
        table.add_row(name, str(site["patients"]), _auroc(site), _number(site["epsilon"]), _small(site["delta"]))
    central = conclusion.report.central
    table.add_section()
    spent = [site["epsilon"] for site in summary["sites"].values() if site["epsilon"] is not None]
    table.add_row(
        "global, central test set",
        str(central.patients) if central is not None else "-",
        _auroc(summary["global"]),
        f"<= {_number(max(spent))}" if spent else "none",
        "",
    )
    for name, values in _baselines(summary):
        table.add_row(name, "", _auroc(values), "none", "")
    console.print(table)
    for note in summary["notes"]:
        console.print(f"Note: {note}", style="yellow", highlight=False, markup=False)
    for file, what in (
        ("report.html", "the report, for a browser"),
        ("model.onnx", f"the model; differs from torch by {summary['onnx']['max_abs_difference']:.0e} at most"),
        ("model_card.md", "what the model is, and is not, for"),
        ("summary.json", "the numbers above, for programs"),
        ("audit/", "signed logs of the coordinator and of every site"),
        ("tensorboard/", "curves, for tensorboard --logdir"),
        ("checkpoints/", "state of the last rounds, for resume=true"),
    ):
        console.print(f"  {out / file}  {what}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Took {summary['wall_s']:.0f} s.", highlight=False)


def _hospitals_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedicom hospitals", description="Make virtual hospitals of real DICOM files."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{phantom,import}")
    phantom = verbs.add_parser("phantom", help="synthetic radiographs or CT volumes with a nodule to detect")
    phantom.add_argument("out", type=Path)
    phantom.add_argument("--dimensions", type=int, choices=(2, 3), default=2)
    phantom.add_argument("--sites", type=int, default=4)
    phantom.add_argument("--patients", type=int, default=120, help="of each hospital, before its own factor")
    phantom.add_argument("--central-patients", type=int, default=160, help="of the coordinator's test set")
    phantom.add_argument("--size", type=int, default=64, help="pixels along each axis")
    phantom.add_argument("--seed", type=int, default=0)
    load = verbs.add_parser("import", help="MedMNIST .npz, a folder of labelled pictures, or NIfTI with a label table")
    load.add_argument("source", type=Path, help=".npz file, folder of PNG or JPEG, or folder of .nii.gz")
    load.add_argument("out", type=Path)
    load.add_argument("--sites", type=int, default=5)
    load.add_argument("--partition", choices=("iid", "dirichlet", "quantity", "column"), default="dirichlet")
    load.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet label skew")
    load.add_argument("--min-patients", type=int, default=20, help="least patients of a site under dirichlet")
    load.add_argument("--column", help="of the label table, for --partition column")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--table", type=Path, help="label table (.csv) of NIfTI volumes")
    load.add_argument("--id-column", default="id")
    load.add_argument("--label-column", default="label")
    load.add_argument(
        "--classes", help="names in the order of their numbers, separated by commas; the last is positive"
    )
    load.add_argument("--modality", help="DICOM modality to write (CR, DX, US, CT, MR)")
    load.add_argument("--central-fraction", type=float, default=0.2, help="patients held out as the central test set")
    load.add_argument("--patient-pattern", help="regular expression of the patient in a picture's file name")
    return parser


def hospitals_verb(words: Sequence[str]) -> int:
    """`fedicom hospitals`: phantoms, or public data written as DICOM."""
    arguments = _hospitals_parser().parse_args(words)
    console = Console()
    terminal = Terminal(console)

    def progress(done: int, total: int) -> None:
        terminal.step("Writing DICOM", done, total)

    with terminal.progress:
        if arguments.verb == "phantom":
            phantom = Phantom(
                dimensions=arguments.dimensions,
                patients=arguments.patients,
                central_patients=arguments.central_patients,
                size=arguments.size,
                seed=arguments.seed,
            )
            make_phantoms(arguments.out, phantom, arguments.sites, progress)
        else:
            _import(arguments, _partition(arguments), progress)
    console.print(f"Hospitals in {arguments.out}; use them with simulation.hospitals={arguments.out}", highlight=False)
    return 0


def _import(arguments: argparse.Namespace, partition: Partition, progress: hospitals.Progress) -> None:
    source, out, sites = arguments.source, arguments.out, arguments.sites
    classes = tuple(arguments.classes.split(",")) if arguments.classes else None
    if source.suffix == ".npz":
        hospitals.import_medmnist(
            source, out, sites, partition, modality=arguments.modality, classes=classes, progress=progress
        )
    elif arguments.table is not None:
        if classes is None:
            raise ConfigError(
                "--classes is missing: name the classes in the order of their numbers, as in --classes no,yes"
            )
        hospitals.import_nifti(
            source, arguments.table, out, sites, partition, id_column=arguments.id_column,
            label_column=arguments.label_column, classes=classes, modality=arguments.modality or "MR",
            columns=(arguments.column,) if arguments.column else (), central_fraction=arguments.central_fraction,
            seed=arguments.seed, progress=progress,
        )  # fmt: skip
    elif source.is_dir():
        pattern = {"patient": arguments.patient_pattern} if arguments.patient_pattern else {}
        hospitals.import_images(
            source, out, sites, partition, classes=classes, modality=arguments.modality or "CR",
            central_fraction=arguments.central_fraction, seed=arguments.seed, progress=progress, **pattern,
        )  # fmt: skip
    else:
        raise ConfigError(f"{source} is neither an .npz file nor a folder")


def _partition(arguments: argparse.Namespace) -> Partition:
    match arguments.partition:
        case "iid":
            return Iid(seed=arguments.seed)
        case "quantity":
            return Quantity(seed=arguments.seed)
        case "column":
            if not arguments.column:
                raise ConfigError("--partition column needs --column NAME, a column of the label table")
            return ByColumn(arguments.column)
        case _:
            return Dirichlet(alpha=arguments.alpha, seed=arguments.seed, min_patients=arguments.min_patients)


def _baselines(summary: Any) -> list[tuple[str, Any]]:
    found = summary.get("baselines")
    if not found:
        return []
    alone = [(f"{name} alone", values) for name, values in found["alone"].items()]
    return [("all data in one place", found["centralised"]), *alone]


def _auroc(values: Any) -> str:
    if values["auroc"] is None:
        return "not shown"
    if values["auroc_ci"] is None:
        return f"{values['auroc']:.3f}"
    low, high = values["auroc_ci"]
    return f"{values['auroc']:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _small(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
