"""The byte ledger: one line per message, as it was serialised."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from logging import WARNING
from pathlib import Path
from typing import Any

from prunecast.common.files import StorageError
from prunecast.common.journal import Journal, new_run_id, read_run
from prunecast.compression.flower.internals import log
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.reporting.wire import Direction, wire_cost

__all__ = ["Direction", "Entry", "Ledger", "Tally", "Totals"]

_OFTEN_EMPTY = (
    "alternatives",
    "reason",
    "objects",
    "width",
    "capability",
    "seconds",
    "most",
    "coarser",
)
SCHEMA = 1
"""Grows when old readers would misread a ledger; new fields do not change it."""


@dataclass
class Entry:
    """One message.

    Attributes:
        round: number of the version the message carries or answers (0: none).
        node: node id.
        direction: "down" is server to node, "up" node to server.
        kind: keyframe, delta, reuse, update, values, mixed, plain, verbatim, base-missing, late,
            stale, error, ask or none, see docs/run.md; several, joined by "+", where a message has
            several array records.
        message_type: Flower's message type.
        payload_bytes: bytes of the message as Flower serialises it, every object it consists of
            once; what HTTP and TLS add is estimated from it, see `Totals`.
        dense_bytes: bytes the same message has in plain Flower.
        encode_ms: milliseconds spent encoding; 0.0 where a payload made for another node served.
        decode_ms: milliseconds spent decoding on the server.
        alternatives: bytes of the same message under other codings measured beside it.
        reason: why a reply is an error or was refused; "" for one that is neither.
        objects: how many of Flower's objects the message consists of, each of which is a request;
            0 in ledgers of before they were counted.
        width: the width class that the node states; "" for none.
        capability: the capability class that the node is of; "" for none.
        seconds: on a SuperLink, since the message before between it and the node, which went the
            other way: how long the node took, or waited; 0.0 where that is not known.
        most: bytes that the payloads of a reply might have, under a budget; 0 for any.
        coarser: quarters of a doubling by which its steps were coarser, so that they had.
    """

    round: int
    node: int
    direction: Direction
    kind: str
    message_type: str
    payload_bytes: int
    dense_bytes: int
    encode_ms: float = 0.0
    decode_ms: float = 0.0
    alternatives: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    objects: int = 0
    width: str = ""
    capability: str = ""
    seconds: float = 0.0
    most: int = 0
    coarser: int = 0


@dataclass(frozen=True)
class Totals:
    """Sums over messages, in bytes and milliseconds.

    Attributes:
        messages: how many.
        bytes_up, bytes_down: of messages from the nodes, and to them.
        dense_bytes_up, dense_bytes_down: what these have in plain Flower.
        encode_ms, decode_ms: spent on them.
        requests: of HTTP that they take.
        http_up, http_down: bytes that HTTP adds from the nodes, and to them; a message adds to
            both, because nodes ask for what they are sent.
        tls_up, tls_down: bytes that TLS adds to that.

    The last five are *estimates*, see `wire_cost`, 0 where objects were not counted.
    """

    messages: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    dense_bytes_up: int = 0
    dense_bytes_down: int = 0
    encode_ms: float = 0.0
    decode_ms: float = 0.0
    requests: int = 0
    http_up: int = 0
    http_down: int = 0
    tls_up: int = 0
    tls_down: int = 0

    @property
    def wire_up(self) -> int | None:
        """*Estimated* bytes on the wire from the nodes, by HTTP without TLS; None: not known."""
        return self.bytes_up + self.http_up if self._counted else None

    @property
    def wire_down(self) -> int | None:
        """*Estimated* bytes on the wire to the nodes, by HTTP without TLS; None: not known."""
        return self.bytes_down + self.http_down if self._counted else None

    @property
    def wire_tls_up(self) -> int | None:
        """*Estimated* bytes on the wire from the nodes, by HTTP with TLS; None: not known."""
        return self.bytes_up + self.http_up + self.tls_up if self._counted else None

    @property
    def wire_tls_down(self) -> int | None:
        """*Estimated* bytes on the wire to the nodes, by HTTP with TLS; None: not known."""
        return self.bytes_down + self.http_down + self.tls_down if self._counted else None

    @property
    def _counted(self) -> bool:
        return self.requests > 0 or not self.messages

    def wire(self) -> dict[str, int] | None:
        """The estimates as results state them; None where objects were not counted.

        Returns:
            ``requests``; bytes on the wire ``http_up`` and ``http_down``, and by TLS ``tls_up`` and
            ``tls_down``, messages included.
        """
        if not self._counted:
            return None
        http = {"http_up": self.wire_up, "http_down": self.wire_down}
        tls = {"tls_up": self.wire_tls_up, "tls_down": self.wire_tls_down}
        return {"requests": self.requests, **{k: v or 0 for k, v in {**http, **tls}.items()}}

    @property
    def payload_bytes(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down

    @property
    def dense_bytes(self) -> int:
        """Bytes plain Flower needs for the same messages, both directions."""
        return self.dense_bytes_up + self.dense_bytes_down

    def __add__(self, other: Totals) -> Totals:
        # by vars: astuple copies deeply, and a run adds once per message
        sums = zip(vars(self).values(), vars(other).values(), strict=True)
        return Totals(*(mine + theirs for mine, theirs in sums))


class Tally:
    """Sums of entries per round, direction, kind and class; takes memory for these alone."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._sums: dict[tuple[int, Direction, str, str, str], Totals] = {}
        self._all = Totals()
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Count a message."""
        key = entry.round, entry.direction, entry.kind, entry.width, entry.capability
        size, dense = entry.payload_bytes, entry.dense_bytes
        bytes_ = (size, 0, dense, 0) if entry.direction == "up" else (0, size, 0, dense)
        wire: Iterable[int] = ()
        if entry.objects:
            cost = wire_cost(entry.direction, entry.objects, size, entry.seconds)
            wire = vars(cost).values()
        counted = Totals(1, *bytes_, entry.encode_ms, entry.decode_ms, *wire)
        self._sums[key] = self._sums.get(key, Totals()) + counted
        self._all += counted

    def totals(
        self,
        *,
        rounds: range | None = None,
        direction: Direction | None = None,
        kind: str | None = None,
        width: str | None = None,
        capability: str | None = None,
    ) -> Totals:
        """Sums over all messages, or over those of some rounds, a direction, kind or class.

        Args:
            rounds: their numbers, such as ``range(3, 4)``; None for all.
            direction: "down" or "up"; None for both.
            kind: see `Entry`; None for all.
            width: class of the nodes, "" for those that state none; None for all.
            capability: likewise, by what they can do.
        """
        of = direction, kind, width, capability
        if rounds is None and of == (None, None, None, None):
            return self._all
        found = Totals()
        for (number, *said), part in self._sums.items():
            wanted = all(one in (None, its) for one, its in zip(of, said, strict=True))
            if wanted and (rounds is None or number in rounds):
                found += part
        return found

    def kinds(self, direction: Direction) -> list[str]:
        """Kinds of message that were counted in a direction, in the order they came."""
        return list(dict.fromkeys(kind for _, way, kind, *_ in self._sums if way == direction))


class Ledger:
    """Counts messages and, given a path, appends a line for each to a JSON Lines file.

    The file keeps the runs before; docs/run.md describes it. Sums are kept in memory, entries
    are not: `read` streams them from the file. Replies are decoded lazily, so an entry is written
    once its decoding time is known: at the next `flush`, which the grid calls before every new
    batch of messages and at the end. An entry that cannot be written (a full disk) is counted all
    the same and reported in the log; it never ends the training.

    Args:
        path: of the file; None for sums only.
        keep: how many of the latest entries to keep in `entries`.
        run: id of the run, by default a new one.
        name: what people call the run.
        seed: of the run, for the file's reader.
        continues: id of a run in the file that this one goes on with: sums begin with its own.

    Raises:
        StorageError: the file cannot be written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        keep: int = 0,
        run: str = "",
        name: str = "",
        seed: int | None = None,
        continues: str = "",
    ) -> None:
        self.run = run or new_run_id()
        self._tally = Tally()
        if continues and path is not None:
            with suppress(StorageError):  # it was taken away: what is left is counted
                self._tally = Tally(self.read(path, continues))
        self._pending: list[Entry] = []
        self._kept: deque[Entry] = deque(maxlen=keep)
        self._journal: Journal | None = None
        if path is not None:
            started = datetime.now(UTC).isoformat(timespec="milliseconds")
            header = {"schema": SCHEMA, "run": self.run, "name": name, "seed": seed}
            if continues:
                header["continues"] = continues
            self._journal = Journal(path, {**header, "started": started})

    @property
    def path(self) -> Path | None:
        """The file that entries go to, while it is open."""
        return self._journal.path if self._journal else None

    @property
    def entries(self) -> list[Entry]:
        """The latest entries, as many as were to be kept; oldest first.

        Raises:
            FederationError: none were to be kept.
        """
        if not self._kept.maxlen:
            raise FederationError(
                "this ledger keeps no entries in memory: read its file with Ledger.read(path), or "
                "make it with Ledger(keep=1000)"
            )
        return list(self._kept)

    def add(self, entry: Entry) -> Entry:
        """Record a message; the caller may still change the entry before the next flush."""
        self._pending.append(entry)
        self._kept.append(entry)
        return entry

    def flush(self) -> None:
        """Take the entries added so far for complete: count them and write them."""
        done, self._pending = self._pending, []
        for entry in done:
            self._tally.add(entry)
        if self._journal is not None:
            lines = [dict(vars(entry)) for entry in done]
            for line in lines:
                for name in _OFTEN_EMPTY:
                    if not line[name]:
                        del line[name]
            try:
                self._journal.append(lines)
            except StorageError as error:
                log(WARNING, "The ledger lacks %d messages: %s", len(lines), error)

    def close(self) -> None:
        """Flush and close the file; entries added afterwards are only counted."""
        self.flush()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def totals(
        self,
        *,
        rounds: range | None = None,
        direction: Direction | None = None,
        kind: str | None = None,
        width: str | None = None,
        capability: str | None = None,
    ) -> Totals:
        """Sums so far, as `Tally.totals` gives them."""
        wanted: dict[str, Any] = {
            "rounds": rounds,
            "direction": direction,
            "kind": kind,
            "width": width,
            "capability": capability,
        }
        return self._tally.totals(**wanted) + Tally(self._pending).totals(**wanted)

    def by_kind(self, most: int = 24) -> dict[str, dict[str, dict[str, int]]]:
        """Messages and bytes so far, by direction and kind.

        Args:
            most: kinds of a direction; those that came up later are summed up as "others".
        """
        found: dict[str, dict[str, dict[str, int]]] = {"down": {}, "up": {}}
        directions: tuple[Direction, Direction] = ("down", "up")
        for direction in directions:
            for number, kind in enumerate(self._tally.kinds(direction)):
                part = self._tally.totals(direction=direction, kind=kind)
                name = kind if number < most else "others"
                sums = found[direction].setdefault(name, {"messages": 0, "bytes": 0})
                sums["messages"] += part.messages
                sums["bytes"] += part.payload_bytes
        return found

    @staticmethod
    def read(path: Path, run: str | None = None, *, whole: bool = True) -> Iterator[Entry]:
        """Entries of one run, as they are read from a file; fields not known here are dropped.

        Of a run that was stopped and resumed they include what was sent in a round that was cut
        off: those bytes were spent.

        Args:
            path: of a file that a ledger with a path wrote.
            run: id or name of the run; None for the last one.
            whole: also those of the runs of Flower before, which it goes on with.

        Raises:
            StorageError: the file cannot be read, is damaged or of a newer schema, or has no such
                run.
        """
        lines = read_run(path, schema=SCHEMA, run=run, whole=whole)
        next(lines)  # the header
        return _entries(path, lines)


def _entries(path: Path, lines: Iterator[dict[str, Any]]) -> Iterator[Entry]:
    known = {field.name for field in fields(Entry)}
    try:
        for line in lines:
            yield Entry(**{key: value for key, value in line.items() if key in known})
    except TypeError as error:
        raise StorageError(f"ledger {path} is damaged: {error}") from error
