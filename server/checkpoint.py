"""A round's state on disk: one safetensors file, written whole or not at all, encrypted where a key is given."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from common.errors import StorageError
from common.storage import drop_unfinished, private_folder, write_whole
from common.vault import Secret, is_sealed, seal, unseal
from common.weights import Weights, safetensors
from server.rounds import RoundReport, ServerState

KEEP = 2
"""Checkpoints kept; the older ones are removed after a newer one is safely on disk."""

_HISTORY = TypeAdapter(tuple[RoundReport, ...])
_NAME = re.compile(r"round-(\d+)\.safetensors(\.sealed)?")


def write(state: ServerState, folder: Path, key: Secret | None = None) -> Path:
    """Writes `round-NNNN.safetensors` and returns its path; after the return it survives a power cut.

    Args:
        key: Encrypts the file, which is then `round-NNNN.safetensors.sealed`. Plain ones of earlier rounds go as
            the newer ones come.

    Raises:
        StorageError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    parts = {"weights": state.weights} | {f"memory/{kind}": weights for kind, weights in state.memory.items()}
    parts |= {part: kept for part in ("best", "average") if (kept := getattr(state, part)) is not None}
    head = {
        "recipe_id": state.recipe_id,
        "round": state.round,
        "done": state.done,
        "ended": state.ended,
        "history": json.loads(_HISTORY.dump_json(state.history)),
        "digests": {part: weights.digest for part, weights in parts.items()},
        "order": list(state.weights),
    }
    text = json.dumps(head)
    path = folder / f"round-{state.round:04d}.safetensors{'.sealed' if key else ''}"
    private_folder(folder)
    drop_unfinished(folder, "round-*")
    arrays = {f"{part}/{name}": array for part, weights in parts.items() for name, array in weights.items()}
    data = safetensors(arrays, {"fedicom": text, "sha256": _sha256(text)})
    write_whole(path, seal(b"".join(data), key) if key else data)
    # The same round may lie there in the other form, from before the key was given or taken away.
    twin = path.with_suffix("") if key else path.with_name(path.name + ".sealed")
    twin.unlink(missing_ok=True)
    files = _found(folder)
    for old in files[: max(0, files.index(path) + 1 - KEEP)]:
        old.unlink(missing_ok=True)
    return path


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of any run."""
    return bool(_found(folder))


def load(folder: Path, recipe_id: str, key: Secret | None = None) -> ServerState | None:
    """The newest readable state in `folder`, or None when there is no checkpoint.

    A damaged newest file is passed over for the one before it.

    Args:
        key: Opens encrypted ones. Plain ones are read as well: a run may have begun without a key.

    Raises:
        StorageError: The checkpoints are of another recipe, or none of them can be read, or they are encrypted and
            no key is given.
    """
    files, locked = _found(folder), False
    for path in reversed(files):
        sealed = path.suffix == ".sealed"
        if sealed and key is None:
            raise StorageError(
                "the checkpoints of this run are encrypted; name their key file as checkpoint_key in server.yaml"
            )
        if locked and not sealed:
            break  # with the wrong key an older plain one would silently undo rounds
        try:
            state = _read(path, key)
        except (StorageError, SafetensorError, OSError, ValueError, KeyError, TypeError, ValidationError):
            locked |= sealed
            continue
        if state.recipe_id != recipe_id:
            raise StorageError(
                f"the checkpoint in this folder is of recipe {state.recipe_id[:12]}, this run is of {recipe_id[:12]}; "
                "resume with the same recipe or choose another out="
            )
        return state
    if files:
        advice = "check checkpoint_key, or start" if key is not None else "start"
        raise StorageError(f"none of the {len(files)} checkpoints can be read; {advice} again without resume=true")
    return None


def _found(folder: Path) -> Sequence[Path]:
    # by number: round 10000 comes after round 9999
    return sorted((path for path in folder.glob("round-*") if _NAME.fullmatch(path.name)), key=_round)


def _round(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, key: Secret | None = None) -> ServerState:
    data = path.read_bytes()
    if key is not None and is_sealed(data):
        data = unseal(data, key)
    tensors = load_tensors(data)  # checks the length of the header, which is read here once more for its metadata
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
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
        ended=head["ended"],
        best=parts.get("best"),
        average=parts.get("average"),
    )
