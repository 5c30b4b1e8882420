"""What thousands of simulated clients cost: memory, seconds and disk, beside plain Flower.

    python benchmarks/scale.py [--clients N] [--sampled N] [--rounds N] [--examples N]
                               [--store-bytes N] [--seed N] [--quick] [--json FILE]

The CNN of McMahan et al. (2017) of 1,663,370 parameters is trained by `prunecast simulate`'s own
runner on Flower's simulation engine, two clients at a time, once as plain Flower sends it (the arm
`dense`) and once by the preset `small`, 90 % pruned from the first version on, each in an engine of
its own. Images are made up from the seed, a few for each client: accuracies mean nothing here, the
size of what is sent and kept does.

Stated are, for each arm: `setup` (seconds until the first model was measured: data, one file for
each client, engine, nodes), `round` (median seconds of a round without the first, which warms up,
the measurement on 500 images included), `peak` (proportional resident memory of the engine and
all processes below it, sampled; `server` is the engine's own process, with server and SuperLink),
`store` (bytes on disk that the nodes keep, the most that was seen after a round), the bytes of all
messages; `cpu` is the CPU time (user and system) of all these processes in such a round, which a
busy machine changes less than `round`. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("dense", "small")
HELD_OUT = 500
SPARSITY = 0.9
_PAUSE = 0.5  # seconds between two looks at the processes


def images(folder: Path, count: int, seed: int) -> Path:
    """Ten classes of made-up images: a pattern for each, and noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    patterns = rng.random((10, 1, 28, 28), np.float32)
    x = patterns[labels] + rng.normal(0, 0.3, (count, 1, 28, 28)).astype(np.float32)
    path = folder / "images.npz"
    np.savez(path, x=x, y=labels)
    return path


def scenario(data: Path, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """The scenario of one arm, as `scenario_from_mapping` reads it."""
    engine = {"store_bytes": options.store_bytes} if options.store_bytes else {}
    # pruned from the first version on: a few rounds then cost what later ones of a long run do
    pruned = {"sparsity": SPARSITY, "pruning_begin": 0, "pruning_end": 1}
    kinds = {
        "dense": {"kind": "dense"},
        "small": {"kind": "prunecast", "preset": "small", "policy": pruned},
    }
    factory = "digits_cnn" if options.quick else "cnn"
    return {
        "schema": 1,
        "name": arm,
        "seed": options.seed,
        "rounds": options.rounds,
        "data": {"source": "npz", "path": str(data), "held_out": HELD_OUT},
        "partition": {"kind": "iid"},
        # half a client more: the strategy truncates
        "clients": {
            "count": options.clients,
            "fraction": (options.sampled + 0.5) / options.clients,
        },
        "model": {
            "factory": f"prunecast.simulations.networks.convolutional:{factory}",
            "initial": "drawn",
        },
        "training": {"epochs": 2, "batch_size": 2, "device": "cpu"},
        "engine": {"concurrent": 2, **engine},
        "arms": {arm: kinds[arm]},
    }


# -- what processes take --------------------------------------------------------------------------


def below(pid: int) -> Iterator[int]:
    """The processes that a process started, and those that they did."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    waiting = list(children.get(pid, ()))
    while waiting:
        found = waiting.pop()
        yield found
        waiting += children.get(found, ())


def proportional(pid: int) -> int:
    """Resident bytes of a process; what it shares counts in parts."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(r.split()[1]) * 1024 for r in text.splitlines() if r.startswith("Pss:")), 0)


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has taken, and those of its children that ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def is_engine(pid: int) -> bool:
    """Whether it is the process that holds server and SuperLink."""
    try:
        return b"prunecast.simulations.runner.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class Watch:
    """Looks again and again at the processes below this one, until it is left."""

    def __init__(self) -> None:
        self.peak = self.server = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(_PAUSE):
            sizes = {pid: proportional(pid) for pid in below(os.getpid())}
            self.peak = max(self.peak, sum(sizes.values()))
            self.server = max([self.server, *(n for pid, n in sizes.items() if is_engine(pid))])

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


# -- what is measured -----------------------------------------------------------------------------


def measure(data: Path, folder: Path, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one arm."""
    from prunecast.common.files import folder_bytes
    from prunecast.simulations.runner.run import run_scenario
    from prunecast.simulations.scenarios import scenario_from_mapping

    chosen = scenario_from_mapping(scenario(data, arm, options))
    folder.mkdir()
    store, begun, ready = folder / "work" / "store", time.monotonic(), 0.0
    kept: list[int] = []
    spent: list[float] = []

    def hear(event: Mapping[str, Any]) -> None:
        nonlocal ready
        if event["event"] == "round-finished":
            ready = ready or time.monotonic()
            kept.append(folder_bytes(store))
            spent.append(sum(map(cpu_seconds, below(os.getpid()))))

    with Watch() as watch:
        result = run_scenario(chosen, folder, on_event=hear)
    figures = result["arms"][arm]
    seconds = [row["seconds"] for row in figures["rounds"]]
    rounds = [after - before for before, after in itertools.pairwise(seconds)]
    cpu = [after - before for before, after in itertools.pairwise(spent)]
    return {
        "arm": arm,
        "setup_s": round(ready - begun, 2),
        "round_s": round(statistics.median(rounds[1:] or rounds), 3),
        "rounds_s": [round(value, 3) for value in rounds],
        "cpu_s": round(statistics.median(cpu[1:] or cpu), 3),
        "cpu_rounds_s": [round(value, 3) for value in cpu],
        "peak_mb": round(watch.peak / 1e6, 1),
        "server_mb": round(watch.server / 1e6, 1),
        "store_mb": round(figures["store_bytes"] / 1e6, 1),
        "forgotten": figures["forgotten"],
        "store_after_round_mb": [round(size / 1e6, 1) for size in kept],
        "bytes_down": figures["bytes_down"],
        "bytes_up": figures["bytes_up"],
        "accuracy": figures["accuracy"],
    }


HEAD = (
    f"  {'':8}{'setup s':>9}{'round s':>9}{'CPU s':>9}{'peak MB':>9}{'server MB':>11}"
    f"{'store MB':>10}{'MB sent':>10}"
)


def line(row: Mapping[str, Any]) -> str:
    """An arm as a line of the table."""
    sent = (row["bytes_down"] + row["bytes_up"]) / 1e6
    return (
        f"  {row['arm']:8}{row['setup_s']:9.1f}{row['round_s']:9.2f}{row['cpu_s']:9.2f}"
        f"{row['peak_mb']:9.0f}{row['server_mb']:11.0f}{row['store_mb']:10.1f}{sent:10.1f}"
    )


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over plain Flower's."""
    plain, ours = rows
    keys = ("setup_s", "round_s", "cpu_s", "peak_mb", "server_mb")
    found = {key.rpartition("_")[0]: round(ours[key] / plain[key], 3) for key in keys}
    sent = [row["bytes_down"] + row["bytes_up"] for row in rows]
    return {**found, "bytes": round(sent[1] / sent[0], 5)}


def main() -> None:
    """Measure both arms, print as it goes, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--clients", type=int, default=1000, help="(default: 1000)")
    add("--sampled", type=int, default=10, help="clients in a round (default: 10)")
    add("--rounds", type=int, default=4, help="(default: 4)")
    add("--examples", type=int, default=6, help="of each client (default: 6)")
    add("--store-bytes", type=int, default=0, help="engine.store_bytes (default: the scenario's)")
    add("--seed", type=int, default=0, help="of data, sampling and training (default: 0)")
    add("--quick", action="store_true", help="a smaller network: does it work?")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if not 0 < options.sampled <= options.clients or options.rounds < 1:
        parser.error("sample at least 1 client and at most all of them, for at least 1 round")
    from harness.report import machine

    rows = []
    print(f"{options.clients} clients, {options.sampled} a round, {options.rounds} rounds")
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        count = options.clients * options.examples + HELD_OUT
        data = images(Path(folder), count, options.seed)
        for arm in ARMS:
            rows.append(measure(data, Path(folder) / arm, arm, options))
            print(line(rows[-1]), flush=True)
    document = {
        "machine": machine(),
        **{k: getattr(options, k) for k in ("clients", "sampled", "rounds", "examples", "seed")},
        "parameters": 409_034 if options.quick else 1_663_370,
        "sparsity": SPARSITY,
        "rows": rows,
        "ratios": ratios(rows),
    }
    print("ours over plain: " + ", ".join(f"{k} {v}" for k, v in document["ratios"].items()))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
