"""Take the weights out of any ``.onnx`` file, so that other weights can be bound to its graph.

Weights hide in initialisers, in ``Constant`` nodes, in the inner graphs of ``If``, ``Loop`` and
``Scan``, and in model-local functions. Functions that hold some are inlined; weights of inner
graphs move to the outer one, which inner graphs may read from (ONNX IR, "names within a graph"),
under a name that says where they were. What only shapes the computation (the target of a
``Reshape``, the bounds of a ``Clip``) stays, because runtimes want to see it while loading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from prunecast.common.text import first_line
from prunecast.compression.codec import TensorSpec
from prunecast.compression.files import FilesError
from prunecast.compression.files.onnx_files import (
    TensorReader,
    inner_graphs,
    read_proto,
)
from prunecast.compression.files.onnx_skeleton import subgraphs
from prunecast.compression.onnx import ForeignModel
from prunecast.compression.onnx.graph import (
    ExportedGraph,
    Uses,
    check_texts,
    initialisers,
    rename,
    replace_items,
    tensors,
    uses_of,
    value_names,
)

__all__ = ["LiftedModel", "lift_model"]

_LARGE = 1024  # bytes from which an integer constant is a weight
_LOWEST_IR = 4  # from here on an initialiser need not be an input

# Inputs that shape the computation: their constants stay in the graph.
_SHAPING: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "ConstantOfShape": (0,), "CumSum": (1,), "Dropout": (1, 2), "Expand": (1,),
    "If": (0,), "Loop": (0, 1), "NonMaxSuppression": (2, 3, 4), "OneHot": (1, 2),
    "Pad": (1, 2, 3), "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,),
    "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,),
}  # fmt: skip
# Inputs that are multiplied with activations or looked up: what may lose precision.
_KERNEL: dict[str, tuple[int, ...]] = {
    "Conv": (1,), "ConvTranspose": (1,), "Einsum": (0, 1), "FusedMatMul": (0, 1), "GRU": (1, 2),
    "Gather": (0,), "Gemm": (0, 1), "LSTM": (1, 2), "MatMul": (0, 1), "RNN": (1, 2),
}  # fmt: skip
# Operators that only move values: whoever reads their output reads the weight.
_MOVING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class LiftedModel:
    """A model taken apart.

    Attributes:
        graph: the architecture; weights go back in with `bind_weights`.
        arrays: the weights by name.
        kernels: those that may go on a lattice: floating, two or more dimensions, and read only
            where they are multiplied with activations or looked up.
        opset: version of the default operator set.
        notes: what a user should know, a sentence each.
    """

    graph: ExportedGraph
    arrays: Mapping[str, NDArray[Any]]
    kernels: frozenset[str]
    opset: int
    notes: tuple[str, ...] = ()


def lift_model(path: Path, *, max_bytes: int | None = None) -> LiftedModel:
    """Read an ``.onnx`` file and take its weights out.

    Args:
        path: of the file.
        max_bytes: most bytes that its tensors may take, see `TensorReader`.

    Raises:
        ForeignModel: damaged, or it refers to files outside its folder.
    """
    try:
        return _lift(Path(path), max_bytes)
    except FilesError as error:
        raise ForeignModel(str(error)) from error


def _lift(path: Path, max_bytes: int | None) -> LiftedModel:
    proto, reader = read_proto(path), TensorReader(path, max_bytes)
    if not proto.graph.output or not proto.opset_import:
        raise ForeignModel(f"{path} is not an .onnx model: it lacks outputs or an opset")
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            reader.place(tensor)
    reader.check(sum(map(reader.stated, tensors(proto))))
    check_texts(proto, path)
    notes = []
    inlined = any(_holds_weights(function, reader) for function in proto.functions)
    if inlined:
        count = len(proto.functions)
        proto = _inlined(proto, path)
        notes.append(f"{count} functions hold weights and were inlined")
    work = _Lifting(reader, value_names(proto))
    dropped = [i.name for i in proto.graph.input if i.name in initialisers(proto.graph)]
    work.lift(proto.graph, "", inner=False)
    if inlined:
        work.share(proto.graph)
    if not work.arrays:
        notes.append("no tensor holds weights: the model travels as it is, in model.onnx")
    taken = [n for n in work.arrays if {f"{n}::q", f"{n}::step", f"{n}::float32"} & work.names]
    if taken:
        raise ForeignModel(f"{path}: tensor {taken[0]!r} collides with a reserved name")
    if dropped:
        inputs = [i for i in proto.graph.input if i.name not in dropped]
        replace_items(proto.graph.input, inputs)
        if proto.ir_version >= _LOWEST_IR:
            notes.append(f"{len(dropped)} inputs with a default value are constants now")
    proto.ir_version = max(proto.ir_version, _LOWEST_IR)
    for graph in (proto.graph, *inner_graphs(proto.graph)):
        _tidy(graph)
    if work.foreign:
        notes.append(f"{work.foreign} tensors of a type without a coding stay in model.onnx")
    specs = {n: TensorSpec(np.dtype(a.dtype), a.shape) for n, a in work.arrays.items()}
    skeleton = proto.SerializeToString(deterministic=True)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return LiftedModel(
        ExportedGraph(skeleton, specs), work.arrays, frozenset(work.kernels), opset, tuple(notes)
    )


@dataclass
class _Lifting:
    """One pass over a model."""

    reader: TensorReader
    names: set[str]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    kernels: set[str] = field(default_factory=set)
    foreign: int = 0

    def lift(self, graph: Any, prefix: str, *, inner: bool) -> None:
        """Take the weights out of `graph` and of the graphs in it."""
        uses, renamed = uses_of(graph), {}
        inputs = {i.name for i in graph.input} if inner else set()
        outputs = {o.name for o in graph.output}
        seen: set[str] = set()
        kept, nodes = [], []
        sparse = [
            numpy_helper.from_array(self.reader.dense(s), s.values.name)
            for s in graph.sparse_initializer
        ]
        del graph.sparse_initializer[:]
        for item in (*graph.initializer, *sparse):
            if not item.name or item.name in seen:
                raise ForeignModel(f"two initialisers are named {item.name[:80]!r}")
            seen.add(item.name)
            wanted = item.name not in inputs and self._is_weight(item, uses, least=1)
            if wanted:
                renamed[item.name] = self._take(item, item.name, prefix, uses, outputs)
            else:
                self.reader.embed(item)
                kept.append(item)
        for node in graph.node:
            constant = self._constant(node)
            name = node.output[0] if node.output else ""
            if (
                name
                and constant is not None
                and self._is_weight(constant, uses, least=2, name=name)
            ):
                renamed[name] = self._take(constant, name, prefix, uses, outputs)
            else:
                nodes.append(node)
        if inner:  # an inner graph must make what it gives out
            nodes += [
                helper.make_node("Identity", [new], [old], name=f"{new}/given")
                for old, new in renamed.items()
                if old in outputs
            ]
        replace_items(graph.initializer, kept)
        replace_items(graph.node, nodes)
        if inner:
            rename(graph, renamed)
        for node in graph.node:
            for where, sub in subgraphs(node):
                label = node.name or next((o for o in node.output if o), node.op_type)
                self.lift(sub, f"{prefix}{label}.{where}/", inner=True)
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    self.reader.embed(attribute.t)

    def share(self, graph: Any) -> None:
        """Bring the copies that inlining made of a function's weights together again."""
        outputs = {o.name for o in graph.output}
        first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        renamed: dict[str, str] = {}
        for name, values in list(self.arrays.items()):
            key = (values.dtype.str, values.shape, hashlib.sha256(values.tobytes()).digest())
            leader = first.setdefault(key, name)
            if leader != name and values.ndim >= 2 and name not in outputs:
                renamed[name] = leader
                del self.arrays[name]
                self.kernels.discard(name)
        rename(graph, renamed)

    def _constant(self, node: Any) -> Any:
        """The tensor of a ``Constant`` node whose value is known, else None."""
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or not node.output:
            return None
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                return None
            if attribute.name == "value":
                return attribute.t
            if attribute.name == "value_floats":
                return numpy_helper.from_array(np.array(attribute.floats, np.float32))
            if attribute.name == "sparse_value":
                return numpy_helper.from_array(self.reader.dense(attribute.sparse_tensor))
        return None

    def _is_weight(self, proto: Any, uses: Uses, *, least: int, name: str = "") -> bool:
        size = self.reader.size(proto)
        if size < least:
            return False
        if not self.reader.plain(proto):
            self.foreign += size > 1
            return False
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
        if dtype.kind != "f" and size * dtype.itemsize < _LARGE:
            return False
        return not any(i in _SHAPING.get(op, ()) for op, i, _ in uses.get(name or proto.name, ()))

    def _take(self, proto: Any, name: str, prefix: str, uses: Uses, outputs: set[str]) -> str:
        new = name if not prefix else self._fresh(prefix + name)
        values = self.reader.array(proto)
        self.arrays[new] = values
        matrix = values.dtype.kind == "f" and values.ndim >= 2
        if matrix and name not in outputs and _multiplied(name, uses):
            self.kernels.add(new)
        return new

    def _fresh(self, wanted: str) -> str:
        name, count = wanted, 2
        while name in self.names or name in self.arrays:
            name, count = f"{wanted}_{count}", count + 1
        return name


def _multiplied(name: str, uses: Uses, depth: int = 8) -> bool:
    """Whether a value is read, and only where precision may be lost."""
    readers = uses.get(name, ())
    return bool(readers) and all(
        i in _KERNEL.get(op, ())
        or (op in _MOVING and i == 0 and depth > 0 and _multiplied(output, uses, depth - 1))
        for op, i, output in readers
    )


def _holds_weights(function: Any, reader: TensorReader) -> bool:
    for node in function.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.HasField("t") and reader.size(attribute.t) > 1:
                    return True
                if attribute.floats or attribute.HasField("sparse_tensor"):
                    return True
        for _, sub in subgraphs(node):
            if sub.initializer or sub.sparse_initializer or _holds_weights(sub, reader):
                return True
    return False


def _inlined(proto: Any, path: Path) -> Any:
    from onnx import inliner

    try:
        return inliner.inline_local_functions(proto)
    except Exception as error:  # onnx raises its checker's and plain RuntimeError
        raise ForeignModel(
            f"{path}: its functions cannot be inlined: {first_line(error)}"
        ) from error


def _tidy(graph: Any) -> None:
    """Remove what names a developer's disk; shapes, names and the model's own metadata stay."""
    graph.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
