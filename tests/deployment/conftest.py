"""A federation of real processes on loopback for the tests of this folder.

One simulation gives the digest that a run must end with: the recipe's noise is seeded, so equal sets of admitted
updates give equal weights. That the sets are equal is certain on a busy machine too, for nobody is left behind within
the quarter of an hour that a test may take; `digest` says so if a site was missing all the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from common.audit import verify
from common.config import Phantom, load_settings
from simulations.rehearsal import Plan, Rehearsal, rehearsing, wait_for
from simulations.run import _site_key, simulate

ROUNDS = 4
PHANTOM = Phantom(patients=60, central_patients=40, size=32)
PLAN = Plan(
    count=3,
    quorum=2,
    recipe=(
        "recipe=phantom_2d",
        f"rounds={ROUNDS}",
        "model=resnet10_small",
        "model.width=0.125",
        "data.size=[32,32]",
        "privacy.epsilon=null",
        "privacy.noise_multiplier=1",
        "privacy.unsafe_seeded_noise=true",
        "federation.timeout_s=900",
        "federation.offline_s=900",
        "evaluation.bootstraps=100",
    ),
    phantom=PHANTOM,
    policy={"seeded_noise": True, "epsilon": 10_000.0, "min_patients": 5, "delta": 1e-4},
    cohort_key=_site_key,
)


@pytest.fixture(scope="session")
def expected(tmp_path_factory, testrun_uid) -> str:
    """Digest of the weights that the simulation of the usual recipe ends with; one process simulates for all."""
    told = tmp_path_factory.getbasetemp().parent / f"expected-{testrun_uid}"
    with FileLock(told.with_suffix(".lock")):
        if not told.exists():
            out = tmp_path_factory.mktemp("simulated") / "run"
            told.write_text(simulated((f"federation.quorum={PLAN.quorum}",), out))
    return told.read_text()


def simulated(words: tuple[str, ...], out: Path) -> str:
    """Digest of the weights that the simulation of the recipe ends with, changed by these words."""
    phantom = [f"simulation.phantom.{key}={getattr(PHANTOM, key)}" for key in ("patients", "central_patients", "size")]
    settings = load_settings([*PLAN.recipe, *phantom, f"federation.sites={PLAN.count}", *words, f"out={out}"])
    with pytest.MonkeyPatch.context() as patch:  # export and report would take longer than the rounds
        patch.setattr("simulations.run.conclude", lambda federated, *_, **__: federated)
        federated: Any = simulate(settings)
    return str(federated.state.weights.digest)


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Iterator[Rehearsal]:
    """Coordinator and three sites, running."""
    with rehearsing(tmp_path_factory.mktemp("federation"), PLAN) as made:
        for name in ("server", *PLAN.sites):
            made.start(name)
        yield made


def begin(federation: Rehearsal, run: str) -> None:
    """Starts a run of the usual recipe under a name of its own, for a site pays for a private recipe once."""
    federation.approve(run, f"name={run}")
    federation.run(run, run)


def digest(federation: Rehearsal, run: str) -> str:
    """Digest of the weights that the run ended with, after a look whether every round had every site."""
    status = federation.wait_finished(run)
    for facts in rounds(federation, run):
        assert set(facts["admitted"]) == set(PLAN.sites), f"round {facts['round']}: {facts['refused']}"
    return str(status["summary"]["weight_digest"])


def rounds(federation: Rehearsal, run: str) -> list[Mapping[str, Any]]:
    """What the coordinator's log says of the run's rounds, in order."""
    events = verify(federation.server.audit_file)
    return [event.facts for event in events if event.kind == "round aggregated" and event.facts.get("run") == run]


@dataclass(frozen=True)
class Work:
    """What a site has done so far."""

    paid: int
    """Reservations in its ledger."""
    trained: int
    """Updates that it made anew."""
    answered: int
    """Updates that it sent, the kept ones too."""

    def __sub__(self, other: Work) -> Work:
        return Work(self.paid - other.paid, self.trained - other.trained, self.answered - other.answered)


def work(federation: Rehearsal, site: str) -> Work:
    home = federation.site(site)
    lines = home.ledger_file.read_text().splitlines() if home.ledger_file.exists() else []
    kinds = [event.kind for event in verify(home.audit_file)] if home.audit_file.exists() else []
    made, again = kinds.count("update sent"), kinds.count("update sent again")
    return Work(sum(json.loads(line)["kind"] == "reserve" for line in lines), made, made + again)


def wait_event(federation: Rehearsal, site: str, kind: str, round_: int, after: int) -> None:
    """Waits for an event of the site's log, the first `after` events left out; looks every few milliseconds."""

    path = federation.site(site).audit_file

    def found() -> bool | None:
        rows = path.read_text().splitlines()[after:]
        return any(f'"kind":"{kind}"' in row and f'"round":{round_}' in row for row in rows) or None

    wait_for(found, f"{kind!r} of round {round_} at {site}", 180, poll_s=0.01)


def events(federation: Rehearsal, site: str) -> int:
    return len(federation.site(site).audit_file.read_text().splitlines())


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Puts a folder on a file system of its own; gives whether this machine lets us."""
    there = folder.with_name(f"{folder.name}-on-disk")
    folder.rename(there)
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
    shutil.copytree(there, folder, dirs_exist_ok=True)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leaves no byte free on the folder's disk.

    Returns:
        What takes the room.
    """
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return ballast
