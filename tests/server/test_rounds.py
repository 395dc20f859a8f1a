"""The federation's loop with sites that answer by rule."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from common.config import EarlyStopping, Federation, Recipe, Strategy, Training
from common.errors import QuorumError
from common.exchange import Failure, Hello, Refusal, RoundPlan, Scores, Update
from common.weights import Weights
from server import checkpoint, rounds

SITES = [f"s{number}" for number in range(7)]
START = Weights({"w": np.zeros(5, np.float32), "var": np.ones(2, np.float32)})
NONE: frozenset[str] = frozenset()


def recipe(rounds_=3, patience=0, min_improvement=0.0, **federation) -> Recipe:
    stopping = EarlyStopping(patience_rounds=patience, min_improvement=min_improvement)
    return Recipe(
        name="loop",
        rounds=rounds_,
        training=Training(proximal_mu=0.1),
        federation=Federation(**({"sites": 7, "quorum": 7, "early_stopping": stopping} | federation)),
    )


class Sites:
    """Every site moves the weights by an amount that follows from its name and the weights that came."""

    def __init__(self, scores=None) -> None:
        self.plans: list[RoundPlan] = []
        self._scores = dict(scores or {})
        """Digest of a model, or round number, to its AUROC everywhere."""

    def hello(self, recipe, audit_head, before=()):
        raise AssertionError

    joined = hello

    def ask(self, plan, sites, timeout_s):
        self.plans.append(plan)
        return [self.answer(plan, site) for site in sites]

    def answer(self, plan, site):
        seed = int.from_bytes(hashlib.sha256(f"{plan.weights.digest}{site}".encode()).digest()[:8], "little")
        rng = np.random.default_rng(seed)
        moved = {key: rng.normal(0.1, 1, shape).astype(np.float32) for key, shape in plan.weights.shapes.items()}
        score = self._scores.get(len(self.plans))
        values = {} if score is None else {"auroc": score}
        return Update(
            site=site,
            recipe_id=plan.recipe_id,
            round=plan.round,
            base=plan.weights.digest,
            delta=Weights(moved if plan.work == "train" else {}),
            weight=1.0,
            steps=1 if plan.work == "train" else 0,
            validation=Scores(patients=9, values=values),
            audit_head=hashlib.sha256(site.encode()).hexdigest(),
        )


class Odd(Sites):
    """Some sites answer otherwise."""

    def __init__(self, **others) -> None:
        super().__init__()
        self._others = others

    def ask(self, plan, sites, timeout_s):
        replies = {reply.site: reply for reply in super().ask(plan, sites, timeout_s)}
        for site, change in self._others.items():
            replies[site] = change(replies[site])
        return [reply for reply in replies.values() if reply is not None]


def hellos(names=SITES, **patients) -> dict[str, Hello]:
    return {
        name: Hello(
            site=name,
            recipe_id="a" * 64,
            versions={},
            patients={"train": patients.get(name, 9)},
            manifest="d" * 64,
        )
        for name in names
    }


def ran(recipe, transport, state=None, sites=hellos):
    state = state or rounds.start(recipe, START)
    return list(rounds.run(state, recipe, transport, sites, buffers=frozenset({"var"})))


def silent(reply):
    return Failure(site=reply.site, round=reply.round, why="no reply within 5 s")


def poisoned(reply):
    return replace(reply, delta=Weights({key: value * np.float32(np.nan) for key, value in reply.delta.items()}))


@pytest.fixture(autouse=True)
def _no_forced_collection(monkeypatch):
    # Flower's Bulyan runs the collector after every record: a third of a second each beside torch and pytest.
    monkeypatch.setattr("flwr.app.message.arrayrecord.gc.collect", lambda: 0)


def test_a_run_is_its_rounds_and_one_closing_evaluation():
    sites = Sites()
    steps = ran(recipe(3), sites)
    assert [(report.work, report.round) for _, report in steps] == [
        ("train", 1), ("train", 2), ("train", 3), ("evaluate", 4),
    ]  # fmt: skip
    assert [state.done for state, _ in steps] == [False, False, False, True]
    assert [state.round for state, _ in steps] == [1, 2, 3, 3]
    assert steps[-1][0].weights == steps[-2][0].weights
    assert [report.after for _, report in steps[:-1]] == [report.before for _, report in steps[1:]]
    assert [plan.weights.digest for plan in sites.plans] == [report.before for _, report in steps]


def test_a_finished_state_asks_nobody():
    final = ran(recipe(1), Sites())[-1][0]
    sites = Sites()
    assert ran(recipe(1), sites, final) == []
    assert sites.plans == []


class Noting(Sites):
    """Keeps who was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []

    def ask(self, plan, sites, timeout_s):
        self.asked.append(list(sites))
        return super().ask(plan, sites, timeout_s)


def test_a_share_of_the_sites_is_drawn_anew_each_round_and_all_are_asked_at_the_end():
    noting, chosen = Noting(), recipe(20, fraction=0.3, quorum=1)
    reports = ran(chosen, noting)
    *training, closing = noting.asked
    assert {len(sites) for sites in training} == {3}  # 0.3 * 7 = 2.1
    assert {site for sites in training for site in sites} == set(SITES)
    assert len({tuple(sites) for sites in training}) > 5
    assert closing == SITES
    assert [sorted(report.accepted) for _, report in reports] == noting.asked
    half = Noting()
    ran(chosen, half, state=reports[9][0])  # a resumed run asks whom it would have asked
    assert half.asked == noting.asked[10:]
    other = Noting()
    ran(replace(chosen, seed=1), other)
    assert other.asked[:-1] != training


@pytest.mark.parametrize(
    ("fraction", "sites", "quorum", "count"), [(0.1, 30, 1, 3), (0.01, 30, 5, 5), (1.0, 30, 2, 30)]
)
def test_never_fewer_than_the_quorum_are_drawn(fraction, sites, quorum, count):
    there = hellos([f"s{n:02d}" for n in range(sites)])
    chosen = recipe(1, fraction=fraction, sites=sites, quorum=quorum)
    assert len(rounds.drawn(there, chosen, 1)) == count


def test_no_more_sites_are_asked_than_have_room_in_a_secure_sum_and_all_get_their_turn():
    there = hellos([f"s{n}" for n in range(5)])
    chosen = recipe(30, sites=3, quorum=3, max_update_norm=1.0)
    secure = replace(chosen, privacy=replace(chosen.privacy, secure_aggregation=True))
    asked = [rounds.drawn(there, secure, number) for number in range(1, 31)]
    assert {len(sites) for sites in asked} == {3}
    assert {site for sites in asked for site in sites} == set(there)
    assert len(rounds.drawn(there, chosen, 1)) == 5  # what is seen one by one has room for all


def test_who_was_not_asked_is_neither_missing_nor_refused():
    (_, report), *_ = ran(recipe(1, fraction=0.5, quorum=4), Sites())
    assert len(report.accepted) == 4
    assert report.refused == {}


def test_a_round_adds_the_mean_step():
    class Fixed(Sites):
        def answer(self, plan, site):
            moved = {"w": np.full(5, float(site[1:]), np.float32), "var": np.zeros(2, np.float32)}
            reply = super().answer(plan, site)
            return replace(reply, delta=Weights(moved)) if plan.work == "train" else reply

    state, report = ran(recipe(1), Fixed())[0]
    assert state.weights["w"].tolist() == [3.0] * 5  # (0 + 1 + ... + 6) / 7
    assert report.accepted["s4"].update_norm == pytest.approx(4 * 5**0.5)


def test_a_round_below_quorum_leaves_the_model_alone(tmp_path):
    wanted = recipe(3, quorum=6)
    first = ran(wanted, Sites())[0][0]
    checkpoint.write(first, tmp_path)
    before = (first.weights.digest, (tmp_path / "round-0001.safetensors").read_bytes())
    broken = Odd(s0=silent, s3=poisoned)
    with pytest.raises(QuorumError) as caught:
        ran(wanted, broken, first)
    message = str(caught.value)
    for words in ("round 2", "5 of 7", "quorum is 6", "'s0': 'no reply within 5 s'", "'s3': 'update holds NaN"):
        assert words in message
    assert (first.weights.digest, (tmp_path / "round-0001.safetensors").read_bytes()) == before
    assert checkpoint.load(tmp_path, wanted.id) == first


def test_at_quorum_the_round_counts_and_names_who_was_refused():
    state, report = ran(recipe(1, quorum=5), Odd(s0=silent, s3=poisoned))[0]
    assert list(report.accepted) == ["s1", "s2", "s4", "s5", "s6"]
    assert report.refused == {"s0": "no reply within 5 s", "s3": "update holds NaN or infinity"}
    assert state.weights.finite


def test_a_site_that_the_transport_forgot_is_a_failure():
    report = ran(recipe(1, quorum=6), Odd(s2=lambda reply: None))[0][1]
    assert report.refused == {"s2": "no reply"}


def test_a_refusal_is_told_and_its_audit_head_kept():
    def refuse(reply):
        return Refusal(
            site=reply.site, recipe_id=reply.recipe_id, round=reply.round, code="budget", why="spent",
            audit_head="c" * 64,
        )  # fmt: skip

    report = ran(recipe(1, quorum=6), Odd(s2=refuse))[0][1]
    assert report.refused == {"s2": "site refused (budget): spent"}
    assert report.heads["s2"] == "c" * 64
    assert set(report.heads) == set(SITES)


def test_a_reply_of_nobody_asked_is_not_admitted():
    class Crowd(Sites):
        def ask(self, plan, sites, timeout_s):
            return [*super().ask(plan, sites, timeout_s), self.answer(plan, "stranger")]

    assert "stranger" not in ran(recipe(1), Crowd())[0][1].accepted


def test_of_two_replies_of_a_site_the_first_counts():
    class Stammering(Sites):
        def ask(self, plan, sites, timeout_s):
            replies = super().ask(plan, sites, timeout_s)
            return [replies[0], replace(replies[0], weight=5.0, steps=7), *replies[1:]]

    (plain, _), (stammered, report) = ran(recipe(1), Sites())[0], ran(recipe(1), Stammering())[0]
    assert stammered.weights == plain.weights
    assert (report.accepted["s0"].weight, report.accepted["s0"].steps) == (1.0, 1)


def test_the_closing_evaluation_needs_the_quorum_too_unless_an_operator_ended_the_training():
    trained = ran(recipe(1), Sites())[0][0]
    with pytest.raises(QuorumError, match="round 2: 5 of 7 replies accepted, quorum is 7"):
        ran(recipe(1), Odd(s0=silent, s3=silent), trained)
    state, report = ran(recipe(1), Odd(s0=silent, s3=silent), rounds.ended(trained))[0]
    assert (state.done, list(report.accepted)) == (True, ["s1", "s2", "s4", "s5", "s6"])


def test_a_plan_carries_the_newest_ledger_heads_of_the_sites_that_are_asked_alone():
    class Spending(Sites):
        def answer(self, plan, site):
            return replace(super().answer(plan, site), ledger_head="c" * 64 if site == "s1" else "")

    sites, early = Spending(), {"s0": "a" * 64, "s1": "b" * 64, "s6": "b" * 64}
    here = hellos(SITES[:5])
    list(
        rounds.run(
            rounds.start(recipe(1), START), recipe(1, quorum=5), sites, lambda: here, buffers=NONE, ledger_heads=early
        )
    )
    assert [plan.ledger_heads for plan in sites.plans] == [
        {"s0": "a" * 64, "s1": "b" * 64}, {"s0": "a" * 64, "s1": "c" * 64},
    ]  # fmt: skip


def test_a_round_is_behind_the_model_for_the_sites_that_were_in_it():
    present = iter([SITES[:5], SITES, SITES[2:], SITES])
    final = ran(recipe(3, quorum=5), Sites(), sites=lambda: hellos(next(present)))[-1][0]
    assert rounds.behind(final) == {site: 3 - (site in SITES[:2]) - (site in SITES[5:]) for site in SITES}


@pytest.mark.parametrize("name", get_args(Strategy))
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits(name, stop, tmp_path):
    wanted = recipe(4, strategy=name, malicious_sites=1 if name in ("krum", "multikrum", "bulyan") else 0)
    whole = ran(wanted, Sites())
    checkpoint.write(whole[stop - 1][0], tmp_path)
    resumed = ran(wanted, Sites(), checkpoint.load(tmp_path, wanted.id))
    assert resumed[-1][0].weights.digest == whole[-1][0].weights.digest
    assert [report.after for _, report in resumed] == [report.after for _, report in whole[stop:]]
    assert [past.round for past in resumed[-1][0].history] == [past.round for past in whole[-1][0].history]


def visits(scores, **settings):
    """What was done in each visit when these were the AUROC of the model that each visit measured."""
    sites = Sites({number: score for number, score in enumerate(scores, 1) if score is not None})
    steps = ran(recipe(**settings), sites)
    return [plan.work[0] for plan in sites.plans], [plan.weights.digest for plan in sites.plans], steps[-1][0]


@pytest.mark.parametrize(
    ("scores", "settings", "work", "kept"),
    [
        # two rounds without improvement after the second visit: its model is kept and evaluated once more
        ([0.5, 0.7, 0.6, 0.7, 0.65], {"rounds_": 9, "patience": 2}, "tttteE", 2),
        # the last model, measured for the first time in the closing evaluation, is the best
        ([0.5, 0.7, 0.6, 0.7, 0.9], {"rounds_": 9, "patience": 2}, "tttte", 5),
        # improving to the end: nothing is thrown away, the last round included
        ([0.5, 0.6, 0.7, 0.8], {"rounds_": 3, "patience": 1}, "ttte", 4),
        ([0.5, 0.6], {"rounds_": 1, "patience": 1}, "te", 2),
        # all rounds done, but the model of the third visit was the best
        ([0.5, 0.6, 0.8, 0.7], {"rounds_": 3, "patience": 2}, "ttteE", 3),
        # an improvement of less than min_improvement does not count as one, but the best is still the best
        ([0.5, 0.55, 0.58, 0.5], {"rounds_": 9, "patience": 2, "min_improvement": 0.1}, "ttteE", 3),
        # no score at all says nothing
        ([None] * 9, {"rounds_": 3, "patience": 1}, "ttte", 4),
        # a round without a score is no round without improvement
        ([0.5, None, None, 0.6, 0.7], {"rounds_": 4, "patience": 1}, "tttte", 5),
        # without early stopping nobody looks
        ([0.9, 0.1, 0.1, 0.1], {"rounds_": 3}, "ttte", 4),
    ],
)
def test_early_stopping_keeps_the_best_model_that_was_measured(scores, settings, work, kept):
    done, digests, final = visits(scores, **settings)
    assert "".join(done) == work.lower()
    assert final.done
    assert final.weights.digest == digests[kept - 1] == digests[-1]
    assert final.history[-1].before == final.weights.digest
    assert final.best is None
    # How many rounds are behind it, where it is not the last round's.
    assert rounds.taken(final) == (kept - 1 if "E" in work else None)
    assert rounds.behind(final) == dict.fromkeys(SITES, kept - 1)


def test_early_stopping_survives_a_restart_at_every_visit(tmp_path):
    scores = [0.5, 0.7, 0.6, 0.7, 0.65]
    table = dict(enumerate(scores, 1))
    wanted = recipe(9, patience=2)
    whole = ran(wanted, Sites(table))
    for stop in range(1, len(whole)):
        folder = tmp_path / str(stop)
        checkpoint.write(whole[stop - 1][0], folder)
        late = Sites({number - stop: score for number, score in table.items()})
        final = ran(wanted, late, checkpoint.load(folder, wanted.id))[-1][0]
        assert final.weights.digest == whole[-1][0].weights.digest
        assert len(final.history) == len(whole[-1][0].history)


def test_the_validation_of_a_round_is_the_plain_mean_over_sites_that_gave_one():
    class Mixed(Sites):
        def answer(self, plan, site):
            values = {"s0": {"auroc": 0.6}, "s1": {"auroc": 0.9}}.get(site, {})
            return replace(super().answer(plan, site), validation=Scores(patients=5, values=values))

    assert ran(recipe(1), Mixed())[0][1].validation == pytest.approx(0.75)
    assert ran(recipe(1), Sites())[0][1].validation is None


def test_the_plan_carries_the_head_of_the_coordinators_log():
    heads = iter(["a" * 64, "b" * 64])
    sites = Sites()
    list(
        rounds.run(
            rounds.start(recipe(1), START), recipe(1), sites, hellos, buffers=NONE, audit_head=lambda: next(heads)
        )
    )
    assert [plan.audit_head for plan in sites.plans] == ["a" * 64, "b" * 64]


def test_who_is_there_is_asked_before_every_round_and_who_came_is_in_it():
    present = iter([SITES[:5], SITES, SITES[2:], SITES])
    sites = Sites()
    steps = ran(recipe(3, quorum=5), sites, sites=lambda: hellos(next(present)))
    assert [sorted(report.accepted) for _, report in steps] == [SITES[:5], SITES, SITES[2:], SITES]


def test_a_site_below_its_own_count_of_patients_is_refused_and_the_others_are_aggregated():
    class Weighed(Sites):
        def answer(self, plan, site):
            moved = {"w": np.full(5, float(site[1:]), np.float32), "var": np.zeros(2, np.float32)}
            reply = super().answer(plan, site)
            return replace(reply, delta=Weights(moved), weight=9.0) if plan.work == "train" else reply

    wanted = recipe(1, quorum=2, site_weights="patients")
    here = hellos(["s1", "s2", "s3"], s3=8)
    state, report = ran(wanted, Weighed(), sites=lambda: here)[0]
    assert report.refused == {"s3": "declared weight 9, but the site came with 8 training patients"}
    assert state.weights["w"].tolist() == [1.5] * 5  # (9 * 1 + 9 * 2) / 18


def test_the_final_model_is_the_moving_average_of_the_rounds_models_and_training_goes_on_from_the_last_one(tmp_path):
    plain, averaged = Sites(), Sites()
    models = [state.weights for state, _ in ran(recipe(4), plain)][:4]
    steps = ran(recipe(4, ema_decay=0.3), averaged)
    assert [plan.weights for plan in averaged.plans[:4]] == [plan.weights for plan in plain.plans[:4]]
    # the decay rises: 2/11, 3/12, then 0.3; the first model stands alone
    expected = models[0]
    for decay, model in zip((3 / 12, 0.3, 0.3), models[1:], strict=True):
        expected = expected * decay + model * (1 - decay)
    final, closing = steps[-1]
    for name in expected:
        np.testing.assert_allclose(final.weights[name], expected[name], rtol=1e-5)
    assert averaged.plans[-1].weights == final.weights  # what the closing evaluation measures
    assert steps[3][1].after == closing.before == final.weights.digest
    # and a run that was interrupted ends in the same bits
    checkpoint.write(steps[1][0], tmp_path)
    state = checkpoint.load(tmp_path, recipe(4, ema_decay=0.3).id)
    assert ran(recipe(4, ema_decay=0.3), Sites(), state)[-1][0].weights == final.weights
