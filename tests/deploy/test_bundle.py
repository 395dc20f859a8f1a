"""The offline bundle: nothing is installed that is not whole, and an audit that asked nobody is no pass."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

BUNDLE = Path(__file__).parents[2] / "deploy" / "bundle"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BUNDLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(
    folder: Path, name: str, needs: str = "", program: str = "import sys\ndef main():\n    print(sys.argv[1])\n"
) -> Path:
    """A small wheel whose program `name` prints its first argument."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": program,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return path


@pytest.fixture
def bundle(tmp_path):
    """A whole bundle of two toy packages, one of which needs the other."""
    out = tmp_path / "bundle"
    (out / "wheels").mkdir(parents=True)
    wheel(out / "wheels", "fedicom", needs="Requires-Dist: helper==1.0\n")
    wheel(out / "wheels", "helper")
    (out / "requirements.txt").write_text(load("hashes").requirements(out / "wheels"))
    shutil.copy(BUNDLE / "install.sh", out / "install.sh")
    seal(out)
    return out


def seal(out: Path) -> None:
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(out)}\n" for path in files]
    (out / "SHA256SUMS").write_text("".join(lines))


def install(
    out: Path, into: Path, *, python: str | Path = sys.executable, umask: int = 0o022
) -> subprocess.CompletedProcess[str]:
    command, environment = ["sh", str(out / "install.sh"), str(into)], {"PATH": "/usr/bin:/bin"}
    return subprocess.run(
        command, capture_output=True, text=True, env={**environment, "FEDICOM_PYTHON": str(python)}, umask=umask
    )


def test_a_whole_bundle_is_installed_without_an_index(bundle, tmp_path):
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "version"  # what the toy says to `fedicom version`
    assert (tmp_path / "opt" / "bin" / "helper").is_file()


@pytest.mark.parametrize("file", ["wheels/helper-1.0-py3-none-any.whl", "requirements.txt", "install.sh"])
def test_one_changed_byte_and_nothing_is_installed(bundle, tmp_path, file):
    with (bundle / file).open("ab") as out:
        out.write(b"\n")
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 1
    assert "this bundle is not whole" in done.stderr
    assert not (tmp_path / "opt").exists()


def test_a_missing_wheel_and_nothing_is_installed(bundle, tmp_path):
    (bundle / "wheels" / "helper-1.0-py3-none-any.whl").unlink()
    assert install(bundle, tmp_path / "opt").returncode == 1
    assert not (tmp_path / "opt").exists()


def test_a_wheel_with_another_hash_than_the_list_has_is_not_installed(bundle, tmp_path):
    with zipfile.ZipFile(bundle / "wheels" / "helper-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("more.py", "")
    seal(bundle)  # whoever changed it made the sums new, but not the list of hashes
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 1
    assert "not installed" in done.stderr
    assert not (tmp_path / "opt").exists()


def test_an_installation_that_is_there_is_left_alone(bundle, tmp_path):
    (tmp_path / "opt").mkdir()
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 1
    assert list((tmp_path / "opt").iterdir()) == []


def test_an_attempt_that_fails_at_its_last_step_leaves_nothing_and_the_next_one_goes_through(bundle, tmp_path):
    broken = shutil.copytree(bundle, tmp_path / "broken")
    wheel(broken / "wheels", "fedicom", program="def main():\n    raise SystemExit(3)\n")
    (broken / "requirements.txt").write_text(load("hashes").requirements(broken / "wheels"))
    seal(broken)
    assert install(broken, tmp_path / "opt").returncode == 3  # of `fedicom version`, when all is installed
    assert not (tmp_path / "opt").exists()
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 0, done.stderr


def test_a_python_without_venv_and_a_cut_off_attempt_are_no_hindrance_to_the_next_one(bundle, tmp_path):
    without = tmp_path / "python-without-venv"  # as Debian's is without python3-venv: it makes the folder, then fails
    without.write_text('#!/bin/sh\nmkdir -p "$3/bin" && exit 1\n')
    without.chmod(0o755)
    assert install(bundle, tmp_path / "opt", python=without).returncode != 0
    assert not (tmp_path / "opt").exists()
    killed = tmp_path / "python-that-is-killed"  # with the shell, as by a power cut: nobody tidies up
    killed.write_text('#!/bin/sh\nmkdir -p "$3/bin" && kill -9 $PPID\n')
    killed.chmod(0o755)
    assert install(bundle, tmp_path / "opt", python=killed).returncode != 0
    assert (tmp_path / "opt" / "bin").is_dir()
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "opt").glob(".fedicom*")) == []


def test_another_user_than_who_installs_can_run_it_whatever_the_installers_umask(bundle, tmp_path):
    done = install(bundle, tmp_path / "opt", umask=0o077)
    assert done.returncode == 0, done.stderr
    for path in ("", "bin", "bin/fedicom", "bin/helper"):
        assert (tmp_path / "opt" / path).stat().st_mode & 0o055 == 0o055, path


def test_an_upgrade_is_installed_beside_the_old_one_and_a_link_says_which_is_in_use(bundle, tmp_path):
    place, old, new = tmp_path / "fedicom", tmp_path / "fedicom-1", tmp_path / "fedicom-2"
    for folder in (old, new, old):  # an upgrade, and the way back
        if not folder.exists():
            assert install(bundle, folder).returncode == 0
        subprocess.run(["ln", "-sfT", folder, place], check=True)
        done = subprocess.run([place / "bin" / "fedicom", "hello"], capture_output=True, text=True, env={})
        assert (done.returncode, done.stdout) == (0, "hello\n")
        assert f"#!{folder}/bin/python" in (place / "bin" / "fedicom").read_text()  # a process stays with what it began
    assert install(bundle, place).returncode == 1


def test_the_list_has_each_wheel_once_with_its_hash(tmp_path):
    path = wheel(tmp_path, "helper")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load("hashes").requirements(tmp_path).splitlines()[1:] == [f"helper==1.0 --hash=sha256:{digest}"]
    path.rename(tmp_path / "helper-1.1-py3-none-any.whl")
    wheel(tmp_path, "helper")
    with pytest.raises(SystemExit, match="two wheels of helper"):
        load("hashes").requirements(tmp_path)


def test_an_empty_folder_is_no_list(tmp_path):
    with pytest.raises(SystemExit, match="no wheels"):
        load("hashes").requirements(tmp_path)


SAFE = {"name": "pydicom", "version": "3.0.2", "vulns": []}
BAD = {"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize(
    ("packages", "wanted", "code", "says"),
    [
        ([SAFE], 1, 0, "1 packages, no known vulnerability"),
        ([SAFE, BAD], 2, 1, "pillow 1.0: PYSEC-1, mended in 1.1, 2.0"),
        ([SAFE, UNKNOWN], 2, 2, "only 1 of 2 packages could be asked about; not: torch"),
        ([], 1, 2, "only 0 of 1 packages could be asked about; not: "),
        ([BAD, UNKNOWN], 2, 2, "pillow 1.0: PYSEC-1, mended in 1.1, 2.0"),
    ],
)
def test_only_an_audit_that_asked_about_every_package_is_a_pass(packages, wanted, code, says):
    found, lines = load("audit_deps").verdict({"dependencies": packages}, wanted)
    assert (found, lines[0]) == (code, says)


def test_the_bill_of_materials_is_checked_and_names_no_path(tmp_path):
    tool = Path(sys.executable).with_name("cyclonedx-py")
    out = tmp_path / "sbom.cdx.json"
    command = ["sh", str(BUNDLE / "sbom.sh"), sys.executable, str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"CYCLONEDX": str(tool), "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    plain = json.loads(out.read_text())
    assert (plain["bomFormat"], plain["specVersion"]) == ("CycloneDX", "1.6")
    assert plain["metadata"]["component"]["name"] == "fedicom"
    names = {component["name"].lower() for component in plain["components"]}
    assert {"torch", "flwr", "pydicom", "cryptography"} <= names
    assert "file:" not in out.read_text()
