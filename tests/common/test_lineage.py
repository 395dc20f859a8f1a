"""From a model back to the data, over logs that a deployed federation would write; every missing link is a refusal."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fedicom
from common.accounting import Event as Noised
from common.accounting import epsilon_pld
from common.audit import AuditLog
from common.audit_report import account, write_account
from common.config import load_settings
from common.errors import ConfigError
from common.identity import Signer
from common.lineage import LineageError, _rounds, lineage, runs, trace
from common.logs import check_logs, read_logs, state_of
from common.printable import number_of
from common.signed import sign_recipe

RECIPE = "ab" * 32
KEYS = {name: Signer.temporary() for name in ("server", "north", "south")}
PATIENTS = {"north": {"train": 210, "validation": 40, "test": 45}, "south": {"train": 96, "validation": 18, "test": 0}}
CODE = {"common": "c0" * 32, "torch": "2.13.0 " + "70" * 32}

Change = Callable[[str, str, dict[str, Any]], dict[str, Any] | None]
"""(log, kind, facts) to the facts that are written; None leaves the event out."""


class Clock:
    """Ticks a minute at every event."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 2, 8, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


def digest(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def federation(
    folder: Path, change: Change = lambda log, kind, facts: facts, *, rotate_bytes: int = 1 << 20, average: bool = False
) -> Path:
    """A coordinator and two sites over two rounds, with all that a deployed one writes; returns the logs' folder."""
    clock, audit = Clock(), folder / "audit"
    logs = {
        name: AuditLog(audit / f"{name}.jsonl", KEYS[name], clock=clock, rotate_bytes=rotate_bytes) for name in KEYS
    }

    def say(log: str, kind: str, **facts: Any) -> None:
        told = change(log, kind, facts)
        if told is not None:
            logs[log].append(kind, **told)

    say("server", "server started")
    say("server", "configuration", hash=digest("server.yaml"))
    say("server", "code", packages=CODE)
    say("server", "node added", site="south", public_key=KEYS["south"].public, registry=2)
    say("server", "recipe signed", recipe_id=RECIPE, name="chest", who="o.novak")
    say("server", "operator action", who="o.novak", action="run", run=RECIPE[:12])
    say("server", "run started", recipe_id=RECIPE, round=0)
    for site in ("north", "south"):
        say(site, "node started", version="0.2.0")
        say(site, "configuration", hash=digest(site))
        say(site, "code", packages=CODE)
        say(site, "recipe approved", recipe_id=RECIPE, by=f"intern@{site}", coordinator=KEYS["server"].public)
        say(site, "approval withdrawn", recipe_id=RECIPE, by=f"dpo@{site}")
        say(site, "recipe approved", recipe_id=RECIPE, by=f"dpo@{site}", coordinator=KEYS["server"].public)
        say(site, "site started", recipe_id=RECIPE, manifest=digest("data", site), patients=PATIENTS[site],
            counts_rounded=site == "south", versions={"torch": "2.13.0"})  # fmt: skip
    say(
        "server", "sites present", heads={site: logs[site].head for site in PATIENTS},
        sites={site: {"manifest": digest("data", site), "versions": {"torch": "2.13.0"}, "patients": PATIENTS[site]}
               for site in PATIENTS},
    )  # fmt: skip
    for number in (1, 2):
        before, after = digest("weights", number - 1), digest("weights", number)
        for site in PATIENTS:
            say(site, "plan received", recipe_id=RECIPE, round=number, work="train", weights=before,
                server_head=logs["server"].head)  # fmt: skip
            say(site, "budget reserved", round=number, recipe_id=RECIPE, epsilon=1.5 * number, delta=1e-5)
            say(site, "update sent", round=number, digest=digest("update", site, number), bytes=4000, norm=0.5,
                clip_norm=1.0, noise_multiplier=1.1, epsilon=1.5 * number, scores=["validation"])  # fmt: skip
        say(
            "server", "round aggregated", round=number, before=before, after=after,
            admitted={site: {"digest": digest("update", site, number), "norm": 0.5, "epsilon": 1.5 * number}
                      for site in PATIENTS},
            refused={} if number == 1 else {"west": "site refused (policy): <script>alert(1)</script>"},
            heads={site: logs[site].head for site in PATIENTS},
        )  # fmt: skip
    final = digest("weights", 2)
    if average:
        before, final = final, digest("average")
        say("server", "training ended", recipe_id=RECIPE, round=2, before=before, after=final)
    for site in PATIENTS:
        say(site, "plan received", recipe_id=RECIPE, round=3, work="evaluate", weights=final,
            server_head=logs["server"].head)  # fmt: skip
        say(site, "evaluation sent", round=3, weights=final)
    say("server", "evaluation received", round=3, before=final, after=final,
        admitted={site: {"digest": digest("none"), "norm": 0.0, "epsilon": 3.0} for site in PATIENTS}, refused={},
        heads={site: logs[site].head for site in PATIENTS})  # fmt: skip
    say("server", "model exported", file="model.onnx", sha256=digest("file"), weights=final)
    say("server", "run concluded", recipe_id=RECIPE, weights=final)
    say("server", "node revoked", site="west", why="left the federation")
    return audit


def traced(folder: Path) -> Any:
    logs = read_logs([folder])
    (run,) = runs(logs[0])
    return lineage(run, run.exports[-1], logs)


# Lineage


@pytest.mark.parametrize("rotate_bytes", [1 << 20, 1500])
def test_a_deployed_run_is_traced_back_to_data_approvals_and_code(tmp_path, rotate_bytes):
    federation(tmp_path, rotate_bytes=rotate_bytes)
    found = traced(tmp_path)
    assert found.state == "verified"
    assert [(link.round, link.before, link.after) for link in found.rounds] == [
        (number, digest("weights", number - 1), digest("weights", number)) for number in (1, 2)
    ]
    assert found.rounds[1].admitted == {site: digest("update", site, 2) for site in PATIENTS}
    north = found.sites["north"]
    assert (north.rounds, north.manifests, north.patients) == ((1, 2), (digest("data", "north"),), PATIENTS["north"])
    assert [(item.by, item.coordinator) for item in north.approvals] == [("dpo@north", KEYS["server"].public)]
    assert north.code == found.code == CODE
    assert (north.epsilon, found.epsilon) == (3.0, 3.0)
    assert "4 of 4 admitted updates stand in the logs of the sites that sent them" in found.checked
    assert any("server.jsonl after event" in text for text in found.not_checked)  # the export came after the last plan


def test_a_site_without_its_log_is_told_from_the_coordinators_word_and_said_to_be(tmp_path):
    folder = federation(tmp_path)
    (folder / "south.jsonl").unlink()
    found = traced(tmp_path)
    assert (found.sites["south"].log, found.sites["south"].manifests) == (False, (digest("data", "south"),))
    assert "what south says: its log is not there" in found.not_checked
    assert "2 of 4 admitted updates stand in the logs of the sites that sent them" in found.checked


def test_a_run_that_an_operator_ended_is_traced_to_the_moving_average_that_its_log_names(tmp_path):
    federation(tmp_path / "ended", average=True)
    found = traced(tmp_path / "ended")
    assert (found.weights, found.early_stopped) == (digest("average"), False)
    assert [link.round for link in found.rounds] == [1, 2]
    for name, change in {
        "another": at("server", "training ended", before="ab" * 32),
        "untold": at("server", "training ended"),
    }.items():
        federation(tmp_path / name, change, average=True)
        with pytest.raises(LineageError, match="not the output of the last aggregation"):
            traced(tmp_path / name)


def at(log: str, kind: str, number: int | None = None, **changes: Any) -> Change:
    """Changes facts of one kind in one log, in one round or in all."""

    def change(name: str, what: str, facts: dict[str, Any]) -> dict[str, Any] | None:
        hit = (name, what) == (log, kind) and number in (None, facts.get("round"))
        return facts if not hit else ({**facts, **changes} if changes else None)

    return change


LIES: dict[str, tuple[Change, str]] = {
    "exported weights of nowhere": (at("server", "model exported", weights="ee" * 32), "not the output of the last"),
    "an earlier round's weights, without early stopping's evaluation": (
        at("server", "model exported", weights=digest("weights", 1)), "not the output of the last aggregation, round 2",
    ),
    "a round left out": (at("server", "round aggregated", 1), "aggregation of round 1 is missing"),
    "a round from other weights": (at("server", "round aggregated", 2, before="dd" * 32), "round 2 began with weights"),
    "an update that the site never sent": (
        at("server", "round aggregated", 2, admitted={"north": {"digest": "cc" * 32, "epsilon": 3.0}}),
        "round 2: the coordinator admitted update cccccccccccc of north",
    ),
    "an update for other weights": (at("north", "plan received", 2, weights="bb" * 32), "round 2: .* holds no such"),
    "an update for another recipe": (at("north", "plan received", 1, recipe_id="99" * 32), "round 1: .* holds no such"),
    "another epsilon": (at("north", "update sent", 2, epsilon=2.0), "round 2: north sent epsilon 2.0, .* log says 3.0"),
    "another data manifest": (at("north", "site started", manifest="77" * 32), "trained on manifest 777777777777"),
    "a start without data": (at("north", "site started"), "does not say with which data"),
    "an approval that was withdrawn": (
        lambda log, kind, facts: None if kind == "recipe approved" and facts["by"] == "dpo@south" else facts,
        "round 1: south trained .* holds no approval that stood then",
    ),
    "data of another recipe": (at("north", "site started", recipe_id="97" * 32), "does not say with which data"),
    "no approval": (at("south", "recipe approved"), "round 1: south trained .* holds no approval"),
    "an approval of another recipe": (at("south", "recipe approved", recipe_id="98" * 32), "holds no approval"),
    "no round": (lambda log, kind, facts: None if kind == "round aggregated" else facts, "trained on nothing"),
    "a fact of another type": (at("server", "round aggregated", 2, after=5), "does not say its after"),
    "admitted that is no mapping": (at("server", "round aggregated", 2, admitted=[1]), "does not say its admitted"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_link_that_does_not_hold_is_a_refusal_that_says_which(tmp_path, lie):
    change, says = LIES[lie]
    federation(tmp_path, change)
    with pytest.raises(LineageError, match=says):
        traced(tmp_path)


def test_an_approval_that_came_after_the_training_does_not_count(tmp_path):
    folder = federation(tmp_path, at("south", "recipe approved"))
    late = {"recipe_id": RECIPE, "by": "dpo@south", "coordinator": KEYS["server"].public}
    AuditLog(folder / "south.jsonl", KEYS["south"]).append("recipe approved", **late)
    with pytest.raises(LineageError, match=r"round 1: south trained .* holds no approval that stood then"):
        traced(tmp_path)


def test_data_of_which_no_log_tells_are_a_missing_link(tmp_path):
    folder = federation(tmp_path, at("server", "sites present", sites={}))
    assert traced(tmp_path).sites["north"].manifests == (digest("data", "north"),)  # the site's own log tells
    (folder / "south.jsonl").unlink()
    with pytest.raises(LineageError, match="no log says on which data south trained"):
        traced(tmp_path)


def test_logs_that_do_not_hold_are_not_traced(tmp_path):
    folder = federation(tmp_path)
    path = folder / "south.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"train":96', b'"train":97'))
    with pytest.raises(LineageError, match=r"nothing can be traced in them: south\.jsonl, event \d+: content does not"):
        traced(tmp_path)


def test_rounds_that_were_done_again_after_a_crash_count_once(tmp_path):
    clock, heads = Clock(), {"north": "", "south": ""}
    log = AuditLog(tmp_path / "server.jsonl", KEYS["server"], clock=clock)
    log.append("run started", recipe_id=RECIPE, round=0)
    for number, after in ((1, "a1"), (2, "a2")):
        log.append("round aggregated", round=number, after=after, heads=heads)
    log.append("run resumed", recipe_id=RECIPE, round=1)  # the checkpoint of round 2 was not yet written
    log.append("round aggregated", round=2, after="b2", heads=heads)
    (run,) = runs(read_logs([tmp_path])[0])
    assert [event.facts["after"] for event in run.rounds] == ["a1", "b2"]


def test_runs_that_share_a_log_are_kept_apart_by_their_names(tmp_path):
    log = AuditLog(tmp_path / "server.jsonl", KEYS["server"], clock=Clock())
    for kind, name, round_, recipe_id in (
        ("run started", "one", 0, "aa"), ("run started", "two", 0, "bb"), ("round aggregated", "one", 1, ""),
        ("round aggregated", "two", 1, ""), ("run started", "two", 0, "bb"),  # before its first checkpoint
        ("round aggregated", "two", 1, ""), ("operator action", "three", 0, ""),
    ):  # fmt: skip
        log.append(kind, run=name, round=round_, recipe_id=recipe_id)
    found = runs(read_logs([tmp_path])[0])
    assert [(run.recipe_id, [event.number for event in run.rounds]) for run in found] == [("aa", [3]), ("bb", [6])]


def test_the_log_of_the_authority_is_shown_and_vouched_for_by_nobody(tmp_path, capsys):
    federation(tmp_path)
    path = tmp_path / "audit" / "audit.jsonl"
    AuditLog(path, Signer.temporary(), clock=Clock()).append(
        "operator action", who="ca", action="federation provisioned"
    )
    logs = read_logs([tmp_path])
    assert [(log.name, log.role) for log in logs] == [
        ("server", "coordinator"), ("authority", "authority"), ("north", "site"), ("south", "site"),
    ]  # fmt: skip
    assert state_of(check_logs(logs)) == "verified"
    assert traced(tmp_path).state == "verified"
    assert fedicom.main(["audit", "verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("audit.jsonl, which is the log of the authority: 2 events")
    assert "Nobody else remembers the authority's log" in said
    assert "--against" not in said  # there is no log to hold it against


def test_two_logs_of_one_side_or_none_are_a_wrong_request(tmp_path):
    folder = federation(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no log"):
        read_logs([folder, tmp_path])
    (folder / "copy.jsonl").write_bytes((folder / "north.jsonl").read_bytes())
    with pytest.raises(ConfigError, match="both logs of north"):
        read_logs([folder])


def test_the_folder_of_a_run_stands_for_its_coordinators_log(tmp_path):
    federation(tmp_path / "coordinator")
    (tmp_path / "coordinator" / "runs" / "chest").mkdir(parents=True)
    logs = read_logs([tmp_path / "coordinator" / "runs" / "chest"])
    assert [log.name for log in logs] == ["server", "north", "south"]
    again = read_logs([tmp_path / "coordinator" / "runs" / "chest", tmp_path / "coordinator" / "audit"])
    assert again == logs, "given twice, read once"


def test_two_runs_of_one_recipe_with_equal_updates_are_told_apart_by_what_was_spent(tmp_path):
    """Seeded noise gives equal updates; the account goes on."""
    audit = federation(tmp_path)
    logs = {name: AuditLog(audit / f"{name}.jsonl", KEYS[name]) for name in ("server", "north", "south")}
    logs["server"].append("run started", recipe_id=RECIPE, round=0)
    for number in (1, 2):
        before, after, epsilon = digest("weights", number - 1), digest("weights", number), 3.0 + 1.5 * number
        for site in PATIENTS:
            logs[site].append("plan received", recipe_id=RECIPE, round=number, work="train", weights=before)
            logs[site].append("update sent", round=number, digest=digest("update", site, number), epsilon=epsilon)
        admitted = {site: {"digest": digest("update", site, number), "epsilon": epsilon} for site in PATIENTS}
        logs["server"].append("round aggregated", round=number, before=before, after=after, admitted=admitted)
    logs["server"].append("model exported", file="model.onnx", sha256=digest("again"), weights=digest("weights", 2))
    found = read_logs([tmp_path])
    first, second = runs(found[0])
    assert lineage(first, first.exports[-1], found).epsilon == 3.0
    assert lineage(second, second.exports[-1], found).epsilon == 6.0


# A real run, and its model file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from simulations.run import simulate

    out = tmp_path_factory.mktemp("run") / "out"
    words = [
        "recipe=phantom_2d", "rounds=2", "federation.sites=2", "federation.quorum=2", "simulation.phantom.patients=20",
        "simulation.phantom.central_patients=12", "simulation.phantom.size=24", "data.size=[16,16]",
        "evaluation.bootstraps=100", "evaluation.min_cell=3", "privacy.delta=1e-3", "training.batch_size=8",
        "simulation.device=cpu", "simulation.threads=1", f"out={out}",
    ]  # fmt: skip
    simulate(load_settings(words))
    return out


def said(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    code = fedicom.main(["audit", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_model_file_of_a_simulation_is_traced_by_the_command(run, capsys):
    code, told = said("trace", run / "model.onnx", "--logs", run, capsys=capsys)
    summary = json.loads((run / "summary.json").read_text())
    assert (code, told["traced"], told["state"]) == (0, True, "verified")
    assert told["sha256"] == summary["onnx"]["sha256"]
    assert told["weights"] == summary["weight_digest"]
    assert told["recipe_id"] == summary["recipe_id"]
    assert told["recipe"]["name"] == "phantom_2d"
    assert {name: site["epsilon"] for name, site in told["sites"].items()} == {
        name: site["epsilon"] for name, site in summary["sites"].items()
    }
    assert {name: site["patients"]["train"] for name, site in told["sites"].items()} == {
        name: site["train_patients"] for name, site in summary["sites"].items()
    }
    assert len(told["rounds"]) == 2
    assert fedicom.main(["audit", "trace", str(run / "model.onnx"), "--logs", str(run)]) == 0
    assert "2 rounds" in capsys.readouterr().out


def test_a_torchscript_file_is_traced_by_its_hash_and_what_it_cannot_tell_is_said(tmp_path, capsys):
    model, data = tmp_path / "model.ts.pt", b"a zip file of torch's"
    model.write_bytes(data)
    federation(tmp_path, at("server", "model exported", file=model.name, sha256=hashlib.sha256(data).hexdigest()))
    code, told = said("trace", model, "--logs", tmp_path, capsys=capsys)
    assert (code, told["traced"], told["file"], len(told["rounds"])) == (0, True, "model.ts.pt", 2)
    assert "SHA-256 of the file is that of the logs" in told["checked"]
    assert "carries no description" in told["not_checked"][-1]
    model.write_bytes(data + b"x")
    code, told = said("trace", model, "--logs", tmp_path, capsys=capsys)
    assert (code, told["traced"]) == (1, False)
    assert "holds no export of a file with SHA-256" in told["missing"]


def test_a_model_file_that_was_changed_or_is_of_another_run_is_refused(run, tmp_path, capsys):
    data = bytearray((run / "model.onnx").read_bytes())
    at = data.index(b"Not a medical device")
    data[at : at + 3] = b"Yes"
    (tmp_path / "model.onnx").write_bytes(data)
    code, told = said("trace", tmp_path / "model.onnx", "--logs", run, capsys=capsys)
    assert (code, told["traced"]) == (1, False)
    assert "holds no export of a file with SHA-256" in told["missing"]
    federation(tmp_path)
    assert fedicom.main(["audit", "trace", str(run / "model.onnx"), "--logs", str(tmp_path)]) == 1
    assert "logs of another run" in capsys.readouterr().err
    (tmp_path / "text.onnx").write_text("no model")
    assert said("trace", tmp_path / "text.onnx", "--logs", run, capsys=capsys)[0] == 1


def test_what_the_file_says_of_itself_must_be_what_the_logs_say(run):
    from common.lineage import _with_file
    from common.onnx_model import OnnxModel

    found, file = trace(run / "model.onnx", read_logs([run])), OnnxModel(run / "model.onnx", gpu=False).description
    assert _with_file(found, file)
    for wrong, says in (
        (replace(file, weight_digest="ee" * 32), "the file says weights eeeeeeeeeeee"),
        (replace(file, recipe=b"{}"), "the file says recipe"),
        (replace(file, privacy={**file.privacy, "epsilon": 0.1}), "the file says epsilon 0.1, the highest in the logs"),
        (replace(file, privacy={"mechanism": "none"}), "the file says epsilon None"),
    ):
        with pytest.raises(LineageError, match=says):
            _with_file(found, wrong)
    with pytest.raises(LineageError, match="recipe has no early stopping"):
        _with_file(replace(found, early_stopped=True), file)


def test_without_the_coordinators_log_nothing_is_traced(run):
    logs = [log for log in read_logs([run]) if not log.coordinator]
    assert state_of(check_logs(logs)) == "alone"
    with pytest.raises(LineageError, match="coordinator's log is not there"):
        trace(run / "model.onnx", logs)


def test_a_log_of_a_real_run_that_was_changed_stops_the_trace(run, tmp_path, capsys):
    shutil.copytree(run / "audit", tmp_path / "audit")
    path = tmp_path / "audit" / "north.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    code, told = said("trace", run / "model.onnx", "--logs", tmp_path, capsys=capsys)
    assert (code, told["traced"]) == (1, False)
    assert "the logs do not hold" in told["missing"]


# The report


class Text(HTMLParser):
    """What a reader sees, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def seen(path: Path) -> tuple[str, Text]:
    parser = Text()
    parser.feed(path.read_text())
    return " ".join(" ".join(parser.words).split()), parser


def test_the_report_of_a_deployed_run_tells_an_officer_everything(tmp_path, capsys):
    federation(tmp_path)
    assert fedicom.main(["audit", "report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith("3 logs: verified\n")
    text, parser = seen(tmp_path / "page.html")
    assert "Verified 3 logs: every event follows the one before it" in text
    for expected in (
        "train 210, validation 40, test 45",  # on how many patients
        "train 96, validation 18, test not told (rounded down)",
        "306 sum over sites and recipes; rounded down", "at least 96 patients, epsilon 3.00",
        "dpo@north", "dpo@south",  # under whose approval
        "3.00 delta 1e-05",  # at what epsilon
        "o.novak", "node revoked", "west", "left the federation", "node added", "configuration", "node started",
        digest("update", "north", 2)[:12], "16.0 kB", digest("file"), digest("data", "south")[:12],
        "site refused (policy): <script>alert(1)</script>",  # as text, not as markup
    ):  # fmt: skip
        assert expected in text, expected
    assert "script" not in parser.tags
    assert "svg" in parser.tags
    assert parser.fetched == []


def test_the_json_beside_the_page_says_the_same(tmp_path):
    federation(tmp_path)
    told = account(read_logs([tmp_path]), {})
    plain = json.loads(write_account(told, tmp_path / "page.html").read_text())
    assert plain["format"] == "fedicom audit report 1"
    (story,) = plain["stories"]
    assert (story["recipe_id"], story["rounds"], story["concluded"]) == (RECIPE, 2, True)
    assert story["coordinator"] == KEYS["server"].public
    assert [(site["name"], site["patients"]["train"], site["epsilon"], site["updates"], site["bytes"])
            for site in story["sites"]] == [("north", 210, 3.0, 2, 8000), ("south", 96, 3.0, 2, 8000)]  # fmt: skip
    assert [(sent["site"], sent["what"], sent["round"], sent["fate"]) for sent in story["sent"]] == [
        (site, what, number, "admitted")
        for what, number in (("update", 1), ("update", 2), ("evaluation", 3))
        for site in ("north", "south")
    ]
    assert {sent["scores"] for sent in story["sent"] if sent["what"] == "update"} == {"yes"}
    assert [line["facts"]["why"] for line in plain["refusals"]] == ["site refused (policy): <script>alert(1)</script>"]
    assert plain["other"] == []


def rows_of(path: Path, title: str) -> list[list[str]]:
    """Cells of the table with this caption."""
    (found,) = (part for part in re.findall(r"<table.*?</table>", path.read_text(), re.DOTALL) if title in part)
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    ]


def test_how_an_update_was_noised_is_unknown_and_not_none_where_the_sites_log_is_not_there(tmp_path):
    folder = federation(tmp_path, at("north", "update sent", 2, noise_multiplier=0.0))
    (folder / "south.jsonl").unlink()
    write_account(account(read_logs([tmp_path]), {}), tmp_path / "page.html")
    head, *rows = rows_of(tmp_path / "page.html", "Every message with results")
    column = head.index("Clip / noise")
    shown = {(row[0], row[2], row[3]): row[column] for row in rows}
    assert shown == {
        ("north", "update", "1"): "1 / 1.1", ("north", "update", "2"): "none", ("north", "evaluation", "3"): "–",
        ("south", "update", "1"): "–", ("south", "update", "2"): "–", ("south", "evaluation", "3"): "–",
    }  # fmt: skip


def test_what_noised_scores_cost_stands_beside_the_epsilon_of_updates(tmp_path):
    """Noise 5.3, two histograms: epsilon 1 at delta 1e-5; the event's own epsilon is that of all releases."""
    folder = federation(tmp_path)
    log = AuditLog(folder / "north.jsonl", KEYS["north"], clock=lambda: datetime(2026, 3, 3, tzinfo=UTC))
    for _ in range(2):  # asked again after a crash: paid once
        log.append("plan received", recipe_id=RECIPE, round=3, work="evaluate", weights=digest("weights", 2))
        log.append("budget reserved", round=3, recipe_id=RECIPE, noise_multiplier=5.3, sampling_rate=1.0, steps=2,
                   epsilon=3.61, delta=1e-5, releases="scores")  # fmt: skip
    told = account(read_logs([tmp_path]), {})
    paid = epsilon_pld([Noised(noise_multiplier=5.3, sampling_rate=1.0, steps=2)], 1e-5)
    assert [site.scores_epsilon for site in told.stories[0].sites] == [paid, None]
    assert 0.98 < paid <= 1.0
    write_account(told, tmp_path / "page.html")
    text, _ = seen(tmp_path / "page.html")
    assert "Epsilon of updates 3.00 highest of any site, one recipe; of noised scores 1.00" in text
    assert "3.00 delta 1e-05 and 1.00 of scores" in text
    log.append("budget reserved", round=4, recipe_id=RECIPE, noise_multiplier="much", releases="scores")
    assert account(read_logs([tmp_path]), {}).stories[0].sites[0].scores_epsilon is None


def test_numbers_that_nobody_can_compute_with_keep_no_auditor_from_the_report(tmp_path):
    huge = 10**400  # no float holds it, and JSON has no bound
    folder = federation(tmp_path, at("north", "update sent", 2, noise_multiplier=huge, bytes=huge, norm=-huge))
    log = AuditLog(folder / "south.jsonl", KEYS["south"], clock=lambda: datetime(2026, 3, 3, tzinfo=UTC))
    # Honestly counted, these steps take 100 TB.
    log.append("budget reserved", round=3, recipe_id=RECIPE, noise_multiplier=0.01, sampling_rate=0.5, steps=10**9,
               epsilon=3.61, delta=1e-5, releases="scores")  # fmt: skip
    told = account(read_logs([tmp_path]), {})
    write_account(told, tmp_path / "page.html")
    sent = {(item.site, item.round): item for item in told.stories[0].sent if item.what == "update"}
    assert (sent["north", 2].noise_multiplier, sent["north", 2].bytes, sent["north", 2].norm) == (None, None, None)
    assert [site.scores_epsilon for site in told.stories[0].sites] == [None, None]
    says = {"north": {"digest": digest("update", "north", 2), "epsilon": huge}}
    federation(tmp_path / "server", at("server", "round aggregated", 2, admitted=says))
    (story,) = account(read_logs([tmp_path / "server"]), {}).stories
    assert "the coordinator's log says 1000000" in story.broken[0]


def test_the_report_of_changed_logs_says_not_verified_first_and_ends_with_1(tmp_path, capsys):
    folder = federation(tmp_path)
    path = folder / "north.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"norm":0.5', b'"norm":0.6', 1))
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"]) == (1, "broken")
    text, _ = seen(tmp_path / "audit_report.html")
    named = re.search(r"NOT verified .*? (north\.jsonl, event \d+: content does not match its hash)", text)
    assert named
    assert text.index("NOT verified") < text.index("Sites, patients and approvals")
    # what came ahead of the change is shown, what came after is not
    assert [sent["round"] for sent in plain["stories"][0]["sent"] if sent["site"] == "north"] == []


def test_the_report_of_one_side_alone_does_not_say_verified(tmp_path, capsys):
    folder = federation(tmp_path)
    for logs in ([folder / "north.jsonl"], [folder / "server.jsonl"]):
        code, plain = said("report", *logs, "--out", tmp_path / "page.html", capsys=capsys)
        assert (code, plain["state"]) == (0, "alone")
        assert "could have cut or rewritten" in seen(tmp_path / "page.html")[0]
    (story,) = plain["stories"]  # the coordinator's word of what the sites sent
    assert {(sent["site"], sent["told_by"]) for sent in story["sent"]} == {("north", "server"), ("south", "server")}
    assert story["sites"][0]["patients"]["train"] == 210
    text = seen(tmp_path / "page.html")[0]
    assert "Updates sent 4 size of 4 not told" in text
    assert "Not checked: all events of server.jsonl: no other log remembers a head that follows them" in text


def test_the_report_of_the_folder_that_one_is_in_needs_no_name(tmp_path, monkeypatch, capsys):
    federation(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, plain = said("report", ".", capsys=capsys)
    assert (code, plain["state"]) == (0, "verified")
    assert (tmp_path / "audit_report.html").is_file()


def test_a_log_in_anothers_place_is_called_by_its_owners_name(tmp_path, capsys):
    folder = federation(tmp_path)
    shutil.copy(folder / "south.jsonl", folder / "north.jsonl")
    assert (
        fedicom.main(["audit", "verify", *map(str, (folder / "north.jsonl", "--against", folder / "server.jsonl"))])
        == 0
    )
    assert capsys.readouterr().out.startswith("north.jsonl, which is the log of south: 16 events")


def test_the_report_says_whose_log_is_not_there(tmp_path, capsys):
    folder = federation(tmp_path)
    (folder / "north.jsonl").unlink()
    assert fedicom.main(["audit", "report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "2 logs: verified\nThe log of north is not there; what it did is told by the coordinator alone.\n"
    )
    assert "Not there: the log of north." in seen(tmp_path / "audit_report.html")[0]


def test_the_report_says_which_events_nobody_vouches_for(tmp_path, capsys):
    federation(tmp_path)  # the coordinator's export, conclusion and a revocation come after the last plan
    assert fedicom.main(["audit", "report", str(tmp_path)]) == 0
    said_first = capsys.readouterr().out.splitlines()[:2]
    last = max(event.number for event in read_logs([tmp_path])[0].events if event.kind == "round aggregated")
    assert said_first == [
        "3 logs: verified",
        f"Not vouched for: events of server.jsonl after event {last}: no other log remembers a head that follows them.",
    ]


def test_the_report_says_what_left_a_site_and_is_not_in_the_coordinators_log(tmp_path, capsys):
    # A coordinator that asks for scores once more, and says nothing of it, breaks no chain.
    def hidden(log: str, kind: str, facts: dict[str, Any]) -> dict[str, Any] | None:
        return None if kind == "evaluation received" else facts

    folder = federation(tmp_path, hidden)
    assert fedicom.main(["audit", "report", str(folder)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left a site")]
    assert told == [f"Left a site, and not in the coordinator's log: 1 message of {name}." for name in PATIENTS]
    text = seen(folder / "audit_report.html")[0]
    assert "not in the coordinator's log: 1 message of north, 1 message of south; see their fate below" in text


def test_the_page_goes_into_a_folder_that_is_named_and_never_over_its_own_json(tmp_path, capsys):
    folder, out = federation(tmp_path), tmp_path / "out"
    out.mkdir()
    assert fedicom.main(["audit", "report", str(folder), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["audit_report.html", "audit_report.json"]
    assert fedicom.main(["audit", "report", str(folder), "--out", str(out / "told.json")]) == 2
    assert "give told.html" in capsys.readouterr().err
    assert not (out / "told.json").exists()


def test_a_lineage_that_does_not_hold_is_in_the_report_and_ends_with_1(tmp_path, capsys):
    federation(tmp_path, at("server", "model exported", weights="ee" * 32))
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"], plain["stories"][0]["lineages"]) == (1, "verified", [])
    text, _ = seen(tmp_path / "audit_report.html")
    assert "Lineage does not hold: model.onnx: the exported weights eeeeeeeeeeee are not the output" in text


def test_what_an_owner_wrote_moves_no_cursor_and_makes_no_line_of_its_own(tmp_path, capsys):
    federation(tmp_path, at("server", "model exported", weights="ee" * 32, file="\x1b[2J\n3 logs: verified\ud800"))
    assert fedicom.main(["audit", "report", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("3 logs: verified") == 1  # the logs do hold; their lineage does not
    assert lines[1].startswith(" [2J 3 logs: verified : the exported weights eeeeeeeeeeee are not the output")
    assert all(line.isprintable() for line in lines)


def test_events_of_unknown_kinds_are_shown_and_not_hidden(tmp_path):
    federation(tmp_path)
    log = AuditLog(tmp_path / "audit" / "south.jsonl", KEYS["south"], clock=lambda: datetime(2026, 3, 3, tzinfo=UTC))
    log.append("lightning struck", where="roof \udcff")
    told = account(read_logs([tmp_path]), {})
    assert [line.kind for line in told.other] == ["lightning struck"]
    write_account(told, tmp_path / "page.html")
    assert "lightning struck where: roof ?" in seen(tmp_path / "page.html")[0]


def test_a_simulations_folder_is_reported_with_its_recipe(run, capsys):
    code, plain = said("report", run, capsys=capsys)
    assert (code, plain["state"]) == (0, "verified")
    (story,) = plain["stories"]
    assert story["recipe"]["name"] == "phantom_2d"
    assert len(story["lineages"]) == 1
    text, parser = seen(run / "audit_report.html")
    assert "Tells radiograph-like phantoms" in text
    assert parser.fetched == []


@pytest.mark.parametrize("place", ["run.json", "runs/first/recipe.json", "approved/one.json"])
def test_the_recipe_is_found_where_a_simulation_a_coordinator_or_a_site_keeps_it(tmp_path, place, capsys):
    signed = sign_recipe(load_settings(["recipe=phantom_2d"]).recipe, KEYS["server"])
    log = AuditLog(tmp_path / "audit" / "server.jsonl", KEYS["server"], clock=Clock())
    log.append("run started", recipe_id=signed.recipe.id, round=0)
    content = json.loads(signed.text)
    (tmp_path / place).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / place).write_text(json.dumps({"recipe": content} if place.startswith("approved") else content))
    (tmp_path / "summary.json").write_text('{"recipe": "phantom_2d"}')
    assert fedicom.main(["audit", "report", str(tmp_path)]) == 0
    assert "What was trained: phantom_2d" in seen(tmp_path / "audit_report.html")[0]
    content["recipe"]["rounds"] = 999  # another recipe: its id is not that of the log
    (tmp_path / place).write_text(json.dumps(content))
    assert fedicom.main(["audit", "report", str(tmp_path)]) == 0
    assert f"What was trained: recipe {signed.recipe.id[:12]}" in seen(tmp_path / "audit_report.html")[0]


def test_a_run_of_many_sites_and_rounds_still_draws(tmp_path):
    federation(tmp_path)
    found = traced(tmp_path)
    sites: Mapping[str, Any] = {f"site{n:02d}": replace(found.sites["north"], name=f"site{n:02d}") for n in range(40)}
    rounds = tuple(replace(found.rounds[0], round=n) for n in range(1, 90))
    told = account(read_logs([tmp_path]), {})
    story = replace(told.stories[0], lineages=(replace(found, sites=sites, rounds=rounds),))
    write_account(replace(told, stories=(story,)), tmp_path / "page.html")
    text, _ = seen(tmp_path / "page.html")
    assert "30 more sites" in text
    assert "87 more" in text


def test_the_weights_from_before_the_first_round_are_named_as_trained_on_nothing():
    def event(number: int, kind: str, **facts: Any) -> Any:
        return SimpleNamespace(number=number, kind=kind, time="2026-01-01T00:00:00.000Z", facts=facts)

    aggregated = event(1, "round aggregated", round=1, before="a" * 64, after="b" * 64, admitted={})
    again = event(2, "evaluation received", after="a" * 64)
    run = SimpleNamespace(rounds=[aggregated], events=[aggregated, again])
    with pytest.raises(LineageError, match="trained on nothing"):
        _rounds(run, "a" * 64)


def test_one_log_is_a_log_and_two_are_logs(tmp_path, capsys):
    federation(tmp_path)
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(next(tmp_path.rglob("north.jsonl")), alone)
    fedicom.main(["audit", "report", str(alone), "--out", str(alone / "page.html")])
    assert capsys.readouterr().out.startswith("1 log: ")
    assert [number_of(count, "log") for count in (0, 1, 1234)] == ["0 logs", "1 log", "1,234 logs"]
    assert [number_of(count, "study") for count in (1, 2)] == ["1 study", "2 studies"]


# Who passes for somebody else


def passed_for(folder: Path, forge: Callable[[AuditLog], object]) -> None:
    """Has a site go on with its log as it likes: it has the key."""
    forge(AuditLog(folder / "south.jsonl", KEYS["south"]))


def claims_to_coordinate(log: AuditLog) -> None:
    log.append("run started", recipe_id=RECIPE, round=0, server_head=[])


def claims_to_be_north(log: AuditLog) -> None:
    for _ in range(9):
        log.append("a note", heads={"north": log.head})


def test_a_site_that_writes_what_a_coordinator_writes_is_named_in_the_verdict(tmp_path, capsys):
    folder = federation(tmp_path)
    passed_for(folder, claims_to_coordinate)
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"]) == (1, "broken")
    (bad,) = [check for check in plain["checks"] if not check["holds"]]
    assert (bad["log"], bad["fault"], bad["kind"]) == ("south", "foreign kind", "run started")
    assert bad["why"].startswith("south.jsonl, event 16: only a coordinator writes this, and the log is that of a site")
    assert {log["name"]: log["role"] for log in plain["logs"]} == {
        "server": "coordinator", "north": "site", "south": "site",
    }  # fmt: skip
    assert plain["stories"][0]["rounds"] == 2  # the tables are the true coordinator's


def test_a_log_that_is_all_a_coordinators_is_none_when_the_sites_remember_another(tmp_path, capsys):
    folder = federation(tmp_path)
    (folder / "south.jsonl").unlink()
    passed_for(folder, claims_to_coordinate)
    (folder / "server.jsonl").rename(folder / "a.jsonl")  # its name says nothing
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"]) == (1, "broken")
    assert [check["log"] for check in plain["checks"] if not check["holds"]] == ["south"]
    assert plain["stories"][0]["rounds"] == 2


def test_logs_of_two_federations_are_a_wrong_request_and_no_offence(tmp_path, monkeypatch):
    federation(tmp_path / "one")
    for name in KEYS:
        monkeypatch.setitem(KEYS, name, Signer.temporary())
    with pytest.raises(ConfigError, match="both logs of server"):
        read_logs([tmp_path / "one", federation(tmp_path / "two")])


def test_who_passes_for_the_authority_is_not_left_out_of_the_verdict(tmp_path, capsys):
    folder = federation(tmp_path)
    AuditLog(folder / "authority.jsonl", Signer.temporary()).append("operator action", action="federation provisioned")
    (folder / "south.jsonl").unlink()
    AuditLog(folder / "south.jsonl", KEYS["south"]).append("operator action", action="federation provisioned")
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"]) == (0, "alone")
    assert {log["name"] for log in plain["logs"]} == {"authority", "server", "north", "south"}


def test_a_site_cannot_take_anothers_name_by_what_its_own_log_remembers(tmp_path, capsys):
    folder = federation(tmp_path)
    passed_for(folder, claims_to_be_north)
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"], [log["name"] for log in plain["logs"]]) == (
        0,
        "verified",
        ["server", "north", "south"],
    )


def test_a_coordinator_that_calls_two_sites_by_one_name_is_found_out_and_not_a_wrong_request(tmp_path, capsys):
    def lie(log: str, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
        heads = facts.get("heads", {})
        return {**facts, "heads": {"north": heads["south"]}} if log == "server" and "south" in heads else facts

    mixed = iter((True, False, True, False))
    federation(tmp_path, lambda log, kind, facts: lie(log, kind, facts) if "heads" in facts and next(mixed) else facts)
    code, plain = said("report", tmp_path, capsys=capsys)
    assert (code, plain["state"]) == (1, "broken")
    assert {log["name"] for log in plain["logs"]} == {"server", "north", "south"}
    bad = [check for check in plain["checks"] if not check["holds"]]
    assert {(check["log"], check["fault"]) for check in bad} == {("north", "cut or rewritten")}
