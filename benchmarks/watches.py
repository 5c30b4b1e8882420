"""Many devices at one control server: what their watches cost, and how soon a change reaches them.

    python benchmarks/watches.py [--devices N] [--quiet SECONDS] [--seed N] [--json FILE]

One process plays the devices, a TLS connection and a `Watch` each; the server is `prunecast fleet
serve` in another one, with SQLite. In turn: all connect, nothing happens for a while, the group is
pinned to another release. Printed: JSON; seconds by the wall clock, which depend on what else the
machine does and on how long its disk takes to sync, and CPU seconds and memory of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from loopback.certificates import loopback_certificate
from rollouts.processes import Processes
from rollouts.repository import NAME, make_repository

from prunecast.common.fleet_protocol import make_stub, messages
from prunecast.server.control import LiveReleases
from prunecast.server.fleet.events import AddGroup, PinGroup
from prunecast.server.fleet.service import FleetService

LIMIT = 600.0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, default=1000, help="that watch (default: 1000)")
    add("--quiet", type=float, default=30.0, help="seconds without a change (default: 30)")
    add("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


async def watch(address: str, authority: bytes, token: str, heard: Callable[[int], None]) -> None:
    """One device: say which version every directive names."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    credentials = grpc.ssl_channel_credentials(authority)
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        call = make_stub(channel).Watch(
            messages.WatchRequest(release=NAME, agent="0.1.0", running=1),
            metadata=[("authorization", f"Bearer {token}")],
        )
        async for event in call:
            if event.HasField("directive"):
                heard(event.directive.version)


async def play(
    address: str, authority: bytes, tokens: list[str], fleet: FleetService,
    processes: Processes, quiet: float,
) -> dict[str, Any]:  # fmt: skip
    """All devices; what it cost the server."""
    versions: dict[str, int] = {}
    devices: list[asyncio.Task[None]] = []

    async def until(version: int) -> tuple[float, float]:
        begun, cpu = time.monotonic(), processes.cpu("server")
        while len(versions) < len(tokens) or set(versions.values()) != {version}:
            await asyncio.sleep(0.05)
            for ended in (d for d in devices if d.done()):
                ended.result()
            if time.monotonic() - begun > LIMIT:
                raise TimeoutError(f"not all devices heard of {version} in {LIMIT:g} seconds")
        return round(time.monotonic() - begun, 2), round(processes.cpu("server") - cpu, 2)

    for token in tokens:
        heard = versions.__setitem__
        work = watch(address, authority, token, lambda v, t=token, heard=heard: heard(t, v))
        devices.append(asyncio.create_task(work))
    connect = await until(1)
    memory = processes.memory("server")
    cpu = processes.cpu("server")
    await asyncio.sleep(quiet)
    share = (processes.cpu("server") - cpu) / quiet
    pin = PinGroup(at=time.time(), group="field", version=2)
    await asyncio.to_thread(fleet.operate, pin)
    change = await until(2)
    for device in devices:
        device.cancel()
    return {
        "devices": len(tokens),
        "cores": len(os.sched_getaffinity(0)),
        "connect": dict(zip(("seconds", "server_cpu_seconds"), connect, strict=True)),
        "server_megabytes": round(memory / 1e6, 1),
        "quiet_server_cpu_share": round(share, 3),
        "change": dict(zip(("seconds", "server_cpu_seconds"), change, strict=True)),
    }


def main() -> None:
    """Run the benchmark."""
    given = arguments()
    with (
        tempfile.TemporaryDirectory(prefix="watches-") as name,
        Processes(Path(name) / "logs") as processes,
    ):
        folder = Path(name)
        repository = make_repository(folder, given.seed).path
        certificate, key = loopback_certificate(folder)
        url = f"sqlite:///{folder / 'fleet.db'}"
        fleet = FleetService.create(url, LiveReleases(repository), repository=repository)
        fleet.operate(AddGroup(at=time.time(), group="field", release=NAME, stable=1))
        tokens = [
            fleet.enrol(f"device-{n:05}", "field", now=time.time(), actor="benchmark")
            for n in range(given.devices)
        ]
        processes.start(
            "server",
            *("fleet", "serve", "--database", url, "--port", 0, "--json"),
            *("--certificate", certificate, "--key", key),
        )
        begun = time.monotonic()
        while not (said := processes.said("server")):
            if processes.ended() or time.monotonic() - begun > 120:
                raise TimeoutError("the server does not start")
            time.sleep(0.1)
        found = asyncio.run(
            play(
                said[0]["address"], certificate.read_bytes(), tokens, fleet, processes, given.quiet
            )
        )
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
