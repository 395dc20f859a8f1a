"""The documentation says what the code does: generated pages, links, commands, settings and names."""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedicom
from common.composition import groups
from common.config import Phantom, load_settings
from common.imaging import RefusalCode
from common.samples import NOT_A_SAMPLE
from server.provision_cli import _VERBS as PROVISION_VERBS
from simulations.cli import _hospitals_parser
from simulations.phantoms import make_phantoms

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").glob("*.md")])
COMMANDS = ("fedicom", "make", "python")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    for block in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield block.group(1), block.group(2)


def _command_lines() -> list[tuple[str, list[str]]]:
    """(page, words) of every command in the pages' shell blocks."""
    found = []
    for page in PAGES:
        for language, text in _blocks(page):
            for line in text.splitlines() if language == "sh" else ():
                if words := shlex.split(line, comments=True):
                    found.append((_name(page), [Path(words[0]).name, *words[1:]]))
    return found


def _inline_settings() -> list[tuple[str, str]]:
    """(page, text) of every `name=value ...` between backticks whose name is a group or starts like a field."""
    tops = {*groups(), "task", "data", "model", "training", "privacy", "federation", "evaluation", "simulation"}
    tops |= {"rounds", "seed", "resume", "baselines", "overwrite", "torchscript", "int8"}
    found = []
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for text in re.findall(r"`'?([a-z_.]+=[^`<]+?)'?`", prose):
            if re.split(r"[.=]", text)[0] in tops:
                found.append((_name(page), text))
    return found


def test_there_are_commands_and_settings_to_check() -> None:
    assert len(_command_lines()) >= 20
    assert len(_inline_settings()) >= 10


@pytest.mark.parametrize("page", ["what-leaves-the-site.md", "configuration.md"])
def test_generated_page_is_what_the_code_gives(page: str) -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    path = ROOT / "docs" / page
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "run: .venv/bin/python docs/generate.py"


def test_the_page_of_settings_says_what_a_number_may_be() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rounds = re.search(r"^\| `rounds` \|.*$", text, re.MULTILINE)
    assert rounds is not None
    assert "at most 100,000" in rounds.group()


def test_every_setting_is_explained() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert len(rows) > 150
    assert [name for name, says in rows if not says.strip()] == []


def test_every_field_of_an_update_is_on_the_page_of_what_leaves() -> None:
    tree = ast.parse((ROOT / "common" / "exchange.py").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "what-leaves-the-site.md").read_text(encoding="utf-8")
    update = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Update")
    names = [node.target.id for node in update.body if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")]
    section = text.split("### Update\n")[1].split("\n### ")[0]
    assert "delta" in names
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == names


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}: no such heading"


def test_every_file_and_test_that_a_page_names_is_there() -> None:
    rooms = "benchmarks|client|common|configs|deploy|docs|server|simulations|tests"
    named = {
        (_name(page), *found)
        for page in PAGES
        for found in re.findall(rf"`((?:{rooms})/[\w/.-]+\.\w+)(?:::(\w+))?", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 100
    for page, path, test in sorted(named):
        assert (ROOT / path).is_file(), f"{page} names {path}"
        assert not test or f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page} names {path}::{test}"


@pytest.mark.parametrize(("page", "file"), [("site.md", "client/node.py"), ("coordinator.md", "server/api.py")])
def test_the_handbooks_name_every_metric_and_no_other(page: str, file: str) -> None:
    written = set(re.findall(r'"(fedicom_\w+)"', (ROOT / file).read_text(encoding="utf-8")))
    told = set(re.findall(r"`(fedicom_\w+)`", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert len(written) > 15
    assert told == written


def test_the_messages_that_the_hospitals_handbook_explains_are_those_of_the_program() -> None:
    """`...` in the handbook and a name at the beginning are filled in by the program."""
    said = []
    for room in ("client", "common"):
        for node in (n for file in (ROOT / room).rglob("*.py") for n in ast.walk(ast.parse(file.read_text("utf-8")))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                said.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
    program = "\n".join(said)
    table = (ROOT / "docs" / "site.md").read_text(encoding="utf-8").partition("## When something is wrong")[2]
    rows = re.findall(r"^\| (?!message \||---)(.+?) \| ", table, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        for part in filter(None, (part.strip(" :;,") for part in re.split(r"\.\.\.| / |: |; ", row))):
            later = part.split(" ", 2)[-1]
            assert part in program or (" " in later and later in program), f"{row}: nothing says {part!r}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
            left += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= reached, set(PAGES) - reached


def test_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[tuple[str, ...], str] = {}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page, words in _command_lines():
        program, rest = words[0], words[1:]
        assert program in (*COMMANDS, "git", "tensorboard"), f"{page}: {program}"
        if program == "make":
            assert {word for word in rest if "=" not in word} <= targets, f"{page}: {rest}"
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), f"{page}: {rest}"
        elif program == "fedicom" and rest[0] == "hospitals":
            _hospitals_parser().parse_args(rest[1:])
        elif program == "fedicom":
            verbs = rest[0] in ("recipe", "audit", "privacy", "site", "server", "data")
            verbs = verbs or (rest[0] == "provision" and rest[1].isalpha())  # the plain verb takes a file first
            path = tuple(rest[: 2 if verbs else 1])
            if path not in helps:
                with pytest.raises(SystemExit) as ended:
                    fedicom.main([*path, "--help"])
                assert ended.value.code == 0, f"{page}: {path}"
                helps[path] = capsys.readouterr().out
            for option in (word for word in rest if word.startswith("--")):
                assert option in helps[path], f"{page}: {option} of {path}"


def _parsers(*path: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(words, parser) of a command and of all below it, as `--help` shows them."""
    shown: list[argparse.ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: shown.append(parser))
        fedicom.main([*path, "--help"])
    yield " ".join(path), shown[0]
    # argparse has a class of its own for verbs; others are a word with choices, and provision's are in its epilog.
    verbs = [a.choices or () for a in shown[0]._actions if a.dest in ("verb", "word")]
    for verb in PROVISION_VERBS if path == ("provision",) else itertools.chain(*verbs):
        yield from _parsers(*path, verb)


def test_every_word_of_every_command_is_explained_in_one_way() -> None:
    parsers = list(_parsers())
    assert len(parsers) > 50
    for words, parser in parsers:
        assert parser.description or not words, f"{words} says nothing of itself"
        for action in parser._actions:
            name = f"{words} {(action.option_strings or [action.dest])[-1]}"
            says = action.help or ""
            assert says, f"{name} is not explained"
            assert not re.search(r"without it|\bor here\b|; else|(?<!\()default", says), f"{name}: {says}"
            if action.option_strings and action.nargs != 0:
                assert action.metavar or action.choices, f"{name}: what is its value?"
                assert action.default in (None, [], ()) or "(default: " in says, f"{name}: {says}"


@pytest.mark.parametrize(
    "words",
    [pytest.param(rest[1:], id=" ".join(rest)) for _, rest in _command_lines() if rest[1:2] == ["simulate"]]
    + [pytest.param(rest[2:], id=" ".join(rest)) for _, rest in _command_lines() if rest[1:3] == ["recipe", "show"]],
)
def test_settings_in_a_command_compose(words: list[str]) -> None:
    overrides = [word for word in words if "=" in word]
    assert load_settings(overrides).recipe.id


def test_no_command_for_given_hospitals_asks_for_the_phantoms_classes_or_columns() -> None:
    found = [words for _, words in _command_lines() if any(word.startswith("simulation.hospitals=") for word in words)]
    assert len(found) >= 3
    phantoms = load_settings([]).recipe.task
    for words in found:
        task = load_settings([word for word in words if "=" in word]).recipe.task
        assert task.classes != phantoms.classes, words
        assert task.subgroups != phantoms.subgroups, words


def test_the_readme_shows_the_demos_recipe_by_its_own_id() -> None:
    recipe = load_settings(["recipe=phantom_2d"]).recipe
    first = f"Recipe {recipe.name} {recipe.id[:12]}: {recipe.rounds} rounds, {recipe.federation.sites} sites, "
    assert first + recipe.privacy.promise in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_command_trains_on_a_folder_as_the_readme_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## With hospitals of your own")[2]
    header = re.search(r"^patient,.*$", section, re.MULTILINE)
    command = re.search(r"^fedicom simulate .*$", section, re.MULTILINE)
    assert header is not None
    assert command is not None
    make_phantoms(tmp_path / "my-hospitals", Phantom(patients=24, central_patients=20, size=24), 2)
    (tmp_path / "my-hospitals" / "hospitals.json").unlink()
    for site in ("north", "south", "central"):
        table = tmp_path / "my-hospitals" / site / "labels.csv"
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with table.open("w", newline="") as file:
            out = csv.DictWriter(file, header.group().split(","), extrasaction="ignore")
            out.writeheader()
            out.writerows({**row, "label": "normal" if row["label"] == "no nodule" else "pneumonia"} for row in rows)
    tiny = ["rounds=1", "training.local_epochs=1", "privacy=none", "simulation.threads=1", "simulation.device=cpu"]
    assert fedicom.main([*shlex.split(command.group())[1:], *tiny]) == 0
    out = tmp_path / "runs" / "my_chest"
    assert (out / "model.onnx").is_file()
    # and what the folder holds stands on the page about simulations
    page = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8").partition("## Results")[2]
    for path in out.glob("[!.]*"):
        assert re.search(rf"`{re.escape(path.name)}/?[`<]", page.partition("\nHow to read")[0]), path.name
    row = re.search(r"^\| `summary.json` \| (.*) \|$", page, re.MULTILINE)
    assert row is not None
    listed = re.findall(r"`(\w+)[.\w<>]*?(?:\.{([\w,]+)})?`", row.group(1))
    told = {name: set(inside.split(",")) for name, inside in listed}
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == set(told) - {"baselines"}
    for name, kept in (("global", summary["global"]), ("onnx", summary["onnx"]), ("sites", summary["sites"]["north"])):
        assert set(kept) == told[name], name


@pytest.mark.parametrize(("page", "text"), _inline_settings())
def test_settings_in_a_sentence_name_real_fields(page: str, text: str) -> None:
    words = re.findall(r"[a-z_.]+=(?:\[[^\]]*\]|\S+)", text)
    for word in words:
        name, _, value = word.partition("=")
        if name in groups():
            assert value in groups()[name], f"{page}: {word}"
            continue
        at: object = load_settings([])
        for part in name.split("."):
            at = getattr(at, part) if hasattr(at, part) else getattr(at.recipe, part)  # type: ignore[attr-defined]


def test_every_name_in_the_architecture_page_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(named) > 30
    for file, name in named:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            assert found, f"{file} has no {name}"
            body = getattr(found[0], "body", [])
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).is_file(), file


def test_the_data_page_lists_exactly_the_codes_of_refusal() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    imaging, _, cohort = text.partition("from `common/samples.py`")
    row = r"^\| `(\w+)` \|"
    assert re.findall(row, imaging, re.MULTILINE) == [str(code) for code in RefusalCode]
    assert tuple(re.findall(row, cohort.split("\n## ")[0], re.MULTILINE)) == NOT_A_SAMPLE


def test_the_settings_example_of_a_refusal_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [text for _, text in _blocks(ROOT / "docs" / "configuration.md") if text.startswith("$ fedicom")]
    assert shown
    for text in shown:
        command, _, expected = text.partition("\n")
        assert fedicom.main(shlex.split(command)[2:]) == 2
        assert capsys.readouterr().err == expected


def test_the_picture_is_whole_and_fetches_nothing() -> None:
    from xml.etree import ElementTree

    text = (ROOT / "docs" / "round.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "href" not in text
    for file in re.findall(r"[a-z]+/[a-z_]+\.py", text):
        assert (ROOT / file).is_file(), file


def test_the_page_about_data_explains_every_refusal_as_the_program_does() -> None:
    from common.imaging.refusal import MEANINGS, RefusalCode

    page = (ROOT / "docs" / "data.md").read_text().partition("## Codes of refusal")[2].partition("Of an image that")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, flags=re.MULTILINE)
    assert {code: (what.replace("`", ""), helps.replace("`", "")) for code, what, helps in rows} == MEANINGS
    assert set(MEANINGS) == set(RefusalCode)
