"""What the people of a deployed federation write by hand, and where everything lies in their folders.

`federation.yaml` (who takes part), `site.yaml` (a hospital's own settings and policy) and `server.yaml` (the
coordinator's) become types here; nothing else reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import field
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, ConfigDict, StringConstraints, model_validator
from pydantic.dataclasses import dataclass

from common.composition import config_root
from common.config import Cache, Fraction, validate_json
from common.errors import ConfigError, DataError, FedicomError
from common.exchange import NAME_PATTERN
from common.registry import Registry, read_registry
from common.storage import storing

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Host = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")]
"""A DNS name or an IP address."""
Port = Annotated[int, Ge(1), Le(65535)]


def _with_port(address: str) -> str:
    port = address.rpartition(":")[2]
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"a port is a number from 1 to 65535, got {port}; ask the coordinator for host:port")
    return address


Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.:\[\]-]{1,253}:\d{1,5}$"), AfterValidator(_with_port)]
Hours = Annotated[str, StringConstraints(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class FederationPlan:
    """`federation.yaml`: what `fedicom provision` makes keys and certificates for."""

    name: Name
    """Of the federation."""
    host: Host
    """How the sites reach the gateway; it stands in the certificate."""
    port: Port = 8443
    """Of the gateway."""
    sites: Annotated[tuple[Name, ...], Len(0, 10_000)]
    """One that makes its own keys is left out, and added later."""
    auditors: tuple[Name, ...] = ()
    """People who may read the coordinator's status and log, and run nothing."""
    contact: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,200}$")] = ""
    """Whom a site calls; it stands in every kit."""
    also_hosts: tuple[Host, ...] = ()
    """Other names and addresses in the gateway's certificate."""
    valid_days: Annotated[int, Ge(1), Le(3650)] = 397
    """Of the gateway's certificate; the authority's lasts ten years."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [*self.sites, *self.auditors]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"every name is given once, got {twice[0]} twice")
        if reserved := sorted({"server", "coordinator", "authority", "gateway"} & set(names)):
            raise ValueError(f"{reserved[0]!r} is a name of the federation itself; choose another for the site")
        return self


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Policy:
    """What a hospital allows, whatever a recipe or a coordinator says."""

    require_privacy: bool = True
    """Refuse every recipe without differential privacy."""
    require_secure_aggregation: bool = False
    """Refuse every recipe without `privacy.secure_aggregation`: this site's update leaves under masks or not at all."""
    epsilon: Annotated[float, Gt(0)] = 8.0
    """Most that all recipes together may spend on this cohort, at `delta`."""
    delta: Annotated[float, Gt(0), Lt(0.01)] = 1e-5
    """Below one over the number of patients."""
    min_noise_multiplier: Annotated[float, Gt(0)] = 0.3
    """Least noise of a step, in units of the clipping norm."""
    max_sampling_rate: Annotated[float, Gt(0), Le(1)] = 1.0
    """Largest part of the patients that one step may draw."""
    max_steps: Annotated[int, Ge(1)] = 100_000
    """Noised steps of one visit."""
    max_rounds: Annotated[int, Ge(1)] = 10_000
    """Of one recipe."""
    min_patients: Annotated[int, Ge(1)] = 20
    """Fewer training patients than this, and nothing is trained."""
    models: tuple[str, ...] = ()
    """Networks that may be trained, as family/name; empty allows all that are installed."""
    tasks: tuple[Literal["binary", "multiclass", "multilabel"], ...] = ()
    """Kinds of task; empty allows all."""
    modalities: tuple[str, ...] = ()
    """A recipe must name its modalities, and only of these; empty allows all."""
    hours: tuple[Hours, ...] = ()
    """Local times at which work may begin, for example ["19:00-06:00"]; empty is always."""
    metrics: Literal["bounded", "noised", "none"] = "bounded"
    """Scores on this site's patients: `bounded` lets exact ones of at least `min_cell` patients leave in every round;
    `noised` lets noised ones leave once, after the last round, and takes `scores_epsilon` from the budget; or none."""
    scores_epsilon: Annotated[float, Gt(0)] = 1.0
    """What the noised scores of one recipe may cost, at `delta`."""
    counts: Literal["exact", "coarse", "none"] = "coarse"
    """Numbers of patients that are told: `coarse` rounds them down to 10, 12, 16, 20, 25, 32, 40, 50, 63, 80, 100 ...,
    and trains with the sampling rate of the rounded number, so that rate, steps and noise tell no more than it. Exact
    scores (`metrics: bounded`) tell the number of images that they are of."""
    min_cell: Annotated[int, Ge(1)] = 5
    """Smallest number of patients that a score or a count may be about; the larger of this and the recipe's holds."""
    gpu_memory_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the GPU's memory that a visit may take."""
    seeded_noise: bool = False
    """Allows `privacy.unsafe_seeded_noise`: tests with synthetic patients only."""

    def open_at(self, now: time) -> bool:
        """Whether work may begin at this local time."""
        if not self.hours:
            return True
        for span in self.hours:
            begin, end = (time.fromisoformat(part) for part in span.split("-"))
            if begin <= now < end if begin <= end else now >= begin or now < end:
                return True
        return False


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class QualityGate:
    """Limits of the quality report; a site that sets them trains only while its newest report keeps them."""

    max_duplicates_across_patients: Annotated[int, Ge(0)] = 0
    """Groups of images that are equal pixel by pixel and lie under more than one patient."""
    max_near_duplicates_across_patients: Annotated[int, Ge(0)] | None = None
    """Pairs of nearly equal images of different patients; null: any number."""
    max_duplicates_across_splits: Annotated[int, Ge(0)] = 0
    """Groups of equal images of which some are for training and others for validation or test."""
    min_kappa: Annotated[float, Ge(-1), Le(1)] = 0.6
    """Cohen's kappa of every two annotators, where the label table has them."""
    required_tags: tuple[str, ...] = ("Manufacturer", "PixelSpacing")
    """Keywords of header elements that `max_missing_fraction` is about; PixelSpacing stands for all kinds of it."""
    max_missing_fraction: Fraction = 0.5
    """Share of the images that may lack any one of `required_tags`."""
    min_class_patients: Annotated[int, Ge(0)] = 5
    """Patients of the rarest class."""
    max_suspect_fraction: Fraction = 0.2
    """Share of the labels that cross-validated predictions speak against."""
    max_text_fraction: Fraction = 0.02
    """Share of the images in which text seems to be burned in."""
    max_refused_fraction: Fraction = 0.5
    """Share of the files that cannot be used."""
    max_unlabelled_fraction: Fraction = 1.0
    """Share of the images that have no label, and are left out."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class SiteConfig:
    """`site.yaml`: a hospital node."""

    site: Name
    """As in the registry."""
    federation: Name
    """As in the registry."""
    gateway: Address
    """host:port of the coordinator's gateway: the only address that the node calls."""
    data: str | Mapping[str, str] | None = None
    """Folder with labels.csv and the DICOM files; for a hospital in several studies one for each recipe's name."""
    proxy: str | None = None
    """HTTPS proxy, for example http://proxy:3128; null takes HTTPS_PROXY, unless NO_PROXY excepts the gateway."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training runs; auto: the first GPU that torch sees, else the CPU."""
    devices: tuple[Annotated[int, Ge(0)], ...] = ()
    """Numbers of the GPUs that share each batch, for example [0, 1]; on CPUs, as many processes. Empty: one."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads; 0 leaves the choice to torch."""
    metrics_port: Port | None = None
    """Loopback port of the Prometheus endpoint; null has none."""
    node_port: Port | None = None
    """Loopback port between the SuperNode and the runner; null takes a free one."""
    cache: Cache = Cache()
    quality: QualityGate | None = None
    """Limits that the newest `fedicom data report --site` must keep before anything is trained; null asks for none."""
    policy: Policy = Policy()

    def data_of(self, recipe: str) -> str:
        """The data folder for the recipe of this name.

        Raises:
            DataError: site.yaml names none.
        """
        if self.data is None:
            raise DataError("site.yaml names no data folder; set data, and run `fedicom site preflight`")
        return self.data if isinstance(self.data, str) else _named(self.data, recipe, "site.yaml: data")

    @property
    def data_folders(self) -> tuple[str, ...]:
        """All data folders, each once."""
        if isinstance(self.data, Mapping):
            return tuple(dict.fromkeys(self.data.values()))
        return () if self.data is None else (self.data,)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ServerConfig:
    """`server.yaml`: the coordinator."""

    federation: Name
    """As in the registry."""
    listen: Host = "0.0.0.0"  # noqa: S104 - the gateway is the one open port
    """Address on which the gateway listens; 0.0.0.0: on every network of this machine."""
    port: Port = 8443
    """Of the gateway."""
    superlink_port: Port | None = None
    """Loopback port of Flower's SuperLink; null takes a free one."""
    control_port: Port | None = None
    """Loopback port for `fedicom server run|status|stop|resume|conclude` and for Prometheus; null takes a free one."""
    test_data: str | Mapping[str, str | None] | None = None
    """Folder of labelled images that no site holds, or one for each recipe's name; null: no central evaluation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of the central evaluation; auto: the first GPU that torch sees, else the CPU."""
    checkpoint_key: str | None = None
    """Key file with which checkpoints are encrypted at rest; null leaves them plain."""
    int8: bool = False
    """Also write model.int8.onnx, where that is at least twice as fast and as good on `test_data`."""
    cache: Cache = Cache()
    gateway: Mapping[str, float | int] = field(default_factory=dict)
    """Limits that differ from their defaults, by name: the table below."""
    blobs: bool = True
    """Weights travel beside Flower's messages; false where what stands for the gateway does not pass them on."""

    def test_data_of(self, recipe: str) -> str | None:
        """The test set for the recipe of this name; None where it shall have none.

        Raises:
            DataError: There are folders for other recipes only.
        """
        if self.test_data is None or isinstance(self.test_data, str):
            return self.test_data
        return _named(self.test_data, recipe, "server.yaml: test_data")


def _named(folders: Mapping[str, T], recipe: str, field: str) -> T:
    if recipe not in folders:
        others = ", ".join(map(repr, folders)) or "none"
        raise DataError(f"{field} names no folder for recipe {recipe!r} (it has: {others}); add a line for it")
    return folders[recipe]


_DEEPEST = 20
"""Of lists and fields within each other; a configuration has four."""


def read_yaml(path: Path, kind: type[T]) -> T:
    """One of the files above, checked.

    Raises:
        ConfigError: A field is unknown, missing, given twice or not allowed; names file and field.
        StorageError: The file cannot be read.
    """
    plain = yaml_of(path)
    try:
        as_json = json.dumps(plain)
    except (TypeError, ValueError):
        raise ConfigError(f"{path.name}: cannot be read as YAML; expected `name: value` lines") from None
    try:
        return validate_json(kind, as_json)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path.name}: {line}" for line in str(error).splitlines())) from None


def yaml_of(path: Path) -> Any:
    """What a file that people wrote holds.

    Raises:
        ConfigError: It is no YAML in UTF-8, or gives a field twice.
        StorageError: The file cannot be read.
    """
    import yaml

    class Once(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # where libyaml is there
        """YAML itself takes the last of two fields of one name without a word: half a policy would be lost."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            met = set[str]()
            for key, _ in node.value:
                if (name := str(key.value)) in met:
                    raise ConfigError(f"{path.name}{_line(key.start_mark)}: {name[:64]!r} is given twice; keep one")
                met.add(name)
            return dict(super().construct_mapping(node, deep))

    with storing(path.name):
        data = path.read_bytes()
    try:
        deep = 0
        for event in yaml.parse(data, Loader=Once):
            deep += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # A kit has such a file from another house: below deep ones libyaml's stack ends, and aliases of aliases
            # fill any memory.
            if deep > _DEEPEST or isinstance(event, yaml.AliasEvent):
                odd = f"is nested more than {_DEEPEST} deep" if deep > _DEEPEST else "holds an alias (*name)"
                raise ConfigError(f"{path.name}{_line(event.start_mark)}: {odd}; write plain `name: value` lines")
        return Once(data).get_single_data()
    except yaml.reader.ReaderError:
        raise ConfigError(f"{path.name} is not UTF-8 text; save it as UTF-8") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        where = _line(getattr(error, "problem_mark", None))
        raise ConfigError(f"{path.name}{where}: cannot be read as YAML; expected `name: value` lines") from None


def _line(mark: Any) -> str:
    return f", line {mark.line + 1}" if mark is not None else ""


def policy_names() -> tuple[str, ...]:
    """Names of the policies in `configs/site/` that a site may start from."""
    return tuple(sorted(path.stem for path in (config_root() / "site").glob("*.yaml")))


class _Home:
    """A folder that one party of the federation owns."""

    def __init__(self, path: Path) -> None:
        """Names the folder; it need not be there yet.

        Raises:
            ConfigError: The user is root and the folder somebody else's.
        """
        self.path = path.resolve()
        # What root makes there, the log with its first event, is root's alone, and stops whoever owns the folder.
        root = os.geteuid() == 0 and os.environ.get("FEDICOM_ALLOW_ROOT") != "1"
        if root and self.path.is_dir() and (owner := self.path.stat().st_uid):
            raise ConfigError(
                f"{self.path.name} belongs to user {_login(owner)}, who could not read what root writes there; run "
                f"this as that user (sudo -u {_login(owner)}), or say FEDICOM_ALLOW_ROOT=1 where root is nobody "
                "outside, as in a rootless container"
            )

    def _need(self, path: Path, what: str) -> Path:
        if not path.is_file():
            raise ConfigError(f"{self.path.name}: {what} is missing ({path.relative_to(self.path)}); {self._advice}")
        return path

    _advice = "unpack the kit again"

    @property
    def keys(self) -> Path:
        """Private keys, 0700."""
        return self.path / "keys"

    @property
    def signing_key(self) -> Path:
        return self.keys / "signing.key"

    @property
    def superexec_secret(self) -> Path:
        """Shared by Flower's process and ours on this machine: who has it may take the tasks."""
        return self.keys / "superexec.secret"

    @property
    def trust(self) -> Path:
        """Public keys and certificates of others."""
        return self.path / "trust"

    @property
    def ca(self) -> Path:
        """Certificate of the federation's authority, PEM."""
        return self.trust / "ca.crt"

    @property
    def registry_file(self) -> Path:
        return self.trust / "registry.json"

    @property
    def authority(self) -> str:
        """Pinned public key of the federation's authority."""
        path = self._need(self.trust / "authority.pub", "the authority's public key")
        with storing(path.name):
            return path.read_text().strip()

    @property
    def registry(self) -> Registry:
        """The registry, checked at every call.

        Raises:
            ConfigError: It is missing or does not hold.
        """
        return read_registry(self._need(self.registry_file, "the registry"), self.authority)

    @property
    def run(self) -> Path:
        """State of running processes: status, logs of the children, locks."""
        return self.path / "run"

    @property
    def status_file(self) -> Path:
        return self.run / "status.json"


class SiteHome(_Home):
    """A hospital's folder: what its kit becomes."""

    _advice = "unpack the site's kit again, or `fedicom site join` it where `fedicom site init` made the keys"

    @property
    def config(self) -> SiteConfig:
        return read_yaml(self._need(self.path / "site.yaml", "the site's configuration"), SiteConfig)

    @property
    def node_key(self) -> Path:
        """EC key of the Flower node, OpenSSH format."""
        return self.keys / "node.key"

    @property
    def cohort_key(self) -> Path:
        """Secret of the site's pseudonyms and splits: 32 bytes that never change."""
        return self.keys / "cohort.key"

    @property
    def supernode(self) -> Path:
        """Flower's own folder."""
        return self.run / "supernode"

    @property
    def unanswered_bell(self) -> Path:
        """Rung by the SuperNode when a look for messages failed, for the supervisor (`common.bell`)."""
        return self.run / "unanswered.bell"

    @property
    def runner_file(self) -> Path:
        """What our runner does, for the supervisor, which makes `status_file` of it."""
        return self.run / "runner.json"

    @property
    def approved(self) -> Path:
        """Approved recipes."""
        return self.path / "approved"

    @property
    def state(self) -> Path:
        """Ledger, outbox and cache."""
        return self.path / "state"

    @property
    def ledger_file(self) -> Path:
        return self.state / "ledger.jsonl"

    @property
    def cache(self) -> Path:
        return self.state / "cache"

    def quality_file(self, folder: Path) -> Path:
        """The newest quality report of a data folder, sealed."""
        if not isinstance(self.config.data, Mapping):
            return self.state / "quality.json"
        name = hashlib.sha256(bytes((self.path / folder).resolve())).hexdigest()
        return self.state / f"quality-{name[:16]}.json"

    @property
    def audit_file(self) -> Path:
        return self.path / "audit" / f"{self.config.site}.jsonl"


class ServerHome(_Home):
    """The coordinator's folder."""

    _advice = "unpack the coordinator's kit again"

    @property
    def config(self) -> ServerConfig:
        return read_yaml(self._need(self.path / "server.yaml", "the coordinator's configuration"), ServerConfig)

    @property
    def gateway_certificate(self) -> Path:
        return self.keys / "gateway.crt"

    @property
    def gateway_key(self) -> Path:
        return self.keys / "gateway.key"

    @property
    def superlink_certificate(self) -> Path:
        """For localhost and 127.0.0.1, by the same authority."""
        return self.keys / "superlink.crt"

    @property
    def superlink_key(self) -> Path:
        return self.keys / "superlink.key"

    @property
    def tokens_file(self) -> Path:
        """SHA-256 of the operators' and auditors' tokens."""
        return self.keys / "tokens.json"

    @property
    def superlink(self) -> Path:
        """Flower's database and home."""
        return self.path / "superlink"

    @property
    def blobs(self) -> Path:
        """Weights on their way: `server.blobs`."""
        return self.path / "blobs"

    @property
    def sent_bell(self) -> Path:
        """Rung by a run when it has sent messages, for the gateway (`common.bell`)."""
        return self.run / "sent.bell"

    @property
    def answered_bell(self) -> Path:
        """Rung by the gateway when a site has answered, for the runs."""
        return self.run / "answered.bell"

    @property
    def runs(self) -> Path:
        """One folder a run."""
        return self.path / "runs"

    @property
    def cache(self) -> Path:
        """Prepared images of the coordinator's own test set."""
        return self.path / "cache"

    @property
    def operator_token(self) -> Path:
        """The token that `fedicom server` takes when it is told no other."""
        return self.keys / "operator.token"

    @property
    def control_file(self) -> Path:
        """Ports and process id of the coordinator that is running."""
        return self.run / "control.json"

    @property
    def gateway_config(self) -> Path:
        return self.run / "gateway.json"

    @property
    def gateway_stats(self) -> Path:
        """Counters of the gateway, written every few seconds."""
        return self.run / "gateway-stats.json"

    @property
    def audit_file(self) -> Path:
        return self.path / "audit" / "server.jsonl"


def _login(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"#{user}"


def home_folder(given: Path | None, *files: str) -> Path:
    """The folder that a command works in: `--home`, or FEDICOM_HOME, or the current one when it holds one of `files`.

    Raises:
        ConfigError: None of the three, or the folder holds none of the files.
    """
    named = given or (Path(os.environ["FEDICOM_HOME"]) if os.environ.get("FEDICOM_HOME") else None)
    folder = named or Path()
    if any((folder / file).is_file() for file in files):
        return folder
    wanted = " or ".join(files)
    if named is not None:
        raise ConfigError(f"{named} holds no {wanted}; give the folder that a kit was unpacked to")
    raise ConfigError(f"no {wanted} here; go to the folder of the kit, or give --home DIR, or set FEDICOM_HOME")


def read_status(path: Path) -> dict[str, Any] | None:
    """A status file, or None when there is none; half a file is impossible, for they are written whole.

    Raises:
        FedicomError: It is no JSON object.
    """
    if not path.exists():
        return None
    with storing(path.name):
        text = path.read_text()
    try:
        plain = json.loads(text)
    except ValueError:
        plain = None
    if not isinstance(plain, dict):
        raise FedicomError(f"{path.name} is no status file; remove it and start again")
    return plain
