"""The report of a run: what it holds, and one HTML file that shows it without network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.storage import write_whole

if TYPE_CHECKING:
    from common.config import Recipe
    from common.exchange import Scores, ScoresSpent, Spent
    from common.metrics import Metrics
    from common.privacy_audit import PrivacyAudit


@dataclass(frozen=True, kw_only=True)
class RoundLine:
    """One round, as the coordinator saw it.

    `validation` is of the model that came *into* the round, that is, after `round - 1` rounds of training.
    The closing evaluation is the line of round `rounds + 1`, with nothing accepted; a second one, where early stopping
    took an earlier model, is of that.
    """

    round: int
    mean_validation: float | None = None
    """Mean over sites of the validation AUROC; None where no site gave one."""
    validation: Mapping[str, Scores] = field(default_factory=dict)
    """Site to scores; a site below the minimum cell has no values in it."""
    train_loss: Mapping[str, float] = field(default_factory=dict)
    """Site to mean training loss; empty under privacy."""
    accepted: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Site to why its reply was not used: a refusal of the site or of the coordinator, or silence."""
    update_norms: Mapping[str, float] = field(default_factory=dict)
    """Site to L2 norm of its update."""
    epsilon: Mapping[str, float] = field(default_factory=dict)
    """Site to epsilon spent so far, this round included."""
    seconds: float = 0.0
    of: int | None = None
    """Rounds of training behind the model that `validation` is of; None: `round - 1`."""

    @property
    def behind(self) -> int:
        """Rounds of training behind the model that was measured."""
        return self.round - 1 if self.of is None else self.of


@dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """One hospital at the end of the run."""

    name: str
    patients: Mapping[str, int]
    """Split (train, validation, test) to patients; 0: not told, see `words.WHY_NOT_TOLD`."""
    counts_rounded: bool = False
    """Whether the site's policy rounds them down."""
    test: Scores | None = None
    """Of the final model on the site's own test patients."""
    spent: Spent | None = None
    """None without privacy."""
    scores_spent: ScoresSpent | None = None
    """None where the site noised no scores."""
    refused_files: Mapping[str, int] | None = None
    """Reason code to DICOM files left out; known in a simulation only, a deployed site keeps it at home."""


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """As many passes over the images as the model has behind it, without federation; all on the central test set."""

    centralised: Metrics | None
    """Trained on the pooled data; None where the model has no round behind it."""
    alone: Mapping[str, Metrics]
    """Site to the model trained on that site only."""


@dataclass(frozen=True, kw_only=True)
class ExportLine:
    """The ONNX file that passed its gate."""

    file: str
    sha256: str
    max_abs_difference: float
    """Largest difference of a probability between torch and onnxruntime."""
    opset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that a report shows; nothing in it can name a patient."""

    recipe: Recipe
    recipe_id: str
    weight_digest: str
    started: str
    """ISO 8601, with the zone."""
    wall_s: float
    device: str
    versions: Mapping[str, str]
    sites: tuple[SiteSummary, ...]
    rounds: tuple[RoundLine, ...]
    taken: int | None = None
    """Rounds behind the model, where early stopping took an earlier one than the last."""
    central: Metrics | None = None
    """Of the final model on the coordinator's test set."""
    subgroups: Mapping[str, Mapping[str, Metrics]] = field(default_factory=dict)
    """Column of labels.csv to value to metrics, on the central test set."""
    baselines: Baselines | None = None
    export: ExportLine | None = None
    audit: PrivacyAudit | None = None
    """Of the privacy mechanism; None where none was made."""
    unaudited: str | None = None
    """Why the model may not be released as audited; None when it may, or nobody asked."""
    notes: tuple[str, ...] = ()
    """Warnings, shown first: `privacy: none`, `unsafe_seeded_noise was on: the privacy figures do not hold`."""

    @property
    def trained(self) -> int:
        """Rounds that changed the model."""
        return sum(1 for line in self.rounds if line.accepted)

    @property
    def noised_scores(self) -> float | None:
        """The most that a hospital paid, in epsilon, for scores that it noised; None where none were."""
        return max((site.scores_spent.epsilon for site in self.sites if site.scores_spent is not None), default=None)

    @property
    def exact_scores(self) -> bool:
        """Whether a hospital gave scores that carry no noise, of the final model or of one on the way."""
        told = [site.test for site in self.sites] + [one for line in self.rounds for one in line.validation.values()]
        return any(scores is not None and scores.values and not scores.noised for scores in told)


def write_report(report: RunReport, path: Path) -> None:
    """Writes one self-contained HTML file, atomically; the same report gives the same bytes.

    Raises:
        StorageError: The file could not be written.
    """
    # Imported here: matplotlib takes half a second, and reading the types above needs none of it.
    from server.report.page import page

    write_whole(path, page(report).encode())
