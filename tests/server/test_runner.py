"""One run as a process: killed, stopped, out of sites, out of disk; and what its status says meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.audit import verify
from common.config import Recipe
from common.deployment import ServerHome
from common.errors import ConfigError, QuorumError
from common.exchange import Failure
from common.identity import Signer
from common.lineage import lineage, runs
from common.logs import read_logs
from common.signed import sign_recipe
from common.storage import to_disk, to_system
from common.vault import new_key_file
from common.weights import Weights
from server import checkpoint, runner
from server.rounds import RoundReport, SiteRound, start
from server.runner import AGAIN, FAILED, FINISHED, STOPPED, Stopped, run
from server.runs import BusyError, Run, RunStatus
from tests.server.house import RECIPE

STATES = {"waiting", "training", "evaluating", "concluding", "finished", "failed", "stopped"}


class KilledError(BaseException):
    """Stands for kill -9: nobody catches it."""


def digest(found: Run) -> str:
    state = checkpoint.load(found.path / "checkpoints", found.order.recipe_id)
    assert state is not None
    assert state.done
    return state.weights.digest


@pytest.fixture
def quiet(quiet_house, no_export) -> str:
    """Digest of a run that nothing disturbed."""
    return digest(Run(quiet_house.home, "quiet"))


def test_a_run_from_the_order_to_the_model(house):
    found = house.order("whole")
    assert run(house.home, "whole", connect=house.connect()) == FINISHED
    status = found.status
    assert (status["state"], status["round"], status["rounds"], status["error"]) == ("finished", 2, 2, None)
    assert status["summary"] == json.loads((found.path / "summary.json").read_text())
    assert status["summary"]["weight_digest"] == digest(found)
    assert {site["state"] for site in status["sites"].values()} == {"answered"}
    assert all(site["epsilon"] > 0 and site["last_seen"] and site["seconds"] >= 0 for site in status["sites"].values())
    assert (status["admitted"], status["refused"]) == (9, 0)  # 3 sites in 2 rounds and the closing evaluation
    assert {"model.onnx", "report.html", "model_card.md"} <= {path.name for path in found.path.iterdir()}
    events = [event for event in verify(house.home.audit_file) if event.facts.get("run") == "whole"]
    assert [event.kind for event in events] == [
        "run started", "sites present", *["round aggregated"] * 2, "evaluation received", "model exported",
        "run concluded",
    ]  # fmt: skip


def test_killed_wherever_the_disk_is_touched_it_ends_with_the_same_bits_and_no_second_epsilon(
    house, quiet, monkeypatch
):
    found = house.order("killed")
    rng, fsync = random.Random(0), os.fsync
    kills, left = 0, rng.randrange(1, 20)

    def deadly(handle):
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError
        fsync(handle)

    monkeypatch.setattr(os, "fsync", deadly)
    while True:
        try:
            code = run(house.home, "killed", connect=house.connect())
            break
        except KilledError:
            kills += 1
            left = rng.randrange(1, 50)
    assert code == FINISHED
    assert kills >= 5
    assert digest(found) == quiet
    assert set(house.reservations().values()) == {2}
    verify(house.home.audit_file)


class Changed:
    """A transport with a rule ahead of every visit."""

    def __init__(self, transport, rule):
        self._transport, self._rule = transport, rule

    def hello(self, recipe, audit_head, before=(), *, quorum=None):
        return self._transport.hello(recipe, audit_head, before, quorum=quorum)

    def joined(self, recipe, audit_head):
        return self._transport.joined(recipe, audit_head)

    def ask(self, plan, sites, timeout_s):
        return self._rule(plan, lambda: self._transport.ask(plan, sites, timeout_s))


def ruled(rule):
    return lambda transport: Changed(transport, rule)


def test_stopped_in_a_round_it_says_so_and_goes_on_to_the_same_bits(house, quiet):
    def stop(plan, ask):
        if plan.round == 2:
            raise Stopped
        return ask()

    found = house.order("stopped")
    assert run(house.home, "stopped", connect=house.connect(change=ruled(stop))) == STOPPED
    assert (found.status["state"], found.status["round"]) == ("stopped", 1)
    assert verify(house.home.audit_file)[-1].kind == "run stopped"
    assert run(house.home, "stopped", connect=house.connect()) == FINISHED
    assert digest(found) == quiet


def test_a_finished_run_is_not_touched_again(quiet_house):
    @contextmanager
    def nobody(home, run, watch):
        raise AssertionError
        yield

    before = verify(quiet_house.home.audit_file)
    assert run(quiet_house.home, "quiet", connect=nobody) == FINISHED
    assert verify(quiet_house.home.audit_file) == before


def test_too_few_sites_are_asked_again_after_growing_pauses_and_the_run_goes_on(house, quiet):
    seen: list[tuple[float, str, str]] = []
    found = house.order("patient")
    missing = iter([True, True, False])

    def away(plan, ask):
        if plan.round == 2 and next(missing, False):
            raise QuorumError("round 2: 1 of 3 replies accepted, quorum is 2")
        return ask()

    def sleep(pause_s):
        seen.append((pause_s, found.status["state"], found.status["error"]))

    code = run(house.home, "patient", connect=house.connect(change=ruled(away)), sleep=sleep)
    assert code == FINISHED
    assert [(pause_s, state) for pause_s, state, _ in seen] == [(5.0, "waiting"), (10.0, "waiting")]
    assert seen[0][2] == "round 2: 1 of 3 replies accepted, quorum is 2. Asked again in 5 s"
    assert found.status["error"] is None
    assert digest(found) == quiet


def test_patience_begins_anew_with_every_round_that_is_done(house, no_export):
    """Two pauses, 5 s and 10 s, fit into 29 s of patience, with 14 s of work; a third, of 20 s, would not."""
    pauses: list[float] = []
    turn = {1: 2, 2: 2}

    def away(plan, ask):
        if turn.get(plan.round, 0):
            turn[plan.round] -= 1
            raise QuorumError("too few")
        return ask()

    house.order("patient", patience_s=29)
    assert run(house.home, "patient", connect=house.connect(change=ruled(away)), sleep=pauses.append) == FINISHED
    assert pauses == [5.0, 10.0, 5.0, 10.0]


def test_when_patience_is_over_the_run_has_failed_and_says_what_to_do(house, quiet):
    def silent(plan, ask):
        return [Failure(site=site, round=plan.round, why="offline") for site in ("east", "north", "west")]

    found = house.order("lonely", patience_s=60)
    pauses: list[float] = []
    assert run(house.home, "lonely", connect=house.connect(change=ruled(silent)), sleep=pauses.append) == FAILED
    assert pauses == [5.0, 10.0, 20.0]  # the next would have ended after 75 s
    assert found.status["state"] == "failed"
    assert found.status["error"].endswith("or `fedicom server conclude` with the model as it is")
    assert verify(house.home.audit_file)[-1].kind == "run failed"
    assert run(house.home, "lonely", connect=house.connect()) == FINISHED
    assert digest(found) == quiet


@pytest.mark.parametrize("present", [("north",), ()])
def test_a_run_whose_sites_have_left_is_concluded_with_the_model_of_its_last_round(house, present):
    def leave(plan, ask):
        if plan.round == 2:
            raise QuorumError("round 2: 1 of 3 replies accepted, quorum is 2")
        return ask()

    class Left(Changed):
        def hello(self, recipe, audit_head, before=(), *, quorum=None):
            found = super().hello(recipe, audit_head, before, quorum=quorum)
            return {site: said for site, said in found.items() if site in present}

    found = house.order("left", patience_s=0)
    assert run(house.home, "left", connect=house.connect(change=ruled(leave))) == FAILED
    trained = checkpoint.load(found.path / "checkpoints", found.order.recipe_id)
    house.order("left", wanted="concluded")
    rule = lambda transport: Left(transport, lambda plan, ask: ask())  # noqa: E731
    assert run(house.home, "left", connect=house.connect(change=rule)) == FINISHED
    assert digest(found) == trained.weights.digest
    status = found.status
    assert (status["state"], status["round"], status["rounds"]) == ("finished", 1, 2)
    silent = [site for site in ("east", "north", "west") if site not in present]
    assert status["summary"]["notes"][-2:] == [
        "The training was ended by hand after round 1 of 2.",
        f"The run was concluded without the measures of {', '.join(silent)} on the final model.",
    ]
    assert (status["summary"]["rounds"], status["summary"]["weight_digest"]) == (1, trained.weights.digest)
    assert {name for name, site in status["summary"]["sites"].items() if site["auroc"]} <= set(present)
    assert all(site["epsilon"] > 0 for site in status["summary"]["sites"].values())
    for text in ((found.path / "report.html").read_text(), (found.path / "model_card.md").read_text()):
        assert "The training was ended by hand after round 1 of 2." in text
    logs = read_logs([house.home.audit_file])
    (traced,) = runs(logs[0])
    assert [link.round for link in lineage(traced, traced.exports[-1], logs).rounds] == [1]


def test_the_closing_evaluation_of_a_run_that_ended_early_is_no_round_in_its_status(tmp_path):
    recipe = Recipe(name="tiny", rounds=10)
    found = Run(ServerHome(tmp_path), "early")
    found.path.mkdir(parents=True)
    status = RunStatus(found, recipe, ("north",))
    seen = SiteRound(steps=0, weight=1.0, update_norm=0.0, train_loss=None, validation=None, test=None, spent=None,
                     update_digest="0" * 64)  # fmt: skip
    begun = start(recipe, Weights({"w": np.zeros(1, np.float32)}))
    for number, work, behind in ((7, "train", 7), (8, "evaluate", 7)):
        report = RoundReport(
            round=number,
            work=work,
            accepted={"north": seen},
            refused={},
            validation=0.9,
            before="",
            after="",
            seconds=1.0,
        )
        status.round_done(replace(begun, round=behind, history=(report,)), report)
        assert (found.status["round"], found.status["sites"]["north"]["round"]) == (7, 7)


@contextmanager
def full_disk(monkeypatch, holds: str):
    """No file whose name holds this word can be brought to the disk."""
    fsync = os.fsync

    def full(handle):
        if holds in Path(f"/proc/self/fd/{handle}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@pytest.mark.parametrize("holds", ["round-0002", "server.jsonl"])
def test_a_full_disk_ends_the_run_with_a_clear_error_and_it_goes_on_when_there_is_space(
    house, quiet, monkeypatch, holds
):
    found = house.order("full")
    with full_disk(monkeypatch, holds):
        assert run(house.home, "full", connect=house.connect()) == FAILED
    assert found.status["state"] == "failed"
    assert "No space left on device; free space on that disk" in found.status["error"]
    assert run(house.home, "full", connect=house.connect()) == FINISHED
    assert digest(found) == quiet
    assert set(house.reservations().values()) == {2}


def test_a_disk_without_room_for_anything_still_ends_the_run_and_leaves_a_readable_status(house, quiet, monkeypatch):
    found = house.order("full")
    with monkeypatch.context() as patch:

        def full(plan, ask):
            if plan.round == 2:
                patch.setattr(os, "fsync", no_space)
            return ask()

        assert run(house.home, "full", connect=house.connect(change=ruled(full))) == FAILED
    assert found.status["state"] in STATES - {"finished"}
    assert run(house.home, "full", connect=house.connect()) == FINISHED
    assert digest(found) == quiet


def no_space(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_defect_is_told_by_its_kind_alone_and_the_run_is_to_be_started_again(house, quiet):
    def broken(plan, ask):
        raise ValueError("SECRET")

    found = house.order("broken")
    assert run(house.home, "broken", connect=house.connect(change=ruled(broken))) == AGAIN
    assert found.status["error"] == "ValueError in the coordinator's process; started again"
    assert run(house.home, "broken", connect=house.connect()) == FINISHED
    assert digest(found) == quiet


def test_a_status_that_is_read_all_the_time_is_always_whole(house, no_export):
    found = house.order("watched")
    read: list[dict] = []
    over = threading.Event()

    def reader():
        while not over.is_set():
            if found.status_file.exists():
                read.append(json.loads(found.status_file.read_bytes()))
            time.sleep(0.001)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        assert run(house.home, "watched", connect=house.connect()) == FINISHED
    finally:
        over.set()
        thread.join()
    read.append(json.loads(found.status_file.read_bytes()))
    assert all(set(status) == set(read[-1]) for status in read)
    order = [status["state"] for status in read]
    assert {"training", "finished"} <= set(order) <= STATES
    assert [status["round"] for status in read] == sorted(status["round"] for status in read)


def test_the_estimate_is_the_rounds_left_times_their_mean_duration(house, no_export):
    found = house.order("timed")
    told: list[dict] = []

    def note(plan, ask):
        told.append(found.status)
        return ask()

    assert run(house.home, "timed", connect=house.connect(change=ruled(note))) == FINISHED
    assert told[0]["eta_s"] is None
    state = checkpoint.load(found.path / "checkpoints", found.order.recipe_id)
    first, second = (report.seconds for report in state.history[:2])
    assert told[1]["eta_s"] == pytest.approx(2 * first, abs=0.051)  # another round, and the closing evaluation
    assert told[2]["eta_s"] == pytest.approx((first + second) / 2, abs=0.051)
    assert told[2]["last_round"]["seconds"] == second


def test_a_run_whose_recipe_this_version_does_not_read_fails_with_that_reason(house):
    found = house.order("older")
    found.settle(state="training", round=1)
    plain = json.loads(found.recipe_file.read_text())
    del plain["recipe"]["description"]  # a field that the version which signed it did not have
    del plain["recipe"]["rounds"]  # and one whose usual value is another now
    found.recipe_file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="another version of Fedicom"):
        run(house.home, "older", connect=house.connect())
    assert found.status["state"] == "failed"
    assert "made by another version of Fedicom" in found.status["error"]
    assert found.status["round"] == 1


def test_a_recipe_of_another_key_or_another_id_than_was_ordered_is_not_run(house):
    house.order("foreign", sign_recipe(house.signed().recipe, Signer.temporary()))
    with pytest.raises(ConfigError, match="which is not ours"):
        run(house.home, "foreign", connect=house.connect())
    house.order("other", recipe_id="f" * 64)
    with pytest.raises(ConfigError, match="another recipe than the one that was ordered"):
        run(house.home, "other", connect=house.connect())
    with pytest.raises(ConfigError, match="there is no run"):
        run(house.home, "none", connect=house.connect())
    found = house.order("renamed")
    found.path.rename(found.path.with_name("by-hand"))
    with pytest.raises(ConfigError, match="the folder of run by-hand holds run renamed"):
        run(house.home, "by-hand", connect=house.connect())


def test_another_state_of_a_run_outlives_a_power_cut_and_the_rest_is_not_waited_for(house, monkeypatch):
    flushed = []
    status = RunStatus(house.order("kept"), house.signed().recipe, ["north"])
    monkeypatch.setattr("server.runs.write_whole", lambda path, data, flush: flushed.append(flush))
    status.change(state="training")
    status.change(state="training", eta_s=60.0)
    status.watch("north", "asked", "round 1")
    status.change(state="finished")
    assert flushed == [to_disk, to_system, to_system, to_disk]


def test_two_processes_never_work_on_one_run(house):
    found = house.order("once")
    with found.alone(), pytest.raises(BusyError, match="another process works on run once"):
        run(house.home, "once", connect=house.connect())
    with found.alone():
        assert found.settle(state="stopped") is False
    assert found.settle(state="stopped") is True


def test_checkpoints_are_sealed_with_the_key_that_server_yaml_names(house, no_export):
    new_key_file(house.home.keys / "checkpoint.key")
    with (house.home.path / "server.yaml").open("a") as file:
        file.write("checkpoint_key: keys/checkpoint.key\n")
    found = house.order("sealed")
    assert run(house.home, "sealed", connect=house.connect()) == FINISHED
    names = [path.name for path in (found.path / "checkpoints").glob("round-*")]
    assert names
    assert all(name.endswith(".sealed") for name in names)


def test_a_missing_test_set_is_told_before_the_first_round(house):
    with (house.home.path / "server.yaml").open("a") as file:
        file.write("test_data: nowhere\n")
    found = house.order("blind")
    assert run(house.home, "blind", connect=house.connect()) == FAILED
    assert found.status["error"].startswith("server.yaml: test_data: ")
    assert found.status["round"] == 0


@pytest.mark.parametrize(
    ("folders", "code", "says"),
    [
        ("{other: nowhere}", FAILED, "names no folder for recipe 'tiny' (it has: 'other'); add a line for it"),
        ("{other: nowhere, tiny: here}", FAILED, "server.yaml: test_data: "),
        ("{other: nowhere, tiny: null}", FINISHED, None),
    ],
)
def test_each_recipe_has_a_test_set_of_its_own_or_none(house, no_export, folders, code, says):
    with (house.home.path / "server.yaml").open("a") as file:
        file.write(f"test_data: {folders}\n")
    found = house.order("several")
    assert run(house.home, "several", connect=house.connect()) == code
    assert found.status["error"] is None if says is None else says in found.status["error"]


def test_several_runs_share_one_log_and_each_event_says_whose_it_is(house, no_export):
    names = ("first", "second")
    for seed, name in enumerate(names):  # a site pays for a private recipe once
        house.order(name, house.signed(replace(RECIPE, seed=seed)))
        assert run(house.home, name, connect=house.connect()) == FINISHED
    kinds = {"run started", "sites present", "round aggregated", "evaluation received"}
    events = [event for event in verify(house.home.audit_file) if event.kind in kinds]
    assert [event.facts["run"] for event in events] == ["first"] * 5 + ["second"] * 5


def test_the_real_process_waits_for_a_coordinator_that_is_away_and_ends_when_it_is_told(house):
    found = house.order("alone")
    command = [sys.executable, "-m", "server.runner", "--home", str(house.home.path), "--run", "alone"]
    process = subprocess.Popen(command, cwd=Path(runner.__file__).parents[1], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not found.status.get("error") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert "the coordinator does not run" in found.status["error"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == STOPPED
    finally:
        process.kill()
    assert found.status["state"] == "stopped"
    assert verify(house.home.audit_file)[-1].kind == "run stopped"
