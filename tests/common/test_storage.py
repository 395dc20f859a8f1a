"""What lasts, and through what: the end of a process, or a power cut."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from client.ledger import Ledger, SitePolicy
from common.accounting import Event
from common.audit import AuditLog, verify
from common.errors import ConfigError, StorageError
from common.identity import Signer
from common.storage import all_to_disk, named_file, named_place, page_with_json, storing, to_system, write_whole


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every fsync that happens."""
    calls: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(handle), real(handle)))
    return calls


def test_a_whole_file_is_flushed_with_its_folder(tmp_path: Path, synced: list[int]) -> None:
    write_whole(tmp_path / "key", b"1")
    assert len(synced) == 2


def test_a_page_goes_where_out_says_and_a_new_name_without_an_ending_is_a_folder(tmp_path: Path) -> None:
    assert page_with_json(tmp_path / "a.html", "page.html") == tmp_path / "a.html"
    for _ in range(2):  # made, and there
        assert page_with_json(tmp_path / "new" / "folder", "page.html") == tmp_path / "new/folder/page.html"
    assert (tmp_path / "new/folder").is_dir()
    (tmp_path / "page").write_text("of before")
    with pytest.raises(StorageError, match="the folder of --out"):
        page_with_json(tmp_path / "page" / "below", "page.html")
    assert page_with_json(tmp_path / "page", "page.html") == tmp_path / "page"
    for name in ("a.json", "a.jsonl", "a.onnx"):  # a log would be lost with it
        with pytest.raises(ConfigError, match=r"give a\.html"):
            page_with_json(tmp_path / name, "page.html")


def test_what_is_left_to_the_system_is_written_and_not_waited_for(tmp_path: Path, synced: list[int]) -> None:
    signer = Signer.load_or_create(tmp_path / "key", to_system)
    log = AuditLog(tmp_path / "log.jsonl", signer, rotate_bytes=600, flush=to_system)
    for number in range(4):
        log.append("event", number=number)
    ledger = Ledger(tmp_path / "ledger.jsonl", "cohort", SitePolicy(epsilon=8.0, delta=1e-3), to_system)
    event = Event(noise_multiplier=2.0, sampling_rate=0.1, steps=3)
    ledger.settle(ledger.reserve("a" * 64, round=1, base="b" * 64, event=event), 3)
    assert synced == []
    assert [event.kind for event in verify(tmp_path / "log.jsonl", signer.public)].count("event") == 4
    assert Ledger(tmp_path / "ledger.jsonl", "cohort", SitePolicy(epsilon=8.0, delta=1e-3)).spent() > 0


def test_all_goes_to_the_disk_at_once_or_it_is_said_that_it_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_to_disk(tmp_path)

    def full(handle: int) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syncfs=full))
    with pytest.raises(StorageError, match="free space"):
        all_to_disk(tmp_path)


def test_where_the_system_cannot_write_out_one_disk_it_writes_out_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(os, "sync", lambda: called.append("sync"))
    all_to_disk(tmp_path)
    assert called == ["sync"]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOENT, "there is no such file or folder; check the path"),
        (errno.EISDIR, "expected a file, got a folder; check the path"),
        (errno.ENOTDIR, "expected a folder, got a file; check the path"),
        (errno.EACCES, "check the owner and mode"),
        (errno.EPERM, "check the owner and mode"),
        (errno.ENOSPC, "free space on that disk"),
        (errno.EIO, "check the disk"),
    ],
)
def test_advice_follows_what_the_system_said_and_no_path_is_shown(number: int, says: str) -> None:
    with pytest.raises(StorageError) as caught, storing("an image"):
        raise OSError(number, os.strerror(number), "/data/Miller^Anna/1.dcm")
    assert str(caught.value).startswith("an image could not be written or read: ")
    assert says in str(caught.value)
    assert ("owner" in str(caught.value)) == (number in (errno.EACCES, errno.EPERM))
    assert "Miller" not in str(caught.value)


def test_a_file_that_the_user_named_is_named_in_the_answer(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"1")
    assert named_file(str(there)) == there
    assert named_place(tmp_path / "new") == tmp_path / "new"
    for call, path, says in (
        (named_file, tmp_path / "absent", f"{tmp_path / 'absent'}: there is no such file or folder"),
        (named_file, tmp_path, f"{tmp_path}: expected a file, got a folder"),
        (named_file, there / "x", f"{there / 'x'}: expected a folder, got a file"),
        (named_place, tmp_path / "absent" / "x", f"{tmp_path / 'absent'}: there is no such file or folder"),
        (named_place, there / "x", f"{there}: expected a folder, got a file"),
        (named_place, tmp_path, f"{tmp_path}: expected a file, got a folder"),
    ):
        with pytest.raises(ConfigError) as caught:
            call(path)
        assert str(caught.value) == f"{says}; check the path"
