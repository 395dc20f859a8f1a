"""What does a patient's image look like? Rebuilt from one update.

The attacker knows the network, its weights and the label, and looks for the image whose gradient points the same way.
The network is small and smooth, at its random start, and the update is one step on one image: the easiest case there
is. A demonstration of what the defences are for, not a bound.

Source: Geiping et al. 2020, "Inverting Gradients" (NeurIPS): cosine distance and total variation. The network is that
of Zhu et al. 2019, "Deep Leakage from Gradients".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import nn

from client import train as work
from client.dp import Sampling
from common.config import Recipe
from common.fixed import FixedPoint, fewest
from common.identity import Signer
from common.secagg import Aggregator, Member, Subject
from common.weights import Weights

_LIMIT = 100.0
"""Of an update's norm in a secure sum, as docs/secure-aggregation.md proposes."""

Picture = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """The attacker's best image beside the truth; both in [0, 1], (rows, columns)."""

    defence: str
    truth: Picture
    image: Picture
    psnr_db: float
    ssim: float
    """Structural similarity (Wang et al. 2004); 1 is the same picture."""


class SmoothNet(nn.Module):
    """LeNet with sigmoids, as in Zhu et al. 2019; (B, 1, n, n) -> (B, classes)."""

    def __init__(self, size: int, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(),
        )  # fmt: skip
        self.head = nn.Linear(12 * math.ceil(size / 4) ** 2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x).flatten(1))
        return out


def victim(size: int, seed: int) -> SmoothNet:
    """The network before its first round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmoothNet(size)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def update_of(
    model: nn.Module, x_B: torch.Tensor, target_B: torch.Tensor, recipe: Recipe | None, noise_multiplier: float = 0.0
) -> list[torch.Tensor]:
    """The gradient that one site's step reveals: the mean, or the engine's private one when a recipe is given."""
    parameters = list(model.parameters())
    if recipe is None:
        losses = functional.cross_entropy(model(x_B), target_B)
        return [g.detach() for g in torch.autograd.grad(losses, parameters)]
    private = work.Private(
        sampling=Sampling(rate=1.0, steps=1), noise_multiplier=noise_multiplier,
        noise=work.site_noise(recipe, 1, "victim"),
    )  # fmt: skip
    work.private_gradient(model, work.record_loss(recipe), recipe, private).step(x_B, target_B)
    found = []
    for parameter in parameters:
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def secure_sum(updates: Sequence[Sequence[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the coordinator gets of several sites' updates under secure aggregation, by the protocol itself.

    Returns:
        The first site's masked update, read as the numbers that it would be without a mask, and the mean of all.
    """
    sites = [f"site{number:02d}" for number in range(len(updates))]
    signers = {site: Signer.temporary() for site in sites}
    keys = {site: signer.public for site, signer in signers.items()}
    subject = Subject(recipe_id="a" * 64, round=1, base="b" * 64)
    threshold, point = fewest(len(sites)), FixedPoint(sites=len(sites), limit=_LIMIT)
    members = {
        site: Member(site, subject, signer=signers[site], keys=keys, sites=len(sites), threshold=threshold)
        for site in sites
    }
    offers = {site: member.offer for site, member in members.items()}
    deltas = {
        site: Weights({f"{n:04d}": part.numpy() for n, part in enumerate(update)})
        for site, update in zip(sites, updates, strict=True)
    }
    server = Aggregator(subject, offers, threshold=threshold, numbers=deltas[sites[0]].size + 1)
    session = server.session
    for site, member in members.items():
        server.deal(site, *member.deal(offers))
    boxes = server.boxes()
    seen = {site: member.mask(session, boxes[site], point.encode(deltas[site], 1)) for site, member in members.items()}
    for site, masked in seen.items():
        server.add(site, session, masked)
    signatures = {site: member.agree(session, server.masked) for site, member in members.items()}
    for site, signature in signatures.items():
        server.sign(site, session, signature)
    for site, member in members.items():
        server.open(site, session, *member.open(session, server.masked, signatures))
    shapes = {name: array.shape for name, array in deltas[sites[0]].items()}
    mean, _ = point.decode(server.total(), len(sites), shapes)
    flat = torch.from_numpy(seen[sites[0]].words[:-1].view(np.int32) * np.float32(2.0**-point.bits))
    masked_parts = flat.split([part.numel() for part in updates[0]])
    return (
        [numbers.reshape(part.shape) for numbers, part in zip(masked_parts, updates[0], strict=True)],
        [torch.from_numpy(np.array(mean[name])) for name in shapes],
    )


def invert(
    model: nn.Module,
    update: Sequence[torch.Tensor],
    target_B: torch.Tensor,
    size: int,
    *,
    iterations: int = 400,
    restarts: int = 2,
    variation: float = 1e-3,
    seed: int = 0,
) -> torch.Tensor:
    """The image in [0, 1] whose gradient is closest in direction, of several random starts.

    Args:
        model: At the weights that the update started from.
        update: Its gradient, in the order of the parameters.
        target_B: The labels, which the attacker knows.
        size: Rows and columns.
        iterations: Steps of Adam for each start.
        variation: Weight of the total variation.
    """
    parameters = list(model.parameters())
    wanted = torch.cat([g.flatten() for g in update])
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, torch.Tensor] = (math.inf, torch.zeros(1))
    for _ in range(restarts):
        x = torch.rand((len(target_B), 1, size, size), generator=generator).requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, eta_min=1e-3)
        cosine = torch.zeros(())
        for _ in range(iterations):
            optimiser.zero_grad()
            losses = functional.cross_entropy(model(x), target_B)
            found = torch.cat([g.flatten() for g in torch.autograd.grad(losses, parameters, create_graph=True)])
            cosine = 1 - functional.cosine_similarity(found, wanted, dim=0)
            (x.grad,) = torch.autograd.grad(cosine + variation * _total_variation(x), [x])
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        best = min(best, (float(cosine.detach()), x.detach()), key=lambda found: found[0])
    return best[1]


def similarity(truth: Picture, image: Picture) -> tuple[float, float]:
    """Peak signal-to-noise ratio (dB) and structural similarity, by MONAI, of two pictures in [0, 1]."""
    from common.monai_shim import ensure_light_monai

    ensure_light_monai()
    from monai.metrics.regression import PSNRMetric, SSIMMetric

    a, b = (torch.from_numpy(np.ascontiguousarray(part))[None, None] for part in (image, truth))
    psnr = PSNRMetric(max_val=1.0)(a, b)
    ssim = SSIMMetric(spatial_dims=2, data_range=1.0)(a, b)
    assert isinstance(psnr, torch.Tensor)
    assert isinstance(ssim, torch.Tensor)
    return float(psnr), float(ssim)


def _total_variation(x: torch.Tensor) -> torch.Tensor:
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
