"""Prints a requirements file of all wheels in a folder, each with its SHA-256: `hashes.py FOLDER`."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path


def requirements(folder: Path) -> str:
    """One line a wheel, sorted by name; a name that comes twice is an error, for pip could take either."""
    found: dict[str, str] = {}
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if name in found:
            raise SystemExit(f"two wheels of {name}; expected one, remove the other")
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = f"{name}=={version} --hash=sha256:{digest}"
    if not found:
        raise SystemExit("no wheels there")
    head = f"# for Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return "\n".join([head, *found.values(), ""])


if __name__ == "__main__":
    sys.stdout.write(requirements(Path(sys.argv[1])))
