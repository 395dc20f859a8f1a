"""A series that somebody made one file of is read as its slices were: the file is written by highdicom."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom.legacy import LegacyConvertedEnhancedMRImage, LegacyConvertedEnhancedPETImage
from pydicom import uid
from pydicom.dataset import Dataset

from common.imaging import FolderReading, RefusalCode, read_folder
from tests.common.test_imaging_hostile import all_refused, ct, write

STUDY = {
    "PatientName": "X", "PatientBirthDate": "", "PatientSex": "", "StudyID": "1", "StudyDate": "20200101",
    "StudyTime": "100000", "ContentDate": "20200101", "ContentTime": "100000", "AccessionNumber": "1",
    "ReferringPhysicianName": "", "Manufacturer": "X", "SeriesNumber": 1, "BodyPartExamined": "HEAD",
    "PatientPosition": "HFS", "PositionReferenceIndicator": "",
}  # fmt: skip


def mr(z: int, repeat: int, **more: Any) -> Dataset:
    made = ct(z, name=f"{repeat}.", sop_class=uid.MRImageStorage, modality="MR", **{**STUDY, **more})
    made.file_meta.MediaStorageSOPClassUID = uid.MRImageStorage
    made.PixelData = (np.frombuffer(made.PixelData, "<u2") + 1000 * repeat).tobytes()
    made.InstanceNumber = 100 * repeat + z
    return made


def private(made: Dataset, value: int) -> Dataset:
    made.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", str(value))
    return made


def both_ways(folder: Path, slices: list[Dataset]) -> tuple[FolderReading, FolderReading]:
    """What the slices give, and what the one file gives."""
    converted = LegacyConvertedEnhancedMRImage(slices, "1.2.3.9", 2, "1.2.9.9", 1)
    return read_folder(write(folder / "slices", *slices)), read_folder(write(folder / "file", converted))


@pytest.mark.parametrize(
    "tell",
    [
        lambda k: {"EchoTime": 10.0 * k},
        lambda k: {"EchoNumbers": k},
        lambda k: {"InversionTime": 100.0 * k},
        lambda k: {"TemporalPositionIdentifier": k},
        lambda k: {"TriggerTime": 50.0 * k},
        lambda k: {"DiffusionBValue": 500.0 * k},
        lambda k: {"SequenceName": f"*ep_b{500 * k}t"},
        lambda k: {"AcquisitionNumber": k},
        lambda k: {"AcquisitionDate": "20200101", "AcquisitionTime": f"1000{k:02}"},
        lambda k: {"EchoTime": 10.0 * (k % 2), "InversionTime": float(k // 2), "TriggerTime": float(k // 3)},
        lambda k: {},
    ],
)
def test_a_converted_series_of_several_echoes_or_times_gives_the_volumes_of_its_slices(
    tmp_path: Path, tell: Callable[[int], dict[str, Any]]
) -> None:
    slices = [mr(z, k, **tell(k)) for k in range(3) for z in (1, 0, 2)]
    if not tell(1):
        slices = [private(made, made.InstanceNumber // 100) for made in slices]
    apart, together = both_ways(tmp_path, slices)
    assert apart.refused == together.refused == ()
    assert len(apart.volumes) == 3
    for one, other in zip(apart.volumes, together.volumes, strict=True):
        np.testing.assert_array_equal(one.values_ZYX, other.values_ZYX)
        np.testing.assert_array_equal(one.affine, other.affine)


def test_counts_and_concentrations_of_a_converted_pet_are_told_apart_and_scaled_slice_by_slice(tmp_path: Path) -> None:
    pet = {"sop_class": uid.PositronEmissionTomographyImageStorage, "modality": "PT", **STUDY}
    slices = [
        ct(z, name=f"{unit}.", **{**pet, "Units": word, "RescaleSlope": 1.5 + z, "InstanceNumber": 3 * unit + z + 1})
        for unit, word in enumerate(("BQML", "CNTS"))
        for z in range(3)
    ]
    for made in slices:
        made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    converted = LegacyConvertedEnhancedPETImage(slices, "1.2.3.9", 2, "1.2.9.9", 1)
    apart, together = read_folder(write(tmp_path / "a", *slices)), read_folder(write(tmp_path / "b", converted))
    assert apart.refused == together.refused == ()
    assert len(apart.volumes) == 2
    for one, other in zip(apart.volumes, together.volumes, strict=True):
        np.testing.assert_array_equal(one.values_ZYX, other.values_ZYX)


def test_repeats_that_nothing_tells_apart_are_refused_either_way(tmp_path: Path) -> None:
    apart, together = both_ways(tmp_path, [mr(z, k) for k in range(2) for z in range(3)])
    assert all_refused(apart) == all_refused(together) == {RefusalCode.DUPLICATE}


@pytest.mark.parametrize(
    "slices",
    [
        [mr(z, 0, AcquisitionNumber=z % 2) for z in range(8) if z != 1],  # two passes are two half as dense volumes
        [mr(z, 0, SpacingBetweenSlices=2) for z in range(0, 8, 2)],
    ],
    ids=["interleaved", "every second one"],
)
def test_slices_that_were_lost_before_a_series_was_converted_are_missed_all_the_same(
    tmp_path: Path, slices: list[Dataset]
) -> None:
    apart, together = both_ways(tmp_path, slices)
    assert all_refused(apart) == all_refused(together) == {RefusalCode.GAP}


def test_two_slices_of_which_the_header_says_that_they_are_neighbours_are_a_volume_either_way(tmp_path: Path) -> None:
    apart, together = both_ways(tmp_path, [mr(0, 0, SpacingBetweenSlices=2), mr(1, 0, SpacingBetweenSlices=2)])
    assert (len(apart.volumes), len(together.volumes)) == (1, 1)
