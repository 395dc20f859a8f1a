"""Pulling from a real PACS: Orthanc of Debian's packages, alone in a network namespace with its client.

Orthanc 1.10 listens on all addresses, so it is never started where anybody else could reach it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    generate_uid,
)

ORTHANC = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
ROOT = Path(__file__).parents[2]
USER, PASSWORD = "researcher", "s3cret-Pa55word"
NAME, PATIENT = "MARKER^PATIENT", "MRN-4711"
HTTP, DICOM = 8042, 4242

_UNSHARE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")


def why_not() -> str | None:
    if ORTHANC is None or not PLUGIN.exists():
        return "Orthanc is not installed: apt-get install orthanc orthanc-dicomweb, or make test-pacs"
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip", "curl")):
        return "unshare, nsenter, ip or curl is missing: apt-get install util-linux iproute2 curl"
    if subprocess.run([*_UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        return "this machine lets nobody make a network namespace, and Orthanc would listen on all addresses"
    return None


_when = os.environ.get("FEDICOM_TEST_PACS")
REQUIRED = _when == "required"
"""Set by `make test-pacs`: there a test that cannot run is a test that fails."""

_why = "these run next, in make test-pacs" if _when == "later" else why_not()
pytestmark = [pytest.mark.skipif(_why is not None and not REQUIRED, reason=str(_why)), pytest.mark.timeout(600)]


class Net:
    """A network of its own, with nothing in it but loopback."""

    def __init__(self) -> None:
        script = "ip link set lo up && echo up && exec sleep infinity"
        self._holder = subprocess.Popen([*_UNSHARE, "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n"
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self.inside = ["nsenter", "--target", str(self._holder.pid), *user, "--net"]

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@dataclass
class Orthanc:
    """A PACS that can be started, killed and started again."""

    net: Net
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    http: int = HTTP
    dicom: int = DICOM
    curl: tuple[str, ...] = ("--user", f"{USER}:{PASSWORD}")
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {
            "Name": "test", "StorageDirectory": str(self.folder / "db"), "IndexDirectory": str(self.folder / "db"),
            "HttpPort": self.http, "DicomPort": self.dicom, "DicomAet": "ORTHANC", "RemoteAccessAllowed": True,
            "AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD}, "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowFind": True, "DicomCheckCalledAet": True, "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}, **self.options,
        }  # fmt: skip
        self.folder.mkdir(exist_ok=True)
        (self.folder / "orthanc.json").write_text(json.dumps(settings))
        with (self.folder / "orthanc.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.net.inside, str(ORTHANC), str(self.folder / "orthanc.json")], stdout=log, stderr=log
            )
        for _ in range(1200):
            if self.rest("GET", "/system").returncode == 0:
                return
            assert self.process.poll() is None, (self.folder / "orthanc.log").read_text()[-2000:]
            time.sleep(0.05)
        raise AssertionError("Orthanc did not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()  # nsenter becomes Orthanc, so this is kill -9 of the server
            self.process.wait()
            self.process = None

    def rest(self, method: str, path: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        body = [] if data is None else ["--data-binary", "@-"]
        url = f"http://localhost:{self.http}{path}"
        words = ["curl", "-sf", "-m", "20", *self.curl, "-X", method, *body, url]
        return subprocess.run([*self.net.inside, *words], input=data, capture_output=True)

    def load(self, datasets: list[Dataset]) -> None:
        for dataset in datasets:
            done = self.rest("POST", "/instances", encoded(dataset))
            assert json.loads(done.stdout)["Status"] == "Success"


def instance(
    study: str, series: str, number: int, *, syntax: str = ExplicitVRLittleEndian, size: int = 64, **more: Any
) -> Dataset:
    """One CT slice of noise: nothing two slices would share."""
    image = np.random.default_rng(number).integers(0, 4096, (size, size), np.uint16)
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    made.StudyInstanceUID, made.SeriesInstanceUID = study, series
    made.PatientName, made.PatientID, made.StudyDate, made.Modality = NAME, PATIENT, "20260301", "CT"
    made.BodyPartExamined, made.InstanceNumber = "CHEST", number
    made.Rows = made.Columns = size
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    for keyword, value in more.items():
        setattr(made, keyword, value)
    if syntax == JPEG2000Lossless:
        made.PixelData = encapsulate([imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="j2k")])
    elif syntax == JPEGLSLossless:
        made.PixelData = encapsulate([imagecodecs.jpegls_encode(image)])
    else:
        made.PixelData = image.tobytes()
    made["PixelData"].VR = "OW" if syntax == ExplicitVRLittleEndian else "OB"
    return made


def encoded(dataset: Dataset) -> bytes:
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def a_study(seed: str, slices: int, **more: Any) -> list[Dataset]:
    study, series = generate_uid(entropy_srcs=["study", seed]), generate_uid(entropy_srcs=["series", seed])
    return [instance(study, series, number, **more) for number in range(slices)]


def pixels(datasets: list[Dataset]) -> dict[str, str]:
    return {each.SOPInstanceUID: hashlib.sha256(each.PixelData).hexdigest() for each in datasets}


def files(out: Path) -> list[Path]:
    return sorted((out / "dicom").rglob("*.dcm"))


def received(out: Path) -> list[Path]:
    """Also of series that are not whole."""
    return sorted(path for folder in ("dicom", "pull/partial") for path in (out / folder).rglob("*.dcm"))


def pulled(out: Path) -> dict[str, str]:
    return pixels([dcmread(path) for path in files(out)])


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    assert _why is None, _why
    net = Net()
    yield net
    net.close()


@pytest.fixture(scope="module")
def loaded(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orthanc, list[Dataset]]]:
    """A PACS with seven studies: five of CT, one of another body part, one of another modality."""
    server = Orthanc(net, tmp_path_factory.mktemp("orthanc"))
    server.start()
    wanted = [each for number in range(4) for each in a_study(str(number), 3, AccessionNumber=f"A{number}")]
    compressed = a_study("packed", 0)
    study, j2k, jls = (generate_uid(entropy_srcs=["packed", name]) for name in ("study", "j2k", "jls"))
    compressed += [instance(study, j2k, number, syntax=JPEG2000Lossless) for number in range(2)]
    compressed += [instance(study, jls, number, syntax=JPEGLSLossless) for number in range(2, 4)]
    compressed += [instance(study, jls, 4)]  # one series, two syntaxes
    others = a_study("head", 1, BodyPartExamined="HEAD") + a_study("mr", 1, Modality="MR")
    old = a_study("old", 1, StudyDate="20251231")
    try:
        server.load([*wanted, *compressed, *others, *old])
        yield server, [*wanted, *compressed]
    finally:
        server.kill()


def home_for(folder: Path, server: Orthanc, **more: Any) -> Path:
    """A site's folder whose pacs.yaml knows this server in several ways."""
    folder.mkdir()
    for name, text in (("right.user", f"{USER}:{PASSWORD}\n"), ("wrong.user", f"{USER}:nonsense-{PASSWORD}\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    common = {"unsafe_no_tls": True, "timeout_s": 20.0, "tries": 8, "first_wait_s": 0.3}
    url = f"http://localhost:{server.http}/dicom-web"
    web = {"kind": "dicomweb", "url": url, "user_file": "right.user", **common}
    dimse = {"kind": "dimse", "host": "localhost", "port": server.dicom, "called_ae": "ORTHANC", **common}
    hasty = {"tries": 2, "first_wait_s": 0.1}
    pacs = {"web": web, "paged": {**web, "page": 2}, "wrong": {**web, "user_file": "wrong.user"}, "dimse": dimse,
            "stranger": {**dimse, "called_ae": "NOBODY"}, "hasty-web": {**web, **hasty},
            "hasty-dimse": {**dimse, **hasty}, **more}  # fmt: skip
    (folder / "pacs.yaml").write_text(json.dumps({"pacs": pacs}))
    return folder


@pytest.fixture
def home(loaded: tuple[Orthanc, list[Dataset]], tmp_path: Path) -> Path:
    return home_for(tmp_path / "home", loaded[0])


@pytest.fixture
def own(net: Net, tmp_path: Path) -> Iterator[Orthanc]:
    """A PACS that a test may harm."""
    server = Orthanc(net, tmp_path / "orthanc", http=8142, dicom=4342)
    server.start()
    yield server
    server.kill()


_COMMAND = """
import sys
from client.pacs import pull_verb
from common.errors import FedicomError
try:
    sys.exit(pull_verb(sys.argv[1:]))
except FedicomError as error:
    sys.exit(f"fedicom: {error}")
"""


def command(net: Net, home: Path, out: Path, pacs: str, *words: str) -> list[str]:
    asked = (
        "--pacs",
        pacs,
        "--modality",
        "CT",
        "--since",
        "2026-01-01",
        "--until",
        "2026-04-30",
        "--body-part",
        "CHEST",
    )
    return [*net.inside, sys.executable, "-c", _COMMAND, "--site", str(home), "--out", str(out), *asked, *words]


def pull(net: Net, home: Path, out: Path, pacs: str, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(net, home, out, pacs, *words), cwd=ROOT, capture_output=True, text=True, timeout=480)
    said = done.stdout + done.stderr
    for secret in (PASSWORD, "MARKER", PATIENT, "1.2.826", "Traceback"):
        assert secret not in said, said
    return done


def start(net: Net, home: Path, out: Path, pacs: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(net, home, out, pacs, *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(true: Callable[[], object], seconds: float = 240) -> None:
    for _ in range(int(seconds / 0.02)):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("way", ["web", "paged", "dimse"])
def test_each_way_brings_every_asked_image_with_the_pixels_that_the_pacs_was_given(loaded, home, tmp_path, way):
    server, wanted = loaded
    done = pull(server.net, home, tmp_path / "out", way)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 studies: 17 images fetched"), done.stdout  # that of the head is found by its study
    assert pulled(tmp_path / "out") == pixels(wanted)
    syntaxes = {
        dcmread(path).SOPInstanceUID: dcmread(path).file_meta.TransferSyntaxUID for path in files(tmp_path / "out")
    }
    assert syntaxes == {each.SOPInstanceUID: each.file_meta.TransferSyntaxUID for each in wanted}
    again = pull(server.net, home, tmp_path / "out", way)
    assert "0 images fetched" in again.stdout
    assert "17 were here" in again.stdout


@pytest.mark.parametrize(("way", "says"), [("wrong", "refuses us (HTTP 401)"), ("stranger", "rejects the association")])
def test_a_wrong_password_or_title_is_said_at_once_and_not_tried_again(loaded, home, tmp_path, way, says):
    done = pull(loaded[0].net, home, tmp_path / "out", way)
    assert done.returncode == 1
    assert says in done.stderr
    assert "tried" not in done.stderr
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_labels_accession_numbers_and_a_limit(loaded, home, tmp_path, way):
    server, wanted = loaded
    (tmp_path / "accessions.txt").write_text("A1\nA2\nA99\n")
    (tmp_path / "labels.csv").write_text("accession,label\nA1,sick\nA3,well\n")
    words = ("--accessions", str(tmp_path / "accessions.txt"), "--labels", str(tmp_path / "labels.csv"))
    done = pull(server.net, home, tmp_path / "out", way, *words)
    assert done.stdout.startswith("2 studies: 6 images fetched")
    assert "labels by accession: 1 of 2 studies have one, 1 of 2 labels have no images" in done.stdout
    assert pulled(tmp_path / "out") == pixels([each for each in wanted if each.get("AccessionNumber") in ("A1", "A2")])
    listed = (tmp_path / "out" / "pull" / "labels.csv").read_text().splitlines()
    assert "label without images,3,A3," in listed
    assert len([line for line in listed if line.startswith("images without label")]) == 1
    assert (tmp_path / "out" / "pull" / "labels.csv").stat().st_mode & 0o777 == 0o600
    assert pull(server.net, home, tmp_path / "one", way, "--limit", "1").stdout.startswith("1 study")


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_a_study_deleted_between_search_and_fetch_is_reported_and_the_other_arrives(own, tmp_path, way):
    studies = {made[0].StudyInstanceUID: made for made in (a_study("one", 20), a_study("two", 20))}
    own.load([each for made in studies.values() for each in made])
    out = tmp_path / "out"
    running = start(own.net, home_for(tmp_path / "home", own), out, way, "--rate", "0.05")
    until(lambda: received(out))
    first = dcmread(received(out)[0]).StudyInstanceUID
    (other,) = set(studies) - {first}
    found = own.rest("POST", "/tools/lookup", other.encode())
    assert own.rest("DELETE", json.loads(found.stdout)[0]["Path"]).returncode == 0
    said, errors = running.communicate(timeout=400)
    assert running.returncode == 1, errors
    assert said.startswith("2 studies: 20 images fetched")
    assert "1 study vanished" in said
    assert pulled(out) == pixels(studies[first])
    report = out / "pull" / "report.csv"
    assert report.read_text().splitlines()[1] == f"{other},,vanished"
    assert report.stat().st_mode & 0o777 == 0o600


def journal(out: Path) -> dict[str, str]:
    with sqlite3.connect(out / "pull" / "journal.sqlite") as connection:
        return dict(connection.execute("SELECT instance, sha256 FROM done"))


def marks(out: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in received(out)}


def check_whole(out: Path, wanted: list[Dataset], before: dict[str, tuple[int, int]]) -> None:
    """Nothing lost, nothing fetched twice, nothing else there, and the journal tells the truth."""
    assert pulled(out) == pixels(wanted)
    assert before.items() <= marks(out).items()
    hashes_ = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files(out)}
    assert journal(out) == hashes_
    assert not list((out / "pull").glob("*.part"))


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_a_server_that_dies_and_comes_back_loses_nothing_and_sends_nothing_twice(own, tmp_path, way):
    wanted = a_study("one", 24, size=512)  # more than the network holds on its way
    own.load(wanted)
    out = tmp_path / "out"
    running = start(own.net, home_for(tmp_path / "home", own), out, way, "--rate", "3")
    until(lambda: len(received(out)) >= 5)
    own.kill()
    before = marks(out)
    assert files(out) == []  # the series is not whole
    assert len(before) < 24
    own.start()
    said, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    assert said.startswith("1 study: 24 images fetched")
    check_whole(out, wanted, before)


@pytest.mark.parametrize("way", ["hasty-web", "hasty-dimse"])
def test_a_server_that_stays_dead_ends_the_pull_and_the_next_one_goes_on(own, tmp_path, way):
    wanted = a_study("one", 24, size=512)  # more than the network holds on its way
    own.load(wanted)
    out, home_ = tmp_path / "out", home_for(tmp_path / "home", own)
    running = start(own.net, home_, out, way, "--rate", "3")
    until(lambda: len(received(out)) >= 5)
    own.kill()
    _, errors = running.communicate(timeout=400)
    assert running.returncode == 1
    assert "tried 2 times in a row; what was pulled is kept" in errors
    before = marks(out)
    assert files(out) == []  # the series is not whole
    own.start()
    done = pull(own.net, home_, out, way)
    assert done.stdout.startswith(f"1 study: {24 - len(before)} images fetched"), done.stdout + done.stderr
    check_whole(out, wanted, before)


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_a_client_killed_at_any_moment_goes_on_where_it_was(own, tmp_path, way):
    wanted = a_study("one", 24, size=512)  # more than the network holds on its way
    own.load(wanted)
    out, home_ = tmp_path / "out", home_for(tmp_path / "home", own)
    for least in (4, 9):
        running = start(own.net, home_, out, way, "--rate", "3")
        until(lambda least=least: len(received(out)) >= least)
        running.send_signal(signal.SIGKILL)  # nsenter becomes the client
        running.communicate()
    before = marks(out)
    assert files(out) == []  # the series is not whole
    assert 9 <= len(before) < 24
    done = pull(own.net, home_, out, way)
    assert done.stdout.startswith(f"1 study: {24 - len(before)} images fetched"), done.stdout + done.stderr
    check_whole(out, wanted, before)


def test_a_full_disk_is_named_and_what_was_pulled_stays(own, tmp_path):
    wanted = a_study("one", 40)
    own.load(wanted)
    out, home_ = tmp_path / "out", home_for(tmp_path / "home", own)
    out.mkdir()
    mount = (
        'mount -t tmpfs -o size=300k,mode=700 tmpfs "$0" && "$@"; code=$?; '
        'ls -R "$0/pull/partial" | grep -c dcm; exit $code'
    )
    inside = command(own.net, home_, out, "web")
    at = len(own.net.inside)
    words = [*inside[:at], "unshare", "--mount", "sh", "-c", mount, str(out), *inside[at:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400)
    if "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount a small file system")
    assert done.returncode == 1
    assert "free space" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < int(done.stdout.split()[-1]) < 40


# --- TLS, client certificates, tokens


def certificates(folder: Path) -> None:
    """An authority, and under it a server's and a client's certificate; another authority that nobody knows."""

    def write(name: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None) -> Any:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer[0] if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if issuer is None:
            made = made.add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
            )
        else:
            made = made.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[1].public_key()), critical=False
            )
        signed = made.sign(issuer[1] if issuer else key, hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}.key").write_bytes(private)
        (folder / f"{name}.key").chmod(0o600)
        return subject, key

    authority = write("authority", None)
    write("stranger", None)
    for name in ("server", "client"):
        write(name, authority)


_GUARD = """
import asyncio, ssl, sys
port, behind, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=f"{folder}/authority.crt")
context.load_cert_chain(f"{folder}/server.crt", f"{folder}/server.key")
context.verify_mode = ssl.CERT_REQUIRED

async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    there, back = await asyncio.open_connection("127.0.0.1", behind)
    await asyncio.gather(pump(reader, back), pump(there, writer))

async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", port, ssl=context) as server:
        print("up", flush=True)
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def guarded(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orthanc, Path]]:
    """A PACS that wants a client certificate, and a token over HTTP.

    Its DICOM port speaks TLS itself. Debian's Orthanc 1.10 dies of the first HTTPS connection, so there TLS ends in
    front of it, as behind a hospital's proxy.
    """
    folder = tmp_path_factory.mktemp("guarded")
    certificates(folder)
    (folder / "token.lua").write_text(
        "function IncomingHttpRequestFilter(method, uri, ip, username, headers)\n"
        "  return headers['authorization'] == 'Bearer t0ken-of-the-site'\nend\n"
    )
    options = {
        "AuthenticationEnabled": False, "LuaScripts": [str(folder / "token.lua")],
        "DicomTlsEnabled": True, "DicomTlsRemoteCertificateRequired": True,
        "DicomTlsCertificate": str(folder / "server.crt"), "DicomTlsPrivateKey": str(folder / "server.key"),
        "DicomTlsTrustedCertificates": str(folder / "authority.crt"),
    }  # fmt: skip
    curl = ("-H", "Authorization: Bearer t0ken-of-the-site")
    server = Orthanc(net, folder / "orthanc", options, http=8242, dicom=4442, curl=curl)
    words = [*net.inside, sys.executable, "-c", _GUARD, "8243", "8242", str(folder)]
    guard = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert guard.stdout is not None
        assert guard.stdout.readline() == "up\n"
        server.start()
        server.load(a_study("one", 3))
        yield server, folder
    finally:
        server.kill()
        guard.kill()
        guard.wait()


@pytest.mark.parametrize(
    ("way", "change", "says"),
    [
        ("web", {}, None),
        ("dimse", {}, None),
        ("web", {"ca": "stranger.crt"}, "the certificate of the PACS is not accepted"),
        ("dimse", {"ca": "stranger.crt"}, "TLS with the PACS fails"),
        ("web", {"certificate": None, "key": None}, "PACS refuses our certificate, or wants one"),
        ("dimse", {"certificate": None, "key": None}, "TLS with the PACS fails"),
        ("web", {"token_file": "wrong.token"}, "refuses us (HTTP 403)"),
    ],
)
def test_tls_is_checked_both_ways_and_a_token_opens(guarded, tmp_path, way, change, says):
    server, folder = guarded
    for name, token in (("right.token", "t0ken-of-the-site\n"), ("wrong.token", "another\n")):
        (folder / name).write_text(token)
        (folder / name).chmod(0o600)
    common = {"ca": "authority.crt", "certificate": "client.crt", "key": "client.key", "tries": 2, "first_wait_s": 0.1}
    web = {"kind": "dicomweb", "url": "https://localhost:8243/dicom-web", "token_file": "right.token"}
    dimse = {"kind": "dimse", "host": "localhost", "port": server.dicom, "called_ae": "ORTHANC"}
    settings = {**(web if way == "web" else dimse), **common, **change}
    (folder / "pacs.yaml").write_text(json.dumps({"pacs": {way: settings}}))
    done = pull(server.net, folder, tmp_path / "out", way)
    if says is None:
        assert done.returncode == 0, done.stderr
        assert pulled(tmp_path / "out") == pixels(a_study("one", 3))
    else:
        assert done.returncode == 1
        assert says in done.stderr
        assert "t0ken" not in done.stderr
