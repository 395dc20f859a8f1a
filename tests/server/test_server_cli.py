"""`fedicom server`: what a person types, and what he is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fedicom
from common.audit import AuditLog, verify
from server.runs import NOT_YET, Run


@pytest.fixture
def asking(running, monkeypatch):
    """A coordinator that runs, in whose folder the commands are given."""
    monkeypatch.chdir(running.house.home.path)
    monkeypatch.delenv("FEDICOM_HOME", raising=False)
    monkeypatch.delenv("FEDICOM_TOKEN_FILE", raising=False)
    running.house.signed().write(running.house.kits / "recipe.json")
    return running


@pytest.fixture
def said(capsys):
    """Runs a command: exit code, what it printed, what it complained."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = fedicom.main(["server", *map(str, words)])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


def recipe(asking) -> Path:
    return asking.house.kits / "recipe.json"


def test_run_and_detach_leaves_a_run_that_is_at_work(asking, said):
    code, out, err = said("run", recipe(asking), "--name", "trial-1", "--detach", "--patience-h", "0.5")
    assert (code, err) == (0, "")
    assert out.startswith(f"Run trial-1: recipe tiny, id {asking.house.signed().recipe.id[:12]}, 2 rounds\n")
    asking.until(lambda: asking.starts("trial-1"))
    assert Run(asking.house.home, "trial-1").order.patience_s == 1800


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), ("stopped", 1)])
def test_run_watches_until_the_run_is_over_and_its_exit_code_tells_how(asking, said, state, code):
    def end():
        asking.until(lambda: asking.starts("tiny"))
        summary = {"global": {"auroc": 0.875}} if state == "finished" else None
        error = "too few sites" if state == "failed" else None
        asking.end("tiny", {"finished": 0, "failed": 4, "stopped": 3}[state], state=state, summary=summary, error=error)

    thread = threading.Thread(target=end)
    thread.start()
    got, out, _ = said("run", recipe(asking))
    thread.join()
    assert got == code
    assert f"Run tiny {state}" in out
    assert ("AUROC 0.875 on the coordinator's test set" in out) is (state == "finished")
    assert ("too few sites" in out) is (state == "failed")


def test_an_unsigned_composition_is_told_how_to_become_a_recipe(asking, said):
    code, out, err = said("run", "recipe=phantom_2d", "rounds=3")
    assert (code, out) == (2, "")
    assert "fedicom recipe sign recipe=phantom_2d rounds=3 --out recipe.json" in err
    assert len(err.splitlines()) == 1


def test_who_has_neither_folder_nor_address_is_told_of_both(asking, said, monkeypatch, tmp_path):
    token = asking.house.home.path / "keys/operator.token"
    monkeypatch.chdir(tmp_path)
    code, _, err = said("status", "--token-file", token)
    assert code == 2
    assert "--control 127.0.0.1:PORT" in err


def test_what_the_coordinator_refuses_is_one_line_and_code_2(asking, said):
    (asking.house.kits / "odd.json").write_text("{}")
    assert said("run", asking.house.kits / "odd.json")[0] == 2
    assert said("stop", "nothing")[:2] == (2, "")
    code, _, err = said("resume", "nothing")
    assert (code, err) == (2, "fedicom: there is no run 'nothing'; runs: none yet\n")


def test_stop_and_resume(asking, said):
    said("run", recipe(asking), "--detach")
    asking.until(lambda: asking.starts("tiny"))
    assert said("stop", "tiny")[:2] == (0, "Run tiny stopped; `fedicom server resume tiny`\n")
    assert asking.control.run_status("tiny")["state"] == "stopped"
    assert said("resume", "tiny")[:2] == (0, "Run tiny goes on; `fedicom server status`\n")
    asking.until(lambda: len(asking.starts("tiny")) == 2)


@pytest.mark.parametrize("words", [("stop", "a\udcff"), ("run", "recipe.json", "--name", "a\udcff")])
def test_a_name_typed_in_another_encoding_is_refused_in_a_line(asking, said, monkeypatch, words):
    monkeypatch.chdir(recipe(asking).parent)
    code, out, err = said(*words, "--home", asking.house.home.path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert ("there is no run 'a%FF'" if words[0] == "stop" else "no name for a run") in err


def test_conclude(asking, said):
    said("run", recipe(asking), "--detach")
    asking.until(lambda: asking.starts("tiny"))
    code, _, err = said("conclude", "tiny")
    assert code == 2
    assert "no round behind it" in err
    assert Run(asking.house.home, "tiny").settle(round=1)
    assert said("conclude", "tiny")[:2] == (0, "Run tiny trains no more and is concluded; `fedicom server status`\n")
    asking.until(lambda: len(asking.starts("tiny")) == 2)


TOLD = {
    "state": "training", "round": 1, "eta_s": 600, "last_round": {"validation": 0.75},
    "sites": {
        "east": {"state": "answered", "round": 1, "seconds": 61.0, "epsilon": 0.5,
                 "last_seen": "2026-01-02T03:04:05+00:00"},
        "north": {"state": "late", "why": "offline since 03:00"},
        "west": {"state": "refused", "why": "site refused (budget): epsilon would pass the cap"},
    },
}  # fmt: skip


def test_status_is_a_table_of_sites_with_who_is_late_and_who_refused_and_why(asking, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said("run", recipe(asking), "--detach")
    asking.until(lambda: asking.starts("tiny"))
    assert Run(asking.house.home, "tiny").settle(**TOLD)
    code, out, _ = said("status")
    assert code == 0
    assert "Coordinator of trial: running, gateway on port 8443, 0 of 3 sites connected (not: east, north, west)" in out
    assert "tiny: training, round 1 of 2 done, validation AUROC 0.750, about 10 min left" in out
    rows = {row.split()[1]: row for row in out.splitlines() if "│" in row and len(row.split()) > 2}
    assert {"answered", "61", "0.50", "03:04:05"} <= set(rows["east"].split())
    assert "late" in rows["north"]
    assert "offline since 03:00" in rows["north"]
    assert "site refused (budget): epsilon would pass the cap" in rows["west"]


def test_who_is_connected_is_not_called_offline_while_the_run_has_not_asked_yet(asking, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    plain = {
        "server": {"state": "running", "federation": "trial", "port": 1, "online": ["east"], "down": {}},
        "runs": [{"run": "tiny", "sites": {
            "east": {"state": "offline", "why": NOT_YET}, "north": {"state": "offline", "why": NOT_YET},
        }}],
    }  # fmt: skip
    monkeypatch.setattr("server.cli._Asking.status", lambda self: plain)
    rows = {row.split()[1]: row for row in said("status")[1].splitlines() if "│" in row}
    assert "online" in rows["east"]
    assert "connected, not asked yet" in rows["east"]
    assert "offline" in rows["north"]


def test_status_json_is_for_programs_and_tells_the_same(asking, said):
    said("run", recipe(asking), "--detach")
    code, out, _ = said("status", "--json")
    plain = json.loads(out)
    assert code == 0
    assert plain["server"]["state"] == "running"
    assert [run["run"] for run in plain["runs"]] == ["tiny"]


@pytest.mark.parametrize(("down", "code"), [("gateway", 1), ("superlink", 1), ("run-tiny", 0)])
def test_the_exit_code_of_status_tells_a_health_check_whether_sites_can_reach_the_coordinator(
    asking, said, monkeypatch, down, code
):
    plain = json.loads(said("status", "--json")[1])
    assert not plain["server"]["down"]
    plain["server"]["down"] = {down: "ended by signal 9"}
    monkeypatch.setattr("server.cli._Asking.status", lambda self: plain)
    assert said("status", "--json")[0] == code
    assert said("status")[0] == code
    plain["server"] |= {"down": {}, "stale": True}
    assert "0 of 3 sites connected when last asked (not: east, north, west)" in " ".join(said("status")[1].split())
    plain["server"] |= {"silent": True}
    assert "which sites are connected is not known" in " ".join(said("status")[1].split())
    assert said("status", "--json")[0] == 1


def test_a_text_that_a_site_sent_cannot_dress_up_the_table(asking, said):
    said("run", recipe(asking), "--detach")
    asking.until(lambda: asking.starts("tiny"))
    assert Run(asking.house.home, "tiny").settle(sites={"east": {"state": "failed", "why": "[red]x[/red]\nnorth  ok"}})
    out = said("status")[1]
    assert "[red]x[/red] north  ok".replace("  ", " ") in " ".join(out.split())


def test_runs_is_a_line_each(asking, said):
    said("run", recipe(asking), "--detach")
    asking.house.signed(timeout_s=9.0).write(recipe(asking))
    said("run", recipe(asking), "--detach", "--name", "second")
    lines = said("runs")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["tiny", "second"]
    assert "0 of 2 rounds" in lines[0]


def test_without_a_coordinator_status_shows_the_files_and_says_so(house, said, monkeypatch):
    monkeypatch.chdir(house.home.path)
    house.order("earlier").settle(state="finished", round=2, rounds=2)
    code, out, _ = said("status")
    assert code == 1
    assert "the coordinator does not run; start it with `fedicom server start`" in out
    assert "earlier: finished" in out
    assert json.loads(said("status", "--json")[1])["server"]["state"] == "not running"
    code, _, err = said("stop", "earlier")
    assert (code, err) == (1, "fedicom: the coordinator does not run; start it with `fedicom server start`\n")


def test_an_auditor_needs_no_folder_but_his_token_and_the_address(asking, said, monkeypatch, tmp_path):
    said("run", recipe(asking), "--detach")
    asking.until(lambda: asking.starts("tiny"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDICOM_TOKEN_FILE", str(asking.house.kits / "auditor-maria" / "auditor.token"))
    where = ("--control", f"127.0.0.1:{asking.api.port}")
    assert said("status", *where)[0] == 0
    code, _, err = said("stop", "tiny", *where)
    assert (code, err) == (1, "fedicom: maria is an auditor: may read, and run or stop nothing\n")
    assert said("audit", "--out", tmp_path / "logs", *where)[0] == 0
    assert verify(tmp_path / "logs" / "server.jsonl", asking.house.signer.public)


@pytest.mark.parametrize("control", ["fl.example.org:80", "127.0.0.1", "127.0.0.1:x"])
def test_a_token_is_sent_to_this_machine_alone(asking, said, control):
    code, _, err = said("status", "--control", control)
    assert code == 2
    assert "expected 127.0.0.1:PORT" in err


def test_an_audit_log_in_several_parts_is_fetched_whole(asking, said, tmp_path):
    AuditLog(asking.house.home.audit_file, asking.house.signer, rotate_bytes=1).append("run stopped")
    assert said("audit", "--out", tmp_path / "logs")[0] == 0
    whole = verify(asking.house.home.audit_file)
    assert verify(tmp_path / "logs" / "server.jsonl") == whole
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_a_token_readable_by_others_is_not_used(asking, said):
    asking.house.home.operator_token.chmod(0o644)
    code, _, err = said("status")
    assert code == 1
    assert "has mode 644, expected 600" in err


def test_a_token_for_an_auditor_works_at_once(asking, said, monkeypatch):
    code, out, _ = said("token", "new", "--role", "auditor", "--name", "anna", "--by", "olga")
    path = Path(out.partition(":")[0])
    assert code == 0
    assert path.read_text().strip() not in out
    assert said("status", "--token-file", path)[0] == 0
    assert (
        said("stop", "x", "--token-file", path)[2] == "fedicom: anna is an auditor: may read, and run or stop nothing\n"
    )
    event = verify(asking.house.home.audit_file)
    assert any(row.facts.get("action") == "token made" and row.facts["who"] == "olga" for row in event)


def test_a_newer_registry_is_taken_and_an_older_one_refused(asking, said):
    from server.provision import revoke

    authority = asking.house.kits / "authority"
    older = asking.house.kits / "older.json"
    older.write_bytes(asking.house.home.registry_file.read_bytes())
    revoke(authority, "west", "left")
    code, out, _ = said("registry", "install", authority / "registry.json")
    assert (code, out) == (0, "registry of version 2, sites that take part: 2\n")
    asking.until(lambda: len(asking.registered) == 2)
    assert said("registry", "install", older)[0] == 2


@pytest.mark.parametrize("verb", ["start", "run", "status", "runs", "stop", "resume", "audit", "registry", "token"])
def test_every_verb_explains_itself_and_is_listed(verb, said):
    code, out, _ = said(verb, "--help")
    assert code == 0
    assert f"usage: fedicom server {verb}" in out
    assert f"fedicom server {verb}" in said("--help")[1]


def test_help_loads_nothing_heavy():
    heavy = ("torch", "flwr", "pydantic", "rich", "numpy")
    code = (
        "import sys, fedicom\n"
        "try: fedicom.main(['server', '--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded', sorted(set({heavy!r}) & set(sys.modules)))"
    )
    root = Path(fedicom.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_a_second_coordinator_in_a_home_is_refused(house, said, monkeypatch):
    from server.control import alone

    with alone(house.home):
        code, _, err = said("start", "--home", house.home.path)
    assert (code, err) == (2, "fedicom: a coordinator runs in coordinator already; `fedicom server status` shows it\n")


def test_a_folder_that_is_no_coordinators_is_refused(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDICOM_HOME", raising=False)
    assert said("status")[0] == 2
    assert "no server.yaml here" in said("start")[2]
    assert "holds no server.yaml" in said("start", "--home", tmp_path)[2]


def test_the_real_thing_starts_answers_and_ends_with_a_signal(house):
    """The gateway is real as well; the SuperLink is whatever this machine gives it time for."""
    (house.home.path / "server.yaml").write_text("federation: trial\nlisten: 127.0.0.1\nport: 1\ndevice: cpu\n")
    root = Path(fedicom.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-m", "fedicom", "server", "start", "--home", str(house.home.path)],
        cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        there = (house.home.control_file, house.home.status_file)  # in this order, and something may come between
        while not all(path.exists() for path in there) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert fedicom.main(["server", "status", "--home", str(house.home.path)]) in (0, 1)
        children = json.loads(house.home.status_file.read_bytes())["children"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    for pid in filter(None, children.values()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [event.kind for event in verify(house.home.audit_file)][-1] == "server stopped"
