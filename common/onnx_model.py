"""An exported model file: a graph, and the description that makes it usable without this repository.

Reading and running need onnxruntime only, no torch. The export's parity gate runs the file
through the same class as `fedicom predict`.

Everything a user needs stands in the file's `metadata_props`, each under `fedicom.`:

    format, version, created_by      this layout; the package that wrote it
    recipe, recipe_id                canonical JSON of what was trained, and its SHA-256
    weight_digest                    SHA-256 of the exchanged weights the graph was made from
    task, preprocessing              JSON parts of the recipe: what is told apart, and how an input is prepared
    classes, task_kind               the same class names and kind, for readers that want no more
    operating_threshold              on the probability of the second class of a binary task; empty: none was chosen
    metrics, privacy                 JSON as the coordinator gave it
    statement                        what the file is not for
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from common.config import Preprocessing, Task, as_plain
from common.errors import ModelFileError

FORMAT = "1"
INPUT = "x"
LOGITS = "logits"
PROBABILITIES = "probabilities"
STATEMENT = "Research use only. Not a medical device; not for diagnosis or treatment."
_PREFIX = "fedicom."
_AT_ONCE = 2**22
"""Numbers in the images of one pass: 64 of 224 x 224, four of 96 x 96 x 96, whose features take a gigabyte."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a model file says of itself."""

    version: str
    """Fedicom version that wrote the file."""
    created_by: str
    recipe: bytes
    """Canonical JSON of the whole recipe."""
    weight_digest: str
    task: Task
    data: Preprocessing
    operating_threshold: float | None
    """Binary tasks: a second-class probability at or above it counts as positive."""
    metrics: Mapping[str, float]
    privacy: Mapping[str, Any]

    @property
    def recipe_id(self) -> str:
        return hashlib.sha256(self.recipe).hexdigest()

    def to_metadata(self) -> dict[str, str]:
        """As `metadata_props`: text only, sorted by key, the same bytes for the same content."""
        threshold = self.operating_threshold
        values = {
            "format": FORMAT,
            "version": self.version,
            "created_by": self.created_by,
            "recipe": self.recipe.decode(),
            "recipe_id": self.recipe_id,
            "weight_digest": self.weight_digest,
            "task": _json(as_plain(self.task)),
            "preprocessing": _json(as_plain(self.data)),
            "classes": _json(list(self.task.classes)),
            "task_kind": self.task.kind,
            "operating_threshold": "" if threshold is None else repr(float(threshold)),
            "metrics": _json({name: float(value) for name, value in self.metrics.items()}),
            "privacy": _json(dict(self.privacy)),
            "statement": STATEMENT,
        }
        return {_PREFIX + key: values[key] for key in sorted(values)}

    @classmethod
    def from_metadata(cls, props: Mapping[str, str]) -> Description:
        """Reads `metadata_props` back.

        Raises:
            ModelFileError: The entries are absent, of another layout, or contradict each other.
        """
        found = {key.removeprefix(_PREFIX): value for key, value in props.items() if key.startswith(_PREFIX)}
        if "format" not in found:
            raise ModelFileError(
                "the model file has no Fedicom description, so its preprocessing and classes are unknown; "
                "use a model.onnx that Fedicom exported"
            )
        if found["format"] != FORMAT:
            raise ModelFileError(
                f"the model file's description has layout {found['format'][:20]!r}, this version reads {FORMAT!r}; "
                f"use Fedicom {found.get('version', 'unknown')[:40]}, which wrote it"
            )
        try:
            description = cls(
                version=found["version"],
                created_by=found["created_by"],
                recipe=found["recipe"].encode(),
                weight_digest=found["weight_digest"],
                task=TypeAdapter(Task).validate_json(found["task"]),
                data=TypeAdapter(Preprocessing).validate_json(found["preprocessing"]),
                operating_threshold=float(found["operating_threshold"]) if found["operating_threshold"] else None,
                metrics=_mapping(found["metrics"]),
                privacy=_mapping(found["privacy"]),
            )
            recipe = _mapping(found["recipe"])
        except KeyError as error:
            raise ModelFileError(f"the model file's description lacks {error}; export the model again") from None
        except (ValidationError, ValueError) as error:
            where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ""
            raise ModelFileError(
                f"the model file's description cannot be read by this version {where or ''}; "
                f"use Fedicom {found.get('version', 'unknown')[:40]}, which wrote it"
            ) from None
        # What is used for prediction must be what the federation approved by the recipe's hash
        if (
            description.recipe_id != found.get("recipe_id")
            or recipe.get("task") != json.loads(found["task"])
            or recipe.get("data") != json.loads(found["preprocessing"])
        ):
            raise ModelFileError("the model file's description does not fit its recipe id: it was changed after export")
        threshold = description.operating_threshold
        if not (threshold is None or 0 <= threshold <= 1):
            raise ModelFileError(
                f"the model file has operating threshold {threshold}; expected one within [0, 1]; "
                "export the model again"
            )
        return description


class OnnxModel:
    """A model file opened for running, on a GPU where onnxruntime has one, else on the CPU."""

    def __init__(self, path: Path, *, gpu: bool = True) -> None:
        """
        Raises:
            ModelFileError: The file is absent, no ONNX model, or not described as Fedicom does.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelFileError(
                f"the model file cannot be read: {error.strerror}; give the path of a model.onnx"
            ) from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        import onnxruntime  # here, for the start of a run does not need it

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        offered = onnxruntime.get_available_providers()
        # TF32, onnxruntime's default on a GPU, moves probabilities by more than the export's parity gate allows
        cuda = [("CUDAExecutionProvider", {"use_tf32": "0"})] if gpu and "CUDAExecutionProvider" in offered else []
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=[*cuda, "CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own for each kind of damage
            raise ModelFileError(
                f"the model file ({len(data)} bytes) is not an ONNX model that onnxruntime "
                f"{onnxruntime.__version__} can load ({type(error).__name__}); export or copy it again"
            ) from None
        self.description = Description.from_metadata(self._session.get_modelmeta().custom_metadata_map)
        self._check_graph()

    def run(self, x_N: Array) -> tuple[Array, Array]:
        """Logits and probabilities, each float32 (n, classes), of prepared samples (n, 1, *size), some at a time."""
        step = max(1, min(64, _AT_ONCE // math.prod(x_N.shape[1:])))
        parts = [
            self._session.run([LOGITS, PROBABILITIES], {INPUT: np.ascontiguousarray(x_N[at : at + step], np.float32)})
            for at in range(0, max(1, len(x_N)), step)
        ]
        logits, probabilities = (np.concatenate(values) for values in zip(*parts, strict=True))
        return logits, probabilities

    def _check_graph(self) -> None:
        task, size = self.description.task, self.description.data.size
        inputs = [(value.name, value.type, value.shape[1:]) for value in self._session.get_inputs()]
        outputs = {value.name: value.shape[1:] for value in self._session.get_outputs()}
        expected = {LOGITS: [task.outputs], PROBABILITIES: [task.outputs]}
        if inputs != [(INPUT, "tensor(float)", [1, *size])] or outputs != expected:
            raise ModelFileError(
                f"the model file's graph has inputs {inputs} and outputs {outputs}; its description says "
                f"{INPUT} (batch, 1, {', '.join(map(str, size))}) and {task.outputs} classes; export the model again"
            )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("expected a JSON object, got thousands in each other") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value
