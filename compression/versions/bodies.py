"""The codec payload inside a frame: what it is asked to code, and opening it within limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    Context,
    Limits,
    Payload,
    TensorSpec,
    open_payload,
)
from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.layout import TensorHead

__all__ = ["Q", "check_size", "coded_spec", "open_body", "read_body"]

Q = np.dtype(np.int32)
"""As what lattice integers, and differences of them, are coded."""


def coded_spec(head: TensorHead) -> TensorSpec:
    """What the codec sees of a tensor: integers of a lattice, raw values as they are."""
    return TensorSpec(Q, head.spec.shape) if head.step is not None else head.spec


def open_body(body: bytes, context: Context, limits: Limits) -> Payload:
    """Open a codec payload; its tensors are decoded when `read_body` asks for them.

    Raises:
        BadPayload: damaged, or made in another context.
    """
    try:
        return open_payload(body, context=context, limits=limits)
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
        BadPayload: more than `limits` allow.
    """
    elements = sum(head.spec.size for head in heads.values())
    size = sum(head.spec.nbytes for head in heads.values())
    allowed = min(limits.decoded_bytes, max(limits.free_bytes, limits.expansion * payload_size))
    if len(heads) > limits.tensors or elements > limits.elements or size > allowed:
        raise BadPayload(
            f"payload of {payload_size} bytes declares {len(heads)} tensors with {elements} "
            f"elements, {size} bytes, above the limits; raise them if you trust its source"
        )
