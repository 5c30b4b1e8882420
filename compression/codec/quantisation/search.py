"""Find where a growing function enters a window, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Found", "Point", "find"]

_FLOOR = 1e-300  # stands for zero in logarithms


@dataclass(frozen=True)
class Point:
    """One evaluation: ``value`` is the function at ``x``."""

    x: float
    value: float


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        inside: a point in the window; None if the function jumps over it or never reaches it.
        below: the point below the window that is closest to it in x, if any was seen.
        above: likewise above it.
        evaluations: number of calls.
    """

    inside: Point | None
    below: Point | None
    above: Point | None
    evaluations: int


def find(
    function: Callable[[float], float],
    window: tuple[float, float],
    *,
    start: float,
    bounds: tuple[float, float],
    guess: Callable[[Point], float | None] | None = None,
    slope: float = 1.0,
    resolution: float = 1e-6,
) -> Found:
    """Search for ``window[0] <= function(x) <= window[1]``, with ``function`` growing in x.

    Works on the logarithm of the function: first by ``guess`` or by ``slope`` until the window
    is bracketed, then by interpolation, every third time by halving (so that it ends even where
    the function is far from smooth). Where the function is not quite monotone, the bracket still
    closes, on some place where it crosses the window.

    Args:
        function: of x, at least 0.
        window: smallest and largest value wanted; the middle is aimed at.
        start: first x.
        bounds: smallest and largest x to try.
        guess: from an evaluated point to a better x, or None for no idea; used a few times.
        slope: of log2(function) in x, roughly.
        resolution: width in x at which the bracket is closed without success.
    """
    low, high = window
    aim = math.log2(max(low, _FLOOR)) / 2 + math.log2(max(high, _FLOOR)) / 2
    below: Point | None = None
    above: Point | None = None
    x = min(max(start, bounds[0]), bounds[1])
    calls, stride = 0, 1.0
    while True:
        point = Point(x, function(x))
        calls += 1
        if low <= point.value <= high:
            return Found(point, below, above, calls)
        if point.value < low:
            below = point
        else:
            above = point
        if below and above:
            width = above.x - below.x
            if width <= resolution:
                return Found(None, below, above, calls)
        elif (point.x >= bounds[1]) if below else (point.x <= bounds[0]):
            return Found(None, below, above, calls)
        better = guess(point) if guess and calls <= 3 else None
        if better is not None and _within(better, below, above, bounds):
            x = better
        elif below and above:
            x = _between(below, above, aim, halve=calls % 3 == 0)
        else:
            gap = (aim - math.log2(max(point.value, _FLOOR))) / slope
            stride *= 2
            move = math.copysign(min(max(abs(gap), stride / 64), stride), gap)
            x = min(max(point.x + move, bounds[0]), bounds[1])


def _within(
    x: float, below: Point | None, above: Point | None, bounds: tuple[float, float]
) -> bool:
    least = below.x if below else bounds[0]
    most = above.x if above else bounds[1]
    return least < x < most


def _between(below: Point, above: Point, aim: float, *, halve: bool) -> float:
    share = 0.5
    if not halve and below.value > 0 and math.isfinite(above.value):
        low, high = math.log2(below.value), math.log2(above.value)
        share = min(max((aim - low) / (high - low), 0.02), 0.98)
    return below.x + share * (above.x - below.x)
