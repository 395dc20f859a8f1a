"""`fedicom audit`: check the signed logs of a federation, report on them, and trace a model through them; offline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.epsilon import rounded_up
from common.errors import ConfigError, FedicomError
from common.printable import number_of, printable
from common.storage import named_file, named_path, page_with_json, storing

if TYPE_CHECKING:
    from common.chain import AuditError
    from common.lineage import Lineage
    from common.logs import Check, Keys, Log

_SHOWN = 8
_MOST_S = 1e9


def audit_verb(words: Sequence[str]) -> int:
    """`fedicom audit verify|report|trace`."""
    parser = argparse.ArgumentParser(prog="fedicom audit", description="Check the signed logs of a run, offline.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{verify,report,trace}", help="what to do")
    verify = verbs.add_parser(
        "verify",
        help="is a log whole, alone and beside the other side's; names the first bad event",
        description="Check one log: numbers, hashes, chain, signatures and times, and with --against that the other "
        "side remembers the same. Exit code 1, and the first bad event, when it does not hold.",
    )
    verify.add_argument(
        "log", type=_one_log, help="for example audit/north.jsonl; its earlier parts are found beside it"
    )
    verify.add_argument(
        "--against", type=_one_log, nargs="+", default=[], metavar="LOG",
        help="logs of the other side, which remembers heads of this one",
    )  # fmt: skip
    verify.add_argument("--key", metavar="HEX", help="public key that signs the log now, 64 hexadecimal digits")
    _shared(verify)
    report = verbs.add_parser(
        "report",
        help="one HTML page and JSON: who trained what, on whose word, and what left",
        description="Check all logs against each other, and write what they tell as a page and as JSON. Exit code 1 "
        "when anything does not hold.",
    )
    report.add_argument("logs", type=_logs, nargs="+", metavar="RUN_DIR_OR_LOG", help="folder of a run, or logs")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write, or a folder (default: audit_report.html in the folder of the run)",
    )
    _shared(report)
    trace = verbs.add_parser(
        "trace",
        help="from a model file to recipe, rounds, sites, data manifests and code",
        description="Go from a model file back through the logs; each link is checked. Exit code 1 where one is "
        "missing or does not fit.",
    )
    trace.add_argument("model", type=named_file, help="model.onnx or another export of the run")
    trace.add_argument("--logs", type=_logs, required=True, nargs="+", metavar="DIR", help="folder of logs, or logs")
    _shared(trace)
    arguments = parser.parse_args(words)
    if not 0 <= arguments.tolerance <= _MOST_S:  # nan is neither
        parser.error(f"--tolerance: got {arguments.tolerance:g}, expected 0 to {_MOST_S:g} seconds")
    return {"verify": _verify, "report": _report, "trace": _trace}[arguments.verb](arguments)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--registry", type=named_file, metavar="FILE", help="the federation's registry: the keys of all sides"
    )
    parser.add_argument(
        "--authority", metavar="HEX",
        help="public key that signed the registry (default: authority.pub beside it, else the registry's own word)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=300.0, metavar="SECONDS", help="how far clocks may disagree (default: 300)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _one_log(word: str) -> Path:
    path = _logs(word)
    if path.is_dir():
        from common.logs import log_files

        found = [str(file) for file in log_files(path)]
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError(f"{path} is a folder, expected one log; in it: {', '.join(found[:_SHOWN])}{more}")
    return path


def _logs(word: str) -> Path:
    """A folder, or a log; after a crash in a rotation only its earlier parts may be there."""
    from common.chain import part

    path = Path(word)
    # ".", "/" and "" have no name that a part could carry
    return path if path.name and part(path, 1).exists() else named_path(path)


def _verify(arguments: argparse.Namespace) -> int:
    from common.chain import AuditError

    if arguments.key is not None and arguments.registry is not None:
        raise ConfigError("--key and --registry: both say who must have signed; give one of them")
    try:
        lines, plain = _verified(arguments)
    except AuditError as error:
        if not arguments.json:
            raise
        _print(json.dumps({"verified": False, "log": arguments.log.name, "first_bad": _bad(error)}, indent=1))
        return 1
    if arguments.json:
        _print(json.dumps({"verified": True, **plain}, indent=1))
    else:
        _say(lines)
    return 0


def _verified(arguments: argparse.Namespace) -> tuple[list[str], Mapping[str, Any]]:
    from common.chain import CLOCK, AuditError, verify
    from common.logs import check_pair, read_logs

    if arguments.key is not None:
        verify(arguments.log, arguments.key, tolerance_s=arguments.tolerance)
    named = [arguments.log, *arguments.against]
    if len({path.resolve() for path in named}) < len(named):  # read once it would be held against nothing
        raise ConfigError("a log is named twice; --against takes logs of the other side, each once")
    keys, warnings = _keys(arguments)
    logs = read_logs(named, keys, tolerance_s=arguments.tolerance)
    log, *others = sorted(logs, key=lambda log: named.index(log.path))
    for each in (log, *others):
        if each.wrong is not None:
            raise each.wrong
    lines = [
        f"{_whose(log)}: {number_of(len(log.events), 'event')}, chain and signatures hold"
        + (f"; {number_of(log.parts, 'earlier part')}" if log.parts else "")
    ]
    checks: list[Check] = []
    for other in others:
        if {log.role, other.role} != {"coordinator", "site"}:
            raise AuditError(
                f"it is a log of the {log.role}, {other.path.name} one of the {other.role}; only a coordinator and its "
                "sites remember each other's heads", "not anchored", log=log.path.name,
            )  # fmt: skip
        checks.append(check_pair(log, other, arguments.tolerance, needed=True))
        checks.append(check_pair(other, log, arguments.tolerance))
        lines += [_told(log, other, checks[-2]), _told(other, log, checks[-1])]
    if moved := sum(event.kind == CLOCK for event in log.events):
        warnings.append(f"The clock moved back {number_of(moved, 'time')}, as the log says itself.")
    if arguments.key is None and not log.key_known:
        warnings.append("The key was taken from the log itself: give --key or --registry to check who signed it.")
    if log.role == "authority":
        warnings.append("Nobody else remembers the authority's log: cut, or written anew by it, it still holds.")
    elif not others:
        warnings.append("Events cut off at the end, or a log written anew by its owner, are found with --against only.")
    plain = {
        "log": log.path.name, "name": log.name, "events": len(log.events), "parts": log.parts, "key": log.key,
        "against": [_plain(check) for check in checks], "warnings": warnings,
    }  # fmt: skip
    return [*lines, *warnings], plain


def _whose(log: Log) -> str:
    """The file, and whose log it is where its name says another: who puts one log in another's place moves no byte."""
    name = "the authority" if log.role == "authority" else log.name
    return log.path.name if log.path.stem == log.name else f"{log.path.name}, which is the log of {name}"


def _told(log: Log, other: Log, check: Check) -> str:
    if not check.anchors:
        return f"{other.path.name} remembers no head of {log.path.name} yet"
    behind = log.events[-1].number - (check.vouched or 0)
    last = "event" if behind == 1 else f"{behind} events"
    after = f"; it does not vouch for the last {last}" if behind else ""
    heads = number_of(check.anchors, "head")
    return f"{other.path.name} remembers {heads} of {log.path.name}, all of them there and in time{after}"


def _report(arguments: argparse.Namespace) -> int:
    from common.audit_report import account, write_account
    from common.lineage import unvouched
    from common.logs import read_logs

    folder = next((path for path in arguments.logs if path.is_dir()), Path())
    out = page_with_json(arguments.out or folder, "audit_report.html")
    keys, warnings = _keys(arguments)
    logs = read_logs(arguments.logs, keys, tolerance_s=arguments.tolerance)
    told = account(logs, _recipes(arguments.logs), tolerance_s=arguments.tolerance)
    beside = write_account(told, out)
    if arguments.json:
        _print(told.json.decode().rstrip())
    else:
        words = {"verified": "verified", "alone": "each log holds alone, not all against the other side"}
        verdict = f"{number_of(len(logs), 'log')}: {words.get(told.state, 'NOT verified')}"
        bad = [check.why for check in told.checks if not check.holds]
        notes = [
            f"The log of {name} is not there; what it did is told by the coordinator alone." for name in told.absent
        ]
        notes += [f"Left a site, and not in the coordinator's log: {what}." for what in told.untold]
        if told.state == "verified":
            notes += [f"Not vouched for: {what}." for what in unvouched(logs, told.checks)]
        broken = [why for story in told.stories for why in story.broken if not bad]
        _say([verdict, *bad, *broken, *notes, *warnings, f"{out}", f"{beside}"])
    return 1 if told.state == "broken" or any(story.broken for story in told.stories) else 0


def _trace(arguments: argparse.Namespace) -> int:
    from common.lineage import trace
    from common.logs import read_logs

    keys, warnings = _keys(arguments)
    try:
        logs = read_logs(arguments.logs, keys, tolerance_s=arguments.tolerance)
        found = trace(arguments.model, logs, tolerance_s=arguments.tolerance)
    except FedicomError as error:
        if not arguments.json:
            raise
        _print(json.dumps({"traced": False, "missing": str(error)}, indent=1))
        return 1
    if arguments.json:
        _print(json.dumps({"traced": True, **asdict(found), "warnings": warnings}, indent=1))
    else:
        _say([*_lineage(found), *warnings])
    return 0


def _lineage(found: Lineage) -> list[str]:
    from common.lineage import counted

    def few(digest: str) -> str:
        return digest[:12]

    lines = [
        f"{found.file}: SHA-256 {found.sha256}",
        f"  exported {found.exported}, weights {few(found.weights)}",
        f"  recipe {found.recipe.get('name', '')} {found.recipe_id}",
        f"  epsilon {rounded_up(found.epsilon)}, the highest of any site"
        if found.epsilon is not None
        else "  epsilon: none",
        "  code of the coordinator: " + (_code(found.code) or "not in the log"),
        number_of(len(found.rounds), "round")
        + (", then early stopping went back to the last of them" * found.early_stopped),
    ]
    for link in found.rounds:
        lines.append(f"  {link.round:4d}  {few(link.before)} -> {few(link.after)}  {', '.join(sorted(link.admitted))}")
    lines.append(number_of(len(found.sites), "site"))
    for site in found.sites.values():
        approved = ", ".join(f"{item.by} at {item.time}" for item in site.approvals) or "no approval in the log"
        lines += [
            f"  {site.name}: {number_of(len(site.rounds), 'round')}"
            + (f", epsilon {rounded_up(site.epsilon)}" if site.epsilon is not None else "")
            + ("" if site.log else "; its own log is not there"),
            f"    patients: {counted(site.patients, site.counts_rounded)}",
            f"    data manifest: {', '.join(site.manifests)}",
            f"    approved by: {approved}",
            "    versions: " + ", ".join(f"{name} {version}" for name, version in sorted(site.versions.items())),
            *([f"    code: {_code(site.code)}"] if site.code else []),
        ]
    lines += ["checked:", *(f"  {text}" for text in found.checked)]
    return [*lines, "not checked:", *(f"  {text}" for text in found.not_checked)]


def _code(code: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {' '.join(word[:12] for word in value.split())}" for name, value in sorted(code.items()))


def _keys(arguments: argparse.Namespace) -> tuple[Keys | None, list[str]]:
    """The keys of the registry, and what is to be said about where they come from."""
    if arguments.registry is None:
        return None, []
    from common.logs import Keys
    from common.registry import read_registry

    path, authority, warnings = arguments.registry, arguments.authority, []
    beside = path.with_name("authority.pub")
    with storing(path.name):
        if authority is None and beside.is_file():
            authority = beside.read_text().strip()
        elif authority is None:
            try:
                authority = str(json.loads(path.read_bytes())["registry"]["authority"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ConfigError(f"{path.name} is no registry; give the registry.json of a kit") from None
            warnings.append("Whose registry it is was taken from the registry itself: give --authority to check it.")
    return Keys.of(read_registry(path, authority)), warnings


def _recipes(places: Sequence[Path]) -> Mapping[str, Mapping[str, Any]]:
    """Contents of the recipes that lie beside the logs, each held against its id."""
    from common.config import as_plain, recipe_from_json

    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(
        path
        for place in places
        if place.is_dir()
        for pattern in ("*.json", "runs/*/*.json", "approved/*.json")  # of a simulation, a coordinator, a site
        for path in place.glob(pattern)
    ):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, FedicomError):
            plain = json.loads(path.read_bytes())["recipe"]
            recipe = recipe_from_json(json.dumps(plain.get("recipe", plain)))  # the recipe, or a signed one
            found[recipe.id] = as_plain(recipe)
    # another file, or a recipe of another version, is passed over: the report shows its id alone
    return found


def _bad(error: AuditError) -> Mapping[str, Any]:
    return {
        "log": error.log, "number": error.number, "kind": error.kind, "fault": error.fault, "why": error.says,
    }  # fmt: skip


def _plain(check: Check) -> Mapping[str, Any]:
    return {"log": check.log, "against": check.against, "heads": check.anchors, "vouched": check.vouched}


def _say(lines: Sequence[str]) -> None:
    # Logs quote what their owners wrote, who shall neither move the cursor nor write a line of their own.
    _print("\n".join(map(printable, lines)))


def _print(text: str) -> None:
    print(text)  # noqa: T201
