"""The process that may die: what kills it is a refusal here, and the next file is read as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import uid

from common.errors import DataError
from common.imaging import RefusalCode, read_folder
from common.imaging.header import TAGS, limits_of, read_header
from common.imaging.layout import layout_of
from common.imaging.refusal import Refusal
from common.imaging.worker import CPU_S, Limits, ask
from tests.common.test_imaging_codecs import jpeg2000, packed, picture
from tests.common.test_imaging_hostile import all_refused, radiograph, write
from tests.common.test_imaging_multiframe import enhanced

ROOT = Path(__file__).parents[2]
GENEROUS = Limits(60.0, 2**30, 2**28)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in text for child in path.read_text().split()]


def decoders() -> list[int]:
    """The processes in which decoding happens: children of our children."""
    return [inner for child in children(os.getpid()) for inner in children(child)]


def large(folder: Path) -> Path:
    """An image that takes about half a second to decode."""
    noise, frame = _noise()
    return write(folder, packed(radiograph(noise), frame, uid.JPEG2000Lossless)) / "000.dcm"


@cache
def _noise() -> tuple[NDArray[np.uint8], bytes]:
    noise = np.random.default_rng(1).integers(0, 256, (1536, 1536)).astype(np.uint8)
    return noise, jpeg2000(noise)


def small(folder: Path) -> Path:
    values = picture("u1", 256)
    return write(folder, packed(radiograph(values), jpeg2000(values), uid.JPEG2000Lossless)) / "000.dcm"


def unpack(path: Path, limits: Limits) -> int:
    """Decodes one image in the worker; the number of its pixels."""
    dataset, element = read_header(path, TAGS)
    layout = layout_of(dataset, element)
    ((_, raw),) = ask("unpack", limits, path=os.fspath(path), layout=asdict(layout), frames=[0])
    return len(raw)


def busy(pid: int) -> int:
    """CPU time in hundredths of a second."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])
    except (OSError, IndexError):
        return 0


@contextmanager
def hit(number: signal.Signals, *, times: int = 1) -> Iterator[list[int]]:
    """Sends a signal to each decoder that has begun to work on what follows, up to so many of them."""
    before = {pid: busy(pid) for pid in decoders()}
    struck: list[int] = []
    done = threading.Event()

    def strike() -> None:
        while not done.is_set() and len(struck) < times:
            for pid in decoders():
                if pid not in struck and busy(pid) >= before.get(pid, 0) + 5:
                    struck.append(pid)
                    os.kill(pid, number)
            time.sleep(0.005)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield struck
    finally:
        done.set()
        thread.join()


def test_a_decoder_that_was_killed_between_two_files_costs_neither_of_them(tmp_path: Path) -> None:
    path = small(tmp_path)
    for _ in range(3):
        assert unpack(path, GENEROUS) == 37 * 51
        for pid in decoders():
            os.kill(pid, signal.SIGKILL)
    assert unpack(path, GENEROUS) == 37 * 51


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_decoder_that_crashes_refuses_its_file_alone(tmp_path: Path, number: signal.Signals) -> None:
    path = large(tmp_path / "large")
    with hit(number) as struck:
        (refused,) = read_folder(path.parent).refused
    assert len(struck) == 1
    assert refused.code == RefusalCode.CORRUPT
    assert len(read_folder(small(tmp_path / "small").parent).images) == 1
    assert len(read_folder(path.parent).images) == 1


def test_a_decoder_killed_from_outside_is_tried_once_more_and_then_its_file_is_refused(tmp_path: Path) -> None:
    path = large(tmp_path)
    with hit(signal.SIGKILL) as struck:
        assert len(read_folder(tmp_path).images) == 1
    assert len(struck) == 1
    with hit(signal.SIGKILL, times=2) as struck:
        (refused,) = read_folder(path.parent).refused
    assert len(struck) == 2
    assert refused.code == RefusalCode.TOO_LARGE


def test_a_decoder_beyond_its_time_or_its_memory_refuses_its_file(tmp_path: Path) -> None:
    path = large(tmp_path)
    with pytest.raises(Refusal) as slow:
        unpack(path, GENEROUS._replace(cpu_s=0.05))
    assert slow.value.code == RefusalCode.TOO_SLOW
    with pytest.raises(Refusal) as big:
        unpack(path, GENEROUS._replace(memory_bytes=2**22))
    assert big.value.code in (RefusalCode.TOO_LARGE, RefusalCode.CORRUPT)
    assert unpack(path, GENEROUS) == 1536 * 1536


def test_a_decoder_that_stands_still_is_given_up(tmp_path: Path) -> None:
    path = large(tmp_path)
    with hit(signal.SIGSTOP) as struck, pytest.raises(Refusal) as stood:
        unpack(path, GENEROUS._replace(cpu_s=0.2))
    assert len(struck) == 1
    assert stood.value.code == RefusalCode.TOO_SLOW
    for _ in range(500):  # a killed process is there a little longer
        if not Path(f"/proc/{struck[0]}/cmdline").exists() or not Path(f"/proc/{struck[0]}/cmdline").read_bytes():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the decoder is still there")
    assert unpack(path, GENEROUS) == 1536 * 1536


def test_a_decoder_that_says_more_than_it_may_is_given_up(tmp_path: Path) -> None:
    path = small(tmp_path)
    with pytest.raises(Refusal):
        unpack(path, GENEROUS._replace(part_bytes=100))
    assert unpack(path, GENEROUS) == 37 * 51


def test_a_forked_process_decodes_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = small(tmp_path)
    assert unpack(path, GENEROUS) == 37 * 51
    pid = os.fork()
    if pid == 0:
        os._exit(int(unpack(path, GENEROUS) != 37 * 51))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert unpack(path, GENEROUS) == 37 * 51


def test_the_decoders_end_when_the_process_that_needs_them_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from common.imaging.volume import read_folder\n"
        "assert len(read_folder(Path(sys.argv[2])).images) == 1; print('ready', flush=True); time.sleep(60)"
    )
    folder = small(tmp_path).parent
    with subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        family = [child for pid in children(process.pid) for child in (pid, *children(pid))]
        assert len(family) == 2
        process.kill()
    for _ in range(600):
        states = {state for pid in family if (state := state_of(pid))}
        if states <= {"Z"}:
            break
        time.sleep(0.05)
    assert states <= {"Z"}


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_a_machine_on_which_no_decoder_starts_is_an_error_and_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small(tmp_path).parent
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="did not start"):  # a thread has its own
        pool.submit(read_folder, folder).result()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="did not start"):
        pool.submit(read_folder, folder).result()


def test_reading_uncompressed_files_starts_no_process(tmp_path: Path) -> None:
    write(tmp_path, radiograph(picture("u1", 256)))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from common.imaging.volume import read_folder\n"
        "assert len(read_folder(Path(sys.argv[2])).images) == 1\n"
        "import os; print(Path(f'/proc/self/task/{os.getpid()}/children').read_text())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], capture_output=True, check=True)
    assert done.stdout.split() == []


# --- headers made to harm

META = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"
DEFLATED_META = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
CT_CLASS = b"\x08\x00\x16\x00UI\x1a\x001.2.840.10008.5.1.4.1.1.2\x00"
SEQUENCE, ITEM = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"


def deflated(content: bytes) -> bytes:
    pack = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return pack.compress(content) + pack.flush()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "declares gigabytes": lambda: META + CT_CLASS + b"\x10\x00\x20\x00UT\x00\x00\xf0\xff\xff\xef" + bytes(99),
    "declares gigabytes of what is passed over": lambda: META + CT_CLASS
    + b"\x08\x00\x18\x00UN\x00\x00\xf0\xff\xff\xff",
    "nests 10,000 sequences": lambda: META + CT_CLASS + (SEQUENCE + ITEM) * 10_000,
    "nests 10,000 unknowns": lambda: META + CT_CLASS + (SEQUENCE.replace(b"SQ", b"UN") + ITEM) * 10_000,
    "nests 10,000 items of declared length": lambda: META + CT_CLASS + nested(10_000),
    "holds 100,000 empty items": lambda: META + CT_CLASS + SEQUENCE + b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * 100_000,
    "repeats an element 100,000 times": lambda: META + CT_CLASS + b"\x08\x00\x20\x00DA\x00\x00" * 100_000,
    "never ends its private element": lambda: META + CT_CLASS
    + b"\x09\x00\x01\x10OB\x00\x00\xff\xff\xff\xff" + bytes(3 * 2**20),
    "has a wanted value of 2 MiB": lambda: META + CT_CLASS
    + b"\x10\x00\x20\x00UT\x00\x00\x00\x00\x20\x00" + b"9" * 2**21,
    "unpacks to 80 MiB": lambda: DEFLATED_META + deflated(CT_CLASS + bytes(80 * 2**20)),
    "unpacks to a value of 80 MiB": lambda: DEFLATED_META
    + deflated(CT_CLASS + b"\x10\x00\x20\x00UT\x00\x00\x00\x00\x00\x05" + b"9" * (80 * 2**20)),
}  # fmt: skip


def nested(depth: int) -> bytes:
    inner, parts = 0, []
    for _ in range(depth):
        parts.append(b"\x08\x00\x40\x11SQ\x00\x00" + (inner + 8).to_bytes(4, "little")
                     + b"\xfe\xff\x00\xe0" + inner.to_bytes(4, "little"))  # fmt: skip
        inner += 20
    return b"".join(reversed(parts))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_would_eat_time_or_memory_is_refused_at_little_cost(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + HOSTILE[name]())
    tracemalloc.start()
    try:
        (refused,) = read_folder(tmp_path).refused
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.code in (
        RefusalCode.CORRUPT, RefusalCode.MISSING_HEADER, RefusalCode.TOO_LARGE, RefusalCode.TOO_SLOW
    )  # fmt: skip
    assert peak < 2**26


def test_the_limits_of_a_small_file_are_two_seconds_and_a_few_times_its_size() -> None:
    assert Limits.header(2**20).cpu_s < CPU_S + 0.2
    assert Limits.header(2**20).memory_bytes == 2**26 + 2**22
    slice_of_ct = Limits.pixels(2**18, 2**19, 2**19)
    assert slice_of_ct.cpu_s < CPU_S + 0.2
    assert slice_of_ct.memory_bytes < 2**26 + 5 * 2**20


def test_a_header_has_time_for_every_frame_within_what_its_bytes_could_hold() -> None:
    """pydicom takes up to 5 ms and 40 KB for what a scanner says of one frame: 4000 of them are no attack."""
    mib = 2**20
    assert Limits.header(4 * mib, frames=1000) == (2 + 10 + 0.5, (64 + 16 + 62.5) * mib, 0)
    assert Limits.header(4 * mib, frames=4000) == (2 + 16 + 0.5, (64 + 16 + 128) * mib, 0)
    assert Limits.header(mib // 4, frames=10**9) == (2 + 1 + 1 / 32, (64 + 1 + 8) * mib, 0)
    assert Limits.header(64 * mib, frames=10**9) == (2 + 60 + 8, (64 + 256 + 1024) * mib, 0)


def test_the_frames_that_a_file_declares_are_known_before_it_is_read(tmp_path: Path) -> None:
    many = enhanced([float(mm) for mm in range(60)])
    path = write(tmp_path, many) / "000.dcm"
    size = path.stat().st_size
    assert limits_of(path) == Limits.header(size, frames=60) != Limits.header(size)
    path.write_bytes(b"no DICOM" * 40)
    assert limits_of(path) == Limits.header(320)


def test_a_few_bytes_cannot_ask_for_a_large_picture(tmp_path: Path) -> None:
    """64 MiB are the most that a small file may unpack to, however well it is compressed."""
    blank = np.zeros((9000, 8000), np.uint8)
    frame = imagecodecs.jpeg2k_encode(blank, level=0, reversible=True, codecformat="j2k")
    write(tmp_path, packed(radiograph(blank), frame, uid.JPEG2000Lossless))
    assert (tmp_path / "000.dcm").stat().st_size < 2**20
    assert all_refused(read_folder(tmp_path)) == {RefusalCode.TOO_LARGE}
