"""What summary.json says of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.conclude import _summary
from server.export import Exported
from server.report import RunReport
from tests.server.test_report import lean, make

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


def test_the_summary_says_of_which_round_the_model_is() -> None:
    report = lean(make())
    assert (summary(report)["rounds"], summary(report)["model_round"]) == (1, 1)
    assert summary(replace(report, rounds=make().rounds, taken=2))["model_round"] == 2
