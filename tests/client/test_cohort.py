from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cohort import SPLITS, Cohort, open_cohort, split_patients
from common import filling
from common.config import Evaluation, Preprocessing, Recipe, Task
from common.errors import DataError, StorageError
from common.pseudonyms import pseudonym
from common.samples import Samples
from simulations.dicom_writer import Machine, Subject, write_image

KEY = b"a site's own secret"
THIRDS = Evaluation(validation_fraction=0.25, test_fraction=0.25)
RECIPE = Recipe(name="cohort", data=Preprocessing(size=(8, 8), intensity="window", low=0, high=255), evaluation=THIRDS)
CR = Machine(modality="CR", bits_stored=8)


def admit(folder: Path, numbers: Sequence[int], images: int = 1) -> None:
    """Adds patients with CR images; every fourth is positive. Others in the table stay."""
    table = folder / "labels.csv"
    for number in numbers:
        subject = Subject(patient_id=f"MRN-{number:04d}", entropy=("test_cohort",))
        for image in range(1, images + 1):
            values = np.full((8, 8), (number * 7 + image) % 256, np.uint8)
            write_image(folder / "dicom" / f"{number}-{image}.dcm", values, CR, subject, number=image)
    rows = [f"MRN-{number:04d},{'positive' if number % 4 == 0 else 'negative'}" for number in numbers]
    old = table.read_text() if table.exists() else "patient,label\n"
    table.write_text(old + "\n".join(rows) + "\n")


def reopen(folder: Path, recipe: Recipe = RECIPE, key: bytes = KEY) -> Cohort:
    return open_cohort(folder, recipe, cache=folder.parent / "cache", key=key)


def sides(cohort: Cohort) -> dict[str, str]:
    return dict(zip(cohort.samples.patients, cohort.split_P.tolist(), strict=True))


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cohort]:
    """32 patients of two images each, 8 of them positive; tests only read it."""
    folder = tmp_path_factory.mktemp("settled") / "north"
    folder.mkdir()
    admit(folder, range(32), images=2)
    return folder, reopen(folder)


def test_each_class_is_cut_at_the_exact_fractions(settled: tuple[Path, Cohort]) -> None:
    _, cohort = settled
    # 24 negative and 8 positive patients, quarters: 12 + 4, 6 + 2, 6 + 2
    assert [cohort.patients(split) for split in SPLITS] == [16, 8, 8]
    assert [cohort.class_counts(split).tolist() for split in SPLITS] == [[12, 4], [6, 2], [6, 2]]


def test_all_images_of_a_patient_are_on_one_side_and_none_is_lost(settled: tuple[Path, Cohort]) -> None:
    _, cohort = settled
    parts = {split: cohort.indices(split) for split in SPLITS}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(64))
    assert [len(parts[split]) for split in SPLITS] == [32, 16, 16]
    owners = [set(cohort.samples.patient_N[part].tolist()) for part in parts.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 32
    assert parts["train"].dtype == np.int64


def test_opening_again_reads_no_image_and_gives_the_same_cohort(
    settled: tuple[Path, Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cohort = settled

    def fail(*_: object) -> None:
        raise AssertionError("DICOM was read")

    monkeypatch.setattr(filling, "prepared_units", fail)
    monkeypatch.setattr(filling, "Index", fail)
    again = reopen(folder)
    assert again.manifest == cohort.manifest
    assert sides(again) == sides(cohort)


def test_the_manifest_names_the_cohort_by_content_and_preprocessing(settled: tuple[Path, Cohort]) -> None:
    folder, cohort = settled
    darker = replace(RECIPE, data=replace(RECIPE.data, mean=0.5))
    assert len(cohort.manifest) == 64
    assert reopen(folder, darker).manifest != cohort.manifest
    assert sides(reopen(folder, darker)) == sides(cohort)
    assert reopen(folder, replace(RECIPE, rounds=99, seed=3)).manifest == cohort.manifest


def test_newcomers_go_by_threshold_and_nobody_moves(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    admit(folder, range(16))
    before = sides(reopen(folder))
    admit(folder, range(16, 28))
    after = sides(reopen(folder))
    assert {patient: after[patient] for patient in before} == before
    for patient in after.keys() - before.keys():
        value = int(pseudonym(KEY, "split", patient)[:12], 16) / 16**12
        assert after[patient] == ("validation" if value < 0.25 else "test" if value < 0.5 else "train")
    # Somebody leaves and comes back.
    image, table = folder / "dicom" / "3-1.dcm", (folder / "labels.csv").read_text()
    content = image.read_bytes()
    image.unlink()
    (folder / "labels.csv").write_text("\n".join(row for row in table.splitlines() if "MRN-0003" not in row))
    without = sides(reopen(folder))
    assert len(without) == 27
    assert without.items() <= after.items()
    image.write_bytes(content)
    (folder / "labels.csv").write_text(table)
    assert sides(reopen(folder)) == after


patients = st.dictionaries(st.text("0123456789abcdef", min_size=1, max_size=6), st.sampled_from("012"), min_size=1)
fractions = st.builds(Evaluation, validation_fraction=st.floats(0, 0.49), test_fraction=st.floats(0, 0.49))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(patients, fractions), min_size=1, max_size=5))
def test_nobody_ever_moves_whoever_comes_and_goes(visits: list[tuple[dict[str, str], Evaluation]]) -> None:
    split: dict[str, str] = {}
    for present, evaluation in visits:
        later = split_patients(present, split, evaluation, KEY)
        assert split.items() <= later.items()
        assert later.keys() == split.keys() | present.keys()
        assert set(later.values()) <= set(SPLITS)
        split = later


@settings(deadline=None, max_examples=100)
@given(patients, fractions, st.randoms(use_true_random=False))
def test_a_first_split_keeps_its_fractions_in_every_class(present, evaluation, random) -> None:  # type: ignore[no-untyped-def]
    split = split_patients(present, {}, evaluation, KEY)
    shuffled = list(present.items())
    random.shuffle(shuffled)
    assert split_patients(dict(shuffled), {}, evaluation, KEY) == split
    for name, size in Counter(present.values()).items():
        count = Counter(split[patient] for patient in present if present[patient] == name)
        wanted = size * evaluation.validation_fraction
        assert abs(count["validation"] - wanted) < 1 + 1e-6 or count["validation"] == max(size - 1, 0)
        assert count["train"] >= 1
        if size >= 3 and evaluation.validation_fraction > 0:
            assert count["validation"] >= 1
        if evaluation.validation_fraction == 0:
            assert count["validation"] == 0
        if evaluation.test_fraction == 0:
            assert count["test"] == 0


def test_the_key_decides_who_goes_where() -> None:
    present = {f"{number:04x}": "0" for number in range(100)}
    one, two = (split_patients(present, {}, THIRDS, key) for key in (KEY, b"another site's key"))
    assert Counter(one.values()) == Counter(two.values()) == {"train": 50, "validation": 25, "test": 25}
    assert one != two


def test_newcomers_follow_the_fractions_in_the_long_run() -> None:
    present = {f"{number:04x}": "0" for number in range(4000)}
    split = split_patients({**present, "known": "0"}, {"known": "train"}, THIRDS, KEY)
    count = Counter(split.values())
    # 4,000 draws at 1/4: standard deviation 27
    assert abs(count["validation"] - 1000) < 110
    assert abs(count["test"] - 1000) < 110


def test_where_nobody_is_known_it_is_a_first_split_again_and_who_was_known_stays() -> None:
    known = {f"{number:04x}": "train" for number in range(50)}
    present = {f"b{number:04x}": str(number % 2) for number in range(40)}
    split = split_patients(present, known, THIRDS, KEY)
    assert {patient: split[patient] for patient in known} == known
    assert {patient: split[patient] for patient in present} == split_patients(present, {}, THIRDS, KEY)
    assert Counter(split[patient] for patient in present) == {"train": 20, "validation": 10, "test": 10}


def test_a_recipe_with_other_fractions_moves_nobody_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    admit(folder, range(16))
    before = sides(reopen(folder))
    none = replace(RECIPE, evaluation=Evaluation(validation_fraction=0.0, test_fraction=0.0))
    with caplog.at_level(logging.WARNING):
        assert sides(reopen(folder, none)) == before
    assert "frozen" in caplog.text


def test_fractions_of_zero_leave_everybody_for_training(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    admit(folder, range(8))
    none = replace(RECIPE, evaluation=Evaluation(validation_fraction=0.0, test_fraction=0.0))
    cohort = reopen(folder, none)
    assert [cohort.patients(split) for split in SPLITS] == [8, 0, 0]
    assert cohort.indices("validation").tolist() == []
    assert cohort.class_counts("test").tolist() == [0, 0]


def test_three_patients_are_too_few_and_freeze_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    admit(folder, range(3))
    with pytest.raises(DataError, match=r"3 patients .* for training; at least 5 \(evaluation.min_cell\)"):
        reopen(folder)
    assert not list(tmp_path.rglob("cohort_manifest.json"))
    admit(folder, range(3, 32))
    assert [reopen(folder).patients(split) for split in SPLITS] == [16, 8, 8]


def test_one_class_is_no_cohort(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    admit(folder, [1, 2, 3, 5, 6, 7, 9, 10])
    with pytest.raises(DataError, match="one class only: only the class 'negative'"):
        reopen(folder)


@pytest.mark.parametrize("damage", ["moved", "cut", "key"])
def test_a_manifest_that_cannot_be_trusted_is_never_replaced(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    admit(folder, range(16))
    reopen(folder)
    manifest = tmp_path / "cache" / "cohort_manifest.json"
    key = KEY
    if damage == "moved":
        plain = json.loads(manifest.read_text())
        someone = next(name for name, side in plain["split"].items() if side == "validation")
        plain["split"][someone] = "train"
        manifest.write_text(json.dumps(plain))
    elif damage == "cut":
        manifest.write_bytes(manifest.read_bytes()[:50])
    else:
        key = b"the secret of another site"
    left = manifest.read_bytes()
    with pytest.raises(StorageError, match="restore"):
        reopen(folder, key=key)
    assert manifest.read_bytes() == left


def test_the_manifest_keeps_pseudonyms_fractions_and_key_column(settled: tuple[Path, Cohort]) -> None:
    folder, cohort = settled
    text = (folder.parent / "cache" / "cohort_manifest.json").read_text()
    plain = json.loads(text)
    assert plain["split"] == sides(cohort)
    assert plain["fractions"] == {"validation": 0.25, "test": 0.25}
    assert plain["task_key"] == "patient"
    assert "MRN" not in text


def test_a_patient_with_any_positive_image_is_stratified_as_positive(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    rows = ["series,label"]
    for number in range(20):
        subject = Subject(patient_id=f"MRN-{number:04d}", entropy=("series",))
        for image in (1, 2):
            write_image(
                folder / "dicom" / f"{number}-{image}.dcm", np.full((8, 8), number, np.uint8), CR, subject, number=image
            )
            worst = number < 4 and image == 2
            rows.append(f"{subject.uid('series', 1, image)},{'positive' if worst else 'negative'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    cohort = reopen(folder, replace(RECIPE, task=Task(key="series")))
    # 4 positive patients, quarters; every patient has a negative image
    assert [cohort.class_counts(split).tolist() for split in SPLITS] == [[10, 2], [5, 1], [5, 1]]


def test_multi_label_patients_are_spread_by_their_rarest_finding(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    rows = ["patient,common,rare"]
    for number in range(40):
        subject = Subject(patient_id=f"MRN-{number:04d}", entropy=("multi",))
        write_image(folder / "dicom" / f"{number}.dcm", np.full((8, 8), number, np.uint8), CR, subject)
        rows.append(f"{subject.patient_id},{int(number % 2 == 0)},{int(number < 8)}")
    (folder / "labels.csv").write_text("\n".join(rows))
    cohort = reopen(folder, replace(RECIPE, task=Task(kind="multilabel", classes=("common", "rare"))))
    assert [int(cohort.class_counts(split)[1]) for split in SPLITS] == [4, 2, 2]
    assert sum(int(cohort.class_counts(split)[0]) for split in SPLITS) == 20


def test_five_thousand_patients_are_split_class_by_class(tmp_path: Path) -> None:
    count = 5000
    names = tuple(sorted(pseudonym(KEY, "patient", str(number))[:16] for number in range(count)))
    samples = Samples(
        np.zeros((count, 1, 8, 8), np.float32), np.arange(count) % 2, np.arange(count), names, {}, "0" * 64
    )
    split = split_patients(dict(zip(names, map(str, samples.targets_N), strict=True)), {}, THIRDS, KEY)
    cohort = Cohort(samples, np.array([split[name] for name in names]), "", {})
    assert cohort.class_counts("train").tolist() == [1250, 1250]
