"""The release server: sockets and who may have one, TLS, threads, signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from prunecast.common.files import exposure
from prunecast.common.listening import (
    Acceptor,
    Admission,
    Place,
    SparingLog,
    Standing,
    allow_descriptors,
    bind,
    end_socket,
)
from prunecast.server.repository.errors import ServerError
from prunecast.server.repository.serving.application import Application
from prunecast.server.repository.serving.connection import (
    Connection,
    Respond,
    ServingLimits,
)
from prunecast.server.repository.serving.files import TIMESTAMP, in_words

__all__ = ["ReleaseServer"]

_log = logging.getLogger(__name__)


_ROUNDS = 5  # of the event loop, from the end of a connection until its place is free
_LAST = 5.0  # seconds for connections that were cut off
_REFUSED = 64  # connections that are told of their refusal at the same time; others are closed
_WATCHING = 32  # connections for metrics
_OTHER_FILES = 64  # open files beside those of connections


@dataclass(frozen=True)
class _Door:
    """Where connections come in, and what becomes of them."""

    bound: socket.socket
    respond: Respond
    context: ssl.SSLContext | None
    places: Admission


class ReleaseServer:
    """Serves a repository until stopped; usable as a context manager (in a thread).

    Args:
        folder: the repository.
        host: address to bind.
        port: 0 lets the system choose; `port` tells which.
        certificate: PEM file with the TLS certificate chain; plain HTTP without.
        key: PEM file with its private key.
        limits: what clients may take.
        metrics_host: address for `/metrics`, over plain HTTP.
        metrics_port: its port, 0 as above; None: no metrics are served.

    Attributes:
        url: of the repository, with a slash at the end.
        host: as given.
        port: that is bound.
        metrics_port: that is bound, or None.

    Raises:
        ServerError: no repository there, an address cannot be bound, TLS is incomplete, or the
            system allows too few open files.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: Path | None = None,
        key: Path | None = None,
        limits: ServingLimits | None = None,
        metrics_host: str = "127.0.0.1",
        metrics_port: int | None = None,
    ) -> None:
        folder = Path(folder)
        if not (folder / TIMESTAMP).is_file():
            raise ServerError(f"{folder} is not a release repository: prunecast release init")
        self._limits = limits or ServingLimits()
        _reserve(2 * self._limits.connections + _REFUSED + _WATCHING + _OTHER_FILES)
        self._tls = _tls_context(certificate, key)
        self._pair = (certificate, key) if certificate and key else None
        self._socket = _bind(host, port)
        self._metrics_socket = None
        self.metrics_port = metrics_port
        if metrics_port is not None:
            try:
                self._metrics_socket = _bind(metrics_host, metrics_port)
            except ServerError:
                self._socket.close()
                raise
            self.metrics_port = _port(self._metrics_socket)
        self.host, self.port = host, _port(self._socket)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if self._tls else 'http'}://{shown}:{self.port}/"
        self._app = Application(folder, self._limits)
        self._places = Admission(
            self._limits.connections,
            self._limits.connections_per_client,
            patience=self._limits.patience,
        )
        # whoever watches the server must reach it when it is full, too
        self._watching = Admission(_WATCHING, _WATCHING, patience=self._limits.patience)
        self._sparing = SparingLog(_log)
        self._refusing = 0
        # a socket: the handshake is not over
        self._connections: dict[asyncio.Task[None], Connection | socket.socket] = {}
        self._asked = 0  # how often the server was asked to end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def run(self, ready: Callable[[str], None] | None = None) -> None:
        """Serve in this thread until SIGINT, SIGTERM or `stop`.

        Downloads in progress then have `ServingLimits.drain` seconds to finish; a second signal
        ends them at once. SIGHUP loads the certificate again.

        Args:
            ready: called with the URL; connections are accepted from then on.
        """
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, lambda *_: self._end())
            previous[signal.SIGHUP] = signal.signal(
                signal.SIGHUP, lambda *_: self.reload_certificate()
            )
        try:
            if ready:
                ready(self.url)  # the socket listens: early requests wait in its backlog
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                runner.run(self._main())
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Finish requests in progress and end `run`; waits for the thread if there is one."""
        self._end()
        if self._thread:
            self._thread.join(timeout=self._limits.drain + 5)
            self._thread = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.run, name="release server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reload_certificate(self) -> None:
        """Use the certificate's files as they are now for new connections, if they are usable."""
        if self._tls is None or self._pair is None:
            return
        try:
            _load_certificate(self._tls, *self._pair)
        except ServerError as error:
            _log.error("the old certificate stays: %s", error)

    def _end(self) -> None:
        self._asked += 1
        if self._loop is not None and self._wake is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _main(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        doors = [_Door(self._socket, self._app.public, self._tls, self._places)]
        if self._metrics_socket is not None:
            private = self._app.private
            doors.append(_Door(self._metrics_socket, private, None, self._watching))
        acceptors = [Acceptor(d.bound, partial(self._accept, d), self._sparing) for d in doors]
        self._app.look()
        while not self._asked:  # it may have been asked before there was an event
            await self._wake.wait()
        for acceptor in acceptors:
            acceptor.close()
        await self._drain()
        self._sparing.close()

    async def _drain(self) -> None:
        """Let downloads in progress finish, for a while."""
        assert self._wake is not None
        self._app.draining = True
        for connection in self._connections.values():
            if isinstance(connection, socket.socket):
                end_socket(connection)
            else:
                connection.finish()
        deadline = asyncio.get_running_loop().time() + self._limits.drain
        while self._connections and self._asked < 2:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._wake.clear()
            asked = asyncio.create_task(self._wake.wait())
            tasks = {asked, *self._connections}
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
        if self._connections:
            _log.warning("%d downloads were cut off", len(self._connections))
            for task in self._connections:
                task.cancel()
            await asyncio.wait(list(self._connections), timeout=_LAST)

    def _accept(self, door: _Door, accepted: socket.socket, client: str) -> None:
        """Count a connection before anything is read of it, a handshake neither."""
        place = self._place(door, accepted, client)
        task = asyncio.create_task(self._serve(door, accepted, client, place))
        self._connections[task] = accepted
        task.add_done_callback(self._connections.pop)

    def _place(self, door: _Door, accepted: socket.socket, client: str) -> Place | None:
        place = door.places.enter(client, partial(self._make_room, accepted))
        self._app.metrics.connections = len(self._places)
        return place

    def _make_room(self, connection: socket.socket) -> None:
        self._app.metrics.refused("connections")
        end_socket(connection)

    async def _serve(
        self, door: _Door, accepted: socket.socket, client: str, place: Place | None
    ) -> None:
        for _ in range(_ROUNDS):  # what has ended just now gives up its place first
            if place is None:
                await asyncio.sleep(0)
                place = self._place(door, accepted, client)
        try:
            if place is None:
                await self._refuse(door, accepted, client)
            elif connection := await self._connect(door, accepted, client, place):
                await connection.serve()
        except Exception:
            _log.exception("a connection was ended by an error of this server")
        finally:
            if place is not None:
                door.places.leave(place)
                self._app.metrics.connections = len(self._places)

    async def _refuse(self, door: _Door, accepted: socket.socket, client: str) -> None:
        """Say that there is no place, unless that would take many descriptors itself."""
        self._app.metrics.refused("connections")
        self._sparing.warning("connections", "too many connections: %s has to wait", client)
        if door.context is not None or self._refusing >= _REFUSED:
            accepted.close()
            return
        self._refusing += 1
        try:
            if connection := await self._connect(door, accepted, client, None):
                await connection.refuse(in_words(503, "too many connections", retry_after="10"))
        finally:
            self._refusing -= 1

    async def _connect(
        self, door: _Door, accepted: socket.socket, client: str, place: Place | None
    ) -> Connection | None:
        """The connection after its handshake; None if there was none, or it took too long."""
        try:
            reader, writer = await self._streams(accepted, door.context)
        except (OSError, TimeoutError):
            return None
        shows = partial(door.places.move, place) if place else _nothing
        if door.context is not None:
            shows(Standing.BEGUN)
        metrics, limits = self._app.metrics, self._limits
        connection = Connection(reader, writer, limits, metrics, door.respond, client, shows)
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection
        return connection

    async def _streams(
        self, accepted: socket.socket, context: ssl.SSLContext | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As `asyncio.start_server` makes them."""
        loop, limits = asyncio.get_running_loop(), self._limits
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            accepted,
            ssl=context,
            ssl_handshake_timeout=limits.request_timeout if context else None,
            ssl_shutdown_timeout=limits.stall_timeout if context else None,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _nothing(standing: Standing) -> None:
    """A connection without a place stands nowhere."""


def _bind(host: str, port: int) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        raise ServerError(f"cannot bind {host}:{port}: {error.strerror or error}") from error


def _port(bound: socket.socket) -> int:
    return int(bound.getsockname()[1])


def _reserve(count: int) -> None:
    """Have so many descriptors at hand before the first connection takes one."""
    if (allowed := allow_descriptors()) < count:
        raise ServerError(
            f"the system allows {allowed} open files and {count} may be needed: "
            "raise the limit (ulimit -n) or allow fewer connections"
        )


def _tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with a certificate; None without one.

    Raises:
        ServerError: one of the two is missing or unusable.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ServerError("TLS needs both a certificate and its key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load_certificate(context, certificate, key)
    return context


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Use a certificate for connections from now on; those that are open keep theirs.

    Raises:
        ServerError: a file is missing or unusable, or others can read the key; the context keeps
            what it had.
    """
    for file in (certificate, key):
        if not file.is_file():
            raise ServerError(f"{file} does not exist")
    try:
        # a throw-away context first: a failure must not leave a certificate without its key
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        if exposed := exposure(key, group=True):
            raise ServerError(exposed)
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ServerError(f"the certificate or its key is unusable: {error}") from error
