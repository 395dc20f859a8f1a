"""Attack success against epsilon, with the utility beside it: one table, from one command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.mechanism import planned
from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Training
from common.samples import Samples
from simulations.attacks.images import MEAN, SIZE, STD, Images, Pictures
from simulations.attacks.inversion import Rebuilt, invert, secure_sum, similarity, update_of, victim
from simulations.attacks.membership import Attacked, Success, attack

DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    epsilon: float | None
    """None: no privacy."""
    attacked: Attacked

    @property
    def named(self) -> tuple[str, str]:
        """Epsilon and utility, as they are shown."""
        name = "none" if self.epsilon is None else f"{self.epsilon:g}"
        return name, f"{fmean(self.attacked.utility):.3f} ± {stdev(self.attacked.utility):.3f}"

    @property
    def attacks(self) -> tuple[tuple[str, tuple[Success, Success]], ...]:
        """What is attacked; by LiRA, and by the loss threshold."""
        found = self.attacked
        return (
            ("the global model", (found.lira, found.threshold)),
            ("one site's update", (found.update, found.update_threshold)),
        )


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What was rebuilt of one kind of images."""

    images: str
    rows: tuple[tuple[Rebuilt, ...], ...]
    """A row for each picture, with the same defences in each."""

    @property
    def defences(self) -> tuple[str, ...]:
        return tuple(one.defence for one in self.rows[0])

    def likeness(self, defence: int) -> tuple[str, str]:
        """PSNR and SSIM over the pictures, as they are shown."""
        psnr, ssim = ([getattr(line[defence], name) for line in self.rows] for name in ("psnr_db", "ssim"))
        return f"{fmean(psnr):.1f}", f"{round(fmean(ssim), 2) + 0.0:.2f}" + (
            f" ± {stdev(ssim):.2f}" if len(ssim) > 1 else ""
        )


def small_network(seed: int) -> nn.Module:
    """Two convolutions and a linear layer, 14,000 weights: hundreds of federations of it fit into minutes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, 2),
        )  # fmt: skip


def recipe_of(epsilon: float | None, **parts: object) -> Recipe:
    """A small network, trained long enough to learn by heart when nothing forbids it."""
    private = epsilon is not None
    given: dict[str, object] = {
        "name": "attack",
        "rounds": 5,
        "data": Preprocessing(size=(SIZE, SIZE), mean=MEAN, std=STD),
        "model": ModelConfig(family="monai", name="resnet10", width=0.0625, norm="group"),
        "training": (
            Training(local_epochs=6.0, batch_size=128, optimizer="sgd", lr=0.5, weight_decay=0.0)
            if private
            else Training(local_epochs=20.0, batch_size=16, lr=3e-3, weight_decay=0.0)
        ),
        "privacy": Privacy(mechanism="dp_sgd", epsilon=epsilon, delta=DELTA, clip_norm=0.5) if private else Privacy(),
    }  # fmt: skip
    return Recipe(**(given | parts))  # type: ignore[arg-type]


def membership(
    images: Images,
    epsilons: Sequence[float | None],
    *,
    patients: int,
    models: int,
    sites: int,
    seed: int = 0,
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Row, ...]:
    """Attacks federations at each epsilon; the same patients, halves and first weights for all of them."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images.train_N))[:patients])
    pool = _samples(images.train_N[chosen], images.label_N[chosen])
    test = _samples(images.test_N, images.test_label_N)
    rows = []
    for epsilon in epsilons:
        name = "no privacy" if epsilon is None else f"epsilon {epsilon:g}"

        def done(count: int, name: str = name) -> None:
            show(f"Membership, {name}", count, models)

        found = attack(
            recipe_of(epsilon, seed=seed), pool, test, models=models, sites=sites, seed=seed,
            network=lambda: small_network(seed), done=done,
        )  # fmt: skip
        rows.append(Row(epsilon=epsilon, attacked=found))
    return tuple(rows)


def inversion(
    images: Images,
    epsilons: Sequence[float | None],
    *,
    patients: int = 400,
    together: int = 5,
    pictures: Sequence[int] = (0, 1),
    iterations: int = 400,
    seed: int = 0,
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Gallery:
    """Rebuilds pictures from one update: undefended, under masks, out of a sum of sites, and noised.

    Args:
        patients: Training patients of the site, for its noise.
        together: Sites in the sum, one picture each.
        pictures: Which of the training pictures are attacked.

    Returns:
        One row a picture: no defence, what secure aggregation shows of one site and of all, then each epsilon.
    """
    model = victim(SIZE, seed)
    noises = {
        f"epsilon {epsilon:g}": (recipe_of(epsilon), planned(recipe_of(epsilon), patients).noise_multiplier)
        for epsilon in epsilons
        if epsilon is not None
    }
    rows: list[tuple[Rebuilt, ...]] = []
    for n in pictures:
        chosen = [(n + k) % len(images.train_N) for k in range(together)]
        x_N = torch.from_numpy(images.train_N[chosen])[:, None]
        label_N = torch.from_numpy(images.label_N[chosen])
        plain_N = [update_of(model, x_N[k : k + 1], label_N[k : k + 1], None) for k in range(together)]
        masked, mean = secure_sum(plain_N)
        seen = {
            "none": (plain_N[0], 1),
            "secure aggregation, the masked bytes of one site": (masked, 1),
            f"secure aggregation, the sum of {together} sites": (mean, together),
        }
        for name, (recipe, noise) in noises.items():
            seen[name] = (update_of(model, x_N[:1], label_N[:1], recipe, noise), 1)
        found: list[Rebuilt] = []
        for defence, (update, sites) in seen.items():
            image_N = invert(model, update, label_N[:sites], SIZE, iterations=iterations, seed=seed)[:, 0].numpy()
            # of the pictures in a sum, the one most like the first site's
            likeness = [similarity(images.train_N[n], image) for image in image_N]
            best = max(range(sites), key=lambda k, likeness=likeness: likeness[k][1])  # type: ignore[misc]
            found.append(
                Rebuilt(
                    defence=defence, truth=images.train_N[n], image=image_N[best], psnr_db=likeness[best][0],
                    ssim=likeness[best][1],
                )
            )  # fmt: skip
            show(f"Gradient inversion, {images.name}", len(rows) * len(seen) + len(found), len(pictures) * len(seen))
        rows.append(tuple(found))
    return Gallery(images=images.name, rows=tuple(rows))


def plain(rows: Sequence[Row], galleries: Sequence[Gallery]) -> dict[str, Any]:
    """Everything but the pictures, as JSON types."""
    return {
        "membership": [{"epsilon": row.epsilon, **asdict(row.attacked)} for row in rows],
        "inversion": {
            gallery.images: [
                [{"defence": one.defence, "psnr_db": one.psnr_db, "ssim": one.ssim} for one in line]
                for line in gallery.rows
            ]
            for gallery in galleries
        },
    }


def table(rows: Sequence[Row], galleries: Sequence[Gallery]) -> str:
    """Markdown: attack success against epsilon, utility beside it; then what was rebuilt."""
    lines = []
    if rows:
        lines += [
            "| epsilon | test AUROC | attacked | LiRA, AUC | LiRA, TPR at 0.1 % FPR | loss threshold, AUC | "
            "loss threshold, TPR at 0.1 % FPR |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in rows:
        name, utility = row.named
        for what, attacks in row.attacks:
            cells = [cell for one in attacks for cell in (one.area, one.rate)]
            lines.append(f"| {name} | {utility} | {what} | {' | '.join(cells)} |")
    if galleries:
        head = " | ".join(f"{gallery.images}, PSNR, dB | SSIM" for gallery in galleries)
        lines += ["", f"| gradient inversion | {head} |", "|---" * (1 + 2 * len(galleries)) + "|"]
        for n, defence in enumerate(galleries[0].defences):
            cells = [" | ".join(gallery.likeness(n)) for gallery in galleries]
            lines.append(f"| {defence} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _samples(picture_N: Pictures, label_N: npt.NDArray[np.int64]) -> Samples:
    x_N = ((picture_N - MEAN) / STD)[:, None].astype(np.float32)
    names = tuple(f"p{n}" for n in range(len(label_N)))
    return Samples(x_N, label_N, np.arange(len(label_N)), names, {}, "")
