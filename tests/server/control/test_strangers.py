"""Strangers against the control server: what devices have stays theirs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prunecast.server.control import ControlLimits, ControlServer
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from support.authority import Authority
from support.listeners import Fleet, is_open, until

pytestmark = pytest.mark.engine


@pytest.fixture
def held() -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for connection in made:
        connection.close()


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
        until(lambda: sum(map(is_open, held)) <= 1)
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


def test_failed_handshakes_write_nothing_to_the_log_of_the_command(
    repository: Repository, authority: Authority, database: str, fleet: FleetService
) -> None:
    certificate, key = authority.server()
    files = ("--certificate", str(certificate), "--key", str(key), "--port", "0", "--json")
    command = [sys.executable, "-m", "prunecast.cli", "fleet", "serve", *files]
    environment = {**os.environ, "PRUNECAST_FLEET": database}
    environment.pop("GRPC_VERBOSITY", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
                stranger.sendall(b"\x16\x03\x01\x00\x05hello" + bytes(50))
                with suppress(ConnectionError):
                    while stranger.recv(100):
                        pass
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, b"")
