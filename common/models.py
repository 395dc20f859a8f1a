"""One network from a recipe, and which of its tensors cross the wire.

2D classifiers come from timm, 3D ones (and 2D ones on request) from MONAI. Nothing is ever
downloaded; timm and MONAI are imported when the first network is built, because that takes
seconds and most commands need neither.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import torch
from torch import nn

from common import adaptation, standardisation
from common.config import ModelConfig, Recipe, Training
from common.errors import ConfigError, ExchangeError
from common.imports import importing
from common.scattering import ScatteringClassifier
from common.weights import Weights, room

MONAI_NETWORKS = (
    *(f"resnet{depth}" for depth in (10, 18, 34, 50)),
    "densenet121",
    *(f"efficientnet-b{number}" for number in range(8)),
    "vit",
)

_MONAI_HEADS = ("fc", "class_layers.out", "_fc", "classification_head")
_MAX_TOKENS = 4096
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_UNDECAYED = ("gain", "cls_token", "dist_token", "reg_token", "pos_embed", "position_embeddings")
# What the networks' authors call their stages, in timm and MONAI alike.
_BLOCK = re.compile(r"layer\d+|(?:_?blocks|stages|layers)\.\d+|features\.denseblock\d+")


def build(recipe: Recipe) -> nn.Module:
    """The recipe's network with its initial weights, in training mode, on the CPU.

    `forward` takes (B, channels, *data.size) and gives logits (B, task.outputs). Initial
    weights depend on the recipe alone: torch's global generator is neither read
    nor moved. Stochastic depth is off; `model.dropout` sits before the head (in MONAI's ViT,
    where its authors put it).

    Batch norm becomes group norm when `model.norm` is `group`, and for `auto` under privacy. The
    exception is a frozen backbone (`model.trainable` other than all): its batch norms keep the statistics of the
    weights file in evaluation mode, look at no patient, and stay as they are. `group_ws` also standardises the
    weights of convolutions.

    Raises:
        ConfigError: The network is unknown, does not fit `data.size`, lacks the wanted option, or
            the weights file is not the approved one or does not fit.
    """
    config = recipe.model
    with importing(), _own_randomness(recipe.seed):
        try:
            model = _FAMILIES[config.family](recipe)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"model.name: cannot build {config.family} network {config.name!r} for images of "
                f"{_times(recipe.data.size)}: {_first_line(error)}"
            ) from error
    auto = config.norm == "auto" and recipe.privacy.active and config.trainable == "all"
    if config.norm in ("group", "group_ws") or auto:
        model = _with_group_norm(model)
    if config.norm == "group_ws":
        standardisation.standardise(model)
    if recipe.privacy.active:
        for module in model.modules():
            if getattr(module, "inplace", False) is True:  # an overwritten input breaks per-patient gradients
                module.inplace = False  # type: ignore[assignment]
    if config.weights_file is not None:
        _load_weights(model, config)
    if config.trainable != "all":
        with _own_randomness(recipe.seed):
            adaptation.adapt(model, config, _head_prefixes(model))
    _check_fit(model, recipe)
    return model


def exchanged(model: nn.Module) -> tuple[str, ...]:
    """Names of `state_dict` that cross the wire: trainable parameters and the float buffers beside them.

    Integer counters never cross. In a partly frozen network a buffer crosses only where its
    own module is trained and its statistics are not frozen.
    """
    return tuple(crossing(model))


def crossing(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `exchanged` names, in its order: the tensors themselves, until the model moves to another device."""
    # A site asks at every visit: one walk, and no look at modules that hold nothing.
    walk = model.named_modules(remove_duplicate=False)
    holders = [
        (f"{prefix}." * bool(prefix), module) for prefix, module in walk if module._parameters or module._buffers
    ]
    frozen = not all(value.requires_grad for _, module in holders for _, value in _held(module._parameters))
    found: dict[str, torch.Tensor] = {}
    for prefix, module in holders:
        trained = [(name, value) for name, value in _held(module._parameters) if value.requires_grad]
        for name, value in trained:
            found[prefix + name] = value.detach()
        if module._buffers and not adaptation.keeps_statistics(module) and (trained or not frozen):
            for name, value in _held(module._buffers):
                if value.is_floating_point() and name not in module._non_persistent_buffers_set:
                    found[prefix + name] = value.detach()
    return found


def _held(values: Mapping[str, torch.Tensor | None]) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in values.items() if value is not None]


def buffers(model: nn.Module) -> frozenset[str]:
    """Exchanged names that are no parameters: running statistics, which no optimiser may touch."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return frozenset(exchanged(model)) - parameters


def get_weights(model: nn.Module) -> Weights:
    """A float32 copy on the CPU of what is exchanged; later training does not change it."""
    return Weights({name: value.to("cpu", torch.float32).numpy() for name, value in crossing(model).items()})


def change_of(now: Mapping[str, torch.Tensor], weights: Weights) -> Weights:
    """What `crossing` gave minus `weights`, float32 on the CPU, without a copy of the whole in between."""
    whole, change = room({name: tuple(value.shape) for name, value in now.items()})
    for name, value in now.items():
        np.subtract(value.to("cpu", torch.float32).numpy(), weights[name], out=change[name])
    return Weights.filled(whole, change)


def set_weights(model: nn.Module, weights: Weights) -> dict[str, torch.Tensor]:
    """Writes the exchanged tensors in place and returns them (`crossing`); the model keeps its device and types.

    Raises:
        ExchangeError: A name is missing, unknown or of another shape; the model is then unchanged.
    """
    state = crossing(model)
    if weights.shapes != {name: target.shape for name, target in state.items()}:
        raise ExchangeError(
            f"weights do not fit the model: {_misfit(state, weights)}; both sides must run the same recipe and version"
        )
    with torch.no_grad():
        for name, target in state.items():
            if target.device.type == "cpu" and target.dtype == torch.float32:
                np.copyto(target.numpy(), weights[name])  # torch takes no read-only array without copying it first
            else:
                target.copy_(torch.tensor(weights[name]))
    return state


def _misfit(state: Mapping[str, torch.Tensor], weights: Weights) -> str:
    missing, unknown = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    if missing or unknown:
        return f"{len(missing)} names missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
    name = next(name for name, target in state.items() if weights[name].shape != target.shape)
    return f"{name} has shape {weights[name].shape}, expected {tuple(state[name].shape)}"


def parameter_groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Trainable parameters for a torch optimiser, from the stem to the head.

    With `layer_lr_decay` d, block k of the L blocks behind it runs at lr * d ** (L - k), the
    head at the full rate. Biases, scales of norms, position embeddings and class tokens have no
    weight decay. Each group also holds `lr_scale`, for a schedule that sets the rate anew.

    Source: layer-wise decay as in BEiT (Bao et al. 2022).
    """
    levels = _levels(model) if training.layer_lr_decay < 1 else {}
    top = max(levels.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            decays = value.ndim > 1 and name.rpartition(".")[2] not in _UNDECAYED
            level = levels.get(name, top)
            groups.setdefault((level, decays), []).append(value)
    return [
        {
            "params": values,
            "lr": training.lr * training.layer_lr_decay ** (top - level),
            "lr_scale": training.layer_lr_decay ** (top - level),
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (level, decays), values in sorted(groups.items(), key=lambda item: item[0])
    ]


# The networks


def _timm(recipe: Recipe) -> nn.Module:
    from common.timm_shim import ensure_light_timm

    ensure_light_timm()
    import timm
    from timm.models.resnet import ResNet

    model: Any

    config = recipe.model
    known: list[str] = timm.list_models()
    # Also the fence against timm's hub names (hf-hub:...), which would reach for the network.
    if config.name not in known:
        raise _unknown(config, known)
    if config.width != 1:
        raise ConfigError("model.width: timm networks have a fixed width; use family=monai, or another name")
    options: dict[str, Any] = {}
    described = timm.models.get_pretrained_cfg(config.name)
    if described is not None and described.fixed_input_size:
        options["img_size"] = tuple(recipe.data.size)
    if config.patch is not None:
        options["patch_size"] = config.patch
    if config.dropout:
        options["drop_rate"] = config.dropout
    model = timm.create_model(
        config.name, pretrained=False, in_chans=config.channels, num_classes=recipe.task.outputs, **options
    )
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    cuts = getattr(getattr(embedding, "proj", None), "stride", patch) == patch  # some overlap, as pvt_v2's
    if isinstance(patch, tuple) and cuts and not getattr(embedding, "dynamic_img_pad", False):
        _check_patch(patch, recipe.data.size)  # timm would drop the rows and columns that are left over
    if config.stem == "small":
        first = getattr(model, "conv1", None) if isinstance(model, ResNet) else None
        if not isinstance(first, nn.Conv2d):
            raise ConfigError(f"model.stem: small is for plain ResNets, got {config.name}; use stem=default")
        small = nn.Conv2d(config.channels, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")  # as timm's own
        model.add_module("conv1", small)
        model.add_module("maxpool", nn.Identity())
    assert isinstance(model, nn.Module)
    return model


def _monai(recipe: Recipe) -> nn.Module:
    config, outputs = recipe.model, recipe.task.outputs
    if config.name not in MONAI_NETWORKS:
        raise _unknown(config, MONAI_NETWORKS)
    is_resnet, is_vit = config.name.startswith("resnet"), config.name == "vit"
    if config.stem == "small" and not is_resnet:
        raise ConfigError(f"model.stem: small is for ResNets, got {config.name}; use stem=default")
    if config.width != 1 and not (is_resnet or is_vit):
        raise ConfigError(f"model.width: only MONAI's ResNets and ViT have one, got {config.name}; use width=1")
    if config.patch is not None and not is_vit:
        raise ConfigError(f"model.patch: only a vision transformer has patches, got {config.name}; use patch=null")
    from common.monai_shim import ensure_light_monai

    ensure_light_monai()
    if is_vit:
        return _monai_vit(recipe)
    from monai.networks.nets import densenet, efficientnet, resnet

    model: Any
    if is_resnet:
        if int(64 * config.width) < 2:
            raise ConfigError(
                f"model.width: {config.width} leaves {int(64 * config.width)} channels; use at least 0.04"
            )
        small = {"conv1_t_size": 3, "conv1_t_stride": 1, "no_max_pool": True} if config.stem == "small" else {}
        model = getattr(resnet, config.name)(
            pretrained=False, spatial_dims=config.dimensions, n_input_channels=config.channels,
            num_classes=outputs, widen_factor=config.width, **small,
        )  # fmt: skip
        # The dropout rides on a layer without parameters, so the names of the state stay MONAI's.
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(config.dropout))
    elif config.name == "densenet121":
        model = densenet.DenseNet121(config.dimensions, config.channels, outputs)
        model.class_layers.flatten = nn.Sequential(model.class_layers.flatten, nn.Dropout(config.dropout))
    else:
        model = efficientnet.EfficientNetBN(
            config.name, pretrained=False, progress=False, spatial_dims=config.dimensions,
            in_channels=config.channels, num_classes=outputs,
        )  # fmt: skip
        model.set_swish(memory_efficient=False)  # the other one has no rule for torch.func, nor for export
        model._dropout.p = config.dropout
        for module in model.modules():
            if hasattr(module, "drop_connect_rate"):
                module.drop_connect_rate = 0.0
    assert isinstance(model, nn.Module)
    return model


def _scattering(recipe: Recipe) -> nn.Module:
    config = recipe.model
    if config.stem == "small" or config.patch is not None:
        raise ConfigError("model.stem, model.patch: scattering has neither; use stem=default, patch=null")
    if config.width != 1 and config.name != "convolutions":
        raise ConfigError(f"model.width: scattering/{config.name} has none; use width=1, or name=convolutions")
    return ScatteringClassifier(
        recipe.data.size, recipe.task.outputs, dropout=config.dropout,
        hidden=max(4, round(32 * config.width / 4) * 4) if config.name == "convolutions" else 0,
        norm="all" if config.name == "linear" else "kind" if config.name == "linear_by_kind" else "channel",
    )  # fmt: skip


def _monai_vit(recipe: Recipe) -> nn.Module:
    """ViT-Tiny at width 1 (12 blocks, 3 heads of 64 channels; Touvron et al. 2021), ViT-Base at width 4."""
    from monai.networks.nets.vit import ViT

    class Classifier(ViT):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x)[0]  # type: ignore[no-untyped-call]  # not the hidden states of every block

    config, size = recipe.model, recipe.data.size
    heads = max(1, round(3 * config.width))
    patch = tuple(config.patch or _patch(length) for length in size)
    tokens = math.prod(length // edge for length, edge in zip(size, patch, strict=True))
    _check_patch(patch, size)
    if tokens > _MAX_TOKENS:
        raise ConfigError(
            f"model.patch: patches of {_times(patch)} cut images of {_times(size)} into {tokens} tokens, at most "
            f"{_MAX_TOKENS} are allowed; choose a larger model.patch, or a data.size of multiples of 8"
        )
    model = Classifier(
        config.channels, size, patch, hidden_size=64 * heads, mlp_dim=256 * heads, num_layers=12, num_heads=heads,
        classification=True, num_classes=recipe.task.outputs, dropout_rate=config.dropout,
        spatial_dims=config.dimensions, post_activation="none",
    )  # fmt: skip
    for block in model.blocks:
        block.norm_cross_attn.requires_grad_(False)  # MONAI makes it and never calls it
    assert isinstance(model, nn.Module)
    return model


_FAMILIES = {"timm": _timm, "monai": _monai, "scattering": _scattering}


def _patch(length: int) -> int:
    """The largest divisor up to 16 that leaves four patches or more along an axis."""
    return max(edge for edge in range(1, max(1, min(16, length // 4)) + 1) if length % edge == 0)


def _check_patch(patch: Sequence[int], size: Sequence[int]) -> None:
    if any(length % edge for length, edge in zip(size, patch, strict=True)):
        raise ConfigError(
            f"model.patch: patches of {_times(patch)} do not divide images of {_times(size)}; "
            "choose a data.size of their multiples, or another model.patch"
        )


def _unknown(config: ModelConfig, known: Sequence[str]) -> ConfigError:
    close = get_close_matches(config.name, known, n=5, cutoff=0.5)
    listed = known if len(known) < 20 else close or known[:5]
    return ConfigError(f"model.name: {config.family} has no {config.name!r}; expected for example {', '.join(listed)}")


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    # Hashed: seeds 0 and 1 shall be as far apart as any two, here and from other uses of the recipe's seed.
    derived = int.from_bytes(hashlib.sha256(f"fedicom model {seed}".encode()).digest()[:8], "big") >> 1
    # The CPU's generator by name: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derived)
        yield


# Norms


def _with_group_norm(model: nn.Module) -> nn.Module:
    """Replaces every norm that mixes patients or keeps statistics of them; scales and shifts are kept."""
    if isinstance(model, nn.modules.batchnorm._BatchNorm) or (
        isinstance(model, nn.modules.instancenorm._InstanceNorm) and model.track_running_stats
    ):
        return _group_norm(model)
    for name, child in list(model.named_children()):
        setattr(model, name, _with_group_norm(child))
    return model


def _group_norm(norm: nn.modules.batchnorm._NormBase) -> nn.GroupNorm:
    groups = _groups(norm.num_features)
    made: nn.GroupNorm
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    if isinstance(act, nn.Module) and isinstance(drop, nn.Module):  # timm: norm, drop and activation in one
        from timm.layers.norm_act import GroupNormAct

        made = GroupNormAct(norm.num_features, groups, eps=norm.eps, affine=norm.affine)
        made.act, made.drop = act, drop
    else:
        made = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        made.weight, made.bias = norm.weight, norm.bias
    return made.train(norm.training)


def _groups(channels: int) -> int:
    """gcd(32, channels) groups, halved while a group would be one channel.

    One channel a group is instance norm: it forgets how strong a channel is, and is zero on a 1 x 1 map.
    """
    groups = math.gcd(32, channels)
    return groups // 2 if groups == channels > 1 else groups


# Weights from a file


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classification layer's names in the state, each with its dot."""
    names = dict(model.named_modules())
    classifier: Any = getattr(model, "get_classifier", None)  # timm
    if classifier is not None:
        found = classifier()
        heads = found if isinstance(found, tuple | list) else (found,)
        return tuple(f"{name}." for name, module in names.items() if any(module is head for head in heads))
    return tuple(f"{name}." for name in _MONAI_HEADS if name in names)


_MAX_FILE_BYTES = 16 << 30


class WeightsFileError(ConfigError):
    """A local file is not the one that the recipe names. It says what is on this machine, so it stays on it."""


def _load_weights(model: nn.Module, config: ModelConfig) -> None:
    """Fills the model from a safetensors file by name.

    A head that is absent or of another shape stays as initialised. A first convolution over
    three colours is summed to one channel, which gives a grey image the response that its copy in
    all three colours had. Everything else must match.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    assert config.weights_file is not None
    assert config.weights_sha256 is not None
    try:
        path = Path(config.weights_file).expanduser()
        # The recipe's author chose the name: a device would be read for ever.
        status = path.stat()
        content = path.read_bytes() if S_ISREG(status.st_mode) and status.st_size <= _MAX_FILE_BYTES else None
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "this is no path"
        raise WeightsFileError(f"model.weights_file: cannot read {config.weights_file!a}: {why}") from None
    if content is None:
        raise WeightsFileError(
            f"model.weights_file: {config.weights_file!a} is no file of at most {_MAX_FILE_BYTES >> 30} GiB; get "
            "the one that the recipe's author used"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != config.weights_sha256.lower():
        raise WeightsFileError(
            f"model.weights_file: SHA-256 is {digest}, but the recipe approves {config.weights_sha256}; "
            "get the file that the recipe's author used"
        )
    try:
        tensors: dict[str, torch.Tensor] = load(content)
    except SafetensorError as error:
        raise WeightsFileError(f"model.weights_file: not a safetensors file: {_first_line(error)}") from None

    heads = _head_prefixes(model)
    grouped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.GroupNorm))
    first = next((name for name, value in model.named_parameters() if value.ndim >= 4), None)
    problems = []
    for name, target in model.state_dict().items():
        found = tensors.pop(name, None)
        if found is None:
            if not (name.startswith(heads) or name.endswith("num_batches_tracked")):
                problems.append(f"{name} is missing")
            continue
        if name == first and found.ndim == target.ndim and found.shape[1] == 3 and target.shape[1] == 1:
            found = found.float().sum(1, keepdim=True)
        if found.shape != target.shape:
            if not name.startswith(heads):
                problems.append(f"{name} has shape {tuple(found.shape)}, expected {tuple(target.shape)}")
        elif not found.isfinite().all():
            problems.append(f"{name} is not finite")
        else:
            target.copy_(found)  # the state shares the model's memory
    for name in tensors:  # statistics of a batch norm have no place in the group norm that replaced it
        if not (name.startswith(heads) or (name.endswith(_STATISTICS) and name.startswith(grouped))):
            problems.append(f"{name} is unknown")
    if problems:
        raise ConfigError(
            f"model.weights_file does not fit {config.family} network {config.name!r} ({len(problems)} tensors): "
            f"{'; '.join(problems[:3])}; check model.name, stem, width, norm, channels and data.size"
        )


# Shape

_SMALL = 1 << 16
"""Numbers in two images that are rather run than reasoned about: of 180 x 180, or 32 x 32 x 32."""


def _check_fit(model: nn.Module, recipe: Recipe) -> None:
    """Runs the network without data, so that a wrong size fails here and not in the first round."""
    x_shape, expected = (2, recipe.model.channels, *recipe.data.size), (2, recipe.task.outputs)

    def shape(device: str) -> tuple[int, ...]:
        state = {name: value.to(device) for name, value in (*model.named_parameters(), *model.named_buffers())}
        y: torch.Tensor = torch.func.functional_call(model, state, (torch.zeros(x_shape, device=device),))
        return tuple(y.shape)

    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            try:
                # Torch's rules for shapes take a second and 70 MB to import, small images a hundredth of that to run.
                got = shape("cpu" if math.prod(x_shape) <= _SMALL else "meta")
            except NotImplementedError:  # an operator without a shape rule
                got = shape("cpu")
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"data.size: {recipe.model.name} cannot run on images of {_times(recipe.data.size)}: {_first_line(error)}; "
            "choose a larger data.size (a multiple of 32 suits every network), a smaller model.patch for transformers, "
            "or another network"
        ) from error
    finally:
        model.train(mode)
    if got != expected:
        raise ConfigError(f"model.name: {recipe.model.name} gives {got}, expected {expected}; it is no classifier")


def _levels(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter: 0 before the first block, then a level a block, one more from the last block on."""
    heads = _head_prefixes(model)
    names = [name for name, _ in model.named_parameters()]
    blocks = list(dict.fromkeys(match.group() for name in names if (match := _BLOCK.match(name))))
    levels: dict[str, int] = {}
    level = 0
    last_of_blocks = max((at for at, name in enumerate(names) if _BLOCK.match(name)), default=-1)
    for at, name in enumerate(names):
        if match := _BLOCK.match(name):
            level = blocks.index(match.group()) + 1
        head = name.startswith(heads) or (blocks and at > last_of_blocks)
        levels[name] = len(blocks) + 1 if head else level
    return levels


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
