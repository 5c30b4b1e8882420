"""Rows that repeat an earlier one (the codec's ``modelling.copies``, in torch)."""

from __future__ import annotations

import numpy as np
import torch

from prunecast.compression.codec.context import TensorSpec
from prunecast.compression.codec.errors import MalformedPayload
from prunecast.compression.codec.modelling.copies import (
    copies_may_pay,
    copies_pay,
    hash_factors,
    probe_step,
)

from .arrays import SIGNED, TORCH_DTYPES, elements, upload

__all__ = ["expand_copies", "find_copies"]


def find_copies(
    tensor: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """References (0: the next row kept, k: a copy of the k-th non-zero one) and the rows kept.

    None where copies do not pay.
    """
    rows = elements(tensor, device).reshape(len(tensor), -1)
    unsigned = tensor.dtype not in (torch.bool, *SIGNED.values())
    sample = rows[:, :: probe_step(rows.shape[1])]
    again, _ = _repeated(_hashes(sample, unsigned=unsigned))
    if not copies_may_pay(int((again & sample.any(1)).sum()), len(rows)):
        return None
    used = rows.any(1)
    again, source = _repeated(_hashes(rows, unsigned=unsigned))
    # Hashes only propose.
    copied = again & used & (rows == rows.index_select(0, source)).all(1)
    values = int(torch.count_nonzero(rows[copied]))
    if not copies_pay(int(copied.sum()), len(rows), values):
        return None
    number = torch.cumsum(used & ~copied, 0)
    references = torch.where(copied, number.index_select(0, source), 0).to(torch.int32)
    kept = rows[~copied].view(tensor.dtype)
    return references, kept.reshape(len(kept), *tensor.shape[1:])


def expand_copies(references: torch.Tensor, kept: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Inverse of :func:`find_copies`; MalformedPayload where a reference leads nowhere."""
    rows = elements(kept, kept.device).reshape(len(kept), -1)
    own = references == 0
    if int(own.sum()) != len(rows):
        raise MalformedPayload(f"{int(own.sum())} rows are no copies, but {len(rows)} were kept")
    used = rows.any(1).nonzero().reshape(-1)
    least, most = torch.aminmax(references)
    if int(least) < 0 or int(most) > len(used):
        raise MalformedPayload("a row is a copy of one that does not exist")
    index = torch.cumsum(own, 0) - 1
    if len(used):
        source = used.index_select(0, (references - 1).clamp(min=0))
        index = torch.where(own, index, source)
    flat = rows.index_select(0, index).reshape(-1)
    return flat.view(TORCH_DTYPES[spec.dtype.name]).reshape(spec.shape)


def _hashes(rows: torch.Tensor, *, unsigned: bool) -> torch.Tensor:
    """A 64-bit hash of every row: equal rows have equal hashes."""
    wide = rows.to(torch.int64)
    if unsigned and rows.element_size() < 8:
        wide &= (1 << 8 * rows.element_size()) - 1
    factors = upload(hash_factors(rows.shape[1]).view(np.int64), rows.device)
    return (wide * factors).sum(1)


def _repeated(hashes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether an earlier row has the same hash, and the first row that has it."""
    ordered, index = torch.sort(hashes, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = index[begins].index_select(0, torch.cumsum(begins, 0) - 1)
    again, source = torch.empty_like(begins), torch.empty_like(index)
    again[index] = ~begins
    source[index] = first
    return again, source
