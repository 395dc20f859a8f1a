"""`fedicom rehearse` as a command; `tests/deployment` has what it rehearses."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import ConfigError
from simulations import rehearsal_cli


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a rehearsal was told to do; it does nothing."""
    said: list[str] = []

    class Told:
        def __init__(self, out, plan):
            self.plan, self.server = plan, SimpleNamespace(runs=out)

        def __getattr__(self, name):
            def tell(*words):
                said.append(" ".join([name, *map(str, words)]))
                return {"run": "rehearsal", "round": 9, "sites": {}}

            return tell

        def verify(self):
            return ()

    monkeypatch.setattr(rehearsal_cli, "Rehearsal", Told)
    monkeypatch.setattr(rehearsal_cli.time, "sleep", lambda seconds: None)
    before = signal.getsignal(signal.SIGTERM)
    yield said
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("sites", [1, 3])
def test_a_site_is_killed_and_comes_back_also_when_there_is_one_alone(done, tmp_path, sites):
    assert rehearsal_cli.rehearse_verb(["--out", str(tmp_path / "out"), "--sites", str(sites)]) == 0
    (killed,) = [line.split()[1] for line in done if line.startswith("kill ")]
    assert done.count(f"start {killed}") == 2
    assert done[-1] == "stop"


def test_a_rehearsal_that_is_told_to_end_stops_its_processes(done, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal_cli, "_train", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        rehearsal_cli.rehearse_verb(["--out", str(tmp_path / "out")])
    assert done[-1] == "stop"


def test_a_file_is_no_folder_for_a_rehearsal_and_stays(tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="choose another folder"):
        rehearsal_cli.rehearse_verb(["--out", str(file)])
    assert file.read_text() == "mine"
