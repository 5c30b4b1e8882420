"""The picture: size against zeroth-order entropy, and speed, by class and coder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .coders import OURS
from .report import Report
from .table import class_size, class_speed

__all__ = ["draw"]

_OURS = "#c1272d"
# Peers in pairs of hue and marker, so that they stay apart in grey too.
_PEERS = {
    "zlib -6": ("#9e9e9e", "v"),
    "zstd -3": ("#9ecae1", "<"),
    "zstd -19": ("#3182bd", ">"),
    "bitmap + zstd": ("#756bb1", "s"),
    "gaps + zstd": ("#bcbddc", "D"),
    "blosc2": ("#8c6d31", "P"),
    "pcodec": ("#31a354", "^"),
    "zipnn": ("#74c476", "X"),
    "static ANS": ("#636363", "d"),
    "NNCodec": ("#e6850e", "*"),
}


def draw(report: Report, target: Path) -> None:
    """Write the picture, a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kinds = report.kinds()
    coders = [n for n in report.coders_in_order() if n != OURS] + [OURS]
    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 1.6 + 0.42 * len(kinds)), sharey=True, layout="constrained",
        width_ratios=[5, 3, 3],
    )  # fmt: skip
    for row, cases in enumerate(kinds.values()):
        for coder in coders:
            if not any(coder in c.rows for c in cases):
                continue
            size = class_size(cases, coder)
            if size is not None:
                _mark(axes[0], 1 + size, row, coder)
            for axis, speed in zip(axes[1:], class_speed(cases, coder), strict=True):
                _mark(axis, speed, row, coder)
    axes[0].set_title("bytes / zeroth-order entropy (less is better)", fontsize=9)
    axes[1].set_title("encoding, MB/s (more is better)", fontsize=9)
    axes[2].set_title("decoding, MB/s", fontsize=9)
    axes[0].axvline(1, color="black", lw=0.8, zorder=1)
    for axis, ticks in zip(axes, (_SIZES, _SPEEDS, _SPEEDS), strict=True):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(axis="x", color="0.9", lw=0.8)
        axis.tick_params(labelsize=8, length=0)
        axis.set_axisbelow(True)
        for row in range(len(kinds)):
            axis.axhline(row, color="0.85", lw=0.8, zorder=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    both = [f(axis.get_xlim()[i] for axis in axes[1:]) for i, f in enumerate((min, max))]
    for axis in axes[1:]:
        axis.set_xlim(*both)
    axes[0].set_yticks(range(len(kinds)), list(kinds))
    axes[0].set_ylim(len(kinds) - 0.5, -0.5)
    handles = [_sample(pyplot, coder) for coder in reversed(coders)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


_SIZES = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3)
_SPEEDS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


def _style(coder: str) -> dict[str, Any]:
    colour, marker = (_OURS, "o") if coder == OURS else _PEERS.get(coder, ("0.5", "."))
    size = 9 if coder == OURS else 8 if marker == "*" else 5.5
    return {"color": colour, "marker": marker, "ms": size, "mew": 0, "ls": "none"}


def _mark(axis: Any, x: float, y: float, coder: str) -> None:
    axis.plot([x], [y], zorder=4 if coder == OURS else 3, **_style(coder))


def _sample(pyplot: Any, coder: str) -> Any:
    return pyplot.Line2D([], [], label=coder, **_style(coder))
