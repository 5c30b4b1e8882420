"""What the tensors of a file are like, and what they cost."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, measure_costs
from prunecast.compression.files import UnreadableFile
from prunecast.compression.files.archive import Archive, plan_parts, read_payloads
from prunecast.compression.files.compressing import Progress, own_limits
from prunecast.compression.files.parts import held_name, keep, pack_part
from prunecast.compression.files.tensors import FOREIGN, FileSpec, FileTensor, TensorFile

__all__ = ["InspectedTensor", "Inspection", "entropy_bits", "inspect_archive", "inspect_tensors"]


_BLOCK = 1 << 20


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor.

    Attributes:
        spec: its dtype and shape.
        nbytes: what it costs, coded.
        zeros: share of zeros; None where the values were not looked at.
        entropy: zeroth-order entropy in bits per element, see `entropy_bits`; None likewise.
        step: lattice step of a quantised tensor of a compressed file.
        sections: section of the payload to bytes.
        shared: whether `nbytes` is a share of bytes that several tensors have in common.
    """

    spec: FileSpec
    nbytes: int
    zeros: float | None = None
    entropy: float | None = None
    step: float | None = None
    sections: Mapping[str, int] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True)
class Inspection:
    """A file.

    Attributes:
        tensors: name to what is known of it.
        nbytes: coded size: that of the compressed file, or of the one that would be written.
        sections: section of the payloads to bytes; they sum to `nbytes`.
        parts: number of parts.
        zlib: size of the plain tensors, each through zlib at level 6; None for compressed files.
    """

    tensors: dict[str, InspectedTensor]
    nbytes: int
    sections: dict[str, int]
    parts: int
    zlib: int | None = None

    @property
    def common(self) -> int:
        """Bytes that belong to no tensor."""
        return self.nbytes - sum(tensor.nbytes for tensor in self.tensors.values())


def inspect_tensors(
    source: TensorFile, *, on_progress: Progress = lambda done, total, what: None
) -> Inspection:
    """Look at every tensor of a file, and code it losslessly to see what that costs.

    Raises:
        FilesError, CodecError: a tensor cannot be read or coded.
    """
    plan = plan_parts(source.specs)
    done, deflated, nbytes = 0, 0, 0
    tensors: dict[str, InspectedTensor] = {}
    sections: dict[str, int] = defaultdict(int)
    for number, names in enumerate(plan):
        coded, seen = {}, {}
        for name in names:
            on_progress(done, source.nbytes, name)
            tensor = source[name]
            coded[name] = keep(tensor)
            seen[name] = (_zeros(tensor), entropy_bits(tensor))
            deflated += _deflated(tensor)
        metadata = {} if number else source.metadata
        payload = pack_part(coded, number=number, count=len(plan), metadata=metadata)
        nbytes += len(payload)
        costs = measure_costs(payload, limits=own_limits())
        for section, size in costs.sections.items():
            sections[section] += size
        for name in names:
            spec, cost, (zeros, entropy) = (
                source.specs[name],
                costs.tensors[held_name(name)],
                seen[name],
            )
            tensors[name] = InspectedTensor(
                spec, cost.nbytes, zeros, entropy, sections=cost.sections, shared=cost.shared
            )
            done += spec.nbytes
    on_progress(done, source.nbytes, "")
    return Inspection(tensors, nbytes, dict(sections), len(plan), deflated)


def inspect_archive(
    archive: Archive, *, on_progress: Progress = lambda done, total, what: None
) -> Inspection:
    """Say what the tensors of a compressed file cost.

    Raises:
        FilesError: it cannot be decoded.
    """
    total = sum(place.nbytes for place in archive.places)
    tensors: dict[str, InspectedTensor] = {}
    sections: dict[str, int] = defaultdict(int)
    done = 0
    for number, payload in enumerate(read_payloads(archive.path)):
        on_progress(done, total, f"part {number + 1}")
        try:
            costs = measure_costs(payload, limits=archive.limits)
        except CodecError as error:
            raise UnreadableFile(f"{archive.path} cannot be decoded: {error}") from error
        for section, size in costs.sections.items():
            sections[section] += size
        for name in (name for name in archive if archive.part_of[name] == number):
            cost = costs.tensors[held_name(name)]
            tensors[name] = InspectedTensor(
                archive.specs[name],
                cost.nbytes,
                step=archive.steps.get(name),
                sections=cost.sections,
                shared=cost.shared,
            )
        done += len(payload)
    on_progress(total, total, "")
    return Inspection(tensors, total, dict(sections), len(archive.places))


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
