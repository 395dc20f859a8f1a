"""Names that only their site can connect to a patient."""

from __future__ import annotations

import hmac
import json


def pseudonym(key: bytes, *words: str) -> str:
    """HMAC-SHA256 of the words under the site's key, hexadecimal."""
    # JSON keeps ("a", "b|c") and ("a|b", "c") apart.
    return hmac.new(key, json.dumps(words).encode(), "sha256").hexdigest()
