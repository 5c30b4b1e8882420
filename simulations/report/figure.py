"""What was reached against bytes, as pictures for papers and pages of others."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from prunecast.common.text import bytes_text
from prunecast.simulations.report.charts import byte_tick, looks

if TYPE_CHECKING:
    from prunecast.simulations.report.study import Study

__all__ = ["accuracy_figure", "empty_plot", "png_of"]

_CLOSE = 0.04  # part of the whole between the least and the most shown: ticks need a decimal
_SHORT = (
    4  # times the least number of bytes: such an axis may hold no power of ten, nor three of one
)


def accuracy_figure(study: Study, *, dots_per_inch: int = 150) -> bytes:
    """A PNG: the metric of every arm against its cumulative bytes, on a logarithmic axis."""
    metric, chosen = study.metric, looks(study)
    axes = empty_plot("bytes sent so far", metric, dots_per_inch)
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
    return png_of(axes, is_percent=study.result["task"]["percent"])


def empty_plot(across: str, metric: str, dots_per_inch: int) -> Any:
    """Axes of a new figure, for a metric on held-out examples against bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=dots_per_inch, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(f"{across}, both directions, all clients")
    axes.set_ylabel(f"{metric} on held-out examples")
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def png_of(axes: Any, *, is_percent: bool) -> bytes:
    """The picture of such axes, once everything is drawn: ticks and legend are added."""
    from matplotlib.ticker import PercentFormatter

    _byte_axis(axes)
    if is_percent:
        low, high = axes.get_ylim()
        decimals = 0 if high - low > _CLOSE else 1
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    # no software or date inside: the same result gives the same file
    axes.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _byte_axis(axes: Any) -> None:
    """Make the horizontal axis one of bytes, logarithmic if it is long."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_xlim()
    if low > 0 and high < _SHORT * low:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=20))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_tick(value)))
