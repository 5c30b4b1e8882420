"""A delay line on loopback: every byte arrives later by a one-way delay, and nothing else changes.

It stands where a node's traffic enters a link whose kernel can shape rates but not delay. What a
client sends first waits a round trip more, as it would for TCP's handshake. A lost segment holds up
what follows it by a round trip, as where TCP sends it again at the third duplicate acknowledgement.
As the link itself has no delay, TCP's congestion window opens at once: a new connection is faster
here than on a real link by a round trip or two, for everybody.

Run as a script in the network namespace of a node: ``delay.py PORT HOST:PORT SECONDS LOSS SEED``.
"""

from __future__ import annotations

import queue
import random
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Line", "due_at", "serve"]

_SEGMENT = 1448  # bytes of TCP's content in a packet of Ethernet


@dataclass(frozen=True)
class Line:
    """What happens to bytes.

    Attributes:
        delay: seconds, one way.
        loss: fraction of segments that are sent twice.
        seed: of the losses.
    """

    delay: float
    loss: float = 0.0
    seed: int = 0


def due_at(line: Line, arrived: float, opened: float, size: int, losses: random.Random) -> float:
    """When bytes are passed on.

    Args:
        line: what happens to them.
        arrived: when they came.
        opened: when the other side can be reached; 0.0 for what it says itself.
        size: of them.
        losses: what decides which segments are lost.
    """
    segments = -(-size // _SEGMENT)
    lost = sum(losses.random() < line.loss for _ in range(segments)) if line.loss else 0
    return max(arrived, opened) + line.delay + lost * 2 * line.delay


def _delayed(
    source: socket.socket, target: socket.socket, line: Line, opened: float, number: int
) -> None:
    """Pass on what comes, late, until one side ends."""
    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
    losses = random.Random(f"{line.seed}/{number}")

    def write() -> None:
        last = 0.0
        with suppress(OSError):
            while True:
                due, data = waiting.get()
                last = max(last, due)  # in order
                time.sleep(max(0.0, last - time.monotonic()))
                if not data:
                    break
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    data = b""
    with suppress(OSError):
        while data := source.recv(65536):
            waiting.put((due_at(line, time.monotonic(), opened, len(data), losses), data))
    waiting.put((time.monotonic() + line.delay, b""))
    writer.join()


def _connect(client: socket.socket, target: tuple[str, int], line: Line, number: int) -> None:
    opened = time.monotonic() + 2 * line.delay
    with client, suppress(OSError), socket.create_connection(target) as server:
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(
            target=_delayed, args=(server, client, line, 0.0, 2 * number + 1), daemon=True
        )
        back.start()
        _delayed(client, server, line, opened, 2 * number)
        back.join()


def serve(listener: socket.socket, target: tuple[str, int], line: Line) -> None:
    """Accept connections until the listener is closed, each in a thread of its own."""
    number = 0
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            arguments = client, target, line, number
            threading.Thread(target=_connect, args=arguments, daemon=True).start()
            number += 1


def main() -> None:
    """Entry point."""
    port, address, delay, loss, seed = sys.argv[1:]
    host, _, to = address.rpartition(":")
    line = Line(float(delay), float(loss), int(seed))
    with socket.create_server(("127.0.0.1", int(port))) as listener:
        serve(listener, (host, int(to)), line)


if __name__ == "__main__":
    main()
