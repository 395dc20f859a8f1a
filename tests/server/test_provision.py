"""Provisioning: every key where it belongs and nowhere else, and no way back to an older registry."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import shutil
import ssl
import stat
import tarfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedicom
from client.approvals import Approvals
from client.init import site_init, site_renew
from common import kit
from common.audit import AuditLog, verify
from common.config import Federation, Recipe
from common.deployment import FederationPlan, Policy, ServerHome, SiteConfig, SiteHome, read_yaml
from common.enrolment import install_kit, install_registry, public_file, warnings
from common.errors import ConfigError, FedicomError, StorageError
from common.identity import Certificate, NodeKey, Signer, expiring
from common.journal import SharedLog
from common.kit import check_kit, read_folder
from common.registry import read_registry
from common.signed import sign_recipe
from common.vault import Secret, is_sealed, seal, unseal
from server import provision as provisioning
from server.certificates import CertificateAuthority
from server.kit_contents import EXAMPLE
from server.provision import add, provision, revoke, rotate
from server.tokens import install_token, read_tokens, remove_token
from tests.kill import killed_before_change

HOST, ADDRESS = "fl.example.org", "10.1.2.3"
PLAN = FederationPlan(name="chest", host=HOST, also_hosts=(ADDRESS,), sites=("north", "south"), auditors=("anna",))
TRUST = {"trust/ca.crt", "trust/authority.pub", "trust/registry.json", "kit.json", "README.md"}
COORDINATOR = TRUST | {
    "server.yaml", "keys/signing.key", "keys/gateway.crt", "keys/gateway.key", "keys/superlink.crt",
    "keys/superlink.key", "keys/superexec.secret", "keys/tokens.json", "keys/operator.token",
}  # fmt: skip
SITE = TRUST | {"site.yaml", "keys/signing.key", "keys/node.key", "keys/cohort.key", "keys/superexec.secret"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation that no test changes."""
    out = tmp_path_factory.mktemp("made") / "kits"
    provision(PLAN, out, by="eve")
    return out


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    out = tmp_path / "kits"
    provision(PLAN, out, by="eve")
    return out


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(folder).as_posix() for path in found}


def contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in files(folder)}


def secrets_of(folder: Path) -> list[bytes]:
    """Every private thing under a folder, as it is, in hexadecimal and in base64."""
    found = []
    for path in files(folder):
        if path.endswith((".key", ".secret", ".token", ".passphrase")):
            data = (folder / path).read_bytes()
            found.append(data.strip())
            if data.startswith(b"-----"):  # the file holds the public half as well
                load = load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key
                data = load(data, None).private_numbers().private_value.to_bytes(32, "big")
            found += [data, data.hex().encode(), base64.b64encode(data)]
    return found


def registry(folder: Path):
    return read_registry(folder / "registry.json", Signer.load(folder / "authority.key").public)


def handshake(certificate: Path, key: Path, ca: Path, host: str) -> str:
    """The protocol that a client with default checks and OpenSSL's strict mode agrees on; raises as ssl does."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(certificate, key)
    client.load_verify_locations(ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.minimum_version = ssl.TLSVersion.TLSv1_3
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    here, there = client.wrap_bio(one, other, server_hostname=host), server.wrap_bio(other, one, server_side=True)
    done = set()
    for _ in range(10):
        for side in (here, there):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
    assert done == {here, there}
    return str(here.version())


# --- what is made ---------------------------------------------------------------------------------------------


def test_every_party_gets_exactly_its_files(made):
    assert {path.name for path in made.iterdir()} == {"authority", "coordinator", "north", "south", "auditor-anna"}
    assert files(made / "coordinator") == COORDINATOR
    assert files(made / "north") == files(made / "south") == SITE
    assert files(made / "auditor-anna") == TRUST | {"auditor.token"}
    assert files(made / "authority") == {
        "federation.yaml",
        "authority.key",
        "ca.key",
        "ca.crt",
        "registry.json",
        "audit.jsonl",
    }


def test_private_files_are_0600_and_folders_0700(made):
    for path in (made, *made.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        private = path.parent.name == "keys" or path.suffix in (".key", ".token", ".secret")
        expected = {0o700} if path.is_dir() else {0o600} if private else {0o600, 0o644}
        assert mode in expected, path
    assert len(list(made.rglob("*.key"))) == 2 + 3 + 2 * 3


def test_no_private_key_is_in_a_kit_of_somebody_else(made):
    parties = {path.name: secrets_of(path) for path in made.iterdir()}
    assert {name: bool(found) for name, found in parties.items()} == dict.fromkeys(parties, True)
    for owner, found in parties.items():
        for other in parties:
            held = b"".join(contents(made / other).values())
            for secret in found if other != owner else ():
                assert secret not in held, (owner, other)


def test_no_two_kits_share_a_secret(made):
    each = [data for path in made.rglob("keys/*") if path.suffix != ".crt" for data in [path.read_bytes()]]
    assert len(each) == len(set(each)) == 6 + 2 * 4


def test_keys_are_those_of_the_registry_and_every_kit_has_it(made):
    pinned = {(made / name / "trust/authority.pub").read_text() for name in ("coordinator", "north", "auditor-anna")}
    assert pinned == {Signer.load(made / "authority/authority.key").public + "\n"}
    read = ServerHome(made / "coordinator").registry
    assert read == SiteHome(made / "south").registry == registry(made / "authority")
    assert (read.version, read.federation, read.auditors) == (1, "chest", ("anna",))
    assert read.coordinator == Signer.load(made / "coordinator/keys/signing.key").public
    for site in ("north", "south"):
        assert read.members[site].signing == Signer.load(made / site / "keys/signing.key").public
        assert read.members[site].node == NodeKey.load(made / site / "keys/node.key").public


def test_the_configurations_can_be_read_as_they_are(made):
    site = SiteHome(made / "north").config
    assert site == SiteConfig(
        site="north",
        federation="chest",
        gateway=f"{HOST}:8443",
        policy=Policy(min_noise_multiplier=0.5, max_steps=10_000, max_rounds=500),
    )
    server = ServerHome(made / "coordinator").config
    assert (server.federation, server.port, server.listen) == ("chest", 8443, "0.0.0.0")
    assert read_yaml(made / "authority/federation.yaml", FederationPlan) == PLAN


def test_every_field_of_a_configuration_is_in_it_with_a_word_on_it(made):
    from dataclasses import fields

    from common.deployment import ServerConfig

    for text, kinds in (
        ((made / "north/site.yaml").read_text(), (SiteConfig, Policy)),
        ((made / "coordinator/server.yaml").read_text(), (ServerConfig,)),
    ):
        lines = text.splitlines()
        for kind in kinds:
            for field in fields(kind):
                (place,) = [n for n, line in enumerate(lines) if line.strip().startswith(f"{field.name}:")]
                above = next(line for line in reversed(lines[:place]) if not line or line.startswith("#"))
                assert "#" in lines[place] or above, field.name


def test_the_example_is_a_plan():
    import yaml

    from common.config import validate_json

    assert validate_json(FederationPlan, json.dumps(yaml.safe_load(EXAMPLE))).sites == ("north", "south", "west")


def test_the_page_for_a_hospital_names_the_firewall_rule_and_the_authority(made):
    text = (made / "north/README.md").read_text()
    assert f"| this computer | {HOST}, port 8443 | TCP, TLS 1.3 | allow, outbound |" in text
    assert "nothing has to be opened inbound" in text
    assert SiteHome(made / "north").authority in text
    assert text.count("\n") < 60


def test_a_rehearsal_over_loopback_listens_on_loopback(tmp_path):
    provision(replace(PLAN, host="127.0.0.1", also_hosts=()), tmp_path / "kits")
    assert ServerHome(tmp_path / "kits/coordinator").config.listen == "127.0.0.1"


@pytest.mark.parametrize("site", ["no", "1e5", "2026-01-01", "null", "0x1f"])
def test_a_site_whose_name_yaml_reads_as_something_else_keeps_its_name(tmp_path, site):
    provision(replace(PLAN, name="on", sites=(site,)), tmp_path / "kits")
    config = SiteHome(tmp_path / "kits" / site).config
    assert (config.site, config.federation) == (site, "on")
    add(tmp_path / "kits/authority", "off")
    assert read_yaml(tmp_path / "kits/authority/federation.yaml", FederationPlan).sites == (site, "off")


# --- certificates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [HOST, ADDRESS])
def test_a_client_that_trusts_the_authority_reaches_the_gateway_over_tls_1_3(made, host):
    keys = made / "coordinator/keys"
    assert handshake(keys / "gateway.crt", keys / "gateway.key", made / "north/trust/ca.crt", host) == "TLSv1.3"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_superlink_answers_on_loopback_alone(made, host):
    keys, ca = made / "coordinator/keys", made / "coordinator/trust/ca.crt"
    assert handshake(keys / "superlink.crt", keys / "superlink.key", ca, host) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(keys / "superlink.crt", keys / "superlink.key", ca, HOST)


@pytest.mark.parametrize("host", ["evil.example.org", "x.fl.example.org", "10.1.2.4", "example.org", "localhost"])
def test_a_wrong_host_is_refused(made, host):
    keys = made / "coordinator/keys"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(keys / "gateway.crt", keys / "gateway.key", made / "north/trust/ca.crt", host)


def test_a_gateway_of_another_federation_is_refused(made, kits):
    keys = kits / "coordinator/keys"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(keys / "gateway.crt", keys / "gateway.key", made / "north/trust/ca.crt", HOST)


def test_whoever_steals_the_authority_cannot_pose_as_another_server_of_the_hospital(made, tmp_path):
    """The name constraints, not our own code, refuse: the certificate is signed by hand."""
    authority = made / "authority"
    stolen = load_pem_private_key((authority / "ca.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    for host, good in ((HOST, True), ("pacs.hospital.example", False)):
        forged = (
            x509.CertificateBuilder(issuer.subject, issuer.subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
            .sign(stolen, hashes.SHA256())
        )
        (tmp_path / "crt").write_bytes(forged.public_bytes(Encoding.PEM))
        (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        if good:
            assert handshake(tmp_path / "crt", tmp_path / "key", authority / "ca.crt", host)
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
                handshake(tmp_path / "crt", tmp_path / "key", authority / "ca.crt", host)


def test_certificates_are_for_servers_on_p_256_and_last_as_planned(made, tmp_path):
    provision(replace(PLAN, valid_days=20), tmp_path / "kits")
    for folder, days in ((made, 397), (tmp_path / "kits", 20)):
        data = (folder / "coordinator/keys/gateway.crt").read_bytes()
        certificate = x509.load_pem_x509_certificate(data)
        assert isinstance(certificate.public_key().curve, ec.SECP256R1)
        use = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(use) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
        left = Certificate.parse(data).ends - datetime.now(UTC)
        assert timedelta(days=days, minutes=-5) < left <= timedelta(days=days)
    authority = x509.load_pem_x509_certificate((made / "authority/ca.crt").read_bytes())
    limits = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    assert authority.extensions.get_extension_for_class(x509.NameConstraints).critical


def test_an_ipv6_gateway_is_an_address_in_the_certificate_and_in_brackets_in_the_configuration(tmp_path):
    provision(replace(PLAN, host="2001:db8::1", also_hosts=()), tmp_path / "kits")
    assert SiteHome(tmp_path / "kits/north").config.gateway == "[2001:db8::1]:8443"
    keys = tmp_path / "kits/coordinator/keys"
    ca = tmp_path / "kits/north/trust/ca.crt"
    assert handshake(keys / "gateway.crt", keys / "gateway.key", ca, "2001:db8::1") == "TLSv1.3"
    assert Certificate.load(keys / "gateway.crt").names[0] == "2001:db8::1"


@pytest.mark.parametrize("host", ["fl.example.org:8443", "a..b", "1.2.3", "256.1.1.1", "x-.org", "a" * 64 + ".org"])
def test_what_is_no_host_is_refused_before_anything_is_made(tmp_path, host):
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        provision(replace(PLAN, host=host), tmp_path / "kits")
    assert list(tmp_path.iterdir()) == []


def test_no_certificate_outlives_the_authority(made):
    ca = CertificateAuthority.load(*((made / "authority" / name).read_bytes() for name in ("ca.key", "ca.crt")))
    certificate, _ = ca.server("Fedicom gateway", "chest", [HOST], 3650 * 2)
    assert Certificate.parse(certificate).ends == Certificate.load(made / "authority/ca.crt").ends


# --- whole or not at all --------------------------------------------------------------------------------------


def test_a_second_time_is_refused_and_changes_nothing(kits):
    before = contents(kits)
    with pytest.raises(StorageError, match="keys are never overwritten"):
        provision(PLAN, kits)
    assert contents(kits) == before


def test_when_it_fails_half_way_nothing_is_there_and_the_next_time_it_works(tmp_path, monkeypatch):
    write = kit.write_whole

    def full(path, data):
        if path.name == "gateway.key":
            raise StorageError("the disk is full")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(kit, "write_whole", full)
        with pytest.raises(StorageError, match="disk is full"):
            provision(PLAN, tmp_path / "kits")
        assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".kits.partial"  # by a process that was killed
    (left / "north/keys").mkdir(parents=True)
    (left / "north/keys/signing.key").write_bytes(bytes(32))
    provision(PLAN, tmp_path / "kits")
    assert [path.name for path in tmp_path.iterdir()] == ["kits"]
    assert (tmp_path / "kits/north/keys/signing.key").read_bytes() != bytes(32)


def test_an_empty_folder_that_is_there_is_filled_and_a_half_filled_one_is_not_taken_for_empty(tmp_path):
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    inode = out.stat().st_ino
    provision(PLAN, out)
    assert out.stat().st_ino == inode  # the mount point stays
    assert not (out / ".partial").exists()
    assert check_kit(out / "north") == ()
    cut = tmp_path / "cut"
    (cut / ".partial").mkdir(parents=True)
    with pytest.raises(StorageError, match="an earlier try was cut off there: empty it"):
        provision(PLAN, cut)


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": ("North", "north")},
        {"sites": ("auditor-anna",)},
        {"sites": ("north", "north.kit")},
        {"sites": ("Coordinator",)},
    ],
)
def test_two_kits_of_one_name_are_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match="two kits would be called"):
        provision(replace(PLAN, **changes), tmp_path / "kits")
    assert list(tmp_path.iterdir()) == []


# --- tokens ---------------------------------------------------------------------------------------------------


def test_of_the_tokens_only_the_hashes_are_kept_and_each_has_256_bits(made):
    table = json.loads((made / "coordinator/keys/tokens.json").read_text())
    assert {role: [entry["name"] for entry in people] for role, people in table.items()} == {
        "operator": ["operator"], "auditor": ["anna"],
    }  # fmt: skip
    for path, role in (("coordinator/keys/operator.token", "operator"), ("auditor-anna/auditor.token", "auditor")):
        token = (made / path).read_text().strip()
        assert len(base64.urlsafe_b64decode(token + "=")) == 32
        assert table[role] == [{"name": table[role][0]["name"], "sha256": hashlib.sha256(token.encode()).hexdigest()}]


def test_a_token_for_a_folder_that_is_no_coordinators_leaves_nothing_that_a_kit_would_not_go_into(tmp_path):
    with pytest.raises(ConfigError, match="configuration is missing"):
        install_token(ServerHome(tmp_path / "typo"), "auditor", "bob")
    assert not (tmp_path / "typo").exists()


def test_a_person_gets_a_token_of_his_own_and_loses_it(kits):
    home = ServerHome(kits / "coordinator")
    first = install_token(home, "auditor", "bob", by="eve").read_text()
    again = install_token(home, "auditor", "bob", by="eve")
    assert again.read_text() != first
    assert again.stat().st_mode & 0o777 == 0o600
    people = json.loads(home.tokens_file.read_text())["auditor"]
    assert [entry["name"] for entry in people] == ["anna", "bob"]
    assert people[1]["sha256"] == hashlib.sha256(again.read_text().strip().encode()).hexdigest()
    remove_token(home, "auditor", "bob", by="eve")
    assert [entry["name"] for entry in json.loads(home.tokens_file.read_text())["auditor"]] == ["anna"]
    with pytest.raises(ConfigError, match="no auditor is called bob"):
        remove_token(home, "auditor", "bob")
    with pytest.raises(ConfigError, match="is no name"):
        install_token(home, "operator", "../x")
    assert check_kit(home.path) == ()  # tokens are there to be changed
    done = [event.facts["action"] for event in verify(home.audit_file) if event.kind == "operator action"]
    assert done == ["token made", "token made", "token removed"]


@pytest.mark.parametrize(
    "table", ["{", "[]", '{"operator": [{"nom": "x"}]}', '{"operator": "x"}', '{"operator": null}', "[" * 100_000]
)
def test_a_table_that_cannot_be_read_is_not_written_over_and_no_token_is_made(kits, table):
    home = ServerHome(kits / "coordinator")
    home.tokens_file.write_text(table)
    for change in (install_token, remove_token):
        with pytest.raises(StorageError, match="cannot be read; restore it from the kit"):
            change(home, "operator", "bob")
    assert home.tokens_file.read_text() == table
    assert not (home.keys / "operator-bob.token").exists()


def test_two_who_change_the_tokens_at_once_lose_none(kits, monkeypatch):
    home, real = ServerHome(kits / "coordinator"), read_tokens
    other = Thread(target=install_token, args=(home, "auditor", "eve"))

    def read(home):
        monkeypatch.setattr("server.tokens.read_tokens", real)
        other.start()
        other.join(0.05)
        assert other.is_alive()
        return real(home)

    monkeypatch.setattr("server.tokens.read_tokens", read)
    install_token(home, "auditor", "bob")
    other.join(60)
    assert [entry["name"] for entry in read_tokens(home)["auditor"]] == ["anna", "bob", "eve"]


def test_tokens_and_registries_count_when_the_log_has_them_and_not_before(kits, monkeypatch):
    home, authority = ServerHome(kits / "coordinator"), kits / "authority"
    install_token(home, "auditor", "bob")
    revoke(authority, "north", "left")
    before = home.tokens_file.read_bytes()
    for change in (
        lambda: install_token(home, "operator", "eve"),
        lambda: remove_token(home, "auditor", "bob"),
        lambda: install_registry(home, authority / "registry.json"),
    ):
        with monkeypatch.context() as full:
            full.setattr(SharedLog, "append", Mock(side_effect=StorageError("the disk is full")))
            with pytest.raises(StorageError, match="the disk is full"):
                change()
        assert (home.tokens_file.read_bytes(), home.registry.version) == (before, 1)
        change()
        before = home.tokens_file.read_bytes()
    done = [event.facts["action"] for event in verify(home.audit_file) if event.kind == "operator action"]
    assert done == ["token made", "token made", "token removed", "registry installed"]


# --- members come, change and go ------------------------------------------------------------------------------


def test_a_site_is_added_with_a_kit_of_its_own_and_a_registry_of_the_next_version(kits):
    add(kits / "authority", "west", by="eve")
    new = registry(kits / "authority")
    assert (new.version, sorted(new.members)) == (2, ["north", "south", "west"])
    assert files(kits / "west") == SITE
    assert SiteHome(kits / "west").registry == new
    assert check_kit(kits / "west") == ()
    with pytest.raises(ConfigError, match=r"takes part already.*If its kit was lost.*revoke west`, and add it again"):
        add(kits / "authority", "west")
    assert registry(kits / "authority") == new


@pytest.mark.parametrize("name", ["coordinator", "NORTH", "auditor-anna", "../x", "a b", "gateway", ""])
def test_a_name_that_is_taken_or_none_is_not_added(kits, name):
    before = contents(kits)
    with pytest.raises(ConfigError):
        add(kits / "authority", name)
    assert contents(kits) == before


def test_a_revoked_site_is_no_member_and_comes_back_under_new_keys_alone(kits):
    old = registry(kits / "authority").sites["north"]
    revoke(kits / "authority", "north", "laptop was stolen", by="eve")
    new = registry(kits / "authority")
    assert (new.version, list(new.members)) == (2, ["south"])
    assert (new.sites["north"].signing, new.sites["north"].why) == (old.signing, "laptop was stolen")
    assert read_yaml(kits / "authority/federation.yaml", FederationPlan).sites == ("south",)
    for refused in (lambda: revoke(kits / "authority", "north", "again"), lambda: rotate(kits / "authority", "north")):
        with pytest.raises(ConfigError, match="revoked"):
            refused()
    add(kits / "authority", "north", out=kits / "again")
    back = registry(kits / "authority")
    assert (back.version, sorted(back.members)) == (3, ["north", "south"])
    assert back.retired["north"] == (old.signing,)
    assert back.members["north"].signing != old.signing
    assert back.members["north"].node != old.node


def test_a_site_that_was_revoked_and_added_again_is_whole_with_the_secrets_of_its_house(kits):
    home = SiteHome(kits / "north")
    secrets = home.cohort_key.read_bytes(), home.superexec_secret.read_bytes()
    revoke(kits / "authority", "north", "lost its key")
    told = add(kits / "authority", "north", out=kits / "again")
    assert told[-1].startswith("north puts it into the home that it has (`fedicom site join`)")
    install_kit(home, read_folder(kits / "again/north"))
    assert (home.cohort_key.read_bytes(), home.superexec_secret.read_bytes()) == secrets
    assert check_kit(home.path) == ()
    home.cohort_key.write_bytes(bytes(32))
    assert check_kit(home.path) == ("keys/cohort.key was changed; unpack the kit again",)


@pytest.mark.parametrize("why", ["", "  ", "two\nlines", "x" * 201])
def test_a_revocation_has_a_reason_of_one_line(kits, why):
    with pytest.raises(ConfigError):
        revoke(kits / "authority", "north", why)
    assert registry(kits / "authority").version == 1


def test_nobody_is_revoked_who_is_not_there(kits):
    with pytest.raises(ConfigError, match="is no site of this federation"):
        revoke(kits / "authority", "west", "left")


def test_the_coordinator_takes_a_newer_registry_and_never_an_older_one(kits, tmp_path):
    home, authority = ServerHome(kits / "coordinator"), kits / "authority"
    (tmp_path / "1.json").write_bytes((authority / "registry.json").read_bytes())
    revoke(authority, "north", "left")
    assert install_registry(home, authority / "registry.json", by="eve").version == 2
    assert list(home.registry.members) == ["south"]
    assert install_registry(home, authority / "registry.json").version == 2  # twice is once
    with pytest.raises(ConfigError, match=r"has version 1, this home has version 2: an older one would bring back"):
        install_registry(home, tmp_path / "1.json")
    assert list(home.registry.members) == ["south"]
    events = [event for event in verify(home.audit_file) if event.kind == "operator action"]
    assert [(event.facts["action"], event.facts["version"]) for event in events] == [("registry installed", 2)]
    assert events[0].facts["who"] == "eve"


def test_two_registries_of_one_version_are_refused(kits, tmp_path):
    home, authority = ServerHome(kits / "coordinator"), kits / "authority"
    signer = Signer.load(authority / "authority.key")
    twin = replace(home.registry, auditors=())
    twin.write(tmp_path / "twin.json", signer)
    with pytest.raises(ConfigError, match="two different registries have version 1"):
        install_registry(home, tmp_path / "twin.json")
    assert home.registry.auditors == ("anna",)


def test_a_registry_of_another_federation_or_authority_is_refused(kits, made, tmp_path):
    home = ServerHome(kits / "coordinator")
    with pytest.raises(ConfigError, match="not signed by authority"):
        install_registry(home, made / "authority/registry.json")
    other = replace(home.registry, federation="brain", version=9)
    other.write(tmp_path / "other.json", Signer.load(kits / "authority/authority.key"))
    with pytest.raises(ConfigError, match="of federation brain, this home is of chest"):
        install_registry(home, tmp_path / "other.json")


def test_a_damaged_registry_is_repaired_but_not_with_one_older_than_the_kit(kits, tmp_path):
    authority = kits / "authority"
    (tmp_path / "1.json").write_bytes((authority / "registry.json").read_bytes())
    add(authority, "west")
    home = SiteHome(kits / "west")  # came with version 2
    home.registry_file.write_bytes(b"junk")
    assert any("is no registry" in sentence for sentence in check_kit(home.path))
    with pytest.raises(ConfigError, match="this home has version 2"):
        install_registry(home, tmp_path / "1.json")
    install_registry(home, authority / "registry.json")
    assert check_kit(home.path) == ()


def test_a_site_with_new_keys_keeps_its_log_its_cohort_and_its_settings(kits):
    home, authority = SiteHome(kits / "north"), kits / "authority"
    old, old_node = Signer.load(home.signing_key), NodeKey.load(home.node_key).public
    AuditLog(home.audit_file, old).append("update sent", round=1)
    (home.path / "site.yaml").write_text((home.path / "site.yaml").read_text().replace("data: null", "data: /images"))
    cohort, secret = home.cohort_key.read_bytes(), (home.keys / "superexec.secret").read_bytes()

    rotate(authority, "north", by="eve")
    assert files(kits / "north-2") == TRUST | {"keys/signing.key", "keys/node.key"}
    assert any("join with the newest kit" in sentence for sentence in _after_registry(home, authority))
    done = install_kit(home, read_folder(kits / "north-2"), by="nina")
    assert any("restart" in sentence for sentence in done)

    new = Signer.load(home.signing_key)
    member = home.registry.members["north"]
    assert (member.signing, member.node) == (new.public, NodeKey.load(home.node_key).public)
    assert new.public != old.public
    assert member.node != old_node
    assert home.registry.retired["north"] == (old.public,)
    assert (home.cohort_key.read_bytes(), (home.keys / "superexec.secret").read_bytes()) == (cohort, secret)
    assert home.config.data == "/images"
    events = verify(home.audit_file, [old.public, new.public])
    kinds = ["update sent", "key rotated"]
    assert [event.kind for event in events if event.kind in kinds] == kinds
    assert events[-1].facts["action"] == "kit installed"
    assert check_kit(home.path) == ()
    assert install_kit(home, read_folder(kits / "north-2")) == ("registry of version 2, 2 sites",)  # twice is once
    assert check_kit(home.path) == ()


def _after_registry(home: SiteHome, authority: Path) -> tuple[str, ...]:
    """What is wrong once the registry came, but the keys did not."""
    install_registry(home, authority / "registry.json")
    return check_kit(home.path)


@pytest.mark.parametrize("moment", ["before the key file", "before the node key"])
def test_a_crash_while_new_keys_are_put_in_is_mended_by_doing_it_again(kits, monkeypatch, moment):
    home = SiteHome(kits / "north")
    old = Signer.load(home.signing_key)
    AuditLog(home.audit_file, old).append("update sent", round=1)
    rotate(kits / "authority", "north")
    import common.enrolment as enrolment

    write = enrolment.write_whole
    stop = home.signing_key if moment == "before the key file" else home.node_key

    def crash(path, data):
        if path == stop:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(enrolment, "write_whole", crash)
        with pytest.raises(KeyboardInterrupt):
            install_kit(home, read_folder(kits / "north-2"))
    install_kit(home, read_folder(kits / "north-2"))
    assert check_kit(home.path) == ()
    assert len([event for event in verify(home.audit_file) if event.kind == "key rotated"]) == 1


def test_keys_that_a_kill_left_half_written_are_gone_with_the_next_try(kits):
    rotate(kits / "authority", "north")
    home = SiteHome(kits / "north")
    half = (kits / "authority" / ".ca.key.4711.tmp", home.keys / ".node.key.4711.tmp", home.trust / ".ca.crt.9.tmp",
            kits / ".north-3.kit.partial", kits / ".north-4.partial" / "keys" / "node.key",
            kits / "authority" / "passphrases" / ".north.passphrase.4711.tmp", kits / "..north-3.kit.partial.7.tmp",
    )  # fmt: skip
    others = (kits / ".south-3.kit.partial", home.keys / "mine.tmp")
    for path in (*half, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"secret")
    install_kit(home, read_folder(kits / "north-2"))
    rotate(kits / "authority", "north")
    assert [path for path in half if path.exists()] == []
    assert not (kits / ".north-4.partial").exists()
    assert all(path.exists() for path in others)
    install_kit(home, read_folder(kits / "north-3"))
    assert check_kit(home.path) == ()


def test_certificates_that_a_kill_left_half_written_are_gone_with_the_next_try(kits):
    half = kits / ".certificates-2.partial" / "coordinator-2" / "keys" / "gateway.key"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"secret")
    rotate(kits / "authority", "gateway")
    rotate(kits / "authority", "authority")
    assert not (kits / ".certificates-2.partial").exists()
    assert (kits / "certificates-3").is_dir()


# --- killed at any write --------------------------------------------------------------------------------------


def killed_at_any_write(before, work):
    """A copy of the folder for each write of `work(folder)`, in which it was killed there."""
    for number in itertools.count(1):
        folder = before.with_name("killed")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        if not killed_before_change(number, lambda folder=folder: work(folder)):
            assert number > 4
            return
        yield folder


def acts(home):
    return [event.facts["action"] for event in verify(home.audit_file) if event.kind == "operator action"]


def test_nobody_has_a_token_or_lost_one_of_whom_the_log_does_not_know(kits):
    def names(home):
        return [entry["name"] for entry in json.loads(home.tokens_file.read_text())["operator"]]

    AuditLog(ServerHome(kits / "coordinator").audit_file, Signer.load(ServerHome(kits / "coordinator").signing_key))
    for folder in killed_at_any_write(
        kits, lambda at: install_token(ServerHome(at / "coordinator"), "operator", "bob")
    ):
        home = ServerHome(folder / "coordinator")
        assert "bob" not in names(home) or "token made" in acts(home)
        install_token(home, "operator", "bob")
    install_token(ServerHome(kits / "coordinator"), "operator", "bob")
    for folder in killed_at_any_write(kits, lambda at: remove_token(ServerHome(at / "coordinator"), "operator", "bob")):
        home = ServerHome(folder / "coordinator")
        assert "bob" in names(home) or "token removed" in acts(home)


def test_no_registry_is_in_force_of_which_the_log_does_not_know(kits):
    AuditLog(SiteHome(kits / "south").audit_file, Signer.load(SiteHome(kits / "south").signing_key))
    revoke(kits / "authority", "north", "left")
    new = kits / "authority" / "registry.json"
    for folder in killed_at_any_write(kits, lambda at: install_registry(SiteHome(at / "south"), new)):
        home = SiteHome(folder / "south")
        assert home.registry.version == 1 or "registry installed" in acts(home)
        install_registry(home, new)
        assert home.registry.version == 2
        assert check_kit(home.path) == ()


def test_a_revocation_that_was_killed_is_asked_for_again_or_says_where_its_registry_goes(kits):
    for folder in killed_at_any_write(kits, lambda at: revoke(at / "authority", "north", "left")):
        try:
            told = revoke(folder / "authority", "north", "left")[0]
        except ConfigError as error:
            told = str(error)
        assert "registry.json (version 2) to the coordinator's server" in told
        assert list(registry(folder / "authority").members) == ["south"]
        events = [event for event in verify(folder / "authority" / "audit.jsonl") if event.kind == "operator action"]
        assert (events[-1].facts["action"], events[-1].facts["version"]) == ("keys revoked", 2)


def test_a_rotation_of_the_coordinator_that_was_killed_goes_through_the_next_time(kits):
    for number, folder in enumerate(killed_at_any_write(kits, lambda at: rotate(at / "authority", "coordinator"))):
        if number % 8 and number < 70:  # of the kit's own files a few will do
            continue
        rotate(folder / "authority", "coordinator")
        version = registry(folder / "authority").version
        home = ServerHome(folder / "coordinator")
        install_kit(home, read_folder(folder / f"coordinator-{version}"))
        assert check_kit(home.path) == ()
        assert [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))] == []


def test_a_new_key_of_the_coordinator_is_pinned_by_the_next_registry(kits):
    home, authority = ServerHome(kits / "coordinator"), kits / "authority"
    old = Signer.load(home.signing_key)
    AuditLog(home.audit_file, old)
    rotate(authority, "coordinator")
    assert files(kits / "coordinator-2") == TRUST | {"keys/signing.key"}
    install_kit(home, read_folder(kits / "coordinator-2"))
    new = Signer.load(home.signing_key).public
    assert new != old.public
    assert (home.registry.coordinator, home.registry.retired["coordinator"]) == (new, (old.public,))
    assert verify(home.audit_file, [old.public, new])[-1].facts["action"] == "kit installed"
    assert check_kit(home.path) == ()
    site = SiteHome(kits / "north")
    install_registry(site, authority / "registry.json")
    assert site.registry.coordinator == new


def test_a_new_key_of_the_coordinator_ends_the_approvals_as_it_says(kits):
    authority, server, site = kits / "authority", ServerHome(kits / "coordinator"), SiteHome(kits / "north")
    settings_file = site.path / "site.yaml"
    settings_file.write_text(settings_file.read_text().replace("require_privacy: true", "require_privacy: false"))
    recipe = Recipe(name="toy", federation=Federation(sites=1, quorum=1))
    log, approvals = SharedLog(site.audit_file, Signer.load(site.signing_key)), Approvals(site)
    approvals.approve(sign_recipe(recipe, Signer.load(server.signing_key)), by="Dr A", log=log)
    assert approvals.find(recipe.id) is not None
    told = rotate(authority, "coordinator")
    assert "signed again, and approved again at every site" in told[-1]
    install_kit(server, read_folder(kits / "coordinator-2"))
    install_registry(site, authority / "registry.json")
    with pytest.raises(ConfigError, match="is not valid any more"):
        approvals.find(recipe.id)
    approvals.approve(sign_recipe(recipe, Signer.load(server.signing_key)), by="Dr A", log=log)
    assert approvals.find(recipe.id) is not None


def test_a_new_certificate_is_trusted_by_the_sites_as_they_are(kits):
    home = ServerHome(kits / "coordinator")
    before = Certificate.load(home.gateway_certificate).fingerprint
    rotate(kits / "authority", "gateway")
    install_kit(home, read_folder(kits / "coordinator-2"))
    assert Certificate.load(home.gateway_certificate).fingerprint != before
    ca = kits / "north/trust/ca.crt"
    assert handshake(home.gateway_certificate, home.gateway_key, ca, HOST) == "TLSv1.3"
    assert handshake(home.superlink_certificate, home.superlink_key, ca, "127.0.0.1") == "TLSv1.3"
    assert check_kit(home.path) == ()
    assert home.registry.version == 2


def test_a_new_certificate_follows_the_plan_within_what_the_authority_may_sign(kits):
    plan = kits / "authority/federation.yaml"
    text = plan.read_text()
    plan.write_text(text.replace("valid_days: 397", "valid_days: 30").replace(f"- {ADDRESS}", f"- x.{HOST}"))
    rotate(kits / "authority", "gateway")
    certificate = Certificate.load(kits / "coordinator-2/keys/gateway.crt")
    assert certificate.names == (HOST, f"x.{HOST}")
    assert certificate.ends - datetime.now(UTC) <= timedelta(days=30)
    plan.write_text(text.replace(f"host: {HOST}", "host: other.example.org"))
    with pytest.raises(ConfigError, match=r"other.example.org is none of the hosts"):
        rotate(kits / "authority", "gateway")
    assert registry(kits / "authority").version == 2


def test_a_renewed_authority_and_its_old_certificate_both_hold_with_old_and_new_gateways(kits):
    authority, server, north = kits / "authority", ServerHome(kits / "coordinator"), SiteHome(kits / "north")
    before = contents(kits / "south") | {"keys": (authority / "ca.key").read_bytes()}
    old = [(server.gateway_certificate, server.gateway_key), (server.superlink_certificate, server.superlink_key)]
    said = "\n".join(rotate(authority, "authority", by="eve"))
    assert {path.name for path in (kits / "certificates-2").iterdir()} == {"coordinator-2", "north-2", "south-2"}
    assert "fedicom site join" in said
    new = [kits / f"certificates-2/coordinator-2/keys/{name}" for name in ("gateway", "superlink")]
    for ca in (kits / "south/trust/ca.crt", kits / "certificates-2/north-2/trust/ca.crt"):
        for host, (certificate, key), renewed in zip((HOST, "127.0.0.1"), old, new, strict=True):
            assert handshake(certificate, key, ca, host) == "TLSv1.3"
            assert handshake(renewed.with_suffix(".crt"), renewed.with_suffix(".key"), ca, host) == "TLSv1.3"
    assert "ca.crt of the authority is in use" in " ".join(
        install_kit(north, read_folder(kits / "certificates-2/north-2"))
    )
    install_kit(server, read_folder(kits / "certificates-2/coordinator-2"))
    assert check_kit(north.path) == check_kit(server.path) == ()
    assert handshake(server.gateway_certificate, server.gateway_key, north.ca, HOST) == "TLSv1.3"
    assert Certificate.load(north.ca).ends > datetime.now(UTC) + timedelta(days=3649)
    assert Certificate.load(north.ca).fingerprint != Certificate.load(kits / "south/trust/ca.crt").fingerprint
    # No other key has changed, and who has not joined yet has lost nothing.
    assert contents(kits / "south") | {"keys": (authority / "ca.key").read_bytes()} == before
    assert registry(authority).members == read_registry(kits / "south/trust/registry.json", north.authority).members
    event = verify(authority / "audit.jsonl")[-1]
    assert event.facts["action"] == "authority's certificate renewed"
    assert event.facts["ca"] == Certificate.load(north.ca).fingerprint
    add(authority, "west")
    assert (kits / "west/trust/ca.crt").read_bytes() == north.ca.read_bytes()


def test_a_site_gets_nothing_secret_with_a_renewed_authority_and_sealed_kits_open(kits, tmp_path):
    rotate(kits / "authority", "authority")
    assert files(kits / "certificates-2/north-2") == TRUST
    assert secrets_of(kits / "certificates-2/south-2") == []
    rotate(kits / "authority", "authority", encrypt=True, out=tmp_path / "sent")
    words = (kits / "authority/passphrases/north-3.passphrase").read_bytes().strip()
    sealed = kit.read_sealed(tmp_path / "sent/certificates-3/north-3.kit", Secret.passphrase(words))
    install_kit(SiteHome(kits / "north"), sealed)
    assert check_kit(kits / "north") == ()


def test_after_the_authoritys_certificate_ran_out_its_renewal_brings_everybody_back(kits, monkeypatch):
    authority, server, north = kits / "authority", ServerHome(kits / "coordinator"), SiteHome(kits / "north")
    with monkeypatch.context() as patch:
        patch.setattr("server.certificates._AUTHORITY_DAYS", -1 / 48)  # it ended half an hour ago
        key, certificate = ((authority / name).read_bytes() for name in ("ca.key", "ca.crt"))
        ended = CertificateAuthority.load(key, certificate).renewed().certificate_pem
    for place in (authority / "ca.crt", server.ca, north.ca):
        place.write_bytes(ended)
    assert "ca.crt ran out" in provisioning.members(authority)[-1]
    with pytest.raises(ConfigError, match="`fedicom provision rotate authority` renews it"):
        rotate(authority, "gateway")
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(server.gateway_certificate, server.gateway_key, north.ca, HOST)
    rotate(authority, "authority")
    install_kit(server, read_folder(kits / "certificates-2/coordinator-2"))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(server.gateway_certificate, server.gateway_key, north.ca, HOST)
    install_kit(north, read_folder(kits / "certificates-2/north-2"))
    assert handshake(server.gateway_certificate, server.gateway_key, north.ca, HOST) == "TLSv1.3"
    assert warnings(server) == warnings(north) == ()


def test_a_renewed_authority_may_sign_for_the_hosts_of_before_and_no_others(kits):
    rotate(kits / "authority", "authority")
    plan = kits / "authority/federation.yaml"
    plan.write_text(plan.read_text().replace(f"host: {HOST}", "host: other.example.org"))
    for what in ("gateway", "authority"):
        with pytest.raises(ConfigError, match=r"other.example.org is none of the hosts"):
            rotate(kits / "authority", what)
    assert registry(kits / "authority").version == 2
    assert {path.name for path in kits.iterdir() if path.name.startswith("cert")} == {"certificates-2"}


def test_a_new_gateway_that_the_authoritys_end_cuts_short_says_so(kits, monkeypatch):
    assert len(rotate(kits / "authority", "gateway")) == 2
    monkeypatch.setattr("server.certificates._AUTHORITY_DAYS", 396)
    rotate(kits / "authority", "authority")
    assert "`fedicom provision rotate authority`" in rotate(kits / "authority", "gateway")[-1]


def test_a_kit_for_somebody_else_or_from_another_authority_is_not_put_in(kits, made):
    rotate(kits / "authority", "north")
    rotate(kits / "authority", "coordinator")
    before = {name: contents(kits / name / "keys") for name in ("north", "south", "coordinator")}
    for home, folder in (
        (SiteHome(kits / "south"), kits / "north-2"),
        (SiteHome(kits / "south"), kits / "coordinator-3"),
        (ServerHome(kits / "coordinator"), kits / "north-2"),
        (SiteHome(kits / "south"), made / "south"),
    ):
        with pytest.raises(ConfigError, match=r"take the right kit|another federation"):
            install_kit(home, read_folder(folder))
    assert {name: contents(kits / name / "keys") for name in before} == before


def test_an_older_kit_does_not_bring_revoked_keys_back(kits):
    home = SiteHome(kits / "north")
    rotate(kits / "authority", "north", out=kits / "a")
    rotate(kits / "authority", "north", out=kits / "b")
    install_kit(home, read_folder(kits / "b/north-3"))
    keys = contents(home.keys)
    with pytest.raises(ConfigError, match=r"registry version 2, this home has version 3 .*provision rotate"):
        install_kit(home, read_folder(kits / "a/north-2"))
    assert contents(home.keys) == keys


def test_a_kit_that_a_newer_registry_overtook_is_refused_with_what_to_do(kits):
    home = ServerHome(kits / "coordinator")
    rotate(kits / "authority", "gateway")
    rotate(kits / "authority", "coordinator")
    install_kit(home, read_folder(kits / "coordinator-3"))
    with pytest.raises(ConfigError, match=r"registry version 2, this home has version 3 .*provision rotate"):
        install_kit(home, read_folder(kits / "coordinator-2"))
    assert home.registry.version == 3


def test_every_change_is_in_the_authoritys_log_with_who_did_it(kits, tmp_path):
    authority = kits / "authority"
    add(authority, "west", by="eve")
    rotate(authority, "west", by="eve")
    revoke(authority, "west", "left", by="adam")
    rotate(authority, "coordinator", by="eve")
    rotate(authority, "gateway", by="eve")
    events = verify(authority / "audit.jsonl", Signer.load(authority / "authority.key").public)
    done = [(e.facts["who"], e.facts["action"], e.facts["version"]) for e in events if e.kind == "operator action"]
    assert done == [
        ("eve", "federation provisioned", 1),
        ("eve", "site added", 2),
        ("eve", "keys rotated", 3),
        ("adam", "keys revoked", 4),
        ("eve", "keys rotated", 5),
        ("eve", "certificates renewed", 6),
    ]
    assert registry(authority).version == 6
    logged = (authority / "audit.jsonl").read_bytes()
    for secret in secrets_of(kits):
        assert secret not in logged


def test_a_kit_that_cannot_be_written_changes_no_registry(kits):
    (kits / "west").mkdir()
    (kits / "west/something").touch()
    before = contents(kits / "authority")
    with pytest.raises(StorageError, match="never overwritten"):
        add(kits / "authority", "west")
    assert contents(kits / "authority") == before


def test_a_folder_without_the_authoritys_key_is_refused_with_what_to_do(kits):
    with pytest.raises(ConfigError, match="give --authority"):
        add(kits / "north", "west")


# --- keys that a site made itself -----------------------------------------------------------------------------


def sent(folder: Path, *, site: str = "west", federation: str = "chest", previous: Signer | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    _, data = public_file(Signer.temporary(), NodeKey.new(), federation=federation, site=site, previous=previous)
    path = folder / "public.json"
    path.write_bytes(data)
    return path


def test_a_site_that_made_its_own_keys_gets_a_kit_without_private_ones(kits, tmp_path):
    path = sent(tmp_path)
    add(kits / "authority", "west", public=path)
    assert files(kits / "west") == TRUST | {"site.yaml"}
    keys = json.loads(path.read_text())["keys"]
    member = registry(kits / "authority").members["west"]
    assert (member.signing, member.node) == (keys["signing"], keys["node"])
    assert "nobody else has them" in (kits / "west/README.md").read_text()


def test_public_keys_of_another_site_or_of_a_member_are_refused(kits, tmp_path):
    authority = kits / "authority"
    for path in (sent(tmp_path, site="east"), sent(tmp_path, federation="brain")):
        with pytest.raises(ConfigError, match="expected west in chest"):
            add(authority, "west", public=path)
    north = (Signer.load(kits / "north/keys/signing.key"), NodeKey.load(kits / "north/keys/node.key"))
    for signer, node in ((north[0], NodeKey.new()), (Signer.temporary(), north[1])):
        _, data = public_file(signer, node, federation="chest", site="west")
        (tmp_path / "public.json").write_bytes(data)
        with pytest.raises(ConfigError, match="hold the same key"):
            add(authority, "west", public=tmp_path / "public.json")
    assert registry(authority).version == 1


def test_new_keys_of_a_member_must_be_signed_with_its_present_key(kits, tmp_path):
    authority = kits / "authority"
    for previous in (None, Signer.temporary()):
        with pytest.raises(ConfigError, match="anybody could have sent them"):
            rotate(authority, "north", public=sent(tmp_path, site="north", previous=previous))
    present = Signer.load(kits / "north/keys/signing.key")
    rotate(authority, "north", public=sent(tmp_path, site="north", previous=present))
    assert files(kits / "north-2") == TRUST
    assert registry(authority).retired["north"] == (present.public,)


@pytest.mark.parametrize("joined", [False, True])
def test_a_lost_kit_of_a_site_that_makes_its_own_keys_is_made_again_from_the_same_public_keys(kits, tmp_path, joined):
    authority, home = kits / "authority", SiteHome(tmp_path / "west")
    public = site_init(home.path, site="west", federation="chest", gateway=f"{HOST}:8443")
    add(authority, "west", public=public)
    if joined:
        install_kit(home, read_folder(kits / "west"))
        public = site_renew(home)
        rotate(authority, "west", public=public)
    before = registry(authority)
    rotate(authority, "west", public=public)  # the one before never arrived, and the site has no other keys to send
    after = registry(authority)
    assert after.version == before.version + 1
    assert (after.sites, after.retired) == (before.sites, before.retired)
    again = read_folder(kits / f"west-{after.version}")
    assert set(again) == TRUST
    install_kit(home, again)
    assert Signer.load(home.signing_key).public == after.sites["west"].signing
    assert check_kit(home.path) == ()
    last = verify(authority / "audit.jsonl")[-1].facts
    assert (last["action"], last["site"], last["version"]) == ("kit made again", "west", after.version)


def test_keys_that_were_retired_or_revoked_do_not_come_back(kits, tmp_path):
    authority = kits / "authority"
    signer, node = Signer.load(kits / "north/keys/signing.key"), NodeKey.load(kits / "north/keys/node.key")
    revoke(authority, "north", "stolen")
    for pair in ((signer, node), (signer, NodeKey.new()), (Signer.temporary(), node)):
        _, data = public_file(*pair, federation="chest", site="north")
        (tmp_path / "public.json").write_bytes(data)
        with pytest.raises(ConfigError, match="has already"):
            add(authority, "north", public=tmp_path / "public.json", out=tmp_path / "out")


# --- what was signed stays as it was --------------------------------------------------------------------------


def test_a_kit_as_it_was_made_is_whole(made):
    for name in ("coordinator", "north", "south", "auditor-anna"):
        assert check_kit(made / name) == ()
        manifest, _ = kit.opened(read_folder(made / name))
        assert (manifest.owner, manifest.federation, manifest.version) == (name, "chest", 1)


@pytest.mark.parametrize("party", ["north", "coordinator"])
def test_every_changed_or_missing_file_is_named(kits, party):
    home, edited = kits / party, {"site.yaml", "server.yaml", "keys/tokens.json", "keys/operator.token"}
    for path in sorted((SITE if party == "north" else COORDINATOR) - {"kit.json", "trust/authority.pub"}):
        place = home / path
        whole = place.read_bytes()
        place.write_bytes(whole.replace(b"\n", b"\n\n", 1) if path in edited else bytes([whole[0] ^ 1]) + whole[1:])
        found = check_kit(home)
        assert bool(found) == (path not in edited), path
        assert all(path in sentence or Path(path).name in sentence for sentence in found), (path, found)
        place.unlink()
        assert any(path in sentence or Path(path).name in sentence for sentence in check_kit(home)), path
        place.write_bytes(whole)
        if path.startswith("keys/"):
            place.chmod(0o640)
            assert any("chmod 600" in sentence and path in sentence for sentence in check_kit(home)), path
            place.chmod(0o600)
    assert check_kit(home) == ()


def test_a_kit_that_was_changed_on_its_way_is_not_put_in_not_even_its_configuration(made):
    whole = read_folder(made / "north")
    for path in whole:
        other = bytes([whole[path][0] ^ 1]) + whole[path][1:]
        for changed in ({**whole, path: other}, {name: data for name, data in whole.items() if name != path}):
            with pytest.raises(ConfigError) as error:
                kit.opened(changed)
            assert path in str(error.value) or path in ("kit.json", "trust/authority.pub")
    with pytest.raises(ConfigError, match=r"extra.sh is not of the kit"):
        kit.opened({**whole, "extra.sh": b"echo"})
    with pytest.raises(ConfigError, match="belongs to another federation or was forged"):
        kit.opened(whole, Signer.temporary().public)


def test_a_manifest_that_was_changed_or_signed_by_somebody_else_is_found(kits):
    home = kits / "north"
    plain = json.loads((home / "kit.json").read_text())
    for change in (
        {"signature": Signer.temporary().sign(b"")},
        {"kit": {**plain["kit"], "owner": "south"}},
        {"kit": {**plain["kit"], "files": {"../../x": "0" * 64}}},
        {"note": 1},
        {"kit": []},
    ):
        (home / "kit.json").write_text(json.dumps({**plain, **change}))
        assert len(check_kit(home)) == 1
    (home / "kit.json").unlink()
    assert "kit.json is missing" in check_kit(home)[0]
    forged = Signer.temporary()
    theirs = replace(SiteHome(home).registry, authority=forged.public)
    (home / "kit.json").write_bytes(kit.signed_kit({}, theirs, "north", theirs.issued, forged)["kit.json"])
    assert "not signed by authority" in check_kit(home)[0]


@given(
    st.binary(max_size=200) | st.sampled_from([b"[" * 50_000, b"null", b"[]", b'{"format":[],"kit":0,"signature":0}'])
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_place_of_a_manifest_or_registry_are_refused(made, data):
    whole = read_folder(made / "north")
    for path in ("kit.json", "trust/registry.json", "trust/authority.pub"):
        with pytest.raises(ConfigError):
            kit.opened({**whole, path: data})


def test_a_whole_forged_kit_is_found_by_the_authoritys_key_from_elsewhere(made, kits):
    right = Signer.load(kits / "authority/authority.key").public
    kit.opened(read_folder(kits / "north"), right)
    with pytest.raises(ConfigError, match=f"expected {right[:12]}"):
        kit.opened(read_folder(made / "north"), right)


def test_a_revoked_site_is_told_so_when_it_has_the_registry(kits):
    revoke(kits / "authority", "north", "left")
    home = SiteHome(kits / "north")
    assert check_kit(home.path) == ()
    assert "north was revoked" in _after_registry(home, kits / "authority")[0]


def test_links_and_strange_files_are_no_kit(made, tmp_path):
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "keys").symlink_to(made / "north/keys")
    with pytest.raises(ConfigError, match="or a link"):
        read_folder(folder)
    with pytest.raises(ConfigError, match="is no folder"):
        read_folder(tmp_path / "missing")


# --- sealed ---------------------------------------------------------------------------------------------------


def test_sealed_kits_open_with_their_own_passphrase_and_nothing_is_written_in_plain(tmp_path, capsys):
    out = tmp_path / "kits"
    told = "\n".join(provision(replace(PLAN, sites=("north",), auditors=()), out, encrypt=True))
    assert {path.name for path in out.iterdir()} == {"authority", "coordinator.kit", "north.kit"}
    words = {path.stem: path.read_text().strip() for path in (out / "authority/passphrases").iterdir()}
    assert sorted(words) == ["coordinator", "north"]
    assert words["north"] != words["coordinator"]
    assert not [secret for secret in words.values() if secret in told]
    assert {path.stat().st_mode & 0o777 for path in (out / "authority/passphrases").iterdir()} == {0o600}
    sealed = (out / "north.kit").read_bytes()
    assert is_sealed(sealed)
    opened = kit.unpack(sealed, Secret.passphrase(words["north"]))
    assert set(opened) == SITE
    assert kit.opened(opened)[0].owner == "north"
    with pytest.raises(StorageError, match="wrong passphrase"):
        kit.unpack(sealed, Secret.passphrase(words["coordinator"]))


def test_one_passphrase_of_the_persons_own_seals_and_is_kept_nowhere(tmp_path):
    out = tmp_path / "kits"
    provision(replace(PLAN, sites=(), auditors=()), out, passphrase=b"a long passphrase")
    assert not (out / "authority/passphrases").exists()
    add(out / "authority", "west", passphrase=b"a long passphrase")
    opened = kit.unpack((out / "west.kit").read_bytes(), Secret.passphrase("a long passphrase"))
    assert set(opened) == SITE
    assert not (out / "west").exists()
    before = contents(out)
    revoke(out / "authority", "west", "left")
    with pytest.raises(StorageError, match=r"west.kit exists"):
        add(out / "authority", "west", passphrase=b"a long passphrase")
    assert (out / "west.kit").read_bytes() == before["west.kit"]


@pytest.mark.parametrize("kind", ["climbing", "absolute", "link", "hard link", "device", "twice", "folder", "hidden"])
def test_an_archive_with_anything_but_plain_files_is_refused(tmp_path, kind):
    entry = tarfile.TarInfo({"climbing": "../x", "absolute": "/tmp/x", "hidden": ".ssh/x"}.get(kind, "x"))
    entry.type = {
        "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "folder": tarfile.DIRTYPE,
    }.get(kind, tarfile.REGTYPE)  # fmt: skip
    entry.linkname = "/etc/passwd" if "link" in kind else ""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for _ in range(2 if kind == "twice" else 1):
            archive.addfile(entry, io.BytesIO())
    key = Secret(1, bytes(32))
    with pytest.raises(ConfigError, match="more than a kit may"):
        kit.unpack(seal(out.getvalue(), key), key)


@pytest.mark.parametrize("data", [b"", b"junk", b"\x00" * 512, b"x" * 2000])
def test_what_is_no_archive_is_no_kit(data):
    key = Secret(1, bytes(32))
    with pytest.raises(FedicomError):
        kit.opened(kit.unpack(seal(data, key), key))


def test_a_sealed_kit_is_whole_or_it_does_not_open(made):
    key = Secret(1, bytes(32))
    sealed = kit.pack(read_folder(made / "north"), key)
    assert kit.unpack(sealed, key) == read_folder(made / "north")
    assert b"Fedicom" not in sealed
    assert unseal(sealed, key)
    with pytest.raises(StorageError):
        kit.unpack(sealed[:-1], key)


# --- warnings -------------------------------------------------------------------------------------------------


def test_what_runs_out_within_thirty_days_is_warned_about(made, tmp_path):
    assert warnings(ServerHome(made / "coordinator")) == ()
    assert warnings(SiteHome(made / "north")) == ()
    provision(replace(PLAN, valid_days=29), tmp_path / "kits")
    found = warnings(ServerHome(tmp_path / "kits/coordinator"))
    assert [sentence.split(" runs out on ")[0] for sentence in found] == ["gateway.crt", "superlink.crt"]
    assert warnings(ServerHome(tmp_path / "kits/coordinator"), days=1) == ()
    (tmp_path / "kits/north/trust/ca.crt").unlink()
    assert "ca.crt" in warnings(SiteHome(tmp_path / "kits/north"))[0]
    assert expiring(made / "authority/ca.crt", 3651)


def test_what_runs_out_is_told_with_what_renews_it(made):
    authority, gateway, superlink = warnings(ServerHome(made / "coordinator"), days=3651)
    assert "provision rotate gateway" in gateway
    assert "provision rotate gateway" in superlink
    assert authority.startswith("ca.crt runs out on")
    assert "; the coordinator renews it with `fedicom provision rotate authority`" in authority
    assert warnings(SiteHome(made / "north"), days=3651) == (authority,)


# --- the command ----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert fedicom.main(["provision", *map(str, words)]) == code
    said = capsys.readouterr()
    return said.out + said.err


def test_the_command_makes_a_federation_from_its_own_example_and_says_nothing_secret(tmp_path, capsys):
    plan, out = tmp_path / "federation.yaml", tmp_path / "kits"
    plan.write_text(run(capsys, "--example"))
    said = run(capsys, plan, "--out", out)
    assert "to the coordinator's server" in said
    assert Signer.load(out / "authority/authority.key").public in said
    said += run(capsys, plan, "--out", out, code=1)
    said += run(capsys, "list", "--authority", out / "authority")
    said += run(capsys, "add", "east", "--authority", out / "authority", "--by", "eve")
    said += run(capsys, "rotate", "east", "--authority", out / "authority")
    said += run(capsys, "revoke", "east", "--why", "left the study", "--authority", out / "authority")
    said += run(capsys, "rotate", "gateway", "--authority", out / "authority")
    home = out / "coordinator"
    said += run(capsys, "registry", out / "authority/registry.json", "--home", home)
    said += run(capsys, "install", out / "coordinator-5", "--home", home)
    said += run(capsys, "rotate", "authority", "--authority", out / "authority")
    said += run(capsys, "install", out / "certificates-6/coordinator-6", "--home", home)
    said += run(capsys, "token", "bob", "--role", "operator", "--home", home)
    said += run(capsys, "token", "bob", "--role", "operator", "--home", home, "--remove")
    said += run(capsys, "key", home / "checkpoint.key")
    assert "revoked" in run(capsys, "list", "--authority", out / "authority")
    for readable in out.rglob("*"):
        if readable.is_file() and readable.stat().st_mode & 0o044:
            said += readable.read_bytes().decode(errors="replace")
    assert len(secrets_of(out)) > 20
    for secret in secrets_of(out):
        assert secret.decode(errors="replace") not in said


@pytest.mark.parametrize("verb", ["", "add", "revoke", "rotate", "list", "registry", "install", "token", "key"])
def test_help_tells_every_verb_and_no_argument_takes_a_secret(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        fedicom.main(["provision", *([verb] if verb else []), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = {word.strip("[],") for word in text.split() if word.strip("[").startswith("--")}
    assert not {"--passphrase", "--password", "--token", "--key"} & options
    if not verb:
        for name in provisioning_verbs():
            assert f"fedicom provision {name} " in text


def provisioning_verbs() -> list[str]:
    from server.provision_cli import _VERBS

    return sorted(_VERBS)


def test_the_passphrase_comes_from_a_variable_or_a_file_and_seals(tmp_path, capsys, monkeypatch):
    plan = tmp_path / "federation.yaml"
    plan.write_text("{name: chest, host: fl.example.org, sites: []}")
    monkeypatch.setenv("KIT_WORDS", "a long passphrase")
    said = run(capsys, plan, "--out", tmp_path / "kits", "--encrypt", "--passphrase-env", "KIT_WORDS")
    assert "a long passphrase" not in said
    assert kit.unpack((tmp_path / "kits/coordinator.kit").read_bytes(), Secret.passphrase("a long passphrase"))


@pytest.mark.parametrize("words", [(), ("--authority", ".")])
def test_inside_the_authoritys_folder_it_is_found_and_no_kit_is_laid_into_it(tmp_path, capsys, monkeypatch, words):
    provision(PLAN, tmp_path / "kits")
    before = {path.name for path in (tmp_path / "kits/authority").iterdir()}
    monkeypatch.chdir(tmp_path / "kits/authority")
    assert "../west to west" in run(capsys, "add", "west", *words)
    assert (tmp_path / "kits/west/site.yaml").is_file()
    assert {path.name for path in Path().iterdir()} - before <= {".lock"}
    monkeypatch.chdir(tmp_path)
    assert "west: key" in run(capsys, "list")
    monkeypatch.chdir(tmp_path / "kits")
    assert "kits/authority is no authority's folder" in run(capsys, "list", code=2)


def test_a_wrong_plan_is_refused_with_file_and_field(tmp_path, capsys):
    plan = tmp_path / "federation.yaml"
    plan.write_text("name: chest\nhost: fl.example.org\nsites: [north, north]\n")
    assert "federation.yaml: every name is given once" in run(capsys, plan, "--out", tmp_path / "kits", code=2)
    assert not (tmp_path / "kits").exists()


def test_the_module_is_what_the_command_calls():
    assert provisioning.provision is provision
