"""From the bytes of one file to values that mean something."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, convert_color_space
from pydicom.pixels.utils import pixel_array

MAX_IMAGE_BYTES = 2**29
"""Decoded size of one single-frame file: 16384 x 16384 at 16 bits."""
MAX_FILE_BYTES = 2**32
"""Decoded size of one multi-frame file."""
FREE_BYTES = 2**26
MAX_RATIO = 4096
"""A compressed file may unpack to `FREE_BYTES`, or to this many times its own length."""


_CODECS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    uid.JPEGExtended12Bit: imagecodecs.jpeg_decode,
    uid.JPEGLossless: imagecodecs.jpeg_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpeg_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
    uid.JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    uid.JPEG2000: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLossless: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLosslessRPCL: imagecodecs.jpeg2k_decode,
    uid.HTJ2K: imagecodecs.jpeg2k_decode,
}
_BASELINE = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)


class RefusalCode(StrEnum):
    """Why a file is not used; the codes may be counted and reported, they say nothing about a patient."""

    NOT_DICOM = "not_dicom"
    UNREADABLE = "unreadable"
    DICOMDIR = "dicomdir"
    REPORT = "report"
    DOCUMENT = "document"
    RADIOTHERAPY = "radiotherapy"
    SEGMENTATION = "segmentation"
    SECONDARY_CAPTURE = "secondary_capture"
    LOCALIZER = "localizer"
    MOSAIC = "mosaic"
    CINE = "cine"
    BURNED_IN_TEXT = "burned_in_text"
    UNSUPPORTED_CLASS = "unsupported_class"
    UNSUPPORTED_PIXELS = "unsupported_pixels"
    MISSING_HEADER = "missing_header"
    MISSING_GEOMETRY = "missing_geometry"
    MISSING_PIXELS = "missing_pixels"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    COPY = "copy"
    CONFLICT = "conflict"
    INCOMPLETE = "incomplete"
    SINGLE_SLICE = "single_slice"
    DUPLICATE = "duplicate"
    GAP = "gap"
    TILT = "tilt"
    MIXED_SPACING = "mixed_spacing"
    MIXED_PATIENTS = "mixed_patients"
    NOT_ONE_STACK = "not_one_stack"


class Refusal(Exception):  # noqa: N818  a verdict on a file, caught at the room's border
    """Inside the imaging room: why the file or series at hand is not used. Becomes `Refused` at its border."""

    def __init__(self, code: RefusalCode, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the readers' warnings: they quote values of the header, and a refusal says all that is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.errstate(all="ignore"):
            yield


def check_declared_size(dataset: Dataset, left_bytes: int, *, deflated: bool = False) -> None:
    """Compares what the header declares with what the file can hold, before anything is allocated.

    Args:
        dataset: The header.
        left_bytes: Length of the file from the Pixel Data element on.
        deflated: The whole data set is compressed; `left_bytes` says nothing.

    Raises:
        Refusal: Not an image, cut off, or absurdly large.
    """
    rows, columns, samples, allocated, stored = (
        int(dataset.get(keyword) or 0)
        for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")
    )
    frames = int(dataset.get("NumberOfFrames") or 1)
    high_bit = dataset.get("HighBit")
    if min(rows, columns) < 1 or frames < 1:
        raise Refusal(RefusalCode.MISSING_HEADER, "The header does not say how many rows and columns there are.")
    if samples not in (1, 3) or allocated not in (8, 16, 32) or not 1 <= stored <= allocated:
        raise Refusal(
            RefusalCode.UNSUPPORTED_PIXELS,
            f"Pixels of {samples} sample(s) with {stored} of {allocated} bits are not supported.",
        )
    if high_bit is not None and int(high_bit) != stored - 1:
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "The pixel values do not start at the lowest bit.")
    decoded_bytes = rows * columns * samples * (allocated // 8) * frames
    if decoded_bytes > (MAX_IMAGE_BYTES if frames == 1 else MAX_FILE_BYTES):
        raise Refusal(RefusalCode.TOO_LARGE, f"The header declares {decoded_bytes:,} bytes of pixels, over the limit.")
    if deflated:
        return
    if left_bytes < 8:
        raise Refusal(RefusalCode.MISSING_PIXELS, "The file has a header but no pixels; transfer it again.")
    syntax = uid.UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    if syntax and syntax.is_transfer_syntax and syntax.is_compressed:
        if decoded_bytes > max(FREE_BYTES, MAX_RATIO * left_bytes) or frames * 8 > left_bytes:
            raise Refusal(
                RefusalCode.TOO_LARGE,
                f"The header declares {decoded_bytes:,} bytes of pixels, which {left_bytes:,} bytes cannot hold.",
            )
        return
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
        decoded_bytes = decoded_bytes * 2 // 3
    if left_bytes - 8 < decoded_bytes:
        raise Refusal(
            RefusalCode.TRUNCATED,
            f"The file is cut off: {decoded_bytes:,} bytes of pixels are declared, {max(0, left_bytes - 12):,} are "
            "there; transfer it again.",
        )


def decode(dataset: Dataset, *, projection: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Decodes one single-frame image.

    Modality LUT or rescale of this very file (PET slopes differ from slice to slice) in float64; colour becomes
    luminance (ITU-R BT.601). A VOI LUT Sequence of a projection image is applied: it is the tone curve with which
    the picture was made. Window Center and Width are not: they are a display setting that clips, and the recipe's
    own intensity rule follows. MONOCHROME1 is inverted within the range of Bits Stored, the same map for every
    image of a detector; CT and PET keep their physical values whatever the display polarity.

    Args:
        dataset: A whole single-frame file.
        projection: A picture rather than a slice.

    Returns:
        `values_YX`, finite, and the mask of padding pixels, None without padding; their values are meaningless.

    Raises:
        Refusal: The pixels cannot be decoded or are not supported.

    Source: DICOM PS3.3 C.7.6.3, C.7.5.1.1.2 (padding), C.11.1, C.11.2; PS3.4 N.2.
    """
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise Refusal(RefusalCode.CINE, "A film of many frames; only single images and stacks are used.")
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    _name_syntax(dataset)
    try:
        _check_codestreams(dataset)
        stored = _stored(dataset)
        expected = (int(dataset.Rows), int(dataset.Columns))
        if stored.shape[:2] != expected:
            raise Refusal(RefusalCode.CORRUPT, "The decoded image has another size than its header says.")
        if photometric == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)
        if stored.ndim == 3:
            if not projection:
                raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "A slice in colour is a derived picture, not measured.")
            return (stored[..., :3].astype(np.float64) @ np.array([0.299, 0.587, 0.114])).astype(np.float32), None
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, f"Pixels of the kind {photometric!r} are not supported.")
        padding = padding_mask(stored, dataset)
        values, limits = _modality(stored, dataset)
        if projection and dataset.get("VOILUTSequence"):
            values, limits = _tone_curve(values, dataset)
        if photometric == "MONOCHROME1" and dataset.get("Modality") not in ("CT", "PT"):
            values = limits[0] + limits[1] - values
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            RefusalCode.CORRUPT, "The pixels are damaged and cannot be decoded; transfer it again."
        ) from error
    valid = values if padding is None else values[~padding]
    if not np.isfinite(valid).all():
        raise Refusal(RefusalCode.CORRUPT, "The pixel values are not finite numbers.")
    if valid.size == 0:
        raise Refusal(RefusalCode.CORRUPT, "The image holds padding only.")
    return values.astype(np.float32), padding


def decode_frames(
    dataset: Dataset, order: Sequence[int], transformations: Sequence[Dataset]
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Decodes a multi-frame file.

    Args:
        dataset: A whole file.
        order: Which frame each slice shows.
        transformations: Pixel Value Transformation of each frame, in the order of the file.

    Returns:
        `values_ZYX` and the mask of padding, as `decode`.

    Raises:
        Refusal: The pixels cannot be decoded or are not supported.
    """
    if dataset.get("PhotometricInterpretation") != "MONOCHROME2":
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "Multi-frame images are used in MONOCHROME2 only.")
    _name_syntax(dataset)
    _check_codestreams(dataset)
    stored_FYX = _stored(dataset)
    if stored_FYX.shape != (len(transformations), int(dataset.Rows), int(dataset.Columns)):
        raise Refusal(RefusalCode.CORRUPT, "The decoded frames are not as many or as large as the header says.")
    values_ZYX = np.empty(stored_FYX.shape, dtype=np.float32)
    for z, frame in enumerate(order):
        slope, intercept = _rescale(transformations[frame])
        values_ZYX[z] = stored_FYX[frame].astype(np.float64) * slope + intercept
    if not np.isfinite(values_ZYX).all():
        raise Refusal(RefusalCode.CORRUPT, "The pixel values are not finite numbers.")
    padding_FYX = padding_mask(stored_FYX, dataset)
    return values_ZYX, None if padding_FYX is None else padding_FYX[list(order)]


def fill_padding(values: NDArray[np.float32], padding: NDArray[np.bool_] | None) -> None:
    """Sets padding to the smallest valid value, in place: pixels outside the scanner's circle measured nothing."""
    if padding is not None and padding.any() and not padding.all():
        values[padding] = values[~padding].min()


def padding_mask(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_] | None:
    """Pixels that Pixel Padding Value (and Range Limit) mark as not measured; None if there are none."""
    low = _padding_value(dataset, "PixelPaddingValue")
    if low is None:
        return None
    high = _padding_value(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((low, low if high is None else high))
    mask = (stored >= low) & (stored <= high)  # numpy 2 compares integers beyond the dtype exactly
    return mask if mask.any() else None


def _padding_value(dataset: Dataset, keyword: str) -> int | None:
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    if isinstance(value, bytes):  # explicit VR UN, or ambiguous VR that was not resolved
        value = int.from_bytes(value[:2], "little")
    value = int(value)
    signed, half = bool(dataset.get("PixelRepresentation")), 1 << (int(dataset.BitsAllocated) - 1)
    # GE writes -2000 as US 63536
    return value - 2 * half if signed and value >= half else value


def _modality(stored: NDArray[Any], dataset: Dataset) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Values after the Modality LUT or rescale, and what the smallest and largest stored value would become."""
    bits = int(dataset.BitsStored)
    low = -(1 << (bits - 1)) if dataset.get("PixelRepresentation") else 0
    if dataset.get("ModalityLUTSequence"):
        values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
        top = (1 << int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])) - 1
        return values, (0.0, float(top))
    slope, intercept = _rescale(dataset)
    # float64 before the product: NumPy 2 keeps uint16 * int in uint16 and overflows
    values = stored.astype(np.float64) * slope + intercept
    first, last = low * slope + intercept, (low + (1 << bits) - 1) * slope + intercept
    return values, (min(first, last), max(first, last))


def _rescale(dataset: Dataset) -> tuple[float, float]:
    slope, intercept = (
        default if (value := dataset.get(keyword)) is None or value == "" else float(value)
        for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise Refusal(RefusalCode.CORRUPT, "The rescale slope or intercept is zero or no number.")
    return slope, intercept


def _tone_curve(values: NDArray[np.float64], dataset: Dataset) -> tuple[NDArray[np.float64], tuple[float, float]]:
    whole = np.round(values).astype(np.int32)  # a lookup table is indexed by whole numbers
    curved = np.asarray(apply_voi(whole, dataset), dtype=np.float64)
    return curved, (0.0, float((1 << int(dataset.VOILUTSequence[0].LUTDescriptor[2])) - 1))


def _name_syntax(dataset: Dataset) -> None:
    """Gives a file without file meta the native transfer syntax that its header was read with."""
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        if not little:
            dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        else:
            dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


def _stored(dataset: Dataset) -> NDArray[Any]:
    """Stored values (rows, columns[, 3]) or (frames, rows, columns[, 3]); colour as RGB, unused bits cleared.

    GDCM, pydicom's first choice, ends the whole process on some damaged JPEG files, so it is never asked.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    unpack = _CODECS.get(syntax)
    if unpack is None or (syntax == uid.JPEGExtended12Bit and int(dataset.BitsStored) <= 8):
        return pixel_array(dataset, decoding_plugin="pillow" if syntax in _BASELINE else "")
    colour = int(dataset.SamplesPerPixel) == 3
    if colour and unpack is imagecodecs.jpeg_decode:  # the header, not a guess, says which colours these are
        unpack = partial(imagecodecs.jpeg8_decode, colorspace="RGB", outcolorspace="RGB")
    frames = [unpack(frame) for frame in _frames(dataset)]
    stored = frames[0] if len(frames) == 1 else np.stack(frames)
    if colour:
        ybr = str(dataset.PhotometricInterpretation).startswith("YBR_FULL")
        return convert_color_space(stored, "YBR_FULL", "RGB") if ybr else stored
    # the codestream's own signedness may contradict the header, which counts
    bits = int(dataset.BitsStored)
    values: NDArray[Any] = stored.astype(np.int64) & ((1 << bits) - 1)
    if dataset.get("PixelRepresentation"):
        values[values >= 1 << (bits - 1)] -= 1 << bits
    return values.astype(np.int32 if bits <= 16 else np.int64)


def _frames(dataset: Dataset) -> Iterator[bytes]:
    yield from generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1))


def _check_codestreams(dataset: Dataset) -> None:
    """Refuses a compressed frame that would unpack to another size than the header declares.

    Decoders allocate what the codestream asks for, so a few bytes could ask for gigabytes.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax.is_deflated:
        return
    for frame in _frames(dataset):
        size = codestream_size(frame)
        if size is not None and size != (int(dataset.Rows), int(dataset.Columns)):
            raise Refusal(RefusalCode.CORRUPT, "The compressed image has another size than its header says.")


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 frame; None if it is none of these.

    Source: ITU-T T.81 B.2.2, T.87 C.2.2, T.800 A.5.1.
    """
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC, SIZ; a JP2 box header may come first
    if start >= 0 and (start == 0 or frame[4:8] == b"jP  "):
        right, bottom, left, top = (int.from_bytes(frame[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        return bottom - top, right - left
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
