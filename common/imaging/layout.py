"""How a file says its pixels are stored, and whether that can be true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from common.imaging.refusal import Refusal, RefusalCode

MAX_IMAGE_BYTES = 2**29
"""Decoded size of one frame: 16384 x 16384 at 16 bits."""
MAX_FILE_BYTES = 2**32
"""Decoded size of one file, and of one volume in memory."""
FREE_BYTES = 2**26
MAX_RATIO = 64
"""A compressed file may unpack to `FREE_BYTES`, or to this many times its own length."""
UNDEFINED = 0xFFFFFFFF
FLOAT_PIXEL_DATA = (0x7FE00008, 0x7FE00009)
PIXEL_DATA = 0x7FE00010

UNCOMPRESSED = (
    uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)  # fmt: skip
JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
COMPRESSED = (
    uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1,
    uid.JPEGLSLossless, uid.JPEGLSNearLossless, *JPEG_2000,
)  # fmt: skip

LAYOUT_TAGS = (
    "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration", "PixelPaddingValue",
    "PixelPaddingRangeLimit",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Element:
    """Where the pixels are."""

    start: int
    """First byte of the value, in the file or, where that is deflated, in what it unpacks to."""
    length: int
    """As declared; `UNDEFINED` for what is encapsulated."""
    left: int
    """What the file holds from `start` on; the length of the file where it is deflated."""
    words: bool
    """VR OW rather than OB."""
    floating: bool = False
    """Float or Double Float Pixel Data."""
    after: int = 0
    """The tag behind the value of uncompressed pixels; 0: the file ends there, or holds zeros only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Checked: not absurd, and no more than the file can hold."""

    syntax: str
    element: Element
    frames: int
    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    signed: bool
    photometric: str
    planar: int
    padding: tuple[int, int] | None = None
    """Stored values of grey from the first to the second stand for nothing measured."""

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Layout:
        """What `asdict` made of one, back from JSON."""
        padding = plain["padding"] and (int(plain["padding"][0]), int(plain["padding"][1]))
        return cls(**{**plain, "element": Element(**plain["element"]), "padding": padding})

    @property
    def encapsulated(self) -> bool:
        return self.syntax not in UNCOMPRESSED

    @property
    def deflated(self) -> bool:
        return self.syntax == uid.DeflatedExplicitVRLittleEndian

    @property
    def plain(self) -> bool:
        """One whole number a pixel, that lies in the file as it is."""
        grey = self.samples == 1 and self.photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
        return grey and not (self.encapsulated or self.swapped)

    @property
    def swapped(self) -> bool:
        """Bytes lie in words with the wrong end first."""
        return self.syntax == uid.ExplicitVRBigEndian and self.allocated == 8 and self.element.words

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Of one pixel in an uncompressed file."""
        order = ">" if self.syntax == uid.ExplicitVRBigEndian else "<"
        return np.dtype(f"{order}{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def frame_bytes(self) -> int:
        """Of one decoded frame."""
        return self.rows * self.columns * self.samples * (self.allocated // 8)

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest value that Bits Stored allows."""
        low = -(1 << (self.stored - 1)) if self.signed else 0
        return low, low + (1 << self.stored) - 1

    @property
    def beyond(self) -> int | None:
        """Padding where Bits Stored cannot hold it, against the standard: what has all its bits is padding."""
        if self.padding is None or self.padding[0] != self.padding[1] or self.stored == self.allocated:
            return None
        low, high = self.stored_range
        return None if low <= self.padding[0] <= high else self.padding[0]

    def value_range(self, slope: float, intercept: float) -> tuple[float, float]:
        """What the smallest and the largest stored value become."""
        ends = [end * slope + intercept for end in self.stored_range]
        return min(ends), max(ends)

    def in_range(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The lowest Bits Stored bits, with the sign that the header says; a padding value beyond them as it is."""
        width = 8 if self.stored <= 8 else 16 if self.stored <= 16 else 32
        values: NDArray[Any] = stored.astype(f"u{width // 8}", copy=False)
        if self.signed:
            values = values.view(f"i{width // 8}")
        if unused := width - self.stored:  # up and down again: the highest bit kept becomes the sign
            values = values << unused >> unused
        if self.beyond is not None:  # cut down, it would be a value like any other
            whole = stored.astype(self.dtype.newbyteorder("="), copy=False)
            values = np.where(whole == self.beyond, whole, values)
        return values

    def as_dataset(self) -> Dataset:
        """The elements that pydicom needs to decode one frame."""
        made = Dataset()
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = uid.UID(self.syntax)
        made.Rows, made.Columns, made.SamplesPerPixel = self.rows, self.columns, self.samples
        made.BitsAllocated, made.BitsStored, made.HighBit = self.allocated, self.stored, self.stored - 1
        made.PixelRepresentation, made.PhotometricInterpretation = int(self.signed), self.photometric
        if self.samples > 1:
            made.PlanarConfiguration = self.planar
        return made


def layout_of(dataset: Dataset, element: Element | None) -> Layout:
    """Compares what the header declares with what the file can hold, before anything is allocated.

    Args:
        dataset: The header, with its file meta.
        element: Where its pixels are; None: there are none.

    Raises:
        Refusal: Not an image, cut off, or absurdly large.
    """
    if element is not None and element.floating:
        why = "The pixels are floating point numbers, which are not read; export whole numbers with a rescale."
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, why)
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
    signed = dataset.get("PixelRepresentation")
    if signed not in (0, 1):
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "The header does not say whether there are negative values.")
    if high_bit is not None and int(high_bit) != stored - 1:
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "The pixel values do not start at the lowest bit.")
    frame_bytes = rows * columns * samples * (allocated // 8)
    if frame_bytes > MAX_IMAGE_BYTES or frame_bytes * frames > MAX_FILE_BYTES:
        raise Refusal(
            RefusalCode.TOO_LARGE, f"The header declares {frame_bytes * frames:,} bytes of pixels, over the limit."
        )
    if element is None or element.length == 0:
        raise Refusal(RefusalCode.MISSING_PIXELS, "The file has a header but no pixels; transfer it again.")
    syntax = native_syntax(dataset)
    if syntax not in UNCOMPRESSED + COMPRESSED:
        name = uid.UID(syntax).name
        what = "an unknown way" if name == syntax else name
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, f"The pixels are stored in {what}, which is not read.")
    layout = Layout(
        syntax=syntax,
        element=element,
        frames=frames,
        rows=rows,
        columns=columns,
        samples=samples,
        allocated=allocated,
        stored=stored,
        signed=bool(signed),
        photometric=str(dataset.get("PhotometricInterpretation", "")),
        planar=int(dataset.get("PlanarConfiguration") or 0),
    )
    if samples == 3:
        _check_colour(layout, dataset)
    _check_length(layout, frame_bytes * frames)
    grey = samples == 1 and layout.photometric != "PALETTE COLOR"
    return replace(layout, padding=_padding_range(dataset, layout)) if grey else layout


def _check_colour(layout: Layout, dataset: Dataset) -> None:
    """Refuses colours that would be taken for others (PS3.3 C.7.6.3.1.2 and C.7.6.3.1.3)."""
    known = layout.photometric in ("RGB", "YBR_FULL", "YBR_FULL_422")
    if layout.signed or not (known or (layout.photometric in ("YBR_RCT", "YBR_ICT") and layout.syntax in JPEG_2000)):
        raise _of_a_kind(layout)
    if layout.stored > 8 and layout.photometric.startswith("YBR_FULL"):
        why = f"Colours in YBR of {layout.stored} bits are not supported; export them in RGB, or in 8 bits."
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, why)
    if not layout.encapsulated and dataset.get("PlanarConfiguration") not in (0, 1):
        why = "The header does not say whether colours lie pixel by pixel or one behind the other."
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, why)


def _check_length(layout: Layout, decoded_bytes: int) -> None:
    length, left = layout.element.length, layout.element.left
    if layout.photometric == "YBR_FULL_422" and not layout.encapsulated:
        decoded_bytes = decoded_bytes * 2 // 3
    needed = 0 if layout.encapsulated else decoded_bytes
    # the byte that makes the length even carries nothing
    if length != UNDEFINED and not layout.deflated and (needed > left or length - needed % 2 > left):
        raise Refusal(
            RefusalCode.TRUNCATED,
            f"The file is cut off: {max(length, needed):,} bytes of pixels are declared, {left:,} are there; "
            "transfer it again.",
        )
    if layout.encapsulated or layout.deflated:
        packed = left if layout.deflated or length == UNDEFINED else length
        if decoded_bytes > max(FREE_BYTES, MAX_RATIO * packed) or (layout.encapsulated and layout.frames * 8 > packed):
            raise Refusal(
                RefusalCode.TOO_LARGE,
                f"The header declares {decoded_bytes:,} bytes of pixels, which {packed:,} bytes cannot hold.",
            )
    if layout.encapsulated:
        return
    if length == UNDEFINED:
        raise Refusal(RefusalCode.CORRUPT, "The header says that the pixels are not compressed, but they are.")
    check_behind(layout.element.after)
    if not decoded_bytes <= length <= decoded_bytes + decoded_bytes % 2:  # a wrong size would shear the picture
        raise Refusal(
            RefusalCode.CORRUPT,
            f"{decoded_bytes:,} bytes of pixels are declared, but {length:,} follow; send it again.",
        )


def check_behind(tag: int) -> None:
    """Refuses a file that goes on with another data set: other readers take the last of two images.

    Args:
        tag: What comes behind the pixels; 0: nothing.
    """
    if 0 < tag <= PIXEL_DATA:
        why = "Behind its pixels the file holds a piece of another image; transfer it again."
        raise Refusal(RefusalCode.CORRUPT, why)


def need_grey(layout: Layout) -> None:
    """Refuses what is not one grey value a pixel."""
    if layout.samples != 1 or layout.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise _of_a_kind(layout)


def _of_a_kind(layout: Layout) -> Refusal:
    return Refusal(RefusalCode.UNSUPPORTED_PIXELS, f"Pixels of the kind {layout.photometric[:32]!r} are not supported.")


def _padding_range(dataset: Dataset, layout: Layout) -> tuple[int, int] | None:
    """Pixel Padding Value and Range Limit, the smaller one first."""
    low, high = (
        _padding_value(dataset, keyword, layout) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    )
    if low is None:
        return None
    if high is None and low < 0 and not layout.signed:  # written with a sign that the pixels lost: the same bits
        low += 1 << layout.allocated
    high = low if high is None else high
    return min(low, high), max(low, high)


def _padding_value(dataset: Dataset, keyword: str, layout: Layout) -> int | None:
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    if isinstance(value, bytes):  # explicit VR UN, or ambiguous VR that was not resolved
        value = int.from_bytes(value[:2], "little")
    try:
        value, half = int(value), 1 << (layout.allocated - 1)
    except (TypeError, ValueError):
        raise Refusal(RefusalCode.CORRUPT, "The value of padding pixels is no single number; export again.") from None
    # GE writes -2000 as US 63536
    return value - 2 * half if layout.signed and value >= half else value


def native_syntax(dataset: Dataset) -> str:
    """Transfer Syntax UID; that of a file without file meta is what its header was read with."""
    named = str(getattr(dataset, "file_meta", Dataset()).get("TransferSyntaxUID") or "")
    if named:
        return named
    implicit, little = dataset.original_encoding
    if not little:
        return str(uid.ExplicitVRBigEndian)
    return str(uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian)
