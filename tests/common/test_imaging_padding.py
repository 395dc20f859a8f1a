"""A Pixel Padding Value that does not fit Bits Stored: the pixels that have it were not measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from common.imaging import fastread, volume
from tests.common.test_imaging_codecs import packed, rle
from tests.common.test_imaging_hostile import ct, one_volume, write
from tests.common.test_imaging_multiframe import enhanced

CODECS: dict[str, Any] = {
    "native": None,
    "deflated": None,
    "RLE": (uid.RLELossless, rle),
    "JPEG-LS": (uid.JPEGLSLossless, lambda x: imagecodecs.jpegls_encode(x.view("<u2"))),
    "JPEG 2000": (
        uid.JPEG2000Lossless,
        lambda x: imagecodecs.jpeg2k_encode(x.view("<u2"), reversible=True, codecformat="j2k"),
    ),
}


def slice_of(z: int, codec: str, stored: NDArray[Any], padding: int) -> Dataset:
    made = ct(z, stored=stored, RescaleSlope=1, RescaleIntercept=0, BitsStored=12, HighBit=11)
    made.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    if codec == "deflated":
        made.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    found = CODECS[codec]
    return made if found is None else packed(made, found[1](stored), found[0])


@pytest.mark.parametrize("reader", [volume, fastread])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("kind", "padding"), [("<i2", -3024), ("<u2", 63536)])
def test_pixels_of_a_padding_value_beyond_bits_stored_take_the_smallest_value(
    tmp_path: Path, reader: ModuleType, codec: str, kind: str, padding: int
) -> None:
    rest = padding & 0xFFF  # what 12 bits make of it: 1072 and 2096
    slices = []
    for z in range(3):
        stored = np.arange(100, 124).reshape(6, 4).astype(kind)
        stored[0, :2] = padding, rest
        slices.append(slice_of(z, codec, stored, padding))
    read = one_volume(reader.read_folder(write(tmp_path, *slices)))
    assert read.values_ZYX[1, 0].tolist() == [102, rest, 102, 103]  # tissue with the same 12 bits stays tissue


@pytest.mark.parametrize("reader", [volume, fastread])
@pytest.mark.parametrize("bits", [12, 16])
def test_a_negative_padding_value_of_unsigned_pixels_is_the_one_with_the_same_bits(
    tmp_path: Path, reader: ModuleType, bits: int
) -> None:
    slices = []
    for z in range(3):
        stored = np.arange(100, 124).reshape(6, 4).astype("<u2")
        stored[0, 0] = 63536  # 65536 - 2000
        made = slice_of(z, "native", stored, -2000)
        made.BitsStored, made.HighBit = bits, bits - 1
        slices.append(made)
    read = one_volume(reader.read_folder(write(tmp_path, *slices)))
    assert read.values_ZYX[1, 0].tolist() == [101, 101, 102, 103]


def test_frames_of_a_padding_value_beyond_bits_stored_take_the_smallest_value(tmp_path: Path) -> None:
    made = enhanced([0, 2])  # 1 to 6 and 11 to 16, with all higher bits set
    made.add_new("PixelPaddingValue", "US", 0xF000 | 3)
    read = one_volume(volume.read_folder(write(tmp_path, made)))
    assert read.values_ZYX[0].ravel().tolist() == [1, 2, 1, 4, 5, 6]


def test_a_range_of_padding_that_begins_beyond_bits_stored_ends_where_it_says(tmp_path: Path) -> None:
    stored = np.arange(100, 124).reshape(6, 4).astype("<i2")
    slices = [slice_of(z, "native", stored, -3024) for z in range(2)]
    for made in slices:
        made.add_new("PixelPaddingRangeLimit", "SS", 101)
    read = one_volume(fastread.read_folder(write(tmp_path, *slices)))
    assert read.values_ZYX[1, 0].tolist() == [102, 102, 102, 103]


@pytest.mark.parametrize("reader", [volume, fastread])
@pytest.mark.parametrize("padding", [("US", [1, 2]), ("LO", "none")])
def test_a_padding_value_that_is_no_single_number_refuses_its_slice_and_so_its_series(
    tmp_path: Path, reader: ModuleType, padding: tuple[str, Any]
) -> None:
    slices = [slice_of(z, "native", np.arange(24).reshape(6, 4).astype("<i2"), 0) for z in range(3)]
    del slices[0].PixelPaddingValue
    slices[0].add_new("PixelPaddingValue", *padding)
    refused = reader.read_folder(write(tmp_path, *slices)).refused
    assert Counter(str(each.code) for each in refused) == {"corrupt": 1, "incomplete": 2}
