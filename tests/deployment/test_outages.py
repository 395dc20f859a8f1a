"""Long absences and a full disk: the run waits, goes on without, or stops with a clear error and resumes."""

from __future__ import annotations

import time

from common.audit import verify
from tests.deployment.conftest import PLAN, ROUNDS, digest, work


def test_the_whole_coordinator_gone_for_two_minutes_comes_back_and_ends_with_the_same_weights(federation, expected):
    before = {site: work(federation, site) for site in PLAN.sites}
    federation.run("gone")
    federation.wait_round(1, "gone")
    federation.kill("server")
    time.sleep(120)
    assert all(federation.alive(site) for site in PLAN.sites)
    federation.start("server")
    assert digest(federation, "gone") == expected
    after = {site: work(federation, site) - before[site] for site in PLAN.sites}
    assert {done.paid for done in after.values()} == {ROUNDS}
    assert {done.trained for done in after.values()} == {ROUNDS}


def test_a_site_away_for_three_rounds_is_left_out_and_takes_part_again(federation):
    away = PLAN.sites[2]
    federation.approve("patient", "rounds=14", "federation.offline_s=2", "name=patient")
    federation.kill(away)
    federation.run("away", "patient")
    federation.wait_round(3, "away")
    federation.start(away)
    federation.wait_finished("away")
    rounds = [
        event.facts
        for event in verify(federation.server.audit_file)
        if event.kind == "round aggregated" and event.facts.get("run", "away") == "away"
    ][-14:]
    assert [facts["round"] for facts in rounds] == list(range(1, 15))
    assert all(away not in facts["admitted"] for facts in rounds[:3])
    assert away in rounds[-1]["admitted"]
    assert all(set(PLAN.sites) - {away} <= set(facts["admitted"]) for facts in rounds)
