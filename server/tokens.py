"""Bearer tokens of the coordinator's people: operators run and stop, auditors read. Only their SHA-256 is kept."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.deployment import ServerHome
from common.enrolment import note
from common.errors import ConfigError, StorageError
from common.exchange import NAME_PATTERN
from common.identity import read_private
from common.storage import locked, private_folder, write_whole

Role = Literal["operator", "auditor"]


def new_token() -> str:
    """256 random bits, 43 letters, digits, `-` and `_`."""
    return secrets.token_urlsafe(32)


def token_table(operators: Mapping[str, str], auditors: Mapping[str, str]) -> bytes:
    """What `tokens.json` holds: names and SHA-256, for each role; `operators` and `auditors` are name -> token."""
    table = {
        role: [{"name": name, "sha256": _sha256(token)} for name, token in people.items()]
        for role, people in (("operator", operators), ("auditor", auditors))
    }
    return (json.dumps(table, indent=1) + "\n").encode()


def install_token(home: ServerHome, role: Role, name: str, *, by: str = "") -> Path:
    """Gives a person a token of his own on the coordinator; a token of the same name stops to work.

    Returns:
        The file with the token, 0600, to be handed over and deleted here.

    Raises:
        ConfigError: The name is none, or `home` no coordinator's.
        StorageError: A file cannot be read or written.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(f"{name!r} is no name; expected letters, digits, `_`, `.` and `-`, at most 63")
    token = new_token()
    place = home.keys / f"{role}-{name}.token"
    with _changing(home) as tokens:
        note(home, "token made", by, role=role, name=name)  # before it counts
        write_whole(place, f"{token}\n".encode())
        kept = [entry for entry in tokens[role] if entry["name"] != name]
        tokens[role] = [*kept, {"name": name, "sha256": _sha256(token)}]
    return place


def remove_token(home: ServerHome, role: Role, name: str, *, by: str = "") -> None:
    """Takes a person's token away.

    Raises:
        ConfigError: There is none of this name, or `home` is no coordinator's.
        StorageError: A file cannot be read or written.
    """
    with _changing(home) as tokens:
        kept = [entry for entry in tokens[role] if entry["name"] != name]
        if len(kept) == len(tokens[role]):
            raise ConfigError(f"no {role} is called {name}; {home.tokens_file.name} lists them")
        note(home, "token removed", by, role=role, name=name)
        tokens[role] = kept


def read_tokens(home: ServerHome) -> dict[str, list[dict[str, str]]]:
    """`name` and `sha256` of everybody who has a token, by role.

    Raises:
        StorageError: The file is missing, readable by others, or no such table.
    """
    data = read_private(home.tokens_file, "the tokens' file")
    try:
        table = json.loads(data)
        return {
            role: [{"name": str(row["name"]), "sha256": str(row["sha256"])} for row in table.get(role, [])]
            for role in ("operator", "auditor")
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StorageError(f"{home.tokens_file.name} cannot be read; restore it from the kit") from None


@contextmanager
def _changing(home: ServerHome) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The tokens' table, written whole at the end."""
    _ = home.config  # nothing is made where no coordinator lives
    with locked(private_folder(home.keys)):
        tokens = read_tokens(home)
        yield tokens
        write_whole(home.tokens_file, (json.dumps(tokens, indent=1) + "\n").encode())


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
