"""The benchmark of thousands of clients: what it counts, and a small run on Flower's engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scale

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def test_ratios_are_ours_over_plain_flower() -> None:
    plain = {"setup_s": 2.0, "round_s": 4.0, "cpu_s": 8.0}
    plain |= {"peak_mb": 100.0, "server_mb": 50.0}
    plain |= {"bytes_down": 700, "bytes_up": 300}
    ours = {"setup_s": 1.0, "round_s": 6.0, "cpu_s": 6.0}
    ours |= {"peak_mb": 80.0, "server_mb": 60.0}
    ours |= {"bytes_down": 10, "bytes_up": 10}
    assert scale.ratios([plain, ours]) == {
        "setup": 0.5,
        "round": 1.5,
        "cpu": 0.75,
        "peak": 0.8,
        "server": 1.2,
        "bytes": 0.02,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_below_are_found_with_what_they_take() -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    middle = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", middle, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # of the innermost
        found = set(scale.below(os.getpid()))
        assert process.pid in found
        [inner] = scale.below(process.pid)
        assert inner in found
        assert scale.proportional(inner) > 1_000_000
        assert scale.cpu_seconds(inner) >= 0
        process.communicate()
    assert scale.proportional(process.pid) == scale.cpu_seconds(process.pid) == 0


@pytest.mark.engine
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_run(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--clients", "30", "--sampled", "3"]
    command += ["--rounds", "2", "--store-bytes", "4000000", "--json", str(target)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    report = json.loads(target.read_text())
    dense, small = report["rows"]
    assert [row["arm"] for row in report["rows"]] == ["dense", "small"]
    for row in report["rows"]:
        assert len(row["rounds_s"]) == 2
        assert row["peak_mb"] > row["server_mb"] > 0
    assert dense["store_mb"] == 0
    assert 0 < small["store_mb"] <= 4
    assert small["forgotten"] > 0
    assert report["ratios"]["bytes"] < 0.1
