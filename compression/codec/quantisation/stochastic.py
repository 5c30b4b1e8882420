"""Rounding that is right on average: up with the probability of the remainder."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantiseError
from ..generator import CounterStream
from .lattice import label, steps_of

__all__ = ["quantise_stochastically"]

_DOMAIN = b"prunecast stochastic rounding 1\0"
_BITS = 53  # of a float64's significand, so that the comparison below is exact


def quantise_stochastically(
    values: NDArray[Any], step: float, *, key: int, name: str
) -> NDArray[np.int32]:
    """Round ``x / step`` to one of the two integers beside it, with expectation ``x / step``.

    The magnitude ``a = |x| / step`` is rounded up where ``u < a - floor(a)``, with ``u`` uniform
    on the multiples of 2**-53 in [0, 1) (Gupta et al. 2015, "Deep learning with limited
    numerical precision", section 3). Unbiased to within 2**-53 of a step; the variance is at
    most ``step**2 / 4``. ``u`` is word number *index* of the :class:`CounterStream` of key and
    name, and a division is all the floating-point arithmetic: the same everywhere.

    Args:
        values: floating-point array of any shape (float16, float32 or float64).
        step: lattice step, in the unit of ``values``; finite and above zero.
        key: 0 to 2**64 - 1. The same key rounds the same values in the same way; use another
            one every time (a round's number, say), or the errors add up.
        name: of the tensor: tensors of other names get other streams.

    Returns:
        int32 array of the same shape; ``dequantise`` is its counterpart as for ``quantise``.

    Raises:
        NonFiniteError: ``values`` holds NaN or an infinity.
        QuantiseError: ``step`` or ``key`` is out of range, ``values`` is not floating-point, or
            a result does not fit in int32.

    >>> x = np.full(10_000, 0.3, np.float32)
    >>> abs(float(quantise_stochastically(x, 1.0, key=1, name="w").mean()) - 0.3) < 0.02
    True
    """
    if not 0 <= key < 1 << 64:
        raise QuantiseError(f"the key for {label(name)} is {key!r}, outside 0..2**64-1")
    array = np.asarray(values)
    wide = steps_of(array, step, margin=1.0, name=name).reshape(-1)
    stream = CounterStream.of(_DOMAIN + struct.pack("<Q", key) + _encoded(name))
    flat = np.empty(array.size, np.int32)
    for begin, words in stream.blocks(array.size):
        a = wide[begin : begin + len(words)]
        low = np.floor(a)
        a -= low  # exact: the fraction is a multiple of the last place of ``a``
        a *= 2.0**_BITS
        low += (words >> np.uint64(64 - _BITS)).astype(np.float64) < a
        flat[begin : begin + len(words)] = low
    result = flat.reshape(array.shape)
    return np.asarray(np.where(array < 0, -result, result), np.int32)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
