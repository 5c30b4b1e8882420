"""Elias recursive (omega) coding of positive integers (Elias 1975; QSGD, section 3.1).

The code of ``k``: start with the bit 0; while ``k > 1`` put the binary digits of ``k`` in front
and go on with their number minus one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .bits import MAX_FIELD, BitView, orbit

__all__ = ["decode_omega", "encode_omega", "omega_lengths", "walk"]

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
        wrong = (width > MAX_FIELD) | (ends[active] > view.size)
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


def omega_lengths(view: BitView, first: int, stop: int) -> NDArray[np.int64]:
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
        omega = omega_lengths(view, at, stop + _LOOK_AHEAD)
        # Each codeword that begins in the chunk ends in the part looked ahead, or is none.
        used = (omega if lengths is None else lengths(omega))[: stop - at]
        seen, following = orbit(np.arange(len(used)) + used, 0, count - done)
        starts = seen + at
        done += len(seen)
        at += following
        if at > view.size or (done < count and at >= view.size):
            raise MalformedPayload("the bits end inside a codeword")
        yield starts
    if not view.padding_is_zero(at):
        raise MalformedPayload("the codewords do not fill their section")
