"""Replies on their way to the strategy: how arrays come back, by update, scheme or as they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from prunecast.compression.codec import TensorSpec
from prunecast.compression.flower import (
    CONTROL_RECORD,
    STATISTICS_RECORD,
    float_names,
    is_codable_array,
    open_coded,
)
from prunecast.compression.flower.internals import object_bytes, own_bytes, uncached
from prunecast.compression.flower.secure import SECURE_RECORD, masked_size, widened
from prunecast.compression.schemes.interface import Scheme
from prunecast.compression.versions import (
    NOTHING_SENT,
    BadPayload,
    Coding,
    Kind,
    ReplyTensor,
    Update,
    UpdateHead,
    UpdateReader,
    UpdateRule,
    allowed_beside,
    inspect,
    is_statistic,
    model_limits,
    read_description,
    short,
    stream_tag,
)
from prunecast.server.federation.exchange.batches import Prepared
from prunecast.server.federation.exchange.replies.checks import readable
from prunecast.server.federation.exchange.replies.lazy import LazyArray, WeightedSum, WholeSum
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.classes import as_changes
from prunecast.server.federation.reporting.ledger import Entry

__all__ = ["Read", "Up", "decode_reply", "up_of"]


# what all records of a reply may decode to: bytes, times what was sent, times what came
_FREE, _TIMES, _EXPANSION = 1 << 24, 16, 256


@dataclass(frozen=True)
class Read:
    """One array record of a reply, understood.

    Attributes:
        arrays: what the strategy sees.
        kind: how it travelled, as the ledger calls it.
        dense: serialised bytes of the record in plain Flower; None for as many as it has.
        update: whether the node staged something with it that acceptance commits.
    """

    arrays: ArrayRecord
    kind: str
    dense: int | None = None
    update: bool = False


Up = Callable[[str, ArrayRecord, Prepared, Entry], Read]
"""How array records come back: understands the one under a key of a reply to a message.

Decoding time goes into the ledger entry. Raises VersionsError where the record is damaged, or of
another run, version or model, and CodecError where a scheme's payload is damaged or of another one.
"""


def up_of(policy: Policy, *, verify: bool) -> Up:
    """The coding that a policy asks for.

    Args:
        policy: whose `up` decides.
        verify: decode every array of the lattice once now, so that a damaged reply is refused
            alone.
    """
    if policy.scheme is not None:
        return partial(_by_scheme, policy.scheme)
    if policy.up == "lattice":
        return partial(_on_lattice, policy, verify)
    return lambda key, record, sent, entry: Read(record, "dense")


def _on_lattice(
    policy: Policy, verify: bool, key: str, record: ArrayRecord, sent: Prepared, entry: Entry
) -> Read:
    """A record coded tensor by tensor against the version that was sent, or against nothing."""
    coded = open_coded(record)
    if coded is None:
        return Read(record, "verbatim")
    started = time.perf_counter()
    payload, beside = coded
    sent_key, update = _open_update(payload, key, sent)
    master = sent.versions[sent_key].master if sent_key else {}
    if [name for name, tensor in update.tensors.items() if tensor.spec is None] != list(beside):
        raise BadPayload(f"record {key!r}: other arrays came beside the payload than it says")
    if verify:
        update.verify(master, lambda n: policy.is_trained(n, master[n].dtype, master[n].size))
    arrays, dense = ArrayRecord(), 0
    for name, tensor in update.tensors.items():
        if tensor.spec is None:
            arrays[name] = beside[name]
            dense += object_bytes(beside[name])
            continue
        arrays[name] = _array(update, name, tensor.spec, master, entry)
        # 128 bytes of NumPy header and about 300 of Flower's objects surround every array
        dense += tensor.spec.nbytes + 428
    if sent_key and update.is_as_sent:
        dense = sent.dense[sent_key]
    entry.decode_ms += (time.perf_counter() - started) * 1e3
    kind = _kind(update)
    if kind == "update" and isinstance(sent.rule, UpdateRule) and sent.rule.lazy:
        unsent = all(update.coding(name) is Coding.UNCHANGED for name in update.tensors)
        kind = "lazy" if unsent else kind
    return Read(arrays, kind, dense, update=True)


def _kind(update: Update) -> str:
    """What a record is, as the ledger calls it."""
    codings = {update.coding(name) for name in update.tensors}
    own = bool(codings & {Coding.VALUES, Coding.ZERO})
    changed = any(map(update.is_change, update.tensors))
    kind = "mixed" if own and changed else "values" if own else "update" if changed else ""
    if not kind:
        like = any(tensor.like is not None for tensor in update.tensors.values())
        kind = "update" if like else "plain"
    return f"{kind}/verbatim" if Coding.VERBATIM in codings else kind


def _by_scheme(scheme: Scheme, key: str, record: ArrayRecord, sent: Prepared, entry: Entry) -> Read:
    """Updates of what was sent by a scheme of the literature; strategies see *sent + update*."""
    base = sent.original.content.array_records.get(key)
    coded = open_coded(record)
    if coded is None:
        if base is not None and list(record) == list(base) and _could_be_coded(record, base):
            raise BadPayload(f"record {key!r} came without the scheme")
        return Read(record, "verbatim")
    started = time.perf_counter()
    payload, beside = coded
    described = read_description(payload, partial(_sent_specs, key, sent))
    if described is not None:
        base = sent.original.content.array_records[described[0]]
        heads, payload = described[1:]
        _check_unlike(key, heads, sent, len(record[next(iter(record))].data))
    elif base is None:
        raise BadPayload(f"record {key!r} is an update of something that was not sent")
    else:
        specs = _sent_specs(key, sent, key)
        heads = {name: _usual(name, specs.get(name)) for name in base}
    arrays = _updated(key, base, heads, scheme, payload, beside)
    entry.decode_ms += (time.perf_counter() - started) * 1e3
    own = any(head.coding is Coding.ZERO for head in heads.values())
    kind = f"{scheme.name}/values" if own else scheme.name
    return Read(arrays, kind, object_bytes(uncached(arrays)), update=True)


def _check_unlike(key: str, heads: Mapping[str, UpdateHead], sent: Prepared, size: int) -> None:
    """Bound what a reply says of arrays that resemble nothing sent, before it is allocated."""
    specs = [h.tensor.spec for h in heads.values() if h.tensor.spec and h.tensor.like is None]
    if sum(spec.nbytes for spec in specs) > allowed_beside(sum(sent.dense.values()), size):
        raise BadPayload(f"record {key!r} of {size} bytes states more than follows from what came")


def _could_be_coded(record: ArrayRecord, base: ArrayRecord) -> bool:
    """Whether there is an array that a scheme codes an update of."""
    return any(
        record[name].shape == base[name].shape and np.isfinite(base[name].numpy()).all()
        for name in float_names(record)
        if name in float_names(base)
    )


def _sent_specs(key: str, sent: Prepared, base_key: str) -> dict[str, TensorSpec]:
    """Specs of the arrays in a record as the node read it, as far as the codec knows them."""
    if base_key in sent.versions:  # which has integers where an average made floats of them
        return sent.versions[base_key].model.specs
    base = sent.original.content.array_records.get(base_key)
    if base is None:
        raise BadPayload(f"record {key!r} is an update of something that was not sent")
    return {
        name: TensorSpec(np.dtype(array.dtype).newbyteorder("="), tuple(array.shape))
        for name, array in base.items()
        if is_codable_array(array)
    }


def _usual(name: str, spec: TensorSpec | None) -> UpdateHead:
    """What an array of a reply is where nothing else is said: a change, or beside the payload."""
    if spec is None or spec.dtype.kind != "f" or is_statistic(name):
        return UpdateHead(Coding.VERBATIM, 0.0, ReplyTensor(None))
    return UpdateHead(Coding.UNCHANGED, 0.0, ReplyTensor(spec, ""))


def _updated(
    key: str,
    base: ArrayRecord,
    heads: Mapping[str, UpdateHead],
    scheme: Scheme,
    payload: bytes,
    beside: Mapping[str, Array],
) -> ArrayRecord:
    """*Sent + update*, or the values, of every array that the scheme coded; others as they came."""
    specs = {n: head.tensor.spec for n, head in heads.items() if head.tensor.spec is not None}
    size = 4 * sum(spec.size for spec in specs.values())
    decoded = scheme.decode(payload, limits=replace(model_limits(size), decoded_bytes=size))
    if [(n, a.shape) for n, a in decoded.items()] != [(n, s.shape) for n, s in specs.items()]:
        raise BadPayload(f"record {key!r}: the update is not of the arrays that were sent")
    if list(beside) != [name for name in heads if name not in specs]:
        raise BadPayload(f"record {key!r}: other arrays came than were sent")
    result = ArrayRecord()
    for name, head in heads.items():
        if name not in specs:
            result[name] = beside[name]
            continue
        with np.errstate(over="ignore"):
            value: NDArray[Any] = decoded[name].astype(specs[name].dtype)
            if head.coding is Coding.UNCHANGED:
                held = base[head.tensor.like or name].numpy()
                value = np.asarray(held + value.astype(held.dtype), specs[name].dtype)
        if not np.isfinite(value).all():
            raise BadPayload(f"update of {name!r} makes NaN or infinity")
        result[name] = Array(value)
    return result


def decode_reply(reply: Message, sent: Prepared, entry: Entry, up: Up) -> tuple[RecordDict, bool]:
    """The content the strategy sees.

    Args:
        reply: a reply that passed through the mod, or needs none.
        sent: the message it answers.
        entry: ledger entry; kind, dense bytes and decoding time are set here.
        up: how array records come back.

    Returns:
        The content, and whether it holds an update.

    Raises:
        VersionsError: a payload is damaged, of another run or of another version.
        CodecError: a scheme's payload is damaged, or of another scheme.
        ReplyRefused: an array of a node that is sent none but dense ones cannot be read.
    """
    content, kinds, has_update = RecordDict(), [], False
    left = _FREE + _TIMES * sum(sent.dense.values()) + _EXPANSION * entry.payload_bytes
    for key, record in reply.content.items():
        if (key == CONTROL_RECORD and isinstance(record, ConfigRecord)) or (
            key == STATISTICS_RECORD and sent.wanted
        ):
            entry.dense_bytes -= object_bytes(record) + _mention(reply.content, key)
            continue
        content[key] = record
        if key == SECURE_RECORD and isinstance(record, ConfigRecord):
            content[key] = _wide(record, sent, entry)
        if isinstance(record, ArrayRecord):
            version = sent.versions.get(key) if sent.densely else None
            if version is None:
                read = up(key, record, sent, entry)
            else:
                came = readable(key, record)  # before anything of it is
                read = Read(as_changes(came, version.model, version.master), "dense")
            if read.dense is not None:
                entry.dense_bytes += read.dense - object_bytes(record)
                left -= read.dense
            if left < 0:
                raise BadPayload(
                    f"record {key[:80]!r}: a reply of {entry.payload_bytes} bytes decodes to more "
                    "than follows from what was sent"
                )
            content[key] = read.arrays
            kinds.append(read.kind)
            has_update = has_update or read.update
    entry.kind = "+".join(kinds) or "none"
    return content, has_update


def _wide(record: ConfigRecord, sent: Prepared, entry: Entry) -> ConfigRecord:
    """Masked vectors as Flower's workflow reads them.

    The ledger counts what plain Flower would have sent: all weights, in eight bytes each.
    """
    try:
        wide = widened(record)
    except ValueError as error:
        raise BadPayload(f"a masked vector of secure aggregation is damaged: {error}") from error
    entry.dense_bytes += object_bytes(wide) - object_bytes(record)
    if size := masked_size(wide):
        weights = sum(s.size for v in sent.versions.values() for s in v.model.specs.values())
        entry.dense_bytes += 8 * max(0, weights - size)
    return wide


def _mention(content: RecordDict, key: str) -> int:
    """Bytes by which naming one of its records lengthens a content's own object."""
    without = RecordDict({k: record for k, record in content.items() if k != key})
    return own_bytes(content) - own_bytes(without)


def _open_update(payload: bytes, key: str, sent: Prepared) -> tuple[str, Update]:
    """Find the record an update answers: the same key, or the one whose stream it names.

    Returns:
        That record's key, or "" where it answers no version; and the update.
    """
    info = inspect(payload)
    if info.kind is not Kind.UPDATE:
        raise BadPayload(f"a node does not send {info.kind.name.lower()} payloads")
    if info.base == short(NOTHING_SENT.digest):
        size = sum(sent.dense.values())
        reader = UpdateReader(NOTHING_SENT, stream=sent.stream_of(key), sent=size)
        return "", reader.read(payload)
    for candidate in sorted(sent.versions, key=lambda k: k != key):
        stream = sent.stream_of(candidate)
        if stream_tag(stream) == info.stream:
            return candidate, sent.versions[candidate].reader(stream).read(payload)
    raise BadPayload(f"record {key!r}: the update belongs to another run, or to a record not sent")


def _array(
    update: Update,
    name: str,
    spec: TensorSpec,
    master: Mapping[str, NDArray[Any]],
    entry: Entry,
) -> LazyArray:
    """An array that is formed when it is read, and only added where it is averaged."""
    start = update.start(name, master)
    form = partial(update.apply, name, start)
    summand: Callable[[], WeightedSum | WholeSum] | None = None
    if update.is_on_lattice(name):
        summand = partial(_weighted, update, name, start, spec.dtype)
    elif spec.dtype.kind in "iub":
        summand = partial(_whole, form)
    return LazyArray(form, spec.dtype, spec.shape, entry, summand)


def _weighted(update: Update, name: str, start: NDArray[Any], dtype: np.dtype[Any]) -> WeightedSum:
    return WeightedSum(start, update.change(name), dtype)


def _whole(form: Callable[[], NDArray[Any]]) -> WholeSum:
    return WholeSum(form())
