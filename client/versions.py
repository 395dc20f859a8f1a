"""What each version of a cohort was made of, so that a site can say what changed between two of them.

A record stays in the site's state folder: pseudonyms, keyed hashes of prepared images, labels and sides of the split.
It is encrypted where the site's cache is.
"""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.clock import utc_now
from common.config import Recipe
from common.errors import ConfigError, DataError, StorageError
from common.samples import settings_of
from common.shard import open_text, seal_text
from common.storage import private_folder, storing, write_whole

if TYPE_CHECKING:
    from client.cohort import Cohort

_FOLDER = "versions"
_PLAIN, _ENCRYPTED = ".json", ".sealed"
_HASH = 32
_LEAST_PREFIX = 6


@dataclass(frozen=True, kw_only=True)
class Member:
    """A patient of a version."""

    split: str
    images: tuple[tuple[str, Any], ...] = field(repr=False)
    """(keyed hash of a prepared image, its class index or its 0 and 1 for each class), sorted."""
    subgroups: tuple[tuple[str, ...], ...] = ()
    """Of each image, in the same order."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One state of a cohort."""

    manifest: str
    """As in `Cohort.manifest`, in updates and in the logs."""
    recorded: str
    """UTC, ISO 8601."""
    recipe: str
    """Its name."""
    settings: Mapping[str, Any]
    """Task and preprocessing."""
    members: Mapping[str, Member] = field(repr=False)
    """Patient pseudonym -> what belongs to them."""
    corrected: Mapping[str, int] = field(default_factory=dict)
    """What was done to values beyond reading and preparing them -> samples."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What changed from one version to another. Names are pseudonyms."""

    old: str
    new: str
    patients_added: tuple[str, ...]
    patients_removed: tuple[str, ...]
    images_added: int
    """Of patients who are in both."""
    images_removed: int
    images_comparable: bool
    """False where the preprocessing differs: then every image differs, and only their numbers are compared."""
    patients_with_changed_images: tuple[str, ...]
    labels_changed: Mapping[str, int]
    """from -> to: images whose label alone changed."""
    splits_changed: Mapping[str, int]
    """from -> to: patients; must be empty."""
    settings_changed: Mapping[str, tuple[Any, Any]]
    """Field of the task or the preprocessing -> old and new value."""
    subgroups_changed: int
    """Images whose subgroup columns alone changed."""

    @property
    def nothing(self) -> bool:
        """Whether the two are the same."""
        return not any(
            (
                self.patients_added, self.patients_removed, self.images_added, self.images_removed,
                self.patients_with_changed_images, self.labels_changed, self.splits_changed, self.settings_changed,
                self.subgroups_changed,
            )
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def record(
    state: Path, cohort: Cohort, split: Mapping[str, str], recipe: Recipe, key: bytes, secret: bytes | None = None
) -> Path:
    """Keeps what a version is made of; one that is known is left as it is, and its samples are not read.

    Args:
        state: The site's folder for what must survive.
        split: Pseudonym -> side, at least of the cohort's patients.
        key: The site's secret.
        secret: 32 bytes with which the cache is encrypted, and then the records, also those of before; None: neither.

    Raises:
        StorageError: It cannot be written.
    """
    samples = cohort.samples
    folder = private_folder(private_folder(state) / _FOLDER)
    if secret is not None:
        _encrypt_plain_ones(folder, secret)
    with storing("a record of the cohort"):
        for suffix in (_ENCRYPTED, _PLAIN):
            if (path := folder / f"{cohort.manifest}{suffix}").exists():
                return path
    found: dict[str, list[tuple[str, Any, tuple[str, ...]]]] = {name: [] for name in samples.patients}
    columns = list(samples.subgroups.values())
    for row, (at, target) in enumerate(zip(samples.patient_N.tolist(), samples.targets_N.tolist(), strict=True)):
        digest = hmac.new(key, samples.x_N[row].tobytes(), "sha256").hexdigest()[:_HASH]
        label = [int(value) for value in target] if isinstance(target, list) else int(target)
        found[samples.patients[at]].append((digest, label, tuple(column[row] for column in columns)))
    plain = {
        "format": 1,
        "manifest": cohort.manifest,
        "recorded": utc_now(),
        "recipe": recipe.name,
        "settings": settings_of(recipe.task, recipe.data),
        "corrected": dict(cohort.corrected),
        "members": {
            name: {"split": split[name], "images": sorted(images, key=lambda each: (each[0], str(each[1]), each[2]))}
            for name, images in found.items()
        },
    }
    text = json.dumps({**plain, "seal": seal(plain, key)}).encode()
    path = folder / f"{cohort.manifest}{_PLAIN if secret is None else _ENCRYPTED}"
    write_whole(path, text if secret is None else seal_text(text, secret))
    return path


def _encrypt_plain_ones(folder: Path, secret: bytes) -> None:
    with storing("the records of the cohort"):
        for path in sorted(folder.glob(f"*{_PLAIN}")):
            write_whole(path.with_suffix(_ENCRYPTED), seal_text(path.read_bytes(), secret))
            path.unlink()


def known(state: Path, key: bytes, secret: bytes | None = None) -> tuple[Version, ...]:
    """All versions, the oldest first.

    Args:
        key, secret: As `record`.

    Raises:
        StorageError: One cannot be read, or was changed.
    """
    found = (_read(path, key, secret) for path in _paths(state))
    return tuple(sorted(found, key=lambda each: (each.recorded, each.manifest)))


def find(state: Path, key: bytes, prefix: str, secret: bytes | None = None) -> Version:
    """The version whose manifest begins so.

    Raises:
        ConfigError: The prefix is short, or fits several.
        DataError: It fits none.
        StorageError: The record cannot be read, or was changed.
    """
    prefix = prefix.lower()
    if len(prefix) < _LEAST_PREFIX or not set(prefix) <= set("0123456789abcdef"):
        raise ConfigError(f"a version is named by the first {_LEAST_PREFIX} or more digits of its manifest hash")
    paths = _paths(state, prefix)
    if len(paths) > 1:
        raise ConfigError(f"{len(paths)} versions begin with {prefix}; give more digits")
    if not paths:
        raise DataError(f"no version begins with {prefix}; `fedicom data diff` without names lists all")
    return _read(paths[0], key, secret)


def difference(old: Version, new: Version) -> Difference:
    """What changed."""
    both = sorted(old.members.keys() & new.members.keys())
    settings = _changed(old.settings, new.settings)
    comparable = not any(name.startswith("data.") for name in settings)
    classes = [version.settings.get("task", {}).get("classes", ()) for version in (old, new)]
    labels: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    added = removed = subgroups = 0
    changed = []
    for name in both:
        before, after = old.members[name], new.members[name]
        if before.split != after.split:
            splits[f"{before.split} -> {after.split}"] += 1
        one, two = _by_digest(before), _by_digest(after)
        if not comparable:
            added += max(0, len(after.images) - len(before.images))
            removed += max(0, len(before.images) - len(after.images))
            left, come_in = (Counter(_class_name(label, names) for _, label in each.images)
                             for each, names in zip((before, after), classes, strict=True))  # fmt: skip
            pairs = zip(sorted((left - come_in).elements()), sorted((come_in - left).elements()), strict=False)
            labels.update(f"{first} -> {second}" for first, second in pairs)
            continue
        gone, come = (_numbers(one) - _numbers(two)).total(), (_numbers(two) - _numbers(one)).total()
        if gone and come:
            changed.append(name)
        else:
            added, removed = added + come, removed + gone
        for digest in one.keys() & two.keys():
            for (label_1, group_1), (label_2, group_2) in zip(one[digest], two[digest], strict=False):
                first, second = _class_name(label_1, classes[0]), _class_name(label_2, classes[1])
                if first != second:
                    labels[f"{first} -> {second}"] += 1
                elif group_1 != group_2:
                    subgroups += 1
    return Difference(
        old=old.manifest,
        new=new.manifest,
        patients_added=tuple(sorted(new.members.keys() - old.members.keys())),
        patients_removed=tuple(sorted(old.members.keys() - new.members.keys())),
        images_added=added,
        images_removed=removed,
        images_comparable=comparable,
        patients_with_changed_images=tuple(changed),
        labels_changed=dict(sorted(labels.items())),
        splits_changed=dict(sorted(splits.items())),
        settings_changed=settings,
        subgroups_changed=subgroups,
    )


def _numbers(images: Mapping[str, list[tuple[Any, tuple[str, ...]]]]) -> Counter[str]:
    """Digest -> how many images have it."""
    return Counter({digest: len(same) for digest, same in images.items()})


def _by_digest(member: Member) -> dict[str, list[tuple[Any, tuple[str, ...]]]]:
    found: dict[str, list[tuple[Any, tuple[str, ...]]]] = {}
    for (digest, label), group in zip(member.images, member.subgroups, strict=True):
        found.setdefault(digest, []).append((label, group))
    return found


def _class_name(label: Any, classes: Any) -> str:
    if isinstance(label, int):
        return str(classes[label]) if label < len(classes) else f"class {label}"
    names = [str(name) for name, has in zip(classes, label, strict=False) if has]
    return " + ".join(names) or "none"


def _changed(old: Any, new: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for name in sorted(old.keys() | new.keys()):
            found |= _changed(old.get(name), new.get(name), f"{at}.{name}" if at else name)
        return found
    return {} if old == new else {at: (old, new)}


def _paths(state: Path, prefix: str = "") -> list[Path]:
    """Of the records whose manifest begins so, each once: a kill may leave one in both forms."""
    found: dict[str, Path] = {}
    with storing("the records of the cohort"):
        for suffix in (_PLAIN, _ENCRYPTED):
            found |= {path.stem: path for path in (state / _FOLDER).glob(f"{prefix}*{suffix}")}
    return [found[name] for name in sorted(found)]


def _read(path: Path, key: bytes, secret: bytes | None) -> Version:
    with storing("a record of the cohort"):
        data = path.read_bytes()
    if path.suffix == _ENCRYPTED:
        if secret is None:
            raise StorageError(
                f"the record of version {path.stem[:12]} is encrypted and there is no key; name the site with --site, "
                "and give site.yaml the cache.key that it had"
            )
        try:
            data = open_text(data, secret)
        except (StorageError, ValueError):
            raise StorageError(
                f"the record of version {path.stem[:12]} cannot be decrypted: cache.key is another one, or the record "
                "was changed; give the right key, or restore or remove the record"
            ) from None
    try:
        plain = json.loads(data)
        sealed = str(plain.pop("seal"))
        version = Version(
            manifest=str(plain["manifest"]),
            recorded=str(plain["recorded"]),
            recipe=str(plain["recipe"]),
            settings=dict(plain["settings"]),
            corrected=dict(plain["corrected"]),
            members={
                name: Member(
                    split=str(each["split"]),
                    images=tuple((str(digest), label) for digest, label, _ in each["images"]),
                    subgroups=tuple(tuple(groups) for _, _, groups in each["images"]),
                )
                for name, each in plain["members"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"the record of version {path.stem[:12]} cannot be read; restore or remove it") from None
    if not hmac.compare_digest(sealed, seal(plain, key)):
        raise StorageError(
            f"the record of version {path.stem[:12]} was changed, or was written with another site key; "
            "restore or remove it"
        )
    return version


def seal(plain: Mapping[str, Any], key: bytes) -> str:
    """HMAC-SHA256 under the site's key over all that a JSON object says: what a site keeps for itself."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), "sha256").hexdigest()
