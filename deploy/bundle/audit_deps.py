"""`make audit-deps`: whether a version in requirements.lock has a known vulnerability.

Exit code 0: none known. 1: some, listed. 2: not every package could be asked about, so nothing is said. pip-audit
itself ends with 0 and "no known vulnerabilities" when the service knows none of the packages; nothing to check is no
pass here. Needs pip-audit and the internet: names and versions are sent to the advisory service, nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[2] / "requirements.lock"
_SHOWN = 10


def verdict(report: Mapping[str, Any], wanted: int) -> tuple[int, Sequence[str]]:
    """Exit code and lines for pip-audit's JSON report on so many packages."""
    packages = report.get("dependencies", [])
    asked = [package for package in packages if "skip_reason" not in package]
    found = []
    for package in asked:
        for bug in package.get("vulns", []):
            mended = ", ".join(bug["fix_versions"]) or "no version"
            found.append(f"{package['name']} {package['version']}: {bug['id']}, mended in {mended}")
    missing = [str(package["name"]) for package in packages if "skip_reason" in package]
    if len(asked) < wanted:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        found.append(
            f"only {len(asked)} of {wanted} packages could be asked about; not: {', '.join(missing[:_SHOWN])}{more}"
        )
        return 2, found
    return (1, found) if found else (0, [f"{len(asked)} packages, no known vulnerability"])


def main() -> int:
    """Asks, and says what came of it."""
    wanted = sum("==" in line for line in LOCK.read_text().splitlines())
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--no-deps", "--disable-pip"]
    done = subprocess.run(  # noqa: S603 - a fixed command, no shell
        [*command, "--format", "json", "--progress-spinner", "off", "--timeout", "30"], capture_output=True, text=True
    )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        report = {}
        sys.stderr.write(f"pip-audit: {said}\n")
    code, lines = verdict(report, wanted)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
