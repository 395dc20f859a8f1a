"""Rows on disk: what is written comes back, what was changed does not."""

from __future__ import annotations

import io
import stat
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, StorageError
from common.shard import (
    Appender,
    Batches,
    Form,
    Rows,
    Storage,
    check_half,
    open_text,
    read_secret,
    seal_text,
    widened,
    write_rows,
)

SECRET = bytes(range(32))
X_N = np.arange(5 * 24, dtype=np.float32).reshape(5, 1, 4, 6) / 7
FORMS = [
    Form((1, 4, 6)),
    Form((1, 4, 6), "float16"),
    Form((1, 4, 6), "float32", SECRET),
    Form((1, 4, 6), "float16", SECRET),
]


def write(path: Path, form: Form, x_N: np.ndarray = X_N) -> list[bytes]:
    with path.open("wb") as out:
        return list(write_rows(out, form, len(x_N), (row.astype(form.dtype).tobytes() for row in x_N)))


def whole(form: Form) -> np.ndarray:
    return X_N.astype(form.dtype).astype(np.float32)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.storage}{form.suffix}")
def test_rows_are_indexed_like_the_array_that_was_written(tmp_path: Path, form: Form) -> None:
    write(tmp_path / "x", form)
    rows = Rows(tmp_path / "x", form, 5)
    x_N = whole(form)
    assert (len(rows), rows.shape, rows.dtype) == (5, (5, 1, 4, 6), np.float32)
    chosen: Sequence[object] = [
        2, -1, slice(None), slice(1, 4, 2), [4, 0, 4], np.array([3, 1]), np.array([True, False, True, False, False]),
        (2, 0), (slice(1, 3), 0, 2), np.array([], np.int64),
    ]  # fmt: skip
    for each in chosen:
        got, expected = rows[each], x_N[each]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.concatenate([rows, rows]), np.concatenate([x_N, x_N]))
    with pytest.raises(IndexError):
        rows[5]
    rows[0][...] = -1  # a copy: what is stored stays
    np.testing.assert_array_equal(rows[0], x_N[0])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.storage}{form.suffix}")
def test_samples_are_read_into_the_batch_of_the_caller_as_they_are_stored(tmp_path: Path, form: Form) -> None:
    write(tmp_path / "x", form)
    batch = np.empty((2, 1, 4, 6), form.dtype)
    Rows(tmp_path / "x", form, 5).read_into(np.array([4, 1]), batch)
    np.testing.assert_array_equal(batch, X_N[[4, 1]].astype(form.dtype))
    with pytest.raises(ConfigError, match="the batch is float64"):
        Rows(tmp_path / "x", form, 5).read_into(np.array([4, 1]), batch.astype(np.float64))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.storage}{form.suffix}")
def test_batches_are_the_chosen_samples_in_memory_that_is_used_again(tmp_path: Path, form: Form) -> None:
    write(tmp_path / "x", form)
    rows = Rows(tmp_path / "x", form, 5)
    batches = Batches(rows)  # type: ignore[arg-type]
    first = batches(np.array([3, 0, 3]))
    np.testing.assert_array_equal(first, rows[[3, 0, 3]])
    assert np.shares_memory(first, batches(np.array([1])))
    np.testing.assert_array_equal(batches(np.array([2, 1])), rows[[2, 1]])
    assert batches(np.array([], np.int64)).shape == (0, *form.shape)
    plain = Batches(np.asarray(rows))
    np.testing.assert_array_equal(plain(np.array([4, 1])), rows[[4, 1]])


def test_a_plain_file_is_what_numpy_would_have_written(tmp_path: Path) -> None:
    write(tmp_path / "x.npy", FORMS[0])
    expected = io.BytesIO()
    np.lib.format.write_array(expected, X_N, version=(1, 0))
    assert (tmp_path / "x.npy").read_bytes() == expected.getvalue()


def test_an_encrypted_file_shows_no_row_and_each_writing_is_different(tmp_path: Path) -> None:
    form = FORMS[2]
    equal = np.zeros((5, 1, 4, 6), np.float32)
    write(tmp_path / "a", form, equal)
    write(tmp_path / "b", form, equal)
    first, second = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert len(first) == 32 + 5 * (12 + 96 + 16)
    assert b"\0" * 8 not in first
    records = {file[32 + at * 124 : 32 + (at + 1) * 124] for file in (first, second) for at in range(5)}
    assert len(records) == 10


@pytest.mark.parametrize("damage", ["bit", "swap", "other file", "cut", "other secret"])
def test_encrypted_rows_that_are_not_as_they_were_written_do_not_open(tmp_path: Path, damage: str) -> None:
    form, path = FORMS[2], tmp_path / "x"
    write(path, form)
    data = bytearray(path.read_bytes())
    record = slice(32 + 124, 32 + 2 * 124)  # the second row
    if damage == "bit":
        data[32 + 124 + 50] ^= 1
    elif damage == "swap":
        data[record], data[32:156] = data[32:156], data[record]
    elif damage == "other file":
        write(tmp_path / "y", form)
        data[record] = (tmp_path / "y").read_bytes()[record]
    elif damage == "cut":
        del data[-1]
    else:
        form = Form(form.shape, form.storage, bytes(32))
    path.write_bytes(data)
    with pytest.raises(StorageError, match="purge"):
        Rows(path, form, 5)[1]
    if damage in ("bit", "other file"):
        np.testing.assert_array_equal(Rows(path, form, 5)[0], X_N[0])


def test_a_small_text_opens_with_its_secret_only() -> None:
    sealed = seal_text(b"labels", SECRET)
    assert b"labels" not in sealed
    assert open_text(sealed, SECRET) == b"labels"
    for other, data in ((bytes(32), sealed), (SECRET, sealed[:-1]), (SECRET, b"short")):
        with pytest.raises(StorageError):
            open_text(data, other)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.storage}{form.suffix}")
def test_appended_rows_are_there_after_a_kill_and_half_a_row_is_not(tmp_path: Path, form: Form) -> None:
    rows = Appender(tmp_path / "x", form)
    for at in range(3):
        plain = rows.append(X_N[at])
        assert plain == X_N[at].astype(form.dtype).tobytes()
    rows.close()
    with (tmp_path / "x").open("ab") as file:
        file.write(b"half")
    again = Appender(tmp_path / "x", form)
    assert len(again) == 3
    again.truncate(3)
    again.append(X_N[3])
    assert [again.read(at) for at in range(4)] == [X_N[at].astype(form.dtype).tobytes() for at in range(4)]
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    again.close()


@pytest.mark.parametrize(("storage", "error"), [("float32", 0.0), ("float16", 2**-11)])
def test_half_precision_errs_by_less_than_one_of_2048_grey_levels(storage: Storage, error: float) -> None:
    mean, std = 0.5, 0.25
    grey = np.linspace(0, 1, 10001, dtype=np.float32)
    form = Form((10001,), storage)
    check_half(mean, std)
    row = ((grey - mean) / std).astype(form.dtype).tobytes()
    back = np.frombuffer(widened(row, form), "<f4") * std + mean
    assert np.abs(back - grey).max() <= error + 1e-6


@pytest.mark.parametrize(("mean", "std"), [(1.5, 1.0), (-0.1, 1.0), (0.5, 1e-6)])
def test_half_precision_is_refused_where_it_is_not_exact_enough(mean: float, std: float) -> None:
    with pytest.raises(ConfigError, match="store float32"):
        check_half(mean, std)


def test_the_secret_comes_from_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "cache.key"
    path.write_bytes(SECRET)
    path.chmod(0o644)
    with pytest.raises(StorageError, match="mode 644"):
        read_secret(str(path))
    path.chmod(0o600)
    assert read_secret(str(path)) == SECRET
    path.write_text(SECRET.hex() + "\n")
    assert read_secret(str(path)) == SECRET
    path.write_text("secret")
    with pytest.raises(ConfigError, match="expected 32 bytes, or 64 hexadecimal digits"):
        read_secret(str(path))


def test_the_secret_may_come_from_the_systems_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {("fedicom", "north"): SECRET.hex()}
    fake = types.ModuleType("keyring")
    fake.get_password = lambda service, name: entries.get((service, name))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", fake)
    assert read_secret("keyring:fedicom/north") == SECRET
    with pytest.raises(ConfigError, match="no such entry"):
        read_secret("keyring:fedicom/south")
    with pytest.raises(ConfigError, match="SERVICE/NAME"):
        read_secret("keyring:fedicom")
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(ConfigError, match="package keyring is not installed"):
        read_secret("keyring:fedicom/north")
