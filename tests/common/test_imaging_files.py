"""The imaging room on files nobody here wrote: pydicom's own and, where present, the real data folder."""

import csv
import hashlib
import os
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file

from common.imaging import FolderReading, RefusalCode, Volume, read_folder

DATA = Path(os.environ.get("FEDICOM_DATA", Path(__file__).parents[3] / "shared" / "data"))
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"


def accounted(reading: FolderReading) -> list[Path]:
    items = [*reading.volumes, *reading.images]
    return [*(file for item in items for file in item.source.files), *(refused.path for refused in reading.refused)]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def lay_out(folder: Path, *names: str) -> Path:
    for name in names:
        found = get_testdata_file(name, download=False)
        if found is None:
            pytest.skip(f"this pydicom does not ship {name}")
        (folder / name).write_bytes(Path(str(found)).read_bytes())
    return folder


@pytest.fixture(scope="module")
def real() -> FolderReading:
    if not (DATA / "dicom").is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    return read_folder(DATA / "dicom")


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, str]]:
    with (DATA / "dicom_expected.csv").open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def codes(reading: FolderReading) -> dict[str, RefusalCode]:
    return {refused.path.name: refused.code for refused in reading.refused}


def test_every_real_file_is_accounted_for_exactly_once(real: FolderReading) -> None:
    assert sorted(accounted(real)) == files(DATA / "dicom")


def test_every_file_that_pydicom_ships_is_accounted_for_exactly_once() -> None:
    reading = read_folder(PYDICOM)
    assert sorted(accounted(reading)) == files(PYDICOM)
    assert len(reading.images) >= 7
    assert len(reading.volumes) >= 1


def test_real_slices_have_the_values_of_the_reference_decode(
    real: FolderReading, expected: dict[str, dict[str, str]]
) -> None:
    checked = 0
    for volume in real.volumes:
        if len(volume.source.files) == 1:
            continue
        for values_YX, path in zip(volume.values_ZYX, volume.source.files, strict=True):
            row = expected[path.relative_to(DATA / "dicom").as_posix()]
            assert values_YX.min() == pytest.approx(float(row["modality_min"]))
            assert values_YX.max() == pytest.approx(float(row["modality_max"]))
            slope, intercept = float(row["RescaleSlope"] or 1), float(row["RescaleIntercept"] or 0)
            stored = np.round((values_YX.astype(np.float64) - intercept) / slope).astype(row["dtype"])
            assert hashlib.sha256(stored.tobytes()).hexdigest()[:16] == row["pixel_sha256"]
            checked += 1
    assert checked == 40 + 4 + 4 + 4


def test_the_lidc_series_lies_where_highdicom_puts_it(real: FolderReading) -> None:
    (volume,) = (v for v in real.volumes if v.values_ZYX.shape == (40, 512, 512))
    reference = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in volume.source.files], rtol=0.01)
    assert volume.spacing_mm == pytest.approx((2.5, 0.703125, 0.703125))
    for reference_zyx in ((0, 0, 0), (39, 511, 511), (7, 100, 300)):
        mm = reference.affine @ [*reference_zyx, 1]
        z, y, x, _ = np.round(np.linalg.inv(volume.affine) @ mm, 6)
        assert (z, y, x) == pytest.approx(np.round([z, y, x]), abs=1e-4)
        assert volume.values_ZYX[round(z), round(y), round(x)] == reference.array[reference_zyx]


@pytest.mark.parametrize("vendor", ["ge", "philips", "siemens"])
def test_classic_mr_slices_lie_at_their_image_position(real: FolderReading, vendor: str) -> None:
    (volume,) = (v for v in real.volumes if f"mr_{vendor}_anatomical" in v.source.files[0].parent.name)
    for z, path in enumerate(volume.source.files):
        position_mm = pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient
        assert (volume.affine @ [z, 0, 0, 1])[:3] == pytest.approx(position_mm, abs=1e-3)
    assert np.linalg.det(volume.affine[:3, :3]) < 0  # (slice, row, column) with slices along row x column


def test_an_enhanced_ct_file_is_one_volume_in_hounsfield_units(real: FolderReading) -> None:
    (volume,) = (v for v in real.volumes if v.source.files[0].name == "eCT_Supplemental.dcm")
    frames = pydicom.dcmread(volume.source.files[0])
    assert volume.values_ZYX.shape == (2, 512, 512)
    for frame, groups in zip(frames.pixel_array, frames.PerFrameFunctionalGroupsSequence, strict=True):
        position_mm = groups.PlanePositionSequence[0].ImagePositionPatient
        z, y, x, _ = np.linalg.inv(volume.affine) @ [*position_mm, 1]
        assert (y, x) == pytest.approx((0, 0), abs=1e-6)
        np.testing.assert_array_equal(volume.values_ZYX[round(z)], frame.astype(np.float32) - 1024)


def test_what_is_no_single_image_or_stack_is_refused_by_name(real: FolderReading) -> None:
    got = codes(real)
    assert got["DICOMDIR"] == RefusalCode.DICOMDIR
    assert got["test-SR.dcm"] == RefusalCode.REPORT
    assert got["rtplan.dcm"] == RefusalCode.RADIOTHERAPY
    assert got["liver_1frame.dcm"] == RefusalCode.SEGMENTATION
    assert got["image_dfl.dcm"] == RefusalCode.SECONDARY_CAPTURE
    assert got["examples_ybr_color.dcm"] == RefusalCode.CINE
    assert got["MR_truncated.dcm"] == RefusalCode.TRUNCATED
    assert got["CT_small.dcm"] == RefusalCode.SINGLE_SLICE
    assert got["emri_small.dcm"] == RefusalCode.MISSING_GEOMETRY
    assert {got[f"{n}.dcm"] for n in range(1, 10)} == {RefusalCode.MOSAIC}
    assert {got[name] for name in ("17106", "17136", "17166", "17196")} == {RefusalCode.GAP}


def test_a_monochrome1_radiograph_is_brighter_where_less_radiation_came(real: FolderReading) -> None:
    (image,) = (i for i in real.images if i.source.files[0].name == "6154")
    stored = pydicom.dcmread(image.source.files[0]).pixel_array
    # 12 bits: 0 -> 0.684 * 4095 + 200 = 3000.98
    np.testing.assert_allclose(image.values_YX, 0.684 * (4095.0 - stored) + 200, rtol=1e-6)
    assert image.spacing_mm == (0.1, 0.1)


def test_colour_ultrasound_becomes_luminance(tmp_path: Path) -> None:
    (image,) = read_folder(lay_out(tmp_path, "examples_rgb_color.dcm")).images
    rgb = pydicom.dcmread(image.source.files[0]).pixel_array.astype(np.float64)
    want = 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]
    np.testing.assert_allclose(image.values_YX, want, atol=1e-3)


def test_a_palette_ultrasound_is_read_through_its_colours(tmp_path: Path) -> None:
    (image,) = read_folder(lay_out(tmp_path, "examples_palette.dcm")).images
    dataset = pydicom.dcmread(image.source.files[0])
    index = dataset.pixel_array
    level = np.zeros(256)
    for name, part in (("Red", 0.299), ("Green", 0.587), ("Blue", 0.114)):
        table = np.frombuffer(dataset[f"{name}PaletteColorLookupTableData"].value, dtype="<u2")
        level[: len(table)] += part * table
    # entries of 16 bits; a recipe's window of 0 to 255 is for colours of 8 bits as well as for these
    np.testing.assert_allclose(image.values_YX, level[index] * 255 / 65535, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_transfer_syntaxes_of_one_image_give_the_same_volume(tmp_path: Path, name: str) -> None:
    """MR_small in another syntax beside a slice in the plain one."""
    volumes: list[Volume] = []
    for file in ("MR_small.dcm", name):
        folder = tmp_path / file
        folder.mkdir()
        for z, source in enumerate((file, "MR_small.dcm")):
            dataset = pydicom.dcmread(str(get_testdata_file(source, download=False)))
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.{z + 1}"
            dataset.ImagePositionPatient = [0, 0, z]
            dataset.save_as(folder / f"{z}")
        volumes.extend(read_folder(folder).volumes)
    np.testing.assert_array_equal(volumes[0].values_ZYX, volumes[1].values_ZYX)
    assert volumes[0].values_ZYX.max() == 2145


def test_a_file_without_preamble_is_read_only_if_its_content_is_dicom(tmp_path: Path) -> None:
    lay_out(tmp_path, "ExplVR_LitEndNoMeta.dcm", "README.txt")
    got = codes(read_folder(tmp_path))
    assert got == {"ExplVR_LitEndNoMeta.dcm": RefusalCode.RADIOTHERAPY, "README.txt": RefusalCode.NOT_DICOM}


def as_radiograph(folder: Path, name: str) -> Path:
    """A file of pydicom's as a single-frame radiograph, so that its codec can be tried."""
    dataset = pydicom.dcmread(str(get_testdata_file(name, download=False)))
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.ComputedRadiographyImageStorage
    dataset.Modality, dataset.ImageType = "CR", ["ORIGINAL", "PRIMARY"]
    dataset.save_as(folder / name)
    return folder / name


def test_twelve_bit_lossy_jpeg_is_decoded(tmp_path: Path) -> None:
    as_radiograph(tmp_path, "JPGExtended.dcm")
    as_radiograph(tmp_path, "JPEG2000.dcm")
    reading = read_folder(tmp_path)
    images = {image.source.files[0].name: image.values_YX for image in reading.images}
    jpeg, j2k = images["JPGExtended.dcm"], images["JPEG2000.dcm"]
    assert np.corrcoef(jpeg.ravel(), j2k.ravel())[0, 1] > 0.95  # the same scan, lossy in two ways
    assert 250 < jpeg.max() < 290  # the header says 278 before compression


@pytest.mark.parametrize(
    "name", ["JPGExtended.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_rle.dcm"]
)
def test_a_compressed_file_cut_anywhere_is_refused_or_complete(tmp_path: Path, name: str) -> None:
    path = as_radiograph(tmp_path, name)
    raw = path.read_bytes()
    (whole,) = read_folder(tmp_path).images
    refused = 0
    for cut in (1, 5, 9, 12, 30, 100, 500, len(raw) // 3):
        path.write_bytes(raw[:-cut])
        reading = read_folder(tmp_path)
        for image in reading.images:
            np.testing.assert_array_equal(image.values_YX, whole.values_YX)
        refused += len(reading.refused)
    assert refused >= 2  # some files end in padding that may be lost


def test_damaged_jpeg_does_not_end_the_process(tmp_path: Path) -> None:
    """Found with random damage: GDCM 3.2.6 aborts on some lossless JPEG, which no exception handler sees."""
    path = as_radiograph(tmp_path, "SC_rgb_jpeg_gdcm.dcm")
    raw = path.read_bytes()
    start = raw.rindex(b"\xff\xd8\xff")
    rng = np.random.default_rng(7)
    for _ in range(60):
        damaged = bytearray(raw)
        for at in rng.integers(start + 2, start + 700, size=3):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        reading = read_folder(tmp_path)
        assert len(reading.images) + len(reading.refused) == 1


def test_seven_transfer_syntaxes_of_one_image_give_the_same_pixels(tmp_path: Path) -> None:
    """The nine files of mr_transfer_syntaxes_same_image, as radiographs because they are mosaics."""
    if not (DATA / "dicom").is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    for number in range(1, 10):
        dataset = pydicom.dcmread(DATA / "dicom" / "mr_transfer_syntaxes_same_image" / f"{number}.dcm")
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.ComputedRadiographyImageStorage
        dataset.ImageType, dataset.SOPInstanceUID = ["ORIGINAL", "PRIMARY"], f"1.2.{number}"
        dataset.save_as(tmp_path / f"{number}")
    reading = read_folder(tmp_path)
    assert (reading.refused, len(reading.images)) == ((), 9)
    assert reading.images[0].values_YX.max() == 2362
    for image in reading.images[1:]:
        np.testing.assert_array_equal(image.values_YX, reading.images[0].values_YX)


def test_a_signed_image_in_an_unsigned_codestream_keeps_its_sign(tmp_path: Path) -> None:
    path = as_radiograph(tmp_path, "J2K_pixelrep_mismatch.dcm")
    (image,) = read_folder(tmp_path).images
    want = pydicom.dcmread(path)
    np.testing.assert_array_equal(
        image.values_YX, want.pixel_array * float(want.RescaleSlope) + float(want.RescaleIntercept)
    )
    assert want.pixel_array.min() == -2000
