"""Patient-level differential privacy of local training (DP-SGD, Abadi et al. 2016)."""

from client.dp.engine import PrivateGradient
from client.dp.noise import Noise, keystream_noise, os_noise, seeded_noise
from client.dp.rules import Sampling, check_delta, poisson_patients, sampling

__all__ = [
    "Noise",
    "PrivateGradient",
    "Sampling",
    "check_delta",
    "keystream_noise",
    "os_noise",
    "poisson_patients",
    "sampling",
    "seeded_noise",
]
