"""Virtual hospitals out of public data: MedMNIST files, folders of pictures, NIfTI volumes.

    OUT/<site>/dicom/**.dcm      images of one hospital
    OUT/<site>/labels.csv        first column: the key (patient or accession); then `label`, or one 0/1 column a class;
                                 then subgroup columns
    OUT/central/                 the coordinator's test set, which no hospital holds
    OUT/hospitals.json           what made it, and counts

A folder is written under a temporary name beside OUT and renamed when complete; what a kill left of one goes the next
time.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, DataError, StorageError
from common.storage import held_alone, storing
from simulations.dicom_writer import Machine, Modality, Subject, axial, quantise, write_image, write_series
from simulations.partition import CENTRAL as CENTRAL
from simulations.partition import Partition

Progress = Callable[[int, int], None]
Key = Literal["patient", "accession"]

_NAMES = ("north", "south", "east", "west")


def site_names(sites: int) -> tuple[str, ...]:
    """Names of that many hospitals, always the same: north, south, east, west, site05, site06, ..."""
    return (_NAMES + tuple(f"site{number:02d}" for number in range(5, sites + 1)))[:sites]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image or volume on its way into a hospital."""

    patient: str
    labels: tuple[str, ...]
    """One class name, or for multi-label data "0" or "1" for each class."""
    columns: Mapping[str, str]
    write: Callable[[Path, Subject], None]
    """Writes it into a folder as this subject's study."""


def import_medmnist(
    npz: Path,
    out: Path,
    sites: int,
    partition: Partition,
    *,
    modality: Modality | None = None,
    dimensions: Literal[2, 3] | None = None,
    classes: Sequence[str] | None = None,
    spacing_mm: float | None = None,
    progress: Progress | None = None,
) -> None:
    """Makes hospitals of a MedMNIST file: its train and val splits go to them, its test split to `central/`.

    MedMNIST has no patients: every image becomes one, named by split and row (`TRAIN00012`).

    Args:
        modality, dimensions, classes, spacing_mm: Known for Pneumonia-, Breast- and AdrenalMNIST. `classes` in the
            order of the numbers in the file (several columns: multi-label); for 3D, `spacing_mm` is 1 if unknown.

    Raises:
        ConfigError: `out` holds something else, or the arguments do not fit the file.
        DataError: It is no MedMNIST file, or its patients cannot fill the sites.

    Source: Yang et al. 2023, MedMNIST v2.
    """
    known = _MEDMNIST.get(npz.stem.split("_")[0], {})
    modality, names = modality or known.get("modality"), tuple(classes or known.get("classes", ()))
    splits = _read_medmnist(npz)
    shape = splits["train"][0].shape[1:]
    if spacing_mm is None and "edge_mm" in known:
        spacing_mm = known["edge_mm"] / shape[0]
    if modality is None or not names:
        raise ConfigError(f"{npz.name} is not a known data set; give modality and classes")
    if len(shape) not in (2, 3) or dimensions not in (None, len(shape)) or (len(shape) == 3 and shape[2] == 3):
        raise ConfigError(
            f"{npz.name} has images of shape {'x'.join(map(str, shape))}; expected {dimensions or '2 or 3'} axes "
            "in gray values; colour is not supported"
        )
    machine = _machine(modality, len(shape), bits=8)
    step = spacing_mm or 1.0

    def items(split: str) -> list[Item]:
        images, rows = splits[split]
        made = []
        for index, (image, row) in enumerate(zip(images, rows, strict=True)):

            def write(folder: Path, subject: Subject, image: npt.NDArray[np.uint8] = image) -> None:
                if image.ndim == 2:
                    pair = (step, step) if spacing_mm else None
                    write_image(folder / "1.dcm", image, machine, subject, spacing_mm=pair)
                else:
                    write_series(
                        folder, image.astype(np.int16), axial(image.shape, (step, step, step)), machine, subject
                    )

            labels = tuple(map(str, row)) if len(row) > 1 else (names[int(row[0])],)
            made.append(Item(patient=f"{split.upper()}{index:05d}", labels=labels, columns={}, write=write))
        return made

    highest = max(int(rows.max(initial=0)) for _, rows in splits.values())
    columns = splits["train"][1].shape[1]
    if (columns > 1 and columns != len(names)) or (columns == 1 and highest >= len(names)):
        raise ConfigError(f"classes: got {len(names)} names; {npz.name} has {columns if columns > 1 else highest + 1}")
    source = {
        "kind": "medmnist", "sha256": _sha256(npz), "sites": sites, "modality": modality,
        "classes": list(names), "spacing_mm": spacing_mm, "partition": _describe(partition),
    }  # fmt: skip
    with hospitals_folder(out, source) as writer:
        if writer is not None:
            writer.fill(
                items("train") + items("val"), items("test"), sites, partition, progress=progress,
                classes=names, multilabel=columns > 1, key="patient", made_from="MedMNIST, public, no identifiers",
            )  # fmt: skip


def import_images(
    folder: Path,
    out: Path,
    sites: int,
    partition: Partition,
    *,
    patient: str | None = None,
    modality: Literal["CR", "DX", "US"] = "CR",
    classes: Sequence[str] | None = None,
    spacing_mm: float | None = None,
    key: Key = "patient",
    central_fraction: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mapping[str, int]:
    """Makes hospitals of a folder of PNG and JPEG files, one subfolder for each class.

    Args:
        patient: Regular expression for the start of the file name, without its ending; group `patient` is the
            patient, every other named group becomes a column of the label table; null: every picture is a patient.
        classes: Subfolders in the order of the classes; null: all, by name.
        key: `patient`: all images of a patient have one label; `accession`: each image has its own.
        central_fraction: Share of the patients, of every class, that no hospital gets.

    Returns:
        What lies in the subfolders and was left out: kind -> how many. Names that begin with a dot do not count.

    Raises:
        ConfigError: `out` holds something else, or the pattern does not fit.
        DataError: A class without images, an unreadable one, patients with more than one label under key `patient`,
            or without a pattern two pictures of one name.
    """
    named, patient = patient is not None, patient or r"(?P<patient>.+)"
    from PIL import Image, ImageOps, UnidentifiedImageError

    folder, made = folder.absolute(), out.resolve()  # what an earlier import made inside of it is no class
    lying = _visible(folder) if folder.is_dir() else []
    names = tuple(classes or (path.name for path in lying if path.is_dir() and path.resolve() != made))
    if len(names) < 2:
        raise DataError(f"{folder.name}: got {len(names)} subfolders; expected one for each of at least 2 classes")
    try:
        pattern = re.compile(patient)
    except re.error as error:
        raise ConfigError(f"patient: got {patient!r}, which is no regular expression ({error})") from None
    if "patient" not in pattern.groupindex:
        raise ConfigError(f"patient: got {patient!r}; expected a regular expression with a group (?P<patient>...)")
    machine = _machine(modality, 2, bits=8)

    def item(file: Path, label: str) -> Item:
        def write(target: Path, subject: Subject) -> None:
            try:
                with Image.open(file) as stored:
                    picture = ImageOps.exif_transpose(stored)  # upright, as every viewer shows it
                    deep = picture.mode.startswith("I;16")
                    values = np.asarray(picture if deep else picture.convert("L"))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
                raise DataError(f"a file of class {label!r} is no readable PNG or JPEG; remove or repair it") from None
            used = _machine(modality, 2, bits=16) if deep else machine
            pair = (spacing_mm, spacing_mm) if spacing_mm else None
            pixels = values.astype(np.uint16) if deep else values.astype(np.uint8)
            write_image(target / "1.dcm", pixels, used, subject, spacing_mm=pair)

        match = pattern.match(file.stem)
        if match is None:
            raise ConfigError(f"patient: {patient!r} does not fit every file name of class {label!r}")
        found = {name: value or "" for name, value in match.groupdict().items()}
        return Item(patient=found.pop("patient").strip(), labels=(label,), columns=found, write=write)

    items, digest, left = [], hashlib.sha256(), Counter[str]()
    for label in names:
        inside = _visible(folder / label) if (folder / label).is_dir() else []
        files = [path for path in inside if path.suffix.lower() in _PICTURES and not path.is_dir()]
        other = [path for path in inside if path.is_dir() or path.suffix.lower() not in _PICTURES]
        left.update("folder" if path.is_dir() else f"{path.suffix.lower()[:8]} file".strip() for path in other)
        if not files:  # a class that was typed wrongly would be missing without a word
            raise DataError(
                f"{folder.name}: no PNG or JPEG file in a subfolder {label!r}; put some there, or name the classes "
                "(--classes) as their subfolders are written"
            )
        for file in files:
            items.append(item(file, label))
            digest.update(f"{label}/{file.name}/{file.stat().st_size}\n".encode())
    if not named and len({item.patient for item in items}) < len(items):  # strangers would become one patient
        raise DataError(
            f"{folder.name}: two pictures have the same name (without its ending), and without --patient-pattern every "
            "picture is a patient by its name; rename one of them, or give the pattern where they are of one patient"
        )
    source = {
        "kind": "images", "files": digest.hexdigest(), "sites": sites, "classes": list(names), "patient": patient,
        "modality": modality, "spacing_mm": spacing_mm, "key": key, "central_fraction": central_fraction,
        "seed": seed, "partition": _describe(partition),
    }  # fmt: skip
    with hospitals_folder(out, source) as writer:
        if writer is not None:
            ours, central = _hold_out(items, central_fraction, seed)
            writer.fill(ours, central, sites, partition, progress=progress, classes=names, key=key)
    return left


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def import_nifti(
    folder: Path,
    table: Path,
    out: Path,
    sites: int,
    partition: Partition,
    *,
    id_column: str,
    label_column: str,
    classes: Sequence[str],
    columns: Sequence[str] = (),
    modality: Literal["CT", "MR"] = "MR",
    central_fraction: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Makes hospitals of NIfTI volumes and a CSV table with a row for each.

    The volume of id X is `X.nii.gz` or `X.nii`. Geometry is kept (NIfTI RAS becomes DICOM LPS); values are kept
    exactly where they are 16-bit integers, else with a rescale slope of their own.

    Args:
        label_column: Holds class names, or their numbers in `classes`.
        columns: Further columns of the table for labels.csv, for subgroups or partition by column.

    Raises:
        ConfigError: `out` holds something else, or a column is missing.
        DataError: A volume is missing or not 3D, a label is none of `classes`, or two rows of a volume contradict.
    """
    import nibabel

    rows = _one_each(_read_table(table, (id_column, label_column, *columns)), id_column, table)
    machine = _machine(modality, 3, bits=16)

    def item(row: Mapping[str, str], file: Path) -> Item:
        def write(target: Path, subject: Subject) -> None:
            try:
                volume: Any = nibabel.load(file)
                values = np.asanyarray(volume.dataobj)
            except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
                raise DataError("a volume of the table is no readable NIfTI file; repair it") from None
            if values.ndim != 3:
                raise DataError(f"a volume of the table has {values.ndim} axes; expected 3")
            if values.dtype.kind not in "iuf":
                raise DataError("a volume of the table holds colours or complex numbers; expected one number a voxel")
            stored, slope, intercept = quantise(values.T)
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
            write_series(target, stored, affine, machine, subject, slope=slope, intercept=intercept)

        label = row[label_column]
        if label not in classes and label.isdecimal() and int(label) < len(classes):
            label = classes[int(label)]
        if label not in classes:
            raise DataError(f"column {label_column!r}: a label is none of {', '.join(classes)}, nor its number")
        extra = {name: row[name] for name in columns}
        return Item(patient=row[id_column], labels=(label,), columns=extra, write=write)

    items, digest = [], hashlib.sha256(table.read_bytes())
    for row in rows:
        found = [path for ending in (".nii.gz", ".nii") if (path := folder / (row[id_column] + ending)).is_file()]
        if not found:
            raise DataError(f"{table.name} has a row without its volume .nii.gz or .nii in {folder.name}")
        items.append(item(row, found[0]))
        digest.update(f"{found[0].name}/{found[0].stat().st_size}\n".encode())
    source = {
        "kind": "nifti", "files": digest.hexdigest(), "sites": sites, "classes": list(classes), "id": id_column,
        "label": label_column, "columns": list(columns), "modality": modality, "central_fraction": central_fraction,
        "seed": seed, "partition": _describe(partition),
    }  # fmt: skip
    with hospitals_folder(out, source) as writer:
        if writer is not None:
            ours, central = _hold_out(items, central_fraction, seed)
            writer.fill(ours, central, sites, partition, progress=progress, classes=classes, key="patient")


class Writer:
    """Fills a folder of hospitals that is not yet under its name."""

    def __init__(self, root: Path, source: Mapping[str, Any]) -> None:
        self.root = root
        self.summary: dict[str, dict[str, Any]] = {}
        # Of the source, so that two federations of the same data do not share UIDs.
        self._entropy = ("fedicom hospitals", json.dumps(source, sort_keys=True))

    def subject(self, patient: str, study: int, **more: Any) -> Subject:
        return Subject(patient_id=patient, study=study, entropy=self._entropy, **more)

    def folder(self, site: str, subject: Subject, number: int) -> Path:
        """Where a study is written: counted, as a source's patient id need not be a file name."""
        return self.root / site / "dicom" / f"{number:05d}" / f"{subject.study}"

    def labels(self, site: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Writes labels.csv of a site and notes its counts."""
        with (self.root / site / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(header)
            table.writerows(rows)
        counts: dict[str, Any] = {"rows": len(rows)}
        if "label" in header:
            counts["labels"] = dict(sorted(Counter(row[header.index("label")] for row in rows).items()))
        self.summary[site] = counts

    def fill(
        self,
        items: Sequence[Item],
        central: Sequence[Item],
        sites: int,
        partition: Partition,
        *,
        classes: Sequence[str],
        key: Key,
        multilabel: bool = False,
        made_from: str = "public research data, de-identified by its source",
        progress: Progress | None = None,
    ) -> None:
        """Deals the patients of `items` out to hospitals and writes everything."""
        patients = _by_patient(items)
        labels = ["|".join(sorted({" ".join(item.labels) for item in group})) for group in patients.values()]
        names = sorted({name for item in items for name in item.columns})
        columns = {name: [_joined(group, name) for group in patients.values()] for name in names}
        if not all(_PATIENT_ID.fullmatch(item.patient) for item in (*items, *central)):
            raise DataError("a patient id is no DICOM text: expected 1 to 64 printable characters without backslash")
        site_P = partition.assign(labels, columns, sites)
        groups = list(patients.items())
        plan = {name: [groups[p] for p in np.flatnonzero(site_P == k)] for k, name in enumerate(site_names(sites))}
        if central:
            plan[CENTRAL] = list(_by_patient(central).items())
        header = [key, *(classes if multilabel else ("label",)), *names]
        done, total = 0, len(items) + len(central)
        for site, members in plan.items():
            rows = []
            for number, (patient, group) in enumerate(members, start=1):
                if key == "patient" and len({item.labels for item in group}) > 1:
                    raise DataError(
                        "a patient has images with different labels; give each image its own with --key accession, "
                        "and say task.key=accession in the recipe"
                    )
                if key == "patient":
                    rows.append([patient, *group[0].labels, *(_joined(group, name) for name in names)])
                for study, item in enumerate(group, start=1):
                    subject = self.subject(patient, study, made_from=made_from, body_part="")
                    item.write(self.folder(site, subject, number), subject)
                    if key == "accession":
                        rows.append([subject.accession, *item.labels, *(item.columns[name] for name in names)])
                    done += 1
                    if progress is not None:
                        progress(done, total)
            self.labels(site, header, rows)
            self.summary[site] |= {"patients": len(members), "images": sum(len(group) for _, group in members)}


@contextmanager
def hospitals_folder(out: Path, source: Mapping[str, Any]) -> Iterator[Writer | None]:
    """Gives a writer whose folder becomes `out` when all went well; None: `out` already holds exactly this.

    Raises:
        ConfigError: `out` holds something else, or nothing can take its place.
        StorageError: The disk is full or not writable.
    """
    source = {"format": 1, **source}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        present = source_of(out)
        if present != json.loads(json.dumps(source)):
            raise ConfigError(
                f"{out} holds other {'hospitals' if present else 'files'}; nothing was written; choose another folder"
            )
        yield None
        return
    if out.exists() or out.is_symlink():
        try:
            out.rmdir()  # now: what is linked, mounted or stood in would be found when everything is written
        except OSError:
            raise ConfigError(
                f"{out} is a link, a mounted disk or the folder you are in, which a finished folder cannot replace; "
                "nothing was written; give a new name"
            ) from None
    with storing("the folder of the hospitals"):
        out.parent.mkdir(parents=True, exist_ok=True)
        for cut_off in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            with suppress(StorageError), _held(cut_off):  # not held: its process was killed
                shutil.rmtree(cut_off)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    with _held(partial):
        yield from _filled(partial, out, source)


def _held(partial: Path) -> AbstractContextManager[int]:
    said = f"{partial.name} is being written by another process; wait for its end"
    return held_alone(partial / _LOCK, "the folder of the hospitals", lambda: StorageError(said))


def _filled(partial: Path, out: Path, source: Mapping[str, Any]) -> Iterator[Writer]:
    try:
        writer = Writer(partial, source)
        with storing("the hospitals"):
            yield writer
            text = json.dumps({"source": source, "sites": writer.summary}, indent=1, sort_keys=True, ensure_ascii=False)
            (partial / "hospitals.json").write_text(text + "\n", encoding="utf-8")
            (partial / _LOCK).unlink()
            partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def source_of(folder: Path) -> Any:
    """What `hospitals_folder` made it of; None where it did not."""
    try:
        return json.loads((folder / "hospitals.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


_LOCK = ".lock"
_PATIENT_ID = re.compile(r"[^\\\x00-\x1f\x7f]{1,64}")  # VR LO
_PICTURES = (".png", ".jpg", ".jpeg")
_MEDMNIST: dict[str, dict[str, Any]] = {
    "pneumoniamnist": {"modality": "CR", "classes": ("normal", "pneumonia")},
    "breastmnist": {"modality": "US", "classes": ("malignant", "normal or benign")},
    # The paper crops 64 mm around the gland, to 28 voxels or, in MedMNIST+, to 64.
    "adrenalmnist3d": {"modality": "CT", "classes": ("normal", "hyperplasia"), "edge_mm": 64},
}


def _read_medmnist(npz: Path) -> dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    try:
        with np.load(npz, allow_pickle=False) as file:
            read = {
                split: (file[f"{split}_images"], np.atleast_2d(file[f"{split}_labels"].T).T)
                for split in ("train", "val", "test")
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise DataError(
            f"{npz.name} is not a MedMNIST file; expected an .npz with images and labels of train, val and test"
        ) from None
    if any(len(images) != len(labels) or images.dtype != np.uint8 for images, labels in read.values()):
        raise DataError(f"{npz.name}: expected as many labels as images, and images of 8-bit values")
    return {split: (images, labels.astype(np.int64)) for split, (images, labels) in read.items()}


def _read_table(table: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError(f"{table.name} is no readable CSV file in UTF-8") from None
    missing = [name for name in needed if not rows or rows[0].get(name) is None]
    if missing:
        raise ConfigError(f"{table.name}: no rows, or no column {', '.join(map(repr, missing))}")
    return [{name: (row[name] or "").strip() for name in needed} for row in rows]


def _one_each(rows: Sequence[dict[str, str]], id_column: str, table: Path) -> list[dict[str, str]]:
    """A row for each volume: one that is repeated counts once, as in labels.csv."""
    first: dict[str, tuple[int, dict[str, str]]] = {}
    for number, row in enumerate(rows, start=2):
        earlier, known = first.setdefault(row[id_column], (number, row))
        if known != row:
            raise DataError(
                f"{table.name} row {number}: the same {id_column!r} as row {earlier} with other values; keep the right "
                "one"
            )
    return [row for _, row in first.values()]


def _machine(modality: Modality, dimensions: int, *, bits: int) -> Machine:
    if (modality in ("CT", "MR")) != (dimensions == 3):
        raise ConfigError(
            f"modality: got {modality} for {dimensions}D data; expected CR, DX or US in 2D, CT or MR in 3D"
        )
    return Machine(modality=modality, bits_stored=bits, original=False, model="Imported")


def _describe(partition: Partition) -> dict[str, Any]:
    return {"name": type(partition).__name__, **asdict(partition)}  # type: ignore[call-overload]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _by_patient(items: Sequence[Item]) -> dict[str, list[Item]]:
    patients: dict[str, list[Item]] = {}
    for item in items:
        patients.setdefault(item.patient, []).append(item)
    return patients


def _joined(group: Sequence[Item], name: str) -> str:
    """A column's value for a patient; different values of its images are joined."""
    return "+".join(sorted({item.columns[name] for item in group}))


def _hold_out(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Splits by patient, every class alike."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"central_fraction: got {fraction}; expected a share from 0 to below 1")
    rng = np.random.default_rng(seed)
    members: dict[str, list[str]] = {}
    for patient, group in _by_patient(items).items():
        members.setdefault("|".join(sorted({" ".join(item.labels) for item in group})), []).append(patient)
    held: set[str] = set()
    for _, names in sorted(members.items()):
        held.update(names[i] for i in rng.permutation(len(names))[: round(fraction * len(names))])
    return [i for i in items if i.patient not in held], [i for i in items if i.patient in held]
