"""The quality report of a cohort: everything that is worth knowing before training, and that stays in the house."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from client.quality.agreement import WARN_BELOW, Agreement, agreement
from client.quality.hashes import near_pairs
from client.quality.survey import Picture, Survey, unit_pseudonym
from client.quality.suspects import Map, Suspects, find_suspects, make_map
from client.quality.table import Table
from client.quality.writing import MIN_LETTERS
from common.printable import number_of

FORMAT = 1
LOCAL_ONLY = "LOCAL ONLY: this report is patient data of the site. It never leaves the house; Fedicom sends none of it."
UNKNOWN = "unknown"
_MOST_LISTED = 200

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the verdict."""

    level: Level
    what: str
    do: str = ""


@dataclass(frozen=True, kw_only=True)
class Same:
    """Images whose decoded pixels are all equal."""

    images: tuple[str, ...]
    patients: tuple[str, ...]
    across_patients: bool
    across_splits: bool
    labels_differ: bool


@dataclass(frozen=True, kw_only=True)
class Near:
    """Two images that look nearly the same."""

    images: tuple[str, str]
    patients: tuple[str, str]
    bits: int
    """In which the perceptual hashes differ, of 128."""
    labels_differ: bool


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A label that the images speak against."""

    row: str
    """Pseudonym of what the label table calls it by."""
    patient: str
    given: str
    predicted: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class LabelSuspects:
    """Of one task; of a multi-label task, of one class after the other."""

    examined: int
    auroc: float | None
    why_not: tuple[str, ...]
    named: tuple[Suspect, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Plain values alone, so that it can be JSON; images and people appear as pseudonyms."""

    format: int = FORMAT
    notice: str = LOCAL_ONLY
    made: str
    """UTC, ISO 8601."""
    fingerprint: str
    """Of images and labels, keyed."""
    key: str
    """Which identifier the label table goes by."""
    classes: tuple[str, ...]
    files: int
    patients: int
    studies: int
    series: int
    images: int
    volumes: int
    unlabelled: int
    """Images and volumes without a label."""
    rows_without_image: int
    rows_of_several_patients: int
    """Rows of labels.csv with images of more than one patient: no cohort is made of them."""
    class_images: Mapping[str, int]
    class_patients: Mapping[str, int]
    """Patients with at least one image of the class."""
    histograms: Mapping[str, Mapping[str, int]]
    """Name -> value -> images and volumes."""
    missing_tags: Mapping[str, Mapping[str, int]]
    """Keyword -> `missing`, and `of` so many images that should have it."""
    refused: Mapping[str, int]
    duplicates: tuple[Same, ...]
    near_duplicates: tuple[Near, ...]
    """At most 200 are listed, those of different patients first."""
    near_duplicates_across_patients: int
    near_duplicates_within_patients: int
    blank: tuple[str, ...]
    text_suspects: tuple[tuple[str, str, int], ...]
    """(image, patient, letter-like marks on the fullest line)."""
    text_examined: int
    agreement: tuple[Agreement, ...]
    label_suspects: LabelSuspects
    splits: Mapping[str, int] | None
    """Patients of this folder by side of the frozen split; None before the first training."""
    findings: tuple[Finding, ...]
    objections: tuple[str, ...] | None = None
    """Of the site's gate; None where the site has none."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Points:
    """The map of the images, for the page alone."""

    map: Map
    classes: tuple[str, ...]
    """Of each point."""
    vendors: tuple[str, ...]
    dimensions: int


def make_report(
    found: Survey,
    table: Table,
    *,
    key: bytes,
    made: str,
    fingerprint: str,
    split: Mapping[str, str] | None = None,
) -> tuple[Report, Points | None]:
    """Everything about a surveyed folder.

    Args:
        table: Its labels.
        key: The site's secret.
        made: When, UTC, ISO 8601.
        fingerprint: Of `survey.fingerprint`.
        split: Patient pseudonym -> side, as frozen by the cohort; None: there is none yet.
    """
    pictures, task = found.pictures, table.task
    sides = split or {}
    duplicates = _duplicates(pictures, sides)
    near, across, within = _near(found)
    features_rows = _most_common_dimensions(pictures)
    suspects = _label_suspects(found, table, features_rows)
    agreements = _agreements(table, pictures, key)
    examined = [picture for picture in pictures if picture.letters is not None]
    text = sorted(
        ((p.name[:12], p.patient, p.letters or 0) for p in examined if (p.letters or 0) >= MIN_LETTERS),
        key=lambda each: (-each[2], each[0]),
    )
    class_images, class_patients = _by_class(pictures, task.classes)
    patients = {picture.patient for picture in pictures}
    patients_of_row: dict[str, set[str]] = {}
    for picture in pictures:
        if picture.target is not None:
            patients_of_row.setdefault(picture.unit, set()).add(picture.patient)
    report = Report(
        made=made,
        fingerprint=fingerprint,
        key=task.key,
        classes=task.classes,
        files=found.files,
        patients=len(patients),
        studies=len({picture.study for picture in pictures}),
        series=len({picture.series for picture in pictures}),
        images=sum(picture.dimensions == 2 for picture in pictures),
        volumes=sum(picture.dimensions == 3 for picture in pictures),
        unlabelled=sum(picture.target is None for picture in pictures),
        rows_without_image=found.rows_without_image,
        rows_of_several_patients=sum(len(found) > 1 for found in patients_of_row.values()),
        class_images=class_images,
        class_patients=class_patients,
        histograms=_histograms(pictures),
        missing_tags=_missing(pictures),
        refused=dict(found.refused),
        duplicates=duplicates,
        near_duplicates=tuple(near[:_MOST_LISTED]),
        near_duplicates_across_patients=across,
        near_duplicates_within_patients=within,
        blank=tuple(picture.name[:12] for picture in pictures if picture.blank),
        text_suspects=tuple(text),
        text_examined=len(examined),
        agreement=agreements,
        label_suspects=suspects,
        splits=None if split is None else _sides(patients, split),
        findings=(),
    )
    return _with_findings(report), _points(found, task.classes, features_rows)


def _points(found: Survey, classes: Sequence[str], features_rows: Sequence[int]) -> Points | None:
    drawn = make_map(
        np.stack([found.features[row] for row in features_rows]), [found.pictures[row].name for row in features_rows]
    )
    if drawn is None:
        return None
    shown = [found.pictures[features_rows[row]] for row in drawn.rows]
    return Points(
        map=drawn,
        classes=tuple(_shown_class(picture, classes) for picture in shown),
        vendors=tuple(picture.vendor for picture in shown),
        dimensions=shown[0].dimensions,
    )


def _by_class(pictures: Sequence[Picture], classes: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Images of each class, and patients with at least one."""
    patients: dict[str, set[str]] = {name: set() for name in classes}
    images = dict.fromkeys(classes, 0)
    for picture in pictures:
        for name in _classes_of(picture, classes):
            images[name] += 1
            patients[name].add(picture.patient)
    return images, {name: len(members) for name, members in patients.items()}


def _classes_of(picture: Picture, classes: Sequence[str]) -> tuple[str, ...]:
    if picture.target is None:
        return ()
    if isinstance(picture.target, int):
        return (classes[picture.target],)
    return tuple(name for name, has in zip(classes, picture.target, strict=True) if has)


def _shown_class(picture: Picture, classes: Sequence[str]) -> str:
    return "no label" if picture.target is None else " + ".join(_classes_of(picture, classes)) or "none"


def _most_common_dimensions(pictures: Sequence[Picture]) -> list[int]:
    """Rows of the images, or of the volumes, whichever are more: their features have one length."""
    flat = [row for row, picture in enumerate(pictures) if picture.dimensions == 2]
    deep = [row for row, picture in enumerate(pictures) if picture.dimensions == 3]
    return max(flat, deep, key=len)


def _histograms(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    def counted(values: Iterable[str], *, by_value: bool = False) -> dict[str, int]:
        counts = Counter(values)
        if by_value:
            return dict(sorted(counts.items(), key=lambda each: (each[0] == UNKNOWN, _leading(each[0]), each[0])))
        return dict(sorted(counts.items(), key=lambda each: (each[0] == UNKNOWN, -each[1], each[0])))

    def spacing(picture: Picture) -> str:
        return " × ".join(f"{step:.3g}" for step in picture.spacing_mm) or UNKNOWN

    facts = [picture.facts for picture in pictures]
    return {
        "modality": counted(picture.modality for picture in pictures),
        "vendor": counted(picture.vendor for picture in pictures),
        "model": counted(picture.model for picture in pictures),
        "kvp": counted((f"{each.kvp:g}" if each.kvp else UNKNOWN for each in facts), by_value=True),
        "spacing_mm": counted(map(spacing, pictures), by_value=True),
        "matrix": counted((" × ".join(map(str, p.size)) for p in pictures), by_value=True),
        "year": counted((str(each.studied.year) if each.studied else UNKNOWN for each in facts), by_value=True),
        "sex": counted(each.sex or UNKNOWN for each in facts),
        "age": counted((_decade(each.age_years) for each in facts), by_value=True),
        "burned_in_annotation": counted(each.burned_in for each in facts),
    }


def _leading(text: str) -> float:
    head = text.split(" ")[0].split("-")[0].rstrip("+")
    try:
        return float(head)
    except ValueError:
        return 0.0


def _decade(years: float | None) -> str:
    if years is None:
        return UNKNOWN
    # the oldest are few, and few enough to be known by their age
    first = int(years) // 10 * 10
    return "90+" if first >= 90 else f"{first}-{first + 9}"


def _missing(pictures: Sequence[Picture]) -> dict[str, dict[str, int]]:
    of: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for picture in pictures:
        of.update(picture.facts.expected)
        missing.update(picture.facts.missing)
    return {keyword: {"missing": missing[keyword], "of": of[keyword]} for keyword in of}


def _duplicates(pictures: Sequence[Picture], sides: Mapping[str, str]) -> tuple[Same, ...]:
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if not picture.blank:
            groups[picture.digest].append(picture)
    found = []
    for group in groups.values():
        if len(group) < 2:
            continue
        patients = tuple(sorted({picture.patient for picture in group}))
        found.append(
            Same(
                images=tuple(picture.name[:12] for picture in group),
                patients=patients,
                across_patients=len(patients) > 1,
                across_splits=len({sides[patient] for patient in patients if patient in sides}) > 1,
                labels_differ=len({picture.target for picture in group if picture.target is not None}) > 1,
            )
        )
    return tuple(sorted(found, key=lambda each: (not each.across_patients, -len(each.images), each.images)))


def _near(found: Survey) -> tuple[list[Near], int, int]:
    """Pairs that are not equal, those of different patients first, and how many there are of each kind."""
    pictures = found.pictures
    pairs, across, within = [], 0, 0
    seen: set[tuple[str, str]] = set()
    for dimensions in (2, 3):
        rows = [row for row, picture in enumerate(pictures) if picture.dimensions == dimensions and not picture.blank]
        if len(rows) < 2:
            continue
        pairs_M2, bits_M = near_pairs(found.hashes_N2[rows])
        for (one, other), bits in zip(pairs_M2.tolist(), bits_M.tolist(), strict=True):
            a, b = pictures[rows[one]], pictures[rows[other]]
            if a.digest == b.digest:
                continue
            kinds = min(a.digest, b.digest), max(a.digest, b.digest)
            if kinds in seen:  # copies of a pair that is listed
                continue
            seen.add(kinds)
            differ = a.target is not None and b.target is not None and a.target != b.target
            across += a.patient != b.patient
            within += a.patient == b.patient
            pairs.append(
                Near(
                    images=(a.name[:12], b.name[:12]), patients=(a.patient, b.patient), bits=bits, labels_differ=differ
                )
            )
    pairs.sort(key=lambda each: (each.patients[0] == each.patients[1], each.bits, each.images))
    return pairs, across, within


def _label_suspects(found: Survey, table: Table, rows: Sequence[int]) -> LabelSuspects:
    pictures, task = found.pictures, table.task
    chosen = [row for row in rows if pictures[row].target is not None]
    if not chosen:
        return LabelSuspects(examined=0, auroc=None, why_not=("no image has a label",), named=())
    x_NF = np.stack([found.features[row] for row in chosen])
    units, unit_N = np.unique([pictures[row].unit for row in chosen], return_inverse=True)
    _, patient_N = np.unique([pictures[row].patient for row in chosen], return_inverse=True)
    patient_of = {pictures[row].unit: pictures[row].patient for row in chosen}

    def named(result: Suspects, given: Mapping[str, str], classes: Sequence[str]) -> list[Suspect]:
        return [
            Suspect(
                row=str(units[unit]), patient=patient_of[str(units[unit])], given=given[str(units[unit])],
                predicted=classes[to], probability=round(probability, 3),
            )
            for unit, to, probability in result.named
        ]  # fmt: skip

    if task.kind != "multilabel":
        target_N = np.array([pictures[row].target for row in chosen], np.int64)
        result = find_suspects(x_NF, target_N, unit_N, patient_N, len(task.classes))
        given = {pictures[row].unit: task.classes[int(target)] for row, target in zip(chosen, target_N, strict=True)}
        return LabelSuspects(
            examined=result.examined,
            auroc=result.auroc,
            why_not=(result.why_not,) if result.why_not else (),
            named=tuple(named(result, given, task.classes)),
        )
    every: list[Suspect] = []
    why: list[str] = []
    aurocs: list[float] = []
    for at, name in enumerate(task.classes):
        targets = [pictures[row].target for row in chosen]
        has_N = np.array([target[at] for target in targets if isinstance(target, tuple)], np.int64)
        result = find_suspects(x_NF, has_N, unit_N, patient_N, 2)
        sides = (f"no {name}", name)
        given = {pictures[row].unit: sides[int(has)] for row, has in zip(chosen, has_N, strict=True)}
        every += named(result, given, sides)
        why += [f"{name}: {result.why_not}"] * bool(result.why_not)
        aurocs += [result.auroc] if result.auroc is not None else []
    return LabelSuspects(
        examined=len(units) * len(task.classes),
        auroc=float(np.mean(aurocs)) if aurocs else None,
        why_not=tuple(why),
        named=tuple(sorted(every, key=lambda each: -each.probability)),
    )


def _agreements(table: Table, pictures: Sequence[Picture], key: bytes) -> tuple[Agreement, ...]:
    patient_of = {picture.unit: picture.patient for picture in pictures}
    found = []
    for one, other in combinations(table.annotators, 2):
        both = sorted(table.annotators[one].keys() & table.annotators[other].keys())
        if both:
            units = [unit_pseudonym(key, identifier) for identifier in both]
            found.append(
                agreement(
                    (one, other),
                    [table.annotators[one][each] for each in both],
                    [table.annotators[other][each] for each in both],
                    [patient_of.get(unit, unit) for unit in units],
                    table.task.classes,
                )
            )
    return tuple(found)


def _sides(patients: Iterable[str], split: Mapping[str, str]) -> dict[str, int]:
    return dict(sorted(Counter(split.get(patient, "not yet in the split") for patient in patients).items()))


def _with_findings(report: Report) -> Report:
    found: list[Finding] = []

    def say(level: Level, holds: int | bool, what: str, do: str = "") -> None:
        if holds:
            found.append(Finding(level=level, what=what, do=do))

    def count(level: Level, many: int, noun: str, what: str, do: str = "") -> None:
        say(level, many, f"{number_of(many, noun)} {what}", do)

    groups = report.duplicates
    count(
        "error", sum(group.across_patients for group in groups), "image",
        "under more than one patient, equal pixel by pixel",
        "find out whose they are, and remove the others: the same image in training and test makes results too good",
    )  # fmt: skip
    across = sum(group.across_splits for group in groups)
    count("error", across, "image", "on different sides of the split, equal pixel by pixel")
    conflict = sum(group.labels_differ for group in groups)
    count("error", conflict, "image", "with copies that have another label", "keep the right label")
    count(
        "error", report.rows_of_several_patients, "row", "of labels.csv with images of more than one patient",
        "label by patient or series, or correct the images",
    )  # fmt: skip
    nothing = report.unlabelled == report.images + report.volumes
    say(
        "error", nothing, f"no row of labels.csv has the {report.key} of an image: there is nothing to train on",
        f"look whether its first column holds what the images have as {report.key}, and just so: zeros in front, which "
        "spreadsheets drop, count",
    )  # fmt: skip
    for each in report.agreement:
        value = each.kappa.value
        if value is None:
            say("warning", True, f"{' and '.join(each.annotators)}: kappa is not defined, both used one class alone")
        elif value < WARN_BELOW:
            say(
                "warning", True, f"{' and '.join(each.annotators)} agree with kappa {value:.2f}, below {WARN_BELOW}",
                "settle the cases on which they differ, or write down what the classes mean",
            )  # fmt: skip
    own = sum(not group.across_patients for group in groups)
    count("warning", own, "image", "of one patient stored more than once", "keep one of each")
    near = report.near_duplicates_across_patients
    count("warning", near, "pair", "of nearly equal images of different patients", "look at them")
    text = len(report.text_suspects)
    count("warning", text, "image", "with what looks like burned-in text", "look at them; it may be a name")
    count("warning", len(report.blank), "image", "with one grey value only", "remove them")
    count("warning", report.unlabelled, "image", "without a label, not used")
    count(
        "warning", report.rows_without_image, "row", "of labels.csv without image",
        "add the images, or remove the rows: nothing is trained on a table with rows of which no file has the image",
    )  # fmt: skip
    refused = sum(report.refused.values())
    count("warning", refused, "file", "that cannot be used", "the reasons are counted below")
    rare = [name for name, patients in report.class_patients.items() if patients < 2 * 5]
    say("warning", len(rare), f"fewer than 10 patients of: {', '.join(rare)}", "a rare class is hardly learned")
    lacking = [name for name, about in report.missing_tags.items() if 2 * about["missing"] > about["of"]]
    say("note", len(lacking), f"missing in most images: {', '.join(lacking)}")
    named = len(report.label_suspects.named)
    count("note", named, "label", "that the images speak against", "look at them, the first ones first")
    within = report.near_duplicates_within_patients
    count("note", within, "pair", "of nearly equal images of the same patient")
    return replace(report, findings=tuple(found))
