"""What small devices are worth that train a slice of the model: bytes and accuracy by class.

    python benchmarks/widths.py [--rounds N] [--seeds 1 2 3] [--json FILE]

Runs the packaged scenario ``widths`` in this process, once per seed: ten clients of skewed labels,
of which five are small. All train the whole model; or the small ones half of its channels (a nested
slice, aggregated by overlap); or the small ones take no part, and their examples are lost. Accuracy
is that of the published model, and of its slice, on held-out images: the mean of the last five
rounds. Bytes are those of one client of a class, both ways. Takes some ten minutes a seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

_LAST = 5  # rounds


def figures(arm: dict[str, Any]) -> dict[str, Any]:
    """Bytes and accuracy of an arm and of each of its classes."""
    rounds = arm["rounds"]
    found = {
        "accuracy": _mean(row["accuracy"] for row in rounds[-_LAST:]),
        "bytes": arm["bytes_up"] + arm["bytes_down"],
        "classes": {},
    }
    for name, last in (arm["widths"] or {}).items():
        spent = last["bytes_up"] + last["bytes_down"]
        found["classes"][name] = {
            **{key: last[key] for key in ("share", "nodes", "weights")},
            "accuracy": _mean(row["widths"][name]["accuracy"] for row in rounds[-_LAST:]),
            "bytes_of_a_client": round(spent / last["nodes"]) if last["nodes"] else 0,
        }
    return found


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 4)


def _tell(event: Any) -> None:
    if event["event"] in ("round-finished", "step"):
        kept = {k: event[k] for k in ("round", "score", "text") if k in event}
        print(event["event"], kept, flush=True)


def main() -> None:
    """Train, print, and write what was found."""
    from benchmarks.harness.report import machine
    from prunecast.common.files import write_atomically
    from prunecast.simulations.runner.run import run_scenario
    from prunecast.simulations.scenarios import load_scenario

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scenario = load_scenario("widths")
    rounds = arguments.rounds or scenario.rounds
    scenario = replace(scenario, rounds=rounds, engine=replace(scenario.engine, backend="inline"))
    found: dict[str, Any] = {"scenario": "widths", "rounds": rounds, "machine": machine()}
    found["seeds"] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            result = run_scenario(
                replace(scenario, seed=seed), Path(scratch) / "run", on_event=_tell
            )
        found["seeds"][str(seed)] = {n: figures(arm) for n, arm in result["arms"].items()}
        text = json.dumps(found, indent=1) + "\n"
        print(text, flush=True)
        if arguments.json is not None:  # after each seed: a long run may be cut short
            write_atomically(arguments.json, text.encode())


if __name__ == "__main__":
    main()
