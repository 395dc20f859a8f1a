"""Admitted updates become one step of the global model, by a Flower strategy's `aggregate_train`.

A strategy that needs no more than their mean never sees them all: they are added up as they come, in one model's
memory. The mean depends on the admitted updates alone, not on who else was asked, so they are weighed when all are in
(Flower weighs before it adds: the same bits for 2, 4, 8 ... equal sites, else the last ones may differ). A robust
strategy compares the updates, so they are kept.

The strategies are given the sites' changes around zero, and the result is added to the
weights here. Every strategy in use commutes with that shift, and Krum's squared distances
(`|x|^2 + |y|^2 - 2xy` in float32) would drown in the norm of the weights otherwise.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from common.config import Federation
from common.errors import FedicomError
from common.exchange import Update
from common.weights import Array as WholeArray
from common.weights import Weights, room

Memory = Mapping[str, Weights]
"""What an adaptive strategy carries from round to round (`m_t`, `v_t`, `momentum_vector`)."""

_ADAPTIVE = ("fedadam", "fedyogi", "fedavgm")
_MEANS = ("fedavg", "fedprox", *_ADAPTIVE)
_CHUNK = 1 << 14
"""Numbers at a time, so that their products stay in the cache."""


class Gathering:
    """The updates of one round, taken in one by one and summed in order of site name, so that equal updates give equal
    bits; one that comes before its turn waits for it."""

    def __init__(self, federation: Federation, sites: Iterable[str]) -> None:
        """Begins a round in which these sites are asked."""
        self._federation = federation
        self._order = deque(sorted(sites))
        self._early: dict[str, Update | None] = {}
        self._weight = 0.0
        self._sum: tuple[WholeArray, dict[str, WholeArray]] | None = None
        """Of the admitted updates times their weights, as `common.weights.room` cuts it."""
        self._kept: list[Update] = []

    def take(self, site: str, update: Update | None) -> None:
        """Takes a site's admitted update, or None when there will be none."""
        self._early[site] = update
        while self._order and self._order[0] in self._early:
            found = self._early.pop(self._order.popleft())
            if found is None:
                continue
            if self._federation.strategy in _MEANS:
                self._add(found)
            else:
                self._kept.append(found)

    def step(self, memory: Memory, *, round_: int, buffers: frozenset[str]) -> tuple[Weights, Memory]:
        """The change of the global model that the updates make together.

        Args:
            memory: Of the round before; empty at the start.
            round_: 1 for the first.
            buffers: Names of running statistics. An adaptive strategy would push a variance below zero, so these
                are averaged by weight whatever the strategy.

        Returns:
            The step to add to the weights, and the memory for the next round.

        Raises:
            FedicomError: The strategy returned nothing.
        """
        if self._federation.strategy not in _MEANS:
            names = list(self._kept[0].delta)
            found = _call(
                _strategy(self._federation), [(item.delta, item.weight) for item in self._kept], names, round_
            )
            return Weights(found), {}
        assert self._sum is not None
        whole, arrays = self._sum
        self._sum = None
        np.divide(whole, self._weight, out=whole)
        mean = Weights.filled(whole, arrays)
        if self._federation.strategy not in _ADAPTIVE:
            return mean, {}
        split = [name for name in mean if name not in buffers]
        strategy = _strategy(self._federation)
        _restore(strategy, memory, {name: np.zeros(mean[name].shape, np.float32) for name in split})
        moved = _call(strategy, [(mean, 1.0)], split, round_)
        return Weights({name: moved.get(name, array) for name, array in mean.items()}), _memory(strategy, split)

    def _add(self, update: Update) -> None:
        self._weight += update.weight
        if self._sum is None:
            self._sum = room(update.delta.shapes)
            np.multiply(update.delta.whole, update.weight, out=self._sum[0])
            return
        total, change = self._sum[0], update.delta.ordered(self._sum[1]).whole
        if update.weight == 1:
            total += change
            return
        part = np.empty(_CHUNK, np.float32)
        for start in range(0, change.size, _CHUNK):
            here = change[start : start + _CHUNK]
            total[start : start + _CHUNK] += np.multiply(here, update.weight, out=part[: here.size])


def _strategy(federation: Federation) -> flower.Strategy:
    malicious = federation.malicious_sites
    match federation.strategy:
        case "fedavg" | "fedprox":
            return flower.FedAvg()  # the proximal term acts at the sites; the mean is the same
        case "fedadam":
            return flower.FedAdam(eta=federation.server_lr)
        case "fedyogi":
            return flower.FedYogi(eta=federation.server_lr)
        case "fedavgm":
            return flower.FedAvgM(server_learning_rate=1.0, server_momentum=federation.server_momentum)
        case "fedmedian":
            return flower.FedMedian()
        case "fedtrimmedavg":
            return flower.FedTrimmedAvg(beta=federation.trim_fraction)
        case "krum":
            return flower.Krum(num_malicious_nodes=malicious)
        case "multikrum":
            keep = federation.quorum - malicious
            return flower.MultiKrum(num_malicious_nodes=malicious, num_nodes_to_select=keep)
        case "bulyan":
            return flower.Bulyan(num_malicious_nodes=malicious)


class _Reply:
    """The part of a Flower message that `aggregate_train` reads."""

    def __init__(self, delta: Mapping[str, np.ndarray[Any, Any]], weight: float, names: Sequence[str]) -> None:
        arrays = ArrayRecord({name: Array(np.asarray(delta[name])) for name in names})
        self.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})

    def has_error(self) -> bool:
        return False


def _call(
    strategy: flower.Strategy,
    updates: Sequence[tuple[Mapping[str, np.ndarray[Any, Any]], float]],
    names: Sequence[str],
    round_: int,
) -> dict[str, np.ndarray[Any, Any]]:
    flower_log = logging.getLogger("flwr")
    level = flower_log.level
    flower_log.setLevel(logging.ERROR)  # its per-reply lines repeat what our own progress says
    try:
        arrays, _ = strategy.aggregate_train(round_, cast(Any, [_Reply(*update, names) for update in updates]))
    finally:
        flower_log.setLevel(level)
    if arrays is None:
        raise FedicomError(f"{type(strategy).__name__} returned nothing for {len(updates)} updates")
    return {name: arrays[name].numpy() for name in names}


def _restore(strategy: Any, memory: Memory, zeros: dict[str, np.ndarray[Any, Any]]) -> None:
    if isinstance(strategy, flower.FedAvgM):
        strategy.current_arrays = ArrayRecord({name: Array(array) for name, array in zeros.items()})
        if "momentum_vector" in memory:
            strategy.momentum_vector = [memory["momentum_vector"][name] for name in zeros]
    elif hasattr(strategy, "m_t"):
        strategy.current_arrays = zeros
        strategy.m_t = dict(memory["m_t"]) if "m_t" in memory else None
        strategy.v_t = dict(memory["v_t"]) if "v_t" in memory else None


def _memory(strategy: Any, names: Sequence[str]) -> Memory:
    if isinstance(strategy, flower.FedAvgM) and strategy.momentum_vector is not None:
        return {"momentum_vector": Weights(dict(zip(names, strategy.momentum_vector, strict=True)))}
    if getattr(strategy, "m_t", None) is not None:
        return {"m_t": Weights(strategy.m_t), "v_t": Weights(strategy.v_t)}
    return {}
