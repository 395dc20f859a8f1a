"""`fedicom privacy` and `fedicom site selftest`: exit codes, files, words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedicom
from client.dp import engine
from common.errors import ConfigError
from common.privacy_audit import read_privacy_audit
from simulations.privacy_cli import subject_of

TINY = (
    "recipe=phantom_2d", "model.width=0.0625", "data.size=[12,12]", "training.batch_size=16", "rounds=2",
)  # fmt: skip
FEW = ("--canaries", "60", "--steps", "3", "--patients", "64", "--seed", "1")


def test_an_audit_of_a_recipe_prints_a_table_and_writes_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedicom.main(["privacy", "audit", *TINY, *FEW, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Passed." in said
    assert "one-run audit, 3 steps" in " ".join(said.replace("│", " ").split())
    found = read_privacy_audit(tmp_path / "privacy_audit.json")
    assert found.passed
    page = (tmp_path / "privacy_audit.html").read_text()
    assert "The mechanism passed every test." in page
    assert all(check.name in page for check in found.checks)


def test_a_broken_mechanism_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.PrivateGradient, "self_test", lambda self, x_B, target_B: None)
    honest = engine.PrivateGradient.__init__

    def half(self: engine.PrivateGradient, *args: object, **settings: object) -> None:
        settings["noise_multiplier"] = settings["noise_multiplier"] / 2  # type: ignore[operator]
        honest(self, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.PrivateGradient, "__init__", half)
    words = ["privacy", "audit", *TINY, "--canaries", "0", "--patients", "64", "--json", "--out", str(tmp_path)]
    assert fedicom.main(words) == 1
    plain = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in plain["checks"] if not check["passed"]} >= {"noise variance"}
    assert "FAILED" in (tmp_path / "privacy_audit.html").read_text()


def test_what_is_no_run_and_no_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of a run"):
        subject_of(["nowhere"], None)
    with pytest.raises(ConfigError, match=r"no summary\.json"):
        subject_of([str(tmp_path)], None)
    assert subject_of(["recipe=phantom_2d"], [100, 200]).patients == {"site 1": 100, "site 2": 200}


def test_without_privacy_the_audit_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedicom.main(["privacy", "audit", "recipe=pneumonia_xray_plain", "--out", str(tmp_path)]) != 0
    assert "no mechanism to audit" in capsys.readouterr().err
