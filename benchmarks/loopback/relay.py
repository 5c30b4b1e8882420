"""A relay on loopback that counts what passes between clients and a server, request by request.

HTTP/1.1 in the clear, as SuperNodes speak with a SuperLink that runs ``--insecure``, is taken
apart by requests. TLS is taken apart by who speaks: what a client sends when it has been answered
begins a new exchange, as a request of HTTP/1.1 does that waits for its response. Of anything else
a connection is one exchange. Bytes are those of TCP's content: headers of TCP and IP are not among
them.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

__all__ = ["HANDSHAKE", "Exchange", "LoopbackListener", "Relay", "pump", "running_relay"]

_REQUEST = re.compile(rb"[A-Z]+ (\S+) HTTP/1\.[01]\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_LONGEST_HEAD = 1 << 16

HANDSHAKE = "handshake"
_TLS = b"\x16"  # begins a record with a handshake message (RFC 8446, section 5.1)
_RECORD_HEAD = 5  # bytes: content type, version, length
_SECRET = 0x17  # a record with encrypted content


@dataclass
class Exchange:
    """A request and its response.

    Attributes:
        target: of the request, such as ``/v1/fleet/pull-object``; `HANDSHAKE` is what opens a
            connection with TLS; "" where it is not known.
        up: bytes from client to server, with HTTP's header.
        down: bytes from server to client, with HTTP's header.
        connection: a number that the exchanges of one connection have in common.
    """

    target: str = ""
    up: int = 0
    down: int = 0
    connection: int = field(default=0, compare=False)


class LoopbackListener:
    """Accepts connections on a port of 127.0.0.1, each in a thread of its own.

    Attributes:
        address: ``127.0.0.1:PORT``.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        """Answer one connection; it is closed afterwards, and an OSError ends it."""
        raise NotImplementedError

    def close(self) -> None:
        """Listen no longer."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            self.serve(client)


class Relay(LoopbackListener):
    """Passes every connection on to a server.

    Args:
        host: of the server.
        port: of the server.

    Attributes:
        exchanges: every request so far, in the order in which they began.
    """

    def __init__(self, host: str, port: int) -> None:
        self.exchanges: list[Exchange] = []
        self._numbers = count()
        self._server = host, port
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        """See `LoopbackListener.serve`."""
        with socket.create_connection(self._server) as server:
            counted = _Connection(self.exchanges, next(self._numbers))
            back = threading.Thread(
                target=pump, args=(server, client, counted.received), daemon=True
            )
            back.start()
            pump(client, server, counted.sent)
            back.join()


class _Connection:
    """What passes in one connection; HTTP/1.1 without pipelining, or unknown."""

    def __init__(self, exchanges: list[Exchange], number: int) -> None:
        self._exchanges = exchanges
        self._number = number
        self._now: Exchange | None = None
        self._head = b""
        self._left: int | None = 0  # bytes of the request's body; None: all that follows
        self._tls: _Encrypted | None = None

    def _begun(self) -> Exchange:
        self._now = Exchange(connection=self._number)
        self._exchanges.append(self._now)
        return self._now

    def received(self, data: bytes) -> None:
        now = self._now or self._begun()
        if self._tls is not None:
            self._tls.received(data, now)
        else:
            now.down += len(data)

    def sent(self, data: bytes) -> None:
        if self._tls is None and not (self._now and self._now.up) and data[:1] == _TLS:
            self._tls = _Encrypted(self._now or self._begun())
        if self._tls is not None:
            for size, begins in self._tls.sent(data):
                now = self._now or self._begun()
                if begins and now.down:
                    now = self._begun()
                now.up += size
            return
        while data:
            now = self._now or self._begun()
            if now.up and self._left == 0 and not self._head:
                now = self._begun()
            if self._left != 0:
                part = data[: self._left]
                self._left = None if self._left is None else self._left - len(part)
            else:
                part = self._of_head(now, data)
            now.up += len(part)
            data = data[len(part) :]

    def _of_head(self, now: Exchange, data: bytes) -> bytes:
        """The beginning of `data` that still belongs to the head of a request."""
        before, self._head = len(self._head), self._head + data
        end = self._head.find(b"\r\n\r\n") + 4
        if end < 4 and len(self._head) < _LONGEST_HEAD and self._head[:1].isupper():
            return data
        head, self._head = self._head[:end], b""
        request, length = _REQUEST.match(head), _LENGTH.search(head)
        if request is None or _CHUNKED.search(head):
            self._left = None
            return data
        now.target = request[1].decode("latin-1")
        self._left = int(length[1]) if length else 0
        return data[: end - before]


class _Encrypted:
    """A connection with TLS 1.3: its handshake, and where a request may begin."""

    def __init__(self, handshake: Exchange) -> None:
        self._handshake = handshake
        self._up, self._down = _Records(), _Records()
        self._finished = False  # the client has ended the handshake
        self._tickets = 2  # that the server sends then, each in a record, by OpenSSL's default

    def sent(self, data: bytes) -> Iterator[tuple[int, bool]]:
        """Sizes of pieces, and whether each is the beginning of a record after the handshake.

        What belongs to the handshake is counted as such, and not among them.
        """
        for kind, size, begins, ends in self._up.cut(data):
            if self._finished:
                yield size, begins
                continue
            self._handshake.up += size
            if kind == _SECRET and ends:
                self._finished, self._handshake.target = True, HANDSHAKE

    def received(self, data: bytes, now: Exchange) -> None:
        """Count what the server sent."""
        for _, size, _, ends in self._down.cut(data):
            opening = not self._finished or self._tickets
            (self._handshake if opening else now).down += size
            if self._finished and ends and self._tickets:
                self._tickets -= 1


class _Records:
    """Cuts one direction of TLS into its records (RFC 8446, section 5.1)."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0

    def cut(self, data: bytes) -> Iterator[tuple[int, int, bool, bool]]:
        """Pieces: content type of the record, bytes, whether it begins, and ends, with them."""
        while data:
            begins = not self._head
            if len(self._head) < _RECORD_HEAD:
                part = data[: _RECORD_HEAD - len(self._head)]
                self._head += part
                self._left = int.from_bytes(self._head[3:], "big")
            else:
                part = data[: self._left]
                self._left -= len(part)
            ends = len(self._head) == _RECORD_HEAD and not self._left
            kind = self._head[0]
            if ends:
                self._head = b""
            yield kind, len(part), begins, ends
            data = data[len(part) :]


def pump(
    source: socket.socket, target: socket.socket, seen: Callable[[bytes], None] | None = None
) -> None:
    """Pass on what comes until one side ends.

    Args:
        source: is read.
        target: is written to.
        seen: called with every piece before it is passed on.
    """
    with suppress(OSError):
        while data := source.recv(65536):
            if seen is not None:
                seen(data)
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def running_relay(host: str, port: int) -> Iterator[Relay]:
    """A relay while the block runs."""
    relay = Relay(host, port)
    try:
        yield relay
    finally:
        relay.close()
