"""What Fedicom writes, by a validator that nobody here wrote: dciodvfy of dicom3tools, a Debian package."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.imaging import Algorithm, Said, iterate_folder, structured_report
from common.imaging.deidentify import Deidentifier, Options
from common.imaging.refusal import Refusal
from simulations.dicom_writer import Machine, Subject, axial, write_image, write_series
from tests.common.test_imaging_files import DATA, PYDICOM, files
from tests.dicom_objects import objects


def errors(path: Path) -> set[str]:
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy is not installed: apt install dicom3tools")
    said = subprocess.run([program, str(path)], capture_output=True, timeout=60, check=False)
    lines = (said.stdout + said.stderr).decode("latin-1").splitlines()
    # UIDs of a copy are others than those of its original
    return {re.sub(r"<[0-9.]{9,}>", "<uid>", line) for line in lines if line.startswith("Error")}


def someone(path: Path, part: str) -> Subject:
    return Subject(patient_id=f"P^{path.stem}", entropy=("v",), body_part=part, sex="F")


def written(folder: Path) -> list[Path]:
    """A file of each kind that virtual hospitals hold: of a chest, and of nobody knows what."""
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for part in ("CHEST", ""):
        here = folder / f"of {part}"
        for original in (True, False):
            for modality in ("CR", "DX"):
                for photometric in ("MONOCHROME1", "MONOCHROME2"):
                    machine = Machine(modality=modality, photometric=photometric, bits_stored=12, original=original)  # type: ignore[arg-type]
                    path = here / f"{modality}-{photometric}-{original}.dcm"
                    write_image(path, levels, machine, someone(path, part), spacing_mm=(0.1, 0.1))
            machine = Machine(modality="US", bits_stored=8, original=original)
            path = here / f"US-{original}.dcm"
            write_image(path, (levels >> 4).astype(np.uint8), machine, someone(path, part))
            for modality in ("CT", "MR"):
                machine = Machine(modality=modality, original=original)  # type: ignore[arg-type]
                slices, path = np.arange(128, dtype=np.int16).reshape(2, 8, 8), here / f"{modality}-{original}"
                write_series(path, slices, axial(slices.shape, (2.0, 1.0, 1.0)), machine, someone(path, part))
    return files(folder)


def test_the_images_of_virtual_hospitals_are_valid(tmp_path: Path) -> None:
    images = written(tmp_path)
    assert len(images) == 36
    assert {path.name: found for path in images if (found := errors(path))} == {}


def test_reports_of_predictions_are_valid(tmp_path: Path) -> None:
    written(tmp_path / "images")
    algorithm = Algorithm(name="chest", version="Fedicom 0.1.0", weights="ab" * 32, parameters=("a word",))
    said = Said(probabilities=(("normal", 0.25), ("nodule", 0.75)), predicted=("nodule",), above=False)
    (tmp_path / "reports").mkdir()
    for number, item in enumerate(iterate_folder(tmp_path / "images" / "of CHEST"), start=1):
        report = structured_report(item.source, said, algorithm, number=number)  # type: ignore[union-attr]
        report.save_as(tmp_path / "reports" / f"{number}.dcm")
    reports = files(tmp_path / "reports")
    assert len(reports) == 14
    assert {path.name: found for path in reports if (found := errors(path))} == {}


@pytest.mark.parametrize("options", [Options(), Options(dates="shift", characteristics=True)], ids=["bare", "shifted"])
def test_a_copy_breaks_no_rule_that_its_original_keeps(tmp_path: Path, options: Options) -> None:
    real = [path for folder in sorted((DATA / "dicom").glob("*")) for path in files(folder)[:4]]
    copier, copies = Deidentifier(bytes(32), options), 0
    made = tmp_path / "made"
    made.mkdir()
    for name, image in objects().items():
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.save_as(made / f"{name}.dcm", enforce_file_format=True)
        data = copier.copy(made / f"{name}.dcm").data  # none is refused
        assert not re.search(rb"Doe|Roe|Acme|of ours|HEAD32|4711", data), name
    for path in (*written(tmp_path / "images"), *files(made), *files(PYDICOM), *real):
        try:
            copy = copier.copy(path)
        except Refusal:
            continue
        (tmp_path / "copy.dcm").write_bytes(copy.data)
        assert errors(tmp_path / "copy.dcm") - errors(path) == set(), path.name
        copies += 1
    assert copies >= 90
