"""GroupNorm in operators that onnxruntime has kernels for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx.graph import replace_items

__all__ = ["spell_out_group_norms"]

_FLOAT = np.dtype(np.float32)


def spell_out_group_norms(body: Any, parameters: Mapping[str, TensorSpec]) -> None:
    """Write every ``GroupNormalization`` as ``InstanceNormalization`` of its groups.

    onnxruntime has no kernel for the former on a CPU: it computes what ONNX defines it by, some
    twenty operators, which take longer than the convolution before it. Groups become channels, are
    normalised (Wu and He 2018, equation 1), and become channels again, which are scaled as before.

    Args:
        body: the graph, changed in place, with the shapes of values that the exporter states; a
            norm of unknown number of axes, or not of float32 parameters, stays.
        parameters: of the graph, by name.
    """
    stated = (*body.input, *body.value_info)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in stated}
    nodes: list[Any] = []
    for number, node in enumerate(body.node):
        dims = shapes.get(node.input[0]) if node.op_type == "GroupNormalization" else None
        specs = [parameters.get(name) for name in node.input[1:3]] if dims else []
        if dims and all(spec is not None and spec.dtype == _FLOAT for spec in specs):
            nodes += _spelled_out(node, f"group_norm_{number}", dims)
        else:
            nodes.append(node)
    replace_items(body.node, nodes)


def _spelled_out(node: Any, stem: str, dims: Any) -> Iterator[Any]:
    given, scale, bias = node.input
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups = attributes["num_groups"]

    def constant(name: str, values: Any, dtype: Any = np.int64) -> Any:
        value = numpy_helper.from_array(np.array(values, dtype), f"{stem}.{name}")
        return helper.make_node("Constant", [], [f"{stem}.{name}"], value=value)

    def made(kind: str, inputs: list[str], output: str, **more: Any) -> Any:
        return helper.make_node(kind, inputs, [output], name=f"{output}.node", **more)

    yield constant("groups", [0, groups, -1])
    yield constant("ones", np.ones(groups), np.float32)
    yield constant("zeros", np.zeros(groups), np.float32)
    yield constant("channel", [-1] + [1] * (len(dims) - 2))
    yield made("Reshape", [given, f"{stem}.groups"], f"{stem}.in_groups")
    epsilon = float(attributes.get("epsilon", 1e-5))
    parts = [f"{stem}.in_groups", f"{stem}.ones", f"{stem}.zeros"]
    yield made("InstanceNormalization", parts, f"{stem}.normal", epsilon=epsilon)
    if all(dim.HasField("dim_value") for dim in dims[1:]):
        yield constant("shape", [0, *(dim.dim_value for dim in dims[1:])])
    else:
        yield made("Shape", [given], f"{stem}.shape")
    yield made("Reshape", [f"{stem}.normal", f"{stem}.shape"], f"{stem}.in_channels")
    for name, source in (("scale", scale), ("bias", bias)):
        yield made("Reshape", [source, f"{stem}.channel"], f"{stem}.{name}")
    yield made("Mul", [f"{stem}.in_channels", f"{stem}.scale"], f"{stem}.scaled")
    yield made("Add", [f"{stem}.scaled", f"{stem}.bias"], node.output[0])
