"""The folder of a run: which run it is of, who writes into it, and what is removed for another."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.cache import must_lie_beside
from common.config import Settings, as_plain
from common.errors import ConfigError, StorageError
from common.privacy_audit import FILE as AUDIT_FILE
from common.storage import drop_unfinished, held_alone, private_folder, storing, write_whole

ABREAST_FILE = "abreast.json"
"""Of `simulations.abreast`: what it measured."""
_OWN = ("audit", "checkpoints", "keys", "sites", "tensorboard")
_MODELS = ("model.onnx", "model.int8.onnx", "model.ts.pt")
_OWN_FILES = ("report.html", *_MODELS, "model_card.md", "summary.json", AUDIT_FILE, ABREAST_FILE, "run.json")
"""What overwrite=true removes, run.json last: while it is there, a half-removed run is still known as one."""
_KEPT = ("hospitals", "simulation.log")
_RECORD = "run.json"


def run_folder(settings: Settings) -> Path:
    """Where the run writes."""
    return Path(settings.out) if settings.out is not None else Path("runs") / settings.recipe.name


def check_folder(settings: Settings, out: Path) -> None:
    """Refuses a folder that this run must not write into; changes nothing.

    Raises:
        ConfigError: It holds something else, another run, or one that nobody said to go on with or to overwrite.
        StorageError: It cannot be read.
    """
    if settings.resume and settings.overwrite:
        raise ConfigError("resume and overwrite: one goes on with the run, the other removes it; say only one of them")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; choose a folder")
    if settings.simulation.hospitals is not None:
        for hospital in Path(settings.simulation.hospitals).glob("*/"):
            if (hospital / "labels.csv").exists() or (hospital / "dicom").is_dir():
                must_lie_beside(out, hospital, "the folder of the run (out)")
    earlier = earlier_record(out)
    if earlier is None:
        with storing("the folder of the run"):
            names = sorted(path.name for path in out.iterdir()) if out.exists() else []
        if foreign := [name for name in names if name not in _KEPT and not name.startswith(".")]:
            raise ConfigError(
                f"out: {out} holds other files ({foreign[0]}) and no run.json; choose an empty folder, or a new name"
            )
        if settings.resume == "conclude":
            raise ConfigError(f"resume=conclude: {out} holds no run; name the folder of one with out=...")
    elif settings.resume:
        if changed := _changed(earlier, record_of(settings)):
            raise ConfigError(
                f"resume: {out} holds a run with other settings (different: {', '.join(changed[:8])}); "
                "give the same settings, or another out"
            )
    elif not settings.overwrite:
        raise ConfigError(
            f"out: {out} holds a run of recipe {str(earlier.get('recipe_id'))[:12]} already; say resume=true to go on "
            "with it, overwrite=true to remove it and start again, or out=... for another folder"
        )


def take_folder(settings: Settings, out: Path) -> None:
    """Removes the run that is to be overwritten, and writes down which run this is."""
    if settings.overwrite:
        with storing("the run to be overwritten"):
            for name in _OWN:
                if (out / name).exists():
                    shutil.rmtree(out / name)
            for name in _OWN_FILES:
                (out / name).unlink(missing_ok=True)
    drop_unfinished(out)
    for name in _OWN:
        drop_unfinished(out / name, below=True)
    for partial in out.glob(".hospitals.partial-*"):
        shutil.rmtree(partial)
    write_whole(out / _RECORD, (json.dumps(record_of(settings), indent=2, sort_keys=True) + "\n").encode())


def record_of(settings: Settings) -> dict[str, Any]:
    """All that decides the weights, as run.json keeps it."""
    simulation = settings.simulation
    data: dict[str, Any]
    if simulation.hospitals is not None:
        data = {"hospitals": str(Path(simulation.hospitals).resolve())}
    else:
        data = {"phantom": as_plain(simulation.phantom), "sites": settings.recipe.federation.sites}
    return {"recipe_id": settings.recipe.id, "recipe": as_plain(settings.recipe), "simulation": data}


def earlier_record(out: Path) -> dict[str, Any] | None:
    """What run.json of an earlier run says (`record_of`); None where there is none.

    Raises:
        StorageError: It cannot be read.
    """
    record = out / _RECORD
    try:
        earlier = json.loads(record.read_text()) if record.exists() else None
    except (OSError, ValueError):
        earlier = ()
    if earlier is not None and not isinstance(earlier, dict):
        raise StorageError(f"{record} cannot be read; choose another out, or remove that folder to start again")
    return earlier


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keeps a second simulation out of the folder; the system frees it when this process ends, however it ends."""
    new = not out.exists()
    lock = private_folder(out) / ".lock"

    def busy() -> ConfigError:
        return ConfigError(f"out: another simulation is writing into {out}; wait for it, or choose another out")

    try:
        with held_alone(lock, "the folder of the run", busy):
            yield
    finally:
        if new and [path.name for path in out.iterdir()] == [".lock"]:  # it failed before it began
            shutil.rmtree(out)


class LogFile(logging.FileHandler):
    """What went wrong inside a site, for whoever runs the simulation; never shown, never sent."""

    def __init__(self, out: Path) -> None:
        super().__init__(out / "simulation.log", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """A full disk is told by what matters more."""


@contextmanager
def log_file(out: Path) -> Iterator[None]:
    """Sends the log, and what libraries warn of, to the run's file while this is open."""
    handler = LogFile(out)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        handler.close()


def _changed(before: object, now: object, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now} - {"recipe_id"})
        return [where for key in keys for where in _changed(before.get(key), now.get(key), f"{path}.{key}".strip("."))]
    return [] if before == now else [path]
