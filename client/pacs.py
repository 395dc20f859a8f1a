"""`fedicom data pull`: images from the hospital's PACS, over connections that only go out. It prints counts."""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from client.data_cli import pseudonyms_key
from client.pacs_source import (
    Asked,
    Busy,
    FoundInstance,
    FoundSeries,
    Pace,
    Patience,
    Source,
    Vanished,
    WebPacs,
    gave_up,
    read_pacs,
)
from client.pacs_store import Store
from common.deployment import SiteHome, home_folder
from common.errors import ConfigError, DataError
from common.identity import read_private
from common.labels import KEYS, between_columns, records
from common.printable import number_of
from common.storage import named_file, private_folder, storing, write_whole

Outcome = Literal["whole", "vanished", "refused"]
Tell = Callable[[int, int, int], None]
"""(studies done, studies in all, bytes fetched)."""


@dataclass
class Pulled:
    """What a pull did; counts, and for the report at the site what is not whole."""

    studies: int = 0
    vanished: int = 0
    refused: int = 0
    """Instances that the PACS announced and did not deliver whole."""
    already: int = 0
    body_part_unknown: int = 0
    """Series left out because the PACS does not say which part of the body they show."""
    problems: list[tuple[str, str, str]] = field(default_factory=list, repr=False)
    """(study UID, series UID, what is wrong); stays in a 0600 file."""


def pull_verb(words: Sequence[str]) -> int:
    """`fedicom data pull`."""
    arguments = _parser().parse_args(words)
    asked = _asked(arguments)
    config = _config(arguments)
    pacs = read_pacs(config)
    if arguments.pacs not in pacs:
        raise ConfigError(f"{config.name} has no PACS {arguments.pacs!r}; it has: {', '.join(pacs) or 'none'}")
    labels = None if arguments.labels is None else _label_keys(arguments.labels)
    out = _out(arguments)
    named = pacs[arguments.pacs]
    patience = Patience(named.tries, named.first_wait_s)
    source = _source(named, config.parent, patience)
    try:
        rate = None if arguments.rate is None else arguments.rate * 1e6
        store = Store(out, _key(arguments, out), Pace(rate))
        try:
            with _bar() as tell:
                pulled = pull(source, store, asked, patience, tell)
            _summary(pulled, store)
            if labels is not None:
                _match(store, *labels)
        finally:
            store.close()
    finally:
        source.close()
    return 1 if pulled.refused or pulled.vanished else 0


def pull(source: Source, store: Store, asked: Asked, patience: Patience, tell: Tell) -> Pulled:
    """Brings everything that is asked for and not yet here.

    A study that has vanished, or an instance that does not arrive whole, is noted and does not stop the rest.

    Raises:
        PacsError: The PACS refuses us, or stopped answering.
        StorageError: The disk is full.
    """
    pulled = Pulled()
    studies = source.studies(asked)[: asked.limit]
    pulled.studies = len(studies)
    try:
        for done, study in enumerate(studies):

            def told(done: int = done) -> None:
                tell(done, len(studies), store.fetched_bytes)

            told()
            _study(source, store, asked, patience, study, pulled, told)
        tell(len(studies), len(studies), store.fetched_bytes)
    finally:
        _report(store, pulled)
    return pulled


def _study(
    source: Source, store: Store, asked: Asked, patience: Patience, study: str, pulled: Pulled, told: Callable[[], None]
) -> None:
    """One study."""
    found = source.series(study)
    if not found:
        pulled.vanished += 1
        pulled.problems.append((study, "", "vanished"))
        return
    gone = False
    for series in _wanted(found, asked, pulled):
        instances = source.instances(study, series.uid)
        before = store.missing(study, series.uid, instances)
        pulled.already += len(instances) - len(before)
        if instances and not before:
            store.release(study, series.uid)
        if not instances or (before and _series(source, store, patience, study, series, instances, pulled, told)):
            gone = True
            pulled.problems.append((study, series.uid, "vanished"))
        told()
    pulled.vanished += gone


def _wanted(found: Sequence[FoundSeries], asked: Asked, pulled: Pulled) -> Iterator[FoundSeries]:
    for series in found:
        if series.modality not in asked.modalities:
            continue
        if asked.body_part is not None and not series.body_part:
            pulled.body_part_unknown += 1
        elif asked.body_part is None or series.body_part.upper() == asked.body_part.upper():
            yield series


def _series(
    source: Source, store: Store, patience: Patience, study: str, series: FoundSeries,
    instances: Sequence[FoundInstance], pulled: Pulled, told: Callable[[], None],
) -> bool:  # fmt: skip
    """One series, until all of it is here or nothing more comes; True if some of it has vanished.

    Training sees it only when all that the PACS announced of it is here.
    """
    gone: set[str] = set()
    failed = 0
    missing = store.missing(study, series.uid, instances)
    while missing:
        busy: Busy | None = None
        with store.taking(study, series.uid, missing) as take:

            def taken(chunks: Any, take: Callable[..., None] = take) -> None:
                take(chunks)
                told()

            try:
                whole = failed == 0 and len(missing) == len(instances)
                gone |= source.fetch(study, series, missing, whole, taken)
            except Busy as error:
                busy = error
            except Vanished:
                gone |= {each.uid for each in missing}
        left = [each for each in store.missing(study, series.uid, instances) if each.uid not in gone]
        # something came: the PACS lives
        failed = failed + 1 if len(left) == len(missing) else 1
        missing = left
        if missing and failed >= patience.tries:
            if busy is not None:
                raise gave_up(busy, patience.tries)
            pulled.refused += len(missing)
            pulled.problems.append((study, series.uid, f"{len(missing)} instances not delivered whole"))
            break
        if missing:
            patience.pause(failed, busy.wait_s if busy is not None else None)
    if not gone and not missing:
        store.release(study, series.uid)
    return bool(gone)


def _report(store: Store, pulled: Pulled) -> None:
    path = store.state / "report.csv"
    if not pulled.problems:
        path.unlink(missing_ok=True)
        return
    _write_table(path, [("study", "series", "problem"), *pulled.problems])


def _write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue().encode())


def _summary(pulled: Pulled, store: Store) -> None:
    print(  # noqa: T201
        f"{number_of(pulled.studies, 'study')}: {number_of(store.fetched, 'image')} fetched "
        f"({store.fetched_bytes / 1e6:,.1f} MB), "
        f"{pulled.already:,} were here; {number_of(pulled.vanished, 'study')} vanished, "
        f"{number_of(pulled.refused, 'image')} not delivered whole, "
        f"{number_of(store.bad, 'damaged or unasked answer')} thrown away"
    )
    if pulled.body_part_unknown:
        print(  # noqa: T201
            f"{pulled.body_part_unknown:,} series left out: the PACS does not say which part of the body they show"
        )
    if waiting := store.waiting():
        print(  # noqa: T201
            f"{waiting:,} series are not whole and wait in pull/partial, where no training reads them; run the same "
            "command again"
        )
    if pulled.problems:
        print("which ones: pull/report.csv in the folder of --out; it names studies, keep it there")  # noqa: T201


# --- labels


def _label_keys(path: Path) -> tuple[str, list[tuple[int, str]]]:
    """The name of the key column, and its cells with the numbers of their rows.

    Raises:
        DataError: It is no such table.
    """
    with storing("the label table"):
        data = path.read_bytes()
    (_, header), *rows = [*records(data)] or [(1, [""])]
    key = header[0].strip()
    if key not in KEYS:
        raise DataError(
            f"the label table's first column must be named one of {', '.join(KEYS)}; name it so{between_columns(key)}"
        )
    return key, [(row, cell) for row, cells in rows if (cell := cells[0].strip())]


def _match(store: Store, key: str, cells: Sequence[tuple[int, str]]) -> None:
    """Says how many labels have images and the other way round; the list goes into a 0600 file."""
    labelled = {store.name(key, cell): (row, cell) for row, cell in cells}
    pulled = list(store.rows())
    here = {row[key] for row in pulled}
    without_label = sorted({(row["study"], row["series"]) for row in pulled if row[key] not in labelled})
    without_images = [found for name, found in labelled.items() if name not in here]
    studies = {row["study"] for row in pulled}
    matched = {row["study"] for row in pulled if row[key] in labelled}
    _write_table(
        store.state / "labels.csv",
        [
            ("what", "row of the table", key, "folder"),
            *(("label without images", row, cell, "") for row, cell in without_images),
            *(("images without label", "", "", f"dicom/{study}/{series}") for study, series in without_label),
        ],
    )
    print(  # noqa: T201
        f"labels by {key}: {len(matched):,} of {len(studies):,} studies have one, "
        f"{len(without_images):,} of {len(labelled):,} labels have no images; which ones: pull/labels.csv"
    )


# --- words to values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedicom data pull",
        description="Pull studies from the PACS. Only this machine opens connections; run the same command again to "
        "go on after an interruption, or to fetch what is new.",
    )
    parser.add_argument("--pacs", required=True, metavar="NAME", help="a name of pacs.yaml")
    parser.add_argument(
        "--modality", required=True, action="append", metavar="CODE", help="for example CT; may be given several times"
    )
    parser.add_argument("--since", required=True, metavar="DATE", help="first study date, such as 2026-01-01")
    parser.add_argument("--until", metavar="DATE", help="last study date (default: today)")
    parser.add_argument("--body-part", metavar="CODE", help="Body Part Examined of the series, such as CHEST")
    parser.add_argument(
        "--accessions", type=named_file, metavar="FILE", help="only these accession numbers, one a line"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where images go (default: the folder `data` of site.yaml)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many studies")
    parser.add_argument("--rate", type=float, metavar="MB/S", help="at most so many megabytes a second")
    parser.add_argument(
        "--labels", type=named_file, metavar="CSV", help="say which studies have labels, and the other way"
    )
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="the site's own folder, with pacs.yaml")
    parser.add_argument("--config", type=named_file, metavar="FILE", help="another pacs.yaml (default: that of --site)")
    return parser


def _asked(arguments: argparse.Namespace) -> Asked:
    since = _day("--since", arguments.since)
    until = date.today() if arguments.until is None else _day("--until", arguments.until)
    if until < since:
        raise ConfigError(f"--until {until} is before --since {since}; exchange them")
    modalities = tuple(dict.fromkeys(word.upper() for given in arguments.modality for word in given.split(",")))
    if not all(re.fullmatch(r"[A-Z]{1,16}", each) for each in modalities):
        raise ConfigError("--modality takes codes of DICOM such as CT, MR, DX; correct it")
    if arguments.body_part is not None and not re.fullmatch(r"[A-Za-z0-9 _]{1,16}", arguments.body_part):
        raise ConfigError("--body-part takes a code of DICOM such as CHEST; correct it")
    for name in ("limit", "rate"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value} is not above 0; correct it")
    return Asked(
        modalities=modalities,
        since=since,
        until=until,
        body_part=arguments.body_part,
        accessions=() if arguments.accessions is None else _accessions(arguments.accessions),
        limit=arguments.limit,
    )


def _day(option: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} is no date; write it as 2026-01-31") from None


def _accessions(path: Path) -> tuple[str, ...]:
    with storing("the file of accession numbers"):
        data = path.read_bytes()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError("the file of accession numbers is not UTF-8 text; save it as such") from None
    numbers: dict[str, None] = {}
    for row, line in enumerate(lines, start=1):
        number = line.strip()
        # * ? \ have a meaning in a query: a typo would pull the whole archive
        if number and (len(number) > 16 or set(number) & set("*?\\") or not number.isprintable()):
            raise ConfigError(
                f"line {row} of the accession numbers is none; expected one of up to 16 characters a line"
            )
        if number:
            numbers[number] = None
    if not numbers:
        raise ConfigError("the file of accession numbers is empty; expected one a line")
    return tuple(numbers)


def _config(arguments: argparse.Namespace) -> Path:
    if arguments.config is not None:
        return Path(arguments.config).resolve()
    return home_folder(arguments.site, "pacs.yaml").resolve() / "pacs.yaml"


def _home(arguments: argparse.Namespace) -> SiteHome | None:
    folder = arguments.site or (_config(arguments).parent)
    return SiteHome(folder) if (folder / "site.yaml").is_file() else None


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        return Path(arguments.out)
    home = _home(arguments)
    folders = () if home is None else home.config.data_folders
    if home is None or not folders:
        raise ConfigError("nowhere to put the images: give --out DIR, or `data` in site.yaml")
    if len(folders) > 1:
        raise ConfigError(f"site.yaml has several data folders ({', '.join(folders)}); say which with --out DIR")
    return home.path / folders[0]


def _key(arguments: argparse.Namespace, out: Path) -> bytes:
    """The site's key, or one that is made for this folder."""
    home = _home(arguments)
    if home is not None and home.cohort_key.is_file():
        return read_private(home.cohort_key, "the site's key")
    private_folder(out)
    return pseudonyms_key(private_folder(out / "pull"))


def _source(pacs: Any, folder: Path, patience: Patience) -> Source:
    if isinstance(pacs, WebPacs):
        from client.dicomweb import DicomWeb

        return DicomWeb(pacs, folder, patience)
    from client.dimse import Dimse

    return Dimse(pacs, folder, patience)


@contextmanager
def _bar() -> Iterator[Tell]:
    """The progress bar: studies and megabytes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("Asking the PACS", total=None)
        yield lambda done, total, count: bar.update(
            task, completed=done, total=total, description=f"Pulling studies, {count / 1e6:,.1f} MB"
        )
