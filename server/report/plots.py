"""Which plots the report has, with their captions, legends and words for those who cannot see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from common.epsilon import rounded_up
from common.html import Child, Html, items, tag
from server.report import RunReport, figures, words
from server.report.figures import CAP, CENTRALISED, GLOBAL, Points, Row, Stroke

if TYPE_CHECKING:
    from common.metrics import Metrics

_TRAINED = "rounds of training behind the model"


def course_figures(report: RunReport) -> Html:
    """Validation AUROC and loss, epsilon, and update norms over the rounds."""
    strokes = _strokes(report)
    # The model that comes into round r has r - 1 rounds behind it; one that early stopping took is measured again.
    auroc, loss = (
        {
            site: _ordered(
                (float(line.behind), found)
                for line in report.rounds
                if site in line.validation
                and (found := words.value(line.validation[site].values, key)) is not None
            )
            for site in strokes
        }
        for key in ("auroc", "loss")
    )  # fmt: skip
    mean = _ordered(
        (float(line.behind), line.mean_validation) for line in report.rounds if line.mean_validation is not None
    )
    spent = _series(strokes, [(line.round, line.epsilon) for line in report.rounds])
    norms = _series(strokes, [(line.round, line.update_norms) for line in report.rounds])
    parts: list[Html] = []
    if any(auroc.values()) or mean:
        end = f" The mean ends at {words.number(mean[-1][1])}." if mean else ""
        if report.taken is not None and (own := dict(mean).get(float(report.taken))) is not None:
            end += f" The model is that after round {report.taken}, with {words.number(own)}."
        svg = figures.by_round(
            "validation", auroc, strokes, label="validation AUROC", x_label=_TRAINED, mean=mean, bounds=(0, 1),
            alt=f"Validation AUROC of each hospital over the rounds.{end}",
        )  # fmt: skip
        parts.append(_figure("Validation AUROC", svg, f"Higher is better, 0.5 is guessing.{end}"))
    if any(loss.values()):
        svg = figures.by_round(
            "loss", loss, strokes, label="validation loss", x_label=_TRAINED, mean=_mean(loss),
            alt="Validation loss of each hospital over the rounds.",
        )  # fmt: skip
        parts.append(_figure("Validation loss", svg, "Lower is better; a rise while AUROC holds is over-confidence."))
    if any(spent.values()):
        cap = report.recipe.privacy.epsilon
        most = max(y for points in spent.values() for _, y in points)
        limit = f" The limit is {rounded_up(cap)}." if cap is not None else ""
        whole = rounded_up(max((site.spent.epsilon for site in report.sites if site.spent is not None), default=most))
        if whole != rounded_up(most):  # a round that was given up, or a reply that came too late, is paid all the same
            limit = f" Training that went into no round brings it to {whole}.{limit}"
        svg = figures.by_round(
            "epsilon", spent, strokes, label="epsilon spent", x_label="round", cap=cap, from_zero=True,
            cap_label=f"limit {rounded_up(cap)}" if cap is not None else "",
            alt=f"Epsilon spent by each hospital over the rounds; the highest is {rounded_up(most)}.{limit}",
        )  # fmt: skip
        caption = f"Privacy cost so far, of all rounds together; the highest is {rounded_up(most)}.{limit}"
        parts.append(_figure("Epsilon spent", svg, caption))
    if any(norms.values()):
        svg = figures.by_round(
            "norms", norms, strokes, label="L2 norm of the update", x_label="round", from_zero=True,
            alt="Size of each hospital's update over the rounds.",
        )  # fmt: skip
        parts.append(_figure("Size of the updates", svg, "One hospital far above the others deserves a look."))
    shared: list[tuple[str, Stroke]] = [*strokes.items()]
    if any(len(points) for points in auroc.values()) or mean:
        shared.append(("mean over hospitals", GLOBAL))
    if any(spent.values()) and report.recipe.privacy.epsilon is not None:
        shared.append(("limit of epsilon", CAP))
    return tag("div", *parts, tag("div", _legend(shared), class_="wide"), class_="figures")


def performance_figures(report: RunReport, central: Metrics) -> Html:
    """ROC with the operating point and the baselines, and the calibration of the final model."""
    parts: list[Html] = []
    named = _curves(report, central)
    if named:
        point = central.operating_point
        auroc = words.number_or_dash(words.value(central.values, "auroc"))
        svg = figures.roc(
            "roc", [(points, stroke) for _, points, stroke in reversed(named)], point=point,
            alt=f"ROC curve of the federated model on the central test set, AUROC {auroc}.",
        )  # fmt: skip
        caption = f"Further up and left is better.{_positive(report)}"
        if point is not None and central.threshold is not None:
            caption += (
                " The dot is the operating point: positive from a probability of "
                f"{words.threshold(central.threshold)}, sensitivity {words.number(point[1])} at specificity "
                f"{words.number(1 - point[0])}."
            )
        legend = _legend([(name, stroke) for name, _, stroke in named])
        parts.append(_figure("ROC curve", svg, caption, legend))
    if any(count for _, _, count in central.bins):
        ece = words.number_or_dash(words.value(central.values, "ece"))
        svg = figures.calibration(
            "calibration", central.bins,
            alt=f"Reliability diagram of the federated model, expected calibration error {ece}.",
        )  # fmt: skip
        what, over = {
            "binary": ("the positive class", ""),
            "multiclass": ("the most probable class", ""),
            "multilabel": ("each finding, all in one", ", each finding by itself,"),
        }[report.recipe.task.kind]
        caption = (
            f"Probability of {what}: on the dotted diagonal, a predicted 70 % comes true in 70 % of cases. Mean "
            f"distance (ECE){over} {ece}. Below: how many samples got each probability."
        )
        parts.append(_figure("Calibration", svg, caption))
    return tag("div", *parts, class_="figures")


def comparison_figures(report: RunReport) -> Html:
    """AUROC with interval: federated, centralised and each site alone, then the hospitals on their own patients."""
    strokes = _strokes(report)
    rows: list[Row] = []
    if report.central is not None:
        rows += [Row("On the central test set"), _row("Federated", report.central, GLOBAL)]
    if report.baselines is not None:
        if report.baselines.centralised is not None:
            rows.append(_row("Centralised", report.baselines.centralised, CENTRALISED))
        rows += [
            _row(f"{words.shortened(site, 18)} alone", metrics, strokes.get(site, CAP))
            for site, metrics in report.baselines.alone.items()
        ]
    rows.append(Row("Federated, own test set"))
    rows += [
        _values_row(site.name, site.test.values if site.test is not None else {}, strokes[site.name])
        for site in report.sites
    ]
    if all(row.value is None for row in rows):
        return tag("p", "No AUROC is known, so there is nothing to set side by side.")
    told = "; ".join(f"{row.label} {words.number(row.value)}" for row in rows if row.value is not None)
    svg = figures.comparison("comparison", rows, label="AUROC", chance=0.5, alt=f"AUROC compared. {told}.")
    caption = (
        f"Dots are AUROC, bars the {words.confidence(report)} interval. Where bars overlap widely, a difference may be "
        "chance."
    )
    return tag("div", _figure("AUROC side by side", svg, caption), class_="figures")


def _curves(report: RunReport, central: Metrics) -> list[tuple[str, Points, Stroke]]:
    """Binary tasks: federated, centralised and each site alone; others: one curve a class of the federated model."""
    if report.recipe.task.kind != "binary":
        strokes = figures.site_strokes(list(central.roc))
        return [(name, points, strokes[name]) for name, points in central.roc.items()]
    models: list[tuple[str, Metrics | None, Stroke]] = [("federated", central, GLOBAL)]
    if report.baselines is not None:
        strokes = _strokes(report)
        models.append(("centralised", report.baselines.centralised, CENTRALISED))
        models += [
            (f"{site} alone", metrics, strokes.get(site, CAP)) for site, metrics in report.baselines.alone.items()
        ]
    return [
        (name, points, stroke)
        for name, metrics, stroke in models
        if metrics is not None
        for points in metrics.roc.values()
    ]


def _figure(title: str, svg: Html, caption: str, legend: Html | None = None) -> Html:
    return tag("figure", tag("h3", title), svg, legend, tag("figcaption", caption))


def _legend(entries: Sequence[tuple[str, Stroke]]) -> Html:
    lines: list[Child] = [Html(figures.swatch(stroke) + tag("span", name)) for name, stroke in entries]
    return items(*lines, class_="legend")


def _ordered(points: Iterable[tuple[float, float]]) -> Points:
    """By round; where one was measured twice, the later measure."""
    return sorted(dict(points).items())


def _strokes(report: RunReport) -> dict[str, Stroke]:
    seen = dict.fromkeys(site.name for site in report.sites)
    for line in report.rounds:
        seen |= dict.fromkeys(sorted({*line.validation, *line.epsilon, *line.update_norms}))
    return figures.site_strokes(list(seen))


def _series(sites: Mapping[str, Stroke], rounds: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Points]:
    return {
        site: [
            (float(number), found)
            for number, values in rounds
            if (found := words.value(values, site)) is not None
        ]
        for site in sites
    }  # fmt: skip


def _mean(lines: Mapping[str, Points]) -> Points:
    at: dict[float, list[float]] = {}
    for points in lines.values():
        for x, y in points:
            at.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(at.items())]


def _row(label: str, metrics: Metrics | None, stroke: Stroke) -> Row:
    return _values_row(label, {} if metrics is None or metrics.suppressed else metrics.values, stroke)


def _values_row(label: str, values: Mapping[str, float], stroke: Stroke) -> Row:
    middle, low, high = (words.value(values, f"auroc{end}") for end in ("", "_low", "_high"))
    return Row(label, middle, low, high, stroke)


def _positive(report: RunReport) -> str:
    task = report.recipe.task
    return f" Positive is “{task.classes[1]}”." if task.kind == "binary" else " One curve a class, against the rest."
