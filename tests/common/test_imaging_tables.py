"""Lookup tables as files write them: eight or sixteen bits an entry, first values with a sign or without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from common.imaging import RefusalCode, header, read_folder
from common.imaging.refusal import Refusal
from common.imaging.single import read_single
from common.imaging.tables import Lookup
from tests.common.test_imaging_hostile import all_refused, ct, hu, one_volume, radiograph, write

STORED = np.array([[0, 100, 255, 256], [1000, 2000, 4095, 3000]], "<u2")
SIGNED = np.array([[-32768, -2048, -1, 0], [5, 100, 2047, 32000]], "<i2")


def table(count: int, first: int, bits: int, entries: Sequence[int], *, bytes_each: int = 2, big: bool = False) -> Any:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, bits])
    words = np.asarray(entries, f"<u{bytes_each}").tobytes()
    words += b"\0" * (len(words) % 2)
    item.add_new("LUTData", "OW", np.frombuffer(words, "<u2").astype(">u2" if big else "<u2").tobytes())
    return [item]


def read(folder: Path, made: Dataset) -> list[float]:
    (image,) = read_folder(write(folder, made)).images
    return [float(value) for value in image.values_YX.ravel()]


def twelve(stored: NDArray[Any] = STORED, **more: Any) -> Dataset:
    return radiograph(stored, BitsStored=12, HighBit=11, **more)


@pytest.mark.parametrize("bytes_each", [1, 2])
def test_a_tone_curve_of_eight_bits_reaches_beyond_its_first_256_entries(tmp_path: Path, bytes_each: int) -> None:
    entries = [value >> 4 for value in range(4096)]
    made = twelve(VOILUTSequence=table(4096, 0, 8, entries, bytes_each=bytes_each))
    assert read(tmp_path, made) == [0, 6, 15, 16, 62, 125, 255, 187]


def test_bytes_packed_in_words_come_in_their_order_from_a_big_endian_file(tmp_path: Path) -> None:
    made = radiograph(
        np.array([[0, 1], [2, 9]], ">u2"), VOILUTSequence=table(5, 0, 8, [1, 2, 3, 4, 5], bytes_each=1, big=True)
    )
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    assert read(tmp_path, made) == [1, 2, 3, 5]


def test_values_outside_a_table_take_its_first_or_last_entry(tmp_path: Path) -> None:
    made = twelve(VOILUTSequence=table(256, 100, 12, range(1000, 1256)))
    assert read(tmp_path, made) == [1000, 1000, 1155, 1156, 1255, 1255, 1255, 1255]


@pytest.mark.parametrize(("count", "first"), [(4096, -2048), (0, -32768)])
def test_a_modality_lut_of_signed_pixels_is_entered_without_overflow(tmp_path: Path, count: int, first: int) -> None:
    entries = range(count or 65536)
    got = read(tmp_path, radiograph(SIGNED, ModalityLUTSequence=table(count, first, 16, entries)))
    assert got == [min(max(int(value) - first, 0), len(entries) - 1) for value in SIGNED.ravel()]


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
def test_a_tone_curve_behind_a_rescale_below_0_begins_below_0_in_implicit_vr_too(tmp_path: Path, syntax: str) -> None:
    curve = table(4096, -1024, 16, range(4096))
    made = twelve(RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=curve)  # Pixel Representation is 0
    made.file_meta.TransferSyntaxUID = syntax
    assert read(tmp_path, made) == STORED.ravel().tolist()


def test_a_tone_curve_behind_a_modality_lut_begins_where_an_unsigned_number_says(tmp_path: Path) -> None:
    made = radiograph(
        np.array([[-2, -1], [0, 1]], "<i2"),
        ModalityLUTSequence=table(4, -2, 16, [0, 39999, 40001, 65535]),
        VOILUTSequence=table(30000, 40000, 16, range(30000)),  # from -25536 on it would meet values as well
    )
    made.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian  # where pydicom goes by the signed pixels
    assert read(tmp_path, made) == [0, 0, 1, 25535]


def test_a_first_value_written_without_its_sign_is_taken_as_the_one_that_occurs(tmp_path: Path) -> None:
    curve = table(4096, 64512, 16, range(4096))  # 65536 - 1024
    assert read(tmp_path, twelve(RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=curve))[:3] == [0, 100, 255]


@pytest.mark.parametrize(
    ("code", "made"),
    [
        (RefusalCode.CORRUPT, table(4096, 0, 8, range(100))),
        (RefusalCode.CORRUPT, table(4, 0, 8, [0, 1, 2, 256])),
        (RefusalCode.CORRUPT, table(4, 40000, 8, [0, 1, 2, 3])),
        (RefusalCode.CORRUPT, table(10, 65526, 8, range(10))),  # from -10 to -1
        (RefusalCode.CORRUPT, [Dataset()]),
        (RefusalCode.UNSUPPORTED_PIXELS, table(4, 0, 17, [0, 1, 2, 3])),
    ],
    ids=["short", "entries above their bits", "no value in reach", "just out of reach", "empty", "17 bits"],
)
def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path, code: RefusalCode, made: Any) -> None:
    assert all_refused(read_folder(write(tmp_path, twelve(VOILUTSequence=made)))) == {code}


def test_slices_with_a_modality_lut_are_read_through_it(tmp_path: Path) -> None:
    entries = [value * 2 for value in range(4096)]
    slices = [ct(z, stored=STORED.astype("<i2"), ModalityLUTSequence=table(4096, -2048, 16, entries)) for z in range(2)]
    for made in slices:
        del made.RescaleSlope, made.RescaleIntercept
    volume = one_volume(read_folder(write(tmp_path, *slices)))
    assert volume.values_ZYX[1].ravel().tolist() == [min(int(v) + 2048, 4095) * 2 for v in STORED.ravel()]


def test_an_inverted_slice_with_a_table_of_its_own_is_refused(tmp_path: Path) -> None:
    """Turned about the ends of tables of 16 and of 8 bits, neighbours of equal grey were 65,000 apart."""
    grey = {"PhotometricInterpretation": "MONOCHROME1", "sop_class": uid.MRImageStorage, "modality": "MR"}
    slices = [ct(z, ModalityLUTSequence=table(256, 0, 16 - 8 * z, range(256)), **grey) for z in range(2)]
    for made in slices:
        del made.RescaleSlope, made.RescaleIntercept
    assert all_refused(read_folder(write(tmp_path, *slices))) == {RefusalCode.UNSUPPORTED_PIXELS}


def test_the_tone_curve_of_a_slice_is_a_way_to_show_it_and_changes_no_value(tmp_path: Path) -> None:
    slices = [ct(z, VOILUTSequence=table(4, 0, 16, [9, 9, 9, 9])) for z in range(3)]
    np.testing.assert_array_equal(one_volume(read_folder(write(tmp_path, *slices))).values_ZYX[1], hu(1))


def palette(count: int, bits: int, stored: NDArray[Any]) -> Dataset:
    """Grey from black to white over `count` entries."""
    made = radiograph(stored, PhotometricInterpretation="PALETTE COLOR")
    entries = np.arange(count) * ((1 << bits) - 1) // (count - 1)
    for colour in ("Red", "Green", "Blue"):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [count, 0, bits])
        made.add_new(f"{colour}PaletteColorLookupTableData", "OW", entries.astype(f"<u{bits // 8}").tobytes())
    return made


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["u1", "<u2"])
def test_grey_has_one_scale_in_palettes_of_8_and_16_bits(tmp_path: Path, bits: int, kind: str) -> None:
    stored = np.array([[0, 10], [100, 255]], kind)
    assert read(tmp_path, palette(256, bits, stored)) == pytest.approx([0, 10, 100, 255], rel=1e-6)


def test_a_palette_of_eight_bits_reaches_beyond_its_first_256_entries(tmp_path: Path) -> None:
    stored = np.array([[0, 256], [512, 2000]], "<u2")
    assert read(tmp_path, palette(1021, 8, stored)) == pytest.approx([0, 64, 128, 255], rel=1e-6)


def test_colours_of_16_and_12_bits_have_the_scale_of_8(tmp_path: Path) -> None:
    for bits, junk in ((16, 0), (12, 0xF000)):
        white = (1 << bits) - 1
        made = radiograph(
            np.full((1, 2, 3), white, "<u2") * np.array([[[0], [1]]], "<u2") | np.uint16(junk),
            SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
            BitsStored=bits, HighBit=bits - 1,
        )  # fmt: skip
        assert read(tmp_path / str(bits), made) == pytest.approx([0, 255], rel=1e-6)


@pytest.mark.parametrize("undefined_length", [False, True])
def test_several_tone_curves_of_65536_entries_are_no_reason_to_refuse_a_radiograph(
    tmp_path: Path, undefined_length: bool
) -> None:
    curves = [table(0, 0, 16, range(65536))[0] for _ in range(9)]  # 1.1 MiB
    made = radiograph(STORED, VOILUTSequence=curves)
    made["VOILUTSequence"].is_undefined_length = undefined_length
    assert read(tmp_path, made) == STORED.ravel().tolist()


def test_the_header_of_one_image_says_the_same_in_the_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"ModalityLUTSequence": table(8, 2, 10, range(8)), "VOILUTSequence": table(9, 1, 8, range(9), bytes_each=1)}
    made = (
        twelve(**both, PixelPaddingValue=7),
        twelve(RescaleSlope=0.1, RescaleIntercept=-3),
        palette(256, 16, STORED),
        radiograph(np.zeros((2, 2), np.uint8), RescaleSlope=0, RescaleIntercept=0),
    )
    paths = sorted(write(tmp_path, *made).iterdir())

    def found() -> list[str]:
        def one(path: Path) -> str:
            try:
                return repr(read_single(path, projection=True))
            except Refusal as refusal:
                return str(refusal)

        return [one(path) for path in paths]

    here = found()
    monkeypatch.setattr(header, "_HEADER_BYTES", 100)
    assert found() == here
    assert len(set(here)) == 4


def test_a_picture_of_more_than_a_million_pixels_is_looked_up_to_its_last_one() -> None:
    values = np.arange(2**20 + 3, dtype=np.uint32) % 4
    np.testing.assert_array_equal(Lookup(np.array([7, 6, 5, 4], np.uint8), 0, 8)(values), 7 - values)


@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1),
    first=st.integers(-(2**15), 2**16 - 1),
    entries=st.lists(st.integers(0, 255), min_size=1),
    kind=st.sampled_from(["i4", "i2", "u1", "f8"]),
)
def test_every_value_finds_the_entry_that_a_loop_finds(
    values: list[int], first: int, entries: list[int], kind: str
) -> None:
    given_N = np.array(values).astype(kind)
    found = Lookup(np.array(entries, np.uint8), first, 8)(given_N)
    assert found.tolist() == [entries[min(max(int(value) - first, 0), len(entries) - 1)] for value in given_N]
