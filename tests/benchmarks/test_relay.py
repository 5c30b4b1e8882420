"""The counting relay: every byte once, by request where it is HTTP in the clear."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from benchmarks.loopback.relay import (
    HANDSHAKE,
    Exchange,
    LoopbackListener,
    Relay,
    _Connection,
    running_relay,
)

WAIT = 10


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response_only(200)
        self.send_header("content-length", str(2 * len(body)))
        self.end_headers()
        self.wfile.write(2 * body)

    def log_message(self, *said: object) -> None:
        pass


class _Echo(LoopbackListener):
    def serve(self, client: socket.socket) -> None:
        client.sendall(b"hello")
        while data := client.recv(100):
            client.sendall(data)


@pytest.fixture
def relay() -> Iterator[Relay]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with running_relay("127.0.0.1", server.server_port) as relay:
            yield relay
        server.shutdown()


@pytest.fixture
def echo() -> Iterator[Relay]:
    listener = _Echo()
    with running_relay("127.0.0.1", int(listener.address.rpartition(":")[2])) as relay:
        yield relay
    listener.close()


def connected(relay: Relay) -> socket.socket:
    host, _, port = relay.address.rpartition(":")
    return socket.create_connection((host, int(port)), WAIT)


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_requests_of_one_connection_are_told_apart(relay: Relay) -> None:
    client = http.client.HTTPConnection(relay.address, timeout=WAIT)
    answers = []
    for target, size in (("/push", 100_000), ("/pull?a=1", 0), ("/push", 7)):
        client.request("POST", target, body=bytes(size))
        answers.append(len(client.getresponse().read()))
    client.close()
    assert answers == [200_000, 0, 14]
    assert [e.target for e in relay.exchanges] == ["/push", "/pull?a=1", "/push"]
    first, _, last = relay.exchanges
    # the bodies differ by 99,993 bytes, the lengths in the headers by 5 characters each
    assert (first.up - last.up, first.down - last.down) == (99_998, 199_990)


def test_every_byte_is_counted_however_it_is_cut(relay: Relay) -> None:
    request = b"POST /a HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody"
    response = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nbodybody"
    with connected(relay) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request:
            client.sendall(bytes([byte]))
        answer = b""
        while len(answer) < len(response):
            answer += client.recv(100)
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        answer += read_to_end(client)
    assert answer == 2 * response
    assert relay.exchanges == 2 * [Exchange("/a", len(request), len(response))]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 TLS\r\n\r\nand more",
        b"GET without a version\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"X" * 200_000,
    ],
)
def test_what_is_no_http_is_one_exchange(echo: Relay, sent: bytes) -> None:
    with connected(echo) as client:
        Thread(target=client.sendall, args=(sent,), daemon=True).start()
        answer = b""
        while len(answer) < len(sent) + 5:
            answer += client.recv(1 << 16)
    assert answer == b"hello" + sent
    assert echo.exchanges == [Exchange("", len(sent), len(sent) + 5)]


def record(kind: int, size: int) -> bytes:
    return bytes([kind, 3, 3]) + size.to_bytes(2) + bytes(size)


def test_tls_is_taken_apart_by_who_speaks() -> None:
    """A handshake as RFC 8446 has it, two tickets, and two requests with their responses."""
    exchanges: list[Exchange] = []
    connection = _Connection(exchanges, 7)
    for byte in record(0x16, 200) + record(0x14, 1):  # however it is cut
        connection.sent(bytes([byte]))
    connection.received(record(0x16, 120) + record(0x14, 1) + record(0x17, 900))
    connection.sent(record(0x17, 53) + record(0x17, 300))  # the end of it, and a request's head
    connection.received(record(0x17, 250))
    connection.received(record(0x17, 250)[:100])
    connection.sent(record(0x17, 40))  # the request's body, while tickets arrive
    connection.received(record(0x17, 250)[100:] + record(0x17, 130))
    connection.received(record(0x17, 20_000))
    connection.sent(record(0x17, 300)[:3])
    connection.sent(record(0x17, 300)[3:])
    connection.received(record(0x17, 130))
    shook = Exchange(HANDSHAKE, 205 + 6 + 58, 125 + 6 + 905 + 255 + 255)
    assert exchanges == [shook, Exchange("", 350, 135 + 20_005), Exchange("", 305, 135)]
    assert {exchange.connection for exchange in exchanges} == {7}


def test_connections_count_apart_and_end_with_the_server(echo: Relay) -> None:
    for _ in range(2):
        with connected(echo) as client:
            assert client.recv(5) == b"hello"
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b""
    assert echo.exchanges == 2 * [Exchange("", 0, 5)]
