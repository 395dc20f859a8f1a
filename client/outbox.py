"""Replies that a site keeps until the next one: asked again after a crash, the same bytes go out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import wire
from common.errors import ExchangeError
from common.exchange import RoundPlan, Update
from common.storage import Flush, private_folder, storing, to_disk, write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A reply as it lies on the disk."""

    path: Path
    reservation: int
    """Number of what was reserved for it in the ledger; 0 for nothing."""
    update: Update


class Outbox:
    """One kept reply for each recipe; the folder is patient data as long as updates are not noised."""

    def __init__(self, folder: Path, flush: Flush = to_disk) -> None:
        """Names the folder; it is made when a reply is kept."""
        self._folder, self._flush = folder, flush

    def find(self, recipe_id: str, round_: int, base: str, work: str = "train") -> Kept | None:
        """The reply that was kept for a question; None when there is none, or one of another version."""
        # Most sites keep nothing, and are asked at every visit; a search in no folder is made for nothing.
        stem = _stem(recipe_id, round_, base, work)
        found = sorted(self._folder.glob(f"{stem}.*.bin"), key=_reservation) if self._folder.is_dir() else None
        if not found:
            return None
        try:
            update = _read(found[-1])
        except ExchangeError:  # what is trained anew is paid anew
            log.warning("the kept reply of round %d cannot be read any more", round_)
            return None
        same = (update.recipe_id, update.round, update.base) == (recipe_id, round_, base)
        return Kept(found[-1], _reservation(found[-1]), update) if same else None

    def keep(self, plan: RoundPlan, update: Update, reservation: int) -> Path:
        """Writes a reply, then removes the recipe's older one.

        Raises:
            StorageError: The disk is full or the folder cannot be written; nothing was removed.
        """
        stem = _stem(plan.recipe_id, plan.round, plan.weights.digest, plan.work)
        path = private_folder(self._folder) / f"{stem}.{reservation}.bin"
        write_whole(path, wire.to_parts(update), self._flush)
        for old in self._folder.glob(f"{plan.recipe_id[:16]}-*.bin"):  # two recipes may run side by side
            if old != path:
                old.unlink()
        return path

    def counted(self, recipe_id: str, most: int) -> bool:
        """Counts an evaluation of the recipe, before it is made; False, and not counted, where there were `most`.

        Raises:
            StorageError: The disk is full or the folder cannot be written.
        """
        path = private_folder(self._folder) / f"{recipe_id[:16]}.evaluations"
        with storing(path.name):
            count = path.stat().st_size if path.exists() else 0
        if count < most:
            # A tally cannot be misread, and under this name it outlives a withdrawn approval.
            write_whole(path, b"|" * (count + 1), self._flush)
        return count < most

    def newest(self, recipe_id: str) -> Iterator[Update]:
        """The recipe's readable replies, the newest first."""
        for path in sorted(self._folder.glob(f"{recipe_id[:16]}-*.bin"), reverse=True):
            try:
                yield _read(path)
            except (ExchangeError, OSError):
                continue


def _read(path: Path) -> Update:
    return wire.decode(wire.from_bytes(path.read_bytes()), Update)


def _stem(recipe_id: str, round_: int, base: str, work: str) -> str:
    return f"{recipe_id[:16]}-{round_:06d}-{base[:16]}{'' if work == 'train' else '-scores'}"


def _reservation(path: Path) -> int:
    return int(path.name.split(".")[-2])
