"""How fast DICOM is read, indexed and prepared, beside MONAI and plain pydicom: tables and a JSON file.

    python benchmarks/dicom.py --out runs/dicom.json

Synthetic series are written into a temporary folder (2 GB) and removed. Every number is the median of three reads in a
process of its own, after one that is not counted (imports, decoders, fresh memory); the methods take turns, and the
median and the range over the rounds are shown. Files are in the page cache for all of them: disks are not compared.
CPU time counts a process and all of its children. Ratios are those of the medians. All readers must give the same
values, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

SLICES, SIZE = 200, 512
READS = 3
SAMPLES, EDGE, BATCH = 32, 96, 8
STUDIES = (1, 2, 4, 16)
KEY = b"a benchmark has no secrets"
SYNTAXES = {"raw": None, "JPEG-LS": "1.2.840.10008.1.2.4.80", "HTJ2K": "1.2.840.10008.1.2.4.201"}
METHODS = {
    "raw": ("monai", "pydicom", "volume", "first", "first, one thread", "index", "index, one thread"),
    "JPEG-LS": ("monai", "pydicom", "first", "first, one thread"),
    "HTJ2K": ("monai", "monai, faster codec", "first", "first, one thread"),
}
NAMES = {
    "monai": "MONAI PydicomReader",
    "monai, faster codec": "MONAI PydicomReader, given our HTJ2K codec",
    "pydicom": "pydicom + numpy",
    "volume": "Fedicom, file by file (`volume.read_folder`)",
    "first": "Fedicom, first read",
    "first, one thread": "Fedicom, first read, one thread",
    "index": "Fedicom, index warm",
    "index, one thread": "Fedicom, index warm, one thread",
}
TARGETS = (
    ("raw", "first", "monai", 5.0),
    ("raw", "first", "pydicom", 1.0),
    ("JPEG-LS", "first", "monai", 2.5),
    ("HTJ2K", "first", "monai", 2.5),
    ("raw", "index", "monai", 20.0),
)


def main() -> None:
    """Measures everything, or, called by itself, one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=100_000, help="small files for the index; 0 leaves that out")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(arguments.one[0], *map(Path, arguments.one[1:]))))
        return
    root = Path(tempfile.mkdtemp(prefix="fedicom-dicom-", dir=arguments.folder))
    try:
        found = _measure(root, arguments.rounds, arguments.files)
    finally:
        shutil.rmtree(root)
    text = json.dumps(found, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    print(table(found))


def _measure(root: Path, rounds: int, files: int) -> dict[str, Any]:
    print("writing series ...", file=sys.stderr)
    for name, syntax in SYNTAXES.items():
        _write(root / name / "big", syntax, SLICES)
    for patient in range(max(STUDIES)):
        _write_patient(root / "studies", patient)
    load_before = os.getloadavg()[0]
    reading: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in METHODS}
    for turn in range(rounds):
        for name, methods in METHODS.items():
            for method in methods:
                print(f"round {turn + 1} of {rounds}: {name}, {method} ...", file=sys.stderr)
                reading[name].setdefault(method, []).append(_run(f"read:{method}", root / name))
    for name, methods_of in reading.items():
        sums = {run["sum"] for runs in methods_of.values() for run in runs}
        assert max(sums) - min(sums) <= 1e-9 * max(map(abs, sums)), f"{name}: the readers disagree: {sums}"
    samples = [_run("samples", root) for _ in range(rounds)]
    memory = _memory_by_studies(root)
    return {
        "machine": _machine(),
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "slices": SLICES,
        "reading": reading,
        "samples": {name: [each[name] for each in samples] for name in samples[0]},
        "memory": memory,
        "index": _index(root, files) if files else None,
    }


def _memory_by_studies(root: Path) -> dict[str, dict[str, float]]:
    """Peak memory; preparing needs two classes, hence two studies."""
    found = {}
    for count in STUDIES:
        print(f"memory, {count} studies ...", file=sys.stderr)
        some = root / f"studies-{count}"
        (some / "dicom").mkdir(parents=True)
        for patient in range(count):
            (root / "studies" / "dicom" / str(patient)).rename(some / "dicom" / str(patient))
        labels = [f"P{patient},{('a', 'b')[patient % 2]}" for patient in range(count)]
        (some / "labels.csv").write_text("\n".join(["patient,label", *labels]) + "\n")
        whats = ("read", "prepare") if count > 1 else ("read",)
        found[str(count)] = {what: _run(f"memory:{what}", some)["peak_mb"] for what in whats}
        for patient in range(count):
            (some / "dicom" / str(patient)).rename(root / "studies" / "dicom" / str(patient))
    return found


def _run(what: str, *paths: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, "--one", what, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one(what: str, path: Path) -> dict[str, float]:
    kind, _, rest = what.partition(":")
    if kind == "samples":
        return _samples(path)
    if kind == "memory":
        return _memory(path, prepare=rest == "prepare")
    if kind == "refresh":
        return _refresh(path)
    read = _reader(rest, path)
    # the whole series: the first touch of gigabytes of memory costs a reader that needs them more than its reading does
    cold = time.perf_counter()
    total = float(read(path / "big").sum(dtype=np.float64))
    cold = time.perf_counter() - cold
    walls, cpus = [], []
    for _ in range(READS):
        wall, cpu = time.perf_counter(), _cpu_s()
        array = read(path / "big")
        wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
        walls.append(1e3 * wall / SLICES)
        cpus.append(1e3 * cpu / SLICES)
        assert sorted(array.shape) == [SLICES, SIZE, SIZE]
        del array
    return {
        "wall_ms": median(walls),
        "cpu_ms": median(cpus),
        "cold_wall_ms": 1e3 * cold / SLICES,
        "peak_mb": _peak_mb(),
        "sum": total,
    }


def _reader(method: str, path: Path) -> Callable[[Path], Any]:
    name, _, how = method.partition(", ")
    if name == "monai":
        if path.name == "HTJ2K":
            _teach_pydicom_htj2k("htj2k" if how else "jpeg2k")
        from monai.data.image_reader import PydicomReader

        def monai(folder: Path) -> Any:
            reader = PydicomReader()
            return np.asarray(reader.get_data(reader.read(folder))[0])

        return monai
    if name == "pydicom":
        import pydicom

        def plain(folder: Path) -> Any:
            slices = [pydicom.dcmread(file) for file in folder.iterdir()]
            slices.sort(key=lambda each: float(each.ImagePositionPatient[2]))
            return np.stack(
                [
                    each.pixel_array * np.float32(each.RescaleSlope) + np.float32(each.RescaleIntercept)
                    for each in slices
                ]
            )

        return plain
    from common.imaging import fastread, volume
    from common.imaging.index import Index

    jobs = 1 if how else None
    if name == "volume":
        return lambda folder: volume.read_folder(folder).volumes[0].values_ZYX
    if name == "first":
        return lambda folder: fastread.read_folder(folder, jobs=jobs).volumes[0].values_ZYX
    with Index(path / "big", path / "cache") as index:
        index.refresh()

    def indexed(folder: Path) -> Any:
        with Index(folder, path / "cache") as index:
            return fastread.read_folder(folder, index=index, jobs=jobs).volumes[0].values_ZYX

    return indexed


def _teach_pydicom_htj2k(codec: str) -> None:
    """pydicom decodes HTJ2K with pylibjpeg-openjpeg; where that is not installed it gets OpenJPEG from imagecodecs."""
    import imagecodecs
    from pydicom import uid
    from pydicom.pixels.decoders.base import get_decoder

    decoder = get_decoder(uid.HTJ2KLossless)
    if decoder.is_available and codec == "jpeg2k":
        return
    decode = getattr(imagecodecs, f"{codec}_decode")

    def decode_frame(frame: bytes, runner: Any) -> bytearray:
        runner.set_option("bits_allocated", 16)
        return bytearray(decode(frame).astype(f"<{'i' if runner.pixel_representation else 'u'}2").tobytes())

    decoder._available = {codec: decode_frame}
    decoder._unavailable = {}


def _samples(root: Path) -> dict[str, float]:
    """CPU milliseconds a sample of 96^3, drawn at random in batches."""
    from common.shard import Batches, Form, Rows, write_rows

    random = np.random.default_rng(0)
    order = random.permutation(SAMPLES).reshape(-1, BATCH)
    found = {}
    forms = {
        "float16": Form((1, EDGE, EDGE, EDGE), "float16"),
        "float16, encrypted": Form((1, EDGE, EDGE, EDGE), "float16", bytes(32)),
        "float32": Form((1, EDGE, EDGE, EDGE), "float32"),
        "float32, encrypted": Form((1, EDGE, EDGE, EDGE), "float32", bytes(32)),
    }
    for name, form in forms.items():
        path = root / f"samples{form.suffix}"
        rows = (random.random(form.shape, np.float32).astype(form.dtype).tobytes() for _ in range(SAMPLES))
        with path.open("wb") as out:
            for _ in write_rows(out, form, SAMPLES, rows):
                pass
        shard = Rows(path, form, SAMPLES)
        batch = np.empty((BATCH, *form.shape), form.dtype)
        for chosen in order:
            shard.read_into(chosen, batch)
        cpu = time.process_time()
        for _ in range(3):
            for chosen in order:
                shard.read_into(chosen, batch)
        found[name] = 1e3 * (time.process_time() - cpu) / (3 * SAMPLES)
        batches = Batches(cast("Any", shard))  # as training reads them
        for chosen in order:
            batches(chosen)
        cpu = time.process_time()
        for _ in range(3):
            for chosen in order:
                batches(chosen)
        found[f"{name}, as float32 for training"] = 1e3 * (time.process_time() - cpu) / (3 * SAMPLES)
        path.unlink()
    return found


def _memory(folder: Path, *, prepare: bool) -> dict[str, float]:
    if prepare:
        from common.config import Preprocessing, Task
        from common.samples import prepare_folder

        with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
            data = Preprocessing(size=(EDGE,) * 3, intensity="window", low=-1000, high=1000)
            task = Task(key="patient", dimensions=3, classes=("a", "b"))
            made = prepare_folder(folder, task, data, cache=Path(cache), key=KEY, jobs=1)
            assert len(made.samples.x_N) == len(list((folder / "dicom").iterdir()))
    else:
        from common.imaging.fastread import iterate_folder
        from common.imaging.volume import Volume

        count = 0
        for item in iterate_folder(folder / "dicom"):
            count += isinstance(item, Volume)
            del item
        assert count == len(list((folder / "dicom").iterdir()))
    return {"peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """Of this process alone: ru_maxrss would be that of the parent, which a child inherits through exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _index(root: Path, files: int) -> dict[str, Any]:
    from simulations.dicom_writer import Machine, Subject, axial, write_series

    print(f"index: writing {files} small files ...", file=sys.stderr)
    stored = np.zeros((200, 8, 8), np.int16)
    for series in range(files // len(stored)):
        who = Subject(patient_id=f"P{series}", entropy=("benchmark",))
        place = root / "many" / str(series // 50) / str(series)
        write_series(place, stored, axial(stored.shape, (1, 1, 1)), Machine(modality="CT"), who)
    runs = [_run("refresh", root / "many") for _ in range(4)]
    return {"files": files // len(stored) * len(stored), "first": runs[0], "unchanged": runs[1:]}


def _refresh(folder: Path) -> dict[str, float]:
    from common.imaging.index import Index

    wall, cpu = time.perf_counter(), _cpu_s()
    with Index(folder, folder.parent / "index-cache") as index:
        examined = index.refresh().examined
    return {"wall_s": time.perf_counter() - wall, "cpu_s": _cpu_s() - cpu, "examined": examined}


def _cpu_s() -> float:
    """CPU time of this process and everything below it, ended or not; of the others in steps of 10 ms."""
    ticks = 0
    children: dict[int, list[tuple[int, int]]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append((int(path.name), sum(map(int, fields[11:15]))))
    below = [os.getpid()]
    while below:
        for pid, spent in children.get(below.pop(), []):
            ticks += spent
            below.append(pid)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def _values(slices: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """A body of water with a lung, a spine and the noise of a scanner, stored with an offset of 1024."""
    random = np.random.default_rng(1)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    body = np.where(np.hypot(x / 0.9, y / 0.7) < 1, 1064.0, 24.0)
    body[np.hypot((np.abs(x) - 0.4) / 0.3, y / 0.5) < 1] = 174.0
    body[np.hypot(x, y - 0.45) < 0.1] = 1500.0
    noise = random.normal(0, 12, (slices, SIZE, SIZE)).astype(np.float32)
    return np.clip(body[None] + noise, 0, 4095).astype(np.int16)


def _write(folder: Path, syntax: str | None, slices: int) -> None:
    from simulations.dicom_writer import Machine, Subject, axial, write_series

    stored = _values(slices)
    who = Subject(patient_id="P", entropy=("benchmark", folder.name))
    write_series(folder, stored, axial(stored.shape, (1.0, 0.7, 0.7)), Machine(modality="CT"), who, intercept="-1024")
    if syntax is None:
        return
    import imagecodecs
    import pydicom
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    for file in folder.iterdir():
        made = pydicom.dcmread(file)
        pixels = made.pixel_array.astype(np.uint16)
        if "4.80" in syntax:
            frame = imagecodecs.jpegls_encode(pixels)
        else:
            frame = imagecodecs.htj2k_encode(pixels, reversible=True)
        made.file_meta.TransferSyntaxUID = UID(syntax)
        made.PixelRepresentation, made.BitsStored, made.HighBit = 0, 16, 15
        made.PixelData = encapsulate([bytes(frame)])
        made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
        made.save_as(file)


def _write_patient(folder: Path, patient: int) -> None:
    from simulations.dicom_writer import Machine, Subject, axial, write_series

    stored = _values(80)
    who = Subject(patient_id=f"P{patient}", entropy=("benchmark",))
    place = folder / "dicom" / str(patient)
    write_series(place, stored, axial(stored.shape, (2.5, 0.7, 0.7)), Machine(modality="CT"), who, intercept="-1024")


def _machine() -> dict[str, Any]:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    packages = ("monai", "pydicom", "highdicom", "imagecodecs", "numpy", "torch", "cryptography")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
        **{name: version(name) for name in packages},
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"Load of the machine: {found['load']['before']:.1f} before, {found['load']['after']:.1f} after.", ""]
    for name, methods in found["reading"].items():
        lines += [f"| {name}, {SLICES} x {SIZE} x {SIZE} | wall ms a slice | CPU ms a slice | slices/s | peak MB |"]
        lines += ["|---|---|---|---|---|"]
        for method, runs in methods.items():
            wall, cpu = ([run[unit] for run in runs] for unit in ("wall_ms", "cpu_ms"))
            peak = f"{median(run['peak_mb'] for run in runs):,.0f}"
            lines += [f"| {NAMES[method]} | {_range(wall)} | {_range(cpu)} | {1e3 / median(wall):,.0f} | {peak} |"]
        lines += [""]
    lines += ["| ratio | target | wall | CPU |", "|---|---|---|---|"]
    for name, ours, theirs, target in TARGETS:
        ratio = [
            median(run[unit] for run in found["reading"][name][theirs])
            / median(run[unit] for run in found["reading"][name][ours])
            for unit in ("wall_ms", "cpu_ms")
        ]
        lines += [
            f"| {name}: {NAMES[ours]} against {NAMES[theirs]} | {target:g}x | {ratio[0]:.1f}x | {ratio[1]:.1f}x |"
        ]
    lines += ["", f"| one prepared sample of {EDGE}^3, batches of {BATCH} | CPU ms |", "|---|---|"]
    lines += [f"| {name} | {_range(values)} |" for name, values in found["samples"].items()]
    lines += ["", "| studies (80 x 512 x 512) | peak MB reading | peak MB preparing |", "|---|---|---|"]
    for count, peak in found["memory"].items():
        prepare = f"{peak['prepare']:,.0f}" if "prepare" in peak else "-"
        lines += [f"| {count} | {peak['read']:,.0f} | {prepare} |"]
    if found["index"]:
        index = found["index"]
        again = [run["wall_s"] for run in index["unchanged"]]
        cpu = [run["cpu_s"] for run in index["unchanged"]]
        lines += ["", f"| index of {index['files']:,} files | wall s | CPU s |", "|---|---|---|"]
        lines += [f"| first | {index['first']['wall_s']:.1f} | {index['first']['cpu_s']:.1f} |"]
        lines += [f"| nothing changed | {_range(again)} | {_range(cpu)} |"]
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
