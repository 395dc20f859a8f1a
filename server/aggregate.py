"""Admitted updates become one step of the global model, by a Flower strategy's `aggregate_train`.

The strategies are given the sites' changes around zero, and the result is added to the
weights here. Every strategy in use commutes with that shift, and Krum's squared distances
(`|x|^2 + |y|^2 - 2xy` in float32) would drown in the norm of the weights otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from common.config import Federation
from common.errors import FedicomError
from common.exchange import Update
from common.weights import Weights

Memory = Mapping[str, Weights]
"""What an adaptive strategy carries from round to round (`m_t`, `v_t`, `momentum_vector`)."""

_ADAPTIVE = ("fedadam", "fedyogi", "fedavgm")


def aggregate(
    updates: Sequence[Update], federation: Federation, memory: Memory, *, round_: int, buffers: frozenset[str]
) -> tuple[Weights, Memory]:
    """The change of the global model that these updates make together.

    Args:
        updates: Admitted updates; summed in order of site name, so that equal updates give equal bits.
        memory: Of the round before; empty at the start.
        round_: 1 for the first.
        buffers: Names of running statistics. An adaptive strategy would push a variance below zero, so these
            are averaged by weight whatever the strategy.

    Returns:
        The step to add to the weights, and the memory for the next round.

    Raises:
        FedicomError: The strategy returned nothing.
    """
    ordered = sorted(updates, key=lambda update: update.site)
    names = list(ordered[0].delta)
    adaptive = federation.strategy in _ADAPTIVE
    split = [name for name in names if not (adaptive and name in buffers)]
    strategy = _strategy(federation)
    _restore(strategy, memory, {name: np.zeros(ordered[0].delta[name].shape, np.float32) for name in split})
    step = _call(strategy, ordered, split, round_)
    if len(split) < len(names):
        step |= _call(flower.FedAvg(), ordered, [name for name in names if name not in split], round_)
    return Weights({name: step[name] for name in names}), _memory(strategy, split)


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

    def __init__(self, update: Update, names: Sequence[str]) -> None:
        arrays = ArrayRecord({name: Array(np.asarray(update.delta[name])) for name in names})
        self.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": update.weight})})

    def has_error(self) -> bool:
        return False


def _call(
    strategy: flower.Strategy, updates: Sequence[Update], names: Sequence[str], round_: int
) -> dict[str, np.ndarray[Any, Any]]:
    flower_log = logging.getLogger("flwr")
    level = flower_log.level
    flower_log.setLevel(logging.ERROR)  # its per-reply lines repeat what our own progress says
    try:
        arrays, _ = strategy.aggregate_train(round_, cast(Any, [_Reply(update, names) for update in updates]))
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
