"""Bodies on their way to a client: through the kernel where possible, and never for ever."""

from __future__ import annotations

import asyncio
import os
from typing import IO

from prunecast.server.repository.serving.answers import FilePart

__all__ = ["Outlet"]

_LEAST = 16 * 1024  # bytes handed over at once, if the client is slow
_MOST_KERNEL, _MOST_TLS = 4 * 2**20, 128 * 1024  # likewise, if it is quick
_FIRST = 64 * 1024
_QUICK = 1.0  # seconds: the next piece is twice as large
_IN_MEMORY = 128 * 1024  # bytes up to which one write with the head is cheaper than sendfile


class Outlet:
    """The sending half of a connection.

    Args:
        writer: of the connection.
        stall_timeout: seconds for the client to take the next piece, which is 16 KiB if it is slow.
    """

    def __init__(self, writer: asyncio.StreamWriter, stall_timeout: float) -> None:
        self._writer, self._stall = writer, stall_timeout
        self._tls = writer.get_extra_info("ssl_object") is not None
        # drain waits until the kernel has it all (over TLS, all but a piece; there a high-water
        # mark of 0 would stop the flow for good)
        writer.transport.set_write_buffer_limits(high=int(self._tls), low=0)
        self.sent = 0

    async def send(self, head: bytes, body: bytes | FilePart) -> None:
        """Send an answer; `sent` counts the bytes of the body that are on their way.

        Raises:
            OSError: the client is gone, or takes nothing.
            EOFError: the file became shorter.
        """
        self.sent = 0
        if isinstance(body, FilePart) and body.length > _IN_MEMORY:
            self._writer.write(head)
            await self._drained()
            await self._in_pieces(body)
            return
        if isinstance(body, FilePart):
            body = _read(body.file, body.start, body.length)
        self._writer.write(head + body)
        await self._drained()
        self.sent = len(body)

    async def _drained(self) -> None:
        async with asyncio.timeout(self._stall):
            await self._writer.drain()

    async def _in_pieces(self, body: FilePart) -> None:
        """In pieces that a client of its speed takes within seconds."""
        clock, size = asyncio.get_running_loop().time, _FIRST
        most, hand_over = (_MOST_TLS, self._write) if self._tls else (_MOST_KERNEL, self._sendfile)
        with open(body.file, "rb", buffering=0, closefd=False) as file:
            while self.sent < body.length:
                size, begun = min(size, body.length - self.sent), clock()
                await hand_over(file, body.start + self.sent, size)
                self.sent += size
                size = min(2 * size, most) if clock() - begun < _QUICK else max(size // 2, _LEAST)

    async def _sendfile(self, file: IO[bytes], start: int, length: int) -> None:
        """sendfile(2): the content never enters this process."""
        loop, transport = asyncio.get_running_loop(), self._writer.transport
        async with asyncio.timeout(self._stall):
            done = await loop.sendfile(transport, file, start, length, fallback=False)
        if done < length:
            raise EOFError

    async def _write(self, file: IO[bytes], start: int, length: int) -> None:
        self._writer.write(_read(file.fileno(), start, length))
        await self._drained()


def _read(file: int, start: int, length: int) -> bytes:
    data = os.pread(file, length, start)
    if len(data) < length:
        raise EOFError
    return data
