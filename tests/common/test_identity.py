"""Keys and certificates: where they lie, what they sign, when they end."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, StorageError
from common.identity import Certificate, NodeKey, Signer, expiring, node_signed_by, signed_by

# RFC 8032, section 7.1, test 3
SECRET = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
SIGNATURE = (
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "a.key"
    path.write_bytes(bytes.fromhex(SECRET))
    path.chmod(0o600)
    return path


def test_a_key_signs_as_in_rfc_8032(key):
    signer = Signer.load_or_create(key)
    assert signer.public == PUBLIC
    assert signer.sign(b"\xaf\x82") == SIGNATURE
    assert signed_by(PUBLIC, b"\xaf\x82", SIGNATURE)


def test_a_new_key_is_kept_for_its_owner_alone_and_read_back(tmp_path):
    path = tmp_path / "keys" / "north.key"
    made = Signer.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert Signer.load_or_create(path).public == made.public


def test_two_keys_differ(tmp_path):
    assert Signer.load_or_create(tmp_path / "a").public != Signer.load_or_create(tmp_path / "b").public
    assert Signer.temporary().public != Signer.temporary().public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o610])
def test_a_key_that_others_may_read_is_refused_with_what_to_do(key, mode):
    key.chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        Signer.load_or_create(key)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_the_wrong_length_is_refused(tmp_path, size):
    path = tmp_path / "a.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(StorageError, match=f"has {size} bytes, expected 32"):
        Signer.load_or_create(path)


def test_the_key_shows_in_no_text(key):
    assert SECRET not in repr(Signer.load_or_create(key)).lower()


@given(st.binary(max_size=20), st.integers(0, 511))
@settings(max_examples=40, deadline=None)
def test_no_changed_bit_of_a_signature_is_accepted(data, bit):
    signer = Signer.temporary()
    raw = bytearray.fromhex(signer.sign(data))
    raw[bit // 8] ^= 1 << bit % 8
    assert not signed_by(signer.public, data, raw.hex())
    assert not signed_by(signer.public, data + b"x", signer.sign(data))


@given(st.text(max_size=130), st.text(max_size=70))
@settings(max_examples=60, deadline=None)
def test_junk_is_never_a_signature_and_never_an_error(signature, public):
    assert not signed_by(PUBLIC, b"\xaf\x82", signature)
    assert not signed_by(public, b"\xaf\x82", SIGNATURE)


@pytest.mark.parametrize("spelling", [SIGNATURE.upper(), " " + SIGNATURE, SIGNATURE[:2] + " " + SIGNATURE[2:]])
def test_a_signature_has_one_spelling(spelling):
    assert not signed_by(PUBLIC, b"\xaf\x82", spelling)


def test_loading_a_key_that_is_not_there_makes_none(tmp_path):
    with pytest.raises(StorageError, match="signing key"):
        Signer.load(tmp_path / "a.key")
    assert list(tmp_path.iterdir()) == []


def test_a_public_key_has_one_spelling():
    assert not signed_by(PUBLIC.upper(), b"\xaf\x82", SIGNATURE)
    assert not signed_by(PUBLIC[:2] + " " + PUBLIC[2:], b"\xaf\x82", SIGNATURE)


def test_a_node_key_is_one_that_flower_accepts(tmp_path):
    from argparse import Namespace

    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    path = tmp_path / "node.key"
    key = NodeKey.new()
    path.write_bytes(key.private)
    keys = _try_setup_client_authentication(
        Namespace(auth_supernode_private_key=str(path), auth_supernode_public_key=None)
    )
    assert keys is not None
    assert uses_nist_ec_curve(keys[1])
    assert keys[1].public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() == key.public
    path.chmod(0o600)
    assert NodeKey.load(path).public == key.public


def test_a_node_key_reads_as_openssh_reads_it(tmp_path):
    program = shutil.which("ssh-keygen")
    if program is None:
        pytest.skip("OpenSSH is not installed")
    path = tmp_path / "node.key"
    key = NodeKey.new()
    path.write_bytes(key.private)
    path.chmod(0o600)
    done = subprocess.run([program, "-y", "-f", str(path)], capture_output=True, text=True, check=True)
    assert " ".join(done.stdout.split()[:2]) == key.public


def test_a_node_key_signs_and_junk_is_no_signature():
    key, other = NodeKey.new(), NodeKey.new()
    signature = key.sign(b"data")
    assert node_signed_by(key.public, b"data", signature)
    assert not node_signed_by(other.public, b"data", signature)
    assert not node_signed_by(key.public, b"Data", signature)
    for junk in ("", "zz", "00", signature[:-2], signature + "00"):
        assert not node_signed_by(key.public, b"data", junk)
    for public in ("", "ecdsa-sha2-nistp256 AAAA", "ssh-ed25519 AAAA", key.public[:-8]):
        assert not node_signed_by(public, b"data", signature)


@pytest.mark.parametrize("kind", ["ed25519", "p521", "junk", "pkcs8"])
def test_a_key_that_is_no_node_key_is_refused(tmp_path, kind):
    path = tmp_path / "node.key"
    made = {
        "ed25519": lambda: Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        ),
        "p521": lambda: ec.generate_private_key(ec.SECP521R1()).private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        ),
        "pkcs8": lambda: ec.generate_private_key(ec.SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
        "junk": lambda: b"junk",
    }
    path.write_bytes(made[kind]())
    path.chmod(0o600)
    with pytest.raises(StorageError, match="OpenSSH format on P-256 or P-384"):
        NodeKey.load(path)


BEGIN, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Fedicom gateway")])
    alternative = x509.SubjectAlternativeName(
        [x509.DNSName("fl.example.org"), x509.IPAddress(ipaddress.ip_address("10.1.2.3"))]
    )
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 7)
        .not_valid_before(BEGIN)
        .not_valid_after(END)
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "gateway.crt"
    path.write_bytes(made.public_bytes(Encoding.PEM))
    return path


def test_a_certificate_tells_whom_it_is_for_and_how_long(certificate):
    read = Certificate.load(certificate)
    assert (read.subject, read.names) == ("Fedicom gateway", ("fl.example.org", "10.1.2.3"))
    assert (read.begins, read.ends) == (BEGIN, END)
    assert len(read.fingerprint) == 64


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (END - timedelta(days=31), None),
        (END - timedelta(days=30), None),
        (END - timedelta(days=29, hours=1), "gateway.crt runs out on 2026-03-01 00:00 UTC, in 29 days"),
        (END - timedelta(hours=1), "in 0 days"),
        (END, "ran out on 2026-03-01 00:00 UTC"),
        (END + timedelta(days=400), "ran out"),
        (BEGIN - timedelta(seconds=1), "valid only from 2026-01-01 00:00 UTC; check this machine's clock"),
    ],
)
def test_a_certificate_that_ends_within_thirty_days_is_warned_about(certificate, now, says):
    sentence = expiring(certificate, 30, now)
    assert (sentence is None) == (says is None)
    if says is not None:
        assert says in sentence


@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_without_a_certificate_is_an_error_and_not_a_pass(tmp_path, junk):
    path = tmp_path / "gateway.crt"
    path.write_bytes(junk)
    with pytest.raises(ConfigError, match="holds no certificate in PEM form"):
        expiring(path)
    with pytest.raises(StorageError):
        expiring(tmp_path / "missing.crt")
