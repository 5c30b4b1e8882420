"""The layout section: what both sides must know about the tensors before decoding values."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from prunecast.compression.codec import TensorSpec
from prunecast.compression.versions.errors import BadPayload, InvalidModel
from prunecast.compression.versions.model import LatticeTensor, Tensor

__all__ = [
    "Coding",
    "TensorHead",
    "UpdateHead",
    "head_of",
    "pack_changes",
    "pack_heads",
    "pack_update_heads",
    "same_kind",
    "unpack_changes",
    "unpack_heads",
    "unpack_update_heads",
]

_DTYPES = (
    *("float32", "float64", "float16", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
_LATTICE, _PRUNED, _OTHER, _MASKED = 1, 2, 4, 8


@dataclass(frozen=True)
class TensorHead:
    """Everything about a published tensor except its values; `step` is None for a raw tensor."""

    spec: TensorSpec
    step: float | None
    pruned: bool


class Coding(IntEnum):
    """How one tensor of an update is coded."""

    UNCHANGED = 0
    QUANTISED = 1
    EXACT = 2


@dataclass(frozen=True)
class UpdateHead:
    """Coding of one tensor of an update; `step` is 0.0 unless quantised."""

    coding: Coding
    step: float


def head_of(tensor: Tensor) -> TensorHead:
    """The head of a published tensor."""
    spec = TensorSpec(np.dtype(tensor.dtype), tensor.shape)
    if isinstance(tensor, LatticeTensor):
        return TensorHead(spec, tensor.step, tensor.pruned)
    return TensorHead(spec, None, False)


class _Reader:
    """Reads little-endian fields and refuses to run past the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        chunk = self._data[self._at : self._at + size]
        if len(chunk) != size:
            raise BadPayload("layout section ends too early")
        self._at += size
        return chunk

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def step(self) -> float:
        value = float(struct.unpack("<f", self.take(4))[0])
        if not (math.isfinite(value) and value > 0):
            raise BadPayload(f"layout section declares a lattice step of {value}")
        return value

    def end(self) -> None:
        if self._at != len(self._data):
            raise BadPayload("layout section has trailing bytes")


def _pack_head(head: TensorHead) -> bytes:
    shape = head.spec.shape
    flags = _LATTICE * (head.step is not None) | _PRUNED * head.pruned
    code = _DTYPES.index(head.spec.dtype.name)
    packed = struct.pack(f"<BBB{len(shape)}Q", code, flags, len(shape), *shape)
    return packed if head.step is None else packed + struct.pack("<f", head.step)


def _unpack_head(reader: _Reader, name: str) -> TensorHead:
    code, flags, ndim = reader.unpack("<BBB")
    if code >= len(_DTYPES) or flags & ~(_LATTICE | _PRUNED) or ndim > 32:
        raise BadPayload(f"tensor {name[:80]!r}: unknown dtype, flags or number of dimensions")
    dtype, shape = np.dtype(_DTYPES[code]), reader.unpack(f"<{ndim}Q")
    lattice = bool(flags & _LATTICE)
    if (lattice and dtype.kind != "f") or (flags & _PRUNED and not lattice):
        raise BadPayload(f"tensor {name[:80]!r}: flags {flags} do not fit dtype {dtype}")
    return TensorHead(
        TensorSpec(dtype, shape), reader.step() if lattice else None, bool(flags & _PRUNED)
    )


def pack_heads(tensors: Mapping[str, Tensor]) -> bytes:
    """Layout of a keyframe: names, dtypes, shapes, steps, pruned flags."""
    out = [struct.pack("<I", len(tensors))]
    for name, tensor in tensors.items():
        encoded = name.encode()
        if len(encoded) > 0xFFFF or len(tensor.shape) > 32:
            raise InvalidModel(f"tensor {name[:80]!r}: name or number of dimensions is too long")
        out.append(struct.pack("<H", len(encoded)) + encoded + _pack_head(head_of(tensor)))
    return b"".join(out)


def unpack_heads(layout: bytes) -> dict[str, TensorHead]:
    """Inverse of `pack_heads`.

    Raises:
        BadPayload: damaged, or a dtype, flag, step or name that the format does not allow.
    """
    reader = _Reader(layout)
    heads: dict[str, TensorHead] = {}
    for _ in range(reader.unpack("<I")[0]):
        raw_name = reader.take(reader.unpack("<H")[0])
        try:
            name = raw_name.decode()
        except UnicodeDecodeError as error:
            raise BadPayload("a tensor name is not UTF-8") from error
        if name in heads:
            raise BadPayload(f"tensor {name[:80]!r} is named twice")
        heads[name] = _unpack_head(reader, name)
    reader.end()
    return heads


def same_kind(new: TensorHead, old: TensorHead) -> bool:
    """Whether a tensor can be coded as a difference to the held one."""
    return new.spec == old.spec and (new.step is None) == (old.step is None)


def pack_changes(
    heads: Sequence[TensorHead],
    base: Sequence[TensorHead],
    back: Sequence[int | None] | None = None,
) -> bytes:
    """Layout of a delta: what changed against the held version; empty when nothing did.

    Args:
        heads: of the new version.
        base: of the held version.
        back: for each tensor that is coded under its mask how many places come back, else None.
    """
    back = back or [None] * len(heads)
    same = all(new == old for new, old in zip(heads, base, strict=True))
    if same and all(count is None for count in back):
        return b""
    flags, changes = bytearray(), b""
    for new, old, count in zip(heads, base, back, strict=True):
        if not same_kind(new, old):
            flags.append(_OTHER)
            changes += _pack_head(new)
            continue
        moved, masked = new.step != old.step, count is not None
        flags.append(_PRUNED * new.pruned | _LATTICE * moved | _MASKED * masked)
        if moved:
            changes += struct.pack("<f", new.step)
        if count is not None:
            changes += struct.pack("<I", count)
    return bytes(flags) + changes


def unpack_changes(
    layout: bytes, base: Mapping[str, TensorHead]
) -> tuple[dict[str, TensorHead], dict[str, int]]:
    """Heads of the new version from the held version's heads and a delta's layout.

    Returns:
        The heads; and for each tensor that is coded under its mask how many places come back.

    Raises:
        BadPayload: damaged, or it changes what a delta cannot change.
    """
    if not layout:
        return dict(base), {}
    reader = _Reader(layout)
    flags = reader.take(len(base))
    heads: dict[str, TensorHead] = {}
    back: dict[str, int] = {}
    for (name, old), flag in zip(base.items(), flags, strict=True):
        if flag == _OTHER:
            heads[name] = _unpack_head(reader, name)
            continue
        if flag & ~(_LATTICE | _PRUNED | _MASKED) or (flag and old.step is None):
            raise BadPayload(f"tensor {name[:80]!r}: a delta cannot make this change")
        step = reader.step() if flag & _LATTICE else old.step
        heads[name] = TensorHead(old.spec, step, bool(flag & _PRUNED))
        if flag & _MASKED:
            back[name] = reader.unpack("<I")[0]
    reader.end()
    return heads, back


def pack_update_heads(heads: Sequence[UpdateHead]) -> bytes:
    """Layout of an update: a coding per tensor, then the steps of the quantised ones."""
    steps = b"".join(struct.pack("<f", h.step) for h in heads if h.coding is Coding.QUANTISED)
    return bytes(h.coding for h in heads) + steps


def unpack_update_heads(layout: bytes, names: Sequence[str]) -> dict[str, UpdateHead]:
    """Inverse of `pack_update_heads` for the tensors of the version the update belongs to.

    Raises:
        BadPayload: damaged or an unknown coding.
    """
    reader = _Reader(layout)
    codes = reader.take(len(names))
    heads: dict[str, UpdateHead] = {}
    for name, code in zip(names, codes, strict=True):
        if code not in (0, 1, 2):
            raise BadPayload(f"tensor {name[:80]!r}: unknown update coding {code}")
        coding = Coding(code)
        heads[name] = UpdateHead(coding, reader.step() if coding is Coding.QUANTISED else 0.0)
    reader.end()
    return heads
