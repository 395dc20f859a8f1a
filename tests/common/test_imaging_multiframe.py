"""Enhanced multi-frame files: one file, one stack, or a refusal."""

from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from common.imaging import FolderReading, RefusalCode, Volume, read_folder


def item(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def enhanced(z_mm: list[float], *, slopes: list[float] | None = None) -> Dataset:
    """An axial enhanced MR with one frame at each z; frame k holds 10 k + pixel number, stored 0 is padding."""
    frames = len(z_mm)
    made = item(
        SOPClassUID=uid.EnhancedMRImageStorage, SOPInstanceUID="1.2.9.1", SeriesInstanceUID="1.2.3.4",
        StudyInstanceUID="1.2.3", PatientID="P1", Modality="MR", FrameOfReferenceUID="1.2.5", ImageType=["ORIGINAL"],
        Rows=2, Columns=3, NumberOfFrames=frames, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16, BitsStored=12, HighBit=11, PixelRepresentation=0, InstanceNumber=1, ContentDate="20200101",
        ContentTime="120000",
    )  # fmt: skip
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    made.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.8], SliceThickness=2)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        )
    ]
    organization = item(DimensionOrganizationUID="1.2.6")
    made.DimensionOrganizationSequence = [organization]
    made.DimensionIndexSequence = [
        item(DimensionOrganizationUID="1.2.6", DimensionIndexPointer=0x00200032, FunctionalGroupPointer=0x00209113)
    ]
    made.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-10, 20, mm])],
            FrameContentSequence=[item(DimensionIndexValues=[k + 1])],
            PixelValueTransformationSequence=[
                item(RescaleSlope=(slopes or [1] * frames)[k], RescaleIntercept=0, RescaleType="US")
            ],
        )
        for k, mm in enumerate(z_mm)
    ]
    stored = 10 * np.arange(frames)[:, None] + np.arange(6) + 1
    made.PixelData = (stored.astype("<u2") | 0xF000).tobytes()  # rubbish in the bits that are not stored
    made["PixelData"].VR = "OW"
    return made


def read(folder: Path, made: Dataset) -> FolderReading:
    made.save_as(folder / "multi.dcm", enforce_file_format=True)
    return read_folder(folder)


def one_volume(reading: FolderReading) -> Volume:
    assert reading.refused == ()
    (volume,) = reading.volumes
    return volume


def test_frames_are_ordered_by_position_and_scaled_frame_by_frame(tmp_path: Path) -> None:
    volume = one_volume(read(tmp_path, enhanced([4, 0, 6, 2], slopes=[1, 2, 3, 4])))
    # first pixels: stored 1, 11, 21, 31 with slopes 1, 2, 3, 4 at z = 4, 0, 6, 2
    assert volume.values_ZYX[:, 0, 0].tolist() == [22, 124, 1, 63]
    assert volume.affine @ [3, 1, 2, 1] == pytest.approx([-10 + 1.6, 20.5, 6, 1])


def test_padding_of_a_multi_frame_file_takes_the_smallest_valid_value(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4])
    made.add_new("PixelPaddingValue", "US", 1)
    assert one_volume(read(tmp_path, made)).values_ZYX[0].ravel().tolist() == [2, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("code", "z_mm"),
    [
        (RefusalCode.GAP, [0, 2, 6, 8]),
        (RefusalCode.DUPLICATE, [0, 2, 2, 4]),
        (RefusalCode.DUPLICATE, [0, 2, 4, 0, 2, 4]),
        (RefusalCode.MIXED_SPACING, [0, 2, 5, 9]),
    ],
)
def test_frames_that_are_not_one_even_stack_are_refused(tmp_path: Path, code: RefusalCode, z_mm: list[float]) -> None:
    (refused,) = read(tmp_path, enhanced(z_mm)).refused
    assert refused.code == code


def test_a_file_of_two_stacks_is_refused(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4, 0, 2, 4])
    del made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        axes = [1, 0, 0, 0, 1, 0] if k < 3 else [0, 1, 0, 1, 0, 0]
        groups.PlaneOrientationSequence = [item(ImageOrientationPatient=axes)]
    assert [r.code for r in read(tmp_path, made).refused] == [RefusalCode.NOT_ONE_STACK]


def test_the_volume_is_where_highdicom_puts_it(tmp_path: Path) -> None:
    made = enhanced([4, 0, 6, 2], slopes=[1, 2, 3, 4])
    made.PixelData = bytes(a & b for a, b in zip(made.PixelData, b"\xff\x0f" * 24, strict=True))
    volume = one_volume(read(tmp_path, made))
    reference = highdicom.imread(tmp_path / "multi.dcm").get_volume()
    for zyx in np.ndindex(4, 2, 3):
        there = np.round(np.linalg.inv(volume.affine) @ reference.affine @ [*zyx, 1]).astype(int)
        assert volume.values_ZYX[tuple(there[:3])] == reference.array[zyx]


def test_a_multi_frame_file_without_positions_or_with_one_frame_is_refused(tmp_path: Path) -> None:
    made = enhanced([0, 2])
    del made.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    del made.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    assert [r.code for r in read(tmp_path, made).refused] == [RefusalCode.MISSING_GEOMETRY]
    assert [r.code for r in read(tmp_path, enhanced([0])).refused] == [RefusalCode.SINGLE_SLICE]


def test_a_multi_frame_file_with_fewer_frames_than_declared_is_refused(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4])
    made.NumberOfFrames = 4000
    assert [r.code for r in read(tmp_path, made).refused] == [RefusalCode.TRUNCATED]
    made.NumberOfFrames = 4
    assert [r.code for r in read(tmp_path, made).refused] == [RefusalCode.TRUNCATED]


def test_frames_with_different_pixel_spacings_are_refused(tmp_path: Path) -> None:
    made = enhanced([0, 2])
    del made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.PixelMeasuresSequence = [item(PixelSpacing=[0.5 + k, 0.8], SliceThickness=2)]
    assert [r.code for r in read(tmp_path, made).refused] == [RefusalCode.MIXED_SPACING]
