"""A round's state on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

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
    tensors: dict[str, np.ndarray[Any, Any]] = {f"weights/{name}": array for name, array in state.weights.items()}
    for part, weights in state.memory.items():
        tensors |= {f"memory/{part}/{name}": array for name, array in weights.items()}
    if state.best is not None:
        tensors |= {f"best/{name}": array for name, array in state.best.items()}
    head = {
        "recipe_id": state.recipe_id,
        "round": state.round,
        "done": state.done,
        "history": json.loads(_HISTORY.dump_json(state.history)),
        "digest": state.weights.digest,
        "order": list(state.weights),
    }
    path = folder / f"round-{state.round:04d}.safetensors"
    private_folder(folder)
    write_whole(path, save(tensors, {"fedicom": json.dumps(head)}))
    for old in _found(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


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
    return sorted(folder.glob("round-*.safetensors"))


def _read(path: Path) -> ServerState:
    with safe_open(path, framework="numpy") as file:
        head = json.loads(file.metadata()["fedicom"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    order = head["order"]

    def part(prefix: str) -> Weights:
        found = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
        return Weights({name: found[name] for name in order if name in found})

    weights = part("weights/")
    if weights.digest != head["digest"]:
        raise ValueError("digest")
    kinds = {name.split("/")[1] for name in tensors if name.startswith("memory/")}
    return ServerState(
        recipe_id=head["recipe_id"],
        round=head["round"],
        weights=weights,
        memory={kind: part(f"memory/{kind}/") for kind in sorted(kinds)},
        history=_HISTORY.validate_python(head["history"]),
        done=head["done"],
        best=part("best/") if any(name.startswith("best/") for name in tensors) else None,
    )
