"""The same volumes, images and refusals as `volume.iterate_folder` gives, faster.

Headers come from an index, and the pixels of uncompressed slices straight from their files into the volume. Only what
is plain goes this way: a series of clean single-frame slices. Whatever else happens, a damaged slice, a copy, a file
that changed since it was indexed, is left to `volume`, so there is one place where files are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.imaging import volume
from common.imaging.index import Entry, Index
from common.imaging.layout import UNDEFINED, Element, Layout
from common.imaging.parallel import cores
from common.imaging.pixels import decode, fill_padding, stored_frames
from common.imaging.quick import Mark, Plan
from common.imaging.refusal import Refusal, Refused, quiet
from common.imaging.series import Stack, stacks
from common.imaging.volume import FolderReading, Image, Progress, Volume


@dataclass(frozen=True)
class Series:
    """All images with one Series Instance UID."""

    entries: tuple[Entry, ...]
    copies: Mapping[Path, Refused]
    """Those of them that are copies of other files, or in conflict with them."""


def read_folder(
    path: Path, *, correct_tilt: bool = False, index: Index | None = None, jobs: int | None = None
) -> FolderReading:
    """Reads all of a folder into memory; `iterate_folder` says how.

    Raises:
        DataError: There is no such folder.
    """
    items = list(iterate_folder(path, correct_tilt=correct_tilt, index=index, jobs=jobs))
    return FolderReading(
        tuple(item for item in items if isinstance(item, Volume)),
        tuple(item for item in items if isinstance(item, Image)),
        tuple(item for item in items if isinstance(item, Refused)),
    )


def iterate_folder(
    path: Path,
    progress: Progress | None = None,
    *,
    correct_tilt: bool = False,
    index: Index | None = None,
    jobs: int | None = None,
) -> Iterator[Volume | Image | Refused]:
    """As `volume.iterate_folder`: the same items in the same order.

    Args:
        index: Of this folder, brought up to date first; None: headers are read anew and forgotten.
        jobs: Threads that read pixels, and processes that read headers where it is worth it; None: one for each core.

    Raises:
        DataError: There is no such folder.
        ConfigError: The index is of another folder.
    """
    if index is not None and index.root.resolve() != path.resolve():
        raise ConfigError("the index is of another folder than the one to read; index that one")
    own = Index(path) if index is None else None
    try:
        yield from _iterate(index or own, progress, correct_tilt, jobs)  # type: ignore[arg-type]
    finally:
        if own is not None:
            own.close()


def _iterate(
    index: Index, progress: Progress | None, correct_tilt: bool, jobs: int | None
) -> Iterator[Volume | Image | Refused]:
    total = 0

    def headers(done: int, files: int) -> None:
        nonlocal total
        total = 2 * files
        if progress is not None:
            progress(done, total)

    index.refresh(headers, jobs=jobs)
    done = total // 2
    outside = {refused.path for refused in index.outside}
    for refused in index.refused():
        if progress is not None and refused.path not in outside:
            done += 1
            progress(done, total)
        yield refused
    for series in Catalogue(index):
        used: set[Path] = set()
        for item in read_series(series, correct_tilt=correct_tilt, jobs=cores() if jobs is None else jobs):
            files = {item.path} if isinstance(item, Refused) else set(item.source.files)
            done += len(files - used)
            used |= files
            if progress is not None:
                progress(done, total)
            yield item
            del item  # or it would stay until the next one has been read


class Catalogue:
    """The series of an index that is up to date; one at a time is in memory."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._copies = volume._copies(iter(index.doubled()))
        self.uids = index.series_uids()
        """Series Instance UIDs, sorted by the path of their first file."""
        self.shared_ids = index.shared_ids()
        """Patient IDs that do not stand for one patient."""

    def __iter__(self) -> Iterator[Series]:
        return map(self.series, self.uids)

    def series(self, uid: str) -> Series:
        """All images of one series."""
        entries = self._index.entries(uid)
        paths = (entry.header.path for entry in entries)
        return Series(entries, {path: self._copies[path] for path in paths if path in self._copies})


def read_series(series: Series, *, correct_tilt: bool = False, jobs: int = 1) -> Iterator[Volume | Image | Refused]:
    """Everything that a series gives.

    Args:
        jobs: Threads.
    """
    headers = [entry.header for entry in series.entries]
    clean = all(header.kind == "slice" and header.problem is None for header in headers)
    one = len({(header.patient_id, header.study_uid) for header in headers}) == 1
    if not (clean and one) or series.copies:
        yield from volume._read_series(headers, dict(series.copies), correct_tilt)
        return
    entries = {entry.header.path: entry for entry in series.entries}
    for item in stacks(headers, tilted=correct_tilt):
        if isinstance(item, Stack):
            made = _read_stack(item, [entries[header.path] for header in item.headers], jobs)
            if made is None:
                yield from volume._stacked(item)
            else:
                yield made
                del made
        else:
            header, code, why = item
            yield Refused(header.path, code, why)


class _NotPlain(Exception):  # noqa: N818
    """A slice that has to go the usual way after all."""


def _read_stack(stack: Stack, entries: Sequence[Entry], jobs: int) -> Volume | None:
    """The volume; None where any slice is not as it was indexed, or must be refused."""
    if jobs == 1 and any(entry.plan is None for entry in entries):
        return None
    shape = (len(entries), *stack.headers[0].shape)
    try:
        volume._check_size(stack, shape)
        values_ZYX = np.empty(shape, dtype=np.float32)
    except (Refusal, MemoryError):
        return None
    jobs = min(jobs, len(entries))
    parts = [range(len(entries))[at::jobs] for at in range(jobs)]

    def read(places: Sequence[int]) -> dict[int, NDArray[np.bool_]]:
        return _read_slices(entries, places, values_ZYX)

    try:
        found = map(read, parts) if jobs == 1 else _threads(jobs).map(read, parts)
        padding = {z: mask for part in found for z, mask in part.items()}
    except _NotPlain:
        return None
    if padding:
        padding_ZYX = np.zeros(shape, dtype=np.bool_)
        for z, mask in padding.items():
            padding_ZYX[z] = mask
        try:
            fill_padding(values_ZYX, padding_ZYX)
        except Refusal:
            return None
    return volume._volume(values_ZYX, stack, stack.headers)


@cache
def _threads(jobs: int) -> ThreadPoolExecutor:
    """Kept, because each thread has a process of its own in which compressed pixels are decoded."""
    return ThreadPoolExecutor(jobs, thread_name_prefix="slices")


def _read_slices(
    entries: Sequence[Entry], places: Sequence[int], values_ZYX: NDArray[np.float32]
) -> dict[int, NDArray[np.bool_]]:
    """Reads these slices into the volume, and returns the padding of those that have some."""
    scratch = _Scratch()
    padding = {}
    for z in places:
        header, plan, mark, _ = entries[z]
        if plan is None or mark is None:
            try:
                with quiet():
                    values_ZYX[z], mask = decode(header.path, projection=False)
            except Exception:
                raise _NotPlain from None
        else:
            mask = scratch.read(header.path, plan, mark, values_ZYX[z])
        if mask is not None:
            padding[z] = mask
    return padding


class _Scratch:
    """Room for the stored values of one slice, used again for the next."""

    def __init__(self) -> None:
        self._stored = np.empty(0, np.uint8)
        self._wide = np.empty((0, 0))

    def read(self, path: Path, plan: Plan, mark: Mark, values_YX: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """Reads one slice, and returns its padding.

        Raises:
            _NotPlain: The file is not the one that was indexed.
        """
        stored = self._decoded(path, plan, mark) if plan.codec else self._raw(path, plan, mark)
        mask = None
        if plan.padding is not None:
            mask = _padding(stored, *plan.padding)
        self._scale(stored, plan, values_YX)
        return mask

    def _raw(self, path: Path, plan: Plan, mark: Mark) -> NDArray[Any]:
        if len(self._stored) != plan.length:
            self._stored = np.empty(plan.length, np.uint8)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                same = Mark.of(os.fstat(handle)) == mark
                whole = same and os.preadv(handle, [self._stored.data], plan.offset) == plan.length
            finally:
                os.close(handle)
        except OSError:
            raise _NotPlain from None
        if not whole:
            raise _NotPlain
        stored: NDArray[Any] = self._stored.view(plan.dtype).reshape(plan.shape)
        unused = 8 * stored.itemsize - plan.bits
        if unused:  # up and down again: the highest bit kept becomes the sign
            np.left_shift(stored, unused, out=stored)
            np.right_shift(stored, unused, out=stored)
        return stored

    def _decoded(self, path: Path, plan: Plan, mark: Mark) -> NDArray[Any]:
        kind = np.dtype(plan.dtype)
        layout = Layout(
            syntax=plan.codec,
            element=Element(plan.offset, UNDEFINED, mark.size - plan.offset, words=False),
            frames=1,
            rows=plan.shape[0],
            columns=plan.shape[1],
            samples=1,
            allocated=8 * kind.itemsize,
            stored=plan.bits,
            signed=kind.kind == "i",
            photometric="MONOCHROME2",
            planar=0,
        )
        try:
            before = Mark.of(path.stat())
            with quiet():
                (stored,) = stored_frames(path, layout, [0])
            after = Mark.of(path.stat())
        except Exception:
            raise _NotPlain from None
        if not before == mark == after:
            raise _NotPlain
        return stored

    def _scale(self, stored: NDArray[Any], plan: Plan, values_YX: NDArray[np.float32]) -> None:
        if plan.exact:
            if plan.slope == 1:  # in two steps: numpy adds integers to floats through a buffer
                np.copyto(values_YX, stored)
                values_YX += np.float32(plan.intercept)
            else:
                np.multiply(stored, np.float32(plan.slope), out=values_YX)
                values_YX += np.float32(plan.intercept)
            return
        if self._wide.shape != plan.shape:
            self._wide = np.empty(plan.shape)
        np.multiply(stored, plan.slope, out=self._wide)
        if plan.intercept != 0:
            self._wide += plan.intercept
        values_YX[...] = self._wide


def _padding(stored: NDArray[Any], low: int, high: int) -> NDArray[np.bool_] | None:
    # numpy 2 compares integers beyond the dtype exactly
    mask = stored == low if low == high else (stored >= low) & (stored <= high)
    return mask if mask.any() else None
