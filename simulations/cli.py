"""What `fedicom simulate` and `fedicom hospitals` show on a terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from common.cli import settings_of
from common.config import Phantom, load_settings, validate_json
from common.epsilon import rounded_up
from common.errors import ConfigError
from common.imports import importing
from common.printable import number_of, printable
from common.storage import named_path

# The rooms behind these verbs take seconds to import (torch, MONAI): a typo shall be answered at once.
if TYPE_CHECKING:
    from common.metrics import Metrics
    from server.conclude import Conclusion
    from server.rounds import RoundReport, ServerState
    from simulations.partition import Partition


_RUN = """Fields of the run, beside the recipe:
  simulation.hospitals=DIR   one folder a hospital (default: phantoms are made)
  out=DIR                    where everything goes (default: runs/ and the recipe's name)
  baselines=true             also train each site alone, and all data in one place
  resume=true                go on after the last finished round in out
  resume=conclude            train no more: make the model of the rounds that are done in out
  overwrite=true             remove the run in out, and start again"""


class Terminal:
    """Progress and a line a round: bars with the time left on a terminal, plain lines in a file or a pipe."""

    def __init__(self, console: Console, rounds: int = 0) -> None:
        self._console, self._rounds = console, rounds
        self._tasks: dict[str, tuple[TaskID, str]] = {}
        self._said: set[str] = set()
        self.progress = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600,  # seconds: a visit may take longer than rich's own 30
            disable=not console.is_terminal,
        )

    def step(self, what: str, done: int, total: int) -> None:
        """Moves the bar of `what`; kinds of work that differ in the last word (reading north, east) share one."""
        if not self._console.is_terminal:
            if what not in self._said and what != "Training":  # whose rounds are told
                self._said.add(what)
                self.say(what)
            return
        self.progress.start()  # a thread: not before there is something to show, see `simulations.grid.Worker.begin`
        kind = what.rpartition(" ")[0] if what.startswith("Reading ") else what
        if kind not in self._tasks:
            # what a resumed run finds done says nothing about its speed
            self._tasks[kind] = self.progress.add_task(what, total=total, completed=done), what
        task, before = self._tasks[kind]
        if before != what:
            self.progress.reset(task, total=total, completed=done, description=what)
            self._tasks[kind] = task, what
        self.progress.update(task, completed=done, total=total)

    def round(self, state: ServerState, report: RoundReport) -> None:
        """Prints what a round brought."""
        training = report.work == "train"
        name = f"round {report.round} of {self._rounds}" if training else "closing evaluation"
        score = f"mean validation AUROC {report.validation:.3f}" if report.validation is not None else "no validation"
        line = f"{name}: {number_of(len(report.accepted), 'site')}, {score}, {_duration(report.seconds)}"
        if training and not self._console.is_terminal and (left := self._rounds - report.round):
            line += f", about {_duration(left * report.seconds)} left"
        self.say(line)
        for site, why in report.refused.items():
            self.say(f"  {site} refused: {why}", style="yellow")

    def absent(self, site: str, why: str) -> None:
        """Prints which site takes no part."""
        self.say(f"{site} takes no part: {why}", style="yellow")

    def say(self, line: str, style: str | None = None) -> None:
        """Prints one line, however long."""
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def simulate_verb(words: Sequence[str]) -> int:
    """`fedicom simulate`: runs, then prints the table."""
    settings = load_settings(
        settings_of(words, "fedicom simulate", "Train a whole federation of virtual hospitals on this machine.", _RUN)
    )
    console, recipe = Console(), settings.recipe
    terminal = Terminal(console, recipe.rounds)
    sites = number_of(recipe.federation.sites, "site")
    terminal.say(
        f"Recipe {recipe.name} {recipe.id[:12]}: {number_of(recipe.rounds, 'round')}, {sites}, {recipe.privacy.promise}"
    )
    with importing():
        from simulations.folder import earlier_record, run_folder
        from simulations.run import simulate

    if settings.resume and earlier_record(run_folder(settings)) is None:
        terminal.say(f"resume: {run_folder(settings)} holds no run yet; this one begins at round 1.", style="yellow")
    try:
        try:
            conclusion = simulate(settings, terminal)
        finally:
            terminal.progress.stop()
    except KeyboardInterrupt:
        terminal.say(
            "Stopped. The same command with resume=true goes on after the last finished round; with resume=conclude it "
            "makes the model of the rounds that are done."
        )
        raise
    show_conclusion(conclusion, run_folder(settings), console)
    if settings.simulation.abreast > 1:
        from simulations.abreast import told

        terminal.say(told(run_folder(settings)))
    return 0


def show_conclusion(conclusion: Conclusion, out: Path, console: Console) -> None:
    """The short table at the end of a run: sites, the global model, what lies where."""
    from server.report.words import confidence

    summary, level = conclusion.summary, confidence(conclusion.report)
    table = Table(title="Final model", title_justify="left")
    for column in ("", "patients", f"AUROC [{level} CI]", "epsilon", "PRV", "RDP", "delta"):
        table.add_column(column, justify="left" if not column else "right")
    for name, site in summary["sites"].items():
        epsilons = (_epsilon(site[key]) for key in ("epsilon", "epsilon_prv", "epsilon_rdp"))
        patients = f"{'>= ' * site['patients_rounded_down']}{site['patients']}" if site["patients"] else "not told"
        table.add_row(name, patients, _auroc(site), *epsilons, _small(site["delta"]))
    central = conclusion.report.central
    table.add_section()
    spent = [site["epsilon"] for site in summary["sites"].values() if site["epsilon"] is not None]
    table.add_row(
        "global, central test set",
        _patients(central, conclusion.report.recipe.evaluation.min_cell),
        _auroc(summary["global"]),
        f"<= {_epsilon(max(spent))}" if spent else "none",
    )
    for name, values in _baselines(summary):
        table.add_row(name, "", _auroc(values), "none")
    console.print(table)
    for note in summary["notes"]:
        console.print(f"Note: {note}", style="yellow", highlight=False, markup=False)
    console.print(f"Written to {out}:", highlight=False, markup=False, soft_wrap=True)
    for file, what in (
        ("report.html", "the report, for a browser"),
        ("model.onnx", f"the model; differs from torch by {summary['onnx']['max_abs_difference']:.0e} at most"),
        ("model_card.md", "what the model is, and is not, for"),
        ("summary.json", "the numbers above, for programs"),
        ("audit/", "signed logs of the coordinator and of every site"),
        ("tensorboard/", "curves, for tensorboard --logdir"),
        ("checkpoints/", "state of the last rounds, for resume=true"),
    ):
        console.print(f"  {file:<14} {what}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Took {_duration(summary['wall_s'])}.", highlight=False)


def _hospitals_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedicom hospitals", description="Make virtual hospitals of real DICOM files."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{phantom,import}", help="what to do")
    phantom = verbs.add_parser(
        "phantom",
        help="synthetic radiographs or CT volumes with a nodule to detect",
        description="Draw hospitals of synthetic patients as DICOM, some with a nodule; they look like nobody.",
    )
    phantom.add_argument("out", type=Path, help="new folder, with one folder a hospital")
    phantom.add_argument("--dimensions", type=int, choices=(2, 3), default=2, help="of an image (default: %(default)s)")
    phantom.add_argument("--sites", type=int, default=4, metavar="N", help="hospitals (default: %(default)s)")
    phantom.add_argument(
        "--patients",
        type=int,
        default=120,
        metavar="N",
        help="of each hospital, before its own factor (default: %(default)s)",
    )
    phantom.add_argument(
        "--central-patients",
        type=int,
        default=160,
        metavar="N",
        help="of the coordinator's test set (default: %(default)s)",
    )
    phantom.add_argument(
        "--size", type=int, default=64, metavar="N", help="pixels along each axis (default: %(default)s)"
    )
    phantom.add_argument("--seed", type=_seed, default=0, metavar="N", help="of what is drawn (default: %(default)s)")
    load = verbs.add_parser(
        "import",
        help="MedMNIST .npz, a folder of labelled pictures, or NIfTI with a label table",
        description="Turn public data into DICOM hospitals, and deal its patients out among them.",
    )
    load.add_argument("source", type=Path, help=".npz file, folder of PNG or JPEG, or folder of .nii.gz")
    load.add_argument("out", type=Path, help="new folder, with one folder a hospital")
    load.add_argument("--sites", type=int, default=5, metavar="N", help="hospitals (default: %(default)s)")
    load.add_argument(
        "--partition",
        choices=("iid", "dirichlet", "quantity", "column"),
        default="dirichlet",
        help="who gets which patients (default: %(default)s)",
    )
    load.add_argument(
        "--alpha", type=float, default=0.5, metavar="X", help="of the Dirichlet label skew (default: %(default)s)"
    )
    load.add_argument(
        "--min-patients",
        type=int,
        default=20,
        metavar="N",
        help="least patients of a site under dirichlet (default: %(default)s)",
    )
    load.add_argument("--column", metavar="NAME", help="of the label table, for --partition column")
    load.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the deal and of the central test set (default: %(default)s)",
    )
    load.add_argument("--table", type=Path, metavar="FILE", help="label table (.csv) of NIfTI volumes")
    load.add_argument(
        "--id-column", default="id", metavar="NAME", help="column with the ID of ID.nii.gz (default: %(default)s)"
    )
    load.add_argument(
        "--label-column", default="label", metavar="NAME", help="column with the class (default: %(default)s)"
    )
    load.add_argument(
        "--classes",
        metavar="A,B,...",
        help="names in the order of their numbers, separated by commas; the last is positive (default: of known "
        "MedMNIST files their own, of pictures the subfolders by name)",
    )
    load.add_argument(
        "--modality",
        choices=("CR", "DX", "US", "CT", "MR"),
        help="DICOM modality to write (default: of known MedMNIST files their own, CR for pictures, MR for NIfTI)",
    )
    load.add_argument(
        "--central-fraction",
        metavar="X",
        type=float,
        default=0.2,
        help="share of patients held out as the central test set; MedMNIST has its own (default: %(default)s)",
    )
    load.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="regular expression of the patient in a picture's file name (default: every picture is a patient)",
    )
    load.add_argument(
        "--key",
        choices=("patient", "accession"),
        default="patient",
        help="what has a label: a patient, or of pictures each one, for task.key=accession (default: %(default)s)",
    )
    return parser


def hospitals_verb(words: Sequence[str]) -> int:
    """`fedicom hospitals`: phantoms, or public data written as DICOM."""
    arguments = _hospitals_parser().parse_args(words)
    console = Console()
    terminal = Terminal(console)

    def progress(done: int, total: int) -> None:
        terminal.step("Writing DICOM", done, total)

    left: Mapping[str, int] = {}
    with terminal.progress:
        if arguments.verb == "phantom":
            from simulations.phantoms import make_phantoms

            given = {field.name: getattr(arguments, field.name) for field in fields(Phantom)}
            make_phantoms(arguments.out, validate_json(Phantom, json.dumps(given)), arguments.sites, progress)
        else:
            left = _import(arguments, _partition(arguments), progress)
    if left:
        what = ", ".join(number_of(count, kind) for kind, count in sorted(left.items()))
        console.print(
            printable(f"Left out: {what}. Taken are PNG and JPEG files that lie in the folder of a class itself"),
            style="yellow", highlight=False, markup=False,
        )  # fmt: skip
    console.print(f"Hospitals in {arguments.out}; use them with simulation.hospitals={arguments.out}", highlight=False)
    return 0


def _seed(word: str) -> int:
    seed = int(word)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"got {seed}, expected a whole number of at least 0")
    return seed


def _import(
    arguments: argparse.Namespace, partition: Partition, progress: Callable[[int, int], None]
) -> Mapping[str, int]:
    """What was left out: kind -> how many."""
    from simulations import hospitals

    source, out, sites = arguments.source, arguments.out, arguments.sites
    for path in (source, arguments.table):
        if path is not None:
            named_path(path)
    classes = tuple(arguments.classes.split(",")) if arguments.classes else None
    if source.suffix == ".npz" or arguments.table is not None:
        one = "image" if source.suffix == ".npz" else "row"
        for option, given in (("patient-pattern", arguments.patient_pattern), ("key", arguments.key != "patient")):
            if given:  # left aside, sessions of one patient would be strangers
                raise ConfigError(f"--{option} is for folders of pictures; here every {one} is a patient")
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
        return hospitals.import_images(
            source, out, sites, partition, classes=classes, modality=arguments.modality or "CR",
            central_fraction=arguments.central_fraction, seed=arguments.seed, key=arguments.key, progress=progress,
            **pattern,
        )  # fmt: skip
    else:
        raise ConfigError(f"{source} is neither an .npz file nor a folder")
    return {}


def _partition(arguments: argparse.Namespace) -> Partition:
    from simulations.partition import ByColumn, Dirichlet, Iid, Quantity

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


def _patients(central: Metrics | None, least: int) -> str:
    if central is None:
        return "-"
    return f"< {least}" if central.suppressed else str(central.patients)


def _baselines(summary: Any) -> list[tuple[str, Any]]:
    found = summary.get("baselines")
    if not found:
        return []
    alone = [(f"{name} alone", values) for name, values in found["alone"].items()]
    return [("all data in one place", found["centralised"]), *alone]


def _auroc(values: Any) -> str:
    if values["auroc"] is None:
        return "not shown"
    noised, paid = ", noised" if values.get("noised_scores") else "", values.get("scores_epsilon")
    noised += f" for epsilon {_epsilon(paid)}" if noised and paid is not None else ""
    if values["auroc_ci"] is None:
        return f"{values['auroc']:.3f}{noised}"
    low, high = values["auroc_ci"]
    return f"{values['auroc']:.3f} [{low:.3f}, {high:.3f}]{noised}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _epsilon(value: float | None) -> str:
    return "none" if value is None else rounded_up(value)


def _small(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
