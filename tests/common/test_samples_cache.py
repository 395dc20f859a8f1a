"""The cache of prepared samples: its forms, its size, and how it is emptied."""

from __future__ import annotations

import hashlib
import stat
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import filling as room
from common import preparing, samples
from common.cache import make_room, parse_size, purge, set_limit, shown, usage
from common.config import Preprocessing, Task
from common.errors import ConfigError, DataError, StorageError
from common.imaging.index import Index, index_file
from common.imaging.parallel import Lost
from common.samples import Prepared, prepare_folder
from common.shard import Rows
from simulations.dicom_writer import Machine, Subject, axial, write_series

KEY = b"a site's own secret"
SECRET = bytes(range(32))
TASK = Task(key="patient", dimensions=3)
DATA = Preprocessing(size=(8, 8, 8), intensity="window", low=0, high=1000, orientation="source", mean=0.5, std=0.25)
PATIENTS = 4


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "north"
    for number in range(PATIENTS):
        stored = (np.arange(512, dtype=np.int16).reshape(8, 8, 8) * 2 + number).astype(np.int16)
        who = Subject(patient_id=f"MRN-{number:04d}", entropy=("test_samples_cache",))
        write_series(
            folder / "dicom" / str(number), stored, axial(stored.shape, (1, 1, 1)), Machine(modality="CT"), who
        )
    rows = [f"MRN-{number:04d},{('negative', 'positive')[number % 2]}" for number in range(PATIENTS)]
    (folder / "labels.csv").write_text("\n".join(["patient,label", *rows]) + "\n")
    time.sleep(0.03)
    return folder


def read(folder: Path, data: Preprocessing = DATA, **kwargs: Any) -> Prepared:
    return prepare_folder(folder, TASK, data, cache=folder.parent / "cache", key=KEY, **kwargs)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def test_processes_prepare_what_this_one_would(site: Path) -> None:
    alone = read(site, jobs=1).samples
    again = prepare_folder(site, TASK, DATA, cache=site.parent / "other", key=KEY, jobs=2).samples
    assert again.digest == alone.digest
    assert again.targets_N.tolist() == alone.targets_N.tolist()


def test_as_many_processes_start_as_are_worth_it_and_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "cores", lambda: 8)
    monkeypatch.setattr(preparing, "_free_bytes", lambda: 16 * 2**30)
    small = preparing.Unit("", "", frozenset(), 1, 2**20, 2**21)
    large = preparing.Unit("", "", frozenset(), 200, 2**31, 2**31)  # 3 * 2 GiB + 512 MiB: 6.5 GiB a process
    assert preparing.jobs_for([small]) == 1
    assert preparing.jobs_for([small] * 256) == 8
    assert preparing.jobs_for([large] * 4) == 2
    monkeypatch.setattr(preparing, "_free_bytes", lambda: 2**30)
    assert preparing.jobs_for([large] * 4) == 1


def test_a_series_that_its_process_did_not_survive_is_refused_and_tried_again(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    real = room.prepared_units
    monkeypatch.setattr(room, "prepared_units", lambda units, *rest: counts.append(len(units)) or real(units, *rest))

    def lossy(work: Any, items: Any, *, load: Any, **_: Any) -> Any:
        return [(at, Lost("stalled") if at == 1 else work(load(item))) for at, item in enumerate(items)]

    with monkeypatch.context() as patch:
        patch.setattr(room, "jobs_for", lambda _: 2)
        patch.setattr(preparing, "spread", lossy)
        with pytest.raises(DataError, match=r"row 3: no image has this patient.*files refused: \{'too_slow': 8\}"):
            read(site)
    assert len(read(site).samples.x_N) == PATIENTS
    assert counts == [PATIENTS, 1]


def test_encrypted_samples_have_the_digest_of_plain_ones_and_show_nothing_on_disk(site: Path) -> None:
    plain, sealed = read(site).samples, read(site, secret=SECRET).samples
    assert sealed.digest == plain.digest
    assert isinstance(sealed.x_N, Rows)
    np.testing.assert_array_equal(sealed.x_N[np.array([3, 0])], plain.x_N[[3, 0]])
    assert hashlib.sha256(sealed.x_N[:].tobytes() + sealed.targets_N.tobytes()).hexdigest() == sealed.digest
    (folder,) = (site.parent / "cache").glob("*-sealed")
    row = plain.x_N[0].tobytes()
    for path in files(folder):
        data = path.read_bytes()
        assert row[1000:1032] not in data
        assert b"patients" not in data
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_is_plain_on_disk_while_encrypted_samples_are_prepared(site: Path) -> None:
    row = read(site).samples.x_N[0].tobytes()[1000:1032]
    seen = 0

    def look(done: int, total: int) -> None:
        nonlocal seen
        for folder in (site.parent / "cache").glob("*-sealed"):
            for path in files(folder):
                seen += path.stat().st_size > 2048
                assert row not in path.read_bytes()

    read(site, secret=SECRET, progress=look)
    assert seen >= PATIENTS


def test_plain_samples_of_before_are_removed_once_encrypted_ones_are_ready(site: Path) -> None:
    cache = site.parent / "cache"
    read(site)
    read(site, storage="float16")
    read(site, replace(DATA, high=900))  # another preprocessing
    assert len(list(cache.glob("?" * 16 + "*"))) == 3

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(site, secret=SECRET, progress=stop)
    assert len([folder for folder in cache.iterdir() if folder.is_dir() and "sealed" not in folder.name]) == 3
    digest = read(site, secret=SECRET).samples.digest
    left = [folder for folder in cache.iterdir() if folder.is_dir() and "sealed" not in folder.name]
    assert len(left) == 1
    assert read(site, secret=SECRET).samples.digest == digest  # opened, with nothing left to remove
    assert read(site, replace(DATA, high=900)).samples.digest != digest
    assert [folder for folder in cache.iterdir() if folder.is_dir() and "sealed" not in folder.name] == left


def test_another_secret_opens_nothing_and_says_what_to_do(site: Path) -> None:
    read(site, secret=SECRET)
    with pytest.raises(StorageError, match=r"the key is another one.*purge"):
        read(site, secret=bytes(32))
    with pytest.raises(ConfigError, match="the key of the cache has 5 bytes"):
        read(site, secret=b"short")


@pytest.mark.parametrize(("again", "left"), [(SECRET, 2), (bytes(32), 4)], ids=["same", "other"])
def test_a_killed_encrypted_preparation_goes_on_with_its_secret_only(
    site: Path, again: bytes, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    real = room.prepared_units
    monkeypatch.setattr(room, "prepared_units", lambda units, *rest: counts.append(len(units)) or real(units, *rest))

    def stop(done: int, total: int) -> None:
        if done >= 3 * total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(site, secret=SECRET, progress=stop)
    assert read(site, secret=again).samples.digest == read(site).samples.digest
    assert counts == [4, left, 4]


def test_float16_is_half_as_large_read_as_float32_and_off_by_less_than_a_grey_level(site: Path) -> None:
    whole, half = read(site).samples, read(site, storage="float16").samples
    assert half.digest != whole.digest
    got = half.x_N[:]
    assert got.dtype == np.float32
    assert 0 < np.abs(got - whole.x_N).max() * 0.25 < 2**-11  # in units of the window
    assert got.tobytes() == whole.x_N.astype(np.float16).astype(np.float32).tobytes()
    sizes = sorted(path.stat().st_size for path in files(site.parent / "cache") if path.suffix == ".npy")
    assert sizes == [PATIENTS * 1024 + 128, PATIENTS * 2048 + 128]
    with pytest.raises(ConfigError, match="store float32"):
        read(site, data=Preprocessing(size=(8, 8, 8), mean=7.0), storage="float16")


def test_an_index_in_the_cache_is_used_and_changes_no_sample(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = site.parent / "cache", site.parent / "other"
    expected = read(site).samples.digest
    assert not index_file(site / "dicom", cache).exists(), "an index is kept only where somebody asked for one"
    with Index(site / "dicom", other) as index:
        assert index.refresh().examined == PATIENTS * 8
    used: list[Path] = []
    real = Index.refresh

    def refresh(self: Index, *args: Any, **kwargs: Any) -> Any:
        found = real(self, *args, **kwargs)
        used.append(Path() if self.path is None else self.path)
        assert found.examined == 0
        return found

    monkeypatch.setattr(Index, "refresh", refresh)
    assert prepare_folder(site, TASK, DATA, cache=other, key=KEY).samples.digest == expected
    with Index(site / "dicom", other) as index:
        third = site.parent / "third"
        assert prepare_folder(site, TASK, DATA, cache=third, key=KEY, index=index).samples.digest == expected
    assert used == [index_file(site / "dicom", other)] * 2
    with Index(site / "dicom" / "0") as index, pytest.raises(ConfigError, match="of another folder"):
        prepare_folder(site, TASK, DATA, cache=third, key=KEY, index=index)


def test_the_longest_unused_samples_make_room_for_new_ones(site: Path) -> None:
    cache = site.parent / "cache"
    sizes = [Preprocessing(size=(8, 8, edge), intensity="window", low=0, high=1000) for edge in (8, 9, 10)]
    read(site, data=sizes[0])
    one = usage(cache).total_bytes
    set_limit(cache, int(2.8 * one))
    read(site, data=sizes[1])
    read(site, data=sizes[0])
    read(site, data=sizes[2])  # 1 + 9/8 + 10/8 of the first: the second has to go
    kept = {np.load(path, mmap_mode="r").shape[-1] for path in files(cache) if path.suffix == ".npy"}
    assert kept == {8, 10}
    found = usage(cache)
    assert found.prepared == 2
    assert found.total_bytes <= int(2.8 * one) == found.limit_bytes
    with pytest.raises(StorageError, match=r"the prepared samples take .* the cache may take"):
        read(site, data=Preprocessing(size=(24, 24, 24), intensity="window", low=0, high=1000))
    set_limit(cache, one)
    assert usage(cache).prepared <= 1
    set_limit(cache, None)
    assert make_room(cache) == 0


def test_a_purge_leaves_the_split_and_other_peoples_files(site: Path) -> None:
    cache = site.parent / "cache"
    read(site)
    Index(site / "dicom", cache).close()
    (cache / "cohort_manifest.json").write_text("{}")
    (cache / "notes").mkdir()
    before = usage(cache)
    assert (before.prepared, before.indexes) == (1, 1)
    assert purge(cache) == before.total_bytes > PATIENTS * 2048
    assert {path.name for path in cache.iterdir()} - {".lock"} == {"cohort_manifest.json", "notes"}
    assert (usage(cache).total_bytes, purge(site.parent / "nowhere")) == (0, 0)
    assert read(site).samples.digest


@pytest.mark.parametrize(
    ("text", "count"),
    [("500M", 500 * 10**6), ("20GB", 20 * 10**9), ("1.5 TB", 15 * 10**11), ("12", 12), ("7kb", 7000), ("none", None)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int | None) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1G", "1 parsec", "1e9", "5 5"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected for example 500M"):
        parse_size(text)


def test_sizes_are_shown_with_three_digits() -> None:
    assert [shown(count) for count in (999, 1000, 1_234_567, 20 * 10**9)] == ["999 bytes", "1 KB", "1.23 MB", "20 GB"]


def test_the_cache_is_closed_to_others(site: Path) -> None:
    read(site)
    folders = [path for path in (site.parent / "cache").rglob("*") if path.is_dir()]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [site.parent / "cache", *folders]}
    assert modes == {0o700}


def test_a_tilted_series_is_a_sample_only_where_the_recipe_corrects_it_and_that_is_counted(
    site: Path, tmp_path: Path
) -> None:
    from tests.common.test_imaging_references import tilted_ct

    tilted_ct(site / "dicom" / "tilted")  # of patient P1
    with (site / "labels.csv").open("a") as table:
        table.write("P1,positive\n")
    time.sleep(0.03)
    with pytest.raises(DataError, match="no image has this patient"):
        read(site)
    data = replace(DATA, correct_tilt=True)
    for how in ({"jobs": 1}, {"jobs": 1}, {"secret": SECRET}):  # the second is opened as it is
        found = read(site, data, **how)
        assert len(found.samples.x_N) == PATIENTS + 1
        assert found.corrected == {"gantry tilt of 15.0 degrees resampled": 1}
        assert found.refused == {}


@pytest.mark.parametrize("library", ["imagecodecs", "pillow", "pydicom"])
def test_another_version_of_what_decodes_pixels_prepares_anew(
    site: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    real = room.prepared_units
    monkeypatch.setattr(room, "prepared_units", lambda units, *rest: counts.append(len(units)) or real(units, *rest))
    read(site)
    monkeypatch.setattr(samples, "version", lambda name: "another" if name == library else version(name))
    samples.maker.cache_clear()
    try:
        read(site)
    finally:
        samples.maker.cache_clear()
    assert counts == [PATIENTS, PATIENTS]
