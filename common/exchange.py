"""The closed list of what may cross between a site and the coordinator. Nothing else leaves a site.

Every type is frozen, checked and bounded when it is made, on both sides: numbers, hashes and
short words only, no identifier, no path, no pixel. `docs/what-leaves-the-site.md` is
generated from this file and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import AfterValidator, ConfigDict, StringConstraints
from pydantic.dataclasses import dataclass

from common.compression import Form, nbytes
from common.fixed import Residues
from common.metrics import MAX_LOSS, SCALARS
from common.weights import Weights

WIRE_VERSION = 7
"""Raised when a message changes meaning; a newer one is refused."""

_STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A site's or a package's name."""
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256, hexadecimal."""
MaybeDigest = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
ScoreName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Score = Annotated[float, Ge(0), Le(MAX_LOSS)]
Round = Annotated[int, Ge(1), Le(1_000_000)]
Patients = Annotated[int, Ge(0), Le(1_000_000_000)]
Steps = Annotated[int, Ge(0), Le(1_000_000_000)]
Reason = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]{0,500}$")]
"""No control characters: the other side prints it on a terminal."""
PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64,64}$")]
"""X25519, 64 hexadecimal digits."""
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
"""Ed25519, 128 hexadecimal digits."""
Share = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{66}$")]
"""One holder's share of a secret, 66 hexadecimal digits."""
Sealed = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{164}$")]
"""Two shares, encrypted to their holder, 164 hexadecimal digits."""
Code = Literal["recipe", "version", "budget", "policy", "data", "training", "message"]
Version = Annotated[str, StringConstraints(pattern=r"^[ -~]{0,40}$")]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Question:
    """Coordinator to site: who are you, and would you work on this recipe?"""

    recipe_id: Digest
    audit_head: MaybeDigest = ""
    """Head of the coordinator's audit chain, which the site records."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RoundPlan:
    """Coordinator to site: what is asked in one visit."""

    recipe_id: Digest
    """Hash of the recipe, which lies approved at the site."""
    round: Round
    """1 for the first round; the closing evaluation has the number after the last."""
    work: Literal["train", "evaluate"]
    weights: Weights
    """The global model before this round."""
    audit_head: MaybeDigest = ""
    """Head of the coordinator's audit chain, which the site records."""
    ledger_heads: Annotated[Mapping[Name, Digest], Len(0, 10_000)] = field(default_factory=dict)
    """Site to the last head of its privacy ledger that the coordinator was told. A site whose ledger does not hold its
    own any more had an old copy put back, and trains nothing."""


def _listed(values: Mapping[str, float]) -> Mapping[str, float]:
    for name, value in values.items():
        scalar = name.removesuffix("_low").removesuffix("_high")
        if scalar not in SCALARS or (value > 1 + 1e-9 and scalar != "loss"):  # a sum of shares may be rounded up
            raise ValueError("a score that has no such name or value")
    return values


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Scores:
    """Site to coordinator: results of the incoming global model on one split of the site.

    Empty when the split has fewer patients than `evaluation.min_cell`. Under the policy `metrics: noised` all of it is
    computed from noised histograms (`common.noised_scores`) and paid from the site's ledger.
    """

    patients: Patients
    """Given as the site's policy on counts allows; the sum of the noised histogram when `noised`."""
    values: Annotated[Mapping[ScoreName, Score], Len(0, 64), AfterValidator(_listed)]
    """Names of `common.metrics.SCALARS`, with `_low` and `_high` for ends of an interval; all but losses end at 1."""
    noised: bool = False


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Spent:
    """Site to coordinator: the privacy cost of the updates so far, as the site's ledger has it."""

    epsilon: Annotated[float, Ge(0), Le(1e9)]
    delta: Annotated[float, Gt(0), Le(1)]
    noise_multiplier: Annotated[float, Ge(0), Le(1e6)]
    clip_norm: Annotated[float, Gt(0)]
    sampling_rate: Annotated[float, Ge(1e-9), Le(1)]
    steps: Steps
    """Noised steps so far, over all rounds."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScoresSpent:
    """Site to coordinator: what the noised scores of this recipe cost, as the site's ledger has it.

    About validation and test patients, and beside the cost of the updates, which a recipe without privacy has not.
    """

    epsilon: Annotated[float, Ge(0), Le(1e9)]
    delta: Annotated[float, Gt(0), Le(1)]
    """That of the site's policy."""


# Secure aggregation, docs/secure-aggregation.md. All of it is about one update: recipe, round, base weights.


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Offer:
    """Site to all sites: its two X25519 keys for one sum, made for it and never used again."""

    mask_key: PublicKey
    """For the masks that two sites share."""
    share_key: PublicKey
    """For what is encrypted to this site."""
    signature: Signature
    """The site's, under both keys, its name, recipe, round and base weights."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Box:
    """Site to site, through the coordinator: one holder's shares of the sender's two secrets."""

    sealed: Sealed
    """The shares, encrypted to the holder (ChaCha20-Poly1305)."""
    seed_share: Digest
    """Hash that commits the sender to the share of its own mask's seed."""
    key_share: Digest
    """The same for the share of its `mask_key`'s private half."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Gathering:
    """Coordinator to site: these sites make a sum; share your secrets out to them."""

    recipe_id: Digest
    round: Round
    base: Digest
    offers: Annotated[Mapping[Name, Offer], Len(3, 1000)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Dealing:
    """Site to coordinator: shares of the site's two secrets, each encrypted to its holder."""

    site: Name
    recipe_id: Digest
    round: Round
    session: Digest
    """Hash of recipe, round, base weights and all offers: every later step names it."""
    seed: Digest
    """Hash that commits to the seed of the site's own mask."""
    boxes: Annotated[Mapping[Name, Box], Len(3, 1000)]
    audit_head: MaybeDigest = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Masking:
    """Coordinator to site: send the update under masks with the sites whose boxes are here."""

    recipe_id: Digest
    round: Round
    base: Digest
    session: Digest
    boxes: Annotated[Mapping[Name, Box], Len(3, 1000)]
    """Sender to its box for this site."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MaskedUpdate:
    """Site to coordinator: the update as whole numbers modulo 2^32 and its weight, all under masks."""

    site: Name
    recipe_id: Digest
    round: Round
    session: Digest
    values: Residues
    """By itself as good as random: the masks go only in the sum over all sites."""
    audit_head: MaybeDigest = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Survivors:
    """Coordinator to site: these masked updates came; is that the one list that you will open?"""

    recipe_id: Digest
    round: Round
    base: Digest
    session: Digest
    masked: Annotated[Mapping[Name, Digest], Len(3, 1000)]
    """Site to digest of its masked update."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Agreement:
    """Site to coordinator: a signature under the list that the site was shown, for all sites; it signs no other."""

    site: Name
    recipe_id: Digest
    round: Round
    session: Digest
    signature: Signature
    audit_head: MaybeDigest = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Opening:
    """Coordinator to site: so many have signed the list; open the sum."""

    recipe_id: Digest
    round: Round
    base: Digest
    session: Digest
    masked: Annotated[Mapping[Name, Digest], Len(3, 1000)]
    signatures: Annotated[Mapping[Name, Signature], Len(3, 1000)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Shares:
    """Site to coordinator: of every site one share, of the seed or of the key, never of both."""

    site: Name
    recipe_id: Digest
    round: Round
    session: Digest
    seeds: Annotated[Mapping[Name, Share], Len(0, 1000)]
    """Of the sites whose masked updates are in the sum."""
    keys: Annotated[Mapping[Name, Share], Len(0, 1000)]
    """Of the sites that left after they had shared out."""
    audit_head: MaybeDigest = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Hello:
    """Site to coordinator: who is there, asked before the first round and of every site that joins later."""

    site: Name
    recipe_id: Digest
    """Of the recipe that this site has approved."""
    versions: Annotated[Mapping[Name, Version], Len(0, 32)]
    """Versions of the packages that change numbers."""
    patients: Mapping[Literal["train", "validation", "test"], Patients]
    """Patients in each split, exact, rounded down or 0 as the site's policy says (`counts`); a cell below
    `evaluation.min_cell` is given as 0."""
    manifest: Digest
    """Hash of the cohort's manifest, for the lineage of the model."""
    audit_head: MaybeDigest = ""
    counts_rounded: bool = False
    """Whether `patients` are rounded down, so that nobody takes them for exact."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Update:
    """Site to coordinator: the change that local training made, clipped and noised under privacy."""

    site: Name
    recipe_id: Digest
    round: Round
    base: Digest
    """Digest of the weights that training started from."""
    delta: Weights
    """Trained minus incoming weights; empty after an evaluation, and where it goes into a secure sum. Bytes on the wire
    as `compression` says, and what rounding left out of earlier rounds' changes added before."""
    weight: Annotated[float, Gt(0), Le(1e9)]
    """Share in weighted averages: training patients, or 1; under secure aggregation 1, the true one is masked."""
    steps: Steps
    """Steps of training; 0 under secure aggregation."""
    train_loss: Annotated[float, Ge(0)] | None = None
    """Mean loss of the round; absent under privacy, where it would leak."""
    validation: Scores | None = None
    """Of the incoming model, on the site's validation patients."""
    test: Scores | None = None
    """Of the final model, on the site's test patients."""
    spent: Spent | None = None
    scores_spent: ScoresSpent | None = None
    """With noised scores."""
    norm: Annotated[float, Ge(0)] | None = None
    """Under secure aggregation: the L2 norm of the update, as the site says."""
    offer: Offer | None = None
    """Under secure aggregation: the update is kept at the site, ready for a sum with these keys."""
    audit_head: MaybeDigest = ""
    ledger_head: MaybeDigest = ""
    """Head of the site's privacy ledger after this visit was paid, for the coordinator to remember."""
    compression: Form = "none"
    """How `delta` was rounded and travels, as the recipe demands (`federation.compression`)."""

    @property
    def nbytes(self) -> int:
        """Of `delta`, as it travels."""
        return self.delta.nbytes if self.compression == "none" else nbytes(self.delta.shapes, self.compression)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Refusal:
    """Site to coordinator: the site will not do this, and why, in words without patient data."""

    site: Name
    recipe_id: Digest
    round: Round
    code: Code
    why: Reason
    audit_head: MaybeDigest = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Failure:
    """The coordinator's own record of silence or of a reply it could not read; never crosses the wire."""

    site: str
    round: Round
    why: str


Reply = Update | Refusal | Failure
Ask = Gathering | Masking | Survivors | Opening
"""A step of a secure sum."""
Answer = Dealing | MaskedUpdate | Agreement | Shares
