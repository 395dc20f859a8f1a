"""The gate: no model leaves without a passed audit of this very model, recipe and code, unless somebody says so."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import ModelConfig, Preprocessing, Privacy, Recipe, as_plain
from common.deployment import ServerHome
from common.errors import ConfigError, ExportError, FedicomError
from common.identity import Signer
from common.journal import SharedLog, TaggedLog
from common.lineage import trace
from common.logs import read_logs
from common.models import build, get_weights
from common.onnx_model import OnnxModel
from common.privacy_audit import Bound, Check, PrivacyAudit, audited_code, read_privacy_audit, told, unfit
from server.export import export_onnx
from server.model_card import release_section
from server.release import ended, export_verb, release
from tests.kill import killed_before_change

RECIPE = Recipe(
    name="gate",
    data=Preprocessing(size=(12, 12)),
    model=ModelConfig(family="monai", name="resnet10", width=0.0625, stem="small"),
    privacy=Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-5),
)
PASSED = Check(name="noise", passed=True, found="1", expected="1")
BOUND = Bound(canaries=300, steps=20, guesses=60, right=50, lower=1.0, upper=2.0, delta=1e-5)


class Notes:
    """A log that only remembers."""

    head = ""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def append(self, kind: str, **facts: Any) -> str:
        self.events.append((kind, facts))
        return ""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that a release reads."""
    folder = tmp_path_factory.mktemp("run")
    model = build(RECIPE)
    made = export_onnx(
        model, RECIPE, get_weights(model), folder / "model.onnx",
        reference_x=np.random.default_rng(0).random((2, 1, 12, 12), dtype=np.float32),
        metrics={"auroc": 0.75}, privacy={"mechanism": "dp_sgd", "epsilon": 7.9, "audit": told(None, None)},
    )  # fmt: skip
    summary = {"recipe_id": RECIPE.id, "onnx": {"sha256": made.sha256}, "weight_digest": get_weights(model).digest}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"recipe_id": RECIPE.id, "recipe": as_plain(RECIPE)}))
    (folder / "model_card.md").write_text("# Model card\n\n" + "\n".join(release_section(told(None, None))) + "\n")
    return folder


def weights(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["weight_digest"])


def audit_of(run: Path, **parts: Any) -> PrivacyAudit:
    given: dict[str, Any] = {
        "recipe_id": RECIPE.id, "recipe": "gate", "code": audited_code(), "weights": weights(run), "made": "2026-01-01",
        "device": "cpu", "patients": {"north": 40}, "bound": BOUND,
        "checks": (PASSED,),
    }  # fmt: skip
    return PrivacyAudit(**(given | parts))


def test_an_audited_model_is_released_and_says_so(run: Path, tmp_path: Path) -> None:
    log = Notes()
    done = release(run, tmp_path / "out", audit=audit_of(run), unaudited=False, log=log)
    file, before = OnnxModel(done.path, gpu=False), OnnxModel(run / "model.onnx", gpu=False)
    assert file.description.privacy["audit"] == {
        "status": "passed", "made": "2026-01-01", "checks": 1, "epsilon_at_least": 1.0, "epsilon_at_most": 2.0,
        "steps": 20, "confidence": 0.95,
    }  # fmt: skip
    assert file.description.privacy["epsilon"] == 7.9
    assert file.description.metrics == before.description.metrics
    x = np.random.default_rng(1).random((3, 1, 12, 12), dtype=np.float32)
    assert np.array_equal(file.run(x)[1], before.run(x)[1]), "the graph is the same"
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert "**passed**, 1 checks" in card
    assert "UNAUDITED" not in card
    assert [kind for kind, _ in log.events] == ["model exported", "model released"]
    assert {facts["sha256"] for _, facts in log.events} == {file.sha256}
    assert read_privacy_audit(tmp_path / "out" / "privacy_audit.json") == audit_of(run)


def test_an_8_bit_file_is_released_beside_it_with_the_same_words(run: Path, tmp_path: Path) -> None:
    for name in ("summary.json", "run.json", "model_card.md", "model.onnx"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    small = tmp_path / "model.int8.onnx"
    small.write_bytes((run / "model.onnx").read_bytes())  # any graph will do
    summary = json.loads((run / "summary.json").read_text())
    summary["int8"] = {"file": small.name, "sha256": OnnxModel(small, gpu=False).sha256}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    log = Notes()
    release(tmp_path, tmp_path / "out", audit=audit_of(run), unaudited=False, log=log)
    files = [OnnxModel(tmp_path / "out" / name, gpu=False) for name in ("model.onnx", "model.int8.onnx")]
    assert files[0].description == files[1].description
    assert {facts["sha256"] for _, facts in log.events} == {file.sha256 for file in files}
    small.write_bytes(files[0].sha256.encode())
    with pytest.raises(FedicomError):
        release(tmp_path, tmp_path / "again", audit=audit_of(run), unaudited=False, log=Notes())
    assert not (tmp_path / "again").exists()


def test_a_release_that_was_killed_leaves_no_model_beside_the_words_of_another(run: Path, tmp_path: Path) -> None:
    before, audit = tmp_path / "before", audit_of(run)
    release(run, before, audit=None, unaudited=True, log=Notes())
    for number in itertools.count(1):
        out = tmp_path / str(number)
        shutil.copytree(before, out)
        whole = not killed_before_change(
            number, lambda out=out: release(run, out, audit=audit, unaudited=False, log=Notes())
        )
        if (out / "model.onnx").is_file():
            audited = OnnxModel(out / "model.onnx", gpu=False).description.privacy["audit"]["status"] == "passed"
            assert ("UNAUDITED" in (out / "model_card.md").read_text()) != audited
            assert (out / "privacy_audit.json").is_file() == audited
        if whole:
            break
    assert number > 6
    release(run, out, audit=None, unaudited=True, log=Notes())
    assert not (out / "privacy_audit.json").exists()


def test_a_release_does_not_take_the_place_of_the_run_itself(run: Path) -> None:
    before = (run / "model.onnx").read_bytes()
    with pytest.raises(ConfigError, match="the run's own folder"):
        release(run, run, audit=audit_of(run), unaudited=False, log=Notes())
    assert (run / "model.onnx").read_bytes() == before


def test_the_same_release_has_the_same_bytes(run: Path, tmp_path: Path) -> None:
    made = [release(run, tmp_path / n, audit=audit_of(run), unaudited=False, log=Notes()).sha256 for n in "ab"]
    assert made[0] == made[1]


FAILED = (Check(name="noise variance", passed=False, found="0.1", expected="1"),)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (None, "there is no privacy audit of it"),
        ({"checks": (PASSED, *FAILED)}, "failed: noise variance"),
        ({"checks": ()}, "nothing was checked"),
        ({"bound": replace(BOUND, lower=2.5)}, "failed: one-run audit"),
        ({"recipe_id": "ab" * 32}, "of recipe abababababab"),
        ({"weights": "ab" * 32}, "of model abababababab"),
        ({"weights": ""}, "of the recipe alone"),
        ({"code": {"common": "ab" * 32}}, "other code than is installed here"),
    ],
)  # fmt: skip
def test_without_a_passed_audit_of_this_very_model_nothing_is_written(
    run: Path, tmp_path: Path, parts: dict[str, Any] | None, why: str
) -> None:
    audit = None if parts is None else audit_of(run, **parts)
    with pytest.raises(ExportError, match=why):
        release(run, tmp_path / "out", audit=audit, unaudited=False, log=Notes())
    assert not (tmp_path / "out").exists()
    done = release(run, tmp_path / "out", audit=audit, unaudited=True, log=Notes())
    says = OnnxModel(done.path, gpu=False).description.privacy["audit"]
    assert says["status"] == "unaudited"
    assert why in says["why"]
    assert "UNAUDITED" in (tmp_path / "out" / "model_card.md").read_text()


@pytest.mark.parametrize("bound", [None, BOUND, replace(BOUND, lower=2.0), replace(BOUND, lower=2.0001)])
def test_an_audit_holds_with_a_bound_up_to_the_accountants_epsilon_or_none(run: Path, bound: Bound | None) -> None:
    audit, holds = audit_of(run, bound=bound), bound is None or bound.lower <= 2
    assert (audit.passed, audit.failed) == (holds, () if holds else ("one-run audit",))
    assert unfit(audit, RECIPE, weights(run)) == (None if holds else "its privacy audit failed: one-run audit")
    assert ("epsilon_at_least" in told(audit, None)) == (bound is not None)


def test_an_audit_of_less_code_than_is_installed_or_of_more_does_not_hold(run: Path) -> None:
    code = audited_code()
    less = {name: code[name] for name in code if name != "client"}
    for other, name in ((less, "client"), ({**code, "plugin": "ab" * 32}, "plugin"), ({}, ", ".join(sorted(code)))):
        assert f"(different: {name})" in str(unfit(audit_of(run, code=other), RECIPE, weights(run)))


def test_without_privacy_a_model_is_released_unaudited_only() -> None:
    assert unfit(None, replace(RECIPE, privacy=Privacy()), "ab" * 32) == "it was trained without privacy"


def test_another_file_under_the_models_name_is_not_released(run: Path, tmp_path: Path) -> None:
    for name in ("summary.json", "run.json", "model_card.md", "model.onnx"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    other = get_weights(build(replace(RECIPE, seed=5)))
    export_onnx(
        build(RECIPE), RECIPE, other, tmp_path / "model.onnx",
        reference_x=np.random.default_rng(0).random((2, 1, 12, 12), dtype=np.float32),
    )  # fmt: skip
    with pytest.raises(ExportError, match="is not the file that the run wrote"):
        release(tmp_path, tmp_path / "out", audit=audit_of(run), unaudited=True, log=Notes())


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no summary\.json"):
        ended(tmp_path)


def test_an_audit_reads_back_as_it_was_written(run: Path, tmp_path: Path) -> None:
    audit_of(run).write(tmp_path / "a.json")
    assert read_privacy_audit(tmp_path / "a.json") == audit_of(run)
    with pytest.raises(ConfigError, match="there is no privacy audit"):
        read_privacy_audit(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"checks": []}')
    with pytest.raises(ConfigError, match="missing"):
        read_privacy_audit(tmp_path / "c.json")


@pytest.mark.parametrize("by_path", [False, True])
def test_a_deployed_release_is_traced_to_its_run_in_a_log_that_several_share(
    run: Path, tmp_path: Path, by_path: bool
) -> None:
    home = ServerHome(tmp_path / "home")
    shutil.copytree(run, home.runs / "pilot")
    home.keys.mkdir()
    (home.path / "server.yaml").touch()
    for name, first in (("other", "aa" * 32), ("pilot", "bb" * 32)):
        log = TaggedLog(SharedLog(home.audit_file, Signer.load_or_create(home.signing_key)), name)
        log.append("run started", recipe_id=RECIPE.id, round=0)
        log.append("sites present", sites={"north": {"manifest": "cc" * 32}}, heads={})
        log.append("round aggregated", round=1, before=first, after=weights(run),
                   admitted={"north": {"digest": "dd" * 32, "epsilon": 7.9}}, refused={})  # fmt: skip
    where = [str(home.runs / "pilot")] if by_path else ["pilot", "--home", str(home.path)]
    assert export_verb([*where, "--unaudited"]) == 0
    logs = read_logs([home.path / "audit"])
    found = trace(home.runs / "pilot" / "release" / "model.onnx", logs)
    assert [link.before for link in found.rounds] == ["bb" * 32], "of pilot, and not of the other run"
    tags = {event.kind: event.facts.get("run") for event in logs[0].events[-2:]}
    assert tags == {"model exported": "pilot", "model released": "pilot"}
