"""What was reached against bytes as a picture, and the bytes of every round as lines."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping
from typing import Any

from prunecast.common.text import bytes_text, percent

__all__ = ["COLOURS", "accuracy_figure", "bytes_per_round", "score_text"]

# readable on white and on black, and apart for the colour-blind (Okabe and Ito)
COLOURS = ("#d55e00", "#8a8a8a", "#0072b2", "#009e73", "#cc79a7", "#e69f00") * 4

_WIDTH, _HEIGHT = 760, 260  # as in report.html
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34


def score_text(result: Mapping[str, Any], value: float) -> str:
    """A value of the metric of a result's task."""
    return percent(value) if result["task"]["percent"] else f"{value:.4g}"


def accuracy_figure(result: Mapping[str, Any], *, dots_per_inch: int = 150) -> bytes:
    """A PNG: the metric of every arm against its cumulative bytes, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(8, 4.5), dpi=dots_per_inch, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    task = result["task"]
    metric = task["metric"]
    for (name, arm), colour in zip(result["arms"].items(), COLOURS, strict=False):
        rows = [row for row in arm["rounds"] if row["bytes_up"] + row["bytes_down"] > 0]
        spent = [row["bytes_up"] + row["bytes_down"] for row in rows]
        reached = [row[metric] for row in rows]
        style = "-" if arm["trained"] else "--"
        label = f"{name}: {score_text(result, arm[metric])} for {bytes_text(spent[-1])}"
        axes.plot(spent, reached, style, color=colour, linewidth=1.8, label=label)
        axes.plot(spent[-1:], reached[-1:], "o", color=colour, markersize=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if task["percent"]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("bytes sent so far, both directions, all clients")
    axes.set_ylabel(f"{metric} on held-out examples")
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    # no software or date inside: the same result gives the same file
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _tick(value: float) -> str:
    number, unit = bytes_text(value).split()
    return f"{float(number):g} {unit}"


def bytes_per_round(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where the page draws the bytes of every round, on a logarithmic axis; empty without any.

    Returns:
        ``ticks`` (height, text) of the bytes, ``rounds`` (place, number), and per arm the points
        of its line.
    """
    series: dict[str, list[tuple[int, int]]] = {}
    for name, arm in arms.items():
        totals = [(row["round"], row["bytes_up"] + row["bytes_down"]) for row in arm["rounds"]]
        spent = [(after[0], after[1] - before[1]) for before, after in itertools.pairwise(totals)]
        series[name] = [(number, value) for number, value in spent if value > 0]
    found = [point for points in series.values() for point in points]
    if not found:
        return {}
    values = [value for _, value in found]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    last: int = max(arm["rounds"][-1]["round"] for arm in arms.values())

    def x(number: float) -> float:
        return _LEFT + (number - 1) / max(last - 1, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share: float = (math.log10(value) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    step = max(1, round(last / 10))
    numbers = [1, *range(step, last + 1, step)] if step > 1 else range(1, last + 1)
    return {
        "ticks": [(y(10.0**power), bytes_text(10**power)) for power in range(low, high + 1)],
        "rounds": [(x(number), number) for number in numbers],
        "lines": {
            name: " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in points)
            for name, points in series.items()
        },
    }
