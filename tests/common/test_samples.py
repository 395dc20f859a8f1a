from __future__ import annotations

import hashlib
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from common import filling, samples
from common.config import Augmentation, Preprocessing, Task
from common.errors import ConfigError, DataError, StorageError
from common.labels import read_labels
from common.pseudonyms import pseudonym
from common.samples import Prepared, prepare_folder
from common.storage import write_whole
from simulations.dicom_writer import Machine, Subject, write_image, write_series

AXIAL = np.eye(4)[[2, 1, 0, 3]]  # slices along z, rows along y, columns along x
KEY = b"a site's own secret"
TASK = Task(key="patient")
DATA = Preprocessing(size=(8, 8), intensity="window", low=0, high=200)
CR = Machine(modality="CR", bits_stored=8)


def someone(number: int) -> Subject:
    return Subject(patient_id=f"MRN-{number:04d}", entropy=("test_samples",))


def image_of(number: int) -> np.ndarray:
    """8 x 8 values up to 200, different for every number."""
    return ((np.arange(64).reshape(8, 8) * 3 + number) % 201).astype(np.uint8)


def hospital(folder: Path, patients: int = 6, table: Sequence[str] | None = None) -> Path:
    """One CR image a patient; odd numbers are positive."""
    for number in range(patients):
        write_image(folder / "dicom" / f"p{number}" / "1.dcm", image_of(number), CR, someone(number))
    rows = [f"MRN-{number:04d},{('negative', 'positive')[number % 2]}" for number in range(patients)]
    label(folder, ["patient,label", *rows] if table is None else table)
    return folder


def label(folder: Path, lines: Sequence[str]) -> None:
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def read(folder: Path, task: Task = TASK, data: Preprocessing = DATA, **kwargs: Any) -> Prepared:
    return prepare_folder(folder, task, data, cache=folder.parent / "cache", key=KEY, **kwargs)


def change(file: Path, **values: str) -> None:
    dataset = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file)
    time.sleep(0.03)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return hospital(tmp_path / "north")


@pytest.fixture
def prepared_series(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many series each call prepared anew; a call that opens the cache as it is adds nothing."""
    counts: list[int] = []
    real = filling.prepared_units

    def counting(units: Sequence[Any], *rest: Any) -> Any:
        counts.append(len(units))
        return real(units, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(filling, "prepared_units", counting)
        yield counts


def test_each_sample_holds_its_own_patients_pixels_and_label(site: Path) -> None:
    samples = read(site).samples
    assert samples.x_N.shape == (6, 1, 8, 8)
    assert samples.x_N.dtype == np.float32
    for number in range(6):
        patient = samples.patients.index(pseudonym(KEY, "patient", f"MRN-{number:04d}")[:16])
        (row,) = np.flatnonzero(samples.patient_N == patient)
        # window [0, 200] -> [0, 1]
        np.testing.assert_allclose(samples.x_N[row, 0], image_of(number) / 200, atol=1e-5)
        assert samples.targets_N[row] == number % 2


def test_two_people_whose_ids_are_alike_where_they_cannot_be_read_are_not_one_patient(site: Path) -> None:
    # ü and ö of Latin-1 are no UTF-8, and both would become the same replacement character
    for number, letter in ((1, b"\xfc"), (3, b"\xf6")):
        file = site / "dicom" / f"p{number}" / "1.dcm"
        change(file, SpecificCharacterSet="ISO_IR 192", PatientID="M?ller01")
        file.write_bytes(file.read_bytes().replace(b"M?ller01", b"M" + letter + b"ller01"))
    studies = {
        number: str(pydicom.dcmread(site / "dicom" / f"p{number}" / "1.dcm").StudyInstanceUID) for number in range(6)
    }
    label(site, ["study,label", *(f"{uid},{('negative', 'positive')[number % 2]}" for number, uid in studies.items())])
    got = read(site, replace(TASK, key="study"))
    assert len(got.samples.patients) == 4
    assert got.refused == {"no_patient": 2}


def test_the_digest_is_the_sha256_of_pixels_then_targets(site: Path) -> None:
    samples = read(site).samples
    assert samples.digest == hashlib.sha256(samples.x_N.tobytes() + samples.targets_N.tobytes()).hexdigest()
    assert samples.targets_N.dtype == np.int64


def test_nothing_in_the_cache_names_a_patient_and_only_the_owner_enters(site: Path) -> None:
    read(site)
    cache = site.parent / "cache"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"index.json"}
    assert not any(b"MRN-" in path.read_bytes() or "MRN-" in str(path) for path in files)
    assert not list(cache.rglob("*.tmp"))


def test_a_second_run_opens_no_image(site: Path, prepared_series: list[int]) -> None:
    first = read(site)
    second = read(site)
    assert second.samples.digest == first.samples.digest
    assert second.samples.patients == first.samples.patients
    assert second.refused == first.refused
    assert isinstance(second.samples.x_N, np.memmap)
    assert not second.samples.x_N.flags.writeable
    other = replace(DATA, augmentation=Augmentation(flip_up_down=True))
    assert read(site, data=other).samples.digest == first.samples.digest
    assert prepared_series == [6]


@pytest.mark.parametrize(
    ("change", "series"),
    [("image", 1), ("new image", 1), ("no image", 0), ("label", 0), ("key", 6), ("preprocessing", 6), ("code", 6)],
)
def test_only_the_series_that_changed_is_prepared_again(
    site: Path, change: str, series: int, prepared_series: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(0.03)  # a file that is read as soon as it is written may change unseen, and is not trusted
    label(site, [*(site / "labels.csv").read_text().splitlines(), "MRN-0000,negative"])
    first = read(site).samples
    key, data = KEY, DATA
    if change == "image":
        os.utime(site / "dicom" / "p0" / "1.dcm", ns=(1, 1))
    elif change == "new image":
        write_image(site / "dicom" / "more.dcm", image_of(40), CR, someone(0), number=2)
    elif change == "no image":
        write_image(site / "dicom" / "more.dcm", image_of(40), CR, someone(0), number=2)
        time.sleep(0.03)
        read(site)
        prepared_series.clear()
        prepared_series.append(6)
        (site / "dicom" / "more.dcm").unlink()
    elif change == "label":
        (site / "labels.csv").write_text((site / "labels.csv").read_text().replace("0000,negative", "0000,positive"))
    elif change == "key":
        key = b"the secret of another site"
    elif change == "preprocessing":
        data = replace(DATA, high=100)
    else:
        for room in (samples, filling):
            monkeypatch.setattr(room, "maker", lambda: "other code")
    again = prepare_folder(site, TASK, data, cache=site.parent / "cache", key=key).samples
    assert prepared_series == [6, series]
    assert len(again.x_N) == (7 if change == "new image" else 6)
    if change == "label":
        assert again.x_N.tobytes() == first.x_N.tobytes()
        assert (again.targets_N != first.targets_N).sum() == 1
    if change in ("image", "no image", "code"):
        assert again.digest == first.digest


def test_a_new_file_that_claims_to_be_an_old_image_takes_the_old_sample_with_it(site: Path) -> None:
    write_image(site / "dicom" / "more.dcm", image_of(40), CR, someone(0), number=2)
    time.sleep(0.03)  # else the old file would be prepared anew in any case
    assert len(read(site).samples.x_N) == 7
    clash = pydicom.dcmread(site / "dicom" / "p0" / "1.dcm")
    clash.SeriesInstanceUID, clash.PixelData = "1.2.3", bytes(64)
    clash.save_as(site / "dicom" / "other.dcm")
    again = read(site)
    assert (len(again.samples.x_N), again.refused) == (6, {"conflict": 2})


def test_order_and_digest_do_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    one = hospital(tmp_path / "a" / "site")
    two = hospital(tmp_path / "b" / "site")
    (two / "dicom" / "p0").rename(two / "dicom" / "zz")
    (two / "dicom" / "p5").rename(two / "dicom" / "aa")
    assert read(one).samples.digest == read(two).samples.digest


def test_a_shortened_or_foreign_cache_file_is_made_anew(site: Path) -> None:
    first = read(site)
    (file,) = (site.parent / "cache").rglob("*.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert read(site).samples.digest == first.samples.digest
    assert file.read_bytes() == whole
    (index,) = (site.parent / "cache").rglob("index.json")
    index.write_bytes(index.read_bytes()[:100])
    assert read(site).samples.digest == first.samples.digest


def test_a_killed_preparation_is_taken_up_where_it_stopped(site: Path, prepared_series: list[int]) -> None:
    cache = site.parent / "cache"
    time.sleep(0.03)

    def die(done: int, total: int) -> None:
        if done >= 3 * total // 4:  # three of six images are in
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            read(site, progress=die)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert {path.name for path in cache.rglob("*.part")} == {"rows.part", "units.part"}
    assert not list(cache.rglob("index.json"))
    found = read(site)
    assert prepared_series == [3]
    assert not list(cache.rglob("*.part"))
    assert found.samples.digest == read(hospital(site.parent / "elsewhere" / "north")).samples.digest


@pytest.mark.parametrize("damage", ["row", "half a row", "line", "half a line", "other file"])
def test_what_a_killed_preparation_left_is_trusted_only_where_it_is_whole(
    site: Path, damage: str, prepared_series: list[int]
) -> None:
    time.sleep(0.03)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(site, progress=stop)
    (rows,) = (site.parent / "cache").rglob("rows.part")
    lines = rows.with_name("units.part")
    assert rows.stat().st_size == 6 * 256
    if damage == "row":
        rows.write_bytes(b"\1" + rows.read_bytes()[1:])
    elif damage == "half a row":
        os.truncate(rows, 6 * 256 - 1)
    elif damage == "half a line":
        os.truncate(lines, lines.stat().st_size - 5)
    elif damage == "line":
        text = lines.read_bytes().split(b"\n")
        lines.write_bytes(b"\n".join([*text[:3], b"{}", *text[4:]]))
    else:
        lines.write_bytes(b"a letter\n")
    digest = read(site).samples.digest
    assert prepared_series == [6, {"line": 4, "other file": 6}.get(damage, 1)]
    assert digest == read(hospital(site.parent / "elsewhere" / "north")).samples.digest


def test_a_crash_between_samples_and_index_is_no_cache(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filling, "write_whole", crash)
        with pytest.raises(KeyboardInterrupt):
            read(site)
    assert not list((site.parent / "cache").rglob("index.json"))
    assert len(read(site).samples.targets_N) == 6
    assert len(list((site.parent / "cache").rglob("*.npy"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full disk that Linux keeps at /dev/full")
def test_a_full_disk_is_a_storage_error_and_leaves_no_part(site: Path) -> None:
    read(site)
    (place,) = (path.parent for path in (site.parent / "cache").rglob("index.json"))
    os.utime(site / "dicom" / "p0" / "1.dcm", ns=(1, 1))
    (place / "index.json").unlink()
    (place / "samples.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device; free space"):
        read(site)
    assert {path.name for path in place.iterdir()} == {".lock"} | {path.name for path in place.glob("*.npy")}

    kept = place / "kept"
    kept.write_bytes(b"old")
    (place / f".kept.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="kept could not be written"):
        write_whole(kept, b"new")
    assert kept.read_bytes() == b"old"


def test_a_disk_that_fills_while_series_are_prepared_gets_its_room_back(site: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 256, limit[1]))  # room for four of the six samples
    try:
        with pytest.raises(StorageError, match=r"the prepared samples could not be written"):
            read(site)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (place,) = (path.parent for path in (site.parent / "cache").glob("*/.lock"))
    assert [path.name for path in place.iterdir()] == [".lock"]
    assert len(read(site).samples.targets_N) == 6


def test_images_that_change_while_they_are_read_are_refused(site: Path) -> None:
    def meddle(done: int, total: int) -> None:
        (site / "dicom" / "late.txt").write_text("just arrived")

    with pytest.raises(DataError, match="changed while they were read"):
        read(site, progress=meddle)
    assert read(site).refused  # late.txt, counted


@pytest.mark.parametrize("key", ["patient", "study", "accession", "series"])
def test_labels_are_found_by_each_key(tmp_path: Path, key: str) -> None:
    site = hospital(tmp_path / "north", patients=4)
    found = {
        "patient": lambda who: who.patient_id,
        "study": lambda who: who.uid("study", 1),
        "accession": lambda who: who.accession,
        "series": lambda who: who.uid("series", 1, 1),
    }[key]
    label(site, [f"{key},label", *(f"{found(someone(n))},{('negative', 'positive')[n // 2]}" for n in range(4))])
    samples = read(site, replace(TASK, key=key)).samples
    of = {samples.patients[at]: target for at, target in zip(samples.patient_N, samples.targets_N, strict=True)}
    assert [of[pseudonym(KEY, "patient", f"MRN-{n:04d}")[:16]] for n in range(4)] == [0, 0, 1, 1]


def test_two_images_of_one_patient_are_two_samples_of_one_patient(site: Path) -> None:
    write_image(site / "dicom" / "again.dcm", image_of(90), CR, someone(0), number=2)
    samples = read(site).samples
    assert (len(samples.x_N), len(samples.patients)) == (7, 6)
    assert sorted(np.bincount(samples.patient_N)) == [1, 1, 1, 1, 1, 2]


def test_multi_label_targets_are_one_float_column_a_class(tmp_path: Path) -> None:
    site = hospital(tmp_path / "north", 2, ["patient,edema,age,mass,sex", "MRN-0000,1,70,0,F", "MRN-0001,0,60,0,"])
    task = Task(kind="multilabel", classes=("mass", "edema"), subgroups=("sex",))
    samples = read(site, task).samples
    first = samples.patients.index(pseudonym(KEY, "patient", "MRN-0000")[:16])
    row = int(np.flatnonzero(samples.patient_N == first)[0])
    assert samples.targets_N.dtype == np.float32
    assert samples.targets_N[row].tolist() == [0.0, 1.0]
    assert samples.targets_N[1 - row].tolist() == [0.0, 0.0]
    assert (samples.subgroups["sex"][row], samples.subgroups["sex"][1 - row]) == ("F", "unknown")


def test_unused_files_are_counted_by_reason(site: Path) -> None:
    write_image(site / "dicom" / "stranger.dcm", image_of(50), CR, someone(50))
    write_image(site / "dicom" / "echo.dcm", image_of(51), Machine(modality="US", bits_stored=8), someone(0), number=3)
    write_image(site / "dicom" / "nobody.dcm", image_of(52), CR, replace(someone(0), patient_id="", study=9))
    write_series(
        site / "dicom" / "ct",
        np.zeros((4, 8, 8), np.int16),
        np.eye(4),
        Machine(modality="CT"),
        replace(someone(1), study=2),
    )
    (site / "dicom" / "readme.txt").write_text("not DICOM")
    (site / "dicom" / "copy.dcm").write_bytes((site / "dicom" / "p1" / "1.dcm").read_bytes())
    got = read(site, data=replace(DATA, modalities=("CR",)))
    assert len(got.samples.x_N) == 6
    counts = dict(got.refused)
    assert counts.pop("no_label") == 1
    assert counts.pop("other_modality") == 1
    assert counts.pop("no_patient") == 1
    assert counts.pop("wrong_dimensions") == 4  # files, not series
    assert counts == {"not_dicom": 1, "copy": 1}


def test_volumes_are_the_samples_of_a_3d_task(tmp_path: Path) -> None:
    site = tmp_path / "north"
    for number in range(2):
        stored = np.arange(512, dtype=np.int16).reshape(8, 8, 8) + number
        write_series(site / "dicom" / str(number), stored, AXIAL, Machine(modality="CT"), someone(number))
    write_image(site / "dicom" / "flat.dcm", image_of(0), CR, replace(someone(0), study=2))
    label(site, ["patient,label", "MRN-0000,negative", "MRN-0001,positive"])
    data = Preprocessing(size=(8, 8, 8), intensity="window", low=0, high=1024, orientation="source")
    got = read(site, replace(TASK, dimensions=3), data)
    assert got.samples.x_N.shape == (2, 1, 8, 8, 8)
    positive = got.samples.x_N[int(np.flatnonzero(got.samples.targets_N == 1)[0]), 0]
    np.testing.assert_allclose(positive, (np.arange(512).reshape(8, 8, 8) + 1) / 1024, atol=1e-5)
    assert got.refused == {"wrong_dimensions": 1}


def test_an_image_that_cannot_be_prepared_is_counted_and_one_reason_is_told(site: Path) -> None:
    write_image(site / "dicom" / "p0" / "1.dcm", image_of(0), CR, someone(0), spacing_mm=(1.0, 1.0))
    write_image(site / "dicom" / "p1" / "1.dcm", image_of(1), CR, someone(1), spacing_mm=(1.0, 1.0))
    got = read(site, data=replace(DATA, spacing_mm=(1.0, 1.0)))
    assert len(got.samples.x_N) == 2
    assert got.refused == {"not_preparable": 4}
    write_image(site / "dicom" / "p0" / "1.dcm", image_of(0), CR, someone(0))
    write_image(site / "dicom" / "p1" / "1.dcm", image_of(1), CR, someone(1))
    with pytest.raises(DataError, match=r"none of 6 images .*'not_preparable': 6}; first: .* no pixel spacing"):
        read(site, data=replace(DATA, spacing_mm=(1.0, 1.0)))


def test_files_may_lie_beside_labels_csv(tmp_path: Path) -> None:
    site = hospital(tmp_path / "north")
    (site / "dicom").rename(site / "images")
    got = read(site)
    assert len(got.samples.x_N) == 6
    assert got.refused == {}  # labels.csv itself is no refused image


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["study,label"], "first column must be named 'patient'.*got 'study'"),
        (["MRN-0000,positive"], "first column must be named 'patient'"),
        (["patient;label"], "separate the columns by commas"),
        (["patient,lable"], "no column 'label'"),
        (["patient,label,label"], "'label' more than once"),
        ([], "labels.csv is empty"),
        (["patient,label"], "no rows"),
        (["patient,label", "MRN-0000,negative", "MRN-0001,Positive"], "row 3: the label is not one of negative, pos"),
        (["patient,label", "MRN-0000,1"], "row 2: .*holds a number, write the class name"),
        (["patient,label", "MRN-0000,negative", ",positive"], "row 3: the patient is empty"),
        (["patient,label", "MRN-0000,negative", "MRN-0001"], "row 3: 1 cells, but the header has 2"),
        (["patient,label", "MRN-0000,negative", "", "MRN-0000,positive"], "row 4: the same patient as row 2"),
        (["patient,label", 'MRN-0000,"negative'], "row 2 cannot be read as CSV"),
        (["patient,label", "MRN-0000,negative", "MRN-0001,negative"], "one class only: only the class 'negative'"),
    ],
)
def test_a_label_table_that_makes_no_sense_is_refused_by_row(lines: Sequence[str], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read_labels("\n".join(lines).encode(), TASK)
    assert "MRN" not in str(caught.value)


def test_other_label_tables_are_refused() -> None:
    multilabel = Task(kind="multilabel", classes=("mass", "edema"))
    with pytest.raises(DataError, match="no column 'edema'"):
        read_labels(b"patient,mass\nA,1\n", multilabel)
    with pytest.raises(DataError, match="row 2: column 'edema' must be 0 or 1"):
        read_labels(b"patient,mass,edema\nA,1,2\n", multilabel)
    with pytest.raises(DataError, match="has one class only: the same labels for everything"):
        read_labels(b"patient,mass,edema\nA,1,0\nB,1,0\n", multilabel)
    with pytest.raises(
        DataError, match="no column 'label'; the recipe needs the name of the class in 'label': add the"
    ):
        read_labels(b"patient,diagnosis\nA,negative\n", TASK)
    with pytest.raises(DataError, match="not UTF-8"):
        read_labels("patient,label\nMüller,negative\n".encode("latin-1"), TASK)


def test_a_table_without_a_column_of_subgroups_is_told_which_setting_asks_for_it() -> None:
    task = replace(TASK, subgroups=("sex", "age_group"))
    with pytest.raises(DataError) as caught:
        read_labels(b"patient,label,sex,Miller\nA,negative,F,1\n", task)
    assert str(caught.value) == (
        "labels.csv has no column 'age_group'; the recipe has task.subgroups=[sex,age_group]: add the column, "
        "or say task.subgroups=[sex]"
    )
    with pytest.raises(
        DataError, match=r"no column 'sex', 'age_group'; .* add the columns, or say task.subgroups=\[\]"
    ):
        read_labels(b"patient,label\nA,negative\n", task)


def test_a_spreadsheets_byte_order_mark_spaces_and_repeated_rows_are_read() -> None:
    labels = read_labels(b"\xef\xbb\xbfpatient, label\r\nA ,negative\r\nB,positive\r\nA,negative\r\n", TASK)
    assert {name: (found.row, found.target) for name, found in labels.items()} == {"A": (2, 0), "B": (3, 1)}


def test_two_rows_of_one_patient_may_not_differ_in_a_subgroup() -> None:
    with pytest.raises(DataError, match="row 4: the same patient as row 2 with other values"):
        read_labels(b"patient,label,sex\nA,negative,F\nB,positive,F\nA,negative,M\n", replace(TASK, subgroups=("sex",)))


def test_the_identifier_is_never_a_subgroup() -> None:
    with pytest.raises(DataError, match="no column 'patient'"):
        read_labels(b"patient,label\nA,negative\nB,positive\n", replace(TASK, subgroups=("patient",)))


def test_numbers_are_labels_where_they_are_the_class_names() -> None:
    labels = read_labels(b"patient,label\nA,1\nB,0\n", replace(TASK, classes=("0", "1")))
    assert (labels["A"].target, labels["B"].target) == (1, 0)


def test_a_row_without_image_is_named_by_number(site: Path) -> None:
    with (site / "labels.csv").open("a") as out:
        out.write("MRN-7777,positive\nMRN-8888,negative\n")
    with pytest.raises(DataError, match=r"row 8: no image has this patient; 2 such rows \(8, 9\) of 8") as caught:
        read(site)
    assert "MRN" not in str(caught.value)
    assert not list((site.parent / "cache").rglob("*.tmp"))


def test_zeros_that_a_spreadsheet_dropped_are_named_and_not_put_back(site: Path) -> None:
    for number in range(6):
        change(site / "dicom" / f"p{number}" / "1.dcm", PatientID=f"{700 + number:06d}")
    rows = [f"{700 + number:06d},{('negative', 'positive')[number % 2]}" for number in range(6)]
    label(site, ["patient,label", *rows[:4], rows[4].lstrip("0"), rows[5].lstrip("0"), "801,negative"])
    with pytest.raises(
        DataError, match=r"row 6: no image has this patient; 3 such rows \(6, 7, 8\).*2 of these rows.*zeros in front"
    ) as caught:
        read(site)
    assert "70" not in str(caught.value)
    label(site, ["patient,label", *(row.lstrip("0") for row in rows)])
    with pytest.raises(DataError, match=r"match nothing: 6 rows.*6 of these rows have an image but for zeros"):
        read(site)
    label(site, ["patient,label", *rows])
    assert len(read(site).samples.targets_N) == 6


@pytest.mark.parametrize("key", ["accession", "study"])
def test_a_row_whose_images_are_of_several_patients_is_named_by_number(site: Path, key: str) -> None:
    """An accession number that two departments gave, or one study with the images of two patients."""
    element = {"accession": "AccessionNumber", "study": "StudyInstanceUID"}[key]
    for number in range(6):
        change(site / "dicom" / f"p{number}" / "1.dcm", **{element: f"1.2.{number % 5}"})
    label(
        site, [f"{key},label", *(f"1.2.{number},{('negative', 'positive')[number % 2]}" for number in (3, 2, 1, 0, 4))]
    )
    with pytest.raises(
        DataError, match=rf"row 5: images of more than one patient have this {key}.*1 such row \(5\)"
    ) as caught:
        read(site, replace(TASK, key=key))
    assert "MRN" not in str(caught.value)
    assert "1.2." not in str(caught.value)
    change(site / "dicom" / "p5" / "1.dcm", PatientID="MRN-0000")
    assert len(read(site, replace(TASK, key=key)).samples.patients) == 5


def test_a_patient_id_of_two_issuers_is_not_one_patient(site: Path, prepared_series: list[int]) -> None:
    for number, issuer in ((0, "CLINIC A"), (1, ""), (2, "CLINIC A")):
        change(site / "dicom" / f"p{number}" / "1.dcm", IssuerOfPatientID=issuer)
    assert len(read(site).samples.x_N) == 6
    stranger = site / "dicom" / "p0" / "2.dcm"
    write_image(stranger, image_of(9), CR, replace(someone(0), study=2))
    change(stranger, IssuerOfPatientID="CLINIC B")
    got = read(site)
    assert got.refused == {"shared_patient": 2}
    assert pseudonym(KEY, "patient", "MRN-0000")[:16] not in got.samples.patients
    assert len(got.samples.x_N) == 5
    change(stranger, IssuerOfPatientID="CLINIC A")
    assert read(site).refused == {}
    assert prepared_series == [6, 2, 2]  # no other series is prepared anew


def test_labels_that_match_nothing_say_how_many_rows_and_images(site: Path) -> None:
    label(site, ["accession,label", "nowhere,negative", "nothing,positive"])
    with pytest.raises(
        DataError, match=r"match nothing: 2 rows of labels\.csv, 6 images, none with the same accession"
    ):
        read(site, replace(TASK, key="accession"))


def test_folders_without_images_or_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nowhere")
    site = tmp_path / "north"
    (site / "dicom").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no labels\.csv"):
        read(site)
    label(site, ["patient,label", "A,negative", "B,positive"])
    with pytest.raises(DataError, match="holds no files"):
        read(site)
    (site / "dicom" / "note.txt").write_text("no image")
    with pytest.raises(DataError, match="no file of the folder is a DICOM image"):
        read(site)


def test_images_of_the_wrong_kind_alone_are_refused(site: Path) -> None:
    data = Preprocessing(size=(8, 8, 8), intensity="window", low=0, high=200)
    with pytest.raises(DataError, match=r"none of 6 images can be used for a 3D task.*'wrong_dimensions': 6"):
        read(site, replace(TASK, dimensions=3), data)


def test_a_weak_key_and_a_cache_among_the_images_are_refused(site: Path) -> None:
    with pytest.raises(ConfigError, match="5 bytes, expected at least 16"):
        prepare_folder(site, TASK, DATA, cache=site.parent / "cache", key=b"short")
    with pytest.raises(ConfigError, match="cache lies inside"):
        prepare_folder(site, TASK, DATA, cache=site / "dicom" / "cache", key=KEY)
