"""Damages small DICOM files at random and reads them, for a given time.

    python -m tests.fuzz.fuzz_imaging --seconds 600 --seed 1 --keep FOLDER

Whatever is in a file, reading must end with every file used once or refused, within the limits of time and memory;
and what is read from an undamaged header must be what pydicom reads. Files that break this are kept, and so is
the first of each kind that makes a decoder crash or go beyond its limits. Prints counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array

from common.imaging import FolderReading, RefusalCode, read_folder
from common.imaging.refusal import quiet
from common.imaging.worker import _CRASHED, _MEMORY, _SLOW
from tests.common.test_imaging_codecs import LOSSLESS, packed, picture
from tests.common.test_imaging_hostile import ct, radiograph
from tests.common.test_imaging_multiframe import enhanced
from tests.common.test_imaging_stacks import reconstruction

MOST_BYTES = 50_000
WALL_S = 60.0
CPU_S = 2.5
"""Of this process, for one small file."""
GROWTH_KIB = 300_000
"""Of this process, over the whole run."""
WORTH_KEEPING = (_CRASHED, _SLOW, _MEMORY)
_INTERESTING = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0xEFFFFFF0)


def seeds() -> list[bytes]:
    """Small valid files: each way of storing pixels, each kind of header."""
    made: list[Dataset] = [ct(0), reconstruction(), enhanced([0, 2, 4])]
    for syntax, encode in LOSSLESS.values():
        for dtype in ("u1", "i2"):
            values = picture(dtype, 256)
            made.append(packed(radiograph(values), encode(values), syntax))
    lossy = imagecodecs.jpeg8_encode(picture("u1", 256), level=80)
    made.append(packed(radiograph(picture("u1", 256)), lossy, uid.JPEGBaseline8Bit))
    frames = [imagecodecs.jpegls_encode(picture("u2", 4096)) for _ in range(3)]
    several = enhanced([0, 2, 4])
    several.Rows, several.Columns, several.PixelData = 37, 51, encapsulate(frames)
    several["PixelData"].VR = "OB"
    several["PixelData"].is_undefined_length = True
    several.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    made.append(several)
    table = Dataset()
    table.add_new(0x00283002, "US", [4, 0, 16])
    table.add_new(0x00283006, "US", [10, 500, 3000, 65535])
    table.ModalityLUTType = "OD"
    made.append(radiograph(np.array([[0, 1], [2, 3]], np.uint8), ModalityLUTSequence=[table], VOILUTSequence=[table]))
    files = []
    for dataset in made:
        for syntax in (None, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian):
            if syntax is not None and dataset.file_meta.TransferSyntaxUID.is_encapsulated:
                continue
            dataset.file_meta.TransferSyntaxUID = syntax or dataset.file_meta.TransferSyntaxUID
            files.append(_saved(dataset))
    for name in _pydicom_files():
        if name.stat().st_size > MOST_BYTES:
            continue
        files.append(name.read_bytes())
        with quiet():
            try:
                dataset = pydicom.dcmread(name)
                dataset.SOPClassUID, dataset.Modality = uid.ComputedRadiographyImageStorage, "CR"
                dataset.ImageType = ["ORIGINAL", "PRIMARY"]
                out = io.BytesIO()
                dataset.save_as(out)
                files.append(out.getvalue())
            except Exception:
                continue
    return sorted(set(files))


def _saved(dataset: Dataset) -> bytes:
    out = io.BytesIO()
    plain = dataset.file_meta.TransferSyntaxUID == uid.ImplicitVRLittleEndian
    dataset.save_as(out, implicit_vr=plain, little_endian=True, enforce_file_format=True)
    return out.getvalue()


def _pydicom_files() -> list[Path]:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def worth(files: list[bytes], folder: Path) -> list[int]:
    """Those that are read, or would be in company: damage in them is looked at by more code."""
    found = []
    for at, content in enumerate(files):
        (folder / "0").write_bytes(content)
        reading = read_folder(folder)
        if not reading.refused or reading.refused[0].code == RefusalCode.SINGLE_SLICE:
            found.append(at)
    return found


def damage(raw: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to eight random changes, many of them in the header."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        if len(data) < 16:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(min(len(data), 1500))
        rng.choice(_CHANGES)(data, at, others, rng)
        del data[2 * MOST_BYTES :]
    return bytes(data)


Change = Callable[[bytearray, int, list[bytes], random.Random], None]


def _flip(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    data[at] = rng.randrange(256)


def _number(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    size, value = rng.choice((2, 4)), rng.choice(_INTERESTING)
    data[at : at + size] = (value & (256**size - 1)).to_bytes(size, rng.choice(("little", "big")))  # type: ignore[arg-type]


def _cut(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    del data[at:]


def _remove(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 2, 4, 8, 64))]


def _double(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    piece = data[at : at + rng.choice((1, 2, 8, 12, 64))]
    data[at:at] = piece * rng.choice((1, 1, 2, 500))


def _splice(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other))
    data[at : at + rng.choice((0, 64))] = other[start : start + rng.choice((8, 64, 512, 4096))]


def _element(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    """Changes the value of an element that counts, wherever it is."""
    group, element, vr = rng.choice(_ELEMENTS)
    found = data.find(struct.pack("<HH", group, element))
    if found < 0 or found + 8 > len(data):
        return
    start = found + 8
    if vr == "US":
        data[start : start + 2] = rng.choice((0, 1, 3, 8, 12, 16, 32, 255, 1024, 65535)).to_bytes(2, "little")
        return
    length = min(data[found + 6], 32)
    texts = (
        b"0",
        b"-1",
        b"1e30",
        b"nan",
        b"1e-300",
        b"\\\\",
        b"9" * 16,
        b"1.2.840.10008.1.2.4.90",
        b"\0",
        b"MONOCHROME1",
    )
    data[start : start + length] = rng.choice(texts)[:length].ljust(length, b" ")


def _syntax(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    found = data.find(b"\x02\x00\x10\x00UI")
    if 0 <= found < len(data) - 8:
        name = rng.choice([syntax for syntax, _ in LOSSLESS.values()] + list(uid.AllTransferSyntaxes)).encode()
        name += b"\0" * (len(name) % 2)
        length = data[found + 6]
        data[found + 6 : found + 8 + length] = len(name).to_bytes(2, "little") + name


_CHANGES: tuple[Change, ...] = (
    _flip, _flip, _byte, _byte, _number, _number, _cut, _remove, _double, _splice, _element, _element, _syntax
)  # fmt: skip
_ELEMENTS = (
    *((0x0028, element, "US") for element in (0x0002, 0x0006, 0x0010, 0x0011, 0x0100, 0x0101, 0x0102, 0x0103)),
    *((0x0028, element, "DS") for element in (0x0004, 0x0008, 0x0030, 0x1052, 0x1053)),
    (0x0020, 0x0032, "DS"), (0x0020, 0x0037, "DS"), (0x0028, 0x0120, "US"), (0x0008, 0x0016, "UI"),
)  # fmt: skip


def broken(folder: Path, reading: FolderReading) -> str:
    """What is wrong with a reading; empty if nothing."""
    items = (*reading.volumes, *reading.images)
    seen = [
        *(file for item in items for file in set(item.source.files)),
        *(refused.path for refused in reading.refused),
    ]
    if len(reading.volumes) > 1:
        seen = sorted(set(seen))
    if sorted(seen) != sorted(folder.iterdir()):
        return "a file is lost or used twice"
    for item in items:
        values = item.values_ZYX if hasattr(item, "values_ZYX") else item.values_YX
        if values.dtype != np.float32 or not np.isfinite(values).all() or values.size == 0:
            return "values that are no finite numbers"
    for image in reading.images:
        with quiet():
            try:
                dataset = pydicom.dcmread(image.source.files[0], force=True)
                simple = (
                    dataset.PhotometricInterpretation == "MONOCHROME2"
                    and dataset.BitsStored <= 16
                    and ("RescaleSlope" in dataset) == ("RescaleIntercept" in dataset)  # pydicom wants both
                    and not any(
                        word in dataset for word in ("VOILUTSequence", "ModalityLUTSequence", "PixelPaddingValue")
                    )
                )
                want = apply_modality_lut(pixel_array(dataset), dataset).astype(np.float32) if simple else None
            except Exception:
                continue
        if want is not None and (want.shape != image.values_YX.shape or not np.allclose(want, image.values_YX, 1e-5)):
            return "other values than pydicom's"
    return ""


def _cpu_s() -> float:
    """Of this process and of the one that decodes for it."""

    def below(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # with children that have ended
        return own + sum(below(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    return below(os.getpid())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, required=True)
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    rng, files = random.Random(options.seed), seeds()
    counts: Counter[str] = Counter()
    start, kept = time.monotonic(), set[str]()
    begin_kib = 0
    folder = Path(tempfile.mkdtemp())
    good = worth(files, folder)
    stack = [_saved(ct(z)) for z in range(3)]
    slowest = 0.0
    while time.monotonic() - start < options.seconds:
        at = rng.choice(good) if rng.random() < 0.8 else rng.randrange(len(files))
        contents = stack if rng.random() < 0.15 else [files[at]]
        for number in range(3):
            if number < len(contents):
                content = (
                    damage(contents[number], files, rng) if number == 0 or rng.random() < 0.2 else contents[number]
                )
                (folder / str(number)).write_bytes(content)
            else:
                (folder / str(number)).unlink(missing_ok=True)
        cpu, wall, wrong = time.process_time(), time.monotonic(), ""
        try:
            reading = read_folder(folder)
        except Exception as error:
            reading, wrong = FolderReading((), (), ()), f"raised {type(error).__name__}"
        took_s = time.process_time() - cpu
        slowest = max(slowest, took_s)
        wrong = wrong or broken(folder, reading)
        if took_s > CPU_S or time.monotonic() - wall > WALL_S:
            wrong = wrong or "took too long"
        for refused in reading.refused:
            counts[str(refused.code)] += 1
            if refused.why in WORTH_KEEPING:
                wrong = wrong or f"worker {WORTH_KEEPING.index(refused.why)} seed {at}"
        counts["volumes"] += len(reading.volumes)
        counts["images"] += len(reading.images)
        counts["runs"] += 1
        if counts["runs"] == 200:
            begin_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if wrong:
            counts[f"kept: {wrong.partition(' seed')[0]}"] += 1
            if wrong not in kept:
                kept.add(wrong)
                for path in folder.iterdir():
                    name = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
                    shutil.copy(path, options.keep / f"{name}.bin")
                print(name, wrong, f"{took_s:.2f} s", flush=True)  # noqa: T201
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin_kib
    shutil.rmtree(folder)
    print(f"{counts['runs']} runs, {len(good)} of {len(files)} seeds are read, slowest {slowest:.2f} s CPU")  # noqa: T201
    print(f"{_cpu_s():.0f} s CPU in all processes, this one grown by {grown} KiB")  # noqa: T201
    for name, count in counts.most_common():
        print(f"{count:8} {name}")  # noqa: T201
    return int(grown > GROWTH_KIB or any("worker" not in name for name in counts if name.startswith("kept")))


if __name__ == "__main__":
    sys.exit(main())
