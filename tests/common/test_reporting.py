"""DICOM Structured Reports of predictions: read back, against the table and the images that they are about."""

from __future__ import annotations

import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from highdicom.sr import srread

from common.errors import ConfigError, DataError
from common.imaging import Algorithm, Said, Source, iterate_folder, reporting, structured_report
from common.onnx_model import STATEMENT, OnnxModel
from common.predict import predict
from tests.common.test_imaging_multiframe import enhanced
from tests.common.test_predict import description, read, recipe, write_dx, write_model

ALGORITHM = Algorithm(name="chest", version="Fedicom 0.1.0", weights="ab" * 32, parameters=("a word",))
SAID = Said(probabilities=(("normal", 0.25), ("pneumonia", 0.75)), predicted=("pneumonia",), above=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx", description(recipe(), threshold=0.4).to_metadata())


def changed(path: Path, **values: Any) -> Path:
    image = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(image, keyword, value)
    image.save_as(path)
    return path


def source_of(folder: Path) -> Source:
    (item,) = iterate_folder(folder)
    return item.source  # type: ignore[union-attr]


def group_of(report: Any) -> Any:
    (group,) = report.content.get_image_measurement_groups()
    return group


def numbers_of(report: Any) -> dict[str, float]:
    return {item.name.meaning: item.value for item in group_of(report).get_measurements()}


def words_of(report: Any) -> list[tuple[str, str]]:
    return [(item.name.meaning, item.value.meaning) for item in group_of(report).get_qualitative_evaluations()]


def test_each_image_has_a_report_with_the_numbers_of_its_row(model: Path, tmp_path: Path) -> None:
    for number in (0, 1, 3):
        path = tmp_path / "dicom" / f"{number}.dcm"
        write_dx(path, number)
        changed(path, PatientName=f"Doe^{number}", PatientBirthDate="19700203", PatientSex="F", StudyDate="20260102")
    done = predict(model, tmp_path / "dicom", tmp_path / "out.csv", reports=tmp_path / "sr")
    rows = read(tmp_path / "out.csv")
    assert done.reports == len(rows) == 3
    assert {row["report"] for row in rows} == {path.name for path in (tmp_path / "sr").iterdir()}
    assert done.refused == {}
    for row in rows:
        report = srread(tmp_path / "sr" / row["report"])
        assert (report.PatientID, report.AccessionNumber) == (row["patient"], row["accession"])
        assert (report.StudyInstanceUID, report.Modality) == (row["study"], "SR")
        assert (str(report.PatientName)[:4], report.PatientBirthDate, report.PatientSex) == ("Doe^", "19700203", "F")
        assert report.StudyDate == "20260102"
        assert report.SeriesInstanceUID != row["series"]
        assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
        assert numbers_of(report) == {
            "Probability of negative": float(row["probability_negative"]),
            "Probability of positive": float(row["probability_positive"]),
        }
        assert words_of(report) == [
            ("Predicted class", row["predicted"]),
            ("At or above the operating point", {"yes": "Yes", "no": "No"}[row["above_operating_point"]]),
        ]
        (about,) = group_of(report).source_images
        assert about.referenced_sop_instance_uid == row["instance"]
        assert about.referenced_sop_class_uid == pydicom.uid.DigitalXRayImageStorageForPresentation
        (study,) = report.CurrentRequestedProcedureEvidenceSequence
        (series,) = study.ReferencedSeriesSequence
        assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (row["study"], row["series"])
    text = (tmp_path / "sr" / rows[0]["report"]).read_bytes().decode("latin-1")
    for word in (f"weights {'0' * 64}", OnnxModel(model).sha256, recipe().id, STATEMENT, "prediction test"):
        assert word in text
    assert {row["above_operating_point"] for row in rows} == {"yes", "no"}  # or the test would not tell them apart


def test_all_reports_of_a_study_are_one_series_of_the_algorithm(tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    source = source_of(tmp_path / "dicom")
    one, two = (structured_report(source, SAID, ALGORITHM, number=number) for number in (1, 2))
    other = structured_report(source, SAID, replace(ALGORITHM, weights="cd" * 32), number=1)
    assert one.SeriesInstanceUID == two.SeriesInstanceUID != other.SeriesInstanceUID
    assert (one.InstanceNumber, two.InstanceNumber) == (1, 2)
    assert len({one.SOPInstanceUID, two.SOPInstanceUID, other.SOPInstanceUID}) == 3  # an instance never changes


@pytest.mark.parametrize(
    ("charset", "name"), [("ISO_IR 100", "Müller^Jörg"), ("ISO_IR 144", "Иванов^Пётр"), ("ISO_IR 192", "山田^太郎")]
)
def test_a_name_in_another_alphabet_is_the_same_name(tmp_path: Path, charset: str, name: str) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    changed(tmp_path / "dicom" / "0.dcm", SpecificCharacterSet=charset, PatientName=name)
    report = structured_report(source_of(tmp_path / "dicom"), SAID, ALGORITHM, number=1)
    report.save_as(tmp_path / "report.dcm")
    assert str(pydicom.dcmread(tmp_path / "report.dcm").PatientName) == name


def test_a_report_says_whose_number_its_patient_id_is(tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    changed(tmp_path / "dicom" / "0.dcm", PatientID="4711", IssuerOfPatientID="North")
    report = structured_report(source_of(tmp_path / "dicom"), SAID, ALGORITHM, number=1)
    assert (report.PatientID, report.IssuerOfPatientID) == ("4711", "North")  # the 4711 of South is another person


def test_a_file_of_a_thousand_frames_has_a_report(tmp_path: Path) -> None:
    made = enhanced([2.0 * z for z in range(1000)])
    made.PatientSex = "F"
    for frame in made.PerFrameFunctionalGroupsSequence:  # their lengths are not told, so each of them has to be read
        for group in frame:
            group.is_undefined_length = True
    made["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
    (tmp_path / "dicom").mkdir()
    made.save_as(tmp_path / "dicom" / "multi.dcm", enforce_file_format=True)
    report = structured_report(source_of(tmp_path / "dicom"), SAID, ALGORITHM, number=1)
    assert (report.PatientID, report.PatientSex) == ("P1", "F")


def test_what_is_no_date_time_or_sex_is_left_empty_and_the_report_is_made(tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    path = tmp_path / "dicom" / "0.dcm"
    with pydicom.config.disable_value_validation():
        changed(path, PatientBirthDate="1970-02", StudyDate="20261301", StudyTime="9:15", PatientSex="FEMALE")
    report = structured_report(source_of(tmp_path / "dicom"), SAID, ALGORITHM, number=1)
    report.save_as(tmp_path / "report.dcm")
    read_back = pydicom.dcmread(tmp_path / "report.dcm")
    assert [read_back[name].value for name in ("PatientBirthDate", "StudyDate", "StudyTime", "PatientSex")] == [""] * 4
    changed(path, StudyTime="091500.25", StudyDate="20261231", PatientSex="O")
    report = structured_report(source_of(tmp_path / "dicom"), SAID, ALGORITHM, number=1)
    assert (report.StudyTime, report.StudyDate, report.PatientSex) == ("091500.25", "20261231", "O")


def test_a_volume_is_all_of_its_slices_and_a_film_the_frames_that_were_used(tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    source = source_of(tmp_path / "dicom")
    slices = replace(source, sop_uids=("2.25.1", "2.25.2", "2.25.3"), files=source.files * 3)
    report = structured_report(slices, SAID, ALGORITHM, number=1)
    images = group_of(_read_back(report, tmp_path)).source_images
    assert [image.referenced_sop_instance_uid for image in images] == ["2.25.1", "2.25.2", "2.25.3"]
    report = structured_report(replace(source, frames=(4, 2)), SAID, ALGORITHM, number=1)
    (image,) = group_of(_read_back(report, tmp_path)).source_images
    assert image.referenced_frame_numbers == [4, 2]


def _read_back(report: pydicom.Dataset, folder: Path) -> Any:
    report.save_as(folder / "report.dcm")
    return srread(folder / "report.dcm")


def test_of_several_labels_each_that_is_predicted_is_a_finding_and_without_an_operating_point_none_is_told(
    tmp_path: Path,
) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    said = Said(probabilities=(("a" * 80, 0.9), ("b", 0.1), ("c", 0.7)), predicted=("a" * 80, "c"))
    report = _read_back(structured_report(source_of(tmp_path / "dicom"), said, ALGORITHM, number=1), tmp_path)
    assert words_of(report) == [("Predicted class", "a" * 64), ("Predicted class", "c")]
    assert [item.value.value for item in group_of(report).get_qualitative_evaluations()] == ["class-0", "class-2"]
    assert list(numbers_of(report).values()) == [0.9, 0.1, 0.7]


def test_an_image_without_a_valid_report_keeps_its_row_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_dx(tmp_path / "dicom" / f"{number}.dcm", number)
    real = reporting.read_header

    def gone(path: Path, tags: Any, **how: Any) -> Any:
        if path.name == "1.dcm":
            raise FileNotFoundError
        return real(path, tags, **how)

    monkeypatch.setattr(reporting, "read_header", gone)
    done = predict(model, tmp_path / "dicom", tmp_path / "out.csv", reports=tmp_path / "sr")
    assert (done.samples, done.reports, done.refused) == (2, 1, {"no_report": 1})
    assert [bool(row["report"]) for row in sorted(read(tmp_path / "out.csv"), key=lambda row: row["patient"])] == [
        True, False,
    ]  # fmt: skip
    (refused,) = read(tmp_path / "out.refused.csv")
    assert (refused["file"], refused["why"]) == ("1.dcm", "its file cannot be read any more")


def test_a_header_that_no_report_can_repeat_is_told_without_its_values(tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    source = source_of(tmp_path / "dicom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"^its header makes no valid report \(UserWarning\)$"):
            structured_report(replace(source, study_uid="SECRET"), SAID, ALGORITHM, number=1)
        structured_report(source, SAID, ALGORITHM, number=1)


def test_the_reports_lie_in_a_folder_of_their_own_readable_by_their_owner_alone(model: Path, tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    folder = tmp_path / "sr"
    with pytest.raises(ConfigError, match="inside"):
        predict(model, tmp_path / "dicom", tmp_path / "out.csv", reports=tmp_path / "dicom" / "sr")
    folder.mkdir()
    (folder / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no empty folder"):
        predict(model, tmp_path / "dicom", tmp_path / "out.csv", reports=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dicom", "model.onnx", "sr"]
    (folder / "note.txt").unlink()
    predict(model, tmp_path / "dicom", tmp_path / "out.csv", reports=folder)
    (report,) = folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, report)] == [0o700, 0o600]


def test_a_run_that_breaks_leaves_no_report(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)

    def broken(*_: Any) -> Any:
        raise RuntimeError("power cut")

    monkeypatch.setattr(OnnxModel, "run", broken)
    with pytest.raises(RuntimeError):
        predict(model, tmp_path / "dicom", tmp_path / "out.csv", reports=tmp_path / "sr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dicom", "model.onnx"]


def test_without_a_wish_for_reports_the_table_has_no_column_for_them(model: Path, tmp_path: Path) -> None:
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    assert predict(model, tmp_path / "dicom", tmp_path / "out.csv").reports == 0
    assert "report" not in read(tmp_path / "out.csv")[0]
