"""Rounds whose updates go into a secure sum: the coordinator's loop against sites that follow, leave or lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.secure import Sums
from common.config import Federation, Privacy, Recipe, Training
from common.errors import QuorumError, SecureAggregationError, StorageError
from common.exchange import (
    Agreement,
    Answer,
    Ask,
    Failure,
    Gathering,
    Hello,
    MaskedUpdate,
    Masking,
    Opening,
    Refusal,
    RoundPlan,
    Shares,
    Survivors,
    Update,
)
from common.fixed import Residues
from common.identity import Signer
from common.weights import Weights
from server import rounds
from server.admit import refusal, sum_refusal

NAMES = ("s1", "s2", "s3", "s4", "s5")
SIGNERS = {site: Signer.from_bytes(bytes([number]) * 32) for number, site in enumerate(NAMES, 1)}
KEYS = {site: signer.public for site, signer in SIGNERS.items()}
START = Weights({"w": np.zeros((4, 5), np.float32), "b": np.ones(3, np.float32)})


def recipe_of(sites: int = 4, strategy: str = "fedavg", **federation: Any) -> Recipe:
    given = {
        "sites": sites, "quorum": 2 * sites // 3 + 1, "strategy": strategy, "max_update_norm": 100.0, "timeout_s": 1.0,
    }  # fmt: skip
    return Recipe(
        name="sum",
        rounds=2,
        training=Training(proximal_mu=0.1),
        privacy=Privacy(secure_aggregation=True),
        federation=Federation(**(given | federation)),
    )


Hook = Callable[[str, Ask, Callable[[], Answer]], Answer | Refusal | Failure]


class Wards:
    """Sites with updates by rule and true secure sums; a hook may come between."""

    def __init__(self, recipe: Recipe, folder: Path, hook: Hook | None = None) -> None:
        self.recipe, self.folder, self.hook = recipe, folder, hook
        self.names = NAMES[: recipe.federation.sites]
        self.kept: dict[tuple[str, int], Update] = {}
        self.asks: list[tuple[str, Ask]] = []
        self.seen: list[Answer] = []
        self.sums = {site: self.opened(site) for site in self.names}

    def opened(self, site: str) -> Sums:
        return Sums(site, self.folder / site, SIGNERS[site], lambda: KEYS)

    def hellos(self) -> Mapping[str, Hello]:
        return {
            name: Hello(site=name, recipe_id=self.recipe.id, versions={}, patients={"train": 0}, manifest="d" * 64)
            for name in self.names
        }

    def hello(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        raise AssertionError

    joined = hello

    def update(self, plan: RoundPlan, site: str) -> Update:
        rng = np.random.default_rng([plan.round, *site.encode()])
        moved = {key: rng.normal(0.1, 1, shape).astype(np.float32) for key, shape in plan.weights.shapes.items()}
        weight = float(rng.integers(5, 40)) if self.recipe.federation.site_weights == "patients" else 1.0
        return Update(
            site=site, recipe_id=plan.recipe_id, round=plan.round, base=plan.weights.digest, delta=Weights(moved),
            weight=weight, steps=1, norm=None,
        )  # fmt: skip

    def ask(self, plan: RoundPlan, sites: Any, timeout_s: float) -> list[Update]:
        if plan.work == "evaluate":
            return [replace(self.update(plan, site), delta=Weights({}), weight=1.0) for site in sites]
        replies = []
        for site in sites:
            update = self.kept.setdefault((site, plan.round), self.update(plan, site))
            offer = self.sums[site].offer(self.recipe, update)
            replies.append(replace(update, delta=Weights({}), weight=1.0, steps=0, offer=offer, norm=update.delta.norm))
        return replies

    def step(
        self, asks: Mapping[str, Ask], timeout_s: float, take: Callable[[Answer], Answer]
    ) -> dict[str, Answer | Refusal | Failure]:
        replies: dict[str, Answer | Refusal | Failure] = {}
        for site, ask in asks.items():
            self.asks.append((site, ask))
            try:
                follow = lambda site=site, ask=ask: self.answer(site, ask)  # noqa: E731
                reply = self.hook(site, ask, follow) if self.hook else follow()
            except SecureAggregationError as error:
                why = str(error)
                reply = Refusal(site=site, recipe_id=ask.recipe_id, round=ask.round, code="message", why=why)
            if not isinstance(reply, Refusal | Failure):
                self.seen.append(reply)
                reply = take(reply)
            replies[site] = reply
        return replies

    def answer(self, site: str, ask: Ask) -> Answer:
        sums = self.sums[site]
        about = {"site": site, "recipe_id": ask.recipe_id, "round": ask.round}
        match ask:
            case Gathering():
                return sums.deal(ask)
            case Masking():
                masked = sums.mask(ask, self.recipe, self.kept[site, ask.round])
                return MaskedUpdate(**about, session=ask.session, values=masked.values)
            case Survivors():
                return Agreement(**about, session=ask.session, signature=sums.agree(ask))
            case _:
                return sums.open(ask)

    def mean(self, sites: Any, round_: int = 1) -> Weights:
        updates = [self.kept[site, round_] for site in sites]
        total = sum(update.weight for update in updates)
        return Weights(
            {
                name: sum(update.delta[name].astype(np.float64) * update.weight for update in updates) / total
                for name in START
            }
        )


def run(wards: Wards) -> list[tuple[rounds.ServerState, rounds.RoundReport]]:
    state = rounds.start(wards.recipe, START)
    return list(rounds.run(state, wards.recipe, wards, wards.hellos, buffers=frozenset()))


def close(one: Weights, other: Weights, atol: float = 1e-5) -> bool:
    return all(np.allclose(one[name], other[name], rtol=0, atol=atol) for name in one)


def away(*sites: str, at: type, attempts: int = 99) -> Hook:
    """These sites are silent at this step, in so many sums."""
    counted: dict[str, int] = {}

    def hook(site: str, ask: Ask, follow: Callable[[], Answer]) -> Answer | Failure:
        if site in sites and isinstance(ask, at):
            counted[site] = counted.get(site, 0) + 1
            if counted[site] <= attempts:
                return Failure(site=site, round=ask.round, why="gone")
        return follow()

    return hook


def lying(liar: str, at: type, lie: Callable[[Any], Answer]) -> Hook:
    return lambda site, ask, follow: lie(follow()) if site == liar and isinstance(ask, at) else follow()


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "fedyogi", "fedavgm"])
def test_a_secure_run_gives_what_the_strategy_gives_on_the_plain_updates(tmp_path, strategy):
    wards = Wards(recipe_of(strategy=strategy), tmp_path)
    steps = run(wards)
    open_recipe = replace(wards.recipe, privacy=Privacy())

    class Open(Wards):
        def ask(self, plan, sites, timeout_s):
            plan = replace(plan)
            return [
                replace(self.update(plan, site), delta=self.update(plan, site).delta if plan.work == "train" else
                        Weights({}))
                for site in sites
            ]  # fmt: skip

    plain = run(Open(open_recipe, tmp_path / "plain"))
    assert [report.work for _, report in steps] == [report.work for _, report in plain] == ["train"] * 2 + ["evaluate"]
    # adaptive strategies divide by the root of what they have seen: small differences grow
    assert close(steps[-1][0].weights, plain[-1][0].weights, 1e-5 if strategy == "fedavg" else 1e-3)
    assert all(report.session for _, report in steps[:2])
    assert not steps[2][1].session


def test_weights_are_masked_and_the_mean_is_by_them(tmp_path):
    wards = Wards(recipe_of(site_weights="patients", max_patients=50), tmp_path)
    state, report = run(wards)[0]
    assert close(state.weights - START, wards.mean(wards.names))
    assert len({wards.kept[site, 1].weight for site in wards.names}) > 1
    assert {done.weight for done in report.accepted.values()} == {1.0}
    assert {done.steps for done in report.accepted.values()} == {0}


@pytest.mark.parametrize(("at", "summed"), [(Gathering, 3), (Masking, 3), (Survivors, 4), (Opening, 4)])
def test_a_site_that_leaves_at_any_step_costs_at_most_its_own_update(tmp_path, at, summed):
    wards = Wards(recipe_of(), tmp_path, away("s2", at=at))
    state, report = run(wards)[0]
    sites = [site for site in wards.names if summed == 4 or site != "s2"]
    assert close(state.weights - START, wards.mean(sites))
    assert sorted(report.accepted) == sites
    assert report.refused == {"s2": "gone"}


def test_a_sum_that_fails_is_begun_anew_with_new_keys_and_the_same_updates(tmp_path):
    wards = Wards(recipe_of(), tmp_path, away("s2", "s3", at=Masking, attempts=1))
    state, report = run(wards)[0]
    assert close(state.weights - START, wards.mean(wards.names))
    sent = [answer for answer in wards.seen if isinstance(answer, MaskedUpdate) and answer.round == 1]
    assert len({answer.session for answer in sent}) == 2
    assert len({answer.values.digest for answer in sent}) == len(sent) == 2 + 4
    assert report.refused == {}


def test_after_three_failed_sums_the_model_is_as_it_was(tmp_path):
    wards = Wards(recipe_of(), tmp_path, away("s2", "s3", at=Opening))
    with pytest.raises(QuorumError, match=r"no secure sum in 3 attempts; the model is as it was.*s2: gone"):
        run(wards)


def test_who_opened_a_list_opens_no_other_one_ever_after_and_the_same_one_again(tmp_path):
    # Two sites opened the sum of all four, then nobody else did. What the coordinator may have is one sum: of all four.
    wards = Wards(recipe_of(), tmp_path, away("s3", "s4", at=Opening))
    with pytest.raises(QuorumError):
        run(wards)
    wards.sums = {site: wards.opened(site) for site in wards.names}  # all are started again
    wards.hook, before = away("s4", at=Masking), len(wards.seen)
    with pytest.raises(QuorumError, match="was opened for another list of sites"):
        run(wards)
    assert {answer.site for answer in wards.seen[before:] if isinstance(answer, Agreement)} == {"s3"}  # none signs it
    wards.hook = None
    state, _ = run(wards)[0]
    assert close(state.weights - START, wards.mean(wards.names))
    record = json.loads(next((tmp_path / "s1").glob("*-000001-*.json")).read_text())
    assert record["opened"] == list(wards.names)


def test_another_update_is_not_summed_once_the_round_was_opened(tmp_path):
    wards = Wards(recipe_of(), tmp_path)
    run(wards)
    plan = RoundPlan(recipe_id=wards.recipe.id, round=1, work="train", weights=START)
    wards.kept["s1", 1] = replace(wards.kept["s1", 1], delta=START)
    wards.hook = away("s4", at=Gathering)
    with pytest.raises(QuorumError, match="was opened with another update of this site"):
        run(wards)
    assert wards.ask(plan, ["s1"], 1.0)  # keys it still offers


def test_a_round_that_was_opened_is_not_opened_again_over_weights_that_hardly_differ(tmp_path):
    # Else the sum of four, then that of three over weights one bit away: their difference is the fourth site's update.
    wards = Wards(recipe_of(), tmp_path)
    run(wards)
    near = Weights({**START, "b": np.nextafter(START["b"], np.float32(2))})
    wards.kept = {at: replace(update, base=near.digest) for at, update in wards.kept.items()}
    wards.hook = away("s4", at=Masking)
    again = rounds.run(rounds.start(wards.recipe, near), wards.recipe, wards, wards.hellos, buffers=frozenset())
    with pytest.raises(QuorumError, match="round 1 was opened over other weights"):
        next(again)


def test_two_sums_of_a_round_over_different_weights_are_not_both_opened(tmp_path):
    wards, sums = Wards(recipe_of(), tmp_path), []
    near = Weights({**START, "b": np.nextafter(START["b"], np.float32(2))})
    for weights in (START, near):  # both masked and signed before one is opened
        plan = RoundPlan(recipe_id=wards.recipe.id, round=1, work="train", weights=weights)
        wards.kept.clear()
        offers = {update.site: update.offer for update in wards.ask(plan, wards.names, 1.0) if update.offer}
        about = {"recipe_id": plan.recipe_id, "round": 1, "base": weights.digest}
        dealt = {site: wards.answer(site, Gathering(**about, offers=offers)) for site in wards.names}
        about["session"], masked = dealt["s1"].session, {}
        for site in wards.names:
            boxes = {dealer: dealing.boxes[site] for dealer, dealing in dealt.items()}
            masked[site] = wards.answer(site, Masking(**about, boxes=boxes)).values.digest
        signed = {site: wards.answer(site, Survivors(**about, masked=masked)).signature for site in wards.names}
        sums.append(Opening(**about, masked=masked, signatures=signed))
    assert all(isinstance(wards.answer(site, sums[0]), Shares) for site in wards.names)
    for site in wards.names:
        with pytest.raises(SecureAggregationError, match="round 1 was opened over other weights"):
            wards.answer(site, sums[1])


def test_an_older_sum_cannot_be_opened_once_another_update_was_masked(tmp_path):
    wards = Wards(recipe_of(), tmp_path, away("s2", "s3", "s4", at=Opening))
    with pytest.raises(QuorumError):
        run(wards)
    openings = [(site, ask) for site, ask in wards.asks if isinstance(ask, Opening)]
    with pytest.raises(SecureAggregationError, match="no keys of that session"):
        wards.answer("s2", next(ask for site, ask in openings if site == "s2"))
    assert isinstance(wards.answer("s2", openings[-1][1]), Shares)


def test_a_step_that_names_a_session_of_another_round_or_other_weights_is_not_taken(tmp_path):
    # Else an update could go into a second sum, of which the site would remember nothing under its own round.
    wards = Wards(recipe_of(), tmp_path)
    run(wards)
    asks = [ask for site, ask in wards.asks if site == "s1" and not isinstance(ask, Gathering)]
    assert [type(ask) for ask in asks] == [Masking, Survivors, Opening] * 2  # two rounds
    remembered = {path.name: path.read_text() for path in (tmp_path / "s1").iterdir()}
    for ask in asks:
        for change in ({"round": 3 - ask.round}, {"base": "e" * 64}, {"recipe_id": "f" * 64}):
            wards.kept["s1", 3 - ask.round] = wards.kept["s1", ask.round]
            with pytest.raises(SecureAggregationError, match="no keys of that session"):
                wards.answer("s1", replace(ask, **change))
    assert {path.name: path.read_text() for path in (tmp_path / "s1").iterdir()} == remembered


def test_a_site_shares_its_secrets_out_to_no_fewer_sites_than_the_recipes_quorum(tmp_path):
    wards = Wards(recipe_of(5), tmp_path)  # four of five, though three are more than half
    plan = RoundPlan(recipe_id=wards.recipe.id, round=1, work="train", weights=START)
    offers = {update.site: update.offer for update in wards.ask(plan, wards.names, 1.0)}
    about = {"recipe_id": wards.recipe.id, "round": 1, "base": START.digest}
    few = {site: offers[site] for site in NAMES[:3]}
    with pytest.raises(SecureAggregationError, match="3 sites are to be summed, expected 4 to 5"):
        wards.answer("s1", Gathering(**about, offers=few))
    assert wards.answer("s1", Gathering(**about, offers={**few, "s4": offers["s4"]}))


def test_a_list_that_was_signed_is_not_opened_once_another_one_was(tmp_path):
    wards = Wards(recipe_of(), tmp_path, away(*NAMES[:4], at=Opening))
    with pytest.raises(QuorumError):
        run(wards)
    site, ask = [(site, ask) for site, ask in wards.asks if isinstance(ask, Opening)][-1]
    (record,) = (tmp_path / site).glob("*.json")
    signed = record.read_text()
    record.write_text(json.dumps(json.loads(signed) | {"opened": ["s1", "s2", "s3"]}))  # as by a second process
    with pytest.raises(SecureAggregationError, match="was opened for another list of sites"):
        wards.answer(site, ask)
    record.write_text(signed)
    assert isinstance(wards.answer(site, ask), Shares)


def test_what_a_site_remembers_must_be_readable_and_written_before_a_share_leaves(tmp_path, monkeypatch):
    wards = Wards(recipe_of(), tmp_path, away(*NAMES[:4], at=Opening))
    with pytest.raises(QuorumError):
        run(wards)
    site, ask = [(site, ask) for site, ask in wards.asks if isinstance(ask, Opening)][-1]
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise StorageError("the disk is full")

        patch.setattr("client.secure.write_whole", full)
        with pytest.raises(StorageError, match="disk is full"):
            wards.answer(site, ask)
    (record,) = (tmp_path / site).glob("*.json")
    assert "opened" not in json.loads(record.read_text())
    for junk in ("", "[]", "{}", "{"):
        record.write_text(junk)
        with pytest.raises(SecureAggregationError, match="cannot be read"):
            wards.answer(site, ask)


LISTS = [frozenset(NAMES[:4]), *(frozenset(NAMES[:4]) - {name} for name in NAMES[:4])]
MOVES = st.tuples(
    st.sampled_from([("begin", "sign", "open"), ("sign", "open"), ("sign",), ("open",), ("restart",)]),
    st.integers(0, 2),
    st.sampled_from(LISTS[:3]),
    st.one_of(st.just(set(NAMES[:4])), st.sets(st.sampled_from(NAMES[:4]), min_size=2)),
)


@given(st.lists(MOVES, min_size=2, max_size=8))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_coordinator_asks_in_whatever_order_at_most_one_list_is_opened(moves):
    # A coordinator that begins sums over the same updates again and again, shows any list to any site at any time, and
    # kills sites. Three of four open a list: over all sums, only one list of sites can have got three.
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.secure.write_whole", lambda path, data: path.write_bytes(data))  # not synced: faster
        wards = Wards(recipe_of(), Path(folder))
        plan = RoundPlan(recipe_id=wards.recipe.id, round=1, work="train", weights=START)
        sums: list[tuple[dict[str, Any], str, dict[str, str]]] = []
        signed: dict[tuple[int, frozenset[str]], dict[str, str]] = {}
        opened: dict[tuple[int, frozenset[str]], dict[str, Shares]] = {}

        def begin() -> None:
            offers = {update.site: update.offer for update in wards.ask(plan, wards.names, 1.0) if update.offer}
            about = {"recipe_id": plan.recipe_id, "round": 1, "base": START.digest}
            dealt = {site: wards.answer(site, Gathering(**about, offers=offers)) for site in wards.names}
            session, masked = dealt["s1"].session, {}
            for site in wards.names:
                boxes = {dealer: dealing.boxes[site] for dealer, dealing in dealt.items()}
                masked[site] = wards.answer(site, Masking(**about, session=session, boxes=boxes)).values.digest
            sums.append((about, session, masked))

        begin()
        for doings, back, list_, sites in moves:
            if "begin" in doings:
                begin()
            at = max(0, len(sums) - 1 - back)
            about, session, masked = sums[at]
            shown = {site: masked[site] for site in sorted(list_)}
            for doing, site in product(doings, sorted(sites)):
                signatures = signed.setdefault((at, list_), {})
                with suppress(SecureAggregationError):
                    if doing == "restart":
                        wards.sums[site] = wards.opened(site)
                    elif doing == "sign":
                        answer = wards.answer(site, Survivors(**about, session=session, masked=shown))
                        signatures[site] = answer.signature
                    elif doing == "open" and len(signatures) >= 3:
                        ask = Opening(**about, session=session, masked=shown, signatures=signatures)
                        opened.setdefault((at, list_), {})[site] = wards.answer(site, ask)
        readable = {list_ for (_, list_), shares in opened.items() if len(shares) >= 3}
        assert len(readable) <= 1
        for site in wards.names:
            mine = {list_ for (_, list_), shares in opened.items() if site in shares}
            assert len(mine) <= 1
        for (at, _), shares in opened.items():
            both = [set(answer.seeds) & set(other.keys) for (again, _), others in opened.items() if again == at
                    for site, answer in shares.items() for name, other in others.items() if name == site]  # fmt: skip
            assert not any(both)


# Lies


def test_a_site_that_lies_about_its_shares_is_named_and_the_sum_is_right(tmp_path):
    wards = Wards(
        recipe_of(), tmp_path,
        lying("s3", Opening, lambda shares: replace(shares, seeds=dict.fromkeys(shares.seeds, "0" * 66))),
    )  # fmt: skip
    state, report = run(wards)[0]
    assert close(state.weights - START, wards.mean(wards.names))
    assert report.refused == {"s3": "the share of site s1's seed is not the one that was dealt"}


def test_a_site_that_deals_false_boxes_stops_the_round_and_is_named(tmp_path):
    def lie(dealing: Any) -> Answer:
        boxes = {holder: replace(box, sealed="0" * 164) for holder, box in dealing.boxes.items()}
        return replace(dealing, boxes=boxes)

    with pytest.raises(QuorumError, match="box of site s3 cannot be opened"):
        run(Wards(recipe_of(), tmp_path, lying("s3", Gathering, lie)))


def test_a_site_that_does_not_sign_the_list_stops_the_round_and_is_named(tmp_path):
    false = lying("s3", Survivors, lambda agreement: replace(agreement, signature="0" * 128))
    with pytest.raises(QuorumError, match=r"s1: .* 2 sites have signed this list, expected 3; not s3: they were shown"):
        run(Wards(recipe_of(3), tmp_path, false))


@pytest.mark.parametrize(
    "values",
    [np.zeros(5, np.uint32), np.random.default_rng(0).integers(0, 2**32, 24, np.uint32)],
    ids=["short", "random"],
)
def test_what_is_no_masked_update_never_becomes_a_sum(tmp_path, values):
    wards = Wards(
        recipe_of(), tmp_path, lying("s3", Masking, lambda masked: replace(masked, values=Residues(values)))
    )  # fmt: skip
    if len(values) == 5:
        state, report = run(wards)[0]
        assert report.refused == {"s3": "the masked update has 5 words, expected 24"}
        assert close(state.weights - START, wards.mean(["s1", "s2", "s4"]))
        return
    with pytest.raises(QuorumError, match=r"digest|masked update that this site has sent|impossible|outside"):
        run(wards)


def test_answers_of_another_kind_round_or_recipe_are_left_out(tmp_path):
    def old(shares: Any) -> Answer:
        return replace(shares, round=7)

    _, report = run(Wards(recipe_of(), tmp_path, lying("s3", Survivors, old)))[0]
    assert report.refused == {"s3": "the answer is no Agreement of this round"}


# What is admitted


def ready(**changes: Any) -> Update:
    wards_recipe = recipe_of()
    offer = Sums("s1", Path("unused"), SIGNERS["s1"], lambda: KEYS).offer(
        wards_recipe,
        Update(site="s1", recipe_id=wards_recipe.id, round=1, base=START.digest, delta=START, weight=1.0, steps=1),
    )
    plain = {
        "site": "s1", "recipe_id": wards_recipe.id, "round": 1, "base": START.digest, "delta": Weights({}),
        "weight": 1.0, "steps": 0, "norm": 2.0, "offer": offer,
    }  # fmt: skip
    return Update(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"delta": START}, "came in the open"),
        ({"offer": None}, "without keys"),
        ({"norm": None}, "without keys for the secure sum, or without its norm"),
        ({"norm": 101.0}, "norm 101 exceeds"),
        ({"norm": 100.0}, None),
        ({"weight": 30.0}, "weight, steps or loss of a single site"),
        ({"steps": 4}, "weight, steps or loss of a single site"),
        ({"train_loss": 0.5}, "weight, steps or loss of a single site"),
        ({}, None),
    ],
)
def test_what_is_admitted_to_a_secure_sum(changes, why):
    recipe = recipe_of()
    plan = RoundPlan(recipe_id=recipe.id, round=1, work="train", weights=START)
    hello = Hello(site="s1", recipe_id=recipe.id, versions={}, patients={"train": 0}, manifest="d" * 64)
    found = refusal(ready(**changes), plan, recipe, hello)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize("changes", [{}, {"norm": None}, {"offer": None}])
def test_a_kept_update_is_refused_where_no_sum_is_asked_for(changes):
    recipe = replace(recipe_of(), privacy=Privacy())
    plan = RoundPlan(recipe_id=recipe.id, round=1, work="train", weights=START)
    hello = Hello(site="s1", recipe_id=recipe.id, versions={}, patients={"train": 0}, manifest="d" * 64)
    assert "which this recipe has not" in str(refusal(ready(recipe_id=recipe.id, **changes), plan, recipe, hello))


def test_a_mean_beyond_the_norm_of_any_site_is_refused():
    recipe = recipe_of(max_update_norm=1.0)
    one = START * 3**-0.5  # of norm 1
    for norm in (0.5, 1, 1.0009):  # every number of a sum is rounded
        assert sum_refusal(one * norm, recipe) is None
    assert "norm 1.001, above federation.max_update_norm 1" in str(sum_refusal(one * 1.0011, recipe))
    assert "norm 1.732, above federation.max_update_norm 1" in str(sum_refusal(START, recipe))
    assert "NaN" in str(sum_refusal(START * float("nan"), recipe))


def test_the_newest_head_that_came_with_a_step_of_the_sum_is_the_sites(tmp_path):
    heads = {Gathering: "1" * 64, Masking: "2" * 64, Survivors: "3" * 64, Opening: "4" * 64}
    told = lambda site, ask: heads[type(ask)] if site != "s2" or isinstance(ask, Gathering) else ""  # noqa: E731
    hook = lambda site, ask, follow: replace(follow(), audit_head=told(site, ask))  # noqa: E731
    _, report = run(Wards(recipe_of(), tmp_path, hook))[0]
    assert report.heads == {"s1": "4" * 64, "s2": "1" * 64, "s3": "4" * 64, "s4": "4" * 64}


def test_no_masked_update_is_held_once_it_is_in_the_sum(tmp_path):
    held: list[int] = []

    class Holding(Wards):
        def step(self, asks, timeout_s, take):
            replies = super().step(asks, timeout_s, take)
            held.extend(len(reply.values) for reply in replies.values() if isinstance(reply, MaskedUpdate))
            return replies

    assert len(run(Holding(recipe_of(), tmp_path))) == 3
    assert held == [0] * 8  # of four sites in two rounds


def test_a_site_keeps_the_keys_of_its_eight_newest_sums(tmp_path):
    wards = Wards(recipe_of(), tmp_path)
    plan = RoundPlan(recipe_id=wards.recipe.id, round=1, work="train", weights=START)
    asks = [
        Gathering(
            recipe_id=plan.recipe_id, round=1, base=START.digest,
            offers={update.site: update.offer for update in wards.ask(plan, wards.names, 1.0)},
        )
        for _ in range(9)
    ]  # fmt: skip
    with pytest.raises(SecureAggregationError, match="start anew"):
        wards.answer("s1", asks[0])
    assert [wards.answer("s1", ask).site for ask in asks[1:]] == ["s1"] * 8


def test_keys_that_a_site_never_made_or_made_for_another_update_are_not_dealt_for(tmp_path):
    wards = Wards(recipe_of(), tmp_path)
    plan = RoundPlan(recipe_id=wards.recipe.id, round=1, work="train", weights=START)
    offers = {update.site: update.offer for update in wards.ask(plan, wards.names, 1.0)}
    about = {"recipe_id": plan.recipe_id, "round": 1, "base": START.digest}
    assert wards.answer("s1", Gathering(**about, offers=offers))
    wards.sums["s2"] = wards.opened("s2")  # started again
    for site, ask in (
        ("s1", Gathering(**about | {"round": 2}, offers=offers)),
        ("s1", Gathering(**about, offers={site: offer for site, offer in offers.items() if site != "s1"})),
        ("s2", Gathering(**about, offers=offers)),
    ):
        with pytest.raises(SecureAggregationError, match="not among those that it has; start anew"):
            wards.answer(site, ask)


def test_a_site_that_its_registry_does_not_hold_offers_nothing(tmp_path):
    sums = Sums("s1", tmp_path, SIGNERS["s2"], lambda: KEYS)
    with pytest.raises(SecureAggregationError, match="does not hold its own key"):
        sums.offer(recipe_of(), ready())
