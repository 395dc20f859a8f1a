"""Flower's ClientApp: a message becomes a plan, the site's answer becomes a message."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import Site
from common import wire
from common.errors import ExchangeError
from common.exchange import Refusal, RoundPlan


def client_app(site_of: Callable[[Context], Site]) -> ClientApp:
    """The app that a hospital runs, deployed or simulated.

    Args:
        site_of: Finds the site that a Flower context stands for; called at every message, so it must be cheap.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _visit(message, site_of(context), "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _visit(message, site_of(context), "evaluate")

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(wire.encode(site_of(context).hello()), reply_to=message)

    return app


def _visit(message: Message, site: Site, work: str) -> Message:
    try:
        plan = wire.decode(message.content, RoundPlan)
        if plan.work != work:
            raise ExchangeError(f"a plan to {plan.work} came as a message to {work}")
    except ExchangeError as error:
        site.audit.append("message refused", why=str(error)[:500])
        refusal = Refusal(
            site=site.name, recipe_id=site.recipe.id, round=1, code="message", why=str(error)[:500],
            audit_head=site.audit.head,
        )  # fmt: skip
        return Message(wire.encode(refusal), reply_to=message)
    return Message(wire.encode(site.visit(plan)), reply_to=message)
