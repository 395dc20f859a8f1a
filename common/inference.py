"""A model's outputs for prepared samples, as sites and the coordinator both compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.shard import Batches

_CPU_NUMBERS = 2**19
"""Of the images of a batch: ten of 224 x 224. With more, each layer's result is fresh memory of the system."""
_GPU_NUMBERS = 2**24
"""64 of 512 x 512, or 18 of 96 x 96 x 96: of 64 such volumes one layer's result takes 4 GB."""


def logits(
    model: nn.Module,
    x_N: npt.NDArray[np.float32],
    indices: Sequence[int] | npt.NDArray[np.integer],
    *,
    device: torch.device | str,
    batch_size: int | None = None,
) -> npt.NDArray[np.float32]:
    """The model's outputs before softmax or sigmoid, in evaluation mode and without gradients.

    Args:
        model: Left in the modes (of every module) in which it came, and on `device`.
        x_N: Samples (N, 1, *size), possibly memory-mapped: one batch is copied at a time.
        indices: Which samples, in which order; the result keeps it.
        batch_size: None: 64, and fewer of large images.

    Returns:
        float32 (len(indices), classes).

    Raises:
        ValueError: No index was given; there would be no shape to return.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if not len(chosen):
        raise ValueError("no samples to run the model on")
    # A frozen batch norm may be in eval mode inside a training model: each module gets its own mode back
    modes = [(module, module.training) for module in model.modules()]
    batches, batch_size = Batches(x_N), batch_size or _batch_size(x_N.shape[1:], torch.device(device))
    model.to(device).eval()
    try:
        with torch.inference_mode():
            parts = [
                model(torch.from_numpy(batches(chosen[start : start + batch_size])).to(device)).float().cpu().numpy()
                for start in range(0, len(chosen), batch_size)
            ]
    finally:
        for module, training in modes:
            module.training = training
    return np.concatenate(parts)


def _batch_size(shape: Sequence[int], device: torch.device) -> int:
    numbers = _CPU_NUMBERS if device.type == "cpu" else _GPU_NUMBERS
    return max(1, min(64, numbers // math.prod(shape)))
