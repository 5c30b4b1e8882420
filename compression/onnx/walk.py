"""Walks over a parsed ``.onnx`` model: tensors, names, and who reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prunecast.compression.files.onnx_files import inner_graphs, subgraphs
from prunecast.compression.onnx import ForeignModel

__all__ = [
    "Uses",
    "check_texts",
    "initialisers",
    "rename",
    "replace_items",
    "tensors",
    "uses_of",
    "value_names",
]

Uses = dict[str, list[tuple[str, int, str]]]
"""Who reads each name: operator, number of the input, and the operator's first output."""


def tensors(proto: Any) -> Iterator[Any]:
    """Every tensor of a model, wherever it lies."""
    bodies = [proto.graph, *proto.functions]
    graphs = [*bodies, *(g for body in bodies for g in inner_graphs(body))]
    for graph in graphs:
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
    bodies = [proto.graph, *proto.functions]
    texts: list[object] = [o.domain for o in proto.opset_import]
    for graph in (*bodies, *(g for body in bodies for g in inner_graphs(body))):
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
