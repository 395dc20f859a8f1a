"""The colours of the pages: told apart by everybody, and seen on their background."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from common.style import CARD, DARK_CARD, DARK_MUTED, DARK_PALETTE, MUTED, PALETTE

SIGHT = {  # linear RGB as it is seen; Machado, Oliveira and Fernandes 2009, severity 1
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _linear(colour: str) -> np.ndarray:
    share = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(TO_XYZ @ np.clip(linear, 1e-3, 1) / TO_XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    dark, light = sorted(TO_XYZ[1] @ _linear(colour) + 0.05 for colour in (one, other))
    return light / dark


def test_black_on_white_has_the_contrast_of_the_standard_and_grey_the_lightness():
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _lab(_linear("#777777")) == pytest.approx([50.03, 0, 0], abs=0.05)


@pytest.mark.parametrize("palette", [PALETTE, DARK_PALETTE], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_colours_of_a_figure_are_told_apart(palette, sight):
    seen = {colour: _lab(SIGHT[sight] @ _linear(colour)) for colour in palette}
    near = {pair: round(float(np.linalg.norm(seen[pair[0]] - seen[pair[1]]))) for pair in combinations(palette, 2)}
    assert min(near.values()) >= 10, sorted(near.items(), key=lambda each: each[1])[:3]


@pytest.mark.parametrize(("palette", "muted", "card"), [(PALETTE, MUTED, CARD), (DARK_PALETTE, DARK_MUTED, DARK_CARD)])
def test_lines_and_small_type_show_on_a_card(palette, muted, card):
    assert min(_contrast(colour, card) for colour in palette) >= 3  # WCAG 2.1, 1.4.11: graphics
    assert _contrast(muted, card) >= 4.5  # 1.4.3: text
