"""Which images are the same, and which nearly so."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

BITS = 128
THRESHOLD = 10
"""Largest Hamming distance of near duplicates.

Measured (docs/quality.md): of the 2.1 million pairs of 2,049 chest X-rays, which look all alike, none of different
patients lies this near; copies that went through JPEG, noise, a smaller matrix or another tone curve nearly all do.
64 bits with a threshold of 6 gave one false pair in ten thousand.
"""
_EDGE = {2: 32, 3: 16}
"""Pixels along each axis before the cosine transform."""
_BANDS = THRESHOLD + 2


def pixel_digest(values: npt.NDArray[np.float32]) -> str:
    """SHA-256 of decoded values and shape: the same for one image in two transfer syntaxes or under two UIDs."""
    head = f"{values.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def perceptual_hash(values: npt.NDArray[np.float32]) -> Words:
    """(2,) words, 128 bits: which of the lowest frequencies of the cosine transform lie above their median.

    Brightness, contrast and size of the matrix change few bits; a mirrored or turned image has another hash.

    Args:
        values: 2D image or 3D volume.

    Source: the DCT hash of Zauner 2010, with 128 coefficients, for any number of dimensions.
    """
    from scipy.fft import dctn  # a sixth of a second, and most starts hash no image

    edge = _EDGE[values.ndim]
    small = shrunk(values, (edge,) * values.ndim)
    chosen = dctn(small, norm="ortho")[_lowest(values.ndim)]
    bits = chosen > np.median(chosen)
    return np.packbits(bits).view(">u8").astype(np.uint64)


def shrunk(values: npt.NDArray[np.floating], size: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Means over equal parts of each axis; pixels on a border count for both sides by their share."""
    out = values.astype(np.float32)
    for axis, wanted in enumerate(size):
        length = out.shape[axis]
        if length == wanted:
            continue
        # the integral along the axis, read at the borders of the parts
        first = np.zeros_like(np.take(out, [0], axis))
        integral = np.concatenate([first, np.cumsum(out, axis=axis, dtype=np.float64)], axis=axis)
        borders = np.linspace(0, length, wanted + 1)
        low = np.floor(borders).astype(int)
        high = np.minimum(low + 1, length)
        shape = [-1 if at == axis else 1 for at in range(out.ndim)]
        share = (borders - low).reshape(shape)
        at = np.take(integral, low, axis) * (1 - share) + np.take(integral, high, axis) * share
        out = (np.diff(at, axis=axis) * (wanted / length)).astype(np.float32)
    return out


def distance(a: Words, b: Words) -> npt.NDArray[np.int64]:
    """Hamming distance of hashes (..., 2)."""
    counts: npt.NDArray[np.int64] = np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)
    return counts


def near_pairs(hashes_N2: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every pair of different hashes within `THRESHOLD`, found without comparing all with all.

    The bits are cut into THRESHOLD + 2 bands. Two hashes that differ in THRESHOLD bits agree in at least two bands,
    so looking into tables by each pair of bands finds all of them, and little else. Of equal hashes only the
    first is compared, and each of the others is a pair with the first.

    Args:
        hashes_N2: Of `perceptual_hash`.

    Returns:
        Pairs (M, 2) of rows, ascending, and their distance (M,).
    """
    unique_U2, first_U, of_N = np.unique(hashes_N2, axis=0, return_index=True, return_inverse=True)
    bands_UB = _bands(unique_U2)
    found: set[tuple[int, int]] = set()
    for one, other in combinations(range(_BANDS), 2):
        key_U = bands_UB[:, one] << 16 | bands_UB[:, other]
        order = np.argsort(key_U, kind="stable")
        sorted_U = key_U[order]
        start, step = np.arange(len(order)), 1
        while True:
            start = start[start + step < len(order)]
            start = start[sorted_U[start] == sorted_U[start + step]]
            if not len(start):
                break
            a, b = order[start], order[start + step]
            close = distance(unique_U2[a], unique_U2[b]) <= THRESHOLD
            low, high = np.minimum(a[close], b[close]), np.maximum(a[close], b[close])
            found.update(zip(low.tolist(), high.tolist(), strict=True))
            step += 1
    of_N = of_N.reshape(-1)
    again = np.flatnonzero(first_U[of_N] != np.arange(len(hashes_N2)))
    pairs = [(int(first_U[a]), int(first_U[b])) for a, b in found]
    pairs += [(int(first_U[of_N[row]]), int(row)) for row in again]
    pairs_M2 = np.array(sorted((min(pair), max(pair)) for pair in pairs), np.int64).reshape(-1, 2)
    return pairs_M2, distance(hashes_N2[pairs_M2[:, 0]], hashes_N2[pairs_M2[:, 1]])


def _bands(hashes_N2: Words) -> npt.NDArray[np.int64]:
    """(N, bands): the bits of each band as a number below 2^11."""
    bits = np.unpackbits(hashes_N2.astype(">u8").view(np.uint8).reshape(len(hashes_N2), -1), axis=1).astype(np.int64)
    parts = np.array_split(np.arange(BITS), _BANDS)
    return np.stack([bits[:, part] @ (1 << np.arange(len(part))) for part in parts], axis=1)


@cache
def _lowest(dimensions: int) -> tuple[npt.NDArray[np.int64], ...]:
    """The 128 coefficients of the lowest frequencies but the mean, which is brightness."""
    edge = 18 if dimensions == 2 else 10
    every = np.indices((edge,) * dimensions).reshape(dimensions, -1).T.tolist()
    chosen = sorted(every, key=lambda index: (sum(index), index))[1 : BITS + 1]
    return tuple(np.array(chosen).T)
