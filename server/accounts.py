"""What a site says it spent, computed once more from the terms that it told, by two other accountants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.accounting import Event, epsilon_prv, epsilon_rdp
from common.exchange import Spent

_MOST_WORK = 1e4
"""Of the PRV accountant: about a minute, and a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class CrossChecks:
    """The cost of a site's terms."""

    prv: float | None
    """None where it would take the machine for long: no training comes there, but a site that lies may."""
    rdp: float


def cross_checks(spent: Spent | None) -> CrossChecks | None:
    """Epsilon by two accountants from the noise, rate and steps that a site told, beside what it says itself.

    Of equal steps: where a site's numbers changed during a run, those told last stand for all.
    """
    if spent is None or not spent.noise_multiplier or not spent.steps:
        return None
    event = Event(noise_multiplier=spent.noise_multiplier, sampling_rate=spent.sampling_rate, steps=spent.steps)
    rdp = epsilon_rdp([event], spent.delta)
    # Its grid covers the losses in steps as fine as the root of their number.
    bearable = (3 + rdp) * math.sqrt(spent.steps) <= _MOST_WORK
    return CrossChecks(prv=epsilon_prv([event], spent.delta) if bearable else None, rdp=rdp)
