"""Files that must survive a crash: whole or absent, and readable by their owner alone."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StorageError

_FULL_BYTES = 64 << 20
"""With less than this a model, and what a database needs beside it, finds no room."""


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


def write_whole(path: Path, data: bytes) -> None:
    """Replaces the file by these bytes in one step: after a crash it holds the old bytes or the new ones.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path.name):
        try:
            # 0600 from its first byte: a key that a crash leaves readable to others would be refused later
            with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            commit(part, path)
        finally:
            part.unlink(missing_ok=True)


def commit(part: Path, path: Path) -> None:
    """Gives a finished, fsynced file its name, durably: the folder's entry is flushed as well."""
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against other processes; the system frees it when this one ends, however it ends."""
    with storing("a lock file"):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with storing("a lock file"):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turns the system's errors into ours, without the path: it may name a patient."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space on that disk" if full else "check the folder's owner and mode"
        raise StorageError(f"{what} could not be written or read: {reason}; {advice} and run again") from None
