"""The endpoint's HTTP: one thread for each connection, everything bounded.

The standard library reads request line and headers; deadlines and bounds are ours.
"""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from typing import Any, Self

import numpy as np

from prunecast.client.edge.errors import RequestRefused
from prunecast.client.edge.inference.address import listen
from prunecast.client.edge.inference.protocol import (
    SMALL,
    Budget,
    EndpointLimits,
    EndpointReply,
    InferenceProtocol,
)
from prunecast.client.edge.model import EdgeModel
from prunecast.common.listening import Admission, Place, Standing, allow_descriptors, end_socket
from prunecast.compression.release.overseer import OVERSEER

__all__ = ["InferenceServer"]

_LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_ODD = re.compile(r"[\r\n\0]")  # in a header's value: a folded line, or worse
_LINGER = 2.0  # seconds in which the rest of a refused request is read and dropped
_HEAD_BYTES = 16 * 1024  # of request line and headers
_STEP = 1 << 18  # bytes of a body for which memory is taken at a time
_KEPT = 8  # large bodies leave one part in so many to small ones
_SPARE = 8  # connections beyond the limit, for those that ask at once
_BRIEF = 1.0  # seconds that one of these has to send its request
_EMPTY = memoryview(b"")


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
        allow_descriptors()
        # whoever has asked for something keeps its place; silence makes room
        self._places = Admission(self.limits.connections, self.limits.connections)
        self._listener = listen(address)
        self.address = self._listener.address
        self._lock = threading.Lock()
        self._open: dict[_Connection, threading.Thread] = {}
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, name="endpoint", daemon=True)
        self._accepting.start()

    @property
    def closing(self) -> bool:
        """Whether no further requests are taken."""
        return self._closing

    @property
    def connections(self) -> int:
        """How many are open at this moment."""
        return len(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End: requests in progress are answered, for as long as the limits allow.

        Inferences that last longer are broken off.
        """
        with self._lock:
            self._closing = True
            connections = dict(self._open)
        self._listener.close()
        self._accepting.join()
        for connection in connections:
            connection.end_if_idle()
        deadline = time.monotonic() + self.limits.closing_seconds
        for thread in connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in connections.values()):
            OVERSEER.end_all("the endpoint ends")
            deadline = time.monotonic() + _LINGER
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
        connection = _Connection(accepted, self)
        thread = threading.Thread(target=connection.serve, name="connection", daemon=True)
        with self._lock:
            place = self._places.enter("", partial(end_socket, accepted))
            brief = sum(one.place is None for one in self._open)
            full = place is None and brief >= _SPARE
            connection.place = place
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
                self.forget(connection)
                connection.turn_away()

    def forget(self, connection: _Connection) -> None:
        """A connection has ended."""
        with self._lock:
            self._open.pop(connection, None)
            if connection.place is not None:
                self._places.leave(connection.place)

    def keep(self, connection: _Connection) -> None:
        """A connection has asked for something, so it need not make room for others."""
        with self._lock:
            if connection.place is not None:
                self._places.move(connection.place, Standing.BUSY)


class _Deadline(io.RawIOBase):
    """Reads from a socket until a moment in time, however slowly the bytes trickle in.

    Attributes:
        at: that moment, in monotonic seconds.
        head: bytes that request line and headers may still have; None while a body is read.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.at = 0.0
        self.head: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request is too slow")
        if self.head is not None and self.head <= 0:
            raise HTTPException  # the standard library makes a 431 of it
        self._socket.settimeout(left)
        came = self._socket.recv_into(buffer)
        if self.head is not None:
            self.head -= came
        return came


class _Connection(BaseHTTPRequestHandler):
    """One accepted connection; the standard library reads request line and headers."""

    protocol_version = "HTTP/1.1"
    server: InferenceServer  # type: ignore[assignment]

    def __init__(self, accepted: socket.socket, server: InferenceServer) -> None:
        # not that of the base class, which would answer requests at once
        self.connection, self.server, self.client_address = accepted, server, ("", 0)
        self._limits = server.limits
        self._raw = _Deadline(accepted)
        self.rfile = io.BufferedReader(self._raw)
        self.wfile = io.BytesIO()  # only errors of the base class
        self._lock = threading.Lock()
        self._busy = self._lingers = False
        self.place: Place | None = None  # None: one request, at once, all places are taken

    def serve(self) -> None:
        """Answer requests until the connection ends."""
        try:
            if self.connection.family != socket.AF_UNIX:
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.handle()
            if self._lingers:
                self._drop_rest()
        except (OSError, ValueError):
            pass  # the other side has gone, or speaks no HTTP
        finally:
            self.connection.close()
            self.server.forget(self)

    def _drop_rest(self) -> None:
        """Read what the client still sends: closing at once could lose the answer on its way."""
        self.connection.shutdown(socket.SHUT_WR)
        rest, scratch = _Deadline(self.connection), bytearray(1 << 16)
        rest.at = time.monotonic() + _LINGER
        while rest.readinto(scratch):
            pass

    def turn_away(self) -> None:
        """Answer 503 without reading, and close."""
        with suppress(OSError):
            self.connection.setblocking(False)
            busy = EndpointReply.error(503, "busy: too many connections")
            self.connection.send(_head(busy, close=True) + busy.body)
        self.connection.close()

    def end_if_idle(self) -> None:
        """Wake the thread if it waits for a request, so that it ends."""
        with self._lock:
            if not self._busy:
                self.break_off()

    def break_off(self) -> None:
        """End the connection now."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        self.close_connection = True
        limits = self._limits
        idle, time_to_send = limits.idle_seconds, limits.request_seconds
        if self.place is None:
            idle = time_to_send = min(_BRIEF, time_to_send)
        self._raw.at = time.monotonic() + idle
        if not self._has_begun():
            return
        with self._lock:
            self._busy = not self.server.closing
        if not self._busy:  # it comes too late
            return
        try:
            self._raw.at = time.monotonic() + time_to_send
            self._raw.head = _HEAD_BYTES
            super().handle_one_request()
        except HTTPException:  # in the request line; in headers, the base class makes the same
            self._refuse(RequestRefused(414, f"a request's head may have {_HEAD_BYTES} bytes"))
        finally:
            with self._lock:
                self._busy = False

    def _has_begun(self) -> bool:
        """Whether a request comes; for a brief connection it has to come at once."""
        with suppress(TimeoutError) if self.place is None else nullcontext():
            if self.rfile.peek(1):  # type: ignore[attr-defined]
                return True
        if self.place is None:
            self._refuse(RequestRefused(503, "busy: too many connections"))
        return False

    def parse_request(self) -> bool:
        """Request line and headers; what could be read in two ways is refused."""
        if not super().parse_request():
            return False
        self._raw.head = None
        lengths = len(self.headers.get_all("content-length", []))
        odd = any(_ODD.search(value) for value in self.headers.values())
        if self.headers.defects or odd or lengths + ("transfer-encoding" in self.headers) > 1:
            self._refuse(RequestRefused(400, "the headers are malformed, or state two lengths"))
            return False
        self.server.keep(self)
        return True

    def do_GET(self) -> None:
        """Health and metadata."""
        if self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers:
            self._refuse(RequestRefused(400, "a GET has no body"))
        elif self._is_local():
            self._send(self.server.protocol.answer("GET", self._path(), _EMPTY))

    def do_POST(self) -> None:
        """Inference."""
        if not self._is_local():
            return
        try:
            size = self._body_size()
            part = body = np.empty(size, np.uint8).data  # pages that are not written take nothing
            with ExitStack() as held:
                memory, waits = self.server.memory, self._limits.waiting_seconds
                total = self._limits.total_bytes
                kept = min(total // _KEPT, max(0, total - size)) if size > SMALL else 0
                for start in range(0, size, _STEP):
                    # step by step, when something of it has come: who sends nothing keeps nothing
                    part = body[start : start + _STEP]
                    if not self.rfile.peek(1):  # type: ignore[attr-defined]
                        self.close_connection = True
                        return
                    held.enter_context(memory.take(len(part), waits, leave=kept))
                    if self.rfile.readinto(part) != len(part):
                        self.close_connection = True
                        return
                stated = self.headers.get("inference-header-content-length")
                answer = self.server.protocol.answer("POST", self._path(), body, stated)
            del body, part
            with answer.held:
                self._send(answer)
        except RequestRefused as error:
            self._refuse(error)

    def handle_expect_100(self) -> bool:
        try:
            self._body_size()
        except RequestRefused as error:
            self._refuse(error)
            return False
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._refuse(RequestRefused(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body_size(self) -> int:
        if "transfer-encoding" in self.headers:
            raise RequestRefused(411, "send Content-Length instead of Transfer-Encoding")
        if self.headers.get("content-encoding", "identity") != "identity":
            raise RequestRefused(415, "compressed bodies are not accepted")
        text = self.headers.get("content-length")
        if text is None:
            raise RequestRefused(411, "Content-Length is missing")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise RequestRefused(400, "Content-Length must be one number")
        if int(text) > self._limits.body_bytes:
            raise RequestRefused(413, f"a body may have {self._limits.body_bytes} bytes")
        return int(text)

    def _is_local(self) -> bool:
        """Keep web pages out, which a browser on the device would let ask the loopback address."""
        if self.connection.family == socket.AF_UNIX:
            return True
        hosts = self.headers.get_all("host", [])
        if "origin" in self.headers or not all(_LOCAL.fullmatch(host) for host in hosts):
            self._refuse(RequestRefused(403, "not for web pages: call 127.0.0.1 or localhost"))
            return False
        return True

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _refuse(self, error: RequestRefused) -> None:
        self.close_connection = True  # what follows may be the rest of this request
        self._lingers = True
        self._send(EndpointReply.error(error.status, str(error)))

    def _send(self, answer: EndpointReply) -> None:
        if self.server.closing or self.place is None:
            self.close_connection = True
        self.connection.settimeout(self._limits.request_seconds)
        head = _head(answer, close=self.close_connection)
        if len(answer.body) <= _STEP:
            self.connection.sendall(head + answer.body)
        else:
            self.connection.sendall(head)
            self.connection.sendall(answer.body)


def _head(answer: EndpointReply, *, close: bool) -> bytes:
    phrase = HTTPStatus(answer.status).phrase
    headers = {**answer.headers, "Content-Length": str(len(answer.body))}
    if close:
        headers["Connection"] = "close"
    if answer.status == 503:
        headers["Retry-After"] = "1"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {answer.status} {phrase}\r\n{lines}\r\n".encode()
