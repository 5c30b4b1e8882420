"""Flower's insides: all that Prunecast uses of Flower without a promise of stability.

No other production module imports undocumented Flower modules or writes to a message's metadata,
so what a new minor version of Flower may break is what this file names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from types import CodeType, FrameType
from typing import TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SUPERLINK_NODE_ID",
    "ClientAppCallable",
    "ErrorCode",
    "InflatableObject",
    "Measured",
    "Mod",
    "NodeInfo",
    "Record",
    "Run",
    "content_bytes",
    "identify_process",
    "is_averaging",
    "log",
    "make_message",
    "object_bytes",
    "over_the_wire",
    "own_bytes",
    "serialised_objects",
    "set_message_id",
    "set_reply_to",
    "set_source",
    "uncached",
    "unsent",
]

Record = ArrayRecord | MetricRecord | ConfigRecord
_Inflatable = TypeVar("_Inflatable", bound=InflatableObject)


# -- envelopes ------------------------------------------------------------------------------------


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message an id, as the engine that takes it does."""
    message.metadata.__dict__["_message_id"] = message_id


def set_reply_to(reply: Message, message_id: str) -> None:
    """Let a reply answer another message."""
    reply.metadata.__dict__["_reply_to_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Let a message come from another node."""
    message.metadata.__dict__["_src_node_id"] = node_id


def unsent(message: Message) -> Message:
    """The same content in a copy of the envelope that an engine accepts as a new message."""
    copied = make_message(copy.deepcopy(message.metadata), message.content)
    set_message_id(copied, "")
    return copied


def identify_process(run_id: int, node_id: int, task_id: int = 1) -> None:
    """State in which run this process takes part and as whom.

    Flower reads it when a `Message` is constructed; its own engines state it themselves.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


# -- serialised objects ---------------------------------------------------------------------------
# Flower sends a message as content-addressed objects: the message, its records, arrays and array
# chunks. An object that occurs twice in a message is sent once.


def serialised_objects(item: InflatableObject) -> list[bytes]:
    """Every object that a message, content, record or array consists of, once, in bytes.

    Serialising fills caches inside the item.
    """
    with no_object_id_recompute():  # as Flower's grid does: else every level hashes all below it
        return [part.deflate() for part in get_all_nested_objects(item).values()]


def object_bytes(item: InflatableObject) -> int:
    """Serialised bytes of a message, content, record or array, with all it consists of."""
    with no_object_id_recompute():
        return sum(len(part.deflate()) for part in get_all_nested_objects(item).values())


def own_bytes(item: Message | RecordDict) -> int:
    """Serialised bytes of a message or content without the objects that it refers to."""
    return len(item.deflate())


def over_the_wire(message: Message) -> Message:
    """Serialise a message into Flower's objects and build it anew from their bytes."""
    objects = get_all_nested_objects(message)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    built = cast(Message, inflate_object_from_contents(message.object_id, contents))
    set_message_id(built, message.metadata.message_id)
    return built


def uncached(item: _Inflatable) -> _Inflatable:
    """The same message, content or record without Flower's caches; shares the arrays' bytes.

    Measuring fills caches. An engine in this process pickles what it is handed, caches and all, so
    what is or will be pushed is measured on such a copy.
    """
    if isinstance(item, ArrayRecord):
        return ArrayRecord(dict(item))  # type: ignore[return-value]
    if isinstance(item, RecordDict):
        copies = {key: uncached(record) for key, record in item.items()}
        return RecordDict(copies)  # type: ignore[return-value]
    if isinstance(item, Message) and not item.has_error():
        return make_message(item.metadata, uncached(item.content))  # type: ignore[return-value]
    return item


class Measured:
    """Serialised bytes of a record, measured once for all the messages that hold it.

    Attributes:
        copy: the record without caches of before; those that measuring fills are its own.
        object_id: digest of the record.
        objects: id of every object that the record consists of, to its bytes.
    """

    def __init__(self, record: Record) -> None:
        self.copy: Record = uncached(record)
        with no_object_id_recompute():
            parts = get_all_nested_objects(self.copy)
            self.objects = {key: len(part.deflate()) for key, part in parts.items()}
            self.object_id = self.copy.object_id

    @property
    def nbytes(self) -> int:
        """Bytes of the record."""
        return sum(self.objects.values())


def content_bytes(records: Mapping[str, Measured], envelope: Message | None = None) -> int:
    """Serialised bytes of a content of such records, and of the message in such an envelope.

    An object that several records consist of is sent once.
    """
    objects = {k: size for record in records.values() for k, size in record.objects.items()}
    content = RecordDict({key: record.copy for key, record in records.items()})
    own = own_bytes(content)
    if envelope is not None:
        own += own_bytes(make_message(envelope.metadata, content))
    return sum(objects.values()) + own


# -- strategies -----------------------------------------------------------------------------------


def is_averaging(frame: FrameType) -> bool:
    """Whether a frame runs Flower's own weighted average of the arrays of replies.

    All that this function does with an array is to multiply it by a weight, add it to the sum,
    and turn the sum into an array. FedAvg and what builds on it call it.
    """
    return frame.f_code is _averaging_code()


@cache
def _averaging_code() -> CodeType:
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords  # not for nodes

    return aggregate_arrayrecords.__code__
