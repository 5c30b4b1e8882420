"""The examples run with `flwr run .` from their own folders, as their README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["quickstart-prunecast"])
def test_quickstart_learns(simulation: Any, name: str) -> None:
    run = simulation.run(
        EXAMPLES / name,
        *("--run-config", "num-server-rounds=3"),
        *("--federation-config", "client-resources-num-cpus=1"),
    )
    accuracies = [float(a) for a in re.findall(r"'eval_acc': ([0-9.]+)", run.log)]
    assert max(accuracies) > 0.8, run.log
    sent = re.search(r"([0-9,]+) bytes on the wire, ([0-9,]+) without Prunecast", run.log)
    assert sent, run.log
    ours, dense = (int(number.replace(",", "")) for number in sent.groups())
    assert ours * 20 < dense, run.log
