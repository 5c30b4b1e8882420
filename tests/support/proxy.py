"""A proxy of HTTP on loopback: CONNECT, and GET of absolute URLs."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from benchmarks.loopback.relay import LoopbackListener, pump

__all__ = ["LoopbackProxy", "running_proxy"]


class LoopbackProxy(LoopbackListener):
    """Leads every name to 127.0.0.1, and remembers what it was asked.

    Args:
        credentials: ``USER:PASSWORD`` without which it answers 407; empty: everybody is let in.
    """

    def __init__(self, credentials: str = "") -> None:
        self.asked: list[str] = []
        self._wanted = base64.b64encode(credentials.encode()).decode() if credentials else ""
        super().__init__()

    @property
    def first_lines(self) -> list[str]:
        """Of every request: method and target."""
        return [head.splitlines()[0].rpartition(" ")[0] for head in self.asked]

    def serve(self, client: socket.socket) -> None:
        """Answer one request, or lead on."""
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := client.recv(4096)):
                return
            head += data
        text = head.decode()
        self.asked.append(text)
        if self._wanted not in text:
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n")
            client.sendall(b"content-length: 0\r\nconnection: close\r\n\r\n")
            return
        method, target, _ = text.splitlines()[0].split(" ")
        if method == "CONNECT":
            port, first = int(target.rpartition(":")[2]), b""
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            parts = urlsplit(target)
            port = parts.port or 80
            first = head.replace(target.encode(), parts.path.encode(), 1)
        with socket.create_connection(("127.0.0.1", port)) as server:
            server.sendall(first)
            back = threading.Thread(target=pump, args=(client, server), daemon=True)
            back.start()
            pump(server, client)
            client.shutdown(socket.SHUT_RDWR)
            back.join(10)


@contextmanager
def running_proxy(credentials: str = "") -> Iterator[LoopbackProxy]:
    """A proxy while the block runs."""
    proxy = LoopbackProxy(credentials)
    try:
        yield proxy
    finally:
        proxy.close()
