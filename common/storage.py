"""Files that must survive a crash: whole or absent, and readable by their owner alone."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from common.errors import ConfigError, FedicomError, StorageError

Flush = Callable[[int], None]
"""Called with an open file, or a folder, whose bytes or entries must last before anybody is told of them."""

_FULL_BYTES = 64 << 20
"""With less than this a model, and what a database needs beside it, finds no room."""


def to_disk(handle: int) -> None:
    """They are on the disk when this returns: a power cut takes nothing."""
    os.fsync(handle)


def to_system(handle: int) -> None:
    """They are with the operating system, as they were before: the end of the process takes nothing, a power cut may.

    For many small files whose writer calls `all_to_disk` before it counts on them.
    """


def all_to_disk(folder: Path) -> None:
    """Everything that anybody wrote on this folder's file system: one call in place of one for each file.

    Raises:
        StorageError: The disk is full or not writable.
    """
    with storing("the folder of the run"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
            if syncfs is None:  # not Linux
                os.sync()
            elif syncfs(handle):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(handle)


def full(folder: Path, nbytes: int = _FULL_BYTES) -> bool:
    """Whether the disk of this folder has no room for so many bytes; without a number, for a model."""
    return shutil.disk_usage(folder).free < nbytes


def private_folder(path: Path) -> Path:
    """Makes the folder, mode 0700, and returns it.

    Raises:
        StorageError: It cannot be made, or is not ours to close to others.
    """
    with storing("a private folder"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    return path


def private(name: str | Path, flags: int) -> int:
    """Opens a file that is 0600 from its first byte where this makes it; an `opener` for `open`.

    A key that a crash leaves readable to others would be refused later.
    """
    return os.open(name, flags, 0o600)


def write_whole(path: Path, data: bytes | tuple[bytes | memoryview, ...], flush: Flush = to_disk) -> None:
    """Replaces the file by these bytes in one step: after a crash it holds the old bytes or the new ones.

    Args:
        data: The bytes, or their parts.
        flush: What a crash is: with `to_disk` a power cut too, with `to_system` the end of the process.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path.name):
        try:
            with open(part, "wb", opener=private) as out:
                out.writelines(data if isinstance(data, tuple) else [data])
                out.flush()
                flush(out.fileno())
            commit(part, path, flush)
        finally:
            part.unlink(missing_ok=True)


def drop_unfinished(folder: Path, name: str = "*", *, below: bool = False) -> None:
    """Removes what processes that were killed in `write_whole` left of files of this name (a pattern).

    Args:
        below: In the folders of the folder too.
    """
    for part in folder.glob(f"{'**/' * below}.{name}.tmp"):
        part.unlink(missing_ok=True)


def commit(part: Path, path: Path, flush: Flush = to_disk) -> None:
    """Gives a finished, flushed file its name, durably: the folder's entry is flushed as well."""
    part.replace(path)
    flush_folder(path.parent, flush)


def flush_folder(folder: Path, flush: Flush = to_disk) -> None:
    """Flushes the entries of a folder: which files are in it, under which names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def locked(folder: Path) -> AbstractContextManager[int]:
    """Holds the folder against other processes, once they let go of it; as `held_alone`."""
    return held_alone(folder / ".lock", "a lock file")


@contextmanager
def held_alone(path: Path, what: str, busy: Callable[[], FedicomError] | None = None) -> Iterator[int]:
    """Holds a lock file against every other process; the system frees it when this one ends, however it ends.

    Args:
        what: The lock's name in a `StorageError`.
        busy: The error when another process holds it; None waits for it.

    Returns:
        The file, open.
    """
    with storing(what):
        handle = private(path, os.O_RDWR | os.O_CREAT)
    try:
        with storing(what):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                assert busy is not None
                raise busy() from None
        yield handle
    finally:
        os.close(handle)


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turns the system's errors into ours, without the path: it may name a patient."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what} could not be written or read: {_explained(error)} and run again") from None


def page_with_json(out: Path, name: str) -> Path:
    """Where a page goes that leaves the same as JSON beside it: `out`, or `name` in the folder that it is.

    A new name without an ending is a folder, and made: as a file no browser would open it.

    Raises:
        ConfigError: It has another ending than a page: it may be a log, which the page would take the place of.
        StorageError: The folder cannot be made.
    """
    if out.suffix not in ("", ".html", ".htm") and not out.is_dir():
        raise ConfigError(f"--out {out.name}: it names the page, and the JSON comes beside it; give {out.stem}.html")
    if not out.suffix and not out.exists():
        with storing("the folder of --out"):
            out.mkdir(parents=True)
    return out / name if out.is_dir() else out


def named_file(word: str | Path) -> Path:
    """A file that the user named on the command line, for argparse's `type`: its path, and no other, may be shown.

    Raises:
        ConfigError: There is none, it is a folder, or it cannot be read.
    """
    path = Path(word)
    with _naming(path):
        if stat.S_ISDIR(path.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def named_path(word: str | Path) -> Path:
    """A folder, or a file as of `named_file`.

    Raises:
        ConfigError: As `named_file`.
    """
    path = Path(word)
    return path if path.is_dir() else named_file(path)


def named_place(word: str | Path) -> Path:
    """A file that the user wants to be written, for argparse's `type`.

    Raises:
        ConfigError: Its folder is not there, or it is itself a folder.
    """
    path = Path(word)
    with _naming(path.parent):
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    with _naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return path


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {_explained(error)}") from None


def _explained(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "there is no such file or folder; check the path"
        case errno.EISDIR:
            return "expected a file, got a folder; check the path"
        case errno.ENOTDIR:
            return "expected a folder, got a file; check the path"
        case errno.ENOSPC | errno.EDQUOT:
            advice = "free space on that disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            advice = "check the owner and mode of the file and of its folder"
        case _:
            advice = "check the disk and the path"
    return f"{error.strerror or type(error).__name__}; {advice}"
