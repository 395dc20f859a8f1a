"""The whole coordinator away for two minutes; on its own, for the waiting costs nobody who tests beside it."""

from __future__ import annotations

import time

from tests.deployment.conftest import PLAN, ROUNDS, begin, digest, work


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
