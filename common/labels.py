"""The label table: which class each patient, study or series belongs to."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from common.config import Task
from common.errors import DataError

KEYS = ("patient", "study", "accession", "series")
"""What the first column may hold: the values of `task.key`."""


@dataclass(frozen=True)
class Label:
    """One row of labels.csv."""

    row: int
    """As a spreadsheet counts: the header is row 1."""
    target: int | tuple[int, ...]
    """Class index; multi-label: 0 or 1 for each class."""
    subgroups: tuple[str, ...]
    """Values of the columns `task.subgroups`."""


def read_labels(table: bytes, task: Task) -> dict[str, Label]:
    """Reads labels.csv: the key column first, then `label` (or one 0/1 column a class) and the subgroups.

    Args:
        table: The file's bytes; UTF-8 with or without byte order mark, commas.
        task: Names the key, the classes and the subgroup columns.

    Returns:
        Identifier -> label. An identifier may repeat with equal values only.

    Raises:
        DataError: A column is missing or a row does not make sense. The message names the row's
            number and never shows a cell: any cell of a shifted table may be an identifier.
    """
    rows = records(table)
    header_row = next(rows, None)
    if header_row is None:
        raise DataError(f"labels.csv is empty: expected a header whose first column is {task.key!r}")
    header = [cell.strip() for cell in header_row[1]]
    _check_header(header, task)
    columns = task.classes if task.kind == "multilabel" else ("label",)
    targets_at = [header.index(name) for name in columns]
    subgroups_at = [header.index(name) for name in task.subgroups]

    labels: dict[str, Label] = {}
    for row, record in rows:
        cells = [cell.strip() for cell in record]
        if len(cells) != len(header):
            raise DataError(f"labels.csv row {row}: {len(cells)} cells, but the header has {len(header)} columns")
        if not cells[0]:
            raise DataError(f"labels.csv row {row}: the {task.key} is empty; fill it in or remove the row")
        target = _target([cells[at] for at in targets_at], row, task)
        label = Label(row, target, tuple(cells[at] or "unknown" for at in subgroups_at))
        first = labels.setdefault(cells[0], label)
        if (first.target, first.subgroups) != (label.target, label.subgroups):
            raise DataError(
                f"labels.csv row {row}: the same {task.key} as row {first.row} with other values; keep the right one"
            )
    if not labels:
        raise DataError(f"labels.csv has a header but no rows: expected one row for each {task.key}")
    need_two_classes((label.target for label in labels.values()), task)
    return labels


def need_two_classes(targets: Iterable[int | tuple[int, ...]], task: Task, where: str = "labels.csv") -> None:
    """Refuses labels from which nothing can be told apart.

    Raises:
        DataError: Every target is the same.
    """
    found = set(targets)
    if len(found) > 1:
        return
    only = next(iter(found), None)
    shown = f"only the class {task.classes[only]!r}" if isinstance(only, int) else "the same labels for everything"
    raise DataError(
        f"{where} has one class only: {shown}, expected at least two of {', '.join(task.classes)}; "
        "add images of the other classes"
    )


def records(table: bytes) -> Iterator[tuple[int, list[str]]]:
    """Header and rows of labels.csv that hold anything, each with its number as a spreadsheet counts.

    Raises:
        DataError: It is no CSV in UTF-8.
    """
    try:
        text = table.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("labels.csv is not UTF-8 text; export it as 'CSV UTF-8'") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    row = 0
    try:
        for row, record in enumerate(reader, start=1):
            if record:
                yield row, record
    except csv.Error:
        raise DataError(
            f"labels.csv row {row + 1} cannot be read as CSV; check its quotes and that commas separate the cells"
        ) from None


def between_columns(first: str) -> str:
    """What to do where the first cell of the header shows that other marks than commas stand between the columns."""
    return "; separate the columns by commas" if any(mark in first for mark in ";\t") else ""


def _check_header(header: Sequence[str], task: Task) -> None:
    first = header[0]
    if first != task.key:
        # Without a header the first cell is an identifier, so it is shown only when it is a known key.
        got = f"got {first!r}" if first in KEYS else "got another name"
        raise DataError(
            f"labels.csv: the first column must be named {task.key!r} (task.key of the recipe), {got}"
            + between_columns(first)
        )
    needed = (*(task.classes if task.kind == "multilabel" else ("label",)), *task.subgroups)
    missing = [name for name in needed if name not in header[1:]]
    if missing:
        raise DataError(f"labels.csv has no column {', '.join(map(repr, missing))}; {_advice(missing, header, task)}")
    twice = [name for name in needed if header.count(name) > 1]
    if twice:
        raise DataError(f"labels.csv has the column {twice[0]!r} more than once; keep one")


def _advice(missing: Sequence[str], header: Sequence[str], task: Task) -> str:
    """What to do about columns that are missing. Names of the recipe only: the table's own may be a patient's."""
    add = "add the column" if len(missing) == 1 else "add the columns"
    if not set(missing) <= set(task.subgroups):
        needs = "0 or 1 for each of task.classes" if task.kind == "multilabel" else "the name of the class in 'label'"
        return f"the recipe needs {needs}: {add}"
    there = ",".join(name for name in task.subgroups if name in header[1:])
    return f"the recipe has task.subgroups=[{','.join(task.subgroups)}]: {add}, or say task.subgroups=[{there}]"


def _target(cells: Sequence[str], row: int, task: Task) -> int | tuple[int, ...]:
    if task.kind == "multilabel":
        for name, cell in zip(task.classes, cells, strict=True):
            if cell not in ("0", "1"):
                raise DataError(f"labels.csv row {row}: column {name!r} must be 0 or 1")
        return tuple(int(cell) for cell in cells)
    if cells[0] in task.classes:
        return task.classes.index(cells[0])
    hint = "; it holds a number, write the class name instead" if cells[0].lstrip("+-").isdigit() else ""
    raise DataError(f"labels.csv row {row}: the label is not one of {', '.join(task.classes)}{hint}")
