"""The model card: what a model is, for whom, how well it does, and what is not known about it.

Source: Mitchell et al. 2019, "Model Cards for Model Reporting"; the sections are theirs, with privacy and
provenance added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.epsilon import rounded_down, rounded_up
from common.exchange import Scores, Spent
from common.html import moment
from common.metrics import SCALARS
from common.onnx_model import STATEMENT
from common.privacy_audit import told
from common.storage import write_whole
from server.export import Exported
from server.report import RunReport, SiteSummary, words

ABSENT = "not given"
_TRAINED = {
    "all": "all",
    "head": "the classification head; all else as in the file",
    "norm_bias": "the classification head, biases and scales of norms; all else as in the file",
    "lora": "the classification head and low-rank additions, merged into the weights; all else as in the file",
}


def write_model_card(report: RunReport, path: Path, *, exported: Exported | None = None) -> None:
    """Writes the card as Markdown, in one step; the same report gives the same bytes.

    No number is made up or left out in silence: what the report does not hold is named as not given.

    Args:
        report: The run; its notes are shown first.
        exported: The ONNX file the card lies beside; None where there is none.

    Raises:
        StorageError: The file could not be written.
    """
    parts = [
        _head(report),
        _details(report, exported),
        _use(report),
        _factors(report),
        _metrics(report, exported),
        _evaluation_data(report),
        _training_data(report),
        _results(report),
        _privacy(report),
        _caveats(report),
        _provenance(report, exported),
        release_section(told(report.audit, report.unaudited)),
    ]
    write_whole(path, ("\n\n".join("\n".join(part) for part in parts) + "\n").encode())


def _head(report: RunReport) -> Iterator[str]:
    yield f"# Model card: {_text(report.recipe.name)}"
    yield ""
    yield f"**{STATEMENT}**"
    for note in report.notes:
        yield ""
        yield f"> **Note:** {_text(note)}"


def _details(report: RunReport, exported: Exported | None) -> Iterator[str]:
    recipe = report.recipe
    model, task, data, training = recipe.model, recipe.task, recipe.data, recipe.training
    start = f"local file, SHA-256 `{model.weights_sha256}`" if model.weights_file else "random, from the recipe's seed"
    yield "## Model details"
    yield ""
    yield from _table(
        ("", ""),
        [
            ("Description", _text(recipe.description) or ABSENT),
            ("Developed by", ABSENT),
            ("Licence of the weights", ABSENT),
            (
                "Trained",
                f"from {_text(moment(report.started))}, {report.wall_s:.0f} s in all, on {_text(report.device)}",
            ),
            (
                "Network",
                f"{model.family} {_code(model.name)}, {model.dimensions}D, norm {model.norm}, stem {model.stem}, "
                f"width {model.width:g}",
            ),
            ("Initial weights", start),
            ("Trained parameters", _TRAINED[model.trainable]),
            ("Task", f"{task.kind}: {', '.join(_text(name) for name in task.classes)}"),
            ("Input", f"float32 (batch, 1, {', '.join(map(str, data.size))}), one channel"),
            ("Preprocessing", _preprocessing(report)),
            (
                "Outputs",
                "`logits` and `probabilities`, (batch, classes); "
                + ("a sigmoid for each class" if task.kind == "multilabel" else "softmax over classes"),
            ),
            ("Calibration", "none: the probabilities are the network's own"),
            (
                "Training",
                f"{recipe.rounds} rounds planned, {report.trained} changed the model{words.stopped_early(report)}; "
                f"{recipe.federation.strategy} over {recipe.federation.sites} sites, {training.local_epochs:g} local "
                f"epochs, {training.optimizer}, learning rate {training.lr:g}, batch {training.batch_size}, "
                f"{training.loss}",
            ),
            ("More", "the recipe, embedded in the ONNX file, decides everything else" if exported else "the recipe"),
        ],
    )


def _preprocessing(report: RunReport) -> str:
    data = report.recipe.data
    scale = (
        f"values {data.low:g} to {data.high:g}"
        if data.intensity == "window"
        else f"percentiles {data.low:g} to {data.high:g} of each image"
    )
    spacing = "spacing of the source" if data.spacing_mm is None else f"spacing {_times(data.spacing_mm)} mm"
    orientation = f", orientation {data.orientation}" if report.recipe.task.dimensions == 3 else ""
    return (
        f"{spacing}{orientation}, {data.fit} to {_times(data.size)}; {scale} scaled to [0, 1], minus {data.mean:g}, "
        f"divided by {data.std:g}"
    )


def _use(report: RunReport) -> Iterator[str]:
    task = report.recipe.task
    modalities = ", ".join(_text(name) for name in report.recipe.data.modalities) or "any (the recipe names none)"
    yield "## Intended use"
    yield ""
    yield f"- Intended: research on telling {', '.join(_text(name) for name in task.classes)} apart in "
    yield f"  {task.dimensions}D DICOM images. Modality: {modalities}."
    yield "- Intended users: researchers who can judge the results against their own labelled images."
    yield f"- Out of scope: clinical use of any kind. {STATEMENT} It was not assessed by any regulator."
    yield "- Out of scope: images of other modalities, body parts, ages or devices than those of the training sites."


def _factors(report: RunReport) -> Iterator[str]:
    columns = ", ".join(map(_code, report.recipe.task.subgroups))
    yield "## Factors"
    yield ""
    yield f"- Subgroups evaluated: {columns or 'none; how results differ between groups of patients is not known'}."
    yield "- Sites: results at each site are below, where the site gave any."
    yield f"- Devices, acquisition protocols, age, sex and origin of the patients: {ABSENT}, unless named above."


def _metrics(report: RunReport, exported: Exported | None) -> Iterator[str]:
    recipe = report.recipe
    evaluation = recipe.evaluation
    threshold = exported.description.operating_threshold if exported and exported.description else None
    if threshold is None and report.central is not None:
        threshold = report.central.threshold
    yield "## Metrics"
    yield ""
    yield "- AUROC and AUPRC do not depend on a threshold. Accuracy, balanced accuracy, F1, recall and specificity take"
    yield "  the most probable class (multi-label: above one half)."
    yield f"- Intervals: {100 * evaluation.confidence:g} %, from {evaluation.bootstraps} resamples of patients. They do"
    yield "  not hold the variation between training runs or between hospitals."
    yield f"- Results over fewer than {evaluation.min_cell} patients are suppressed."
    if threshold is None:
        yield f"- Operating point: {ABSENT}."
    else:
        least = words.threshold(threshold)
        yield f"- Operating point: positive from a probability of {least}, chosen for a specificity of"
        yield f"  {evaluation.specificity:g} **on the central test set itself**; confirm it on other images."


def _evaluation_data(report: RunReport) -> Iterator[str]:
    central = report.central
    yield "## Evaluation data"
    yield ""
    if central is None:
        yield f"- Central test set: {ABSENT}; the model was not evaluated centrally."
    else:
        held = f"fewer than {report.recipe.evaluation.min_cell}" if central.suppressed else str(central.patients)
        yield f"- Central test set of the coordinator, held by no site: {held} patients."
    yield "- Site test sets: patients that the site drew once and never trained on (counts below)."
    yield f"- How patients were selected and labelled: {ABSENT}."


def _training_data(report: RunReport) -> Iterator[str]:
    yield "## Training data"
    yield ""
    yield "Images never left the sites. Patients by split, as each site reported:"
    yield ""
    splits = ("train", "validation", "test")
    yield from _table(
        ("Site", *splits),
        [(_text(site.name), *(_patients(site, split) for split in splits)) for site in report.sites],
    )
    for said in words.of_counts(report.sites):
        yield ""
        yield _text(said)


def _patients(site: SiteSummary, split: str) -> str:
    count = site.patients.get(split)
    if count is None:
        return ABSENT
    return str(count) if count else words.NOT_TOLD


def _results(report: RunReport) -> Iterator[str]:
    yield "## Quantitative analyses"
    yield ""
    yield "### Central test set"
    yield ""
    yield from _scores(report)
    if report.central is not None and report.central.confusion:
        classes = [_text(name) for name in report.recipe.task.classes]
        yield ""
        yield from _table(
            ("Samples: true class, called", *classes),
            [(name, *map(str, row)) for name, row in zip(classes, report.central.confusion, strict=True)],
        )
    yield ""
    yield "### Sites, each on its own test patients"
    yield ""
    yield from _table(
        ("Site", "Patients", *(words.metric(name, report) for name in SCALARS)),
        [(_text(site.name), *_site_scores(site.test)) for site in report.sites],
    )
    if noised := words.of_scores(report.sites):
        yield ""
        yield _text(noised)
    for column, cells in report.subgroups.items():
        yield ""
        yield f"### Central test set by {_code(column)}"
        yield ""
        counted = words.counted(cells)
        if not counted:
            yield "Counts are left out, as they would give the suppressed group away."
            yield ""
        yield from _table(
            ("Value", *(["Patients"] if counted else []), "AUROC", "Balanced accuracy", "Brier score"),
            [
                (_text(value), *["suppressed"] * 3)
                if cell.suppressed
                else (
                    _text(value),
                    *([str(cell.patients)] if counted else []),
                    *(_value(cell.values, name) for name in ("auroc", "balanced_accuracy", "brier")),
                )
                for value, cell in cells.items()
            ],
        )


def _scores(report: RunReport) -> Iterator[str]:
    metrics = report.central
    if metrics is None:
        yield f"Results: {ABSENT}."
    elif metrics.suppressed:
        yield "Results: suppressed, too few patients."
    else:
        yield from _table(
            ("Metric", "Estimate [interval]"),
            [(words.metric(name, report), _value(metrics.values, name)) for name in SCALARS],
        )


def _site_scores(scores: Scores | None) -> tuple[str, ...]:
    if scores is None:
        return (ABSENT,) * (1 + len(SCALARS))
    if not scores.values:
        return ("suppressed",) * (1 + len(SCALARS))
    return (str(scores.patients or words.NOT_TOLD), *(_value(scores.values, name) for name in SCALARS))


def _privacy(report: RunReport) -> Iterator[str]:
    privacy, compression = report.recipe.privacy, report.recipe.federation.compression
    yield "## Privacy"
    yield ""
    if compression != "none":
        yield f"Updates were rounded to {compression} before they left the sites, after any noise, with error feedback"
        yield "(`federation.compression`). That is no protection, and costs no epsilon."
        yield ""
    if privacy.secure_aggregation:
        yield "Secure aggregation: the coordinator saw the sum of each round's updates, and no single one. What the sum"
        yield "and this model tell of a patient is another question:"
        yield ""
    if not privacy.active:
        yield "Mechanism: none. **No differential privacy was applied.** Membership of a training patient may be"
        yield "inferred from the weights, and parts of images may be reconstructed; treat the file as sensitive."
        return
    if privacy.unsafe_seeded_noise:
        yield "**The noise was seeded (`unsafe_seeded_noise`): anybody with the recipe can subtract it. The figures"
        yield "below are no guarantee for this model.**"
        yield ""
    yield "- Mechanism: DP-SGD (Abadi et al. 2016) at each site: per-patient gradients clipped, Gaussian noise added"
    yield "  there, before anything leaves."
    yield "- Unit: the patient, with all of their images; neighbouring cohorts differ by one patient."
    yield "- Accountant: privacy loss distributions (PLD) over Poisson-sampled steps, composed over all rounds."
    yield f"- Asked for by the recipe: {_asked(report)}."
    if report.noised_scores is None:
        yield "- Not covered: the metrics and counts that sites gave, which are bounded by a smallest cell of"
        yield f"  {report.recipe.evaluation.min_cell} patients. For a patient of several sites the epsilons add up."
    else:
        yield f"- Metrics that sites noised cost a site at most epsilon {rounded_up(report.noised_scores)}, beside the"
        yield "  figures below; its ledger has both."
        if report.exact_scores:
            yield "- Not covered: the metrics of the other sites, which carry no noise and are bounded by a smallest"
            yield f"  cell of {report.recipe.evaluation.min_cell} patients."
        yield "- Not covered: counts, as far as a site tells them. For a patient of several sites the epsilons add up."
    yield ""
    yield from _table(
        ("Site", "Epsilon", "Delta", "Noise multiplier", "Clip norm", "Sampling rate", "Noised steps"),
        [(_text(site.name), *_spent(site.spent)) for site in report.sites],
    )


def _asked(report: RunReport) -> str:
    privacy = report.recipe.privacy
    amount = (
        f"epsilon {privacy.epsilon:g}"
        if privacy.epsilon is not None
        else f"noise multiplier {privacy.noise_multiplier:g}"
        if privacy.noise_multiplier is not None
        else ABSENT
    )
    return f"{amount}, delta {privacy.delta:g}" if privacy.delta is not None else amount


def _spent(spent: Spent | None) -> tuple[str, ...]:
    if spent is None:
        return (ABSENT,) * 6
    return (
        rounded_up(spent.epsilon),
        f"{spent.delta:g}",
        f"{spent.noise_multiplier:.4g}",
        f"{spent.clip_norm:g}",
        f"{spent.sampling_rate:.4g}",
        str(spent.steps),
    )


def _caveats(report: RunReport) -> Iterator[str]:
    yield "## Ethical considerations and caveats"
    yield ""
    yield "- A model learns the habits of its hospitals: labels, devices and who is sent there. It may do worse for"
    yield "  groups that were rare in training; only the subgroups above were looked at."
    yield "- Probabilities are those of the test set's prevalence; elsewhere they need calibration first."
    yield "- Consent, ethics approval and data use agreements of the sites: " + ABSENT + "."
    refused = {name: why for line in report.rounds for name, why in line.refused.items()}
    if refused:
        missed = ", ".join(_text(name) for name in sorted(refused))
        yield f"- Replies of these sites were not used in one round or more: {missed}."


def _provenance(report: RunReport, exported: Exported | None) -> Iterator[str]:
    yield "## Provenance"
    yield ""
    rows = [("Recipe id (SHA-256)", f"`{report.recipe_id}`"), ("Weight digest (SHA-256)", f"`{report.weight_digest}`")]
    if exported is None:
        rows.append(("ONNX file", ABSENT))
    else:
        rows += [
            ("ONNX file", f"{_code(exported.path.name)}, {exported.bytes} bytes, opset {exported.opset}"),
            ("ONNX SHA-256", f"`{exported.sha256}`"),
            (
                "Largest difference of a probability, torch against onnxruntime",
                f"{exported.max_abs_difference:.2e} on the reference samples",
            ),
        ]
    rows += [(f"Version of {_text(name)}", _text(version)) for name, version in sorted(report.versions.items())]
    yield from _table(("", ""), rows)
    if exported is not None:
        yield ""
        yield "To run it on a folder of DICOM images, with the preprocessing that is embedded in the file:"
        yield ""
        yield f"    fedicom predict {exported.path.name} DICOM_DIR --out predictions.csv"


RELEASE = "## Release"


def release_section(audit: Mapping[str, Any]) -> Iterator[str]:
    """The last section: whether the privacy mechanism was audited, as the model file says it (`told`)."""
    yield RELEASE
    yield ""
    if audit["status"] != "passed":
        yield f"**UNAUDITED: {_text(str(audit['why']))}.** Nobody has shown that the mechanism that trained this model"
        yield "keeps its promise of privacy; do not release it as if somebody had."
        return
    yield f"- Privacy audit: **passed**, {audit['checks']} checks of the installed mechanism with this recipe."
    if "epsilon_at_least" in audit:
        low, high, steps = audit["epsilon_at_least"], audit["epsilon_at_most"], audit["steps"]
        yield f"- One-run audit (Steinke et al. 2023), {steps} steps: epsilon at least {rounded_down(low)} with"
        yield f"  {words.percent(audit['confidence'])} confidence, at most {rounded_up(high)} by the account."
        yield "  One training sees only so much: the gap says nothing about the account."


def _value(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return "not defined"
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{values[name]:.3f}{interval}"


def _times(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + " --- |" * len(header)
    for row in rows or [(ABSENT, *[""] * (len(header) - 1))]:
        yield f"| {' | '.join(row)} |"


def _text(said: str) -> str:
    """Words of a recipe or a site as one line of plain text: no markup, no table breaks."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(said.split()))


def _code(said: str) -> str:
    """The same as a code span, in which a backslash would be shown; what would end the span or a table's cell goes."""
    return f"`{re.sub('[`|]', '', ' '.join(said.split()))}`"
