"""The release server: what is answered where; sockets, TLS, threads, signals."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import signal
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST

from prunecast.server.repository.errors import ServerError
from prunecast.server.repository.serving.connection import (
    Connection,
    Quota,
    Request,
    Respond,
    ServingLimits,
)
from prunecast.server.repository.serving.files import (
    TIMESTAMP,
    Reply,
    file_reply,
    in_words,
    path_of,
)
from prunecast.server.repository.serving.monitoring import BlobKinds, HealthCheck, Metrics

__all__ = ["Application", "ReleaseServer"]

_log = logging.getLogger(__name__)


class Application:
    """A repository as clients see it.

    Attributes:
        metrics: what is counted.
        draining: the server is about to end; health says so.
    """

    def __init__(self, root: Path, limits: ServingLimits) -> None:
        self._root = root
        self.metrics = Metrics()
        self.draining = False
        self._health = HealthCheck(root)
        self._kinds = BlobKinds(root)
        rates = {"requests": limits.requests_per_second, "bytes": limits.bytes_per_second}
        self._quotas = {name: Quota(rate) for name, rate in rates.items() if rate is not None}
        self._looking: asyncio.Task[None] | None = None

    async def public(self, request: Request, client: str) -> Reply:
        """Files of the repository, and its health."""
        name = path_of(request.target)
        if refusal := self._over(client, "requests", 1):
            return refusal
        if name == "healthz":
            return await self._healthz()
        try:
            reply = file_reply(self._root, name, request.headers)
        except OSError as error:
            _log.error("%s: %s", request.target[:200], error.strerror or error)
            return in_words(503, "the file cannot be read now", retry_after="60")
        reply.kind = self._kind(reply, name)
        if request.method == "GET" and reply.status in (200, 206) and "bytes" in self._quotas:
            length = reply.length
            if refusal := self._over(client, "bytes", length):
                reply.close()
                return refusal
            give_back = partial(self._quotas["bytes"].give_back, client)
            reply.settle = lambda sent: give_back(length - sent)
        return reply

    async def private(self, request: Request, client: str) -> Reply:
        """Metrics, and the same health."""
        path = path_of(request.target)
        if path == "healthz":
            return await self._healthz()
        if path != "metrics":
            return in_words(404, "see /metrics and /healthz")
        health = await self._health.get()
        expires = {role: at.timestamp() for role, at in health.expires.items()}
        text = self.metrics.text(ready=health.ready, expires=expires)
        headers = {"content-type": CONTENT_TYPE_LATEST, "cache-control": "no-store"}
        return Reply(200, text, headers, "metrics")

    def look(self) -> None:
        """Learn what blobs are for, beside everything else."""
        if self._kinds.stale and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(asyncio.to_thread(self._kinds.look))

    def _over(self, client: str, quota: str, amount: int) -> Reply | None:
        """The refusal, if a client has used up its quota."""
        if quota not in self._quotas or not (wait := self._quotas[quota].take(client, amount)):
            return None
        self.metrics.refused(quota)
        seconds = max(1, math.ceil(wait))
        text = f"this address has used up its {quota}; ask again in {seconds} s"
        return in_words(429, text, retry_after=str(seconds))

    def _kind(self, reply: Reply, name: str) -> str:
        if reply.kind == "manifest" and reply.status < 400:
            self._kinds.read(name)  # devices ask for a manifest before its blobs
        if reply.kind != "blob":
            return reply.kind
        kind = self._kinds.of(name.rpartition("/")[2])
        if kind == "blob":
            self.look()
        return kind

    async def _healthz(self) -> Reply:
        health = await self._health.get()
        headers = {"content-type": "application/json", "cache-control": "no-store"}
        if self.draining:
            return in_words(503, "the server is about to end", "health")
        return Reply(200 if health.ready else 503, health.json(), headers, "health")


_BACKLOG = 2048
_ROUNDS = 5  # of the event loop, from accept(2) to a connection
_LAST = 5.0  # seconds for connections that were cut off
_OTHER_FILES = 64  # open files beside those of connections


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
        _allow_files(2 * self._limits.connections + _OTHER_FILES)
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
        self._connections: dict[Connection, asyncio.Task[None]] = {}
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
        servers = [await self._listen(self._socket, self._app.public, self._tls)]
        if self._metrics_socket is not None:
            servers.append(await self._listen(self._metrics_socket, self._app.private, None))
        self._app.look()
        while not self._asked:  # it may have been asked before there was an event
            await self._wake.wait()
        # a connection that is accepted while its server closes would stay open, without a task:
        # accept no more, let those that were accepted become connections, then close
        for bound in (self._socket, self._metrics_socket):
            if bound is not None:
                self._loop.remove_reader(bound)
        for _ in range(_ROUNDS):
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        await self._drain()

    async def _drain(self) -> None:
        """Let downloads in progress finish, for a while."""
        assert self._wake is not None
        self._app.draining = True
        for connection in list(self._connections):
            connection.finish()
        deadline = asyncio.get_running_loop().time() + self._limits.drain
        while self._connections and self._asked < 2:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._wake.clear()
            asked = asyncio.create_task(self._wake.wait())
            tasks = {asked, *self._connections.values()}
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
        if self._connections:
            _log.warning("%d downloads were cut off", len(self._connections))
            for task in self._connections.values():
                task.cancel()
            await asyncio.wait(list(self._connections.values()), timeout=_LAST)

    async def _listen(
        self, bound: socket.socket, respond: Respond, context: ssl.SSLContext | None
    ) -> asyncio.Server:
        # no coroutine: a connection must be known from its first moment on, also to `_drain`
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # whoever watches the server must reach it when it is full, too
            public = bound is self._socket
            metrics = self._app.metrics
            connection = Connection(reader, writer, self._limits, metrics, respond, limited=public)
            self._connections[connection] = asyncio.create_task(self._serve(connection))

        return await asyncio.start_server(
            accept,
            sock=bound,
            ssl=context,
            backlog=_BACKLOG,
            ssl_handshake_timeout=self._limits.request_timeout if context else None,
            ssl_shutdown_timeout=self._limits.stall_timeout if context else None,
        )

    async def _serve(self, connection: Connection) -> None:
        metrics, limited = self._app.metrics, connection.limited
        metrics.connections += limited
        try:
            full = limited and metrics.connections > self._limits.connections
            if full:
                metrics.refused("connections")
            if full and not self._make_room(connection.client):
                await connection.refuse(in_words(503, "too many connections", retry_after="10"))
            else:
                await connection.serve()
        except Exception:
            _log.exception("a connection was ended by an error of this server")
        finally:
            del self._connections[connection]
            metrics.connections -= limited

    def _make_room(self, newcomer: str) -> bool:
        """End a connection of the client that has most, if it has more than one who comes now.

        Only of those that wait for a request: so one client's silence does not keep others out,
        and no download is cut off.
        """
        held = Counter(connection.client for connection in self._connections)
        waiting = (one for one in self._connections if one.waits and one.limited)
        found = max(waiting, key=lambda one: held[one.client], default=None)
        if found is None or held[found.client] <= held[newcomer]:
            return False
        found.break_off()
        return True


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServerError(f"cannot bind {host}:{port}: {error.strerror or error}") from error


def _port(bound: socket.socket) -> int:
    return int(bound.getsockname()[1])


def _allow_files(count: int) -> None:
    """Raise the limit of open files of this process, if it must be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ServerError(
            f"the system allows {hard} open files and {count} may be needed: "
            "raise the limit (ulimit -n) or allow fewer connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


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
        ServerError: a file is missing or unusable; the context keeps what it had.
    """
    for file in (certificate, key):
        if not file.is_file():
            raise ServerError(f"{file} does not exist")
    try:
        # a throw-away context first: a failure must not leave a certificate without its key
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ServerError(f"the certificate or its key is unusable: {error}") from error
