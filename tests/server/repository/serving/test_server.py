"""The distribution server: a real one on loopback."""

from __future__ import annotations

import datetime as dt
import hashlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import KeyRing, Repository, ServerError
from prunecast.server.repository.serving import ReleaseServer, ServingLimits
from support.authority import self_signed
from support.releases import publish_model

pytestmark = pytest.mark.engine

LARGE = np.random.default_rng(0).bytes(8_000_000)  # more than the kernel buffers on loopback
SHA = hashlib.sha256(LARGE).hexdigest()
BLOB = f"/blobs/{SHA}"
_BOTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"  # two lengths: where does the next request begin?


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("served")
    made = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    (made.path / "blobs" / SHA).write_bytes(LARGE)
    return made


@pytest.fixture(scope="module")
def server(repository: Repository) -> Iterator[ReleaseServer]:
    limits = ServingLimits(header_bytes=2000, request_timeout=0.5)
    with ReleaseServer(repository.path, limits=limits, metrics_port=0) as running:
        yield running


def _get(
    port: int | None, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        names = {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, headers=names)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def _say(port: int, text: bytes) -> bytes:
    """Everything that comes back until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(text)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def _slow(port: int, path: str = BLOB) -> socket.socket:
    """A connection that has asked for a file and has not taken it; it holds little."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def _metric(server: ReleaseServer, line: str) -> float:
    text = _get(server.metrics_port, "/metrics")[2].decode()
    return next((float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(line)), 0)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_files_in_whole_and_in_part(server: ReleaseServer) -> None:
    status, headers, body = _get(server.port, BLOB)
    assert (status, body == LARGE, headers["content-length"]) == (200, True, str(len(LARGE)))
    assert _get(server.port, BLOB, Range="bytes=7000000-")[2] == LARGE[7_000_000:]
    assert _get(server.port, BLOB, Range="bytes=5-4000000")[2] == LARGE[5:4_000_001]
    assert _get(server.port, BLOB, Range="bytes=5-9")[2] == LARGE[5:10]
    status, headers, body = _get(server.port, BLOB, Range="bytes=0-1,4-5")
    assert (status, headers["content-range"]) == (416, f"bytes */{len(LARGE)}")
    assert _get(server.port, BLOB, If_None_Match=headers.get("etag", f'"{SHA}"'))[0] == 304


def test_heads_hold_what_bodies_would_have(server: ReleaseServer) -> None:
    status, headers, body = _get(server.port, BLOB, "HEAD")
    assert (status, headers["content-length"], body) == (200, str(len(LARGE)), b"")


def test_a_connection_is_used_again_and_pipelined(server: ReleaseServer) -> None:
    one = b"GET /metadata/1.root.json HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"HEAD /metadata/1.root.json HTTP/1.1\r\nHost: x\r\n\r\n"
    cached = b'GET %s HTTP/1.1\r\nHost: x\r\nIf-None-Match: "%s"\r\n\r\n'
    cached %= (BLOB.encode(), SHA.encode())
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = _say(server.port, one + head + cached + one + last)
    lines = [part.split(b"\r\n")[0] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert [line[:3] for line in lines] == [b"200", b"200", b"304", b"200", b"404"]
    assert answer.count(b'"signed"') == 2


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 4000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 4000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 400 + b"\r\n", 431),
        (b"POST /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 413),
        (_BOTH + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost", 408),
        (b"", None),
    ],
)
def test_wrong_and_unfinished_requests_end(
    server: ReleaseServer, text: bytes, status: int | None
) -> None:
    answer = _say(server.port, text)
    assert answer[9:12] == (str(status).encode() if status else b"")


@pytest.mark.parametrize(
    "text",
    [
        b"GET /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n",
        b"HEAD /x HTTP/1.1\r\nHost: x\r\n\r\nno request\r\n\r\n",
    ],
    ids=["a broken body", "a broken request after a HEAD"],
)
def test_what_is_malformed_is_answered_and_no_error_of_the_server(
    server: ReleaseServer, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert b"HTTP/1.1 400 " in (said := _say(server.port, text))
    assert said.endswith(b"the request is malformed\n")
    assert not caplog.records


def test_a_client_with_many_requests_lets_others_have_their_turn(server: ReleaseServer) -> None:
    """Thousands of requests in one go: another client is answered before half of them are."""
    many, got, begun = 4000, bytearray(), threading.Event()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as greedy:

        def read() -> None:
            while got.count(b"HTTP/1.1 404") < many and (data := greedy.recv(1 << 16)):
                got.extend(data)
                begun.set()

        reading = threading.Thread(target=read)
        reading.start()
        greedy.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * many)
        assert begun.wait(timeout=10)
        assert _get(server.port, "/nothing")[0] == 404
        assert got.count(b"HTTP/1.1 404") < many / 2
        reading.join(timeout=60)
        assert not reading.is_alive()


def test_health_is_public_and_metrics_are_not(server: ReleaseServer) -> None:
    status, headers, body = _get(server.port, "/healthz")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert json.loads(body)["status"] == "ready"
    assert _get(server.port, "/metrics")[0] == 404
    status, headers, body = _get(server.metrics_port, "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"\nprunecast_serve_ready 1.0\n" in body
    assert _get(server.metrics_port, BLOB)[0] == 404


def test_an_expired_repository_is_not_ready(tmp_path: Path, keys: KeyRing) -> None:
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=30)
    made = Repository.create(tmp_path / "repository", keys, now=lambda: long_ago)
    with ReleaseServer(made.path) as server:
        status, _, body = _get(server.port, "/healthz")
        problems = {p["subject"]: p["code"] for p in json.loads(body)["problems"]}
        assert (status, problems) == (503, {"snapshot": "expired", "timestamp": "expired"})
        assert _get(server.port, "/metadata/timestamp.json")[0] == 200


def test_patches_and_keyframes_are_counted_apart(
    tmp_path: Path,
    keys: KeyRing,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> None:
    repository = Repository.create(tmp_path / "repository", keys)
    with ReleaseServer(repository.path, metrics_port=0) as server:
        config = AgentConfig(
            tmp_path / "state", server.url, "toy", repository.trusted_root(), threads=1
        )
        sizes = {}
        with Agent(config) as agent:
            for number in (1, 2):
                made = publish_model(
                    repository, "toy", model(number), graph, selftest_inputs=images
                )
                assert agent.update_once().version == number
                sizes[number] = made
        sent = "prunecast_serve_sent_bytes_total"
        assert _metric(server, f'{sent}{{kind="keyframe"}}') == sizes[1].manifest.keyframe.length
        assert _metric(server, f'{sent}{{kind="patch"}}') == sizes[2].patch_bytes[1]
        count = 'prunecast_serve_requests_total{kind="patch",status="200"}'
        assert _metric(server, count) == 1
        assert _metric(server, 'prunecast_serve_request_seconds_count{kind="timestamp"}') == 2


def test_clients_that_stall_or_leave_are_let_go(repository: Repository) -> None:
    limits = ServingLimits(stall_timeout=0.3)
    interrupted = 'prunecast_serve_interrupted_total{kind="blob"}'
    with ReleaseServer(repository.path, limits=limits, metrics_port=0) as server:
        _slow(server.port).close()
        _until(lambda: _metric(server, interrupted) == 1)
        with _slow(server.port):
            _until(lambda: _metric(server, interrupted) == 2)
        _until(lambda: _metric(server, "prunecast_serve_connections") == 0)
        assert 0 < _metric(server, "prunecast_serve_sent_bytes_total") < 2 * len(LARGE)


def test_quotas_and_connections_are_limited(repository: Repository) -> None:
    limits = ServingLimits(
        connections=2, patience=60.0, requests_per_second=0.2, bytes_per_second=1000.0
    )
    with ReleaseServer(repository.path, limits=limits, metrics_port=0) as server:
        assert len(_get(server.port, BLOB)[2]) == len(LARGE)  # begun with credit
        status, headers, body = _get(server.port, "/metadata/1.root.json")
        assert (status, headers["cache-control"]) == (429, "no-store")
        assert 7_980 < int(headers["retry-after"]) <= 7_991
        assert b"used up its bytes" in body
        status, headers, body = _get(server.port, "/healthz")
        assert (status, b"its requests" in body) == (429, True)
        assert 1 <= int(headers["retry-after"]) <= 5
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        _until(lambda: _metric(server, "prunecast_serve_connections") == 2)
        answer = _say(server.port, b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 10" in answer
        for connection in held:
            connection.close()
        _until(lambda: _metric(server, "prunecast_serve_connections") == 0)
        for reason in ("requests", "bytes", "connections"):
            assert _metric(server, f'prunecast_serve_refused_total{{reason="{reason}"}}') == 1


def test_one_client_does_not_keep_others_out(repository: Repository) -> None:
    """Full of one address: another one is answered, for a silent connection of the first."""
    with ReleaseServer(
        repository.path, limits=ServingLimits(connections=4, patience=60.0)
    ) as server:
        download = _slow(server.port)
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        silent[0].sendall(b"GET /blobs/")  # part of a request is silence, too
        _until(lambda: _say(server.port, b"").startswith(b"HTTP/1.1 503 "))
        address = ("127.0.0.1", server.port)
        for _ in range(2):  # as many as the first then has: no more are ended
            other = socket.create_connection(address, timeout=10, source_address=("127.0.0.2", 0))
            other.sendall(b"GET /metadata/1.root.json HTTP/1.1\r\nHost: x\r\n\r\n")
            assert other.recv(12) == b"HTTP/1.1 200"
            silent.append(other)
        assert _say(server.port, b"").startswith(b"HTTP/1.1 503 ")
        download.settimeout(10)
        assert b"".join(iter(lambda: download.recv(1 << 20), b"")).endswith(LARGE[-1000:])
        for connection in silent:
            connection.close()


def test_downloads_in_progress_finish(repository: Repository) -> None:
    server = ReleaseServer(repository.path)
    with server:
        connection, idle = _slow(server.port), socket.create_connection(("127.0.0.1", server.port))
        ending = threading.Thread(target=server.stop)
        ending.start()
        idle.settimeout(10)
        assert idle.recv(1) == b""
        with pytest.raises(OSError):  # noqa: PT011
            socket.create_connection((server.host, server.port), timeout=2)
        assert ending.is_alive()
        got = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert got.endswith(LARGE[-1000:])
        ending.join(timeout=10)
        assert not ending.is_alive()
    with ReleaseServer(repository.path, limits=ServingLimits(drain=0.2)) as server:
        connection = _slow(server.port)
        server.stop()
        got = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert 0 < len(got) < len(LARGE)


def test_sigterm_ends_the_command_with_zero(repository: Repository) -> None:
    command = [sys.executable, "-m", "prunecast.cli", "serve", str(repository.path), "--port", "0"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        connection = _slow(said["port"])
        process.send_signal(signal.SIGTERM)
        _until(lambda: not _listens(said["port"]))
        got = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert got.endswith(LARGE[-1000:])
        assert process.wait(timeout=20) == 0


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def test_wrong_calls_are_refused(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="not a release repository"):
        ReleaseServer(tmp_path)
    with pytest.raises(ServerError, match="both"):
        ReleaseServer(repository.path, certificate=tmp_path / "c.pem")
    with ReleaseServer(repository.path) as server:
        for ports in ({"port": server.port}, {"metrics_port": server.port}):
            with pytest.raises(ServerError, match="cannot bind"):
                ReleaseServer(repository.path, **ports)
    (tmp_path / "c.pem").write_text("no certificate")
    with pytest.raises(ServerError, match="unusable"):
        ReleaseServer(repository.path, certificate=tmp_path / "c.pem", key=tmp_path / "c.pem")
    with pytest.raises(ServerError, match="open files"):
        ReleaseServer(repository.path, limits=ServingLimits(connections=2**40))


def test_tls(repository: Repository, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with ReleaseServer(repository.path, certificate=certificate, key=key) as server:
        assert server.url == f"https://127.0.0.1:{server.port}/"
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(
            server.host, server.port, context=context, timeout=10
        )
        for path, wanted in ((BLOB, LARGE), ("/metadata/1.root.json", repository.trusted_root())):
            connection.request("GET", path)
            assert connection.getresponse().read() == wanted
        connection.close()
        assert _peer(server) == ssl.PEM_cert_to_DER_cert(certificate.read_text())
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            pytest.raises(ssl.SSLError),
            socket.create_connection((server.host, server.port), timeout=10) as plain,
        ):
            old.wrap_socket(plain)

        key.write_text("broken")
        server.reload_certificate()
        before = _peer(server)
        self_signed(tmp_path)
        server.reload_certificate()
        assert before != _peer(server) == ssl.PEM_cert_to_DER_cert(certificate.read_text())


def _peer(server: ReleaseServer) -> bytes | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((server.host, server.port), timeout=10) as plain:
        return context.wrap_socket(plain).getpeercert(binary_form=True)
