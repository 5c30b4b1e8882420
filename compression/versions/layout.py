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
    "pack_changes",
    "pack_heads",
    "pack_update_heads",
    "unpack_changes",
    "unpack_heads",
    "unpack_update_heads",
]

_DTYPES = (
    *("float32", "float64", "float16", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
_LATTICE, _PRUNED = 1, 2


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
    lattice = isinstance(tensor, LatticeTensor)
    spec = TensorSpec(np.dtype(tensor.dtype), tensor.shape)
    return TensorHead(
        spec,
        tensor.step if isinstance(tensor, LatticeTensor) else None,
        lattice and isinstance(tensor, LatticeTensor) and tensor.pruned,
    )


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


def pack_heads(tensors: Mapping[str, Tensor]) -> bytes:
    """Layout of a keyframe: names, dtypes, shapes, steps, pruned flags."""
    out = [struct.pack("<I", len(tensors))]
    for name, tensor in tensors.items():
        head, encoded = head_of(tensor), name.encode()
        if len(encoded) > 0xFFFF or len(tensor.shape) > 32:
            raise InvalidModel(f"tensor {name[:80]!r}: name or number of dimensions is too long")
        flags = _LATTICE * (head.step is not None) | _PRUNED * head.pruned
        code = _DTYPES.index(head.spec.dtype.name)
        out.append(struct.pack("<H", len(encoded)) + encoded)
        out.append(
            struct.pack(f"<BBB{len(tensor.shape)}Q", code, flags, len(tensor.shape), *tensor.shape)
        )
        if head.step is not None:
            out.append(struct.pack("<f", head.step))
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
        code, flags, ndim = reader.unpack("<BBB")
        if code >= len(_DTYPES) or flags & ~(_LATTICE | _PRUNED) or ndim > 32 or name in heads:
            raise BadPayload(f"tensor {name[:80]!r}: unknown dtype or flags, or named twice")
        dtype, shape = np.dtype(_DTYPES[code]), reader.unpack(f"<{ndim}Q")
        lattice = bool(flags & _LATTICE)
        if (lattice and dtype.kind != "f") or (flags & _PRUNED and not lattice):
            raise BadPayload(f"tensor {name[:80]!r}: flags {flags} do not fit dtype {dtype}")
        step = reader.step() if lattice else None
        heads[name] = TensorHead(TensorSpec(dtype, shape), step, bool(flags & _PRUNED))
    reader.end()
    return heads


def pack_changes(heads: Sequence[TensorHead], base: Sequence[TensorHead]) -> bytes:
    """Layout of a delta: what changed against the held version; empty when nothing did."""
    flags, steps = bytearray(), b""
    for new, old in zip(heads, base, strict=True):
        changed = new.step != old.step
        flags.append(_PRUNED * new.pruned | _LATTICE * changed)
        if changed:
            steps += struct.pack("<f", new.step)
    if not steps and all(f == _PRUNED * b.pruned for f, b in zip(flags, base, strict=True)):
        return b""
    return bytes(flags) + steps


def unpack_changes(layout: bytes, base: Mapping[str, TensorHead]) -> dict[str, TensorHead]:
    """Heads of the new version from the held version's heads and a delta's layout.

    Raises:
        BadPayload: damaged, or it changes what a delta cannot change.
    """
    if not layout:
        return dict(base)
    reader = _Reader(layout)
    flags = reader.take(len(base))
    heads: dict[str, TensorHead] = {}
    for (name, old), flag in zip(base.items(), flags, strict=True):
        if flag & ~(_LATTICE | _PRUNED) or (flag and old.step is None):
            raise BadPayload(f"tensor {name[:80]!r}: a delta cannot make this change")
        step = reader.step() if flag & _LATTICE else old.step
        heads[name] = TensorHead(old.spec, step, bool(flag & _PRUNED))
    reader.end()
    return heads


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
