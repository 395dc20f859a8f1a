"""`fedicom data deidentify`: copies for a shared evaluation set, without what tells who they are of."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError, DataError
from common.identity import read_private
from common.imaging.deidentify import Deidentifier, Options
from common.imaging.refusal import Refusal
from common.kit import new_folder
from common.printable import number_of
from common.storage import named_file, named_place, private_folder, storing, write_whole

_KEY_BYTES = 32


@dataclass
class Copied:
    """What became of a folder's files."""

    files: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def withdraw(self, patient: Path) -> None:
        """Refuses one more file of this patient, and those that were copied."""
        before = len(list(patient.rglob("*.dcm")))
        if before:
            shutil.rmtree(patient)
        self.files -= before
        self.refused["shared_patient"] += before + 1

    def contradict(self, place: Path) -> None:
        """Refuses what was copied to this place: another file claims to be the same image."""
        place.unlink()
        for folder in (place.parent, place.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()
        self.files -= 1
        self.refused["conflict"] += 1


def deidentify_verb(words: Sequence[str]) -> int:
    """`fedicom data deidentify`."""
    arguments = _parser().parse_args(words)
    if arguments.make_key:
        named_place(arguments.key_file)
        if arguments.key_file.exists():
            raise ConfigError(f"{arguments.key_file.name} exists, and is not overwritten; leave --make-key out")
        write_whole(arguments.key_file, os.urandom(_KEY_BYTES))
    key = _key(named_file(arguments.key_file))
    options = Options(
        dates="keep" if arguments.keep_dates else "shift" if arguments.shift_dates else "remove",
        characteristics=arguments.keep_patient_characteristics,
    )
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("De-identifying", total=None)
        copied = deidentify_folder(
            arguments.source,
            arguments.out,
            Deidentifier(key, options),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{number_of(copied.files, 'image')} copied, {number_of(sum(copied.refused.values()), 'file')} refused")  # noqa: T201
    for code, count in sorted(copied.refused.items()):
        print(f"  {count:,} {code}")  # noqa: T201
    print("Pixels were not changed: look at every image, and mind faces in head scans, before you share them.")  # noqa: T201
    return 0 if copied.files else 1


def deidentify_folder(
    source: Path, out: Path, deidentifier: Deidentifier, progress: Callable[[int, int], None]
) -> Copied:
    """Copies every image of a tree that can be copied; file and folder names are new.

    A Patient ID that two issuers gave is of two people, who would become one: as the reader uses neither, neither is
    copied, and what was copied of them is removed. So it is with different files that claim to be the same image.

    Raises:
        ConfigError: `out` lies in `source` or is not empty.
        DataError: There are no files.
        StorageError: A copy cannot be written.
    """
    if not source.is_dir():
        raise ConfigError("the folder to copy from is missing; give a folder with DICOM files")
    if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
        raise ConfigError("one of the two folders lies in the other; copies and originals must not mix")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out.name} is not empty; give a new folder, so that nothing else is shared with the copies")
    files = list(_files(source))
    if not files:
        raise DataError("the folder to copy from holds no files; give a folder with DICOM files")
    copied = Copied()
    # Under its name when all is copied: half of it may hold patients of whom what follows tells that they are two.
    with new_folder(out) as part:
        _copy(files, part, deidentifier, copied, progress)
    progress(len(files), len(files))
    return copied


def _copy(
    files: Sequence[Path],
    folder: Path,
    deidentifier: Deidentifier,
    copied: Copied,
    progress: Callable[[int, int], None],
) -> None:
    issuers: dict[Path, set[str]] = {}
    conflicts: set[Path] = set()
    for done, path in enumerate(files):
        progress(done, len(files))
        try:
            with storing("an image"):
                copy = deidentifier.copy(path)
        except Refusal as refusal:
            copied.refused[str(refusal.code)] += 1
            continue
        place = folder / copy.name
        patient = place.parent.parent
        known = issuers.setdefault(patient, set())
        known.update(filter(None, [copy.issuer]))
        if len(known) > 1:
            with storing("an image"):
                copied.withdraw(patient)
            continue
        with storing("an image"):
            if place.exists():
                if place.read_bytes() == copy.data:
                    copied.refused["copy"] += 1
                    continue
                copied.contradict(place)
                conflicts.add(place)
        if place in conflicts:
            copied.refused["conflict"] += 1
            continue
        private_folder(patient)
        private_folder(place.parent)
        write_whole(place, copy.data)
        copied.files += 1


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):  # links are not followed
        folders.sort()
        yield from (Path(root) / name for name in sorted(names))


def _key(path: Path) -> bytes:
    key = read_private(path, "the key of the pseudonyms")
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{path.name} has {len(key)} bytes, expected {_KEY_BYTES}; --make-key makes a new one")
    return key


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedicom data deidentify",
        description="Copy images for a shared evaluation set by the Basic Application Level Confidentiality Profile of "
        "DICOM PS3.15. Images that show or may show text are refused; pixels are not changed. Training needs none of "
        "this: there nothing leaves the house.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a folder of DICOM files")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--key-file", type=Path, required=True, metavar="KEY", help="32 secret bytes, mode 0600; equal key, equal names"
    )
    parser.add_argument("--make-key", action="store_true", help="make the key file first")
    parser.add_argument(
        "--profile", choices=["basic"], default="basic", help="profile of PS3.15 Annex E (default: %(default)s)"
    )
    dates = parser.add_mutually_exclusive_group()
    dates.add_argument("--keep-dates", action="store_true", help="keep the dates of study and acquisition")
    dates.add_argument(
        "--shift-dates", action="store_true", help="move each patient's dates by a secret number of days"
    )
    parser.add_argument(
        "--keep-patient-characteristics", action="store_true", help="keep sex, age (90 and above as 90), size, weight"
    )
    return parser
