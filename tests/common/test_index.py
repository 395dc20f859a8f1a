"""The index of a tree: complete, up to date, never in disagreement with the reader, and never lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest

from common.errors import ConfigError, DataError
from common.imaging import index as room
from common.imaging.header import Header, scan
from common.imaging.index import Index, Refreshed, index_file
from common.imaging.quick import Examined, Examiner, Mark
from common.imaging.refusal import RefusalCode, Refused
from common.imaging.series import files_below
from simulations.dicom_writer import Machine, Subject, axial, write_image, write_series

DATA = Path(os.environ.get("FEDICOM_DATA", Path(__file__).parents[3] / "shared" / "data")) / "dicom"
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"
CT = Machine(modality="CT")


def someone(number: int) -> Subject:
    return Subject(patient_id=f"MRN-{number:04d}", entropy=("test_index",))


def series(folder: Path, number: int = 0, slices: int = 4) -> Path:
    stored = np.arange(slices * 64, dtype=np.int16).reshape(slices, 8, 8)
    write_series(folder, stored, axial(stored.shape, (1.0, 0.5, 0.5)), CT, someone(number))
    return folder


def settle() -> None:
    """Lets the clock of the file system tick: a file that is read as soon as it is written is not trusted."""
    time.sleep(0.03)


def contents(index: Index) -> tuple[dict[Path, Header], dict[Path, tuple[str, str]]]:
    images = {entry.header.path: entry.header for entries in index.series() for entry in entries}
    return images, {refused.path: (str(refused.code), refused.why) for refused in index.refused()}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "dicom"
    for number in range(3):
        series(root / f"p{number}" / "ct", number)
    (root / "letter.txt").write_text("not DICOM")
    settle()
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_second_look_opens_no_file(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Index(tree, cache) as index:
        assert index.refresh() == Refreshed(files=13, examined=13, removed=0)
        first = contents(index)

    def fail(*_: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(Examiner, "__call__", fail)
    with Index(tree, cache) as index:
        assert index.refresh() == Refreshed(files=13, examined=0, removed=0)
        assert contents(index) == first


def touch_back(path: Path) -> None:
    """Changes the content, and sets size and time back: only the time of change tells."""
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-2] + b"\xff\x7f")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(path: Path) -> None:
    other = path.with_name("0002.dcm")
    path.rename(path.with_name("x"))
    other.rename(path)
    path.with_name("x").rename(other)


@pytest.mark.parametrize(
    ("change", "files", "examined", "removed"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), 13, 1, 0),
        (touch_back, 13, 1, 0),
        (lambda path: path.unlink(), 12, 0, 1),
        (lambda path: path.rename(path.with_name("zz.dcm")), 13, 1, 1),
        (lambda path: path.parent.rename(path.parent.with_name("other")), 13, 4, 4),
        (swap, 13, 2, 0),
        (lambda path: shutil.copy2(path, path.with_name("copy.dcm")), 14, 1, 0),
        (lambda path: shutil.rmtree(path.parent), 9, 0, 4),
        (lambda path: (path.parent.parent / "ct.new").mkdir(), 13, 0, 0),
    ],
    ids=["longer", "same size and time", "removed", "renamed", "folder renamed", "swapped", "copied", "folder removed",
         "empty folder"],
)  # fmt: skip
def test_what_changes_in_the_tree_is_noticed(
    tree: Path, cache: Path, change: Callable[[Path], object], files: int, examined: int, removed: int
) -> None:
    with Index(tree, cache) as index:
        index.refresh()
    change(tree / "p1" / "ct" / "0001.dcm")
    settle()
    with Index(tree, cache) as index, Index(tree) as fresh:
        assert index.refresh() == Refreshed(files, examined, removed)
        fresh.refresh()
        assert contents(index) == contents(fresh)
        assert index._db.execute("SELECT COUNT(*) FROM common").fetchone()[0] <= 3


def test_a_file_that_is_read_as_soon_as_it_is_written_is_read_again(tree: Path, cache: Path) -> None:
    with Index(tree, cache) as index:
        index.refresh()
        (tree / "new").write_bytes(b"first")
        assert index.refresh().examined == 1
        # within the same tick of the clock its content could have changed without a trace
        assert index.refresh().examined == 1
        settle()
        assert (index.refresh().examined, index.refresh().examined) == (1, 0)


@pytest.mark.parametrize("root", [DATA, PYDICOM], ids=["data folder", "pydicom"])
def test_the_index_says_of_every_file_what_the_reader_says(root: Path, cache: Path) -> None:
    if not root.is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    with Index(root, cache) as index:
        index.refresh()
        images, refused = contents(index)
    read = {path: scan(path) for path in files_below(root) if isinstance(path, Path)}
    assert images == {path: found for path, found in read.items() if isinstance(found, Header)}
    assert refused == {path: (str(r.code), r.why) for path, r in read.items() if isinstance(r, Refused)}
    assert len(images) > 50


def test_damage_anywhere_in_a_header_gets_the_verdict_of_the_reader(tmp_path: Path) -> None:
    """The examiner knows the series already, so it is tempted to take the damaged file for one like the others."""
    whole = series(tmp_path / "whole")
    examine = Examiner()
    for path in sorted(whole.iterdir()):
        assert examine(path).plan is not None
    data = (whole / "0001.dcm").read_bytes()
    header_bytes = len(data) - 128
    dice, damaged = random.Random(7), tmp_path / "damaged.dcm"
    refused = 0
    for _ in range(600):
        bad = bytearray(data)
        at = dice.randrange(128, header_bytes)
        kind = dice.choice(("bit", "bit", "bit", "byte", "cut out", "put in", "cut off", "longer"))
        if kind == "bit":
            bad[at] ^= 1 << dice.randrange(8)
        elif kind == "byte":
            bad[at] = dice.choice(b"\0 \\\xff90A")
        elif kind == "cut out":
            del bad[at : at + dice.choice((1, 2, 8))]
        elif kind == "put in":
            bad[at:at] = bytes(dice.choice((1, 2, 8)))
        elif kind == "cut off":
            del bad[dice.randrange(128, len(bad)) :]
        else:
            bad += bytes(dice.randrange(1, 9))
        damaged.write_bytes(bad)
        expected = scan(damaged)
        assert repr(examine(damaged).result) == repr(expected)
        refused += isinstance(expected, Refused)
    assert 50 < refused < 550


def test_a_slice_without_an_identifier_does_not_cost_those_that_come_after_it(tmp_path: Path) -> None:
    paths = sorted(series(tmp_path).iterdir())
    first = pydicom.dcmread(paths[0])
    first.SOPInstanceUID = ""
    first.save_as(paths[0])
    examine = Examiner()
    found = [examine(path).result for path in paths]
    assert found == [scan(path) for path in paths]
    assert [isinstance(each, Header) for each in found] == [False] + [True] * (len(paths) - 1)


def test_the_index_walks_where_the_reader_walks(tmp_path: Path) -> None:
    root = tmp_path / "dicom"
    series(root / "b" / "ct")
    for name in ("a", "a.b", "a b", "ä", "日本", "x" * 200, "b/z", "b/ct/deep/er"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"text")
    (root / "a-folder").mkdir()
    (root / "a-folder" / "in").write_bytes(b"text")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "linked.dcm").symlink_to(root / "b" / "ct" / "0001.dcm")
    os.mkfifo(root / "pipe")
    (tmp_path / "dicom" / os.fsdecode(b"\xff\xfe")).write_bytes(b"text")
    expected = [path.path if isinstance(path, Refused) else path for path in files_below(root)]
    with Index(root) as index:
        refreshed = index.refresh()
        images, refused = contents(index)
        order = [refused.path for refused in index.refused()]
    assert sorted([*images, *refused]) == sorted(expected)
    assert refreshed.files == len(expected) - 1  # the link to a folder is no file
    assert [path for path in expected if path in refused] == order
    assert refused[root / "loop"][0] == refused[root / "pipe"][0] == RefusalCode.UNREADABLE


def test_folders_may_be_nested_deeper_than_python_calls_itself(tmp_path: Path) -> None:
    deep = tmp_path / "dicom"
    for _ in range(1100):
        deep.mkdir()
        deep /= "d"
    deep.mkdir()
    (deep / "note.txt").write_text("text")
    try:
        with Index(tmp_path / "dicom") as index:
            assert index.refresh().files == 1
            assert [refused.path for refused in index.refused()] == [deep / "note.txt"]
    finally:
        (deep / "note.txt").unlink()
        while deep != tmp_path:  # pytest removes folders by a function that calls itself
            deep.rmdir()
            deep = deep.parent


def test_workers_find_what_this_process_finds(tree: Path) -> None:
    with Index(tree) as one, Index(tree) as two:
        one.refresh(jobs=1)
        steps: list[tuple[int, int]] = []
        two.refresh(lambda done, total: steps.append((done, total)), jobs=2)
        assert contents(one) == contents(two)
    assert steps[0] == (0, 13)
    assert steps[-1] == (13, 13)


def test_a_file_that_stalls_its_worker_is_tried_again_next_time(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(work: object, paths: list[Path], **_: object) -> list[tuple[int, object]]:
        return [(at, room.Lost("stalled" if at == 1 else "crashed")) for at in range(len(paths))]

    with Index(tree, cache) as index:
        with monkeypatch.context() as patch:
            patch.setattr(room, "spread", lost)
            index.refresh(jobs=2)
        codes = [code for code, _ in contents(index)[1].values()]
        assert sorted(codes) == ["corrupt"] * 12 + ["too_slow"]
        assert index.refresh().examined == 1


def test_a_file_that_may_hold_a_long_header_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def spread(work: object, paths: list[str], *, limit_s: Callable[[str], float], **_: object) -> Iterator[None]:
        limits.extend(map(limit_s, [*paths, str(tmp_path / "gone")]))
        return iter(())

    for name, count in (("a", 2**10), ("b", 2**22)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, count)
    monkeypatch.setattr(room, "spread", spread)
    with Index(tmp_path) as index:
        index.refresh(jobs=2)
    assert [round(limit) for limit in limits] == [2, 35, 2]  # 4 MiB: 16.5 s in the other process


def test_a_kill_at_any_moment_loses_at_most_what_was_not_committed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "dicom"
    for number in range(8):
        series(root / str(number), number, slices=50)
    settle()
    monkeypatch.setattr(room, "_BATCH", 20)
    dice, counts, killed = random.Random(3), [0], 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                with Index(root, cache) as index:
                    index.refresh(jobs=1)
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if index_file(root, cache).exists():
            with Index(root, cache) as index:
                assert index._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                counts.append(sum(len(entries) for entries in index.series()))
    assert killed > 3
    assert counts == sorted(counts), "what was committed was lost"
    with Index(root, cache) as index, Index(root) as fresh:
        assert index.refresh().examined == 400 - counts[-1]
        fresh.refresh()
        assert contents(index) == contents(fresh)


def test_only_the_owner_reads_the_index(tree: Path, cache: Path) -> None:
    with Index(tree, cache) as index:
        index.refresh()
        files = list(cache.iterdir())
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert any(path.suffix == ".sqlite" for path in files)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_an_index_of_other_code_or_a_damaged_one_is_made_anew(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for damage in ("none", "other code", "no database", "cut off", "none"):
        with Index(tree, cache) as index:
            index.refresh()
        path = index_file(tree, cache)
        with monkeypatch.context() as patch:
            if damage == "other code":
                patch.setattr(room, "_maker", lambda: "other code")
            elif damage == "no database":
                path.write_bytes(b"a letter" * 600)
            elif damage == "cut off":
                os.truncate(path, path.stat().st_size // 2 + 100)
            with Index(tree, cache) as index:
                assert index.refresh().examined == (0 if damage == "none" else 13)
                assert len(contents(index)[0]) == 12


def test_the_index_is_found_where_it_was_made_and_only_for_its_folder(tree: Path, cache: Path) -> None:
    assert Index.find(tree, cache) is None
    Index(tree, cache).close()
    found = Index.find(tree, cache)
    assert found is not None
    found.close()
    assert Index.find(tree / "p0", cache) is None
    with pytest.raises(ConfigError, match="inside the folder of images"):
        Index(tree, tree / "cache")
    with pytest.raises(DataError, match="does not exist"):
        Index(tree / "nowhere")


def test_the_content_hash_is_computed_once_and_follows_the_file(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    path = tree / "p0" / "ct" / "0001.dcm"
    with Index(tree, cache) as index:
        index.refresh()
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert index.content_hash(path) == expected
        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "file_digest", None)
            assert index.content_hash(path) == expected
        touch_back(path)
        assert index.content_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest() != expected


def test_two_processes_may_refresh_the_same_index(tree: Path, cache: Path) -> None:
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with Index(tree, cache) as index:
                    index.refresh()
                    code = 0 if len(contents(index)[0]) == 12 else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_a_mark_changes_with_each_of_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    mark = Mark.of(path.stat())
    settle()
    path.chmod(0o600)  # the time of change alone
    assert Mark.of(path.stat()) != mark
    assert Mark.of(path.stat())[:3] == mark[:3]


def test_a_file_that_vanishes_while_it_is_examined_is_unreadable(tmp_path: Path) -> None:
    found = Examiner()(tmp_path / "gone.dcm")
    assert isinstance(found, Examined)
    assert isinstance(found.result, Refused)
    assert (found.result.code, found.mark) == (RefusalCode.UNREADABLE, None)


def test_projection_images_are_indexed_like_slices(tmp_path: Path) -> None:
    for number in range(3):
        values = np.full((4, 4), number, np.uint8)
        write_image(tmp_path / f"{number}.dcm", values, Machine(modality="CR", bits_stored=8), someone(number))
    with Index(tmp_path) as index:
        index.refresh()
        assert [entries[0].header.kind for entries in index.series()] == ["projection"] * 3
