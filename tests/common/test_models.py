"""Networks: what is built, what crosses the wire, and that under privacy no patient sees another."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common import adaptation, models, standardisation
from common.composition import groups
from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Task, Training, load_recipe
from common.errors import ConfigError, ExchangeError
from common.weights import Weights

PRIVATE = Privacy(mechanism="dp_sgd", delta=1e-5, noise_multiplier=1.0)
CLASSES = ("none", "small", "large")


def recipe(family="monai", name="resnet10", size=(16, 16), private=False, classes=CLASSES, **model) -> Recipe:
    if name.startswith("resnet1") and family == "monai":
        model.setdefault("width", 0.125)
    return Recipe(
        name="test",
        task=Task(kind="multiclass", dimensions=len(size), classes=classes),
        data=Preprocessing(size=size),
        model=ModelConfig(family=family, name=name, dimensions=len(size), **model),
        privacy=PRIVATE if private else Privacy(),
    )


def colour_recipe() -> Recipe:
    """No recipe may ask for three channels, but a weights file may come from such a network."""
    made = recipe(classes=tuple("abcde"))
    object.__setattr__(made.model, "channels", 3)
    return made


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


NETWORKS = [
    ("timm", "resnet18", (32, 32)),
    ("timm", "efficientnet_b0", (32, 32)),
    ("timm", "convnext_tiny", (32, 32)),
    ("timm", "vit_tiny_patch16_224", (32, 32)),
    ("monai", "resnet10", (16, 16)),
    ("monai", "resnet18", (16, 16, 16)),
    ("monai", "densenet121", (32, 32, 32)),
    ("monai", "efficientnet-b0", (32, 32, 32)),
    ("monai", "vit", (16, 16, 16)),
]


@pytest.mark.parametrize(("family", "name", "size"), NETWORKS)
def test_under_privacy_a_patients_logits_do_not_depend_on_the_batch(family, name, size):
    model = models.build(recipe(family, name, size, private=True)).train()
    x_B = torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))
    together = model(x_B)
    assert together.shape == (3, 3)
    assert torch.allclose(together[:1], model(x_B[:1]), atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-6)  # it looks at the image at all
    together.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_without_privacy_batch_norm_stays_and_mixes_the_batch():
    model = models.build(recipe()).train()
    x_B = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert norms(model)
    assert not torch.allclose(model(x_B)[:2], model(x_B[:2]), atol=1e-4)


@pytest.mark.parametrize(("name", "size"), [("resnet10", (16, 16)), ("efficientnet-b0", (32, 32)), ("vit", (16, 16))])
def test_per_patient_gradients_of_torch_func_equal_a_loop(name, size):
    model = models.build(recipe(name=name, size=size, private=True)).train()
    x_B = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x_B)
    for row in range(2):
        model.zero_grad()
        model(x_B[row : row + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = float(parameter.grad.abs().max()) + 1e-6
                assert torch.allclose(got[name][row], parameter.grad, atol=1e-3 * scale, rtol=1e-3), name


def test_group_norm_keeps_the_activation_that_timm_fused_into_batch_norm():
    plain = models.build(recipe("timm", "efficientnet_b0", (32, 32)))
    private = models.build(recipe("timm", "efficientnet_b0", (32, 32), norm="group"))
    assert norms(private) == []
    count = [sum(isinstance(m, nn.SiLU) for m in model.modules()) for model in (plain, private)]
    assert count[0] == count[1] > 40
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    stem = private.bn1
    assert torch.allclose(stem(x), nn.functional.silu(nn.functional.group_norm(x, 16, eps=stem.eps)), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "expected"), [(512, 32), (64, 32), (32, 16), (48, 16), (8, 4), (6, 2), (7, 1), (1, 1)]
)
def test_no_group_is_a_single_channel_where_that_can_be_avoided(channels, expected):
    assert models._groups(channels) == expected


@pytest.mark.parametrize(
    ("family", "name", "size", "layers"),
    [
        ("timm", "resnet18", (32, 32), 20),
        ("timm", "efficientnet_b0", (32, 32), 81),
        ("monai", "resnet18", (16, 16), 20),
        ("monai", "resnet18", (16, 16, 16), 20),
        ("monai", "efficientnet-b0", (32, 32, 32), 81),
    ],
)
def test_group_ws_standardises_every_convolution_and_folds_into_the_plain_network(family, name, size, layers):
    model = models.build(recipe(family, name, size, norm="group_ws", **({"stem": "small"} if layers == 20 else {})))
    plain = models.build(recipe(family, name, size, norm="group", **({"stem": "small"} if layers == 20 else {})))
    assert norms(model) == []
    for (key, value), (other, before) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == other  # names and initial values are those without it
        assert torch.equal(value, before)
    convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    assert sum(isinstance(module, standardisation._Standardised) for module in convolutions) == layers
    # 2 w + 3 is standardised to what w is
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x)
    first = convolutions[0]
    with torch.no_grad():
        before = first.weight.clone()
        first.weight.mul_(2).add_(3)
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
        first.weight.copy_(before)
    standardisation.fold(model)
    assert [type(a) for a in model.modules()] == [type(b) for b in plain.modules()]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    flat = first.weight.flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)), rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.square().sum(1), torch.ones(len(flat)), rtol=1e-3, atol=1e-3)


def test_a_standardised_weight_is_that_of_timm():
    from common.timm_shim import ensure_light_timm

    ensure_light_timm()
    from timm.layers import ScaledStdConv2d

    theirs = ScaledStdConv2d(3, 8, 3)
    batch = nn.functional.batch_norm(
        theirs.weight.reshape(1, 8, -1),
        None,
        None,
        (theirs.gain * theirs.scale).view(-1),
        training=True,
        eps=theirs.eps,
    )
    torch.testing.assert_close(standardisation.standardised(theirs.weight), batch.reshape_as(theirs.weight))


def test_group_ws_names_a_convolution_that_it_does_not_know_and_a_network_without_any():
    with pytest.raises(ConfigError, match="is a Conv2dSame, which group_ws cannot standardise"):
        models.build(recipe("timm", "tf_efficientnet_b0", (32, 32), norm="group_ws"))
    with pytest.raises(ConfigError, match="finds no convolution"):
        standardisation.standardise(nn.Sequential(nn.Linear(3, 3)))


def test_gains_of_standardised_weights_do_not_decay():
    model = models.build(recipe("timm", "nf_resnet26", (32, 32)))
    groups = models.parameter_groups(model, Training(weight_decay=0.1))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    gains = [p for name, p in model.named_parameters() if name.endswith(".gain")]
    assert len(gains) > 20
    assert not any(id(gain) in decayed for gain in gains)
    assert sum(p.ndim > 1 and id(p) in decayed for p in model.parameters()) >= len(gains)


def test_an_instance_norm_that_keeps_statistics_is_replaced_and_one_without_stays():
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.InstanceNorm2d(4), nn.SyncBatchNorm(4))
    names = [type(module).__name__ for module in models._with_group_norm(model)]
    assert names == ["GroupNorm", "InstanceNorm2d", "GroupNorm"]


def test_initial_weights_are_equal_in_another_process_which_imports_timm_only_to_build():
    code = (
        "import sys, random, torch; from common import models; from common.config import *;"
        "assert not {'timm', 'monai', 'torchvision'} & set(sys.modules), 'imported too early';"
        "torch.manual_seed(7); torch.rand(5);"
        "r = Recipe(name='x', seed=3, data=Preprocessing(size=(32, 32)));"
        "print(models.get_weights(models.build(r)).digest);"
        "from common.timm_shim import ensure_light_timm; ensure_light_timm();"
        "import torchvision; print(torchvision.transforms.Normalize([0.5], [0.5])(torch.ones(1, 2, 2)).sum().item())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    here = models.build(Recipe(name="y", seed=3, data=Preprocessing(size=(32, 32))))
    assert done.stdout.split() == [models.get_weights(here).digest, "4.0"]


def test_building_neither_reads_nor_moves_a_global_generator():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = models.get_weights(models.build(recipe()))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(2)
    assert models.get_weights(models.build(recipe())) == first
    assert models.get_weights(models.build(replace(recipe(), seed=1))) != first


def test_building_opens_no_connection(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    models.build(recipe("timm", "resnet18", (32, 32)))
    models.build(recipe("monai", "resnet18", (16, 16)))
    for name in ("hf-hub:timm/resnet18", "hf_hub:timm/resnet18.a1_in1k", "local-dir:/tmp"):
        with pytest.raises(ConfigError, match="has no"):
            models.build(recipe("timm", name))


@pytest.mark.parametrize("name", groups()["model"])
def test_every_model_file_in_configs_composes_and_builds(name):
    size, dimensions = ("[32,32,32]", 3) if "3d" in name else ("[32,32]", 2)
    words = [f"model={name}", f"task.dimensions={dimensions}", f"data.size={size}", "privacy=none"]
    model = models.build(load_recipe(words))
    heads = models._head_prefixes(model)
    shapes = [tuple(value.shape) for key, value in model.named_parameters() if key.startswith(heads)]
    assert [shape[0] for shape in shapes] == [2, 2]  # weight and bias of one layer with two outputs


# What crosses the wire


def test_weights_are_a_copy_that_training_does_not_change():
    model = models.build(recipe())
    before = models.get_weights(model)
    digest = models.get_weights(model).digest
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    model.train()(torch.randn(4, 1, 16, 16))
    assert models.get_weights(model) != before
    assert Weights(dict(before)).digest == digest
    models.set_weights(model, before)
    assert models.get_weights(model) == before


def test_running_statistics_cross_but_are_no_parameters_and_counters_stay():
    model = models.build(recipe())
    names = set(models.exchanged(model))
    assert "bn1.running_mean" in names
    assert not any(name.endswith("num_batches_tracked") for name in names)
    assert models.buffers(model) == {name for name in names if "running_" in name}
    assert names - models.buffers(model) == {name for name, _ in model.named_parameters()}
    assert models.buffers(models.build(recipe(private=True))) == frozenset()


def test_weights_of_other_names_or_shapes_are_refused_and_change_nothing():
    model = models.build(recipe())
    before = models.get_weights(model)
    ones = {name: np.ones_like(array) for name, array in before.items()}
    fewer = Weights({name: array for name, array in ones.items() if name != "fc.bias"})
    with pytest.raises(ExchangeError, match=r"1 names missing \['fc.bias'\]"):
        models.set_weights(model, fewer)
    with pytest.raises(ExchangeError, match=r"1 unknown \['fc.extra'\]"):
        models.set_weights(model, Weights({**ones, "fc.extra": np.ones(1, np.float32)}))
    with pytest.raises(ExchangeError, match=r"fc.bias has shape \(4,\), expected \(3,\)"):
        models.set_weights(model, Weights({**ones, "fc.bias": np.ones(4, np.float32)}))
    assert models.get_weights(model) == before


# Options


def test_a_small_stem_keeps_the_resolution_until_the_second_stage():
    for family, name, size in (("timm", "resnet18", (28, 28)), ("monai", "resnet10", (12, 12, 12))):
        model = models.build(recipe(family, name, size, stem="small"))
        seen = []
        model.layer1.register_forward_hook(lambda _module, inputs, _output, seen=seen: seen.append(inputs[0].shape[2:]))
        model(torch.zeros(2, 1, *size))
        assert seen == [size]
        assert set(model.conv1.kernel_size) == {3}


def test_width_scales_the_channels_of_a_monai_resnet():
    model = models.build(recipe(width=0.25))
    assert model.conv1.out_channels == 16  # 64 / 4
    assert model.fc.in_features == 128  # 512 / 4


@pytest.mark.parametrize(("family", "name", "size"), [NETWORKS[0], NETWORKS[4], NETWORKS[6], NETWORKS[7], NETWORKS[8]])
def test_dropout_is_random_in_training_only_and_renames_nothing(family, name, size):
    with_dropout = models.build(recipe(family, name, size, private=True, dropout=0.5))
    without = models.build(recipe(family, name, size, private=True))
    assert models.get_weights(with_dropout) == models.get_weights(without)
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(with_dropout.train()(x), with_dropout(x))
        assert torch.equal(without.train()(x), without(x))
        assert torch.allclose(with_dropout.eval()(x), without.eval()(x), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "timm", "name": "rensnet18"}, r"model.name: timm has no 'rensnet18'.*resnet18"),
        ({"name": "densenet999"}, r"model.name: monai has no 'densenet999'.*densenet121"),
        ({"name": "densenet121", "size": (16, 16)}, r"data.size: densenet121 cannot run on images of 16 x 16"),
        (
            {"family": "timm", "name": "vit_tiny_patch16_224", "size": (28, 28)},
            r"16 x 16 do not divide images of 28 x 28",
        ),
        ({"name": "vit", "size": (24, 24), "patch": 7}, r"7 x 7 do not divide images of 24 x 24"),
        ({"name": "vit", "size": (29, 29, 29)}, r"24389 tokens, at most 4096"),  # 29 is prime: 29^3 patches
        ({"family": "timm", "name": "convnext_tiny", "stem": "small"}, r"model.stem: small is for plain ResNets"),
        ({"name": "densenet121", "stem": "small"}, r"model.stem: small is for ResNets"),
        ({"family": "timm", "name": "resnet18", "width": 2.0}, r"model.width"),
        ({"name": "resnet10", "width": 0.01}, r"model.width: 0.01 leaves 0 channels"),
        ({"family": "timm", "name": "resnet18", "patch": 8}, r"model.name: cannot build timm network 'resnet18'"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_field_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        models.build(recipe(**settings))


def test_a_patch_of_seven_lets_a_timm_transformer_take_28_pixels():
    model = models.build(recipe("timm", "vit_tiny_patch16_224", (28, 28), patch=7))
    assert model.pos_embed.shape[1] == 17  # 4 x 4 patches and the class token


def test_patches_that_overlap_need_not_divide_an_image():
    model = models.build(recipe("timm", "pvt_v2_b0", (32, 32)))  # 7 wide, a stride of 4
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, len(CLASSES))


# Weights from a file


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)
    return {"weights_file": str(path), "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(scope="module")
def colour_file(tmp_path_factory) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """A three-channel, five-class network's weights, with statistics unlike the initial ones."""
    model = models.build(replace(colour_recipe(), seed=9))
    model.train()(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1)
    state = model.state_dict()
    return saved(tmp_path_factory.mktemp("weights") / "colour.safetensors", state), state


def test_a_colour_network_answers_a_grey_image_as_its_three_copies(colour_file):
    source, state = colour_file
    model = models.build(recipe(**source)).eval()
    colour = models.build(colour_recipe()).eval()
    colour.load_state_dict(state)
    for network in (model, colour):
        network.fc = nn.Identity()
    grey = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(grey), colour(grey.expand(-1, 3, -1, -1)), atol=1e-4)


def test_a_head_of_another_shape_stays_as_initialised(colour_file):
    loaded, fresh = models.build(recipe(**colour_file[0])), models.build(recipe())
    assert torch.equal(loaded.fc.weight, fresh.fc.weight)
    assert not torch.equal(loaded.layer1[0].conv1.weight, fresh.layer1[0].conv1.weight)


def test_batch_norm_statistics_are_dropped_when_the_network_has_group_norm(colour_file):
    source, state = colour_file
    model = models.build(recipe(private=True, **source))
    assert torch.equal(model.layer4[0].bn1.weight, state["layer4.0.bn1.weight"])
    assert "layer4.0.bn1.running_mean" not in model.state_dict()


@pytest.mark.parametrize("name", ["/dev/zero", "a fifo", "a\0b", ".", "~nobody-of-this-name/x"])
def test_a_weights_file_that_is_no_file_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("a fifo")
    with pytest.raises(ConfigError, match=r"^model\.weights_file: "):
        models.build(recipe(weights_file=name, weights_sha256="0" * 64))


def test_a_weights_file_that_is_not_the_approved_one_is_refused(colour_file, tmp_path):
    source = colour_file[0]
    with pytest.raises(ConfigError, match=r"SHA-256 is .* but the recipe approves 0000"):
        models.build(recipe(weights_file=source["weights_file"], weights_sha256="0" * 64))
    with pytest.raises(ConfigError, match="cannot read"):
        models.build(recipe(weights_file=str(tmp_path / "absent"), weights_sha256="0" * 64))
    (tmp_path / "text").write_bytes(b"no tensors here")
    digest = hashlib.sha256(b"no tensors here").hexdigest()
    with pytest.raises(ConfigError, match="not a safetensors file"):
        models.build(recipe(weights_file=str(tmp_path / "text"), weights_sha256=digest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "layer1.0.conv1.weight is missing"),
        (lambda s: s.update({"layer9.weight": torch.ones(1)}), "layer9.weight is unknown"),
        (lambda s: s.update({"bn1.weight": torch.ones(3)}), r"bn1.weight has shape \(3,\), expected \(8,\)"),
        (lambda s: s.update({"bn1.bias": torch.full((8,), torch.nan)}), "bn1.bias is not finite"),
        (lambda s: s.pop("bn1.running_var"), "bn1.running_var is missing"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(colour_file, tmp_path, change, message):
    state = dict(colour_file[1])
    change(state)
    with pytest.raises(ConfigError, match=message):
        models.build(recipe(**saved(tmp_path / "odd.safetensors", state)))


@pytest.mark.parametrize("private", [False, True])
def test_a_frozen_backbone_exchanges_its_head_alone_and_never_learns_statistics(colour_file, private):
    model = models.build(recipe(trainable="head", private=private, **colour_file[0]))
    assert models.exchanged(model) == ("fc.weight", "fc.bias")
    assert models.buffers(model) == frozenset()
    assert len(norms(model)) > 0  # fixed public statistics mix no patients, also under privacy
    for network in (model, copy.deepcopy(model)):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network.eval()
        network.train()
        network(torch.randn(4, 1, 16, 16) + 5).sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert [name for name, p in network.named_parameters() if p.grad is not None] == ["fc.weight", "fc.bias"]


def test_norms_and_biases_over_a_frozen_backbone_leave_its_weights_and_statistics_alone(colour_file):
    model = models.build(recipe(trainable="norm_bias", private=True, **colour_file[0]))
    names = set(models.exchanged(model))
    assert names == {name for name, p in model.named_parameters() if p.ndim == 1} | {"fc.weight"}
    assert "layer1.0.bn1.weight" in names
    assert models.buffers(model) == frozenset()
    assert not any(norm.train().training for norm in norms(model))


@pytest.mark.parametrize(
    ("family", "name", "size", "some"),
    [
        ("monai", "resnet10", (16, 16), "layer1.0.conv1"),
        ("monai", "resnet10", (12, 12, 12), "layer4.0.conv2"),
        ("timm", "vit_tiny_patch16_224", (32, 32), "blocks.3.attn.qkv"),
    ],
)
def test_low_rank_additions_start_at_nothing_and_merge_into_the_plain_network(family, name, size, some, tmp_path):
    source = saved(
        tmp_path / "start.safetensors", models.build(replace(recipe(family, name, size), seed=5)).state_dict()
    )
    plain = models.build(recipe(family, name, size, **source)).eval()
    low = models.build(recipe(family, name, size, trainable="lora", lora_rank=3, **source)).eval()
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(low(x), plain(x))
    again = models.build(recipe(family, name, size, trainable="lora", lora_rank=3, **source))
    assert all(torch.equal(a, b) for a, b in zip(low.state_dict().values(), again.state_dict().values(), strict=True))
    names = models.exchanged(low)
    assert f"{some}.lora_up" in names
    assert all(name.endswith("lora_up") or name.startswith(models._head_prefixes(low)) for name in names)
    generator = np.random.default_rng(1)
    moved = {key: 0.1 * generator.normal(size=shape) for key, shape in models.get_weights(low).shapes.items()}
    models.set_weights(low, Weights({key: value.astype(np.float32) for key, value in moved.items()}))
    expected = low(x)
    assert not torch.allclose(expected, plain(x), atol=1e-2)
    merged = copy.deepcopy(low)
    adaptation.merge(merged)
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(a) for a in merged.modules()] == [type(b) for b in plain.modules()]


def test_an_addition_as_wide_as_every_layer_is_refused(colour_file):
    with pytest.raises(ConfigError, match=r"model.lora_rank: 256 is too large for every layer"):
        models.build(recipe(trainable="lora", lora_rank=256, **colour_file[0]))


# Learning rates


def test_each_stage_of_a_resnet_learns_at_half_the_rate_of_the_next():
    model = models.build(recipe("timm", "resnet18", (32, 32)))
    found = models.parameter_groups(model, Training(lr=0.1, layer_lr_decay=0.5, weight_decay=0.01))
    names = {id(value): name for name, value in model.named_parameters()}
    rate = {names[id(p)]: group["lr"] for group in found for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in found for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in found) == len(names)
    assert rate["fc.weight"] == rate["fc.bias"] == pytest.approx(0.1)
    assert rate["layer4.0.conv1.weight"] == pytest.approx(0.1 / 2)
    assert rate["layer1.0.conv1.weight"] == pytest.approx(0.1 / 16)
    assert rate["conv1.weight"] == rate["bn1.weight"] == pytest.approx(0.1 / 32)
    assert (decay["fc.weight"], decay["fc.bias"], decay["bn1.weight"]) == (0.01, 0, 0)
    torch.optim.AdamW(found)  # accepts them


def test_without_layer_decay_two_groups_hold_everything_that_is_trained():
    model = models.build(recipe(name="vit", size=(16, 16)))
    found = models.parameter_groups(model, Training(lr=0.1, weight_decay=0.01))
    assert sorted(group["weight_decay"] for group in found) == [0, 0.01]
    assert {group["lr_scale"] for group in found} == {1.0}
    names = {id(value): name for name, value in model.named_parameters()}
    free = {names[id(p)] for group in found if group["weight_decay"] == 0 for p in group["params"]}
    assert {"cls_token", "patch_embedding.position_embeddings", "norm.weight"} <= free
    held = {names[id(p)] for group in found for p in group["params"]}
    assert held == {name for name, value in model.named_parameters() if value.requires_grad}
    assert not any("norm_cross_attn" in name for name in held)  # MONAI's unused layer


@pytest.mark.parametrize(
    ("family", "name", "size", "blocks"),
    [
        ("timm", "vit_tiny_patch16_224", (32, 32), 12),
        ("timm", "convnext_tiny", (32, 32), 4),
        ("timm", "efficientnet_b0", (32, 32), 7),
        ("monai", "densenet121", (32, 32), 4),
        ("monai", "efficientnet-b0", (32, 32), 7),
        ("monai", "vit", (16, 16), 12),
    ],
)
def test_levels_run_from_the_stem_over_the_blocks_to_the_head(family, name, size, blocks):
    model = models.build(recipe(family, name, size))
    levels = models._levels(model)
    order = list(levels.values())
    assert set(order) == set(range(blocks + 2))
    assert order == sorted(order)
    assert {levels[key] for key in levels if key.startswith(models._head_prefixes(model))} == {blocks + 1}


@pytest.mark.parametrize(
    ("family", "name", "size"),
    [
        ("timm", "resnet18", (32, 32)), ("timm", "efficientnet_b0", (32, 32)),
        ("timm", "vit_tiny_patch16_224", (32, 32)),
        ("monai", "resnet18", (16, 16, 16)), ("monai", "densenet121", (32, 32, 32)), ("monai", "vit", (16, 16, 16)),
    ],
)  # fmt: skip
def test_what_crosses_is_the_state_in_its_order_and_its_memory(family, name, size):
    model = models.build(recipe(family, name, size))
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    crossing = models.crossing(model)
    still = {key for key, value in model.named_parameters() if not value.requires_grad}
    assert list(crossing) == [key for key in state if key not in still]
    assert all(value.data_ptr() == state[key].data_ptr() for key, value in crossing.items())
