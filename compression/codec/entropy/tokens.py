"""Integers to tokens of an alphabet of at most 256, plus raw bits.

``z < 2**direct`` is its own token. Above, the token holds the exponent and the ``mantissa``
leading bits below it, and the remaining bits travel raw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload

__all__ = ["GAP_TOKENS", "TokenScheme", "signed", "zigzag"]


def zigzag(v: NDArray[Any]) -> NDArray[Any]:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ...; int32 to uint32, int64 to uint64."""
    bits = 8 * v.dtype.itemsize
    z = v << 1
    z ^= v >> (bits - 1)
    return np.asarray(z.view(np.uint32 if bits == 32 else np.uint64))


def signed(z: NDArray[Any]) -> NDArray[Any]:
    """Inverse of :func:`zigzag`."""
    one = z.dtype.type(1)
    v = z >> one
    odd = z & one
    np.subtract(z.dtype.type(0), odd, out=odd)
    v ^= odd
    return np.asarray(v.view(np.int32 if z.dtype.itemsize == 4 else np.int64))


def bit_length_minus_one(z: NDArray[Any]) -> NDArray[np.int64]:
    """floor(log2 z) of non-zero unsigned integers, exact for every width."""
    z = z.astype(np.uint64)
    high = z >> np.uint64(32)
    part = np.where(high > 0, high, z)
    exponent = np.frexp(part.astype(np.float64))[1].astype(np.int64) - 1
    return np.asarray(np.where(high > 0, exponent + 32, exponent), np.int64)


@dataclass(frozen=True)
class TokenScheme:
    """``direct`` (0 to 7) and ``mantissa`` (0 to 3, at most ``direct``)."""

    direct: int
    mantissa: int

    def alphabet(self, largest: int) -> int:
        """Return one more than the token of ``largest``."""
        if largest < 1 << self.direct:
            return largest + 1
        nb = largest.bit_length() - 1
        top = largest >> (nb - self.mantissa) & (1 << self.mantissa) - 1
        return (1 << self.direct) + (nb - self.direct << self.mantissa) + top + 1

    def split(
        self, z: NDArray[Any]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint8]]:
        """Return tokens, and of those with raw bits: positions, the bits, their number."""
        limit = 1 << self.direct
        tokens = z.astype(np.uint8)
        at = np.flatnonzero(z >= limit)
        if not len(at):
            return tokens, at, np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        big = z[at].astype(np.uint64)
        nb = bit_length_minus_one(big)
        raw = (nb - self.mantissa).astype(np.uint64)
        top = (big >> raw).astype(np.int64) & ((1 << self.mantissa) - 1)
        tokens[at] = limit + ((nb - self.direct) << self.mantissa) + top
        keep = raw > 0
        if not keep.all():
            at, big, raw = at[keep], big[keep], raw[keep]
        low = big & ((np.uint64(1) << raw) - np.uint64(1))
        return tokens, at, low, raw.astype(np.uint8)

    def widths(self) -> NDArray[np.uint8]:
        """Raw bits of each of the 256 tokens (255: no such token)."""
        t = np.arange(256) - (1 << self.direct)
        w = np.where(t < 0, 0, (t >> self.mantissa) + self.direct - self.mantissa)
        return np.where(w + self.mantissa > 63, 255, w).astype(np.uint8)

    def join(
        self, tokens: NDArray[np.uint8], at: NDArray[np.int64], raw: NDArray[np.uint64], bits: int
    ) -> NDArray[Any]:
        """Inverse of :meth:`split`; ``at`` lists every token >= 2**direct, ``bits`` is 32 or 64."""
        dtype = np.uint32 if bits == 32 else np.uint64
        z = tokens.astype(dtype)
        if len(at):
            t = tokens[at].astype(np.uint64) - np.uint64(1 << self.direct)
            m = np.uint64(self.mantissa)
            exponent = (t >> m) + np.uint64(self.direct)
            if int(exponent.max()) >= bits:
                raise MalformedPayload(f"a token stands for a value of more than {bits} bits")
            lead = (np.uint64(1) << m) | (t & np.uint64((1 << self.mantissa) - 1))
            z[at] = ((lead << (exponent - m)) | raw).astype(dtype)
        return z


GAP_TOKENS = TokenScheme(3, 2)
"""The scheme of the gaps between non-zeros."""
