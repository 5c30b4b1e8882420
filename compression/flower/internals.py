"""Flower's insides: all that Prunecast uses of Flower without a promise of stability.

No other production module imports undocumented Flower modules or writes to a message's metadata,
so what a new minor version of Flower may break is what this file names.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore import heartbeat, log
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.retry import retry_invoker
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

__all__ = [
    "SUPERLINK_NODE_ID",
    "Aggregation",
    "ClientAppCallable",
    "ErrorCode",
    "InflatableObject",
    "Measured",
    "Mod",
    "NodeInfo",
    "Record",
    "Run",
    "WatchedReply",
    "adds_noise",
    "aggregation_above",
    "content_bytes",
    "function_of",
    "identify_process",
    "is_averaging",
    "keep_random_apart",
    "legacy_arrays",
    "legacy_parameters",
    "log",
    "make_message",
    "object_bytes",
    "objects_in",
    "on_superlink",
    "over_the_wire",
    "own_bytes",
    "record_body",
    "record_from",
    "rounds_above",
    "serialised_objects",
    "set_message_id",
    "set_reply_to",
    "set_source",
    "unavailable",
    "uncached",
    "unsent",
    "unwatched",
    "watched",
]

Record = ArrayRecord | MetricRecord | ConfigRecord
_Inflatable = TypeVar("_Inflatable", bound=InflatableObject)
_Values = TypeVar("_Values", ConfigRecord, MetricRecord)

_OWN = random.Random()  # of Flower's threads and waits


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


def unavailable(message_id: str, run_id: int) -> Message:
    """What the SuperLink answers for a message that it does not have.

    It never got it, it expired, or its reply was delivered.
    """
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    reason = f"Error: Message Unavailable - {message_id} expired, was answered or never existed"
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))


def keep_random_apart() -> None:
    """Let Flower's threads and waits draw from a generator of their own, from now on.

    They jitter by Python's own one, which strategies sample nodes with: how long a message took
    would decide who is asked next.
    """
    for module in (heartbeat, inflatable_utils, retry_invoker):
        if module.random is random:
            setattr(module, "random", _OWN)  # noqa: B010  the name of a module, for mypy


def identify_process(run_id: int, node_id: int, task_id: int = 1) -> None:
    """State in which run this process takes part and as whom.

    Flower reads it when a `Message` is constructed; its own engines state it themselves.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def on_superlink(grid: object) -> bool:
    """Whether a grid of Flower's reaches nodes by a SuperLink, and not those of a simulation."""
    return type(grid).__module__.startswith("flwr.") and type(grid).__name__ == "HttpGrid"


def record_body(record: ConfigRecord | MetricRecord) -> bytes:
    """A record of values as Flower serialises it, without the header of an object."""
    return bytes(record.deflate()).partition(b"\0")[2]


def record_from(kind: type[_Values], body: bytes) -> _Values:
    """Inverse of `record_body`.

    Raises:
        ValueError: no such record.
    """
    header = f"{kind.__qualname__}  {len(body)}".encode()
    try:
        return kind.inflate(header + b"\0" + body)
    except (DecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no {kind.__name__} of Flower: {error}") from error


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


def objects_in(records: Iterable[Measured]) -> dict[str, int]:
    """Id and bytes of every object of some records; one that several consist of is sent once."""
    return {key: size for record in records for key, size in record.objects.items()}


def content_bytes(records: Mapping[str, Measured], envelope: Message | None = None) -> int:
    """Serialised bytes of a content of such records, and of the message in such an envelope."""
    objects = objects_in(records.values())
    content = RecordDict({key: record.copy for key, record in records.items()})
    own = own_bytes(content)
    if envelope is not None:
        own += own_bytes(make_message(envelope.metadata, content))
    return sum(objects.values()) + own


# -- mods and the legacy API ----------------------------------------------------------------------


def adds_noise(call_next: ClientAppCallable) -> bool:
    """Whether Flower's mod for local differential privacy stands behind the one that is called.

    Args:
        call_next: what that one is given to call: Flower's chain of the mods behind it.
    """
    from flwr.clientapp.mod import LocalDpMod  # not for servers

    following: object = call_next
    while isinstance(following, FunctionType) and following.__closure__ is not None:
        inside = dict(zip(following.__code__.co_freevars, following.__closure__, strict=True))
        if not {"_mod", "_ffn"} <= inside.keys():
            break
        if isinstance(inside["_mod"].cell_contents, LocalDpMod):
            return True
        following = inside["_ffn"].cell_contents
    return False


def legacy_arrays(parameters: Any) -> list[NDArray[Any]]:
    """The arrays of parameters of the legacy API."""
    from flwr.common import parameters_to_ndarrays

    return list(parameters_to_ndarrays(parameters))


def legacy_parameters(arrays: Iterable[NDArray[Any]]) -> Any:
    """Inverse of `legacy_arrays`."""
    from flwr.common import ndarrays_to_parameters

    return ndarrays_to_parameters(list(arrays))


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


@dataclass(frozen=True)
class Aggregation:
    """What Flower's own aggregation asks of the replies it is given, or else ends the run.

    Attributes:
        weight: name of the metric that replies are weighed by.
        arrays: exactly one array record each, with the same arrays.
        shapes: these of the same shapes.
        lengths: metrics that are lists of the same lengths.
    """

    weight: str
    arrays: bool
    shapes: bool
    lengths: bool


def function_of(message_type: str) -> str:
    """What a message asks for, by a ClientApp's only function for it or a named one.

    >>> function_of("train.personalised")
    'train'
    """
    return message_type.partition(".")[0]


def aggregation_above(frame: FrameType | None, message_type: str) -> Aggregation | None:
    """What Flower makes of the replies to messages that are sent in a frame.

    Args:
        frame: whose callers are looked at for a strategy.
        message_type: of the messages.

    Returns:
        None where nobody knows: outside a strategy's `start`, or where it aggregates by code of
        its own.
    """
    strategy, _ = _started(frame)
    return None if strategy is None else _aggregation(strategy, function_of(message_type))


def rounds_above(frame: FrameType | None) -> int:
    """How many rounds a strategy's `start` is to go, among the callers of a frame; 0 for none."""
    return _started(frame)[1]


def _started(frame: FrameType | None) -> tuple[object, int]:
    from flwr.serverapp.strategy import Strategy

    while frame is not None and frame.f_code is not Strategy.start.__code__:
        frame = frame.f_back
    if frame is None:
        return None, 0
    found = frame.f_locals
    strategy, rounds = found["self"], int(found["num_rounds"])
    if type(found) is dict:  # a copy that the frame keeps, before Python 3.13: with a dense model
        found.clear()
    return strategy, rounds


def _aggregation(strategy: object, kind: str) -> Aggregation | None:
    from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

    aggregate = inspect.unwrap(getattr(strategy, f"aggregate_{kind}", _aggregation))
    module = aggregate.__module__.rpartition(".")
    if module[0] != "flwr.serverapp.strategy":
        return None
    wrapped = getattr(strategy, "strategy", None)  # as those for differential privacy have
    if wrapped is not None:
        return _aggregation(wrapped, kind)
    metrics = getattr(strategy, f"{kind}_metrics_aggr_fn", None)
    return Aggregation(
        weight=getattr(strategy, "weighted_by_key", "num-examples"),
        arrays=kind == "train",
        shapes="xgb" not in module[2],  # trees are appended to each other
        lengths=metrics is aggregate_metricrecords,
    )


Told = Callable[[Aggregation, "Sequence[Message] | None"], None]
"""Called with what Flower is about to make of replies; and these, if not an iterator has them."""


class WatchedReply(Message):
    """A reply that tells when Flower's own aggregation takes it into its hands.

    What a strategy of one's own makes of replies nobody knows: it may sort some out, or bring all
    to one shape. Where it calls Flower's after that, by `super()` or a method of FedAvg, this
    begins by asking every reply whether it is an error.
    """

    def has_error(self) -> bool:
        """See `flwr.app.Message.has_error`."""
        told = _WATCHES.get(self)
        found = None if told is None else _aggregation_in(sys._getframe(1))
        if told is not None and found is not None:
            told(*found)
        return super().has_error()

    def fail(self, error: Error) -> None:
        """Become an error reply."""
        self.__dict__.update(_content=None, _error=error)


# not in the reply: a copy is the strategy's own, and what is told must not keep arrays alive
_WATCHES: weakref.WeakKeyDictionary[WatchedReply, Told] = weakref.WeakKeyDictionary()


def watched(reply: Message, told: Told) -> WatchedReply:
    """The same reply, with its content and metadata, watched.

    Args:
        reply: no error.
        told: what is called; must not refer to the reply, but by `weakref`.
    """
    made = WatchedReply(metadata=reply.metadata, content=reply.content)  # type: ignore[call-overload]
    _WATCHES[made] = told
    return cast(WatchedReply, made)


def unwatched(reply: WatchedReply) -> None:
    """Tell nobody any more."""
    _WATCHES.pop(reply, None)


def _aggregation_in(frame: FrameType) -> tuple[Aggregation, Sequence[Message] | None] | None:
    """What Flower makes of the replies that it goes through in a frame; None for other code."""
    from flwr.serverapp.strategy import FedAvg
    from flwr.serverapp.strategy.dp_fixed_clipping import validate_replies
    from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

    if frame.f_code not in (FedAvg._check_and_log_replies.__code__, validate_replies.__code__):
        return None
    found, above = frame.f_locals, frame.f_back
    strategy, train = found.get("self"), bool(found.get("is_train", True))
    if strategy is None and above is not None:  # a wrapper for differential privacy asks
        strategy = getattr(above.f_locals.get("self"), "strategy", None)
    module = str(above.f_globals.get("__name__") if above is not None else "").rpartition(".")
    flowers = module[0] == "flwr.serverapp.strategy"  # and not code that only asks what is valid
    metrics = getattr(strategy, f"{'train' if train else 'evaluate'}_metrics_aggr_fn", None)
    aggregation = Aggregation(
        weight=getattr(strategy, "weighted_by_key", "num-examples"),
        arrays=train and bool(found.get("validate", True)),
        shapes=flowers and "xgb" not in module[2],
        lengths=flowers and metrics is aggregate_metricrecords,
    )
    replies = found.get("replies")
    return aggregation, replies if isinstance(replies, list | tuple) else None
