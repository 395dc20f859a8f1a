"""Updates become one step: numbers by hand, and Flower's own strategies as reference."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import permutations
from typing import get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import strategy as flower

from common.config import Federation, Recipe, Strategy
from common.exchange import Update
from common.weights import Weights
from server import aggregate as subject
from server import checkpoint
from server.rounds import ServerState
from simulations.grid import become_node

NONE: frozenset[str] = frozenset()


def update(site: str, *, weight: float = 1.0, **arrays) -> Update:
    delta = Weights({name: np.asarray(value, np.float32) for name, value in arrays.items()})
    return Update(site=site, recipe_id="a" * 64, round=1, base="b" * 64, delta=delta, weight=weight, steps=1)


def updates(*values: float) -> list[Update]:
    return [update(f"s{number}", w=[value, -value]) for number, value in enumerate(values)]


def step(federation: Federation, given: list[Update], memory=None, round_: int = 1, buffers=NONE):
    gathering = subject.Gathering(federation, [item.site for item in given])
    for item in given:
        gathering.take(item.site, item)
    return gathering.step(memory or {}, round_=round_, buffers=buffers)


@pytest.fixture(autouse=True)
def _no_forced_collection(monkeypatch):
    # Flower's Bulyan runs the collector after every record: a third of a second each beside torch and pytest.
    monkeypatch.setattr("flwr.app.message.arrayrecord.gc.collect", lambda: 0)


def test_two_sites_average_by_weight():  # 1 * 1/4 + 5 * 3/4 = 4
    given = [update("north", weight=1, w=[1.0]), update("south", weight=3, w=[5.0])]
    got, memory = step(Federation(site_weights="patients"), given)
    assert got["w"].tolist() == [4.0]
    assert memory == {}


@pytest.mark.parametrize("weight", [1, 3])
def test_arrays_are_added_by_name_in_whatever_order_a_site_sends_them(weight):
    given = [update("north", weight=weight, a=[1.0], b=[2.0]), update("south", weight=weight, b=[6.0], a=[3.0])]
    got, _ = step(Federation(site_weights="patients"), given)
    assert {name: array.tolist() for name, array in got.items()} == {"a": [2.0], "b": [4.0]}


FIVE = {"sites": 5, "quorum": 5}


@pytest.mark.parametrize(
    ("federation", "values", "expected"),
    [
        (Federation(), [1, 5], 3.0),
        (Federation(strategy="fedprox"), [1, 5], 3.0),
        (Federation(strategy="fedmedian"), [1, 2, 900], 2.0),
        (Federation(strategy="fedmedian"), [1, 2, 3, 900], 2.5),
        # one of five cut from each end: (2 + 3 + 4) / 3
        (Federation(strategy="fedtrimmedavg", trim_fraction=0.2, **FIVE), [-900, 2, 3, 4, 900], 3.0),
        # nearest neighbours of 1.0 are 1.1 and 0.8; the liar's are far
        (Federation(strategy="krum", malicious_sites=1, **FIVE), [1.0, 1.1, 0.8, 1.35, 900], 1.0),
        # five less one liar are kept: (1 + 1.1 + 0.9 + 1.2) / 4
        (Federation(strategy="multikrum", malicious_sites=1, **FIVE), [1.0, 1.1, 0.9, 1.2, 900], 1.05),
        # theta = 7 - 2 = 5 nearest by Krum, then the 5 - 2 = 3 nearest their median 3
        (
            Federation(strategy="bulyan", malicious_sites=1, sites=7, quorum=7),
            [1.0, 2.0, 3.0, 4.0, 5.0, 900, -900],
            3.0,
        ),
        # round 1: m = 0.1 d, v = 0.01 d^2, eta sqrt(1 - .99^2) / (1 - .9^2) m / (sqrt(v) + tau)
        (Federation(strategy="fedadam", server_lr=0.1), [1, 3], 0.1 * (1 - 0.9801) ** 0.5 / 0.19 * 0.2 / (0.2 + 1e-3)),
        (Federation(strategy="fedyogi", server_lr=0.1), [1, 3], 0.1 * 0.2 / (0.2 + 1e-3)),
        (Federation(strategy="fedavgm", server_momentum=0.9), [1, 3], 2.0),
    ],
    ids=lambda part: part.strategy if isinstance(part, Federation) else "",
)
def test_each_strategy_gives_the_step_worked_out_by_hand(federation, values, expected):
    got, _ = step(federation, updates(*values))
    assert got["w"].dtype == np.float32
    np.testing.assert_allclose(got["w"], [expected, -expected], rtol=1e-6)


def test_every_strategy_of_the_recipe_was_tried_above():
    mark = next(m for m in test_each_strategy_gives_the_step_worked_out_by_hand.pytestmark if m.name == "parametrize")
    assert {case[0].strategy for case in mark.args[1]} == set(get_args(Strategy))


def federation(name: str) -> Federation:
    return Federation(
        strategy=name, sites=7, quorum=7, malicious_sites=1 if name in ("krum", "multikrum", "bulyan") else 0
    )


@pytest.mark.parametrize("name", get_args(Strategy))
def test_the_order_in_which_sites_answer_changes_no_bit(name):
    rng = np.random.default_rng(5)
    given = [update(f"s{n}", w=rng.standard_normal(50), v=rng.standard_normal((3, 3))) for n in range(7)]
    orders = [given, given[::-1], [given[i] for i in (3, 6, 0, 5, 2, 4, 1)]]
    digests = {step(federation(name), order)[0].digest for order in orders}
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan", "fedmedian"])
@pytest.mark.parametrize("liar", range(7))
def test_one_liar_anywhere_moves_a_robust_strategy_nowhere(name, liar):
    rng = np.random.default_rng(1)
    values = [rng.normal(1, 0.01, 20) for _ in range(7)]
    values[liar] = np.full(20, -300.0)
    got, _ = step(federation(name), [update(f"s{n}", w=value) for n, value in enumerate(values)])
    assert np.abs(got["w"] - 1).max() < 0.1


def test_krum_sees_small_differences_whatever_the_size_of_the_model():
    # In float32, |x|^2 + |y|^2 - 2xy around weights of norm 1e4 has an error near 10: all updates look alike.
    honest = [update(f"s{n}", w=np.full(100, 1e-3 * (1 + n / 100))) for n in range(6)]
    got, _ = step(federation("krum"), [*honest, update("s6", w=np.full(100, -1e-2))])
    assert got["w"][0] > 0


def test_running_statistics_are_averaged_whatever_the_adaptive_strategy():
    given = [update("a", w=[1.0], var=[0.5]), update("b", w=[3.0], var=[-0.1])]
    for name in ("fedadam", "fedyogi", "fedavgm"):
        got, memory = step(Federation(strategy=name), given, buffers=frozenset({"var"}))
        np.testing.assert_allclose(got["var"], [0.2], rtol=1e-6)
        assert all(set(part) == {"w"} for part in memory.values())
        assert list(got) == ["w", "var"]


class _Grid:
    """As much of a Grid as a strategy's `configure_train` asks of it."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]


REFERENCE = {
    "fedadam": lambda f: flower.FedAdam(eta=f.server_lr),
    "fedyogi": lambda f: flower.FedYogi(eta=f.server_lr),
    "fedavgm": lambda f: flower.FedAvgM(server_learning_rate=1.0, server_momentum=f.server_momentum),
    "fedavg": lambda f: flower.FedAvg(),
    "fedmedian": lambda f: flower.FedMedian(),
    "fedtrimmedavg": lambda f: flower.FedTrimmedAvg(beta=f.trim_fraction),
    "krum": lambda f: flower.Krum(num_malicious_nodes=1),
    "multikrum": lambda f: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=6),
    "bulyan": lambda f: flower.Bulyan(num_malicious_nodes=1),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_steps_around_zero_equal_flowers_strategy_on_the_weights_over_rounds_and_a_restart(name, tmp_path):
    chosen, rng = federation(name), np.random.default_rng(2)
    start = Weights({"w": rng.standard_normal(30).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)})
    become_node(1)  # a strategy makes messages, and Flower wants to know who makes them
    reference, theirs = REFERENCE[name](chosen), dict(start)
    state = ServerState(recipe_id="a" * 64, round=0, weights=start)
    for round_ in range(1, 5):
        given = [update(f"s{n}", w=rng.normal(0.5, 1, 30), b=rng.normal(-0.5, 1, 3)) for n in range(7)]
        record = ArrayRecord({key: Array(np.asarray(value)) for key, value in theirs.items()})
        reference.configure_train(round_, record, ConfigRecord(), _Grid())
        trained = [replace(item, delta=Weights(dict(theirs)) + item.delta) for item in given]
        replies = [subject._Reply(item.delta, item.weight, list(start)) for item in trained]
        arrays, _ = reference.aggregate_train(round_, replies)
        theirs = {key: array.numpy() for key, array in arrays.items()}
        ours, memory = step(chosen, given, state.memory, round_)
        state = replace(state, round=round_, weights=state.weights + ours, memory=memory)
        checkpoint.write(state, tmp_path)
        state = checkpoint.load(tmp_path, "a" * 64)
        for key in start:
            np.testing.assert_allclose(state.weights[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedavgm"])
def test_adaptive_strategies_need_their_memory(name):
    chosen = Federation(strategy=name)
    first, memory = step(chosen, updates(1, 3))
    assert step(chosen, updates(2, 2), memory, round_=2)[0] != step(chosen, updates(2, 2), {}, round_=2)[0]
    again, _ = step(chosen, updates(1, 3))
    assert again == first  # nothing is remembered but what is handed on


def test_momentum_adds_up():  # 2, then 0.5 * 2 + 2 = 3, then 0.5 * 3 + 2 = 3.5
    chosen, memory, seen = Federation(strategy="fedavgm", server_momentum=0.5), {}, []
    for round_ in (1, 2, 3):
        got, memory = step(chosen, updates(1, 3), memory, round_)
        seen.append(float(got["w"][0]))
    assert seen == [2.0, 3.0, 3.5]


def test_inputs_are_left_as_they_were():
    given = updates(1, 3)
    before = [item.delta.digest for item in given]
    for name in get_args(Strategy)[:7]:
        step(Federation(strategy=name, sites=5, quorum=5), given)
    assert [Weights(dict(item.delta)).digest for item in given] == before


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_adding_as_they_come_gives_the_bits_of_flowers_average(count):
    rng = np.random.default_rng(count)
    given = [update(f"s{n}", w=rng.standard_normal(40_000), b=rng.standard_normal(())) for n in range(count)]
    theirs = subject._call(flower.FedAvg(), [(item.delta, item.weight) for item in given], ["w", "b"], 1)
    assert step(Federation(sites=9, quorum=1), given)[0] == Weights(theirs)


def test_weighed_sites_give_flowers_average_to_rounding():
    rng = np.random.default_rng(3)
    given = [update(f"s{n}", weight=n + 1, w=rng.standard_normal(40_000)) for n in range(7)]
    theirs = subject._call(flower.FedAvg(), [(item.delta, item.weight) for item in given], ["w"], 1)
    np.testing.assert_allclose(
        step(Federation(site_weights="patients"), given)[0]["w"], theirs["w"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedmedian"])
def test_a_site_without_an_update_changes_no_bit(name):
    rng = np.random.default_rng(4)
    given = [update(f"s{n}", w=rng.standard_normal(50)) for n in range(7)]
    gathering = subject.Gathering(federation(name), [*(item.site for item in given), "s3b", "a"])
    for site in ("s6", "s3b", "s2", "s4", "a", "s0", "s1", "s5", "s3"):
        gathering.take(site, next((item for item in given if item.site == site), None))
    assert gathering.step({}, round_=1, buffers=NONE) == step(federation(name), given)


def test_of_a_thousand_updates_one_is_held_at_a_time():
    held: list[weakref.ref[Weights]] = []

    def arriving(site: str) -> Update:
        found = update(site, w=np.ones(10))
        held.append(weakref.ref(found.delta))
        return found

    sites = [f"s{n:04d}" for n in range(1000)]
    gathering = subject.Gathering(Federation(sites=1000), sites)
    for site in sites:
        gathering.take(site, arriving(site))
        assert sum(ref() is not None for ref in held[-2:]) == 0
    assert gathering.step({}, round_=1, buffers=NONE)[0]["w"].tolist() == [1.0] * 10


def test_three_sites_in_every_order_give_one_sum():
    # 1e8 + 1 - 1e8 in float32 is 0 or 1, depending on the order
    given = [update("a", w=[1e8]), update("b", w=[1.0]), update("c", w=[-1e8])]
    assert len({step(Federation(), list(order))[0].digest for order in permutations(given)}) == 1


def test_the_recipe_reaches_every_strategy_setting():
    recipe = Recipe(name="x", federation=Federation(strategy="fedadam", server_lr=0.5))
    fast, _ = step(recipe.federation, updates(1, 3))
    slow, _ = step(replace(recipe.federation, server_lr=0.05), updates(1, 3))
    np.testing.assert_allclose(fast["w"], 10 * slow["w"], rtol=1e-5)
