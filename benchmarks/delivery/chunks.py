"""Content-defined chunks, as casync and Xet store files: what is fetched are the new ones.

A boundary lies where the low bits of a gear hash (Xia et al. 2016, FastCDC, section 3) over the
last 32 bytes are zero.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import zstandard
from numpy.typing import NDArray

__all__ = ["apply", "chunks", "create"]

_WINDOW = 32
_BITS = 14  # 16 KiB on average
_LEAST, _MOST = 1 << 12, 1 << 16
_LEVEL = 19
_DIGEST = 32


def _gears() -> NDArray[np.uint32]:
    return np.random.default_rng(0).integers(0, 2**32, 256, np.uint32)


def chunks(data: bytes) -> list[bytes]:
    """Cut `data` where its content says so; together the chunks are the data."""
    gear = _gears()[np.frombuffer(data, np.uint8)]
    rolled = np.zeros(len(data), np.uint32)
    for shift in range(_WINDOW):
        rolled[shift:] += gear[: len(data) - shift] << np.uint32(shift)
    # the high bits depend on the whole window
    found = np.flatnonzero(rolled >> np.uint32(32 - _BITS) == 0) + 1
    ends: list[int] = []
    begin = 0
    for end in [*found.tolist(), len(data)]:
        while end - begin > _MOST:
            begin += _MOST
            ends.append(begin)
        if end - begin >= _LEAST or (end == len(data) and end > begin):
            begin = end
            ends.append(end)
    return [data[a:b] for a, b in pairwise([0, *ends])]


def create(old: bytes, new: bytes) -> bytes:
    """The list of chunk digests, and the chunks that `old` lacks, each compressed with zstd."""
    held = {hashlib.sha256(chunk).digest() for chunk in chunks(old)}
    coder = zstandard.ZstdCompressor(level=_LEVEL)
    names, fetched = [], []
    for chunk in chunks(new):
        name = hashlib.sha256(chunk).digest()
        names.append(name)
        if name not in held:
            held.add(name)
            packed = coder.compress(chunk)
            fetched.append(len(packed).to_bytes(4, "little") + packed)
    return len(names).to_bytes(4, "little") + b"".join(names) + b"".join(fetched)


def apply(old: bytes, patch: bytes) -> bytes:
    """Inverse of `create`."""
    held = {hashlib.sha256(chunk).digest(): chunk for chunk in chunks(old)}
    count = int.from_bytes(patch[:4], "little")
    at = 4 + count * _DIGEST
    decoder = zstandard.ZstdDecompressor()
    out = []
    for i in range(count):
        name = patch[4 + i * _DIGEST : 4 + (i + 1) * _DIGEST]
        if name not in held:
            size = int.from_bytes(patch[at : at + 4], "little")
            held[name] = decoder.decompress(patch[at + 4 : at + 4 + size])
            at += 4 + size
        out.append(held[name])
    return b"".join(out)
