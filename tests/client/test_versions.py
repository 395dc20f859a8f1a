"""What changed between two versions of a cohort, from its files to the words on the screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client import versions
from client.cohort import Cohort, frozen_split, open_cohort
from client.quality import cli
from client.versions import Member, Version, difference, find, known
from common.config import Evaluation, Preprocessing, Recipe
from common.errors import ConfigError, DataError, StorageError
from common.pseudonyms import pseudonym
from common.storage import private_folder, write_whole
from simulations.dicom_writer import Machine, Subject, write_image

KEY = b"v" * 32
SECRET = bytes(range(32))
RECIPE = Recipe(
    name="versions", data=Preprocessing(size=(8, 8), intensity="window", low=0, high=255),
    evaluation=Evaluation(validation_fraction=0.25, test_fraction=0.25),
)  # fmt: skip


def patient(number: int) -> str:
    return pseudonym(KEY, "patient", f"MRN-{number:04d}")[:16]


def write(folder: Path, number: int, value: int, image: int = 1) -> None:
    subject = Subject(patient_id=f"MRN-{number:04d}", entropy=("versions",))
    pixels = np.full((8, 8), value, np.uint8)
    write_image(folder / "dicom" / f"{number}-{image}.dcm", pixels, Machine(modality="CR", bits_stored=8), subject,
                number=image)  # fmt: skip


def label(folder: Path, numbers: Sequence[int], positive: Sequence[int]) -> None:
    rows = [f"MRN-{number:04d},{'positive' if number in positive else 'negative'}" for number in numbers]
    (folder / "labels.csv").write_text("\n".join(["patient,label", *rows]) + "\n")


def opened(folder: Path, recipe: Recipe = RECIPE) -> Cohort:
    return open_cohort(folder, recipe, cache=folder.parent / "state" / "cache", key=KEY, state=folder.parent / "state")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """16 patients with one image each; 0, 4, 8 and 12 are positive."""
    place = tmp_path / "north"
    for number in range(16):
        write(place, number, 10 * number)
    label(place, range(16), (0, 4, 8, 12))
    return place


def test_what_was_changed_in_the_folder_is_what_is_said(folder: Path) -> None:
    old = opened(folder).manifest
    write(folder, 16, 200)  # a new patient
    (folder / "dicom" / "1-1.dcm").unlink()  # one leaves
    write(folder, 2, 77)  # another image
    write(folder, 3, 78, image=2)  # a second image
    label(folder, [0, *range(2, 17)], (0, 4, 8, 5, 6))  # 12 becomes negative, 5 and 6 positive
    new = opened(folder).manifest
    state = folder.parent / "state"
    found = difference(find(state, KEY, old), find(state, KEY, new[:8]))
    assert (found.old, found.new) == (old, new)
    assert found.patients_added == (patient(16),)
    assert found.patients_removed == (patient(1),)
    assert found.patients_with_changed_images == (patient(2),)
    assert (found.images_added, found.images_removed) == (1, 0)
    assert found.labels_changed == {"negative -> positive": 2, "positive -> negative": 1}
    assert (found.splits_changed, found.settings_changed, found.images_comparable) == ({}, {}, True)
    back = difference(find(state, KEY, new), find(state, KEY, old))
    assert back.patients_added == (patient(1),)
    assert back.labels_changed == {"negative -> positive": 1, "positive -> negative": 2}
    assert (back.images_added, back.images_removed) == (0, 1)


def test_another_preprocessing_is_named_by_field_and_images_are_not_compared(folder: Path) -> None:
    old = opened(folder).manifest
    label(folder, range(16), (0, 4, 8, 12, 5))
    new = opened(folder, replace(RECIPE, data=replace(RECIPE.data, high=200, mean=0.5))).manifest
    state = folder.parent / "state"
    found = difference(find(state, KEY, old), find(state, KEY, new))
    assert found.settings_changed == {"data.high": (255.0, 200.0), "data.mean": (0.0, 0.5)}
    assert not found.images_comparable
    assert found.patients_with_changed_images == ()
    assert found.labels_changed == {"negative -> positive": 1}


def test_augmentation_and_rounds_make_no_new_version(folder: Path) -> None:
    opened(folder)
    noisy = replace(RECIPE.data, augmentation=replace(RECIPE.data.augmentation, noise_std=0.1))
    opened(folder, replace(RECIPE, rounds=99, data=noisy))
    assert len(known(folder.parent / "state", KEY)) == 1


def test_a_known_version_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)
    monkeypatch.setattr(versions, "write_whole", lambda *_: pytest.fail("written again"))
    opened(folder)


def test_without_a_state_folder_nothing_is_recorded(folder: Path) -> None:
    open_cohort(folder, RECIPE, cache=folder.parent / "cache", key=KEY)
    assert not list(folder.parent.rglob("versions"))


def test_records_are_private_and_hold_no_identifier(folder: Path) -> None:
    manifest = opened(folder).manifest
    path = folder.parent / "state" / "versions" / f"{manifest}.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    text = path.read_text()
    assert "MRN" not in text
    assert set(json.loads(text)["members"]) == {patient(number) for number in range(16)}


def everything(folder: Path, *leave_out: str) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in leave_out)


def test_with_a_key_of_the_cache_no_record_shows_a_patient_and_the_history_goes_on(folder: Path) -> None:
    state, cache = folder.parent / "state", folder.parent / "state" / "cache"
    first = opened(folder).manifest  # there was no key yet
    label(folder, range(16), (0, 4, 8, 12, 5))
    second = open_cohort(folder, RECIPE, cache=cache, key=KEY, state=state, secret=SECRET).manifest
    assert {path.name for path in (state / "versions").iterdir()} == {f"{first}.sealed", f"{second}.sealed"}
    assert patient(5).encode() not in everything(state, "cohort_manifest.json")
    assert patient(5).encode() in everything(state)  # the split outlives the key
    assert [each.manifest for each in sorted(known(state, KEY, SECRET), key=lambda each: each.manifest != first)] == [
        first, second,
    ]  # fmt: skip
    found = difference(find(state, KEY, first, SECRET), find(state, KEY, second, SECRET))
    assert found.labels_changed == {"negative -> positive": 1}
    with pytest.raises(StorageError, match=r"is encrypted and there is no key.*--site"):
        known(state, KEY)
    with pytest.raises(StorageError, match=r"cache\.key is another one"):
        find(state, KEY, first, bytes(32))
    opened(folder)  # the key was taken away: what is known is not written in plain
    assert {path.suffix for path in (state / "versions").iterdir()} == {".sealed"}


def test_a_record_that_a_kill_left_in_both_forms_is_one_version(folder: Path) -> None:
    state = folder.parent / "state"
    manifest = opened(folder).manifest
    plain = state / "versions" / f"{manifest}.json"
    text = plain.read_bytes()
    again = {"cache": state / "cache", "key": KEY, "state": state, "secret": SECRET}
    open_cohort(folder, RECIPE, **again)
    plain.write_bytes(text)
    assert len(known(state, KEY, SECRET)) == 1
    assert find(state, KEY, manifest, SECRET).manifest == manifest
    open_cohort(folder, RECIPE, **again)
    assert not plain.exists()
    sealed = plain.with_suffix(".sealed")
    for damaged in (b"", sealed.read_bytes()[:40], sealed.read_bytes()[:-1]):
        sealed.write_bytes(damaged)
        with pytest.raises(StorageError, match="restore or remove the record"):
            known(state, KEY, SECRET)


def test_a_patient_who_changed_sides_is_counted() -> None:
    def version(side: str) -> Version:
        members = {"p": Member(split=side, images=(("00", 1),), subgroups=(("F",),))}
        return Version(manifest="0" * 64, recorded="", recipe="r", settings={}, members=members)

    found = difference(version("train"), version("test"))
    assert found.splits_changed == {"train -> test": 1}
    assert not found.nothing
    assert difference(version("train"), version("train")).nothing


def test_a_record_that_was_changed_or_has_another_key_is_not_believed(folder: Path) -> None:
    manifest = opened(folder).manifest
    state = folder.parent / "state"
    path = state / "versions" / f"{manifest}.json"
    with pytest.raises(StorageError, match="was changed"):
        find(state, b"w" * 32, manifest)
    path.write_text(path.read_text().replace('"train"', '"test"', 1))
    with pytest.raises(StorageError, match="was changed"):
        known(state, KEY)
    path.write_text("{}")
    with pytest.raises(StorageError, match="cannot be read"):
        find(state, KEY, manifest)


@pytest.mark.parametrize(("prefix", "error"), [("abc", ConfigError), ("../../x", ConfigError), ("0" * 12, DataError)])
def test_a_name_that_is_no_version_is_refused(tmp_path: Path, prefix: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        find(tmp_path, KEY, prefix)


def test_the_frozen_split_is_what_the_cohort_uses(folder: Path) -> None:
    cache = folder.parent / "state" / "cache"
    assert frozen_split(cache, KEY) is None
    cohort = opened(folder)
    assert frozen_split(cache, KEY) == dict(zip(cohort.samples.patients, cohort.split_P.tolist(), strict=True))
    with pytest.raises(StorageError, match="another site key"):
        frozen_split(cache, b"w" * 32)


def test_the_command_lists_versions_and_says_what_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = private_folder(folder.parent / "plain")
    write_whole(cache / "pseudonyms.key", KEY)
    manifests = []
    for positive in ((0, 4, 8, 12), (0, 4, 8, 12, 1)):
        label(folder, range(16), positive)
        manifests.append(open_cohort(folder, RECIPE, cache=cache, key=KEY, state=cache).manifest)
    assert cli.diff_verb(["--cache", str(cache)]) == 0
    listed = capsys.readouterr().out
    assert all(manifest[:12] in listed for manifest in manifests)
    assert cli.diff_verb([*manifests, "--cache", str(cache)]) == 0
    assert "label negative -> positive: 1\n" in capsys.readouterr().out
    assert cli.diff_verb([*manifests, "--cache", str(cache), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels_changed"] == {"negative -> positive": 1}
    assert cli.diff_verb([manifests[0], manifests[0], "--cache", str(cache)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="two versions"):
        cli.diff_verb([manifests[0], "--cache", str(cache)])
