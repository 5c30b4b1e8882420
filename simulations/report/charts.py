"""Small charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prunecast.common.text import bytes_text

__all__ = ["bytes_per_round", "where_bytes_went"]

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34


def bytes_per_round(arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Bytes of every round on a logarithmic axis, one line per arm; an SVG element."""
    series = {name: _differences(arm["rounds"]) for name, arm in arms.items()}
    values = [value for points in series.values() for _, value in points if value > 0]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    rounds = max(number for points in series.values() for number, _ in points)

    def x(number: float) -> float:
        span = max(rounds - 1, 1)
        return _LEFT + (number - 1) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="bytes per round, logarithmic">'
    ]
    for power in range(low, high + 1):
        at = round(y(10.0**power), 1)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>'
        )
        label = bytes_text(10**power)
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    step = max(1, round(rounds / 10))
    for number in [1, *range(step, rounds + 1, step)] if step > 1 else range(1, rounds + 1):
        across = f"{x(number):.1f}"
        parts.append(f'<text x="{across}" y="{_HEIGHT - 14}" text-anchor="middle">{number}</text>')
    middle = (_LEFT + _WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 1}" text-anchor="middle">round</text>')
    for name, points in series.items():
        line = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in points if v > 0)
        title = f"<title>{escape(name)}</title>"
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colours[name]}" '
            f'stroke-width="2">{title}</polyline>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    totals = [(row["round"], row["bytes_up"] + row["bytes_down"]) for row in rows]
    return [(b[0], b[1] - a[1]) for a, b in itertools.pairwise(totals)]


def where_bytes_went(
    by_kind: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> list[dict[str, Any]]:
    """Rows for a bar list: direction, kind, messages, bytes, share of the total; largest first."""
    rows: list[dict[str, Any]] = [
        {"direction": direction, "kind": kind, **sums}
        for direction, kinds in by_kind.items()
        for kind, sums in kinds.items()
    ]
    total = sum(row["bytes"] for row in rows) or 1
    for row in rows:
        row["share"] = row["bytes"] / total
    return sorted(rows, key=lambda row: -int(row["bytes"]))
