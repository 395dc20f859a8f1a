"""HTML that escapes by default: text becomes markup only where `Html` says so."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from common.style import CSS

_VOID = frozenset({"br", "hr", "meta", "link", "img"})
_TURNING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn what follows around: words of others shall not change the words beside."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Html | None


def tag(kind: str, /, *children: Child, **attributes: str | None) -> Html:
    """An element; plain strings are escaped, `Html` and elements are not.

    Attributes: `class_` is class, other underscores become hyphens; None leaves the attribute out.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if kind in _VOID:
        return Html(f"<{kind}{shown}>")
    return Html(f"<{kind}{shown}>{join(*children)}</{kind}>")


def join(*children: Child) -> Html:
    """Children one after another, escaped unless they are markup."""
    return Html(
        "".join(child if isinstance(child, Html) else _escape(child) for child in children if child is not None)
    )


def table(
    head: Iterable[Child], rows: Iterable[Iterable[Child]], *, caption: str, numbers_from: int = 1, class_: str = ""
) -> Html:
    """A table that scrolls sideways on a narrow screen; the first cell of each row is its header.

    Args:
        head: Column titles.
        rows: Cells of each row.
        caption: What the table shows; read aloud by screen readers, shown small above it.
        numbers_from: First column that is set flush right.
        class_: Extra class of the table.
    """

    def kind(column: int) -> str | None:
        return "n" if column >= numbers_from else None

    top = tag("tr", *(tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(head)))
    body = []
    for row in rows:
        first, *rest = row
        cells = (tag("td", cell, class_=kind(i)) for i, cell in enumerate(rest, start=1))
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    inner = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", top), tag("tbody", *body), class_=class_ or None
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def items(*children: Child, class_: str | None = None) -> Html:
    """A bullet list."""
    return tag("ul", *(tag("li", child) for child in children), class_=class_)


def pairs(*cells: tuple[Child, Child]) -> Html:
    """Names and values."""
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in cells))


def moment(iso: str) -> str:
    """A time stamp for the eye: date, time to the minute, zone."""
    shown = re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?", r"\1 \2 ", iso)
    return re.sub(r"(\+00:00|Z)$", "UTC", shown)


def card(name: str, value: Child, more: Child = None, *, small: bool = False) -> Html:
    """A number that stands out; `small` for a word in its place."""
    return tag(
        "div",
        tag("div", name, class_="name"),
        tag("div", value, class_="value small" if small else "value"),
        tag("div", more, class_="more") if more else None,
        class_="card",
    )


def document(
    title: str,
    top: Iterable[Child],
    sections: Iterable[tuple[str, str, Child]],
    footer: str,
    *,
    css: str = "",
    images: bool = False,
    listed: bool = True,
) -> str:
    """A whole page. Nothing is fetched and nothing runs, whatever a name in it looks like.

    Args:
        title: Of the window.
        top: What stands above the sections; the list of their titles follows it.
        sections: The key that a link has, the title and the content; without content it is left out, and without a key
            of the list.
        footer: Ends the page; that the file needs nothing else is added.
        css: Beside that of `common.style`.
        images: Whether pictures may stand in it.
        listed: Whether a search engine may know of it.
    """
    shown = [section for section in sections if section[2]]
    links = [tag("a", name, href=f"#{key}") for key, name, _ in shown if key]
    policy = f"default-src 'none'; style-src 'unsafe-inline'{'; img-src data:' if images else ''}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        None if listed else tag("meta", name="robots", content="noindex"),
        tag("title", title),
        tag("style", Html(CSS + css)),
    )
    body = tag(
        "body",
        tag("header", *top, tag("nav", *links, aria_label="Sections") if links else None, class_="top"),
        tag("main", *(tag("section", tag("h2", name, id=key or None), part) for key, name, part in shown)),
        tag("footer", f"{footer} This file needs no network and runs no script."),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _escape(text: str) -> str:
    return html.escape(_TURNING.sub(" ", text))
