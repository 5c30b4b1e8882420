"""Integer arithmetic: what is computed, whose integers they are, what versions differ by."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from prunecast.compression.onnx import BindError, QuantisationError
from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.onnx.graph import ExportedGraph, load_graph, save_graph
from prunecast.compression.onnx.qdq import QuantisedModel, quantise
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    encode_delta,
    encode_keyframe,
)
from support.convolutional import (
    convolutional,
    convolutional_arrays,
    convolutional_graph,
    convolutional_images,
)

IMAGES = {"image": convolutional_images()}
KERNELS = ("stem", "conv", "mix", "head")


def _dense(number: int) -> PublishedModel:
    return PublishedModel({n: RawTensor(a) for n, a in convolutional_arrays(number).items()})


def _outputs(graph: ExportedGraph, model: PublishedModel, folder: Path) -> np.ndarray:
    bound = bind_weights(graph, model, folder, variant="fp32")
    return np.asarray(open_session(bound.model, threads=1).run(IMAGES)["logits"])


@pytest.fixture(scope="module")
def first() -> QuantisedModel:
    return quantise(convolutional_graph(), convolutional(1), IMAGES)


def test_the_device_computes_in_integers_close_to_floats(
    first: QuantisedModel, tmp_path: Path
) -> None:
    wanted = _outputs(convolutional_graph(), convolutional(1), tmp_path / "float")
    got = _outputs(first.graph, first.model, tmp_path / "int8")
    assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    path = str(tmp_path / "int8" / "model.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fused = [
        n.op_type for n in onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node
    ]
    assert fused.count("QLinearConv") == 2
    assert {"QLinearAdd", "MatMulIntegerToFloat", "QGemm"} <= set(fused)
    assert not {"Conv", "BatchNormalization", "MatMul", "Gemm"} & set(fused)
    onnx.checker.check_model(path)


def test_the_integers_are_the_published_ones(first: QuantisedModel) -> None:
    published = convolutional(1)
    assert (first.kernels, first.direct) == (4, 4)
    gains = np.sign(published["gamma"].dense())
    for name in KERNELS:
        before, after = published[name], first.model[name]
        assert isinstance(before, LatticeTensor)
        assert isinstance(after, LatticeTensor)
        sign = gains[:, None, None, None] if name == "stem" else 1
        assert np.array_equal(after.q, before.q * sign)
        assert after.step == before.step
    stem = first.model["stem::scale"].dense()
    root = np.sqrt(published["variance"].dense().astype(np.float64) + 1e-5)
    wanted = published["stem"].step * np.abs(published["gamma"].dense()) / root  # type: ignore[union-attr]
    alive = gains != 0
    assert np.allclose(stem[alive], wanted[alive], rtol=1e-6)
    offset = first.model["stem::offset"].dense()[~alive]  # the gain is zero, the bias stays
    scale = first.model["image_scale"].dense() * stem[~alive]
    assert np.allclose(offset * scale, published["beta"].dense()[~alive], rtol=1e-6)


def test_the_next_version_is_a_small_patch_and_the_same_graph(first: QuantisedModel) -> None:
    second = quantise(convolutional_graph(), convolutional(2), IMAGES, held=first.model)
    assert second.graph.skeleton == first.graph.skeleton
    assert second.fresh == ()
    assert {n for n in first.model if n.endswith(("_scale", "_zero_point"))} == {
        n
        for n in second.model
        if n.endswith(("_scale", "_zero_point"))
        and np.array_equal(first.model[n].dense(), second.model[n].dense())
    }
    patch = encode_delta(first.model, second.model, stream=b"x")
    assert len(patch) < 0.6 * len(encode_keyframe(second.model, stream=b"x"))
    anew = quantise(convolutional_graph(), convolutional(2), IMAGES)
    assert set(anew.fresh) >= {"image", "c", "f"}


def test_a_scale_that_no_longer_fits_is_measured_anew(first: QuantisedModel) -> None:
    brighter = {"image": 1.2 * IMAGES["image"]}
    second = quantise(convolutional_graph(), convolutional(1), brighter, held=first.model)
    assert "image" in second.fresh
    ratio = second.model["image_scale"].dense() / first.model["image_scale"].dense()
    assert ratio == pytest.approx(1.2, rel=1e-3)
    little = {"image": 1.04 * IMAGES["image"]}
    assert (
        "image"
        not in quantise(convolutional_graph(), convolutional(1), little, held=first.model).fresh
    )


@pytest.mark.parametrize("kind", ["dense", "wide lattice"])
def test_other_weights_get_steps_per_channel_that_are_held(kind: str, tmp_path: Path) -> None:
    def model(number: int) -> PublishedModel:
        return _dense(number) if kind == "dense" else convolutional(number, step=0.001)

    made = quantise(convolutional_graph(), model(1), IMAGES)
    assert (made.kernels, made.direct) == (4, 0)
    wanted = _outputs(convolutional_graph(), model(1), tmp_path / "float")
    got = _outputs(made.graph, made.model, tmp_path / "int8")
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    after = quantise(convolutional_graph(), model(2), IMAGES, held=made.model)
    assert after.graph.skeleton == made.graph.skeleton
    for name in KERNELS:
        base = made.model[f"{name}::base"].dense()
        assert len(base) == made.model[name].shape[0]
        assert np.array_equal(after.model[f"{name}::base"].dense(), base)
        if kind != "dense":
            shift = np.log2(base / np.float32(0.001))
            assert np.allclose(shift, np.rint(shift), atol=1e-5)
    grown = {**model(1).tensors, "head": RawTensor(3 * convolutional_arrays(1)["head"])}
    far = quantise(convolutional_graph(), PublishedModel(grown), IMAGES, held=made.model)
    ratio = far.model["head::base"].dense() / made.model["head::base"].dense()
    assert set(np.unique(ratio)) <= {2.0, 4.0}


def test_a_weight_that_outgrows_8_bits_changes_its_own_channel_alone(
    first: QuantisedModel,
) -> None:
    tensors = dict(convolutional(1).tensors)
    conv = tensors["conv"]
    assert isinstance(conv, LatticeTensor)
    wide = conv.q.astype(np.int32)
    wide[3, 0, 0, 0] = 200
    tensors["conv"] = LatticeTensor(wide, conv.step)
    grown = PublishedModel(tensors, 2)
    second = quantise(convolutional_graph(), grown, IMAGES, held=first.model)
    assert second.direct == 3
    before, after = first.model["conv"], second.model["conv"]
    assert isinstance(before, LatticeTensor)
    assert isinstance(after, LatticeTensor)
    changed = np.any(before.q != after.q, axis=(1, 2, 3))
    assert np.flatnonzero(changed).tolist() == [3]
    base = second.model["conv::base"].dense() / first.model["conv::base"].dense()
    assert base.tolist() == [1, 1, 1, 2, 1, 1, 1, 1]
    patch = encode_delta(
        first.model, second.model, stream=b"x"
    )  # the same tensors, so there is one
    assert len(patch) < 0.3 * len(encode_keyframe(second.model, stream=b"x"))


def test_the_same_bytes_in_another_process(first: QuantisedModel) -> None:
    code = (
        "import hashlib\n"
        "from prunecast.compression.onnx.qdq import quantise\n"
        "from support import convolutional as c\n"
        "images = {'image': c.convolutional_images()}\n"
        "q = quantise(c.convolutional_graph(), c.convolutional(1), images)\n"
        "print(hashlib.sha256(q.graph.skeleton).hexdigest(), q.model.digest.hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    skeleton = hashlib.sha256(first.graph.skeleton).hexdigest()
    assert done.stdout.split() == [skeleton, first.model.digest.hex()]


def test_a_quantised_graph_is_saved_and_bound_with_integers_alone(
    first: QuantisedModel, tmp_path: Path
) -> None:
    save_graph(first.graph, tmp_path / "g.onnx")
    again = load_graph(tmp_path / "g.onnx")
    assert again == first.graph
    assert again.integers == KERNELS
    wide = replace(first.model["stem"], q=np.full((8, 1, 3, 3), 300))  # type: ignore[type-var]
    with pytest.raises(BindError, match="reads 'stem' as int8"):
        bind_weights(again, PublishedModel({**first.model.tensors, "stem": wide}), tmp_path / "b")


def test_what_cannot_be_quantised_is_refused() -> None:
    graph, model = convolutional_graph(), convolutional(1)
    with pytest.raises(QuantisationError, match=r"the samples hold \['x'\]"):
        quantise(graph, model, {"x": IMAGES["image"]})
    with pytest.raises(QuantisationError, match="opset 11 cannot dequantise"):
        quantise(convolutional_graph(11), model, IMAGES)
    with pytest.raises(QuantisationError, match="cannot quantise the model"):
        quantise(graph, model, {"image": np.zeros((4, 2, 8, 8), np.float32)})
    proto = onnx.ModelProto.FromString(graph.skeleton)
    kept = [n for n in proto.graph.node if n.op_type == "Relu"][:1]
    kept[0].input[0], kept[0].output[0] = "image", "logits"
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    nothing = ExportedGraph(proto.SerializeToString(), {}, unused=tuple(model))
    with pytest.raises(QuantisationError, match="no weight can become integers"):
        quantise(nothing, model, IMAGES)
