"""Releases in memory, ready to be served: the small classifier, and one input of every dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, save

from prunecast.client.edge.slots.slot import LoadedRelease
from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.release.manifest import FileRef, ReleaseManifest
from prunecast.compression.release.runtime import InferenceSession, open_session
from prunecast.compression.release.selftest import Tolerance
from support.classifier import classifier, classifier_graph

__all__ = ["DTYPES", "classifier_outputs", "echo_release", "loaded_release"]

DTYPES = {
    "b": np.dtype("bool"),
    "u": np.dtype("uint8"),
    "i": np.dtype("int64"),
    "h": np.dtype("float16"),
    "f": np.dtype("float32"),
    "d": np.dtype("float64"),
}


def loaded_release(number: int, folder: Path) -> LoadedRelease:
    """Version `number` of the classifier as release ``toy``."""
    bound = bind_weights(classifier_graph(), classifier(number), folder / str(number))
    return _loaded("toy", number, open_session(bound.model, threads=1))


def classifier_outputs(number: int, x: np.ndarray) -> np.ndarray:
    """What version `number` must answer, in numpy."""
    a = classifier(number).arrays()
    return np.maximum(x @ a["w1"].T + a["b1"], 0) @ a["w2"].T + a["b2"]


def echo_release(folder: Path) -> LoadedRelease:
    """Gives back every input: ``b`` comes out as ``b_out``, and so on; any shape of two axes."""

    def ends(suffix: str) -> list[object]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(dtype) for name, dtype in DTYPES.items()}
        return [
            helper.make_tensor_value_info(name + suffix, kind, ["rows", 3])
            for name, kind in kinds.items()
        ]

    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in DTYPES]
    nodes.append(helper.make_node("Log", ["f"], ["log"]))
    outputs = [
        *ends("_out"),
        helper.make_tensor_value_info("log", TensorProto.FLOAT, ["rows", 3]),
    ]
    body = helper.make_graph(nodes, "echo", ends(""), outputs)
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    save(proto, folder / "echo.onnx")
    return _loaded("echo", 1, open_session(folder / "echo.onnx", threads=1))


def _loaded(name: str, version: int, session: InferenceSession) -> LoadedRelease:
    nothing = FileRef("0" * 64, 0)
    manifest = ReleaseManifest(
        name=name,
        version=version,
        created="2026-01-01T00:00:00Z",
        model_digest="0" * 64,
        counter=version,
        variant="lattice",
        inputs=session.inputs,
        outputs=session.outputs,
        files={},
        weights=nothing,
        keyframe=nothing,
        patches=(),
        tolerance=Tolerance(1e-5),
    )
    return LoadedRelease(manifest, session, 0.0)
