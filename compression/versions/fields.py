"""Fields of small records: numbers in as many bytes as they need, the rest after its length."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping

from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.frame import SHORT_DIGEST

__all__ = ["FieldReader", "FieldWriter"]


class FieldWriter:
    """Writes fields one after the other.

    Attributes:
        data: what was written.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)

    def raw(self, data: bytes) -> None:
        """Bytes whose number the reader knows."""
        self.data += data

    def number(self, value: int) -> None:
        """An integer of 0 or above: base 128, lowest bits first."""
        while value >= 0x80:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def part(self, data: bytes) -> None:
        """Bytes after their number."""
        self.number(len(data))
        self.data += data

    def text(self, value: str) -> None:
        """As UTF-8."""
        self.part(value.encode())

    def float64(self, value: float) -> None:
        """Little-endian."""
        self.raw(struct.pack("<d", value))

    def real(self, value: float) -> None:
        """In thousandths where that is exact, as knobs are; finite, 0 or above."""
        thousandths = round(min(value, 1 << 40) * 1000)
        if thousandths / 1000 == value and thousandths < 1 << 40:
            self.number(thousandths << 1)
        else:
            self.number(1)
            self.float64(value)

    def texts(self, values: Collection[str]) -> None:
        """Texts after their number."""
        self.number(len(values))
        for value in values:
            self.text(value)

    def digests(self, values: Mapping[str, bytes]) -> None:
        """Keys and short digests after their number."""
        self.number(len(values))
        for key, digest in values.items():
            self.text(key)
            self.raw(digest)


class FieldReader:
    """Reads what `FieldWriter` wrote; makes nothing of nothing, and refuses what ends too early.

    Args:
        data: what was written.
        refusal: makes the error of what is wrong.
    """

    def __init__(self, data: bytes, refusal: Callable[[str], BadPayload]) -> None:
        self._data, self._at, self._refusal = data, 0, refusal

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._data) - self._at

    def raw(self, size: int) -> bytes:
        """So many bytes."""
        if size > self.left:
            raise self._refusal("it ends too early")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self) -> int:
        """An integer of 64 bits at most."""
        value = shift = 0
        while True:
            (byte,) = self.raw(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                break
        if value >> 64 or shift > 63:
            raise self._refusal("an integer has more than 64 bits")
        return value

    def count(self) -> int:
        """Number of things that take a byte or more each."""
        value = self.number()
        if value > self.left:
            raise self._refusal("it ends too early")
        return value

    def part(self) -> bytes:
        """Bytes after their number."""
        return self.raw(self.count())

    def text(self) -> str:
        """From UTF-8."""
        try:
            return self.part().decode()
        except UnicodeDecodeError:
            raise self._refusal("a name is no text") from None

    def float64(self) -> float:
        """Little-endian."""
        return float(struct.unpack("<d", self.raw(8))[0])

    def real(self) -> float:
        """See `FieldWriter.real`."""
        value = self.number()
        return self.float64() if value & 1 else (value >> 1) / 1000

    def texts(self) -> tuple[str, ...]:
        """Texts after their number."""
        return tuple(self.text() for _ in range(self.count()))

    def digests(self) -> dict[str, bytes]:
        """Keys and short digests after their number."""
        return {self.text(): self.raw(SHORT_DIGEST) for _ in range(self.count())}

    def end(self) -> None:
        """Refuse what was not read."""
        if self.left:
            raise self._refusal("it goes on")
