"""The hashes of the installed code: equal for equal files, different for one changed byte."""

from __future__ import annotations

import hashlib
import shutil
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import common
from common.errors import StorageError
from common.installed import PACKAGES, ROOMS, code_hashes, folder_hash, record_hash


def test_rooms_and_packages_are_hashed_and_twice_the_same():
    found = code_hashes()
    assert set(found) == {*ROOMS, *PACKAGES}
    assert found == code_hashes()
    assert found["common"] == folder_hash(Path(common.__file__).parent)
    assert found["torch"].split() == [
        version("torch"), record_hash((distribution("torch").read_text("RECORD") or "").splitlines())
    ]  # fmt: skip


def test_a_folders_hash_is_that_of_its_names_and_contents_by_hand(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.yaml").write_bytes(b"x: 1\n")
    (tmp_path / "one.py").write_bytes(b"pass\n")
    (tmp_path / "notes.txt").write_bytes(b"no code")
    (tmp_path / "one.pyc").write_bytes(b"compiled")
    text = f"b/two.yaml\0{hashlib.sha256(b'x: 1' + bytes([10])).hexdigest()}\n"
    text += f"one.py\0{hashlib.sha256(b'pass' + bytes([10])).hexdigest()}\n"
    assert folder_hash(tmp_path) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("change", ["byte", "name", "new file", "moved"])
def test_any_change_of_code_changes_the_hash(tmp_path, change):
    room = Path(common.__file__).parent
    folder = tmp_path / "common"
    shutil.copytree(room, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = folder_hash(folder)
    assert before == folder_hash(room)
    file = folder / "audit.py"
    if change == "byte":
        file.write_bytes(file.read_bytes() + b"\n")
    elif change == "name":
        file.rename(folder / "audits.py")
    elif change == "new file":
        (folder / "more.py").write_bytes(b"")
    else:
        file.rename(folder / "imaging" / "audit.py")
    assert folder_hash(folder) != before


def test_a_record_is_hashed_without_what_an_installer_adds_and_in_any_order():
    lines = ["torch/a.py,sha256=AAA,10", '"torch/b,c.py",sha256=BBB,11']
    added = [
        "torch/__pycache__/a.cpython-311.pyc,,", "../../../bin/torchrun,sha256=CCC,200", "torch-2.dist-info/RECORD,,",
        "torch-2.dist-info/INSTALLER,sha256=DDD,4", "",
    ]  # fmt: skip
    assert record_hash(lines) == hashlib.sha256(b"torch/a.py\0sha256=AAA\ntorch/b,c.py\0sha256=BBB\n").hexdigest()
    assert record_hash([*added, *reversed(lines)]) == record_hash(lines)
    assert record_hash(["torch/a.py,sha256=AAB,10", lines[1]]) != record_hash(lines)
    assert record_hash(added) == ""


def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_empty_hash(tmp_path, monkeypatch):
    monkeypatch.setattr("common.installed.find_spec", lambda room: None)
    with pytest.raises(StorageError, match="cannot be found"):
        code_hashes()
