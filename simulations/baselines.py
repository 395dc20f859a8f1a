"""What federation is compared with: each site alone, and all data in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from client.cohort import Cohort
from client.dp.rules import sampling
from client.train import mixes, steps_of, train
from common.config import Privacy, Recipe
from common.metrics import Metrics
from common.models import build, get_weights, set_weights
from common.samples import Samples
from server.evaluate import central
from server.report import Baselines


def baselines(
    recipe: Recipe,
    cohorts: Mapping[str, Cohort],
    rounds: Mapping[str, int],
    test: Samples,
    device: torch.device,
    *,
    alone: bool = True,
    done: Callable[[str], None] = lambda name: None,
) -> Baselines:
    """Trains without privacy and without federation; every model is measured on the same central test set.

    Each training makes as many passes over its data as the federation's model has behind it: a site alone takes
    its own local steps again, the pooled data as many passes as its images made at their sites on average.

    Args:
        rounds: Site to the rounds of it that the model has behind it (`server.rounds.behind`); of a site without any
            there is nothing to compare.
        alone: False trains on the pooled data only.
    """
    at_least = 2 if not recipe.privacy.active and mixes(build(recipe)) else 1  # under privacy nobody asks
    passes = {name: _passes(cohort, recipe, at_least) * rounds.get(name, 0) for name, cohort in cohorts.items()}
    by_site = {}
    for name, cohort in cohorts.items() if alone else ():
        if rounds.get(name):
            by_site[name] = _trained(_in_one_go(recipe, rounds[name], passes[name]), cohort, test, device, name)
            done(name)
    images = {name: len(cohort.indices("train")) for name, cohort in cohorts.items()}
    # Some sites may have trained in fewer rounds than others.
    together, all_passes = (
        sum(of.get(name, 0) * count for name, count in images.items()) / sum(images.values()) for of in (rounds, passes)
    )
    centralised = None
    if together:
        everything = pooled(list(cohorts.values()))
        centralised = _trained(_in_one_go(recipe, together, all_passes), everything, test, device, "pooled")
        done("pooled")
    return Baselines(centralised=centralised, alone=by_site)


def _passes(cohort: Cohort, recipe: Recipe, at_least: int) -> float:
    """Over the site's images in one of its rounds: steps are whole, so it is not `local_epochs` to the letter."""
    training = recipe.training
    if recipe.privacy.active:
        drawn = sampling(cohort.patients("train"), training.batch_size, training.local_epochs)
        return drawn.steps * drawn.rate
    steps, of_one_pass = steps_of(len(cohort.indices("train")), training, at_least=at_least)
    return steps / of_one_pass


def pooled(cohorts: list[Cohort]) -> Cohort:
    """All sites' samples as one cohort, in memory; possible in a simulation only."""
    first = np.cumsum([0, *(len(cohort.samples.patients) for cohort in cohorts)])
    samples = [cohort.samples for cohort in cohorts]
    everything = Samples(
        x_N=np.concatenate([part.x_N for part in samples]),
        targets_N=np.concatenate([part.targets_N for part in samples]),
        patient_N=np.concatenate([part.patient_N + start for part, start in zip(samples, first, strict=False)]),
        patients=tuple(f"{i}/{name}" for i, part in enumerate(samples) for name in part.patients),
        subgroups={},
        digest="",
    )
    split_P = np.concatenate([cohort.split_P for cohort in cohorts])
    return Cohort(everything, split_P, "", {}, cohorts[0].outputs)


def _in_one_go(recipe: Recipe, rounds: float, passes: float) -> Recipe:
    # One round of all epochs: the optimiser keeps its moments, as a site that trains alone would.
    training = replace(
        recipe.training,
        local_epochs=passes,
        warmup_rounds=recipe.training.warmup_rounds / rounds,
        proximal_mu=0.0,
    )
    federation = replace(recipe.federation, strategy="fedavg")
    return replace(recipe, rounds=1, training=training, privacy=Privacy(), federation=federation)


def _trained(recipe: Recipe, cohort: Cohort, test: Samples, device: torch.device, name: str) -> Metrics:
    model = build(recipe)
    start = get_weights(model)
    trained = train(model, start, cohort, recipe, round_=1, site=name, device=device)
    set_weights(model, start + trained.delta)
    return central(model, test, recipe, device=device).metrics
