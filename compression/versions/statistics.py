"""Running statistics of normalisation layers: which tensors they are, and how finely they travel.

A batch's mean and variance scatter by far more than a per cent, so of their running averages some
bits of mantissa are enough, and the codec leaves out the others. They stay floats, since a lattice
has one step for a tensor and no infinity: a variance of 1e-6 must not become zero.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_STATISTICS_BITS", "is_statistic", "rounded_floats"]

_NAMES = ("*running_mean", "*running_var", "*moving_mean", "*moving_variance")
MOST_STATISTICS_BITS = 23
"""Of mantissa that a rule may ask for: all that a float32 has."""


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic by its name, as PyTorch's and Keras' layers have it.

    >>> is_statistic("layer1.0.bn1.running_var"), is_statistic("layer1.0.bn1.weight")
    (True, False)
    """
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _NAMES)


def rounded_floats(
    array: NDArray[Any],
    bits: int,
    *,
    last: NDArray[Any] | None = None,
    hysteresis: float = 0.5,
) -> NDArray[Any]:
    """Floats rounded to some bits of mantissa: to nearest, halves away from zero.

    Infinity and NaN stay as they are, bit for bit; what is finite stays finite, and what is not
    zero does not become zero.

    Args:
        array: float16, float32 or float64, any shape.
        bits: of mantissa that are kept, without the leading one; as many as there are, or more,
            change nothing.
        last: what the array was rounded to before, same shape and dtype; None for nothing.
        hysteresis: a last value stays while the new one is at most so many spacings away from it,
            0.5 (rounding) to 1. A spacing is the distance of neighbours where the values lie.

    Returns:
        An array of the same dtype and shape, in the machine's byte order.

    >>> rounded_floats(np.array([1.0, 1.3, -3.2, 0.0], np.float32), 2).tolist()
    [1.0, 1.25, -3.0, 0.0]
    """
    array = np.asarray(array, array.dtype.newbyteorder("="))
    mantissa = np.finfo(array.dtype).nmant
    drop = mantissa - bits
    if drop <= 0:
        return array
    kind = np.dtype(f"u{array.itemsize}").type
    sign, spacing = kind(1 << (8 * array.itemsize - 1)), kind(1 << drop)
    infinity = kind(((1 << (8 * array.itemsize - 1 - mantissa)) - 1) << mantissa)
    pattern = array.view(kind)
    size = pattern & ~sign
    nearest = np.clip(
        (size + (spacing >> kind(1))) & ~(spacing - kind(1)), spacing, infinity - spacing
    )
    whole = np.where((size == 0) | (size >= infinity), size, nearest)
    if last is not None and hysteresis > 0.5:
        before = last.view(kind)
        held = before & ~sign
        # neighbouring patterns are neighbouring floats, so their distance counts in spacings
        apart = np.maximum(size, held) - np.minimum(size, held)
        stays = (apart <= kind(hysteresis * (1 << drop))) & ((pattern ^ before) & sign == 0)
        stays &= (held & (spacing - kind(1)) == 0) & (size < infinity) & (held < infinity)
        whole = np.where(stays & (size > 0) & (held > 0), held, whole)
    return np.asarray((whole | (pattern & sign)).view(array.dtype))
