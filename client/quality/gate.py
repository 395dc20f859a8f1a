"""What a site asks of its own data before anything is trained on it."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from client.quality.survey import fingerprint
from common.errors import StorageError
from common.storage import storing, write_whole

Fraction = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False), kw_only=True)
class QualityGate:
    """Limits of the quality report; a site that sets them trains only while its newest report keeps them."""

    max_duplicates_across_patients: Annotated[int, Ge(0)] = 0
    """Groups of images that are equal pixel by pixel and lie under more than one patient."""
    max_near_duplicates_across_patients: Annotated[int, Ge(0)] | None = None
    """Pairs of nearly equal images of different patients; null: any number."""
    max_duplicates_across_splits: Annotated[int, Ge(0)] = 0
    """Groups of equal images of which some are for training and others for validation or test."""
    min_kappa: Annotated[float, Ge(-1), Le(1)] = 0.6
    """Cohen's kappa of every two annotators, where the label table has them."""
    required_tags: tuple[str, ...] = ("Manufacturer", "PixelSpacing")
    """Keywords of header elements that `max_missing_fraction` is about; PixelSpacing stands for all kinds of it."""
    max_missing_fraction: Fraction = 0.5
    """Share of the images that may lack any one of `required_tags`."""
    min_class_patients: Annotated[int, Ge(0)] = 5
    """Patients of the rarest class."""
    max_suspect_fraction: Fraction = 0.2
    """Share of the labels that cross-validated predictions speak against."""
    max_text_fraction: Fraction = 0.02
    """Share of the images in which text seems to be burned in."""
    max_refused_fraction: Fraction = 0.5
    """Share of the files that cannot be used."""
    max_unlabelled_fraction: Fraction = 1.0
    """Share of the images that have no label, and are left out."""


def objections(report: Mapping[str, Any], gate: QualityGate) -> tuple[str, ...]:
    """Why this data shall not be trained on; empty when nothing speaks against it.

    Args:
        report: JSON of `client.quality.report.Report`. What it does not say is an objection.
        gate: The site's limits.
    """
    try:
        return tuple(_objections(report, gate))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ("the quality report is not of this version; run `fedicom data report` again",)


def _objections(report: Mapping[str, Any], gate: QualityGate) -> list[str]:
    found: list[str] = []

    def most(value: float, limit: float | None, what: str, *, share: bool = False) -> None:
        if limit is not None and value > limit:
            shown = (f"{value:.1%}", f"{limit:.1%}") if share else (f"{value:g}", f"{limit:g}")
            found.append(f"{what}: {shown[0]}, at most {shown[1]} is allowed")

    images = max(1, int(report["images"]) + int(report["volumes"]))
    duplicates = report["duplicates"]
    across = sum(1 for group in duplicates if group["across_patients"])
    most(across, gate.max_duplicates_across_patients, "equal images under different patients")
    near = int(report["near_duplicates_across_patients"])
    most(near, gate.max_near_duplicates_across_patients, "nearly equal images under different patients")
    splits = sum(1 for group in duplicates if group["across_splits"])
    most(splits, gate.max_duplicates_across_splits, "equal images on different sides of the split")
    for each in report["agreement"]:
        value = each["kappa"]["value"]
        if value is None or value < gate.min_kappa:
            shown = "not defined" if value is None else f"{value:.2f}"
            found.append(f"agreement of two annotators: kappa {shown}, at least {gate.min_kappa:g} is asked for")
    for keyword in gate.required_tags:
        about = report["missing_tags"].get(keyword)
        if about is None:
            found.append(f"the report does not look for the tag {keyword}; name others in required_tags")
            continue
        most(about["missing"] / max(1, about["of"]), gate.max_missing_fraction, f"images without {keyword}", share=True)
    least = min(report["class_patients"].values(), default=0)
    if least < gate.min_class_patients:
        found.append(f"patients of the rarest class: {least}, at least {gate.min_class_patients} are asked for")
    suspects = report["label_suspects"]
    named = len(suspects["named"]) / max(1, int(suspects["examined"]))
    most(named, gate.max_suspect_fraction, "labels that the images speak against", share=True)
    most(len(report["text_suspects"]) / images, gate.max_text_fraction, "images with burned-in text", share=True)
    refused = sum(report["refused"].values()) / max(1, int(report["files"]))
    most(refused, gate.max_refused_fraction, "files that cannot be used", share=True)
    most(int(report["unlabelled"]) / images, gate.max_unlabelled_fraction, "images without a label", share=True)
    return found


def keep_report(path: Path, report: Mapping[str, Any], key: bytes) -> None:
    """Keeps the site's newest report, sealed, for `standing_objections`.

    Raises:
        StorageError: It cannot be written.
    """
    write_whole(path, json.dumps({**report, "seal": _seal(report, key)}).encode())


def standing_objections(path: Path, folder: Path, key: bytes, gate: QualityGate) -> tuple[str, ...]:
    """As `objections`, of the report that was kept; without one about just these images and labels, that is one.

    Args:
        path: Of `keep_report`.
        folder: The data folder of the site, which holds labels.csv.
        key: The site's secret.

    Raises:
        StorageError: Report or folder cannot be read.
    """
    advice = "run `fedicom data report` with --site"
    with storing("the quality report"):
        if not path.exists():
            return (f"there is no quality report of these images, and site.yaml asks for one; {advice}",)
        text = path.read_bytes()
    with storing("labels.csv"):
        table = (folder / "labels.csv").read_bytes()
    try:
        report = json.loads(text)
        seal = str(report.pop("seal"))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StorageError(f"the quality report cannot be read; {advice}") from None
    if not hmac.compare_digest(seal, _seal(report, key)):
        raise StorageError(f"the quality report was changed, or was written with another site key; {advice}")
    if report.get("fingerprint") != fingerprint(folder, table, key):
        return (f"images or labels have changed since the last quality report; {advice}",)
    return objections(report, gate)


def _seal(report: Mapping[str, Any], key: bytes) -> str:
    plain = json.dumps(report, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, plain.encode(), "sha256").hexdigest()
