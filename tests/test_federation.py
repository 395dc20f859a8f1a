"""A whole federation: DICOM in, report and model out; killed, stopped, resumed, and the same to the bit."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ledger import Ledger, SitePolicy
from common.audit import verify, verify_against
from common.config import (
    Evaluation,
    Federation,
    ModelConfig,
    Phantom,
    Preprocessing,
    Privacy,
    Recipe,
    Settings,
    Simulation,
    Task,
    Training,
    as_plain,
)
from common.errors import ConfigError
from common.metrics import Metrics
from common.weights import Weights
from server import checkpoint, conclude
from server.conclude import Conclusion
from server.evaluate import CentralResult
from simulations import run
from simulations.phantoms import make_phantoms
from simulations.run import simulate

SITES = ("east", "north", "south")
NONE = Privacy()
SECRET = Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-3)
SEEDED = replace(SECRET, unsafe_seeded_noise=True)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "hospitals"
    make_phantoms(out, Phantom(patients=24, central_patients=20, size=24), len(SITES))
    return out


def settings_of(out: Path, hospitals: Path, privacy: Privacy = NONE, **parts: Any) -> Settings:
    given: dict[str, Any] = {
        "name": "tiny",
        "rounds": 2,
        "task": Task(classes=("no nodule", "nodule")),
        "data": Preprocessing(size=(16, 16)),
        "model": ModelConfig(family="monai", name="resnet10", width=0.125, stem="small"),
        "training": Training(batch_size=8, lr=3e-3),
        "federation": Federation(sites=3, quorum=3),
        "evaluation": Evaluation(bootstraps=100, min_cell=3),
        "privacy": privacy,
    }
    recipe = Recipe(**(given | {key: value for key, value in parts.items() if key in Recipe.__dataclass_fields__}))
    rest = {key: value for key, value in parts.items() if key not in Recipe.__dataclass_fields__}
    simulation = Simulation(hospitals=str(hospitals), device="cpu", threads=1)
    return Settings(recipe=recipe, **({"simulation": simulation, "out": str(out)} | rest))


def weights_of(settings: Settings) -> Weights:
    """The final weights, from the checkpoint on disk."""
    assert settings.out is not None
    state = checkpoint.load(Path(settings.out) / "checkpoints", settings.recipe.id)
    assert state is not None
    assert state.done
    return state.weights


def logs_hold(out: Path) -> None:
    """Every log verifies, alone and against the other side's."""
    server = verify(out / "audit" / "server.jsonl")
    for site in SITES:
        events = verify(out / "audit" / f"{site}.jsonl")
        assert verify_against(events, server, name=site) >= 2
        assert verify_against(server, events) >= 2


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what comes after the last round: evaluation and export take most of the time."""
    monkeypatch.setattr(run, "conclude", lambda federated, *_, **__: federated)


# From DICOM to a report


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> tuple[Settings, Conclusion]:
    settings = settings_of(tmp_path_factory.mktemp("golden") / "run", hospitals, SEEDED)
    return settings, simulate(settings)


def test_a_golden_run_gives_the_numbers_that_were_recorded(golden: tuple[Settings, Conclusion]) -> None:
    # Sums in another order (another CPU, other threads) move the last bits, so a digest holds on one kind of machine
    # alone. These are statistics of the final weights and single numbers of them: they agreed to seven digits between
    # one and two threads and between AVX-512 and SSE. Digests are compared below, between two processes of one machine.
    weights = weights_of(golden[0])
    flat = np.concatenate([weights[name].ravel() for name in sorted(weights)]).astype(np.float64)
    found = [flat.size, np.linalg.norm(flat), 1e3 * flat.mean(), np.abs(flat).mean(), *flat[::9000]]
    assert found == pytest.approx(GOLDEN, rel=1e-4, abs=1e-5)


GOLDEN = [
    77450, 29.2380653, 4.3905914, 0.0625893, -0.0035622, -0.0950245, -0.0671278, -0.1148295, 0.0510019,
    0.0783107, -0.0071451, -0.0134603, -0.0048616,
]  # fmt: skip
"""Count, norm, 1000 x mean and mean size of the weights, then every 9000th; it changes only with what is trained."""


def test_a_run_writes_everything_that_was_promised(golden: tuple[Settings, Conclusion]) -> None:
    settings, conclusion = golden
    out = Path(settings.out or "")
    summary = json.loads((out / "summary.json").read_text())
    assert summary == conclusion.summary
    assert {"recipe_id", "weight_digest", "global", "sites", "onnx", "wall_s"} <= set(summary)
    assert set(summary["global"]) == {"auroc", "auroc_ci"}
    assert set(summary["sites"]) == set(SITES)
    for site in summary["sites"].values():
        assert {"patients", "auroc", "epsilon", "delta"} <= set(site)
    assert set(summary["onnx"]) == {"sha256", "max_abs_difference"}
    # seeded noise is no secret, so the audit at the end of every private run does not pass
    assert summary["privacy_audit"]["status"] == "unaudited"
    assert "noise is secret and fresh" in summary["privacy_audit"]["why"]
    assert "UNAUDITED" in (out / "model_card.md").read_text()
    assert summary["recipe_id"] == settings.recipe.id
    assert summary["weight_digest"] == weights_of(settings).digest
    assert summary["onnx"]["max_abs_difference"] <= 1e-4
    low, high = summary["global"]["auroc_ci"]
    assert 0 <= low <= summary["global"]["auroc"] <= high <= 1

    import hashlib

    assert hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest() == summary["onnx"]["sha256"]
    report = (out / "report.html").read_text()
    assert len(report) > 10_000
    assert summary["recipe_id"][:12] in report
    assert "unsafe_seeded_noise" in report
    assert "tiny" in (out / "model_card.md").read_text()
    assert len(list((out / "checkpoints").glob("*.safetensors"))) == 2
    assert [path.name for path in out.rglob(".*.tmp")] == []


def test_the_epsilon_in_the_summary_is_what_the_ledgers_hold_and_within_the_budget(
    golden: tuple[Settings, Conclusion],
) -> None:
    settings, conclusion = golden
    for name, site in conclusion.summary["sites"].items():
        path = Path(settings.out or "") / "sites" / name / "ledger.jsonl"
        held = Ledger(path, name, SitePolicy(epsilon=8.0, delta=1e-3)).spent()
        assert site["epsilon"] == held
        assert 7.5 < held <= 8.0
        assert site["delta"] == 1e-3


def test_both_sides_logs_verify_and_remember_each_other(golden: tuple[Settings, Conclusion]) -> None:
    out = Path(golden[0].out or "")
    logs_hold(out)
    kinds = [event.kind for event in verify(out / "audit" / "server.jsonl")]
    assert kinds.count("round aggregated") == 2
    assert kinds[-1] == "run concluded"
    assert [e.kind for e in verify(out / "audit" / "north.jsonl")].count("update sent") == 2


def test_the_curves_can_be_read_by_tensorboard(golden: tuple[Settings, Conclusion]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in (Path(golden[0].out or "") / "tensorboard").rglob("*tfevents*")}
    steps = set()
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        steps |= {event.step for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert {1, 2} <= steps


def test_a_finished_run_that_is_resumed_trains_nothing_and_gives_the_same_model(
    golden: tuple[Settings, Conclusion], no_export: None
) -> None:
    settings, conclusion = golden
    before = weights_of(settings).digest
    steps: list[str] = []

    class Show(run.Silent):
        def step(self, what: str, done: int, total: int) -> None:
            steps.append(what)

    simulate(replace(settings, resume=True), Show())
    assert weights_of(settings).digest == before == conclusion.summary["weight_digest"]
    assert "Training" not in steps


def test_volumes_without_privacy_and_with_baselines_name_the_missing_privacy_everywhere(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path / "run", tmp_path, NONE, rounds=1,
        task=Task(dimensions=3, classes=("no nodule", "nodule")), data=Preprocessing(size=(16, 16, 16)),
        model=ModelConfig(family="monai", name="resnet10", dimensions=3, width=0.125, stem="small"),
        federation=Federation(sites=2, quorum=2), baselines=True, torchscript=True,
        simulation=Simulation(
            phantom=Phantom(dimensions=3, patients=12, central_patients=10, size=16), device="cpu", threads=1
        ),
    )  # fmt: skip
    summary = simulate(settings).summary
    assert summary["privacy"] == "none"
    assert any("privacy: none" in note for note in summary["notes"])
    assert all(site["epsilon"] is None for site in summary["sites"].values())
    out = tmp_path / "run"
    for file in ("report.html", "model_card.md"):
        assert "privacy: none" in (out / file).read_text().lower(), file
    assert set(summary["baselines"]["alone"]) == {"north", "south"}
    assert 0 <= summary["baselines"]["centralised"]["auroc"] <= 1
    assert (out / "model.ts.pt").stat().st_size > 0


@pytest.mark.parametrize("strategy", ["fedadam", "krum"])
def test_other_strategies_run_and_move_the_model(
    tmp_path: Path, hospitals: Path, no_export: None, strategy: Any
) -> None:
    federation = Federation(sites=3, quorum=3, strategy=strategy)
    settings = settings_of(tmp_path / "run", hospitals, federation=federation)
    reports: list[Any] = []

    class Show(run.Silent):
        def round(self, state: Any, report: Any) -> None:
            reports.append(report)

    simulate(settings, Show())
    assert [report.work for report in reports] == ["train", "train", "evaluate"]
    assert reports[0].before != reports[0].after == reports[1].before != reports[1].after
    assert weights_of(settings).finite


def test_a_site_that_refuses_is_told_at_once_and_in_the_notes_while_the_others_train(
    tmp_path: Path, hospitals: Path
) -> None:
    large = tmp_path / "large"
    make_phantoms(large, Phantom(patients=140, central_patients=20, size=24), 3)
    recipe = {
        "federation": Federation(sites=3, quorum=1),
        "rounds": 1,
        "model": ModelConfig(family="scattering", name="linear"),
    }
    settings = settings_of(tmp_path / "run", large, privacy=replace(SEEDED, delta=0.009), **recipe)  # 1 / 111
    told: list[tuple[str, str]] = []

    class Show(run.Silent):
        def absent(self, site: str, why: str) -> None:
            told.append((site, why))

    summary = simulate(settings, Show()).summary
    (refusal,) = told
    assert refusal[0] == "north"
    assert refusal[1].startswith("delta: got 0.009, expected less than 1 / (training patients of this site)")
    assert f"north took no part: {refusal[1]}" in summary["notes"]
    assert list(summary["sites"]) == ["east", "south"]
    again = simulate(replace(settings, resume=True)).summary  # all is behind it: nobody is asked
    assert "north took no part." in again["notes"]


def test_progress_grows_to_its_total_and_starts_where_a_resumed_run_stands(
    tmp_path: Path, hospitals: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path / "run", hospitals)
    shown: list[tuple[int, int]] = []

    class Show(run.Silent):
        stop = True

        def step(self, what: str, done: int, total: int) -> None:
            if what == "Training":
                shown.append((done, total))

        def round(self, state: Any, report: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt

    show = Show()
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, show)
    assert shown == [(0, 9), (1, 9), (2, 9), (3, 9)]  # three sites: two rounds and the closing evaluation
    shown.clear()
    show.stop = False
    simulate(replace(settings, resume=True), show)
    assert [done for done, _ in shown] == [3, 4, 5, 6, 6, 7, 8, 9]
    assert {total for _, total in shown} == {9}


def test_a_run_that_is_stopped_and_concluded_ends_with_the_model_of_its_last_round(
    tmp_path: Path, hospitals: Path
) -> None:
    settings = settings_of(tmp_path / "run", hospitals)
    with pytest.raises(ConfigError, match=r"resume=conclude: .* holds no run"):
        simulate(replace(settings, resume="conclude"))
    trained: list[str] = []
    shown: list[tuple[int, int]] = []

    class Show(run.Silent):
        def step(self, what: str, done: int, total: int) -> None:
            if what == "Training":
                shown.append((done, total))

        def round(self, state: Any, report: Any) -> None:
            if not trained:
                trained.append(state.weights.digest)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(settings, Show())
    shown.clear()
    summary = simulate(replace(settings, resume="conclude"), Show()).summary
    assert summary["weight_digest"] == trained[0] == weights_of(settings).digest
    assert (summary["rounds"], summary["notes"][-1]) == (1, "The training was ended by hand after round 1 of 2.")
    assert list(summary["sites"]) == ["east", "north", "south"]
    assert shown == [(3, 6), (4, 6), (5, 6), (6, 6)]  # one round of three sites, and their closing evaluation
    assert simulate(replace(settings, resume=True)).summary["rounds"] == 1  # for good


def test_what_the_sites_wrote_is_on_the_disk_before_a_checkpoint_counts_on_it(
    tmp_path: Path, hospitals: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def told(name: str, real: Any) -> Any:
        def call(*words: Any) -> Any:
            happened.append(name)
            return real(*words)

        return call

    monkeypatch.setattr(run, "to_system", told("a site wrote", run.to_system))
    monkeypatch.setattr(run, "all_to_disk", told("on disk", run.all_to_disk))
    monkeypatch.setattr(checkpoint, "write", told("checkpoint", checkpoint.write))
    simulate(settings_of(tmp_path / "run", hospitals))
    sites = [what for what, _ in itertools.groupby(what for what in happened if what != "checkpoint")]
    assert sites == ["a site wrote", "on disk"] * 4  # who they are, two rounds, the closing evaluation
    # A checkpoint may be written while the next round is under way.
    before = [happened[:at].count("on disk") for at, what in enumerate(happened) if what == "checkpoint"]
    assert len(before) == 3
    assert all(count >= number for number, count in enumerate(before, 2))


def test_a_site_that_is_closed_between_two_visits_says_once_with_what_it_started(
    tmp_path: Path, hospitals: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_OPEN", 1)
    out = tmp_path / "run"
    plain = simulate(settings_of(out, hospitals))
    logs_hold(out)
    for site in SITES:
        kinds = [event.kind for event in verify(out / "audit" / f"{site}.jsonl")]
        assert kinds.count("site started") == 1
        assert kinds.count("update sent") == 2
    assert not (out / "sites").exists()  # none keeps anything
    again = simulate(settings_of(out, hospitals, resume=True))
    assert again.state.weights == plain.state.weights


# Killed and resumed

# Forks before torch has computed anything, so each life costs no import. A life ends by SIGKILL at its n-th write
# that is to last (the coordinator's fsync, a site's word to the system), before or after it: between any two of those
# nothing lasting happens.
NURSERY = """
import itertools, json, os, signal, sys, time, traceback
import client.dp.engine, client.dp.bookkeeping, dp_accounting.pld.privacy_loss_distribution
from common.monai_shim import ensure_light_monai
ensure_light_monai()
import monai.networks.nets.resnet
from common.config import settings_from_json
from simulations import run
run.conclude = lambda federated, *_, **__: federated

def live(order):
    calls = itertools.count(1)
    def deadly(real):
        def flush(handle):
            last = next(calls) == order["writes"]  # of its own, for several threads write
            if last and order["before"]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
        return flush
    os.fsync, run.to_system = deadly(os.fsync), deadly(run.to_system)

    class Show(run.Silent):
        def step(self, what, done, total):
            if what == "Training" and done == order["answers"]:
                os.kill(os.getpid(), signal.SIGKILL)

    run.simulate(settings_from_json(order["settings"]), Show())

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            live(json.loads(line))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    def __init__(self) -> None:
        root = str(Path(run.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{NURSERY}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def live(self, settings: Settings, writes: int = 0, *, before: bool = False, answers: int = -1) -> int:
        """Exit code of one life; -9 when it was killed, at a write or after so many answers of sites."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"settings": json.dumps(as_plain(settings)), "writes": writes, "before": before, "answers": answers}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def live_and_die(nursery: Nursery, settings: Settings, seed: int) -> int:
    """Lives until one finishes; returns how many were killed."""
    draw = random.Random(seed)
    for deaths in range(8):
        code = nursery.live(replace(settings, resume=True), draw.randint(8, 45), before=draw.random() < 0.5)
        if code == 0:
            return deaths
        assert code == -9
    assert nursery.live(replace(settings, resume=True)) == 0
    return 8


def test_another_process_gives_the_same_bits(
    golden: tuple[Settings, Conclusion], nursery: Nursery, tmp_path: Path
) -> None:
    again = replace(golden[0], out=str(tmp_path / "run"))
    assert nursery.live(again) == 0
    assert weights_of(again).digest == golden[1].summary["weight_digest"]


def test_killed_at_any_write_and_resumed_a_seeded_run_ends_with_the_weights_of_one_never_killed(
    golden: tuple[Settings, Conclusion], nursery: Nursery, tmp_path: Path
) -> None:
    settings = replace(golden[0], out=str(tmp_path / "run"))
    assert live_and_die(nursery, settings, seed=1) >= 2
    assert weights_of(settings).digest == golden[1].summary["weight_digest"]
    logs_hold(tmp_path / "run")
    for name in SITES:
        path = tmp_path / "run" / "sites" / name / "ledger.jsonl"
        assert Ledger(path, name, SitePolicy(epsilon=8.0, delta=1e-3)).spent() <= 8.0


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_killed_at_any_write_and_resumed_a_run_without_privacy_ends_with_the_weights_of_one_never_killed(
    nursery: Nursery, hospitals: Path, tmp_path: Path, compression: Any
) -> None:
    federation = Federation(sites=3, quorum=3, compression=compression)
    never = settings_of(tmp_path / "never", hospitals, federation=federation)
    killed = settings_of(tmp_path / "killed", hospitals, federation=federation)
    assert nursery.live(never) == 0
    assert live_and_die(nursery, killed, seed=3) >= 2
    assert weights_of(killed).digest == weights_of(never).digest
    logs_hold(tmp_path / "killed")
    if compression != "none":  # two processes: updates cross in their small form
        two = replace(never, out=str(tmp_path / "two"), simulation=replace(never.simulation, workers=2))
        assert nursery.live(two) == 0
        assert weights_of(two).digest == weights_of(never).digest


def test_killed_at_any_write_a_run_with_secret_noise_ends_within_its_budget(
    nursery: Nursery, hospitals: Path, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path / "run", hospitals, SECRET)
    assert live_and_die(nursery, settings, seed=4) >= 2
    assert weights_of(settings).finite
    logs_hold(tmp_path / "run")
    for name in SITES:
        path = tmp_path / "run" / "sites" / name / "ledger.jsonl"
        ledger = Ledger(path, name, SitePolicy(epsilon=8.0, delta=1e-3))
        assert ledger.spent() <= 8.0
        assert len(ledger.events()) == 2  # two rounds, each paid for once


def test_workers_whose_coordinator_is_killed_die_with_it_and_end_with_the_same_bits_as_one_process(
    golden: tuple[Settings, Conclusion], nursery: Nursery, tmp_path: Path
) -> None:
    one = replace(golden[0], out=str(tmp_path / "run"), resume=True)
    two = replace(one, simulation=replace(one.simulation, workers=2))
    # Killed when round 1 is over and one of the three answers of round 2 has come: the other worker is training.
    assert nursery.live(two, answers=4) == -9
    assert nursery.live(one) == 0
    assert weights_of(one).digest == golden[1].summary["weight_digest"]
    logs_hold(tmp_path / "run")


def test_a_model_that_calls_everybody_the_same_is_named_first(tmp_path: Path, hospitals: Path) -> None:
    recipe = settings_of(tmp_path, hospitals).recipe
    for rows, said in (
        (((12, 0), (8, 0)), "100% of the central test images 'no nodule', and 60% are. Use the operating point (0.03"),
        (((12, 0), (7, 1)), ""),
        (((95, 0), (5, 0)), ""),  # nearly all are of it
        ((), ""),
    ):
        metrics = Metrics(patients=20, confusion=rows, threshold=0.03)
        result = CentralResult(metrics=metrics, subgroups={})
        found = conclude._one_class(recipe, result)
        assert len(found) == bool(said)
        assert said in "".join(found)
    assert conclude._one_class(recipe, None) == ()


def test_what_cannot_be_built_is_told_before_any_image_is_read_and_leaves_the_folder_free(
    tmp_path: Path, hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_cohort", lambda *_: pytest.fail("an image was read"))
    model = ModelConfig(family="monai", name="resnet10", weights_file="/nowhere", weights_sha256="a" * 64)
    settings = settings_of(tmp_path / "run", hospitals, model=model)
    with pytest.raises(ConfigError, match="cannot read '/nowhere'"):
        simulate(settings)
    assert not (tmp_path / "run" / "run.json").exists()
