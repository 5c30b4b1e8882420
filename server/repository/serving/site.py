"""What is answered where: repository and health in public, metrics on a port of their own."""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from pathlib import Path

from prunecast.server.repository.serving.answers import (
    Answer,
    FilePart,
    Request,
    path_of,
    plain,
    repository_answer,
)
from prunecast.server.repository.serving.health import HealthCheck
from prunecast.server.repository.serving.kinds import BlobKinds
from prunecast.server.repository.serving.limits import Limits, Quota, client_of
from prunecast.server.repository.serving.metrics import CONTENT_TYPE, Metrics

__all__ = ["Site"]

_log = logging.getLogger(__name__)


class Site:
    """A repository as clients see it.

    Args:
        root: the repository.
        limits: see `Limits`.

    Attributes:
        metrics: what is counted.
        draining: the server is about to end; health says so.
    """

    def __init__(self, root: Path, limits: Limits) -> None:
        self._root = root
        self.metrics = Metrics()
        self.draining = False
        self._health = HealthCheck(root)
        self._kinds = BlobKinds(root)
        rates = {"requests": limits.requests_per_second, "bytes": limits.bytes_per_second}
        self._quotas = {name: Quota(rate) for name, rate in rates.items() if rate is not None}
        self._looking: asyncio.Task[None] | None = None

    async def public(self, request: Request, address: str) -> Answer:
        """Files of the repository, and its health."""
        client = client_of(address)
        if refusal := self._over(client, "requests", 1):
            return refusal
        if path_of(request.target) == "healthz":
            return await self._healthz()
        try:
            answer = repository_answer(self._root, request)
        except OSError as error:
            _log.error("%s: %s", request.target[:200], error.strerror or error)
            return plain(503, "the file cannot be read now", retry_after="60")
        answer.kind = self._kind(answer, path_of(request.target))
        if request.method == "GET" and answer.status in (200, 206) and "bytes" in self._quotas:
            length = answer.length
            if refusal := self._over(client, "bytes", length):
                if isinstance(answer.body, FilePart):
                    answer.body.close()
                return refusal
            give_back = partial(self._quotas["bytes"].give_back, client)
            answer.settle = lambda sent: give_back(length - sent)
        return answer

    async def private(self, request: Request, address: str) -> Answer:
        """Metrics, and the same health."""
        path = path_of(request.target)
        if path == "healthz":
            return await self._healthz()
        if path != "metrics":
            return plain(404, "see /metrics and /healthz")
        health = await self._health.get()
        expires = {role: at.timestamp() for role, at in health.expires.items()}
        text = self.metrics.text(ready=health.ready, expires=expires)
        headers = {"content-type": CONTENT_TYPE, "cache-control": "no-store"}
        return Answer(200, text.encode(), headers, "metrics")

    def look(self) -> None:
        """Learn what blobs are for, beside everything else."""
        if self._kinds.stale and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(asyncio.to_thread(self._kinds.look))

    def _over(self, client: str, quota: str, amount: int) -> Answer | None:
        """The refusal, if a client has used up its quota."""
        if quota not in self._quotas:
            return None
        wait = self._quotas[quota].take(client, amount)
        if not wait:
            return None
        self.metrics.refused(quota)
        seconds = max(1, math.ceil(wait))
        text = f"this address has used up its {quota}; ask again in {seconds} s"
        return plain(429, text, retry_after=str(seconds))

    def _kind(self, answer: Answer, name: str) -> str:
        if answer.kind == "manifest" and answer.status < 400:
            self._kinds.read(name)  # devices ask for a manifest before its blobs
        if answer.kind != "blob":
            return answer.kind
        kind = self._kinds.of(name.rpartition("/")[2])
        if kind == "blob":
            self.look()
        return kind

    async def _healthz(self) -> Answer:
        health = await self._health.get()
        headers = {"content-type": "application/json", "cache-control": "no-store"}
        if self.draining:
            return plain(503, "the server is about to end", "health")
        return Answer(200 if health.ready else 503, health.json(), headers, "health")
