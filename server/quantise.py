"""The exported model with 8-bit convolutions, written only where it is much faster and as good.

Static quantisation in QDQ form (onnxruntime): ranges of the activations come from some of the coordinator's own test
patients, and the file is judged on the others. Weights have 7 bits, so that processors without 8-bit dot products
(AVX2 without VNNI) do not overflow.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.config import Recipe
from common.errors import ExportError
from common.metrics import Metrics, score
from common.onnx_model import INPUT, OnnxModel
from common.samples import Samples
from common.shard import Batches
from common.storage import storing, write_whole

FILE = "model.int8.onnx"
MAX_AUROC_LOSS = 0.005
MAX_ECE_GAIN = 0.01
MIN_SPEED = 2.0
_CALIBRATION_PATIENTS = 64
_MIN_PATIENTS = 100
"""Judged on fewer, an AUROC's third digit says nothing."""
_TURNS, _BATCH = 5, 8
_NUMBERS = 2**22
"""In the images that are judged at once: 64 of 224 x 224, four of 96 x 96 x 96, whose features take a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A file that passed, and what it was compared on."""

    path: Path
    sha256: str
    bytes: int
    patients: int
    """Judged on; none of them gave a range."""
    auroc: tuple[float, float]
    """Of the float32 file and of this one."""
    ece: tuple[float, float]
    speed: float
    """Of the float32 file's time over this one's: one thread, batches of 8 or less, this machine, median of five."""

    @property
    def sentence(self) -> str:
        """For the report."""
        return (
            f"{self.path.name} computes with 8 bits: {self.speed:.1f} times as fast here on one thread, AUROC "
            f"{self.auroc[1]:.3f} (float32: {self.auroc[0]:.3f}), calibration error {self.ece[1]:.3f} "
            f"({self.ece[0]:.3f}), on {self.patients} central test patients of whom none gave its ranges"
        )


def export_int8(model: Path, recipe: Recipe, test: Samples | None, path: Path) -> Quantised:
    """Writes the 8-bit file beside the exported one, or nothing.

    Args:
        model: The file of `export_onnx`, with its description, which the new file takes over.
        test: The coordinator's own samples; a random part of the patients gives the ranges of the activations.

    Raises:
        ExportError: It is not offered, and why: too few patients to judge it on, less than twice as fast, an AUROC
            more than .005 lower or a calibration error more than .01 higher.
        StorageError: The disk is full or not writable.
    """
    patients = np.unique(test.patient_N) if test is not None else np.empty(0, np.int64)
    if test is None or len(patients) < _CALIBRATION_PATIENTS + _MIN_PATIENTS:
        raise ExportError(
            f"not offered: got {len(patients)} central test patients, expected {_CALIBRATION_PATIENTS + _MIN_PATIENTS} "
            "at least, some to find the ranges with and the others to judge it on"
        )
    rng = np.random.default_rng(recipe.seed)
    given_N = np.isin(test.patient_N, rng.choice(patients, _CALIBRATION_PATIENTS, replace=False))
    batches = Batches(test.x_N)
    data = quantised(model, (np.array(batches(row)) for row in np.flatnonzero(given_N)[:, None]))
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / FILE
        candidate.write_bytes(data)
        judged_N = np.flatnonzero(~given_N)
        plain, small = (_judged(OnnxModel(file, gpu=False), test, judged_N, recipe) for file in (model, candidate))
        speed = _speed(model, candidate, np.array(batches(judged_N[: min(_BATCH, _at_once(test))])))
    auroc = plain.values.get("auroc", math.nan), small.values.get("auroc", math.nan)
    ece = plain.values.get("ece", math.nan), small.values.get("ece", math.nan)
    if math.isnan(auroc[0]):
        raise ExportError(
            f"not offered: the {len(patients) - _CALIBRATION_PATIENTS} central test patients that judge it give no "
            "AUROC; expected patients of two classes, and at least evaluation.min_cell"
        )
    for what, got, limit in (
        ("its AUROC is lower", auroc[0] - auroc[1], MAX_AUROC_LOSS),
        ("its calibration error is higher", ece[1] - ece[0], MAX_ECE_GAIN),
    ):
        if not got <= limit:
            raise ExportError(f"not offered: {what} by {got:.4f}, at most {limit} is allowed")
    if not speed >= MIN_SPEED:
        raise ExportError(
            f"not offered: it is {speed:.2f} times as fast as the float32 file on this machine, expected 2 at least"
        )
    write_whole(path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    return Quantised(
        path=path, sha256=sha256, bytes=len(data), patients=small.patients, auroc=auroc, ece=ece, speed=speed
    )


def quantised(model: Path, images: Iterator[npt.NDArray[np.float32]]) -> bytes:
    """The file with 8-bit convolutions and the same description; `images` (1, 1, *size) give the ranges."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            image = next(images, None)
            return None if image is None else {INPUT: image}

    with storing(FILE), _quiet(), tempfile.TemporaryDirectory() as folder:
        folded, made = Path(folder) / "folded.onnx", Path(folder) / "made.onnx"
        quant_pre_process(str(model), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded), str(made), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
            per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        proto, described = onnx.load(str(made)), onnx.load(str(model))
    del proto.metadata_props[:]
    proto.metadata_props.extend(described.metadata_props)
    proto.producer_name, proto.producer_version = described.producer_name, described.producer_version
    return bytes(proto.SerializeToString(deterministic=True))


def _judged(model: OnnxModel, test: Samples, index_N: npt.NDArray[np.int64], recipe: Recipe) -> Metrics:
    batches, n = Batches(test.x_N), _at_once(test)
    parts = [model.run(batches(index_N[i : i + n]))[1] for i in range(0, len(index_N), n)]
    return score(
        test.targets_N[index_N], np.concatenate(parts), test.patient_N[index_N], recipe.task, recipe.evaluation,
        seed=recipe.seed,
    )  # fmt: skip


def _at_once(test: Samples) -> int:
    return min(64, max(1, _NUMBERS // math.prod(test.x_N.shape[1:])))


def _speed(plain: Path, small: Path, x_B: npt.NDArray[np.float32]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]) for file in (plain, small)
    ]
    repeats = 1
    ratios: list[float] = []
    while len(ratios) < _TURNS:
        seconds = []
        for session in sessions:
            session.run(None, {INPUT: x_B})
            began = time.perf_counter()
            for _ in range(repeats):
                session.run(None, {INPUT: x_B})
            seconds.append(time.perf_counter() - began)
        if min(seconds) < 0.01 and repeats < 4096:  # shorter than the clock and the scheduler can tell
            repeats *= 4
            continue
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's tool advises through the root logger; its errors still come as exceptions."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def told(made: Quantised | str) -> Mapping[str, Any]:
    """For summary.json."""
    if isinstance(made, str):
        return {"file": None, "why": made}
    return {
        "file": made.path.name,
        "sha256": made.sha256,
        "auroc": list(made.auroc),
        "ece": list(made.ece),
        "speed": round(made.speed, 2),
        "patients": made.patients,
    }
