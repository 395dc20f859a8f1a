"""kill -9 of sites at the worst moments, with updates that are plain, masked or in eight bits: the weights are those of
a quiet run, and nothing is paid twice."""

from __future__ import annotations

import pytest

from common.audit import verify
from common.chain import AuditError, verify_against
from common.config import load_settings
from common.models import build, get_weights
from tests.deployment.conftest import PLAN, ROUNDS, Work, begin, digest, events, simulated, wait_event, work

SECURE = (
    "name=secure",
    "rounds=2",
    "privacy.secure_aggregation=true",
    "federation.quorum=3",
    "federation.max_update_norm=100",
)
COMPRESSED = ("name=compressed", "rounds=3", "federation.quorum=3", "federation.compression=int8")


def test_a_deployed_run_ends_with_the_weights_of_the_simulation(federation, expected, tmp_path):
    begin(federation, "quiet")
    assert digest(federation, "quiet") == expected
    for site in PLAN.sites:
        assert work(federation, site) == Work(paid=ROUNDS, trained=ROUNDS, answered=ROUNDS)
    # Both sides' logs hold under the registry's keys alone, each against the other.
    assert len(list(federation.verify())) == 2 * len(PLAN.sites)
    # Nor can the coordinator take back how the run ended: every site has written down that it heard of it.
    log = federation.server.audit_file
    (end,) = (event.number for event in verify(log) if event.kind == "run concluded")
    cut = tmp_path / log.name
    cut.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:end]))
    for site in PLAN.sites:
        with pytest.raises(AuditError, match=r"remembers head .* which this log has not: it was cut"):
            verify_against(verify(cut), verify(federation.site(site).audit_file))


def test_sites_killed_in_training_in_upload_and_between_rounds_train_and_pay_once_a_round(federation, expected):
    first, second, third = PLAN.sites
    before = {site: work(federation, site) for site in PLAN.sites}
    seen = {site: events(federation, site) for site in PLAN.sites}
    begin(federation, "killed-sites")
    wait_event(federation, first, "budget reserved", 1, seen[first])  # it is training now
    federation.kill(first)
    federation.start(first)
    wait_event(federation, second, "update sent", 2, seen[second])  # kept and paid, not yet with the coordinator
    federation.kill(second)
    federation.start(second)
    federation.wait_round(2, "killed-sites")
    federation.kill(third)
    federation.start(third)
    assert digest(federation, "killed-sites") == expected
    after = {site: work(federation, site) - before[site] for site in PLAN.sites}
    assert {done.paid for done in after.values()} == {ROUNDS}
    assert {done.trained for done in after.values()} == {ROUNDS}


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
