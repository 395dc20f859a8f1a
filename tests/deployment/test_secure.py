"""Other updates than plain ones between processes, masked or in eight bits: a site dies in the middle of one, and the
model is that of the simulation to the bit."""

from __future__ import annotations

from common.audit import verify
from common.config import load_settings
from common.models import build, get_weights
from tests.deployment.conftest import PLAN, digest, events, simulated, wait_event

SECURE = (
    "name=secure",
    "rounds=2",
    "privacy.secure_aggregation=true",
    "federation.quorum=3",
    "federation.max_update_norm=100",
)
COMPRESSED = ("name=compressed", "rounds=3", "federation.quorum=3", "federation.compression=int8")


def test_a_site_killed_in_the_middle_of_a_secure_sum_changes_nothing(federation, tmp_path):
    # Whole numbers add up to the same in every order, so seeded noise gives equal bits, whatever the masks were.
    expected = simulated(SECURE, tmp_path / "run")
    victim = PLAN.sites[1]
    federation.approve("secure", *SECURE)
    before = events(federation, victim)
    federation.run("secure", "secure")
    wait_event(federation, victim, "sum joined", 1, before)
    federation.kill_child(victim, "runner")
    assert digest(federation, "secure") == expected
    kinds = [event.kind for event in verify(federation.site(victim).audit_file)][before:]
    assert kinds.count("budget reserved") == 2
    assert kinds.count("update sent") == 2
    assert kinds.count("sum opened") >= 2


def test_a_site_killed_with_an_update_in_eight_bits_on_its_way_sends_the_same_bytes_again(federation, tmp_path):
    # What rounding took from one update goes into the next: the remainders must outlive the kill too.
    expected = simulated(COMPRESSED, tmp_path / "run")
    victim = PLAN.sites[1]
    federation.approve("compressed", *COMPRESSED)
    before = events(federation, victim)
    federation.run("compressed", "compressed")
    wait_event(federation, victim, "update sent", 2, before)  # kept and paid, not yet with the coordinator
    federation.kill(victim)
    federation.start(victim)
    assert digest(federation, "compressed") == expected
    found = verify(federation.site(victim).audit_file)[before:]
    sent = [event.facts for event in found if event.kind.startswith("update sent")]
    assert {facts["compression"] for facts in sent} == {"int8"}
    assert len({(facts["round"], facts["digest"]) for facts in sent}) == 3  # one update a round, however often it left
    assert [event.kind for event in found].count("budget reserved") == 3
    recipe = load_settings([*PLAN.recipe, *COMPRESSED]).recipe
    assert max(facts["bytes"] for facts in sent) < 0.3 * get_weights(build(recipe)).nbytes
