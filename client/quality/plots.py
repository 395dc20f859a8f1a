"""The page's plots: plain SVG and bars in the page's own colours, without a script or a file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from common.html import Html, items, join, tag
from common.style import PALETTE

CSS = """
.bars{margin:6px 0 2px;font-size:13px}
.bar{display:grid;grid-template-columns:minmax(5em,34%) 1fr 5.2em;gap:10px;align-items:center;padding:2px 0}
.bar .what{overflow-wrap:anywhere;line-height:1.3}
.bar .track{background:var(--soft);border-radius:3px;height:13px;overflow:hidden}
.bar .track div{background:var(--c0);height:100%;border-radius:3px;min-width:2px}
.bar.muted .track div{background:var(--c6)}
.bar .much{text-align:right;font-variant-numeric:tabular-nums;color:var(--muted);white-space:nowrap}
.figures.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.local{margin:22px 0 0;padding:12px 18px;border:2px solid var(--c1);border-radius:6px;font-weight:600}
.found{list-style:none;padding:0!important;margin:14px 0;max-width:none!important}
.found li{display:flex;gap:12px;padding:9px 14px;background:var(--card);border:1px solid var(--grid);margin:-1px 0 0}
.found .level{flex:none;width:6.4em;font-weight:650;font-size:13px;text-transform:uppercase;letter-spacing:.03em}
.found .error .level{color:color-mix(in srgb,var(--c1) 78%,var(--ink))}
.found .warning .level{color:var(--c4)}.found .note .level{color:var(--muted)}
.found .do{color:var(--muted)}
svg.map{display:block;width:100%;height:auto;max-width:520px;margin:4px auto 0}
.dot{display:inline-block;width:10px;height:10px;border-radius:50%;flex:none}
"""
_MOST_BARS = 12
_SIDE = 300
_RADIUS = 2.1
_MOST_COLOURS = len(PALETTE) - 1
REST = "others"


def bars(counts: Mapping[str, int]) -> Html:
    """A bar for each value, with its number; of very many the last ones are summed up."""
    entries = list(counts.items())
    if len(entries) > _MOST_BARS:
        kept = entries[: _MOST_BARS - 1]
        entries = [*kept, (f"{len(entries) - len(kept)} others", sum(count for _, count in entries[len(kept) :]))]
    largest = max((count for _, count in entries), default=0) or 1
    rows = []
    for name, count in entries:
        width = 100 * count / largest
        fill = tag("div", style=f"width:{width:.1f}%") if count else None
        rows.append(
            tag(
                "div",
                tag("div", name, class_="what"),
                tag("div", fill, class_="track"),
                tag("div", f"{count:,}", class_="much"),
                class_="bar muted" if name == "unknown" else "bar",
            )
        )
    return tag("div", *rows, class_="bars")


def shown_groups(groups: Sequence[str]) -> dict[str, int]:
    """Colour number of each group: the most frequent have their own, the others share the last."""
    ranked = [name for name, _ in sorted(Counter(groups).items(), key=lambda each: (-each[1], each[0]))]
    return {name: min(at, _MOST_COLOURS) for at, name in enumerate(ranked)}


def scatter(points_N2: npt.NDArray[np.float64], groups: Sequence[str], *, alt: str) -> Html:
    """Points coloured by group; the largest groups first, so that the small ones lie above."""
    low, high = np.quantile(points_N2, (0.002, 0.998), axis=0)
    at = 8 + (_SIDE - 16) * (np.clip(points_N2, low, high) - low) / np.maximum(high - low, 1e-9)
    colours = shown_groups(groups)
    parts = []
    radius = _RADIUS if len(points_N2) > 200 else 3.2
    for colour in sorted(set(colours.values())):
        circles = [
            Html(f'<circle cx="{x:.1f}" cy="{_SIDE - y:.1f}" r="{radius}"/>')
            for (x, y), group in zip(at.tolist(), groups, strict=True)
            if colours[group] == colour
        ]
        parts.append(tag("g", *circles, style=f"fill:var(--c{colour})", fill_opacity="0.72"))
    frame = Html(
        f'<rect x="0.5" y="0.5" width="{_SIDE - 1}" height="{_SIDE - 1}" style="fill:none;stroke:var(--grid)"/>'
    )
    return tag("svg", frame, *parts, class_="map", viewBox=f"0 0 {_SIDE} {_SIDE}", role="img", aria_label=alt)


def legend(groups: Sequence[str]) -> Html:
    """Which colour is which."""
    counts = Counter(groups)
    lines: dict[int, list[str]] = {}
    for name, colour in shown_groups(groups).items():
        lines.setdefault(colour, []).append(name)
    entries = []
    for colour, names in lines.items():
        name = names[0] if len(names) == 1 else f"{len(names)} {REST}"
        count = sum(counts[each] for each in names)
        dot = tag("span", class_="dot", style=f"background:var(--c{colour})", aria_hidden="true")
        entries.append(join(dot, tag("span", f"{name} ({count:,})")))
    return items(*entries, class_="legend")


def figure(title: str, *body: Html | None, caption: str = "") -> Html:
    """A card with a title."""
    return tag("figure", tag("h3", title), *body, tag("figcaption", caption) if caption else None)
