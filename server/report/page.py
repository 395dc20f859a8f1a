"""The sections of the report, from the verdict down to the versions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from common import exchange
from common.config import as_plain
from common.epsilon import rounded_up
from common.html import Child, Html, card, document, items, join, moment, pairs, table, tag
from common.metrics import SCALARS
from common.printable import number_of
from server.accounts import cross_checks
from server.report import RunReport, SiteSummary, words
from server.report.plots import comparison_figures, course_figures, performance_figures
from server.report.privacy import audit_part, epsilon_course

if TYPE_CHECKING:
    from common.config import Privacy
    from common.exchange import Spent
    from common.metrics import Metrics


_SPLITS = ("train", "validation", "test")


def page(report: RunReport) -> str:
    """The whole document."""
    sections: list[tuple[str, str, Child]] = [
        ("sites", "Hospitals", _sites(report)),
        ("course", "Training, round by round", _course(report)),
        ("performance", "How well it works", _performance(report)),
        ("comparison", "Comparison", _comparison(report)),
        ("privacy", "Privacy", _privacy(report)),
        ("left", "What left the hospitals", _left()),
        ("refused", "What was refused", _refused(report)),
        ("model", "Model file", _export(report)),
        ("recipe", "Recipe and versions", _recipe(report)),
        ("glossary", "Words used here", _glossary()),
    ]
    recipe = report.recipe
    meta = f"Started {moment(report.started)} · took {words.duration(report.wall_s)} · on {report.device}"
    top = (
        tag("p", "Federated training report", class_="eyebrow"),
        tag("h1", recipe.name),
        tag("p", recipe.description) if recipe.description else None,
        tag("p", meta, class_="meta"),
        _warnings(report.notes),
        tag("p", _verdict(report), class_="lead"),
        _cards(report),
    )
    footer = f"Written by Fedicom. Recipe {report.recipe_id}."
    return document(f"Fedicom report: {recipe.name}", top, sections, footer)


def _warnings(notes: Sequence[str]) -> Html | None:
    if not notes:
        return None
    return tag("div", tag("h2", "Read this first"), items(*notes), class_="warn", role="note")


def _verdict(report: RunReport) -> str:
    who, rounds = number_of(len(report.sites), "hospital"), number_of(report.trained, "round")
    start = (
        f"A model was trained at {who} over {rounds}{words.stopped_early(report)}; the images stayed where they were. "
    )
    central = _shown(report.central)
    auroc = words.value(central.values, "auroc") if central else None
    if auroc is None or central is None:
        result = "There is no central test result to judge it by. "
    else:
        result = (
            f"On {central.patients} test patients that no hospital holds, it tells {_classes(report)} apart with an "
            f"AUROC of {words.number(auroc)}{words.interval(central.values, 'auroc', report, prefix=', ')}. "
        )
        low, high = (words.value(central.values, f"auroc_{end}") for end in ("low", "high"))
        if low is not None and high is not None and low <= 0.5:
            result += (
                "The interval includes 0.5: this cannot be told from guessing. "
                if high >= 0.5
                else "The interval lies below 0.5: it is worse than guessing, as if classes had changed places. "
            )
    return start + result + _privacy_verdict(report)


def _privacy_verdict(report: RunReport) -> str:
    if not report.recipe.privacy.active:
        return "It was trained without differential privacy: nothing bounds what it may reveal about a patient."
    if report.recipe.privacy.unsafe_seeded_noise:
        return "Its noise was seeded and can be subtracted: it gives no privacy, whatever epsilon says below."
    spent = [site.spent for site in report.sites if site.spent is not None]
    if not spent:
        return "Differential privacy was asked for, but no hospital reported what it spent."
    epsilon, delta = max(item.epsilon for item in spent), max(item.delta for item in spent)
    return (
        f"Each patient is protected by differential privacy with epsilon at most {rounded_up(epsilon)} "
        f"(delta {words.small(delta)})."
    )


def _cards(report: RunReport) -> Html:
    central = _shown(report.central)
    auroc = words.value(central.values, "auroc") if central else None
    if auroc is not None and central is not None:
        first = card("AUROC, central test", words.number(auroc), words.interval(central.values, "auroc", report))
    elif report.central is not None and report.central.suppressed:
        first = card("AUROC, central test", "suppressed", words.suppressed(report), small=True)
    else:
        first = card("AUROC, central test", "–", "not measured")
    privacy = report.recipe.privacy
    spent = [site.spent for site in report.sites if site.spent is not None]
    if not privacy.active:
        second = card("Privacy", "none", "no bound on leakage", small=True)
    elif spent:
        more = f"delta {words.small(max(item.delta for item in spent))}"
        if privacy.epsilon is not None:
            more += f", limit {rounded_up(privacy.epsilon)}"
        second = card("Epsilon, highest", rounded_up(max(item.epsilon for item in spent)), more)
    else:
        second = card("Epsilon, highest", "–", "not reported")
    train = [site.patients.get("train", 0) for site in report.sites]
    rounded = any(site.counts_rounded and site.patients.get("train") for site in report.sites)
    return tag(
        "div",
        first,
        second,
        card("Hospitals", str(len(report.sites)), f"quorum {report.recipe.federation.quorum}"),
        card("Rounds", str(report.trained), _planned(report)),
        card("Training patients", f"{sum(train):,}" if any(train) else "–", _counted(train, rounded)),
        card("Model", tag("span", report.weight_digest[:12], class_="hash"), "start of the weight digest", small=True),
        class_="cards",
    )


def _planned(report: RunReport) -> str:
    earlier = "" if report.taken is None else f"; the model is that after round {report.taken}"
    return f"of {report.recipe.rounds} planned{earlier}"


def _counted(train: Sequence[int], rounded: bool) -> str | None:
    if not any(train):
        return words.NOT_TOLD if train else None
    untold = train.count(0)
    said = [
        *(["rounded down"] if rounded else []),
        *([f"and those of {number_of(untold, 'site')}, {words.NOT_TOLD}"] if untold else []),
    ]
    return "; ".join(said) or None


def _sites(report: RunReport) -> Html:
    private = report.recipe.privacy.active
    head = ["Hospital", "Train", "Validation", "Test", "AUROC, own test", "Sensitivity*", "Calibration error"]
    rows = []
    for site in report.sites:
        row: list[Child] = [site.name, *(_patients(site, split) for split in _SPLITS)]
        if site.test is None:
            row += [words.absent("not reported"), "–", "–"]
        elif not site.test.values:
            row += [words.absent("suppressed (too few patients)"), "–", "–"]
        else:
            values = site.test.values
            row += [_metric(values, key, report) for key in ("auroc", "sensitivity_at_specificity", "ece")]
        if private:
            row.append(rounded_up(site.spent.epsilon) if site.spent else "–")
        rows.append(row)
    if private:
        head.append("Epsilon spent")
    specificity = words.level(report.recipe.evaluation.specificity)
    noised = words.of_scores(report.sites)
    return join(
        tag("p", "Patients of each hospital by split, and the final model on the hospital's own test patients."),
        table(head, rows, caption="Patients and results by hospital"),
        tag("p", f"* at {specificity} specificity. Small type: {words.confidence(report)} interval.", class_="meta"),
        tag("p", noised, class_="meta") if noised else None,
        *(tag("p", said, class_="meta") for said in words.of_counts(report.sites)),
    )


def _course(report: RunReport) -> Html:
    if not report.rounds:
        return tag("p", "No round was completed.")
    return join(
        tag("p", "Each thin line is a hospital, the bold line their mean. Results are on validation patients, "
            "who were never trained on."),
        course_figures(report),
    )  # fmt: skip


def _performance(report: RunReport) -> Html:
    central = report.central
    if central is None:
        return tag("p", "The coordinator had no test set of its own, so only the hospitals' own results are known.")
    if central.suppressed:
        return tag("p", f"The central test set is too small to show: {words.suppressed(report)}.")
    intro = (
        f"The final model on the coordinator's test set: {number_of(central.patients, 'patient')} whom no hospital "
        "holds. "
        f"Intervals come from {report.recipe.evaluation.bootstraps:,} resamplings of patients."
    )
    rows = [
        (
            words.metric(name, report),
            words.number_or_dash(words.value(central.values, name)),
            words.interval(central.values, name, report, bare=True) or "–",
            words.direction(name),
        )
        for name in SCALARS
        if name in central.values
    ]
    head = ("Measure", "Value", f"{words.confidence(report)} interval", "Better is")
    return join(
        tag("p", intro),
        performance_figures(report, central),
        _confusion(report, central),
        table(head, rows, caption="All measures on the central test set"),
        *_subgroups(report),
    )


def _confusion(report: RunReport, central: Metrics) -> Html | None:
    if not central.confusion:
        return None
    classes = report.recipe.task.classes
    rows = []
    for name, counts in zip(classes, central.confusion, strict=True):
        total = sum(counts)
        cells: list[Child] = [name]
        for count in counts:
            share = count / total if total else 0.0
            cells.append(
                tag("div", str(count), tag("span", words.percent(share), class_="sub"), style=f"--share:{share:.2f}")
            )
        rows.append(cells)
    head = ("True class", *(f"called {name}" for name in classes))
    inner = table(
        head,
        rows,
        caption="Confusion matrix: samples by true class (rows) and most probable class (columns)",
        class_="confusion",
    )
    return join(tag("h3", "Where it errs"), inner)


def _subgroups(report: RunReport) -> Iterable[Html]:
    if not report.subgroups:
        return
    yield tag("h3", "Subgroups")
    yield tag(
        "p",
        f"Groups of fewer than {report.recipe.evaluation.min_cell} patients are suppressed, "
        "so that nobody can be recognised in them.",
    )
    keys = ("auroc", "sensitivity_at_specificity", "ece")
    for column, groups in sorted(report.subgroups.items()):
        counted = words.counted(groups)
        rows: list[list[Child]] = []
        for value, metrics in sorted(groups.items()):
            if metrics.suppressed:
                rows.append([value, words.hidden(report), "–", "–"])
            else:
                count = [f"{metrics.patients:,}"] if counted else []
                rows.append([value, *count, *(_metric(metrics.values, key, report) for key in keys)])
        head = (column, *(["Patients"] if counted else []), *(words.metric(key, report) for key in keys))
        remark = "" if counted else "; counts are left out, as they would give the small group away"
        yield table(head, rows, caption=f"By {column}, on the central test set{remark}")


def _comparison(report: RunReport) -> Html:
    intro = (
        "Results stand beside each other only where the test patients are the same: the upper group shares the "
        "central test set, in the lower group every hospital has its own."
    )
    parts: list[Child] = [tag("p", intro), comparison_figures(report)]
    baselines = report.baselines
    if baselines is not None:
        rows: list[list[Child]] = []
        named: list[tuple[str, Metrics | None]] = [
            ("Federated", report.central),
            ("Centralised (all data pooled)", baselines.centralised),
            *((f"{site} alone", metrics) for site, metrics in baselines.alone.items()),
        ]
        keys = ("auroc", "auprc", "balanced_accuracy", "ece")
        for name, metrics in named:
            if metrics is None:
                rows.append([name, words.absent("not run"), *["–"] * (len(keys) - 1)])
            elif metrics.suppressed:
                rows.append([name, words.hidden(report), *["–"] * (len(keys) - 1)])
            else:
                rows.append([name, *(_metric(metrics.values, key, report) for key in keys)])
        head = ("Training", *(words.metric(key, report) for key in keys))
        parts.append(
            table(
                head,
                rows,
                caption="As many passes over the images as the federated model has behind it; same central test set",
            )
        )
    return join(*parts)


def _privacy(report: RunReport) -> Html:
    if (compression := report.recipe.federation.compression) != "none":
        rounded = (
            f"Updates were rounded to {compression} before they left the hospitals, after any noise; what that left "
            "out stayed there until the next round. That is no protection, and costs no epsilon."
        )
        return join(tag("p", rounded), _of_patients(report))
    if not report.recipe.privacy.secure_aggregation:
        return _of_patients(report)
    seen = (
        "The updates went into secure sums: the coordinator saw the sum of each round, and no single hospital's update."
    )
    return join(tag("p", seen), _of_patients(report))


def _of_patients(report: RunReport) -> Html:
    if not report.recipe.privacy.active:
        return join(
            tag("p", "This run used no differential privacy. Images did not leave the hospitals, but updates and the "
                "final model are computed from them, and known attacks can rebuild training images or tell whether "
                "a patient took part. Treat the model file as if it held patient data."),
        )  # fmt: skip
    privacy = report.recipe.privacy
    spent = [site for site in report.sites if site.spent is not None]
    parts: list[Child] = [
        tag("p", "In every training step the influence of each patient on the update is cut to a fixed size, and "
            "random noise is added that hides any one patient. Epsilon measures what is left: smaller is stronger."),
    ]  # fmt: skip
    if spent and not privacy.unsafe_seeded_noise:
        worst = max(site.spent.epsilon for site in spent if site.spent is not None)
        delta = max(site.spent.delta for site in spent if site.spent is not None)
        parts.append(
            tag("p", f"Here epsilon is at most {rounded_up(worst)}. Whatever anybody believes about one patient, "
                f"seeing all updates of the patient's hospital can change the odds by a factor of "
                f"{words.factor(worst)} at the very most (e to the power of epsilon; epsilon 1 would give 2.72), "
                f"save for a chance of {words.small(delta)} (delta). This is the worst case, not what an attack "
                "is known to reach.")
        )  # fmt: skip
    rows = [
        [
            site.name, rounded_up(s.epsilon), *_cross_checks(s), words.small(s.delta),
            words.number(s.noise_multiplier), words.plain(s.clip_norm),
            words.percent(s.sampling_rate, 2), f"{s.steps:,}",
        ]
        for site in report.sites
        if (s := site.spent) is not None
    ]  # fmt: skip
    head = ("Hospital", "Epsilon", "by PRV", "by RDP", "Delta", "Noise (times clip)", "Clip norm", "Patients a step",
            "Noised steps")  # fmt: skip
    parts += [
        table(head, rows, caption="What each hospital spent, by its own ledger") if rows else None,
        epsilon_course(report),
        items(
            "The unit is the patient: all images of a person together.",
            "Each hospital counts for itself over all its steps and rounds (accounting by privacy loss distributions, "
            "PLD). PRV, another numerical method, and RDP, an older and looser bound, are cross-checks, computed here "
            "from the noise, the share of patients and the steps. Hospitals do not add up, unless the same person was "
            "a patient of several: then theirs do.",
            _noise(privacy),
        ),
        *audit_part(report),
        tag("h3", "What this does not protect"),
        items(
            "Facts about the whole population that the model learns, and that then apply to a patient too.",
            *_scores_told(report),
            "The patients of the central test set, with whom the coordinator works directly.",
            "A hospital's own computers and staff; the coordinator sees each hospital's noised update.",
        ),
    ]
    return join(*parts)


def _scores_told(report: RunReport) -> Iterable[str]:
    least = report.recipe.evaluation.min_cell
    if report.noised_scores is None:
        yield (
            "That a hospital took part, its patient counts, and its validation and test results. They carry no noise; "
            f"none is given for fewer than {least} patients."
        )
        return
    yield (
        "That a hospital took part, and its patient counts, as far as its policy tells them. Scores were noised at the "
        f"hospitals that want it, and their ledgers paid epsilon {rounded_up(report.noised_scores)} for them at "
        "most, beside the figures above, which are of the updates."
    )
    if report.exact_scores:
        yield (
            "Validation and test results of the other hospitals. They carry no noise, and no epsilon covers them; none "
            f"is given for fewer than {least} patients."
        )


def _cross_checks(spent: Spent) -> tuple[str, str]:
    found = cross_checks(spent)
    if found is None:
        return "–", "–"
    return "–" if found.prv is None else rounded_up(found.prv), rounded_up(found.rdp)


def _noise(privacy: Privacy) -> str:
    if privacy.unsafe_seeded_noise:
        return "The noise was seeded from the recipe and can be subtracted: the figures above do not hold."
    source = "a ChaCha20 keystream" if privacy.secure_rng else "a generator seeded by the operating system"
    return f"The noise came from {source}, afresh at each hospital; no seed is in the recipe or ever sent."


def _left() -> Html:
    rows = []
    for name, kind in vars(exchange).items():
        doc = (kind.__doc__ or "") if is_dataclass(kind) and kind.__module__ == exchange.__name__ else ""
        if doc.startswith("Site to coordinator: "):
            summary = doc.splitlines()[0].removeprefix("Site to coordinator: ")
            rows.append([name, summary[:1].upper() + summary[1:], ", ".join(f.name for f in fields(kind))])
    return join(
        tag("p", "Only messages of these types can leave a hospital. None has a place for an image, a name, "
            "an identifier or a file path."),
        table(("Message", "What it is", "Fields"), rows, caption="The closed list of what may leave", numbers_from=9),
    )  # fmt: skip


def _refused(report: RunReport) -> Html:
    rows: list[list[Child]] = [
        [str(line.round), site, why] for line in report.rounds for site, why in sorted(line.refused.items())
    ]
    parts: list[Child] = []
    if rows:
        parts.append(table(("Round", "Hospital", "Why"), rows, caption="Replies that were not used", numbers_from=9))
    else:
        parts.append(tag("p", "Every reply of every hospital was used."))
    known = [(site.name, site.refused_files) for site in report.sites if site.refused_files is not None]
    if known:
        codes = sorted({code for _, files in known for code, count in files.items() if count})
        if codes:
            cells = [[name, *(str(files.get(code, 0)) for code in codes)] for name, files in known]
            heads = ("Hospital", *(code.replace("_", " ") for code in codes))
            parts.append(table(heads, cells, caption="DICOM files left out, by reason (known in a simulation only)"))
        else:
            parts.append(tag("p", "Every DICOM file was used."))
    return join(*parts)


def _export(report: RunReport) -> Html:
    export = report.export
    if export is None:
        return tag("p", "No model file was exported.")
    return join(
        tag("p", "The exported file gave the same probabilities as the trained model before it was written."),
        pairs(
            ("File", export.file),
            ("SHA-256", tag("span", export.sha256, class_="hash")),
            ("Largest difference", f"{words.small(export.max_abs_difference)} (probability; limit 1e-4)"),
            ("Format", f"ONNX, operator set {export.opset}"),
            ("Size", words.size(export.size_bytes)),
            ("Weight digest", tag("span", report.weight_digest, class_="hash")),
        ),
    )


def _recipe(report: RunReport) -> Html:
    pretty = json.dumps(as_plain(report.recipe), indent=2, sort_keys=True, ensure_ascii=False)
    versions = pairs(*sorted(report.versions.items()))
    return join(
        tag("p", "The recipe decides everything that was trained. Each hospital approves it by this number, the "
            "SHA-256 of its canonical form: ", tag("span", report.recipe_id, class_="hash")),
        tag("details", tag("summary", "The recipe"), tag("pre", pretty)),
        tag("details", tag("summary", "Versions of the coordinator's software"), versions),
    )  # fmt: skip


def _glossary() -> Html:
    return pairs(*words.GLOSSARY)


def _shown(metrics: Metrics | None) -> Metrics | None:
    return None if metrics is None or metrics.suppressed else metrics


def _classes(report: RunReport) -> str:
    classes = report.recipe.task.classes
    return " and ".join(f"“{name}”" for name in classes) if len(classes) == 2 else f"{len(classes)} classes"


def _patients(site: SiteSummary, split: str) -> Child:
    count = site.patients.get(split)
    if count is None:
        return "–"
    return f"{count:,}" if count else words.absent(words.NOT_TOLD)


def _metric(values: Mapping[str, float], name: str, report: RunReport) -> Child:
    found = words.value(values, name)
    if found is None or math.isnan(found):
        return words.absent("not defined")
    return join(words.number(found), tag("span", words.interval(values, name, report, bare=True), class_="sub"))
