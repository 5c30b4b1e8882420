"""What a service manager hears of the control server, and when it hears nothing more."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prunecast.common.service_manager import ServiceManager
from prunecast.server.control.watches import WatchRegistry
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from support.authority import Authority

INTERVAL = 20_000  # microseconds, so that it is fed every 5 ms


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that a service manager listens at."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"{tmp_path}/n")
        heard.settimeout(60)
        yield heard


@pytest.mark.engine
def test_the_command_says_that_it_is_ready_and_alive_until_it_ends(
    manager: socket.socket,
    repository: Repository,
    authority: Authority,
    database: str,
    fleet: FleetService,
) -> None:
    certificate, key = authority.server()
    files = ("--certificate", str(certificate), "--key", str(key), "--port", "0", "--json")
    environment = {**os.environ, "PRUNECAST_FLEET": database, "WATCHDOG_USEC": str(INTERVAL)}
    environment["NOTIFY_SOCKET"] = str(manager.getsockname())
    with subprocess.Popen(
        [sys.executable, "-m", "prunecast.cli", "fleet", "serve", *files],
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        try:
            told = [manager.recv(99)]
            while told.count(b"WATCHDOG=1") < 5 or b"READY=1" not in told:
                told.append(manager.recv(99))
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["port"]
            process.terminate()
            while told[-1] != b"STOPPING=1":
                told.append(manager.recv(99))
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert set(told) == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}


def test_a_database_that_holds_all_threads_starves_the_watchdog(
    manager: socket.socket, fleet: FleetService
) -> None:
    alive = ServiceManager(
        {"NOTIFY_SOCKET": str(manager.getsockname()), "WATCHDOG_USEC": str(INTERVAL)}
    )
    release = threading.Event()

    def heard() -> int:
        """How many datagrams have come and were not looked at."""
        count = 0
        manager.setblocking(False)
        try:
            while manager.recv(99):
                count += 1
        except BlockingIOError:
            return count

    async def lives(executor: ThreadPoolExecutor) -> tuple[int, int]:
        watches = WatchRegistry(fleet, tuple, executor, interval=60.0)
        feeding = asyncio.create_task(watches.feed(alive))
        deadline = asyncio.get_running_loop().time() + 60
        while not heard():
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.001)
        held = asyncio.ensure_future(watches.call(lambda: release.wait(60)))
        await asyncio.sleep(0.1)  # what was under way when the thread was taken
        heard()
        await asyncio.sleep(0.2)  # forty times as long as it takes to be fed
        starved = heard()
        release.set()
        await held
        while not (again := heard()):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.001)
        feeding.cancel()
        return starved, again

    with ThreadPoolExecutor(1) as executor:
        try:
            starved, again = asyncio.run(lives(executor))
        finally:
            release.set()
    assert starved == 0
    assert again
