"""The variable-length codes of the papers, vectorised: Golomb (Rice) and Elias omega.

Bit 7 of a byte comes first, as the codes are written in the papers. A codeword's start follows
from the one before, so decoding computes for every bit where a codeword that began there would
end, and then follows that chain from the first bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import MalformedPayload

__all__ = [
    "BitView",
    "decode_gaps",
    "decode_omega",
    "encode_gaps",
    "encode_omega",
    "pack_fields",
    "rice_parameter",
    "walk",
]

_MAX_FIELD = 56
_PAD = 16
_U64 = np.uint64


def pack_fields(values: NDArray[np.uint64], widths: NDArray[np.int64]) -> bytes:
    """Concatenate the ``widths[i]`` low bits (1 to 64) of each ``values[i]``.

    Upper bits must be zero; the last byte is filled with zeros.

    >>> pack_fields(np.array([1, 2], np.uint64), np.array([1, 3])).hex()
    'a0'
    """
    if not len(values):
        return b""
    end = np.cumsum(widths)
    start = end - widths
    word = start >> 6
    spare = 64 - (start & 63) - widths  # bits left in the word; negative: as many spill over
    fits = np.maximum(spare, 0).astype(np.uint64)
    spill = np.maximum(-spare, 0).astype(np.uint64)
    out = np.zeros((int(end[-1]) + 63 >> 6) + 1, np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    # Fields that start in one word do not overlap there, so their sum is their union.
    out[word[first]] = np.add.reduceat((values >> spill) << fits, first)
    over = np.flatnonzero(spare < 0)
    out[word[over] + 1] += values[over] << (_U64(64) - spill[over])
    return out.astype(">u8").tobytes()[: int(end[-1]) + 7 >> 3]


class BitView:
    """Random access to the bits of a byte string; beyond its end, all bits are zero."""

    def __init__(self, data: bytes) -> None:
        self.size = 8 * len(data)
        self._bytes = np.frombuffer(data + bytes(_PAD), np.uint8)
        # An overlapping view: the eight bytes that start at each byte, as one number.
        self._words: NDArray[Any] = np.ndarray(
            (len(data) + _PAD - 7,), ">u8", self._bytes, strides=(1,)
        )

    def fields(self, at: NDArray[np.int64], width: int | NDArray[np.int64]) -> NDArray[np.uint64]:
        """The `width` bits (1 to 56) that start at each bit number of `at` (0 to size)."""
        words = self._words[np.minimum(at, self.size) >> 3].astype(np.uint64)
        shift = np.asarray(64 - np.asarray(width), np.uint64)
        return np.asarray((words << (at & 7).astype(np.uint64)) >> shift, np.uint64)

    def windows(self, first: int, stop: int) -> NDArray[np.uint16]:
        """The 16 bits that start at each of the bits `first` to `stop`."""
        low, high = first >> 3, (stop >> 3) + 1
        b = self._bytes[low : high + 2].astype(np.uint32)
        b = np.concatenate([b, np.zeros(max(0, high + 2 - low - len(b)), np.uint32)])
        three = (b[:-2] << 16) | (b[1:-1] << 8) | b[2:]
        shifts = np.arange(8, 0, -1, dtype=np.uint32)
        wide = (three[:, None] >> shifts).astype(np.uint16)
        return wide.reshape(-1)[first - 8 * low : stop - 8 * low]

    def padding_is_zero(self, used: int) -> bool:
        """Whether `used` bits end in the last byte and zeros fill it."""
        if used > self.size or self.size - used >= 8:
            return False
        last = int(self._bytes[self.size // 8 - 1]) if self.size else 0
        return not last & (1 << self.size - used) - 1


def _orbit(following: NDArray[np.int64], first: int, most: int) -> tuple[NDArray[np.int64], int]:
    """``first, following[first], ...`` while inside the array and at most `most` of them.

    Returns:
        What was visited, and what would have come next.
    """
    # A memoryview's items are read three times as fast as an array's.
    steps: Any = memoryview(np.ascontiguousarray(following))  # type: ignore[arg-type]
    seen: list[int] = []
    size, at = len(steps), first
    while at < size and len(seen) < most:
        seen.append(at)
        at = steps[at]
    return np.array(seen, np.int64), at


_NEVER = 1 << 20  # length of what is no codeword: longer than any
_LOOK_AHEAD = 256
_CHUNK = 1 << 17


def encode_omega(values: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Codewords, right-aligned, and their lengths in bits, of integers from 1 to 2**32.

    >>> codes, lengths = encode_omega(np.array([1, 2, 4, 16]))
    >>> [f"{c:0{n}b}" for c, n in zip(codes.tolist(), lengths.tolist())]
    ['0', '100', '101000', '10100100000']
    """
    codes = np.zeros(len(values), np.uint64)
    lengths = np.ones(len(values), np.int64)
    active = np.flatnonzero(values > 1)
    k = values[active]
    while len(active):
        digits = np.frexp(k.astype(np.float64))[1].astype(np.int64)
        codes[active] |= k.astype(np.uint64) << lengths[active].astype(np.uint64)
        lengths[active] += digits
        k = digits - 1
        active, k = active[k > 1], k[k > 1]
    return codes, lengths


def decode_omega(
    view: BitView, at: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Value and length of the codeword at each bit number; a huge length where there is none."""
    values = np.ones(len(at), np.int64)
    ends = at.copy()
    active = np.arange(len(at))
    while len(active):
        more = view.fields(ends[active], 1) == 1
        ends[active[~more]] += 1
        active = active[more]
        width = values[active] + 1
        wrong = (width > _MAX_FIELD) | (ends[active] > view.size)
        ends[active[wrong]] += _NEVER
        active, width = active[~wrong], width[~wrong]
        values[active] = view.fields(ends[active], width).astype(np.int64)
        ends[active] += width
    return values, ends - at


@lru_cache(maxsize=1)
def _table() -> NDArray[np.int64]:
    """Length of the codeword that 16 bits start with; 0 where they do not hold all of it."""
    spaced = np.zeros((1 << 16, 16), np.uint8)
    spaced[:, 0] = np.arange(1 << 16) >> 8
    spaced[:, 1] = np.arange(1 << 16) & 255
    view = BitView(spaced.tobytes())
    lengths = decode_omega(view, np.arange(1 << 16) * 128)[1]
    return np.where(lengths <= 16, lengths, 0)


def _omega_lengths(view: BitView, first: int, stop: int) -> NDArray[np.int64]:
    """Length of the codeword that would start at each of the bits `first` to `stop`."""
    lengths = _table()[view.windows(first, stop)]
    long = np.flatnonzero(lengths == 0)
    lengths[long] = decode_omega(view, first + long)[1]
    return lengths


def walk(
    view: BitView,
    count: int,
    lengths: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
) -> Iterator[NDArray[np.int64]]:
    """Where each of `count` codewords starts; they and zeros in the last byte fill the bits.

    Args:
        view: the bits.
        count: number of codewords.
        lengths: makes of the lengths of omega codewords at successive bits those of the
            codewords that are used, for all but the last 256 bits.

    Yields:
        The numbers of the bits where some codewords start, at most 2**17 of them at a time so
        that work space stays small.

    Raises:
        MalformedPayload: the bits end before, or go on behind.
    """
    if count > view.size:
        raise MalformedPayload(f"{count} codewords are announced, but only {view.size} bits follow")
    done, at = 0, 0
    while done < count:
        stop = min(at + _CHUNK, view.size)
        omega = _omega_lengths(view, at, stop + _LOOK_AHEAD)
        # Each codeword that begins in the chunk ends in the part looked ahead, or is none.
        used = (omega if lengths is None else lengths(omega))[: stop - at]
        seen, following = _orbit(np.arange(len(used)) + used, 0, count - done)
        starts = seen + at
        done += len(seen)
        at += following
        if at > view.size or (done < count and at >= view.size):
            raise MalformedPayload("the bits end inside a codeword")
        yield starts
    if not view.padding_is_zero(at):
        raise MalformedPayload("the codewords do not fill their section")


_GOLDEN = (math.sqrt(5) + 1) / 2
_GAP_CHUNK = 1 << 18
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
    done, at, reach, total = 0, 0, _GAP_CHUNK, 0
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
        seen, _ = _orbit(np.searchsorted(zeros, zeros + 1 + parameter), 0, count - done)
        stops = zeros[seen]
        starts = np.concatenate([np.array([at]), stops[:-1] + 1 + parameter])
        done += len(seen)
        at, reach = int(stops[-1]) + 1 + parameter, _GAP_CHUNK
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
