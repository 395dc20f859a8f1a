"""The quality report as one HTML file that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Sequence

from client.quality import plots
from client.quality.agreement import Agreement, Kappa
from client.quality.hashes import BITS, THRESHOLD
from client.quality.report import Points, Report
from client.quality.writing import MIN_EDGE, MIN_LETTERS
from common.html import Child, Html, card, document, items, join, table, tag
from common.printable import number_of

_MOST_ROWS = 60
_HISTOGRAMS = (
    ("vendor", "Vendor"), ("model", "Model"), ("modality", "Modality"), ("kvp", "Peak kilovoltage, kV"),
    ("spacing_mm", "Spacing, mm"), ("matrix", "Matrix"), ("year", "Year of study"), ("age", "Age, years"),
    ("sex", "Sex"), ("burned_in_annotation", "Header says: text burned in"),
)  # fmt: skip


def page(report: Report, points: Points | None) -> str:
    """The whole document."""
    sections: list[tuple[str, str, Child]] = [
        ("findings", "Findings", _findings(report)),
        ("classes", "Classes", _classes(report)),
        ("images", "Images", _images(report)),
        ("tags", "Missing tags, unused files", _missing(report)),
        ("duplicates", "Duplicates", _duplicates(report)),
        ("text", "Text in the image", _text(report)),
        ("agreement", "Annotators", _agreement(report)),
        ("suspects", "Labels to look at", _suspects(report)),
        ("map", "Map of the images", _map(points)),
        ("split", "Split", _split(report)),
        ("limits", "What this page cannot see", _limits()),
    ]
    top = (
        tag("p", "Data quality report", class_="eyebrow"),
        tag("h1", "What these images and labels are like"),
        tag("p", f"Made {report.made.replace('T', ' ')} UTC, from {number_of(report.files, 'file')}", class_="meta"),
        tag("p", report.notice, class_="local", role="note"),
        tag("p", _verdict(report), class_="lead"),
        _cards(report),
    )
    footer = (
        "Images and people appear as pseudonyms; fedicom data report DIR --where NAME prints whose files they are, "
        f"on this machine alone. {report.notice}"
    )
    return document("Fedicom data quality: local only", top, sections, footer, css=plots.CSS, listed=False)


def _verdict(report: Report) -> str:
    errors = sum(each.level == "error" for each in report.findings)
    warnings = sum(each.level == "warning" for each in report.findings)
    if report.objections:
        return "The limits of this site are not kept: nothing is trained on these images until they are mended."
    if errors:
        return f"{number_of(errors, 'error')} to mend before anything is trained."
    if warnings:
        return f"No error; {number_of(warnings, 'warning')} to look at."
    return "No error and no warning."


def _cards(report: Report) -> Html:
    found = ((report.images, "image"), (report.volumes, "volume"))
    units = [number_of(count, noun) for count, noun in found if count]
    labelled = report.images + report.volumes - report.unlabelled
    return tag(
        "div",
        card("Patients", f"{report.patients:,}"),
        card("Studies", f"{report.studies:,}"),
        card("Series", f"{report.series:,}", ", ".join(units)),
        card("With a label", f"{labelled:,}", f"{len(report.classes)} classes, by {report.key}"),
        card("Files not used", f"{sum(report.refused.values()):,}", f"of {report.files:,}"),
        class_="cards",
    )


def _findings(report: Report) -> Html:
    parts: list[Child] = []
    if report.objections is not None:
        if report.objections:
            parts.append(
                tag(
                    "div", tag("h2", "This site's limits (site.yaml, quality)"), items(*report.objections),
                    class_="warn", role="note",
                )
            )  # fmt: skip
        else:
            parts.append(tag("p", "The limits in site.yaml are kept."))
    lines = [
        tag(
            "li",
            tag("span", each.level, class_="level"),
            tag("span", f"{each.what[0].upper()}{each.what[1:]}. ", tag("span", _sentence(each.do), class_="do")),
            class_=each.level,
        )
        for each in report.findings
    ]
    parts.append(tag("ul", *lines, class_="found") if lines else tag("p", "Nothing was found that speaks against it."))
    return join(*parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _classes(report: Report) -> Html:
    return tag(
        "div",
        plots.figure("Images by class", plots.bars(report.class_images)),
        plots.figure(
            "Patients by class", plots.bars(report.class_patients),
            caption="A patient with images of two classes counts in both.",
        ),
        class_="figures",
    )  # fmt: skip


def _images(report: Report) -> Html:
    parts = [plots.figure(title, plots.bars(report.histograms[key])) for key, title in _HISTOGRAMS]
    note = (
        "Bars count images and volumes. The name of a machine that fewer than 5 patients share is shown as a "
        "pseudonym, because anything may be typed there."
    )
    return join(tag("div", *parts, class_="figures three"), tag("p", note, class_="muted"))


def _missing(report: Report) -> Html:
    parts: list[Child] = []
    lacking = {name: about for name, about in report.missing_tags.items() if about["missing"]}
    if lacking:
        rows = [
            (name, f"{about['missing']:,}", f"{about['of']:,}", f"{about['missing'] / about['of']:.1%}")
            for name, about in sorted(lacking.items(), key=lambda each: -each[1]["missing"] / each[1]["of"])
        ]
        parts.append(
            table(
                ("Tag", "Missing or empty", "Images that should have it", "Share"), rows,
                caption="Header elements that are missing; PixelSpacing stands for all kinds of spacing",
            )
        )  # fmt: skip
    else:
        parts.append(tag("p", "No header element that was looked for is missing."))
    if report.refused:
        rows_refused = [(code, f"{count:,}") for code, count in sorted(report.refused.items(), key=lambda e: -e[1])]
        parts.append(table(("Reason", "Files"), rows_refused, caption="Files that are not used; docs/data.md explains"))
    return join(*parts)


def _duplicates(report: Report) -> Html:
    parts: list[Child] = []
    if report.duplicates:
        rows = [
            (
                " ".join(group.images[:6]) + (f" and {len(group.images) - 6} more" if len(group.images) > 6 else ""),
                "ERROR: several patients" if group.across_patients else "one patient",
                " ".join(group.patients[:4]) + (" ..." if len(group.patients) > 4 else ""),
                "yes" if group.labels_differ else "no",
                "yes" if group.across_splits else "no",
            )
            for group in report.duplicates[:_MOST_ROWS]
        ]
        parts.append(
            table(
                ("Images", "Under", "Patients", "Labels differ", "Both sides of the split"), _coded(rows),
                caption=f"Equal pixel by pixel after decoding{_first(len(report.duplicates))}", numbers_from=9,
            )
        )  # fmt: skip
    else:
        parts.append(tag("p", "No two images are equal pixel by pixel."))
    across, within = report.near_duplicates_across_patients, report.near_duplicates_within_patients
    told = (
        f"Nearly equal are two images whose perceptual hashes of {BITS} bits differ in at most {THRESHOLD}: "
        f"pairs of different patients: {across:,}, of the same patient: {within:,}."
    )
    parts.append(tag("p", told))
    if report.near_duplicates:
        near = [
            (
                " ".join(pair.images),
                "one patient" if pair.patients[0] == pair.patients[1] else "different patients",
                " ".join(dict.fromkeys(pair.patients)),
                "yes" if pair.labels_differ else "no",
                str(pair.bits),
            )
            for pair in report.near_duplicates[:_MOST_ROWS]
        ]
        parts.append(
            table(
                ("Images", "Under", "Patients", "Labels differ", "Bits"), _coded(near),
                caption=f"Nearly equal{_first(across + within)}", numbers_from=4,
            )
        )  # fmt: skip
    return join(*parts)


def _coded(rows: Sequence[tuple[str, ...]]) -> list[tuple[Child, ...]]:
    """Pseudonyms, in the first and the third column, in the font of code."""
    return [tuple(tag("code", cell) if at in (0, 2) else cell for at, cell in enumerate(row)) for row in rows]


def _first(count: int) -> str:
    return f"; the first {_MOST_ROWS} of {count:,}, all are in the JSON" if count > _MOST_ROWS else ""


def _text(report: Report) -> Html:
    total = report.images + report.volumes
    told = (
        f"{report.text_examined:,} of {total:,} images were examined; those smaller than {MIN_EDGE} pixels cannot be. "
        f"A suspect has at least {MIN_LETTERS} letter-like marks on one line near the top or bottom edge. "
        "Images whose header says that text is burned in are refused before (burned_in_text)."
    )
    parts: list[Child] = [tag("p", told)]
    if report.text_suspects:
        rows = [
            (tag("code", image), tag("code", patient), str(count))
            for image, patient, count in report.text_suspects[:_MOST_ROWS]
        ]
        parts.append(
            table(
                ("Image", "Patient", "Marks on a line"), rows, numbers_from=2,
                caption=f"What looks like burned-in text{_first(len(report.text_suspects))}",
            )
        )  # fmt: skip
    return join(*parts)


def _agreement(report: Report) -> Html | None:
    if not report.agreement:
        return None
    return join(*(_one_agreement(each) for each in report.agreement))


def _one_agreement(each: Agreement) -> Html:
    one, other = each.annotators
    rows = [
        ("Cohen's kappa", _kappa(each.kappa)),
        ("weighted, linear", _kappa(each.linear)),
        ("weighted, quadratic", _kappa(each.quadratic)),
    ]
    cells = [(name, *map(str, row)) for name, row in zip(each.classes, each.confusion, strict=True)]
    told = (
        f"{one} and {other} both labelled {each.items:,}, {each.same:,} of them alike. Kappa is the agreement beyond "
        "chance: 1 is perfect, 0 is chance; below 0.8 is a warning. Weighted kappa is for classes that have an order."
    )
    return join(
        tag("h3", f"{one} and {other}"),
        tag("p", told),
        tag(
            "div",
            table(("", "Value, 95 % interval"), rows, caption="Agreement beyond chance"),
            table((f"{one} ↓  {other} →", *each.classes), cells, caption="Who said what"),
            class_="figures",
        ),
    )


def _kappa(value: Kappa) -> str:
    if value.value is None:
        return "not defined"
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _suspects(report: Report) -> Html:
    found = report.label_suspects
    parts: list[Child] = []
    if found.auroc is not None:
        parts.append(
            tag(
                "p",
                f"{len(found.named):,} of {found.examined:,} labels are suspect. Each was predicted from small "
                f"pictures by a linear model that had not seen this patient; these predictions have an AUROC of "
                f"{found.auroc:.2f}. The lower that is, the less this list is worth. A suspect is a reason to look at "
                "the images, no reason to change a label without looking.",
            )
        )
    parts += [tag("p", f"{why[0].upper()}{why[1:]}.", class_="muted") for why in found.why_not]
    if found.named:
        rows = [
            (tag("code", each.row), tag("code", each.patient), each.given, each.predicted, f"{each.probability:.2f}")
            for each in found.named[:_MOST_ROWS]
        ]
        parts.append(
            table(
                ("Row of labels.csv", "Patient", "Label", "More probable", "Probability"), rows, numbers_from=4,
                caption=f"The most certain first{_first(len(found.named))}",
            )
        )  # fmt: skip
    return join(*parts)


def _map(points: Points | None) -> Html | None:
    if points is None:
        return None
    first, second = (f"{share:.0%}" for share in points.map.explained)
    parts: list[Child] = []
    for title, xy, said in (
        ("PCA", points.map.pca, f"The two axes hold {first} and {second} of the variance."),
        ("t-SNE", points.map.tsne, "Neighbours are alike; distances and sizes of clusters mean nothing."),
    ):
        if xy is None:
            continue
        for what, groups in (("class", points.classes), ("vendor", points.vendors)):
            alt = f"{title} of {len(groups)} images, coloured by {what}"
            parts.append(
                plots.figure(
                    f"{title}, by {what}", plots.scatter(xy, groups, alt=alt), plots.legend(groups), caption=said
                )
            )
    what = "images" if points.dimensions == 2 else "volumes"
    told = (
        f"{len(points.classes):,} {what}, each a point, placed by its small picture. Where points part by vendor more "
        "than by class, a model can learn the machine in place of the finding. Such a map can tell about single "
        "patients, so it stays on this page."
    )
    return join(tag("p", told), tag("div", *parts, class_="figures"))


def _split(report: Report) -> Html:
    if report.splits is None:
        return tag("p", "The split into training, validation and test patients is made at the first training.")
    crossed = sum(group.across_splits for group in report.duplicates)
    told = (
        "Every patient is on exactly one side: the split is one entry a patient, sealed. "
        f"Images that lie on two sides, as equal images of different patients: {crossed}."
    )
    return join(plots.figure("Patients", plots.bars(report.splits)), tag("p", told))


def _limits() -> Html:
    return items(
        "Near duplicates that are turned, mirrored or cut by two percent or more are mostly not found; two exposures "
        "of one patient may be.",
        "Text in small letters, in colour overlays, in the middle of the image or as dark as its background is not "
        "found; rulers and labels on a plaster may be.",
        "Label suspects come from coarse small pictures: a small nodule is invisible to them. Mistakes that were made "
        "in the same way for many patients look right. Rare kinds of a class look wrong.",
        "Agreement says that annotators agree, not that they are right.",
        "Nobody's identity can be read here, but small groups and this map are about real patients: keep the page as "
        "you keep the images.",
    )
