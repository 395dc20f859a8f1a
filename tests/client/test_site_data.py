"""What site.yaml says about a site's data, in a running node: limits of quality, the encrypted cache, versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from client.data_cli import data_verb
from client.preflight import preflight
from client.quality.gate import require_quality
from client.versions import known
from common.deployment import QualityGate
from common.errors import ConfigError, DataError
from common.exchange import Hello, Update
from tests.client.conftest import House
from tests.client.test_resident import RECIPE, Node, refused

LENIENT = {"min_class_patients": 3, "max_missing_fraction": 1.0, "max_text_fraction": 1.0, "max_suspect_fraction": 1.0}


def report(house: House, folder: Path, out: Path) -> int:
    return data_verb(["report", str(folder), "--site", str(house.home.path), "--out", str(out / "quality.html")])


def test_a_site_with_limits_trains_only_while_its_newest_report_keeps_them(house: House, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(house.images, images)
    house.configure(quality=LENIENT, data=str(images))
    node = Node(house)
    why = refused(node.hello(), "data", node)
    assert why.startswith("the data of this site does not keep the site's own limits")
    assert not any(letter.isdigit() for letter in why)  # no number of the report leaves
    assert "there is no quality report" in node.resident.state.last_refusal["here"]

    report(house, images, tmp_path)
    assert isinstance(node.hello(), Hello)
    assert isinstance(node.visit(), Update)

    house.configure(quality={**LENIENT, "min_class_patients": 1000})  # stricter, while the node runs
    why = refused(node.visit(2), "data", node)
    assert "at least 1000 are asked for" in node.resident.state.last_refusal["here"]
    house.configure(quality=LENIENT)
    assert isinstance(node.visit(2), Update)

    (images / "labels.csv").write_text((images / "labels.csv").read_text() + "\n")
    node.restart()
    refused(node.visit(3), "data", node)
    assert "have changed since the last quality report" in node.resident.state.last_refusal["here"]
    report(house, images, tmp_path)
    assert isinstance(node.visit(3), Update)
    house.configure(quality=None)
    node.restart()
    house.home.quality_file(images).unlink()
    assert isinstance(node.hello(), Hello)


def test_a_duplicate_under_two_patients_stops_a_site_that_asks_for_the_defaults(house: House, tmp_path: Path) -> None:
    from pydicom import dcmread

    images = tmp_path / "images"
    shutil.copytree(house.images, images)
    files = sorted((images / "dicom").rglob("*.dcm"))
    one, other = dcmread(files[0]), dcmread(files[-1])
    assert one.PatientID != other.PatientID
    other.PixelData, other.RescaleSlope, other.RescaleIntercept = one.PixelData, one.RescaleSlope, one.RescaleIntercept
    other.save_as(files[-1])
    house.configure(quality={}, data=str(images))
    assert report(house, images, tmp_path) == 1
    lines = [line for line in preflight(house.home, images=True, probe=False) if line.what == "quality"]
    assert lines == []  # no recipe is approved yet: nothing would be trained
    node = Node(house)
    refused(node.hello(), "data", node)
    assert "equal images under different patients: 1, at most 0" in node.resident.state.last_refusal["here"]
    (line,) = [line for line in preflight(house.home, images=True, probe=False) if line.what == "quality"]
    assert line.level == "FAIL"
    assert "equal images under different patients" in line.says


def test_the_limits_need_a_data_folder(house: House) -> None:
    house.configure(data=None)
    with pytest.raises(DataError, match="names no data folder"):
        require_quality(house.home, QualityGate(), RECIPE.name)


def test_a_hospital_in_several_studies_has_a_folder_and_a_report_for_each(house: House, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(house.images, other)
    house.configure(data=None)
    house.configure(data={"another study": str(other)}, quality=LENIENT)
    report(house, other, tmp_path)
    node = Node(house)
    refused(node.hello(), "data", node)
    assert node.resident.state.last_refusal["here"] == (
        f"site.yaml: data names no folder for recipe {RECIPE.name!r} (it has: 'another study'); add a line for it"
    )
    house.configure(data=None)
    house.configure(data={"another study": str(other), RECIPE.name: str(house.images)})
    refused(node.hello(), "data", node)
    assert "there is no quality report" in node.resident.state.last_refusal["here"]  # the other folder's is none
    report(house, house.images, tmp_path)
    assert isinstance(node.hello(), Hello)
    (other / "labels.csv").write_text((other / "labels.csv").read_text() + "\n")
    node.restart()
    assert isinstance(node.visit(), Update)
    report(house, other, tmp_path)
    node.restart()
    assert isinstance(node.hello(), Hello)
    (line,) = [line for line in preflight(house.home, images=True, probe=False) if line.what == "quality"]
    assert (line.level, line.says) == (
        "ok", f"{RECIPE.name}: the newest report is about these images, and keeps the limits",
    )  # fmt: skip
    house.configure(data=None)
    house.configure(data={"another study": str(other)})
    lines = list(preflight(house.home, images=True, probe=False))
    assert [line for line in lines if line.what == "quality"] == []
    (line,) = [line for line in lines if line.what == "images"]
    assert (line.level, f"names no folder for recipe {RECIPE.name!r}" in line.says) == ("FAIL", True)
    shutil.rmtree(other)
    (line,) = [line for line in preflight(house.home, images=True, probe=False) if line.what == "images"]
    assert line.says.startswith("the data folder is missing")
    house.configure(data=None)
    house.configure(data={"another study": "nowhere", RECIPE.name: str(house.images)})
    (line,) = [line for line in preflight(house.home, images=True, probe=False) if line.what == "images"]
    assert line.says.startswith("the data folder nowhere is missing")


def test_the_limits_look_at_a_relative_data_folder_below_the_sites_home(house: House, tmp_path: Path) -> None:
    images = house.home.path / "images"
    shutil.copytree(house.images, images)
    house.configure(quality=LENIENT, data="images")
    report(house, images, tmp_path)
    assert Path.cwd() != house.home.path
    assert isinstance(Node(house).hello(), Hello)


def test_the_key_of_site_yaml_encrypts_what_the_node_keeps_of_its_images(house: House) -> None:
    plain = Node(house).hello()
    shutil.rmtree(house.home.cache)
    (house.home.keys / "cache.key").write_bytes(bytes(range(32)))
    (house.home.keys / "cache.key").chmod(0o600)
    house.configure(cache={"key": "keys/cache.key"})
    node = Node(house)
    manifest = house.home.cache / "cohort_manifest.json"
    sealed = node.hello()
    assert isinstance(sealed, Hello)
    assert sealed.manifest == plain.manifest  # the split is decided by the site's key: the same patients, the same bits
    assert manifest.exists()
    kinds = {path.suffix for path in house.home.cache.rglob("*") if path.is_file() and path.name != ".lock"}
    assert ".sealed" in kinds
    assert ".npy" not in kinds
    (version,) = known(house.home.state, house.home.cohort_key.read_bytes(), bytes(range(32)))
    assert version.manifest == sealed.manifest
    shown = {
        path.name
        for path in house.home.state.rglob("*")
        if path.is_file() and any(name.encode() in path.read_bytes() for name in version.members)
    }
    assert shown == {"cohort_manifest.json"}
    assert data_verb(["diff", "--site", str(house.home.path)]) == 0
    assert isinstance(node.visit(), Update)
    (house.home.keys / "cache.key").chmod(0o644)
    node.restart()
    assert "cannot read its images" in refused(node.visit(2), "data", node)
    (house.home.keys / "cache.key").chmod(0o600)
    (house.home.keys / "cache.key").write_bytes(bytes(32))
    refused(node.visit(2), "data", node)
    assert "the key is another one" in node.resident.state.last_refusal["here"]
    house.configure(cache={"kee": "keys/cache.key"})
    with pytest.raises(ConfigError, match=r"cache\.kee: no such field\. Did you mean key\?"):
        house.home.config  # noqa: B018


def test_every_version_that_a_node_worked_on_is_on_record_with_what_was_corrected(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Node(house)
    hello = node.hello()
    key = house.home.cohort_key.read_bytes()
    (version,) = known(house.home.state, key)
    assert version.manifest == hello.manifest
    assert version.settings["data"]["correct_tilt"] is False
    assert version.corrected == {}
    assert data_verb(["diff", "--site", str(house.home.path), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["manifest"], listed["recipe"]) == (hello.manifest, RECIPE.name)
