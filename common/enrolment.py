"""How a party joins a federation and stays in it: public keys out, kits and newer registries in."""

from __future__ import annotations

import getpass
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from common import kit as kits
from common.audit import AuditError, AuditLog
from common.clock import utc_now
from common.composition import config_root
from common.config import validate_json
from common.deployment import ServerHome, SiteConfig, SiteHome, policy_names
from common.errors import ConfigError, FedicomError
from common.identity import AUTHORITY_ENDS, Certificate, NodeKey, Signer, expiring, node_signed_by, signed_by
from common.journal import SharedLog
from common.printable import number_of
from common.registry import COORDINATOR, Name, PublicKey, Registry, Time, parse_registry
from common.registry import NodeKey as NodePublic
from common.storage import drop_unfinished, locked, private_folder, storing, write_whole

PUBLIC_FILE = "public.json"
NEXT = "next"
"""Folder in `keys` with keys that the registry does not name yet."""
WARN_DAYS = 30
_FORMAT = "fedicom site keys 1"
_MAX_BYTES = 1 << 16


def login() -> str:
    """Who is at the keyboard, for the log."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without a user database
        return f"uid {os.getuid()}"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PublicKeys:
    """`public.json`: what a site sends to the coordinator when it makes its own keys."""

    federation: Name
    site: Name
    signing: PublicKey
    node: NodePublic
    made: Time
    previous: PublicKey | None = None
    """The signing key until now, when the site already takes part and renews its keys."""

    @property
    def signed_bytes(self) -> bytes:
        """What the signatures are under."""
        return f"{_FORMAT}\n{json.dumps(asdict(self), sort_keys=True, separators=(',', ':'))}".encode()


def public_file(
    signer: Signer, node: NodeKey, *, federation: str, site: str, previous: Signer | None = None
) -> tuple[PublicKeys, bytes]:
    """The public keys and the file that carries them.

    Every key signs the file, so nobody can hand in keys of others as his own.
    """
    old = previous.public if previous is not None else None
    keys = PublicKeys(
        federation=federation, site=site, signing=signer.public, node=node.public, made=utc_now(), previous=old
    )
    data = keys.signed_bytes
    signatures = {"signing": signer.sign(data), "node": node.sign(data)}
    if previous is not None:
        signatures["previous"] = previous.sign(data)
    plain = {"format": _FORMAT, "keys": asdict(keys), "signatures": signatures}
    return keys, (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()


def read_public(path: Path) -> PublicKeys:
    """Public keys of a site, after checking that the sender holds every one of the private keys.

    Raises:
        ConfigError: It is no such file, or a signature does not hold.
        StorageError: The file cannot be read.
    """
    with storing(path.name):
        data = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else b""
    try:
        plain = json.loads(data)
        form, body, signatures = plain["format"], json.dumps(plain["keys"]), plain["signatures"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"{path.name} holds no public keys; ask the site for the file of `fedicom site init`"
        ) from None
    if form != _FORMAT or len(plain) != 3 or not isinstance(signatures, dict):
        raise ConfigError(f"{path.name} has another format, expected {_FORMAT!r}; update the older side")
    keys = validate_json(PublicKeys, body)
    given = {name: value for name, value in signatures.items() if isinstance(value, str)}
    holds = (
        signed_by(keys.signing, keys.signed_bytes, given.get("signing", ""))
        and node_signed_by(keys.node, keys.signed_bytes, given.get("node", ""))
        and (keys.previous is None or signed_by(keys.previous, keys.signed_bytes, given.get("previous", "")))
    )
    if not holds or set(signatures) != {"signing", "node"} | ({"previous"} if keys.previous else set()):
        raise ConfigError(f"{path.name}: a signature does not hold, so it was changed; ask the site to send it again")
    return keys


def site_yaml(*, site: str, federation: str, gateway: str, policy: str = "standard") -> bytes:
    """A configuration to edit, with a word on every field and the whole policy in it.

    Args:
        policy: Name of a file in `configs/site/`.

    Raises:
        ConfigError: There is no such policy, or a name is not allowed.
    """
    if policy not in policy_names():
        raise ConfigError(f"no policy {policy!r}; expected one of {', '.join(policy_names())}")
    with storing(f"{policy}.yaml"):
        rules = (config_root() / "site" / f"{policy}.yaml").read_text()
    # Quoted: YAML would read a site called `no` or `1e5` as something else.
    names = {"site": site, "federation": federation, "gateway": gateway}
    quoted = {name: json.dumps(value) for name, value in names.items()}
    text = _SITE_YAML.format(**quoted, policy="".join(f"  {_explained(line)}\n" for line in rules.splitlines()))
    import yaml

    validate_json(SiteConfig, json.dumps(yaml.safe_load(text)))
    return text.encode()


def install_registry(home: SiteHome | ServerHome, file: Path, *, by: str = "") -> Registry:
    """Puts a newer registry into a home.

    Raises:
        ConfigError: It is not signed by the pinned authority, of another federation, older than the one that is
            there, or different from it under the same number.
        StorageError: A file cannot be read or written.
    """
    with storing(file.name):
        data = file.read_bytes()
    new = parse_registry(data, home.authority, file.name)
    with _changing(home):
        if _newer(home, new):
            # First: what was cut off in between is asked for again, and a registry in force is never a new one again.
            note(home, "registry installed", by, version=new.version)
            kits.put({kits.REGISTRY: data}, home.path)
    return new


def install_kit(
    home: SiteHome | ServerHome, files: kits.Files, *, authority: str | None = None, by: str = ""
) -> tuple[str, ...]:
    """Puts a kit into a home that exists: the first one without private keys, or renewed keys.

    A site's own new keys (`fedicom site init --renew`) take effect here, when the registry names them. The audit
    log is handed over from the old signing key to the new one. The site's `site.yaml` and its cohort key stay.
    Running it again after a crash ends what was begun.

    Args:
        files: Of `common.kit.read_folder` or `read_sealed`.
        authority: Public key of the authority, as the coordinator told it on another way than the kit's.

    Returns:
        What was done and what is to do, a sentence each.

    Raises:
        ConfigError: The kit was changed, is older than what is there, is for somebody else, or its registry names
            other keys than there are.
        StorageError: A file cannot be read or written.
    """
    pinned = home.authority if (home.path / kits.AUTHORITY).exists() else None
    if pinned is not None and authority is not None and pinned != authority:
        raise ConfigError(f"this home trusts authority {pinned[:12]}, you gave {authority[:12]}; ask the coordinator")
    manifest, registry = kits.opened(files, pinned or authority)
    owner, federation = _owner(home)
    if (manifest.owner, manifest.federation) != (owner, federation):
        raise ConfigError(
            f"the kit is for {manifest.owner} in {manifest.federation}, this home is of {owner} in {federation}; "
            "take the right kit"
        )
    done: list[str] = []
    with _changing(home):
        if pinned is not None and registry.version < (least := _in_force(home)[1]):
            raise ConfigError(
                f"the kit was made with registry version {registry.version}, this home has version {least} already: "
                "what is in the kit may have been given up since; the authority makes a newer one with "
                "`fedicom provision rotate`"
            )
        signer, node = _keys_of_registry(home, files, registry)
        if pinned is None:
            kits.put({path: data for path, data in files.items() if path.startswith("trust/")}, home.path)
            told = "" if authority else "; compare it with the coordinator's by telephone"
            done.append(f"authority {manifest.authority}{told}")
        elif _read(home.ca) != files.get("trust/ca.crt"):
            kits.put({path: files[path] for path in ("trust/ca.crt",) if path in files}, home.path)
            done.append(f"ca.crt of the authority is in use; it runs out on {Certificate.load(home.ca).ends:%Y-%m-%d}")
        if _newer(home, registry):
            kits.put({kits.REGISTRY: files[kits.REGISTRY]}, home.path)
        done.append(f"registry of version {registry.version}, {number_of(len(registry.members), 'site')}")
        done += _take_keys(home, files, signer, node)
        first = not (home.path / kits.MANIFEST).exists()
        if first:
            kits.put({path: files[path] for path in ("README.md",) if path in files}, home.path)
        if first or _read(home.path / kits.MANIFEST) != files[kits.MANIFEST]:
            name = kits.MANIFEST if first else f"kit-{registry.version}.json"
            kits.put({name: files[kits.MANIFEST]}, home.path)
    note(home, "kit installed", by, version=registry.version, public_key=signer.public)
    if isinstance(home, SiteHome) and (gateway := _gateway(files)) not in (None, home.config.gateway):
        done.append(f"the kit names gateway {gateway}, site.yaml has {home.config.gateway}: edit site.yaml")
    return tuple(done)


def note(home: SiteHome | ServerHome, action: str, by: str, **facts: str | int) -> None:
    """Writes what a person did to the home's audit log.

    Raises:
        AuditError: The log was changed.
        StorageError: It cannot be written.
    """
    log = SharedLog(home.audit_file, Signer.load(home.signing_key))
    log.append("operator action", who=by or login(), action=action, **facts)


def warnings(home: SiteHome | ServerHome, days: float = WARN_DAYS) -> tuple[str, ...]:
    """What runs out within so many days, a sentence each; empty when nothing does.

    A file that cannot be read is a sentence as well: nothing to check is no good news.
    """
    certificates = [home.ca]
    if isinstance(home, ServerHome):
        certificates += [home.gateway_certificate, home.superlink_certificate]
    found = []
    for path in certificates:
        try:
            sentence = expiring(path, days, then=AUTHORITY_ENDS) if path == home.ca else expiring(path, days)
        except FedicomError as error:
            sentence = f"{path.name}: {error}"
        if sentence:
            found.append(sentence)
    return tuple(found)


def _explained(line: str) -> str:
    name = line.partition(":")[0]
    return f"{line:<27} # {_POLICY[name]}" if name in _POLICY and "#" not in line else line


@contextmanager
def _changing(home: SiteHome | ServerHome) -> Iterator[None]:
    with locked(private_folder(home.trust)):
        for folder in (home.keys, home.trust):
            drop_unfinished(folder)  # it may hold a private key
        yield


def _owner(home: SiteHome | ServerHome) -> tuple[str, str]:
    if isinstance(home, SiteHome):
        return home.config.site, home.config.federation
    return COORDINATOR, home.config.federation


def _newer(home: SiteHome | ServerHome, new: Registry) -> bool:
    """Whether the registry takes the place of the home's; False where it is that one.

    Raises:
        ConfigError: It may never take its place.
    """
    federation = _owner(home)[1]
    if new.federation != federation:
        raise ConfigError(f"the registry is of federation {new.federation}, this home is of {federation}")
    old, least = _in_force(home)
    if new.version < least:
        raise ConfigError(
            f"the registry has version {new.version}, this home has version {least}: an older one would bring back "
            "keys that were revoked; ask the coordinator for the newest"
        )
    if old is not None and new.version == old.version:
        if new != old:
            raise ConfigError(
                f"two different registries have version {new.version}: the authority signed twice; change nothing and "
                "call the coordinator"
            )
        return False
    return True


def _in_force(home: SiteHome | ServerHome) -> tuple[Registry | None, int]:
    """The registry of the home, and the version that a new one must have at least."""
    least = max((each.version for each in kits.home_manifests(home.path, home.authority)), default=0)
    if home.registry_file.exists():
        try:
            return (old := home.registry), max(least, old.version)
        except ConfigError:
            pass  # damaged: this is how it is repaired, but never with one older than the kit's
    return None, least


def _keys_of_registry(
    home: SiteHome | ServerHome, files: kits.Files, registry: Registry
) -> tuple[Signer, NodeKey | None]:
    """The private keys that the registry names: in the kit, made anew here, or here already."""
    owner = _owner(home)[0]
    wanted: tuple[str, str | None] = (registry.coordinator, None)
    if isinstance(home, SiteHome):
        member = registry.members.get(owner)
        if member is None:
            raise ConfigError(f"the registry does not name {owner} as a member; ask the coordinator")
        wanted = (member.signing, member.node)
    places: list[tuple[bytes | None, bytes | None]] = [
        (files.get(kits.SIGNING), files.get(kits.NODE)),
        *((_read(folder / "signing.key"), _read(folder / "node.key")) for folder in (home.keys / NEXT, home.keys)),
    ]
    for signing, node in places:
        if signing is None:
            continue
        signer = Signer.from_bytes(signing)
        key = NodeKey.from_bytes(node) if node is not None else None
        if (signer.public, key.public if key is not None else None) == wanted:
            return signer, key
    raise ConfigError(
        f"the registry names other keys for {owner} than there are here; send {PUBLIC_FILE} to the coordinator again"
    )


def _take_keys(home: SiteHome | ServerHome, files: kits.Files, signer: Signer, node: NodeKey | None) -> list[str]:
    """Puts keys in their places; returns what was done."""
    done = []
    private_folder(home.keys)
    old = Signer.load(home.signing_key) if home.signing_key.exists() else None
    if old is None or old.public != signer.public:
        if old is not None:
            _hand_over(home.audit_file, old, signer)
        # Only now: until the log is handed over, the old key is what continues it.
        write_whole(home.signing_key, _bytes_of(home, files, signer))
        done.append(f"signing key {signer.public[:16]} is in use; restart what runs in this home")
        if isinstance(home, SiteHome) and any(home.approved.glob("*.json")):
            done.append(
                "approvals count only under it: approve anew what shall go on; nothing is trained "
                "before (`fedicom site approvals`)"
            )
    if isinstance(home, SiteHome) and node is not None:
        if not home.node_key.exists() or NodeKey.load(home.node_key).public != node.public:
            write_whole(home.node_key, node.private)
            done.append("the new node key is in use; restart the node")
        shutil.rmtree(home.keys / NEXT, ignore_errors=True)
    for path, data in files.items():
        if not path.startswith("keys/") or path in (kits.SIGNING, kits.NODE) or _read(home.path / path) == data:
            continue
        # Secrets of the house stay: with another cohort key every patient would get another split.
        tls = path.endswith((".crt", "gateway.key", "superlink.key"))
        if (home.path / path).exists() and not tls:
            continue
        kits.put({path: data}, home.path)
        then = "what runs takes it up within a minute" if tls else "restart what runs in this home"
        done.append(f"{path.removeprefix('keys/')} is in use; {then}")
    return done


def _bytes_of(home: SiteHome | ServerHome, files: kits.Files, signer: Signer) -> bytes:
    """The private key of this signer, from the kit or from the new keys made here."""
    for data in (files.get(kits.SIGNING), _read(home.keys / NEXT / "signing.key")):
        if data is not None and Signer.from_bytes(data).public == signer.public:
            return data
    raise ConfigError("the new signing key is neither in the kit nor here; unpack the kit again")


def _hand_over(log: Path, old: Signer, new: Signer) -> None:
    try:
        AuditLog(log, new)  # a crash came after the log was handed over, or there is no log yet
    except AuditError:
        AuditLog(log, old).hand_over(new)


def _gateway(files: kits.Files) -> str | None:
    if "site.yaml" not in files:
        return None
    import yaml

    plain = yaml.safe_load(files["site.yaml"])
    return str(plain["gateway"]) if isinstance(plain, dict) and "gateway" in plain else None


def _read(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with storing(path.name):
        return path.read_bytes()


_POLICY = {
    "require_privacy": "refuse every recipe without differential privacy",
    "require_secure_aggregation": "refuse every recipe in which the coordinator sees this site's own update",
    "epsilon": "most that all recipes together may spend on this cohort, for ever",
    "delta": "below one over the number of patients",
    "min_noise_multiplier": "least noise of a step, in units of the clipping norm",
    "max_sampling_rate": "largest part of the patients that one step may draw",
    "max_steps": "noised steps of one visit",
    "max_rounds": "of one recipe",
    "min_patients": "with fewer training patients nothing is trained",
    "models": "networks that may be trained, as family/name; empty: every installed one",
    "tasks": "of binary, multiclass, multilabel; empty: every one",
    "modalities": "a recipe must name its modalities, and only of these; empty: every one",
    "hours": 'local times at which work may begin, for example ["19:00-06:00"]; empty: always',
    "metrics": "bounded: exact scores over at least min_cell patients may leave in every round; noised: noised ones "
    "leave once, after the last round; none: no score leaves",
    "scores_epsilon": "what the noised scores of one recipe may cost of the budget",
    "counts": "numbers of patients that are told: exact, coarse (rounded down by up to a quarter) or none",
    "min_cell": "smallest number of patients that a score or a count may be about",
    "gpu_memory_fraction": "share of the GPU's memory that a visit may take",
    "seeded_noise": "true is for tests with synthetic patients only",
}
_SITE_YAML = """\
# This hospital's node. Edit it, then run `fedicom site preflight`; every field is explained here.
# Nothing in it is secret, and nothing in it is sent to the coordinator.

# This site's name, and the federation's: as in the registry, not to be changed.
site: {site}
federation: {federation}
# host:port of the coordinator: the only address that the node calls.
gateway: {gateway}

data: null              # folder with labels.csv and the DICOM files, for example "/data/chest"; in several studies a
                        # folder for each recipe's name: {{pneumonia_xray: "/data/chest", nodules: "/data/ct"}}
proxy: null             # HTTPS proxy, for example "http://proxy.example.org:3128"; null takes HTTPS_PROXY
device: auto            # auto, cpu or cuda
devices: []             # numbers of the GPUs that share each batch, for example [0, 1]; empty: one
threads: 0              # CPU threads; 0 leaves the choice to torch
metrics_port: null      # port of the Prometheus endpoint on 127.0.0.1; null: none
node_port: null         # port on 127.0.0.1 between Flower's SuperNode and our runner; null takes a free one
cache:                  # prepared images on this computer; they are patient data
  key: null             # encrypts prepared images: a key file such as "keys/cache.key", or "keyring:SERVICE/NAME"
  storage: float32      # float16 takes half the room and rounds to one of 2,048 grey levels or finer
# Limits that the newest `fedicom data report --site` must keep before anything is trained. null asks for no report,
# {{}} takes the limits that docs/quality.md names, and {{max_text_fraction: 0.0}} changes one of them.
quality: null

# What this hospital allows, whatever a recipe or the coordinator says. `fedicom site review` shows for each
# recipe which of these rules speak against it.
policy:
{policy}"""
