"""Accuracy against sparsity, by criterion, allocation and schedule, on three tasks.

    prunecast data get fashion-mnist && prunecast data get activity && prunecast data get cora
    python benchmarks/pruning.py [--smoke] [--tasks NAME ...] [--ways NAME ...] [--seeds N ...]
                                 [--sparsities X ...] [--rounds N] [--cache FOLDER] [--out FOLDER]

Trains each task with three seeds at each sparsity under every way of pruning, one thread and one
run after the other, and writes pruning.md, pruning.json and pruning.png into docs/results. The
third task, cora, has one way only, beside the automatic one that finds its sparsity by itself, in
1.3 times the rounds. Each of the others takes about two hours on a core. Finished runs are kept in
``--cache``, so that a command that was interrupted goes on where it was: a dense run by its
scenario, others by the code, too. Two commands, each with one of the ``--tasks``, may run at the
same time; a third one without then writes both. A way is one of those of
benchmarks/harness/pruning.py, or criterion:allocation:schedule by their names in a policy; a task
also any packaged scenario whose metric is an accuracy. ``--smoke`` takes a minute or two and writes
into runs/pruning-smoke.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import pruning as harness
from benchmarks.harness.comparisons import fill, forget_stale, teller, write_page
from benchmarks.harness.pruning_tasks import TASKS, task_named
from prunecast.server.federation import FederationError
from prunecast.simulations.comparison import Comparison
from prunecast.simulations.kinds import DataError, ScenarioError
from prunecast.simulations.runner import SimulationError
from prunecast.simulations.runner.run import read_result
from prunecast.simulations.scenarios import packaged_scenarios, scenario_from_mapping

_SMOKE: dict[str, Any] = {
    "tasks": ["fashion", "activity"],
    "ways": ["uniform", "global"],
    "seeds": [1],
    "sparsities": [0.9],
    "rounds": 4,
    "out": Path("runs/pruning-smoke"),
}
_FULL: dict[str, Any] = {
    "tasks": ["fashion", "activity", "cora"],
    "seeds": [1, 2, 3],
    "sparsities": list(harness.SPARSITIES),
    "out": Path(__file__).parent.parent / "docs" / "results",
}


def _ways(task: str, arguments: argparse.Namespace) -> list[str]:
    """Those that were asked for; or else all, of tasks that are there for them."""
    return arguments.ways or (list(harness.WAYS) if task in TASKS else [harness.FIXED])


def comparison_of(task: str, arguments: argparse.Namespace) -> Comparison:
    """The comparison of a task: every way at every sparsity.

    Raises:
        ScenarioError: there is no such task or way, or it cannot be a scenario.
    """
    rounds = _rounds(task, arguments)
    try:
        arms = harness.arms_of(_ways(task, arguments), arguments.sparsities, rounds)
    except ValueError as error:
        raise ScenarioError("ways", str(error), "correct it") from error
    return _comparison(task, rounds, arms, arguments, arguments.cache / task)


def automatic_of(task: str, arguments: argparse.Namespace) -> Comparison | None:
    """The comparison of the automatic way; None without the sweep that it is held against.

    Raises:
        ScenarioError: as of `comparison_of`.
    """
    if harness.FIXED not in _ways(task, arguments):
        return None
    rounds, arms = harness.automatic_arms(_rounds(task, arguments))
    return _comparison(task, rounds, arms, arguments, arguments.cache / f"{task}-automatic")


def _rounds(task: str, arguments: argparse.Namespace) -> int:
    if task not in TASKS and task not in packaged_scenarios():
        raise ScenarioError("tasks", f"is {task!r}", f"choose of {', '.join(_FULL['tasks'])}")
    rounds: int = arguments.rounds or task_named(task)["rounds"]
    return rounds


def _comparison(
    task: str, rounds: int, arms: dict[str, Any], arguments: argparse.Namespace, folder: Path
) -> Comparison:
    scenario = scenario_from_mapping(
        {
            "schema": 1,
            "name": task,
            **task_named(task),
            "rounds": rounds,
            "engine": {"backend": "inline"},
            "strategy": {"name": "fedavg"},
            "arms": arms,
        }
    )
    if scenario.task.metric != "accuracy":
        raise ScenarioError(
            "tasks", f"{task} measures {scenario.task.metric}", "choose one that has an accuracy"
        )
    return Comparison.of(scenario, names=list(arms), seeds=arguments.seeds, folder=folder)


def _run(comparison: Comparison, told: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Train what is not kept: the document, and what sparsity each arm reached, over seeds."""
    document = comparison.run(teller(told))
    zeros: dict[str, list[float]] = {}
    for scenario, folder in comparison.runs():
        arm = next(iter(scenario.arms))
        if arm in document["left_out"]:
            continue
        zeros.setdefault(arm, []).append(read_result(folder)["arms"][arm]["sparsity"])
    return document, {arm: statistics.fmean(values) for arm, values in zeros.items()}


def measured(
    comparison: Comparison, automatic: Comparison | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a task's comparisons gave, with what is known to hold; trains what is not kept."""
    name = comparison.scenario.name
    document, zeros = _run(comparison, name)
    rows = harness.rows_of(document, _ways(name, arguments), arguments.sparsities, zeros)
    metric, left_out, searched = document["task"]["metric"], dict(document["left_out"]), None
    if automatic is not None:
        longer, reached = _run(automatic, f"{name}, automatic")
        rounds = automatic.scenario.rounds
        without = document["arms"][harness.UNPRUNED]["by_seed"]
        searched = harness.compare_automatic(longer, rounds, without, rows, reached)
        left_out |= {f"{arm}, {rounds} rounds": why for arm, why in longer["left_out"].items()}

    def figures(arm: str) -> dict[str, Any]:
        found = document["arms"][arm]
        return {"accuracy": found[metric], **{k: found[k] for k in ("spread", "by_seed")}}

    return {
        "name": name,
        "description": comparison.scenario.description,
        "rounds": comparison.scenario.rounds,
        "seeds": list(comparison.seeds),
        "dense": figures(harness.DENSE),
        "unpruned": figures(harness.UNPRUNED),
        "rows": rows,
        "orderings": harness.compare_orderings(rows),
        "limits": harness.within_limits(rows),
        "left_out": left_out,
        "automatic": searched,
    }


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="two ways, one sparsity, four rounds, one seed")
    add("--tasks", nargs="+", metavar="NAME", help="(default: fashion activity cora)")
    names = f"names, or criterion:allocation:schedule (default: {' '.join(harness.WAYS)})"
    add("--ways", nargs="+", metavar="NAME", help=names)
    add("--seeds", type=int, nargs="+", metavar="N", help="(default: 1 2 3)")
    add("--sparsities", type=float, nargs="+", metavar="X", help="besides 0")
    add("--rounds", type=int, metavar="N", help="(default: the task's)")
    add("--cache", type=Path, default=Path("runs/pruning"), metavar="FOLDER")
    add("--out", type=Path, metavar="FOLDER", help="(default: docs/results)")
    chosen = parser.parse_args(given)
    fill(chosen, _SMOKE if chosen.smoke else _FULL)
    return chosen


def main(given: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if given is None else given
    arguments = _arguments(given)
    try:
        pairs = [
            (comparison_of(name, arguments), automatic_of(name, arguments))
            for name in arguments.tasks
        ]
        for comparison in (found for pair in pairs for found in pair if found is not None):
            forget_stale(comparison)
        tasks = [measured(*pair, arguments) for pair in pairs]
    except (DataError, FederationError, ScenarioError, SimulationError) as error:
        raise SystemExit(f"pruning.py: {error}") from error
    command = " ".join(["python benchmarks/pruning.py", *given])
    page = [*harness.report_lines(tasks, command), "", "![Accuracy against sparsity](pruning.png)"]
    draw = partial(harness.draw, tasks)
    write_page(arguments.out, "pruning", page, command, {"tasks": tasks}, draw)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
