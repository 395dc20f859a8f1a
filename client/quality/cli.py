"""`fedicom data report`, `drift` and `diff`: a site looks at its own data. What is shown names no patient."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.data_cli import _add_places, _cache, _place, _progress
from common.clock import utc_now
from common.errors import ConfigError, DataError
from common.printable import number_of
from common.storage import page_with_json, private_folder, storing, write_whole

if TYPE_CHECKING:
    from client.quality.drift import Drift
    from client.quality.report import Report
    from client.quality.survey import Survey
    from client.quality.table import Table
    from client.versions import Difference, Version

_TIME = re.compile(r"^(?P<folder>.+)@(?P<first>\d{4}-\d\d-\d\d)?\.\.(?P<last>\d{4}-\d\d-\d\d)?$")
_MOST_NAMES = 20
_LEAST_NAME = 6


def report_verb(words: Sequence[str]) -> int:
    """`fedicom data report`: exit 1 when it finds an error, or the site's limits are not kept."""
    parser = argparse.ArgumentParser(
        prog="fedicom data report",
        description="Look at every image and label of a folder, and write a page about classes, machines, missing "
        "tags, duplicates, burned-in text, annotators and labels to look at. The page is patient data: it stays in "
        "the house. Exit code 1 when there is an error, or the limits of site.yaml are not kept.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of DICOM files, or one that holds `dicom/`")
    parser.add_argument(
        "labels", type=Path, nargs="?", metavar="labels.csv", help="table of labels (default: DIR/labels.csv)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write, or a folder; the JSON goes beside it (default: quality.html)",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON; no file is written without --out")
    parser.add_argument(
        "--classes",
        default="",
        metavar="A,B,...",
        help="class names in their order, for weighted kappa (default: by the alphabet)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that read images (default: one for each core)")
    parser.add_argument(
        "--where", metavar="NAME", help="only print which files a pseudonym of the report stands for; for this screen"
    )
    _add_places(parser)
    arguments = parser.parse_intermixed_args(words)
    if arguments.where is not None:
        return _where(arguments)
    from client.cohort import frozen_split
    from client.quality.gate import keep_report
    from client.quality.page import page
    from client.quality.report import make_report
    from client.quality.survey import fingerprint, survey
    from client.quality.table import read_table
    from common.cache import must_lie_beside

    out = arguments.out or Path("quality.html")
    if arguments.out is not None or not arguments.json:
        must_lie_beside(out, arguments.folder, "the page (--out)")
    out = page_with_json(out, "quality.html")
    cache, key = _place(arguments, arguments.folder)
    path = arguments.labels or arguments.folder / "labels.csv"
    if not path.is_file():
        raise DataError("there is no label table; give labels.csv after the folder")
    with storing("labels.csv"):
        data = path.read_bytes()
    table = read_table(data, [name.strip() for name in arguments.classes.split(",") if name.strip()])
    with _progress() as bar:
        found = survey(
            arguments.folder, table, cache=cache, key=key, jobs=arguments.jobs, progress=_told(bar),
            secret=_secret(arguments),
        )  # fmt: skip
        bar.add_task("Comparing", total=None)
        report, points = make_report(
            found,
            table,
            key=key,
            made=utc_now().removesuffix("+00:00"),
            fingerprint=fingerprint(arguments.folder, data, key),
            split=frozen_split(cache, key),
        )
    report = _with_objections(report, arguments)
    plain = report.plain()
    if arguments.site is not None:
        private_folder(arguments.site.state)
        keep_report(arguments.site.quality_file(arguments.folder.absolute()), plain, key)
    if arguments.out is not None or not arguments.json:
        write_whole(out, page(report, points).encode())
        write_whole(out.with_suffix(".json"), json.dumps(plain, indent=1).encode())
    if arguments.json:
        print(json.dumps(plain, indent=1))  # noqa: T201
    else:
        _say(report, out)
    return 1 if report.objections or any(each.level == "error" for each in report.findings) else 0


def drift_verb(words: Sequence[str]) -> int:
    """`fedicom data drift`: how two cohorts, or two times, differ."""
    parser = argparse.ArgumentParser(
        prog="fedicom data drift",
        description="Compare two folders, or two times of one, on fixed bins: intensities after preparation, spacing, "
        "age, sex, class, vendor, modality and kilovoltage. A time is written behind the folder by Study Date, for "
        "example images@..2025-12-31 and images@2026-01-01.. , both days included.",
    )
    parser.add_argument("a", metavar="A", help="folder, or folder@FROM..TO")
    parser.add_argument("b", metavar="B", help="another one, or another time of it")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="preparation as a recipe says: recipe=NAME")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument(
        "--min-cell",
        type=int,
        default=5,
        metavar="N",
        help="fewest patients of a bin that is shown (default: %(default)s)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that read images (default: one for each core)")
    _add_places(parser)
    arguments = parser.parse_intermixed_args(words)
    if arguments.min_cell < 1:
        raise ConfigError(f"--min-cell: got {arguments.min_cell}, expected at least 1")
    from client.quality.drift import compare
    from client.quality.survey import between, survey
    from common.config import Preprocessing, load_settings

    if arguments.settings:
        data: tuple[Preprocessing, ...] = (load_settings(arguments.settings).recipe.data,)
    else:
        data = (Preprocessing(size=(64, 64)), Preprocessing(size=(32, 32, 32)))
    places = [_place_and_time(words) for words in (arguments.a, arguments.b)]
    cache, key = _place(arguments, *(folder for folder, _, _ in places))
    tables = {folder: _table(folder) for folder, _, _ in places}
    classes = _common_classes([tables[folder] for folder, _, _ in places])
    surveys: dict[Path, Survey] = {}
    with _progress() as bar:
        for folder in tables:
            surveys[folder] = survey(
                folder, tables[folder] if classes else None, cache=cache, key=key, data=data, jobs=arguments.jobs,
                progress=_told(bar), secret=_secret(arguments),
            )  # fmt: skip
        bar.add_task("Comparing", total=None)
        sides = [
            surveys[folder] if first is None and last is None else between(surveys[folder], first, last)
            for folder, first, last in places
        ]
        found = compare(*sides, classes=classes, min_cell=arguments.min_cell)
    if arguments.json:
        print(json.dumps(found.plain(), indent=1))  # noqa: T201
    else:
        _show_drift(found)
    return 0


def diff_verb(words: Sequence[str]) -> int:
    """`fedicom data diff`: what changed between two versions of the cohort; exit 1 when somebody changed sides."""
    parser = argparse.ArgumentParser(
        prog="fedicom data diff",
        description="Say what changed between two versions of the cohort, each named by the first digits of its "
        "manifest hash as it stands in logs and updates. Without names: list the versions. Exit code 1 when a patient "
        "changed between training, validation and test, which must never be.",
    )
    parser.add_argument("old", nargs="?", metavar="OLD", help="first digits of its manifest hash")
    parser.add_argument("new", nargs="?", metavar="NEW", help="first digits of its manifest hash")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    _add_places(parser)
    arguments = parser.parse_intermixed_args(words)
    if (arguments.old is None) != (arguments.new is None):
        raise ConfigError("give two versions, OLD and NEW, or none to list all")
    from client.versions import difference, find, known

    _, key = _place(arguments)
    state, secret = _state(arguments), _secret(arguments)
    if arguments.old is None:
        versions = known(state, key, secret)
        if arguments.json:
            print(json.dumps([_line(each) for each in versions], indent=1))  # noqa: T201
        else:
            _show_versions(versions)
        return 0
    found = difference(find(state, key, arguments.old, secret), find(state, key, arguments.new, secret))
    if arguments.json:
        print(json.dumps(found.plain(), indent=1))  # noqa: T201
    else:
        _show_difference(found)
    return 1 if found.splits_changed else 0


def _where(arguments: argparse.Namespace) -> int:
    """Prints files, one a line. This names patients, so it goes to the screen alone."""
    from client.quality.survey import where

    name = str(arguments.where)
    if not re.fullmatch(rf"[0-9a-fA-F]{{{_LEAST_NAME},64}}", name):
        raise ConfigError(f"--where takes {_LEAST_NAME} or more digits of a pseudonym, as the report shows them")
    cache, key = _place(arguments, arguments.folder)
    with _progress() as bar:
        found = where(
            arguments.folder, name, cache=cache, key=key, jobs=arguments.jobs, progress=_told(bar),
            secret=_secret(arguments),
        )  # fmt: skip
    if not found:
        raise DataError(
            f"nothing in this folder has a pseudonym that begins with {name}; it must be of a report with the same "
            "--site or --cache"
        )
    for each in found:
        for file in each.files:
            frames = f" frames {min(each.frames)}-{max(each.frames)}" if each.frames else ""
            print(f"{each.kind:<8}{ascii(str(file))[1:-1]}{frames}")  # noqa: T201
    return 0


def _secret(arguments: argparse.Namespace) -> bytes | None:
    """Of the site's cache, where that is encrypted."""
    if arguments.site is None:
        return None
    from common.shard import read_secret

    return read_secret(arguments.site.config.cache.key, arguments.site.path)


def _told(bar: Any) -> Callable[[int, int], None]:
    """A bar of its own for one folder."""
    task = bar.add_task("Looking at images", total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _with_objections(report: Report, arguments: argparse.Namespace) -> Report:
    """With what the gate of site.yaml says, where the site has one."""
    if arguments.site is None:
        return report
    from client.quality.gate import objections

    gate = arguments.site.config.quality
    return report if gate is None else replace(report, objections=objections(report.plain(), gate))


def _state(arguments: argparse.Namespace) -> Path:
    """Where records are kept: the state of the site, or without a site the cache."""
    return _cache(arguments) if arguments.site is None else Path(arguments.site.state)


def _table(folder: Path) -> Table | None:
    from client.quality.table import read_table

    path = folder / "labels.csv"
    if not path.is_file():
        return None
    with storing("labels.csv"):
        return read_table(path.read_bytes())


def _common_classes(tables: Sequence[Table | None]) -> tuple[str, ...]:
    """Of both; () where one has no labels, for then classes are not compared."""
    found = [table.task.classes for table in tables if table is not None]
    if len(found) < len(tables):
        return ()
    if len(set(found)) > 1:
        raise DataError("the two label tables have different classes; only cohorts of one task can be compared")
    return found[0]


def _place_and_time(words: str) -> tuple[Path, date | None, date | None]:
    match = _TIME.match(words)
    if match is None or Path(words).is_dir():
        return Path(words), None, None
    try:
        first, last = (date.fromisoformat(match[side]) if match[side] else None for side in ("first", "last"))
    except ValueError:
        raise ConfigError("a time is FROM..TO with days such as 2026-01-31; one of the days does not exist") from None
    return Path(match["folder"]), first, last


def _say(report: Report, out: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    colour = {"error": "bold red", "warning": "yellow", "note": ""}
    units = f"{number_of(report.images, 'image')}, {number_of(report.volumes, 'volume')}"
    console.print(
        f"{number_of(report.patients, 'patient')}, {report.studies:,} studies, {report.series:,} series: {units}"
    )
    for each in report.findings:
        text = Text.assemble((f"{each.level:<8}", colour[each.level]), each.what)
        if each.do:
            text.append(f"\n{'':<8}-> {each.do}")
        console.print(text, soft_wrap=True)
    for objection in report.objections or ():
        console.print(Text.assemble(("limit   ", "bold red"), objection), soft_wrap=True)
    console.print(f"{out} and {out.with_suffix('.json')}; {report.notice}", soft_wrap=True)


def _show_drift(found: Drift) -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(highlight=False)
    console.print(
        f"A: {number_of(found.patients_a, 'patient')}, B: {found.patients_b:,}; bins version {found.bins_version}, "
        f"{found.bins_sha256[:12]}"
    )
    for each in found.features:
        console.print(each.says, soft_wrap=True, markup=False)
    for each in found.features:
        if not each.patients_a:
            continue
        grid = Grid(each.feature, "A", "B")
        for name, a, b in zip(each.bins, each.patients_a, each.patients_b, strict=True):
            if (a, b) != (0, 0):
                few = f"under {found.min_cell}"
                grid.add_row(name, *(few if count is None else f"{count:,}" for count in (a, b)))
        console.print(grid)
    console.print(found.notice, soft_wrap=True)


def _line(version: Version) -> dict[str, Any]:
    return {
        "manifest": version.manifest, "recorded": version.recorded, "recipe": version.recipe,
        "patients": len(version.members), "images": sum(len(each.images) for each in version.members.values()),
    }  # fmt: skip


def _show_versions(versions: Sequence[Version]) -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(highlight=False)
    if not versions:
        console.print("No version is recorded yet; the first is when images are read for a recipe.")
        return
    grid = Grid("version", "recorded", "recipe", "patients", "images")
    for line in map(_line, versions):
        shown = (line["recorded"], line["recipe"], f"{line['patients']:,}", f"{line['images']:,}")
        grid.add_row(line["manifest"][:12], *shown)
    console.print(grid)


def _show_difference(found: Difference) -> None:
    from rich.console import Console

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    say(f"from {found.old[:12]} to {found.new[:12]}")
    if found.nothing:
        say("nothing changed")
    for title, names in (
        ("patients added", found.patients_added),
        ("patients removed", found.patients_removed),
        ("patients whose images changed", found.patients_with_changed_images),
    ):
        if names:
            rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            say(f"{title}: {len(names):,} ({' '.join(names[:_MOST_NAMES])}{rest})")
    if found.images_added or found.images_removed:
        say(f"images of the other patients: {found.images_added:,} added, {found.images_removed:,} removed")
    for what, count in found.labels_changed.items():
        say(f"label {what}: {count:,}")
    if found.subgroups_changed:
        say(f"subgroup columns of {number_of(found.subgroups_changed, 'image')}")
    for name, (old, new) in found.settings_changed.items():
        say(f"{name}: {old} -> {new}")
    if not found.images_comparable:
        say("images were prepared in another way, so single images are not compared")
    for what, count in found.splits_changed.items():
        say(f"SPLIT CHANGED {what}: {number_of(count, 'patient')}; results on validation and test patients are void")
