from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prunecast.compression.onnx import ExportError, FoldedParameter, NumericsError
from prunecast.compression.onnx.bind import Variant, bind_weights
from prunecast.compression.onnx.export import export_graph
from prunecast.compression.onnx.graph import ExportedGraph, load_graph, save_graph
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import PublishedModel


def test_every_tensor_that_inference_reads_is_a_parameter(conv_graph: ExportedGraph) -> None:
    assert set(conv_graph.parameters) == {
        *("conv.weight", "conv.bias", "fc.weight", "fc.bias"),
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
    }
    assert set(conv_graph.unused) == {"spare", "norm.num_batches_tracked"}
    assert conv_graph.parameters["conv.weight"].shape == (4, 1, 3, 3)


def test_skeleton_holds_no_weights_and_names_no_developer(conv_graph: ExportedGraph) -> None:
    model = onnx.ModelProto.FromString(conv_graph.skeleton)
    names = {i.name for i in model.graph.initializer}
    assert not names & set(conv_graph.parameters)
    assert b"/work" not in conv_graph.skeleton
    assert b".py" not in conv_graph.skeleton
    assert len(conv_graph.skeleton) < 4000
    assert {(o.domain, o.version >= 21) for o in model.opset_import} == {("", True)}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_export_is_exact_to_the_stated_difference(conv_graph: ExportedGraph) -> None:
    assert 0 <= conv_graph.max_difference < 1e-5


def test_export_leaves_the_module_as_it_was(conv_module: nn.Module) -> None:
    conv_module.train()
    conv_module.norm.eval()
    before = {k: v.clone() for k, v in conv_module.state_dict().items()}
    export_graph(conv_module, (torch.randn(2, 1, 6, 6),))
    assert conv_module.training
    assert not conv_module.norm.training
    assert all(torch.equal(before[k], v) for k, v in conv_module.state_dict().items())


def test_export_twice_gives_the_same_bytes(
    conv_module: nn.Module, conv_graph: ExportedGraph
) -> None:
    again = export_graph(conv_module, (torch.randn(2, 1, 6, 6),))
    assert again.skeleton == conv_graph.skeleton


def test_tied_weights_are_one_parameter(tied_graph: ExportedGraph) -> None:
    held = {"embedding.weight", "output.weight"} & set(tied_graph.parameters)
    assert len(held) == 1
    (holder,) = held
    assert set(tied_graph.names_of(holder)) == {"embedding.weight", "output.weight"}
    assert "scale" in tied_graph.parameters
    assert "offset" in tied_graph.parameters


class _Frozen(nn.Module):
    """Computes with a copy of its weight made when the graph is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.copy = torch.tensor([2.0, 3.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = self.copy if not torch.compiler.is_exporting() else torch.tensor([2.0, 3.0])
        return x * used + 0 * self.weight.sum()


class _Half(nn.Module):
    """Traced with a constant where eager execution reads the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return x * torch.tensor([2.0, 3.0])
        return x * self.weight


def test_a_value_frozen_while_tracing_is_found_by_perturbing() -> None:
    with pytest.raises(NumericsError, match="frozen"):
        export_graph(_Half(), (torch.ones(2, 2),))


def test_a_folded_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.onnx.export

    def optimising(*args: object, **kwargs: object) -> object:
        return real(*args, **{**kwargs, "optimize": True})

    monkeypatch.setattr(torch.onnx, "export", optimising)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(FoldedParameter, match=r"'1\.running_mean'|'1\.weight'"):
        export_graph(module, (torch.randn(2, 1, 5, 5),))


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ExportError, match="opset 17"):
        export_graph(nn.Linear(2, 2), (torch.ones(2, 2),), opset=17)
    with pytest.raises(ExportError, match="example inputs"):
        export_graph(nn.Linear(2, 2), ())
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export_graph(nn.Linear(2, 2), (torch.tensor(1.0),))


def test_a_graph_survives_its_file(tied_graph: ExportedGraph, tmp_path) -> None:
    path = tmp_path / "tied.graph.onnx"
    save_graph(tied_graph, path)
    again = load_graph(path)
    assert again == tied_graph
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ExportError):
        load_graph(path)
    with pytest.raises(ExportError, match="cannot read"):
        load_graph(tmp_path / "absent")


class _Deep(nn.Module):
    """Residual blocks whose last BatchNorm begins at zero, and an LSTM: many layers, many names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8))
            for _ in range(12)
        )
        for block in self.blocks:
            nn.init.zeros_(block[1].weight)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.out(self.lstm(x.transpose(1, 2))[0][:, -1])


def test_a_deep_module_exports_with_every_tensor_bound() -> None:
    torch.manual_seed(4)
    module = _Deep()
    graph = export_graph(module, (torch.randn(2, 8, 5),))
    read = {n for n in module.state_dict() if not n.endswith("num_batches_tracked")}
    assert set(graph.parameters) == read
    assert graph.max_difference < 1e-5


class _Norms(nn.Module):
    """Convolutions before BatchNorm: without a bias, with one that begins at zero, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        nn.init.zeros_(self.second.bias)
        for norm in self.norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        return self.up(torch.relu(x + self.norms[1](self.second(x))))


@pytest.mark.parametrize("variant", ["fp32", "lattice"])
def test_a_device_runs_no_norm_behind_a_convolution(
    variant: Variant, published: Callable[..., PublishedModel], tmp_path: Path
) -> None:
    torch.manual_seed(6)
    module = _Norms().eval()
    graph = export_graph(module, (torch.randn(2, 1, 6, 6),))
    nodes = onnx.ModelProto.FromString(graph.skeleton).graph.node
    inputs = [list(n.input[1:]) for n in nodes if n.op_type in ("Conv", "ConvTranspose")]
    assert inputs == [["first.weight"], ["second.weight", "second.bias"], ["up.weight"]]
    model = published(module)
    bound = bind_weights(graph, model, tmp_path / "signed", variant=variant)
    held = {segment.tensor for segment in bound.layout.segments}
    assert held == {n for n in module.state_dict() if not n.endswith("num_batches_tracked")}

    (tmp_path / "device").mkdir()
    fused = tmp_path / "device" / "model.onnx"
    session = open_session(bound.model, threads=1, save_optimised=fused)
    ran = [n.op_type for n in onnx.load(fused, load_external_data=False).graph.node]
    assert ran.count("Conv") == 2
    assert "BatchNormalization" not in ran
    image = torch.randn(3, 1, 6, 6)
    dense = {n: torch.from_numpy(np.array(t.dense())) for n, t in model.tensors.items()}
    with torch.no_grad():
        wanted = torch.func.functional_call(module, dense, (image,))
    np.testing.assert_allclose(
        session.run({"input": image.numpy()})["output"], wanted.numpy(), rtol=1e-4, atol=1e-5
    )
