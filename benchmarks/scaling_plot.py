"""Draws docs/scaling.svg, for benchmarks/suite.py, from what benchmarks/scale.py measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, PANEL = 860, 300, 60, 58, 330
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-labelledby="title desc" \
font-family="-apple-system, 'Segoe UI', Helvetica, Arial, 'Liberation Sans', sans-serif" font-size="13">
  <title id="title">Cost of a simulated federation by its number of sites</title>
  <desc id="desc">{words}</desc>
  <style>
    .page {{ fill: #ffffff; stroke: #d0d7de; }} .ink {{ fill: #1f2328; }} .soft {{ fill: #59636e; }}
    .grid {{ stroke: #d0d7de; }} .line {{ stroke: #0969da; stroke-width: 2.5; fill: none; }} .dot {{ fill: #0969da; }}
    .b {{ font-weight: 600; font-size: 15px; }}
    @media (prefers-color-scheme: dark) {{
      .page {{ fill: #0d1117; stroke: #30363d; }} .ink {{ fill: #f0f6fc; }} .soft {{ fill: #9198a1; }}
      .grid {{ stroke: #30363d; }} .line {{ stroke: #4493f8; }} .dot {{ fill: #4493f8; }}
    }}
  </style>
  <rect class="page" x="0.5" y="0.5" width="{right}" height="{bottom}" rx="8"/>
"""


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """The picture: CPU beside training for one question, and peak memory, over the number of sites (logarithmic)."""
    cpu = [(row["sites"], row["beside_cpu_ms"]["median"]) for row in rows]
    memory = [(row["sites"], row["peak_mb"]["fedicom"]["median"]) for row in rows]
    told = "; ".join(
        f"{sites} sites: {ms:.2f} ms a question, {mb:.0f} MB" for (sites, ms), (_, mb) in zip(cpu, memory, strict=True)
    )
    parts = [HEAD.format(width=WIDTH, height=HEIGHT, right=WIDTH - 1, bottom=HEIGHT - 1, words=told)]
    parts.append(_panel(LEFT, "CPU beside training, ms a question", cpu))
    parts.append(_panel(LEFT + PANEL + 90, "Peak memory of the process, MB", memory))
    return "".join(parts) + "</svg>\n"


def _panel(left: int, title: str, points: Sequence[tuple[int, float]]) -> str:
    height, bottom = HEIGHT - TOP - 50, HEIGHT - 50
    low, high = math.log10(points[0][0]), math.log10(points[-1][0])
    unit = 10.0 ** math.floor(math.log10(max(value for _, value in points)))
    top = unit * math.ceil(1.1 * max(value for _, value in points) / unit)
    places = [
        (left + PANEL * (math.log10(sites) - low) / max(high - low, 1e-9), bottom - height * value / top)
        for sites, value in points
    ]
    text = f'  <text class="ink b" x="{left}" y="{TOP - 24}">{title}</text>\n'
    for share in (0.0, 0.5, 1.0):
        y = bottom - height * share
        text += f'  <line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}"/>\n'
        text += f'  <text class="soft" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{top * share:g}</text>\n'
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    text += f'  <polyline class="line" points="{line}"/>\n'
    for (x, y), (sites, _) in zip(places, points, strict=True):
        text += f'  <circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>\n'
        text += f'  <text class="soft" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{sites:,}</text>\n'
    return text + f'  <text class="soft" x="{left + PANEL / 2}" y="{bottom + 40}" text-anchor="middle">sites</text>\n'
