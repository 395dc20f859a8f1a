"""Slow, lossy and cut lines between the sites and the gateway."""

from __future__ import annotations

import time

import pytest

from simulations.rehearsal import edit, rehearsing
from tests.deployment.conftest import PLAN, ROUNDS, begin, digest, wait_event, work
from tests.deployment.relay import BadLine


@pytest.fixture
def badly_connected(tmp_path):
    """A federation in which every site has a line of its own: 100 ms, 2 Mbit/s, one block in twenty stalls."""
    with rehearsing(tmp_path / "federation", PLAN) as made:
        lines = {site: BadLine(made.port, seed=number) for number, site in enumerate(PLAN.sites)}
        try:
            for site, line in lines.items():
                edit(made.site(site).path / "site.yaml", gateway=f"127.0.0.1:{line.port}")
            for name in ("server", *PLAN.sites):
                made.start(name)
            yield made, lines
        finally:
            for line in lines.values():
                line.close()


def test_over_slow_and_cut_lines_the_run_ends_with_the_weights_of_a_quiet_one(badly_connected, expected):
    federation, lines = badly_connected
    first, second, _ = PLAN.sites
    begin(federation, "bad-lines")
    wait_event(federation, first, "update sent", 1, 0)  # its upload begins now
    lines[first].cut()
    time.sleep(15)
    lines[first].mend()
    wait_event(federation, second, "plan received", 3, 0)
    lines[second].cut()
    time.sleep(5)
    lines[second].mend()
    assert digest(federation, "bad-lines") == expected
    for site in PLAN.sites:
        done = work(federation, site)
        assert (done.paid, done.trained) == (ROUNDS, ROUNDS)
        assert lines[site].bytes > 2 * ROUNDS * 250_000  # the model went through this line, both ways, every round
