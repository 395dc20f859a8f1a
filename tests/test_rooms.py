"""The house itself: which room may import what, and what may stand in no file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("common", "client", "server", "simulations")
TOP_LEVEL = (*ROOMS, "configs", "fedicom")
FILES = sorted([ROOT / "fedicom.py", *(path for room in (*ROOMS, "configs") for path in (ROOT / room).rglob("*.py"))])


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names that a file imports anywhere, inside functions as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def importers(*packages: str) -> set[str]:
    return {module(path) for path in FILES if {name.partition(".")[0] for name in imports(path)} & set(packages)}


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_each_top_level_name_comes_from_this_repository_or_this_distribution(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    origin = Path(spec.origin).resolve()
    try:
        own = {Path(str(file.locate())).resolve() for file in distribution("fedicom").files or ()}
    except PackageNotFoundError:
        own = set()
    assert origin.is_relative_to(ROOT) or origin in own


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_no_other_distribution_owns_a_top_level_name_of_ours(name):
    assert set(packages_distributions().get(name, ())) <= {"fedicom"}


def test_rooms_import_only_downwards():
    check = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " kept, 0 broken" in done.stdout


def test_a_simulation_starts_without_what_reads_dicom_exports_and_audits():
    heavy = ("pydicom", "highdicom", "nibabel", "onnx", "onnxruntime", "scipy", "monai", "timm", "torchvision", "sympy")
    check = f"import sys, simulations.run; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_flower_is_only_in_the_shells():
    apps = {"client.app", "server.app", "server.aggregate", "simulations.grid", "simulations.on_ray", "simulations.run"}
    apps.add("common.wire")
    allowed = apps | {"client.link", "server.link"}  # the two that may touch its private modules
    assert importers("flwr") == allowed


def test_dicom_is_only_in_the_imaging_room_and_the_writer():
    found = importers("pydicom", "highdicom", "gdcm", "openjpeg")
    assert found
    assert {name for name in found if not name.startswith("common.imaging")} == {"simulations.dicom_writer"}


def test_nothing_can_be_unpickled_or_run_from_data():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
    assert importers(*forbidden) == set()


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_no_call_can_unpickle_or_run_text():
    calls = [
        (path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    wrong = []
    for path, call in calls:
        name = dotted(call.func)
        said = {word.arg: word.value for word in call.keywords}
        safe = isinstance(allow := said.get("allow_pickle"), ast.Constant) and allow.value is False
        unsafe = name in {"torch.load", "torch.hub.load", "eval", "exec", "yaml.load", "np.fromregex", "__import__"}
        if unsafe or (name in {"np.load", "np.save", "numpy.load", "np.lib.format.read_array"} and not safe):
            wrong.append(f"{module(path)}:{call.lineno} {name}")
    assert len(calls) > 1000  # the walk saw the code
    assert wrong == []


MAY_CONNECT = {
    "client.blobs": "asks the gateway for weights, and whether there is a message",
    "client.dicomweb": "asks the hospital's own archive, when a person pulls from it",
    "client.link": "SuperNode and runner, on loopback; the SuperNode calls the gateway",
    "client.reach": "preflight: asks the gateway, and whether anything else can be reached",
    "common.supervise": "looks for a free port of loopback",
    "server.cli": "asks the coordinator's own control API on loopback",
    "server.gateway": "the one open port",
    "server.link": "talks to the SuperLink on loopback",
    "simulations.grid": "the pipe to its own worker processes, which the system calls a pair of sockets",
}


def test_connections_are_opened_in_few_places_and_nothing_downloads():
    network = {"requests", "urllib3", "httpx", "aiohttp", "huggingface_hub", "socket", "ftplib", "smtplib"}
    standard = {module(path) for path in FILES if {"urllib.request", "http.client"} & imports(path)}
    assert importers(*network) | standard == set(MAY_CONNECT)
    downloads = re.compile(r"pretrained\s*=\s*True")
    assert not [module(path) for path in FILES if downloads.search(path.read_text())]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on():
    machine = re.compile(
        rb"(?<![\w.<>-])/(?:" + b"|".join((b"wor" + b"k", b"roo" + b"t", b"home/[a-z]+")) + rb")(?:/[\w.]|\b(?![/\w]))"
    )
    wrong = [path.relative_to(ROOT).as_posix() for path in tracked() if machine.search(path.read_bytes())]
    assert wrong == []


def test_no_file_of_the_rooms_is_longer_than_can_be_read_at_once():
    long = {module(path): lines for path in FILES if (lines := path.read_text().count("\n")) > 600}
    assert long == {}
