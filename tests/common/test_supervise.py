"""Children that are kept alive: started again when they die, ended together, never left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.supervise import Child, Supervisor, free_port, stop_on_signal

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class Heard:
    """Events of the children, with a way to wait for them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, name: str, what: str) -> None:
        self.events.append((name, what))

    def of(self, name: str) -> list[str]:
        return [what for heard, what in self.events if heard == name]


def until(found: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.02)
    return result


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def supervisor(tmp_path: Path, heard: Heard) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "logs", heard)
    yield made
    made.stop_all(2)


def test_the_log_of_a_child_that_writes_without_end_is_bounded_while_it_runs(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.supervise._MAX_LOG_BYTES", 1000)
    monkeypatch.setattr("common.supervise._LOOK_S", 0.02)
    program = "for number in range(10**9): print(number, flush=True); import time; time.sleep(.001)"
    supervisor.start(Child(name="wordy", command=[sys.executable, "-c", program]))
    log, older = tmp_path / "logs" / "wordy.log", tmp_path / "logs" / "wordy.log.1"
    until(older.exists, "the first turn")
    before = older.read_text()
    assert len(before) == 1000
    until(lambda: older.read_text() != before, "the second turn")
    largest = 0
    for _ in range(50):
        largest = max(largest, log.stat().st_size, older.stat().st_size)
        time.sleep(0.01)
    assert largest < 50_000
    assert stat.S_IMODE(older.stat().st_mode) == 0o600
    assert {path.name for path in log.parent.glob("[!.]*")} == {"wordy.log", "wordy.log.1"}


def test_a_child_that_is_killed_is_started_again(supervisor: Supervisor, heard: Heard) -> None:
    supervisor.start(Child(name="sleeper", command=SLEEP))
    first = until(lambda: supervisor.children["sleeper"], "the child")
    os.kill(first, signal.SIGKILL)
    second = until(lambda: (pid := supervisor.children["sleeper"]) != first and pid, "the next child")
    assert second != first
    assert heard.of("sleeper") == ["started", "ended with code -9, again in 0.5 s", "started"]


def test_the_pauses_between_two_starts_grow_to_the_longest(supervisor: Supervisor, heard: Heard) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    supervisor.start(Child(name="broken", command=command, longest_pause_s=0.8))
    until(lambda: len(heard.of("broken")) >= 6, "three ends")
    assert [what for what in heard.of("broken") if what != "started"][:3] == [
        "ended with code 3, again in 0.5 s", "ended with code 3, again in 0.8 s", "ended with code 3, again in 0.8 s",
    ]  # fmt: skip


def test_work_that_comes_to_an_end_is_not_started_again(supervisor: Supervisor, heard: Heard) -> None:
    supervisor.start(Child(name="job", command=[sys.executable, "-c", "raise SystemExit(4)"], restart=False))
    until(lambda: supervisor.ended("job") is not None, "the end")
    assert supervisor.ended("job") == 4
    assert supervisor.children == {"job": None}
    assert heard.of("job") == ["started", "ended with code 4"]


def test_a_program_that_does_not_exist_is_tried_again_and_can_be_stopped(supervisor: Supervisor, heard: Heard) -> None:
    supervisor.start(Child(name="nobody", command=["/nowhere/program"]))
    until(lambda: heard.of("nobody"), "the failure")
    assert heard.of("nobody")[0] == "ended with code 127, again in 0.5 s"
    supervisor.stop("nobody")
    assert "nobody" not in supervisor.children


def test_a_child_that_ignores_the_request_to_end_is_killed_with_all_it_started(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(grandchild.pid)); time.sleep(600)"
    )
    supervisor.start(Child(name="stubborn", command=[sys.executable, "-c", program]))
    child = until(lambda: supervisor.children["stubborn"], "the child")
    file = tmp_path / "pid"
    grandchild = int(until(lambda: file.exists() and file.read_text(), "the grandchild"))
    supervisor.stop("stubborn", 0.3)
    assert not alive(child)
    until(lambda: not alive(grandchild), "the end of the grandchild")


def test_a_child_is_asked_before_it_is_killed(supervisor: Supervisor, tmp_path: Path) -> None:
    file = tmp_path / "said"
    program = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(file)!r}, 'a').write('asked'), sys.exit(0)))\n"
        f"open({str(file)!r}, 'w').write('ready '); time.sleep(600)"
    )
    supervisor.start(Child(name="polite", command=[sys.executable, "-c", program]))
    until(lambda: file.exists() and file.read_text(), "the child")
    supervisor.stop_all()
    assert file.read_text() == "ready asked"


def test_the_same_name_again_takes_the_place_of_the_first(supervisor: Supervisor, heard: Heard) -> None:
    supervisor.start(Child(name="one", command=SLEEP))
    first = until(lambda: supervisor.children["one"], "the child")
    supervisor.start(Child(name="one", command=SLEEP))
    until(lambda: supervisor.children["one"] not in (None, first), "the second")
    assert not alive(first)
    assert heard.of("one") == ["started", "stopped", "started"]


def test_each_child_writes_a_log_of_its_own_that_only_the_owner_reads(supervisor: Supervisor, tmp_path: Path) -> None:
    code = "import os, sys; print('hello', os.environ['NAME'], flush=True); print('oh', file=sys.stderr)"
    child = Child(name="talker", command=[sys.executable, "-c", code], environment={"NAME": "north"}, restart=False)
    supervisor.start(child)
    until(lambda: supervisor.ended("talker") == 0, "the end")
    file = tmp_path / "logs" / "talker.log"
    assert sorted(file.read_text().splitlines()) == ["hello north", "oh"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_no_child_outlives_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from common.supervise import Child, Supervisor\n"
        "one = Supervisor(Path(sys.argv[1]) / 'logs')\n"
        "one.start(Child(name='a', command=[sys.executable, '-c', 'import time; time.sleep(600)']))\n"
        "while not one.children['a']: time.sleep(0.01)\n"
        "print(one.children['a'], flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert alive(child)
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: not alive(child), "the end of the child")


def test_a_signal_sets_the_event_and_interrupts_nothing() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = stop_on_signal()
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
        os.kill(os.getpid(), signal.SIGINT)  # the first one is no KeyboardInterrupt
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_free_port_is_free() -> None:
    import socket

    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[1] > 1023
