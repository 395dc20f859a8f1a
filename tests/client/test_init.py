"""A hospital that makes its own keys: nothing private leaves, nothing comes in that the authority did not sign."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from client.init import init_verb, join_verb, site_init, site_renew, unpack_verb
from client.node import start
from common import kit
from common.audit import verify
from common.deployment import SiteHome
from common.enrolment import install_kit, install_registry, public_file, read_public
from common.errors import ConfigError, StorageError
from common.identity import NodeKey, Signer
from common.kit import check_kit, read_folder
from common.registry import Member, Registry, parse_registry
from common.vault import Secret

WHEN = "2026-01-02T03:04:05+00:00"
GATEWAY = "fl.example.org:8443"
WORDS = "correct horse battery"


class Office:
    """The coordinator's authority, as far as a site sees it."""

    def __init__(self) -> None:
        self.signer, self.version = Signer.temporary(), 1
        self.coordinator = Signer.temporary().public
        self.retired: dict[str, tuple[str, ...]] = {}

    def kit(self, public: Path, **files: bytes) -> dict[str, bytes]:
        keys = read_public(public)
        self.version += 1
        if keys.previous:
            self.retired = {keys.site: (*self.retired.get(keys.site, ()), keys.previous)}
        registry = Registry(
            federation="chest", version=self.version, issued=WHEN, authority=self.signer.public,
            coordinator=self.coordinator, retired=self.retired,
            sites={keys.site: Member(signing=keys.signing, node=keys.node, since=WHEN)},
        )  # fmt: skip
        own = {"README.md": b"# north\n", "trust/ca.crt": b"certificate\n", **files}
        return kit.signed_kit(own, registry, keys.site, WHEN, self.signer)

    def registry(self, **changes: object) -> bytes:
        plain = {
            "federation": "chest", "version": self.version, "issued": WHEN, "authority": self.signer.public,
            "coordinator": self.coordinator, "sites": {}, **changes,
        }  # fmt: skip
        return Registry(**plain).signed(self.signer)  # type: ignore[arg-type]


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    site_init(tmp_path / "north", site="north", federation="chest", gateway=GATEWAY, by="nina")
    return SiteHome(tmp_path / "north")


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(folder).as_posix() for path in found}


def actions(home: SiteHome) -> list[tuple[str, str]]:
    return [(e.facts["who"], e.facts["action"]) for e in verify(home.audit_file) if e.kind == "operator action"]


def test_a_site_makes_its_keys_and_only_public_ones_are_to_be_sent(home):
    assert files(home.path) == {
        "site.yaml", "public.json", "keys/signing.key", "keys/node.key", "keys/cohort.key", "keys/superexec.secret",
        "audit/north.jsonl",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in home.keys.iterdir()} == {0o600}
    assert home.keys.stat().st_mode & 0o777 == home.path.stat().st_mode & 0o777 == 0o700
    keys = read_public(home.path / "public.json")
    assert (keys.site, keys.federation, keys.previous) == ("north", "chest", None)
    assert (keys.signing, keys.node) == (Signer.load(home.signing_key).public, NodeKey.load(home.node_key).public)
    public = (home.path / "public.json").read_bytes()
    for path in home.keys.iterdir():
        data = path.read_bytes()
        assert data not in public
        assert data.hex().encode() not in public
    assert (home.config.gateway, home.config.policy.require_privacy) == (GATEWAY, True)
    assert actions(home) == [("nina", "keys made")]


def test_a_home_that_waits_for_its_kit_is_told_to_join_it(home, monkeypatch):
    monkeypatch.setenv("FEDICOM_ALLOW_ROOT", "1")
    with pytest.raises(ConfigError, match=r"the registry is missing.*`fedicom site join` it where `fedicom site init`"):
        start(home, lambda line, style: None)


def test_a_home_whose_making_was_killed_before_the_log_told_of_its_keys_is_made_when_asked_for_again(
    tmp_path, monkeypatch
):
    given = {"site": "south", "federation": "chest", "gateway": GATEWAY}
    if (child := os.fork()) == 0:
        monkeypatch.setattr("client.init.note", lambda *_, **__: os._exit(9))
        site_init(tmp_path / "south", **given)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    site_init(tmp_path / "south", **given)
    assert [event.facts.get("action") for event in verify(SiteHome(tmp_path / "south").audit_file)] == [
        None, "keys made",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["south"]


def test_two_sites_share_no_secret(home, tmp_path):
    site_init(tmp_path / "south", site="south", federation="chest", gateway=GATEWAY, policy="strict")
    both = [path.read_bytes() for folder in ("north", "south") for path in (tmp_path / folder / "keys").iterdir()]
    assert len(both) == len(set(both)) == 8
    assert SiteHome(tmp_path / "south").config.policy.epsilon == 2


def test_a_home_is_never_made_over_another_one(home):
    before = (home.path / "keys/signing.key").read_bytes()
    with pytest.raises(StorageError, match="keys are never overwritten"):
        site_init(home.path, site="north", federation="chest", gateway=GATEWAY)
    assert (home.path / "keys/signing.key").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"site": "a b"}, {"site": ""}, {"federation": "../x"}, {"gateway": "fl.example.org"},
        {"gateway": "https://x:1"}, {"policy": "none"}, {"policy": "../standard"},
    ],
)  # fmt: skip
def test_a_wrong_name_makes_nothing(tmp_path, wrong):
    with pytest.raises(ConfigError):
        site_init(tmp_path / "x", **{"site": "north", "federation": "chest", "gateway": GATEWAY, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_the_coordinators_kit_is_put_in_and_the_sites_keys_and_settings_stay(home):
    office, keys = Office(), {path.name: path.read_bytes() for path in home.keys.iterdir()}
    settings = (home.path / "site.yaml").read_text().replace("data: null", "data: /images")
    (home.path / "site.yaml").write_text(settings)
    parcel = office.kit(home.path / "public.json", **{"site.yaml": b"gateway: other.example.org:8443\n"})
    done = install_kit(home, parcel, by="nina")
    assert any(office.signer.public in sentence and "telephone" in sentence for sentence in done)
    assert any("the kit names gateway other.example.org:8443" in sentence for sentence in done)
    assert {path.name: path.read_bytes() for path in home.keys.iterdir()} == keys
    assert (home.path / "site.yaml").read_text() == settings
    assert home.authority == office.signer.public
    assert home.registry.version == 2
    assert check_kit(home.path) == ()
    assert actions(home)[-1] == ("nina", "kit installed")


def test_a_kit_of_another_authority_than_the_one_on_the_telephone_is_not_put_in(home):
    office = Office()
    with pytest.raises(ConfigError, match="was forged"):
        install_kit(home, office.kit(home.path / "public.json"), authority=Signer.temporary().public)
    assert not home.trust.joinpath("authority.pub").exists()
    for _ in range(2):
        install_kit(home, office.kit(home.path / "public.json"), authority=office.signer.public)
    with pytest.raises(ConfigError, match="was forged"):
        install_kit(home, Office().kit(home.path / "public.json"))
    with pytest.raises(ConfigError, match="this home trusts authority"):
        install_kit(home, office.kit(home.path / "public.json"), authority=Signer.temporary().public)
    assert home.authority == office.signer.public


def test_a_kit_under_keys_that_are_not_here_is_not_put_in(home, tmp_path):
    office = Office()
    _, other = public_file(Signer.temporary(), NodeKey.new(), federation="chest", site="north")
    (tmp_path / "other.json").write_bytes(other)
    with pytest.raises(ConfigError, match="names other keys for north"):
        install_kit(home, office.kit(tmp_path / "other.json"))
    assert not home.registry_file.exists()


@pytest.mark.parametrize("revoked", [False, True])
def test_a_kit_whose_registry_does_not_name_its_site_is_not_put_in(home, revoked):
    office, keys = Office(), read_public(home.path / "public.json")
    sites = {"north": Member(signing=keys.signing, node=keys.node, since=WHEN, revoked=WHEN)} if revoked else {}
    registry = parse_registry(office.registry(sites=sites), office.signer.public)
    with pytest.raises(ConfigError, match="does not name north as a member"):
        install_kit(home, kit.signed_kit({"trust/ca.crt": b"certificate\n"}, registry, "north", WHEN, office.signer))
    assert not home.registry_file.exists()


def test_new_keys_take_effect_with_the_kit_that_names_them_and_the_log_goes_on(home):
    office = Office()
    install_kit(home, office.kit(home.path / "public.json"))
    old, cohort = Signer.load(home.signing_key), home.cohort_key.read_bytes()
    (home.path / "older.json").write_bytes(home.registry_file.read_bytes())
    public = site_renew(home, by="nina")
    assert read_public(public).previous == old.public
    assert Signer.load(home.signing_key).public == old.public  # still in use
    assert check_kit(home.path) == ()
    first = read_public(public)
    again = read_public(site_renew(home))  # the first one may be on its way
    assert (again.signing, again.node) == (first.signing, first.node)
    install_kit(home, office.kit(public))
    new = Signer.load(home.signing_key)
    assert new.public == first.signing != old.public
    assert NodeKey.load(home.node_key).public == first.node
    assert not (home.keys / "next").exists()
    assert home.cohort_key.read_bytes() == cohort
    assert check_kit(home.path) == ()
    kinds = [event.kind for event in verify(home.audit_file, [old.public, new.public])]
    assert kinds.count("key rotated") == 1
    home.registry_file.write_bytes(b"junk")  # it may be repaired, but not with the one of the first kit
    with pytest.raises(ConfigError, match="has version 2, this home has version 3"):
        install_registry(home, home.path / "older.json")


@pytest.mark.parametrize("field", ["federation", "site", "signing", "node", "made", "previous"])
def test_public_keys_that_were_changed_on_their_way_are_found(home, field):
    plain = json.loads((home.path / "public.json").read_text())
    other = {
        "signing": Signer.temporary().public, "previous": Signer.temporary().public, "node": NodeKey.new().public,
        "made": WHEN,
    }  # fmt: skip
    plain["keys"][field] = other.get(field, "other")
    (home.path / "public.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="a signature does not hold"):
        read_public(home.path / "public.json")


@pytest.mark.parametrize("name", ["signing", "node", "previous"])
def test_nobody_hands_in_the_public_keys_of_another_as_his_own(home, name):
    """All is signed by the sender, with keys of his own also where he names another's."""
    file = home.path / "public.json"
    theirs = read_public(file)
    signers = {"signing": Signer.temporary(), "node": NodeKey.new(), "previous": Signer.temporary()}
    keys, data = public_file(
        signers["signing"], signers["node"], federation="chest", site="west", previous=signers["previous"]
    )
    file.write_bytes(data)
    assert read_public(file) == keys
    keys = replace(keys, **{name: theirs.node if name == "node" else theirs.signing})
    signatures = {name: signer.sign(keys.signed_bytes) for name, signer in signers.items()}
    file.write_text(json.dumps(json.loads(data) | {"keys": asdict(keys), "signatures": signatures}))
    with pytest.raises(ConfigError, match="a signature does not hold"):
        read_public(file)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda plain: plain.update(format="fedicom site keys 2"), "has another format"),
        (lambda plain: plain.update(note="one field more"), "has another format"),
        (lambda plain: plain.update(signatures=list(plain["signatures"])), "has another format"),
        (lambda plain: plain["signatures"].update(signing=7), "a signature does not hold"),
        (lambda plain: plain["signatures"].pop("node"), "a signature does not hold"),
        (lambda plain: plain["signatures"].update(previous=plain["signatures"]["signing"]), "a signature does not"),
        (lambda plain: plain.update(format=" " * (1 << 16)), "holds no public keys"),
    ],
)
def test_public_keys_with_other_fields_or_signatures_than_there_are_or_too_long_are_refused(home, change, why):
    file = home.path / "public.json"
    plain = json.loads(file.read_text())
    change(plain)
    file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=why):
        read_public(file)


@pytest.mark.parametrize(
    "junk",
    [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 60_000, b'{"format":1,"keys":{},"signatures":[]}', b"x" * 70_000],
)
def test_junk_is_no_public_key_and_never_crashes(tmp_path, junk):
    (tmp_path / "public.json").write_bytes(junk)
    with pytest.raises(ConfigError):
        read_public(tmp_path / "public.json")


def test_the_commands_make_send_join_and_renew_and_print_nothing_private(tmp_path, capsys, monkeypatch):
    office, folder = Office(), tmp_path / "north"
    monkeypatch.setenv("FEDICOM_HOME", str(folder))
    assert init_verb(["north", "--federation", "chest", "--gateway", GATEWAY, "--by", "nina"]) == 0
    home = SiteHome(folder)
    kit.write_folder(office.kit(folder / "public.json"), tmp_path / "kit")
    assert join_verb([str(tmp_path / "kit"), "--authority", office.signer.public]) == 0
    assert init_verb(["--renew"]) == 0
    said = capsys.readouterr().out
    assert "approvals count only" not in said
    home.approved.mkdir()
    (home.approved / f"{'a' * 64}.json").write_text("{}")
    monkeypatch.setenv("KIT_WORDS", WORDS)
    (tmp_path / "north.kit").write_bytes(kit.pack(office.kit(folder / "public.json"), Secret.passphrase(WORDS)))
    assert join_verb([str(tmp_path / "north.kit"), "--passphrase-env", "KIT_WORDS"]) == 0
    (tmp_path / "registry.json").write_bytes(
        office.registry(version=9, retired={"north": (home.registry.members["north"].signing,)})
    )
    assert join_verb([str(tmp_path / "registry.json")]) == 0
    assert home.registry.version == 9
    said += capsys.readouterr().out
    assert read_public(folder / "public.json").signing in said
    assert "approvals count only under it: approve anew" in said
    for path in home.keys.rglob("*"):
        if path.is_file():
            assert path.read_bytes().hex() not in said
            assert path.read_bytes().decode(errors="replace").strip() not in said
    assert WORDS not in said


def test_a_sealed_kit_is_unpacked_into_a_folder_that_becomes_the_home(home, tmp_path, capsys):
    office = Office()
    (tmp_path / "words").write_text(WORDS + "\n")
    (tmp_path / "words").chmod(0o600)
    parcel = office.kit(home.path / "public.json", **{"keys/cohort.key": bytes(32)})
    (tmp_path / "north.kit").write_bytes(kit.pack(parcel, Secret.passphrase(WORDS)))
    words = [str(tmp_path / "north.kit"), str(tmp_path / "new"), "--passphrase-file", str(tmp_path / "words")]
    with pytest.raises(ConfigError, match="was forged"):
        unpack_verb([*words, "--authority", Signer.temporary().public])
    assert not (tmp_path / "new").exists()
    assert unpack_verb(words) == 0
    assert read_folder(tmp_path / "new") == parcel
    assert (tmp_path / "new/keys/cohort.key").stat().st_mode & 0o777 == 0o600
    assert f"by telephone: {office.signer.public}" in capsys.readouterr().out
    with pytest.raises(StorageError, match="never overwritten"):
        unpack_verb(words)


@pytest.mark.parametrize("verb", [init_verb, join_verb, unpack_verb])
def test_no_command_takes_a_passphrase_as_an_argument(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        verb(["--help"])
    assert ended.value.code == 0
    options = {word.strip("[],") for word in capsys.readouterr().out.split()}
    assert not {"--passphrase", "--password", "--key"} & options
    with pytest.raises(SystemExit) as ended:
        verb(["--passphrase", "secret words here"])
    assert ended.value.code == 2
