"""What may be read through a slot's `weights.bin`: the tensors of its model, the base of a patch.

`weights.bin` holds the integers and raw values that inference reads; a slot keeps the rest of the
published model beside it, in `rest.model`: steps, which tensors are pruned, and tensors that
inference leaves out. A tensor whose values lie in `weights.bin` has the shape (0,) there. Put
together they are the base of a patch, read from the mapped file.

An ONNX tensor may name an external file, and a runtime opens it relative to the model. A model that
names any other than `weights.bin` would make a device read whatever the agent may read. It is found
without the onnx package, by the fields of onnx.proto, IR version 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import StorageError
from prunecast.compression.release import LayoutError, RuntimeFailure
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


_MOST_DEPTH = 64
_KEYS = {"location", "offset", "length", "checksum"}
# message -> field -> message in it; everything else is skipped
_NESTED = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
}
_NAME, _EXTERNAL, _LOCATION = 8, 13, 14  # of a Tensor


def check_externals(model: bytes, *, file: str, size: int) -> None:
    """Check that every external tensor of an ONNX model lies within `file`.

    Args:
        model: content of the ``.onnx`` file.
        file: the only name that may appear.
        size: its length in bytes.

    Raises:
        RuntimeFailure: another file, bytes outside of it, or no ONNX model at all.
    """
    if model[4:8] == b"ORTM":
        raise RuntimeFailure("model.onnx is in onnxruntime's own format, which is not accepted")
    try:
        for name, entries in _externals(memoryview(model), "Model", 0):
            _check_entries(name, entries, file, size)
    except (IndexError, UnicodeDecodeError) as error:
        raise RuntimeFailure("model.onnx is damaged or no ONNX model") from error


def _check_entries(name: str, entries: list[tuple[str, str]], file: str, size: int) -> None:
    found = dict(entries)
    if len(found) != len(entries) or not set(found) <= _KEYS:
        raise RuntimeFailure(f"tensor {name[:80]!r} of model.onnx describes its file ambiguously")
    if (location := found.get("location")) != file:
        raise RuntimeFailure(
            f"tensor {name[:80]!r} of model.onnx lies in {str(location)[:80]!r}: a release may "
            f"read {file} alone"
        )
    numbers = [found.get(key, "0") for key in ("offset", "length")]
    if not all(n.isascii() and n.isdigit() for n in numbers) or sum(map(int, numbers)) > size:
        raise RuntimeFailure(
            f"tensor {name[:80]!r} of model.onnx lies outside the {size} bytes of {file}"
        )


def _externals(
    data: memoryview, kind: str, depth: int
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    if depth > _MOST_DEPTH:
        raise RuntimeFailure(f"model.onnx nests graphs more than {_MOST_DEPTH} deep")
    if kind == "Tensor":
        name, entries, external = "", [], False
        for number, value in _fields(data):
            if number == _NAME and isinstance(value, memoryview):
                name = str(value, "utf-8")
            elif number == _EXTERNAL and isinstance(value, memoryview):
                pair = {n: str(v, "utf-8") for n, v in _fields(value) if isinstance(v, memoryview)}
                entries.append((pair.get(1, ""), pair.get(2, "")))
            elif number == _LOCATION:
                external = external or value == 1
        if entries or external:
            yield name, entries
        return
    nested = _NESTED[kind]
    for number, value in _fields(data):
        if number in nested and isinstance(value, memoryview):
            yield from _externals(value, nested[number], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of one protobuf message: number, and integer or bytes; IndexError when damaged."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire}")
        if at + length > len(data):
            raise IndexError("a field ends behind its message")
        if wire == 2:
            yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a number is too long")
