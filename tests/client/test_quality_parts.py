"""The parts of the quality report, each against numbers that can be checked by hand or a reference of others."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from pydantic import ValidationError
from sklearn.metrics import cohen_kappa_score

from client.quality.agreement import WEIGHTINGS, agreement, kappa
from client.quality.gate import QualityGate, objections
from client.quality.hashes import THRESHOLD, distance, near_pairs, perceptual_hash, pixel_digest, shrunk
from client.quality.suspects import find_suspects
from client.quality.table import read_table
from client.quality.writing import MIN_LETTERS, letters
from common.errors import ConfigError, DataError
from simulations.phantoms import _Patient, body_hu, hospitals, radiograph

KINDS = hospitals(4)


def chest(number: int, size: int = 256) -> np.ndarray:
    """A phantom radiograph of one of four hospitals, values 0 to 255."""
    patient = _Patient("P", number % 2, "F", "65+", 1, KINDS[number % 4], number)
    return 255 * np.clip(radiograph(patient, np.random.default_rng(number), size), 0, 1.2) / 1.2


# Agreement


def test_kappa_of_the_textbook_example_is_0_4() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    one = [1] * 25 + [0] * 25
    two = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    found = agreement(("annotator_a", "annotator_b"), one, two, [str(at) for at in range(50)], ("no", "yes"))
    assert found.kappa.value == pytest.approx(0.4)
    assert (found.items, found.same) == (50, 35)
    assert found.confusion == ((15, 10), (5, 20))
    assert found.kappa.low is not None
    assert found.kappa.high is not None
    # asymptotic standard error sqrt(po (1 - po) / (n (1 - pe)^2)) = 0.1296: 0.4 -+ 1.96 * 0.13
    assert found.kappa.low == pytest.approx(0.4 - 0.254, abs=0.04)
    assert found.kappa.high == pytest.approx(0.4 + 0.254, abs=0.04)
    # two classes have one distance
    assert found.linear.value == found.quadratic.value == found.kappa.value


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_kappa_is_that_of_scikit_learn(weighting: str) -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(4, size=300)
    two = np.clip(one + rng.integers(-1, 2, size=300), 0, 3)
    confusion = np.zeros((1, 4, 4))
    np.add.at(confusion[0], (one, two), 1)
    expected = cohen_kappa_score(one, two, weights=None if weighting == "none" else weighting)
    assert kappa(confusion, weighting)[0] == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]


def test_images_of_one_patient_widen_the_interval_of_kappa() -> None:
    one, two = [1, 0] * 50, [1, 0] * 30 + [0, 1] * 20
    alone = agreement(("a", "b"), one, two, [str(at) for at in range(100)], ("no", "yes")).kappa
    together = agreement(("a", "b"), one, two, [str(at // 10) for at in range(100)], ("no", "yes")).kappa
    assert alone.value == together.value == pytest.approx(0.2)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)  # type: ignore[operator]


def test_kappa_of_one_class_alone_is_not_defined() -> None:
    assert agreement(("a", "b"), [1, 1], [1, 1], ["p", "q"], ("no", "yes")).kappa.value is None


# Hashes


def test_means_over_parts_are_exact_also_where_parts_share_a_pixel() -> None:
    assert shrunk(np.arange(6, dtype=np.float32)[None], (1, 3)).tolist() == [[0.5, 2.5, 4.5]]
    # thirds of (0, 3): (0, 0, 3, 3) / 3 parts of 4/3 pixels: [0, 0 + 0/3], [2/3 of 0, 2/3 of 3], [3, 3]
    assert shrunk(np.array([[0, 0, 3, 3]], np.float32), (1, 3))[0] == pytest.approx([0, 1.5, 3])
    assert shrunk(np.array([[2.0]], np.float32), (1, 4)).tolist() == [[2, 2, 2, 2]]


def test_the_digest_sees_one_pixel_and_the_shape() -> None:
    image = np.zeros((4, 6), np.float32)
    changed = image.copy()
    changed[3, 5] = 1
    assert pixel_digest(image) == pixel_digest(image.copy(order="F"))
    assert len({pixel_digest(image), pixel_digest(changed), pixel_digest(image.reshape(6, 4))}) == 3


def test_a_copy_with_noise_gain_and_another_matrix_is_near_and_other_patients_are_not() -> None:
    rng = np.random.default_rng(0)
    images = [chest(number) for number in range(24)]
    hashes = np.stack([perceptual_hash(image.astype(np.float32)) for image in images])
    for image, own in zip(images, hashes, strict=True):
        for copy in (
            image + rng.normal(0, 3, image.shape),
            0.5 * image + 40,
            shrunk(image.astype(np.float32), (128, 128)),
            255 * (image / 255) ** 1.2,
        ):
            assert distance(perceptual_hash(copy.astype(np.float32)), own) <= THRESHOLD
    pairs, _ = near_pairs(hashes)
    assert len(pairs) == 0


def test_volumes_have_hashes_of_their_own() -> None:
    made = [body_hu(_Patient("P", 0, "F", "65+", 1, KINDS[0], at), np.random.default_rng(at), 24) for at in range(4)]
    hashes = np.stack([perceptual_hash(volume) for volume in made])
    assert len(near_pairs(hashes)[0]) == 0
    assert distance(perceptual_hash(made[0] + 5), hashes[0]) <= THRESHOLD


def test_pairs_are_those_that_comparing_all_with_all_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, size=(300, 2), dtype=np.uint64)
    for row in range(100):  # copies with 0 to 19 flipped bits
        flipped = np.unpackbits(hashes[row].view(np.uint8))
        flipped[rng.choice(128, row % 20, replace=False)] ^= 1
        hashes[200 + row] = np.packbits(flipped).view(np.uint64)
    first, second = np.triu_indices(300, 1)
    apart = distance(hashes[first], hashes[second])
    expected = {(int(a), int(b)) for a, b in zip(first[apart <= 10], second[apart <= 10], strict=True)}
    pairs, bits = near_pairs(hashes)
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert len(expected) == 55  # 11 of each 20 have at most 10 flipped bits
    assert bits.max() == 10


def test_of_many_equal_hashes_each_is_a_pair_with_the_first_alone() -> None:
    pairs, bits = near_pairs(np.array([[7, 7]] * 4, np.uint64))
    assert pairs.tolist() == [[0, 1], [0, 2], [0, 3]]
    assert bits.tolist() == [0, 0, 0]


# Text


@pytest.mark.parametrize(("size", "least"), [(256, 9), (512, 12)])
def test_drawn_text_is_found_and_clean_phantoms_are_not_suspect(size: int, least: int) -> None:
    # letters of 7 and 15 pixels; at 256 pixels those on bright ground run together with it
    found = []
    for number in range(12):
        image = chest(number, size)
        assert (letters(image.astype(np.float32)) or 0) < MIN_LETTERS
        page = Picture.fromarray(image.astype(np.uint8))
        font = ImageFont.load_default(size=size // 24)
        where = [(6, 6), (size // 2, 6), (6, size - size // 12), (size // 2, size - size // 12)][number // 3 % 4]
        ImageDraw.Draw(page).text(where, ["JANE DOE 1961", "MRN 00123456", "14.03.2021"][number % 3], 255, font)
        found.append((letters(np.asarray(page, np.float32)) or 0) >= MIN_LETTERS)
    assert sum(found) >= least


def test_a_side_marker_and_a_bone_edge_are_no_text() -> None:
    image = chest(1)
    page = Picture.fromarray(image.astype(np.uint8))
    ImageDraw.Draw(page).text((8, 8), "R", 255, ImageFont.load_default(size=24))
    ImageDraw.Draw(page).line((0, 40, 255, 10), 255, 3)
    assert (letters(np.asarray(page, np.float32)) or 0) < MIN_LETTERS


def test_small_images_are_not_examined_and_blank_ones_hold_no_text() -> None:
    assert letters(np.zeros((127, 500), np.float32)) is None
    assert letters(np.zeros((200, 200), np.float32)) == 0


# Suspects


def test_flipped_labels_of_a_separable_task_are_named_and_hardly_any_other() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(200) % 2
    x = rng.normal(0, 1, (200, 40)) + 1.2 * truth[:, None] * (np.arange(40) < 10)  # 3.8 standard deviations apart
    flipped = rng.choice(200, 10, replace=False)
    given = truth.copy()
    given[flipped] ^= 1
    found = find_suspects(x, given, np.arange(200), np.arange(200), 2)
    named = [row for row, _, _ in found.named]
    assert len(set(named) & set(flipped.tolist())) >= 9
    assert len(set(named) - set(flipped.tolist())) <= 2
    assert all(to == truth[row] for row, to, _ in found.named if row in flipped)


def test_features_that_tell_nothing_name_nobody() -> None:
    rng = np.random.default_rng(0)
    found = find_suspects(rng.normal(0, 1, (100, 20)), np.arange(100) % 2, np.arange(100), np.arange(100), 2)
    assert found.named == ()
    assert "cannot tell the classes apart" in found.why_not


def test_a_class_of_nine_patients_is_not_examined() -> None:
    target = np.array([1] * 9 + [0] * 30)
    found = find_suspects(np.zeros((39, 5)), target, np.arange(39), np.arange(39), 2)
    assert (found.auroc, found.named) == (None, ())
    assert "1 of 2 classes" in found.why_not


# Table


def test_a_table_says_its_own_classes_and_annotators() -> None:
    found = read_table(b"series,label,annotator_a,annotator_b,sex\n1.2,b,b,a,F\n1.3,a,a,,M\n")
    assert (found.task.key, found.task.kind, found.task.classes) == ("series", "binary", ("a", "b"))
    assert found.annotators == {"annotator_a": {"1.2": 1, "1.3": 0}, "annotator_b": {"1.2": 0}}
    ordered = read_table(b"patient,label\nx,high\ny,low\nz,mid\n", ["low", "mid", "high"])
    assert [ordered.labels[name].target for name in "xyz"] == [2, 0, 1]


def test_columns_of_zeros_and_ones_are_a_multi_label_task() -> None:
    found = read_table(b"study,effusion,mass,age\ns1,1,0,50\ns2,0,0,61\n")
    assert (found.task.kind, found.task.classes) == ("multilabel", ("effusion", "mass"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name,label\nx,a\ny,b\n", "first column"),
        (b"patient,label\nx,a\ny,a\n", "fewer than two classes"),
        (b"patient,label\nx,a\ny\n", "row 3"),
        (b"patient,label\nx,a\n\n\ny\n", "row 5"),  # as the spreadsheet shows it
        (b"patient;label\nx;a\ny;b\n", "separate the columns by commas"),
        (b"patient,age\nx,50\ny,51\n", "no column 'label'"),
        (b"patient,label\n" + b"".join(b"p%d,DOE%d\n" % (at, at) for at in range(60)), "60 different values"),
        (
            b'patient,label\nx,a\ny,"DOE has\na cough"\n',
            "a class has no name of one line",
        ),
        (b"patient,label\nx,a\ny," + 201 * b"DOE" + b"\n", "a class has no name of one line and 1 to 200"),
        (b"", "is empty"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_without_a_cell(text: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        read_table(text)
    assert "DOE" not in str(refused.value)


def test_classes_that_are_not_named_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 classes that --classes does not name"):
        read_table(b"patient,label\nx,a\ny,b\n", ["a", "c"])


# Gate

CLEAN = {
    "images": 100, "volumes": 0, "files": 100, "unlabelled": 0, "duplicates": [], "agreement": [], "refused": {},
    "near_duplicates_across_patients": 3, "missing_tags": {"Manufacturer": {"missing": 50, "of": 100},
    "PixelSpacing": {"missing": 0, "of": 100}}, "class_patients": {"a": 5, "b": 60},
    "label_suspects": {"examined": 100, "named": [0] * 20}, "text_suspects": [0, 0],
}  # fmt: skip


def test_values_at_the_limits_are_allowed() -> None:
    assert objections(CLEAN, QualityGate()) == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"duplicates": [{"across_patients": True, "across_splits": False}]}, "different patients: 1, at most 0"),
        ({"duplicates": [{"across_patients": False, "across_splits": True}]}, "sides of the split: 1, at most 0"),
        ({"agreement": [{"kappa": {"value": 0.59}}]}, "kappa 0.59, at least 0.6"),
        ({"agreement": [{"kappa": {"value": None}}]}, "kappa not defined"),
        ({"missing_tags": {**CLEAN["missing_tags"], "Manufacturer": {"missing": 51, "of": 100}}}, "51.0%, at most 50"),  # type: ignore[dict-item]
        ({"missing_tags": {}}, "does not look for the tag Manufacturer"),
        ({"class_patients": {"a": 4, "b": 60}}, "rarest class: 4, at least 5"),
        ({"class_patients": {}}, "rarest class: 0"),
        ({"label_suspects": {"examined": 100, "named": [0] * 21}}, "21.0%, at most 20.0%"),
        ({"text_suspects": [0, 0, 0]}, "burned-in text: 3.0%, at most 2.0%"),
        ({"refused": {"corrupt": 51}}, "cannot be used: 51.0%, at most 50.0%"),
        ({"label_suspects": None}, "not of this version"),
    ],
)
def test_each_limit_objects_one_step_beyond(change: dict[str, object], says: str) -> None:
    found = objections({**CLEAN, **change}, QualityGate())
    assert any(says in each for each in found), found


def test_limits_that_are_off_by_default_can_be_set() -> None:
    assert objections(CLEAN, QualityGate(max_near_duplicates_across_patients=2)) == (
        "nearly equal images under different patients: 3, at most 2 is allowed",
    )
    assert objections({**CLEAN, "unlabelled": 1}, QualityGate(max_unlabelled_fraction=0.0))


def test_a_report_of_another_kind_is_an_objection_not_a_pass() -> None:
    assert objections({}, QualityGate()) == (
        "the quality report is not of this version; run `fedicom data report` again",
    )


def test_a_limit_out_of_its_range_is_no_gate() -> None:
    with pytest.raises(ValidationError):
        QualityGate(max_text_fraction=2)
    with pytest.raises(ValidationError):
        QualityGate(min_kapa=0.5)  # type: ignore[call-arg]
