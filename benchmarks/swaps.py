"""Latency of inference on a device while releases are swapped under it, against quiet times.

    python benchmarks/swaps.py [--swaps N] [--threads N] [--width N] [--quiet SECONDS]
                               [--seed N] [--json FILE]

One process: a release server on loopback, an agent, and threads that infer without pause. All
releases are published beforehand and shown one after the other. A request counts as *during* when
it overlaps an update, from the first byte of metadata to the swap; otherwise as *quiet*. Every
answer is compared with the outputs of the release that it reports. Printed: JSON; latencies in ms
by the wall clock, so they depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from prunecast.client.edge import Agent, AgentConfig
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx import ExportedGraph
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor
from prunecast.server.releases import KeyRing, ReleaseServer, Repository

INPUTS, CLASSES, BATCH = 256, 10, 1
TOLERANCE = 1e-4
Row = tuple[float, float, int, int, np.ndarray]  # begin, seconds, input, release, answer


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--swaps", type=int, default=20, help="releases that are activated (default: 20)")
    add("--threads", type=int, default=4, help="threads that infer (default: 4)")
    add("--width", type=int, default=1024, help="of the two hidden layers (default: 1024)")
    add("--quiet", type=float, default=0.5, help="seconds before every update (default: 0.5)")
    add("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


def widths(width: int) -> list[int]:
    """Units of every layer."""
    return [INPUTS, width, width, CLASSES]


def graph(width: int) -> ExportedGraph:
    """Three linear layers with ReLU between them."""
    units, nodes, parameters, at = widths(width), [], {}, "input"
    for layer in range(3):
        out = "output" if layer == 2 else f"h{layer}"
        gemm = f"{out}.gemm" if layer < 2 else out
        nodes.append(helper.make_node("Gemm", [at, f"w{layer}", f"b{layer}"], [gemm], transB=1))
        if layer < 2:
            nodes.append(helper.make_node("Relu", [gemm], [out]))
        single = np.dtype(np.float32)
        parameters[f"w{layer}"] = TensorSpec(single, (units[layer + 1], units[layer]))
        parameters[f"b{layer}"] = TensorSpec(single, (units[layer + 1],))
        at = out
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("input", INPUTS), ("output", CLASSES))
    ]
    body = helper.make_graph(nodes, "swaps", ends[:1], ends[1:])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ExportedGraph(proto.SerializeToString(), parameters)


def models(count: int, width: int, seed: int) -> list[PublishedModel]:
    """Versions that drift: 3 % of the weights move by a step or two each time, 90 % are zero."""
    rng, units, made = np.random.default_rng(seed), widths(width), []
    shapes = [(units[n + 1], units[n]) for n in range(3)]
    q = [rng.integers(-60, 61, s) * (rng.random(s) < 0.1) for s in shapes]
    for number in range(1, count + 1):
        q = [x + (rng.random(x.shape) < 0.03) * rng.integers(-2, 3, x.shape) * (x != 0) for x in q]
        tensors: dict[str, Any] = {}
        for layer, values in enumerate(q):
            step = float(np.float32(0.1 / np.sqrt(units[layer])))
            tensors[f"w{layer}"] = LatticeTensor(values.astype(np.int32), step, pruned=True)
            tensors[f"b{layer}"] = RawTensor(np.full(units[layer + 1], 0.01, np.float32))
        made.append(PublishedModel(tensors, number))
    return made


def outputs(model: PublishedModel, x: np.ndarray) -> np.ndarray:
    """What a release must answer, in numpy."""
    a = model.arrays()
    for layer in range(3):
        x = x @ a[f"w{layer}"].T + a[f"b{layer}"]
        x = np.maximum(x, 0) if layer < 2 else x
    return x


class Shelf:
    """Publishes every release at once and shows them one after the other."""

    def __init__(self, folder: Path, made: list[PublishedModel], width: int, x: np.ndarray) -> None:
        self.repository = Repository.create(folder, KeyRing.create(folder.with_name("keys")))
        self._timestamp = folder / "metadata" / "timestamp.json"
        architecture, self._states = graph(width), []
        self.repository.window = 2
        for model in made:
            self.repository.publish("swaps", model, architecture, selftest_inputs=x)
            self._states.append(self._timestamp.read_bytes())

    def show(self, release: int) -> None:
        """Make this release the newest one that can be seen."""
        fresh = self._timestamp.with_suffix(".new")
        fresh.write_bytes(self._states[release - 1])
        fresh.replace(self._timestamp)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark."""
    x = np.random.default_rng(options.seed).standard_normal((8, INPUTS)).astype(np.float32)
    made = models(options.swaps + 1, options.width, options.seed)
    expected = np.array([outputs(model, x) for model in made])
    stop = threading.Event()
    apart = float(np.abs(np.diff(expected, axis=0)).max(axis=2).min())
    assert apart > 10 * TOLERANCE, "two releases answer alike: a mixture would not be seen"
    rows: list[list[Row]] = [[] for _ in range(options.threads)]
    failed: list[str] = []

    with tempfile.TemporaryDirectory() as scratch:
        shelf = Shelf(Path(scratch) / "repository", made, options.width, x)
        shelf.show(1)
        root = shelf.repository.trusted_root()
        with ReleaseServer(shelf.repository.path) as server:
            config = AgentConfig(Path(scratch) / "state", server.url, "swaps", root, threads=1)
            with Agent(config) as agent:
                agent.update_once()
                agent.confirm()

                def ask(thread: int) -> None:
                    rng = np.random.default_rng(thread)
                    while not stop.is_set():
                        which = int(rng.integers(len(x)))
                        begun = time.perf_counter()
                        try:
                            got = agent.model.infer({"input": x[which : which + BATCH]})
                        except Exception as error:
                            failed.append(str(error))
                            continue
                        took = time.perf_counter() - begun
                        answer = got.outputs["output"][0]
                        rows[thread].append((begun, took, which, got.version, answer))

                threads = [threading.Thread(target=ask, args=(n,)) for n in range(options.threads)]
                for thread in threads:
                    thread.start()
                updates = []
                for release in range(2, options.swaps + 2):
                    time.sleep(options.quiet)
                    shelf.show(release)
                    begun = time.perf_counter()
                    result = agent.update_once()
                    updates.append((begun, time.perf_counter()))
                    assert result.version == release, result
                    agent.confirm()
                time.sleep(options.quiet)
                stop.set()
                for thread in threads:
                    thread.join()

    answers = [row for thread in rows for row in thread]
    during = [any(b < end and b + t > begun for begun, end in updates) for b, t, *_ in answers]
    mixed = sum(
        np.abs(expected[version - 1, which] - found).max() > TOLERANCE
        for _, _, which, version, found in answers
    )
    times = np.array([row[1] for row in answers])
    return {
        "swaps": len(updates),
        "requests": len(answers),
        "failed": len(failed),
        "answers_of_another_version": int(mixed),
        "versions_served": len({row[3] for row in answers}),
        "parameters": sum(tensor.dense().size for tensor in made[0].tensors.values()),
        "threads": options.threads,
        "quiet_ms": _figures(times[~np.array(during)]),
        "during_ms": _figures(times[np.array(during)]),
        "update_ms": _figures(np.array([end - begun for begun, end in updates])),
        "cpus": os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "seed": options.seed,
    }


def _figures(seconds: np.ndarray) -> dict[str, float]:
    ms = np.sort(seconds) * 1e3
    at = {f"p{q}": round(float(np.percentile(ms, q)), 3) for q in (50, 90, 99)}
    return {"count": len(ms), **at, "max": round(float(ms[-1]), 3)}


def main() -> None:
    """Measure and print."""
    options = arguments()
    text = json.dumps(measure(options), indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
