"""What every way into a PACS has in common: what is asked for, what is found, and how long to be patient."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, StringConstraints, model_validator
from pydantic.dataclasses import dataclass as checked

from common.config import validate_json
from common.deployment import Host, Port, yaml_of
from common.errors import ConfigError, FedicomError
from common.identity import read_private

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
_UID = re.compile(r"[0-9][0-9.]{0,63}")

AeTitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]


class PacsError(FedicomError):
    """The PACS cannot be reached, does not let us in, or answers what DICOM does not allow."""


class Busy(Exception):  # noqa: N818  not an error yet
    """Nothing now, perhaps later. The words are ours: a library's text may quote a UID."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.why, self.wait_s = why, wait_s


class Vanished(Exception):  # noqa: N818
    """The PACS no longer has what it had a moment ago."""


@checked(frozen=True, config=_STRICT, kw_only=True)
class _Pacs:
    """What both kinds have in common. File names are relative to the folder of `pacs.yaml`."""

    ca: str | None = None
    """Certificates that are trusted, PEM; null: those of this machine."""
    certificate: str | None = None
    """Our own, PEM, where the PACS wants one."""
    key: str | None = None
    """Its private key, PEM, mode 0600."""
    user_file: str | None = None
    """One line `name:password`, mode 0600."""
    unsafe_no_tls: bool = False
    """Images and passwords in the clear, for every machine on the way to read."""
    timeout_s: Annotated[float, Gt(0), Le(3600)] = 60.0
    """Without a byte from the PACS for so long, a request is given up and tried again."""
    tries: Annotated[int, Ge(1), Le(100)] = 8
    """How often in a row a request may bring nothing before the pull stops."""
    first_wait_s: Annotated[float, Gt(0), Le(600)] = 1.0
    """Before the second try; doubled before each further one, up to two minutes."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; give both or none")
        return self


@checked(frozen=True, config=_STRICT, kw_only=True)
class WebPacs(_Pacs):
    """A PACS with DICOMweb (PS3.18)."""

    kind: Literal["dicomweb"]
    url: Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.:\[\]-]{1,253}(/[A-Za-z0-9._~/-]*)?$")]
    """Root of QIDO-RS and WADO-RS, for example https://pacs.example.org/dicom-web"""
    token_file: str | None = None
    """A bearer token, mode 0600."""
    page: Annotated[int, Ge(1), Le(10_000)] = 200
    """Results of one request of a search."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.url.startswith("http://") and not self.unsafe_no_tls:
            raise ValueError("http:// sends images and passwords in the clear; write https://, or unsafe_no_tls: true")
        if self.user_file and self.token_file:
            raise ValueError("user_file and token_file exclude each other; give one")
        return self


@checked(frozen=True, config=_STRICT, kw_only=True)
class DimsePacs(_Pacs):
    """A PACS with C-FIND and C-GET (PS3.4, PS3.7)."""

    kind: Literal["dimse"]
    host: Host
    port: Port = 2762
    called_ae: AeTitle
    """Theirs."""
    calling_ae: AeTitle = "FEDICOM"
    """Ours; the PACS knows it."""


_KINDS: dict[str, type[WebPacs] | type[DimsePacs]] = {"dicomweb": WebPacs, "dimse": DimsePacs}


def read_pacs(path: Path) -> dict[str, WebPacs | DimsePacs]:
    """`pacs.yaml`: PACS by the name that `--pacs` takes.

    Raises:
        ConfigError: Something is missing or not allowed; names file and field, and shows no secret.
        StorageError: The file cannot be read.
    """
    plain = yaml_of(path)
    try:
        named = plain["pacs"]
        entries = {str(name): (dict(entry), json.dumps(entry)) for name, entry in named.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ConfigError(f"{path.name} is not in the form `pacs:`, names below it, settings below those") from None
    if unknown := sorted(map(str, set(plain) - {"pacs"})):
        raise ConfigError(f"{path.name}: {unknown[0]!a} is no field; everything stands below `pacs`")
    found: dict[str, WebPacs | DimsePacs] = {}
    for name, (entry, as_json) in entries.items():
        kind = _KINDS.get(str(entry.get("kind")))
        if kind is None:
            raise ConfigError(f"{path.name}: {name}: kind must be one of {', '.join(_KINDS)}")
        if "@" in str(entry.get("url", "")):  # before anything could show it
            raise ConfigError(f"{path.name}: {name}: url must hold no name and no password; use user_file")
        try:
            found[name] = validate_json(kind, as_json)
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"{path.name}: {name}: {line}" for line in lines)) from None
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What shall be pulled."""

    modalities: tuple[str, ...]
    since: date
    until: date
    body_part: str | None = None
    accessions: tuple[str, ...] = ()
    """Empty: all."""
    limit: int | None = None
    """Most studies."""

    def holds(self, day: str, modalities: Collection[str]) -> bool:
        """Whether a study is within this: there are PACS that ignore a key they do not know. Unknown is allowed."""
        in_time = not day or f"{self.since:%Y%m%d}" <= day <= f"{self.until:%Y%m%d}"
        return in_time and (not modalities or bool(set(self.modalities) & set(modalities)))


@dataclass(frozen=True)
class FoundSeries:
    """A series of a study."""

    uid: str = field(repr=False)
    modality: str
    body_part: str
    """Empty where the PACS does not say."""


@dataclass(frozen=True)
class FoundInstance:
    """One image, or another object."""

    uid: str = field(repr=False)
    sop_class: str
    """Empty where the PACS does not say."""


Take = Callable[[Iterable[bytes]], None]
"""Takes one received instance in pieces, to its end."""


class Source(Protocol):
    """A way into a PACS. Every call raises `Busy` when it may be repeated, `PacsError` when not."""

    def studies(self, asked: Asked) -> list[str]:
        """UIDs of the studies, each once."""

    def series(self, study: str) -> list[FoundSeries]:
        """Of one study; empty when it has vanished."""

    def instances(self, study: str, series: str) -> list[FoundInstance]:
        """Of one series; empty when it has vanished."""

    def fetch(
        self, study: str, series: FoundSeries, wanted: Sequence[FoundInstance], whole: bool, take: Take
    ) -> set[str]:
        """Hands what comes to `take`, in any order; returns UIDs of those that the PACS says it does not have.

        Args:
            wanted: What is missing.
            whole: They are all of the series, which may be asked for at once.
        """

    def close(self) -> None:
        """Ends the connections."""


class Patience:
    """Waits between tries: twice as long each time, and never quite as long as somebody else."""

    def __init__(self, tries: int, first_s: float, most_s: float = 120.0, sleep: Callable[[float], None] = time.sleep):
        self.tries, self._first_s, self._most_s, self._sleep = tries, first_s, most_s, sleep

    def pause(self, failed: int, wanted_s: float | None = None) -> None:
        """Waits after the `failed`-th failure in a row; `wanted_s` is what the PACS asked for (Retry-After)."""
        wait_s = min(self._most_s, self._first_s * 2 ** (failed - 1))
        # jitter: after an outage, a hundred clients must not come back in the same second
        wait_s *= random.uniform(0.5, 1.0)  # noqa: S311
        self._sleep(max(wait_s, min(wanted_s or 0.0, self._most_s)))

    def __call__(self, work: Callable[[], T]) -> T:
        """Repeats `work` while it raises `Busy`.

        Raises:
            PacsError: It did so too often.
        """
        for failed in range(1, self.tries + 1):
            try:
                return work()
            except Busy as busy:
                if failed == self.tries:
                    raise gave_up(busy, self.tries) from None
                self.pause(failed, busy.wait_s)
        raise AssertionError("tries is at least 1")


def gave_up(busy: Busy, tries: int) -> PacsError:
    """The error that ends a pull when patience does."""
    return PacsError(
        f"the PACS does not deliver: {busy.why}; tried {tries} times in a row; what was pulled is kept, run the same "
        "command again to go on"
    )


class Pace:
    """Holds a stream to so many bytes a second on average; None lets it run."""

    def __init__(self, bytes_per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = bytes_per_s, clock
        self._free_at = clock()

    def spend(self, count: int) -> float:
        """Seconds to wait after these bytes."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        # an idle second is not saved up for a burst
        self._free_at = max(self._free_at, now) + count / self._rate
        return self._free_at - now


def is_uid(text: str) -> bool:
    """Whether this is a UID, which may stand in an address or a query."""
    return _UID.fullmatch(text) is not None


def need_uids(found: Iterable[str]) -> list[str]:
    """The UIDs of an answer, each once.

    Raises:
        PacsError: One is none.
    """
    uids = list(dict.fromkeys(text.strip("\0 ") for text in found))
    if not all(map(is_uid, uids)):
        raise PacsError("the PACS sent a result without a valid UID; expected one in each; ask its administrator")
    return uids


def pull_secret(folder: Path, name: str, what: str) -> str:
    """The one line of a secret file.

    Raises:
        StorageError: It is missing, or others can read it.
        ConfigError: It is empty, or no single line of text.
    """
    try:
        text = read_private(folder / name, what).decode().strip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise ConfigError(f"{what} {Path(name).name} holds no single line of text; write the secret as its one line")
    return text


def user_of(folder: Path, name: str) -> tuple[str, str]:
    """Name and password of a user file.

    Raises:
        StorageError, ConfigError: As `pull_secret`.
    """
    user, colon, password = pull_secret(folder, name, "the PACS user file").partition(":")
    if not (user and colon and password):
        raise ConfigError(f"the PACS user file {Path(name).name} is not in the form name:password; write it so")
    return user, password
