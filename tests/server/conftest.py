"""Homes of a coordinator; what takes seconds to import is imported by the test that asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kits(tmp_path_factory) -> Path:
    """Kits as they are handed out; `house` copies them."""
    from common.deployment import FederationPlan
    from server.provision import provision
    from tests.server.house import SITES

    out = tmp_path_factory.mktemp("provisioned") / "kits"
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=SITES, auditors=("maria",)), out)
    return out


@pytest.fixture
def house(tmp_path, kits):
    from tests.server.house import unpacked

    return unpacked(kits, tmp_path / "kits")


@pytest.fixture(scope="session")
def quiet_house(tmp_path_factory, kits):
    """A house in which run `quiet` has finished, and nothing disturbed it; nobody may change it."""
    from server import runner
    from tests.server.house import unpacked
    from tests.server.small_sites import no_conclusion

    house = unpacked(kits, tmp_path_factory.mktemp("quiet") / "kits")
    house.order("quiet")
    with pytest.MonkeyPatch.context() as patch:
        no_conclusion(patch)
        assert runner.run(house.home, "quiet", connect=house.connect()) == runner.FINISHED
    return house


@pytest.fixture
def no_export(monkeypatch) -> None:
    """Leaves out what comes after the last round."""
    from tests.server.small_sites import no_conclusion

    no_conclusion(monkeypatch)


@pytest.fixture
def running(house):
    """A coordinator that serves, over processes that do nothing."""
    from tests.server.house import Running

    with Running(house) as made:
        yield made
