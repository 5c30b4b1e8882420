"""An ``.onnx`` model as tensors and a *skeleton*: the model without their values.

Weights lie in initialisers, in ``Constant`` nodes and other attributes, in the inner graphs of
``If``, ``Loop`` and ``Scan``, in functions, and as the values and indices of sparse tensors. All
that can be coded is taken out, under a name that says where it was; whatever else the model holds
stays in the skeleton, so that both together are the model again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunecast.common.files import remove_abandoned, replacing
from prunecast.compression.files import FileTooLarge, UnreadableFile
from prunecast.compression.files.tensors import FOREIGN, FileTensor, raw_dtype

__all__ = ["PROTOBUF_LIMIT", "Place", "numpy_dtype", "places", "subgraphs", "write_onnx"]

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes of a message."""
_MOST_NAMES = 1 << 26  # bytes, of all places together
_LISTS = {"value_floats": ("floats", "float32"), "value_ints": ("ints", "int64")}
"""Lists in ``Constant`` nodes: their field, and the dtype that ONNX gives the constant."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a model holds values.

    Attributes:
        name: unique in the model.
        holder: the ``TensorProto``, or the attribute of a ``Constant`` node that has a list.
        values: field of that list and its dtype; None for a ``TensorProto``.
    """

    name: str
    holder: Any
    values: tuple[str, str] | None = None

    def fill(self, tensor: FileTensor) -> None:
        """Put values back where they were taken from.

        A ``TensorProto`` without even empty ``raw_data`` gets them in the field of its type.
        """
        values = np.ascontiguousarray(tensor.values).reshape(-1)
        if self.values is not None:
            getattr(self.holder, self.values[0])[:] = values.tolist()
        elif self.holder.HasField("raw_data"):
            self.holder.raw_data = values.astype(raw_dtype(tensor.dtype), copy=False).tobytes()
        elif values.size:
            from onnx import helper

            if tensor.dtype in FOREIGN or tensor.dtype == "float16":
                values = values.view(f"u{values.itemsize}")
            field = helper.tensor_dtype_to_field(self.holder.data_type)
            getattr(self.holder, field)[:] = values.tolist()


def subgraphs(node: Any) -> Iterator[tuple[str, Any]]:
    """Graphs in the attributes of a node, with the attribute's name."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for i, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}{i}", graph


def places(model: Any) -> list[Place]:
    """Every place of a model that may hold values, in an order that depends on the model alone.

    The initialisers of the graph come first, under their own names.

    Raises:
        UnreadableFile: two initialisers of the graph have one name, or a name is not UTF-8.
        FileTooLarge: the names take more than 64 MiB; those of inner graphs repeat outer ones.
    """
    found: list[Place] = []
    names: set[str] = set()
    next_count: dict[str, int] = {}  # of a name, so that many alike take no search each
    held = 0

    def add(wanted: str, holder: Any, values: tuple[str, str] | None = None) -> None:
        nonlocal held
        name, count = wanted, next_count.get(wanted, 2)
        while name in names:
            name, count = f"{wanted}_{count}", count + 1
        next_count[wanted] = count
        names.add(name)
        held += len(name)
        if held > _MOST_NAMES:
            raise FileTooLarge(
                f"the names of what the graph holds take more than {_MOST_NAMES:,} bytes: give "
                f"shorter ones to nodes with inner graphs, such as that of {name[:80]!r}"
            )
        found.append(Place(name, holder, values))

    own = [tensor.name for tensor in model.graph.initializer]
    own += [sparse.values.name for sparse in model.graph.sparse_initializer]
    if len(set(own)) != len(own):
        twice = next(name for name, number in Counter(own).items() if number > 1)
        raise UnreadableFile(
            f"the graph has two initialisers named {str(twice)[:200]!r}: it is damaged, export the "
            "model again"
        )
    try:
        _of_graph(model.graph, "", add)
        for function in model.functions:
            _of_graph(function, f"{function.name}/", add)
        for info in model.training_info:
            _of_graph(info.initialization, "initialization/", add)
            _of_graph(info.algorithm, "algorithm/", add)
    except TypeError as error:  # protobuf hands out bytes instead
        raise UnreadableFile("the graph holds a name that is not UTF-8: it is damaged") from error
    return found


def _of_graph(graph: Any, prefix: str, add: Callable[..., None]) -> None:
    for tensor in getattr(graph, "initializer", ()):
        add(prefix + tensor.name, tensor)
    for sparse in getattr(graph, "sparse_initializer", ()):
        _of_sparse(sparse, prefix + sparse.values.name, add)
    for attribute in getattr(graph, "attribute_proto", ()):  # defaults of a function
        _of_attribute(attribute, f"{prefix}{attribute.name}", add)
    for node in graph.node:
        label = prefix + (node.name or next((o for o in node.output if o), node.op_type))
        constant = node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output
        for attribute in node.attribute:
            name = prefix + node.output[0] if constant else f"{label}.{attribute.name}"
            if constant and attribute.name in _LISTS:
                add(name, attribute, _LISTS[attribute.name])
            _of_attribute(attribute, name, add)
        for where, sub in subgraphs(node):
            _of_graph(sub, f"{label}.{where}/", add)


def _of_attribute(attribute: Any, name: str, add: Callable[..., None]) -> None:
    if attribute.HasField("t"):
        add(name, attribute.t)
    if attribute.HasField("sparse_tensor"):
        _of_sparse(attribute.sparse_tensor, name, add)
    for i, tensor in enumerate(attribute.tensors):
        add(f"{name}{i}", tensor)
    for i, sparse in enumerate(attribute.sparse_tensors):
        _of_sparse(sparse, f"{name}{i}", add)


def _of_sparse(sparse: Any, name: str, add: Callable[..., None]) -> None:
    add(name, sparse.values)
    add(f"{name}.indices", sparse.indices)


def numpy_dtype(proto: Any) -> np.dtype[Any] | None:
    """numpy's or ml_dtypes' dtype of a tensor, None for a number that onnx does not know."""
    from onnx import helper

    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
    except (KeyError, TypeError, ValueError):
        return None


def write_onnx(path: Path, tensors: Mapping[str, FileTensor], skeleton: bytes) -> None:
    """Write a model from its skeleton and its tensors, as one file, atomically.

    Raises:
        UnreadableFile: the skeleton is damaged, or does not belong to the tensors.
        FileTooLarge: the model exceeds the 2 GiB that protobuf writes.
        StorageError: the file system refuses.
    """
    import onnx
    from google.protobuf.message import DecodeError, EncodeError

    try:
        model = onnx.ModelProto.FromString(skeleton)
    except DecodeError as error:
        raise UnreadableFile(f"the graph that the file holds is damaged: {error}") from error
    left = set(tensors)
    for place in places(model):
        if place.name in left:
            left.remove(place.name)
            _check(place, tensors[place.name])
            place.fill(tensors[place.name])
    if left:
        raise UnreadableFile(f"the graph has no place for tensor {min(left)!r}: it is damaged")
    try:
        if model.ByteSize() > PROTOBUF_LIMIT:
            raise FileTooLarge(
                f"{path} would exceed the 2 GiB of an .onnx file: write .safetensors instead"
            )
        data = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise UnreadableFile(f"the graph that the file holds is damaged: {error}") from error
    remove_abandoned(Path(path).parent, {Path(path).name})
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def _check(place: Place, tensor: FileTensor) -> None:
    """UnreadableFile where a tensor is not what the skeleton says of it."""
    if place.values is not None:
        fits = tensor.dtype == place.values[1] and tensor.values.ndim == 1
    else:
        dtype = numpy_dtype(place.holder)
        fits = (
            dtype is not None
            and dtype.name == tensor.dtype
            and tuple(place.holder.dims) == tensor.values.shape
        )
    if not fits:
        raise UnreadableFile(f"tensor {place.name!r} is not what the graph says: it is damaged")
