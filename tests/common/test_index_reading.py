"""What is read through the index is, byte for byte, what is read without it."""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from common.errors import ConfigError
from common.imaging import Image, Refused, Volume, fastread, volume
from common.imaging.fastread import iterate_folder, read_folder
from common.imaging.index import Index
from common.imaging.refusal import RefusalCode
from tests.common.test_imaging_hostile import dataset

DATA = Path(os.environ.get("FEDICOM_DATA", Path(__file__).parents[3] / "shared" / "data")) / "dicom"
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"
SHAPE = 6, 5
SLICES = 5

Change = Callable[[Dataset, int], object]


def ct(z: int, syntax: str = ExplicitVRLittleEndian, dtype: str = "<i2") -> Dataset:
    """A slice with every stored value that its 30 pixels can hold far apart, unused bits included."""
    size = SHAPE[0] * SHAPE[1] * np.dtype(dtype).itemsize
    stored = np.random.default_rng(z).integers(0, 256, size, np.uint8).view(dtype).reshape(SHAPE)
    made = dataset(
        stored, f"1.2.3.{z + 1}", PatientID="MRN-7", AcquisitionTime=f"1200{z:02d}.5", RescaleSlope="1",
        RescaleIntercept="-1024", ImagePositionPatient=[0.0, 0.0, 2.5 * z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[0.5, 0.5],
    )  # fmt: skip
    made.file_meta.TransferSyntaxUID = syntax
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID  # some lose their own
    return made


def write(folder: Path, *slices: Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for at, made in enumerate(slices):
        made.save_as(folder / f"{at:03d}.dcm", enforce_file_format=True)
    time.sleep(0.03)
    return folder


def bits(stored: int) -> Change:
    def change(made: Dataset, _: int) -> None:
        made.BitsStored, made.HighBit = stored, stored - 1

    return change


def mr(made: Dataset) -> None:
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = MRImageStorage
    made.Modality = "MR"


def table(made: Dataset, _: int) -> None:
    item = Dataset()
    item.LUTDescriptor, item.LUTData, item.ModalityLUTType = [4, 0, 16], [9, 8, 7, 6], "US"
    item["LUTDescriptor"].VR = "US"
    item["LUTData"].VR = "US"
    made.ModalityLUTSequence = Sequence([item])
    del made.RescaleSlope, made.RescaleIntercept


def nested(made: Dataset, _: int) -> None:
    """A sequence of undefined length before the pixels, as many archives write them."""
    inner, outer = Dataset(), Dataset()
    inner.CodeValue = "1"
    outer.PurposeOfReferenceCodeSequence = Sequence([inner])
    outer["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    made.ReferencedImageSequence = Sequence([outer, outer])
    made["ReferencedImageSequence"].is_undefined_length = True


def compressed(syntax: str, encode: Callable[[Any], bytes], harm: int | None = None) -> Change:
    """Compressed pixels; `harm`: the slice whose second half is missing."""

    def change(made: Dataset, z: int) -> None:
        kind = np.dtype(f"<{'i' if made.PixelRepresentation else 'u'}{made.BitsAllocated // 8}")
        frame = encode(np.frombuffer(made.PixelData, kind).reshape(SHAPE))
        made.file_meta.TransferSyntaxUID = syntax
        made.PixelData = encapsulate([bytes(frame[: len(frame) // 2] if z == harm else frame)])
        made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True

    return change


def rle(pixels: Any) -> bytes:
    """Both bytes of every pixel in segments of literal runs. Source: DICOM PS3.5 G."""
    planes = [bytes(pixels.view(np.uint8).reshape(-1)[at::2]) for at in (1, 0)]
    segments = [bytes([len(plane) - 1]) + plane for plane in planes]
    segments = [segment + b"\0" * (len(segment) % 2) for segment in segments]
    offsets = [2, 64, 64 + len(segments[0]), *[0] * 13]
    return b"".join([*(offset.to_bytes(4, "little") for offset in offsets), *segments])


def values(**elements: Any) -> Change:
    def change(made: Dataset, z: int) -> None:
        for name, value in elements.items():
            setattr(made, name, value(z) if callable(value) else value)

    return change


def text(keyword: str, vr: str, value: int) -> Change:
    def change(made: Dataset, _: int) -> None:
        made.add_new(keyword, vr, value)

    return change


SERIES: dict[str, tuple[dict[str, Any], Change]] = {
    "signed 16 bits": ({}, values()),
    "unsigned 16 bits": ({"dtype": "<u2"}, values()),
    "unsigned 8 bits": ({"dtype": "|u1"}, values()),
    "signed 8 bits": ({"dtype": "|i1"}, values()),
    "12 of 16 bits, rubbish above": ({"dtype": "<u2"}, bits(12)),
    "12 of 16 bits, signed": ({}, bits(12)),
    "5 of 8 bits, signed": ({"dtype": "|i1"}, bits(5)),
    "implicit VR": ({"syntax": ImplicitVRLittleEndian}, values()),
    "big endian": ({"syntax": ExplicitVRBigEndian}, values()),
    "fractional slope": ({}, values(RescaleSlope="1.25", RescaleIntercept="-0.1")),
    "slope of each slice": ({}, values(RescaleSlope=lambda z: f"{0.1 + z / 7:.6f}", Modality="PT")),
    "whole slope": ({"dtype": "<u2"}, values(RescaleSlope="-3", RescaleIntercept="0")),
    "slope too large for float32": ({"dtype": "<u2"}, values(RescaleSlope="257", RescaleIntercept="1")),
    "absurd slope": ({}, values(RescaleSlope="1E300")),
    "no slope": ({}, lambda made, _: (made.pop("RescaleSlope"), made.pop("RescaleIntercept"))),
    "no slope, MR": ({}, lambda made, _: (made.pop("RescaleSlope"), made.pop("RescaleIntercept"), mr(made))),
    "no slope in one slice": ({}, lambda made, z: z == 2 and (made.pop("RescaleSlope"), made.pop("RescaleIntercept"))),
    "slope without intercept, MR": ({}, lambda made, _: (made.pop("RescaleIntercept"), mr(made))),
    "empty slope": ({}, values(RescaleSlope="", RescaleIntercept="")),
    "slope 0": ({}, values(RescaleSlope="0")),
    "table": ({}, table),
    "padding": ({}, lambda made, z: made.add_new("PixelPaddingValue", "SS", int(stored(z)[3]))),
    "padding written unsigned": (
        {}, lambda made, z: made.add_new("PixelPaddingValue", "US", int(stored(z)[3]) % 65536),
    ),
    "padding, implicit VR": (
        {"syntax": ImplicitVRLittleEndian}, lambda made, z: made.add_new("PixelPaddingValue", "SS", int(stored(z)[3])),
    ),
    "padding that does not occur": ({}, text("PixelPaddingValue", "SS", -32768)),
    "padding beyond the pixels' range": ({"dtype": "<u2"}, lambda made, _: made.add_new("PixelPaddingValue", "SS", -5)),
    "padding range": (
        {}, lambda made, _: (text("PixelPaddingValue", "SS", -32768)(made, 0),
                             text("PixelPaddingRangeLimit", "SS", -20000)(made, 0)),
    ),
    "padding range, written backwards": (
        {}, lambda made, _: (text("PixelPaddingValue", "SS", -20000)(made, 0),
                             text("PixelPaddingRangeLimit", "SS", -32768)(made, 0)),
    ),
    "padding only in one slice": (
        {}, lambda made, z: (text("PixelPaddingValue", "SS", -32768)(made, 0),
                             z == 1 and setattr(made, "PixelData", b"\0\x80" * (len(made.PixelData) // 2))),
    ),
    "padding only": (
        {}, lambda made, _: (text("PixelPaddingValue", "SS", -32768)(made, 0),
                             text("PixelPaddingRangeLimit", "SS", 32767)(made, 0)),
    ),
    "MONOCHROME1": ({}, values(PhotometricInterpretation="MONOCHROME1")),
    "MONOCHROME1 of MR": ({}, values(PhotometricInterpretation="MONOCHROME1", Modality="MR",
                                     SOPClassUID="1.2.840.10008.5.1.4.1.1.4")),
    "one frame": ({}, values(NumberOfFrames="1")),
    "nested sequence": ({}, nested),
    "nested sequence, implicit VR": ({"syntax": ImplicitVRLittleEndian}, nested),
    "odd length": ({"dtype": "|u1"}, lambda made, _: values(Rows=5, Columns=5, PixelData=made.PixelData[:25])(made, 0)),
    "more pixels than declared": ({}, lambda made, _: values(PixelData=made.PixelData + b"\0\0")(made, 0)),
    "trailing padding": ({}, lambda made, _: made.add_new(0xFFFCFFFC, "OB", b"\0" * 10)),
    "fewer pixels than declared": ({}, lambda made, z: z == 2 and values(PixelData=made.PixelData[:-2])(made, 0)),
    "reversed": ({}, values(ImagePositionPatient=lambda z: [0, 0, -2.5 * z])),
    "gap": ({}, values(ImagePositionPatient=lambda z: [0, 0, 2.5 * (z + (z > 2))])),
    "doubled slice": ({}, values(ImagePositionPatient=lambda z: [0, 0, 2.5 * min(z, 3)])),
    "tilt": ({}, values(ImagePositionPatient=lambda z: [0, 0.7 * z, 2.5 * z])),
    "JPEG-LS": ({"dtype": "<u2"}, compressed(JPEGLSLossless, imagecodecs.jpegls_encode)),
    "JPEG-LS, 8 bits": ({"dtype": "|u1"}, compressed(JPEGLSLossless, imagecodecs.jpegls_encode)),
    "HTJ2K, signed": ({}, compressed(HTJ2KLossless, partial(imagecodecs.htj2k_encode, reversible=True))),
    "RLE": ({}, compressed(RLELossless, rle)),
    "RLE, 12 bits, rubbish above": ({}, lambda made, z: (bits(12)(made, z), compressed(RLELossless, rle)(made, z))),
    "RLE, padding": (
        {}, lambda made, z: (made.add_new("PixelPaddingValue", "SS", int(stored(z)[3])),
                             compressed(RLELossless, rle)(made, z)),
    ),
    "JPEG-LS, one slice cut off": ({"dtype": "<u2"}, compressed(JPEGLSLossless, imagecodecs.jpegls_encode, harm=2)),
    "wrong transfer syntax": ({"dtype": "<u2"}, compressed(HTJ2KLossless, imagecodecs.jpegls_encode)),
    "two patients": ({}, values(PatientID=lambda z: f"MRN-{z // 3}")),
    "two sizes": ({}, lambda made, z: z == 4 and values(Rows=3, Columns=10)(made, 0)),
    "one image twice": ({}, values(SOPInstanceUID=lambda z: f"1.2.3.{max(z, 1)}")),
    "no position": ({}, lambda made, z: z == 1 and made.pop("ImagePositionPatient")),
    "position no number": ({}, lambda made, _: made.add_new("ImagePositionPatient", "LO", "a\\b\\c")),
    "localizer": ({}, values(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    "text in the pixels": ({}, values(BurnedInAnnotation="YES")),
    "no identifier": ({}, lambda made, z: z == 0 and made.pop("SOPInstanceUID")),
}  # fmt: skip


def stored(z: int) -> np.ndarray:
    return np.frombuffer(ct(z).PixelData, "<i2")


def series(folder: Path, name: str) -> Path:
    kwargs, change = SERIES[name]
    made = [ct(z, **kwargs) for z in range(SLICES)]
    for z, each in enumerate(made):
        change(each, z)
    return write(folder, *made)


def same(one: object, other: object) -> bool:
    if isinstance(one, Volume) and isinstance(other, Volume):
        pixels = one.values_ZYX.tobytes() == other.values_ZYX.tobytes()
        return pixels and one.affine.tobytes() == other.affine.tobytes() and one.source == other.source
    if isinstance(one, Image) and isinstance(other, Image):
        pixels = one.values_YX.tobytes() == other.values_YX.tobytes()
        return pixels and one.spacing_mm == other.spacing_mm and one.source == other.source
    return one == other


def differences(root: Path, cache: Path, **kwargs: Any) -> Iterator[str]:
    """How reading with a new, a known and no index differs from reading without one."""
    expected = list(volume.iterate_folder(root, **kwargs))
    for how in ("new", "known", "none"):
        with Index(root, cache) as index:
            given = None if how == "none" else index
            found = list(iterate_folder(root, index=given, jobs=2 if how == "known" else 1, **kwargs))
        for one, other in itertools.zip_longest(expected, found):
            if not same(one, other):
                yield f"{how} index: expected {one}, got {other}"


@pytest.mark.parametrize("name", SERIES)
def test_a_series_is_the_same_with_and_without_index(tmp_path: Path, name: str) -> None:
    root = series(tmp_path / "dicom", name)
    assert list(differences(root, tmp_path / "cache")) == []


@pytest.mark.parametrize(
    "item",
    [
        b"\x08\x00\x50\x11UI\xa0\x0f1.2\0",  # longer than its item
        b"\x08\x00\x50\x11OB\0\0\xff\xff\xff\xffabcd",  # without an end
        b"\x08\x00\x50\x11??\x04\x001.2\0",  # of no VR
        b"\x08\x00\x50\x11U",
    ],
)
def test_a_sequence_whose_item_is_damaged_is_refused_with_and_without_index(tmp_path: Path, item: bytes) -> None:
    """Nobody needs the sequence and its length is right, but the file is damaged."""
    root = write(tmp_path / "dicom", *(ct(z) for z in range(SLICES)))
    for file in root.iterdir():
        inside = item if file.name == "003.dcm" else b"\x08\x00\x50\x11UI\x04\x001.2\0"
        framed = b"\xfe\xff\x00\xe0" + len(inside).to_bytes(4, "little") + inside
        sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + framed + b"\xfe\xff\xdd\xe0\0\0\0\0"
        content = file.read_bytes()
        at = content.index(b"\x10\x00\x20\x00LO")
        file.write_bytes(content[:at] + sequence + content[at:])
    time.sleep(0.03)
    assert list(differences(root, tmp_path / "cache")) == []
    codes = {found.path.name: found.code for found in read_folder(root).refused}
    assert codes["003.dcm"] == RefusalCode.CORRUPT


def test_a_tilted_series_is_corrected_the_same(tmp_path: Path) -> None:
    root = series(tmp_path / "dicom", "tilt")
    assert list(differences(root, tmp_path / "cache", correct_tilt=True)) == []
    (found,) = read_folder(root, correct_tilt=True).volumes
    assert found.source.corrections


def test_the_series_above_go_the_fast_way_or_the_usual_one_as_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, all of the comparisons could compare the usual way with itself."""
    usual: list[str] = []
    for name in SERIES:
        root = series(tmp_path / name.replace(" ", "_"), name)
        with monkeypatch.context() as patch:
            for function in ("_stacked", "_read_series"):
                patch.setattr(volume, function, lambda *_, name=name: usual.append(name) or iter(()))
            list(iterate_folder(root, jobs=1))
    assert set(usual) == {
        "big endian", "absurd slope", "slope 0", "table", "padding only", "MONOCHROME1", "MONOCHROME1 of MR",
        "more pixels than declared", "trailing padding", "fewer pixels than declared", "two patients",
        "one image twice", "JPEG-LS, one slice cut off", "wrong transfer syntax",
        "no slope", "no slope in one slice", "slope without intercept, MR", "empty slope",
    }  # fmt: skip


@pytest.mark.parametrize("root", [DATA, PYDICOM], ids=["data folder", "pydicom"])
def test_real_files_are_the_same_with_and_without_index(root: Path, tmp_path: Path) -> None:
    if not root.is_dir():
        pytest.skip("the data folder is absent: set FEDICOM_DATA")
    assert list(differences(root, tmp_path / "cache")) == []
    kinds = {type(item) for item in iterate_folder(root)}
    assert kinds == {Volume, Image, Refused}, "each kind was compared"


def test_progress_ends_at_two_steps_a_file_whatever_the_files_are(tmp_path: Path) -> None:
    root = tmp_path / "dicom"
    series(root / "good", "padding")
    (root / "note.txt").write_text("text")
    (root / "loop").symlink_to(root)
    with Index(root, tmp_path / "cache") as index:
        for _ in range(2):
            steps: list[tuple[int, int]] = []
            list(iterate_folder(root, lambda done, total, steps=steps: steps.append((done, total)), index=index))
            assert steps[-1] == (12, 12)
            assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.parametrize("change", ["other pixels", "cut off", "gone", "no longer DICOM"])
def test_a_file_that_changes_after_the_index_saw_it_is_never_read_by_the_old_plan(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = series(tmp_path / "dicom", "signed 16 bits")
    path = root / "002.dcm"
    real = fastread.Catalogue

    def meddle(index: Index) -> list[fastread.Series]:
        found = list(real(index))
        if change == "other pixels":
            status, data = path.stat(), path.read_bytes()
            path.write_bytes(data[:-2] + b"\1\2")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif change == "cut off":
            os.truncate(path, path.stat().st_size - 20)
        elif change == "gone":
            path.unlink()
        else:
            path.write_bytes(b"\1" * path.stat().st_size)
        return found

    with Index(root, tmp_path / "cache") as index:
        before = read_folder(root, index=index)
        monkeypatch.setattr(fastread, "Catalogue", meddle)
        after = read_folder(root, index=index)
    if change == "other pixels":
        changed = np.argwhere(before.volumes[0].values_ZYX != after.volumes[0].values_ZYX)
        assert changed.tolist() == [[2, 5, 4]]
        assert after.volumes[0].values_ZYX[2, 5, 4] == 0x0201 - 1024
    else:
        assert after.volumes == ()
        codes = {refused.path.name: refused.code for refused in after.refused}
        assert codes.pop("002.dcm") in (RefusalCode.TRUNCATED, RefusalCode.UNREADABLE, RefusalCode.CORRUPT,
                                        RefusalCode.NOT_DICOM, RefusalCode.MISSING_HEADER)  # fmt: skip
        assert set(codes.values()) == {RefusalCode.INCOMPLETE}


def test_an_index_of_another_folder_is_refused(tmp_path: Path) -> None:
    root = series(tmp_path / "dicom", "signed 16 bits")
    (tmp_path / "other").mkdir()
    with Index(tmp_path / "other") as index, pytest.raises(ConfigError, match="of another folder"):
        read_folder(root, index=index)


def test_a_volume_that_the_caller_dropped_is_gone_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        made = [ct(z) for z in range(SLICES)]
        for z, each in enumerate(made):
            each.SeriesInstanceUID, each.SOPInstanceUID = f"1.2.{number}", f"1.2.{number}.{z}"
        write(tmp_path / "dicom" / str(number), *made)
    alive: list[bool] = []
    dropped: list[weakref.ref[Any]] = []
    real = fastread._read_stack

    def watch(*arguments: Any) -> Any:
        alive.extend(ref() is not None for ref in dropped)
        return real(*arguments)

    monkeypatch.setattr(fastread, "_read_stack", watch)
    for item in iterate_folder(tmp_path / "dicom"):
        assert isinstance(item, Volume)
        dropped.append(weakref.ref(item.values_ZYX))
        del item
    assert alive == [False] * 3  # one was dropped before the second, two before the third
