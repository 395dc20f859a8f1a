"""Who stands in the label tables of several hospitals: nobody else than whoever has all of them can see that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.labels import records
from common.printable import number_of
from common.storage import storing
from simulations.partition import CENTRAL


def overlap(hospitals: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on identifiers (`task.key`) that more than one labels.csv has, in counts.

    Equal ones may be of two people where each hospital counts its own from 1, so this is no refusal.
    """
    there = {name: _identifiers(hospitals / name) for name in names}
    notes = []
    test = _identifiers(hospitals / CENTRAL)
    if trained := {name: common for name, of in there.items() if (common := test & of)}:
        found = len(set().union(*trained.values()))
        notes.append(
            f"{found} of {number_of(len(test), 'identifier')} in {CENTRAL}/labels.csv stand in that of "
            f"{', '.join(trained)} too. If they are of the same patients, the model was tested on images that it may "
            "have been trained on, and the central results are too good."
        )
    counts = Counter(one for of in there.values() for one in of)
    if several := sum(count > 1 for count in counts.values()):
        notes.append(
            f"In the labels.csv of more than one hospital: {number_of(several, 'identifier')}. If they are of the same "
            "patients, these are counted, and spend epsilon, at each of them."
        )
    return tuple(notes)


def _identifiers(folder: Path) -> frozenset[str]:
    path = folder / "labels.csv"
    if not path.is_file():
        return frozenset()
    with storing("labels.csv"):
        _, *rows = records(path.read_bytes())
    return frozenset(cells[0].strip() for _, cells in rows)
