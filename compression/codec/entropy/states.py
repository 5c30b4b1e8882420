"""Final states of the lanes, in about 27 bits each instead of 32.

A final state is as likely to lie in any octave of [2**16, 2**32): four bits say which, and the
bits below its leading one follow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .rawbits import pack_bits, unpack_bits
from .tokens import bit_length_minus_one

__all__ = ["FEWEST_PACKED", "pack_states", "unpack_states"]

FEWEST_PACKED = 8
"""Below so many lanes, states are four bytes each."""


def pack_states(states: NDArray[np.uint32]) -> bytes:
    """Return the bytes of final states in [2**16, 2**32)."""
    if len(states) < FEWEST_PACKED:
        return states.astype("<u4").tobytes()
    octave = bit_length_minus_one(states)
    low = states.astype(np.uint64) - (np.uint64(1) << octave.astype(np.uint64))
    fours = np.full(len(states), 4)
    return pack_bits((octave - 16).astype(np.uint64), fours) + pack_bits(low, octave)


def unpack_states(data: bytes, lanes: int) -> NDArray[np.uint32]:
    """Inverse of :func:`pack_states`; MalformedPayload unless ``data`` has the right length."""
    if lanes < FEWEST_PACKED:
        if len(data) != 4 * lanes:
            raise MalformedPayload(f"{len(data)} bytes of states for {lanes} lanes")
        return np.frombuffer(data, "<u4").astype(np.uint32)
    cut = lanes + 1 >> 1
    octave = unpack_bits(data[:cut], np.full(lanes, 4)) + np.uint64(16)
    low = unpack_bits(data[cut:], octave)
    return ((np.uint64(1) << octave) | low).astype(np.uint32)
