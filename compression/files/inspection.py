"""What the tensors of a file are like, and what they cost."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits, measure_costs
from prunecast.compression.files import UnreadableFile
from prunecast.compression.files.archive import Archive, plan_parts, read_payloads
from prunecast.compression.files.parts import held_name, keep, pack_part
from prunecast.compression.files.tensors import FOREIGN, FileSpec, FileTensor, TensorFile

__all__ = [
    "InspectedTensor",
    "Inspection",
    "Progress",
    "entropy_bits",
    "inspect_archive",
    "inspect_tensors",
    "own_limits",
]


_BLOCK = 1 << 20


Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes to do, and what is being done."""


def own_limits() -> Limits:
    """Limits for what was coded here: none that matters."""
    return Limits(**dict.fromkeys((f.name for f in fields(Limits)), 1 << 62))


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor.

    Attributes:
        spec: its dtype and shape.
        nbytes: what it costs, coded.
        zeros: share of zeros; None where the values were not looked at.
        entropy: zeroth-order entropy in bits per element, see `entropy_bits`; None likewise.
        step: lattice step of a quantised tensor; None where it is exact.
        error: relative L2 error, where it was quantised just now.
        sections: section of the payload to bytes.
        shared: whether `nbytes` is a share of bytes that several tensors have in common.
    """

    spec: FileSpec
    nbytes: int = 0
    zeros: float | None = None
    entropy: float | None = None
    step: float | None = None
    error: float | None = None
    sections: Mapping[str, int] = field(default_factory=dict)
    shared: bool = False


@dataclass
class Inspection:
    """A file.

    Attributes:
        tensors: name to what is known of it.
        nbytes: coded size: that of the compressed file, or of the one that would be written.
        sections: section of the payloads to bytes; they sum to `nbytes`.
        parts: number of parts.
        zlib: size of tensors and graph, each through zlib at level 6; None for compressed files.
    """

    tensors: dict[str, InspectedTensor] = field(default_factory=dict)
    nbytes: int = 0
    sections: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    zlib: int | None = None

    @property
    def common(self) -> int:
        """Bytes that belong to no tensor."""
        return self.nbytes - sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def lossy(self) -> bool:
        """Whether any tensor is quantised."""
        return any(tensor.step is not None for tensor in self.tensors.values())

    def add(self, payload: bytes, limits: Limits, seen: Mapping[str, InspectedTensor]) -> None:
        """Count one part, of whose tensors everything but the cost is known.

        Raises:
            CodecError: it cannot be decoded.
        """
        costs = measure_costs(payload, limits=limits)
        self.parts, self.nbytes = self.parts + 1, self.nbytes + len(payload)
        for section, size in costs.sections.items():
            self.sections[section] = self.sections.get(section, 0) + size
        for name, tensor in seen.items():
            cost = costs.tensors[held_name(name)]
            self.tensors[name] = replace(
                tensor, nbytes=cost.nbytes, sections=cost.sections, shared=cost.shared
            )


def inspect_tensors(
    source: TensorFile, *, on_progress: Progress = lambda done, total, what: None
) -> Inspection:
    """Look at every tensor of a file, and code it losslessly to see what that costs.

    Raises:
        FilesError, CodecError: a tensor cannot be read or coded.
    """
    plan = plan_parts(source.specs)
    result, done = Inspection(zlib=len(zlib.compress(source.graph)) if source.graph else 0), 0
    for number, names in enumerate(plan):
        coded, seen = {}, {}
        for name in names:
            on_progress(done, source.nbytes, name)
            tensor, spec = source[name], source.specs[name]
            coded[name] = keep(tensor)
            seen[name] = InspectedTensor(spec, zeros=_zeros(tensor), entropy=entropy_bits(tensor))
            result.zlib = (result.zlib or 0) + _deflated(tensor)
            done += spec.nbytes
        metadata, graph = ({}, None) if number else (source.metadata, source.graph)
        payload = pack_part(coded, number=number, count=len(plan), metadata=metadata, graph=graph)
        result.add(payload, own_limits(), seen)
    on_progress(done, source.nbytes, "")
    return result


def inspect_archive(
    archive: Archive, *, on_progress: Progress = lambda done, total, what: None
) -> Inspection:
    """Say what the tensors of a compressed file cost.

    Raises:
        FilesError: it cannot be decoded.
    """
    total, result = sum(nbytes for _, nbytes in archive.places), Inspection()
    for number, payload in enumerate(read_payloads(archive.path)):
        on_progress(result.nbytes, total, f"part {number + 1}")
        seen = {
            name: InspectedTensor(spec, step=archive.steps.get(name))
            for name, spec in archive.specs.items()
            if archive.part_of[name] == number
        }
        try:
            result.add(payload, archive.limits, seen)
        except CodecError as error:
            raise UnreadableFile(f"{archive.path} cannot be decoded: {error}") from error
    on_progress(total, total, "")
    return result


def entropy_bits(tensor: FileTensor) -> float:
    """Zeroth-order entropy, in bits per element.

    Of the values of integers and booleans; of floats, the sum over the bytes of an element, with
    its sign moved behind the other bits. A static coder with one table for each can do no better.

    >>> entropy_bits(FileTensor(np.array([0, 0, 1, 1]), "int64"))
    1.0
    """
    values = np.ascontiguousarray(tensor.values).reshape(-1)
    if not values.size:
        return 0.0
    if tensor.dtype in FOREIGN or values.dtype.kind == "f":
        bits = values.view(f"u{values.itemsize}")
        bits = (bits << 1) | (bits >> (8 * bits.itemsize - 1))
        planes = bits.view(np.uint8).reshape(-1, bits.itemsize)
        return sum(_entropy(np.bincount(plane, minlength=256)) for plane in planes.T)
    if values.itemsize <= 2:
        return _entropy(np.bincount(values.view(f"u{values.itemsize}")))
    return _entropy(np.unique(values, return_counts=True)[1])


def _entropy(counts: NDArray[Any]) -> float:
    share = counts[counts > 0] / counts.sum()
    return abs(float((share * np.log2(share)).sum()))


def _zeros(tensor: FileTensor) -> float:
    values = tensor.values
    if not values.size:
        return 0.0
    if tensor.dtype in FOREIGN:
        if tensor.dtype == "float8_e8m0fnu":
            return 0.0  # powers of two alone
        # A minus zero counts as well; where there is none, its bits stand for NaN.
        signed = not tensor.dtype.endswith("fnuz")
        values = values << 1 if signed else values
    return 1.0 - int(np.count_nonzero(values)) / values.size


def _deflated(tensor: FileTensor) -> int:
    data = np.ascontiguousarray(tensor.values).reshape(-1).view(np.uint8).data
    squeeze = zlib.compressobj(6)
    size = sum(
        len(squeeze.compress(data[begin : begin + _BLOCK])) for begin in range(0, len(data), _BLOCK)
    )
    return size + len(squeeze.flush())
