"""Tensors as fields and back (:mod:`prunecast.compression.codec.modelling.fields`, in torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from prunecast.compression.codec.errors import MalformedPayload
from prunecast.compression.codec.modelling.fields import Field, mask_violation

from .arrays import SIGNED, TORCH_DTYPES, elements
from .integers import shifted_right, signed, wrapped, zigzag
from .known import Known

__all__ = ["assemble", "check_width", "from_z", "split_tensor", "to_z"]


def _monotone(bits: torch.Tensor, width: int) -> torch.Tensor:
    """Bit patterns to unsigned integers in the order of the floats; both as signed ones."""
    return torch.where(bits < 0, ~bits, bits ^ -(1 << (width - 1)))


def _unmonotone(image: torch.Tensor, width: int) -> torch.Tensor:
    return torch.where(image < 0, image ^ -(1 << (width - 1)), ~image)


def _aligned(v: torch.Tensor, f: Field, known: Known, *, inverse: bool) -> torch.Tensor:
    """sign(p) * v, with the value that cancels p moved to -1 and those between down by one."""
    assert known.previous is not None
    p = wrapped(known.previous, f.bits)
    size = p.abs()  # of the most negative 64-bit integer: that integer, not above zero
    moves = size > 0
    if f.width < f.bits:
        moves &= size <= 1 << (f.width - 1)
    elif f.bits == 32:
        moves &= size < 1 << 31
    if inverse:
        moves &= (v < 0) & (v >= -size)
        x = torch.where(moves, torch.where(v == -1, -size, v + 1), v)
        return torch.where(p < 0, -x, x)
    x = wrapped(torch.where(p < 0, -v, v), f.width)
    moves &= (x < 0) & (x >= -size)
    return torch.where(moves, torch.where(x == -size, -1, x - 1), x)


def split_tensor(
    tensor: torch.Tensor, fields: Sequence[Field], known: Known
) -> Iterator[torch.Tensor]:
    """Yield each field's values as signed integers (centre 0), int64."""
    first = fields[0]
    flat = elements(tensor, known.device)
    if known.selected is not None:
        kept = flat.index_select(0, known.selected)
        if int(torch.count_nonzero(flat)) != int(torch.count_nonzero(kept)):
            raise mask_violation(first.name)
        flat = kept
    v = flat.to(torch.int64)
    width = 8 * first.spec.dtype.itemsize
    if first.spec.dtype.kind != "f":
        yield _aligned(v, first, known, inverse=False) if first.conditioned else v
        return
    if known.previous is not None:
        yield wrapped(_monotone(v, width) - _monotone(known.previous, width), width)
        return
    # Rotating the sign to the bottom puts the exponent's upper bits into one byte.
    rotated = (v << 1) | ((v >> (width - 1)) & 1)
    for f in fields:
        assert f.plane is not None
        yield wrapped(rotated >> (8 * f.plane), 8)


def assemble(parts: Iterator[torch.Tensor], fields: Sequence[Field], known: Known) -> torch.Tensor:
    """Inverse of :func:`split_tensor`; takes one part at a time."""
    first = fields[0]
    spec, width = first.spec, 8 * first.spec.dtype.itemsize
    if spec.dtype.kind != "f":
        v = next(parts)
        if first.conditioned:
            v = _aligned(v, first, known, inverse=True)
        if spec.dtype.kind == "b" and bool(((v & 0xFF) > 1).any()):
            raise MalformedPayload(f"tensor {first.name!r} is bool but holds other values")
    elif known.previous is not None:
        v = next(parts) + _monotone(known.previous, width)
        v = _unmonotone(wrapped(v, width), width)
    else:
        v = torch.zeros(first.size, dtype=torch.int64, device=known.device)
        for f in fields:
            assert f.plane is not None
            v |= (next(parts) & 0xFF) << (8 * f.plane)
        v = shifted_right(v, 1) | (v << (width - 1))
    flat = v.to(SIGNED[width])
    if known.selected is not None:
        whole = torch.zeros(spec.size, dtype=flat.dtype, device=known.device)
        flat = whole.index_copy_(0, known.selected, flat)
    return flat.view(TORCH_DTYPES[spec.dtype.name]).reshape(spec.shape)


def to_z(v: torch.Tensor, centre: int, f: Field) -> torch.Tensor:
    """Zigzag of ``v - centre`` modulo ``2**width``."""
    return zigzag(wrapped(v - centre, f.width) if centre else v)


def from_z(z: torch.Tensor, centre: int, f: Field) -> torch.Tensor:
    """Inverse of :func:`to_z`; MalformedPayload where a value exceeds the field's width."""
    check_width(z, f)
    v = signed(z)
    return wrapped(v + centre, f.width) if centre else v


def check_width(z: torch.Tensor, f: Field) -> None:
    """MalformedPayload where a value exceeds the field's width."""
    if f.width < 64 and bool((z >> f.width).any()):
        raise MalformedPayload(f"tensor {f.name!r}: a value exceeds {f.width} bits")
