"""Outputs do not depend on how many samples go through at once, and large images go a few at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from common.inference import _batch_size, logits


class Counting(nn.Module):
    """The mean of each image; notes how many came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        return x.flatten(1).mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("size", "batches"), [((28, 28), [64, 6]), ((224, 224), [10] * 7), ((64, 64, 64), [2] * 35), ((2**20,), [1] * 70)]
)
def test_a_batch_on_a_cpu_has_64_small_images_or_a_few_large_ones(size, batches):
    model = Counting()
    x_N = np.broadcast_to(np.arange(70, dtype=np.float32).reshape(70, *[1] * (len(size) + 1)), (70, 1, *size))
    got = logits(model, x_N, np.arange(70)[::-1], device="cpu")
    assert model.batches == batches
    assert got.ravel().tolist() == list(range(69, -1, -1))


@pytest.mark.parametrize(
    ("size", "batch"), [((28, 28), 64), ((512, 512), 64), ((96, 96, 96), 18), ((128, 128, 128), 8), ((2**25,), 1)]
)
def test_a_card_that_trains_on_few_volumes_at_once_is_not_asked_to_score_64(size, batch):
    assert _batch_size((1, *size), torch.device("cuda")) == batch
