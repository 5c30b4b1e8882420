"""What every listener needs so that strangers do not use up what it is there for.

Connections are counted when they are accepted, for each client and in all, before a byte of them is
read; descriptors are allowed for before the first one comes; and what is refused does not fill the
log.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import resource
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum, auto

__all__ = [
    "Acceptor",
    "Admission",
    "Place",
    "SparingLog",
    "Standing",
    "allow_descriptors",
    "bind",
    "client_of",
    "end_socket",
]

_TURN = 8  # connections that are accepted before others have a turn
_PAUSE = 0.2  # seconds
_BACKLOG = 2048
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_NO_LIMIT = 2**30


# -- descriptors and sockets ----------------------------------------------------------------------


def allow_descriptors() -> int:
    """Raise this process's soft limit of open files to its hard one.

    Returns:
        How many files may be open from now on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS: no limit is none that may be set
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; ``::`` takes IPv4 as well.

    Raises:
        OSError: the address cannot be bound; `strerror` says why.
    """
    if ":" not in host:
        return socket.create_server((host, port), backlog=_BACKLOG)
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(
        (host, port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=both
    )


def end_socket(connection: socket.socket) -> None:
    """End a connection whoever reads from it, which then closes it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def client_of(address: str) -> str:
    """Who an address counts as: itself, or its /64, the least that an IPv6 customer is given.

    >>> client_of("192.0.2.7"), client_of("2001:db8::1:2:3:4"), client_of("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8::', '192.0.2.7')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(found) >> 64 << 64))


class Acceptor:
    """Accepts connections in the running event loop until closed; others have their turns between.

    Args:
        bound: listens.
        taken: called with each connection, and as whom it counts.
        log: told when the system is out of descriptors; it is then tried again.
    """

    def __init__(
        self,
        bound: socket.socket,
        taken: Callable[[socket.socket, str], None],
        log: SparingLog,
    ) -> None:
        self._bound, self._taken, self._log = bound, taken, log
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        bound.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more; what was accepted has been handed over. Once more is harmless."""
        if self._bound.fileno() < 0:
            return
        self._loop.remove_reader(self._bound)
        if self._again is not None:
            self._again.cancel()
        self._bound.close()

    def _listen(self) -> None:
        self._loop.add_reader(self._bound, self._accept)

    def _accept(self) -> None:
        for _ in range(_TURN):
            try:
                connection, address = self._bound.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._log.warning("accept", "no connection can be taken: %s", error.strerror)
                    self._loop.remove_reader(self._bound)
                    self._again = self._loop.call_later(_PAUSE, self._listen)
                return  # none is left, or the client has gone already
            connection.setblocking(False)
            self._taken(connection, client_of(str(address[0]) if address else ""))


# -- places ---------------------------------------------------------------------------------------


class Standing(Enum):
    """What a connection has shown; it decides who makes room when there is too little."""

    STRANGER = auto()
    """It has said nothing yet: the first to go."""
    BEGUN = auto()
    """It has begun a handshake or a request: it has ten times as long as a stranger."""
    IDLE = auto()
    """It was served and waits; it goes for a newcomer whose client holds less."""
    BUSY = auto()
    """It is being served, and not ended for others."""
    KNOWN = auto()
    """It has proved who it is: not ended for others, and not counted to its address."""


class Place:
    """The place of one connection in an `Admission`.

    Attributes:
        client: as whom it counts, see `client_of`.
        standing: see `Standing`.
        since: when it came, or last changed its standing, in seconds of the clock.
    """

    def __init__(self, client: str, end: Callable[[], None], since: float) -> None:
        self.client, self.end, self.since = client, end, since
        self.standing = Standing.STRANGER


class Admission:
    """Places for connections; safe in one event loop, or under a lock of its caller.

    A newcomer for whom there is no place takes that of another one:

    - where the address has its share, the oldest of its own that have waited for `patience`;
    - where all places are taken, that of the address which holds most, if it will still hold as
      many as the newcomer's; else the oldest that has waited for `patience`.

    Strangers go first, then those that have begun, then idle ones, the oldest of each before the
    others: as long as there is any of the former, however young, no idle one goes for having
    waited. Who is served stays.

    Args:
        most: places.
        per_client: places of one address.
        patience: seconds for which one that waits keeps its place while others want it; ten times
            as long if it has begun.
        clock: monotonic seconds, for tests.

    >>> ended, places = [], Admission(2, 2)
    >>> for _ in range(2):
    ...     place = places.enter("a", lambda: ended.append("a"))
    >>> places.enter("a", print) is None, places.enter("b", print).client, ended
    (True, 'b', ['a'])
    """

    def __init__(
        self,
        most: int,
        per_client: int,
        *,
        patience: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._per_client = most, per_client
        self._patience = {
            Standing.STRANGER: patience,
            Standing.BEGUN: 10 * patience,
            Standing.IDLE: patience,
        }
        self._clock = clock
        self._places: set[Place] = set()
        self._held = Counter[str]()  # by client, without those who are known
        # those who may have to go; dictionaries keep the order in which they came
        self._waiting: dict[Standing, defaultdict[str, dict[Place, None]]] = {
            standing: defaultdict(dict) for standing in self._patience
        }

    def __len__(self) -> int:
        """Places that are taken."""
        return len(self._places)

    def enter(self, client: str, end: Callable[[], None]) -> Place | None:
        """A place for a new connection; None where there is none and none can be made.

        Args:
            client: as whom it counts.
            end: ends the connection, called when it has to make room.
        """
        if (shared := self._held[client] >= self._per_client) or len(self) >= self._most:
            found = self._of_its_own(client) if shared else self._of_the_largest(client)
            if found is None:
                return None
            self.leave(found)
            found.end()
        place = Place(client, end, self._clock())
        self._places.add(place)
        self._held[client] += 1
        self._waiting[Standing.STRANGER][client][place] = None
        return place

    def move(self, place: Place, standing: Standing) -> None:
        """A connection shows something else; nothing happens if it has left."""
        if place in self._places and place.standing is not standing:
            self._take_out(place)
            place.standing, place.since = standing, self._clock()
            if standing is not Standing.KNOWN:
                self._held[place.client] += 1
            if standing in self._waiting:
                self._waiting[standing][place.client][place] = None

    def leave(self, place: Place) -> None:
        """A connection has ended; once more is harmless."""
        if place in self._places:
            self._places.remove(place)
            self._take_out(place)

    def _take_out(self, place: Place) -> None:
        if place.standing is not Standing.KNOWN:
            self._held[place.client] -= 1
            if not self._held[place.client]:
                del self._held[place.client]
        if (waiting := self._waiting.get(place.standing)) is not None:
            del waiting[place.client][place]
            if not waiting[place.client]:
                del waiting[place.client]

    def _of_its_own(self, client: str) -> Place | None:
        return self._patient([waiting.get(client, {}) for waiting in self._waiting.values()])

    def _of_the_largest(self, newcomer: str) -> Place | None:
        for waiting in self._waiting.values():
            client = max(waiting, key=lambda one: self._held[one], default=newcomer)
            if self._held[client] > self._held[newcomer] + 1:
                return next(iter(waiting[client]))
        return self._patient(
            [
                sorted((next(iter(of)) for of in waiting.values()), key=_since)[:1]
                for waiting in self._waiting.values()
            ]
        )

    def _patient(self, found: list[Iterable[Place]]) -> Place | None:
        """The first one that has waited, of those in each standing, the oldest first."""
        none_yet = True
        for places in found:
            oldest = next(iter(places), None)
            if oldest is None or (oldest.standing is Standing.IDLE and not none_yet):
                continue
            if self._clock() - oldest.since >= self._patience[oldest.standing]:
                return oldest
            none_yet = False
        return None


def _since(place: Place) -> float:
    return place.since


# -- the log --------------------------------------------------------------------------------------


class SparingLog:
    """Writes a few lines of a kind in every interval and then only how many there were.

    What strangers can bring about is written here, so that they cannot fill a disk.

    Args:
        logger: to write to.
        lines: of one kind in one interval.
        interval: in seconds.
        clock: monotonic seconds, for tests.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        lines: int = 5,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger, self._lines, self._interval, self._clock = logger, lines, interval, clock
        self._begun: dict[str, float] = {}
        self._written, self._left_out = Counter[str](), Counter[str]()

    def warning(self, kind: str, message: str, *values: object) -> None:
        """Write a line, or count it.

        Args:
            kind: one of a few words that the program knows; never from a stranger.
            message: with ``%s`` for the values.
        """
        now = self._clock()
        if now - self._begun.get(kind, -self._interval) >= self._interval:
            self._sum_up(kind)
            self._begun[kind], self._written[kind] = now, 0
        if self._written[kind] < self._lines:
            self._written[kind] += 1
            self._logger.warning(message, *values)
        else:
            self._left_out[kind] += 1

    def close(self) -> None:
        """Write how many lines were left out so far."""
        for kind in list(self._left_out):
            self._sum_up(kind)

    def _sum_up(self, kind: str) -> None:
        if count := self._left_out.pop(kind, 0):
            seconds = self._clock() - self._begun[kind]
            self._logger.warning("%d more like that (%s) in %.0f seconds", count, kind, seconds)
