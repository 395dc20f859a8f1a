"""`fedicom site preflight`: what may keep this node from working, one line each, with what to do about it.

Nothing is changed but the cache of prepared images, and nothing is sent but empty requests to the gateway: without
credentials, which it must refuse, and some that this node signs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from client.access import access
from client.approvals import Approval, Approvals
from client.budget import trouble
from client.machine import Level, Line, disk, gpu, packages, user
from client.policy import ledger_of, objections
from client.reach import elsewhere
from common import kit
from common.chain import TOLERANCE_S
from common.deployment import QualityGate, SiteConfig, SiteHome
from common.enrolment import WARN_DAYS, warnings
from common.epsilon import rounded_up
from common.errors import ConfigError, DataError, FedicomError
from common.identity import Signer
from common.imaging import Progress
from common.journal import own_events
from common.printable import number_of
from common.storage import storing

Check = Callable[[], Iterator[Line]]


def preflight(
    home: SiteHome,
    *,
    images: bool = True,
    probe: bool = True,
    others: Sequence[tuple[str, int]] | None = None,
    progress: Progress | None = None,
) -> Iterator[Line]:
    """Checks everything, and gives each line as soon as it is known.

    Args:
        images: Read the images of every approved recipe; False asks only whether the folder is there.
        probe: Try whether addresses other than the gateway can be reached.
        others: Those addresses; None takes a handful of well-known ones and other ports of the gateway's host.
        progress: Told (steps done, steps in all) while images are read.
    """
    checks: list[tuple[str, Check]] = [
        ("user", user),
        ("configuration", lambda: _configuration(home)),
        ("kit", lambda: _kit(home)),
        ("certificates", lambda: _certificates(home)),
        ("keys", lambda: _keys(home)),
        ("packages", packages),
        ("GPU", lambda: gpu(home.config)),
        ("disk", lambda: disk(home)),
        ("log", lambda: _log(home)),
        ("approval", lambda: _approvals(home)),
        ("budget", lambda: _budget(home)),
        ("images", lambda: _images(home, images, progress)),
        ("gateway", lambda: access(home)),
    ]
    if probe:
        checks.append(("elsewhere", lambda: elsewhere(home.config, others)))
    for what, check in checks:
        try:
            yield from check()
        except FedicomError as error:
            yield Line(level="FAIL", what=what, says=str(error), fix="mend this first, and run preflight again")
        except PermissionError as error:
            fix = "check its owner and mode: everything in the site's folder belongs to the user that runs the node"
            yield Line(level="FAIL", what=what, says=f"{error.filename}: {error.strerror}", fix=fix)
        except Exception as error:
            yield Line(level="FAIL", what=what, says=f"the check itself failed ({type(error).__name__}: {error})")


# The site's own files


def _configuration(home: SiteHome) -> Iterator[Line]:
    config = home.config
    private = "requires privacy" if config.policy.require_privacy else "allows recipes without privacy"
    private += " and secure aggregation" if config.policy.require_secure_aggregation else ""
    says = f"site {config.site} of {config.federation}; the policy {private}, at most epsilon {config.policy.epsilon:g}"
    yield Line(level="ok", what="configuration", says=says)
    if config.policy.seeded_noise:
        yield Line(
            level="warn",
            what="configuration",
            says="the policy allows noise that others can subtract (seeded_noise)",
            fix="set it to false unless every patient here is synthetic",
        )


def _kit(home: SiteHome) -> Iterator[Line]:
    found = kit.check_kit(home.path)
    for problem in found:
        says, _, fix = problem.partition("; ")
        yield Line(level="FAIL", what="kit", says=says, fix=fix or "unpack the kit again")
    registry = home.registry
    if not found:
        says = f"whole, signed by authority {registry.authority[:12]}; registry {registry.version} of {registry.issued}"
        yield Line(level="ok", what="kit", says=says)
    if datetime.now(UTC) < datetime.fromisoformat(registry.issued) - timedelta(seconds=TOLERANCE_S):
        yield Line(
            level="FAIL",
            what="clock",
            says=f"this machine's clock is before {registry.issued}, when the registry was made",
            fix=f"if {datetime.now(UTC):%Y-%m-%d %H:%M} UTC is wrong, set the clock, and keep it right with NTP or "
            "chrony; else the authority's was ahead: tell the coordinator",
        )


def _certificates(home: SiteHome) -> Iterator[Line]:
    found = warnings(home)
    for problem in found:
        says, _, fix = problem.partition("; ")
        level: Level = "warn" if " runs out " in says else "FAIL"
        yield Line(level=level, what="certificates", says=says, fix=fix)
    if not found:
        yield Line(level="ok", what="certificates", says=f"none runs out within {WARN_DAYS} days")


def _keys(home: SiteHome) -> Iterator[Line]:
    wrong = False
    with storing("the folder of keys"):
        mode = home.keys.stat().st_mode & 0o777
        files = [path for path in home.keys.rglob("*") if path.is_file()]
        modes = {path: (path.stat().st_mode & 0o777, path.stat().st_uid) for path in files}
    if mode & 0o077:
        wrong = True
        yield Line(level="FAIL", what="keys", says=f"the folder keys has mode {mode:o}", fix="run chmod 700 keys")
    for path, (mode, owner) in sorted(modes.items()):
        name = path.relative_to(home.path)
        if mode & 0o077:
            wrong = True
            yield Line(level="FAIL", what="keys", says=f"{name} has mode {mode:o}", fix=f"run chmod 600 {name}")
        if owner != os.geteuid():
            wrong = True
            yield Line(
                level="FAIL", what="keys", says=f"{name} belongs to another user", fix=f"run chown on {name} as root"
            )
    if not home.cohort_key.is_file():
        wrong = True
        yield Line(
            level="FAIL",
            what="keys",
            says="keys/cohort.key is missing",
            fix="restore it from a backup: with a new one every patient would get another split",
        )
    if not wrong:
        yield Line(level="ok", what="keys", says=f"{len(files)} private keys, readable by their owner alone")


def _log(home: SiteHome) -> Iterator[Line]:
    events = own_events(home.audit_file, home.signing_key)
    says = f"{number_of(len(events), 'event')}, whole and signed by this site" if events else "not begun yet"
    yield Line(level="ok", what="log", says=says)


def _approvals(home: SiteHome) -> Iterator[Line]:
    # What an approval is checked by comes first: a typo in site.yaml is no reason to withdraw one.
    config, _, _ = home.config, home.registry, Signer.load(home.signing_key)
    approvals = Approvals(home)
    ids = approvals.ids()
    for recipe_id in ids:
        try:
            approval = approvals.find(recipe_id)
        except ConfigError as error:
            fix = f"run fedicom site withdraw {recipe_id[:12]}"
            yield Line(level="FAIL", what="approval", says=str(error), fix=fix)
            continue
        if approval is not None:
            says = f"{approval.signed.recipe.name} {recipe_id[:12]}, approved by {approval.by} on {approval.time[:10]}"
            yield Line(level="ok", what="approval", says=says)
            yield from _objections(config, approval)
    if not ids:
        yield Line(
            level="warn",
            what="approval",
            says="no recipe is approved, so nothing will be trained",
            fix="read one with fedicom site review FILE, then fedicom site approve FILE",
        )


def _objections(config: SiteConfig, approval: Approval, patients: int | None = None) -> Iterator[Line]:
    for why in objections(approval.signed.recipe, config.policy, patients):
        yield Line(
            level="FAIL",
            what="policy",
            says=f"{approval.signed.recipe.name} {approval.recipe_id[:12]} is approved, but refused: {why}",
            fix="change the policy in site.yaml, or withdraw the recipe",
        )


def _budget(home: SiteHome) -> Iterator[Line]:
    policy = home.config.policy
    wrong = trouble(home)
    if wrong:
        yield Line(
            level="FAIL",
            what="budget",
            says=wrong,
            fix="put the newest copy of state/ledger.jsonl back; until then nothing private is trained",
        )
    if not home.ledger_file.exists():
        if not wrong:
            yield Line(level="ok", what="budget", says=f"epsilon {policy.epsilon:g}, nothing spent")
        return
    spent = ledger_of(home).spent()
    says = f"epsilon {rounded_up(spent)} of {policy.epsilon:g} spent at delta {policy.delta:g}"
    level: Level = "FAIL" if spent >= policy.epsilon else "warn" if spent > 0.9 * policy.epsilon else "ok"
    fix = (
        "" if level == "ok" else "no private recipe can run much longer on these patients; that is what the cap is for"
    )
    yield Line(level=level, what="budget", says=says, fix=fix)


def _images(home: SiteHome, read: bool, progress: Progress | None) -> Iterator[Line]:
    config = home.config
    if not config.data_folders:
        yield Line(level="FAIL", what="images", says="site.yaml names no data folder", fix="set data in site.yaml")
        return
    for folder in config.data_folders:
        if not (home.path / folder / "labels.csv").is_file():
            which = "the data folder" if len(config.data_folders) == 1 else f"the data folder {folder}"
            yield Line(
                level="FAIL",
                what="images",
                says=f"{which} is missing, or holds no labels.csv that this user can read",
                fix="check data in site.yaml and the folder's owner; docs/data.md says what it holds",
            )
            return
    approved = Approvals(home).all()
    if not approved or not read:
        why = "counted when a recipe is reviewed or approved" if not approved else "not read, as asked"
        there = "the folder" if len(config.data_folders) == 1 else f"{len(config.data_folders)} folders"
        yield Line(level="ok", what="images", says=f"{there} and labels.csv are there; {why}")
        return
    for approval in approved:
        yield from _cohort(home, approval, progress)


def _cohort(home: SiteHome, approval: Approval, progress: Progress | None) -> Iterator[Line]:
    from client.cohort import site_cohort

    config = home.config
    recipe = approval.signed.recipe
    if config.quality is not None:
        yield from _quality(home, config.quality, recipe.name)
    try:
        cohort = site_cohort(home, recipe, progress)
    except FedicomError as error:
        yield Line(
            level="FAIL",
            what="images",
            says=f"{recipe.name}: {error}",
            fix="mend the images or labels.csv; docs/data.md tells every reason",
        )
        return
    patients = cohort.patients("train")
    used, lost = len(cohort.samples.patient_N), sum(cohort.refused.values())
    of = number_of(len(cohort.samples.patients), "patient")
    says = f"{recipe.name}: {number_of(used, 'image')} of {of}, {patients} to train on"
    codes = ", ".join(f"{code} {count}" for code, count in sorted(cohort.refused.items()))
    many = lost > used / 4
    yield Line(
        level="warn" if many else "ok",
        what="images",
        says=says + (f"; {number_of(lost, 'file')} not used: {codes}" if lost else ""),
        fix="look whether these files should be used; docs/data.md explains each code" if many else "",
    )
    least = min(cohort.class_counts("train").tolist())
    if least < config.policy.min_cell:
        yield Line(
            level="warn",
            what="labels",
            says=f"{recipe.name}: a class has only {least} training patients",
            fix="check labels.csv; so few teach little",
        )
    if not objections(recipe, config.policy):
        yield from _objections(config, approval, patients)


def _quality(home: SiteHome, gate: QualityGate, recipe: str) -> Iterator[Line]:
    from client.quality.gate import QualityError, require_quality

    try:
        require_quality(home, gate, recipe)
    except QualityError as error:
        yield Line(
            level="FAIL",
            what="quality",
            says=f"{recipe}: {error}",
            fix="look at the report and mend the data, then run fedicom data report with --site; or change the limits",
        )
    except DataError:
        return  # there is no folder for it, which is told with the images
    else:
        says = f"{recipe}: the newest report is about these images, and keeps the limits"
        yield Line(level="ok", what="quality", says=says)
