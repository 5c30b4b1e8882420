"""Packs: tensors as one byte string, through a coder of the standard library.

The codec's own coding knows about magnitudes of rows and columns, and nothing of strings that
repeat. Where those count, zlib, bz2 and lzma are better, and the encoder may choose them.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import TensorSpec
from ..errors import MalformedPayload

__all__ = ["CODERS", "Pack", "member_of", "pack", "shuffled", "unpack"]

_LEAST_WINDOW, _MOST_WINDOW = 1 << 12, 1 << 26


@dataclass
class Pack:
    """What the head says of a pack.

    Attributes:
        coder: index into `CODERS`.
        shuffled: whether the bytes of each tensor are sorted by their place in the element.
        nbytes: length in the payload.
        members: names of the tensors, in order.
    """

    coder: int
    shuffled: bool
    nbytes: int = 0
    members: list[str] = field(default_factory=list)


def _filters(size: int) -> list[dict[str, Any]]:
    """Raw LZMA2 with a window that the unpacked size decides."""
    window = min(max(1 << (size - 1).bit_length(), _LEAST_WINDOW), _MOST_WINDOW)
    preset = 9 | lzma.PRESET_EXTREME
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}]


def _deflate(data: bytes) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return squeeze.compress(data) + squeeze.flush()


def _inflate(data: bytes, size: int) -> bytes:
    expand = zlib.decompressobj(-15)
    found = expand.decompress(data, size + 1)
    if not expand.eof or expand.unused_data or expand.unconsumed_tail:
        raise ValueError("the stream has no end, or not there")
    return found


def _unlzma(data: bytes, size: int) -> bytes:
    # Without a check of its own: the payload has one.
    expand = lzma.LZMADecompressor(lzma.FORMAT_RAW, None, _filters(size))
    return _ended(expand, expand.decompress(data, size + 1))


def _unbz2(data: bytes, size: int) -> bytes:
    expand = bz2.BZ2Decompressor()
    return _ended(expand, expand.decompress(data, size + 1))


def _ended(expand: Any, found: bytes) -> bytes:
    if not expand.eof or expand.unused_data:
        raise ValueError("the stream has no end, or not there")
    return found


Coder = tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]
CODERS: tuple[Coder, ...] = (
    (_deflate, _inflate),
    (bz2.compress, _unbz2),
    (lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=_filters(len(data))), _unlzma),
)
"""For each coder: compress, and decompress to at most so many bytes."""


def shuffled(array: NDArray[Any]) -> bytes:
    """Bytes of an array, little-endian: all lowest bytes, then all next ones."""
    return _bytes_of(array).reshape(-1, array.itemsize).T.tobytes()


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8)


def pack(arrays: Sequence[NDArray[Any]], coder: int, *, shuffle: bool) -> bytes:
    """Return the bytes of a pack."""
    parts = [shuffled(a) if shuffle else _bytes_of(a).tobytes() for a in arrays]
    return CODERS[coder][0](b"".join(parts))


def unpack(data: bytes, coder: int, size: int) -> bytes:
    """Return what a pack holds; at most ``size`` bytes and one more are unpacked.

    Raises:
        MalformedPayload: the bytes are damaged, or do not hold exactly so many.
    """
    try:
        found = CODERS[coder][1](data, size)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise MalformedPayload(f"a pack is damaged: {error}") from error
    if len(found) != size:
        raise MalformedPayload(f"a pack does not hold the {size} bytes of its tensors")
    return found


def member_of(
    unpacked: bytes, shuffle: bool, specs: Sequence[TensorSpec], number: int
) -> NDArray[Any]:
    """Return one of the tensors of a pack.

    Raises:
        MalformedPayload: it is bool but holds other values.
    """
    spec, at = specs[number], sum(s.nbytes for s in specs[:number])
    part = np.frombuffer(unpacked, np.uint8, spec.nbytes, at)
    if spec.dtype.kind == "b" and (part > 1).any():
        raise MalformedPayload("a packed tensor is bool but holds other values")
    if shuffle:
        part = np.ascontiguousarray(part.reshape(spec.dtype.itemsize, -1).T).reshape(-1)
    little = part.view(spec.dtype.newbyteorder("<"))
    return little.astype(spec.dtype).reshape(spec.shape)  # a copy, which may be written to
