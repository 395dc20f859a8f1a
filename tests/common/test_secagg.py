"""Secure sums: right or refused, whoever leaves or lies; what the coordinator sees tells nothing of one update."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from common.errors import SecureAggregationError
from common.exchange import Offer
from common.fixed import Residues, fewest
from common.identity import Signer
from common.secagg import Aggregator, Member, Subject, add_mask

SUBJECT = Subject(recipe_id="a" * 64, round=3, base="b" * 64)
NUMBERS = 50
SIGNERS = {f"s{number}": Signer.from_bytes(bytes([number]) * 32) for number in range(1, 9)}
KEYS = {site: signer.public for site, signer in SIGNERS.items()}


def update(site: str, numbers: int = NUMBERS) -> np.ndarray:
    return np.random.default_rng(list(site.encode())).integers(0, 2**32, numbers, np.uint32)


class Circle:
    """Sites and coordinator of one sum; keeps every byte that the coordinator receives."""

    def __init__(self, sites: int = 4, *, threshold: int = 0, random=None, mask=None, numbers: int = NUMBERS) -> None:
        self.names = sorted(SIGNERS)[:sites]
        self.threshold, self.mask = threshold or fewest(sites), mask
        self.members = {
            site: Member(
                site, SUBJECT, signer=SIGNERS[site], keys=KEYS, sites=sites, threshold=self.threshold,
                mask=mask, **({"random": random(site)} if random else {}),
            )
            for site in self.names
        }  # fmt: skip
        self.updates = {site: update(site, numbers) for site in self.names}
        self.numbers, self.view, self.sent = numbers, [], {}

    def seen(self, *what: object) -> None:
        """The coordinator receives this."""
        self.view.append(json.dumps(what, default=lambda value: asdict(value), sort_keys=True))

    def offered(self) -> Aggregator:
        # from the last: neither a hash nor a holder's number may hang on the order in which they come
        offers = {site: self.members[site].offer for site in reversed(self.names)}
        self.seen("offers", offers)
        self.server = Aggregator(SUBJECT, offers, threshold=self.threshold, numbers=self.numbers)
        return self.server

    def dealt(self, without=()) -> Aggregator:
        server = self.offered()
        for site in self.staying(without):
            dealing = self.members[site].deal(server.offers)
            self.seen(site, *dealing)
            server.deal(site, *dealing)
        return server

    def masked(self, without=(), undealt=()) -> Aggregator:
        server = self.dealt(undealt)
        for site, boxes in server.boxes().items():
            if site not in without:
                values = self.members[site].mask(server.session, boxes, self.updates[site])
                self.seen(site, values.words.tolist())
                self.sent[site] = values
                server.add(site, server.session, values)
        return server

    def agreed(self, without=(), unmasked=(), undealt=()) -> Aggregator:
        server = self.masked(unmasked, undealt)
        for site in [site for site in server.masked if site not in without]:
            signature = self.members[site].agree(server.session, server.masked)
            self.seen(site, signature)
            server.sign(site, server.session, signature)
        return server

    def opened(self, without=(), unsigned=(), unmasked=(), undealt=()) -> Aggregator:
        server = self.agreed(unsigned, unmasked, undealt)
        for site in [site for site in server.masked if site not in without]:
            shares = self.members[site].open(server.session, server.masked, server.signatures)
            self.seen(site, *shares)
            server.open(site, server.session, *shares)
        return server

    def staying(self, without) -> list[str]:
        return [site for site in self.names if site not in without]

    def sum_of(self, sites) -> list[int]:
        return sum(self.updates[site].astype(np.uint64) for site in sites).astype(np.uint32).tolist()


def total(circle: Circle, server: Aggregator) -> list[int]:
    return server.total(circle.mask).tolist()


# The sum


@pytest.mark.parametrize("sites", [3, 4, 7])
def test_the_sum_is_that_of_the_updates(sites):
    circle = Circle(sites)
    assert total(circle, circle.opened()) == circle.sum_of(circle.names)


@pytest.mark.parametrize(
    ("gone", "summed"),
    [
        ({"undealt": ["s2"]}, ["s1", "s3", "s4"]),
        ({"unmasked": ["s2"]}, ["s1", "s3", "s4"]),  # dropped before masking: its key is opened, and its masks go
        ({"unsigned": ["s2"], "without": ["s2"]}, ["s1", "s2", "s3", "s4"]),  # after masking: its seed is opened
        ({"without": ["s4"]}, ["s1", "s2", "s3", "s4"]),
    ],
)
def test_a_site_may_leave_at_every_step(gone, summed):
    circle = Circle(4)
    assert total(circle, circle.opened(**gone)) == circle.sum_of(summed)


@given(st.lists(st.integers(0, 5), min_size=7, max_size=7))
@settings(max_examples=60, deadline=None)
def test_whoever_leaves_when_the_sum_is_right_or_refused(leaves):
    # 0 leaves before dealing, 1 before masking, 2 before signing, 3 before opening; 4 and 5 stay. Five of seven needed.
    circle = Circle(7)
    left = dict(zip(circle.names, leaves, strict=True))
    gone = [[site for site, step in left.items() if step <= upto] for upto in range(4)]
    if len(gone[3]) <= 2:
        server = circle.opened(gone[3], gone[2], gone[1], gone[0])
        assert total(circle, server) == circle.sum_of(circle.staying(gone[1]))
        return
    with pytest.raises(SecureAggregationError):
        circle.opened(gone[3], gone[2], gone[1], gone[0]).total()


def test_a_mask_is_the_whole_chacha20_keystream_across_pieces_and_comes_off_again():
    words = update("s1", 3 * (1 << 18) + 5)
    plain, key = words.copy(), bytes(range(32))
    add_mask(key, words, False)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * len(words)))
    assert ((words - plain) == np.frombuffer(stream, "<u4")).all()
    add_mask(key, words, True)
    assert (words == plain).all()


def test_no_mask_key_serves_twice():
    used: list[bytes] = []

    def noted(key, words, negative):
        used.append(key)
        add_mask(key, words, negative)

    for _ in range(2):
        Circle(4, mask=noted).masked()
    # of each sum: a mask for each of four sites, and six that two sites share
    assert len(used) == 2 * 16
    assert len(set(used)) == 2 * 10


# What the coordinator learns


class Ideal:
    """Randomness that a proof may choose: secret bytes by site, and masks that are tables instead of keystreams."""

    def __init__(self, shifted: dict[bytes, np.ndarray] | None = None) -> None:
        self.table: dict[bytes, np.ndarray] = {}
        self.shifted = shifted or {}

    def random(self, site: str) -> Callable[[int], bytes]:
        rng = np.random.default_rng(list(site.encode()))
        return lambda size: rng.bytes(size)

    def mask(self, key: bytes, words: np.ndarray, negative: bool) -> None:
        if key not in self.table:
            rng = np.random.default_rng(list(key))
            self.table[key] = rng.integers(0, 2**32, len(words), np.uint32)
        value = self.table[key] + self.shifted.get(key, np.uint32(0))
        words += np.uint32(0) - value if negative else value


@pytest.mark.parametrize("gone", [{}, {"unmasked": ["s4"]}, {"without": ["s3"]}])
def test_every_byte_fits_any_other_updates_of_the_same_sum_equally_well(gone):
    # The coordinator's view as a function of updates and randomness. Move any vector z from one honest site's update to
    # another's, and subtract it from the mask that the two share: every byte that the coordinator receives, and the
    # sum, stay the same. Masks are uniform, so both worlds are equally likely: it cannot tell them apart.
    ideal = Ideal()
    one = Circle(5, random=ideal.random, mask=ideal.mask)
    first = total(one, one.opened(**gone))
    shift = np.random.default_rng(7).integers(0, 2**32, NUMBERS, np.uint32)
    pair = _pair_key(one, "s1", "s2")
    other_world = Ideal({pair: np.uint32(0) - shift})
    other = Circle(5, random=other_world.random, mask=other_world.mask)
    other.updates["s1"] = one.updates["s1"] + shift
    other.updates["s2"] = one.updates["s2"] - shift
    second = total(other, other.opened(**gone))
    assert other.view == one.view
    assert len(one.view) == 1 + 5 + len(one.sent) + 5 - len(gone.get("unmasked", [])) + len(one.sent) - len(
        gone.get("without", [])
    )
    assert second == first
    for site in ("s1", "s2"):
        assert (other.updates[site] != one.updates[site]).mean() > 0.9
        assert one.sent[site] == other.sent[site]


def _pair_key(circle: Circle, one: str, other: str) -> bytes:
    from common.secagg import _pair

    first, second = circle.members[one], circle.members[other]
    keys = {
        _pair(first._mask_key, second.offer.mask_key, circle.server.session, one, other),
        _pair(second._mask_key, first.offer.mask_key, circle.server.session, other, one),
    }
    assert len(keys) == 1
    return keys.pop()


def test_with_fewer_holders_than_the_threshold_the_view_holds_no_secret():
    # All that the coordinator and two of four sites know together does not open the seed of a third one.
    circle = Circle(4)
    server = circle.agreed()
    for site in ("s1", "s2"):
        server.open(site, server.session, *circle.members[site].open(server.session, server.masked, server.signatures))
    with pytest.raises(SecureAggregationError, match="2 shares of site s1's secret have come, expected at least 3"):
        server.total()
    for secret in (circle.members["s3"]._seed, circle.members["s3"]._mask_key.private_bytes_raw()):
        assert secret.hex() not in "".join(circle.view)


def test_masked_updates_look_uniform_and_unlike_each_other():
    # All sites send the same constant: whatever structure showed would be that of the masks.
    circle = Circle(4, numbers=1 << 16)
    circle.updates = {site: np.full(1 << 16, 5, np.uint32) for site in circle.names}
    circle.masked()
    for values in circle.sent.values():
        bytes_ = np.bincount(values.words.view(np.uint8), minlength=256)
        assert chisquare(bytes_).pvalue > 1e-6
        assert kstest(values.words / 2**32, "uniform").pvalue > 1e-6
    for one, other in pairwise(circle.sent.values()):
        assert kstest((one.words - other.words) / 2**32, "uniform").pvalue > 1e-6
        assert abs(np.corrcoef(one.words, other.words)[0, 1]) < 0.03


def test_the_seed_and_the_key_of_one_site_are_never_opened_both():
    circle = Circle(5)
    server = circle.agreed(unmasked=["s4"])
    member = circle.members["s1"]
    seeds, keys = member.open(server.session, server.masked, server.signatures)
    assert set(seeds) == {"s1", "s2", "s3", "s5"}
    assert set(keys) == {"s4"}
    other = {site: digest for site, digest in server.masked.items() if site != "s2"}
    for list_ in (other, {**server.masked, "s4": "c" * 64}):
        with pytest.raises(SecureAggregationError, match="not the list that this site has signed"):
            member.open(server.session, list_, server.signatures)


# Lies


def test_a_share_that_was_not_dealt_is_named_and_left_out():
    circle = Circle(4)
    server = circle.agreed()
    for site in circle.names:
        seeds, keys = circle.members[site].open(server.session, server.masked, server.signatures)
        if site == "s2":
            seeds = {**seeds, "s3": "0" * 66}
            with pytest.raises(SecureAggregationError, match="share of site s3's seed is not the one that was dealt"):
                server.open(site, server.session, seeds, keys)
        else:
            server.open(site, server.session, seeds, keys)
    assert total(circle, server) == circle.sum_of(circle.names)


def test_two_liars_of_four_stop_the_sum():
    circle = Circle(4)
    server = circle.agreed()
    for site in circle.names:
        seeds, keys = circle.members[site].open(server.session, server.masked, server.signatures)
        if site in ("s2", "s3"):
            with pytest.raises(SecureAggregationError, match="not the one that was dealt"):
                server.open(site, server.session, dict.fromkeys(seeds, "1" * 65 + "0"), keys)
        else:
            server.open(site, server.session, seeds, keys)
    with pytest.raises(SecureAggregationError, match="2 shares of site s1's secret have come"):
        server.total()


@pytest.mark.parametrize("what", ["sealed", "seed_share", "key_share"])
def test_a_holder_refuses_a_box_that_is_not_what_its_sender_committed_to(what):
    circle = Circle(4)
    server = circle.dealt()
    boxes = server.boxes()["s1"]
    wrong = getattr(boxes["s3"], what)
    boxes["s3"] = replace(boxes["s3"], **{what: ("1" if wrong[0] != "1" else "2") + wrong[1:]})
    with pytest.raises(SecureAggregationError, match="site s3"):
        circle.members["s1"].mask(server.session, boxes, circle.updates["s1"])


def test_a_box_for_another_holder_or_of_another_session_is_refused():
    circle = Circle(4)
    server = circle.dealt()
    boxes = server.boxes()
    swapped = {**boxes["s1"], "s3": boxes["s2"]["s3"]}
    with pytest.raises(SecureAggregationError, match="box of site s3 cannot be opened"):
        circle.members["s1"].mask(server.session, swapped, circle.updates["s1"])
    earlier = Circle(4).dealt().boxes()["s1"]
    with pytest.raises(SecureAggregationError, match="cannot be opened"):
        circle.members["s1"].mask(server.session, earlier, circle.updates["s1"])


@pytest.mark.parametrize(("gone", "secret"), [([], "seed"), (["s3"], "key")])
@pytest.mark.parametrize("value", [0, 2**256, 2**264 - 1], ids=["zero", "no 32 bytes", "no share"])
def test_a_dealer_whose_shares_fit_their_commitments_but_not_its_secret_is_named(monkeypatch, gone, secret, value):
    circle = Circle(4)
    server = circle.offered()
    for site in circle.names:
        if site == "s3":  # the same number to everybody, which would be the secret itself
            with monkeypatch.context() as patch:
                patch.setattr("common.secagg.split", lambda _, holders, *rest: [value.to_bytes(33, "little")] * holders)
                dealing = circle.members[site].deal(server.offers)
        else:
            dealing = circle.members[site].deal(server.offers)
        server.deal(site, *dealing)
    for site, boxes in server.boxes().items():
        if site not in gone:
            server.add(site, server.session, circle.members[site].mask(server.session, boxes, circle.updates[site]))
    for site in server.masked:
        server.sign(site, server.session, circle.members[site].agree(server.session, server.masked))
    for site in server.masked:
        server.open(site, server.session, *circle.members[site].open(server.session, server.masked, server.signatures))
    with pytest.raises(SecureAggregationError, match=f"site s3 has dealt shares of another {secret}"):
        server.total()


def test_a_coordinator_that_shows_two_lists_opens_nothing():
    # Two honest groups are shown two lists: no list gets the signatures of three of four.
    circle = Circle(4)
    server = circle.masked()
    lists = [{site: digest for site, digest in server.masked.items() if site != away} for away in ("s4", "s1")]
    shown = {"s1": lists[0], "s2": lists[0], "s3": lists[1], "s4": lists[1]}
    signed = {site: circle.members[site].agree(server.session, list_) for site, list_ in shown.items()}
    for site, list_ in shown.items():
        with pytest.raises(SecureAggregationError, match="2 sites have signed this list, expected 3"):
            circle.members[site].open(server.session, list_, signed)
    with pytest.raises(SecureAggregationError, match="has signed another list"):
        circle.members["s2"].agree(server.session, lists[1])


def test_a_coordinator_that_shows_two_sets_of_boxes_opens_nothing():
    # s1 is told that s4 did not share out: its masks would not cancel, and the lists that are signed say so.
    circle = Circle(4)
    server = circle.dealt()
    for site, boxes in server.boxes().items():
        if site == "s1":
            del boxes["s4"]
        if site != "s4":
            server.add(site, server.session, circle.members[site].mask(server.session, boxes, circle.updates[site]))
    signed = {site: circle.members[site].agree(server.session, server.masked) for site in server.masked}
    with pytest.raises(SecureAggregationError, match="1 sites have signed this list, expected 3"):
        circle.members["s1"].open(server.session, server.masked, signed)


def test_a_coordinator_cannot_say_that_another_masked_update_came():
    circle = Circle(4)
    server = circle.masked()
    with pytest.raises(SecureAggregationError, match="does not hold the masked update that this site has sent"):
        circle.members["s1"].agree(server.session, {**server.masked, "s1": "c" * 64})
    assert circle.members["s1"].agree(server.session, {**server.masked, "s2": "c" * 64})  # s2 will not sign that


def test_signatures_of_strangers_and_of_other_lists_do_not_count():
    circle = Circle(4)
    server = circle.agreed()
    member, good = circle.members["s1"], server.signatures
    other = Circle(4).agreed().signatures
    for signed in ({}, {**good, "s2": other["s2"], "s3": good["s4"]}, {**other, "s8": good["s1"], "s1": good["s1"]}):
        with pytest.raises(SecureAggregationError, match="have signed this list, expected 3"):
            member.open(server.session, server.masked, signed)
    assert member.open(server.session, server.masked, good)


def test_only_signatures_of_sites_on_the_list_count():
    # s5 did not send, and s7 is of the registry alone: what they sign vouches for no list.
    circle = Circle(5)
    server = circle.agreed(unmasked=["s5"])
    came = [f"{site} {digest}" for site, digest in sorted(server.masked.items())]
    text = "\n".join(("fedicom secure aggregation list", server.session, "s1 s2 s3 s4 s5", *came)).encode()
    signed = {site: SIGNERS[site].sign(text) for site in (*circle.names, "s7")}
    assert {site: signed[site] for site in server.masked} == server.signatures
    few = {site: signature for site, signature in signed.items() if site != "s4"}
    with pytest.raises(SecureAggregationError, match="3 sites have signed this list, expected 4"):
        circle.members["s1"].open(server.session, server.masked, few)


def test_boxes_and_lists_are_enough_of_the_sums_own_sites_and_hold_this_one():
    circle = Circle(5)
    member, boxes = circle.members["s1"], circle.dealt().boxes()["s1"]
    session = circle.server.session
    for wrong in ({**boxes, "s8": boxes["s2"]}, {site: box for site, box in boxes.items() if site != "s1"}):
        with pytest.raises(SecureAggregationError, match="expected at least 4 of the session's, with this one"):
            member.mask(session, wrong, circle.updates["s1"])
    masked = {site: circle.members[site].mask(session, circle.server.boxes()[site], circle.updates[site]).digest
              for site in circle.names}  # fmt: skip
    for number, wrong in ((3, dict(list(masked.items())[:3])), (6, {**masked, "s8": masked["s2"]})):
        with pytest.raises(SecureAggregationError, match=f"the list has {number} sites, expected at least 4"):
            member.agree(session, wrong)
    assert member.agree(session, masked)  # nothing of the above was signed


def test_hashes_are_over_all_that_they_are_about():
    circle = Circle(4)
    server = circle.masked()

    def spelt(purpose: str, *parts: str) -> str:
        return hashlib.sha256("\n".join((f"fedicom secure aggregation {purpose}", *parts)).encode()).hexdigest()

    keys = [f"{site} {offer.mask_key} {offer.share_key}" for site, offer in sorted(server.offers.items())]
    assert server.session == spelt("session", "a" * 64, "3", "b" * 64, *keys)
    seed, boxes = circle.members["s1"].deal(server.offers)[1:]
    about = (server.session, "s1")
    assert seed == spelt("commitment", *about, circle.members["s1"]._seed.hex())
    for holder, box in boxes.items():
        of_seed, of_key = (share.hex() for share in circle.members[holder]._shares["s1"])
        assert box.seed_share == spelt("commitment", *about, "seed", holder, of_seed)
        assert box.key_share == spelt("commitment", *about, "key", holder, of_key)


def test_every_key_is_made_for_one_purpose_of_one_sum():
    used: list[bytes] = []

    def noted(key, words, negative):
        used.append(key)
        add_mask(key, words, negative)

    circle = Circle(3, mask=noted)
    circle.masked()
    session, offers = circle.server.session, circle.server.offers

    def made(secret: bytes, purpose: str) -> bytes:
        info = f"fedicom secure aggregation {purpose}".encode()
        return HKDF(SHA256(), 32, salt=bytes.fromhex(session), info=info).derive(secret)

    def shared(own: X25519PrivateKey, other: str) -> bytes:
        return own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other)))

    one = circle.members["s1"]
    pairs = [made(shared(one._mask_key, offers[other].mask_key), f"pair s1 {other}") for other in ("s2", "s3")]
    assert used[:3] == [made(one._seed, "self"), *pairs]
    for dealer, holder in (("s1", "s2"), ("s2", "s1"), ("s1", "s1")):
        own, other = circle.members[holder], offers[dealer].share_key
        key = made(shared(own._share_key, other), f"share {dealer} to {holder}")
        sealed = bytes.fromhex(circle.server.boxes()[holder][dealer].sealed)
        assert ChaCha20Poly1305(key).decrypt(bytes(12), sealed, session.encode()) == b"".join(own._shares[dealer])


# Keys


def changed(offers: dict[str, Offer], site: str, **fields: str) -> dict[str, Offer]:
    return {**offers, site: replace(offers[site], **fields)}


def test_a_site_deals_only_to_sites_of_its_registry_that_signed_their_keys():
    circle = Circle(4)
    offers = circle.offered().offers
    stranger = Member(
        "s9", SUBJECT, signer=Signer.temporary(), keys={}, sites=4, threshold=3
    )  # fmt: skip
    later = replace(SUBJECT, round=4)
    old = Member("s2", later, signer=SIGNERS["s2"], keys=KEYS, sites=4, threshold=3)
    low = Member("s2", SUBJECT, signer=SIGNERS["s2"], keys=KEYS, sites=4, threshold=3)
    text = "\n".join((
        "fedicom secure aggregation offer", SUBJECT.recipe_id, "3", SUBJECT.base, "s2", low.offer.mask_key, "0" * 64,
    ))  # fmt: skip
    no_key = replace(low.offer, share_key="0" * 64, signature=SIGNERS["s2"].sign(text.encode()))
    few = {site: offers[site] for site in ("s1", "s2")}
    for wrong, why in (
        ({**{s: o for s, o in offers.items() if s != "s4"}, "s9": stranger.offer}, "s9 is not in this site's registry"),
        (changed(offers, "s2", mask_key="d" * 64), "offered for site s2 are not signed by it"),
        (changed(offers, "s2", signature=offers["s3"].signature), "offered for site s2 are not signed by it"),
        ({**offers, "s2": old.offer}, "offered for site s2 are not signed by it"),
        ({**offers, "s2": replace(offers["s3"])}, "two sites offer the same key"),
        ({**offers, "s2": no_key}, "a key that is none"),
        (changed(offers, "s1", mask_key="d" * 64), "do not hold this site's own keys"),
        (few, "2 sites are to be summed, expected 3 to 4"),
        ({**offers, "s9": stranger.offer}, "5 sites are to be summed, expected 3 to 4"),
    ):
        with pytest.raises(SecureAggregationError, match=why):
            circle.members["s1"].deal(wrong)
    assert circle.members["s1"].deal(offers)


def test_thresholds_that_two_lists_could_reach_are_refused():
    for sites, threshold in ((4, 2), (6, 3), (3, 2), (4, 5), (2, 2)):
        with pytest.raises(SecureAggregationError, match=f"threshold {threshold} of {sites} sites"):
            Member("s1", SUBJECT, signer=SIGNERS["s1"], keys=KEYS, sites=sites, threshold=threshold)


# Asked again


def test_a_step_asked_again_has_the_same_answer_and_another_one_is_refused():
    circle = Circle(5)
    server = circle.agreed(unmasked=["s5"])
    member, session, boxes = circle.members["s1"], server.session, server.boxes()["s1"]
    turned = [dict(reversed(said.items())) for said in (server.offers, boxes, server.masked)]
    for offers_, boxes_, masked in ((server.offers, boxes, server.masked), turned):  # the same words in another order
        assert member.deal(offers_) == (session, *member.deal(server.offers)[1:])
        assert member.mask(session, boxes_, circle.updates["s1"]) == circle.sent["s1"]
        assert member.agree(session, masked) == server.signatures["s1"]
    opened = member.open(session, server.masked, server.signatures)
    assert member.open(session, server.masked, server.signatures) == opened
    again = Circle(5).offered()
    fewer = {site: box for site, box in boxes.items() if site != "s5"}
    for ask in (
        lambda: member.deal(again.offers),
        lambda: member.deal({site: offer for site, offer in server.offers.items() if site != "s5"}),
        lambda: member.mask(again.session, boxes, circle.updates["s1"]),
        lambda: member.agree(again.session, server.masked),
        lambda: member.open(again.session, server.masked, server.signatures),
    ):
        with pytest.raises(SecureAggregationError, match="another session"):
            ask()
    for other, update_ in ((boxes, circle.updates["s2"]), (fewer, circle.updates["s1"])):
        with pytest.raises(SecureAggregationError, match="a mask serves for one update"):
            member.mask(session, other, update_)


def test_steps_out_of_order_are_refused():
    circle = Circle(4)
    server = circle.dealt()
    member = circle.members["s1"]
    with pytest.raises(SecureAggregationError, match="does not hold the masked update"):
        member.agree(server.session, dict.fromkeys(circle.names, "c" * 64))
    with pytest.raises(SecureAggregationError, match="not the list"):
        member.open(server.session, {}, {})
    circle.members["s2"].mask(server.session, server.boxes()["s2"], circle.updates["s2"])
    fresh = Circle(4)
    fresh.offered()
    with pytest.raises(SecureAggregationError, match="another session"):
        fresh.members["s1"].mask(fresh.server.session, server.boxes()["s1"], circle.updates["s1"])
    with pytest.raises(SecureAggregationError, match="boxes of 2 sites came"):
        member.mask(server.session, dict(list(server.boxes()["s1"].items())[:2]), circle.updates["s1"])


def test_the_coordinator_refuses_what_is_not_for_its_sum():
    circle = Circle(4)
    server = circle.masked(without=["s4"])
    dealing = circle.members["s1"].deal(server.offers)
    for call, why in (
        (lambda: server.add("s1", server.session, circle.sent["s1"]), "the site's second"),
        (lambda: server.add("s9", server.session, circle.sent["s1"]), "that nobody asked for"),
        (lambda: server.add("s4", server.session, Residues(np.zeros(3, np.uint32))), "3 words, expected 50"),
        (lambda: server.add("s4", "f" * 64, circle.sent["s1"]), "another session"),
        (lambda: server.deal("s1", "f" * 64, *dealing[1:]), "another session"),
        (lambda: server.deal("s1", *dealing[:2], {"s1": dealing[2]["s1"]}), "not one for each site"),
        (lambda: server.sign("s1", "f" * 64, ""), "another session"),
        (lambda: server.open("s1", "f" * 64, {}, {}), "another session"),
        (lambda: server.open("s1", server.session, {}, {}), "not of the seeds in the sum"),
        (lambda: server.open("s1", server.session, {}, {"s4": "0" * 66}), "not of the seeds in the sum"),
        (lambda: server.open("s1", server.session, dict.fromkeys(server.masked, "0" * 66), {}), "keys of those who"),
        (lambda: Aggregator(SUBJECT, {}, threshold=3, numbers=1), "0 offers of keys, expected at least 3"),
    ):
        with pytest.raises(SecureAggregationError, match=why):
            call()
    assert hashlib.sha256(circle.sent["s1"].words.tobytes()).hexdigest() == server.masked["s1"]


def test_the_coordinator_goes_on_with_no_fewer_sites_than_the_threshold():
    with pytest.raises(SecureAggregationError, match="2 sites have shared out their secrets, expected at least 3"):
        Circle(4).dealt(without=["s2", "s4"]).boxes()
    with pytest.raises(SecureAggregationError, match="0 masked updates have come, expected at least 3"):
        Circle(4).dealt().total()
