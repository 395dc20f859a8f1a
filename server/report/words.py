"""How numbers and names are put into words: one place, so that the report never says the same thing two ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common.epsilon import rounded_up
from common.html import Html, tag

if TYPE_CHECKING:
    from common.metrics import Metrics
    from server.report import RunReport, SiteSummary

_METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1 score",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
}
_LOWER_IS_BETTER = frozenset({"brier", "ece", "loss"})

GLOSSARY = (
    ("AUROC", "The chance that a case with the finding scores higher than one without: 1 is perfect, 0.5 guessing."),
    ("AUPRC", "Area under the curve of precision against recall; guessing gives the share of cases with the finding."),
    ("Sensitivity, specificity", "Share of cases with the finding that are found; share of the others left alone."),
    ("Recall, F1 score", "Recall is another word for sensitivity; F1 weighs it with the share of right alarms."),
    ("Balanced accuracy", "Mean over the classes of the share that is told right, so that rare classes count as much."),
    ("Calibration error (ECE)", "Mean distance of predicted probabilities from observed frequencies; 0 is perfect."),
    ("Brier score", "Mean squared difference between the predicted probability and the truth; 0 is perfect."),
    ("Confidence interval", "Range in which the result would mostly fall if other, similar patients had been tested."),
    ("Epsilon, delta", "Strength of differential privacy: epsilon bounds how much one patient can change what leaves a "
     "hospital, delta is the small chance that the bound fails. Smaller is stronger for both."),
    ("Clip norm, noise", "The most that one patient can add to a step, and the noise that hides it, as its multiple."),
    ("Round", "The coordinator sends the model out, each hospital trains it, and the changes are combined."),
    ("Validation, test", "Patients kept out of training: validation patients to follow it, test patients to judge it."),
    ("Central test set", "Images at the coordinator that no hospital holds."),
    ("Update norm", "Size of the change that a hospital sent in a round (L2 norm)."),
    ("Digest, SHA-256", "A fingerprint: two files or models with the same one are the same."),
)  # fmt: skip
"""Every technical word of the page, in plain ones."""


NOT_TOLD = "not told"
"""A count that is 0: nobody is told which of the reasons it has."""
WHY_NOT_TOLD = (
    "A count is not told where it is too small for the site or the recipe, where the site's policy tells none, or "
    "where it went under masks as the site's weight."
)


def of_counts(sites: Sequence[SiteSummary]) -> tuple[str, ...]:
    """What a reader of the hospitals' numbers of patients has to know of them."""
    rounded, said = [site.name for site in sites if site.counts_rounded and any(site.patients.values())], []
    if rounded:
        said.append(f"Rounded down, by up to a quarter, by their policy: numbers of patients of {', '.join(rounded)}.")
    if any(count == 0 for site in sites for count in site.patients.values()):
        said.append(WHY_NOT_TOLD)
    return tuple(said)


def of_scores(sites: Sequence[SiteSummary]) -> str | None:
    """Which hospitals' results are not quite what the model does there, and their price; None where there are none."""
    noised = [site.name for site in sites if site.test is not None and site.test.noised and site.test.values]
    paid = [site.scores_spent for site in sites if site.scores_spent is not None]
    said = []
    if noised:
        said.append(
            f"Noised by their policy, with the numbers of patients behind them: results of {', '.join(noised)}."
        )
    if paid:
        epsilon, delta = max(spent.epsilon for spent in paid), max(spent.delta for spent in paid)
        said.append(
            f"Noised scores cost a hospital epsilon {rounded_up(epsilon)} at most, at delta {small(delta)}, beside "
            "what its updates cost."
        )
    return " ".join(said) or None


def value(values: Mapping[str, float], name: str) -> float | None:
    """The number of this name, None where it is missing or not defined."""
    found = values.get(name)
    return None if found is None or not math.isfinite(found) else found


def number(x: float) -> str:
    return f"{x:.3f}"


def number_or_dash(x: float | None) -> str:
    return "–" if x is None else number(x)


def plain(x: float) -> str:
    """A setting as it was written, without trailing zeros."""
    return f"{x:g}"


def factor(spent: float) -> str:
    """e to the power of epsilon, rounded up: it is a bound."""
    if spent > 13:
        return "more than 400,000"
    odds = math.exp(spent)
    return f"{math.ceil(100 * odds) / 100:.2f}" if odds < 10 else f"{math.ceil(odds):,}"


def threshold(of: float) -> str:
    """A probability to compare with: three digits after the point would make of a rare finding's one nought."""
    return f"{of:.6g}"


def small(x: float) -> str:
    return f"{x:.2g}".replace("e-0", "e-") if x else "0"


def percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def level(share: float) -> str:
    """A share that somebody set, in full: 99.5 % is neither 99 nor 100."""
    return f"{100 * share:g} %"


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def confidence(report: RunReport) -> str:
    return level(report.recipe.evaluation.confidence)


def interval(
    values: Mapping[str, float], name: str, report: RunReport, *, prefix: str = "", bare: bool = False
) -> str | None:
    """The interval of a metric in words, None where it has none; `bare` leaves out the level."""
    low, high = value(values, f"{name}_low"), value(values, f"{name}_high")
    if low is None or high is None:
        return None if not prefix else ""
    span = f"{number(low)} to {number(high)}"
    return span if bare else f"{prefix}{confidence(report)} interval {span}"


def shortened(text: str, length: int) -> str:
    """At most `length` characters; an ellipsis stands for the rest."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def suppressed(report: RunReport) -> str:
    return f"suppressed (< {report.recipe.evaluation.min_cell} patients)"


def hidden(report: RunReport) -> Html:
    return absent(suppressed(report))


def absent(why: str) -> Html:
    return tag("span", why, class_="hidden-cell")


def metric(name: str, report: RunReport) -> str:
    """Title of a metric."""
    if name == "sensitivity_at_specificity":
        return f"Sensitivity at {level(report.recipe.evaluation.specificity)} specificity"
    return _METRICS.get(name, name.replace("_", " ").capitalize())


def direction(name: str) -> str:
    return "lower" if name in _LOWER_IS_BETTER else "higher"


def stopped_early(report: RunReport) -> str:
    """What follows the number of rounds, where early stopping took an earlier model than the last; else nothing."""
    return "" if report.taken is None else f", and early stopping took the one after round {report.taken}"


def counted(groups: Mapping[str, Metrics]) -> bool:
    """Whether patients of subgroups may be counted: beside the total of the test set, the other groups' counts would
    give away a suppressed one."""
    return not any(metrics.suppressed for metrics in groups.values())
