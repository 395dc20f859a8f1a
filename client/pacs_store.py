"""Where pulled images lie: every file whole and verified, and a journal that a kill cannot confuse.

    DIR/dicom/<study>/<series>/<instance>.dcm            whole series, named by keyed pseudonyms
    DIR/pull/partial/<study>/<series>/<instance>.dcm     series of which something is still to come
    DIR/pull/journal.sqlite                              what is done
    DIR/pull/report.csv, labels.csv                      what is not, and what has no label; 0600

A file gets its name only after it was checked and flushed; its row in the journal follows. A kill in between leaves a
good file without a row, which the next run takes over. The first slices of a series look like a whole volume, so a
series enters `dicom/`, and leaves it when the PACS has more of it, by one rename of its folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from client.pacs_source import FoundInstance, Pace
from common.errors import StorageError
from common.imaging.received import Received, examine
from common.imaging.refusal import Refusal
from common.pseudonyms import pseudonym
from common.storage import commit, flush_folder, held_alone, private, private_folder, storing

MOST_INSTANCE_BYTES = 2**33
_DIGITS = 32
_COLUMNS = "instance, study, series, patient, accession, sha256, bytes"
_TABLE = """CREATE TABLE IF NOT EXISTS done (instance TEXT PRIMARY KEY, study TEXT NOT NULL, series TEXT NOT NULL,
patient TEXT NOT NULL, accession TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID"""


class Store:
    """One folder of pulled images; one process at a time."""

    def __init__(self, folder: Path, key: bytes, pace: Pace) -> None:
        """Opens or makes it.

        Args:
            key: Of the pseudonyms; another key would give every file another name.

        Raises:
            StorageError: Another pull is at work here, the folder was made with another key, or cannot be written.
        """
        self.folder = folder
        private_folder(folder)
        self.images = private_folder(folder / "dicom")
        self.state = private_folder(folder / "pull")
        self.partial = private_folder(self.state / "partial")
        self._key, self._pace = key, pace
        self._lock = ExitStack()
        self._lock.enter_context(held_alone(self.state / ".lock", "a lock file", _busy))
        self.fetched = self.fetched_bytes = self.bad = 0
        for part in self.state.glob("*.part"):
            part.unlink()
        path = self.state / "journal.sqlite"
        with storing("the journal"):
            os.close(private(path, os.O_RDWR | os.O_CREAT))
        with _journalling():
            # a C-GET may store from the thread that reads the association
            self._journal = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._journal.execute("PRAGMA journal_mode=WAL")
            self._journal.execute(_TABLE)
            self._journal.execute("CREATE TABLE IF NOT EXISTS made (by TEXT NOT NULL)")
            made = self._journal.execute("SELECT by FROM made").fetchone()
            mine = pseudonym(key, "pull")
            if made is None:
                self._journal.execute("INSERT INTO made VALUES (?)", (mine,))
        if made is not None and made[0] != mine:
            self.close()
            raise StorageError(f"{folder.name} was pulled with another key; use that key, or another folder")

    def close(self) -> None:
        """Closes the journal and lets others in."""
        self._journal.close()
        self._lock.close()

    def name(self, kind: str, identifier: str) -> str:
        """The pseudonym that stands for an identifier; empty for none."""
        return pseudonym(self._key, kind, identifier)[:_DIGITS] if identifier else ""

    def missing(self, study: str, series: str, instances: Sequence[FoundInstance]) -> list[FoundInstance]:
        """Those that are not here, whole."""
        here = self._series(self.images, study, series)
        folder = here if here.is_dir() else self._series(self.partial, study, series)
        return [each for each in instances if not self._has(folder, each.uid)]

    def hold(self, study: str, series: str) -> None:
        """Takes a series of which something is missing out of `dicom/`, with all that is here of it."""
        here, aside = (self._series(root, study, series) for root in (self.images, self.partial))
        with storing("a pulled series"):
            if here.is_dir():
                _forget(aside)  # only where somebody brought `here` back; `missing` went by what is there
                _move(here, aside)
        private_folder(aside)

    def release(self, study: str, series: str) -> None:
        """Puts a series of which nothing is missing into `dicom/`."""
        here, aside = (self._series(root, study, series) for root in (self.images, self.partial))
        with storing("a pulled series"):
            if here.is_dir():
                _forget(aside)
            else:
                _move(aside, here)

    def waiting(self) -> int:
        """Series that are not whole, of this pull and earlier ones."""
        return sum(1 for _ in self.partial.glob("*/*/"))

    @contextmanager
    def taking(self, study: str, series: str, wanted: Iterable[FoundInstance]) -> Iterator[Callable[..., None]]:
        """Gives the function that takes what arrives of this series, and counts as bad what was not asked for.

        The series is held until `release`.
        """
        self.hold(study, series)
        folder = self._series(self.partial, study, series)
        open_ = {each.uid for each in wanted}

        def take(chunks: Iterable[bytes]) -> None:
            part = self.state / f"{os.urandom(8).hex()}.part"
            try:
                with storing("a pulled image"):
                    sha256, size = self._write(part, chunks)
                    received = _examined(part) if size else None
                    whole = (
                        received is not None
                        and (received.study_uid, received.series_uid) == (study, series)
                        and received.sop_uid in open_
                    )
                    if received is None or not whole:
                        self.bad += 1
                        return
                    open_.discard(received.sop_uid)
                    commit(part, folder / self._file(received.sop_uid))
                self._note(received, sha256, size)
                self.fetched, self.fetched_bytes = self.fetched + 1, self.fetched_bytes + size
            finally:
                part.unlink(missing_ok=True)

        try:
            yield take
        finally:
            _drop_if_empty(folder)

    def rows(self) -> Iterator[Mapping[str, str]]:
        """Pseudonyms of study, series, patient and accession number of all series in `dicom/`."""
        kinds = ("study", "series", "patient", "accession")
        with _journalling():
            found = self._journal.execute(f"SELECT DISTINCT {', '.join(kinds)} FROM done").fetchall()  # noqa: S608
        for row in found:
            named = dict(zip(kinds, row, strict=True))
            if (self.images / named["study"] / named["series"]).is_dir():
                yield named

    def _series(self, root: Path, study: str, series: str) -> Path:
        return root / self.name("study", study) / self.name("series", series)

    def _file(self, instance: str) -> str:
        return self.name("instance", instance) + ".dcm"

    def _has(self, folder: Path, instance: str) -> bool:
        path = folder / self._file(instance)
        try:
            size = path.stat().st_size
        except OSError:
            return False
        with _journalling():
            row = self._journal.execute(
                "SELECT bytes FROM done WHERE instance = ?", (self.name("instance", instance),)
            ).fetchone()
        if row is not None:
            return bool(row[0] == size)
        received = _examined(path)  # named, hence whole, but the kill came before its row
        if received is None or received.sop_uid != instance:
            return False
        with storing("a pulled image"), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._note(received, sha256, size)
        return True

    def _write(self, part: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        with open(part, "wb", opener=private) as out:
            for chunk in chunks:
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if size > MOST_INSTANCE_BYTES:
                    return "", 0
                if (wait_s := self._pace.spend(len(chunk))) > 0:
                    time.sleep(wait_s)
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest(), size

    def _note(self, received: Received, sha256: str, size: int) -> None:
        row = (
            self.name("instance", received.sop_uid),
            self.name("study", received.study_uid),
            self.name("series", received.series_uid),
            self.name("patient", received.patient_id),
            self.name("accession", received.accession),
            sha256,
            size,
        )
        with _journalling():
            self._journal.execute(f"INSERT OR REPLACE INTO done ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608


def _move(old: Path, new: Path) -> None:
    """Gives a series' folder another place in one step, which is on the disk before anything else happens to it.

    Were it not, a power cut could bring a series back that was taken out, with some of what came since.
    """
    private_folder(new.parent)
    old.replace(new)
    for folder in (new.parent, new.parent.parent, old.parent):
        flush_folder(folder)
    _drop_if_empty(old)


def _forget(aside: Path) -> None:
    if aside.is_dir():
        shutil.rmtree(aside)
        _drop_if_empty(aside)


def _drop_if_empty(series: Path) -> None:
    """Removes the folder of a series and that of its study, where nothing is in them."""
    for folder in (series, series.parent):
        with suppress(OSError):
            folder.rmdir()


def _examined(path: Path) -> Received | None:
    try:
        return examine(path)
    except Refusal:
        return None


def _busy() -> StorageError:
    return StorageError("another pull is at work in this folder; wait for it, or give another --out")


@contextmanager
def _journalling() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = "full" in str(error)
        why = "the disk is full; free space and run again" if full else "it is damaged; remove it and run again"
        raise StorageError(f"the journal of the pull cannot be used: {why}") from None
