"""Where each tensor lies in `weights.bin`; numpy and the standard library only.

The same layout is used by whoever binds weights to a graph and by the device that rebuilds
`weights.bin` from a published model, so both write the same bytes. A *segment* is one ONNX
initialiser:

========= ==================================================== =======================
part      content                                              dtype
========= ==================================================== =======================
``q``     lattice coordinates, input of ``DequantizeLinear``   int8, int16 or int32
``step``  lattice step, a scalar                               float32
``dense`` ``float32(q) * step``, cast to the tensor's dtype    the tensor's dtype
``raw``   a lossless tensor                                    the tensor's dtype
========= ==================================================== =======================

All values are little-endian, C order; every segment starts at a multiple of 64 bytes and the gaps
are zero.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.documents import strict_json
from prunecast.compression.release import LayoutError
from prunecast.compression.versions import LatticeTensor, PublishedModel

__all__ = ["ALIGNMENT", "Segment", "WeightsLayout", "place"]

ALIGNMENT = 64  # bytes
_PARTS = ("q", "step", "dense", "raw")
_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
}
_SCHEMA = 1
_MAX_SEGMENTS = 1_000_000


@dataclass(frozen=True)
class Segment:
    """One initialiser inside `weights.bin`.

    Attributes:
        name: name of the initialiser in the graph.
        tensor: name of the tensor in the published model.
        part: ``q``, ``step``, ``dense`` or ``raw``.
        dtype: numpy name of the dtype on disk.
        shape: shape on disk.
        offset: first byte.
    """

    name: str
    tensor: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def values(self, model: PublishedModel) -> NDArray[np.generic]:
        """What this segment holds for `model`; shape and dtype as declared.

        Raises:
            LayoutError: the model lacks the tensor, or it has another shape, kind or width.
        """
        tensor = model.tensors.get(self.tensor)
        if tensor is None:
            raise LayoutError(f"the model has no tensor {self.tensor!r} that the layout places")
        found: NDArray[np.generic]
        if self.part in ("dense", "raw"):
            found = tensor.dense()
        elif not isinstance(tensor, LatticeTensor):
            raise LayoutError(f"tensor {self.tensor!r} is raw, the layout expects a lattice")
        elif self.part == "step":
            found = np.array(tensor.step, dtype=np.float32)
        else:
            found = tensor.q
        if found.shape != self.shape or found.dtype.name != self.dtype:
            raise LayoutError(
                f"tensor {self.tensor!r} ({self.part}) is {found.dtype.name}{list(found.shape)}, "
                f"the layout places {self.dtype}{list(self.shape)}: it belongs to another release"
            )
        return found


def place(segments: Iterable[tuple[str, str, str, str, tuple[int, ...]]]) -> WeightsLayout:
    """Give each ``(name, tensor, part, dtype, shape)`` an offset, in order."""
    placed: list[Segment] = []
    end = 0
    for name, tensor, part, dtype, shape in segments:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        placed.append(Segment(name, tensor, part, dtype, shape, offset))
        end = offset + placed[-1].length
    return WeightsLayout(tuple(placed), end)


@dataclass(frozen=True)
class WeightsLayout:
    """The segments of a `weights.bin`, in file order.

    Attributes:
        segments: the initialisers.
        size: length of the file in bytes.
    """

    segments: tuple[Segment, ...]
    size: int

    def chunks(self, model: PublishedModel) -> Iterator[bytes]:
        """The content of `weights.bin` for `model`, a piece at a time.

        Raises:
            LayoutError: the model does not fit.
        """
        at = 0
        for segment in self.segments:
            if segment.offset > at:
                yield bytes(segment.offset - at)
            values = segment.values(model)
            yield values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
            at = segment.offset + segment.length

    def digest(self, model: PublishedModel) -> str:
        """SHA-256 (hex) of `weights.bin` for `model`, without writing it."""
        sha = hashlib.sha256()
        for chunk in self.chunks(model):
            sha.update(chunk)
        return sha.hexdigest()

    def write(self, model: PublishedModel, path: Path) -> str:
        """Write `weights.bin` to `path` and fsync it; returns its SHA-256 (hex).

        The write is not atomic by itself: callers write into a folder that nothing refers to yet.

        Raises:
            LayoutError: the model does not fit, or the file cannot be written.
        """
        sha = hashlib.sha256()
        try:
            with open(path, "wb") as file:
                for chunk in self.chunks(model):
                    sha.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LayoutError(f"cannot write {path}: {error.strerror or error}") from error
        return sha.hexdigest()

    def to_bytes(self) -> bytes:
        """JSON, one segment a row; the same layout gives the same bytes."""
        rows = [[s.name, s.tensor, s.part, s.dtype, list(s.shape), s.offset] for s in self.segments]
        document = {"schema": _SCHEMA, "size": self.size, "segments": rows}
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> WeightsLayout:
        """Read what `to_bytes` wrote, checking every field.

        Raises:
            LayoutError: no such layout, or segments that overlap, repeat or leave the file.
        """
        try:
            document: Any = strict_json(data)
        except (ValueError, RecursionError) as error:
            raise LayoutError(f"the weights layout is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
            raise LayoutError(f"the weights layout is not of schema {_SCHEMA}: update the agent")
        rows: Any = document.get("segments")
        size: Any = document.get("size")
        if not isinstance(rows, list) or len(rows) > _MAX_SEGMENTS or not _natural(size):
            raise LayoutError("the weights layout lacks its segments or size")
        segments = tuple(_segment(row) for row in rows)
        _check_order(segments, int(size))
        return cls(segments, int(size))


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _segment(row: object) -> Segment:
    if not isinstance(row, list) or len(row) != 6:
        raise LayoutError("a row of the weights layout does not have six fields")
    name, tensor, part, dtype, shape, offset = row
    texts = all(isinstance(text, str) for text in (name, tensor, part, dtype))
    if not texts or part not in _PARTS or dtype not in _DTYPES:
        raise LayoutError(f"row {str(name)[:80]!r} of the weights layout has unknown types")
    if not isinstance(shape, list) or len(shape) > 32 or not all(_natural(n) for n in shape):
        raise LayoutError(f"row {str(name)[:80]!r} of the weights layout has no usable shape")
    if not _natural(offset) or offset % ALIGNMENT:
        raise LayoutError(f"row {str(name)[:80]!r} of the weights layout has no aligned offset")
    return Segment(name, tensor, part, dtype, tuple(shape), offset)


def _check_order(segments: Sequence[Segment], size: int) -> None:
    end, seen = 0, set()
    for segment in segments:
        if segment.name in seen:
            raise LayoutError(f"the weights layout places {segment.name[:80]!r} twice")
        if not end <= segment.offset <= end + ALIGNMENT:
            raise LayoutError(f"segment {segment.name[:80]!r} overlaps or leaves a gap")
        seen.add(segment.name)
        end = segment.offset + segment.length
    if end != size:
        raise LayoutError(f"the segments end at byte {end}, the weights layout says {size}")
