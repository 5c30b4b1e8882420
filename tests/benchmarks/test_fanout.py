"""The fan-out benchmark: its arithmetic, its measure of CPU time, and a small run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loopback.costs import Run, line, summary, totals
from benchmarks.loopback.servers import cpu_seconds, tree_ticks

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fanout.py"


def test_best_and_median_of_runs() -> None:
    seconds = [0.1 * n for n in range(1, 101)]
    runs = [
        Run(2_000_000_000, 3.0, 9.0, seconds),
        Run(2_000_000_000, 1.0, 12.0, seconds),
        Run(2_000_000_000, 2.0, 8.0, seconds),
    ]
    row = summary("ours", "model", 20_000_000, runs)
    assert (row.cpu_per_gb, row.cpu_per_gb_median, row.cpu_per_fetch) == (0.5, 1.0, 0.01)
    assert (row.wall, row.wall_median, row.runs) == (8.0, 9.0, 3)
    assert row.fetch_p50 == pytest.approx(5.0)
    assert row.fetch_p99 == pytest.approx(9.9)
    assert totals([row], 500) == {"ours, model": {"bytes": 10**10, "cpu_seconds": 5.0}}
    assert line(row).split()[:6] == ["ours", "model", "2.000", "0.500", "1.000", "10.000"]
    one = summary("ours", "patch", 10, [Run(10, 1.0, 1.0, [0.25])])
    assert (one.fetch_p50, one.fetch_p99) == (0.25, 0.25)


def test_runs_of_different_sizes_are_not_averaged() -> None:
    with pytest.raises(ValueError, match="same size"):
        summary("ours", "model", 1, [Run(1, 1.0, 1.0, [1.0]), Run(2, 1.0, 1.0, [1.0, 1.0])])
    with pytest.raises(ValueError, match="one at least"):
        summary("ours", "model", 1, [])


def _stat(number: int, parent: int, *ticks: int) -> str:
    before = " ".join(["0"] * 9)
    return f"{number} (a ) (b S 1) S {parent} {before} {' '.join(map(str, ticks))} 20 0 1"


def test_ticks_are_those_of_the_whole_tree() -> None:
    stats = {
        7: _stat(7, 1, 1, 2, 3, 4),
        8: _stat(8, 7, 10, 0, 0, 0),
        9: _stat(9, 8, 0, 100, 0, 0),
        10: _stat(10, 1, 1000, 1000, 1000, 1000),
    }
    assert tree_ticks(stats, 7) == 120
    assert tree_ticks(stats, 9) == 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_time_counts_children_that_run_and_that_ended() -> None:
    burn = "import time\nwhile time.process_time() < {}: pass\n"
    program = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {burn.format(0.2)!r}])\n"
        "print('ended', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ended\n"
        assert 0.19 <= cpu_seconds(process.pid) < 2.0
        process.communicate("")


@pytest.mark.engine
def test_end_to_end(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--json", str(saved)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(saved.read_text())
    servers = ["prunecast serve"] + ([] if report["absent"] else ["nginx"])
    files = ["model", "keyframe", "patch"]
    assert [(r["server"], r["file"]) for r in report["rows"]] == [
        (server, file) for server in servers for file in files
    ]
    for row in report["rows"]:
        rounds = 1 if row["file"] == "model" else report["rounds"]
        assert row["bytes"] == row["file_bytes"] * report["devices"] * rounds
        assert 0 < row["fetch_p50"] <= row["fetch_p99"] <= row["wall_median"]
    sizes = [report["files"][file]["length"] for file in files]
    assert sizes == sorted(sizes, reverse=True)
