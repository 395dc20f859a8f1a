"""The files that people write by hand: what they may hold, what a typo is told, and where everything lies."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.composition import config_root
from common.deployment import (
    FederationPlan,
    Policy,
    ServerConfig,
    ServerHome,
    SiteConfig,
    SiteHome,
    policy_names,
    read_status,
    read_yaml,
)
from common.errors import ConfigError, FedicomError, StorageError
from common.identity import NodeKey, Signer
from common.registry import Member, Registry

SITE = {"site": "north", "federation": "trial", "gateway": "gateway.example.org:8443"}
PLAN = {"name": "trial", "host": "gateway.example.org", "sites": ["north", "south"]}


def written(folder: Path, name: str, plain: Any) -> Path:
    path = folder / name
    path.write_text(plain if isinstance(plain, str) else yaml.safe_dump(plain))
    return path


@pytest.mark.parametrize("kind", [SiteHome, ServerHome])
def test_root_opens_nobody_elses_folder_unless_root_is_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[SiteHome] | type[ServerHome]
) -> None:
    monkeypatch.delenv("FEDICOM_ALLOW_ROOT", raising=False)
    kind(tmp_path)  # its owner
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match=r"belongs to user .*, who could not read what root writes there"):
        kind(tmp_path)
    kind(tmp_path / "new")
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")
    kind(tmp_path)


def test_a_site_needs_three_lines_and_the_rest_is_careful(tmp_path: Path) -> None:
    config = read_yaml(written(tmp_path, "site.yaml", SITE), SiteConfig)
    assert (config.data, config.proxy, config.metrics_port) == (None, None, None)
    policy = config.policy
    assert (policy.require_privacy, policy.seeded_noise, policy.metrics, policy.min_cell) == (True, False, "bounded", 5)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_that_is_shipped_reads_and_names_every_rule(tmp_path: Path, name: str) -> None:
    rules = yaml.safe_load((config_root() / "site" / f"{name}.yaml").read_text())
    assert set(rules) == set(Policy.__dataclass_fields__)
    read_yaml(written(tmp_path, "site.yaml", {**SITE, "policy": rules}), SiteConfig)


def test_the_strict_policy_is_stricter_than_the_standard_and_that_than_the_open_one() -> None:
    read = {name: yaml.safe_load((config_root() / "site" / f"{name}.yaml").read_text()) for name in policy_names()}
    assert set(read) == {"open", "standard", "strict"}
    for rule in ("epsilon", "delta", "max_rounds"):
        assert read["strict"][rule] <= read["standard"][rule] <= read["open"][rule], rule
    for rule in ("min_noise_multiplier", "min_patients", "min_cell"):
        assert read["strict"][rule] >= read["standard"][rule] >= read["open"][rule], rule
    assert read["strict"]["require_privacy"]
    assert read["standard"]["require_privacy"]
    secure = {name for name, rules in read.items() if rules["require_secure_aggregation"]}
    assert secure <= {"strict"}
    assert {name for name, rules in read.items() if rules["seeded_noise"]} <= {"open"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gatway": "x"}, "Did you mean gateway?"),
        ({"site": "two words"}, "site"),
        ({"gateway": "no-port"}, "gateway"),
        ({"gateway": "https://host:1"}, "gateway"),
        ({"gateway": "host:99999"}, "gateway: a port is a number from 1 to 65535, got 99999"),
        ({"gateway": "host:0"}, "gateway: a port is a number from 1 to 65535, got 0"),
        ({"threads": -1}, "threads"),
        ({"threads": "many"}, "threads"),
        ({"device": "tpu"}, "device"),
        ({"metrics_port": 70_000}, "metrics_port"),
        ({"policy": {"epsilon": 0}}, "policy.epsilon"),
        ({"policy": {"epsilon": float("inf")}}, "site.yaml"),
        ({"policy": {"delta": 0.5}}, "policy.delta"),
        ({"policy": {"hours": ["7-9"]}}, "policy.hours"),
        ({"policy": {"hours": ["24:00-06:00"]}}, "policy.hours"),
        ({"policy": {"metrics": "all"}}, "policy.metrics"),
        ({"policy": {"gpu_memory_fraction": 1.5}}, "policy.gpu_memory_fraction"),
        ({"policy": {"min_cel": 3}}, "Did you mean min_cell?"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = written(tmp_path, "site.yaml", {**SITE, **change})
    with pytest.raises(ConfigError) as refused:
        read_yaml(path, SiteConfig)
    assert told in str(refused.value)
    assert all(line.startswith("site.yaml") for line in str(refused.value).splitlines())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("site: " + "[" * 300_000, "is nested more than 20 deep"),  # libyaml's stack ended, and the process with it
        ("- " * 300_000 + "x", "is nested more than 20 deep"),
        ("{" * 300 + "a: 1" + "}" * 300, "is nested more than 20 deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "an alias"),  # 2^39
    ],
    ids=["brackets", "dashes", "braces", "aliases"],
)
def test_a_file_that_would_end_the_process_is_refused_by_its_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^site\.yaml, line [12]: .*{why}"):
        read_yaml(written(tmp_path, "site.yaml", text), SiteConfig)


@pytest.mark.parametrize("text", ["site: [", "a: b: c", "!!python/object/apply:os.system [id]", "just words", ""])
def test_what_is_no_yaml_mapping_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        read_yaml(written(tmp_path, "site.yaml", text), SiteConfig)


def test_a_missing_file_is_a_storage_error_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refused:
        read_yaml(tmp_path / "site.yaml", SiteConfig)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [{"sites": ["north", "north"]}, {"auditors": ["north"]}, {"sites": ["server"]}, {"sites": ["coordinator"]},
     {"host": "two words"}, {"valid_days": 0}],
)  # fmt: skip
def test_a_federation_has_every_name_once_and_keeps_its_own(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read_yaml(written(tmp_path, "federation.yaml", PLAN), FederationPlan).port == 8443
    with pytest.raises(ConfigError):
        read_yaml(written(tmp_path, "federation.yaml", {**PLAN, **change}), FederationPlan)


def test_the_server_listens_where_it_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, "server.yaml", {"federation": "trial", "listen": "127.0.0.1", "port": 1443})
    config = read_yaml(path, ServerConfig)
    assert (config.listen, config.port, config.superlink_port) == ("127.0.0.1", 1443, None)


def test_a_site_finds_its_files_below_its_folder(tmp_path: Path) -> None:
    written(tmp_path, "site.yaml", SITE)
    home = SiteHome(tmp_path)
    paths = (
        home.signing_key, home.node_key, home.cohort_key, home.superexec_secret, home.ca, home.registry_file,
        home.status_file, home.runner_file, home.supernode, home.approved, home.ledger_file, home.cache,
        home.audit_file,
    )  # fmt: skip
    assert all(path.is_relative_to(home.path) for path in paths)
    assert len(set(paths)) == len(paths)
    assert home.audit_file.name == "north.jsonl"


@pytest.mark.parametrize("home", [SiteHome, ServerHome])
def test_a_folder_without_its_configuration_says_what_to_do(tmp_path: Path, home: type[SiteHome]) -> None:
    with pytest.raises(ConfigError, match=r"is missing .*unpack the (site's|coordinator's) kit again"):
        _ = home(tmp_path).config


def test_the_registry_must_be_signed_by_the_pinned_authority(tmp_path: Path) -> None:
    authority, home = Signer.temporary(), SiteHome(tmp_path)
    home.trust.mkdir()
    with pytest.raises(ConfigError, match="the registry is missing"):
        _ = home.registry
    (home.trust / "authority.pub").write_text(authority.public + "\n")
    member = Member(signing=Signer.temporary().public, node=NodeKey.new().public, since="2026-01-01T00:00:00+00:00")
    registry = Registry(
        federation="trial", version=1, issued="2026-01-01T00:00:00+00:00", authority=authority.public,
        coordinator=Signer.temporary().public, sites={"north": member},
    )  # fmt: skip
    registry.write(home.registry_file, authority)
    assert home.registry == registry
    foreign = Signer.temporary()
    replace(registry, authority=foreign.public).write(home.registry_file, foreign)
    with pytest.raises(ConfigError, match="not signed by authority"):
        _ = home.registry


def test_a_status_file_is_a_json_object_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    path.write_text('{"state": "ready"}')
    assert read_status(path) == {"state": "ready"}
    for text in ("", "[]", "{", "null"):
        path.write_text(text)
        with pytest.raises(FedicomError, match="no status file"):
            read_status(path)


def test_a_field_that_is_given_twice_is_refused_by_its_line(tmp_path: Path) -> None:
    text = yaml.safe_dump({**SITE, "policy": {"min_patients": 100}}, sort_keys=False)
    line = len(text.splitlines()) + 1
    with pytest.raises(ConfigError, match=rf"^site\.yaml, line {line}: 'policy' is given twice; keep one$"):
        read_yaml(written(tmp_path, "site.yaml", text + "policy:\n  hours: ['19:00-06:00']\n"), SiteConfig)


def test_a_file_that_windows_saved_is_read_or_told_to_be_saved_as_utf_8(tmp_path: Path) -> None:
    text, path = yaml.safe_dump({**SITE, "data": "/data/Müller"}, allow_unicode=True), tmp_path / "site.yaml"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert read_yaml(path, SiteConfig).data == "/data/Müller"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^site\.yaml is not UTF-8 text; save it as UTF-8$"):
        read_yaml(path, SiteConfig)
