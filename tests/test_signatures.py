"""What a signature is under: its purpose stands first, so that none can pass for another one of the same key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from client.approvals import Approvals
from common import wire
from common.audit import AuditLog
from common.blobs import BESIDE_BYTES
from common.deployment import FederationPlan, SiteHome
from common.enrolment import public_file
from common.exchange import WIRE_VERSION, Question, RoundPlan
from common.identity import NodeKey, Signer
from common.journal import SharedLog
from common.secagg import Member, Subject
from common.signed import sign_recipe
from common.weights import Weights
from server.provision import provision
from tests.client.conftest import recipe_of

A, B = "a" * 64, "b" * 64
PURPOSES = {
    "fedicom recipe 1",
    "fedicom approval 1",
    "fedicom registry 1",
    "fedicom kit 1",
    "fedicom site keys 1",
    "fedicom message",
    "fedicom message with blobs",
    "fedicom audit hand-over",
    "fedicom secure aggregation offer",
    "fedicom secure aggregation list",
}


class Beside:
    ticket, most_bytes = "1f" * 16, 1 << 30

    def put(self, name: str, piece: memoryview) -> None: ...

    def get(self, name: str, piece: memoryview) -> None: ...


def summed(signers: list[Signer]) -> None:
    """The part of a secure sum that is signed: offers, then the list of the masked updates that came."""
    keys = {f"s{number}": signer.public for number, signer in enumerate(signers)}
    subject = Subject(recipe_id=A, round=1, base=B)
    members = {
        site: Member(site, subject, signer=signer, keys=keys, sites=3, threshold=3)
        for site, signer in zip(keys, signers, strict=True)
    }
    offers = {site: member.offer for site, member in members.items()}
    dealt = {site: member.deal(offers) for site, member in members.items()}
    session, words = subject.session(offers), np.zeros(2, np.uint32)
    masked = {
        site: member.mask(session, {dealer: boxes[site] for dealer, (_, _, boxes) in dealt.items()}, words).digest
        for site, member in members.items()
    }
    members["s0"].agree(session, masked)


def test_whatever_is_signed_begins_with_what_it_is_for_or_is_the_hash_of_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[bytes] = []
    sign = Signer.sign
    monkeypatch.setattr(Signer, "sign", lambda self, data: signed.append(data) or sign(self, data))
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=("north", "south")), tmp_path / "kits")
    home, own = SiteHome(tmp_path / "kits" / "north"), Signer.temporary()
    recipe = sign_recipe(recipe_of(), Signer.load(tmp_path / "kits" / "coordinator" / "keys" / "signing.key"))
    log = SharedLog(home.audit_file, Signer.load(home.signing_key))
    Approvals(home).approve(recipe, by="Dr Roe", log=log)
    public_file(own, NodeKey.new(), federation="trial", site="north", previous=Signer.temporary())
    weights = Weights({"w": np.zeros(BESIDE_BYTES // 4, np.float32)})
    wire.encode(RoundPlan(recipe_id=A, round=1, work="train", weights=weights), own, Beside())
    wire.encode(Question(recipe_id=A), own)
    AuditLog(tmp_path / "own.jsonl", own).hand_over(Signer.temporary())
    summed([Signer.temporary() for _ in range(3)])
    hashes = [text for text in signed if len(text) == 32]  # shorter than any of the purposes with what follows it
    assert {text.partition(b"\n")[0].decode() for text in signed if text not in hashes} == PURPOSES
    assert len(hashes) >= 3  # log started, recipe approved, key rotated


def test_the_signature_of_a_message_is_under_its_kind_its_version_and_the_hashes_of_its_parts() -> None:
    own, values = Signer.temporary(), np.array([1.0, 2.0], "<f4")
    plan = RoundPlan(recipe_id=A, round=1, work="train", weights=Weights({"w": values}))
    message = wire.encode(plan, own).config_records["message"]
    body, array = (
        hashlib.sha256(part).hexdigest() for part in (str(message["body"]).encode(), b"weights\n" + values.tobytes())
    )
    assert json.loads(str(message["body"]))["weights"] == {"w": [2]}
    assert message["signature"] == own.sign(f"fedicom message\nplan\n{WIRE_VERSION}\n{body}\n{array}".encode())
