"""What a tree of DICOM files holds, from its index alone: no pixel is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from pydicom.uid import UID, AllTransferSyntaxes

from common.imaging.facts import vendor_of
from common.imaging.fastread import Catalogue, Series
from common.imaging.header import Header
from common.imaging.index import Index
from common.imaging.refusal import RefusalCode, Refused
from common.imaging.series import Stack, stacks

MODALITIES = ("CR", "CT", "DX", "IO", "MG", "MR", "NM", "PT", "PX", "RF", "US", "XA")


@dataclass(frozen=True)
class SeriesOverview:
    """One Series Instance UID."""

    patient_id: str = field(repr=False)
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    modality: str
    vendor: str
    files: int
    volumes: tuple[tuple[tuple[int, int, int], tuple[float, float, float]], ...]
    """Size and spacing in mm, (slice, row, column) each."""
    images: tuple[tuple[tuple[int, int], tuple[float, ...]], ...]
    """Size and spacing in mm, (row, column) each; () is unknown."""
    multiframe: int
    """Files of many frames; what they hold is known when they are read."""
    refused: dict[str, int]
    """Code -> files."""
    syntaxes: dict[str, int]
    """Name of the transfer syntax -> files."""


def overview(index: Index) -> Iterator[SeriesOverview]:
    """Each series of an index that is up to date."""
    for series in Catalogue(index):
        first = series.entries[0].header
        volumes, images, multiframe, refused = [], [], 0, Counter[str]()
        for item in _sorted_out(series):
            if isinstance(item, Refused):
                refused[str(item.code)] += 1
            elif isinstance(item, Stack):
                rows, columns = item.headers[0].shape
                shape = len(item.headers), rows, columns
                z, y, x = np.linalg.norm(item.affine[:3, :3], axis=0)
                volumes.append((shape, (float(z), float(y), float(x))))
            elif item.kind == "projection":
                images.append((item.shape, item.spacing_mm))
            else:
                multiframe += 1
        yield SeriesOverview(
            patient_id=first.patient_id,
            study_uid=first.study_uid,
            series_uid=first.series_uid,
            modality=first.modality if first.modality in MODALITIES else "other",
            vendor=vendor_of(first.manufacturer) or ("other" if first.manufacturer else "unknown"),
            files=len(series.entries),
            volumes=tuple(volumes),
            images=tuple(images),
            multiframe=multiframe,
            refused=dict(sorted(refused.items())),
            syntaxes=dict(sorted(Counter(_syntax_name(entry.syntax) for entry in series.entries).items())),
        )


def _sorted_out(series: Series) -> Iterator[Stack | Header | Refused]:
    """What `volume` makes of a series before it reads pixels: stacks, single files, and refusals."""
    headers = [entry.header for entry in series.entries]
    if len({(header.patient_id, header.study_uid) for header in headers}) > 1:
        yield from (Refused(header.path, RefusalCode.MIXED_PATIENTS, "") for header in headers)
        return
    whole = {header.sop_uid for header in headers if header.problem is None and header.path not in series.copies}
    slices, lost = [], False
    for header in headers:
        if header.path not in series.copies and header.problem is None:
            if header.kind == "slice":
                slices.append(header)
            else:
                yield header
            continue
        yield series.copies.get(header.path) or Refused(header.path, (header.problem or _UNKNOWN)[0], "")
        lost |= header.kind == "slice" and header.sop_uid not in whole
    if lost:
        yield from (Refused(header.path, RefusalCode.INCOMPLETE, "") for header in slices)
        return
    for item in stacks(slices):
        yield item if isinstance(item, Stack) else Refused(item[0].path, item[1], item[2])


_UNKNOWN = (RefusalCode.CORRUPT, "")


def _syntax_name(syntax: str) -> str:
    known = UID(syntax)
    return known.name if known in AllTransferSyntaxes else "unknown"
