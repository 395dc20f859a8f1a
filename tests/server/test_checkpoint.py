"""State on disk: whole or absent, never silently wrong."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import StorageError
from common.exchange import Scores, Spent
from common.vault import Secret, new_key_file
from common.weights import Weights
from server import checkpoint
from server.rounds import RoundReport, ServerState, SiteRound

RECIPE = "a" * 64


def weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights({"z.w": rng.standard_normal((3, 2), np.float32), "a.b": rng.standard_normal((), np.float32)})


def state(round_: int = 1) -> ServerState:
    site = SiteRound(
        steps=3, weight=1.0, update_norm=0.5, train_loss=None, validation=Scores(patients=9, values={"auroc": 0.7}),
        test=None, spent=Spent(epsilon=1, delta=1e-5, noise_multiplier=1, clip_norm=1, sampling_rate=0.1, steps=3),
        update_digest="c" * 64,
    )  # fmt: skip
    report = RoundReport(
        round=round_, work="train", accepted={"north": site}, refused={"south": "no reply"}, validation=0.7,
        before="e" * 64, after="f" * 64, seconds=1.5, heads={"north": "d" * 64},
    )  # fmt: skip
    memory = {"m_t": Weights({"z.w": weights(5)["z.w"]}), "v_t": Weights({"z.w": weights(6)["z.w"]})}
    return ServerState(
        recipe_id=RECIPE, round=round_, weights=weights(round_), memory=memory, history=(report,), best=weights(9),
        average=weights(10),
    )  # fmt: skip


@contextmanager
def disk_with(free: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is nearly full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was_bits_order_and_history(tmp_path):
    written = state()
    checkpoint.write(written, tmp_path)
    read = checkpoint.load(tmp_path, RECIPE)
    assert read == written
    assert list(read.weights) == ["z.w", "a.b"]
    assert read.history[0].accepted["north"].spent.epsilon == 1


def test_an_empty_folder_and_no_folder_hold_no_state(tmp_path):
    assert checkpoint.load(tmp_path, RECIPE) is None
    assert checkpoint.load(tmp_path / "none", RECIPE) is None
    assert not checkpoint.exists(tmp_path)


def test_the_newest_is_read_and_two_are_kept(tmp_path):
    for round_ in (1, 2, 3):
        checkpoint.write(state(round_), tmp_path)
    assert names(tmp_path) == ["round-0002.safetensors", "round-0003.safetensors"]
    assert checkpoint.load(tmp_path, RECIPE).round == 3


def test_round_10000_is_newer_than_round_9999(tmp_path):
    for round_ in (9998, 9999, 10_000):
        checkpoint.write(state(round_), tmp_path)
    assert names(tmp_path) == ["round-10000.safetensors", "round-9999.safetensors"]
    assert checkpoint.load(tmp_path, RECIPE).round == 10_000


def test_a_new_checkpoint_is_never_removed_for_one_with_a_higher_number(tmp_path):
    for round_ in (8, 9, 1):
        checkpoint.write(state(round_), tmp_path)
    assert "round-0001.safetensors" in names(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "junk"])
def test_a_damaged_newest_file_is_passed_over_for_the_one_before_it(tmp_path, damage):
    for round_ in (1, 2):
        path = checkpoint.write(state(round_), tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-5], "junk": b"\x00" * 200}[damage])
    assert checkpoint.load(tmp_path, RECIPE) == state(1)


def test_no_changed_byte_is_read_as_a_state(tmp_path):
    path = checkpoint.write(state(), tmp_path)
    whole = path.read_bytes()
    wrong = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :])
        try:
            read = checkpoint.load(tmp_path, RECIPE)
        except StorageError:
            wrong += 1
        else:
            assert read == state()  # a byte that means nothing, such as padding
    assert wrong > 0.8 * len(whole) / 3


def test_when_none_can_be_read_it_says_so(tmp_path):
    (tmp_path / "round-0001.safetensors").write_bytes(b"junk")
    with pytest.raises(StorageError, match="none of the 1 checkpoints can be read"):
        checkpoint.load(tmp_path, RECIPE)


def test_a_checkpoint_of_another_recipe_is_refused_with_both_ids(tmp_path):
    checkpoint.write(state(), tmp_path)
    with pytest.raises(StorageError, match=r"recipe aaaaaaaaaaaa, this run is of bbbbbbbbbbbb"):
        checkpoint.load(tmp_path, "b" * 64)


@pytest.mark.parametrize("free", [0, 100, 1000])
def test_a_full_disk_is_a_storage_error_and_old_checkpoints_stay(tmp_path, free):
    for round_ in (1, 2):
        checkpoint.write(state(round_), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with disk_with(free), pytest.raises(StorageError, match="could not be written"):
        checkpoint.write(state(3), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert checkpoint.load(tmp_path, RECIPE) == state(2)


def test_no_space_left_says_to_free_some(tmp_path, monkeypatch):
    import errno

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.storage.os.fsync", full)
    with pytest.raises(StorageError, match="free space"):
        checkpoint.write(state(), tmp_path)
    assert names(tmp_path) == []


def test_the_closing_state_replaces_that_of_the_last_round(tmp_path):
    checkpoint.write(state(2), tmp_path)
    checkpoint.write(replace(state(2), done=True, best=None), tmp_path)
    assert names(tmp_path) == ["round-0002.safetensors"]
    assert checkpoint.load(tmp_path, RECIPE).done


def test_the_file_is_readable_without_us(tmp_path):
    from safetensors.numpy import load_file

    path = checkpoint.write(state(), tmp_path)
    assert load_file(path)["weights/z.w"].tobytes() == weights(1)["z.w"].tobytes()


def test_what_a_killed_writer_left_is_swept_up(tmp_path):
    (tmp_path / ".round-0001.safetensors.77.tmp").write_bytes(b"half")
    checkpoint.write(state(), tmp_path)
    assert names(tmp_path) == ["round-0001.safetensors"]


@pytest.fixture
def key(tmp_path: Path) -> Secret:
    return new_key_file(tmp_path / "checkpoint.key")


def test_with_a_key_the_state_comes_back_and_nothing_of_it_is_readable_on_disk(tmp_path, key):
    folder = tmp_path / "checkpoints"
    path = checkpoint.write(state(), folder, key)
    assert names(folder) == ["round-0001.safetensors.sealed"]
    assert checkpoint.exists(folder)
    assert checkpoint.load(folder, RECIPE, key) == state()
    on_disk = path.read_bytes()
    for plain in (b"recipe_id", b"north", b"weights/z.w", weights(1)["z.w"].tobytes()):
        assert plain not in on_disk


def test_an_encrypted_run_is_not_resumed_without_its_key_nor_from_an_older_plain_state(tmp_path, key):
    folder = tmp_path / "checkpoints"
    checkpoint.write(state(1), folder)
    checkpoint.write(state(2), folder, key)
    assert len(names(folder)) == 2
    with pytest.raises(StorageError, match="encrypted; name their key file"):
        checkpoint.load(folder, RECIPE)
    with pytest.raises(StorageError, match="none of the 2 checkpoints can be read; check checkpoint_key"):
        checkpoint.load(folder, RECIPE, new_key_file(tmp_path / "other.key"))
    assert checkpoint.load(folder, RECIPE, key) == state(2)


def test_two_rounds_after_a_key_was_given_no_plain_state_is_left(tmp_path, key):
    folder = tmp_path / "checkpoints"
    for round_ in (1, 2):
        checkpoint.write(state(round_), folder)
    assert checkpoint.load(folder, RECIPE, key) == state(2)
    checkpoint.write(replace(state(2), done=True), folder, key)  # replaces the plain one of its round
    assert names(folder) == ["round-0001.safetensors", "round-0002.safetensors.sealed"]
    checkpoint.write(state(3), folder, key)
    assert names(folder) == ["round-0002.safetensors.sealed", "round-0003.safetensors.sealed"]


def test_a_damaged_encrypted_state_is_passed_over_for_the_encrypted_one_before_it(tmp_path, key):
    folder = tmp_path / "checkpoints"
    for round_ in (1, 2):
        path = checkpoint.write(state(round_), folder, key)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert checkpoint.load(folder, RECIPE, key) == state(1)
