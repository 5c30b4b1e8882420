"""Who is watching, and when somebody's directive may have changed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from typing import Literal, TypeVar

from prunecast.common.service_manager import ServiceManager
from prunecast.server.fleet.audit import AuditEntry
from prunecast.server.fleet.model import Release
from prunecast.server.fleet.service import FleetService

__all__ = ["OpenWatch", "WatchRegistry", "concerned_devices"]

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_LOOKED_AT = 1000  # entries of the log at a time
Ended = Literal["replaced", "closed"]


class OpenWatch:
    """One open Watch of a device.

    Attributes:
        ended: why it has to end; None while it may go on.
    """

    def __init__(self) -> None:
        self.ended: Ended | None = None
        self._bell = asyncio.Event()

    def wake(self) -> None:
        """The device's directive may have changed."""
        self._bell.set()

    def end(self, why: Ended) -> None:
        """End the watch."""
        self.ended = self.ended or why
        self._bell.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for a wake or an end; False if there was none for so long."""
        try:
            await asyncio.wait_for(self._bell.wait(), seconds)
        except TimeoutError:
            return False
        self._bell.clear()
        return True


class WatchRegistry:
    """Follows the fleet and wakes whom a change may concern; lives in one event loop.

    Args:
        service: the fleet.
        live: gives the live releases.
        executor: its threads wait for the database; one for SQLite, whose writers take turns and
            sleep while they wait, so that several are slower than one.
        interval: seconds between looks at the fleet, which also honour its deadlines.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        service: FleetService,
        live: Callable[[], Iterable[Release]],
        executor: Executor,
        *,
        interval: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.service, self.clock = service, clock
        self._live, self._executor, self._interval = live, executor, interval
        self._watchers: dict[str, OpenWatch] = {}
        self._closed = False

    def __len__(self) -> int:
        """How many devices are watching."""
        return len(self._watchers)

    def call(self, work: Callable[[], _T]) -> Awaitable[_T]:
        """Do something that waits for the database in another thread."""
        return asyncio.get_running_loop().run_in_executor(self._executor, work)

    def enter(self, device: str) -> OpenWatch:
        """Begin a watch; an earlier one of the same device ends, as its connection may be dead."""
        watcher = OpenWatch()
        if (earlier := self._watchers.get(device)) is not None:
            earlier.end("replaced")
        self._watchers[device] = watcher
        if self._closed:
            watcher.end("closed")
        return watcher

    def leave(self, device: str, watcher: OpenWatch) -> None:
        """A watch has ended."""
        if self._watchers.get(device) is watcher:
            del self._watchers[device]

    def close(self) -> None:
        """End all watches, those to come too."""
        self._closed = True
        for watcher in self._watchers.values():
            watcher.end("closed")

    async def follow(self) -> None:
        """Look at the fleet again and again until cancelled."""
        last: int | None = None
        live: object = None
        while True:
            try:
                if last is None:
                    newest = await self.call(partial(self.service.audit, limit=1))
                    last = newest[0].number if newest else 0
                await self.call(partial(self.service.tick, self.clock()))
                listed = await self.call(self._live)
                look = partial(self.service.audit, after=last, limit=_LOOKED_AT)
                if entries := await self.call(look):
                    last = entries[-1].number
                self._wake(None if listed != live else concerned_devices(entries))
                live = listed
            except Exception as error:  # whatever it is, devices must not be left alone
                _LOG.warning("the fleet cannot be read, trying again: %s", error)
            await asyncio.sleep(self._interval)

    async def feed(self, manager: ServiceManager) -> None:
        """Feed a watchdog four times in its interval, until cancelled.

        It starves when the loop hangs, or all threads that wait for the database do.
        """
        while manager.watchdog_seconds > 0:
            await self.call(lambda: None)
            manager.tell(WATCHDOG=1)
            await asyncio.sleep(manager.watchdog_seconds / 4)

    def _wake(self, devices: Iterable[str] | None) -> None:
        names = self._watchers if devices is None else devices
        for name in list(names):
            if (watcher := self._watchers.get(name)) is not None:
                watcher.wake()


def concerned_devices(entries: Iterable[AuditEntry]) -> set[str] | None:
    """Devices whose directive may have changed by what the audit log says; None: all of them.

    >>> from prunecast.server.fleet.audit import AuditKind
    >>> concerned_devices([AuditEntry(0, "ada", AuditKind.DEVICE_PINNED, "cam")])
    {'cam'}
    >>> concerned_devices([AuditEntry(0, "fleet", AuditKind.ROLLOUT_PAUSED, "r2")]) is None
    True
    """
    devices = set()
    for entry in entries:
        if not entry.kind.of_one_device:
            return None
        devices.add(entry.subject)
    return devices
