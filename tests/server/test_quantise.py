"""The 8-bit file: offered where it is as good and fast, refused with the reason elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from common.config import ModelConfig, Preprocessing, Recipe, Task
from common.errors import ExportError
from common.models import build, get_weights
from common.onnx_model import OnnxModel
from common.samples import Samples
from server import quantise
from server.export import export_onnx
from server.quantise import Quantised, export_int8, told

RECIPE = Recipe(
    name="eight bits",
    data=Preprocessing(size=(16, 16)),
    model=ModelConfig(family="monai", name="resnet10", width=0.125, stem="small"),
)
PATIENTS = 180


def samples(patients: int = PATIENTS) -> Samples:
    """Images whose left or right half is brighter, two a patient."""
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(patients) % 2, 2)
    x = rng.normal(0, 1, (2 * patients, 1, 16, 16)).astype(np.float32)
    x[targets == 0, :, :, :8] += 0.4
    x[targets == 1, :, :, 8:] += 0.4
    return Samples(
        x_N=x, targets_N=targets.astype(np.int64), patient_N=np.repeat(np.arange(patients), 2).astype(np.int64),
        patients=tuple(f"p{number:03d}" for number in range(patients)), subgroups={}, digest="0" * 64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learnt the two halves, exported."""
    torch.manual_seed(0)
    network, test = build(RECIPE).train(), samples()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(test.x_N)), torch.from_numpy(test.targets_N))
        loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("eight") / "model.onnx"
    export_onnx(network, RECIPE, get_weights(network), path, reference_x=test.x_N[:8], metrics={"auroc": 0.5})
    return path


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is, is not what these tests ask."""
    monkeypatch.setattr(quantise, "_speed", lambda *_: 2.5)


@pytest.mark.usefixtures("fast")
def test_the_file_says_what_the_float_file_says_and_convolves_with_8_bits(model, tmp_path):
    made = export_int8(model, RECIPE, samples(), tmp_path / quantise.FILE)
    plain, small = OnnxModel(model, gpu=False), OnnxModel(made.path, gpu=False)
    assert small.description == plain.description
    assert made.sha256 == small.sha256
    difference = np.abs(plain.run(samples().x_N)[1] - small.run(samples().x_N)[1]).max()
    assert 0 < difference < 0.1
    graph = onnx.load(str(made.path)).graph
    weights = {value.name: value.data_type for value in graph.initializer}
    unpacked = {node.output[0]: weights.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions
    assert {unpacked[node.input[1]] for node in convolutions} == {onnx.TensorProto.INT8}


@pytest.mark.usefixtures("fast")
def test_nobody_who_gave_a_range_is_judged_on(model, tmp_path, monkeypatch):
    seen: list[np.ndarray] = []
    monkeypatch.setattr(quantise, "quantised", lambda path, images: (seen.extend(images), Path(path).read_bytes())[1])
    test = samples()
    made = export_int8(model, RECIPE, test, tmp_path / quantise.FILE)
    given = {int(test.patient_N[np.flatnonzero((test.x_N == image).all((1, 2, 3)))[0]]) for image in seen}
    assert len(given) == 64
    assert made.patients == PATIENTS - 64
    assert made.auroc[0] == made.auroc[1]


@pytest.mark.usefixtures("fast")
def test_equal_inputs_give_equal_bytes(model, tmp_path):
    a, b = (export_int8(model, RECIPE, samples(), tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert a.path.read_bytes() == b.path.read_bytes()


@pytest.mark.usefixtures("fast")
def test_ranges_that_do_not_fit_cost_accuracy_and_are_refused(model, tmp_path, monkeypatch):
    right = quantise.quantised
    monkeypatch.setattr(quantise, "quantised", lambda path, images: right(path, (image * 0.01 for image in images)))
    with pytest.raises(ExportError, match=r"not offered: its (AUROC is lower|calibration error is higher) by"):
        export_int8(model, RECIPE, samples(), tmp_path / quantise.FILE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_twice_as_fast_is_refused_with_a_number_below_two(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "_speed", lambda *_: 1.96)
    with pytest.raises(ExportError, match=r"not offered: it is 1\.96 times as fast"):
        export_int8(model, RECIPE, samples(), tmp_path / quantise.FILE)


@pytest.mark.usefixtures("fast")
def test_a_loss_just_above_the_limit_is_told_as_above_it(model, tmp_path, monkeypatch):
    judged = iter([SimpleNamespace(values={"auroc": value, "ece": 0.1}) for value in (0.9054, 0.9)])
    monkeypatch.setattr(quantise, "_judged", lambda *_: next(judged))
    with pytest.raises(ExportError, match=r"its AUROC is lower by 0\.0054, at most 0\.005 is allowed"):
        export_int8(model, RECIPE, samples(), tmp_path / quantise.FILE)


def test_a_file_is_as_fast_as_itself(model):
    assert 0.3 < quantise._speed(model, model, samples().x_N[:8]) < 3


@pytest.mark.parametrize(("test", "got"), [(None, "got 0"), (samples(163), "got 163")])
def test_too_few_patients_are_refused(model, tmp_path, test, got):
    with pytest.raises(ExportError, match=f"{got} central test patients, expected 164"):
        export_int8(model, RECIPE, test, tmp_path / quantise.FILE)


def test_patients_of_one_class_alone_are_no_measure_and_the_reason_says_so(model, tmp_path):
    test = samples()
    with pytest.raises(ExportError, match="the 116 central test patients that judge it give no AUROC"):  # 180 - 64
        export_int8(model, RECIPE, replace(test, targets_N=np.zeros_like(test.targets_N)), tmp_path / quantise.FILE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fast")
def test_volumes_are_convolved_with_8_bits_too(tmp_path, monkeypatch):
    deep = Recipe(
        name="deep", task=Task(dimensions=3), data=Preprocessing(size=(8, 16, 16)),
        model=ModelConfig(family="monai", name="resnet10", width=0.125, stem="small", dimensions=3),
    )  # fmt: skip
    flat = samples()
    test = replace(flat, x_N=np.repeat(flat.x_N[:, :, None], 8, axis=2))
    network = build(deep)
    export_onnx(network, deep, get_weights(network), tmp_path / "model.onnx", reference_x=test.x_N[:8])
    monkeypatch.setattr(quantise, "_NUMBERS", 3 * 8 * 16 * 16)  # three volumes at once
    monkeypatch.setattr(quantise, "MAX_AUROC_LOSS", 1)  # it has learnt nothing
    monkeypatch.setattr(quantise, "MAX_ECE_GAIN", 1)
    made = export_int8(tmp_path / "model.onnx", deep, test, tmp_path / quantise.FILE)
    assert made.patients == PATIENTS - 64
    graph = onnx.load(str(made.path)).graph
    eight = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.INT8}
    assert sum(node.op_type == "DequantizeLinear" and node.input[0] in eight for node in graph.node) > 5
    difference = np.abs(
        OnnxModel(tmp_path / "model.onnx").run(test.x_N[:8])[1] - OnnxModel(made.path).run(test.x_N[:8])[1]
    ).max()
    assert difference < 0.1


def test_the_summary_says_why_there_is_none():
    assert json.loads(json.dumps(told("not offered: too slow"))) == {"file": None, "why": "not offered: too slow"}
    made = Quantised(
        path=Path("model.int8.onnx"), sha256="0" * 64, bytes=1, patients=100, auroc=(0.9, 0.899), ece=(0.02, 0.021),
        speed=3.04,
    )  # fmt: skip
    assert told(made)["speed"] == 3.04
    assert "3.0 times as fast" in made.sentence
