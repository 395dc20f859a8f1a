"""The label table without a recipe: which column is what, and what several annotators said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from common.config import Task
from common.errors import ConfigError, DataError
from common.labels import KEYS, Label, between_columns, read_labels, records

ANNOTATOR = "annotator"
"""Columns whose name begins so hold what one person said."""
_MOST_CLASSES = 50


@dataclass(frozen=True)
class Table:
    """labels.csv."""

    task: Task
    labels: Mapping[str, Label] = field(repr=False)
    annotators: Mapping[str, Mapping[str, int]] = field(default_factory=dict, repr=False)
    """Column -> identifier -> class index, for what that person labelled."""


def read_table(data: bytes, classes: Sequence[str] = ()) -> Table:
    """Reads labels.csv, and finds out what a recipe would have said about it.

    The first column names the key; a column `label` holds class names, or else every column of 0 and 1 is a class of
    a multi-label task. Columns that begin with `annotator` hold one person's class names each.

    Args:
        data: The file's bytes.
        classes: Names in their order, which matters for weighted kappa; empty: all that occur, sorted.

    Raises:
        DataError: As `common.labels.read_labels`; or there are more than 50 classes.
        ConfigError: `classes` misses one that occurs.
    """
    header, rows = _cells(data)
    key = header[0] if header else ""
    if key not in KEYS:
        raise DataError(
            f"labels.csv: the first column must be named one of {', '.join(KEYS)}; it says which identifier of the "
            f"images the rows go by{between_columns(key)}"
        )
    people = [name for name in header[1:] if name.lower().startswith(ANNOTATOR)]
    if "label" in header:
        task = _one_label(header, rows, people, classes, key)
    else:
        task = _many_labels(header, rows, people, key)
    labels = read_labels(data, task)
    said: dict[str, dict[str, int]] = {}
    if task.kind != "multilabel":
        for name in people:
            at = header.index(name)
            said[name] = {row[0]: task.classes.index(row[at]) for row in rows if row[at]}
    return Table(task, labels, said)


def _one_label(
    header: Sequence[str], rows: Sequence[Sequence[str]], people: Sequence[str], classes: Sequence[str], key: str
) -> Task:
    columns = [header.index("label"), *(header.index(name) for name in people)]
    found = sorted({row[at] for row in rows for at in columns if len(row) == len(header) and row[at]})
    if len(found) > _MOST_CLASSES:
        raise DataError(
            f"labels.csv: the labels have {len(found)} different values, expected at most {_MOST_CLASSES}; does the "
            "column hold class names?"
        )
    if classes and set(found) - set(classes):
        raise ConfigError(
            f"labels.csv has {len(set(found) - set(classes))} classes that --classes does not name; name all of them"
        )
    names = tuple(classes) or tuple(found)
    if len(names) < 2:
        raise DataError("labels.csv has fewer than two classes; with one class there is nothing to tell apart")
    return _task("binary" if len(names) == 2 else "multiclass", names, key)


def _many_labels(header: Sequence[str], rows: Sequence[Sequence[str]], people: Sequence[str], key: str) -> Task:
    whole = [row for row in rows if len(row) == len(header)]
    names = tuple(
        name
        for at, name in enumerate(header)
        if at and name not in people and whole and all(row[at] in ("0", "1") for row in whole)
    )
    if len(names) < 2:
        raise DataError("labels.csv has no column 'label', and fewer than two columns of 0 and 1; add the labels")
    return _task("multilabel", names, key)


def _task(kind: Literal["binary", "multiclass", "multilabel"], names: tuple[str, ...], key: str) -> Task:
    try:
        return Task(kind=kind, classes=names, key=key)  # type: ignore[arg-type]
    except ValidationError:  # its own words show the name, and a shifted column may hold what was said of a patient
        raise DataError(
            "labels.csv: a class has no name of one line and 1 to 200 characters, or one that occurs twice; does the "
            "column hold class names?"
        ) from None


def _cells(data: bytes) -> tuple[list[str], list[list[str]]]:
    """Header and rows, stripped; what is wrong with them `read_labels` says."""
    numbered = [(row, [cell.strip() for cell in record]) for row, record in records(data)]
    if not numbered:
        raise DataError("labels.csv is empty; expected a header and one row for each image, study or patient")
    (_, header), *rows = numbered
    uneven = next((row for row, cells in rows if len(cells) != len(header)), None)
    if uneven is not None:
        raise DataError(f"labels.csv row {uneven}: the header has {len(header)} columns, this row another number")
    return header, [cells for _, cells in rows]
