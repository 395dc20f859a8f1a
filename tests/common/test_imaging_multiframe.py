"""Enhanced multi-frame files: one file, one stack, or a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import imagecodecs
import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from common.imaging import FolderReading, RefusalCode, Volume, iterate_folder, read_folder


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
    assert volume.source.frames == ()  # all of them


def test_what_a_frame_says_itself_goes_before_what_all_share(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4])
    made.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [
        item(RescaleSlope=5, RescaleIntercept=0, RescaleType="US")
    ]
    del made.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence
    assert one_volume(read(tmp_path, made)).values_ZYX[:, 0, 0].tolist() == [1, 5 * 11, 21]


@pytest.mark.parametrize("modality", ["CT", "PT", "MR"])
def test_a_frame_without_a_pixel_value_transformation_is_refused_where_values_have_a_unit(
    tmp_path: Path, modality: str
) -> None:
    made = enhanced([0, 2, 4])
    made.Modality = modality
    del made.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence
    reading = read(tmp_path, made)
    assert [refused.code for refused in reading.refused] == ([] if modality == "MR" else [RefusalCode.MISSING_HEADER])
    made = enhanced([0, 2, 4])
    del made.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence[0].RescaleSlope
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.MISSING_HEADER]


def test_padding_of_a_multi_frame_file_takes_the_smallest_valid_value(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4])
    made.add_new("PixelPaddingValue", "US", 1)
    assert one_volume(read(tmp_path, made)).values_ZYX[0].ravel().tolist() == [2, 2, 3, 4, 5, 6]


def test_a_stack_of_padding_alone_refuses_its_file_and_an_empty_frame_does_not(tmp_path: Path) -> None:
    made = enhanced([0, 2, 0, 2])
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].StackID = str(1 + k // 2)
    made.add_new("PixelPaddingValue", "US", 21)
    made.add_new("PixelPaddingRangeLimit", "US", 26)  # frame 2: its stack has another one
    assert [v.values_ZYX[:, 0, 0].tolist() for v in read(tmp_path, made).volumes] == [[1, 11], [31, 31]]
    made.PixelPaddingRangeLimit = 36  # frames 2 and 3
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.CORRUPT]


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


def first_pixels(reading: FolderReading) -> list[list[float]]:
    """Stored 10 k + 1 at frame k, so this names the frames of each volume."""
    assert reading.refused == ()
    return [((volume.values_ZYX[:, 0, 0] - 1) / 10).tolist() for volume in reading.volumes]


def test_two_orientations_in_one_file_are_two_volumes(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4, 0, 2, 4])
    del made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        axes = [1, 0, 0, 0, 1, 0] if k < 3 else [0, 1, 0, 1, 0, 0]
        groups.PlaneOrientationSequence = [item(ImageOrientationPatient=axes)]
    reading = read(tmp_path, made)
    assert first_pixels(reading) == [[0, 1, 2], [5, 4, 3]]  # the second normal points down
    assert [volume.source.frames for volume in reading.volumes] == [(1, 2, 3), (6, 5, 4)]
    assert len({volume.source.files for volume in reading.volumes}) == 1


def test_a_file_with_several_stacks_counts_once_in_the_progress(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4, 0, 2, 4])
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].StackID = str(k // 3)
    made.save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    seen: list[tuple[int, int]] = []
    assert len(list(iterate_folder(tmp_path, lambda done, total: seen.append((done, total))))) == 2
    assert seen[-1] == (2, 2)


@pytest.mark.parametrize(
    ("sequence", "content"),
    [
        ("FrameContentSequence", lambda k: item(TemporalPositionIndex=k + 1)),
        ("FrameContentSequence", lambda k: item(StackID=str(k + 1))),
        ("MREchoSequence", lambda k: item(EffectiveEchoTime=10.0 * k + 1)),
        ("MRDiffusionSequence", lambda k: item(DiffusionBValue=1000.0 * k)),
        (
            "MRDiffusionSequence",
            lambda k: item(
                DiffusionGradientDirectionSequence=[item(DiffusionGradientOrientation=[float(k), 1.0 - k, 0.0])]
            ),
        ),
        ("CardiacSynchronizationSequence", lambda k: item(NominalCardiacTriggerDelayTime=50.0 * k)),
        ("MRImageFrameTypeSequence", lambda k: item(FrameType=["ORIGINAL", "PRIMARY", "M", "MP"[k]])),
        (
            "MRImageFrameTypeSequence",
            lambda k: item(FrameType=["ORIGINAL", "PRIMARY"], ComplexImageComponent=["MAGNITUDE", "PHASE"][k]),
        ),
        ("MRModifierSequence", lambda k: item(InversionTimes=[100.0 * k, 5.0])),
        ("MRVelocityEncodingSequence", lambda k: item(VelocityEncodingDirection=[float(k), 1.0 - k, 0.0])),
        ("MRArterialSpinLabelingSequence", lambda k: item(ASLContext=["LABEL", "CONTROL"][k])),
        ("FrameContentSequence", lambda k: item(FrameReferenceDateTime=f"2020010112000{k}")),
    ],
)
def test_frames_of_one_place_are_told_apart_by_what_the_header_says(
    tmp_path: Path, sequence: str, content: Callable[[int], Dataset]
) -> None:
    made = enhanced([0, 0, 2, 2, 4, 4])
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        setattr(groups, sequence, [content(k % 2)])
    assert first_pixels(read(tmp_path, made)) == [[0, 2, 4], [1, 3, 5]]


def test_frames_are_told_apart_by_a_dimension_that_is_no_place(tmp_path: Path) -> None:
    """Indices into a dimension that nobody knows, beside the position in the stack."""
    made = enhanced([0, 2, 4, 0, 2, 4])
    made.DimensionIndexSequence.append(
        item(DimensionOrganizationUID="1.2.6", DimensionIndexPointer=0x00189074, FunctionalGroupPointer=0x00189074)
    )
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].DimensionIndexValues = [1 + k % 3, 1 + k // 3]
    assert first_pixels(read(tmp_path, made)) == [[0, 1, 2], [3, 4, 5]]


def test_stacks_far_from_each_other_are_two_volumes_only_where_the_file_says_so(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4, 100, 102, 104])
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.GAP]
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].StackID = str(k // 3)
    assert first_pixels(read(tmp_path, made)) == [[0, 1, 2], [3, 4, 5]]


def test_an_inverted_multi_frame_file_is_inverted_alike_in_all_frames_but_not_in_ct(tmp_path: Path) -> None:
    made = enhanced([0, 2], slopes=[1, 2])
    made.PhotometricInterpretation = "MONOCHROME1"
    for groups in made.PerFrameFunctionalGroupsSequence:
        groups.PixelValueTransformationSequence[0].RescaleIntercept = 100
    volume = one_volume(read(tmp_path, made))
    # 12 bits: 100 ... 4195 and 100 ... 8290, so 8390 - value; stored 1 and 11
    assert volume.values_ZYX[:, 0, 0].tolist() == [8390 - 101, 8390 - 122]
    made.Modality, made.SOPClassUID = "CT", uid.EnhancedCTImageStorage
    assert one_volume(read(tmp_path, made)).values_ZYX[:, 0, 0].tolist() == [101, 122]


def test_a_piece_of_a_concatenation_is_refused(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4])
    made.ConcatenationUID, made.InConcatenationNumber, made.InConcatenationTotalNumber = "1.2.7", 1, 2
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.PART_OF_A_FILE]
    del made.InConcatenationTotalNumber  # it may be absent (type 3): then nobody knows
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.PART_OF_A_FILE]
    made.InConcatenationTotalNumber = 1
    assert one_volume(read(tmp_path, made)).values_ZYX.shape == (3, 2, 3)
    made.InConcatenationTotalNumber = 2
    del made.ConcatenationUID  # as what removes identifiers may leave it
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.PART_OF_A_FILE]


def test_a_localizer_among_the_frames_refuses_the_file(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4])
    made.PerFrameFunctionalGroupsSequence[1].MRImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "LOCALIZER"])]
    assert [refused.code for refused in read(tmp_path, made).refused] == [RefusalCode.LOCALIZER]


@pytest.mark.parametrize("undefined", [False, True])
def test_a_header_longer_than_this_process_reads_is_read_in_the_other_one(tmp_path: Path, undefined: bool) -> None:
    """1.4 MB of functional groups; sequences of undefined length have to be parsed to be passed over."""
    made = enhanced([2.0 * k for k in range(700)])
    for groups in made.PerFrameFunctionalGroupsSequence:
        groups.FrameContentSequence[0].FrameComments = "x" * 1800
    made["PerFrameFunctionalGroupsSequence"].is_undefined_length = undefined
    made.BitsStored, made.HighBit = 16, 15
    made.PixelData = (10 * np.arange(700)[:, None] + np.arange(6) + 1).astype("<u2").tobytes()
    assert first_pixels(read(tmp_path, made)) == [list(range(700))]


def test_a_damaged_frame_of_one_stack_refuses_the_others_of_its_file_as_well(tmp_path: Path) -> None:
    made = enhanced([0, 2, 4, 0, 2, 4])
    for k, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].StackID = str(k // 3)
    good = [imagecodecs.jpegls_encode(np.full((2, 3), k, "<u2")) for k in range(6)]
    for frames in (good, [*good[:5], good[5][:-9] + b"\0" * 9]):
        made.PixelData = encapsulate(frames)
        made["PixelData"].VR = "OB"
        made["PixelData"].is_undefined_length = True
        made.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
        reading = read(tmp_path, made)
        assert (len(reading.volumes), len(reading.refused)) == ((2, 0) if frames is good else (0, 1))


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.RLELossless, uid.DeflatedExplicitVRLittleEndian])
def test_compressed_frames_are_those_of_the_plain_file(tmp_path: Path, syntax: str) -> None:
    made = enhanced([4, 0, 6, 2], slopes=[1, 2, 3, 4])
    stored = np.frombuffer(made.PixelData, "<u2").reshape(4, 2, 3) & 0x0FFF
    if syntax == uid.JPEGLSLossless:
        made.PixelData = encapsulate([imagecodecs.jpegls_encode(frame) for frame in stored])
        made["PixelData"].VR = "OB"
        made["PixelData"].is_undefined_length = True
        made.file_meta.TransferSyntaxUID = syntax
    elif syntax == uid.RLELossless:
        made.PixelData = stored.tobytes()
        made.compress(uid.RLELossless, generate_instance_uid=False)
    made.file_meta.TransferSyntaxUID = syntax
    assert one_volume(read(tmp_path, made)).values_ZYX[:, 0, 0].tolist() == [22, 124, 1, 63]


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
