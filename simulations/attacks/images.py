"""Pictures to attack: phantoms, a MedMNIST file, or the DICOM files of virtual hospitals."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.config import Preprocessing, Task
from common.errors import DataError
from simulations.hospitals import CENTRAL

SIZE = 28
MEAN, STD = 0.5, 0.25
_KEY = b"the attacker's study; no secret."
"""Orders the patients, the same way every time."""

Pictures = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled pictures in [0, 1], (N, rows, columns), one a patient."""

    name: str
    train_N: Pictures
    label_N: Labels
    test_N: Pictures
    test_label_N: Labels


def images_of(path: Path) -> Images:
    """Those of a MedMNIST file, or of a folder that `fedicom hospitals` made.

    Raises:
        DataError: It is neither, has not two classes, or its images cannot be used.
    """
    return hospitals(path) if path.is_dir() else medmnist(path)


def medmnist(path: Path) -> Images:
    """Raises DataError when the file is not of MedMNIST's layout with two classes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, KeyError, ValueError):
        raise DataError(f"{path.name} is no MedMNIST file; expected .npz with train_images, train_labels ...") from None
    train, test = (parts[f"{kind}_images"].astype(np.float32) / np.float32(255) for kind in ("train", "test"))
    if train.ndim != 3 or train.shape[1:] != (SIZE, SIZE) or set(np.unique(parts["train_labels"])) != {0, 1}:
        raise DataError(f"{path.name}: expected grey pictures of {SIZE} x {SIZE} with two classes")
    labels, test_labels = (parts[f"{kind}_labels"][:, 0].astype(np.int64) for kind in ("train", "test"))
    return Images(name=path.stem, train_N=train, label_N=labels, test_N=test, test_label_N=test_labels)


def hospitals(folder: Path) -> Images:
    """The first image of every patient of all sites, through the DICOM code that sites run; the test is `central/`.

    Raises:
        DataError: There is no site or no `central/`, the labels have not two classes, or no image can be used.
    """
    places = sorted(path.parent for path in folder.glob("*/labels.csv"))
    sites, central = [place for place in places if place.name != CENTRAL], folder / CENTRAL
    if not sites or central not in places:
        raise DataError(f"{folder} holds no hospitals; expected site folders and {CENTRAL}/, as of `fedicom hospitals`")
    classes = tuple(sorted({name for place in places for name in _labels(place)}))
    if len(classes) != 2:
        raise DataError(f"{folder.name}: the attacks are on two classes, the label tables have {len(classes)}")
    picture_N, label_N = _prepared(sites, classes)
    test_N, test_label_N = _prepared([central], classes)
    return Images(name=folder.name, train_N=picture_N, label_N=label_N, test_N=test_N, test_label_N=test_label_N)


def phantoms(train: int = 1600, test: int = 400, seed: int = 0) -> Images:
    """Radiograph-like phantoms, drawn in memory."""
    from simulations.phantoms import pictures

    picture_N, label_N = pictures(train + test, SIZE, seed)
    return Images(
        name="phantoms", train_N=picture_N[:train], label_N=label_N[:train], test_N=picture_N[train:],
        test_label_N=label_N[train:],
    )  # fmt: skip


def _labels(place: Path) -> Iterator[str]:
    with (place / "labels.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if "label" not in (rows.fieldnames or ()):
            raise DataError(f"{place.name}: labels.csv has no column `label`; the attacks are on two classes")
        yield from (row["label"].strip() for row in rows)


def _prepared(places: Sequence[Path], classes: tuple[str, ...]) -> tuple[Pictures, Labels]:
    from common.samples import prepare_folder

    pictures, labels = [], []
    for place in places:
        with tempfile.TemporaryDirectory() as cache:
            found = prepare_folder(
                place, Task(classes=classes), Preprocessing(size=(SIZE, SIZE)), cache=Path(cache), key=_KEY, jobs=1
            ).samples  # fmt: skip
            first = np.unique(found.patient_N, return_index=True)[1]
            pictures.append(np.array(found.x_N[first, 0], np.float32))
            labels.append(found.targets_N[first].astype(np.int64))
    return np.clip(np.concatenate(pictures), 0, 1), np.concatenate(labels)
