"""Text becomes types here and nowhere else.

Hydra composes the YAML under `configs/` with the overrides of the command line; pydantic
checks the result once. Beyond `load_settings` nobody sees YAML or dictionaries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from common.composition import compose
from common.compression import Form
from common.errors import ConfigError
from common.fixed import FixedPoint
from common.recipe_rules import objection
from common.wrong_fields import RUN_KEYS, sentences

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid", use_enum_values=True, validate_default=True, allow_inf_nan=False)

Fraction = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
_MOST_PASSES = 10_000
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
"""One line, not empty."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Task:
    """What is to be told apart."""

    kind: Literal["binary", "multiclass", "multilabel"] = "binary"
    """binary: one of two classes; multiclass: one of several; multilabel: any number of them."""
    dimensions: Literal[2, 3] = 2
    """2: one image is a sample; 3: one volume is a sample."""
    classes: Annotated[tuple[Text, ...], Len(2)] = ("negative", "positive")
    """Class names; for binary tasks the second is the positive one. Multi-label: one column of the label table each."""
    key: Literal["patient", "study", "accession", "series"] = "patient"
    """Which DICOM identifier the first column of labels.csv holds."""
    laterality_sensitive: bool = True
    """True forbids left-right flips as augmentation, and up-down flips with turns above 90 degrees, which make them."""
    subgroups: tuple[str, ...] = ()
    """Columns of labels.csv by which results are also shown; small cells are suppressed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has exactly 2 classes, got {len(self.classes)}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class names must differ from each other")
        return self

    @property
    def outputs(self) -> int:
        """Number of logits: one per class, also for binary tasks (softmax); multi-label: one sigmoid per class."""
        return len(self.classes)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Augmentation:
    """Random changes of the training samples (MONAI transforms); everything off by default."""

    probability: Fraction = 0.5
    """Of each change by itself, for each sample."""
    flip_left_right: bool = False
    """Mirrors along the columns."""
    flip_up_down: bool = False
    """Mirrors along the rows."""
    rotate_deg: Annotated[float, Ge(0), Le(180)] = 0.0
    """Largest turn either way, in degrees."""
    shift_fraction: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """Largest translation as a fraction of each axis."""
    zoom_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Zoom is drawn from [1 - z, 1 + z]."""
    intensity_shift: Annotated[float, Ge(0)] = 0.0
    """Largest offset in normalised intensity units."""
    intensity_scale: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Intensities are multiplied by a number from [1 - s, 1 + s]."""
    noise_std: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of Gaussian noise, in normalised intensity units."""

    @property
    def active(self) -> bool:
        return self.probability > 0 and any(
            (
                self.flip_left_right, self.flip_up_down, self.rotate_deg, self.shift_fraction,
                self.zoom_fraction, self.intensity_shift, self.intensity_scale, self.noise_std,
            )
        )  # fmt: skip


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Preprocessing:
    """How a DICOM image or volume becomes the model's input; the same in training, evaluation and the exported file."""

    size: Annotated[tuple[Annotated[int, Ge(8), Le(1024)], ...], Len(2, 3)] = (28, 28)
    """Voxels along (row, column) or (slice, row, column)."""
    spacing_mm: Annotated[tuple[Positive, ...], Len(2, 3)] | None = None
    """Resample to this spacing first; null keeps the spacing of the source."""
    fit: Literal["resize", "crop_pad"] = "resize"
    """How the result reaches `size`: interpolation, or centred crop and pad."""
    orientation: Literal["LPS", "RAS", "source"] = "LPS"
    """Direction of growing (column, row, slice) index of a volume; `source` leaves the axes as acquired."""
    intensity: Literal["window", "percentile"] = "percentile"
    """What becomes [0, 1]: `window`, the values low to high (HU for CT); `percentile`, percentiles of each image."""
    low: float = 0.5
    """What becomes 0: a value of the image, or a percentile."""
    high: float = 99.5
    """What becomes 1; all beyond is cut."""
    mean: float = 0.0
    """Subtracted after scaling to [0, 1]."""
    std: Positive = 1.0
    """Divided by after `mean` is subtracted."""
    modalities: tuple[str, ...] = ()
    """Modalities (0008,0060) to use; empty accepts every one."""
    correct_tilt: bool = False
    """Resample series that were taken with a tilted gantry; false refuses them."""
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.intensity == "percentile" and not (self.low >= 0 and self.high <= 100):
            raise ValueError(f"percentiles lie in [0, 100], got {self.low} and {self.high}")
        if self.spacing_mm is not None and len(self.spacing_mm) != len(self.size):
            raise ValueError(f"spacing_mm has {len(self.spacing_mm)} numbers, size has {len(self.size)}")
        return self

    def swaps_sides(self, laterality_sensitive: bool) -> str | None:
        """Why its flips are not allowed: where sides matter, or the column axis need not run left-right; None if they
        are."""
        change = self.augmentation
        if laterality_sensitive and change.flip_left_right:
            return "data.augmentation.flip_left_right is not allowed while task.laterality_sensitive is true"
        if laterality_sensitive and change.flip_up_down and change.rotate_deg > 90:
            return (
                f"data.augmentation.flip_up_down with rotate_deg {change.rotate_deg:g} makes left-right flips (upside "
                "down, then half a turn), which are not allowed while task.laterality_sensitive is true; use at most 90"
            )
        if change.flip_left_right and len(self.size) == 3 and self.orientation == "source":
            return "data.augmentation.flip_left_right needs data.orientation=LPS or RAS for volumes, got source"
        return None


SCATTERING_NETWORKS = ("linear", "linear_by_kind", "linear_by_channel", "convolutions")


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ModelConfig:
    """Which network."""

    family: Literal["timm", "monai", "scattering"] = "timm"
    """Whose networks: timm (2D), MONAI (2D and 3D), or fixed wavelets under a few trained numbers."""
    name: str = "resnet18"
    """timm: any classifier it lists; monai: resnet10/18/34/50, densenet121, efficientnet-b0 to b7, vit; scattering:
    linear, linear_by_kind, linear_by_channel, convolutions (over fixed wavelets, for few patients under privacy)."""
    dimensions: Literal[2, 3] = 2
    """As `task.dimensions`."""
    channels: Literal[1] = 1
    """Grey values; the weights of a colour network are folded into one channel."""
    norm: Literal["auto", "batch", "group", "group_ws"] = "auto"
    """auto: group norm under differential privacy, the network's own otherwise; group_ws: group norm, and convolutions
    with standardised weights (Qiao et al. 2019)."""
    stem: Literal["default", "small"] = "default"
    """small: 3-wide stride-1 first convolution without pooling, for images below 64 pixels (ResNets only)."""
    width: Annotated[float, Gt(0), Le(8)] = 1.0
    """Factor on the channels of MONAI ResNets and ViT (1 is ViT-Tiny, 4 is ViT-Base) and scattering's convolutions."""
    patch: Count | None = None
    """Patch edge of a transformer; null: timm's own, for MONAI each axis' largest divisor up to 16 and size / 4."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the features before the head that are left out at random in training."""
    weights_file: str | None = None
    """Local safetensors file to start from; never downloaded."""
    weights_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of `weights_file`, which is refused when it is another file."""
    trainable: Literal["all", "head", "norm_bias", "lora"] = "all"
    """What is trained and exchanged: all; the head; it and biases and norms; it and low-rank additions (lora)."""
    lora_rank: Annotated[int, Ge(1), Le(256)] = 4
    """Of the additions of trainable=lora."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.family == "timm" and self.dimensions == 3:
            raise ValueError(
                f"timm network {self.name!r} is 2D; a 3D task needs family=monai, for example model=resnet18_3d"
            )
        if self.family == "scattering" and self.name not in SCATTERING_NETWORKS:
            raise ValueError(
                f"scattering has no network {self.name!r}; expected one of {', '.join(SCATTERING_NETWORKS)}"
            )
        if (self.weights_file is None) != (self.weights_sha256 is None):
            raise ValueError(
                "weights_file and weights_sha256 go together: the file's hash is part of what a site approves"
            )
        if self.norm == "group_ws" and (self.trainable != "all" or self.family == "scattering"):
            raise ValueError(
                f"norm=group_ws standardises convolutions that are trained, got trainable={self.trainable} of "
                f"{self.family}; use trainable=all with timm or monai, or norm=auto"
            )
        if self.trainable != "all" and self.weights_file is None:
            raise ValueError(
                f"trainable={self.trainable} needs weights_file: over a frozen random backbone little is learnt"
            )
        return self


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Training:
    """A round's work at a site."""

    local_epochs: Annotated[float, Gt(0), Le(_MOST_PASSES)] = 1.0
    """Passes over the site's training patients in one round."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Patients a step; under differential privacy the expected number."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Begins anew at each visit."""
    lr: Positive = 1e-3
    """Learning rate at its highest."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """SGD only."""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """AdamW: decoupled; SGD: added to the gradient. Not of biases and norms."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Over the whole federation, not restarted each round."""
    warmup_rounds: Annotated[float, Ge(0)] = 0.0
    """Rounds, or a part of one, in which the learning rate rises from 0."""
    restarts: Annotated[int, Ge(0)] = 0
    """Warm restarts of the cosine (SGDR, Loshchilov and Hutter 2017), equally spaced."""
    min_lr_fraction: Fraction = 0.01
    """Where the cosine ends, as a share of `lr`."""
    layer_lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """Learning rate factor from each block to the one before it."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """focal weighs cases down that are told right already (Lin et al. 2017)."""
    focal_gamma: Annotated[float, Ge(0)] = 2.0
    """How strongly; loss=focal only."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each label that is spread over all classes; not for multi-label tasks."""
    class_weights: Annotated[tuple[Positive, ...], Len(2)] | Literal["balanced"] | None = None
    """balanced: from the site's own counts (refused under differential privacy: counts are private); 1 for a class that
    no training sample has."""
    proximal_mu: Annotated[float, Ge(0)] = 0.0
    """FedProx (Li et al. 2020): mu / 2 * ||w - w_global||^2 added to the loss."""
    gradient_clip: Positive | None = None
    """Largest L2 norm of a step's gradient, under differential privacy of the noised one; null: any."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """bfloat16: layers under autocast, weights, clip and sums stay float32; auto: that on a GPU, float32 on CPU."""
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    """How images lie in memory while training on one device; changes time and roundings, not what is computed."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Privacy:
    """Patient-level differential privacy of every site's updates (DP-SGD, Abadi et al. 2016)."""

    mechanism: Literal["none", "dp_sgd"] = "none"
    """dp_sgd: clipped, noised gradients and a ledger at each site; none: no promise to any patient."""
    epsilon: Annotated[float, Ge(1e-6), Le(1e6)] | None = None
    """Budget of the whole run at each site; the site solves for the noise."""
    delta: Annotated[float, Ge(1e-30), Lt(0.01)] | None = None
    """Chance that the promise of epsilon fails; below 1 / training patients of the smallest site."""
    noise_multiplier: Annotated[float, Ge(0.3), Le(1e6)] | None = None
    """Noise standard deviation in units of `clip_norm`, instead of `epsilon`."""
    clip_norm: Positive = 1.0
    """Bound on the L2 norm of one patient's gradient."""
    clip_quantile: Annotated[float, Gt(0), Lt(1)] | None = None
    """Moves `clip_norm`, then only its start, to this quantile of the gradients' norms; its noise is in the account."""
    views: Annotated[int, Ge(1), Le(64)] = 1
    """Images of each drawn patient in a step, averaged before the clip; a patient with fewer gives them again."""
    physical_batch: Count = 64
    """Images in memory at once (at least the views of one patient); changes memory, not the result."""
    secure_rng: bool = False
    """Noise from a ChaCha20 keystream instead of a generator seeded by the operating system."""
    unsafe_seeded_noise: bool = False
    """Simulation and tests only: noise that anybody with the recipe can subtract. Deployed sites refuse it."""
    secure_aggregation: bool = False
    """The coordinator learns the sum of the updates alone (docs/secure-aggregation.md); with three sites or more."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mechanism == "none":
            if self.epsilon is not None or self.noise_multiplier is not None:
                raise ValueError("mechanism is none but a budget was given; say privacy=dp_sgd")
            return self
        if self.delta is None:
            raise ValueError("dp_sgd needs delta (for example 1e-5, and below 1 / number of patients)")
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of epsilon and noise_multiplier")
        return self

    @property
    def active(self) -> bool:
        return self.mechanism != "none"

    @property
    def promise(self) -> str:
        """In words for a screen."""
        if not self.active:
            return "no differential privacy"
        budget = f"epsilon {self.epsilon:g}" if self.epsilon else f"noise multiplier {self.noise_multiplier:g}"
        return f"{budget}, delta {self.delta:g}"


Strategy = Literal[
    "fedavg", "fedprox", "fedadam", "fedyogi", "fedavgm", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"
]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class EarlyStopping:
    """Ends the run when the federated validation metric has not improved."""

    patience_rounds: Annotated[int, Ge(0)] = 0
    """0 never stops early."""
    min_improvement: Annotated[float, Ge(0)] = 0.0
    """Rise of the mean validation AUROC that counts as one."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Federation:
    """Who takes part and how updates become one."""

    sites: Count = 4
    """How many take part; a run waits for so many before its first round."""
    quorum: Count = 2
    """Fewest accepted updates that may change the model."""
    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the sites that are asked in a round, never fewer than the quorum; drawn anew each round by the recipe's
    seed. Who is not asked spends no privacy. The closing evaluation asks all."""
    timeout_s: Positive = 3600.0
    """Deadline of a round; whoever answers later is left out of it."""
    offline_s: Annotated[float, Ge(0)] = 120.0
    """Once the quorum has answered, how long a site without a connection is waited for."""
    strategy: Strategy = "fedavg"
    """As Flower has it; its bulyan picks the updates by one pass of multikrum, where El Mhamdi et al. 2018 repeat
    krum."""
    site_weights: Literal["patients", "equal"] = "equal"
    """patients: weighted by training patients, a count that then leaves the site; equal: every site the same."""
    server_lr: Positive = 0.1
    """Step size of fedadam and fedyogi; fedavgm uses 1."""
    server_momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """fedavgm only."""
    trim_fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.2
    """fedtrimmedavg: share cut from each end."""
    malicious_sites: Annotated[int, Ge(0)] = 0
    """krum, multikrum, bulyan: how many sites may lie."""
    max_update_norm: Positive = 1e4
    """Updates with a larger L2 norm are refused; under secure aggregation by the site, before anything leaves."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The final model is the exponential moving average of the rounds' models, with this decay a round; 0: the last."""
    compression: Form = "none"
    """How updates are rounded before they leave a site: bfloat16 halves their bytes, int8 quarters them; vectors
    (biases, norms, running statistics) stay as they are. What rounding leaves out is kept at the site and added to its
    next update. Not with secure aggregation."""
    max_patients: Count | None = None
    """With site_weights=patients: a site of more training patients is refused, so that none takes the mean over by the
    number that it claims; null: no limit. Secure aggregation needs it."""
    early_stopping: EarlyStopping = EarlyStopping()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ema_decay and self.early_stopping.patience_rounds:
            raise ValueError(
                f"ema_decay is {self.ema_decay:g} and early_stopping.patience_rounds is "
                f"{self.early_stopping.patience_rounds}, but only one can decide which model is the final one; "
                "set the other to 0"
            )
        if self.quorum > self.sites:
            raise ValueError(f"quorum {self.quorum} is above the number of sites {self.sites}")
        needed = {"krum": 2, "multikrum": 2, "bulyan": 4}.get(self.strategy)
        if needed is not None and self.quorum < needed * self.malicious_sites + 3:
            raise ValueError(
                f"{self.strategy} against {self.malicious_sites} malicious sites needs a quorum of at least "
                f"{needed * self.malicious_sites + 3}, got {self.quorum}"
            )
        if self.strategy == "fedtrimmedavg" and self.trim_fraction * self.quorum < 1:
            raise ValueError(
                f"fedtrimmedavg with trim_fraction {self.trim_fraction:g} cuts nobody from {self.quorum} updates (the "
                "quorum); raise one of them until their product is at least 1"
            )
        return self


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Evaluation:
    """How results are measured and shown."""

    bootstraps: Annotated[int, Ge(100), Le(10_000)] = 1000
    """Resamples of patients for each confidence interval."""
    confidence: Annotated[float, Gt(0.5), Lt(1)] = 0.95
    """Of every confidence interval."""
    specificity: Annotated[float, Gt(0), Lt(1)] = 0.95
    """Sensitivity is reported at this specificity."""
    min_cell: Count = 5
    """Results over fewer patients are suppressed."""
    validation_fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.15
    """Share of a site's patients who watch the training, and are never trained on."""
    test_fraction: Annotated[float, Ge(0), Lt(0.5)] = 0.15
    """Share of a site's patients who measure the final model, and are seen at no other time."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Recipe:
    """All that decides what is trained; a site approves it by its id."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,79}$")]
    """Letters, digits, spaces, `_`, `.` and `-`: it names the folder of the run."""
    description: str = ""
    """What the model tells, in a sentence; sites read it in their review."""
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    """Of the first weights and, without differential privacy, of all that is drawn."""
    rounds: Annotated[int, Ge(1), Le(100_000)] = 10
    """How often the model travels to the sites and back."""
    task: Task = Task()
    data: Preprocessing = Preprocessing()
    model: ModelConfig = ModelConfig()
    training: Training = Training()
    privacy: Privacy = Privacy()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if why := objection(self):
            raise ValueError(why)
        return self

    @property
    def fixed_point(self) -> FixedPoint:
        """How updates become whole numbers under secure aggregation."""
        return FixedPoint.of(self.federation)

    @cached_property
    def canonical(self) -> bytes:
        """Canonical JSON (sorted keys, no spaces, UTF-8): the bytes that are hashed and signed."""
        return json.dumps(as_plain(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @cached_property
    def id(self) -> str:
        """SHA-256 of `canonical`, hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Cache:
    """How prepared images are kept on disk."""

    key: str | None = None
    """Encrypts them (AES-256-GCM): a key file of mode 0600, or keyring:SERVICE/NAME; null leaves them plain."""
    storage: Literal["float32", "float16"] = "float32"
    """float16 takes half the room and rounds to one of 2,048 grey levels or finer."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Phantom:
    """Virtual hospitals made of synthetic DICOM; nothing is downloaded."""

    dimensions: Literal[2, 3] = 2
    """2: radiographs; 3: CT volumes."""
    patients: Count = 120
    """Patients of each hospital, before its own quantity factor."""
    central_patients: Count = 160
    """Patients of the coordinator's test set, which no hospital holds."""
    size: Annotated[int, Ge(16), Le(512)] = 64
    """Pixels (voxels) along each axis of an image (volume)."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the patients."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Simulation:
    """Where the virtual hospitals are and how they run; not part of what is trained."""

    hospitals: str | None = None
    """Folder with one folder a hospital (`dicom/` and `labels.csv` in each) and `central/`; null: phantoms are made."""
    phantom: Phantom = Phantom()
    backend: Literal["process", "ray"] = "process"
    """ray runs the same apps on a Ray cluster through Flower's engine, for who outgrows one machine."""
    ray_address: str | None = None
    """Of a Ray cluster that is running (`auto`, or as Ray writes it); null starts one on this machine for the run."""
    workers: Annotated[int, Ge(1), Le(64)] = 1
    """Sites that train at the same time, each in a process of its own."""
    abreast: Annotated[int, Ge(1), Le(256)] = 1
    """Sites with equally many steps that train in one vectorised pass, where that is measured to be faster (small
    networks, a GPU); their weights are then those of one after another but for rounding."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads of each worker; 0 shares the cores out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where torch sees one."""
    cache: Cache = Cache()
    metrics: Literal["bounded", "noised", "none"] = "bounded"
    """The virtual hospitals' policy on scores, see docs/privacy.md; noised: with rounded counts of patients too."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Settings:
    """One `fedicom simulate`: a recipe, the virtual hospitals, and what to do."""

    recipe: Recipe
    simulation: Simulation = Simulation()
    out: str | None = None
    """Folder of everything the run writes; null: runs/<name of the recipe>."""
    resume: bool | Literal["conclude"] = False
    """Continue the run in `out` where it stopped; conclude: train no more, and make the model of the rounds that are
    done."""
    baselines: bool | Literal["centralised"] = False
    """Also train each site alone and all data pooled, with as many passes over the images as the federated model has
    behind it; centralised: the latter only."""
    overwrite: bool = False
    """Start again in an `out` that holds another run; that run is removed."""
    torchscript: bool = False
    """Also write model.ts.pt."""
    int8: bool = False
    """Also write model.int8.onnx, where that is at least twice as fast and as good; else the report says why."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        patience, metrics = self.recipe.federation.early_stopping.patience_rounds, self.simulation.metrics
        if patience and metrics != "bounded":
            raise ValueError(
                f"federation.early_stopping.patience_rounds is {patience}, but with simulation.metrics={metrics} no "
                "site tells a score before the last round: there is nothing to watch"
            )
        passes = self.recipe.rounds * self.recipe.training.local_epochs
        if self.baselines and passes > _MOST_PASSES:  # they make them in one round
            raise ValueError(
                f"rounds x training.local_epochs is {passes:g}, but baselines make at most {_MOST_PASSES:,} passes; "
                "lower one of them, or say baselines=false"
            )
        return self


def as_plain(value: Any) -> Any:
    """A dataclass as JSON types, field by field."""
    return json.loads(json.dumps(asdict(value)))


def recipe_from_json(text: bytes | str) -> Recipe:
    """Reads a recipe back from its canonical JSON.

    Raises:
        ConfigError: It is not a recipe of this version; the message names the field.
    """
    return validate_json(Recipe, text)


def load_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that these overrides compose, for example `["recipe=pneumonia_xray", "rounds=10"]`.

    Raises:
        ConfigError: A field is unknown or its value is not allowed; the message names its path.
    """
    return load_settings(overrides).recipe


def load_settings(overrides: Sequence[str] = ()) -> Settings:
    """Composes `configs/fedicom.yaml` with the overrides and checks the result once.

    Raises:
        ConfigError: A field is unknown or its value is not allowed; the message names its path.
    """
    plain = compose(overrides)
    run = {key: plain.pop(key) for key in RUN_KEYS if key in plain}
    return validate_json(Settings, json.dumps({"recipe": plain, **run}))


def settings_from_json(text: bytes | str) -> Settings:
    """Reads back what `as_plain` made of settings, for another process."""
    return validate_json(Settings, text)


def validate_json(kind: type[T], text: bytes | str) -> T:
    """A checked dataclass from JSON.

    Raises:
        ConfigError: A field is unknown, missing or not allowed; one line for each, with its path.
    """
    try:
        # Strict JSON: no bool as int, no text as number, but lists become tuples.
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(sentences(kind, error)) from None
