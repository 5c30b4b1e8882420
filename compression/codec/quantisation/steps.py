"""The step that leaves a wanted error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantiseError
from .lattice import dequantise, label, largest_magnitude, quantise
from .scales import RelativeTo, scales_of, spread
from .search import find

__all__ = ["Lattice", "relative_error", "step_for_error"]

_BLOCK = 1 << 18
_MOST_STEPS = 2.0**31 - 2  # quantised magnitudes stay within int32
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def relative_error(values: NDArray[Any], restored: NDArray[Any]) -> float:
    """Return ``||values - restored|| / ||values||`` (Euclidean norms, in float64).

    0.0 where both are zero everywhere, infinity where only ``values`` is.

    >>> relative_error(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    0.1
    """
    lost = energy = 0.0
    for a, b in zip(_blocks(values), _blocks(restored), strict=True):
        a = a.astype(np.float64)
        lost += float(np.square(a - b).sum())
        energy += float(np.square(a).sum())
    if not energy:
        return math.inf if lost else 0.0
    return math.sqrt(lost / energy)


class Lattice:
    """Steps of several tensors that grow together: ``factor * scale`` each.

    Args:
        tensors: name to floating-point array.
        relative_to: what the scales are.

    Raises:
        NonFiniteError, QuantiseError: the tensors cannot be quantised.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], relative_to: RelativeTo = None) -> None:
        self.tensors = {name: np.asarray(array) for name, array in tensors.items()}
        tops = {name: largest_magnitude(array, name) for name, array in self.tensors.items()}
        for name, top in tops.items():
            if top > _LARGEST:
                raise QuantiseError(f"{label(name)} reaches {top:g}, beyond float32: scale it")
        self.scales = scales_of(self.tensors, relative_to)
        reach = [tops[name] / self.scales[name] for name in self.tensors]
        self.reach = max(reach, default=0.0)
        """Largest magnitude of any value, in scales: a factor above twice this leaves zeros."""

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(array.size for array in self.tensors.values())

    def bounds(self, dead_zone: float) -> tuple[float, float]:
        """Return log2 of the smallest factor that fits int32 and of one that leaves only zeros.

        Raises:
            QuantiseError: the values are so small that the step would not be a normal float32.
        """
        low = self.reach / _MOST_STEPS * (1 + 1e-6)
        high = 2 * self.reach / min(dead_zone, 1)
        least = _SMALLEST / min(self.scales.values(), default=1.0)
        most = _LARGEST / max(self.scales.values(), default=1.0)
        if max(low, least) >= min(high, most):
            raise QuantiseError("the values are too small or too uneven to quantise: scale them")
        return math.log2(max(low, least)), math.log2(min(high, most))

    def steps(self, exponent: float) -> dict[str, float]:
        """Return the steps for the factor ``2**exponent``, as float32 values."""
        factor = 2.0**exponent
        return {name: float(np.float32(factor * scale)) for name, scale in self.scales.items()}

    def error(self, exponent: float, dead_zone: float) -> float:
        """Relative L2 error over all tensors, after rounding to their dtypes."""
        steps = self.steps(exponent)
        lost = 0.0
        for name, array in self.tensors.items():
            for block in _blocks(array):
                q = quantise(block, steps[name], dead_zone=dead_zone, name=name)
                with np.errstate(over="ignore", invalid="ignore"):
                    restored = dequantise(q, steps[name], block.dtype)
                    lost += float(np.square(block - restored.astype(np.float64)).sum())
        return math.sqrt(lost) / self._norm if math.isfinite(lost) else math.inf

    @cached_property
    def _norm(self) -> float:
        energy = sum(
            float(np.square(block.astype(np.float64)).sum())
            for array in self.tensors.values()
            for block in _blocks(array)
        )
        return math.sqrt(energy)


@overload
def step_for_error(
    tensors: NDArray[Any], error: float, *, dead_zone: float = ..., tolerance: float = ...
) -> float: ...


@overload
def step_for_error(
    tensors: Mapping[str, NDArray[Any]],
    error: float,
    *,
    dead_zone: float = ...,
    per_tensor: bool = ...,
    relative_to: RelativeTo = ...,
    tolerance: float = ...,
) -> dict[str, float]: ...


def step_for_error(
    tensors: NDArray[Any] | Mapping[str, NDArray[Any]],
    error: float,
    *,
    dead_zone: float = 0.5,
    per_tensor: bool = False,
    relative_to: RelativeTo = None,
    tolerance: float = 0.01,
) -> float | dict[str, float]:
    """Return the step that leaves a relative L2 error, ``||x - restored|| / ||x||``.

    The error is never above the wanted one, and at least ``1 - tolerance`` times it wherever some
    step gives that. (Few values make the error jump from step to step; then it may be smaller.)
    Tensors of zeros get the step 1.0.

    Args:
        tensors: one floating-point array, or name to array; finite.
        error: wanted, above 0 and below 1.
        dead_zone: as for :func:`quantise`.
        per_tensor: every tensor meets the error by itself, with a step of its own. Otherwise the
            error is that of all tensors together.
        relative_to: what the steps are proportional to; None gives all tensors the same step.
        tolerance: above 0 and below 1.

    Returns:
        The step of an array, or a dictionary of steps; all are float32 values.

    Raises:
        NonFiniteError: a tensor holds NaN or an infinity.
        QuantiseError: an argument is out of range, or no step leaves so small an error (values
            pass through float32, and int32 bounds how fine a step may be).

    >>> x = np.random.default_rng(0).normal(size=10_000)
    >>> step = step_for_error(x, 0.05)
    >>> 0.0495 <= relative_error(x, dequantise(quantise(x, step), step, x.dtype)) <= 0.05
    True
    """
    if not isinstance(tensors, Mapping):
        return step_for_error({"": tensors}, error, dead_zone=dead_zone, tolerance=tolerance)[""]
    if not (0 < error < 1 and 0 < tolerance < 1 and 0 < dead_zone <= 1):
        raise QuantiseError(
            f"error {error!r} and tolerance {tolerance!r} must lie between 0 and 1, the dead zone "
            f"{dead_zone!r} in (0, 1]"
        )
    if per_tensor:
        if relative_to is not None:
            raise QuantiseError("with an error for each tensor, steps are relative to nothing")
        return {
            name: _solve(Lattice({name: array}), error, dead_zone, tolerance)[name]
            for name, array in tensors.items()
        }
    return _solve(Lattice(tensors, relative_to), error, dead_zone, tolerance)


def _solve(lattice: Lattice, error: float, dead_zone: float, tolerance: float) -> dict[str, float]:
    if not lattice.reach:
        return dict.fromkeys(lattice.tensors, 1.0)
    bounds = lattice.bounds(dead_zone)
    found = find(
        lambda x: lattice.error(x, dead_zone),
        (error * (1 - tolerance), error),
        start=_start(lattice, error, dead_zone),
        bounds=bounds,
        resolution=1e-4,
    )
    best = found.inside or found.below
    if best is None:
        least = f"{found.above.value:.2g}" if found.above else "more"
        raise QuantiseError(
            f"no step leaves a relative error of {error:g}: at the finest one it is {least}; ask "
            "for a larger error, or keep these tensors as they are"
        )
    return lattice.steps(best.x)


def _start(lattice: Lattice, error: float, dead_zone: float) -> float:
    """Where rounding noise, uniform within a step, would have the wanted energy."""
    total = weighted = 0.0
    for name, array in lattice.tensors.items():
        total += array.size * spread(array, "rms") ** 2
        weighted += int(np.count_nonzero(array)) * lattice.scales[name] ** 2
    # Mean square of what is dropped, in steps: 1/12 at a dead zone of a half.
    noise = (dead_zone**3 + (1 - dead_zone) ** 3) / 3
    return math.log2(max(error * math.sqrt(total / (weighted * noise)), 1e-300))


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = np.asarray(array).reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
        yield flat[begin : begin + _BLOCK]
