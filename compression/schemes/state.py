"""What a sender keeps from one message to the next, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits, TensorSpec, decode, encode
from prunecast.compression.codec import Context as CodecContext

from .errors import StateError
from .layout import Arrays, Layout

__all__ = ["State", "pack_state", "unpack_state"]

_COUNTER = "step"


@dataclass(frozen=True, eq=False)
class State:
    """State of one sender; never changed, every `encode` returns the next one.

    Attributes:
        layout: names and shapes of the tensors it was made for.
        step: number of messages encoded so far.
        buffers: by name ("residual", "velocity"), one float32 array per tensor.
    """

    layout: Layout
    step: int = 0
    buffers: Mapping[str, Arrays] = field(default_factory=dict)


def pack_state(state: State) -> bytes:
    """The state as bytes, exactly: one payload of the codec."""
    return encode(_arrays(state))


def unpack_state(data: bytes, like: State, *, limits: Limits | None = None) -> State:
    """Inverse of `pack_state`.

    Args:
        data: what `pack_state` returned.
        like: any state of the same scheme and layout, such as that of ``init``.
        limits: what is accepted.

    Raises:
        StateError: damaged, or of another scheme or layout.
    """
    expected = {name: TensorSpec(a.dtype, a.shape) for name, a in _arrays(like).items()}
    try:
        arrays = decode(data, context=CodecContext(), limits=limits or Limits())
    except CodecError as error:
        raise StateError(f"the stored state is damaged: {error}; start with init()") from error
    found = {name: TensorSpec(a.dtype, a.shape) for name, a in arrays.items()}
    step = int(arrays[_COUNTER]) if found == expected else -1
    if step < 0:
        raise StateError(
            "the stored state belongs to another scheme, configuration or layout; start with init()"
        )
    buffers = {
        buffer: {name: arrays[f"{buffer}/{name}"] for name in like.layout}
        for buffer in like.buffers
    }
    return State(like.layout, step, buffers)


def _arrays(state: State) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {_COUNTER: np.asarray(state.step, np.int64)}
    for buffer, tensors in state.buffers.items():
        for name, tensor in tensors.items():
            arrays[f"{buffer}/{name}"] = tensor
    return arrays
