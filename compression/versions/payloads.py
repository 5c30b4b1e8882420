"""Published models and plain records as payloads, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    Limits,
    Payload,
    TensorSpec,
    decode,
    encode,
    open_payload,
)
from prunecast.compression.versions import frame
from prunecast.compression.versions.differences import difference, restore
from prunecast.compression.versions.errors import (
    BadPayload,
    BaseMissing,
    DigestMismatch,
    InvalidModel,
)
from prunecast.compression.versions.frame import Kind, short
from prunecast.compression.versions.layout import (
    TensorHead,
    head_of,
    pack_changes,
    pack_heads,
    same_kind,
    unpack_changes,
    unpack_heads,
)
from prunecast.compression.versions.model import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    refine,
)
from prunecast.compression.versions.seeded import Seed, draw, pack_seed, unpack_seed

__all__ = [
    "Kind",
    "PayloadInfo",
    "decode_model",
    "encode_delta",
    "encode_keyframe",
    "encode_plain",
    "inspect",
    "open_plain",
]

_Q = np.dtype(np.int32)


@dataclass(frozen=True)
class PayloadInfo:
    """What a payload says of itself.

    Attributes:
        kind: keyframe, delta, update, plain or seeded keyframe.
        stream: 8-byte tag of the stream it belongs to.
        counter: number of the version it makes (update: was trained from).
        digest: 16-byte short digest of that version; zeros for a plain record.
        base: 16-byte short digest of the version that must be held; zeros where none.
        size: bytes of the whole payload.
        body_size: bytes of the codec's part.
    """

    kind: Kind
    stream: bytes
    counter: int
    digest: bytes
    base: bytes
    size: int
    body_size: int


def inspect(payload: bytes) -> PayloadInfo:
    """Read a payload's header without decoding any tensor.

    Raises:
        BadPayload: not a payload, damaged, or of an unknown format.
    """
    parsed = frame.unpack(payload, stream=None)
    return PayloadInfo(
        parsed.kind,
        parsed.stream,
        parsed.counter,
        parsed.digest,
        parsed.base,
        parsed.size,
        len(parsed.body),
    )


def _coded_layout(heads: Mapping[str, TensorHead]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(_Q, head.spec.shape) if head.step is not None else head.spec
        for name, head in heads.items()
    }


def encode_keyframe(
    model: PublishedModel, *, stream: bytes = b"", seed: Seed | None = None
) -> bytes:
    """Code a version alone.

    Args:
        model: the version.
        stream: identifier of the run and record, or of the release, it belongs to.
        seed: what the model's lattice tensors were drawn from (see `draw_like`); only the seed
            then travels instead of them.
    """
    heads = {name: head_of(tensor) for name, tensor in model.tensors.items()}
    values: dict[str, NDArray[Any]] = {
        name: tensor.q.astype(_Q) if isinstance(tensor, LatticeTensor) else tensor.values
        for name, tensor in model.tensors.items()
        if seed is None or name not in seed.draws
    }
    kind, section = Kind.KEYFRAME, b""
    if seed is not None:
        kind, section = Kind.SEEDED, pack_seed(seed)
        heads = {name: head for name, head in heads.items() if name not in seed.draws}
    body = section + encode(values, context=Context(layout=_coded_layout(heads)))
    layout = pack_heads(model.tensors)
    return frame.pack(kind, stream, model.counter, model.digest, layout=layout, body=body)


def encode_delta(held: PublishedModel, model: PublishedModel, *, stream: bytes = b"") -> bytes:
    """Code a version against one the receiver holds, however many versions lie between.

    Raises:
        InvalidModel: the names of the tensors or their order differ; send a keyframe.
    """
    old = {name: head_of(tensor) for name, tensor in held.tensors.items()}
    new = {name: head_of(tensor) for name, tensor in model.tensors.items()}
    if list(old) != list(new):
        raise InvalidModel("the two versions do not have the same tensors: send a keyframe")
    values, previous = {}, {}
    for name, tensor in model.tensors.items():
        known = _prediction(held.tensors[name], new[name])
        if known is not None:
            previous[name] = known
        target = tensor.q if isinstance(tensor, LatticeTensor) else tensor.values
        values[name] = difference(
            target.astype(_Q) if new[name].step is not None else target, known
        )
    body = encode(values, context=Context(layout=_coded_layout(new), previous=previous or None))
    return frame.pack(
        Kind.DELTA,
        stream,
        model.counter,
        model.digest,
        base=held.digest,
        layout=pack_changes(list(new.values()), list(old.values())),
        body=body,
    )


def _prediction(held: Tensor, head: TensorHead) -> NDArray[np.generic] | None:
    """What the held tensor says about the new one: integers on its lattice, or raw values.

    Nothing where the two are not of one kind: averaging, for one, turns integers into floats.
    """
    if not same_kind(head, head_of(held)):
        return None
    if isinstance(held, RawTensor):
        return None if held.dtype.kind == "b" else held.values
    assert head.step is not None
    if head.step == held.step:
        return held.q.astype(_Q)
    return refine(held.q, held.step, head.step)


def decode_model(
    payload: bytes,
    *,
    held: PublishedModel | None = None,
    stream: bytes = b"",
    limits: Limits | None = None,
) -> PublishedModel:
    """Rebuild a version from a keyframe (plain or seeded) or delta payload and verify its digest.

    Args:
        payload: the bytes.
        held: the version this side holds, if any; needed for a delta.
        stream: identifier the payload must have been made for.
        limits: bounds on what a payload may make this side allocate.

    Raises:
        BadPayload: no such payload, or damaged.
        WrongStream: made for another stream.
        BaseMissing: the version it builds on is not `held`.
        DigestMismatch: the result is not the announced version.
    """
    parsed = frame.unpack(payload, stream=stream)
    limits = limits or Limits()
    if parsed.kind is Kind.DELTA:
        heads, values = _decode_delta(parsed, held, limits)
    elif parsed.kind in (Kind.KEYFRAME, Kind.SEEDED):
        heads = unpack_heads(parsed.layout)
        _check_size(heads, parsed.size, limits)
        if parsed.kind is Kind.SEEDED:
            values = _decode_seeded(parsed, heads, limits)
        else:
            values = _decode_body(parsed.body, Context(layout=_coded_layout(heads)), limits)
    else:
        raise BadPayload(f"a {parsed.kind.name.lower()} payload does not contain a model")
    tensors: dict[str, Tensor] = {}
    for name, head in heads.items():
        if head.step is None:
            tensors[name] = RawTensor(values[name])
        else:
            q = np.asarray(values[name], dtype=_Q)
            tensors[name] = LatticeTensor(q, head.step, head.pruned, head.spec.dtype)
    model = PublishedModel(tensors, parsed.counter)
    if short(model.digest) != parsed.digest:
        raise DigestMismatch(
            f"rebuilt version {model.counter} has digest {model.digest.hex()[:16]}, announced was "
            f"{parsed.digest.hex()[:16]}; the result was discarded"
        )
    return model


def _decode_body(body: bytes, context: Context, limits: Limits) -> dict[str, NDArray[Any]]:
    try:
        return decode(body, context=context, limits=limits)
    except CodecError as error:
        raise BadPayload(f"payload cannot be decoded: {error}") from error


def _decode_delta(
    parsed: frame.Frame, held: PublishedModel | None, limits: Limits
) -> tuple[dict[str, TensorHead], dict[str, NDArray[Any]]]:
    if held is None or short(held.digest) != parsed.base:
        have = f"version {held.counter}" if held is not None else "none"
        raise BaseMissing(
            f"delta to version {parsed.counter} needs a version that is not held (held: {have}): "
            "ask for a keyframe"
        )
    old = {name: head_of(tensor) for name, tensor in held.tensors.items()}
    heads = unpack_changes(parsed.layout, old)
    replaced = {n: head for n, head in heads.items() if not same_kind(head, old[n])}
    _check_size(replaced, parsed.size, limits)
    predictions = {n: _prediction(held.tensors[n], head) for n, head in heads.items()}
    known = {name: p for name, p in predictions.items() if p is not None}
    context = Context(layout=_coded_layout(heads), previous=known or None)
    values = _decode_body(parsed.body, context, limits)
    return heads, {name: restore(value, known.get(name)) for name, value in values.items()}


def _decode_seeded(
    parsed: frame.Frame, heads: Mapping[str, TensorHead], limits: Limits
) -> dict[str, NDArray[Any]]:
    names = [name for name, head in heads.items() if head.step is not None]
    section = 8 + 8 * len(names)
    seed = unpack_seed(parsed.body[:section], names)
    raw = {name: head for name, head in heads.items() if head.step is None}
    values = _decode_body(parsed.body[section:], Context(layout=_coded_layout(raw)), limits)
    for name, item in seed.draws.items():
        values[name] = draw(heads[name].spec.shape, item, seed.seed, name)
    return values


def _check_size(heads: Mapping[str, TensorHead], payload_size: int, limits: Limits) -> None:
    """Bound what a payload may make this side allocate: its layout came from outside."""
    elements = sum(head.spec.size for head in heads.values())
    size = sum(head.spec.nbytes for head in heads.values())
    allowed = min(limits.decoded_bytes, max(limits.free_bytes, limits.expansion * payload_size))
    if len(heads) > limits.tensors or elements > limits.elements or size > allowed:
        raise BadPayload(
            f"payload of {payload_size} bytes declares {len(heads)} tensors with {elements} "
            f"elements, {size} bytes, above the limits; raise them if you trust its source"
        )


def encode_plain(arrays: Mapping[str, NDArray[np.generic]], *, stream: bytes = b"") -> bytes:
    """Code a record of its own losslessly: it belongs to no version and refers to none."""
    return frame.pack(Kind.PLAIN, stream, 0, b"", body=encode(dict(arrays)))


def open_plain(payload: bytes, *, stream: bytes = b"", limits: Limits | None = None) -> Payload:
    """Open a record that `encode_plain` coded; its tensors are decoded when read.

    Returns:
        A mapping of name to array; reading a damaged tensor raises `CodecError`.

    Raises:
        BadPayload: no plain payload, or damaged.
        WrongStream: made for another stream.
    """
    parsed = frame.unpack(payload, stream=stream)
    if parsed.kind is not Kind.PLAIN:
        raise BadPayload(f"expected a plain record, got a {parsed.kind.name.lower()} payload")
    try:
        return open_payload(parsed.body, limits=limits or Limits())
    except CodecError as error:
        raise BadPayload(f"plain record cannot be decoded: {error}") from error
