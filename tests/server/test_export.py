"""The exported file against torch, on networks of both libraries."""

import copy
import csv
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from common.config import ModelConfig, Preprocessing, Recipe, Task, recipe_from_json
from common.errors import ExchangeError, ExportError
from common.imaging import Image, iterate_folder, prepare
from common.models import build, get_weights
from common.onnx_model import OnnxModel
from common.predict import predict
from common.weights import Weights
from server import export
from tests.common.test_predict import save_dx
from tests.server.graphs import convolved_dimensions


def recipe_for(size, *, kind="binary", classes=("negative", "positive"), **model):
    dimensions = len(size)
    return Recipe(
        name="export test",
        task=Task(kind=kind, dimensions=dimensions, classes=classes),
        data=Preprocessing(size=size),
        model=ModelConfig(dimensions=dimensions, **model),
    )


SMALL = recipe_for((24, 24), family="monai", name="resnet10", width=0.125)


def trained(recipe, seed=0):
    """A new network, and weights whose running statistics are those of data, as after training."""
    model = build(recipe)
    pupil = build(dataclasses.replace(recipe, seed=seed))
    for module in pupil.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        pupil.train()(torch.from_numpy(reference(recipe, n=6, seed=seed)))
    return model, get_weights(pupil)


def reference(recipe, n=3, seed=1):
    return np.random.default_rng(seed).random((n, 1, *recipe.data.size), dtype=np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One small export that several tests look at; nobody writes to it."""
    model, weights = trained(SMALL)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    made = export.export_onnx(
        model,
        SMALL,
        weights,
        path,
        reference_x=reference(SMALL),
        operating_threshold=0.4,
        metrics={"auroc": 0.75, "auprc": float("nan")},
        privacy={"mechanism": "none"},
    )
    return model, weights, made


def test_low_rank_additions_are_merged_into_the_file(tmp_path):
    start = tmp_path / "start.safetensors"
    save_file({name: value.contiguous() for name, value in build(SMALL).state_dict().items()}, start)
    model = dataclasses.replace(
        SMALL.model,
        trainable="lora",
        weights_file=str(start),
        weights_sha256=hashlib.sha256(start.read_bytes()).hexdigest(),
    )
    recipe = dataclasses.replace(SMALL, model=model)
    network = build(recipe)
    rng = np.random.default_rng(0)
    shapes = get_weights(network).shapes
    weights = Weights(
        {name: np.float32(0.1) * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    )
    path = tmp_path / "model.onnx"
    export.export_onnx(network, recipe, weights, path, reference_x=reference(recipe))
    names = {value.name for value in onnx.load(path).graph.initializer}
    assert not any("lora" in name for name in names)
    export.set_weights(network, weights)
    x = reference(recipe, n=4, seed=7)
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(OnnxModel(path).run(x)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_for((32, 32), family="timm", name="resnet18", stem="small"),
        recipe_for((32, 32), family="timm", name="efficientnet_b0"),
        recipe_for((32, 32), family="timm", name="resnet18", stem="small", norm="group_ws"),
        recipe_for((16, 16, 16), family="monai", name="resnet10", width=0.25, norm="group_ws"),
        recipe_for((32, 32), family="timm", name="vit_tiny_patch16_224"),
        recipe_for((16, 16, 16), family="monai", name="resnet18", width=0.25),
        recipe_for((32, 32, 32), family="monai", name="densenet121"),
    ],
    ids=lambda recipe: f"{recipe.model.name} {recipe.task.dimensions}D",
)
def test_the_file_computes_what_torch_computes_at_any_batch_size(recipe, tmp_path):
    model, weights = trained(recipe)
    x = reference(recipe, n=5)
    made = export.export_onnx(model, recipe, weights, tmp_path / "model.onnx", reference_x=x[:3])
    export.set_weights(model, weights)
    with torch.inference_mode():
        expected = model.eval()(torch.from_numpy(x)).softmax(1).numpy()
    assert np.ptp(expected[:, 0]) > 1e-3, "equal outputs would prove nothing"
    served = OnnxModel(made.path)
    for n in (1, 2, 5):
        np.testing.assert_allclose(served.run(x[:n])[1], expected[:n], atol=1e-4)
    assert made.max_abs_difference <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "weights belong into the one file"
    if recipe.task.dimensions == 3:
        assert convolved_dimensions(made.path) == {2}, "see server.planes"


def altered(made, change):
    """The file with the weights of the first class changed."""
    proto = onnx.load(made.path)
    head = next(
        value
        for value in proto.graph.initializer
        if list(value.dims)[:1] == [2] and value.data_type == onnx.TensorProto.FLOAT
    )
    array = onnx.numpy_helper.to_array(head).copy()
    array[0] += change
    head.CopyFrom(onnx.numpy_helper.from_array(array, head.name))
    return proto.SerializeToString()


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_graph_that_differs_is_refused_and_no_file_is_left(small, change, tmp_path, monkeypatch):
    model, weights, made = small
    monkeypatch.setattr(export, "_graph", lambda *_: altered(made, change))
    with pytest.raises(ExportError, match="differs from the model"):
        export.export_onnx(model, SMALL, weights, tmp_path / "model.onnx", reference_x=reference(SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_torch_cannot_write_is_told_in_one_line(small, tmp_path):
    model, weights, _ = small

    class Forked(type(model)):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    forked = copy.deepcopy(model)
    forked.__class__ = Forked
    with pytest.raises(ExportError, match=r"^torch cannot write this network as ONNX: Could not guard [^\n]*$"):
        export.export_onnx(forked, SMALL, weights, tmp_path / "model.onnx", reference_x=reference(SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_earlier_file_alone(small, tmp_path, monkeypatch):
    model, weights, made = small
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    monkeypatch.setattr(export, "_graph", lambda *_: altered(made, 1.0))
    with pytest.raises(ExportError):
        export.export_onnx(model, SMALL, weights, tmp_path / "model.onnx", reference_x=reference(SMALL))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.onnx", b"earlier")]


def test_a_file_made_of_other_weights_is_refused(small, tmp_path, monkeypatch):
    model, weights, made = small
    monkeypatch.setattr(export, "_graph", lambda *_: made.path.read_bytes())
    export.export_onnx(model, SMALL, weights, tmp_path / "good.onnx", reference_x=reference(SMALL))
    _, others = trained(SMALL, seed=5)
    with pytest.raises(ExportError):
        export.export_onnx(model, SMALL, others, tmp_path / "bad.onnx", reference_x=reference(SMALL))


def test_the_same_weights_give_the_same_bytes(small, tmp_path):
    model, weights, made = small
    again = export.export_onnx(
        model, SMALL, weights, tmp_path / "again.onnx", reference_x=reference(SMALL, n=4, seed=9),
        operating_threshold=0.4, metrics={"auroc": 0.75}, privacy={"mechanism": "none"},
    )  # fmt: skip
    assert again.sha256 == made.sha256
    assert again.path.read_bytes() == made.path.read_bytes()


def test_the_description_comes_back_as_it_went_in(small):
    _, weights, made = small
    described = OnnxModel(made.path).description
    assert described == made.description
    assert recipe_from_json(described.recipe) == SMALL
    assert described.recipe_id == SMALL.id
    assert described.weight_digest == weights.digest
    assert (described.task, described.data) == (SMALL.task, SMALL.data)
    assert described.operating_threshold == 0.4
    assert described.metrics == {"auroc": 0.75}, "what is not a number is left out"


def test_any_onnx_reader_finds_the_description(small):
    props = {entry.key: entry.value for entry in onnx.load(small[2].path).metadata_props}
    assert props["fedicom.classes"] == '["negative","positive"]'
    assert props["fedicom.recipe_id"] == SMALL.id
    assert props["fedicom.operating_threshold"] == "0.4"
    assert '"size":[24,24]' in props["fedicom.preprocessing"]
    assert "Not a medical device" in props["fedicom.statement"]


def test_no_path_of_the_exporting_machine_is_in_the_file(small):
    data = small[2].path.read_bytes()
    for word in (b"site-packages", b".py", b"stack_trace", str(Path.cwd()).encode()):
        assert word not in data


def test_the_callers_model_is_left_as_it_was(tmp_path, small, monkeypatch):
    model, weights, made = small
    model.train()
    before = get_weights(model).digest
    monkeypatch.setattr(export, "_graph", lambda *_: made.path.read_bytes())
    export.export_onnx(model, SMALL, weights, tmp_path / "model.onnx", reference_x=reference(SMALL))
    assert model.training
    assert get_weights(model).digest == before != weights.digest


def test_multilabel_probabilities_are_sigmoids_of_logits(tmp_path):
    recipe = dataclasses.replace(SMALL, task=Task(kind="multilabel", classes=("a", "b", "c")))
    model, weights = trained(recipe)
    x = reference(recipe)
    made = export.export_onnx(model, recipe, weights, tmp_path / "model.onnx", reference_x=x)
    logits, probabilities = OnnxModel(made.path).run(x)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_predict_gives_torchs_probabilities_on_a_dicom_folder(small, tmp_path):
    model, weights, made = small
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number in range(3):
        write_dx(folder / f"{number}.dcm", number)
    summary = predict(made.path, folder, tmp_path / "out.csv")
    items = [item for item in iterate_folder(folder) if isinstance(item, Image)]
    export.set_weights(model, weights)
    with torch.inference_mode():
        x = torch.from_numpy(np.stack([prepare(item, SMALL.data) for item in items]))
        expected = model.eval()(x).softmax(1).numpy()
    with (tmp_path / "out.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert summary.samples == len(rows) == 3
    assert [row["patient"] for row in rows] == [item.source.patient_id for item in items]
    got = [[float(row["probability_negative"]), float(row["probability_positive"])] for row in rows]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.ptp(expected[:, 1]) > 1e-3
    assert [row["above_operating_point"] for row in rows] == ["yes" if p >= 0.4 else "no" for p in expected[:, 1]]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((0, 1, 24, 24), np.float32), "no proof"),
        (np.zeros((2, 24, 24), np.float32), "have shape"),
        (np.full((2, 1, 24, 24), np.nan, np.float32), "not finite"),
    ],
)
def test_reference_samples_that_prove_nothing_are_refused(x, words, small, tmp_path):
    with pytest.raises(ExportError, match=words):
        export.export_onnx(small[0], SMALL, small[1], tmp_path / "model.onnx", reference_x=x)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_or_of_another_network_are_refused(small, tmp_path):
    model, weights, _ = small
    broken = Weights({name: np.full_like(array, np.inf) for name, array in weights.items()})
    with pytest.raises(ExportError, match="not finite"):
        export.export_onnx(model, SMALL, broken, tmp_path / "m.onnx", reference_x=reference(SMALL))
    with pytest.raises(ExchangeError):
        export.export_onnx(model, SMALL, Weights({}), tmp_path / "m.onnx", reference_x=reference(SMALL))


def test_the_torchscript_trace_gives_the_models_logits(small, tmp_path):
    model, weights, _ = small
    x = reference(SMALL, n=4)
    made = export.export_torchscript(model, SMALL, weights, tmp_path / "model.ts.pt", reference_x=x)
    export.set_weights(model, weights)
    with torch.inference_mode():
        expected = model.eval()(torch.from_numpy(x))
        got = torch.jit.load(str(made.path))(torch.from_numpy(x))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert made.max_abs_difference <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.ts.pt"]


def write_dx(path, number):
    """A radiograph with a bright square whose place and strength depend on the number."""
    pixels = np.random.default_rng(number).integers(0, 200, (40, 36)).astype(np.uint16)
    pixels[4 + 5 * number : 20 + 5 * number, 6:20] += 800 * (number + 1)
    save_dx(path, number, pixels)
