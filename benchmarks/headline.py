"""The headline figures: every family of models under ours and its peers, bytes and accuracy.

    python benchmarks/headline.py [--smoke] [--scenarios NAME ...] [--arms NAME ...] [--seeds N ...]
                                  [--rounds N] [--tolerance X] [--processes N] [--cache FOLDER]
                                  [--out FOLDER]

Trains each scenario with three seeds for its own number of rounds under every arm of `prunecast
compare`, and writes headline.md, headline.json and headline.png into docs/results. That takes about
five hours of one core; finished runs are kept in ``--cache``, so that a command that was
interrupted goes on where it was: a dense run by its scenario, another by the source code, too.
``--smoke`` takes a minute or two and writes into runs/headline-smoke. docs/figures.md says what is
compared, and which data are to be got before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness.comparisons import fill, forget_stale, teller, write_page
from benchmarks.harness.headline import draw, report_lines, verdict
from prunecast.common.files import write_atomically
from prunecast.compression.pruning.counting import parameter_count
from prunecast.simulations.comparison import Comparison, finished
from prunecast.simulations.kinds import DataError, ScenarioError
from prunecast.simulations.runner import SimulationError
from prunecast.simulations.scenarios import EngineSpec, load_scenario

FAMILIES = {
    "survival": "multilayer perceptron",
    "cora": "graph convolution",
    "voices": "convolution along time, speech",
    "activity": "convolution along time, sensors",
    "movielens": "matrix factorisation",
    "shakespeare": "LSTM",
    "mnist": "CNN",
    "resnet-batch": "ResNet, BatchNorm",
}
"""Scenarios that are trained unless others are named, and what kind of model each has."""
_SMOKE: dict[str, Any] = {
    "scenarios": ["mlp", "graph"],
    "arms": ["dense", "dense-zstd", "stc", "small"],
    "seeds": [1],
    "rounds": 3,
    "out": Path("runs/headline-smoke"),
}
_FULL: dict[str, Any] = {
    "scenarios": list(FAMILIES),
    "arms": [],
    "seeds": [1, 2, 3],
    "out": Path(__file__).parent.parent / "docs" / "results",
}
_DOCUMENT = "headline.json"  # in the cache: what a scenario's process measured


def comparison_of(name: str, arguments: argparse.Namespace) -> Comparison:
    """The comparison of a scenario, its runs in this process and one thread each.

    Raises:
        ScenarioError: there is no such scenario or arm, or no dense one or none of ours.
    """
    scenario = dataclasses.replace(load_scenario(name), engine=EngineSpec("inline"))
    found = Comparison.of(
        scenario,
        names=arguments.arms,
        seeds=arguments.seeds,
        rounds=arguments.rounds,
        folder=arguments.cache / scenario.name,
    )
    for kind in ("dense", "prunecast"):
        if kind not in {arm.kind() for arm in found.arms.values()}:
            raise ScenarioError("arms", f"none is {kind}", f"name one of kind {kind}, too")
    return found


def measured(comparison: Comparison, tolerance: float) -> dict[str, Any]:
    """The document of a comparison, with what is needed to judge it; trains what is not kept."""
    scenario = comparison.scenario
    document = comparison.run(teller(scenario.name))
    wire = _wire(comparison, document)
    for name, arm in document["arms"].items():
        arm["wire"] = wire.get(name)
    document["parameters"] = parameter_count(scenario.model.network()())
    document["family"] = FAMILIES.get(scenario.name, scenario.name)
    document["verdict"] = verdict(document, tolerance)
    return document


def _wire(comparison: Comparison, document: Mapping[str, Any]) -> dict[str, int]:
    """Estimated bytes on the wire by arm, means over seeds, where ledgers can say."""
    from prunecast.server.federation import Tally
    from prunecast.simulations.network_profiles.results import entries_of
    from prunecast.simulations.runner.run import read_result

    found: dict[str, list[int | None]] = {}
    for scenario, folder in comparison.runs():
        if document["left_out"].keys() & scenario.arms:
            continue
        for name, arm in read_result(folder)["arms"].items():
            entries = entries_of(folder / arm["ledger"], None if arm["trained"] else name)
            totals = Tally(entries).totals()
            known = totals.wire_up is not None and totals.wire_down is not None
            both = (totals.wire_up or 0) + (totals.wire_down or 0) if known else None
            found.setdefault(name, []).append(both)
    sums = {name: [size for size in sizes if size is not None] for name, sizes in found.items()}
    return {n: round(statistics.fmean(sums[n])) for n, sizes in found.items() if None not in sizes}


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="two small scenarios, three rounds, one seed")
    names = f"names, or files (default: {' '.join(FAMILIES)})"
    add("--scenarios", nargs="+", metavar="NAME", help=names)
    add("--arms", nargs="+", metavar="NAME", help="of `prunecast compare` (default: all)")
    add("--seeds", type=int, nargs="+", metavar="N", help="(default: 1 2 3)")
    add("--rounds", type=int, metavar="N", help="(default: the scenario's)")
    add("--tolerance", type=float, default=0.005, help="(default: 0.005)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="scenarios at the same time")
    add("--cache", type=Path, default=Path("runs/headline"), metavar="FOLDER")
    add("--out", type=Path, metavar="FOLDER", help="(default: docs/results)")
    add("--one", metavar="NAME", help=argparse.SUPPRESS)  # of the process of a scenario
    chosen = parser.parse_args(given)
    fill(chosen, _SMOKE if chosen.smoke else _FULL)
    return chosen


def main(given: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if given is None else given
    arguments = _arguments(given)
    try:
        if arguments.one:
            comparison = comparison_of(arguments.one, arguments)
            text = json.dumps(measured(comparison, arguments.tolerance)) + "\n"
            write_atomically(comparison.folder / _DOCUMENT, text.encode())
            return 0
        comparisons = [comparison_of(name, arguments) for name in arguments.scenarios]
        for comparison in comparisons:
            forget_stale(comparison)
        _check(comparisons)
    except (DataError, ScenarioError, SimulationError) as error:
        raise SystemExit(f"headline.py: {error}") from error
    with ThreadPoolExecutor(arguments.processes) as pool:
        folders = [comparison.folder for comparison in comparisons]
        work = pool.map(partial(_in_process, arguments), arguments.scenarios, folders)
        documents = list(work)
    command = " ".join(["python benchmarks/headline.py", *given])
    page = list(report_lines(documents, arguments.tolerance, command))
    page += ["", "![What every arm reached against its bytes](headline.png)"]
    facts = {"tolerance": arguments.tolerance, "scenarios": documents}
    write_page(arguments.out, "headline", page, command, facts, partial(draw, documents))
    return 0


def _in_process(arguments: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """The document of a scenario, measured by a process that Ctrl-C ends with this one."""
    command = [sys.executable, __file__, "--one", name, "--cache", str(arguments.cache)]
    command += ["--tolerance", str(arguments.tolerance), "--seeds", *map(str, arguments.seeds)]
    if arguments.arms:
        command += ["--arms", *arguments.arms]
    if arguments.rounds:
        command += ["--rounds", str(arguments.rounds)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise SystemExit(f"headline.py: {name} ended with {done.returncode}; what is done is kept")
    found: dict[str, Any] = json.loads((folder / _DOCUMENT).read_text(encoding="utf-8"))
    return found


def _check(comparisons: list[Comparison]) -> None:
    """Every scenario that still is to be trained, before the first of them takes its hours."""
    from prunecast.simulations.runner.run import check_scenario

    for comparison in comparisons:
        if any(finished(*run) is None for run in comparison.runs()):
            check_scenario(comparison.scenario)


if __name__ == "__main__":
    raise SystemExit(main())
