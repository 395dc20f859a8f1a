"""How a privacy cost is shown: never smaller than it is, and what is left of a budget never larger."""

from __future__ import annotations

import math

_NOISE = 1e-9  # of the arithmetic, in hundredths: 0.07 * 100 is 7.000000000000001


def rounded_up(epsilon: float) -> str:
    """What was or would be spent, with two decimals."""
    hundredths = epsilon * 100
    return f"{math.ceil(hundredths - _NOISE) / 100:.2f}" if math.isfinite(hundredths) else str(epsilon)


def rounded_down(epsilon: float) -> str:
    """What is left, or is proved at least, with two decimals."""
    hundredths = epsilon * 100
    return f"{math.floor(hundredths + _NOISE) / 100:.2f}" if math.isfinite(hundredths) else str(epsilon)
