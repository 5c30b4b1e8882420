"""A small residual network as exporters write one, and versions of its weights; needs no torch."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor

CLASSES, WIDTH = 5, 8
_SHAPES: dict[str, tuple[int, ...]] = {
    "stem": (WIDTH, 1, 3, 3),
    "gamma": (WIDTH,), "beta": (WIDTH,), "mean": (WIDTH,), "variance": (WIDTH,),
    "conv": (WIDTH, WIDTH, 3, 3), "conv_bias": (WIDTH,),
    "mix": (16, WIDTH),
    "head": (CLASSES, 16), "head_bias": (CLASSES,),
}  # fmt: skip


def convolutional_graph(opset: int = 21) -> ExportedGraph:
    """Convolution with BatchNorm and a bias of zeros, a residual, a transposed weight, a head."""
    float32 = TensorProto.FLOAT
    square = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Shape", ["stem"], ["count"], start=0, end=1),
        helper.make_node("Expand", ["nothing", "count"], ["zeros"]),
        helper.make_node("Conv", ["image", "stem", "zeros"], ["a"], **square),
        helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "variance"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "conv", "conv_bias"], ["d"], **square),
        helper.make_node("Add", ["c", "d"], ["e"]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("Transpose", ["mix"], ["mix_turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "mix_turned"], ["i"]),
        helper.make_node("Tanh", ["i"], ["j"]),
        helper.make_node("Gemm", ["j", "head", "head_bias"], ["logits"], transB=1),
    ]
    body = helper.make_graph(
        nodes,
        "convolutional",
        [helper.make_tensor_value_info("image", float32, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", float32, ["batch", CLASSES])],
        [numpy_helper.from_array(np.zeros((), np.float32), "nothing")],
    )
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    single = np.dtype(np.float32)
    specs = {name: TensorSpec(single, shape) for name, shape in _SHAPES.items()}
    return ExportedGraph(proto.SerializeToString(), specs)


def convolutional_arrays(number: int = 0) -> dict[str, np.ndarray]:
    """Weights that drift a little from version to version; two gains are negative, one is zero."""
    rng = np.random.default_rng(5)
    arrays = {n: rng.standard_normal(s) / max(1, np.prod(s[1:])) ** 0.5 for n, s in _SHAPES.items()}
    arrays["variance"] = np.abs(arrays["variance"]) + 0.5
    arrays["gamma"] = np.array([1.0, -0.8, 1.2, 0.9, -1.1, 0.0, 1.0, 0.7])
    for _ in range(number):
        arrays = {n: a + 0.002 * rng.standard_normal(a.shape) * (a != 0) for n, a in arrays.items()}
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def convolutional(number: int = 0, step: float = 0.01) -> PublishedModel:
    """Version `number` on a lattice; what has one dimension is raw."""
    return PublishedModel(
        {
            name: LatticeTensor(np.rint(a / step).astype(np.int32), step)
            if a.ndim > 1
            else RawTensor(a)
            for name, a in convolutional_arrays(number).items()
        },
        number,
    )


def convolutional_images(count: int = 48) -> np.ndarray:
    """Images that the activations are measured on."""
    return np.random.default_rng(6).standard_normal((count, 1, 8, 8)).astype(np.float32)
