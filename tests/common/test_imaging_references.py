"""The imaging room against readers that nobody here wrote: dcm2niix, SimpleITK (GDCM), highdicom and pydicom.

dcm2niix is a Debian package; SimpleITK is a development dependency. Where one is absent, its tests are skipped.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.pixels.utils import pixel_array

from common.imaging import FolderReading, RefusalCode, Volume, read_folder
from common.imaging.header import read_header
from common.imaging.layout import Layout, layout_of
from common.imaging.pixels import stored_frames
from common.imaging.refusal import Refusal, quiet
from tests.common.test_imaging_files import DATA, PYDICOM, files
from tests.common.test_imaging_hostile import dataset

RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SERIES = ("ct_lidc0001_ge_40slices", *(f"mr_{v}_anatomical_001" for v in ("ge", "philips", "siemens")),
          "mr_siemens_multiframe_anatomical_001")  # fmt: skip


def real_folder(name: str) -> Path:
    if not (DATA / "dicom").is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    return DATA / "dicom" / name


def only_volume(reading: FolderReading) -> Volume:
    assert [refused.code for refused in reading.refused] == []
    (volume,) = reading.volumes
    return volume


# --- dcm2niix


def dcm2niix(source: Path, out: Path) -> dict[str, Any]:
    """Name -> NIfTI of every image that dcm2niix makes of a folder."""
    program = shutil.which("dcm2niix")
    if program is None:
        pytest.skip("dcm2niix is not installed: apt install dcm2niix")
    out.mkdir()
    # no Philips "precise" scaling: the Modality LUT is what counts here
    command = [program, "-b", "n", "-z", "n", "-p", "n", "-f", "image", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return {path.stem: nibabel.load(path) for path in out.glob("*.nii")}


def placed(volume: Volume, nifti: Any) -> NDArray[np.float64]:
    """The voxels of a NIfTI image, each at the index that our affine gives its place in the patient."""
    theirs = np.asarray(nifti.dataobj, dtype=np.float64)
    ours_of_theirs = np.linalg.inv(RAS_OF_LPS @ volume.affine) @ nifti.affine
    whole = np.round(ours_of_theirs)
    # NIfTI keeps its affine in float32: at the far corner this is still the same voxel
    assert np.abs((ours_of_theirs - whole) @ [*theirs.shape, 1]).max() < 0.02
    assert (np.abs(whole[:3, :3]).sum(axis=0) == 1).all()
    assert (np.abs(whole[:3, :3]).sum(axis=1) == 1).all()
    order = [int(axis) for axis in np.abs(whole[:3, :3]).argmax(axis=1)]
    turned = [axis for axis in range(3) if whole[axis, order[axis]] < 0]
    assert whole[:3, 3].tolist() == [theirs.shape[order[axis]] - 1 if axis in turned else 0 for axis in range(3)]
    return np.flip(theirs.transpose(order), turned)


@pytest.mark.parametrize("name", SERIES)
def test_every_voxel_of_ct_and_mr_has_the_value_and_the_place_that_dcm2niix_gives_it(tmp_path: Path, name: str) -> None:
    images = dcm2niix(real_folder(name), tmp_path / "nii")
    (nifti,) = images.values()
    volume = only_volume(read_folder(real_folder(name)))
    np.testing.assert_allclose(volume.values_ZYX, placed(volume, nifti), rtol=1e-6, atol=1e-4)


def field(mm_LPS: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth picture of the patient, in HU; linear along each axis within a few mm."""
    x, y, z = mm_LPS
    return 300 * np.sin(x / 40) + 200 * np.cos(y / 50) + 4 * z


def tilted_ct(folder: Path, *, tilt_deg: float = 15.0, slices: int = 12, size: int = 48) -> Path:
    """A head CT with a tilted gantry: slices lean towards the feet and are stacked along the table."""
    angle = np.radians(tilt_deg)
    columns, rows = np.array([1.0, 0, 0]), np.array([0, np.cos(angle), -np.sin(angle)])
    folder.mkdir()
    for k in range(slices):
        corner = np.array([-50.0, -60.0, 3.0 * k])
        y, x = np.mgrid[:size, :size]
        mm = corner[:, None, None] + 2.0 * (x * columns[:, None, None] + y * rows[:, None, None])
        made = dataset(
            np.round(field(mm)).astype("<i2"), f"1.2.9.{k + 1}", RescaleSlope=1, RescaleIntercept=0,
            Manufacturer="SIEMENS", InstanceNumber=k + 1, SeriesNumber=1, GantryDetectorTilt=tilt_deg,
            ImagePositionPatient=list(corner), ImageOrientationPatient=[*columns, *rows], PixelSpacing=[2, 2],
            SliceThickness=3,
        )  # fmt: skip
        made.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize("tilt_deg", [15.0, -15.0])
def test_a_tilted_series_is_refused_and_on_demand_made_straight_without_moving_anything(
    tmp_path: Path, tilt_deg: float
) -> None:
    folder = tilted_ct(tmp_path / "tilted", tilt_deg=tilt_deg)
    assert {refused.code for refused in read_folder(folder).refused} == {RefusalCode.TILT}
    assert "correct_tilt" in read_folder(folder).refused[0].why
    volume = only_volume(read_folder(folder, correct_tilt=True))
    assert volume.source.corrections == ("gantry tilt of 15.0 degrees resampled",)
    z, y, x = volume.affine[:3, :3].T
    assert [z @ y, z @ x, y @ x] == pytest.approx([0, 0, 0], abs=1e-9)
    assert volume.spacing_mm == pytest.approx((3.0 * np.cos(np.radians(15)), 2.0, 2.0))
    index = np.indices(volume.values_ZYX.shape).reshape(3, -1)
    true = field((volume.affine @ np.vstack([index, np.ones(index.shape[1])]))[:3]).reshape(volume.values_ZYX.shape)
    measured = volume.values_ZYX > volume.values_ZYX.min()
    measured[:, 1:-1] &= measured[:, :-2] & measured[:, 2:]  # the border is mixed with what was not measured
    measured[:, [0, -1]] = False
    assert measured.mean() > 0.8
    assert np.abs(volume.values_ZYX - true)[measured].max() < 1.5  # half a unit of rounding, and the interpolation


def test_the_straightened_series_agrees_with_the_tilt_correction_of_dcm2niix(tmp_path: Path) -> None:
    folder = tilted_ct(tmp_path / "tilted")
    images = dcm2niix(folder, tmp_path / "nii")
    (nifti,) = (image for name, image in images.items() if "Tilt" in name)
    volume = only_volume(read_folder(folder, correct_tilt=True))
    theirs = np.asarray(nifti.dataobj, dtype=np.float64)
    index = np.indices(theirs.shape).reshape(3, -1)
    mm_RAS = nifti.affine @ np.vstack([index, np.ones(index.shape[1])])
    z, y, x = (np.linalg.inv(RAS_OF_LPS @ volume.affine) @ mm_RAS)[:3]
    assert np.abs(z - np.round(z)).max() < 0.01  # the same slices
    inside = (y > 16) & (y < volume.values_ZYX.shape[1] - 17) & (x > 1) & (x < volume.values_ZYX.shape[2] - 2)
    low = np.floor(y).astype(int)
    part = y - low
    column = np.round(x).astype(int)
    assert np.abs(x - column).max() < 0.01

    def ours(row: NDArray[np.int64]) -> NDArray[np.float64]:
        return volume.values_ZYX[np.round(z).astype(int)[inside], row[inside], column[inside]].astype(np.float64)

    here = ours(low) * (1 - part[inside]) + ours(low + 1) * part[inside]
    assert inside.sum() > 5000
    assert np.abs(here - theirs.ravel()[inside]).max() < 3


# --- pydicom's files, decoded by GDCM


def described(path: Path) -> Layout | None:
    try:
        with quiet():
            dataset, element = read_header(path, None)
            return layout_of(dataset, element)
    except Exception:
        return None


def test_the_stored_values_of_all_files_of_pydicom_are_those_of_pydicom_or_gdcm() -> None:
    """137 files; where pydicom alone cannot decode one, GDCM (SimpleITK) is asked."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    agreed, refused = {"pydicom": 0, "SimpleITK": 0}, []
    for name in map(str, files(PYDICOM)):
        layout = described(Path(name))
        if layout is None:
            continue
        try:
            with quiet():
                ours = list(stored_frames(Path(name), layout, range(min(layout.frames, 2))))
        except Refusal:
            refused.append(Path(name).name)
            continue
        try:
            with quiet():
                theirs, by = [pixel_array(name, index=index) for index in range(len(ours))], "pydicom"
        except Exception:
            image = sitk.ReadImage(name)
            values, by = sitk.GetArrayFromImage(image), "SimpleITK"
            header = pydicom.dcmread(name)
            values = (values - float(header.get("RescaleIntercept") or 0)) / float(header.get("RescaleSlope") or 1)
            theirs = [values.reshape(layout.frames, *ours[0].shape)[index] for index in range(len(ours))]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        agreed[by] += 1
    assert agreed["pydicom"] >= 55
    assert agreed["SimpleITK"] >= 4
    assert refused == ["JPEG2000-embedded-sequence-delimiter.dcm"]  # its pixels are a made-up byte sequence
