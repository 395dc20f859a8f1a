"""After the last round: central evaluation, export, model card, report and summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import Recipe
from common.errors import ExportError
from common.exchange import Scores, Spent
from common.journal import Log
from common.metrics import Metrics
from common.models import build, set_weights
from common.privacy_audit import FILE as AUDIT_FILE
from common.privacy_audit import PrivacyAudit, told, unfit
from common.samples import Samples
from common.storage import write_whole
from server.accounts import cross_checks
from server.coordinator import Federated, round_line
from server.evaluate import CentralResult, central
from server.export import Exported, export_onnx, export_torchscript
from server.model_card import write_model_card
from server.quantise import FILE as INT8
from server.quantise import Quantised, export_int8
from server.quantise import told as told_int8
from server.report import Baselines, ExportLine, RunReport, SiteSummary, write_report
from server.rounds import ServerState, SiteRound, taken

_REFERENCE_SAMPLES = 64
_SAME, _MOSTLY = 0.99, 0.9
"""Shares of the test images: called one class, and of that class."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the reports say about the run beside its results."""

    started: str
    """ISO 8601, with the zone."""
    wall_s: float
    device: str
    versions: Mapping[str, str]
    baselines: Baselines | None = None
    refused_files: Mapping[str, Mapping[str, int]] | None = None
    """Site to reason code to files; known in a simulation only."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What a run came to."""

    report: RunReport
    exported: Exported
    summary: Mapping[str, Any]
    """What summary.json holds."""


def conclude(
    federated: Federated,
    recipe: Recipe,
    out: Path,
    *,
    test: Samples | None,
    device: torch.device,
    circumstances: Circumstances,
    audit: Log,
    torchscript: bool = False,
    int8: bool = False,
    prove: Callable[[str], PrivacyAudit] | None = None,
) -> Conclusion:
    """Evaluates and exports the final model, and writes report.html, model_card.md and summary.json into `out`.

    Args:
        test: The coordinator's own set, which no site holds; None leaves the central figures out.
        int8: Also write an 8-bit file, where it is twice as fast and as good; else the report says why not.
        prove: Audits the privacy mechanism for the model of this digest; None where nobody here can, as at a deployed
            coordinator. Without a passed audit every file says so, and `fedicom server export` does not release it.

    Raises:
        ExportError: The exported graph does not give the model's probabilities; the other files are not written.
        StorageError: The disk is full or not writable.
    """
    state = federated.state
    model = build(recipe)
    set_weights(model, state.weights)
    result = central(model, test, recipe, device=device) if test is not None else None
    if result is not None:
        audit.append("central evaluation", weights=state.weights.digest, values=_headline(result.metrics))
    model.cpu()
    spent = _spent(state)
    audited = _audited(recipe, state.weights.digest, out, audit, prove)
    unaudited = unfit(audited, recipe, state.weights.digest)
    exported = export_onnx(
        model,
        recipe,
        state.weights,
        out / "model.onnx",
        reference_x=_reference(test, recipe),
        operating_threshold=result.metrics.threshold if result else None,
        metrics=_headline(result.metrics) if result else None,
        privacy=_privacy(recipe, [item.epsilon for item in spent.values()], told(audited, unaudited)),
    )
    audit.append("model exported", file=exported.path.name, sha256=exported.sha256, weights=state.weights.digest)
    if torchscript:
        path = out / "model.ts.pt"
        traced = export_torchscript(model, recipe, state.weights, path, reference_x=_reference(test, recipe))
        audit.append("model exported", file=path.name, sha256=traced.sha256, weights=state.weights.digest)
    small = _int8(exported.path, recipe, test, out / INT8) if int8 else None
    if isinstance(small, Quantised):
        audit.append("model exported", file=INT8, sha256=small.sha256, weights=state.weights.digest)
        circumstances = replace(circumstances, notes=(*circumstances.notes, f"{small.sentence}."))
    elif small is not None:
        circumstances = replace(circumstances, notes=(*circumstances.notes, f"{INT8} was asked for and is {small}."))
    report = _report(federated, recipe, result, exported, circumstances, audited, unaudited)
    write_model_card(report, out / "model_card.md", exported=exported)
    write_report(report, out / "report.html")
    summary = {**_summary(report, exported), **({"int8": told_int8(small)} if small is not None else {})}
    write_whole(out / "summary.json", (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode())
    audit.append("run concluded", recipe_id=recipe.id, weights=state.weights.digest)
    return Conclusion(report=report, exported=exported, summary=summary)


def _int8(model: Path, recipe: Recipe, test: Samples | None, path: Path) -> Quantised | str:
    path.unlink(missing_ok=True)  # of an earlier attempt
    try:
        return export_int8(model, recipe, test, path)
    except ExportError as why:
        return str(why)


def _reference(test: Samples | None, recipe: Recipe) -> np.ndarray[Any, np.dtype[np.float32]]:
    if test is not None:
        return np.ascontiguousarray(test.x_N[:_REFERENCE_SAMPLES])
    shape = (8, recipe.model.channels, *recipe.data.size)
    return np.random.default_rng(recipe.seed).standard_normal(shape, dtype=np.float32)


def _spent(state: ServerState) -> dict[str, Spent]:
    """What each site reported last: one that was silent at the end has still spent what it spent."""
    return {name: done.spent for name, done in _rounds(state) if done.spent is not None}


def _rounds(state: ServerState) -> Iterator[tuple[str, SiteRound]]:
    return (done for report in state.history for done in report.accepted.items())


def _audited(
    recipe: Recipe, weights: str, out: Path, audit: Log, prove: Callable[[str], PrivacyAudit] | None
) -> PrivacyAudit | None:
    if prove is None or not recipe.privacy.active:
        return None
    found = prove(weights)
    found.write(out / AUDIT_FILE)
    audit.append(
        "privacy audited", recipe_id=recipe.id, weights=weights, passed=found.passed, failed=list(found.failed)
    )
    return found


def _privacy(recipe: Recipe, epsilons: list[float], audit: Mapping[str, object]) -> Mapping[str, Any]:
    if not recipe.privacy.active:
        return {"mechanism": "none", "audit": dict(audit)}
    if not epsilons:
        raise ExportError("the recipe demands differential privacy, but no site reported what it spent")
    return {
        "mechanism": recipe.privacy.mechanism,
        "unit": "patient",
        "epsilon": max(epsilons),
        "delta": recipe.privacy.delta,
        "accountant": "PLD",
        "seeded_noise": recipe.privacy.unsafe_seeded_noise,
        "audit": dict(audit),
    }


def _report(
    federated: Federated,
    recipe: Recipe,
    result: CentralResult | None,
    exported: Exported,
    circumstances: Circumstances,
    audited: PrivacyAudit | None,
    unaudited: str | None,
) -> RunReport:
    state, last = federated.state, federated.state.history[-1].accepted
    spent, earlier = _spent(state), taken(federated.state)
    of_scores = {name: done.scores_spent for name, done in _rounds(state) if done.scores_spent is not None}
    lines = [round_line(report) for report in state.history]
    lines[-1] = replace(lines[-1], of=earlier)
    refused = circumstances.refused_files
    sites = tuple(
        SiteSummary(
            name=name,
            patients={str(split): count for split, count in hello.patients.items()},
            counts_rounded=hello.counts_rounded,
            test=last[name].test if name in last else None,
            spent=spent.get(name),
            scores_spent=of_scores.get(name),
            refused_files=refused.get(name, {}) if refused is not None else None,
        )
        for name, hello in federated.hellos.items()
    )
    return RunReport(
        recipe=recipe,
        recipe_id=recipe.id,
        weight_digest=state.weights.digest,
        started=circumstances.started,
        wall_s=circumstances.wall_s,
        device=circumstances.device,
        versions=circumstances.versions,
        sites=sites,
        rounds=tuple(lines),
        taken=earlier,
        central=result.metrics if result else None,
        subgroups=result.subgroups if result else {},
        baselines=circumstances.baselines,
        export=ExportLine(
            file=exported.path.name,
            sha256=exported.sha256,
            max_abs_difference=exported.max_abs_difference,
            opset=exported.opset or 0,
            size_bytes=exported.bytes,
        ),
        audit=audited,
        unaudited=unaudited,
        notes=(
            *_notes(recipe, audited, unaudited),
            *_one_class(recipe, result),
            *_earlier(earlier, state.round),
            *_ended(state, recipe, tuple(federated.hellos)),
            *circumstances.notes,
        ),
    )


def _notes(recipe: Recipe, audited: PrivacyAudit | None, unaudited: str | None) -> tuple[str, ...]:
    privacy = recipe.privacy
    if not privacy.active:
        return ("privacy: none. Nothing bounds what this model may reveal about a training patient.",)
    if privacy.unsafe_seeded_noise:
        return (
            "unsafe_seeded_noise was on: anybody with the recipe can subtract the noise, so epsilon means nothing.",
        )
    if audited is not None and unaudited is not None:
        return (f"The privacy audit does not hold: {unaudited}. Do not release this model.",)
    return ()


def _earlier(taken: int | None, rounds: int) -> tuple[str, ...]:
    if taken is None:
        return ()
    return (f"Early stopping took the model after round {taken} of {rounds}: no later one did better on validation.",)


def _ended(state: ServerState, recipe: Recipe, sites: Sequence[str]) -> tuple[str, ...]:
    """What an operator's order to conclude left out."""
    if not state.ended:
        return ()
    silent = [site for site in sites if site not in state.history[-1].accepted]
    return (
        *([f"The training was ended by hand after round {state.round} of {recipe.rounds}."]
          if state.round < recipe.rounds else []),
        *([f"The run was concluded without the measures of {', '.join(silent)} on the final model."] if silent else []),
    )  # fmt: skip


def _one_class(recipe: Recipe, result: CentralResult | None) -> tuple[str, ...]:
    """A model that ranks well may still call everybody the same."""
    if result is not None and recipe.task.kind == "multilabel":
        found = result.metrics.values.get("recall")
        if found is None or found > 1 - _SAME:
            return ()
        return (
            f"Above one half the model finds {found:.0%} of what is in the central test images (mean of the classes). "
            "Use thresholds that were chosen on your own images.",
        )
    confusion = np.array(result.metrics.confusion if result is not None else ())
    if result is None or not confusion.size:
        return ()
    called, true = confusion.sum(axis=0) / confusion.sum(), confusion.sum(axis=1) / confusion.sum()
    most = int(called.argmax())
    if called[most] < _SAME or true[most] > _MOSTLY:
        return ()
    threshold = result.metrics.threshold
    point = f"the operating point ({threshold:.3g}) or " if threshold is not None else ""
    return (
        f"By its most probable class the model calls {called[most]:.0%} of the central test images "
        f"'{recipe.task.classes[most]}', and {true[most]:.0%} are. Use {point}a threshold that was chosen on your own "
        "images.",
    )


def _summary(report: RunReport, exported: Exported) -> Mapping[str, Any]:
    def auroc(values: Mapping[str, float]) -> dict[str, Any]:
        ends = [values.get("auroc_low"), values.get("auroc_high")]
        return {"auroc": values.get("auroc"), "auroc_ci": ends if None not in ends else None}

    def site(summary: SiteSummary) -> dict[str, Any]:
        test: Scores | None = summary.test
        checks = cross_checks(summary.spent)
        return {
            "patients": sum(summary.patients.values()) if all(summary.patients.values()) else None,  # 0: not told
            "train_patients": summary.patients.get("train") or None,
            "patients_rounded_down": summary.counts_rounded,
            **auroc(test.values if test is not None else {}),
            "epsilon": summary.spent.epsilon if summary.spent else None,
            "epsilon_prv": checks.prv if checks else None,
            "epsilon_rdp": checks.rdp if checks else None,
            "delta": summary.spent.delta if summary.spent else None,
            "noised_scores": test is not None and test.noised,
            "scores_epsilon": summary.scores_spent.epsilon if summary.scores_spent else None,
            "scores_delta": summary.scores_spent.delta if summary.scores_spent else None,
        }

    summary: dict[str, Any] = {
        "recipe": report.recipe.name,
        "recipe_id": report.recipe_id,
        "weight_digest": report.weight_digest,
        "rounds": report.trained,
        "model_round": report.trained if report.taken is None else report.taken,
        "privacy": report.recipe.privacy.mechanism,
        "privacy_audit": dict(told(report.audit, report.unaudited)),
        "global": auroc(report.central.values if report.central else {}),
        "sites": {item.name: site(item) for item in report.sites},
        "onnx": {"sha256": exported.sha256, "max_abs_difference": exported.max_abs_difference},
        "notes": list(report.notes),
        "wall_s": round(report.wall_s, 1),
    }
    if report.baselines is not None:
        centralised = report.baselines.centralised
        summary["baselines"] = {
            "centralised": auroc(centralised.values if centralised else {}),
            "alone": {name: auroc(metrics.values) for name, metrics in report.baselines.alone.items()},
        }
    return summary


def _headline(metrics: Metrics) -> dict[str, float]:
    return {
        name: value for name, value in metrics.values.items() if name.startswith(("auroc", "auprc", "brier", "ece"))
    }
