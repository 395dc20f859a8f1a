"""Compressed pixels to stored values. Runs in the worker only: damaged files crash these decoders."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.processing import convert_color_space
from pydicom.pixels.utils import pixel_array

from common.imaging.layout import JPEG_2000, UNDEFINED, Layout, check_behind
from common.imaging.refusal import Refusal, RefusalCode, quiet

_CODECS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    uid.JPEGExtended12Bit: imagecodecs.jpeg_decode,
    uid.JPEGLossless: imagecodecs.jpeg_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpeg_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
    uid.JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    uid.JPEG2000: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLossless: imagecodecs.htj2k_decode,
    uid.HTJ2KLosslessRPCL: imagecodecs.htj2k_decode,
    uid.HTJ2K: imagecodecs.htj2k_decode,
}
_CUT = "The compressed image is cut off; transfer it again."
_OTHER_COLOURS = "The header and the compressed image name different colour transforms; export it again."
_SIGNATURE = b"\xff\x4f\xff\x51"
"""SOC and SIZ; a JP2 box header may come first."""
_BASELINE = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)


def unpack(path: str, layout: dict[str, Any], frames: list[int]) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """Decodes frames of an encapsulated file.

    Args:
        path: The file.
        layout: Fields of its `Layout`.
        frames: Numbers of the frames, growing.

    Yields:
        {"dtype", "shape"} and the stored values, (rows, columns[, 3]); colour as RGB, unused bits cleared.

    Raises:
        Refusal: The compressed image has another size than declared.
        Exception: Whatever a damaged image makes its decoder raise.
    """
    wanted = Layout.of_plain(layout)
    with open(path, "rb") as file:  # noqa: PTH123  str, as it came through the pipe
        file.seek(wanted.element.start)
        length = wanted.element.length
        raw = _whole(file.read()) if length == UNDEFINED else file.read(length)
    if _beginnings(raw) > wanted.frames:  # a film that does not say so would be read as its first frame
        raise Refusal(RefusalCode.CORRUPT, "The file holds more frames than its header says; export it again.")
    with quiet():
        sought = iter(frames)
        number = next(sought, None)
        for at, frame in enumerate(generate_frames(raw, number_of_frames=wanted.frames)):
            if at == number:
                values = np.ascontiguousarray(_decoded(frame, wanted))
                yield {"dtype": values.dtype.str, "shape": values.shape}, values.data
                number = next(sought, None)
        if number is not None:
            raise Refusal(RefusalCode.TRUNCATED, "The file holds fewer frames than its header says; transfer it again.")


def _whole(raw: bytes) -> bytes:
    """The fragments up to their end mark (PS3.5 A.4). Without it some may be lost, which not every decoder notices."""
    at = 0
    while at + 8 <= len(raw):
        tag, length = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "little")
        if tag == b"\xfe\xff\xdd\xe0":
            group, element = raw[at + 8 : at + 10], raw[at + 10 : at + 12]
            check_behind(int.from_bytes(group, "little") << 16 | int.from_bytes(element, "little"))
            return raw[:at]
        if tag != b"\xfe\xff\x00\xe0":
            raise Refusal(RefusalCode.CORRUPT, "The compressed pixels are not divided as DICOM wants it.")
        at += 8 + length
    raise Refusal(RefusalCode.TRUNCATED, "The file is cut off; transfer it again.")


def _beginnings(raw: bytes) -> int:
    """How many fragments begin as a compressed frame does; a frame may have several fragments."""
    at = found = 0
    while at + 8 <= len(raw):
        start, at = at + 8, at + 8 + int.from_bytes(raw[at + 4 : at + 8], "little")
        head = raw[start : min(at, start + 8)]
        run_length = head[1:] == b"\0\0\0\x40\0\0\0" and 0 < head[0] < 16
        found += run_length or head.startswith((b"\xff\xd8\xff", _SIGNATURE)) or head[4:] == b"jP  "
    return found


def _decoded(frame: bytes, layout: Layout) -> NDArray[Any]:
    expected = layout.rows, layout.columns
    # decoders allocate what the codestream asks for, so a few bytes could ask for gigabytes
    size = codestream_size(frame)
    if size is not None and size != expected:
        raise Refusal(RefusalCode.CORRUPT, "The compressed image has another size than its header says.")
    if size is not None and not _ended(frame):  # some decoders fill up what is missing
        raise Refusal(RefusalCode.TRUNCATED, _CUT)
    transforms = _transforms(frame)
    if layout.samples == 3 and layout.syntax in JPEG_2000:
        _check_transforms(transforms, layout)
    stored = _stored(frame, layout)
    if stored.shape[:2] != expected or stored.shape[2:] != ((3,) if layout.samples == 3 else ()):
        raise Refusal(RefusalCode.CORRUPT, "The decoded image has another size than its header says.")
    return stored


def _stored(frame: bytes, layout: Layout) -> NDArray[Any]:
    colour = layout.samples == 3
    decode = _CODECS.get(layout.syntax)
    lossy = layout.syntax in _BASELINE
    if colour and (lossy or decode is imagecodecs.jpeg_decode):  # as it lies there: the decoder would guess its colours
        decode = partial(imagecodecs.jpeg8_decode, colorspace="RGB", outcolorspace="RGB")
    elif lossy and layout.stored <= 8:
        decode = None
    stored = _by_pydicom(frame, layout) if decode is None else decode(frame)
    if colour:
        ybr = _is_ybr(frame, layout) if lossy else layout.photometric.startswith("YBR_FULL")
        return convert_color_space(stored, "YBR_FULL", "RGB") if ybr and decode is not None else stored
    if stored.dtype.kind == "i" and not layout.signed:
        raise Refusal(
            RefusalCode.CORRUPT, "The header says that there are no negative values, the pixels that there are."
        )
    # an unsigned codestream may hold signed values: the header counts
    bits = _unsigned_bits(frame)
    if layout.signed and bits is not None and bits < layout.stored and stored.max(initial=0) >> (bits - 1):
        why = "The header and the compressed image differ in the bits of a value, and so in which values are negative."
        raise Refusal(RefusalCode.CORRUPT, why)
    return layout.in_range(stored)


def _check_transforms(transforms: set[bool], layout: Layout) -> None:
    """Refuses a codestream whose own colour transform, which the decoder undoes, is not the one of the header.

    Under YBR_FULL what the decoder gives may then be red, green and blue, or not; nothing tells. RGB is what it gives
    either way, and many writers leave that name.

    Source: DICOM PS3.5 8.2.4.
    """
    if layout.photometric != "RGB" and transforms != {layout.photometric in ("YBR_RCT", "YBR_ICT")}:
        raise Refusal(RefusalCode.CORRUPT, _OTHER_COLOURS)


def _is_ybr(frame: bytes, layout: Layout) -> bool:
    """Whether the colours of a lossy JPEG are YBR; refuses one that contradicts its header, or itself.

    Where the codestream says nothing, the header does. RGB may be the name that the image had before it was compressed.

    Source: JFIF 1.02 (always YBR), ITU-T T.872 (Adobe), DICOM PS3.5 8.2.1.
    """
    says = _jpeg_colours(frame)
    if len(says) > 1 or (says == {"RGB"} and layout.photometric != "RGB"):
        raise Refusal(RefusalCode.CORRUPT, _OTHER_COLOURS)
    return says == {"YBR"} or layout.photometric != "RGB"


def _jpeg_colours(frame: bytes) -> set[str]:
    """What the markers of a JPEG, and the names of its components, say of its colours; mostly one word or none."""
    says = set()
    for marker, at in _segments(frame):
        if marker == 0xDA:
            break
        value = frame[at + 4 : at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")]
        if marker == 0xE0 and value.startswith(b"JFIF\0"):
            says.add("YBR")
        if marker == 0xEE and value.startswith(b"Adobe") and len(value) >= 12:
            says.add("RGB" if value[11] == 0 else "YBR")
        if 0xC0 <= marker <= 0xC2 and value[6::3].upper() == b"RGB":
            says.add("RGB")
    return says


def _by_pydicom(frame: bytes, layout: Layout) -> NDArray[Any]:
    made = layout.as_dataset()
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    plugin = "pillow" if layout.syntax in _BASELINE else ""
    return pixel_array(made, decoding_plugin=plugin, correct_unused_bits=layout.samples == 3)  # grey: `in_range` does


def _ended(frame: bytes) -> bool:
    """True if the last marker is the end of the image (EOI, EOC), padding aside."""
    end = frame.rfind(b"\xff\xd9")
    return end >= 0 and not frame[end + 2 :].strip(b"\0\xff")


def _transforms(frame: bytes) -> set[bool]:
    """Whether the tiles of a JPEG 2000 codestream have a colour transform of their own; empty for other codestreams.

    Raises:
        Refusal: The codestream lacks a tile that it declares.

    Source: ITU-T T.800 A.4.2, A.5.1, A.6.1: the word of a tile goes before that of the main header.
    """
    start = _codestream(frame)
    if start is None:
        return set()
    wanted, whole, tiles = 0, False, dict[int, bool]()
    if len(frame) >= start + 40:
        right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", frame, start + 8)
        if min(width, height) > 0 and left < right and top < bottom:
            wanted = -(-(right - left) // width) * -(-(bottom - top) // height)
    at, general = _coding(frame, start + 2, b"\xff\x90")
    while not whole and at + 12 <= len(frame) and frame[at : at + 2] == b"\xff\x90":
        tile, part_bytes = struct.unpack_from(">HI", frame, at + 4)
        _, own = _coding(frame, at + 12, b"\xff\x93")
        tiles[tile] = tiles.get(tile, bool(general)) if own is None else own
        at += max(part_bytes, 12)
        whole = part_bytes == 0 or frame[at : at + 2] == b"\xff\xd9"  # 0: to the end
    if not whole or len(tiles) != wanted or max(tiles) >= wanted:
        raise Refusal(RefusalCode.TRUNCATED, _CUT)
    return set(tiles.values())


def _coding(frame: bytes, at: int, end: bytes) -> tuple[int, bool | None]:
    """Where a header of a JPEG 2000 codestream ends, and whether its COD names a colour transform; None without COD."""
    found = None
    while at + 9 <= len(frame) and frame[at : at + 2] != end:
        if frame[at : at + 2] == b"\xff\x52":
            found = frame[at + 8] != 0
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return at, found


def _codestream(frame: bytes) -> int | None:
    """Where a JPEG 2000 codestream begins; None if this is none."""
    start = frame.find(_SIGNATURE, 0, 4096)
    return start if start == 0 or (start > 0 and frame[4:8] == b"jP  ") else None


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 frame; None if it is none of these.

    Source: ITU-T T.81 B.2.2, T.87 C.2.2, T.800 A.5.1.
    """
    start = _codestream(frame)
    if start is not None:
        right, bottom, left, top = (int.from_bytes(frame[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        return bottom - top, right - left
    at = _frame_header(frame)
    if at is None:
        return None
    return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")


def _unsigned_bits(frame: bytes) -> int | None:
    """Bits of a value in a JPEG, JPEG-LS or JPEG 2000 frame; None for other frames, and where values have a sign."""
    start = _codestream(frame)
    if start is not None:
        depth = int.from_bytes(frame[start + 42 : start + 43], "big")
        return None if depth & 0x80 else depth + 1
    at = _frame_header(frame)
    return None if at is None else frame[at + 4]


def _frame_header(frame: bytes) -> int | None:
    """Where the marker SOF of a JPEG or JPEG-LS frame is; None if it is no such frame."""
    for marker, at in _segments(frame):
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return at if at + 9 <= len(frame) else None
    return None


def _segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG or JPEG-LS frame and where they are; none if it is no such frame.

    Source: ITU-T T.81 B.1.1.
    """
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        yield frame[at + 1], at
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
