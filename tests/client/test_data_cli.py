"""`fedicom data`: what it prints is right, and names nobody."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

import fedicom
from common.cache import usage
from common.deployment import SiteHome
from common.imaging import Refused, Volume, read_folder
from common.imaging.index import Index
from common.imaging.overview import overview
from common.pseudonyms import pseudonym
from simulations.dicom_writer import Machine, Subject, axial, write_image, write_series

DATA = Path(os.environ.get("FEDICOM_DATA", Path(__file__).parents[3] / "shared" / "data")) / "dicom"
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"


def someone(number: int) -> Subject:
    return Subject(patient_id=f"Mueller^Eva-{number}", entropy=("test_data_cli",))


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    folder = tmp_path / "north"
    stored = np.arange(5 * 64, dtype=np.int16).reshape(5, 8, 8)
    for number, maker in enumerate(("SIEMENS", "GE MEDICAL SYSTEMS", "Dr. Eva Mueller")):
        machine = Machine(modality="CT", manufacturer=maker)
        write_series(folder / "dicom" / f"Mueller{number}", stored, axial(stored.shape, (2, 0.5, 0.5)), machine,
                     someone(number))  # fmt: skip
    (folder / "dicom" / "Mueller1" / "0003.dcm").unlink()
    values = np.zeros((6, 4), np.uint8)
    machine = Machine(modality="CR", bits_stored=8)
    write_image(folder / "dicom" / "x.dcm", values, machine, someone(0), number=50, spacing_mm=(0.25, 0.2))
    (folder / "dicom" / "letter Mueller.txt").write_text("Dear Mrs Mueller")
    (folder / "labels.csv").write_text("patient,label\n")
    time.sleep(0.03)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert fedicom.main(["data", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_inspect_counts_what_is_there(hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(run(capsys, "inspect", hospital, "--json", "--cache", tmp_path / "cache"))
    counts = {name: value for name, value in plain.items() if name != "series"}
    assert counts == {
        "files": 16, "patients": 3, "studies": 3, "volumes": 2, "images": 1, "multiframe_files": 0,
        "by_modality": {"CT": 3, "CR": 1},
        "by_vendor": {"Fedicom": 1, "GE": 1, "Siemens": 1, "other": 1},
        "by_spacing_mm": {"2.00 x 0.50 x 0.50": 2, "0.25 x 0.20": 1},
        "by_transfer_syntax": {"Explicit VR Little Endian": 15},
        "refused": {"gap": 4, "not_dicom": 1},
    }  # fmt: skip
    gap = next(each for each in plain["series"] if each["vendor"] == "GE")
    assert (gap["files"], gap["volumes"], gap["refused"]) == (4, [], {"gap": 4})
    assert plain["series"][0]["volumes"] == [{"size": [5, 8, 8], "spacing_mm": [2.0, 0.5, 0.5]}]


@pytest.mark.parametrize("how", [["--json"], []])
def test_nobody_is_named(hospital: Path, tmp_path: Path, how: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    for words in (["index", hospital, "--hash"], ["inspect", hospital, *how], ["cache"]):
        assert fedicom.main(["data", *map(str, words), "--cache", str(cache)]) == 0
    printed = "".join(capfd.readouterr())
    assert len(printed) > 500
    who = [someone(number) for number in range(3)]
    secrets = ["Mueller", "Eva", "Dear", *(person.accession for person in who)]
    secrets += [person.uid("study", 1) for person in who] + [person.uid("series", 1, 1) for person in who]
    assert [word for word in secrets if word in printed] == []
    assert "1.2.840" not in printed
    assert "2.25." not in printed


def test_a_pseudonym_is_keyed_and_that_of_the_prepared_samples(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    first = json.loads(run(capsys, "inspect", hospital, "--json", "--cache", cache))["series"]
    assert first == json.loads(run(capsys, "inspect", hospital, "--json", "--cache", cache))["series"]
    key = (cache / "pseudonyms.key").read_bytes()
    assert stat.S_IMODE((cache / "pseudonyms.key").stat().st_mode) == 0o600
    assert {each["patient"] for each in first} == {
        pseudonym(key, "patient", someone(number).patient_id)[:12] for number in range(3)
    }
    other = json.loads(run(capsys, "inspect", hospital, "--json", "--cache", tmp_path / "other"))["series"]
    assert not {each["patient"] for each in first} & {each["patient"] for each in other}


def test_a_sites_own_folder_gives_cache_and_key(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = SiteHome(tmp_path / "site")
    home.keys.mkdir(parents=True)
    (home.path / "site.yaml").touch()
    home.cohort_key.write_bytes(bytes(32))
    home.cohort_key.chmod(0o600)
    plain = json.loads(run(capsys, "inspect", hospital, "--json", "--site", home.path))
    assert plain["series"][0]["patient"] == pseudonym(bytes(32), "patient", someone(0).patient_id)[:12]
    assert usage(home.cache).indexes == 1
    home.cohort_key.chmod(0o644)
    assert fedicom.main(["data", "inspect", str(hospital), "--site", str(home.path)]) == 1
    assert "mode 644" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--site", "--cache"])
def test_a_folder_of_images_named_as_site_or_cache_stays_as_it_is(
    hospital: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    images = hospital / "dicom"
    images.chmod(0o755)
    before = sorted(images.rglob("*"))
    for words in (["index", hospital], ["report", hospital, hospital / "labels.csv"], ["drift", hospital, hospital]):
        assert fedicom.main(["data", *map(str, words), word, str(images)]) == 2
        said = capsys.readouterr().err
        assert ("holds no site.yaml" if word == "--site" else "the cache lies inside the folder of images") in said
    assert stat.S_IMODE(images.stat().st_mode) == 0o755  # the PACS may still write here
    assert sorted(images.rglob("*")) == before


def test_the_second_index_reads_only_what_changed(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert run(capsys, "index", hospital, "--cache", cache).startswith("16 files: 16 new or changed, 0 gone. Index: ")
    (hospital / "dicom" / "x.dcm").unlink()
    os.utime(hospital / "dicom" / "Mueller0" / "0001.dcm", ns=(1, 1))
    time.sleep(0.03)
    out = run(capsys, "index", hospital, "--hash", "--cache", cache)
    assert out.startswith("15 files: 1 new or changed, 1 gone, 14 hashed. Index: ")


def test_the_cache_is_shown_limited_and_purged(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    run(capsys, "index", hospital, "--cache", cache)
    assert "no limit" in run(capsys, "cache", "--cache", cache)
    assert "at most 20 GB" in run(capsys, "cache", "20GB", "--cache", cache)
    assert "at most 20 GB" in run(capsys, "cache", "--cache", cache)
    assert "KB freed" in run(capsys, "cache", "purge", "--cache", cache)
    assert usage(cache).total_bytes == 0
    assert fedicom.main(["data", "cache", "much", "--cache", str(cache)]) == 2
    assert "'much' is no size" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedicom.main(["data", "inspect", str(tmp_path / "Mueller"), "--cache", str(tmp_path / "cache")]) == 1
    err = capsys.readouterr().err
    assert "does not exist" in err
    assert "Mueller" not in err


def accounted(root: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Files by refusal: as the overview says without pixels, and as the reader says."""
    seen: dict[str, int] = {}
    with Index(root) as index:
        index.refresh()
        found = list(overview(index))
        codes = [str(each.code) for each in index.refused()]
    for code in codes:
        seen[code] = seen.get(code, 0) + 1
    for series in found:
        for code, count in series.refused.items():
            seen[code] = seen.get(code, 0) + count
    read: dict[str, int] = {}
    for refused in read_folder(root).refused:
        read[str(refused.code)] = read.get(str(refused.code), 0) + 1
    return seen, read


@pytest.mark.parametrize("root", [DATA, PYDICOM], ids=["data folder", "pydicom"])
def test_the_overview_refuses_what_the_reader_refuses_before_it_sees_pixels(root: Path) -> None:
    if not root.is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    seen, read = accounted(root)
    found_in_pixels = {"corrupt", "unsupported_pixels", "truncated", "too_large", "missing_geometry", "incomplete",
                       "single_slice", "mixed_spacing", "localizer"}  # fmt: skip
    for code in seen.keys() | read.keys():
        assert seen.get(code, 0) <= read.get(code, 0), code
        if code not in found_in_pixels:
            assert seen.get(code, 0) == read.get(code, 0), code
    assert sum(seen.values()) > 10


def test_the_overview_finds_the_volumes_that_the_reader_finds() -> None:
    if not DATA.is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    with Index(DATA) as index:
        index.refresh()
        shapes = [size for series in overview(index) for size, _ in series.volumes]
    reading = read_folder(DATA)
    classic = [volume for volume in reading.volumes if len(volume.source.files) > 1]
    assert sorted(shapes) == sorted(volume.values_ZYX.shape for volume in classic)
    assert {type(item) for item in (*reading.volumes, *reading.refused)} == {Volume, Refused}
