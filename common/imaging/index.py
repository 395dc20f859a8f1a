"""What is known of a tree of DICOM files, kept between runs: a second look opens only what has changed.

One SQLite file, readable by its owner alone. It holds identifiers as the headers give them, so it is patient data;
whatever is shown of it goes through `pseudonym` first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pydicom

from common.errors import ConfigError, DataError, StorageError
from common.imaging.header import Header
from common.imaging.parallel import Lost, cores, spread
from common.imaging.quick import Examined, Examiner, Mark, Plan
from common.imaging.refusal import RefusalCode, Refused
from common.imaging.worker import CPU_S, Limits
from common.storage import private_folder, storing

Progress = Callable[[int, int], None]

LIMIT_S = 2.0
"""Longest time for the header of a small file."""
MEMORY_BYTES = 2**30
"""What reading a header may allocate."""
_WORTH_WORKERS = 4096
"""Fewer new files than this are read in this process: starting others takes longer."""
_BATCH = 2000
_BATCH_S = 1.0
"""Rows, or seconds, that a kill may lose."""
_FINE_NS, _COARSE_NS = 20_000_000, 2_000_000_000
"""A file changed this short a time before it was read may change again within the same tick of its clock."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS common (id BLOB PRIMARY KEY, header TEXT) WITHOUT ROWID;    -- what slices share
CREATE TABLE IF NOT EXISTS files (
  path BLOB PRIMARY KEY,    -- relative to the root, NUL for the slash: sorts like the parts of a path
  inode INTEGER, size INTEGER, modified_ns INTEGER, changed_ns INTEGER,
  code TEXT, why TEXT,      -- of a refused file
  series TEXT, sop TEXT, common BLOB, own TEXT,
  syntax TEXT, offset INTEGER, length INTEGER,    -- of the pixels
  plan TEXT,                -- how to read them without a parser
  sha256 BLOB               -- of the whole file, once somebody has asked
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_series ON files (series, path);
CREATE INDEX IF NOT EXISTS by_sop ON files (sop);
"""
_INSERT = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)"
_OWN = ("sop_uid", "position_mm", "repeats")
_COMMON = tuple(field.name for field in fields(Header) if field.name not in ("path", *_OWN))


class Entry(NamedTuple):
    """An image file of the index."""

    header: Header
    plan: Plan | None
    mark: Mark | None
    syntax: str


@dataclass(frozen=True)
class Refreshed:
    """What a look at the tree found."""

    files: int
    examined: int
    """Files that were opened: new or changed ones."""
    removed: int


class Index:
    """The index of one tree.

    Args:
        root: The folder of DICOM files.
        cache: A folder of the site for patient data; None keeps the index in memory.

    Raises:
        DataError: There is no such folder.
        ConfigError: The cache lies inside the folder.
        StorageError: The index cannot be opened.
    """

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        if not root.is_dir():
            raise DataError("the folder of DICOM files does not exist or is no folder; give the path of a folder")
        self.root = root
        self.path: Path | None = None
        self.outside: list[Refused] = []
        """Folders that were not entered, as the last `refresh` found them."""
        if cache is not None:
            if cache.resolve().is_relative_to(root.resolve()):
                raise ConfigError("the index lies inside the folder of images; choose a folder beside it")
            self.path = index_file(root, cache)
            private_folder(cache)
        self._db = self._open()

    @classmethod
    def find(cls, root: Path, cache: Path) -> Index | None:
        """The index that `fedicom data index` left in the cache; None if there is none."""
        return cls(root, cache) if root.is_dir() and index_file(root, cache).is_file() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was committed stays."""
        self._db.close()

    def refresh(self, progress: Progress | None = None, *, jobs: int | None = None) -> Refreshed:
        """Brings the index up to date with the tree.

        Every file is looked at with `stat`; only those that are new or differ in size, inode or times are opened.
        What is finished is committed every second, so a kill at any moment costs a second.

        Args:
            progress: Told (files done, files in all).
            jobs: Processes that read headers; None: one for each core where it is worth it.
        """
        with storing("the index"), _sqlite():
            todo, gone, total = self._compare()
            with self._db:
                self._db.executemany("DELETE FROM files WHERE path = ?", ((key,) for key in gone))
            done = total - len(todo)
            if progress is not None:
                progress(done, total)
            rows: list[tuple[bytes, _Row]] = []
            last = time.monotonic()
            for key, row in self._examine(todo, jobs):
                rows.append((key, row))
                done += 1
                if len(rows) >= _BATCH or time.monotonic() - last > _BATCH_S:
                    self._write(rows)
                    rows, last = [], time.monotonic()
                    if progress is not None:
                        progress(done, total)
            self._write(rows)
            if todo or gone:
                with self._db:
                    self._db.execute(
                        "DELETE FROM common WHERE id NOT IN (SELECT common FROM files WHERE common IS NOT NULL)"
                    )
            if progress is not None and todo:
                progress(done, total)
        return Refreshed(total, len(todo), len(gone))

    def refused(self) -> Iterator[Refused]:
        """Files and folders that are no image for us, sorted by path."""
        rows = self._db.execute("SELECT path, code, why FROM files WHERE code IS NOT NULL ORDER BY path")
        files = [Refused(self._path(key), RefusalCode(code), why) for key, code, why in rows]
        yield from sorted([*self.outside, *files], key=lambda refused: self._key(refused.path))

    def series_uids(self) -> list[str]:
        """Every Series Instance UID, sorted by the path of its first image."""
        query = "SELECT series FROM files WHERE series IS NOT NULL GROUP BY series ORDER BY MIN(path)"
        return [uid for (uid,) in self._db.execute(query)]

    def series(self) -> Iterator[tuple[Entry, ...]]:
        """The images of each Series Instance UID, series and images sorted by path."""
        return map(self.entries, self.series_uids())

    def entries(self, series_uid: str) -> tuple[Entry, ...]:
        """The images of one series, sorted by path."""
        rows = self._db.execute(
            "SELECT path, header, own, plan, offset, syntax, inode, size, modified_ns, changed_ns "
            "FROM files JOIN common ON common.id = files.common WHERE series = ? ORDER BY path",
            (series_uid,),
        )
        return tuple(
            Entry(
                _header(self._path(key), header, own),
                None if plan is None else replace(_plan(plan), offset=offset),
                None if mark[3] is None else Mark(*mark),
                syntax,
            )
            for key, header, own, plan, offset, syntax, *mark in rows
        )

    def doubled(self) -> list[Header]:
        """Usable images whose SOP Instance UID is not theirs alone, sorted by path."""
        rows = self._db.execute(
            "SELECT path, header, own FROM files JOIN common ON common.id = files.common WHERE sop IN "
            "(SELECT sop FROM files WHERE sop IS NOT NULL GROUP BY sop HAVING COUNT(*) > 1) ORDER BY path"
        )
        return [_header(self._path(key), header, own) for key, header, own in rows]

    def shared_ids(self) -> frozenset[str]:
        """Patient IDs that come from more than one issuer: two hospitals may have numbered their patients alike."""
        issuers: dict[str, set[str]] = {}
        for (common,) in self._db.execute("SELECT header FROM common"):
            header = dict(zip(_COMMON, json.loads(common), strict=True))
            if header["issuer"]:
                issuers.setdefault(header["patient_id"].strip(), set()).add(header["issuer"])
        return frozenset(patient for patient, found in issuers.items() if len(found) > 1)

    def content_hash(self, path: Path) -> str:
        """SHA-256 of the file, computed once for as long as the file stays the same.

        Raises:
            StorageError: It cannot be read.
        """
        key = self._key(path)
        with storing("an image"), _sqlite():
            mark = Mark.of(path.stat())
            row = self._db.execute(
                "SELECT sha256 FROM files WHERE path = ? AND size = ? AND modified_ns = ? AND changed_ns = ?",
                (key, *mark[1:]),
            ).fetchone()
            if row is not None and row[0] is not None:
                return bytes(row[0]).hex()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if row is not None and Mark.of(path.stat()) == mark:
                with self._db:
                    self._db.execute("UPDATE files SET sha256 = ? WHERE path = ?", (digest, key))
            return digest.hex()

    def _open(self) -> sqlite3.Connection:
        with storing("the index"), _sqlite():
            try:
                return self._prepared()
            except sqlite3.DatabaseError as error:
                if self.path is None or isinstance(error, sqlite3.OperationalError):
                    raise
                # not a database, or damaged: all of it can be read from the images again
                for end in ("", "-wal", "-shm"):
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
                return self._prepared()

    def _prepared(self) -> sqlite3.Connection:
        if self.path is not None:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(":memory:" if self.path is None else self.path, timeout=60)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")
            db.executescript(_SCHEMA)
            about = json.dumps([_maker(), os.fspath(self.root.resolve())])
            row = db.execute("SELECT value FROM about WHERE name = 'made for'").fetchone()
            if row is None or row[0] != about:
                # other code may see other things in the same file
                with db:
                    db.execute("DELETE FROM files")
                    db.execute("DELETE FROM common")
                    db.execute("INSERT OR REPLACE INTO about VALUES ('made for', ?)", (about,))
        except BaseException:
            db.close()
            raise
        return db

    def _compare(self) -> tuple[list[bytes], list[bytes], int]:
        """Paths to examine, paths to forget, and the number of files, from one walk beside one sorted query."""
        self.outside = []
        todo: list[bytes] = []
        gone: list[bytes] = []
        total = 0
        query = "SELECT path, inode, size, modified_ns, changed_ns FROM files ORDER BY path"
        with closing(self._db.execute(query)) as rows:
            known = next(rows, None)
            for key, mark in self._walk():
                total += 1
                while known is not None and known[0] < key:
                    gone.append(known[0])
                    known = next(rows, None)
                if known is None or known[0] != key:
                    todo.append(key)
                    continue
                if mark is None or known[1:] != _stored(mark):
                    todo.append(key)
                known = next(rows, None)
            while known is not None:
                gone.append(known[0])
                known = next(rows, None)
        return todo, gone, total

    def _walk(self) -> Iterator[tuple[bytes, Mark | None]]:
        """Every file below, in the order of the index; what is not entered goes to `outside`, as in `files_below`."""
        # a stack of its own: folders may be nested deeper than Python calls itself
        open_folders = [self._children(os.fspath(self.root), b"")]
        while open_folders:
            found = next(open_folders[-1], None)
            if found is None:
                open_folders.pop()
                continue
            key, entry = found
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False
            if is_folder and entry.is_symlink():
                why = "This is a link to a folder; links to folders are not followed."
                self.outside.append(Refused(Path(entry.path), RefusalCode.UNREADABLE, why))
            elif is_folder:
                open_folders.append(self._children(entry.path, key + b"\0"))
            else:
                try:
                    yield key, Mark.of(entry.stat())
                except OSError:
                    yield key, None

    def _children(self, folder: str, inside: bytes) -> Iterator[tuple[bytes, os.DirEntry[str]]]:
        try:
            with os.scandir(folder) as found:
                return iter(sorted((inside + os.fsencode(entry.name), entry) for entry in found))
        except OSError:
            why = "This folder cannot be opened; check its permissions."
            self.outside.append(Refused(Path(folder), RefusalCode.UNREADABLE, why))
            return iter(())

    def _examine(self, todo: Sequence[bytes], jobs: int | None) -> Iterator[tuple[bytes, _Row]]:
        if jobs is None:
            jobs = cores() if len(todo) >= _WORTH_WORKERS else 1
        paths = [os.fspath(self._path(key)) for key in todo]
        if jobs == 1:
            examine = Examiner()
            for key, path in zip(todo, paths, strict=True):
                yield key, _row(examine(Path(path)))
            return
        for place, row in spread(row_of, paths, jobs=jobs, limit_s=_limit_s, at_once=64, memory_bytes=MEMORY_BYTES):
            yield todo[place], _row(_lost(Path(paths[place]), row)) if isinstance(row, Lost) else row

    def _write(self, rows: Sequence[tuple[bytes, _Row]]) -> None:
        with self._db:
            common = {row.common: row.text for _, row in rows if row.common is not None}
            self._db.executemany("INSERT OR IGNORE INTO common VALUES (?, ?)", common.items())
            self._db.executemany(_INSERT, ((key, *row.mark, *row.about, row.common, *row.place) for key, row in rows))

    def _key(self, path: Path) -> bytes:
        return os.fsencode(path.relative_to(self.root)).replace(b"/", b"\0")

    def _path(self, key: bytes) -> Path:
        return self.root / os.fsdecode(key.replace(b"\0", b"/"))


def index_file(root: Path, cache: Path) -> Path:
    """Where the cache keeps the index of this folder."""
    return cache / f"index-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.sqlite"


class _Row(NamedTuple):
    """What the table says of one file."""

    mark: tuple[int | None, ...]
    about: tuple[str | None, ...]
    """code, why, series, sop"""
    common: bytes | None
    place: tuple[str | int | None, ...]
    """own, syntax, offset, length, plan"""
    text: str | None
    """What `common` names."""


_examiner: list[Examiner] = []


def row_of(path: str) -> _Row:
    """What one file is; in a worker, which keeps its examiner."""
    if not _examiner:
        _examiner.append(Examiner())
    return _row(_examiner[0](Path(path)))


def _limit_s(path: str) -> float:
    """Seconds; beside them twice the CPU time that a long header may take, for the machine may be busy."""
    try:
        size = os.stat(path).st_size  # noqa: PTH116  once a file in two processes
    except OSError:
        size = 0
    return LIMIT_S + 2 * (Limits.header(size, frames=size).cpu_s - CPU_S)


def _row(found: Examined) -> _Row:
    mark: tuple[int | None, ...] = (None,) * 4
    if found.mark is not None:
        mark = _stored(found.mark)
        coarse = found.mark.modified_ns % 1_000_000_000 == 0 or found.mark.changed_ns % 1_000_000_000 == 0
        newest = max(found.mark.modified_ns, found.mark.changed_ns)
        if 0 <= time.time_ns() - newest < (_COARSE_NS if coarse else _FINE_NS):
            mark = (*mark[:3], None)
    length = None if found.offset is None or found.mark is None else found.mark.size - found.offset
    if isinstance(found.result, Refused):
        about = str(found.result.code), found.result.why, None, None
        return _Row(mark, about, None, (None, found.syntax, found.offset, length, None), None)
    header = found.result
    text = json.dumps([getattr(header, name) for name in _COMMON])
    own = json.dumps([getattr(header, name) for name in _OWN])
    plan = None if found.plan is None else json.dumps(astuple(replace(found.plan, offset=0)))
    return _Row(
        mark,
        (None, None, header.series_uid, None if header.problem else header.sop_uid),
        hashlib.blake2b(text.encode(), digest_size=16).digest(),
        (own, found.syntax, found.offset, length, plan),
        text,
    )


def _lost(path: Path, lost: Lost) -> Examined:
    """A file that its worker did not survive."""
    if lost.how == "stalled":
        why = f"Reading the header takes longer than {_limit_s(os.fspath(path)):.0f} seconds."
        # without a mark it is tried again next time: the disk may have been slow
        return Examined(Refused(path, RefusalCode.TOO_SLOW, why), None, "", None, None)
    try:
        mark = Mark.of(path.stat())
    except OSError:
        mark = None
    why = "The DICOM header is damaged and cannot be read."
    return Examined(Refused(path, RefusalCode.CORRUPT, why), None, "", None, mark)


def _stored(mark: Mark) -> tuple[int, ...]:
    """SQLite's integers have a sign; some file systems use all 64 bits for inodes."""
    return (mark.inode & (2**63 - 1), *mark[1:])


def _header(path: Path, common: str, own: str) -> Header:
    return replace(_like(common), path=path, **dict(zip(_OWN, map(_tupled, json.loads(own)), strict=True)))


@lru_cache(512)
def _like(common: str) -> Header:
    """A header with these common fields; equal ones are read once."""
    values = dict(zip(_COMMON, map(_tupled, json.loads(common)), strict=True))
    if values["problem"] is not None:
        code, why = values["problem"]
        values["problem"] = RefusalCode(code), why
    return Header(path=Path(), sop_uid="", position_mm=(), repeats=(), **values)


@lru_cache(512)
def _plan(text: str) -> Plan:
    return Plan(*map(_tupled, json.loads(text)))


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


@cache
def _maker() -> str:
    """The code that decides what a file is."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} pydicom {pydicom.__version__} highdicom {version('highdicom')}"


class _sqlite:  # noqa: N801
    """Turns SQLite's errors into ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise StorageError(
                f"the index cannot be used: {error}; free space on that disk, or remove it with `fedicom data cache "
                "purge` and index again"
            ) from None
