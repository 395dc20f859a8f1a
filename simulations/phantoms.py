"""Virtual hospitals out of nothing: chest phantoms in 2D (radiograph-like) and 3D (CT-like), some with a nodule.

They look like no one and are no substitute for patients; they exist so that a whole federation
can be tried without data. The task is of middling difficulty: distractors (rib crossings,
vessels, noise) hide faint nodules, and every hospital images differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from common.config import Phantom
from common.errors import ConfigError
from simulations.dicom_writer import Machine, Subject, axial, write_image, write_series
from simulations.hospitals import CENTRAL, Progress, Writer, hospitals_folder, site_names

CLASSES = ("no nodule", "nodule")
HEADER = ("patient", "label", "sex", "age_group")
AGE_GROUPS = ("18-44", "45-64", "65+")
REPEATED = 0.2
"""Share of patients who come twice, with another image of the same finding."""

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """What makes one hospital's images its own."""

    quantity: float
    """Factor on the number of patients."""
    prevalence: float
    """Share of patients with a nodule."""
    noise: float
    """Standard deviation: of the 2D image in units of its contrast; of CT in 100 HU."""
    blur: float
    """Sigma of the point spread, in pixels of a 64-pixel image."""
    spacing_mm: float
    """At 64 pixels; 2D within the plane, in 3D of the rows and columns."""
    slice_factor: float
    """Slice distance over row distance in 3D."""
    gamma: float
    """Exponent of the display curve in 2D."""
    level: tuple[float, float]
    """2D: stored black and white as shares of the largest stored value."""
    radiograph: Machine
    ct: Machine
    intercept: int
    """CT: Hounsfield units of a stored 0."""


def hospitals(sites: int) -> tuple[Hospital, ...]:
    """The first `sites` hospitals: four kinds, then the same kinds with other numbers of patients and findings."""
    made = []
    for index in range(sites):
        kind, lap = _KINDS[index % len(_KINDS)], index // len(_KINDS)
        # Laps differ too, but slowly: prevalence moves toward the other end, volume shrinks.
        made.append(
            replace(
                kind,
                quantity=kind.quantity * 0.85**lap,
                prevalence=kind.prevalence + (0.4 - kind.prevalence) * (1 - 0.7**lap),
                noise=kind.noise * (1 + 0.1 * lap),
            )
        )
    return tuple(made)


def make_phantoms(out: Path, phantom: Phantom, sites: int, progress: Progress | None = None) -> None:
    """Makes that many hospitals and a central test set as real DICOM files, in the layout of `simulations.hospitals`.

    The same arguments give the same bytes. An `out` that already holds this is left as it is.

    Args:
        progress: Told the number of images (volumes) written, and of all.

    Raises:
        ConfigError: `out` holds something else, or there is no site.
    """
    if sites < 1:
        raise ConfigError(f"sites: got {sites}; expected at least 1")
    kinds = hospitals(sites)
    seeds = np.random.SeedSequence(phantom.seed).spawn(sites + 1)
    first, plan = 1, []
    # The central set first: it stays the same however many hospitals there are of the same four kinds.
    for site, kind, seed in zip((CENTRAL, *site_names(sites)), (None, *kinds), seeds, strict=True):
        count = phantom.central_patients if kind is None else max(1, round(phantom.patients * kind.quantity))
        plan.append((site, _patients(first, count, _KINDS if kind is None else (kind,), np.random.default_rng(seed))))
        first += count
    total = sum(patient.studies for _, patients in plan for patient in patients)
    done = 0
    with hospitals_folder(out, {"kind": "phantom", "sites": sites, **asdict(phantom)}) as writer:
        if writer is None:
            return
        for site, patients in plan:
            for _ in _write(writer, site, patients, phantom):
                done += 1
                if progress is not None:
                    progress(done, total)
            writer.labels(site, HEADER, [(p.name, CLASSES[p.positive], p.sex, p.age_group) for p in patients])
            writer.summary[site] |= {"patients": len(patients), "images": sum(p.studies for p in patients)}


def pictures(count: int, size: int, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Radiographs of `count` patients of all hospitals, in memory: (count, size, size) in [0, 1], and their classes."""
    patients = _patients(0, count, _KINDS, np.random.default_rng(seed))
    drawn = [radiograph(patient, np.random.default_rng([patient.seed, 1]), size) for patient in patients]
    labels = np.array([patient.positive for patient in patients], np.int64)
    return np.clip(np.stack(drawn) / 1.2, 0, 1).astype(np.float32), labels


@dataclass(frozen=True)
class _Patient:
    name: str
    positive: int
    sex: Literal["F", "M"]
    age_group: str
    studies: int
    hospital: Hospital
    seed: int


def _patients(first: int, count: int, kinds: Sequence[Hospital], rng: Rng) -> list[_Patient]:
    prevalence = float(np.mean([kind.prevalence for kind in kinds]))
    # At least one of each class, where there are two patients: a site of one class cannot learn.
    positives = int(np.clip(round(count * prevalence), min(1, count - 1), max(count - 1, 0)))
    labels = rng.permutation(np.arange(count) < positives)
    twice = rng.permutation(np.arange(count) < round(REPEATED * count))
    sexes, ages = rng.integers(2, size=count), rng.choice(3, size=count, p=(0.25, 0.4, 0.35))
    seeds = rng.integers(2**63, size=count)
    return [
        _Patient(
            f"P{first + i:05d}", int(labels[i]), "F" if sexes[i] else "M", AGE_GROUPS[ages[i]],
            1 + int(twice[i]), kinds[i % len(kinds)], int(seeds[i]),
        )
        for i in range(count)
    ]  # fmt: skip


def _write(writer: Writer, site: str, patients: Sequence[_Patient], phantom: Phantom) -> Iterator[None]:
    draw: Callable[[_Patient, Rng, int], Floats] = radiograph if phantom.dimensions == 2 else body_hu
    for number, patient in enumerate(patients, start=1):
        for study in range(1, patient.studies + 1):
            rng = np.random.default_rng([patient.seed, study])
            values = draw(patient, rng, phantom.size)
            subject = writer.subject(patient.name, study, sex=patient.sex)
            folder = writer.folder(site, subject, number)
            (_store_radiograph if phantom.dimensions == 2 else _store_ct)(folder, values, patient.hospital, subject)
            yield


def radiograph(patient: _Patient, rng: Rng, size: int) -> Floats:
    """A chest-like picture (size, size), bright where dense, about 0 to 1."""
    hospital = patient.hospital
    y, x = _axes(size, 2)
    wide = (0.96 if patient.sex == "M" else 0.88) * rng.uniform(0.92, 1.05)
    tilt = rng.normal(0, 0.04)
    x = (x - rng.normal(0, 0.03)) / wide + tilt * y
    y = y - rng.normal(0, 0.03)
    body = _soft(1 - (x / 0.95) ** 4 - (y / 1.15) ** 4, 0.08)
    image = 0.62 * body
    lungs = [
        _soft(1 - ((x - side * 0.43) / (0.34 * broad)) ** 2 - ((y - 0.02) / tall) ** 2, 0.18)
        for side, broad, tall in ((one, rng.uniform(0.93, 1.05), rng.uniform(0.64, 0.74)) for one in (-1, 1))
    ]
    lung = np.maximum(*lungs)
    image -= 0.36 * lung
    # Ribs: bows that fall off to the sides, a little irregular.
    phase = 2 * np.pi * (3.4 * (y + 0.45 * x**2) + rng.uniform())
    image += 0.045 * np.maximum(np.sin(phase + rng.normal(0, 0.15) * x), 0) * _soft(0.95 - np.abs(x), 0.1)
    image += 0.20 * _soft(0.17 - np.abs(x), 0.06)  # mediastinum
    image += 0.18 * _soft(1 - ((x - 0.16) / 0.30) ** 2 - ((y - 0.36) / 0.30) ** 2, 0.2)  # heart
    image += 0.22 * _soft(y - 0.62 - 0.10 * np.cos(3 * x), 0.06) * body  # diaphragm
    # Vessels: smooth noise within the lungs, of the size of a nodule and finer.
    texture = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), size * 0.022)
    image += 0.025 * texture / texture.std() * lung
    for _ in range(int(rng.integers(2, 6)) if patient.positive else 0):
        radius = rng.uniform(0.10, 0.20)
        side, angle, far = int(rng.integers(2)), rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.62) ** 0.5
        centre_x = (2 * side - 1) * 0.43 + 0.30 * far * math.cos(angle)
        centre_y = -0.05 + 0.52 * far * math.sin(angle)
        distance = np.hypot(x - centre_x, y - centre_y)
        image += rng.uniform(*CONTRAST) * _soft(radius - distance, 0.3 * radius)
    image = gaussian_filter(image, hospital.blur * size / 64) if hospital.blur else image
    image += 0.25 * hospital.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.asarray(image, dtype=np.float32)


def body_hu(patient: _Patient, rng: Rng, size: int) -> Floats:
    """A chest-like volume (size, size, size) in Hounsfield units, slices from the feet up."""
    hospital = patient.hospital
    z, y, x = _axes(size, 3)
    wide = (0.95 if patient.sex == "M" else 0.87) * rng.uniform(0.93, 1.04)
    x, y = (x - rng.normal(0, 0.03)) / wide, y - rng.normal(0, 0.03)
    volume = np.full((size, size, size), -1000, dtype=np.float32)
    volume += 1040 * _soft(1 - (x / 0.95) ** 2 - (y / 0.72) ** 2, 0.06)
    lung = np.zeros_like(volume)
    for side in (-1, 1):
        broad, deep, tall = (half * rng.uniform(0.92, 1.05) for half in (0.36, 0.50, 0.85))
        inside = 1 - ((x - side * 0.44) / broad) ** 2 - (y / deep) ** 2 - (z / tall) ** 2
        lung = np.maximum(lung, _soft(inside, 0.08))
    lung *= _soft(np.abs(x) - 0.17, 0.04)  # mediastinum between them
    volume -= 870 * lung
    spine = _soft(0.15 - np.hypot(x, y - 0.5), 0.03)
    volume += 350 * spine
    # Vessels: thin ridges where smooth noise passes zero, denser than lung.
    field = gaussian_filter(rng.standard_normal(volume.shape, dtype=np.float32), size * 0.06)
    volume += 250 * lung * np.exp(-((field / field.std() / 0.10) ** 2))
    if patient.positive:
        radius = rng.uniform(0.18, 0.32)
        side, far = int(rng.integers(2)), rng.uniform(0, 0.75) ** (1 / 3)
        toward = rng.standard_normal(3)
        toward *= far / np.linalg.norm(toward)
        up, back, left = 0.60 * float(toward[0]), 0.33 * float(toward[1]), 0.22 * float(toward[2])
        distance = np.sqrt((z - up) ** 2 + (y - back) ** 2 + (x - left - (2 * side - 1) * 0.44) ** 2)
        volume += rng.uniform(400, 800) * _soft(radius - distance, 0.25 * radius) * lung
    volume = gaussian_filter(volume, hospital.blur * size / 64) if hospital.blur else volume
    volume += 100 * hospital.noise * rng.standard_normal(volume.shape, dtype=np.float32)
    return np.asarray(volume, dtype=np.float32)


CONTRAST = (0.3, 0.5)
"""Smallest and largest brightness of a nodule in 2D, where lung and body are 0.36 apart."""


def _store_radiograph(folder: Path, image_YX: Floats, hospital: Hospital, subject: Subject) -> None:
    machine, (black, white) = hospital.radiograph, hospital.level
    top = 2**machine.bits_stored - 1
    shown = np.clip(image_YX, 0, 1.2) / 1.2
    stored = np.rint((black + (white - black) * shown**hospital.gamma) * top)
    pitch = hospital.spacing_mm * 64 / len(image_YX)
    write_image(folder / "1.dcm", stored.astype(np.uint16), machine, subject, spacing_mm=(pitch, pitch))


def _store_ct(folder: Path, hu_ZYX: Floats, hospital: Hospital, subject: Subject) -> None:
    stored = np.clip(np.rint(hu_ZYX) - hospital.intercept, -(2**15), 2**15 - 1).astype(np.int16)
    pitch = hospital.spacing_mm * 64 / len(hu_ZYX)
    affine = axial(stored.shape, (pitch * hospital.slice_factor, pitch, pitch))
    write_series(folder, stored, affine, hospital.ct, subject, intercept=str(hospital.intercept))


def _axes(size: int, dimensions: int) -> list[Floats]:
    """Coordinates from -1 to 1 along each axis, broadcastable."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return [line.reshape([-1 if axis == own else 1 for axis in range(dimensions)]) for own in range(dimensions)]


def _soft(inside: npt.NDArray[Any], width: float) -> Floats:
    """1 well inside (positive), 0 well outside, a smooth step of about this width between."""
    return np.asarray(0.5 * (1 + np.tanh(inside / width)), dtype=np.float32)


_KINDS = (
    Hospital(
        quantity=1.25, prevalence=0.35, noise=0.10, blur=0.5,
        spacing_mm=5.6, slice_factor=1.0, gamma=1.0, level=(0.05, 0.95), intercept=-1024,
        radiograph=Machine(modality="DX", manufacturer="Arbor Imaging", model="Aria", bits_stored=16),
        ct=Machine(modality="CT", manufacturer="Arbor Imaging", model="Aria"),
    ),
    Hospital(
        quantity=0.75, prevalence=0.55, noise=0.20, blur=0.9,
        spacing_mm=6.4, slice_factor=1.25, gamma=1.5, level=(0.10, 0.70), intercept=0,
        radiograph=Machine(
            modality="CR", manufacturer="Boreal", model="Bright", bits_stored=12, photometric="MONOCHROME1"
        ),
        ct=Machine(modality="CT", manufacturer="Boreal", model="Bright", numbering="reversed"),
    ),
    Hospital(
        quantity=0.5, prevalence=0.20, noise=0.14, blur=0.0,
        spacing_mm=5.0, slice_factor=0.8, gamma=0.7, level=(0.0, 1.0), intercept=-1000,
        radiograph=Machine(modality="DX", manufacturer="Cumulus Medical", model="Core", bits_stored=10),
        ct=Machine(modality="CT", manufacturer="Cumulus Medical", model="Core", numbering="shuffled"),
    ),
    Hospital(
        quantity=1.5, prevalence=0.45, noise=0.16, blur=1.2,
        spacing_mm=6.0, slice_factor=1.5, gamma=1.2, level=(0.30, 0.55), intercept=-8192,
        radiograph=Machine(modality="CR", manufacturer="Delta Ray", model="Dawn", bits_stored=8),
        ct=Machine(modality="CT", manufacturer="Delta Ray", model="Dawn"),
    ),
)  # fmt: skip
