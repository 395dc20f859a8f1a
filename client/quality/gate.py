"""What a site asks of its own data before anything is trained on it."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.quality.survey import fingerprint
from client.versions import seal
from common.deployment import QualityGate, SiteHome
from common.errors import DataError, StorageError
from common.identity import read_private
from common.storage import storing, write_whole


class QualityError(DataError):
    """The site's own limits keep its data out of training."""


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


def require_quality(home: SiteHome, gate: QualityGate, recipe: str) -> None:
    """Lets training by the recipe of this name begin only where the newest report of its images keeps the limits.

    Raises:
        QualityError: It does not, or there is none about just these images and labels.
        DataError: site.yaml names no data folder for it.
        StorageError: Report or folder cannot be read.
    """
    folder = home.path / home.config.data_of(recipe)
    key = read_private(home.cohort_key, "a cohort key")
    if found := standing_objections(home.quality_file(folder), folder, key, gate):
        raise QualityError(f"the limits of site.yaml (quality) are not kept: {'; '.join(found)}")


def keep_report(path: Path, report: Mapping[str, Any], key: bytes) -> None:
    """Keeps the site's newest report, sealed, for `standing_objections`.

    Raises:
        StorageError: It cannot be written.
    """
    write_whole(path, json.dumps({**report, "seal": seal(report, key)}).encode())


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
        sealed = str(report.pop("seal"))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StorageError(f"the quality report cannot be read; {advice}") from None
    if not hmac.compare_digest(sealed, seal(report, key)):
        raise StorageError(f"the quality report was changed, or was written with another site key; {advice}")
    if report.get("fingerprint") != fingerprint(folder, table, key):
        return (f"images or labels have changed since the last quality report; {advice}",)
    return objections(report, gate)
