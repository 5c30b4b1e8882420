"""A repository with a tiny model: two good releases, and one that no device reproduces."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
from onnx import TensorProto, helper

import prunecast.server.repository.authoring.build as build
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import LatticeTensor, PublishedModel
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import ReleaseContents

NAME = "tiny"
INPUTS, OUTPUTS = 16, 4


def make_repository(folder: Path, seed: int) -> Repository:
    """Releases 1 and 2, which are good, and 3, whose self-test fails on every device."""
    repository = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((2, INPUTS)).astype(np.float32)
    graph = _graph()
    for number in (1, 2, 3):
        weights = rng.integers(-60, 61, (OUTPUTS, INPUTS)).astype(np.int32)
        model = PublishedModel({"w": LatticeTensor(weights, 0.01)}, number)
        real = build.pack_arrays
        wrong = mock.patch.object(
            build, "pack_arrays", lambda arrays, real=real: real(_shifted(arrays))
        )
        if number == 3:
            with wrong:
                repository.publish(NAME, ReleaseContents(model, graph, images))
        else:
            repository.publish(NAME, ReleaseContents(model, graph, images))
    return repository


def _shifted(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The recorded outputs, which then are not the model's."""
    return {name: a + 1 if name == "output" else a for name, a in arrays.items()}


def _graph() -> ExportedGraph:
    node = helper.make_node("Gemm", ["input", "w"], ["output"], transB=1)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("input", INPUTS), ("output", OUTPUTS))
    ]
    body = helper.make_graph([node], NAME, ends[:1], ends[1:])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    spec = TensorSpec(np.dtype(np.float32), (OUTPUTS, INPUTS))
    return ExportedGraph(proto.SerializeToString(), {"w": spec})
