"""Devices that fetch one file each, all at once; as a script, one process of them.

The process reads its order as a line of JSON, connects nothing yet, prints ``ready``, waits for a
second line, fetches, and prints the seconds that every fetch took. Every fetch has a connection of
its own, as devices have. Lengths are checked always, and the content on the first device.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

__all__ = ["Order", "fetch_all"]

_PIECE = 256 * 1024


@dataclass(frozen=True)
class Order:
    """What devices fetch.

    Attributes:
        port: of the server on 127.0.0.1.
        path: of the file.
        length: in bytes.
        sha256: of its content.
        devices: how many fetch at the same time.
        rounds: how often each of them does, one time after the other.
        authority: PEM file to verify the server with; None for plain HTTP.
    """

    port: int
    path: str
    length: int
    sha256: str
    devices: int
    rounds: int = 1
    authority: str | None = None


def fetch_all(order: Order, processes: int) -> tuple[float, list[float]]:
    """Run the devices in `processes` processes.

    Returns:
        Seconds by the clock from the start to the last byte, and the seconds of every fetch.

    Raises:
        RuntimeError: a fetch failed.
    """
    shares = [order.devices // processes] * processes
    shares[0] += order.devices - sum(shares)
    with ExitStack() as stack:
        running = []
        for share in filter(None, shares):
            process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            _say(process, json.dumps({**asdict(order), "devices": share}))
            running.append(process)
        for process in running:
            if _hear(process) != "ready":
                raise RuntimeError("devices did not start")
        begun = time.perf_counter()
        for process in running:
            _say(process, "go")
        took = [float(second) for process in running for second in json.loads(_hear(process))]
        return time.perf_counter() - begun, took


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError("a fetch failed: see above")
    return line


async def _devices(order: Order, context: ssl.SSLContext | None) -> list[float]:
    async def device(number: int) -> list[float]:
        took = []
        for round_ in range(order.rounds):
            begun = time.perf_counter()
            await _fetch(order, context, check=number == 0 and round_ == 0)
            took.append(time.perf_counter() - begun)
        return took

    took = await asyncio.gather(*map(device, range(order.devices)))
    return [second for seconds in took for second in seconds]


async def _fetch(order: Order, context: ssl.SSLContext | None, *, check: bool) -> None:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", order.port, ssl=context, limit=_PIECE
    )
    try:
        head = f"GET {order.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"the server answered {answer[:60]!r}")
        digest, left = hashlib.sha256(), order.length
        while piece := await reader.read(_PIECE):
            left -= len(piece)
            if check:
                digest.update(piece)
        if left or (check and digest.hexdigest() != order.sha256):
            raise RuntimeError(f"{order.path}: {left} bytes are missing, or it is another file")
    finally:
        writer.close()


def main() -> None:
    """One process of devices."""
    order = Order(**json.loads(sys.stdin.readline()))
    context = ssl.create_default_context(cafile=order.authority) if order.authority else None
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asyncio.run(_devices(order, context))), flush=True)


if __name__ == "__main__":
    main()
