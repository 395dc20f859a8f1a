"""A 3D network in planes computes what it computed, or stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.config import ModelConfig, Preprocessing, Recipe, Task
from common.models import build, get_weights
from server import planes
from server.export import export_onnx
from server.planes import in_planes
from tests.server.graphs import convolved_dimensions


def volumes(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def taught(network: nn.Module) -> nn.Module:
    """With running statistics that are not those of a new network."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval()


def kinds(network: nn.Module) -> set[type[nn.Module]]:
    return {type(layer) for layer in network.modules()}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(3, 4, 3),
        nn.Conv3d(3, 4, 3, padding=1, bias=False),
        nn.Conv3d(3, 4, (7, 5, 3), stride=(2, 1, 3), padding=(3, 2, 1)),
        nn.Conv3d(3, 4, (2, 3, 3), stride=(3, 2, 1), dilation=(2, 1, 3)),
        nn.Conv3d(3, 4, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)),
        nn.Conv3d(3, 4, 1),
        nn.Conv3d(3, 4, 1, stride=2),
        nn.Conv3d(3, 4, 1, padding=1),
        nn.MaxPool3d(2),
        nn.MaxPool3d(3, stride=2, padding=1),
        nn.MaxPool3d((3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 0)),
        nn.Sequential(nn.Conv3d(3, 4, 3), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(4, 2, 3, padding=1)),
    ],
    ids=str,
)
def test_a_layer_gives_the_same_numbers_in_planes(layer):
    network = taught(nn.Sequential(nn.Conv3d(1, 3, 1), layer, nn.AdaptiveAvgPool3d((2, 3, 3)), nn.Flatten()))
    x = volumes(2, 1, 9, 10, 11)
    flat = in_planes(network, x)
    assert not kinds(flat) & {nn.Conv3d, nn.MaxPool3d}
    for given in (x, volumes(3, 1, 9, 10, 11), x[:1]):
        torch.testing.assert_close(flat(given), network(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(3, 6, 3, groups=3),
        nn.Conv3d(3, 4, 3, padding="same"),
        nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(3, 3),
        nn.InstanceNorm3d(3),
        nn.AvgPool3d(2),
        nn.MaxPool3d(2, ceil_mode=True),
    ],
    ids=str,
)
def test_a_layer_that_needs_the_volume_gets_it(layer):
    network = taught(nn.Sequential(nn.Conv3d(1, 3, 3), layer, nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    x = volumes(2, 1, 9, 10, 11)
    flat = in_planes(network, x)
    assert type(layer) in kinds(flat)
    assert planes._Conv in kinds(flat)
    torch.testing.assert_close(flat(x), network(x), rtol=1e-5, atol=1e-5)


def test_batch_norm_keeps_what_it_learnt():
    network = taught(nn.Sequential(nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.ReLU(), nn.Flatten()))
    x = volumes(2, 1, 5, 6, 7)
    network[-1] = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())
    flat = in_planes(network, x)
    assert nn.BatchNorm2d in kinds(flat)
    torch.testing.assert_close(flat(x), network(x))


class _AddsItsGate(nn.Module):
    """Squeeze and excitation: one number a volume and channel, for all of its planes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.end = nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.AdaptiveAvgPool3d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.end(x * self.pool(x).sigmoid()).flatten(1)


class _LooksAtTheFirstPlane(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)[: x.shape[0]].flatten(1)[:, :2]


class _UsesALayerTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x)).flatten(1)


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[:, :, 0]).flatten(1)


@pytest.mark.parametrize("network", [_AddsItsGate(), _LooksAtTheFirstPlane(), _UsesALayerTwice(), _Flat()])
def test_a_network_that_planes_cannot_follow_stays_as_it_is(network):
    assert in_planes(network.eval(), volumes(2, 1, 6, 6, 6)) is network


def test_the_network_that_was_given_is_not_changed():
    network = taught(nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)))
    before = str(network), {name: value.clone() for name, value in network.state_dict().items()}
    in_planes(network, volumes(2, 1, 5, 5, 5))
    assert str(network) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in network.state_dict().items())


def test_the_exported_file_of_a_network_of_bottlenecks_has_2d_convolutions(tmp_path):
    """Those of other blocks are asserted in test_export, which exports them anyway."""
    recipe = Recipe(
        name="deep", task=Task(dimensions=3), data=Preprocessing(size=(32, 32, 32)),
        model=ModelConfig(family="monai", name="resnet50", dimensions=3, width=0.125),
    )  # fmt: skip
    model = taught(build(recipe))
    made = export_onnx(
        model, recipe, get_weights(model), tmp_path / "model.onnx", reference_x=volumes(3, 1, 32, 32, 32).numpy()
    )
    assert convolved_dimensions(made.path) == {2}
