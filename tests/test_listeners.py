"""Strangers against every listener: the same tests for each, on loopback, with the real servers."""

from __future__ import annotations

import json
import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prunecast.client.edge import EdgeModel
from prunecast.client.edge.inference import EndpointLimits, InferenceServer
from prunecast.common.fleet_protocol import make_stub, messages
from prunecast.server.control import ControlLimits, ControlServer
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from prunecast.server.repository.serving import ReleaseServer, ServingLimits
from support.authority import Authority
from support.control import authority, database, fleet, repository
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


class Listener:
    """One that is attacked.

    Args:
        port: on loopback.
        path: that a client asks for with success, over HTTP.
        context: of TLS, for a client.
        begun: what a stranger sends that begins and does not go on.
        most: connections that it keeps of one address.
    """

    def __init__(
        self, port: int, path: str, context: ssl.SSLContext | None, begun: bytes, most: int
    ) -> None:
        self.port, self.path, self.context = port, path, context
        self.begun, self.most = begun, most

    def connect(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        try:
            return self.context.wrap_socket(plain) if self.context else plain
        except OSError:
            plain.close()
            raise

    def ask(self, connection: Any) -> bool:
        """Whether a request is answered well over a connection."""
        connection.sendall(f"GET {self.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return bool(connection.recv(65536).startswith(b"HTTP/1.1 200"))

    def strange(self) -> socket.socket:
        """A connection of TCP, on which nothing was said."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        made.setblocking(False)
        return made


class Fleet(Listener):
    """The control server; a connection is a channel of gRPC, a request a device's report."""

    def __init__(self, port: int, ca: bytes, token: str) -> None:
        super().__init__(port, "", None, b"\x16\x03\x01\x02\x00\x01", SHARE)
        self._ca, self._token, self._number = ca, token, 0

    def connect(self) -> Any:
        return grpc.secure_channel(
            f"localhost:{self.port}",
            grpc.ssl_channel_credentials(self._ca),
            options=[("grpc.use_local_subchannel_pool", 1)],
        )

    def ask(self, connection: Any, token: str | None = None) -> bool:
        self._number += 1
        request = messages.ReportRequest(id=f"report{time.monotonic_ns():020}", running=1)
        metadata = [("authorization", f"Bearer {token or self._token}")]
        try:
            make_stub(connection).Report(request, metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ConnectionError from error
            raise
        return True


class Health(Fleet):
    """The same server, asked for its health by somebody without a credential."""

    def ask(self, connection: Any, token: str | None = None) -> bool:
        stub = health_pb2_grpc.HealthStub(connection)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError as error:
            raise ConnectionError from error
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


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
            begun = b"\x16\x03\x01\x02\x00\x01" if context else b"GET /"
            yield Listener(server.port, "/metadata/1.root.json", context, begun, SHARE)


@contextmanager
def _endpoint(folder: Path) -> Iterator[Listener]:
    model = EdgeModel(loaded_release(1, folder))
    with InferenceServer(model, "toy", "127.0.0.1:0", limits=ENDPOINT) as server:
        port = int(server.address.rpartition(":")[2])
        yield Listener(port, "/v2/health/live", None, b"GET /", PLACES)


HTTP = ["files", "files-tls", "metrics", "endpoint"]


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
            yield kind(server.port, authority.ca.read_bytes(), token)


@pytest.fixture
def held() -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for connection in made:
        connection.close()


def _open(connection: socket.socket) -> bool:
    """Whether the server still holds a connection, on which it has said nothing."""
    try:
        return connection.recv(4096) != b"" and _open(connection)
    except BlockingIOError:
        return True
    except OSError:
        return False


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _served(listener: Listener) -> bool:
    """Whether a client that comes now is served; one that has to wait comes again."""
    with suppress(OSError):
        connection = listener.connect()
        try:
            return listener.ask(connection)
        finally:
            connection.close()
    return False


@pytest.mark.parametrize("speaks", [False, True], ids=["silent", "begun"])
def test_strangers_take_no_place_from_clients(
    listener: Listener, held: list[socket.socket], speaks: bool
) -> None:
    """Far more than there are places, all of the client's own address."""
    _until(lambda: _served(listener))
    before = listener.connect()
    assert listener.ask(before)
    for _ in range(MANY):
        held.append(listener.strange())
        if speaks:
            with suppress(OSError):  # it may have been refused already
                held[-1].send(listener.begun)
    _until(lambda: sum(map(_open, held)) <= listener.most)
    _until(lambda: _served(listener))
    assert listener.ask(before)  # who was there before has kept its connection
    before.close()


def test_what_begins_and_never_ends_is_ended(listener: Listener, held: list[socket.socket]) -> None:
    held += [listener.strange() for _ in range(4)]
    for connection in held[:2]:
        connection.send(listener.begun)
    _until(lambda: not any(map(_open, held)))


def test_refusals_do_not_fill_the_log(
    listener: Listener, held: list[socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        held += [listener.strange() for _ in range(MANY)]
        _until(lambda: sum(map(_open, held)) <= listener.most)
    assert len(caplog.records) <= 10


@pytest.mark.parametrize("listener", HTTP, indirect=True)
def test_many_requests_at_once_let_others_have_their_turn(listener: Listener) -> None:
    many, got, begun = 1500, bytearray(), threading.Event()
    greedy: Any = listener.connect()

    def read() -> None:
        while got.count(b"HTTP/1.1 200") < many and (data := greedy.recv(1 << 16)):
            got.extend(data)
            begun.set()

    reading = threading.Thread(target=read)
    reading.start()
    one = f"GET {listener.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with suppress(OSError):
        greedy.sendall(one * many)
    assert begun.wait(timeout=10)
    assert _served(listener)
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


# -- what only the fleet has ----------------------------------------------------------------------


@pytest.fixture
def control(
    repository: Repository, authority: Authority, database: str, fleet: FleetService
) -> Iterator[Callable[..., Fleet]]:
    certificate, key = authority.server()
    with ExitStack() as stack:

        def start(**limits: Any) -> Fleet:
            server = ControlServer(
                *(database, repository.path),
                certificate=certificate, key=key, limits=ControlLimits(**limits),
            )  # fmt: skip
            stack.enter_context(server)
            name = f"cam{time.monotonic_ns()}"
            token = fleet.enrol(name, "lab", now=time.time(), actor="ada")
            return Fleet(server.port, authority.ca.read_bytes(), token)

        yield start


def test_health_takes_no_stream_from_devices(control: Callable[..., Fleet]) -> None:
    server = control(streams=4, health_watches=40, health_watches_per_client=24)
    with ExitStack() as stack:
        channels = [stack.enter_context(server.connect()) for _ in range(4)]
        stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
        request = health_pb2.HealthCheckRequest()
        watches = [stub.Watch(request, timeout=30) for stub in stubs for _ in range(6)]
        serving = health_pb2.HealthCheckResponse.SERVING
        assert [next(watch).status for watch in watches] == [serving] * 24
        with server.connect() as device:
            assert server.ask(device)
            over = health_pb2_grpc.HealthStub(device).Watch(request, timeout=30)
            with pytest.raises(grpc.RpcError) as caught:
                next(over)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for watch in watches:
            watch.cancel()


def test_a_health_watch_that_nobody_reads_does_not_hold_the_end(
    repository: Repository, authority: Authority, database: str, fleet: FleetService
) -> None:
    certificate, key = authority.server()
    limits = ControlLimits(drain=30.0)
    with ControlServer(
        database, repository.path, certificate=certificate, key=key, limits=limits
    ) as server:
        channel = Fleet(server.port, authority.ca.read_bytes(), "").connect()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        statuses = health_pb2.HealthCheckResponse
        assert next(watch).status == statuses.SERVING
        ending = threading.Thread(target=server.stop)
        ending.start()
        assert [answer.status for answer in watch] == [statuses.NOT_SERVING]
        ending.join(timeout=20)
        assert not ending.is_alive()
        channel.close()


def test_unknown_credentials_are_not_looked_up_without_end(
    control: Callable[..., Fleet], caplog: pytest.LogCaptureFixture
) -> None:
    server = control(refusals_per_second=0.01, refusal_burst=5)
    codes = []
    with server.connect() as device, server.connect() as stranger:
        assert server.ask(device)
        for number in range(40):
            with pytest.raises(grpc.RpcError) as caught:
                server.ask(stranger, token=f"{number:043}")
            codes.append(caught.value.code())
        assert server.ask(device)  # its credential was good before
    assert (
        codes == [grpc.StatusCode.UNAUTHENTICATED] * 5 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 35
    )
    assert len(caplog.records) == 5


def test_a_connection_whose_device_is_known_keeps_its_place(
    control: Callable[..., Fleet], held: list[socket.socket]
) -> None:
    server = control(connections=6, connections_per_client=3, patience=0.0)
    with ExitStack() as stack:
        devices = [stack.enter_context(server.connect()) for _ in range(5)]
        assert all(map(server.ask, devices))  # more of one address than strangers may be
        held += [server.strange() for _ in range(50)]
        _until(lambda: sum(map(_open, held)) <= 1)
        assert all(map(server.ask, devices))


def test_the_log_names_where_a_call_came_from(
    control: Callable[..., Fleet], caplog: pytest.LogCaptureFixture
) -> None:
    server = control()
    with server.connect() as channel, pytest.raises(grpc.RpcError):
        server.ask(channel, token="A" * 43)
    (record,) = caplog.records
    assert record.getMessage().startswith("127.0.0.1 is refused: the token is unknown")


def test_what_is_no_handshake_never_reaches_grpc(
    control: Callable[..., Fleet], capfd: pytest.CaptureFixture[str]
) -> None:
    server = control()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stranger:
            stranger.sendall(text)
            with suppress(ConnectionError):
                assert stranger.recv(1) == b""
    out, err = capfd.readouterr()
    assert json.dumps(out + err) == '""'
