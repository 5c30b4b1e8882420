"""One connection of HTTP/1.1; h11 parses and keeps the rules of the protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus

import h11

from prunecast.server.repository.serving.answers import Answer, FilePart, Request, plain
from prunecast.server.repository.serving.limits import Limits
from prunecast.server.repository.serving.metrics import Metrics
from prunecast.server.repository.serving.sending import Outlet

__all__ = ["Connection", "Respond"]

Respond = Callable[[Request, str], Awaitable[Answer]]
"""From a request and the client's address to the answer."""

_READ = 64 * 1024  # bytes
_GOODBYE = 1.0  # seconds
_LINGER, _LINGER_BYTES = 2.0, 256 * 1024  # seconds, bytes


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
        writer: where answers go.
        limits: see `Limits`.
        metrics: where answers are counted.
        respond: makes the answers.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: Limits,
        metrics: Metrics,
        respond: Respond,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._limits, self._metrics, self._respond = limits, metrics, respond
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._outlet = Outlet(writer, limits.stall_timeout)
        self._idle = True
        self._last = False
        self._head_only = False
        self._answered = False
        peer = writer.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""

    def finish(self) -> None:
        """End after the answer in progress; at once if there is none."""
        self._last = True
        if self._idle:
            self._writer.close()
            # over TLS, closing waits for the client to say goodbye, and an idle one will not
            abort = self._writer.transport.abort
            asyncio.get_running_loop().call_later(_GOODBYE, abort)

    async def serve(self) -> None:
        """Answer requests until one side ends the connection."""
        try:
            while await self._one():
                self._http.start_next_cycle()
        except (OSError, TimeoutError, EOFError):
            # the client is gone or stalls, or a file became shorter
            self._writer.transport.abort()
        except BaseException:  # cancelled, or an error of ours
            self._writer.transport.abort()
            raise
        finally:
            await self._closed()

    async def refuse(self, answer: Answer) -> None:
        """Answer without waiting for a request, and end."""
        self._last = True
        try:
            await self._send(answer, time.monotonic())
            await self._linger()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
        finally:
            await self._closed()

    async def _closed(self) -> None:
        """Close; what the kernel has not taken yet goes out before."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _one(self) -> bool:
        """One request and its answer; False when it was the last."""
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
        if not whole:
            return await self._wrong(413, "requests have no body here")
        begun = time.monotonic()
        if request.method in ("GET", "HEAD"):
            answer = await self._respond(request, self._address)
        else:
            answer = plain(405, "only GET and HEAD", allow="GET, HEAD")
        await self._send(answer, begun)
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
        headers: dict[str, str] = {}
        for raw, text in event.headers:
            name, value = raw.decode("ascii"), text.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return Request(event.method.decode("ascii"), event.target.decode("ascii"), headers)

    async def _wrong(self, status: int, text: str) -> bool:
        """Say what was wrong with a request that cannot be followed by another."""
        self._last = True
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send(plain(status, text), time.monotonic())
            await self._linger()
        return False

    async def _linger(self) -> None:
        """Read on for a moment: closing with unread bytes would take the answer away again."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
        left = _LINGER_BYTES
        try:
            async with asyncio.timeout(_LINGER):
                while left > 0 and (data := await self._reader.read(_READ)):
                    left -= len(data)
        except TimeoutError:
            return

    async def _send(self, answer: Answer, begun: float) -> None:
        complete = False
        self._outlet.sent = 0
        try:
            head, body = self._framed(answer)
            await self._outlet.send(head, body)
            complete = True
        finally:
            if isinstance(answer.body, FilePart):
                answer.body.close()
            seconds = time.monotonic() - begun
            self._metrics.answered(
                answer.kind, answer.status, self._outlet.sent, seconds, complete=complete
            )
            answer.settle(self._outlet.sent)

    def _framed(self, answer: Answer) -> tuple[bytes, bytes | FilePart]:
        """The bytes of the head, and the body that follows it."""
        headers = [("date", formatdate(usegmt=True)), *answer.headers.items()]
        if answer.status != 304:
            headers.append(("content-length", str(answer.length)))
        if self._last:
            headers.append(("connection", "close"))
        reason = HTTPStatus(answer.status).phrase
        response = h11.Response(status_code=answer.status, headers=headers, reason=reason)
        head = self._http.send(response) or b""
        body = b"" if self._head_only else answer.body
        if body and answer.length:
            self._http.send_with_data_passthrough(h11.Data(data=_Length(answer.length)))  # type: ignore[arg-type]
        self._http.send(h11.EndOfMessage())
        return head, body
