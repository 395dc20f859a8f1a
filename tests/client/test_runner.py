"""The resident runner's process: whose messages it trusts, what it writes down, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from client.node import changes, families
from client.resident import State
from client.runner import Coordinator, Report, run
from common.audit import verify
from common.chain import AuditError
from common.errors import ExchangeError
from common.identity import Signer
from common.prometheus import exposition
from common.supervise import free_port
from tests.client.conftest import House


def rewrite(house: House, **changes: Any) -> None:
    registry, authority = house.home.registry, Signer.load(house.kits / "authority" / "authority.key")
    replace(registry, version=registry.version + 1, **changes).write(house.home.registry_file, authority)


def test_the_coordinators_key_is_that_of_the_registry_of_now(house: House) -> None:
    key, new = Coordinator(house.home), Signer.temporary()
    assert key() == house.coordinator.public
    rewrite(house, coordinator=new.public)
    assert key() == new.public


def test_a_registry_that_does_not_hold_trusts_nobody_until_it_does_again(house: House) -> None:
    key, file = Coordinator(house.home), house.home.registry_file
    good = file.read_bytes()
    assert key()
    file.write_bytes(good.replace(b'"version": 1', b'"version": 2'))
    for _ in range(2):
        with pytest.raises(ExchangeError, match="trusts nobody"):
            key()
    file.unlink()
    with pytest.raises(ExchangeError, match="trusts nobody"):
        key()
    file.write_bytes(good)
    assert key() == house.coordinator.public


def test_the_report_is_whole_at_every_moment_and_a_full_disk_costs_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report(house.home)
    report.state(State())
    report.link("ready")
    plain = json.loads(house.home.runner_file.read_text())
    assert (plain["state"], plain["doing"], plain["pid"]) == ("ready", "idle", os.getpid())
    assert "torch" in plain["versions"]
    monkeypatch.setattr(house.home.__class__, "runner_file", house.home.path / "nowhere" / "runner.json")
    Report(house.home).link("working")  # cannot be written, and is no error


def test_before_the_log_was_read_nothing_is_said_to_be_none(house: House) -> None:
    report = Report(house.home)
    report.write()
    before = json.loads(house.home.runner_file.read_text())
    assert b"_total" not in exposition(families(before))
    report.state(State(updates=52, bytes_sent=7_000_000))
    after = json.loads(house.home.runner_file.read_text())
    assert b"fedicom_site_updates_total" in exposition(families(after))
    assert list(changes({"pid": 1, **before}, {"pid": 1, **after})) == []  # no "update sent, 7.0 MB" at every start


def test_a_runner_waits_for_its_supernode_and_ends_when_asked(house: House, wait: Callable[..., Any]) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(house.home, free_port(), stop))
    thread.start()

    def waiting() -> bool | None:
        file = house.home.runner_file
        return (file.exists() and json.loads(file.read_text())["state"] == "waiting") or None

    wait(waiting, "the report")
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert json.loads(house.home.runner_file.read_text())["state"] == "stopped"
    last = verify(house.home.audit_file)[-1]
    assert (last.kind, last.facts) == ("node stopped", {"why": "asked to"})


def test_a_runner_that_cannot_work_says_why(house: House) -> None:
    house.log.append("event")
    path = house.home.audit_file
    path.write_text(path.read_text().replace("event", "evens"))
    with pytest.raises(AuditError):
        run(house.home, free_port(), threading.Event())
    plain = json.loads(house.home.runner_file.read_text())
    assert plain["state"] == "failed"
    assert "changed" in plain["error"]


PROGRAM = """
import sys, time
from client import runner
runner.serve = lambda *_, **__: time.sleep(600)   # a visit that takes long
raise SystemExit(runner.main(["--home", sys.argv[1], "--port", "1"]))
"""


def test_a_stop_in_the_middle_of_a_visit_is_written_down_and_does_not_wait(
    house: House, wait: Callable[..., Any]
) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(house.home.path)], stderr=subprocess.DEVNULL)
    try:
        path = house.home.audit_file
        wait(lambda: (path.exists() and b'"code"' in path.read_bytes()) or None, "the start", 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
    assert verify(house.home.audit_file)[-1].facts == {"why": "in the middle of a visit"}
