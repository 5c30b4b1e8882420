"""Published models and plain records as payloads, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    LimitExceeded,
    Limits,
    Payload,
    PayloadCosts,
    TensorCost,
    encode,
    measure_costs,
    open_payload,
)
from prunecast.compression.versions import frame
from prunecast.compression.versions.bodies import (
    MAX_MODEL_BYTES,
    Q,
    check_size,
    coded_spec,
    model_limits,
    open_body,
    read_body,
)
from prunecast.compression.versions.deltas import (
    encode_delta,
    open_delta,
    owner_of,
    read_delta,
)
from prunecast.compression.versions.errors import BadPayload, DigestMismatch, TooLarge
from prunecast.compression.versions.frame import Kind, short
from prunecast.compression.versions.layout import TensorHead, head_of, pack_heads, unpack_heads
from prunecast.compression.versions.model import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
)
from prunecast.compression.versions.seeded import Seed, draw, pack_seed, unpack_seed
from prunecast.compression.versions.updates import NOTHING_SENT, UpdateReader

__all__ = [
    "Kind",
    "PayloadInfo",
    "decode_model",
    "encode_delta",
    "encode_keyframe",
    "encode_plain",
    "inspect",
    "measure_payload",
    "open_plain",
]


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


def encode_keyframe(
    model: PublishedModel,
    *,
    stream: bytes = b"",
    seed: Seed | None = None,
    thorough: bool = False,
) -> bytes:
    """Code a version alone.

    Args:
        model: the version.
        stream: identifier of the run and record, or of the release, it belongs to.
        seed: what the model's lattice tensors were drawn from (see `draw_like`); only the seed
            then travels instead of them.
        thorough: take more time for fewer bytes, see `prunecast.compression.codec.encode`.
    """
    heads = {name: head_of(tensor) for name, tensor in model.tensors.items()}
    values: dict[str, NDArray[Any]] = {
        name: tensor.q.astype(Q) if isinstance(tensor, LatticeTensor) else tensor.values
        for name, tensor in model.tensors.items()
        if seed is None or name not in seed.draws
    }
    kind, section = Kind.KEYFRAME, b""
    if seed is not None:
        kind, section = Kind.SEEDED, pack_seed(seed)
        heads = {name: head for name, head in heads.items() if name not in seed.draws}
    body = section + encode(values, context=_context(heads), thorough=thorough)
    layout = pack_heads(model.tensors)
    return frame.pack(kind, stream, model.counter, model.digest, layout=layout, body=body)


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
        limits: bounds on what a payload may make this side allocate; None for models of
            `MAX_MODEL_BYTES` at most, or 256 bytes for each byte of the payload.

    Raises:
        BadPayload: no such payload, or damaged.
        TooLarge: it states more than `limits` allow.
        WrongStream: made for another stream.
        BaseMissing: the version it builds on is not `held`.
        DigestMismatch: the result is not the announced version.
    """
    parsed = frame.unpack(payload, stream=stream)
    limits = limits or model_limits(MAX_MODEL_BYTES, parsed.size)
    if parsed.kind is Kind.DELTA:
        found = read_delta(parsed, held, limits)
    elif parsed.kind in (Kind.KEYFRAME, Kind.SEEDED):
        found = _read_keyframe(parsed, limits)
    else:
        raise BadPayload(f"a {parsed.kind.name.lower()} payload does not contain a model")
    # a tensor at a time: beside the model in its narrow integers there is one decoded tensor
    model = PublishedModel(dict(found), parsed.counter)
    if short(model.digest) != parsed.digest:
        raise DigestMismatch(
            f"rebuilt version {model.counter} has digest {model.digest.hex()[:16]}, announced was "
            f"{parsed.digest.hex()[:16]}; the result was discarded"
        )
    return model


def _context(heads: Mapping[str, TensorHead]) -> Context:
    return Context(layout={name: coded_spec(head) for name, head in heads.items()})


def _open_keyframe(
    parsed: frame.Frame, limits: Limits
) -> tuple[dict[str, TensorHead], Seed | None, Context, bytes]:
    """The heads of a keyframe, plain or seeded, its seed, and the codec's payload with its context.

    Raises:
        BadPayload: damaged.
        TooLarge: it states more than `limits` allow.
    """
    heads = unpack_heads(parsed.layout)
    check_size(heads, parsed.size, limits)
    if parsed.kind is not Kind.SEEDED:
        return heads, None, _context(heads), parsed.body
    names = [name for name, head in heads.items() if head.step is not None]
    section = 8 + 8 * len(names)
    seed = unpack_seed(parsed.body[:section], names)
    coded = {name: head for name, head in heads.items() if head.step is None}
    return heads, seed, _context(coded), parsed.body[section:]


def _read_keyframe(parsed: frame.Frame, limits: Limits) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a keyframe, plain or seeded, each decoded when it is asked for."""
    heads, seed, context, data = _open_keyframe(parsed, limits)
    body = open_body(data, context, limits)
    for name, head in heads.items():
        if head.step is None:
            yield name, RawTensor(read_body(body, name))
            continue
        q = (
            read_body(body, name)
            if seed is None
            else draw(head.spec.shape, seed.draws[name], seed.seed, name)
        )
        yield name, LatticeTensor(q, head.step, head.pruned, head.spec.dtype)


def measure_payload(
    payload: bytes, *, held: PublishedModel | None = None, limits: Limits | None = None
) -> PayloadCosts:
    """Say what every section and every tensor of a payload costs, in bytes.

    Args:
        payload: of any kind and stream.
        held: the version that a delta builds on, or that an update was trained from.
        limits: as for `decode_model`.

    Returns:
        As `prunecast.compression.codec.measure_costs`, of the whole payload: sections ``frame``
        (with steps and codings of the tensors) and ``seed`` precede those of the codec, and the
        places that come back in a delta count for their tensor. What a seeded keyframe draws, or
        an update leaves out, has no cost of its own and no entry.

    Raises:
        BadPayload: no such payload, or damaged.
        TooLarge: it states more than `limits` allow.
        BaseMissing: the version it needs is not `held`.
    """
    parsed = frame.unpack(payload, stream=None)
    limits = limits or model_limits(MAX_MODEL_BYTES, parsed.size)
    heads: Mapping[str, TensorHead] | None = None
    data, context = parsed.body, Context()
    if parsed.kind is Kind.DELTA:
        delta = open_delta(parsed, held, limits)
        heads, context = delta.heads, delta.context
    elif parsed.kind is Kind.UPDATE:
        context = UpdateReader(held or NOTHING_SENT, limits=limits).context_of(parsed)
    elif parsed.kind is not Kind.PLAIN:
        _, _, context, data = _open_keyframe(parsed, limits)
    try:
        costs = measure_costs(data, context=context, limits=limits)
    except LimitExceeded as error:
        raise TooLarge(f"payload cannot be decoded: {error}") from error
    except CodecError as error:
        raise BadPayload(f"payload cannot be decoded: {error}") from error
    tensors: dict[str, TensorCost] = {}
    for name, cost in costs.tensors.items():
        owner = name if heads is None else owner_of(name, heads)
        if owner == name:
            tensors[name] = cost
            continue
        whole = tensors[owner]
        sections = Counter(whole.sections)
        sections.update(cost.sections)
        tensors[owner] = replace(whole, sections=dict(sections), shared=whole.shared or cost.shared)
    before = {"frame": parsed.size - len(parsed.body), "seed": len(parsed.body) - len(data)}
    return PayloadCosts(parsed.size, {**before, **costs.sections}, tensors)


def encode_plain(arrays: Mapping[str, NDArray[np.generic]], *, stream: bytes = b"") -> bytes:
    """Code a record of its own losslessly: it belongs to no version and refers to none."""
    return frame.pack(Kind.PLAIN, stream, 0, b"", body=encode(dict(arrays)))


def open_plain(payload: bytes, *, stream: bytes = b"", limits: Limits | None = None) -> Payload:
    """Open a record that `encode_plain` coded; its tensors are decoded when read.

    Returns:
        A mapping of name to array; reading a damaged tensor raises `CodecError`.

    Raises:
        BadPayload: no plain payload, or damaged.
        TooLarge: it states more than `limits` allow.
        WrongStream: made for another stream.
    """
    parsed = frame.unpack(payload, stream=stream)
    if parsed.kind is not Kind.PLAIN:
        raise BadPayload(f"expected a plain record, got a {parsed.kind.name.lower()} payload")
    try:
        return open_payload(parsed.body, limits=limits or Limits())
    except LimitExceeded as error:
        raise TooLarge(f"plain record cannot be decoded: {error}") from error
    except CodecError as error:
        raise BadPayload(f"plain record cannot be decoded: {error}") from error
