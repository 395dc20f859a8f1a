"""What runs on a GPU, on one that is pretended (tests/pretend_gpu.py), against the same on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.dp import os_noise
from client.train import train
from common.config import Augmentation, ModelConfig, Preprocessing, Privacy, Recipe, Training
from common.inference import logits
from common.models import build, get_weights
from simulations.abreast import train_abreast
from simulations.run import simulate
from tests.client.test_train import CPU, SGD, cohort_of, flat, private, recipe_of
from tests.pretend_gpu import GPU, OnGpu, pretending
from tests.simulations import test_abreast as abreast
from tests.test_federation import SEEDED, hospitals, no_export, settings_of, weights_of

__all__ = ["hospitals", "no_export"]

EVERYTHING = Augmentation(
    probability=1.0, flip_up_down=True, rotate_deg=20, shift_fraction=0.1, zoom_fraction=0.1,
    intensity_shift=0.1, intensity_scale=0.1, noise_std=0.1,
)  # fmt: skip
ON_A_WHIM = Training(
    optimizer="adamw", lr=0.01, batch_size=5, loss="focal", label_smoothing=0.1, class_weights="balanced",
    proximal_mu=0.1, gradient_clip=0.5, local_epochs=2.0,
)  # fmt: skip
SCATTERING = ModelConfig(family="scattering", name="linear")
DP = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-4)


def on(device: torch.device, recipe: Recipe, **changes: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One round's change of the weights."""
    cohort, start = cohort_of(images=2), get_weights(build(recipe))
    given = private(12, sigma=0.5, steps=2) if recipe.privacy.mechanism == "dp_sgd" else None
    if given is not None:
        given = replace(given, **changes)
    model = build(recipe)
    done = train(model, start, cohort, recipe, round_=1, site="north", device=device, private=given)
    assert isinstance(next(model.parameters()), OnGpu) == (device != CPU)
    return flat(done.delta)


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(),
        recipe_of(norm="batch"),
        recipe_of(ON_A_WHIM),
        recipe_of(replace(SGD, memory_format="channels_last")),
        recipe_of(replace(SGD, precision="bfloat16")),
        recipe_of(data=Preprocessing(size=(16, 16), augmentation=EVERYTHING)),
        recipe_of(model=SCATTERING),
        recipe_of(privacy=DP),
        recipe_of(privacy=replace(DP, clip_quantile=0.5, views=2)),
        recipe_of(privacy=replace(DP, physical_batch=3), training=replace(SGD, memory_format="channels_last")),
        recipe_of(privacy=DP, training=replace(SGD, precision="bfloat16")),
        recipe_of(privacy=DP, model=SCATTERING),
    ],
    ids=lambda recipe: f"{recipe.model.name}-{recipe.id[:4]}",
)
def test_a_site_trains_on_a_gpu_what_it_trains_on_the_cpu(recipe: Recipe) -> None:
    expected = on(CPU, recipe)
    with pretending() as gpu:
        found = on(gpu, recipe)
    assert np.linalg.norm(expected) > 1e-3
    # Under privacy the cheapest of several ways to a norm is taken, which differ in their roundings.
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("trainable", ["head", "norm_bias", "lora"])
@pytest.mark.parametrize("privacy", [Privacy(), DP], ids=["plain", "private"])
def test_what_is_trained_over_a_frozen_backbone_is_the_same_on_a_gpu(
    tmp_path: Path, trainable: Any, privacy: Privacy
) -> None:
    fixed = abreast.on_fixed(recipe_of(privacy=privacy), tmp_path)
    recipe = replace(fixed, model=replace(fixed.model, trainable=trainable))
    expected = on(CPU, recipe)
    with pretending() as gpu:
        found = on(gpu, recipe)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_secret_noise_is_drawn_on_the_gpu_and_never_twice_the_same() -> None:
    with pretending() as gpu:
        one, other = (on(gpu, recipe_of(privacy=DP), noise=os_noise()) for _ in range(2))
    assert np.isfinite(one).all()
    assert np.linalg.norm(one - other) > 0.1 * np.linalg.norm(one)


def test_predictions_of_a_gpu_are_those_of_the_cpu_and_come_back_to_it() -> None:
    recipe, x_N = recipe_of(), cohort_of().samples.x_N
    expected = logits(build(recipe), x_N, np.arange(12), device="cpu")
    with pretending() as gpu:
        found = logits(build(recipe), x_N, np.arange(12), device=gpu)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["batch norms, momentum", "privacy", "a head on a fixed network"])
def test_sites_abreast_on_a_gpu_end_where_they_end_on_the_cpu(name: str, tmp_path: Path) -> None:
    recipe = abreast.RECIPES[name]
    if "fixed" in name:
        recipe = abreast.on_fixed(recipe, tmp_path)
    start = get_weights(build(recipe))

    def ends(device: torch.device) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        visits = [abreast.visit_of(recipe, start, site) for site in range(3)]
        found = train_abreast(build(recipe), recipe, visits, device)
        return [flat(done.delta) for done in found]  # type: ignore[union-attr]

    expected = ends(CPU)
    with pretending() as gpu:
        found = ends(gpu)
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other)


def test_a_private_federation_on_a_gpu_ends_with_the_weights_of_the_cpu(
    tmp_path: Path, hospitals: Path, no_export: None
) -> None:
    one, other = (settings_of(tmp_path / name, hospitals, SEEDED) for name in ("cpu", "gpu"))
    other = replace(other, simulation=replace(other.simulation, device="cuda"))
    simulate(one)
    with pretending():
        simulate(other)
    start = get_weights(build(one.recipe))
    moved = flat(weights_of(one) - start)
    assert np.linalg.norm(flat(weights_of(other) - start) - moved) <= 1e-4 * np.linalg.norm(moved)


# That the pretended one refuses what a real one refuses; else all of this would show nothing.


def test_a_pretended_gpu_refuses_tensors_of_the_cpu_generators_of_it_and_looks_at_its_numbers() -> None:
    with pretending() as gpu:
        there, here = torch.ones(3, 3).to(gpu), torch.ones(3, 3)
        assert (there.device, there.is_cuda, here.device) == (GPU, True, CPU)
        for mixed in (lambda: there + here, lambda: here @ there, lambda: there.add_(here)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(3, 3)(there)
        for look in (there.numpy, there.tolist, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match=r"Tensor\.cpu"):
                look()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=gpu, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="generator"):
            there.normal_(generator=torch.Generator())
        assert (there + 1).cpu().numpy().tolist() == [[2.0] * 3] * 3
        assert (there * torch.tensor(2.0)).sum().item() == 18.0
        assert torch.zeros_like(there).device == GPU
    assert not torch.cuda.is_available()
