"""A site's part in secure sums: keys in memory, and on disk which list was opened for which update.

An update may be masked again and again, each time under new keys: as long as all sums that are opened over it are of
the same sites, they say one thing. So a site opens one list of sites for an update, for ever; the list is on disk
before the first share leaves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Recipe
from common.errors import SecureAggregationError
from common.exchange import Ask, Dealing, Gathering, Masking, Offer, Opening, Shares, Survivors, Update
from common.fixed import Residues
from common.identity import Signer
from common.secagg import Member, Subject
from common.storage import private_folder, storing, write_whole

_KEPT = 8
"""Sums that may be under way at a time; of older ones the keys are forgotten."""


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A masked update that is ready to leave."""

    values: Residues
    again: bool
    """It, or the same update under other masks, was sent before."""


class Sums:
    """The secure sums that a site takes part in. Keys are made for one sum and die with this object."""

    def __init__(self, site: str, folder: Path, signer: Signer, keys: Callable[[], Mapping[str, str]]) -> None:
        """Wires it.

        Args:
            folder: Remembers what was opened. Whoever removes it lets the coordinator open an update twice.
            keys: Gives the signing keys of all sites that may take part, from the registry that is pinned here.
        """
        self._site, self._signer, self._keys = site, signer, keys
        self._folder = folder
        self._members: list[Member] = []

    def offer(self, recipe: Recipe, update: Update) -> Offer:
        """New keys for a sum over this update.

        Raises:
            SecureAggregationError: The registry does not hold this site.
        """
        keys = dict(self._keys())
        if keys.get(self._site) != self._signer.public:
            raise SecureAggregationError("this site's registry does not hold its own key; install the newest one")
        member = Member(
            self._site,
            Subject(recipe_id=update.recipe_id, round=update.round, base=update.base),
            signer=self._signer,
            keys=keys,
            sites=recipe.federation.sites,
            threshold=recipe.federation.quorum,
        )
        self._members = [*self._members[1 - _KEPT :], member]
        return member.offer

    def deal(self, ask: Gathering) -> Dealing:
        """Shares this site's secrets out to the sites of the sum.

        Raises:
            SecureAggregationError: The keys offered are not this site's, or `Member.deal` refuses.
        """
        own = ask.offers.get(self._site)
        for member in self._members:
            if member.offer == own and member.subject == _subject(ask):
                session, seed, boxes = member.deal(ask.offers)
                return Dealing(
                    site=self._site, recipe_id=ask.recipe_id, round=ask.round, session=session, seed=seed, boxes=boxes
                )
        raise SecureAggregationError("the keys offered for this site are not among those that it has; start anew")

    def mask(self, ask: Masking, recipe: Recipe, update: Update) -> Masked:
        """The update and its weight under the sum's masks.

        Raises:
            SecureAggregationError: The update does not fit into the fixed point, another one of the round was opened,
                of these weights or of others, or `Member.mask` refuses.
        """
        member, record = self._member(ask), self._record(ask)
        if record.get("opened") and record["update"] != update.delta.digest:
            raise SecureAggregationError(
                f"round {ask.round} was opened with another update of this site, not kept any more; to run the "
                "recipe once more, sign it with another seed"
            )
        words = recipe.fixed_point.encode(update.delta, round(update.weight))
        masked = Masked(values=member.mask(ask.session, ask.boxes, words), again=bool(record))
        self._write(ask, {**record, "update": update.delta.digest})
        # Earlier sums over this round can be opened no more: they may hold another update.
        at = self._members.index(member)
        self._members = [
            other for number, other in enumerate(self._members) if number >= at or other.subject != member.subject
        ]
        return masked

    def agree(self, ask: Survivors) -> str:
        """This site's signature under the list.

        Raises:
            SecureAggregationError: Another list was opened for this update, or `Member.agree` refuses.
        """
        member = self._member(ask)
        self._unopened(ask)
        return member.agree(ask.session, ask.masked)

    def open(self, ask: Opening) -> Shares:
        """Shares of one secret of every site.

        Raises:
            SecureAggregationError: Another list was opened for this update, or `Member.open` refuses.
            StorageError: The list cannot be written down, so nothing is opened.
        """
        member, record = self._member(ask), self._unopened(ask)
        seeds, keys = member.open(ask.session, ask.masked, ask.signatures)
        self._write(ask, {**record, "opened": sorted(ask.masked)})
        return Shares(
            site=self._site, recipe_id=ask.recipe_id, round=ask.round, session=ask.session, seeds=seeds, keys=keys
        )

    def _member(self, ask: Masking | Survivors | Opening) -> Member:
        for member in self._members:
            if member.session == ask.session and member.subject == _subject(ask):
                return member
        raise SecureAggregationError("this site has no keys of that session: it was started again, or never had them")

    def _unopened(self, ask: Survivors | Opening) -> dict[str, Any]:
        record = self._record(ask)
        if record.get("opened") not in (None, sorted(ask.masked)):
            raise SecureAggregationError(
                f"round {ask.round} was opened for another list of sites; a second list would tell single updates"
            )
        return record

    def _path(self, ask: Ask) -> Path:
        return self._folder / f"{_stem(ask)}{ask.base[:16]}.json"

    def _record(self, ask: Ask) -> dict[str, Any]:
        own = self._path(ask)
        for path in self._folder.glob(f"{_stem(ask)}*.json"):
            # From weights that hardly differ comes nearly the same update, and so, of two sums, a single one.
            if path != own and self._read(path, ask).get("opened"):
                raise SecureAggregationError(f"round {ask.round} was opened over other weights; it is opened once")
        return self._read(own, ask) if own.exists() else {}

    def _read(self, path: Path, ask: Ask) -> dict[str, Any]:
        with storing(path.name):
            text = path.read_text()
        try:
            record = json.loads(text)
            whole = isinstance(record, dict) and isinstance(record.get("update"), str)
        except ValueError:
            whole = False
        if not whole:
            raise SecureAggregationError(f"what this site remembers of the sum of round {ask.round} cannot be read")
        return dict(record)

    def _write(self, ask: Ask, record: Mapping[str, Any]) -> None:
        private_folder(self._folder)
        write_whole(self._path(ask), json.dumps(record).encode())


def noise_norm(recipe: Recipe, noise_multiplier: float, steps: int, numbers: int) -> float:
    """About the largest L2 norm that the privacy noise alone gives to one round's update of so many numbers.

    SGD adds the noise of its steps up; AdamW makes each number move by about the learning rate a step, in a random
    walk. Schedule, layer factors, a moving clip norm and what is learnt are left out; six standard deviations are
    allowed for.
    """
    training, privacy = recipe.training, recipe.privacy
    walk = training.lr * math.sqrt(steps) * (math.sqrt(numbers) + 6)
    if training.optimizer == "adamw":
        return 1.2 * walk  # measured, pure noise: 1.00 after one step, 1.19 after ten, 1.05 after a hundred
    walk *= noise_multiplier * privacy.clip_norm / training.batch_size
    clipped = math.inf if training.gradient_clip is None else training.lr * steps * training.gradient_clip
    return min(walk, clipped) / (1 - training.momentum)


def _stem(ask: Ask) -> str:
    return f"{ask.recipe_id[:16]}-{ask.round:06d}-"


def _subject(ask: Ask) -> Subject:
    return Subject(recipe_id=ask.recipe_id, round=ask.round, base=ask.base)
