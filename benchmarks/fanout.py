"""What it costs a server to bring one update to many devices: full files against patches.

    python benchmarks/fanout.py [--devices N] [--runs N] [--tls] [--server WORD]
                                [--quick] [--json FILE]

One run per line of the table: all devices connect at once over loopback and fetch the file, each
over a connection of its own; for patches --rounds times one after the other, so that there is
something to measure. Files: the model as one fp32 .onnx file (11 MB), the keyframe and the patch
of a release of the same weights. Servers: `prunecast serve` and, where it is installed, nginx with
deploy/nginx/prunecast.conf. A warm-up precedes the runs of a line; stated are the best and the
median. CPU time is that of the server and its children, from /proc, and includes what the kernel
does for it; on loopback that is also the receiving side of TCP. Devices are other processes on the
same cores: their CPU time is not counted, but it is in the wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopback.certificates import loopback_certificate
from loopback.content import File, content
from loopback.costs import HEAD, Row, Run, line, summary, totals
from loopback.devices import Order, fetch_all
from loopback.servers import Server, cpu_seconds, servers


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, default=500, help="that fetch at the same time (default: 500)")
    add("--processes", type=int, default=2, help="that hold the devices (default: 2)")
    add("--runs", type=int, default=5, help="counted runs of a line (default: 5)")
    add("--rounds", type=int, default=10, help="patches that a device fetches (default: 10)")
    add("--width", type=int, default=1536, help="of the two hidden layers (default: 1536)")
    add("--seed", type=int, default=0, help="of weights (default: 0)")
    add("--tls", action="store_true", help="measure over TLS, too")
    add("--server", default="", metavar="WORD", help="only servers whose name contains this")
    add("--quick", action="store_true", help="20 devices, one run, a small model: does it work?")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.devices, chosen.runs, chosen.rounds, chosen.width = 20, 1, 2, 256
        chosen.processes = 1
    return chosen


def measure(
    server: Server, file: File, rounds: int, authority: Path | None, options: argparse.Namespace
) -> list[Run]:
    """The counted runs of one line, after a warm-up."""
    order = Order(
        server.port,
        file.path,
        file.length,
        file.sha256,
        options.devices,
        rounds,
        str(authority) if authority else None,
    )
    runs = []
    for _ in range(options.runs + 1):
        before = cpu_seconds(server.pid)
        wall, took = fetch_all(order, options.processes)
        cpu = cpu_seconds(server.pid) - before
        runs.append(Run(file.length * len(took), cpu, wall, took))
    return runs[1:]


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure every server with every file and print as it goes."""
    from harness.report import machine

    repository = scratch / "repository"
    files = content(repository, options.width, options.seed)
    for name, file in files.items():
        print(f"{name}: {file.length:,} bytes")
    pair = loopback_certificate(scratch) if options.tls else None
    rows: list[Row] = []
    absent: dict[str, str] = {}
    print(f"\n{options.devices} devices, {options.runs} runs each\n{HEAD}")
    for tls in (None, pair) if pair else (None,):
        found, missing = servers(tls)
        absent |= missing
        for name, start in found.items():
            if options.server not in name:
                continue
            folder = scratch / name.replace(" ", "-")
            folder.mkdir()
            with start(repository, folder) as server:
                for kind, file in files.items():
                    rounds = 1 if kind == "model" else options.rounds
                    authority = tls[0] if tls else None
                    runs = measure(server, file, rounds, authority, options)
                    rows.append(summary(name, kind, file.length, runs))
                    print(line(rows[-1]), flush=True)
    for name, remedy in absent.items():
        print(f"{name}: absent ({remedy})", file=sys.stderr)
    return {
        "machine": {**machine(), "cores_usable": len(os.sched_getaffinity(0))},
        "devices": options.devices,
        "processes": options.processes,
        "rounds": options.rounds,
        "absent": absent,
        "files": {name: asdict(file) for name, file in files.items()},
        "rows": [asdict(row) for row in rows],
        "one_update": totals(rows, options.devices),
    }


def main() -> None:
    """Measure, report."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, Path(scratch))
    print("\none update of all devices")
    for name, cost in report["one_update"].items():
        print(f"  {name:32}{cost['bytes'] / 1e6:12,.1f} MB{cost['cpu_seconds']:9.3f} CPU s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
