"""Phantom hospitals: valid DICOM, the same bytes for the same seed, and a lesion where the label says so."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest

from common.config import Phantom
from common.errors import ConfigError
from common.imaging import read_folder
from simulations import phantoms
from simulations.hospitals import site_names
from simulations.phantoms import make_phantoms

SMALL_2D = Phantom(dimensions=2, patients=20, central_patients=12, size=32, seed=5)
SMALL_3D = Phantom(dimensions=3, patients=4, central_patients=4, size=16, seed=5)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "flat"
    make_phantoms(out, SMALL_2D, 4)
    return out


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "solid"
    make_phantoms(out, SMALL_3D, 4)
    return out


def _digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()


def _table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    tiny = replace(SMALL_2D, patients=3, central_patients=2, size=16)
    make_phantoms(tmp_path / "a", tiny, 2)
    make_phantoms(tmp_path / "b", tiny, 2)
    make_phantoms(tmp_path / "c", replace(tiny, seed=6), 2)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    assert _digest(tmp_path / "a") != _digest(tmp_path / "c")


def test_volumes_of_the_same_seed_have_the_same_bytes(tmp_path: Path, solid: Path) -> None:
    make_phantoms(tmp_path / "again", SMALL_3D, 4)
    assert _digest(tmp_path / "again") == _digest(solid)


def test_the_layout_is_a_folder_for_each_site_and_central(flat: Path) -> None:
    assert {path.name for path in flat.iterdir()} == {"north", "south", "east", "west", "central", "hospitals.json"}
    summary = json.loads((flat / "hospitals.json").read_text())["sites"]
    for site in ("north", "south", "east", "west", "central"):
        rows = _table(flat / site)
        assert summary[site]["patients"] == len(rows)
        assert summary[site]["labels"] == Counter(row["label"] for row in rows)
        assert summary[site]["images"] == len(list((flat / site / "dicom").rglob("*.dcm")))


def test_quantity_and_prevalence_differ_between_hospitals(flat: Path) -> None:
    # 20 patients times 1.25, 0.75, 0.5, 1.5; nodules in 35, 55, 20, 45 %
    sizes = [len(_table(flat / site)) for site in site_names(4)]
    nodules = [sum(row["label"] == "nodule" for row in _table(flat / site)) for site in site_names(4)]
    assert sizes == [25, 15, 10, 30]
    assert nodules == [9, 8, 2, 14]  # 8.75, 8.25, 2, 13.5 rounded, half to even


def test_every_image_is_of_a_labelled_patient_and_no_patient_is_in_two_hospitals(flat: Path) -> None:
    seen: set[str] = set()
    for site in (*site_names(4), "central"):
        images = Counter(str(pydicom.dcmread(path).PatientID) for path in (flat / site).rglob("*.dcm"))
        patients = [row["patient"] for row in _table(flat / site)]
        assert set(images) == set(patients)
        assert seen.isdisjoint(patients)
        assert Counter(images.values())[2] == round(0.2 * len(patients))
        assert max(images.values()) == 2
        seen.update(patients)


def test_images_of_one_patient_are_two_studies(flat: Path) -> None:
    by_patient: dict[str, list[pydicom.Dataset]] = {}
    for path in (flat / "north").rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        by_patient.setdefault(str(dataset.PatientID), []).append(dataset)
    for pair in (both for both in by_patient.values() if len(both) == 2):
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "AccessionNumber", "PixelData"):
            assert pair[0][name].value != pair[1][name].value


def test_hospitals_store_pixels_in_their_own_way(flat: Path) -> None:
    stored = {}
    for site in site_names(4):
        dataset = pydicom.dcmread(next((flat / site).rglob("*.dcm")))
        stored[site] = (dataset.Modality, dataset.PhotometricInterpretation, dataset.BitsAllocated, dataset.BitsStored)
        assert int(dataset.pixel_array.max()) < 2**dataset.BitsStored
        assert dataset.PatientIdentityRemoved == "YES"
        assert [float(step) for step in dataset.ImagerPixelSpacing] == pytest.approx([2 * _pitch(site)] * 2)
    assert stored == {
        "north": ("DX", "MONOCHROME2", 16, 16),
        "south": ("CR", "MONOCHROME1", 16, 12),
        "east": ("DX", "MONOCHROME2", 16, 10),
        "west": ("CR", "MONOCHROME2", 8, 8),
    }


def _pitch(site: str) -> float:
    return {"north": 5.6, "south": 6.4, "east": 5.0, "west": 6.0}[site]


@pytest.mark.parametrize("site", site_names(4))
def test_the_imaging_room_shows_every_radiograph_with_dark_lungs(flat: Path, site: str) -> None:
    reading = read_folder(flat / site / "dicom")
    assert not reading.refused
    assert len(reading.images) == len(list((flat / site).rglob("*.dcm")))
    for image in reading.images:
        values = image.values_YX
        # 32 pixels: the middle of a lung and the spine, whatever the photometric interpretation
        assert values[12:20, 7:11].mean() < values[12:20, 15:17].mean()


def test_the_reader_undoes_monochrome1_exactly(flat: Path) -> None:
    path = sorted((flat / "south").rglob("*.dcm"))[0]
    (image,) = read_folder(path.parent).images
    inverted = 2**12 - 1 - pydicom.dcmread(path).pixel_array.astype(np.int64)
    np.testing.assert_array_equal(image.values_YX - image.values_YX.min(), inverted - inverted.min())


def test_nodules_add_brightness_within_the_lungs_only() -> None:
    kind = replace(phantoms.hospitals(1)[0], noise=0.0, blur=0.0)
    healthy = phantoms._Patient("P1", 0, "F", "65+", 1, kind, 0)
    for seed in range(20):
        with_nodule, without = (
            phantoms.radiograph(replace(healthy, positive=positive), np.random.default_rng(seed), 64)
            for positive in (1, 0)
        )
        added = with_nodule - without
        row, column = np.unravel_index(added.argmax(), added.shape)
        # The low end of the contrast is .30, a soft edge takes little of it; five of .50 may lie on top of each other.
        assert 0.25 < added.max() < 2.5
        assert added.min() >= 0
        assert 8 < row < 56
        assert 4 < min(column, 63 - column) < 30


def test_ct_values_are_hounsfield_units(solid: Path) -> None:
    for site in site_names(4):
        reading = read_folder(solid / site / "dicom")
        assert not reading.refused
        for volume in reading.volumes:
            hu_ZYX = volume.values_ZYX
            assert hu_ZYX[:, 0, 0].mean() == pytest.approx(-1000, abs=30)  # air beside the body
            assert hu_ZYX[7:9, 5:8, 7:9].mean() == pytest.approx(40, abs=90)  # soft tissue between the lungs
            assert hu_ZYX[6:10, 6:9, 3:5].mean() < -300  # lung, with vessels and perhaps a nodule


@pytest.mark.parametrize(("site", "pitch", "step"), [("north", 5.6, 5.6), ("south", 6.4, 8.0), ("east", 5.0, 4.0)])
def test_highdicom_finds_the_geometry_that_was_meant(solid: Path, site: str, pitch: float, step: float) -> None:
    folder = sorted({path.parent for path in (solid / site).rglob("*.dcm")})[0]
    volume = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in folder.iterdir()])
    # 16 voxels where the spacing is given for 64
    assert sorted(volume.spacing) == pytest.approx(sorted((4 * step, 4 * pitch, 4 * pitch)))
    assert volume.shape == (16, 16, 16)
    centre = volume.affine @ [7.5, 7.5, 7.5, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-6)


def test_instance_numbers_run_as_each_scanner_has_it(solid: Path) -> None:
    def heights(site: str) -> list[float]:
        folder = sorted({path.parent for path in (solid / site).rglob("*.dcm")})[0]
        slices = sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda one: one.InstanceNumber)
        assert [one.InstanceNumber for one in slices] == list(range(1, 17))
        return [float(one.ImagePositionPatient[2]) for one in slices]

    assert heights("north") == sorted(heights("north"))
    assert heights("south") == sorted(heights("south"), reverse=True)
    assert heights("east") not in (sorted(heights("east")), sorted(heights("east"), reverse=True))


def test_the_central_set_does_not_depend_on_the_number_of_hospitals(tmp_path: Path, flat: Path) -> None:
    make_phantoms(tmp_path / "two", SMALL_2D, 2)

    def pixels(root: Path) -> list[bytes]:
        return [pydicom.dcmread(path).PixelData for path in sorted((root / "central").rglob("*.dcm"))]

    assert pixels(tmp_path / "two") == pixels(flat)


def test_a_fifth_hospital_is_like_the_first_but_not_it() -> None:
    kinds = phantoms.hospitals(6)
    assert kinds[4].radiograph == kinds[0].radiograph
    assert kinds[4] != kinds[0]
    assert site_names(6) == ("north", "south", "east", "west", "site05", "site06")


def test_progress_counts_every_image_once(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    phantom = replace(SMALL_2D, patients=4, central_patients=5, size=16)
    make_phantoms(tmp_path / "out", phantom, 1, progress=lambda done, total: told.append((done, total)))
    files = len(list((tmp_path / "out").rglob("*.dcm")))
    assert files == 5 + 1 + 5 + 1  # a fifth of 5 patients come twice: one of each five
    assert told == [(done, files) for done in range(1, files + 1)]


def test_a_stop_halfway_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_phantoms(tmp_path / "out", SMALL_2D, 2, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_already_there_is_reused_and_other_files_are_refused(tmp_path: Path) -> None:
    tiny = replace(SMALL_2D, patients=2, central_patients=2, size=16)
    out = tmp_path / "out"
    make_phantoms(out, tiny, 1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make_phantoms(out, tiny, 1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ConfigError, match="other hospitals"):
        make_phantoms(out, replace(tiny, seed=9), 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="other files"):
        make_phantoms(tmp_path / "mine", tiny, 1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"


def test_headers_hold_no_date_and_no_value_pydicom_objects_to(flat: Path, solid: Path) -> None:
    previous = pydicom.config.settings.reading_validation_mode
    pydicom.config.settings.reading_validation_mode = pydicom.config.RAISE
    try:
        for root in (flat, solid):
            for site in site_names(4):
                dataset = pydicom.dcmread(next((root / site).rglob("*.dcm")))
                for element in dataset.iterall():
                    assert element.VR not in ("DA", "TM", "DT") or not element.value
                assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
                assert dataset.file_meta.MediaStorageSOPClassUID == dataset.SOPClassUID
    finally:
        pydicom.config.settings.reading_validation_mode = previous
