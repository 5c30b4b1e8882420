"""Strangers against every listener: the same tests for each, on loopback, with the real servers."""

from __future__ import annotations

import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from prunecast.client.edge import EdgeModel
from prunecast.client.edge.inference import EndpointLimits, InferenceServer
from prunecast.common.fleet_protocol import make_stub, messages
from prunecast.server.control import ControlLimits, ControlServer
from prunecast.server.federation.reporting.metrics import MetricsServer
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from prunecast.server.repository.serving import ReleaseServer, ServingLimits
from support.authority import Authority
from support.control import authority, database, fleet, repository
from support.listeners import HANDSHAKE, Fleet, Health, Listener, is_open, is_served, until
from support.served import loaded_release

__all__ = ["authority", "database", "fleet", "repository"]
pytestmark = pytest.mark.engine

PLACES, SHARE = 24, 12  # of all, of one address
MANY = 150
SERVING = ServingLimits(
    connections=PLACES,
    connections_per_client=SHARE,
    patience=0.2,
    request_timeout=2.0,
    idle_timeout=30.0,
    header_bytes=8192,
)
CONTROL = ControlLimits(
    connections=PLACES, connections_per_client=SHARE, patience=0.2, handshake=2.0, drain=1.0
)
ENDPOINT = EndpointLimits(connections=PLACES, request_seconds=2.0, idle_seconds=3.0)


@contextmanager
def _files(repository: Repository, authority: Authority, which: str) -> Iterator[Listener]:
    certificate, key = authority.server() if which == "files-tls" else (None, None)
    with ReleaseServer(
        repository.path, certificate=certificate, key=key, limits=SERVING, metrics_port=0
    ) as server:
        context = ssl.create_default_context(cafile=str(authority.ca)) if certificate else None
        if context is not None:
            context.check_hostname = False
        if which == "metrics":
            assert server.metrics_port is not None
            yield Listener(server.metrics_port, "/healthz", None, b"GET /", 32)
        else:
            begun = HANDSHAKE if context else b"GET /"
            yield Listener(server.port, "/metadata/1.root.json", context, begun, SHARE)


@contextmanager
def _endpoint(folder: Path) -> Iterator[Listener]:
    model = EdgeModel(loaded_release(1, folder))
    with InferenceServer(model, "toy", "127.0.0.1:0", limits=ENDPOINT) as server:
        port = int(server.address.rpartition(":")[2])
        yield Listener(port, "/v2/health/live", None, b"GET /", PLACES)


@contextmanager
def _run_metrics() -> Iterator[Listener]:
    with MetricsServer(lambda: b"", limits=SERVING) as server:
        yield Listener(server.port, "/metrics", None, b"GET /", 32)


HTTP = ["files", "files-tls", "metrics", "endpoint", "run-metrics"]


@pytest.fixture(scope="module", params=[*HTTP, "fleet", "health"])
def listener(
    request: pytest.FixtureRequest,
    repository: Repository,
    authority: Authority,
    database: str,
    fleet: FleetService,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Listener]:
    if request.param == "endpoint":
        with _endpoint(tmp_path_factory.mktemp("endpoint")) as found:
            yield found
    elif request.param == "run-metrics":
        with _run_metrics() as found:
            yield found
    elif request.param in HTTP:
        with _files(repository, authority, request.param) as found:
            yield found
    else:
        certificate, key = authority.server()
        token = fleet.enrol(f"cam{time.monotonic_ns()}", "lab", now=time.time(), actor="ada")
        with ControlServer(
            *(database, repository.path),
            certificate=certificate, key=key, limits=CONTROL, interval=0.1,
        ) as server:  # fmt: skip
            kind = Health if request.param == "health" else Fleet
            yield kind(server.port, authority.ca.read_bytes(), token, SHARE)


@pytest.fixture
def held(listener: Listener) -> Iterator[list[socket.socket]]:
    """Connections of strangers; whoever comes after the test finds their places free again."""
    made: list[socket.socket] = []
    yield made
    for connection in made:
        connection.close()
    until(lambda: is_served(listener))


@pytest.mark.parametrize("speaks", [False, True], ids=["silent", "begun"])
def test_strangers_take_no_place_from_clients(
    listener: Listener, held: list[socket.socket], speaks: bool
) -> None:
    """Far more than there are places, all of the client's own address."""
    until(lambda: is_served(listener))
    before = listener.connect()
    assert listener.ask(before)
    for _ in range(MANY):
        held.append(listener.strange())
        if speaks:
            with suppress(OSError):  # it may have been refused already
                held[-1].send(listener.begun)
    until(lambda: sum(map(is_open, held)) <= listener.most)
    until(lambda: is_served(listener))
    # who was there before has kept its connection; who asks for health has shown no credential,
    # and its channel connects again
    if isinstance(listener, Health):
        until(lambda: is_served(listener, before))
    else:
        assert listener.ask(before)
    before.close()


def test_what_begins_and_never_ends_is_ended(listener: Listener, held: list[socket.socket]) -> None:
    held += [listener.strange() for _ in range(4)]
    for connection in held[:2]:
        connection.send(listener.begun)
    until(lambda: not any(map(is_open, held)))


def test_refusals_do_not_fill_the_log(
    listener: Listener, held: list[socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        held += [listener.strange() for _ in range(MANY)]
        until(lambda: sum(map(is_open, held)) <= listener.most)
    assert len(caplog.records) <= 10


@pytest.mark.parametrize("listener", HTTP, indirect=True)
def test_many_requests_at_once_let_others_have_their_turn(listener: Listener) -> None:
    many, got, begun = 1500, bytearray(), threading.Event()
    greedy: Any = listener.connect()

    def read() -> None:
        with suppress(OSError):
            while got.count(b"HTTP/1.1 200") < many and (data := greedy.recv(1 << 16)):
                got.extend(data)
                begun.set()

    reading = threading.Thread(target=read)
    reading.start()
    one = f"GET {listener.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with suppress(OSError):
        greedy.sendall(one * many)
    assert begun.wait(timeout=10)
    assert is_served(listener)
    assert got.count(b"HTTP/1.1 200") < many
    with suppress(OSError):
        greedy.shutdown(socket.SHUT_RDWR)
    reading.join(timeout=20)
    assert not reading.is_alive()
    greedy.close()


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("listener", ["files", "metrics", "endpoint"], indirect=True)
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 0\r\nContent-Length: 43\r\n",
        b"Content-Length: 43\r\nContent-Length: 43\r\n",
        b"Content-Length: 0\r\nContent-Length: 0\r\n",
        b"Content-Length: 43, 43\r\n",
        b"Content-Length: 0, 0\r\n",
        b"Content-Length: +43\r\n",
        b"Content-Length: -0\r\n",
        b"Content-Length: 0x2b\r\n",
        b"Content-Length: 4_3\r\n",
        b"Content-Length : 43\r\n",
        b"Content-Length: 43\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b" Content-Length: 43\r\n",
        b"X: a\r\n Content-Length: 43\r\n",
        b"X: a\rContent-Length: 43\r\n",
        b"X: a\nContent-Length: 43\r\n",
        b"X: a\0\r\n",
        b"Content-Length\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it(
    listener: Listener, framing: bytes
) -> None:
    """A request whose end another server might see elsewhere (RFC 9112, section 6.3)."""
    connection: Any = listener.connect()
    head = f"GET {listener.path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    connection.sendall(head + framing + b"\r\n" + SMUGGLED)
    answer = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            answer += data
    connection.close()
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), answer[:60]
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("listener", HTTP, indirect=True)
@pytest.mark.parametrize("parts", [1, 7], ids=["at once", "in parts"])
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 60_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 3_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x" * 100_000,
        b"GET /" + b"x" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n",
    ],
    ids=["one header", "many headers", "no line", "request line"],
)
def test_a_head_has_its_limit_however_it_comes(listener: Listener, head: bytes, parts: int) -> None:
    data = head + b"\r\n"
    connection: Any = listener.connect()
    with suppress(OSError):
        for start in range(0, len(data), len(data) // parts + 1):
            connection.sendall(data[start : start + len(data) // parts + 1])
    answer = b""
    with suppress(OSError):
        answer = connection.recv(65536)
    connection.close()
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 414")), answer[:60]


@pytest.mark.parametrize("listener", ["fleet"], indirect=True)
def test_metadata_of_a_call_have_their_limit(listener: Fleet) -> None:
    with listener.connect() as channel, pytest.raises(grpc.RpcError) as caught:
        make_stub(channel).Report(
            messages.ReportRequest(), metadata=[("x", "a" * 60_000)], timeout=10
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_every_server_takes_the_files_that_the_system_allows(
    repository: Repository,
    authority: Authority,
    database: str,
    fleet: FleetService,
    tmp_path: Path,
) -> None:
    certificate, key = authority.server()
    model = EdgeModel(loaded_release(1, tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    made: list[Callable[[], Any]] = [
        lambda: ReleaseServer(repository.path, limits=SERVING),
        lambda: ControlServer(database, repository.path, certificate=certificate, key=key),
        lambda: InferenceServer(model, "toy", "127.0.0.1:0"),
    ]
    try:
        for start in made:
            resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
            with start():
                assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
