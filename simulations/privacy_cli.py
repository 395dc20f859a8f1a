"""`fedicom privacy`: test the mechanism, and attack what it protects."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from common.cli import SETTINGS_HELP
from common.errors import ConfigError

# The rooms behind these verbs take seconds to import (torch): a typo shall be answered at once.
if TYPE_CHECKING:
    from common.config import Recipe
    from simulations.attacks.study import Row

_PATIENTS = 300
_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is audited."""

    recipe: Recipe
    patients: Mapping[str, int]
    """Site to training patients."""
    weights: str = ""
    """Digest of the final weights of a run; empty for a recipe."""
    folder: Path
    """Where the results go unless told otherwise."""


def privacy_verb(words: Sequence[str]) -> int:
    """`fedicom privacy audit|attack`."""
    parser = argparse.ArgumentParser(
        prog="fedicom privacy", description="Test the privacy mechanism of this installation, and attack its models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(_VERBS) + "}", help="what to do")
    for name, (_, says) in _VERBS.items():
        verbs.add_parser(name, help=says, add_help=False)
    verb = parser.parse_args(words[:1]).verb
    return _VERBS[verb][0](words[1:])


def _audit(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fedicom privacy audit",
        description="Test what trains this recipe here: the size, shape and secrecy of the noise, the clip,\n"
        "the draws, the account; then train once with made-up patients and bound epsilon from below\n"
        "(one-run audit). Exit code 1 when a test fails or the bound passes the accountant's epsilon.\n"
        "No images are read.",
        epilog=SETTINGS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="*", metavar="RUN|RECIPE", help="folder of a run, file of a signed recipe, or name=value words"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the JSON and the page go (default: the run; of a recipe, runs/NAME-privacy)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--patients", type=int, nargs="+", metavar="N",
        help=f"training patients of each site of a recipe (default: one site of {_PATIENTS})",
    )  # fmt: skip
    parser.add_argument(
        "--canaries",
        type=int,
        default=1000,
        metavar="M",
        help="of the one-run audit; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=_STEPS, metavar="T",
        help="noised steps of the one-run audit; 0: all of the run (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of coins and made-up images; the noise is secret all the same (default: drawn)",
    )
    arguments = parser.parse_intermixed_args(words)
    from client.privacy_audit import privacy_audit
    from client.privacy_table import show_audit
    from common.privacy_audit import FILE
    from simulations.privacy_page import write_audit_page

    subject = subject_of(arguments.what, arguments.patients)
    console = Console()
    told = None if arguments.json else lambda what: console.print(f"{what} ...", style="dim", highlight=False)
    found = privacy_audit(
        subject.recipe, subject.patients, weights=subject.weights, canaries=arguments.canaries,
        steps=arguments.steps or None, seed=arguments.seed, show=told or (lambda what: None),
    )  # fmt: skip
    out = arguments.out or subject.folder
    out.mkdir(parents=True, exist_ok=True)
    found.write(out / FILE)
    write_audit_page(found, out / "privacy_audit.html")
    if arguments.json:
        print(json.dumps(asdict(found), indent=1, sort_keys=True))  # noqa: T201
    else:
        show_audit(found, console)
        console.print(f"Written to {out / FILE} and .html", highlight=False, soft_wrap=True)
    return 0 if found.passed else 1


def subject_of(what: Sequence[str], patients: Sequence[int] | None) -> Subject:
    """Reads a run's folder, a signed recipe, or composes a recipe.

    Raises:
        ConfigError: It is none of them, or its parts do not fit.
    """
    from common.config import load_recipe
    from common.signed import read_recipe

    if len(what) == 1 and Path(what[0]).is_dir():
        if patients:
            raise ConfigError("--patients is for a recipe: the folder of a run tells the patients of its sites")
        return _of_run(Path(what[0]))
    if len(what) == 1 and Path(what[0]).is_file():
        recipe = read_recipe(Path(what[0]), None).recipe
    elif odd := [word for word in what if "=" not in word]:
        raise ConfigError(f"{odd[0]} is no folder of a run and no file of a recipe; recipes are said as recipe=NAME")
    else:
        recipe = load_recipe(what)
    counts = {f"site {n}" if n else "one site": count for n, count in enumerate(patients or [_PATIENTS])}
    if patients and len(patients) > 1:
        counts = {f"site {n}": count for n, count in enumerate(patients, start=1)}
    return Subject(recipe=recipe, patients=counts, folder=Path("runs") / f"{recipe.name}-privacy")


def _of_run(folder: Path) -> Subject:
    from server.release import ended

    recipe, summary = ended(folder)
    # a site that told no count is tested as the smallest that would have been
    least = recipe.evaluation.min_cell
    patients = {name: max(site["train_patients"] or 0, least) for name, site in summary["sites"].items()}
    return Subject(recipe=recipe, patients=patients, weights=summary["weight_digest"], folder=folder)


def _attack(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fedicom privacy attack",
        description="Attack small federations with and without privacy: membership inference (loss threshold, LiRA) on "
        "the global model and on a site's update, and gradient inversion of one update. Writes attacks.json, a page "
        "with pictures, and prints the table. With the defaults, about five minutes on one core.",
    )
    parser.add_argument("images", nargs="?", type=Path, metavar="FILE.npz|FOLDER",
        help="MedMNIST of two classes, or a folder of `fedicom hospitals` (default: phantoms alone)",
    )  # fmt: skip
    parser.add_argument(
        "--epsilon", type=_epsilon, nargs="+", default=[None, 50.0, 8.0, 3.0, 1.0], metavar="E",
        help="privacy of each federation: numbers, or none (default: none 50 8 3 1)",
    )  # fmt: skip
    parser.add_argument(
        "--models",
        type=int,
        default=12,
        metavar="N",
        help="federations for each epsilon, 4 or more; 0: inversion only (default: %(default)s)",
    )
    parser.add_argument(
        "--patients",
        type=int,
        default=800,
        metavar="N",
        help="half of them are in each training (default: %(default)s)",
    )
    parser.add_argument("--sites", type=int, default=2, metavar="N", help="of each federation (default: %(default)s)")
    parser.add_argument(
        "--pictures", type=int, default=2, metavar="N", help="of each kind are rebuilt; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        metavar="N",
        type=int,
        default=400,
        help="of the gradient inversion, for each of two starts (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of data, draws and starts (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/attacks"),
        metavar="DIR",
        help="where it is written (default: %(default)s)",
    )
    arguments = parser.parse_args(words)
    if arguments.models and arguments.models < 4:
        raise ConfigError(f"--models: got {arguments.models}; LiRA needs at least 4 federations, or 0 for none")
    for name, least in (("sites", 1), ("pictures", 0), ("iterations", 1), ("seed", 0)):
        if (got := getattr(arguments, name)) < least:
            raise ConfigError(f"--{name}: got {got}, expected at least {least}")
    if arguments.patients < 4 * arguments.sites:
        raise ConfigError(
            f"--patients: got {arguments.patients}; {arguments.sites} sites, of which each trains on half "
            f"of its own, need at least {4 * arguments.sites}"
        )
    from common.compute import compute_with
    from common.storage import storing, write_whole
    from simulations.attacks.images import images_of, phantoms
    from simulations.attacks.study import inversion, membership, plain, table
    from simulations.cli import Terminal
    from simulations.privacy_page import write_attack_page

    with storing("the folder of --out"):  # now: it would be found after minutes of attacks
        arguments.out.mkdir(parents=True, exist_ok=True)
    compute_with(threads=1)
    drawn = phantoms(seed=arguments.seed)
    images = drawn if arguments.images is None else images_of(arguments.images)
    if arguments.models and arguments.patients > len(images.train_N):
        raise ConfigError(f"--patients: got {arguments.patients}, {images.name} has {len(images.train_N)}")
    epsilons = arguments.epsilon
    console = Console()
    terminal = Terminal(console)
    with terminal.progress:
        galleries = tuple(
            inversion(
                kind, epsilons, pictures=range(arguments.pictures), iterations=arguments.iterations,
                seed=arguments.seed, show=terminal.step,
            )
            for kind in ((drawn,) if images is drawn else (drawn, images))
            if arguments.pictures
        )  # fmt: skip
        rows: tuple[Row, ...] = ()
        if arguments.models:
            rows = membership(
                images, epsilons, patients=arguments.patients, models=arguments.models, sites=arguments.sites,
                seed=arguments.seed, show=terminal.step,
            )  # fmt: skip
    found = plain(rows, galleries) | {
        "images": images.name, "models": arguments.models, "patients": arguments.patients, "sites": arguments.sites,
        "seed": arguments.seed,
    }  # fmt: skip
    write_whole(arguments.out / "attacks.json", (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    write_attack_page(images.name, rows, galleries, found, arguments.out / "attacks.html")
    print(table(rows, galleries))  # noqa: T201
    console.print(f"Written to {arguments.out}/attacks.json and .html", highlight=False, soft_wrap=True)
    return 0


def _epsilon(word: str) -> float | None:
    epsilon = None if word == "none" else float(word)
    if epsilon is not None and not 1e-6 <= epsilon <= 1e6:
        raise argparse.ArgumentTypeError(f"got {word}, expected a number from 1e-6 to 1e6, or none")
    return epsilon


_VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "audit": (_audit, "test noise, clip, draws and account of a recipe, and bound epsilon from below"),
    "attack": (_attack, "membership inference and gradient inversion, with and without privacy"),
}
