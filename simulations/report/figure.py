"""What was reached against bytes, as a picture for papers and pages of others."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from prunecast.common.text import bytes_text
from prunecast.simulations.report.charts import byte_tick, looks

if TYPE_CHECKING:
    from prunecast.simulations.report.gathering import Study

__all__ = ["accuracy_figure"]


def accuracy_figure(study: Study, *, dots_per_inch: int = 150) -> bytes:
    """A PNG: the metric of every arm against its cumulative bytes, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(8, 4.5), dpi=dots_per_inch, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    metric, chosen = study.metric, looks(study)
    for key, arm in study.arms.items():
        curve = arm.curve(metric)
        rows = [i for i, spent in enumerate(curve.spent) if spent > 0]
        if not rows:
            continue
        spent = [curve.spent[i] for i in rows]
        reached = [curve.scores[i].mean for i in rows]
        apart = [curve.scores[i].deviation or 0.0 for i in rows]
        look, last = chosen[key], study.text(arm.reached(metric).mean)
        label = f"{arm.label}: {last} for {bytes_text(spent[-1])}"
        dash = (0, tuple(map(float, look.dash.split()))) if look.dash else "-"
        axes.plot(spent, reached, color=look.colour, linestyle=dash, linewidth=1.8, label=label)
        axes.plot(spent[-1:], reached[-1:], "o", color=look.colour, markersize=6)
        low, high = ([r + s * a for r, a in zip(reached, apart, strict=True)] for s in (-1, 1))
        axes.fill_between(spent, low, high, color=look.colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if study.result["task"]["percent"]:
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
