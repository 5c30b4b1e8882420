"""One connection of HTTP/1.1: h11 keeps the protocol's rules, every wait has a deadline, and every
client a quota."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import IO

import h11

from prunecast.common.listening import Standing
from prunecast.server.repository.serving.files import FilePart, Reply, in_words
from prunecast.server.repository.serving.monitoring import Metrics

__all__ = ["Connection", "Quota", "Request", "Respond", "ServingLimits"]

_READ = 64 * 1024  # bytes
_GOODBYE = 1.0  # seconds
_LINGER, _LINGER_BYTES = 2.0, 256 * 1024  # seconds, bytes
_LEAST = 16 * 1024  # bytes handed over at once, if the client is slow
_MOST_KERNEL, _MOST_TLS = 4 * 2**20, 128 * 1024  # likewise, if it is quick
_FIRST = 64 * 1024
_QUICK = 1.0  # seconds: the next piece is twice as large
_IN_MEMORY = 128 * 1024  # bytes up to which one write with the head is cheaper than sendfile


@dataclass(frozen=True)
class ServingLimits:
    """Limits of a release server; times in seconds.

    Attributes:
        connections: at the same time, counted when they are accepted; further ones are answered
            503, over TLS closed.
        connections_per_client: of them, of one address.
        patience: for a connection that has asked for nothing, while others want its place.
        header_bytes: of a request's line and headers together; longer ones are answered 431.
        request_timeout: for a TLS handshake, and for a request from its first byte to its last.
        idle_timeout: between two requests of a connection.
        stall_timeout: for a client to take the next 16 KiB.
        drain: for downloads in progress when the server is stopped.
        requests_per_second: of one client on average, ten seconds' worth at once; None: any.
        bytes_per_second: likewise, of bodies. A client whose account is not empty may begin a
            file of any size and pays for it afterwards.
    """

    connections: int = 1024
    connections_per_client: int = 512
    patience: float = 1.0
    header_bytes: int = 16 * 1024
    request_timeout: float = 30.0
    idle_timeout: float = 75.0
    stall_timeout: float = 60.0
    drain: float = 30.0
    requests_per_second: float | None = None
    bytes_per_second: float | None = None


class Quota:
    """An account for every client, filled at a steady rate (a token bucket that may owe).

    Args:
        rate: units per second.
        burst: units that may come at once; default: ten seconds of the rate.
        most: clients that are remembered; the one that asked least recently is forgotten first.
        clock: monotonic seconds, for tests.

    >>> quota = Quota(2.0, clock=lambda: 0.0)
    >>> quota.take("a", 50), quota.take("a", 1), quota.take("b", 1)
    (0.0, 15.5, 0.0)
    """

    def __init__(
        self,
        rate: float,
        *,
        burst: float | None = None,
        most: int = 65_536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._clients, self._clock = rate, most, clock
        self._most = max(1.0, 10 * rate) if burst is None else float(burst)
        self._accounts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level, as of when

    def take(self, client: str, amount: float) -> float:
        """Take from a client's account, unless less than one unit is in it.

        Returns:
            0, or the seconds after which to ask again; then nothing was taken.
        """
        level = self._level(client)
        paid = amount if level >= 1.0 else 0.0
        self._accounts[client] = (level - paid, self._clock())
        self._accounts.move_to_end(client)
        if len(self._accounts) > self._clients:
            self._accounts.popitem(last=False)
        return max(0.0, (1.0 - level) / self._rate)

    def give_back(self, client: str, amount: float) -> None:
        """Return what was taken and not used."""
        if client in self._accounts:
            self._accounts[client] = (self._level(client) + amount, self._clock())

    def _level(self, client: str) -> float:
        level, then = self._accounts.get(client, (self._most, 0.0))
        return min(self._most, level + self._rate * (self._clock() - then))


class Request:
    """A request without body: method, target as it came, headers by lower-case name."""

    def __init__(self, event: h11.Request) -> None:
        self.method, self.target = event.method.decode("ascii"), event.target.decode("ascii")
        self.headers: dict[str, str] = {}
        for raw, text in event.headers:
            name, value = raw.decode("ascii"), text.decode("latin-1")
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value


def _is_ambiguous(head: bytes) -> bool:
    """Whether another server could see other headers, or another end of the request.

    h11 reads what RFC 9112 allows to be read leniently (sections 2.2, 5.2 and 6.3): ends of lines
    without a carriage return, folded lines, a length that is stated several times.

    >>> _is_ambiguous(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n")
    False
    >>> _is_ambiguous(b"GET / HTTP/1.1\\r\\nHost: x\\nContent-Length: 5\\r\\n\\r\\n")
    True
    """
    lines = head.split(b"\r\n")
    if any(line[:1] in (b" ", b"\t") or b"\n" in line or b"\r" in line for line in lines):
        return True
    names = [line.partition(b":") for line in lines]
    lengths = [value for name, _, value in names if name.strip().lower() == b"content-length"]
    return len(lengths) > 1 or any(b"," in value for value in lengths)


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
        respond: makes the replies.
        client: who it counts as.
        shows: told how it stands: busy with a request, or idle after one.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: ServingLimits,
        metrics: Metrics,
        respond: Respond,
        client: str,
        shows: Callable[[Standing], None],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._limits, self._metrics, self._respond = limits, metrics, respond
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._idle, self._last, self._head_only, self._answered = True, False, False, False
        self._text = b""  # of the request's line and headers, as they came
        self._sent = 0  # bytes of the reply's body that are on their way
        self._client, self._shows = client, shows
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
        self._shows(Standing.BUSY)
        if len(self._text) > self._limits.header_bytes:  # h11 bounds only what it must wait for
            return await self._wrong(431, "the request's headers are too long")
        if _is_ambiguous(self._text):
            return await self._wrong(400, "the request can be read in two ways")
        if not whole or "transfer-encoding" in request.headers:
            return await self._wrong(413, "requests have no body here")
        begun = time.monotonic()
        if request.method in ("GET", "HEAD"):
            reply = await self._respond(request, self._client)
        else:
            reply = in_words(405, "only GET and HEAD", allow="GET, HEAD")
        await self._send(reply, begun)
        self._idle = self._answered = True
        self._shows(Standing.IDLE)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _request(self) -> Request | None:
        """The next request, or None when the client has ended the connection."""
        limits = self._limits
        self._head_only = False
        came = self._http.trailing_data[0]
        self._idle = not came
        waits = self._idle and self._answered
        allowed = limits.idle_timeout if waits else limits.request_timeout
        async with asyncio.timeout(allowed) as timeout:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = await self._reader.read(_READ)
                if self._idle and data:
                    self._idle = False
                    if not self._answered:
                        self._shows(Standing.BEGUN)
                    now = asyncio.get_running_loop().time()
                    timeout.reschedule(now + limits.request_timeout)
                self._http.receive_data(data)
                came += data
        if not isinstance(event, h11.Request):
            return None
        self._idle, self._head_only = False, event.method == b"HEAD"
        self._text = came[: len(came) - len(self._http.trailing_data[0])]
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
        """Head, then body: through the kernel where that is cheaper."""
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
