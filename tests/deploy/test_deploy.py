"""The files of deploy/: hardened, pinned, without secrets, and accepted by the tools that read such files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from common.deployment import FederationPlan, ServerConfig, SiteConfig, read_yaml
from common.enrolment import site_yaml
from server.kit_contents import SERVER_YAML
from simulations.hospitals import site_names

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(
    path
    for path in DEPLOY.rglob("*")
    if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(DEPLOY).parts)
)
CONTAINERS = sorted((DEPLOY / "containers").glob("*.Containerfile"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PLAIN_YAML = [path for path in FILES if path.suffix in (".yaml", ".yml") and path.parent.name != "templates"]
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
VERBS = {"site": "site", "coordinator": "server"}
"""Whose file it is -> the word after `fedicom`."""


def side(path: Path) -> str:
    return re.split(r"[.-]", path.stem.removeprefix("fedicom-"))[0]


def tool(name: str) -> str:
    """A program of this environment or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def name(path: Path) -> str:
    return path.relative_to(DEPLOY).as_posix()


# The folder


def test_every_file_of_the_folder_is_named_on_its_page():
    text = (DEPLOY / "README.md").read_text()
    assert [name(path) for path in FILES if path.name != "README.md" and f"`{name(path)}`" not in text] == []


def test_every_file_that_the_page_names_is_there():
    text = (DEPLOY / "README.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(named) > 15
    assert [file for file in named if not (DEPLOY / file).is_file()] == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_holds_a_secret(path):
    text = path.read_text()
    assert "PRIVATE KEY" not in text
    assigned = re.findall(r"(?i)\b(?:password|token|secret|passphrase)\s*[:=]\s*[\"']?([A-Za-z0-9+/_-]{8,})", text)
    assert [value for value in assigned if re.search(r"\d", value)] == []
    assert re.findall(r"\b[0-9a-f]{40,}\b", text) == []


@pytest.mark.parametrize("path", PLAIN_YAML, ids=name)
def test_yaml_can_be_read(path):
    assert [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_image_floats(path):
    text = path.read_text()
    assert not re.search(r"[\w/]:latest\b", text)
    for image in re.findall(r"(?:^|[\s\"'=])((?:docker\.io|registry\.[\w.]+)/[\w./-]+:[\w.-]+)", text):
        assert re.search(r":v?\d+\.\d+\.\d+", image), image


def test_all_name_one_version_of_our_images():
    texts = [path.read_text() for path in FILES]
    found = {version for text in texts for version in re.findall(r"fedicom-(?:site|coordinator):([\w.-]+)", text)}
    charts = [yaml.safe_load(path.read_text()) for path in DEPLOY.glob("helm/*/Chart.yaml")]
    assert len(found) == 1
    assert found == {chart["appVersion"] for chart in charts}
    assert found == {tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["version"]}


# Containers


@pytest.mark.parametrize("path", CONTAINERS, ids=name)
def test_an_image_runs_as_a_number_that_is_not_root_from_a_pinned_base(path):
    lines = [line.strip() for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    (base,) = (line.partition("=")[2] for line in lines if line.startswith("ARG BASE="))
    assert re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-bookworm", base)
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"${BASE}"}
    last = lines[max(at for at, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert not any(line.startswith(("ADD ", "VOLUME ")) for line in lines)
    # What was built is taken over, and nothing of the folder that it was built in.
    assert [line for line in last if line.startswith("COPY")] == ["COPY --from=build /opt/fedicom /opt/fedicom"]
    assert last[-2:] == ['ENTRYPOINT ["fedicom"]', f'CMD ["{VERBS[side(path)]}", "start"]']
    assert [line for line in last if line.startswith("EXPOSE")] == (
        ["EXPOSE 8443"] if "coordinator" in path.name else []
    )


@pytest.mark.parametrize("path", CONTAINERS, ids=name)
def test_hadolint_has_nothing_to_say(path):
    done = subprocess.run([tool("hadolint"), "--no-color", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def let_in(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore leaves a file in the build: the last rule that speaks of it counts."""
    kept = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        parents = [path, *map(str, Path(path).parents)]
        if any(fnmatch(part, pattern) or fnmatch(f"/{part}", pattern.replace("**", "*")) for part in parents):
            kept = rule.startswith("!")
    return kept


def test_an_image_is_built_from_the_package_and_the_lock_alone():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    wanted = ["pyproject.toml", "requirements.lock", "README.md", "LICENSE", "fedicom.py", "configs/site/strict.yaml"]
    wanted += ["common/imaging/series.py", "client/node.py", "server/gateway.py", "simulations/run.py"]
    wanted += ["bundle/wheels/torch-2.13.0-cp311-none-any.whl"]
    assert [path for path in wanted if not let_in(path, rules)] == []
    never = [
        "kits/north/keys/node.key",
        "hospitals/north/labels.csv",
        ".git/config",
        "runs/federation/x",
        "shared/data",
    ]
    never += [".venv/bin/python", "tests/conftest.py", "common/__pycache__/audit.pyc", "fedicom.egg-info/PKG-INFO"]
    assert [path for path in never if let_in(path, rules)] == []
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = [each.removesuffix("*") for each in setuptools["packages"]["find"]["include"]]
    assert [room for room in rooms if not let_in(f"{room}/a.py", rules)] == []


@pytest.mark.parametrize("path", [*CONTAINERS, *UNITS], ids=name)
def test_no_library_may_call_its_maker(path):
    # onnxruntime 1.32 does, from the first session on, unless it is told not to before it is imported.
    for switch in ("FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1", "ORT_DISABLE_TELEMETRY=1"):
        assert re.search(rf"^(?:Environment=.*|\s+){switch}\b", path.read_text(), re.MULTILINE), switch


# Compose


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_a_service_has_no_root_no_capability_and_a_system_that_it_cannot_write(service):
    plain = COMPOSE["services"][service]
    assert plain["user"] == "10001:10001"
    assert plain["read_only"] is True
    assert plain["cap_drop"] == ["ALL"]
    assert plain["security_opt"] == ["no-new-privileges:true"]
    assert plain["ulimits"] == {"core": 0}
    assert plain["tmpfs"][0].startswith("/tmp:")
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "ports", "environment"} & plain.keys()


def test_each_party_sees_its_own_home_and_reads_its_own_images():
    plan = read_yaml(DEPLOY / "compose" / "federation.yaml", FederationPlan)
    assert set(COMPOSE["services"]) == {"coordinator", *plan.sites}
    for service, plain in COMPOSE["services"].items():
        home, data = plain["volumes"]
        images = "central" if service == "coordinator" else service
        assert home == f"../../kits/{service}:/{'coordinator' if service == 'coordinator' else 'site'}"
        assert data == f"../../hospitals/{images}:/data:ro"
    assert set(site_names(len(plan.sites))) == set(plan.sites)  # what `fedicom hospitals` calls them


def test_a_site_shares_a_network_with_the_coordinator_alone_and_none_leads_out():
    plan = read_yaml(DEPLOY / "compose" / "federation.yaml", FederationPlan)
    assert {network: plain["internal"] for network, plain in COMPOSE["networks"].items()} == dict.fromkeys(
        plan.sites, True
    )
    for service, plain in COMPOSE["services"].items():
        if service == "coordinator":
            assert plain["networks"] == {site: {"aliases": [plan.host]} for site in plan.sites}
        else:
            assert plain["networks"] == [service]


def test_the_preparation_changes_the_lines_that_kits_have():
    changes = re.findall(r"sed -i 's\|\^([^|]+)\|([^|]+)\|'", (DEPLOY / "compose" / "prepare.sh").read_text())
    assert changes == [("data: null", "data: /data"), ("test_data: null", "test_data: /data")]
    site = site_yaml(site="north", federation="study", gateway="fl.example.org:8443").decode()
    server = SERVER_YAML.format(federation='"study"', listen='"0.0.0.0"', port=8443)
    for text, (old, new), kind in ((site, changes[0], SiteConfig), (server, changes[1], ServerConfig)):
        plain = yaml.safe_load(re.sub(f"^{old}", new, text, flags=re.MULTILINE))
        assert plain[new.split(":")[0]] == "/data"
        kind(**plain)


# systemd


def unit(path: Path) -> dict[str, list[str]]:
    """Setting -> its values, in order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            setting, _, value = line.partition("=")
            found.setdefault(setting, []).append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_a_unit_comes_back_always_and_is_shut_in(path):
    plain = unit(path)
    assert plain["Restart"] == ["always"]
    assert plain["User"] == ["fedicom"]
    assert plain["ExecStart"] == [f"/opt/fedicom/bin/fedicom {VERBS[side(path)]} start"]
    assert plain["CapabilityBoundingSet"] == plain["AmbientCapabilities"] == [""]
    assert plain["ProtectSystem"] == ["strict"]
    assert plain["LimitCORE"] == ["0"]
    assert plain["UMask"] == ["0077"]
    home = re.search(r"FEDICOM_HOME=(\S+)", plain["Environment"][0])[1]
    assert home.startswith(f"/var/lib/{plain['StateDirectory'][0]}/")
    # torch's convolutions need it; see the comment in the unit.
    assert "MemoryDenyWriteExecute" not in plain
    for setting in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces", "RestrictSUIDSGID"):
        assert plain[setting] == ["yes"]


@pytest.fixture
def analyze():
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed here")
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    if int(re.search(r"systemd (\d+)", said)[1]) < 250:
        pytest.skip("systemd is older than 250 and cannot look at a file offline")
    return program


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_systemd_takes_the_unit_without_a_word(path, analyze, tmp_path):
    # Where Fedicom is not in /opt, the program that the unit starts is missing: any other stands for it.
    text = re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", path.read_text(), flags=re.MULTILINE)
    (tmp_path / path.name).write_text(text)
    done = subprocess.run([analyze, "verify", str(tmp_path / path.name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_systemd_counts_little_exposure(path, analyze):
    # 0 is none, 10 is all; "OK" begins at 5. What is left is the network, and a device for the GPU.
    command = [analyze, "security", "--offline=true", "--threshold=20", "--no-pager", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:]


# Shell


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed here")
    assert len(SCRIPTS) >= 4
    done = subprocess.run([shellcheck, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_stops_at_its_first_error_and_can_be_started(path):
    assert path.read_text().splitlines()[0] == "#!/bin/sh"
    assert re.search(r"^set -eu$", path.read_text(), re.MULTILINE)
    assert os.access(path, os.X_OK)
