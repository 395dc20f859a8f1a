"""A model's outputs for prepared samples, as sites and the coordinator both compute them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.shard import Batches


def logits(
    model: nn.Module,
    x_N: npt.NDArray[np.float32],
    indices: Sequence[int] | npt.NDArray[np.integer],
    *,
    device: torch.device | str,
    batch_size: int = 64,
) -> npt.NDArray[np.float32]:
    """The model's outputs before softmax or sigmoid, in evaluation mode and without gradients.

    Args:
        model: Left in the modes (of every module) in which it came, and on `device`.
        x_N: Samples (N, 1, *size), possibly memory-mapped: one batch is copied at a time.
        indices: Which samples, in which order; the result keeps it.

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
    batches = Batches(x_N)
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
