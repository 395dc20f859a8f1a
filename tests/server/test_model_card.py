"""The model card says what the report holds, and names what it does not hold."""

import re
from dataclasses import replace
from pathlib import Path

from common.config import Evaluation, Federation, Preprocessing, Privacy, Recipe, Task
from common.exchange import Scores, ScoresSpent, Spent
from common.metrics import Metrics
from common.onnx_model import STATEMENT, Description
from server.export import Exported
from server.model_card import write_model_card
from server.report import RoundLine, RunReport, SiteSummary

PRIVATE = Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5)


def recipe(**parts):
    return Recipe(
        name="pneumonia",
        task=Task(classes=("normal", "pneumonia"), subgroups=("sex",)),
        data=Preprocessing(size=(28, 28)),
        evaluation=Evaluation(min_cell=5),
        **parts,
    )


def report(recipe, **parts):
    held = {
        "recipe": recipe,
        "recipe_id": recipe.id,
        "weight_digest": "d" * 64,
        "started": "2026-01-02T03:04:05+00:00",
        "wall_s": 61.2,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "sites": (),
        "rounds": (),
    }
    return RunReport(**{**held, **parts})


def card(tmp_path, *args, **kwargs):
    write_model_card(*args, tmp_path / "model_card.md", **kwargs)
    return (tmp_path / "model_card.md").read_text()


def test_the_price_of_noised_scores_is_on_the_card(tmp_path):
    spent = Spent(
        epsilon=7.91, delta=1e-5, noise_multiplier=1.25, clip_norm=1.0, sampling_rate=0.1, steps=300
    )  # fmt: skip
    test = Scores(patients=16, values={"auroc": 0.9}, noised=True)
    site = SiteSummary(
        name="north", patients={"train": 70}, test=test, spent=spent, scores_spent=ScoresSpent(epsilon=0.5, delta=1e-5)
    )
    text = card(tmp_path, report(recipe(privacy=PRIVATE), sites=(site,)))
    assert "cost a site at most epsilon 0.50, beside the" in text
    assert "Not covered: the metrics" not in text
    exact = SiteSummary(name="south", patients={"train": 70}, test=Scores(patients=16, values={"auroc": 0.9}))
    text = card(tmp_path, report(recipe(privacy=PRIVATE), sites=(site, exact)))
    assert "cost a site at most epsilon 0.50, beside the" in text
    assert "Not covered: the metrics of the other sites, which carry no noise" in text


def test_the_card_says_which_scores_are_noised_whether_the_training_was_private_or_not(tmp_path):
    noised = Scores(patients=25, values={"auroc": 0.0}, noised=True)
    north = SiteSummary(name="north", patients={"test": 8}, test=noised)
    south = SiteSummary(name="south", patients={"test": 8}, test=replace(noised, noised=False))
    silent = SiteSummary(name="west", patients={"test": 8}, test=Scores(patients=0, values={}, noised=True))
    text = card(tmp_path, report(recipe(), sites=(north, south, silent)))
    table = text.partition("### Sites, each on its own test patients")[2].partition("## Privacy")[0]
    assert "| north | 25 | 0.000 |" in table
    assert "Noised by their policy, with the numbers of patients behind them: results of north." in table
    assert "Noised" not in card(tmp_path, report(recipe(), sites=(south,)))


def test_a_count_of_nought_is_not_told_and_not_called_small(tmp_path):
    site = SiteSummary(name="north", patients={"train": 0}, test=Scores(patients=0, values={"auroc": 0.9}))
    text = card(tmp_path, report(recipe(), sites=(site,)))
    assert "| north | not told | not given | not given |" in text
    assert "| north | not told | 0.900 |" in text
    assert "where the site's policy tells none, or where it went under masks" in text


def test_the_card_says_whose_numbers_of_patients_are_rounded_down(tmp_path):
    site = SiteSummary(name="north_1", patients={"train": 32})
    assert "rounded down" not in card(tmp_path, report(recipe(), sites=(site,)))
    other = SiteSummary(name="south", patients={"train": 33})
    text = card(tmp_path, report(recipe(), sites=(replace(site, counts_rounded=True), other)))
    assert "Rounded down, by up to a quarter, by their policy: numbers of patients of north\\_1." in text


def test_the_round_that_early_stopping_took_is_on_the_card(tmp_path):
    lines = tuple(RoundLine(round=n, accepted=("north",)) for n in (1, 2, 3))
    held = report(recipe(), rounds=lines)
    assert "3 changed the model; fedavg" in card(tmp_path, held)
    assert "3 changed the model, and early stopping took the one after round 1; fedavg" in card(
        tmp_path, replace(held, taken=1)
    )


def full(recipe):
    values = {"auroc": 0.913, "auroc_low": 0.871, "auroc_high": 0.944}
    return report(
        recipe,
        sites=(
            SiteSummary(
                name="north",
                patients={"train": 70, "validation": 15, "test": 0},
                test=Scores(patients=0, values={}),
                spent=Spent(
                    epsilon=7.91, delta=1e-5, noise_multiplier=1.25, clip_norm=1.0, sampling_rate=0.1, steps=300
                ),
            ),
            SiteSummary(name="south|east", patients={"train": 80}, test=Scores(patients=16, values=values)),
        ),
        rounds=(RoundLine(round=1, accepted=("north",), refused={"south|east": "silent"}),),
        central=Metrics(patients=160, values=values, confusion=((70, 10), (12, 68)), threshold=0.4375),
        subgroups={"sex": {"f": Metrics(patients=81, values=values), "m": Metrics(suppressed=True)}},
        notes=("privacy: none",),
    )


def exported(recipe, tmp_path):
    described = Description(
        version="0.1.0", created_by="a test", recipe=recipe.canonical, weight_digest="d" * 64, task=recipe.task,
        data=recipe.data, operating_threshold=0.4375, metrics={}, privacy={},
    )  # fmt: skip
    return Exported(
        path=tmp_path / "model.onnx", sha256="e" * 64, max_abs_difference=6e-7, bytes=1234, opset=20,
        description=described,
    )  # fmt: skip


def test_the_card_holds_the_reports_numbers(tmp_path):
    private = recipe(privacy=PRIVATE)
    text = card(tmp_path, full(private), exported=exported(private, tmp_path))
    assert "| AUROC | 0.913 [0.871, 0.944] |" in text
    assert "| north | 7.91 | 1e-05 | 1.25 | 1 | 0.1 | 300 |" in text
    assert "| north | 70 | 15 | not told |" in text
    assert "| pneumonia | 12 | 68 |" in text
    assert "| f | 0.913 [0.871, 0.944] | not defined | not defined |" in text
    assert "| m | suppressed | suppressed | suppressed |" in text
    assert "probability of 0.4375" in text
    for digest in (private.id, "d" * 64, "e" * 64):
        assert f"`{digest}`" in text
    assert "fedicom predict model.onnx DICOM_DIR --out predictions.csv" in text
    assert STATEMENT in text
    assert "Replies of these sites were not used in one round or more: south\\|east." in text


def test_each_figure_stands_beside_its_name(tmp_path):
    asked = recipe(
        privacy=Privacy(mechanism="dp_sgd", noise_multiplier=1.5, delta=1e-5),
    )
    asked = replace(
        asked,
        data=Preprocessing(size=(28, 28), low=1.0, high=99.0, mean=0.25, std=0.5),
        evaluation=Evaluation(min_cell=5, bootstraps=300, confidence=0.9, specificity=0.8),
    )
    held = replace(full(asked), rounds=(*full(asked).rounds, RoundLine(round=2, accepted=("north", "south|east"))))
    values = {"auroc": 0.75, "accuracy": 0.5, "balanced_accuracy": 0.625}
    held = replace(held, subgroups={"sex": {"f": Metrics(patients=81, values=values)}})
    made = exported(asked, tmp_path)
    text = card(tmp_path, held, exported=made)
    assert "> **Note:** privacy: none" in text
    assert "percentiles 1 to 99 of each image scaled to [0, 1], minus 0.25, divided by 0.5" in text
    assert "- Intervals: 90 %, from 300 resamples of patients." in text
    assert "chosen for a specificity of\n  0.8 **on the central test set itself**" in text
    assert "softmax over classes" in text
    assert "| Calibration | none: the probabilities" in text
    assert "| f | 81 | 0.750 | 0.625 | not defined |" in text
    assert "| Sensitivity at 80 % specificity |" in text
    assert "| Specificity | Sensitivity at 80 % specificity |" in text, "the sites' table"
    assert "- Asked for by the recipe: noise multiplier 1.5, delta 1e-05." in text
    assert "in one round or more: south\\|east." in text, "also where a later round took all"


def test_a_test_set_that_is_too_small_shows_neither_count_nor_result(tmp_path):
    text = card(tmp_path, replace(full(recipe()), central=Metrics(suppressed=True), subgroups={}))
    assert "held by no site: fewer than 5 patients." in text
    assert "Results: suppressed, too few patients." in text


def test_the_counts_of_subgroups_do_not_give_a_suppressed_one_away(tmp_path):
    held = full(recipe())
    text = card(tmp_path, held)
    assert "held by no site: 160 patients" in text
    assert "81" not in text  # 160 less 81 would be the count of m
    shown = {"f": held.subgroups["sex"]["f"], "m": Metrics(patients=79, values={"auroc": 0.8})}
    text = card(tmp_path, replace(held, subgroups={"sex": shown}))
    assert "| f | 81 | 0.913" in text
    assert "| m | 79 | 0.800 |" in text


def test_every_section_of_mitchell_et_al_is_there(tmp_path):
    text = card(tmp_path, report(recipe()))
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = [
        "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
        "Quantitative analyses", "Privacy", "Ethical considerations and caveats", "Provenance", "Release",
    ]  # fmt: skip
    assert headings == wanted


def test_what_the_report_lacks_is_said_to_be_absent(tmp_path):
    text = card(tmp_path, report(recipe(privacy=PRIVATE), sites=(SiteSummary(name="north", patients={}),)))
    assert "Central test set: not given; the model was not evaluated centrally." in text
    assert "| ONNX file | not given |" in text
    assert "| north | not given | not given | not given |" in text
    assert "| north | not given | not given | not given | not given | not given | not given |" in text
    assert "Operating point: not given" in text
    assert "fedicom predict" not in text
    assert "nan" not in text.lower().split()
    assert "None" not in text


def test_a_run_without_privacy_says_so_and_shows_no_epsilon(tmp_path):
    text = card(tmp_path, full(recipe()))
    assert "**No differential privacy was applied.**" in text
    assert "Epsilon" not in text


def test_secure_aggregation_is_told_and_promises_nothing_about_patients(tmp_path):
    federation = Federation(sites=3, quorum=3, max_update_norm=100.0)
    text = " ".join(
        card(tmp_path, full(recipe(privacy=Privacy(secure_aggregation=True), federation=federation))).split()
    )
    assert "the coordinator saw the sum of each round's updates, and no single one" in text
    assert "**No differential privacy was applied.**" in text


def test_rounded_updates_are_told(tmp_path):
    rounded = card(tmp_path, full(recipe(federation=Federation(compression="int8"))))
    assert "Updates were rounded to int8" in rounded
    assert "**No differential privacy was applied.**" in rounded
    assert "rounded to" not in card(tmp_path, full(recipe()))


def test_seeded_noise_voids_the_guarantee_in_words(tmp_path):
    seeded = recipe(privacy=Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5, unsafe_seeded_noise=True))
    assert "are no guarantee for this model" in " ".join(card(tmp_path, full(seeded)).split())


def test_words_of_sites_and_recipes_cannot_break_the_tables(tmp_path):
    hostile = "a|b\n## x <script>`*"
    held = report(recipe(description=hostile), sites=(SiteSummary(name=hostile, patients={"train": 9}),))
    text = card(tmp_path, held, exported=None)
    assert "\n## x" not in text
    assert "\\<script\\>" in text
    rows = [line for line in text.splitlines() if line.startswith("| a\\|b")]
    bars = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert bars == [5, 14], "counts: 4 columns; results: 13 columns"


def test_a_name_in_a_code_span_is_as_it_is_written(tmp_path):
    held = replace(recipe(), task=Task(classes=("no_finding", "finding"), subgroups=("age_group", "`a|b")))
    text = card(tmp_path, report(held, subgroups={"age_group": {"65+": Metrics(suppressed=True)}}))
    assert "- Subgroups evaluated: `age_group`, `ab`." in text
    assert "### Central test set by `age_group`" in text
    assert "no\\_finding" in text  # plain words: the backslash is not shown there
    assert not re.search(r"`[^`\n]*\\[^`\n]*`", text)


def test_the_same_report_gives_the_same_bytes(tmp_path):
    assert card(tmp_path, full(recipe())) == card(tmp_path, full(recipe()))
    assert [path.name for path in Path(tmp_path).iterdir()] == ["model_card.md"]
