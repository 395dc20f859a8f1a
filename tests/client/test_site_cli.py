"""`fedicom site` as people type it: what is printed, what is asked for, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedicom
from client.approvals import Approvals
from client.cli import _VERBS
from client.ledger import Ledger
from client.node import only_one
from client.policy import ledger_policy
from client.words import in_words
from common.accounting import Event, epsilon_pld
from common.audit import verify
from common.chain import Event as Logged
from common.config import Evaluation, ModelConfig
from common.epsilon import rounded_down, rounded_up
from common.identity import Signer
from common.signed import sign_recipe
from common.storage import private_folder
from tests.client.conftest import PLAIN, TRAIN_PATIENTS, House, recipe_of
from tests.pretend_gpu import pretending

EVENT = Event(noise_multiplier=1.0, sampling_rate=0.3, steps=4)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("FEDICOM_HOME", raising=False)


class Site:
    """A hospital's folder and the command line."""

    def __init__(self, house: House, capsys: pytest.CaptureFixture[str]) -> None:
        self.house, self._capsys = house, capsys
        self.recipe = recipe_of()
        self.file = house.home.path.parent / "recipe.json"
        house.sign(self.recipe).write(self.file)

    def __call__(self, verb: str, *words: object, code: int = 0) -> str:
        """What the command printed, on either stream, after checking how it ended."""
        ended = fedicom.main(["site", verb, *map(str, words), "--home", str(self.house.home.path)])
        said = self._capsys.readouterr()
        assert ended == code, said.out + said.err
        return said.out + said.err

    def approve(self) -> str:
        return self("approve", self.file, "--by", "Dr Roe")

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.house.home.ledger_file, "north", ledger_policy(self.house.home.config.policy))


@pytest.fixture
def site(house: House, capsys: pytest.CaptureFixture[str]) -> Site:
    return Site(house, capsys)


@pytest.mark.parametrize("verb", sorted(_VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fedicom.main(["site", verb, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fedicom site {verb}")
    assert len(said.split("\n\n")[1]) > 50


def test_the_front_page_lists_every_verb_and_the_first_day(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fedicom.main(["site", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for verb, (_, _, says) in _VERBS.items():
        assert f"  {verb} " in said
        assert says in said
    assert said.index("site unpack north.kit") < said.index("site preflight --home") < said.index("site start --home")


def test_looking_needs_neither_torch_nor_flower(site: Site) -> None:
    code = (
        "import sys; from fedicom import main\n"
        "for verb in ('status', 'approvals', 'log', 'stop'):\n"
        "    main(['site', verb, '--home', sys.argv[1]])\n"
        "assert not {'torch', 'flwr', 'monai', 'pydicom'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(site.house.home.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_no_sites_says_how_to_name_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedicom.main(["site", "status", "--home", str(tmp_path)]) == 2
    assert "--home DIR or set FEDICOM_HOME" in capsys.readouterr().err


def test_the_folder_may_be_named_by_the_environment(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDICOM_HOME", str(site.house.home.path))
    assert fedicom.main(["site", "approvals"]) == 0
    assert "No recipe is approved here" in capsys.readouterr().out


# Recipes


def test_a_review_counts_this_sites_patients_and_approves_nothing(site: Site) -> None:
    said = site("review", site.file)
    for words in (
        "What would be trained", "On which of your patients", "What leaves this house", "Privacy", "This site's policy",
        f"{TRAIN_PATIENTS} patients with", site.recipe.id, "would remain",
    ):  # fmt: skip
        assert words in said, words
    assert "is not approved here" in site("withdraw", site.file, code=2)
    assert site("approvals", "--json").strip() == "[]"


def test_a_review_decides_no_split_that_a_later_recipe_would_have_to_keep(site: Site) -> None:
    home = site.house.home
    shutil.rmtree(home.cache)
    odd = site.file.with_name("odd.json")
    site.house.sign(recipe_of(evaluation=Evaluation(validation_fraction=0.4, test_fraction=0.0))).write(odd)
    assert "0 patients with 0 images for the closing evaluation" in site("review", odd)
    assert not (home.cache / "cohort_manifest.json").exists()
    said = site("review", site.file)
    assert f"{TRAIN_PATIENTS} patients with" in said
    assert "frozen" not in said
    site.approve()
    assert site("preflight", "--no-probe", code=1)
    assert (home.cache / "cohort_manifest.json").exists()
    assert f"{TRAIN_PATIENTS} patients with" in site("review", site.file)


def test_a_review_for_programs_holds_the_same_numbers(site: Site) -> None:
    plain = json.loads(site("review", site.file, "--json"))
    assert plain["patients"]["train"]["patients"] == TRAIN_PATIENTS
    assert plain["recipe"]["id"] == site.recipe.id
    assert plain["objections"] == []
    uncounted = json.loads(site("review", site.file, "--json", "--no-count"))
    assert uncounted["patients"] is None


def test_a_review_of_images_that_cannot_be_used_says_why(site: Site, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    site.house.configure(data=str(tmp_path / "empty"))
    said = site("review", site.file)
    assert "could not be counted: the folder has no labels.csv" in said


def test_approving_and_withdrawing_leave_name_and_time_in_the_log(site: Site) -> None:
    said = site.approve()
    assert f"Hash {site.recipe.id}" in said
    assert "Approved by Dr Roe" in said
    assert "Dr Roe" in site("approvals")
    (row,) = json.loads(site("approvals", "--json"))
    assert (row["recipe_id"], row["by"], row["holds"]) == (site.recipe.id, "Dr Roe", True)
    assert "tiny" in site("review", site.recipe.id[:8], "--no-count")  # an approved one goes by its hash as well
    site("withdraw", site.recipe.id[:8], "--by", "Dr Doe")
    kinds = [event.kind for event in verify(site.house.home.audit_file)]
    assert kinds[-2:] == ["recipe approved", "approval withdrawn"]
    assert "Dr Doe withdrew the approval" in site("log")


def test_without_by_the_login_name_is_who_approved(site: Site) -> None:
    from common.enrolment import login

    site("approve", site.file)
    assert Approvals(site.house.home).all()[0].by == login()


def test_what_may_not_be_approved_is_not(site: Site, tmp_path: Path) -> None:
    site.house.sign(recipe_of(privacy=PLAIN)).write(tmp_path / "plain.json")
    assert "(require_privacy)" in site("approve", tmp_path / "plain.json", code=1)
    sign_recipe(recipe_of(), Signer.temporary()).write(tmp_path / "foreign.json")
    assert "trusts coordinator" in site("approve", tmp_path / "foreign.json", code=2)
    (tmp_path / "text.json").write_text("{}")
    assert "no signed recipe" in site("approve", tmp_path / "text.json", code=2)
    for name in ("nothing.json", "abc", "a" * 64):
        assert "no approved recipe of that hash" in site("withdraw", name, code=2)
    assert Approvals(site.house.home).ids() == ()


def test_a_record_that_does_not_hold_is_listed_with_its_reason(site: Site) -> None:
    site.approve()
    path = site.house.home.approved / f"{site.recipe.id}.json"
    path.write_text(path.read_text().replace("Dr Roe", "Dr Doe"))
    assert "not signed by this site's key" in site("approvals")
    (row,) = json.loads(site("approvals", "--json"))
    assert row["holds"] is False


# Budget, log


def test_the_budget_adds_up_by_recipe_with_what_is_reserved(site: Site, tmp_path: Path) -> None:
    site.approve()
    mine, other = site.recipe.id, "f" * 64
    delta = site.house.home.config.policy.delta
    site.ledger.settle(site.ledger.reserve(mine, round=1, base="a" * 64, event=EVENT), 3)
    site.ledger.settle(site.ledger.reserve(other, round=1, base="a" * 64, event=EVENT), 4)
    site.ledger.reserve(mine, round=2, base="a" * 64, event=EVENT)
    plain = json.loads(site("budget", "--json"))
    assert plain["spent"] == site.ledger.spent()
    assert plain["left"] == 8.0 - plain["spent"]
    seven = epsilon_pld([Event(noise_multiplier=1.0, sampling_rate=0.3, steps=7)], delta)
    assert plain["reserved"] == plain["spent"] - seven
    first, second = plain["recipes"]
    assert (first["recipe_id"], first["name"]) == (mine, "tiny")
    assert (first["visits"], first["open"], first["steps"]) == (2, 1, 7)
    assert first["epsilon"] == seven
    assert (second["recipe_id"], second["name"], second["visits"], second["open"]) == (other, "", 1, 0)
    said = site("budget", "--plot", tmp_path / "budget.svg")
    assert f"Spent: epsilon {rounded_up(plain['spent'])} of 8" in said
    assert f"Left: {rounded_down(plain['left'])}." in said
    assert "<svg" in (tmp_path / "budget.svg").read_text()


def test_noised_scores_stand_beside_the_updates_of_their_recipe(site: Site) -> None:
    delta, scored = site.house.home.config.policy.delta, Event(noise_multiplier=3.0, sampling_rate=1.0, steps=1)
    site.ledger.settle(site.ledger.reserve("a" * 64, round=1, base="a" * 64, event=EVENT), 4)
    site.ledger.reserve("a" * 64, round=1, base="a" * 64, event=scored, kind="scores")
    site.ledger.reserve("b" * 64, round=1, base="a" * 64, event=scored, kind="scores")
    first, second = json.loads(site("budget", "--json"))["recipes"]
    assert (first["visits"], first["open"], first["steps"]) == (1, 1, 4)
    assert first["epsilon"] == epsilon_pld([EVENT], delta)
    assert first["scores_epsilon"] == second["scores_epsilon"] == epsilon_pld([scored], delta)
    assert (second["visits"], second["open"], second["epsilon"]) == (0, 1, 0)


def test_a_budget_that_nobody_touched_is_whole(site: Site, tmp_path: Path) -> None:
    said = site("budget", "--plot", tmp_path / "budget.png")
    assert "Spent: epsilon 0.00 of 8. Left: 8.00." in said
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert not site.house.home.ledger_file.exists()  # looking makes no ledger
    assert "--plot" in site("budget", "--plot", tmp_path / "budget.txt", code=2)


def test_a_budget_and_a_review_out_of_an_old_ledger_say_that_it_is_not_all(site: Site) -> None:
    site.ledger.reserve("a" * 64, round=1, base="a" * 64, event=EVENT)
    old = site.house.home.ledger_file.read_bytes()
    site.ledger.reserve("a" * 64, round=2, base="a" * 64, event=EVENT)
    site.house.log.append("budget reserved", ledger_head=site.ledger.head)
    assert json.loads(site("budget", "--json"))["trouble"] is None
    assert json.loads(site("review", site.file, "--json", "--no-count"))["ledger_error"] is None
    site.house.home.ledger_file.write_bytes(old)
    assert "This is not all: the privacy ledger is older" in site("budget", code=1)
    assert "More was spent than stands above: the privacy ledger is older" in site("review", site.file, "--no-count")
    site.house.home.ledger_file.unlink()
    assert "is missing" in json.loads(site("budget", "--json", code=1))["trouble"]


def test_the_log_is_told_in_words_and_a_broken_one_is_an_error(site: Site) -> None:
    site.house.home.audit_file.unlink(missing_ok=True)
    assert "not begun" in site("log")
    site.approve()
    for number in range(30):
        site.house.log.append("operator action", who="Dr Roe", action=f"deed {number}")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  Dr Roe: deed 29$", site("log"), re.MULTILINE)
    assert "approved recipe" not in site("log")
    assert f"Dr Roe approved recipe tiny {site.recipe.id[:12]}" in site("log", "-n", 0)
    rows = [json.loads(line) for line in site("log", "--json", "-n", 2).splitlines()]
    assert [row["facts"]["action"] for row in rows] == ["deed 28", "deed 29"]
    path = site.house.home.audit_file
    path.write_text(path.read_text().replace("deed 7", "deed 8"))
    assert "changed" in site("log", code=1)


def event(kind: str, **facts: Any) -> Logged:
    return Logged(0, "2026-01-05T12:00:00+00:00", kind, facts, "0" * 64, "1" * 64, "2" * 128)


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        (
            event("update sent", round=3, bytes=1_500_000, epsilon=1.234),
            "Sent the update of round 3, 1.5 MB, epsilon 1.24",
        ),
        (event("update sent", round=3, bytes=1_500_000, epsilon=None), "Sent the update of round 3, 1.5 MB"),
        (
            event("budget reserved", round=2, steps=12, epsilon=0.5),
            "Reserved 12 noised steps for round 2, epsilon 0.50 in all",
        ),
        (
            event("site started", recipe_id="a" * 64, patients={"train": 34}),
            f"Opened the images for recipe {'a' * 12}; patients to train on, as told: 34",
        ),
        (
            event("site started", recipe_id="a" * 64, patients={"train": 32}, counts_rounded=True),
            f"Opened the images for recipe {'a' * 12}; patients to train on, as told: 32 (rounded down)",
        ),
        (
            event("site started", recipe_id="a" * 64, patients={"train": 0}, counts_rounded=False),
            f"Opened the images for recipe {'a' * 12}; patients to train on, as told: not told",
        ),
        (event("plan refused"), "Refused round ? of recipe ? (?): ?"),
        (event("something new", count=3, why="x\x1b[2J"), "something new: count 3, why x [2J"),
    ],
)
def test_events_become_sentences(logged: Logged, words: str) -> None:
    assert in_words(logged) == words


# The node


def test_status_of_a_node_that_does_not_run_is_exit_1(site: Site) -> None:
    assert "not running; start it" in site("status", code=1)
    assert json.loads(site("status", "--json", code=1))["state"] == "stopped"
    assert "No node runs in this folder" in site("stop")


def write_status(site: Site, age_s: float = 0, **fields: Any) -> None:
    home = site.house.home
    home.run.mkdir(exist_ok=True)
    updated = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="seconds")
    home.status_file.write_text(json.dumps({"updated": updated, "pid": 7, "children": {"runner": 8}, **fields}))


def test_status_shows_the_work_and_hides_nothing_that_only_this_house_may_know(site: Site) -> None:
    refusal = {
        "time": "2026-01-05T12:00:00+00:00", "recipe_id": "a", "code": "data", "why": "no cohort",
        "here": "labels.csv row 3",
    }  # fmt: skip
    write_status(
        site, state="working", doing="training", round=2, recipe={"id": "a" * 64, "name": "tiny", "rounds": 3},
        epsilon={"spent": 2.0, "cap": 8.0, "delta": 1e-5}, updates=1, evaluations=0, bytes_sent=1_500_000,
        last_contact="2026-01-05T12:00:00+00:00", last_refusal=refusal,
    )  # fmt: skip
    said = site("status")
    for words in (
        "working", "tiny (aaaaaaaaaaaa)", "2 of 3, training", "2.00 of 8 spent, 6.00 left", "1 update, 1.5 MB",
        "no cohort", "only told here: labels.csv row 3", "runner 8",
    ):  # fmt: skip
        assert words in said, words
    assert json.loads(site("status", "--json"))["round"] == 2


def test_an_old_status_is_no_sign_of_life_and_a_failed_runner_is_exit_1(site: Site) -> None:
    write_status(site, age_s=3600, state="ready")
    assert "not running" in site("status", code=1)
    write_status(site, age_s=-3600, state="ready")  # the clock was moved back after the node was killed
    assert "not running" in site("status", code=1)
    write_status(site, state="failed", error="the log is broken")
    assert "the log is broken" in site("status", code=1)


@pytest.mark.parametrize("before", ["ready", "stopped", None])
def test_a_node_that_cannot_write_its_status_is_not_said_to_be_stopped(site: Site, before: str | None) -> None:
    if before is not None:
        write_status(site, age_s=3600, state=before)
    private_folder(site.house.home.run)
    with only_one(site.house.home):
        said = site("status", code=1)
        assert "is the disk full?" in said
        assert before is None or "runner 8" in said
        assert json.loads(site("status", "--json", code=1))["state"] == "silent"
    assert "not running" in site("status", code=1)


def test_preflight_prints_every_line_and_ends_with_1_when_one_fails(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")
    said = site("preflight", "--no-images", "--no-probe", code=1)  # no gateway is there
    assert "FAIL gateway" in said
    assert "-> open the firewall" in said
    assert "1 check failed" in said
    lines = json.loads(site("preflight", "--no-images", "--no-probe", "--json", code=1))
    assert {line["level"] for line in lines} <= {"ok", "warn", "FAIL"}
    assert [line["what"] for line in lines if line["level"] == "FAIL"] == ["gateway"]


def test_start_refuses_root(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDICOM_ALLOW_ROOT", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-root" in site("start", code=2)


def test_a_site_tests_its_own_mechanism_on_its_own_device(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = house.sign(recipe_of(model=ModelConfig(family="monai", name="resnet10", width=0.0625, stem="small")))
    signed.write(tmp_path / "recipe.json")
    words = ["site", "selftest", str(tmp_path / "recipe.json"), "--home", str(house.home.path), "--json"]
    assert fedicom.main([*words, "--out", str(tmp_path / "found.json")]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain == json.loads((tmp_path / "found.json").read_text())
    assert plain["recipe_id"] == signed.recipe.id
    assert plain["patients"] == {"north": 300}
    assert plain["device"] == "cpu"
    tried = []
    monkeypatch.setattr("client.privacy_audit.self_tests", lambda *_, device, **__: tried.append(device) or ())
    house.configure(device="auto")
    with pretending() as gpu:  # what trains is what is tested
        fedicom.main(words)
    assert tried == [gpu]
    assert json.loads(capsys.readouterr().out)["device"] == "cuda:0"
