"""A graph made ready for integer arithmetic: what can be folded is folded, by name.

Exported graphs keep every parameter under its own name, so a ``BatchNormalization`` follows its
convolution and a linear layer on three dimensions transposes its weight. Integer kernels take
neither. Three rewritings, none of which changes what the graph computes:

* a bias that is zero by construction is dropped (exporters expand one for a layer without bias);
* a ``BatchNormalization`` that alone reads a convolution is absorbed by it: the convolution then
  reads ``<weight>`` scaled per channel and a bias ``<weight>::bias``;
* a transposed weight that alone reads its parameter becomes an input of its own.

What to compute for these inputs stands in a `Kernel` each; `prunecast.compression.onnx.qdq` does
it, on floats for calibration and on integers for the release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from prunecast.compression.onnx.graph import ExportedGraph, replace_items, uses_of

__all__ = ["Kernel", "Norm", "Prepared", "drop_zero_biases", "prepare"]

_FLOAT = np.dtype(np.float32)
_STANDARD = ("", "ai.onnx")
_BIASED = ("Conv", "ConvTranspose", "Gemm")
_SAME_VALUES = ("Cast", "CastLike", "Expand", "Identity", "Reshape", "Unsqueeze")
# Operators that integers pass through, by the inputs that carry them; None: all of them.
_PASSING: dict[str, int | None] = {
    "Add": None, "AveragePool": 1, "Clip": 1, "Concat": None, "Flatten": 1,
    "GlobalAveragePool": 1, "MaxPool": 1, "Relu": 1, "Reshape": 1, "Squeeze": 1, "Transpose": 1,
    "Unsqueeze": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A ``BatchNormalization`` in evaluation mode: ``gamma * (x - mean) / sqrt(var + eps) + beta``.

    Attributes:
        gamma, beta, mean, variance: names of its parameters, each of shape (C,).
        epsilon: added to the variance.
    """

    gamma: str
    beta: str
    mean: str
    variance: str
    epsilon: float


@dataclass(frozen=True)
class Kernel:
    """One node whose weight can become integers.

    Attributes:
        node: its name in the prepared graph.
        source: the parameter, in the layout in which it is published.
        axis: the axis of `source` that counts output channels.
        weight: name of the weight that the node reads; `source`, or its transpose.
        perm: the permutation from `source` to `weight`, or None.
        offset: the parameter that is its bias, or None.
        bias: name of the bias that the node reads, or None.
        norm: what was folded into it, or None.
    """

    node: str
    source: str
    axis: int
    weight: str
    perm: tuple[int, ...] | None = None
    offset: str | None = None
    bias: str | None = None
    norm: Norm | None = None

    def gain_and_bias(
        self, values: Mapping[str, NDArray[Any]], channels: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Factor and bias of each channel, shape (channels,)."""
        bias = np.zeros(channels)
        if self.offset is not None:
            bias = values[self.offset].astype(np.float64)
        if self.norm is None:
            return np.ones(channels), bias
        norm = self.norm
        gamma, beta, mean, variance = (
            values[name].astype(np.float64)
            for name in (norm.gamma, norm.beta, norm.mean, norm.variance)
        )
        gain = gamma / np.sqrt(variance + norm.epsilon)
        return gain, (bias - mean) * gain + beta

    def folded(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """What the node reads, as floats."""
        weight = values[self.source].astype(np.float64)
        gain, bias = self.gain_and_bias(values, weight.shape[self.axis])
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        weight = weight * gain.reshape(shape)
        made = {self.weight: weight if self.perm is None else weight.transpose(self.perm)}
        if self.bias is not None:
            made[self.bias] = bias
        return {name: np.ascontiguousarray(v, np.float32) for name, v in made.items()}


@dataclass(frozen=True)
class Prepared:
    """A rewritten graph.

    Attributes:
        proto: the model; parameters are referred to but not defined.
        kernels: nodes that can compute in integers.
        passing: names of nodes that integers pass through on their way between kernels.
        parameters: names that the graph still reads as they are published.
    """

    proto: Any
    kernels: tuple[Kernel, ...]
    passing: tuple[str, ...]
    parameters: tuple[str, ...]


def prepare(graph: ExportedGraph) -> Prepared:
    """Fold what can be folded and say which nodes can compute in integers."""
    proto = onnx.ModelProto.FromString(graph.skeleton)
    body = proto.graph
    del body.value_info[:]
    for i, node in enumerate(body.node):
        node.name = f"{node.op_type}_{i}"
    drop_zero_biases(body)
    kernels = tuple(_kernels(body, graph))
    norms = {k.node: k for k in _fold_norms(body, kernels, graph)}
    kernels = tuple(norms.get(k.node, k) for k in kernels)
    transposed = {k.weight for k in kernels if k.perm is not None}
    replace_items(body.node, [n for n in body.node if not transposed.intersection(n.output)])
    _remove_dead(body)
    folded = {name for k in kernels for name in (k.weight, k.bias) if name}
    read = {name for name in uses_of(body) if name in graph.parameters and name not in folded}
    parameters = tuple(name for name in graph.parameters if name in read)
    return Prepared(proto, kernels, tuple(_passing(body, kernels)), parameters)


def _producers(body: Any) -> dict[str, Any]:
    return {output: node for node in body.node for output in node.output if output}


def _readers(body: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in body.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _alone(name: str, body: Any, uses: Mapping[str, list[Any]]) -> bool:
    """Whether one node reads a value and nobody else, inner graphs included."""
    return len(uses.get(name, ())) == 1 and all(o.name != name for o in body.output)


def drop_zero_biases(body: Any) -> None:
    """Remove biases that are zero by construction, whatever the weights, and nodes without readers.

    torch's exporter computes one for a layer without bias (``CastLike``, ``Expand``), and
    onnxruntime turns that into a constant only after its fusions, which therefore do not happen.

    Args:
        body: the graph, changed in place; a bias that is a parameter must not be defined in it.
    """
    made = _producers(body)
    constants = {i.name: i for i in body.initializer}
    for node in body.node:
        if node.op_type in _BIASED and node.domain in _STANDARD and len(node.input) == 3:
            name, at = node.input[2], None
            while (at := made.get(name)) is not None and at.op_type in _SAME_VALUES:
                name = at.input[0]
            if _zero(at, constants.get(name)):
                del node.input[2]
    _remove_dead(body)


def _zero(node: Any, constant: Any) -> bool:
    if node is not None and node.op_type == "Constant":
        constant = next((a.t for a in node.attribute if a.name == "value"), None)
    if constant is None or constant.data_location == onnx.TensorProto.EXTERNAL:
        return False
    return not np.any(numpy_helper.to_array(constant))


def _remove_dead(body: Any) -> None:
    """Remove nodes whose outputs nobody reads, and constants likewise."""
    outputs = {o.name for o in body.output}
    while True:
        read = set(uses_of(body)) | outputs
        kept = [node for node in body.node if any(o in read for o in node.output)]
        if len(kept) == len(body.node):
            break
        replace_items(body.node, kept)
    replace_items(body.initializer, [i for i in body.initializer if i.name in read])


def _kernels(body: Any, graph: ExportedGraph) -> Iterator[Kernel]:
    made, uses = _producers(body), uses_of(body)

    def owned(name: str, dims: int | None = None) -> bool:
        spec = graph.parameters.get(name)
        if spec is None or spec.dtype != _FLOAT or not _alone(name, body, uses):
            return False
        return bool(np.prod(spec.shape)) and (dims is None or len(spec.shape) == dims)

    for node in body.node:
        if node.domain not in _STANDARD or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight, perm, axis = node.input[1], None, 0
        dims = None if node.op_type == "Conv" else 2
        offset = node.input[2] if len(node.input) == 3 and node.input[2] else None
        if offset is not None and not owned(offset, 1):
            continue
        if node.op_type == "Gemm":
            if (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
                continue
            axis = 0 if attributes.get("transB", 0) else 1
        source, moved = weight, made.get(weight)
        if node.op_type == "MatMul":
            axis = 1
            if moved is not None and _alone(weight, body, uses) and _swaps(moved):
                source, perm, axis = moved.input[0], (1, 0), 0
        if not owned(source, dims):
            continue
        if offset is not None and graph.parameters[offset].shape != (
            graph.parameters[source].shape[axis],
        ):
            continue
        yield Kernel(node.name, source, axis, weight, perm, offset, offset)


def _swaps(node: Any) -> bool:
    perms = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return node.op_type == "Transpose" and perms in ([], [[1, 0]])


def _fold_norms(body: Any, kernels: tuple[Kernel, ...], graph: ExportedGraph) -> Iterator[Kernel]:
    uses, readers = uses_of(body), _readers(body)
    nodes = {node.name: node for node in body.node}
    for kernel in kernels:
        node = nodes[kernel.node]
        if node.op_type != "Conv" or not _alone(node.output[0], body, uses):
            continue
        norm = readers[node.output[0]][0]
        attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
        if norm.op_type != "BatchNormalization" or attributes.get("training_mode", 0):
            continue
        gamma, beta, mean, variance = norm.input[1:5]
        if any(name not in graph.parameters for name in norm.input[1:5]):
            continue
        if any(output for output in norm.output[1:]):
            continue
        bias = f"{kernel.source}::bias"
        node.input[:] = [node.input[0], node.input[1], bias]
        node.output[0] = norm.output[0]
        norm.output[0] = f"{norm.output[0]}::folded"  # dead now
        epsilon = float(attributes.get("epsilon", 1e-5))
        yield replace(kernel, bias=bias, norm=Norm(gamma, beta, mean, variance, epsilon))


def _passing(body: Any, kernels: tuple[Kernel, ...]) -> Iterator[str]:
    own = {k.node for k in kernels}
    integer: set[str] = set()
    for node in body.node:
        if node.name in own:
            integer.update(node.output if node.op_type == "Conv" else ())
        elif node.op_type in _PASSING and node.domain in _STANDARD:
            carrying = node.input[: _PASSING[node.op_type]]
            if all(name in integer for name in carrying):
                integer.update(node.output)
                yield node.name
