"""Models that never end, or take all memory, and slots that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from prunecast.compression.release.manifest import RELEASE_FILES, FileRef, ReleaseManifest
from prunecast.compression.release.runtime import Signature
from prunecast.compression.release.selftest import Tolerance, pack_arrays
from support import foreign

__all__ = ["INPUTS", "endless", "endless_in_function", "folding", "hungry", "make_slot", "outer"]

INPUTS = {"x": np.ones((3, 4), np.float32)}
_ENDS = [foreign.value("x", "n", 4)], [foreign.value("y", "n", 4)]
_TURNS = foreign.tensor(np.array(2**62), "turns")
_TRUE = foreign.tensor(np.array(True), "true")


def _loop(given: str, result: str) -> onnx.NodeProto:
    """Sine of sine of sine, 2^62 times."""
    kinds = [("i", TensorProto.INT64), ("c", TensorProto.BOOL), ("a", TensorProto.FLOAT)]
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds]
    inputs[0] = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    inputs[1] = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    outputs = [
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("sine", TensorProto.FLOAT, None),
    ]
    nodes = [helper.make_node("Identity", ["c"], ["go"]), helper.make_node("Sin", ["a"], ["sine"])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    return helper.make_node("Loop", ["turns", "true", given], [result], body=body)


def endless() -> onnx.ModelProto:
    """An inference that never ends; it has a weight, so that it can be released."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), _loop("m", "y")]
    return foreign.model(nodes, *_ENDS, [_TURNS, _TRUE, foreign.tensor(np.eye(4, dtype="f4"), "w")])


def endless_in_function() -> onnx.ModelProto:
    """The same in a branch of an ``If`` in a function."""
    branch = helper.make_graph(
        [_loop("x", "z")], "then", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z2"])],
        "else",
        [],
        [helper.make_tensor_value_info("z2", TensorProto.FLOAT, None)],
    )
    nodes = [
        foreign.constant(np.array(2**62), "turns"),
        foreign.constant(np.array(True), "true"),
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["which"], to=TensorProto.BOOL),
        helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=other),
    ]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "Endless", ["x"], ["y"], nodes, opsets)
    call = helper.make_node("Endless", ["x"], ["y"], domain="own")
    return foreign.model([call], *_ENDS, [], functions=(function,))


def folding() -> onnx.ModelProto:
    """A load that takes hours: constants are multiplied while the model is loaded."""
    side = foreign.tensor(np.array([4096, 4096]), "side")
    step = foreign.tensor(np.array([1e-5], np.float32), "")
    nodes = [helper.make_node("ConstantOfShape", ["side"], ["c0"], value=step)]
    nodes += [helper.make_node("MatMul", [f"c{i}"] * 2, [f"c{i + 1}"]) for i in range(2000)]
    nodes += [
        helper.make_node("ReduceSum", ["c2000"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return foreign.model(nodes, *_ENDS, [side])


def hungry(values: int) -> onnx.ModelProto:
    """A model of 200 bytes with so many float32 constants."""
    count = foreign.tensor(np.array([values]), "count")
    one = foreign.tensor(np.array([1], np.float32), "")
    nodes = [
        helper.make_node("ConstantOfShape", ["count"], ["c"], value=one),
        helper.make_node("Gather", ["c", "count0"], ["first"]),
        helper.make_node("Gather", ["c", "at"], ["any"]),
        helper.make_node("Mul", ["x", "any"], ["scaled"]),
        helper.make_node("Add", ["scaled", "first"], ["y"]),
    ]
    nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0))
    nodes.insert(1, helper.make_node("Cast", ["most"], ["at"], to=TensorProto.INT64))
    return foreign.model(nodes, *_ENDS, [count, foreign.tensor(np.array(0), "count0")])


def outer() -> onnx.ModelProto:
    """Takes the square of its rows: x[n,4] becomes [n,n] on the way to y[n,4]."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["square"]),
        helper.make_node("Sin", ["square"], ["sines"]),
        helper.make_node("ReduceSum", ["sines"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return foreign.model(nodes, *_ENDS, [])


def make_slot(
    folder: Path, model: onnx.ModelProto, expected: np.ndarray | None = None
) -> ReleaseManifest:
    """Write a slot whose self-test asks `model` for `INPUTS`."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "weights.bin").write_bytes(b"")
    (folder / "selftest.npz").write_bytes(pack_arrays(INPUTS))
    outputs = {"y": INPUTS["x"] if expected is None else expected}
    (folder / "expected.npz").write_bytes(pack_arrays(outputs))
    nothing = FileRef("0" * 64, 0)
    manifest = ReleaseManifest(
        name="toy",
        version=2,
        created="2026-01-01T00:00:00Z",
        model_digest="0" * 64,
        counter=2,
        variant="fp32",
        inputs=(Signature("x", "float32", ("n", 4)),),
        outputs=(Signature("y", "float32", ("n", 4)),),
        files=dict.fromkeys(RELEASE_FILES, nothing),
        weights=nothing,
        keyframe=nothing,
        patches=(),
        tolerance=Tolerance(1e-5),
    )
    (folder / "release.json").write_bytes(manifest.to_bytes())
    return manifest
