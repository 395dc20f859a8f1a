"""A labelled DICOM folder becomes prepared samples in one memory-mapped file, which a second run opens as it is."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from common.cache import forget, images_folder, make_room, must_lie_beside, used
from common.config import Preprocessing, Task, as_plain
from common.errors import ConfigError, DataError
from common.labels import need_two_classes, read_labels
from common.shard import SECRET_BYTES, Form, Rows, Storage, check_half, open_text
from common.storage import locked, private_folder, storing

if TYPE_CHECKING:
    from common.imaging import Progress
    from common.imaging.index import Index

NOT_A_SAMPLE = (
    "no_label", "no_patient", "shared_patient", "wrong_dimensions", "other_modality", "not_preparable", "not_finite",
)  # fmt: skip
"""Why an image that was read is no sample; files that are no image have the codes of `common.imaging`."""
_MIN_KEY_BYTES = 16


@dataclass(frozen=True)
class Samples:
    """Prepared images or volumes with their labels, in an order that says nothing about names or paths."""

    x_N: npt.NDArray[np.float32]
    """(N, 1, *size), memory-mapped and read-only; encrypted or float16 samples are a `common.shard.Rows`, which is
    indexed like it and opens what is asked for."""
    targets_N: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """(N,) class index; multi-label: (N, classes) of 0 and 1, float32."""
    patient_N: npt.NDArray[np.int64]
    """(N,) index into `patients`."""
    patients: tuple[str, ...]
    """Pseudonyms, sorted."""
    subgroups: Mapping[str, tuple[str, ...]]
    """Column of `task.subgroups` -> one value a sample."""
    digest: str
    """SHA-256 over the bytes of `x_N` and of `targets_N`."""


@dataclass(frozen=True)
class Prepared:
    """What a folder gave."""

    samples: Samples
    refused: Mapping[str, int]
    """Reason code -> number of files that were not used."""
    corrected: Mapping[str, int] = field(default_factory=dict)
    """What was done to values beyond reading and preparing them -> number of samples."""


def prepare_folder(
    folder: Path,
    task: Task,
    data: Preprocessing,
    *,
    cache: Path,
    key: bytes,
    progress: Progress | None = None,
    index: Index | None = None,
    jobs: int | None = None,
    storage: Storage = "float32",
    secret: bytes | None = None,
) -> Prepared:
    """Reads, labels and prepares every image of a folder, or opens what an earlier call left in `cache`.

    Each series is prepared once: what an earlier call finished, whole or killed, is used again unless one of the
    series' files, the preprocessing, the key or the code that makes samples differs. The cache is patient data: mode
    0700.

    Args:
        folder: Holds labels.csv, and the DICOM files in `dicom/` or directly.
        task: Which classes, and which identifier labels.csv goes by.
        data: Declares the preprocessing; its augmentation plays no part here.
        cache: Folder of this site for prepared samples; must lie outside the images.
        key: Secret of the site, at least 16 bytes; makes the pseudonyms.
        progress: Told (steps done, steps in all); two steps a file.
        index: Of the DICOM files; None: the one that `fedicom data index` left in `cache`, or else none that is kept.
        jobs: Processes that read and prepare, each with one series in memory; None: one for each core where it is
            worth it.
        storage: float16 takes half the room and rounds to one of 2,048 grey levels or finer.
        secret: 32 bytes with which samples and labels are encrypted on disk; None: they are not. Plain ones of the
            same preprocessing, from before there was a secret, are removed.

    Returns:
        Samples sorted by keyed pseudonym, and the count of unused files by reason: the codes of
        `common.imaging` and those of `NOT_A_SAMPLE`.

    Raises:
        ConfigError: The key is short, the cache lies among the images, or float16 is not exact enough.
        DataError: No images, no labels, a label row without image, in conflict or of several patients, one class
            only.
        StorageError: The cache could not be written, is larger than its limit, or opens with another secret;
            nothing half-written is trusted.
    """
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(
            f"the site key has {len(key)} bytes, expected at least {_MIN_KEY_BYTES}; shorter keys can be guessed"
        )
    if secret is not None and len(secret) != SECRET_BYTES:
        raise ConfigError(f"the key of the cache has {len(secret)} bytes, expected {SECRET_BYTES}")
    if storage == "float16":
        check_half(data.mean, data.std)
    if not folder.is_dir():
        raise DataError("the data folder does not exist; expected a folder with labels.csv and DICOM files")
    images = images_folder(folder)
    must_lie_beside(cache, folder)
    if index is not None and index.root.resolve() != images.resolve():
        raise ConfigError("the index is of another folder than the images; index the folder that holds them")
    table_path = folder / "labels.csv"
    if not table_path.is_file():
        raise DataError(f"the folder has no labels.csv; expected one with the first column {task.key!r}")
    with storing("labels.csv"):
        table = table_path.read_bytes()

    form = Form((1, *data.size), storage, secret)
    wanted = json.dumps(settings_of(task, data), sort_keys=True).encode()
    place = private_folder(private_folder(cache) / _folder_name(wanted, form))
    with locked(place):
        before = _fingerprint(images, table_path, table, wanted, key)
        found = _open(place, before, task, form)
        if found is None:
            labels = read_labels(table, task)
            from common.filling import Preparation, index_of  # only now: what reads DICOM takes half a second to import

            with ExitStack() as stack:
                if index is None:
                    index = stack.enter_context(index_of(images, cache))
                with storing("the prepared samples"):
                    Preparation(index, table_path, labels, task, data, key, form, wanted, jobs).write(
                        place, before, progress
                    )
            if _fingerprint(images, table_path, table, wanted, key) != before:
                raise DataError("the images changed while they were read; wait until they are complete and run again")
            found = _open(place, before, task, form)
        used(place)
    assert found is not None, "what was just written can be read"
    if secret is not None:  # only now: until they are encrypted, a site without them would prepare anew
        forget(cache, (_folder_name(wanted, Form(form.shape, each)) for each in ("float32", "float16")))
    make_room(cache, keep=place)
    need_two_classes(_as_labels(found.samples), task, "the folder (images with their labels)")
    return found


def index_file(place: Path, form: Form) -> Path:
    return place / ("index.json" if form.secret is None else "index.sealed")


def read_index(place: Path, form: Form) -> dict[str, Any] | None:
    """What the last preparation wrote here; None if there is nothing whole.

    Raises:
        StorageError: It was encrypted with another secret.
    """
    try:
        data = index_file(place, form).read_bytes()
        found = json.loads(data if form.secret is None else open_text(data, form.secret))
        path = place / found["file"]
        return found if path.stat().st_size == found["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open(place: Path, fingerprint: str, task: Task, form: Form) -> Prepared | None:
    """The cache, where it is whole and was made of just this; None otherwise."""
    index = read_index(place, form)
    if index is None or index.get("fingerprint") != fingerprint:
        return None
    count = len(index["targets"])
    try:
        if form.secret is None and form.storage == "float32":
            x_N = np.load(place / index["file"], mmap_mode="r", allow_pickle=False)
            if x_N.dtype != np.float32 or x_N.shape != (count, *form.shape):
                return None
        else:
            # whatever is indexed gives float32 arrays, which is all that any reader does with it
            x_N = cast("npt.NDArray[np.float32]", Rows(place / index["file"], form, count))
    except (OSError, ValueError):
        return None
    patient_N = np.array(index["patient"], np.int64)
    patient_N.setflags(write=False)
    targets_N = targets_of(index["targets"], task)
    targets_N.setflags(write=False)
    samples = Samples(
        x_N=x_N,
        targets_N=targets_N,
        patient_N=patient_N,
        patients=tuple(index["patients"]),
        subgroups={name: tuple(values) for name, values in index["subgroups"].items()},
        digest=index["digest"],
    )
    return Prepared(samples, index["refused"], index["corrected"])


def targets_of(targets: Sequence[int | tuple[int, ...]], task: Task) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    if task.kind == "multilabel":
        return np.array(targets, np.float32)
    return np.array(targets, np.int64)


def _as_labels(samples: Samples) -> Iterator[int | tuple[int, ...]]:
    for target in samples.targets_N.tolist():
        yield tuple(map(int, target)) if isinstance(target, list) else int(target)


def settings_of(task: Task, data: Preprocessing) -> dict[str, Any]:
    """What of a recipe makes samples, and so a cohort, what they are."""
    plain = as_plain(data)
    del plain["augmentation"]  # drawn anew at every step of training
    return {"task": as_plain(task), "data": plain}


def _folder_name(wanted: bytes, form: Form) -> str:
    name = hashlib.sha256(wanted).hexdigest()[:16]
    return name + ("-half" if form.storage == "float16" else "") + ("" if form.secret is None else "-sealed")


def _fingerprint(images: Path, table_path: Path, table: bytes, wanted: bytes, key: bytes) -> str:
    """Keyed hash of all that decides the samples, from file names, sizes and times: no image is opened."""
    digest = hmac.new(key, digestmod="sha256")
    for part in (wanted, hashlib.sha256(table).digest(), maker().encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    labels_csv = os.path.relpath(table_path, images)
    with storing("the folder of images"):
        files = sorted(found for found in files_below(os.fspath(images)) if found[0] != labels_csv)
    digest.update(json.dumps(files).encode())
    return digest.hexdigest()


def files_below(root: str) -> Iterator[tuple[str, int, int]]:
    """(path, size, time) of every file below; what cannot be entered holds nothing that could be used."""
    folders = [(root, "")]
    while folders:
        folder, inside = folders.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{inside}{entry.name}/"))
                continue
            try:
                status = entry.stat()
                if stat.S_ISDIR(status.st_mode):
                    continue
            except OSError:  # a link that leads nowhere
                status = entry.stat(follow_symlinks=False)
            yield inside + entry.name, status.st_size, status.st_mtime_ns


@memoised
def maker() -> str:
    """The code that turns DICOM into samples; other code may give other pixels."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    own = [here / f"{name}.py" for name in ("samples", "filling", "preparing", "pseudonyms", "shard", "labels")]
    for path in sorted([*(here / "imaging").rglob("*.py"), *own]):
        digest.update(path.read_bytes())
    libraries = ("pydicom", "highdicom", "imagecodecs", "pillow", "nibabel", "numpy", "scipy")
    return " ".join([digest.hexdigest(), *(f"{name} {version(name)}" for name in libraries)])
