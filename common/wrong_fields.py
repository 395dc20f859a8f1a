"""Pydantic's complaints as sentences: which field is wrong, what was given, and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import ValidationError

RUN_KEYS = ("simulation", "out", "resume", "overwrite", "baselines", "torchscript", "int8")
"""Settings of a run that stand beside the recipe's."""
_BRANCHES = ("bool", "float", "int", "str")
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def sentences(kind: type, error: ValidationError) -> str:
    """One line for each wrong field."""
    lines: dict[tuple[str, ...], str] = {}
    for problem in error.errors(include_url=False):
        # Pydantic puts the branches of a union into the path, for example `literal['balanced']` or, last, `bool`. An
        # unknown name stands last; it comes from the text, brackets or not.
        names = [str(part) for part in problem["loc"]]
        known = len(names) - (problem["type"] in _UNKNOWN)
        place = (*(name for name in names[:known] if not {"[", "("} & set(name)), *names[known:])
        if known == len(names) and place[-1:] and place[-1] in _BRANCHES:
            place = place[:-1]
        got, reason = _reason(kind, place, dict(problem))
        if place not in lines:
            # ascii: a name out of somebody else's file must not move the cursor of a terminal
            shown = ascii(".".join(place[1:] if place[:1] == ("recipe",) else place))[1:-1]
            lines[place] = (f"{shown}: " if shown else "") + got + reason
        elif reason not in lines[place]:
            lines[place] += f", or {reason}"
    # A wrong item makes its list wrong as well; the item is the cause.
    causes = [place for place in lines if not any(other[: len(place)] == place != other for other in lines)]
    return "\n".join(lines[place] for place in causes)


def _reason(kind: type, place: tuple[str, ...], problem: dict[str, Any]) -> tuple[str, str]:
    if problem["type"] in _UNKNOWN:
        allowed = _fields_at(kind, place[:-1])
        if place[:-1] == ("recipe",):
            allowed = (*allowed, *RUN_KEYS)
        close = get_close_matches(place[-1], allowed, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return "", f"no such field.{hint} Expected one of {', '.join(allowed)}"
    if problem["type"] in ("missing", "missing_argument"):
        return "", "missing; it has no default"
    reason = str(problem["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if problem["type"] in ("value_error", "json_invalid"):
        return "", reason
    return f"got {shown(problem['input'])}; ", reason


def shown(value: object) -> str:
    """A value as JSON, cut to one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _fields_at(kind: type, path: Sequence[str]) -> tuple[str, ...]:
    current: Any = kind
    for part in path:
        current = get_type_hints(current).get(part)
        if current is None:
            return ()
    return tuple(field.name for field in fields(current)) if is_dataclass(current) else ()
