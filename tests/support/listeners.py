"""Listeners under attack: how a client and a stranger meet each of them, on loopback."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from prunecast.common.fleet_protocol import make_stub, messages

__all__ = ["HANDSHAKE", "Fleet", "Health", "Listener", "is_open", "is_served", "until"]

HANDSHAKE = b"\x16\x03\x01\x02\x00\x01"
"""The beginning of one of TLS."""


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

    def __init__(self, port: int, ca: bytes, token: str, most: int = 1024) -> None:
        super().__init__(port, "", None, HANDSHAKE, most)
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


def is_open(connection: socket.socket) -> bool:
    """Whether the server still holds a connection, on which it has said nothing."""
    try:
        return connection.recv(4096) != b"" and is_open(connection)
    except BlockingIOError:
        return True
    except OSError:
        return False


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_served(listener: Listener, connection: Any = None) -> bool:
    """Whether a client that comes now, or with its own connection, is served."""
    with suppress(OSError):
        if connection is not None:
            return listener.ask(connection)
        connection = listener.connect()
        try:
            return listener.ask(connection)
        finally:
            connection.close()
    return False
