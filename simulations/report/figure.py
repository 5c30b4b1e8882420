"""What was reached against bytes, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from prunecast.common.text import bytes_text
from prunecast.simulations.report.text import score_text

__all__ = ["COLOURS", "accuracy_figure"]

# readable on white and on black, and apart for the colour-blind (Okabe and Ito)
COLOURS = ("#d55e00", "#8a8a8a", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


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
    for (name, arm), colour in zip(result["arms"].items(), _colours(), strict=False):
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


def _colours() -> list[str]:
    return list(COLOURS) * 4
