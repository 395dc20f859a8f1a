"""Flower's ServerApp: plans go out over a Grid, replies come back by site name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from common import wire
from common.config import Recipe
from common.errors import ExchangeError, QuorumError
from common.exchange import Failure, Hello, Reply, RoundPlan
from server.rounds import Transport

_POLL_S = 0.5


def server_app(coordinate: Callable[[Transport], None]) -> ServerApp:
    """The app that a coordinator runs, deployed or simulated.

    Args:
        coordinate: Runs the whole federation over the transport that it is given.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinate(FlowerTransport(grid))

    return app


class FlowerTransport:
    """Asks sites through a Flower Grid, one `send_and_receive` a round."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._nodes: dict[str, int] = {}

    def hello(self, recipe: Recipe) -> Mapping[str, Hello]:
        """Waits for `federation.sites` nodes, then asks each who it is.

        A node whose answer is no hello counts as absent: one site alone cannot stop a run.

        Raises:
            QuorumError: Fewer sites than the quorum answered within `federation.timeout_s`.
            ExchangeError: Two nodes claim the same site name.
        """
        federation = recipe.federation
        end = time.monotonic() + federation.timeout_s
        nodes = sorted(self._grid.get_node_ids())
        while len(nodes) < federation.sites and time.monotonic() < end:
            time.sleep(_POLL_S)
            nodes = sorted(self._grid.get_node_ids())
        record = wire.encode_question()
        messages = [Message(record, node, MessageType.QUERY) for node in nodes]
        hellos: dict[str, Hello] = {}
        for node, message in self._answers(messages, max(1.0, end - time.monotonic())):
            try:
                answer = wire.decode(message.content, Hello) if not message.has_error() else None
            except ExchangeError:
                answer = None
            if answer is None:
                continue
            if answer.site in hellos:
                raise ExchangeError(f"two nodes say that they are site {answer.site}; give every site its own name")
            hellos[answer.site] = answer
            self._nodes[answer.site] = node
        if len(hellos) < federation.quorum:
            raise QuorumError(
                f"{len(hellos)} sites answered within {federation.timeout_s:g} s, quorum is {federation.quorum}; "
                "start the missing nodes and run again"
            )
        return dict(sorted(hellos.items()))

    def ask(self, plan: RoundPlan, sites: Sequence[str], timeout_s: float) -> Sequence[Reply]:
        """Sends the plan to every site and gives one reply for each, in the order of `sites`."""
        kind = MessageType.TRAIN if plan.work == "train" else MessageType.EVALUATE
        record = wire.encode(plan)
        node_site = {self._nodes[site]: site for site in sites if site in self._nodes}
        messages = [Message(record, node, kind, group_id=str(plan.round)) for node in node_site]
        replies = {
            node_site[node]: _read(message, node_site[node], plan.round)
            for node, message in self._answers(messages, timeout_s)
        }
        return [replies.get(site) or _silence(site, plan.round, timeout_s) for site in sites]

    def _answers(self, messages: Sequence[Message], timeout_s: float) -> Iterator[tuple[int, Message]]:
        """Each answer with the node that was asked."""
        for answer in self._grid.send_and_receive(messages, timeout=timeout_s):
            # By the message it answers, never by its source: an error may come from node 1, and a node may lie.
            asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
            node = asked.get(answer.metadata.reply_to_message_id)
            if node is not None:
                yield node, answer


def _read(message: Message, site: str, round_: int) -> Reply:
    if message.has_error():
        return Failure(site=site, round=round_, why=f"node error {message.error.code}")
    try:
        reply = wire.decode_reply(message.content)
    except ExchangeError as error:
        return Failure(site=site, round=round_, why=f"unreadable reply: {error}")
    if reply.site != site:
        return Failure(site=site, round=round_, why="the reply is in another site's name")
    return reply


def _silence(site: str, round_: int, timeout_s: float) -> Failure:
    return Failure(site=site, round=round_, why=f"no reply within {timeout_s:g} s")
