"""The control server: gRPC over TLS around the fleet, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Self

import grpc
from grpc_health.v1 import health_pb2_grpc

from prunecast.common.fleet_protocol import add_servicer
from prunecast.common.listening import Admission, SparingLog, allow_descriptors, bind
from prunecast.common.service_manager import ServiceManager
from prunecast.server.control.authentication import server_credentials
from prunecast.server.control.errors import Answering, Unbindable
from prunecast.server.control.gate import Gate
from prunecast.server.control.health import HealthService
from prunecast.server.control.quota import ControlLimits
from prunecast.server.control.repository import LiveReleases
from prunecast.server.control.servicer import Servicer
from prunecast.server.control.watches import WatchRegistry
from prunecast.server.fleet.service import FleetService

__all__ = ["ControlServer"]

_LOG = logging.getLogger(__name__)
_THREADS = 8
_START = 30.0
_PER_CONNECTION = 3  # descriptors: the client's, and both ends of what leads to gRPC
_OTHER_FILES = 128  # descriptors for the database, files that are sent, gRPC itself


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
        manager: told that the server is ready, and alive as long as its loop and the threads of the
            database take their turns; None for nobody.

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
        manager: ServiceManager | None = None,
    ) -> None:
        self._live = LiveReleases(repository)
        self._credentials = server_credentials(certificate, key, client_ca)
        self._certificates = client_ca is not None
        self.host, self.port = host, port
        self._repository, self._limits = repository, limits or ControlLimits()
        self._interval, self._manager = interval, manager or ServiceManager({})
        self._service = FleetService(database, self._live)
        self._threads = 1 if database.startswith("sqlite") else _THREADS
        self._stop: Callable[[], None] = lambda: None
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT``; the port is known once it serves."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

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
        limits, log = self._limits, SparingLog(_LOG)
        gate = Gate(_places(limits), handshake=limits.handshake, log=log)
        with (
            closing(gate),
            ThreadPoolExecutor(self._threads, "control database") as database,
            ThreadPoolExecutor(_THREADS, "control files") as files,
            self._bound() as bound,
        ):
            watches = WatchRegistry(self._service, self._live, database, interval=self._interval)
            server = grpc.aio.server(options=_options(limits))
            answering = Answering(gate.address, log)
            servicer = Servicer(
                *(watches, self._repository, files, limits, gate, answering),
                certificates=self._certificates,
            )
            add_servicer(servicer, server)
            alive = HealthService(limits, gate.address, answering)
            health_pb2_grpc.add_HealthServicer_to_server(alive, server)
            server.add_secure_port(gate.target, self._credentials)
            await server.start()
            gate.open(bound)
            tasks = [
                asyncio.create_task(watches.follow()),
                asyncio.create_task(watches.feed(self._manager)),
            ]
            try:
                self._manager.tell(READY=1)
                ready(self.address)
                await over.wait()
            finally:
                self._manager.tell(STOPPING=1)
                gate.shut()
                alive.end()
                watches.close()
                await server.stop(limits.drain)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                log.close()

    def _bound(self) -> socket.socket:
        try:
            bound = bind(self.host.strip("[]"), self.port)
        except OSError as error:
            why = error.strerror or error
            raise Unbindable(f"cannot bind {self.address}: {why}; is it in use?") from error
        self.port = int(bound.getsockname()[1])
        return bound


def _places(limits: ControlLimits) -> Admission:
    """As many as are wanted, by default as many as the system has descriptors for."""
    allowed = allow_descriptors()
    most = max(0, allowed - _OTHER_FILES) // _PER_CONNECTION
    if most < (limits.connections or 1):
        raise Unbindable(
            f"the system allows {allowed} open files, which is enough for {most} connections: "
            "raise the limit (ulimit -Hn) or allow fewer connections"
        )
    most = limits.connections or most
    share = limits.connections_per_client or max(1, most // 2)
    return Admission(most, share, patience=limits.patience)


def _options(limits: ControlLimits) -> list[tuple[str, int]]:
    alive = int(limits.keep_alive * 1000)
    return [
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.max_concurrent_streams", 8),  # of one connection, so of one device
        ("grpc.server_handshake_timeout_ms", int(limits.handshake * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.unused * 1000)),
        # a connection whose device has gone is found by these pings
        ("grpc.keepalive_time_ms", alive),
        ("grpc.keepalive_timeout_ms", alive),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _quietly(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(work)
