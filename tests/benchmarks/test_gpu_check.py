"""What `make gpu-check` runs, rehearsed on the CPU, and what it says without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_says_that_it_skipped(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    ran = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--json", str(target)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "skipped, there is no CUDA device" in ran.stdout
    report = json.loads(target.read_text())
    assert "nothing was checked" in report["skipped"]
    assert "trainer" not in report


def test_the_trainer_holds_masks_in_both_half_precisions() -> None:
    found = gpu_check.check_trainer("cpu", compiled=False)
    assert set(found) == {"bfloat16", "float16"}
    for outcome in found.values():
        assert outcome["loss"][1] < outcome["loss"][0]


def test_throughput_is_measured_beside_plain_torch() -> None:
    found = gpu_check.check_throughput("cpu")
    assert found["ratio"] == pytest.approx(found["prunecast"] / found["torch"])


def test_a_step_that_fails_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(device: str, *, compiled: bool) -> dict[str, object]:
        raise AssertionError("a pruned weight moved")

    monkeypatch.setattr(gpu_check, "check_trainer", broken)
    monkeypatch.setattr(gpu_check, "check_federation", lambda device: {"identical_examples": 0})
    target = tmp_path / "report.json"
    assert gpu_check.main(["--device", "cpu", "--json", str(target)]) == 1
    report = json.loads(target.read_text())
    assert report["trainer"]["error"] == "AssertionError: a pruned weight moved"
    assert report["compiled"]["ok"] is False
    assert report["federation"]["ok"] is True


@pytest.mark.engine
def test_two_clients_on_one_device_and_a_release() -> None:
    found = gpu_check.check_federation("cpu")
    assert found["identical_examples"] == 1000
    assert found["arms"]["prunecast"]["bytes_up"] < found["arms"]["dense"]["bytes_up"] / 5
