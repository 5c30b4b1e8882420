"""The codec payload inside a frame: what it is asked to code, and opening it within limits.

What a payload may make its receiver allocate follows from what that knows: the model it holds or
sent, a manifest, or a setting where it knows nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    LimitExceeded,
    Limits,
    Payload,
    TensorSpec,
    open_payload,
)
from prunecast.compression.versions.errors import BadPayload, TooLarge
from prunecast.compression.versions.layout import TensorHead

__all__ = [
    "MAX_MODEL_BYTES",
    "Q",
    "check_size",
    "coded_spec",
    "model_limits",
    "open_body",
    "read_body",
]

MAX_MODEL_BYTES = 1 << 31
"""Decoded bytes of a model that a receiver without a setting accepts, however few bytes tell it."""
_EXPANSION = 256  # decoded bytes that each byte of a payload may state, beyond a receiver's setting

Q = np.dtype(np.int32)
"""As what lattice integers, and differences of them, are coded."""


def model_limits(nbytes: int, payload: int = 0) -> Limits:
    """Limits for a payload of a model.

    Args:
        nbytes: most bytes of its tensors, as far as they are known or the receiver accepts.
        payload: bytes of the payload; a larger model is accepted where these are many.
    """
    most, usual = max(nbytes, _EXPANSION * payload), Limits()
    return Limits(
        payload_bytes=max(usual.payload_bytes, 2 * most),
        elements=most,  # of a byte, in the extreme; integers are decoded in four
        decoded_bytes=4 * most,
        free_bytes=most,
        expansion=_EXPANSION,
        levels=max(usual.levels, most >> 8),
        steps=max(usual.steps, most >> 8),
    )


def coded_spec(head: TensorHead) -> TensorSpec:
    """What the codec sees of a tensor: integers of a lattice, raw values as they are."""
    return TensorSpec(Q, head.spec.shape) if head.step is not None else head.spec


def open_body(body: bytes, context: Context, limits: Limits) -> Payload:
    """Open a codec payload; its tensors are decoded when `read_body` asks for them.

    Raises:
        BadPayload: damaged, or made in another context.
        TooLarge: it states more than `limits` allow.
    """
    try:
        return open_payload(body, context=context, limits=limits)
    except LimitExceeded as error:
        raise TooLarge(f"payload cannot be decoded: {error}") from error
    except CodecError as error:
        raise BadPayload(f"payload cannot be decoded: {error}") from error


def read_body(body: Payload, name: str) -> NDArray[Any]:
    """One tensor of an opened payload.

    Raises:
        BadPayload: damaged.
    """
    try:
        return body[name]
    except CodecError as error:
        raise BadPayload(f"payload cannot be decoded: {error}") from error


def check_size(heads: Mapping[str, TensorHead], payload_size: int, limits: Limits) -> None:
    """Bound what a payload may make this side allocate: its layout came from outside.

    Raises:
        TooLarge: more than `limits` allow.
    """
    elements = sum(head.spec.size for head in heads.values())
    size = sum(head.spec.nbytes for head in heads.values())
    allowed = min(limits.decoded_bytes, max(limits.free_bytes, limits.expansion * payload_size))
    if len(heads) > limits.tensors or elements > limits.elements or size > allowed:
        raise TooLarge(
            f"payload of {payload_size} bytes declares {len(heads)} tensors with {elements} "
            f"elements, {size} bytes, above the limits ({allowed} bytes); raise them if you "
            "trust its source"
        )
