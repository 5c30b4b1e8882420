from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prunecast.compression.onnx import BindError
from prunecast.compression.onnx.bind import (
    bind_weights,
    explain_names,
    export_single,
    single_file_size,
)
from prunecast.compression.onnx.export import export_graph
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor

Publish = Callable[..., PublishedModel]


def _run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return open_session(path, threads=1).run(inputs)["output"]


def _images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 1, 6, 6)).astype(np.float32)


def test_variants_and_single_file_agree_bit_for_bit(
    conv_graph: ExportedGraph, conv_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    model = published(conv_module)
    lattice = bind_weights(conv_graph, model, tmp_path / "lattice")
    dense = bind_weights(conv_graph, model, tmp_path / "fp32", variant="fp32")
    for bound, name in ((dense, "one.onnx"), (lattice, "small.onnx")):
        export_single(bound.model.read_bytes(), bound.layout, model, tmp_path / name)
    x = {"input": _images(7)}
    want = _run(dense.model, x)
    for path in (lattice.model, tmp_path / "one.onnx", tmp_path / "small.onnx"):
        assert _run(path, x).tobytes() == want.tobytes()
    assert lattice.weights.stat().st_size < dense.weights.stat().st_size / 2


def test_graph_computes_what_the_module_computes_with_published_weights(
    conv_graph: ExportedGraph, conv_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    model = published(conv_module, step=0.05)
    bound = bind_weights(conv_graph, model, tmp_path)
    state = {name: torch.from_numpy(np.array(a)) for name, a in model.arrays().items()}
    x = _images(5)
    conv_module.eval()
    with torch.no_grad():
        want = torch.func.functional_call(conv_module, state, (torch.from_numpy(x),)).numpy()
    got = _run(bound.model, {"input": x})
    assert np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize(
    ("reach", "dtype"), [(127, "int8"), (128, "int16"), (32768, "int32"), (2**31 - 1, "int32")]
)
@pytest.mark.parametrize("float_dtype", ["float16", "float32", "float64"])
def test_dequantised_weights_equal_the_published_ones(
    reach: int, dtype: str, float_dtype: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(reach)
    q = rng.integers(-reach, reach, (9, 7), endpoint=True).astype(np.int64)
    q.flat[0] = reach
    step = 1e-5 if float_dtype == "float16" else 0.0123
    tensor = LatticeTensor(q, step, dtype=np.dtype(float_dtype))
    model = PublishedModel({"w": tensor})
    graph = _identity(np.dtype(float_dtype))
    bound = bind_weights(graph, model, tmp_path)
    assert bound.layout.segments[0].dtype == dtype
    got = _run(bound.model, {"input": np.zeros((9, 7), float_dtype)})
    with np.errstate(over="ignore"):
        want = tensor.dense()
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


def _identity(dtype: np.dtype) -> ExportedGraph:
    """A graph whose output is exactly its weight: Where(input == 0, w, input)."""
    from onnx import helper

    from prunecast.compression.codec import TensorSpec

    kind = helper.np_dtype_to_tensor_dtype(dtype)
    zero = helper.make_tensor("zero", kind, [], [0.0])
    nodes = [
        helper.make_node("Equal", ["input", "zero"], ["is_zero"]),
        helper.make_node("Where", ["is_zero", "w", "input"], ["output"]),
    ]
    value = [helper.make_tensor_value_info(n, kind, [9, 7]) for n in ("input", "output")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ExportedGraph(model.SerializeToString(), {"w": TensorSpec(dtype, (9, 7))})


def test_same_inputs_give_the_same_files(
    conv_graph: ExportedGraph, conv_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    first = bind_weights(conv_graph, published(conv_module), tmp_path / "a")
    again = bind_weights(conv_graph, published(conv_module), tmp_path / "b")
    assert first.model.read_bytes() == again.model.read_bytes()
    assert first.weights.read_bytes() == again.weights.read_bytes()
    assert hashlib.sha256(first.weights.read_bytes()).hexdigest() == first.weights_sha256
    assert first.layout == again.layout


def test_model_onnx_does_not_change_with_the_weights(
    conv_graph: ExportedGraph, conv_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    first = bind_weights(conv_graph, published(conv_module), tmp_path / "a")
    other = bind_weights(conv_graph, published(conv_module, step=0.02), tmp_path / "b")
    assert first.model.read_bytes() == other.model.read_bytes()
    assert first.weights_sha256 != other.weights_sha256


def test_tied_weights_bind_under_any_name_and_must_agree(
    tied_graph: ExportedGraph, tied_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    model = published(tied_module)
    tokens = {"tokens": np.random.default_rng(3).integers(0, 12, (4, 5))}
    want = _run(bind_weights(tied_graph, model, tmp_path / "both").model, tokens)
    for name in ("embedding.weight", "output.weight"):
        alone = PublishedModel({k: v for k, v in model.tensors.items() if k != name})
        bound = bind_weights(tied_graph, alone, tmp_path / name)
        assert _run(bound.model, tokens).tobytes() == want.tobytes()
    torn = model.tensors["output.weight"]
    assert isinstance(torn, LatticeTensor)
    tensors = {**model.tensors, "output.weight": replace(torn, q=torn.q + 1)}
    with pytest.raises(BindError, match="tied"):
        bind_weights(tied_graph, PublishedModel(tensors), tmp_path / "torn")


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (
            lambda n: f"module.{n}",
            r"begin with 'module\.', as DataParallel .*--strip-prefix module\.",
        ),
        (
            lambda n: f"_orig_mod.{n}",
            r"hold '_orig_mod\.', as torch\.compile .*--strip-prefix _orig",
        ),
        (lambda n: n.replace(".", "._orig_mod.", 1), r"hold '_orig_mod\.', as torch\.compile"),
        (lambda n: f"model.{n}", r"begin with 'model\.', as a LightningModule"),
        (lambda n: f"state_dict.model.{n}", r"--strip-prefix state_dict\.model\."),
        (
            lambda n: f"student.net.{n}",
            r"begin with 'student\.net\.'.*--strip-prefix student\.net\.",
        ),
    ],
    ids=["ddp", "compile", "compiled part", "lightning", "nested", "own"],
)
def test_a_wrapped_checkpoint_is_recognised(
    conv_graph: ExportedGraph,
    conv_module: nn.Module,
    published: Publish,
    tmp_path: Path,
    wrap: Callable[[str], str],
    says: str,
) -> None:
    tensors = {wrap(n): t for n, t in published(conv_module).tensors.items()}
    with pytest.raises(BindError, match=says):
        bind_weights(conv_graph, PublishedModel(tensors), tmp_path)
    with pytest.raises(BindError, match=says):
        bind_weights(
            conv_graph,
            PublishedModel({**tensors, "epoch": RawTensor(np.array(3))}),
            tmp_path,
        )


def test_a_wrapped_graph_is_recognised_too() -> None:
    known = ["module.fc.weight", "module.fc.bias"]
    said = explain_names(["fc.weight", "fc.bias"], known)
    assert "the names of the graph begin with 'module.'" in said
    assert "0 of the 2 names" in explain_names(["a", "b"], known)


def test_a_model_of_another_architecture_is_refused(
    conv_graph: ExportedGraph, conv_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    model = published(conv_module)
    lacking = {k: v for k, v in model.tensors.items() if k != "fc.bias"}
    with pytest.raises(BindError, match=r"lacks tensor 'fc\.bias'"):
        bind_weights(conv_graph, PublishedModel(lacking), tmp_path)
    extra = {**model.tensors, "head.weight": RawTensor(np.zeros(3, np.float32))}
    with pytest.raises(BindError, match=r"no place for 'head\.weight': it has all.*leave these"):
        bind_weights(conv_graph, PublishedModel(extra), tmp_path)
    wrong = {**model.tensors, "fc.bias": RawTensor(np.zeros(6, np.float32))}
    with pytest.raises(BindError, match=r"float32\[6\], the graph needs float32\[5\]"):
        bind_weights(conv_graph, PublishedModel(wrong), tmp_path)
    with pytest.raises(BindError, match="variant"):
        bind_weights(conv_graph, model, tmp_path, variant="int3")  # type: ignore[arg-type]


def test_empty_tensors_and_scalars_bind(published: Publish, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.none = nn.Parameter(torch.zeros(3, 0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x * self.gain, self.none.expand(3, 0).sum(1) + x], 1)

    graph = export_graph(Odd(), (torch.ones(2, 3),))
    bound = bind_weights(graph, published(Odd()), tmp_path)
    got = _run(bound.model, {"input": np.ones((2, 3), np.float32)})
    assert got.tolist() == [[2, 2, 2, 1, 1, 1]] * 2


def test_single_file_is_self_contained(
    conv_graph: ExportedGraph, conv_module: nn.Module, published: Publish, tmp_path: Path
) -> None:
    model = published(conv_module)
    path = tmp_path / "single.onnx"
    bound = bind_weights(conv_graph, model, tmp_path / "fp32", variant="fp32")
    size = export_single(bound.model.read_bytes(), bound.layout, model, path)
    assert size == path.stat().st_size == single_file_size(conv_graph, model)
    onnx.checker.check_model(str(path), full_check=True)
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    assert np.array_equal(held["fc.weight"], model.arrays()["fc.weight"])
