"""The way down by a scheme: what the model changed by since the version that a node holds.

A *chain* is the payloads of the messages that the node has not had, oldest first, and the arrays
that no scheme codes (counters, statistics) as they are now. Sender and receiver add the very same
float numbers in the same order, so what both hold is the same bit for bit, and its digest says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    LimitExceeded,
    Limits,
    decode,
    encode,
)
from prunecast.compression.schemes.registry import decode_payload
from prunecast.compression.versions import (
    BadPayload,
    BaseMissing,
    DigestMismatch,
    PublishedModel,
    RawTensor,
    TooLarge,
    frame,
    short,
)

__all__ = ["changed", "decode_chain", "encode_chain", "payloads_in"]


def changed(
    held: Mapping[str, NDArray[Any]], change: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[Any]]:
    """Arrays after a decoded change: ``held + change`` in the dtype of what is held.

    Raises:
        BadPayload: the change is of something that is not held.
    """
    found = dict(held)
    for name, values in change.items():
        array = found.get(name)
        if array is None or array.shape != values.shape or array.dtype.kind != "f":
            raise BadPayload(f"a change of {name[:80]!r}, which is not held like that")
        with np.errstate(over="ignore", invalid="ignore"):
            found[name] = np.asarray(array + values.astype(array.dtype), array.dtype)
    return found


def encode_chain(
    base: bytes,
    model: PublishedModel,
    payloads: Sequence[bytes],
    coded: frozenset[str],
    *,
    stream: bytes = b"",
) -> bytes:
    """What a node that holds `base` needs to hold `model`.

    Args:
        base: digest of the version that is held, whose tensors are like those of `model`.
        model: the version to be held.
        payloads: of the scheme, of the messages that lie between, oldest first.
        coded: names of the tensors that these are of; the others follow as they are in `model`.
        stream: identifier of run and record.
    """
    others = {n: a for n, a in model.arrays().items() if n not in coded}
    parts = [len(payloads).to_bytes(2, "little")]
    for payload in payloads:
        parts += [len(payload).to_bytes(8, "little"), payload]
    if others:
        specs = {name: model.specs[name] for name in others}
        parts.append(encode(others, context=Context(layout=specs)))
    return frame.pack(
        frame.Kind.SCHEME,
        stream,
        model.counter,
        model.digest,
        base=base,
        body=b"".join(parts),
    )


def payloads_in(chain: bytes) -> list[bytes]:
    """The scheme's payloads of a chain, oldest first.

    Raises:
        BadPayload: damaged.
    """
    return _payloads(frame.unpack(chain, stream=None).body)[0]


def _payloads(body: bytes) -> tuple[list[bytes], int]:
    """The payloads at the beginning of a body, and where they end."""
    count, at, found = int.from_bytes(body[:2], "little"), 2, []
    for _ in range(count):
        size = int.from_bytes(body[at : at + 8], "little")
        if len(body) < at + 8 + size:
            raise BadPayload("a chain ends within a payload")
        found.append(body[at + 8 : at + 8 + size])
        at += 8 + size
    return found, at


def decode_chain(
    payload: bytes, *, held: PublishedModel | None, stream: bytes, limits: Limits
) -> PublishedModel:
    """The version that a chain makes of the one that is held, its digest verified.

    Raises:
        BadPayload: damaged, or of other arrays.
        TooLarge: it states more than `limits` allow.
        WrongStream: made for another stream.
        BaseMissing: the version it builds on is not `held`.
        DigestMismatch: the result is not the announced version.
    """
    parsed = frame.unpack(payload, stream=stream)
    if parsed.kind is not frame.Kind.SCHEME:
        raise BadPayload(f"a {parsed.kind.name.lower()} payload is no change by a scheme")
    if held is None or short(held.digest) != parsed.base:
        raise BaseMissing("the version that a change builds on is not held")
    arrays: dict[str, NDArray[Any]] = dict(held.arrays())
    nbytes = sum(4 * array.size for array in arrays.values())
    within = replace(limits, decoded_bytes=min(limits.decoded_bytes, max(nbytes, 1)))
    body, coded = parsed.body, set[str]()
    payloads, at = _payloads(body)
    try:
        for part in payloads:
            change = decode_payload(part, limits=within)
            arrays = changed(arrays, change)
            coded |= change.keys()
        specs = {name: spec for name, spec in held.specs.items() if name not in coded}
        if specs:
            arrays |= decode(body[at:], context=Context(layout=specs), limits=limits)
        elif len(body) != max(at, 2):
            raise BadPayload("bytes follow the end of a chain")
    except LimitExceeded as error:
        raise TooLarge(f"a change cannot be decoded: {error}") from error
    except CodecError as error:
        raise BadPayload(f"a change cannot be decoded: {error}") from error
    model = PublishedModel({n: RawTensor(array) for n, array in arrays.items()}, parsed.counter)
    if short(model.digest) != parsed.digest:
        raise DigestMismatch(
            f"the changes make version {model.counter} with digest {model.digest.hex()[:16]}, "
            f"announced was {parsed.digest.hex()[:16]}; the result was discarded"
        )
    return model
