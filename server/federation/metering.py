"""`MeteringGrid`: plain Flower, with every message in a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from prunecast.compression.flower import stated_round
from prunecast.compression.flower.internals import make_message, serialised_objects
from prunecast.server.federation.ledger import Direction, Entry, Ledger
from prunecast.server.federation.wrapper import PollingGrid

__all__ = ["MeteringGrid", "Recode", "uncached"]

Recode = Callable[[bytes], int]
"""From the bytes of a message to how many bytes it has under another coding."""


@dataclass(frozen=True)
class _Sent:
    node: int
    round: int
    message_type: str


class MeteringGrid(PollingGrid):
    """A grid that changes nothing and records what everything costs.

    The baseline beside `CompressedGrid`: the same ledger, the same way of counting.

    Args:
        grid: the grid to wrap.
        ledger: where messages are recorded: a `Ledger`, a path for a JSON Lines file that is
            appended to, or None to count only.
        alternatives: other codings to measure on the very same messages, by name, such as
            ``{"zstd-3": lambda data: len(zstandard.compress(data, 3))}``. Each is given the
            objects of one message, joined.
        poll_interval: seconds between looking for replies in `send_and_receive`.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        ledger: Ledger | Path | None = None,
        alternatives: Mapping[str, Recode] | None = None,
        poll_interval: float = 0.2,
    ) -> None:
        super().__init__(grid, poll_interval=poll_interval)
        self.ledger = Ledger(ledger) if ledger is None or isinstance(ledger, Path) else ledger
        self._alternatives = dict(alternatives or {})
        self._sent: dict[str, _Sent] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and record them; returns their ids as the wrapped grid does."""
        self.ledger.flush()
        batch = list(messages)
        # measuring fills caches, so it is done on copies (which share the bytes) and before the
        # messages are pushed: an engine in this process pickles them, caches and all
        entries = [self._entry(uncached(message), _sent(message), "down") for message in batch]
        ids = list(self._grid.push_messages(batch))
        pushed = set(ids)
        for message, entry in zip(batch, entries, strict=True):
            if message.metadata.message_id in pushed:
                self._sent[message.metadata.message_id] = _sent(message)
                self.ledger.add(entry)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies that have arrived and record them."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is not None:
                self.ledger.add(self._entry(reply, sent, "up"))
        return replies

    def _forget(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._sent.pop(message_id, None)

    def _entry(self, message: Message, sent: _Sent, direction: Direction) -> Entry:
        # as `serialised_bytes` counts, but the bytes are needed too
        objects = list(serialised_objects(message))
        size = sum(map(len, objects))
        joined = b"".join(objects) if self._alternatives else b""
        return Entry(
            round=sent.round,
            node=sent.node,
            direction=direction,
            kind="error" if message.has_error() else "dense",
            message_type=sent.message_type,
            payload_bytes=size,
            dense_bytes=size,
            alternatives={name: code(joined) for name, code in self._alternatives.items()},
        )


def uncached(message: Message) -> Message:
    """The same message without the caches that measuring it fills; shares the arrays' bytes."""
    if message.has_error():
        return message
    content = RecordDict()
    for key, record in message.content.items():
        content[key] = ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else record
    return make_message(message.metadata, content)


def _sent(message: Message) -> _Sent:
    metadata = message.metadata
    return _Sent(metadata.dst_node_id, stated_round(message.content), metadata.message_type)
