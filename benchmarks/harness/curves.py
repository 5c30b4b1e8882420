"""The picture of `benchmarks/bytes.py`: accuracy and bytes by round, and where the bytes go."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_curves"]

Row = Mapping[str, Any]
# Hue and dash together, so that lines stay apart in grey too.
_DENSE = ("#555555", "--")
_LINES = (("#2166ac", "-"), ("#c1272d", "-"), ("#e6850e", "-."), ("#31a354", ":"))
# Blue down, red up; what is around payloads is pale.
_PARTS = {
    ("down", "keyframe"): "#08306b",
    ("down", "delta"): "#2171b5",
    ("down", "other"): "#6baed6",
    ("down", "envelope"): "#c6dbef",
    ("up", "update"): "#cb181d",
    ("up", "other"): "#fb6a4a",
    ("up", "envelope"): "#fcbba1",
}
_DETAIL = 10  # points below the best that are shown of a long run
_LONG = 10  # rounds


def draw_curves(rows: Sequence[Row], entries: Sequence[Row], target: Path) -> None:
    """Write the picture, a PNG: a line of three charts for each kind of model.

    Args:
        rows: of single runs, dense ones included.
        entries: of `benchmarks.harness.spread.summary`.
        target: the file.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    presets = [p for p in dict.fromkeys(row["preset"] for row in rows) if p != "dense"]
    styles = {"dense": _DENSE, **{p: _LINES[n % len(_LINES)] for n, p in enumerate(presets)}}
    figure, grid = pyplot.subplots(
        len(kinds), 3, figsize=(12, 0.7 + 2.5 * len(kinds)), squeeze=False, layout="constrained",
        width_ratios=[4, 4, 5],
    )  # fmt: skip
    for axes, kind in zip(grid, kinds, strict=True):
        _accuracy(axes[0], [row for row in rows if row["kind"] == kind], styles)
        _bytes(axes[1], [row for row in rows if row["kind"] == kind], styles)
        _shares(axes[2], [entry for entry in entries if entry["kind"] == kind])
        bold = "-".join(f"$\\bf{{{part}}}$" for part in kind.split("-"))
        axes[0].set_ylabel(f"{bold}\naccuracy, %")
        axes[1].set_ylabel("MB so far")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[:2]:
            axis.grid(alpha=0.25)
            axis.xaxis.get_major_locator().set_params(integer=True)
    for axis, title in zip(
        grid[0], ("Accuracy", "All bytes sent", "Where the bytes go"), strict=True
    ):
        axis.set_title(title, fontsize=11, loc="left")
    for axis in grid[-1][:2]:
        axis.set_xlabel("round")
    grid[-1][2].set_xlabel("kB of a run")
    lines, names = grid[0][0].get_legend_handles_labels()
    bars, parts = _legend(grid)
    figure.legend(
        lines + bars, names + parts, loc="outside lower center", ncols=len(names) + len(parts),
        frameon=False, fontsize=8, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    found = {}
    for axes in grid:
        for handle, name in zip(*axes[2].get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    order = [f"{way}, {kind}" for way, kind in _PARTS if f"{way}, {kind}" in found]
    return [found[name] for name in order], order


def _curves(rows: Sequence[Row], preset: str) -> dict[int, list[Sequence[float]]]:
    """Round to what every seed's run was like after it."""
    found: dict[int, list[Sequence[float]]] = defaultdict(list)
    for row in rows:
        if row["preset"] == preset:
            for point in row["curve"]:
                found[point[0]].append(point)
    return found


def _accuracy(axis: Any, rows: Sequence[Row], styles: Mapping[str, tuple[str, str]]) -> None:
    best = 0.0
    for preset, (colour, dash) in styles.items():
        found = _curves(rows, preset)
        if not found:
            continue
        scores = {number: [100 * p[1] for p in points] for number, points in found.items()}
        mean = [statistics.fmean(some) for some in scores.values()]
        best = max(best, *mean)
        axis.plot(list(scores), mean, dash, color=colour, label=preset, linewidth=1.3)
        least, most = ([f(some) for some in scores.values()] for f in (min, max))
        axis.fill_between(list(scores), least, most, color=colour, alpha=0.15, linewidth=0)
    if max(row["rounds"] for row in rows) > _LONG:
        axis.set_ylim(best - _DETAIL, min(100.0, best + 1))


def _bytes(axis: Any, rows: Sequence[Row], styles: Mapping[str, tuple[str, str]]) -> None:
    for preset, (colour, dash) in styles.items():
        found = {n: points for n, points in _curves(rows, preset).items() if n}
        if found:
            mean = [
                statistics.fmean(p[3] + p[4] for p in points) / 1e6 for points in found.values()
            ]
            axis.plot(list(found), mean, dash, color=colour, linewidth=1.3)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")


def _shares(axis: Any, entries: Sequence[Row]) -> None:
    """A bar for each preset, from left to right as its messages go."""
    for place, entry in enumerate(entries):
        sizes = dict.fromkeys(_PARTS, 0.0)
        for part in entry["parts"]:
            way, kind = part["direction"], part["kind"]
            sizes[way, kind if (way, kind) in _PARTS else "other"] += part["payload"]
            sizes[way, "envelope"] += part["envelope"]
        left = 0.0
        for key, size in sizes.items():
            if size:
                axis.barh(
                    place, size / 1e3, 0.6, left / 1e3, color=_PARTS[key], label=", ".join(key)
                )
                left += size
        axis.annotate(
            f" {entry['ratio']['mean']:.0f} ×", (left / 1e3, place), va="center", fontsize=9
        )
    axis.set_yticks(range(len(entries)), [entry["preset"] for entry in entries])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.margins(x=0.12)
