"""Which messages travel as one record: where that is fewer bytes on both of their ways together.

Flower uploads an object once for all messages that hold it, and each node fetches it for itself. A
payload in a record of its own is one upload, and costs every node objects and requests; inside of
the record that holds all else it is uploaded as often as these records differ. They do not where
nodes are in the same state and the strategy tells them the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import RecordDict

from prunecast.compression.flower import payload_of
from prunecast.compression.flower.envelope import PACKED_RECORD, pack
from prunecast.compression.flower.internals import Measured, make_message
from prunecast.server.federation.exchange.batches import Prepared

__all__ = ["APART", "pack_together"]

APART = 5250
"""Bytes that a payload in a record of its own costs on the way to a node, in four requests more and
beside itself, see docs/payloads.md."""


@dataclass
class _Packed:
    """A content in one record, and the messages that hold it."""

    content: RecordDict
    items: list[Prepared] = field(default_factory=list)


def pack_together(prepared: Sequence[Prepared]) -> None:
    """Pack messages that are sent together, where that pays.

    Args:
        prepared: the messages; those that are packed have another `Prepared.message`, whose content
            they share where it is the same.
    """
    # by the payloads that they share with others, and by what becomes of their content
    found: dict[tuple[int, ...], dict[tuple[object, ...], _Packed]] = {}
    for item in prepared:
        if item.densely:  # nobody would unpack it
            continue
        content = pack(item.message.content)
        if content is item.message.content:
            continue
        inside = content.config_records[PACKED_RECORD].values()
        outside = ((k, id(r)) for k, r in content.items() if k != PACKED_RECORD)
        shared = tuple(id(measured) for measured in item.measured.values())
        same = found.setdefault(shared, {}).setdefault((*inside, *outside), _Packed(content))
        same.items.append(item)
    for group in found.values():
        items = [item for packed in group.values() for item in packed.items]
        if (len(group) - 1) * _shared_bytes(items[0]) > APART * len(items):
            continue
        for packed in group.values():
            known = packed.items[0].measured  # of the records that stay outside
            measured = {k: known.get(k) or Measured(r) for k, r in packed.content.items()}
            for item in packed.items:
                item.message = make_message(item.original.metadata, packed.content)
                item.measured = measured


def _shared_bytes(item: Prepared) -> int:
    """Bytes of the payloads that a message shares with others."""
    payloads = (payload_of(item.message.content[key]) for key in item.measured)
    return sum(len(payload) for payload in payloads if payload is not None)
