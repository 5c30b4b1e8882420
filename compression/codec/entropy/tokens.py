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
from .rawbits import BitReader, BitWriter

__all__ = ["GAP_TOKENS", "TokenScheme", "bit_length_minus_one", "signed", "zigzag"]

_CHUNK = 1 << 16
_EXACT = 1 << 53


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

    def tokens(self, z: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the tokens alone."""
        return self._large(z)[0]

    def split(self, z: NDArray[Any], raw: BitWriter) -> NDArray[np.uint8]:
        """Return tokens and append their raw bits."""
        if len(z) <= _CHUNK:
            tokens, large, exponents = self._large(z)
            width = exponents - np.uint64(self.mantissa)
            raw.write(large & ((np.uint64(1) << width) - np.uint64(1)), width)
            return tokens
        out = np.empty(len(z), np.uint8)
        for s in range(0, len(z), _CHUNK):  # in chunks, to bound temporary arrays
            out[s : s + _CHUNK] = self.split(z[s : s + _CHUNK], raw)
        return out

    def _large(
        self, z: NDArray[Any]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64]]:
        """Tokens; and the values from ``2**direct`` on with their exponents."""
        tokens = z.astype(np.uint8)
        at = np.flatnonzero(z >= 1 << self.direct)
        large = z[at].astype(np.uint64)
        if not len(at):
            return tokens, large, large
        m = np.uint64(self.mantissa)
        if z.dtype.itemsize <= 4 or int(large.max()) < _EXACT:
            # A double of such an integer is exact, and shows the exponent and the bits below it.
            lead = large.astype(np.float64).view(np.uint64) >> (np.uint64(52) - m)
            lead -= np.uint64(1023) << m
            exponents = lead >> m
        else:
            exponents = bit_length_minus_one(large).astype(np.uint64)
            lead = (exponents - np.uint64(1) << m) + (large >> (exponents - m))
        tokens[at] = lead.view(np.int64) + ((1 << self.direct) - (self.direct << self.mantissa))
        return tokens, large, exponents

    def widths(self) -> NDArray[np.uint8]:
        """Raw bits of each of the 256 tokens (255: no such token)."""
        t = np.arange(256) - (1 << self.direct)
        w = np.where(t < 0, 0, (t >> self.mantissa) + self.direct - self.mantissa)
        return np.where(w + self.mantissa > 63, 255, w).astype(np.uint8)

    def join(self, tokens: NDArray[np.uint8], raw: BitReader, bits: int) -> NDArray[Any]:
        """Inverse of :meth:`split`; ``bits`` (32 or 64) is the width of the result."""
        z = tokens.astype(np.uint32 if bits == 32 else np.uint64)
        limit, m = 1 << self.direct, np.uint64(self.mantissa)
        widths = self.widths()
        for s in range(0, len(z), _CHUNK):  # in chunks, to bound temporary arrays
            part = tokens[s : s + _CHUNK]
            at = np.flatnonzero(part >= limit)
            if not len(at):
                continue
            big = part[at]
            width = widths[big]
            if int(width.max()) + self.mantissa >= bits:
                raise MalformedPayload(f"a token stands for a value of more than {bits} bits")
            lead = (np.uint64(1) << m) | ((big - limit) & ((1 << self.mantissa) - 1))
            value = (lead << width.astype(np.uint64)) | raw.read(width)
            z[s : s + _CHUNK][at] = value
        return z


GAP_TOKENS = TokenScheme(3, 2)
"""The scheme of the gaps between non-zeros."""
