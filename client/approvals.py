"""Which recipes this hospital allows: one signed record each, made by a person, asked for at every message."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from client.policy import objections
from common.clock import utc_now
from common.config import recipe_from_json
from common.deployment import SiteHome
from common.errors import ConfigError, FedicomError, PrivacyError
from common.identity import Signer, signed_by
from common.journal import Log
from common.signed import SignedRecipe, parse_recipe
from common.storage import drop_unfinished, private_folder, storing, write_whole

FORMAT = "fedicom approval 1"
_MAX_BYTES = 2 << 20
_ID = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}")
"""Without what Python makes of bytes that are no UTF-8: a name typed at a terminal of another encoding."""


@dataclass(frozen=True, kw_only=True)
class Approval:
    """That a person of this site allowed a recipe."""

    signed: SignedRecipe
    by: str
    time: str
    """UTC, ISO 8601."""

    @property
    def recipe_id(self) -> str:
        return self.signed.recipe.id


class Approvals:
    """The approved recipes of a site; read from disk at every call, so that a change counts at once."""

    def __init__(self, home: SiteHome) -> None:
        self._home = home

    def approve(self, signed: SignedRecipe, *, by: str, log: Log) -> Approval:
        """Allows a recipe from now on.

        The log has it before it counts: nothing is ever trained that the log does not know of.

        Args:
            by: Who decided.
            log: The site's audit log.

        Raises:
            ConfigError: It is not signed by the coordinator of this site's registry, or `by` is no name.
            PrivacyError: The site's policy forbids it; names every objection.
            StorageError: The log or the record cannot be written.
        """
        if not _LINE.fullmatch(by):
            raise ConfigError("an approval needs the name of who gives it, one line of at most 200 characters in UTF-8")
        signed = parse_recipe(signed.text, self._home.registry.coordinator)
        recipe, config = signed.recipe, self._home.config
        if found := objections(recipe, config.policy):
            raise PrivacyError(
                f"this site's policy forbids recipe {recipe.id[:12]}: {'; '.join(found)}. Ask the coordinator for "
                "another recipe, or change the policy in site.yaml"
            )
        approval = Approval(signed=signed, by=by, time=utc_now())
        signer = Signer.load(self._home.signing_key)
        plain = {
            "format": FORMAT,
            "site": config.site,
            "by": approval.by,
            "time": approval.time,
            "recipe": json.loads(signed.text),
            "signature": signer.sign(_signed_bytes(approval, config.site)),
        }
        log.append("recipe approved", recipe_id=recipe.id, name=recipe.name, by=by, coordinator=signed.coordinator)
        private_folder(self._home.approved)
        text = json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False)
        write_whole(self._file(recipe.id), f"{text}\n".encode())
        return approval

    def find(self, recipe_id: str) -> Approval | None:
        """The approval of a recipe, after checking its record; None when there is none.

        Raises:
            ConfigError: There is a record, but it does not hold: it was changed, is not of this site, or the recipe's
                signature is not of the coordinator that this site trusts now.
            StorageError: It cannot be read.
        """
        path = self._file(recipe_id)
        if not _ID.fullmatch(recipe_id) or not path.is_file():
            return None
        with storing("the record of an approval"):
            data = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
        what = f"the approval of recipe {recipe_id[:12]}"
        advice = "withdraw it, and approve the recipe anew if that is wanted"
        try:
            plain = json.loads(data)
            form, site, by, time, body, signature = (
                plain[name] for name in ("format", "site", "by", "time", "recipe", "signature")
            )
            key, recipe_signature = body["coordinator"], body["signature"]
            claimed = SignedRecipe(recipe_from_json(json.dumps(body["recipe"])), str(key), str(recipe_signature))
        except (ValueError, KeyError, TypeError, RecursionError, ConfigError):
            raise ConfigError(
                f"{what} cannot be read: the file was changed or is of another version; {advice}"
            ) from None
        if form != FORMAT or len(plain) != 6:
            raise ConfigError(f"{what} has another format, expected {FORMAT!r}; {advice}")
        approval = Approval(signed=claimed, by=str(by), time=str(time))
        # Before the signature, which is under the id: a version that counts a field more gives it another one, and
        # nobody has forged anything then.
        if approval.recipe_id != recipe_id:
            raise ConfigError(
                f"{what} holds another recipe, {approval.recipe_id[:12]}: it was changed, or approved under another "
                f"version of Fedicom, with which alone its run can go on; else {advice}"
            )
        own, name = Signer.load(self._home.signing_key).public, self._home.config.site
        if site != name or not signed_by(own, _signed_bytes(approval, name), str(signature)):
            raise ConfigError(
                f"{what} is not signed by this site's key: it was changed, or is of another site; {advice}"
            )
        # Whose recipe it is, is asked anew each time: the coordinator's key may have been exchanged since.
        coordinator = self._home.registry.coordinator
        try:
            parse_recipe(json.dumps(body), coordinator)
        except ConfigError as error:
            raise ConfigError(f"{what} is not valid any more: {error}") from None
        return approval

    def withdraw(self, recipe_id: str, *, by: str, log: Log) -> None:
        """Ends an approval, also one that does not hold; what was kept to be sent again goes as well.

        Raises:
            ConfigError: There is no approval of this recipe.
            StorageError: The record cannot be removed, or the log not written.
        """
        path = self._file(recipe_id)
        aside = path.with_suffix(".withdrawn")
        if not _ID.fullmatch(recipe_id) or not (path.is_file() or aside.is_file()):
            raise ConfigError(f"recipe {ascii(recipe_id)[1:13]} is not approved here; nothing was changed")
        # First aside, then logged, then gone: from a crash or a full disk on nothing trains, and asked for again it is
        # logged: where the log does not say so, a record that is put back from a backup would hold.
        with storing("the record of an approval"):
            if path.is_file():
                path.replace(aside)
        self.forget(recipe_id)
        log.append("approval withdrawn", recipe_id=recipe_id, by=by)
        with storing("the record of an approval"):
            aside.unlink(missing_ok=True)

    def forget(self, recipe_id: str) -> None:
        """Removes the replies that were kept to be sent again, and what rounding left out of them.

        Raises:
            StorageError: One cannot be removed.
        """
        with storing("a kept reply"):
            for folder in ("outbox", "remainders"):
                for kept in (self._home.state / folder).glob(f"{recipe_id[:16]}-*"):
                    kept.unlink()
                drop_unfinished(self._home.state / folder, f"{recipe_id[:16]}-*")

    def withdrawing(self) -> tuple[str, ...]:
        """Recipes whose withdrawal was cut off before the log had it; withdrawn again they go."""
        return self._named("withdrawn")

    def ids(self) -> tuple[str, ...]:
        """Recipes that have a record, whether it holds or not."""
        return self._named("json")

    def _named(self, kind: str) -> tuple[str, ...]:
        with storing("the approved recipes"):
            found = self._home.approved.glob(f"*.{kind}")
            return tuple(sorted(path.stem for path in found if _ID.fullmatch(path.stem)))

    def all(self) -> tuple[Approval, ...]:
        """All approvals that hold, the newest last."""
        found = []
        for recipe_id in self.ids():
            try:
                approval = self.find(recipe_id)
            except FedicomError:
                continue  # `find` tells whoever asks for this one
            if approval is not None:
                found.append(approval)
        return tuple(sorted(found, key=lambda approval: approval.time))

    def _file(self, recipe_id: str) -> Path:
        return self._home.approved / f"{recipe_id}.json"


def _signed_bytes(approval: Approval, site: str) -> bytes:
    # The coordinator's own signature is under the id: whoever approves, approves both.
    plain = {
        "site": site,
        "by": approval.by,
        "time": approval.time,
        "recipe_id": approval.recipe_id,
        "coordinator": approval.signed.coordinator,
        "recipe_signature": approval.signed.signature,
    }
    return f"{FORMAT}\n{json.dumps(plain, sort_keys=True, separators=(',', ':'))}".encode()
