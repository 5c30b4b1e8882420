"""The simplest patches of files whose tensors keep their places: subtract, and compress.

What a few lines around xz give, so that a comparison says what a codec adds to knowing where the
tensors lie and which weights were pruned.
"""

from __future__ import annotations

import lzma

import numpy as np
from numpy.typing import NDArray

__all__ = ["apply", "apply_masked", "create", "create_masked"]

_PRESET = 9 | lzma.PRESET_EXTREME


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def create(old: bytes, new: bytes) -> bytes:
    """Differences modulo 256; both files of one length."""
    return lzma.compress((_bytes(new) - _bytes(old)).tobytes(), preset=_PRESET)


def apply(old: bytes, patch: bytes) -> bytes:
    """Inverse of `create`."""
    return (_bytes(old) + _bytes(lzma.decompress(patch))).tobytes()


def create_masked(old: bytes, new: bytes) -> bytes:
    """Differences where `old` is not zero, then those where it is; each compressed by itself."""
    held = _bytes(old)
    change = _bytes(new) - held
    kept = held != 0
    first, second = (lzma.compress(change[at].tobytes(), preset=_PRESET) for at in (kept, ~kept))
    return len(first).to_bytes(4, "little") + first + second


def apply_masked(old: bytes, patch: bytes) -> bytes:
    """Inverse of `create_masked`."""
    size = int.from_bytes(patch[:4], "little")
    out = _bytes(old).copy()
    kept = out != 0
    for at, part in ((kept, patch[4 : 4 + size]), (~kept, patch[4 + size :])):
        out[at] += _bytes(lzma.decompress(part))
    return out.tobytes()
