"""The rollout benchmark with few agents: every step, and that nothing hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rollout.py"


def test_real_agents_go_up_stay_out_of_a_bad_release_and_go_down(tmp_path: Path) -> None:
    document = tmp_path / "figures.json"
    options = {"agents": 4, "silent": 1, "deadline": 2, "limit": 240, "json": document}
    command = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(document.read_text())
    assert found["rollout"]["progress"] == {"confirmed": 3, "silent": 1}
    assert found["rollout"]["seconds_to_end_of_stage"][-1] >= 2  # it waited for the silent one
    assert (found["bad"]["told"], found["bad"]["versions"]) == (1, {"2": 4})
    assert found["down"]["versions"] == {"1": 4}
    assert found["as_expected"]
