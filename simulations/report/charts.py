"""Charts as SVG, each wide and for a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunecast.common.text import bytes_text, percent

if TYPE_CHECKING:
    from prunecast.simulations.report.study import Study

__all__ = [
    "COLOURS",
    "Axis",
    "Chart",
    "Line",
    "Look",
    "byte_tick",
    "heat_map",
    "line_chart",
    "looks",
    "score_text",
    "stacked_bars",
]

# readable on white and on black, and apart for the colour-blind (Okabe and Ito)
COLOURS = ("#d55e00", "#0080c8", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f6bd1")
_GREY = "#8a8a8a"
_DASHES = ("", "7 4", "2 3")
_SIZES = {"wide": (820, 330), "narrow": (360, 300)}
_POINTS, _BARS, _COLUMNS = 150, 60, 60  # most in a chart; what is more is thinned out


def score_text(result: Mapping[str, Any], value: float) -> str:
    """A value of the metric of a result's task."""
    return percent(value) if result["task"]["percent"] else f"{value:.4g}"


@dataclass(frozen=True)
class Look:
    """How an arm is drawn in every chart."""

    colour: str
    dash: str = ""


def looks(study: Study) -> dict[str, Look]:
    """Grey for plain Flower and what measures its messages, colours for the others."""
    found, number = {}, 0
    for key, arm in study.arms.items():
        if arm.baseline or not arm.first["trained"]:
            found[key] = Look(_GREY, "" if arm.baseline else _DASHES[2])
            continue
        found[key] = Look(COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % 3])
        number += 1
    return found


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: what it shows, with its unit.
        text: a value as a tick's text.
        log: whether it is logarithmic; values must be above zero then.
        low, high: where it begins and ends instead of at the values.
    """

    label: str
    text: Callable[[float], str] = "{:g}".format
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points of a line, and what pointing at one tells.

    Attributes:
        points: (x, y, deviation of y or None), in order.
        line: whether they are joined; markers alone otherwise.
        marks: whether each point has a marker; else the last one has.
    """

    name: str
    look: Look
    points: Sequence[tuple[float, float, float | None]]
    line: bool = True
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart in two sizes, and its legend: name, colour, dash."""

    wide: str
    narrow: str
    legend: Sequence[tuple[str, str, str]] = ()


class _Scale:
    """From values of an axis to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float) -> None:
        self.axis, self.begin, self.end = axis, begin, end
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        if axis.log:
            low, high = math.log10(low), math.log10(max(high, low))
            pad = max(0.04 * (high - low), 0.05)
            self.low, self.high = low - pad, high + pad
        else:
            pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            self.low = low - pad if axis.low is None else low
            self.high = high + pad if axis.high is None else high

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.axis.log else value
        share = (place - self.low) / ((self.high - self.low) or 1.0)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, most: int) -> list[float]:
        if self.axis.log:
            return self._log_ticks(most)
        step = _nice((self.high - self.low) / max(most - 1, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            found = [part * 10.0**power for power in decades for part in parts]
            inside = [v for v in found if self.low <= math.log10(v) <= self.high]
            if len(inside) <= most or parts == (1,):
                break
        return inside[:: math.ceil(len(inside) / most)] if inside else [10.0**self.low]


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next((m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9)), step)


def _thinned(values: Sequence[Any], most: int) -> list[Any]:
    stride = math.ceil(len(values) / most)
    chosen = list(values[::stride])
    return chosen if not values or chosen[-1] is values[-1] else [*chosen, values[-1]]


class _Canvas:
    """The frame of a chart: grid, ticks and labels."""

    def __init__(self, size: str, title: str) -> None:
        self.size, self.title = size, title
        self.width, self.height = _SIZES[size]
        self.left, self.right, self.top, self.bottom = 66, 16, 14, 52
        self.parts: list[str] = []

    def scales(self, x: Axis, xs: Sequence[float], y: Axis, ys: Sequence[float]) -> tuple[Any, Any]:
        up = _Scale(y, ys, self.height - self.bottom, self.top)
        self.make_room(up)
        across = _Scale(x, xs, self.left, self.width - self.right)
        self.frame(across, up)
        return across, up

    def make_room(self, up: _Scale) -> None:
        """Let the longest text of a tick fit beside the axis' label."""
        self.left = round(32 + 7.2 * max(len(up.axis.text(value)) for value in up.ticks(6)))

    def frame(self, across: _Scale, up: _Scale) -> None:
        right, floor = self.width - self.right, self.height - self.bottom
        for value in up.ticks(6):
            y = up(value)
            self.add(
                f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            self.text(self.left - 7, y + 4, up.axis.text(value), "end")
        for value in across.ticks(9 if self.size == "wide" else 4):
            x = across(value)
            self.add(
                f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>'
            )
            self.text(x, floor + 18, across.axis.text(value))
        self.add(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
        self.text((self.left + right) / 2, self.height - 10, across.axis.label, "middle", "label")
        middle = (self.top + floor) / 2
        self.add(
            f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.0f}) '
            f'rotate(-90)">{html.escape(up.axis.label)}</text>'
        )

    def add(self, part: str) -> None:
        self.parts.append(part)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> None:
        named = f' class="{kind}"' if kind else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.add(f"<text{named} {place}>{html.escape(text)}</text>")

    def svg(self) -> str:
        return (
            f'<svg class="{self.size}" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(self.title)}">{"".join(self.parts)}</svg>'
        )


def line_chart(
    lines: Sequence[Line], x: Axis, y: Axis, title: str, front: Sequence[tuple[float, float]] = ()
) -> Chart | None:
    """Lines with a band of one deviation around them; None without any point.

    Args:
        lines: what is drawn; points below or at zero are left out on logarithmic axes.
        x: across.
        y: upwards.
        title: for those who do not see it.
        front: points of a staircase behind the lines, ascending.
    """
    kept = [(line, _drawable(line, x, y)) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return None
    xs = [px for _, points in kept for px, _, _ in points]
    ys = [py + side * (d or 0) for _, points in kept for _, py, d in points for side in (-1, 1)]
    if y.log:
        ys = [value for value in ys if value > 0]
    drawn = []
    for size in _SIZES:
        canvas = _Canvas(size, title)
        across, up = canvas.scales(x, xs, y, ys)
        if front:
            _draw_front(canvas, across, up, front)
        for line, points in kept:
            _draw_line(canvas, across, up, line, points)
        drawn.append(canvas.svg())
    legend = [(line.name, line.look.colour, line.look.dash) for line, _ in kept]
    return Chart(drawn[0], drawn[1], legend)


def _drawable(line: Line, x: Axis, y: Axis) -> list[tuple[float, float, float | None]]:
    found = [p for p in line.points if not (x.log and p[0] <= 0) and not (y.log and p[1] <= 0)]
    return _thinned([p for p in found if math.isfinite(p[0]) and math.isfinite(p[1])], _POINTS)


def _draw_front(canvas: _Canvas, across: _Scale, up: _Scale, front: Sequence[Any]) -> None:
    steps = [f"M{across(front[0][0]):.1f},{up(front[0][1]):.1f}"]
    steps += [f"H{across(px):.1f}V{up(py):.1f}" for px, py in front[1:]]
    canvas.add(f'<path class="front" d="{"".join(steps)}"/>')


def _draw_line(
    canvas: _Canvas, across: _Scale, up: _Scale, line: Line, points: Sequence[Any]
) -> None:
    colour, dash = line.look.colour, line.look.dash
    tip = f"<title>{html.escape(line.name)}</title>"
    places = [(across(px), up(py)) for px, py, _ in points]
    floor = canvas.height - canvas.bottom

    def clamped(value: float) -> float:
        return min(up(value), floor) if not up.axis.log or value > 0 else floor

    if line.line:
        banded = [(across(px), clamped(py + d), clamped(py - d)) for px, py, d in points if d]
        if len(banded) > 1:
            above = " ".join(f"{px:.1f},{top:.1f}" for px, top, _ in banded)
            below = " ".join(f"{px:.1f},{low:.1f}" for px, _, low in reversed(banded))
            canvas.add(f'<polygon points="{above} {below}" fill="{colour}" opacity="0.13"/>')
        joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        canvas.add(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-linejoin="round"{dashed}>{tip}</polyline>'
        )
    for index, ((px, py), (vx, vy, d)) in enumerate(zip(places, points, strict=True)):
        if not line.line and d:
            canvas.add(
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{clamped(vy + d):.1f}" '
                f'y2="{clamped(vy - d):.1f}" stroke="{colour}" stroke-width="1.5"/>'
            )
        last = index == len(places) - 1
        if line.marks or last or not line.line:
            told = f"{line.name}: {up.axis.text(vy)} at {across.axis.text(vx)}"
            canvas.add(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{4.2 if last else 2.6}" fill="{colour}">'
                f"<title>{html.escape(told)}</title></circle>"
            )


def stacked_bars(
    rounds: Sequence[int],
    parts: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    title: str,
) -> Chart | None:
    """Bytes of every round as bars, by kind; of many rounds each bar is the mean of some."""
    if not rounds or not parts or not any(map(sum, parts.values())):
        return None
    width = math.ceil(len(rounds) / _BARS)
    groups = [range(at, min(at + width, len(rounds))) for at in range(0, len(rounds), width)]
    heights = [sum(values[i] for values in parts.values() for i in g) / len(g) for g in groups]
    drawn = []
    for size in _SIZES:
        canvas = _Canvas(size, title)
        x = Axis("round", lambda v: f"{v:.0f}", low=rounds[0] - 0.5, high=rounds[-1] + 0.5)
        y = Axis("bytes in a round, all clients", byte_tick, low=0.0, high=1.05 * max(heights))
        up = _Scale(y, [], canvas.height - canvas.bottom, canvas.top)
        canvas.make_room(up)
        across = _Whole(x, [], canvas.left, canvas.width - canvas.right)
        canvas.frame(across, up)
        for group in groups:
            begin, end = across(rounds[group[0]] - 0.44), across(rounds[group[-1]] + 0.44)
            floor = 0.0
            for name, values in parts.items():
                value = sum(values[i] for i in group) / len(group)
                if not value:
                    continue
                top, bottom = up(floor + value), up(floor)
                floor += value
                named = f"round {rounds[group[0]]}"
                if len(group) > 1:
                    named = f"rounds {rounds[group[0]]} to {rounds[group[-1]]}, mean"
                told = html.escape(f"{named}, {name}: {bytes_text(value)}")
                canvas.add(
                    f'<rect x="{begin:.1f}" y="{top:.1f}" width="{max(end - begin, 0.6):.1f}" '
                    f'height="{max(bottom - top, 0.3):.1f}" fill="{colours[name]}">'
                    f"<title>{told}</title></rect>"
                )
        drawn.append(canvas.svg())
    return Chart(drawn[0], drawn[1], [(name, colours[name], "") for name in parts])


class _Whole(_Scale):
    """A scale of whole numbers: no ticks between them."""

    def ticks(self, most: int) -> list[float]:
        """Whole numbers alone."""
        step = max(1.0, _nice((self.high - self.low) / max(most - 1, 1)))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        found = [step * number for number in range(first, last + 1)]
        return found or [math.ceil(self.low)]


def heat_map(
    rows: Mapping[str, Sequence[float | None]], columns: Sequence[int], title: str
) -> Chart | None:
    """Fractions from 0 to 1 as shades, a row for each name and a column for each round."""
    if not rows or not columns:
        return None
    chosen = _thinned(range(len(columns)), _COLUMNS)
    drawn = []
    for size in _SIZES:
        canvas = _Canvas(size, title)
        narrow = size == "narrow"
        letters, row, left = (15, 18, 112) if narrow else (30, 18, 216)
        canvas.height = row * len(rows) + 46
        cell = (canvas.width - left - 14) / len(chosen)
        for line, (name, values) in enumerate(rows.items()):
            y = 6 + row * line
            canvas.text(left - 7, y + row - 5, _cut(name, letters), "end")
            for place, index in enumerate(chosen):
                value = values[index]
                if value is None:
                    continue
                told = html.escape(f"{name}, round {columns[index]}: {percent(value)}")
                canvas.add(
                    f'<rect class="cell" x="{left + cell * place:.1f}" y="{y}" '
                    f'width="{max(cell - 0.6, 0.4):.1f}" height="{row - 2}" '
                    f'style="--share:{value:.3f}"><title>{told}</title></rect>'
                )
        floor = 6 + row * len(rows)
        every = max(1, math.ceil(len(chosen) / (6 if narrow else 15)))
        for place in range(0, len(chosen), every):
            x = left + cell * (place + 0.5)
            canvas.text(x, floor + 14, str(columns[chosen[place]]))
        canvas.text((left + canvas.width) / 2, floor + 33, "round", "middle", "label")
        drawn.append(canvas.svg())
    return Chart(drawn[0], drawn[1])


def _cut(name: str, most: int) -> str:
    """A name of so many letters at most: beginning and end of a longer one."""
    if len(name) <= most:
        return name
    return f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"


def byte_tick(value: float) -> str:
    """Bytes as the text of a tick, without digits that say nothing."""
    number, unit = bytes_text(value).split()
    return f"{float(number):g} {unit}"
