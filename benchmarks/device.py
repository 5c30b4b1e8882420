"""What an agent costs its device: a start, memory, disk, and a request through the endpoint.

    python benchmarks/device.py [--repeat N] [--requests N] [--seed N] [--json FILE]

A convolutional network of 2.3 million parameters with drawn weights (8 bits, 90 % zero) is
released, installed once as signed and once with `--optimise`, and then started again and again,
each time in a process of its own with one thread, without any network. A start is everything from
the state folder to a session that has passed its self-test. Requests come from another process
over a Unix socket. Times are CPU milliseconds of the agent's process, the least of all starts and
the mean of all requests; memory is what the resident set grows by, at its peak while starting and
after inferences. Printed: a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SIDE, BATCH = 28, 1
CHANNELS = (1, 64, 64, 128, 128, 256, 256, 256, 256, 10)  # of a chain of convolutions
_WARM = 20


def network() -> Any:
    """The graph without weights: 3 x 3 convolutions, ReLU between them, and the mean of each map.

    Every second one halves the sides as long as they are even.
    """
    from onnx import TensorProto, helper

    from prunecast.compression.codec import TensorSpec
    from prunecast.compression.onnx.graph import ExportedGraph

    nodes, parameters, at, side = [], {}, "input", SIDE
    for layer, (came, goes) in enumerate(pairwise(CHANNELS)):
        stride = 2 if layer % 2 and side % 2 == 0 else 1
        side //= stride
        names = [at, f"w{layer}", f"b{layer}"]
        more = {"pads": [1, 1, 1, 1], "strides": [stride, stride]}
        nodes.append(helper.make_node("Conv", names, [f"c{layer}"], **more))
        at = f"r{layer}"
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [at]))
        parameters[f"w{layer}"] = TensorSpec(np.dtype(np.float32), (goes, came, 3, 3))
        parameters[f"b{layer}"] = TensorSpec(np.dtype(np.float32), (goes,))
    nodes += [
        helper.make_node("GlobalAveragePool", [at], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["output"]),
    ]
    shapes = {"input": ["batch", 1, SIDE, SIDE], "output": ["batch", CHANNELS[-1]]}
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    body = helper.make_graph(nodes, "device", ends[:1], ends[1:])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ExportedGraph(proto.SerializeToString(), parameters)


def weights(parameters: Any, seed: int) -> Any:
    """Drawn weights on a lattice of 8 bits, 90 % of them zero."""
    from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor

    rng, tensors = np.random.default_rng(seed), {}
    for name, spec in parameters.items():
        if len(spec.shape) == 1:
            tensors[name] = RawTensor(np.full(spec.shape, 0.01, np.float32))
            continue
        q = rng.integers(-60, 61, spec.shape) * (rng.random(spec.shape) < 0.1)
        step = float(np.float32(0.12 / np.sqrt(np.prod(spec.shape[1:]))))
        tensors[name] = LatticeTensor(q.astype(np.int32), step, pruned=True)
    return PublishedModel(tensors, 1)


def install(folder: Path, seed: int) -> int:
    """Publish the network and install it as signed and optimised; returns its parameters."""
    from prunecast.client.edge import Agent, AgentConfig
    from prunecast.server.repository import KeyRing, Repository
    from prunecast.server.repository.authoring import ReleaseContents
    from prunecast.server.repository.serving import ReleaseServer

    graph = network()
    model = weights(graph.parameters, seed)
    repository = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    samples = np.random.default_rng(seed).standard_normal((4, 1, SIDE, SIDE)).astype(np.float32)
    repository.publish("device", ReleaseContents(model, graph, samples))
    with ReleaseServer(repository.path) as server:
        for optimise in (False, True):
            state = folder / str(optimise)
            root = repository.trusted_root()
            config = AgentConfig(state, server.url, "device", root, threads=1, optimise=optimise)
            with Agent(config) as agent:
                agent.update_once()
                agent.confirm()
                assert bool(agent.model.current().seal) == optimise
    return sum(tensor.dense().size for tensor in model.tensors.values())


def start(state: Path, optimise: bool, requests: int) -> dict[str, float]:
    """Start an agent in this process and measure it."""
    import onnxruntime

    from prunecast.client.edge import Agent, AgentConfig
    from prunecast.client.edge.inference import InferenceServer

    onnxruntime.SessionOptions()  # loads what is loaded lazily
    image = np.zeros((BATCH, 1, SIDE, SIDE), np.float32)
    before, begun = _status("VmRSS"), time.process_time()
    config = AgentConfig(state, "http://none.invalid/", "device", b"", threads=1, optimise=optimise)
    with Agent(config) as agent:
        found = {"start_ms": 1e3 * (time.process_time() - begun)}
        found["peak_mb"] = (_status("VmHWM") - before) / 1e6
        assert bool(agent.model.current().seal) == optimise
        for _ in range(_WARM):
            agent.model.infer({"input": image})
        found["held_mb"] = (_status("VmRSS") - before) / 1e6
        if requests:
            begun = time.process_time()
            for _ in range(requests):
                agent.model.infer({"input": image})
            found["call_ms"] = 1e3 * (time.process_time() - begun) / requests
            path = f"{state}/socket"
            with InferenceServer(agent.model, "device", f"unix:{path}"):
                for kind in ("binary", "json"):
                    begun = time.process_time()
                    _self("--ask", path, kind, requests)
                    found[f"{kind}_ms"] = 1e3 * (time.process_time() - begun) / requests
    return found


def ask(path: str, kind: str, requests: int) -> None:
    """Send requests over a Unix socket, one after the other."""
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(path)
    image = np.zeros((BATCH, 1, SIDE, SIDE), np.float32)
    tensor = {"name": "input", "shape": list(image.shape), "datatype": "FP32"}
    extra: dict[str, Any] = {"parameters": {"binary_data_size": image.nbytes}}
    if kind == "json":
        extra = {"data": image.ravel().tolist()}
    document: dict[str, Any] = {"inputs": [{**tensor, **extra}]}
    if kind == "binary":
        document["parameters"] = {"binary_data_output": True}
    body, headers = json.dumps(document).encode(), {}
    if kind == "binary":
        headers["Inference-Header-Content-Length"] = str(len(body))
        body += image.tobytes()
    for _ in range(requests):
        connection.request("POST", "/v2/models/device/infer", body, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith(key + ":"))


def _self(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(repeat: int, requests: int, seed: int) -> dict[str, Any]:
    """Measure both and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = install(folder, seed)
        rows = {}
        print(f"{parameters:,} parameters\n")
        print(f"  {'':12}{'disk MB':>9}{'start ms':>10}{'peak MB':>9}{'held MB':>9}", end="")
        print(f"{'call ms':>9}{'binary ms':>11}{'JSON ms':>9}")
        for label, optimise in (("signed", False), ("optimised", True)):
            state = folder / str(optimise)
            slot = state / "slots" / "a"
            disk = sum(path.stat().st_size for path in slot.rglob("*") if path.is_file()) / 1e6
            found = [
                json.loads(_self("--start", state, int(optimise), requests if n == 0 else 0))
                for n in range(repeat)
            ]
            best = {key: min(f[key] for f in found if key in f) for key in found[0]}
            rows[label] = {"disk_mb": disk, **best}
            print(
                f"  {label:12}{disk:9.1f}{best['start_ms']:10.1f}{best['peak_mb']:9.1f}"
                f"{best['held_mb']:9.1f}{best['call_ms']:9.2f}{best['binary_ms']:11.2f}"
                f"{best['json_ms']:9.2f}"
            )
    return {"parameters": parameters, "seed": seed, **rows}


def main() -> None:
    """Measure, or do one part in a process of its own."""
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps(start(Path(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))))
        return
    if sys.argv[1:2] == ["--ask"]:
        ask(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--repeat", type=int, default=5, help="starts of each (default: 5)")
    add("--requests", type=int, default=500, help="requests of each kind (default: 500)")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    chosen = parser.parse_args()
    found = run(chosen.repeat, chosen.requests, chosen.seed)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
