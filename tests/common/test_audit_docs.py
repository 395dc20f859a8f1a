"""docs/audit.md lists every event that the code can write, with its facts; and the report knows each of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from common import audit_report, chain

ROOT = Path(chain.__file__).parents[1]
TEXT = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
WRITERS = [ROOT / "common" / name for name in ("audit.py", "chain.py")]
"""They write the chain's own events, by their constants."""


def table() -> dict[str, tuple[str, ...]]:
    """Kind to facts."""
    rows = re.findall(r"^\| `([^`]+)` \| [a-z]+ \|([^|]*)\|", TEXT.split("## Every kind of event")[1], re.MULTILINE)
    return {kind: (*re.findall(r"`(\w+)`", facts), *("…" if "…" in facts else "")) for kind, facts in rows}


def literals(node: ast.expr, within: ast.FunctionDef | None = None) -> list[str]:
    """The texts that an expression can be, by assignment in its function too; none if it comes from outside."""
    if isinstance(node, ast.IfExp):
        return [*literals(node.body), *literals(node.orelse)]
    if isinstance(node, ast.Name) and within is not None:
        given = [item for item in ast.walk(within) if isinstance(item, ast.Assign)]
        return [
            text
            for item in given
            for target in item.targets
            if isinstance(target, ast.Name) and target.id == node.id
            for text in literals(item.value)
        ]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def is_log(call: ast.Call) -> bool:
    """A list takes no named arguments, and nobody calls one audit."""
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "append"
        and bool(call.args)
        and (bool(call.keywords) or "audit" in ast.unparse(call.func.value))
    )


def written(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """(kind, named facts) of every event that a module can write."""
    inside: dict[ast.Call, ast.FunctionDef] = {}
    for function in ast.walk(tree):  # outer functions come first, so the innermost one stays
        if isinstance(function, ast.FunctionDef):
            inside |= {call: function for call in ast.walk(function) if isinstance(call, ast.Call)}
    passed_on = {
        function.name: (function, call.args[0].id)
        for call, function in inside.items()
        if is_log(call) and isinstance(call.args[0], ast.Name) and not literals(call.args[0], function)
    }
    for function, kind_name in passed_on.values():  # `def refuse(self, *, kind="recipe refused")`
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
            if argument.arg == kind_name and default is not None:
                yield from ((kind, set()) for kind in literals(default))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if is_log(call):
            facts = {word.arg for word in call.keywords if word.arg is not None}
            yield from ((kind, facts) for kind in literals(call.args[0], inside.get(call)))
        elif (name := ast.unparse(call.func).rpartition(".")[2]) in passed_on:
            function, kind_name = passed_on[name]
            names = [argument.arg for argument in function.args.args if argument.arg != "self"]
            given = dict(zip(names, call.args, strict=False)) | {word.arg: word.value for word in call.keywords}
            yield from ((kind, set()) for kind in (literals(given[kind_name]) if kind_name in given else ()))
    for node in ast.walk(tree) if passed_on else ():  # `yield "node added", {...}`, for a loop that appends
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            kinds, told = node.value.elts
            if isinstance(told, ast.Dict):
                facts = {text for key in told.keys if key is not None for text in literals(key)}
                yield from ((kind, facts) for kind in literals(kinds))


def everything() -> list[tuple[str, str, set[str]]]:
    """(file, kind, facts) of every event in the rooms."""
    files = [path for room in ("client", "server", "common") for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        (path.relative_to(ROOT).as_posix(), kind, facts)
        for path in files
        if path not in WRITERS
        for kind, facts in written(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_the_scan_sees_events_however_they_are_written():
    code = """
def here(kind, found):
    audit.append(kind, **found)
def changes():
    yield "node added", {"site": 1}
def take():
    for kind, facts in changes():
        audit.append(kind, **facts)
def work(self, names):
    here("sites present", names)
    self.audit.append("run resumed" if state else "run started", round=1)
    log.append("recipe approved", by="x")
    names.append("no event")
def refuse(self):
    kind = "plan refused" if self.plan else "recipe refused"
    self._log.append(kind, why="x")
def say(why, *, kind="budget refused"):
    log.append(kind, why=why)
say("no", kind="message refused")
"""
    found = {(kind, tuple(facts)) for kind, facts in written(ast.parse(code))}
    assert found == {
        ("sites present", ()), ("run resumed", ("round",)), ("run started", ("round",)), ("recipe approved", ("by",)),
        ("node added", ("site",)), ("plan refused", ("why",)), ("recipe refused", ("why",)),
        ("budget refused", ()), ("message refused", ()),
    }  # fmt: skip


def test_every_event_that_the_code_writes_is_in_the_table_with_its_facts():
    rows, found = table(), everything()
    kinds = {kind for _, kind, _ in found}
    assert {"update sent", "plan received", "round aggregated", "evaluation received", "run started"} <= kinds
    assert {(file, kind) for file, kind, _ in found if kind not in rows} == set()
    untold = {
        (file, kind, fact)
        for file, kind, facts in found
        if kind in rows and "…" not in rows[kind]
        for fact in facts - set(rows[kind])
    }
    assert untold == set()


def test_every_row_of_the_table_is_written_somewhere():
    chains_own = {chain.STARTED, chain.CONTINUED, chain.CLOCK, chain.KEY}
    assert set(table()) - {kind for _, kind, _ in everything()} - chains_own == set()


def test_the_chains_own_events_are_in_the_table():
    rows = table()
    assert {chain.STARTED, chain.CONTINUED, chain.CLOCK, chain.KEY} <= set(rows)
    assert rows[chain.CONTINUED] == ("part", "events", "head", "public_key")


def test_the_report_has_a_place_for_every_kind_of_the_table():
    groups = (
        audit_report.REFUSALS, audit_report.PEOPLE, audit_report.MEMBERS, audit_report.RUNNING, audit_report.TOLD
    )  # fmt: skip
    known = [kind for group in groups for kind in group]
    assert len(known) == len(set(known))
    assert set(known) == set(table())


def test_every_fault_is_on_the_page():
    section = TEXT.split("## What each kind of tampering looks like")[1].split("\n## ")[0]
    shown = set(re.findall(r"`([a-z -]+)`", section))
    assert set(get_args(chain.Fault)) - shown == {"empty", "not anchored"}  # nothing was done to such logs
