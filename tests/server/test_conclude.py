"""What summary.json says of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ExportError
from common.metrics import Metrics
from server.accounts import cross_checks
from server.conclude import _one_class, _privacy, _summary
from server.evaluate import CentralResult
from server.export import Exported
from server.report import RunReport
from tests.server.test_report import lean, make, unlike

EXPORTED = Exported(
    path=Path("model.onnx"), sha256="e" * 64, max_abs_difference=6e-7, bytes=1234, opset=20, description=None
)


def summary(report: RunReport) -> Mapping[str, Any]:
    return _summary(report, EXPORTED)


def test_counts_that_were_not_told_are_null_and_not_nought() -> None:
    report = lean(make())
    north, south = report.sites
    untold = replace(north, patients={"train": 0, "validation": 0, "test": 0})
    partly = replace(south, patients={"train": 61, "validation": 13, "test": 0})
    sites = summary(replace(report, sites=(untold, partly)))["sites"]
    assert (sites["north"]["patients"], sites["north"]["train_patients"]) == (None, None)
    assert (sites["south"]["patients"], sites["south"]["train_patients"]) == (None, 61)
    assert summary(report)["sites"]["south"]["patients"] == 61 + 13 + 17


def test_the_summary_says_whose_numbers_of_patients_are_rounded_down() -> None:
    report = lean(make())
    north, south = report.sites
    sites = summary(replace(report, sites=(north, replace(south, counts_rounded=True))))["sites"]
    assert [sites[name]["patients_rounded_down"] for name in ("north", "south")] == [False, True]


def test_the_summary_says_of_which_round_the_model_is() -> None:
    report = lean(make())
    assert (summary(report)["rounds"], summary(report)["model_round"]) == (1, 1)
    assert summary(replace(report, rounds=make().rounds, taken=2))["model_round"] == 2


def test_each_figure_of_the_summary_is_that_of_its_name() -> None:
    report = unlike()
    found = summary(report)
    assert report.central is not None
    assert report.baselines is not None
    assert report.baselines.centralised is not None
    north, _ = report.sites
    assert north.spent is not None

    def auroc(values: Mapping[str, float]) -> dict[str, Any]:
        return {"auroc": values["auroc"], "auroc_ci": [values["auroc_low"], values["auroc_high"]]}

    checks = cross_checks(north.spent)
    assert checks is not None
    assert checks.prv < checks.rdp
    assert found["sites"]["north"] == {
        "patients": 91, "train_patients": 61, "auroc": 0.75, "auroc_ci": [0.625, 0.875], "epsilon": 1.4961,
        "epsilon_prv": checks.prv, "epsilon_rdp": checks.rdp, "delta": 1e-5, "noised_scores": True,
        "patients_rounded_down": False,
        "scores_epsilon": 0.5, "scores_delta": 3e-5,
    }  # fmt: skip
    assert (found["sites"]["south"]["auroc"], found["sites"]["south"]["epsilon"]) == (None, 2.4961)
    assert found["global"] == auroc(report.central.values)
    assert found["baselines"]["centralised"] == auroc(report.baselines.centralised.values)
    assert found["baselines"]["alone"]["south"] == auroc(report.baselines.alone["south"].values)


def test_the_model_file_carries_the_highest_epsilon_of_its_hospitals() -> None:
    recipe = make().recipe
    told = _privacy(recipe, [1.5, 2.5, 2.0], {"status": "passed"})
    assert (told["epsilon"], told["delta"], told["unit"], told["audit"]) == (2.5, 1e-5, "patient", {"status": "passed"})
    assert _privacy(make(private=False).recipe, [], {}) == {"mechanism": "none", "audit": {}}
    with pytest.raises(ExportError, match="no site reported what it spent"):
        _privacy(recipe, [], {})


@pytest.mark.parametrize(
    ("confusion", "said"),
    [
        (((1, 49), (0, 50)), "calls 99% of the central test images 'lesion', and 50% are"),
        (((50, 0), (49, 1)), "calls 99% of the central test images 'clear', and 50% are"),
        (((2, 48), (0, 50)), None),  # 98 of 100
        (((0, 9), (0, 91)), None),  # and so are 91 of 100
    ],
)
def test_a_model_that_calls_everybody_the_same_is_told(
    confusion: tuple[tuple[int, ...], ...], said: str | None
) -> None:
    metrics = Metrics(patients=100, confusion=confusion, threshold=0.125)
    result = CentralResult(metrics=metrics, subgroups={})
    notes = _one_class(make().recipe, result)
    assert [said in note for note in notes] == ([True] if said else [])
    assert all("Use the operating point (0.125) or a threshold" in note for note in notes)


@pytest.mark.parametrize(
    ("recall", "said"), [(0.0, "finds 0% of what is"), (0.01, "finds 1% of what is"), (0.02, None)]
)
def test_a_multilabel_model_that_finds_nothing_above_one_half_is_told(recall: float, said: str | None) -> None:
    recipe = make().recipe
    recipe = replace(recipe, task=replace(recipe.task, kind="multilabel"))
    result = CentralResult(metrics=Metrics(patients=100, values={"auroc": 0.95, "recall": recall}), subgroups={})
    assert [said in note for note in _one_class(recipe, result)] == ([True] if said else [])
    unknown = CentralResult(metrics=Metrics(suppressed=True), subgroups={})
    assert _one_class(recipe, unknown) == ()
