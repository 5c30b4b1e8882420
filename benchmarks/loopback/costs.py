"""The arithmetic of the fan-out: what single runs cost, the best and the median of several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Row", "Run", "line", "summary", "totals"]

HEAD = (
    f"  {'server':22}{'file':>10}{'GB':>7}{'CPU s/GB':>10}{'median':>8}{'CPU ms each':>13}"
    f"{'wall s':>8}{'median':>8}{'p50 s':>7}{'p99 s':>7}"
)


@dataclass(frozen=True)
class Run:
    """One run: every device has fetched the file.

    Attributes:
        bytes: of bodies that were delivered.
        cpu: seconds of the server, user and system.
        wall: seconds from the start to the last byte.
        fetches: seconds of every fetch.
    """

    bytes: int
    cpu: float
    wall: float
    fetches: Sequence[float]


@dataclass(frozen=True)
class Row:
    """Several runs of one server with one file.

    Attributes:
        server: its name.
        file: what was fetched.
        file_bytes: its size.
        bytes: delivered in one run.
        runs: how many.
        cpu_per_gb: CPU seconds per 10**9 bytes, of the best run.
        cpu_per_gb_median: of the median run.
        cpu_per_fetch: CPU seconds of one fetch, of the best run.
        wall: seconds of the best run.
        wall_median: of the median run.
        fetch_p50: seconds of the median fetch, of all runs together.
        fetch_p99: of the 99th percentile.
    """

    server: str
    file: str
    file_bytes: int
    bytes: int
    runs: int
    cpu_per_gb: float
    cpu_per_gb_median: float
    cpu_per_fetch: float
    wall: float
    wall_median: float
    fetch_p50: float
    fetch_p99: float


def summary(server: str, file: str, file_bytes: int, runs: Sequence[Run]) -> Row:
    """Best and median of runs that delivered the same.

    Best is taken for each figure by itself: whatever else the machine does only adds.

    Raises:
        ValueError: no run, or runs that differ in what they delivered.
    """
    if not runs or len({(run.bytes, len(run.fetches)) for run in runs}) != 1:
        raise ValueError("the runs of a row must be of the same size, and one at least")
    size, count = runs[0].bytes, len(runs[0].fetches)
    cpu, wall = [run.cpu for run in runs], [run.wall for run in runs]
    every = sorted(second for run in runs for second in run.fetches)
    return Row(
        server,
        file,
        file_bytes,
        size,
        len(runs),
        min(cpu) / size * 1e9,
        statistics.median(cpu) / size * 1e9,
        min(cpu) / count,
        min(wall),
        statistics.median(wall),
        _quantile(every, 0.5),
        _quantile(every, 0.99),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"  {row.server:22}{row.file:>10}{row.bytes / 1e9:7.3f}{row.cpu_per_gb:10.3f}"
        f"{row.cpu_per_gb_median:8.3f}{1e3 * row.cpu_per_fetch:13.3f}{row.wall:8.2f}"
        f"{row.wall_median:8.2f}{row.fetch_p50:7.2f}{row.fetch_p99:7.2f}"
    )


def totals(rows: Sequence[Row], devices: int) -> dict[str, dict[str, float]]:
    """What one update of all devices costs by server and file: bytes and CPU seconds."""
    return {
        f"{row.server}, {row.file}": {
            "bytes": devices * row.file_bytes,
            "cpu_seconds": devices * row.cpu_per_fetch,
        }
        for row in rows
    }
