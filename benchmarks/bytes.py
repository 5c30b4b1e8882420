"""What a federation costs in bytes for the accuracy it reaches, kind of model by kind of model.

    python benchmarks/bytes.py [--kinds NAME ...] [--presets NAME ...] [--rounds N] [--seeds N ...]
                               [--set KNOB=VALUE ...] [--processes N] [--smoke] [--json FILE]

Trains the federation of the demo (5,000 MNIST images, 10 clients, Dirichlet 0.3) once densely and
once with each preset, in this machine's memory, message by message through Flower's own objects;
bytes are those of the ledger. Accuracy is the mean of the last five rounds, on 1,000 held-out
images; with ``PRUNECAST_DATA`` naming a folder that holds ``mnist.npz`` (arrays x_test and y_test),
on MNIST's 10,000 test images. ``--smoke`` takes a minute: one small kind, three rounds.

Dense runs are kept in ``--cache`` by what they depend on, since every comparison needs them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_NETWORKS = "benchmarks.harness.training.networks"
KINDS: dict[str, dict[str, Any]] = {
    "cnn": {"factory": "prunecast.simulations.scenarios.models:digits_cnn"},
    "lenet": {"factory": f"{_NETWORKS}:lenet"},
    "resnet-group": {"factory": f"{_NETWORKS}:small_resnet_group"},
    "resnet-batch": {"factory": f"{_NETWORKS}:small_resnet_batch"},
    "lstm": {"factory": f"{_NETWORKS}:small_lstm", "learning_rate": 0.1},
    "transformer": {"factory": f"{_NETWORKS}:small_transformer"},
}
_TRAINING = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 0.05,
    "learning_rate_decay": 0.93,
    "momentum": 0.9,
}


def scenario(kind: str, rounds: int, seed: int, arm: Mapping[str, Any]) -> dict[str, Any]:
    """The scenario of one run, as its file would say it."""
    model = dict(KINDS[kind])
    factory = model.pop("factory")
    return {
        "schema": 1,
        "name": "bytes",
        "seed": seed,
        "rounds": rounds,
        "data": {"source": "mnist-5k", "held_out": 1000},
        "partition": {"kind": "dirichlet", "alpha": 0.3},
        "clients": {"count": 10},
        "model": {"factory": factory, "initial": "drawn"},
        "training": {**_TRAINING, **model},
        "engine": {"backend": "inline"},
        "arms": {"run": arm},
    }


def train(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run one scenario with one arm in this process."""
    import torch

    torch.set_num_threads(1)
    from prunecast.server.federation import Ledger
    from prunecast.simulations.runner.engine import simulate
    from prunecast.simulations.runner.prepared import prepare
    from prunecast.simulations.scenarios import scenario_from_mapping

    prepared = prepare(scenario_from_mapping(dict(document)), folder)
    events: list[Mapping[str, Any]] = []
    started = time.process_time()
    simulate(prepared, events.append)
    (outcome,) = events[-1]["arms"]
    path = next(folder.glob("ledger*.jsonl"))
    messages = [
        (e.round, e.direction, e.kind, e.payload_bytes, e.dense_bytes) for e in Ledger.read(path)
    ]
    return {
        "rounds": outcome["rounds"],
        "messages": _by_round(messages),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _by_round(messages: list[tuple[int, str, str, int, int]]) -> list[dict[str, Any]]:
    sums: dict[tuple[int, str, str], list[int]] = {}
    for number, way, kind, size, dense in messages:
        total = sums.setdefault((number, way, kind), [0, 0, 0])
        for at, amount in enumerate((1, size, dense)):
            total[at] += amount
    names = ("messages", "bytes", "dense_bytes")
    return [
        {"round": number, "direction": way, "kind": kind, **dict(zip(names, total, strict=True))}
        for (number, way, kind), total in sorted(sums.items())
    ]


def _in_process(document: Mapping[str, Any], cache: Path | None) -> dict[str, Any]:
    """A run in a fresh process, or what an earlier one with the same scenario gave."""
    text = json.dumps(document, sort_keys=True)
    kept = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json" if cache else None
    if kept is not None and kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bytes", "--run", folder],
            input=text,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"},
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(result), encoding="utf-8")
    return result


def _accuracy(result: Mapping[str, Any]) -> float:
    """Mean of the last five rounds, in per cent."""
    scores = [r["accuracy"] for r in result["rounds"] if r["round"]]
    return 100 * statistics.fmean(scores[-5:])


def _cost(result: Mapping[str, Any]) -> tuple[int, int, int]:
    """Bytes down, bytes up, and what both are in plain Flower."""
    ways = {"down": 0, "up": 0}
    for row in result["messages"]:
        ways[row["direction"]] += row["bytes"]
    return ways["down"], ways["up"], sum(row["dense_bytes"] for row in result["messages"])


def _rows(arguments: argparse.Namespace, knobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    dense = {"kind": "dense"}
    arms = {p: {"kind": "prunecast", "preset": p, "policy": knobs} for p in arguments.presets}
    jobs = [
        (kind, name, seed, scenario(kind, arguments.rounds, seed, arm))
        for kind in arguments.kinds
        for seed in arguments.seeds
        for name, arm in {"dense": dense, **arms}.items()
    ]
    with ThreadPoolExecutor(arguments.processes) as pool:
        runs = pool.map(
            lambda job: _in_process(job[3], arguments.cache if job[1] == "dense" else None), jobs
        )
        reached: dict[tuple[str, int], float] = {}
        for (kind, name, seed, _), result in zip(jobs, runs, strict=True):
            accuracy = _accuracy(result)
            if name == "dense":
                reached[kind, seed] = accuracy
                continue
            down, up, plain = _cost(result)
            yield {
                "kind": kind,
                "preset": name,
                "rounds": arguments.rounds,
                "seed": seed,
                "ratio": round(plain / (down + up), 1),
                "accuracy": round(accuracy, 2),
                "against_dense": round(accuracy - reached[kind, seed], 2),
                "bytes_down": down,
                "bytes_up": up,
                "cpu_seconds": result["cpu_seconds"],
                "by_round": result["messages"],
                "curve": [
                    [r["round"], r["accuracy"], r["sparsity"], r["bytes_down"], r["bytes_up"]]
                    for r in result["rounds"]
                ],
            }


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--presets", nargs="+", default=["balanced", "small"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="+", default=[], metavar="KNOB=VALUE", dest="knobs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "prunecast-dense"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(train(json.load(sys.stdin), arguments.run)))
        return 0
    if arguments.smoke:
        arguments.kinds, arguments.rounds, arguments.seeds = ["lenet"], 3, [1]
    knobs = {k: _value(v) for k, _, v in (knob.partition("=") for knob in arguments.knobs)}
    rows = []
    print(f"{'kind':14} {'preset':10} seed  ratio  accuracy  - dense      down        up")
    for row in _rows(arguments, knobs):
        rows.append(row)
        print(
            f"{row['kind']:14} {row['preset']:10} {row['seed']:4} {row['ratio']:6.1f} "
            f"{row['accuracy']:9.2f} {row['against_dense']:+8.2f} {row['bytes_down']:9,} "
            f"{row['bytes_up']:9,}",
            flush=True,
        )
    if arguments.json:
        document = {"cores": os.cpu_count(), "knobs": knobs, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
