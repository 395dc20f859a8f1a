"""A hospital's patients: prepared samples, and a split by patient that is decided once."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from client.versions import record, seal
from common.config import Evaluation, Recipe, Task
from common.deployment import SiteHome
from common.errors import DataError, StorageError
from common.identity import read_private
from common.pseudonyms import pseudonym
from common.samples import Samples, prepare_folder, settings_of
from common.shard import Storage, read_secret
from common.storage import locked, private_folder, storing, write_whole

if TYPE_CHECKING:
    from common.imaging import Progress

log = logging.getLogger(__name__)

Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_MANIFEST = "cohort_manifest.json"


@dataclass(frozen=True)
class Cohort:
    """The samples of one site and which patients are for what."""

    samples: Samples
    split_P: npt.NDArray[np.str_]
    """"train", "validation" or "test" for each of `samples.patients`."""
    manifest: str
    """SHA-256 over samples, labels, split, task and preprocessing: names this very cohort."""
    refused: Mapping[str, int]
    """Reason code -> number of files that were not used."""
    outputs: int = 2
    """Number of classes of the task."""
    corrected: Mapping[str, int] = field(default_factory=dict)
    """What was done to values beyond reading and preparing them, such as a tilt -> number of samples."""

    @cached_property
    def scattered(self) -> npt.NDArray[np.float32]:
        """`common.scattering.Scattering` of every sample: nothing trains it, so it is computed once."""
        from common.scattering import scattered

        return scattered(self.samples.x_N)

    def indices(self, split: Split) -> npt.NDArray[np.int64]:
        """The samples of this split, ascending."""
        chosen: npt.NDArray[np.int64] = np.flatnonzero(self.split_P[self.samples.patient_N] == split).astype(np.int64)
        return chosen

    def patients(self, split: Split) -> int:
        """Number of patients in this split."""
        return int(np.count_nonzero(self.split_P == split))

    def class_counts(self, split: Split) -> npt.NDArray[np.int64]:
        """(classes,): patients of this split with at least one sample of the class."""
        chosen = self.indices(split)
        patient_n, target_n = self.samples.patient_N[chosen], self.samples.targets_N[chosen]
        has_PC = np.zeros((len(self.samples.patients), self.outputs), bool)
        if target_n.ndim == 1:
            has_PC[patient_n, target_n.astype(np.int64)] = True
        else:
            at, classes = np.nonzero(target_n)
            has_PC[patient_n[at], classes] = True
        counts: npt.NDArray[np.int64] = has_PC.sum(axis=0, dtype=np.int64)
        return counts


def open_cohort(
    folder: Path,
    recipe: Recipe,
    *,
    cache: Path,
    key: bytes,
    progress: Progress | None = None,
    state: Path | None = None,
    storage: Storage = "float32",
    secret: bytes | None = None,
    decide: bool = True,
) -> Cohort:
    """The site's cohort for this recipe; the first call decides the split, later ones keep it.

    Args:
        folder: labels.csv and the DICOM files, see `common.samples.prepare_folder`.
        recipe: Its task, preprocessing and evaluation fractions are used.
        cache: The site's own folder, 0700; keeps prepared samples and `cohort_manifest.json`.
            Deleting the manifest lets patients change sides: never do it between two trainings.
        key: The site's secret, at least 16 bytes; another key makes other pseudonyms.
        progress: Told (steps done, steps in all); two steps a file.
        state: The site's folder for what must survive; a version of the cohort that is new is recorded there for
            `fedicom data diff`, which reads all prepared samples once. None: it is not.
        storage, secret: How samples are kept, see `common.samples.prepare_folder`; records of versions are encrypted
            with the secret too. The manifest is not: who loses the secret makes the rest anew, but not a split.
        decide: False: a look before anybody said yes, which leaves neither a split nor a record.

    Raises:
        DataError: The folder is no cohort, or too small a one: fewer than
            `evaluation.min_cell` patients or one class only would be left for training.
        StorageError: The cache cannot be written, or the manifest was changed or has another key.
    """
    task = recipe.task
    prepared = prepare_folder(
        folder, task, recipe.data, cache=cache, key=key, progress=progress, storage=storage, secret=secret
    )
    samples = prepared.samples
    path = private_folder(cache) / _MANIFEST
    with locked(cache):
        known = _read(path, key, recipe.evaluation)
        split = split_patients(_classes(samples, task), known, recipe.evaluation, key)
        split_P = np.array([split[patient] for patient in samples.patients])
        split_P.setflags(write=False)
        manifest = _name(samples, split_P, recipe)
        cohort = Cohort(samples, split_P, manifest, prepared.refused, task.outputs, prepared.corrected)
        _check(cohort, recipe)
        # After the check: a folder that is still too small shall not freeze a poor split.
        if decide and split != known:
            _write(path, split, recipe, key)
        if decide and state is not None:
            record(state, cohort, split, recipe, key, secret)
    return cohort


def site_cohort(home: SiteHome, recipe: Recipe, progress: Progress | None = None, *, decide: bool = True) -> Cohort:
    """A deployed site's cohort, kept as its site.yaml says, and on record for `fedicom data diff`.

    Args:
        progress, decide: As `open_cohort`.

    Raises:
        DataError: As `open_cohort`; or site.yaml names no data folder for this recipe.
        ConfigError: A folder or the cache's key is not as it must be.
        StorageError: As `open_cohort`; or a key cannot be read.
    """
    config = home.config
    return open_cohort(
        home.path / config.data_of(recipe.name),
        recipe,
        cache=home.cache,
        key=read_private(home.cohort_key, "a cohort key"),
        progress=progress,
        state=home.state,
        storage=config.cache.storage,
        secret=read_secret(config.cache.key, home.path),
        decide=decide,
    )


def frozen_split(cache: Path, key: bytes) -> dict[str, str] | None:
    """Patient pseudonym -> side, as the first training decided it; None where there was none yet.

    Raises:
        StorageError: The manifest was changed, cannot be read, or has another key.
    """
    plain = _sealed(cache / _MANIFEST, key)
    return None if plain is None else dict(plain["split"])


def frozen_fractions(cache: Path, key: bytes) -> dict[str, float] | None:
    """With which fractions the split was decided; None where there was none yet.

    Raises:
        StorageError: As `frozen_split`.
    """
    plain = _sealed(cache / _MANIFEST, key)
    return None if plain is None else dict(plain["fractions"])


def split_patients(
    classes: Mapping[str, str], known: Mapping[str, str], evaluation: Evaluation, key: bytes
) -> dict[str, str]:
    """Who is for training, validation and test.

    The first time, each class is sorted by keyed HMAC and cut: the numbers of each class differ from the exact
    fractions by less than one patient, and a class of three or more has a validation patient. Later,
    whoever is known stays, present or not, and a newcomer goes by the value of an HMAC. Where nobody is known, as in
    another study's folder, it is a first time again.

    Args:
        classes: Patient pseudonym -> class by which to stratify.
        known: Pseudonym -> split of every patient seen before.
        evaluation: Holds the fractions.
        key: The site's secret.

    Returns:
        Pseudonym -> split, for known and new patients.
    """
    validation, test = evaluation.validation_fraction, evaluation.test_fraction
    split = dict(known)
    if known.keys() & classes.keys():
        for patient in classes.keys() - known.keys():
            value = int(pseudonym(key, "split", patient)[:12], 16) / 16**12
            split[patient] = "validation" if value < validation else "test" if value < validation + test else "train"
        return split
    strata: dict[str, list[str]] = {}
    for patient in sorted(classes, key=lambda name: pseudonym(key, "split", name)):
        strata.setdefault(classes[patient], []).append(patient)
    sizes = {name: len(strata[name]) for name in sorted(strata)}
    for_validation = _shares(sizes, validation, at_least_one_from=3)
    left = {name: size - for_validation[name] for name, size in sizes.items()}
    for_test = _shares(sizes, test, at_least_one_from=math.inf)
    for name, patients in strata.items():
        first = for_validation[name]
        second = first + min(for_test[name], max(left[name] - 1, 0))  # one stays for training
        split |= dict.fromkeys(patients[:first], "validation")
        split |= dict.fromkeys(patients[first:second], "test")
        split |= dict.fromkeys(patients[second:], "train")
    return split


def _shares(sizes: Mapping[str, int], fraction: float, *, at_least_one_from: float) -> dict[str, int]:
    """How many of each stratum: rounded down, then the largest remainders get what the whole is short of (Hamilton)."""
    exact = {name: size * fraction for name, size in sizes.items()}
    # 1e-9: 20 * 0.15 is 3.0000000000000004 in binary, and others fall below
    shares = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    short = math.floor(sum(exact.values()) + 0.5) - sum(shares.values())
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], name))[: max(short, 0)]:
        shares[name] += 1
    if fraction > 0:
        shares = {name: max(n, 1) if sizes[name] >= at_least_one_from else n for name, n in shares.items()}
    return {name: min(n, max(sizes[name] - 1, 0)) for name, n in shares.items()}


def _classes(samples: Samples, task: Task) -> dict[str, str]:
    """The class of each patient for stratifying: worst finding (binary), first sample (multi-class), all findings."""
    of: dict[str, Any] = {}
    for at, target in zip(samples.patient_N.tolist(), samples.targets_N.tolist(), strict=True):
        patient = samples.patients[at]
        if task.kind == "binary":
            of[patient] = max(of.get(patient, 0), target)
        elif task.kind == "multiclass":
            of.setdefault(patient, target)
        else:
            of[patient] = of.get(patient, frozenset()) | {i for i, value in enumerate(target) if value}
    if task.kind == "multilabel":
        # Whole patterns are often unique; the rarest finding of a patient is the one that a split loses first.
        counts = Counter(finding for findings in of.values() for finding in findings)
        of = {p: min(found, key=lambda i: (counts[i], i), default="none") for p, found in of.items()}
    return {patient: str(value) for patient, value in of.items()}


def _check(cohort: Cohort, recipe: Recipe) -> None:
    total, train, least = len(cohort.samples.patients), cohort.patients("train"), recipe.evaluation.min_cell
    if train < least:
        raise DataError(
            f"{total} patients with images and labels, {train} of them for training; at least {least} "
            "(evaluation.min_cell) are needed for training: add patients, or leave this site out of the federation"
        )
    targets_n = cohort.samples.targets_N[cohort.indices("train")]
    if len(np.unique(targets_n, axis=0)) < 2:
        raise DataError(
            f"the {train} training patients have one class only (of {total} patients in all); "
            "add patients of the other classes"
        )


def _name(samples: Samples, split_P: npt.NDArray[np.str_], recipe: Recipe) -> str:
    plain = {
        "samples": samples.digest,
        "patients": samples.patients,
        "patient": samples.patient_N.tolist(),
        "subgroups": {name: list(values) for name, values in samples.subgroups.items()},
        "split": split_P.tolist(),
        **settings_of(recipe.task, recipe.data),
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(path: Path, split: Mapping[str, str], recipe: Recipe, key: bytes) -> None:
    plain = {
        "format": 1,
        "fractions": fractions(recipe.evaluation),
        "task_key": recipe.task.key,
        "split": dict(sorted(split.items())),
    }
    write_whole(path, json.dumps({**plain, "seal": seal(plain, key)}, indent=1).encode())


def _sealed(path: Path, key: bytes) -> dict[str, Any] | None:
    """What the manifest holds; None only where there is none yet."""
    with storing(_MANIFEST):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        plain: dict[str, Any] = json.loads(data)
        sealed = str(plain.pop("seal"))
        dict(plain["split"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(
            f"{_MANIFEST} cannot be read; restore it from a backup: a new split moves patients"
        ) from None
    if not hmac.compare_digest(sealed, seal(plain, key)):
        raise StorageError(
            f"{_MANIFEST} was changed, or was written with another site key; restore the manifest and the key "
            "that belong together: a new split would move patients from training to validation"
        )
    return plain


def _read(path: Path, key: bytes, evaluation: Evaluation) -> dict[str, str]:
    """The frozen split; empty only where there is none yet."""
    plain = _sealed(path, key)
    if plain is None:
        return {}
    wanted = fractions(evaluation)
    if plain["fractions"] != wanted:
        log.warning(
            "the split of this cohort was frozen with fractions %s, the recipe asks %s: only new patients follow it",
            plain["fractions"],
            wanted,
        )
    return dict(plain["split"])


def fractions(evaluation: Evaluation) -> dict[str, float]:
    """Which shares a recipe asks to hold out."""
    return {"validation": evaluation.validation_fraction, "test": evaluation.test_fraction}
