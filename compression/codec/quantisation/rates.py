"""The step that meets a rate: bits per parameter of the real payload."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import Context
from ..encoder import encode
from ..errors import QuantiseError
from ..generator import CounterStream
from .lattice import quantise
from .scales import RelativeTo
from .search import Found, Point, find
from .steps import Lattice

__all__ = ["step_for_bits"]

_SAMPLE = 1 << 16
_LEAST_SAMPLE = 256


def step_for_bits(
    tensors: Mapping[str, NDArray[Any]],
    bits_per_parameter: float,
    *,
    context: Context | None = None,
    dead_zone: float = 0.5,
    relative_to: RelativeTo = None,
    tolerance: float = 0.02,
    measure: Callable[[dict[str, NDArray[np.int32]], dict[str, float]], int] | None = None,
    parameters: int | None = None,
) -> dict[str, float]:
    """Return the steps at which ``len(encode(quantised)) * 8`` meets a number of bits.

    A model on a sample (zeroth-order entropy of each tensor) says where to start; then the real
    encoder runs, two to five times as a rule, and the model is scaled to what it returned.

    Args:
        tensors: name to floating-point array, finite.
        bits_per_parameter: wanted, above 0, payload bits divided by the number of values.
        context: what the payload will be coded with; its layout, if any, says int32.
        dead_zone: as for :func:`quantise`.
        relative_to: what the steps are proportional to; None gives all tensors the same step.
        tolerance: relative deviation allowed to both sides, above 0 and below 1.
        measure: bytes that quantised tensors with their steps take, instead of the payload's
            length; for those who send more than this payload.
        parameters: what to divide by, instead of the number of values.

    Returns:
        Name to step; float32 values.

    Raises:
        NonFiniteError: a tensor holds NaN or an infinity.
        QuantiseError: an argument is out of range, or no step gives that rate; the message names
            rates that can be had.

    >>> w = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32)
    >>> step = step_for_bits({"w": w}, 2.0)["w"]
    >>> abs(len(encode({"w": quantise(w, step)})) * 8 / w.size - 2.0) < 0.04
    True
    """
    if not (0 < bits_per_parameter < math.inf and 0 < tolerance < 1 and 0 < dead_zone <= 1):
        raise QuantiseError(
            f"bits per parameter {bits_per_parameter!r} must be above 0, the tolerance "
            f"{tolerance!r} between 0 and 1, the dead zone {dead_zone!r} in (0, 1]"
        )
    lattice = Lattice(tensors, relative_to)
    count = lattice.size if parameters is None else parameters
    if not lattice.size or count < 1:
        raise QuantiseError("there is no parameter: nothing to quantise")

    def bits(x: float) -> float:
        steps = lattice.steps(-x)
        q = {
            name: quantise(array, steps[name], dead_zone=dead_zone, name=name)
            for name, array in lattice.tensors.items()
        }
        nbytes = measure(q, steps) if measure else len(encode(q, context=context))
        return nbytes * 8 / count

    low, high = bits_per_parameter * (1 - tolerance), bits_per_parameter * (1 + tolerance)
    if not lattice.reach:
        only = bits(0.0)
        if low <= only <= high:
            return lattice.steps(0.0)
        raise QuantiseError(f"all values are zero: they take {only:.4g} bits each at any step")
    least, most = lattice.bounds(dead_zone)
    bounds = (-most, -least)
    model = _Model(lattice, dead_zone, count)
    start = model.inverse(bits_per_parameter, bounds)
    if bits_per_parameter > 32:
        start = bounds[1]  # beyond what an int32 can take: only the finest step is worth a try

    def guess(seen: Point) -> float | None:
        """Where the model, scaled to what was seen, has the wanted rate."""
        expected = model.bits(seen.x)
        if expected < 1e-3 or not seen.value:
            return None
        return model.inverse(bits_per_parameter * expected / seen.value, bounds)

    found = find(bits, (low, high), start=start, bounds=bounds, guess=guess)
    if found.inside is None:
        raise QuantiseError(_unreachable(bits_per_parameter, tolerance, found, count))
    return lattice.steps(-found.inside.x)


def _unreachable(wanted: float, tolerance: float, found: Found, count: int) -> str:
    less = found.below.value if found.below else None
    more = found.above.value if found.above else 0.0
    if less is None:
        reachable = (
            f"with every value at zero the payload still takes {round(more * count / 8)} bytes, "
            f"{more:.4g} bits per parameter; ask for more, or code more parameters together"
        )
    elif not more:
        reachable = f"the finest step that int32 allows takes {less:.4g}; ask for less"
    else:
        reachable = (
            f"the nearest are {less:.4g} and {more:.4g}, because many values cross a threshold at "
            "once; ask for one of these, or allow more tolerance"
        )
    return f"no step gives {wanted:g} bits per parameter (within {tolerance:.1%}): {reachable}"


class _Model:
    """Entropy of each tensor on a sample, as a function of the steps."""

    def __init__(self, lattice: Lattice, dead_zone: float, count: int) -> None:
        self._lattice, self._dead_zone, self._count = lattice, dead_zone, count
        self._samples = {
            name: _sampled(array.reshape(-1), lattice.size, name)
            for name, array in lattice.tensors.items()
            if array.size
        }

    def bits(self, x: float) -> float:
        """Bits per parameter at the factor ``2**-x``."""
        steps = self._lattice.steps(-x)
        total = 0.0
        for name, sample in self._samples.items():
            q = quantise(sample, steps[name], dead_zone=self._dead_zone, name=name)
            _, counts = np.unique(q, return_counts=True)
            share = counts / len(sample)
            # Miller 1955: a sample's entropy is low by about (distinct - 1) / 2n nats.
            entropy = -float((share * np.log2(share)).sum())
            entropy += (len(counts) - 1) / (2 * math.log(2) * len(sample))
            total += entropy * self._lattice.tensors[name].size
        return total / self._count

    def inverse(self, wanted: float, bounds: tuple[float, float]) -> float:
        """Return the x within the bounds at which the model comes closest to a rate."""
        low, high = bounds
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (low, middle) if self.bits(middle) > wanted else (middle, high)
        return (low + high) / 2


def _sampled(flat: NDArray[Any], total: int, name: str) -> NDArray[Any]:
    """Values drawn from a tensor, in proportion to its size; all of a small one."""
    count = max(_LEAST_SAMPLE, _SAMPLE * flat.size // total)
    if flat.size <= count:
        return flat
    words = CounterStream.of(b"prunecast sample\0" + name.encode("utf-8", "replace"))
    at = ((words.words(0, count) >> np.uint64(32)) * np.uint64(flat.size)) >> np.uint64(32)
    return np.asarray(flat[at.astype(np.int64)])
