"""Apps of other frameworks run with the two lines, as their README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
ROUNDS = 3
ONE_PROCESS = "client-resources-num-cpus=1 init-args-num-cpus=1"


def ran(simulation: Any, name: str, metric: str, *config: str) -> tuple[list[float], float]:
    """The metric after every round, and how many times fewer bytes went than without Prunecast."""
    run = simulation.run(
        EXAMPLES / name,
        *("--run-config", " ".join((f"num-server-rounds={ROUNDS}", *config))),
        *("--federation-config", f"num-supernodes=2 {ONE_PROCESS}"),
        seconds=900,
    )
    told = [float(value) for value in re.findall(rf"Record: {{.*'{metric}': ([0-9.]+)", run.log)]
    assert len(told) == ROUNDS, run.log
    sent = re.search(r"([0-9,]+) bytes on the wire, ([0-9,]+) without Prunecast", run.log)
    assert sent, run.log
    ours, dense = (int(number.replace(",", "")) for number in sent.groups())
    return told, dense / ours


def test_scikit_learn(simulation: Any) -> None:
    pytest.importorskip("sklearn")
    accuracies, factor = ran(simulation, "scikit-learn", "eval_acc")
    assert accuracies[-1] > 0.8
    assert factor > 50  # of float64


def test_jax(simulation: Any) -> None:
    pytest.importorskip("jax", reason="JAX is not installed: pip install 'prunecast[examples-jax]'")
    # masks from the second round on, so that training holds them
    pruned = "prunecast.pruning-begin=1 prunecast.pruning-end=2"
    accuracies, factor = ran(simulation, "jax", "eval_acc", pruned)
    assert accuracies[-1] > 0.7  # one round after four fifths of the weights went
    assert factor > 30


def test_xgboost(simulation: Any) -> None:
    pytest.importorskip("xgboost")
    areas, factor = ran(simulation, "xgboost", "eval_auc")
    assert areas[-1] > 0.9
    assert factor > 2
