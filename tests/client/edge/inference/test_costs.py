"""What requests may cost in time and memory, with models that cost much."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest

from prunecast.client.edge import EdgeModel
from prunecast.client.edge.inference import EndpointLimits, InferenceServer
from prunecast.client.edge.slots.slot import LoadedRelease
from prunecast.compression.release.runtime import open_session
from support import endless, foreign

INFER = "/v2/models/toy/infer"
Serve = Callable[..., InferenceServer]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """A function: serves a model with 64 MiB for inferences."""

    def serve(model: onnx.ModelProto, **limits: float) -> InferenceServer:
        manifest = endless.make_slot(tmp_path, model)
        session = open_session(tmp_path / "model.onnx", threads=1, memory=64 << 20)
        loaded = LoadedRelease(manifest, session, 0.0)
        given = EndpointLimits(**limits)  # type: ignore[arg-type]
        return InferenceServer(EdgeModel(loaded), "toy", "127.0.0.1:0", limits=given)

    return serve


def request(rows: int, *, binary: bool = True) -> tuple[bytes, dict[str, str]]:
    """Body and headers that ask for so many rows of ones."""
    document = {
        "inputs": [
            {
                "name": "x",
                "shape": [rows, 4],
                "datatype": "FP32",
                "parameters": {"binary_data_size": rows * 16},
            }
        ],
        "parameters": {"binary_data_output": binary},
    }
    head = json.dumps(document).encode()
    size = {"Inference-Header-Content-Length": str(len(head))}
    return head + np.ones((rows, 4), "<f4").tobytes(), size


def ask(server: InferenceServer, rows: int, *, binary: bool = True) -> tuple[int, bytes]:
    return send(server, *request(rows, binary=binary))


def send(server: InferenceServer, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    connection.request("POST", INFER, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def health(server: InferenceServer) -> int:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    connection.request("GET", "/v2/health/live")
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("make", [endless.endless, endless.endless_in_function])
def test_an_inference_that_never_ends_is_answered(make, serve: Serve) -> None:
    with serve(make(), inference_seconds=0.3) as server:
        found: list[tuple[int, bytes]] = []
        asking = threading.Thread(target=lambda: found.append(ask(server, 3)))
        asking.start()
        assert health(server) == 200
        asking.join(60)
    assert [status for status, _ in found] == [504]
    assert b"did not end within 0.3 seconds" in found[0][1]


def test_the_endpoint_ends_an_inference_when_it_ends(serve: Serve) -> None:
    server = serve(endless.endless(), inference_seconds=600.0, closing_seconds=0.3)
    found: list[tuple[int, bytes]] = []

    def never() -> None:
        with suppress(OSError, http.client.HTTPException):  # it may be broken off
            found.append(ask(server, 3))

    asking = threading.Thread(target=never)
    asking.start()
    while server.protocol.running == 0:
        time.sleep(0.002)
    server.close()
    asking.join(60)
    assert not asking.is_alive()
    assert server.protocol.running == 0
    assert [status for status, _ in found] in ([504], [])


def test_memory_between_input_and_output_is_bounded(serve: Serve) -> None:
    with serve(endless.outer()) as server:
        status, body = ask(server, 8192)  # 128 kB in and out, 256 MiB between them
        assert status == 413
        assert b"it needs more memory than the 67,108,864 bytes that it may take" in body
        assert b"fewer rows" in body
        assert ask(server, 100)[0] == 200


def wide() -> onnx.ModelProto:
    """x[n,4] becomes y[n,1000] of sevenths, which need many digits."""
    weights = foreign.tensor(np.full((4, 1000), 1 / 7, np.float32), "w")
    return foreign.model(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        [foreign.value("x", "n", 4)],
        [foreign.value("y", "n", 1000)],
        [weights],
    )


def summing() -> onnx.ModelProto:
    """x[n,m] becomes y[n,64]; nothing in its signature says how large y is."""
    nodes = [
        onnx.helper.make_node("ReduceSum", ["x", "axis"], ["s"], keepdims=1),
        onnx.helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    return foreign.model(
        nodes,
        [foreign.value("x", "n", "m")],
        [foreign.value("y", "k", 64)],
        [foreign.tensor(np.array([1]), "axis"), foreign.tensor(np.ones((1, 64), "f4"), "w")],
    )


def stretching() -> onnx.ModelProto:
    """x[1] becomes x zeros: a value of four bytes says how many."""
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["count"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("ConstantOfShape", ["count"], ["y"]),
    ]
    return foreign.model(nodes, [foreign.value("x", 1)], [foreign.value("y", "k")], [])


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": [2**22, 0], "parameters": {"binary_data_size": 0}},
        {"shape": [2**22, 0], "data": []},
        {"shape": [2**40, 0], "parameters": {"binary_data_size": 0}},
        {"shape": [0, 2**40], "data": []},
    ],
)
def test_an_empty_tensor_takes_nothing(tensor: dict[str, object], serve: Serve) -> None:
    document = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", **tensor}]}).encode()
    with serve(summing()) as server:
        before = resident()
        status, body = send(
            server, document, {"Inference-Header-Content-Length": str(len(document))}
        )
        assert (status, resident() - before < 32 << 20) == (400, True)
        assert b"empty tensor" in body
        few = document.replace(json.dumps(tensor["shape"]).encode(), b"[3, 0]")
        sizes = {"Inference-Header-Content-Length": str(len(few))}
        assert send(server, few, sizes)[0] == 200


@pytest.mark.parametrize("count", [1e7, 1e8, 1e12])
def test_outputs_that_a_value_makes_large(count: float, serve: Serve) -> None:
    """Beyond the bound of outputs, and beyond the memory that inference may take."""
    document = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [count]}]}
    with serve(stretching(), output_bytes=32 << 20) as server:
        status, body = send(server, json.dumps(document).encode(), {})
        assert status == 413
        assert b"fewer rows" in body
        assert health(server) == 200


def test_large_outputs_are_binary_data(serve: Serve) -> None:
    with serve(wide(), json_output_bytes=1 << 20) as server:
        for rows in (100, 2000):  # found out while encoding, and before
            status, body = ask(server, rows, binary=False)
            assert status == 413
            assert b"as JSON may have 1048576 bytes" in body
            assert b"binary_data_output" in body
            assert ask(server, rows)[0] == 200
        assert ask(server, 10, binary=False)[0] == 200


def test_health_is_answered_while_much_is_encoded(serve: Serve) -> None:
    """Sixteen megabytes of JSON, for as long as that takes."""
    with serve(wide()) as server:
        found: list[tuple[int, bytes]] = []
        asking = threading.Thread(target=lambda: found.append(ask(server, 800, binary=False)))
        asking.start()
        answered = 0
        while asking.is_alive():
            answered += health(server) == 200
        assert [status for status, _ in found] == [200]
        assert len(found[0][1]) > 8 << 20
        assert answered >= 5


def test_idle_connections_leave_room_for_who_asks_at_once(serve: Serve) -> None:
    with serve(wide(), connections=4) as server:
        place = server.address.removeprefix("http://")
        idle = [http.client.HTTPConnection(place, timeout=60) for _ in range(4)]
        for turn in range(2):
            for connection in idle:
                connection.request("GET", "/v2/health/live")
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (200, b'{"live": true}')
            for _ in range(3 - 3 * turn):
                assert health(server) == 200
                assert ask(server, 2)[0] == 200
        for connection in idle:
            connection.close()


def _begin(server: InferenceServer, body: int, sent: int) -> http.client.HTTPConnection:
    """A connection that announces a body, sends some of it and goes silent."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(body))
    connection.endheaders(bytes(sent))
    return connection


def test_memory_is_taken_for_what_has_come(serve: Serve) -> None:
    with serve(wide(), body_bytes=8 << 20, total_bytes=8 << 20) as server:
        silent = [_begin(server, 8 << 20, 0) for _ in range(8)]
        while server.connections < 8:
            time.sleep(0.002)
        assert server.memory.taken == 0
        for connection in silent:
            connection.close()


def test_large_bodies_leave_memory_to_small_ones(serve: Serve) -> None:
    limits = {"body_bytes": 8 << 20, "total_bytes": 8 << 20, "waiting_seconds": 30.0}
    with serve(wide(), **limits) as server:
        large = [_begin(server, 6 << 20, 3 << 20) for _ in range(3)]
        while server.memory.taken < 7 << 20:  # all that large ones may have
            time.sleep(0.002)
        assert ask(server, 100)[0] == 200
        assert server.memory.taken <= 7 << 20
        for connection in large:
            connection.close()


def test_answers_that_nobody_reads_keep_no_memory_from_small_ones(serve: Serve) -> None:
    with serve(wide(), answers_bytes=8 << 20, waiting_seconds=0.2) as server:
        place = server.address.removeprefix("http://")
        slow = http.client.HTTPConnection(place, timeout=60)
        slow.request("POST", INFER, *request(2000))  # 8 MB
        while server.protocol.answers.taken == 0:
            time.sleep(0.002)
        assert ask(server, 2000)[0] == 503
        assert ask(server, 10)[0] == 200
        assert slow.getresponse().status == 200
        slow.close()
        while server.protocol.answers.taken:
            time.sleep(0.002)
        assert ask(server, 2000)[0] == 200


def texts() -> onnx.ModelProto:
    kind = onnx.TensorProto.STRING
    ends = [foreign.value(name, "n", kind=kind) for name in ("x", "y")]
    return foreign.model([onnx.helper.make_node("Identity", ["x"], ["y"])], ends[:1], ends[1:], [])


def test_texts_are_bounded(serve: Serve) -> None:
    """Each takes four bytes to send and dozens to hold."""
    count = (4 << 20) // 4 + 1
    tensor = {
        "name": "x",
        "datatype": "BYTES",
        "shape": [count],
        "parameters": {"binary_data_size": 4 * count},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    with serve(texts()) as server:
        sizes = {"Inference-Header-Content-Length": str(len(head))}
        status, body = send(server, head + bytes(4 * count), sizes)
        assert (status, b"texts may have 4194304 bytes" in body) == (413, True)
        half = {"name": "x", "datatype": "BYTES", "shape": [1], "data": ["\ud800"]}
        assert send(server, json.dumps({"inputs": [half]}).encode(), {})[0] == 400
