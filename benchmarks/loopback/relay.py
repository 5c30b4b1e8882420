"""A relay on loopback that counts what passes between clients and a server, request by request.

HTTP/1.1 in the clear, as SuperNodes speak with a SuperLink that runs ``--insecure``, is taken
apart by requests. Of anything else, such as TLS, a connection is one exchange without a target.
Bytes are those of TCP's content: headers of TCP and IP are not among them.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

__all__ = ["Exchange", "LoopbackListener", "Relay", "pump", "running_relay"]

_REQUEST = re.compile(rb"[A-Z]+ (\S+) HTTP/1\.[01]\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_LONGEST_HEAD = 1 << 16


@dataclass
class Exchange:
    """A request and its response.

    Attributes:
        target: of the request, such as ``/v1/fleet/pull-object``; "" where it is not known.
        up: bytes from client to server, with HTTP's header.
        down: bytes from server to client, with HTTP's header.
    """

    target: str = ""
    up: int = 0
    down: int = 0


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
        self._server = host, port
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        """See `LoopbackListener.serve`."""
        with socket.create_connection(self._server) as server:
            counted = _Connection(self.exchanges)
            back = threading.Thread(
                target=pump, args=(server, client, counted.received), daemon=True
            )
            back.start()
            pump(client, server, counted.sent)
            back.join()


class _Connection:
    """What passes in one connection; HTTP/1.1 without pipelining, or unknown."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        self._exchanges = exchanges
        self._now: Exchange | None = None
        self._head = b""
        self._left: int | None = 0  # bytes of the request's body; None: all that follows

    def _begun(self) -> Exchange:
        self._now = Exchange()
        self._exchanges.append(self._now)
        return self._now

    def received(self, data: bytes) -> None:
        now = self._now or self._begun()
        now.down += len(data)

    def sent(self, data: bytes) -> None:
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
