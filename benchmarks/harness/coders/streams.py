"""Arrays joined to few streams, for coders that know nothing of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..cases import Case, from_arrays, sizes, to_arrays
from .coder import Array, Bound, NotApplicable

__all__ = ["StreamCoder", "narrow"]

_ITEMS = (1, 2, 4)


@dataclass(frozen=True)
class StreamCoder:
    """Packs every array, narrowed, by itself; or joins those of one type. The smaller is measured.

    Joining spares small tensors a header each and costs the receiver nothing, as it knows all
    shapes; separate arrays suit coders that adapt to a distribution. Which of the two, the type
    of each array (two bits) and the length of each stream are counted.

    Attributes:
        pack: one non-empty array to bytes.
        unpack: bytes, dtype and number of elements back to that array.
        integers_only: whether float32 arrays make no sense.
        floats_only: whether integer arrays make no sense.
    """

    name: str
    settings: str
    pack: Callable[[Array], bytes]
    unpack: Callable[[bytes, np.dtype[np.generic], int], Array]
    integers_only: bool = False
    floats_only: bool = False

    def bind(self, case: Case) -> Bound:
        """See :class:`Coder`."""
        lossless = case.kind.startswith("float")
        if (self.integers_only and lossless) or (self.floats_only and not lossless):
            raise NotApplicable
        arrays = to_arrays(case)
        kind = "f" if any(a.dtype.kind == "f" for a in arrays) else "i"
        joined = min((True, False), key=lambda way: len(self._encode(arrays, way)))
        return Bound(
            lambda: self._encode(to_arrays(case), joined),
            lambda data: from_arrays(case, self._decode(data, sizes(case), kind)),
        )

    def _encode(self, arrays: Sequence[Array], joined: bool) -> bytes:
        streams = [narrow(a) for a in arrays]
        out = [bytes([joined]), _pack_items([a.itemsize for a in streams])]
        if joined:
            same = [[a for a in streams if a.itemsize == item] for item in _ITEMS]
            streams = [np.concatenate(some) for some in same if some]
        for stream in streams:
            packed = self.pack(stream)
            out += [_varint(len(packed)), packed]
        return b"".join(out)

    def _decode(self, data: bytes, counts: Sequence[int], kind: str) -> list[Array]:
        items, at = _unpack_items(data, len(counts))
        lengths, order = list(counts), list(range(len(counts)))
        types = items
        if data[0]:
            order = sorted(order, key=lambda i: items[i])  # stable: arrays of one type, in order
            types = [item for item in _ITEMS if item in items]
            lengths = [
                sum(n for n, i in zip(counts, items, strict=True) if i == item) for item in types
            ]
        streams = []
        for length, item in zip(lengths, types, strict=True):
            size, at = _read_varint(data, at)
            streams.append(self.unpack(data[at : at + size], np.dtype(f"{kind}{item}"), length))
            at += size
        if data[0]:
            streams = [
                part
                for item, stream in zip(types, streams, strict=True)
                for part in np.split(
                    stream, np.cumsum([counts[i] for i in order if items[i] == item])[:-1]
                )
            ]
        out: list[Array] = [np.zeros(0)] * len(counts)
        for i, stream in zip(order, streams, strict=True):
            out[i] = stream.astype(np.float32 if kind == "f" else np.int32)
        return out


def narrow(q: Array) -> Array:
    """Integers in the narrowest of int8, int16, int32; floats as they are.

    >>> narrow(np.array([-128, 127])).dtype
    dtype('int8')
    """
    if q.dtype.kind == "f":
        return q
    low, high = int(q.min(initial=0)), int(q.max(initial=0))
    for dtype in (np.int8, np.int16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return q.astype(dtype)
    return q.astype(np.int32)


def _pack_items(items: Sequence[int]) -> bytes:
    codes = np.array(items, np.uint8) >> 1  # 1, 2, 4 become 0, 1, 2
    return np.packbits(np.stack([codes >> 1, codes & 1], 1)).tobytes()


def _unpack_items(data: bytes, count: int) -> tuple[list[int], int]:
    end = 1 + (2 * count + 7) // 8
    bits = np.unpackbits(np.frombuffer(data[1:end], np.uint8), count=2 * count).reshape(-1, 2)
    return [1 << int(2 * high + low) for high, low in bits], end


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
