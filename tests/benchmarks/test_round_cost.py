"""The benchmark of a server's round: the model it states, its arithmetic, and a small run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import round_cost

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "round_cost.py"


def test_the_shapes_are_those_of_resnet_18() -> None:
    shapes = dict(round_cost.shapes())
    assert len(shapes) == 122
    weights = [s for name, s in shapes.items() if "running" not in name and s]
    assert len(weights) == 62
    assert sum(math.prod(s) for s in weights) == 11_689_512


def test_ratios_are_of_the_same_number_of_clients() -> None:
    rows = [
        {"kind": "plain", "clients": 2, "cpu_s": 2.0, "peak_mb": 100.0},
        {"kind": "prunecast", "clients": 2, "cpu_s": 3.0, "peak_mb": 50.0},
        {"kind": "prunecast", "clients": 9, "cpu_s": 3.0, "peak_mb": 50.0},
    ]
    assert round_cost.ratios(rows) == [{"clients": 2, "cpu": 1.5, "peak": 0.5}]


def test_what_was_measured_is_drawn_later(tmp_path: Path) -> None:
    kept, target = BENCHMARK.with_suffix(".json"), tmp_path / "chart.png"
    command = [sys.executable, str(BENCHMARK), "--load", str(kept), "--chart", str(target)]
    told = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout
    assert "100 clients: " in told
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_run(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--clients", "2", "--rounds", "1"]
    subprocess.run([*command, "--json", str(target)], check=True, timeout=300, capture_output=True)
    report = json.loads(target.read_text())
    assert [(row["kind"], row["clients"]) for row in report["rows"]] == [
        ("plain", 2),
        ("prunecast", 2),
    ]
    for row in report["rows"]:
        assert row["cpu_s"] > 0
        assert row["peak_mb"] > 0
    assert report["ratios"][0]["clients"] == 2
