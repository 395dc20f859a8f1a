"""One series, several stacks: what is divided, what is joined, and what is refused because it could be either."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from common.imaging import FolderReading, RefusalCode, Volume, read_folder
from common.imaging.header import Header, scan
from common.imaging.series import stacks
from tests.common.test_imaging_hostile import all_refused, ct, hu, one_volume, pixels, radiograph, write

MR = {"sop_class": uid.MRImageStorage, "modality": "MR"}


def at(z: int, repeat: int, mm: tuple[float, float, float] | None = None, **more: Any) -> Dataset:
    """Slice z of one of several stacks that cover the same place; its pixels name the stack and the slice."""
    stored = pixels(z) + np.uint16(1000 * repeat)
    return ct(z, name=f"{repeat}.", mm=mm or (0, 0, 2.0 * z), stored=stored, RescaleSlope=1, RescaleIntercept=0, **more)


def stacks_of(reading: FolderReading) -> dict[int, int]:
    """Stack -> number of slices; every volume holds slices of one stack alone, in order."""
    found = {}
    for volume in reading.volumes:
        first = volume.values_ZYX[:, 0, 0]
        (repeat,) = set((first // 1000).tolist())
        assert np.diff(first).tolist() == [100.0] * (len(first) - 1)
        found[int(repeat)] = len(first)
    return found


# --- repeats of one place


@pytest.mark.parametrize(
    ("what", "tags"),
    [
        ("functional MR", lambda k: {"TemporalPositionIdentifier": k, "AcquisitionTime": f"12{k:02}00"}),
        ("dual echo", lambda k: {"EchoTime": 2.3 * k, "EchoNumbers": k}),
        ("diffusion", lambda k: {"DiffusionBValue": 500.0 * k}),
        ("directions", lambda k: {"DiffusionBValue": 1000.0, "DiffusionGradientOrientation": [1.0 / k, 0.0, 0.0]}),
        ("older Siemens diffusion", lambda k: {"SequenceName": f"*ep_b{500 * k}t"}),
        ("perfusion", lambda k: {"AcquisitionNumber": k, "AcquisitionTime": f"1200{k:02}"}),
        ("cardiac CT", lambda k: {"NominalPercentageOfCardiacPhase": 10.0 * k}),
        ("inversion", lambda k: {"InversionTime": 100.0 * k}),
        ("dynamic PET", lambda k: {"FrameReferenceTime": 1000.0 * k}),
    ],
)
def test_a_series_of_several_times_echoes_or_b_values_becomes_one_volume_each(
    tmp_path: Path, what: str, tags: Callable[[int], dict[str, Any]]
) -> None:
    reading = read_folder(write(tmp_path, *(at(z, k, **tags(k)) for z in (2, 0, 3, 1) for k in (3, 1, 2))))
    assert reading.refused == ()
    assert stacks_of(reading) == {1: 4, 2: 4, 3: 4}


@pytest.mark.parametrize(
    "tag", [(0x00190010, "SIEMENS MR HEADER", 0x0C), (0x00430010, "GEMS_PARM_01", 0x39), (0x20010010, "Philips DD", 3)]
)
def test_private_b_values_divide_a_series(tmp_path: Path, tag: tuple[int, str, int]) -> None:
    creator, name, element = tag
    slices = []
    for z in range(3):
        for k in (1, 2):
            made = at(z, k)
            made.add_new(creator, "LO", name)
            made.add_new((creator & 0xFFFF0000) | 0x1000 | element, "IS", str(500 * k))
            slices.append(made)
    reading = read_folder(write(tmp_path, *slices))
    assert (reading.refused, stacks_of(reading)) == ((), {1: 3, 2: 3})


def test_echoes_at_several_times_are_told_apart_although_another_number_differs_from_slice_to_slice(
    tmp_path: Path,
) -> None:
    slices = [
        at(z, 2 * t + e, EchoTime=10.0 + e, TemporalPositionIdentifier=t, TriggerTime=float(7 * z + t))
        for z in range(3) for t in range(2) for e in range(2)
    ]  # fmt: skip
    reading = read_folder(write(tmp_path, *slices))
    assert (reading.refused, stacks_of(reading)) == ((), {0: 3, 1: 3, 2: 3, 3: 3})


def test_an_aborted_last_repeat_is_refused_and_the_whole_ones_are_read(tmp_path: Path) -> None:
    slices = [at(z, t, TemporalPositionIdentifier=t) for t in range(3) for z in range(4 if t < 2 else 3)]
    reading = read_folder(write(tmp_path, *slices))
    assert stacks_of(reading) == {0: 4, 1: 4}
    assert [refused.code for refused in reading.refused] == [RefusalCode.INCOMPLETE] * 3


def test_repeats_are_compared_in_slices_and_not_in_the_last_digits_of_their_positions(tmp_path: Path) -> None:
    z_mm = {0: (0, 2, 4, 6), 1: (1e-4, 2, 4, 6 - 1e-4), 2: (-1e-4, 2, 4)}  # the last one was aborted
    slices = [at(z, k, mm=(0, 0, mm), AcquisitionNumber=k) for k, each in z_mm.items() for z, mm in enumerate(each)]
    reading = read_folder(write(tmp_path, *slices))
    assert stacks_of(reading) == {0: 4, 1: 4}
    assert [refused.code for refused in reading.refused] == [RefusalCode.INCOMPLETE] * 3


def test_a_shorter_stack_with_other_distances_is_no_aborted_repeat(tmp_path: Path) -> None:
    thin = [at(z, 0, mm=(0, 0, 2.0 * z), AcquisitionNumber=0) for z in range(8)]
    thick = [at(z, 1, mm=(0, 0, 4.0 * z), AcquisitionNumber=1) for z in range(3)]
    assert stacks_of(read_folder(write(tmp_path, *thin, *thick))) == {0: 8, 1: 3}


def test_repeats_with_a_tilted_gantry_are_refused_for_their_tilt_and_read_where_it_is_corrected(tmp_path: Path) -> None:
    slices = [at(z, k, mm=(0, 0.5 * z, 2.0 * z), AcquisitionNumber=k) for k in range(2) for z in range(4)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.TILT}
    assert len(read_folder(tmp_path, correct_tilt=True).volumes) == 2


def test_a_tilt_of_50_degrees_is_none_of_a_gantry(tmp_path: Path) -> None:
    write(tmp_path, *(ct(z, mm=(0, 2.4 * z, 2.0 * z)) for z in range(4)))
    assert all_refused(read_folder(tmp_path, correct_tilt=True)) == {RefusalCode.TILT}
    assert "which no gantry does" in read_folder(tmp_path, correct_tilt=True).refused[0].why


def test_what_counts_against_the_memory_is_the_straightened_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *(ct(z, mm=(0, 0.5 * z, 2.0 * z)) for z in range(4)))
    volume = one_volume(read_folder(tmp_path, correct_tilt=True))
    assert volume.values_ZYX.shape == (4, 6 + 3, 4)  # 0.5 mm a slice are one row
    monkeypatch.setattr("common.imaging.volume.MAX_FILE_BYTES", volume.values_ZYX.nbytes - 1)
    assert all_refused(read_folder(tmp_path, correct_tilt=True)) == {RefusalCode.TOO_LARGE}


def test_a_repeat_that_lost_a_slice_inside_refuses_the_series(tmp_path: Path) -> None:
    slices = [at(z, t, TemporalPositionIdentifier=t) for t in range(3) for z in range(5) if (t, z) != (1, 2)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.GAP}


# --- stations


def test_stations_beside_each_other_are_told_apart_by_where_they_lie(tmp_path: Path) -> None:
    """A coronal spine: the stations differ in height, which is within the plane of the slices."""
    coronal = [1, 0, 0, 0, 0, -1]
    slices = [
        at(y, k, mm=(0, 2.0 * y, -100.0 * k), ImageOrientationPatient=coronal) for y in (1, 0, 2) for k in range(3)
    ]
    reading = read_folder(write(tmp_path, *slices))
    assert reading.refused == ()
    heights = {int(v.values_ZYX[0, 0, 0] // 1000): round(v.affine[2, 3]) for v in reading.volumes}
    assert heights == {0: 0, 1: -100, 2: -200}


def test_overlapping_stations_are_one_volume_each(tmp_path: Path) -> None:
    slices = [at(z, k, mm=(0, 0, 2.0 * z + 5 * k), AcquisitionNumber=k) for k in range(2) for z in range(4)]
    assert stacks_of(read_folder(write(tmp_path, *slices))) == {0: 4, 1: 4}


def test_stations_that_share_one_plane_overlap(tmp_path: Path) -> None:
    slices = [at(z, k, mm=(0, 0, 2.0 * z + 6 * k), AcquisitionNumber=k) for k in range(2) for z in range(4)]
    assert stacks_of(read_folder(write(tmp_path, *slices))) == {0: 4, 1: 4}


def test_stations_half_a_pixel_beside_each_other_are_two(tmp_path: Path) -> None:
    slices = [at(z, k, mm=(0.25 * k, 0, 2.0 * z)) for z in range(3) for k in range(2)]  # a pixel has 0.5 mm
    assert stacks_of(read_folder(write(tmp_path, *slices))) == {0: 3, 1: 3}


def test_stations_with_room_between_them_are_a_gap(tmp_path: Path) -> None:
    """Nothing tells them from one stack that lost slices in its middle."""
    slices = [at(z, k, mm=(0, 0, 2.0 * z + 20 * k), AcquisitionNumber=k) for k in range(2) for z in range(4)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.GAP}


# --- slices of one stack that differ


@pytest.mark.parametrize("odd", [0, 2, 4])
@pytest.mark.parametrize(
    "different",
    [
        {"stored": np.zeros((8, 8), "<u2")},
        {"stored": np.zeros((3, 2), "<u2"), "PixelSpacing": [1.0, 1.6]},
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
    ],
)
def test_a_slice_of_another_size_or_kind_refuses_the_stack_wherever_it_lies(
    tmp_path: Path, odd: int, different: dict[str, Any]
) -> None:
    slices = [ct(z, **(different if z == odd else {})) for z in range(5)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.MIXED_SLICES}


@pytest.mark.parametrize("other", [MR, {"FrameOfReferenceUID": "1.2.3.6"}])
def test_slices_of_another_machine_or_frame_of_reference_are_never_stacked_on_these(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    slices = [at(z, z // 3, **(other if z > 2 else {})) for z in range(6)]
    assert stacks_of(read_folder(write(tmp_path, *slices))) == {0: 3, 1: 3}


def test_an_odd_slice_at_the_end_of_a_tilted_stack_refuses_it(tmp_path: Path) -> None:
    slices = [ct(z, mm=(0, 0.5 * z, 2.0 * z), ImageType=["DERIVED" if z == 4 else "ORIGINAL"]) for z in range(5)]
    write(tmp_path, *slices)
    for correct_tilt in (False, True):
        assert all_refused(read_folder(tmp_path, correct_tilt=correct_tilt)) == {RefusalCode.MIXED_SLICES}


def test_interleaved_sizes_are_not_two_half_as_dense_volumes(tmp_path: Path) -> None:
    slices = [ct(z, **({"stored": np.zeros((8, 8), "<u2")} if z % 2 else {})) for z in range(6)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.MIXED_SLICES}


def test_counts_and_concentrations_of_pet_are_never_stacked_on_each_other(tmp_path: Path) -> None:
    pet = {"sop_class": uid.PositronEmissionTomographyImageStorage, "modality": "PT"}
    slices = [at(z, k, Units=unit, **pet) for z in range(3) for k, unit in enumerate(("BQML", "CNTS"))]
    assert stacks_of(read_folder(write(tmp_path, *slices))) == {0: 3, 1: 3}


# --- numbers that say nothing


@pytest.mark.parametrize(
    "number", [lambda z: None, lambda z: 1, lambda z: 9 - z, lambda z: (z * 3) % 5, lambda z: 10 * z]
)
def test_instance_numbers_absent_equal_reversed_or_shuffled_change_nothing(
    tmp_path: Path, number: Callable[[int], int | None]
) -> None:
    volume = one_volume(read_folder(write(tmp_path, *(ct(z, InstanceNumber=number(z)) for z in (3, 1, 4, 0, 2)))))
    np.testing.assert_array_equal(volume.values_ZYX, np.stack([hu(z) for z in range(5)]))


# --- even distances that are too large


@pytest.mark.parametrize(
    ("known", "code"),
    [
        ({"SliceThickness": 2}, None),
        ({"SliceThickness": None, "SpacingBetweenSlices": 2}, None),
        ({"SliceThickness": 1, "SpacingBetweenSlices": 2}, None),
        ({"SliceThickness": 1}, RefusalCode.GAP),
        ({"SliceThickness": None}, RefusalCode.GAP),
        ({"SliceThickness": 2, "SpacingBetweenSlices": 1}, RefusalCode.GAP),
    ],
)
def test_two_slices_are_a_volume_only_where_the_header_says_that_none_is_between(
    tmp_path: Path, known: dict[str, Any], code: RefusalCode | None
) -> None:
    reading = read_folder(write(tmp_path, *(ct(z, **known) for z in range(2))))
    assert {refused.code for refused in reading.refused} == ({code} if code else set())
    assert len(reading.volumes) == (code is None)


def test_a_stack_of_every_second_slice_is_a_gap_where_the_header_knows_better(tmp_path: Path) -> None:
    slices = [ct(z, SpacingBetweenSlices=2, SliceThickness=2) for z in range(0, 10, 2)]
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.GAP}
    assert "2 times" in read_folder(tmp_path).refused[0].why


def test_a_distance_in_the_header_of_which_the_true_one_is_no_multiple_says_nothing(tmp_path: Path) -> None:
    slices = [ct(z, SpacingBetweenSlices=1.3, SliceThickness=2) for z in range(5)]  # 2 mm apart
    assert one_volume(read_folder(write(tmp_path, *slices))).spacing_mm[0] == 2


# --- MR, NM and films


def test_an_inverted_slice_with_a_scale_of_its_own_is_refused(tmp_path: Path) -> None:
    plain = [ct(z, PhotometricInterpretation="MONOCHROME1", RescaleSlope=1, RescaleIntercept=0, **MR) for z in range(2)]
    volume = one_volume(read_folder(write(tmp_path / "plain", *plain)))
    np.testing.assert_array_equal(volume.values_ZYX[0], 65535 - pixels(0).astype(np.float32))
    scaled = [ct(z, PhotometricInterpretation="MONOCHROME1", RescaleSlope=z + 1, **MR) for z in range(2)]
    assert all_refused(read_folder(write(tmp_path / "scaled", *scaled))) <= {
        RefusalCode.UNSUPPORTED_PIXELS,
        RefusalCode.INCOMPLETE,
    }


def nuclear(kind: str, frames: int = 4, **more: Any) -> Dataset:
    stored = np.stack([pixels(z) for z in range(frames)])
    made = radiograph(
        stored[0], sop_class=uid.NuclearMedicineImageStorage, modality="NM", ImageType=["ORIGINAL", "PRIMARY", kind],
        NumberOfFrames=frames, PixelSpacing=[4.0, 3.0], **more,
    )  # fmt: skip
    made.PixelData = stored.tobytes()
    return made


def head(z_mm: float) -> Dataset:
    made = Dataset()
    made.ImagePositionPatient, made.ImageOrientationPatient = [10, 20, z_mm], [1, 0, 0, 0, 1, 0]
    return made


def reconstruction(**more: Any) -> Dataset:
    geometry = {
        "DetectorInformationSequence": [head(30)], "FrameIncrementPointer": 0x00540080, "SliceVector": [1, 2, 3, 4],
        "NumberOfSlices": 4, "SpacingBetweenSlices": -5.0,
    }  # fmt: skip
    return nuclear("RECON TOMO", **{**geometry, **more})


def test_a_reconstruction_of_nuclear_medicine_is_a_volume_in_the_direction_of_its_sign(tmp_path: Path) -> None:
    volume = one_volume(read_folder(write(tmp_path, reconstruction())))
    # -5 mm: slice 4 lies lowest, at z = 30 - 15, and comes first
    assert volume.values_ZYX[:, 0, 0].tolist() == [300, 200, 100, 0]
    assert volume.affine @ [1, 2, 3, 1] == pytest.approx([10 + 9, 20 + 8, 20, 1])


def test_a_coronal_reconstruction_is_stacked_along_its_own_normal(tmp_path: Path) -> None:
    coronal = head(30)
    coronal.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]  # x cross -z = y: the second slice lies behind the first
    made = reconstruction(DetectorInformationSequence=[coronal], SpacingBetweenSlices=5)
    volume = one_volume(read_folder(write(tmp_path, made)))
    assert volume.values_ZYX[:, 0, 0].tolist() == [0, 100, 200, 300]
    assert volume.affine @ [3, 0, 0, 1] == pytest.approx([10, 20 + 15, 30, 1])


@pytest.mark.parametrize(
    "lack", [{"SliceVector": None}, {"SpacingBetweenSlices": None}, {"DetectorInformationSequence": []},
             {"DetectorInformationSequence": [head(30), head(31)]}, {"DetectorInformationSequence": [Dataset()]},
             {"SliceVector": [1, 2, 3]}, {"FrameIncrementPointer": [0x00540070, 0x00540080]}]
)  # fmt: skip
def test_a_reconstruction_without_its_geometry_is_refused(tmp_path: Path, lack: dict[str, Any]) -> None:
    assert all_refused(read_folder(write(tmp_path, reconstruction(**lack)))) == {RefusalCode.MISSING_GEOMETRY}


def test_a_static_scintigram_is_an_image_and_a_moving_one_is_refused(tmp_path: Path) -> None:
    (image,) = read_folder(write(tmp_path / "static", nuclear("STATIC", 1))).images
    assert (image.spacing_mm, image.values_YX.max()) == ((4.0, 3.0), 23)
    for kind in ("DYNAMIC", "GATED", "TOMO", "RECON GATED TOMO"):
        assert all_refused(read_folder(write(tmp_path / kind, nuclear(kind)))) == {RefusalCode.CINE}


@pytest.mark.parametrize(
    ("code", "sop_class"),
    [
        (RefusalCode.CINE, uid.UltrasoundMultiFrameImageStorage),
        (RefusalCode.CINE, uid.XRayAngiographicImageStorage),
        (RefusalCode.UNSUPPORTED_CLASS, uid.BreastTomosynthesisImageStorage),
        (RefusalCode.UNSUPPORTED_CLASS, uid.EnhancedUSVolumeStorage),
        (RefusalCode.DOCUMENT, uid.TwelveLeadECGWaveformStorage),
        (RefusalCode.DOCUMENT, uid.EncapsulatedPDFStorage),
        (RefusalCode.RADIOTHERAPY, uid.RTStructureSetStorage),
        (RefusalCode.RADIOTHERAPY, uid.RTPlanStorage),
        (RefusalCode.SEGMENTATION, uid.SegmentationStorage),
        (RefusalCode.REPORT, uid.EnhancedSRStorage),
        (RefusalCode.UNSUPPORTED_CLASS, "1.3.12.2.1107.5.9.1"),
    ],
)
def test_what_is_no_image_or_a_film_is_refused_by_its_name(tmp_path: Path, code: RefusalCode, sop_class: str) -> None:
    made = nuclear("STATIC", 4)
    made.SOPClassUID = sop_class
    assert all_refused(read_folder(write(tmp_path, made))) == {code}


# --- the tree


def test_a_loop_of_links_a_device_and_a_path_that_is_too_long_are_refused_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "memory").symlink_to("/proc/self/mem")  # a regular file that gives an input/output error
    handle = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("x" * 200, dir_fd=handle)
        inner = os.open("x" * 200, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    write(tmp_path / "read", ct(0), ct(1))
    reading = read_folder(tmp_path)
    assert len(reading.volumes) == 1
    assert {refused.code for refused in reading.refused} == {RefusalCode.UNREADABLE}
    assert len(reading.refused) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", ct(0), ct(1), ct(2))
    (tmp_path / "in" / "002.dcm").chmod(0)
    write(tmp_path / "closed", ct(0)).chmod(0)
    reading = read_folder(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert [refused.code for refused in reading.refused] == [RefusalCode.UNREADABLE] * 2


def test_file_names_in_any_script_or_in_none_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "Patiënt 名前 אב", ct(0), ct(1), ct(2))
    (folder / "000.dcm").rename(folder / "Ünï 🩻")
    (folder / "001.dcm").rename(folder / os.fsdecode(b"\xff\xfe\n.dcm"))
    (folder / "002.dcm").rename(folder / ("x" * 255))
    volume: Volume = one_volume(read_folder(tmp_path))
    assert {os.fsencode(path.name)[:2] for path in volume.source.files} == {"Ü".encode(), b"\xff\xfe", b"xx"}


def test_archives_pictures_and_other_junk_are_no_dicom(tmp_path: Path) -> None:
    heads = (
        b"PK\x03\x04",
        b"\x1f\x8b\x08",
        b"\x89PNG\r\n",
        b"\xff\xd8\xff\xe0",
        b"%PDF-1.7",
        b"MZ",
        b"\x7fELF",
        b'{"a"',
    )
    for number, head in enumerate(heads):
        (tmp_path / f"{number}.dcm").write_bytes(head + np.random.default_rng(number).bytes(400))
    assert all_refused(read_folder(tmp_path)) == {RefusalCode.NOT_DICOM}


@pytest.mark.parametrize(
    "odd", [{"PhotometricInterpretation": "MONOCHROME2"}, {"BitsStored": 16, "HighBit": 15}, {"PixelRepresentation": 1}]
)
def test_slices_that_are_inverted_in_different_ranges_are_no_stack(tmp_path: Path, odd: dict[str, Any]) -> None:
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}
    made = [at(z, 0, **MR, **inverted) for z in range(3)]
    assert one_volume(read_folder(write(tmp_path / "alike", *made))).values_ZYX[0, 0, 0] == 4095 - pixels(0)[0, 0]
    # a stored 0 would be 4095 in one slice, and 0, 65535 or -1 in another
    made[2] = at(2, 0, **MR, **{**inverted, **odd})
    assert all_refused(read_folder(write(tmp_path / "odd", *made))) == {RefusalCode.MIXED_SLICES}


def test_thousands_of_frames_with_an_orientation_each_are_told_apart(tmp_path: Path) -> None:
    (path,) = write(tmp_path, ct(0)).iterdir()
    one = scan(path)
    assert isinstance(one, Header)
    axes_N33, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3000, 3, 3)))
    turned = [replace(one, orientation=tuple(axes_33[:2].ravel().tolist())) for axes_33 in axes_N33]
    assert len(list(stacks(turned, whole=True))) == 3000
