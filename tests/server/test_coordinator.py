"""A federation kept on disk, and the way its questions take through Flower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common import wire
from common.audit import AuditLog, verify
from common.config import Federation, Preprocessing, Privacy, Recipe
from common.errors import ExchangeError, QuorumError, StorageError
from common.exchange import Failure, Hello, Refusal, RoundPlan, Spent, Update
from common.identity import Signer
from common.weights import Weights
from server import coordinator
from server.app import FlowerTransport
from server.conclude import _spent
from server.coordinator import coordinate
from simulations.grid import become_node

RECIPE = Recipe(
    name="small",
    rounds=4,
    data=Preprocessing(size=(8, 8)),
    federation=Federation(sites=3, quorum=2, timeout_s=0.05, strategy="fedadam"),
)
PLAN = RoundPlan(recipe_id=RECIPE.id, round=1, work="train", weights=Weights({"w": np.zeros(2, np.float32)}))


def hello(site: str) -> Hello:
    return Hello(site=site, versions={}, patients={"train": 9}, manifest="d" * 64)


def answer(plan: RoundPlan, site: str, **changes) -> Update:
    rng = np.random.default_rng([int(plan.weights.digest[:8], 16), ord(site[0])])
    delta = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in plan.weights.shapes.items()}
    values = {
        "site": site, "recipe_id": plan.recipe_id, "round": plan.round, "base": plan.weights.digest, "weight": 1.0,
        "delta": Weights(delta if plan.work == "train" else {}), "steps": 1, "audit_head": "e" * 64,
    }  # fmt: skip
    return Update(**(values | changes))


class Fake:
    """A transport to three sites in this process."""

    def __init__(self, die_in_round: int = 0, silent: tuple[str, ...] = ()) -> None:
        self.asked: list[int] = []
        self._die, self._silent = die_in_round, silent

    def hello(self, recipe):
        return {site: hello(site) for site in ("east", "north", "west")}

    def ask(self, plan, sites, timeout_s):
        self.asked.append(plan.round)
        if plan.round == self._die:
            raise KeyboardInterrupt
        return [
            Failure(site=site, round=plan.round, why="silent") if site in self._silent else answer(plan, site)
            for site in sites
        ]


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    start = Weights({"w": np.ones((4, 3), np.float32), "mean": np.zeros(4, np.float32)})
    monkeypatch.setattr(coordinator, "build", lambda recipe: None)
    monkeypatch.setattr(coordinator, "get_weights", lambda model: start)
    monkeypatch.setattr(coordinator, "buffers", lambda model: frozenset({"mean"}))


KEY = Signer.temporary()


def run(out, transport, recipe=RECIPE, **options):
    return coordinate(recipe, transport, out, audit=AuditLog(out / "server.jsonl", KEY), **options)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm", "fedmedian"])
@pytest.mark.parametrize("killed", [1, 2, 4, 5])
def test_a_run_killed_in_any_round_and_resumed_ends_with_the_same_bits(tmp_path, strategy, killed):
    recipe = replace(RECIPE, federation=replace(RECIPE.federation, strategy=strategy))
    whole = run(tmp_path / "whole", Fake(), recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Fake(die_in_round=killed), recipe)
    second = Fake()
    resumed = run(tmp_path / "cut", second, recipe, resume=True)
    assert second.asked == list(range(killed, 6))
    assert resumed.state.weights.digest == whole.state.weights.digest
    assert resumed.state.done


def test_a_crash_between_audit_and_checkpoint_repeats_the_round(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", Fake())
    write = coordinator.checkpoint.write

    def full(state, folder):
        if state.round == 3:
            raise StorageError("full")
        return write(state, folder)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.checkpoint, "write", full)
        with pytest.raises(StorageError):
            run(tmp_path / "cut", Fake())
    assert run(tmp_path / "cut", Fake(), resume=True).state.weights == whole.state.weights


def test_resuming_a_finished_run_asks_for_no_round(tmp_path):
    first = run(tmp_path, Fake())
    again = Fake()
    assert run(tmp_path, again, resume=True).state.weights == first.state.weights
    assert again.asked == []


def test_a_folder_with_checkpoints_is_not_started_over(tmp_path):
    run(tmp_path, Fake())
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(StorageError, match="resume=true"):
        run(tmp_path, Fake())
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_a_run_below_quorum_is_in_the_log_and_can_be_resumed(tmp_path):
    with pytest.raises(QuorumError):
        run(tmp_path, Fake(silent=("east", "west")))
    last = verify(tmp_path / "server.jsonl")[-1]
    assert (last.kind, last.facts["round"]) == ("round failed", 1)
    assert "'east': 'silent'" in last.facts["why"]
    assert run(tmp_path, Fake(), resume=True).state.done


def test_the_log_tells_the_run_and_anchors_the_sites(tmp_path):
    result = run(tmp_path, Fake(silent=("west",)))
    events = verify(tmp_path / "server.jsonl", KEY.public)
    kinds = ["log started", "run started", "sites present", *["round aggregated"] * 4, "evaluation received"]
    assert [event.kind for event in events] == kinds
    assert events[3].facts["refused"] == {"west": "silent"}
    assert events[3].facts["heads"] == {"east": "e" * 64, "north": "e" * 64}
    assert events[-2].facts["after"] == result.state.weights.digest


def test_a_round_is_on_disk_before_it_is_shown(tmp_path):
    seen = []
    run(
        tmp_path,
        Fake(),
        on_round=lambda state, report: seen.append(
            coordinator.checkpoint.load(tmp_path / "checkpoints", RECIPE.id) == state
        ),
    )
    assert seen == [True] * 5


def test_a_site_that_was_silent_at_the_end_still_shows_what_it_spent(tmp_path):
    private = replace(RECIPE, privacy=Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5))

    class Spending(Fake):
        def ask(self, plan, sites, timeout_s):
            spent = Spent(
                epsilon=plan.round, delta=1e-5, noise_multiplier=1, clip_norm=1, sampling_rate=0.1, steps=plan.round
            )
            replies = [answer(plan, site, spent=spent) for site in sites]
            return replies if plan.work == "train" else [reply for reply in replies if reply.site != "west"]

    state = run(tmp_path, Spending(), private).state
    assert {site: spent.epsilon for site, spent in _spent(state).items()} == {"east": 5, "north": 5, "west": 4}


# Flower


class FakeGrid(Grid):
    """Hands every message to a rule, as a network would."""

    def __init__(self, nodes, rule) -> None:
        become_node(1)
        self._nodes, self._rule = list(nodes), rule
        self.sent: list[Message] = []

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *words, **named):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def get_node_ids(self):
        return self._nodes

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
            self.sent.append(message)
            reply = self._rule(message)
            replies += reply if isinstance(reply, list) else [reply]
        return [reply for reply in reversed(replies) if reply is not None]


NODES = {11: "north", 12: "east", 13: "west"}


def grid(**rules) -> FakeGrid:
    """Three honest nodes; a rule in a site's name replaces its answers to plans."""

    def rule(message):
        site = NODES[message.metadata.dst_node_id]
        if message.metadata.message_type == MessageType.QUERY:
            return Message(wire.encode(hello(site)), reply_to=message)
        plan = wire.decode(message.content, RoundPlan)
        return (
            rules[site](message, plan) if site in rules else Message(wire.encode(answer(plan, site)), reply_to=message)
        )

    return FakeGrid(NODES, rule)


def asked(**rules) -> dict[str, object]:
    transport = FlowerTransport(grid(**rules))
    transport.hello(RECIPE)
    replies = transport.ask(PLAN, ["east", "north", "west"], 5)
    assert [reply.site for reply in replies] == ["east", "north", "west"]
    return {reply.site: reply for reply in replies}


def test_every_site_is_found_under_its_name_and_answers_in_the_order_asked():
    net = grid()
    transport = FlowerTransport(net)
    assert list(transport.hello(RECIPE)) == ["east", "north", "west"]
    replies = transport.ask(PLAN, ["west", "east", "north"], 5)
    assert replies == [answer(PLAN, site) for site in ("west", "east", "north")]
    assert {message.metadata.message_type for message in net.sent[3:]} == {MessageType.TRAIN}
    transport.ask(replace(PLAN, work="evaluate"), ["east"], 5)
    assert net.sent[-1].metadata.message_type == MessageType.EVALUATE


def test_two_nodes_of_one_name_are_refused():
    net = FakeGrid(NODES, lambda message: Message(wire.encode(hello("north")), reply_to=message))
    with pytest.raises(ExchangeError, match="site north; give every site its own name"):
        FlowerTransport(net).hello(RECIPE)


def test_too_few_sites_are_a_quorum_error_that_says_what_to_do():
    net = FakeGrid([11], grid()._rule)
    with pytest.raises(QuorumError, match=r"1 sites answered within 0.05 s, quorum is 2; start the missing nodes"):
        FlowerTransport(net).hello(RECIPE)


@pytest.mark.parametrize(
    "bad",
    [
        lambda message: Message(Error(code=2, reason="raised"), reply_to=message),
        lambda message: Message(RecordDict(), reply_to=message),
        lambda message: Message(RecordDict({"message": ConfigRecord({"kind": "hello"})}), reply_to=message),
        lambda message: Message(RecordDict({"x": ArrayRecord()}), reply_to=message),
        lambda message: None,
    ],
    ids=["error", "empty", "half", "other", "silence"],
)
def test_a_node_that_says_no_hello_is_absent_and_stops_nobody(bad):
    honest = grid()._rule
    net = FakeGrid(NODES, lambda message: bad(message) if message.metadata.dst_node_id == 12 else honest(message))
    assert list(FlowerTransport(net).hello(RECIPE)) == ["north", "west"]


def from_node_1(message, plan):
    reply = Message(Error(code=3, reason="unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (from_node_1, "node error 3"),
        (lambda message, plan: None, "no reply within 5 s"),
        (lambda message, plan: Message(RecordDict(), reply_to=message), "unreadable reply"),
        (lambda message, plan: Message(wire.encode(hello("east")), reply_to=message), "unreadable reply"),
        (lambda message, plan: Message(wire.encode(plan), reply_to=message), "unreadable reply"),
        (lambda message, plan: Message(wire.encode(answer(plan, "west")), reply_to=message), "another site's name"),
    ],
    ids=["error from node 1", "silence", "empty", "hello", "plan", "other's name"],
)
def test_a_bad_answer_is_a_failure_of_the_site_that_was_asked_and_of_nobody_else(rule, why):
    replies = asked(east=rule)
    assert isinstance(replies["east"], Failure)
    assert why in replies["east"].why
    assert isinstance(replies["north"], Update)
    assert isinstance(replies["west"], Update)


def test_a_refusal_comes_through():
    said = Refusal(site="east", recipe_id=RECIPE.id, round=1, code="budget", why="spent")
    assert asked(east=lambda message, plan: Message(wire.encode(said), reply_to=message))["east"] == said


def test_an_answer_to_a_message_that_was_never_sent_is_dropped():
    def stray(message, plan):
        reply = Message(wire.encode(answer(plan, "east")), reply_to=message)
        reply.metadata.__dict__["_reply_to_message_id"] = "m999"
        return reply

    assert isinstance(asked(east=stray)["east"], Failure)


def test_a_node_that_lies_about_its_number_speaks_only_for_itself():
    def posing(message, plan):
        reply = Message(wire.encode(answer(plan, "west", weight=9.0)), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 13
        return reply

    replies = asked(east=posing)
    assert isinstance(replies["east"], Failure)
    assert replies["west"].weight == 1.0


def test_a_site_that_never_said_hello_is_silent():
    transport = FlowerTransport(grid())
    transport.hello(RECIPE)
    assert transport.ask(PLAN, ["south"], 5) == [Failure(site="south", round=1, why="no reply within 5 s")]
