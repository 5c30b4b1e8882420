"""A small classifier as a ready graph, and versions of its weights; needs no torch."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor

WIDTHS = (12, 64, 5)


def classifier_graph() -> ExportedGraph:
    """Two linear layers with a ReLU between them."""
    gemm = {"transB": 1}
    nodes = [
        helper.make_node("Gemm", ["input", "w1", "b1"], ["h"], **gemm),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["output"], **gemm),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("input", WIDTHS[0]), ("output", WIDTHS[2]))
    ]
    body = helper.make_graph(nodes, "classifier", ends[:1], ends[1:])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    single = np.dtype(np.float32)
    parameters = {
        "w1": TensorSpec(single, (WIDTHS[1], WIDTHS[0])),
        "b1": TensorSpec(single, (WIDTHS[1],)),
        "w2": TensorSpec(single, (WIDTHS[2], WIDTHS[1])),
        "b2": TensorSpec(single, (WIDTHS[2],)),
    }
    return ExportedGraph(proto.SerializeToString(), parameters)


def classifier(number: int) -> PublishedModel:
    """Version `number` of a model that drifts a little from version to version."""
    rng = np.random.default_rng(7)
    w1 = rng.integers(-60, 61, (WIDTHS[1], WIDTHS[0])) * (rng.random((WIDTHS[1], WIDTHS[0])) < 0.3)
    w2 = rng.integers(-60, 61, (WIDTHS[2], WIDTHS[1]))
    for _ in range(number):
        w1 = w1 + (rng.random(w1.shape) < 0.05) * rng.integers(-2, 3, w1.shape) * (w1 != 0)
        w2 = w2 + (rng.random(w2.shape) < 0.05) * rng.integers(-2, 3, w2.shape)
    b1 = rng.standard_normal(WIDTHS[1]).astype(np.float32)
    b2 = rng.standard_normal(WIDTHS[2]).astype(np.float32)
    return PublishedModel(
        {
            "w1": LatticeTensor(w1.astype(np.int32), 0.01, pruned=True),
            "b1": RawTensor(b1),
            "w2": LatticeTensor(w2.astype(np.int32), 0.02),
            "b2": RawTensor(b2),
        },
        number,
    )


def classifier_inputs() -> np.ndarray:
    """Four examples."""
    return np.random.default_rng(3).standard_normal((4, WIDTHS[0])).astype(np.float32)
