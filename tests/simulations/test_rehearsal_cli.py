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
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield said
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("sites", [1, 3])
def test_a_site_is_killed_and_comes_back_also_when_there_is_one_alone(done, tmp_path, sites):
    assert rehearsal_cli.rehearse_verb(["--out", str(tmp_path / "out"), "--sites", str(sites)]) == 0
    (killed,) = [line.split()[1] for line in done if line.startswith("kill ")]
    assert done.count(f"start {killed}") == 2
    assert done[-1] == "stop"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_rehearsal_that_is_told_to_end_stops_its_processes_also_when_it_is_told_twice(
    done, tmp_path, monkeypatch, number
):
    signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    monkeypatch.setattr(rehearsal_cli, "_train", lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        rehearsal_cli.rehearse_verb(["--out", str(tmp_path / "out")])
    assert done[-1] == "stop"
    os.kill(os.getpid(), number)


def test_a_rehearsal_under_nohup_outlives_its_terminal(done, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(rehearsal_cli, "_train", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP))
    assert rehearsal_cli.rehearse_verb(["--out", str(tmp_path / "out")]) == 0


def test_a_file_is_no_folder_for_a_rehearsal_and_stays(tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="choose another folder"):
        rehearsal_cli.rehearse_verb(["--out", str(file)])
    assert file.read_text() == "mine"
