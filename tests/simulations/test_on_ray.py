"""The same federation on Ray: same weights, same ledgers, logs that hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.chain import verify
from common.config import Phantom, Settings, load_settings
from common.errors import ConfigError
from simulations import on_ray
from simulations.run import simulate

WORDS = (
    "recipe=phantom_2d", "rounds=2", "federation.sites=2", "federation.quorum=2", "training.batch_size=16",
    "privacy.unsafe_seeded_noise=true", "simulation.workers=2", "simulation.threads=1", "model.width=0.125",
    "training.local_epochs=1",
)  # fmt: skip


def settings(out: Path, *more: str) -> Settings:
    found = load_settings([*WORDS, *more, f"out={out}"])
    phantom = Phantom(patients=30, central_patients=30, size=32)
    return replace(found, simulation=replace(found.simulation, phantom=phantom))


def test_two_actors_end_with_the_weights_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    simulate(settings(tmp_path / "process", "simulation.workers=1"))
    conclusion = simulate(settings(tmp_path / "ray", "simulation.backend=ray"))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("process", "ray")]
    assert conclusion.summary["weight_digest"] == summaries[0]["weight_digest"]
    sites = summaries[0]["sites"]
    assert len(sites) == 2
    assert summaries[1]["sites"] == sites, "scores and epsilon too"
    for log in (tmp_path / "ray" / "audit").glob("*.jsonl"):
        assert verify(log), "raises where it does not hold"
    assert len(list((tmp_path / "ray" / "audit").glob("*.jsonl"))) == 3


def test_a_secure_sum_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    secure = settings(
        tmp_path / "out",
        "simulation.backend=ray",
        "federation.sites=3",
        "federation.quorum=3",
        "privacy.secure_aggregation=true",
        "federation.max_update_norm=100",
    )
    with pytest.raises(ConfigError, match="use backend=process"):
        simulate(secure)


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install ray==2\.55\.1"):
        simulate(settings(tmp_path / "out", "simulation.backend=ray"))
    assert not (tmp_path / "out").exists()
