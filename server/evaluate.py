"""The global model on the coordinator's own test images, which no site holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.config import Recipe
from common.errors import DataError
from common.inference import logits
from common.metrics import Metrics, by_subgroup, probabilities, score
from common.samples import Samples


@dataclass(frozen=True, kw_only=True)
class CentralResult:
    """What the global model does on the central test set."""

    metrics: Metrics
    subgroups: Mapping[str, Mapping[str, Metrics]]
    """Column of `task.subgroups` -> value -> metrics; small cells are suppressed."""


def central(
    model: nn.Module, samples: Samples, recipe: Recipe, *, device: torch.device | str, batch_size: int | None = None
) -> CentralResult:
    """Evaluates the model on every sample of the coordinator's folder, as `prepare_folder` gave them.

    Args:
        model: Holds the global weights; comes back in its modes, on `device`.
        samples: All of them are test data.
        recipe: Decides task, metrics and the seed of the bootstrap.

    Raises:
        DataError: There is no sample.
        FedicomError: The model's output is not finite.
    """
    if not len(samples.x_N):
        raise DataError("central evaluation: the test set has no samples; give a folder with labelled images")
    raw_NC = logits(model, samples.x_N, np.arange(len(samples.x_N)), device=device, batch_size=batch_size)
    p_NC = probabilities(raw_NC, recipe.task.kind)
    task, evaluation, seed = recipe.task, recipe.evaluation, recipe.seed
    metrics = score(samples.targets_N, p_NC, samples.patient_N, task, evaluation, seed=seed)
    return CentralResult(
        metrics=metrics,
        subgroups={
            column: by_subgroup(
                samples.targets_N, p_NC, samples.patient_N, samples.subgroups[column], task, evaluation, seed=seed
            )
            for column in task.subgroups
        },
    )
