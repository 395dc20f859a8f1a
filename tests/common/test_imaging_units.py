"""A CT is read where its values are Hounsfield units, and refused where its header says that they are others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from common.imaging import FolderReading, fastread, volume
from tests.common.test_imaging_hostile import ct, one_volume, write
from tests.common.test_imaging_multiframe import enhanced
from tests.common.test_imaging_tables import table

both = pytest.mark.parametrize("reader", [volume, fastread])


def codes(reading: FolderReading) -> dict[str, int]:
    assert (reading.volumes, reading.images) == ((), ())
    return dict(Counter(str(refused.code) for refused in reading.refused))


def enhanced_ct(types: list[str]) -> Dataset:
    made = enhanced([2.0 * k for k in range(len(types))])
    made.SOPClassUID, made.Modality = uid.EnhancedCTImageStorage, "CT"
    for groups, stated in zip(made.PerFrameFunctionalGroupsSequence, types, strict=True):
        groups.PixelValueTransformationSequence[0].RescaleType = stated
    return made


@both
@pytest.mark.parametrize("stated", ["HU", "hu ", "US", "", None])
def test_a_ct_of_hounsfield_units_or_of_no_other_unit_is_read(
    tmp_path: Path, reader: ModuleType, stated: str | None
) -> None:
    read = one_volume(reader.read_folder(write(tmp_path, *(ct(z, RescaleType=stated) for z in range(3)))))
    assert read.values_ZYX[1, 0, 0] == 2 * 100 - 1000


@both
@pytest.mark.parametrize("stated", ["MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT", "OD", "iodine Doe^Jane"])
def test_a_ct_of_another_unit_is_refused_by_name(tmp_path: Path, reader: ModuleType, stated: str) -> None:
    reading = reader.read_folder(write(tmp_path, *(ct(z, RescaleType=stated) for z in range(3))))
    assert codes(reading) == {"other_units": 3}
    assert {stated in refused.why for refused in reading.refused} == {"Doe" not in stated}


@both
@pytest.mark.parametrize(
    ("stated", "found"), [("HU", {}), ("US", {}), ("", {}), ("MGML", {"other_units": 3}), ("Z_EFF", {"other_units": 3})]
)
def test_a_ct_with_a_table_is_asked_for_the_unit_of_its_table(
    tmp_path: Path, reader: ModuleType, stated: str, found: dict[str, int]
) -> None:
    item = table(300, 0, 16, range(300))[0]
    item.ModalityLUTType = stated
    slices = [ct(z, ModalityLUTSequence=[item], RescaleType="HU") for z in range(3)]
    reading = reader.read_folder(write(tmp_path, *slices))
    assert Counter(str(refused.code) for refused in reading.refused) == found
    assert len(reading.volumes) == (not found)


@both
def test_one_slice_of_another_unit_takes_its_stack_with_it(tmp_path: Path, reader: ModuleType) -> None:
    slices = [ct(z, RescaleType="MGML" if z == 2 else "HU") for z in range(3)]
    assert codes(reader.read_folder(write(tmp_path, *slices))) == {"other_units": 1, "incomplete": 2}


@both
def test_a_stack_that_is_half_unspecified_is_refused(tmp_path: Path, reader: ModuleType) -> None:
    slices = [ct(z, RescaleType=("HU", "", "US", "US")[z]) for z in range(4)]
    assert codes(reader.read_folder(write(tmp_path, *slices))) == {"mixed_slices": 4}


@both
def test_frames_of_another_unit_refuse_their_file_and_those_of_mr_do_not(tmp_path: Path, reader: ModuleType) -> None:
    def reading(name: str, made: Dataset) -> FolderReading:
        return reader.read_folder(write(tmp_path / name, made))

    assert one_volume(reading("hounsfield", enhanced_ct(["HU", "HU", ""]))).values_ZYX[2, 0, 0] == 21
    assert codes(reading("iodine", enhanced_ct(["HU", "MGML", "HU"]))) == {"other_units": 1}
    assert codes(reading("mixed", enhanced_ct(["HU", "US", "HU"]))) == {"mixed_slices": 1}
    mr = enhanced_ct(["normalized"] * 3)
    mr.SOPClassUID, mr.Modality = uid.EnhancedMRImageStorage, "MR"
    assert one_volume(reading("mr", mr)).values_ZYX[2, 0, 0] == 21
