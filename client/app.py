"""Flower's ClientApp: a message becomes a plan, the site's answer becomes a message."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import Site
from common import wire
from common.errors import ExchangeError
from common.exchange import WIRE_VERSION, Refusal, RoundPlan


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
        site = site_of(context)
        if message.content != wire.encode_question():
            return _refused(message, site, f"not the question that version {WIRE_VERSION} of the protocol asks")
        return Message(wire.encode(site.hello()), reply_to=message)

    return app


def _visit(message: Message, site: Site, work: str) -> Message:
    try:
        plan = wire.decode(message.content, RoundPlan)
    except ExchangeError as error:
        return _refused(message, site, str(error))
    if plan.work != work:
        return _refused(message, site, f"a plan to {plan.work} came as a message to {work}")
    return Message(wire.encode(site.visit(plan)), reply_to=message)


def _refused(message: Message, site: Site, why: str) -> Message:
    head = site.audit.append("message refused", why=why[:500])
    refusal = Refusal(
        site=site.name, recipe_id=site.recipe.id, round=1, code="message", why=why[:500], audit_head=head
    )  # fmt: skip
    return Message(wire.encode(refusal), reply_to=message)
