"""Names that only their site can connect to a patient."""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.imaging import Source


def pseudonym(key: bytes, *words: str) -> str:
    """HMAC-SHA256 of the words under the site's key, hexadecimal."""
    # JSON keeps ("a", "b|c") and ("a|b", "c") apart.
    return hmac.new(key, json.dumps(words).encode(), "sha256").hexdigest()


def patient_pseudonym(key: bytes, patient_id: str) -> str:
    """Of a patient: 16 hexadecimal digits."""
    return pseudonym(key, "patient", patient_id.strip())[:16]


def sample_pseudonym(key: bytes, source: Source) -> str:
    """Of one image or volume."""
    return pseudonym(
        key, "sample", source.patient_id, source.study_uid, source.series_uid, *source.sop_uids,
        *map(str, source.frames),
    )  # fmt: skip
