"""Epsilon by hospital and round, and what the audit of the mechanism found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.epsilon import rounded_down, rounded_up
from common.html import Child, Html, join, table, tag
from server.report import RunReport, words

if TYPE_CHECKING:
    from common.privacy_audit import Bound

_ROUNDS = 12
"""Columns at most; of a longer run some rounds are shown, the last always."""


def epsilon_course(report: RunReport) -> Html | None:
    """How epsilon grew."""
    rounds = [line for line in report.rounds if line.epsilon and line.round <= report.recipe.rounds]
    if len(rounds) < 2 or report.recipe.privacy.unsafe_seeded_noise:
        return None
    step = -(-len(rounds) // _ROUNDS)
    shown = [line for at, line in enumerate(rounds, start=1) if at % step == 0 or at == len(rounds)]
    names = sorted({name for line in rounds for name in line.epsilon})
    cells: list[list[Child]] = [
        [name, *(rounded_up(line.epsilon[name]) if name in line.epsilon else "–" for line in shown)] for name in names
    ]
    return table(
        ("Hospital", *(f"round {line.round}" for line in shown)), cells,
        caption="Epsilon spent up to each round, all earlier rounds included (PLD)",
    )  # fmt: skip


def audit_part(report: RunReport) -> Iterator[Html]:
    """Whether anybody tested the mechanism, and what came out."""
    audit, why = report.audit, report.unaudited
    yield tag("h3", "Was the mechanism tested?")
    if audit is None:
        says = why or "there is no privacy audit of it"
        yield tag(
            "p",
            f"Not yet: {says}. Epsilon is a claim about the code; fedicom privacy audit tests it, and fedicom server "
            "export does not release the model before.",
        )
        return
    passed = sum(check.passed for check in audit.checks)
    if why is None:
        verdict: Child = f"Yes, and it passed: {passed} of {len(audit.checks)} checks of the code that trained."
    else:
        verdict = tag("strong", f"Yes, and it does not hold: {why}. Do not release this model.")
    yield tag("p", verdict, *_bound(audit.bound))
    rows: list[list[Child]] = [
        [check.name, "passed" if check.passed else tag("strong", "FAILED"), check.found, check.expected]
        for check in audit.checks
    ]
    inner = table(
        ("Check", "Result", "Found", "Expected"), rows, numbers_from=9,
        caption="Self-tests of noise, clip, draws, secrecy and account, with the recipe and without patients",
    )  # fmt: skip
    yield tag("details", tag("summary", "All checks"), inner)


def _bound(bound: Bound | None) -> tuple[Html, ...]:
    if bound is None:
        return ()
    text = (
        f" An attacker who saw every gradient of {bound.steps} steps guessed right about {bound.right} of "
        f"{bound.guesses} made-up patients, which proves an epsilon of at least {rounded_down(bound.lower)} "
        f"({words.percent(bound.confidence)} confidence); the account of these steps allows {rounded_up(bound.upper)}."
    )
    return (join(text),)
