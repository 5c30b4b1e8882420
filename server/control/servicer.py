"""The three methods of the protocol, on top of the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

from grpc import StatusCode

from prunecast.common.fleet_protocol import CHUNK_BYTES, messages
from prunecast.server.control.authentication import credential_of
from prunecast.server.control.errors import Answering, QuotaExceeded, Refused
from prunecast.server.control.gate import Gate
from prunecast.server.control.quota import Acquainted, Concurrency, ControlLimits
from prunecast.server.control.repository import open_file
from prunecast.server.control.watches import WatchRegistry
from prunecast.server.fleet.devices import token_hash
from prunecast.server.fleet.errors import TokenRefused, Unusable
from prunecast.server.fleet.model import Directive, Outcome
from prunecast.server.fleet.reports import (
    Certified,
    Credential,
    DeviceReport,
    DeviceState,
    DirectiveAnswer,
    Health,
    Identity,
)
from prunecast.server.repository.serving.connection import Quota

__all__ = ["Servicer", "device_report", "device_state", "directive_event"]

_LOOKED_UP = 16
"""Unknown credentials that are looked up at the same time; others wait."""


class Servicer:
    """Answers devices.

    Args:
        watches: the fleet, and who is watching.
        repository: folder of the release repository.
        files: its threads wait for the disk.
        limits: see `ControlLimits`.
        gate: that the calls came through.
        answering: ends calls with a status.
        certificates: whether devices authenticate by client certificates instead of tokens.
    """

    def __init__(
        self,
        watches: WatchRegistry,
        repository: Path,
        files: Executor,
        limits: ControlLimits,
        gate: Gate,
        answering: Answering,
        *,
        certificates: bool,
    ) -> None:
        self._registry, self._repository, self._limits = watches, repository, limits
        self._files, self._certificates = files, certificates
        self._reports = Quota(limits.reports_per_second, burst=limits.report_burst, most=100_000)
        self._watches = Quota(limits.watches_per_second, burst=limits.watch_burst, most=100_000)
        self._fetches = Concurrency(limits.fetches)
        self._gate, self._answering = gate, answering
        self._calls = Concurrency(limits.streams)
        self._refusals = Quota(limits.refusals_per_second, burst=limits.refusal_burst)
        self._turns = asyncio.Semaphore(_LOOKED_UP)
        self._acquainted = Acquainted(100_000)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """See `fleet.proto`."""
        admitted = self._admitted(context, request.device)
        async with self._answering(context), admitted as (credential, identity):
            _account(self._watches, identity.device)
            if request.release != identity.release:
                raise Refused(
                    StatusCode.FAILED_PRECONDITION,
                    f"the fleet's {identity.device} follows {identity.release!r}, this agent "
                    f"{request.release[:80]!r}: start it with --name {identity.release}, or "
                    "enrol the device in a group that follows the other release",
                )
            state = device_state(request)
            watcher = self._registry.enter(identity.device)
            try:
                yield messages.WatchEvent(
                    welcome=messages.Welcome(
                        device=identity.device,
                        keep_alive_seconds=max(1, round(self._limits.keep_alive)),
                    )
                )
                async for event in self._directives(credential, state, watcher):
                    yield event
            finally:
                self._registry.leave(identity.device, watcher)
            if watcher.ended == "closed":
                raise Refused(
                    StatusCode.UNAVAILABLE, "the server is going down: come back in a moment"
                )
            raise Refused(
                StatusCode.ABORTED,
                f"{identity.device} watches over another connection now; if that is another "
                "device, renew the token with `prunecast fleet device token`",
            )

    async def Report(self, request: Any, context: Any) -> Any:
        """See `fleet.proto`."""
        admitted = self._admitted(context, request.device)
        async with self._answering(context), admitted as (credential, identity):
            _account(self._reports, identity.device)
            report = device_report(request)
            now = self._registry.clock()
            receipt = await self._registry.call(
                partial(self._registry.service.receive, credential, report, now)
            )
            return messages.ReportReply(counted=receipt.counted, replayed=receipt.replayed)

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """See `fleet.proto`."""
        async with self._answering(context), self._admitted(context, "") as (_, identity):
            with self._fetches.entered(identity.device):
                at, end = request.offset, -1
                while at != end:  # an empty rest is a chunk as well, which tells the length
                    data, end = await self._read(request.path, at)
                    yield messages.FetchChunk(offset=at, length=end, data=data)
                    at += len(data)

    async def _read(self, name: str, offset: int) -> tuple[bytes, int]:
        """A chunk of a file and the file's size, in another thread.

        The file is opened for each chunk: however many devices take their time, no more files are
        open than there are threads.
        """

        def read() -> tuple[bytes, int]:
            most = self._limits.fetch_bytes
            with closing(open_file(self._repository, name, offset, most_bytes=most)) as part:
                data = part.read(0, min(CHUNK_BYTES, part.length))
                return data, part.start + part.length

        return await asyncio.get_running_loop().run_in_executor(self._files, read)

    async def _directives(
        self, credential: Credential, state: DeviceState, watcher: Any
    ) -> AsyncIterator[Any]:
        """Directives as they change, and a sign of life when nothing does."""
        said: DeviceState | None = state
        last, woken = None, True
        while watcher.ended is None:
            known, said = said, None  # later the fleet knows better, from the reports
            now = self._registry.clock()
            directive = await self._registry.call(
                partial(self._registry.service.poll, credential, known, now)
            )
            if directive != last:
                last = directive
                yield directive_event(directive)
            elif not woken:
                yield messages.WatchEvent(keep_alive=messages.KeepAlive())
            woken = await watcher.wait(self._limits.keep_alive)

    @asynccontextmanager
    async def _admitted(
        self, context: Any, claimed: str
    ) -> AsyncIterator[tuple[Credential, Identity]]:
        """Who calls; it is among the calls in progress meanwhile.

        Raises:
            TokenRefused: nobody whom the fleet knows.
            QuotaExceeded: the address has tried too many credentials, or there are too many calls.
            Refused: another device than the one that the request names.
        """
        credential = credential_of(
            context.invocation_metadata(), context.auth_context(), certificates=self._certificates
        )
        identity = await self._identified(credential, context.peer())
        if claimed and claimed != identity.device:
            raise Refused(
                StatusCode.PERMISSION_DENIED,
                f"this is the credential of {identity.device}, not of {claimed[:80]!r}: every "
                "device needs its own token and its own state folder",
            )
        with self._calls.entered(""):
            yield credential, identity

    async def _identified(self, credential: Credential, peer: str) -> Identity:
        """Look up a credential; one that was good before does not wait behind strangers'."""
        key = credential.device if isinstance(credential, Certified) else token_hash(credential)
        if key in self._acquainted:
            identity = await self._looked_up(credential, key, peer)
        else:
            async with self._turns:
                # not before: by now, those that came at the same time may have been refused
                if seconds := self._refusals.take(self._gate.address(peer), 0):
                    raise QuotaExceeded(seconds)
                identity = await self._looked_up(credential, key, peer)
        self._acquainted.add(key)
        self._gate.known(peer)
        return identity

    async def _looked_up(self, credential: Credential, key: str, peer: str) -> Identity:
        try:
            return await self._registry.call(lambda: self._registry.service.identify(credential))
        except TokenRefused:
            self._acquainted.discard(key)
            self._refusals.take(self._gate.address(peer), 1)
            raise


_OUTCOMES = {
    messages.OUTCOME_ACTIVATED: Outcome.ACTIVATED,
    messages.OUTCOME_CONFIRMED: Outcome.CONFIRMED,
    messages.OUTCOME_SELFTEST_FAILED: Outcome.SELFTEST_FAILED,
    messages.OUTCOME_ROLLED_BACK: Outcome.ROLLED_BACK,
    messages.OUTCOME_CRASH_LOOP: Outcome.CRASH_LOOP,
}


def device_state(request: messages.WatchRequest | messages.ReportRequest) -> DeviceState:
    """What a device says that it runs.

    Raises:
        Unusable: out of bounds.
    """
    running = request.running if request.HasField("running") else None
    return DeviceState(running, request.agent)


def device_report(request: messages.ReportRequest) -> DeviceReport:
    """A report.

    Raises:
        Unusable: no identifier, an unknown outcome, or out of bounds.
    """
    answer = None
    if request.HasField("answer"):
        given = request.answer
        if given.outcome not in _OUTCOMES:
            raise Unusable(f"outcome {given.outcome} is unknown: update the fleet's server")
        outcome = _OUTCOMES[given.outcome]
        answer = DirectiveAnswer(given.serial, given.version, outcome, given.detail)
    health = Health(request.error, dict(request.figures), request.made)
    return DeviceReport(request.id, device_state(request), answer, health)


def directive_event(directive: Directive) -> Any:
    """A directive as an event of a watch."""
    made = messages.Directive(
        serial=directive.serial, downgrade=directive.downgrade, rollout=directive.rollout or ""
    )
    if directive.release is not None:
        made.release, made.version = directive.release.name, directive.release.version
    return messages.WatchEvent(directive=made)


def _account(quota: Quota, device: str) -> None:
    if seconds := quota.take(device, 1):
        raise QuotaExceeded(seconds)
