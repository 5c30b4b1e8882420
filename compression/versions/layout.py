"""The layout section: what both sides must know about the tensors before decoding values."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from prunecast.compression.codec import TensorSpec
from prunecast.compression.versions.byte_strings import COPIES, LEAST_COPY
from prunecast.compression.versions.errors import BadPayload, InvalidModel
from prunecast.compression.versions.model import LatticeTensor, Tensor

__all__ = [
    "Changes",
    "Coding",
    "Edited",
    "ReplyTensor",
    "TensorHead",
    "UpdateHead",
    "head_of",
    "is_byte_vector",
    "is_bytes",
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
_LATTICE, _PRUNED, _OTHER, _MASKED, _EDITED = 1, 2, 4, 8, 16
_TABLE = 0xFF  # first byte of an update's layout that differs from the version's
_CODING, _FOREIGN, _RENAMED, _RETYPED = 0x07, 0x08, 0x10, 0x20


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
    VALUES = 3
    ZERO = 4
    VERBATIM = 5
    EDITED = 6


@dataclass(frozen=True)
class ReplyTensor:
    """What a tensor of a reply is, without its values.

    Attributes:
        spec: its dtype and shape; None where the codec does not know it, so that it travels beside
            the payload.
        like: name of the version's tensor that it belongs to, of the same shape; None for none.
    """

    spec: TensorSpec | None
    like: str | None = None


@dataclass(frozen=True)
class Edited:
    """What a vector of bytes of a reply is edited from, and how many edits there are.

    Attributes:
        of: name of the version's vector of bytes.
        literals: bytes that no copy has.
        copies: how many.
    """

    of: str
    literals: int
    copies: int


@dataclass(frozen=True)
class UpdateHead:
    """Coding of one tensor of an update; `step` is 0.0 unless it is quantised."""

    coding: Coding
    step: float
    tensor: ReplyTensor
    edited: Edited | None = None


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
        name = _unpack_name(reader)
        if name in heads:
            raise BadPayload(f"tensor {name[:80]!r} is named twice")
        heads[name] = _unpack_head(reader, name)
    reader.end()
    return heads


def same_kind(new: TensorHead, old: TensorHead) -> bool:
    """Whether a tensor can be coded as a difference to the held one."""
    return new.spec == old.spec and (new.step is None) == (old.step is None)


def is_bytes(head: TensorHead) -> bool:
    """Whether a tensor is a vector of bytes, which may be edited."""
    return head.step is None and is_byte_vector(head.spec)


def is_byte_vector(spec: TensorSpec) -> bool:
    """Whether arrays of a dtype and shape are vectors of bytes."""
    return spec.dtype == np.uint8 and len(spec.shape) == 1


def pack_changes(
    heads: Sequence[TensorHead],
    base: Sequence[TensorHead],
    back: Sequence[int | None] | None = None,
    edits: Sequence[tuple[int, int] | None] | None = None,
) -> bytes:
    """Layout of a delta: what changed against the held version; empty when nothing did.

    Args:
        heads: of the new version.
        base: of the held version.
        back: for each tensor that is coded under its mask how many places come back, else None.
        edits: for each string of bytes that is edited how many literals and copies, else None.
    """
    back, edits = back or [None] * len(heads), edits or [None] * len(heads)
    same = all(new == old for new, old in zip(heads, base, strict=True))
    if same and not any(edits) and all(count is None for count in back):
        return b""
    flags, changes = bytearray(), b""
    for new, old, count, edited in zip(heads, base, back, edits, strict=True):
        if edited is not None:
            flags.append(_EDITED)
            changes += struct.pack("<3I", new.spec.size, *edited)
            continue
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


@dataclass(frozen=True)
class Changes:
    """The layout of a delta, read.

    Attributes:
        heads: of the new version's tensors.
        back: of each that is coded under its mask, how many places come back.
        edits: of each string of bytes that is edited, how many literals and copies.
    """

    heads: dict[str, TensorHead]
    back: dict[str, int] = field(default_factory=dict)
    edits: dict[str, tuple[int, int]] = field(default_factory=dict)


def unpack_changes(layout: bytes, base: Mapping[str, TensorHead]) -> Changes:
    """Heads of the new version from the held version's heads and a delta's layout.

    Raises:
        BadPayload: damaged, or it changes what a delta cannot change.
    """
    if not layout:
        return Changes(dict(base))
    reader = _Reader(layout)
    flags = reader.take(len(base))
    found = Changes({})
    for (name, old), flag in zip(base.items(), flags, strict=True):
        if flag == _OTHER:
            found.heads[name] = _unpack_head(reader, name)
            continue
        if flag == _EDITED and is_bytes(old):
            size, literals, copies = reader.unpack("<3I")
            if literals > size or copies * LEAST_COPY > size - literals:
                raise BadPayload(f"tensor {name[:80]!r}: more edits than its size allows")
            found.heads[name] = TensorHead(TensorSpec(old.spec.dtype, (size,)), None, False)
            found.edits[name] = literals, copies
            continue
        if flag & ~(_LATTICE | _PRUNED | _MASKED) or (flag and old.step is None):
            raise BadPayload(f"tensor {name[:80]!r}: a delta cannot make this change")
        step = reader.step() if flag & _LATTICE else old.step
        found.heads[name] = TensorHead(old.spec, step, bool(flag & _PRUNED))
        if flag & _MASKED:
            found.back[name] = reader.unpack("<I")[0]
    reader.end()
    return found


def pack_update_heads(heads: Mapping[str, UpdateHead], base: Mapping[str, TensorSpec]) -> bytes:
    """Layout of an update: a coding per tensor, then the steps of the quantised ones.

    A table of names and specs takes the place of the codings where these are not the version's.

    Args:
        heads: of the update's tensors, in its order.
        base: specs of the version's tensors, in their order.
    """
    steps = b"".join(struct.pack("<f", head.step) for head in heads.values() if head.step)
    if [(n, h.tensor) for n, h in heads.items()] == [
        (n, ReplyTensor(spec, n)) for n, spec in base.items()
    ]:
        return bytes(head.coding for head in heads.values()) + steps
    places = {name: number for number, name in enumerate(base)}
    rows = (_pack_row(name, head, base, places) for name, head in heads.items())
    return struct.pack("<BI", _TABLE, len(heads)) + b"".join(rows) + steps


def _pack_row(
    name: str, head: UpdateHead, base: Mapping[str, TensorSpec], places: Mapping[str, int]
) -> bytes:
    spec, like = head.tensor.spec, head.tensor.like
    encoded = name.encode()
    if len(encoded) > 0xFFFF or (spec is not None and len(spec.shape) > 32):
        raise InvalidModel(f"tensor {name[:80]!r}: name or number of dimensions is too long")
    named = struct.pack("<H", len(encoded)) + encoded
    if spec is None or like is None:
        row = bytes([head.coding | _FOREIGN]) + named
        if spec is None:
            return row
        code, shape = _DTYPES.index(spec.dtype.name), spec.shape
        row += struct.pack(f"<BB{len(shape)}Q", code, len(shape), *shape)
        if (edit := head.edited) is not None:
            row += struct.pack("<IQI", places[edit.of], edit.literals, edit.copies)
        return row
    renamed, retyped = name != like, spec.dtype != base[like].dtype
    row = struct.pack("<BI", head.coding | _RENAMED * renamed | _RETYPED * retyped, places[like])
    row += named if renamed else b""
    return row + bytes([_DTYPES.index(spec.dtype.name)] if retyped else [])


def unpack_update_heads(layout: bytes, base: Mapping[str, TensorSpec]) -> dict[str, UpdateHead]:
    """Inverse of `pack_update_heads`; nothing is allocated for the tensors.

    Raises:
        BadPayload: damaged, or an unknown coding, dtype or tensor of the version.
    """
    reader = _Reader(layout)
    tensors: dict[str, tuple[int, ReplyTensor]] = {}
    edits: dict[str, Edited] = {}
    if layout[:1] == bytes([_TABLE]):
        _, count = reader.unpack("<BI")
        names, taken = list(base), set[str | None]()
        for _ in range(count):
            name, coding, tensor, edit = _unpack_row(reader, names, base)
            if edit is not None:
                edits[name] = edit
            if name in tensors:
                raise BadPayload(f"tensor {name[:80]!r} is named twice")
            if tensor.like is not None and tensor.like in taken:
                raise BadPayload(f"tensor {name[:80]!r} is not the first of {tensor.like[:80]!r}")
            taken.add(tensor.like)
            tensors[name] = coding, tensor
    else:
        codes = reader.take(len(base))
        for (name, spec), coding in zip(base.items(), codes, strict=True):
            tensors[name] = coding, ReplyTensor(spec, name)
    heads: dict[str, UpdateHead] = {}
    for name, (code, tensor) in tensors.items():
        known = code <= Coding.EDITED and (code == Coding.VERBATIM) == (tensor.spec is None)
        if not known or (code == Coding.EDITED) != (name in edits):
            raise BadPayload(f"tensor {name[:80]!r}: unknown update coding {code}")
        coding = Coding(code)
        if coding in (Coding.UNCHANGED, Coding.QUANTISED) and tensor.like is None:
            raise BadPayload(f"tensor {name[:80]!r} is a change of nothing that was sent")
        stepped = coding in (Coding.QUANTISED, Coding.VALUES)
        step = reader.step() if stepped else 0.0
        heads[name] = UpdateHead(coding, step, tensor, edits.get(name))
    for name in edits:
        if name + COPIES in heads:  # they would lie under one name in the body
            raise BadPayload(
                f"tensor {name[:80]!r} has a tensor of the name of its edits beside it"
            )
    reader.end()
    return heads


def _unpack_row(
    reader: _Reader, names: Sequence[str], base: Mapping[str, TensorSpec]
) -> tuple[str, int, ReplyTensor, Edited | None]:
    (flags,) = reader.unpack("<B")
    coding = flags & _CODING
    if flags & _FOREIGN and not flags & (_RENAMED | _RETYPED):
        name = _unpack_name(reader)
        if coding == Coding.VERBATIM:
            return name, coding, ReplyTensor(None), None
        code, ndim = reader.unpack("<BB")
        spec, edit = _spec_of(name, code, reader, ndim), None
        if coding == Coding.EDITED:
            edit = _unpack_edit(name, spec, reader, names, base)
        return name, coding, ReplyTensor(spec), edit
    (place,) = reader.unpack("<I")
    if flags & ~(_CODING | _RENAMED | _RETYPED) or place >= len(names):
        raise BadPayload("layout section of an update refers to a tensor that was not sent")
    like = names[place]
    name = _unpack_name(reader) if flags & _RENAMED else like
    spec = base[like]
    if flags & _RETYPED:
        dtype = _spec_of(name, reader.unpack("<B")[0], reader, 0).dtype
        spec = TensorSpec(dtype, spec.shape)
    return name, coding, ReplyTensor(spec, like), None


def _unpack_edit(
    name: str,
    spec: TensorSpec,
    reader: _Reader,
    names: Sequence[str],
    base: Mapping[str, TensorSpec],
) -> Edited:
    place, literals, copies = reader.unpack("<IQI")
    if place >= len(names) or not (is_byte_vector(spec) and is_byte_vector(base[names[place]])):
        raise BadPayload(f"tensor {name[:80]!r} is edited from what is no vector of bytes")
    if literals + copies * LEAST_COPY > spec.size:
        raise BadPayload(f"tensor {name[:80]!r} is edited to more than it has")
    return Edited(names[place], literals, copies)


def _spec_of(name: str, code: int, reader: _Reader, ndim: int) -> TensorSpec:
    if code >= len(_DTYPES) or ndim > 32:
        raise BadPayload(f"tensor {name[:80]!r}: unknown dtype or number of dimensions")
    return TensorSpec(np.dtype(_DTYPES[code]), reader.unpack(f"<{ndim}Q"))


def _unpack_name(reader: _Reader) -> str:
    try:
        return reader.take(reader.unpack("<H")[0]).decode()
    except UnicodeDecodeError as error:
        raise BadPayload("a tensor name is not UTF-8") from error
