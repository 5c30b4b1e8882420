"""Golomb position encoding of sparse ternary compression (Sattler et al. 2019, section VI-D).

The distance ``d >= 1`` from one non-zero to the next is written as ``(d - 1) >> b`` ones, a zero,
and the ``b`` low bits of ``d - 1``: a Golomb code whose divisor is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .bits import BitView, orbit

__all__ = ["decode_gaps", "encode_gaps", "expected_bits", "rice_parameter"]

_GOLDEN = (math.sqrt(5) + 1) / 2
_CHUNK = 1 << 18
MAX_PARAMETER = 32


def rice_parameter(density: float) -> int:
    """``b* = 1 + floor(log2(log(phi - 1) / log(1 - p)))``, the best one for random positions.

    The paper's worked figure of 8.38 bits at p = 0.01 is that of ``b = 7``; its formula gives 6,
    which needs 8.11.

    Args:
        density: fraction ``p`` of positions that are non-zero, in (0, 1].

    >>> rice_parameter(0.01)
    6
    """
    if density >= 1:
        return 0
    ratio = math.log(_GOLDEN - 1) / math.log1p(-density)
    return min(MAX_PARAMETER, max(0, 1 + math.floor(math.log2(ratio))))


def expected_bits(density: float, parameter: int | None = None) -> float:
    """``b + 1 / (1 - (1 - p)**(2**b))``: expected bits for the position of one non-zero.

    >>> round(expected_bits(0.01), 2)
    8.11
    """
    b = rice_parameter(density) if parameter is None else parameter
    return b + 1 / (1 - (1 - density) ** (1 << b))


def encode_gaps(gaps: NDArray[np.int64], parameter: int) -> bytes:
    """Code distances (1 and more); the last byte is filled with zeros."""
    if not len(gaps):
        return b""
    ones = (gaps - 1) >> parameter
    ends = np.cumsum(ones + 1 + parameter)
    bits = np.ones(int(ends[-1]) + 7 & -8, np.uint8)
    bits[int(ends[-1]) :] = 0
    bits[ends - 1 - parameter] = 0
    for j in range(parameter):
        bits[ends - 1 - j] = (gaps - 1) >> j & 1
    return np.packbits(bits).tobytes()


def decode_gaps(data: bytes, count: int, parameter: int, most: int) -> Iterator[NDArray[np.int64]]:
    """The `count` distances that `data` holds exactly, some at a time to bound the work space.

    Args:
        data: the bits.
        count: number of distances.
        parameter: ``b``, at most 32.
        most: what their sum may be at most.

    Raises:
        MalformedPayload: the bits end before, bytes are left over, or the sum is above `most`.
    """
    view = BitView(data)
    done, at, reach, total = 0, 0, _CHUNK, 0
    while done < count:
        stop = min(at + reach, view.size)
        zeros = _zeros(data, at, stop) if at < stop else np.zeros(0, np.int64)
        if not len(zeros):
            if stop == view.size:
                raise MalformedPayload("the bits end inside a Golomb codeword")
            if stop - at > most >> parameter:
                raise MalformedPayload("the positions reach beyond the tensors")
            reach *= 2  # a run of ones longer than the chunk
            continue
        seen, _ = orbit(np.searchsorted(zeros, zeros + 1 + parameter), 0, count - done)
        stops = zeros[seen]
        starts = np.concatenate([np.array([at]), stops[:-1] + 1 + parameter])
        done += len(seen)
        at, reach = int(stops[-1]) + 1 + parameter, _CHUNK
        gaps = _gaps(view, starts, stops, parameter, most)
        total += int(gaps.sum())
        if total > most:
            raise MalformedPayload("the positions reach beyond the tensors")
        yield gaps
    if not view.padding_is_zero(at):
        raise MalformedPayload("the Golomb codewords do not fill their section")


def _gaps(
    view: BitView,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    parameter: int,
    most: int,
) -> NDArray[np.int64]:
    """Distances from where their codewords start and where the ones in these stop."""
    ones = stops - starts
    # Checked before the shift and before anything is added up: neither can overflow then.
    if int(ones.max()) > most >> parameter:
        raise MalformedPayload("the positions reach beyond the tensors")
    gaps: NDArray[np.int64] = (ones << parameter) + 1
    if parameter:
        gaps += view.fields(stops + 1, parameter).astype(np.int64)
    return gaps


def _zeros(data: bytes, first: int, stop: int) -> NDArray[np.int64]:
    """Numbers of the bits from `first` to `stop` that are zero."""
    low = first >> 3
    octets = np.frombuffer(data, np.uint8, (stop + 7 >> 3) - low, low)
    bits = np.unpackbits(octets)[first - 8 * low : stop - 8 * low]
    zeros: NDArray[np.int64] = np.flatnonzero(bits == 0) + first
    return zeros
