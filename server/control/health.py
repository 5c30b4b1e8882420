"""The standard health service (``grpc.health.v1``), for whoever watches the server.

It is asked without a credential. So its streams are few and counted for each address, and one that
is not read holds up nobody else, nor the server's end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from prunecast.common.fleet_protocol import SERVICE
from prunecast.server.control.errors import Answering
from prunecast.server.control.quota import Concurrency, ControlLimits

__all__ = ["HealthService"]

_STATUS = health_pb2.HealthCheckResponse


class HealthService:
    """Says whether the server serves; it does until `end`.

    Args:
        limits: see `ControlLimits`.
        address: where a call comes from, by gRPC's name for it.
        answering: ends calls with a status.
    """

    def __init__(
        self, limits: ControlLimits, address: Callable[[str], str], answering: Answering
    ) -> None:
        self._address, self._answering = address, answering
        self._all = Concurrency(limits.health_watches)
        self._each = Concurrency(limits.health_watches_per_client)
        self._over = asyncio.Event()

    def end(self) -> None:
        """Say ``NOT_SERVING`` from now on, also to those who watch."""
        self._over.set()

    async def Check(self, request: Any, context: Any) -> Any:
        """See ``grpc/health/v1/health.proto``."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return self._answer(request.service)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """See ``grpc/health/v1/health.proto``."""
        async with self._answering(context):
            client = self._address(context.peer())
            with self._all.entered(""), self._each.entered(client):
                yield self._answer(request.service)
                await self._over.wait()
                yield self._answer(request.service)

    def _answer(self, service: str) -> Any:
        if service not in ("", SERVICE):
            return _STATUS(status=_STATUS.SERVICE_UNKNOWN)
        return _STATUS(status=_STATUS.NOT_SERVING if self._over.is_set() else _STATUS.SERVING)
