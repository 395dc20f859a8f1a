"""How much room a site's cache takes, and how it is given back.

All of it is patient data, and all but one file can be made anew from the images: `cohort_manifest.json` says who is for
training and is never touched here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, StorageError
from common.storage import locked, private_folder, storing, write_whole

_PREPARED = re.compile(r"[0-9a-f]{16}(-[a-z0-9]+)*")
"""Folders of prepared samples, as `common.samples` names them."""
_INDEX = re.compile(r"(index-[0-9a-f]{16}|looks)\.sqlite(-wal|-shm)?")
"""Indexes of headers, and what `fedicom data report` remembers of each series."""
_LIMIT = "limit.json"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Usage:
    """What a cache holds."""

    prepared: int
    """Sets of prepared samples."""
    prepared_bytes: int
    indexes: int
    index_bytes: int
    """Of these, and of what reports remember."""
    limit_bytes: int | None
    """None: as much as there is."""

    @property
    def total_bytes(self) -> int:
        return self.prepared_bytes + self.index_bytes


def usage(cache: Path) -> Usage:
    """Counts what is there."""
    with storing("the cache"):
        folders, files = _prepared(cache), _indexes(cache)
        return Usage(
            prepared=len(folders),
            prepared_bytes=sum(map(_folder_bytes, folders)),
            indexes=sum(path.suffix == ".sqlite" and path.name.startswith("index") for path in files),
            index_bytes=sum(path.stat().st_size for path in files),
            limit_bytes=_limit(cache),
        )


def set_limit(cache: Path, limit_bytes: int | None) -> None:
    """Remembers how much prepared samples may take, and makes room where they take more now."""
    private_folder(cache)
    write_whole(cache / _LIMIT, json.dumps({"limit_bytes": limit_bytes}).encode())
    make_room(cache)


def images_folder(folder: Path) -> Path:
    """Where the DICOM files of a data folder lie."""
    return folder / "dicom" if (folder / "dicom").is_dir() else folder


def must_lie_beside(place: Path, folder: Path, what: str = "the cache") -> None:
    """Refuses a place among the images of a data folder, which what is written there would become a part of.

    Raises:
        ConfigError: It lies there.
    """
    if place.resolve().is_relative_to(images_folder(folder).resolve()):
        raise ConfigError(f"{what} lies inside the folder of images; choose a place beside it")


def make_room(cache: Path, keep: Path | None = None) -> int:
    """Removes sets of prepared samples, the longest unused first, until the cache is within its limit.

    Args:
        keep: The set in use, which stays.

    Returns:
        Bytes that were freed.

    Raises:
        StorageError: `keep` alone is larger than the limit.
    """
    with storing("the cache"):
        limit = _limit(cache)
        if limit is None:
            return 0
        sizes = {folder: _folder_bytes(folder) for folder in _prepared(cache)}
        if keep is not None and sizes.get(keep, 0) > limit:
            raise StorageError(
                f"the prepared samples take {shown(sizes[keep])}, the cache may take {shown(limit)}; allow more with "
                "`fedicom data cache SIZE`, or choose a smaller data.size"
            )
        freed, total = 0, sum(sizes.values())
        for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime_ns):
            if total - freed <= limit:
                break
            if folder != keep:
                _remove(folder)
                freed += sizes[folder]
    return freed


def forget(cache: Path, names: Iterable[str]) -> None:
    """Removes these sets of prepared samples, where they are there."""
    with storing("the cache"):
        for name in names:
            if (cache / name).is_dir():
                _remove(cache / name)


def purge(cache: Path) -> int:
    """Removes all prepared samples and indexes; the split of the patients stays.

    Returns:
        Bytes that were freed.
    """
    before = usage(cache).total_bytes
    with storing("the cache"):
        for folder in _prepared(cache):
            _remove(folder)
        for path in _indexes(cache):
            path.unlink(missing_ok=True)
    return before


def used(folder: Path) -> None:
    """Notes that a set of prepared samples is in use."""
    now = time.time_ns()
    os.utime(folder, ns=(now, now))


def parse_size(text: str) -> int | None:
    """Bytes in a size as people write it: 500M, 20GB, 1.5 TB; None for `none`, no limit.

    Raises:
        ConfigError: It is no size.
    """
    if text.strip().lower() == "none":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if found is None:
        raise ConfigError(f"{text!r} is no size; expected for example 500M, 20GB or none")
    return round(float(found[1]) * _UNITS[found[2]])


def shown(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in reversed(_UNITS.items()):
        if unit and count >= size:
            return f"{count / size:.3g} {unit}B"
    return f"{count} bytes"


def _prepared(cache: Path) -> list[Path]:
    return [path for path in _children(cache) if path.is_dir() and _PREPARED.fullmatch(path.name)]


def _indexes(cache: Path) -> list[Path]:
    return [path for path in _children(cache) if path.is_file() and _INDEX.fullmatch(path.name)]


def _children(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.is_dir() else []


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _remove(folder: Path) -> None:
    with locked(folder):  # a preparation that is going on ends first
        if folder.is_dir():  # nobody else was first
            shutil.rmtree(folder)


def _limit(cache: Path) -> int | None:
    try:
        found = json.loads((cache / _LIMIT).read_bytes())["limit_bytes"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{_LIMIT} of the cache cannot be read; set the size again") from None
    return None if found is None else int(found)
