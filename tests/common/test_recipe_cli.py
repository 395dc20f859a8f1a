"""`fedicom recipe`: composed, signed by the coordinator, verified by anybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedicom
from common.audit import verify
from common.config import load_recipe
from common.deployment import FederationPlan, ServerHome
from common.identity import Signer
from common.signed import read_recipe
from server.provision import provision


@pytest.fixture(scope="module")
def kits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("provisioned") / "kits"
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=("north",)), out)
    return out


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDICOM_HOME", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = fedicom.main(["recipe", *map(str, words)])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


SETTINGS = ("recipe=phantom_2d", "rounds=3")


@pytest.mark.parametrize("options_first", [True, False])
def test_a_signed_recipe_is_what_the_words_compose_under_the_coordinators_key(said, kits, tmp_path, options_first):
    home, out = ServerHome(kits / "coordinator"), tmp_path / "recipe.json"
    options = ("--home", home.path, "--out", out, "--by", "olga")
    words = (*options, *SETTINGS) if options_first else (SETTINGS[0], *options, SETTINGS[1])
    code, told, err = said("sign", *words)
    assert (code, err) == (0, "")
    signed = read_recipe(out, home.registry.coordinator)
    assert signed.recipe == load_recipe(SETTINGS)
    assert signed.recipe.id in told
    event = verify(home.audit_file)[-1]
    assert (event.kind, event.facts["who"], event.facts["recipe_id"]) == ("recipe signed", "olga", signed.recipe.id)


def test_verify_tells_whose_recipe_it_is(said, kits, tmp_path, monkeypatch):
    home = ServerHome(kits / "coordinator")
    monkeypatch.setenv("FEDICOM_HOME", str(home.path))
    assert said("sign", *SETTINGS)[0] == 0
    out = tmp_path / "phantom_2d.recipe.json"
    for trust in (("--home", kits / "north"), ("--home", home.path), ("--key", home.registry.coordinator), ()):
        code, told, _ = said("verify", out, *trust)
        assert code == 0
        assert "content and signature hold" in told
        assert "taken from the file itself" not in told
    monkeypatch.delenv("FEDICOM_HOME")
    assert "taken from the file itself" in said("verify", out)[1]


def test_verify_refuses_another_key_a_change_and_a_folder_without_a_registry(said, kits, tmp_path):
    out = tmp_path / "recipe.json"
    assert said("sign", *SETTINGS, "--home", kits / "coordinator", "--out", out)[0] == 0
    code, told, err = said("verify", out, "--key", Signer.temporary().public)
    assert (code, told) == (2, "")
    assert "this installation trusts coordinator" in err
    assert said("verify", out, "--home", tmp_path)[0] == 2
    plain = json.loads(out.read_text())
    plain["recipe"]["rounds"] = 4
    out.write_text(json.dumps(plain))
    code, _, err = said("verify", out)
    assert code == 2
    assert "it was changed" in err


def test_nobody_but_the_registrys_coordinator_signs(said, kits, tmp_path):
    import shutil

    home = tmp_path / "copy"
    shutil.copytree(kits / "coordinator", home)
    (home / "keys" / "signing.key").write_bytes(b"x" * 32)
    code, _, err = said("sign", *SETTINGS, "--home", home, "--out", tmp_path / "recipe.json")
    assert code == 2
    assert "no site would take the recipe" in err
    assert not (tmp_path / "recipe.json").exists()


def test_signing_without_a_coordinators_folder_is_refused(said, tmp_path):
    code, _, err = said("sign", *SETTINGS)
    assert code == 2
    assert "no server.yaml here" in err


def test_a_wrong_setting_signs_nothing(said, kits, tmp_path):
    code, _, err = said("sign", "roundz=3", "--home", kits / "coordinator", "--out", tmp_path / "recipe.json")
    assert code == 2
    assert "roundz" in err
    assert not (tmp_path / "recipe.json").exists()
