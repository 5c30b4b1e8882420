"""The endpoint over real sockets: swaps under load, hostile bytes, limits, ending."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import EdgeModel
from prunecast.client.edge.errors import EndpointError
from prunecast.client.edge.inference import EndpointLimits, InferenceServer
from prunecast.client.edge.slots.slot import LoadedRelease
from support.classifier import classifier_inputs
from support.served import classifier_outputs

X = classifier_inputs()
INFER = "/v2/models/toy/infer"
BODY = json.dumps(
    {
        "inputs": [
            {"name": "input", "shape": [4, 12], "datatype": "FP32", "data": X.ravel().tolist()}
        ]
    }
)
LIMITS = EndpointLimits(
    body_bytes=1 << 16,
    connections=8,
    waiting_seconds=0.2,
    request_seconds=0.5,
    idle_seconds=5.0,
    closing_seconds=5.0,
)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


@pytest.fixture
def model(toys: list[LoadedRelease]) -> EdgeModel:
    return EdgeModel(toys[0])


@pytest.fixture
def server(model: EdgeModel) -> Iterator[InferenceServer]:
    with InferenceServer(model, "toy", "127.0.0.1:0", limits=LIMITS) as server:
        yield server


def connect(server: InferenceServer) -> http.client.HTTPConnection:
    if server.address.startswith("unix:"):
        return UnixConnection(Path(server.address.removeprefix("unix:")))
    return http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=20)


def ask(
    connection: http.client.HTTPConnection,
    method: str = "POST",
    path: str = INFER,
    body: str | bytes | None = BODY,
    **headers: str,
) -> tuple[int, bytes]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if method == "POST" else None, given)
    answer = connection.getresponse()
    return answer.status, answer.read()


def say(server: InferenceServer, data: bytes) -> bytes:
    """Send raw bytes, then read all that comes until the server closes."""
    host, _, port = server.address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        with suppress(OSError):
            raw.sendall(data)
        received = b""
        with suppress(ConnectionError):
            while part := raw.recv(1 << 16):
                received += part
        return received


def test_no_request_fails_and_no_answer_mixes_releases(
    toys: list[LoadedRelease], tmp_path: Path
) -> None:
    """Clients over both transports ask while the release changes some hundred times."""
    model, over = EdgeModel(toys[0]), threading.Event()
    failed: list[object] = []
    answers: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(4)]

    def load(number: int, server: InferenceServer) -> None:
        connection = connect(server)
        while not over.is_set():
            status, body = ask(connection)
            if status != 200:
                failed.append(body)
                return
            document = json.loads(body)
            found = np.array(document["outputs"][0]["data"], np.float32).reshape(4, 5)
            answers[number].append((int(document["model_version"]), found))
        connection.close()

    def guarded(number: int, server: InferenceServer) -> None:
        try:
            load(number, server)
        except BaseException as error:
            failed.append(error)

    with (
        InferenceServer(model, "toy", "127.0.0.1:0") as tcp,
        InferenceServer(model, "toy", f"unix:{tmp_path}/s") as unix,
    ):
        threads = [
            threading.Thread(target=guarded, args=(n, (tcp, unix)[n % 2]), daemon=True)
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        deadline, swaps = time.monotonic() + 30, 0
        while sum(map(len, answers)) < 400 and not failed:
            assert time.monotonic() < deadline
            swaps += 1
            model.swap(toys[swaps % len(toys)])
            time.sleep(0.001)
        over.set()
        for thread in threads:
            thread.join(30)
    assert failed == []
    assert swaps > 50
    expected = [classifier_outputs(n, X) for n in range(1, len(toys) + 1)]
    rows = [row for thread in answers for row in thread]
    assert {version for version, _ in rows} == {1, 2, 3, 4}
    for version, found in rows:
        fits = [n for n, want in enumerate(expected, 1) if np.abs(want - found).max() < 1e-4]
        assert fits == [version]  # exactly one release computes this: the one it states


def test_one_connection_carries_many_requests(server: InferenceServer) -> None:
    connection = connect(server)
    for _ in range(3):
        assert ask(connection)[0] == 200
        assert ask(connection, path="/v2/models/other/infer")[0] == 404
        assert ask(connection, "GET", "/v2/health/ready?x=y")[0] == 200
    connection.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n\r\n", b""),
        (b"\0" * 300 + b"\r\n\r\n", b"400"),
        (b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /v2 HTTP/9.9\r\n\r\n", b"505"),
        (b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /v2 HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", b"431"),
        (b"BREW /v2 HTTP/1.1\r\n\r\n", b"501"),
        (b"GET /v2 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"400"),
        (b"GET /v2 HTTP/1.1\r\n" + (b"a: " + b"b" * 60_000 + b"\r\n") * 2, b"431"),
        (
            b"GET /v2 HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 45\r\n\r\n"
            b"GET /v2/health/ready HTTP/1.1\r\nX: aaaaaaaaa\r\n\r\n",
            b"400",
        ),
        (
            b"POST /v2 HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            b"400",
        ),
        (b"GET /v2 HTTP/1.1\r\nContent-Length : 45\r\n\r\nGET /v2 HTTP/1.1\r\n\r\n", b"400"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", b"405"),
        (b"POST /v2 HTTP/1.1\r\n\r\n", b"411"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 70000\r\n\r\n" + bytes(70_000), b"413"),
        (b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (
            b"POST /v2 HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
            b"415",
        ),
        (
            b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n",
            b"413",
        ),
    ],
)
def test_hostile_bytes_get_an_error_and_the_next_client_an_answer(
    server: InferenceServer, sent: bytes, status: bytes
) -> None:
    received = say(server, sent)
    assert received[9:12] == status
    assert received.count(b"HTTP/1.1 ") == bool(status)  # one request, one answer
    if status:
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert ask(connect(server))[0] == 200


def test_a_large_upload_waits_for_permission(server: InferenceServer) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nContent-Length: {len(BODY)}\r\n"
    received = say(
        server, f"{head}Expect: 100-continue\r\nConnection: close\r\n\r\n{BODY}".encode()
    )
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "start", [b"GET /v2", b"POST /v2 HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", b"G"]
)
def test_slow_requests_are_ended(server: InferenceServer, start: bytes) -> None:
    begun = time.monotonic()
    say(server, start)
    assert time.monotonic() - begun < 10


def test_bodies_that_never_come_keep_no_memory_from_others(model: EdgeModel) -> None:
    """Twice what there is has been announced, and nothing of it sent."""
    limits = EndpointLimits(body_bytes=8 << 20, total_bytes=8 << 20, waiting_seconds=0.2)
    with InferenceServer(model, "toy", "127.0.0.1:0", limits=limits) as server:
        silent = [connect(server) for _ in range(2)]
        for connection in silent:
            connection.putrequest("POST", INFER)
            connection.putheader("Content-Length", str(limits.body_bytes))
            connection.putheader("Expect", "100-continue")
            connection.endheaders()
            assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert ask(connect(server))[0] == 200
        for connection in silent:
            connection.close()


def test_a_large_body_comes_whole_in_steps(model: EdgeModel) -> None:
    rows = 70_000  # of 12 floats: more than three steps
    document = json.dumps(
        {
            "inputs": [
                {
                    "name": "input",
                    "shape": [rows, 12],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": rows * 48},
                }
            ],
            "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
        }
    ).encode()
    x = np.tile(X, (rows // 4, 1))
    with InferenceServer(model, "toy", "127.0.0.1:0") as server:
        sizes = {"Inference-Header-Content-Length": str(len(document))}
        status, body = ask(connect(server), body=document + x.tobytes(), **sizes)
    assert status == 200
    found = np.frombuffer(body[-rows * 20 :], "<f4").reshape(rows, 5)
    np.testing.assert_allclose(found, classifier_outputs(1, x), atol=1e-4)


def test_more_connections_than_allowed_are_turned_away(server: InferenceServer) -> None:
    held = [connect(server) for _ in range(LIMITS.connections)]
    for connection in held:
        assert ask(connection, "GET", "/v2/health/live")[0] == 200
    assert say(server, b"")[9:12] == b"503"
    held.pop().close()
    deadline = time.monotonic() + 20
    while say(server, b"GET /v2 HTTP/1.0\r\n\r\n")[9:12] != b"200":
        assert time.monotonic() < deadline
    for connection in held:
        assert ask(connection, "GET", "/v2/health/live")[0] == 200
        connection.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "attacker.example"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Host": "localhost", "Origin": "http://attacker.example"}, 403),
    ],
)
def test_web_pages_cannot_ask(
    server: InferenceServer, headers: dict[str, str], status: int
) -> None:
    assert ask(connect(server), **headers)[0] == status
    assert ask(connect(server), "GET", "/v2", **headers)[0] == status


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("0.0.0.0:0", "other machines"),
        ("[::]:0", "other machines"),
        ("192.168.1.4:8000", "other machines"),
        ("127.0.0.1", "give unix"),
        ("example.com:80", "give unix"),
        ("999.0.0.1:80", "cannot listen"),
        ("127.0.0.1:99999", "cannot listen"),
        ("unix:/nonexistent/folder/s", "No such file"),
        ("unix:/tmp/" + "x" * 200, "cannot listen"),
    ],
)
def test_addresses_that_are_refused(model: EdgeModel, address: str, says: str) -> None:
    with pytest.raises(EndpointError, match=says):
        InferenceServer(model, "toy", address)


def test_a_port_in_use_is_named(server: InferenceServer, model: EdgeModel) -> None:
    with pytest.raises(EndpointError, match="in use"):
        InferenceServer(model, "toy", server.address.removeprefix("http://"))


def test_a_unix_socket_has_its_mode_and_goes_away(model: EdgeModel, tmp_path: Path) -> None:
    path = tmp_path / "model.sock"
    with InferenceServer(model, "toy", f"unix:{path}") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert ask(connect(server))[0] == 200
        with pytest.raises(EndpointError, match="in use by another process"):
            InferenceServer(model, "toy", f"unix:{path}")
    assert list(tmp_path.iterdir()) == []


def test_a_stale_socket_is_replaced_and_nothing_else(model: EdgeModel, tmp_path: Path) -> None:
    path = tmp_path / "model.sock"
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(path))
    left.close()
    with InferenceServer(model, "toy", f"unix:{path}") as server:
        assert ask(connect(server))[0] == 200
        os.unlink(path)  # another process's file under the same name stays
        path.write_text("mine")
    assert path.read_text() == "mine"
    with pytest.raises(EndpointError, match="is no socket"):
        InferenceServer(model, "toy", f"unix:{path}")


def test_requests_in_progress_are_answered_before_the_end(toys: list[LoadedRelease]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold(version: int, outcome: str, seconds: float) -> None:
        entered.set()
        leave.wait(30)

    server = InferenceServer(EdgeModel(toys[0], observe=hold), "toy", "127.0.0.1:0", limits=LIMITS)
    idle, busy = connect(server), connect(server)
    assert ask(idle, "GET", "/v2")[0] == 200
    answers: list[tuple[int, bytes]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(busy)), daemon=True)
    asking.start()
    assert entered.wait(30)
    closing = threading.Thread(target=server.close, daemon=True)
    closing.start()
    _until(lambda: server.closing)
    assert idle.sock.recv(1) == b""  # an idle connection ends at once
    leave.set()
    asking.join(30)
    closing.join(30)
    assert [status for status, _ in answers] == [200]
    assert not closing.is_alive()
    with pytest.raises(OSError, match="refused"):
        ask(connect(server))


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)
