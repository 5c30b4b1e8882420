"""What of a checkpoint is a weight, and along which axis it has its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from prunecast.compression.files.checkpoints import open_checkpoint
from prunecast.compression.files.formats import write_tensors
from prunecast.compression.files.pruning import (
    Pruning,
    PruningResult,
    default_targets,
    prune_checkpoint,
)
from prunecast.compression.files.tensors import FileTensor


def prune(path: Path, sparsity: float, **chosen: Any) -> PruningResult:
    checkpoint = open_checkpoint(path)
    return prune_checkpoint(checkpoint, default_targets(checkpoint), Pruning(sparsity, **chosen))


def drawn(shape: tuple[int, ...]) -> FileTensor:
    return FileTensor(np.random.default_rng(5).normal(size=shape).astype("f4"), "float32")


def test_scales_tokens_and_biases_of_any_shape_are_left(tmp_path: Path) -> None:
    shapes = {
        "layer.weight": (64, 64), "h.0.attn.bias": (1, 1, 40, 40), "head.weight": (1, 2000),
        "block.layer_scale": (2000, 1, 1), "class_token": (1, 1, 2000), "q_proj.scales": (32, 64),
        "conv.weight_g": (2000, 1), "blocks[0].weight": (40, 40),
    }  # fmt: skip
    write_tensors(tmp_path / "m.safetensors", {n: drawn(s) for n, s in shapes.items()})
    result = prune(tmp_path / "m.safetensors", 0.5, exclude=("blocks[0].weight",))
    assert {n for n, t in result.tensors.items() if t.removed} == {"layer.weight", "head.weight"}


def test_equal_integers_are_nobodys_tie(tmp_path: Path) -> None:
    """Nothing of them is pruned, so a pattern may name one of two."""
    ones = FileTensor(np.ones((20, 20), np.int32), "int32")
    layer = drawn((20, 20))
    write_tensors(tmp_path / "m.safetensors", {"a": ones, "b": ones, "layer": layer})
    assert prune(tmp_path / "m.safetensors", 0.5, exclude=("a",), min_size=1).removed == 200


def test_what_uses_a_weight_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Behind casts and transpositions, in inner graphs and functions, and of other operators."""
    node, info = helper.make_node, helper.make_tensor_value_info
    shapes = {
        "same": (8, 6), "cast": (8, 6), "turned": (6, 8), "twice": (8, 6), "up": (8, 6, 3),
        "inner": (8, 6), "shadowed": (6, 8), "called": (8, 6), "four": (1, 2, 8, 6),
        "gates": (1, 6, 8), "again": (1, 6, 8), "left": (6, 8),
    }  # fmt: skip
    rng = np.random.default_rng(2)
    arrays = {n: rng.normal(size=s).astype("f4") for n, s in shapes.items()}
    arrays["cast"] = arrays["cast"].astype("f2")
    own = numpy_helper.from_array(np.ones((6, 8), "f4"), "shadowed")
    inside = [node("MatMul", ["x", "inner"], ["i"]), node("MatMul", ["x", "shadowed"], ["j"])]
    then = helper.make_graph(inside, "then", [], [info("i", 1, None)], [own])
    calls = [node("MatMul", ["a", "b"], ["c"])]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    function = helper.make_function("f", "Linear", ["a", "b"], ["c"], calls, opsets[:1])
    nodes = [
        node("Identity", ["same"], ["same_"]),
        node("MatMul", ["x", "same_"], ["y1"]),
        node("Cast", ["cast"], ["cast_"], to=1),
        node("MatMul", ["x", "cast_"], ["y2"]),
        node("Transpose", ["turned"], ["turned_"], perm=[1, 0]),
        node("MatMul", ["x", "turned_"], ["y3"]),
        node("Transpose", ["twice"], ["twice_"]),
        node("Gemm", ["x", "twice_"], ["y4"], transB=1),
        node("ConvTranspose", ["x", "up"], ["y5"]),
        node("If", ["x"], ["y6"], then_branch=then, else_branch=then),
        node("Linear", ["x", "called"], ["y7"], domain="f"),
        node("MatMul", ["x", "four"], ["y8"]),
        node("LSTM", ["x", "gates", "again"], ["y9"], hidden_size=8),
        node("MatMul", ["left", "x"], ["y10"]),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    model = helper.make_model(graph, functions=[function], opset_imports=opsets)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    prune(tmp_path / "m.onnx", 0.5, pattern="2:4", min_size=1)
    for tensor in onnx.load(tmp_path / "m.pruned.onnx").graph.initializer:
        name, array = tensor.name, numpy_helper.to_array(tensor)
        groups = np.moveaxis(array != 0, shapes[name].index(8), -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all(), name
