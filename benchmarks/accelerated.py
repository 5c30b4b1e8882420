"""Speed of the codec in torch on a device, against the codec in numpy, in the same run.

    python benchmarks/accelerated.py [--device cuda] [--case PART ...] [--quick] [--repeat N]
                                     [--json FILE]

Seeded synthetic tensors that are on the device already, where training leaves them. Both codecs
make the same bytes, which is checked, as is that both decode to the tensors. "numpy" is the codec
on arrays of the host; "numpy + copies" also brings the tensors from the device, or the decoded
ones to it. Wall-clock time after a warm-up, with the device synchronised before each reading: the
best and the median of the repetitions. Also how many operations torch executes, which on a GPU
says more than the number of elements. docs/accelerated.md says what to expect.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from prunecast.compression import accelerated, codec
from prunecast.compression.codec import Context

SHAPES = [(64, 147), *[(64, 576)] * 4, *[(128, 1152)] * 4, *[(256, 2304)] * 4, *[(512, 4608)] * 3]
"""Rows and columns of a residual network's convolutions, 10.2 M in all."""
CODERS = ("torch", "numpy", "numpy + copies")


@dataclass(frozen=True)
class Case:
    """Tensors and context.

    Attributes:
        name: what is coded.
        tensors: name to array.
        context: what both sides know.
    """

    name: str
    tensors: dict[str, NDArray[Any]]
    context: Context


class Operations(TorchDispatchMode):
    """Counts what torch executes, views left out: each is a kernel launch or a copy on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Timing:
    """Seconds of one coder on one case: best and median of the repetitions."""

    coder: str
    encode_best: float
    encode_median: float
    decode_best: float
    decode_median: float


def cases(*, quick: bool) -> list[Case]:
    """Tensors as federated rounds have them."""
    rng = np.random.default_rng(20240607)
    shapes = SHAPES[:5] if quick else SHAPES

    def integers(rows: int, columns: int) -> NDArray[np.int32]:
        scale = np.exp(0.7 * rng.normal(size=(rows, 1)) + 0.7 * rng.normal(size=(1, columns)))
        return np.rint(4 * rng.laplace(size=(rows, columns)) * scale).astype(np.int32)

    dense = {f"layer{i}": integers(*shape) for i, shape in enumerate(shapes)}
    masks = {name: rng.random(q.shape) < 0.1 for name, q in dense.items()}
    pruned = {name: (q * masks[name]).astype(np.int32) for name, q in dense.items()}
    update = {
        name: (rng.integers(-2, 3, q.shape) * masks[name] * (rng.random(q.shape) < 0.3)).astype(
            "i4"
        )
        for name, q in dense.items()
    }
    floats = {name: (q * np.float32(0.013)).astype(np.float32) for name, q in dense.items()}
    side = 300 if quick else 3000
    return [
        Case("dense weights", dense, Context()),
        Case("90 % pruned weights", pruned, Context()),
        Case("masked update", update, Context(mask=masks, previous=pruned)),
        Case("floats, lossless", floats, Context()),
        Case("one large tensor", {"w": integers(side, side)}, Context()),
    ]


def timed(run: Callable[[], Any], repeat: int, device: torch.device) -> tuple[float, float]:
    """Best and median seconds."""
    seconds = []
    for _ in range(repeat + 1):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), statistics.median(seconds[1:])  # the first one warms up


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, device: torch.device, repeat: int) -> dict[str, Any]:
    """Check that both codecs agree, and time them."""
    tensors = {name: torch.from_numpy(q).to(device) for name, q in case.tensors.items()}
    known = case.context
    payload = codec.encode(case.tensors, context=known)
    with Operations() as encoding:
        made = accelerated.encode(tensors, device=device, context=known)
    if made != payload:
        raise SystemExit(f"{case.name}: torch makes other bytes than numpy")
    with Operations() as decoding:
        decoded = accelerated.decode(payload, device=device, context=known)
    if any(not torch.equal(decoded[name], tensor) for name, tensor in tensors.items()):
        raise SystemExit(f"{case.name}: torch decodes to other values")

    def copied() -> dict[str, NDArray[Any]]:
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

    def returned() -> dict[str, torch.Tensor]:
        arrays = codec.decode(payload, context=known)
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "torch": (
            lambda: accelerated.encode(tensors, device=device, context=known),
            lambda: accelerated.decode(payload, device=device, context=known),
        ),
        "numpy": (
            lambda: codec.encode(case.tensors, context=known),
            lambda: codec.decode(payload, context=known),
        ),
        "numpy + copies": (lambda: codec.encode(copied(), context=known), returned),
    }
    timings = [
        Timing(name, *timed(encode, repeat, device), *timed(decode, repeat, device))
        for name, (encode, decode) in runs.items()
    ]
    return {
        "name": case.name,
        "elements": sum(q.size for q in case.tensors.values()),
        "tensor_bytes": sum(q.nbytes for q in case.tensors.values()),
        "payload_bytes": len(payload),
        "operations": {"encode": encoding.count, "decode": decoding.count},
        "timings": [asdict(timing) for timing in timings],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "torch", "prunecast")},
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs="+", default=[], metavar="PART")
    parser.add_argument("--quick", action="store_true", help="small tensors")
    parser.add_argument("--repeat", type=int, default=5, help="timed repetitions (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    report: dict[str, Any] = {"environment": environment(device), "cases": []}
    print(f"{'case':22}{'coder':16}{'encode':>10}{'MB/s':>8}{'decode':>10}{'MB/s':>8}")
    for case in cases(quick=chosen.quick):
        if chosen.case and not any(part in case.name for part in chosen.case):
            continue
        found = measure(case, device, chosen.repeat)
        report["cases"].append(found)
        counts = found["operations"]
        print(f"{case.name:22}torch executes {counts['encode']} and {counts['decode']} operations")
        megabytes = found["tensor_bytes"] / 1e6
        for timing in found["timings"]:
            line = f"{case.name:22}{timing['coder']:16}"
            for part in ("encode_median", "decode_median"):
                line += f"{1e3 * timing[part]:7.1f} ms{megabytes / timing[part]:8.0f}"
            print(line)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
