"""The global model as a file that runs without this repository, written only when it computes what torch computes."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.adaptation import merge
from common.config import Recipe
from common.errors import ExportError
from common.inference import logits
from common.metrics import probabilities
from common.models import set_weights
from common.onnx_model import INPUT, LOGITS, PROBABILITIES, Description, OnnxModel
from common.standardisation import fold
from common.storage import commit, storing
from common.weights import Weights
from server.planes import in_planes

if TYPE_CHECKING:
    import onnx

PARITY = 1e-4
"""Largest allowed difference of a probability between torch and the written file."""
OPSET = 20
_LIMIT_BYTES = 2**31 - 2**20  # protobuf's 2 GB, with room for the graph itself

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model file that passed its checks."""

    path: Path
    sha256: str
    max_abs_difference: float
    """Of probabilities between torch and the file, over the reference samples."""
    bytes: int
    opset: int | None = None
    """ONNX operator set; None for TorchScript."""
    description: Description | None = field(default=None, repr=False)
    """What the ONNX file says of itself."""


class _Served(nn.Module):
    """The network with what a user of the file wants beside logits."""

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network = network
        self.kind = kind

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw = self.network(x)
        return raw, raw.sigmoid() if self.kind == "multilabel" else raw.softmax(dim=1)


def export_onnx(
    model: nn.Module,
    recipe: Recipe,
    weights: Weights,
    path: Path,
    *,
    reference_x: Array,
    operating_threshold: float | None = None,
    metrics: Mapping[str, float] | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes one self-contained ONNX file with a dynamic batch, or nothing.

    Input `x` float32 (batch, 1, *size) as `common.imaging.prepare` makes it; outputs `logits`
    and `probabilities`, (batch, classes). The same weights, recipe and package versions give
    the same bytes: no time, path or stack trace is written.

    Args:
        model: The recipe's network; it is copied, neither moved nor changed.
        weights: The global weights to write; they replace the model's own.
        reference_x: Real prepared samples (n, 1, *size) on which the file must agree with torch.
        operating_threshold: Of binary tasks, on the scale of the written probabilities.
        metrics: Test results to carry along; entries that are not finite are left out.
        privacy: What was guaranteed, JSON types only.

    Raises:
        ExportError: torch and onnxruntime differ by more than 1e-4, or a check before that failed.
        StorageError: The disk is full or the folder cannot be written.
    """
    import onnx  # here, as in all of the end of a run: its start shall not wait for it

    _check_reference(reference_x, recipe)
    if operating_threshold is not None and not 0 <= operating_threshold <= 1:
        raise ExportError(f"operating threshold is {operating_threshold}; expected a probability, or none")
    network = _with_weights(model, weights)
    description = Description(
        version=_version("fedicom"),
        created_by=f"Fedicom {_version('fedicom')}, torch {torch.__version__.split('+')[0]}, onnx {onnx.__version__}",
        recipe=recipe.canonical,
        weight_digest=weights.digest,
        task=recipe.task,
        data=recipe.data,
        operating_threshold=operating_threshold,
        metrics={name: value for name, value in (metrics or {}).items() if np.isfinite(value)},
        privacy=dict(privacy or {}),
    )
    # As bytes, not as the exporter's file: nothing can land in an external data file beside it
    example = torch.from_numpy(_example(reference_x))
    data = _graph(_Served(in_planes(network, example), recipe.task.kind).eval(), example, description)
    with _partial(path) as part:
        with storing(path.name):
            _write(part, data)
        try:
            onnx.checker.check_model(str(part), full_check=True)
        except Exception as error:  # checker and shape inference raise different classes
            raise ExportError(f"the ONNX checker refused the graph: {error}; {path.name} was not written") from None
        served = OnnxModel(part, gpu=False)
        expected = _expected(network, reference_x, recipe)
        one_by_one = np.concatenate([served.run(reference_x[i : i + 1])[1] for i in range(min(len(reference_x), 8))])
        difference = max(
            _difference(served.run(reference_x)[1], expected),
            _difference(one_by_one, expected[: len(one_by_one)]),
        )
        _gate(difference, path)
        with storing(path.name):
            commit(part, path)
    return Exported(
        path=path,
        sha256=served.sha256,
        max_abs_difference=difference,
        bytes=len(data),
        opset=OPSET,
        description=description,
    )


def export_torchscript(
    model: nn.Module, recipe: Recipe, weights: Weights, path: Path, *, reference_x: Array
) -> Exported:
    """Writes a TorchScript trace of the network (logits only) under the same parity gate; for runtimes without ONNX.

    TorchScript is deprecated upstream and such a file is loaded by an unpickler: it carries
    no description and `fedicom predict` does not read it.

    Raises:
        ExportError: The loaded trace differs from the model by more than 1e-4 in a probability.
        StorageError: The disk is full or the folder cannot be written.
    """
    _check_reference(reference_x, recipe)
    network = _with_weights(model, weights)
    with _partial(path) as part, _quiet():
        trace = torch.jit.trace(network, torch.from_numpy(_example(reference_x)), check_trace=False)
        with storing(path.name):
            try:
                trace.save(str(part))
            except RuntimeError as error:  # torch's writer hides the system's error
                raise OSError(str(error)) from None
        everything = np.arange(len(reference_x))
        loaded = logits(torch.jit.load(str(part), map_location="cpu"), reference_x, everything, device="cpu")
        difference = _difference(probabilities(loaded, recipe.task.kind), _expected(network, reference_x, recipe))
        _gate(difference, path)
        data = part.read_bytes()
        with storing(path.name):
            commit(part, path)
    return Exported(path=path, sha256=hashlib.sha256(data).hexdigest(), max_abs_difference=difference, bytes=len(data))


def _check_reference(reference_x: Array, recipe: Recipe) -> None:
    shape = (1, *recipe.data.size)
    if reference_x.ndim != len(shape) + 1 or reference_x.shape[1:] != shape or not len(reference_x):
        raise ExportError(
            f"reference samples have shape {reference_x.shape}, expected (n, {', '.join(map(str, shape))}) with n of "
            "at least 1: nothing to compare on is no proof; give prepared samples"
        )
    if not np.isfinite(reference_x).all():
        raise ExportError("reference samples hold numbers that are not finite; give samples that prepare() made")


def _with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    if not weights.finite:
        raise ExportError("the weights hold numbers that are not finite; training diverged, export an earlier round")
    network = copy.deepcopy(model).cpu().float().eval()
    set_weights(network, weights)
    merge(network)
    fold(network)
    network.requires_grad_(False)  # after set_weights, which goes by it; halves the tracing time
    if 4 * sum(p.numel() for p in network.parameters()) > _LIMIT_BYTES:
        raise ExportError("the model is over 2 GB, more than one ONNX file can hold; choose a smaller network")
    return network


def _example(reference_x: Array) -> Array:
    # torch.export takes a batch of 1 for a constant; two equal samples are as good
    return np.ascontiguousarray(np.resize(reference_x, (2, *reference_x.shape[1:])), dtype=np.float32)


def _graph(served: nn.Module, example: torch.Tensor, description: Description) -> bytes:
    """The ONNX model as bytes that depend on weights, recipe and versions only."""
    with _quiet():
        try:
            program = torch.onnx.export(
                served,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**16)},),
                input_names=[INPUT],
                output_names=[LOGITS, PROBABILITIES],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:  # pages, with the paths of this machine
            why = str(error.__cause__ or error).strip().splitlines()[0]
            raise ExportError(
                f"torch cannot write this network as ONNX: {why}; its weights are in the run's checkpoints; choose "
                "another network (model), or other versions of torch and onnxscript"
            ) from None
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    # The exporter notes stack traces with the paths of this machine at every node
    graph = proto.graph
    for noted in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, proto):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    proto.producer_name, proto.producer_version = "Fedicom", description.version
    for key, value in description.to_metadata().items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _expected(network: nn.Module, reference_x: Array, recipe: Recipe) -> Array:
    raw = logits(network, reference_x, np.arange(len(reference_x)), device="cpu")
    return probabilities(raw, recipe.task.kind)


def _difference(got: Array, expected: Array) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got.astype(np.float64) - expected).max())


def _gate(difference: float, path: Path) -> None:
    if not difference <= PARITY:  # also when it is NaN
        raise ExportError(
            f"the exported graph differs from the model by {difference:.2e} in a probability, at most {PARITY:.0e} "
            f"is allowed; {path.name} was not written; try another network or versions of torch and onnxscript"
        )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside `path` for the file until it has passed; whatever is left under it is removed."""
    with storing(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes the exporter's own advice; its errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
