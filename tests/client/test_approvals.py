"""What counts as approved: a record under this site's key, of a recipe under its coordinator's key, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from client.approvals import Approvals
from common.audit import verify
from common.config import Recipe, as_plain
from common.errors import ConfigError, PrivacyError, StorageError
from common.identity import Signer
from common.journal import SharedLog
from common.signed import sign_recipe
from tests.client.conftest import PLAIN, House, recipe_of


def approve(house: House, **parts: Any) -> str:
    signed = house.sign(recipe_of(**parts))
    return Approvals(house.home).approve(signed, by="Dr Roe", log=house.log).recipe_id


def test_an_approval_holds_the_whole_signed_recipe_and_who_gave_it(house: House) -> None:
    signed, approvals = house.sign(), Approvals(house.home)
    assert approvals.find(signed.recipe.id) is None
    approvals.approve(signed, by="Dr Roe", log=house.log)
    found = approvals.find(signed.recipe.id)
    assert found is not None
    assert (found.signed, found.by) == (signed, "Dr Roe")
    last = verify(house.home.audit_file)[-1]
    assert last.kind == "recipe approved"
    assert last.facts == {
        "recipe_id": signed.recipe.id, "name": "tiny", "by": "Dr Roe", "coordinator": house.coordinator.public,
    }  # fmt: skip
    assert last.time[:16] == found.time[:16]
    assert approvals.all() == (found,)
    assert house.home.approved.stat().st_mode & 0o777 == 0o700


def test_a_withdrawn_approval_is_gone_with_the_reply_that_was_kept(house: House) -> None:
    mine, other = approve(house), approve(house, seed=1)
    outbox, left_out = folders = [house.home.state / name for name in ("outbox", "remainders")]
    for folder in folders:
        folder.mkdir(parents=True)
    for recipe_id in (mine, other):
        (outbox / f"{recipe_id[:16]}-000001-abc.bin").write_bytes(b"update")
        (left_out / f"{recipe_id[:16]}-000001.safetensors").write_bytes(b"what rounding left out")
    approvals = Approvals(house.home)
    approvals.withdraw(mine, by="Dr Roe", log=house.log)
    assert approvals.find(mine) is None
    assert approvals.ids() == (other,)
    assert [path.name[:16] for folder in folders for path in folder.iterdir()] == [other[:16]] * 2
    last = verify(house.home.audit_file)[-1]
    assert (last.kind, last.facts) == ("approval withdrawn", {"recipe_id": mine, "by": "Dr Roe"})
    with pytest.raises(ConfigError, match="not approved here"):
        approvals.withdraw(mine, by="Dr Roe", log=house.log)


def test_a_withdrawal_that_could_not_be_logged_holds_and_is_logged_when_it_is_asked_for_again(house: House) -> None:
    mine, approvals = approve(house), Approvals(house.home)
    outbox = house.home.state / "outbox"
    outbox.mkdir(parents=True)
    (outbox / f".{mine[:16]}-000001-abc.bin.77.tmp").write_bytes(b"update, cut off while it was written")

    class Full:
        head = ""

        def append(self, kind: str, **facts: Any) -> str:
            raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        approvals.withdraw(mine, by="Dr Roe", log=Full())
    assert approvals.find(mine) is None
    assert (approvals.ids(), approvals.withdrawing()) == ((), (mine,))
    assert verify(house.home.audit_file)[-1].kind == "recipe approved"
    approvals.withdraw(mine, by="Dr Roe", log=house.log)
    assert verify(house.home.audit_file)[-1].kind == "approval withdrawn"
    assert approvals.withdrawing() == ()
    assert list(outbox.iterdir()) == []


def test_a_recipe_of_another_coordinator_cannot_be_approved(house: House) -> None:
    foreign = sign_recipe(recipe_of(), Signer.temporary())
    with pytest.raises(ConfigError, match="trusts coordinator"):
        Approvals(house.home).approve(foreign, by="Dr Roe", log=house.log)
    assert Approvals(house.home).ids() == ()


def test_a_recipe_whose_signature_is_borrowed_from_another_cannot_be_approved(house: House) -> None:
    borrowed = replace(house.sign(recipe_of(rounds=3)), recipe=recipe_of(rounds=99))
    with pytest.raises(ConfigError, match="signature"):
        Approvals(house.home).approve(borrowed, by="Dr Roe", log=house.log)


def test_the_policys_objections_refuse_until_they_are_cured(house: House) -> None:
    signed, approvals = house.sign(recipe_of(privacy=PLAIN, rounds=900)), Approvals(house.home)
    with pytest.raises(PrivacyError) as refused:
        approvals.approve(signed, by="Dr Roe", log=house.log)
    assert "(require_privacy)" in str(refused.value)
    assert "(max_rounds)" in str(refused.value)
    assert approvals.ids() == ()
    house.policy(require_privacy=False, max_rounds=900)
    approvals.approve(signed, by="Dr Roe", log=house.log)
    assert approvals.ids() == (signed.recipe.id,)


@pytest.mark.parametrize("by", ["", "two\nlines", "\x1b[2J", "x" * 201, "Andr\udce9"])
def test_an_approval_needs_a_name(house: House, by: str) -> None:
    before = house.log.head
    with pytest.raises(ConfigError, match="name"):
        Approvals(house.home).approve(house.sign(), by=by, log=house.log)
    assert house.log.head == before


def test_nothing_is_approved_that_the_log_does_not_know_of(house: House) -> None:
    class Full(SharedLog):
        def append(self, kind: str, **facts: Any) -> str:
            raise StorageError("the disk is full")

    log = Full(house.home.audit_file, Signer.load(house.home.signing_key))
    with pytest.raises(StorageError):
        Approvals(house.home).approve(house.sign(), by="Dr Roe", log=log)
    assert Approvals(house.home).ids() == ()


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain.__setitem__(name, value)


def rounds(plain: dict[str, Any]) -> None:
    plain["recipe"]["recipe"]["rounds"] = 99


def renamed(plain: dict[str, Any]) -> None:
    """Another content with its own right hash."""
    rounds(plain)
    plain["recipe"]["id"] = recipe_of(rounds=99).id


@pytest.mark.parametrize(
    "tamper",
    [
        changed("by", "Dr Doe"),
        changed("time", "2020-01-01T00:00:00+00:00"),
        changed("site", "south"),
        changed("format", "fedicom approval 2"),
        changed("signature", "0" * 128),
        changed("signature", 7),
        changed("note", "one field more"),
        changed("recipe", {}),
        rounds,
        renamed,
        lambda plain: plain["recipe"]["recipe"].__setitem__("rounds", 0),
        lambda plain: plain["recipe"].__setitem__("coordinator", "0" * 64),
        lambda plain: plain["recipe"].__setitem__("signature", "0" * 128),
        lambda plain: plain.pop("by"),
    ],
)
def test_a_record_that_was_changed_is_an_error_and_never_used(house: House, tamper: Callable[[Any], None]) -> None:
    recipe_id, approvals = approve(house), Approvals(house.home)
    path = house.home.approved / f"{recipe_id}.json"
    plain = json.loads(path.read_text())
    tamper(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=f"the approval of recipe {recipe_id[:12]}"):
        approvals.find(recipe_id)
    assert approvals.all() == ()
    assert approvals.ids() == (recipe_id,)
    approvals.withdraw(recipe_id, by="Dr Roe", log=house.log)  # what does not hold can still be removed
    assert approvals.find(recipe_id) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"RECORD" + b" " * (2 << 20)])
def test_a_record_that_cannot_be_read_is_an_error(house: House, text: bytes) -> None:
    recipe_id = approve(house)
    path = house.home.approved / f"{recipe_id}.json"
    path.write_bytes(text.replace(b"RECORD", path.read_bytes()))
    with pytest.raises(ConfigError, match="approve the recipe anew"):
        Approvals(house.home).find(recipe_id)


def test_the_record_of_one_recipe_does_not_approve_another(house: House) -> None:
    recipe_id, other = approve(house), recipe_of(seed=1).id
    (house.home.approved / f"{recipe_id}.json").rename(house.home.approved / f"{other}.json")
    with pytest.raises(ConfigError, match="holds another recipe"):
        Approvals(house.home).find(other)


def test_an_approval_given_under_another_version_is_told_from_a_forgery(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:  # its recipes had one field more, so that it gives all of them other ids
        fields = property(lambda recipe: json.dumps(as_plain(recipe) | {"novelty": False}, sort_keys=True).encode())
        older.setattr(Recipe, "canonical", fields)
        recipe_id = approve(house)
        assert Approvals(house.home).find(recipe_id) is not None
    with pytest.raises(ConfigError, match="approved under another version of Fedicom, with which alone its run"):
        Approvals(house.home).find(recipe_id)


def test_another_sites_approval_does_not_count_here(house: House, south: House) -> None:
    recipe_id = approve(south)
    house.home.approved.mkdir()
    (south.home.approved / f"{recipe_id}.json").rename(house.home.approved / f"{recipe_id}.json")
    with pytest.raises(ConfigError, match="not signed by this site's key"):
        Approvals(house.home).find(recipe_id)


def test_an_approval_ends_when_the_coordinators_key_is_exchanged(house: House) -> None:
    recipe_id, approvals = approve(house), Approvals(house.home)
    registry, authority = house.home.registry, Signer.load(house.kits / "authority" / "authority.key")
    replace(registry, coordinator=Signer.temporary().public, version=2).write(house.home.registry_file, authority)
    with pytest.raises(ConfigError, match="not valid any more"):
        approvals.find(recipe_id)
    assert approvals.all() == ()


@pytest.mark.parametrize("name", ["", "../keys/signing", "a" * 63, "A" * 64])
def test_a_name_that_is_no_hash_finds_nothing_and_withdraws_nothing_whatever_file_has_it(
    house: House, name: str
) -> None:
    recipe_id, approvals = approve(house), Approvals(house.home)
    copy = house.home.approved / f"{name}.json"
    copy.write_bytes((house.home.approved / f"{recipe_id}.json").read_bytes())
    assert approvals.find(name) is None
    assert approvals.ids() == (recipe_id,)
    with pytest.raises(ConfigError, match="not approved here"):
        approvals.withdraw(name, by="Dr Roe", log=house.log)
    assert copy.exists()
