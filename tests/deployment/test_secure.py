"""Secure sums between processes: a site dies in the middle of one; the model is that of the simulation to the bit."""

from __future__ import annotations

from common.audit import verify
from common.config import load_settings
from simulations.run import simulate
from tests.deployment.conftest import PHANTOM, PLAN, digest, events, wait_event

WORDS = (
    "name=secure",
    "rounds=2",
    "privacy.secure_aggregation=true",
    "federation.quorum=3",
    "federation.max_update_norm=100",
)


def test_a_site_killed_in_the_middle_of_a_secure_sum_changes_nothing(federation, tmp_path):
    # Whole numbers add up to the same in every order, so seeded noise gives equal bits, whatever the masks were.
    phantom = [f"simulation.phantom.{key}={getattr(PHANTOM, key)}" for key in ("patients", "central_patients", "size")]
    words = [*PLAN.recipe, *phantom, f"federation.sites={PLAN.count}", *WORDS, f"out={tmp_path / 'run'}"]
    expected = str(simulate(load_settings(words)).summary["weight_digest"])
    victim = PLAN.sites[1]
    federation.approve("secure", *WORDS)
    before = events(federation, victim)
    federation.run("secure", "secure")
    wait_event(federation, victim, "sum joined", 1, before)
    federation.kill_child(victim, "runner")
    assert digest(federation, "secure") == expected
    kinds = [event.kind for event in verify(federation.site(victim).audit_file)][before:]
    assert kinds.count("budget reserved") == 2
    assert kinds.count("update sent") == 2
    assert kinds.count("sum opened") >= 2
