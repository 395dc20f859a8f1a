"""Two hospitals of a provisioned federation, with real kits and real (synthetic) DICOM, a fresh copy for every test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.cohort import open_cohort
from common.config import (
    Evaluation,
    ModelConfig,
    Phantom,
    Preprocessing,
    Privacy,
    Recipe,
    Task,
    Training,
)
from common.deployment import FederationPlan, SiteHome
from common.identity import Signer, read_private
from common.journal import SharedLog
from common.signed import SignedRecipe, sign_recipe
from server.provision import provision
from simulations.phantoms import CLASSES, make_phantoms
from simulations.rehearsal import edit

TRAIN_PATIENTS = 34
"""Of north; a test holds it."""


def recipe_of(**parts: Any) -> Recipe:
    """A recipe that trains in a second."""
    given = {
        "name": "tiny",
        "rounds": 3,
        "task": Task(classes=CLASSES),
        "data": Preprocessing(size=(16, 16)),
        "model": ModelConfig(family="monai", name="resnet10", width=0.125, stem="small"),
        "training": Training(batch_size=12),
        "evaluation": Evaluation(bootstraps=100),
        "privacy": Privacy(mechanism="dp_sgd", epsilon=6.0, delta=1e-5),
    }
    return Recipe(**(given | parts))


PLAIN = Privacy()
ALLOWED = {"min_patients": 10}
"""What differs from the standard policy."""


@dataclass(frozen=True)
class House:
    """One hospital's folder and what the test needs to know around it."""

    home: SiteHome
    kits: Path
    images: Path

    @property
    def coordinator(self) -> Signer:
        return Signer.load(self.kits / "coordinator" / "keys" / "signing.key")

    @property
    def log(self) -> SharedLog:
        return SharedLog(self.home.audit_file, Signer.load(self.home.signing_key))

    def sign(self, recipe: Recipe | None = None) -> SignedRecipe:
        return sign_recipe(recipe or recipe_of(), self.coordinator)

    def policy(self, **rules: Any) -> None:
        """Edits site.yaml, as the site's people would."""
        edit(self.home.path / "site.yaml", policy=rules)

    def configure(self, **fields: Any) -> None:
        edit(self.home.path / "site.yaml", **fields)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits, images of north, and north's images prepared once for the tiny recipe."""
    folder = tmp_path_factory.mktemp("federation")
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=("north", "south")), folder / "kits")
    make_phantoms(folder / "hospitals", Phantom(patients=40, central_patients=1, size=16, seed=3), 1)
    (images,) = (path for path in (folder / "hospitals").iterdir() if path.is_dir() and path.name != "central")
    images.rename(folder / "images")
    for name in ("north", "south"):
        edit(folder / "kits" / name / "site.yaml", data=str(folder / "images"), device="cpu", policy=ALLOWED)
    home = SiteHome(folder / "kits" / "north")
    key = read_private(home.cohort_key, "a cohort key")
    cohort = open_cohort(folder / "images", recipe_of(), cache=home.cache, key=key)
    assert cohort.patients("train") == TRAIN_PATIENTS
    return folder


@pytest.fixture
def house(federation: Path, tmp_path: Path) -> House:
    """North's home, whole and new."""
    shutil.copytree(federation / "kits" / "north", tmp_path / "north")
    return House(SiteHome(tmp_path / "north"), federation / "kits", federation / "images")


@pytest.fixture
def south(federation: Path, tmp_path: Path) -> House:
    shutil.copytree(federation / "kits" / "south", tmp_path / "south")
    return House(SiteHome(tmp_path / "south"), federation / "kits", federation / "images")


@pytest.fixture
def wait() -> Callable[..., Any]:
    """Waits for what a function gives, at most a minute."""
    from simulations.rehearsal import wait_for

    return lambda found, what="what was waited for", seconds=60: wait_for(found, what, seconds, poll_s=0.05)
