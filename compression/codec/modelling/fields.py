"""Tensors as *fields*: flat integer arrays, the only thing that the coder knows.

An integer tensor is one field, a float tensor with a previous value is one field (the difference
of monotone integer images, less the bits that are zero in all of its elements), any other float
tensor is one field for each byte of its element.
Field values are integers modulo ``2**width``, read as signed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..context import Context, TensorSpec, spec_of
from ..entropy.tokens import signed, zigzag
from ..errors import MalformedPayload, MaskViolation, TensorMismatch

__all__ = [
    "CHUNK",
    "PREVIOUS_CLASSES",
    "Field",
    "assemble",
    "fields_of",
    "from_z",
    "integers_at",
    "look_up",
    "split_tensor",
    "to_z",
]

CHUNK = 1 << 16
"""Elements that a pass handles at a time."""
PREVIOUS_CLASSES = 16
_T = TypeVar("_T")


@cache
def _log_thresholds() -> NDArray[np.int64]:
    """Smallest k with round(2 log2 k) >= j, for j = 0, 1, ...: k**4 >= 2**(2j - 1)."""
    out = []
    for j in range(69):
        target = 1 << max(2 * j - 1, 0)
        k = math.isqrt(math.isqrt(target))
        out.append(k if k**4 >= target else k + 1)
    return np.array(out, np.int64)


def half_octaves(k: NDArray[Any]) -> NDArray[np.uint8]:
    """0 for 0, else 1 + round(2 log2 k), of integers in [0, 2**33]."""
    if len(k) and int(k.max()) < 1024:
        table = np.searchsorted(_log_thresholds(), np.arange(1024), side="right").astype(np.uint8)
        return np.asarray(table.take(k))
    return np.searchsorted(_log_thresholds(), k, side="right").astype(np.uint8)


@dataclass(frozen=True)
class Field:
    """One flat integer array of the payload, without its values."""

    name: str
    spec: TensorSpec
    plane: int | None
    """Byte of the element (0: lowest) for planes, else None."""
    mask: NDArray[np.bool_] | None
    previous: NDArray[Any] | None
    lasting: bool = False
    """Whether several payloads use it: what is derived from the previous value is then kept."""
    zeros: int = 0
    """Of floats with a previous value: lowest bits that are zero in every element, not coded."""

    @property
    def width(self) -> int:
        """Bits of one value: 8, 16, 32 or 64."""
        return 8 if self.plane is not None else 8 * self.spec.dtype.itemsize

    @property
    def bits(self) -> int:
        """Width of the integers it is handled in: 32 or 64."""
        return 64 if self.width == 64 else 32

    @property
    def rows(self) -> int:
        """First dimension (1 for scalars and vectors)."""
        return self.spec.shape[0] if len(self.spec.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Product of the other dimensions."""
        return math.prod(self.spec.shape[1:] if len(self.spec.shape) > 1 else self.spec.shape)

    @cached_property
    def size(self) -> int:
        """Number of coded positions: those under the mask, or all."""
        return self.spec.size if self.mask is None else int(np.count_nonzero(self.mask))

    @cached_property
    def selected(self) -> NDArray[np.int64] | None:
        """Flat indices under the mask; None without a mask."""
        return None if self.mask is None else np.flatnonzero(self.mask)

    @property
    def conditioned(self) -> bool:
        """Whether integers of a previous tensor give classes and signs."""
        return self.previous is not None and self.spec.dtype.kind != "f"

    def previous_values(self) -> NDArray[Any]:
        """Previous integers at the coded positions, as signed of the field's width."""
        return self._derived(self._previous_values)

    def previous_classes(self) -> NDArray[np.uint8]:
        """Class of |p| at every coded position: |p| up to 11, then 12, 16, 23, 32 and more."""
        return self._derived(self._previous_classes)

    def places(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Row and column of every position under the mask."""
        return self._derived(self._places)

    def _derived(self, make: Callable[[], _T]) -> _T:
        if not self.lasting:
            return make()
        if make.__name__ not in self._made:
            self._made[make.__name__] = make()
        found: _T = self._made[make.__name__]
        return found

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    def _previous_values(self) -> NDArray[Any]:
        assert self.previous is not None
        flat = self.previous.reshape(-1)
        if self.mask is not None:
            flat = flat[self.selected]
        return flat.view(f"i{flat.dtype.itemsize}")

    def _previous_classes(self) -> NDArray[np.uint8]:
        values = self.previous_values()
        top = 32
        out = np.empty(len(values), np.uint8)
        for s in range(0, len(values), CHUNK):  # in chunks, to bound temporary arrays
            p = values[s : s + CHUNK]
            if p.dtype.itemsize > 1:
                p = np.clip(p, -top, top)
            k = np.abs(p.astype(np.int16, copy=False))
            _class_of_magnitude().take(np.minimum(k, top), out=out[s : s + CHUNK], mode="clip")
        return out

    def _places(self) -> tuple[NDArray[Any], NDArray[Any]]:
        assert self.selected is not None
        row = np.empty(self.size, np.min_scalar_type(self.rows))
        column = np.empty(self.size, np.min_scalar_type(self.columns))
        for s in range(0, self.size, CHUNK):  # in chunks, to bound temporary arrays
            part = slice(s, s + CHUNK)
            row[part], column[part] = np.divmod(self.selected[part], max(self.columns, 1))
        return row, column


@cache
def _class_of_magnitude() -> NDArray[np.uint8]:
    """Class of each |p| from 0 to 32, which stands for all above."""
    bounds = [*range(1, 13), 16, 23, 32]
    return np.searchsorted(bounds, np.arange(33), side="right").astype(np.uint8)


def fields_of(specs: Mapping[str, TensorSpec], context: Context) -> dict[str, list[Field]]:
    """Return every tensor's fields; TensorMismatch where the context does not fit."""
    result: dict[str, list[Field]] = {}
    for name, spec in specs.items():
        mask = context.mask.get(name) if context.mask is not None else None
        previous = context.previous.get(name) if context.previous is not None else None
        if mask is not None:
            mask = np.asarray(mask)
            if mask.dtype != np.bool_:
                raise TensorMismatch(f"the mask of {name!r} has dtype {mask.dtype}, not bool")
            if mask.shape != spec.shape:
                raise TensorMismatch(
                    f"tensor {name!r} has shape {spec.shape}, its mask {mask.shape}"
                )
        if previous is not None:
            previous = np.asarray(previous)
            previous = previous.astype(spec_of(name, previous).dtype, order="C", copy=False)
            if previous.shape != spec.shape:
                raise TensorMismatch(
                    f"tensor {name!r} has shape {spec.shape}, its previous value {previous.shape}"
                )
            if (previous.dtype.kind == "f") != (spec.dtype.kind == "f") or (
                spec.dtype.kind == "f" and previous.dtype != spec.dtype
            ):
                raise TensorMismatch(
                    f"tensor {name!r} has dtype {spec.dtype}, its previous value {previous.dtype}; "
                    "give integers for integers, and the same dtype for floats"
                )
        planes: Sequence[int | None] = [None]
        if spec.dtype.kind == "f" and previous is None:
            planes = range(spec.dtype.itemsize)
        kept = context.derived
        made: list[Field] | None = None if kept is None else kept.get(name)
        if not made or made[0].spec != spec or not _same(made[0], mask, previous):
            made = [Field(name, spec, plane, mask, previous, kept is not None) for plane in planes]
            if kept is not None:
                kept[name] = made
        result[name] = made
    return result


def _same(f: Field, mask: NDArray[np.bool_] | None, previous: NDArray[Any] | None) -> bool:
    return f.mask is mask and f.previous is previous


def _unsigned(flat: NDArray[Any]) -> NDArray[Any]:
    return flat.view(f"u{flat.dtype.itemsize}")


def _monotone(bits: NDArray[Any]) -> NDArray[Any]:
    """Bit patterns to unsigned integers in the order of the floats."""
    width = 8 * bits.dtype.itemsize
    sign = bits >> (width - 1)
    flip = np.where(sign == 1, ~bits.dtype.type(0), bits.dtype.type(1 << (width - 1)))
    return np.asarray(bits ^ flip.astype(bits.dtype))


def _unmonotone(image: NDArray[Any]) -> NDArray[Any]:
    width = 8 * image.dtype.itemsize
    high = image >> (width - 1)
    flip = np.where(high == 1, image.dtype.type(1 << (width - 1)), ~image.dtype.type(0))
    return np.asarray(image ^ flip.astype(image.dtype))


def _with_zeros(image: NDArray[Any], field: Field) -> NDArray[Any]:
    """Images that lack their lowest bits, with those that zero bits of the floats have."""
    kept = field.width - field.zeros
    if len(image) and int(image.max()) >> kept:
        raise MalformedPayload(f"tensor {field.name!r}: a value exceeds {kept} bits")
    one = image.dtype.type(1)
    low = np.where(image >> (kept - 1), image.dtype.type(0), (one << field.zeros) - one)
    return np.asarray((image << field.zeros) | low)


def _wrap(values: NDArray[Any], field: Field) -> NDArray[Any]:
    """Unsigned integers of the field's width, read as signed in its handling width."""
    return values.view(f"i{field.width // 8}").astype(
        np.int32 if field.bits == 32 else np.int64, copy=False
    )


def _aligned(v: NDArray[Any], field: Field) -> NDArray[Any]:
    """sign(p) * v, with the value that cancels p moved to -1 and those between down by one.

    Zeros stay zeros, so only the non-zeros are touched.
    """
    at = np.flatnonzero(v)
    if not len(at):
        return v
    p = field.previous_values()[at].astype(v.dtype)
    x = np.where(p < 0, -v[at], v[at])
    if field.width < field.bits:
        x = x.astype(f"i{field.width // 8}").astype(v.dtype)
    magnitude = np.abs(p)
    moved = np.where(x == -magnitude, -1, x - 1)
    v = v.copy()
    v[at] = np.where(_moves(x, magnitude, field), moved, x)
    return v


def _restored(x: NDArray[Any], at: NDArray[Any], field: Field) -> NDArray[Any]:
    """Inverse of :func:`_aligned`: of the non-zeros ``x`` at the coded positions ``at``."""
    p = field.previous_values()[at].astype(x.dtype)
    magnitude = np.abs(p)
    moved = np.where(x == -1, -magnitude, x + 1)
    x = np.where(_moves(x, magnitude, field), moved, x)
    return np.where(p < 0, -x, x)


def _moves(x: NDArray[Any], magnitude: NDArray[Any], field: Field) -> NDArray[np.bool_]:
    """Where x lies between zero and the value that cancels p, that one included."""
    # |p| beyond the width cannot be cancelled (abs of the most negative integer is negative).
    moves = magnitude > 0
    if field.width < field.bits:
        moves &= magnitude <= 1 << (field.width - 1)
    return np.asarray(moves & (x < 0) & (x >= -magnitude))


def split_tensor(array: NDArray[Any], fields: Sequence[Field]) -> Iterator[NDArray[Any]]:
    """Yield each field's values as signed integers of its handling width (centre 0)."""
    first = fields[0]
    flat = _unsigned(np.ascontiguousarray(array).reshape(-1))
    if first.mask is not None:
        if flat[~first.mask.reshape(-1)].any():
            raise _mask_violation(first.name)
        flat = flat[first.selected]
    if first.spec.dtype.kind != "f":
        v = _wrap(flat, first)
        yield _aligned(v, first) if first.conditioned else v
        return
    if first.previous is not None:
        p = _unsigned(first.previous.reshape(-1))
        if first.mask is not None:
            p = p[first.selected]
        change = np.empty_like(flat)
        for s in range(0, len(flat), CHUNK):  # in chunks, to bound temporary arrays
            part = slice(s, s + CHUNK)
            new, old = _monotone(flat[part]), _monotone(p[part])
            np.subtract(new >> first.zeros, old >> first.zeros, out=change[part])
        yield _wrap(change, first)
        return
    # Rotating the sign to the bottom puts the exponent's upper bits into one byte.
    top = first.spec.dtype.itemsize * 8 - 1
    rotated = (flat << 1) | (flat >> top)
    for field in fields:
        assert field.plane is not None
        yield _wrap((rotated >> (8 * field.plane)).astype(np.uint8), field)


def _mask_violation(name: str) -> MaskViolation:
    """Return the error for a tensor that is non-zero off its mask."""
    return MaskViolation(
        f"tensor {name!r} is non-zero where its mask is False; multiply it by the mask, or leave "
        "the mask out of the context"
    )


def assemble(parts: Iterator[NDArray[Any]], fields: Sequence[Field]) -> NDArray[Any]:
    """Inverse of :func:`split_tensor`; takes one part at a time."""
    first = fields[0]
    spec = first.spec
    unsigned = np.dtype(f"u{spec.dtype.itemsize}")
    if spec.dtype.kind != "f":
        v = next(parts)
        if first.conditioned:
            at = np.flatnonzero(v)
            v = v.copy()
            v[at] = _restored(v[at], at, first)
        flat = v.view(unsigned) if v.itemsize == unsigned.itemsize else v.astype(unsigned)
        if spec.dtype.kind == "b" and (flat > 1).any():
            raise MalformedPayload(f"tensor {first.name!r} is bool but holds other values")
    elif first.previous is not None:
        p = _unsigned(first.previous.reshape(-1))
        if first.mask is not None:
            p = p[first.selected]
        flat = next(parts).astype(unsigned)
        for s in range(0, len(flat), CHUNK):  # in chunks, to bound temporary arrays
            part = slice(s, s + CHUNK)
            image = (_monotone(p[part]) >> first.zeros) + flat[part]
            flat[part] = _unmonotone(_with_zeros(image, first) if first.zeros else image)
    else:
        flat = np.zeros(first.size, unsigned)
        for field in fields:
            assert field.plane is not None
            flat |= next(parts).astype(np.uint8).astype(unsigned) << (8 * field.plane)
        flat = (flat >> 1) | (flat << (8 * spec.dtype.itemsize - 1))
    if first.mask is not None:
        whole = np.zeros(spec.size, unsigned)
        whole[first.selected] = flat
        flat = whole
    return flat.view(spec.dtype).reshape(spec.shape)


def integers_at(v: NDArray[Any], at: NDArray[Any], field: Field) -> NDArray[Any]:
    """What :func:`assemble` has at some coded positions of an integer tensor.

    Args:
        v: values of its field at these positions, none of them zero.
        at: the positions.
        field: the tensor's only field.
    """
    if field.conditioned:
        v = _restored(v, at, field)
    return v.astype(f"u{field.width // 8}").view(field.spec.dtype)


def to_z(v: NDArray[Any], centre: int, field: Field) -> NDArray[Any]:
    """Zigzag of ``v - centre`` modulo ``2**width``."""
    if centre:
        shift = v.dtype.type(centre)
        v = (v - shift).astype(f"i{field.width // 8}").astype(v.dtype)
    return zigzag(v)


def from_z(z: NDArray[Any], centre: int, field: Field) -> NDArray[Any]:
    """Inverse of :func:`to_z`; MalformedPayload where a value exceeds the field's width."""
    check_width(z, field)
    if field.bits == 32:
        z = z.astype(np.uint32, copy=False)
    v = signed(z)
    if centre:
        v = (v + v.dtype.type(centre)).astype(f"i{field.width // 8}").astype(v.dtype)
    return v


def check_width(z: NDArray[Any], field: Field) -> None:
    """MalformedPayload where a value exceeds the field's width."""
    if field.width < 8 * z.dtype.itemsize and len(z) and int(z.max()) >> field.width:
        raise MalformedPayload(f"tensor {field.name!r}: a value exceeds {field.width} bits")


def look_up(table: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    """Return ``table[index]``, every index in range, without widening them to 64 bits at once."""
    out = np.empty(len(index), table.dtype)
    for s in range(0, len(index), CHUNK):
        table.take(index[s : s + CHUNK], out=out[s : s + CHUNK], mode="clip")
    return out
