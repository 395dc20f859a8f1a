"""Secure aggregation through whole rounds: the same model as without, in simulation and with deployed sites."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.app import client_app
from client.approvals import Approvals
from client.cohort import open_cohort
from client.ledger import Ledger
from client.policy import ledger_policy
from client.resident import Resident
from client.secure import Sums, noise_norm
from client.site import Site
from common.audit import AuditLog, verify, verify_against
from common.config import Federation, Privacy, Recipe, Settings, Training
from common.deployment import FederationPlan, Policy, ServerHome, SiteHome
from common.errors import QuorumError
from common.exchange import Answer, Ask, Box, Hello, Masking, Question, Refusal, RoundPlan, Survivors, Update
from common.fixed import FixedPoint, Residues, Words
from common.identity import Signer, read_private
from common.journal import SharedLog
from common.models import build, get_weights
from common.secagg import Member
from common.signed import sign_recipe
from common.weights import Weights
from server.app import FlowerTransport
from server.coordinator import coordinate
from server.provision import provision
from server.rounds import ServerState
from simulations.grid import InProcessGrid
from simulations.rehearsal import edit
from simulations.run import simulate
from tests.server.house import RECIPE as HOUSE_RECIPE
from tests.server.small_sites import _cohort, _model
from tests.test_federation import SEEDED, SITES, hospitals, no_export, settings_of, weights_of  # noqa: F401

SECURE = Privacy(secure_aggregation=True)
FEDERATION = Federation(sites=3, quorum=3, max_update_norm=100.0)


def secured(settings: Settings, **federation: object) -> Settings:
    recipe = settings.recipe
    changed = replace(
        recipe,
        privacy=replace(recipe.privacy, secure_aggregation=True),
        federation=replace(FEDERATION, **federation),
    )
    return replace(settings, recipe=changed)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_secure_run_gives_the_model_of_a_plain_one_to_the_steps_of_its_fixed_point(
    tmp_path: Path,
    hospitals: Path,  # noqa: F811
    no_export: None,  # noqa: F811
    weighted: bool,
) -> None:
    weights = {"site_weights": "patients", "max_patients": 40} if weighted else {}
    private = Privacy() if weighted else SEEDED
    plain = settings_of(tmp_path / "plain", hospitals, private, rounds=1, federation=replace(FEDERATION, **weights))
    simulate(plain)
    secure = secured(replace(plain, out=str(tmp_path / "secure")), **weights)
    simulate(secure)
    one, other = weights_of(plain), weights_of(secure)
    # 100 in 2^31 / 3 is 2^22.8 steps: 2^-22, and 2^-17 for weights up to 40; the sum of 3 is off by half a step each.
    assert secure.recipe.fixed_point.bits == (17 if weighted else 22)
    total = 3 if not weighted else sum(_patients(Path(plain.out or "")))
    half = 3 * 2.0**-secure.recipe.fixed_point.bits / 2 / total
    for name, values in other.items():
        assert np.abs(values - one[name]).max() <= half + 2.0**-23 * max(1.0, float(np.abs(one[name]).max()))
    logs(Path(secure.out or ""))


def _patients(out: Path) -> list[int]:
    hellos = json.loads((out / "checkpoints" / "sites.json").read_text())
    return [hello["patients"]["train"] for hello in hellos.values()]


def logs(out: Path) -> None:
    server = verify(out / "audit" / "server.jsonl")
    (round_,) = [event for event in server if event.kind == "round aggregated"]
    for site in SITES:
        events = verify(out / "audit" / f"{site}.jsonl")
        assert verify_against(events, server, name=site) >= 2
        assert verify_against(server, events) >= 2
        told = [
            event.kind for event in events if event.kind in ("update kept", "sum joined", "update sent", "sum opened")
        ]
        assert told == ["update kept", "sum joined", "update sent", "sum opened"]
        (sent,) = [event for event in events if event.kind == "update sent"]
        assert sent.facts["digest"] == round_.facts["admitted"][site]["digest"]
        assert sent.facts["session"] == round_.facts["session"]


# Deployed sites: kits, approvals, signed messages, keys from the pinned registry


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory, hospitals: Path) -> Path:  # noqa: F811
    """Kits whose sites have prepared their images already."""
    kits = tmp_path_factory.mktemp("provisioned") / "kits"
    provision(FederationPlan(name="trial", host="127.0.0.1", sites=SITES), kits)
    recipe = settings_of(kits, hospitals).recipe
    for site in SITES:
        home = SiteHome(kits / site)
        policy = {"min_patients": 1, "min_cell": 3, "require_privacy": False, "delta": 1e-3}
        edit(home.path / "site.yaml", data=str(hospitals / site), device="cpu", policy=policy)
        open_cohort(hospitals / site, recipe, cache=home.cache, key=read_private(home.cohort_key, "a cohort key"))
    return kits


class Federated:
    """Three residents with real kits and the coordinator's transport; every message is signed and checked."""

    def __init__(self, folder: Path, provisioned: Path, recipe: Recipe) -> None:
        kits = Path(shutil.copytree(provisioned, folder / "kits"))
        self.coordinator = Signer.load(kits / "coordinator" / "keys" / "signing.key")
        self.homes = {site: SiteHome(kits / site) for site in SITES}
        self.recipe, self.folder = recipe, folder
        self.residents: dict[str, Resident] = {}
        self.mute: set[tuple[str, str]] = set()
        """Sites that answer no message of this kind."""
        self.received = bytearray()
        """Everything that sites sent to the coordinator, one message after the other."""
        for site, home in self.homes.items():
            log = SharedLog(home.audit_file, Signer.load(home.signing_key))
            Approvals(home).approve(sign_recipe(recipe, self.coordinator), by="Dr Roe", log=log)
            self.start(site)
        registry = ServerHome(kits / "coordinator").registry
        self.keys = {site: member.signing for site, member in registry.members.items()}

    def start(self, site: str) -> None:
        """As after a crash: nothing but the folder is left."""
        resident = self.residents[site] = Resident(self.homes[site])
        resident.start()

    def answer(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["site"])
        home = self.homes[site]
        kind = str(message.content.config_records["message"]["kind"])
        if (site, kind) in self.mute:
            return Message(Error(code=2, reason="gone"), reply_to=message)
        app = client_app(
            lambda _: self.residents[site],
            coordinator=lambda: home.registry.coordinator,
            signer=Signer.load(home.signing_key),
        )
        answer = app(message, context)
        for record in answer.content.array_records.values():
            for array in record.values():
                self.received += array.data
        for config in answer.content.config_records.values():
            for value in config.values():
                self.received += value if isinstance(value, bytes) else str(value).encode()
        return answer

    def run(self, name: str = "run") -> ServerState:
        out = self.folder / name
        audit = AuditLog(out / "audit.jsonl", self.coordinator)
        grid = InProcessGrid(SITES, cast(ClientApp, self.answer))
        transport = FlowerTransport(grid, signer=self.coordinator, keys=lambda: self.keys)
        return coordinate(self.recipe, transport, out, audit=audit, resume=True).state

    def kinds(self, site: str) -> list[str]:
        return [event.kind for event in verify(self.homes[site].audit_file)]


def quick(recipe: Recipe, **federation: object) -> Recipe:
    given = {"timeout_s": 30.0, "offline_s": 0.0} | federation
    return replace(recipe, federation=replace(recipe.federation, **given))


def test_deployed_sites_sum_over_signed_messages_and_no_byte_of_them_is_of_an_update(
    tmp_path: Path,
    hospitals: Path,  # noqa: F811
    provisioned: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain: list[bytes] = []
    sent: list[bytes] = []
    encode, mask = FixedPoint.encode, Member.mask

    def encoded(self: FixedPoint, delta: Weights, weight: int) -> Words:
        words = encode(self, delta, weight)
        plain.extend((words.tobytes(), b"".join(delta[name].tobytes() for name in delta)))
        return words

    def masked(self: Member, session: str, boxes: Mapping[str, Box], words: Words) -> Residues:
        found = mask(self, session, boxes, words)
        sent.append(found.words.tobytes())
        return found

    monkeypatch.setattr(FixedPoint, "encode", encoded)
    monkeypatch.setattr(Member, "mask", masked)
    settings = secured(settings_of(tmp_path / "simulated", hospitals, rounds=1))
    recipe = quick(settings.recipe)
    deployed = Federated(tmp_path, provisioned, recipe)
    state = deployed.run()
    assert state.done
    assert (len(plain), len(sent)) == (2 * len(SITES), len(SITES))
    heard = windows(bytes(deployed.received))
    assert [share_in(heard, words) > 0.99 for words in sent] == [True] * 3, "the tap hears what is sent"
    # Two numbers of an update side by side, anywhere: by chance once in ten million runs.
    assert [share_in(heard, words) for words in plain] == [0] * 6
    (trained, _) = state.history
    assert sorted(trained.accepted) == sorted(SITES)
    assert trained.session
    for site in SITES:
        kinds = deployed.kinds(site)
        assert [kinds.count(kind) for kind in ("update kept", "sum joined", "update sent", "sum opened")] == [1] * 4
        assert deployed.residents[site].state.updates == 1
        assert deployed.residents[site].state.bytes_sent == 4 * (state.weights.size + 1)


def windows(view: bytes) -> npt.NDArray[np.uint64]:
    """Every 8 bytes in a row, at any place, sorted."""
    return np.unique(np.concatenate([np.frombuffer(view[k : k + (len(view) - k) // 8 * 8], "<u8") for k in range(8)]))


def share_in(heard: npt.NDArray[np.uint64], words: bytes) -> float:
    """Share of neighbouring numbers of 4 bytes that stand in it; pairs of like bytes, zeros above all, are left out."""
    pairs = np.frombuffer(words[: len(words) // 8 * 8], "<u8")
    rich = pairs[[len(set(pair.tobytes())) > 4 for pair in pairs]]
    return float((heard[np.minimum(np.searchsorted(heard, rich), len(heard) - 1)] == rich).mean())


def test_a_site_that_dies_between_two_steps_costs_the_sum_and_not_the_round(
    tmp_path: Path,
    hospitals: Path,  # noqa: F811
    provisioned: Path,
) -> None:
    # Of three sites all are needed. One starts again after it shared out: its keys are gone, the second sum is whole.
    recipe = quick(secured(settings_of(tmp_path / "unused", hospitals, rounds=1)).recipe)
    deployed = Federated(tmp_path, provisioned, recipe)
    died: list[str] = []

    class Mortal(Resident):
        def step(self, ask: Ask) -> Answer | Refusal:
            if isinstance(ask, Survivors) and not died:
                died.append("north")
                deployed.start("north")
                return deployed.residents["north"].step(ask)
            return super().step(ask)

    deployed.residents["north"] = Mortal(deployed.homes["north"])
    deployed.residents["north"].start()
    state = deployed.run()
    assert state.done
    assert died == ["north"]
    assert sorted(state.history[0].accepted) == sorted(SITES)
    kinds = deployed.kinds("north")
    assert (kinds.count("plan received"), kinds.count("update kept")) == (2, 2)  # one to train, one to evaluate
    assert (kinds.count("update sent"), kinds.count("update sent again"), kinds.count("sum opened")) == (1, 1, 1)
    assert "site refused" not in str(state.history[0].refused)


def test_a_coordinator_that_is_killed_before_the_sum_is_read_gets_the_same_sum_and_no_other(
    tmp_path: Path,
    hospitals: Path,  # noqa: F811
    provisioned: Path,
) -> None:
    # North and south open; then the coordinator dies. It may begin anew with all three, and with nobody less.
    recipe = quick(
        secured(settings_of(tmp_path / "unused", hospitals, rounds=1)).recipe, timeout_s=5.0
    )  # thrice in vain
    deployed = Federated(tmp_path, provisioned, recipe)
    deployed.mute = {("east", "opening")}
    with pytest.raises(QuorumError, match="no secure sum in 3 attempts"):
        deployed.run()
    assert deployed.kinds("north").count("sum opened") == 3
    deployed.mute = set()
    state = deployed.run()
    assert state.done
    for site in SITES:
        assert deployed.kinds(site).count("update sent") == 1
        assert deployed.kinds(site).count("budget reserved") == 0


def test_a_site_with_an_older_registry_refuses_keys_that_it_cannot_check(
    tmp_path: Path,
    hospitals: Path,  # noqa: F811
    provisioned: Path,
) -> None:
    recipe = quick(secured(settings_of(tmp_path / "unused", hospitals, rounds=1)).recipe)
    deployed = Federated(tmp_path, provisioned, recipe)
    resident = deployed.residents["south"]
    known = {site: key for site, key in resident._members().items() if site != "east"}
    resident._sums = Sums("south", tmp_path / "sums", resident._signer, lambda: known)
    with pytest.raises(QuorumError, match="site east is not in this site's registry"):
        deployed.run()
    assert deployed.kinds("south").count("sum joined") == 0


# The site's own limits


def site_of(folder: Path, recipe: Recipe, sums: bool = True) -> Site:
    signer = Signer.load_or_create(folder / "own.key")
    policy = Policy(
        require_privacy=False, epsilon=1e6, delta=1e-3, min_patients=1, min_cell=3, max_rounds=9, seeded_noise=True
    )
    ledger = Ledger(folder / "ledger.jsonl", "north", ledger_policy(policy)) if recipe.privacy.active else None
    return Site(
        "north", recipe, _cohort("north"), lambda: _model(recipe), folder=folder,
        audit=AuditLog(folder / "audit.jsonl", signer), ledger=ledger, device=torch.device("cpu"), policy=policy,
        sums=Sums("north", folder / "sums", signer, lambda: {"north": signer.public}) if sums else None,
    )  # fmt: skip


def plan_of(recipe: Recipe) -> RoundPlan:
    return RoundPlan(recipe_id=recipe.id, round=1, work="train", weights=get_weights(build(recipe)))


def small(**parts: object) -> Recipe:
    return replace(
        HOUSE_RECIPE,
        privacy=Privacy(secure_aggregation=True),
        federation=Federation(sites=3, quorum=3, max_update_norm=100.0),
        **parts,
    )


def test_what_a_site_sends_before_the_sum_holds_no_number_of_the_update(tmp_path: Path) -> None:
    recipe = small()
    weighted = replace(
        recipe, federation=replace(recipe.federation, site_weights="patients", max_patients=20)
    )  # fmt: skip
    for number, asked in enumerate((recipe, weighted)):
        site = site_of(tmp_path / str(number), asked)
        update = site.visit(plan_of(asked))
        assert isinstance(update, Update)
        assert (len(update.delta), update.weight, update.steps, update.train_loss) == (0, 1.0, 0, None)
        assert update.offer is not None
        hello = site.hello(Question(recipe_id=asked.id))
        assert isinstance(hello, Hello)
        assert hello.patients["train"] == (0 if number else 8)
        again = site.visit(plan_of(asked))
        assert isinstance(again, Update)
        assert again.offer != update.offer
        assert again.norm == update.norm


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"max_update_norm": 1e-4}, "training", "federation.max_update_norm is 0.0001: larger numbers would wrap"),
        ({"site_weights": "patients", "max_patients": 7}, "policy", "more training patients than the recipe's 7"),
    ],
)
def test_a_real_update_out_of_range_is_refused_and_kept_nowhere(
    tmp_path: Path, changes: dict[str, object], code: str, why: str
) -> None:
    recipe = small()
    recipe = replace(recipe, federation=replace(recipe.federation, **changes))
    reply = site_of(tmp_path, recipe).visit(plan_of(recipe))
    assert isinstance(reply, Refusal)
    assert reply.code == code
    assert why in reply.why
    assert list((tmp_path / "outbox").glob("*")) == []


def test_noise_that_would_not_fit_is_refused_before_anything_is_paid_or_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.site.train", lambda *_, **__: pytest.fail("trained"))
    private = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-3, secure_aggregation=True)
    recipe = replace(small(training=replace(HOUSE_RECIPE.training, lr=1.0)), privacy=private)
    reply = site_of(tmp_path, recipe).visit(plan_of(recipe))
    assert isinstance(reply, Refusal)
    assert reply.code == "recipe"
    assert "the noise of a round alone may move the model by" in reply.why
    assert not (tmp_path / "ledger.jsonl").exists() or "reserve" not in (tmp_path / "ledger.jsonl").read_text()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_estimate_of_the_noises_norm_is_above_what_torch_makes_of_it_and_not_far_above(optimizer: str) -> None:
    training = Training(optimizer=optimizer, lr=0.01, momentum=0.9, batch_size=8, weight_decay=0.0)
    recipe = replace(small(training=training), privacy=replace(SECURE, clip_norm=2.0))
    numbers, steps, noise = 5000, 40, 1.5
    weights = torch.nn.Parameter(torch.zeros(numbers))
    optimiser = (
        torch.optim.SGD([weights], lr=0.01, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW([weights], lr=0.01)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weights.grad = torch.randn(numbers, generator=generator) * noise * 2.0 / 8
        optimiser.step()
    made, estimate = float(weights.detach().norm()), noise_norm(recipe, noise, steps, numbers)
    assert made < estimate < 2 * made


def test_a_gradient_clip_bounds_the_estimate_of_the_noises_norm() -> None:
    # 4 steps of 0.1 over 10,000 numbers: 0.1 * 2 * (100 + 6) = 21.2, twice that with momentum 0.5.
    training = Training(optimizer="sgd", lr=0.1, momentum=0.5, batch_size=1, gradient_clip=None)
    recipe = replace(small(training=training), privacy=replace(SECURE, clip_norm=1.0))
    assert noise_norm(recipe, 1.0, 4, 10_000) == pytest.approx(42.4)
    # No gradient is longer than 0.5, so four of them move by 0.1 * 4 * 0.5 = 0.2 at most.
    clipped = replace(recipe, training=replace(training, gradient_clip=0.5))
    assert noise_norm(clipped, 1.0, 4, 10_000) == pytest.approx(0.4)
    assert noise_norm(clipped, 0.001, 4, 10_000) == pytest.approx(0.0424)  # the noise is smaller than the clip
    adam = replace(recipe, training=replace(training, optimizer="adamw"))
    assert noise_norm(adam, 5.0, 4, 10_000) == pytest.approx(1.2 * 21.2)  # whatever the noise


def test_a_site_that_requires_secure_sums_greets_and_trains_no_other_recipe(tmp_path: Path) -> None:
    secure, plain = small(), replace(small(), privacy=Privacy())
    for recipe, refused in ((secure, False), (plain, True)):
        site = site_of(tmp_path / recipe.id[:8], recipe)
        site.policy = replace(site.policy, require_secure_aggregation=True)
        for reply in (site.hello(Question(recipe_id=recipe.id)), site.visit(plan_of(recipe))):
            assert isinstance(reply, Refusal) == refused
            if isinstance(reply, Refusal):
                assert reply.code == "policy"
                assert "(require_secure_aggregation)" in reply.why


def test_without_keys_of_the_others_nothing_is_trained(tmp_path: Path) -> None:
    recipe = small()
    reply = site_of(tmp_path, recipe, sums=False).visit(plan_of(recipe))
    assert isinstance(reply, Refusal)
    assert "for which this site has no keys" in reply.why


def test_a_step_about_what_the_site_has_not_is_refused_and_logged(tmp_path: Path) -> None:
    recipe = small()
    site = site_of(tmp_path, recipe)
    box = Box(sealed="0" * 164, seed_share="a" * 64, key_share="b" * 64)
    about = {"recipe_id": recipe.id, "round": 1, "base": "c" * 64, "session": "d" * 64}
    names = ("north", "east", "south")
    for ask, why in (
        (Masking(**about, boxes=dict.fromkeys(names, box)), "no update of round 1"),
        (Survivors(**about, masked=dict.fromkeys(names, "e" * 64)), "no keys of that session"),
        (Masking(**(about | {"recipe_id": "f" * 64}), boxes=dict.fromkeys(names, box)), "not approved here"),
    ):
        reply = site.step(ask)
        assert isinstance(reply, Refusal)
        assert reply.code == "message"
        assert why in reply.why
        assert verify(tmp_path / "audit.jsonl")[-1].kind == "plan refused"


def test_an_unexpected_error_in_a_step_leaves_as_its_kind_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("/data/SECRET-1/a.dcm")

    monkeypatch.setattr(Sums, "agree", fail)
    recipe = small()
    masked = dict.fromkeys(("north", "east", "south"), "e" * 64)
    reply = site_of(tmp_path, recipe).step(
        Survivors(recipe_id=recipe.id, round=1, base="c" * 64, session="d" * 64, masked=masked)
    )
    assert isinstance(reply, Refusal)
    assert reply.why == "RuntimeError at the site; see its own log"
    assert "SECRET" not in (tmp_path / "audit.jsonl").read_text()
