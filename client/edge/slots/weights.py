"""What may be read through a slot's `weights.bin`: the tensors of its model, the base of a patch.

`weights.bin` holds the integers and raw values that inference reads; a slot keeps the rest of the
published model beside it, in `rest.model`: steps, which tensors are pruned, and tensors that
inference leaves out. A tensor whose values lie in `weights.bin` has the shape (0,) there. Put
together they are the base of a patch, read from the mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import StorageError
from prunecast.compression.release import LayoutError
from prunecast.compression.release.externals import check_externals
from prunecast.compression.release.layout import Segment, WeightsLayout
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    VersionsError,
    load_model,
    save_model,
)

__all__ = ["REST", "check_externals", "patch_base", "save_rest"]

REST = "rest.model"


def save_rest(model: PublishedModel, layout: WeightsLayout, path: Path) -> None:
    """Write what `weights.bin` does not say of the model.

    Raises:
        StorageError: the file system refuses.
    """
    there = {segment.tensor for segment in _carriers(layout)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.tensors.items():
        if name not in there:
            tensors[name] = tensor
        else:
            dtype = np.int8 if isinstance(tensor, LatticeTensor) else tensor.dtype
            tensors[name] = _filled(tensor, np.zeros(0, dtype))
    save_model(PublishedModel(tensors, model.counter), path)


def patch_base(folder: Path) -> PublishedModel | None:
    """The published model of a slot; None when unreadable.

    Its arrays are views of the mapped file. Nothing is verified here: whether it is the model that
    a patch builds on is what its digest says.
    """
    try:
        rest = load_model(folder / REST)
        layout = WeightsLayout.from_bytes((folder / "layout.json").read_bytes())
        weights = folder / "weights.bin"
        if weights.stat().st_size != layout.size:
            return None
        mapped = np.memmap(weights, np.uint8, "r") if layout.size else np.zeros(0, np.uint8)
        tensors = dict(rest.tensors)
        for segment in _carriers(layout):
            tensor = tensors.get(segment.tensor)
            if tensor is not None:
                tensors[segment.tensor] = _filled(tensor, _values(mapped, segment))
        return PublishedModel(tensors, rest.counter)
    except (VersionsError, LayoutError, StorageError, OSError):
        return None  # not needed for inference; the next update takes the keyframe


def _carriers(layout: WeightsLayout) -> Iterator[Segment]:
    """The segments that hold a tensor of the model exactly."""
    return (segment for segment in layout.segments if segment.part in ("q", "raw"))


def _values(mapped: NDArray[np.uint8], segment: Segment) -> NDArray[np.generic]:
    count = math.prod(segment.shape)
    little = np.dtype(segment.dtype).newbyteorder("<")
    found = np.frombuffer(mapped, little, count, segment.offset) if count else np.zeros(0, little)
    return found.reshape(segment.shape)


def _filled(tensor: Tensor, values: NDArray[np.generic]) -> Tensor:
    if isinstance(tensor, LatticeTensor):
        return replace(tensor, q=values.astype(values.dtype.newbyteorder("="), copy=False))
    return RawTensor(values)
