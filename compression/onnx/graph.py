"""An exported architecture, and walks over a parsed model: tensors, names, and who reads them.

An exported architecture is the graph without its weights, and what each weight must be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto

from prunecast.common.files import write_atomically
from prunecast.compression.codec import TensorSpec
from prunecast.compression.files.onnx_files import inner_graphs
from prunecast.compression.files.onnx_skeleton import subgraphs
from prunecast.compression.onnx import ExportError, ForeignModel

__all__ = [
    "ExportedGraph",
    "Uses",
    "all_graphs",
    "check_texts",
    "initialisers",
    "is_self_contained",
    "load_graph",
    "read_note",
    "rename",
    "replace_items",
    "save_graph",
    "tensors",
    "uses_of",
    "value_names",
    "with_note",
]

_KEY = "prunecast.graph"
_SCHEMA = 1


@dataclass(frozen=True)
class ExportedGraph:
    """One architecture, exported once; weights are bound to it as often as needed.

    Attributes:
        skeleton: serialised ONNX model whose parameters are referred to but not defined.
        parameters: initialisers that weights are bound to, in graph order: dtype and shape.
        aliases: other names of tied weights, each to the initialiser that holds the value.
        unused: tensors of the module that inference does not read (``num_batches_tracked``).
        max_difference: largest absolute difference between the graph in onnxruntime and the
            module, over the example inputs, with the module's weights and with perturbed ones.
        integers: parameters whose lattice integers the graph reads as int8, under ``<name>::q``;
            it computes their scale itself.
    """

    skeleton: bytes
    parameters: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    max_difference: float = 0.0
    integers: tuple[str, ...] = ()

    def names_of(self, parameter: str) -> tuple[str, ...]:
        """Every name under which a published model may carry `parameter`."""
        return (parameter, *(n for n, target in self.aliases.items() if target == parameter))


def save_graph(graph: ExportedGraph, path: Path) -> None:
    """Write the graph to one file, atomically; it is an ONNX model without its weights.

    Raises:
        StorageError: the file cannot be written.
    """
    note = {
        "schema": _SCHEMA,
        "parameters": [[n, s.dtype.name, list(s.shape)] for n, s in graph.parameters.items()],
        "aliases": dict(graph.aliases),
        "unused": list(graph.unused),
        "max_difference": graph.max_difference,
        "integers": list(graph.integers),
    }
    write_atomically(Path(path), with_note(graph, _KEY, json.dumps(note)).skeleton)


def with_note(graph: ExportedGraph, key: str, text: str) -> ExportedGraph:
    """The graph with a text that stays with it, into every `model.onnx` that is made of it."""
    model = ModelProto.FromString(graph.skeleton)
    model.metadata_props.add(key=key, value=text)
    return replace(graph, skeleton=model.SerializeToString(deterministic=True))


def read_note(data: bytes, key: str) -> str | None:
    """The text that `with_note` put into a skeleton or a `model.onnx`; None if there is none."""
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        return None
    return next((str(e.value) for e in model.metadata_props if e.key == key), None)


def load_graph(path: Path) -> ExportedGraph:
    """Read a file that `save_graph` wrote.

    Raises:
        ExportError: missing, damaged, or another kind of ONNX file.
    """
    try:
        model = ModelProto.FromString(Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise ExportError(f"cannot read the graph {path}: {error}") from error
    try:
        number, text = next(
            (i, e.value) for i, e in enumerate(model.metadata_props) if e.key == _KEY
        )
        document: dict[str, Any] = json.loads(text)
        if document["schema"] != _SCHEMA:
            raise ExportError(f"{path} is a graph of schema {document['schema']}, not {_SCHEMA}")
        del model.metadata_props[number]
        return ExportedGraph(
            model.SerializeToString(deterministic=True),
            {n: TensorSpec(np.dtype(t), tuple(shape)) for n, t, shape in document["parameters"]},
            dict(document["aliases"]),
            tuple(document["unused"]),
            float(document["max_difference"]),
            tuple(document.get("integers", ())),
        )
    except ExportError:
        raise
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path} is not a graph without weights: write it with save_graph"
        ) from error


def is_self_contained(graph: ExportedGraph) -> bool:
    """Whether no tensor of a graph lies in another file: whoever runs it would read that."""
    proto = ModelProto.FromString(graph.skeleton)
    return not any(t.external_data or t.data_location for t in tensors(proto))


Uses = dict[str, list[tuple[str, int, str]]]
"""Who reads each name: operator, number of the input, and the operator's first output."""


def all_graphs(proto: Any) -> Iterator[Any]:
    """The graph and the functions of a model, and all graphs inside them."""
    for body in (proto.graph, *proto.functions):
        yield body
        yield from inner_graphs(body)


def tensors(proto: Any) -> Iterator[Any]:
    """Every tensor of a model, wherever it lies."""
    for graph in all_graphs(proto):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                sparse_tensors = [*attribute.sparse_tensors]
                if attribute.HasField("sparse_tensor"):
                    sparse_tensors.append(attribute.sparse_tensor)
                for sparse in sparse_tensors:
                    yield from (sparse.values, sparse.indices)


def initialisers(graph: Any) -> set[str]:
    """Names of the initialisers, sparse ones included."""
    return {i.name for i in graph.initializer} | {s.values.name for s in graph.sparse_initializer}


def _defined(graph: Any) -> set[str]:
    names = {i.name for i in graph.input} | initialisers(graph)
    return names | {o for node in graph.node for o in node.output}


def value_names(proto: Any) -> set[str]:
    """Every value name in the graph and the graphs in it."""
    names: set[str] = set()
    for graph in (proto.graph, *inner_graphs(proto.graph)):
        names |= _defined(graph) | {i for node in graph.node for i in node.input}
    return names


def check_texts(proto: Any, path: Path) -> None:
    """Refuse names that are not UTF-8: protobuf hands them out as bytes.

    Raises:
        ForeignModel: there is one.
    """
    texts: list[object] = [o.domain for o in proto.opset_import]
    for graph in all_graphs(proto):
        for node in graph.node:
            texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
            texts += [a.name for a in node.attribute] + [a.ref_attr_name for a in node.attribute]
        for ends in (graph.input, graph.output):
            texts += [end if isinstance(end, str | bytes) else end.name for end in ends]
    texts += [tensor.name for tensor in tensors(proto)]
    if not all(isinstance(text, str) for text in texts):
        raise ForeignModel(f"{path} holds a name that is not UTF-8: it is damaged")


def uses_of(graph: Any) -> Uses:
    """Who reads each name: operator and input, in the graph and in the graphs in it."""
    uses: Uses = {}
    for node in graph.node:
        output = node.output[0] if node.output else ""
        for i, name in enumerate(node.input):
            uses.setdefault(name, []).append((node.op_type, i, output))
        for _, sub in subgraphs(node):
            own = _defined(sub)
            for name, readers in uses_of(sub).items():
                if name not in own:
                    uses.setdefault(name, []).extend(readers)
    return uses


def rename(graph: Any, renamed: Mapping[str, str]) -> None:
    """Let nodes read other names, also in inner graphs that do not define the old one."""
    if not renamed:
        return
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        for _, sub in subgraphs(node):
            own = _defined(sub)
            rename(sub, {old: new for old, new in renamed.items() if old not in own})


def replace_items(field: Any, items: Iterable[Any]) -> None:
    """Let a repeated field of messages hold `items`, of which some may be in it already."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)
