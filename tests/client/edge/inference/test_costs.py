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
from support import endless

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
