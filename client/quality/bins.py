"""The bins on which cohorts are compared: fixed, versioned and hashed, so that two sites count into the same ones."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from client.quality.survey import LEVELS, Picture
from common.imaging.facts import VENDORS
from common.imaging.overview import MODALITIES

VERSION = 1
UNKNOWN = "unknown"

EDGES: Mapping[str, tuple[float, ...]] = {
    "spacing_mm": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0),
    "slice_mm": (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0),
    "kvp": (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0, 110.0, 120.0, 130.0, 140.0),
    "age": (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0),
}
"""Feature -> where one bin ends and the next, which holds the edge, begins; below the first and above the last is one
bin each. `spacing_mm` is that of the rows."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "sex": ("F", "M", "O", UNKNOWN),
    "vendor": (*VENDORS, "other", UNKNOWN),
    "modality": (*MODALITIES, "other"),
}
"""Feature -> values; whatever is none of them is `other`."""


def bin_names(feature: str, classes: Sequence[str] = ()) -> tuple[str, ...]:
    """Of each bin, in order."""
    if feature == "intensity":
        return tuple(f"{at / LEVELS:.3f}" for at in range(LEVELS))
    if feature == "class":
        return (*classes, "no label")
    if feature in NAMES:
        return NAMES[feature]
    edges = EDGES[feature]
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return (f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and more", UNKNOWN)


def bins_hash(classes: Sequence[str] = ()) -> str:
    """SHA-256 of all bins: two comparisons with the same hash counted into the same bins."""
    plain = {
        "version": VERSION,
        "levels": LEVELS,
        "edges": {name: list(edges) for name, edges in EDGES.items()},
        "names": {name: list(names) for name, names in NAMES.items()},
        "classes": list(classes),
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def bins_of(feature: str, picture: Picture) -> tuple[int, ...]:
    """Places of the bins into which an image falls: one, but for classes of a multi-label task."""
    if feature == "class":
        if picture.target is None:
            return (-1,)
        if isinstance(picture.target, int):
            return (picture.target,)
        return tuple(at for at, has in enumerate(picture.target) if has)
    if feature in NAMES:
        value = {"sex": picture.facts.sex or UNKNOWN, "vendor": picture.vendor, "modality": picture.modality}[feature]
        names = NAMES[feature]
        return (names.index(value if value in names else "other"),)
    number = _NUMBERS[feature](picture)
    return (-1,) if number is None else (bisect_right(EDGES[feature], round(number, 6)),)


_NUMBERS: Mapping[str, Callable[[Picture], float | None]] = {
    "spacing_mm": lambda picture: picture.spacing_mm[-2] if picture.spacing_mm else None,
    "slice_mm": lambda picture: picture.spacing_mm[0] if len(picture.spacing_mm) == 3 else None,
    "kvp": lambda picture: picture.facts.kvp,
    "age": lambda picture: picture.facts.age_years,
}
