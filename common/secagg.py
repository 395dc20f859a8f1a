"""Secure aggregation: the coordinator learns the sum of the sites' updates, and nothing about a single one.

The protocol of Bonawitz et al. 2017 (Practical secure aggregation for privacy-preserving machine learning) in the form
that withstands a coordinator who lies; docs/secure-aggregation.md has the argument and its limits. Pure: no network, no
disk, no clock. `Member` is a site's part in one sum, `Aggregator` the coordinator's; each step is a message of
`common/exchange.py`. A step that is asked again with the same words is answered with the same words, with others it is
refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import SecureAggregationError
from common.exchange import Box, Offer
from common.fixed import Residues, Words
from common.identity import Signer, signed_by
from common.shamir import SECRET_BYTES, SHARE_BYTES, join, split

Random = Callable[[int], bytes]
Mask = Callable[[bytes, Words, bool], None]
"""Adds a key's mask to words in place, or takes it away."""

_CHUNK = 1 << 18
_ZEROS = bytes(4 * _CHUNK)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is summed: the updates that one round's plan asked for."""

    recipe_id: str
    round: int
    base: str
    """Digest of the weights that they start from."""

    def session(self, offers: Mapping[str, Offer]) -> str:
        """The name of the sum of these sites with these keys; part of every key that is derived in it."""
        lines = [f"{site} {offer.mask_key} {offer.share_key}" for site, offer in sorted(offers.items())]
        return _sha256("session", self.recipe_id, str(self.round), self.base, *lines)


class Member:
    """One site's part in one sum. Its keys and seed are made here, stay in memory, and serve once."""

    def __init__(
        self,
        site: str,
        subject: Subject,
        *,
        signer: Signer,
        keys: Mapping[str, str],
        sites: int,
        threshold: int,
        random: Random = os.urandom,
        mask: Mask | None = None,
    ) -> None:
        """Makes the keys.

        Args:
            keys: Ed25519 keys of the sites that may take part, by name, from a source that the coordinator cannot
                change alone.
            sites: Most sites of a sum.
            threshold: Holders that together can open a secret, and fewest sites of a sum.
            random: Secret random bytes; a test gives its own, as it does for `mask`.

        Raises:
            SecureAggregationError: The threshold is not above half of the sites, or below three: two lists could be
                opened, or a site would see the other's update.
        """
        if not 3 <= threshold <= sites or 2 * threshold <= sites:
            raise SecureAggregationError(f"threshold {threshold} of {sites} sites: expected at least 3 and over half")
        self.site, self.subject = site, subject
        self._signer, self._keys, self._sites, self._threshold = signer, dict(keys), sites, threshold
        self._random, self._mask = random, mask or add_mask
        self._mask_key = X25519PrivateKey.from_private_bytes(random(SECRET_BYTES))
        self._share_key = X25519PrivateKey.from_private_bytes(random(SECRET_BYTES))
        self._seed = random(SECRET_BYTES)
        mask_key, share_key = _public(self._mask_key), _public(self._share_key)
        signature = signer.sign(_offer_bytes(subject, site, mask_key, share_key))
        self.offer = Offer(mask_key=mask_key, share_key=share_key, signature=signature)
        self.session = ""
        self._offers: dict[str, Offer] = {}
        self._boxes: dict[str, Box] = {}
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        """Of every dealer's seed and key, this site's share."""
        self._update = ""
        self._sent: dict[str, str] = {}
        """Digests of what was masked, and of how it looked."""
        self._list: dict[str, str] = {}

    def deal(self, offers: Mapping[str, Offer]) -> tuple[str, str, Mapping[str, Box]]:
        """Shares both secrets out to the sites of these offers.

        Returns:
            Session, commitment to the seed, and a box for each site, this one too.

        Raises:
            SecureAggregationError: Too few or too many sites, one that is not known here or did not sign its keys,
                keys that are not this site's own, or other offers than before.
        """
        session = self.subject.session(offers)
        if self.session:
            self._same(session)
            return session, _commit(session, self.site, self._seed), dict(self._boxes)
        if offers.get(self.site) != self.offer:
            raise SecureAggregationError("the offers do not hold this site's own keys")
        if not self._threshold <= len(offers) <= self._sites:
            raise SecureAggregationError(
                f"{len(offers)} sites are to be summed, expected {self._threshold} to {self._sites}"
            )
        public = [key for offer in offers.values() for key in (offer.mask_key, offer.share_key)]
        if len(set(public)) < len(public):
            raise SecureAggregationError("two sites offer the same key")
        for site, offer in offers.items():
            key = self._keys.get(site)
            if key is None:
                raise SecureAggregationError(f"site {site} is not in this site's registry")
            if not offered_by(key, self.subject, site, offer):
                raise SecureAggregationError(f"the keys offered for site {site} are not signed by it")
        names, boxes = sorted(offers), {}
        seeds = split(self._seed, len(names), self._threshold, self._random)
        keys = split(self._mask_key.private_bytes_raw(), len(names), self._threshold, self._random)
        for holder, seed, share in zip(names, seeds, keys, strict=True):
            secret = _agree(self._share_key, offers[holder].share_key, session, f"share {self.site} to {holder}")
            # The key serves for this one text, so the nonce may be constant.
            sealed = ChaCha20Poly1305(secret).encrypt(bytes(12), seed + share, session.encode())
            boxes[holder] = Box(
                sealed=sealed.hex(),
                seed_share=_commit(session, self.site, seed, "seed", holder),
                key_share=_commit(session, self.site, share, "key", holder),
            )
        self.session, self._offers, self._boxes = session, dict(offers), boxes
        return session, _commit(session, self.site, self._seed), dict(boxes)

    def mask(self, session: str, boxes: Mapping[str, Box], words: Words) -> Residues:
        """The words under this site's own mask and one with every other site that has shared out.

        Raises:
            SecureAggregationError: Another session, too few boxes, one that is not what its sender committed to, or
                another update or other boxes than before.
        """
        self._same(session)
        if not self._threshold <= len(boxes) or not set(boxes) <= set(self._offers) or self.site not in boxes:
            raise SecureAggregationError(
                f"boxes of {len(boxes)} sites came, expected at least {self._threshold} of the session's, with this one"
            )
        update = hashlib.sha256(words.astype("<u4", copy=False).data).hexdigest()
        if self._update and (update != self._update or set(boxes) != set(self._shares)):
            raise SecureAggregationError("a mask serves for one update; start the sum anew with new keys")
        shares = {dealer: self._opened(dealer, box) for dealer, box in boxes.items()}
        self._update, self._shares = update, shares
        masked = words.astype("<u4")
        self._mask(_stretch(self._seed, session, "self"), masked, False)
        for peer in sorted(boxes):
            if peer != self.site:
                pair = _pair(self._mask_key, self._offers[peer].mask_key, session, self.site, peer)
                self._mask(pair, masked, self.site > peer)
        sent = Residues(masked)
        self._sent = {self.site: sent.digest}
        return sent

    def agree(self, session: str, masked: Mapping[str, str]) -> str:
        """This site's signature under the list of masked updates that came.

        Raises:
            SecureAggregationError: Another session, too few, a site that has not shared out, this site's update
                missing or another one, or another list than before.
        """
        self._same(session)
        if not self._sent or self._sent.items() - masked.items():
            raise SecureAggregationError("the list does not hold the masked update that this site has sent")
        if len(masked) < self._threshold or not set(masked) <= set(self._shares):
            raise SecureAggregationError(
                f"the list has {len(masked)} sites, expected at least {self._threshold} of those that shared out"
            )
        if self._list and self._list != dict(masked):
            raise SecureAggregationError("this site has signed another list for the same sum; it opens nothing more")
        self._list = dict(masked)
        return self._signer.sign(_list_bytes(session, self._shares, masked))

    def open(
        self, session: str, masked: Mapping[str, str], signatures: Mapping[str, str]
    ) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Shares of the seeds of those on the list, and of the keys of those who left before it.

        Raises:
            SecureAggregationError: Another session or list than the one that was signed here, or fewer than the
                threshold of its sites have signed it.
        """
        self._same(session)
        if not self._list or self._list != dict(masked):
            raise SecureAggregationError("this is not the list that this site has signed")
        text = _list_bytes(session, self._shares, masked)
        good = [site for site in masked if signed_by(self._keys[site], text, signatures.get(site, ""))]
        if len(good) < self._threshold:
            others = sorted(set(masked) - set(good))
            raise SecureAggregationError(
                f"{len(good)} sites have signed this list, expected {self._threshold}; not {', '.join(others[:8])}: "
                "they were shown another one, or sign none"
            )
        seeds = {site: self._shares[site][0].hex() for site in masked}
        keys = {site: share.hex() for site, (_, share) in self._shares.items() if site not in masked}
        return seeds, keys

    def _same(self, session: str) -> None:
        if session != self.session:
            raise SecureAggregationError("another session than the one that these keys were made for")

    def _opened(self, dealer: str, box: Box) -> tuple[bytes, bytes]:
        key = _agree(self._share_key, self._offers[dealer].share_key, self.session, f"share {dealer} to {self.site}")
        try:
            text = ChaCha20Poly1305(key).decrypt(bytes(12), bytes.fromhex(box.sealed), self.session.encode())
        except InvalidTag:
            raise SecureAggregationError(f"the box of site {dealer} cannot be opened: it was changed, or the sites "
                                         "were shown different keys") from None  # fmt: skip
        seed, share = text[:SHARE_BYTES], text[SHARE_BYTES:]
        committed = (
            _commit(self.session, dealer, seed, "seed", self.site),
            _commit(self.session, dealer, share, "key", self.site),
        )
        if committed != (box.seed_share, box.key_share):
            raise SecureAggregationError(f"the shares of site {dealer} are not those that it has committed to")
        return seed, share


class Aggregator:
    """The coordinator's part in one sum; it holds the running sum alone, never two masked updates."""

    def __init__(self, subject: Subject, offers: Mapping[str, Offer], *, threshold: int, numbers: int) -> None:
        """Begins a sum.

        Args:
            numbers: Words of an update, its weight among them.

        Raises:
            SecureAggregationError: Fewer offers than the threshold.
        """
        self._threshold = threshold
        self._enough(offers, "offers of keys")
        self.offers, self.session = dict(offers), subject.session(offers)
        self._places = {site: number for number, site in enumerate(sorted(offers), 1)}
        self._seeds: dict[str, str] = {}
        self._boxes: dict[str, Mapping[str, Box]] = {}
        self._sum = np.zeros(numbers, "<u4")
        self.masked: dict[str, str] = {}
        """Site to digest of its masked update: those in the sum."""
        self.signatures: dict[str, str] = {}
        self._shares: dict[str, dict[int, bytes]] = {}
        """Whose secret, and the holders' shares of it."""

    def deal(self, site: str, session: str, seed: str, boxes: Mapping[str, Box]) -> None:
        """Takes a site's boxes.

        Raises:
            SecureAggregationError: They are not for this sum.
        """
        self._of(session)
        if set(boxes) != set(self.offers):
            raise SecureAggregationError("the boxes are not one for each site of the sum")
        self._seeds[site], self._boxes[site] = seed, dict(boxes)

    def boxes(self) -> dict[str, dict[str, Box]]:
        """Holder to dealer to box, for every site that has dealt.

        Raises:
            SecureAggregationError: Fewer than the threshold have dealt.
        """
        self._enough(self._boxes, "sites have shared out their secrets")
        return {holder: {dealer: boxes[holder] for dealer, boxes in self._boxes.items()} for holder in self._boxes}

    def add(self, site: str, session: str, values: Residues) -> None:
        """Takes a masked update into the sum.

        Raises:
            SecureAggregationError: It is not for this sum, or of another length, or the site's second.
        """
        self._of(session)
        if site not in self._boxes or site in self.masked:
            raise SecureAggregationError("the masked update is the site's second, or one that nobody asked for")
        if len(values) != len(self._sum):
            raise SecureAggregationError(f"the masked update has {len(values)} words, expected {len(self._sum)}")
        self.masked[site] = values.digest
        self._sum += values.words

    def sign(self, site: str, session: str, signature: str) -> None:
        """Takes a site's signature under the list.

        Raises:
            SecureAggregationError: It is not for this sum.
        """
        self._of(session)
        self.signatures[site] = signature

    def open(self, site: str, session: str, seeds: Mapping[str, str], keys: Mapping[str, str]) -> None:
        """Takes a holder's shares.

        Raises:
            SecureAggregationError: They are not for this sum, not of the right secrets, or not those that their
                dealers committed to. None of them is used then.
        """
        self._of(session)
        if set(seeds) != set(self.masked) or set(keys) != set(self._boxes) - set(self.masked):
            raise SecureAggregationError("the shares are not of the seeds in the sum and the keys of those who left")
        found = {dealer: bytes.fromhex(share) for dealer, share in (*seeds.items(), *keys.items())}
        for dealer, share in found.items():
            box, kind = self._boxes[dealer][site], "seed" if dealer in seeds else "key"
            committed = box.seed_share if kind == "seed" else box.key_share
            if _commit(session, dealer, share, kind, site) != committed:
                raise SecureAggregationError(f"the share of site {dealer}'s {kind} is not the one that was dealt")
        for dealer, share in found.items():
            self._shares.setdefault(dealer, {})[self._places[site]] = share

    def total(self, mask: Mask | None = None) -> Words:
        """The sum of the words of the sites in `masked`, modulo 2^32; to be asked once.

        Raises:
            SecureAggregationError: Too few sites have sent, signed or opened, or a secret is not the one that its
                site committed to.
        """
        mask = mask or add_mask
        self._enough(self.masked, "masked updates have come")
        for site in self._boxes:
            self._enough(self._shares.get(site, {}), f"shares of site {site}'s secret have come")
        left = sorted(set(self._boxes) - set(self.masked))
        for site in sorted(self.masked):
            seed = self._joined(site)
            if seed is None or _commit(self.session, site, seed) != self._seeds[site]:
                raise SecureAggregationError(f"site {site} has dealt shares of another seed than it committed to")
            mask(_stretch(seed, self.session, "self"), self._sum, True)
        for site in left:
            secret = self._joined(site)
            key = X25519PrivateKey.from_private_bytes(secret) if secret is not None else None
            if key is None or _public(key) != self.offers[site].mask_key:
                raise SecureAggregationError(f"site {site} has dealt shares of another key than it offered")
            for peer in self.masked:
                pair = _pair(key, self.offers[peer].mask_key, self.session, site, peer)
                mask(pair, self._sum, peer < site)  # the peer added it when its own name comes first
        return self._sum

    def _joined(self, site: str) -> bytes | None:
        try:
            return join(dict(sorted(self._shares[site].items())[: self._threshold]))
        except ValueError:
            return None

    def _of(self, session: str) -> None:
        if session != self.session:
            raise SecureAggregationError("the answer is of another session")

    def _enough(self, found: Sized, what: str) -> None:
        if len(found) < self._threshold:
            raise SecureAggregationError(f"{len(found)} {what}, expected at least {self._threshold}")


def offered_by(public: str, subject: Subject, site: str, offer: Offer) -> bool:
    """Whether the holder of this Ed25519 key signed the offer for this update."""
    return signed_by(public, _offer_bytes(subject, site, offer.mask_key, offer.share_key), offer.signature)


def add_mask(key: bytes, words: Words, negative: bool) -> None:
    """Adds the ChaCha20 keystream of a key to `words` in place, modulo 2^32, or takes it away.

    A piece of 1 MiB at a time, whatever the length. The key serves for this alone, so nonce and counter begin at 0.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        piece = np.frombuffer(stream.update(_ZEROS[: 4 * len(part)]), "<u4")
        if negative:
            np.subtract(part, piece, out=part)
        else:
            np.add(part, piece, out=part)


# Every hash, key and signature begins with what it is for, so that none can pass for another.


def _sha256(purpose: str, *parts: str) -> str:
    return hashlib.sha256("\n".join((f"fedicom secure aggregation {purpose}", *parts)).encode()).hexdigest()


def _commit(session: str, dealer: str, secret: bytes, *of: str) -> str:
    return _sha256("commitment", session, dealer, *of, secret.hex())


def _offer_bytes(subject: Subject, site: str, mask_key: str, share_key: str) -> bytes:
    parts = (subject.recipe_id, str(subject.round), subject.base, site, mask_key, share_key)
    return "\n".join(("fedicom secure aggregation offer", *parts)).encode()


def _list_bytes(session: str, dealers: Mapping[str, object], masked: Mapping[str, str]) -> bytes:
    came = [f"{site} {digest}" for site, digest in sorted(masked.items())]
    return "\n".join(("fedicom secure aggregation list", session, " ".join(sorted(dealers)), *came)).encode()


def _public(key: X25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _agree(own: X25519PrivateKey, theirs: str, session: str, purpose: str) -> bytes:
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(theirs)))
    except ValueError:  # a point of low order: anybody knows what comes out
        raise SecureAggregationError("a site offers a key that is none") from None
    return _stretch(shared, session, purpose)


def _pair(own: X25519PrivateKey, theirs: str, session: str, one: str, other: str) -> bytes:
    return _agree(own, theirs, session, " ".join(("pair", *sorted((one, other)))))


def _stretch(secret: bytes, session: str, purpose: str) -> bytes:
    """A key of its own for each purpose and session: HKDF-SHA256 (RFC 5869)."""
    info = f"fedicom secure aggregation {purpose}".encode()
    return HKDF(algorithm=SHA256(), length=32, salt=bytes.fromhex(session), info=info).derive(secret)
