"""The coordinator's supervisor and its HTTP interface: who may do what, what is kept alive, what is written down."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from common.audit import verify
from common.config import validate_json
from common.deployment import FederationPlan, ServerHome
from common.enrolment import install_registry
from common.errors import ConfigError, ExchangeError
from common.identity import Signer
from common.signed import sign_recipe
from server.certificates import CertificateAuthority
from server.control import Control, alone, gateway_child, runner_child
from server.gateway import serve
from server.gateway_rules import GatewayConfig
from server.provision import provision, revoke, rotate
from server.runs import Run
from server.tokens import install_token, remove_token
from tests.server.house import RECIPE, Running


def body(house, **federation) -> bytes:
    return house.signed(**federation).text.encode()


def events(house, kind: str) -> list[dict]:
    return [dict(event.facts) for event in verify(house.home.audit_file) if event.kind == kind]


# Who may do what

GETS = ("/v1/status", "/v1/runs", "/v1/runs/trial-1", "/v1/audit")
POSTS = ("/v1/runs?name=trial-2", *(f"/v1/runs/trial-1/{action}" for action in ("stop", "resume", "conclude")))


@pytest.fixture
def with_run(running):
    assert running.ask("POST", "/v1/runs?name=trial-1", body(running.house))[0] == 200
    return running


@pytest.mark.parametrize("token", [None, "", "wrong", "operator ", "é"])
def test_without_a_known_token_nothing_is_told_and_nothing_is_done(with_run, token):
    before = verify(with_run.house.home.audit_file)
    given = {"token": None} if token is None else {"token": None, "Authorization": f"Bearer {token}".encode("latin-1")}
    for method, path in [*(("GET", path) for path in GETS), *(("POST", path) for path in POSTS)]:
        code, answer = with_run.ask(method, path, b"" if method == "POST" else None, **given)
        assert code == 401
        assert "tiny" not in str(answer)
    assert verify(with_run.house.home.audit_file) == before


def test_an_auditor_reads_everything_and_runs_or_stops_nothing(with_run):
    for path in GETS:
        assert with_run.ask("GET", path, token="auditor")[0] == 200
    for path in POSTS:
        code, answer = with_run.ask("POST", path, body(with_run.house), token="auditor")
        assert (code, answer["error"]) == (403, "maria is an auditor: may read, and run or stop nothing")
    assert with_run.control.run_status("trial-1")["at_work"]
    assert [run["run"] for run in with_run.ask("GET", "/v1/runs")[1]] == ["trial-1"]
    refused = events(with_run.house, "operator action refused")
    assert [(event["who"], event["action"]) for event in refused] == [
        ("maria", "run"), ("maria", "stop"), ("maria", "resume"), ("maria", "conclude"),
    ]  # fmt: skip


def test_every_post_is_in_the_log_with_who_did_it(with_run):
    assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 200
    assert with_run.ask("POST", "/v1/runs/trial-1/resume")[0] == 200
    assert with_run.ask("POST", "/v1/runs/none/stop")[0] == 404
    done = events(with_run.house, "operator action")
    assert [(event["who"], event["role"], event["action"], event["run"]) for event in done] == [
        ("operator", "operator", "run", "trial-1"),
        ("operator", "operator", "stop", "trial-1"),
        ("operator", "operator", "resume", "trial-1"),
        ("operator", "operator", "stop", "none"),
    ]
    assert [event["run"] for event in events(with_run.house, "operator action refused")] == ["none"]


def test_a_token_that_was_taken_away_stops_to_work_at_once(running):
    token = install_token(running.house.home, "operator", "otto").read_text().strip()
    assert running.ask("GET", "/v1/status", token=token)[0] == 200
    remove_token(running.house.home, "operator", "otto")
    assert running.ask("GET", "/v1/status", token=token)[0] == 401


@pytest.mark.parametrize("damage", ["readable by others", "no JSON", "other fields", "gone"])
def test_when_the_tokens_cannot_be_trusted_nobody_is_let_in(running, damage):
    path = running.house.home.tokens_file
    match damage:
        case "readable by others":
            path.chmod(0o644)
        case "no JSON":
            path.write_text("{")
        case "other fields":
            path.write_text('{"operator": [{"name": "x"}]}')
        case _:
            path.unlink()
    assert running.ask("GET", "/v1/status")[0] == 401


def test_no_token_is_in_the_log_the_status_or_a_command_line(with_run):
    home = with_run.house.home
    files = [home.audit_file, home.status_file, home.control_file, Run(home, "trial-1").status_file]
    shown = b"".join(path.read_bytes() for path in files) + str(runner_child(home, "trial-1").command).encode()
    for role in ("operator", "auditor"):
        assert with_run.token(role).encode() not in shown


def test_a_page_of_another_host_reaches_nothing_not_even_the_metrics(running):
    for path in ("/metrics", "/v1/status"):
        assert running.ask("GET", path, Host="evil.example:80")[0] == 403


@pytest.mark.parametrize(
    ("headers", "code"),
    [({"Content-Length": str((1 << 20) + 1)}, 413), ({"Content-Length": "x"}, 411), ({"Content-Length": "-1"}, 411)],
)
def test_a_body_too_large_or_without_a_length_is_refused_unread(running, headers, code):
    words = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    token = running.token("operator")
    with socket.create_connection(("127.0.0.1", running.api.port)) as line:
        line.sendall(
            f"POST /v1/runs HTTP/1.0\r\nHost: 127.0.0.1:1\r\nAuthorization: Bearer {token}\r\n{words}\r\n".encode()
        )
        assert line.recv(100).split()[1] == str(code).encode()


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/run", "/v1/runs/a/b/c", "/v1/runs/../tokens.json", "/v1/runs/%2e%2e", "x://["]
)
def test_a_path_that_is_none_is_404(running, path):
    assert running.ask("GET", path)[0] == 404


def test_the_log_is_given_as_it_is_and_verifies(running, tmp_path):
    code, data = running.ask("GET", "/v1/audit", token="auditor")
    assert code == 200
    (tmp_path / "server.jsonl").write_bytes(data)
    assert verify(tmp_path / "server.jsonl", running.house.signer.public)
    assert running.ask("GET", "/v1/audit?part=1")[0] == 404


# What may be run


def test_a_signed_recipe_is_put_to_work(running):
    signed = running.house.signed()
    code, answer = running.ask("POST", "/v1/runs", signed.text.encode())
    assert (code, answer["run"], answer["recipe_id"], answer["by"]) == (200, "tiny", signed.recipe.id, "operator")
    running.until(lambda: running.starts("tiny"))
    assert Run(running.house.home, "tiny").recipe_file.read_text() == signed.text


@pytest.mark.parametrize(
    ("path", "change", "code", "says"),
    [
        ("/v1/runs", lambda house: b"{}", 400, "no signed recipe"),
        ("/v1/runs", lambda house: b"\xff", 400, "no signed recipe"),
        ("/v1/runs", lambda house: body(house).replace(b'"rounds": 2', b'"rounds": 3'), 400, "it was changed"),
        (
            "/v1/runs",
            lambda house: sign_recipe(house.signed().recipe, Signer.temporary()).text.encode(),
            400,
            "this installation trusts coordinator",
        ),
        (
            "/v1/runs",
            lambda house: body(house, sites=9, quorum=4),
            400,
            "the recipe needs 4 sites (federation.quorum), the registry has 3",
        ),
        (
            "/v1/runs",
            lambda house: house.signed(replace(RECIPE, name="chest study 2")).text.encode(),
            400,
            "'chest study 2' is no name for a run; expected letters, digits, `_`, `.` and `-`, at most 63: "
            "give the run one with --name",
        ),
        ("/v1/runs?name=..", body, 400, "is no name for a run"),
        ("/v1/runs?name=a%2Fb", body, 400, "is no name for a run"),
        ("/v1/runs?patience_s=-1", body, 400, "patience_s: expected seconds"),
        ("/v1/runs?patience_s=nan", body, 400, "patience_s: expected seconds"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence_and_leaves_nothing(running, path, change, code, says):
    got, answer = running.ask("POST", path, change(running.house))
    assert got == code
    assert says in answer["error"]
    assert not running.house.home.runs.exists()
    assert says in events(running.house, "operator action refused")[0]["why"]


def test_a_name_is_taken_once_and_a_recipe_is_at_work_once(with_run):
    code, answer = with_run.ask("POST", "/v1/runs?name=trial-1", body(with_run.house, timeout_s=9.0))
    assert code == 409
    assert "there is a run trial-1 already" in answer["error"]
    code, answer = with_run.ask("POST", "/v1/runs?name=trial-2", body(with_run.house))
    assert (code, answer["error"]) == (409, "run trial-1 works on this recipe already; sites would be asked twice")
    assert with_run.ask("POST", "/v1/runs?name=trial-2", body(with_run.house, timeout_s=9.0))[0] == 200


def test_a_stopped_run_is_not_resumed_while_another_works_on_its_recipe(with_run):
    assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 200
    assert with_run.ask("POST", "/v1/runs?name=trial-2", body(with_run.house))[0] == 200
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/resume")
    assert (code, answer["error"]) == (409, "run trial-2 works on this recipe already; sites would be asked twice")
    assert with_run.control.run_status("trial-1")["wanted"] == "stopped"
    assert with_run.ask("POST", "/v1/runs/trial-2/stop")[0] == 200
    assert with_run.ask("POST", "/v1/runs/trial-1/resume")[0] == 200


def test_a_recipe_may_run_again_as_soon_as_its_run_has_finished_also_while_that_process_ends(with_run):
    assert Run(with_run.house.home, "trial-1").settle(state="finished")
    assert with_run.ask("POST", "/v1/runs?name=trial-2", body(with_run.house))[0] == 200


def test_a_full_disk_refuses_the_request_before_anything_is_done(running, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, answer = running.ask("POST", "/v1/runs", body(running.house))
    assert code == 507
    assert "free space" in answer["error"]
    assert not running.house.home.runs.exists()
    assert running.ask("POST", "/v1/runs", body(running.house))[0] == 200


# What is kept alive


def test_a_run_that_was_killed_is_started_again_until_it_says_that_it_is_over(with_run):
    first = with_run.until(lambda: with_run.starts("trial-1"))[0]
    os.kill(first, signal.SIGKILL)
    with_run.until(lambda: len(with_run.starts("trial-1")) == 2)
    with_run.end("trial-1", 1)
    with_run.until(lambda: len(with_run.starts("trial-1")) == 3)
    with_run.end("trial-1", 0, state="finished")
    with_run.until(lambda: not with_run.control.run_status("trial-1")["at_work"])
    assert len(with_run.starts("trial-1")) == 3
    assert with_run.ask("POST", "/v1/runs/trial-1/resume")[0] == 409
    assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 409


def test_a_run_that_failed_is_left_until_somebody_resumes_it(with_run):
    with_run.until(lambda: with_run.starts("trial-1"))
    with_run.end("trial-1", 4, state="failed", error="too few sites")
    with_run.until(lambda: not with_run.control.run_status("trial-1")["at_work"])
    assert with_run.ask("GET", "/v1/runs/trial-1")[1]["error"] == "too few sites"
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/resume")
    assert (code, answer["state"], answer["error"]) == (200, "waiting", None)
    with_run.until(lambda: len(with_run.starts("trial-1")) == 2)


def test_a_run_that_failed_can_be_given_up_and_resumed_all_the_same(with_run):
    with_run.until(lambda: with_run.starts("trial-1"))
    with_run.end("trial-1", 4, state="failed", error="too few sites")
    with_run.until(lambda: not with_run.control.run_status("trial-1")["at_work"])
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/stop")
    assert (code, answer["state"], answer["wanted"], answer["error"]) == (200, "stopped", "stopped", "too few sites")
    assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 409
    assert with_run.ask("POST", "/v1/runs/trial-1/resume")[0] == 200


def test_a_run_that_could_not_even_say_that_it_failed_is_told_as_failed(with_run, monkeypatch):
    with_run.until(lambda: with_run.starts("trial-1"))
    found, write = Run(with_run.house.home, "trial-1"), os.fsync

    def full(handle):
        if "status.json" in os.readlink(f"/proc/self/fd/{handle}"):  # noqa: PTH115
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with_run.end("trial-1", 4)
        with_run.until(lambda: with_run.control.run_status("trial-1")["state"] == "failed")
        assert "is the disk full?" in with_run.ask("GET", "/v1/runs/trial-1")[1]["error"]
        assert found.status["state"] == "waiting"
    with_run.until(lambda: found.status["state"] == "failed")


def test_stop_ends_the_process_and_resume_begins_another(with_run):
    first = with_run.until(lambda: with_run.starts("trial-1"))[0]
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/stop")
    assert (code, answer["state"], answer["at_work"], answer["wanted"]) == (200, "stopped", False, "stopped")
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 409
    assert with_run.ask("POST", "/v1/runs/trial-1/resume")[0] == 200
    with_run.until(lambda: len(with_run.starts("trial-1")) == 2)
    assert with_run.ask("POST", "/v1/runs/trial-1/resume")[0] == 409


@pytest.mark.parametrize("state", ["training", "stopped", "failed"])
def test_a_run_is_concluded_at_work_or_not_once_a_round_is_behind_it(with_run, state):
    first = with_run.until(lambda: with_run.starts("trial-1"))[0]
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/conclude")
    assert (code, answer["error"]) == (
        409,
        "run trial-1 has no round behind it, so there is no model to conclude with; `fedicom server stop trial-1` ends "
        "it",
    )
    os.kill(first, 0)
    assert Run(with_run.house.home, "trial-1").settle(state="training", round=1)
    if state == "stopped":
        assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 200
    elif state == "failed":
        with_run.end("trial-1", 4, state="failed", error="too few sites")
        with_run.until(lambda: not with_run.control.run_status("trial-1")["at_work"])
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/conclude")
    assert (code, answer["state"], answer["error"], answer["at_work"]) == (200, "waiting", None, True)
    assert answer["wanted"] == "concluded"
    assert events(with_run.house, "operator action")[-1]["action"] == "conclude"
    with_run.until(lambda: len(with_run.starts("trial-1")) == 2)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    # killed, it is started again for the same; when it is over, for nothing
    os.kill(with_run.starts("trial-1")[1], signal.SIGKILL)
    with_run.until(lambda: len(with_run.starts("trial-1")) == 3)
    with_run.end("trial-1", 0, state="finished")
    with_run.until(lambda: not with_run.control.run_status("trial-1")["at_work"])
    code, answer = with_run.ask("POST", "/v1/runs/trial-1/conclude")
    assert (code, answer["error"]) == (409, "run trial-1 is finished; its model is in runs/trial-1")


def test_a_run_is_not_concluded_while_another_works_on_its_recipe(with_run):
    assert Run(with_run.house.home, "trial-1").settle(round=1)
    assert with_run.ask("POST", "/v1/runs/trial-1/stop")[0] == 200
    assert with_run.ask("POST", "/v1/runs?name=trial-2", body(with_run.house))[0] == 200
    assert with_run.ask("POST", "/v1/runs/trial-1/conclude")[0] == 409
    assert with_run.control.run_status("trial-1")["wanted"] == "stopped"


class Beginning(Running):
    """A coordinator that has not stopped yet what an earlier one left at the SuperLink."""

    up = False

    def _parts(self):
        def stop_runs(home, port):
            if not self.up:
                raise ExchangeError("the SuperLink does not answer yet")
            return 0

        return replace(super()._parts(), stop_runs=stop_runs)


def test_no_run_begins_before_the_superlink_is_there_and_what_was_left_at_it_is_stopped(house):
    with Beginning(house) as running:
        assert running.ask("POST", "/v1/runs?name=trial-1", body(house))[0] == 200
        assert not threading.Event().wait(1.0)  # three looks
        assert running.starts("trial-1") == []
        running.up = True
        running.until(lambda: running.starts("trial-1"))


_SLOW_TO_END = """
trap 'touch "$1/asked"; until [ -f "$1/go" ]; do sleep 0.05; done; cp "$1/last.json" "$1/status.json"; exit 3' TERM
echo $$ >> "$1/starts"
while :; do sleep 0.05 & wait $!; done
"""


@contextmanager
def concluding(running, last: str):
    """A run at work that was told to end, and ends when the block does, in this state."""
    assert running.ask("POST", "/v1/runs?name=trial-1", body(running.house))[0] == 200
    run = Run(running.house.home, "trial-1")
    running.until(lambda: running.starts("trial-1"))
    assert run.settle(state="training", round=1)
    (run.path / "last.json").write_text(json.dumps({**run.status, "state": last}))
    answers = []
    asked = threading.Thread(target=lambda: answers.append(running.ask("POST", "/v1/runs/trial-1/conclude")))
    asked.start()
    running.until((run.path / "asked").exists)
    yield answers
    (run.path / "go").touch()
    asked.join()


def test_while_a_run_is_ended_to_be_concluded_it_is_at_work_and_no_other_begins_on_its_recipe(house):
    with Running(house, _SLOW_TO_END) as running:
        with concluding(running, "stopped") as answers:
            assert running.control.run_status("trial-1")["at_work"]
            assert running.ask("POST", "/v1/runs?name=trial-2", body(house))[0] == 409
            assert running.ask("POST", "/v1/runs/trial-1/resume")[0] == 409
            assert len(running.starts("trial-1")) == 1
        assert (answers[0][0], answers[0][1]["state"]) == (200, "waiting")
        running.until(lambda: len(running.starts("trial-1")) == 2)


def test_a_run_that_had_its_model_before_it_could_be_ended_is_finished_and_stays_so(house):
    with Running(house, _SLOW_TO_END) as running:
        with concluding(running, "finished") as answers:
            pass
        assert (answers[0][0], answers[0][1]["state"], answers[0][1]["at_work"]) == (200, "finished", False)
        assert len(running.starts("trial-1")) == 1


def test_a_stop_while_a_run_is_ended_to_be_concluded_is_the_last_word(house):
    with Running(house, _SLOW_TO_END) as running:
        with concluding(running, "stopped"):
            assert running.ask("POST", "/v1/runs/trial-1/stop")[0] == 200
        status = running.control.run_status("trial-1")
        assert (status["state"], status["wanted"], status["at_work"]) == ("stopped", "stopped", False)


def test_a_run_whose_folder_was_removed_is_ended_and_keeps_no_other_from_running(with_run):
    with_run.until(lambda: with_run.starts("trial-1"))
    shutil.rmtree(Run(with_run.house.home, "trial-1").path)
    with_run.until(lambda: not with_run.control.status["active"])
    with_run.until(lambda: "run-trial-1" not in with_run.control.status["children"])
    assert with_run.ask("POST", "/v1/runs?name=trial-2", body(with_run.house))[0] == 200


def test_a_coordinator_that_starts_again_goes_on_with_what_was_not_over(house):
    names = {"going": None, "halted": "stop", "over": None, "broken": None}
    with Running(house) as first:
        for number, name in enumerate(names):
            data = body(house, timeout_s=2.0 + number)
            assert first.ask("POST", f"/v1/runs?name={name}", data)[0] == 200
            first.until(lambda name=name: first.starts(name))
        assert first.ask("POST", "/v1/runs/halted/stop")[0] == 200
        first.end("over", 0, state="finished")
        first.end("broken", 4, state="failed")
        first.until(lambda: first.control.status["active"] == ["going"])
    assert Run(house.home, "going").status["state"] == "stopped"
    with Running(house) as second:
        second.until(lambda: len(second.starts("going")) == 2)
        assert second.control.status["active"] == ["going"]
        assert {name: len(second.starts(name)) for name in names} == {"going": 2, "halted": 1, "over": 1, "broken": 1}
    assert first.cleared == second.cleared == 1  # what the SuperLink still knew of the time before


def test_everything_ends_with_the_coordinator_even_what_will_not(house, monkeypatch):
    monkeypatch.setattr("server.control._GRACE_S", {"run": 0.5, "gateway": 0.5, "superlink": 0.5})
    stubborn = """trap '' TERM; echo $$ >> "$1/starts"; while :; do sleep 0.05; done"""
    with Running(house, script=stubborn) as running:
        assert running.ask("POST", "/v1/runs?name=deaf", body(house))[0] == 200
        running.until(lambda: running.starts("deaf"))
        pids = [*running.starts("deaf"), *(pid for pid in running.control.status["children"].values() if pid)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not house.home.control_file.exists()
    assert json.loads(house.home.status_file.read_bytes())["state"] == "stopped"
    assert Run(house.home, "deaf").status["state"] == "stopped"


def test_a_signal_in_the_middle_of_the_coordinators_wait_ends_it_too(house):
    control = Control(house.home, Running(house)._parts())

    def signalled_there():
        with control._stop._cond:  # as `wait` holds it for a moment, now and then
            control.stop()

    handler = threading.Thread(target=signalled_there, daemon=True)
    handler.start()
    handler.join(10)
    assert not handler.is_alive()
    assert control._stop.wait(10)


def test_start_and_stop_are_in_the_log_with_configuration_and_code(house):
    with Running(house):
        pass
    told = verify(house.home.audit_file)
    assert [event.kind for event in told] == [
        "log started",
        "server started",
        "code",
        "registry in force",
        "server stopped",
    ]
    import hashlib

    wanted = hashlib.sha256((house.home.path / "server.yaml").read_bytes()).hexdigest()
    assert (told[1].facts["configuration"], told[1].facts["registry"]) == (wanted, 1)
    assert {"common", "server", "flwr"} <= set(told[2].facts["packages"])


def test_one_coordinator_a_home(house):
    with (
        alone(house.home),
        pytest.raises(ConfigError, match="a coordinator runs in coordinator already"),
        alone(house.home),
    ):
        pass


def test_a_signing_key_that_the_registry_does_not_name_starts_nothing(house):
    house.home.signing_key.write_bytes(os.urandom(32))
    with pytest.raises(ConfigError, match="the registry names coordinator key"):
        Control(house.home, None)


# Who belongs to it


def test_a_revoked_node_is_shut_out_while_the_coordinator_runs_and_that_is_written_down(running):
    house, authority = running.house, running.house.kits / "authority"
    revoke(authority, "north", "left the study")
    install_registry(house.home, authority / "registry.json")
    running.until(lambda: len(running.registered) == 2)
    assert list(running.registered[-1].members) == ["east", "west"]
    running.until(lambda: events(house, "node revoked"))
    assert events(house, "node revoked") == [{"site": "north", "why": "left the study", "registry": 2}]
    running.until(lambda: running.control.status["registry"]["sites"] == ["east", "west"])


def test_a_rotated_key_is_written_down_once_also_when_the_coordinator_was_not_running(house):
    with Running(house):
        pass
    authority = house.kits / "authority"
    rotate(authority, "north", out=house.kits / "renewed")
    install_registry(house.home, authority / "registry.json")
    for _ in range(2):
        with Running(house):
            pass
    told = events(house, "key rotated")
    assert [(event["site"], event["which"]) for event in told] == [("north", ["signing", "node"])]
    assert told[0]["public_key"] == house.home.registry.sites["north"].signing


def test_an_older_registry_brings_nobody_back(running):
    house, authority = running.house, running.house.kits / "authority"
    older = house.home.registry_file.read_bytes()
    revoke(authority, "north", "left")
    install_registry(house.home, authority / "registry.json")
    running.until(lambda: len(running.registered) == 2)
    house.home.registry_file.write_bytes(older)  # past the command that would have refused it
    running.until(lambda: "version 2 was in force before" in running.control.status["trouble"])
    assert len(running.registered) == 2


def test_a_registry_of_somebody_else_changes_nothing(running, tmp_path):
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=("east",)), tmp_path / "other")
    foreign = (tmp_path / "other" / "coordinator" / "trust" / "registry.json").read_bytes()
    running.house.home.registry_file.write_bytes(foreign)
    running.until(lambda: "is not signed by authority" in running.control.status["trouble"])
    assert len(running.registered) == 1
    code, answer = running.ask("POST", "/v1/runs", body(running.house))
    assert code == 400
    assert "is not signed by authority" in answer["error"]


# What is told


def test_the_metrics_tell_of_runs_sites_bytes_and_disk(with_run):
    home = with_run.house.home
    with_run.until(lambda: with_run.starts("trial-1"))
    Run(home, "trial-1").settle(
        state="training", round=1, admitted=5, refused=1, eta_s=12.5,
        last_round={"seconds": 7.5, "validation": 0.75},
        sites={"north": {"epsilon": 1.25, "seconds": 3.0}, "west": {"epsilon": None, "seconds": None}},
    )  # fmt: skip
    stats = {"bytes_in": {"north": 10}, "bytes_out": {"north": 20}, "refused": {"no key": 3}, "open_connections": 2}
    home.gateway_stats.write_text(json.dumps({**stats, "requests": {"north": {"200": 4}}}))
    code, text = with_run.ask("GET", "/metrics", token=None)
    lines = text.decode().splitlines()
    assert code == 200
    assert {
        'fedicom_run_state{run="trial-1",state="training"} 1.0',
        'fedicom_run_rounds{run="trial-1"} 1.0',
        'fedicom_run_rounds_planned{run="trial-1"} 2.0',
        'fedicom_round_seconds{run="trial-1"} 7.5',
        'fedicom_updates_admitted_total{run="trial-1"} 5.0',
        'fedicom_updates_refused_total{run="trial-1"} 1.0',
        'fedicom_site_epsilon{run="trial-1",site="north"} 1.25',
        'fedicom_gateway_received_bytes_total{site="north"} 10.0',
        'fedicom_gateway_sent_bytes_total{site="north"} 20.0',
        'fedicom_gateway_refused_total{why="no key"} 3.0',
        'fedicom_gateway_requests_total{site="north",status="200"} 4.0',
        'fedicom_child_up{child="superlink"} 1.0',
        "fedicom_sites_registered 3.0",
    } <= set(lines)
    assert not [line for line in lines if line.startswith("fedicom_site_epsilon") and "west" in line]
    free = next(float(line.split()[1]) for line in lines if line.startswith("fedicom_disk_free_bytes"))
    assert free > 0


def test_the_status_tells_who_is_connected(house):
    with Running(house, online=["west"]) as running:
        status = running.until(lambda: found if (found := running.control.status)["online"] else None)
        assert status["online"] == ["west"]
        assert status["registry"] == {"version": 1, "sites": ["east", "north", "west"]}
        running.until(lambda: json.loads(house.home.status_file.read_bytes())["online"] == ["west"])


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EADDRINUSE, "stop what is there"),
        (errno.EACCES, "below 1024 needs CAP_NET_BIND_SERVICE"),
        (errno.EADDRNOTAVAIL, "`listen` in server.yaml"),
    ],
)
def test_a_gateway_that_cannot_listen_says_what_helps(house, monkeypatch, code, advice):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    house.home.run.mkdir()
    gateway_child(house.home, 12345)
    config = validate_json(GatewayConfig, house.home.gateway_config.read_bytes())
    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(ConfigError, match=f"{os.strerror(code)}; .*{advice}"):
        serve(config)


def test_the_gateway_is_configured_from_server_yaml(house):
    (house.home.path / "server.yaml").write_text(
        "federation: trial\nlisten: 127.0.0.1\nport: 9443\ngateway: {connections: 7}\n"
    )
    home = ServerHome(house.home.path)
    home.run.mkdir()
    child = gateway_child(home, 12345)
    config = validate_json(GatewayConfig, home.gateway_config.read_bytes())
    assert child.command == [sys.executable, "-m", "server.gateway", "--config", str(home.gateway_config)]
    assert (config.listen_host, config.listen_port, config.upstream_port) == ("127.0.0.1", 9443, 12345)
    assert (config.limits.connections, config.registry, config.authority) == (7, home.registry_file, home.authority)
    for text, says in (("{nonsense: 1}", "server.yaml: gateway.nonsense"), ("{connections: 0}", "gateway.connections")):
        (home.path / "server.yaml").write_text(f"federation: trial\ngateway: {text}\n")
        with pytest.raises(ConfigError, match=says):
            gateway_child(ServerHome(home.path), 12345)


def test_a_process_that_was_never_started_is_down_and_the_status_says_why(running, monkeypatch):
    monkeypatch.setattr("server.control.Supervisor.children", {"superlink": 7, "run-new": None})
    assert running.control.status["down"] == {"run-new": "not started yet"}


def test_a_certificate_that_ran_out_is_a_way_in_that_is_down_until_a_newer_one_is_there(running, monkeypatch):
    monkeypatch.setattr("server.control._WARNINGS_S", 0.1)
    home, authority = running.house.home, running.house.kits / "authority"
    whole = home.gateway_certificate.read_bytes()
    ca = CertificateAuthority.load((authority / "ca.key").read_bytes(), (authority / "ca.crt").read_bytes())
    home.gateway_certificate.write_bytes(ca.server("Fedicom gateway", "trial", ("localhost",), 1 / 86_400)[0])
    running.until(lambda: running.control.status["down"])
    assert list(running.control.status["down"]) == ["gateway"]
    assert "gateway.crt ran out on" in running.control.status["down"]["gateway"]
    home.gateway_certificate.write_bytes(whole)
    running.until(lambda: not running.control.status["down"])


def test_a_new_certificate_is_taken_up_by_the_superlink_once_its_key_is_there_too(running, monkeypatch):
    monkeypatch.setattr("server.control._WARNINGS_S", 0.1)
    home, authority = running.house.home, running.house.kits / "authority"
    running.until(lambda: all(running.control.status["children"].values()))
    before = running.control.status["children"]
    ca = CertificateAuthority.load((authority / "ca.key").read_bytes(), (authority / "ca.crt").read_bytes())
    certificate, key = ca.server("Fedicom superlink", "trial", ("localhost", "127.0.0.1"), 397)
    home.superlink_certificate.write_bytes(certificate)
    time.sleep(1.0)
    assert running.control.status["children"] == before
    home.superlink_key.write_bytes(key)
    running.until(lambda: running.control.status["children"].get("superlink") not in (None, before["superlink"]))
    assert running.control.status["children"]["gateway"] == before["gateway"]  # which reads its own again by itself
    home.ca.write_bytes(ca.renewed().certificate_pem)
    running.until(lambda: running.control.status["children"].get("gateway") not in (None, before["gateway"]))


def test_a_superlink_that_starts_anew_with_its_new_certificate_is_told_as_that_until_it_answers(running, monkeypatch):
    monkeypatch.setattr("server.control._WARNINGS_S", 0.1)
    monkeypatch.setattr("server.control._LOOK_S", 0.1)
    online, renewed = running.control._parts.online, threading.Event()

    def away(home, port):
        if renewed.is_set():
            raise ExchangeError("the SuperLink did not answer within 1 s")
        return online(home, port)

    running.control._parts = replace(running.control._parts, online=away)
    certificate, key = running.house.home.superlink_certificate, running.house.home.superlink_key
    running.until(lambda: running.control._seen.looked_at > 0)
    before = running.control.status["children"]["superlink"]
    renewed.set()
    assert "did not answer within 1 s" in running.until(lambda: running.control.status["trouble"])  # nobody knows why
    certificate.touch()
    key.touch()
    running.until(lambda: running.control.status["children"].get("superlink") not in (None, before))
    said = "the SuperLink starts anew with its new certificate, and does not answer yet; see run/logs/superlink.log"
    running.until(lambda: running.control.status["trouble"] == said)
    renewed.clear()
    running.until(lambda: not running.control.status["trouble"])
    renewed.set()
    assert "did not answer within 1 s" in running.until(lambda: running.control.status["trouble"])


def test_members_that_are_refused_for_their_clock_are_a_warning_for_as_long_as_they_are(running, monkeypatch):
    monkeypatch.setattr("server.control._WARNINGS_S", 0.1)
    stats = running.house.home.gateway_stats
    for count in range(1, 1000):
        stats.write_text(json.dumps({"refused": {"clock": count, "signature": 7}}))
        if found := running.control.status["warnings"]:
            break
        time.sleep(0.02)
    (warning,) = found
    assert "signed more than 5 minutes before or after 20" in warning
    assert "set this machine's clock; else a site's is wrong" in warning
    running.until(lambda: not running.control.status["warnings"])


def test_who_was_connected_two_minutes_before_the_superlink_fell_silent_counts_as_away(running, monkeypatch):
    running.online.append("east")
    running.until(lambda: running.control.status["online"] == ["east"])
    assert running.control.status["silent"] is False

    def silent(home, port):
        raise ExchangeError("the SuperLink did not answer")

    assert running.control.status["stale"] is False
    monkeypatch.setattr(running.control, "_parts", replace(running.control._parts, online=silent))
    running.control._seen.looked_at -= 16.0
    assert [running.control.status[name] for name in ("online", "stale", "silent")] == [["east"], True, False]
    running.control._seen.looked_at -= 105.0
    running.until(lambda: running.control.status["trouble"])
    assert (running.control.status["online"], running.control.status["silent"]) == ([], True)
