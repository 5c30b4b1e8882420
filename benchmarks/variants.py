"""The variants of a release in onnxruntime: size, load, memory, latency, and how far they differ.

    python benchmarks/variants.py [--data DIR] [--seed N] [--repeat N] [--json FILE]

The model is the pruned ResNet of benchmarks/patches.py, exported once. Every figure comes from a
process of its own with one thread: CPU milliseconds to load, the least of several processes;
what the resident set grows by, at its peak while loading and afterwards; CPU milliseconds of one
image, the median of 200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["run"]

_RUNS = 200
_FOLDED = "lattice, folded at load"
_KEPT = "lattice, dequantised at run"


def export(rounds_file: Path, target: Path) -> None:
    """Write the pruned network with its weights as one ``.onnx`` file."""
    import torch
    from delivery import rounds
    from harness.training.networks import ResNet

    weights = rounds.load(rounds_file)[rounds.CASES[1]][0]
    module = ResNet().eval()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    example = torch.zeros(2, 1, 28, 28)
    program = torch.onnx.export(
        module, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},)
    )
    assert program is not None
    part = target.with_suffix(".part")
    program.save(part, external_data=False)
    os.replace(part, target)


def one(file: Path, kept: bool) -> dict[str, float]:
    """Load a model in this process and measure it."""
    import numpy as np
    import onnxruntime

    onnxruntime.SessionOptions()  # loads what is loaded lazily
    before = _status("VmRSS")
    start = time.process_time()
    session = _session(file, kept)
    load = time.process_time() - start
    peak, held = _status("VmHWM") - before, _status("VmRSS") - before
    image = {session.get_inputs()[0].name: np.zeros((1, 1, 28, 28), np.float32)}
    times = []
    for _ in range(_RUNS):
        start = time.process_time()
        session.run(None, image)
        times.append(time.process_time() - start)
    return {
        "load_ms": 1e3 * load,
        "peak_mb": peak / 1e6,
        "held_mb": held / 1e6,
        "latency_ms": 1e3 * float(np.median(times)),
    }


def _session(file: Path, kept: bool) -> Any:
    """A session with one thread; dequantised while loading, as `open_session` does, or kept."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not kept:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith(key + ":"))


def run(rounds_file: Path, repeat: int) -> list[dict[str, Any]]:
    """Build every variant, measure each in processes of its own, and print a table."""
    model = rounds_file.with_suffix(".onnx")
    if not model.is_file():
        print(f"exporting once, into {model}", file=sys.stderr)
        _self("--export", rounds_file, model)
    rows = []
    print(
        f"\n  {'variant':30}{'file bytes':>12}{'load ms':>9}{'peak MB':>9}{'held MB':>9}"
        f"{'ms/image':>10}{'difference':>12}"
    )
    with tempfile.TemporaryDirectory() as name:
        for label, file, size, kept, difference in _variants(model, Path(name)):
            found = [
                json.loads(_self("--one", file, "kept" if kept else "")) for _ in range(repeat)
            ]
            best = {key: min(f[key] for f in found) for key in found[0]}
            rows.append({"variant": label, "bytes": size, **best, "difference": difference})
            print(
                f"  {label:30}{size:12,}{best['load_ms']:9.1f}{best['peak_mb']:9.1f}"
                f"{best['held_mb']:9.1f}{best['latency_ms']:10.3f}{difference:12.2g}",
                flush=True,
            )
    return rows


def _variants(model: Path, folder: Path) -> list[tuple[str, Path, int, bool, float]]:
    """Label, file, bytes, whether dequantised at run, relative difference to the original."""
    import numpy as np

    from prunecast.compression.onnx import bind_weights, lift_model, open_session, save_single_file
    from prunecast.compression.onnx.compare import differ, draw_inputs
    from prunecast.compression.onnx.lattice import snap

    lifted = lift_model(model)
    exact = snap(lifted.arrays, lifted.kernels, bits=None)
    snapped = snap(lifted.arrays, lifted.kernels, bits=8)
    original = open_session(model, threads=1)
    inputs = draw_inputs(original, 0)
    inputs = {k: np.repeat(v, 8, axis=0) for k, v in inputs.items()}
    wanted = original.run(inputs)
    fp32 = bind_weights(lifted.graph, exact, folder / "fp32", variant="fp32")
    lattice = bind_weights(lifted.graph, snapped, folder / "lattice")
    single = folder / "fp32.onnx"
    save_single_file(lifted.graph, exact, single)
    small = folder / "lattice.onnx"
    save_single_file(lifted.graph, snapped, small, variant="lattice")

    def size(*files: Path) -> int:
        return sum(file.stat().st_size for file in files)

    def far(file: Path, kept: bool = False) -> float:
        found = _session(file, kept).run(None, inputs)
        return differ(wanted, dict(zip(wanted, found, strict=True))).relative

    return [
        ("fp32, one file", single, size(single), False, far(single)),
        ("fp32, weights.bin", fp32.model, size(fp32.model, fp32.weights), False, far(fp32.model)),
        ("lattice, one file", small, size(small), False, far(small)),
        *(
            (
                label,
                lattice.model,
                size(lattice.model, lattice.weights),
                kept,
                far(lattice.model, kept),
            )
            for label, kept in ((_FOLDED, False), (_KEPT, True))
        ),
    ]


def _self(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure, or do one part in a process of its own."""
    if sys.argv[1:2] == ["--export"]:
        export(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(Path(sys.argv[2]), bool(sys.argv[3]))))
        return
    from delivery.rounds import default_folder
    from harness.report import machine
    from patches import trained

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=default_folder(), help="folder of trained rounds")
    add("--seed", type=int, default=0, help="of the trained rounds (default: 0)")
    add("--repeat", type=int, default=5, help="processes of each variant (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    chosen = parser.parse_args()
    rows = run(trained(chosen.data, chosen.seed), chosen.repeat)
    if chosen.json:
        text = json.dumps({"machine": machine(), "variants": rows}, indent=1)
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
