"""The report's plots: SVG inside the page, in the page's own colours and fonts, the same bytes each time."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from common.html import Html
from common.style import CARD, GRID, INK, MUTED, PALETTE
from server.report import words

Points = Sequence[tuple[float, float]]

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
_SVG_DASHES = (None, "5 2", "1.6 1.8")
_FONT_PT = 9.0
_WIDTH_IN = 4.7


@dataclass(frozen=True)
class Stroke:
    """How one line is drawn, in the plot and in the legend."""

    colour: str
    dash: int = 0
    """Index of solid, dashed, dotted."""
    width: float = 1.2


GLOBAL = Stroke(PALETTE[0], width=2.6)
"""The federated model, and means over sites."""
CENTRALISED = Stroke(INK, dash=1, width=1.8)
CAP = Stroke(MUTED, dash=1)


def site_strokes(names: Sequence[str]) -> dict[str, Stroke]:
    """A stroke for each site; six colours, then the same dashed, then dotted."""
    colours = PALETTE[1:]
    return {
        name: Stroke(colours[i % len(colours)], dash=i // len(colours) % len(_DASHES)) for i, name in enumerate(names)
    }


def swatch(stroke: Stroke) -> Html:
    """A short piece of the line, for a legend."""
    dash = _SVG_DASHES[stroke.dash]
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return Html(
        '<svg width="22" height="10" aria-hidden="true"><line x1="1" x2="21" y1="5" y2="5" '
        f'style="stroke:{_variable(stroke.colour)}" stroke-width="{stroke.width * 1.15:.1f}"{pattern}/></svg>'
    )


def by_round(
    name: str,
    lines: Mapping[str, Points],
    strokes: Mapping[str, Stroke],
    *,
    label: str,
    x_label: str,
    mean: Points = (),
    cap: float | None = None,
    cap_label: str = "",
    bounds: tuple[float, float] | None = None,
    from_zero: bool = False,
    alt: str,
) -> Html:
    """One thin line a site over the rounds, the mean bold, an optional horizontal limit.

    `bounds` are values that the axis never passes, as 0 and 1 for an AUROC.
    """
    figure, axes = _axes(2.75)
    longest = max((len(points) for points in [*lines.values(), mean]), default=0)
    marker = "o" if longest <= 20 else None
    for site, points in lines.items():
        stroke = strokes[site]
        axes.plot(
            *_unzip(points), color=stroke.colour, linewidth=stroke.width, linestyle=_DASHES[stroke.dash],
            marker=marker, markersize=2.4,
        )  # fmt: skip
    if mean:
        axes.plot(*_unzip(mean), color=GLOBAL.colour, linewidth=GLOBAL.width, marker=marker, markersize=4.2)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if longest <= 1:
        at = next((points[0][0] for points in [mean, *lines.values()] if points), 0)
        axes.set_xlim(at - 1, at + 1)
        axes.set_xticks([at])
    low, high = axes.get_ylim()
    if from_zero:
        low, high = 0.0, high if high > 0 else 1.0
    if cap is not None:
        high = max(high, cap * 1.14)
        axes.axhline(cap, color=CAP.colour, linewidth=1.2, linestyle=_DASHES[1], zorder=1)
        axes.annotate(
            cap_label, (0.01, cap), xycoords=("axes fraction", "data"), xytext=(0, 2.5), textcoords="offset points",
            color=MUTED, fontsize=_FONT_PT, va="bottom",
        )  # fmt: skip
    if bounds is not None:
        room = 0.02 * (high - low)  # for half a line or dot, however wide the axis is
        low, high = max(low, bounds[0] - room), min(high, bounds[1] + room)
    axes.set_ylim(low, high)
    axes.set_xlabel(x_label)
    axes.set_ylabel(label)
    return _svg(figure, name, alt)


def roc(
    name: str,
    curves: Sequence[tuple[Points, Stroke]],
    *,
    point: tuple[float, float] | None,
    alt: str,
) -> Html:
    """ROC curves, the diagonal of chance, and the operating point; points are (false, true positive rate)."""
    figure, axes = _axes(4.4)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=_DASHES[2])
    axes.annotate(
        "chance", (0.83, 0.83), xytext=(2, -2), textcoords="offset points", color=MUTED, fontsize=_FONT_PT,
        rotation=45, rotation_mode="anchor", va="top",
    )  # fmt: skip
    for points, stroke in curves:
        axes.plot(
            *_unzip(points), color=stroke.colour, linewidth=stroke.width, linestyle=_DASHES[stroke.dash],
            solid_joinstyle="round",
        )  # fmt: skip
    if point is not None:
        axes.plot(
            *[[value] for value in point], marker="o", markersize=8.5, color=GLOBAL.colour,
            markeredgecolor=CARD, markeredgewidth=1.6, zorder=5,
        )  # fmt: skip
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    axes.set_xlabel("false positive rate (1 − specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    return _svg(figure, name, alt)


def calibration(name: str, bins: Sequence[tuple[float, float, int]], *, alt: str) -> Html:
    """Reliability diagram over a histogram; equal bins of [0, 1], each (mean predicted, observed, samples)."""
    figure = _figure(4.1)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    for axes in (top, bottom):
        _style(axes)
    top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=_DASHES[2])
    filled = [(x, y, n) for x, y, n in bins if n > 0]
    top.plot(
        [x for x, _, _ in filled], [y for _, y, _ in filled], color=GLOBAL.colour, linewidth=1.6, marker="o",
        markersize=5, markeredgecolor=CARD, markeredgewidth=0.8,
    )  # fmt: skip
    top.set_ylim(-0.02, 1.02)
    top.set_ylabel("observed frequency")
    top.set_xlim(-0.01, 1.01)
    step = 1 / len(bins)
    bottom.bar(
        [(i + 0.5) * step for i in range(len(bins))], [n for _, _, n in bins], width=0.9 * step, color=GLOBAL.colour
    )  # fmt: skip
    from matplotlib.ticker import MaxNLocator

    bottom.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    bottom.set_ylabel("samples")
    bottom.set_xlabel("predicted probability")
    return _svg(figure, name, alt)


@dataclass(frozen=True)
class Row:
    """A dot with whiskers; a heading where `stroke` is None."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    stroke: Stroke | None = None


def comparison(name: str, rows: Sequence[Row], *, label: str, chance: float | None, alt: str) -> Html:
    """Rows from top to bottom, one value each on a shared axis."""
    figure, axes = _axes(0.75 + 0.235 * len(rows))
    known = [x for row in rows for x in (row.value, row.low, row.high) if x is not None]
    lowest = min([*known, 0.95])
    left = max(0.0, math.floor((lowest - 0.03) * 10) / 10)
    for y, row in enumerate(rows):
        if row.stroke is None:
            continue
        bold = row.stroke.width > 2
        if row.value is None:
            axes.annotate(
                "no result", (left, y), xytext=(4, 0), textcoords="offset points", color=MUTED, fontsize=_FONT_PT,
                va="center", style="italic",
            )  # fmt: skip
            continue
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=row.stroke.colour, linewidth=2.4 if bold else 1.5)
        axes.plot(
            [row.value], [y], marker="o", markersize=7.5 if bold else 5.5, color=row.stroke.colour,
            markeredgecolor=CARD, markeredgewidth=0.9,
        )  # fmt: skip
    if chance is not None and left <= chance:
        axes.axvline(chance, color=MUTED, linewidth=1, linestyle=_DASHES[2], zorder=0)
    axes.set_xlim(left, 1 + 0.025 * (1 - left))  # room for half a dot, however wide the axis is
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(row.label) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    for row, text in zip(rows, axes.get_yticklabels(), strict=True):
        if row.stroke is None:
            text.set_color(MUTED)
            text.set_style("italic")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    return _svg(figure, name, alt)


def _label(text: str) -> str:
    # A pair of dollars would be set as mathematics.
    return words.shortened(text, 24).replace("$", r"\$")


def _unzip(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(height_in: float) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    return figure


def _axes(height_in: float) -> tuple[Any, Any]:
    figure = _figure(height_in)
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    axes.tick_params(colors=MUTED, labelsize=_FONT_PT, width=0.8, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(MUTED)
        axis.label.set_size(_FONT_PT)


def _variable(colour: str) -> str:
    """The page's variable of this colour, so that figures follow the dark mode."""
    names = {INK: "ink", MUTED: "muted", GRID: "grid", CARD: "card"} | {c: f"c{i}" for i, c in enumerate(PALETTE)}
    return f"var(--{names[colour]})"


def _svg(figure: Any, name: str, alt: str) -> Html:
    from html import escape

    import matplotlib

    out = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text: small, selectable, in the reader's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The bundled font only measures the text; what it cannot draw, the browser can.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # Several pictures share one document, so every id carries its picture's name.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for colour in (*PALETTE, INK, MUTED, GRID, CARD):
        text = text.replace(colour, _variable(colour))
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg class="plot" {box[0]} role="img" aria-label="{escape(alt)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1, flags=re.DOTALL)
    return Html(re.sub(r"\n\s*", "\n", text).strip())
