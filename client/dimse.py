"""A PACS by C-FIND and C-GET, over TLS: both go out on an association that we open. C-MOVE is never used, for the
PACS would then call us.

Source: DICOM PS3.4 C.4.1 (C-FIND), C.4.3 (C-GET), PS3.7 D.3.3.4 (roles), D.3.3.7 (user identity).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from pynetdicom.presentation import build_context, build_role

from client.dicomweb import handshake_failure, tls
from client.pacs_source import (
    Asked,
    Busy,
    DimsePacs,
    FoundInstance,
    FoundSeries,
    PacsError,
    Patience,
    Take,
    need_uids,
    user_of,
)
from common.imaging.received import SYNTAXES, answered, image_classes, is_storage_class, question

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # its lines show answers, which name patients

FIND, GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"  # Study Root
_MOST_CONTEXTS = 128  # PS3.8 9.3.2
_CLASSES = (_MOST_CONTEXTS - 1) // len(SYNTAXES)
_PDU_BYTES = 1 << 17
_PENDING = (0xFF00, 0xFF01)
_OUT_OF_RESOURCES = 0xA700
_NO_MATCHES, _NO_SENDING = 0xA701, 0xA702
_NOT_THIS = 0xC000
_MANY = 50
"""Answers that make one suspect that there were more."""


class Dimse:
    """A `Source` over associations; one for questions is kept open, each fetch has its own."""

    def __init__(self, pacs: DimsePacs, folder: Path, patience: Patience) -> None:
        """Reads the secrets; nothing is sent yet.

        Args:
            folder: Where the file names of `pacs` begin.

        Raises:
            ConfigError, StorageError: A secret or a certificate cannot be used.
        """
        self._pacs, self._patience = pacs, patience
        self._tls: tuple[ssl.SSLContext, str] | None = None
        if not pacs.unsafe_no_tls:
            self._tls = tls(folder, pacs.ca, pacs.certificate, pacs.key), pacs.host
        self._user = user_of(folder, pacs.user_file) if pacs.user_file else None
        self._questions: Association | None = None

    def close(self) -> None:
        """Ends the associations."""
        if self._questions is not None:
            _end(self._questions)
            self._questions = None

    def studies(self, asked: Asked) -> list[str]:
        """UIDs of the studies, each once.

        C-FIND has no pages, and many PACS cut a long answer without a word. So a span of days with many answers is
        asked again in halves, down to single days.
        """
        found: dict[str, None] = {}
        for accession in asked.accessions or ("",):
            for modality in asked.modalities:
                keys = {"StudyInstanceUID": "", "AccessionNumber": accession, "ModalitiesInStudy": modality}
                for answer in self._in_time(keys, asked.since, asked.until):
                    if asked.holds(_first(answer, "StudyDate"), answer.get("ModalitiesInStudy", [])):
                        found.update(dict.fromkeys(need_uids([_first(answer, "StudyInstanceUID")])))
        return list(found)

    def _in_time(self, keys: Mapping[str, str], first: date, last: date) -> list[dict[str, list[str]]]:
        answers = self._find("STUDY", {**keys, "StudyDate": f"{first:%Y%m%d}-{last:%Y%m%d}"})
        if len(answers) < _MANY or first == last:
            return answers
        middle = first + (last - first) // 2
        return self._in_time(keys, first, middle) + self._in_time(keys, middle + timedelta(days=1), last)

    def series(self, study: str) -> list[FoundSeries]:
        """Of one study; empty when it has vanished."""
        keys = {"StudyInstanceUID": study, "SeriesInstanceUID": "", "Modality": "", "BodyPartExamined": ""}
        found = {
            uid: FoundSeries(uid, _first(answer, "Modality"), _first(answer, "BodyPartExamined"))
            for answer in self._find("SERIES", keys)
            for uid in need_uids([_first(answer, "SeriesInstanceUID")])
        }
        return list(found.values())

    def instances(self, study: str, series: str) -> list[FoundInstance]:
        """Of one series; empty when it has vanished."""
        keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": "", "SOPClassUID": ""}
        found = {
            uid: FoundInstance(uid, _first(answer, "SOPClassUID"))
            for answer in self._find("IMAGE", keys)
            for uid in need_uids([_first(answer, "SOPInstanceUID")])
        }
        return list(found.values())

    def fetch(
        self, study: str, series: FoundSeries, wanted: Sequence[FoundInstance], whole: bool, take: Take
    ) -> set[str]:
        """As `Source.fetch`: the series in one C-GET, or a C-GET for each instance.

        Where the kinds of images do not fit into one association, each of several brings those of some kinds.
        """
        failure: list[BaseException] = []

        def store(event: Any) -> int:
            try:
                take([event.encoded_dataset()])
            except BaseException as error:
                failure.append(error)
                return _OUT_OF_RESOURCES
            return 0x0000

        classes = list(dict.fromkeys(each.sop_class for each in wanted if is_storage_class(each.sop_class)))
        if not classes or not all(each.sop_class for each in wanted):
            classes = list(dict.fromkeys([*classes, *image_classes(series.modality)]))
        keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series.uid}
        gone = {each.uid for each in wanted}
        for at in range(0, len(classes), _CLASSES):
            association = self._open(classes[at : at + _CLASSES], store)
            try:
                if whole:
                    if not self._get(association, question("SERIES", keys), failure):
                        gone = set()
                else:
                    gone &= {
                        each.uid
                        for each in wanted
                        if self._get(association, question("IMAGE", {**keys, "SOPInstanceUID": each.uid}), failure)
                    }
            finally:
                _end(association)
        return gone

    def _get(self, association: Association, asked: Any, failure: list[BaseException]) -> bool:
        """One C-GET to its end; True if the PACS says that there is nothing."""
        status, nothing = None, False
        for status, _ in association.send_c_get(asked, GET):
            if failure:
                raise failure[0]
            code = getattr(status, "Status", None)
            if code is None:
                raise Busy("the association broke")
            if code in _PENDING:
                continue
            done = int(getattr(status, "NumberOfCompletedSuboperations", 0) or 0)
            failed = int(getattr(status, "NumberOfFailedSuboperations", 0) or 0)
            nothing = done == 0 and failed == 0 and (code == 0 or _NOT_THIS <= code <= 0xCFFF)
            # A702 is also said when every image failed, perhaps because no context of this association fits it
            if code in (_OUT_OF_RESOURCES, _NO_MATCHES) or (code == _NO_SENDING and not failed):
                raise Busy("C-GET: the PACS is out of resources")
        return nothing

    def _find(self, level: str, keys: Mapping[str, str]) -> list[dict[str, list[str]]]:
        return self._patience(lambda: self._ask(level, keys))

    def _ask(self, level: str, keys: Mapping[str, str]) -> list[dict[str, list[str]]]:
        if self._questions is None or not self._questions.is_established:
            self.close()
            self._questions = self._open((), None)
        found = []
        for status, answer in self._questions.send_c_find(question(level, keys), FIND):
            code = getattr(status, "Status", None)
            if code is None:
                self.close()
                raise Busy("the association broke")
            if code in _PENDING:
                if answer is not None:
                    found.append(answered(answer))
            elif code == _OUT_OF_RESOURCES:
                raise Busy("C-FIND: the PACS is out of resources")
            elif code != 0:
                raise PacsError(
                    f"the PACS refuses a C-FIND of level {level} (status {code:04X}); ask its administrator whether "
                    f"{self._pacs.calling_ae} may query by Study Root"
                )
        return found

    def _open(self, classes: Sequence[str], store: Any) -> Association:
        """An association for questions, or with `classes` for a C-GET."""
        entity = AE(ae_title=self._pacs.calling_ae)
        entity.connection_timeout = entity.acse_timeout = min(self._pacs.timeout_s, 30.0)
        entity.dimse_timeout = entity.network_timeout = self._pacs.timeout_s
        entity.maximum_pdu_size = _PDU_BYTES
        model = GET if classes else FIND
        # one syntax a context: the PACS then has none to prefer, and sends each object as it lies there
        contexts = [build_context(model), *(build_context(each, one) for each in classes for one in SYNTAXES)]
        association = entity.associate(
            self._pacs.host,
            self._pacs.port,
            contexts=contexts,
            ae_title=self._pacs.called_ae,
            max_pdu=_PDU_BYTES,
            ext_neg=[*(build_role(each, scp_role=True) for each in classes), *self._identity()],
            evt_handlers=[(evt.EVT_C_STORE, store)] if store else [],
            tls_args=self._tls,
        )
        if association.is_established:
            if not any(context.abstract_syntax == model for context in association.accepted_contexts):
                _end(association)
                raise PacsError(
                    f"the PACS does not offer {'C-GET' if classes else 'C-FIND'} (Study Root) to "
                    f"{self._pacs.calling_ae}; its administrator can allow it, or DICOMweb"
                )
            return association
        if association.is_rejected:
            raise PacsError(
                f"the PACS rejects the association: AE titles {self._pacs.calling_ae} (ours) and "
                f"{self._pacs.called_ae} (theirs), or the user; its administrator must know ours"
            )
        bad = None
        if self._tls is not None:  # pynetdicom keeps the reason to itself
            shown = self._pacs.certificate is not None
            bad = handshake_failure(self._pacs.host, self._pacs.port, self._tls[0], certificate=shown)
        if bad is not None:
            raise PacsError(f"TLS with the PACS fails: {bad}; correct ca, certificate and key in pacs.yaml")
        raise Busy("no association")

    def _identity(self) -> list[UserIdentityNegotiation]:
        if self._user is None:
            return []
        identity = UserIdentityNegotiation()
        identity.user_identity_type = 2
        identity.primary_field, identity.secondary_field = (part.encode() for part in self._user)
        return [identity]


def _end(association: Association) -> None:
    if association.is_established:
        association.release()
    else:
        association.abort()


def _first(answer: Mapping[str, Sequence[str]], keyword: str) -> str:
    return next(iter(answer.get(keyword, ())), "")
