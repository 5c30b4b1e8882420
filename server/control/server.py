"""The control server: gRPC over TLS around the fleet, until it is stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from prunecast.common.fleet_protocol import SERVICE, add_servicer
from prunecast.server.control.authentication import server_credentials
from prunecast.server.control.errors import Unbindable
from prunecast.server.control.quota import ControlLimits
from prunecast.server.control.repository import LiveReleases
from prunecast.server.control.servicer import Servicer
from prunecast.server.control.watches import WatchRegistry
from prunecast.server.fleet.service import FleetService

__all__ = ["ControlServer"]

_THREADS = 8
_START = 30.0


class ControlServer:
    """Serves a fleet until stopped; usable as a context manager (in a thread).

    Deadlines of rollouts are honoured while it runs, so silence is noticed without any device.

    Args:
        database: URL of the fleet's database.
        repository: folder of the release repository.
        certificate: PEM file with the TLS certificate chain.
        key: PEM file with its private key.
        client_ca: PEM file with the authorities that issue devices' certificates: devices then
            authenticate by these, with their names as the subject's common name. Without, by
            tokens.
        host: address to bind.
        port: 0 lets the system choose; `port` tells which.
        limits: see `ControlLimits`.
        interval: seconds between looks at the fleet; how long a change takes to reach devices.

    Raises:
        FleetError: the database cannot be used.
        RepositoryCorrupt: no repository there.
        Unbindable: the address cannot be bound, or a TLS file is unusable.
    """

    def __init__(
        self,
        database: str,
        repository: Path,
        *,
        certificate: Path,
        key: Path,
        client_ca: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: ControlLimits | None = None,
        interval: float = 1.0,
    ) -> None:
        self._live = LiveReleases(repository)
        self._credentials = server_credentials(certificate, key, client_ca)
        self._certificates = client_ca is not None
        self.host, self.port = host, port
        self._repository, self._limits = repository, limits or ControlLimits()
        self._interval = interval
        self._service = FleetService(database, self._live)
        self._threads = 1 if database.startswith("sqlite") else _THREADS
        self._stop: Callable[[], None] = lambda: None
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT``; the port is known once it serves."""
        return f"{self.host}:{self.port}"

    def run(self, ready: Callable[[str], None] | None = None) -> None:
        """Serve in this thread until SIGINT, SIGTERM or `stop`; calls in progress are drained.

        Args:
            ready: called with the address once connections are accepted.

        Raises:
            Unbindable: the address cannot be bound.
        """
        try:
            asyncio.run(self._serve(ready or (lambda address: None)))
        finally:
            self._service.close()

    def stop(self) -> None:
        """End `run`: watches end at once, other calls may take `ControlLimits.drain` seconds."""
        self._stopped = True
        self._stop()
        if self._thread:
            self._thread.join(timeout=self._limits.drain + 15)
            self._thread = None

    def __enter__(self) -> Self:
        begun: Future[str] = Future()

        def work() -> None:
            try:
                self.run(begun.set_result)
            except BaseException as error:
                if begun.done():
                    raise
                begun.set_exception(error)

        self._thread = threading.Thread(target=work, name="control server", daemon=True)
        self._thread.start()
        begun.result(_START)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self, ready: Callable[[str], None]) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: _quietly(loop, over.set)
        if self._stopped:
            over.set()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, over.set)
        limits = self._limits
        with (
            ThreadPoolExecutor(self._threads, "control database") as database,
            ThreadPoolExecutor(_THREADS, "control files") as files,
        ):
            watches = WatchRegistry(self._service, self._live, database, interval=self._interval)
            server = grpc.aio.server(
                options=_options(limits), maximum_concurrent_rpcs=limits.streams
            )
            servicer = Servicer(
                watches, self._repository, files, limits, certificates=self._certificates
            )
            add_servicer(servicer, server)
            alive = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(alive, server)
            self._bind(server)
            await server.start()
            await _set(alive, health_pb2.HealthCheckResponse.SERVING)
            follower = asyncio.create_task(watches.follow())
            try:
                ready(self.address)
                await over.wait()
            finally:
                await _set(alive, health_pb2.HealthCheckResponse.NOT_SERVING)
                watches.close()
                await server.stop(limits.drain)
                follower.cancel()
                with suppress(asyncio.CancelledError):
                    await follower

    def _bind(self, server: Any) -> None:
        try:
            bound = server.add_secure_port(self.address, self._credentials)
        except RuntimeError as error:
            raise Unbindable(f"cannot bind {self.address}: is it in use?") from error
        if not bound:
            raise Unbindable(f"cannot bind {self.address}: is it in use?")
        self.port = int(bound)


def _options(limits: ControlLimits) -> list[tuple[str, int]]:
    alive = int(limits.keep_alive * 1000)
    return [
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.max_concurrent_streams", 8),  # of one connection, so of one device
        ("grpc.so_reuseport", 0),  # two servers on one port would share the devices by chance
        # a connection whose device has gone is found by these pings
        ("grpc.keepalive_time_ms", alive),
        ("grpc.keepalive_timeout_ms", alive),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


async def _set(alive: Any, status: Any) -> None:
    for name in ("", SERVICE):
        await alive.set(name, status)


def _quietly(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(work)
