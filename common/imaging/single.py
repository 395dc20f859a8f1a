"""What the header of a single-frame file says about its pixels: how they are stored, and what their values mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.imaging import worker
from common.imaging.frames import rescale
from common.imaging.header import Overrun, modality_of, read_header, tags_of
from common.imaging.layout import LAYOUT_TAGS, Layout, layout_of, need_grey
from common.imaging.refusal import Refusal, RefusalCode, quiet
from common.imaging.tables import TABLE_BYTES, Lookup, lookup

_PALETTES = tuple(f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue"))
_TAGS = tags_of(
    *LAYOUT_TAGS, "Modality", "SOPClassUID", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "VOILUTSequence",
    *(f"{name}{part}" for name in _PALETTES for part in ("Descriptor", "Data")),
    *(f"Segmented{name}Data" for name in _PALETTES),
)  # fmt: skip
_ENTRIES: dict[str, np.dtype[np.unsignedinteger[Any]]] = {"|u1": np.dtype("u1"), "<u2": np.dtype("<u2")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """The header of a single-frame file."""

    layout: Layout
    modality: str
    scale: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept."""
    modality_lut: Lookup | None = None
    """Takes the place of `scale`."""
    tone_curve: Lookup | None = None
    """The first VOI LUT, of a projection alone."""
    palette: tuple[Lookup, ...] = ()
    """Red, green, blue."""

    @property
    def colour(self) -> bool:
        return self.layout.samples == 3 or bool(self.palette)


def read_single(path: Path, *, projection: bool) -> Single:
    """Reads the header of a single-frame file, in the worker where it is long: several tone curves make it so.

    Args:
        path: The file.
        projection: A picture rather than a slice.

    Raises:
        Refusal: The file holds less than it declares, or pixels of a kind that is not used.
        Exception: Whatever a damaged header makes the parser raise.
    """
    try:
        return _single(path, projection, bounded=True)
    except Overrun:
        return _from_worker(path, projection)


def _single(path: Path, projection: bool, *, bounded: bool) -> Single:
    dataset, element = read_header(path, _TAGS, bounded=bounded)
    layout = layout_of(dataset, element)
    if layout.frames != 1:
        raise Refusal(RefusalCode.CINE, "A film of many frames; only single images and stacks are used.")
    modality = modality_of(dataset)
    stored_range = layout.value_range(1, 0)
    if layout.photometric == "PALETTE COLOR" or layout.samples == 3:
        if not projection:
            raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "A slice in colour is a derived picture, not measured.")
        palette: tuple[Lookup, ...] = ()
        if layout.photometric == "PALETTE COLOR":
            if any(f"Segmented{name}Data" in dataset for name in _PALETTES):  # six bytes may become millions
                why = "Colours from a segmented palette are not supported."
                raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, why)
            palette = tuple(lookup(dataset, name, stored_range, signed=layout.signed) for name in _PALETTES)
        return Single(layout=layout, modality=modality, palette=palette)
    need_grey(layout)
    modality_lut = tone_curve = None
    scale = 1.0, 0.0
    if dataset.get("ModalityLUTSequence"):
        modality_lut = lookup(dataset.ModalityLUTSequence[0], "LUT", stored_range, signed=layout.signed)
        limits, signed = modality_lut.limits, False
    else:
        scale = rescale(dataset, modality)
        limits = layout.value_range(*scale)
        signed = limits[0] < 0
    if projection and dataset.get("VOILUTSequence"):
        tone_curve = lookup(dataset.VOILUTSequence[0], "LUT", limits, signed=signed)
    return Single(layout=layout, modality=modality, scale=scale, modality_lut=modality_lut, tone_curve=tone_curve)


def single_job(path: str, projection: bool) -> Iterator[tuple[dict[str, Any], bytes]]:
    """In the worker: `read_single` without a bound of its own; the tables follow one by one."""
    with quiet():
        found = _single(Path(path), projection, bounded=False)
    yield {"layout": asdict(found.layout), "modality": found.modality, "scale": found.scale}, b""
    tables = (("modality_lut", found.modality_lut), ("tone_curve", found.tone_curve))
    for name, table in (*tables, *(("palette", table) for table in found.palette)):
        if table is not None:
            kind = table.entries_N.dtype.str
            yield {"name": name, "first": table.first, "bits": table.bits, "dtype": kind}, table.entries_N.tobytes()


def _from_worker(path: Path, projection: bool) -> Single:
    limits = worker.Limits.header(path.stat().st_size)._replace(part_bytes=TABLE_BYTES)
    (about, _), *parts = worker.ask("single", limits, path=os.fspath(path), projection=projection)
    tables: dict[str, list[Lookup]] = {}
    for head, raw in parts:
        kind = _ENTRIES.get(head["dtype"])
        if kind is None or not raw:
            raise Refusal(RefusalCode.CORRUPT, "A lookup table is not what its header says.")
        table = Lookup(np.frombuffer(raw, kind), int(head["first"]), int(head["bits"]))
        tables.setdefault(head["name"], []).append(table)
    return Single(
        layout=Layout.of_plain(about["layout"]),
        modality=str(about["modality"]),
        scale=(float(about["scale"][0]), float(about["scale"][1])),
        modality_lut=next(iter(tables.get("modality_lut", ())), None),
        tone_curve=next(iter(tables.get("tone_curve", ())), None),
        palette=tuple(tables.get("palette", ())),
    )
