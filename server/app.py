"""Flower's ServerApp: plans go out over a Grid, replies come back by site name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast, get_args

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from common import wire
from common.clock import utc_now
from common.config import Federation, Recipe
from common.errors import ExchangeError, QuorumError
from common.exchange import (
    Answer,
    Ask,
    Failure,
    Hello,
    Masking,
    Question,
    Refusal,
    Reply,
    RoundPlan,
    Update,
)
from common.identity import Signer
from common.weights import Weights
from server.blobs import Round, Store
from server.rounds import Transport
from server.secure import Take

_POLL_S = (0.05, 0.3)
_LOOK_S = 1.0
"""Between two looks at who is connected."""
_JOIN_S = 10.0
"""Longest that a round waits for the answers of nodes that came."""
_REFUSED_S = 30.0
"""After this a site that would not work on the recipe is asked once more: somebody may have approved it meanwhile."""
_PAUSE_S = (1.0, 30.0)
"""Before a site that answered with an error is asked again: the first pause, and the longest."""
_NAMED = 8
"""Sites that a message names where all have the same to say."""
_NODE_UNAVAILABLE = 5
"""Flower's own error code for a node that is not connected."""

Keys = Callable[[], Mapping[str, str]]
"""Signing keys of the sites that may take part, by name; called at every reply."""
State = Literal["online", "offline", "asked", "answered", "refused", "failed", "late"]
Watch = Callable[[str, State, str], None]
"""Told (site, state, why)."""
Heard = Callable[[Message], None]


def server_app(
    coordinate: Callable[[Transport], None],
    *,
    watch: Watch | None = None,
) -> ServerApp:
    """The app of a simulated coordinator; a deployed one opens its grid itself (`server/runner.py`).

    Args:
        coordinate: Runs the whole federation over the transport that it is given.
        watch: As for `FlowerTransport`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinate(FlowerTransport(grid, watch=watch))

    return app


class FlowerTransport:
    """Asks sites through a Flower Grid, and asks again where a node failed, vanished or came back.

    A site answers a question that it knows from its stored reply, so asking again costs no second training.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        signer: Signer | None = None,
        keys: Keys | None = None,
        watch: Watch | None = None,
        store: Store | None = None,
    ) -> None:
        """Wires the transport.

        Args:
            signer: The coordinator's, under every message; None where both sides are one process.
            keys: What replies must be signed with. None where both sides are one process: there a node that failed
                has failed for good, and nobody is asked twice.
            watch: Told what becomes of every site, for a status display.
            store: Where weights travel beside the messages; None sends them in the messages.
        """
        self._store = store
        self._net, self._signer, self._keys = _Net(grid), signer, keys
        self._patient = keys is not None
        self._watch: Watch = watch or (lambda site, state, why: None)
        self._federation, self._recipe_id, self._question = Federation(), "", RecordDict()
        self._model_bytes = 0
        self._fewer: int | None = None
        """How many are enough, where it is not `federation.quorum`."""
        self._nodes: dict[int, _Node] = {}
        self._sites: dict[str, int] = {}
        """The node that each site was last heard from."""
        self._new: dict[str, Hello] = {}
        """Hellos that the caller has not been told."""
        self._excuses: dict[str, tuple[State, str]] = {}
        """Why a site that was asked is not among the sites."""
        self._away: dict[str, _Away] = {}

    def hello(
        self, recipe: Recipe, audit_head: str, before: Collection[str] = (), *, quorum: int | None = None
    ) -> Mapping[str, Hello]:
        """Waits for `federation.sites` sites, and asks each who it is.

        Once the quorum is there, the others get `federation.offline_s` more (in one process all of the time). A node
        whose answer is no hello counts as absent: one site alone cannot stop a run.

        Args:
            before: Sites that took part before this process began. While one is connected it may still be at work for
                the process that was killed, and has the whole `federation.timeout_s` to answer, as in a round.
            quorum: How many are enough, now and in all that is asked later; None: `federation.quorum`.

        Raises:
            QuorumError: Fewer sites than the quorum answered within `federation.timeout_s`.
            ExchangeError: Two nodes claim the same site name.
        """
        self._fewer = quorum
        self._about(recipe, audit_head)
        federation, began = recipe.federation, time.monotonic()
        end = deadline = began + federation.timeout_s
        while True:
            self._greet(deadline - time.monotonic())
            came = self._net.collect()
            now = time.monotonic()
            if self._patient and len(self._sites) >= self._quorum:  # in one process all are there, and in a queue
                end = min(end, now + federation.offline_s)
            if now >= deadline or (now >= end and not self._at_work(before)) or self._complete():
                break
            if not came:
                self._net.pause(began, deadline)
        found = self._told()
        if len(found) < self._quorum:
            raise QuorumError(self._too_few(len(found), min(time.monotonic() - began, federation.timeout_s)))
        return found

    def joined(self, recipe: Recipe, audit_head: str) -> Mapping[str, Hello]:
        """Sites that came, or came back, since the last call; a slow answer is taken at a later call."""
        if not self._patient:
            return {}
        self._about(recipe, audit_head)
        began = time.monotonic()
        asked = self._greet(recipe.federation.timeout_s)
        while True:
            self._net.collect()
            if not any(node.asked for node in asked) or time.monotonic() >= began + _JOIN_S:
                return self._told()
            self._net.pause(began, began + _JOIN_S)

    def ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float) -> Iterator[Reply]:
        """Sends the plan to every site and gives one reply for each, as they come; none is kept here.

        A site that is connected has the whole `timeout_s`. One that is not, or that answers with errors, is asked
        again until then or, once the quorum has answered, until it has been so for `federation.offline_s`.
        """
        store, self._model_bytes = self._store, plan.weights.nbytes
        # Open until the caller has the last reply, or has enough of them.
        with nullcontext() if store is None else store.round(sites, plan.weights.nbytes) as blobs:
            yield from self._ask(plan, sites, timeout_s, blobs)

    def _ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float, blobs: Round | None) -> Iterator[Reply]:
        kind = MessageType.TRAIN if plan.work == "train" else MessageType.EVALUATE
        record, why = self._written(plan, blobs), f"no reply within {timeout_s:g} s"
        visits = [_Visit(site, plan.round, record, (Update,), why, blobs=blobs) for site in sites]
        for visit in self._converse(visits, kind, timeout_s):
            yield cast(Reply, visit.tell())

    def step(self, asks: Mapping[str, Ask], timeout_s: float, take: Take) -> Mapping[str, Answer | Refusal | Failure]:
        """Sends each site its own step of a secure sum, and hands every answer to `take` as it comes.

        A site asked twice answers twice the same. In the short steps, once the quorum has answered, the others get
        `offline_s` more; masked updates have the whole of `timeout_s`, for a line may be slow.
        """
        large = any(isinstance(ask, Masking) for ask in asks.values())
        kind = MessageType.TRAIN if large else MessageType.QUERY
        store = self._store if large else None
        with nullcontext() if store is None else store.round(sorted(asks), self._model_bytes) as blobs:
            records: dict[int, RecordDict] = {}  # what all are asked is encoded once
            visits = []
            for site, ask in sorted(asks.items()):
                if id(ask) not in records:
                    records[id(ask)] = self._written(ask, blobs)
                why = f"no answer to the {type(ask).__name__.lower()} within {timeout_s:g} s"
                visits.append(_Visit(site, ask.round, records[id(ask)], get_args(Answer), why, take=take, blobs=blobs))
            for _ in self._converse(visits, kind, timeout_s, hurry=not large):
                pass
        return {visit.site: cast(Answer | Refusal | Failure, visit.reply) for visit in visits}

    def _converse(
        self, visits: Sequence[_Visit], kind: str, timeout_s: float, *, hurry: bool = False
    ) -> Iterator[_Visit]:
        """Asks until every visit has its reply, and gives each when it has.

        Args:
            hurry: Once the quorum has answered, nobody is waited for longer than `offline_s`, connected or not.
        """
        began, end = time.monotonic(), time.monotonic() + timeout_s
        open_, first = list(visits), True
        while True:
            now = time.monotonic()
            if self._patient:  # a site may be back under another node
                self._greet(self._federation.timeout_s, only_new=True)
            # Where nobody is asked twice, nothing becomes due later.
            due = self._due(open_) if self._patient or first else []
            first = False
            for record in {id(visit.record): visit.record for visit in due}.values():
                same = [visit for visit in due if visit.record is record]
                letters = [(visit.node, partial(self._heard, visit)) for visit in same]
                sent = self._net.send(record, kind, letters, end - now, group=str(same[0].round))
                for visit, message_id in zip(same, sent, strict=True):
                    visit.asked, visit.again_at = message_id, now + _PAUSE_S[0]
                    visit.letters.append(message_id)
                    self._watch(visit.site, "asked", f"round {visit.round}")
            came = self._net.collect()
            self._give_up(visits)
            if hurry and sum(_usable(visit) for visit in visits) >= self._quorum:
                hurry, end = False, min(end, time.monotonic() + self._federation.offline_s)
            answered = [visit for visit in open_ if visit.reply]
            open_ = [visit for visit in open_ if not visit.reply]
            yield from answered
            if not open_ or time.monotonic() >= end:
                break
            if not came:
                self._net.pause(began, end)
        self._net.forget(name for visit in visits for name in visit.letters)
        for visit in open_:
            self._late(visit)
            yield visit

    def _written(self, value: wire.Request, blobs: Round | None = None) -> RecordDict:
        return wire.encode(value, self._signer, blobs) if self._signer else wire.hand(value)

    # Who is there

    def _about(self, recipe: Recipe, audit_head: str) -> None:
        self._federation, self._recipe_id = recipe.federation, recipe.id
        self._question = self._written(Question(recipe_id=recipe.id, audit_head=audit_head))

    @property
    def _quorum(self) -> int:
        return self._federation.quorum if self._fewer is None else self._fewer

    def _greet(self, ttl_s: float, *, only_new: bool = False) -> list[_Node]:
        """Asks who they are: nodes that came or came back, and from time to time those that gave no good answer."""
        online, now = self._look(), time.monotonic()
        asked = []
        for number, mark in sorted(online.items()):
            node = self._nodes.get(number)
            if node is None:
                self._nodes[number] = node = _Node(number, mark)
            elif only_new or (node.mark == mark and (node.asked or now < node.again_at)):
                continue
            node.mark = mark
            asked.append(node)
        letters = [(node.number, partial(self._met, node)) for node in asked]
        for node, message_id in zip(asked, self._net.send(self._question, "query", letters, ttl_s), strict=True):
            node.asked, node.again_at = message_id, now + _PAUSE_S[0]
        return asked

    def _met(self, node: _Node, message: Message) -> None:
        if message.metadata.reply_to_message_id != node.asked:
            return  # of the time before it came back
        node.asked, node.again_at = "", time.monotonic() + _REFUSED_S if self._patient else float("inf")
        try:
            answer = self._introduction(message)
        except ExchangeError as error:
            self._excuse(self._net.name(node.number), "failed", str(error))
            return
        site = answer.site
        if isinstance(answer, Refusal):
            self._excuse(site, "refused", answer.why)
            return
        other = self._sites.get(site, node.number)
        if other != node.number and other in self._look():
            why = f"two nodes say that they are site {site}; give every site its own name"
            if not self._patient:
                raise ExchangeError(why)
            self._excuse(site, "failed", why)  # both hold the site's key: its own affair, and nobody else's
            return
        node.again_at = float("inf")
        self._sites[site], self._new[site] = node.number, answer
        self._excuses.pop(site, None)
        self._excuses.pop(self._net.name(node.number), None)
        self._watch(site, "online", "")

    def _introduction(self, message: Message) -> Hello | Refusal:
        if message.has_error():
            raise ExchangeError(_error(message))
        answer = wire.decode_reply(message.content)
        self._check(message, answer.site)
        other = isinstance(answer, Hello) and answer.recipe_id != self._recipe_id
        if not isinstance(answer, Hello | Refusal) or other:
            raise ExchangeError("the answer is none to the question who is there")
        return answer

    def _excuse(self, site: str, state: State, why: str) -> None:
        self._excuses[site] = (state, why)
        self._watch(site, state, why)

    def _too_few(self, found: int, waited_s: float) -> str:
        excused: dict[tuple[State, str], list[str]] = {}
        for site, excuse in sorted(self._excuses.items()):
            excused.setdefault(excuse, []).append(site)
        sites, after = self._federation.sites, f" after {waited_s:.0f} s" if self._patient else ""
        text = f"{found} of {sites} sites take part{after}, quorum is {self._quorum}"
        if self._patient and found + len(self._excuses) < sites:  # in one process nobody is missing
            text += "; start the missing nodes and run again"
        for (state, why), names in excused.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            text += f". {', '.join(names[:_NAMED])}{more} {state}: {why}"
        return text

    def _told(self) -> dict[str, Hello]:
        new, self._new = self._new, {}
        return dict(sorted(new.items()))

    def _at_work(self, sites: Collection[str]) -> bool:
        """Whether one of these sites is connected and has not answered the question who it is."""
        online = self._look()
        silent = [node.number for node in self._nodes.values() if node.asked and node.number in online]
        return any(self._net.name(number) in sites for number in silent)

    def _complete(self) -> bool:
        federation, open_ = self._federation, any(node.asked for node in self._nodes.values())
        if not self._patient:
            return not open_ and len(self._nodes) >= federation.sites
        refused = {site for site, (state, _) in self._excuses.items() if state == "refused"}
        answered = len(self._sites.keys() | refused)
        return not open_ and answered >= federation.sites and len(self._sites) >= self._quorum

    def _look(self) -> Mapping[int, str]:
        """Connected nodes, and a mark that changes when one connects anew; tells who came and who went."""
        online = self._net.online(_LOOK_S if self._patient else _PAUSE_S[0])
        for site, number in self._sites.items():
            if number not in online and site not in self._away:
                self._away[site] = _Away(time.monotonic(), utc_now())
                self._watch(site, "offline", "")
            elif number in online and site in self._away:
                del self._away[site]
                self._watch(site, "online", "")
        return online

    # One visit

    def _due(self, visits: Iterable[_Visit]) -> list[_Visit]:
        """Those whose site is to be asked now."""
        online, now = self._look(), time.monotonic()
        return [visit for visit in visits if self._is_due(visit, online, now)]

    def _is_due(self, visit: _Visit, online: Mapping[int, str], now: float) -> bool:
        if visit.reply:
            return False
        number = self._sites.get(visit.site)
        mark = online.get(number) if number is not None else None
        if number is None or (mark is None and not self._patient):
            visit.why = "it said no hello" if number is None else "it is not connected"
            self._fail(visit, visit.why)
        if number is None or mark is None:
            visit.asked = ""  # what it was asked is lost with the connection
            return False
        if (visit.node, visit.mark) != (number, mark):
            visit.node, visit.mark, visit.asked = number, mark, ""
        return not visit.asked and now >= visit.again_at

    def _heard(self, visit: _Visit, message: Message) -> None:
        if visit.reply:
            return
        if not message.has_error():
            visit.reply = self._read(message, visit)
            if _usable(visit):
                self._watch(visit.site, "answered", f"round {visit.round}")
            else:
                why = str(getattr(visit.reply, "why", ""))
                self._watch(visit.site, "refused" if isinstance(visit.reply, Refusal) else "failed", why)
            return
        if message.metadata.reply_to_message_id != visit.asked:
            return  # of the time before it came back
        visit.asked, visit.why = "", _error(message)
        if not self._patient:
            self._fail(visit, visit.why)
        elif message.error.code == _NODE_UNAVAILABLE:
            self._net.look_again()
        else:
            now = time.monotonic()
            visit.again_at, visit.pause_s = now + visit.pause_s, min(2 * visit.pause_s, _PAUSE_S[1])
            visit.failing_since = visit.failing_since or now
            self._watch(visit.site, "failed", visit.why)

    def _give_up(self, visits: Iterable[_Visit]) -> None:
        """Once the quorum has answered, nobody waits longer than `offline_s` for who is away or only fails."""
        if not self._patient or sum(_usable(visit) for visit in visits) < self._quorum:
            return
        latest = time.monotonic() - self._federation.offline_s
        for visit in visits:
            away = self._away.get(visit.site)
            since = (away.since if away else None, visit.failing_since)
            if not visit.reply and not visit.asked and any(begin is not None and begin <= latest for begin in since):
                self._late(visit)

    def _late(self, visit: _Visit) -> Failure:
        away = self._away.get(visit.site)
        return self._fail(visit, f"offline since {away.at}" if away else visit.why, "late")

    def _fail(self, visit: _Visit, why: str, state: State = "failed") -> Failure:
        visit.reply = failure = Failure(site=visit.site, round=visit.round, why=why)
        self._watch(visit.site, state, why)
        return failure

    def _read(self, message: Message, visit: _Visit) -> Reply | Answer:
        why = f"the reply is no answer to {'a plan' if visit.expected == (Update,) else 'this step of a secure sum'}"
        try:
            self._check(message, visit.site)
            reply = wire.decode_reply(message.content, visit.answers)
            if isinstance(reply, (Refusal, *visit.expected)):
                if reply.site == visit.site:
                    return reply if isinstance(reply, Refusal) else visit.take(reply)
                why = "the reply is in another site's name"
        except ExchangeError as error:
            why = f"unreadable reply: {error}"
        return Failure(site=visit.site, round=visit.round, why=why)

    def _check(self, message: Message, site: str) -> None:
        if self._keys is not None:
            key = self._keys().get(site)
            if key is None:
                raise ExchangeError("the site is not, or no more, in the registry")
            wire.check_signature(message.content, key)


@dataclass
class _Node:
    """A node that was asked who it is."""

    number: int
    mark: str
    asked: str = ""
    """Id of the question that is under way."""
    again_at: float = 0.0


@dataclass
class _Away:
    since: float
    at: str


@dataclass
class _Visit:
    """What is known of one site in one round."""

    site: str
    round: int
    record: RecordDict
    """What it is asked."""
    expected: tuple[type, ...]
    """Types of its answer."""
    why: str
    """Why there is no reply yet."""
    take: Callable[[Any], Any] = lambda answer: answer
    """Told the answer; gives what is kept of it."""
    blobs: Round | None = None
    """Where weights of this round travel."""
    reply: Reply | Answer | None = None
    asked: str = ""
    """Id of the question that is under way at a connected node."""
    letters: list[str] = field(default_factory=list)
    """Ids of all questions, for an answer to an earlier one is as good."""
    node: int = 0
    mark: str = ""
    again_at: float = 0.0
    pause_s: float = _PAUSE_S[0]
    failing_since: float | None = None

    def tell(self) -> Reply | Answer | None:
        """Gives the reply away; what stays here has no weights."""
        reply = self.reply
        if isinstance(reply, Update):
            self.reply = replace(reply, delta=Weights({}))
        return reply

    def answers(self, ticket: str) -> Round:
        """Where the site's weights lie."""
        if self.blobs is None or ticket != self.blobs.ticket:
            raise ExchangeError("its weights are of another round")
        return self.blobs.answers(self.site)


class _Net:
    """A Grid, and who waits for the answers to what was sent through it."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: dict[str, Heard] = {}
        self._online: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._looked_at: float | None = None

    def online(self, not_older_s: float) -> Mapping[int, str]:
        """Connected nodes, and a mark that changes when one connects anew, where the Grid tells (`server.link`)."""
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at >= not_older_s:
            presence: Callable[[], Mapping[int, tuple[str, str]]] | None = getattr(self._grid, "presence", None)
            if presence is not None:
                found = presence()
                self._online = {node: mark for node, (_, mark) in found.items()}
                self._names |= {node: name for node, (name, _) in found.items() if name}
            else:
                self._online = dict.fromkeys(self._grid.get_node_ids(), "")
            self._looked_at = now
        return self._online

    def look_again(self) -> None:
        """Has `online` ask anew."""
        self._looked_at = None

    def name(self, node: int) -> str:
        """The site whose node key this node has, where the Grid tells; not what it says of itself."""
        return self._names.get(node, f"node {node}")

    def send(
        self, record: RecordDict, kind: str, letters: Sequence[tuple[int, Heard]], ttl_s: float, *, group: str = ""
    ) -> list[str]:
        """Sends one content to many nodes: the messages' ids, empty for what Flower did not take."""
        if not letters:
            return []
        ttl_s = max(1.0, ttl_s)  # Flower keeps a message for 12 h when it is not told otherwise
        messages = [Message(record, node, kind, ttl=ttl_s, group_id=group) for node, _ in letters]
        ids = [message_id or "" for message_id in self._grid.push_messages(messages)]
        self._waiting |= {name: heard for name, (_, heard) in zip(ids, letters, strict=True) if name}
        return ids

    def collect(self) -> bool:
        """Takes what has come and hands it to who waits for it; whether there was something."""
        came = False
        if not self._waiting:
            return came
        for message in self._grid.pull_messages(list(self._waiting)):
            # By the message it answers, never by its source: an error may come from node 1, and a node may lie.
            heard = self._waiting.pop(message.metadata.reply_to_message_id, None)
            if heard is not None:
                heard(message)
            if message.has_content():
                wire.let_go(message.content)
            came = True
        return came

    def pause(self, began: float, end: float) -> None:
        """Sleeps a little, and longer the longer it takes, or until the Grid has something, where it tells."""
        now = time.monotonic()
        pause_s = max(0.0, min(max(_POLL_S[0], (now - began) / 50), _POLL_S[1], end - now))
        # The Grid's last look may be long past where nobody's answer is missing: it would tell of what has been taken.
        wait: Callable[[float], None] = getattr(self._grid, "wait", time.sleep) if self._waiting else time.sleep
        wait(pause_s)

    def forget(self, ids: Iterable[str]) -> None:
        """Waits no more for the answers to these, and lets the Grid know, where it wants to."""
        forgotten = [name for name in ids if self._waiting.pop(name, None) is not None]
        forget: Callable[[Iterable[str]], None] | None = getattr(self._grid, "forget", None)
        if forget is not None and forgotten:
            forget(forgotten)


def _usable(visit: _Visit) -> bool:
    return visit.reply is not None and not isinstance(visit.reply, Refusal | Failure)


def _error(message: Message) -> str:
    # Printable and short: a node chose these words.
    reason = re.sub(r"[^ -~]", "?", str(message.error.reason or ""))[:120]
    return f"node error {message.error.code}" + (f": {reason}" if reason else "")
