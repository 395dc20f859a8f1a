"""A round's state on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import StorageError
from common.storage import private_folder, write_whole
from common.weights import Weights
from server.rounds import RoundReport, ServerState

KEEP = 2
"""Checkpoints kept; the older ones are removed after a newer one is safely on disk."""

_HISTORY = TypeAdapter(tuple[RoundReport, ...])


def write(state: ServerState, folder: Path) -> Path:
    """Writes `round-NNNN.safetensors` and returns its path; after the return it survives a power cut.

    Raises:
        StorageError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    parts = {"weights": state.weights} | {f"memory/{kind}": weights for kind, weights in state.memory.items()}
    if state.best is not None:
        parts["best"] = state.best
    tensors: dict[str, np.ndarray[Any, Any]] = {
        f"{part}/{name}": array for part, weights in parts.items() for name, array in weights.items()
    }
    head = {
        "recipe_id": state.recipe_id,
        "round": state.round,
        "done": state.done,
        "history": json.loads(_HISTORY.dump_json(state.history)),
        "digests": {part: weights.digest for part, weights in parts.items()},
        "order": list(state.weights),
    }
    text = json.dumps(head)
    path = folder / f"round-{state.round:04d}.safetensors"
    private_folder(folder)
    for left in folder.glob(".round-*.tmp"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    write_whole(path, save(tensors, {"fedicom": text, "sha256": _sha256(text)}))
    files = _found(folder)
    for old in files[: max(0, files.index(path) + 1 - KEEP)]:
        old.unlink(missing_ok=True)
    return path


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of any run."""
    return bool(_found(folder))


def load(folder: Path, recipe_id: str) -> ServerState | None:
    """The newest readable state in `folder`, or None when there is no checkpoint.

    A damaged newest file is passed over for the one before it.

    Raises:
        StorageError: The checkpoints are of another recipe, or none of them can be read.
    """
    files = _found(folder)
    for path in reversed(files):
        try:
            state = _read(path)
        except (SafetensorError, OSError, ValueError, KeyError, ValidationError):
            continue
        if state.recipe_id != recipe_id:
            raise StorageError(
                f"the checkpoint in this folder is of recipe {state.recipe_id[:12]}, this run is of {recipe_id[:12]}; "
                "resume with the same recipe or choose another out="
            )
        return state
    if files:
        raise StorageError(f"none of the {len(files)} checkpoints can be read; start again without resume=true")
    return None


def _found(folder: Path) -> Sequence[Path]:
    # by length first: round 10000 comes after round 9999
    return sorted(folder.glob("round-*.safetensors"), key=lambda path: (len(path.name), path.name))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> ServerState:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if _sha256(metadata["fedicom"]) != metadata["sha256"]:
        raise ValueError("the head was changed")
    head = json.loads(metadata["fedicom"])
    parts: dict[str, Weights] = {}
    for part, digest in head["digests"].items():
        found = {name.removeprefix(f"{part}/"): array for name, array in tensors.items() if name.startswith(f"{part}/")}
        parts[part] = Weights({name: found[name] for name in head["order"] if name in found})
        if parts[part].digest != digest:
            raise ValueError(f"{part} was changed")
    return ServerState(
        recipe_id=head["recipe_id"],
        round=head["round"],
        weights=parts["weights"],
        memory={part.removeprefix("memory/"): parts[part] for part in parts if part.startswith("memory/")},
        history=_HISTORY.validate_json(json.dumps(head["history"])),
        done=head["done"],
        best=parts.get("best"),
    )
