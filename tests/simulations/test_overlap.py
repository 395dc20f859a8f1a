"""Patients of several hospitals are told of in counts, and by no identifier."""

from __future__ import annotations

from pathlib import Path

from simulations.overlap import overlap


def _hospitals(root: Path, **tables: str) -> Path:
    for name, patients in tables.items():
        (root / name).mkdir()
        (root / name / "labels.csv").write_text("\ufeffpatient,label\n" + "".join(f"{one},a\n" for one in patients))
    return root


def test_patients_of_the_central_test_set_who_are_at_a_hospital_too_are_told_of(tmp_path: Path) -> None:
    """A report said of a copy of north: 104 test patients that no hospital holds."""
    hospitals = _hospitals(tmp_path, north="ABCD", south="EFG", central="CDEXY")
    (note,) = overlap(hospitals, ["north", "south"])
    assert note.startswith("3 of 5 identifiers in central/labels.csv stand in that of north, south too.")


def test_patients_of_two_hospitals_are_told_of_once(tmp_path: Path) -> None:
    hospitals = _hospitals(tmp_path, north="ABCD", south="DEB", west="BZ", central="XY")
    (note,) = overlap(hospitals, ["north", "south", "west"])
    assert note.startswith("In the labels.csv of more than one hospital: 2 identifiers.")


def test_where_everybody_is_in_one_place_nothing_is_said(tmp_path: Path) -> None:
    hospitals = _hospitals(tmp_path, north="AAB", south="CD")
    assert overlap(hospitals, ["north", "south"]) == ()
