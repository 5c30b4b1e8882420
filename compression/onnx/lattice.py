"""Put a model's kernels on a lattice of few bits, so that versions differ by small integers.

Three ways to choose a tensor's step, for integers within ``2**(bits - 1) - 1``:

* ``held``: the step of the version that devices hold, times a power of two where the weights have
  outgrown it. Equal steps are what makes a patch small: the same weight keeps the same integer.
  Without such a version, ``range`` with a tenth of head room for the versions to come.
* ``range``: the largest weight takes the largest integer.
* ``error``: the step of least squared error among those that clip no more than half the range.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import ForeignModel
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, Tensor

__all__ = ["STEPS", "Steps", "channel_steps", "snap"]

Steps = Literal["held", "range", "error"]
STEPS: tuple[Steps, ...] = get_args(Steps)
_HEAD_ROOM = 0.9
_SAMPLE = 1 << 16  # elements that the search for the least error looks at


def snap(
    arrays: Mapping[str, NDArray[Any]],
    kernels: Collection[str],
    *,
    bits: int | None,
    steps: Steps = "held",
    held: PublishedModel | None = None,
    counter: int = 0,
) -> PublishedModel:
    """A published model of dense arrays.

    Args:
        arrays: floating, integer or bool tensors by name.
        kernels: those that go on the lattice; the others stay exact.
        bits: 2 to 16; None keeps everything exact.
        steps: how a step is chosen, see above.
        held: the version that devices hold, for ``held``.
        counter: number of the version.

    Raises:
        ForeignModel: `bits` out of range, or a kernel that is not finite.

    >>> w = np.array([[0.5, -1.27], [0.0, 1.0]], np.float32)
    >>> snap({"w": w}, {"w"}, bits=8, steps="range")["w"].q
    array([[  50, -127],
           [   0,  100]], dtype=int8)
    """
    if bits is not None and not 2 <= bits <= 16:
        raise ForeignModel(f"bits must be from 2 to 16, not {bits}")
    if steps not in STEPS:
        raise ForeignModel(f"steps are chosen by {', '.join(STEPS)}, not {steps!r}")
    tensors: dict[str, Tensor] = {}
    for name, values in arrays.items():
        if bits is None or name not in kernels or not values.size:
            tensors[name] = RawTensor(values)
            continue
        wide = values.astype(np.float64)
        if not np.isfinite(wide).all():
            raise ForeignModel(f"tensor {name!r} holds a value that is not finite")
        before = held.tensors.get(name) if held is not None else None
        top = 2 ** (bits - 1) - 1
        step = _step(wide, top, steps, before)
        q = np.clip(np.rint(wide / step), -top, top).astype(np.int32)
        tensors[name] = LatticeTensor(q, step, dtype=values.dtype)
    return PublishedModel(tensors, counter)


def _step(values: NDArray[np.float64], top: int, steps: Steps, before: Tensor | None) -> float:
    largest = float(np.abs(values).max())
    if largest == 0.0:
        return before.step if isinstance(before, LatticeTensor) else 1.0
    if steps == "held" and isinstance(before, LatticeTensor) and before.shape == values.shape:
        return _single(float(_following(np.asarray(largest), before.step, top)))
    full = largest / top
    if steps == "held":
        return _single(full / _HEAD_ROOM)
    return _single(full if steps == "range" else full * _least_error(values.ravel(), full, top))


def channel_steps(
    values: NDArray[Any],
    axis: int,
    top: int,
    *,
    before: Tensor | None = None,
    lattice: float | None = None,
) -> NDArray[np.float64]:
    """A step for each channel, by the rule ``held``.

    Args:
        values: finite.
        axis: the one that counts channels.
        top: the largest integer.
        before: steps that devices hold, shape (C,).
        lattice: the step that all values are multiples of; new steps are this times a power of
            two then, so that values are rounded in halves of it at most.

    Returns:
        float32 values, shape (C,).

    >>> channel_steps(np.array([[0.5, 1.27], [8.0, 1.0]]), 0, 127, lattice=0.01)
    array([0.01, 0.08])
    """
    flat = np.moveaxis(np.asarray(values, np.float64), axis, 0).reshape(values.shape[axis], -1)
    if not np.isfinite(flat).all():
        raise ForeignModel("a weight holds a value that is not finite")
    largest = np.abs(flat).max(axis=1)
    full = largest / top
    fresh: NDArray[np.float64]
    if lattice is None:
        fresh = full / _HEAD_ROOM
    else:
        shift = np.ceil(np.log2(np.maximum(full * top / ((top + 0.5) * lattice), 1.0)))
        fresh = lattice * 2.0**shift
    fresh = np.where(largest > 0, fresh, 1.0 if lattice is None else lattice)
    if isinstance(before, RawTensor) and before.shape == fresh.shape:
        fresh = _following(largest, before.dense().astype(np.float64), top)
        if lattice is not None:
            fresh = np.maximum(fresh, lattice)  # a finer one would hold no more
    single = np.maximum(fresh.astype(np.float32), np.finfo(np.float32).tiny)
    return np.asarray(single, np.float64)


def _following(
    largest: NDArray[np.float64], held: float | NDArray[np.float64], top: int
) -> NDArray[np.float64]:
    """The held steps times powers of two: no bit is wasted and nothing is clipped."""
    with np.errstate(divide="ignore"):
        shift = np.ceil(np.log2(largest / ((top + 0.5) * held)))
    # do not go back and forth around a power of two
    shift = np.where((shift < 0) & (largest > 0.4 * top * held), 0.0, shift)
    return np.where(largest > 0, held * 2.0**shift, held)


def _single(step: float) -> float:
    """The nearest float32 at which no step is zero."""
    return max(float(np.float32(step)), float(np.finfo(np.float32).tiny))


def _least_error(values: NDArray[np.float64], full: float, top: int) -> float:
    sample = values[:: max(1, values.size // _SAMPLE)]
    factors = np.linspace(0.5, 1.0, 26)

    def error(factor: float) -> float:
        step = full * factor
        q = np.clip(np.rint(sample / step), -top, top)
        return float(np.square(q * step - sample).sum())

    return float(min(factors[::-1], key=error))
