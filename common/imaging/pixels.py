"""From the bytes of one file to values that mean something."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.utils import pixel_array

from common.imaging import worker
from common.imaging.frames import MultiFrame
from common.imaging.header import PHYSICAL, inflatable_meta, inflate
from common.imaging.layout import Layout, need_grey
from common.imaging.refusal import Refusal, RefusalCode
from common.imaging.single import Single, read_single

_DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4")
_EXACT = 2.0**23
"""Whole numbers up to twice this are exact in float32."""


def decode(path: Path, *, projection: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Decodes one single-frame image.

    Modality LUT or rescale of this very file (PET slopes differ from slice to slice) in float64; colour becomes
    luminance (ITU-R BT.601) from 0 to 255, however many bits a colour has. A VOI LUT Sequence of a projection image is
    applied: it is the tone curve with which the picture was made. Window Center and Width are not: they are a display
    setting that clips, and the recipe's own intensity rule follows. MONOCHROME1 is inverted within the range of Bits
    Stored, the same map for every image of a detector; CT and PET keep their physical values whatever the display
    polarity.

    Args:
        path: A single-frame file.
        projection: A picture rather than a slice.

    Returns:
        `values_YX`, finite, and the mask of padding pixels, None without padding; their values are meaningless.

    Raises:
        Refusal: The pixels cannot be decoded or are not supported.

    Source: DICOM PS3.3 C.7.6.3, C.7.5.1.1.2 (padding), C.11.1, C.11.2; PS3.4 N.2.
    """
    found = read_single(path, projection=projection)
    layout = found.layout
    inverted = _inverted(layout, found.modality)
    if inverted and not projection and (found.modality_lut is not None or found.scale != (1, 0)):
        # might differ from slice to slice
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "A slice that is inverted and has a scale of its own.")
    (stored,) = stored_frames(path, layout, [0])
    if found.colour:
        return _luminance(stored, found), None
    values: NDArray[np.floating[Any]]
    if found.modality_lut is None:
        values, limits = _line(stored, layout, *found.scale), layout.value_range(*found.scale)
    else:
        values, limits = found.modality_lut(stored).astype(np.float32), found.modality_lut.limits
    if found.tone_curve is not None:
        values, limits = found.tone_curve(values).astype(np.float32), found.tone_curve.limits
    if inverted:
        values = sum(limits) - values
    return _checked(values, _padding_mask(stored, layout.padding))


def _checked(
    values: NDArray[np.floating[Any]], padding: NDArray[np.bool_] | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    singles = values.astype(np.float32, copy=False)
    valid = singles if padding is None else singles[~padding]
    if not np.isfinite(valid).all():
        raise Refusal(RefusalCode.CORRUPT, "The pixel values are not finite numbers.")
    return singles, padding


def _luminance(stored: NDArray[Any], found: Single) -> NDArray[np.float32]:
    if found.palette:
        colours = ((table(stored), table.limits[1]) for table in found.palette)
    else:
        largest = float((1 << found.layout.stored) - 1)
        colours = ((found.layout.in_range(stored[..., channel]), largest) for channel in range(3))
    grey = np.zeros(stored.shape[:2], dtype=np.float64)  # colour by colour: all three in float64 are 24 times the file
    for (values, largest), weight in zip(colours, (0.299, 0.587, 0.114), strict=True):
        grey += 255 / largest * weight * values.astype(np.float64)
    return grey.astype(np.float32)


def decode_frames(path: Path, order: Sequence[int], found: MultiFrame, modality: str) -> NDArray[np.float32]:
    """Decodes frames of a multi-frame file.

    Args:
        path: The file.
        order: Which frame each slice shows.
        found: What the header says of all frames.
        modality: Decides whether MONOCHROME1 is a way of display.

    Returns:
        `values_ZYX`, finite, as `decode` and `fill_padding` give them; MONOCHROME1 is inverted in the range of all
        slices together.

    Raises:
        Refusal: The pixels cannot be decoded, are not supported, or are padding only.
    """
    layout = found.layout
    need_grey(layout)
    slice_of = {frame: z for z, frame in enumerate(order)}
    values_ZYX = np.empty((len(order), layout.rows, layout.columns), dtype=np.float32)
    padding_ZYX: NDArray[np.bool_] | None = None
    limits: list[float] = []
    for frame, stored in zip(sorted(order), stored_frames(path, layout, sorted(order)), strict=True):
        slope, intercept = found.frames[frame].slope, found.frames[frame].intercept
        z = slice_of[frame]
        values_ZYX[z] = _line(stored, layout, slope, intercept)
        limits.extend(layout.value_range(slope, intercept))
        padding_YX = _padding_mask(stored, layout.padding)
        if padding_YX is not None:
            if padding_ZYX is None:
                padding_ZYX = np.zeros(values_ZYX.shape, dtype=np.bool_)
            padding_ZYX[z] = padding_YX
    if not np.isfinite(values_ZYX).all():
        raise Refusal(RefusalCode.CORRUPT, "The pixel values are not finite numbers.")
    if _inverted(layout, modality):
        np.subtract(min(limits) + max(limits), values_ZYX, out=values_ZYX)
    fill_padding(values_ZYX, padding_ZYX)
    return values_ZYX


def fill_padding(values: NDArray[np.float32], padding: NDArray[np.bool_] | None) -> None:
    """Sets padding to the smallest valid value, in place: pixels outside the scanner's circle measured nothing.

    Raises:
        Refusal: There is nothing else. A single slice of padding is none: the ends of a reformatted volume have such.
    """
    if padding is None or not padding.any():
        return
    if padding.all():
        raise Refusal(RefusalCode.CORRUPT, "The image holds padding only.")
    values[padding] = values[~padding].min()


def _padding_mask(stored: NDArray[Any], padding: tuple[int, int] | None) -> NDArray[np.bool_] | None:
    """Pixels that were not measured; None if there are none."""
    if padding is None:
        return None
    low, high = padding
    mask = (stored >= low) & (stored <= high)  # numpy 2 compares integers beyond the dtype exactly
    return mask if mask.any() else None


def _inverted(layout: Layout, modality: str) -> bool:
    return layout.photometric == "MONOCHROME1" and modality not in PHYSICAL


# --- stored values


def stored_frames(path: Path, layout: Layout, frames: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Stored values (rows, columns[, 3]) of the frames, which are in growing order; unused bits cleared, colour as RGB.

    Raises:
        Refusal: They cannot be decoded.
    """
    if layout.encapsulated:
        yield from _unpacked(path, layout, frames)
        return
    if layout.frames != 1 and not layout.plain:
        raise Refusal(RefusalCode.UNSUPPORTED_PIXELS, "Frames in colour or in swapped bytes are not supported.")
    count = _native_bytes(layout)
    with path.open("rb") as file:
        pieces = _inflated(file, layout, frames, count) if layout.deflated else _from_file(file, layout, frames, count)
        for raw in pieces:
            if len(raw) < count:
                raise Refusal(RefusalCode.TRUNCATED, "The file is cut off; transfer it again.")
            yield _native(raw, layout)


def _native_bytes(layout: Layout) -> int:
    """Of one uncompressed frame."""
    count = layout.frame_bytes * 2 // 3 if layout.photometric == "YBR_FULL_422" else layout.frame_bytes
    # swapped in pairs, the byte that makes the length even is not the last one
    return count + count % 2 if layout.swapped else count


def _from_file(file: BinaryIO, layout: Layout, frames: Sequence[int], count: int) -> Iterator[bytes]:
    for frame in frames:
        file.seek(layout.element.start + frame * count)
        yield file.read(count)


def _inflated(file: BinaryIO, layout: Layout, frames: Sequence[int], count: int) -> Iterator[bytes]:
    if inflatable_meta(file) is None:
        raise Refusal(RefusalCode.CORRUPT, "The file changed while it was read.")
    blocks = inflate(file, layout.element.start + layout.frames * count)
    held, at = bytearray(), 0
    for frame in frames:
        start = layout.element.start + frame * count
        while at + len(held) < start + count and (block := next(blocks, b"")):
            held += block
            ahead = min(len(held), max(0, start - at))
            at += ahead
            del held[:ahead]
        yield bytes(held[start - at : start - at + count])


def _native(raw: bytes, layout: Layout) -> NDArray[Any]:
    if layout.plain:
        stored = np.frombuffer(raw, layout.dtype, layout.rows * layout.columns).reshape(layout.rows, layout.columns)
        return layout.in_range(stored)
    made = layout.as_dataset()
    made.PixelData = raw + b"\0" * (len(raw) % 2)
    made["PixelData"].VR = "OW" if layout.element.words else "OB"
    return pixel_array(made)


def _unpacked(path: Path, layout: Layout, frames: Sequence[int]) -> Iterator[NDArray[Any]]:
    most = layout.rows * layout.columns * layout.samples * 4
    file_bytes = path.stat().st_size
    limits = worker.Limits.pixels(file_bytes, layout.frame_bytes * layout.frames, most)
    shape = (layout.rows, layout.columns, *((3,) if layout.samples == 3 else ()))
    parts = worker.ask("unpack", limits, path=os.fspath(path), layout=asdict(layout), frames=list(frames))
    count = 0
    for head, raw in parts:
        if head.get("dtype") not in _DTYPES or tuple(head.get("shape") or ()) != shape:
            raise Refusal(RefusalCode.CORRUPT, "The decoded image is not what its header says.")
        count += 1
        yield np.frombuffer(raw, head["dtype"]).reshape(shape)
    if count != len(frames):
        raise Refusal(RefusalCode.CORRUPT, "The file holds fewer frames than its header says.")


# --- values


def _line(stored: NDArray[Any], layout: Layout, slope: float, intercept: float) -> NDArray[np.floating[Any]]:
    whole = slope.is_integer() and intercept.is_integer()
    exact = whole and 2.0**layout.stored * abs(slope) + abs(intercept) <= _EXACT
    # float64 where it matters; and never the stored type: NumPy 2 keeps uint16 * int in uint16 and overflows
    values: NDArray[np.floating[Any]] = stored.astype(np.float32 if exact else np.float64)
    if slope != 1:
        values *= slope
    if intercept != 0:
        values += intercept
    return values
