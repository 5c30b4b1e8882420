"""The endpoint's HTTP: one thread for each connection, everything bounded."""

from __future__ import annotations

import socket
import threading
import time
from typing import Self

from prunecast.client.edge.inference.address import listen
from prunecast.client.edge.inference.connection import Connection
from prunecast.client.edge.inference.limits import Budget, EndpointLimits
from prunecast.client.edge.inference.protocol import InferenceProtocol
from prunecast.client.edge.model import EdgeModel

__all__ = ["InferenceServer"]


class InferenceServer:
    """Serves a model to other programs on this device; a context manager.

    Args:
        model: whatever release is active.
        name: under which it is served.
        address: ``unix:PATH`` or a loopback ``HOST:PORT``.
        limits: what requests may cost.

    Raises:
        EndpointError: the address cannot be used.
    """

    def __init__(
        self,
        model: EdgeModel,
        name: str,
        address: str,
        *,
        limits: EndpointLimits | None = None,
    ) -> None:
        self.limits = limits or EndpointLimits()
        self.protocol = InferenceProtocol(model, name, self.limits)
        self.memory = Budget(self.limits.total_bytes, "memory")
        self._listener = listen(address)
        self.address = self._listener.address
        self._lock = threading.Lock()
        self._open: dict[Connection, threading.Thread] = {}
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, name="endpoint", daemon=True)
        self._accepting.start()

    @property
    def closing(self) -> bool:
        """Whether no further requests are taken."""
        return self._closing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End: requests in progress are answered, for as long as the limits allow."""
        with self._lock:
            self._closing = True
            connections = dict(self._open)
        self._listener.close()
        self._accepting.join()
        for connection in connections:
            connection.end_if_idle()
        deadline = time.monotonic() + self.limits.closing_seconds
        for connection, thread in connections.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                connection.break_off()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.socket.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(0.05)  # out of file descriptors, most likely: others will be closed
                continue
            self._take(accepted)

    def _take(self, accepted: socket.socket) -> None:
        connection = Connection(accepted, self, self._forget)
        thread = threading.Thread(target=connection.serve, name="connection", daemon=True)
        with self._lock:
            full = len(self._open) >= self.limits.connections
            if not full and not self._closing:
                self._open[connection] = thread
        if full:
            connection.turn_away()
        elif self._closing:
            accepted.close()
        else:
            try:
                thread.start()
            except RuntimeError:  # the system allows no more threads
                self._forget(connection)
                connection.turn_away()

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._open.pop(connection, None)
