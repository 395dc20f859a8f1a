"""Weights on their way between a run and its sites: pieces, in a folder a round.

A run opens a round for the sites that it asks and lays the global model into it; the gateway lets just these sites
read that, and each write its own answer, up to a number of bytes; the run takes the answers out, and the round is
removed. Nothing here has to survive anything: a run that goes on after a crash opens a new round, and what an older
one left goes. So nothing is flushed to disk. A round is there under its ticket when it is whole, and leaves that name
before it is removed.

    blobs/<ticket>/round.json        who may come, and how much each may write
    blobs/<ticket>/model/<piece>     for all of them
    blobs/<ticket>/from/<site>/<piece>
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from common.blobs import DIGEST, PIECE_BYTES, TICKET
from common.errors import ExchangeError
from common.exchange import NAME_PATTERN
from common.storage import private_folder, storing

_ROUND = "round.json"
_SPARE_BYTES, _SPARE_PIECES = 1 << 20, 16


class Store:
    """The rounds of one run."""

    def __init__(self, folder: Path, run: str) -> None:
        """Removes what an earlier process of this run left."""
        self._folder, self._run = folder, run
        clear(folder, run)

    @contextmanager
    def round(self, sites: Sequence[str], nbytes: int) -> Iterator[Round]:
        """A round for these sites, until the end of the block.

        Args:
            nbytes: Of the global model; a site may write twice that and a little.

        Raises:
            StorageError: The disk is full or not writable.
        """
        ticket, most_bytes = secrets.token_hex(16), 2 * nbytes + _SPARE_BYTES
        aside = private_folder(private_folder(self._folder) / f"{self._run}.{ticket}")
        folder = aside.with_name(ticket)
        try:
            with storing("a folder for weights"):
                for name in ("model", *(f"from/{site}" for site in sites)):
                    (aside / name).mkdir(parents=True, mode=0o700)
                told = {"run": self._run, "sites": list(sites), "bytes": most_bytes}
                (aside / _ROUND).write_text(json.dumps(told))
                aside.rename(folder)
            yield Round(folder, most_bytes)
        finally:
            with suppress(OSError):
                folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Round:
    """The coordinator's view of a round, as `common.blobs.Blobs`: it writes the model, and reads one site's answer."""

    folder: Path
    most_bytes: int
    site: str = ""

    @property
    def ticket(self) -> str:
        return self.folder.name

    def answers(self, site: str) -> Round:
        """The round as `get` reads it for this site."""
        return replace(self, site=site)

    def put(self, name: str, piece: memoryview) -> None:
        """Lays a piece of the model out.

        Raises:
            StorageError: The disk is full or not writable.
        """
        _write(self.folder / "model" / name, piece)

    def get(self, name: str, piece: memoryview) -> None:
        """Reads a piece of the site's answer.

        Raises:
            ExchangeError: It is not there, or of another length.
        """
        try:
            with (self.folder / "from" / self.site / name).open("rb", buffering=0) as file:
                whole = file.readinto(piece) == len(piece) and not file.read(1)
        except OSError:
            whole = False
        if not whole:
            raise ExchangeError(f"site {self.site} announced weights that it has not sent")


def clear(folder: Path, run: str | None = None) -> None:
    """Removes the rounds of a run, or of all."""
    for path in folder.glob("*"):
        if run is None or _run_of(path) == run:
            shutil.rmtree(path, ignore_errors=True)


def _run_of(path: Path) -> str | None:
    name, _, _ = path.name.rpartition(".")
    if name:  # it was being made, or removed
        return name
    try:
        return str(json.loads((path / _ROUND).read_bytes())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Shelf:
    """The gateway's view of all rounds; every question is answered from the disk, for runs come and go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._coming: dict[tuple[str, str], int] = {}
        """Bytes that are being written, by ticket and site."""

    def readable(self, ticket: str, site: str, name: str) -> Path | None:
        """The file of a piece of the model; None when there is none for this site."""
        if self._limit(ticket, site) is None or not DIGEST.fullmatch(name):
            return None
        path = self._folder / ticket / "model" / name
        return path if path.is_file() else None

    def held(self, ticket: str, site: str) -> list[str] | None:
        """Names of the pieces that this site has written; None when it is not asked in this round."""
        if self._limit(ticket, site) is None:
            return None
        return sorted(name for name in self._entries(ticket, site) if DIGEST.fullmatch(name))

    @contextmanager
    def writing(self, ticket: str, site: str, name: str, size: int) -> Iterator[Writing | int]:
        """Room for a piece, or the status that refuses it: 404 no such round for this site, 413 too large or too many,
        503 as long as others are being written, 200 it is here already."""
        limit, key = self._limit(ticket, site), (ticket, site)
        if limit is None or not DIGEST.fullmatch(name):
            yield 404
            return
        entries = self._entries(ticket, site)
        if name in entries:
            yield 200
            return
        held = [size_ for piece, size_ in entries.items() if DIGEST.fullmatch(piece)]
        most = limit // PIECE_BYTES + _SPARE_PIECES
        if len(held) >= most or not 0 < size <= PIECE_BYTES or sum(held) + size > limit:
            yield 413
            return
        if len(entries) >= most or sum(held) + self._coming.get(key, 0) + size > limit:
            yield 503  # one that its line has left for dead ends soon, and the site sends it anew
            return
        self._coming[key] = self._coming.get(key, 0) + size
        folder = self._folder / ticket / "from" / site
        part = folder / f"{secrets.token_hex(8)}.part"
        try:
            yield Writing(part, folder / name)
        finally:
            part.unlink(missing_ok=True)
            self._coming[key] -= size
            if not self._coming[key]:
                del self._coming[key]

    def _entries(self, ticket: str, site: str) -> dict[str, int]:
        """Name -> bytes of all that the site has written, or is writing."""
        found = {}
        with suppress(OSError):  # the round has just ended
            for entry in os.scandir(self._folder / ticket / "from" / site):
                with suppress(FileNotFoundError):  # a part that got its name, or was given up
                    found[entry.name] = entry.stat().st_size
        return found

    def _limit(self, ticket: str, site: str) -> int | None:
        """Bytes that the site may write in this round; None when it has no part in it."""
        if not TICKET.fullmatch(ticket) or not re.fullmatch(NAME_PATTERN, site):
            return None
        try:
            told = json.loads((self._folder / ticket / _ROUND).read_bytes())
            return int(told["bytes"]) if site in told["sites"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Writing:
    """Where a piece is written, and the name that it gets when it is whole."""

    part: Path
    path: Path

    def done(self) -> None:
        """Gives it its name."""
        self.part.replace(self.path)


def _write(path: Path, data: memoryview) -> None:
    part = path.with_name(f"{path.name}.part")
    with storing("weights on their way"), part.open("wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        part.replace(path)
