"""What a report is made of: tables, sections, and numbers as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from prunecast.common.text import bytes_text, duration_text
from prunecast.simulations.report.charts import Chart
from prunecast.simulations.report.study import Spread

__all__ = ["MISSING", "Section", "Table", "bytes_of", "mean_of", "seconds_of", "spread_text"]

MISSING = "not recorded"
_SEEN = 0.001  # part of a mean below which its deviation is not told


@dataclass
class Table:
    """A table: the first column names rows, the others hold numbers as text.

    Attributes:
        bars: by number of a column, the fraction that a bar in each of its cells shows.
        strong: numbers of rows that stand out.
        caption: what it is of, where a section has several.
    """

    header: list[str]
    rows: list[list[str]]
    bars: dict[int, list[float]] = field(default_factory=dict)
    strong: set[int] = field(default_factory=set)
    caption: str = ""


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: heading.
        basis: what its numbers are: "measured", "estimated", "simulated", or several of these.
        note: sentences below it.
        charts: with a caption each; Markdown has their tables alone.
        tables: below the charts.
        folded: whether it is opened by the reader.
    """

    title: str
    basis: str = "measured"
    note: str = ""
    charts: list[tuple[str, Chart]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.tables and not self.charts


def spread_text(spread: Spread | None, text: Callable[[float], str]) -> str:
    """Mean ± deviation; the unit once, and no deviation that would not show in the mean."""
    if spread is None:
        return MISSING
    mean = text(spread.mean)
    if spread.deviation is None or spread.deviation < _SEEN * abs(spread.mean):
        return mean
    unit = mean.partition(" ")[2]
    deviation = text(spread.deviation)
    if unit and deviation.partition(" ")[2] == unit:
        return f"{mean.partition(' ')[0]} ± {deviation}"
    return f"{mean} ± {deviation}"


def bytes_of(spread: Spread | None) -> str:
    """Bytes, the mean."""
    return MISSING if spread is None else bytes_text(spread.mean)


def mean_of(spread: Spread | None) -> float | None:
    """The mean; None where it is not known."""
    return None if spread is None else spread.mean


def seconds_of(spread: Spread | None) -> str:
    """Seconds, the mean."""
    return MISSING if spread is None else duration_text(spread.mean)
