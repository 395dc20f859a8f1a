"""Sites that are away, a coordinator that is away, a full disk: the run waits, goes on without, or stops with a clear
error and resumes."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from common.deployment import read_status
from simulations.rehearsal import rehearsing, wait_for
from tests.deployment.conftest import PLAN, ROUNDS, begin, digest, fill, rounds, small_disk, work


@pytest.fixture(scope="module")
def on_small_disk(tmp_path_factory):
    """A federation, running, and whether its coordinator has a small disk of its own."""
    with rehearsing(tmp_path_factory.mktemp("federation"), PLAN) as made, small_disk(made.server.path, 192 << 20) as it:
        try:
            for name in ("server", *PLAN.sites):
                made.start(name)
            yield made, it
        finally:
            made.stop()


@pytest.fixture
def federation(on_small_disk):
    return on_small_disk[0]


def test_a_site_away_for_three_rounds_is_left_out_and_takes_part_again(federation):
    first, _, away = PLAN.sites
    federation.approve("patient", "rounds=12", "federation.offline_s=2", "name=patient")
    federation.kill(away)
    federation.run("away", "patient")
    federation.wait_round(3, "away")
    # The quorum waits for a connected site as long as it takes, so the run is not over before the other one is back.
    runner = federation.child(first, "runner")
    os.kill(runner, signal.SIGSTOP)
    try:
        federation.start(away)
        wait_for(lambda: is_ready(federation, away) or None, "the node", 600)
    finally:
        os.kill(runner, signal.SIGCONT)
    federation.wait_finished("away")
    admitted = [set(facts["admitted"]) for facts in rounds(federation, "away")]
    assert len(admitted) == 12
    assert admitted[:3] == [set(PLAN.sites) - {away}] * 3
    assert any(away in sites for sites in admitted)


def test_a_run_whose_sites_have_left_is_concluded_with_who_is_there(federation):
    stays, *leave = PLAN.sites
    federation.approve("left", "rounds=60", "federation.offline_s=2", "name=left")
    federation.run("left", "left")
    federation.wait_round(2, "left")
    for site in leave:
        federation.kill(site)
    federation.fedicom("server", "conclude", "left", "--home", federation.server.path)
    summary = federation.wait_finished("left")["summary"]
    for site in leave:
        federation.start(site)
        wait_for(lambda site=site: is_ready(federation, site) or None, "the node", 600)
    trained, notes = rounds(federation, "left"), summary["notes"]
    assert summary["rounds"] == trained[-1]["round"] < 60
    assert summary["weight_digest"] == trained[-1]["after"]
    assert f"The training was ended by hand after round {summary['rounds']} of 60." in notes
    assert f"The run was concluded without the measures of {', '.join(leave)} on the final model." in notes
    assert summary["sites"][stays]["auroc"] is not None
    assert (federation.server.runs / "left" / "model.onnx").is_file()


def is_ready(federation, site: str) -> bool:
    """Whether a site's node waits for work, and the coordinator sees it."""
    own = read_status(federation.site(site).status_file) or {}
    theirs = read_status(federation.server.status_file) or {}
    return own.get("state") == "ready" and site in theirs.get("online", ())


def test_a_full_disk_stops_the_run_with_a_clear_error_and_with_space_it_ends_with_the_same_weights(
    on_small_disk, expected
):
    federation, small = on_small_disk
    if not small:
        pytest.skip("a disk is filled only where a small one may be mounted, and this user may not")
    begin(federation, "full")
    federation.wait_round(1, "full")
    ballast = fill(federation.server.path)
    words = ("--home", federation.server.path)

    def failed():
        plain = json.loads(federation.fedicom("server", "status", "--json", *words))
        (run,) = (run for run in plain["runs"] if run["run"] == "full")
        return run if run["state"] == "failed" else None

    assert "free space" in wait_for(failed, "the end of the run", 300)["error"]
    assert all(federation.alive(name) for name in ("server", *PLAN.sites))
    ballast.unlink()
    federation.fedicom("server", "resume", "full", *words)
    wait_for(lambda: federation.status("full").get("state") != "failed" or None, "the next attempt", 60)
    assert digest(federation, "full") == expected
    assert rounds(federation, "full")[-1]["round"] == ROUNDS


def test_the_whole_coordinator_gone_for_two_minutes_comes_back_and_ends_with_the_same_weights(federation, expected):
    before = {site: work(federation, site) for site in PLAN.sites}
    begin(federation, "gone")
    federation.wait_round(1, "gone")
    federation.kill("server")
    began = time.monotonic()
    federation.kill(PLAN.sites[0])  # and one site starts while nobody is there
    federation.start(PLAN.sites[0])
    time.sleep(120 - (time.monotonic() - began))
    assert all(federation.alive(site) for site in PLAN.sites)
    federation.start("server")
    assert digest(federation, "gone") == expected
    after = {site: work(federation, site) - before[site] for site in PLAN.sites}
    assert {done.paid for done in after.values()} == {ROUNDS}
    assert {done.trained for done in after.values()} == {ROUNDS}
