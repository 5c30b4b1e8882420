"""What a sender keeps from one message to the next, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits, decode, encode
from prunecast.compression.codec import Context as CodecContext

from .errors import StateError
from .layout import Arrays, Layout

__all__ = ["State", "pack_state", "state_arrays", "state_from", "unpack_state"]

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


def state_arrays(state: State) -> dict[str, NDArray[Any]]:
    """The state as named arrays, exactly: what to put into a file."""
    arrays: dict[str, NDArray[Any]] = {_COUNTER: np.asarray(state.step, np.int64)}
    for buffer, tensors in state.buffers.items():
        for name, tensor in tensors.items():
            arrays[f"{buffer}/{name}"] = tensor
    return arrays


def state_from(arrays: Mapping[str, NDArray[Any]], like: State) -> State:
    """Inverse of `state_arrays`.

    Args:
        arrays: what `state_arrays` returned.
        like: any state of the same scheme and layout, such as that of ``init``.

    Raises:
        StateError: of another scheme or layout.
    """
    expected = {name: (a.dtype, a.shape) for name, a in state_arrays(like).items()}
    step = -1
    if {name: (a.dtype, a.shape) for name, a in arrays.items()} == expected:
        step = int(arrays[_COUNTER])
    if step < 0:
        raise StateError(
            "the stored state belongs to another scheme, configuration or layout; start with init()"
        )
    buffers = {
        buffer: {name: arrays[f"{buffer}/{name}"] for name in like.layout}
        for buffer in like.buffers
    }
    return State(like.layout, step, buffers)


def pack_state(state: State) -> bytes:
    """The state as bytes, exactly: one payload of the codec."""
    return encode(state_arrays(state))


def unpack_state(data: bytes, like: State, *, limits: Limits | None = None) -> State:
    """Inverse of `pack_state`; `like` as in `state_from`.

    Raises:
        StateError: damaged, or of another scheme or layout.
    """
    try:
        arrays = decode(data, context=CodecContext(), limits=limits or Limits())
    except CodecError as error:
        raise StateError(f"the stored state is damaged: {error}; start with init()") from error
    return state_from(arrays, like)
