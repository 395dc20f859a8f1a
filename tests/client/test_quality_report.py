"""The quality report of a folder with planted defects, from files to the page."""

from __future__ import annotations

import hmac
import json
import re
import resource
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from pydicom.uid import EnhancedCTImageStorage

from client.quality import cli, remembered
from client.quality import survey as survey_module
from client.quality.gate import QualityGate, standing_objections
from client.quality.survey import unit_pseudonym
from common.cache import purge, usage
from common.errors import ConfigError, DataError, StorageError
from common.imaging import index as index_module
from common.imaging.facts import read_facts, vendor_of
from common.pseudonyms import patient_pseudonym
from common.storage import private_folder, write_whole
from simulations.dicom_writer import Machine, Subject, write_image
from tests.common.test_imaging_multiframe import enhanced, item

KEY = b"k" * 32
PATIENTS, SIZE = 200, 128
FLIPPED = tuple(20 * at + 5 + at % 2 for at in range(10))
"""5 %, half of them of each class."""
TWIN = (20, 22)
"""Two patients with the same image and label."""
NOISY = (30, 32)
"""Two patients of whom one has the other's image with noise."""
WRITTEN = (41, 44)
AGAIN = 50
NAME = "Jane Roe"

Run = Callable[..., tuple[int, dict[str, Any], str]]


def name(number: int) -> str:
    return f"MRN-{number:04d}"


def picture(number: int) -> np.ndarray:
    """A smooth picture of its own, brighter on the left for even numbers and on the right for odd ones."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    image = 60 + 15 * rng.standard_normal((SIZE, SIZE))
    for _ in range(6):
        centre, wide = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.2)
        image += 40 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * wide**2))
    side = 0.25 if number % 2 == 0 else 0.75
    image += 110 * np.exp(-((y - 0.5) ** 2 + (x - side) ** 2) / (2 * 0.15**2))
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 patients with one image each, and every planted defect; tests only read it."""
    place = tmp_path_factory.mktemp("quality") / "north"
    rows = ["patient,label,annotator_a,annotator_b"]
    for number in range(PATIENTS):
        image = picture(number)
        if number == TWIN[1]:
            image = picture(TWIN[0])
        if number == NOISY[1]:
            noise = np.random.default_rng(0).normal(0, 4, image.shape)
            image = np.clip(picture(NOISY[0]) + noise, 0, 255).astype(np.uint8)
        if number in WRITTEN:
            page = Picture.fromarray(image)
            ImageDraw.Draw(page).text((4, 4), "ROE JANE 1961", 255, ImageFont.load_default(size=14))
            image = np.asarray(page)
        vendor = NAME if number == 60 else "SIEMENS Healthineers" if number % 3 else "Arbor Imaging"
        model = f"{NAME}'s" if number == 61 else "Aria 3"
        machine = Machine(modality="CR", bits_stored=8, manufacturer=vendor, model=model)
        subject = Subject(patient_id=name(number), entropy=("quality",), sex="F" if number % 4 else "M")
        file = place / "dicom" / f"{number}.dcm"
        write_image(file, image, machine, subject, spacing_mm=(0.2, 0.2) if number else None)
        if number == AGAIN:
            write_image(place / "dicom" / "again.dcm", image, machine, subject, number=2, spacing_mm=(0.2, 0.2))
        if number < 10:
            change(file, StudyDate=f"20{20 + number // 5}0131", PatientAge="061Y", KVP="125")
        truth = number % 2
        label = truth ^ (number in FLIPPED)
        # of 50 patients: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no
        first, second = number < 25, number < 20 or 25 <= number < 35
        said = f"{'right' if first else 'left'},{'right' if second else 'left'}" if number < 50 else ","
        rows.append(f"{name(number)},{'right' if label else 'left'},{said}")
    nobody = Subject(patient_id="MRN-UNLABELLED", entropy=("quality",))
    blank = np.full((SIZE, SIZE), 9, np.uint8)
    write_image(place / "dicom" / "blank.dcm", blank, Machine(modality="CR", bits_stored=8), nobody)
    (place / "labels.csv").write_text("\n".join(rows) + "\n")
    return place


def change(file: Path, **values: str) -> None:
    dataset = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and page of the one run that most tests look at."""
    place = tmp_path_factory.mktemp("made")
    write_whole(private_folder(place / "cache") / "pseudonyms.key", KEY)
    out = place / "page.html"
    code = cli.report_verb([str(folder), "--cache", str(place / "cache"), "--out", str(out), "--jobs", "1"])
    assert out.stat().st_mode & 0o777 == 0o600
    return code, json.loads(out.with_suffix(".json").read_text()), out.read_text()


@pytest.fixture
def report(made: tuple[int, dict[str, Any], str]) -> dict[str, Any]:
    return made[1]


def patients(*numbers: int) -> list[str]:
    return sorted(patient_pseudonym(KEY, name(number)) for number in numbers)


def test_patients_studies_and_images_are_counted(report: dict[str, Any]) -> None:
    # one patient has two images of one study, one has no label
    assert [report[what] for what in ("files", "patients", "studies", "series", "images", "volumes")] == [
        202, 201, 201, 202, 202, 0,
    ]  # fmt: skip
    assert (report["unlabelled"], report["rows_without_image"], report["refused"]) == (1, 0, {})


def test_classes_are_counted_by_image_and_by_patient(report: dict[str, Any]) -> None:
    # as many flipped one way as the other; patient 50, left, has two images
    assert report["class_patients"] == {"left": 100, "right": 100}
    assert report["class_images"] == {"left": 101, "right": 100}


def test_the_same_image_under_two_patients_is_an_error(report: dict[str, Any]) -> None:
    across = [group for group in report["duplicates"] if group["across_patients"]]
    assert [group["patients"] for group in across] == [patients(*TWIN)]
    assert [
        (each["level"], each["what"]) for each in report["findings"] if "more than one patient" in each["what"]
    ] == [("error", "1 image under more than one patient, equal pixel by pixel")]


def test_the_same_image_twice_under_one_patient_is_a_warning(report: dict[str, Any]) -> None:
    own = [group for group in report["duplicates"] if not group["across_patients"]]
    assert [(group["patients"], len(group["images"])) for group in own] == [(patients(AGAIN), 2)]
    assert any(each["level"] == "warning" and "stored more than once" in each["what"] for each in report["findings"])


def test_an_image_with_noise_is_a_near_duplicate_and_no_other_is(report: dict[str, Any]) -> None:
    assert [sorted(pair["patients"]) for pair in report["near_duplicates"]] == [patients(*NOISY)]
    assert (report["near_duplicates_across_patients"], report["near_duplicates_within_patients"]) == (1, 0)


def test_drawn_text_is_suspect_and_nothing_else(report: dict[str, Any]) -> None:
    assert sorted(patient for _, patient, _ in report["text_suspects"]) == patients(*WRITTEN)
    assert report["text_examined"] == 202


def test_a_blank_image_is_named_and_is_nobodys_duplicate(report: dict[str, Any]) -> None:
    assert len(report["blank"]) == 1
    assert all("MRN-UNLABELLED" not in str(group) for group in report["duplicates"])


def test_most_flipped_labels_are_suspects_and_few_others(report: dict[str, Any]) -> None:
    found = report["label_suspects"]
    planted = {unit_pseudonym(KEY, name(number)) for number in FLIPPED}
    named = {each["row"] for each in found["named"]}
    assert (len(planted), found["examined"]) == (10, 200)
    assert len(named & planted) >= 7
    assert len(named - planted) <= 3
    assert all(each["given"] != each["predicted"] for each in found["named"])


def test_two_annotators_have_the_kappa_of_the_textbook_and_a_warning(report: dict[str, Any]) -> None:
    (found,) = report["agreement"]
    assert found["items"] == 50
    assert found["kappa"]["value"] == pytest.approx(0.4)
    assert any("kappa 0.40, below 0.8" in each["what"] for each in report["findings"])


def test_histograms_show_vendors_and_not_what_somebody_typed_once(report: dict[str, Any]) -> None:
    vendors = report["histograms"]["vendor"]
    # 67 multiples of 3, one of them (60) has somebody's name; 133 others, one of them (50) with two images
    assert vendors["Arbor Imaging"] == 66
    assert vendors["Siemens"] == 134
    assert sorted(re.sub(r"[0-9a-f]{4}$", "", other) for other in vendors if other.startswith("other")) == ["other "]
    assert vendors["Fedicom"] == 1
    assert report["histograms"]["kvp"] == {"125": 10, "unknown": 192}
    assert report["histograms"]["year"] == {"2020": 5, "2021": 5, "unknown": 192}
    assert report["histograms"]["age"] == {"60-69": 10, "unknown": 192}


def test_missing_tags_are_counted_among_images_that_should_have_them(report: dict[str, Any]) -> None:
    tags = report["missing_tags"]
    assert tags["KVP"] == {"missing": 192, "of": 202}
    assert tags["PixelSpacing"] == {"missing": 2, "of": 202}
    assert tags["PatientSex"] == {"missing": 1, "of": 202}
    assert tags["Manufacturer"] == {"missing": 0, "of": 202}


def test_page_and_json_name_nobody_and_fetch_nothing(made: tuple[int, dict[str, Any], str], folder: Path) -> None:
    _, plain, page = made
    uids = {str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in folder.rglob("*.dcm")}
    assert len(uids) == 202
    for text in (page, json.dumps(plain)):
        assert not re.search(r"MRN|Jane|Roe|\.dcm|\d+(?:\.\d+){4,}", text)
        assert not any(uid in text for uid in uids)
        assert "LOCAL ONLY" in text
        assert "never leaves" in text
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link|<iframe", page)
    assert {href for href in re.findall(r'href="([^"]*)"', page) if not href.startswith("#")} == set()
    assert "default-src 'none'" in unescape(page)
    for part in ("PCA, by class", "PCA, by vendor", "t-SNE, by class", "t-SNE, by vendor"):
        assert part in page


def test_errors_make_the_exit_code_1(made: tuple[int, dict[str, Any], str]) -> None:
    assert made[0] == 1


# Small folders


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Six patients of two classes."""
    place = tmp_path / "small"
    rows = ["patient,label"]
    for number in range(6):
        subject = Subject(patient_id=name(number), entropy=("small",))
        write_image(place / "dicom" / f"{number}.dcm", picture(number)[:64, :64], Machine(modality="CR", bits_stored=8),
                    subject)  # fmt: skip
        rows.append(f"{name(number)},{'right' if number % 2 else 'left'}")
    (place / "labels.csv").write_text("\n".join(rows) + "\n")
    time.sleep(2 * index_module._FINE_NS / 1e9)  # what has just been written is not remembered: it may change unseen
    return place


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    write_whole(private_folder(tmp_path / "cache") / "pseudonyms.key", KEY)

    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        out = tmp_path / "out.html"
        code = cli.report_verb([*map(str, words), "--cache", str(tmp_path / "cache"), "--json", "--out", str(out)])
        return code, json.loads(capsys.readouterr().out), out.read_text()

    return run


def test_a_small_clean_folder_has_no_error_and_says_what_was_not_examined(small: Path, run: Run) -> None:
    code, plain, page = run(small)
    assert code == 0
    assert plain["text_examined"] == 0
    assert "2 of 2 classes have fewer than 10 patients" in plain["label_suspects"]["why_not"][0]
    assert "t-SNE" not in page
    assert "PCA, by class" in page


def test_workers_see_what_one_process_sees(small: Path, run: Run) -> None:
    one, two = (run(small, "--jobs", jobs)[1] for jobs in (1, 2))
    for plain in (one, two):
        del plain["made"]
    assert one == two


def test_equal_images_on_two_sides_of_the_split_are_an_error(small: Path, run: Run, tmp_path: Path) -> None:
    machine = Machine(modality="CR", bits_stored=8)
    write_image(small / "dicom" / "1.dcm", picture(0)[:64, :64], machine, Subject(patient_id=name(1), entropy=("x",)))
    split = dict.fromkeys(patients(*range(6)), "train") | {patients(1)[0]: "test"}
    plain = {"format": 1, "fractions": {}, "task_key": "patient", "split": split}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    seal = hmac.new(KEY, text.encode(), "sha256").hexdigest()
    (tmp_path / "cache" / "cohort_manifest.json").write_text(json.dumps({**plain, "seal": seal}))
    code, found, _ = run(small)
    assert code == 1
    assert found["splits"] == {"test": 1, "train": 5}
    assert [group["across_splits"] for group in found["duplicates"]] == [True]
    assert found["duplicates"][0]["labels_differ"]


def test_strangers_under_one_row_are_an_error_and_under_one_patient_id_are_left_out(small: Path, run: Run) -> None:
    for number in range(6):
        change(small / "dicom" / f"{number}.dcm", AccessionNumber=str(number % 5))
    rows = (f"{number},{('left', 'right')[number % 2]}" for number in range(5))
    (small / "labels.csv").write_text("\n".join(["accession,label", *rows]) + "\n")
    code, found, _ = run(small)
    assert (code, found["rows_of_several_patients"]) == (1, 1)
    change(small / "dicom" / "0.dcm", IssuerOfPatientID="CLINIC A")
    change(small / "dicom" / "5.dcm", IssuerOfPatientID="CLINIC B", PatientID=name(0))
    code, found, _ = run(small)
    assert (code, found["rows_of_several_patients"], found["refused"]) == (0, 0, {"shared_patient": 2})


def test_volumes_and_multi_label_tables_are_reported_too(tmp_path: Path, run: Run) -> None:
    from simulations.dicom_writer import axial, write_series

    place = tmp_path / "deep"
    rows = ["patient,effusion,mass"]
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 200, (8, 12, 12)).astype(np.int16)
        machine = Machine(modality="CT", manufacturer="GE MEDICAL SYSTEMS")
        subject = Subject(patient_id=name(number), entropy=("deep",))
        write_series(place / "dicom" / str(number), values, axial((8, 12, 12), (2.0, 0.5, 0.5)), machine, subject)
        rows.append(f"{name(number)},{number % 2},{int(number < 3)}")
    (place / "labels.csv").write_text("\n".join(rows) + "\n")
    code, plain, _ = run(place)
    assert code == 0
    assert (plain["volumes"], plain["images"], plain["files"]) == (6, 0, 48)
    assert plain["histograms"]["spacing_mm"] == {"2 × 0.5 × 0.5": 6}
    assert plain["histograms"]["vendor"] == {"GE": 6}
    assert plain["histograms"]["kvp"] == {"120": 6}
    assert plain["class_patients"] == {"effusion": 3, "mass": 3}


def test_a_folder_without_images_or_labels_is_refused(small: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no label table"):
        run(tmp_path / "empty")
    for file in (small / "dicom").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no usable image.*'not_dicom': 6"):
        run(small)


def test_labels_that_match_no_image_are_an_error_that_says_what_to_look_at(small: Path, run: Run) -> None:
    (small / "labels.csv").write_text("patient,label\n" + "".join(f"{n},{'lr'[n % 2]}\n" for n in range(6)))
    code, found, page = run(small)
    assert (code, found["unlabelled"], found["rows_without_image"]) == (1, 6, 6)
    (error,) = [each for each in found["findings"] if each["level"] == "error"]
    assert "no row of labels.csv has the patient of an image" in error["what"]
    assert "zeros in front" in error["do"]
    assert "has the patient of an image" in page


def test_a_page_is_not_laid_among_the_images(small: Path, tmp_path: Path) -> None:
    before = sorted(small.rglob("*"))
    for out in ("dicom/quality.html", "dicom/pages"):
        with pytest.raises(ConfigError, match=r"the page \(--out\) lies inside the folder of images"):
            cli.report_verb([str(small), "--cache", str(tmp_path / "cache"), "--out", str(small / out)])
    assert sorted(small.rglob("*")) == before


# Again, and back to the files


def test_a_second_report_looks_at_nothing_and_says_the_same(
    small: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, _ = run(small)
    monkeypatch.setattr(survey_module, "look", lambda work: pytest.fail("an image was read again"))
    _, again, _ = run(small)
    assert {**again, "made": ""} == {**first, "made": ""}
    monkeypatch.undo()
    seen = []
    really = survey_module.look
    monkeypatch.setattr(survey_module, "look", lambda work: (seen.append(len(work.series.entries)), really(work))[1])
    change(small / "dicom" / "0.dcm", KVP="77")
    _, changed, _ = run(small)
    assert seen == [1]
    assert changed["histograms"]["kvp"]["77"] == 1
    (small / "dicom" / "0.dcm").unlink()
    rows = (small / "labels.csv").read_text().splitlines()
    (small / "labels.csv").write_text("\n".join(rows[:1] + rows[2:]) + "\n")
    _, fewer, _ = run(small)
    assert seen == [1]
    assert fewer["images"] == first["images"] - 1


def test_what_is_remembered_names_nobody_and_is_encrypted_with_the_cache(small: Path, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"key": KEY, "jobs": 1}
    for secret in (None, bytes(range(32))):
        cache = tmp_path / f"cache-{secret is None}"
        found = survey_module.survey(small, None, cache=cache, secret=secret, **kwargs)
        looks = cache / "looks.sqlite"
        assert looks.stat().st_mode & 0o777 == 0o600
        content = looks.read_bytes() + b"".join(path.read_bytes() for path in cache.glob("looks.sqlite-wal"))
        assert b"MRN-" not in content
        assert (b"burned_in" in content) == (secret is None)
        looks.write_bytes(b"no database")  # or damaged: it is made anew
        again = survey_module.survey(small, None, cache=cache, secret=secret, **kwargs)
        assert again.pictures == found.pictures
        assert usage(cache).indexes == 1
        purge(cache)
        assert not looks.exists()


def test_a_disk_that_fills_while_images_are_looked_at_is_told_in_words(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_COMMIT_S", 0.0)
    with remembered.Remembered(tmp_path, small, (), KEY, None) as memory:
        memory.keep("first", {"seen": []})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with remembered.Remembered(tmp_path, small, (), KEY, None) as memory:
        assert memory.find("first") == {"seen": []}
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))
        try:
            with pytest.raises(StorageError, match=r"what was seen of the images cannot be kept.*free space"):
                memory.keep("second", {"seen": "x" * 2**17})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with remembered.Remembered(tmp_path, small, (), KEY, None) as memory:
        assert memory.find("first") == {"seen": []}


def test_a_pseudonym_of_the_report_leads_to_its_files_on_the_screen_alone(
    small: Path, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(small)
    cache = next(path for path in small.parent.rglob("pseudonyms.key")).parent
    capsys.readouterr()

    def asked(name: str) -> list[str]:
        assert cli.report_verb([str(small), "--where", name, "--cache", str(cache)]) == 0
        return capsys.readouterr().out.splitlines()

    file = small / "dicom" / "3.dcm"
    assert asked(patient_pseudonym(KEY, name(3))) == [f"patient {file}"]
    assert asked(unit_pseudonym(KEY, name(3))) == [f"row     {file}"]
    with pytest.raises(ConfigError, match="6 or more digits"):
        asked("ab")
    with pytest.raises(DataError, match="nothing in this folder"):
        asked("0" * 12)


# The gate


def test_the_gate_asks_for_a_report_about_just_these_files(small: Path, tmp_path: Path, run: Run) -> None:
    from client.quality.gate import keep_report

    kept, gate = tmp_path / "quality.json", QualityGate(min_class_patients=3)
    assert "there is no quality report" in standing_objections(kept, small, KEY, gate)[0]
    _, plain, _ = run(small)
    keep_report(kept, plain, KEY)
    assert standing_objections(kept, small, KEY, gate) == (
        "images without PixelSpacing: 100.0%, at most 50.0% is allowed",
    )
    lenient = QualityGate(min_class_patients=3, required_tags=())
    assert standing_objections(kept, small, KEY, lenient) == ()
    assert "3, at least 4" in standing_objections(kept, small, KEY, QualityGate(min_class_patients=4))[-2] + str(
        standing_objections(kept, small, KEY, QualityGate(min_class_patients=4))
    )
    table = small / "labels.csv"
    table.write_text(table.read_text().replace("0000,left", "0000,right"))
    assert "have changed since the last quality report" in standing_objections(kept, small, KEY, lenient)[0]


def test_a_report_that_was_made_better_by_hand_is_not_believed(small: Path, tmp_path: Path, run: Run) -> None:
    from client.quality.gate import keep_report

    kept = tmp_path / "quality.json"
    keep_report(kept, run(small)[1], KEY)
    kept.write_text(kept.read_text().replace('"unlabelled": 0', '"unlabelled": 1'))
    with pytest.raises(StorageError, match="was changed"):
        standing_objections(kept, small, KEY, QualityGate())
    kept.write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        standing_objections(kept, small, KEY, QualityGate())


# Facts


def test_facts_of_a_header_are_read_and_nonsense_is_unknown(small: Path, tmp_path: Path) -> None:
    file = small / "dicom" / "0.dcm"
    change(file, StudyDate="20240229", PatientBirthDate="20000301", KVP="70.5", PatientSex="F")
    found = read_facts(file)
    assert (found.kvp, found.sex, found.burned_in) == (70.5, "F", "no")
    assert found.studied is not None
    assert found.studied.isoformat() == "2024-02-29"
    assert found.age_years == pytest.approx(24.0, abs=0.01)
    assert "PatientAge" not in found.missing
    assert "PixelSpacing" in found.missing
    change(file, StudyDate="20240231", PatientBirthDate="", PatientAge="006M", KVP="0", BurnedInAnnotation="")
    found = read_facts(file)
    assert (found.studied, found.kvp, found.age_years, found.burned_in) == (None, None, 0.5, "unsaid")
    (tmp_path / "junk").write_bytes(b"\0" * 200)
    assert read_facts(tmp_path / "junk").expected == ()


def test_what_stands_with_the_frames_of_a_file_is_not_missed_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "multi.dcm"
    enhanced([0, 2, 4]).save_as(path, enforce_file_format=True)
    found = read_facts(path)
    # its spacing is in Pixel Measures; a gate that asks for it would refuse every site with such files
    assert "PixelSpacing" in found.expected
    assert {"PixelSpacing", "SliceThickness", "EchoTime"}.isdisjoint(found.missing)
    assert {"Manufacturer", "PatientSex"} <= set(found.missing)


def test_a_long_list_of_frames_hides_nothing_that_stands_before_it(tmp_path: Path) -> None:
    made = enhanced([2.0 * z for z in range(1000)])
    made.PatientSex, made.Manufacturer = "F", "GE"
    for frame in made.PerFrameFunctionalGroupsSequence:  # their lengths are not told, so each of them has to be read
        for group in frame:
            group.is_undefined_length = True
    made["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
    made.save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    found = read_facts(tmp_path / "multi.dcm")
    assert (found.sex, "Manufacturer" in found.expected, "Manufacturer" in found.missing) == ("F", True, False)


@pytest.mark.parametrize("sequence", ["CTXRayDetailsSequence", "UnassignedPerFrameConvertedAttributesSequence"])
@pytest.mark.parametrize(
    ("shared", "of_frames", "found"),
    [
        (120, [], 120),
        (None, [80, 80, 80], 80),
        (None, [80, 140, 80], None),
        (120, [80, 80, 80], None),
        (None, [], None),
    ],
)
def test_the_voltage_of_an_enhanced_ct_stands_with_its_frames(
    tmp_path: Path, sequence, shared, of_frames, found
) -> None:
    made = enhanced([0, 2, 4])
    made.SOPClassUID, made.Modality = EnhancedCTImageStorage, "CT"
    if shared:
        setattr(made.SharedFunctionalGroupsSequence[0], sequence, [item(KVP=shared)])
    for groups, kvp in zip(made.PerFrameFunctionalGroupsSequence, of_frames, strict=False):
        setattr(groups, sequence, [item(KVP=f"{kvp}.0")])
    made.save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    assert read_facts(tmp_path / "multi.dcm").kvp == found


def test_vendors_are_known_by_their_usual_names() -> None:
    names = ("SIEMENS", "Siemens Healthineers", "GE MEDICAL SYSTEMS", "GEORGE", "Philips, Inc.", "")
    assert [vendor_of(each) for each in names] == ["Siemens", "Siemens", "GE", None, "Philips", None]


def test_a_page_that_would_take_its_jsons_place_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"give x\.html"):
        cli.report_verb([str(tmp_path / "images"), "--out", str(tmp_path / "x.json")])
