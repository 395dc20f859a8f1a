"""What a site says it spent, computed once more from the terms that it told, by three accountants."""

from __future__ import annotations

from common.accounting import Accounts, Event, accounts
from common.exchange import Spent


def cross_checks(spent: Spent | None) -> Accounts | None:
    """Epsilon by three accountants from the noise, rate and steps that a site told, beside what it says itself.

    Of equal steps: where a site's numbers changed during a run, those told last stand for all.
    """
    if spent is None or not spent.noise_multiplier or not spent.steps:
        return None
    event = Event(noise_multiplier=spent.noise_multiplier, sampling_rate=spent.sampling_rate, steps=spent.steps)
    return accounts([event], spent.delta)
