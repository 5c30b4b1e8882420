"""The benchmark of the codec in torch runs end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "accelerated.py"


def test_end_to_end(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    chosen = ("--device", "cpu", "--quick", "--repeat", "1", "--case", "pruned", "large")
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *chosen, "--json", str(saved)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(saved.read_text())
    assert {"device", "device_name", "threads", "numpy", "torch"} <= set(report["environment"])
    assert [case["name"] for case in report["cases"]] == ["90 % pruned weights", "one large tensor"]
    for case in report["cases"]:
        assert 0 < case["payload_bytes"] < case["tensor_bytes"] / 4
        assert min(case["operations"].values()) > 100
        assert [t["coder"] for t in case["timings"]] == ["torch", "numpy", "numpy + copies"]
        for timing in case["timings"]:
            assert 0 < timing["encode_best"] <= timing["encode_median"]
            assert 0 < timing["decode_best"] <= timing["decode_median"]
