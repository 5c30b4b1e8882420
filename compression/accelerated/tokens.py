"""Integers to tokens and raw bits (:mod:`prunecast.compression.codec.entropy.tokens`, in torch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.entropy.tokens import TokenScheme
from prunecast.compression.codec.errors import MalformedPayload

from .arrays import upload
from .integers import exponent, shifted_right
from .rawbits import unpack

__all__ = ["join", "split", "tokens_of"]

_INVALID = 255


def split(z: torch.Tensor, scheme: TokenScheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, uint8; and of those with raw bits, in order: the bits and their number."""
    limit = 1 << scheme.direct
    # Integers of 2**63 and more read as negative.
    at = ((z >= limit) | (z < 0)).nonzero().reshape(-1)
    tokens = z.to(torch.uint8)
    big = z.index_select(0, at)
    top = exponent(big)
    width = top - scheme.mantissa
    lead = shifted_right(big, width) & ((1 << scheme.mantissa) - 1)
    token = limit + ((top - scheme.direct) << scheme.mantissa) + lead
    tokens.index_copy_(0, at, token.to(torch.uint8))
    keep = torch.bitwise_left_shift(torch.full_like(width, -1), width).bitwise_not_()
    return tokens, big & keep, width


def tokens_of(z: torch.Tensor, scheme: TokenScheme) -> torch.Tensor:
    """Return the tokens alone, uint8."""
    return split(z.to(torch.int64), scheme)[0]


def join(
    tokens: Sequence[torch.Tensor], schemes: Sequence[TokenScheme], bits: Sequence[int], raw: bytes
) -> list[torch.Tensor]:
    """Inverse of :func:`split` for several runs of tokens whose raw bits follow each other.

    ``bits`` (32 or 64) is the width of each run's integers.

    Raises:
        MalformedPayload: a token stands for more than that, or the raw bits are more or fewer.
    """
    values, widths = [], []
    for run, scheme, most in zip(tokens, schemes, bits, strict=True):
        base, raw_bits = (upload(entries, run.device) for entries in _entries(scheme, most))
        index = run.to(torch.int32)
        values.append(base.index_select(0, index))
        widths.append(raw_bits.index_select(0, index))
    z, w = torch.cat(values), torch.cat(widths)
    at = w.nonzero().reshape(-1)
    width = w.index_select(0, at).to(torch.int64)
    if bool((width == _INVALID).any()):
        raise MalformedPayload("a token stands for a value of too many bits")
    low = unpack(raw, width)
    z.index_copy_(0, at, z.index_select(0, at) | low)
    return list(torch.split(z, [len(run) for run in tokens]))


def _entries(scheme: TokenScheme, bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """For each token its value without raw bits, int64, and their number, uint8."""
    width = scheme.widths()
    token = np.arange(256)
    far = token >= 1 << scheme.direct
    width[far & (width.astype(np.int64) + scheme.mantissa >= bits)] = _INVALID
    lead = token - (1 << scheme.direct) & (1 << scheme.mantissa) - 1 | 1 << scheme.mantissa
    shift = np.where(width == _INVALID, 0, width).astype(np.uint64)
    value = lead.astype(np.uint64) << shift
    return np.where(far, value.view(np.int64), token), width
