"""Drift between cohorts: divergences by hand, and planted shifts in real files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pydicom
import pytest

from client.quality import bins, cli
from client.quality.bins import bin_names, bins_hash, bins_of
from client.quality.drift import Drift, FeatureDrift, compare, jensen_shannon, kullback_leibler
from client.quality.survey import LEVELS, Picture, Survey, between
from common.errors import ConfigError, DataError
from common.imaging.facts import Facts
from simulations.dicom_writer import Machine, Subject, write_image


def image(patient: int, sex: str = "F", **changes: object) -> Picture:
    made = Picture(
        name=f"{patient:04d}", patient=f"{patient:016d}", study="s", series="s", unit="u", target=0, dimensions=2,
        modality="CR", vendor="GE", model="m", spacing_mm=(0.2, 0.2), size=(8, 8), facts=Facts(sex=sex),  # type: ignore[arg-type]
        digest=str(patient), blank=False, letters=None, files=1,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def cohort(*pictures: Picture) -> Survey:
    levels = np.zeros((len(pictures), LEVELS), np.float32)
    levels[:, 10] = 1
    hashes = np.zeros((len(pictures), 2), np.uint64)
    return Survey(pictures=pictures, hashes_N2=hashes, features=(np.zeros(3, np.float16),) * len(pictures),
                  levels_NB=levels, refused={})  # fmt: skip


def feature(found: Drift, name: str) -> FeatureDrift:
    return next(each for each in found.features if each.feature == name)


def test_divergences_are_those_by_hand() -> None:
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    # middle (3/4, 1/4): (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2
    expected = (math.log2(4 / 3) + (math.log2(2 / 3) + 1) / 2) / 2
    assert jensen_shannon(p, q) == pytest.approx(expected)
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(p, 1 - p) == 1
    # ten patients in one bin against ten in the other, half a patient added to each: (21/22, 1/22) and (1/22, 21/22)
    assert kullback_leibler(np.array([10.0, 0, 0]), np.array([0, 10.0, 0])) == pytest.approx(20 / 22 * math.log2(21))


def test_all_women_against_all_men_share_no_bin_and_that_is_no_chance() -> None:
    a, b = cohort(*(image(at, "F") for at in range(10))), cohort(*(image(at, "M") for at in range(10, 20)))
    found = compare(a, b)
    sex = feature(found, "sex")
    assert sex.js == 1
    assert sex.kl_ab == pytest.approx(20 / 22 * math.log2(21))
    # of 184,756 divisions two are as extreme, so hardly any of 4,999 random ones
    assert sex.p <= 3 / 5000
    assert (sex.patients_a, sex.patients_b) == ((10, 0, 0, 0), (0, 10, 0, 0))
    assert sex.says.startswith("Sex: differs strongly (JS 1.000 bits")
    assert "'F' goes from 100% to 0% of the patients" in sex.says
    vendor = feature(found, "vendor")
    assert (vendor.js, vendor.p) == (0, 1)
    assert "no difference" in vendor.says


def test_two_halves_of_one_cohort_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    both = [image(at, "FM"[rng.integers(2)], spacing_mm=(float(rng.uniform(0.1, 1)),) * 2) for at in range(120)]
    found = compare(cohort(*both[:60]), cohort(*both[60:]))
    assert min(each.p_corrected for each in found.features) >= 0.05


def test_a_patient_weighs_the_same_however_many_images_they_have() -> None:
    many = [image(0, "M", name=f"m{at}") for at in range(90)]
    a = cohort(*many, *(image(at) for at in range(1, 10)))
    sex = feature(compare(a, cohort(*(image(at) for at in range(20, 30)))), "sex")
    p, q = np.array([0.9, 0.1]), np.array([1.0, 0.0])
    assert sex.js == pytest.approx(jensen_shannon(p, q))


def test_bins_of_fewer_patients_than_the_smallest_cell_are_not_shown() -> None:
    a = cohort(*(image(at, "O" if at < 4 else "F") for at in range(12)))
    b = cohort(*(image(at, "M" if at < 25 else "F") for at in range(20, 32)))
    sex = feature(compare(a, b), "sex")
    assert sex.patients_a == (8, 0, None, 0)
    assert sex.patients_b == (7, 5, 0, 0)
    assert feature(compare(a, b, min_cell=4), "sex").patients_a == (8, 0, 4, 0)
    assert feature(compare(a, b), "intensity").patients_a == ()


def test_fewer_patients_than_the_smallest_cell_are_not_compared() -> None:
    a, b = cohort(*(image(at) for at in range(4))), cohort(*(image(at) for at in range(10, 20)))
    with pytest.raises(DataError, match="4 and 10 patients; at least 5"):
        compare(a, b)


def test_an_edge_belongs_to_the_bin_that_begins_there() -> None:
    names = bin_names("spacing_mm")
    shown = {step: names[bins_of("spacing_mm", image(0, spacing_mm=(step, 9.0)))[0]] for step in (0.04, 0.2, 0.29, 8.0)}
    assert shown == {0.04: "below 0.05", 0.2: "0.2 to 0.3", 0.29: "0.2 to 0.3", 8.0: "8 and more"}
    assert names[bins_of("spacing_mm", image(0, spacing_mm=()))[0]] == "unknown"
    assert names[bins_of("spacing_mm", image(0, spacing_mm=(2.0, 0.3, 0.9)))[0]] == "0.3 to 0.4"
    assert bin_names("slice_mm")[bins_of("slice_mm", image(0, spacing_mm=(2.0, 0.3, 0.9)))[0]] == "2 to 2.5"
    assert bin_names("vendor")[bins_of("vendor", image(0, vendor="other 12ab"))[0]] == "other"
    assert bins_of("class", image(0, target=(1, 0, 1))) == (0, 2)


def test_the_bins_are_the_agreed_ones() -> None:
    # Other bins are another version: sites whose hashes differ have not counted the same.
    assert (bins.VERSION, bins_hash()[:16]) == (1, "0dd126711ac5c617")
    assert bins_hash(("a", "b")) != bins_hash()


def test_only_images_of_the_given_days_are_taken() -> None:
    days = [date(2025, 12, 31), date(2026, 1, 1), None]
    found = cohort(*(image(at, facts=Facts(studied=day)) for at, day in enumerate(days)))
    assert [picture.name for picture in between(found, date(2026, 1, 1), None).pictures] == ["0001"]
    assert [picture.name for picture in between(found, None, date(2025, 12, 31)).pictures] == ["0000"]
    assert len(between(found, date(2025, 1, 1), date(2026, 1, 1)).levels_NB) == 2
    with pytest.raises(DataError, match="no image of the folder has a Study Date"):
        between(found, date(2027, 1, 1), None)


# With real files


def hospital(folder: Path, offset: int, year: int, numbers: range) -> Path:
    rows = []
    for number in numbers:
        rng = np.random.default_rng(number)
        values = np.clip(rng.normal(90 + offset, 20, (32, 32)), 0, 255).astype(np.uint8)
        file = folder / "dicom" / f"{number}.dcm"
        subject = Subject(patient_id=f"MRN-{number:04d}", entropy=("drift",), sex="F" if number % 2 else "M")
        write_image(file, values, Machine(modality="CR", bits_stored=8), subject, spacing_mm=(0.2, 0.2))
        dataset = pydicom.dcmread(file)
        dataset.StudyDate = f"{year}0615"
        dataset.save_as(file)
        rows.append(f"MRN-{number:04d},{'b' if number % 4 == 0 else 'a'}")
    table = folder / "labels.csv"
    old = table.read_text() if table.exists() else "patient,label\n"
    table.write_text(old + "\n".join(rows) + "\n")
    return folder


WINDOW = ("data.intensity=window", "data.low=0", "data.high=255")


def drift(capsys: pytest.CaptureFixture[str], cache: Path, *words: object) -> tuple[dict[str, dict[str, object]], str]:
    folders, settings = words[:2], words[2:]  # added to the command, behind its options, as docs/quality.md says
    assert cli.drift_verb([*map(str, folders), "--cache", str(cache), "--json", *map(str, settings)]) == 0
    text = capsys.readouterr().out
    return {each["feature"]: each for each in json.loads(text)["features"]}, text


def test_a_shift_of_intensities_is_found_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = hospital(tmp_path / "a", 0, 2025, range(24)), hospital(tmp_path / "b", 40, 2025, range(100, 124))
    found, text = drift(capsys, tmp_path / "cache", a, b, *WINDOW)
    # 40 of 255 grey values further up: about two standard deviations
    assert found["intensity"]["js"] > 0.3  # type: ignore[operator]
    assert found["intensity"]["p"] == 1 / 5000
    assert "from 0.350" in str(found["intensity"]["says"])
    assert "to 0.508" in str(found["intensity"]["says"])
    assert {name for name, each in found.items() if each["p_corrected"] < 0.05} == {"intensity"}  # type: ignore[operator]
    assert set(found) == {"intensity", "spacing_mm", "sex", "class", "vendor", "modality"}
    assert "MRN" not in text
    assert "a.csv" not in text


def test_two_times_of_one_folder_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hospital(hospital(tmp_path / "a", 0, 2025, range(12)), 40, 2026, range(12, 24))
    found, text = drift(capsys, tmp_path / "cache", f"{folder}@..2025-12-31", f"{folder}@2026-01-01..", *WINDOW)
    assert found["intensity"]["p_corrected"] < 0.01  # type: ignore[operator]
    plain = json.loads(text)
    assert (plain["patients_a"], plain["patients_b"]) == (12, 12)
    assert plain["bins_sha256"] == bins_hash(("a", "b"))
    assert cli.drift_verb([f"{folder}@..2025-12-31", f"{folder}@2026-01-01..", "--cache", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert "Intensity after preparation: " in shown
    assert "LOCAL ONLY" in shown


def test_times_and_classes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    a, b = hospital(tmp_path / "a", 0, 2025, range(8)), hospital(tmp_path / "b", 0, 2025, range(8))
    with pytest.raises(ConfigError, match="one of the days does not exist"):
        cli.drift_verb([f"{a}@..2025-02-30", str(b), "--cache", str(tmp_path / "cache")])
    (b / "labels.csv").write_text((b / "labels.csv").read_text().replace(",b", ",c"))
    with pytest.raises(DataError, match="different classes"):
        cli.drift_verb([str(a), str(b), "--cache", str(tmp_path / "cache")])
