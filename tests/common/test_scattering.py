"""The fixed features: what they keep, what they forget, and that nobody trains or sends them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.dp import PrivateGradient, seeded_noise
from common.config import SCATTERING_NETWORKS, ModelConfig, Preprocessing, Privacy, Recipe, Task
from common.errors import ConfigError
from common.models import build, exchanged
from common.scattering import Scattering, scattered


def recipe(name: str, dimensions: int = 2) -> Recipe:
    return Recipe(
        name="r", task=Task(dimensions=dimensions),
        model=ModelConfig(family="scattering", name=name, dimensions=dimensions),
        data=Preprocessing(size=(20,) * dimensions), privacy=Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-5),
    )  # fmt: skip


@pytest.mark.parametrize(("dimensions", "channels"), [(2, 1 + 16 + 64), (3, 1 + 12)])
def test_a_constant_image_has_its_mean_and_nothing_else(dimensions: int, channels: int) -> None:
    maps = Scattering(dimensions)(torch.full((2, 1, *(20,) * dimensions), 3.0))
    assert maps.shape == (2, channels, *(5,) * dimensions)
    assert torch.allclose(maps[:, 0], torch.tensor(3.0), atol=1e-5)
    assert maps[:, 1:].abs().max() < 1e-5


def test_stripes_are_found_by_the_wavelet_across_them() -> None:
    column = torch.arange(32.0)
    stripes = torch.cos(2.3 * column).expand(1, 1, 32, 32)  # they change along the second axis
    first = Scattering(2)(stripes)[0, 1:9].mean((1, 2))
    assert first.argmax() == 4  # a quarter turn from the first axis
    turned = Scattering(2)(stripes.transpose(2, 3))[0, 1:9].mean((1, 2))
    assert turned.argmax() == 0


@pytest.mark.parametrize("name", ["linear_by_channel", "convolutions"])
def test_with_each_channel_normed_alone_a_brighter_image_gives_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(3, 1, 20, 20), build(recipe(name)).eval()
    torch.nn.init.normal_(model.fc.weight)
    assert torch.allclose(model(x + 3), model(x), atol=1e-3)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_normed_by_kind_no_kind_of_map_is_louder_than_another(dimensions: int) -> None:
    model = build(recipe("linear_by_kind", dimensions))
    kinds = model.features.kinds
    maps = torch.randn(3, sum(kinds), *(5,) * dimensions) + 7
    maps[:, 0] *= 1000  # the local mean
    normed = model.body[0](maps).split(kinds, dim=1)
    for kind in normed:
        flat = kind.flatten(1)
        assert torch.allclose(flat.mean(1), torch.zeros(3), atol=1e-4)
        assert torch.allclose(flat.std(1, correction=0), torch.ones(3), atol=1e-2)


@pytest.mark.parametrize("name", [name for name in SCATTERING_NETWORKS if name.startswith("linear")])
def test_the_bias_takes_no_more_of_a_clipped_gradient_than_one_feature(name: str) -> None:
    torch.manual_seed(0)
    model = build(recipe(name))
    torch.nn.functional.cross_entropy(model(torch.randn(1, 1, 20, 20)), torch.tensor([1])).backward()
    weight, bias = model.fc.weight.grad, model.fc.bias.grad
    assert weight.norm() > 0.3
    assert bias.norm() < 2 * weight.norm() / weight.shape[1] ** 0.5


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", SCATTERING_NETWORKS)
def test_what_is_trained_and_sent_is_above_the_features_and_the_engine_takes_it(name: str, dimensions: int) -> None:
    given = recipe(name, dimensions)
    model = build(given)
    assert exchanged(model) == tuple(name for name, _ in model.named_parameters())
    assert not any("wavelets" in name for name in model.state_dict())
    engine = PrivateGradient(
        model, torch.nn.CrossEntropyLoss(reduction="none"), clip_norm=0.5, noise_multiplier=1.0, expected_batch=4,
        physical_batch=4, noise=seeded_noise(0),
    )  # fmt: skip
    x_B = torch.randn(4, 1, *given.data.size)
    assert (engine.step(x_B, torch.tensor([0, 1, 0, 1])) > 0).all()
    assert engine.way == "bookkeeping"


def test_features_that_were_computed_before_give_the_same_logits() -> None:
    x_N = np.random.default_rng(0).normal(size=(5, 1, 20, 20)).astype(np.float32)
    model = build(recipe("linear")).eval()
    torch.nn.init.normal_(model.fc.weight)
    assert torch.equal(model(torch.from_numpy(scattered(x_N, batch=5))), model(torch.from_numpy(x_N)))


def test_an_unknown_network_and_options_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="scattering has no network 'resnet18'; expected one of linear"):
        ModelConfig(family="scattering")
    with pytest.raises(ConfigError, match="width"):
        build(replace(recipe("linear"), model=replace(recipe("linear").model, width=2.0)))
    with pytest.raises(ConfigError, match="stem"):
        build(replace(recipe("linear"), model=replace(recipe("linear").model, stem="small")))
