"""Which code this is: hashes of our own files and of the packages that decide what is trained."""

from __future__ import annotations

import csv
import functools
import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

from common.errors import StorageError
from common.storage import storing

ROOMS = ("common", "client", "server", "configs")
PACKAGES = ("flwr", "torch", "monai", "timm", "pydicom", "opacus", "cryptography")
_TOLD = ("fedicom", "flwr", "torch", "monai", "timm", "numpy", "pydicom")


@functools.cache  # of what this process runs, and each is a file of headers to be read
def package_versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that change numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in _TOLD}}


def code_hashes() -> Mapping[str, str]:
    """What is installed, for the audit log; the same files give the same hashes on any machine.

    Returns:
        Room to SHA-256 over the names and contents of its Python and YAML files, read now; of the rooms that are
        installed. Package to its version and the SHA-256 of what its RECORD says of its files: as they were
        installed, for reading all of torch again would take a minute. A package that is absent is left out.

    Raises:
        StorageError: A file cannot be read, or `common` itself is nowhere.
    """
    found: dict[str, str] = {}
    for room in ROOMS:
        spec = find_spec(room)
        if spec is not None and spec.origin is not None:
            found[room] = folder_hash(Path(spec.origin).parent)
    if "common" not in found:
        raise StorageError("the installed package cannot be found, so its code cannot be hashed; install it again")
    for name in PACKAGES:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        record = package.read_text("RECORD") or ""
        found[name] = f"{package.version} {record_hash(record.splitlines())}"
    return found


def folder_hash(folder: Path) -> str:
    """SHA-256 over the Python and YAML files below, in order of name."""
    state = hashlib.sha256()
    with storing("the installed code"):
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
            if path.suffix in (".py", ".yaml") and path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                state.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return state.hexdigest()


def record_hash(lines: Iterable[str]) -> str:
    """SHA-256 over the files that a RECORD lists with a hash; empty when it lists none.

    What an installer adds differs between machines and is left out: scripts, compiled files, its own notes.
    """

    def shipped(row: Sequence[str]) -> bool:
        return len(row) == 3 and bool(row[1]) and not row[0].startswith(("..", "/")) and ".dist-info/" not in row[0]

    rows = sorted(f"{row[0]}\0{row[1]}\n" for row in csv.reader(lines) if shipped(row))
    return hashlib.sha256("".join(rows).encode()).hexdigest() if rows else ""
