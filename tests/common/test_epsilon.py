"""A privacy cost on a terminal or a page: never smaller than it is."""

from __future__ import annotations

import math

from rich.console import Console

from client.words import status_shown
from common.epsilon import rounded_down, rounded_up


def test_what_is_spent_is_rounded_up_and_what_is_left_down() -> None:
    assert (rounded_up(7.964), rounded_down(8 - 7.964)) == ("7.97", "0.03")  # together the cap
    assert (rounded_up(7.96), rounded_down(7.96)) == ("7.96", "7.96")
    # times 100: 7.000000000000001 and 28.999999999999996
    assert (rounded_up(0.07), rounded_down(0.29)) == ("0.07", "0.29")
    assert (rounded_up(0.0), rounded_up(1e-4), rounded_down(1e-4)) == ("0.00", "0.01", "0.00")
    assert rounded_up(math.inf) == "inf"
    assert (rounded_up(1e308), rounded_down(1e308)) == ("1e+308", "1e+308")  # times 100: infinite


def test_a_nodes_status_shows_no_less_than_was_spent() -> None:
    console = Console(width=120)
    with console.capture() as shown:
        console.print(status_shown({"epsilon": {"spent": 7.964, "cap": 8.0, "delta": 1e-5}}))
    assert "7.97 of 8 spent, 0.03 left (delta 1e-05)" in shown.get()
