"""The coordinator killed in part and as a whole, away for minutes, and on a full disk: the weights are those of a quiet
run, and nothing is paid twice."""

from __future__ import annotations

import json
import time

import pytest

from common.audit import verify
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


def test_superlink_gateway_and_run_killed_one_after_another_lose_nothing(federation, expected):
    before = {site: work(federation, site) for site in PLAN.sites}
    begin(federation, "killed-server")
    federation.wait_round(1, "killed-server")
    federation.kill_child("server", "superlink")
    federation.wait_round(2, "killed-server")
    federation.kill_child("server", "gateway")
    federation.wait_round(3, "killed-server")
    federation.kill_child("server", "run-killed-server")
    assert digest(federation, "killed-server") == expected
    after = {site: work(federation, site) - before[site] for site in PLAN.sites}
    assert {done.paid for done in after.values()} == {ROUNDS}
    resumed = [event for event in verify(federation.server.audit_file) if event.kind == "run resumed"]
    assert resumed


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
