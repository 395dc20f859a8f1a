"""Prediction with a model small enough to compute by hand: P(positive) = sigmoid(GAIN * mean of the prepared image)."""

import csv
import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydicom import dcmread, uid

from common.cli import predict_verb
from common.config import Preprocessing, Recipe, Task
from common.errors import ConfigError, DataError, ModelFileError
from common.imaging import iterate_folder, prepare
from common.onnx_model import Description, OnnxModel
from common.predict import _harmless, predict
from tests.common.test_imaging_hostile import ct, dataset
from tests.common.test_imaging_multiframe import enhanced

GAIN = 4.0


def recipe(size=(8, 8), classes=("negative", "positive"), **data):
    return Recipe(name="prediction test", task=Task(classes=classes), data=Preprocessing(size=size, mean=0.5, **data))


def description(recipe, threshold=0.5):
    return Description(
        version="0.1.0",
        created_by="a test",
        recipe=recipe.canonical,
        weight_digest="0" * 64,
        task=recipe.task,
        data=recipe.data,
        operating_threshold=threshold,
        metrics={},
        privacy={},
    )


def write_model(path, metadata, size=(8, 8), offset=0.0, last="Softmax"):
    """logits = (offset, GAIN * mean); probabilities = softmax, or what `last` makes of each."""
    gain = np.array([[0, GAIN / np.prod(size)]] * int(np.prod(size)), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("Gemm", ["flat", "gain", "offset"], ["logits"]),
            helper.make_node(last, ["logits"], ["probabilities"], **({"axis": 1} if last == "Softmax" else {})),
        ],
        "by_hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, *size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("logits", "probabilities")],
        [
            onnx.numpy_helper.from_array(gain, "gain"),
            onnx.numpy_helper.from_array(np.array([offset, 0], np.float32), "offset"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def write_dx(path, number, *, modality="DX", patient=None):
    """A radiograph, a share of which is bright: more of it with a larger number."""
    pixels = np.full((20, 24), 100, np.uint16)
    pixels[: 3 + 4 * number, :] = 3000
    save_dx(path, number, pixels, modality, patient)


def save_dx(path, number, pixels, modality="DX", patient=None):
    made = dataset(
        pixels, f"2.25.{1000 + number}", sop_class=uid.DigitalXRayImageStorageForPresentation, modality=modality,
        StudyInstanceUID=f"2.25.{2000 + number}", SeriesInstanceUID=f"2.25.{3000 + number}",
        PatientID=f"patient {number}" if patient is None else patient, AccessionNumber=f"A{number}",
        ImageType=["ORIGINAL", "PRIMARY"], ImagerPixelSpacing=[0.2, 0.2], BitsStored=12, HighBit=11,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)


def read(path):
    with path.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.onnx", description(recipe()).to_metadata())


def test_a_row_holds_the_hand_computed_probability_of_its_image(model, tmp_path):
    for number in (0, 1, 3):
        write_dx(tmp_path / "dicom" / f"{number}.dcm", number)
    summary = predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    rows = {row["patient"]: row for row in read(tmp_path / "out.csv")}
    items = {item.source.patient_id: item for item in iterate_folder(tmp_path / "dicom")}
    assert set(rows) == set(items) == {"patient 0", "patient 1", "patient 3"}
    for patient, item in items.items():
        expected = 1 / (1 + np.exp(-GAIN * prepare(item, recipe().data).mean()))
        assert float(rows[patient]["probability_positive"]) == pytest.approx(expected, abs=1e-5)
        assert float(rows[patient]["probability_negative"]) == pytest.approx(1 - expected, abs=1e-5)
    # 3 of 20 rows bright: mean -0.35, P = 0.198; 15 of 20: mean 0.25, P = 0.731; interpolation moves it a little
    assert float(rows["patient 0"]["probability_positive"]) == pytest.approx(0.198, abs=0.05)
    assert float(rows["patient 3"]["probability_positive"]) == pytest.approx(0.731, abs=0.05)
    assert (rows["patient 0"]["predicted"], rows["patient 0"]["above_operating_point"]) == ("negative", "no")
    assert (rows["patient 3"]["predicted"], rows["patient 3"]["above_operating_point"]) == ("positive", "yes")
    wanted = {"study": "2.25.2003", "series": "2.25.3003", "instance": "2.25.1003", "accession": "A3", "modality": "DX"}
    assert wanted.items() <= rows["patient 3"].items()
    assert (summary.samples, summary.patients, summary.positive, summary.refused) == (3, 3, 1, {})
    assert read(tmp_path / "out.refused.csv") == []
    assert summary.model_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()


def test_a_patient_id_of_two_issuers_is_two_patients_and_of_none_or_one_the_same(model, tmp_path):
    for number, (patient, issuer) in enumerate([("7", "north"), ("7", "south"), ("8", ""), ("8", "north"), ("9", "")]):
        path = tmp_path / "dicom" / f"{number}.dcm"
        write_dx(path, number, patient=patient)
        made = dcmread(path)
        made.IssuerOfPatientID = issuer
        made.save_as(path)
    assert predict(model, tmp_path / "dicom", tmp_path / "out.csv").patients == 4
    told = [(row["patient"], row["issuer"]) for row in read(tmp_path / "out.csv")]
    assert told == [("7", "north"), ("7", "south"), ("8", ""), ("8", "north"), ("9", "")]


def test_images_without_a_patient_id_have_their_rows_and_are_not_counted_as_a_patient(model, tmp_path, capsys):
    for number, patient in enumerate(["7", "", "", " "]):
        write_dx(tmp_path / "dicom" / f"{number}.dcm", number, patient=patient)
    done = predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    assert (done.samples, done.patients, done.nameless) == (4, 1, 3)
    rows = [(row["patient"], row["study"]) for row in read(tmp_path / "out.csv")]
    assert rows == [("7", "2.25.2000"), ("", "2.25.2001"), ("", "2.25.2002"), ("", "2.25.2003")]
    assert predict_verb([str(model), str(tmp_path / "dicom"), "--out", str(tmp_path / "out.csv")]) == 0
    said = capsys.readouterr().out
    assert "4 images of 1 patient" in said
    assert "3 images without a readable Patient ID" in said


def test_more_images_than_a_batch_keep_their_own_probabilities(model, tmp_path, monkeypatch):
    monkeypatch.setattr("common.predict._BATCH_MOST", 2)
    for number in range(5):
        write_dx(tmp_path / "dicom" / f"{number}.dcm", number)
    predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    rows = sorted(read(tmp_path / "out.csv"), key=lambda row: row["patient"])
    values = [float(row["probability_positive"]) for row in rows]
    assert len(values) == 5
    assert values == sorted(values), "a larger bright share gives a larger probability"


def test_large_images_go_through_the_network_a_few_at_a_time(model, monkeypatch):
    x = np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32)
    whole, opened, sizes = OnnxModel(model).run(x), OnnxModel(model), []
    session = opened._session

    def counted(names, given):
        sizes.append(len(given["x"]))
        return session.run(names, given)

    monkeypatch.setattr(opened, "_session", SimpleNamespace(run=counted))
    monkeypatch.setattr("common.onnx_model._AT_ONCE", 3 * 8 * 8)  # the numbers of three images
    for got, expected in zip(opened.run(x), whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert sizes == [3, 3, 2]


def test_a_multilabel_model_names_every_finding_above_one_half(tmp_path):
    task = Task(kind="multilabel", classes=("a", "b"))
    held = Recipe(name="two findings", task=task, data=Preprocessing(size=(8, 8), mean=0.5))
    # logits (3, 4 * mean): a always (P = .953), b where most of the image is bright; no operating point is used
    path = write_model(tmp_path / "model.onnx", description(held).to_metadata(), offset=3.0, last="Sigmoid")
    for number in (0, 4):
        write_dx(tmp_path / "dicom" / f"{number}.dcm", number)
    summary = predict(path, tmp_path / "dicom", tmp_path / "out.csv")
    rows = {row["patient"]: row for row in read(tmp_path / "out.csv")}
    assert {name: row["predicted"] for name, row in rows.items()} == {"patient 0": "a", "patient 4": "a;b"}
    assert float(rows["patient 0"]["probability_a"]) == pytest.approx(0.952574, abs=1e-6)
    assert (summary.positive, {row["above_operating_point"] for row in rows.values()}) == (None, {""})


def test_what_the_model_was_not_made_for_is_refused_with_a_reason(tmp_path):
    approved = recipe(modalities=("DX",))
    path = write_model(tmp_path / "model.onnx", description(approved).to_metadata())
    write_dx(tmp_path / "dicom" / "good.dcm", 1)
    write_dx(tmp_path / "dicom" / "deep" / "other.dcm", 2, modality="CR")
    (tmp_path / "dicom" / "note.txt").write_text("no DICOM")
    summary = predict(path, tmp_path / "dicom", tmp_path / "out.csv")
    refused = {row["file"]: row for row in read(tmp_path / "out.refused.csv")}
    assert set(refused) == {"deep/other.dcm", "note.txt"}
    assert refused["deep/other.dcm"]["code"] == "other_modality"
    assert "CR" in refused["deep/other.dcm"]["why"]
    assert refused["note.txt"]["why"]
    assert summary.samples == 1
    assert sum(summary.refused.values()) == 2


def write_3d_model(path):
    volume = Recipe(
        name="3D",
        task=Task(dimensions=3),
        data=Preprocessing(size=(8, 8, 8)),
        model={"family": "monai", "dimensions": 3},
    )
    return write_model(path, description(volume).to_metadata(), size=(8, 8, 8))


def test_a_row_says_which_of_the_volumes_of_a_series_or_of_a_file_it_is_about(tmp_path):
    folder = tmp_path / "dicom"
    folder.mkdir()
    for echo in (1, 2):
        for z in (1, 0, 2):
            made = ct(z, name=f"{echo}.", sop_class=uid.MRImageStorage, modality="MR", EchoTime=10.0 * echo)
            made.save_as(folder / f"{echo}{z}.dcm", enforce_file_format=True)
    made = enhanced([0, 2, 4, 0, 2, 4])
    made.SeriesInstanceUID = "1.2.3.5"
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].StackID = str(k // 3)
    made.save_as(folder / "two stacks.dcm", enforce_file_format=True)
    assert predict(write_3d_model(tmp_path / "model.onnx"), folder, tmp_path / "out.csv").samples == 4
    told = [(row["series"], row["instance"], row["frame"]) for row in read(tmp_path / "out.csv")]
    echoes = [("1.2.3.4", f"1.2.9.{echo}.1", "") for echo in (1, 2)]  # the slice at 0 mm
    assert told == [*echoes, ("1.2.3.5", "1.2.9.1", "1"), ("1.2.3.5", "1.2.9.1", "4")]


def test_a_2d_image_is_refused_by_a_3d_model(tmp_path):
    path = write_3d_model(tmp_path / "model.onnx")
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    with pytest.raises(DataError, match="'wrong_dimensions': 1"):
        predict(path, tmp_path / "dicom", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    assert [row["code"] for row in read(tmp_path / "out.refused.csv")] == ["wrong_dimensions"]


def test_an_empty_folder_is_an_error_and_no_empty_table_of_predictions(model, tmp_path):
    (tmp_path / "dicom").mkdir()
    with pytest.raises(DataError, match="empty"):
        predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises(DataError, match="does not exist"):
        predict(model, tmp_path / "nowhere", tmp_path / "out.csv")
    with pytest.raises(DataError, match="is a file"):
        predict(model, model, tmp_path / "out.csv")


def test_a_run_that_breaks_leaves_the_earlier_tables_alone(model, tmp_path, monkeypatch):
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    (tmp_path / "out.csv").write_text("earlier")

    def broken(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(OnnxModel, "run", broken)
    with pytest.raises(RuntimeError):
        predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dicom", "model.onnx", "out.csv"]


def test_the_tables_are_readable_by_their_owner_alone(model, tmp_path):
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    for name in ("out.csv", "out.refused.csv"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_the_output_may_not_lie_among_the_images(model, tmp_path):
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    with pytest.raises(ConfigError, match="inside"):
        predict(model, tmp_path / "dicom", tmp_path / "dicom" / "out.csv")


@pytest.mark.parametrize("name", ["out.csv", "out.refused.csv"])
def test_a_folder_in_the_place_of_a_table_is_told_before_anything_is_predicted(name, model, tmp_path, monkeypatch):
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    (tmp_path / name).mkdir()
    monkeypatch.setattr(OnnxModel, "run", lambda *_: pytest.fail("predicted all the same"))
    with pytest.raises(ConfigError, match=rf"{name} is a folder"):
        predict(model, tmp_path / "dicom", tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dicom", "model.onnx", name])


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\rx", "\nx", "＝1"])
def test_a_cell_that_a_spreadsheet_would_run_gets_an_apostrophe(cell):
    assert _harmless(cell) == "'" + cell


@pytest.mark.parametrize("cell", ["", "patient 1", "0.5", "1-2", "a=b", "2.25.1"])
def test_a_harmless_cell_stays_as_it_is(cell):
    assert _harmless(cell) == cell


def test_identifiers_class_names_and_file_names_cannot_inject_formulas(tmp_path):
    approved = recipe(classes=("-none", "=HYPERLINK(1)"))
    path = write_model(tmp_path / "model.onnx", description(approved).to_metadata())
    write_dx(tmp_path / "dicom" / "0.dcm", 4, patient="=cmd|' /C calc'!A0")
    (tmp_path / "dicom" / "@note.txt").write_text("no DICOM")
    predict(path, tmp_path / "dicom", tmp_path / "out.csv")
    cells = [cell for name in ("out.csv", "out.refused.csv") for cell in every_cell(tmp_path / name)]
    assert "'=cmd|' /C calc'!A0" in cells
    assert "'=HYPERLINK(1)" in cells
    assert "'@note.txt" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")]


def every_cell(path):
    with path.open(newline="", encoding="utf-8") as table:
        return [cell for row in csv.reader(table) for cell in row]


@pytest.mark.parametrize("junk", [b"", b"junk", b"\x08\x0a" * 50])
def test_a_file_that_is_no_model_is_refused(junk, tmp_path):
    (tmp_path / "model.onnx").write_bytes(junk)
    with pytest.raises(ModelFileError, match="not an ONNX model"):
        OnnxModel(tmp_path / "model.onnx")


def test_a_missing_model_and_a_truncated_one_are_refused(model, tmp_path):
    with pytest.raises(ModelFileError, match="cannot be read"):
        OnnxModel(tmp_path / "none.onnx")
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ModelFileError):
        OnnxModel(model)


def test_a_model_of_another_maker_is_refused_in_words(tmp_path):
    path = write_model(tmp_path / "model.onnx", {"author": "somebody"})
    with pytest.raises(ModelFileError, match="no Fedicom description"):
        OnnxModel(path)


def replaced(key, value):
    return {**description(recipe()).to_metadata(), f"fedicom.{key}": value}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (replaced("format", "2"), "layout '2'"),
        (replaced("preprocessing", json.dumps({"size": [8, 8], "mean": 0.4})), "changed after export"),
        (replaced("recipe_id", "0" * 64), "changed after export"),
        (replaced("task", "{}"), "changed after export"),
        (replaced("preprocessing", '{"size": [8, 8], "colour": 1}'), "cannot be read by this version"),
        (replaced("recipe", "["), "cannot be read by this version"),
        (replaced("privacy", '{"a":' * 100_000), "cannot be read by this version"),
        (replaced("operating_threshold", "1.5"), "threshold 1.5"),
        ({k: v for k, v in description(recipe()).to_metadata().items() if k != "fedicom.weight_digest"}, "lacks"),
        (description(recipe(size=(9, 9))).to_metadata(), "the model file's graph"),
    ],
)
def test_a_description_that_is_wrong_or_was_changed_is_refused(metadata, words, tmp_path):
    path = write_model(tmp_path / "model.onnx", metadata)
    with pytest.raises(ModelFileError, match=words):
        OnnxModel(path)


def test_a_model_without_operating_point_leaves_the_column_empty(tmp_path):
    path = write_model(tmp_path / "model.onnx", description(recipe(), threshold=None).to_metadata())
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    summary = predict(path, tmp_path / "dicom", tmp_path / "out.csv")
    assert summary.positive is None
    assert [row["above_operating_point"] for row in read(tmp_path / "out.csv")] == [""]


def test_output_that_is_not_finite_is_refused_and_not_written(tmp_path):
    path = write_model(tmp_path / "model.onnx", description(recipe()).to_metadata(), offset=float("nan"))
    write_dx(tmp_path / "dicom" / "0.dcm", 0)
    with pytest.raises(DataError, match="'not_finite': 1"):
        predict(path, tmp_path / "dicom", tmp_path / "out.csv")


def test_prediction_needs_no_model_library():
    """onnxruntime alone runs the model: neither timm nor the training code is imported."""
    code = "import sys, common.predict; print([n for n in ('timm', 'common.models', 'onnx') if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
