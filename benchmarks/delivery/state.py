"""What two neighbouring rounds look like on a device: published models and their `weights.bin`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx.lattice import snap
from prunecast.compression.release.layout import WeightsLayout, place
from prunecast.compression.versions import LatticeTensor, PublishedModel

__all__ = ["Pair", "layout_of", "pair"]


@dataclass(frozen=True)
class Pair:
    """One case: the same int8 state for every tool.

    Attributes:
        name: of the case.
        held: what the device has.
        new: what it should have.
        old_file: `weights.bin` of `held`: int8 kernels, float32 biases and norms.
        new_file: `weights.bin` of `new`.
        changed: share of the lattice integers that differ.
        zeros: share of the lattice integers of `new` that are zero.
        entropy: bytes, zeroth-order, of the integers' differences, each tensor by itself and
            apart where `held` is zero; what a coder needs that knows the mask and nothing else.
    """

    name: str
    held: PublishedModel
    new: PublishedModel
    old_file: bytes
    new_file: bytes
    changed: float
    zeros: float
    entropy: float


def _entropy(values: NDArray[Any]) -> float:
    """Bits of the values by their own histogram."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum()) if values.size else 0.0


def layout_of(model: PublishedModel) -> WeightsLayout:
    """The layout of a release in the ``lattice`` variant."""
    rows: list[tuple[str, str, str, str, tuple[int, ...]]] = []
    for name, tensor in model.tensors.items():
        if isinstance(tensor, LatticeTensor):
            rows.append((f"{name}::q", name, "q", tensor.q.dtype.name, tensor.shape))
            rows.append((f"{name}::step", name, "step", "float32", ()))
        else:
            rows.append((name, name, "raw", tensor.dtype.name, tensor.shape))
    return place(rows)


def pair(name: str, before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> Pair:
    """Put two rounds on one lattice of 8 bits, as `prunecast release create --bits 8` does."""
    kernels = {k for k, v in before.items() if v.ndim > 1}
    held = snap(before, kernels, bits=8)
    new = snap(after, kernels, bits=8, held=held, counter=1)
    held.digest, new.digest  # noqa: B018 - a device knows the digest of what it holds
    moved = total = zero = 0
    bits = 0.0
    for key in kernels:
        a, b = held[key], new[key]
        assert isinstance(a, LatticeTensor)
        assert isinstance(b, LatticeTensor)
        total += b.q.size
        moved += int((a.q != b.q).sum())
        zero += int((b.q == 0).sum())
        difference = b.q.astype(np.int32) - a.q
        bits += _entropy(difference[a.q == 0]) + _entropy(difference[a.q != 0])
    files = [b"".join(layout_of(model).chunks(model)) for model in (held, new)]
    return Pair(name, held, new, files[0], files[1], moved / total, zero / total, bits / 8)
