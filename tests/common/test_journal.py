"""One log for the processes of one house."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.audit import verify
from common.chain import AuditError
from common.identity import Signer
from common.journal import SharedLog


def test_naming_a_log_makes_nothing(tmp_path: Path) -> None:
    SharedLog(tmp_path / "audit" / "north.jsonl", Signer.temporary())
    assert list(tmp_path.iterdir()) == []


def test_two_hands_write_one_chain(tmp_path: Path) -> None:
    path, signer = tmp_path / "audit" / "north.jsonl", Signer.temporary()
    node, person = SharedLog(path, signer), SharedLog(path, signer)
    heads = [log.append("event", number=number) for number, log in enumerate((node, person, node, node, person))]
    events = verify(path, signer.public)
    assert [event.facts.get("number") for event in events[1:]] == [0, 1, 2, 3, 4]
    assert [event.hash for event in events[1:]] == heads
    assert person.head == heads[-1]


def test_two_processes_write_one_chain_at_the_same_time(tmp_path: Path) -> None:
    path, key = tmp_path / "audit" / "north.jsonl", tmp_path / "key"
    signer = Signer.load_or_create(key)
    code = (
        "import sys; from pathlib import Path\n"
        "from common.identity import Signer; from common.journal import SharedLog\n"
        "log = SharedLog(Path(sys.argv[1]), Signer.load(Path(sys.argv[2])))\n"
        "for number in range(20): log.append('event', number=number)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), str(key)]) for _ in range(2)]
    mine = SharedLog(path, signer)
    for number in range(20):
        mine.append("event", number=number)
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(verify(path, signer.public)) == 1 + 60


def test_an_older_copy_that_was_put_back_under_a_running_node_is_noticed(tmp_path: Path) -> None:
    path, signer = tmp_path / "audit" / "north.jsonl", Signer.temporary()
    log = SharedLog(path, signer)
    log.append("one")
    old = path.read_bytes()
    log.append("two")
    path.write_bytes(old)
    with pytest.raises(AuditError, match="gone from the log"):
        log.append("three")


def test_a_log_of_another_key_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "north.jsonl"
    SharedLog(path, Signer.temporary()).append("one")
    log = SharedLog(path, Signer.temporary())
    with pytest.raises(AuditError, match="not signed by the expected key"):
        log.append("two")
