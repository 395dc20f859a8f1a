"""A PACS by DICOMweb: QIDO-RS to find, WADO-RS to fetch. Nothing is ever sent but questions.

Source: DICOM PS3.18 8.7.3 (media types), 10.4 (Retrieve), 10.6 (Search).
"""

from __future__ import annotations

import json
import logging
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from client.pacs_source import (
    Asked,
    Busy,
    FoundInstance,
    FoundSeries,
    PacsError,
    Patience,
    Take,
    Vanished,
    WebPacs,
    need_uids,
    pull_secret,
    user_of,
)
from common.errors import ConfigError
from common.identity import read_private
from common.storage import storing

for _name in ("httpx", "httpcore"):  # their lines show addresses, which hold UIDs
    logging.getLogger(_name).setLevel(logging.CRITICAL)

STUDY_UID, SERIES_UID, SOP_UID, SOP_CLASS = "0020000D", "0020000E", "00080018", "00080016"
STUDY_DATE, MODALITIES, MODALITY, BODY_PART = "00080020", "00080061", "00080060", "00180015"

_FILES = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_GONE = frozenset({404, 410})
_PROBE_S = 3.0
_MOST_ANSWER_BYTES = 2**28
_MOST_HEAD_BYTES = 2**16


class DicomWeb:
    """A `Source` over HTTP."""

    def __init__(self, pacs: WebPacs, folder: Path, patience: Patience) -> None:
        """Reads the secrets; nothing is sent yet.

        Args:
            folder: Where the file names of `pacs` begin.

        Raises:
            ConfigError, StorageError: A secret or a certificate cannot be used.
        """
        self._pacs, self._patience = pacs, patience
        headers, auth = {}, None
        if pacs.token_file:
            headers["Authorization"] = "Bearer " + pull_secret(folder, pacs.token_file, "the PACS token file")
        if pacs.user_file:
            auth = httpx.BasicAuth(*user_of(folder, pacs.user_file))
        self._answered = False
        context = tls(folder, pacs.ca, pacs.certificate, pacs.key) if pacs.url.startswith("https") else None
        self._tls = context
        self._http = httpx.Client(
            base_url=pacs.url.rstrip("/") + "/",
            headers=headers,
            auth=auth,
            verify=True if context is None else context,
            timeout=pacs.timeout_s,
            follow_redirects=False,  # elsewhere is not who the password is for
            trust_env=False,
        )

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def _refused(self) -> bool:
        """Whether it is our certificate that breaks the connection; a PACS that answered once does not mind it."""
        if self._tls is None or self._answered:
            return False
        url = self._http.base_url
        return (
            handshake_failure(url.host, url.port or 443, self._tls, certificate=bool(self._pacs.certificate))
            is not None
        )

    def studies(self, asked: Asked) -> list[str]:
        """UIDs of the studies, each once."""
        found: dict[str, None] = {}
        days = f"{asked.since:%Y%m%d}-{asked.until:%Y%m%d}"
        for accession in asked.accessions or (None,):
            # Not by ModalitiesInStudy: with that key Orthanc (plugin 1.7) loses results from the second page on,
            # without a word. Every answer carries it (PS3.18 table 10.6.3-3), so the choice is made here.
            asks = {"StudyDate": days, "includefield": MODALITIES}
            if accession is not None:
                asks["AccessionNumber"] = accession
            for answer in self._search("studies", asks, STUDY_UID):
                if asked.holds(_text(answer, STUDY_DATE), _texts(answer, MODALITIES)):
                    found.update(dict.fromkeys(need_uids([_text(answer, STUDY_UID)])))
        return list(found)

    def series(self, study: str) -> list[FoundSeries]:
        """Of one study; empty when it has vanished."""
        answers = self._search(f"studies/{study}/series", {"includefield": BODY_PART}, SERIES_UID)
        uids = need_uids(_text(answer, SERIES_UID) for answer in answers)
        return [
            FoundSeries(uid, _text(answer, MODALITY), _text(answer, BODY_PART))
            for uid, answer in zip(uids, answers, strict=True)
        ]

    def instances(self, study: str, series: str) -> list[FoundInstance]:
        """Of one series; empty when it has vanished."""
        answers = self._search(f"studies/{study}/series/{series}/instances", {}, SOP_UID)
        uids = need_uids(_text(answer, SOP_UID) for answer in answers)
        return [FoundInstance(uid, _text(answer, SOP_CLASS)) for uid, answer in zip(uids, answers, strict=True)]

    def fetch(
        self, study: str, series: FoundSeries, wanted: Sequence[FoundInstance], whole: bool, take: Take
    ) -> set[str]:
        """As `Source.fetch`: the series in one answer, or instance by instance."""
        place = f"studies/{study}/series/{series.uid}"
        if whole:
            try:
                self._retrieve(place, take)
            except Vanished:
                return {each.uid for each in wanted}
            return set()
        gone = set()
        for each in wanted:
            try:
                self._retrieve(f"{place}/instances/{each.uid}", take)
            except Vanished:
                gone.add(each.uid)
        return gone

    def _retrieve(self, place: str, take: Take) -> None:
        with self._asked(place, {}, _FILES) as answer:
            kind = answer.headers.get("content-type", "")
            chunks = answer.iter_bytes()  # a chunk size would hold back, and lose, what came before a break
            if kind.partition(";")[0].strip().lower() == "application/dicom":
                take(chunks)
                return
            for part in parts(chunks, boundary_of(kind)):
                take(part)

    def _search(self, place: str, asks: Mapping[str, str], uid: str) -> list[Mapping[str, Any]]:
        """All pages of a search, each result once.

        A short page need not be the last: there are PACS that give fewer results than asked for. An empty one is.
        """
        found: dict[str, Mapping[str, Any]] = {}
        offset = 0
        while True:
            page = self._patience(partial(self._page, place, asks, offset))
            before = len(found)
            for answer in page:
                found.setdefault(_text(answer, uid), answer)
            if not page or (len(found) == before and len(page) < self._pacs.page):
                return list(found.values())
            if len(found) == before:
                raise PacsError(
                    "the PACS answers every page of a search with the same results, so some would be missed; "
                    "shorten --since and --until, or raise `page` in pacs.yaml"
                )
            offset += len(page)

    def _page(self, place: str, asks: Mapping[str, str], offset: int) -> list[Mapping[str, Any]]:
        paging = {"limit": str(self._pacs.page), "offset": str(offset)}
        try:
            with self._asked(place, {**asks, **paging}, "application/dicom+json") as answer:
                if answer.status_code == 204:
                    return []
                text = bytearray()
                for chunk in answer.iter_bytes():
                    text += chunk
                    if len(text) > _MOST_ANSWER_BYTES:
                        raise PacsError(f"one page of a search is over {_MOST_ANSWER_BYTES >> 20} MiB; lower `page`")
        except Vanished:
            return []
        try:
            page = json.loads(text or b"[]")
        except ValueError:
            page = None
        if not isinstance(page, list) or not all(isinstance(each, dict) for each in page):
            raise PacsError("the PACS answers a search with something else than DICOM JSON; check `url` in pacs.yaml")
        return page

    @contextmanager
    def _asked(self, place: str, asks: Mapping[str, str], accept: str) -> Iterator[httpx.Response]:
        """One answer whose status is good, with its body to come."""
        try:
            with self._http.stream("GET", place, params=dict(asks), headers={"Accept": accept}) as answer:
                self._answered = True
                _check(answer)
                yield answer
        except httpx.ConnectError as error:
            if (bad := _certificate_error(error)) is not None:
                raise PacsError(
                    f"the certificate of the PACS is not accepted: {bad}; name the right authority as `ca` in pacs.yaml"
                ) from None
            if _alert(error):
                raise _unwanted() from None
            raise Busy("no connection") from None
        except httpx.TimeoutException:
            raise Busy(f"no answer within {self._pacs.timeout_s:g} s") from None
        except httpx.TransportError as error:
            if _alert(error) or self._refused():
                raise _unwanted() from None
            raise Busy("the connection broke") from None
        except httpx.DecodingError:
            raise Busy("an answer that cannot be unpacked") from None


def tls(folder: Path, ca: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    """A context that checks the other side's certificate and name.

    Raises:
        ConfigError, StorageError: A file is missing, readable by others, or holds nothing usable.
    """
    try:
        with storing("a certificate of pacs.yaml"):
            context = ssl.create_default_context(cafile=None if ca is None else str(folder / ca))
            if certificate is not None and key is not None:
                read_private(folder / key, "the PACS client key")
                context.load_cert_chain(folder / certificate, folder / key, password=_no_password)
    except ssl.SSLError:
        raise ConfigError("ca, certificate or key in pacs.yaml holds no usable PEM, or an encrypted key") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def handshake_failure(host: str, port: int, context: ssl.SSLContext, *, certificate: bool) -> str | None:
    """Why TLS fails; None if it does not, or nobody is there. Libraries see a broken connection only.

    Args:
        certificate: We show one.
    """
    try:
        with (
            socket.create_connection((host, port), _PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            secure.settimeout(_PROBE_S)
            # TLS 1.3: a refusal of our certificate comes only now, and some servers then just close
            if not secure.recv(1) and not certificate:
                return "closed after the handshake, as when our certificate is missing"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message.rstrip(".")
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        return (error.reason or "handshake failure").replace("_", " ").lower()
    except OSError:
        return None
    return None


def _no_password() -> str:
    raise ConfigError("the key in pacs.yaml is encrypted; store it unencrypted with mode 0600")


def _certificate_error(error: BaseException) -> str | None:
    found = _ssl_error(error)
    return found.verify_message.rstrip(".") if isinstance(found, ssl.SSLCertVerificationError) else None


def _unwanted() -> PacsError:
    return PacsError("the PACS refuses our certificate, or wants one; correct certificate and key in pacs.yaml")


def _alert(error: BaseException) -> bool:
    """Whether the other side ended TLS on purpose; with TLS 1.3 that comes only with the first answer."""
    return "ALERT" in (((found := _ssl_error(error)) is not None and found.reason) or "").upper()


def _ssl_error(error: BaseException | None) -> ssl.SSLError | None:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error


def _check(answer: httpx.Response) -> None:
    status = answer.status_code
    if status in (200, 204, 206):
        return
    if status in (401, 403):
        raise PacsError(
            f"the PACS refuses us (HTTP {status}): wrong name, password, token or certificate, or no right to read; "
            "correct the secret file that pacs.yaml names, or ask the PACS administrator"
        )
    if status in _GONE:
        raise Vanished
    if status in _AGAIN:
        raise Busy(f"HTTP {status}", _retry_after(answer.headers.get("retry-after", "")))
    if 300 <= status < 400:
        raise PacsError(f"the PACS sends us elsewhere (HTTP {status}), where nothing is sent; correct `url`")
    raise PacsError(f"the PACS does not understand the request (HTTP {status}); check `url` in pacs.yaml")


def _retry_after(text: str) -> float | None:
    """Seconds, of a number or a date (RFC 9110 10.2.3)."""
    if text.strip().isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _texts(answer: Mapping[str, Any], tag: str) -> list[str]:
    element = answer.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return [str(value).strip() for value in values if value is not None] if isinstance(values, list) else []


def _text(answer: Mapping[str, Any], tag: str) -> str:
    return next(iter(_texts(answer, tag)), "")


def boundary_of(kind: str) -> bytes:
    """The boundary of a Content-Type.

    Raises:
        PacsError: It is not multipart, or has none.
    """
    found = re.search(r';\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', kind, re.IGNORECASE)
    if not kind.lower().startswith("multipart/related") or found is None:
        raise PacsError("the PACS answers with something else than multipart DICOM; check `url` in pacs.yaml")
    return (found[1] or found[2]).encode("ascii", "replace")


def parts(chunks: Iterator[bytes], boundary: bytes) -> Iterator[Iterator[bytes]]:
    """The bodies of a multipart answer, each in pieces, while they come. Each is used up before the next.

    Raises:
        Busy: The answer ends before its closing boundary.

    Source: RFC 2046 5.1.1.
    """
    held = bytearray(b"\r\n")  # the first boundary may stand at the very beginning
    mark = b"\r\n--" + boundary

    def more() -> None:
        chunk = next(chunks, None)
        if chunk is None:
            raise Busy("an answer that was cut off")
        held.extend(chunk)

    def body() -> Iterator[bytes]:
        """Up to the next boundary, which is removed."""
        while (at := held.find(mark)) < 0:
            if (safe := len(held) - len(mark)) > 0:
                yield bytes(held[:safe])
                del held[:safe]
            more()
        if at:
            yield bytes(held[:at])
        del held[: at + len(mark)]

    for _ in body():  # what stands before the first boundary means nothing
        pass
    while True:
        while len(held) < 2:
            more()
        if held.startswith(b"--"):
            for _ in chunks:
                pass
            return
        while (end := held.find(b"\r\n\r\n")) < 0:
            if len(held) > _MOST_HEAD_BYTES:
                raise PacsError("the PACS sends a part without end of its header; ask its administrator")
            more()
        del held[: end + 4]
        part = body()
        yield part
        for _ in part:
            pass
