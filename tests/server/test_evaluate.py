"""Central evaluation on samples whose logits are known by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from common.config import Evaluation, Preprocessing, Recipe, Task
from common.errors import DataError, FedicomError
from common.samples import Samples
from server.evaluate import central

SIZE = (8, 8)


class Brightness(nn.Module):
    """Logits (0, factor * mean of the image)."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.frozen = nn.BatchNorm2d(1).eval()

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(mean), self.factor * mean], 1)


def recipe(min_cell=2, **task):
    return Recipe(
        name="evaluation test",
        task=Task(**task),
        data=Preprocessing(size=SIZE),
        evaluation=Evaluation(min_cell=min_cell, bootstraps=100),
    )


def samples(means, targets, patients=None, **subgroups):
    x = np.broadcast_to(np.asarray(means, np.float32)[:, None, None, None], (len(means), 1, *SIZE)).copy()
    x.flags.writeable = False
    patient = np.arange(len(means)) if patients is None else np.asarray(patients)
    return Samples(
        x_N=x,
        targets_N=np.asarray(targets, np.int64),
        patient_N=patient.astype(np.int64),
        patients=tuple(f"p{i}" for i in range(len(set(patient.tolist())))),
        subgroups=subgroups,
        digest="0" * 64,
    )


def test_auroc_counts_the_pairs_in_the_right_order():
    # positives 3 and 1, negatives 2 and 0: of 4 pairs (3,2) (3,0) (1,0) are in order, (1,2) is not
    result = central(Brightness(), samples([0, 1, 2, 3], [0, 1, 0, 1]), recipe(), device="cpu")
    assert result.metrics.values["auroc"] == 0.75
    p = 1 / (1 + np.exp(-np.arange(4.0)))
    assert result.metrics.values["brier"] == pytest.approx(np.mean((p - [0, 1, 0, 1]) ** 2), abs=1e-6)


def test_batches_and_order_do_not_change_the_result():
    many = samples(np.linspace(-1, 1, 11), [0, 1] * 5 + [1])
    one, other = (central(Brightness(), many, recipe(), device="cpu", batch_size=size) for size in (1, 64))
    assert one.metrics == other.metrics


def test_subgroups_are_scored_apart_and_small_ones_are_suppressed():
    # women in order (AUROC 1), men reversed (AUROC 0), one patient of unknown sex
    held = samples([0, 1, 1, 0, 5], [0, 1, 0, 1, 1], sex=("f", "f", "m", "m", "?"))
    result = central(Brightness(), held, recipe(subgroups=("sex",)), device="cpu")
    assert result.subgroups["sex"]["f"].values["auroc"] == 1
    assert result.subgroups["sex"]["m"].values["auroc"] == 0
    assert result.subgroups["sex"]["?"].suppressed
    assert not result.subgroups["sex"]["?"].values


def test_patients_and_not_images_are_counted():
    held = samples(
        [0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 0], patients=[0, 1, 1, 0, 2, 3], sex=("f", "f", "f", "f", "m", "m")
    )
    result = central(Brightness(), held, recipe(subgroups=("sex",)), device="cpu")
    assert result.metrics.patients == 4
    assert {sex: one.patients for sex, one in result.subgroups["sex"].items()} == {"f": 2, "m": 2}


def test_too_few_patients_give_no_numbers():
    result = central(Brightness(), samples([0, 1, 2], [0, 1, 1], patients=[0, 0, 0]), recipe(), device="cpu")
    assert result.metrics.suppressed


def test_every_module_comes_back_in_its_own_mode():
    model = Brightness().train()
    model.frozen.eval()
    central(model, samples([0, 1], [0, 1]), recipe(), device="cpu")
    assert model.training
    assert not model.frozen.training


def test_an_empty_test_set_is_refused():
    with pytest.raises(DataError, match="no samples"):
        central(Brightness(), samples(np.zeros(0), np.zeros(0)), recipe(), device="cpu")


def test_a_diverged_model_is_an_error_not_a_score():
    with pytest.raises(FedicomError, match="not finite"):
        central(Brightness(float("nan")), samples([0, 1], [0, 1]), recipe(), device="cpu")
