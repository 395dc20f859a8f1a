"""`fedicom server export`: releases the model of a run that has ended, and only an audited one.

The model file of the run's folder is the candidate: it has passed its parity gate when it was written. The release is
the same graph with the outcome of the audit in its description, and a model card that says the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config import Recipe, recipe_from_json
from common.deployment import ServerHome, home_folder
from common.errors import ConfigError, ExportError
from common.identity import Signer
from common.journal import Log, SharedLog, TaggedLog
from common.onnx_model import Description, OnnxModel
from common.privacy_audit import FILE, PrivacyAudit, read_privacy_audit, told, unfit
from common.signed import read_recipe
from common.storage import storing, write_whole
from server.quantise import FILE as INT8

MODEL, CARD, FOLDER = "model.onnx", "model_card.md", "release"


@dataclass(frozen=True, kw_only=True)
class Released:
    """What was written."""

    path: Path
    sha256: str
    audit: Mapping[str, Any]
    """`common.privacy_audit.told`."""


def release(folder: Path, out: Path, *, audit: PrivacyAudit | None, unaudited: bool, log: Log) -> Released:
    """Writes the released model, its card and its audit into `out`.

    Args:
        folder: Of the run.
        audit: Of the run; None: there is none.
        unaudited: Release it all the same; file and card say so.
        log: The coordinator's; the release is written down before the files have their names.

    Raises:
        ExportError: The audit is missing, failed or of something else and `unaudited` was not said; or the model file
            is not the run's.
        ConfigError: The folder is no run that has ended, or `out` is that folder.
        StorageError: A file cannot be read or written.
    """
    recipe, summary = ended(folder)
    if out.resolve() == folder.resolve():
        raise ConfigError("--out is the run's own folder, whose model a release would replace; give another")
    candidate = OnnxModel(folder / MODEL, gpu=False)
    weights = candidate.description.weight_digest
    if candidate.sha256 != summary["onnx"]["sha256"] or candidate.description.recipe_id != recipe.id:
        raise ExportError(
            f"{MODEL} of the run is not the file that the run wrote (SHA-256 {candidate.sha256[:12]}, expected "
            f"{summary['onnx']['sha256'][:12]}); restore it, or make the run again"
        )
    why = unfit(audit, recipe, weights)
    if why is not None and not unaudited:
        raise ExportError(
            f"the model is not released: {why}. Audit it with `fedicom privacy audit {folder}`, or say --unaudited, "
            "which the model card and the file will tell everybody"
        )
    says = told(audit, why)
    description = replace(candidate.description, privacy={**candidate.description.privacy, "audit": dict(says)})
    data = _described(folder / MODEL, description.to_metadata())
    small = _int8(folder, summary, description)
    card = _card(folder / CARD, says)
    sha256 = hashlib.sha256(data).hexdigest()
    log.append("model exported", file=MODEL, sha256=sha256, weights=weights)
    log.append(
        "model released", file=MODEL, sha256=sha256, weights=weights, audit=says["status"], why=says.get("why", "")
    )
    if small is not None:
        log.append("model exported", file=INT8, sha256=hashlib.sha256(small).hexdigest(), weights=weights)
    with storing("the release"):
        out.mkdir(parents=True, exist_ok=True)
        # An earlier release goes first: killed half way, its model must not lie beside the new one's card.
        for name in (MODEL, INT8, FILE):
            (out / name).unlink(missing_ok=True)
    write_whole(out / CARD, card.encode())
    if audit is not None:
        audit.write(out / FILE)
    if small is not None:
        write_whole(out / INT8, small)
    write_whole(out / MODEL, data)
    if OnnxModel(out / MODEL, gpu=False).sha256 != sha256:
        raise ExportError(f"{out / MODEL} reads back with other bytes than were written; release it again")
    return Released(path=out / MODEL, sha256=sha256, audit=says)


def ended(folder: Path) -> tuple[Recipe, Mapping[str, Any]]:
    """Recipe and summary.json of a run, simulated or deployed.

    Raises:
        ConfigError: It is no run, or has not ended.
    """
    if not (folder / "summary.json").is_file():
        raise ConfigError(f"{folder} holds no summary.json: it is no run, or one that has not ended")
    with storing("the run"):
        try:
            summary = json.loads((folder / "summary.json").read_text())
            record = json.loads((folder / "run.json").read_text())
        except ValueError:
            raise ConfigError(f"{folder}: summary.json or run.json is damaged; make the run again") from None
    if "recipe" in record:
        recipe = recipe_from_json(json.dumps(record["recipe"]))
    else:
        recipe = read_recipe(folder / "recipe.json", None).recipe
    if recipe.id != summary["recipe_id"]:
        raise ConfigError(f"{folder}: summary.json is of another recipe than the run; make the run again")
    return recipe, summary


def export_verb(words: Sequence[str]) -> int:
    """`fedicom server export`."""
    parser = argparse.ArgumentParser(
        prog="fedicom server export",
        description="Release the model of a run: refused unless `fedicom privacy audit RUN` passed for this model, "
        "recipe and installed code. The audit's outcome goes into the file and its card.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run; or, with --home, its name")
    parser.add_argument("--home", type=Path, metavar="DIR", help="the coordinator's folder (default: FEDICOM_HOME)")
    parser.add_argument(
        "--audit", type=Path, metavar="FILE", help=f"audit to release it by (default: {FILE} in the run's folder)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where it goes (default: {FOLDER}/ in the run)")
    parser.add_argument("--unaudited", action="store_true", help="release it without a passed audit, and say so in it")
    arguments = parser.parse_args(words)
    folder, log = _run(arguments.run, arguments.home)
    file = arguments.audit or folder / FILE
    audit = read_privacy_audit(file) if arguments.audit is not None or file.is_file() else None
    done = release(
        folder, arguments.out or folder / FOLDER, audit=audit, unaudited=arguments.unaudited, log=log
    )  # fmt: skip
    print(f"{done.path}: SHA-256 {done.sha256}")  # noqa: T201
    status = "passed" if done.audit["status"] == "passed" else f"UNAUDITED: {done.audit['why']}"
    print(f"privacy audit: {status}")  # noqa: T201
    return 0


def _run(named: str, home: Path | None) -> tuple[Path, Log]:
    """The run's folder and the log to write the release into."""
    folder = Path(named)
    if folder.is_dir() and (folder / "keys" / "server.key").is_file():  # a simulation
        signer = Signer.load(folder / "keys" / "server.key")
        return folder, SharedLog(folder / "audit" / "server.jsonl", signer)
    if home is None and folder.is_dir():
        home = folder.resolve().parents[1]  # HOME/runs/NAME
    server = ServerHome(home_folder(home, "server.yaml"))
    folder = folder if folder.is_dir() else server.runs / named
    # Named as the run's own events are: without it nobody finds the release among the runs of this log.
    return folder, TaggedLog(SharedLog(server.audit_file, Signer.load(server.signing_key)), folder.resolve().name)


def _int8(folder: Path, summary: Mapping[str, Any], description: Description) -> bytes | None:
    """The 8-bit file with the same description, where the run has one."""
    made = summary.get("int8", {})
    if made.get("file") is None:
        return None
    if OnnxModel(folder / INT8, gpu=False).sha256 != made["sha256"]:
        raise ExportError(f"{INT8} of the run is not the file that the run wrote; restore it, or make the run again")
    return _described(folder / INT8, description.to_metadata())


def _described(path: Path, metadata: Mapping[str, str]) -> bytes:
    import onnx

    with storing(path.name):
        proto = onnx.load_model_from_string(path.read_bytes())
    del proto.metadata_props[:]
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return bytes(proto.SerializeToString(deterministic=True))


def _card(path: Path, says: Mapping[str, Any]) -> str:
    from server.model_card import RELEASE, release_section

    with storing(path.name):
        text = path.read_text(encoding="utf-8")
    return text.partition(f"\n{RELEASE}\n")[0].rstrip() + "\n\n" + "\n".join(release_section(says)) + "\n"
