"""A round's work at a site: from the global weights to the change that local training makes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import nn

from client.cohort import Cohort
from client.dp import Noise, PrivateGradient, Sampling, keystream_noise, os_noise, poisson_patients, seeded_noise
from client.dp.bookkeeping import trainable
from common.compute import fused
from common.config import Recipe, Training
from common.errors import ConfigError, DivergedError
from common.imaging import augmentation
from common.models import change_of, parameter_groups, set_weights
from common.scattering import ScatteringClassifier
from common.shard import Batches
from common.weights import Weights

if TYPE_CHECKING:
    from client.parallel import Team

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Private:
    """What a private round needs beside the recipe; all of it the site's own."""

    sampling: Sampling
    noise_multiplier: float
    noise: Noise
    clip_norm: float | None = None
    """Where an adaptive clip norm goes on from; None starts at the recipe's."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The outcome of one round at one site."""

    delta: Weights
    """Trained minus incoming weights."""
    steps: int
    loss: float | None
    """Mean training loss; None under privacy, where it would leak."""
    clip_norm: float | None = None
    """After the last step; None without privacy."""


class Trainer(Protocol):
    """`train` for a site whose network, recipe and device are known."""

    def __call__(
        self, weights: Weights, cohort: Cohort, *, round_: int, site: str, private: Private | None
    ) -> Trained: ...


def train(
    model: nn.Module,
    weights: Weights,
    cohort: Cohort,
    recipe: Recipe,
    *,
    round_: int,
    site: str,
    device: torch.device,
    private: Private | None = None,
    team: Team | None = None,
) -> Trained:
    """Trains `model` from `weights` for one round on the cohort's training patients.

    Without privacy an epoch takes every training sample once, in batches of near-equal size. Under
    privacy each step takes a Poisson sample of the patients and `privacy.views` random samples of each. The proximal
    term, weight decay and momentum act on the gradient after noise.

    Given recipe, round, site and weights the result on a CPU is the same to the bit, unless noise is secret; then so is
    all else that is drawn.

    Args:
        model: Of `common.models.build`; overwritten.
        round_: 1 for the first; places the round in the schedule of the whole federation.
        site: Part of the seed, so that sites shuffle differently.
        team: Other processes that share each batch; None: this one alone.

    Raises:
        DivergedError: The weights became NaN or infinite.
    """
    weighted = _weighted(recipe, cohort)
    loss_B = record_loss(weighted)
    # A team's processes exchange their weights and images as plain arrays.
    order: Any = memory_format(recipe) if team is None else torch.preserve_format
    if order is not torch.preserve_format or next(model.parameters()).device != device:
        model.to(device, memory_format=order)  # type: ignore[call-overload]
    if not all(module.training for module in model.modules()):  # else it is said to every module once more
        model.train()
    trained = set_weights(model, weights)
    if team is not None and private is None and mixes(model):
        raise ConfigError(
            "devices in site.yaml names several, and the recipe's network has batch norms, which would each see a part "
            "of the batch; train on one device, or ask for a recipe with model.norm=group"
        )
    anchor = [value.detach().clone() for value in trainable(model).values()] if recipe.training.proximal_mu else []
    optimiser = optimiser_of(parameter_groups(model, recipe.training), recipe.training)
    course = Course(model, cohort, recipe, round_=round_, site=site, device=device, private=private, order=order)
    engine = private_gradient(model, loss_B, recipe, private) if private is not None else None
    losses: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed(course.dropout_seed, device)
        if team is not None:
            team.begin(model, weighted, course.team_seed)
        for x_B, target_B, lr in course:
            for group in optimiser.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimiser.zero_grad()
            if engine is not None:
                team.private_step(engine, x_B, target_B) if team else engine.step(x_B, target_B)
            elif team is not None:
                losses.append(team.plain_step(model, loss_B, x_B, target_B, recipe))
            else:
                losses.append(mean_gradient(model, loss_B, x_B, target_B, recipe.training, of=len(x_B)))
            _finish_gradient(model, anchor, recipe.training)
            optimiser.step()
    loss = torch.stack(losses) if losses else None
    return outcome(change_of(trained, weights), course, loss, engine.clip_norm if engine else None)


class Course:
    """One round at one site, step by step: the samples of each step, changed as the recipe says, and its learning rate.

    Everything is drawn in one order, so a course is walked once.

    Under privacy all that is drawn must be as secret as the noise: with a seed that others know, one patient more would
    give every later one other images, other changes and another dropout, and the noise covers one patient's gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        cohort: Cohort,
        recipe: Recipe,
        *,
        round_: int,
        site: str,
        device: torch.device,
        private: Private | None = None,
        order: torch.memory_format = torch.preserve_format,
    ) -> None:
        """Plans the round; the arguments are those of `train`.

        Args:
            model: In training mode; batch norms decide how small a batch may be.
            order: How the images lie in memory.
        """
        secret = private is not None and private.noise.secret
        rng = np.random.default_rng(None if secret else seed_of("train", recipe, round_, site))  # None: os.urandom
        self.round, self._recipe, self._cohort, self._device, self._order = round_, recipe, cohort, device, order
        self._augment = augmentation(recipe.data, recipe.task.laterality_sensitive, seed=int(rng.integers(2**63)))
        self.dropout_seed = int(rng.integers(2**63))
        self.team_seed = self.dropout_seed if secret else seed_of("dropout of the others", recipe, round_, site)
        """Of dropout in the other processes of a team, which each add their own number to it."""
        if private is None:
            self.steps, self._batches = _epochs(cohort, recipe.training, rng, at_least=2 if mixes(model) else 1)
        else:
            self.steps = private.sampling.steps
            self._batches = private_batches(cohort, private, rng, recipe.privacy.views)
        # Where the first layers never change and the images neither, the batches are cut from what those layers give.
        fixed = self._augment is None and isinstance(model, ScatteringClassifier)
        self._x_N = cohort.scattered if fixed else cohort.samples.x_N

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Images (B, C, ...) and targets of a step, on the device and overwritten by the next one's; learning rate."""
        recipe, samples = self._recipe, Batches(self._x_N)
        for step, index_B in enumerate(self._batches):
            x_B, target_B = _batch(self._cohort, samples, index_B, self._device)
            if x_B.dim() == 2 + recipe.task.dimensions:  # not the fixed features
                x_B = x_B.to(memory_format=self._order)
            if self._augment is not None and len(index_B):
                x_B = self._augment(x_B)
            progress = (self.round - 1 + step / self.steps) / recipe.rounds
            yield x_B, target_B, recipe.training.lr * rate(recipe.training, progress, recipe.rounds)


def outcome(delta: Weights, course: Course, losses: torch.Tensor | None, clip_norm: float | None) -> Trained:
    """What a course came to.

    Args:
        losses: Of each step; None under privacy.

    Raises:
        DivergedError: The weights are not finite.
    """
    if not delta.finite:
        raise DivergedError(
            f"round {course.round}: the trained weights are not finite after {course.steps} steps; lower training.lr "
            "or set training.gradient_clip"
        )
    loss = float(losses.double().mean()) if losses is not None else None
    return Trained(delta=delta, steps=course.steps, loss=loss, clip_norm=clip_norm)


# What a private round is made of; `client.mechanism` tests these very functions.


def site_noise(recipe: Recipe, round_: int, site: str) -> Noise:
    """A fresh source of noise for one round: the site's own secret, unless the recipe is a simulation's seeded one."""
    if recipe.privacy.unsafe_seeded_noise:
        return seeded_noise(seed_of("noise", recipe, round_, site))
    return keystream_noise() if recipe.privacy.secure_rng else os_noise()


def private_gradient(model: nn.Module, loss_B: Loss, recipe: Recipe, private: Private) -> PrivateGradient:
    """The engine that the recipe asks for, over `model`."""
    return PrivateGradient(
        model,
        loss_B,
        clip_norm=private.clip_norm or recipe.privacy.clip_norm,
        noise_multiplier=private.noise_multiplier,
        expected_batch=recipe.training.batch_size,
        physical_batch=recipe.privacy.physical_batch,
        noise=private.noise,
        views=recipe.privacy.views,
        clip_quantile=recipe.privacy.clip_quantile,
        low=lowered(recipe.training, next(model.parameters()).device),
    )


def private_batches(
    cohort: Cohort, private: Private, rng: np.random.Generator, views: int = 1
) -> Iterator[npt.NDArray[np.int64]]:
    """Samples of every step of a round: each training patient with chance `sampling.rate`, `views` samples of each.

    Args:
        rng: Chooses among the samples of a drawn patient; who is drawn comes from the site's secret source.
        views: The samples of a patient lie together: different ones as long as there are some, then the same again.
    """
    indices = cohort.indices("train")
    patient_n = cohort.samples.patient_N[indices]
    indices = indices[np.argsort(patient_n, kind="stable")]
    _, starts, counts = np.unique(np.sort(patient_n), return_index=True, return_counts=True)
    of_patient = np.split(indices, starts[1:])
    for _ in range(private.sampling.steps):
        drawn = poisson_patients(len(of_patient), private.sampling.rate, private.noise)
        if views == 1:
            yield indices[starts[drawn] + rng.integers(counts[drawn])]
        else:
            parts = [np.resize(rng.permutation(of_patient[patient]), views) for patient in drawn]
            yield np.array(parts, dtype=np.int64).reshape(-1)


def seed_of(purpose: str, recipe: Recipe, round_: int, site: str) -> int:
    """A seed below 2^63 of its own for every purpose, recipe seed, round and site."""
    text = f"{purpose}/{recipe.seed}/{round_}/{site}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def rate(training: Training, progress: float, rounds: int) -> float:
    """Factor on the learning rate at `progress` in [0, 1] of the whole federation.

    Linear warm-up, then a cosine from 1 to `min_lr_fraction`, warmly restarted (SGDR, Loshchilov and Hutter 2017).
    """
    warmup = min(training.warmup_rounds / rounds, 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if training.schedule == "constant":
        return 1.0
    rest = (progress - warmup) / max(1 - warmup, 1e-12) * (training.restarts + 1)
    phase = rest % 1.0 if rest < training.restarts + 1 else 1.0
    low = training.min_lr_fraction
    return low + (1 - low) * (1 + math.cos(math.pi * phase)) / 2


def _weighted(recipe: Recipe, cohort: Cohort) -> Recipe:
    """The recipe with class weights in numbers."""
    if recipe.training.class_weights != "balanced":
        return recipe
    counts = _counts(cohort, recipe.task.outputs)
    # Of many labels, one that nobody here has is in every loss; as the rarest of all it would drown the others.
    weights_C = np.where(counts > 0, counts.sum() / (len(counts) * np.maximum(counts, 1)), 1.0)
    return replace(recipe, training=replace(recipe.training, class_weights=tuple(weights_C.tolist())))


def lowered(training: Training, device: torch.device) -> torch.dtype | None:
    """What layers compute in under autocast; None: float32 throughout."""
    low = training.precision == "bfloat16" or (training.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else None


def memory_format(recipe: Recipe) -> torch.memory_format:
    """How images and weights lie in memory."""
    if recipe.training.memory_format == "contiguous":
        return torch.preserve_format
    return torch.channels_last if recipe.task.dimensions == 2 else torch.channels_last_3d


def record_loss(recipe: Recipe, cohort: Cohort | None = None) -> Loss:
    """(logits (B, classes), targets) -> one loss a record (B,); no record looks at another.

    Focal loss of Lin et al. 2017; label smoothing of Szegedy et al. 2016. Class weights multiply
    the loss and are not normalised over the batch, which would couple records.

    Args:
        cohort: Counted when `class_weights` is `balanced`: samples / (classes x samples of the class), as scikit-learn;
            1 for a class that is not there.
    """
    weight_C = class_weights(recipe, cohort)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return losses_of(recipe, logits, target, weight_C)

    return loss


def class_weights(recipe: Recipe, cohort: Cohort | None = None) -> torch.Tensor | None:
    """(classes,) factors on the loss, those of this cohort where they are to balance it; None for none."""
    weights = (recipe if cohort is None else _weighted(recipe, cohort)).training.class_weights
    assert weights != "balanced"
    return torch.tensor(weights) if weights is not None else None


def losses_of(
    recipe: Recipe, logits: torch.Tensor, target: torch.Tensor, weight_C: torch.Tensor | None
) -> torch.Tensor:
    """`record_loss` with these class weights; (B,)."""
    training = recipe.training
    gamma = training.focal_gamma if training.loss == "focal" else 0.0
    class_weight = weight_C.to(logits) if weight_C is not None else None
    if recipe.task.kind == "multilabel":
        entropy_BC = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if gamma:
            entropy_BC = entropy_BC * _focus(1 - torch.exp(-entropy_BC), gamma)
        if class_weight is not None:
            entropy_BC = entropy_BC * class_weight
        return entropy_BC.mean(dim=1)
    entropy_B = functional.cross_entropy(logits, target, reduction="none", label_smoothing=training.label_smoothing)
    if gamma:
        true_B = torch.softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
        entropy_B = entropy_B * _focus(1 - true_B, gamma)
    return entropy_B if class_weight is None else entropy_B * class_weight[target]


def _focus(missing: torch.Tensor, gamma: float) -> torch.Tensor:
    """Focal loss' factor: what is missing to certainty, to the power of gamma."""
    # Of 0, which is where float32 rounds a sure prediction to, a power below 1 has an infinite slope.
    return missing.clamp(min=torch.finfo(missing.dtype).tiny) ** gamma


def steps_of(images: int, training: Training, *, at_least: int) -> tuple[int, int]:
    """Steps of a round without privacy, which are whole and never none, and of one pass over so many images.

    Args:
        at_least: Images of a step, as far as there are so many.
    """
    per_epoch = max(1, min(math.ceil(images / training.batch_size), images // at_least))
    return max(1, round(training.local_epochs * per_epoch)), per_epoch


def _epochs(
    cohort: Cohort, training: Training, rng: np.random.Generator, *, at_least: int
) -> tuple[int, Iterator[npt.NDArray[np.int64]]]:
    indices = cohort.indices("train")
    steps, per_epoch = steps_of(len(indices), training, at_least=at_least)

    def batches() -> Iterator[npt.NDArray[np.int64]]:
        done = 0
        while done < steps:
            # near-equal parts of `at_least` samples: a batch of one would break batch norm
            for part in np.array_split(rng.permutation(indices), per_epoch)[: steps - done]:
                done += 1
                yield part

    return steps, batches()


def _batch(
    cohort: Cohort, samples: Batches, index_B: npt.NDArray[np.int64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    x_B = torch.from_numpy(samples(index_B))  # overwritten by the next step's
    target_B = torch.from_numpy(np.ascontiguousarray(cohort.samples.targets_N[index_B]))
    if device.type == "cuda":
        x_B, target_B = x_B.pin_memory(), target_B.pin_memory()
    return x_B.to(device, non_blocking=True), target_B.to(device, non_blocking=True)


def optimiser_of(groups: list[dict[str, Any]], training: Training) -> torch.optim.Optimizer:
    """The recipe's optimiser over `common.models.parameter_groups`."""
    if training.optimizer == "adamw":
        return fused(torch.optim.AdamW)(groups, lr=training.lr)
    return fused(torch.optim.SGD)(groups, lr=training.lr, momentum=training.momentum)


def mean_gradient(
    model: nn.Module, loss_B: Loss, x_B: torch.Tensor, target_B: torch.Tensor, training: Training, *, of: int
) -> torch.Tensor:
    """Adds to `.grad` what these records give to the gradient of the mean loss over `of` records; gives their share
    of that loss."""
    if not len(x_B):
        return x_B.new_zeros(())
    low = lowered(training, x_B.device)
    with torch.autocast(x_B.device.type, dtype=low, enabled=low is not None):
        logits = model(x_B)
    loss = loss_B(logits.float(), target_B).mean()
    if len(x_B) != of:
        loss = loss * (len(x_B) / of)
    loss.backward()
    return loss.detach()  # a float here would make a GPU wait at every step


def _finish_gradient(model: nn.Module, anchor: list[torch.Tensor], training: Training) -> None:
    if not anchor and training.gradient_clip is None:
        return
    parameters = list(trainable(model).values())
    with torch.no_grad():
        for parameter, start in zip(parameters, anchor, strict=bool(anchor)):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=training.proximal_mu)
    if training.gradient_clip is not None:
        nn.utils.clip_grad_norm_(parameters, training.gradient_clip)


def _seed(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: it seeds every kind of device that there may be, and notes the stack for each that waits.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def mixes(model: nn.Module) -> bool:
    """Whether some layer takes its statistics from the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules())


def _counts(cohort: Cohort, classes: int) -> npt.NDArray[np.int64]:
    targets = cohort.samples.targets_N[cohort.indices("train")]
    if targets.ndim == 1:
        counts: npt.NDArray[np.int64] = np.bincount(targets.astype(np.int64), minlength=classes).astype(np.int64)
    else:
        counts = targets.sum(axis=0).astype(np.int64)
    return counts
