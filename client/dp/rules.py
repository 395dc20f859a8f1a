"""What must hold around the noise, or its epsilon means nothing: who is drawn, how often, and through which layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from client.dp.noise import Noise
from common.errors import PrivacyError

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # every batch norm is one, SyncBatchNorm and timm's included
_INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a round draws its patients."""

    rate: float
    """Chance of each patient to be in a step."""
    steps: int
    """Noised steps of the round, empty batches included."""


def sampling(patients: int, batch_size: int, local_epochs: float) -> Sampling:
    """Poisson sampling that takes `batch_size` patients a step on average and `local_epochs` passes a round.

    The number of steps is epochs x patients / batch, rounded up; account these very steps and this very rate
    (`int(1 / rate)` loses a step). A site smaller than the batch takes everyone in every step; the sum is
    still divided by the public `batch_size`.

    Raises:
        PrivacyError: There is no patient to draw.
    """
    if patients < 1:
        raise PrivacyError("no training patients: got 0, expected at least 1; nothing to train on is a refusal")
    rate = min(1.0, batch_size / patients)
    # 1e-9: 3 epochs x 10 patients / batch 10 must not become 4 through rounding
    return Sampling(rate=rate, steps=max(1, math.ceil(local_epochs / rate - 1e-9)))


def check_delta(delta: float, patients: int) -> None:
    """Raises PrivacyError unless `delta` is below 1 / `patients`.

    From there on it would allow to publish a whole patient.
    """
    if not 0 < delta < 1 / max(1, patients):
        raise PrivacyError(
            # The number itself is private: it would tell the count.
            f"delta: got {delta:g}, expected less than 1 / (training patients of this site); choose a smaller one"
        )


def poisson_patients(count: int, rate: float, noise: Noise) -> npt.NDArray[np.int64]:
    """Draws every patient independently with chance `rate`.

    Who was drawn must stay as secret as the noise, so both come from the same source.

    Args:
        count: Patients to draw from.
        rate: In [0, 1].
        noise: The site's secret source.

    Returns:
        Sorted indices of the drawn patients, int64; may be empty.

    Source: the sampling that `common.accounting.Event` assumes (Abadi et al. 2016; Mironov et al. 2019).
    """
    return np.flatnonzero(noise.uniform(count) < rate).astype(np.int64)


def settle_norms(model: nn.Module) -> None:
    """Puts frozen batch norms into `eval()`, so that they neither mix patients nor learn their statistics.

    Raises:
        PrivacyError: A layer mixes the patients of a batch, or keeps statistics of them; named.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
            if module.training or module.running_mean is None:
                raise PrivacyError(
                    f"layer {name or 'model'!r} is a batch norm in training mode and mixes the patients of a batch; "
                    "use group norm (model.norm=group) or freeze it"
                )
        elif isinstance(module, _INSTANCE_NORMS) and module.track_running_stats and module.training:
            raise PrivacyError(
                f"layer {name or 'model'!r} keeps running statistics of its patients, without noise; "
                "set track_running_stats=False"
            )
