"""Arithmetic on int64 tensors that hold unsigned 64-bit integers."""

from __future__ import annotations

import torch

__all__ = ["exponent", "shifted_right", "signed", "unsigned_max", "wrapped", "zigzag"]

_MIN = -(1 << 63)


def shifted_right(x: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Return ``x >> count`` (0 to 63) of unsigned integers: zeros come in from above.

    >>> shifted_right(torch.tensor([-1, 6]), 1).tolist() == [2**63 - 1, 3]
    True
    """
    if isinstance(count, int):
        return (x >> count) & ~(-2 << 63 - count) if count else x
    # torch's shift drops what leaves the 64 bits, so that a count of 0 keeps all ones.
    keep = torch.bitwise_left_shift(torch.full_like(count, -2), 63 - count).bitwise_not_()
    return (x >> count).bitwise_and_(keep)


def wrapped(v: torch.Tensor, width: int) -> torch.Tensor:
    """Return integers modulo ``2**width`` (8, 16, 32 or 64), read as signed."""
    if width == 64:
        return v
    half = 1 << (width - 1)
    return ((v + half) & ((1 << width) - 1)) - half


def zigzag(v: torch.Tensor) -> torch.Tensor:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return (v << 1) ^ (v >> 63)


def signed(z: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`zigzag`."""
    return shifted_right(z, 1) ^ -(z & 1)


def exponent(x: torch.Tensor) -> torch.Tensor:
    """floor(log2 x) of non-zero unsigned integers.

    >>> exponent(torch.tensor([1, 2**53 - 1, -1])).tolist()
    [0, 52, 63]
    """
    high = shifted_right(x, 32)
    # 32 bits at a time: float64 holds these exactly, and its own exponent is the answer.
    part = torch.where(high > 0, high, x).to(torch.float64)
    found = (part.view(torch.int64) >> 52) - 1023
    return torch.where(high > 0, found + 32, found)


def unsigned_max(x: torch.Tensor) -> int:
    """Largest of some unsigned integers."""
    return int((x.to(torch.int64) ^ _MIN).max()) + (1 << 63)
