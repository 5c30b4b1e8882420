"""GroupNorm in operators that onnxruntime has kernels for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.onnx.export import export_graph
from prunecast.compression.onnx.norms import spell_out_group_norms
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import PublishedModel, RawTensor


def _kinds(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.GroupNorm(4, 8), (2, 8, 5, 7)),
        (nn.GroupNorm(8, 8, eps=0.1), (2, 8, 6)),
        (nn.GroupNorm(1, 6), (2, 6, 3, 2, 2)),
        (nn.GroupNorm(2, 12), (2, 12)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU()), (2, 3, 8, 8)),
    ],
    ids=["image", "sequence", "volume", "vector", "network"],
)
def test_what_is_exported_computes_what_torch_does(
    module: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    graph = export_graph(module, (torch.randn(shape, generator=generator),))
    kinds = _kinds(onnx.ModelProto.FromString(graph.skeleton).graph)
    assert kinds["GroupNormalization"] == 0
    assert kinds["InstanceNormalization"] == 1
    assert kinds["Shape"] == 0  # sizes are known but for the batch
    weights = {n: RawTensor(t.numpy()) for n, t in module.state_dict().items()}
    bound = bind_weights(graph, PublishedModel(weights), tmp_path, variant="fp32")
    batch = 3 + 2 * torch.randn((5, *shape[1:]), generator=generator)
    (found,) = open_session(bound.model).run({"input": batch.numpy()}).values()
    assert np.abs(found - module(batch).detach().numpy()).max() < 1e-5


def _free(size: object, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    shape = ["n", 4, size, size] if size is not None else None
    values = [
        helper.make_tensor_value_info(name, dtype, kind)
        for name, kind in (("x", shape), ("g", [4]), ("b", [4]), ("y", shape))
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("GroupNormalization", ["a", "g", "b"], ["y"], num_groups=2, epsilon=0.5),
    ]
    inner = [] if shape is None else [helper.make_tensor_value_info("a", dtype, shape)]
    graph = helper.make_graph(nodes, "g", values[:3], values[3:], value_info=inner)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_sizes_that_are_free_are_asked_for_when_it_runs(tmp_path: Path) -> None:
    model = _free("size")
    onnx.save(model, tmp_path / "before.onnx")
    floats = TensorSpec(np.dtype(np.float32), (4,))
    spell_out_group_norms(model.graph, {"g": floats, "b": floats})
    assert _kinds(model.graph)["Shape"] == 1
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "after.onnx")
    rng = np.random.default_rng(1)
    scale = {name: rng.normal(size=4).astype(np.float32) for name in "gb"}
    for size in (3, 8):
        given = {"x": rng.normal(size=(2, 4, size, size)).astype(np.float32), **scale}
        one, other = (
            open_session(tmp_path / name).run(given)["y"] for name in ("before.onnx", "after.onnx")
        )
        assert np.abs(one - other).max() < 1e-5


@pytest.mark.parametrize("case", ["no shape", "float64", "no parameter"])
def test_a_norm_that_cannot_be_told_stays(case: str) -> None:
    model = _free(None if case == "no shape" else 6)
    before = model.SerializeToString()
    dtype = np.dtype(np.float64 if case == "float64" else np.float32)
    known = {} if case == "no parameter" else dict.fromkeys("gb", TensorSpec(dtype, (4,)))
    spell_out_group_norms(model.graph, known)
    assert model.SerializeToString() == before
