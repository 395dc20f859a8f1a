"""Attack success against epsilon, with the utility beside it: one table, from one command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.mechanism import planned
from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Training
from common.errors import DataError
from common.samples import Samples
from simulations.attacks.inversion import Rebuilt, invert, similarity, update_of, victim
from simulations.attacks.membership import Attacked, attack

DELTA = 1e-5
_SIZE = 28
_MEAN, _STD = 0.5, 0.25

Pictures = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled pictures in [0, 1], (N, rows, columns), one a patient."""

    name: str
    train_N: Pictures
    label_N: npt.NDArray[np.int64]
    test_N: Pictures
    test_label_N: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    epsilon: float | None
    """None: no privacy."""
    attacked: Attacked


def medmnist(path: Path) -> Images:
    """Raises DataError when the file is not of MedMNIST's layout with two classes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, KeyError, ValueError):
        raise DataError(f"{path.name} is no MedMNIST file; expected .npz with train_images, train_labels ...") from None
    train, test = (parts[f"{kind}_images"].astype(np.float32) / np.float32(255) for kind in ("train", "test"))
    if train.ndim != 3 or train.shape[1:] != (_SIZE, _SIZE) or set(np.unique(parts["train_labels"])) != {0, 1}:
        raise DataError(f"{path.name}: expected grey pictures of {_SIZE} x {_SIZE} with two classes")
    labels, test_labels = (parts[f"{kind}_labels"][:, 0].astype(np.int64) for kind in ("train", "test"))
    return Images(name=path.stem, train_N=train, label_N=labels, test_N=test, test_label_N=test_labels)


def phantoms(train: int = 1600, test: int = 400, seed: int = 0) -> Images:
    """Radiograph-like phantoms, drawn in memory."""
    from simulations.phantoms import pictures

    picture_N, label_N = pictures(train + test, _SIZE, seed)
    return Images(
        name="phantoms", train_N=picture_N[:train], label_N=label_N[:train], test_N=picture_N[train:],
        test_label_N=label_N[train:],
    )  # fmt: skip


def small_network(seed: int) -> nn.Module:
    """Two convolutions and a linear layer, 14,000 weights: hundreds of federations of it fit into minutes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (_SIZE // 4) ** 2, 2),
        )  # fmt: skip


def recipe_of(epsilon: float | None, **parts: object) -> Recipe:
    """A small network, trained long enough to learn by heart when nothing forbids it."""
    private = epsilon is not None
    given: dict[str, object] = {
        "name": "attack",
        "rounds": 5,
        "data": Preprocessing(size=(_SIZE, _SIZE), mean=_MEAN, std=_STD),
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
) -> tuple[tuple[Rebuilt, ...], ...]:
    """Rebuilds pictures from one update: undefended, out of a sum of sites, and noised.

    Args:
        patients: Training patients of the site, for its noise.
        together: Sites in the sum, one picture each.
        pictures: Which of the training pictures are attacked.

    Returns:
        One row a picture: no defence, secure aggregation, then each epsilon.
    """
    model = victim(_SIZE, seed)
    rows: list[tuple[Rebuilt, ...]] = []
    total = len(pictures) * (2 + sum(epsilon is not None for epsilon in epsilons))
    for n in pictures:
        found: list[Rebuilt] = []
        x = torch.from_numpy(images.train_N[n])[None, None]
        target = torch.from_numpy(images.label_N[n : n + 1])

        def tried(defence: str, update: Sequence[torch.Tensor], n: int = n, found: list[Rebuilt] = found) -> None:
            labels = torch.from_numpy(images.label_N[n : n + 1])
            image = invert(model, update, labels, _SIZE, iterations=iterations, seed=seed)[0, 0].numpy()
            psnr, ssim = similarity(images.train_N[n], image)
            found.append(
                Rebuilt(defence=defence, truth=images.train_N[n], image=image, psnr_db=psnr, ssim=ssim)
            )  # fmt: skip
            show("Gradient inversion", len(rows) * (total // len(pictures)) + len(found), total)

        tried("none", update_of(model, x, target, None))
        others = [(n + 1 + k) % len(images.train_N) for k in range(together - 1)]
        found.append(_from_sum(model, images, [n, *others], iterations, seed))
        for epsilon in epsilons:
            if epsilon is not None:
                recipe = replace(recipe_of(epsilon), training=replace(recipe_of(epsilon).training, batch_size=128))
                noise = planned(recipe, patients).noise_multiplier
                tried(f"epsilon {epsilon:g}", update_of(model, x, target, recipe, noise))
        rows.append(tuple(found))
    return tuple(rows)


def plain(rows: Sequence[Row], rebuilt: Sequence[Sequence[Rebuilt]]) -> dict[str, Any]:
    """Everything but the pictures, as JSON types."""
    return {
        "membership": [{"epsilon": row.epsilon, **asdict(row.attacked)} for row in rows],
        "inversion": [
            [{"defence": one.defence, "psnr_db": one.psnr_db, "ssim": one.ssim} for one in line] for line in rebuilt
        ],
    }


def table(rows: Sequence[Row], rebuilt: Sequence[Sequence[Rebuilt]]) -> str:
    """Markdown: attack success against epsilon, utility beside it; then what was rebuilt."""
    lines = []
    if rows:
        lines += [
            "| epsilon | test AUROC | LiRA, AUC | LiRA, TPR at 0.1 % FPR | loss threshold, AUC | TPR at 0.1 % FPR | "
            "one update (LiRA), AUC | TPR at 0.1 % FPR |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for row in rows:
        found = row.attacked
        name = "none" if row.epsilon is None else f"{row.epsilon:g}"
        cells = [
            cell for one in (found.lira, found.threshold, found.update)
            for cell in (
                f"{one.auroc:.3f} ± {one.auroc_sd:.3f}",
                f"{100 * one.tpr:.2f} % ({100 * one.tpr_low:.2f}-{100 * one.tpr_high:.2f})",
            )
        ]  # fmt: skip
        utility = f"{fmean(found.utility):.3f} ± {stdev(found.utility):.3f}"
        lines.append(f"| {name} | {utility} | {' | '.join(cells)} |")
    if rebuilt:
        lines += ["", "| gradient inversion | PSNR, dB | SSIM |", "|---|---|---|"]
        for n, one in enumerate(rebuilt[0]):
            same = [line[n] for line in rebuilt]
            psnr, ssim = fmean(each.psnr_db for each in same), fmean(each.ssim for each in same)
            lines.append(f"| {one.defence} | {psnr:.1f} | {ssim:.2f} |")
    return "\n".join(lines)


def _from_sum(model: torch.nn.Module, images: Images, chosen: Sequence[int], iterations: int, seed: int) -> Rebuilt:
    """The server knows the sum of the sites' updates alone; of the rebuilt pictures, the one most like the first's."""
    updates = []
    for n in chosen:
        x = torch.from_numpy(images.train_N[n])[None, None]
        updates.append(update_of(model, x, torch.from_numpy(images.label_N[n : n + 1]), None))
    total = [torch.stack(parts).mean(0) for parts in zip(*updates, strict=True)]
    labels = torch.from_numpy(images.label_N[list(chosen)])
    found = invert(model, total, labels, _SIZE, iterations=iterations, seed=seed)[:, 0].numpy()
    truth = images.train_N[chosen[0]]
    best = max(found, key=lambda image: similarity(truth, image)[1])
    psnr, ssim = similarity(truth, best)
    return Rebuilt(
        defence=f"secure aggregation of {len(chosen)} sites", truth=truth, image=best, psnr_db=psnr, ssim=ssim
    )  # fmt: skip


def _samples(picture_N: Pictures, label_N: npt.NDArray[np.int64]) -> Samples:
    x_N = ((picture_N - _MEAN) / _STD)[:, None].astype(np.float32)
    names = tuple(f"p{n}" for n in range(len(label_N)))
    return Samples(x_N, label_N, np.arange(len(label_N)), names, {}, "")
