"""Fields of 0 to 63 bits, packed one after the other (bit 0 of a byte first), in torch."""

from __future__ import annotations

import numpy as np
import torch

from prunecast.compression.codec.errors import MalformedPayload

from .arrays import download, upload
from .integers import shifted_right

__all__ = ["pack", "unpack"]


def pack(values: torch.Tensor, widths: torch.Tensor) -> bytes:
    """Return the ``widths[i]`` low bits of each ``values[i]`` (upper bits must be zero)."""
    if not len(values):
        return b""
    end = torch.cumsum(widths, 0)
    bits = int(end[-1])
    start = end - widths
    word, shift = start >> 6, start & 63
    out = torch.zeros((bits >> 6) + 2, dtype=torch.int64, device=values.device)
    # Fields of one word do not overlap there, so their sum is their union.
    out.index_add_(0, word, torch.bitwise_left_shift(values, shift))
    # Two shifts, because one by 64 would be needed where a field starts with its word.
    over = shifted_right(shifted_right(values, 63 - shift), 1)
    out.index_add_(0, word + 1, over)
    return download(out).astype("<i8").tobytes()[: bits + 7 >> 3]


def unpack(data: bytes, widths: torch.Tensor) -> torch.Tensor:
    """Split ``data`` into fields; MalformedPayload unless it holds exactly that many bits."""
    end = torch.cumsum(widths, 0)
    bits = int(end[-1]) if len(end) else 0
    if bits + 7 >> 3 != len(data):
        raise MalformedPayload(f"{len(data)} bytes of raw bits, but tokens ask for {bits} bits")
    padded = np.frombuffer(data + bytes(-len(data) % 8 + 16), "<i8")
    words = upload(padded, widths.device)
    start = end - widths
    word, shift = start >> 6, start & 63
    low = shifted_right(words.index_select(0, word), shift)
    high = words.index_select(0, word + 1)
    low |= torch.bitwise_left_shift(high, 63 - shift) << 1
    keep = torch.bitwise_left_shift(torch.full_like(widths, -1), widths).bitwise_not_()
    return low & keep
