"""Latency of inference on a device while releases are swapped under it, against quiet times.

    python benchmarks/swaps.py [--swaps N] [--threads N] [--width N] [--quiet SECONDS]
                               [--endpoint] [--seed N] [--json FILE]

One process: a release server on loopback, an agent, and threads that infer without pause; with
--endpoint, other processes that send requests over a Unix socket instead. All
releases are published beforehand and shown one after the other. A request counts as *during* when
it overlaps an update, from the first byte of metadata to the swap; otherwise as *quiet*. Every
answer is compared with the outputs of the release that it reports. Printed: JSON; latencies in ms
by the wall clock, so they depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.inference import InferenceServer
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import ReleaseContents
from prunecast.server.repository.serving import ReleaseServer

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
    add("--threads", type=int, default=4, help="threads or processes that infer (default: 4)")
    add("--width", type=int, default=1024, help="of the two hidden layers (default: 1024)")
    add("--quiet", type=float, default=0.5, help="seconds before every update (default: 0.5)")
    add("--endpoint", action="store_true", help="ask over a Unix socket instead of by calls")
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


class Client:
    """Asks an endpoint over a Unix socket, with binary tensors."""

    def __init__(self, path: str) -> None:
        self._connection = http.client.HTTPConnection("localhost")
        self._connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.sock.connect(path)

    def infer(self, image: np.ndarray) -> tuple[int, np.ndarray]:
        """The release that answered, and its outputs."""
        described = {"name": "input", "shape": list(image.shape), "datatype": "FP32"}
        inputs = [{**described, "parameters": {"binary_data_size": image.nbytes}}]
        document = {"inputs": inputs, "parameters": {"binary_data_output": True}}
        text = json.dumps(document).encode()
        length = "Inference-Header-Content-Length"
        headers = {length: str(len(text))}
        self._connection.request("POST", "/v2/models/swaps/infer", text + image.tobytes(), headers)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(body.decode())
        at = int(answer.headers[length])
        return int(json.loads(body[:at])["model_version"]), np.frombuffer(body[at:], "<f4")


def images(seed: int) -> np.ndarray:
    """What is asked."""
    return np.random.default_rng(seed).standard_normal((8, INPUTS)).astype(np.float32)


def collect(
    infer: Callable[[np.ndarray], tuple[int, np.ndarray]],
    seed: int,
    thread: int,
    stop: threading.Event,
) -> tuple[list[Row], list[str]]:
    """Ask without pause until `stop`: what was answered, and errors."""
    x, rng = images(seed), np.random.default_rng(thread)
    rows: list[Row] = []
    failed: list[str] = []
    while not stop.is_set():
        which = int(rng.integers(len(x)))
        begun = time.perf_counter()
        try:
            version, answer = infer(x[which : which + BATCH])
        except Exception as error:
            failed.append(str(error))
            continue
        rows.append((begun, time.perf_counter() - begun, which, version, answer))
    return rows, failed


def other_process(
    path: str, seed: int, thread: int, stop: threading.Event
) -> tuple[list[Row], list[str]]:
    """`collect` in another process, whose clock is the same one."""
    file = f"{path}.{thread}.npz"
    command = [sys.executable, __file__, "--client", path, str(seed), str(thread), file]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    stop.wait()
    process.communicate()
    assert process.returncode == 0
    found = np.load(file)
    columns = [found[name].tolist() for name in ("begun", "took", "which", "version")]
    return list(zip(*columns, found["answers"], strict=True)), found["failed"].tolist()


def client(path: str, seed: int, thread: int, file: str) -> None:
    """Ask until standard input ends, and write what came."""
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    rows, failed = collect(Client(path).infer, seed, thread, stop)
    names = ("begun", "took", "which", "version", "answers")
    columns = {name: np.array([row[n] for row in rows]) for n, name in enumerate(names)}
    np.savez(file, failed=np.array(failed, dtype=str), **columns)


class Shelf:
    """Publishes every release at once and shows them one after the other."""

    def __init__(self, folder: Path, made: list[PublishedModel], width: int, x: np.ndarray) -> None:
        self.repository = Repository.create(folder, KeyRing.create(folder.with_name("keys")))
        self._timestamp = folder / "metadata" / "timestamp.json"
        architecture, self._states = graph(width), []
        self.repository.window = 2
        for model in made:
            self.repository.publish("swaps", ReleaseContents(model, architecture, x))
            self._states.append(self._timestamp.read_bytes())

    def show(self, release: int) -> None:
        """Make this release the newest one that can be seen."""
        fresh = self._timestamp.with_suffix(".new")
        fresh.write_bytes(self._states[release - 1])
        fresh.replace(self._timestamp)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark."""
    x = images(options.seed)
    made = models(options.swaps + 1, options.width, options.seed)
    expected = np.array([outputs(model, x) for model in made])
    stop = threading.Event()
    apart = float(np.abs(np.diff(expected, axis=0)).max(axis=2).min())
    assert apart > 10 * TOLERANCE, "two releases answer alike: a mixture would not be seen"
    rows: list[Row] = []
    failed: list[str] = []

    with tempfile.TemporaryDirectory() as scratch:
        shelf = Shelf(Path(scratch) / "repository", made, options.width, x)
        shelf.show(1)
        root = shelf.repository.trusted_root()
        with ReleaseServer(shelf.repository.path) as server:
            config = AgentConfig(Path(scratch) / "state", server.url, "swaps", root, threads=1)
            path = f"{scratch}/socket"
            with Agent(config) as agent, InferenceServer(agent.model, "swaps", f"unix:{path}"):
                agent.update_once()
                agent.confirm()

                def call(image: np.ndarray) -> tuple[int, np.ndarray]:
                    got = agent.model.infer({"input": image})
                    return got.version, got.outputs["output"][0]

                def ask(thread: int) -> None:
                    if options.endpoint:
                        answered, refused = other_process(path, options.seed, thread, stop)
                    else:
                        answered, refused = collect(call, options.seed, thread, stop)
                    rows.extend(answered)
                    failed.extend(refused)

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

    during = [any(b < end and b + t > begun for begun, end in updates) for b, t, *_ in rows]
    mixed = sum(
        np.abs(expected[version - 1, which] - found).max() > TOLERANCE
        for _, _, which, version, found in rows
    )
    times = np.array([row[1] for row in rows])
    return {
        "swaps": len(updates),
        "requests": len(rows),
        "failed": len(failed),
        "answers_of_another_version": int(mixed),
        "versions_served": len({row[3] for row in rows}),
        "parameters": sum(tensor.dense().size for tensor in made[0].tensors.values()),
        "threads": options.threads,
        "endpoint": options.endpoint,
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
    if sys.argv[1:2] == ["--client"]:
        client(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    options = arguments()
    text = json.dumps(measure(options), indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
