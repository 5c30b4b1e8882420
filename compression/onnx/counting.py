"""Count what an exported graph computes for one example."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto, helper

from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.onnx.graph import ExportedGraph, initialisers
from prunecast.compression.pruning.operations import Operations, Tally, contracted
from prunecast.compression.release.runtime import one_example, open_session
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import PublishedModel

__all__ = ["count_graph"]

_SAME = frozenset(
    {"Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice"}
    | {"Concat", "DequantizeLinear", "Split"}
)
"""What rearranges weights on their way to the node that multiplies them."""

_COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
Shape = tuple[int, ...]


def count_graph(graph: ExportedGraph, model: PublishedModel, inputs: Arrays) -> Operations:
    """Multiply-accumulates of one example, see `Operations`.

    The graph is run once, for the shapes of everything in it.

    Args:
        graph: before it is quantised.
        model: any weights that fit it.
        inputs: by name; where the batch is free the first example alone is run.

    Raises:
        BindError: the weights do not fit.
        RuntimeFailure: onnxruntime refuses the graph, or the inputs.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = bind_weights(graph, model, Path(folder), variant="fp32").model
        proto = ModelProto.FromString(file.read_bytes())
        known = {tensor.name for tensor in (*proto.graph.input, *proto.graph.output)}
        known |= initialisers(proto.graph)
        wanted = dict.fromkeys(
            name
            for node in proto.graph.node
            if node.op_type in _COUNTED
            for name in (*node.input, *node.output[:1])
            if name and name not in known
        )
        proto.graph.output.extend(map(helper.make_empty_tensor_value_info, wanted))
        file.write_bytes(proto.SerializeToString())
        session = open_session(file, threads=1, optimise=False)
        given = one_example(session, inputs)
        found = {**given, **session.run(given)}
    shapes = {name: values.shape for name, values in found.items()}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    return _Counter(proto.graph, graph, shapes).found()


class _Counter:
    def __init__(self, body: Any, graph: ExportedGraph, shapes: Mapping[str, Shape]) -> None:
        self._graph, self._body, self._shapes = graph, body, shapes
        self._made = {name: node for node in body.node for name in node.output}
        self._tally = Tally()

    def found(self) -> Operations:
        """Everything, node by node."""
        for node in self._body.node:
            for factors, macs in self._products(node):
                self._add(factors, macs)
            if node.op_type in _COUNTED:
                self._move(node)
        return self._tally.found(self._size)

    def _products(self, node: Any) -> Iterator[tuple[list[str], int]]:
        """What a node multiplies: the names of the factors, weights last, and how often."""
        kind = node.op_type
        if kind == "Conv":
            weight = self._shapes[node.input[1]]
            places = math.prod(self._shapes[node.output[0]][2:])
            yield [*node.input[:2]], math.prod(weight) * places
        elif kind == "ConvTranspose":
            places = math.prod(self._shapes[node.input[0]][2:])
            yield [*node.input[:2]], math.prod(self._shapes[node.input[1]]) * places
        elif kind in ("Gemm", "MatMul"):
            first = self._shapes[node.input[0]]
            inner = first[0 if kind == "Gemm" and _attribute(node, "transA") else -1]
            yield [*node.input[:2]], math.prod(self._shapes[node.output[0]]) * inner
        elif kind == "Einsum" and len(node.input) == 2:
            equation = _attribute(node, "equation").decode()
            pairs = contracted(equation, [self._shapes[name] for name in node.input])
            yield [*node.input], math.prod(self._shapes[node.output[0]]) * pairs
        elif kind in ("LSTM", "GRU", "RNN"):
            steps = math.prod(self._shapes[node.input[0]][:2])
            for weight in node.input[1:3]:
                yield [weight], math.prod(self._shapes[weight]) * steps

    def _add(self, factors: list[str], macs: int) -> None:
        for factor in reversed(factors):
            names = self._weights(factor)
            if names:
                total = sum(map(self._size, names))
                for name in names:  # weights that were joined share by their sizes
                    self._tally.add(name, round(macs * self._size(name) / total))
                return
        self._tally.add(None, macs)

    def _weights(self, name: str) -> list[str]:
        """The parameters that a value is rearranged from; none for any other value."""
        if name in self._graph.parameters:
            return [name]
        if name.removesuffix("::q") in self._graph.parameters:
            return [name.removesuffix("::q")]
        node = self._made.get(name)
        if node is None or node.op_type not in _SAME:
            return []
        some = node.input if node.op_type == "Concat" else node.input[:1]
        found = [self._weights(part) for part in some]
        return list(dict.fromkeys(n for names in found for n in names)) if all(found) else []

    def _size(self, name: str) -> int:
        return math.prod(self._graph.parameters[name].shape)

    def _move(self, node: Any) -> None:
        names = [n for n in (*node.input[:2], node.output[0]) if n and not self._weights(n)]
        self._tally.move(sum(math.prod(self._shapes[name]) for name in names))


def _attribute(node: Any, name: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
