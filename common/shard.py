"""Prepared samples on disk: one memory-mapped file of equal rows, plain or encrypted, whole or half precision.

A row is one sample. Plain rows lie in a `.npy` file. Encrypted rows (AES-256-GCM) lie one behind the other, each with
a nonce and a tag of its own, so that one sample can be opened without the others; what is opened exists only in the
batch. The key of a file is derived from the site's secret and a random number in its first bytes, and each row is bound
to its place: rows that were exchanged, changed or taken from another file do not open.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import ConfigError, StorageError
from common.identity import read_private
from common.storage import private

Storage: TypeAlias = Literal["float32", "float16"]

SECRET_BYTES = 32
_MAGIC = b"fedicom samples1"
_SALT, _NONCE, _TAG = 16, 12, 16
_HEADER_BYTES = len(_MAGIC) + _SALT


@dataclass(frozen=True)
class Form:
    """How rows are kept."""

    shape: tuple[int, ...]
    """Of one sample: (1, *size)."""
    storage: Storage = "float32"
    secret: bytes | None = None
    """32 bytes; None: not encrypted."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<f4" if self.storage == "float32" else "<f2")

    @property
    def row_bytes(self) -> int:
        """Of one sample, not encrypted."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def record_bytes(self) -> int:
        """Of one sample in the file."""
        return self.row_bytes + (0 if self.secret is None else _NONCE + _TAG)

    @property
    def suffix(self) -> str:
        return ".npy" if self.secret is None else ".sealed"


class Rows:
    """Rows of a file, indexed like an array of float32 with shape (N, 1, *size); only what is asked for is read."""

    def __init__(self, path: Path, form: Form, count: int) -> None:
        """Maps the file.

        Raises:
            StorageError: It has another form, or the secret does not open it.
            OSError: It cannot be read.
        """
        self.form = form
        self.shape = (count, *form.shape)
        self.dtype = np.dtype(np.float32)
        self.ndim = len(self.shape)
        self._plain: npt.NDArray[Any] | None = None
        self._cipher: _Cipher | None = None
        if form.secret is None:
            # "c": torch warns of arrays that cannot be written, and what is written to this one stays in memory
            self._plain = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
            if self._plain.shape != self.shape or self._plain.dtype != form.dtype:
                raise StorageError("the cache of prepared samples has another form than its index says; purge it")
            return
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != _HEADER_BYTES + count * form.record_bytes:
                raise StorageError("the cache of prepared samples has another size than its index says; purge it")
            self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._cipher = _Cipher(form.secret, bytes(self._map[:_HEADER_BYTES]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any) -> npt.NDArray[np.float32]:
        """A copy of the chosen samples as float32; a sample that was changed on disk is a `StorageError`."""
        if isinstance(chosen, tuple):
            first, rest = chosen[0], chosen[1:]
            found = self[first]
            part: npt.NDArray[np.float32] = found[rest] if found.ndim < self.ndim else found[(slice(None), *rest)]
            return part
        places = np.arange(len(self))[chosen]
        single = places.ndim == 0
        batch = np.empty((places.size, *self.form.shape), np.float32)
        self.widen_into(places.reshape(-1), batch)
        return batch[0] if single else batch

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("these samples are read from a file; they cannot be an array without a copy")
        return self[:].astype(dtype or np.float32, copy=False)

    def read_into(self, chosen: npt.NDArray[np.int64], out_B: npt.NDArray[Any]) -> None:
        """Reads samples as they are stored into a batch (B, 1, *size) of the caller: nothing else is allocated.

        Raises:
            ConfigError: The batch has another shape or type than the stored samples.
        """
        if out_B.dtype != self.form.dtype or out_B.shape != (len(chosen), *self.form.shape):
            raise ConfigError(
                f"the batch is {out_B.dtype} of shape {out_B.shape}, expected {self.form.dtype} of shape "
                f"{(len(chosen), *self.form.shape)}"
            )
        self._into(chosen, out_B)

    def widen_into(self, chosen: npt.NDArray[np.int64], out_B: npt.NDArray[np.float32]) -> None:
        """Reads samples into a batch (B, 1, *size) of float32 of the caller, one behind the other."""
        if self.form.storage == "float32":
            self._into(chosen, out_B)
            return
        half_1 = np.empty((1, *self.form.shape), self.form.dtype) if self._plain is None else None
        for place, row in zip(chosen, out_B, strict=True):
            if half_1 is not None:
                self._into(place[None], half_1)
            _widen(half_1[0] if self._plain is None else self._plain[place], row)  # type: ignore[index]

    def _into(self, places: npt.NDArray[np.int64], out_B: npt.NDArray[Any]) -> None:
        for place, row in zip(places.tolist(), out_B, strict=True):
            if self._cipher is None:
                assert self._plain is not None
                row[...] = self._plain[place]
                continue
            start = _HEADER_BYTES + place * self.form.record_bytes
            self._cipher.open_into(self._map[start : start + self.form.record_bytes], place, _bytes(row))


class Batches:
    """Float32 batches of samples, in memory that is used again: a batch is gone when the next one is asked for.

    Fresh memory costs more than the samples themselves: the system hands it out page by page, filled with zeros.
    """

    def __init__(self, x_N: npt.NDArray[np.float32]) -> None:
        """Takes the samples of `common.samples.Samples`, whatever they are kept in."""
        self._x_N: Any = x_N
        self._room = np.empty((0, *x_N.shape[1:]), np.float32)

    def __call__(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(B, 1, *size)."""
        if len(chosen) > len(self._room):
            self._room = np.empty((len(chosen), *self._room.shape[1:]), np.float32)
        batch_B = self._room[: len(chosen)]
        if isinstance(self._x_N, Rows):
            self._x_N.widen_into(chosen, batch_B)
        else:
            for place, row in zip(chosen.tolist(), batch_B, strict=True):
                row[...] = self._x_N[place]
        return batch_B


class _Cipher:
    def __init__(self, secret: bytes, header: bytes) -> None:
        if header[: len(_MAGIC)] != _MAGIC:
            raise StorageError("the cache of prepared samples is no file of this version; purge it")
        salt = header[len(_MAGIC) :]
        self._key = AESGCM(HKDF(hashes.SHA256(), SECRET_BYTES, salt=salt, info=_MAGIC).derive(secret))

    def sealed(self, plain: bytes | memoryview, place: int) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._key.encrypt(nonce, plain, place.to_bytes(8, "little"))

    def open_into(self, record: bytes | memoryview, place: int, out: memoryview) -> None:
        try:
            self._key.decrypt_into(record[:_NONCE], record[_NONCE:], place.to_bytes(8, "little"), out)
        except InvalidTag:
            raise StorageError(
                "a prepared sample cannot be decrypted: the key is another one, or the cache was changed; give the "
                "right key, or remove the cache with `fedicom data cache purge`"
            ) from None


class Appender:
    """Rows in the order in which they come, in a file that may be taken up again after a kill."""

    def __init__(self, path: Path, form: Form) -> None:
        """Opens the file, or begins one.

        Raises:
            StorageError: It is there, and the secret is another one.
        """
        self.form, self.path = form, path
        self._file = open(path, "a+b", opener=private)  # noqa: SIM115
        self._cipher: _Cipher | None = None
        self._start = 0
        if form.secret is not None:
            self._start = _HEADER_BYTES
            if os.fstat(self._file.fileno()).st_size < _HEADER_BYTES:
                self._file.truncate(0)
                self._file.write(_MAGIC + os.urandom(_SALT))
                self._file.flush()
            self._cipher = _Cipher(form.secret, os.pread(self._file.fileno(), _HEADER_BYTES, 0))

    def __len__(self) -> int:
        """Rows that are there from beginning to end."""
        return max(0, os.fstat(self._file.fileno()).st_size - self._start) // self.form.record_bytes

    def truncate(self, rows: int) -> None:
        """Forgets what comes after this many rows: half a row, for example."""
        self._file.truncate(self._start + rows * self.form.record_bytes)

    def append(self, values: npt.NDArray[np.float32]) -> bytes:
        """Adds a sample, and returns its bytes as they are stored, before encryption."""
        plain = np.ascontiguousarray(values, dtype=self.form.dtype).tobytes()
        self._file.write(plain if self._cipher is None else self._cipher.sealed(plain, len(self)))
        self._file.flush()
        return plain

    def read(self, place: int) -> bytes:
        """The bytes of a sample, decrypted."""
        count = self.form.record_bytes
        record = os.pread(self._file.fileno(), count, self._start + place * count)
        if len(record) != count:
            raise StorageError("a prepared sample is not whole; run again")
        if self._cipher is None:
            return record
        plain = bytearray(self.form.row_bytes)
        self._cipher.open_into(record, place, memoryview(plain))
        return bytes(plain)

    def close(self) -> None:
        self._file.close()


def write_rows(out: BinaryIO, form: Form, count: int, rows: Iterator[bytes]) -> Iterator[bytes]:
    """Writes a file that `Rows` can map, and passes the plain rows on.

    Written, never mapped: on a full disk a mapped page kills the process instead of raising.
    """
    if form.secret is None:
        header = {"descr": form.dtype.str, "fortran_order": False, "shape": (count, *form.shape)}
        np.lib.format.write_array_header_1_0(out, header)
        for row in rows:
            out.write(row)
            yield row
        return
    head = _MAGIC + os.urandom(_SALT)
    cipher = _Cipher(form.secret, head)
    out.write(head)
    for place, row in enumerate(rows):
        out.write(cipher.sealed(row, place))
        yield row


def widened(row: bytes, form: Form) -> bytes | memoryview:
    """The row as float32, little endian."""
    if form.storage == "float32":
        return row
    return _bytes(np.frombuffer(row, form.dtype).astype("<f4"))


def seal_text(data: bytes, secret: bytes) -> bytes:
    """A small file, encrypted like a row."""
    head = _MAGIC + os.urandom(_SALT)
    return head + _Cipher(secret, head).sealed(data, 0)


def open_text(data: bytes, secret: bytes) -> bytes:
    """What `seal_text` sealed.

    Raises:
        StorageError: The secret is another one, or the file was changed.
    """
    plain = bytearray(max(0, len(data) - _HEADER_BYTES - _NONCE - _TAG))
    _Cipher(secret, data[:_HEADER_BYTES]).open_into(data[_HEADER_BYTES:], 0, memoryview(plain))
    return bytes(plain)


def check_half(mean: float, std: float) -> None:
    """Whether float16 is exact enough for intensities that were scaled to [0, 1] and normalised.

    Rounding errs by 2^-11 of a value. Black and white become -mean/std and (1-mean)/std, so in units of the range the
    error is at most 2^-11 times the larger of |mean| and |1 - mean|; up to 2^-11, one of 2,048 grey levels, is allowed.

    Raises:
        ConfigError: The error would be larger, or a value would overflow.
    """
    largest = max(abs(mean), abs(1 - mean))
    if largest > 1 or largest / std > 60000:
        raise ConfigError(
            f"data.mean={mean:g} and data.std={std:g} put the intensities where float16 is not exact enough; expected "
            "a mean from 0 to 1 and values below 60000; store float32"
        )


def read_secret(where: str | None, folder: Path = Path()) -> bytes | None:
    """The secret of the cache, 32 bytes; None where `where` is None.

    Args:
        where: The path of a file that only its owner can read, 32 bytes or 64 hexadecimal digits; or
            `keyring:SERVICE/NAME` for the keyring of the operating system, as 64 hexadecimal digits.
        folder: What a relative path is relative to.

    Raises:
        ConfigError: The package `keyring` is not installed, or the secret is none.
        StorageError: The file cannot be read, or others can read it.
    """
    if where is None:
        return None
    if not where.startswith("keyring:"):
        data = read_private(folder / where, "the key of the cache")
        return data if len(data) == SECRET_BYTES else _from_hex(data.decode("ascii", "replace"), "the key of the cache")
    service, slash, name = where.removeprefix("keyring:").partition("/")
    if not (service and slash and name):
        raise ConfigError("the key of the cache must be a file or keyring:SERVICE/NAME; check the setting")
    try:
        import keyring  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError(
            "the key of the cache is in the system's keyring, and the package keyring is not installed; "
            "install it, or keep the key in a file"
        ) from None
    try:
        found = keyring.get_password(service, name)
    except Exception as error:  # each backend has errors of its own
        raise ConfigError(
            f"the system's keyring does not answer ({type(error).__name__}); unlock it, or keep the key in a file"
        ) from None
    if found is None:
        raise ConfigError("the system's keyring has no such entry; store 64 hexadecimal digits under this name")
    return _from_hex(found, "the keyring's entry")


def _from_hex(digits: str, what: str) -> bytes:
    try:
        secret = bytes.fromhex(digits.strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{what} is no key; expected 32 bytes, or 64 hexadecimal digits")
    return secret


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.data.cast("B")


def _widen(half: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
    # torch uses the processor's own instruction; numpy takes eight times as long
    import torch

    torch.from_numpy(out).copy_(torch.from_numpy(half))
