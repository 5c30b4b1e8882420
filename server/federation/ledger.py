"""The byte ledger: one line per message, as it was serialised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from flwr.app import Message

from prunecast.compression.flower.internals import object_bytes

__all__ = ["Direction", "Entry", "Ledger", "Totals", "serialised_bytes"]

Direction = Literal["down", "up"]


def serialised_bytes(message: Message) -> int:
    """Bytes of a message as Flower serialises it: every object it consists of, once.

    Flower sends a message as content-addressed objects (the message, its records, arrays and
    array chunks); an object that occurs twice in a message is sent once. HTTP framing and TLS
    come on top and are not counted.
    """
    return object_bytes(message)


@dataclass
class Entry:
    """One message.

    Attributes:
        round: number of the version the message carries or answers (0: none).
        node: node id.
        direction: "down" is server to node, "up" node to server.
        kind: keyframe, delta, reuse, update, plain, verbatim, base-missing, error or none;
            several, joined by "+", where a message has several array records.
        message_type: Flower's message type.
        payload_bytes: bytes of the serialised message.
        dense_bytes: bytes the same message has in plain Flower.
        encode_ms: milliseconds spent encoding; 0.0 where a payload made for another node served.
        decode_ms: milliseconds spent decoding on the server.
        alternatives: bytes of the same message under other codings measured beside it.
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


@dataclass(frozen=True)
class Totals:
    """Sums over a ledger, in bytes and milliseconds."""

    messages: int
    bytes_up: int
    bytes_down: int
    dense_bytes_up: int
    dense_bytes_down: int
    encode_ms: float
    decode_ms: float

    @property
    def payload_bytes(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down

    @property
    def dense_bytes(self) -> int:
        """Bytes plain Flower needs for the same messages, both directions."""
        return self.dense_bytes_up + self.dense_bytes_down


class Ledger:
    """Collects entries and, given a path, appends them to a JSON Lines file.

    Replies are decoded lazily, so an entry is written once its decoding time is known: at the
    next `flush`, which the grid calls before every new batch of messages and at the end.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.entries: list[Entry] = []
        self._written = 0
        self._file: IO[str] | None = None
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def add(self, entry: Entry) -> Entry:
        """Record a message; the caller may still set `decode_ms` before the next flush."""
        self.entries.append(entry)
        return entry

    def flush(self) -> None:
        """Write the entries not yet written."""
        if self._file is None:
            return
        for entry in self.entries[self._written :]:
            line = asdict(entry)
            if not line["alternatives"]:
                del line["alternatives"]
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._written = len(self.entries)

    def close(self) -> None:
        """Flush and close the file; adding entries afterwards keeps them in memory only."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def totals(self, entries: Iterable[Entry] | None = None) -> Totals:
        """Sums over all entries, or over the given ones."""
        chosen = list(self.entries if entries is None else entries)
        up = [e for e in chosen if e.direction == "up"]
        down = [e for e in chosen if e.direction == "down"]
        return Totals(
            messages=len(chosen),
            bytes_up=sum(e.payload_bytes for e in up),
            bytes_down=sum(e.payload_bytes for e in down),
            dense_bytes_up=sum(e.dense_bytes for e in up),
            dense_bytes_down=sum(e.dense_bytes for e in down),
            encode_ms=sum(e.encode_ms for e in chosen),
            decode_ms=sum(e.decode_ms for e in chosen),
        )
