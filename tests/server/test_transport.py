"""Who is asked, who is asked again, how long a round waits: a scripted Grid on a clock that is turned by hand."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common import wire
from common.config import Federation, Recipe
from common.errors import ExchangeError, QuorumError
from common.exchange import (
    Agreement,
    Box,
    Failure,
    Hello,
    MaskedUpdate,
    Masking,
    Question,
    Refusal,
    RoundPlan,
    Survivors,
    Update,
)  # fmt: skip
from common.fixed import Residues
from common.identity import Signer
from common.weights import Weights
from server.app import FlowerTransport
from server.blobs import Shelf, Store
from simulations.grid import become_node

RECIPE = Recipe(name="small", federation=Federation(sites=3, quorum=2, timeout_s=600.0, offline_s=60.0))
PLAN = RoundPlan(recipe_id=RECIPE.id, round=1, work="train", weights=Weights({"w": np.zeros(2, np.float32)}))
SITES = ("east", "north", "west")
COORDINATOR = Signer.temporary()
SIGNERS = {site: Signer.temporary() for site in SITES}
HEAD = "a" * 64


def hello(site: str, **changes) -> Hello:
    values = {"site": site, "recipe_id": RECIPE.id, "versions": {}, "patients": {"train": 9}, "manifest": "d" * 64}
    return Hello(**(values | changes))


def answer(plan: RoundPlan, site: str, **changes) -> Update:
    values = {
        "site": site, "recipe_id": plan.recipe_id, "round": plan.round, "base": plan.weights.digest, "weight": 1.0,
        "delta": plan.weights, "steps": 1, "audit_head": "e" * 64,
    }  # fmt: skip
    return Update(**(values | changes))


def refusal(site: str, why: str = "not approved here") -> Refusal:
    return Refusal(site=site, recipe_id=RECIPE.id, round=1, code="recipe", why=why)


class Clock:
    """The module `time`, turned by whoever sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.plans: list[tuple[float, Callable[[], object]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        end = self.now + seconds
        for at, action in sorted(self.plans, key=lambda plan: plan[0]):
            if at <= end:
                self.now = max(self.now, at)
                self.plans.remove((at, action))
                action()
        self.now = end

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self.plans.append((self.now + seconds, action))


@dataclass
class Site:
    """A node that answers, as a rule honestly."""

    name: str
    number: int
    delay_s: float = 0.0
    mark: str = "first"
    online: bool = True
    rule: Callable[[Message], Message | None] | None = None
    """Replaces the answers to plans."""
    meets: Callable[[Message], Message | None] | None = None
    """Replaces the answers to the question who is there."""
    signed: bool = True
    asked: Counter[str] = field(default_factory=Counter)

    def reply(self, message: Message) -> Message | None:
        kind = message.metadata.message_type
        self.asked[kind] += 1
        rule = self.meets if kind == MessageType.QUERY else self.rule
        if rule is not None:
            return rule(message)
        if self.signed:
            wire.check_signature(message.content, COORDINATOR.public)
        if kind == MessageType.QUERY:
            assert wire.decode(message.content, Question) == Question(recipe_id=RECIPE.id, audit_head=HEAD)
            return self.says(message, hello(self.name))
        return self.says(message, answer(wire.decode(message.content, RoundPlan), self.name))

    def says(self, message: Message, value) -> Message:
        return Message(wire.encode(value, SIGNERS[self.name] if self.signed else None), reply_to=message)

    def fails(self, message: Message, code: int = 2) -> Message:
        return Message(Error(code=code, reason="ValueError"), reply_to=message)

    def restart(self) -> None:
        self.mark += "'"


class Net(Grid):
    """As the SuperLink does it: what a node was asked is lost when it connects anew, and an error while it is away."""

    def __init__(self, clock: Clock, *sites: Site) -> None:
        become_node(1)
        self.clock, self.sites = clock, {site.number: site for site in sites}
        self.sent: list[Message] = []
        self._queue: dict[str, tuple[Message, str, float]] = {}

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *words, **named):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def get_node_ids(self):
        return [number for number, site in self.sites.items() if site.online]

    def push_messages(self, messages):
        names = []
        for message in messages:
            site = self.sites[message.metadata.dst_node_id]
            names.append(f"m{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = names[-1]
            self.sent.append(message)
            self._queue[names[-1]] = (message, site.mark, self.clock.now + site.delay_s)
        return names

    def pull_messages(self, message_ids):
        replies = []
        for name in sorted(set(message_ids) & set(self._queue), reverse=True):
            message, mark, ready = self._queue[name]
            site = self.sites[message.metadata.dst_node_id]
            if not site.online:
                reply = Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1
            elif site.mark == mark and self.clock.now >= ready:
                reply = site.reply(message)
            else:
                continue
            del self._queue[name]
            if reply is not None:
                replies.append(reply)
        return replies


class Connected(Net):
    """A Grid that tells when a node connects anew, as the deployed one does."""

    def presence(self):
        return {number: (site.name, site.mark) for number, site in self.sites.items() if site.online}


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.app.time", clock)
    return clock


@pytest.fixture
def sites() -> list[Site]:
    return [Site("north", 11), Site("east", 12), Site("west", 13)]


def keys() -> dict[str, str]:
    return {site: signer.public for site, signer in SIGNERS.items()}


class Watched(FlowerTransport):
    """A deployed transport that keeps what it told."""

    def __init__(self, net: Net, *, keys=keys) -> None:
        self.told: list[tuple[str, str, str]] = []
        super().__init__(
            net, signer=COORDINATOR, keys=keys, watch=lambda site, state, why: self.told.append((site, state, why))
        )

    def states(self, site: str) -> list[str]:
        return [state for name, state, _ in self.told if name == site]


def ready(clock: Clock, sites: list[Site]) -> Watched:
    transport = Watched(Connected(clock, *sites))
    assert list(transport.hello(RECIPE, HEAD)) == list(SITES)
    return transport


def asked(transport: FlowerTransport, timeout_s: float = 600.0) -> dict[str, object]:
    replies = list(transport.ask(PLAN, SITES, timeout_s))
    assert sorted(reply.site for reply in replies) == list(SITES)
    return {reply.site: reply for reply in replies}


# A round


def test_every_site_is_asked_once_and_answers_in_the_order_asked(clock, sites):
    transport = ready(clock, sites)
    assert list(transport.ask(PLAN, ["west", "east", "north"], 5)) == [
        answer(PLAN, name) for name in ("west", "east", "north")
    ]
    list(transport.ask(replace(PLAN, work="evaluate"), ["east"], 5))
    assert {site.name: dict(site.asked) for site in sites} == {
        "north": {"query": 1, "train": 1},
        "east": {"query": 1, "train": 1, "evaluate": 1},
        "west": {"query": 1, "train": 1},
    }
    assert transport.states("west") == ["online", "asked", "answered"]


def test_no_message_outlives_the_deadline(clock, sites):
    transport = ready(clock, sites)
    list(transport.ask(PLAN, SITES, 77))
    kinds = {message.metadata.message_type: message.metadata.ttl for message in transport._net._grid.sent}
    assert kinds == {"query": 600, "train": 77}
    list(transport.ask(PLAN, SITES, 0.2))
    assert transport._net._grid.sent[-1].metadata.ttl == 1  # Flower keeps one without a time to live for 12 h


def test_a_slow_site_that_stays_connected_has_the_whole_time(clock, sites):
    transport = ready(clock, sites)
    sites[2].delay_s = 590
    assert isinstance(asked(transport)["west"], Update)
    assert sites[2].asked["train"] == 1


def test_a_site_too_slow_for_the_deadline_is_late_and_the_next_round_asks_it_anew(clock, sites):
    transport = ready(clock, sites)
    sites[2].delay_s = 601
    late = asked(transport)["west"]
    assert late == Failure(site="west", round=1, why="no reply within 600 s")
    assert transport.told[-1] == ("west", "late", "no reply within 600 s")
    sites[2].delay_s = 0
    (reply,) = transport.ask(replace(PLAN, round=2), ["west"], 600)
    assert (type(reply), reply.round) == (Update, 2)


def test_a_site_that_connects_anew_is_asked_again_for_what_it_was_asked_is_lost(clock, sites):
    transport = ready(clock, sites)
    sites[2].delay_s = 30
    clock.after(10, sites[2].restart)
    began = clock.now
    assert isinstance(asked(transport)["west"], Update)
    assert 40 <= clock.now - began < 45  # 10 s until the restart, 30 s for the second visit


class Tardy(Connected):
    """Tells that a question was lost with its connection once the site has been asked anew."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        to = [message.metadata.dst_node_id for message in self.sent]
        for name in sorted(set(message_ids) & set(self._queue)):
            message, mark, _ = self._queue[name]
            number = message.metadata.dst_node_id
            if self.sites[number].mark != mark and number in to[int(name[1:]) + 1 :]:
                del self._queue[name]
                replies.append(Message(Error(code=2, reason="lost"), reply_to=message))
        return replies


@pytest.mark.parametrize(("quorum_at_s", "ends_at_s"), [(10, 70), (90, 100)])
def test_a_short_step_of_a_sum_waits_offline_s_beyond_the_quorum_and_never_beyond_the_deadline(
    clock, sites, quorum_at_s, ends_at_s
):
    transport = ready(clock, sites)
    shown = dict.fromkeys(SITES, "d" * 64)
    ask = Survivors(recipe_id=RECIPE.id, round=1, base="b" * 64, session="c" * 64, masked=shown)

    def agrees(site):
        said = Agreement(site=site.name, recipe_id=RECIPE.id, round=1, session="c" * 64, signature="e" * 128)
        return lambda message: site.says(message, said)

    for site in sites:
        site.meets, site.delay_s = agrees(site), quorum_at_s
    sites[2].delay_s = 500
    began = clock.now
    replies = transport.step(dict.fromkeys(SITES, ask), 100.0, lambda answer: answer)
    assert clock.now - began == pytest.approx(ends_at_s, abs=2)
    assert [type(replies[site]) for site in SITES] == [Agreement, Agreement, Failure]


def test_an_answer_that_nobody_waits_for_any_more_is_forgotten(clock, sites):
    transport, forgotten = ready(clock, sites), []
    transport._net._grid.forget = forgotten.extend
    sites[2].delay_s = 700
    asked(transport)
    assert len(forgotten) == 1
    assert transport._net._grid.sent[int(forgotten[0][1:])].metadata.dst_node_id == sites[2].number


def test_an_error_about_a_question_of_before_a_site_came_back_is_none_about_the_one_that_is_under_way(clock, sites):
    west, net = sites[2], Tardy(clock, *sites)
    west.delay_s = 30
    clock.after(10, west.restart)
    transport = Watched(net)
    assert list(transport.hello(RECIPE, HEAD)) == list(SITES)
    clock.after(10, west.restart)
    assert isinstance(asked(transport)["west"], Update)
    kinds = [message.metadata.message_type for message in net.sent if message.metadata.dst_node_id == west.number]
    assert Counter(kinds) == {"query": 2, "train": 2}
    assert "failed" not in transport.states("west")


def test_a_site_that_goes_and_comes_back_within_the_time_is_asked_again(clock, sites):
    transport = ready(clock, sites)
    west = sites[2]
    west.delay_s = 20
    clock.after(5, lambda: setattr(west, "online", False))
    clock.after(50, lambda: (setattr(west, "online", True), west.restart()))
    assert isinstance(asked(transport)["west"], Update)
    assert transport.states("west") == ["online", "asked", "offline", "online", "asked", "answered"]


def test_once_the_quorum_has_answered_a_site_that_is_away_is_waited_for_no_longer_than_offline_s(clock, sites):
    transport = ready(clock, sites)
    sites[2].online = False
    began = clock.now
    replies = asked(transport)
    assert isinstance(replies["west"], Failure)
    assert replies["west"].why.startswith("offline since 20")
    assert 60 <= clock.now - began < 62
    began = clock.now
    assert isinstance(asked(transport)["west"], Failure)  # it has been away for longer already: nobody waits again
    assert clock.now - began < 1
    assert sites[2].asked["train"] == 0


def test_without_a_quorum_a_site_that_is_away_is_waited_for_until_the_deadline(clock, sites):
    transport = ready(clock, sites)
    sites[1].online = sites[2].online = False
    clock.after(500, lambda: setattr(sites[2], "online", True))
    replies = asked(transport)
    assert [type(replies[site]) for site in SITES] == [Failure, Update, Update]
    assert replies["east"].why.startswith("offline since 20")


def test_an_error_is_asked_again_after_growing_pauses_and_the_answer_counts(clock, sites):
    transport = ready(clock, sites)
    west = sites[2]
    west.rule = lambda message: (
        west.fails(message) if west.asked["train"] < 4 else west.says(message, answer(PLAN, "west"))
    )
    began = clock.now
    assert isinstance(asked(transport)["west"], Update)
    assert 1 + 2 + 4 <= clock.now - began < 10
    assert transport.told.count(("west", "failed", "node error 2: ValueError")) == 3


def test_a_site_that_only_fails_holds_nobody_up_longer_than_offline_s_once_the_quorum_is_there(clock, sites):
    transport = ready(clock, sites)
    sites[2].rule = sites[2].fails
    began = clock.now
    assert asked(transport)["west"] == Failure(site="west", round=1, why="node error 2: ValueError")
    assert clock.now - began < 100
    sites[1].rule = sites[1].fails  # now the quorum is not there
    began = clock.now
    asked(transport)
    assert clock.now - began == pytest.approx(600)
    assert sites[1].asked["train"] == pytest.approx(6 + (600 - 31) / 30, abs=2)  # 1 + 2 + 4 + 8 + 16 s, then 30


def test_a_site_that_failed_once_and_works_now_has_the_whole_time(clock, sites):
    transport = ready(clock, sites)
    west = sites[2]

    def once(message):
        if west.asked["train"] == 1:
            west.delay_s = 400
            return west.fails(message, code=8)
        return west.says(message, answer(PLAN, "west"))

    west.rule = once
    assert isinstance(asked(transport)["west"], Update)


def test_a_site_that_comes_back_under_another_number_is_asked_there(clock, sites):
    transport = ready(clock, sites)
    net = transport._net._grid
    sites[2].online = False
    clock.after(20, lambda: net.sites.update({14: Site("west", 14)}))
    assert isinstance(asked(transport)["west"], Update)
    assert dict(net.sites[14].asked) == {"query": 1, "train": 1}


def test_an_answer_to_the_first_question_counts_after_it_was_asked_again(clock, sites):
    transport = ready(clock, sites)
    west, net = sites[2], transport._net._grid
    kept = []
    west.rule = lambda message: kept.append(message)
    clock.after(5, west.restart)

    def first_again():
        message = kept[0]
        net._queue[message.metadata.message_id] = (message, west.mark, clock.now)
        west.rule = lambda message: west.says(message, answer(PLAN, "west", weight=7.0))

    clock.after(50, first_again)
    assert asked(transport)["west"].weight == 7.0
    assert len(kept) == 2


def test_a_refusal_is_final(clock, sites):
    transport = ready(clock, sites)
    sites[2].rule = lambda message: sites[2].says(message, refusal("west"))
    assert asked(transport)["west"] == refusal("west")
    assert sites[2].asked["train"] == 1
    assert transport.told[-1][:2] == ("west", "refused") or ("west", "refused", "not approved here") in transport.told


# Weights beside the messages

LARGE = replace(PLAN, weights=Weights({"w": np.arange(100_000, dtype=np.float32)}))  # 400,000 bytes


@dataclass
class AtSite:
    """A site's view of a round, as the gateway gives it."""

    folder: Path
    site: str
    ticket: str
    sends: bool = True
    most_bytes: int = 1 << 33

    def put(self, name: str, piece: memoryview) -> None:
        with Shelf(self.folder).writing(self.ticket, self.site, name, len(piece)) as room:
            assert not isinstance(room, int), room
            if self.sends:
                room.part.write_bytes(piece)
                room.done()

    def get(self, name: str, piece: memoryview) -> None:
        found = Shelf(self.folder).readable(self.ticket, self.site, name)
        assert found is not None
        piece[:] = found.read_bytes()


def beside(folder: Path, site: Site, ticket: str | None = None, *, sends: bool = True) -> None:
    """Has the site fetch and send its weights beside the messages; with a ticket, it names that one in its answer."""

    def rule(message: Message) -> Message:
        wire.check_signature(message.content, COORDINATOR.public)
        plan = wire.decode(message.content, RoundPlan, lambda given: AtSite(folder, site.name, given))
        at = AtSite(folder, site.name, wire.ticket(message.content) or "", sends)
        record = wire.encode(answer(plan, site.name), SIGNERS[site.name], at)
        if ticket is not None:
            record.config_records["message"]["ticket"] = ticket
            record.config_records["message"]["signature"] = SIGNERS[site.name].sign(wire._signed_bytes(record))
        return Message(record, reply_to=message)

    site.rule = rule


def test_weights_beside_the_messages_give_the_replies_of_weights_in_them(clock, sites, tmp_path):
    within = list(ready(clock, sites).ask(LARGE, SITES, 600.0))
    net = Connected(clock, *sites)
    transport = FlowerTransport(net, signer=COORDINATOR, keys=keys, store=Store(tmp_path, "run"))
    transport.hello(RECIPE, HEAD)
    for site in sites:
        beside(tmp_path, site)
    assert list(transport.ask(LARGE, SITES, 600.0)) == within
    assert all(not message.content.array_records for message in net.sent)
    assert list(tmp_path.iterdir()) == []  # the round is over


def test_weights_beside_the_messages_are_there_until_the_last_reply_is_taken_or_nobody_wants_it(clock, sites, tmp_path):
    transport = FlowerTransport(
        Connected(clock, *sites), signer=COORDINATOR, keys=keys, store=Store(tmp_path, "run")
    )  # fmt: skip
    transport.hello(RECIPE, HEAD)
    sites[2].delay_s = 100
    for site in sites:
        beside(tmp_path, site)
    replies = transport.ask(LARGE, SITES, 600.0)
    assert {next(replies).site, next(replies).site} == {"north", "east"}
    assert len(list(tmp_path.iterdir())) == 1
    last = next(replies)
    assert isinstance(last, Update)
    assert last.site == "west"
    assert next(replies, None) is None
    assert list(tmp_path.iterdir()) == []
    given_up = transport.ask(LARGE, SITES, 600.0)
    next(given_up)
    given_up.close()
    assert list(tmp_path.iterdir()) == []


def test_masked_updates_travel_beside_the_messages_too(clock, sites, tmp_path):
    words = {name: np.arange(100_000, dtype=np.uint32) + number for number, name in enumerate(SITES)}
    box = Box(sealed="0" * 164, seed_share="a" * 64, key_share="b" * 64)
    about = {"recipe_id": RECIPE.id, "round": 1, "session": "b" * 64}
    asks = {name: Masking(**about, base="c" * 64, boxes=dict.fromkeys(SITES, box)) for name in SITES}
    net = Connected(clock, *sites)
    transport = FlowerTransport(net, signer=COORDINATOR, keys=keys, store=Store(tmp_path, "run"))
    transport.hello(RECIPE, HEAD)
    for site in sites:
        beside(tmp_path, site)
    list(transport.ask(LARGE, SITES, 600.0))
    lay: dict[str, int] = {}

    def masking(site):
        def rule(message):
            wire.check_signature(message.content, COORDINATOR.public)
            assert (
                wire.decode_request(message.content, lambda given: AtSite(tmp_path, site.name, given))
                == asks[site.name]
            )
            at = AtSite(tmp_path, site.name, wire.ticket(message.content) or "")
            sent = MaskedUpdate(**about, site=site.name, values=Residues(words[site.name]))
            return Message(wire.encode(sent, SIGNERS[site.name], at), reply_to=message)

        return rule

    def take(came):
        (folder,) = tmp_path.iterdir()
        lay[came.site] = sum(path.stat().st_size for path in (folder / "from" / came.site).iterdir())
        return replace(came, values=Residues(np.empty(0, np.uint32))) if came.site == "west" else came

    for site in sites:
        site.rule = masking(site)
    net.sent.clear()
    found = transport.step(asks, 600.0, take)
    assert lay == dict.fromkeys(SITES, 400_000)
    assert {name: len(reply.values) for name, reply in found.items()} == {"east": 100_000, "north": 100_000, "west": 0}
    assert found["east"].values == Residues(words["east"])
    assert all(not message.content.array_records for message in net.sent)
    assert list(tmp_path.iterdir()) == []  # the step is over


class Belled(Connected):
    """Rings of what has come; a bell that was not looked at since goes on ringing."""

    def __init__(self, clock: Clock, *sites: Site) -> None:
        super().__init__(clock, *sites)
        self.looked = self.waits = 0

    def pull_messages(self, message_ids):
        self.looked += 1
        return super().pull_messages(message_ids)

    def wait(self, pause_s: float) -> None:
        self.waits += 1
        assert self.waits <= self.looked, "it rings for ever: nobody looked"
        self.clock.sleep(pause_s)


def test_nobody_listens_to_a_bell_while_no_answer_is_missing(clock, sites):
    late = sites.pop()
    net = Belled(clock, *sites)
    clock.after(20, lambda: net.sites.update({late.number: late}))
    transport = Watched(net)
    assert list(transport.hello(RECIPE, HEAD)) == ["east", "north", "west"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ticket": "0" * 32}, "its weights are of another round"),
        ({"sends": False}, "site west announced weights that it has not sent"),
    ],
    ids=["another round", "not sent"],
)
def test_a_site_whose_weights_are_not_there_fails_alone(clock, sites, tmp_path, given, why):
    transport = FlowerTransport(
        Connected(clock, *sites), signer=COORDINATOR, keys=keys, store=Store(tmp_path, "run")
    )  # fmt: skip
    transport.hello(RECIPE, HEAD)
    for site in sites[:2]:
        beside(tmp_path, site)
    beside(tmp_path, sites[2], **given)
    replies = {reply.site: reply for reply in transport.ask(LARGE, SITES, 600.0)}
    assert isinstance(replies["north"], Update)
    assert isinstance(replies["east"], Update)
    assert isinstance(replies["west"], Failure)
    assert why in replies["west"].why


# Signatures


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (lambda message: Message(wire.encode(answer(PLAN, "west")), reply_to=message), "the message is not signed"),
        (
            lambda message: Message(wire.encode(answer(PLAN, "west"), SIGNERS["east"]), reply_to=message),
            "the message is not signed by key",
        ),
        (
            lambda message: Message(wire.encode(answer(PLAN, "east"), SIGNERS["west"]), reply_to=message),
            "the reply is in another site's name",
        ),
        (lambda message: Message(wire.encode(hello("west"), SIGNERS["west"]), reply_to=message), "no answer to a plan"),
    ],
    ids=["unsigned", "another's key", "another's name", "hello"],
)
def test_a_reply_that_is_not_the_sites_own_is_its_failure(clock, sites, says, why):
    transport = ready(clock, sites)
    sites[2].rule = says
    reply = asked(transport)["west"]
    assert isinstance(reply, Failure)
    assert why in reply.why
    assert sites[2].asked["train"] == 1


def test_a_site_that_is_revoked_while_it_works_is_a_failure(clock, sites):
    members = keys()
    transport = Watched(Connected(clock, *sites), keys=lambda: members)
    transport.hello(RECIPE, HEAD)
    sites[2].delay_s = 30
    clock.after(10, lambda: members.pop("west"))
    assert "not, or no more, in the registry" in asked(transport)["west"].why


def test_a_node_cannot_say_hello_in_another_sites_name(clock, sites):
    sites[2].meets = lambda message: sites[2].says(message, hello("east"))
    transport = Watched(Connected(clock, *sites))
    assert list(transport.hello(RECIPE, HEAD)) == ["east", "north"]
    assert "failed" not in transport.states("east")
    assert "failed" in transport.states("west")  # whose node it is, whatever it says
    assert asked(transport)["east"] == answer(PLAN, "east")
    assert sites[2].asked["train"] == 0


# Who is there


def test_a_run_begins_when_all_sites_said_hello_and_waits_for_those_that_still_start(clock, sites):
    sites[2].online = False
    clock.after(45, lambda: setattr(sites[2], "online", True))
    transport = Watched(Connected(clock, *sites))
    began = clock.now
    assert list(transport.hello(RECIPE, HEAD)) == list(SITES)
    assert 45 <= clock.now - began < 47


def test_with_the_quorum_there_the_others_get_offline_s_more(clock, sites):
    sites[1].online = sites[2].online = False
    clock.after(100, lambda: setattr(sites[1], "online", True))
    transport = Watched(Connected(clock, *sites))
    began = clock.now
    assert list(transport.hello(RECIPE, HEAD)) == ["east", "north"]
    assert 160 <= clock.now - began < 163


@pytest.mark.parametrize(
    ("delay_s", "before", "found", "took_s"),
    [
        (400, SITES, ["east", "north", "west"], 400),
        (700, SITES, ["east", "north"], 600),  # timeout_s
        (400, (), ["east", "north"], 60),  # offline_s: a site that starts, or hangs, joins later
    ],
)
def test_a_site_that_still_works_for_a_process_that_was_killed_is_waited_for(
    clock, sites, delay_s, before, found, took_s
):
    sites[2].delay_s = delay_s
    began = clock.now
    assert list(Watched(Connected(clock, *sites)).hello(RECIPE, HEAD, before)) == found
    assert took_s <= clock.now - began < took_s + 2


def test_where_nobody_has_to_be_there_the_sites_get_offline_s_and_then_whoever_came_is_asked(clock, sites):
    for site in sites[1:]:
        site.online = False
    transport = Watched(Connected(clock, *sites))
    began = clock.now
    assert list(transport.hello(RECIPE, HEAD, SITES, quorum=0)) == ["north"]
    assert clock.now - began == pytest.approx(60, abs=2)
    sites[0].rule = lambda message: None
    clock.after(5, lambda: setattr(sites[0], "online", False))
    began = clock.now
    (reply,) = transport.ask(PLAN, ["north"], 600.0)
    assert reply.why.startswith("offline since")
    assert clock.now - began == pytest.approx(65, abs=3)
    assert list(transport.ask(PLAN, [], 600.0)) == []


def test_where_nobody_has_to_be_there_nobody_is_no_error(clock, sites):
    for site in sites:
        site.online = False
    began = clock.now
    assert Watched(Connected(clock, *sites)).hello(RECIPE, HEAD, SITES, quorum=0) == {}
    assert clock.now - began == pytest.approx(60, abs=2)


def test_where_nobody_has_to_be_there_one_at_work_has_the_whole_time(clock, sites):
    sites[0].delay_s = 300
    assert list(Watched(Connected(clock, *sites)).hello(RECIPE, HEAD, SITES, quorum=0)) == list(SITES)


def test_too_few_sites_are_a_quorum_error_that_quotes_who_would_not(clock, sites):
    sites[0].online = False
    sites[2].meets = lambda message: sites[2].says(message, refusal("west"))
    transport = Watched(Connected(clock, *sites))
    with pytest.raises(
        QuorumError,
        match=r"1 of \d sites take part after \d+ s, quorum is 2; start the missing nodes and run again\. "
        r"west refused: not approved here",
    ):
        transport.hello(RECIPE, HEAD)


def test_a_site_that_approves_while_the_run_waits_takes_part(clock, sites):
    west = sites[2]
    west.meets = lambda message: west.says(message, refusal("west"))
    sites[0].online = False
    clock.after(200, lambda: setattr(west, "meets", None))
    transport = Watched(Connected(clock, *sites))
    assert list(transport.hello(RECIPE, HEAD)) == ["east", "west"]
    assert west.asked["query"] == 8  # every 30 s, for each refusal is an event in the site's log


def test_a_site_that_refuses_keeps_no_quorum_waiting(clock, sites):
    sites[2].meets = lambda message: sites[2].says(message, refusal("west"))
    began = clock.now
    assert list(Watched(Connected(clock, *sites)).hello(RECIPE, HEAD)) == ["east", "north"]
    assert clock.now - began < 1


def test_a_hello_for_another_recipe_is_none(clock, sites):
    sites[2].meets = lambda message: sites[2].says(message, hello("west", recipe_id="f" * 64))
    assert list(Watched(Connected(clock, *sites)).hello(RECIPE, HEAD)) == ["east", "north"]


def test_sites_that_came_or_came_back_are_met_between_rounds_and_nobody_else_is_asked(clock, sites):
    late = sites.pop()
    transport = Watched(Connected(clock, *sites))
    assert list(transport.hello(RECIPE, HEAD)) == ["east", "north"]
    assert transport.joined(RECIPE, HEAD) == {}
    transport._net._grid.sites[late.number] = late
    clock.sleep(2)
    assert list(transport.joined(RECIPE, HEAD)) == ["west"]
    assert transport.joined(RECIPE, HEAD) == {}
    sites[1].restart()
    clock.sleep(2)
    assert list(transport.joined(RECIPE, HEAD)) == ["east"]
    assert [site.asked["query"] for site in (*sites, late)] == [1, 2, 1]


def test_a_site_that_takes_long_to_say_hello_holds_no_round_up_and_joins_a_later_one(clock, sites):
    late = sites.pop()
    late.delay_s = 100
    transport = Watched(Connected(clock, *sites))
    transport.hello(RECIPE, HEAD)
    transport._net._grid.sites[late.number] = late
    clock.sleep(2)
    began = clock.now
    assert transport.joined(RECIPE, HEAD) == {}
    assert 10 <= clock.now - began < 11
    assert transport.joined(RECIPE, HEAD) == {}
    assert clock.now - began < 11  # it was asked before: nobody waits for it a second time
    clock.sleep(100)
    assert list(transport.joined(RECIPE, HEAD)) == ["west"]
    assert late.asked["query"] == 1


def test_a_site_that_never_said_hello_is_a_failure_at_once(clock, sites):
    transport = ready(clock, sites)
    began = clock.now
    assert list(transport.ask(PLAN, ["south"], 600)) == [Failure(site="south", round=1, why="it said no hello")]
    assert clock.now == began


# One process: no signatures, and an error is final


def alone(clock: Clock, sites: list[Site]) -> FlowerTransport:
    for site in sites:
        site.signed = False
    return FlowerTransport(Net(clock, *sites))


def test_in_one_process_an_error_is_final_at_once(clock, sites):
    transport = alone(clock, sites)
    assert list(transport.hello(RECIPE, HEAD)) == list(SITES)
    sites[2].rule = sites[2].fails
    began = clock.now
    assert asked(transport)["west"] == Failure(site="west", round=1, why="node error 2: ValueError")
    assert sites[2].asked["train"] == 1
    assert clock.now == began


def test_in_one_process_a_site_that_waits_for_its_turn_is_not_left_out_after_offline_s(clock, sites):
    sites[2].delay_s = RECIPE.federation.offline_s + 100
    assert list(alone(clock, sites).hello(RECIPE, HEAD)) == list(SITES)


def test_in_one_process_two_nodes_of_one_name_are_refused(clock, sites):
    transport = alone(clock, sites)
    sites[2].meets = lambda message: sites[2].says(message, hello("east"))
    with pytest.raises(ExchangeError, match="two nodes say that they are site east; give every site its own name"):
        transport.hello(RECIPE, HEAD)


def test_in_one_process_nobody_joins(clock, sites):
    transport = alone(clock, sites)
    transport.hello(RECIPE, HEAD)
    transport._net._grid.sites[14] = Site("south", 14, signed=False)
    assert transport.joined(RECIPE, HEAD) == {}


@pytest.mark.parametrize(
    "bad",
    [
        lambda message: Message(Error(code=2, reason="raised"), reply_to=message),
        lambda message: Message(RecordDict(), reply_to=message),
        lambda message: Message(RecordDict({"message": ConfigRecord({"kind": "hello"})}), reply_to=message),
        lambda message: Message(RecordDict({"x": ArrayRecord()}), reply_to=message),
        lambda message: Message(wire.encode(answer(PLAN, "east")), reply_to=message),
        lambda message: None,
    ],
    ids=["error", "empty", "half", "other", "update", "silence"],
)
def test_a_node_that_says_no_hello_is_absent_and_stops_nobody(clock, sites, bad):
    transport = alone(clock, sites)
    sites[1].meets = bad
    assert list(transport.hello(RECIPE, HEAD)) == ["north", "west"]


def from_node_1(message):
    reply = Message(Error(code=3, reason="unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (from_node_1, "node error 3"),
        (
            lambda message: Message(Error(code=2, reason="\x1b[2J" + "x" * 500), reply_to=message),
            "node error 2: ?[2Jxxx",
        ),
        (lambda message: None, "no reply within 5 s"),
        (lambda message: Message(RecordDict(), reply_to=message), "unreadable reply"),
        (lambda message: Message(wire.encode(hello("east")), reply_to=message), "no answer to a plan"),
        (lambda message: Message(wire.encode(PLAN), reply_to=message), "unreadable reply"),
        (lambda message: Message(wire.encode(answer(PLAN, "west")), reply_to=message), "another site's name"),
    ],
    ids=["error from node 1", "long error", "silence", "empty", "hello", "plan", "other's name"],
)
def test_a_bad_answer_is_a_failure_of_the_site_that_was_asked_and_of_nobody_else(clock, sites, rule, why):
    transport = alone(clock, sites)
    transport.hello(RECIPE, HEAD)
    sites[1].rule = rule
    replies = asked(transport, 5)
    assert isinstance(replies["east"], Failure)
    assert why in replies["east"].why
    assert len(replies["east"].why) < 200
    assert isinstance(replies["north"], Update)
    assert isinstance(replies["west"], Update)


def test_an_answer_to_a_message_that_was_never_sent_is_dropped(clock, sites):
    transport = alone(clock, sites)
    transport.hello(RECIPE, HEAD)

    def stray(message):
        reply = Message(wire.encode(answer(PLAN, "east")), reply_to=message)
        reply.metadata.__dict__["_reply_to_message_id"] = "m999"
        return reply

    sites[1].rule = stray
    assert isinstance(asked(transport, 5)["east"], Failure)


def test_a_node_that_lies_about_its_number_speaks_only_for_itself(clock, sites):
    transport = alone(clock, sites)
    transport.hello(RECIPE, HEAD)

    def posing(message):
        reply = Message(wire.encode(answer(PLAN, "west", weight=9.0)), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 13
        return reply

    sites[1].rule = posing
    replies = asked(transport)
    assert isinstance(replies["east"], Failure)
    assert replies["west"].weight == 1.0


def test_nothing_but_the_reply_keeps_its_weights_in_memory(clock, sites):
    transport = alone(clock, sites)
    transport.hello(RECIPE, HEAD)
    gc.collect()
    gc.disable()  # Flower's records sit in reference cycles
    try:
        base = asked(transport)["east"].delta["w"]
        while isinstance(base, np.ndarray):
            base = base.base
    finally:
        gc.enable()
    assert isinstance(base, bytes)
    assert sys.getrefcount(base) == 2  # this name and the call: the reply is gone, and no record of Flower's is left
