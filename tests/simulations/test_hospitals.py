"""Imports of public data: pixels and geometry exact, patients kept whole, nothing half-written."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from common.errors import ConfigError, DataError, StorageError
from common.imaging import read_folder
from simulations.cli import hospitals_verb
from simulations.dicom_writer import Machine, Subject, quantise, write_image, write_series
from simulations.hospitals import _held, import_images, import_medmnist, import_nifti, site_names
from simulations.partition import ByColumn, Dirichlet, Iid, Quantity

DATA = Path(os.environ.get("FEDICOM_DATA", Path(__file__).parents[3] / "shared" / "data"))
KERMANY = r"(?P<patient>(?:NORMAL\d+-)?IM-\d+|person\d+)(?:_(?P<subtype>bacteria|virus))?"


def _medmnist(file: Path, shape: tuple[int, ...], columns: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 14), ("val", 4), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count * columns).reshape(count, columns) % 2).astype(np.uint8)
    np.savez(file, **arrays)
    return arrays


def _table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_medmnist_pixels_come_back_exactly_and_the_test_split_is_central(tmp_path: Path) -> None:
    arrays = _medmnist(tmp_path / "breastmnist.npz", (9, 7))
    import_medmnist(tmp_path / "breastmnist.npz", tmp_path / "out", 3, Iid(seed=2))
    found = {}
    for site in (*site_names(3), "central"):
        reading = read_folder(tmp_path / "out" / site / "dicom")
        assert not reading.refused
        labels = {row["patient"]: row["label"] for row in _table(tmp_path / "out" / site)}
        assert len(labels) == 6  # (14 + 4) / 3, and 6 of test
        for image in reading.images:
            split, index = image.source.patient_id[:-5].lower(), int(image.source.patient_id[-5:])
            assert (split == "test") == (site == "central")
            assert image.source.modality == "US"
            np.testing.assert_array_equal(image.values_YX, arrays[f"{split}_images"][index])
            found[image.source.patient_id] = labels[image.source.patient_id]
            assert labels[image.source.patient_id] == ("malignant", "normal or benign")[index % 2]
    assert len(found) == 24


@pytest.mark.parametrize(("name", "edge"), [("adrenalmnist3d.npz", 28), ("adrenalmnist3d_64.npz", 64)])
def test_medmnist_volumes_come_back_exactly_with_their_spacing(tmp_path: Path, name: str, edge: int) -> None:
    """Volumes of 64 voxels (MedMNIST+) were given the spacing of those of 28, and so 146 mm in place of 64."""
    arrays = _medmnist(tmp_path / name, (edge, 6, 7))
    import_medmnist(tmp_path / name, tmp_path / "out", 2, Iid())
    reading = read_folder(tmp_path / "out" / "central" / "dicom")
    assert not reading.refused
    assert len(reading.volumes) == 6
    for volume in reading.volumes:
        index = int(volume.source.patient_id[-5:])
        np.testing.assert_array_equal(volume.values_ZYX, arrays["test_images"][index])
        np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), 64 / edge)


def test_several_label_columns_become_several_columns(tmp_path: Path) -> None:
    arrays = _medmnist(tmp_path / "x.npz", (8, 8), columns=3)
    import_medmnist(tmp_path / "x.npz", tmp_path / "out", 2, Iid(), modality="CR", classes=("a", "b", "c"))
    for row in _table(tmp_path / "out" / "central"):
        assert list(row) == ["patient", "a", "b", "c"]
        assert [int(row[name]) for name in "abc"] == arrays["test_labels"][int(row["patient"][-5:])].tolist()


def test_the_same_import_gives_the_same_bytes(tmp_path: Path) -> None:
    _medmnist(tmp_path / "breastmnist.npz", (8, 8))
    for name in ("one", "two"):
        import_medmnist(tmp_path / "breastmnist.npz", tmp_path / name, 2, Dirichlet(5.0, seed=1, min_patients=1))
    assert _digest(tmp_path / "one") == _digest(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"classes": ("only", )}, ConfigError, "got 1 names"),
        ({"modality": "CT"}, ConfigError, "CR, DX or US in 2D"),
        ({"dimensions": 3}, ConfigError, "expected 3"),
        ({"sites": 19}, DataError, "18 patients cannot fill 19 sites"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_file_is_refused_and_leaves_nothing(
    tmp_path: Path, change: dict, error: type[Exception], words: str
) -> None:
    _medmnist(tmp_path / "breastmnist.npz", (8, 8))
    arguments = {"npz": tmp_path / "breastmnist.npz", "out": tmp_path / "out", "sites": 2, "partition": Iid(), **change}
    with pytest.raises(error, match=words):
        import_medmnist(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["breastmnist.npz"]


@pytest.mark.parametrize("place", ["link", "."])
def test_a_place_that_no_folder_can_take_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _medmnist(tmp_path / "breastmnist.npz", (9, 7))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    written = []
    with pytest.raises(ConfigError, match="nothing was written; give a new name"):
        import_medmnist(
            tmp_path / "breastmnist.npz", tmp_path / place if place == "link" else Path(place), 2, Iid(),
            progress=lambda done, total: written.append(done),
        )  # fmt: skip
    assert written == []
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_in_words_and_not_in_a_traceback(tmp_path: Path) -> None:
    _medmnist(tmp_path / "breastmnist.npz", (9, 7))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="the folder of the hospitals could not be written"):
        import_medmnist(tmp_path / "breastmnist.npz", tmp_path / "file" / "out", 2, Iid())


def test_colour_and_unknown_and_broken_files_are_refused(tmp_path: Path) -> None:
    _medmnist(tmp_path / "pathmnist.npz", (8, 8, 3))
    with pytest.raises(ConfigError, match="colour"):
        import_medmnist(
            tmp_path / "pathmnist.npz", tmp_path / "out", 2, Iid(), modality="US", classes=("a", "b")
        )  # fmt: skip
    with pytest.raises(ConfigError, match="not a known data set"):
        import_medmnist(tmp_path / "pathmnist.npz", tmp_path / "out", 2, Iid())
    (tmp_path / "breastmnist.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match="not a MedMNIST file"):
        import_medmnist(tmp_path / "breastmnist.npz", tmp_path / "out", 2, Iid())
    np.savez(tmp_path / "retinamnist.npz", train_images=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(DataError, match="not a MedMNIST file"):
        import_medmnist(tmp_path / "retinamnist.npz", tmp_path / "out", 2, Iid())


def _pictures(root: Path) -> dict[str, np.ndarray]:
    """Kermany's naming: 6 normal patients, 6 with pneumonia of whom the first has both kinds."""
    rng, made = np.random.default_rng(0), {}
    names = [f"NORMAL/IM-{n:04d}-0001.png" for n in range(5)] + ["NORMAL/NORMAL2-IM-0001-0001.png"]
    names += [f"PNEUMONIA/person{n}_bacteria_{n}.png" for n in range(6)] + ["PNEUMONIA/person0_virus_9.png"]
    for name in names:
        made[name] = rng.integers(0, 256, (10, 12), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[name]).save(root / name)
    return made


def test_pictures_keep_their_patients_and_pixels(tmp_path: Path) -> None:
    made = _pictures(tmp_path / "in")
    import_images(tmp_path / "in", tmp_path / "out", 2, Iid(), patient=KERMANY, central_fraction=1 / 3, spacing_mm=0.5)
    rows, pixels, patients = [], [], []
    for site in (*site_names(2), "central"):
        own = _table(tmp_path / "out" / site)
        rows += own
        reading = read_folder(tmp_path / "out" / site / "dicom")
        pixels += [image.values_YX.astype(np.uint8).tobytes() for image in reading.images]
        assert {image.spacing_mm for image in reading.images} == {(0.5, 0.5)}
        assert {image.source.patient_id for image in reading.images} == {row["patient"] for row in own}
        patients.append({row["patient"] for row in own})
    assert sorted(pixels) == sorted(values.tobytes() for values in made.values())
    assert len(rows) == len({row["patient"] for row in rows}) == 12
    assert [len(one) for one in patients] == [4, 4, 4]  # a third of each class is central: 2 + 2
    subtypes = {row["patient"]: row["subtype"] for row in rows}
    assert subtypes["person0"] == "bacteria+virus"
    assert subtypes["person1"] == "bacteria"
    assert subtypes["NORMAL2-IM-0001"] == subtypes["IM-0001"] == ""


def test_pictures_can_be_dealt_out_by_a_named_group(tmp_path: Path) -> None:
    _pictures(tmp_path / "in")
    import_images(
        tmp_path / "in", tmp_path / "out", 3, ByColumn("subtype"), patient=KERMANY, central_fraction=0
    )  # fmt: skip
    kinds = [{row["subtype"] for row in _table(tmp_path / "out" / site)} for site in site_names(3)]
    assert kinds == [{""}, {"bacteria"}, {"bacteria+virus"}]
    assert not (tmp_path / "out" / "central").exists()


def test_a_patient_with_two_labels_needs_the_accession_as_key(tmp_path: Path) -> None:
    for name in ("no/p1_left.png", "yes/p1_right.png", "no/p2_left.png", "yes/p3_left.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "in" / name)
    pattern = r"(?P<patient>p\d)_(?P<side>\w+)"
    with pytest.raises(DataError, match=r"--key accession, and say task\.key=accession in the recipe") as error:
        import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), patient=pattern, central_fraction=0)
    assert "p1" not in str(error.value)
    assert not (tmp_path / "out").exists()
    import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), patient=pattern, central_fraction=0, key="accession")
    rows = {row["accession"]: (row["label"], row["side"]) for row in _table(tmp_path / "out" / "north")}
    assert rows == {
        "p1.1": ("no", "left"), "p1.2": ("yes", "right"), "p2.1": ("no", "left"), "p3.1": ("yes", "left"),
    }  # fmt: skip
    headers = [pydicom.dcmread(path) for path in (tmp_path / "out").rglob("*.dcm")]
    assert {str(header.AccessionNumber) for header in headers} == set(rows)


def test_two_pictures_of_one_name_are_not_made_one_patient(tmp_path: Path) -> None:
    """`no/1.png` and `yes/1.png` are strangers: with the accession as key they shared a patient."""
    for name in ("no/1.png", "yes/1.png", "no/2.png", "yes/3.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "in" / name)
    for key in ("patient", "accession"):
        with pytest.raises(DataError, match="two pictures have the same name") as refused:
            import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), central_fraction=0, key=key)
        assert "1.png" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "yes" / "1.png").rename(tmp_path / "in" / "yes" / "4.png")
    import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), central_fraction=0)
    assert len(_table(tmp_path / "out" / "north")) == 4


def test_what_is_left_out_of_a_folder_of_pictures_is_told_in_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _pictures(tmp_path / "in")
    (tmp_path / "in" / "NORMAL" / "2019").mkdir()
    for name in ("NORMAL/a.tif", "NORMAL/b.TIF", "PNEUMONIA/README", "PNEUMONIA/.DS_Store"):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in" / ".git").mkdir()  # no class
    words = ["import", str(tmp_path / "in"), str(tmp_path / "out"), "--sites", "1", "--partition", "iid"]
    for _ in range(2):
        assert hospitals_verb(words) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "Left out: 2 .tif files, 1 file, 1 folder. Taken are PNG and JPEG files" in told


def test_what_a_killed_import_left_goes_the_next_time_and_one_at_work_is_left_alone(tmp_path: Path) -> None:
    _pictures(tmp_path / "in")
    left, busy = (tmp_path / f".out.partial-{name}" for name in ("left", "busy"))
    for folder in (left, busy):
        (folder / "north").mkdir(parents=True)
    with _held(busy):
        import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), patient=KERMANY)
    assert sorted(path.name for path in tmp_path.iterdir()) == [busy.name, "in", "out"]


def test_hospitals_made_inside_of_their_source_are_left_as_they_are_when_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pictures(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    for _ in range(2):  # the second time `out` lies beside the classes
        import_images(Path(), Path("out"), 2, Iid(), patient=KERMANY)
    assert {row["label"] for row in _table(tmp_path / "in" / "out" / "north")} == {"NORMAL", "PNEUMONIA"}


def test_a_picture_that_says_how_it_was_held_is_written_upright(tmp_path: Path) -> None:
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4)
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation: turn clockwise before showing
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        Image.fromarray(np.rot90(upright)).save(tmp_path / "in" / label / f"{label}1.png", exif=turned)
    import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), central_fraction=0)
    images = read_folder(tmp_path / "out" / "north" / "dicom").images
    assert [image.values_YX.tolist() for image in images] == [upright.tolist()] * 2


def test_the_command_labels_each_picture_where_it_is_told_to(tmp_path: Path) -> None:
    for name in ("no/p1_left.png", "yes/p1_right.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "in" / name)
    words = ["import", str(tmp_path / "in"), str(tmp_path / "out"), "--sites", "1", "--partition", "iid"]
    words += ["--patient-pattern", r"(?P<patient>p\d)", "--central-fraction", "0"]
    with pytest.raises(DataError, match="--key accession"):
        hospitals_verb(words)
    assert hospitals_verb([*words, "--key", "accession"]) == 0
    rows = {row["accession"]: row["label"] for row in _table(tmp_path / "out" / "north")}
    assert rows == {"p1.1": "no", "p1.2": "yes"}


@pytest.mark.parametrize("option", ["--patient-pattern=(?P<patient>p\\d)", "--key=accession"])
def test_what_tells_patients_of_pictures_apart_is_not_left_aside_elsewhere(tmp_path: Path, option: str) -> None:
    _medmnist(tmp_path / "breastmnist.npz", (8, 8))
    (tmp_path / "table.csv").touch()
    for source in (["breastmnist.npz"], [".", "--classes", "a,b", "--table", str(tmp_path / "table.csv")]):
        words = ["import", str(tmp_path / source[0]), str(tmp_path / "out"), "--sites", "2", *source[1:], option]
        with pytest.raises(ConfigError, match=r"is for folders of pictures; here every (image|row) is a patient"):
            hospitals_verb(words)


def test_a_class_without_pictures_is_refused_and_not_left_out(tmp_path: Path) -> None:
    """`--classes NORMAL,PNEUMONA` made hospitals of healthy patients alone."""
    _pictures(tmp_path / "in")
    with pytest.raises(DataError, match="no PNG or JPEG file in a subfolder 'PNEUMONA'"):
        import_images(tmp_path / "in", tmp_path / "out", 2, Iid(), classes=("NORMAL", "PNEUMONA"))
    assert not (tmp_path / "out").exists()


def test_a_modality_that_is_not_written_is_refused_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        hospitals_verb(["import", str(tmp_path), str(tmp_path / "out"), "--modality", "XA"])
    assert ended.value.code == 2
    assert "XA" in (told := capsys.readouterr().err)
    assert "CR" in told


@pytest.mark.parametrize(
    ("words", "why"), [("--size 8", 'size: got 8; .* 16'), ("--patients 0", "patients: got 0"),
                       ("--central-patients 0", "central_patients: got 0")],
)  # fmt: skip
def test_a_phantom_that_cannot_be_is_refused_in_words(words, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        hospitals_verb(["phantom", str(tmp_path / "out"), *words.split()])


@pytest.mark.parametrize("verb", ["phantom OUT", "import SOURCE OUT"])
def test_a_seed_below_nought_is_refused_in_words(verb, capsys):
    with pytest.raises(SystemExit, match="2"):
        hospitals_verb([*verb.split(), "--seed=-1"])
    assert "--seed: got -1, expected a whole number of at least 0" in capsys.readouterr().err


def test_sixteen_bit_pictures_keep_their_depth(tmp_path: Path) -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for label, name in (("a", "1"), ("b", "2")):
        (tmp_path / "in" / label).mkdir(parents=True)
        Image.fromarray(deep).save(tmp_path / "in" / label / f"{name}.png")
    import_images(tmp_path / "in", tmp_path / "out", 1, Iid(), central_fraction=0)
    for image in read_folder(tmp_path / "out" / "north" / "dicom").images:
        np.testing.assert_array_equal(image.values_YX, deep)


@pytest.mark.parametrize(
    ("pattern", "spoil", "error", "words"),
    [
        (r"(?P<patient>person\d+)", None, ConfigError, "does not fit every file name"),
        (r"person\d+", None, ConfigError, "group"),
        (r"(?P<patient>", None, ConfigError, "no regular expression"),
        (KERMANY, "PNEUMONIA/person7_virus_1.jpeg", DataError, "no readable PNG or JPEG"),
    ],
)
def test_pictures_that_cannot_be_used_leave_nothing(
    tmp_path: Path, pattern: str, spoil: str | None, error: type[Exception], words: str
) -> None:
    _pictures(tmp_path / "in")
    if spoil:
        (tmp_path / "in" / spoil).write_bytes(b"\xff\xd8\xff\xe0 cut off")
    with pytest.raises(error, match=words) as raised:
        import_images(tmp_path / "in", tmp_path / "out", 2, Iid(), patient=pattern)
    assert "person7" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@dataclass
class Scans:
    folder: Path
    table: Path
    volumes: dict[str, nibabel.Nifti1Image]


@pytest.fixture
def scans(tmp_path: Path) -> Scans:
    """Five volumes: axial, oblique, left-handed; integers, unsigned 16-bit, floats."""
    rng = np.random.default_rng(4)
    turn = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]) @ np.diag([0.7, 0.9, 2.5])
    kinds = {
        "axial": (np.diag([1.0, 1.0, 1.0]), rng.integers(-500, 500, (4, 5, 6)).astype(np.int16)),
        "oblique": (turn, rng.normal(0, 1e6, (5, 6, 4))),
        "flipped": (np.diag([-1.0, 1.5, 2.0]), rng.integers(0, 60_000, (6, 4, 5)).astype(np.uint16)),
        "sagittal": (np.array([[0, 0, 3.0], [1.0, 0, 0], [0, 1.0, 0]]), rng.random((4, 6, 5)).astype(np.float32)),
        "flat": (np.diag([1.0, 1.0, 1.0]), np.full((4, 4, 4), 2.5)),
    }
    folder, volumes = tmp_path / "nifti", {}
    folder.mkdir()
    for number, (name, (matrix, values)) in enumerate(kinds.items()):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = matrix, (number, -20, 3.25)
        volumes[name] = nibabel.Nifti1Image(values, affine)
        nibabel.save(volumes[name], folder / f"{name}.nii{'.gz' if number % 2 else ''}")
    lines = [f"{name},{number % 2},{'ab'[number % 2]}" for number, name in enumerate(kinds)]
    (tmp_path / "table.csv").write_text("id,y,scanner\n" + "\n".join(lines) + "\n")
    return Scans(folder, tmp_path / "table.csv", volumes)


def _import_scans(scans: Scans, out: Path, **change: object) -> None:
    arguments = {"id_column": "id", "label_column": "y", "classes": ("small", "large"), "central_fraction": 0.0}
    import_nifti(scans.folder, scans.table, out, 1, Iid(), **{**arguments, **change})


def test_every_nifti_voxel_is_found_at_its_place_in_the_patient(tmp_path: Path, scans: Scans) -> None:
    _import_scans(scans, tmp_path / "out", columns=("scanner",))
    reading = read_folder(tmp_path / "out" / "north" / "dicom")
    assert not reading.refused
    assert {volume.source.patient_id for volume in reading.volumes} == set(scans.volumes)
    for volume in reading.volumes:
        source = scans.volumes[volume.source.patient_id]
        wanted = np.asanyarray(source.dataobj).astype(np.float64)
        shape = volume.values_ZYX.shape
        index = np.indices(shape).reshape(3, -1)
        lps = volume.affine @ np.vstack([index, np.ones(index.shape[1])])
        ijk = np.linalg.inv(source.affine) @ (np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)
        np.testing.assert_allclose(ijk[:3], np.rint(ijk[:3]), atol=1e-3)
        there = wanted[tuple(np.rint(ijk[:3]).astype(int))]
        level = (wanted.max() - wanted.min()) / 65535
        tolerance = 0.0 if wanted.dtype != float or np.array_equal(wanted, np.rint(wanted)) else 0.51 * level
        # float32 of the reader: 24 bits
        np.testing.assert_allclose(volume.values_ZYX.reshape(-1), there, atol=tolerance + 1e-6 * np.abs(wanted).max())
    rows = {row["patient"]: (row["label"], row["scanner"]) for row in _table(tmp_path / "out" / "north")}
    assert rows["axial"] == ("small", "a")
    assert rows["oblique"] == ("large", "b")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"label_column": "grade"}, ConfigError, "no column 'grade'"),
        ({"label_column": "scanner"}, DataError, "none of small, large"),
        ({"id_column": "scanner"}, DataError, "row without its volume"),
        ({"central_fraction": 1.5}, ConfigError, "central_fraction"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, scans: Scans, change: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _import_scans(scans, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_row_that_is_repeated_brings_its_volume_once(tmp_path: Path, scans: Scans) -> None:
    with scans.table.open("a") as table:
        table.write("axial,0,a\n")  # row 7, as row 2
    _import_scans(scans, tmp_path / "out")
    assert len(read_folder(tmp_path / "out" / "north" / "dicom").volumes) == len(scans.volumes) == 5
    with scans.table.open("a") as table:
        table.write("axial,1,a\n")
    with pytest.raises(DataError, match=r"table.csv row 8: the same 'id' as row 2 with other values; keep") as refused:
        _import_scans(scans, tmp_path / "other")
    assert "axial" not in str(refused.value)


def test_a_label_in_superscript_is_no_number_of_a_class(tmp_path: Path, scans: Scans) -> None:
    scans.table.write_text(scans.table.read_text().replace("axial,0", "axial,²"))
    with pytest.raises(DataError, match="a label is none of small, large, nor its number"):
        _import_scans(scans, tmp_path / "out")


@pytest.mark.parametrize("kind", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_a_volume_of_colours_or_complex_numbers_is_refused(tmp_path: Path, scans: Scans, kind: object) -> None:
    """The imaginary part was left out in silence, colours ended in a traceback."""
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), kind), np.eye(4)), scans.folder / "axial.nii")
    with pytest.raises(DataError, match="holds colours or complex numbers"):
        _import_scans(scans, tmp_path / "out")


def test_values_that_fit_16_bits_are_kept_and_others_are_off_by_half_a_level() -> None:
    for values in (np.array([-32768, 32767]), np.array([0, 65535]), np.array([7.0, 8.0])):
        stored, slope, intercept = quantise(values)
        assert (slope, intercept) == ("1", "0")
        np.testing.assert_array_equal(stored, values)
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1.7e6, 1e30):
        values = rng.normal(3, 1, 5000) * scale
        stored, slope, intercept = quantise(values)
        assert max(len(slope), len(intercept)) <= 16
        error = np.abs(stored * float(slope) + float(intercept) - values).max()
        assert error <= 0.505 * (values.max() - values.min()) / 65535
    with pytest.raises(DataError, match="not finite"):
        quantise(np.array([1.0, np.nan]))


def test_geometry_that_dicom_cannot_hold_is_refused(tmp_path: Path) -> None:
    subject, machine = Subject(patient_id="P1", entropy=("t",)), Machine(modality="CT")
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    tilted = np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]
    tilted[1, 0] = 0.3
    for affine in (sheared, tilted):
        with pytest.raises(DataError, match="orthogonal"):
            write_series(tmp_path / "s", np.zeros((3, 4, 4), np.int16), affine, machine, subject)
    with pytest.raises(DataError, match="no length"):
        write_series(tmp_path / "s", np.zeros((3, 4, 4), np.int16), np.zeros((4, 4)), machine, subject)
    twelve = Machine(modality="CR", bits_stored=12)
    with pytest.raises(DataError, match="up to 4095"):
        write_image(tmp_path / "i.dcm", np.full((4, 4), 4096, np.uint16), twelve, subject)


def test_an_odd_number_of_bytes_is_padded(tmp_path: Path) -> None:
    values = np.arange(15, dtype=np.uint8).reshape(3, 5)
    subject = Subject(patient_id="Müller 7", entropy=("t",))
    write_image(tmp_path / "i.dcm", values, Machine(modality="US", bits_stored=8), subject)
    dataset = pydicom.dcmread(tmp_path / "i.dcm")
    assert len(dataset.PixelData) == 16
    assert dataset.PatientID == "Müller 7"
    np.testing.assert_array_equal(dataset.pixel_array, values)


def test_pydicom_writes_the_same_bytes_from_what_it_reads(tmp_path: Path) -> None:
    subject = Subject(patient_id="P1", entropy=("t",))
    for modality in ("CR", "DX", "US"):
        values = np.arange(16, dtype=np.uint16).reshape(4, 4)
        write_image(tmp_path / modality, values, Machine(modality=modality), subject, spacing_mm=(0.1, 0.2))
    for modality in ("CT", "MR"):
        values = np.arange(48, dtype=np.int16).reshape(3, 4, 4)
        affine = np.eye(4)[[2, 1, 0, 3]]
        write_series(tmp_path / f"{modality}s", values, affine, Machine(modality=modality), subject)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        dataset = pydicom.dcmread(path)
        dataset.save_as(tmp_path / "again", enforce_file_format=True)
        again = pydicom.dcmread(tmp_path / "again")
        assert again == dataset
        ours, theirs = path.read_bytes(), (tmp_path / "again").read_bytes()
        assert ours[ours.index(b"\x08\x00\x05\x00CS") :] == theirs[theirs.index(b"\x08\x00\x05\x00CS") :]


# ---- real data -------------------------------------------------------------


def _need(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real data {name} not found; set FEDICOM_DATA to the folder that holds it")
    return path


def test_breastmnist_in_five_skewed_hospitals(tmp_path: Path) -> None:
    npz = _need("medmnist/breastmnist.npz")
    import_medmnist(npz, tmp_path / "out", 5, Dirichlet(0.5, seed=0))
    sites = json.loads((tmp_path / "out" / "hospitals.json").read_text())["sites"]
    assert sum(one["patients"] for name, one in sites.items() if name != "central") == 546 + 78
    # The paper's counts: 147 of 780 lesions are malignant in train and val, 42 of 156 in test
    assert sites["central"]["labels"] == {"malignant": 42, "normal or benign": 114}
    with np.load(npz, allow_pickle=False) as file:
        images = file["test_images"]
    for image in read_folder(tmp_path / "out" / "central" / "dicom").images:
        np.testing.assert_array_equal(image.values_YX, images[int(image.source.patient_id[-5:])])


def test_hippocampus_volumes_keep_their_intensity_scale(tmp_path: Path) -> None:
    folder = _need("hippocampus_msd")
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    widest = sorted(rows, key=lambda row: float(row["max_intensity"]))
    chosen = [widest[0], widest[90], widest[-1]]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(chosen)
    import_nifti(
        folder / "images", tmp_path / "labels.csv", tmp_path / "out", 1, Quantity(), id_column="id",
        label_column="y_large_volume", classes=("small", "large"), central_fraction=0,
    )  # fmt: skip
    reading = read_folder(tmp_path / "out" / "north" / "dicom")
    assert not reading.refused
    highest = {volume.source.patient_id: float(volume.values_ZYX.max()) for volume in reading.volumes}
    for row in chosen:
        assert highest[row["id"]] == pytest.approx(float(row["max_intensity"]), rel=2e-5)


def test_kermany_names_give_patients(tmp_path: Path) -> None:
    folder = _need("kermany_cxr224/train")
    for label in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for path in sorted((folder / label).iterdir())[:40]:
            (tmp_path / "in" / label / path.name).symlink_to(path)
    import_images(tmp_path / "in", tmp_path / "out", 2, Iid(), patient=KERMANY)
    rows = [row for site in (*site_names(2), "central") for row in _table(tmp_path / "out" / site)]
    expected = {
        path.name.split("_")[0] if path.name.startswith("person") else path.name[: path.name.index("-", 3)]
        for path in (tmp_path / "in").rglob("*.jpeg")
        if not path.name.startswith("NORMAL2")
    }
    assert {row["patient"] for row in rows if not row["patient"].startswith("NORMAL2")} == expected
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 80
