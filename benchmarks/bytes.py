"""What a federation costs in bytes for the accuracy it reaches, kind of model by kind of model.

    python benchmarks/bytes.py --smoke | --full
    python benchmarks/bytes.py [--kinds NAME ...] [--presets NAME ...] [--rounds N] [--seeds N ...]
                               [--set KNOB=VALUE ...] [--processes N] [--cache FOLDER]
                               [--wire] [--json FILE] [--chart FILE]

Trains the federation of the demo (5,000 MNIST images, 10 clients, Dirichlet 0.3) once densely and
once with each preset, in this machine's memory, message by message through Flower's own objects;
bytes are those of the ledger. Accuracy is the mean of the last five rounds, on 1,000 held-out
images; with ``PRUNECAST_DATA`` naming a folder that holds ``mnist.npz`` (arrays x_test, uint8
(n, 28, 28), and y_test), on those of its images that are not trained on.

Every finished run prints a line and is kept in ``--cache``, so that a command that was interrupted
goes on where it was: a dense run by its scenario, another by the source code, too. At the end
follow tables: the spread over the seeds, and the bytes by direction, payload and tensor. With
``--wire`` the first kind is also trained for three rounds at most by two SuperNodes of a real
SuperLink on loopback, through a relay that counts: minutes more.

``--smoke`` takes a minute or two: one small kind, three rounds, one seed. ``--full`` takes hours:
all kinds, 50 rounds, three seeds. Both fill in what is not chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness.curves import draw_curves
from benchmarks.harness.federation import (
    KINDS,
    DataMissing,
    digest_of,
    images_file,
    read_images,
    scenario,
    train,
)
from benchmarks.harness.spread import summary, tables
from prunecast.common.files import write_atomically

_SMOKE: dict[str, Any] = {"kinds": ["lenet"], "rounds": 3, "seeds": [1]}
_FULL: dict[str, Any] = {"kinds": list(KINDS), "rounds": 50, "seeds": [1, 2, 3]}
_WIRE_ROUNDS = 3
_HEAD = f"{'kind':14} {'preset':10} seed  ratio  accuracy  - dense       down         up  envelopes"


def _in_process(document: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """A run in a fresh process, or what an earlier one that depends on the same gave."""
    kept = cache / f"{digest_of(document)}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bytes", "--run", folder],
            input=json.dumps(document),
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"},
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(result).encode())
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


def _arms(presets: Sequence[str], knobs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The dense arm, and one for each preset."""
    arms = {p: {"kind": "prunecast", "preset": p, "policy": knobs} for p in presets}
    return {"dense": {"kind": "dense"}, **arms}


def _rows(arguments: argparse.Namespace, knobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    jobs = [
        (kind, name, seed, scenario(kind, arguments.rounds, seed, arm))
        for kind in arguments.kinds
        for seed in arguments.seeds
        for name, arm in _arms(arguments.presets, knobs).items()
    ]
    with ThreadPoolExecutor(arguments.processes) as pool:
        runs = pool.map(lambda job: _in_process(job[3], arguments.cache), jobs)
        reached: dict[tuple[str, int], float] = {}
        for (kind, name, seed, _), result in zip(jobs, runs, strict=True):
            accuracy = _accuracy(result)
            if name == "dense":
                reached[kind, seed] = accuracy
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
                "account": result.get("account", []),
                "curve": [
                    [r["round"], r["accuracy"], r["sparsity"], r["bytes_down"], r["bytes_up"]]
                    for r in result["rounds"]
                ],
            }


def _line(row: Mapping[str, Any]) -> str:
    envelopes = sum(part["envelope"] for part in row["account"])
    share = f"{envelopes / (row['bytes_down'] + row['bytes_up']):10.1%}" if envelopes else ""
    return (
        f"{row['kind']:14} {row['preset']:10} {row['seed']:4} {row['ratio']:6.1f} "
        f"{row['accuracy']:9.2f} {row['against_dense']:+8.2f} {row['bytes_down']:10,} "
        f"{row['bytes_up']:10,} {share}"
    ).rstrip()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="one small kind, three rounds, one seed")
    add("--full", action="store_true", help="all kinds, 50 rounds, three seeds")
    add("--kinds", nargs="+", choices=list(KINDS), help="of model")
    add("--presets", nargs="+", default=["balanced", "small"], help="(default: balanced small)")
    add("--rounds", type=int, metavar="N")
    add("--seeds", type=int, nargs="+", metavar="N")
    add("--set", nargs="+", default=[], metavar="KNOB=VALUE", dest="knobs", help="in all presets")
    add("--processes", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    add(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "prunecast-dense",
        metavar="FOLDER",
        help="where finished runs are kept",
    )
    add("--wire", action="store_true", help="measure a short run on a SuperLink, too")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--chart", type=Path, metavar="FILE", help="draw it, as a PNG; needs matplotlib")
    add("--run", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.smoke and chosen.full:
        parser.error("choose --smoke or --full")
    named = (chosen.kinds, chosen.rounds, chosen.seeds)
    if not (chosen.smoke or chosen.full or any(named) or chosen.run):
        parser.error(
            "choose --smoke (a minute or two) or --full (hours), or kinds, rounds or seeds"
        )
    for name, value in (_SMOKE if chosen.smoke else _FULL).items():
        if not getattr(chosen, name):
            setattr(chosen, name, value)
    return chosen


def main() -> int:
    """Entry point."""
    arguments = _arguments()
    if arguments.run is not None:
        print(json.dumps(train(json.load(sys.stdin), arguments.run)))
        return 0
    try:
        path = images_file()
        examples = "1,000 held-out images" if path is None else f"{len(read_images(path)):,} images"
    except DataMissing as error:
        raise SystemExit(f"bytes.py: {error}") from error
    knobs = {k: _value(v) for k, _, v in (knob.partition("=") for knob in arguments.knobs)}
    print(f"accuracy on {examples}{f' of {path}' if path else ''}")
    print(_HEAD, flush=True)
    rows = []
    for row in _rows(arguments, knobs):
        rows.append(row)
        print(_line(row), flush=True)
    entries = summary(rows)
    print()
    print("\n".join(tables(entries)))
    wire = _wired(arguments, knobs) if arguments.wire else []
    if arguments.json:
        from benchmarks.harness.report import machine

        document = {
            "machine": machine(),
            "knobs": knobs,
            "examples": examples,
            "summary": entries,
            "rows": rows,
            "wire": wire,
        }
        write_atomically(arguments.json, (json.dumps(document, indent=1) + "\n").encode())
    if arguments.chart:
        draw_curves(rows, entries, arguments.chart)
    return 0


def _wired(arguments: argparse.Namespace, knobs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first kind on a real SuperLink, with its table."""
    from benchmarks.harness.wire import NODES, measure_wire, wire_table

    rounds = min(arguments.rounds, _WIRE_ROUNDS)
    arms = _arms(arguments.presets, knobs)
    print(f"\n{NODES} SuperNodes and a SuperLink, {rounds} rounds: bytes on the wire\n", flush=True)
    found = measure_wire(arguments.kinds[0], rounds, arguments.seeds[0], arms)
    print("\n".join(wire_table(found)))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
