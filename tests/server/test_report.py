"""The report: complete, escaped, self-contained, and the same bytes each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from common.config import Evaluation, Federation, Privacy, Recipe, Task
from common.errors import StorageError
from common.exchange import Scores, ScoresSpent, Spent
from common.html import Html, join, tag
from common.metrics import Metrics, score
from server.report import Baselines, ExportLine, RoundLine, RunReport, SiteSummary, figures, write_report
from server.report.words import duration
from simulations.cli import show_conclusion

VOID = {"meta", "br", "hr", "img", "link", "input"}
EVIL = '<script>alert("1")</script>&$x$'


class Balance(HTMLParser):
    """Collects what does not close, every attribute, and the text outside style."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    return parser


def words(page: str) -> str:
    return " ".join(" ".join(read(page).text).split())


def metrics(seed: int, patients: int = 40) -> Metrics:
    rng = np.random.default_rng(seed)
    truth = np.arange(patients) % 2
    p = 1 / (1 + np.exp(-2 * (truth - 0.5) - rng.normal(size=patients)))
    return score(truth, np.stack([1 - p, p], 1), np.arange(patients), Task(), Evaluation(bootstraps=100), seed=0)


def make(
    names: Sequence[str] = ("north", "south"), *, private: bool = True, rounds: int = 3, lesion: str = "lesion"
) -> RunReport:
    recipe = Recipe(
        name="Lesions",
        description=f"Finds a {lesion}.",
        rounds=rounds,
        task=Task(classes=("clear", lesion), subgroups=("sex",)),
        federation=Federation(sites=len(names), quorum=1),
        privacy=Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-5) if private else Privacy(),
    )
    values = {"auroc": 0.8125, "auroc_low": 0.71, "auroc_high": 0.89, "loss": 0.5}
    lines = tuple(
        RoundLine(
            round=number,
            mean_validation=0.625,
            validation={name: Scores(patients=9, values=values) for name in names},
            accepted=tuple(names) if number <= rounds else (),
            update_norms=dict.fromkeys(names, 1.5) if number <= rounds else {},
            epsilon=dict.fromkeys(names, number / 2) if private and number <= rounds else {},
        )
        for number in range(1, rounds + 2)
    )
    spent = Spent(epsilon=1.4961, delta=1e-5, noise_multiplier=1.25, clip_norm=1.0, sampling_rate=0.125, steps=1234)
    sites = tuple(
        SiteSummary(
            name=name,
            patients={"train": 61, "validation": 13, "test": 17},
            test=Scores(patients=17, values=values),
            spent=spent if private else None,
            refused_files={"not_an_image": 7},
        )
        for name in names
    )
    return RunReport(
        recipe=recipe,
        recipe_id=recipe.id,
        weight_digest="0123456789abcdef" * 4,
        started="2026-01-02T03:04:05+00:00",
        wall_s=95.0,
        device="CPU",
        versions={"torch": "2.13.0"},
        sites=sites,
        rounds=lines,
        central=metrics(1),
        subgroups={"sex": {"F": metrics(2, 22), "M": metrics(3, 18)}},
        baselines=Baselines(centralised=metrics(4), alone={name: metrics(5 + i) for i, name in enumerate(names)}),
        export=ExportLine(
            file="model.onnx", sha256="ab" * 32, max_abs_difference=2.5e-7, opset=20, size_bytes=44_800_000
        ),
    )


def lean(report: RunReport) -> RunReport:
    """The same run with fewer pictures, for tests of the text."""
    values = {"auroc": 0.9375, "auroc_low": 0.875, "auroc_high": 0.96875}
    return replace(report, rounds=report.rounds[:1], baselines=None, central=Metrics(patients=40, values=values))


def write(report: RunReport, folder: Path) -> str:
    write_report(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(make(), tmp_path_factory.mktemp("report"))


CASES = {
    "no privacy": lambda: make(private=False),
    "nothing but sites": lambda: replace(make(), central=None, baselines=None, export=None, subgroups={}),
    "no round": lambda: replace(
        make(), rounds=(), sites=tuple(replace(s, test=None, spent=None) for s in make().sites)
    ),
    "one site, one round": lambda: make(("only",), rounds=1),
    "twelve sites": lambda: make([f"hospital-{i}" for i in range(12)], rounds=21),
    "suppressed": lambda: replace(make(), central=Metrics(suppressed=True)),
    "values absent": lambda: replace(make(), central=Metrics(patients=9, values={"accuracy": 1.0})),
    "odd names": lambda: make([EVIL, "x" * 300, "東京 病院"], lesion=EVIL),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_gives_balanced_html(case: str, tmp_path: Path) -> None:
    text = write(CASES[case](), tmp_path)
    parser = read(text)
    assert (parser.open, parser.wrong) == ([], [])
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)  # raises where a picture is no XML
    identifiers = [value for _, name, value in parser.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert "nan" not in words(text).lower().split()
    assert len(text) < 2_000_000


def test_names_of_classes_stand_out_of_the_sentence_that_says_how_well_they_are_told_apart(page: str) -> None:
    assert "it tells “clear” and “lesion” apart with an AUROC of" in words(page)


def test_the_same_run_gives_the_same_bytes(page: str, tmp_path: Path) -> None:
    assert write(make(), tmp_path) == page


def test_the_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    parser = read(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _, _ in parser.attributes}
    assert "<script" not in page
    for element, name, value in parser.attributes:
        if name in ("href", "src", "xlink:href", "srcset", "action"):
            assert value.startswith("#"), (element, name)
        assert not name.startswith("on"), (element, name)
    assert not re.search(r"url\((?!#)|@import", page)
    assert any("default-src 'none'" in value for element, _, value in parser.attributes if element == "meta")


def test_references_inside_the_pictures_resolve(page: str) -> None:
    identifiers = set(re.findall(r'\bid="([^"]+)"', page))
    wanted = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert wanted
    assert wanted <= identifiers


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    report = replace(make([EVIL, "south"], lesion=EVIL), notes=(EVIL,), device=EVIL, versions={EVIL: EVIL})
    report = replace(
        report,
        rounds=(replace(report.rounds[0], refused={EVIL: EVIL}), *report.rounds[1:]),
        subgroups={EVIL: {EVIL: metrics(1)}},
    )
    text = write(report, tmp_path)
    assert "<script" not in text
    assert EVIL in words(text)
    assert read(text).wrong == []


def test_every_number_of_the_run_is_on_the_page(page: str) -> None:
    report = make()
    assert report.central is not None
    assert report.baselines is not None
    assert report.baselines.centralised is not None
    shown = words(page)
    numbers = [f"{report.central.values[name]:.3f}" for name in report.central.values]
    numbers += [f"{report.baselines.centralised.values['auroc']:.3f}"]
    numbers += [f"{one.values['auroc']:.3f}" for one in report.baselines.alone.values()]
    numbers += [f"{one.values['auroc']:.3f}" for one in report.subgroups["sex"].values()]
    numbers += [str(count) for row in report.central.confusion for count in row]
    numbers += ["0.812", "0.710 to 0.890", "61", "13", "17", "122", "1,234", "1.250", "12.50 %", "1e-5", "2.5e-7"]
    numbers += ["44.8 MB", "ab" * 32, report.recipe_id, report.weight_digest, "2.13.0", "2026-01-02 03:04 UTC", "2 min"]
    assert [number for number in numbers if number not in shown] == []


def test_a_privacy_cost_is_rounded_up(page: str) -> None:  # 1.4961 spent
    assert "epsilon at most 1.50 (delta 1e-5)" in words(page)


@pytest.mark.parametrize(
    ("epsilon", "odds"),
    [(1.4961, "4.47"), (3.0, "21"), (8.0, "2,981"), (0.0, "1.00")],  # e^1.4961 = 4.4643, e^3 = 20.09, e^8 = 2980.96
)
def test_the_odds_in_the_privacy_text_are_e_to_the_epsilon_and_never_less(
    epsilon: float, odds: str, tmp_path: Path
) -> None:
    report = lean(make(("north",)))
    assert report.sites[0].spent is not None
    site = replace(report.sites[0], spent=replace(report.sites[0].spent, epsilon=epsilon))
    assert f"a factor of {odds} at the very most" in words(write(replace(report, sites=(site,)), tmp_path))


def test_a_small_threshold_is_not_rounded_to_nought(tmp_path: Path) -> None:
    """Who takes it from the page would else call everybody positive."""
    report = lean(make())
    rare = replace(metrics(1), threshold=0.00029484, operating_point=(0.04, 0.81))
    shown = words(write(replace(report, central=rare), tmp_path))
    assert "positive from a probability of 0.00029484, sensitivity 0.810 at specificity 0.960" in shown


def test_suppressed_groups_show_neither_result_nor_count(tmp_path: Path) -> None:
    # Should a value slip into suppressed metrics, the page must still hide it.
    leaky = Metrics(patients=4321, suppressed=True, values={"auroc": 0.4242})
    shown = words(write(replace(lean(make()), subgroups={"sex": {"F": metrics(2, 22), "X": leaky}}), tmp_path))
    assert "X suppressed (< 5 patients)" in shown
    assert "0.424" not in shown
    assert "4321" not in shown.replace(",", "")
    # Nor the other groups' counts: the total less 22 would be the count of X.
    assert "F 22" not in shown


def test_groups_without_a_suppressed_one_show_their_counts(page: str) -> None:
    assert "F 22" in words(page)
    assert "M 18" in words(page)


def test_training_that_went_into_no_round_is_told_beside_the_curve_of_epsilon(tmp_path: Path) -> None:
    report = lean(make(names=("north",)))  # epsilon 0.5 after its one round
    paid = replace(report.sites[0], spent=replace(report.sites[0].spent, epsilon=0.5))
    assert "went into no round" not in write(replace(report, sites=(paid,)), tmp_path)
    shown = words(write(report, tmp_path))  # 1.4961 in the ledger: a round was given up
    assert "the highest is 0.50. Training that went into no round brings it to 1.50. The limit is 8.00." in shown


def test_a_suppressed_central_result_is_hidden_everywhere(tmp_path: Path) -> None:
    leaky = Metrics(patients=4, suppressed=True, values={"auroc": 0.4242}, roc={"lesion": ((0.0, 0.0), (1.0, 1.0))})
    text = write(replace(lean(make()), central=leaky), tmp_path)
    assert "0.424" not in text
    assert "too small to show" in words(text)


def test_a_site_below_the_cell_shows_no_count(tmp_path: Path) -> None:
    site = SiteSummary(
        name="tiny", patients={"train": 61, "validation": 0, "test": 0}, test=Scores(patients=0, values={})
    )
    shown = words(write(replace(lean(make(private=False)), sites=(site,)), tmp_path))
    assert "tiny 61 not told not told suppressed (too few patients)" in shown


def test_a_count_of_nought_is_not_told_and_not_called_small(tmp_path: Path) -> None:
    """The site's policy may hide it, or secure aggregation; its scores say that there are patients."""
    untold = SiteSummary(
        name="large", patients={"train": 0, "validation": 0, "test": 0}, test=Scores(patients=0, values={"auroc": 0.91})
    )
    shown = words(write(replace(lean(make(private=False)), sites=(untold,)), tmp_path))
    assert "Training patients – not told" in shown
    assert "large not told not told not told 0.910" in shown
    assert "A count is not told where it is too small for the site or the recipe, where the site's policy" in shown
    told = replace(untold, name="other", patients={"train": 61, "validation": 13, "test": 17})
    both = words(write(replace(lean(make(private=False)), sites=(untold, told)), tmp_path))
    assert "Training patients 61 and those of 1 site, not told" in both
    assert "A count is not told" not in words(write(replace(lean(make()), sites=(told,)), tmp_path))


def test_numbers_of_patients_that_a_site_rounded_down_are_said_to_be(tmp_path: Path) -> None:
    report = lean(make())
    assert "rounded down" not in words(write(report, tmp_path))
    north, south = report.sites
    one = words(write(replace(report, sites=(replace(north, counts_rounded=True), south)), tmp_path))
    assert "Training patients 122 rounded down" in one
    assert "Rounded down, by up to a quarter, by their policy: numbers of patients of north." in one
    untold = replace(north, patients={"train": 0, "validation": 0, "test": 0}, counts_rounded=True)
    assert "rounded down" not in words(write(replace(report, sites=(untold, south)), tmp_path))
    both = words(write(replace(report, sites=(untold, replace(south, counts_rounded=True))), tmp_path))
    assert "Training patients 61 rounded down; and those of 1 site, not told" in both


def test_a_model_that_early_stopping_took_is_said_to_be_of_its_round_and_drawn_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = make(private=False)  # three rounds and the closing evaluation, all .625
    again = replace(report.rounds[-1], of=1, mean_validation=0.75)
    drawn: dict[str, Sequence[tuple[float, float]]] = {}
    honest = figures.by_round

    def spy(key: str, *words: Any, **parts: Any) -> Any:
        drawn[key] = parts.get("mean", ())
        return honest(key, *words, **parts)

    monkeypatch.setattr(figures, "by_round", spy)
    shown = words(write(replace(report, rounds=(*report.rounds, again), taken=1), tmp_path))
    assert drawn["validation"] == [(0, 0.625), (1, 0.75), (2, 0.625), (3, 0.625)]
    assert "over 3 rounds, and early stopping took the one after round 1;" in shown
    assert "Rounds 3 of 3 planned; the model is that after round 1" in shown
    assert "The mean ends at 0.625. The model is that after round 1, with 0.750." in shown
    assert "early stopping took" not in words(write(report, tmp_path))


def test_a_run_without_privacy_says_so(tmp_path: Path) -> None:
    shown = words(write(lean(make(private=False)), tmp_path))
    assert "trained without differential privacy" in shown
    assert "Treat the model file as if it held patient data" in shown


def test_secure_sums_are_told(tmp_path: Path) -> None:
    report = lean(make())
    assert "secure sums" not in words(write(report, tmp_path))
    federation = replace(report.recipe.federation, sites=3, quorum=3, max_update_norm=100.0)
    privacy = replace(report.recipe.privacy, secure_aggregation=True)
    recipe = replace(report.recipe, privacy=privacy, federation=federation)
    assert "no single hospital's update" in words(write(replace(report, recipe=recipe), tmp_path))


def test_rounded_updates_are_told(tmp_path: Path) -> None:
    report = lean(make())
    recipe = replace(report.recipe, federation=replace(report.recipe.federation, compression="bfloat16"))
    assert "rounded to bfloat16" in words(write(replace(report, recipe=recipe), tmp_path))


def test_seeded_noise_claims_no_privacy(tmp_path: Path) -> None:
    report = lean(make())
    recipe = replace(report.recipe, privacy=replace(report.recipe.privacy, unsafe_seeded_noise=True))
    note = "unsafe_seeded_noise was on: the privacy figures do not hold"
    shown = words(write(replace(report, recipe=recipe, notes=(note,)), tmp_path))
    assert note in shown
    assert "is protected by differential privacy" not in shown
    assert "it gives no privacy" in shown


def unlike() -> RunReport:
    """`make`, but no two of its numbers are the same."""
    report = make()
    north, south = report.sites
    assert north.spent is not None
    assert south.spent is not None
    held = {"auroc": 0.75, "auroc_low": 0.625, "auroc_high": 0.875, "loss": 0.5}
    dear = replace(south.spent, epsilon=2.4961, delta=2e-5, noise_multiplier=0.75, clip_norm=0.5)
    sites = (
        replace(
            north, test=Scores(patients=17, values=held, noised=True), scores_spent=ScoresSpent(epsilon=0.5, delta=3e-5)
        ),
        replace(south, test=None, spent=dear, scores_spent=ScoresSpent(epsilon=0.25, delta=3e-5)),
    )
    line = replace(
        report.rounds[0],
        validation={
            "north": Scores(patients=9, values={"auroc": 0.6, "loss": 0.7}),
            "south": Scores(patients=9, values={"auroc": 0.8, "loss": 0.3}),
        },
        mean_validation=0.7, update_norms={"north": 3.0, "south": 4.0}, epsilon={"north": 0.5, "south": 0.75},
    )  # fmt: skip
    return replace(report, sites=sites, rounds=(line, *report.rounds[1:]))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each picture was asked to show; none is drawn."""
    asked: dict[str, Any] = {}

    def note(name: str, *words: Any, **parts: Any) -> Html:
        asked[name] = (*words, parts)
        return Html("")

    for kind in ("by_round", "roc", "calibration", "comparison"):
        monkeypatch.setattr(figures, kind, note)
    return asked


def test_pictures_show_the_numbers_that_they_are_named_after(drawn: dict[str, Any], tmp_path: Path) -> None:
    report = unlike()
    write(report, tmp_path)
    first = {name: {site: points[0] for site, points in drawn[name][0].items()} for name in
             ("validation", "loss", "epsilon", "norms")}  # fmt: skip
    assert first == {
        "validation": {"north": (0, 0.6), "south": (0, 0.8)},  # of the model before round 1
        "loss": {"north": (0, 0.7), "south": (0, 0.3)},
        "epsilon": {"north": (1, 0.5), "south": (1, 0.75)},
        "norms": {"north": (1, 3.0), "south": (1, 4.0)},
    }
    assert drawn["validation"][-1]["mean"][0] == (0, 0.7)
    assert drawn["loss"][-1]["mean"][0] == (0, pytest.approx(0.5))
    assert "the highest is 1.50" in drawn["epsilon"][-1]["alt"]  # of the last round
    assert report.central is not None
    assert report.baselines is not None
    models = [report.central, report.baselines.centralised, *report.baselines.alone.values()]
    assert [points for points, _ in reversed(drawn["roc"][0])] == [one.roc["positive"] for one in models if one]
    assert drawn["roc"][-1]["point"] == report.central.operating_point
    assert drawn["calibration"][0] == report.central.bins
    rows = [(row.label, row.value, row.low, row.high) for row in drawn["comparison"][0] if row.stroke]
    names = ["Federated", "Centralised", "north alone", "south alone"]
    ends = ("auroc", "auroc_low", "auroc_high")
    assert rows == [
        *((name, *(one.values[end] for end in ends)) for name, one in zip(names, models, strict=True) if one),
        ("north", 0.75, 0.625, 0.875),
        ("south", None, None, None),
    ]


@pytest.mark.usefixtures("drawn")
def test_where_hospitals_differ_the_highest_cost_is_told(tmp_path: Path) -> None:
    shown = words(write(unlike(), tmp_path))
    assert "epsilon at most 2.50 (delta 2e-5)" in shown
    assert "Epsilon, highest 2.50 delta 2e-5, limit 8.00" in shown
    assert "Here epsilon is at most 2.50" in shown
    assert "a factor of 12.14 at the very most" not in shown
    assert "a factor of 13 at the very most" in shown  # e^2.4961 = 12.135
    assert "their ledgers paid epsilon 0.50 for them at most" in shown
    assert "The noise came from a generator seeded by the operating system" in shown
    assert "The patients of the central test set, with whom the coordinator works directly." in shown


@pytest.mark.usefixtures("drawn")
def test_tables_show_the_numbers_that_they_are_headed_with(tmp_path: Path) -> None:
    report = unlike()
    shown = words(write(report, tmp_path))
    assert report.central is not None
    (clear, missed), (wrong, _) = report.central.confusion[0], report.central.confusion[1]
    assert f"clear {clear} {100 * clear / 20:.0f} % {missed}" in shown  # 20 patients have none
    assert f"lesion {wrong} {100 * wrong / 20:.0f} %" in shown
    loss, auroc = (report.central.values[name] for name in ("loss", "auroc"))
    assert re.search(rf"Loss {loss:.3f} [0-9.]+ to [0-9.]+ lower", shown)
    assert re.search(rf"AUROC {auroc:.3f} [0-9.]+ to [0-9.]+ higher", shown)
    both = [report.central, *(report.baselines.alone.values() if report.baselines else ())]
    for name, one in zip(("Federated", "north alone", "south alone"), both, strict=True):
        said = [f"{one.values[key]:.3f}" for key in ("auroc", "auprc", "balanced_accuracy", "ece")]
        assert re.search(rf"{name} " + r" (?:[0-9.]+ to [0-9.]+ )?".join(map(re.escape, said)), shown), name


@pytest.mark.usefixtures("drawn")
def test_a_long_run_shows_some_rounds_and_the_last(tmp_path: Path) -> None:
    shown = words(write(make(rounds=25), tmp_path))
    # every third, so that there are no more than twelve, and the 25th
    rounds = " ".join(f"round {number}" for number in (3, 6, 9, 12, 15, 18, 21, 24, 25))
    assert f"Hospital {rounds} north" in shown


def test_the_reliability_diagram_and_the_whiskers_are_where_their_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(figures, "_svg", lambda figure, *_: kept.append(figure) or Html(""))
    bins = ((0.1, 0.2, 5), (0.5, 0.0, 0), (0.8, 0.9, 7))
    figures.calibration("calibration", bins, alt="")
    curve, below = kept[0].axes[0].lines[1], kept[0].axes[1].patches
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0.1, 0.8], [0.2, 0.9])  # the empty bin is left out
    assert [bar.get_height() for bar in below] == [5, 0, 7]
    assert [bar.get_x() + bar.get_width() / 2 for bar in below] == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    figures.comparison("c", [figures.Row("a", 0.75, 0.625, 0.875, figures.GLOBAL)], label="AUROC", chance=0.5, alt="")
    whisker, dot = kept[1].axes[0].lines[:2]
    assert list(whisker.get_xdata()) == [0.625, 0.875]
    assert list(dot.get_xdata()) == [0.75]


@pytest.mark.parametrize(
    ("seconds", "said"), [(59, "59 s"), (95, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min"), (90_000, "25 h 0 min")]
)
def test_how_long_it_took_is_told_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_an_interval_that_holds_one_half_is_called_guessing(tmp_path: Path) -> None:
    weak = Metrics(patients=30, values={"auroc": 0.55, "auroc_low": 0.45, "auroc_high": 0.64})
    assert "cannot be told from guessing" in words(write(replace(lean(make()), central=weak), tmp_path))
    assert "cannot be told from guessing" not in words(write(lean(make()), tmp_path))
    upside_down = Metrics(patients=30, values={"auroc": 0.2, "auroc_low": 0.1, "auroc_high": 0.31})
    shown = words(write(replace(lean(make()), central=upside_down), tmp_path))
    assert "The interval lies below 0.5: it is worse than guessing" in shown
    assert "includes 0.5" not in shown


def test_the_levels_of_intervals_and_specificity_are_told_as_they_were_set(tmp_path: Path) -> None:
    report = lean(make())
    recipe = replace(report.recipe, evaluation=Evaluation(confidence=0.995, specificity=0.975))
    shown = words(write(replace(report, recipe=recipe), tmp_path))
    assert "99.5 % interval" in shown
    assert "at 97.5 % specificity" in shown
    assert "100 % interval" not in shown
    assert "98 %" not in shown


def test_the_table_on_the_terminal_names_the_level_of_its_intervals() -> None:
    report, text = lean(make()), StringIO()
    recipe = replace(report.recipe, evaluation=Evaluation(confidence=0.9))
    nothing = {"auroc": None, "auroc_ci": None}
    summary = {"sites": {}, "global": nothing, "notes": [], "onnx": {"max_abs_difference": 0.0}, "wall_s": 1.0}
    conclusion = SimpleNamespace(report=replace(report, recipe=recipe), summary=summary)
    show_conclusion(cast("Any", conclusion), Path("runs/x"), Console(file=text, width=120))
    assert "AUROC [90 % CI]" in text.getvalue()


def test_the_table_on_the_terminal_tells_a_number_that_was_rounded_down_from_an_exact_one() -> None:
    site: dict[str, Any] = {"auroc": None, "auroc_ci": None}
    site |= dict.fromkeys(("epsilon", "epsilon_prv", "epsilon_rdp", "delta"))
    sites = {
        "east": {**site, "patients": 91, "patients_rounded_down": False},
        "north": {**site, "patients": 80, "patients_rounded_down": True},
        "west": {**site, "patients": None, "patients_rounded_down": True},
    }
    nothing = {"auroc": None, "auroc_ci": None}
    summary = {"sites": sites, "global": nothing, "notes": [], "onnx": {"max_abs_difference": 0.0}, "wall_s": 1.0}
    text = StringIO()
    show_conclusion(
        cast("Any", SimpleNamespace(report=lean(make()), summary=summary)), Path("x"), Console(file=text, width=120)
    )
    shown = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    for row in ("east 91 ", "north >= 80 ", "west not told "):
        assert any(line.startswith(row) for line in shown), row


def test_the_table_on_the_terminal_says_which_scores_carry_noise_and_counts_no_small_test_set_as_nobody() -> None:
    site: dict[str, Any] = dict.fromkeys(("epsilon", "epsilon_prv", "epsilon_rdp", "delta"))
    site |= {"patients": 80, "patients_rounded_down": False, "auroc": 0.25, "auroc_ci": [0.0, 0.75]}
    sites = {
        "east": {**site, "noised_scores": False},
        "north": {**site, "noised_scores": True, "scores_epsilon": 0.981},
    }
    nothing = {"auroc": None, "auroc_ci": None}
    summary = {"sites": sites, "global": nothing, "notes": [], "onnx": {"max_abs_difference": 0.0}, "wall_s": 1.0}
    report, text = replace(lean(make()), central=Metrics(suppressed=True)), StringIO()
    show_conclusion(
        cast("Any", SimpleNamespace(report=report, summary=summary)), Path("x"), Console(file=text, width=120)
    )
    shown = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    assert "east 80 0.250 [0.000, 0.750] none none none none" in shown
    assert "north 80 0.250 [0.000, 0.750], noised for epsilon 0.99 none none none none" in shown
    assert "global, central test set < 5 not shown none" in shown


def test_refused_replies_are_named_with_round_and_reason(tmp_path: Path) -> None:
    report = lean(make())
    line = replace(report.rounds[0], refused={"south": "delta norm 14.2 exceeds clip norm 10"})
    shown = words(write(replace(report, rounds=(line,)), tmp_path))
    assert "1 south delta norm 14.2 exceeds clip norm 10" in shown


def test_noised_scores_are_called_so_and_their_price_is_told(tmp_path: Path) -> None:
    report = lean(make())
    assert "They carry no noise" in words(write(report, tmp_path))
    north, _ = report.sites
    assert north.test is not None
    paid = replace(north, test=replace(north.test, noised=True), scores_spent=ScoresSpent(epsilon=0.75, delta=1e-5))
    quiet = tuple(replace(line, validation={}) for line in report.rounds)
    shown = words(write(replace(report, sites=(paid,), rounds=quiet), tmp_path))
    assert "They carry no noise" not in shown
    assert "their ledgers paid epsilon 0.75 for them at most" in shown
    assert "Noised by their policy, with the numbers of patients behind them: results of north." in shown


@pytest.mark.parametrize("of", ["the final model", "a model on the way"])
def test_exact_scores_beside_noised_ones_are_still_said_to_carry_no_noise(tmp_path: Path, of: str) -> None:
    report = lean(make())
    north, south = report.sites
    assert north.test is not None
    noised = replace(north, test=replace(north.test, noised=True), scores_spent=ScoresSpent(epsilon=0.75, delta=1e-5))
    told = replace(report, sites=(noised, south if of == "the final model" else replace(south, test=None)))
    told = replace(told, rounds=tuple(replace(line, validation={}) for line in told.rounds)) if "final" in of else told
    shown = words(write(told, tmp_path))
    assert "Scores were noised at the hospitals that want it" in shown
    assert "Validation and test results of the other hospitals. They carry no noise" in shown


def test_what_left_lists_every_message_of_a_site(page: str) -> None:
    shown = words(page)
    for name in ("Scores", "Spent", "Hello", "Update", "Refusal", "Dealing", "MaskedUpdate", "Agreement", "Shares"):
        assert f" {name} " in shown
    assert "RoundPlan" not in shown


def test_pictures_have_words_for_those_who_cannot_see_them(page: str) -> None:
    labels = re.findall(r'<svg class="plot"[^>]*role="img" aria-label="([^"]+)"', page)
    assert len(labels) == 7  # AUROC, loss, epsilon, norms, ROC, calibration, comparison
    assert "AUROC compared. Federated" in labels[-1]


def test_pictures_use_the_colours_of_the_page(page: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--c0)" in pictures
    assert re.findall(r"[:\"]\s*#[0-9a-f]{6}\b", pictures) == []


def test_multiclass_runs_show_a_curve_for_each_class(tmp_path: Path) -> None:
    report = lean(make())
    task = Task(kind="multiclass", classes=("a", "b", "c"))
    truth = np.arange(60) % 3
    p = np.full((60, 3), 0.2) + 0.4 * np.eye(3)[truth]
    found = score(truth, p, np.arange(60), task, Evaluation(bootstraps=100), seed=0)
    recipe = replace(report.recipe, task=task)
    shown = words(write(replace(report, recipe=recipe, central=found, subgroups={}), tmp_path))
    assert "One curve a class" in shown
    assert "Probability of the most probable class" in shown
    assert "called a called b called c" in shown


@pytest.mark.usefixtures("drawn")
def test_findings_that_err_in_opposite_ways_are_not_called_calibrated(tmp_path: Path) -> None:
    # Finding a is told too often, b too seldom: together .5 comes true in half of the cases, each by itself is .5 off.
    task = Task(kind="multilabel", classes=("a", "b"))
    truth = np.repeat([[0, 1]], 10, axis=0)
    found = score(truth, np.full((10, 2), 0.5), np.arange(10), task, Evaluation(bootstraps=100), seed=0)
    found = replace(found, roc={"a": ((0.0, 0.0), (1.0, 1.0))})
    assert found.bins[7] == (0.5, 0.5, 20)
    report = lean(make())
    shown = words(
        write(replace(report, recipe=replace(report.recipe, task=task), central=found, subgroups={}), tmp_path)
    )
    assert "Probability of each finding, all in one: on the dotted diagonal" in shown
    assert "Mean distance (ECE), each finding by itself, 0.500." in shown


def test_a_folder_that_does_not_exist_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(lean(make()), tmp_path / "nowhere" / "report.html")


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert tag("p", "a < b", tag("b", "&"), title='"') == '<p title="&quot;">a &lt; b<b>&amp;</b></p>'
    assert join("<", Html("<br>"), None) == "&lt;<br>"


def test_text_turns_nothing_around_on_the_page() -> None:  # U+202E writes what follows from right to left
    assert tag("p", "by \u202eevil\x1b[31m\n", title="\u2067x") == '<p title=" x">by  evil [31m\n</p>'
