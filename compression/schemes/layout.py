"""Names and shapes of tensors, what a sender keeps for them, and the float32 arithmetic on them.

What a payload describes and a state is made for is a layout. The arithmetic is what sender and
receiver must do alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits, NonFiniteError, decode, encode
from prunecast.compression.codec import Context as CodecContext

from . import LayoutMismatch, StateError, UnsupportedTensor

__all__ = [
    "Arrays",
    "Layout",
    "State",
    "added",
    "checked",
    "concatenated",
    "layout_of",
    "pack_state",
    "scaled",
    "split",
    "state_arrays",
    "state_from",
    "step_of",
    "total_size",
    "unpack_state",
]

Layout = Mapping[str, tuple[int, ...]]
"""Name to shape, in order; every tensor is float32."""
Arrays = dict[str, NDArray[np.float32]]


def layout_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of these tensors.

    >>> layout_of({"w": np.zeros((2, 3)), "b": np.float32(0)})
    {'w': (2, 3), 'b': ()}
    """
    return {name: np.shape(tensor) for name, tensor in tensors.items()}


def total_size(layout: Layout) -> int:
    """Number of elements of all tensors together (exact)."""
    return sum(math.prod(shape) for shape in layout.values())


def checked(tensors: Mapping[str, NDArray[Any]], layout: Layout) -> Arrays:
    """The tensors as float32, in C order.

    Raises:
        LayoutMismatch: a name, the order or a shape is not the layout's.
        UnsupportedTensor: a tensor is not of floating point.
        NonFiniteError: a tensor holds NaN or an infinity, or leaves float32's range.
    """
    if list(tensors) != list(layout):
        differing = sorted(set(tensors) ^ set(layout)) or "their order"
        raise LayoutMismatch(
            f"the tensors are not those that the state was made for: {differing}; "
            "make a state with init() for this layout"
        )
    arrays: Arrays = {}
    for name, shape in layout.items():
        array = np.asarray(tensors[name])
        if array.shape != shape:
            raise LayoutMismatch(
                f"tensor {name!r} has shape {array.shape}, the state was made for {shape}"
            )
        if array.dtype.kind != "f":
            raise UnsupportedTensor(
                f"tensor {name!r} has dtype {array.dtype}; schemes take floating point: "
                "send counters and indices exactly, another way"
            )
        with np.errstate(over="ignore", under="ignore"):
            arrays[name] = np.ascontiguousarray(array, np.float32).reshape(shape)
        if not np.isfinite(arrays[name]).all():
            raise NonFiniteError(
                f"tensor {name!r} holds NaN, an infinity or a value beyond float32; check the "
                "training step that produced it (learning rate, loss scaling)"
            )
    return arrays


def concatenated(
    arrays: Mapping[str, NDArray[Any]], names: Sequence[str], dtype: Any
) -> NDArray[Any]:
    """The tensors of these names, flattened, one after the other."""
    if len(names) == 1:
        return np.asarray(arrays[names[0]], dtype).ravel()
    parts = [np.asarray(arrays[name], dtype).ravel() for name in names]
    return np.concatenate([np.zeros(0, dtype), *parts])


def split(flat: NDArray[Any], names: Sequence[str], layout: Layout) -> dict[str, NDArray[Any]]:
    """Inverse of `concatenated`; views."""
    arrays, at = {}, 0
    for name in names:
        size = math.prod(layout[name])
        arrays[name] = flat[at : at + size].reshape(layout[name])
        at += size
    return arrays


_TOP = np.float32(np.finfo(np.float32).max)


def added(tensors: Arrays, buffer: Mapping[str, NDArray[np.float32]], factor: float = 1) -> Arrays:
    """``tensors + factor * buffer``.

    Raises:
        NonFiniteError: a sum leaves float32.
    """
    sums: Arrays = {}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore", under="ignore"):
            held = buffer[name] if factor == 1 else np.float32(factor) * buffer[name]
            sums[name] = np.asarray(tensor + held, np.float32)
        if not np.isfinite(sums[name]).all():
            raise NonFiniteError(
                f"tensor {name!r} and what was kept of it add up beyond float32; start with init()"
            )
    return sums


def scaled(integers: NDArray[Any], scales: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """``float32(integers) * scales``, one IEEE multiplication, clamped to finite numbers."""
    product = np.array(integers, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        product *= scales
    np.clip(product, -_TOP, _TOP, out=product)
    product += np.float32(0)  # -0.0 becomes +0.0
    return product


def step_of(most: NDArray[Any], top: int) -> NDArray[np.float32]:
    """``most / top`` as float32, rounded up, so that no ``|x| / step`` passes `top`.

    >>> float(step_of(np.float64(254), 127))
    2.0
    """
    most = np.asarray(most, np.float64)
    step = (most / top).astype(np.float32)
    low = step.astype(np.float64) * top < most
    return np.asarray(np.where(low, np.nextafter(step, _TOP), step), np.float32)


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
