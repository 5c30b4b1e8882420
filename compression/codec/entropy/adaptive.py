"""Adaptive binary range coder: headers, side information and small payloads.

Binary decisions with one adaptive probability per context, a 40-bit range and carry propagation
(Martin, "Range encoding", 1979; the binary form is the one of LZMA). Adaptation starts fast and
slows down with the number of decisions seen, so that a context is learnt within a few symbols.
"""

from __future__ import annotations

from typing import Final

from ..errors import MalformedPayload

__all__ = ["UINT_CONTEXTS", "AdaptiveDecoder", "AdaptiveEncoder"]

_TOP: Final = 1 << 40
_RENORM: Final = 1 << 32
_LOW: Final = _TOP - 1
_HALF: Final = 1 << 15
_FLOOR: Final = 16  # the least probability, of 65536
_CEIL: Final = 65536 - _FLOOR
_SLOWEST: Final = 160
# Step of the estimator after n decisions: 1 / (n + 1.6), in 1/65536.
_RATE: Final = tuple(655360 // (10 * n + 16) for n in range(_SLOWEST + 1))

_UNARY: Final = 24
_TOPS: Final = 10
_LEADING: Final = 3
UINT_CONTEXTS: Final = _UNARY + _TOPS * (1 << _LEADING)
"""Contexts that one integer model takes."""
_MAX_EXPONENT: Final = 64


class _Models:
    """Probabilities that a decision is 1 (of 65536) and how often each was used."""

    def __init__(self) -> None:
        self.p: list[int] = []
        self.n: list[int] = []

    def contexts(self, count: int) -> int:
        """Reserve ``count`` contexts and return the index of the first."""
        first = len(self.p)
        self.p.extend([_HALF] * count)
        self.n.extend([0] * count)
        return first


class AdaptiveEncoder(_Models):
    """Writes decisions and integers into a growing byte string."""

    def __init__(self) -> None:
        super().__init__()
        self._out = bytearray()
        self._low = 0
        self._range = _TOP - 1

    def _shift(self) -> None:
        while self._range < _RENORM:
            if self._low >= _TOP:
                self._carry()
            self._out.append(self._low >> 32)
            self._low = (self._low << 8) & _LOW
            self._range <<= 8

    def _carry(self) -> None:
        self._low &= _LOW
        i = len(self._out) - 1
        while self._out[i] == 255:
            self._out[i] = 0
            i -= 1
        self._out[i] += 1

    def bit(self, i: int, value: int) -> None:
        """Code one decision under context ``i``."""
        p = self.p[i]
        n = self.n[i]
        bound = (self._range >> 16) * p
        if value:
            self._range = bound
            self.p[i] = p + ((_CEIL - p) * _RATE[n] >> 16)
        else:
            self._low += bound
            self._range -= bound
            self.p[i] = p - ((p - _FLOOR) * _RATE[n] >> 16)
        if n < _SLOWEST:
            self.n[i] = n + 1
        if self._range < _RENORM:
            self._shift()

    def bits(self, value: int, count: int) -> None:
        """Code the ``count`` low bits of ``value`` as they are, high ones first."""
        while count:
            k = min(count, 16)
            count -= k
            self._range >>= k
            self._low += self._range * (value >> count & (1 << k) - 1)
            if self._range < _RENORM:
                self._shift()

    def uint(self, first: int, value: int) -> None:
        """Code an integer >= 0 with the model whose contexts start at ``first``."""
        v = value + 1
        k = v.bit_length() - 1
        # The exponent in unary; :meth:`bit` written out, as most of the time goes here.
        p, n, low, span = self.p, self.n, self._low, self._range
        for i in range(first, first + min(k + 1, _MAX_EXPONENT)):
            c = i if i < first + _UNARY else first + _UNARY - 1
            old, seen = p[c], n[c]
            bound = (span >> 16) * old
            if i < first + k:
                span = bound
                p[c] = old + ((_CEIL - old) * _RATE[seen] >> 16)
            else:
                low += bound
                span -= bound
                p[c] = old - ((old - _FLOOR) * _RATE[seen] >> 16)
            if seen < _SLOWEST:
                n[c] = seen + 1
            if span < _RENORM:
                self._low, self._range = low, span
                self._shift()
                low, span = self._low, self._range
        self._low, self._range = low, span
        if k:
            j = first + _UNARY + (min(k, _TOPS) - 1 << _LEADING)
            node = 1
            for shift in range(k - 1, max(k - _LEADING, 0) - 1, -1):
                bit = v >> shift & 1
                self.bit(j + node, bit)
                node = 2 * node + bit
            if k > _LEADING:
                self.bits(v, k - _LEADING)

    def sint(self, first: int, value: int) -> None:
        """Code a signed integer (0, -1, 1, -2, ... as 0, 1, 2, 3, ...)."""
        self.uint(first, 2 * value if value >= 0 else -2 * value - 1)

    def finish(self) -> bytes:
        """End the string; the shortest tail that decodes, as missing bytes read as zero."""
        for zeros in range(40, -1, -8):
            value = (self._low + (1 << zeros) - 1) >> zeros << zeros
            if value < self._low + self._range:
                break
        self._low = value
        if self._low >= _TOP:
            self._carry()
        return bytes(self._out) + self._low.to_bytes(5, "big").rstrip(b"\0")


class AdaptiveDecoder(_Models):
    """Reads what :class:`AdaptiveEncoder` wrote; any bytes decode to something."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data + bytes(5)
        self._pos = 5
        self._code = int.from_bytes(self._data[:5], "big")
        self._range = _TOP - 1

    def _shift(self) -> None:
        while self._range < _RENORM:
            if self._pos >= len(self._data):
                raise MalformedPayload("the adaptive section ends too early")
            self._code = (self._code << 8 | self._data[self._pos]) & _LOW
            self._pos += 1
            self._range <<= 8

    def bit(self, i: int) -> int:
        """Decode one decision under context ``i``."""
        p = self.p[i]
        n = self.n[i]
        bound = (self._range >> 16) * p
        if n < _SLOWEST:
            self.n[i] = n + 1
        if self._code < bound:
            self._range = bound
            self.p[i] = p + ((_CEIL - p) * _RATE[n] >> 16)
            if bound < _RENORM:
                self._shift()
            return 1
        self._code -= bound
        self._range -= bound
        self.p[i] = p - ((p - _FLOOR) * _RATE[n] >> 16)
        if self._range < _RENORM:
            self._shift()
        return 0

    def bits(self, count: int) -> int:
        """Decode ``count`` plain bits."""
        value = 0
        while count:
            k = min(count, 16)
            count -= k
            self._range >>= k
            part = min(self._code // self._range, (1 << k) - 1)
            self._code -= part * self._range
            value = value << k | part
            if self._range < _RENORM:
                self._shift()
        return value

    def uint(self, first: int) -> int:
        """Decode an integer in [0, 2**65)."""
        # The exponent in unary; :meth:`bit` written out, as most of the time goes here.
        p, n, code, span = self.p, self.n, self._code, self._range
        k, c = 0, first
        last = first + _UNARY - 1
        while k < _MAX_EXPONENT:
            old, seen = p[c], n[c]
            bound = (span >> 16) * old
            if seen < _SLOWEST:
                n[c] = seen + 1
            more = code < bound
            if more:
                span = bound
                p[c] = old + ((_CEIL - old) * _RATE[seen] >> 16)
            else:
                code -= bound
                span -= bound
                p[c] = old - ((old - _FLOOR) * _RATE[seen] >> 16)
            if span < _RENORM:
                self._code, self._range = code, span
                self._shift()
                code, span = self._code, self._range
            if not more:
                break
            k += 1
            if c < last:
                c += 1
        self._code, self._range = code, span
        bit = self.bit
        if not k:
            return 0
        j = first + _UNARY + (min(k, _TOPS) - 1 << _LEADING)
        v = 1
        for _ in range(min(k, _LEADING)):
            v = v << 1 | bit(j + v)
        if k > _LEADING:
            v = v << (k - _LEADING) | self.bits(k - _LEADING)
        return v - 1

    def sint(self, first: int) -> int:
        """Decode a signed integer."""
        z = self.uint(first)
        return -(z + 1 >> 1) if z & 1 else z >> 1

    def levels(self, models: list[int], middle: int, most: int, count: int) -> bytes:
        """Decode ``count`` signed steps from ``middle``, each under the model of the one before.

        The same as :meth:`sint` for each, written out: thousands of levels precede a payload's
        symbols, and calls are what they would cost.
        """
        out = bytearray()
        p, n, data, rate = self.p, self.n, self._data, _RATE
        code, span, pos, end = self._code, self._range, self._pos, len(self._data)
        previous = middle
        for _ in range(count):
            v = previous - middle
            first = models[0 if v < -3 else 7 if v > 4 else v + 3]
            k, node, left, c = 0, 1, -1, first
            # Exponent in unary, then as many bits: left is -1 until the exponent is known.
            while left:
                old, seen = p[c], n[c]
                bound = (span >> 16) * old
                if seen < _SLOWEST:
                    n[c] = seen + 1
                if code < bound:
                    bit = 1
                    span = bound
                    p[c] = old + ((_CEIL - old) * rate[seen] >> 16)
                else:
                    bit = 0
                    code -= bound
                    span -= bound
                    p[c] = old - ((old - _FLOOR) * rate[seen] >> 16)
                while span < _RENORM:
                    if pos >= end:
                        raise MalformedPayload("the adaptive section ends too early")
                    code = (code << 8 | data[pos]) & _LOW
                    pos += 1
                    span <<= 8
                if left < 0:
                    if bit:
                        k += 1
                        if k > _LEADING + 4:
                            raise MalformedPayload("a level is out of range")
                        c += 1
                        continue
                    left = k
                else:
                    node = 2 * node + bit
                    left -= 1
                if k - left >= _LEADING and left:
                    self._code, self._range, self._pos = code, span, pos
                    node = node << left | self.bits(left)
                    code, span, pos = self._code, self._range, self._pos
                    left = 0
                c = first + _UNARY + (min(k, _TOPS) - 1 << _LEADING) + node
            z = node - 1
            previous = middle + (-(z + 1 >> 1) if z & 1 else z >> 1)
            if not 0 <= previous <= most:
                raise MalformedPayload("a level is out of range")
            out.append(previous)
        self._code, self._range, self._pos = code, span, pos
        return bytes(out)
