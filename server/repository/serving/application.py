"""What is answered where: files of a repository, its health, and metrics; quotas of clients."""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST

from prunecast.common.listening import SparingLog
from prunecast.server.repository.serving.connection import Quota, Request, ServingLimits
from prunecast.server.repository.serving.files import Reply, file_reply, in_words, path_of
from prunecast.server.repository.serving.monitoring import BlobKinds, HealthCheck, Metrics

__all__ = ["Application"]

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
        self._sparing = SparingLog(_log)

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
            self._sparing.warning(
                "unreadable", "%s: %s", request.target[:200], error.strerror or error
            )
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
