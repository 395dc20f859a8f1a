"""What was seen of each series, kept between two reports: only series that changed are looked at again.

Identifiers are not kept; they come from the index, as do the places of the files. What is kept is made of pixels and of
a few words of the headers all the same: patient data, readable by its owner alone, and encrypted where the site's cache
is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from common.config import Preprocessing, as_plain
from common.errors import StorageError
from common.imaging.facts import Facts
from common.imaging.fastread import Series
from common.pseudonyms import pseudonym
from common.samples import maker
from common.shard import open_text, seal_text
from common.storage import private, private_folder, storing

FILE = "looks.sqlite"
_COMMIT_S = 1.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS looks (name TEXT PRIMARY KEY, about TEXT, run TEXT, value BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_about ON looks (about);
"""


class Remembered:
    """The file of one cache, for one folder and one preparation. A kill costs a second of work."""

    def __init__(
        self, place: Path, folder: Path, data: tuple[Preprocessing, ...], key: bytes, secret: bytes | None
    ) -> None:
        """Opens it.

        Raises:
            StorageError: It cannot be opened.
        """
        self._key, self._secret = key, secret
        about = os.fspath(folder.resolve()), json.dumps([as_plain(each) for each in data])
        self._about = pseudonym(key, "looks", *about)
        self._run = os.urandom(8).hex()
        self._last = time.monotonic()
        path = private_folder(place) / FILE
        with storing("what was seen of the images"):
            os.close(private(path, os.O_RDWR | os.O_CREAT))
        try:
            self._db = _opened(path)
        except sqlite3.OperationalError as problem:  # a full disk, or another report at work
            raise _failed(problem) from None
        except sqlite3.DatabaseError:
            # damaged; all of it can be seen again
            for end in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    path.with_name(path.name + end).unlink()
            os.close(private(path, os.O_RDWR | os.O_CREAT))
            self._db = _opened(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with closing(self._db), _keeping():
            if kind is None:  # of series that are gone or have changed
                self._db.execute("DELETE FROM looks WHERE about = ? AND run != ?", (self._about, self._run))
            self._db.commit()

    def name_of(self, series: Series) -> str | None:
        """Keyed hash of all that decides what is seen; None where that is not known for sure."""
        if any(entry.mark is None for entry in series.entries):
            return None
        files = [
            (
                entry.header.sop_uid,
                str(series.copies[entry.header.path].code) if entry.header.path in series.copies else "",
                *(entry.mark or ()),
            )
            for entry in series.entries
        ]
        return pseudonym(self._key, "look", self._about, _maker(), json.dumps(files))

    def find(self, name: str | None) -> dict[str, Any] | None:
        """What `keep` was given."""
        if name is None:
            return None
        with _keeping():
            row = self._db.execute("SELECT value FROM looks WHERE name = ?", (name,)).fetchone()
            if row is None:
                return None
            try:
                found: dict[str, Any] = json.loads(row[0] if self._secret is None else open_text(row[0], self._secret))
            except (ValueError, TypeError, StorageError):  # of another key, or damaged: it is seen again
                return None
            self._db.execute("UPDATE looks SET run = ? WHERE name = ?", (self._run, name))
            self._commit()
        return found

    def keep(self, name: str | None, value: Mapping[str, Any]) -> None:
        """Remembers what was seen."""
        if name is None:
            return
        text = json.dumps(value).encode()
        sealed = text if self._secret is None else seal_text(text, self._secret)
        with _keeping():
            self._db.execute("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?)", (name, self._about, self._run, sealed))
            self._commit()

    def _commit(self) -> None:
        if time.monotonic() - self._last > _COMMIT_S:
            self._db.commit()
            self._last = time.monotonic()


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _keeping() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as problem:
        raise _failed(problem) from None


def _failed(error: sqlite3.Error) -> StorageError:
    return StorageError(
        f"what was seen of the images cannot be kept: {error}; free space on that disk, or empty the cache with "
        "`fedicom data cache purge`"
    )


@cache
def _maker() -> str:
    """The code that looks."""
    digest = hashlib.sha256(maker().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plain_array(array: npt.NDArray[Any] | None) -> list[str] | None:
    """For JSON: type and bytes of one axis."""
    return None if array is None else [array.dtype.str, base64.b64encode(array.tobytes()).decode()]


def array_of(plain: list[str] | None) -> npt.NDArray[Any] | None:
    """What `plain_array` was given."""
    return None if plain is None else np.frombuffer(base64.b64decode(plain[1]), np.dtype(plain[0]))


def plain_facts(facts: Facts) -> dict[str, Any]:
    """For JSON."""
    return {**asdict(facts), "studied": None if facts.studied is None else facts.studied.isoformat()}


def facts_of(plain: Mapping[str, Any]) -> Facts:
    """What `plain_facts` was given."""
    studied = plain["studied"]
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    values["studied"] = None if studied is None else date.fromisoformat(studied)
    return Facts(**values)


def positions(series: Series, files: Iterable[Path]) -> list[int]:
    """Places of these files in the series."""
    place = {entry.header.path: at for at, entry in enumerate(series.entries)}
    return [place[file] for file in files]
