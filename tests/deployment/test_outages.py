"""Sites that are away: the run waits for them, goes on without, or ends with who is there."""

from __future__ import annotations

import os
import signal

from common.deployment import read_status
from simulations.rehearsal import wait_for
from tests.deployment.conftest import PLAN, rounds


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
