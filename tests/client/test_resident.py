"""A deployed site's answers: what is approved runs, the policy wins, nothing is paid twice, old ledgers are noticed."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import client.resident as module
import client.site as site_module
from client.approvals import Approvals
from client.resident import Resident, State
from client.train import Trained, train
from common import wire
from common.audit import verify
from common.chain import AuditError
from common.config import Privacy, Recipe
from common.deployment import SiteHome
from common.errors import StorageError
from common.exchange import Hello, Question, Refusal, RoundPlan, Update
from common.metrics import score
from common.models import build, get_weights
from common.weights import Weights
from tests.client.conftest import PLAIN, TRAIN_PATIENTS, House, recipe_of
from tests.pretend_gpu import pretending

NOISY = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5)
"""A fourth of an epsilon a round: the budget outlasts every test."""
RECIPE = recipe_of(privacy=NOISY)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds that were really trained."""
    rounds: list[int] = []

    def counted(*given: Any, round_: int, **named: Any) -> Trained:
        rounds.append(round_)
        return train(*given, round_=round_, **named)

    monkeypatch.setattr(site_module, "train", counted)
    return rounds


@functools.cache
def start(recipe: Recipe) -> Weights:
    return get_weights(build(recipe))


class Node:
    """A resident that can be started anew, as after a crash: nothing but the folder outlives it."""

    def __init__(self, house: House, recipe: Recipe = RECIPE, *, approve: bool = True) -> None:
        self.house, self.recipe, self.states, self.hour = house, recipe, list[State](), 12
        self.approvals, self.log = Approvals(house.home), house.home.audit_file
        if approve:
            self.approve()
        self.restart()

    def approve(self, recipe: Recipe | None = None) -> None:
        self.approvals.approve(self.house.sign(recipe or self.recipe), by="Dr Roe", log=self.house.log)

    def withdraw(self) -> None:
        self.approvals.withdraw(self.recipe.id, by="Dr Roe", log=self.house.log)

    def restart(self) -> None:
        now: Callable[[], datetime] = lambda: datetime(2026, 1, 5, self.hour, 30)  # noqa: E731
        self.resident = Resident(self.house.home, on_change=self.states.append, now=now)
        self.resident.start()

    def hello(self, recipe_id: str = "") -> Any:
        return self.resident.hello(Question(recipe_id=recipe_id or self.recipe.id))

    def visit(self, round_: int = 1, work: str = "train", recipe: Recipe | None = None) -> Any:
        recipe = recipe or self.recipe
        weights = start(recipe)
        return self.resident.visit(RoundPlan(recipe_id=recipe.id, round=round_, work=work, weights=weights))

    def kinds(self) -> list[str]:
        return [event.kind for event in verify(self.log)]

    def entries(self, kind: str = "reserve") -> int:
        path = self.house.home.ledger_file
        lines = path.read_text().splitlines() if path.exists() else []
        return sum(json.loads(line)["kind"] == kind for line in lines)


def refused(reply: object, code: str, node: Node, kind: str = "recipe refused") -> str:
    """The reason, after checking that it was logged and that nothing secret is in it."""
    assert isinstance(reply, Refusal)
    assert reply.code == code, reply.why
    events = verify(node.log)
    assert [event for event in events if event.kind == kind and event.facts["why"] == reply.why]
    assert reply.audit_head in [event.hash for event in events]
    text = wire.to_bytes(wire.encode(reply)) + node.log.read_bytes()
    for secret in (node.house.images, node.house.home.path):
        assert str(secret).encode() not in text
    assert node.resident.state.last_refusal is not None
    assert node.resident.state.last_refusal["why"] == reply.why
    return reply.why


# Approval


def test_what_is_not_approved_is_refused_logged_and_runs_nothing(house: House, trained: list[int]) -> None:
    node = Node(house, approve=False)
    for reply in (lambda: node.hello(), lambda: node.visit(), lambda: node.visit(4, "evaluate")):
        assert "is not approved at this site" in refused(reply(), "recipe", node)
    assert trained == []
    assert "site started" not in node.kinds()
    assert node.entries() == 0
    assert node.resident.state.doing == "idle"


def test_approving_and_withdrawing_count_from_the_next_message_on(house: House, trained: list[int]) -> None:
    node = Node(house, approve=False)
    refused(node.hello(), "recipe", node)
    node.approve()
    hello = node.hello()
    assert isinstance(hello, Hello)
    assert (hello.site, hello.patients["train"]) == ("north", 32)  # of 34: rounded down, as the standard policy says
    assert isinstance(node.visit(1), Update)
    node.withdraw()
    assert "not approved" in refused(node.visit(2), "recipe", node)
    assert "not approved" in refused(node.visit(1), "recipe", node)  # nor is the kept reply sent
    node.approve()
    assert isinstance(node.visit(2), Update)
    assert trained == [1, 2]


def test_an_update_that_is_made_when_the_approval_is_withdrawn_never_leaves(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(house)

    def withdrawn(*given: Any, **named: Any) -> Trained:
        node.withdraw()
        return train(*given, **named)

    monkeypatch.setattr(site_module, "train", withdrawn)
    assert "withdrawn meanwhile" in refused(node.visit(), "recipe", node)
    assert list((house.home.state / "outbox").glob("*")) == []
    assert node.entries("settle") == 1  # what was spent stays spent
    # An auditor reads that nothing left, and a node that starts anew counts nothing as sent.
    assert not {"update sent", "update kept", "evaluation sent"} & set(node.kinds())
    node.restart()
    assert (node.resident.state.updates, node.resident.state.bytes_sent) == (0, 0)


def test_scores_that_are_made_when_the_approval_is_withdrawn_never_leave(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(house)

    def withdrawn(*given: Any, **named: Any) -> Any:
        if node.approvals.ids():
            node.withdraw()
        return score(*given, **named)

    monkeypatch.setattr(site_module, "score", withdrawn)
    assert "withdrawn meanwhile" in refused(node.visit(4, "evaluate"), "recipe", node)
    assert "evaluation sent" not in node.kinds()


def test_a_record_that_was_changed_or_put_back_runs_nothing(house: House, trained: list[int]) -> None:
    node = Node(house)
    path = house.home.approved / f"{RECIPE.id}.json"
    kept = path.read_text()
    path.write_text(kept.replace("Dr Roe", "Dr Doe"))
    assert "not signed by this site's key" in refused(node.hello(), "recipe", node)
    node.withdraw()
    path.write_text(kept)  # whole and signed, but the log says withdrawn
    assert "withdrawn" in refused(node.visit(), "recipe", node)
    assert trained == []


# Policy


@pytest.mark.parametrize(
    ("rules", "recipe"),
    [
        ({"require_privacy": True}, recipe_of(privacy=PLAIN)),
        ({"require_secure_aggregation": True}, RECIPE),
        ({"epsilon": 3.0}, recipe_of(privacy=replace(NOISY, noise_multiplier=None, epsilon=4.0))),
        ({"delta": 1e-6}, RECIPE),
        ({"min_noise_multiplier": 1.5}, RECIPE),
        ({"max_sampling_rate": 0.1}, RECIPE),
        ({"max_steps": 2}, RECIPE),
        ({"max_rounds": 2}, RECIPE),
        ({"min_patients": TRAIN_PATIENTS + 1}, RECIPE),
        ({"models": ["timm/resnet18"]}, RECIPE),
        ({"tasks": ["multiclass"]}, RECIPE),
        ({"modalities": ["MR"]}, RECIPE),
        ({"hours": ["19:00-06:00"]}, RECIPE),
        ({"seeded_noise": False}, recipe_of(privacy=replace(NOISY, unsafe_seeded_noise=True))),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_policy_of_today_wins_over_an_approval_of_yesterday(
    house: House, trained: list[int], rules: dict[str, Any], recipe: Recipe
) -> None:
    house.policy(require_privacy=False, seeded_noise=True)
    node = Node(house, recipe)
    assert isinstance(node.hello(), Hello)  # loaded, and all is well
    house.policy(**rules)
    reply = node.visit()
    assert isinstance(reply, Refusal)
    assert reply.code in ("policy", "budget")
    assert trained == []
    assert node.entries() == 0
    assert "plan refused" in node.kinds()


def test_metrics_stay_and_small_cells_are_nothing_when_the_policy_says_so(house: House, trained: list[int]) -> None:
    node = Node(house)
    house.policy(metrics="none")
    update = node.visit()
    assert isinstance(update, Update)
    assert update.validation is None
    house.policy(metrics="bounded", min_cell=TRAIN_PATIENTS + 1)
    hello = node.hello()
    assert dict(hello.patients) == {"train": 0, "validation": 0, "test": 0}
    update = node.visit(4, "evaluate")
    assert update.test.patients == 0
    assert dict(update.test.values) == {}


def test_opening_hours_go_by_the_clock_and_a_kept_reply_leaves_outside_them(house: House, trained: list[int]) -> None:
    house.policy(hours=["19:00-06:00"])
    node = Node(house)
    assert "19:00-06:00" in refused(node.visit(), "policy", node, "plan refused")
    node.hour = 23
    first = node.visit()
    node.hour = 12
    again = node.visit()
    assert again.delta == first.delta
    assert trained == [1]


def test_a_configuration_that_does_not_hold_refuses_without_quoting_it(house: House, trained: list[int]) -> None:
    node = Node(house)
    text = (house.home.path / "site.yaml").read_text()
    house.configure(threads="many", data=str(house.images))
    assert "configuration does not hold" in refused(node.visit(), "policy", node)
    assert "threads" in node.resident.state.last_refusal["here"]
    (house.home.path / "site.yaml").write_text(text)
    assert isinstance(node.visit(), Update)


def test_every_change_of_the_configuration_is_in_the_log(house: House) -> None:
    node = Node(house)
    node.hello()
    house.policy(max_rounds=100)
    node.hello()
    told = [event.facts for event in verify(house.home.audit_file) if event.kind == "configuration"]
    assert [facts["policy"]["max_rounds"] for facts in told] == [500, 100]
    assert len({facts["sha256"] for facts in told}) == 2


# Nothing twice


@pytest.mark.parametrize("privacy", [NOISY, PLAIN], ids=["private", "plain"])
def test_a_question_asked_again_after_a_restart_is_answered_from_the_kept_reply(
    house: House, trained: list[int], privacy: Privacy
) -> None:
    house.policy(require_privacy=False)
    node = Node(house, recipe_of(privacy=privacy))
    first = node.visit()
    assert isinstance(first, Update)
    node.restart()
    again = node.visit()
    assert isinstance(again, Update)
    assert (again.delta, again.validation, again.spent) == (first.delta, first.validation, first.spent)
    assert trained == [1]
    assert node.entries() == node.entries("settle") == (1 if privacy.active else 0)


def test_model_and_images_are_loaded_once_and_another_recipe_takes_their_place(house: House) -> None:
    node, other = Node(house), recipe_of(privacy=NOISY, seed=1)
    node.approve(other)
    node.hello()
    loaded = node.resident._site
    node.visit(1)
    node.hello()
    assert node.resident._site is loaded
    assert isinstance(node.visit(1, recipe=other), Update)
    assert node.kinds().count("site started") == 2
    assert node.resident._site is not loaded


def test_the_review_foretells_what_the_rounds_cost_and_send(house: House) -> None:
    from client.cohort import open_cohort
    from client.ledger import Ledger
    from client.policy import ledger_policy
    from client.review import review

    recipe = recipe_of(rounds=2)
    key = house.home.cohort_key.read_bytes()
    cohort = open_cohort(house.images, recipe, cache=house.home.cache, key=key)
    told = review(house.sign(recipe), house.home.config, cohort, None).plain
    node = Node(house, recipe)
    updates = [node.visit(round_) for round_ in (1, 2)]
    assert told["leaves"]["update_bytes"] == updates[0].delta.nbytes
    assert told["leaves"]["all_updates_bytes"] == node.resident.state.bytes_sent
    assert told["privacy"]["noise_multiplier"] == updates[0].spent.noise_multiplier
    assert told["privacy"]["epsilon"] == updates[1].spent.epsilon
    config = house.home.config
    ledger = Ledger(house.home.ledger_file, "north", ledger_policy(config.policy))
    assert told["privacy"]["after"] == ledger.spent()
    after = review(house.sign(recipe), config, cohort, ledger).plain["privacy"]
    assert (after["paid_rounds"], after["after"]) == (2, after["spent"])


# The ledger


def test_an_old_ledger_that_was_copied_back_is_refused_and_logged(house: House, trained: list[int]) -> None:
    node, ledger = Node(house), house.home.ledger_file
    node.visit(1)
    old = ledger.read_bytes()
    node.visit(2)
    new = ledger.read_bytes()
    ledger.write_bytes(old)
    node.restart()
    assert node.kinds()[-1] == "budget refused"
    assert "older than this site's log remembers" in refused(node.hello(), "budget", node, "budget refused")
    assert "older than this site's log remembers" in refused(node.visit(3), "budget", node, "budget refused")
    ledger.unlink()
    node.restart()
    assert "older than" in refused(node.visit(3), "budget", node, "budget refused")
    ledger.write_bytes(new)
    node.restart()
    assert isinstance(node.visit(3), Update)
    assert trained == [1, 2, 3]


def test_an_old_ledger_is_noticed_while_the_node_runs(house: House, trained: list[int]) -> None:
    node, ledger = Node(house), house.home.ledger_file
    node.visit(1)
    old = ledger.read_bytes()
    node.visit(2)
    ledger.write_bytes(old)
    assert "older than" in refused(node.visit(3), "budget", node, "budget refused")
    assert isinstance(node.visit(4, "evaluate"), Update)  # spends nothing, and is no way to forget
    assert "older than" in refused(node.visit(3), "budget", node, "budget refused")
    assert trained == [1, 2]


def test_a_ledger_that_was_changed_stops_private_training_and_says_so(house: House, trained: list[int]) -> None:
    node, ledger = Node(house), house.home.ledger_file
    node.visit(1)
    ledger.write_text(ledger.read_text().replace('"round":1', '"round":9'))
    node.restart()
    assert node.kinds()[-1] == "budget refused"
    assert "broken at line" in refused(node.visit(2), "budget", node, "budget refused")
    assert trained == [1]


def test_half_a_line_that_a_crash_left_is_no_reason_to_stop(house: House, trained: list[int]) -> None:
    node = Node(house)
    node.visit(1)
    with house.home.ledger_file.open("ab") as file:
        file.write(b'{"kind":"reserve","numb')
    node.restart()
    assert isinstance(node.visit(2), Update)


def test_a_log_that_was_changed_lets_no_node_start(house: House) -> None:
    node = Node(house)
    path = house.home.audit_file
    path.write_text(path.read_text().replace("Dr Roe", "Dr Doe"))
    with pytest.raises(AuditError, match="changed"):
        Node(house, approve=False)
    assert node.kinds


# What cannot be built


def test_images_that_make_no_cohort_are_told_here_and_not_there(house: House, tmp_path: Path) -> None:
    node = Node(house)
    house.configure(data=None)
    assert "make no cohort" in refused(node.hello(), "data", node)
    house.configure(data=str(tmp_path))
    assert "make no cohort" in refused(node.hello(), "data", node)
    shutil.copytree(house.images, tmp_path / "images")
    rows = (tmp_path / "images" / "labels.csv").read_text().splitlines()
    (tmp_path / "images" / "labels.csv").write_text("\n".join([*rows, "SECRET-7,nodule,F,65+"]))
    house.configure(data=str(tmp_path / "images"))
    why = refused(node.hello(), "data", node)
    assert not any(letter.isdigit() for letter in why)
    assert "labels.csv row" in node.resident.state.last_refusal["here"]
    house.configure(data=str(house.images))
    assert isinstance(node.hello(), Hello)


def test_a_network_that_cannot_be_built_is_refused_before_an_image_is_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(privacy=NOISY, model=replace(RECIPE.model, name="resnet11"))
    monkeypatch.setattr(module, "site_cohort", lambda *_, **__: pytest.fail("read"))
    node = Node(house, recipe)
    assert "resnet11" in refused(node.hello(), "recipe", node)


@pytest.mark.parametrize("there", [True, False])
def test_what_a_recipe_finds_in_the_place_of_its_weights_file_is_told_here_and_not_there(
    house: House, there: bool
) -> None:
    labels = house.images / ("labels.csv" if there else "SMITH^JOHN.dcm")
    digest = hashlib.sha256(labels.read_bytes()).hexdigest() if there else "No such file"
    model = replace(RECIPE.model, weights_file=str(labels), weights_sha256="0" * 64)
    node = Node(house, recipe_of(privacy=NOISY, model=model))
    why = refused(node.hello(), "recipe", node)
    assert why.startswith("the file of first weights that the recipe names is not here, or is another one")
    assert digest not in node.log.read_text()
    assert node.resident.state.last_refusal is not None
    assert labels.name in (here := node.resident.state.last_refusal["here"]) or digest in here


def test_an_unexpected_error_leaves_as_its_kind_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("SECRET-1 in /data/SECRET-1/a.dcm")

    node = Node(house)
    monkeypatch.setattr(module, "site_cohort", fail)
    why = refused(node.visit(), "training", node)
    assert why == "ValueError at the site; see its own log"
    assert b"SECRET" not in house.home.audit_file.read_bytes()


def test_a_full_disk_is_still_told_although_it_cannot_be_logged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(house, approve=False)

    def full(*_: object, **__: object) -> str:
        raise StorageError("no space left")

    monkeypatch.setattr(node.resident._log, "append", full)
    reply = node.hello()
    assert isinstance(reply, Refusal)
    assert (reply.code, reply.audit_head) == ("recipe", "")


def test_a_missing_gpu_and_a_missing_key_are_refusals(house: House) -> None:
    if not torch.cuda.is_available():
        node = Node(house)
        house.configure(device="cuda")
        assert "could not answer" in refused(node.hello(), "training", node)
        assert "no GPU" in node.resident.state.last_refusal["here"]
        house.configure(device="cpu")
    house.home.cohort_key.unlink()
    node = Node(house)
    assert "cannot read" in refused(node.hello(), "data", node)


def test_a_node_trains_on_its_gpu_within_the_share_of_memory_that_the_site_allows(house: House) -> None:
    shares = []
    with pretending() as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: shares.append(given), raising=False)
        house.configure(device="auto", policy={"gpu_memory_fraction": 0.5})
        node = Node(house)
        assert isinstance(node.visit(), Update)
        assert node.resident._site is not None
        assert node.resident._site.device == gpu
    assert shares == [(0.5, 0)]


# What it shows and writes down


def test_start_and_stop_are_in_the_log_with_configuration_and_code(house: House) -> None:
    node = Node(house, approve=False)
    node.resident.stop("asked to")
    events = {event.kind: event.facts for event in verify(house.home.audit_file)}
    assert events["node started"]["configuration"] == events["configuration"]["sha256"]
    assert {"client", "common", "torch", "flwr"} <= set(events["code"]["packages"])
    assert events["node stopped"] == {"why": "asked to"}


def test_the_state_follows_the_work_and_its_counters_survive_a_restart(house: House) -> None:
    node = Node(house)
    first = node.visit(1)
    node.visit(1)  # again: counts as sent, costs nothing
    node.visit(4, "evaluate")
    refused(node.hello("f" * 64), "recipe", node)
    state = node.resident.state
    assert {seen.doing for seen in node.states} == {"idle", "reading images", "training", "evaluating"}
    assert (state.updates, state.evaluations, state.refusals) == (2, 1, 1)
    assert state.bytes_sent == 2 * first.delta.nbytes
    assert state.recipe == {"id": RECIPE.id, "name": "tiny", "rounds": 3}
    assert state.epsilon is not None
    assert state.epsilon["spent"] == first.spent.epsilon  # one recipe, one delta
    assert state.last_contact is not None
    node.restart()
    fresh = node.resident.state
    assert (fresh.updates, fresh.evaluations, fresh.refusals) == (2, 1, 1)
    assert fresh.bytes_sent == state.bytes_sent
    assert fresh.epsilon == state.epsilon
    assert fresh.last_contact is not None  # a node that is started each night must not hide two days of silence
    before, after = (datetime.fromisoformat(each.last_contact) for each in (state, fresh) if each.last_contact)
    assert abs(after - before) < timedelta(seconds=10)


def test_the_same_refusal_is_logged_once_in_a_while_and_given_every_time(house: House) -> None:
    node = Node(house, approve=False)
    replies = [node.hello() for _ in range(3)]
    assert len({reply.audit_head for reply in replies}) == 1
    assert node.kinds().count("recipe refused") == 1
    node.hello("f" * 64)
    assert node.kinds().count("recipe refused") == 2
    assert node.resident.state.refusals == 4


def test_a_refusal_that_goes_on_for_hours_is_logged_once_an_hour(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("client.resident.time.monotonic", lambda: now[0])
    node = Node(house, approve=False)
    for _ in range(3 * 120):  # a coordinator asks every half minute
        node.hello()
        now[0] += 30.0
    assert node.kinds().count("recipe refused") == 3


def test_a_coordinator_that_asks_without_end_fills_no_log_and_every_question_stands_in_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("client.resident.time.monotonic", lambda: now[0])
    monkeypatch.setattr("client.resident.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr("client.resident._AT_ONCE", 20.0)
    node = Node(house)
    for number in range(60):
        node.resident.hello(Question(recipe_id=RECIPE.id, audit_head=f"{number:064x}"))
    events = verify(house.home.audit_file)
    asked = [event.facts["server_head"] for event in events if event.kind == "question received"]
    assert asked == [f"{number:064x}" for number in range(60)]
    # 66 events, of which the log's own first one and the approval are not the node's; 20 at once, then 2 a second.
    assert (len(events), now[0]) == (66, 1000.0 + (66 - 2 - 20) / 2)


def test_what_a_stop_in_the_middle_of_a_write_left_goes_at_the_next_start(house: House) -> None:
    outbox = house.home.state / "outbox"
    outbox.mkdir(parents=True)
    (outbox / ".abc-000001-def.0.bin.77.tmp").write_bytes(b"half an update")
    (outbox / "abc-000001-def.0.bin").write_bytes(b"an update")
    Node(house, approve=False)
    assert [path.name for path in outbox.iterdir()] == ["abc-000001-def.0.bin"]


def test_a_message_that_is_none_of_ours_is_refused_and_logged(house: House) -> None:
    node = Node(house, approve=False)
    refused(node.resident.misunderstood("the message is not signed"), "message", node, "message refused")
    node.resident.misunderstood("a run with code")
    assert verify(house.home.audit_file)[-1].facts["why"] == "a run with code"


def test_threads_are_those_of_the_configuration(house: House) -> None:
    before = torch.get_num_threads()
    try:
        node = Node(house)
        house.configure(threads=2)
        node.hello()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_another_site_name_in_the_configuration_is_no_way_to_another_ledger(house: House) -> None:
    node = Node(house)
    house.configure(site="south")
    reply = node.resident.hello(Question(recipe_id=RECIPE.id))
    assert isinstance(reply, Refusal)
    assert reply.code == "policy"


def test_a_home_without_configuration_makes_no_resident(tmp_path: Path) -> None:
    from common.errors import ConfigError

    with pytest.raises(ConfigError, match=r"site\.yaml"):
        Resident(SiteHome(tmp_path))
