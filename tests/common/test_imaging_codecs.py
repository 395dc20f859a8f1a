"""Every transfer syntax that is read, from an encoder that nobody here wrote; the rest is refused by name."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from common.imaging import FolderReading, RefusalCode, read_folder
from common.imaging.layout import UNDEFINED, Element, layout_of
from common.imaging.refusal import Refusal
from tests.common.test_imaging_hostile import all_refused, ct, one_volume, radiograph, write

Encoder = Callable[[NDArray[Any]], bytes]


def bits(values: NDArray[Any]) -> NDArray[Any]:
    """Signed numbers as JPEG, which knows no sign, has to store them."""
    return values.view(f"u{values.itemsize}")


LOSSLESS: dict[str, tuple[str, Encoder]] = {
    "RLE": (uid.RLELossless, lambda x: rle(x)),
    "JPEG lossless": (uid.JPEGLossless, lambda x: imagecodecs.ljpeg_encode(bits(x), bitspersample=8 * x.itemsize)),
    "JPEG lossless SV1": (
        uid.JPEGLosslessSV1,
        lambda x: imagecodecs.ljpeg_encode(bits(x), bitspersample=8 * x.itemsize),
    ),
    "JPEG-LS": (uid.JPEGLSLossless, lambda x: imagecodecs.jpegls_encode(bits(x))),
    "JPEG 2000": (uid.JPEG2000Lossless, lambda x: jpeg2000(x)),
    "JPEG 2000, lossy allowed": (uid.JPEG2000, lambda x: jpeg2000(x)),
    "HTJ2K": (uid.HTJ2KLossless, lambda x: imagecodecs.htj2k_encode(x, reversible=True)),
    "HTJ2K RPCL": (uid.HTJ2KLosslessRPCL, lambda x: imagecodecs.htj2k_encode(x, reversible=True)),
    "HTJ2K, lossy allowed": (uid.HTJ2K, lambda x: imagecodecs.htj2k_encode(x, reversible=True)),
}


def jpeg2000(values: NDArray[Any]) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="j2k"))


def rle(values: NDArray[Any]) -> bytes:
    made = radiograph(values)
    made.compress(uid.RLELossless, generate_instance_uid=False)
    return next(pydicom.encaps.generate_frames(made.PixelData, number_of_frames=1))


def picture(dtype: str, top: int) -> NDArray[Any]:
    """A gradient with noise over the whole range, odd in size."""
    noise = np.random.default_rng(3).integers(0, top // 8, (37, 51))
    ramp = np.linspace(0, top - top // 8 - 1, 37 * 51).reshape(37, 51)
    low = -(top // 2) if dtype.startswith("i") else 0
    return (ramp + noise + low).astype(f"<{dtype}")


def packed(made: Dataset, frame: bytes, syntax: str) -> Dataset:
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = syntax
    return made


def series(folder: Path, values: NDArray[Any], syntax: str, encode: Encoder, **more: Any) -> FolderReading:
    made = [packed(ct(z, stored=values, RescaleSlope=1, RescaleIntercept=0, **more), encode(values), syntax) for z in
            range(2)]  # fmt: skip
    return read_folder(write(folder, *made))


@pytest.mark.parametrize(("dtype", "stored"), [("u1", 8), ("u2", 12), ("u2", 16), ("i2", 16)])
@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_transfer_syntax_gives_back_every_bit(tmp_path: Path, name: str, dtype: str, stored: int) -> None:
    syntax, encode = LOSSLESS[name]
    values = picture(dtype, 2**stored)
    volume = one_volume(series(tmp_path, values, syntax, encode, BitsStored=stored, HighBit=stored - 1))
    for values_YX in volume.values_ZYX:
        np.testing.assert_array_equal(values_YX, values)


@pytest.mark.parametrize(
    ("syntax", "encode", "most"),
    [
        (uid.JPEGBaseline8Bit, lambda x: imagecodecs.jpeg8_encode(x, level=95), 16),
        (uid.JPEGExtended12Bit, lambda x: imagecodecs.jpeg8_encode(x, level=95), 16),
        (uid.JPEGLSNearLossless, lambda x: imagecodecs.jpegls_encode(x, level=2), 2),
        (uid.JPEG2000, lambda x: imagecodecs.jpeg2k_encode(x, level=45, reversible=False, codecformat="j2k"), 16),
        (uid.HTJ2K, lambda x: imagecodecs.htj2k_encode(x, reversible=False), 16),
    ],
)
def test_a_lossy_transfer_syntax_comes_near(tmp_path: Path, syntax: str, encode: Encoder, most: int) -> None:
    values = picture("u1", 256)
    volume = one_volume(series(tmp_path, values, syntax, encode))
    wrong = np.abs(volume.values_ZYX - values.astype(np.float32))
    assert 0 < wrong.max() <= most


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize(("dtype", "stored"), [("u1", 8), ("u2", 12), ("i2", 16), ("u4", 24)])
def test_an_uncompressed_transfer_syntax_gives_back_every_bit(
    tmp_path: Path, syntax: uid.UID, dtype: str, stored: int
) -> None:
    values = picture(dtype, 2**stored)
    for z in range(2):
        made = ct(z, stored=values, RescaleSlope=1, RescaleIntercept=0, BitsStored=stored, HighBit=stored - 1)
        if syntax == uid.ExplicitVRBigEndian:
            odd = values.tobytes() + b"\0" * (values.size * values.itemsize % 2)
            made.PixelData = np.frombuffer(odd, f"<u{max(2, values.itemsize)}").byteswap().tobytes()
            made["PixelData"].VR = "OW"
        made.file_meta.TransferSyntaxUID = syntax
        made.save_as(tmp_path / f"{z}", implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    volume = one_volume(read_folder(tmp_path))
    for values_YX in volume.values_ZYX:
        np.testing.assert_array_equal(values_YX, values)


@pytest.mark.parametrize("name", ["JPEG 2000", "HTJ2K"])
def test_a_colour_codestream_becomes_luminance(tmp_path: Path, name: str) -> None:
    syntax, encode = LOSSLESS[name]
    rgb = np.stack([picture("u1", 256), picture("u1", 128), np.full((37, 51), 9, np.uint8)], axis=-1)
    made = radiograph(rgb[..., 0], PhotometricInterpretation="YBR_RCT", SamplesPerPixel=3, PlanarConfiguration=0)
    (image,) = read_folder(write(tmp_path, packed(made, encode(rgb), syntax))).images
    np.testing.assert_allclose(image.values_YX, rgb @ [0.299, 0.587, 0.114], atol=1e-3)


@pytest.mark.parametrize(
    ("transformed", "header"), [(True, "YBR_FULL"), (True, "YBR_FULL_422"), (False, "YBR_RCT"), (False, "YBR_ICT")]
)
def test_a_codestream_whose_own_colour_transform_contradicts_the_header_is_refused(
    tmp_path: Path, transformed: bool, header: str
) -> None:
    """The decoder undoes a transform of its own; undone once more, colours were off by half of the range."""
    rgb = np.stack([picture("u1", 256), picture("u1", 128), np.full((37, 51), 9, np.uint8)], axis=-1)
    frame = bytes(imagecodecs.jpeg2k_encode(rgb, level=0, reversible=True, codecformat="j2k", mct=transformed))
    made = radiograph(rgb[..., 0], PhotometricInterpretation=header, SamplesPerPixel=3, PlanarConfiguration=0)
    assert all_refused(read_folder(write(tmp_path, packed(made, frame, uid.JPEG2000Lossless)))) == {RefusalCode.CORRUPT}


@pytest.mark.parametrize("header", ["YBR_RCT", "YBR_FULL"])
def test_a_tile_that_names_a_colour_transform_goes_before_the_main_header(tmp_path: Path, header: str) -> None:
    rgb = np.stack([picture("u1", 256), picture("u1", 128), np.full((37, 51), 9, np.uint8)], axis=-1)
    frame = bytearray(imagecodecs.jpeg2k_encode(rgb, level=0, reversible=True, codecformat="j2k", mct=True))
    cod, sot = frame.index(b"\xff\x52"), frame.index(b"\xff\x90")
    segment = bytes(frame[cod : cod + 2 + int.from_bytes(frame[cod + 2 : cod + 4], "big")])
    assert segment[8] == 1  # the transform
    frame[cod + 8] = 0
    part_bytes = int.from_bytes(frame[sot + 6 : sot + 10], "big") + len(segment)
    frame[sot + 6 : sot + 12] = part_bytes.to_bytes(4, "big") + frame[sot + 10 : sot + 12] + segment
    made = radiograph(rgb[..., 0], PhotometricInterpretation=header, SamplesPerPixel=3, PlanarConfiguration=0)
    reading = read_folder(write(tmp_path, packed(made, bytes(frame), uid.JPEG2000Lossless)))
    if header == "YBR_FULL":
        assert all_refused(reading) == {RefusalCode.CORRUPT}
    else:
        np.testing.assert_allclose(reading.images[0].values_YX, rgb @ [0.299, 0.587, 0.114], atol=1e-3)


@pytest.mark.parametrize("transformed", [True, False])
def test_rgb_is_what_the_decoder_of_jpeg_2000_gives_either_way(tmp_path: Path, transformed: bool) -> None:
    rgb = np.stack([picture("u1", 256), picture("u1", 128), np.full((37, 51), 9, np.uint8)], axis=-1)
    frame = bytes(imagecodecs.jpeg2k_encode(rgb, level=0, reversible=True, codecformat="j2k", mct=transformed))
    made = radiograph(rgb[..., 0], PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    (image,) = read_folder(write(tmp_path, packed(made, frame, uid.JPEG2000Lossless))).images
    np.testing.assert_allclose(image.values_YX, rgb @ [0.299, 0.587, 0.114], atol=1e-3)


JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
ADOBE_RGB, ADOBE_YBR = (b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) for transform in (0, 1))


def colour_radiograph(colours: str, marker: bytes, header: str) -> Dataset:
    """200 red, 50 green, 20 blue, as lossy JPEG whose only marker is this; RGB components have the names R, G and B.

    Args:
        header: Photometric Interpretation.
    """
    rgb = np.full((16, 16, 3), (200, 50, 20), np.uint8)
    frame = bytes(imagecodecs.jpeg8_encode(rgb, colorspace="RGB", outcolorspace=colours, level=100))
    at = 2
    while frame[at + 1] in (0xE0, 0xEE):
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    made = radiograph(np.zeros((16, 16), np.uint8), PhotometricInterpretation=header, SamplesPerPixel=3,
                      PlanarConfiguration=0)  # fmt: skip
    return packed(made, frame[:2] + marker + frame[at:], uid.JPEGBaseline8Bit)


@pytest.mark.parametrize(
    ("colours", "marker", "header"),
    [
        ("YCBCR", JFIF, "YBR_FULL_422"),
        ("YCBCR", ADOBE_YBR, "YBR_FULL_422"),
        ("YCBCR", b"", "YBR_FULL"),
        ("YCBCR", JFIF, "RGB"),  # the name of before it was compressed
        ("YCBCR", ADOBE_YBR, "RGB"),
        ("RGB", ADOBE_RGB, "RGB"),
        ("RGB", b"", "RGB"),
    ],
)
def test_a_lossy_colour_jpeg_is_converted_once_whoever_says_what_its_colours_are(
    tmp_path: Path, colours: str, marker: bytes, header: str
) -> None:
    (image,) = read_folder(write(tmp_path, colour_radiograph(colours, marker, header))).images
    # 0.299 * 200 + 0.587 * 50 + 0.114 * 20 = 91.43
    np.testing.assert_allclose(image.values_YX, 91.43, atol=0.5)


@pytest.mark.parametrize(
    ("colours", "marker", "header"),
    [("RGB", b"", "YBR_FULL_422"), ("RGB", JFIF, "RGB"), ("YCBCR", ADOBE_RGB, "YBR_FULL")],
)
def test_a_lossy_colour_jpeg_that_contradicts_itself_or_its_header_is_refused(
    tmp_path: Path, colours: str, marker: bytes, header: str
) -> None:
    folder = write(tmp_path, colour_radiograph(colours, marker, header))
    assert all_refused(read_folder(folder)) == {RefusalCode.CORRUPT}


@pytest.mark.parametrize("name", [name for name in LOSSLESS if name != "RLE"])
def test_a_codestream_that_lacks_its_end_is_refused_although_its_decoder_would_fill_it_up(
    tmp_path: Path, name: str
) -> None:
    syntax, encode = LOSSLESS[name]
    values = picture("u2", 4096)
    whole = encode(values)
    reading = series(tmp_path, values, syntax, lambda _: whole[: len(whole) * 2 // 3])
    assert all_refused(reading) <= {RefusalCode.TRUNCATED, RefusalCode.CORRUPT}


def test_a_codestream_that_declares_more_tiles_than_it_holds_is_refused(tmp_path: Path) -> None:
    """Found by fuzzing: OpenJPEG leaves the missing tile black."""
    values = picture("u1", 256)
    frame = bytearray(jpeg2000(values))
    assert int.from_bytes(frame[28:32], "big") == 37  # YTsiz, the height of a tile
    frame[31] = 36
    assert RefusalCode.TRUNCATED in all_refused(series(tmp_path, values, uid.JPEG2000, lambda _: bytes(frame)))


def test_several_tiles_are_read(tmp_path: Path) -> None:
    values = picture("u1", 256)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG2000", tile_size=(16, 16), no_jp2=True, irreversible=False)
    volume = one_volume(series(tmp_path, values, uid.JPEG2000Lossless, lambda _: out.getvalue()))
    np.testing.assert_array_equal(volume.values_ZYX[0], values)


@pytest.mark.parametrize(
    ("syntax", "named"),
    [
        (uid.MPEG4HP41, "MPEG-4"),
        ("1.2.840.10008.1.2.4.94", "JPIP"),
        ("1.2.840.10008.1.2.8.99", "unknown"),  # newer than the reader
        ("1.2.840.113619.5.2", "unknown"),  # GE's own
    ],
)
def test_any_other_transfer_syntax_is_refused_by_name(tmp_path: Path, syntax: str, named: str) -> None:
    made = packed(ct(0), bytes(500), uid.MPEG4HP41)
    path = write(tmp_path, made) / "000.dcm"
    padded = [text.encode() + b"\0" * (len(text) % 2) for text in (uid.MPEG4HP41, syntax)]
    old, new = (b"\x02\0\x10\0UI" + len(text).to_bytes(2, "little") + text for text in padded)
    path.write_bytes(path.read_bytes().replace(old, new))
    (refused,) = read_folder(tmp_path).refused
    assert refused.code == RefusalCode.UNSUPPORTED_PIXELS
    assert named in refused.why


@pytest.mark.parametrize("compressed", [True, False])
def test_a_piece_of_another_image_behind_the_pixels_is_refused_and_padding_is_not(
    tmp_path: Path, compressed: bool
) -> None:
    syntax, encode = LOSSLESS["JPEG-LS"] if compressed else (uid.ExplicitVRLittleEndian, None)
    values = picture("u1", 256)
    made = radiograph(values)
    write(tmp_path / "a", packed(made, encode(values), syntax) if encode is not None else made)
    (file,) = (tmp_path / "a").iterdir()
    whole = file.read_bytes()
    for padding in (b"\0" * 64, b"\xfc\xff\xfc\xffOB\0\0\x04\0\0\0abcd"):  # Data Set Trailing Padding
        file.write_bytes(whole + padding)
        (image,) = read_folder(tmp_path / "a").images
        np.testing.assert_array_equal(image.values_YX, values)
    for piece in (whole[whole.index(b"\x28\0\x10\0") :], whole[whole.index(b"\xe0\x7f\x10\0") :]):
        file.write_bytes(whole + piece)
        (refused,) = read_folder(tmp_path / "a").refused
        assert (refused.code, "piece of another image" in refused.why) == (RefusalCode.CORRUPT, True)


@pytest.mark.parametrize("name", [*LOSSLESS, "JP2"])
@pytest.mark.parametrize("offsets", [True, False])
def test_a_film_that_does_not_say_so_is_not_read_as_its_first_frame(tmp_path: Path, name: str, offsets: bool) -> None:
    syntax, encode = LOSSLESS.get(name, (uid.JPEG2000Lossless, lambda x: imagecodecs.jpeg2k_encode(x, level=0)))
    values = picture("u1", 256)
    frame = bytes(encode(values))
    assert (frame[4:8] == b"jP  ") == (name == "JP2")
    made = packed(radiograph(values), frame, syntax)
    made.PixelData = encapsulate([frame] * 3, has_bot=offsets)
    assert all_refused(read_folder(write(tmp_path / "three", made))) == {RefusalCode.CORRUPT}
    made.PixelData = encapsulate([frame], fragments_per_frame=3, has_bot=offsets)
    (image,) = read_folder(write(tmp_path / "one in three pieces", made)).images
    np.testing.assert_array_equal(image.values_YX, values)


@pytest.mark.parametrize("frames", [1, 64])
def test_a_compressed_file_may_declare_64_times_its_length(frames: int) -> None:
    made = radiograph(np.zeros((1, 1), "<u2"), Rows=2**14, Columns=2**13 // frames, NumberOfFrames=frames)  # 2^28 bytes
    made.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    enough = 2**28 // 64
    assert layout_of(made, Element(0, UNDEFINED, enough, words=False)).frames == frames
    with pytest.raises(Refusal) as caught:
        layout_of(made, Element(0, UNDEFINED, enough - 1, words=False))
    assert caught.value.code == RefusalCode.TOO_LARGE


def test_every_compressed_frame_takes_eight_bytes_at_least() -> None:
    made = radiograph(np.zeros((1, 1), "<u2"), NumberOfFrames=1000)
    made.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    assert layout_of(made, Element(0, UNDEFINED, 8000, words=False)).frames == 1000
    with pytest.raises(Refusal) as caught:
        layout_of(made, Element(0, UNDEFINED, 7999, words=False))
    assert caught.value.code == RefusalCode.TOO_LARGE


def test_negative_pixels_where_the_header_knows_none_are_refused(tmp_path: Path) -> None:
    values = np.arange(-128, 128, dtype="<i2").reshape(16, 16)
    for negative, code in ((True, set()), (False, {RefusalCode.CORRUPT})):
        made = radiograph(values, PixelRepresentation=int(negative))  # the codestream says itself that there is a sign
        reading = read_folder(write(tmp_path / str(negative), packed(made, jpeg2000(values), uid.JPEG2000Lossless)))
        assert {refused.code for refused in reading.refused} == code
        assert [image.values_YX.tolist() for image in reading.images] == [values.tolist()] * negative


@pytest.mark.parametrize("name", ["JPEG lossless SV1", "JPEG 2000"])
def test_a_value_that_is_negative_by_the_bits_of_the_picture_and_not_by_those_of_the_header_is_refused(
    tmp_path: Path, name: str
) -> None:
    syntax, encode = {
        "JPEG lossless SV1": (uid.JPEGLosslessSV1, lambda x: imagecodecs.ljpeg_encode(x, bitspersample=12)),
        "JPEG 2000": (uid.JPEG2000, lambda x: imagecodecs.jpeg2k_encode(
            x, level=0, reversible=True, codecformat="j2k", bitspersample=12)),
    }[name]  # fmt: skip
    # -1000 in 12 bits is 3096 of 4096; in 16 bits 3096 is itself, and other readers give one or the other
    for place, top, stored in (("a", 3096, 16), ("b", 2047, 16), ("c", 3096, 12)):
        values = np.tile(np.array([[0, 7], [100, top]], "<u2"), (8, 8))
        made = radiograph(values.astype("<i2"), PixelRepresentation=1, BitsStored=stored, HighBit=stored - 1)
        reading = read_folder(write(tmp_path / place, packed(made, bytes(encode(values)), syntax)))
        if place == "a":
            assert all_refused(reading) == {RefusalCode.CORRUPT}
        else:
            assert reading.images[0].values_YX[:2, :2].tolist() == [[0, 7], [100, top if place == "b" else -1000]]
