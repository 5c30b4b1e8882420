"""One connection of HTTP/1.1: h11 keeps the protocol's rules, and every wait has a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import IO

import h11

from prunecast.server.repository.serving.files import FilePart, Reply, in_words
from prunecast.server.repository.serving.limits import ServingLimits, client_of
from prunecast.server.repository.serving.monitoring import Metrics

__all__ = ["Connection", "Request", "Respond"]

_READ = 64 * 1024  # bytes
_GOODBYE = 1.0  # seconds
_LINGER, _LINGER_BYTES = 2.0, 256 * 1024  # seconds, bytes
_LEAST = 16 * 1024  # bytes handed over at once, if the client is slow
_MOST_KERNEL, _MOST_TLS = 4 * 2**20, 128 * 1024  # likewise, if it is quick
_FIRST = 64 * 1024
_QUICK = 1.0  # seconds: the next piece is twice as large
_IN_MEMORY = 128 * 1024  # bytes up to which one write with the head is cheaper than sendfile


class Request:
    """A request without body: method, target as it came, headers by lower-case name."""

    def __init__(self, event: h11.Request) -> None:
        self.method, self.target = event.method.decode("ascii"), event.target.decode("ascii")
        self.headers: dict[str, str] = {}
        # as large as it came, about: h11 itself bounds only what it must wait for
        self.size = len(event.method) + len(event.target) + len(" HTTP/1.1\r\n\r\n")
        for raw, text in event.headers:
            name, value = raw.decode("ascii"), text.decode("latin-1")
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
            self.size += len(raw) + len(text) + len(": \r\n")


Respond = Callable[[Request, str], Awaitable[Reply]]
"""From a request and its client to the reply."""


class _Length:
    """Stands for bytes that h11 need not see (its documentation, "sendfile")."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Connection:
    """A client's connection, from the first request to the end.

    Args:
        reader: what it sends.
        writer: where replies go.
        limits: what it may take.
        metrics: where replies are counted.
        respond: makes the replies.
        limited: whether it counts among `ServingLimits.connections`.

    Attributes:
        client: who it counts as, see `client_of`.
        waits: for a request, or for the rest of one.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: ServingLimits,
        metrics: Metrics,
        respond: Respond,
        *,
        limited: bool,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._limits, self._metrics, self._respond = limits, metrics, respond
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._idle, self._last, self._head_only, self._answered = True, False, False, False
        self._sent = 0  # bytes of the reply's body that are on their way
        peer = writer.get_extra_info("peername")
        self.client = client_of(str(peer[0]) if peer else "")
        self.limited, self.waits = limited, True
        self._tls = writer.get_extra_info("ssl_object") is not None
        # drain waits until the kernel has it all (over TLS, all but a piece; there a high-water
        # mark of 0 would stop the flow for good)
        writer.transport.set_write_buffer_limits(high=int(self._tls), low=0)

    def finish(self) -> None:
        """End after the reply in progress; at once if there is none."""
        self._last = True
        if self._idle:
            self._writer.close()
            # over TLS, closing waits for the client to say goodbye, and an idle one will not
            asyncio.get_running_loop().call_later(_GOODBYE, self.break_off)

    def break_off(self) -> None:
        """End at once, whatever is in progress."""
        self._writer.transport.abort()

    async def serve(self) -> None:
        """Answer requests until one side ends the connection."""
        await self._until_closed(self._requests)

    async def refuse(self, reply: Reply) -> None:
        """Answer without waiting for a request, and end."""
        await self._until_closed(lambda: self._say_last(reply))

    async def _until_closed(self, talk: Callable[[], Awaitable[None]]) -> None:
        try:
            await talk()
        except (OSError, TimeoutError, EOFError, asyncio.SendfileNotAvailableError):
            # the client is gone or stalls, or a file became shorter
            self.break_off()
        except BaseException:  # cancelled, or an error of ours
            self.break_off()
            raise
        finally:  # what the kernel has not taken yet goes out before
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()

    async def _requests(self) -> None:
        while await self._one():
            self._http.start_next_cycle()
            # neither reading nor writing gives others a turn where a client has sent many at once
            await asyncio.sleep(0)

    async def _one(self) -> bool:
        """One request and its reply; False when it was the last."""
        self.waits = True
        try:
            request = await self._request()
            whole = request is None or isinstance(self._http.next_event(), h11.EndOfMessage)
        except h11.RemoteProtocolError as error:
            return await self._wrong(error.error_status_hint, "the request is malformed")
        except TimeoutError:
            if self._idle:
                return False
            self._metrics.refused("timeout")
            return await self._wrong(408, "the request took too long")
        if request is None:
            return False
        self.waits = False
        if request.size > self._limits.header_bytes:
            return await self._wrong(431, "the request's headers are too long")
        if not whole or "transfer-encoding" in request.headers:
            return await self._wrong(413, "requests have no body here")
        begun = time.monotonic()
        if request.method in ("GET", "HEAD"):
            reply = await self._respond(request, self.client)
        else:
            reply = in_words(405, "only GET and HEAD", allow="GET, HEAD")
        await self._send(reply, begun)
        self._idle = self._answered = True
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _request(self) -> Request | None:
        """The next request, or None when the client has ended the connection.

        Raises:
            TimeoutError: none came, or not all of it.
            h11.RemoteProtocolError: it is none.
        """
        limits = self._limits
        self._head_only = False
        self._idle = not self._http.trailing_data[0]
        waits = self._idle and self._answered
        allowed = limits.idle_timeout if waits else limits.request_timeout
        async with asyncio.timeout(allowed) as timeout:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = await self._reader.read(_READ)
                if self._idle and data:
                    self._idle = False
                    now = asyncio.get_running_loop().time()
                    timeout.reschedule(now + limits.request_timeout)
                self._http.receive_data(data)
        if not isinstance(event, h11.Request):
            return None
        self._idle, self._head_only = False, event.method == b"HEAD"
        return Request(event)

    async def _wrong(self, status: int, text: str) -> bool:
        """Say what was wrong with a request that cannot be followed by another."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._say_last(in_words(status, text))
        return False

    async def _say_last(self, reply: Reply) -> None:
        """Reply, and read on for a moment: closing with unread bytes would take it away again."""
        self._last = True
        await self._send(reply, time.monotonic())
        if self._writer.can_write_eof():
            self._writer.write_eof()
        left = _LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while left > 0 and (data := await self._reader.read(_READ)):
                    left -= len(data)

    async def _send(self, reply: Reply, begun: float) -> None:
        self._sent, complete = 0, False
        try:
            await self._in_order(self._head(reply), b"" if self._head_only else reply.body)
            complete = True
        finally:
            reply.close()
            seconds = time.monotonic() - begun
            self._metrics.answered(reply.kind, reply.status, self._sent, seconds, complete=complete)
            reply.settle(self._sent)

    def _head(self, reply: Reply) -> bytes:
        """The bytes of the head; h11 then takes the body as sent."""
        headers = [("date", formatdate(usegmt=True)), *reply.headers.items()]
        if reply.status != 304:
            headers.append(("content-length", str(reply.length)))
        if self._last:
            headers.append(("connection", "close"))
        reason = HTTPStatus(reply.status).phrase
        response = h11.Response(status_code=reply.status, headers=headers, reason=reason)
        head = self._http.send(response) or b""
        if reply.length and not self._head_only:
            self._http.send_with_data_passthrough(h11.Data(data=_Length(reply.length)))  # type: ignore[arg-type]
        self._http.send(h11.EndOfMessage())
        return head

    async def _in_order(self, head: bytes, body: bytes | FilePart) -> None:
        """Head, then body: through the kernel where that is cheaper.

        Raises:
            OSError: the client is gone, or takes nothing.
            EOFError: the file became shorter.
        """
        if isinstance(body, FilePart) and body.length > _IN_MEMORY:
            await self._write(head)
            await self._in_pieces(body)
            return
        data = body.read(0, body.length) if isinstance(body, FilePart) else body
        await self._write(head + data)
        self._sent = len(data)

    async def _in_pieces(self, body: FilePart) -> None:
        """In pieces that a client of its speed takes within seconds."""
        clock, size = asyncio.get_running_loop().time, _FIRST
        most = _MOST_TLS if self._tls else _MOST_KERNEL
        with open(body.file, "rb", buffering=0, closefd=False) as file:
            while self._sent < body.length:
                size, begun = min(size, body.length - self._sent), clock()
                if self._tls:
                    await self._write(body.read(self._sent, size))
                else:
                    await self._sendfile(file, body.start + self._sent, size)
                self._sent += size
                size = min(2 * size, most) if clock() - begun < _QUICK else max(size // 2, _LEAST)

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        async with asyncio.timeout(self._limits.stall_timeout):
            await self._writer.drain()

    async def _sendfile(self, file: IO[bytes], start: int, length: int) -> None:
        """sendfile(2): the content never enters this process."""
        loop, transport = asyncio.get_running_loop(), self._writer.transport
        async with asyncio.timeout(self._limits.stall_timeout):
            done = await loop.sendfile(transport, file, start, length, fallback=False)
        if done < length:
            raise EOFError
