"""Where the secret randomness of differential privacy comes from.

Noise that a recipe or a server could recompute can be subtracted again, so both safe sources start
from the operating system, at the site, afresh for every object.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from common.errors import PrivacyError

_BLOCK = 1 << 17  # numbers made at once: 1 MiB of keystream, so memory stays bounded and in cache
_MT19937_WORDS = slice(24, 24 + 8 * 624)  # of a CPU generator's state: 624 words of 32 bits, each in 8 bytes


class Noise(Protocol):
    """A stream of secret random numbers; no number is ever given twice."""

    @property
    def secret(self) -> bool:
        """False when somebody else can recompute the numbers."""
        ...

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Independent standard normal numbers of the shape, type and device of `like`."""
        ...

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Independent numbers, uniform in [0, 1)."""
        ...


def os_noise() -> Noise:
    """Torch's generators, their state filled by the operating system (`os.urandom`); fast, on CPU and GPU.

    On a CPU all 19,968 bits of the Mersenne Twister's state are drawn: `torch.Generator.manual_seed` keeps only
    32 bits of a seed, few enough to try them all. Where somebody may see much of the stream, use `keystream_noise`.
    """
    return _TorchNoise(None)


def keystream_noise() -> Noise:
    """A ChaCha20 keystream (RFC 8439) through the inverse normal distribution in float64.

    11 million numbers take about a second. Every block of 1 MiB has a key of its own from `os.urandom`, so no
    counter can wrap and nothing can repeat.
    """
    return _KeystreamNoise()


def seeded_noise(seed: int) -> Noise:
    """UNSAFE: noise that anybody who knows the seed can subtract; for simulations and golden tests alone.

    The numbers are made on the CPU, so they are equal on every device.
    """
    return _TorchNoise(seed)


class _TorchNoise:
    def __init__(self, seed: int | None) -> None:
        self.secret = seed is None
        self._generators: dict[torch.device, torch.Generator] = {}
        if seed is not None:
            self._generators[torch.device("cpu")] = torch.Generator().manual_seed(seed)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        device = like.device if self.secret else torch.device("cpu")
        values = torch.randn(like.shape, generator=self._generator(device), dtype=like.dtype, device=device)
        return values.to(like.device)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        generator = self._generator(torch.device("cpu"))
        return torch.rand(count, generator=generator, dtype=torch.float64).numpy()

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = _secret_generator(device)
        return self._generators[device]


class _KeystreamNoise:
    secret = True

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        values = torch.empty(like.numel(), dtype=like.dtype)
        for start in range(0, like.numel(), _BLOCK):
            part = values[start : start + _BLOCK]
            # Half a step up: 0 would become minus infinity, and the last one rounds to 1. The grid ends 8.2 standard
            # deviations out.
            uniform = torch.from_numpy(self.uniform(len(part))).add_(2.0**-54).clamp_(max=1 - 2.0**-53)
            part.copy_(torch.special.ndtri(uniform))
        return values.view(like.shape).to(like.device)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        values = np.empty(count, dtype=np.float64)
        for start in range(0, count, _BLOCK):
            part = values[start : start + _BLOCK]
            words = np.frombuffer(keystream(os.urandom(32), 8 * len(part)), dtype="<u8")
            np.multiply(words >> np.uint64(11), 2.0**-53, out=part)
        return values


def keystream(key: bytes, size: int) -> bytes:
    """The first bytes of the ChaCha20 keystream of a key that is used once (nonce and counter 0)."""
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(size))


def _secret_generator(device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if device.type != "cpu":
        # Philox keeps all 64 bits of its seed.
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    state = generator.manual_seed(0).get_state()
    before = state.clone()
    words = state.numpy()[_MT19937_WORDS].view("<u8")
    words[:] = np.frombuffer(os.urandom(4 * len(words)), dtype="<u4")
    generator.set_state(state)
    if torch.equal(generator.get_state()[_MT19937_WORDS], before[_MT19937_WORDS]):
        raise PrivacyError(
            "this version of torch keeps its generator's state elsewhere, so the noise would be guessable; "
            "set privacy.secure_rng=true or install the version in the lock file"
        )
    return generator
