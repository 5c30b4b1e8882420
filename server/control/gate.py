"""The door in front of gRPC: who may connect, before gRPC knows of it.

gRPC's core accepts whatever comes until the process is out of descriptors, and knows nothing of
addresses. So the port belongs to this relay; it counts connections as they are accepted, waits for
the first byte of a TLS handshake, and passes on what follows, unread, to a Unix socket that the
core listens on. A connection that has proved whose it is stays; strangers make room for each other.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path

from prunecast.common.listening import Acceptor, Admission, Place, SparingLog, Standing, end_socket
from prunecast.server.control.errors import Unbindable

__all__ = ["Gate"]

_HANDSHAKE = b"\x16"  # the first byte of TLS (RFC 8446, section 5.1)
_LONGEST = 80  # bytes of the folder's name; a socket's has 107 in all
_LINGER = 30.0  # seconds
_TRIES, _PAUSE = 200, 0.02  # seconds; the core takes connections by the thousand in that


class Gate:
    """Accepts connections, and relays those that have a place to gRPC's socket.

    Args:
        places: for connections.
        handshake: seconds until a connection has begun one.
        log: of refusals.

    Attributes:
        target: where gRPC must listen, as it names addresses: ``unix:PATH``.

    Raises:
        Unbindable: no folder for the socket can be made.
    """

    def __init__(self, places: Admission, *, handshake: float, log: SparingLog) -> None:
        self._places, self._handshake, self._log = places, handshake, log
        try:
            # only this user may enter it
            folder = tempfile.mkdtemp(prefix="prunecast-")
            if len(folder) > _LONGEST:
                Path(folder).rmdir()
                folder = tempfile.mkdtemp(prefix="prunecast-", dir="/tmp")
        except OSError as error:
            raise Unbindable(f"no folder for a socket can be made: {error.strerror}") from error
        self._folder = Path(folder)
        self.target = f"unix:{self._folder / 'grpc'}"
        self._acceptor: Acceptor | None = None
        self._guests: dict[str, _Guest] = {}
        self._number = 0

    def open(self, bound: socket.socket) -> None:
        """Accept connections from now on; gRPC listens by now."""
        self._acceptor = Acceptor(bound, self._take, self._log)

    def shut(self) -> None:
        """Accept no more; what is connected stays so."""
        if self._acceptor is not None:
            self._acceptor.close()

    def close(self) -> None:
        """End whatever is still connected."""
        self.shut()
        for guest in list(self._guests.values()):
            guest.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def address(self, peer: str) -> str:
        """Where a call comes from.

        Args:
            peer: as gRPC names it: the name that the relay's end of the connection has.
        """
        guest = self._guests.get(peer.rpartition("/")[2])
        return guest.place.client if guest else peer

    def known(self, peer: str) -> None:
        """The caller has proved who it is: its connection need not make room for strangers."""
        if guest := self._guests.get(peer.rpartition("/")[2]):
            self._places.move(guest.place, Standing.KNOWN)

    def _take(self, accepted: socket.socket, client: str) -> None:
        place = self._places.enter(client, partial(end_socket, accepted))
        if place is None:
            self._log.warning("connections", "too many connections: %s has to wait", client)
            accepted.close()
            return
        self._number += 1
        name = f"{self._number:x}"
        guest = _Guest(place, partial(self._connect, name, place), partial(self._gone, name))
        self._guests[name] = guest
        guest.attend(accepted, self._handshake)

    def _gone(self, name: str) -> None:
        self._places.leave(self._guests.pop(name).place)

    async def _connect(self, name: str, place: Place, half: _Half) -> None:
        """Connect to gRPC, from a name by which its calls tell where they come from."""
        self._places.move(place, Standing.BEGUN)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self._folder / name
        try:
            connection.setblocking(False)
            connection.bind(str(path))
            for _ in range(_TRIES):  # refused at once while the core's queue is full
                with suppress(BlockingIOError):
                    connection.connect(self.target.removeprefix("unix:"))
                    break
                await asyncio.sleep(_PAUSE)
            path.unlink()
            await asyncio.get_running_loop().create_unix_connection(lambda: half, sock=connection)
        except BaseException:
            connection.close()
            raise


class _Half(asyncio.Protocol):
    """One side of a relayed connection; what it reads, the other one writes."""

    transport: asyncio.Transport
    other: _Half

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def pause_writing(self) -> None:
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        other = self.other.transport
        other.close()  # after what it still has to write, if it can get rid of it
        asyncio.get_running_loop().call_later(_LINGER, other.abort)


class _Guest(_Half):
    """The side of a client; the other one is made when a handshake begins.

    Args:
        place: that it has.
        connect: connects another half to gRPC.
        gone: called when it has ended.
    """

    def __init__(
        self,
        place: Place,
        connect: Callable[[_Half], Coroutine[object, object, None]],
        gone: Callable[[], None],
    ) -> None:
        self.place, self._connect, self._gone = place, connect, gone
        self._working: asyncio.Task[None] | None = None

    def attend(self, accepted: socket.socket, seconds: float) -> None:
        """Take a connection over; it has so many seconds to begin a handshake."""
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(seconds, end_socket, accepted)
        self._working = loop.create_task(self._attach(accepted))

    def end(self) -> None:
        """End at once."""
        if hasattr(self, "transport"):
            self.transport.abort()
        elif self._working is not None:
            self._working.cancel()

    def data_received(self, data: bytes) -> None:
        if hasattr(self, "other"):
            super().data_received(data)
            return
        self._deadline.cancel()
        if not data.startswith(_HANDSHAKE):
            self.transport.abort()
            return
        self.transport.pause_reading()
        self._working = asyncio.get_running_loop().create_task(self._join(data))

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        if self._working is not None:
            self._working.cancel()
        if hasattr(self, "other"):
            super().connection_lost(error)
        self._gone()

    async def _attach(self, accepted: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, accepted)

    async def _join(self, begun: bytes) -> None:
        inner = _Half()
        inner.other = self
        try:
            await self._connect(inner)
        except OSError:
            self.transport.abort()
            return
        self.other = inner
        inner.transport.write(begun)
        self.transport.resume_reading()
