"""Series that scanners, archives and enemies have been seen to write; each is right or refused, never guessed."""

import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from common.errors import DataError
from common.imaging import FolderReading, RefusalCode, Volume, iterate_folder, read_folder
from common.imaging.received import examine
from common.imaging.refusal import Refusal

ROWS, COLUMNS = 6, 4


def dataset(
    stored: NDArray[Any], sop_uid: str, *, sop_class: str = uid.CTImageStorage, modality: str = "CT", **more: Any
) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = sop_class, sop_uid, modality
    made.PatientID, made.StudyInstanceUID, made.SeriesInstanceUID = "P1", "1.2.3", "1.2.3.4"
    made.FrameOfReferenceUID, made.ImageType = "1.2.3.5", ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.Rows, made.Columns = stored.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 8 * stored.dtype.itemsize
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(stored.dtype.kind == "i")
    made.PixelData = stored.tobytes()
    made["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    for keyword, value in more.items():
        setattr(made, keyword, value)
        if value is None:  # the header lacks it
            delattr(made, keyword)
    return made


def pixels(z: int) -> NDArray[np.uint16]:
    """Every stored value names its slice and pixel: 100 z + pixel number."""
    return (z * 100 + np.arange(ROWS * COLUMNS)).astype(np.uint16).reshape(ROWS, COLUMNS)


def ct(z: int, *, name: str = "", mm: tuple[float, float, float] | None = None, **more: Any) -> Dataset:
    """Slice z of an axial series, 2 mm apart, pixels 0.5 mm high and 0.8 mm wide, rescale 2 x - 1000."""
    geometry: dict[str, Any] = {
        "ImagePositionPatient": list(mm or (-10.0, 20.0, 2.0 * z)),
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.5, 0.8],
        "SliceThickness": 2,
        "RescaleSlope": 2,
        "RescaleIntercept": -1000,
        "InstanceNumber": z + 1,
    }
    return dataset(more.pop("stored", pixels(z)), f"1.2.9.{name}{z + 1}", **{**geometry, **more})


def write(folder: Path, *datasets: Dataset) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for made in datasets:
        made.save_as(folder / f"{len(list(folder.iterdir())):03}.dcm", enforce_file_format=True)
    return folder


def one_volume(reading: FolderReading) -> Volume:
    assert [refused.code for refused in reading.refused] == []
    assert len(reading.volumes) == 1
    return reading.volumes[0]


def all_refused(reading: FolderReading) -> set[RefusalCode]:
    assert (reading.volumes, reading.images) == ((), ())
    return {refused.code for refused in reading.refused}


def hu(z: int) -> NDArray[np.float32]:
    return pixels(z).astype(np.float32) * 2 - 1000


# --- order and geometry


def test_slices_are_ordered_by_position_whatever_the_instance_numbers_and_file_names_say(tmp_path: Path) -> None:
    order = [3, 0, 4, 1, 2]
    volume = one_volume(read_folder(write(tmp_path, *(ct(z, InstanceNumber=7 - z % 2) for z in order))))
    np.testing.assert_array_equal(volume.values_ZYX, np.stack([hu(z) for z in range(5)]))
    assert volume.source.sop_uids == tuple(f"1.2.9.{z + 1}" for z in range(5))
    # slice 3, row 2, column 1: x = -10 + 0.8, y = 20 + 2 * 0.5, z = 6
    assert volume.affine @ [3, 2, 1, 1] == pytest.approx([-9.2, 21.0, 6.0, 1.0])
    assert volume.spacing_mm == pytest.approx((2.0, 0.5, 0.8))


def test_an_oblique_series_keeps_every_image_position(tmp_path: Path) -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    along = np.array([-s * 0.6, c * 0.6, 0.8])  # row direction of the pixel grid
    columns = np.array([c, s, 0.0])
    normal = np.cross(columns, along)
    slices = [
        ct(z, mm=tuple(5.0 * z * normal + [1, 2, 3]), ImageOrientationPatient=[*columns, *along]) for z in range(4)
    ]
    volume = one_volume(read_folder(write(tmp_path, *slices)))
    for z in range(4):
        assert (volume.affine @ [z, 0, 0, 1])[:3] == pytest.approx(5.0 * z * normal + [1, 2, 3])
    assert (volume.affine @ [0, 1, 0, 0])[:3] == pytest.approx(0.5 * along)
    assert (volume.affine @ [0, 0, 1, 0])[:3] == pytest.approx(0.8 * columns)


def test_jitter_of_a_millionth_does_not_refuse_a_series(tmp_path: Path) -> None:
    slices = [
        ct(z, mm=(-10 + 1e-6 * z, 20, 2 * z + 1e-5), ImageOrientationPatient=[1, 1e-6 * z, 0, 0, 1, 0])
        for z in range(4)
    ]
    assert one_volume(read_folder(write(tmp_path, *slices))).values_ZYX.shape == (4, ROWS, COLUMNS)


def test_axes_that_are_perpendicular_but_for_rounding_become_so(tmp_path: Path) -> None:
    slices = [ct(z, ImageOrientationPatient=[1, 0, 0, 5e-4, 1, 0]) for z in range(3)]
    affine = one_volume(read_folder(write(tmp_path, *slices))).affine
    assert affine[:3, 1] == pytest.approx([0, 0.5, 0], abs=1e-9)
    assert affine[:3, 2] == pytest.approx([0.8, 0, 0], abs=1e-9)


def tilted(z: int) -> Dataset:
    return ct(z, mm=(0.0, 0.5 * z, 2.0 * z))


@pytest.mark.parametrize(
    ("code", "slices"),
    [
        (RefusalCode.GAP, lambda: [ct(z) for z in (0, 1, 2, 4, 5)]),
        (RefusalCode.DUPLICATE, lambda: [*(ct(z) for z in range(4)), ct(2, name="8")]),
        (RefusalCode.DUPLICATE, lambda: [ct(0), ct(0, name="8", mm=(-10, 20, 1e-6))]),
        (RefusalCode.TILT, lambda: [tilted(z) for z in range(4)]),
        (RefusalCode.MIXED_SPACING, lambda: [ct(z, mm=(0, 0, mm)) for z, mm in enumerate((0, 2, 4, 7, 10, 13))]),
        (RefusalCode.MIXED_SPACING, lambda: [ct(z, PixelSpacing=[0.5 + 0.1 * (z > 2)] * 2) for z in range(5)]),
        (RefusalCode.MIXED_SPACING, lambda: [ct(z, PixelSpacing=[0.5 + 0.005 * (z > 2)] * 2) for z in range(5)]),
        (
            RefusalCode.MIXED_SPACING,
            lambda: [ct(z, mm=(0, 0, 2 * z + 0.018 * abs(z - 30))) for z in range(60)],
        ),
        (RefusalCode.MIXED_SPACING, lambda: [ct(z, mm=(0.6 * (z == 2), 0, 2.0 * z)) for z in range(5)]),
        (RefusalCode.MIXED_SPACING, lambda: [ct(z, mm=(0, 0, 2 * z + 0.03 * (z > 2))) for z in range(5)]),  # no gap
        (RefusalCode.MIXED_PATIENTS, lambda: [ct(z, PatientID=f"P{z % 2}") for z in range(4)]),
        (RefusalCode.MIXED_PATIENTS, lambda: [ct(z, StudyInstanceUID=f"1.2.{z % 2}") for z in range(4)]),
        (RefusalCode.SINGLE_SLICE, lambda: [ct(0)]),
        (RefusalCode.MISSING_GEOMETRY, lambda: [ct(z, ImagePositionPatient=None) for z in range(3)]),
        (RefusalCode.MISSING_GEOMETRY, lambda: [ct(z, PixelSpacing=[0, 0]) for z in range(3)]),
        (RefusalCode.MISSING_GEOMETRY, lambda: [ct(z, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]) for z in range(3)]),
        (RefusalCode.MISSING_GEOMETRY, lambda: [ct(z, ImageOrientationPatient=[1.1, 0, 0, 0, 1, 0]) for z in range(3)]),
        (RefusalCode.LOCALIZER, lambda: [ct(z, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]) for z in range(3)]),
        (RefusalCode.LOCALIZER, lambda: [ct(z, ImageType=["ORIGINAL", "PRIMARY", "SCOUT"]) for z in range(3)]),
        (RefusalCode.SECONDARY_CAPTURE, lambda: [ct(z, ImageType=["DERIVED", "SCREEN SAVE"]) for z in range(3)]),
        (RefusalCode.BURNED_IN_TEXT, lambda: [ct(z, BurnedInAnnotation="YES") for z in range(3)]),
        (RefusalCode.MISSING_HEADER, lambda: [ct(z, SeriesInstanceUID=None) for z in range(3)]),
        (RefusalCode.CORRUPT, lambda: [ct(z, RescaleSlope=0) for z in range(3)] ),
        (RefusalCode.UNSUPPORTED_PIXELS, lambda: [ct(z, BitsStored=12, HighBit=15) for z in range(3)]),
        (RefusalCode.UNSUPPORTED_PIXELS, lambda: [ct(z, PixelRepresentation=3) for z in range(3)]),
        (RefusalCode.CORRUPT, lambda: [ct(z, Columns=COLUMNS - 1) for z in range(3)]),
        (RefusalCode.TRUNCATED, lambda: [ct(z, Rows=ROWS + 1) for z in range(3)]),
    ],
)  # fmt: skip
def test_a_series_that_is_no_even_stack_is_refused_as_a_whole(
    tmp_path: Path, code: RefusalCode, slices: Callable[[], list[Dataset]]
) -> None:
    made = slices()
    reading = read_folder(write(tmp_path, *made))
    got = all_refused(reading)
    assert got - {RefusalCode.INCOMPLETE} == {code}
    assert len(reading.refused) == len(made)


def test_a_lost_slice_at_an_acquisition_border_is_a_gap_and_not_two_volumes(tmp_path: Path) -> None:
    slices = [ct(z, AcquisitionNumber=1 + z // 4) for z in (0, 1, 2, 3, 5, 6, 7)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.GAP}


def test_interleaved_passes_with_a_lost_slice_are_a_gap_and_not_two_thinner_volumes(tmp_path: Path) -> None:
    slices = [ct(z, AcquisitionNumber=1 + z % 2) for z in (0, 1, 2, 3, 5, 7)]  # 4 and 6 are lost
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.GAP}


def test_positions_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    slices = [ct(z, mm=(1e300 * z, -1e300, 1e300 * z)) for z in range(3)]
    assert len(read_folder(write(tmp_path, *slices)).refused) == 3


# --- several stacks in one series


@pytest.mark.parametrize(
    "repeat", ["AcquisitionNumber", "EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue", "AcquisitionTime"]
)
def test_repeats_of_the_same_slices_become_one_volume_each(tmp_path: Path, repeat: str) -> None:
    slices = [
        ct(z, name=f"{k}.", stored=pixels(z) + np.uint16(1000 * k), **{repeat: f"12000{k}" if "Time" in repeat else k})
        for z in (2, 0, 1)
        for k in (1, 2)
    ]
    reading = read_folder(write(tmp_path, *slices))
    assert reading.refused == ()
    assert sorted(v.values_ZYX[0, 0, 0] for v in reading.volumes) == [1000.0, 3000.0]  # 2 * 1000 k - 1000
    for volume in reading.volumes:
        np.testing.assert_array_equal(np.diff(volume.values_ZYX[:, 0, 0]), [200, 200])


def test_one_acquisition_in_many_numbered_pieces_stays_one_volume(tmp_path: Path) -> None:
    slices = [ct(z, AcquisitionNumber=z // 2) for z in range(6)]
    assert one_volume(read_folder(write(tmp_path, *slices))).values_ZYX.shape[0] == 6


def test_orientations_and_image_types_are_never_stacked_on_each_other(tmp_path: Path) -> None:
    axial = [ct(z) for z in range(3)]
    phase = [ct(z, name="1.", ImageType=["ORIGINAL", "PRIMARY", "P"]) for z in range(3)]
    coronal = [ct(z, name="2.", mm=(0, 2.0 * z, 0), ImageOrientationPatient=[1, 0, 0, 0, 0, -1]) for z in range(4)]
    reading = read_folder(write(tmp_path, *axial, *phase, *coronal))
    assert reading.refused == ()
    assert sorted(len(v.values_ZYX) for v in reading.volumes) == [3, 3, 4]


def test_reports_junk_and_copies_beside_a_series_are_refused_and_the_series_is_read(tmp_path: Path) -> None:
    write(tmp_path, *(ct(z) for z in range(3)))
    shutil.copy(tmp_path / "001.dcm", tmp_path / "copy.dcm")
    report = dataset(pixels(0), "1.2.9.77", sop_class=uid.ComprehensiveSRStorage, modality="SR")
    write(tmp_path, report)
    (tmp_path / "Thumbs.db").write_bytes(os.urandom(300))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "mark.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 200)
    reading = read_folder(tmp_path)
    assert len(reading.volumes) == 1
    assert {refused.path.name: refused.code for refused in reading.refused} == {
        "copy.dcm": RefusalCode.COPY,
        "004.dcm": RefusalCode.REPORT,
        "Thumbs.db": RefusalCode.NOT_DICOM,
        "empty": RefusalCode.NOT_DICOM,
        "mark.dcm": RefusalCode.MISSING_HEADER,
    }


def test_two_different_files_with_one_identity_refuse_the_series(tmp_path: Path) -> None:
    write(tmp_path, *(ct(z) for z in range(3)), ct(2, stored=pixels(9)))
    assert all_refused(read_folder(tmp_path)) == {RefusalCode.CONFLICT, RefusalCode.INCOMPLETE}


def test_a_copy_that_was_cut_off_or_a_damaged_picture_beside_it_costs_a_series_nothing(tmp_path: Path) -> None:
    write(tmp_path, *(ct(z) for z in range(3)), ct(2), radiograph(pixels(0)))
    for name in ("003.dcm", "004.dcm"):
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 2)
    reading = read_folder(tmp_path)
    assert [refused.code for refused in reading.refused] == [RefusalCode.TRUNCATED] * 2
    np.testing.assert_array_equal(reading.volumes[0].values_ZYX, np.stack([hu(z) for z in range(3)]))


# --- values


def test_a_large_number_keeps_its_last_digit_until_the_intercept_has_made_it_small(tmp_path: Path) -> None:
    stored = np.array([[2**24 + 1, 2**24]], "<u4")  # one float32
    write(tmp_path, radiograph(stored, BitsStored=25, HighBit=24, RescaleSlope=1, RescaleIntercept=-(2**24)))
    assert read_folder(tmp_path).images[0].values_YX.tolist() == [[1, 0]]


@pytest.mark.parametrize("shown", ["MONOCHROME2", "MONOCHROME1"])  # PET is mostly shown black on white
def test_a_slope_per_slice_is_applied_per_slice(tmp_path: Path, shown: str) -> None:
    slices = [
        ct(z, sop_class=uid.PositronEmissionTomographyImageStorage, modality="PT", stored=np.full((6, 4), 10, "<u2"),
           RescaleSlope=z + 0.5, RescaleIntercept=0, PhotometricInterpretation=shown)
        for z in range(3)
    ]  # fmt: skip
    volume = one_volume(read_folder(write(tmp_path, *slices)))
    assert volume.values_ZYX[:, 0, 0].tolist() == [5.0, 15.0, 25.0]


def test_rescaling_uint16_does_not_overflow(tmp_path: Path) -> None:
    slices = [ct(z, stored=np.full((6, 4), 60000, "<u2"), RescaleSlope=3, RescaleIntercept=-7) for z in range(2)]
    assert one_volume(read_folder(write(tmp_path, *slices))).values_ZYX.max() == 179993.0


@pytest.mark.parametrize("modality", [None, "", "OT"])
def test_a_ct_that_does_not_say_so_is_one_by_its_class_and_needs_scale(tmp_path: Path, modality: str | None) -> None:
    volume = one_volume(read_folder(write(tmp_path / "whole", *(ct(z, Modality=modality) for z in range(3)))))
    assert volume.source.modality == "CT"
    lacking = (ct(z, Modality=modality, RescaleSlope=None, RescaleIntercept=None) for z in range(3))
    assert all_refused(read_folder(write(tmp_path / "lacking", *lacking))) == {RefusalCode.MISSING_HEADER}


@pytest.mark.parametrize("value", [None, ""], ids=["absent", "empty"])
@pytest.mark.parametrize("keywords", [("RescaleSlope",), ("RescaleIntercept",), ("RescaleSlope", "RescaleIntercept")])
def test_ct_and_pet_without_slope_and_intercept_are_refused(
    tmp_path: Path, keywords: tuple[str, ...], value: Any
) -> None:
    pet = {"sop_class": uid.PositronEmissionTomographyImageStorage, "modality": "PT"}
    for name, more in (("ct", {}), ("pet", pet)):
        # one such slice among others would be off by the intercept
        slices = [ct(z, **{**more, **(dict.fromkeys(keywords, value) if z == 1 else {})}) for z in range(3)]
        reading = read_folder(write(tmp_path / name, *slices))
        assert all_refused(reading) == {RefusalCode.MISSING_HEADER, RefusalCode.INCOMPLETE}


def test_mr_and_radiographs_may_lack_both_slope_and_intercept_and_not_one(tmp_path: Path) -> None:
    mr = {"sop_class": uid.MRImageStorage, "modality": "MR", "RescaleIntercept": None}
    volume = one_volume(read_folder(write(tmp_path / "none", *(ct(z, RescaleSlope=None, **mr) for z in range(3)))))
    np.testing.assert_array_equal(volume.values_ZYX[1], pixels(1).astype(np.float32))
    one = read_folder(write(tmp_path / "one", *(ct(z, **mr) for z in range(3))))
    assert all_refused(one) == {RefusalCode.MISSING_HEADER}
    one = read_folder(write(tmp_path / "dx", radiograph(np.zeros((2, 2), np.uint8), RescaleIntercept=5)))
    assert all_refused(one) == {RefusalCode.MISSING_HEADER}


def test_pixels_of_which_nobody_says_whether_they_are_negative_are_refused(tmp_path: Path) -> None:
    slices = [ct(z, stored=np.full((2, 2), -1000, np.int16), PixelRepresentation=None) for z in range(3)]
    assert all_refused(read_folder(write(tmp_path / "ct", *slices))) == {RefusalCode.UNSUPPORTED_PIXELS}
    picture = radiograph(np.full((2, 2), -1, np.int16), PixelRepresentation=None)
    assert all_refused(read_folder(write(tmp_path / "cr", picture))) == {RefusalCode.UNSUPPORTED_PIXELS}


def test_colours_that_cannot_be_converted_are_refused_as_such_and_not_as_damaged(tmp_path: Path) -> None:
    about = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL", "PlanarConfiguration": 0}
    made = radiograph(np.full((2, 2, 3), 2048, np.uint16), **about, BitsStored=12, HighBit=11)
    (refused,) = read_folder(write(tmp_path, made)).refused
    assert (refused.code, "of 12 bits" in refused.why) == (RefusalCode.UNSUPPORTED_PIXELS, True)


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_pixels_that_are_floating_point_numbers_are_refused_as_such(tmp_path: Path, keyword: str, dtype: str) -> None:
    kept = np.full((2, 2), 0.5, dtype)
    made = ct(0, stored=kept, BitsStored=None, HighBit=None, PixelRepresentation=None, PixelData=None)
    setattr(made, keyword, kept.tobytes())
    path = write(tmp_path, made) / "000.dcm"
    (refused,) = read_folder(tmp_path).refused
    assert refused.code == RefusalCode.UNSUPPORTED_PIXELS
    assert "floating point" in refused.why
    assert examine(path).sop_uid == "1.2.9.1"  # a pull may still bring it; before, it was taken for cut off
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refusal) as cut:
        examine(path)
    assert cut.value.code == RefusalCode.TRUNCATED


@pytest.mark.parametrize(
    "more",
    [{"PhotometricInterpretation": kind} for kind in ("HSV", "CMYK", "YBR_PARTIAL_422", "YBR_RCT", "MONOCHROME2")]
    + [{"PlanarConfiguration": None}, {"PlanarConfiguration": 2}, {"PixelRepresentation": 1}],
    ids=lambda more: "-".join(map(str, *more.items())),
)
def test_colours_of_another_kind_or_order_than_is_known_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    about = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    green = np.zeros((2, 2, 3), np.uint8)
    green[..., 1] = 100
    (image,) = read_folder(write(tmp_path / "rgb", radiograph(green, **about))).images
    np.testing.assert_allclose(image.values_YX, 58.7, rtol=1e-6)
    refused = all_refused(read_folder(write(tmp_path / "other", radiograph(green, **{**about, **more}))))
    assert refused == {RefusalCode.UNSUPPORTED_PIXELS}


def test_bits_above_bits_stored_are_masked(tmp_path: Path) -> None:
    unsigned = [ct(z, stored=np.full((6, 4), 0xF005, "<u2"), BitsStored=12, HighBit=11) for z in range(2)]
    assert one_volume(read_folder(write(tmp_path / "u", *unsigned))).values_ZYX.max() == 5 * 2 - 1000
    # 0x0FFE in 12 signed bits is -2
    signed = [ct(z, stored=np.full((6, 4), 0x0FFE, "<i2"), BitsStored=12, HighBit=11) for z in range(2)]
    assert one_volume(read_folder(write(tmp_path / "s", *signed))).values_ZYX.max() == -2 * 2 - 1000


@pytest.mark.parametrize("vr", ["SS", "US"])
def test_padding_takes_the_smallest_valid_value(tmp_path: Path, vr: str) -> None:
    slices = []
    for z in range(3):
        stored = pixels(z).astype("<i2")
        stored[0, 0] = -2000
        made = ct(z, stored=stored, RescaleSlope=1, RescaleIntercept=-1024)
        made.add_new("PixelPaddingValue", vr, -2000 if vr == "SS" else 63536)  # GE writes it unsigned
        slices.append(made)
    volume = one_volume(read_folder(write(tmp_path, *slices)))
    assert volume.values_ZYX[:, 0, 0].tolist() == [1 - 1024.0] * 3  # stored 1 of slice 0 is the smallest measured
    assert volume.values_ZYX[2, 0, 1] == 201 - 1024.0


def test_a_slice_of_padding_alone_ends_a_volume_and_a_volume_of_padding_alone_is_refused(tmp_path: Path) -> None:
    outside = np.zeros((2, 2), np.uint16)
    stored = [outside, np.full((2, 2), 700, np.uint16), np.array([[0, 500], [600, 700]], np.uint16), outside]
    slices = [ct(z, stored=each, PixelPaddingValue=0) for z, each in enumerate(stored)]
    volume = one_volume(read_folder(write(tmp_path / "ends", *slices)))
    assert volume.values_ZYX[:, 0, 0].tolist() == [0, 400, 0, 0]  # 2 * 500 - 1000 = 0
    empty = [ct(z, stored=outside, PixelPaddingValue=0) for z in range(3)]
    assert all_refused(read_folder(write(tmp_path / "empty", *empty))) == {RefusalCode.CORRUPT}
    picture = radiograph(outside, PixelPaddingValue=0)
    assert all_refused(read_folder(write(tmp_path / "picture", picture))) == {RefusalCode.CORRUPT}


def test_a_signed_padding_range_covers_everything_up_to_its_limit(tmp_path: Path) -> None:
    slices = []
    for z in range(2):
        made = ct(z, stored=pixels(z).astype("<i2") - 5, RescaleSlope=1, RescaleIntercept=0)
        made.add_new("PixelPaddingValue", "SS", -3)
        made.add_new("PixelPaddingRangeLimit", "SS", -5)  # in either order
        slices.append(made)
    volume = one_volume(read_folder(write(tmp_path, *slices)))
    assert volume.values_ZYX[0].ravel()[:5].tolist() == [-2.0, -2.0, -2.0, -2.0, -1.0]


@pytest.mark.parametrize(("value", "limit"), [(0, 3), (3, 0)])
def test_a_padding_range_covers_everything_up_to_its_limit(tmp_path: Path, value: int, limit: int) -> None:
    slices = [ct(z, PixelPaddingValue=value, PixelPaddingRangeLimit=limit) for z in range(2)]
    volume = one_volume(read_folder(write(tmp_path, *slices)))
    assert volume.values_ZYX[0].ravel()[:5].tolist() == [4 * 2 - 1000.0] * 5


def radiograph(stored: NDArray[Any], name: str = "1", **more: Any) -> Dataset:
    more = {"sop_class": uid.DigitalXRayImageStorageForPresentation, "modality": "DX", **more}
    return dataset(stored, f"1.2.8.{name}", **more)


def test_monochrome1_radiographs_are_inverted_and_ct_keeps_its_hounsfield_units(tmp_path: Path) -> None:
    stored = np.array([[0, 100], [200, 4095]], "<u2")
    write(tmp_path / "dx", radiograph(stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11))
    (image,) = read_folder(tmp_path / "dx").images
    assert image.values_YX.tolist() == [[4095, 3995], [3895, 0]]
    write(tmp_path / "ct", *(ct(z, PhotometricInterpretation="MONOCHROME1") for z in range(3)))
    np.testing.assert_array_equal(one_volume(read_folder(tmp_path / "ct")).values_ZYX[1], hu(1))


def test_the_tone_curve_of_a_radiograph_is_applied_and_its_window_is_not(tmp_path: Path) -> None:
    curve = Dataset()
    curve.LUTDescriptor, curve.LUTData = [4, 0, 8], [7, 30, 200, 255]
    stored = np.array([[0, 1], [2, 3]], np.uint8)
    made = radiograph(stored, VOILUTSequence=[curve])
    made.VOILUTSequence[0]["LUTDescriptor"].VR = made.VOILUTSequence[0]["LUTData"].VR = "US"
    windowed = radiograph(stored, "2", WindowCenter=1, WindowWidth=1, SeriesInstanceUID="1.2.3.9")
    first, second = read_folder(write(tmp_path, made, windowed)).images
    assert first.values_YX.tolist() == [[7, 30], [200, 255]]
    assert second.values_YX.tolist() == [[0, 1], [2, 3]]


def test_a_modality_lut_is_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4, 0, 16], [10, 500, 3000, 65535], "OD"
    made = radiograph(np.array([[0, 1], [2, 3]], np.uint8), ModalityLUTSequence=[table])
    made.ModalityLUTSequence[0]["LUTDescriptor"].VR = made.ModalityLUTSequence[0]["LUTData"].VR = "US"
    (image,) = read_folder(write(tmp_path, made)).images
    assert image.values_YX.tolist() == [[10, 500], [3000, 65535]]


def test_spacing_of_a_radiograph_falls_back_to_the_detector_and_then_to_none(tmp_path: Path) -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    write(
        tmp_path,
        radiograph(stored, "1", PixelSpacing=[0.1, 0.2], ImagerPixelSpacing=[0.3, 0.4]),
        radiograph(stored, "2", ImagerPixelSpacing=[0.3, 0.4]),
        radiograph(stored, "3"),
        radiograph(stored, "4", PixelSpacing=[0, 0]),
    )
    assert [image.spacing_mm for image in read_folder(tmp_path).images] == [(0.1, 0.2), (0.3, 0.4), None, None]


# --- damaged and hostile files


def damaged(folder: Path, change: Callable[[bytearray], bytes]) -> FolderReading:
    write(folder, *(ct(z) for z in range(4)))
    path = folder / "003.dcm"  # the last slice: its loss makes no gap
    path.write_bytes(change(bytearray(path.read_bytes())))
    return read_folder(folder)


def test_a_truncated_last_slice_refuses_the_series(tmp_path: Path) -> None:
    assert all_refused(damaged(tmp_path, lambda raw: raw[:-10])) == {RefusalCode.TRUNCATED, RefusalCode.INCOMPLETE}
    assert "cut off" in next(r.why for r in read_folder(tmp_path).refused if r.code == RefusalCode.TRUNCATED)


def test_a_header_without_pixels_refuses_the_series(tmp_path: Path) -> None:
    reading = damaged(tmp_path, lambda raw: raw[: raw.rindex(b"\xe0\x7f\x10\x00")])
    assert all_refused(reading) == {RefusalCode.MISSING_PIXELS, RefusalCode.INCOMPLETE}


def test_a_header_that_declares_gigabytes_allocates_nothing(tmp_path: Path) -> None:
    write(tmp_path, ct(0, Rows=65535, Columns=65535), ct(1, Rows=20000, Columns=3000))
    assert all_refused(read_folder(tmp_path)) == {RefusalCode.TOO_LARGE, RefusalCode.TRUNCATED}


def encapsulated(frame: bytes, syntax: str, **more: Any) -> Dataset:
    made = radiograph(np.zeros((2, 2), np.uint8), **more)
    made.PixelData = pydicom.encaps.encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = syntax
    return made


def test_a_codestream_larger_than_its_header_is_refused_before_decoding(tmp_path: Path) -> None:
    siz = struct.pack(">HHIIIIIIIIH", 41, 0, 60000, 60000, 0, 0, 60000, 60000, 0, 0, 1) + b"\x07\x01\x01"
    j2k = b"\xff\x4f\xff\x51" + siz + bytes(64)
    jpeg = b"\xff\xd8\xff\xc3\x00\x0b\x08" + struct.pack(">HH", 60000, 60000) + b"\x01\x01\x11\x00" + bytes(64)
    write(tmp_path, encapsulated(j2k, uid.JPEG2000Lossless), encapsulated(jpeg, uid.JPEGLosslessSV1, name="2"))
    reading = read_folder(tmp_path)
    assert all_refused(reading) == {RefusalCode.CORRUPT}
    assert all("another size" in refused.why for refused in reading.refused)


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.RLELossless])
def test_a_codestream_of_noise_is_refused_as_corrupt(tmp_path: Path, syntax: str) -> None:
    write(tmp_path, encapsulated(bytes(range(64)), syntax))
    assert all_refused(read_folder(tmp_path)) == {RefusalCode.CORRUPT}


def test_a_deflated_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    write(tmp_path, radiograph(np.zeros((2, 2), np.uint8)))
    path = tmp_path / "000.dcm"
    made = pydicom.dcmread(path)
    made.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    made.save_as(path)
    assert len(read_folder(tmp_path).images) == 1
    pack = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(pack.compress(bytes(2**24)) for _ in range(17)) + pack.flush()
    raw = path.read_bytes()
    meta_end = 132 + 12 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    path.write_bytes(raw[:meta_end] + bomb)
    assert all_refused(read_folder(tmp_path)) == {RefusalCode.TOO_LARGE}


def test_a_sequence_that_runs_off_the_file_is_damage_and_not_a_disk_error(tmp_path: Path) -> None:
    write(tmp_path, ct(0, ReferencedStudySequence=[Dataset()]))
    path = tmp_path / "000.dcm"
    raw = path.read_bytes()
    at = raw.index(b"\x08\x00\x10\x11SQ")
    path.write_bytes(raw[: at + 8] + b"\xff\xff\xff\xff")
    assert all_refused(read_folder(tmp_path)) <= {RefusalCode.CORRUPT, RefusalCode.MISSING_HEADER}


def test_a_pipe_or_a_linked_folder_does_not_stop_or_escape_the_reading(tmp_path: Path) -> None:
    write(tmp_path / "in", *(ct(z) for z in range(2)))
    write(tmp_path / "elsewhere", ct(5))
    os.mkfifo(tmp_path / "in" / "pipe")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "broken").symlink_to(tmp_path / "nowhere")
    reading = read_folder(tmp_path / "in")
    assert len(reading.volumes) == 1
    assert {r.path.name: r.code for r in reading.refused} == dict.fromkeys(
        ("pipe", "loop", "broken"), RefusalCode.UNREADABLE
    )


def test_a_missing_folder_is_an_error_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    assert read_folder(tmp_path) == FolderReading((), (), ())
    with pytest.raises(DataError, match="does not exist"):
        read_folder(tmp_path / "patient_smith")
    with pytest.raises(DataError) as caught:
        read_folder(tmp_path / "patient_smith")
    assert "smith" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 2), st.integers(128, 900), st.integers(0, 255)), max_size=12))
def test_whatever_bytes_are_changed_every_file_is_accounted_for_once(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int, int]]
) -> None:
    folder = write(tmp_path_factory.mktemp("damage"), *(ct(z) for z in range(3)))
    for number, at, value in damage:
        path = folder / f"{number:03}.dcm"
        raw = bytearray(path.read_bytes())
        raw[at % len(raw)] = value
        path.write_bytes(raw)
    reading = read_folder(folder)
    used = [file for item in (*reading.volumes, *reading.images) for file in item.source.files]
    assert sorted(used + [refused.path for refused in reading.refused]) == sorted(folder.iterdir())


# --- the folder as a whole


def test_the_order_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    def made(folder: Path) -> list[str]:
        write(folder / "b", *(ct(z, SeriesInstanceUID="1.2.7", name="7.") for z in range(2)))
        write(folder / "a", *(ct(z, SeriesInstanceUID="1.2.6", name="6.") for z in range(2)))
        write(folder / "c", radiograph(np.zeros((2, 2), np.uint8), SeriesInstanceUID="1.2.5"))
        (folder / "a" / "note.txt").write_text("x")
        return [
            item.path.name if not isinstance(item, Volume) and hasattr(item, "path") else item.source.series_uid
            for item in iterate_folder(folder)
        ]

    assert made(tmp_path / "z") == made(tmp_path / "deeper" / "a") == ["note.txt", "1.2.6", "1.2.7", "1.2.5"]


def test_progress_ends_at_its_total_and_never_goes_back(tmp_path: Path) -> None:
    write(tmp_path, *(ct(z) for z in range(3)), radiograph(np.zeros((2, 2), np.uint8), SeriesInstanceUID="1.2.5"))
    (tmp_path / "junk").write_bytes(b"junk")
    seen: list[tuple[int, int]] = []
    assert len(list(iterate_folder(tmp_path, lambda done, total: seen.append((done, total))))) == 3
    assert seen == sorted(seen)
    assert seen[-1] == (10, 10)


@pytest.mark.parametrize(
    ("charset", "patient_id"),
    [
        ("ISO_IR 192", "王小东".encode()),
        ("GB18030", "王小东".encode("gb18030")),
        (["", "ISO 2022 IR 58"], b"\x1b$)A" + "王小东".encode("gb2312")),
    ],
)
def test_an_identifier_is_the_same_in_whatever_characters_it_is_written(
    tmp_path: Path, charset: str | list[str], patient_id: bytes
) -> None:
    width = len(patient_id) + len(patient_id) % 2
    write(tmp_path, *(ct(z, SpecificCharacterSet=charset, PatientID="X" * width) for z in range(3)))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"X" * width, patient_id.ljust(width)))
    assert one_volume(read_folder(tmp_path)).source.patient_id == "王小东"


def test_identifiers_do_not_show_when_a_volume_is_printed(tmp_path: Path) -> None:
    reading = read_folder(write(tmp_path, *(ct(z, PatientID="SMITH77") for z in range(2)), ct(0, PatientID="SMITH77")))
    for text in (repr(reading), str(reading.volumes)):
        assert "SMITH77" not in text
        assert "1.2.9" not in text
        assert str(tmp_path) not in text


def test_the_readers_warnings_do_not_quote_the_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, *(ct(z) for z in range(2)))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.9.", b"SMITH."))
    with caplog.at_level("DEBUG"), warnings.catch_warnings():
        warnings.simplefilter("error")
        read_folder(tmp_path)
    assert "SMITH" not in caplog.text
