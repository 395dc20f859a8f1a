"""Makes and keeps the keys of a federation: provision, add, revoke, rotate.

The folder `authority` signs the registry and the kits. It belongs on a machine without network, and every change
to it is an event of its audit log.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from common.audit import AuditLog
from common.clock import utc_now
from common.config import validate_json
from common.deployment import FederationPlan, read_yaml
from common.enrolment import PublicKeys, login, read_public
from common.errors import ConfigError, StorageError
from common.identity import AUTHORITY_ENDS, Certificate, NodeKey, Signer, expiring, new_signing_key, read_private
from common.kit import NODE, SIGNING, Files, new_folder, pack, put, signed_kit
from common.registry import COORDINATOR, Member, Registry, read_registry
from common.storage import commit, drop_unfinished, locked, storing, write_whole
from common.vault import Secret, new_passphrase
from server.certificates import CertificateAuthority
from server.kit_contents import auditor_files, certificates, coordinator_files, join_files, site_files
from server.tokens import new_token

AUTHORITY, GATEWAY = "authority", "gateway"

_NO_FILES: Files = {}
_Sealing = Callable[[str], Secret]
"""Kit name -> what seals it."""


def provision(
    plan: FederationPlan, out: Path, *, encrypt: bool = False, passphrase: Secret | bytes | None = None, by: str = ""
) -> tuple[str, ...]:
    """Makes a federation: `out/authority`, and a kit for the coordinator, each site and each auditor.

    All appears at once, or nothing.

    Args:
        encrypt: Kits are sealed files `<name>.kit` instead of folders.
        passphrase: Of all of them; None gives each its own, kept in `authority/passphrases`.
        by: Who does this, for the log; "" takes the login name.

    Returns:
        What to give to whom, a sentence each; nothing secret.

    Raises:
        ConfigError: A host is no host, or two kits would have the same name.
        StorageError: `out` holds something already, or cannot be written.
    """
    _check_names(plan)
    signer_key = new_signing_key()
    signer = Signer.from_bytes(signer_key)
    ca = CertificateAuthority.new(plan.name, (plan.host, *plan.also_hosts))
    coordinator_key = new_signing_key()
    site_keys = {site: (new_signing_key(), NodeKey.new()) for site in plan.sites}
    moment = utc_now()
    registry = _registry(
        Registry(
            federation=plan.name,
            version=1,
            issued=moment,
            authority=signer.public,
            coordinator=Signer.from_bytes(coordinator_key).public,
            sites={
                site: Member(signing=Signer.from_bytes(signing).public, node=node.public, since=moment)
                for site, (signing, node) in site_keys.items()
            },
            auditors=plan.auditors,
        )
    )
    tokens = {auditor: new_token() for auditor in plan.auditors}
    parts: dict[str, Files] = {COORDINATOR: coordinator_files(plan, ca, coordinator_key, signer.public, tokens)}
    for site, (signing, node) in site_keys.items():
        parts[site] = site_files(plan, site, signer.public, signing, node)
    for auditor, token in tokens.items():
        parts[f"auditor-{auditor}"] = auditor_files(plan, auditor, signer.public, token)
    kits = {
        name: signed_kit({**files, "trust/ca.crt": ca.certificate_pem}, registry, name, moment, signer)
        for name, files in parts.items()
    }
    with new_folder(out) as part:
        folder = part / AUTHORITY
        put(
            {
                "authority.key": signer_key,
                "ca.key": ca.key_pem,
                "ca.crt": ca.certificate_pem,
                "federation.yaml": _plan_yaml(plan),
                "registry.json": registry.signed(signer),
            },
            folder,
        )
        AuditLog(folder / "audit.jsonl", signer).append(
            "operator action",
            who=by or login(),
            action="federation provisioned",
            version=1,
            coordinator=registry.coordinator,
            sites={site: member.signing for site, member in registry.sites.items()},
            ca=Certificate.load(folder / "ca.crt").fingerprint,
        )
        sealing = _sealing(folder, encrypt, passphrase)
        for name, files in kits.items():
            _hand_out(name, files, part, sealing)
    return _told(kits, out, sealed=encrypt or passphrase is not None, own=passphrase is None, authority=signer.public)


def add(
    authority: Path,
    name: str,
    *,
    public: Path | None = None,
    out: Path | None = None,
    encrypt: bool = False,
    passphrase: Secret | bytes | None = None,
    by: str = "",
) -> tuple[str, ...]:
    """Adds a site, or takes a revoked one back under new keys; the registry's version grows by one.

    When the kit is lost, on its way or by a crash after the registry: `rotate` with the same public keys makes it
    again; a site without any home is revoked and added anew.

    Args:
        authority: The authority's folder.
        public: What the site sent when it made its own keys; its kit then has no private ones. None makes them here.
        out: Folder for the kit; None takes the one that the authority's folder lies in.

    Returns:
        What to give to whom, a sentence each.

    Raises:
        ConfigError: The name is taken, or the public keys are of another site, of somebody else, or used before.
        StorageError: A file cannot be read or written, or the kit exists.
    """
    with _Authority.opened(authority) as house:
        registry, plan = house.registry, house.plan
        before = registry.sites.get(name)
        if before is not None and before.revoked is None:
            raise ConfigError(
                f"{name} takes part already; `fedicom provision rotate {name}` gives it new keys. If its kit was lost "
                f"before {name} opened it: `fedicom provision revoke {name}`, and add it again"
            )
        plan = _with_site(plan, name)
        return house.enrol(name, plan, public, "site added", out, _sealing(authority, encrypt, passphrase), by)


def rotate(
    authority: Path,
    name: str,
    *,
    public: Path | None = None,
    out: Path | None = None,
    encrypt: bool = False,
    passphrase: Secret | bytes | None = None,
    by: str = "",
) -> tuple[str, ...]:
    """New keys for a site or the `coordinator`; new certificates for the `gateway`, or the `authority` and the gateway.

    Old signing keys stay in the registry as retired: what they signed can still be verified, and they open nothing.
    The certificate follows `authority/federation.yaml`, which may be edited before.

    Args:
        public: As in `add`. Those that the registry has already make the site's kit again: the first one may be lost.
        out: As in `add`; a kit is called `<name>-<version of the registry>`.

    Returns:
        What to give to whom, a sentence each.

    Raises:
        ConfigError: There is no such member, or it was revoked.
        StorageError: A file cannot be read or written.
    """
    with _Authority.opened(authority) as house:
        sealing = _sealing(authority, encrypt, passphrase)
        if name == AUTHORITY:
            return house.renew_authority(out, sealing, by)
        if name == GATEWAY:
            return house.renew_gateway(out, sealing, by)
        if name == COORDINATOR:
            return house.renew_coordinator(out, sealing, by)
        if house.registry.sites.get(name) is None:
            raise ConfigError(f"there is no site {name!r}; `fedicom provision list` shows who takes part")
        if name not in house.registry.members:
            raise ConfigError(f"{name} was revoked; `fedicom provision add {name}` takes it back under new keys")
        return house.enrol(name, house.plan, public, "keys rotated", out, sealing, by)


def revoke(authority: Path, name: str, why: str, *, by: str = "") -> tuple[str, ...]:
    """Ends a site's membership: with the new registry the coordinator refuses it at its next call.

    Returns:
        What to give to whom, a sentence each.

    Raises:
        ConfigError: There is no such site, it is revoked already, or `why` is empty or not one line.
        StorageError: A file cannot be read or written.
    """
    with _Authority.opened(authority) as house:
        registry = house.registry
        member = registry.sites.get(name)
        if member is None or member.revoked is not None:
            state = "was revoked before" if member is not None else "is no site of this federation"
            # Perhaps by a command that was cut off and said nothing.
            then = f". {_registry_advice(authority, registry.version)}" if member is not None else ""
            raise ConfigError(f"{name} {state}; `fedicom provision list` shows who takes part{then}")
        if not why.strip():
            raise ConfigError("a revocation needs a reason, one line; it stands in the registry and in the log")
        gone = _with(member, revoked=utc_now(), why=why.strip())
        new = house.changed(registry, sites={**registry.sites, name: gone})
        plan = replace(house.plan, sites=tuple(site for site in house.plan.sites if site != name))
        house.commit(new, plan, "keys revoked", by, site=name, public_key=member.signing, why=why.strip())
    return (
        _registry_advice(authority, new.version),
        f"{name} is refused from then on; it keeps its data, its ledger and its log",
    )


def members(authority: Path) -> tuple[str, ...]:
    """Who takes part, under which keys, and what runs out, a line each.

    Raises:
        ConfigError: This is no authority's folder, or its registry does not hold.
        StorageError: A file cannot be read.
    """
    with _Authority.opened(authority) as house:
        registry = house.registry
        lines = [
            f"{registry.federation}, registry of version {registry.version}, {registry.issued}",
            f"{COORDINATOR}: key {registry.coordinator[:16]}",
        ]
        for name, member in sorted(registry.sites.items()):
            state = f"since {member.since}" if member.revoked is None else f"revoked {member.revoked}: {member.why}"
            lines.append(f"{name}: key {member.signing[:16]}, {state}")
        lines += [f"auditor {name}" for name in registry.auditors]
        lines += [sentence for sentence in (expiring(authority / "ca.crt", 365, then=AUTHORITY_ENDS),) if sentence]
    return tuple(lines)


class _Authority:
    """The authority's folder, held against a second process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.signer = Signer.load(path / "authority.key")
        self.plan = read_yaml(path / "federation.yaml", FederationPlan)
        self.registry = read_registry(path / "registry.json", self.signer.public)
        if self.plan.name != self.registry.federation:
            raise ConfigError(f"federation.yaml says name: {self.plan.name}, expected {self.registry.federation}")

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[_Authority]:
        if not (path / "authority.key").is_file():
            raise ConfigError(
                f"{path} is no authority's folder; work in it, or give --authority, the folder that provision made and "
                "you keep"
            )
        with locked(path):
            drop_unfinished(path, below=True)
            yield cls(path)

    @property
    def ca_pem(self) -> bytes:
        with storing("ca.crt"):
            return (self.path / "ca.crt").read_bytes()

    def changed(self, registry: Registry, **changes: object) -> Registry:
        """The next registry; every rule is checked."""
        plain = {**asdict(registry), **{key: _plain(value) for key, value in changes.items()}}
        plain |= {"version": registry.version + 1, "issued": utc_now()}
        return validate_json(Registry, json.dumps(plain))

    def commit(
        self,
        registry: Registry,
        plan: FederationPlan,
        action: str,
        by: str,
        files: Files = _NO_FILES,
        /,
        **facts: str,
    ) -> None:
        """Log first, registry last: a registry without its event cannot be.

        Args:
            files: Of the authority's folder, to be replaced.
        """
        AuditLog(self.path / "audit.jsonl", self.signer).append(
            "operator action", who=by or login(), action=action, version=registry.version, **facts
        )
        if plan != self.plan:
            put({"federation.yaml": _plan_yaml(plan)}, self.path)
        put({**files, "registry.json": registry.signed(self.signer)}, self.path)

    def enrol(
        self,
        name: str,
        plan: FederationPlan,
        public: Path | None,
        action: str,
        out: Path | None,
        sealing: _Sealing | None,
        by: str,
    ) -> tuple[str, ...]:
        """New keys for a site that is new, comes back, or takes part."""
        before, registry = self.registry.sites.get(name), self.registry
        renews = name in registry.members
        sent = read_public(public) if public is not None else None
        if sent is not None:
            _check_sent(sent, name, registry)
            signing, node = None, None
            member = Member(signing=sent.signing, node=sent.node, since=utc_now())
            if renews and before is not None and _same_keys(sent, before):
                member, action = before, "kit made again"
        else:
            signing, node = new_signing_key(), NodeKey.new()
            member = Member(signing=Signer.from_bytes(signing).public, node=node.public, since=utc_now())
        retired = {key: tuple(value) for key, value in registry.retired.items()}
        if before is not None and before.signing != member.signing:
            retired[name] = (*retired.get(name, ()), before.signing)
        new = self.changed(registry, sites={**registry.sites, name: member}, retired=retired)
        if renews:
            files: Files = join_files(plan.name, name, "new keys", "fedicom site join KIT", self.signer.public)
            if signing is not None and node is not None:
                files = {**files, SIGNING: signing, NODE: node.private}
        else:
            files = site_files(plan, name, self.signer.public, signing, node)
        kit_name = f"{name}-{new.version}" if renews else name
        kit = signed_kit({**files, "trust/ca.crt": self.ca_pem}, new, name, new.issued, self.signer)
        where = self._publish(kit_name, kit, out, sealing, new, plan, action, by, site=name, public_key=member.signing)
        told = [_registry_advice(self.path, new.version)]
        if sent is not None:
            told.insert(0, f"compare the site's signing key by telephone: {sent.signing}")
            told.append(f"{where} to {name}, which runs `fedicom site join`; there is nothing secret in it")
        else:
            verb = "which runs `fedicom site join`" if renews else "over a channel that nobody else reads"
            told.append(f"{where} to {name}, {verb}; then delete it here")
        if before is not None and not renews:
            told.append(
                f"{name} puts it into the home that it has (`fedicom site join`): its ledger and its log are there"
            )
        return tuple(told)

    def renew_coordinator(self, out: Path | None, sealing: _Sealing | None, by: str) -> tuple[str, ...]:
        key = new_signing_key()
        public, registry = Signer.from_bytes(key).public, self.registry
        retired = {name: tuple(value) for name, value in registry.retired.items()}
        retired[COORDINATOR] = (*retired.get(COORDINATOR, ()), registry.coordinator)
        new = self.changed(registry, coordinator=public, retired=retired)
        where = self._for_coordinator("a new signing key", {SIGNING: key}, new, "keys rotated", out, sealing, by)
        return (
            f"{where} to the coordinator: `fedicom provision install KIT --home DIR`, then a restart",
            f"{self.path / 'registry.json'} to every site: `fedicom site join registry.json`; until then a site "
            "refuses the coordinator's messages",
            "recipes have to be signed again, and approved again at every site",
        )

    def renew_gateway(self, out: Path | None, sealing: _Sealing | None, by: str) -> tuple[str, ...]:
        files = certificates(self.plan, self.ca())
        new = self.changed(self.registry)
        what = "new certificates"
        where = self._for_coordinator(what, files, new, "certificates renewed", out, sealing, by)
        told = [
            f"{where} to the coordinator: `fedicom provision install KIT --home DIR`; it takes effect within a minute",
            "the sites have nothing to do: they trust the authority, not the certificate",
        ]
        # No certificate outlives the authority's: this one would be shorter than planned.
        soon = expiring(self.path / "ca.crt", self.plan.valid_days, then=AUTHORITY_ENDS)
        return (*told, soon) if soon else tuple(told)

    def renew_authority(self, out: Path | None, sealing: _Sealing | None, by: str) -> tuple[str, ...]:
        old, ca = Certificate.load(self.path / "ca.crt"), self.ca().renewed()
        new, pem = self.changed(self.registry), ca.certificate_pem
        takes = {COORDINATOR: "fedicom provision install KIT", **dict.fromkeys(new.members, "fedicom site join KIT")}
        name = f"certificates-{new.version}"
        folder = self._folder(out, name) / name
        with new_folder(folder) as part:
            for owner, verb in takes.items():
                what = "a new certificate of the authority"
                files: Files = join_files(self.plan.name, owner, what, verb, self.signer.public)
                if owner == COORDINATOR:  # what it has ends with the old one
                    files = {**files, **certificates(self.plan, ca)}
                kit = signed_kit({**files, "trust/ca.crt": pem}, new, owner, new.issued, self.signer)
                _hand_out(f"{owner}-{new.version}", kit, part, sealing)
            done, fingerprint = "authority's certificate renewed", Certificate.parse(pem).fingerprint
            self.commit(new, self.plan, done, by, {"ca.crt": pem}, ca=fingerprint)
        return (
            f"{folder}: {COORDINATOR}-{new.version} to the coordinator: `fedicom provision install KIT --home DIR`; "
            "it takes effect within a minute, and the gateway's certificate is renewed with it",
            "the kit of each site to that site, nothing in it is secret: `fedicom site join KIT`",
            f"in any order, before {old.ends:%Y-%m-%d %H:%M} UTC; a site without its kit cannot connect from then on",
        )

    def ca(self) -> CertificateAuthority:
        return CertificateAuthority.load(read_private(self.path / "ca.key", "a CA key"), self.ca_pem)

    def _for_coordinator(
        self, what: str, files: Files, new: Registry, action: str, out: Path | None, sealing: _Sealing | None, by: str
    ) -> str:
        page = join_files(self.plan.name, COORDINATOR, what, "fedicom provision install KIT", self.signer.public)
        kit = signed_kit({**page, **files, "trust/ca.crt": self.ca_pem}, new, COORDINATOR, new.issued, self.signer)
        name = f"{COORDINATOR}-{new.version}"
        return self._publish(name, kit, out, sealing, new, self.plan, action, by, coordinator=new.coordinator)

    def _publish(
        self,
        name: str,
        kit: Files,
        out: Path | None,
        sealing: _Sealing | None,
        registry: Registry,
        plan: FederationPlan,
        action: str,
        by: str,
        **facts: str,
    ) -> str:
        """Writes the kit under another name, commits, and gives the kit its name; returns where it is."""
        folder = self._folder(out, name)
        if sealing is None:
            with new_folder(folder / name) as part:
                put(kit, part)
                self.commit(registry, plan, action, by, **facts)
            return str(folder / name)
        place = folder / f"{name}.kit"
        if place.exists():
            raise StorageError(f"{place.name} exists; kits are never overwritten: choose another --out")
        part = place.with_name(f".{place.name}.partial")
        try:
            write_whole(part, pack(kit, sealing(name)))
            self.commit(registry, plan, action, by, **facts)
            with storing(place.name):
                commit(part, place)
        finally:
            part.unlink(missing_ok=True)
        return str(place)

    def _folder(self, out: Path | None, name: str) -> Path:
        """Where a kit of this name goes, without what a kill left of an earlier one.

        That has private keys in it, and no name under which it would be made again.
        """
        folder = out if out is not None else self.path.parent
        with storing(folder.name):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{glob.escape(name.rpartition('-')[0])}-*.partial"):
                left.unlink() if left.is_file() else shutil.rmtree(left)
            drop_unfinished(folder, ".*.kit.partial.*")
        return folder


def _with(member: Member, **changes: str) -> Member:
    return validate_json(Member, json.dumps({**asdict(member), **changes}))


def _check_names(plan: FederationPlan) -> None:
    names = [AUTHORITY, COORDINATOR, GATEWAY, *plan.sites, *(f"auditor-{auditor}" for auditor in plan.auditors)]
    # A kit is a folder: some file systems do not tell North from north, and `north.kit` is a sealed north.
    names = [name.casefold().removesuffix(".kit") for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two kits would be called {twice[0]}; names must differ in more than capitals")


def _check_sent(sent: PublicKeys, name: str, registry: Registry) -> None:
    if (sent.site, sent.federation) != (name, registry.federation):
        raise ConfigError(
            f"the public keys are of {sent.site} in {sent.federation}, expected {name} in {registry.federation}"
        )
    before = registry.sites.get(name)
    if before is None or (before.revoked is None and _same_keys(sent, before)):
        return
    if sent.signing == before.signing or sent.node == before.node:
        raise ConfigError(f"these are the keys that {name} has already; `fedicom site init --renew` makes new ones")
    if before.revoked is None and sent.previous != before.signing:
        raise ConfigError(
            f"the new keys are not signed with the key that {name} has now, so anybody could have sent them; if it "
            f"lost its key: `fedicom provision revoke {name}`, and add it again after a call"
        )


def _same_keys(sent: PublicKeys, member: Member) -> bool:
    return (sent.signing, sent.node) == (member.signing, member.node)


def _with_site(plan: FederationPlan, name: str) -> FederationPlan:
    sites = (*(site for site in plan.sites if site != name), name)
    new = validate_json(FederationPlan, json.dumps({**asdict(plan), "sites": sites}))
    _check_names(new)
    return new


def _registry(registry: Registry) -> Registry:
    return validate_json(Registry, json.dumps(asdict(registry)))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: asdict(item) if isinstance(item, Member) else item for key, item in value.items()}
    return value


def _plan_yaml(plan: FederationPlan) -> bytes:
    plain = json.loads(json.dumps(asdict(plan)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode()


def _sealing(authority: Path, encrypt: bool, passphrase: Secret | bytes | None) -> _Sealing | None:
    if passphrase is not None:
        one = passphrase if isinstance(passphrase, Secret) else Secret.passphrase(passphrase)
        return lambda name: one
    if not encrypt:
        return None

    def own(name: str) -> Secret:
        words = new_passphrase()
        put({f"passphrases/{name}.passphrase": f"{words}\n".encode()}, authority)
        return Secret.passphrase(words)

    return own


def _hand_out(name: str, files: Files, folder: Path, sealing: _Sealing | None) -> None:
    if sealing is None:
        put(files, folder / name)
    else:
        put({f"{name}.kit": pack(files, sealing(name))}, folder)


def _told(kits: Mapping[str, Files], out: Path, *, sealed: bool, own: bool, authority: str) -> tuple[str, ...]:
    lines = [f"{out / AUTHORITY}: keep it on a machine without network, and a copy of it in a safe"]
    for name in kits:
        whom = "the coordinator's server" if name == COORDINATOR else name.removeprefix("auditor-")
        lines.append(f"{out / name}{'.kit' if sealed else ''} to {whom}")
    if sealed:
        words = f"{out / AUTHORITY / 'passphrases'}" if own else "the passphrase that you gave"
        lines.append(f"tell each of them the passphrase by telephone ({words}); `fedicom site unpack` asks for it")
    else:
        lines.append("send them over a channel that nobody else reads, or make them again with --encrypt")
    lines.append("delete here what was sent; only the authority's folder is needed again")
    lines.append(f"read the authority's key to each of them by telephone: {authority}")
    return tuple(lines)


def _registry_advice(authority: Path, version: int) -> str:
    return (
        f"{authority / 'registry.json'} (version {version}) to the coordinator's server: "
        "`fedicom provision registry registry.json --home DIR`; it takes effect at once"
    )
