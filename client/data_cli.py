"""`fedicom data`: a hospital's images, as they lie in its folders. What is printed names no patient."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import run_verb
from common.printable import number_of
from common.storage import private_folder, write_whole

if TYPE_CHECKING:
    from common.deployment import SiteHome
    from common.imaging.index import Index
    from common.imaging.overview import SeriesOverview

_VERBS = {
    "index": ("client.data_cli", "index_verb", "remember what each file is, so that only changes are read again"),
    "inspect": ("client.data_cli", "inspect_verb", "series, counts and refusals of a folder"),
    "cache": ("client.data_cli", "cache_verb", "show, limit or empty the cache"),
    "report": ("client.quality.cli", "report_verb", "what images and labels are like: a page that stays in the house"),
    "drift": ("client.quality.cli", "drift_verb", "how two folders, or two times of one, differ"),
    "diff": ("client.quality.cli", "diff_verb", "what changed between two versions of the cohort"),
    "pull": ("client.pacs", "pull_verb", "fetch studies from the PACS"),
    "deidentify": ("client.deidentify", "deidentify_verb", "copy images for a shared evaluation set"),
}

_SHOWN = 12
"""Digits of a pseudonym, and series in the table on the screen."""
_MOST_SERIES = 40
_NARROW = 8


def data_verb(words: Sequence[str]) -> int:
    """`fedicom data`: the first word says what to do."""
    does = "Index, inspect and check a hospital's images. Nothing leaves the house."
    return run_verb("fedicom data", _VERBS, words, does)


def index_verb(words: Sequence[str]) -> int:
    """`fedicom data index`: brings the index of a folder up to date."""
    parser = _parser("index", "Look at every file of a folder, and open those that are new or have changed.")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that read headers (default: one for each core)"
    )
    parser.add_argument("--hash", action="store_true", help="also note the SHA-256 of every image file")
    arguments = parser.parse_args(words)
    from common.cache import shown

    cache, _ = _place(arguments, arguments.folder)
    with _opened(arguments, cache) as index, _progress() as bar:
        task = bar.add_task("Reading headers", total=None)
        found = index.refresh(lambda done, total: bar.update(task, completed=done, total=total), jobs=arguments.jobs)
        hashed = 0
        if arguments.hash:
            task = bar.add_task("Hashing files", total=found.files)
            for entries in index.series():
                for entry in entries:
                    index.content_hash(entry.header.path)
                    hashed += 1
                    bar.update(task, completed=hashed)
            bar.update(task, total=hashed)
    assert index.path is not None
    print(  # noqa: T201
        f"{number_of(found.files, 'file')}: {found.examined:,} new or changed, {found.removed:,} gone"
        + (f", {hashed:,} hashed" if arguments.hash else "")
        + f". Index: {shown(index.path.stat().st_size)}."
    )
    return 0


def inspect_verb(words: Sequence[str]) -> int:
    """`fedicom data inspect`: what a folder holds."""
    parser = _parser("inspect", "Show series, counts and refusals of a folder. Patients appear as pseudonyms.")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    arguments = parser.parse_args(words)
    from common.imaging.overview import overview

    cache, key = _place(arguments, arguments.folder)
    with _opened(arguments, cache) as index, _progress() as bar:
        task = bar.add_task("Reading headers", total=None)
        files = index.refresh(lambda done, total: bar.update(task, completed=done, total=total)).files
        series = list(overview(index))
        refused = Counter(str(each.code) for each in index.refused() if each.path.name != "labels.csv")
    for each in series:
        refused.update(each.refused)
    plain = _plain(files, series, refused, key)
    if arguments.json:
        print(json.dumps(plain, indent=1))  # noqa: T201
    else:
        _show(plain)
    return 0


def cache_verb(words: Sequence[str]) -> int:
    """`fedicom data cache`: its size, its limit, its end."""
    parser = argparse.ArgumentParser(
        prog="fedicom data cache",
        description="Show what the cache holds, limit what prepared samples may take, or remove all of it. The split "
        "of the patients into training, validation and test is never removed.",
    )
    parser.add_argument(
        "what", nargs="?", metavar="SIZE|purge", help="a limit such as 500M, 20GB or none; or purge; or nothing: show"
    )
    _add_places(parser)
    arguments = parser.parse_args(words)
    from common.cache import parse_size, purge, set_limit, shown, usage

    cache = _cache(arguments)
    if arguments.what == "purge":
        print(f"{shown(purge(cache))} freed")  # noqa: T201
        return 0
    if arguments.what is not None:
        set_limit(cache, parse_size(arguments.what))
    found = usage(cache)
    limit = "no limit" if found.limit_bytes is None else f"at most {shown(found.limit_bytes)}"
    print(f"prepared samples  {found.prepared:>4}  {shown(found.prepared_bytes):>10}  ({limit})")  # noqa: T201
    what = "(and what reports remember)"
    print(f"indexes           {found.indexes:>4}  {shown(found.index_bytes):>10}  {what}")  # noqa: T201
    return 0


def _parser(word: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fedicom data {word}", description=description)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of DICOM files, or one that holds `dicom/`")
    _add_places(parser)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--site", type=_site, metavar="FOLDER", help="the site's own folder: its cache and key are used")
    place.add_argument("--cache", type=Path, metavar="FOLDER", help="a private folder (default: ~/.cache/fedicom)")


def _site(word: str) -> SiteHome:
    """Checked before anything is made below it: a folder of images that was named in its place shall stay as it is."""
    from common.deployment import SiteHome, home_folder

    return SiteHome(home_folder(Path(word), "site.yaml"))


def _cache(arguments: argparse.Namespace) -> Path:
    if arguments.site is not None:
        return Path(arguments.site.cache)
    if arguments.cache is not None:
        return Path(arguments.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedicom"


def _place(arguments: argparse.Namespace, *folders: Path) -> tuple[Path, bytes]:
    """The cache, and the key of the pseudonyms.

    Raises:
        ConfigError: The cache lies among the images of one of `folders`, which are not to be closed to others.
    """
    from common.cache import must_lie_beside
    from common.identity import read_private

    cache = _cache(arguments)
    for folder in folders:
        must_lie_beside(cache, folder)
    private_folder(cache)
    if arguments.site is not None:
        return cache, read_private(arguments.site.cohort_key, "the site's key")
    return cache, pseudonyms_key(cache)


def pseudonyms_key(folder: Path) -> bytes:
    """The key of what belongs to no site, made where there is none yet."""
    from common.identity import read_private

    path = folder / "pseudonyms.key"
    if not path.exists():
        write_whole(path, os.urandom(32))
    return read_private(path, "the key of the pseudonyms")


def _opened(arguments: argparse.Namespace, cache: Path) -> Index:
    from common.cache import images_folder
    from common.imaging.index import Index

    return Index(images_folder(arguments.folder), cache)


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(file=sys.stderr), transient=True)


def _plain(files: int, series: Sequence[SeriesOverview], refused: Counter[str], key: bytes) -> dict[str, Any]:
    from common.pseudonyms import pseudonym

    def name(kind: str, identifier: str) -> str:
        return pseudonym(key, kind, identifier.strip())[:_SHOWN] if identifier.strip() else ""

    modality, vendor, spacing = Counter[str](), Counter[str](), Counter[str]()
    syntaxes: Counter[str] = Counter()
    for each in series:
        modality[each.modality] += 1
        vendor[each.vendor] += 1
        syntaxes.update(each.syntaxes)
        spacing.update(_by(step) for _, step in each.volumes)
        spacing.update(_by(step) for _, step in each.images)
    return {
        "files": files,
        "series": [
            {
                "series": name("series", each.series_uid),
                "study": name("study", each.study_uid),
                "patient": name("patient", each.patient_id),
                "modality": each.modality,
                "vendor": each.vendor,
                "files": each.files,
                "volumes": [{"size": list(size), "spacing_mm": list(step)} for size, step in each.volumes],
                "images": [{"size": list(size), "spacing_mm": list(step) or None} for size, step in each.images],
                "multiframe": each.multiframe,
                "transfer_syntaxes": each.syntaxes,
                "refused": each.refused,
            }
            for each in series
        ],
        "patients": len({each.patient_id.strip() for each in series} - {""}),
        "studies": len({each.study_uid for each in series}),
        "volumes": sum(len(each.volumes) for each in series),
        "images": sum(len(each.images) for each in series),
        "multiframe_files": sum(each.multiframe for each in series),
        "by_modality": _sorted(modality),
        "by_vendor": _sorted(vendor),
        "by_spacing_mm": _sorted(spacing),
        "by_transfer_syntax": _sorted(syntaxes),
        "refused": _sorted(refused),
    }


def _by(step_mm: Sequence[float]) -> str:
    return " x ".join(f"{step:.2f}" for step in step_mm) or "unknown"


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def _show(plain: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from common.imaging.refusal import MEANINGS

    console = Console(highlight=False)
    console.print(
        f"{number_of(plain['files'], 'file')}, {number_of(plain['patients'], 'patient')}, "
        f"{number_of(plain['studies'], 'study')}, {len(plain['series']):,} series: "
        f"{number_of(plain['volumes'], 'volume')}, {number_of(plain['images'], 'image')}, "
        f"{number_of(plain['multiframe_files'], 'multi-frame file')}",
        soft_wrap=True,
    )
    table = Table(*(Column(name, no_wrap=True) for name in ("series", "patient", "", "vendor")), "files", "gives")
    for each in plain["series"][:_MOST_SERIES]:
        gives = [f"{'x'.join(map(str, one['size']))} at {_by(one['spacing_mm'] or ())} mm" for one in each["volumes"]]
        gives += [number_of(len(each["images"]), "image")] * bool(each["images"])
        gives += [number_of(each["multiframe"], "multi-frame file")] * bool(each["multiframe"])
        gives += [f"refused: {count} {code}" for code, count in each["refused"].items()]
        table.add_row(
            each["series"][:_NARROW], each["patient"][:_NARROW], each["modality"], each["vendor"], str(each["files"]),
            "\n".join(gives),
        )  # fmt: skip
    console.print(table)
    if len(plain["series"]) > _MOST_SERIES:
        console.print(f"... and {len(plain['series']) - _MOST_SERIES:,} more series; --json has all of them")
    for title, counts in (
        ("series by modality", "by_modality"), ("series by vendor", "by_vendor"),
        ("volumes and images by spacing, mm", "by_spacing_mm"), ("files by transfer syntax", "by_transfer_syntax"),
    ):  # fmt: skip
        if plain[counts]:
            table = Table(title, "")
            for value, count in list(plain[counts].items())[:_MOST_SERIES]:
                table.add_row(value, f"{count:,}")
            console.print(table)
    if plain["refused"]:
        table = Table("files that are not used", "", "because of", "what helps")
        for code, count in plain["refused"].items():
            table.add_row(code, f"{count:,}", *MEANINGS.get(code, ("", "")))
        console.print(table)
    console.print("Damage inside the pixels shows when they are read.")
