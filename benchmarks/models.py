"""Train the small models whose tensors `benchmarks/codec.py` measures.

    python benchmarks/models.py [--out DIR] [--only MODEL ...] [--seed N] [--jobs N]

Needs torch and mlxtend (`pip install 'prunecast[sim]'`), no network and no GPU; two cores need
a few minutes. Every model is trained by federated averaging with four clients, first dense, then
on a lattice while magnitude pruning takes 90 % of it (docs/benchmarks.md says what is kept).
The same seed, torch version and kind of processor give the same tensors.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import store


def train_one(folder: Path, name: str, seed: int) -> None:
    """Train one model and save its tensors."""
    import torch
    from harness.training.federated import train
    from harness.training.tasks import TASKS

    torch.set_num_threads(1)  # how sums are split changes their last bits
    torch.use_deterministic_algorithms(True)
    begun = time.perf_counter()

    def report(what: str, score: float) -> None:
        clock = time.perf_counter() - begun
        print(f"{name:12} {clock:5.0f} s  {what:34} score {score:.3f}", file=sys.stderr, flush=True)

    path = store.save(folder, name, train(TASKS[name](), seed, report))
    print(f"{name:12} {path} {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr, flush=True)


def train_all(folder: Path, models: list[str], seed: int = 0, jobs: int | None = None) -> None:
    """Train `models`, `jobs` at a time (default: one a core, at most two), a process each.

    Raises:
        RuntimeError: one of them failed; what it printed says why.
    """

    def start(name: str) -> int:
        command = [sys.executable, __file__, "--out", str(folder), "--seed", str(seed)]
        return subprocess.run([*command, "--only", name], check=False).returncode

    # the longest first, so that no core is left with it at the end
    order = sorted(models, key=store.MODELS.index, reverse=True)
    with ThreadPoolExecutor(jobs or min(2, os.cpu_count() or 1)) as pool:
        failed = [n for n, code in zip(order, pool.map(start, order), strict=True) if code]
    if failed:
        raise RuntimeError(f"training failed for {', '.join(failed)}")


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=store.default_folder(), help="folder (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=store.MODELS, default=list(store.MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, help="models at a time (default: cores, at most 2)")
    arguments = parser.parse_args()
    if len(arguments.only) == 1:
        train_one(arguments.out, arguments.only[0], arguments.seed)
    else:
        train_all(arguments.out, arguments.only, arguments.seed, arguments.jobs)


if __name__ == "__main__":
    main()
