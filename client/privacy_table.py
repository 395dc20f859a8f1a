"""A privacy audit on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.epsilon import rounded_down, rounded_up
from common.privacy_audit import PrivacyAudit


def show_audit(found: PrivacyAudit, console: Console) -> None:
    """The checks as a table, then the verdict."""
    title = f"Privacy audit of {found.recipe} {found.recipe_id[:12]}"
    table = Table("", "check", "found", "expected", title=title, title_justify="left")
    for check in found.checks:
        table.add_row(_sign(check.passed), Text(check.name), Text(check.found), Text(check.expected))
    bound = found.bound
    if bound is not None:
        says = f"epsilon is at least {rounded_down(bound.lower)}: {bound.right} of {bound.guesses} guesses right about "
        says += f"{bound.canaries} canaries"
        table.add_row(
            _sign(bound.passed), f"one-run audit, {bound.steps} steps", says,
            f"at most {rounded_up(bound.upper)} (PLD of the same steps); {100 * bound.confidence:g} % confidence",
        )  # fmt: skip
    console.print(table)
    alarm = sum(check.false_alarm for check in found.checks)
    if found.passed:
        line = f"Passed. An honest mechanism fails one audit in {1 / max(alarm, 1e-9):,.0f} by chance"
        line += ", the one-run audit one in 20 at most." if bound is not None else "."
        console.print(line, style="green", highlight=False)
    else:
        console.print(f"FAILED: {', '.join(found.failed)}. Do not train or release with this.", style="bold red")


def _sign(passed: bool) -> Text:
    return Text("ok", "green") if passed else Text("FAIL", "bold red")
