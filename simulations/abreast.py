"""Virtual sites that train side by side: one pass over stacked weights does a step of each of them.

A step of a small network leaves a GPU idle between its hundreds of small operations, and a CPU busy with Python. Here
`torch.func.vmap` does each operation once for all sites. The draws, steps and updates are those of `client.train`, so
what comes out agrees with one site after another to float32's rounding, which this module checks before it is used,
and it is used only where it was measured to be faster.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Condition, Lock
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from client.cohort import Cohort
from client.dp import PrivateGradient, seeded_noise
from client.dp.bookkeeping import clip_factors, per_record, trainable
from client.dp.rules import settle_norms
from client.train import (
    Course,
    Private,
    Trained,
    class_weights,
    losses_of,
    lowered,
    mixes,
    optimiser_of,
    outcome,
    private_gradient,
    record_loss,
    train,
)
from common.config import Recipe
from common.errors import TrainingError
from common.models import change_of, crossing, parameter_groups, set_weights
from common.storage import storing, write_whole
from common.weights import Weights
from simulations.folder import ABREAST_FILE

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_FAR = 1e-2
"""Largest distance of two ways' updates, over their length; rounding makes 1e-6 to 3e-3 of it in a step of SGD."""
_TRIAL_STEPS, _TRIAL_SITES = 4, 4
"""Steps of each site, and sites that train one after another."""
_WORTH = 1.2
"""Times as fast in the trial: the bookkeeping of so many visits at once costs a little, and a trial is short."""

Values = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What one site trains in one round, as in `client.train.train`."""

    weights: Weights
    cohort: Cohort
    round: int
    site: str
    private: Private | None = None


def train_abreast(
    model: nn.Module, recipe: Recipe, visits: Sequence[Visit], device: torch.device
) -> list[Trained | TrainingError]:
    """`client.train.train` of several sites in one pass.

    Memory: that of as many models, optimisers and batches as there are visits; under privacy gradients of every patient
    of every batch too.

    Args:
        visits: Of one `alike`.

    Returns:
        In the order of the visits, what `train` would give or raise.

    Raises:
        RuntimeError: `torch.func` cannot take this network: it draws random numbers (dropout), or looks at values.
    """
    model.to(device)
    set_weights(model.train(), visits[0].weights)  # what is not exchanged stays as it is
    stacked: Values = {
        name: torch.from_numpy(np.stack([visit.weights[name] for visit in visits])).to(value)
        for name, value in crossing(model).items()
    }
    parameters = {name: stacked[name].requires_grad_() for name in trainable(model)}
    statistics = {name: value for name, value in stacked.items() if name not in parameters}
    name_of = {id(value): name for name, value in trainable(model).items()}
    groups = parameter_groups(model, recipe.training)
    for group in groups:
        group["params"] = [parameters[name_of[id(value)]] for value in group["params"]]
    optimiser = optimiser_of(groups, recipe.training)
    anchor = {name: value.detach().clone() for name, value in parameters.items() if recipe.training.proximal_mu}
    courses = [
        Course(
            model, visit.cohort, recipe, round_=visit.round, site=visit.site, device=device, private=visit.private
        )
        for visit in visits
    ]  # fmt: skip
    factors = [value for visit in visits if (value := class_weights(recipe, visit.cohort)) is not None]
    weight_SC = torch.stack(factors).to(device) if factors else None
    engines = [
        private_gradient(model, record_loss(recipe, visit.cohort), recipe, visit.private)
        for visit in visits
        if visit.private is not None
    ]
    losses: list[torch.Tensor] = []
    for steps in zip(*courses, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = steps[0][2] * group["lr_scale"]
        optimiser.zero_grad()
        x, target = [step[0] for step in steps], [step[1] for step in steps]
        if engines:
            _private_gradients(model, recipe, parameters, weight_SC, engines, x, target)
        else:
            losses.append(_mean_gradients(model, recipe, parameters, statistics, weight_SC, x, target))
        _finish_gradients(parameters, anchor, recipe)
        optimiser.step()
    ends = {name: value.detach().to("cpu", torch.float32) for name, value in stacked.items()}
    results: list[Trained | TrainingError] = []
    for number, (visit, course) in enumerate(zip(visits, courses, strict=True)):
        delta = change_of({name: value[number] for name, value in ends.items()}, visit.weights)
        loss = torch.stack([value[number] for value in losses]) if losses else None
        try:
            results.append(outcome(delta, course, loss, engines[number].clip_norm if engines else None))
        except TrainingError as error:
            results.append(error)
    return results


def _mean_gradients(
    model: nn.Module,
    recipe: Recipe,
    parameters: Values,
    statistics: Values,
    weight_SC: torch.Tensor | None,
    x: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Sets `.grad` to each site's own gradient of its mean loss, and gives these losses (S,).

    What is missing to the largest batch are images of zeros, which no other image is influenced by (`alike`) and whose
    losses do not count.
    """

    def loss(
        values: Values, x_B: torch.Tensor, target_B: torch.Tensor, share_B: torch.Tensor, weight_C: torch.Tensor | None
    ) -> torch.Tensor:
        return (losses_of(recipe, _logits(model, recipe, values, x_B), target_B, weight_C) * share_B).sum()

    records = torch.tensor([len(x_B) for x_B in x], device=x[0].device)[:, None]
    share_SB = (torch.arange(max(map(len, x)), device=x[0].device) < records) / records
    every = 0 if weight_SC is not None else None
    losses_S = vmap(loss, in_dims=(0, 0, 0, 0, every))(
        {**parameters, **statistics}, _padded(x), _padded(target), share_SB, weight_SC
    )
    losses_S.sum().backward()  # no site's loss depends on another's weights
    return losses_S.detach()


def _private_gradients(
    model: nn.Module,
    recipe: Recipe,
    parameters: Values,
    weight_SC: torch.Tensor | None,
    engines: Sequence[PrivateGradient],
    x: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
) -> None:
    """Sets `.grad` to each site's private gradient: clipped here, noised by the site's own engine from its own source.

    The sites draw different numbers of patients; those who are missing to the most are images of zeros, whose
    gradients are left out of the sums.
    """
    settle_norms(model)
    for engine, x_B, target_B in zip(engines, x, target, strict=True):
        engine.tested_with(x_B, target_B)
    if not any(map(len, x)):  # nobody was drawn anywhere: noise alone
        for value in parameters.values():
            value.grad = torch.zeros_like(value)
        _release(model, parameters, engines, torch.zeros(len(x), 0, device=x[0].device), [0] * len(x))
        return
    views = engines[0].views
    patients = torch.tensor([len(x_B) // views for x_B in x], device=x[0].device)
    present_SP = torch.arange(max(map(len, x)) // views, device=x[0].device) < patients[:, None]
    values = {name: value.detach() for name, value in parameters.items()}
    x_SPV, target_SPV = (_padded(some).unflatten(1, (-1, views)) for some in (x, target))
    drawn = _Drawn(model, recipe, values, weight_SC, x_SPV, target_SPV)
    norm_SP, summed = _of_linear(drawn) or _of_patients(drawn)
    clip_S = torch.tensor([engine.clip_norm for engine in engines], device=present_SP.device)
    factors = clip_factors((norm_SP / clip_S[:, None]).square().flatten(), 1.0)
    factor = torch.zeros_like(norm_SP).flatten()
    factor[slice(None) if factors.rows is None else factors.rows] = factors.patients
    factor_SP = torch.where(present_SP, factor.view_as(norm_SP), 0)
    for name, total in summed(factor_SP, factors.rows is None).items():
        parameters[name].grad = total
    _release(model, parameters, engines, norm_SP, [len(x_B) // views for x_B in x])


_Summed = Callable[[torch.Tensor, bool], Values]
"""(factors (S, P), whether all gradients are finite) -> each site's sum of its patients' gradients times these."""


class _Drawn(NamedTuple):
    """The patients that all sites drew for a step, padded to the most, and what their gradients depend on."""

    model: nn.Module
    recipe: Recipe
    values: Values
    """Each site's own, stacked."""
    weight_SC: torch.Tensor | None
    x_SPV: torch.Tensor
    target_SPV: torch.Tensor


def _of_patients(drawn: _Drawn) -> tuple[torch.Tensor, _Summed]:
    """Norms (S, P) of the gradients of every patient of every site, and their sums, by `torch.func`."""

    model, recipe, values, weight_SC, x_SPV, target_SPV = drawn

    def loss(values: Values, x_V: torch.Tensor, target_V: torch.Tensor, weight_C: torch.Tensor | None) -> torch.Tensor:
        logits = _logits(model, recipe, values, x_V)
        return per_record(losses_of(recipe, logits, target_V, weight_C), len(x_V)).mean()

    every = 0 if weight_SC is not None else None
    of_site = vmap(grad(loss), in_dims=(None, 0, 0, None))
    gradients = vmap(of_site, in_dims=(0, 0, 0, every))(values, x_SPV, target_SPV, weight_SC)
    norms = [torch.linalg.vector_norm(g.flatten(2), dim=2) for g in gradients.values()]

    def summed(factor_SP: torch.Tensor, finite: bool) -> Values:
        whole = gradients if finite else {name: g.nan_to_num(0, 0, 0) for name, g in gradients.items()}
        return {name: torch.einsum("sp,sp...->s...", factor_SP, g) for name, g in whole.items()}

    return torch.linalg.vector_norm(torch.stack(norms), dim=0), summed


def _of_linear(drawn: _Drawn) -> tuple[torch.Tensor, _Summed] | None:
    """As `_of_patients`, where one linear layer over each record is all that is trained; None elsewhere.

    A patient's gradient is the product of what goes into the layer and what comes back to it, and is never formed.
    """
    model, recipe, values, weight_SC, x_SPV, target_SPV = drawn
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    name, layer = next(((a, b) for a, b in found if {f"{a}.weight", f"{a}.bias"} == values.keys()), ("", None))
    if layer is None:
        return None
    shape = x_SPV.shape[:3]
    weight_SCF, bias_SC = values[f"{name}.weight"], values[f"{name}.bias"]
    went: list[tuple[torch.Tensor, torch.Tensor]] = []

    def beside(_: nn.Module, into: tuple[torch.Tensor, ...], __: torch.Tensor) -> torch.Tensor | None:
        if into[0].dim() != 2:
            return None
        into_SRF = into[0].unflatten(0, (shape[0], -1))
        out = (torch.matmul(into_SRF, weight_SCF.mT) + bias_SC[:, None]).requires_grad_()
        went.append((into_SRF, out))
        return out.flatten(0, 1)

    handle, state = layer.register_forward_hook(beside), torch.get_rng_state()
    try:
        logits = _logits(model, recipe, {}, x_SPV.flatten(0, 2))
    finally:
        handle.remove()
    if not torch.equal(state, torch.get_rng_state()):
        raise RuntimeError("the network draws random numbers, which each site would from a source of its own")
    if len(went) != 1:
        return None
    every = 0 if weight_SC is not None else None
    losses_SR = vmap(partial(losses_of, recipe), in_dims=(0, 0, every))(
        logits.unflatten(0, (shape[0], -1)), target_SPV.flatten(1, 2), weight_SC
    )
    (back,) = torch.autograd.grad(per_record(losses_SR.flatten(), shape.numel()).sum() / shape[2], went[0][1])
    into_SPVF, back_SPVC = (value.float().unflatten(1, shape[1:]) for value in (went[0][0], back))
    if shape[2] == 1:
        rows = [torch.linalg.vector_norm(value, dim=(2, 3)) for value in (into_SPVF, back_SPVC)]
        norm_SP = rows[1] * (1 + rows[0].square()).sqrt()
    else:  # of views, whose gradients are added before they are measured
        squares = (into_SPVF @ into_SPVF.mT + 1) * (back_SPVC @ back_SPVC.mT)
        norm_SP = squares.sum((2, 3)).clamp(min=0).sqrt()

    def summed(factor_SP: torch.Tensor, finite: bool) -> Values:
        into, back = ((v if finite else v.nan_to_num(0, 0, 0)).flatten(1, 2) for v in (into_SPVF, back_SPVC))
        back = back * factor_SP.repeat_interleave(shape[2], dim=1)[:, :, None]
        return {f"{name}.weight": back.mT @ into, f"{name}.bias": back.sum(1)}

    return norm_SP, summed


def _release(
    model: nn.Module,
    parameters: Values,
    engines: Sequence[PrivateGradient],
    norm_SP: torch.Tensor,
    patients: Sequence[int],
) -> None:
    """Each site's noise, in place."""
    for number, engine in enumerate(engines):
        sums = [_grad(value)[number] for value in parameters.values()]
        engine.release(sums, norm_SP[number, : patients[number]])
    for value in trainable(model).values():
        value.grad = None


def _logits(model: nn.Module, recipe: Recipe, values: Values, x: torch.Tensor) -> torch.Tensor:
    low = lowered(recipe.training, x.device)
    with torch.autocast(x.device.type, dtype=low, enabled=low is not None):
        logits: torch.Tensor = functional_call(model, values, (x,))
    return logits.float()


def _padded(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(S, most records, ...), zeros after each site's own."""
    whole = values[0].new_empty(len(values), max(map(len, values)), *values[0].shape[1:])
    for value, room in zip(values, whole, strict=True):
        room[: len(value)] = value
        room[len(value) :] = 0
    return whole


def _grad(value: torch.Tensor) -> torch.Tensor:
    assert value.grad is not None
    return value.grad


def _finish_gradients(parameters: Values, anchor: Values, recipe: Recipe) -> None:
    moved = {name: value for name, value in parameters.items() if value.grad is not None}
    with torch.no_grad():
        for name, start in anchor.items():
            if name in moved:
                _grad(moved[name]).add_(moved[name] - start, alpha=recipe.training.proximal_mu)
        limit = recipe.training.gradient_clip
        if limit is not None:
            squares_S = torch.stack([_grad(value).flatten(1).square().sum(1) for value in moved.values()]).sum(0)
            factor_S = (limit / (squares_S.sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            for value in moved.values():
                _grad(value).mul_(factor_S.view(-1, *[1] * (value.dim() - 1)))


def alike(model: nn.Module, recipe: Recipe, visit: Visit) -> tuple[int, int, int]:
    """Visits of one value can train in one pass: of equally many steps, and, where batch norms would see what pads the
    smaller batches, of equally many images."""
    course = Course(
        model.train(), visit.cohort, recipe, round_=visit.round, site=visit.site, device=torch.device("cpu"),
        private=visit.private,
    )  # fmt: skip
    return visit.round, course.steps, len(visit.cohort.indices("train")) if mixes(model) else 0


class Abreast:
    """The trainer of sites that share a network: those whose visits are under way together train together."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        device: torch.device,
        *,
        width: int,
        out: Path,
    ) -> None:
        """Starts with what an earlier part of the run has measured.

        Args:
            width: Sites in one pass at most, and visits that are under way at once.
            out: Folder of the run.
        """
        self.width, self.turn = width, Lock()
        """`turn` is held while the network is in use."""
        self._model, self._recipe, self._device, self._out = model, recipe, device, out
        self._door = Condition()
        self._of: dict[str, _Group] = {}
        self._trials = _trials(out)

    def expect(self, sites: Sequence[str]) -> None:
        """These sites' visits begin in this order, `width` of them at once."""
        with self._door:
            for start in range(0, len(sites), self.width):
                group = _Group(sites[start : start + self.width])
                self._of |= dict.fromkeys(group.missing, group)

    def left(self, site: str) -> None:
        """The site's visit is over, with or without training."""
        with self._door:
            group = self._of.pop(site, None)
            if group is not None:
                group.missing.discard(site)
                self._door.notify_all()

    def train(self, weights: Weights, cohort: Cohort, *, round_: int, site: str, private: Private | None) -> Trained:
        """As `client.train.train`; returns when the whole group is trained."""
        visit = Visit(weights=weights, cohort=cohort, round=round_, site=site, private=private)
        known = self._trials.get(_about(self.width))
        if known is not None and known.times_as_fast < _WORTH:  # nobody waits for anybody
            with self.turn:
                return self._alone(self._recipe, visit)
        with self._door:
            group = self._of[site]
            group.visits[site] = visit
            group.missing.discard(site)
            self._door.notify_all()
            while group.missing or (group.led and not group.done):
                self._door.wait(_LOOK_S)  # not for ever: a simulation that is stopped is told between two operations
            led, group.led = group.led, True
        if not led:
            try:
                with self.turn:
                    group.results = self._together(group.visits)
            finally:
                with self._door:
                    group.done = True
                    self._door.notify_all()
        result = group.results.get(site, TrainingError("the pass over several sites failed; see the simulation's log"))
        if isinstance(result, TrainingError):
            raise result
        return result

    def _together(self, visits: Mapping[str, Visit]) -> dict[str, Trained | TrainingError]:
        """In order of name, so that the same sites always make the same pass."""
        results: dict[str, Trained | TrainingError] = {}
        kinds: dict[tuple[int, int, int], list[Visit]] = {}
        for _, visit in sorted(visits.items()):
            kinds.setdefault(alike(self._model, self._recipe, visit), []).append(visit)
        for group in kinds.values():
            if len(group) > 1 and self._wins(group):
                found = train_abreast(self._model, self._recipe, group, self._device)
                results |= {visit.site: result for visit, result in zip(group, found, strict=True)}
                continue
            for visit in group:
                try:
                    results[visit.site] = self._alone(self._recipe, visit)
                except TrainingError as error:
                    results[visit.site] = error
        return results

    def _alone(self, recipe: Recipe, visit: Visit) -> Trained:
        return train(
            self._model, visit.weights, visit.cohort, recipe, round_=visit.round, site=visit.site,
            device=self._device, private=visit.private,
        )  # fmt: skip

    def _wins(self, visits: Sequence[Visit]) -> bool:
        """Whether about so many sites abreast are faster than one after another, measured once in a run."""
        about = _about(len(visits))
        if about not in self._trials:
            self._trials[about] = self._measured(visits)
            write_whole(self._out / ABREAST_FILE, (json.dumps(self._trials, indent=2) + "\n").encode())
        return self._trials[about].times_as_fast >= _WORTH

    def _measured(self, visits: Sequence[Visit]) -> _Trial:
        recipe, trial = _short(self._recipe, visits)
        try:
            few = len(visits[:_TRIAL_SITES])
            alone = _second(lambda: [self._alone(recipe, visit) for visit in trial()[:few]], self._device)
            together = _second(lambda: train_abreast(self._model, recipe, trial(), self._device), self._device)
            # And whether they agree: without noise, beside which nothing would be seen, and by SGD, for Adam makes as
            # much of a rounding as of a gradient where this one is zero. In one step, or it grows from step to step.
            training = replace(recipe.training, optimizer="sgd", lr=0.1, precision="float32", local_epochs=1e-6)
            plain = replace(recipe, training=training)
            reference = self._alone(plain, trial(noised=False)[0]).delta
            found = train_abreast(self._model, plain, trial(noised=False), self._device)[0]
        except (RuntimeError, NotImplementedError, ValueError, TrainingError) as error:
            log.warning("sites cannot train abreast", exc_info=error)
            return _Trial(0.0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        away = (found.delta - reference).norm / reference.norm if isinstance(found, Trained) else float("inf")
        if not away <= _FAR:
            return _Trial(0.0, f"its update was {away:.1e} of its length away from one that was trained alone")
        return _Trial(round(alone / few * len(visits) / together, 3), "")


class _Trial(NamedTuple):
    times_as_fast: float
    """0 where it cannot be."""
    why: str


def _trials(out: Path) -> dict[int, _Trial]:
    """About so many sites -> what an earlier part of the run found."""
    with storing("what was measured of sites abreast"):
        text = (out / ABREAST_FILE).read_text() if (out / ABREAST_FILE).exists() else "{}"
    return {int(sites): _Trial(*found) for sites, found in json.loads(text).items()}


def _about(sites: int) -> int:
    """The next power of two."""
    return 1 << (sites - 1).bit_length()


def told(out: Path) -> str:
    """What became of the wish to train sites abreast, in a sentence."""
    trials = _trials(out)
    if not trials:
        return (
            "No sites trained abreast: no two that were asked together take equally many steps, or, with batch norms, "
            "have equally many images."
        )
    won = [sites for sites, trial in trials.items() if trial.times_as_fast >= _WORTH]
    most = max(won or trials)
    if trials[most].why:
        return f"No sites trained abreast, for this network cannot: {trials[most].why}."
    speed = f"{trials[most].times_as_fast:.1f} times as fast as one after another in a short trial"
    if not won:
        return f"No sites trained abreast: up to {most} would be {speed}, and {_WORTH} is worth it."
    return f"Up to {most} sites trained abreast, {speed}; the weights are those of one after another but for rounding."


class _Group:
    def __init__(self, sites: Sequence[str]) -> None:
        self.missing = set(sites)
        self.visits: dict[str, Visit] = {}
        self.results: Mapping[str, Trained | TrainingError] = {}
        self.led = self.done = False


class _Trials(Protocol):
    def __call__(self, *, noised: bool = True) -> list[Visit]: ...


def _short(recipe: Recipe, visits: Sequence[Visit]) -> tuple[Recipe, _Trials]:
    """A recipe of a few steps, and what makes visits for it, which draw from no site's own source and spend nothing."""
    samples = len(visits[0].cohort.indices("train"))
    epochs = min(recipe.training.local_epochs, _TRIAL_STEPS * recipe.training.batch_size / max(1, samples))

    def trials(*, noised: bool = True) -> list[Visit]:
        return [
            visit if visit.private is None else replace(visit, private=one(visit.private, number, noised))
            for number, visit in enumerate(visits)
        ]

    def one(private: Private, number: int, noised: bool) -> Private:
        sampling = replace(private.sampling, steps=min(_TRIAL_STEPS, private.sampling.steps))
        noise_multiplier = private.noise_multiplier if noised else 0.0
        return replace(private, sampling=sampling, noise_multiplier=noise_multiplier, noise=seeded_noise(number))

    return replace(recipe, training=replace(recipe.training, local_epochs=epochs)), trials


def _second(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second time."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
